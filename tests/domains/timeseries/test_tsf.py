import numpy as np
import pytest
from made_series import made, put, read, refused, same

from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.tsf import TsfHeader, read_tsf_header
from vertebra.domains.timeseries.writing import write_tsf
from vertebra.errors import DataError

HEAD = """# A data set.
@relation demo
@attribute series_name string
@attribute start_timestamp date
@frequency half_hourly
@horizon 48
@missing true
@equallength false
@data
"""


@pytest.mark.parametrize("frequency", ["4s", "min", "10min", "h", "6h", "D", "B", "W", "MS", "QS", "YS", "ms", "s"])
def test_a_written_file_is_read_back(tmp_path, frequency):
    wanted = [made("T1", 12, frequency, holes=[3, 4]), made("T 2", 9, frequency, seed=1, start="2017-01-02")]
    write_tsf(tmp_path / "a.tsf.gz", wanted, relation="demo", horizon=6)
    found, left = read(tmp_path / "a.tsf.gz")
    assert left == []
    for own in wanted:
        same(found[own.name], own)
    assert read_tsf_header(tmp_path / "a.tsf.gz") == TsfHeader(
        relation="demo",
        frequency=parse_frequency(frequency),
        horizon=6,
        missing=True,
        attributes=(("series_name", "string"), ("start_timestamp", "date")),
    )


def test_series_without_stamps(tmp_path):
    wanted = [made("a", 5, start=None), made("b", 5, start=None)]
    write_tsf(tmp_path / "a.tsf", wanted)
    found, _ = read(tmp_path / "a.tsf")
    for own in wanted:
        same(found[own.name], own)
    assert read_tsf_header(tmp_path / "a.tsf").equal_length


def test_a_file_of_the_archive(tmp_path, caplog):
    caplog.set_level("INFO", "vertebra")
    path = put(tmp_path, HEAD + "T1:2015-01-01 00-30-00:1,2,?,4\nT2:2015-01-02 00-00-00:5.5,6e1\n", "a.tsf")
    found, left = read(path)
    np.testing.assert_array_equal(found["T1"].values[:, 0], [1, 2, np.nan, 4])
    assert (found["T1"].start, str(found["T1"].frequency)) == (np.datetime64("2015-01-01T00:30"), "30min")
    assert (found["T2"].values[:, 0].tolist(), left) == ([5.5, 60], [])
    assert caplog.messages == [f"{path}: @horizon 48."]
    assert str(read(path, frequency="D")[0]["T1"].frequency) == "D"


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("yearly", "YS"),
        ("quarterly", "QS"),
        ("monthly", "MS"),
        ("weekly", "W"),
        ("daily", "D"),
        ("hourly", "h"),
        ("half_hourly", "30min"),
        ("minutely", "min"),
        ("10_minutes", "10min"),
        ("15_minutes", "15min"),
        ("4_seconds", "4s"),
    ],
)
def test_every_frequency_of_the_archive(tmp_path, word, name):
    text = HEAD.replace("half_hourly", word) + "T1:1979-01-01 00-00-00:1,2,3\n"
    assert str(read(put(tmp_path, text, "a.tsf"))[0]["T1"].frequency) == name


def test_other_attributes_and_encodings(tmp_path):
    head = "@relation d\n@attribute state string\n@attribute height numeric\n@data\n"
    text = head + "Köln:5:1,2,3\nBonn:7:4,5,6\n"
    found, left = read(put(tmp_path, text.encode("cp1252").replace(b"\n", b"\r\n"), "a.tsf"))
    assert {name: own.values[:, 0].tolist() for name, own in found.items()} == {"1": [1, 2, 3], "2": [4, 5, 6]}
    assert left == []


def test_missing_values_that_the_header_denies(tmp_path, caplog):
    path = put(tmp_path, HEAD.replace("missing true", "missing false") + "T1:2015-01-01 00-30-00:1,?,3\n", "a.tsf")
    assert np.isnan(read(path)[0]["T1"].values[1, 0])
    assert caplog.messages == [f"{path}: says @missing false, yet values are missing; they are read as such."]


def test_one_bad_line_does_not_lose_the_others(tmp_path):
    text = HEAD + "T1:2015-01-01 00-30-00:1,2\nT1:2015-01-01 00-30-00:3,4\nT3:1,2\nT4:soon:1,2\n"
    text += "T5:2015-01-01 00-30-00:1,x,2\nT6:2015-01-01 00-30-00:1,inf\nT7:2015-01-01 00-30-00:\n"
    text += "T8:2015-01-01 00-30-00:1,?\n\nT9:2015-01-01 00-30-00:1,2,"
    found, left = read(put(tmp_path, text, "a.tsf"))
    assert list(found) == ["T1"]
    assert left == [
        "a.tsf: line 11: has the series_name 'T1' of line 10; give each series its own.",
        "a.tsf: line 12: has 1 attributes before the values, and the header 2; correct the line.",
        "a.tsf: line 14: has 'x' for a value, which is no finite number; write ? for no value.",
        "a.tsf: line 15: has 'inf' for a value, which is no finite number; write ? for no value.",
        "a.tsf: line 16: has '' for a value, which is no finite number; write ? for no value.",
        "a.tsf: line 19: has '' for a value, which is no finite number; write ? for no value.",
        "a.tsf: line 13: 'soon' is no time to start at; correct it.",
        "a.tsf: T8: one value is known, and at least 2 are needed; leave it out.",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.tsf: the file is empty; copy or export it again."),
        ("date,x\n", "a.tsf: line 1 must begin with @ or #, before @data; it is no .tsf file."),
        ("@relation x\n", "a.tsf: has no line @data; it is no .tsf file, or is cut short."),
        (
            "@attribute a text\n@data\n",
            "a.tsf: line 1: an attribute has a name and a kind (string, numeric, date), got '@attribute a text'; "
            "correct the header.",
        ),
        (HEAD.replace("48", "two"), "a.tsf: @horizon must be a whole number, got 'two'; correct the header."),
        (
            HEAD.replace("half_hourly", "hurly"),
            "a.tsf: @frequency: unknown frequency 'hurly'. Known: B, D, MS, QS, W, YS, h, min, ms, s, step; correct "
            "the header.",
        ),
        (
            HEAD.replace("@frequency half_hourly\n", "") + "a:2015-01-01 00-00-00:1,2\n",
            "a.tsf: series have a start, and the header no @frequency; set frequency.",
        ),
        (HEAD, "a.tsf: holds no series below @data; copy or export it again."),
    ],
)
def test_files_that_cannot_be_read(tmp_path, text, message):
    assert refused(put(tmp_path, text, "a.tsf")) == message


def test_what_the_format_cannot_hold(tmp_path):
    for own, message in (
        (made("a:b"), r"\.tsf cannot hold the name 'a:b', for its colon; rename the series\.$"),
        (made("a", known=1), r"\.tsf holds no covariates; write CSV or JSON lines\.$"),
        (made("a", width=2), r"the format holds series of one variate; write a wide table, JSON lines or \.npz\.$"),
    ):
        with pytest.raises(DataError, match=message):
            write_tsf(tmp_path / "a.tsf", [own])
