"""Series on an even grid of time: what step their stamps have, and what to do where one is missing or twice.

Shapes: N rows of a file, M rows of the grid, C columns: V values, Cp past and Ck known covariates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Frequency, Stamps
from vertebra.domains.timeseries.reading import LeftOut, Notes, Record, SourceOptions, plain
from vertebra.domains.timeseries.series import UNCOUNTED, Doubles, Series
from vertebra.errors import DataError

_DAY = 86_400_000  # milliseconds
_UNITS = ((7 * _DAY, "W"), (_DAY, "D"), (3_600_000, "h"), (60_000, "min"), (1000, "s"), (1, "ms"))
_MONTHS = {"MS": 1, "QS": 3, "YS": 12}
_FILLED = 20  # most rows of the grid for each that is there; more of them is a wrong frequency or stamp
_ROWS = 100_000  # rows of the grid that are always allowed
_FEW = 4  # rows below which a series goes by the frequency of its file
_NAME_ITEM = "; where a column tells series apart, name it as item"
_MILLISECONDS = {unit: size for size, unit in _UNITS}


def infer_frequency(stamps: Stamps) -> Frequency:
    """Return the usual step of stamps: the most common one, or a month, quarter, year or weekday.

    Args:
        stamps: datetime64 (N,), rising.

    Raises:
        DataError: There are fewer than two.
    """
    if len(stamps) < 2:
        raise DataError("one stamp does not tell the frequency; set frequency.")
    stamps = stamps.astype("datetime64[ms]")
    step = int(_usual(np.diff(stamps).astype(np.int64)))
    if step >= 28 * _DAY and _is_monthly(stamps):
        months = int(_usual(np.diff(stamps.astype("datetime64[M]")).astype(np.int64)))
        unit = next(unit for unit in ("YS", "QS", "MS") if months % _MONTHS[unit] == 0)
        return Frequency(months // _MONTHS[unit], unit)
    if step == _DAY and _is_weekdays(stamps):
        return Frequency(1, "B")
    size, unit = next((size, unit) for size, unit in _UNITS if step % size == 0)
    return Frequency(step // size, unit)


def usual_frequency(series: Iterable[Stamps]) -> Frequency | None:
    """Return the frequency that most series of a file have, each of stamps that rise; None where none tells."""
    found = Counter(infer_frequency(stamps) for stamps in series if len(stamps) >= _FEW)
    return found.most_common(1)[0][0] if found else None


def positions(stamps: Stamps, frequency: Frequency) -> NDArray[np.int64]:
    """Return the rows of stamps (N,) on the grid that begins with the first.

    Args:
        stamps: datetime64[ms] (N,), rising; equal ones have the same row.
        frequency: Step of the grid, not ``step``.

    Raises:
        DataError: A stamp is not on the grid, or most of the grid would be empty.
    """
    start, count, unit = stamps[0], frequency.count, frequency.unit
    if unit in _MONTHS:
        months = stamps.astype("datetime64[M]")
        rows = (months - months[0]).astype(np.int64) // (count * _MONTHS[unit])
    elif unit == "B":
        days = stamps.astype("datetime64[D]")
        rows = np.busday_count(days[0], days).astype(np.int64) // count
    else:
        rows = (stamps - start).astype(np.int64) // (count * _MILLISECONDS[unit])
    length = int(rows[-1]) + 1
    if length > max(_ROWS, _FILLED * len(stamps)):
        raise DataError(
            f"from {show_stamp(start)} to {show_stamp(stamps[-1])} there are {length:,} steps of {frequency}, and "
            f"{len(stamps):,} rows; correct a wrong stamp, or set another frequency."
        )
    if unit in _MONTHS or unit == "B":
        right = frequency.stamps(start, length)[rows] == stamps
    else:
        right = (stamps - start).astype(np.int64) % (count * _MILLISECONDS[unit]) == 0
    if not right.all():
        at = int(np.argmin(right))
        before = f", after {show_stamp(stamps[at - 1])}," if at else ""
        raise DataError(
            f"the stamp {show_stamp(stamps[at])}{before} is not on the grid of {frequency} from {show_stamp(start)}; "
            "correct it, set another frequency, or resample the series to even steps."
        )
    return rows


def is_even(stamps: Stamps) -> bool:
    """Whether rising stamps have no gap and none that is out of step."""
    if len(stamps) < 3:
        return False
    try:
        return int(positions(stamps, infer_frequency(stamps))[-1]) + 1 == len(stamps)
    except DataError:
        return False


def show_stamp(stamp: np.datetime64) -> str:
    """Return a stamp as text, without seconds where they are zero: ``2016-07-01 00:00``."""
    text = np.datetime_as_string(stamp, "ms").replace("T", " ")
    return text.removesuffix(".000").removesuffix(":00") if text.endswith(":00.000") else text.removesuffix(".000")


@dataclass(eq=False)
class Grid:
    """Rows of a record on an even grid.

    Args:
        rows: (M, C), NaN where nothing is known.
        frequency: Step between them.
        start: Stamp of the first; None where rows are only counted.
        clash: Of each column (C,), the first stamp that has two values; empty for none.
    """

    rows: Doubles
    frequency: Frequency
    start: np.datetime64 | None
    clash: tuple[str, ...]


def lay(record: Record, options: SourceOptions, notes: Notes, usual: Frequency | None = None) -> Grid:
    """Put the rows of a record on an even grid: sort, drop repeated rows, fill gaps with NaN.

    Args:
        record: What a file has.
        options: ``frequency`` goes before what the record says; ``gaps``.
        notes: Gets what was mended.
        usual: Frequency of the other series of the file, for a record that does not tell its own.

    Raises:
        DataError: Stamps are not even, or a gap is longer than allowed.
    """
    told = options.step() or record.frequency
    stamps, rows, columns = record.stamps, record.rows, record.rows.shape[1]
    if stamps is None or not len(rows):
        return Grid(rows, told or UNCOUNTED, None, ("",) * columns)
    steps = np.diff(stamps).astype(np.int64)
    if (steps < 0).any():
        order = np.argsort(stamps, kind="stable")
        stamps, rows = stamps[order], rows[order]
        steps = np.diff(stamps).astype(np.int64)
        notes.add("rows were not in the order of time and are sorted", record.name)
    start = None
    if stamps.dtype.kind == "M":
        frequency, at = _placed(stamps.astype("datetime64[ms]").tobytes(), told, usual)
        start = None if frequency.unit == "step" else stamps[0].astype("datetime64[ms]")
    else:
        step = int(_usual(steps)) if (steps > 0).any() else 1
        frequency, at = told or UNCOUNTED, (stamps - stamps[0]).astype(np.int64) // step
        if (steps % step).any():
            wrong = int(np.argmax(steps % step > 0)) + 1
            raise DataError(
                f"rows are counted in steps of {step}, but {stamps[wrong]} comes after {stamps[wrong - 1]}; correct it."
            )
        if int(at[-1]) + 1 > max(_ROWS, _FILLED * len(rows)):
            raise DataError(f"{len(rows):,} rows are counted up to {stamps[-1]}; correct the column of time.")
    jumps = np.diff(at)
    if len(jumps) and jumps.max() > 1:
        longest = int(jumps.argmax())
        before = show_stamp(stamps[longest]) if start is not None else str(stamps[longest])
        if options.gaps is not None and jumps[longest] - 1 > options.gaps:
            raise DataError(
                f"{int(jumps[longest]) - 1:,} rows are missing after {before}, and gaps allows {options.gaps}; add "
                "them, or raise gaps."
            )
        notes.add("missing rows filled with NaN: {count}", record.name, int((jumps[jumps > 1] - 1).sum()))
    elif not len(jumps) or jumps.min() == 1:
        return Grid(rows, frequency, start, ("",) * columns)
    laid, clash = _merge(rows, at, stamps)
    repeated = int((jumps == 0).sum())
    if not any(clash):
        notes.add("rows dropped that repeat the stamp and the values of another: {count}", record.name, repeated)
    return Grid(laid, frequency, start, clash)


@lru_cache(maxsize=8)  # series of a file often have the same stamps
def _placed(data: bytes, told: Frequency | None, usual: Frequency | None) -> tuple[Frequency, NDArray[np.int64]]:
    """The frequency of stamps that rise, as bytes of datetime64[ms], and their rows (N,)."""
    stamps: Stamps = np.frombuffer(data, "datetime64[ms]")
    steps = np.diff(stamps).astype(np.int64)
    if told is not None:
        return told, np.arange(len(stamps)) if told.unit == "step" else positions(stamps, told)
    different = stamps if (steps > 0).all() else stamps[np.append(True, steps > 0)]
    if usual is not None and len(different) < _FEW:
        try:
            return usual, positions(stamps, usual)
        except DataError:
            pass  # it is of another frequency, and may have enough stamps to tell
    own = infer_frequency(different)
    try:
        return own, positions(stamps, own)
    except DataError:
        if usual in (None, own):
            raise
        assert usual is not None
        return usual, positions(stamps, usual)


def _merge(rows: Doubles, at: NDArray[np.int64], stamps: Stamps | NDArray[np.int64]) -> tuple[Doubles, tuple[str, ...]]:
    """Rows (N, C) at their places of the grid (M, C); rows of one stamp add what others lack."""
    laid = np.full((int(at[-1]) + 1, rows.shape[1]), np.nan)
    clash = [""] * rows.shape[1]
    left = np.arange(len(rows))
    while len(left):
        first = np.append(True, at[left][1:] != at[left][:-1])
        own, place = rows[left[first]], at[left[first]]
        there = laid[place]
        differs = ~(np.isnan(there) | np.isnan(own) | (there == own))
        for column in np.flatnonzero(differs.any(0)):
            stamp = stamps[left[first][int(differs[:, column].argmax())]]
            shown = show_stamp(stamp) if stamps.dtype.kind == "M" else str(stamp)
            clash[column] = clash[column] or shown
        laid[place] = np.where(np.isnan(there), own, there)
        if all(clash):
            break
        left = left[~first]
    return laid, tuple(clash)


def finish(record: Record, grid: Grid, options: SourceOptions, notes: Notes, column: int | None = None) -> Series:
    """Make a series of a grid: it begins and ends with a known value; behind it, known covariates stay.

    Args:
        record: Names and counts of the columns.
        grid: Its rows.
        options: Whether a repeated stamp is a matter of the layout.
        notes: Gets what was cut off.
        column: The one variate to take, whose name becomes that of the series; None for all.

    Raises:
        DataError: It has fewer than two known values, an infinite one, or two values for a stamp.
    """
    count, past = len(record.variates), len(record.past)
    chosen = list(range(count)) if column is None else [column]
    name = record.name if column is None else record.variates[column]
    for at in [*chosen, *range(count, grid.rows.shape[1])]:
        if grid.clash[at]:
            advice = "" if options.item or (column is None and count == 1) else _NAME_ITEM
            raise DataError(
                f"the stamp {grid.clash[at]} occurs more than once, with different values; keep one of the rows, and "
                f"where a clock is set back in autumn, write the stamps in UTC{advice}."
            )
    values = grid.rows[:, chosen]
    finite: NDArray[np.bool_] = np.isfinite(values)
    seen = np.asarray(finite.any(1))
    have = int(finite.sum())
    if have < 2:
        raise DataError(f"{'one value is' if have else 'no value is'} known, and at least 2 are needed; leave it out.")
    begin, end = int(seen.argmax()), len(seen) - int(seen[::-1].argmax())
    known = grid.rows[begin:, count + past :]
    ahead = 0
    if record.known and len(told := np.flatnonzero(~np.isnan(known).all(1))):
        ahead = max(0, int(told[-1]) + 1 - (end - begin))
    notes.add("rows at the end without a value, cut off: {count}", name, len(seen) - end - ahead)
    values = values[begin:end]
    if _is_constant(values):
        notes.add("is constant", name)
    start = grid.start
    if start is not None and begin:
        start = grid.frequency.stamps(start, 1, begin)[0]
    return Series(
        name=name,
        source=str(notes.path),
        values=values,
        variates=record.variates if column is None else (name,),
        frequency=grid.frequency,
        start=start,
        past=grid.rows[begin:end, count : count + past],
        past_names=record.past,
        known=known[: end - begin + ahead],
        known_names=record.known,
    )


def _is_constant(values: Doubles) -> bool:
    told = [column[~np.isnan(column)] for column in values.T]
    return all((column == column[:1]).all() for column in told)


def assemble(
    record: Record,
    options: SourceOptions,
    notes: Notes,
    left: list[LeftOut],
    usual: Frequency | None = None,
    split: bool = False,
) -> list[Series]:
    """Make series of a record: one, or one of each variate; what cannot be used goes to ``left``.

    Args:
        record: What a file has.
        options: As in :func:`lay`.
        notes: Gets what was mended.
        left: Gets what was left out.
        usual: As in :func:`lay`.
        split: Whether each variate is a series.
    """
    path = str(notes.path)
    try:
        grid = lay(record, options, notes, usual)
    except DataError as e:
        left.append(LeftOut(path, record.name, plain(e, notes.path)))
        return []
    found = []
    for column in range(len(record.variates)) if split else [None]:
        try:
            found.append(finish(record, grid, options, notes, column))
        except DataError as e:
            name = record.name if column is None else record.variates[column]
            left.append(LeftOut(path, name, plain(e, notes.path)))
    return found


def _usual(steps: NDArray[np.int64]) -> np.int64:
    """The most common step above 0; the least of those."""
    if (steps == steps[0]).all():
        return steps[0]
    values, counts = np.unique(steps[steps > 0], return_counts=True)
    return values[counts.argmax()]


def _is_monthly(stamps: Stamps) -> bool:
    """Whether most stamps are at the same time of a month, or at its end."""
    months = stamps.astype("datetime64[M]")
    inside = (stamps - months).astype(np.int64)
    end = (stamps + np.timedelta64(1, "D")).astype("datetime64[M]") != months
    alike = max(int(np.unique(inside, return_counts=True)[1].max()), int(end.sum()))
    return alike >= max(2, (len(stamps) + 1) // 2) and bool((np.diff(months).astype(np.int64) > 0).any())


def _is_weekdays(stamps: Stamps) -> bool:
    """Whether stamps skip every weekend between them, and there is one."""
    days = stamps.astype("datetime64[D]")
    return bool(np.is_busday(days).all()) and bool((np.diff(days).astype(np.int64) > 2).any())
