"""Location and scale of windows, and what happened a season before: statistics that never see the future.

Shapes: B windows, V variates, T context steps, H steps to forecast, R packed rows, S patches, P steps of a patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-5
"""Added to the variance, as in the published models."""
SEASONS = 4
"""Earlier seasons that are averaged."""
CHANNELS = 3
"""Of ``seasonal_channels``."""


def window_statistics(values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the last axis, in float64, each (..., 1).

    The variance has n - 1 below and ``EPS`` added; a window without a value has 0 and 1.

    Args:
        values: (..., T).
        observed: Which of them count, bool of the same shape.
    """
    known = observed.double()
    count = known.sum(-1, keepdim=True)
    loc = (values.double() * known).sum(-1, keepdim=True) / count.clamp_min(1)
    squares = ((values.double() - loc) ** 2 * known).sum(-1, keepdim=True)
    scale = (squares / (count - 1).clamp_min(1) + EPS).sqrt()
    empty = count == 0
    return loc.masked_fill(empty, 0), scale.masked_fill(empty, 1)


def packed_statistics(values: Tensor, observed: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of every packed series, at each of its patches, in float64: (R, S, 1).

    Args:
        values: (R, S, P).
        observed: Which of them count, bool (R, S, P); what is to be predicted must not.
        segments: Series each patch belongs to, int (R, S), -1 at padding.
    """
    rows, patches = segments.shape
    slots = patches + 1
    place = (segments + 1 + slots * torch.arange(rows, device=segments.device)[:, None]).flatten()  # (R * S,)
    known = observed.double()

    def total(x: Tensor) -> Tensor:  # (R, S, P) -> (R, S): the sum over the patch's series
        sums = x.new_zeros(rows * slots).index_add_(0, place, x.sum(-1).flatten())
        return sums[place].view(rows, patches)

    count = total(known)
    loc = total(values.double() * known) / count.clamp_min(1)
    squares = total((values.double() - loc[..., None]) ** 2 * known)
    scale = (squares / (count - 1).clamp_min(1) + EPS).sqrt()
    empty = (count == 0) & (segments >= 0)
    padding = segments < 0
    loc, scale = loc.masked_fill(empty | padding, 0), scale.masked_fill(empty | padding, 1)
    return loc[..., None], scale[..., None]


def seasonal_channels(values: Tensor, observed: Tensor, season: Tensor, horizon: int) -> Tensor:
    """Return what was a season before each step, (B, V, ``CHANNELS``, T + H).

    The channels are the value a season before, its mean over up to ``SEASONS`` earlier seasons, and whether there is
    one. Steps to forecast read the context alone: the last whole season is repeated.

    Args:
        values: Scaled context (B, V, T).
        observed: Which values are known, bool (B, V, T).
        season: Steps of a season (B,).
        horizon: H.
    """
    length = values.shape[-1]
    steps = torch.arange(length + horizon, device=values.device)
    ahead = (steps - length + 1).clamp_min(0)  # steps of the future up to here
    period = season[:, None]
    back = torch.where(ahead > 0, -(-ahead // period), 1)  # whole seasons back to the context, (B, T + H)
    lags, known = [], []
    for earlier in range(SEASONS):
        at = steps - period * (back + earlier)  # (B, T + H)
        index = at.clamp_min(0)[:, None].expand(-1, values.shape[1], -1)
        there = observed.gather(-1, index) & (at >= 0)[:, None]
        lags.append(values.gather(-1, index).masked_fill(~there, 0))
        known.append(there)
    count = torch.stack(known).sum(0)
    mean = torch.stack(lags).sum(0) / count.clamp_min(1)
    last = torch.where(known[0], lags[0], mean)
    return torch.stack([last, mean, (count > 0).to(values.dtype)], dim=2)
