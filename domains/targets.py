"""What a language model of any domain is asked for at every position.

Shapes: B batch, L positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORED = -100
"""Stands where nothing is asked for."""


def next_targets(ids: Tensor, counted: Tensor, segments: Tensor | None = None) -> Tensor:
    """Targets of every position (B, L): the token after it, or -100.

    Args:
        ids: Token ids, int (B, L).
        counted: Tokens that count as targets, bool (B, L).
        segments: Packed sequence of every position; none is asked for the first token of the next one.
    """
    counted = counted[:, 1:]
    if segments is not None:
        counted = counted & (segments[:, 1:] == segments[:, :-1])
    targets = torch.full_like(ids, IGNORED, dtype=torch.long)
    targets[:, :-1] = torch.where(counted, ids[:, 1:].long(), IGNORED)
    return targets
