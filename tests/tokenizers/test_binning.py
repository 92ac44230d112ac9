import json
import math

import pytest
import torch

from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.action import make_action_tokenizer, wrap
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.binning import BinningTokenizer, quantile_bounds


def chunks(batch=40, steps=12, dims=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    phase, size = torch.rand(2, batch, 1, dims, generator=generator)
    return (0.2 + size) * torch.sin(5 * torch.linspace(0, 1, steps)[:, None] + 6 * phase)


FITTED = BinningTokenizer(horizon=12, dims=3).fit(chunks())


def test_levels_and_layout_in_unit_bounds():
    tokenizer = BinningTokenizer(horizon=2, dims=2, low=(-1, -1), high=(1, 1))
    ids = tokenizer.encode(torch.tensor([[[-1.0, 1.0], [0.1, -0.25]]]))
    # (a + 1) / 2 * 255, by hand; time first, then dimension
    assert ids.tolist() == [[0, 255, 140, 96]]
    assert (tokenizer.groups, tokenizer.length) == (2, 4)
    assert ids.dtype == torch.int64
    assert tokenizer.decode(ids)[0, 1].tolist() == pytest.approx([140 / 255 * 2 - 1, 96 / 255 * 2 - 1])
    assert tokenizer.encode(torch.full((1, 2, 2), 7.0)).tolist() == [[255] * 4]


def test_bounds_are_quantiles_and_those_of_grippers_the_extremes():
    values = torch.arange(1000.0).view(100, 10, 1).expand(-1, -1, 2)
    tokenizer = BinningTokenizer(horizon=10, dims=2, grippers=[1]).fit(values)
    assert tokenizer.low == pytest.approx((9.99, 0))
    assert tokenizer.high == pytest.approx((989.01, 999))
    assert tokenizer.clipped(values).tolist() == pytest.approx([0.02, 0])
    assert tokenizer.fit(values, quantiles=(0, 1)).high == (999, 999)


def test_what_hardly_ever_moves_keeps_its_range():
    values = torch.zeros(50, 12, 1)
    values[7, 3] = 2
    assert quantile_bounds(values) == ((0,), (2,))
    tokenizer = BinningTokenizer(horizon=12, dims=1).fit(values)
    torch.testing.assert_close(tokenizer.decode(tokenizer.encode(values)), values)


def test_round_trip_is_within_half_a_level():
    values = chunks()
    tokenizer = BinningTokenizer(horizon=12, dims=3).fit(values, quantiles=(0, 1))
    step = (torch.tensor(tokenizer.high) - torch.tensor(tokenizer.low)) / 255
    error = (tokenizer.decode(tokenizer.encode(values)) - values).abs()
    assert (error <= 0.5001 * step).all()
    assert error.max() > 0.2 * step.min()
    ids = tokenizer.encode(values)
    assert torch.equal(tokenizer.encode(tokenizer.decode(ids)), ids)


def test_continuous_tokens_are_not_rounded():
    values = chunks()
    tokenizer = BinningTokenizer(horizon=12, dims=3).fit(values, quantiles=(0, 1))
    tokens = tokenizer.encode_continuous(values)
    assert tokens.shape == (40, 36)
    assert tokens.min() == -1
    assert tokens.max() == 1
    torch.testing.assert_close(tokenizer.decode_continuous(tokens), values, atol=1e-5, rtol=0)


def test_a_dimension_that_never_moves_comes_back_exactly():
    values = chunks()
    values[:, :, 1] = 0.3
    tokenizer = BinningTokenizer(horizon=12, dims=3).fit(values)
    ids = tokenizer.encode(values)
    assert (ids[:, 1::3] == 0).all()
    assert (tokenizer.decode(ids)[:, :, 1] == values[:, :, 1]).all()
    assert (tokenizer.decode(torch.full((2, 36), 200))[:, :, 1] == values[0, 0, 1]).all()


def test_batch_equals_its_rows():
    values = chunks()
    rows = torch.cat([FITTED.encode(row[None]) for row in values])
    assert torch.equal(FITTED.encode(values), rows)
    assert torch.equal(FITTED.decode(rows), torch.cat([FITTED.decode(row[None]) for row in rows]))


def test_json_round_trip_gives_the_same_ids():
    tokenizer = BinningTokenizer(horizon=12, dims=3, grippers=[2], vocab_size=100).fit(chunks())
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again == tokenizer
    assert hash(again) == hash(tokenizer)
    assert torch.equal(again.encode(chunks(seed=1)), tokenizer.encode(chunks(seed=1)))


def test_the_factory_gives_it_grippers():
    tokenizer = make_action_tokenizer("binning,vocab_size=64", horizon=5, dims=7, grippers=(6,))
    assert isinstance(tokenizer, BinningTokenizer)
    assert (tokenizer.vocab_size, tokenizer.grippers, tokenizer.length) == (64, (6,), 35)


def test_other_steps_are_interpolated_end_to_end():
    line = torch.linspace(0, 1, 5)[None, :, None].repeat(1, 1, 2)
    tokenizer = BinningTokenizer(horizon=5, dims=2, grippers=[1], low=(0, 0), high=(1, 1))
    tokens = tokenizer.to_unit(line)
    made = tokenizer.from_unit(tokens, steps=13)
    torch.testing.assert_close(made[0, :, 0], torch.linspace(0, 1, 13))
    assert (4 * made[0, :, 1]).tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]  # the nearest
    torch.testing.assert_close(tokenizer.from_unit(tokens, steps=5), line)
    assert tokenizer.from_unit(tokens, steps=1).tolist() == [[[0, 0]]]


@pytest.mark.parametrize("steps", [None, 7])
def test_from_unit_is_differentiable(steps):
    tokenizer = BinningTokenizer(horizon=4, dims=2, grippers=[1], low=(-1, 0), high=(1, 3))
    tokens = torch.rand(2, 8, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda t: tokenizer.from_unit(t, steps=steps), tokens)


def test_to_unit_is_differentiable():
    values = chunks().requires_grad_()
    FITTED.to_unit(values).sum().backward()
    inside = (values >= torch.tensor(FITTED.low)) & (values <= torch.tensor(FITTED.high))
    span = torch.tensor(FITTED.high) - torch.tensor(FITTED.low)
    torch.testing.assert_close(values.grad, inside / span)


def test_angles_that_jump_are_interpolated_the_short_way():
    turning = wrap(torch.linspace(2.5, 4, 12))[None, :, None]
    assert turning.min() < 0 < turning.max()
    tokenizer = BinningTokenizer(horizon=12, dims=1, angles=[0]).fit(turning, quantiles=(0, 1))
    made = tokenizer.decode(tokenizer.encode(turning), steps=23)
    assert (made > -math.pi).all()
    assert (made <= math.pi).all()
    assert wrap(made[0, :, 0] - torch.linspace(2.5, 4, 23)).abs().max() < 0.01
    plain = BinningTokenizer(horizon=12, dims=1).fit(turning, quantiles=(0, 1))
    assert wrap(plain.decode(plain.encode(turning), steps=23)[0, :, 0] - torch.linspace(2.5, 4, 23)).abs().max() > 1


def test_start_does_not_move_a_chunk_out_of_its_bounds():
    turning = torch.linspace(-3.0, -2, 12)[None, :, None]
    tokenizer = BinningTokenizer(horizon=12, dims=1, angles=[0]).fit(turning, quantiles=(0, 1))
    assert torch.equal(tokenizer.encode(turning, torch.tensor([[3.1]])), tokenizer.encode(turning))


def test_quaternions_come_back_with_norm_1_whatever_their_sign():
    angle = torch.linspace(0, 1, 12)
    turning = torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], dim=-1)[None]
    flipped = turning.clone()
    flipped[:, 5:] *= -1
    tokenizer = BinningTokenizer(horizon=12, dims=4, quaternions=[0]).fit(turning)
    assert torch.equal(tokenizer.encode(flipped), tokenizer.encode(turning))
    made = tokenizer.decode(tokenizer.encode(flipped), steps=30)
    torch.testing.assert_close(made.norm(dim=-1), torch.ones(1, 30))


def test_errors_say_what_to_do():
    fresh = BinningTokenizer(horizon=12, dims=3)
    assert not fresh.is_fitted
    for call in (fresh.encode, fresh.clipped):
        with pytest.raises(ConfigError, match=r"use what fit\(chunks\) returns"):
            call(chunks())
    with pytest.raises(ConfigError, match=r"use what fit\(chunks\) returns"):
        fresh.decode(torch.zeros(1, 36).long())
    with pytest.raises(DataError, match="at least one chunk"):
        fresh.fit(chunks()[:0])
    with pytest.raises(DataError, match="NaN or infinite"):
        fresh.fit(chunks().log())
    with pytest.raises(ConfigError, match="quantiles must be two numbers from 0 to 1"):
        fresh.fit(chunks(), quantiles=(1, 99))
    with pytest.raises(ShapeError, match=r"chunks must be \(B, 12, 3\)"):
        FITTED.encode(chunks(steps=11))
    with pytest.raises(ShapeError, match=r"tokens must be \(B, 36\), got \(2, 35\)"):
        FITTED.decode(torch.zeros(2, 35).long())
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        FITTED.decode(torch.zeros(1, 36).long(), steps=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"low": (0, 0, 0)}, "low and high must both have 3 numbers"),
        ({"low": (0, 0), "high": (1, 1)}, "low and high must both have 3 numbers"),
        ({"low": (0, 0, 2), "high": (1, 1, 1)}, "no bound in low may be above"),
        ({"low": (0, 0, math.nan), "high": (1, 1, 1)}, "no bound in low may be above"),
        ({"grippers": (3,)}, r"grippers \[3\] must be different columns from 0 to 2"),
        ({"grippers": (1, 1)}, "must be different columns"),
        ({"grippers": (1,), "angles": (1,)}, "neither angles nor quaternions"),
    ],
)
def test_impossible_settings(changes, message):
    with pytest.raises(ConfigError, match=message):
        BinningTokenizer(horizon=12, dims=3, **changes)
