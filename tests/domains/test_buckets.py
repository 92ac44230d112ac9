import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from vertebra.domains.base import BaseData
from vertebra.domains.batching import BatchLoader
from vertebra.domains.buckets import (
    BucketSampler,
    estimate_bins,
    estimate_bins_2d,
    largest_batches,
    memory_try_step,
    padding_of,
)
from vertebra.errors import ConfigError, DataError


def books(count=60_000, seed=0):
    """Seconds and tokens as of read books: two in three utterances near 15 s, the rest shorter."""
    rng = np.random.default_rng(seed)
    long = rng.normal(14.5, 1.2, count)
    short = rng.uniform(1.5, 14, count)
    seconds = np.clip(np.where(rng.random(count) < 0.6, long, short), 1.3, 34)
    return seconds, np.maximum(np.round(seconds * rng.lognormal(np.log(3.5), 0.3, count)), 1)


def spread(count=60_000, seed=0):
    """Seconds from 0.5 to 40 and tokens, widely spread."""
    rng = np.random.default_rng(seed)
    seconds = rng.lognormal(np.log(6), 0.9, count)
    seconds = np.where(seconds < 40, seconds, rng.uniform(0.5, 40, count))
    return seconds, np.maximum(np.round(seconds * rng.lognormal(np.log(3.5), 0.3, count)), 1)


def random_batches(count, size=32):
    return np.array_split(np.random.default_rng(1).permutation(count), count // size)


@pytest.mark.parametrize("make", [books, spread])
def test_buckets_of_one_dimension_leave_little_padding(make):
    seconds, tokens = make()
    sampler = BucketSampler(seconds, bins=30, max_total=500)
    assert len(sampler.bounds) == 30
    batches = sampler.batches()
    assert padding_of(batches, seconds) < 0.08
    assert padding_of(batches, tokens) > 0.25  # what the second dimension is for
    assert padding_of(random_batches(len(seconds)), seconds) > 0.25
    assert sum(len(b) * seconds[b].max() for b in batches) / len(batches) > 0.9 * 500  # batches are full


@pytest.mark.parametrize("make", [books, spread])
def test_buckets_of_two_dimensions_leave_little_padding_of_targets(make):
    seconds, tokens = make()
    sampler = BucketSampler(seconds, targets=tokens, bins=30, sub_bins=5, max_total=500)
    assert len(sampler.bounds) == 150
    assert padding_of(sampler.batches(), seconds) < 0.08
    assert padding_of(sampler.batches(), tokens) < 0.15


def test_buckets_hold_equal_total_length():
    seconds, tokens = spread()
    bounds = np.array(estimate_bins(seconds, 10))
    sums = np.bincount(np.searchsorted(bounds, seconds), weights=seconds)
    assert len(sums) == 10
    np.testing.assert_allclose(sums, seconds.sum() / 10, rtol=0.01)
    assert bounds[-1] == seconds.max()
    tokens += np.random.default_rng(3).uniform(0, 1, tokens.size)  # whole numbers are too coarse for quarters
    pairs = estimate_bins_2d(seconds, tokens, 10, 4)
    assert pairs == sorted(pairs)
    assert sorted({length for length, _ in pairs}) == bounds.tolist()
    first = tokens[(seconds <= pairs[0][0])]
    assert (first <= pairs[0][1]).mean() > 0.25  # more items of fewer tokens make the same total
    np.testing.assert_allclose(first[first <= pairs[0][1]].sum() / first.sum(), 0.25, atol=0.02)


def test_equal_lengths_make_one_bucket_with_more_sub_buckets():
    assert estimate_bins([5.0] * 100, 8) == [5.0]
    targets = np.arange(1, 101)
    assert len(estimate_bins_2d([5.0] * 100, targets, 4, 2)) == 8
    assert estimate_bins_2d([5.0] * 100, [0] * 100, 4, 2) == [(5.0, 0.0)]


def test_outliers_do_not_shape_the_buckets_and_are_not_lost():
    lengths, targets = np.full(1000, 10.0), np.full(1000, 30.0)
    targets[17] = 900
    assert estimate_bins_2d(lengths, targets, 1, 2)[-1] == (10.0, 30.0)
    sampler = BucketSampler(lengths, targets=targets, bins=2, sub_bins=2, batch_size=8)
    assert [17] in [b.tolist() for b in sampler]
    assert sorted(np.concatenate(sampler.batches())) == list(range(1000))


sizes = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@settings(max_examples=120, deadline=None)
@given(
    sizes,
    st.integers(1, 6),
    st.sampled_from([None, 1, 40, 200]),
    st.sampled_from([None, 1, 3, 16]),
    st.integers(1, 4),
    st.booleans(),
    st.sampled_from([None, 20.0]),
    st.booleans(),
)
def test_every_item_once_no_batch_above_its_limits_and_ranks_agree(
    lengths, bins, max_total, batch_size, world, shuffle, quadratic, two
):
    if max_total is None and batch_size is None:
        batch_size = 4
    lengths = np.array(lengths, dtype=float)
    options = {"targets": lengths[::-1].copy(), "sub_bins": 3} if two else {}
    ranks = [
        BucketSampler(
            lengths, bins=bins, max_total=max_total, batch_size=batch_size, quadratic_length=quadratic,
            shuffle=shuffle, rank=rank, world_size=world, seed=5, **options,
        )
        for rank in range(world)
    ]  # fmt: skip
    number = len(ranks[0])
    for epoch in range(3):
        plans = []
        for sampler in ranks:
            sampler.set_epoch(epoch)
            plans.append(list(sampler))
            assert len(sampler) == number
        seen = np.concatenate([b for plan in plans for b in plan])
        assert set(seen.tolist()) == set(range(len(lengths)))
        assert len(seen) - len(lengths) < world
        if world == 1 or len(lengths) % world == 0:
            assert len(seen) == len(lengths)
        for step in zip(*plans, strict=True):
            assert all(len(b) >= 1 for b in step)
            for batch in step:
                longest = lengths[batch].max()
                cost = len(batch) * (longest + (longest**2 / quadratic if quadratic else 0))
                assert len(batch) == 1 or max_total is None or cost <= max_total + 1e-9
                assert batch_size is None or len(batch) <= batch_size
            if max(len(b) for b in step) > 1 and len(lengths) % world == 0:
                assert len({int(ranks[0].bucket_of[i]) for b in step for i in b}) == 1


def test_ranks_draw_from_the_same_bucket_and_share_no_item():
    seconds, tokens = spread(8000)
    plans = [
        BucketSampler(seconds, targets=tokens, bins=8, sub_bins=2, max_total=100, rank=r, world_size=4)
        for r in range(4)
    ]
    buckets = [[plan.bucket_of[b] for b in plan] for plan in plans]
    steps = [np.unique(np.concatenate(step)) for step in zip(*buckets, strict=True)]
    assert sum(len(step) > 1 for step in steps) <= 16  # left over, at most once a bucket
    assert len({step[0] for step in steps}) == 16
    seen = np.concatenate([b for plan in plans for b in plan.batches()])
    assert len(seen) == len(set(seen.tolist())) == 8000


def test_epochs_differ_and_repeat_exactly():
    seconds, _ = spread(2000)

    def plan(epoch, seed=0):
        sampler = BucketSampler(seconds, bins=5, max_total=200, seed=seed)
        sampler.set_epoch(epoch)
        return [b.tolist() for b in sampler]

    assert plan(0) == plan(0)
    assert plan(0) != plan(1)
    assert plan(0) != plan(0, seed=1)
    together = [{frozenset(b) for b in plan(e)} for e in range(2)]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])  # who shares a batch changes


def test_unshuffled_batches_fall_in_length_and_do_not_change():
    seconds, _ = spread(500)
    sampler = BucketSampler(seconds, bins=4, batch_size=16, shuffle=False)
    first = [b.tolist() for b in sampler]
    sampler.set_epoch(3)
    assert first == [b.tolist() for b in sampler]
    longest = [seconds[b].max() for b in first]
    assert longest == sorted(longest, reverse=True)
    assert all(b == sorted(b) for b in first)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_resumes_in_the_middle_of_an_epoch(workers):
    seconds, _ = spread(120)

    def make():
        return BatchLoader(fetch, BucketSampler(seconds, bins=3, max_total=60, seed=2), num_workers=workers)

    def fetch(indices, epoch):
        return {"index": torch.from_numpy(indices), "epoch": epoch}

    loader = make()
    loader.batch_sampler.set_epoch(4)
    batches = [b["index"].tolist() for b in loader]
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    other = make()
    other.load_state_dict(loader.state_dict())
    rest = list(other)
    assert [b["index"].tolist() for b in rest] == batches[3:]
    assert {b["epoch"] for b in rest} == {4}
    assert [b["index"].tolist() for b in other] == batches


def test_few_items_are_not_scattered_over_many_buckets():
    sampler = BucketSampler(np.arange(1, 65), bins=30, batch_size=16)
    assert len(sampler) == 5  # 45 shorter and 19 longer ones
    assert len(sampler.bounds) == 2
    assert len(BucketSampler([3.0, 4.0, 5.0], bins=30, batch_size=16)) == 1


def test_given_edges_and_batch_sizes_hold():
    lengths, targets = np.array([1, 2, 3, 4, 5, 6.0] * 20), np.array([1, 9, 1, 9, 1, 9.0] * 20)
    sampler = BucketSampler(lengths, targets=targets, edges=[(3, 4), (3, 9), (6, 4), (6, 9)], batch_sizes=[8, 4, 2, 1])
    assert sampler.bucket_of[:6].tolist() == [0, 1, 0, 3, 2, 3]
    for batch in sampler:
        assert len(batch) <= (8, 4, 2, 1)[int(sampler.bucket_of[batch[0]])]
    one = BucketSampler(lengths, edges=[2, 6], batch_sizes=[20, 10])
    assert sorted(len(b) for b in one) == [10] * 8 + [20] * 2


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({}, ConfigError, "give max_total, batch_size or batch_sizes, got none"),
        ({"max_total": 0}, ConfigError, "max_total must be above 0, got 0"),
        ({"batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
        ({"batch_size": 1, "bins": 0}, ConfigError, "bins must be at least 1, got 0"),
        ({"batch_size": 1, "sub_bins": 2}, ConfigError, "sub_bins=2 needs targets; give them"),
        ({"batch_size": 1, "rank": 1}, ConfigError, "rank must be from 0 to 0, got 1"),
        ({"batch_size": 1, "edges": [2, 1]}, ConfigError, r"edges must rise from above 0, got \[2, 1\]"),
        ({"batch_size": 1, "edges": [(1, 2)]}, ConfigError, "edges of two dimensions need targets"),
        ({"batch_sizes": [1, 2], "edges": [5]}, ConfigError, "one for each of 1 edges, got 2"),
        ({"batch_sizes": [1], "edges": [1.5]}, DataError, "1 items fit in no bucket of edges, the longest is number 1"),
        ({"batch_size": 1, "lengths": []}, DataError, "at least one item, got an array .*; is a file empty"),
        ({"batch_size": 1, "lengths": [1, 0]}, DataError, r"lengths must be above 0, got 0.0 \(number 1\)"),
        ({"batch_size": 1, "targets": [1]}, DataError, "targets must be as many as lengths"),
        ({"batch_size": 1, "targets": [1, -1]}, DataError, "targets must be 0 or more, got -1"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        BucketSampler(**{"lengths": [1, 2], **arguments})


def test_padding_of_counts_elements():
    assert padding_of([[0, 1], [2]], [1, 3, 5]) == pytest.approx(1 - 9 / 11)
    assert padding_of([], [1]) == 0


class PlainItems:
    lengths = np.arange(1, 41)

    def fetch(self, indices, epoch):
        return {"index": torch.from_numpy(indices)}


class BucketData(BaseData):
    def load(self, splits, spec):
        return None, {"train": PlainItems()}

    def sampler(self, split, items, *, shuffle, rank, world_size):
        return BucketSampler(items.lengths, bins=2, max_total=100, shuffle=shuffle, rank=rank, world_size=world_size)


def test_a_data_module_chooses_its_sampler():
    data = BucketData()
    data.setup("fit")
    loader = data.train_dataloader()
    assert isinstance(loader.batch_sampler, BucketSampler)
    assert sorted(i for b in loader for i in b["index"].tolist()) == list(range(40))


# ---------------------------------------------------------------- batch sizes


@pytest.mark.parametrize("start", [1, 32, 1000])
@pytest.mark.parametrize("budget", [1e6, 3.7e7, 1e9])
def test_search_finds_the_largest_batches(start, budget):
    buckets = [(5.0, 20.0), (5.0, 60.0), (20.0, 80.0), (40.0, 80.0), (40.0, 300.0)]
    tries = []

    def need(batch, length, target):
        return batch * (2000 * length + 60 * length**2 + 500 * target)

    def try_step(batch, length, target):
        tries.append((batch, length, target))
        return need(batch, length, target) <= budget

    found = largest_batches(try_step, buckets, start=start)
    for size, bucket in zip(found, buckets, strict=True):
        best = int(budget // need(1, *bucket))
        assert need(size, *bucket) <= budget
        assert size >= 0.95 * best - 1
        assert best < 20 or size >= 0.949 * best
    assert tries[0] == (start, 40.0, 300.0)
    assert len(tries) < 80


def test_search_ends_at_its_limit_and_refuses_what_never_fits():
    assert largest_batches(lambda batch, length, target: True, [(1, 1), (2, 1)], limit=100) == [100, 100]
    with pytest.raises(ConfigError, match=r"one item of length 7 and target 2 must fit in memory, it does not; use"):
        largest_batches(lambda batch, length, target: length < 7, [(1, 1), (7, 2)])
    with pytest.raises(ConfigError, match="tolerance must be from 0 to below 1, got 1"):
        largest_batches(lambda *_: True, [(1, 1)], tolerance=1)


def test_memory_is_counted_in_a_training_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4, bias=False))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    done = []

    def loss(batch, length, target):
        out = model(torch.ones(batch, int(length), 8)).sum()
        done.append(batch)
        return out

    parameters = 4 * (8 * 16 + 16 + 16 * 4)
    item = 4 * 10 * (8 + 16)  # of 10 positions: the input, and what tanh keeps
    room = 4 * parameters + 100 * item
    try_step = memory_try_step(model, loss, room)
    assert try_step(100, 10, 0)
    assert not try_step(101, 10, 0)
    assert done == [100]  # the forward pass of 101 ended early
    assert try_step(100, 10, 0)
    assert largest_batches(try_step, [(10, 0), (20, 0)], tolerance=0.01) == [100, 50]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not memory_try_step(model, loss, 4 * parameters - 1)(1, 1, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_held_to_the_budget():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Tanh(), nn.Linear(1024, 1)).cuda()

    def loss(batch, length, target):
        return model(torch.ones(batch, int(length), 1024, device="cuda")).sum()

    fraction = torch.cuda.get_per_process_memory_fraction()
    try_step = memory_try_step(model, loss, 1 << 30)
    assert [try_step(batch, 100, 0) for batch in (8, 1 << 14, 8)] == [True, False, True]  # 6.7 GB of input
    assert torch.cuda.get_per_process_memory_fraction() == fraction


def test_memory_needs_a_budget_and_something_to_train():
    model = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ConfigError, match="no parameter to train; unfreeze it"):
        memory_try_step(model, lambda *_: torch.zeros(()), 100)
    with pytest.raises(ConfigError, match="budget must be at least 1 byte, got 0"):
        memory_try_step(model, lambda *_: torch.zeros(()), 0)
