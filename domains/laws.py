"""Power laws of the loss over parameters, data and compute, and what they need: envelopes, intervals, compute.

The form is L(A) = (A_c / A)^alpha of https://arxiv.org/abs/2001.08361, as fitted in https://arxiv.org/abs/2410.12360: a
straight line through log10 L over log10 A. A floor that no A gets below, L(A) = (A_c / A)^alpha + L_inf, can be fitted
too. Losses are numbers above 0, lower is better.

Shapes: N points, G points of a grid, K draws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import least_squares

from vertebra.errors import ConfigError, DataError

__all__ = [
    "PF_DAY",
    "Bootstrap",
    "PowerLaw",
    "bootstrap",
    "compute_of_step",
    "envelope",
    "fit_power_law",
    "pf_days",
]

Floats = NDArray[np.float64]

PF_DAY = 8.64e19
"""Floating point operations of a day at 10^15 a second."""
STARTS = (0.02, 0.3, 0.6, 0.8, 0.9, 0.97)
"""Where the search for a floor begins, as shares of the lowest loss."""
NO_FLOOR = 1e-3
"""Share of the lowest loss below which a floor counts as none."""
VAGUE = 0.5
"""Largest standard error of the exponent, relative to it, with which a law with a floor counts as found."""


@dataclass(frozen=True)
class PowerLaw:
    """L(A) = (A_c / A)^alpha + floor.

    Args:
        exponent: alpha, above 0 where the loss falls.
        intercept: log10 of what the law without floor says at A = 1, alpha * log10 A_c. Kept in place of A_c, which has
            no bounds as alpha goes to 0.
        r2: Share of the variance of log10 L that the law explains.
        floor: L_inf.
        points: Number of points N.
    """

    exponent: float
    intercept: float
    r2: float
    floor: float = 0.0
    points: int = 0

    @property
    def critical(self) -> float:
        """A_c; inf where it is too large for a float, nan where the loss does not fall."""
        return float(_critical(np.array([self.intercept]), np.array([self.exponent]))[0])

    def __call__(self, x: ArrayLike) -> Floats:
        """Return the loss the law says at ``x``, of the same shape."""
        return 10 ** (self.intercept - self.exponent * np.log10(np.asarray(x, float))) + self.floor


@dataclass(frozen=True)
class Bootstrap:
    """Laws of resampled points.

    Args:
        exponents: (K,), of which some may be below 0.
        intercepts: (K,).
        level: Share of the draws that an interval holds.
    """

    exponents: Floats
    intercepts: Floats
    level: float

    @property
    def exponent(self) -> tuple[float, float]:
        """Interval of alpha."""
        low, high = np.quantile(self.exponents, self._tails())
        return float(low), float(high)

    @property
    def critical(self) -> tuple[float, float]:
        """Interval of A_c; its end is inf where a part of the draws does not fall, or says more than a float holds."""
        values = np.where(self.exponents > 0, _critical(self.intercepts, self.exponents), np.inf)
        low, high = np.quantile(values, self._tails(), method="nearest")  # between two would be nan beside an inf
        return float(low), float(high)

    def band(self, x: ArrayLike) -> Floats:
        """Return the interval of the loss at ``x`` (G,), shape (2, G)."""
        lines = self.intercepts[:, None] - self.exponents[:, None] * np.log10(np.asarray(x, float))
        return np.asarray(10 ** np.quantile(lines, self._tails(), axis=0))

    def _tails(self) -> tuple[float, float]:
        return (1 - self.level) / 2, (1 + self.level) / 2


def fit_power_law(x: ArrayLike, loss: ArrayLike, weights: ArrayLike | None = None, *, offset: bool = False) -> PowerLaw:
    """Fit a power law by least squares of log10 L.

    Args:
        x: Parameters, data or compute A (N,), above 0.
        loss: L (N,), above 0.
        weights: Of the squares (N,), 0 or more; None for 1.
        offset: Whether to fit a floor too, by a search from several starts.

    Raises:
        ConfigError: A loss or an ``x`` is not above 0, or the shapes differ.
        DataError: Too few different ``x``, a loss that does not fall, or a floor that the points do not tell.
    """
    a, log_loss, w = _points(x, loss, weights)
    line = _line(a, log_loss, w)
    if not line.exponent > 0:
        raise DataError(
            f"fit_power_law: the loss must fall with x, got a slope of {-line.exponent:+.3g} over {len(a)} points; "
            "leave out points that are not trained to their end, or choose another metric."
        )
    return _with_floor(a, log_loss, w) if offset else line


def bootstrap(
    x: ArrayLike,
    loss: ArrayLike,
    draws: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    weights: ArrayLike | None = None,
) -> Bootstrap:
    """Fit laws without floor to resampled points, for intervals.

    Pairs (x, loss) are drawn with replacement. Where an ``x`` has several losses, of several seeds, each draw takes
    values of ``x`` first, and then as many losses from each as it has. Draws of a single ``x`` are made anew.

    Args:
        x: As in ``fit_power_law``.
        loss: The same.
        draws: K.
        seed: Seed of the draws.
        level: Share of the draws that an interval holds.
        weights: As in ``fit_power_law``.

    Raises:
        ConfigError: A setting is impossible, or as ``fit_power_law``.
        DataError: There are fewer than three different ``x``.
    """
    if draws < 1 or not 0 < level < 1:
        raise ConfigError(f"bootstrap: draws must be at least 1 and level between 0 and 1, got {draws} and {level}.")
    a, log_loss, w = _points(x, loss, weights)
    places = [np.flatnonzero(a == value) for value in np.unique(a)]
    if len(places) < 3:
        raise DataError(f"bootstrap: intervals need at least three different x, got {len(places)}.")
    rng = np.random.default_rng(seed)
    taken = np.empty((0, len(places)), dtype=np.int64)  # how often each x is in a draw
    while len(taken) < draws:
        more = rng.multinomial(len(places), np.full(len(places), 1 / len(places)), size=draws)
        taken = np.concatenate([taken, more[(more > 0).sum(1) > 1]])
    counts = np.zeros((draws, len(a)))
    for place, times in zip(places, taken[:draws].T, strict=True):
        counts[:, place] = rng.multinomial(times * len(place), np.full(len(place), 1 / len(place)))
    slopes, intercepts = _slopes(a, log_loss, counts * w)
    return Bootstrap(-slopes, intercepts, level)


def envelope(
    compute: ArrayLike, loss: ArrayLike, decimals: int = 1, *, monotone: bool = False
) -> tuple[Floats, Floats]:
    """Return the lowest loss at each amount of compute, over all runs.

    Args:
        compute: C of every point of every run (N,), above 0.
        loss: L (N,), above 0.
        decimals: log10 C is rounded to this many, as in https://arxiv.org/abs/2410.12360.
        monotone: Whether a value that is no lower than one at less compute is left out.

    Returns:
        Compute (G,), rising, in the middle of its bin, and the lowest loss (G,) there.
    """
    log_compute, log_loss, _ = _points(compute, loss, None)
    bins, places = np.unique(np.round(log_compute, decimals) + 0.0, return_inverse=True)
    lowest = np.full(len(bins), np.inf)
    np.minimum.at(lowest, places, log_loss)
    if monotone:
        before = np.concatenate([[np.inf], np.minimum.accumulate(lowest)[:-1]])
        bins, lowest = bins[lowest < before], lowest[lowest < before]
    return 10**bins, 10**lowest


def compute_of_step(params: float, tokens: float) -> float:
    """Return the floating point operations of an optimizer step, 6 N tokens (https://arxiv.org/abs/2001.08361).

    Args:
        params: Parameters N that every token meets.
        tokens: Positions in the batch of a step.
    """
    return 6.0 * params * tokens


def pf_days(operations: float) -> float:
    """Return operations in petaflop-days."""
    return operations / PF_DAY


# ---------------------------------------------------------------- inside


def _points(x: ArrayLike, loss: ArrayLike, weights: ArrayLike | None) -> tuple[Floats, Floats, Floats]:
    a, values = np.asarray(x, float), np.asarray(loss, float)
    w = np.ones_like(values) if weights is None else np.asarray(weights, float)
    if a.ndim != 1 or a.shape != values.shape or a.shape != w.shape:
        raise ConfigError(
            f"power law: x, loss and weights must be lists of one length, got {a.shape}, {values.shape} and {w.shape}."
        )
    if not np.isfinite(values).all() or (values <= 0).any():
        worst = values[~np.isfinite(values)][0] if not np.isfinite(values).all() else values.min()
        raise ConfigError(
            f"power law: every loss must be above 0, got {worst:.4g} (log-likelihoods of densities can be below); use "
            "a metric that is positive, such as crps, or shift the loss: --shift of `vertebra scaling`."
        )
    if not np.isfinite(a).all() or (a <= 0).any():
        raise ConfigError(f"power law: every x must be above 0, got {a.min():.4g}.")
    if not np.isfinite(w).all() or (w < 0).any():
        raise ConfigError(f"power law: weights must be 0 or more, got {w.min():.4g}.")
    return np.log10(a), np.log10(values), w


def _line(a: Floats, log_loss: Floats, w: Floats) -> PowerLaw:
    found = len(np.unique(a[w > 0]))
    if found < 2:
        raise DataError(f"power law: there must be at least two different x, got {found}.")
    slope, intercept = (float(v[0]) for v in _slopes(a, log_loss, w[None]))
    return PowerLaw(-slope, intercept, _r2(log_loss, intercept + slope * a, w), points=len(a))


def _slopes(a: Floats, log_loss: Floats, w: Floats) -> tuple[Floats, Floats]:
    """Return slopes (K,) and intercepts (K,) of the lines of weights w (K, N)."""
    whole = w.sum(1)
    at, height = w @ a / whole, w @ log_loss / whole
    away = a - at[:, None]
    slopes = (w * away * log_loss).sum(1) / (w * away**2).sum(1)
    return slopes, height - slopes * at


def _with_floor(a: Floats, log_loss: Floats, w: Floats) -> PowerLaw:
    found = len(np.unique(a[w > 0]))
    if found < 4:
        raise DataError(f"fit_power_law: a law with a floor needs at least four different x, got {found}.")
    lowest, center, root = 10 ** log_loss.min(), a.mean(), np.sqrt(w)

    def predicted(p: Floats) -> Floats:  # p: log alpha, log10 of the falling part at the center, share of the lowest
        return np.asarray(np.log10(10 ** (p[1] - np.exp(p[0]) * (a - center)) + p[2] * lowest))

    def residuals(p: Floats) -> Floats:
        return root * (predicted(p) - log_loss)

    best = None
    for share in STARTS:
        start = _line(a, np.log10(10**log_loss - share * lowest), w)
        first = [np.log(max(start.exponent, 1e-4)), start.intercept - start.exponent * center, share]
        limits = ([-12.0, -np.inf, 0.0], [4.0, np.inf, 2.0])
        fit = least_squares(residuals, first, bounds=limits, xtol=1e-12, ftol=1e-14, max_nfev=300)
        if fit.success and (best is None or fit.cost < best.cost):
            best = fit
    if best is None:
        raise DataError(
            f"fit_power_law: no search from {len(STARTS)} starts came to an end, so the points do not tell a floor; "
            "add points over a wider range, or fit a law without."
        )
    exponent, share = float(np.exp(best.x[0])), float(best.x[2])
    if share < NO_FLOOR:
        raise DataError("fit_power_law: the points show no floor above 0; fit a law without.")
    freedom = max(len(a) - 3, 1)
    # a direct inverse would hide a singular matrix behind large numbers
    _, sizes, rows = np.linalg.svd(best.jac, full_matrices=False)
    error = np.sqrt(2 * best.cost / freedom * np.sum((rows[:, 0] / np.maximum(sizes, 1e-12)) ** 2))
    if sizes[-1] < 1e-9 * sizes[0] or error > VAGUE:
        raise DataError(
            "fit_power_law: the points do not tell a floor from a slower fall (the exponent is uncertain by "
            f"{100 * min(error, 9.99):.0f} percent or more); add points over a wider range, or fit a law without."
        )
    intercept = float(best.x[1] + exponent * center)
    return PowerLaw(exponent, intercept, _r2(log_loss, predicted(best.x), w), share * lowest, len(a))


def _r2(y: Floats, predicted: Floats, w: Floats) -> float:
    whole = np.sum(w * (y - np.average(y, weights=w)) ** 2)
    return float(1 - np.sum(w * (y - predicted) ** 2) / whole) if whole > 0 else float("nan")


def _critical(intercept: Floats, exponent: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return np.where(exponent > 0, np.power(10.0, intercept / exponent), np.nan)
