"""How good forecasts are: of series in files (numpy), and of batches while a model trains (torchmetrics).

Conventions, those of GluonTS and GIFT-Eval. A missing true value (NaN) does not count. MSE judges the mean of a
forecast, MAE, MASE, ND and sMAPE its median. ``crps`` is the weighted quantile loss, averaged over the levels told.
Over many series, MASE and MSIS are means over series, all others are ratios of sums over everything.

Shapes: H steps ahead, V variates, T steps of history, Q levels, N scored forecasts of one variate each, B windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric

from vertebra.domains.timeseries.forecast import SeriesForecast
from vertebra.domains.timeseries.series import Doubles
from vertebra.errors import ConfigError, ShapeError

_SAME = 1e-6  # difference of levels that are the same
_ALPHA = 0.05  # of MSIS, where the levels are told

# --- one series -------------------------------------------------------------------------------------------------------


def _divide(above: Doubles, below: Doubles) -> Doubles:
    """Divide; NaN where ``below`` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below == 0, np.nan, above / below)


def _sum(actual: Doubles, values: Doubles) -> Doubles:
    """Sum over the steps whose true value is known, the second axis from the end."""
    return np.where(np.isfinite(actual), values, 0).sum(-2)


def _mean(actual: Doubles, values: Doubles) -> Doubles:
    return _divide(_sum(actual, values), _sum(actual, np.ones_like(actual)))


def mse(actual: Doubles, forecast: Doubles) -> Doubles:
    """Mean squared error of each variate, (V,); NaN where no true value is known, as with all these functions.

    Args:
        actual: True values (H, V), NaN where unknown.
        forecast: (H, V).
    """
    return _mean(actual, (actual - forecast) ** 2)


def mae(actual: Doubles, forecast: Doubles) -> Doubles:
    """Mean absolute error of each variate, (V,); arguments as for ``mse``."""
    return _mean(actual, np.abs(actual - forecast))


def nd(actual: Doubles, forecast: Doubles) -> Doubles:
    """Normalised deviation of each variate, (V,): sum of |error| / sum of |y|; NaN where all y are 0."""
    return _divide(_sum(actual, np.abs(actual - forecast)), _sum(actual, np.abs(actual)))


def smape(actual: Doubles, forecast: Doubles) -> Doubles:
    """Symmetric percentage error of each variate, (V,): mean of 2 |error| / (|y| + |forecast|), from 0 to 2.

    A step at which both are 0 has no error.
    """
    return _mean(actual, _relative(actual, forecast))


def _relative(actual: Doubles, forecast: Doubles) -> Doubles:
    sizes = np.abs(actual) + np.abs(forecast)
    return 2 * np.abs(actual - forecast) / np.where(sizes == 0, 1, sizes)


def seasonal_error(history: Doubles, season: int) -> Doubles:
    """Mean absolute difference between values a season apart in a history, (V,): what MASE and MSIS divide by.

    Where it is 0, or no two known values lie a season apart, values one step apart are taken; NaN where that fails too.

    Args:
        history: Values before the forecast (T, V), NaN where unknown.
        season: Steps of a season.

    Raises:
        ConfigError: The season is below 1.
    """
    if season < 1:
        raise ConfigError(f"MASE: season must be at least 1, got {season}.")

    def scale(lag: int) -> Doubles:
        return _divide(*_lagged(history, lag))

    found = scale(season)
    found = np.where(np.isfinite(found) & (found > 0), found, scale(1))
    return np.where(found > 0, found, np.nan)


def _lagged(history: Doubles, lag: int) -> tuple[Doubles, Doubles]:
    """Sum and number of the absolute differences at a lag."""
    away = np.abs(history[lag:] - history[:-lag])
    return _sum(away, away), _sum(away, np.ones_like(away))


def mase(actual: Doubles, forecast: Doubles, history: Doubles, season: int) -> Doubles:
    """Mean absolute scaled error of each variate, (V,), by the in-sample error of the seasonal naive forecast.

    Hyndman & Koehler, "Another look at measures of forecast accuracy", 2006.

    Args:
        actual: True values (H, V), NaN where unknown.
        forecast: (H, V).
        history: Values before the forecast (T, V); see ``seasonal_error``.
        season: Steps of a season.
    """
    return mae(actual, forecast) / seasonal_error(history, season)


def quantile_losses(actual: Doubles, quantiles: Doubles, levels: Sequence[float]) -> Doubles:
    """Twice the pinball loss of each level, summed over the steps: (Q, V).

    Args:
        actual: True values (H, V), NaN where unknown.
        quantiles: (Q, H, V).
        levels: Levels of the Q quantiles.
    """
    rho = np.array(levels)[:, None, None]
    away = actual - quantiles
    return _sum(actual, 2 * np.maximum(rho * away, (rho - 1) * away))


def weighted_quantile_loss(actual: Doubles, quantiles: Doubles, levels: Sequence[float]) -> Doubles:
    """Weighted quantile loss of each variate, (V,), also called CRPS: mean over levels of the losses / sum of |y|.

    Arguments as for ``quantile_losses``; NaN where there are no levels or all y are 0.
    """
    sizes = _sum(actual, np.abs(actual))
    return _divide(quantile_losses(actual, quantiles, levels).sum(0), len(levels) * sizes)


def coverage(actual: Doubles, lower: Doubles, upper: Doubles) -> Doubles:
    """Share of the true values within an interval, its ends included, of each variate, (V,); all (H, V)."""
    return _mean(actual, _inside(actual, lower, upper))


def _inside(actual: Doubles, lower: Doubles, upper: Doubles) -> Doubles:
    return ((actual >= lower) & (actual <= upper)).astype(np.float64)


def msis(
    actual: Doubles, lower: Doubles, upper: Doubles, history: Doubles, season: int, alpha: float = _ALPHA
) -> Doubles:
    """Mean scaled interval score of each variate, (V,), as in the M4 competition.

    Args:
        actual: True values (H, V), NaN where unknown.
        lower: Quantile of level alpha / 2, (H, V).
        upper: Quantile of level 1 - alpha / 2, (H, V).
        history: Values before the forecast (T, V); see ``seasonal_error``.
        season: Steps of a season.
        alpha: Share of the values that should lie outside.
    """
    return _mean(actual, _interval(actual, lower, upper, alpha)) / seasonal_error(history, season)


def _interval(actual: Doubles, lower: Doubles, upper: Doubles, alpha: float) -> Doubles:
    outside = np.maximum(lower - actual, 0) + np.maximum(actual - upper, 0)
    return upper - lower + 2 / alpha * outside


def level_pairs(levels: Sequence[float]) -> list[tuple[int, int]]:
    """Return the places of levels that lie symmetric about .5, the widest interval first."""
    pairs = itertools.combinations(range(len(levels)), 2)
    return [(low, high) for low, high in pairs if abs(levels[low] + levels[high] - 1) < _SAME]


def coverage_name(levels: Sequence[float], pair: tuple[int, int]) -> str:
    """Return the name of the coverage of a pair of levels: ``coverage_80`` for .1 and .9."""
    return f"coverage_{round(100 * (levels[pair[1]] - levels[pair[0]]), 4):g}"


# --- many series ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What forecasts of N single variates missed; see ``summarise``.

    Metrics are ``mase``, ``crps``, ``mse``, ``mae``, ``smape``, ``nd``, ``msis``, and ``coverage_80`` and the like for
    each pair of levels that is symmetric about .5; NaN where one is not defined, as ``crps`` without quantiles. MSIS
    has alpha .05 if levels .025 and .975 are told, else that of the widest symmetric pair.

    Args:
        series: Names of the series, one for each forecast.
        variates: Names of the variates.
        origins: Rows of the series where the forecasts begin.
        sums: Sums over the steps by name, (N,) each.
        scales: What MASE and MSIS divide by, (N,).
    """

    series: tuple[str, ...]
    variates: tuple[str, ...]
    origins: tuple[int, ...]
    sums: Mapping[str, Doubles]
    scales: Doubles

    def __len__(self) -> int:
        return len(self.series)

    def columns(self) -> dict[str, Doubles]:
        """Return each metric of each forecast, (N,)."""
        scaled = {name: _divide(self.sums[key], self.sums["steps"]) / self.scales for name, key in _SCALED.items()}
        return _in_order({**_ratios(self.sums), **scaled})

    def rows(self) -> list[dict[str, str | int | float]]:
        """Return a row for each forecast: series, variate, origin, and the metrics."""
        columns = self.columns()
        rows = []
        for i, (series, variate, origin) in enumerate(zip(self.series, self.variates, self.origins, strict=True)):
            key: dict[str, str | int | float] = {"series": series, "variate": variate, "origin": origin}
            rows.append(key | {name: float(values[i]) for name, values in columns.items()})
        return rows

    def summary(self) -> dict[str, float]:
        """Return the metrics over everything.

        MASE and MSIS are averaged over the forecasts of each variate, then over these; what has no scale is left out.
        """
        columns = self.columns()
        judged = (self.sums["steps"] > 0) & np.isfinite(self.scales)
        keys = list(zip(self.series, self.variates, strict=True))
        numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
        group = np.array([numbers[key] for key in keys])[judged]
        members = np.bincount(group)
        found = _ratios({name: np.asarray(values.sum()) for name, values in self.sums.items()})
        for name in _SCALED:
            means = np.bincount(group, columns[name][judged])[members > 0] / members[members > 0]
            found[name] = np.asarray(means.mean() if len(means) else np.nan)
        return {name: float(value) for name, value in _in_order(found).items()}


_RATIOS = {
    "crps": ("quantile", "size"),
    "mse": ("squared", "steps"),
    "mae": ("absolute", "steps"),
    "smape": ("relative", "steps"),
    "nd": ("absolute", "size"),
}
_SCALED = {"mase": "absolute", "msis": "interval"}
_ORDER = ("mase", "crps", "mse", "mae", "smape", "nd", "msis")


def _ratios(sums: Mapping[str, Doubles]) -> dict[str, Doubles]:
    """Metrics that are ratios of sums."""
    found = {name: _divide(sums[above], sums[below]) for name, (above, below) in _RATIOS.items()}
    return found | {name: _divide(sums[name], sums["steps"]) for name in sums if name.startswith("coverage_")}


def _in_order(found: Mapping[str, Doubles]) -> dict[str, Doubles]:
    return {name: found[name] for name in (*_ORDER, *(n for n in found if n not in _ORDER))}


def summarise(forecasts: Sequence[SeriesForecast], actuals: Iterable[Doubles], seasons: Sequence[int] = ()) -> Scores:
    """Compare forecasts, all of the same levels, with what came.

    Args:
        forecasts: Forecasts; each holds its history.
        actuals: What came, (H, V) each, NaN where unknown.
        seasons: Steps of the season that each is scaled by in MASE and MSIS; none for those that the forecasts name.

    Raises:
        ConfigError: There is no forecast, or levels differ.
        ShapeError: What came has another shape than its forecast.
    """
    if not forecasts:
        raise ConfigError("summarise: there is no forecast to compare.")
    levels = forecasts[0].levels
    scaled_by = seasons or [f.season for f in forecasts]
    parts = []
    for one, actual in zip(forecasts, actuals, strict=True):
        if one.levels != levels:
            raise ConfigError(f"summarise: forecasts must be of the same levels, got {levels} and {one.levels}.")
        if actual.shape != one.mean.shape:
            raise ShapeError(f"{one.series.where}: the forecast is {one.mean.shape}, what came is {actual.shape}.")
        parts.append(_sums_of(one, actual))
    return Scores(
        series=tuple(f.series.name for f in forecasts for _ in f.series.variates),
        variates=tuple(name for f in forecasts for name in f.series.variates),
        origins=tuple(len(f.series) for f in forecasts for _ in f.series.variates),
        sums={name: np.concatenate([part[name] for part in parts]) for name in parts[0]},
        scales=np.concatenate(
            [seasonal_error(f.series.values, steps) for f, steps in zip(forecasts, scaled_by, strict=True)]
        ),
    )


def _sums_of(forecast: SeriesForecast, actual: Doubles) -> dict[str, Doubles]:
    """Sums over the steps of each variate, (V,)."""
    levels, told, median = forecast.levels, forecast.quantiles, forecast.median
    pairs = level_pairs(levels)
    sums = {
        "steps": np.ones_like(actual),
        "squared": (actual - forecast.mean) ** 2,
        "absolute": np.abs(actual - median),
        "relative": _relative(actual, median),
        "size": np.abs(actual),
        "interval": np.full_like(actual, np.nan),
    }
    for pair in pairs:
        sums[coverage_name(levels, pair)] = _inside(actual, told[pair[0]], told[pair[1]])
    if pairs:
        exact = [p for p in pairs if abs(levels[p[0]] - _ALPHA / 2) < _SAME]
        low, high = exact[0] if exact else pairs[0]
        sums["interval"] = _interval(actual, told[low], told[high], 2 * levels[low])
    found = {name: _sum(actual, values) for name, values in sums.items()}
    losses = quantile_losses(actual, told, levels).sum(0)
    return found | {"quantile": _divide(losses, np.full_like(losses, len(levels)))}


# --- batches ----------------------------------------------------------------------------------------------------------

_SUMS = ("steps", "squared", "absolute", "size", "quantile", "covered")


class ForecastErrors(Metric):
    """Errors of batches of forecasts, in all and by step and by variate.

    Metrics are ``mse`` and ``mae`` of the mean, and where levels are told ``crps`` (the weighted quantile loss) and
    ``coverage`` (of the interval between the outermost levels). Sums are kept in float64. With several processes each
    must have seen a batch.

    Args:
        horizon: Steps H.
        levels: Levels Q of the quantiles, rising; none for forecasts of the mean alone.
    """

    higher_is_better = False
    full_state_update = True  # states take the number of variates from the first batch and cannot be merged before
    sums: Tensor

    def __init__(self, horizon: int, levels: Sequence[float] = ()) -> None:
        super().__init__()
        self.horizon, self.levels = horizon, tuple(levels)
        self._gathered: Tensor | None = None
        self.add_state("sums", torch.zeros(len(_SUMS), 0, horizon, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def seen(self) -> bool:
        """Whether there was a batch."""
        return self.sums.shape[1] > 0

    def update(self, target: Tensor, observed: Tensor, mean: Tensor, quantiles: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            target: True values (B, V, H).
            observed: Which of them are known, bool (B, V, H).
            mean: Forecast (B, V, H).
            quantiles: (B, V, Q, H); None where no levels are told.

        Raises:
            ShapeError: The horizon, the number of levels or that of variates is another one than before.
        """
        own = 0 if quantiles is None else quantiles.shape[2]
        if target.shape[-1] != self.horizon or own != len(self.levels):
            raise ShapeError(
                f"ForecastErrors: needs {self.horizon} steps and {len(self.levels)} levels, got {target.shape[-1]} "
                f"and {own}."
            )
        if self.seen and self.sums.shape[1] != target.shape[1]:
            raise ShapeError(
                f"ForecastErrors: batches must have equally many variates, got {self.sums.shape[1]} and "
                f"{target.shape[1]}."
            )
        truth, away = target.double(), target.double() - mean.double()
        zero = torch.zeros_like(truth)
        loss, covered = zero, zero
        if quantiles is not None:
            told = quantiles.double()
            levels = told.new_tensor(self.levels)[:, None]
            below = truth.unsqueeze(2) - told  # (B, V, Q, H)
            loss = 2 * torch.maximum(levels * below, (levels - 1) * below).mean(2)
            covered = ((truth >= told[:, :, 0]) & (truth <= told[:, :, -1])).double()
        parts = torch.stack([zero + 1, away**2, away.abs(), truth.abs(), loss, covered])
        found = parts.masked_fill(~observed, 0).sum(1)  # (6, V, H)
        self.sums = self.sums + found if self.seen else found
        self._gathered = None

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics over everything."""
        self._gathered = self.sums
        return self._values((1, 2))

    def by_step(self) -> dict[str, Tensor]:
        """Return the metrics of each step of the horizon, (H,); NaN for one that is never known.

        After ``compute`` they are those of all processes, as with ``by_variate``.
        """
        return self._values((1,))

    def by_variate(self) -> dict[str, Tensor]:
        """Return the metrics of each variate, (V,)."""
        return self._values((2,))

    def reset(self) -> None:
        """Forget all batches."""
        super().reset()
        self._gathered = None

    def _values(self, over: tuple[int, ...]) -> dict[str, Tensor]:
        sums = self.sums if self._gathered is None else self._gathered
        total = dict(zip(_SUMS, sums.sum(over), strict=True))
        found = {"mse": total["squared"] / total["steps"], "mae": total["absolute"] / total["steps"]}
        if self.levels:
            found["crps"] = total["quantile"] / total["size"]
        if len(self.levels) > 1:
            found["coverage"] = total["covered"] / total["steps"]
        return {name: value.float() for name, value in found.items()}


__all__ = [
    "ForecastErrors",
    "Scores",
    "coverage",
    "coverage_name",
    "level_pairs",
    "mae",
    "mase",
    "mse",
    "msis",
    "nd",
    "quantile_losses",
    "seasonal_error",
    "smape",
    "summarise",
    "weighted_quantile_loss",
]
