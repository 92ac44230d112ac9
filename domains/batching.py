"""Batches of items of similar length, packing, and the loader that resumes in the middle of an epoch.

Everything random is a function of (seed, epoch, item), never of a generator's state: the same batch comes out
whatever the number of workers, after a resume, and on whichever rank it falls.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vertebra.errors import ConfigError, DataError

Batch = dict[str, Any]
Fetch = Callable[[NDArray[np.int64], int], Batch]


class PlannedSampler(ABC):
    """Batches of item indices, planned for a whole epoch and the same for all ranks; base of the samplers.

    Args:
        shuffle: Whether order and composition change from epoch to epoch.
        seed: Seed of the shuffling.
        rank: Index of this process.
        world_size: Number of processes.
    """

    def __init__(self, *, shuffle: bool, seed: int, rank: int, world_size: int) -> None:
        if not 0 <= rank < world_size:
            raise ConfigError(f"{type(self).__name__}: rank must be from 0 to {world_size - 1}, got {rank}.")
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._start = 0
        self._plan: tuple[int, list[NDArray[np.int64]]] | None = None

    @abstractmethod
    def global_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Plan an epoch: batches of all ranks together, with an item for each rank at least."""

    @property
    def sampler(self) -> Self:
        """This object: where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration shuffles for."""
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it already handed out."""
        return {"epoch": self.epoch, "batch": self._start}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.epoch, self._start = state["epoch"], state["batch"]

    def batches(self) -> list[NDArray[np.int64]]:
        """All batches of this rank in the current epoch."""
        epoch = self.epoch if self.shuffle else 0
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, [b[self.rank :: self.world_size] for b in self.global_batches(epoch)])
        return self._plan[1]

    def __len__(self) -> int:
        return len(self.batches())

    def __iter__(self) -> Iterator[NDArray[np.int64]]:
        batches = self.batches()
        start, self._start = (self._start if self._start < len(batches) else 0), 0
        for number in range(start, len(batches)):
            self._start = number + 1
            yield batches[number]
        self._start = 0


class LengthBucketSampler(PlannedSampler):
    """Batches of indices whose items have similar lengths.

    With several ranks a global batch is planned for all and dealt out item by item, so that every rank gets the same
    number of batches and two ranks with ``batch_size`` b see what one rank with 2 b would see. No item is lost; one
    is repeated only where the last global batch would otherwise leave a rank without any.

    Args:
        lengths: Length of every item, shape (N,).
        batch_size: Largest number of items in a batch.
        max_tokens: Largest number of positions in a batch, padding included; a longer item is a batch of its own.
        shuffle: Whether order and composition change from epoch to epoch; otherwise items come in their own order.
        seed: Seed of the shuffling.
        rank: Index of this process.
        world_size: Number of processes.
        noise: How far lengths are perturbed before sorting, as a fraction, so that batches differ between epochs.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        *,
        batch_size: int | None = None,
        max_tokens: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        noise: float = 0.1,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if batch_size is None and max_tokens is None:
            raise ConfigError("LengthBucketSampler: give batch_size or max_tokens, got neither.")
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"LengthBucketSampler: {name} must be at least 1, got {value}.")
        super().__init__(shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        if self.lengths.size == 0:
            raise DataError("LengthBucketSampler: there must be at least one item, got none; is a file empty?")
        self.batch_size, self.max_tokens, self.noise = batch_size, max_tokens, noise

    def global_batches(self, epoch: int) -> list[NDArray[np.int64]]:
        """Plan an epoch: items sorted by perturbed lengths, then cut."""
        rng = np.random.default_rng([self.seed, epoch])
        count = self.lengths.size
        if self.shuffle:
            keys = self.lengths * rng.uniform(1 - self.noise, 1 + self.noise, count)
            order = np.lexsort((rng.random(count), keys))
        else:
            order = np.arange(count)
        cut = self._cut(order)
        if len(cut[-1]) < self.world_size:
            fill_last(cut, self.world_size)
        if self.shuffle:
            cut = [cut[i] for i in rng.permutation(len(cut))]
        return cut

    def _cut(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        if self.max_tokens is None:
            assert self.batch_size is not None
            size = self.batch_size * self.world_size
            return np.split(order, range(size, len(order), size))
        cuts, start, longest = [], 0, 0
        for i, length in enumerate(self.lengths[order].tolist()):
            share = -(-(i + 1 - start) // self.world_size)  # items of the fullest rank
            too_long = share > 1 and share * max(longest, length) > self.max_tokens
            if too_long or (self.batch_size is not None and share > self.batch_size):
                cuts.append(i)
                start, longest = i, 0
            longest = max(longest, length)
        return np.split(order, cuts)


def fill_last(batches: list[NDArray[np.int64]], world_size: int) -> None:
    """Give every rank an item of the last batch: from larger batches, else by repeating."""
    for i in range(len(batches) - 2, -1, -1):
        need = world_size - len(batches[-1])
        spare = min(need, len(batches[i]) - world_size)
        if spare > 0:
            batches[-1] = np.concatenate([batches[i][-spare:], batches[-1]])
            batches[i] = batches[i][:-spare]
    if len(batches[-1]) < world_size:
        batches[-1] = np.resize(batches[-1], world_size)


class _FetchDataset(Dataset[Batch]):
    def __init__(self, fetch: Fetch, epoch: int) -> None:
        self.fetch, self.epoch = fetch, epoch

    def __getitem__(self, indices: NDArray[np.int64]) -> Batch:
        return self.fetch(indices, self.epoch)


class BatchLoader:
    """An iterable of batches that knows where it is.

    Lightning saves ``state_dict`` in checkpoints and restores it; the next iteration then starts at the batch after
    the last one that was handed out.

    Args:
        fetch: Makes a batch of tensors from item indices and the epoch.
        sampler: What to fetch.
        num_workers: Worker processes; 0 makes batches in this one.
        pin_memory: Whether to copy batches into page-locked memory.
    """

    def __init__(
        self, fetch: Fetch, sampler: PlannedSampler, *, num_workers: int = 0, pin_memory: bool = False
    ) -> None:
        self.fetch, self.batch_sampler = fetch, sampler
        self.num_workers, self.pin_memory = num_workers, pin_memory
        self._next = 0  # batches handed out in this iteration
        self._resume = 0  # where the next iteration starts

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[Batch]:
        batches = self.batch_sampler.batches()
        epoch = self.batch_sampler.epoch if self.batch_sampler.shuffle else 0
        start = self._resume if self._resume < len(batches) else 0
        todo, self._next, self._resume = batches[start:], start, 0
        if self.num_workers:
            made: Iterator[Batch] = iter(
                DataLoader(
                    _FetchDataset(self.fetch, epoch),
                    sampler=todo,  # with batch_size None one entry is a whole batch
                    batch_size=None,
                    num_workers=self.num_workers,
                    pin_memory=self.pin_memory,
                )
            )
        else:
            made = (self._pin(self.fetch(indices, epoch)) for indices in todo)
        for batch in made:
            self._next += 1
            yield batch
        self._next = 0

    def _pin(self, batch: Batch) -> Batch:
        if not self.pin_memory or not torch.cuda.is_available():
            return batch
        return {k: v.pin_memory() if isinstance(v, Tensor) else v for k, v in batch.items()}

    def state_dict(self) -> dict[str, int]:
        """Epoch, and batches of it already handed out."""
        return {"epoch": self.batch_sampler.epoch, "batch": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where ``state_dict`` was taken."""
        self.batch_sampler.set_epoch(state["epoch"])
        self._next = self._resume = state["batch"]


def pad_batch(
    sequences: Sequence[NDArray[Any] | Tensor], pad_value: float, *, side: Literal["right", "left"] = "right"
) -> tuple[Tensor, Tensor]:
    """Stack sequences (T_i, *rest) into (B, T, *rest), with the mask of real positions, bool (B, T)."""
    rows = [torch.as_tensor(s) for s in sequences]
    length = max(len(r) for r in rows)
    out = torch.full((len(rows), length, *rows[0].shape[1:]), pad_value, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        out[i, place] = row
        mask[i, place] = True
    return out, mask


def plan_packing(lengths: ArrayLike, length: int) -> list[list[int]]:
    """Sort items into rows of ``length`` positions: first fit decreasing.

    Args:
        lengths: Length of every item, at most ``length``.
        length: Positions a row holds.

    Returns:
        Item indices of every row.

    Raises:
        DataError: An item does not fit.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size and sizes.max() > length:
        raise DataError(
            f"pack: every sequence must have at most {length} positions, got {sizes.max()} (number {sizes.argmax()}); "
            "cut it, or pack to a larger length."
        )
    rows: list[list[int]] = []
    free: list[int] = []
    # rows by room, for the smallest row number with enough of it: a heap for each amount of room
    by_room: dict[int, list[int]] = {}
    for item in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[item])
        fits = [heap[0] for room, heap in by_room.items() if room >= size and heap]
        row = min(fits) if fits else len(rows)
        if row == len(rows):
            rows.append([])
            free.append(length)
        else:
            heapq.heappop(by_room[free[row]])
        rows[row].append(item)
        free[row] -= size
        heapq.heappush(by_room.setdefault(free[row], []), row)
    return rows


def pack(sequences: Sequence[NDArray[Any] | Tensor], length: int, pad_value: int = 0) -> tuple[Tensor, Tensor]:
    """Pack sequences (T_i,) into rows of ``length`` positions.

    Returns:
        ``ids`` (R, length), and ``segments`` int (R, length): 0, 1, ... counted in each row, -1 at padding.
    """
    rows = plan_packing([len(s) for s in sequences], length)
    first = torch.as_tensor(sequences[0]).dtype if len(sequences) else torch.int64
    ids = torch.full((len(rows), length), pad_value, dtype=first)
    segments = torch.full((len(rows), length), -1, dtype=torch.int64)
    for r, items in enumerate(rows):
        at = 0
        for k, item in enumerate(items):
            end = at + len(sequences[item])
            ids[r, at:end] = torch.as_tensor(sequences[item])
            segments[r, at:end] = k
            at = end
    return ids, segments


def padding_share(mask: Tensor) -> float:
    """Fraction of positions that are padding; ``mask`` is True at real ones, or holds segments, -1 at padding."""
    real = mask if mask.dtype == torch.bool else mask >= 0
    return 1.0 - real.float().mean().item()
