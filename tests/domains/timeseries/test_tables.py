import gzip

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from made_series import made, put, read, refused, rows, same

from vertebra.domains.timeseries.sources import SourceOptions
from vertebra.domains.timeseries.writing import write_csv_long, write_csv_wide, write_parquet
from vertebra.errors import ConfigError, DataError


def long(series, head="unique_id,ds,y"):
    lines = [f"{name},2016-07-{day + 1:02d},{value}" for name, own in series.items() for day, value in enumerate(own)]
    return "\n".join([head, *lines]) + "\n"


def column(series):
    return series.values[:, 0].tolist()


# --- wide ---


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.tsv", "a.txt"])
@pytest.mark.parametrize(
    ("delimiter", "decimal"), [(",", "."), (";", ","), ("\t", "."), ("|", ","), (";", "."), (",", ",")]
)
def test_a_written_wide_table_is_read_back(tmp_path, name, delimiter, decimal):
    wanted = [made("x", 12, holes=[3]), made("y y", 9, seed=1, start="2016-07-01T02")]
    write_csv_wide(tmp_path / name, wanted, delimiter=delimiter, decimal=decimal)
    found, left = read(tmp_path / name)
    assert (list(found), left) == (["x", "y y"], [])
    for own in wanted:
        same(found[own.name], own)
    assert [p.name for p in tmp_path.iterdir()] == [name]  # no parts left


def test_a_wide_table_as_one_series(tmp_path):
    wanted = made("a", 20, "MS", "2015-01-31", width=3, past=1, known=2, ahead=4, holes=[2])
    write_csv_wide(tmp_path / "a.csv", [wanted])
    found, _ = read(tmp_path / "a.csv", multivariate=True, past=("p0",), known=("k0", "k1"))
    same(found["a"], wanted)
    assert found["a"].variates == ("v0", "v1", "v2")
    found, _ = read(tmp_path / "a.csv", past=("p0",), known=("k0", "k1"))
    assert list(found) == ["v0", "v1", "v2"]
    np.testing.assert_array_equal(found["v1"].known, wanted.known)
    found, _ = read(tmp_path / "a.csv", target=("v2", "v0"), multivariate=True)
    assert found["a"].variates == ("v2", "v0")
    np.testing.assert_array_equal(found["a"].values, wanted.values[:, [2, 0]])


def test_future_rows_keep_known_covariates_alone(tmp_path, caplog):
    path = put(tmp_path, rows(["1,5", "2,6", "3,7", ",8", ",9", ","], header="date,x,k"))
    series = read(path, known=("k",))[0]["x"]
    assert (column(series), series.known[:, 0].tolist()) == ([1, 2, 3], [5, 6, 7, 8, 9])
    assert caplog.messages == [f"{path}: x: rows at the end without a value, cut off: 1."]
    path = put(tmp_path, rows([",5", "2,6", "3,7", ",8"], header="date,x,k"))
    series = read(path, known=("k",))[0]["x"]
    assert series.known[:, 0].tolist() == [6, 7, 8]
    assert series.start == np.datetime64("2016-07-01T01")


def test_the_column_of_stamps_is_found(tmp_path):
    for head in ("date,x", "x,Timestamp", "when,x", "x,when", ",x"):
        cells = [f"2016-07-0{i},{i}" if not head.startswith("x") else f"{i},2016-07-0{i}" for i in range(1, 6)]
        found, _ = read(put(tmp_path, "\n".join([head, *cells])))
        assert column(found["x"]) == [1, 2, 3, 4, 5]
        assert str(found["x"].start)[:10] == "2016-07-01"


def test_numbered_columns_and_an_index_without_a_name(tmp_path):
    found, _ = read(put(tmp_path, rows(["1,2", "3,4", "2,2"], header="date,0,1")))
    assert list(found) == ["0", "1"]
    found, _ = read(put(tmp_path, ",date,x\n0,2016-07-01,4\n1,2016-07-02,5\n2,2016-07-03,5\n"))
    assert list(found) == ["x"]


def test_a_table_without_stamps_is_counted(tmp_path, caplog):
    path = put(tmp_path, "x,y\n1,4\n2,5\n3,7\n")
    found, _ = read(path)
    assert (str(found["x"].frequency), found["x"].start, column(found["x"])) == ("step", None, [1, 2, 3])
    assert caplog.messages == [f"{path}: no column of stamps is found; rows are counted. Name one as time."]
    assert str(read(path, frequency="h")[0]["x"].frequency) == "h"


def test_counted_rows_have_gaps_too(tmp_path):
    found, _ = read(put(tmp_path, "ds,x\n1,5\n2,6\n4,7\n"))
    np.testing.assert_array_equal(found["x"].values[:, 0], [5, 6, np.nan, 7])
    assert found["x"].start is None
    text = "ds,x\n2,5\n4,6\n6,6\n9,7\n"
    assert refused(put(tmp_path, text)) == ("a.csv: rows are counted in steps of 2, but 9 comes after 6; correct it.")


def test_empty_cells_are_missing_values(tmp_path):
    words = ["1", "", "NaN", " NA ", "null", "None", "?", "-", "+2", "1e2", "-.5"]
    found, left = read(put(tmp_path, rows(words)))
    np.testing.assert_array_equal(found["x"].values[:, 0], [1, *[np.nan] * 7, 2, 100, -0.5])
    assert left == []


def test_text_in_a_column_of_numbers(tmp_path):
    text = rows(["1,a,7", "2,b,x7", "3,c,7", "4,d,9", "5,e,9"], header="date,x,note,z")
    found, left = read(put(tmp_path, text))
    assert list(found) == ["x"]
    assert left == [
        "a.csv: z: line 3 has 'x7' in the column 'z', which is no finite number; correct it, or leave it empty."
    ]
    assert refused(put(tmp_path, text), multivariate=True) == (
        "a.csv: line 3 has 'x7' in the column 'z', which is no finite number; correct it, or leave it empty."
    )
    assert "line 2 has 'a' in the column 'note'" in read(put(tmp_path, text), target=("x", "note"))[1][0]


def test_lines_are_counted_as_an_editor_counts_them(tmp_path):
    text = 'a "note",date,x\n\n"two\nlines",2016-07-01,1\r\n,2016-07-02,2\n\n,2016-07-03,oops\n,2016-07-04,5\n'
    assert refused(put(tmp_path, "\n\n" + text)).startswith("a.csv: x: line 9 has 'oops'")


def test_very_many_columns(tmp_path):
    head = ",".join(["date", *(f"a_column_with_a_very_long_name_{i}" for i in range(4_000))])
    lines = [",".join([f"2016-07-0{day}", *[str(day)] * 3_999, "x" if day == 3 else "1"]) for day in (1, 2, 3, 4)]
    found, left = read(put(tmp_path, "\n".join([head, *lines])))
    assert len(found) == 3_999
    assert left[0].startswith("a.csv: a_column_with_a_very_long_name_3999: line 4 has 'x' in the column")


def test_rows_that_end_in_a_delimiter_have_lines_too(tmp_path):
    assert "line 3 has 'soon' for a stamp" in refused(put(tmp_path, "date,x,\n2016-07-01,1,\nsoon,2,\n"))


def test_infinite_numbers_are_named(tmp_path):
    assert refused(put(tmp_path, rows([1, "inf", 3]))) == (
        "a.csv: x: line 3 has 'inf' in the column 'x', which is no finite number; correct it, or leave it empty."
    )


def test_decimal_commas(tmp_path):
    assert column(read(put(tmp_path, rows(["1,5", "0,125", "3"], sign=";", header="date;x")))[0]["x"]) == [
        1.5,
        0.125,
        3,
    ]
    text = rows(["1,500", "12,125", "3"], sign=";", header="date;x")
    assert refused(put(tmp_path, text)) == (
        "a.csv: whether the comma of '1,500' in the column 'x' is a decimal sign is not clear; set decimal to ',', or "
        "take out the signs of thousands."
    )
    assert column(read(put(tmp_path, text), decimal=",")[0]["x"]) == [1.5, 12.125, 3]
    assert "line 2 has '1,500' in the column 'x'" in refused(put(tmp_path, text), decimal=".", target=("x",))
    text = rows(["1.234,5", "1,5", "2,5"], sign=";", header="date;x")
    assert "line 2 has '1.234,5'" in refused(put(tmp_path, text))


def test_rows_of_another_length(tmp_path):
    text = rows(range(6)).splitlines()
    found, left = read(put(tmp_path, "\n".join([*text[:3], "2016-07-01 02:00:00,1,2", *text[4:], "2016"])))
    assert np.isnan(found["x"].values[:, 0]).tolist() == [False, False, True, False, False, False]
    assert left == ["a.csv: line 4: has 3 cells, and the header 2 (such lines: 2); mend the row, or set delimiter."]
    assert refused(put(tmp_path, "date,x\n2016-07-01,1,2\n2016-07-02,1,2\n")) == (
        "a.csv: line 2 has 3 cells, and the header 2 (such lines: 2); mend the row, or set delimiter."
    )


def test_rows_that_end_in_a_delimiter(tmp_path):
    found, left = read(put(tmp_path, "date,x,\n2016-07-01,1,\n2016-07-02,2,\n"))
    assert (list(found), left) == (["x"], [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.csv: the file is empty; copy or export it again."),
        (b" \n\r\n", "a.csv: the file is empty; copy or export it again."),
        (b"\xef\xbb\xbf", "a.csv: the file is empty; copy or export it again."),
        (b"date,x\n", "a.csv: holds a header only; export it with its rows."),
        (
            b"2016-07-01,5\n2016-07-02,6\n",
            "a.csv: line 1 has numbers where names of columns belong; put a header above.",
        ),
        (
            b"date,x\n2016-07-01,\0\n",
            "a.csv: holds binary data (a zero byte), and CSV is text; copy or export it again.",
        ),
        (b"PAR1x", "a.csv: this is a Parquet file, not CSV; export it as CSV, or correct its ending."),
        (
            b"PK\x03\x04x",
            "a.csv: this is a spreadsheet or a zip archive, not CSV; export it as CSV, or correct its ending.",
        ),
        ("date,x\n".encode("utf-16"), "a.csv: this is text in UTF-16, not CSV; save it in UTF-8."),
        (b"date,x\n2016-07-01,5\xe4\n", "a.csv: line 2 is no text in UTF-8; save the file in UTF-8."),
        (b"\x1f\x8bxx", "a.csv: the gzip file is damaged or cut short; copy or export it again."),
        (
            gzip.compress(b"date,x\n" * 99, mtime=0)[:30],
            "a.csv: the gzip file is damaged or cut short; copy or export it again.",
        ),
        (b"date,x,x\n2016-07-01,5,5\n", "a.csv: two columns are called 'x'; rename one."),
        (b"date,x\n2016-07-01,5\nsoon,6\n", "a.csv: line 3 has 'soon' for a stamp; correct it, or take the row out."),
        (b"date,x\n2016-07-01,5\n,6\n", "a.csv: line 3 has '' for a stamp; correct it, or take the row out."),
        (
            b"date,x\n2016-07-01,a\n2016-07-02,b\n",
            "a.csv: has no column of numbers to forecast: 'x' holds text such as 'a'; name one as target.",
        ),
        (b"date,x\n2016-07-01,5\n", "a.csv: one stamp does not tell the frequency; set frequency."),
    ],
)
def test_files_that_are_no_table(tmp_path, data, message):
    assert refused(put(tmp_path, data)) == message


def test_a_quote_that_is_not_closed(tmp_path):
    assert refused(put(tmp_path, 'date,x\n2016-07-01,"5\n2016-07-02,6\n')) == (
        r"a.csv: has no column of numbers to forecast: 'x' holds text such as '5\n2016-07-02,6\n'; name one as target."
    )


# --- long ---


@pytest.mark.parametrize(
    "columns", [("unique_id", "ds", "y"), ("item_id", "timestamp", "target"), ("shop", "day", "sold")]
)
def test_a_written_long_table_is_read_back(tmp_path, columns):
    wanted = [
        made("x", 12, holes=[3], past=1, known=2, ahead=3),
        made("NA", 9, seed=1, start="2017-01-01", past=1, known=2),
        made("007", 8, "D", seed=2, start="2017-01-01", past=1, known=2, ahead=1),
    ]
    write_csv_long(tmp_path / "a.csv.gz", wanted, columns=columns)
    write_parquet(tmp_path / "a.parquet", wanted, columns=columns)
    own = dict(zip(("item", "time", "target"), (columns[0], columns[1], columns[2:]), strict=True))
    for name in ("a.csv.gz", "a.parquet"):
        found, left = read(tmp_path / name, past=("p0",), known=("k0", "k1"), **(own if columns[0] == "shop" else {}))
        assert (list(found), left) == (["x", "NA", "007"], [])
        for series in wanted:
            same(found[series.name], series)
        assert found["x"].variates == (columns[2],)


def test_one_bad_series_does_not_lose_the_others(tmp_path):
    text = long({"a": [1, 2, 3], "b": [1, "x", 3], "c": [1, 2, "inf"], "d": [1], "": [5, 6], "e": [7, "", 9]})
    text += "f,soon,3\ng,2016-07-01,1\ng,2016-07-01,2\n"
    found, left = read(put(tmp_path, text))
    assert list(found) == ["a", "e"]
    assert left == [
        "a.csv: b: line 6 has 'x' in the column 'y', which is no finite number; correct it, or leave it empty.",
        "a.csv: c: line 10 has 'inf' in the column 'y', which is no finite number; correct it, or leave it empty.",
        "a.csv: d: one stamp does not tell the frequency; set frequency.",
        "a.csv: line 12 has no unique_id; tell which series it is of.",
        "a.csv: f: line 17 has 'soon' for a stamp; correct it, or take the row out.",
        "a.csv: g: one stamp does not tell the frequency; set frequency.",
    ]


def test_a_repeated_id_with_other_values(tmp_path):
    text = long({"a": [1, 2, 3], "b": [1, 2, 3]}) + "a,2016-07-02,5\n"
    found, left = read(put(tmp_path, text))
    assert list(found) == ["b"]
    assert left == [
        "a.csv: a: the stamp 2016-07-02 00:00 occurs more than once, with different values; keep one of the rows, and "
        "where a clock is set back in autumn, write the stamps in UTC."
    ]


def test_rows_of_a_long_table_may_be_in_any_order(tmp_path):
    lines = long({"a": range(9), "b": range(1, 8)}).replace("a,2016-07-02", " a ,2016-07-02").splitlines()
    mixed = [lines[0], *np.random.default_rng(0).permutation(lines[1:])]
    found, left = read(put(tmp_path, "\n".join(mixed)))
    assert column(found["a"]) == list(range(9))
    assert column(found["b"]) == list(range(1, 8))
    assert left == []


def test_short_series_go_by_the_frequency_of_the_others(tmp_path):
    text = long({"a": range(9)}) + "b,2016-07-01,1\nb,2016-07-04,2\n"
    found, _ = read(put(tmp_path, text))
    np.testing.assert_array_equal(found["b"].values[:, 0], [1, np.nan, np.nan, 2])
    monthly = "".join(f"m,2016-{month:02d}-01,{month}\n" for month in range(1, 9))
    found, _ = read(put(tmp_path, text + monthly))
    assert [str(own.frequency) for own in found.values()] == ["D", "D", "MS"]
    # one that is uneven alone, and even in days
    text += "".join(f"c,2016-07-{day:02d},{day}\n" for day in (1, 3, 6, 8, 10))
    assert len(read(put(tmp_path, text))[0]["c"]) == 10


def test_columns_of_a_long_table_that_are_not_clear(tmp_path):
    text = long({"a": [1, 2], "b": [3, 4]}, "shop,ds,sold")
    assert refused(put(tmp_path, text), layout="long") == (
        "a.csv: no column is called unique_id, item_id, series_id or ts_id; name the one that tells series apart as "
        "item. Columns: shop, ds, sold."
    )
    assert list(read(put(tmp_path, text), item="shop")[0]) == ["a", "b"]
    two = "unique_id,ds,sold,price\na,2016-07-01,4,5\na,2016-07-02,6,5\n"
    assert refused(put(tmp_path, two)) == (
        "a.csv: which column holds the values is not clear, since none is called y or target or value; name it as "
        "target. Columns: sold, price."
    )
    assert refused(put(tmp_path, two), target=("sold", "price")) == (
        "a.csv: target names 2 columns, and a long table has one of values; name one, and the others as past or known."
    )
    assert refused(put(tmp_path, two), multivariate=True) == (
        "a.csv: multivariate is for wide tables, and this one is long; leave it out."
    )
    assert refused(put(tmp_path, two), target=("sales",)) == (
        "a.csv: there is no column 'sales' for target; columns: unique_id, ds, sold, price."
    )
    assert list(read(put(tmp_path, two), layout="wide", target=("sold",))[0]) == ["sold"]


# --- Parquet ---


def test_a_written_wide_parquet_is_read_back(tmp_path):
    wanted = [made("x", 12, "15min", holes=[3]), made("y", 9, "15min", seed=1, start="2016-07-01T01")]
    write_parquet(tmp_path / "a.parquet", wanted, layout="wide")
    found, left = read(tmp_path / "a.parquet")
    assert left == []
    for own in wanted:
        same(found[own.name], own)


@pytest.mark.parametrize(
    "kind", [pa.timestamp("ns"), pa.timestamp("us", "Europe/Berlin"), pa.date32(), pa.string(), pa.int32()]
)
def test_typed_stamps(tmp_path, kind):
    days = np.arange("2016-07-01", "2016-07-05", dtype="datetime64[D]")
    cells = (
        pa.array(days).cast(kind)
        if not pa.types.is_integer(kind)
        else pa.array([20160701, 20160702, 20160703, 20160704])
    )
    table = pa.table(
        {"x": pa.array([1, 2, None, 4], pa.int16()), "ds": cells, "id": pa.array(list("aabb")).dictionary_encode()}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    series = read(tmp_path / "a.parquet", target=("x",))[0]["x"]
    assert (str(series.frequency), series.start) == ("D", np.datetime64("2016-07-01"))
    np.testing.assert_array_equal(series.values[:, 0], [1, 2, np.nan, 4])


def test_parquet_that_cannot_be_read(tmp_path):
    assert refused(put(tmp_path, "date,x", "a.parquet")) == (
        "a.parquet: is no Parquet file, or is damaged or cut short; copy or export it again."
    )
    path = tmp_path / "b.parquet"
    pyarrow.parquet.write_table(pa.table({"id": ["a"], "target": [[1.0, 2.0]]}), path)
    assert refused(path) == "b.parquet: the column 'target' holds lists; write one row for each stamp."
    pyarrow.parquet.write_table(
        pa.table({"date": pa.array([], pa.timestamp("ms")), "x": pa.array([], pa.float64())}), path
    )
    assert refused(path) == "b.parquet: holds no rows; export it again."
    stamps = pa.array(np.arange(3).astype("datetime64[h]").astype("datetime64[ms]"))
    pyarrow.parquet.write_table(pa.table({"date": stamps, "x": [1.0, np.inf, 2.0]}), path)
    assert refused(path) == (
        "b.parquet: x: row 2 has inf in the column 'x', which is no finite number; correct it, or leave it empty."
    )


# --- options and writing ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "tall"}, "layout must be one of auto wide long; got 'tall'."),
        ({"decimal": ";"}, "decimal must be one of auto . ,; got ';'."),
        ({"delimiter": ",,"}, "delimiter must be one character, such as ',' or ';'; got ',,'."),
        ({"delimiter": ",", "decimal": ","}, "delimiter and decimal must differ; both are ','."),
        ({"gaps": -1}, "gaps must be at least 0, or None for any; got -1."),
        ({"layout": "wide", "item": "id"}, "item is 'id', but a wide table has no such column; set layout to long."),
        ({"target": "OT"}, "target must be a list of names; got the text 'OT'."),
        ({"time": "x", "known": ("x",)}, "the column 'x' is both time and known; name it once."),
    ],
)
def test_options_that_are_impossible(options, message):
    with pytest.raises(ConfigError) as e:
        SourceOptions(**options)
    assert str(e.value) == message


def test_an_unknown_frequency_is_an_error():
    with pytest.raises(LookupError, match="unknown frequency 'hurly'"):
        SourceOptions(frequency="hurly")


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(DataError, match=r"b has the frequency D, and a h; write one file for each\.$"):
        write_csv_wide(tmp_path / "a.csv", [made("a"), made("b", frequency="D")])
    with pytest.raises(DataError, match=r"two columns would have one name; rename the series or variates\.$"):
        write_csv_wide(tmp_path / "a.csv", [made("a"), made("a")])
    with pytest.raises(DataError, match=r"the format holds series of one variate; write a wide table, JSON lines or"):
        write_csv_long(tmp_path / "a.csv", [made("a", width=2)])
    with pytest.raises(DataError, match=r"b has other covariates or stamps than a; write two files\.$"):
        write_csv_long(tmp_path / "a.csv", [made("a"), made("b", past=1)])
    with pytest.raises(DataError, match=r"there is no series to write\.$"):
        write_csv_long(tmp_path / "a.csv", [])
    with pytest.raises(DataError, match=r"cannot be written \(No such file or directory\); choose another folder\.$"):
        write_csv_wide(tmp_path / "no" / "a.csv", [made("a")])
    assert list(tmp_path.iterdir()) == []


def test_dates_are_written_as_told(tmp_path):
    write_csv_wide(tmp_path / "a.csv", [made("x", 30, "D")], date_format="%d/%m/%Y")
    assert "\n31/07/2016" not in (tmp_path / "a.csv").read_text()
    assert (tmp_path / "a.csv").read_text().splitlines()[13].startswith("13/07/2016,")
    same(read(tmp_path / "a.csv")[0]["x"], made("x", 30, "D"))
