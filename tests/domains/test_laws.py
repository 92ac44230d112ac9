import math

import numpy as np
import pytest

from vertebra.domains.laws import PF_DAY, PowerLaw, bootstrap, compute_of_step, envelope, fit_power_law, pf_days
from vertebra.errors import ConfigError, DataError

# https://arxiv.org/abs/2410.12360: trunk parameters, training points, and compute in PF-days of 100,000 steps
SIZES = [872, 7_032, 100_928, 302_656, 1_771_712, 4_747_264, 1.41e7, 3.78e7, 1.27e8, 3.02e8]
DATA = [1e7, 1e8, 1.03e9, 4.8e9, 1.57e10]
COMPUTE = [6 * n * 128 * 512 * 100_000 / 8.64e19 for n in SIZES]
PUBLISHED = [  # axis, (critical value, exponent)
    (SIZES, 3.7e16, 0.029),
    (SIZES, 1.4e31, 0.026),
    (SIZES, 6.7e36, 0.023),
    (SIZES, 2.0e34, 0.015),
    (SIZES, 2.9e47, 0.016),
    (SIZES, 1.5e48, 0.017),
    (COMPUTE, 1.5e7, 0.024),
    (COMPUTE, 3.9e26, 0.020),
    (COMPUTE, 2.8e29, 0.020),
    (COMPUTE, 6.0e23, 0.014),
    (COMPUTE, 1.9e33, 0.017),
    (COMPUTE, 1.4e47, 0.013),
    (DATA, 5.3e12, 0.094),
    (DATA, 9.6e30, 0.029),
    (DATA, 1.0e39, 0.023),
    (DATA, 9.9e13, 0.090),
    (DATA, 1.1e44, 0.019),
    (DATA, 4.4e31, 0.030),
]
# loss of 1K and of 300M read from the paper's figures, half of the last digit, and the published law over parameters
ROUGH = [
    (2.4, 1.7, 0.05, 3.7e16, 0.029),
    (5.2, 3.8, 0.05, 1.4e31, 0.026),
    (6.2, 4.65, 0.05, 6.7e36, 0.023),
    (2.9, 2.45, 0.05, 2.0e34, 0.015),
    (5.5, 4.45, 0.05, 2.9e47, 0.016),
    (5.6, 4.55, 0.05, 1.5e48, 0.017),
]


@pytest.mark.parametrize(("axis", "critical", "exponent"), PUBLISHED)
def test_the_published_points_give_the_published_laws(axis, critical, exponent):
    losses = [math.exp(exponent * (math.log(critical) - math.log(a))) for a in axis]
    law = fit_power_law(axis, losses)
    assert f"{law.exponent:.3f}" == f"{exponent:.3f}"
    assert f"{law.critical:.1e}" == f"{critical:.1e}"
    assert law.r2 == pytest.approx(1)
    assert law(axis) == pytest.approx(losses)


@pytest.mark.parametrize(("first", "last", "half", "critical", "exponent"), ROUGH)
def test_published_losses_give_the_published_exponent_up_to_their_rounding(first, last, half, critical, exponent):
    ends = SIZES[0], SIZES[-1]
    lowest = fit_power_law(ends, [first - half, last + half]).exponent
    highest = fit_power_law(ends, [first + half, last - half]).exponent
    assert lowest - 0.0005 <= exponent <= highest + 0.0005
    assert highest - lowest < 0.01, "the tolerance must tell a law from none"
    # and the published pair gives the losses: an exponent rounded at the third digit moves them by a few percent, and
    # runs lie off their law by some
    law = PowerLaw(exponent, exponent * math.log10(critical), 1.0)
    for n, loss in zip(ends, (first, last), strict=True):
        assert law(n) == pytest.approx(loss, rel=math.exp(0.0005 * math.log(critical / n)) - 1 + half / loss + 0.01)


def test_noise_is_averaged_and_intervals_hold_the_truth():
    rng = np.random.default_rng(1)
    held, exponent, critical = {"exponent": 0, "critical": 0}, 0.08, 1e14
    sizes = np.repeat(np.logspace(3, 9, 12), 3)  # three seeds each
    for trial in range(20):
        losses = (critical / sizes) ** exponent * 10 ** rng.normal(0, 0.02, len(sizes))
        law = fit_power_law(sizes, losses)
        assert law.exponent == pytest.approx(exponent, rel=0.1)
        assert law.points == 36
        spread = bootstrap(sizes, losses, draws=300, seed=trial)
        held["exponent"] += spread.exponent[0] <= exponent <= spread.exponent[1]
        held["critical"] += spread.critical[0] <= critical <= spread.critical[1]
        assert spread.exponent[1] - spread.exponent[0] < 0.02
        low, high = spread.band(sizes)
        assert (low <= law(sizes)).all()
        assert (law(sizes) <= high).all()
    assert held["exponent"] >= 16
    assert held["critical"] >= 16


def test_same_seed_same_draws_and_level_widens():
    x, loss = [1e3, 1e4, 1e5, 1e6], [4.0, 3.1, 2.6, 2.0]
    assert bootstrap(x, loss, 50).exponent == bootstrap(x, loss, 50).exponent
    assert bootstrap(x, loss, 50, seed=1).exponent != bootstrap(x, loss, 50).exponent
    narrow, wide = bootstrap(x, loss, level=0.5).exponent, bootstrap(x, loss, level=0.99).exponent
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_draws_that_rise_leave_the_critical_value_open():
    spread = bootstrap([1e3, 1e4, 1e5, 1e6], [2.0, 2.1, 1.9, 2.05], draws=200)
    assert spread.exponent[0] < 0 < spread.exponent[1]
    assert spread.critical[1] == math.inf
    assert not math.isnan(spread.critical[0])


def test_weights_count():
    x, loss = [1e3, 1e4, 1e5, 1e6], [8.0, 4.0, 2.0, 7.0]
    law = fit_power_law(x, loss, weights=[1, 1, 1, 0])
    assert law.exponent == pytest.approx(math.log10(2))
    assert law.r2 == pytest.approx(1)
    doubled = fit_power_law([*x, 1e3], [*loss, 8.0])
    assert fit_power_law(x, loss, weights=[2, 1, 1, 1]).exponent == pytest.approx(doubled.exponent)


def test_a_critical_value_beyond_floats_is_inf_and_the_law_still_answers():
    law = fit_power_law([1e3, 1e6], [3.0, 3.0 * 10**-0.003])
    assert law.critical == math.inf
    assert law(1e3) == pytest.approx(3.0)


# ---------------------------------------------------------------- a floor


@pytest.mark.parametrize(("exponent", "floor"), [(0.3, 1.5), (0.15, 0.4), (0.5, 3.0)])
def test_a_floor_is_found(exponent, floor):
    x = np.logspace(3, 9, 10)
    law = fit_power_law(x, (1e5 / x) ** exponent + floor, offset=True)
    assert law.exponent == pytest.approx(exponent, rel=1e-3)
    assert law.floor == pytest.approx(floor, rel=1e-3)
    assert law.critical == pytest.approx(1e5, rel=1e-2)
    noisy = (1e5 / x) ** exponent + floor
    noisy *= 10 ** np.random.default_rng(0).normal(0, 0.003, len(x))
    assert fit_power_law(x, noisy, offset=True).floor == pytest.approx(floor, rel=0.15)


def test_no_floor_is_said():
    x = np.logspace(3, 9, 8)
    with pytest.raises(DataError, match="the points show no floor above 0"):
        fit_power_law(x, (1e12 / x) ** 0.1, offset=True)


def test_a_floor_that_cannot_be_told_is_said():
    x = np.logspace(3, 4, 6)
    losses = ((1e5 / x) ** 0.05 + 0.5) * 10 ** np.random.default_rng(3).normal(0, 0.02, 6)
    with pytest.raises(DataError, match="the points do not tell a floor"):
        fit_power_law(x, losses, offset=True)


def test_few_points_for_a_floor():
    with pytest.raises(DataError, match="at least four different x, got 3"):
        fit_power_law([1, 2, 4], [3, 2, 1], offset=True)


# ---------------------------------------------------------------- bad input


def test_negative_losses_are_refused_with_advice():
    with pytest.raises(ConfigError, match=r"above 0, got -0\.3 .*positive, such as crps, or shift the loss: --shift"):
        fit_power_law([1, 10, 100], [0.5, 0.1, -0.3])
    with pytest.raises(ConfigError, match="above 0, got nan"):
        fit_power_law([1, 10, 100], [0.5, 0.1, math.nan])


@pytest.mark.parametrize(
    ("x", "loss", "error", "text"),
    [
        ([1, 10], [1.0], ConfigError, "lists of one length"),
        ([0, 10], [2.0, 1.0], ConfigError, "every x must be above 0, got 0"),
        ([5, 5], [2.0, 1.0], DataError, "at least two different x, got 1"),
        ([], [], DataError, "at least two different x, got 0"),
        ([1, 10, 100], [1.0, 2.0, 3.0], DataError, r"must fall with x, got a slope of \+0\.\d+ over 3 points"),
    ],
)
def test_what_cannot_be_fitted(x, loss, error, text):
    with pytest.raises(error, match=text):
        fit_power_law(x, loss)


def test_bootstrap_refuses():
    with pytest.raises(DataError, match="three different x, got 2"):
        bootstrap([1, 10], [2, 1])
    with pytest.raises(ConfigError, match=r"level between 0 and 1, got 10 and 95"):
        bootstrap([1, 2, 3], [3, 2, 1], draws=10, level=95)
    with pytest.raises(ConfigError, match="weights must be 0 or more"):
        fit_power_law([1, 2], [2, 1], weights=[1, -1])


# ---------------------------------------------------------------- envelope and compute


def test_envelope_takes_the_lowest_of_each_bin():
    compute = [1.0, 1.02, 10.0, 100.0, 101.0, 1e3]
    where, lowest = envelope(compute, [5.0, 4.0, 3.0, 3.5, 3.2, 2.0])
    assert where == pytest.approx([1, 10, 100, 1000])
    assert lowest == pytest.approx([4, 3, 3.2, 2])
    where, lowest = envelope(compute, [5.0, 4.0, 3.0, 3.5, 3.2, 2.0], monotone=True)
    assert where == pytest.approx([1, 10, 1000])
    assert lowest == pytest.approx([4, 3, 2])
    assert len(envelope([1.0, 1.5], [2.0, 1.0], decimals=0)[0]) == 1


def test_envelope_of_runs_has_the_law_of_their_best():
    sizes = np.logspace(3, 7, 9)
    steps = np.logspace(1, 4, 30)
    compute = np.concatenate([compute_of_step(n, 1000) * steps for n in sizes])
    best = (1e20 / compute) ** 0.05
    worse = best * (1 + np.abs(np.random.default_rng(0).normal(0, 0.05, len(best))))
    worse[::3] = best[::3]
    assert fit_power_law(*envelope(compute, worse)).exponent == pytest.approx(0.05, rel=0.05)


def test_compute():
    assert compute_of_step(100_928, 128 * 512) == 6 * 100_928 * 65_536
    assert pf_days(PF_DAY) == 1
    assert PF_DAY == 1e15 * 24 * 3600
