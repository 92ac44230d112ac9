"""What a forecaster says of each time point: a mixture of distributions, quantiles, or the mean alone.

A head maps features to K numbers a time point; they are in units of the window's scale, with 0 at its location.

Shapes: ``...`` any axes, D width, K numbers a time point, P time points, C components, Q levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.errors import ConfigError

HeadName = Literal["mixture", "moirai", "quantile", "point"]

DENSITIES = ("mixture", "moirai")
"""Heads whose loss is a density's."""

COMPONENTS = 4
"""Of the mixture (scaling-law paper, https://arxiv.org/abs/2410.12360)."""


class Head(nn.Module, ABC):
    """Features (..., D) to numbers (..., K, P)."""

    numbers: int
    """K."""
    density: bool = False
    """Whether the loss is a density's, which the scale of the values changes."""

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__()
        self.dim, self.steps = dim, steps

    @abstractmethod
    def forward(self, y: Tensor) -> Tensor:
        """Map features (..., D) to numbers (..., K, P), in float32."""

    @abstractmethod
    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Return the loss (..., P) of numbers (..., K, P) for the scaled truth (..., P)."""

    @abstractmethod
    def mean(self, numbers: Tensor) -> Tensor:
        """Return the expected value (..., P)."""

    @abstractmethod
    def quantiles(self, numbers: Tensor, levels: Sequence[float]) -> Tensor | None:
        """Return quantiles (..., Q, P), rising in Q; None from a head that has none."""


class _Mixture(Head):
    """A mixture of distributions, each time point by itself; its parts are applied in one product.

    Parameters have the names of the published checkpoints.
    """

    density = True
    order: ClassVar[tuple[tuple[int, str], ...]]
    """The numbers behind the logits: component, and what it is of it."""
    components: ClassVar[int]

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__(dim, steps)
        proj = nn.Module()
        proj.weights_logits = nn.Linear(dim, self.components * steps)
        proj.components = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(dim, steps) for own, name in self.order if own == component})
            for component in range(self.components)
        )
        self.proj = proj

    def _raw(self, y: Tensor) -> Tensor:
        """Map features (..., D) to logits of the components and their unbounded parts, (..., K, P)."""
        components = cast(nn.ModuleList, self.proj.components)
        linears = [cast(nn.Linear, self.proj.weights_logits)]
        linears += [cast(nn.Linear, cast(nn.ModuleDict, components[c])[name]) for c, name in self.order]
        weight, bias = torch.cat([m.weight for m in linears]), torch.cat([m.bias for m in linears])
        return F.linear(y, weight, bias).unflatten(-1, (-1, self.steps)).float()

    @abstractmethod
    def log_prob(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Log density (..., P) of scaled values (..., P)."""

    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Negative log density of the scaled truth, (..., P)."""
        return -self.log_prob(numbers, target)

    @staticmethod
    @abstractmethod
    def _below(x: np.ndarray, *parts: np.ndarray) -> np.ndarray:
        """Distribution function at x, with the K numbers as arrays like x."""

    @staticmethod
    @abstractmethod
    def _ends(parts: Sequence[np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray]:
        """Return what lies below and above the quantile of a level."""

    def quantiles(self, numbers: Tensor, levels: Sequence[float]) -> Tensor:
        """Quantiles of the mixture, (..., Q, P): the distribution function is inverted, nothing is sampled."""
        from scipy.optimize.elementwise import find_root

        parts = tuple(part.double().cpu().numpy() for part in numbers.detach().unbind(-2))
        found = []
        for level in levels:

            def above(x: np.ndarray, *own: np.ndarray, level: float = level) -> np.ndarray:
                return self._below(x, *own) - level

            tolerances = {"xatol": 1e-8, "xrtol": 1e-7, "fatol": 1e-9}
            found.append(find_root(above, self._ends(parts, level), args=parts, tolerances=tolerances).x)
        axis = numbers.ndim - 2
        return torch.from_numpy(np.sort(np.stack(found, axis), axis)).to(numbers)


class MixtureHead(_Mixture):
    """A mixture of four Student-t distributions.

    df = 2 + softplus, scale = softplus, bounded below by the smallest float32 step.
    """

    numbers = 4 * COMPONENTS
    components = COMPONENTS
    order = tuple((component, name) for name in ("df", "loc", "scale") for component in range(COMPONENTS))

    def forward(self, y: Tensor) -> Tensor:
        """Map features (..., D) to logits, df, loc and scale of the components, (..., 4 C, P)."""
        logits, df, loc, scale = self._raw(y).split(COMPONENTS, dim=-2)
        return torch.cat([logits.log_softmax(-2), 2 + F.softplus(df), loc, _positive(scale)], dim=-2)

    def log_prob(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Log density (..., P) of scaled values (..., P)."""
        logits, df, loc, scale = numbers.split(COMPONENTS, dim=-2)
        return (logits + _student_t(target.unsqueeze(-2), df, loc, scale)).logsumexp(-2)

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean of the mixture, (..., P); df is above 2, so that it exists."""
        logits, _, loc, _ = numbers.split(COMPONENTS, dim=-2)
        return (logits.exp() * loc).sum(-2)

    @staticmethod
    def _below(x: np.ndarray, *parts: np.ndarray) -> np.ndarray:
        from scipy import special

        logits, df, loc, scale = (np.stack(parts[i : i + COMPONENTS]) for i in range(0, len(parts), COMPONENTS))
        return np.asarray((np.exp(logits) * special.stdtr(df, (x - loc) / scale)).sum(0))

    @staticmethod
    def _ends(parts: Sequence[np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray]:
        from scipy import special

        _, df, loc, scale = (np.stack(parts[i : i + COMPONENTS]) for i in range(0, len(parts), COMPONENTS))
        own = loc + scale * special.stdtrit(df, level)  # the mixture's lies between its components'
        width = 1e-3 * np.maximum(own.max(0) - own.min(0), scale.max(0))
        return own.min(0) - width, own.max(0) + width


class MoiraiHead(_Mixture):
    """The mixture of Moirai 1.x (https://arxiv.org/abs/2402.02592): Student-t, narrow normal, counts, log-normal.

    The normal has a scale of ``NARROW``. Counts are negative binomial, in units of the window's scale as all are: the
    loss takes its probability function, which is also defined between whole numbers, as a density, as the original
    does; quantiles are those of the whole numbers, where the distribution function jumps. The log-normal's tail can
    make the mean far larger than any value seen, while quantiles stay where they are.

    Numbers: 4 logits; df, loc, scale; loc; total count, logits of going on counting; loc, scale of the logarithm.
    """

    NARROW = 1e-3
    numbers = 12
    components = 4
    order = (
        (0, "df"),
        (0, "loc"),
        (0, "scale"),
        (1, "loc"),
        (2, "total_count"),
        (2, "logits"),
        (3, "loc"),
        (3, "scale"),
    )

    def forward(self, y: Tensor) -> Tensor:
        """Map features (..., D) to the mixture's numbers, (..., 12, P)."""
        raw = self._raw(y)
        df, loc, scale, narrow, count, going, log_loc, log_scale = raw[..., self.components :, :].unbind(-2)
        count = F.softplus(count).clamp_min(torch.finfo(torch.float32).tiny)  # 0 has no density
        own = (2 + F.softplus(df), loc, _positive(scale), narrow, count, going, log_loc, _positive(log_scale))
        return torch.cat([raw[..., : self.components, :].log_softmax(-2), torch.stack(own, dim=-2)], dim=-2)

    def log_prob(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Log density (..., P) of scaled values (..., P)."""
        weights = numbers[..., : self.components, :]
        df, loc, scale, narrow, count, going, log_loc, log_scale = numbers[..., self.components :, :].unbind(-2)
        whole = target.clamp_min(0)
        counts = torch.lgamma(count + whole) - torch.lgamma(1 + whole) - torch.lgamma(count)
        counts = counts + count * F.logsigmoid(-going) + whole * F.logsigmoid(going)
        log = torch.where(target > 0, target, 1).log()
        own = (
            _student_t(target, df, loc, scale),
            _normal(target, narrow, torch.full_like(narrow, self.NARROW)),
            counts.masked_fill(target < 0, -math.inf),
            (_normal(log, log_loc, log_scale) - log).masked_fill(target <= 0, -math.inf),
        )
        return (weights + torch.stack(own, dim=-2)).logsumexp(-2)

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean of the mixture, (..., P)."""
        student, narrow, counts, logs = numbers[..., : self.components, :].unbind(-2)
        _, loc, _, narrow_loc, count, going, log_loc, log_scale = numbers[..., self.components :, :].unbind(-2)
        symmetric = student.exp() * loc + narrow.exp() * narrow_loc
        return symmetric + (counts + count.log() + going).exp() + (logs + log_loc + log_scale**2 / 2).exp()

    @staticmethod
    def _below(x: np.ndarray, *parts: np.ndarray) -> np.ndarray:
        from scipy import special

        df, loc, scale, narrow, count, going, log_loc, log_scale = parts[MoiraiHead.components :]
        weights = [np.exp(part) for part in parts[: MoiraiHead.components]]
        counts = special.betainc(count, np.floor(np.maximum(x, 0)) + 1, special.expit(-going))
        logs = special.ndtr((np.log(np.where(x > 0, x, 1)) - log_loc) / log_scale)
        own = (
            special.stdtr(df, (x - loc) / scale),
            special.ndtr((x - narrow) / MoiraiHead.NARROW),
            np.where(x < 0, 0, counts),
            np.where(x > 0, logs, 0),
        )
        return np.asarray(sum(weight * part for weight, part in zip(weights, own, strict=True)))

    @staticmethod
    def _ends(parts: Sequence[np.ndarray], level: float) -> tuple[np.ndarray, np.ndarray]:
        from scipy import special

        df, loc, scale, narrow, count, going, log_loc, log_scale = parts[MoiraiHead.components :]
        odds = np.exp(np.minimum(going, 300))
        counted = count * odds + np.sqrt(count * odds * (1 + odds) * level / (1 - level))  # Cantelli's inequality
        own = np.stack(
            [
                loc + scale * special.stdtrit(df, level),
                narrow + MoiraiHead.NARROW * special.ndtri(level),
                np.exp(np.minimum(log_loc + log_scale * special.ndtri(level), 300)),
            ]
        )
        low, high = np.minimum(own.min(0), 0), np.maximum(own.max(0), counted)
        width = 1e-3 * np.maximum(high - low, 1)
        return low - width, high + width


def _positive(raw: Tensor) -> Tensor:
    return F.softplus(raw).clamp_min(torch.finfo(torch.float32).eps)


def _student_t(x: Tensor, df: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log density of Student's t distribution."""
    z = (x - loc) / scale
    half = 0.5 * (df + 1)
    norm = torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * torch.log(df * math.pi) - torch.log(scale)
    return norm - half * torch.log1p(z * z / df)


def _normal(x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """Log density of the normal distribution."""
    return -0.5 * ((x - loc) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)


class QuantileHead(Head):
    """Quantiles, trained by the pinball loss.

    Args:
        dim: Width D.
        steps: Time points P.
        levels: Levels of the quantiles, rising.
    """

    def __init__(self, dim: int, steps: int, levels: Sequence[float]) -> None:
        super().__init__(dim, steps)
        self.numbers = len(levels)
        self.levels = tuple(levels)
        self.proj = nn.Linear(dim, len(levels) * steps)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, y: Tensor) -> Tensor:
        """Map features (..., D) to quantiles (..., Q, P), which may cross."""
        return self.proj(y).unflatten(-1, (-1, self.steps)).float()

    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Twice the pinball loss, mean over the levels, (..., P)."""
        away = target.unsqueeze(-2) - numbers  # (..., Q, P)
        levels = away.new_tensor(self.levels)[:, None]
        return 2 * torch.maximum(levels * away, (levels - 1) * away).mean(-2)

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean over the levels, by the mass between them, (..., P)."""
        edges = torch.tensor([0.0, *self.levels, 1.0], device=numbers.device)
        mass = (edges[2:] - edges[:-2]) / 2
        mass[0] += edges[1] / 2
        mass[-1] += (1 - edges[-2]) / 2
        return (numbers * mass[:, None]).sum(-2)

    def quantiles(self, numbers: Tensor, levels: Sequence[float]) -> Tensor:
        """Quantiles (..., Q, P); levels between those learnt are interpolated.

        Raises:
            ConfigError: A level lies beyond the outermost ones learnt.
        """
        ordered = numbers.sort(dim=-2).values
        if tuple(levels) == self.levels:
            return ordered
        beyond = [level for level in levels if not self.levels[0] - 1e-9 <= level <= self.levels[-1] + 1e-9]
        if beyond:
            raise ConfigError(
                f"quantiles: the model has learnt levels from {self.levels[0]:g} to {self.levels[-1]:g}, got "
                f"{beyond[0]:g}; ask for levels between them, or fit a model with head=mixture."
            )
        at = np.interp(levels, self.levels, np.arange(len(self.levels)))
        below = torch.from_numpy(np.floor(at).astype(np.int64)).to(ordered.device)
        above = (below + 1).clamp_max(len(self.levels) - 1)
        share = torch.from_numpy(at % 1).to(ordered)[:, None]
        return torch.lerp(ordered.index_select(-2, below), ordered.index_select(-2, above), share)


class PointHead(Head):
    """The mean alone.

    Args:
        dim: Width D.
        steps: Time points P.
        error: ``mse``, ``mae`` or ``huber``.
    """

    numbers = 1

    def __init__(self, dim: int, steps: int, error: str = "mse") -> None:
        super().__init__(dim, steps)
        if error not in ("mse", "mae", "huber"):
            raise ConfigError(f"error must be mse, mae or huber, got {error!r}.")
        self.error = error
        self.proj = nn.Linear(dim, steps)
        nn.init.normal_(self.proj.weight, std=0.02)
        nn.init.zeros_(self.proj.bias)

    def forward(self, y: Tensor) -> Tensor:
        """Map features (..., D) to values (..., 1, P)."""
        return self.proj(y).unsqueeze(-2).float()

    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Error (..., P)."""
        away = numbers[..., 0, :] - target
        if self.error == "huber":
            return F.smooth_l1_loss(away, torch.zeros_like(away), reduction="none")
        return away.abs() if self.error == "mae" else away**2

    def mean(self, numbers: Tensor) -> Tensor:
        """The values (..., P)."""
        return numbers[..., 0, :]

    def quantiles(self, numbers: Tensor, levels: Sequence[float]) -> None:
        """None: there are none."""


def build_head(name: HeadName, dim: int, steps: int, levels: Sequence[float], error: str) -> Head:
    """Make a head.

    Raises:
        ConfigError: There is none of that name.
    """
    if name == "mixture":
        return MixtureHead(dim, steps)
    if name == "moirai":
        return MoiraiHead(dim, steps)
    if name == "quantile":
        return QuantileHead(dim, steps, levels)
    if name == "point":
        return PointHead(dim, steps, error)
    raise ConfigError(f"head must be mixture, moirai, quantile or point, got {name!r}.")
