"""A text prompt beside the recording: its encoder.

Source: OWSM-CTC (https://arxiv.org/abs/2402.12654), section 3; the layers are those of ESPnet's Transformer encoder.

Shapes: B items, L tokens of the prompt, E width of the prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vertebra.backbones.layers.attention import Attention
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mlp import MLP
from vertebra.backbones.layers.positions import sinusoid
from vertebra.backbones.stack import Block

NORM_EPS = 1e-12  # of all of ESPnet's norms


class PromptEncoder(nn.Module):
    """Pre-norm Transformer over the embedded tokens of a prompt.

    Args:
        dim: E.
        depth: Number of layers.
        num_heads: Heads of a layer.
        hidden_dim: Inner width of the MLPs.
        dropout: Share of each branch's output that is zeroed in training.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, hidden_dim: int, dropout: float = 0.0) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return nn.LayerNorm(dim, NORM_EPS)

        self.dim = dim
        self.layers = nn.ModuleList(
            Block(
                Attention(dim, num_heads, num_heads, dim // num_heads, bias=True),
                MLP(dim, hidden_dim, "relu"),
                norm,
                dropout,
            )
            for _ in range(depth)
        )
        self.norm = norm()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map embedded tokens x (B, L, E) with the mask of real ones (B, L) to (B, L, E)."""
        positions = torch.arange(x.shape[1], device=x.device)
        x = x * self.dim**0.5 + sinusoid(positions, self.dim).to(x.dtype)
        layout = Layout(batch=x.shape[0], length=x.shape[1], device=x.device, mask=mask)
        for layer in self.layers:
            x = layer(x, layout)
        return self.norm(x)
