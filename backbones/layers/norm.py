"""Root-mean-square norms, computed in float32."""

from __future__ import annotations

from typing import Any

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
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _RMSNorm.apply(x.float(), self.weight.float(), self.eps).to(x.dtype)
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and one number a position for the backward pass, where torch's own keeps several copies of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        normed, inner = x * scale, dy * weight
        along = (inner * normed).mean(-1, keepdim=True)  # (..., 1)
        dweight = (dy * normed).reshape(-1, x.shape[-1]).sum(0)
        return inner.addcmul_(normed, along, value=-1).mul_(scale), dweight, None


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
