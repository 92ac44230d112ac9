"""The B-spline tokenizer, against its published numbers and against a solve of the whole problem."""

import copy
import json
import math
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.reference import bspline as slow

from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.action import make_action_tokenizer
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.bspline import BSplineTokenizer, basis_matrix, clamped_knots, ridge_matrix

STEPS = torch.linspace(0, 1, 20)
GOLDEN = torch.stack([(2 * torch.pi * STEPS).sin(), STEPS**2, torch.where(STEPS > 0.5, 1.0, -1.0)], 1)[None]
POINTS = torch.tensor(
    [
        [-0.000014, 0.261555, 0.788040, 1.258553, 0.630228, -0.630228, -1.258554, -0.788038, -0.261555, 0.000014],
        [0, 0.000001, 0.009257, 0.050929, 0.162033, 0.328708, 0.550916, 0.759266, 0.916647, 0.999993],
        [-0.999995] * 5 + [0.999995] * 5,
    ]
)
IDS = [
    [127, 161, 228, 255, 208, 47, 0, 27, 94, 128],
    [127, 128, 129, 134, 148, 169, 198, 224, 244, 255],
    [0] * 5 + [255] * 5,
]


def golden_tokenizer(**changes):
    made = BSplineTokenizer(20, 3, grippers=[2])
    points = made.control_points(GOLDEN)[0]
    return made.replace(low=points.clamp(max=-1).tolist(), high=points.clamp(min=1).tolist(), **changes)


def smooth_chunks(count, steps=20, dims=3, seed=0, dtype=torch.float32):
    """Sums of three slow waves, around 0 and about 1 in size."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)[None, :, None, None]
    size, phase = rng.normal(size=(2, count, 1, dims, 3))
    waves = size * np.sin(2 * np.pi * (np.array([0.25, 0.5, 1]) * t + phase))
    return torch.tensor(waves.sum(-1) / 2, dtype=dtype)


# ---------------------------------------------------------------- splines


def test_knots_and_basis_are_the_published_ones():
    np.testing.assert_allclose(clamped_knots(10, 4), [0] * 5 + [1 / 6, 1 / 3, 1 / 2, 2 / 3, 5 / 6] + [1] * 5)
    row = basis_matrix(10, 4, [5 / 19])[0]
    np.testing.assert_allclose(row, [0, 0.003929, 0.214766, 0.541054, 0.235571, 0.004681, 0, 0, 0, 0], atol=1e-6)


@pytest.mark.parametrize("degree", range(6))
@pytest.mark.parametrize("extra", [1, 2, 5])
def test_basis_is_that_of_the_recursion(degree, extra):
    phases = np.linspace(0, 1, 23)
    matrix = basis_matrix(degree + extra, degree, phases)
    np.testing.assert_allclose(matrix, slow.basis(degree + extra, degree, phases.tolist()), atol=1e-12)
    np.testing.assert_allclose(matrix.sum(1), 1)
    assert matrix[0, 0] == matrix[-1, -1] == 1


def test_a_phase_on_a_knot_but_for_rounding_belongs_to_what_begins_there():
    phases = np.arange(11) * 0.1  # 0.30000000000000004 among them
    assert basis_matrix(10, 0, phases).argmax(1).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert basis_matrix(10, 0, [0.3, 0.7, 1 - 0.4]).argmax(1).tolist() == [3, 7, 6]


def test_splines_that_do_not_exist():
    with pytest.raises(ConfigError, match="at least degree \\+ 1 control points, got num_basis 4"):
        clamped_knots(4, 4)
    with pytest.raises(ConfigError, match="degree from 0 on"):
        clamped_knots(4, -1)
    for phase in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match="divide times by the last one"):
            basis_matrix(5, 2, [0, phase])


def test_ridge_matrix_takes_away_the_gradient_of_the_ridge_problem():
    basis, samples = basis_matrix(6, 3, np.linspace(0, 1, 15)), np.random.default_rng(0).normal(size=15)
    points = ridge_matrix(basis, 0.1) @ samples
    np.testing.assert_allclose(basis.T @ (basis @ points - samples) + 0.1 * points, 0, atol=1e-12)


# ---------------------------------------------------------------- golden vectors


def test_control_points_and_ids_are_the_published_ones():
    made = golden_tokenizer()
    torch.testing.assert_close(made.control_points(GOLDEN)[0].T, POINTS, atol=3e-6, rtol=0)
    ids = made.encode(GOLDEN)
    assert ids.dtype == torch.int64
    assert ids[0].view(10, 3).T.tolist() == IDS
    assert ids[0].tolist()[:12] == [127, 127, 0, 161, 128, 0, 228, 129, 0, 255, 134, 0]
    assert made.length == 30
    assert made.groups == 10


def test_errors_are_the_published_ones():
    made = golden_tokenizer()
    fit = (made.curve(made.control_points(GOLDEN)) - GOLDEN).square().mean(1)[0]
    assert fit[0].item() == pytest.approx(3.6e-8, rel=0.02)
    assert fit[1].item() == pytest.approx(1.2e-11, rel=0.1)
    whole = (made.decode(made.encode(GOLDEN)) - GOLDEN).square().mean(1)[0]
    assert whole[0].item() == pytest.approx(1.7e-6, rel=0.03)
    assert whole[1].item() == pytest.approx(2.8e-6, rel=0.03)
    assert (made.decode(made.encode(GOLDEN))[0, :, 2] - GOLDEN[0, :, 2]).abs().max() < 1e-6


# ---------------------------------------------------------------- against the whole problem


@pytest.mark.parametrize("degree", range(6))
@pytest.mark.parametrize(("count", "grippers"), [(6, ()), (9, (1,)), (17, (0, 3))])
def test_values_and_gradients_are_those_of_the_whole_problem(degree, count, grippers):
    made = BSplineTokenizer(17, 4, num_basis=count, degree=degree, grippers=grippers)
    x = smooth_chunks(3, 17, 4, dtype=torch.float64)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    points, expected = made.control_points(ours), slow.fit(theirs, count, degree, grippers)
    torch.testing.assert_close(points, expected, atol=1e-6, rtol=1e-6)
    samples = made.curve(points, steps=29)
    torch.testing.assert_close(samples, slow.curve(expected, degree, 29, grippers), atol=1e-6, rtol=1e-6)
    weights = torch.randn(samples.shape, dtype=torch.float64)
    (samples * weights).sum().backward()
    (slow.curve(expected, degree, 29, grippers) * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(made.control_points(x.float()), expected.detach().float(), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("initial", ["free", "overwrite", "fit"])
def test_gradients_pass_through_tokens(initial):
    made = BSplineTokenizer(9, 2, num_basis=5, degree=3, grippers=[1], initial=initial)
    x = smooth_chunks(2, 9, 2, dtype=torch.float64)
    made = made.fit(smooth_chunks(50, 9, 2), quantiles=(0, 1))
    start = None if initial == "free" else x[:, 0] + 0.1

    def there_and_back(chunks):
        return made.decode_continuous(made.encode_continuous(chunks, start), start=start)

    tokens = made.to_unit(x, start).requires_grad_()
    assert torch.autograd.gradcheck(lambda u: made.from_unit(u, start=start), tokens)
    assert ((tokens > 0) & (tokens < 1)).any()
    assert torch.autograd.gradcheck(there_and_back, x.requires_grad_())
    given = (x[:, 0] + 0.1).detach().requires_grad_()
    if initial != "free":
        assert torch.autograd.gradcheck(lambda s: made.from_unit(tokens.detach(), start=s), given)


# ---------------------------------------------------------------- grippers and rates


def test_a_gripper_in_the_middle_is_a_step_function_and_the_others_stay_smooth():
    x = smooth_chunks(30, 20, 3)
    x[:, :, 1] = torch.where(torch.arange(20) >= 8, 1.0, -1.0)
    made = BSplineTokenizer(20, 3, grippers=[1]).fit(x)
    back = made.decode(made.encode(x))
    assert (back[:, :, 1] - x[:, :, 1]).abs().max() < 1e-5
    fine = made.decode(made.encode(x), steps=191)  # as many samples between as ten a step
    assert set(fine[:, :, 1].sign().unique().tolist()) == {-1.0, 1.0}
    assert (fine[:, 1:, 1] != fine[:, :-1, 1]).sum(1).tolist() == [1] * 30
    assert (fine[:, 1:, 0] - fine[:, :-1, 0]).abs().max() < 0.12
    smooth = BSplineTokenizer(20, 3).fit(x)
    assert (smooth.decode(smooth.encode(x))[:, :, 1] - x[:, :, 1]).abs().max() > 0.2


def test_other_rates_meet_the_same_curve():
    x = smooth_chunks(8)
    made = BSplineTokenizer(20, 3).fit(x)
    ids = made.encode(x)
    whole, fine, rough = made.decode(ids), made.decode(ids, steps=39), made.decode(ids, steps=2)
    torch.testing.assert_close(fine[:, ::2], whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(rough, whole[:, [0, -1]])
    assert made.decode(ids, steps=1).shape == (8, 1, 3)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        made.decode(ids, steps=0)


@pytest.mark.parametrize(("steps", "count", "degree"), [(5, 5, 4), (12, 3, 2), (1, 1, 0), (7, 7, 6)])
def test_the_fewest_and_the_most_control_points(steps, count, degree):
    x = smooth_chunks(40, steps, 2)
    made = BSplineTokenizer(steps, 2, num_basis=count, degree=degree, vocab_size=1024).fit(x, quantiles=(0, 1))
    spline = made.curve(made.control_points(x))
    error, level = made.decode(made.encode(x)) - spline, (np.array(made.high) - made.low).max() / 1023
    assert error.abs().max() < 0.51 * level
    if count == steps:
        torch.testing.assert_close(spline, x, atol=3e-3, rtol=0)


# ---------------------------------------------------------------- beginnings


def test_overwriting_begins_at_start_and_leaves_ids_alone():
    x = smooth_chunks(6)
    x[:, :, 2] = torch.where(torch.arange(20) > 9, 1.0, 0.0)
    free = BSplineTokenizer(20, 3, grippers=[2]).fit(x)
    made = free.replace(initial="overwrite")
    start = x[:, 0] + torch.randn(6, 3)
    ids = made.encode(x, start)
    assert torch.equal(ids, free.encode(x))
    back = made.decode(ids, start=start)
    assert torch.equal(back[:, 0, :2], start[:, :2])
    assert torch.equal(back[:, :, 2], free.decode(ids)[:, :, 2])
    assert torch.equal(back[:, -5:], free.decode(ids)[:, -5:])
    assert torch.equal(made.decode(ids), free.decode(ids))
    assert torch.equal(free.decode(ids, start=start), free.decode(ids))


def test_fitting_the_rest_is_the_solution_for_the_rest():
    x = smooth_chunks(4, dtype=torch.float64)
    made = BSplineTokenizer(20, 3, num_basis=8, degree=3, grippers=[1], initial="fit")
    start = x[:, 0] + 0.2
    points, expected = made.control_points(x, start), slow.fit(x, 8, 3, (1,), start=start)
    torch.testing.assert_close(points[:, 1:], expected[:, 1:], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(points[:, 0, 1], expected[:, 0, 1], atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(made.curve(points, start=start), slow.curve(expected, 3, 20, (1,)), atol=1e-9, rtol=1e-9)
    assert torch.equal(made.control_points(x), made.control_points(x, x[:, 0]))


def test_fitting_the_rest_says_nothing_in_the_first_group():
    x = smooth_chunks(40)
    made = BSplineTokenizer(20, 3, grippers=[1], initial="fit").fit(x)
    start = x[:, 0] + 0.1
    ids = made.encode(x, start)
    assert (ids[:, [0, 2]] == 128).all()
    other = ids.clone()
    other[:, [0, 2]] = 3
    assert torch.equal(made.decode(other, start=start), made.decode(ids, start=start))
    back = made.decode(ids, start=start)
    assert torch.equal(back[:, 0, [0, 2]], start[:, [0, 2]])
    with pytest.raises(ConfigError, match="pass start to decode"):
        made.decode(ids)


def test_fitting_the_rest_is_nearer_than_overwriting():
    x = smooth_chunks(40)
    start = x[:, 0] + 0.1
    error = {}
    for initial in ("overwrite", "fit"):
        made = BSplineTokenizer(20, 3, initial=initial)
        error[initial] = (made.curve(made.control_points(x, start), start=start) - x)[:, 1:].square().mean()
    assert error["fit"] < 0.8 * error["overwrite"]


@pytest.mark.parametrize("initial", ["overwrite", "fit"])
def test_chunks_one_after_another_do_not_jump(initial):
    whole = smooth_chunks(1, 96, 3)[0] * 2
    x = torch.stack([whole[i : i + 20] for i in range(0, 95 - 19, 19)])
    made = BSplineTokenizer(20, 3, num_basis=6, vocab_size=16, initial=initial).fit(x, quantiles=(0, 1))
    free = BSplineTokenizer(20, 3, num_basis=6, vocab_size=16).fit(x, quantiles=(0, 1))
    loose = free.decode(free.encode(x))
    assert (loose[1:, 0] - loose[:-1, -1]).abs().max() > 0.02
    last = whole[None, 0]
    for chunk in x:
        back = made.decode(made.encode(chunk[None], last), start=last)
        assert torch.equal(back[:, 0], last)
        last = back[:, -1]


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("initial", ["overwrite", "fit"])
def test_chunks_begin_with_the_velocity_they_are_given(initial, degree):
    x = smooth_chunks(10, dtype=torch.float64)
    made = BSplineTokenizer(20, 3, num_basis=9, degree=degree, grippers=[1], initial=initial, velocity=True).fit(x)
    start = torch.stack([x[:, 0] + 0.1, torch.randn(10, 3, dtype=torch.float64)], 1)
    back = made.from_unit(made.to_unit(x, start), steps=19_001, start=start)  # 1,000 samples a step
    torch.testing.assert_close(back[:, 0, [0, 2]], start[:, 0, [0, 2]])
    velocity = (back[:, 1] - back[:, 0]) * 1000
    torch.testing.assert_close(velocity[:, [0, 2]], start[:, 1, [0, 2]], rtol=0, atol=0.02)
    assert (velocity[:, 1] == 0).all()
    if initial == "fit":
        assert (made.encode(x, start)[:, [0, 2, 3, 5]] == 128).all()
        own = torch.stack([x[:, 0], x[:, 1] - x[:, 0]], 1)
        assert torch.equal(made.encode(x), made.encode(x, own))


def test_fitting_the_rest_behind_a_velocity_leaves_the_least_error():
    x = smooth_chunks(5, dtype=torch.float64)
    made = BSplineTokenizer(20, 3, num_basis=8, ridge=0, initial="fit", velocity=True)
    start = torch.stack([x[:, 0], x[:, 1] - x[:, 0]], 1)
    points = made.control_points(x, start).requires_grad_()
    (made.curve(points, start=start) - x).square().sum().backward()
    torch.testing.assert_close(points.grad, torch.zeros_like(points), atol=1e-9, rtol=0)


# ---------------------------------------------------------------- bounds


def test_bounds_are_quantiles_and_the_whole_range_of_grippers():
    x = smooth_chunks(500, 20, 2)
    x[:, :, 1] = torch.rand(500, 1) / 2
    x[7, :, 1] = 1  # once in 500
    made = BSplineTokenizer(20, 2, grippers=[1]).fit(x)
    points = made.control_points(x).numpy()
    low, high = np.array(made.low), np.array(made.high)
    np.testing.assert_allclose(low[:, 0], np.quantile(points[:, :, 0], 0.01, axis=0), atol=1e-6)
    np.testing.assert_allclose(high[:, 0], np.quantile(points[:, :, 0], 0.99, axis=0), atol=1e-6)
    np.testing.assert_allclose(low[:, 1], x[:, 0, 1].min(), atol=1e-4)
    np.testing.assert_allclose(high[:, 1], 1, atol=1e-4)
    clipped = made.clipped(x)
    assert clipped.shape == (2,)
    assert clipped[0].item() == pytest.approx(0.02, abs=0.002)
    assert clipped[1].item() == 0
    assert made.to_unit(x).min() == 0
    assert made.to_unit(x).max() == 1
    whole = made.fit(x, quantiles=(0, 1))
    assert whole.clipped(x).tolist() == [0, 0]
    assert whole.encode(x).min() == 0
    assert whole.encode(x).max() == 255


def test_bounds_only_grow():
    x = smooth_chunks(100)
    made = BSplineTokenizer(20, 3).fit(x)
    grown = made.grow(x)
    assert made.grow(x * 0) == made
    assert (np.array(grown.low) <= made.low).all()
    assert (np.array(grown.high) >= made.high).all()
    assert (grown.clipped(x) == 0).all()
    assert (made.clipped(x) > 0).all()
    assert grown.grow(x) == grown
    assert made.grow(x, tolerance=100) == made
    assert grown.grow(3 * x).grow(x) == grown.grow(3 * x)


@pytest.mark.parametrize("vocab_size", [2, 255, 256])
@pytest.mark.parametrize("value", [0.0, -3.0, 1e4, 1e-7])
def test_what_never_moves_comes_back_as_it_was(value, vocab_size):
    x = smooth_chunks(30, 20, 3)
    x[:, :, 1:] = value
    made = BSplineTokenizer(20, 3, vocab_size=vocab_size, grippers=[2], ridge=0).fit(x)
    ids = made.encode(x)
    assert (ids.view(30, 10, 3)[:, :, 1:] == vocab_size // 2).all()
    torch.testing.assert_close(made.decode(ids)[:, :, 1:], x[:, :, 1:], rtol=3e-6, atol=1e-6)
    assert (np.array(made.high) - made.low > 1e-3).all()
    assert made.clipped(x)[1:].tolist() == [0, 0]


def test_what_moves_in_few_chunks_keeps_its_whole_range():
    x = torch.zeros(200, 20, 1)
    x[3] = 2
    made = BSplineTokenizer(20, 1).fit(x)
    assert (made.decode(made.encode(x)) - x).abs().max() < 1e-2


def test_bounds_need_data():
    made = BSplineTokenizer(20, 3)
    assert not made.is_fitted
    for call in (made.encode, made.to_unit, made.clipped, made.grow):
        with pytest.raises(ConfigError, match="no bounds yet; call fit"):
            call(GOLDEN)
    with pytest.raises(ConfigError, match="no bounds yet; call fit"):
        made.decode(torch.zeros(1, 30, dtype=torch.long))
    with pytest.raises(DataError, match="at least one chunk"):
        made.fit(GOLDEN[:0])
    with pytest.raises(DataError, match="must be finite numbers"):
        made.fit(torch.full((2, 20, 3), math.inf))
    with pytest.raises(ConfigError, match="quantiles must be two numbers"):
        made.fit(GOLDEN, quantiles=(0.9, 0.1))
    assert made.fit(GOLDEN).is_fitted


# ---------------------------------------------------------------- rotations


def turning_angles(count, steps=20):
    t = torch.linspace(0, 1, steps)
    begin, by = torch.rand(count, 1) * 6 - 3, torch.randn(count, 1) * 3
    return begin + by * t  # (B, T), beyond pi


@pytest.mark.parametrize("initial", ["free", "overwrite", "fit"])
def test_angles_that_wrap_come_back(initial):
    true = turning_angles(200)
    x = torch.stack([true.cos(), torch.atan2(true.sin(), true.cos())], 2)
    start = None if initial == "free" else x[:, 0]

    def error(**columns):
        made = BSplineTokenizer(20, 2, initial=initial, **columns).fit(x, quantiles=(0, 1))
        back = made.decode(made.encode(x, start), start=start)
        assert back[:, :, 1].abs().max() <= math.pi + 1e-5 or not columns
        off = back[:, :, 1] - true
        return torch.atan2(off.sin(), off.cos()).abs().max().item()

    assert error(angles=[1]) < 0.06
    assert error() > 0.5


@pytest.mark.parametrize("initial", ["overwrite", "fit"])
@pytest.mark.parametrize("begin", [3.0, 3.13, 3.15])
def test_a_start_on_the_other_side_of_pi_does_not_bend_the_curve(initial, begin):
    bounds = {"low": [[-5.0]] * 10, "high": [[5.0]] * 10}
    made = BSplineTokenizer(20, 1, vocab_size=1024, angles=[0], initial=initial, **bounds)
    true = begin + 0.6 * STEPS[None, :, None]
    x = torch.atan2(true.sin(), true.cos())
    for at in (begin, 3.135, -3.135, begin - 2 * math.pi):
        start = torch.tensor([[at]])
        back = made.decode(made.encode(x, start), start=start)
        first, off = back[0, 0, 0] - at, (back - true)[0, :, 0]
        assert torch.atan2(first.sin(), first.cos()).abs() < 1e-5
        off = torch.atan2(off.sin(), off.cos()).abs()
        assert off.max() < 0.3  # no start is farther away
        assert off[8:].max() < 0.02


def test_angles_mean_the_same_a_turn_further():
    x = turning_angles(30)[..., None]
    for initial in ("free", "fit"):
        made = BSplineTokenizer(20, 1, angles=[0], initial=initial).fit(x)
        assert (made.encode(x) - made.encode(x + 2 * torch.pi)).abs().max() <= 1  # ties may round either way
        assert (made.encode(x) - made.encode(x, x[:, 0] - 2 * torch.pi)).abs().max() <= 1


def quaternions(count, steps=20, flips=True):
    """Rotations about an axis that is drawn, and at every fifth step or so the other sign."""
    angle = turning_angles(count, steps)[..., None] / 2
    axis = torch.nn.functional.normalize(torch.randn(count, 1, 3), dim=-1)
    found = torch.cat([angle.cos(), angle.sin() * axis], 2)
    signs = torch.where(torch.rand(count, steps) < 0.2, -1.0, 1.0)
    return found * signs[..., None] if flips else found


@pytest.mark.parametrize("initial", ["free", "overwrite", "fit"])
def test_quaternions_that_change_sign_come_back(initial):
    x = torch.cat([torch.zeros(300, 20, 1), quaternions(300)], 2)
    start = None if initial == "free" else x[:, 0] * torch.where(torch.rand(300, 1) < 0.5, -1.0, 1.0)

    def error(**columns):
        made = BSplineTokenizer(20, 5, initial=initial, **columns).fit(x, quantiles=(0, 1))
        back = made.decode(made.encode(x, start), start=start)[..., 1:]
        back = torch.nn.functional.normalize(back, dim=-1)
        same = (back * x[..., 1:]).sum(-1).abs().clamp(max=1)
        return (2 * same.arccos()).max().item()

    assert error(quaternions=[1]) < 0.08
    assert error() > 1
    made = BSplineTokenizer(20, 5, quaternions=[1]).fit(x)
    norms = made.decode(made.encode(x))[..., 1:].norm(dim=-1)
    torch.testing.assert_close(norms, torch.ones_like(norms))


def test_a_velocity_turns_with_its_quaternion():
    x = quaternions(8, flips=False).double()
    made = BSplineTokenizer(20, 4, quaternions=[0], initial="fit", velocity=True).fit(x)
    start = torch.stack([x[:, 0], x[:, 1] - x[:, 0]], 1)
    assert torch.equal(made.encode(x, start), made.encode(x, -start))
    assert torch.equal(made.encode(x, start), made.encode(-x, start))
    ids = made.encode(x, start)
    assert torch.equal(made.decode(ids, start=start), made.decode(ids, start=-start))


# ---------------------------------------------------------------- as any tokenizer


@pytest.mark.parametrize("initial", ["free", "fit"])
def test_goes_through_json_as_it_is(initial):
    x = smooth_chunks(30)
    made = BSplineTokenizer(20, 3, num_basis=7, degree=3, grippers=[2], initial=initial, velocity=initial == "fit")
    for each in (made, made.fit(x)):
        again = tokenizer_from_dict(json.loads(json.dumps(each.to_dict())))
        assert again == each
        assert hash(again) == hash(each)
        assert again.low == each.low
    assert torch.equal(again.encode(x), made.fit(x).encode(x))
    assert np.array_equal(np.float32(again.low), again.low)  # nothing is lost in float32


def test_is_made_by_name_copied_and_sent():
    x = smooth_chunks(30)
    made = make_action_tokenizer("bspline,num_basis=6,degree=2", horizon=20, dims=3, grippers=[2]).fit(x)
    assert (made.num_basis, made.degree, made.grippers) == (6, 2, (2,))
    ids = made.encode(x)
    for again in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again == made
        assert torch.equal(again.encode(x), ids)


def test_tables_made_while_predicting_can_be_used_in_training():
    made = golden_tokenizer()
    with torch.inference_mode():
        ids = made.encode(GOLDEN)
        made.decode(ids)
    tokens = torch.rand(1, 30, requires_grad=True)
    made.from_unit(tokens).sum().backward()
    assert tokens.grad.abs().sum() > 0


def test_tables_made_while_tracing_are_not_kept(monkeypatch):
    made = golden_tokenizer()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    made.encode(GOLDEN)
    assert not made._tables_made
    monkeypatch.undo()
    made.encode(GOLDEN)
    assert len(made._tables_made) == 1


def test_autocast_and_half_precision_do_not_round_the_fit():
    made = golden_tokenizer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids = made.encode(GOLDEN)
        back = made.decode(ids)
    assert torch.equal(ids, made.encode(GOLDEN))
    assert torch.equal(back, made.decode(ids))
    assert made.decode_continuous(2 * made.to_unit(GOLDEN).bfloat16() - 1).dtype == torch.float32
    half = made.encode(GOLDEN.bfloat16())
    assert torch.equal(half, made.encode(GOLDEN.bfloat16().float()))


def test_a_batch_is_its_chunks():
    x = smooth_chunks(9)
    made = BSplineTokenizer(20, 3, grippers=[1]).fit(x)
    single = torch.cat([made.encode(chunk[None]) for chunk in x])
    assert (made.encode(x) - single).abs().max() <= 1
    assert (made.encode(x) != single).sum() <= 1  # ties may round either way
    assert made.encode(x[:0]).shape == (0, 30)
    assert made.decode(torch.zeros(0, 30, dtype=torch.long)).shape == (0, 20, 3)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.integers(10, 40),
    sizes=st.lists(st.floats(-3, 3), min_size=3, max_size=3),
    offset=st.floats(-100, 100),
    scale=st.floats(1e-2, 1e2),
)
def test_smooth_motion_comes_back_within_a_level(steps, sizes, offset, scale):
    t = torch.linspace(0, 1, steps)
    x = sum(size * (torch.pi * (i + 1) * t / 2).cos() for i, size in enumerate(sizes))
    x = (offset + scale * x)[None, :, None]
    low, high = [[offset - 10 * scale]] * 10, [[offset + 10 * scale]] * 10
    made = BSplineTokenizer(steps, 1, low=low, high=high)
    assert made.clipped(x).item() == 0
    level = 20 * scale / 255
    assert (made.decode(made.encode(x)) - x).abs().max() < 0.51 * level + 2e-3 * scale + 3e-5 * abs(offset)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"degree": 10}, "degree must be from 0 to num_basis - 1 = 9, got 10"),
        ({"degree": -1}, "degree must be from 0"),
        ({"num_basis": 21}, "num_basis must be at most the horizon of 20 steps, got 21"),
        ({"ridge": -1.0}, "ridge must be a number from 0 on"),
        ({"ridge": math.nan}, "ridge must be a number from 0 on"),
        ({"initial": "hold"}, "initial must be one of free, overwrite, fit, got 'hold'"),
        ({"velocity": True}, "velocity needs initial="),
        ({"velocity": True, "initial": "fit", "degree": 0}, "velocity needs a degree of at least 1"),
        ({"num_basis": 1, "degree": 0, "initial": "fit"}, "start sets 1 control points; num_basis must be more, got 1"),
        ({"grippers": [3]}, "different columns from 0 to 2"),
        ({"grippers": [1], "angles": [1]}, "neither angles nor quaternions"),
        ({"low": [[0.0] * 3] * 10}, "low and high must both be 10 rows of 3 numbers"),
        ({"low": [[0.0] * 3] * 10, "high": [[0.0] * 3] * 10}, "each high above its low; call fit to get them"),
        ({"low": [[0.0] * 2] * 10, "high": [[1.0] * 2] * 10}, "must both be 10 rows of 3 numbers"),
        ({"low": [[math.nan] * 3] * 10, "high": [[1.0] * 3] * 10}, "each high above its low"),
    ],
)
def test_arguments_that_contradict_each_other(changes, text):
    with pytest.raises(ConfigError, match=text):
        BSplineTokenizer(20, 3, **changes)


def test_shapes_that_do_not_fit():
    made = golden_tokenizer()
    with pytest.raises(ShapeError, match=r"chunks must be \(B, 20, 3\), got \(1, 19, 3\)"):
        made.encode(GOLDEN[:, 1:])
    with pytest.raises(ShapeError, match=r"tokens must be \(B, 30\), got \(1, 29\)"):
        made.decode(torch.zeros(1, 29, dtype=torch.long))
    fit = made.replace(initial="fit")
    with pytest.raises(ShapeError, match=r"start must be \(1, 3\), positions, got \(3,\)"):
        fit.encode(GOLDEN, torch.zeros(3))
    with pytest.raises(ShapeError, match=r"start must be \(1, 2, 3\), position and velocity, got \(1, 3\)"):
        fit.replace(velocity=True).decode(torch.zeros(1, 30, dtype=torch.long), start=torch.zeros(1, 3))
