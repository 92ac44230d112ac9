import numpy as np
import pyarrow as pa
import pytest

from vertebra.domains.timeseries.grids import is_even
from vertebra.domains.timeseries.stamps import looks_like_stamps, parse_stamps
from vertebra.errors import DataError


def parse(*texts, date_format=None):
    values, bad = parse_stamps(pa.array(texts, pa.string()), date_format, "a.csv: the column 'date'", is_even)
    return values, bad.tolist()


def shown(*texts, date_format=None):
    values, bad = parse(*texts, date_format=date_format)
    assert not any(bad)
    return np.datetime_as_string(values, "ms").tolist()


@pytest.mark.parametrize(
    ("text", "stamp"),
    [
        ("2016-07-31 05:06:07", "2016-07-31T05:06:07.000"),
        ("2016-07-31T05:06:07.25", "2016-07-31T05:06:07.250"),
        ("2016-07-31T05:06:07Z", "2016-07-31T05:06:07.000"),
        ("2016-07-31T05:06:07.5+02:00", "2016-07-31T03:06:07.500"),
        ("2016-07-31 05:06 -0330", "2016-07-31T08:36:00.000"),
        ("2016-07-31", "2016-07-31T00:00:00.000"),
        ("2016-7-3 5:06", "2016-07-03T05:06:00.000"),
        ("2016/07/31 05:06", "2016-07-31T05:06:00.000"),
        ("31/07/2016", "2016-07-31T00:00:00.000"),
        ("07/31/2016 5:06", "2016-07-31T05:06:00.000"),
        ("7/31/2016 12:06 AM", "2016-07-31T00:06:00.000"),
        ("7/31/2016 1:06:07 pm", "2016-07-31T13:06:07.000"),
        ("01.02.2016 05:06", "2016-02-01T05:06:00.000"),
        ("2015-01-01 00-30-00", "2015-01-01T00:30:00.000"),
        ("20160731", "2016-07-31T00:00:00.000"),
        ("20160731 0506", "2016-07-31T05:06:00.000"),
        ("2016073105", "2016-07-31T05:00:00.000"),
        ("201607310506", "2016-07-31T05:06:00.000"),
        ("20160731050607", "2016-07-31T05:06:07.000"),
        ("201607", "2016-07-01T00:00:00.000"),
        ("2016-07", "2016-07-01T00:00:00.000"),
        ("2016", "2016-01-01T00:00:00.000"),
        ("2016Q3", "2016-07-01T00:00:00.000"),
        ("1469941567", "2016-07-31T05:06:07.000"),
        ("1469941567.25", "2016-07-31T05:06:07.250"),
        ("1469941567250", "2016-07-31T05:06:07.250"),
        ("1469941567250000", "2016-07-31T05:06:07.250"),
        ("1469941567250000000", "2016-07-31T05:06:07.250"),
        ("  2016-07-31 ", "2016-07-31T00:00:00.000"),
    ],
)
def test_usual_ways_to_write_a_time(text, stamp):
    assert shown(text, text) == [stamp, stamp]


def test_whole_numbers_that_are_no_time_count_rows():
    values, bad = parse("1", "2", "30")
    assert (values.tolist(), values.dtype.kind, bad) == ([1, 2, 30], "i", [False] * 3)


def test_stamps_that_are_none_are_marked():
    assert parse("2016-07-31", None, "", "2016-02-30", "soon")[1] == [False, True, True, True, True]
    assert parse("31/07/2016 23:59", "31/07/2016 25:00", "31/06/2016")[1] == [False, True, True]
    assert parse("20160731", "20160732", *["20160701"] * 20)[1][:2] == [False, True]
    assert parse("1/31/2016 13:00 PM", "1/31/2016 1:00 PM")[1] == [True, False]
    assert parse(None, None)[1] == [True, True]


def test_day_or_month_first_is_told_by_the_data():
    assert shown("01/07/2016", "13/07/2016") == ["2016-07-01T00:00:00.000", "2016-07-13T00:00:00.000"]
    assert shown("01/07/2016", "01/13/2016") == ["2016-01-07T00:00:00.000", "2016-01-13T00:00:00.000"]
    months = shown(*(f"01/{month:02d}/2016" for month in range(1, 12)), "01/12/2016", "01/01/2017")
    assert months[1] == "2016-02-01T00:00:00.000"
    hours = shown(*(f"05-07-2016 {hour:02d}:00" for hour in range(24)), *(f"06-07-2016 {h:02d}:00" for h in range(24)))
    assert hours[-1] == "2016-07-06T23:00:00.000"


def test_day_or_month_first_is_asked_for_where_the_data_do_not_tell():
    with pytest.raises(DataError) as e:
        parse("01/02/2016", "02/02/2016")
    assert str(e.value) == (
        "a.csv: the column 'date': whether the day or the month goes first in '01/02/2016' is not clear; set "
        "date_format to '%d/%m/%Y' or '%m/%d/%Y', with %H:%M:%S behind it where there are times."
    )
    assert shown("01/02/2016", date_format="%m/%d/%Y") == ["2016-01-02T00:00:00.000"]
    with pytest.raises(DataError) as e:
        parse("13/02/2016", "02/14/2016")
    assert str(e.value) == (
        "a.csv: the column 'date': in '13/02/2016' the day goes first, in '02/14/2016' the month; write all stamps in "
        "one way, best as 2016-07-31."
    )


def test_a_format_that_is_told():
    assert shown("Jul 31, 16", date_format="%b %d, %y") == ["2016-07-31T00:00:00.000"]
    assert shown("31.7.16 05h +0200", date_format="%d.%m.%y %Hh %z") == ["2016-07-31T03:00:00.000"]
    assert parse("31.7.16", "x", date_format="%d.%m.%y")[1] == [False, True]
    with pytest.raises(DataError) as e:
        parse("31.7.16", date_format="%Y")
    assert str(e.value) == "a.csv: the column 'date': stamps such as '31.7.16' do not fit date_format '%Y'."


def test_an_unknown_way_is_shown():
    with pytest.raises(DataError) as e:
        parse("Jul 31, 16")
    assert str(e.value) == (
        "a.csv: the column 'date': stamps such as 'Jul 31, 16' are written in none of the usual ways (2016-07-01 "
        "00:00:00, 01/07/2016, 20160701, 2016-07, seconds or milliseconds since 1970); set date_format, such as "
        "'%d.%m.%y %H:%M', or name another column as time."
    )


def test_looks_of_stamps():
    assert looks_like_stamps(pa.array(["2016-07-31 05:00", None, "2016-7-31"]))
    assert not looks_like_stamps(pa.array(["2016", "1.5"]))
    assert not looks_like_stamps(pa.array([None, ""], pa.string()))
