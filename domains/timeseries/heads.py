"""What a forecaster says of each time point: a mixture of Student-t, quantiles, or the mean alone.

A head maps features to K numbers a time point; they are in units of the window's scale, with 0 at its location.

Shapes: ``...`` any axes, D width, K numbers a time point, P time points, C components, Q levels.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.errors import ConfigError

HeadName = Literal["mixture", "quantile", "point"]

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


class MixtureHead(Head):
    """A mixture of four Student-t distributions, each time point by itself.

    df = 2 + softplus, scale = softplus, bounded below by the smallest float32 step. Parameters have the names of the
    published checkpoints, and are applied in one product.
    """

    numbers = 4 * COMPONENTS
    density = True

    def __init__(self, dim: int, steps: int) -> None:
        super().__init__(dim, steps)
        proj = nn.Module()
        proj.weights_logits = nn.Linear(dim, COMPONENTS * steps)
        proj.components = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(dim, steps) for name in ("df", "loc", "scale")}) for _ in range(COMPONENTS)
        )
        self.proj = proj

    def forward(self, y: Tensor) -> Tensor:
        """Map features (..., D) to logits, df, loc and scale of the components, (..., 4 C, P)."""
        components = cast(nn.ModuleList, self.proj.components)
        linears = [cast(nn.Linear, self.proj.weights_logits)]
        for name in ("df", "loc", "scale"):
            linears += [cast(nn.Linear, cast(nn.ModuleDict, c)[name]) for c in components]
        weight, bias = torch.cat([m.weight for m in linears]), torch.cat([m.bias for m in linears])
        raw = F.linear(y, weight, bias).unflatten(-1, (-1, self.steps)).float()  # (..., 4C, P)
        logits, df, loc, scale = raw.split(COMPONENTS, dim=-2)
        scale = F.softplus(scale).clamp_min(torch.finfo(torch.float32).eps)
        return torch.cat([logits.log_softmax(-2), 2 + F.softplus(df), loc, scale], dim=-2)

    def loss(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Negative log density of the scaled truth, (..., P)."""
        return -self.log_prob(numbers, target)

    def log_prob(self, numbers: Tensor, target: Tensor) -> Tensor:
        """Log density (..., P) of scaled values (..., P)."""
        logits, df, loc, scale = numbers.split(COMPONENTS, dim=-2)
        z = (target.unsqueeze(-2) - loc) / scale  # (..., C, P)
        half = 0.5 * (df + 1)
        norm = torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * torch.log(df * math.pi) - torch.log(scale)
        return (logits + norm - half * torch.log1p(z * z / df)).logsumexp(-2)

    def mean(self, numbers: Tensor) -> Tensor:
        """Mean of the mixture, (..., P); df is above 2, so that it exists."""
        logits, _, loc, _ = numbers.split(COMPONENTS, dim=-2)
        return (logits.exp() * loc).sum(-2)

    def quantiles(self, numbers: Tensor, levels: Sequence[float]) -> Tensor:
        """Quantiles of the mixture, (..., Q, P): the distribution function is inverted, nothing is sampled."""
        from scipy import special
        from scipy.optimize.elementwise import find_root

        logits, df, loc, scale = (t.detach().double().cpu().numpy() for t in numbers.split(COMPONENTS, dim=-2))
        weights, found = np.exp(logits), []
        axis = logits.ndim - 2
        for level in levels:
            own = loc + scale * special.stdtrit(df, level)  # the mixture's lies between its components'
            low, high = own.min(axis), own.max(axis)
            width = 1e-3 * np.maximum(high - low, scale.max(axis))

            def above(x: np.ndarray, *parts: np.ndarray, level: float = level) -> np.ndarray:
                w, d, m, s = (np.stack(parts[i : i + COMPONENTS]) for i in range(0, len(parts), COMPONENTS))
                return np.asarray((w * special.stdtr(d, (x - m) / s)).sum(0) - level)

            parts = [part for t in (weights, df, loc, scale) for part in np.moveaxis(t, axis, 0)]
            result = find_root(
                above, (low - width, high + width), args=tuple(parts), tolerances={"xrtol": 1e-7, "fatol": 1e-9}
            )
            found.append(result.x)
        stacked = np.sort(np.stack(found, axis), axis)
        return torch.from_numpy(stacked).to(numbers)


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
    if name == "quantile":
        return QuantileHead(dim, steps, levels)
    if name == "point":
        return PointHead(dim, steps, error)
    raise ConfigError(f"head must be mixture, quantile or point, got {name!r}.")
