"""Attention as its definition, one query after another."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_by_query(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """Attend with an explicit list of keys for every query.

    Args:
        q: Queries (B, H, T, K).
        k: Keys (B, G, T, K).
        v: Values (B, G, T, K).
        allowed: Which query (axis 1) sees which key (axis 2), bool (B, T, T).
    """
    batch, heads, length, width = q.shape
    repeats = heads // k.shape[1]
    rows = []
    for b in range(batch):
        for h in range(heads):
            for t in range(length):
                seen = allowed[b, t].nonzero()[:, 0]
                scores = k[b, h // repeats, seen] @ q[b, h, t] / width**0.5
                rows.append(scores.softmax(0) @ v[b, h // repeats, seen])
    return torch.stack(rows).reshape(batch, heads, length, width)
