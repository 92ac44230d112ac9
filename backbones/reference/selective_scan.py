"""Mamba-1's scan as its definition, one position after another."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan as ``layers.selective_scan.selective_scan`` does, in the dtype of the input.

    Args:
        x: Input (B, T, D).
        dt: Step sizes (B, T, D).
        A: Decay (D, N).
        B: Input projection (B, T, N).
        C: Output projection (B, T, N).
        initial_state: (B, D, N).
        segments: Packed sequences (B, T).
    """
    state = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state
    outputs = []
    # unbind, not indexing: the gradient of every index is as large as the whole
    for t, (x_t, dt_t, b, c) in enumerate(zip(*(m.unbind(1) for m in (x, dt, B, C)), strict=True)):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None]
        state = torch.exp(dt_t[..., None] * A) * state + torch.einsum("bd,bn->bdn", dt_t * x_t, b)
        outputs.append(torch.einsum("bdn,bn->bd", state, c))
    return torch.stack(outputs, dim=1), state
