"""Mamba-2's scan as its definition, one position after another."""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan as ``layers.ssd.ssd`` does, in the dtype of the input.

    Args:
        x: Input (B, T, H, P).
        dt: Step sizes (B, T, H).
        A: Decay (H,).
        B: Input projection (B, T, G, N).
        C: Output projection (B, T, G, N).
        initial_state: (B, H, P, N).
        segments: Packed sequences (B, T).
    """
    batch, length, heads, width = x.shape
    repeats = heads // B.shape[2]
    state = x.new_zeros(batch, heads, width, B.shape[3]) if initial_state is None else initial_state
    outputs = []
    for t in range(length):
        if segments is not None and t > 0:
            state = state * (segments[:, t] == segments[:, t - 1])[:, None, None, None]
        b, c = (m[:, t].repeat_interleave(repeats, 1) for m in (B, C))  # (B, H, N)
        decay = torch.exp(dt[:, t] * A)  # (B, H)
        state = decay[..., None, None] * state + torch.einsum("bh,bhp,bhn->bhpn", dt[:, t], x[:, t], b)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, c))
    return torch.stack(outputs, dim=1), state
