import copy
import json
import math
import pickle
import sys
from itertools import pairwise

import pytest
import scipy.fft
import torch

from vertebra.errors import ConfigError, DataError, MissingExtraError, ShapeError
from vertebra.tokenizers.action import NONE, make_action_tokenizer, wrap
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.fast import FASTTokenizer, cosine_basis

pytest.importorskip("tokenizers.trainers", reason="needs the extra `action` (tokenizers)")

TIMES = torch.linspace(0, 1, 20)
# The sheet's chunk, and what the original makes of it.
GOLDEN = torch.stack([(2 * math.pi * TIMES).sin(), TIMES**2, torch.where(TIMES > 0.5, 1.0, -1.0)], dim=-1)[None]
GOLDEN_ROWS = [[0, 15, 0], [24, -13, -40], [0, 4, 0], [-18, -1, 14], [0, 1, 0], [-4, -1, -8]]
GOLDEN_ERRORS = [3.37e-4, 6.62e-4, 3.85e-4]


def chunks(batch=200, steps=16, dims=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phase, size = torch.rand(2, batch, 1, dims, generator=generator)
    return (0.2 + size) * torch.sin(5 * torch.linspace(0, 1, steps)[:, None] + 6 * phase)


FITTED = FASTTokenizer(horizon=16, dims=3, vocab_size=400).fit(chunks())


@pytest.fixture(scope="module")
def unit():
    """Fitted so that actions are taken as they are."""
    ends = torch.ones_like(GOLDEN)
    return FASTTokenizer(horizon=20, dims=3, grippers=(0, 1, 2)).fit(torch.cat([GOLDEN, ends, -ends]))


def test_golden_coefficients(unit):
    assert (unit.low, unit.high) == ((-1, -1, -1), (1, 1, 1))
    found = unit.coefficients(GOLDEN)[0]
    assert found[:6].tolist() == GOLDEN_ROWS
    assert (int((found != 0).sum()), int(found.min()), int(found.max())) == (22, -40, 24)


def test_golden_error_through_the_ids(unit):
    ids = unit.encode(GOLDEN)
    errors = ((unit.decode(ids) - GOLDEN) ** 2).mean((0, 1))
    assert errors.tolist() == pytest.approx(GOLDEN_ERRORS, rel=2e-3)
    assert ids.shape[1] < 60


def test_sizes_of_ids_sum_to_the_chunk():
    ids = FITTED.encode(chunks(20, seed=1))
    sizes = FITTED.sizes
    assert sizes.shape == (400,)
    assert int(sizes.max()) > 1
    assert (sizes[ids.clamp_min(0)] * (ids >= 0)).sum(1).tolist() == [48] * 20
    few = FASTTokenizer(horizon=16, dims=3, vocab_size=400).fit(torch.zeros(4, 16, 3))
    assert few.sizes[-1] == 0
    with pytest.raises(ConfigError, match=r"^FASTTokenizer: there are no merges yet; use what fit"):
        _ = FASTTokenizer(horizon=16, dims=3).sizes


def test_coefficients_are_those_of_scipy():
    values = chunks()
    middle = (torch.tensor(FITTED.low) + torch.tensor(FITTED.high)) / 2
    half = (torch.tensor(FITTED.high) - torch.tensor(FITTED.low)) / 2
    expected = scipy.fft.dct(((values - middle) / half).double().numpy(), axis=1, norm="ortho")
    # A sum that is nearly half-way may round either way in another precision.
    torch.testing.assert_close(FITTED.coefficients(values).double(), torch.tensor(10 * expected), atol=0.5001, rtol=0)


@pytest.mark.parametrize("horizon", [1, 2, 7, 20])
def test_basis_is_the_inverse_transform_and_orthonormal(horizon):
    basis = torch.tensor(cosine_basis(horizon, horizon))
    identity = torch.eye(horizon, dtype=torch.float64)
    torch.testing.assert_close(basis, torch.tensor(scipy.fft.idct(identity.numpy(), axis=0, norm="ortho")))
    torch.testing.assert_close(basis.mT @ basis, identity)
    finer = torch.tensor(cosine_basis(horizon, 3 * (horizon - 1) + 1))
    torch.testing.assert_close(finer[::3], basis)


def test_round_trip_error_is_that_of_rounding():
    values = chunks()
    half = (torch.tensor(FITTED.high) - torch.tensor(FITTED.low)) / 2
    error = (FITTED.decode(FITTED.encode(values)) - values) / half
    # Rounding to 1/10 has a variance of 1/1200, and the transform keeps it.
    assert 0.2 / 1200 < (error**2).mean() < 1.2 / 1200
    finer = FASTTokenizer(horizon=16, dims=3, scale=100, vocab_size=2000).fit(values)
    assert ((finer.decode(finer.encode(values)) - values) ** 2).mean() < (error * half).square().mean() / 30


def test_merges_save_tokens_on_chunks_not_seen():
    ids = FITTED.encode(chunks(seed=1))
    counts = (ids != NONE).sum(1).float()
    assert counts.mean() < FITTED.length / 2
    assert ids.shape[1] == counts.max() <= FITTED.length
    assert FITTED.longest == FITTED.encode(chunks()).shape[1]
    assert ids[ids != NONE].min() >= 0
    assert ids.max() < FITTED.vocab_size
    # Some of them stand for many coefficients.
    assert int(counts.min()) < int(counts.max())


def test_shorter_chunks_end_in_none_and_batch_equals_rows():
    values = chunks(seed=2)[:30]
    ids = FITTED.encode(values)
    rows = [FITTED.encode(row[None])[0] for row in values]
    assert ids.dtype == torch.int64
    assert len({len(row) for row in rows}) > 1
    for padded, row in zip(ids, rows, strict=True):
        assert padded[: len(row)].tolist() == row.tolist()
        assert (padded[len(row) :] == NONE).all()
    alone = torch.cat([FITTED.decode(row[None]) for row in rows])
    torch.testing.assert_close(FITTED.decode(ids), alone)
    more = torch.nn.functional.pad(ids, (0, 5), value=NONE)
    torch.testing.assert_close(FITTED.decode(more), alone)
    assert FITTED.encode(values[:0]).shape == (0, 0)
    assert FITTED.decode(ids[:0]).shape == (0, 16, 3)


def test_rows_that_stand_for_no_chunk_are_named():
    ids = FITTED.encode(chunks(seed=1)[:7])
    ids = torch.nn.functional.pad(ids, (0, 1), value=NONE)
    width = (ids != NONE).sum(1)
    ids[1, width[1] - 1] = NONE  # a coefficient too few
    ids[2, width[2]] = ids[2, 0]  # too many
    ids[3, 0] = 400  # beyond the vocabulary
    ids[4] = NONE
    ids[5, 1:] = ids[5, :-1].clone()
    ids[5, 0] = NONE  # a gap
    assert FITTED.is_valid(ids).tolist() == [True, False, False, False, False, False, True]
    with pytest.raises(DataError, match=r"rows 1, 2, 3, 4, 5 of ids do not stand for 16 x 3 .* ask is_valid first"):
        FITTED.decode(ids)
    assert FITTED.decode(ids[FITTED.is_valid(ids)]).shape == (2, 16, 3)
    ids[0, 0] = -2
    assert not FITTED.is_valid(ids)[0]
    with pytest.raises(DataError, match=r"rows 0, 1, .*, 9 \.\.\. of ids"):
        FITTED.decode(torch.zeros(20, 2).long())


def test_ids_that_no_merge_made_are_not_valid():
    few = FASTTokenizer(horizon=2, dims=1).fit(torch.tensor([[[0.0], [1.0]]]))
    ids = few.encode(torch.tensor([[[0.0], [1.0]]]))
    assert few.is_valid(ids).tolist() == [True]
    assert few.is_valid(torch.tensor([[1023, 1022]])).tolist() == [False]


def test_json_round_trip_gives_the_same_ids():
    again = tokenizer_from_dict(json.loads(json.dumps(FITTED.to_dict())))
    values = chunks(seed=3)
    assert again == FITTED
    assert again.longest == FITTED.longest
    for other in (again, copy.deepcopy(FITTED), pickle.loads(pickle.dumps(FITTED))):
        assert torch.equal(other.encode(values), FITTED.encode(values))
        assert torch.equal(other.decode(other.encode(values)), FITTED.decode(FITTED.encode(values)))


def test_fit_is_deterministic_and_leaves_the_old_one_alone():
    fresh = FASTTokenizer(horizon=16, dims=3, vocab_size=400)
    assert fresh.fit(chunks()).to_dict() == FITTED.to_dict()
    assert not fresh.is_fitted
    assert fresh.fit(chunks(seed=1)) != FITTED


def test_merges_are_applied_in_their_order():
    model = json.loads(FITTED.model)
    pieces = [(i,) for i in range(model["alphabet"])]
    for a, b in model["merges"]:
        if (made := pieces[a] + pieces[b]) not in pieces:
            pieces.append(made)
    assert len(pieces) == FITTED.vocab_size
    values = chunks(seed=4)[:5]
    found = FITTED.coefficients(values).clamp(FITTED.minimum, FITTED.minimum + model["alphabet"] - 1)
    for row, expected in zip(FITTED.encode(values).tolist(), found, strict=True):
        spelled = [i + FITTED.minimum for token in row if token != NONE for i in pieces[token]]
        assert spelled == expected.flatten().tolist()
        # The slow way: of all neighbours that can be merged, the earliest merge first.
        tokens = [i - FITTED.minimum for i in spelled]
        order = {tuple(pair): n for n, pair in enumerate(model["merges"])}
        while True:
            ranked = [(order[pair], at) for at, pair in enumerate(pairwise(tokens)) if pair in order]
            if not ranked:
                break
            _, at = min(ranked)
            tokens[at : at + 2] = [pieces.index(pieces[tokens[at]] + pieces[tokens[at + 1]])]
        assert tokens == [token for token in row if token != NONE]


def test_coefficients_beyond_those_seen_are_cut_off_and_counted():
    values = chunks(seed=1)
    assert FITTED.clipped(chunks()).tolist() == [0, 0, 0]
    values[:, :, 1] += 30
    clipped = FITTED.clipped(values)
    assert clipped.tolist() == pytest.approx([0, 1 / 16, 0], abs=0.01)
    made = FITTED.decode(FITTED.encode(values))
    assert (made[:, :, 1] < 10).all()
    assert (made[:, :, 0] - values[:, :, 0]).abs().max() < 0.3


def test_numbers_beyond_all_measure_are_cut_off_on_their_side():
    values = torch.full((1, 16, 3), 1e30)
    assert FITTED.coefficients(values).max() == 2**53
    assert (FITTED.decode(FITTED.encode(values)).mean(1) > 0.5).all()
    assert (FITTED.decode(FITTED.encode(-values)).mean(1) < -0.5).all()


def test_two_merges_may_make_one_token():
    facts = {"low": [-1], "high": [1], "minimum": 0, "longest": 5}
    model = '{"alphabet": 2, "merges": [[0, 0], [2, 0], [0, 2], [1, 1]]}'
    tokenizer = FASTTokenizer(horizon=5, dims=1, model=model, **facts)
    assert tokenizer.is_valid(torch.tensor([[3, 4], [3, 2]])).tolist() == [True, True]  # 000 11, 000 00
    assert tokenizer.is_valid(torch.tensor([[3, 3], [4, 5]])).tolist() == [False, False]


def test_a_dimension_that_never_moves_comes_back_exactly():
    values = chunks()
    values[:, :, 1] = 0.3
    tokenizer = FASTTokenizer(horizon=16, dims=3).fit(values)
    assert (tokenizer.coefficients(values)[:, :, 1] == 0).all()
    assert (tokenizer.decode(tokenizer.encode(values))[:, :, 1] == values[:, :, 1]).all()


def test_what_hardly_ever_moves_and_grippers_keep_their_range():
    values = chunks()
    values[:, :, 2] = 0
    values[3, 8:, 2] = 50
    assert FASTTokenizer(horizon=16, dims=3).fit(values).high[2] == 50
    values = chunks()
    assert FASTTokenizer(horizon=16, dims=3, grippers=[0]).fit(values).low[0] == float(values[:, :, 0].min())
    assert FITTED.low[0] > float(values[:, :, 0].min())
    assert FASTTokenizer(horizon=16, dims=3).fit(values, quantiles=(0, 1)).low[1] == float(values[:, :, 1].min())


def test_other_steps_read_the_same_curve():
    ids = FITTED.encode(chunks(seed=1)[:4])
    made = FITTED.decode(ids)
    torch.testing.assert_close(FITTED.decode(ids, steps=31)[:, ::2], made)
    torch.testing.assert_close(FITTED.decode(ids, steps=1), made[:, :1])
    finer = FITTED.decode(ids, steps=61)
    assert (finer[:, 1:] - finer[:, :-1]).abs().max() < (made[:, 1:] - made[:, :-1]).abs().max() / 2


def test_angles_that_jump_take_the_short_way():
    starts = torch.linspace(-3, 3, 60)[:, None, None]
    turning = wrap(starts + torch.linspace(0, 2, 16)[None, :, None])
    angular = FASTTokenizer(horizon=16, dims=1, angles=[0]).fit(turning)
    plain = FASTTokenizer(horizon=16, dims=1).fit(turning)
    made = angular.decode(angular.encode(turning))
    assert (made > -math.pi).all()
    assert (made <= math.pi).all()
    assert wrap(made - turning).abs().max() < 0.3
    counts = [(t.encode(turning) != NONE).sum() for t in (angular, plain)]
    assert counts[0] < counts[1] / 1.2
    start = torch.full((60, 1), 3.1)
    assert torch.equal(angular.encode(turning, start), angular.encode(turning))


def test_quaternions_come_back_with_norm_1_whatever_their_sign():
    angle = torch.linspace(0, 1, 16)
    turning = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], dim=-1)[None]
    flipped = turning.clone()
    flipped[:, 5:] *= -1
    tokenizer = FASTTokenizer(horizon=16, dims=4, quaternions=[0]).fit(turning)
    assert torch.equal(tokenizer.encode(flipped), tokenizer.encode(turning))
    made = tokenizer.decode(tokenizer.encode(flipped))
    torch.testing.assert_close(made.norm(dim=-1), torch.ones(1, 16))
    assert (made - turning).abs().max() < 0.1


def test_the_factory_makes_it():
    tokenizer = make_action_tokenizer("fast,scale=20,vocab_size=2048", horizon=5, dims=7, grippers=(6,))
    assert isinstance(tokenizer, FASTTokenizer)
    assert (tokenizer.scale, tokenizer.vocab_size, tokenizer.grippers, tokenizer.length) == (20, 2048, (6,), 35)
    assert tokenizer.varies
    assert FASTTokenizer(horizon=5, dims=7).vocab_size == 1024


def test_errors_say_what_to_do():
    fresh = FASTTokenizer(horizon=16, dims=3)
    for call in (fresh.encode, fresh.coefficients, fresh.clipped):
        with pytest.raises(ConfigError, match=r"use what fit\(chunks\) returns"):
            call(chunks())
    for call in (fresh.decode, fresh.is_valid):
        with pytest.raises(ConfigError, match=r"use what fit\(chunks\) returns"):
            call(torch.zeros(1, 4).long())
    with pytest.raises(DataError, match="at least one chunk"):
        fresh.fit(chunks()[:0])
    with pytest.raises(DataError, match="NaN or infinite"):
        fresh.fit(chunks().log())
    with pytest.raises(DataError, match="NaN or infinite"):
        FITTED.encode(chunks().log())
    with pytest.raises(ConfigError, match="different numbers, and vocab_size is 30; lower scale"):
        FASTTokenizer(horizon=16, dims=3, vocab_size=30).fit(chunks())
    with pytest.raises(ShapeError, match=r"chunks must be \(B, 16, 3\)"):
        FITTED.encode(chunks(steps=11))
    with pytest.raises(ShapeError, match=r"ids must be \(B, L\), got \(4,\)"):
        FITTED.decode(torch.zeros(4).long())
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        FITTED.decode(FITTED.encode(chunks()), steps=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": 0}, "scale must be a number above 0, got 0"),
        ({"scale": math.nan}, "scale must be a number above 0"),
        ({"longest": None}, "must come together, from fit"),
        ({"grippers": (3,)}, "must be different columns"),
        ({"vocab_size": 399}, "model must be what fit wrote, of at most 399 tokens"),
        ({"model": "{}"}, "model must be what fit wrote"),
        ({"model": "no JSON"}, "model must be what fit wrote"),
        ({"model": '{"alphabet": 2, "merges": [[0, 2]]}'}, "model must be what fit wrote"),
        ({"model": '{"alphabet": 2, "merges": [[0, -1]]}'}, "model must be what fit wrote"),
        ({"model": '{"alphabet": 2, "merges": [0]}'}, "model must be what fit wrote"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        FITTED.replace(**changes)


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(MissingExtraError, match=r"FAST needs the package 'tokenizers'.*vertebra\[action\]"):
        FASTTokenizer(horizon=16, dims=3)
