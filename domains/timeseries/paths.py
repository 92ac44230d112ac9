"""Distributions along quantile paths, joined to one.

Shapes: B windows, L paths, V variates, K levels of a path's quantiles, Q levels asked for, H steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor

COUNT = 9
_NORMAL = NormalDist()
_DENSITIES = [0.0, *(_NORMAL.pdf(_NORMAL.inv_cdf(i / COUNT)) for i in range(1, COUNT)), 0.0]  # at the shares' edges
PATHS = tuple(_NORMAL.cdf(COUNT * (low - high)) for low, high in itertools.pairwise(_DENSITIES))
"""Levels of the paths; each stands for an equal share of outcomes, at their mean in a normal distribution."""
_BETWEEN = tuple((i + 0.5) / (4 * COUNT) for i in range(4 * COUNT))
_THINNED = 6  # of the points at which a mixture's distribution function is known, one in so many is used
KNOTS = (0.01, 0.04, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96, 0.99)
"""Levels that a path's distribution is kept at."""


def spread(quantiles: Tensor, levels: Sequence[float], wanted: Sequence[float]) -> Tensor:
    """Return quantiles of other levels: between those given by interpolation, beyond them as a normal distribution.

    Args:
        quantiles: (..., K, H), rising in K.
        levels: Their levels, rising; a single one stands for all.
        wanted: Levels asked for.

    Returns:
        (..., Q, H).
    """
    if tuple(levels) == tuple(wanted):
        return quantiles
    if len(levels) == 1:
        return quantiles.expand(*quantiles.shape[:-2], len(wanted), -1)
    scores, targets = (np.array([_NORMAL.inv_cdf(level) for level in given]) for given in (levels, wanted))
    at = np.clip(np.searchsorted(scores, targets, side="right") - 1, 0, len(scores) - 2)
    share = (targets - scores[at]) / (scores[at + 1] - scores[at])  # below 0 and above 1 beyond the outermost
    low = torch.from_numpy(at).to(quantiles.device)
    weight = torch.from_numpy(share).to(quantiles)[:, None]
    return torch.lerp(quantiles.index_select(-2, low), quantiles.index_select(-2, low + 1), weight)


def join_paths(knots: Tensor, wanted: Sequence[float]) -> Tensor:
    """Return quantiles of the mixture, in equal shares, of what all paths say.

    Between the paths lie further ones, by interpolation: nine alone would be nine heaps, once they are far apart. A
    path's distribution function is linear between its knots, and ends as far beyond the outermost ones as these are
    from their neighbours.

    Args:
        knots: Quantiles of every path at the levels ``KNOTS``, (B, L, V, K, H), rising in K.
        wanted: Levels Q of the mixture's quantiles.

    Returns:
        (B, V, Q, H).
    """
    shape = knots.shape
    dense = spread(knots.flatten(2), PATHS, _BETWEEN).unflatten(2, shape[2:])  # (B, 4 L, V, K, H)
    each = dense.sort(dim=3).values.movedim(3, -1)  # (B, 4 L, V, H, K)
    ends = 2 * each[..., [0, -1]] - each[..., [1, -2]]
    each = torch.cat([ends[..., :1], each, ends[..., 1:]], dim=-1)
    level = torch.tensor((0.0, *KNOTS, 1.0), dtype=each.dtype, device=each.device)
    grid = each.movedim(1, -2).flatten(-2).sort(dim=-1).values[..., ::_THINNED].contiguous()
    total = torch.zeros_like(grid)  # the mixture's distribution function, at all knots
    for path in each.unbind(1):
        index = torch.searchsorted(path.contiguous(), grid, right=True).clamp(1, len(level) - 1)
        low, high = path.gather(-1, index - 1), path.gather(-1, index)
        share = ((grid - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        total += torch.lerp(level[index - 1], level[index], share) / len(_BETWEEN)
    target = torch.tensor(wanted, dtype=grid.dtype, device=grid.device).expand(*grid.shape[:-1], -1).contiguous()
    index = torch.searchsorted(total, target).clamp(1, grid.shape[-1] - 1)
    low, high = total.gather(-1, index - 1), total.gather(-1, index)
    share = ((target - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(grid.gather(-1, index - 1), grid.gather(-1, index), share).movedim(-1, 2)
