"""Batches from buckets of similar length, and the largest batch of each bucket that fits in memory.

A length is any positive number: samples, frames, seconds, tokens. Buckets may have a second dimension, the length of
the target, so that neither the inputs nor the targets of a batch are mostly padding.

Sources: duration buckets of lhotse, and 2-D buckets and OOMptimizer of NeMo (https://arxiv.org/abs/2503.05931).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from vertebra.domains.batching import PlannedSampler, fill_last
from vertebra.errors import ConfigError, DataError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TryStep = Callable[[int, float, float], bool]
"""Whether a training step on (items, length, target length) fits in memory."""

_OUTLIER = 4.0  # standard deviations of target per length, above which an item does not shape the buckets


# ---------------------------------------------------------------- buckets


def estimate_bins(lengths: ArrayLike, count: int) -> list[float]:
    """Bounds of buckets that hold the same total length each.

    Args:
        lengths: Length of every item, (N,).
        count: Number of buckets.

    Returns:
        Largest length of each bucket, rising; fewer than ``count`` where many items have the same length.
    """
    bounds, _ = _bounds(_positive(lengths, "lengths"), _count(count, "count"))
    return [float(b) for b in bounds]


def estimate_bins_2d(lengths: ArrayLike, targets: ArrayLike, count: int, sub: int) -> list[tuple[float, float]]:
    """Bounds of buckets of the same total length, each cut into sub-buckets of the same total target.

    Items whose target is far too long for their length (by 4 standard deviations of the ratio in their bucket) do not
    count. A length that fills several buckets by itself gets that many times the sub-buckets.

    Args:
        lengths: Length of every item, (N,).
        targets: Length of the target of every item, (N,); 0 is allowed.
        count: Buckets by length.
        sub: Sub-buckets by target in each of them.

    Returns:
        Largest length and largest target of each bucket, rising in this order.
    """
    size = _positive(lengths, "lengths")
    target = _targets(targets, size)
    bounds, times = _bounds(size, _count(count, "count"))
    _count(sub, "sub")
    group = np.searchsorted(bounds, size, side="left")
    out: list[tuple[float, float]] = []
    for i, bound in enumerate(bounds):
        mine = target[group == i]
        ratio = mine / size[group == i]
        mine = mine[ratio <= ratio.mean() + _OUTLIER * ratio.std()]
        edges, _ = _bounds(mine, sub * int(times[i]))
        out += [(float(bound), float(edge)) for edge in edges]
    return out


def _bounds(values: Floats, count: int) -> tuple[Floats, Ints]:
    """Upper bounds of ``count`` parts of the same sum, without repeats, and how often each occurred."""
    ordered = np.sort(values)
    sums = np.cumsum(ordered)
    if sums[-1] <= 0:
        return ordered[-1:], np.array([count])
    places = np.searchsorted(sums, sums[-1] * np.arange(1, count) / count, side="left")
    bounds, times = np.unique(np.append(ordered[places], ordered[-1]), return_counts=True)
    return bounds, times


class BucketSampler(PlannedSampler):
    """Batches of items from one bucket of similar lengths.

    A bucket's batches have all the same number of items, but for one, as its longest item allows; which items share a
    batch changes with the epoch. So the number of batches does not change from epoch to epoch. In one step all ranks
    draw from the same bucket. Every item comes once in an epoch. What a bucket has too few of to give one to each rank
    is put together, sorted by length, in batches of one item a rank; an item is repeated only where the last of these
    would otherwise leave a rank without any.

    Without ``shuffle`` batches come from the longest to the shortest, and within a bucket items keep their order.

    Args:
        lengths: Length of every item, (N,).
        targets: Length of the target of every item, (N,).
        bins: Number of buckets to estimate; fewer are made where that would leave less than two full batches for each.
        sub_bins: Number of buckets by target within each, likewise; more than one needs ``targets``.
        edges: Bounds instead of estimated ones, as ``estimate_bins`` or ``estimate_bins_2d`` give them.
        max_total: Largest length of a batch of one rank, padding included; a longer item is a batch of its own.
        quadratic_length: Length that counts twice in ``max_total``: d counts as d + d**2 / quadratic_length.
        batch_size: Largest number of items in a batch of one rank.
        batch_sizes: The same for each bucket of ``edges``, as ``largest_batches`` gives them.
        shuffle: Whether order and composition change from epoch to epoch.
        seed: Seed of the shuffling.
        rank: Index of this process.
        world_size: Number of processes.

    Raises:
        ConfigError: No limit, or arguments that contradict each other.
        DataError: No items, lengths that are not above 0, or, with ``batch_sizes``, items that fit in no bucket.
    """

    def __init__(
        self,
        lengths: ArrayLike,
        *,
        targets: ArrayLike | None = None,
        bins: int = 30,
        sub_bins: int = 1,
        edges: Sequence[float] | Sequence[tuple[float, float]] | None = None,
        max_total: float | None = None,
        quadratic_length: float | None = None,
        batch_size: int | None = None,
        batch_sizes: Sequence[int] | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        super().__init__(shuffle=shuffle, seed=seed, rank=rank, world_size=world_size)
        self.lengths = _positive(lengths, "lengths")
        self.targets = None if targets is None else _targets(targets, self.lengths)
        if max_total is None and batch_size is None and batch_sizes is None:
            raise ConfigError("BucketSampler: give max_total, batch_size or batch_sizes, got none of them.")
        for name, value in (("max_total", max_total), ("quadratic_length", quadratic_length)):
            if value is not None and not value > 0:
                raise ConfigError(f"BucketSampler: {name} must be above 0, got {value}.")
        for name, size in (("bins", bins), ("sub_bins", sub_bins), ("batch_size", batch_size)):
            if size is not None:
                _count(size, name)
        if sub_bins > 1 and self.targets is None:
            raise ConfigError(f"BucketSampler: sub_bins={sub_bins} needs targets; give them, or set sub_bins=1.")
        self.max_total, self.quadratic_length, self.batch_size = max_total, quadratic_length, batch_size
        self.bounds = self._estimate(bins, sub_bins) if edges is None else self._check_edges(edges)
        self.bucket_of = self._assign()
        self.batch_sizes = self._sizes(batch_sizes)

    def effective(self, lengths: Floats) -> Floats:
        """What lengths count as in ``max_total``."""
        if self.quadratic_length is None:
            return lengths
        return lengths + lengths**2 / self.quadratic_length

    def _estimate(self, bins: int, sub_bins: int) -> Floats:
        steps = [1.0]
        if self.max_total is not None:
            steps.append(float(self.effective(self.lengths).sum()) / self.max_total)
        if self.batch_size is not None:
            steps.append(self.lengths.size / self.batch_size)
        rows = max(1, int(max(steps) / self.world_size / 2))  # buckets of two full batches
        bins = min(bins, rows)
        sub_bins = min(sub_bins, max(1, rows // bins))
        if sub_bins > 1:
            assert self.targets is not None
            return np.array(estimate_bins_2d(self.lengths, self.targets, bins, sub_bins))
        return np.array([(b, math.inf) for b in estimate_bins(self.lengths, bins)])

    def _check_edges(self, edges: Sequence[float] | Sequence[tuple[float, float]]) -> Floats:
        found = np.asarray(edges, dtype=np.float64)
        if found.ndim not in (1, 2) or found.size == 0 or (found.ndim == 2 and found.shape[1] != 2):
            raise ConfigError(
                f"BucketSampler: edges must be numbers, or pairs (length, target), got an array {found.shape}."
            )
        if found.ndim == 2 and self.targets is None:
            raise ConfigError("BucketSampler: edges of two dimensions need targets; give them, or lengths alone.")
        if found.ndim == 1:
            found = np.stack([found, np.full(len(found), math.inf)], 1)
        pairs = [tuple(row) for row in found.tolist()]
        if any(a >= b for a, b in pairwise(pairs)) or not found[0, 0] > 0:
            raise ConfigError(f"BucketSampler: edges must rise from above 0, got {list(edges)}.")
        return found

    def _assign(self) -> Ints:
        """Bucket of each item; ``len(bounds)`` where none is large enough.

        The first length bound that holds an item decides, then the target; an item with too long a target goes to the
        first later bucket that holds both.
        """
        longest, target = self.bounds.T
        first = np.searchsorted(longest, self.lengths, side="left")  # first sub-bucket of its length
        if self.targets is None:
            return first.astype(np.int64)
        out = np.full(self.lengths.size, len(self.bounds))
        left = np.arange(self.lengths.size)
        for bucket in range(len(self.bounds)):
            fits = (first[left] <= bucket) & (self.targets[left] <= target[bucket])
            out[left[fits]] = bucket
            left = left[~fits]
        return out

    def _sizes(self, given: Sequence[int] | None) -> Ints:
        """Most items of a rank's batch in each bucket, and in the one for what fits in none."""
        count = len(self.bounds)
        sizes = np.full(count + 1, np.iinfo(np.int64).max)
        if given is not None:
            if len(given) != count:
                raise ConfigError(
                    f"BucketSampler: batch_sizes must be one for each of {count} edges, got {len(given)}."
                )
            for size in given:
                _count(size, "batch_sizes")
            sizes[:count] = given
            outside = np.flatnonzero(self.bucket_of == count)
            if outside.size:
                worst = outside[self.lengths[outside].argmax()]
                of = "" if self.targets is None else f" with a target of {self.targets[worst]:g}"
                raise DataError(
                    f"BucketSampler: {outside.size} items fit in no bucket of edges, the longest is number {worst}, of "
                    f"{self.lengths[worst]:g}{of}; leave them out, or add a bucket with its batch size."
                )
        if self.batch_size is not None:
            sizes = np.minimum(sizes, self.batch_size)
        if self.max_total is not None:
            longest = np.zeros(count + 1)
            np.maximum.at(longest, self.bucket_of, self.effective(self.lengths))
            used = longest > 0
            allowed = np.floor(self.max_total / longest[used] * (1 + 1e-12)).astype(np.int64)
            sizes[used] = np.minimum(sizes[used], np.maximum(allowed, 1))
        return sizes

    def global_batches(self, epoch: int) -> list[Ints]:
        """Plan an epoch: each bucket cut evenly, what is left over last, then all shuffled."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self.lengths.size) if self.shuffle else np.arange(self.lengths.size)
        order = order[np.argsort(self.bucket_of[order], kind="stable")]
        counts = np.bincount(self.bucket_of, minlength=len(self.batch_sizes))
        batches: list[Ints] = []
        rest: list[Ints] = []
        for items, size in zip(np.split(order, np.cumsum(counts)[:-1]), self.batch_sizes.tolist(), strict=True):
            steps = min(-(-len(items) // (size * self.world_size)), len(items) // self.world_size)
            keep = min(len(items), steps * size * self.world_size)
            if steps:
                batches += np.array_split(items[:keep], steps)
            rest.append(items[keep:])
        left = np.concatenate(rest)
        if left.size:
            left = left[np.argsort(self.lengths[left], kind="stable")]
            batches += np.split(left, range(self.world_size, len(left), self.world_size))
            fill_last(batches, self.world_size)
        if self.shuffle:
            return [batches[i] for i in rng.permutation(len(batches))]
        return sorted(batches, key=lambda batch: -float(self.lengths[batch].max()))


def padding_of(batches: Iterable[ArrayLike], lengths: ArrayLike) -> float:
    """Share of padding in the batches of a plan.

    Args:
        batches: Item indices of each batch.
        lengths: Length of every item, or of its target, (N,).
    """
    sizes = np.asarray(lengths, dtype=np.float64)
    real = padded = 0.0
    for batch in batches:
        mine = sizes[np.asarray(batch)]
        real += float(mine.sum())
        padded += len(mine) * float(mine.max())
    return 1 - real / padded if padded else 0.0


# ---------------------------------------------------------------- batch sizes


def largest_batches(
    try_step: TryStep,
    buckets: Sequence[tuple[float, float]],
    *,
    start: int = 32,
    tolerance: float = 0.05,
    limit: int = 65536,
) -> list[int]:
    """Search the largest batch of each bucket that a training step has memory for.

    From the largest bucket to the smallest: double what fits and halve what does not, then bisect until both are
    within ``tolerance`` of each other. Each search starts at twice the result of the one before.

    Args:
        try_step: Runs a step with items of the largest length and target of a bucket; False where it does not fit.
        buckets: Largest length and target of each bucket.
        start: Where the first search starts.
        tolerance: Share of a batch that may be given away.
        limit: Largest batch that is tried.

    Returns:
        Items in a batch of each bucket, in the order of ``buckets``.

    Raises:
        ConfigError: A single item of a bucket does not fit.
    """
    _count(start, "start")
    if not 0 <= tolerance < 1:
        raise ConfigError(f"largest_batches: tolerance must be from 0 to below 1, got {tolerance}.")
    sizes = [0] * len(buckets)
    for i in sorted(range(len(buckets)), key=lambda i: buckets[i], reverse=True):
        length, target = buckets[i]
        fits, fails, size = 0, limit + 1, min(start, limit)
        while True:
            if try_step(size, length, target):
                fits = size
            else:
                fails = size
            if fails == 1:
                raise ConfigError(
                    f"largest_batches: one item of length {length:g} and target {target:g} must fit in memory, it does "
                    "not; use a smaller model or leave longer items out."
                )
            if fails - fits <= max(1, tolerance * fails):
                break
            if not fits:
                size //= 2
            elif fails > limit:
                size = min(2 * size, limit)
            else:
                size = (fits + fails) // 2
        sizes[i] = fits
        start = 2 * fits
    return sizes


class _OverBudgetError(Exception):
    """A forward pass has saved more than it may."""


def memory_try_step(model: nn.Module, loss: Callable[[int, float, float], Tensor], budget: int) -> TryStep:
    """Make a ``try_step`` for ``largest_batches`` that trains ``model`` within ``budget`` bytes.

    A step is the loss, its backward pass, and AdamW at a learning rate of 0, which leaves the weights as they are. On
    a GPU the allocator is held to the budget and what does not fit runs out of memory; its cache is kept between
    steps, as in training. On a CPU bytes are counted: parameters, buffers, gradients, the state of AdamW, and tensors
    saved for the backward pass; temporary tensors are not. A forward pass ends where the count passes the budget.

    Args:
        model: Model in training mode, on the device to be measured.
        loss: Scalar loss of a batch made up of (items, length, target length).
        budget: Bytes; on a GPU leave a tenth of it free.
    """
    if budget < 1:
        raise ConfigError(f"memory_try_step: budget must be at least 1 byte, got {budget}.")
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ConfigError("memory_try_step: the model has no parameter to train; unfreeze it.")
    optimizer = torch.optim.AdamW(trainable, lr=0.0, weight_decay=0.0)
    device = trainable[0].device

    def step(batch: int, length: float, target: float) -> None:
        loss(batch, length, target).backward()
        for p in trainable:
            if p.grad is not None:
                p.grad.nan_to_num_(0.0, 0.0, 0.0)  # 0 times infinity would spoil the weights
        optimizer.step()

    def try_cuda(batch: int, length: float, target: float) -> bool:
        share = budget / torch.cuda.get_device_properties(device).total_memory
        before = torch.cuda.get_per_process_memory_fraction(device)
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
        try:
            step(batch, length, target)
        except torch.cuda.OutOfMemoryError:
            return False
        except RuntimeError as e:
            if "CUFFT_INTERNAL_ERROR" not in str(e):  # how cuFFT says that it has no memory
                raise
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
            torch.cuda.set_per_process_memory_fraction(before, device)
        return True

    def try_cpu(batch: int, length: float, target: float) -> bool:
        owned = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
        room = budget - sum(owned.values()) - 3 * sum(p.nbytes for p in trainable)  # gradients and two moments
        seen = set(owned)

        def pack(tensor: Tensor) -> Tensor:
            nonlocal room
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in seen:
                seen.add(storage.data_ptr())
                room -= storage.nbytes()
            if room < 0:
                raise _OverBudgetError
            return tensor

        if room < 0:
            return False
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                step(batch, length, target)
        except _OverBudgetError:
            return False
        finally:
            optimizer.zero_grad(set_to_none=True)
        return True

    return try_cuda if device.type == "cuda" else try_cpu


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


# ---------------------------------------------------------------- checks


def _positive(lengths: ArrayLike, name: str) -> Floats:
    found = np.asarray(lengths, dtype=np.float64)
    if found.ndim != 1 or found.size == 0:
        raise DataError(f"buckets: {name} must be of at least one item, got an array {found.shape}; is a file empty?")
    if not (np.isfinite(found).all() and found.min() > 0):
        wrong = int(np.flatnonzero(~(np.isfinite(found) & (found > 0)))[0])
        raise DataError(f"buckets: {name} must be above 0, got {found[wrong]} (number {wrong}); leave such items out.")
    return found


def _targets(targets: ArrayLike, lengths: Floats) -> Floats:
    found = np.asarray(targets, dtype=np.float64)
    if found.shape != lengths.shape:
        raise DataError(f"buckets: targets must be as many as lengths, got {found.shape} and {lengths.shape}.")
    if not (np.isfinite(found).all() and found.min() >= 0):
        raise DataError(f"buckets: targets must be 0 or more, got {found.min()}; correct them.")
    return found


def _count(value: int, name: str) -> int:
    if value < 1:
        raise ConfigError(f"buckets: {name} must be at least 1, got {value}.")
    return value
