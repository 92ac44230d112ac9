"""Stamps from text: the usual ways to write a time, found out from the data.

Shapes: N rows of a column, U different texts among them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Stamps
from vertebra.errors import DataError

Texts = Any
"""A pyarrow array of strings."""

_TIME = (
    r"(?:[Tt\s,]+(?P<H>\d{1,2})(?:[:.\-h](?P<M>\d{2})(?:[:.\-](?P<S>\d{2})(?:[.,](?P<f>\d{1,9}))?)?)?"
    r"(?:\s*(?P<p>[AaPp])\.?[Mm]\.?)?)?\s*(?P<z>[Zz]|UTC|GMT|[+\-]\d{2}:?\d{2})?$"
)
_YEAR_FIRST = r"^(?P<y>\d{4})[\-/.](?P<m>\d{1,2})[\-/.](?P<d>\d{1,2})" + _TIME
_YEAR_LAST = r"^(?P<a>\d{1,2})(?P<s>[\-/.])(?P<b>\d{1,2})[\-/.](?P<y>\d{4})" + _TIME
_COMPACT = r"^(?P<y>\d{4})(?P<m>\d{2})(?P<d>\d{2})(?:[Tt ](?P<H>\d{2}):?(?P<M>\d{2})(?::?(?P<S>\d{2}))?)(?P<z>[Zz])?$"
_MONTH = r"^(?P<y>\d{4})[\-/.](?P<m>\d{1,2})$"
_QUARTER = r"^(?P<y>\d{4})[\- ]?[Qq](?P<q>[1-4])$"
_PATTERNS = (_YEAR_FIRST, _YEAR_LAST, _COMPACT, _MONTH, _QUARTER)
_NUMBER = r"^\d+(?:\.\d*)?$"
_DIGITS = (4, 6, 8, 10, 12, 14)
_YEARS = (1500, 2200)
_YEARS_COMPACT = (1900, 2100)
_EPOCH = 1e8  # seconds: from 1973 on; smaller numbers count rows
_KNOWN = "2016-07-01 00:00:00, 01/07/2016, 20160701, 2016-07, seconds or milliseconds since 1970"


def parse_stamps(
    column: Texts,
    date_format: str | None,
    where: str,
    even: Callable[[Stamps], bool] | None = None,
) -> tuple[Stamps | NDArray[np.int64], NDArray[np.bool_]]:
    """Read stamps.

    Times with a zone become UTC. Whole numbers that are neither dates nor seconds since 1970 count rows.

    Args:
        column: Texts (N,), null where empty.
        date_format: As ``strptime`` takes it; None for the usual ones.
        where: File and column, for errors.
        even: Whether sorted stamps are an even series; decides what 01/02/2016 is where the numbers do not.

    Returns:
        datetime64[ms] (N,), or int64 (N,) of counted rows; and which of them could not be read, bool (N,).

    Raises:
        DataError: The way to write them is not known or not clear.
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    encoded = pc.utf8_trim_whitespace(column).dictionary_encode()
    texts = encoded.dictionary
    codes = encoded.indices.fill_null(len(texts)).to_numpy(zero_copy_only=False)
    values, bad = _read(texts, date_format, where, even)
    nothing: Any = np.datetime64("NaT") if values.dtype.kind == "M" else 0
    return np.append(values, np.array([nothing], values.dtype))[codes], np.append(bad, True)[codes]


def _read(
    texts: Texts, date_format: str | None, where: str, even: Callable[[Stamps], bool] | None
) -> tuple[Any, NDArray[np.bool_]]:
    """Read different texts (U,)."""
    if date_format is not None:
        found = [_formatted(text, date_format) for text in texts.to_pylist()]
        values = np.array(found, "datetime64[ms]")
        if len(values) and np.isnat(values).all():
            raise DataError(f"{where}: stamps such as {_first(texts)!r} do not fit date_format {date_format!r}.")
        return values, np.isnat(values)
    for zone in (None, "UTC"):  # the quick way: ISO 8601 in full
        try:
            values = pc.cast(texts, pa.timestamp("ms", zone)).to_numpy(zero_copy_only=False)
            return values, np.zeros(len(values), bool)
        except pa.ArrowInvalid:
            continue
    some = texts.slice(0, 1000)
    if pc.sum(pc.match_substring_regex(some, _NUMBER)).as_py() == len(some):
        good = pc.match_substring_regex(texts, _NUMBER).to_numpy(zero_copy_only=False)
        numbers = pc.cast(pc.if_else(pa.array(good), texts, "0"), pa.float64()).to_numpy(zero_copy_only=False)
        return _numbers(numbers, good), ~good
    fits = [pc.sum(pc.match_substring_regex(some, pattern)).as_py() for pattern in _PATTERNS]
    if not any(fits):
        raise DataError(
            f"{where}: stamps such as {_first(texts)!r} are written in none of the usual ways ({_KNOWN}); set "
            "date_format, such as '%d.%m.%y %H:%M', or name another column as time."
        )
    return _matched(texts, _PATTERNS[int(np.argmax(fits))], where, even)


def _first(texts: Texts) -> str:
    return next((text for text in texts.slice(0, 1000).to_pylist() if text), "")


def _formatted(text: str, date_format: str) -> datetime | None:
    try:
        found = datetime.strptime(text, date_format)
    except ValueError:
        return None
    return found if found.tzinfo is None else found.astimezone(UTC).replace(tzinfo=None)


def _matched(
    texts: Texts, pattern: str, where: str, even: Callable[[Stamps], bool] | None
) -> tuple[Any, NDArray[np.bool_]]:
    groups = pc.extract_regex(texts, pattern)
    good = groups.is_valid().to_numpy(zero_copy_only=False)
    names = [groups.type.field(i).name for i in range(groups.type.num_fields)]

    def text(name: str) -> Any:
        return pc.fill_null(pc.struct_field(groups, name), "")

    def number(name: str, default: int) -> NDArray[np.int64]:
        if name not in names:
            return np.full(len(texts), default, np.int64)
        found = text(name)
        return pc.cast(pc.if_else(pc.equal(found, ""), str(default), found), pa.int64()).to_numpy()

    hour = number("H", 0)
    if "p" in names:
        half = pc.utf8_lower(text("p")).to_numpy(zero_copy_only=False)
        hour = np.where(half == "", hour, np.where((hour > 12) | (hour < 1), 99, hour % 12 + 12 * (half == "p")))
    clock = hour, number("M", 0), number("S", 0)
    year = number("y", 0)
    if "a" in names:
        first, second = number("a", 1), number("b", 1)
        day_first = _day_first(first[good], second[good], year[good], clock, good, texts, text("s"), where, even)
        day, month = (first, second) if day_first else (second, first)
    else:
        day = number("d", 1)
        month = number("m", 1) if "q" not in names else 3 * number("q", 1) - 2
    values, valid = _dates(year, month, day, *clock)
    if "f" in names:
        shown = pc.utf8_slice_codeunits(pc.utf8_rpad(text("f"), 3, "0"), 0, 3)
        values = values + pc.cast(shown, pa.int64()).to_numpy().astype("timedelta64[ms]")
    if "z" in names:
        values = values - _zones(text("z"))
    good = good & valid
    values[~good] = np.datetime64("NaT")
    return values, ~good


def _zones(zones: Texts) -> NDArray[np.timedelta64]:
    """Minutes ahead of UTC, (U,)."""
    encoded = zones.dictionary_encode()
    minutes = []
    for zone in encoded.dictionary.to_pylist():
        digits = zone[1:].replace(":", "")
        ahead = int(digits[:2]) * 60 + int(digits[2:]) if digits.isdigit() else 0
        minutes.append(-ahead if zone.startswith("-") else ahead)
    return np.array(minutes, "timedelta64[m]")[encoded.indices.to_numpy()]


def _dates(year: Any, month: Any, day: Any, hour: Any, minute: Any, second: Any) -> tuple[Any, NDArray[np.bool_]]:
    """Stamps datetime64[ms] of numbers (U,), and which are times at all."""
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    valid = (month >= 1) & (month <= 12) & (day >= 1) & (day <= 31) & (days.astype("datetime64[M]") == months)
    valid &= (hour < 24) & (minute < 60) & (second < 60)
    seconds = (hour * 60 + minute) * 60 + second
    return days.astype("datetime64[ms]") + (seconds * 1000).astype("timedelta64[ms]"), valid


def _day_first(
    first: Any,
    second: Any,
    year: Any,
    clock: tuple[Any, Any, Any],
    good: NDArray[np.bool_],
    texts: Texts,
    signs: Texts,
    where: str,
    even: Callable[[Stamps], bool] | None,
) -> bool:
    """Whether the day goes before the month: told by a number above 12, dots, or steps that are even."""
    if (first > 12).any() and (second > 12).any():
        rows = np.flatnonzero(good)
        one, other = (texts[int(rows[int(np.argmax(part > 12))])].as_py() for part in (first, second))
        raise DataError(
            f"{where}: in {one!r} the day goes first, in {other!r} the month; write all stamps in one way, best as "
            "2016-07-31."
        )
    if (first > 12).any() or (second > 12).any():
        return bool((first > 12).any())
    if pc.all(pc.equal(pc.filter(signs, pa.array(good)), ".")).as_py():  # 01.02.2016 is written so by day alone
        return True
    if even is not None:
        time = [part[good] for part in clock]
        orders = [np.unique(_dates(year, *order, *time)[0]) for order in ((second, first), (first, second))]
        by_day, by_month = (even(stamps) for stamps in orders)
        if by_day != by_month:
            return by_day
    text = texts[int(np.argmax(good))].as_py()
    sign = text.lstrip("0123456789")[0]
    raise DataError(
        f"{where}: whether the day or the month goes first in {text!r} is not clear; set date_format to "
        f"'%d{sign}%m{sign}%Y' or '%m{sign}%d{sign}%Y', with %H:%M:%S behind it where there are times."
    )


def _numbers(numbers: NDArray[np.float64], good: NDArray[np.bool_]) -> Any:
    """Dates of digits alone, times since 1970, or counted rows; ``good`` is narrowed to what is one."""
    told = numbers[good]
    if (told == np.floor(told)).all():
        whole = told.astype(np.int64)
        lengths = np.char.str_len(whole.astype(str)) if len(whole) < 1000 else np.char.str_len(whole[:1000].astype(str))
        digits = int(lengths[0])
        if (lengths == digits).all() and digits in _DIGITS:
            parts = _split(whole, digits)
            least, most = _YEARS if digits == 4 else _YEARS_COMPACT
            if ((parts[0] >= least) & (parts[0] <= most)).all():
                values, valid = _dates(*parts)
                if valid.mean() >= 0.5:
                    dates = np.full(len(numbers), np.datetime64("NaT"), "datetime64[ms]")
                    dates[good] = np.where(valid, values, np.datetime64("NaT"))
                    good[good] = valid
                    return dates
    if len(told) and np.median(told) >= _EPOCH:
        size = float(np.median(told))
        unit = next((scale for limit, scale in ((1e11, 1e3), (1e14, 1.0), (1e17, 1e-3)) if size < limit), 1e-6)
        return np.round(numbers * unit).astype(np.int64).astype("datetime64[ms]")
    good &= numbers == np.floor(numbers)
    return numbers.astype(np.int64)


def _split(whole: NDArray[np.int64], digits: int) -> list[Any]:
    """Year, month, day, hour, minute and second of numbers such as 20160701 or 201607010530."""
    parts = [whole // 10 ** (digits - 4)]
    for at in range(6, digits + 1, 2):
        parts.append(whole // 10 ** (digits - at) % 100)
    defaults = [0, 1, 1, 0, 0, 0]
    return parts + [np.full(len(whole), value) for value in defaults[len(parts) :]]


def looks_like_stamps(column: Texts) -> bool:
    """Whether texts are times by their look, and no mere numbers."""
    told = [text.strip() for text in column.to_pylist() if text and text.strip()]
    return bool(told) and all(any(re.match(pattern, text) for pattern in _PATTERNS) for text in told)
