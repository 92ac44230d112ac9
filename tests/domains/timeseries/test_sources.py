import numpy as np
import pytest
from made_series import made, put, read, refused, rows, same

from vertebra.domains.timeseries.sources import LeftOut, SourceOptions, describe, find_series, read_series
from vertebra.domains.timeseries.writing import write_csv_long, write_csv_wide, write_jsonl, write_npz, write_tsf
from vertebra.errors import ConfigError, DataError

KINDS = (
    "give files .csv, .tsv, .txt, .json, .jsonl, .tsf, .npz, .parquet (text also with .gz), a data set of GluonTS, or "
    "folders of them"
)


# --- files and folders ---


def test_a_folder_of_all_kinds(tmp_path):
    own = made("x", 12, known=1, ahead=2)
    (tmp_path / "b").mkdir()
    write_csv_wide(tmp_path / "b" / "part_10.csv", [own])
    write_csv_long(tmp_path / "b" / "part_9.csv.gz", [own])
    write_jsonl(tmp_path / "c.jsonl", [own])
    write_tsf(tmp_path / "d.tsf", [made("y", 12)])
    write_npz(tmp_path / "e.npz", own)
    put(tmp_path, "what this is", "README.txt")
    put(tmp_path, "junk", ".hidden.csv")
    found, left = read_series([tmp_path], SourceOptions(target=None))
    names = [series.name for series in found]
    assert names == ["b/part_9/x", "b/part_10/x", "k0", "c/x", "y", "e/x"]
    assert left == []
    same(found[5], own, names=False)
    assert found[4].source == str(tmp_path / "d.tsf")


def test_one_bad_file_does_not_lose_the_others(tmp_path):
    good, bad = put(tmp_path, rows(range(5)), "a.csv"), put(tmp_path, "", "b.csv")
    found, left = read_series([bad, tmp_path / "no.csv", good, tmp_path / "a.xlsx", tmp_path])
    assert [own.name for own in found] == ["x"]
    assert [str(own) for own in left] == [
        f"{tmp_path}/no.csv: there is no such file or folder; correct the path.",
        f"{tmp_path}/a.xlsx: there is no such file or folder; correct the path.",
        f"{bad}: the file is empty; copy or export it again.",
    ]
    with pytest.raises(DataError, match=r"/b\.csv: the file is empty; copy or export it again\.$"):
        read_series([bad])


def test_paths_at_which_nothing_is(tmp_path):
    assert refused(tmp_path).endswith(f": no series are in this folder; {KINDS}.")
    assert refused(put(tmp_path, "PK", "a.xlsx")) == f"a.xlsx: '.xlsx' is not a kind of file that is read; {KINDS}."
    assert refused(put(tmp_path, "PK", "data")) == f"data: 'no ending' is not a kind of file that is read; {KINDS}."
    with pytest.raises(ConfigError) as e:
        read_series([])
    assert str(e.value) == f"no series are given; {KINDS}."
    left: list[LeftOut] = []
    path = put(tmp_path, rows(range(5)))
    assert find_series([path, tmp_path / "." / "a.csv", tmp_path], left) == [path]
    assert left == []


def test_what_is_left_out_reads_as_a_sentence():
    assert str(LeftOut("a.csv", "", "is empty; copy it again")) == "a.csv: is empty; copy it again."
    assert str(LeftOut("a.csv", "x", "is empty; copy it again")) == "a.csv: x: is empty; copy it again."


# --- describe ---


def test_a_set_is_described_in_a_line(tmp_path):
    assert describe([]) == "no series"
    path = put(tmp_path, rows(["1,", "2,4", "3,4", "4,5"], header="date,x,y"))
    found, _ = read_series([path])
    assert describe(found) == (
        "a.csv: 2 series, hourly (h), 3 to 4 values, 2016-07-01 00:00 to 2016-07-01 03:00, 0 missing"
    )
    wide = made("a", 2000, "15min", width=3, holes=[5])
    assert describe([wide]) == (
        "series: 1 series of 3 variates, every 15 minutes (15min), 2,000 values, 2016-07-01 00:00 to 2016-07-21 19:45, "
        "3 missing"
    )
    mixed = [*found, made("b", 5, start=None), made("c", 5, "MS")]
    assert describe(mixed).startswith("2 files: 4 series, hourly (h), without stamps, monthly (MS), 3 to 5 values, ")
    assert describe([made("b", 5, start=None)]) == "series: 1 series, without stamps, 5 values, 0 missing"


# --- NumPy archives ---


@pytest.mark.parametrize("width", [1, 3])
def test_a_written_archive_is_read_back(tmp_path, width):
    wanted = made("x", 12, "W", width=width, holes=[3], past=2, known=1, ahead=4)
    write_npz(tmp_path / "x.npz", wanted)
    found, left = read(tmp_path / "x.npz", multivariate=True)
    same(found["x"], wanted)
    assert (found["x"].variates, left) == (("x",) if width == 1 else wanted.variates, [])
    found, _ = read(tmp_path / "x.npz")
    assert list(found) == (["x"] if width == 1 else ["v0", "v1", "v2"])
    np.testing.assert_array_equal(next(reversed(found.values())).values[:, 0], wanted.values[:, -1])


def test_archives_with_and_without_facts(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, values=np.arange(5))
    found, _ = read(path)
    assert (found["a"].values[:, 0].tolist(), found["a"].start) == ([0, 1, 2, 3, 4], None)
    np.savez(path, x=np.arange(5.0), y=np.arange(9.0), z=np.arange(8.0).reshape(4, 2))
    found, _ = read(path)
    assert {name: len(own) for name, own in found.items()} == {"x": 5, "y": 9, "z_0": 4, "z_1": 4}
    assert list(read(path, target=("y",))[0]) == ["y"]
    np.savez(path, values=np.arange(6.0).reshape(3, 2), start="2016-07-01", freq="D", names=["x", "y"])
    found, _ = read(path, target=("y",))
    assert (list(found), found["y"].start, str(found["y"].frequency)) == (["y"], np.datetime64("2016-07-01"), "D")
    stamps = ["2016-07-01", "2016-07-02", "2016-07-04"]
    np.savez(path, values=np.arange(3.0), stamps=stamps)
    np.testing.assert_array_equal(read(path)[0]["a"].values[:, 0], [0, 1, np.nan, 2])
    np.savez(path, values=np.arange(3.0), stamps=np.array(stamps, "datetime64[D]"))
    assert len(read(path)[0]["a"]) == 4
    np.savez(path, values=np.arange(3.0), stamps=[1467331200, 1467334800, 1467338400])
    assert str(read(path)[0]["a"].frequency) == "h"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"freq": "h"}, "holds no array of values; write it with numpy.savez(file, values=...)."),
        ({"values": np.array(["a"])}, "values: must be numbers (T,) or (T, V), got <U1 (1,); write it so."),
        ({"x": np.zeros((2, 2, 2))}, "x: must be numbers (T,) or (T, V), got float64 (2, 2, 2); write it so."),
        ({"values": [1, np.inf]}, "values: is infinite in row 2; write nan for no value."),
        ({"values": [1, 2], "names": ["a", "b"]}, "names must be 1 different ones, as many as variates, got 2."),
        ({"values": [1, 2], "freq": "hurly"}, "freq: unknown frequency 'hurly'. Known: B, D, MS, QS, W, YS, h, min, "
         "ms, s, step."),
        ({"values": [1, 2], "stamps": ["2016-07-01"]}, "stamps must be 2, as many as values, got 1."),
        ({"values": [1, 2], "stamps": ["2016-07-01", "soon"]}, "stamps 2 is no time; correct it."),
        ({"values": [1, 2], "start": "2016-07-01"}, "has a start and no freq; set frequency."),
        ({"values": [1, 2], "known": [1]}, "known must be finite numbers (2, ...), got int64 (1,)."),
        ({"values": [1, 2], "past": [1, 2], "past_names": ["a", "b"]}, "past_names must be 1, as many as columns of "
         "past, got 2."),
        ({"values": [1, 2], "known": [1, 2, 3], "stamps": ["2016-07-01", "2016-07-02"]}, "known goes beyond stamps; "
         "write stamps for its rows too, or freq."),
    ],
)  # fmt: skip
def test_archives_that_cannot_be_read(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    assert refused(tmp_path / "a.npz") == f"a.npz: {message}"


def test_damaged_archives(tmp_path):
    np.savez(tmp_path / "a.npz", values=np.zeros(100))
    data = (tmp_path / "a.npz").read_bytes()
    for bad in (b"", data[:200], b"date,x\n", np.array([None]).dumps()):
        assert refused(put(tmp_path, bad, "b.npz")) == (
            "b.npz: is no archive of plain arrays, or is empty, damaged or cut short; write it with numpy.savez."
        )
    np.savez(tmp_path / "a.npz", values=[1, 2])
    assert refused(tmp_path / "a.npz", target=("x",)) == ("a.npz: there is no variate 'x' for target; variates: a.")


# --- real files ---


@pytest.mark.realdata
def test_real_series(shared_data):
    path = shared_data / "timeseries" / "etth1" / "ETTh1.csv"
    found, left = read_series([path])
    assert [own.name for own in found] == ["HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT"]
    assert left == []
    assert describe(found) == (
        "ETTh1.csv: 7 series, hourly (h), 17,420 values, 2016-07-01 00:00 to 2018-06-26 19:00, 0 missing"
    )
    assert found[6].values[:2, 0].tolist() == [30.5310001373291, 27.78700065612793]
    whole = read_series([path], SourceOptions(multivariate=True))[0][0]
    assert (whole.values.shape, whole.name) == ((17420, 7), "ETTh1")
