"""Sequences in groups: what backbones share that cut a sequence into rows or groups of a fixed size.

Shapes: B batch, T positions, N sequences, L positions of the longest one, G groups, S positions of a group.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.backbones.base import State
from vertebra.backbones.layers.mixer import check_state


def align(
    x: Tensor, mask: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Lay every sequence at the start of a row of its own, so that groups are counted from its first position.

    Args:
        x: Features (B, T, D).
        mask: Real positions, bool (B, T); None when all are.
        segments: Packed sequence of each position, int (B, T), each in one piece; None for one a row. Packed
            sequences become rows, whose number depends on the data: that form cannot be exported.

    Returns:
        The rows (N, L, D), what of them is real (N, L) or None for all, and a function that maps rows (N, L, ...) back
        to (B, T, ...); what it gives at padding means nothing.
    """
    batch, length = x.shape[:2]
    if segments is None:
        if mask is None:
            return x, None, lambda rows: rows
        order = mask.long().argsort(dim=1, descending=True, stable=True)  # real positions first
        place = order.argsort(dim=1)
        return _take(x, order), mask.gather(1, order), lambda rows: _take(rows, place)
    begins = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    number = begins.flatten().cumsum(0) - 1  # (B*T,)
    real = torch.ones_like(begins).flatten() if mask is None else mask.flatten()
    before = real.long().cumsum(0) - real.long()  # real positions before this one
    at = before - before[begins.flatten()][number]
    rows, longest = int(number[-1]) + 1, int(at.max()) + 1
    kept = (number[real], at[real])
    laid = x.new_zeros(rows, longest, x.shape[-1]).index_put(kept, x.flatten(0, 1)[real])
    filled = torch.zeros(rows, longest, dtype=torch.bool, device=x.device).index_put(
        kept, torch.ones_like(kept[0], dtype=torch.bool)
    )
    return laid, None if bool(filled.all()) else filled, lambda y: y[number, at].unflatten(0, (batch, length))


def cut(x: Tensor, size: int) -> Tensor:
    """Cut (B, T, ...) into groups of ``size`` positions (B, G, S, ...), the last one filled up with zeros."""
    missing = -x.shape[1] % size
    if missing:
        x = torch.cat([x, x.new_zeros(x.shape[0], missing, *x.shape[2:])], dim=1)
    return x.unflatten(1, (-1, size))


def _take(x: Tensor, index: Tensor) -> Tensor:
    """Take x (B, T, ...) at index (B, U): (B, U, ...)."""
    index = index.reshape(*index.shape, *[1] * (x.ndim - 2))
    return x.gather(1, index.expand(-1, -1, *x.shape[2:]))


class Cursor:
    """Where the next positions of a batch stand, when each item has read another number of positions.

    A step gets T new positions an item, the real ones first. They fall into a window of G groups that begins with the
    group each item is in the middle of.

    Args:
        position: Positions read before, int (B,).
        length: T.
        size: S.
        real: Real new positions, bool (B, T), real ones first; None when all are.

    Attributes:
        slot: Place of every new position in the window, int (B, T), from 0 to G * S - 1.
        groups: G.
        filled: Places of the window that hold a position after this step, bool (B, G, S).
        finished: Groups of the window that are complete after this step, bool (B, G).
        number: Index in the whole sequence of the window's groups, int (B, G).
        advanced: Positions read after this step, int (B,).
    """

    def __init__(self, position: Tensor, length: int, size: int, real: Tensor | None = None) -> None:
        self.size = size
        phase = position % size
        count = torch.full_like(position, length) if real is None else real.sum(1)
        self.slot = phase[:, None] + torch.arange(length, device=position.device)  # (B, T)
        self.groups = -(-int(phase.max() + length) // size)
        stop = phase + count
        places = torch.arange(self.groups * size, device=position.device)
        self.filled = (places < stop[:, None]).unflatten(1, (self.groups, size))
        self.finished = self.filled[..., -1]
        self.number = (position // size)[:, None] + torch.arange(self.groups, device=position.device)
        self.advanced = position + count

    def place(self, new: Tensor, held: Tensor) -> Tensor:
        """Put new positions into the window, behind those of the unfinished group.

        Args:
            new: (B, T, ...).
            held: What an earlier ``rest`` kept of the unfinished group (B, S, ...).

        Returns:
            (B, G, S, ...); what is not ``filled`` means nothing.
        """
        window = F.pad(held.flatten(2), (0, 0, 0, (self.groups - 1) * self.size))  # (B, G*S, F)
        flat = new.flatten(2)
        window = window.scatter(1, self.slot[..., None].expand(-1, -1, flat.shape[-1]), flat)
        return window.reshape(new.shape[0], self.groups, self.size, *new.shape[2:])

    def take(self, window: Tensor) -> Tensor:
        """Take the new positions (B, T, ...) out of a window (B, G, S, ...)."""
        return _take(window.flatten(1, 2), self.slot)

    def rest(self, window: Tensor) -> Tensor:
        """Keep the group (B, S, ...) of a window (B, G, S, ...) that is unfinished after this step."""
        done = self.finished.sum(1)
        last = done.clamp(max=self.groups - 1)  # a group that just began holds nothing yet
        return window[torch.arange(len(window), device=window.device), last]


class TensorState(State):
    """A state of tensors by name, batch axis first.

    Args:
        tensors: What is remembered; ``position`` (B,) is the number of positions read.
        growth: How memory grows.
        free: Axes, by name of the tensor, whose size grows with the position.
    """

    def __init__(self, tensors: dict[str, Tensor], growth: str, free: dict[str, int]) -> None:
        self.tensors, self._growth, self.free = tensors, growth, free

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def growth(self) -> str:
        """How memory grows with the position."""
        return self._growth

    @property
    def batch_size(self) -> int:
        """Number of items B."""
        return self.tensors["position"].shape[0]

    def select(self, indices: Tensor) -> TensorState:
        """Keep the batch items ``indices`` (N,), in that order."""
        rows = indices.to(self.tensors["position"].device)
        return TensorState({name: t[rows] for name, t in self.tensors.items()}, self._growth, self.free)

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered by name."""
        return {"batch": torch.tensor(self.batch_size), **self.tensors}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        for name, own in self.tensors.items():
            free = (self.free[name],) if name in self.free else ()
            check_state({name: own}, tensors, free)
        self.tensors = {name: tensors[name].to(own) for name, own in self.tensors.items()}
