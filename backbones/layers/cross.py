"""Attention of positions to a memory beside them: a prompt, an encoder's output."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class CrossAttention(nn.Module):
    """x + attention(norm(x), memory): softmax attention of every position to a memory.

    Args:
        dim: D, of both.
        num_heads: Number of heads.
        dropout: Share of the branch's output that is zeroed in training.
        eps: Of the norm.
    """

    def __init__(self, dim: int, num_heads: int, dropout: float = 0.0, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(dim, eps)
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, *grid, D) and memory (B, L, D), real where ``mask`` (B, L), to (B, *grid, D)."""
        q = self._heads(self.q(self.norm(x).flatten(1, -2)))
        k, v = (self._heads(part) for part in self.kv(memory).chunk(2, dim=-1))
        seen = None if mask is None else mask[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)  # (B, H, T, D / H)
        return x + self.dropout(self.proj(y.transpose(1, 2).flatten(2))).view_as(x)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
