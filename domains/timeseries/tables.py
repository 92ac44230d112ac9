"""Series in tables, wide or long: CSV and its kin, Parquet.

A wide table has a row for each stamp and a column for each variate. A long table has a row for each stamp of each
series, a column that says which series it is, and one of the values.
"""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Stamps
from vertebra.domains.timeseries.grids import assemble, is_even, usual_frequency
from vertebra.domains.timeseries.reading import LeftOut, Notes, Record, SourceOptions, check_utf8, data_of, log
from vertebra.domains.timeseries.series import Doubles, Series
from vertebra.domains.timeseries.stamps import looks_like_stamps, parse_stamps
from vertebra.errors import DataError

TIMES = ("date", "ds", "timestamp", "datetime", "date_time", "time")
"""Usual names of the column of stamps, in lower case."""
ITEMS = ("unique_id", "item_id", "series_id", "ts_id")
"""Usual names of the column that tells series apart."""
TARGETS = ("y", "target", "value", "values")
"""Usual names of the values of a long table."""
EMPTY = ("", "nan", "na", "n/a", "<na>", "null", "none", "nat", "-", "?")
"""What stands for a missing value, in lower case."""

_EMPTY = pa.array(EMPTY)
_DELIMITERS = (",", ";", "\t", "|")
_NUMBER = r"^[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$"
_COMMA = r"^[+-]?\d*,\d+(?:[eE][+-]?\d+)?$"
_THOUSANDS = r"^[+-]?[1-9]\d{0,2},\d{3}$"
_INDEX = re.compile(r"__index_level_\d+__|Unnamed: \d+")  # what pandas calls an index without a name


@dataclass(eq=False)
class _Table:
    """Columns of a file, by name; those of a CSV are texts.

    Args:
        path: The file.
        columns: Its columns, of N rows.
        data: Text of a CSV without the header, to find lines in.
        delimiter: Of the CSV.
        above: Lines of the CSV above ``data``.
        width: Cells of a row of the CSV.
    """

    path: Path
    columns: dict[str, Any]
    data: bytes = b""
    delimiter: str = ","
    above: int = 0
    width: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def where(self, row: int) -> str:
        """How a user finds a row."""
        return f"line {self._lines[row]:,}" if row < len(self._lines) else f"row {row + 1:,}"

    @cached_property
    def _lines(self) -> list[int]:
        """Lines at which the rows of a CSV end."""
        reader = csv.reader(io.StringIO(self.data.decode(), newline=""), delimiter=self.delimiter)
        lines = []
        with contextlib.suppress(csv.Error):  # a cell that is far too long; rows are numbered then
            for cells in reader:
                if len(cells) == self.width and (len(cells) > 1 or cells[0]):
                    lines.append(reader.line_num + self.above)
        return lines

    def texts(self, name: str) -> Any:
        """A column as texts."""
        return pc.cast(self.columns[name], pa.string())

    def is_text(self, name: str) -> bool:
        """Whether a column is of texts, which may be numbers."""
        return pa.types.is_string(self.columns[name].type) or pa.types.is_large_string(self.columns[name].type)


def read_csv(path: Path, options: SourceOptions, left: list[LeftOut]) -> list[Series]:
    """Read a table of text: ``.csv``, ``.tsv``, ``.txt``, packed with gzip or not.

    Args:
        path: The file.
        options: How it is read.
        left: Gets what was left out.

    Raises:
        DataError: The file is not a table of series.
    """
    return _series(_csv_table(path, options, left), options, left)


def read_parquet(path: Path, options: SourceOptions, left: list[LeftOut]) -> list[Series]:
    """Read a table of Parquet.

    Args:
        path: The file.
        options: How it is read.
        left: Gets what was left out.

    Raises:
        DataError: The file is not a table of series.
    """
    try:
        table = pyarrow.parquet.read_table(path)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct the path.") from None
    except (OSError, pa.ArrowInvalid):
        raise DataError(f"{path}: is no Parquet file, or is damaged or cut short; copy or export it again.") from None
    if not table.num_columns or not table.num_rows:
        raise DataError(f"{path}: holds no rows; export it again.")
    _check_names(path, table.column_names)
    columns = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_dictionary(column.type):
            column = pc.cast(column, column.type.value_type)
        if pa.types.is_nested(column.type):
            raise DataError(f"{path}: the column {name!r} holds lists; write one row for each stamp.")
        columns[name] = column
    return _series(_Table(path, columns), options, left)


# ---------------------------------------------------------------- text to columns


def _csv_table(path: Path, options: SourceOptions, left: list[LeftOut]) -> _Table:
    data = data_of(path, "CSV")
    check_utf8(path, data)
    found = re.search(rb"[^\r\n]*[^\s][^\r\n]*", data)
    assert found is not None  # data is not blank
    body = data[found.end() :]
    body = body[2:] if body.startswith(b"\r\n") else body[1:]
    above = len(data[: len(data) - len(body)].splitlines())
    head = found.group().decode()
    delimiter = options.delimiter or _delimiter(head, body)
    header = [cell.strip() for cell in next(csv.reader([head], delimiter=delimiter))]
    if not body.strip():
        raise DataError(f"{path}: holds a header only; export it with its rows.")
    if all(_is_number(cell) or looks_like_stamps(pa.array([cell])) for cell in header):
        raise DataError(f"{path}: line {above} has numbers where names of columns belong; put a header above.")
    if header[-1] == "" and len(header) > 1:
        header[-1] = "\0"  # rows that end in a delimiter
    header = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
    _check_names(path, header)
    wrong = 0

    def skip(row: Any) -> str:
        nonlocal wrong
        wrong += 1
        return "skip"

    try:
        table = pyarrow.csv.read_csv(
            pa.BufferReader(body),
            read_options=pyarrow.csv.ReadOptions(column_names=header, block_size=1 << 24, use_threads=False),
            parse_options=pyarrow.csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=b'"' in body, invalid_row_handler=skip
            ),
            convert_options=pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in header}),
        )
    except pa.ArrowInvalid:
        raise DataError(f"{path}: is no table: a quote is not closed, or a row is far too long; mend it.") from None
    columns = {name: table[name] for name in header if name != "\0"}
    made = _Table(path, columns, body, delimiter, above, len(header))
    if wrong:
        _tell_wrong_rows(made, len(header), wrong, left)
    return made


def _tell_wrong_rows(table: _Table, width: int, wrong: int, left: list[LeftOut]) -> None:
    reader = csv.reader(io.StringIO(table.data.decode(), newline=""), delimiter=table.delimiter)
    line, have = next(((reader.line_num, len(cells)) for cells in reader if cells and len(cells) != width), (0, 0))
    more = f" (such lines: {wrong:,})" if wrong > 1 else ""
    reason = f"has {have} cells, and the header {width}{more}; mend the row, or set delimiter"
    where = f"line {line + table.above:,}"
    if not len(table):
        raise DataError(f"{table.path}: {where} {reason}.")
    left.append(LeftOut(str(table.path), where, reason))


def _delimiter(head: str, body: bytes) -> str:
    """The delimiter that cuts the header and the first row into the same number of cells, the most."""
    first = next((line for line in body[:1_000_000].decode(errors="replace").splitlines() if line.strip()), head)
    counts = {}
    for sign in _DELIMITERS:
        one, two = (_width(line, sign) for line in (head, first))
        counts[sign] = (one == two, one)
    return max(_DELIMITERS, key=lambda sign: (counts[sign][1] > 1, *counts[sign]))


def _width(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter)))
    except csv.Error:  # one cell that is far too long
        return 1


def _is_number(cell: str) -> bool:
    return bool(re.match(_NUMBER, cell.replace(",", ".")))


def _check_names(path: Path, names: Sequence[str]) -> None:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise DataError(f"{path}: two columns are called {repeated[0]!r}; rename one.")


# ---------------------------------------------------------------- columns to series


def _series(table: _Table, options: SourceOptions, left: list[LeftOut]) -> list[Series]:
    named = {"time": (options.time,), "item": (options.item,), "target": options.target or ()}
    for role, names in (named | {"past": options.past, "known": options.known}).items():
        for name in names:
            if name is not None and name not in table.columns:
                there = ", ".join(list(table.columns)[:20]) + (", ..." if len(table.columns) > 20 else "")
                raise DataError(f"{table.path}: there is no column {name!r} for {role}; columns: {there}.")
    item = options.item
    if item is None and options.layout != "wide":
        item = next((name for name in table.columns if name.lower() in ITEMS), None)
    if item is None and options.layout == "long":
        raise DataError(
            f"{table.path}: no column is called {', '.join(ITEMS[:-1])} or {ITEMS[-1]}; name the one that tells series "
            f"apart as item. Columns: {', '.join(table.columns)}."
        )
    time = _time(table, options, item)
    notes = Notes(table.path)
    if time is None:
        log.warning("%s: no column of stamps is found; rows are counted. Name one as time.", table.path)
    read = _read_wide(table, options, notes, left, time) if item is None else None
    if item is not None:
        read = _read_long(table, options, notes, left, time, item)
    notes.tell()
    return read or []


def _time(table: _Table, options: SourceOptions, item: str | None) -> str | None:
    """The column of stamps: named so, typed so, or the first if it looks so."""
    if options.time is not None:
        return options.time
    taken = {item, *(options.target or ()), *options.past, *options.known}
    names = [name for name in table.columns if name not in taken]
    for usual in TIMES:
        if found := [name for name in names if name.lower() == usual]:
            return found[0]
    typed = [name for name in names if pa.types.is_temporal(table.columns[name].type)]
    looks = [name for name in names if table.is_text(name) and looks_like_stamps(table.texts(name).slice(0, 20))]
    return next(iter(typed + looks), None)


def _stamps(
    table: _Table, name: str | None, options: SourceOptions
) -> tuple[Stamps | NDArray[np.int64] | None, NDArray[np.bool_]]:
    if name is None:
        return None, np.zeros(len(table), bool)
    column = table.columns[name]
    if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
        stamps: Any = pc.cast(column, pa.timestamp("ms"), safe=False).to_numpy()
        return stamps, np.isnat(stamps)
    if pa.types.is_floating(column.type):
        column = pc.cast(column, pa.int64(), safe=False)
    texts = pc.cast(column, pa.string())
    texts = pc.if_else(pc.is_in(pc.utf8_lower(texts), _EMPTY), None, texts)
    return parse_stamps(texts, options.date_format, f"{table.path}: the column {name!r}", is_even)


@dataclass(eq=False)
class _Numbers:
    """A column as numbers (N,), and which cells are none."""

    values: Doubles
    bad: NDArray[np.bool_]
    told: int  # cells that are not empty


def _numbers(table: _Table, names: Sequence[str], options: SourceOptions) -> dict[str, _Numbers]:
    texts = {name: _told(table.columns[name]) for name in names if table.is_text(name)}
    comma = _is_comma(table, texts, options)
    found = {}
    for name in names:
        if name in texts:
            found[name] = _parse(texts[name], comma)
            continue
        column = table.columns[name]
        try:
            values = pc.cast(column, pa.float64(), safe=False).to_numpy().astype(np.float64)
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            raise DataError(f"{table.path}: the column {name!r} holds {column.type}, not numbers.") from None
        found[name] = _Numbers(values, np.isinf(values), int((~np.isnan(values)).sum()))
    return found


def _told(column: Any) -> Any:
    """Texts, null where a value is missing."""
    texts = pc.utf8_trim_whitespace(column)
    return pc.if_else(pc.is_in(pc.utf8_lower(texts), _EMPTY), None, texts)


def _is_comma(table: _Table, texts: dict[str, Any], options: SourceOptions) -> bool:
    """Whether the decimal sign is a comma: what is read so far must be clear."""
    if options.decimal != "auto":
        return options.decimal == ","
    unclear = None
    for name, column in texts.items():
        if not pc.any(pc.match_substring(column, ",")).as_py():
            continue
        with_comma = pc.filter(column, pc.match_substring_regex(column, _COMMA))
        if not len(with_comma):
            continue
        if not pc.all(pc.match_substring_regex(with_comma, _THOUSANDS)).as_py():
            return True
        unclear = unclear or (name, with_comma[0].as_py())
    if unclear:
        raise DataError(
            f"{table.path}: whether the comma of {unclear[1]!r} in the column {unclear[0]!r} is a decimal sign is not "
            "clear; set decimal to ',', or take out the signs of thousands."
        )
    return False


def _parse(texts: Any, comma: bool) -> _Numbers:
    told = len(texts) - texts.null_count
    bad = np.zeros(len(texts), bool)
    plain = pc.if_else(pc.match_substring(texts, "."), "x", pc.replace_substring(texts, ",", ".")) if comma else texts
    try:
        values = pc.cast(plain, pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        good = pc.match_substring_regex(plain, _NUMBER)
        bad = pc.fill_null(pc.invert(good), False).to_numpy()
        numbers = pc.replace_substring(pc.if_else(good, plain, None), "+", "", max_replacements=1)
        values = pc.cast(pc.replace_substring_regex(numbers, "[eE]([0-9])", r"e+\1"), pa.float64()).to_numpy()
    values = values.astype(np.float64)
    return _Numbers(values, bad | np.isinf(values), told)


def _wrong(table: _Table, names: Iterable[str], found: dict[str, _Numbers], row: int) -> str:
    """What is wrong with a row of which a cell is no number."""
    name = next(name for name in names if found[name].bad[row])
    cell = table.columns[name][row].as_py()
    return (
        f"{table.where(row)} has {cell!r} in the column {name!r}, which is no finite number; correct it, or leave it "
        "empty"
    )


def _read_wide(
    table: _Table, options: SourceOptions, notes: Notes, left: list[LeftOut], time: str | None
) -> list[Series]:
    stamps, lost = _stamps(table, time, options)
    if lost.any():
        row = int(lost.argmax())
        assert time is not None
        cell = table.columns[time][row].as_py()
        raise DataError(f"{table.path}: {table.where(row)} has {cell!r} for a stamp; correct it, or take the row out.")
    covariates = (*options.past, *options.known)
    names = [n for n in options.target or table.columns if n != time and n not in covariates]
    found = _numbers(table, (*names, *covariates), options)
    if options.target is None:
        text = [n for n in names if found[n].bad.sum() * 2 > found[n].told]
        if text:
            log.warning("%s: columns of text are passed over: %s.", table.path, ", ".join(text))
        names = [n for n in names if n not in text and not _is_index(n, found[n])]
    if not names:
        example = next((_example(table, n, found[n]) for n in found if found[n].bad.any()), "")
        raise DataError(f"{table.path}: has no column of numbers to forecast{example}; name one as target.")
    bad = [n for n in (*names, *covariates) if found[n].bad.any()]
    whole = [n for n in bad if options.multivariate or n in covariates]
    if whole:
        row = min(int(found[n].bad.argmax()) for n in whole)
        raise DataError(f"{table.path}: {_wrong(table, whole, found, row)}.")
    for name in bad:
        left.append(LeftOut(str(table.path), name, _wrong(table, [name], found, int(found[name].bad.argmax()))))
    names = [n for n in names if n not in bad]
    if not names:
        return []
    record = Record(
        name=table.path.name.split(".")[0] if options.multivariate else "",
        rows=np.stack([found[n].values for n in (*names, *covariates)], axis=1),
        variates=tuple(names),
        past=options.past,
        known=options.known,
        stamps=stamps,
    )
    return assemble(record, options, notes, left, split=not options.multivariate)


def _example(table: _Table, name: str, column: _Numbers) -> str:
    return f": {name!r} holds text such as {table.columns[name][int(column.bad.argmax())].as_py()!r}"


def _is_index(name: str, column: _Numbers) -> bool:
    """Whether a column counts rows and has no name: the index of a data frame."""
    return bool(_INDEX.fullmatch(name)) and bool((np.diff(column.values) == 1).all())


def _read_long(
    table: _Table, options: SourceOptions, notes: Notes, left: list[LeftOut], time: str | None, item: str
) -> list[Series]:
    if options.multivariate:
        raise DataError(f"{table.path}: multivariate is for wide tables, and this one is long; leave it out.")
    covariates = (*options.past, *options.known)
    target = _target(table, options, {item, time, *covariates})
    rest = [n for n in table.columns if n not in (item, time, target, *covariates) and not _INDEX.fullmatch(n)]
    if rest:
        log.info("%s: columns not read: %s; name covariates as past or known.", table.path, ", ".join(rest))
    stamps, lost = _stamps(table, time, options)
    used = (target, *covariates)
    found = _numbers(table, used, options)
    rows = np.stack([found[n].values for n in used], axis=1)
    bad = lost | np.logical_or.reduce([found[n].bad for n in used])

    encoded = pc.fill_null(pc.utf8_trim_whitespace(table.texts(item)), "").combine_chunks().dictionary_encode()
    names = encoded.dictionary.to_pylist()
    codes = encoded.indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    edges = np.searchsorted(codes[order], np.arange(len(names) + 1))
    groups = [order[begin:end] for begin, end in itertools.pairwise(edges)]
    usual = None
    if stamps is not None and stamps.dtype.kind == "M" and options.frequency is None:
        some = [stamps[group] for group in groups[:200]]
        usual = usual_frequency(np.unique(own[~np.isnat(own)]) for own in some)
    series: list[Series] = []
    for name, group in zip(names, groups, strict=True):
        rule = ""
        if wrong := group[bad[group]].tolist():
            if lost[wrong[0]] and time is not None:
                cell = table.columns[time][wrong[0]].as_py()
                rule = f"{table.where(wrong[0])} has {cell!r} for a stamp; correct it, or take the row out"
            else:
                rule = _wrong(table, used, found, wrong[0])
        elif not name:
            rule = f"{table.where(int(group[0]))} has no {item}; tell which series it is of"
        if rule:
            left.append(LeftOut(str(table.path), name, rule))
            continue
        record = Record(
            name=name,
            rows=rows[group],
            variates=(target,),
            past=options.past,
            known=options.known,
            stamps=None if stamps is None else stamps[group],
        )
        series += assemble(record, options, notes, left, usual)
    return series


def _target(table: _Table, options: SourceOptions, taken: set[str | None]) -> str:
    """The column of the values of a long table."""
    if options.target is not None:
        if len(options.target) != 1:
            raise DataError(
                f"{table.path}: target names {len(options.target)} columns, and a long table has one of values; name "
                "one, and the others as past or known."
            )
        return options.target[0]
    free = [name for name in table.columns if name not in taken]
    if found := [name for usual in TARGETS for name in free if name.lower() == usual]:
        return found[0]
    if len(free) == 1:
        return free[0]
    raise DataError(
        f"{table.path}: which column holds the values is not clear, since none is called {' or '.join(TARGETS[:3])}; "
        f"name it as target. Columns: {', '.join(free) or 'none'}."
    )
