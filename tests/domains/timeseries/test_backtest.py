import dataclasses

import numpy as np
import pytest

from vertebra.domains.timeseries.backtest import backtest
from vertebra.domains.timeseries.baselines import RepeatLast, SeasonalNaive
from vertebra.domains.timeseries.forecast import SeriesForecast
from vertebra.domains.timeseries.frequency import Frequency
from vertebra.domains.timeseries.metrics import mase, mse, weighted_quantile_loss
from vertebra.domains.timeseries.series import Series
from vertebra.errors import ConfigError, DataError, ShapeError

NAN = float("nan")
LEVELS = (0.1, 0.5, 0.9)


def series(values, name="a", **options):
    rows = np.array(values, dtype=float)
    rows = rows[:, None] if rows.ndim == 1 else rows
    return Series(name=name, values=rows, variates=tuple("xyz"[: rows.shape[1]]), **options)


class Spy:
    """Repeats the last value, and remembers what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, histories, horizon, levels):
        self.calls.append((histories, horizon, tuple(levels)))
        return RepeatLast().forecast(histories, horizon, levels, 1)

    @property
    def seen(self):
        return [(one.name, one.values[:, 0].tolist()) for histories, _, _ in self.calls for one in histories]


def test_windows_end_with_the_series_and_see_nothing_later():
    spy = Spy()
    found = backtest(spy, [series(range(10))], 2, windows=3, levels=LEVELS)
    assert spy.seen == [("a", list(range(4))), ("a", list(range(6))), ("a", list(range(8)))]
    assert {call[1:] for call in spy.calls} == {(2, LEVELS)}
    assert [w.origin for w in found.windows] == [4, 6, 8]
    assert [w.actual[:, 0].tolist() for w in found.windows] == [[4, 5], [6, 7], [8, 9]]
    assert [w.forecast.mean[:, 0].tolist() for w in found.windows] == [[3, 3], [5, 5], [7, 7]]
    assert found.left_out == ()


def test_a_forecast_does_not_change_with_what_comes_later():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(40, 2))
    other = rows.copy()
    other[30:] = 99
    plain, changed = (backtest(Spy(), [series(r)], 5, windows=2, levels=LEVELS) for r in (rows, other))
    assert [w.origin for w in plain.windows] == [30, 35]
    for own, changes in ((plain.windows[0].forecast, changed.windows[0].forecast),
                         (plain.windows[0].naive, changed.windows[0].naive)):  # fmt: skip
        assert np.array_equal(own.quantiles, changes.quantiles)
    assert not np.array_equal(plain.windows[1].forecast.mean, changed.windows[1].forecast.mean)


def test_past_covariates_are_cut_and_known_ones_stay():
    rows = np.arange(12.0)[:, None]
    one = series(
        range(10),
        past=rows[:10] + 100,
        past_names=("p",),
        known=rows + 200,
        known_names=("k",),
        start=np.datetime64("2024-01-01", "ms"),
        frequency=Frequency(1, "D"),
    )
    spy = Spy()
    found = backtest(spy, [one], 3, windows=2, stride=1, levels=LEVELS)
    first, second = (histories[0] for histories, _, _ in spy.calls)
    assert [len(first), len(second)] == [6, 7]
    assert first.past[:, 0].tolist() == [100, 101, 102, 103, 104, 105]
    assert first.known[:, 0].tolist() == [200 + k for k in range(12)]
    assert first.start == one.start
    assert [row["stamp"][:10] for row in found.rows()] == ["2024-01-07", "2024-01-08"]
    assert found.windows[0].forecast.stamps[0] == np.datetime64("2024-01-07")


def test_series_take_part_where_they_fit_and_others_are_named():
    spy = Spy()
    several = [
        series(range(3), "short"),  # one window
        series(range(2), "none"),
        series(range(7), "long"),
        series([NAN, NAN, NAN, NAN, 5, 6, 7], "late"),  # nothing known before row 4: the last window alone
        series([1, 2, 3, 4, 5, NAN, NAN], "ended"),  # nothing known in the last window
    ]
    found = backtest(spy, several, 2, windows=3, levels=LEVELS)
    assert [(w.series.name, w.origin) for w in found.windows] == [
        ("short", 1), ("long", 1), ("long", 3), ("long", 5), ("late", 5), ("ended", 1), ("ended", 3),
    ]  # fmt: skip
    assert found.left_out == ("none",)
    assert [[one.name for one in histories] for histories, _, _ in spy.calls] == [
        ["long", "ended"],
        ["long", "ended"],
        ["short", "long", "late"],
    ]


def test_metrics_by_hand_beside_those_of_seasonal_naive():
    found = backtest(Spy(), [series([0, 2, 1, 5, 4, 8])], 2, windows=2, levels=(0.5,), season=2)
    rows = found.rows()
    # origin 2: last 2, 2 and naive 0, 2 against 1, 5; scale: lag 2 has no pair, lag 1 is 2
    # origin 4: last 5, 5 and naive 1, 5 against 4, 8; scale (1 + 3) / 2
    assert [(row["origin"], row["stamp"]) for row in rows] == [(2, "2"), (4, "4")]
    assert [row["mase"] for row in rows] == pytest.approx([(1 + 3) / 2 / 2, (1 + 3) / 2 / 2])
    assert [row["naive_mase"] for row in rows] == pytest.approx([(1 + 3) / 2 / 2, (3 + 3) / 2 / 2])
    assert [row["mse"] for row in rows] == pytest.approx([5, 5])
    assert [row["naive_mse"] for row in rows] == pytest.approx([5, 9])
    summary = found.summary()
    assert summary["model"]["crps"] == pytest.approx(8 / 18)
    assert summary["seasonal_naive"]["crps"] == pytest.approx(10 / 18)
    assert summary["ratio"]["crps"] == pytest.approx(0.8)
    assert summary["ratio"]["mase"] == pytest.approx(1 / 1.25)
    assert summary["ratio"]["mse"] == pytest.approx(5 / 7)


def test_each_variate_has_a_row_with_all_metrics():
    rng = np.random.default_rng(1)
    one = series(rng.normal(size=(60, 2)), frequency=Frequency(6, "h"))
    found = backtest(Spy(), [one], 8, windows=2, levels=LEVELS)
    rows = found.rows()
    assert [(row["variate"], row["origin"]) for row in rows] == [("x", 44), ("y", 44), ("x", 52), ("y", 52)]
    names = ["mase", "crps", "mse", "mae", "smape", "nd", "msis", "coverage_80"]
    assert list(rows[0]) == ["series", "variate", "origin", "stamp", *names, *(f"naive_{n}" for n in names)]
    assert list(found.summary()["model"]) == names
    assert list(found.summary()["ratio"]) == names[:-1]
    last = found.windows[1]
    actual, history = one.values[52:], one.values[:52]
    assert [row["mase"] for row in rows[2:]] == pytest.approx(mase(actual, last.forecast.median, history, 4).tolist())
    assert [row["naive_mse"] for row in rows[2:]] == pytest.approx(mse(actual, last.naive.mean).tolist())
    assert [row["crps"] for row in rows[2:]] == pytest.approx(
        weighted_quantile_loss(actual, last.forecast.quantiles, LEVELS).tolist()
    )


def test_seasonal_naive_beside_itself_has_ratio_1():
    rng = np.random.default_rng(2)
    one = series(rng.normal(size=80), frequency=Frequency(1, "D"))
    found = backtest(SeasonalNaive().forecast, [one], 7, windows=3)
    assert found.windows[0].naive.season == 7
    assert set(found.summary()["ratio"].values()) == {1.0}
    assert found.summary()["model"] == found.summary()["seasonal_naive"]


def test_one_season_scales_both_whatever_the_forecaster_assumed():
    one = series(np.random.default_rng(3).normal(size=40))
    own = backtest(lambda s, h, q: SeasonalNaive().forecast(s, h, q, 4), [one], 4, windows=2, season=4)
    other = backtest(
        lambda s, h, q: [dataclasses.replace(f, season=1) for f in SeasonalNaive().forecast(s, h, q, 4)],
        [one], 4, windows=2, season=4,
    )  # fmt: skip
    assert other.summary() == own.summary()


def test_a_perfect_forecaster_and_a_perfect_naive_one():
    truth = np.tile([1.0, 5.0, 3.0], 10)

    def perfect(histories, horizon, levels):
        mean = [truth[len(one) : len(one) + horizon, None] for one in histories]
        return [
            SeriesForecast(series=one, mean=m, quantiles=np.stack([m] * len(levels)), levels=tuple(levels), season=3)
            for one, m in zip(histories, mean, strict=True)
        ]

    found = backtest(perfect, [series(truth)], 6, windows=2, levels=LEVELS, season=3).summary()
    for who in ("model", "seasonal_naive"):
        assert found[who]["mase"] == found[who]["crps"] == found[who]["mse"] == 0
        assert found[who]["coverage_80"] == 1
    assert np.isnan(list(found["ratio"].values())).all()  # nothing to compare with


def test_a_forecaster_of_means_has_no_crps_beside_naive_ones():
    found = backtest(lambda s, h, q: RepeatLast().forecast(s, h, ()), [series(range(9))], 2, levels=LEVELS)
    summary = found.summary()
    assert np.isnan(summary["model"]["crps"])
    assert np.isnan(summary["ratio"]["crps"])
    assert summary["seasonal_naive"]["crps"] > 0
    assert summary["ratio"]["mase"] == 1  # both repeat the last value
    assert "naive_coverage_80" in found.rows()[0]


def test_missing_values_are_not_judged():
    rows = np.array([[1, NAN], [3, NAN], [2, NAN], [NAN, 7], [6, 8]])
    found = backtest(Spy(), [series(rows)], 2, windows=1, levels=LEVELS)
    assert np.array_equal(found.windows[0].actual, [[NAN, NAN], [6, NAN]], equal_nan=True)
    known, unknown = found.rows()
    assert known["mae"] == 4
    assert np.isnan(unknown["mae"])
    assert found.summary()["model"]["mae"] == 4
    assert found.summary()["model"]["mase"] == pytest.approx(4 / 1.5)


def test_impossible_requests_are_refused():
    message = r"backtest: horizon, windows and stride must be at least 1 and season at least 0, got 2, 1, 0 and 0"
    with pytest.raises(ConfigError, match=message):
        backtest(Spy(), [series(range(9))], 2, windows=1, stride=0)
    with pytest.raises(
        DataError, match=r"in its last 9 steps and one before them; the longest has 9 rows\. Lower the hor"
    ):
        backtest(Spy(), [series(range(9)), series(range(3), "b")], 9)
    with pytest.raises(DataError, match="the longest has 0 rows"):
        backtest(Spy(), [], 9)


def test_a_forecaster_that_answers_something_else_is_refused():
    one = series(range(9), source="f.csv")
    with pytest.raises(ShapeError, match="the forecaster returned 0 forecasts of 1 series"):
        backtest(lambda s, h, q: [], [one], 2)
    with pytest.raises(
        ShapeError, match=r"f.csv: a: the forecaster must return a mean \(2, 1\) and quantiles \(9, 2, 1\)"
    ):
        backtest(lambda s, h, q: RepeatLast().forecast(s, h + 1, q), [one], 2)


@pytest.mark.realdata
def test_seasonal_naive_covers_what_it_says_on_etth1(shared_data):
    rows = np.genfromtxt(shared_data / "timeseries/etth1/ETTh1.csv", delimiter=",", skip_header=1, usecols=range(1, 8))
    names = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    one = Series(name="ETTh1", values=rows, variates=names, frequency=Frequency(1, "h"))
    found = backtest(RepeatLast().forecast, [one], 48, windows=20)
    summary = found.summary()
    assert len(found.rows()) == 20 * 7
    assert 0.7 < summary["seasonal_naive"]["coverage_80"] < 0.9
    assert summary["ratio"]["mase"] > 1.2  # the last value, beside the same hour of yesterday
