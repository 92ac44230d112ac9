"""Random Gaussian processes whose covariances are sums and products of simple ones, drawn with one FFT a term.

The idea is KernelSynth's (Chronos, https://arxiv.org/abs/2403.07815, section 4.2): a covariance is composed of a few
base kernels by + and x, and a series is a draw of it. There the draw costs T^3. Here every covariance is kept as
``k(s, t) = sum_n x_s^n x_t^n r_n(s - t)``, with x a straight line: a stationary kernel is ``r_0``, the linear one is
``x_s x_t``, and sums and products of such forms are of the form again. Each ``r_n`` is drawn by circulant embedding
(Dietrich & Newsam 1997, https://doi.org/10.1137/S1064827592240555).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Doubles = NDArray[np.float64]

MOST = 5
"""Base kernels of a composition, at most."""

_LONGEST = 4  # circle, in lengths of the series


@dataclass(frozen=True, eq=False)
class Kernel:
    """A covariance over T steps.

    Args:
        line: x of each step, (T,).
        terms: ``r_n`` by n, each at lags 0 to M / 2 on a circle of M steps, (M / 2 + 1,).
    """

    line: Doubles
    terms: Mapping[int, Doubles]

    def __add__(self, other: Kernel) -> Kernel:
        terms = dict(self.terms)
        for power, r in other.terms.items():
            terms[power] = terms[power] + r if power in terms else r
        return Kernel(self.line, terms)

    def __mul__(self, other: Kernel) -> Kernel:
        terms: dict[int, Doubles] = {}
        for p, a in self.terms.items():
            for q, b in other.terms.items():
                terms[p + q] = terms[p + q] + a * b if p + q in terms else a * b
        return Kernel(self.line, terms)

    def covariance(self) -> Doubles:
        """Return the covariance as a matrix (T, T); drawing does not need it."""
        steps = np.arange(len(self.line))
        lags = np.abs(steps[:, None] - steps)
        total = np.zeros(lags.shape)
        for power, r in self.terms.items():
            total += np.outer(self.line**power, self.line**power) * r[lags]
        return total

    def draw(self, rng: np.random.Generator) -> Doubles:
        """Draw a series (T,).

        Where a kernel does not close on the circle (a lengthscale near T, or periods without a common multiple that
        fits) some eigenvalues come out negative; they are set to 0 and the variance is kept.
        """
        values = np.zeros(len(self.line))
        for power, r in self.terms.items():
            size = 2 * (len(r) - 1)
            spectrum = np.maximum(fft.hfft(r, size)[: len(r)], 0)  # real, as r is even
            total = 2 * spectrum.sum() - spectrum[0] - spectrum[-1]
            spectrum *= r[0] * size * size / (2 * total)
            waves = np.empty(len(r), np.complex128)
            waves.real, waves.imag = rng.standard_normal((2, len(r)))
            waves[[0, -1]] = waves[[0, -1]].real * math.sqrt(2)  # a mean and a zigzag have no phase
            drawn = fft.irfft(waves * np.sqrt(spectrum), size)[: len(values)]
            values += drawn * self.line**power if power else drawn
        return values


class Bank:
    """Base kernels over the same T steps, all of variance 1.

    Args:
        length: Steps T.
        periods: Periods that kernels shall have; the circle is a common multiple of them where one fits.
        middle: Where the straight line of linear kernels is 0, in lengths.
    """

    def __init__(self, length: int, periods: Sequence[int] = (), middle: float = 0.5) -> None:
        unit = math.lcm(2, *periods)
        if unit > _LONGEST * length:
            unit = math.lcm(2, max(periods))
        self.length = length
        self.line = np.arange(length) / length - middle
        size = unit * math.ceil(2 * length / unit)
        self.lags = np.arange(size // 2 + 1, dtype=np.float64)

    def stationary(self, r: Doubles) -> Kernel:
        """Return the kernel of a covariance by lag, (M / 2 + 1,)."""
        return Kernel(self.line, {0: r})

    def constant(self) -> Kernel:
        """Return 1: a level."""
        return self.stationary(np.ones_like(self.lags))

    def linear(self) -> Kernel:
        """Return ``12 x_s x_t``: a straight line."""
        return Kernel(self.line, {1: np.full_like(self.lags, 12.0)})

    def white(self) -> Kernel:
        """Return 1 at lag 0 alone: noise."""
        return self.stationary((self.lags == 0).astype(np.float64))

    def rbf(self, scale: float) -> Kernel:
        """Return ``exp(-lag^2 / (2 scale^2))``, ``scale`` in steps: smooth."""
        return self.stationary(np.exp(-0.5 * (self.lags / scale) ** 2))

    def rough(self, scale: float) -> Kernel:
        """Return ``exp(-lag / scale)``, ``scale`` in steps: the Ornstein-Uhlenbeck process, which has no slope."""
        return self.stationary(np.exp(-self.lags / scale))

    def quadratic(self, scale: float, alpha: float) -> Kernel:
        """Return the rational quadratic ``(1 + lag^2 / (2 alpha scale^2))^-alpha``: smooth on many scales."""
        return self.stationary((1 + (self.lags / scale) ** 2 / (2 * alpha)) ** -alpha)

    def periodic(self, period: int, scale: float) -> Kernel:
        """Return ``exp(-2 sin^2(pi lag / period) / scale^2)``: repeats, sharper as ``scale`` falls."""
        return self.stationary(np.exp(-2 * np.sin(np.pi / period * self.lags) ** 2 / scale**2))


def compose(rng: np.random.Generator, length: int, periods: Sequence[int]) -> tuple[Kernel, int]:
    """Compose one to five random base kernels by + and x, from left to right.

    Args:
        rng: Where the draws come from.
        length: Steps T.
        periods: Periods that periodic kernels may have, the likeliest first.

    Returns:
        The kernel, not a constant, and the period of its first periodic part; 1 where it has none.
    """
    count = int(rng.integers(1, MOST + 1))
    chosen = [_BASES[int(rng.integers(len(_BASES)))] for _ in range(count)]
    if all(name == "constant" for name in chosen):
        chosen[0] = "periodic" if rng.random() < 0.5 else "rough"
    used = {at: periods[int(len(periods) * rng.random() ** 2)] for at, name in enumerate(chosen) if name == "periodic"}
    bank = Bank(length, list(used.values()), rng.uniform(-0.3, 1.3))
    whole: Kernel | None = None
    for at, name in enumerate(chosen):
        part = _base(rng, bank, name, used.get(at, 0))
        part = bank.stationary(10 ** rng.uniform(-1, 1) * np.ones_like(bank.lags)) * part
        whole = part if whole is None else whole + part if rng.random() < 0.5 else whole * part
    assert whole is not None
    return whole, next(iter(used.values()), 1)


_BASES = ("periodic", "periodic", "periodic", "rbf", "rough", "quadratic", "linear", "white", "constant")


def _base(rng: np.random.Generator, bank: Bank, name: str, period: int) -> Kernel:
    if name == "periodic":
        return bank.periodic(period, 10 ** rng.uniform(-0.5, 0.5))
    if name in ("constant", "linear", "white"):
        return {"constant": bank.constant, "linear": bank.linear, "white": bank.white}[name]()
    scale = bank.length * 10 ** rng.uniform(-2, -0.3)
    if name == "quadratic":
        return bank.quadratic(scale, 10 ** rng.uniform(-1, 1))
    return bank.rbf(scale) if name == "rbf" else bank.rough(scale)
