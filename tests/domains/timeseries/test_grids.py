import numpy as np
import pytest
from made_series import put, read, refused, rows

from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.grids import infer_frequency, is_even, positions
from vertebra.errors import DataError


def stamps(*texts):
    return np.array(texts, "datetime64[ms]")


FREQUENCIES = ["ms", "4s", "min", "10min", "15min", "30min", "h", "6h", "D", "2D", "B", "W", "2W", "MS", "2MS", "QS"]
FREQUENCIES += ["2QS", "YS", "10YS"]


@pytest.mark.parametrize("name", FREQUENCIES)
def test_frequencies_are_found_from_even_and_from_gapped_stamps(name):
    frequency = parse_frequency(name)
    whole = frequency.stamps(np.datetime64("2015-01-01T00", "ms"), 40)
    assert str(infer_frequency(whole)) == name
    gapped = np.delete(whole, [3, 11, 12, 30])
    assert str(infer_frequency(gapped)) == name
    assert positions(gapped, frequency).tolist() == np.delete(np.arange(40), [3, 11, 12, 30]).tolist()


@pytest.mark.parametrize(
    ("start", "name"),
    [("2015-01-31", "MS"), ("2015-02-28", "MS"), ("2015-06-30", "QS"), ("2015-12-31", "YS"), ("2015-01-15T12", "MS")],
)
def test_months_may_be_told_by_their_end_or_any_day(start, name):
    own = parse_frequency(name).stamps(np.datetime64(start, "ms"), 20)
    assert str(infer_frequency(own)) == name
    assert positions(own, parse_frequency(name)).tolist() == list(range(20))


def test_weekdays_are_days_only_where_no_weekend_is_skipped():
    assert str(infer_frequency(stamps("2016-07-04", "2016-07-05", "2016-07-06"))) == "D"
    assert str(infer_frequency(stamps("2016-07-07", "2016-07-08", "2016-07-11"))) == "B"
    assert str(infer_frequency(stamps("2016-07-07", "2016-07-08", "2016-07-09", "2016-07-12"))) == "D"


def test_two_stamps_tell_a_step_and_one_does_not():
    assert str(infer_frequency(stamps("2016-02-01", "2016-03-01"))) == "MS"
    assert str(infer_frequency(stamps("2016-02-01", "2016-02-29"))) == "4W"
    with pytest.raises(DataError, match=r"^one stamp does not tell the frequency; set frequency\.$"):
        infer_frequency(stamps("2016-02-01"))


def test_even_is_without_gaps():
    own = parse_frequency("D").stamps(np.datetime64("2016-01-01", "ms"), 9)
    assert is_even(own)
    assert not is_even(np.delete(own, 4))
    assert not is_even(own[:2])


def test_a_stamp_off_the_grid_is_named(tmp_path):
    text = rows(range(8)).replace("03:00:00", "03:07:00")
    assert refused(put(tmp_path, text)) == (
        "a.csv: the stamp 2016-07-01 03:07, after 2016-07-01 02:00, is not on the grid of h from 2016-07-01 00:00; "
        "correct it, set another frequency, or resample the series to even steps."
    )
    months = "date,x\n" + "".join(f"2016-{m:02d}-{3 if m == 5 else 1:02d},{m}\n" for m in range(1, 10))
    assert "the stamp 2016-05-03 00:00, after 2016-04-01 00:00, is not on the grid of MS" in refused(
        put(tmp_path, months)
    )


def test_a_far_stamp_does_not_make_a_huge_grid(tmp_path):
    text = rows(range(8)).replace("2016-07-01 00:00:00", "1970-01-01 00:00:00")
    assert refused(put(tmp_path, text)) == (
        "a.csv: from 1970-01-01 00:00 to 2016-07-01 07:00 there are 407,600 steps of h, and 8 rows; correct a wrong "
        "stamp, or set another frequency."
    )


def test_gaps_are_filled_and_told(tmp_path, caplog):
    text = rows(range(8)).splitlines()
    path = put(tmp_path, "\n".join(text[:4] + text[6:]))
    series, left = read(path)
    assert np.isnan(series["x"].values[:, 0]).tolist() == [False] * 3 + [True] * 2 + [False] * 3
    assert left == []
    assert caplog.messages == [f"{path}: missing rows filled with NaN: 2."]
    assert len(read(path, gaps=2)[0]["x"]) == 8
    assert refused(path, gaps=1) == (
        "a.csv: 2 rows are missing after 2016-07-01 02:00, and gaps allows 1; add them, or raise gaps."
    )


def test_rows_are_sorted_and_repeated_ones_dropped(tmp_path, caplog):
    text = rows(range(8)).splitlines()
    path = put(tmp_path, "\n".join([text[0], *text[:0:-1], text[3]]))
    series, left = read(path)
    assert series["x"].values[:, 0].tolist() == list(range(8))
    assert left == []
    assert caplog.messages == [
        f"{path}: rows were not in the order of time and are sorted.",
        f"{path}: rows dropped that repeat the stamp and the values of another: 1.",
    ]


def test_two_values_of_a_stamp_leave_the_series_out(tmp_path):
    text = rows([f"{i},{-i}" for i in range(8)], header="date,x,y")
    path = put(tmp_path, text + "2016-07-01 03:00:00,3,5\n")
    series, left = read(path)
    assert list(series) == ["x"]
    assert len(series["x"]) == 8
    assert left == [
        "a.csv: y: the stamp 2016-07-01 03:00 occurs more than once, with different values; keep one of the rows, and "
        "where a clock is set back in autumn, write the stamps in UTC; where a column tells series apart, name it as "
        "item."
    ]
    # what one of the rows lacks, the other adds
    series, left = read(put(tmp_path, text + "2016-07-01 03:00:00,,-3\n"))
    assert (sorted(series), left) == (["x", "y"], [])


def test_three_rows_of_a_stamp_are_compared_with_each_other(tmp_path):
    text = rows([0, 1, 2, "", 4])
    assert "occurs more than once" in refused(put(tmp_path, text + "2016-07-01 03:00:00,3\n2016-07-01 03:00:00,4\n"))
    series, _ = read(put(tmp_path, text + "2016-07-01 03:00:00,3\n2016-07-01 03:00:00,3\n"))
    assert series["x"].values[:, 0].tolist() == [0, 1, 2, 3, 4]


def test_frequency_that_is_told_is_kept(tmp_path):
    path = put(tmp_path, rows(range(3), step=2, unit="D", start="2016-07-01"))
    assert len(read(path)[0]["x"]) == 3
    series, _ = read(path, frequency="D")
    assert (len(series["x"]), str(series["x"].frequency)) == (5, "D")
    assert "not on the grid of W" in refused(path, frequency="W")
    assert "the stamp 2016-07-03 00:00, after 2016-07-01 00:00, is not on the grid of B" in refused(path, frequency="B")
    series, _ = read(path, frequency="step")
    assert (len(series["x"]), series["x"].start) == (3, None)


def test_series_begin_and_end_with_a_value(tmp_path, caplog):
    path = put(tmp_path, rows(["", "", 1, "", 3, 4, "", ""]))
    series = read(path)[0]["x"]
    assert series.start == np.datetime64("2016-07-01T02", "ms")
    np.testing.assert_array_equal(series.values[:, 0], [1, np.nan, 3, 4])
    assert caplog.messages == [f"{path}: x: rows at the end without a value, cut off: 2."]


def test_constant_series_are_kept_and_short_ones_left_out(tmp_path, caplog):
    text = rows(["5,1,", "5,,", ",,", "5,,"], header="date,x,y,z")
    path = put(tmp_path, text)
    series, left = read(path)
    assert list(series) == ["x"]
    assert f"{path}: x: is constant." in caplog.messages
    assert left == [
        "a.csv: y: one value is known, and at least 2 are needed; leave it out.",
        "a.csv: z: no value is known, and at least 2 are needed; leave it out.",
    ]


def test_notes_of_many_series_are_one_line(tmp_path, caplog):
    path = put(tmp_path, rows(["5,1"] * 4, header="date,x,y"))
    assert len(read(path)[0]) == 2
    assert caplog.messages == [f"{path}: is constant (2 series, the first is x)."]
