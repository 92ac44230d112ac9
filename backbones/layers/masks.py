"""The one builder of attention masks: which query may see which key.

Everything is a predicate ``allowed(b, h, q, k)`` on indices that broadcast. Evaluated on whole index ranges it gives
a dense mask for SDPA; given to FlexAttention it is a ``mask_mod``. A query always sees itself, so that no row is empty.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass
class Layout:
    """What the positions of a batch are to each other; made once a forward pass, shared by all layers.

    Args:
        batch: Number of items B.
        length: Number of positions T.
        device: Where masks are made.
        causal: A position sees no later one.
        mask: Real positions, bool (B, T); None when all are.
        segments: Packed sequence of each position, int (B, T), each sequence in one piece; None for one a row.
        prefix: The first ``prefix`` positions are seen by all positions, causal or not (condition tokens).
        block: Size of blocks in which causality does not hold: a position sees its own block whole.
        tree: Ancestor-or-self matrix, bool (T, T), of a tree of drafted tokens; replaces ``causal``.
    """

    batch: int
    length: int
    device: torch.device
    causal: bool = False
    mask: Tensor | None = None
    segments: Tensor | None = None
    prefix: int = 0
    block: int | None = None
    tree: Tensor | None = None
    _dense: dict[int | None, Tensor | None] = field(default_factory=dict, repr=False)

    @property
    def plain(self) -> bool:
        """Whether causality alone says it all."""
        special = (self.mask, self.segments, self.block, self.tree)
        return all(s is None for s in special) and self.prefix == 0

    @property
    def reads_all_last(self) -> bool:
        """Whether the last position sees all others."""
        return self.mask is None and self.segments is None and self.tree is None

    def reversed(self) -> Layout:
        """Return the layout of the sequences read from their end."""
        if self.prefix or self.block is not None or self.tree is not None:
            raise ValueError("Layout.reversed: prefix, block and tree have no reverse.")
        flipped = [None if t is None else t.flip(1) for t in (self.mask, self.segments)]
        return dataclasses.replace(self, mask=flipped[0], segments=flipped[1], _dense={})

    def piece(self, start: int, stop: int) -> Layout:
        """Return the layout of the positions ``start`` .. ``stop`` - 1 alone."""
        cut = [None if t is None else t[:, start:stop] for t in (self.mask, self.segments)]
        return dataclasses.replace(self, length=stop - start, mask=cut[0], segments=cut[1], _dense={})

    def predicate(self, window: int | None = None) -> Predicate:
        """Return ``allowed(b, h, q, k)`` for one layer, bool in the broadcast shape.

        Args:
            window: Only keys at a distance below ``window`` are seen.
        """

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = q == q if not self.causal else q >= k
            if self.block is not None:
                seen = seen | (q // self.block == k // self.block)
            if self.tree is not None:
                seen = self.tree[q, k]
            if window is not None:
                seen = seen & ((q - k).abs() < window)
            if self.prefix:
                seen = seen | (k < self.prefix)
            if self.segments is not None:
                seen = seen & (self.segments[b, q] == self.segments[b, k])
            if self.mask is not None:
                seen = seen & self.mask[b, k]
            return seen | (q == k)

        return allowed

    def dense(self, window: int | None = None) -> Tensor | None:
        """Return the mask (B or 1, 1, T, T), or None when every query sees every key."""
        if self.plain and not self.causal and window is None:
            return None
        if window not in self._dense:
            shared = self.mask is None and self.segments is None
            b = torch.arange(1 if shared else self.batch, device=self.device)[:, None, None, None]
            q = torch.arange(self.length, device=self.device)[:, None]
            k = torch.arange(self.length, device=self.device)
            allowed = self.predicate(window)(b, b, q, k)
            self._dense[window] = allowed.expand(b.shape[0], 1, self.length, self.length)
        return self._dense[window]
