import math
from statistics import NormalDist

import numpy as np
import pytest
import torch
from numpy.lib.stride_tricks import sliding_window_view
from sklearn.linear_model import Ridge as TheirRidge

from vertebra.domains.timeseries.baselines import (
    DLinear,
    RepeatLast,
    Ridge,
    SeasonalNaive,
    WindowMean,
    repeat_last,
    seasonal_naive,
    window_mean,
)
from vertebra.domains.timeseries.frequency import Frequency
from vertebra.domains.timeseries.protocol import ett_borders, ett_windows
from vertebra.domains.timeseries.series import Series
from vertebra.errors import ConfigError, DataError, UnknownNameError

NAN = float("nan")
ALL = (SeasonalNaive(), RepeatLast(), WindowMean(), WindowMean(3))


def series(*values, **options):
    rows = np.array(values, dtype=float)
    rows = rows[:, None] if rows.ndim == 1 else rows
    names = tuple(f"v{i}" for i in range(rows.shape[1]))
    return Series(name="a", values=rows, variates=names, **options)


def spread(forecast):
    """Standard deviation of each step, read from the 84th percentile."""
    return (forecast.quantiles[-1] - forecast.mean)[:, 0].tolist()


ONE_UP = (NormalDist().cdf(1.0),)

# --- series ---


def test_seasonal_naive_repeats_the_last_season_and_widens_with_seasons():
    (found,) = SeasonalNaive().forecast([series(9, 1, 2, 3, 2, 4, 7)], 7, ONE_UP, season=3)
    assert found.mean[:, 0].tolist() == [2, 4, 7, 2, 4, 7, 2]
    sigma = math.sqrt(((3 - 9) ** 2 + (2 - 1) ** 2 + (4 - 2) ** 2 + (7 - 3) ** 2) / 4)
    assert spread(found) == pytest.approx([sigma * math.sqrt(k) for k in (1, 1, 1, 2, 2, 2, 3)])
    assert found.season == 3


def test_seasonal_naive_takes_the_season_of_the_frequency():
    rows = np.arange(60.0)
    (found,) = SeasonalNaive().forecast([series(*rows, frequency=Frequency(1, "h"))], 3)
    assert found.mean[:, 0].tolist() == [36, 37, 38]
    assert found.season == 24
    assert found.levels == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert found.quantiles.shape == (9, 3, 1)
    assert np.array_equal(found.quantiles[4], found.mean)


def test_seasonal_naive_goes_back_to_the_last_known_value_of_a_phase():
    (found,) = SeasonalNaive().forecast([series(1, 5, 2, NAN, 4, NAN)], 4, ONE_UP, season=2)
    assert found.mean[:, 0].tolist() == [4, 5, 4, 5]  # 5 is two seasons older than the row before it
    sigma = math.sqrt((1 + 4) / 2)
    assert spread(found) == pytest.approx([sigma * math.sqrt(k) for k in (1, 3, 2, 4)])


def test_a_phase_that_was_never_known_takes_the_last_value():
    (found,) = SeasonalNaive().forecast([series(1, NAN, 2, NAN, 4, NAN)], 4, ONE_UP, season=2)
    assert found.mean[:, 0].tolist() == [4, 4, 4, 4]


def test_a_series_shorter_than_a_season_repeats_its_last_value():
    (short,) = SeasonalNaive().forecast([series(1, 3, 2)], 3, ONE_UP, season=4)
    (last,) = RepeatLast().forecast([series(1, 3, 2)], 3, ONE_UP)
    assert short.mean[:, 0].tolist() == [2, 2, 2]
    assert np.array_equal(short.quantiles, last.quantiles)
    assert short.season == 4  # what it was asked for, and is scaled by
    (just,) = SeasonalNaive().forecast([series(1, 3, 2)], 4, ONE_UP, season=3)
    assert just.mean[:, 0].tolist() == [1, 3, 2, 1]
    sigma = math.sqrt((4 + 1) / 2)  # no two values are a season apart
    assert spread(just) == pytest.approx([sigma * math.sqrt(k) for k in (1, 1, 1, 2)])


def test_repeat_last_is_a_random_walk():
    (found,) = RepeatLast().forecast([series(1, 3, 2, NAN)], 3, ONE_UP)
    assert found.mean[:, 0].tolist() == [2, 2, 2]
    sigma = math.sqrt((4 + 1) / 2)
    assert spread(found) == pytest.approx([sigma * math.sqrt(k) for k in (2, 3, 4)])  # the value is a step old


def test_window_mean_by_hand():
    one = series(100, 1, NAN, 3, 5)
    (found,) = WindowMean(4).forecast([one], 2, ONE_UP)
    assert found.mean[:, 0].tolist() == [3, 3]
    assert spread(found) == pytest.approx([2 * math.sqrt(4 / 3)] * 2)
    (whole,) = WindowMean().forecast([one], 1)
    assert whole.mean[0, 0] == pytest.approx(109 / 4)
    (gap,) = WindowMean(2).forecast([series(4, 6, NAN, NAN)], 1)
    assert gap.mean[0, 0] == 5


def test_quantiles_hold_what_they_say():
    rng = np.random.default_rng(0)
    walks = rng.normal(size=(300, 220)).cumsum(1)
    histories = [series(*walk[:200]) for walk in walks]
    found = RepeatLast().forecast(histories, 20, (0.1, 0.9))
    inside = [
        ((walk[200:] >= f.quantiles[0, :, 0]) & (walk[200:] <= f.quantiles[1, :, 0])).mean()
        for walk, f in zip(walks, found, strict=True)
    ]
    assert np.mean(inside) == pytest.approx(0.8, abs=0.04)


@pytest.mark.parametrize("baseline", ALL, ids=lambda b: type(b).__name__)
def test_forecasts_move_and_grow_with_the_series(baseline):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(30, 2))
    rows[rng.random(rows.shape) < 0.2] = NAN
    plain, other = baseline.forecast([series(*rows), series(*(rows * 3 + 100))], 9, (0.2, 0.5, 0.9), season=4)
    assert plain.mean.shape == (9, 2)
    assert other.mean == pytest.approx(plain.mean * 3 + 100)
    assert other.quantiles == pytest.approx(plain.quantiles * 3 + 100)
    assert (np.diff(plain.quantiles, axis=0) > 0).all()


@pytest.mark.parametrize("baseline", ALL, ids=lambda b: type(b).__name__)
def test_one_value_is_repeated_and_a_variate_without_any_stays_unknown(baseline):
    (found,) = baseline.forecast([series([7.0, NAN])], 3, (0.1, 0.9))
    assert found.mean[:, 0].tolist() == [7, 7, 7]
    assert found.quantiles[:, :, 0].tolist() == [[7, 7, 7]] * 2
    assert np.isnan(found.mean[:, 1]).all()


def test_no_levels_give_the_mean_alone():
    (found,) = RepeatLast().forecast([series(1, 2)], 3, ())
    assert found.quantiles.shape == (0, 3, 1)
    assert np.array_equal(found.median, found.mean)


def test_impossible_requests_are_refused():
    with pytest.raises(
        ConfigError, match="RepeatLast: horizon must be at least 1 and season at least 0, got 0 and None"
    ):
        RepeatLast().forecast([series(1)], 0)
    with pytest.raises(ConfigError, match=r"SeasonalNaive: levels must rise, between 0 and 1, got \[0.9, 0.1\]"):
        SeasonalNaive().forecast([series(1)], 1, (0.9, 0.1))
    with pytest.raises(ConfigError, match="between 0 and 1"):
        SeasonalNaive().forecast([series(1)], 1, (0.0, 0.5))
    with pytest.raises(ConfigError, match="WindowMean: window must be at least 1, got 0"):
        WindowMean(0)
    empty = Series(name="a", source="f.csv", values=np.zeros((0, 1)))
    with pytest.raises(DataError, match=r"f.csv: a: holds no row to forecast from"):
        RepeatLast().forecast([empty], 1)


# --- windows ---


def test_windows_by_hand():
    windows = np.array([[1.0, 2, 3, 4], [8, 6, 4, 2]])
    assert repeat_last(windows, 2).tolist() == [[4, 4], [2, 2]]
    assert window_mean(windows, 2).tolist() == [[2.5, 2.5], [5, 5]]
    assert seasonal_naive(windows, 5, 3).tolist() == [[2, 3, 4, 2, 3], [6, 4, 2, 6, 4]]
    assert seasonal_naive(windows[:, None], 1, 4).shape == (2, 1, 1)
    with pytest.raises(ConfigError, match="season must be from 1 to the 4 steps of a window, got 5"):
        seasonal_naive(windows, 2, 5)


def test_windows_and_series_agree():
    rows = np.random.default_rng(2).normal(size=(12, 3))
    for windows, baseline in (
        (seasonal_naive(rows.T, 7, 4), SeasonalNaive()),
        (repeat_last(rows.T, 7), RepeatLast()),
        (window_mean(rows.T, 7), WindowMean()),
    ):
        (found,) = baseline.forecast([series(*rows)], 7, season=4)
        np.testing.assert_allclose(windows.T, found.mean)


@pytest.mark.parametrize("every", [1, 3])
def test_ridge_is_that_of_scikit_learn(every):
    rows = np.random.default_rng(3).normal(size=(5000, 2)).cumsum(0)  # more windows than are taken at a time
    rows[40, 0] = NAN
    windows = np.concatenate([sliding_window_view(column, 11)[::every] for column in rows.T])
    windows = windows[np.isfinite(windows).all(1)]
    windows = windows - windows[:, 7:8]
    theirs = TheirRidge(alpha=2.5, fit_intercept=False).fit(windows[:, :8], windows[:, 8:])
    ours = Ridge(8, 3, 2.5).fit(rows, every)
    assert ours.weight == pytest.approx(theirs.coef_.T, abs=1e-8)
    probe = rows[100:108].T
    expected = theirs.predict(probe - probe[:, -1:]) + probe[:, -1:]
    assert ours.predict(probe) == pytest.approx(expected)
    assert ours.predict(probe + 1000) == pytest.approx(expected + 1000)
    assert ours.predict(probe[None])[0] == pytest.approx(expected)


def test_ridge_finds_a_line_and_a_wave():
    steps = np.arange(300.0)
    rows = np.stack([steps, np.sin(steps / 5)], axis=1)
    ridge = Ridge(20, 10, 1e-8).fit(rows[:250])
    np.testing.assert_allclose(ridge.predict(rows[250:270].T), rows[270:280].T, atol=1e-3)


def test_ridge_says_what_is_wrong():
    with pytest.raises(ConfigError, match="context must be at least 2, horizon at least 1 and alpha above 0"):
        Ridge(8, 3, 0)
    with pytest.raises(ConfigError, match="call fit before predict"):
        Ridge(8, 3).predict(np.zeros((1, 8)))
    with pytest.raises(ConfigError, match="every must be at least 1, got 0"):
        Ridge(8, 3).fit(np.zeros((20, 1)), 0)
    for rows in (np.zeros((10, 1)), np.where(np.arange(20) % 10 == 0, NAN, 1.0)[:, None]):
        with pytest.raises(DataError, match=f"no 11 rows in succession are complete, the series has {len(rows)}"):
            Ridge(8, 3).fit(rows)


def test_dlinear_begins_with_the_mean():
    model = DLinear(48, 6)
    x = torch.randn(2, 3, 48)
    with torch.no_grad():
        bias = model.trend.bias + model.remainder.bias
        assert torch.allclose(model(x) - bias, x.mean(-1, keepdim=True).expand(2, 3, 6), atol=1e-6)
    assert sum(p.numel() for p in model.parameters()) == 2 * (48 * 6 + 6)


def test_dlinear_parts_by_hand():
    model = DLinear(4, 1, window=3)
    x = torch.tensor([[[3.0, 0.0, 6.0, 9.0]]])
    with torch.no_grad():
        for layer in (model.trend, model.remainder):
            layer.bias.zero_()
            layer.weight.zero_()
        model.trend.weight[:] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
        assert model(x).item() == pytest.approx(2 + 30 + 500 + 8000)  # averages, the ends repeated
        model.trend.weight.zero_()
        model.remainder.weight[:] = torch.tensor([1.0, 10.0, 100.0, 1000.0])
        assert model(x).item() == pytest.approx(1 - 30 + 100 + 1000)


def test_dlinear_treats_variates_alike_and_learns():
    torch.manual_seed(0)
    model = DLinear(24, 4, window=5)
    x = torch.randn(2, 3, 24)
    assert torch.allclose(model(x)[:, [2, 0, 1]], model(x[:, [2, 0, 1]]))
    steps = torch.arange(200.0)
    rows = torch.sin(steps / 3).unfold(0, 28, 1)[:, None]
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(200):
        loss = ((model(rows[..., :24]) - rows[..., 24:]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 1000


def test_dlinear_refuses_an_even_window():
    with pytest.raises(ConfigError, match="window odd, got 8, 2 and 4"):
        DLinear(8, 2, window=4)


# --- protocol ---


def test_borders_of_hours_and_quarters_of_them():
    assert ett_borders("h") == (8640, 11520, 14400)
    assert ett_borders("15min") == (34560, 46080, 57600)
    with pytest.raises(ConfigError, match="frequency must divide a month of 30 days, as h and 15min do, got 'MS'"):
        ett_borders("MS")
    with pytest.raises(ConfigError, match="got 'W'"):
        ett_borders("W")


def test_windows_of_the_protocol():
    days = np.arange(25 * 30 * 2.0).reshape(-1, 2)  # five months more than the protocol reads
    found = {split: ett_windows(days, split, 40, 10, "D") for split in ("train", "val", "test")}
    train = days[:360]
    first = {"train": 40, "val": 360, "test": 480}
    last = {"train": 360, "val": 480, "test": 600}
    for split, windows in found.items():
        assert windows.context.shape == (last[split] - first[split] - 9, 2, 40)
        assert windows.target.shape == (last[split] - first[split] - 9, 2, 10)
        assert windows.center == pytest.approx(train.mean(0))
        assert windows.scale == pytest.approx(train.std(0, ddof=0))
        scaled = (days - train.mean(0)) / train.std(0)
        begin = first[split]
        np.testing.assert_allclose(windows.context[0].T, scaled[begin - 40 : begin], atol=1e-12)
        np.testing.assert_allclose(windows.target[0].T, scaled[begin : begin + 10], atol=1e-12)
        np.testing.assert_allclose(windows.target[-1].T, scaled[last[split] - 10 : last[split]], atol=1e-12)
        assert np.shares_memory(windows.context, windows.target)  # views, no copies


def test_a_variate_that_stands_still_in_training_is_only_shifted():
    rows = np.ones((600, 1))
    rows[400:] = 3
    assert ett_windows(rows, "test", 10, 5, "D").target[-1].tolist() == [[2.0] * 5]


def test_protocol_says_what_is_wrong():
    rows = np.zeros((600, 1))
    with pytest.raises(DataError, match="20 months of h are 14400 rows, got 600; is this the frequency"):
        ett_windows(rows, "test", 10, 5)
    with pytest.raises(UnknownNameError, match=r"unknown split 'tset'\. Did you mean 'test'"):
        ett_windows(rows, "tset", 10, 5, "D")
    with pytest.raises(ConfigError, match="fit into the part test, got 10 and 121"):
        ett_windows(rows, "test", 10, 121, "D")
    with pytest.raises(ConfigError, match="fit into the part val, got 361 and 5"):
        ett_windows(rows, "val", 361, 5, "D")
    assert len(ett_windows(rows, "test", 10, 120, "D").target) == 1


# --- ETTh1 ---


@pytest.fixture
def etth1(shared_data):
    return np.genfromtxt(shared_data / "timeseries/etth1/ETTh1.csv", delimiter=",", skip_header=1, usecols=range(1, 8))


def both(forecast, windows):
    away = forecast - windows.target
    return [round(float((away**2).mean()), 3), round(float(abs(away).mean()), 3)]


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("horizon", "count", "last", "yesterday"),
    [
        (96, 2785, [1.294, 0.713], [0.512, 0.433]),
        (192, 2689, [1.325, 0.733], [0.581, 0.469]),
        (336, 2545, [1.330, 0.746], [0.650, 0.501]),
        (720, 2161, [1.335, 0.755], [0.655, 0.514]),
    ],
)
def test_naive_forecasts_of_etth1(etth1, horizon, count, last, yesterday):
    test = ett_windows(etth1, "test", 96, horizon)
    assert len(test.context) == count
    assert both(repeat_last(test.context, horizon), test) == last
    assert both(seasonal_naive(test.context, horizon, 24), test) == yesterday
    if horizon == 96:
        assert both(window_mean(test.context, horizon), test) == [0.701, 0.558]


@pytest.mark.realdata
def test_ridge_on_etth1(etth1):
    test, val = ett_windows(etth1, "test", 96, 96), ett_windows(etth1, "val", 96, 96)
    train = (etth1[:8640] - test.center) / test.scale
    # every fourth window gives the floors noted beside the data
    assert both(Ridge(96, 96, 10).fit(train, every=4).predict(test.context), test) == [0.388, 0.397]
    longer = ett_windows(etth1, "test", 96, 192)
    assert both(Ridge(96, 192, 10).fit(train, every=4).predict(longer.context), longer) == [0.441, 0.427]
    # all windows do better; validation chooses the penalty
    fitted = [Ridge(96, 96, alpha).fit(train) for alpha in (1.0, 1e3, 1e5)]
    best = min(fitted, key=lambda ridge: ((ridge.predict(val.context) - val.target) ** 2).mean())
    assert best.alpha == 1e3
    assert both(best.predict(test.context), test) == [0.383, 0.392]
