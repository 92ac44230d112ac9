"""Time series: what comes after them, with its uncertainty, and how good such forecasts were.

Shapes: T steps of a series, V variates, H steps ahead, F steps for which covariates are known beyond the end.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import Bad, Item, Pipeline, RunResult, Writer, as_bad
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.timeseries_files import ForecastFiles, ForecastResult, PredictedSeries

if TYPE_CHECKING:
    from vertebra.domains.model import DomainModel
    from vertebra.domains.timeseries.backtest import BacktestWindow
    from vertebra.domains.timeseries.forecast import SeriesForecast
    from vertebra.domains.timeseries.heads import Head
    from vertebra.domains.timeseries.series import Doubles, Series

Names = Sequence[str]

_ENTRY = ("target", "start", "freq", "item_id", "past_feat_dynamic_real", "feat_dynamic_real")
"""Keys of a series that is given as a dict, those of GluonTS."""


@verb(
    "timeseries/forecast",
    inputs="series (CSV wide or long, .json and .jsonl of GluonTS, .tsf, .npz, .parquet, text also as .gz, folders of "
    "these)",
    outputs=".csv, .parquet or .json: mean and quantiles of every step, and fan charts OUT.png; with --backtest "
    "OUT.backtest.csv and OUT.backtest.json (MASE, CRPS, MSE, sMAPE and coverage, beside the seasonal naive forecast)",
    model="timeseries_zero",
    tasks=("timeseries/forecast",),
)
class ForecastSeries(Pipeline):
    """What comes after series: quantiles of every step, and how good they were in a backtest.

    Args:
        model: Forecaster.
        device: See ``Pipeline``.
        batch_size: Most series in a batch.
        batch_tokens: Most patches in a batch.
        horizon: Steps to forecast; None for those of the model.
        quantiles: Levels, rising, between 0 and 1; None for those of the model.
        season: Steps of a season; None for what the model, or the frequency, says.
        frequency: Step between two values, such as ``h`` or ``15min``; None to find it.
        layout: ``wide``, ``long`` or ``auto``.
        time: Column of the stamps; None to find it.
        item: Column of the series' names, in long files; None to find it.
        target: Columns to forecast; None for all that are numbers, or those of the model.
        past: Columns of covariates known up to the end; None for those of the model.
        known: Columns of covariates known beyond it; None for those of the model.
        delimiter: Between columns; None to find it.
        decimal: ``.``, ``,`` or ``auto``.
        date_format: Format of the stamps, as ``strptime`` has it; None to find it.
        multivariate: Read a wide file as one series of several variates, not as one series a column.
        backtest: Windows at the end of each series that are forecast as if they were not known; 0 for none.
        stride: Steps from one window to the next; None for the horizon.
        figures: Most series that get a figure.
        history: Steps that figures show before the forecast; None for about three horizons.
    """

    endings = (".csv", ".json", ".parquet")
    unit = "series"
    reads_folders = True

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
        horizon: int | None = None,
        quantiles: Sequence[float] | None = None,
        season: int | None = None,
        frequency: str | None = None,
        layout: Literal["auto", "wide", "long"] = "auto",
        time: str | None = None,
        item: str | None = None,
        target: Names | None = None,
        past: Names | None = None,
        known: Names | None = None,
        delimiter: str | None = None,
        decimal: Literal["auto", ".", ","] = "auto",
        date_format: str | None = None,
        multivariate: bool = False,
        backtest: int = 0,
        stride: int | None = None,
        figures: int = 4,
        history: int | None = None,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.domains.timeseries.inference import SeriesForecaster
        from vertebra.domains.timeseries.model import PatchForecaster
        from vertebra.domains.timeseries.sources import SourceOptions

        assert isinstance(self.model, PatchForecaster)
        for name, value in (("horizon", horizon), ("season", season), ("stride", stride), ("history", history)):
            if value is not None and value < 1:
                raise ConfigError(f"{self.name}: {name} must be at least 1, got {value}.")
        for name, value in (("backtest", backtest), ("figures", figures)):
            if value < 0:
                raise ConfigError(f"{self.name}: {name} must be 0 or more, got {value}.")
        if stride is not None and not backtest:
            raise ConfigError(f"{self.name}: stride is for a backtest; give backtest too, or leave it out.")
        self.spec = spec = self.model.spec
        self.horizon = spec.horizon if horizon is None else horizon
        self.season = season or spec.season
        self.levels = self._levels(quantiles)
        self.backtest, self.stride, self.figures, self.history = backtest, stride, figures, history
        self.own_covariates = past is None and known is None
        self.options = SourceOptions(
            frequency=frequency,
            layout=layout,
            time=time,
            item=item,
            target=tuple(target) if target else spec.variates or None,
            past=spec.past if past is None else tuple(past),
            known=spec.known if known is None else tuple(known),
            delimiter=delimiter,
            decimal=decimal,
            date_format=date_format,
            multivariate=multivariate or bool(spec.variates),
        )
        once = self.model.patch if self.model.stepwise else spec.horizon
        paths = len(spec.quantiles) if self.horizon > once else 1
        self.patches = self.model.context_patches * paths
        """Patches in a batch for each variate of a series."""
        self.forecaster = SeriesForecaster(self.model, self.device)
        self.lines: tuple[str, ...] = ()
        """What a run ends with, before the files."""

    def _levels(self, wanted: Sequence[float] | None) -> tuple[float, ...]:
        import torch

        if wanted is None:
            return self.spec.quantiles
        levels = tuple(float(level) for level in wanted)
        if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
            raise ConfigError(f"{self.name}: quantiles must rise, between 0 and 1, got {' '.join(map(str, levels))}.")
        head = cast("Head", self.model.param_proj)
        if head.quantiles(torch.zeros(head.numbers, 1, device=self.device), levels) is None:
            raise ConfigError(f"{self.name}: the model tells no quantiles, only means; leave quantiles out.")
        return levels

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        add = parser.add_argument_group("forecast").add_argument
        add("--horizon", type=int, metavar="N", help="steps to forecast (default: those of the model)")
        add(
            "--quantiles", type=float, nargs="+", metavar="Q", help="levels, such as 0.1 0.5 0.9 (default: the model's)"
        )
        add("--season", type=int, metavar="M", help="steps of a season (default: the usual one of the frequency)")
        add("--figures", type=int, default=4, metavar="N", help="most series drawn (default: 4)")
        add("--history", type=int, metavar="N", help="steps drawn before the forecast (default: about three horizons)")
        add = parser.add_argument_group("backtest").add_argument
        add("--backtest", type=int, default=0, metavar="N", help="windows at the end of each series to test on")
        add("--stride", type=int, metavar="S", help="steps from one window to the next (default: the horizon)")
        add = parser.add_argument_group("files").add_argument
        add("--frequency", metavar="F", help="step between two values: h, 15min, D, MS, ... (default: found)")
        add("--layout", choices=("auto", "wide", "long"), default="auto", help="of tables (default: auto)")
        add("--time", metavar="NAME", help="column of the stamps (default: found)")
        add("--item", metavar="NAME", help="column that tells the series of a long table apart (default: found)")
        add("--target", nargs="+", metavar="NAME", help="columns to forecast (default: all that are numbers)")
        add(
            "--past", nargs="+", metavar="NAME", help="columns of covariates known up to the end (default: the model's)"
        )
        add("--known", nargs="+", metavar="NAME", help="columns of covariates known beyond it (default: the model's)")
        add("--delimiter", metavar="C", help="between columns (default: found)")
        add("--decimal", choices=("auto", ".", ","), default="auto", help="sign of decimals (default: auto)")
        add("--date-format", metavar="FORMAT", help="of the stamps, as strptime has it: %%d.%%m.%%Y (default: found)")
        add("--multivariate", action="store_true", help="columns of a wide table are variates of one series")

    def run(self, inputs: Iterable[str | Path], output: str | Path, *, progress: bool = True) -> RunResult:
        """As in ``Pipeline``; the result tells frequencies, seasons and the backtest too."""
        self.lines = ()
        done = super().run(inputs, output, progress=progress)
        return ForecastResult(done.good, done.bad, done.paths, self.lines)

    # ---------------------------------------------------------------- reading

    def folder_files(self, folder: Path) -> list[Path]:
        """List the files of series in a folder; a data set of GluonTS stands for itself."""
        from vertebra.domains.timeseries.sources import LeftOut, find_series

        left: list[LeftOut] = []
        found = find_series([folder], left)
        if not found:
            raise DataError(str(left[0]))
        return found

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the series of a file, or of a data set of GluonTS."""
        from vertebra.domains.timeseries.sources import read_series

        try:
            found, left = read_series([path], self.options)
        except DataError as error:
            needed = (*self.spec.past, *self.spec.known)
            if self.own_covariates and any(f"there is no column {name!r}" in str(error) for name in needed):
                raise DataError(
                    f"{str(error).removesuffix('.')}. The model reads the covariates {', '.join(needed)}; add the "
                    "columns, or use another model."
                ) from None
            raise
        for one in left:
            bad(as_bad(DataError(one.reason), file=one.file, record=one.record))
        for series in found:
            try:
                yield self._item(series, str(path))
            except DataError as error:
                bad(as_bad(error, file=str(path), record=series.name))

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the series that an array (T,) or (T, V), a dict as GluonTS has it, or a ``Series`` stands for."""
        from vertebra.domains.timeseries.series import Series

        if isinstance(value, dict):
            value = self._of_entry(value, f"series_{index}")
        elif not isinstance(value, Series):
            value = self._series(f"series_{index}", _numbers(value, f"{self.name}: series {index}"))
        value.check()
        yield self._item(value, "")

    def _item(self, series: Series, file: str) -> Item:
        series = self._fitted(series)
        return Item(file=file, record=series.name, data=series, size=self.patches * len(series.variates))

    def _series(self, name: str, values: Doubles) -> Series:
        """A series of an array (T, V)."""
        from vertebra.domains.timeseries.frequency import parse_frequency
        from vertebra.domains.timeseries.series import UNCOUNTED, Series

        width = values.shape[1]
        names = ("target",) if width == 1 else tuple(f"target_{i}" for i in range(width))
        if len(self.spec.variates) == width:
            names = self.spec.variates
        step = UNCOUNTED if self.options.frequency is None else parse_frequency(self.options.frequency)
        return Series(name=name, values=values, variates=names, frequency=step)

    def _of_entry(self, entry: dict[str, Any], name: str) -> Series:
        from vertebra.domains.timeseries.frequency import parse_frequency

        where = str(entry.get("item_id") or name)
        if unknown := [key for key in entry if key not in _ENTRY]:
            raise DataError(f"{where}: {unknown[0]!r} is no key of a series; keys: {', '.join(_ENTRY)}.")
        if "target" not in entry:
            raise DataError(f"{where}: has no target; keys: {', '.join(entry) or 'none'}.")
        series = self._series(where, _rows(entry["target"], f"{where}: target"))
        facts: dict[str, Any] = {}
        if self.options.frequency is None and entry.get("freq"):
            facts["frequency"] = parse_frequency(str(entry["freq"]))
        if entry.get("start") is not None:
            if facts.get("frequency", series.frequency).unit == "step":
                raise DataError(f"{where}: has a start and no freq; give freq too, or leave start out.")
            try:
                facts["start"] = np.datetime64(entry["start"], "ms")
            except ValueError:
                raise DataError(
                    f"{where}: start {entry['start']!r} is no time; write it as 2016-07-01 00:00."
                ) from None
        for key, kind in (("past_feat_dynamic_real", "past"), ("feat_dynamic_real", "known")):
            if entry.get(key) is not None:
                block = _rows(entry[key], f"{where}: {key}")
                names = getattr(self.spec, kind)
                if len(names) != block.shape[1]:
                    names = tuple(f"{key}_{i}" for i in range(block.shape[1]))
                facts |= {kind: block, f"{kind}_names": names}
        return dataclasses.replace(series, **facts)

    def _fitted(self, series: Series) -> Series:
        """The series with the covariates that the model reads, in its order.

        Raises:
            DataError: Some are missing, or end too early.
        """
        facts: dict[str, Any] = {}
        columns = (*series.variates, *series.past_names, *series.known_names)
        for kind in ("past", "known"):
            needed: tuple[str, ...] = getattr(self.spec, kind)
            given: tuple[str, ...] = getattr(series, f"{kind}_names")
            if missing := [name for name in needed if name not in given]:
                one = len(missing) == 1
                raise DataError(
                    f"{series.where}: lacks the {kind} covariate{'' if one else 's'} {', '.join(missing)}, which the "
                    f"model reads; columns: {', '.join(columns)}. Name {'it' if one else 'them'} with "
                    f"{kind}: {' '.join(needed)}."
                )
            if given != needed:
                block = getattr(series, kind)[:, [given.index(name) for name in needed]] if needed else np.zeros((0, 0))
                facts |= {kind: block, f"{kind}_names": needed}
        series = dataclasses.replace(series, **facts) if facts else series
        for name, column in zip(series.known_names, series.known.T, strict=True):
            told = np.flatnonzero(np.isfinite(column))
            there = int(told[-1]) + 1 - len(series) if len(told) else -len(series)
            if there < self.horizon:
                lacking = self.horizon - max(there, 0)
                raise DataError(
                    f"{series.where}: the covariate {name} is known for {max(there, 0)} steps beyond the end, and the "
                    f"horizon is {self.horizon}: {lacking} {'is' if lacking == 1 else 'are'} missing; add rows without "
                    "a target, or lower the horizon."
                )
        return series

    def prepared(self, items: Iterator[Item], bad: Bad) -> Iterator[Item]:
        """Name a series by its file too where an earlier file has one of its name."""
        seen: set[str] = set()
        for item in items:
            name, number = item.record, 2
            if name in seen and item.file:
                name = f"{Path(item.file).name.split('.')[0]}/{item.record}"
            while name in seen:
                name, number = f"{item.record}.{number}", number + 1
            seen.add(name)
            if name != item.record:
                item = dataclasses.replace(item, record=name, data=dataclasses.replace(item.data, name=name))
            yield item

    # ---------------------------------------------------------------- forecasting

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Forecast a batch of series; with a backtest, their ends too."""
        series: list[Series] = [item.data for item in items]
        windows = self._windows(series) if self.backtest else {}
        made: list[Prediction] = []
        for item, one in zip(items, self._forecast(series, self.horizon, self.levels), strict=True):
            median = one.median[:, 0] if one.median.shape[1] == 1 else one.median
            made.append(
                PredictedSeries(
                    median,
                    name=item.record,
                    label="median" if one.levels else "mean",
                    forecast=one,
                    windows=tuple(windows.get(id(item.data), ())),
                    history=self.history,
                )
            )
        return made

    def _forecast(self, series: Sequence[Series], horizon: int, levels: Sequence[float]) -> list[SeriesForecast]:
        size = max(1, self.batch_tokens // self.patches)
        return self.forecaster.forecast(series, horizon, levels, season=self.season, batch_size=size)

    def _windows(self, series: Sequence[Series]) -> dict[int, list[BacktestWindow]]:
        """Windows of the series that are long enough, by the ``id`` of the series."""
        from vertebra.domains.timeseries.backtest import backtest

        found: dict[int, list[BacktestWindow]] = {}
        if long := [one for one in series if _is_long(one, self.horizon)]:
            tested = backtest(self._forecast, long, self.horizon, self.backtest, self.stride, self.levels, self.season)
            for window in tested.windows:
                found.setdefault(id(window.series), []).append(window)
        return found

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the file of forecasts."""
        return ForecastFiles(self, outputs, several_files)


def _is_long(series: Series, horizon: int) -> bool:
    """Whether a variate is known both before and in the last steps."""
    known = np.isfinite(series.values)
    begin = len(series) - horizon
    return begin > 0 and bool((known[:begin].any(0) & known[begin:].any(0)).any())


def _numbers(value: Any, where: str) -> Doubles:
    """An array (T, V) of what may be one of (T,)."""
    try:
        found = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        found = np.empty(0)
    if found.ndim not in (1, 2) or not found.size:
        told = f" of shape {np.shape(value)}" if isinstance(value, np.ndarray) else ""
        raise DataError(
            f"{where}: must be a path, a Series, a dict with a target, or an array of numbers (T,) or (T, V), got "
            f"{type(value).__name__}{told}."
        )
    return found[:, None] if found.ndim == 1 else found


def _rows(value: Any, where: str) -> Doubles:
    """An array (T, V) of what GluonTS has as (T,) or (V, T)."""
    try:
        found = np.asarray(value, dtype=np.float64)  # None becomes NaN
    except (TypeError, ValueError):
        raise DataError(f"{where} must be numbers (T,) or (V, T); write None for no value.") from None
    if found.ndim not in (1, 2) or not found.size:
        raise DataError(f"{where} must be numbers (T,) or (V, T), got the shape {found.shape}.")
    return found[:, None] if found.ndim == 1 else found.T
