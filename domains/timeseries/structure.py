"""Parts that fabricated series are made of: calendars, seasons, trends, noise.

Parts have mean 0 and deviation 1 about; T is the number of steps.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.signal import lfilter

Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Calendar:
    """What repeats at a sampling frequency.

    Args:
        frequency: As ``Frequency`` writes it.
        periods: In steps, the main one first, each with the chance that a series has it.
        weight: How often it is drawn.
        day: Steps of a day where days differ by weekday; 0 elsewhere.
    """

    frequency: str
    periods: tuple[tuple[float, float], ...]
    weight: float
    day: int = 0


CALENDARS = (
    Calendar("h", ((24, 1), (168, 0.25), (8766, 0.3)), 0.28, 24),
    Calendar("30min", ((48, 1), (336, 0.25)), 0.05, 48),
    Calendar("15min", ((96, 1), (672, 0.25), (4, 0.05)), 0.08, 96),
    Calendar("10min", ((144, 1), (1008, 0.2), (6, 0.05)), 0.04, 144),
    Calendar("5min", ((288, 1), (12, 0.1)), 0.03, 288),
    Calendar("min", ((60, 0.5), (1440, 0.8)), 0.03),
    Calendar("s", ((60, 0.7), (10, 0.2), (3600, 0.3)), 0.02),
    Calendar("D", ((7, 0.85), (30.44, 0.25), (365.25, 0.6)), 0.16),
    Calendar("B", ((5, 0.7), (21.74, 0.3), (260.9, 0.5)), 0.04),
    Calendar("W", ((52.18, 0.85), (4.348, 0.2), (13.04, 0.2)), 0.05),
    Calendar("MS", ((12, 0.95), (3, 0.1), (60, 0.15)), 0.1),
    Calendar("QS", ((4, 0.95), (20, 0.15)), 0.04),
    Calendar("YS", ((9, 0.2),), 0.02),
    Calendar("step", (), 0.16),
)
"""``step`` has one to three periods of 2 to 200 steps, any number."""


_ONE = np.ones(1)


def pick(rng: np.random.Generator, totals: Sequence[float]) -> int:
    """Return an index, drawn by weights whose running totals are given."""
    return bisect(totals, rng.random() * totals[-1])


def between(rng: np.random.Generator, low: float, high: float) -> float:
    """Draw log-uniformly."""
    return low * (high / low) ** rng.random()


def deviation(values: Doubles) -> float:
    """Return the standard deviation; numpy's own takes several times as long for so few values."""
    centred = values - values.sum() / len(values)
    return math.sqrt(centred @ centred / len(values))


def unit(values: Doubles) -> Doubles:
    """Return values of mean 0 and deviation 1; zeros where they do not vary."""
    centred = values - values.sum() / len(values)
    size = math.sqrt(centred @ centred / len(values))
    return centred / size if size > 1e-12 else np.zeros_like(centred)


def ar1(rng: np.random.Generator, shape: int | tuple[int, ...], keep: float) -> Doubles:
    """Draw stationary autoregressive paths along the last axis: ``x_t = keep x_t-1 + noise``, deviation 1."""
    noise = rng.standard_normal(shape)
    noise[..., 1:] *= math.sqrt(1 - keep * keep)
    return lfilter(_ONE, (1.0, -keep), noise)


# ---------------------------------------------------------------- seasons

_TOTALS = tuple(accumulate(calendar.weight for calendar in CALENDARS))


@dataclass(frozen=True)
class Season:
    """What repeats in a series.

    Args:
        frequency: As ``Frequency`` writes it.
        periods: In steps, the main one first; none where nothing repeats.
        day: Steps of a day where days differ by weekday; 0 elsewhere.
    """

    frequency: str
    periods: tuple[float, ...]
    day: int = 0

    @property
    def main(self) -> int:
        """Main period in whole steps; 1 where nothing repeats."""
        return max(1, round(self.periods[0])) if self.periods else 1


def draw_season(rng: np.random.Generator, length: int) -> Season:
    """Draw a calendar and which of its periods a series has; periods of more than eight lengths are left out."""
    calendar = CALENDARS[pick(rng, _TOTALS)]
    if calendar.frequency == "step":
        periods = [between(rng, 2, 200.49) for _ in range(pick(rng, (0.5, 0.85, 1)) + 1)]
        return Season("step", tuple(float(round(p)) if rng.random() < 0.7 else p for p in periods))
    kept = tuple(float(p) for p, chance in calendar.periods if rng.random() < chance and p < 8 * length)
    return Season(calendar.frequency, kept, calendar.day)


_NUMBERS = np.arange(1, 13)
_SHAPES = tuple(accumulate((0.42, 0.2, 0.12, 0.1, 0.05, 0.05, 0.06)))


def profile(rng: np.random.Generator, period: float) -> Doubles:
    """Draw the shape of one period, of mean 0 and deviation 1, at as many points as it has steps, or 128.

    It is random Fourier coefficients of falling spectrum, one to three peaks, office hours, the sun's hours with nights
    of the same value, a sawtooth, a square wave, or a few spikes.
    """
    size = int(period) if period == int(period) else 128
    if shape := pick(rng, _SHAPES):
        angle = 2 * np.pi * (np.arange(size) / size - rng.random())
        table = unit(_outline(rng, shape, angle, period))
        if table.any():  # four steps may all be night
            return table
    count = min(max(1, int(period / 2)), size // 2, int(rng.integers(1, 13)))
    waves = np.zeros(count + 1, np.complex128)
    waves.real[1:], waves.imag[1:] = rng.standard_normal((2, count))
    waves[1:] *= _NUMBERS[:count] ** -rng.uniform(0.2, 2.2)
    return unit(fft.irfft(waves, size))


def _outline(rng: np.random.Generator, shape: int, angle: Doubles, period: float) -> Doubles:
    if shape == 1:
        sharp = np.array([min(between(rng, 1, 60), period) for _ in range(int(rng.integers(1, 4)))])
        places = rng.uniform(0, 2 * np.pi, (len(sharp), 1))
        return rng.uniform(0.3, 1, len(sharp)) @ np.exp(sharp[:, None] * (np.cos(angle - places) - 1))
    if shape == 2:
        return 1 / (1 + np.exp(-between(rng, 3, 40) * (np.cos(angle) - rng.uniform(-0.7, 0.7))))
    if shape == 3:
        return np.maximum(0, np.cos(angle) - rng.uniform(-0.5, 0.6)) ** between(rng, 0.5, 2)
    if shape == 4:
        return angle / (2 * np.pi) % 1
    if shape == 5:
        return (angle / (2 * np.pi) % 1 < rng.uniform(0.1, 0.9)).astype(np.float64)
    spikes = np.zeros(len(angle))
    spikes[rng.integers(0, len(angle), 1 + len(angle) // 40)] = 1
    return spikes


def cycle(rng: np.random.Generator, time: Doubles, period: float, shape: Doubles | None = None) -> Doubles:
    """Draw a season (T,) that is never twice the same: each period has its own strength, level and timing.

    Strength and level go from one period to the next as autoregressive paths, so that the last period foretells the
    next one less well than several do.

    Args:
        rng: Where the draws come from.
        time: Steps, counted from the beginning of some period, (T,).
        period: In steps.
        shape: Of one period; drawn where none is given.
    """
    shape = profile(rng, period) if shape is None else shape
    low = int(shape.argmin())  # a period begins where it is lowest, so that nothing jumps when its strength changes
    rise = np.concatenate([shape[low:], shape[:low]]) - shape[low]
    turns = time / period
    turns -= int(turns[0])
    count = int(turns[-1]) + 2
    nodes = np.arange(count) + 0.5  # the middle of each period
    keep = 0.95 * rng.random() ** 4
    strength, level = between(rng, 0.02, 0.7) * ar1(rng, (2, count), keep)
    if rng.random() < 0.2:  # grows or fades
        strength += rng.normal(0, 0.7) * np.linspace(0, 1, count)
    at = time
    if rng.random() < 0.15:  # early and late
        at = time + np.interp(turns, nodes, 0.06 * period * rng.random() * ar1(rng, count, keep))
    if at is time and len(shape) == period:
        values = rise[at.astype(np.int64) % len(shape)]
    else:
        values = np.interp(at / period % 1 * len(shape), np.arange(len(shape) + 1), np.append(rise, rise[0]))
    values *= np.exp(strength)[turns.astype(np.int64)]
    if (share := rng.uniform(-1, 1)) > 0:
        values += np.interp(turns, nodes, share * level)
    return values + shape[low]


def weekly(rng: np.random.Generator, time: Doubles, day: int) -> tuple[Doubles, Doubles]:
    """Draw how days differ by weekday: a factor and an offset of each step, (T,) and (T,), 1 and 0 on an even day.

    The factor changes at midnight, the offset all the time.
    """
    factor = 1 + rng.normal(0, 0.06, 7)
    offset = rng.normal(0, 0.08, 7)
    rest = rng.uniform(0, 1.1), rng.normal(-0.3, 0.8)
    for weekday, share in ((5, rng.uniform(0.3, 1)), (6, 1.0)):
        factor[weekday] += share * (rest[0] - 1)
        offset[weekday] += share * rest[1]
    days = time / day
    middle = np.interp(days % 7, np.arange(9) - 0.5, np.concatenate([offset[6:], offset, offset[:1]]))
    return factor[days.astype(np.int64) % 7], middle


def seasons(rng: np.random.Generator, season: Season, length: int, shape: Doubles | None = None) -> Doubles:
    """Draw all that repeats, (T,), the main period with deviation 1 about; ``shape`` is that of the main period."""
    time = np.arange(length, dtype=np.float64) + int(rng.integers(7 * season.day if season.day else 10_000))
    total = np.zeros(length)
    for rank, period in enumerate(season.periods):
        values = cycle(rng, time, period, shape if rank == 0 else None)
        if rank == 0 and season.day == period and rng.random() < 0.6:
            factor, offset = weekly(rng, time, season.day)
            values = (values - values.min()) * factor + offset
        total += values if rank == 0 else between(rng, 0.1, 1.5) * values
    return total


# ---------------------------------------------------------------- trends and noise

_TRENDS = tuple(accumulate((0.2, 0.1, 0.1, 0.25, 0.25, 0.1)))
_NOISES = tuple(accumulate((0.35, 0.2, 0.15, 0.3)))


def trend(rng: np.random.Generator, length: int) -> Doubles:
    """Draw a trend (T,): a line, one that saturates or is damped, one with changepoints, a random walk, a slow wave."""
    kind = pick(rng, _TRENDS)
    x = np.arange(length) / (length - 1)
    if kind == 0:
        values = x
    elif kind == 1:
        values = 1 / (1 + np.exp(-between(rng, 4, 30) * (x - rng.uniform(-0.1, 1.1))))
    elif kind == 2:
        values = 1 - np.exp(-between(rng, 1, 15) * x)
    elif kind == 3:
        nodes = np.sort(rng.random(int(rng.integers(1, 8))))
        nodes = np.concatenate([[0], nodes, [1]])
        slopes = ar1(rng, len(nodes), rng.uniform(0, 0.8))
        values = np.interp(x, nodes, np.cumsum(slopes * np.diff(nodes, prepend=0)))
    elif kind == 4:
        steps = rng.standard_normal(length)
        values = np.cumsum(steps + rng.normal(0, 0.05))
    else:
        values = np.cos(2 * np.pi * (between(rng, 0.2, 4) * x + rng.random()))
    values = unit(values)
    return -values if rng.random() < 0.35 else values


def noise(rng: np.random.Generator, length: int, wave: Doubles) -> Doubles:
    """Draw noise (T,) of deviation 1 about: Gaussian, Student's t, of changing variance, or autoregressive.

    Args:
        rng: Where the draws come from.
        length: Steps T.
        wave: Of mean 0 and deviation 1, (T,): what the variance may follow.
    """
    kind = pick(rng, _NOISES)
    if kind == 1:
        freedom = between(rng, 2.5, 10)
        return rng.standard_t(freedom, length) * math.sqrt((freedom - 2) / freedom)
    if kind == 3:
        keep = 1 - between(rng, 0.003, 0.7)
        values = ar1(rng, length, keep)
        if rng.random() < 0.5:
            share = rng.uniform(0.05, 0.6)
            values = math.sqrt(1 - share**2) * values + share * rng.standard_normal(length)
        return values
    values = rng.standard_normal(length)
    if kind == 2:
        rough = wave if rng.random() < 0.5 else ar1(rng, length, 1 - between(rng, 0.003, 0.1))
        values *= np.exp(rng.uniform(0.2, 0.9) * np.clip(rough, -2.5, 2.5))
    return values
