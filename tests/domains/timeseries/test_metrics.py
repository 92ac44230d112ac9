import numpy as np
import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_pinball_loss, mean_squared_error
from torchmetrics.regression import SymmetricMeanAbsolutePercentageError

from vertebra.domains.timeseries import metrics
from vertebra.domains.timeseries.forecast import SeriesForecast
from vertebra.domains.timeseries.metrics import ForecastErrors, summarise
from vertebra.domains.timeseries.series import Series
from vertebra.errors import ConfigError, ShapeError

NAN = float("nan")


def column(*values):
    return np.array(values, dtype=float)[:, None]


def made(history, quantiles, levels, mean=None, name="a", season=1):
    """A forecast of one variate; ``quantiles`` (Q, H)."""
    horizon = len(mean) if mean is not None else len(quantiles[0])
    told = np.array(quantiles, dtype=float).reshape(len(levels), horizon, 1)
    middle = column(*mean) if mean is not None else told[len(levels) // 2]
    series = Series(name=name, values=column(*history))
    return SeriesForecast(series=series, mean=middle, quantiles=told, levels=tuple(levels), season=season)


# --- one series ---


def test_mase_by_hand():
    history = column(1, 3, 2, 5)  # a season of 2 apart: 1 and 2
    assert metrics.seasonal_error(history, 2) == pytest.approx([1.5])
    assert metrics.mase(column(4, 6), column(5, 3), history, 2) == pytest.approx([2 / 1.5])
    assert metrics.mase(column(4, NAN), column(5, 3), history, 2) == pytest.approx([1 / 1.5])


@pytest.mark.parametrize(
    ("history", "season", "scale"),
    [
        ([1, 3], 4, 2),  # shorter than a season
        ([1, 3, 2, 5], 4, (2 + 1 + 3) / 3),  # just a season: no two values are one apart
        ([1, 3, 1, 3], 2, 2),  # the season repeats exactly
        ([1, NAN, 2, 5, NAN, 9], 2, (1 + 4) / 2),  # 1 -> 2 and 5 -> 9
        ([1, NAN, NAN, 5, 6], 2, 1),  # no known pair at lag 2
        ([4, 4, 4], 1, NAN),
        ([4], 1, NAN),
        ([NAN, NAN, NAN], 1, NAN),
    ],
)
def test_scale_of_mase_falls_back_to_steps_then_to_nan(history, season, scale):
    assert metrics.seasonal_error(column(*history), season) == pytest.approx([scale], nan_ok=True)


def test_season_below_1_is_refused():
    with pytest.raises(ConfigError, match="MASE: season must be at least 1, got 0"):
        metrics.seasonal_error(column(1, 2), 0)


def test_errors_by_hand_without_missing_values():
    actual, forecast = column(2, NAN, -4, 0), column(3, 100, -2, 0)
    assert metrics.mse(actual, forecast) == pytest.approx([5 / 3])
    assert metrics.mae(actual, forecast) == pytest.approx([1])
    assert metrics.nd(actual, forecast) == pytest.approx([3 / 6])
    assert metrics.smape(actual, forecast) == pytest.approx([(2 / 5 + 4 / 6 + 0) / 3])


def test_variates_are_judged_one_by_one():
    actual = np.array([[1.0, 10.0], [2.0, NAN]])
    forecast = np.array([[2.0, 12.0], [2.0, 0.0]])
    assert metrics.mae(actual, forecast) == pytest.approx([0.5, 2])
    assert metrics.nd(actual, forecast) == pytest.approx([1 / 3, 0.2])


@pytest.mark.parametrize("name", ["mse", "mae", "nd", "smape"])
def test_nothing_known_is_nan_and_a_missing_forecast_shows(name):
    measure = getattr(metrics, name)
    assert np.isnan(measure(column(NAN, NAN), column(1, 2)))
    assert np.isnan(measure(column(1, 2), column(1, NAN)))


def test_weighted_quantile_loss_by_hand():
    actual = column(10, NAN)
    quantiles = np.array([[8.0, 0.0], [13.0, 0.0]])[..., None]
    losses = metrics.quantile_losses(actual, quantiles, (0.1, 0.9))
    assert losses.tolist() == [pytest.approx([2 * 0.1 * 2]), pytest.approx([2 * 0.1 * 3])]
    assert metrics.weighted_quantile_loss(actual, quantiles, (0.1, 0.9)) == pytest.approx([0.5 / 10])
    assert np.isnan(metrics.weighted_quantile_loss(column(0, 0), quantiles, (0.1, 0.9)))
    assert np.isnan(metrics.weighted_quantile_loss(actual, quantiles[:0], ()))


def test_median_quantile_loss_is_the_absolute_error():
    rng = np.random.default_rng(0)
    actual, median = rng.normal(size=(2, 6, 3))
    found = metrics.weighted_quantile_loss(actual, median[None], (0.5,))
    assert found == pytest.approx(metrics.nd(actual, median))


def test_msis_and_coverage_by_hand():
    actual, lower, upper = column(5, 2, NAN, 4), column(0, 0, 0, 0), column(4, 4, 4, 4)
    assert metrics.coverage(actual, lower, upper) == pytest.approx([2 / 3])
    found = metrics.msis(actual, lower, upper, column(1, 3, 2, 5), 2, alpha=0.2)
    assert found == pytest.approx([((4 + 10) + 4 + 4) / 3 / 1.5])
    below = metrics.msis(column(-1), column(0), column(4), column(1, 2), 1)
    assert below == pytest.approx([4 + 2 / 0.05])


def test_errors_are_those_of_the_libraries():
    rng = np.random.default_rng(1)
    actual, forecast, other = rng.normal(size=(3, 20, 2))
    raw = {"multioutput": "raw_values"}
    assert metrics.mse(actual, forecast) == pytest.approx(mean_squared_error(actual, forecast, **raw))
    assert metrics.mae(actual, forecast) == pytest.approx(mean_absolute_error(actual, forecast, **raw))
    losses = metrics.quantile_losses(actual, np.stack([forecast, other]), (0.3, 0.8))
    for own, told, level in zip(losses, (forecast, other), (0.3, 0.8), strict=True):
        assert own / 2 / 20 == pytest.approx(mean_pinball_loss(actual, told, alpha=level, **raw))
    theirs = SymmetricMeanAbsolutePercentageError()
    for v in range(2):
        expected = theirs(torch.tensor(forecast[:, v]), torch.tensor(actual[:, v]))
        assert metrics.smape(actual, forecast)[v] == pytest.approx(float(expected))


def test_symmetric_levels_widest_first():
    levels = (0.025, 0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.975)
    assert metrics.level_pairs(levels) == [(0, 7), (1, 6), (2, 4)]
    assert [metrics.coverage_name(levels, pair) for pair in metrics.level_pairs(levels)] == [
        "coverage_95",
        "coverage_80",
        "coverage_40",
    ]
    assert metrics.level_pairs((0.1, 0.5)) == []


# --- many series ---


def test_crps_is_a_ratio_of_sums_and_mase_a_mean_over_series():
    small = made([0, 1, 3], [[1, 1]], [0.5], name="small")  # scale 1.5
    large = made([0, 100], [[300, 100]], [0.5], name="large")  # scale 100
    scores = summarise([small, large], [column(2, 4), column(100, 100)])
    found = scores.summary()
    assert found["crps"] == pytest.approx((1 + 3 + 200) / (2 + 4 + 200))
    assert found["nd"] == pytest.approx(found["crps"])
    assert found["mae"] == pytest.approx(204 / 4)
    assert found["mse"] == pytest.approx((1 + 9 + 40000) / 4)
    assert found["mase"] == pytest.approx((2 / 1.5 + 100 / 100) / 2)
    assert np.isnan(found["msis"])


def test_each_series_counts_once_in_mase_however_many_windows_it_has():
    first = [made([0, 1], [[0]], [0.5], name="a"), made([0, 1, 2], [[0]], [0.5], name="a")]
    second = made([0, 1], [[0]], [0.5], name="b")
    scores = summarise([*first, second], [column(2), column(4), column(9)])
    assert [row["mase"] for row in scores.rows()] == pytest.approx([2, 4, 9])
    assert scores.summary()["mase"] == pytest.approx((3 + 9) / 2)
    assert [(r["series"], r["origin"]) for r in scores.rows()] == [("a", 2), ("a", 3), ("b", 2)]


def test_series_without_scale_or_truth_leave_the_others():
    still = made([5, 5, 5], [[4]], [0.5], name="still")
    silent = made([0, 1], [[4]], [0.5], name="silent")
    moving = made([0, 1], [[0]], [0.5], name="moving")
    scores = summarise([still, silent, moving], [column(5), column(NAN), column(3)])
    assert scores.summary()["mase"] == pytest.approx(3)
    assert scores.summary()["mae"] == pytest.approx((1 + 3) / 2)
    rows = scores.rows()
    assert np.isnan(rows[0]["mase"])
    assert rows[0]["mae"] == 1
    assert np.isnan([rows[1][name] for name in ("mase", "crps", "mse", "mae", "smape", "nd")]).all()
    assert np.isnan(summarise([still], [column(5)]).summary()["mase"])


def test_a_missing_forecast_is_not_hidden():
    scores = summarise([made([0, 1], [[NAN]], [0.5]), made([0, 1], [[1]], [0.5], name="b")], [column(1), column(1)])
    assert np.isnan([scores.summary()[name] for name in ("mase", "crps", "mse", "mae")]).all()


def test_mean_is_judged_by_mse_and_median_by_mae():
    forecast = made([0, 1], [[0], [2], [4]], [0.1, 0.5, 0.9], mean=[3])
    found = summarise([forecast], [column(5)]).summary()
    assert found["mse"] == 4
    assert (found["mae"], found["mase"]) == (3, 3)
    assert found["smape"] == pytest.approx(2 * 3 / 7)
    assert found["coverage_80"] == 0
    assert found["msis"] == pytest.approx(4 + 2 / 0.2 * 1)


def test_msis_takes_95_percent_where_it_is_told():
    levels = [0.01, 0.025, 0.5, 0.975, 0.99]
    forecast = made([0, 1], [[-9], [0], [2], [4], [9]], levels)
    assert summarise([forecast], [column(5)]).summary()["msis"] == pytest.approx(4 + 2 / 0.05)
    outer = made([0, 1], [[-9], [2], [9]], [0.01, 0.5, 0.99])
    assert summarise([outer], [column(10)]).summary()["msis"] == pytest.approx(18 + 2 / 0.02)


def test_a_forecast_of_the_mean_alone_has_no_crps():
    found = summarise([made([0, 1], [], [], mean=[3])], [column(5)]).summary()
    assert np.isnan([found["crps"], found["msis"]]).all()
    assert (found["mae"], found["mase"]) == (2, 2)
    assert list(found) == ["mase", "crps", "mse", "mae", "smape", "nd", "msis"]


def test_metrics_when_the_unit_changes():
    rng = np.random.default_rng(2)
    history, actual, told = rng.normal(size=30), rng.normal(size=8), np.sort(rng.normal(size=(3, 8)), 0)

    def found(factor=1.0, shift=0.0):
        forecast = made(history * factor + shift, told * factor + shift, (0.1, 0.5, 0.9), season=3)
        return summarise([forecast], [column(*(actual * factor + shift))]).summary()

    plain, scaled, shifted = found(), found(factor=7.0), found(shift=50.0)
    for name in ("mase", "crps", "smape", "nd", "msis", "coverage_80"):
        assert scaled[name] == pytest.approx(plain[name])
    assert scaled["mse"] == pytest.approx(49 * plain["mse"])
    assert scaled["mae"] == pytest.approx(7 * plain["mae"])
    for name in ("mase", "msis", "mse", "mae", "coverage_80"):
        assert shifted[name] == pytest.approx(plain[name])
    assert shifted["nd"] < plain["nd"] / 10


def test_rows_and_functions_agree():
    rng = np.random.default_rng(3)
    history, actual = rng.normal(size=(20, 2)), rng.normal(size=(5, 2))
    actual[1, 0] = NAN
    levels, told = (0.1, 0.5, 0.9), np.sort(rng.normal(size=(3, 5, 2)), 0)
    series = Series(name="a", values=history, variates=("x", "y"))
    forecast = SeriesForecast(series=series, mean=told[1] + 1, quantiles=told, levels=levels, season=4)
    rows = summarise([forecast], [actual]).rows()
    assert [row["variate"] for row in rows] == ["x", "y"]
    expected = {
        "mase": metrics.mase(actual, told[1], history, 4),
        "crps": metrics.weighted_quantile_loss(actual, told, levels),
        "mse": metrics.mse(actual, told[1] + 1),
        "mae": metrics.mae(actual, told[1]),
        "smape": metrics.smape(actual, told[1]),
        "nd": metrics.nd(actual, told[1]),
        "msis": metrics.msis(actual, told[0], told[2], history, 4, 0.2),
        "coverage_80": metrics.coverage(actual, told[0], told[2]),
    }
    for name, values in expected.items():
        assert [row[name] for row in rows] == pytest.approx(values.tolist())
    other = summarise([forecast], [actual], [1]).rows()
    assert [r["mase"] for r in other] == pytest.approx(metrics.mase(actual, told[1], history, 1).tolist())


def test_what_does_not_fit_together_is_refused():
    one, other = made([0, 1], [[1]], [0.5]), made([0, 1], [[1]], [0.4])
    with pytest.raises(ConfigError, match=r"forecasts must be of the same levels, got \(0.5,\) and \(0.4,\)"):
        summarise([one, other], [column(1), column(1)])
    with pytest.raises(ShapeError, match=r"series: a: the forecast is \(1, 1\), what came is \(2, 1\)"):
        summarise([one], [column(1, 2)])
    with pytest.raises(ConfigError, match="no forecast"):
        summarise([], [])


# --- batches ---

LEVELS = (0.1, 0.5, 0.9)


def batch(count=6, variates=2, horizon=3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    target = torch.randn(count, variates, horizon, generator=draw)
    observed = torch.rand(count, variates, horizon, generator=draw) < 0.7
    quantiles = torch.randn(count, variates, 3, horizon, generator=draw).sort(2).values
    return target, observed, quantiles[:, :, 1] + 0.1, quantiles


def test_batch_errors_by_hand():
    metric = ForecastErrors(2, (0.1, 0.9))
    target = torch.tensor([[[1.0, 2.0]], [[4.0, 8.0]]])
    observed = torch.tensor([[[True, True]], [[True, False]]])
    mean = torch.tensor([[[2.0, 4.0]], [[1.0, 0.0]]])
    quantiles = torch.tensor([[[[0.0, 1.0], [2.0, 1.5]]], [[[3.0, 0.0], [6.0, 0.0]]]])
    metric.update(target, observed, mean, quantiles)
    # 2 rho: of 0..2 about 1: .2 and .2; of 1..1.5 about 2: .2 and .9; of 3..6 about 4: .2 and .4
    assert {name: float(v) for name, v in metric.compute().items()} == pytest.approx(
        {"mse": 14 / 3, "mae": 6 / 3, "crps": (0.4 + 1.1 + 0.6) / 2 / 7, "coverage": 2 / 3}
    )
    by_step = metric.by_step()
    assert by_step["mse"].tolist() == pytest.approx([10 / 2, 4])
    assert by_step["crps"].tolist() == pytest.approx([(0.4 + 0.6) / 2 / 5, 1.1 / 2 / 2])
    assert by_step["coverage"].tolist() == pytest.approx([1, 0])


def test_batches_agree_with_series():
    target, observed, mean, quantiles = batch()
    metric = ForecastErrors(3, LEVELS)
    metric.update(target, observed, mean, quantiles)
    actual = target.where(observed, NAN).double().permute(0, 2, 1).reshape(-1, 2).numpy()
    flat = mean.double().permute(0, 2, 1).reshape(-1, 2).numpy()
    told = quantiles.double().permute(2, 0, 3, 1).reshape(3, -1, 2).numpy()
    by_variate = metric.by_variate()
    assert by_variate["mse"].tolist() == pytest.approx(metrics.mse(actual, flat).tolist())
    assert by_variate["mae"].tolist() == pytest.approx(metrics.mae(actual, flat).tolist())
    assert by_variate["crps"].tolist() == pytest.approx(metrics.weighted_quantile_loss(actual, told, LEVELS).tolist())
    assert by_variate["coverage"].tolist() == pytest.approx(metrics.coverage(actual, told[0], told[2]).tolist())


def test_hidden_values_do_not_matter():
    target, observed, mean, quantiles = batch()
    one, other = ForecastErrors(3, LEVELS), ForecastErrors(3, LEVELS)
    one.update(target, observed, mean, quantiles)
    other.update(target.masked_fill(~observed, NAN), observed, mean.masked_fill(~observed, 1e30), quantiles)
    assert one.compute() == other.compute()


def test_parts_of_a_batch_come_together_and_reset_forgets():
    whole, parts = ForecastErrors(3, LEVELS), ForecastErrors(3, LEVELS)
    assert not parts.seen
    whole.update(*batch())
    for row in range(6):
        parts.update(*(x[row : row + 1] for x in batch()))
        parts.by_step()  # between two batches, without harm
        parts.compute()
    for name, value in whole.compute().items():
        assert parts.compute()[name] == pytest.approx(float(value))
        assert parts.by_step()[name].tolist() == pytest.approx(whole.by_step()[name].tolist())
    parts.update(*batch(seed=1))
    fresh = ForecastErrors(3, LEVELS)
    for seed in range(2):
        fresh.update(*batch(seed=seed))
    assert parts.by_step()["mse"].tolist() == pytest.approx(fresh.by_step()["mse"].tolist())  # not those of compute
    parts.reset()
    assert not parts.seen
    parts.update(*batch(variates=5, seed=1))  # another number of variates than before
    assert len(parts.by_variate()["mse"]) == 5


def test_forward_gives_the_batch_and_keeps_the_sum():
    metric, alone = ForecastErrors(3, LEVELS), ForecastErrors(3, LEVELS)
    metric(*batch(seed=1))
    alone.update(*batch(seed=2))
    assert metric(*batch(seed=2)) == alone.compute()
    both = ForecastErrors(3, LEVELS)
    both.update(*(torch.cat(pair) for pair in zip(batch(seed=1), batch(seed=2), strict=True)))
    assert float(metric.compute()["crps"]) == pytest.approx(float(both.compute()["crps"]))


def test_processes_add_up_by_step_and_by_variate_too():
    ranks = [ForecastErrors(3, LEVELS) for _ in range(2)]
    whole = ForecastErrors(3, LEVELS)
    for rank, metric in enumerate(ranks):
        metric.update(*batch(count=4 + rank, seed=rank))
        whole.update(*batch(count=4 + rank, seed=rank))
    sums = [metric.sums for metric in ranks]
    ranks[0].dist_sync_fn = lambda tensor, group=None: sums
    ranks[0].distributed_available_fn = lambda: True
    assert ranks[0].compute() == whole.compute()
    for name in ("mse", "crps"):
        assert torch.equal(ranks[0].by_step()[name], whole.by_step()[name])
        assert torch.equal(ranks[0].by_variate()[name], whole.by_variate()[name])
    assert torch.equal(ranks[0].sums, sums[0])  # own sums are as before, so that more batches may come


def test_sums_are_in_double_precision():
    metric = ForecastErrors(1)
    known = torch.ones(1, 1, 1, dtype=torch.bool)
    metric.update(torch.full((1, 1, 1), 1e4), known, torch.zeros(1, 1, 1))
    for _ in range(50):
        metric.update(torch.ones(1, 1, 1, dtype=torch.bfloat16), known, torch.zeros(1, 1, 1, dtype=torch.bfloat16))
    assert metric.sums[1].item() == 1e8 + 50  # float32 would lose the ones
    assert metric.compute()["mse"].dtype == torch.float32
    assert set(metric.compute()) == {"mse", "mae"}


def test_a_step_that_is_never_known_is_nan():
    target, observed, mean, quantiles = batch()
    observed[..., 1] = False
    metric = ForecastErrors(3, LEVELS)
    metric.update(target, observed, mean, quantiles)
    assert metric.by_step()["mse"].isnan().tolist() == [False, True, False]
    assert metric.compute()["mse"].isfinite()


def test_batches_of_another_shape_are_refused():
    metric = ForecastErrors(3, LEVELS)
    target, observed, mean, quantiles = batch()
    with pytest.raises(ShapeError, match="needs 3 steps and 3 levels, got 3 and 0"):
        metric.update(target, observed, mean)
    with pytest.raises(ShapeError, match="needs 3 steps and 3 levels, got 4 and 3"):
        metric.update(*batch(horizon=4))
    metric.update(target, observed, mean, quantiles)
    with pytest.raises(ShapeError, match="equally many variates, got 2 and 5"):
        metric.update(*batch(variates=5))
