"""The fabricated files: read as what they are, the same again, and worth a fit."""

import argparse
import contextlib

import numpy as np
import pytest

from vertebra.cli import main
from vertebra.domains.timeseries import sample
from vertebra.domains.timeseries.sources import SourceOptions, read_series
from vertebra.domains.timeseries.synthetic import draw
from vertebra.errors import ConfigError

KNOWN = SourceOptions(known=("promotion", "holiday"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    sample.write_sample(root)
    return root


def read(path, options=None):
    series, left = read_series([path], options)
    assert not left
    return series


def naive(values, lag):
    """The mean error of taking the value a lag ago, as a share of the mean deviation."""
    return np.abs(values[lag:] - values[:-lag]).mean() / np.abs(values - values.mean()).mean()


# ---------------------------------------------------------------- files


def test_same_seed_same_bytes(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = sample.write_sample(folder)  # over the first
    assert set(again) == set(before)
    assert len(again) == len(before) == 10
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sum(map(len, before.values())) < 2e6


def test_another_seed_other_numbers(folder, tmp_path):
    for path in sample.write_sample(tmp_path / "new", 1):
        same = path.read_bytes() == (folder / path.relative_to(tmp_path / "new")).read_bytes()
        assert same == (path.name == "metadata.json")


def test_power(folder):
    assert (folder / "power.csv").read_text().startswith("date,HUFL,HULL,MUFL,MULL,LUFL,OT\n2023-01-02 00:00:00,")
    (power,) = read(folder / "power.csv", SourceOptions(multivariate=True))
    assert power.values.shape == (sample.HOURS, 6)
    assert str(power.frequency) == "h"
    assert np.isfinite(power.values).all()
    correlation = np.corrcoef(power.values.T)
    assert correlation[0, 1] > 0.7  # of one line
    assert 0.3 < correlation[0, 2] < 0.9
    assert correlation[0, 5] > 0.2
    useful = power.values[:, 2]
    assert naive(useful, 24) < 0.8 < naive(useful, 12)  # days are alike
    assert naive(useful, 168) < naive(useful, 24)  # and weeks more so
    assert naive(power.values[:, 5], 1) < 0.4


def test_shops(folder):
    shops = read(folder / "shops.csv", KNOWN)
    assert [series.name for series in shops] == [f"item_{i:02}" for i in range(12)]
    assert len({len(series) for series in shops}) > 6
    missing = 0
    for series in shops:
        assert str(series.frequency) == "D"
        assert series.known_names == ("promotion", "holiday")
        assert len(series.known) == len(series) + sample.AHEAD
        sales = series.values[:, 0]
        known = series.known[: len(sales)]
        seen = np.isfinite(sales)
        missing += int((~seen).sum())
        assert np.isfinite(sales[-1])
        plain = np.median(sales[seen & (known.sum(1) == 0)])
        assert np.median(sales[seen & (known[:, 0] == 1) & (known[:, 1] == 0)]) > 1.3 * plain
        assert (sales[seen] == np.round(sales[seen])).all()
    assert missing == 15
    closed = np.concatenate([s.values[s.known[: len(s), 1] == 1, 0] / np.nanmedian(s.values) for s in shops])
    assert np.nanmedian(closed) < 0.4


def test_visitors(folder):
    lines = (folder / "visitors.csv").read_text().splitlines()
    assert lines[0] == "date;museum;gallery"
    assert lines[1].startswith("02.01.2023;0,")
    museum, gallery = read(folder / "visitors.csv")
    assert str(museum.start)[:10] == "2023-01-02"
    assert (len(museum), str(museum.frequency)) == (900, "D")
    assert (gallery.values[::7] == 0).all()  # Mondays
    assert (museum.values > 0).all()


def test_monthly_and_traffic(folder):
    monthly = read(folder / "monthly.tsf")
    assert [series.name for series in monthly] == [f"T{i}" for i in range(1, 9)]
    assert {str(series.frequency) for series in monthly} == {"MS"}
    assert "@horizon 12" in (folder / "monthly.tsf").read_text()
    roads = read(folder / "traffic")
    assert len(roads) == 10
    shorter = read(folder / "traffic" / "train" / "data.json.gz")
    for road, cut in zip(roads, shorter, strict=True):
        assert (road.name, str(road.frequency)) == (cut.name, "h")
        assert len(road) == len(cut) + 24
        np.testing.assert_array_equal(road.values[: len(cut)], cut.values)
        assert 0 < road.values.min() < road.values.max() <= 1


def test_sensors_and_machines(folder):
    rooms = read(folder / "sensors.parquet")
    assert [str(series.frequency) for series in rooms] == ["15min"] * 4
    assert [int(np.isnan(series.values).sum()) for series in rooms] == [0, 0, 19, 0]
    assert all(12 < np.nanmin(series.values) < np.nanmax(series.values) < 25 for series in rooms)
    machines = read(folder / "machines.npz")
    assert [series.name for series in machines] == ["mill", "lathe", "saw"]
    for series in machines:
        assert series.start is None
        assert naive(series.values[:, 0], 40) < 0.3 < naive(series.values[:, 0], 20)


def test_bad_series_are_left_out_and_the_good_one_kept(folder):
    series, left = read_series([folder / "bad.csv"])
    assert [(own.name, len(own)) for own in series] == [("good", 240)]
    said = {own.record: own.reason for own in left if own.record}
    words = {"irregular": "not on the grid", "duplicated": "more than once", "short": "at least 2", "text": "'shut'"}
    assert said.keys() == words.keys()
    assert all(text in said[name] for name, text in words.items())


# ---------------------------------------------------------------- families


def test_series_of_a_family(tmp_path, capsys):
    asked = ["sample", "timeseries", "--family", "kernel", "--count", "12", "--length", "80", "--seed", "4"]
    assert main([*asked, "-o", str(tmp_path / "made")]) == 0
    said = capsys.readouterr()
    assert said.out.endswith(f"wrote 1 sample files to {tmp_path / 'made'}\n")
    assert not said.err  # no bar where nobody looks
    series = read(tmp_path / "made" / "kernel.parquet")
    assert [own.name for own in series] == [f"kernel_{i:02}" for i in range(12)]
    for i, own in enumerate(series):
        assert str(own.frequency) == "step"
        np.testing.assert_array_equal(own.values[:, 0], draw("kernel", 80, [4, i]).values)


@pytest.mark.parametrize("count", [1, 100, 101, 250])
def test_a_bar_moves_on_to_its_end(tmp_path, count):
    told = []

    @contextlib.contextmanager
    def bar(*what):
        told.append(what)
        yield told.append

    options = argparse.Namespace(family="tides", count=count, length=16, seed=0)
    (path,) = sample.from_args(tmp_path, options, bar)
    assert path == tmp_path / "tides.parquet"
    assert told[0] == ("tides", count, "series")
    assert sum(told[1:]) == count
    assert min(told[1:]) > 0


def test_the_sample_without_a_family(tmp_path, folder):
    options = argparse.Namespace(family=None, count=None, length=None, seed=0)
    paths = sample.from_args(tmp_path, options, contextlib.nullcontext)
    assert [path.relative_to(tmp_path) for path in paths] == [
        path.relative_to(folder) for path in sample.write_sample(folder)
    ]
    with pytest.raises(ConfigError, match="--count and --length go with --family NAME; give it too"):
        sample.from_args(
            tmp_path, argparse.Namespace(family=None, count=3, length=None, seed=0), contextlib.nullcontext
        )


def test_what_cannot_be_made(tmp_path, capsys):
    def says(*words):
        assert main(["sample", "timeseries", *words, "-o", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "unknown family of series 'tide'. Did you mean 'tides'" in says("--family", "tide")
    assert "--count must be at least 1, got 0" in says("--family", "tides", "--count", "0")
    assert "length must be at least 8" in says("--family", "tides", "--length", "5")
    assert "go with --family NAME" in says("--length", "50")
    assert not list(tmp_path.iterdir())
    assert main(["sample", "timeseries", "--help"]) == 0
    assert "growth_seasonal" in capsys.readouterr().out
