"""timeseries/forecast: three formats, backtests, covariates, values in Python, what is refused."""

import csv
import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.saving import save_model
from vertebra.domains.timeseries.frequency import Frequency, parse_frequency
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.sample import write_sample
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.spec import QUANTILES, SeriesSpec
from vertebra.domains.timeseries.writing import write_csv_long, write_csv_wide, write_jsonl, write_npz
from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.pipelines import base
from vertebra.pipelines.base import pipeline
from vertebra.pipelines.demo import timeseries as demo
from vertebra.pipelines.demo.base import Demo
from vertebra.pipelines.report import Report
from vertebra.pipelines.timeseries import ForecastSeries

HORIZON = 6
LEVELS = [f"{level:g}" for level in QUANTILES]


def wave(steps=60, seed=0, width=1, frequency="h", name="load", start="2024-03-01", **facts):
    """Waves of a day with noise, that rise."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps)[:, None]
    values = 50 + 10 * np.sin(2 * np.pi * (t / 24 + np.arange(width) / 5)) + 0.05 * t + rng.normal(size=(steps, width))
    return Series(
        name=name,
        values=values,
        variates=(name,) if width == 1 else tuple(f"{name}_{i}" for i in range(width)),
        frequency=parse_frequency(frequency),
        start=np.datetime64(start, "ms"),
        **facts,
    )


def shop(steps=50, ahead=HORIZON, seed=0, name="tea"):
    """Days with two covariates that are known ahead."""
    rng = np.random.default_rng(seed)
    known = rng.normal(size=(steps + ahead, 2))
    one = wave(steps, seed, frequency="D", name=name, known=known, known_names=("promotion", "holiday"))
    return dataclasses.replace(one, variates=("target",))


def forecaster(causal=False, *, covariates=False, variates=(), **settings):
    """An untrained model whose forecasts depend on all it reads."""
    torch.manual_seed(1)
    names = ("promotion", "holiday") if covariates else ()
    zeros, ones = (0.0,) * len(names), (1.0,) * len(names)
    spec = SeriesSpec(context=32, horizon=HORIZON, variates=variates, known=names, known_center=zeros, known_scale=ones)
    settings = {"patch": 8, "head": "quantile", "seasonal": True, **settings}
    model = PatchForecaster(create_backbone("illama_test", causal=causal), spec, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return forecaster()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return str(save_model(model, tmp_path_factory.mktemp("models") / "m"))


def work(model, **options):
    return pipeline("timeseries/forecast", model, **{"figures": 0, "device": "cpu", **options})


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def numbers(rows, columns):
    return np.array([[float(row[name]) for name in columns] for row in rows])


def by_hand(model, series, horizon=HORIZON, levels=None):
    (made,) = SeriesForecaster(model).forecast([series], horizon, levels)
    return made


def wide(folder, series, name="power.csv"):
    write_csv_wide(folder / name, series)
    return folder / name


def long(folder, series, name="shops.csv"):
    write_csv_long(folder / name, series)
    return folder / name


# ---------------------------------------------------------------- what is written


def test_three_formats_hold_the_same(model, tmp_path):
    series = wave(width=2)
    path = wide(tmp_path, [series])
    for ending in ("csv", "parquet", "json"):
        result = work(model).run([path], tmp_path / f"o.{ending}")
        assert (result.good, result.bad) == (2, 0)
        assert [p.name for p in result.paths] == [f"o.{ending}"]
    rows = rows_of(tmp_path / "o.csv")
    assert list(rows[0]) == ["item", "stamp", "mean", *LEVELS]
    assert [row["item"] for row in rows] == ["load_0"] * HORIZON + ["load_1"] * HORIZON
    assert [row["stamp"] for row in rows[:2]] == ["2024-03-03 12:00:00", "2024-03-03 13:00:00"]
    made = by_hand(model, series)
    np.testing.assert_allclose(numbers(rows, ["mean"])[:, 0], made.mean.T.ravel(), rtol=1e-6)
    np.testing.assert_allclose(numbers(rows, LEVELS).T, made.quantiles.swapaxes(1, 2).reshape(9, -1), rtol=1e-6)
    assert np.std(numbers(rows, LEVELS), axis=0).min() > 0.01  # the model says something

    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names == list(rows[0])
    assert table["stamp"].to_pylist()[0].isoformat() == "2024-03-03T12:00:00"
    columns = np.array([table[name].to_numpy() for name in ("mean", *LEVELS)]).T
    np.testing.assert_allclose(columns, numbers(rows, ("mean", *LEVELS)), rtol=1e-6)

    entries = json.loads((tmp_path / "o.json").read_text())
    assert [entry["item_id"] for entry in entries] == ["load_0", "load_1"]
    first = entries[0]
    assert list(first) == ["item_id", "start", "freq", "season", "mean", "quantiles"]
    assert (first["start"], first["freq"], first["season"]) == ("2024-03-03 12:00:00", "h", 24)
    assert list(first["quantiles"]) == LEVELS
    np.testing.assert_allclose(first["quantiles"]["0.9"], numbers(rows[:HORIZON], ["0.9"])[:, 0], rtol=1e-6)


def test_variates_of_one_series_have_a_column(model, tmp_path):
    series = wave(width=3)
    path = wide(tmp_path, [series])
    for ending in ("csv", "json"):
        assert work(model, multivariate=True).run([path], tmp_path / f"o.{ending}").good == 1
    rows = rows_of(tmp_path / "o.csv")
    assert list(rows[0])[:4] == ["item", "stamp", "variate", "mean"]
    assert [row["variate"] for row in rows] == [f"load_{i}" for i in range(3) for _ in range(HORIZON)]
    (entry,) = json.loads((tmp_path / "o.json").read_text())
    assert (entry["item_id"], entry["variates"]) == ("power", ["load_0", "load_1", "load_2"])
    assert np.shape(entry["mean"]) == (3, HORIZON)
    np.testing.assert_allclose(np.ravel(entry["mean"]), numbers(rows, ["mean"])[:, 0], rtol=1e-6)


def test_horizon_and_levels(model, tmp_path):
    path = wide(tmp_path, [wave()])
    work(model, horizon=15, quantiles=[0.1, 0.25, 0.5]).run([path], tmp_path / "o.csv")
    rows = rows_of(tmp_path / "o.csv")
    assert list(rows[0]) == ["item", "stamp", "mean", "0.1", "0.25", "0.5"]
    assert len(rows) == 15
    made = by_hand(model, wave(), 15, (0.1, 0.25, 0.5))
    np.testing.assert_allclose(numbers(rows, ["0.25"])[:, 0], made.quantiles[1, :, 0], rtol=1e-6)


def test_a_model_of_means_tells_no_quantiles(tmp_path):
    point = forecaster(head="point", seasonal=False)
    path = wide(tmp_path, [wave(80)])
    result = work(point, backtest=2, figures=1).run([path], tmp_path / "o.csv")
    assert list(rows_of(tmp_path / "o.csv")[0]) == ["item", "stamp", "mean"]
    assert rows_of(tmp_path / "o.csv.backtest.csv")[0]["crps"] == ""
    assert "CRPS" not in str(result)
    with pytest.raises(ConfigError, match=r"the model tells no quantiles, only means; leave quantiles out\.$"):
        work(point, quantiles=[0.5])


@pytest.mark.parametrize("causal", [False, True])
def test_alone_or_in_any_batch_a_series_has_the_same_forecast(causal, tmp_path):
    model = forecaster(causal)
    series = [wave(20 + 9 * i, seed=i, name=f"s{i}", frequency="D") for i in range(5)]
    path = long(tmp_path, [dataclasses.replace(s, variates=("target",)) for s in series])
    options = {"horizon": 14, "backtest": 2}
    tables, tests = [], []
    for name, more in (("a", {}), ("b", {"batch_size": 1}), ("c", {"batch_size": 2}), ("d", {"batch_tokens": 100})):
        work(model, **options, **more).run([path], tmp_path / f"{name}.csv")
        tables.append(rows_of(tmp_path / f"{name}.csv"))
        tests.append(rows_of(tmp_path / f"{name}.csv.backtest.csv"))
    alone = []
    for one in series:
        work(model, **options).run([long(tmp_path, [one], f"{one.name}.csv")], tmp_path / "one.csv")
        alone += rows_of(tmp_path / "one.csv")
    whole = ("mean", *LEVELS)
    for other in (*tables[1:], alone):
        assert [(row["item"], row["stamp"]) for row in other] == [(row["item"], row["stamp"]) for row in tables[0]]
        np.testing.assert_allclose(numbers(other, whole), numbers(tables[0], whole), rtol=2e-6)
    for other in tests[1:]:
        np.testing.assert_allclose(numbers(other, ["mae"]), numbers(tests[0], ["mae"]), rtol=1e-4)


def test_names_in_several_files_stay_apart(model, tmp_path):
    paths = [wide(tmp_path, [wave(seed=i)], f"north{i}.csv") for i in range(2)]
    result = work(model).run(paths, tmp_path / "o.csv")
    rows = rows_of(tmp_path / "o.csv")
    assert list(rows[0])[:3] == ["file", "item", "stamp"]
    found = list(dict.fromkeys((row["file"], row["item"]) for row in rows))
    assert found == [(str(paths[0]), "load"), (str(paths[1]), "north1/load")]
    assert result.good == 2
    work(model, backtest=1).run(paths, tmp_path / "o.json")
    entries = json.loads((tmp_path / "o.json").read_text())
    assert [(entry["file"], entry["item_id"]) for entry in entries] == found
    assert [(row["file"], row["item"]) for row in rows_of(tmp_path / "o.json.backtest.csv")] == found


def test_series_without_stamps_are_counted(model, tmp_path):
    still = Series(name="pump", values=wave(40).values, variates=("pump",))
    write_npz(tmp_path / "m.npz", still)
    for ending in ("csv", "json", "parquet"):
        result = work(model).run([tmp_path / "m.npz"], tmp_path / f"o.{ending}")
    assert [row["stamp"] for row in rows_of(tmp_path / "o.csv")] == [str(i) for i in range(40, 46)]
    assert json.loads((tmp_path / "o.json").read_text())[0]["start"] == 40
    assert pq.read_table(tmp_path / "o.parquet")["stamp"].to_pylist() == list(range(40, 46))
    assert str(result).startswith("1 series: without stamps, no season\n")
    paths = [tmp_path / "m.npz", wide(tmp_path, [wave()])]
    work(model).run(paths, tmp_path / "both.parquet")
    stamps = pq.read_table(tmp_path / "both.parquet")["stamp"].to_pylist()
    assert (stamps[0], stamps[HORIZON]) == ("40", "2024-03-03 12:00:00")


def test_figures_of_the_first_series(model, tmp_path):
    path = wide(tmp_path, [wave(width=3)])
    result = work(model, figures=2).run([path], tmp_path / "o.csv")
    assert [p.name for p in result.paths] == ["o.csv", "o.csv.png", "o.csv.2.load_1.png"]
    assert (tmp_path / "o.csv.2.load_1.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- backtests


def test_a_backtest_by_hand(model, tmp_path):
    series = wave(90)
    result = work(model, backtest=3, stride=4).run([wide(tmp_path, [series])], tmp_path / "o.csv")
    assert [p.name for p in result.paths] == ["o.csv", "o.csv.backtest.csv", "o.csv.backtest.json"]
    rows = rows_of(tmp_path / "o.csv.backtest.csv")
    assert [int(row["origin"]) for row in rows] == [76, 80, 84]
    assert rows[0]["stamp"] == "2024-03-04 04:00:00"
    assert (rows[0]["item"], rows[0]["variate"]) == ("load", "load")
    wanted = []
    for origin in (76, 80, 84):
        history, actual = series.cut(0, origin), series.values[origin : origin + HORIZON, 0]
        made = by_hand(model, history)
        naive = series.values[origin - 24 : origin - 24 + HORIZON, 0]
        scale = np.abs(history.values[24:] - history.values[:-24]).mean()
        quantiles = made.quantiles[..., 0]
        away = actual - quantiles
        levels = np.array(QUANTILES)[:, None]
        pinball = np.maximum(levels * away, (levels - 1) * away)
        wanted.append(
            {
                "mase": np.abs(actual - made.median[:, 0]).mean() / scale,
                "mse": ((actual - made.mean[:, 0]) ** 2).mean(),
                "crps": 2 * pinball.mean(0).sum() / np.abs(actual).sum(),
                "smape": (2 * np.abs(actual - made.median[:, 0]) / (np.abs(actual) + np.abs(made.median[:, 0]))).mean(),
                "coverage_80": ((actual >= quantiles[0]) & (actual <= quantiles[-1])).mean(),
                "naive_mase": np.abs(actual - naive).mean() / scale,
                "naive_mse": ((actual - naive) ** 2).mean(),
            }
        )
    for row, own in zip(rows, wanted, strict=True):
        assert {name: float(row[name]) for name in own} == pytest.approx(own, rel=1e-5)
    facts = json.loads((tmp_path / "o.csv.backtest.json").read_text())
    mase, naive = (np.mean([own[name] for own in wanted]) for name in ("mase", "naive_mase"))
    assert facts["model"]["mase"] == pytest.approx(mase, rel=1e-5)
    assert facts["seasonal_naive"]["mase"] == pytest.approx(naive, rel=1e-5)
    assert facts["ratio"]["mase"] == pytest.approx(mase / naive, rel=1e-5)
    assert (facts["horizon"], facts["windows"], facts["stride"], facts["series"]) == (HORIZON, 3, 4, 1)
    lines = str(result).splitlines()
    assert lines[0] == "backtest of 1 series, 3 windows of 6 steps:"
    assert lines[1].split() == ["model", "seasonal", "naive", "ratio"]
    assert lines[2].split() == ["MASE", f"{mase:.4g}", f"{naive:.4g}", f"{mase / naive:.4g}"]
    assert [line.split()[0] for line in lines[3:6]] == ["CRPS", "MSE", "sMAPE"]
    assert lines[6].startswith("  in the 80 % band")
    assert len(lines[6].split()) == 7  # no ratio


def test_a_backtest_does_not_change_the_forecast_nor_see_what_comes(model, tmp_path):
    series = wave(70)
    work(model).run([wide(tmp_path, [series])], tmp_path / "a.csv")
    work(model, backtest=2).run([wide(tmp_path, [series])], tmp_path / "b.csv")
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()
    (made,) = work(model, backtest=1)([series])
    (window,) = made.windows
    changed = dataclasses.replace(series, values=np.where(np.arange(70)[:, None] < 64, series.values, 1e4))
    (other,) = work(model, backtest=1)([changed])
    np.testing.assert_array_equal(other.windows[0].forecast.quantiles, window.forecast.quantiles)


def test_short_series_are_forecast_and_not_tested(model, tmp_path):
    path = long(tmp_path, [dataclasses.replace(wave(n, name=f"s{n}"), variates=("target",)) for n in (4, 40)])
    result = work(model, backtest=2).run([path], tmp_path / "o.csv")
    assert result.good == 2
    assert "too short for a backtest: s4\n" in str(result)
    assert json.loads((tmp_path / "o.csv.backtest.json").read_text())["too_short"] == ["s4"]
    result = work(model, backtest=2, horizon=50).run([path], tmp_path / "p.csv")
    assert [p.name for p in result.paths] == ["p.csv"]
    assert str(result).startswith(
        "no backtest: no series has a value before and in its last 50 steps; lower --horizon, or give longer series\n"
    )


def test_season_of_model_and_naive(model, tmp_path):
    path = wide(tmp_path, [wave(90)])
    results = [work(model, backtest=1, season=season).run([path], tmp_path / "o.csv") for season in (None, 12)]
    assert "1 series: frequency h (found), season of 24 steps" in str(results[0])
    assert "1 series: frequency h (found), season of 12 steps" in str(results[1])
    row = rows_of(tmp_path / "o.csv.backtest.csv")[0]
    values = wave(90).values[:, 0]
    assert float(row["naive_mae"]) == pytest.approx(np.abs(values[84:] - values[72:78]).mean(), rel=1e-5)
    (usual,), (other,) = (work(model, season=season)([wave(90)]) for season in (24, 12))
    assert np.abs(usual.value - other.value).max() > 1e-3


# ---------------------------------------------------------------- covariates and variates


def test_covariates_of_the_model_are_found_in_any_order(tmp_path):
    model = forecaster(covariates=True)
    series = shop()
    path = long(tmp_path, [series])
    expected = by_hand(model, series).median[:, 0]
    (made,) = work(model)(path)
    np.testing.assert_allclose(made.value, expected, rtol=1e-5)
    (turned,) = work(model, known=["holiday", "promotion"])(path)
    np.testing.assert_allclose(turned.value, expected, rtol=1e-5)
    swapped = dataclasses.replace(series, known=series.known[:, ::-1], known_names=("holiday", "promotion"))
    np.testing.assert_allclose(work(model)(swapped).value, expected, rtol=1e-5)
    other = dataclasses.replace(series, known=-series.known)
    assert np.abs(work(model)(other).value - expected).max() > 1e-2
    (plain,) = work(forecaster(), known=["promotion", "holiday"])(path)  # which reads none
    assert plain.forecast.series.known_names == ()


def test_missing_covariates_are_listed(tmp_path):
    model = forecaster(covariates=True)
    bare = dataclasses.replace(shop(), known=np.zeros((0, 0)), known_names=())
    path = long(tmp_path, [bare])
    wanted = (
        r"shops\.csv: there is no column 'promotion' for known; columns: unique_id, ds, y\. The model reads the "
        r"covariates promotion, holiday; add the columns, or use another model\.$"
    )
    with pytest.raises(DataError, match=wanted):
        work(model)(path)
    with pytest.raises(DataError, match=wanted):
        work(model).run([path], tmp_path / "o.csv")
    with pytest.raises(
        DataError,
        match=r"tea: lacks the known covariates promotion, holiday, which the model reads; columns: target\. Name them "
        r"with known: promotion holiday\.$",
    ):
        work(model)(bare)
    one = long(tmp_path, [shop()], "one.csv")
    with pytest.raises(
        DataError,
        match=r"tea.*: lacks the known covariate promotion, which the model reads; columns: y, holiday\. Name it with "
        r"known: promotion holiday\.$",
    ):
        work(model, known=["holiday"])(one)


def test_a_horizon_beyond_the_covariates(tmp_path):
    model = forecaster(covariates=True)
    early = shop(ahead=10)
    early.known[-3:, 1] = np.nan
    good = shop(ahead=10, seed=1, name="coffee")
    result = work(model, horizon=10).run([long(tmp_path, [early, good])], tmp_path / "o.csv")
    assert (result.good, result.bad) == (1, 1)
    (bad,) = map(json.loads, (tmp_path / "o.csv.errors.jsonl").read_text().splitlines())
    assert bad["record"] == "tea"
    assert bad["rule"] == (
        "the covariate holiday is known for 7 steps beyond the end, and the horizon is 10: 3 are missing"
    )
    assert bad["advice"] == "add rows without a target, or lower the horizon"
    assert work(model, horizon=7)(early).value.shape == (7,)
    with pytest.raises(DataError, match=r"for 7 steps beyond the end, and the horizon is 8: 1 is missing; add rows"):
        work(model, horizon=8)(early)


def test_a_model_of_several_variates_takes_its_columns(tmp_path):
    model = forecaster(mode="multivariate", variates=("load_2", "load_0"), seasonal=False)
    series = wave(width=3)
    path = wide(tmp_path, [series])
    (made,) = work(model)(path)
    chosen = dataclasses.replace(series, values=series.values[:, [2, 0]], variates=("load_2", "load_0"))
    np.testing.assert_allclose(made.value, by_hand(model, chosen).median, rtol=1e-5)
    np.testing.assert_allclose(work(model)(series.values[:, [2, 0]]).value, made.value, rtol=1e-5)
    with pytest.raises(DataError, match=r"there is no column 'load_2' for target; columns: date, load_0, load_1\.$"):
        work(model)(wide(tmp_path, [wave(width=2)], "two.csv"))
    with pytest.raises(DataError, match=r"the model reads the variates load_2, load_0 together, the series has target"):
        work(model)(series.values[:, 0])


# ---------------------------------------------------------------- bad series, the command line


def test_bad_series_do_not_lose_the_good_ones(saved, tmp_path, capsys):
    path = long(tmp_path, [dataclasses.replace(wave(seed=i, name=n), variates=("y",)) for i, n in enumerate("ab")])
    text = path.read_text().splitlines()
    text[5] = text[5].rsplit(",", 1)[0] + ",broken"
    path.write_text("\n".join(text) + "\n")
    (tmp_path / "empty.csv").write_text("")
    out = tmp_path / "o.csv"
    words = ["run", "timeseries/forecast", str(path), str(tmp_path / "empty.csv"), "-o", str(out), "--model", saved]
    assert main([*words, "--device", "cpu", "--backtest", "2", "--frequency", "h"]) == 3
    assert {row["item"] for row in rows_of(out)} == {"b"}
    bad = [json.loads(line) for line in (tmp_path / "o.csv.errors.jsonl").read_text().splitlines()]
    assert [(b["record"], b["rule"], b["advice"]) for b in bad] == [
        ("a", "line 6 has 'broken' in the column 'y', which is no finite number", "correct it, or leave it empty"),
        ("", "the file is empty", "copy or export it again"),
    ]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "backtest of 1 series, 2 windows of 6 steps:"
    assert lines[-2] == "1 series: frequency h (given), season of 24 steps"
    assert lines[-1].startswith("1 records done, 2 bad (listed in ")


def test_options_of_the_command_line(saved, tmp_path):
    path = tmp_path / "odd.csv"
    days = [np.datetime64("2024-01-01") + i for i in range(50)]
    rows = [f"{day.item():%d.%m.%Y};{i % 7},5;{i};{i % 2}" for i, day in enumerate(days)]
    path.write_text("when;sales;visits;sun\n" + "\n".join(rows) + "\n")
    words = ["run", "timeseries/forecast", str(path), "-o", str(tmp_path / "o.csv"), "--model", saved, "--time", "when"]
    words += ["--target", "sales", "--past", "sun", "--decimal", ",", "--date-format", "%d.%m.%Y", "--layout", "wide"]
    words += ["--quantiles", "0.1", "0.9", "--horizon", "3", "--figures", "1", "--history", "9", "--delimiter", ";"]
    assert main(words) == 0
    rows = rows_of(tmp_path / "o.csv")
    assert list(rows[0]) == ["item", "stamp", "mean", "0.1", "0.9"]
    assert [(row["item"], row["stamp"]) for row in rows] == [
        ("sales", "2024-02-20 00:00:00"), ("sales", "2024-02-21 00:00:00"), ("sales", "2024-02-22 00:00:00"),
    ]  # fmt: skip
    assert (tmp_path / "o.csv.png").exists()


def test_folders_and_gluonts(model, tmp_path):
    folder = tmp_path / "data"
    (folder / "set" / "train").mkdir(parents=True)
    (folder / "set" / "metadata.json").write_text('{"freq": "h"}')
    write_jsonl(folder / "set" / "train" / "data.json", [wave(name="road")])
    wide(folder, [wave(seed=3)])
    result = work(model).run([folder], tmp_path / "o.csv")
    assert [row["item"] for row in rows_of(tmp_path / "o.csv")[::HORIZON]] == ["load", "road"]
    assert result.good == 2
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"nothing: no series are in this folder; give files \.csv"):
        work(model).run([tmp_path / "nothing"], tmp_path / "o.csv")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"horizon": 0}, r"timeseries/forecast: horizon must be at least 1, got 0\.$"),
        ({"season": 0}, r"timeseries/forecast: season must be at least 1, got 0\.$"),
        ({"history": 0}, r"timeseries/forecast: history must be at least 1, got 0\.$"),
        ({"backtest": -1}, r"timeseries/forecast: backtest must be 0 or more, got -1\.$"),
        ({"figures": -1}, r"timeseries/forecast: figures must be 0 or more, got -1\.$"),
        ({"stride": 4}, r"timeseries/forecast: stride is for a backtest; give backtest too, or leave it out\.$"),
        ({"quantiles": [0.5, 0.1]}, r"timeseries/forecast: quantiles must rise, between 0 and 1, got 0\.5 0\.1\.$"),
        ({"quantiles": [0.5, 1]}, r"timeseries/forecast: quantiles must rise, between 0 and 1, got 0\.5 1\.0\.$"),
        ({"quantiles": [0.01]}, r"quantiles: the model has learnt levels from 0\.1 to 0\.9, got 0\.01; ask for levels"),
        ({"layout": "tall"}, r"layout must be one of auto wide long; got 'tall'\.$"),
        ({"frequency": "fortnight"}, r"^unknown frequency 'fortnight'"),
        ({"horizont": 3}, r"timeseries/forecast: no option 'horizont'\. Did you mean 'horizon'\?"),
    ],
)
def test_impossible_settings(model, options, text):
    with pytest.raises((ConfigError, UnknownNameError), match=text):
        work(model, **options)


# ---------------------------------------------------------------- Python


def test_values_in_python(model, tmp_path):
    series = wave()
    expected = by_hand(model, series).median[:, 0]
    made = work(model)(series)
    assert (made.name, made.value.shape, made.label) == ("load", (HORIZON,), "median")
    np.testing.assert_allclose(made.value, expected, rtol=1e-6)
    hourly = work(model, frequency="h")
    np.testing.assert_allclose(hourly(series.values[:, 0]).value, expected, rtol=1e-6)
    assert hourly(series.values[:, 0]).forecast.season == 24
    entry = {"target": series.values[:, 0].tolist(), "start": "2024-03-01", "freq": "h", "item_id": "load"}
    same = work(model)(entry)
    np.testing.assert_allclose(same.value, expected, rtol=1e-6)
    assert json.loads(same.to_json()) == json.loads(made.to_json())
    (from_file,) = work(model)(wide(tmp_path, [series]))
    np.testing.assert_allclose(from_file.value, expected, rtol=1e-6)
    several = hourly([series.values[:, 0], wave(width=2).values, series])
    assert [one.name for one in several] == ["series_1", "series_2", "load"]
    assert several[1].value.shape == (HORIZON, 2)
    assert several[1].forecast.series.variates == ("target_0", "target_1")


def test_a_prediction_is_drawn_and_saved(model, tmp_path):
    made = work(model, backtest=1)(wave(width=2))
    assert [axes.get_title(loc="left") for axes in made.figure().axes] == ["load_0", "load_1"]
    assert made.figure().get_suptitle() == "load: 6 hours ahead"
    quarter = work(model)(wave(frequency="15min"))
    assert quarter.figure().get_suptitle() == "load: 6 steps of 15 minutes ahead"
    rows = rows_of(made.save(tmp_path / "o.csv"))
    assert list(rows[0]) == ["item", "stamp", "variate", "mean", *LEVELS]
    np.testing.assert_allclose(numbers(rows, ["0.5"])[:, 0], made.value.T.ravel(), rtol=1e-6)
    entry = json.loads(made.save(tmp_path / "o.json").read_text())
    assert entry["start"] == "2024-03-03 12:00:00"
    np.testing.assert_allclose(entry["quantiles"]["0.5"], made.value.T, rtol=1e-6)
    assert made.save(tmp_path / "o.png").read_bytes().startswith(b"\x89PNG")


def test_entries_with_covariates_and_gaps():
    model = forecaster(covariates=True)
    series = shop()
    values = series.values.copy()
    values[[3, 30]] = np.nan
    entry = {
        "target": [None if np.isnan(v) else v for v in values[:, 0]],
        "start": np.datetime64("2024-03-01"),
        "freq": "D",
        "feat_dynamic_real": series.known.T.tolist(),
    }
    made = work(model)(entry)
    np.testing.assert_allclose(made.value, by_hand(model, dataclasses.replace(series, values=values)).median[:, 0])
    assert made.forecast.series.frequency == Frequency(1, "D")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (3.5, r"series 1: must be a path, a Series, a dict with a target, or an array .*, got float\.$"),
        ("power.csv", r"series 1: must be a path, .*, got str\.$"),
        (np.zeros((2, 3, 4)), r"series 1: must be .*, got ndarray of shape \(2, 3, 4\)\.$"),
        (np.full(5, np.nan), r"series: series_1: holds no value; leave it out\.$"),
        (np.array([1.0, np.inf]), r"series_1: the value of row 2 is infinite; correct it or leave it empty\.$"),
        ({"start": "2024-01-01"}, r"series_1: has no target; keys: start\.$"),
        (
            {"target": [1.0], "frequency": "h"},
            r"series_1: 'frequency' is no key of a series; keys: target, start, freq",
        ),
        ({"target": [1.0, 2.0], "start": "2024-01-01"}, r"series_1: has a start and no freq; give freq too, or leave"),
        (
            {"target": [1.0], "start": "soon", "freq": "h", "item_id": "a"},
            r"a: start 'soon' is no time; write it as 2016",
        ),
        ({"target": ["x"]}, r"series_1: target must be numbers \(T,\) or \(V, T\); write None for no value\.$"),
        ({"target": [[[1.0]]]}, r"series_1: target must be numbers \(T,\) or \(V, T\), got the shape \(1, 1, 1\)\.$"),
    ],
)
def test_values_that_are_no_series(model, value, text):
    with pytest.raises(DataError, match=text):
        work(model)(value)


def test_help_tells_the_options(capsys):
    assert main(["run", "timeseries/forecast", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--horizon", "--quantiles", "--backtest", "--stride", "--known", "--date-format", "--multivariate"):
        assert option in text
    assert ForecastSeries.default_model == "timeseries_zero"


@pytest.mark.slow
def test_the_demo_shows_a_backtest_formats_and_bad_series(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(ForecastSeries, "default_model", saved)
    monkeypatch.setattr(base, "bundled_models", lambda: {saved: saved})
    write_sample(tmp_path / "sample", seed=0)
    (tmp_path / "results").mkdir()
    report = Report("demo")
    demo.show(Demo(tmp_path / "sample", tmp_path / "results", report, lambda name: None))
    page = report.write(tmp_path / "report.html").read_text()
    assert page.count("<img") == 4
    assert page.count("vertebra run timeseries/forecast") == 3
    for expected in ("seasonal naive", "MASE", "4 series cannot be used", "is not on the grid of h"):
        assert expected in page
    entries = pq.read_table(tmp_path / "results" / "forecasts.parquet")
    assert len(entries) == 24 * (2 + 8 + 10 + 4 + 3)


@pytest.mark.realdata
def test_electricity_transformers(shared_data, model, tmp_path):
    path = shared_data / "timeseries" / "etth1" / "ETTh1.csv"
    if not path.is_file():
        pytest.skip("ETTh1.csv is not here")
    result = work(model, horizon=24, backtest=2).run([path], tmp_path / "o.csv")
    assert (result.good, result.bad) == (7, 0)
    rows = rows_of(tmp_path / "o.csv")
    assert [row["item"] for row in rows[::24]] == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert rows[0]["stamp"] == "2018-06-26 20:00:00"
    assert "7 series: frequency h (found), season of 24 steps" in str(result)
    facts = json.loads((tmp_path / "o.csv.backtest.json").read_text())
    assert 0.3 < facts["seasonal_naive"]["mase"] < 3
