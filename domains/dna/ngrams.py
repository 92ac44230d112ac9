"""Overlapping n-grams of bases as extra features of every position.

A table of n-grams remembers motifs and composition that a small backbone learns slowly from a few thousand sequences;
it is the spectrum kernel (Leslie et al. 2002, https://pubmed.ncbi.nlm.nih.gov/11928508) as an embedding.

Shapes: B batch, L positions, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.errors import ConfigError

LONGEST = 10  # 4**10 rows are a million
SHORT = 3  # up to this order n-grams are composition and codons, and name no sequence


class NGramEmbedding(nn.Module):
    """Sum over the orders n of an embedding of the n bases around each position.

    Args:
        orders: The n of the tables; a table has 4**n rows.
        dim: Width D.
        base_ids: Token ids of A, C, G, T.
        vocab_size: Number of token ids.
        dropout: Share of n-grams that is left out in training, each order and position by itself.
        skip: Share of sequences for which a table is left out whole in training, above order 3. Long n-grams name the
            training sequences; without this they explain the labels alone, and the rest of a model learns nothing.
    """

    codes: Tensor

    def __init__(
        self,
        orders: Sequence[int],
        dim: int,
        base_ids: Sequence[int],
        vocab_size: int,
        dropout: float = 0.0,
        skip: float = 0.0,
    ) -> None:
        super().__init__()
        if not orders or min(orders) < 2 or max(orders) > LONGEST or len(set(orders)) < len(orders):
            raise ConfigError(f"ngrams: orders must be different numbers from 2 to {LONGEST}, got {list(orders)}.")
        self.orders, self.dropout, self.skip = tuple(orders), dropout, skip
        self.tables = nn.ModuleList(nn.Embedding(4**n, dim) for n in orders)
        for table in self.tables:
            assert isinstance(table, nn.Embedding)
            nn.init.normal_(table.weight, std=0.05)
        codes = torch.full((vocab_size,), -1)
        codes[torch.as_tensor(base_ids)] = torch.arange(4)
        self.register_buffer("codes", codes, persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Map token ids (B, L) to (B, L, D); n-grams over an edge, padding, N or a special token count as zeros."""
        codes = self.codes[ids]  # (B, L)
        total: Tensor | None = None
        for n, table in zip(self.orders, self.tables, strict=True):
            padded = F.pad(codes, (n // 2, n - 1 - n // 2), value=-1)
            grams = padded.unfold(1, n, 1)  # (B, L, n)
            whole = (grams >= 0).all(-1)
            powers = 4 ** torch.arange(n - 1, -1, -1, device=ids.device)
            index = (grams * powers).sum(-1).where(whole, 0)
            if self.training and self.dropout:
                whole = whole & (torch.rand(whole.shape, device=ids.device) >= self.dropout)
            if self.training and self.skip and n > SHORT:
                whole = whole & (torch.rand(len(ids), 1, device=ids.device) >= self.skip)
            value = table(index) * whole[..., None]  # (B, L, D)
            total = value if total is None else total + value
        assert total is not None
        return total / (1 - self.dropout) if self.training else total
