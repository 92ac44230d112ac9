"""How a forecaster would have done: rolling origins at the end of series, beside the seasonal naive forecast.

Shapes: H steps ahead, V variates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vertebra.domains.timeseries.baselines import SeasonalNaive
from vertebra.domains.timeseries.forecast import SeriesForecast
from vertebra.domains.timeseries.metrics import Scores, summarise
from vertebra.domains.timeseries.series import Doubles, Series
from vertebra.domains.timeseries.spec import QUANTILES
from vertebra.errors import ConfigError, DataError, ShapeError

Forecaster = Callable[[Sequence[Series], int, Sequence[float]], list[SeriesForecast]]
"""Histories, horizon H and levels to one forecast for each history, in their order."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BacktestWindow:
    """A forecast of what is known by now.

    Args:
        series: The whole series.
        origin: Row where the forecast begins.
        forecast: The forecaster's, whose history is rows 0 to ``origin``.
        naive: The seasonal naive one.
    """

    series: Series
    origin: int
    forecast: SeriesForecast
    naive: SeriesForecast

    @property
    def actual(self) -> Doubles:
        """What came, (H, V); NaN where unknown, and for a variate of which nothing was known at the origin."""
        seen = np.isfinite(self.series.values[: self.origin]).any(0)
        return np.where(seen, self.series.values[self.origin : self.origin + len(self.forecast.mean)], np.nan)


@dataclass(frozen=True, kw_only=True, eq=False)
class Backtest:
    """What ``backtest`` found.

    Args:
        windows: One for each series and origin, in the order of the series, early origins first.
        left_out: Names of the series in which no window fits.
        horizon: Steps H.
    """

    windows: tuple[BacktestWindow, ...]
    left_out: tuple[str, ...]
    horizon: int

    @cached_property
    def scores(self) -> Scores:
        """Scores of the forecaster."""
        return self._scores([w.forecast for w in self.windows])

    @cached_property
    def naive_scores(self) -> Scores:
        """Scores of the seasonal naive forecast."""
        return self._scores([w.naive for w in self.windows])

    def _scores(self, forecasts: Sequence[SeriesForecast]) -> Scores:
        # one season scales both, whatever the forecaster assumed
        seasons = [w.naive.season for w in self.windows]
        return summarise(forecasts, [w.actual for w in self.windows], seasons)

    def rows(self) -> list[dict[str, str | int | float]]:
        """Return a row for each window and variate.

        It has series, variate, origin (row where the forecast begins), stamp (of that row), the metrics of ``Scores``,
        and those of the seasonal naive forecast as ``naive_mase`` and so on.
        """
        stamps = [str(w.forecast.series.stamps(1, w.origin)[0]) for w in self.windows for _ in w.series.variates]
        rows = []
        for stamp, own, naive in zip(stamps, self.scores.rows(), self.naive_scores.rows(), strict=True):
            key = {name: own.pop(name) for name in ("series", "variate", "origin")}
            beside = {f"naive_{name}": value for name, value in naive.items() if name not in key}
            rows.append({**key, "stamp": stamp, **own, **beside})
        return rows

    def summary(self) -> dict[str, dict[str, float]]:
        """Return the metrics of ``Scores`` over everything, of ``model``, of ``seasonal_naive``, and their ``ratio``.

        A ratio below 1 is better than naive; coverage has none, and it is NaN where the naive error is 0.
        """
        own, naive = self.scores.summary(), self.naive_scores.summary()
        ratio = {
            name: value / naive[name] if naive[name] else float("nan")
            for name, value in own.items()
            if not name.startswith("coverage_")
        }
        return {"model": own, "seasonal_naive": naive, "ratio": ratio}


def backtest(
    forecaster: Forecaster,
    series: Sequence[Series],
    horizon: int,
    windows: int = 5,
    stride: int | None = None,
    levels: Sequence[float] = QUANTILES,
    season: int = 0,
) -> Backtest:
    """Forecast the last steps of series as if they were not known yet.

    The last window ends with the series, each one before it ``stride`` steps earlier. A series takes part in the
    windows that fit: those with a known value before and in them. The forecaster sees rows before the origin alone, and
    covariates that are known ahead. It is called once for the windows that are equally far from the end.

    Args:
        forecaster: What is judged.
        series: Whole series.
        horizon: Steps H of a window.
        windows: Windows of a series, at most.
        stride: Steps from one to the next; None for the horizon.
        levels: Levels of the quantiles that are asked for; a forecaster of means may return none.
        season: Steps of the season that is repeated, and that MASE is scaled by; 0 for the one of the frequency.

    Raises:
        ConfigError: A number is below 1.
        DataError: No series has a window that fits.
        ShapeError: The forecaster returned something else than it was asked for.
    """
    step = horizon if stride is None else stride
    if min(horizon, windows, step) < 1 or season < 0:
        raise ConfigError(
            "backtest: horizon, windows and stride must be at least 1 and season at least 0, got "
            f"{horizon}, {windows}, {step} and {season}."
        )
    found: list[tuple[int, BacktestWindow]] = []
    for number in reversed(range(windows)):
        origins = [len(one) - horizon - number * step for one in series]
        fitting = [i for i, origin in enumerate(origins) if _fits(series[i], origin, horizon)]
        if not fitting:
            continue
        histories = [series[i].cut(0, origins[i]) for i in fitting]
        forecasts = forecaster(histories, horizon, levels)
        _check(forecasts, histories, horizon)
        naive = SeasonalNaive().forecast(histories, horizon, levels, season)
        for i, own, other in zip(fitting, forecasts, naive, strict=True):
            found.append((i, BacktestWindow(series=series[i], origin=origins[i], forecast=own, naive=other)))
    found.sort(key=lambda pair: pair[0])  # stable: early origins stay first
    taking_part = {i for i, _ in found}
    if not found:
        longest = max(map(len, series), default=0)
        raise DataError(
            f"backtest: no series has a known value in its last {horizon} steps and one before them; the longest has "
            f"{longest} rows. Lower the horizon, or give longer series."
        )
    left_out = tuple(one.name for i, one in enumerate(series) if i not in taking_part)
    return Backtest(windows=tuple(window for _, window in found), left_out=left_out, horizon=horizon)


def _fits(series: Series, origin: int, horizon: int) -> bool:
    """Whether a variate is known both before and after the origin."""
    if origin < 1:
        return False
    known = np.isfinite(series.values)
    return bool((known[:origin].any(0) & known[origin : origin + horizon].any(0)).any())


def _check(forecasts: Sequence[SeriesForecast], histories: Sequence[Series], horizon: int) -> None:
    """Refuse what does not answer the question."""
    if len(forecasts) != len(histories):
        raise ShapeError(f"backtest: the forecaster returned {len(forecasts)} forecasts of {len(histories)} series.")
    for one, history in zip(forecasts, histories, strict=True):
        shape = (horizon, history.values.shape[1])
        if one.mean.shape != shape or one.quantiles.shape != (len(one.levels), *shape):
            raise ShapeError(
                f"{history.where}: the forecaster must return a mean {shape} and quantiles "
                f"{(len(one.levels), *shape)}, got {one.mean.shape} and {one.quantiles.shape}."
            )
