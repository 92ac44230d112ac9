"""Fabricated series without end, to train forecasters that have not seen the series they are asked about.

Item ``i`` of seed ``s`` comes from ``numpy.random.default_rng([s, i])`` and nothing else, so that it is the same
whatever batch it is in. The families of ``TRAINING`` look like what people measure and sell; those of ``HELD_OUT``
come from other mechanisms and are for tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from vertebra.domains.timeseries import mechanisms
from vertebra.domains.timeseries.kernels import compose
from vertebra.domains.timeseries.structure import (
    Doubles,
    Season,
    ar1,
    between,
    deviation,
    draw_season,
    noise,
    pick,
    profile,
    seasons,
    trend,
    unit,
)
from vertebra.errors import ConfigError, UnknownNameError

SHORTEST = 8
"""Steps of a series, at least."""

UNKNOWN, WRONG, IMAGINED = 0.25, 0.05, 0.2
"""How often :func:`draw_batch` tells season 1, another season, and a season where there is none."""

_OUTLIERS, _ROUNDED, _FLIPPED = 0.12, 0.1, 0.1  # how often values are spoilt so
_WRONG = (2, 4, 5, 7, 10, 12, 24, 30, 48, 52, 60, 96, 144, 168)


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """A fabricated series.

    Args:
        values: (T,), all finite.
        season: Main period in steps; 1 where nothing repeats.
        frequency: As ``Frequency`` writes it.
    """

    values: Doubles
    season: int
    frequency: str


Maker = Callable[[np.random.Generator, int], tuple[Doubles, Season]]


@dataclass(frozen=True)
class _Family:
    make: Maker
    text: str
    weight: float = 0.0  # in training
    signed: bool = False  # may be shifted and turned upside down
    spoilt: bool = False  # may have outliers and be rounded


def draw(family: str, length: int, seed: int | Sequence[int]) -> Drawn:
    """Fabricate one series.

    Args:
        family: One of :func:`families`.
        length: Steps T, at least 8.
        seed: Of ``numpy.random.default_rng``.

    Raises:
        UnknownNameError: There is no such family.
        ConfigError: ``length`` is too small.
    """
    _check(length, (family,))
    values, season = _make(np.random.default_rng(seed), family, length)
    return Drawn(values=values, season=season.main, frequency=season.frequency)


def draw_batch(
    indices: NDArray[np.int64], length: int, seed: int, families: tuple[str, ...] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Fabricate series of mixed families, each with the season a user might tell.

    In one of four the season is told as unknown, in one of twenty it is another; and where nothing repeats, one in five
    has the season of some frequency all the same. A model can use a season that is told, and cannot trust it.

    Args:
        indices: Numbers of the series, (N,), none negative.
        length: Steps T, at least 8.
        seed: Seed of everything.
        families: Which to mix; ``TRAINING`` where none are given. Families of ``TRAINING`` come by their weights, all
            others equally often.

    Returns:
        Values (N, T) and season in steps (N,).

    Raises:
        UnknownNameError: There is no such family.
        ConfigError: ``length`` is too small, or there are no families.
    """
    chosen = TRAINING if families is None else families
    _check(length, chosen)
    totals = tuple(accumulate(_FAMILIES[name].weight or _PLAIN for name in chosen))
    values = np.empty((len(indices), length), np.float32)
    told = np.empty(len(indices), np.int64)
    for row, index in enumerate(indices.tolist()):
        rng = np.random.default_rng([seed, index])
        values[row], season = _make(rng, chosen[pick(rng, totals)], length)
        told[row] = _tell(rng, season.main)
    return values, told


def families() -> dict[str, str]:
    """Return what each family is, those of ``TRAINING`` first."""
    return {name: family.text for name, family in _FAMILIES.items()}


def _check(length: int, chosen: Sequence[str]) -> None:
    if length < SHORTEST or not chosen:
        raise ConfigError(
            f"synthetic series: length must be at least {SHORTEST} and families not empty, got {length} and "
            f"{', '.join(chosen) or 'none'}."
        )
    for name in chosen:
        if name not in _FAMILIES:
            raise UnknownNameError("family of series", name, _FAMILIES)


def _tell(rng: np.random.Generator, main: int) -> int:
    chance = rng.random()
    if main > 1 and chance < UNKNOWN:
        return 1
    if chance < (UNKNOWN + WRONG if main > 1 else IMAGINED):
        other = [season for season in _WRONG if season != main]
        return other[int(rng.integers(len(other)))]
    return main


def _make(rng: np.random.Generator, name: str, length: int) -> tuple[Doubles, Season]:
    """Draw a family, spoil the values as people's are, and give them a level, a scale and a sign."""
    family = _FAMILIES[name]
    values, season = family.make(rng, length)
    size = deviation(values)
    if family.spoilt and rng.random() < _OUTLIERS:
        at = rng.integers(0, length, 1 + rng.poisson(length * between(rng, 0.0005, 0.01)))
        signs = rng.choice((-1.0, 1.0), len(at)) if family.signed and rng.random() < 0.5 else rng.choice((-1.0, 1.0))
        if not family.signed:
            signs = np.abs(signs)
        values[at] += signs * size * between(rng, 2, 8) * (1 + rng.exponential(0.5, len(at)))
    if family.spoilt and rng.random() < _ROUNDED and size > 0:
        grain = size / between(rng, 2, 60)
        values = np.round(values / grain) * grain
    scale = between(rng, 1e-3, 1e5) / (size or 1.0)
    if not family.signed:
        return values * (-scale if rng.random() < _FLIPPED else scale), season
    level = 0.0 if rng.random() < 0.2 else between(rng, 0.1, 100) * size * rng.choice((-1.0, 1.0))
    sign = rng.choice((-1.0, 1.0))
    return (values * sign + level) * scale, season


# ---------------------------------------------------------------- families


def _mix(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw seasons, a trend, a slowly changing level and noise, (T,), and add them."""
    season = draw_season(rng, length)
    wave = unit(seasons(rng, season, length))
    total = wave + between(rng, 0.03, 1.5) * noise(rng, length, wave)
    if rng.random() < 0.65:
        total += between(rng, 0.1, 4) * trend(rng, length)
    if rng.random() < 0.45:
        total += between(rng, 0.1, 2) * ar1(rng, length, 1 - between(rng, 0.001, 0.05))
    return total, season


def _multiplicative(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    total, season = _mix(rng, length)
    return np.exp(np.clip(between(rng, 0.05, 0.9) * unit(total), -4, 4)), season


def _kernel(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    season = draw_season(rng, length)
    whole = [round(period) for period in season.periods if 2 <= round(period) <= 2 * length]
    whole = whole or [int(between(rng, 2, min(201, length)))]
    kernel, main = compose(rng, length, whole)
    known = main == season.main  # a calendar's, or any number of steps
    return kernel.draw(rng), Season(season.frequency if known or main == 1 else "step", (main,) if main > 1 else ())


def _arima(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw random stable poles, a seasonal one, a moving average; sometimes summed up, sometimes with a drift."""
    burn = 200
    values = rng.standard_normal(length + burn) if rng.random() < 0.7 else rng.standard_t(4, length + burn)
    polynomial = np.ones(1)
    for _ in range(int(rng.integers(1, 4))):
        radius = 1 - between(rng, 0.01, 1)
        if rng.random() < 0.35:
            angle = 2 * math.pi / between(rng, 3, 80)
            factor = np.array([1, -2 * radius * math.cos(angle), radius * radius])
        else:
            factor = np.array([1, -radius if rng.random() < 0.85 else radius])
        polynomial = np.convolve(polynomial, factor)
    average = np.append(1, rng.uniform(-0.7, 0.9, int(rng.integers(0, 3))))
    values = unit(lfilter(average, polynomial, values)[burn:])
    season = draw_season(rng, length)
    main = season.main
    seasonal = 1 < main <= length // 2 and rng.random() < 0.6
    if seasonal:
        keep = 1 - between(rng, 0.01, 0.5)
        values[main:] *= math.sqrt(1 - keep * keep)
        for begin in range(main, length, main):
            block = values[begin : begin + main]
            block += keep * values[begin - main : begin - main + len(block)]
    if rng.random() < 0.25:
        values = np.cumsum(values - values.mean() + rng.normal(0, 0.05))
    return unit(values), season if seasonal else Season(season.frequency, ())


def _regime(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Switch level, variance and strength of the season by a Markov chain of two to four states."""
    season = draw_season(rng, length)
    wave = unit(seasons(rng, season, length))
    count = int(rng.integers(2, 5))
    stay = between(rng, 12, 300) * np.exp(0.5 * rng.standard_normal(count))
    state = np.empty(length, np.int64)
    begin, now = 0, int(rng.integers(count))
    while begin < length:
        end = begin + 1 + int(rng.exponential(stay[now]))
        state[begin:end] = now
        begin, now = end, (now + int(rng.integers(1, count))) % count
    level = between(rng, 0.2, 3) * rng.standard_normal(count)
    rough = between(rng, 0.05, 1) * np.exp(0.8 * rng.standard_normal(count))
    strength = np.abs(1 + between(rng, 0.1, 1) * rng.standard_normal(count))
    levels = level[state]
    if rng.random() < 0.4:  # gets there by and by
        keep = 1 - between(rng, 0.03, 0.6)
        levels = lfilter([1 - keep], [1, -keep], levels - levels[0]) + levels[0]
    return levels + strength[state] * wave + rough[state] * noise(rng, length, wave), season


def _intermittent(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw small counts, orders with pauses between them, or wet and dry spells; the rate has seasons and a trend."""
    total, season = _mix(rng, length)
    rate = np.exp(np.clip(between(rng, 0.1, 1) * unit(total), -3, 3))
    kind = pick(rng, (0.45, 0.8, 1))
    if kind == 0:
        rate *= between(rng, 0.1, 20)
        if rng.random() < 0.6:
            burst = between(rng, 0.3, 10)
            rate = rate * rng.gamma(burst, 1 / burst, length)
        return rng.poisson(rate).astype(np.float64), season
    chance = np.minimum(1, rate / between(rng, 1.2, 12))
    if kind == 1:
        sizes = 1 + rng.poisson(between(rng, 0.2, 20), length) if rng.random() < 0.5 else rng.geometric(0.3, length)
        return np.where(rng.random(length) < chance, sizes, 0).astype(np.float64), season
    latent = ar1(rng, length, rng.uniform(0.3, 0.95))  # wet days come together
    wet = latent > np.quantile(latent, 1 - min(0.8, float(chance.mean())))
    return np.where(wet, rate * rng.gamma(between(rng, 0.5, 2), 1.0, length), 0.0), season


def _bounded(rng: np.random.Generator, length: int) -> tuple[Doubles, Season]:
    """Draw shares of a whole, values cut at a limit, wind or sun."""
    kind = pick(rng, (0.3, 0.55, 0.7, 1))
    if kind == 3:  # what clouds leave of a clear sky, or of a profile with closing hours
        season = draw_season(rng, length)
        shape = np.maximum(0, profile(rng, season.periods[0])) if season.periods else np.ones(1)
        main = Season(season.frequency, season.periods[:1])
        clear = np.maximum(0, seasons(rng, main, length, shape)) if main.periods else np.ones(length)
        clouds = 1 / (1 + np.exp(-between(rng, 0.3, 3) * ar1(rng, length, rng.uniform(0.5, 0.98)) - rng.normal(1, 1)))
        return clear * clouds, season
    total, season = _mix(rng, length)
    total = unit(total)
    if kind == 0:
        return 1 / (1 + np.exp(-between(rng, 0.5, 4) * (total - rng.normal(0, 0.7)))), season
    if kind == 1:
        low, high = rng.uniform(0, 0.45), 1 - rng.uniform(0, 0.3)
        side = rng.random()
        low, high = (low if side < 0.7 else 0.0), (high if side > 0.35 else 1.0)
        values = np.clip(total, *np.quantile(total, (low, high)))
        return values - values.min(), season
    wind = np.exp(0.5 * ar1(rng, length, 1 - between(rng, 0.005, 0.1)) + rng.uniform(0, 0.3) * total)
    return np.clip((wind * rng.uniform(0.5, 1.1)) ** 3 - 0.05, 0, 1), season


_FAMILIES: Mapping[str, _Family] = {
    "additive": _Family(_mix, "trend + seasons + level + noise", 0.27, True, True),
    "multiplicative": _Family(_multiplicative, "trend x seasons x level x noise, above 0", 0.2, False, True),
    "kernel": _Family(_kernel, "Gaussian processes of random sums and products of kernels", 0.15, True, True),
    "arima": _Family(_arima, "autoregressive moving averages, seasonal or summed up", 0.12, True, True),
    "regime": _Family(_regime, "level, variance and season switched by a Markov chain", 0.1, True, True),
    "bounded": _Family(_bounded, "shares, values cut at limits, wind, sun behind clouds", 0.1),
    "intermittent": _Family(_intermittent, "small counts, orders with pauses, wet and dry spells", 0.06),
    "oscillator": _Family(mechanisms.oscillator, "Van der Pol, Lotka-Volterra, pendulum; held out", signed=True),
    "lorenz": _Family(mechanisms.lorenz, "one coordinate of Lorenz's chaos; held out", signed=True),
    "queue": _Family(mechanisms.queue, "arrivals through a queue or an inventory, hourly; held out"),
    "tides": _Family(mechanisms.tides, "tidal constituents and surge, hourly; held out", signed=True),
    "growth_seasonal": _Family(mechanisms.growth_seasonal, "logistic growth, moving holidays, monthly; held out"),
    "thermal": _Family(mechanisms.thermal, "a heated building in the weather, hourly; held out"),
}

_PLAIN = 0.1
TRAINING: tuple[str, ...] = tuple(name for name, family in _FAMILIES.items() if family.weight)
"""Families to train on."""
HELD_OUT: tuple[str, ...] = tuple(name for name, family in _FAMILIES.items() if not family.weight)
"""Families to test on, never in ``TRAINING``."""
