"""Sinusoidal positions (https://arxiv.org/abs/1706.03762, section 3.5)."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(positions: Tensor, dim: int) -> Tensor:
    """Return sines and cosines (*positions.shape, dim) in float32, at even and odd channels, of whole numbers."""
    rates = torch.exp(torch.arange(0, dim, 2, device=positions.device) * (-math.log(10000.0) / dim))
    angles = positions[..., None].float() * rates
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(-2)[..., :dim]
