"""The data modules of series: parts by time, scales that see no future, what a model's spec rules, what is refused."""

import dataclasses
import json
import logging

import numpy as np
import pytest
import torch
from made_series import made, put, rows

from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.spec import DataSpec
from vertebra.domains.timeseries.data import SeriesData, check_series
from vertebra.domains.timeseries.generated import GeneratedData
from vertebra.domains.timeseries.sample import write_sample
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.domains.timeseries.synthetic import TRAINING
from vertebra.domains.timeseries.windows import PackedItems, SeriesAugment
from vertebra.domains.timeseries.writing import write_csv_long, write_csv_wide, write_npz
from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

SMALL = {"context": 24, "horizon": 6}
DNA = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=9)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder)
    return folder


def wide(folder, name="a.csv", **options):
    path = folder / name
    write_csv_wide(path, [made(**{"steps": 100, "width": 2, **options})])
    return str(path)


def setup(path, stage="", spec=None, **options):
    data = SeriesData(path=path, **{**SMALL, **options})
    if spec is not None:
        data.use_spec(spec)
    data.setup(stage)
    return data


def counts(data):
    found = {}
    for split in ("train", "val", "test", "predict"):
        try:
            found[split] = len(data.items(split).lengths)
        except DataError:
            continue
    return found


def everything(data, split, epoch=0):
    items = data.items(split)
    return items.fetch(np.arange(len(items.lengths)), epoch)


def same(batch, other):
    assert batch.keys() == other.keys()
    for name, values in batch.items():
        if isinstance(values, torch.Tensor):
            torch.testing.assert_close(values, other[name], atol=0, rtol=0)
        else:
            assert values == other[name]


# ---------------------------------------------------------------- parts


def test_parts_by_share(tmp_path):
    data = setup(wide(tmp_path, width=1))
    assert counts(data) == {"train": 70 - 24 - 6 + 1, "val": 10 - 6 + 1, "test": 20 - 6 + 1}
    places = {split: everything(data, split)["places"] for split in ("train", "val", "test")}
    assert places == {"train": list(range(24, 65)), "val": list(range(70, 75)), "test": list(range(80, 95))}
    values = made(steps=100).values[:, 0]
    np.testing.assert_allclose(everything(data, "test")["values"][0, 0], values[56:80], rtol=1e-6)  # looks back
    assert counts(setup(wide(tmp_path, width=1), every=10, test_every=6)) == {"train": 5, "val": 1, "test": 3}
    assert counts(setup(wide(tmp_path, width=1), val_fraction=0, test_fraction=0)) == {"train": 100 - 24 - 6 + 1}


def test_parts_by_borders(tmp_path):
    data = setup(wide(tmp_path), borders=[60, 80, 90])
    assert counts(data) == {"train": 2 * (60 - 24 - 6 + 1), "val": 2 * 15, "test": 2 * 5}
    assert max(everything(data, "test")["places"]) == 90 - 6  # rows behind the last border are not used
    assert counts(setup(wide(tmp_path), borders=(60, 80, 1000)))["test"] == 2 * 15


@pytest.mark.realdata
def test_etth1_by_the_standard_borders(shared_data):
    data = setup(
        str(shared_data / "timeseries" / "etth1" / "ETTh1.csv"),
        borders=(8640, 11520, 14400),
        context=512,
        horizon=96,
        multivariate=True,
        standardise=True,
    )
    assert counts(data) == {"train": 8640 - 512 - 96 + 1, "val": 2785, "test": 2785}
    assert data.spec.variates == ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
    items = data.items("train")
    trained = items.values[:, items.offsets[0] + np.arange(8640)].astype(np.float64)
    np.testing.assert_allclose(trained.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(trained.std(1), 1, atol=1e-6)


def test_files_of_their_own(tmp_path):
    train, val, test = (wide(tmp_path, f"{i}.csv", width=1, steps=n, seed=i) for i, n in enumerate((50, 40, 20)))
    data = setup(train, val=val, test=[test])
    assert counts(data) == {"train": 50 - 24 - 6 + 1, "val": 40 - 24 - 6 + 1, "test": 1}  # all of it trains
    assert everything(data, "val")["places"] == list(range(24, 35))
    assert everything(data, "test")["places"] == [14]
    shared = setup(train, val=val)
    assert counts(shared) == {"train": 40 - 24 - 6 + 1, "val": 11, "test": 10 - 6 + 1}


def test_predicted_is_what_comes_behind_the_end(tmp_path):
    path = wide(tmp_path)
    data = setup(path, "predict", predict=[path, wide(tmp_path, "b.csv", steps=9, width=1, seed=4)])
    batch = everything(data, "predict")
    assert batch["places"] == [100, 100, 9]
    assert not batch["target_observed"].any()
    for row, column in enumerate(made(steps=100, width=2).values.T):
        np.testing.assert_allclose(batch["values"][row, 0], column[-24:], rtol=1e-6)
    assert batch["observed"].sum(-1).flatten().tolist() == [24, 24, 9]


def test_a_model_predicts_without_the_files_of_its_training(tmp_path):
    spec = setup(wide(tmp_path)).spec
    data = setup("gone.csv", "predict", spec, val="gone_too.csv", predict=wide(tmp_path))
    assert counts(data) == {"predict": 2}
    assert data.left_out == ()


def test_long_and_wide_tables(tmp_path):
    series = [made(name, steps=100, seed=i) for i, name in enumerate(("x", "y"))]
    write_csv_long(tmp_path / "long.csv", series)
    long = setup(str(tmp_path / "long.csv"))
    write_csv_wide(tmp_path / "wide.csv", [dataclasses.replace(s, variates=(s.name,)) for s in series])
    wide = setup(str(tmp_path / "wide.csv"))
    assert set(everything(long, "train")["names"]) == {"x", "y"}
    for split in ("train", "val", "test"):
        same(everything(long, split), everything(wide, split))
    together = setup(str(tmp_path / "wide.csv"), multivariate=True)
    assert (long.spec.variates, together.spec.variates) == ((), ("x", "y"))
    assert everything(together, "test")["values"].shape == (15, 2, 24)
    torch.testing.assert_close(
        everything(together, "test")["values"].transpose(0, 1).reshape(30, 1, 24), everything(wide, "test")["values"]
    )


def test_bad_series_are_left_out_and_told(sample, caplog):
    with caplog.at_level(logging.INFO, logger="vertebra"):
        data = setup(str(sample / "bad.csv"))
    assert [left.record for left in data.left_out] == ["irregular", "duplicated", "short", "text"]
    for left in data.left_out:
        assert str(left) in caplog.messages
    assert "bad.csv: 1 series, hourly (h), 240 values, 2024-01-01 00:00 to 2024-01-10 23:00, 0 missing" in caplog.text
    assert set(everything(data, "train")["names"]) == {"good"}
    assert counts(data) == {"train": 168 - 24 - 6 + 1, "val": 19, "test": 43}


def test_a_part_that_is_missing_is_told(tmp_path):
    data = setup(wide(tmp_path, steps=40))
    assert counts(data) == {"train": 2, "test": 6}  # 4 rows cannot hold 6 steps
    with pytest.raises(
        DataError,
        match=r"^SeriesData: no val data; give data\.val, or longer series: each part must hold data\.horizon=6 "
        r"steps\.$",
    ):
        data.items("val")
    with pytest.raises(
        DataError, match=r"no predict data; give data\.predict, files to forecast the continuation of\.$"
    ):
        data.items("predict")


# ---------------------------------------------------------------- the spec


def test_what_the_spec_tells(sample):
    data = setup(str(sample / "shops.csv"), known=["promotion", "holiday"], quantiles=[0.1, 0.5, 0.9], season=7)
    spec = data.spec
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert (spec.context, spec.horizon, spec.frequency, spec.season) == (24, 6, "D", 7)
    assert (spec.variates, spec.past, spec.known, spec.quantiles) == ((), (), ("promotion", "holiday"), (0.1, 0.5, 0.9))
    assert (spec.center, len(spec.known_center)) == ((), 2)
    assert all(0 < mean < 1 for mean in spec.known_center)  # covariates are scaled in any case
    batch = everything(data, "test")
    shares = batch["known"].movedim(1, 0).flatten(1)
    raw = shares * torch.tensor(spec.known_scale)[:, None] + torch.tensor(spec.known_center)[:, None]
    there = shares != 0  # what a gap hides is the mean
    assert set(raw[there].round(decimals=4).tolist()) == {0.0, 1.0}
    assert there.float().mean() > 0.9


def test_frequencies_that_differ_are_none(tmp_path):
    paths = [wide(tmp_path, "a.csv"), wide(tmp_path, "b.csv", frequency="D")]
    assert setup(paths[0]).spec.frequency == "h"
    assert setup(paths).spec.frequency == ""


def test_scales_are_of_the_training_rows(tmp_path):
    path = wide(tmp_path, width=3, past=1, known=1, ahead=6, holes=(3, 50))
    names = {"past": ["p0"], "known": ["k0"]}
    data = setup(path, standardise=True, multivariate=True, **names)
    one, spec = made(steps=100, width=3, past=1, known=1, ahead=6, holes=(3, 50)), data.spec
    for values, center, scale in (
        (one.values, spec.center, spec.scale),
        (one.past, spec.past_center, spec.past_scale),
        (one.known, spec.known_center, spec.known_scale),
    ):
        np.testing.assert_allclose(center, np.nanmean(values[:70], 0), atol=1e-5)
        np.testing.assert_allclose(scale, np.nanstd(values[:70], 0), rtol=1e-5)


def test_units_of_many_columns_are_those_of_each(tmp_path):
    """Not those of all together, in which a column of small numbers would hardly count."""
    one = made(steps=100, width=2)
    one.values[:, 1] *= 1000
    write_csv_wide(tmp_path / "a.csv", [one])
    path = str(tmp_path / "a.csv")
    with pytest.raises(
        ConfigError,
        match=r"^SeriesData: data\.standardise scales variates, and these 2 series have no variates in common; set "
        r"data\.multivariate=true \(with model\.mode=independent each is still forecast by itself\), or leave "
        r"data\.standardise out\.$",
    ):
        setup(path, standardise=True)
    together = everything(setup(path, standardise=True, multivariate=True), "test")
    units = one.values[:70].std(0)
    for v, name in enumerate(one.variates):
        alone = everything(setup(path, standardise=True, target=[name]), "test")
        torch.testing.assert_close(together["target"][:, v : v + 1], alone["target"])
        moved = (one.values[86] - one.values[85])[v] / units[v]
        found = together["target"][-9, v, 0] - together["values"][-9, v, -1]  # forecast of row 86, from row 85
        np.testing.assert_allclose(found, moved, rtol=1e-4)


@pytest.mark.parametrize("multivariate", [True, False])
def test_no_scale_sees_the_future(tmp_path, multivariate):
    options = {"standardise": True, "multivariate": multivariate, "past": ["p0"], "known": ["k0"]}
    options["augment"] = SeriesAugment(crop=0.5, missing=0.5)
    one = made("a", steps=100, width=1 + multivariate, past=1, known=1, ahead=6, holes=(5,))
    later = (np.arange(106) >= 70)[:, None]
    other = dataclasses.replace(
        one,
        values=np.where(later[:100], 1e5, one.values),
        past=np.where(later[:100], -1e5, one.past),
        known=np.where(later, 1e5, one.known),
    )
    for number, series in enumerate((one, other)):
        write_csv_wide(tmp_path / f"{number}.csv", [series])
    first, second = (setup(str(tmp_path / f"{number}.csv"), **options) for number in range(2))
    assert first.spec == second.spec
    assert counts(first) == counts(second)
    for epoch in range(3):
        a, b = (everything(data, "train", epoch) for data in (first, second))
        drop = ("names",) if multivariate else ()  # a series of many columns is named by its file
        same({k: v for k, v in a.items() if k not in drop}, {k: v for k, v in b.items() if k not in drop})
    assert everything(second, "test")["target"].abs().min() > 1e4  # the change is there


def test_columns_that_do_not_move_or_are_not_known_keep_their_units(tmp_path):
    one = made(steps=100, width=3)
    one.values[:, 0] = 4.0
    one.values[:80, 1] = np.nan  # not known in training
    write_csv_wide(tmp_path / "a.csv", [one])
    data = setup(str(tmp_path / "a.csv"), standardise=True, multivariate=True)
    assert (data.spec.center[0], data.spec.scale[0]) == (4.0, 1.0)
    assert (data.spec.center[1], data.spec.scale[1]) == (0.0, 1.0)
    batch = everything(data, "test")
    assert batch["values"].isfinite().all()
    np.testing.assert_allclose(batch["target"][0, 1], one.values[80:86, 1], rtol=1e-5)


def test_the_spec_of_a_model_rules(tmp_path):
    one = made(steps=100, width=2, past=1, known=1, ahead=10)
    write_csv_wide(tmp_path / "a.csv", [one])
    write_csv_wide(tmp_path / "b.csv", [dataclasses.replace(one, values=10 * one.values)])
    spec = setup(str(tmp_path / "a.csv"), multivariate=True, standardise=True, past=["p0"], known=["k0"], season=5).spec
    other = {"context": 10, "horizon": 3, "season": 7, "quantiles": [0.5]}
    data = setup(str(tmp_path / "b.csv"), spec=spec, predict=str(tmp_path / "b.csv"), **other)
    assert data.spec == spec
    data.setup("predict")
    for split in ("train", "val", "test", "predict"):
        batch = everything(data, split)
        assert batch["values"].shape[1:] == (2, 24)
        assert batch["target"].shape[1:] == (2, 6)
        assert (batch["past"].shape[1:], batch["known"].shape[1:]) == ((1, 24), (1, 30))
        assert set(batch["season"].tolist()) == {5}
    wanted = (10 * one.values[-24:] - np.array(spec.center)) / np.array(spec.scale)
    np.testing.assert_allclose(batch["values"][0], wanted.T, rtol=1e-4, atol=1e-5)
    packed = SeriesSpec(context=48, horizon=6)
    rows = setup(str(tmp_path / "b.csv"), form="packed", patch=8, target=["v0"], spec=packed).items("train")
    assert rows.patches == 6


# ---------------------------------------------------------------- packed rows


def test_packed_rows_hold_all_variates_by_themselves(tmp_path):
    data = setup(wide(tmp_path), form="packed", patch=4)
    items = data.items("train")
    assert isinstance(items, PackedItems)
    assert (items.patch, items.patches) == (4, 6)
    values = made(steps=100, width=2).values
    np.testing.assert_allclose(np.concatenate(items.pieces), np.float32(values[:70].T.ravel()), rtol=1e-5)
    np.testing.assert_allclose(np.concatenate(data.items("test").pieces), np.float32(values[80:].T.ravel()), rtol=1e-5)
    assert counts(data) == {"train": 6, "val": 2, "test": 2}
    assert data.items("train").varied
    assert not data.items("val").varied
    assert set(everything(data, "train")) == {"values", "observed", "segments", "predicted", "index"}
    own = setup(wide(tmp_path), form="packed", patch=4, val=wide(tmp_path, "b.csv", steps=30))
    assert counts(own) == {"train": 2 * 4, "val": 2, "test": 2}
    with pytest.raises(DataError, match=r"^packed rows: no series has two patches of 40 steps; lower data\.patch\.$"):
        setup(wide(tmp_path), form="packed", patch=40)


# ---------------------------------------------------------------- settings and files that are refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        *(({name: 0}, rf"^SeriesData: {name} must be at least 1, got 0\.$")
          for name in ("context", "horizon", "every", "test_every", "patch")),
        ({"val_fraction": 0.5, "test_fraction": 0.5}, r"^SeriesData: val_fraction and test_fraction must be from 0 and "
         r"below 1 together, got 0\.5 and 0\.5\.$"),
        ({"val_fraction": -0.1}, r"below 1 together, got -0\.1 and 0\.2\.$"),
        ({"borders": (9, 5, 20)}, r"^SeriesData: borders must be three rising rows, where the three parts end, got "
         r"\(9, 5, 20\)\.$"),
        ({"borders": [9, 20]}, r"^SeriesData: borders must be three rising rows.* got \[9, 20\]\.$"),
        ({"borders": [0, 9, 20]}, r"^SeriesData: borders must be three rising rows"),
        ({"form": "rows"}, r"^form must be windows or packed, got 'rows'\.$"),
        *(({"form": "packed", **more}, r"^SeriesData: packed rows hold single variates as they are; leave out "
           r"standardise, multivariate, past and known, or use form=windows\.$")
          for more in ({"standardise": True}, {"multivariate": True}, {"past": ["a"]}, {"known": ["a"]})),
        ({"batch_size": 0}, r"^data: batch_size must be at least 1, got 0\.$"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        SeriesData(path="a.csv", **{**SMALL, **options})


def test_files_that_do_not_fit_are_refused(tmp_path):
    path = wide(tmp_path)
    with pytest.raises(
        ConfigError, match=r"^SeriesData: data\.borders end training at row 100, a series has 100 rows\.$"
    ):
        setup(path, borders=(100, 120, 140))
    with pytest.raises(
        DataError,
        match=r"^SeriesData: no series has a step of context and data\.horizon=70 steps in its training part; the "
        r"longest has 100 rows\. Lower data\.horizon, or give longer series\.$",
    ):
        setup(path, horizon=70)
    short = wide(tmp_path, "short.csv", steps=6)
    with pytest.raises(DataError, match=r"^SeriesData: no series of data\.val has more than data\.horizon=6 steps\.$"):
        setup(path, val=short)
    with pytest.raises(ConfigError, match=r"^SeriesData: the model is for dna, not for time series\.$"):
        setup(path, spec=DNA)
    with pytest.raises(ConfigError, match=r"^SeriesSpec: quantiles must rise, between 0 and 1, got \(0\.5, 0\.1\)\.$"):
        setup(path, quantiles=[0.5, 0.1])


def test_series_of_other_columns_are_refused(tmp_path):
    paths = [wide(tmp_path), wide(tmp_path, "b.csv", width=3)]
    for standardise in (True, False):
        with pytest.raises(
            DataError,
            match=r"b\.csv: b: the model reads the variates v0, v1 together, the series has v0, v1, v2\.$",
        ):
            setup(paths, multivariate=True, standardise=standardise)
    with pytest.raises(DataError, match=r"together, the series has v0, v1, v2\.$"):
        setup(paths[0], multivariate=True, val=paths[1])


def test_covariates_that_end_too_early_are_refused(tmp_path):
    paths = [wide(tmp_path, f"{ahead}.csv", width=1, known=1, ahead=ahead) for ahead in (6, 5)]
    options = {"known": ["k0"]}
    spec = setup(paths[0], **options).spec
    assert counts(setup(paths[0], "predict", spec, predict=paths[0], **options)) == {"predict": 1}
    with pytest.raises(
        DataError,
        match=r"5\.csv: a: the covariate k0 must be known 6 steps beyond the end, and is for 5; add rows without "
        r"a target, or lower the horizon\.$",
    ):
        setup(paths[0], "predict", spec, predict=paths[1], **options)


def test_what_a_model_needs_of_series(caplog):
    spec = SeriesSpec(
        context=8, horizon=2, past=("load", "wind"), past_center=(0.0, 0.0), past_scale=(1.0, 1.0), frequency="h"
    )
    one = made("x", width=2, past=1)
    with pytest.raises(
        DataError,
        match=r"^series: x: the model needs the past covariate load; the series has v0, v1, p0\. Add the column, and "
        r"name it with past=\[load, wind\]\.$",
    ):
        check_series(spec, [one])
    with pytest.raises(DataError, match=r"needs the past covariate wind; the series has v0, v1, load\."):
        check_series(spec, [dataclasses.replace(one, past_names=("load",))])
    known = SeriesSpec(context=8, horizon=2, known=("sale",), known_center=(0.0,), known_scale=(1.0,))
    with pytest.raises(DataError, match=r"needs the known covariate sale; .* name it with known=\[sale\]\.$"):
        check_series(known, [one])
    with pytest.raises(
        DataError, match=r"^series: x: the model reads the variates v1, v0 together, the series has v0, v1\.$"
    ):
        check_series(SeriesSpec(context=8, horizon=2, variates=("v1", "v0")), [one])
    with pytest.raises(
        DataError,
        match=r"^series: x: the model scales 1 variates, the series has 2; fit with data\.standardise=false for series "
        r"of any kind\.$",
    ):
        check_series(SeriesSpec(context=8, horizon=2, center=(0.0,), scale=(1.0,)), [one])
    hourly = SeriesSpec(context=8, horizon=2, frequency="h")
    with caplog.at_level(logging.WARNING, logger="vertebra"):
        check_series(hourly, [made("a"), made("b", start=None)])
        assert not caplog.messages
        check_series(hourly, [made("x", frequency="D")])
    assert caplog.messages == ["series: x: the model has learnt steps of h, these are D."]


def test_archives_without_stamps(tmp_path):
    write_npz(tmp_path / "a.npz", made(steps=60, start=None))
    data = setup(str(tmp_path / "a.npz"))
    assert data.spec.frequency == "step"
    assert set(everything(data, "train")["season"].tolist()) == {1}


def test_stamps_of_a_format_and_commas(tmp_path):
    text = rows([f"{i},5" for i in range(60)], header="date;x", sign=";")
    data = setup(str(put(tmp_path, text)), delimiter=";", decimal=",", date_format="%Y-%m-%d %H:%M:%S", time="date")
    assert everything(data, "test")["target"][0, 0].tolist() == [i + 0.5 for i in range(48, 54)]


# ---------------------------------------------------------------- fabricated series


def generated(**options):
    data = GeneratedData(**{"count": 12, "val_count": 5, "test_count": 4, **SMALL, "patch": 4, **options})
    data.setup("")
    return data


@pytest.mark.parametrize("form", ["windows", "packed"])
def test_fabricated_series_are_the_same_in_any_batch(form):
    data = generated(form=form, augment=SeriesAugment(crop=0.5, missing=0.5))
    items = data.items("train")
    assert [len(data.items(split).lengths) for split in ("train", "val", "test")] == [12, 5, 4]
    whole = items.fetch(np.arange(12), 3)
    same(
        generated(form=form, augment=SeriesAugment(crop=0.5, missing=0.5)).items("train").fetch(np.arange(12), 3), whole
    )
    for i in range(12):
        alone = items.fetch(np.array([i]), 3)
        assert alone["index"].tolist() == [i]
        if form == "windows":
            same(alone, {k: v[i : i + 1] for k, v in whole.items()})
        else:
            text = alone["values"][0].numpy().tobytes()
            assert any(text in row.numpy().tobytes() for row in whole["values"])


def test_fabricated_windows():
    data = generated()
    batch = everything(data, "train")
    assert batch["values"].shape == batch["observed"].shape == (12, 1, 24)
    assert batch["target"].shape == batch["target_observed"].shape == (12, 1, 6)
    assert batch["observed"].all()
    assert batch["target_observed"].all()
    assert batch["season"].shape == (12,)
    assert batch["places"] == [24] * 12
    assert batch["names"][3] == "series 3"
    assert batch["values"].isfinite().all()
    assert not everything(generated(augment=SeriesAugment(crop=1.0)), "train")["observed"].all()
    assert everything(generated(augment=SeriesAugment(crop=1.0)), "val")["observed"].all()


def test_fresh_epochs_have_other_series():
    fresh, still = generated(), generated(fresh=False)
    first = everything(fresh, "train")["values"]
    same(everything(still, "train", 0), everything(fresh, "train", 0))
    same(everything(still, "train", 1), everything(still, "train", 0))
    later = everything(fresh, "train", 1)["values"]
    assert not any((row == other).all() for row in later for other in first)
    same(everything(fresh, "val", 1), everything(fresh, "val", 0))


def test_series_that_stay_are_cropped_anew():
    still = generated(fresh=False, form="packed")
    first, second = (everything(still, "train", epoch) for epoch in (0, 1))
    assert not torch.equal(first["predicted"], second["predicted"])
    for split in ("val", "test"):
        same(everything(still, split, 1), everything(still, split, 0))


def test_splits_have_series_of_their_own():
    data = generated(count=6, val_count=6, test_count=6)
    made = [everything(data, split)["values"] for split in ("train", "val", "test")]
    made.append(everything(generated(count=6, seed=1), "train")["values"])
    rows = {row.numpy().tobytes() for values in made for row in values}
    assert len(rows) == 24


def test_kinds_of_series():
    assert generated().items("test").families == generated().items("train").families == TRAINING
    first, *_, last = TRAINING
    data = generated(families=[first], test_families=[last])
    assert [data.items(split).families for split in ("train", "val", "test")] == [(first,), (first,), (last,)]
    assert not torch.equal(everything(data, "val")["values"], everything(generated(families=[last]), "val")["values"])


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"families": ["nothing"]}, UnknownNameError, r"unknown family of series 'nothing'"),
        ({"test_families": ["nothing"]}, UnknownNameError, r"unknown family of series 'nothing'"),
        (
            {"families": []},
            ConfigError,
            r"^GeneratedData: families must not be empty; leave it out for the usual ones\.$",
        ),
        ({"test_families": []}, ConfigError, r"^GeneratedData: test_families must not be empty"),
        ({"count": 0}, ConfigError, r"^GeneratedData: count must be at least 1, got 0\.$"),
        ({"val_count": 0}, ConfigError, r"^GeneratedData: val_count must be at least 1, got 0\.$"),
        ({"test_count": -1}, ConfigError, r"^GeneratedData: test_count must be at least 1, got -1\.$"),
        ({"patch": 0, "form": "packed"}, ConfigError, r"^GeneratedData: patch must be at least 1, got 0\.$"),
        (
            {"context": 7, "form": "packed"},
            ConfigError,
            r"^GeneratedData: context must hold two patches of 4 steps, got ",
        ),
        ({"form": "rows"}, ConfigError, r"^form must be windows or packed, got 'rows'\.$"),
    ],
)
def test_fabrications_that_cannot_be_are_refused(options, kind, text):
    with pytest.raises(kind, match=text):
        GeneratedData(**{**SMALL, "patch": 4, **options})


def test_fabricated_series_follow_the_spec_of_a_model():
    data = GeneratedData(count=3, val_count=3, test_count=3, **SMALL)
    data.use_spec(SeriesSpec(context=16, horizon=4))
    data.setup("fit")
    assert everything(data, "train")["values"].shape == (3, 1, 16)
    assert data.spec == SeriesSpec(context=16, horizon=4)
    with pytest.raises(
        DataError, match=r"no predict data; forecast files with data\.class_path=\S+\.SeriesData instead"
    ):
        data.items("predict")
    other = GeneratedData(**SMALL)
    other.use_spec(DNA)
    with pytest.raises(ConfigError, match=r"^GeneratedData: the model is for dna, not for time series\.$"):
        other.setup("fit")
