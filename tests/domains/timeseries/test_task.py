"""The task of forecasts: training, metrics against a slow way, files, rows of predictions, and what is refused."""

import csv
import math

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from made_series import made

from vertebra.domains.base import PredictionWriter, load_task
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.timeseries.baselines import SeasonalNaive
from vertebra.domains.timeseries.data import SeriesData
from vertebra.domains.timeseries.generated import GeneratedData
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.sample import write_sample
from vertebra.domains.timeseries.sources import SourceOptions, read_series
from vertebra.domains.timeseries.task import ForecastTask, seasonal_naive
from vertebra.domains.timeseries.writing import write_csv_wide
from vertebra.errors import ConfigError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the average of the weights is
LOGGED = ("loss", "mse", "mae", "crps", "coverage", "naive_mse", "naive_mae")


@pytest.fixture(scope="module")
def power(tmp_path_factory):
    return str(write_sample(tmp_path_factory.mktemp("sample"))[0])


def data(power, **options):
    return SeriesData(
        **{
            "path": power,
            "context": 48,
            "horizon": 12,
            "borders": [600, 700, 800],
            "every": 10,
            "test_every": 9,
            "batch_size": 32,
            **options,
        }
    )


def task(backbone="illama_test,causal=false", **options):
    return ForecastTask(backbone, **{"patch": 12, **options})


def trainer(folder, **options):
    settings = {
        "max_steps": 4,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "logger": False,
        "accelerator": "cpu",
        **options,
    }
    return Trainer(default_root_dir=folder, enable_model_summary=False, **settings)


def rows(path):
    with path.open() as f:
        return list(csv.DictReader(f))


def slow_metrics(model, items):
    """Metrics of windows, each by itself in float64."""
    found = []
    for i in range(len(items.places)):
        batch = items.fetch(np.array([i]), 0)
        made = model.forecast(batch)
        truth = batch["target"][0].double().numpy()
        truth[~batch["target_observed"][0].numpy()] = np.nan
        known = batch["values"][0].double().numpy()
        season = int(batch["season"])
        naive = np.stack([known[:, known.shape[1] - season + h % season] for h in range(truth.shape[1])], axis=1)
        found.append((truth, made.mean[0].double().numpy(), made.quantiles[0].double().numpy(), naive))
    truth, mean, told, naive = (np.stack(parts) for parts in zip(*found, strict=True))
    losses = [
        2 * np.where(truth > q, level * (truth - q), (1 - level) * (q - truth))
        for level, q in zip(model.spec.quantiles, told.swapaxes(0, 2).swapaxes(1, 2), strict=True)
    ]
    inside = (truth >= told[:, :, 0]) & (truth <= told[:, :, -1])
    there = np.isfinite(truth)
    squares = {"": (truth - mean) ** 2, "naive_": (truth - naive) ** 2}
    return {
        **{f"{name}mse": np.nanmean(values) for name, values in squares.items()},
        **{f"{name}mae": np.nanmean(np.sqrt(values)) for name, values in squares.items()},
        "crps": np.nanmean(losses) * there.sum() / np.nansum(np.abs(truth)),
        "coverage": inside[there].mean(),
    }, {name: (np.nanmean(v, (0, 1)), np.nanmean(v, (0, 2))) for name, v in squares.items()}


# ---------------------------------------------------------------- windows


def test_fit_test_and_what_is_left(power, tmp_path):
    made, series = task(ema=0.5), data(power, multivariate=True, standardise=True)
    fit = trainer(tmp_path)
    fit.fit(made, series)
    assert fit.global_step == 4
    assert set(fit.callback_metrics) == {"train/loss", *(f"val/{name}" for name in LOGGED)}
    (found,) = fit.test(made, series, verbose=False)
    assert set(found) == {f"test/{name}" for name in LOGGED}

    items, model = series.items("test"), made.final_model.eval()
    assert model is made.ema.module
    wanted, squares = slow_metrics(model, items)
    for name, value in wanted.items():
        assert found[f"test/{name}"] == pytest.approx(value, rel=1e-4), name
    whole = model.losses(items.fetch(np.arange(len(items.places)), 0))["loss"].item()
    assert found["test/loss"] == pytest.approx(whole, rel=1e-5)

    assert made.write_results(tmp_path) == ["horizon.csv", "variates.csv"]
    for file, key, names, axis in (
        ("horizon.csv", "step", [str(i + 1) for i in range(12)], 0),
        ("variates.csv", "variate", ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "OT"], 1),
    ):
        table = rows(tmp_path / file)
        assert list(table[0]) == [key, "mse", "mae", "naive_mse", "naive_mae"]
        assert [row[key] for row in table] == names
        for column, name in (("mse", ""), ("naive_mse", "naive_")):
            np.testing.assert_allclose([float(row[column]) for row in table], squares[name][axis], rtol=1e-4)
        for column in ("mae", "naive_mae"):
            assert np.mean([float(row[column]) for row in table]) == pytest.approx(found[f"test/{column}"], rel=1e-4)

    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt").eval()
    batch = items.fetch(np.arange(3), 0)
    torch.testing.assert_close(again.final_model.forecast(batch).mean, model.forecast(batch).mean, atol=0, rtol=0)
    assert not torch.equal(made.model.in_proj.weight, model.in_proj.weight)
    other = load_model(save_model(model, tmp_path / "model"))
    torch.testing.assert_close(other.forecast(batch).quantiles, model.forecast(batch).quantiles, atol=0, rtol=0)


def test_missing_values_do_not_count(tmp_path):
    one = made(steps=200, holes=range(165, 180), width=2)
    write_csv_wide(tmp_path / "a.csv", [one])
    series = data(str(tmp_path / "a.csv"), borders=[120, 150, 200], test_every=5)
    made_task = task()
    series.setup("")
    made_task.build(series.spec)
    made_task.eval()
    (found,) = trainer(tmp_path).test(made_task, series, verbose=False)
    items = series.items("test")
    batch = items.fetch(np.arange(len(items.places)), 0)
    assert not batch["target_observed"].all()
    assert batch["target_observed"].any(-1).all()
    mean = made_task.model.forecast(batch).mean
    there = batch["target_observed"]
    assert found["test/mse"] == pytest.approx(((batch["target"] - mean)[there] ** 2).mean().item(), rel=1e-4)
    naive = seasonal_naive(batch, 12)
    assert found["test/naive_mae"] == pytest.approx((batch["target"] - naive)[there].abs().mean().item(), rel=1e-4)


def test_single_variates_and_points(power, tmp_path):
    made, series = task(head="point", readout="flatten"), data(power)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(made, series)
    (found,) = fit.test(made, series, verbose=False)
    assert set(found) == {f"test/{n}" for n in ("loss", "mse", "mae", "naive_mse", "naive_mae")}
    assert made.write_results(tmp_path) == ["horizon.csv", "variates.csv"]
    assert [row["variate"] for row in rows(tmp_path / "variates.csv")] == ["1"]
    assert found["test/mse"] == pytest.approx(float(rows(tmp_path / "variates.csv")[0]["mse"]), rel=1e-4)


def test_a_few_steps_learn(power, tmp_path):
    made, series = task(optimizer={"lr": 3e-3}), data(power, batch_size=64)
    fit = trainer(tmp_path, max_steps=30)
    losses = []
    series.setup("")
    made.build(series.spec)
    items = series.items("val")
    batch = items.fetch(np.arange(len(items.places)), 0)
    losses.append(made.model.eval().losses(batch)["loss"].item())
    fit.fit(made.train(), series)
    losses.append(made.model.eval().losses(batch)["loss"].item())
    assert losses[1] < 0.8 * losses[0]


# ---------------------------------------------------------------- packed rows


@pytest.mark.parametrize("causal", ["true", "false"])
def test_packed_rows_log_the_loss_alone(power, tmp_path, causal):
    made = task(f"tsfm_test,causal={causal}", head="mixture", tell_observed=False)
    series = data(power, form="packed", patch=12)
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(made, series)
    assert fit.global_step == 3
    assert set(fit.callback_metrics) == {"train/loss", "val/loss"}
    (found,) = fit.test(made, series, verbose=False)
    assert set(found) == {"test/loss"}
    assert math.isfinite(found["test/loss"])
    items = series.items("test")
    whole = made.model.eval().losses(items.fetch(np.arange(len(items.lengths)), 0))["loss"].item()
    assert found["test/loss"] == pytest.approx(whole, rel=1e-4)
    assert made.write_results(tmp_path) == []


def test_fabricated_packed_rows(tmp_path):
    made = task("tsfm_test,causal=false", head="mixture", tell_observed=False)
    series = GeneratedData(
        count=24, val_count=8, test_count=8, context=96, horizon=12, form="packed", patch=12, batch_size=8
    )
    fit = trainer(tmp_path, max_steps=3)
    fit.fit(made, series)
    assert set(fit.callback_metrics) == {"train/loss", "val/loss"}
    assert math.isfinite(fit.callback_metrics["val/loss"])


# ---------------------------------------------------------------- predictions


def test_predictions_are_rows_in_units_of_the_file(power, tmp_path):
    options = {"multivariate": True, "standardise": True, "predict": power, "quantiles": [0.1, 0.5, 0.9]}
    made, series = task(), data(power, **options)
    fit = trainer(tmp_path, max_steps=2)
    fit.fit(made, series)
    path = tmp_path / "predictions.csv"
    trainer(tmp_path, callbacks=[PredictionWriter(path)]).predict(made, series, return_predictions=False)
    found = rows(path)
    assert list(found[0]) == ["series", "variate", "step", "mean", "0.1", "0.5", "0.9"]
    names = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "OT")
    assert [(row["variate"], row["step"]) for row in found] == [(n, str(i + 1)) for n in names for i in range(12)]
    (one,) = read_series([power], SourceOptions(multivariate=True))[0]
    (wanted,) = SeriesForecaster(made.final_model).forecast([one])
    table = np.array([[float(row[name]) for name in ("mean", "0.1", "0.5", "0.9")] for row in found])
    table = table.reshape(6, 12, 4)
    np.testing.assert_allclose(table[..., 0], wanted.mean.T, rtol=1e-4)
    np.testing.assert_allclose(table[..., 1:], wanted.quantiles.transpose(2, 1, 0), rtol=1e-4)
    last = one.values[-48:]
    assert (np.abs(wanted.mean - last.mean(0)) < 6 * last.std(0)).all()  # in its own units


def test_predictions_of_many_series(power, tmp_path):
    made, series = task(), data(power, predict=power, batch_size=4)
    trainer(tmp_path, max_steps=1).fit(made, series)
    path = tmp_path / "predictions.csv"
    trainer(tmp_path, callbacks=[PredictionWriter(path)]).predict(made, series, return_predictions=False)
    found = rows(path)
    names = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "OT")
    assert [(row["series"], row["variate"], row["step"]) for row in found] == [
        (name, "1", str(i + 1)) for name in names for i in range(12)
    ]
    assert list(found[0])[3:] == ["mean", *(f"0.{i}" for i in range(1, 10))]


# ---------------------------------------------------------------- the last season


@pytest.mark.parametrize("season", [1, 5, 12, 24, 60])
def test_the_last_season_is_that_of_the_baselines(season):
    values = torch.randn(3, 2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).float()
    batch = {"values": values, "observed": torch.ones(3, 2, 60, dtype=torch.bool), "season": torch.full((3,), season)}
    found = seasonal_naive(batch, 31)
    for row, window in zip(found, values, strict=True):
        mean, _ = SeasonalNaive().moments(window.T.double().numpy(), 31, season)
        np.testing.assert_allclose(row.T, mean, rtol=1e-6)


def test_a_context_shorter_than_a_season_has_its_mean():
    values = torch.tensor([[[0.0, 0.0, 3.0, 5.0]]])
    observed = torch.tensor([[[False, False, True, True]]])
    batch = {"values": values, "observed": observed, "season": torch.tensor([24])}
    assert seasonal_naive(batch, 3).tolist() == [[[4.0, 4.0, 4.0]]]
    batch["season"] = torch.tensor([3])
    assert seasonal_naive(batch, 3).tolist() == [[[4.0, 3.0, 5.0]]]


# ---------------------------------------------------------------- settings


def test_settings_reach_the_model(power):
    series = data(power, multivariate=True)
    series.setup("")
    made = task(patch=8, mode="multivariate", seasonal=True, squash=True, dropout=0.25, tell_observed=False)
    made.build(series.spec)
    assert isinstance(made.model, PatchForecaster)
    assert (made.model.patch, made.model.mode, made.model.seasonal, made.model.squash) == (
        8,
        "multivariate",
        True,
        True,
    )
    assert (made.model.dropout.p, made.model.tell_observed) == (0.25, False)
    assert made.model.arguments["head"] == "quantile"
    made = task(head="point", readout="flatten", stride=6, shortcut=True, error="huber", space="data")
    made.build(series.spec)
    assert (made.model.stride, made.model.readout, made.model.space) == (6, "flatten", "data")
    assert made.model.param_proj.error == "huber"
    assert made.model.shortcut is not None
    assert (task().monitor, task(monitor="val/mse").monitor, task().monitor_mode) == ("val/loss", "val/mse", "min")


def test_what_cannot_be_is_refused(power):
    other = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=9)
    with pytest.raises(ConfigError, match=r"^ForecastTask needs time series, but the data is for the domain dna\.$"):
        task().build(other)
    with pytest.raises(ConfigError, match=r"^ForecastTask: ema must be from 0 \(none\) and below 1, got 1\.0\.$"):
        task(ema=1.0)
    series = data(power)
    series.setup("")
    with pytest.raises(ConfigError, match=r"mode=multivariate needs series with the same named variates; set data\."):
        task(mode="multivariate").build(series.spec)
