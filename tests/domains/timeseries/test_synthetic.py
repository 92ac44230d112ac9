"""Fabricated series: the same whatever batch they are in, and what they promise to be."""

import numpy as np
import pytest

from vertebra.domains.timeseries import kernels, mechanisms, structure, synthetic
from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.errors import ConfigError, UnknownNameError

SEASONAL = ("additive", "multiplicative", "kernel", "arima", "regime", "bounded")


def draws(family, count, length=512):
    return [synthetic.draw(family, length, [7, i]) for i in range(count)]


def explained(values, period):
    """The share of the variance that the phase explains, of what is left of a running mean over a period."""
    smooth = np.convolve(values, np.ones(period) / period, "valid")
    rest = values[period // 2 : period // 2 + len(smooth)] - smooth
    phase = np.arange(len(rest)) % period
    means = np.bincount(phase, rest) / np.bincount(phase)
    return 1 - (rest - means[phase]).var() / rest.var()


def strongest(values):
    """The period, in steps, of the highest peak of the spectrum."""
    spectrum = np.abs(np.fft.rfft((values - values.mean()) * np.hanning(len(values)), 8 * len(values)))
    return 8 * len(values) / spectrum.argmax()


# ---------------------------------------------------------------- drawing


def test_families():
    known = synthetic.families()
    assert list(known) == [*synthetic.TRAINING, *synthetic.HELD_OUT]
    assert not set(synthetic.TRAINING) & set(synthetic.HELD_OUT)
    assert synthetic.TRAINING == ("additive", "multiplicative", "kernel", "arima", "regime", "bounded", "intermittent")
    for name, text in known.items():
        assert text.endswith("held out") == (name in synthetic.HELD_OUT)


def test_an_item_is_the_same_in_every_batch():
    values, season = synthetic.draw_batch(np.arange(60), 96, 3)
    order = np.array([41, 2, 2, 59])
    again, told = synthetic.draw_batch(order, 96, 3, synthetic.TRAINING)
    np.testing.assert_array_equal(again, values[order])
    np.testing.assert_array_equal(told, season[order])
    assert (values.shape, values.dtype) == ((60, 96), np.float32)
    assert (season.shape, season.dtype) == ((60,), np.int64)
    other, _ = synthetic.draw_batch(np.arange(60), 96, 4)
    assert (np.abs(other - values).max(1) > 0).all()
    assert synthetic.draw_batch(np.arange(0), 96, 3)[0].shape == (0, 96)


@pytest.mark.parametrize("family", synthetic.families())
def test_every_family_is_finite_and_the_same_again(family):
    for length in (8, 61, 512):
        for i in range(12 if family in synthetic.TRAINING else 2):
            drawn = synthetic.draw(family, length, [1, i])
            assert drawn.values.shape == (length,)
            assert drawn.values.dtype == np.float64
            assert np.isfinite(drawn.values).all()
            assert drawn.season >= 1
            parse_frequency(drawn.frequency)
            np.testing.assert_array_equal(drawn.values, synthetic.draw(family, length, [1, i]).values)
    assert drawn.values.std() > 0
    assert not np.array_equal(drawn.values, synthetic.draw(family, length, [2, i]).values)
    batch, _ = synthetic.draw_batch(np.arange(3), 40, 0, (family,))
    assert np.isfinite(batch).all()


def test_levels_and_scales_are_of_many_decades():
    values, _ = synthetic.draw_batch(np.arange(600), 128, 0)
    assert np.isfinite(values).all()
    sizes = np.log10(values.std(1)[values.std(1) > 0])
    low, high = np.quantile(sizes, [0.05, 0.95])
    assert low < -2
    assert high > 4
    assert 0.3 < (values.mean(1) < 0).mean() < 0.5


@pytest.mark.parametrize("family", ["multiplicative", "bounded", "intermittent"])
def test_what_is_above_nothing_never_crosses_it(family):
    for drawn in draws(family, 60, 128):
        assert (drawn.values >= 0).all() or (drawn.values <= 0).all()


def test_the_mix_is_drawn_by_weight():
    chosen = ("intermittent", "growth_seasonal")  # zeros come of the first alone
    values, _ = synthetic.draw_batch(np.arange(400), 64, 0, chosen)
    assert 0.2 < (values == 0).any(1).mean() < 0.375  # of 0.06 / (0.06 + 0.1), most have a zero
    alone, _ = synthetic.draw_batch(np.arange(400), 64, 0, ("growth_seasonal",))
    assert not (alone == 0).any()


def test_the_season_that_is_told():
    _, told = synthetic.draw_batch(np.arange(3000), 16, 0, ("growth_seasonal",))
    assert 0.67 < (told == 12).mean() < 0.73
    assert 0.22 < (told == 1).mean() < 0.28
    assert 0.035 < ((told != 12) & (told != 1)).mean() < 0.065
    _, told = synthetic.draw_batch(np.arange(150), 8, 0, ("lorenz",))
    assert 0.1 < (told != 1).mean() < 0.3


def test_wrong_arguments():
    with pytest.raises(UnknownNameError, match=r"unknown family of series 'tide'\. Did you mean 'tides'"):
        synthetic.draw("tide", 64, 0)
    with pytest.raises(UnknownNameError, match="unknown family of series 'wave'"):
        synthetic.draw_batch(np.arange(2), 64, 0, ("additive", "wave"))
    with pytest.raises(ConfigError, match="length must be at least 8 and families not empty, got 7 and arima"):
        synthetic.draw("arima", 7, 0)
    with pytest.raises(ConfigError, match="families not empty, got 64 and none"):
        synthetic.draw_batch(np.arange(2), 64, 0, ())


# ---------------------------------------------------------------- what is promised


@pytest.mark.parametrize("family", SEASONAL)
def test_the_season_explains_what_another_does_not(family):
    right, wrong = [], []
    for drawn in draws(family, 150):
        if 4 <= drawn.season <= 60 and drawn.frequency in ("h", "30min", "D", "B", "MS", "QS"):
            right.append(explained(drawn.values, drawn.season))
            wrong.append(explained(drawn.values, drawn.season + 1))
    assert len(right) > 25
    assert np.median(right) > 3 * np.median(wrong)
    assert np.median(right) > 0.25


def test_seasons_are_those_of_the_frequency():
    for drawn in draws("additive", 200, 64):
        if drawn.frequency in ("h", "30min", "15min", "10min", "D", "B", "MS", "QS") and drawn.season > 1:
            usual = parse_frequency(drawn.frequency).season
            assert drawn.season == usual or drawn.season > 19  # a month or a year, where there is no week
    names = {calendar.frequency for calendar in structure.CALENDARS}
    assert len({drawn.frequency for drawn in draws("additive", 300, 16)} & names) >= 12


def test_averaging_foretells_a_season_better_than_the_last_one():
    rng = np.random.default_rng(0)
    last, average = [], []
    for _ in range(200):
        days = structure.cycle(rng, np.arange(960.0), 24.0).reshape(40, 24)
        means = np.stack([days[at - 5 : at].mean(0) for at in range(5, 40)])
        last.append(np.abs(days[5:] - days[4:-1]).mean())
        average.append(np.abs(days[5:] - means).mean())
    assert np.mean(last) > 0.1  # it is never twice the same
    assert np.mean(average) < 0.95 * np.mean(last)


def test_weekends_differ():
    rng = np.random.default_rng(0)
    hours = np.arange(24 * 7.0)
    gaps = []
    for _ in range(100):
        factor, offset = structure.weekly(rng, hours, 24)
        assert factor.shape == offset.shape == hours.shape
        assert len(np.unique(factor)) == 7
        gaps.append((abs(factor[-1] - 1), abs(factor[:120] - 1).max()))
    off, work = np.mean(gaps, axis=0)
    assert off > 2 * work


@pytest.mark.parametrize("period", [2.0, 4.0, 7.0, 24.0, 30.44, 1440.0])
def test_profiles_have_one_size(period):
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = structure.profile(rng, period)
        assert len(shape) == (128 if period == 30.44 else period)
        assert shape.mean() == pytest.approx(0, abs=1e-9)
        assert shape.std() == pytest.approx(1)


def test_paths_and_noise_have_deviation_1():
    rng = np.random.default_rng(0)
    for keep in (0.0, 0.5, 0.9):
        paths = structure.ar1(rng, (4000, 20), keep)
        np.testing.assert_allclose(paths.std(0), 1, atol=0.06)
        assert np.mean(paths[:, 1:] * paths[:, :-1]) == pytest.approx(keep, abs=0.03)
    sizes = [structure.noise(rng, 2000, np.zeros(2000)).std() for _ in range(200)]
    assert 0.8 < np.median(sizes) < 1.2
    assert structure.deviation(np.array([1.0, 3.0])) == 1
    assert not structure.unit(np.full(5, 3.0)).any()


# ---------------------------------------------------------------- kernels


@pytest.mark.parametrize("expression", ["rbf", "periodic", "linear", "sum", "product", "changing"])
def test_draws_have_the_covariance_of_their_kernel(expression):
    bank = kernels.Bank(48, (12,), 0.4)
    kernel = {
        "rbf": bank.rbf(4),
        "periodic": bank.periodic(12, 0.7),
        "linear": bank.linear(),
        "sum": bank.quadratic(3, 0.5) + bank.white(),
        "product": bank.periodic(12, 1) * bank.rough(15) + bank.constant(),
        "changing": (bank.linear() + bank.constant()) * bank.rbf(5) + bank.linear() * bank.linear(),
    }[expression]
    rng = np.random.default_rng(0)
    made = np.stack([kernel.draw(rng) for _ in range(6000)])
    expected = kernel.covariance()
    np.testing.assert_allclose(made.T @ made / len(made), expected, atol=0.09 * expected.max())
    assert np.abs(made.mean(0)).max() < 0.08 * np.sqrt(expected.max())


def test_sums_and_products_of_kernels_are_those_of_their_covariances():
    bank = kernels.Bank(30, (6,))
    a, b, c = bank.linear() + bank.white(), bank.periodic(6, 1), bank.rbf(3) + bank.constant()
    np.testing.assert_allclose((a + b).covariance(), a.covariance() + b.covariance())
    np.testing.assert_allclose((a * b * c).covariance(), a.covariance() * b.covariance() * c.covariance())
    line = np.arange(30) / 30 - 0.5
    np.testing.assert_allclose(bank.linear().covariance(), 12 * np.outer(line, line))
    np.testing.assert_allclose(bank.rbf(3).covariance()[0, 6], np.exp(-2))
    np.testing.assert_allclose(bank.rough(3).covariance()[0, 6], np.exp(-2))
    np.testing.assert_allclose(bank.quadratic(3, 0.5).covariance()[0, 3], 2**-0.5)
    np.testing.assert_allclose(bank.periodic(6, 1).covariance()[0, [3, 6]], [np.exp(-2), 1])


def test_compositions_vary_and_tell_their_period():
    rng = np.random.default_rng(0)
    mains = set()
    for _ in range(200):
        kernel, main = kernels.compose(rng, 64, (12, 5))
        mains.add(main)
        values = kernel.draw(rng)
        assert values.shape == (64,)
        assert np.ptp(values) > 0
    assert mains == {1, 5, 12}


def test_periods_without_a_common_multiple_still_give_the_variance():
    bank = kernels.Bank(64, (59, 61, 53))
    kernel = bank.periodic(59, 1) * bank.periodic(61, 1) * bank.periodic(53, 1)
    rng = np.random.default_rng(0)
    assert np.mean([kernel.draw(rng) ** 2 for _ in range(2000)]) == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------- held out


def test_oscillators_repeat_after_their_season():
    for drawn in draws("oscillator", 12, 256):
        assert 8 <= drawn.season <= 60
        first, second = drawn.values[: -drawn.season], drawn.values[drawn.season :]
        assert np.corrcoef(first, second)[0, 1] > 0.97


def test_chaos_forgets():
    rng = np.random.default_rng(0)
    for _ in range(3):
        values, season = mechanisms.lorenz(rng, 768)
        assert season.main == 1
        assert -60 < values.min() < values.max() < 60
        late = [np.corrcoef(values[:300], values[lag : lag + 300])[0, 1] for lag in range(250, 400, 10)]
        assert np.abs(late).mean() < 0.6


def test_tides_have_the_periods_of_the_moon():
    for drawn in draws("tides", 10, 1500):
        assert (drawn.season, drawn.frequency) == (25, "h")
        nearest = min(abs(strongest(drawn.values) - period) / period for period in mechanisms.TIDES.values())
        assert nearest < 0.01


@pytest.mark.parametrize(("family", "period"), [("queue", 24), ("thermal", 24), ("growth_seasonal", 12)])
def test_days_and_years_of_the_held_out(family, period):
    made = draws(family, 16, 700)
    assert all(drawn.season == period for drawn in made)
    right, wrong = ([explained(drawn.values, p) for drawn in made] for p in (period, period + 1))
    assert np.median(right) > 3 * np.median(wrong)


def test_a_queue_serves_no_more_than_it_can():
    rng = np.random.default_rng(0)
    for _ in range(30):
        values, season = mechanisms.queue(rng, 400)
        assert (season.frequency, season.main) == ("h", 24)
        assert (values >= 0).all()


def test_a_thermostat_keeps_a_house_warm():
    rng = np.random.default_rng(3)
    for _ in range(20):
        values, _ = mechanisms.thermal(rng, 500)
        heat = values.max() <= 1
        assert values.min() >= 0 if heat else (np.median(values) > 14 and values.max() < 60)
