"""Root-mean-square norms, computed in float32."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last axis (https://arxiv.org/abs/1910.07467, equation 4)."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * SiLU(z)) in groups of channels: gate first, then norm (Mamba-2's default order).

    Args:
        dim: Width D.
        groups: Number of groups that are normalised each by itself.
        eps: Added to the mean square.
    """

    def __init__(self, dim: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        """Map y and its gate z, both (..., D), to (..., D) in the dtype of z."""
        gated = (y.float() * F.silu(z.float())).unflatten(-1, (self.groups, -1))  # (..., G, D/G)
        normed = F.rms_norm(gated, gated.shape[-1:], None, self.eps).flatten(-2)  # (..., D)
        return (normed * self.weight.float()).to(z.dtype)
