"""Channel mixers."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["gelu", "quick_gelu", "relu"]


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)) (https://arxiv.org/abs/2002.05202, equation 6).

    Args:
        dim: Width D.
        hidden_dim: Width between the projections.
        bias: Whether the projections have biases.
    """

    def __init__(self, dim: int, hidden_dim: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden_dim, bias=bias)
        self.down_proj = nn.Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        gate, up = self.gate_proj(x), self.up_proj(x)
        if torch.compiler.is_compiling():
            return self.down_proj(F.silu(gate) * up)
        if torch.is_grad_enabled():
            return self.down_proj(_Gated.apply(gate, up))
        return self.down_proj(F.silu(gate, inplace=True).mul_(up))


class _Gated(torch.autograd.Function):
    """SiLU(gate) * up, which computes SiLU again in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(dy * up, gate), F.silu(gate).mul_(dy)


class MLP(nn.Module):
    """fc2(activation(fc1(x))), with biases.

    Args:
        dim: Width D.
        hidden_dim: Width between the projections.
        activation: ``gelu``, exact; ``quick_gelu``, x * sigmoid(1.702 x) (https://arxiv.org/abs/1606.08415); ``relu``.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        h = self.fc1(x)
        if self.activation == "relu":
            return self.fc2(F.relu(h))
        return self.fc2(F.gelu(h) if self.activation == "gelu" else h * torch.sigmoid(1.702 * h))
