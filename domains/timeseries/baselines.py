"""Forecasts without learning, and linear ones: what a model must beat.

Shapes: H steps ahead, V variates, T steps of a history, L steps of a window, N windows, B batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import NormalDist
from typing import Self

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor, nn

from vertebra.domains.timeseries.forecast import SeriesForecast
from vertebra.domains.timeseries.series import Doubles, Series
from vertebra.domains.timeseries.spec import QUANTILES
from vertebra.errors import ConfigError, DataError

_ROWS = 4096  # windows of the normal equations at a time, to bound memory


# --- series -----------------------------------------------------------------------------------------------------------


class Baseline(ABC):
    """A forecast with normal quantiles about a mean; a variate without any known value is NaN."""

    @abstractmethod
    def moments(self, values: Doubles, horizon: int, season: int) -> tuple[Doubles, Doubles]:
        """Return mean and standard deviation of the forecast, (H, V) each.

        Args:
            values: History (T, V), NaN where unknown.
            horizon: Steps H.
            season: Steps of a season.
        """

    def forecast(
        self,
        series: Sequence[Series],
        horizon: int,
        levels: Sequence[float] = QUANTILES,
        season: int | None = None,
    ) -> list[SeriesForecast]:
        """Forecast the continuation of every series.

        Args:
            series: Histories.
            horizon: Steps H.
            levels: Levels Q of the quantiles, rising; none for the mean alone.
            season: Steps of a season; None or 0 for what each series' frequency says. It is the one that the forecasts
                name, so that they are scaled alike whatever the baseline made of it.

        Raises:
            ConfigError: The horizon is below 1, the season negative, or levels do not rise between 0 and 1.
            DataError: A series has no row.
        """
        if horizon < 1 or (season or 0) < 0:
            raise ConfigError(
                f"{type(self).__name__}: horizon must be at least 1 and season at least 0, got {horizon} and {season}."
            )
        told = tuple(float(level) for level in levels)
        if list(told) != sorted(set(told)) or any(not 0 < level < 1 for level in told):
            raise ConfigError(f"{type(self).__name__}: levels must rise, between 0 and 1, got {list(told)}.")
        away = np.array([NormalDist().inv_cdf(level) for level in told])[:, None, None]  # (Q, 1, 1)
        found = []
        for one in series:
            if not len(one):
                raise DataError(f"{one.where}: holds no row to forecast from; leave it out.")
            steps = season or one.frequency.season
            mean, std = self.moments(one.values, horizon, steps)
            quantiles = mean + away * std
            found.append(SeriesForecast(series=one, mean=mean, quantiles=quantiles, levels=told, season=steps))
        return found


class SeasonalNaive(Baseline):
    """The last season again.

    A step takes the last known value of its phase; where none is known, and in a series shorter than a season, the
    last known value of all. The variance is that of the differences a season apart, times the seasons since the value
    taken (Hyndman & Athanasopoulos, "Forecasting: Principles and Practice", 3rd ed., section 5.5). Where no two values
    a season apart are known, differences from step to step stand in; where there are none either, quantiles are the
    mean.
    """

    def moments(self, values: Doubles, horizon: int, season: int) -> tuple[Doubles, Doubles]:
        """As in ``Baseline``."""
        mean, std = _repeat(values, horizon, 1)
        if 1 < season <= len(values):
            seasonal, spread = _repeat(values, horizon, season)
            known = np.isfinite(seasonal)
            mean, std = np.where(known, seasonal, mean), np.where(known, spread, std)
        return mean, std


class RepeatLast(Baseline):
    """The last known value: a random walk without drift, whose variance grows with the steps since that value."""

    def moments(self, values: Doubles, horizon: int, season: int) -> tuple[Doubles, Doubles]:
        """As in ``Baseline``."""
        return _repeat(values, horizon, 1)


class WindowMean(Baseline):
    """The mean of the last steps, as if values were independent.

    Args:
        window: Steps that are averaged; None for the whole history.

    Raises:
        ConfigError: The window is below 1.
    """

    def __init__(self, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise ConfigError(f"WindowMean: window must be at least 1, got {window}.")
        self.window = window

    def moments(self, values: Doubles, horizon: int, season: int) -> tuple[Doubles, Doubles]:
        """As in ``Baseline``; a window without a known value has the mean of the whole history."""
        recent = values if self.window is None else values[-self.window :]
        known = np.isfinite(recent).any(0)
        both = zip(_mean_and_std(recent), _mean_and_std(values), strict=True)
        mean, std = (np.where(known, own, whole) for own, whole in both)
        shape = (horizon, values.shape[1])
        return np.broadcast_to(mean, shape).copy(), np.broadcast_to(std, shape).copy()


def _mean_and_std(values: Doubles) -> tuple[Doubles, Doubles]:
    """Mean of the known values and standard deviation of the next one, (V,) each."""
    known = np.isfinite(values)
    count = known.sum(0)
    mean = np.where(known, values, 0).sum(0) / np.maximum(count, 1)
    squares = (np.where(known, values - mean, 0) ** 2).sum(0)
    std = np.sqrt(squares / np.maximum(count - 1, 1) * (1 + 1 / np.maximum(count, 1)))
    return np.where(count > 0, mean, np.nan), std


def _repeat(values: Doubles, horizon: int, season: int) -> tuple[Doubles, Doubles]:
    """Repeat the last known value of each phase: mean and standard deviation, (H, V)."""
    length, count = values.shape
    seasons = -(-length // season)
    whole = np.full((seasons * season, count), np.nan)
    whole[len(whole) - length :] = values
    phases = whole.reshape(seasons, season, count)
    known = np.isfinite(phases)
    age = known[::-1].argmax(0)  # (season, V): seasons between the last known value of a phase and the end
    last = np.take_along_axis(phases, (seasons - 1 - age)[None], 0)[0]
    phase, ahead = np.arange(horizon) % season, np.arange(horizon) // season + 1
    spread = _difference(values, season)
    spread = np.where(np.isfinite(spread), spread, _difference(values, 1))
    return last[phase], np.nan_to_num(spread) * np.sqrt(ahead[:, None] + age[phase])


def _difference(values: Doubles, lag: int) -> Doubles:
    """Root mean square of the known differences at a lag, (V,); NaN where there are none."""
    away = values[lag:] - values[:-lag]
    known = np.isfinite(away)
    count = known.sum(0)
    return np.where(count > 0, np.sqrt((np.where(known, away, 0) ** 2).sum(0) / np.maximum(count, 1)), np.nan)


# --- windows ----------------------------------------------------------------------------------------------------------


def repeat_last(windows: Doubles, horizon: int) -> Doubles:
    """Repeat the last value of windows (..., L): (..., H), a view."""
    return np.broadcast_to(windows[..., -1:], (*windows.shape[:-1], horizon))


def window_mean(windows: Doubles, horizon: int) -> Doubles:
    """Repeat the mean of windows (..., L): (..., H), a view."""
    return np.broadcast_to(windows.mean(-1, keepdims=True), (*windows.shape[:-1], horizon))


def seasonal_naive(windows: Doubles, horizon: int, season: int) -> Doubles:
    """Repeat the last ``season`` values of windows (..., L): (..., H).

    Raises:
        ConfigError: The windows are shorter than a season.
    """
    length = windows.shape[-1]
    if not 1 <= season <= length:
        raise ConfigError(f"seasonal_naive: season must be from 1 to the {length} steps of a window, got {season}.")
    return windows[..., length - season + np.arange(horizon) % season]


class Ridge:
    """A linear map from a window to what follows, all variates alike, in closed form.

    The last value is subtracted from the window and added to the forecast, so that the level does not matter. The
    weights minimise the sum of squared errors over all windows plus ``alpha`` times the sum of squared weights.

    Args:
        context: Steps L.
        horizon: Steps H.
        alpha: Strength of the penalty; to be chosen on validation windows.

    Raises:
        ConfigError: A number is out of its range.
    """

    def __init__(self, context: int, horizon: int, alpha: float = 1.0) -> None:
        if context < 2 or horizon < 1 or alpha <= 0:
            raise ConfigError(
                "Ridge: context must be at least 2, horizon at least 1 and alpha above 0, got "
                f"{context}, {horizon} and {alpha}."
            )
        self.context, self.horizon, self.alpha = context, horizon, alpha
        self.weight: Doubles | None = None  # (L, H)

    def fit(self, series: Doubles, every: int = 1) -> Self:
        """Learn from the windows of a series.

        Args:
            series: (T, V); windows with a missing value are left out.
            every: Rows between two windows.

        Raises:
            ConfigError: ``every`` is below 1.
            DataError: No window is complete.
        """
        if every < 1:
            raise ConfigError(f"Ridge: every must be at least 1, got {every}.")
        length, span = self.context, self.context + self.horizon
        gram, cross = np.zeros((length, length)), np.zeros((length, self.horizon))
        count = 0
        for column in series.T if len(series) >= span else ():
            windows = sliding_window_view(column, span)[::every]
            for begin in range(0, len(windows), _ROWS):
                rows = windows[begin : begin + _ROWS].astype(np.float64)
                rows = rows[np.isfinite(rows).all(1)]
                rows -= rows[:, length - 1 : length].copy()
                gram += rows[:, :length].T @ rows[:, :length]
                cross += rows[:, :length].T @ rows[:, length:]
                count += len(rows)
        if not count:
            raise DataError(
                f"Ridge: no {span} rows in succession are complete, the series has {len(series)}; shorten context or "
                "horizon."
            )
        weight = np.linalg.solve(gram + self.alpha * np.eye(length), cross)
        self.weight = np.asarray(weight, np.float64)
        return self

    def predict(self, windows: Doubles) -> Doubles:
        """Forecast what follows windows (..., L): (..., H).

        Raises:
            ConfigError: ``fit`` was not called.
        """
        if self.weight is None:
            raise ConfigError("Ridge: call fit before predict.")
        last = windows[..., -1:]
        return (windows - last) @ self.weight + last


class DLinear(nn.Module):
    """Two linear maps, of a moving average and of what remains, the same for all variates.

    Zeng et al., "Are Transformers Effective for Time Series Forecasting?", AAAI 2023. The first forecast is about the
    mean of the window, as all weights begin at 1 / L.

    Args:
        context: Steps L.
        horizon: Steps H.
        window: Steps of the moving average, odd; the first and last value are repeated beyond the ends.

    Raises:
        ConfigError: A number is below 1, or the window is even.
    """

    def __init__(self, context: int, horizon: int, window: int = 25) -> None:
        super().__init__()
        if min(context, horizon, window) < 1 or window % 2 == 0:
            raise ConfigError(
                "DLinear: context, horizon and window must be at least 1 and window odd, got "
                f"{context}, {horizon} and {window}."
            )
        self.average = nn.AvgPool1d(window, stride=1)
        self.reach = window // 2
        self.trend, self.remainder = nn.Linear(context, horizon), nn.Linear(context, horizon)
        for layer in (self.trend, self.remainder):
            nn.init.constant_(layer.weight, 1 / context)

    def forward(self, x: Tensor) -> Tensor:
        """Forecast what follows ``x`` (B, V, L): (B, V, H)."""
        padded = nn.functional.pad(x, (self.reach, self.reach), mode="replicate")
        trend = self.average(padded)  # (B, V, L)
        return self.trend(trend) + self.remainder(x - trend)
