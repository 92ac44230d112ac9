"""Rotary position embedding (https://arxiv.org/abs/2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions: Tensor, width: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (..., width/2) in float32, for integer ``positions`` (...)."""
    exponents = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device) / width
    angles = positions.float()[..., None] * theta**-exponents  # (..., width/2)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor], interleaved: bool, *, ordered: bool = True) -> Tensor:
    """Rotate the first 2 * angles.shape[-1] channels of every head of x (B, H, T, K).

    Args:
        x: Queries or keys.
        angles: Cosine and sine from ``rope_angles``.
        interleaved: Pairs are channels (2i, 2i+1), as in Meta's LLaMA; else (i, i + width/2), as in GPT-NeoX.
        ordered: Whether channels keep their places; where queries and keys are both turned without, their products are
            the same, and a compiler writes its output in long runs.
    """
    cos, sin = angles
    width = 2 * cos.shape[-1]
    if interleaved and ordered and width == x.shape[-1] and not torch.compiler.is_compiling():
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # one pass; compilers fuse the form below
        return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
    turned, rest = x[..., :width].float(), x[..., width:]
    first, second = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, dim=-1)
    out = (first * cos - second * sin, first * sin + second * cos)
    turned = torch.stack(out, dim=-1).flatten(-2) if interleaved and ordered else torch.cat(out, dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
