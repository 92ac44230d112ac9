"""What ``timeseries/forecast`` gives: forecasts, their figures, and the files of a run.

Shapes: H steps ahead, V variates, Q levels.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.pipelines import figures
from vertebra.pipelines.base import Item, RunResult, Writer
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.timeseries_figures import fan_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vertebra.domains.timeseries.backtest import Backtest, BacktestWindow
    from vertebra.domains.timeseries.forecast import SeriesForecast
    from vertebra.domains.timeseries.frequency import Frequency
    from vertebra.pipelines.timeseries import ForecastSeries

_METRICS = {"mase": "MASE", "crps": "CRPS", "mse": "MSE", "mae": "MAE", "smape": "sMAPE", "nd": "ND", "msis": "MSIS"}
_TABLE = ("mase", "crps", "mse", "smape")
"""Metrics of the table that a run ends with; coverages follow."""
_MOST_KINDS = 3
_UNITS = {
    "ms": "millisecond", "s": "second", "min": "minute", "h": "hour", "D": "day", "B": "weekday", "W": "week",
    "MS": "month", "QS": "quarter", "YS": "year", "step": "step",
}  # fmt: skip


@dataclass(eq=False)
class PredictedSeries(Prediction):
    """The forecast of one series; ``value`` is its median, (H,) of one variate or (H, V) of several.

    Args:
        forecast: All of it.
        windows: Of a backtest; empty without one.
        history: Steps that the figure shows before the forecast; None for the usual.
    """

    forecast: SeriesForecast = dataclasses.field(kw_only=True)
    windows: tuple[BacktestWindow, ...] = dataclasses.field(default=(), kw_only=True)
    history: int | None = dataclasses.field(default=None, kw_only=True)

    def figure(self) -> Figure:
        """Draw the end of the series and what may come; windows of a backtest over what came."""
        one = self.forecast
        title = f"{self.name}: {_span(len(one.mean), one.series.frequency)} ahead"
        return fan_figure(one, self.windows, history=self.history, title=title)

    def to_dict(self) -> dict[str, Any]:
        """Return the forecast as GluonTS names things: item_id, start, freq, mean, quantiles by level.

        Numbers of a series of several variates are (V, H), as its ``target`` is. ``start`` is the stamp of the first
        step, or where there are no stamps the number of its row.
        """
        one = self.forecast
        names = {"variates": list(one.series.variates)} if len(one.series.variates) > 1 else {}
        return {
            "item_id": self.name,
            "start": stamps_of(one)[0],
            "freq": str(one.series.frequency),
            "season": one.season,
            **names,
            "mean": _listed(one.mean),
            "quantiles": {level: _listed(q) for level, q in zip(names_of(one.levels), one.quantiles, strict=True)},
        }

    def columns(self, *, variates: bool) -> dict[str, list[Any]]:
        """Return columns with a row for each step, variate by variate: item, stamp, variate, mean, and the levels."""
        one = self.forecast
        horizon, count = one.mean.shape
        found: dict[str, list[Any]] = {
            "item": [self.name] * (horizon * count),
            "stamp": stamps_of(one) * count,
        }
        if variates:
            found["variate"] = [name for name in one.series.variates for _ in range(horizon)]
        found["mean"] = one.mean.T.ravel().tolist()
        for level, quantile in zip(names_of(one.levels), one.quantiles, strict=True):
            found[level] = quantile.T.ravel().tolist()
        return found

    def _table(self) -> list[list[Any]]:
        columns = self.columns(variates=len(self.forecast.series.variates) > 1)
        return [list(columns), *([*map(_cell, row)] for row in zip(*columns.values(), strict=True))]


@dataclass(frozen=True)
class ForecastResult(RunResult):
    """What a run did, and what there is to say of the series.

    Args:
        lines: Said before where the files are.
    """

    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join([*self.lines, super().__str__()])


class ForecastFiles(Writer):
    """OUT.csv, OUT.parquet or OUT.json with forecasts; figures; OUT.backtest.csv and OUT.backtest.json."""

    def __init__(self, pipeline: ForecastSeries, outputs: Outputs, several_files: bool) -> None:
        self.pipeline, self.outputs, self.several = pipeline, outputs, several_files
        self.kind = outputs.target.suffix
        self.file = outputs.open(outputs.target, "wb" if self.kind == ".parquet" else "w")
        self.made: list[tuple[str, PredictedSeries]] = []
        self.kinds: Counter[tuple[str, int]] = Counter()
        self.short: list[str] = []

    def write(self, item: Item, prediction: Prediction) -> None:
        """Keep one forecast, and draw it."""
        assert isinstance(prediction, PredictedSeries)
        one = prediction.forecast
        self.kinds[str(one.series.frequency), one.season] += 1
        if self.pipeline.backtest and not prediction.windows:
            self.short.append(prediction.name)
        self.made.append((item.file, prediction))
        if (number := len(self.made)) <= self.pipeline.figures:
            name = re.sub(r"[^\w.-]+", "_", prediction.name)[:60]
            path = self.outputs.side(".png" if number == 1 else f".{number}.{name}.png")
            self.outputs.write(path, figures.png_bytes(prediction.figure()))

    def finish(self) -> None:
        """Write all forecasts, and the backtest."""
        if not self.made:
            return
        if self.kind == ".json":
            entries = [{"file": file, **made.to_dict()} if self.several else made.to_dict() for file, made in self.made]
            lines = (json.dumps(entry, ensure_ascii=False) for entry in entries)
            self.file.write("[\n" + ",\n".join(lines) + "\n]\n")
        elif self.kind == ".csv":
            table = csv.writer(self.file, lineterminator="\n")
            for number, columns in enumerate(self._columns()):
                if not number:
                    table.writerow(columns)
                table.writerows([*map(_cell, row)] for row in zip(*columns.values(), strict=True))
        else:
            self._write_parquet()
        self.pipeline.lines = tuple(self._lines())

    def _columns(self) -> Iterator[dict[str, list[Any]]]:
        variates = any(len(made.forecast.series.variates) > 1 for _, made in self.made)
        for file, made in self.made:
            columns = made.columns(variates=variates)
            yield {"file": [file] * len(columns["item"]), **columns} if self.several else columns

    def _write_parquet(self) -> None:
        import pyarrow
        import pyarrow.parquet

        parts = list(self._columns())
        joined: dict[str, Any] = {name: [v for part in parts for v in part[name]] for name in parts[0]}
        stamped = {made.forecast.series.start is not None for _, made in self.made}
        if stamped == {True}:
            stamps = [np.tile(m.forecast.stamps, len(m.forecast.series.variates)) for _, m in self.made]
            joined["stamp"] = np.concatenate(stamps).astype("datetime64[ms]")
        elif len(stamped) > 1:  # a column has one type
            joined["stamp"] = [str(stamp) for stamp in joined["stamp"]]
        pyarrow.parquet.write_table(pyarrow.table(joined), self.file)

    # ---------------------------------------------------------------- what is said at the end

    def _lines(self) -> Iterator[str]:
        if self.pipeline.backtest:
            yield from self._write_backtest()
        told = "given" if self.pipeline.options.frequency else "found"
        for (frequency, season), count in self.kinds.most_common(_MOST_KINDS):
            often = "without stamps" if frequency == "step" else f"frequency {frequency} ({told})"
            seasonal = "no season" if season == 1 else f"season of {season:,} steps"
            yield f"{count:,} series: {often}, {seasonal}"
        if (rest := len(self.kinds) - _MOST_KINDS) > 0:
            yield f"and {_plural(rest, 'more kind')} of series"

    def _write_backtest(self) -> Iterator[str]:
        windows = tuple(window for _, made in self.made for window in made.windows)
        pipeline = self.pipeline
        if not windows:
            yield (
                f"no backtest: no series has a value before and in its last {pipeline.horizon} steps; lower --horizon, "
                "or give longer series"
            )
            return
        from vertebra.domains.timeseries.backtest import Backtest

        found = Backtest(windows=windows, left_out=tuple(self.short), horizon=pipeline.horizon)
        table = csv.writer(self.outputs.open(self.outputs.side(".backtest.csv")), lineterminator="\n")
        rows = [_renamed(row) for row in found.rows()]
        files = [f for f, made in self.made for w in made.windows for _ in w.series.variates]
        first = {"file": files} if self.several else {}
        table.writerow([*first, *rows[0]])
        for number, row in enumerate(rows):
            table.writerow([*(own[number] for own in first.values()), *map(_cell, row.values())])
        summary = found.summary()
        tested = len({id(window.series) for window in windows})
        facts = {
            "pipeline": pipeline.name,
            "horizon": found.horizon,
            "windows": pipeline.backtest,
            "stride": pipeline.stride or found.horizon,
            "series": tested,
            "too_short": list(found.left_out),
            **{who: {name: _number(v) for name, v in own.items()} for who, own in summary.items()},
        }
        stream = self.outputs.open(self.outputs.side(".backtest.json"))
        json.dump(facts, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        yield from _table_lines(found, summary, tested)
        if self.short:
            names = ", ".join(self.short[:3]) + (", ..." if len(self.short) > 3 else "")
            yield f"too short for a backtest: {names}"


def _table_lines(found: Backtest, summary: dict[str, dict[str, float]], series: int) -> Iterator[str]:
    """A table for people: the forecaster beside the seasonal naive forecast."""
    own, naive, ratio = (summary[name] for name in ("model", "seasonal_naive", "ratio"))
    count = len(found.windows)
    yield f"backtest of {series:,} series, {_plural(count, 'window')} of {_plural(found.horizon, 'step')}:"
    yield f"  {'':<16}{'model':>12}{'seasonal naive':>18}{'ratio':>10}"
    shown = (*_TABLE, *(name for name in own if name.startswith("coverage_")))
    for name in (name for name in shown if not math.isnan(own[name])):
        label = _METRICS.get(name) or f"in the {name.removeprefix('coverage_')} % band"
        cells = [_shown(part.get(name, math.nan)) for part in (own, naive, ratio)]
        yield f"  {label:<16}{cells[0]:>12}{cells[1]:>18}{cells[2]:>10}".rstrip()


def _span(steps: int, frequency: Frequency) -> str:
    """``24 hours``, ``96 steps of 15 minutes``."""
    word = _UNITS[frequency.unit]
    if frequency.count == 1:
        return _plural(steps, word)
    return f"{_plural(steps, 'step')} of {_plural(frequency.count, word)}"


def _plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _shown(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.4g}"


def names_of(levels: Sequence[float]) -> list[str]:
    """Names of the columns of levels: ``0.1``."""
    return [f"{level:g}" for level in levels]


def stamps_of(forecast: SeriesForecast) -> list[str] | list[int]:
    """Stamps of the H steps as text, ``2016-07-01 00:00:00``; numbers of rows where there are none."""
    stamps = forecast.stamps
    if stamps.dtype.kind != "M":
        return [int(row) for row in stamps]
    texts = np.datetime_as_string(stamps.astype("datetime64[ms]"), "ms").tolist()
    return [text.replace("T", " ").removesuffix(".000") for text in texts]


def _listed(values: Any) -> list[Any]:
    """Numbers (H, V) as a list of H, or V lists of H."""
    told = [[_number(v) for v in column] for column in values.T.tolist()]
    return told[0] if len(told) == 1 else told


def _number(value: float) -> float | None:
    """A number with as many digits as float32 has; None where it is none."""
    return None if math.isnan(value) else float(f"{value:.7g}")


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.7g}"


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a backtest with the words and stamps of the other files."""
    stamp = str(row.pop("stamp")).replace("T", " ").removesuffix(".000")
    return {"item": row.pop("series"), "variate": row.pop("variate"), "stamp": stamp, **row}
