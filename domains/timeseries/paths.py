"""Distributions along quantile paths, joined to one.

Shapes: B windows, L paths, V variates, K levels of a path's quantiles, Q levels asked for, H steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def path_weights(levels: Sequence[float]) -> Tensor:
    """Return the share of outcomes that the path of each level stands for: up to half way to its neighbours."""
    inner = [(a + b) / 2 for a, b in itertools.pairwise(levels)]
    edges = torch.tensor([0.0, *inner, 1.0])
    return edges.diff()


def join_paths(quantiles: Tensor, levels: Sequence[float], weights: Tensor, wanted: Sequence[float]) -> Tensor:
    """Return quantiles of the mixture of the paths' distributions.

    A path's distribution function is linear between its quantiles, and goes on beyond the outermost ones as between the
    last two.

    Args:
        quantiles: Of every path, (B, L, V, K, H), rising in K.
        levels: Their levels, rising.
        weights: Shares of the paths (L,).
        wanted: Levels Q of the mixture's quantiles.

    Returns:
        (B, V, Q, H).
    """
    knots = quantiles.movedim(3, -1)  # (B, L, V, H, K)
    level = torch.tensor(levels, dtype=knots.dtype, device=knots.device)
    if len(levels) == 1:  # a path is a point
        points, order = knots[..., 0].movedim(1, -1).sort(dim=-1)  # (B, V, H, L)
        shares = weights.to(knots)[order].cumsum(-1)
        target = torch.tensor(wanted, dtype=knots.dtype, device=knots.device).expand(*shares.shape[:-1], -1)
        index = torch.searchsorted(shares, target.contiguous()).clamp_max(shares.shape[-1] - 1)
        return points.gather(-1, index).movedim(-1, 2)
    ends = torch.stack([2 * knots[..., 0] - knots[..., 1], 2 * knots[..., -1] - knots[..., -2]], dim=-1)
    first, last = 2 * level[0] - level[1], 2 * level[-1] - level[-2]
    first, last = first.clamp_min(0), last.clamp_max(1)
    knots = torch.cat([ends[..., :1], knots, ends[..., 1:]], dim=-1)
    level = torch.cat([first[None], level, last[None]])
    grid = knots.movedim(1, -2).flatten(-2).sort(dim=-1).values  # (B, V, H, L K)
    total = torch.zeros_like(grid)
    for path, weight in zip(knots.unbind(1), weights.tolist(), strict=True):  # F at all knots, path by path
        at = path.contiguous()
        index = torch.searchsorted(at, grid, right=True).clamp(1, at.shape[-1] - 1)
        low, high = at.gather(-1, index - 1), at.gather(-1, index)
        share = ((grid - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
        total += weight * torch.lerp(level[index - 1], level[index], share)
    target = torch.tensor(wanted, dtype=grid.dtype, device=grid.device).expand(*grid.shape[:-1], -1).contiguous()
    index = torch.searchsorted(total, target).clamp(1, grid.shape[-1] - 1)
    low, high = total.gather(-1, index - 1), total.gather(-1, index)
    share = ((target - low) / (high - low).clamp_min(1e-12)).clamp(0, 1)
    return torch.lerp(grid.gather(-1, index - 1), grid.gather(-1, index), share).movedim(-1, 2)
