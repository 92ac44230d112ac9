import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.backbones.random import item_uniform
from vertebra.domains.batching import (
    BatchLoader,
    LengthBucketSampler,
    pack,
    pad_batch,
    padding_share,
    plan_packing,
)
from vertebra.errors import ConfigError, DataError

lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 8), st.integers(1, 4), st.booleans(), st.integers(0, 3))
def test_no_item_is_lost_and_ranks_agree_in_number(sizes, batch_size, world, shuffle, epoch):
    ranks = []
    for rank in range(world):
        sampler = LengthBucketSampler(sizes, batch_size=batch_size, shuffle=shuffle, rank=rank, world_size=world)
        sampler.set_epoch(epoch)
        ranks.append([b.tolist() for b in sampler])
    assert len({len(batches) for batches in ranks}) == 1
    seen = [i for batches in ranks for b in batches for i in b]
    assert set(seen) == set(range(len(sizes)))
    assert all(1 <= len(b) <= batch_size for batches in ranks for b in batches)
    assert len(seen) - len(sizes) < world
    if world == 1:
        assert len(seen) == len(sizes)


@settings(max_examples=80, deadline=None)
@given(lengths, st.integers(1, 120), st.integers(1, 3))
def test_token_limit_holds(sizes, limit, world):
    for rank in range(world):
        for batch in LengthBucketSampler(sizes, max_tokens=limit, rank=rank, world_size=world):
            longest = max(sizes[i] for i in batch)
            assert len(batch) == 1 or len(batch) * longest <= limit


@settings(max_examples=40, deadline=None)
@given(lengths, st.integers(1, 6), st.integers(2, 3))
def test_ranks_together_see_the_batches_of_one(sizes, batch_size, world):
    if len(sizes) % (batch_size * world):
        sizes = sizes * (batch_size * world)
    one = LengthBucketSampler(sizes, batch_size=batch_size * world, seed=3)
    many = [LengthBucketSampler(sizes, batch_size=batch_size, seed=3, rank=r, world_size=world) for r in range(world)]
    for whole, *parts in zip(one, *many, strict=True):
        assert sorted(whole) == sorted(i for part in parts for i in part)


def test_no_repeat_where_none_is_needed():
    seen = [i for r in range(2) for b in LengthBucketSampler([5] * 9, batch_size=2, rank=r, world_size=2) for i in b]
    assert sorted(seen) == list(range(9))


def test_epochs_differ_and_repeat_exactly():
    sampler = LengthBucketSampler(np.arange(100) % 7 + 1, batch_size=8)
    first = [b.tolist() for b in sampler]
    sampler.set_epoch(1)
    second = [b.tolist() for b in sampler]
    sampler.set_epoch(0)
    assert first != second
    assert first == [b.tolist() for b in sampler]


def test_similar_lengths_share_a_batch():
    rng = np.random.default_rng(0)
    sizes = rng.integers(10, 1000, 2000)
    padded = sum(len(b) * sizes[b].max() for b in LengthBucketSampler(sizes, batch_size=16))
    plain = sum(16 * sizes[i : i + 16].max() for i in range(0, 2000, 16))
    assert padded < 1.25 * sizes.sum() < plain


def test_unshuffled_items_keep_their_order():
    batches = list(LengthBucketSampler([3, 1, 2, 9], batch_size=3, shuffle=False))
    assert [b.tolist() for b in batches] == [[0, 1, 2], [3]]


def test_sampler_resumes_exactly():
    sampler = LengthBucketSampler(np.arange(40) + 1, batch_size=4, seed=2)
    sampler.set_epoch(5)
    batches = [b.tolist() for b in sampler]
    iterator = iter(sampler)
    for _ in range(3):
        next(iterator)
    other = LengthBucketSampler(np.arange(40) + 1, batch_size=4, seed=2)
    other.load_state_dict(sampler.state_dict())
    assert [b.tolist() for b in other] == batches[3:]
    assert [b.tolist() for b in other] == batches


@pytest.mark.parametrize("workers", [0, 1])
def test_loader_resumes_exactly(workers):
    def make():
        sampler = LengthBucketSampler(np.arange(20) + 1, batch_size=3)
        return BatchLoader(fetch, sampler, num_workers=workers)

    def fetch(indices, epoch):
        return {"index": torch.from_numpy(indices), "epoch": epoch}

    loader = make()
    loader.batch_sampler.set_epoch(2)
    batches = [b["index"].tolist() for b in loader]
    iterator = iter(loader)
    next(iterator)
    next(iterator)
    state = loader.state_dict()
    assert state == {"epoch": 2, "batch": 2}
    other = make()
    other.load_state_dict(state)
    rest = list(other)
    assert [b["index"].tolist() for b in rest] == batches[2:]
    assert rest[0]["epoch"] == 2
    assert len(list(other)) == len(batches)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"lengths": [1]}, ConfigError, "give batch_size or max_tokens, got neither"),
        ({"lengths": [1], "batch_size": 0}, ConfigError, "batch_size must be at least 1, got 0"),
        ({"lengths": [], "batch_size": 1}, DataError, "at least one item, got none; is a file empty"),
        ({"lengths": [1], "batch_size": 1, "rank": 2}, ConfigError, "rank must be from 0 to 0, got 2"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, text):
    with pytest.raises(error, match=text):
        LengthBucketSampler(**arguments)


def test_item_uniform_is_uniform_and_independent_of_order():
    draws = item_uniform(0, 0, np.arange(100_000))
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, 20, (0, 1))[0]
    assert abs(counts - 5000).max() < 5 * 5000**0.5
    assert item_uniform(0, 0, [7])[0] == draws[7]
    for other in (item_uniform(1, 0, np.arange(1000)), item_uniform(0, 1, np.arange(1000))):
        assert abs(np.corrcoef(other, draws[:1000])[0, 1]) < 0.15


@pytest.mark.parametrize("side", ["right", "left"])
def test_pad_batch(side):
    ids, mask = pad_batch([np.array([1, 2, 3]), np.array([4])], 9, side=side)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9] if side == "right" else [9, 9, 4]]
    assert mask.tolist() == (ids != 9).tolist()
    features, _ = pad_batch([torch.ones(2, 5), torch.ones(4, 5)], 0.0, side=side)
    assert features.shape == (2, 4, 5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=40))
def test_packing_is_first_fit_decreasing(sizes):
    rows = plan_packing(sizes, 30)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    naive: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        row = next((r for r in naive if sum(sizes[j] for j in r) + sizes[i] <= 30), None)
        if row is None:
            naive.append([i])
        else:
            row.append(i)
    assert rows == naive


def test_pack_and_its_padding_share():
    ids, segments = pack([np.array([1, 2]), np.array([3, 4, 5]), np.array([6])], 5, pad_value=0)
    assert ids.tolist() == [[3, 4, 5, 1, 2], [6, 0, 0, 0, 0]]
    assert segments.tolist() == [[0, 0, 0, 1, 1], [0, -1, -1, -1, -1]]
    assert padding_share(segments) == pytest.approx(0.4)
    assert padding_share(segments >= 0) == pytest.approx(0.4)


def test_too_long_for_packing():
    with pytest.raises(DataError, match=r"at most 4 positions, got 5 \(number 1\); cut it"):
        pack([np.ones(2, int), np.ones(5, int)], 4)
