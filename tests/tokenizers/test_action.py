"""What all tokenizers of actions share: orientations, their arguments, and how they are made by name."""

import math

import numpy as np
import pytest
import torch

from vertebra.errors import ConfigError, ShapeError, UnknownNameError
from vertebra.tokenizers.action import NONE, make_action_tokenizer, same_hemisphere, unwrap, wrap
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.binning import BinningTokenizer
from vertebra.tokenizers.bspline import BSplineTokenizer

ALL = ("bspline", "binning", "fast")


def made(text="bspline,num_basis=4,degree=2", **options):
    if text.startswith("fast"):
        pytest.importorskip("tokenizers", reason="FAST needs the extra action")
    return make_action_tokenizer(text, **{"horizon": 6, "dims": 5, **options})


def chunks(count=40, steps=6, dims=5, seed=0):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(count, steps, dims)).cumsum(1) / 3, dtype=torch.float32)


# ---------------------------------------------------------------- orientations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapped_angles_lie_in_a_turn(dtype):
    angles = torch.linspace(-30, 30, 601, dtype=dtype)
    found = wrap(angles)
    assert (found > -math.pi).all()
    assert (found <= torch.tensor(math.pi, dtype=dtype)).all()
    torch.testing.assert_close(found.sin(), angles.sin(), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.cos(), angles.cos(), atol=1e-5, rtol=0)
    ends = wrap(torch.tensor([math.pi, -math.pi, 3 * math.pi, 0.0], dtype=dtype))
    torch.testing.assert_close(ends, torch.tensor([math.pi, math.pi, math.pi, 0], dtype=dtype), atol=1e-6, rtol=0)


def test_unwrapped_angles_are_those_of_numpy():
    true = torch.tensor(np.random.default_rng(0).uniform(-2.5, 2.5, (7, 30, 3)).cumsum(1))
    found = unwrap(wrap(true))
    torch.testing.assert_close(found, torch.tensor(np.unwrap(wrap(true).numpy(), axis=1)))
    torch.testing.assert_close(found - found[:, :1], true - true[:, :1])
    torch.testing.assert_close(found[:, 0], wrap(true[:, 0]))
    still = torch.rand(2, 5, 1)
    assert torch.equal(unwrap(still), still)


def test_quaternions_are_put_on_one_side():
    turning = torch.randn(4, 1, 4) + 0.1 * torch.randn(4, 9, 4).cumsum(1)
    turning = turning / turning.norm(dim=-1, keepdim=True)
    flips = torch.where(torch.rand(4, 9, 1) < 0.5, -1.0, 1.0)
    found = same_hemisphere(turning * flips)
    assert ((found[:, 1:] * found[:, :-1]).sum(-1) > 0).all()
    assert torch.equal(found.abs(), turning.abs())
    assert (found[:, 0].gather(1, found[:, 0].abs().argmax(1, keepdim=True)) > 0).all()
    assert torch.equal(same_hemisphere(-turning * flips), found)
    assert torch.equal(same_hemisphere(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_smooth_leaves_other_columns_and_its_input_alone():
    tokenizer = made(dims=6, angles=[5], quaternions=[1])
    given = chunks(dims=6)
    given[:, :, 5] = wrap(4 * given[:, :, 5])
    kept = given.clone()
    found = tokenizer.smooth(given)
    assert torch.equal(given, kept)
    assert torch.equal(found[:, :, 0], given[:, :, 0])
    torch.testing.assert_close(found[:, :, 5:], unwrap(given[:, :, 5:]))
    assert torch.equal(found[:, :, 1:5], same_hemisphere(given[:, :, 1:5]))
    assert (found[:, :, 5] - given[:, :, 5]).abs().max() > 6
    back = tokenizer.restore(found)
    torch.testing.assert_close(back[:, :, 5], given[:, :, 5], atol=1e-5, rtol=0)
    torch.testing.assert_close(back[:, :, 1:5].norm(dim=-1), torch.ones(40, 6))
    assert torch.equal(back[:, :, 0], given[:, :, 0])
    plain = made(dims=6)
    assert plain.smooth(given) is given
    assert plain.restore(given) is given


@pytest.mark.parametrize("shape", [(4, 6), (4, 5, 5), (4, 6, 4), (1, 4, 6, 5)])
def test_chunks_of_another_shape_are_refused(shape):
    for text in ("bspline,num_basis=4,degree=2", "binning"):
        with pytest.raises(ShapeError, match=r"chunks must be \(B, 6, 5\), got \("):
            made(text).fit(torch.zeros(shape))


# ---------------------------------------------------------------- what all of them do


@pytest.mark.parametrize("text", ALL)
def test_a_tokenizer_learns_and_is_described(text):
    options = {"horizon": 10, "angles": [0], "grippers": [4]}
    fresh = made(text, **options)
    assert not fresh.is_fitted
    fitted = fresh.fit(wrap(chunks(steps=10)))
    assert fitted.is_fitted
    assert not fresh.is_fitted
    assert tokenizer_from_dict(fitted.to_dict()) == fitted
    assert hash(tokenizer_from_dict(fitted.to_dict())) == hash(fitted)
    assert fitted != fresh
    ids = fitted.encode(wrap(chunks(steps=10)))
    assert ids.dtype == torch.long
    assert fitted.is_valid(ids).all()
    assert fitted.decode(ids, steps=19).shape == (40, 19, 5)
    wrong = ids.clone()
    wrong[0, 0], wrong[1, 0], wrong[2, 0] = fitted.vocab_size, NONE, -2
    assert fitted.is_valid(wrong)[:4].tolist() == [False, False, False, True]
    assert fitted.clipped(wrap(chunks(steps=10))).shape == (5,)
    assert (fitted.clipped(wrap(chunks(steps=10))) < 0.1).all()


@pytest.mark.parametrize("text", ALL)
def test_each_id_stands_for_its_part_of_a_chunk(text):
    tokenizer = made(text, horizon=10).fit(chunks(steps=10))
    ids = tokenizer.encode(chunks(steps=10))
    sizes = tokenizer.sizes
    assert sizes.shape == (tokenizer.vocab_size,)
    assert sizes.dtype == torch.long
    total = torch.where(ids == NONE, 0, sizes[ids.clamp_min(0)]).sum(1)
    assert (total == tokenizer.length).all()


def test_continuous_tokens_are_ids_before_rounding():
    for text in ("bspline,num_basis=4,degree=2", "binning,vocab_size=11"):
        tokenizer = made(text).fit(chunks())
        units, ids = tokenizer.to_unit(chunks(seed=1)), tokenizer.encode(chunks(seed=1))
        assert (units >= 0).all()
        assert (units <= 1).all()
        assert torch.equal((units * (tokenizer.vocab_size - 1)).round().long(), ids)
        assert ids.shape == (40, tokenizer.length)
        assert tokenizer.length == tokenizer.groups * 5
        torch.testing.assert_close(tokenizer.encode_continuous(chunks(seed=1)), 2 * units - 1)
        torch.testing.assert_close(tokenizer.decode_continuous(2 * units - 1), tokenizer.from_unit(units))
        torch.testing.assert_close(tokenizer.decode(ids), tokenizer.from_unit(ids / (tokenizer.vocab_size - 1)))


@pytest.mark.parametrize("text", ["bspline,num_basis=4,degree=2", "binning"])
def test_tokens_are_in_order_of_time_then_of_dimension(text):
    tokenizer = made(text).fit(chunks())
    units = torch.full((1, tokenizer.length), 0.5)
    middle = tokenizer.from_unit(units)
    for group, dimension in ((0, 1), (tokenizer.groups - 1, 3)):
        changed = units.clone()
        changed[0, group * 5 + dimension] = 1.0
        moved = (tokenizer.from_unit(changed) - middle)[0].abs()
        assert moved.amax(0).nonzero().flatten().tolist() == [dimension]
        assert moved[:, dimension].argmax() == (0 if group == 0 else 5)


# ---------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"horizon": 0}, r"BinningTokenizer: horizon must be at least 1, got 0\."),
        ({"dims": 0}, r"BinningTokenizer: dims must be at least 1, got 0\."),
        ({"vocab_size": 1}, r"BinningTokenizer: vocab_size must be at least 2, got 1\."),
        ({"angles": [5]}, r"BinningTokenizer: angles \[5\] and quaternions \[\] \(four columns each\) must be"),
        ({"angles": [1], "quaternions": [1]}, r"must be different columns from 0 to 4\."),
        ({"quaternions": [2]}, r"must be different columns from 0 to 4\."),
        ({"angles": [1, 1]}, r"must be different columns from 0 to 4\."),
    ],
)
def test_impossible_arguments_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        BinningTokenizer(**{"horizon": 6, "dims": 5, **options})


def test_a_tokenizer_is_made_by_name():
    tokenizer = made("bspline, num_basis=5 ,degree=1,ridge=1e-3,initial=fit,velocity=true", grippers=[4], angles=(0,))
    assert tokenizer == BSplineTokenizer(
        6, 5, num_basis=5, degree=1, ridge=1e-3, initial="fit", velocity=True, grippers=[4], angles=[0]
    )
    assert made("binning,grippers=[1, 2],vocab_size=9", grippers=[4]).grippers == (1, 2)
    assert made("bspline,num_basis=5,ridge=0,grippers=[1,3],degree=2").grippers == (1, 3)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("bspline,", r"'' must be one of vocab_size, angles, .*, followed by = and a value\.$"),
        ("bspline,num_basis", r"'num_basis' must be one of "),
        ("bspline,knots=3", r"'knots=3' must be one of "),
        ("bspline,horizon=3", r"'horizon=3' must be one of "),
        ("binning,num_basis=3", r"'num_basis=3' must be one of vocab_size, angles, quaternions, grippers, low, high,"),
        ("bspline,num_basis=ten", r"num_basis must be a whole number, got 'ten'\.$"),
        ("bspline,num_basis=5.5", r"num_basis must be a whole number, got '5\.5'\.$"),
        ("bspline,num_basis=true", r"num_basis must be a whole number, got 'true'\.$"),
        ("bspline,ridge=little", r"ridge must be a number, got 'little'\.$"),
        ("bspline,velocity=1", r"velocity must be true or false, got '1'\.$"),
        ("bspline,initial=3", r"initial must be a word, got '3'\.$"),
        ("binning,grippers=4", r"grippers must be a list of numbers, got '4'\.$"),
    ],
)
def test_what_a_tokenizer_does_not_take_is_refused(text, rule):
    with pytest.raises(ConfigError, match=rf"^tokenizer '{text}': {rule}"):
        made(text)


def test_an_unknown_name_is_refused():
    with pytest.raises(UnknownNameError, match=r"action tokenizer 'spline'.*bspline"):
        made("spline,num_basis=3")
