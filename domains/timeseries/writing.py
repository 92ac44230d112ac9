"""Series written in the formats that are read: for samples, tests, and users who convert files.

Shapes: T steps, V variates, Cp past and Ck known covariates, F steps beyond the end.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from vertebra.domains.timeseries.frequency import Frequency
from vertebra.domains.timeseries.grids import positions
from vertebra.domains.timeseries.series import Doubles, Series
from vertebra.domains.writing import whole_file
from vertebra.errors import DataError

_TSF_WORDS = {
    "ms": "ms", "s": "seconds", "min": "minutes", "h": "hourly", "D": "daily", "B": "B", "W": "weekly",
    "MS": "monthly", "QS": "quarterly", "YS": "yearly",
}  # fmt: skip
_TSF_ONE = {"s": "secondly", "min": "minutely"}
Table = tuple[list[str], list[list[Any]]]
"""Names of columns, and the columns: text, stamps, or numbers with NaN."""


def write_csv_wide(
    path: str | Path,
    series: Sequence[Series],
    *,
    delimiter: str = ",",
    decimal: Literal[".", ","] = ".",
    date_format: str | None = None,
) -> None:
    """Write a table with a row for each stamp and a column for each variate, ``date`` first.

    Series of several variates give a column each; covariates are those of the first series, and rows beyond the end are
    there where some are known. A path that ends in ``.gz`` is packed.

    Args:
        path: The file, which appears whole or not at all.
        series: Of one frequency, with stamps or all without.
        delimiter: Between cells.
        decimal: The decimal sign.
        date_format: Of the stamps, as ``strftime`` takes it; None for ``2016-07-01 00:00:00``.

    Raises:
        DataError: Series do not fit into one table, or the file cannot be written.
    """
    _write_text(path, _wide(path, series), delimiter, decimal, date_format)


def write_csv_long(
    path: str | Path,
    series: Sequence[Series],
    *,
    columns: tuple[str, str, str] = ("unique_id", "ds", "y"),
    delimiter: str = ",",
    decimal: Literal[".", ","] = ".",
    date_format: str | None = None,
) -> None:
    """Write a table with a row for each stamp of each series; known covariates have rows beyond the end.

    Args:
        path: The file, which appears whole or not at all.
        series: Of one variate each, with the same covariates.
        columns: Names of the columns of the series, the stamps and the values.
        delimiter: Between cells.
        decimal: The decimal sign.
        date_format: Of the stamps, as ``strftime`` takes it; None for ``2016-07-01 00:00:00``.

    Raises:
        DataError: Series do not fit into one table, or the file cannot be written.
    """
    _write_text(path, _long(path, series, columns), delimiter, decimal, date_format)


def write_parquet(
    path: str | Path,
    series: Sequence[Series],
    *,
    layout: Literal["wide", "long"] = "long",
    columns: tuple[str, str, str] = ("unique_id", "ds", "y"),
) -> None:
    """Write a table of Parquet, wide as :func:`write_csv_wide` or long as :func:`write_csv_long`.

    Args:
        path: The file, which appears whole or not at all.
        series: What to write.
        layout: Of the table.
        columns: Names of the columns of a long one.

    Raises:
        DataError: Series do not fit into one table, or the file cannot be written.
    """
    names, cells = _wide(path, series) if layout == "wide" else _long(path, series, columns)
    arrays = [pa.array(np.asarray(own)) if own and not isinstance(own[0], str) else pa.array(own) for own in cells]
    with whole_file(Path(path)) as file:
        pyarrow.parquet.write_table(pa.Table.from_arrays(arrays, names=names), file)


def write_jsonl(path: str | Path, series: Sequence[Series]) -> None:
    """Write one JSON object a line, as GluonTS reads it: start, target, item_id, freq and covariates.

    Args:
        path: The file, which appears whole or not at all; packed where it ends in ``.gz``.
        series: What to write.

    Raises:
        DataError: The file cannot be written.
    """
    lines = []
    for own in series:
        entry: dict[str, Any] = {"item_id": own.name}
        if own.start is not None:
            entry["start"] = _stamp(own.start)
            entry["freq"] = str(own.frequency)
        entry["target"] = _listed(own.values[:, 0] if own.values.shape[1] == 1 else own.values.T)
        if own.known_names:
            entry["feat_dynamic_real"] = _listed(own.known.T)
        if own.past_names:
            entry["past_feat_dynamic_real"] = _listed(own.past.T)
        lines.append(json.dumps(entry))
    _write_bytes(Path(path), ("\n".join(lines) + "\n").encode())


def write_tsf(path: str | Path, series: Sequence[Series], *, relation: str = "series", horizon: int = 0) -> None:
    """Write a ``.tsf`` file of the Monash archive.

    Args:
        path: The file, which appears whole or not at all; packed where it ends in ``.gz``.
        series: Of one variate each, without covariates, and of one frequency.
        relation: Name of the data set.
        horizon: Steps it is meant to be forecast for; 0 for none.

    Raises:
        DataError: The format cannot hold the series, or the file cannot be written.
    """
    path = Path(path)
    _check(path, series, single=True)
    first = series[0]
    if any(own.past_names or own.known_names for own in series):
        raise DataError(f"{path}: .tsf holds no covariates; write CSV or JSON lines.")
    if bad := [own.name for own in series if set(own.name) & set(":\n\r")]:
        raise DataError(f"{path}: .tsf cannot hold the name {bad[0]!r}, for its colon; rename the series.")
    stamped = first.start is not None
    head = [f"@relation {relation}", "@attribute series_name string"]
    head += ["@attribute start_timestamp date"] if stamped else []
    head += [f"@frequency {_tsf_frequency(first.frequency)}"] if stamped else []
    head += [f"@horizon {horizon}"] if horizon else []
    head.append(f"@missing {str(any(np.isnan(own.values).any() for own in series)).lower()}")
    head += [f"@equallength {str(len({len(own) for own in series}) == 1).lower()}", "@data"]
    lines = []
    for own in series:
        values = ",".join("?" if math.isnan(value) else repr(value) for value in own.values[:, 0].tolist())
        start = [] if own.start is None else [_stamp(own.start).replace(":", "-")]
        lines.append(":".join([own.name, *start, values]))
    _write_bytes(path, ("\n".join([*head, *lines]) + "\n").encode())


def write_npz(path: str | Path, series: Series) -> None:
    """Write an archive of one series: values (T, V), stamps (T,), freq, names, and covariates with their names.

    Args:
        path: The file, which appears whole or not at all.
        series: What to write.

    Raises:
        DataError: The file cannot be written.
    """
    arrays: dict[str, Any] = {"values": series.values}
    arrays["names"] = np.array([series.name] if series.values.shape[1] == 1 else series.variates)
    if series.start is not None:
        arrays["stamps"] = series.stamps(len(series))
        arrays["freq"] = np.array(str(series.frequency))
    for what in ("past", "known"):
        if names := getattr(series, f"{what}_names"):
            arrays |= {what: getattr(series, what), f"{what}_names": np.array(names)}
    with whole_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)


def _check(path: str | Path, series: Sequence[Series], single: bool) -> None:
    if not series:
        raise DataError(f"{path}: there is no series to write.")
    first = series[0]
    if single and any(own.values.shape[1] != 1 for own in series):
        raise DataError(f"{path}: the format holds series of one variate; write a wide table, JSON lines or .npz.")
    for own in series:
        if (own.start is None) != (first.start is None) or own.frequency != first.frequency:
            raise DataError(
                f"{path}: {own.name} has the frequency {own.frequency}, and {first.name} {first.frequency}; write one "
                "file for each."
            )


def _wide(path: str | Path, series: Sequence[Series]) -> Table:
    _check(path, series, single=False)
    first = series[0]
    begin = min((own for own in series), key=lambda own: own.start or np.datetime64(0, "ms"))
    at = []
    for own in series:
        stamps = np.array([begin.start, own.start]) if own.start is not None else None
        at.append(0 if stamps is None else int(positions(stamps.astype("datetime64[ms]"), own.frequency)[-1]))
    known = at[0] + len(first.known) if first.known_names else 0
    rows = max(known, *(place + len(own) for place, own in zip(at, series, strict=True)))

    def column(values: Doubles, place: int) -> list[float]:
        cells = np.full(rows, np.nan)
        cells[place : place + len(values)] = values
        return cells.tolist()

    names: list[str] = []
    cells: list[list[Any]] = []
    if begin.start is not None:
        names, cells = ["date"], [list(begin.stamps(rows))]
    for place, own in zip(at, series, strict=True):
        names += [own.name] if own.values.shape[1] == 1 else own.variates
        cells += [column(values, place) for values in own.values.T]
    for kind, values in ((first.past_names, first.past), (first.known_names, first.known)):
        if kind:
            names += kind
            cells += [column(own, at[0]) for own in values.T]
    if len(set(names)) < len(names):
        raise DataError(f"{path}: two columns would have one name; rename the series or variates.")
    return names, cells


def _long(path: str | Path, series: Sequence[Series], columns: tuple[str, str, str]) -> Table:
    if any(own.values.shape[1] != 1 for own in series) or not series:
        _check(path, series, single=True)
    first = series[0]
    names = [columns[0], *([columns[1]] if first.start is not None else []), columns[2]]
    names += [*first.past_names, *first.known_names]
    cells: list[list[Any]] = [[] for _ in names]
    for own in series:
        same = (own.past_names, own.known_names) == (first.past_names, first.known_names)
        if not same or (own.start is None) != (first.start is None):
            raise DataError(f"{path}: {own.name} has other covariates or stamps than {first.name}; write two files.")
        rows = max(len(own), len(own.known) if own.known_names else 0)
        parts: list[list[Any]] = [[own.name] * rows]
        if own.start is not None:
            parts.append(list(own.stamps(rows)))
        blocks = [own.values, *([own.past] if own.past_names else []), *([own.known] if own.known_names else [])]
        for values in (column for block in blocks for column in block.T):
            parts.append([*values.tolist(), *[math.nan] * (rows - len(values))])
        for into, part in zip(cells, parts, strict=True):
            into += part
    return names, cells


def _write_text(path: str | Path, table: Table, delimiter: str, decimal: str, date_format: str | None) -> None:
    names, columns = table

    def show(value: Any) -> str:
        if isinstance(value, np.datetime64):
            return value.item().strftime(date_format) if date_format else _stamp(value)
        if isinstance(value, float):
            return "" if math.isnan(value) else repr(value).replace(".", decimal)
        return str(value)

    with StringIO(newline="") as text:
        writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([show(cell) for cell in row] for row in zip(*columns, strict=True))
        _write_bytes(Path(path), text.getvalue().encode())


def _stamp(stamp: np.datetime64) -> str:
    return str(np.datetime_as_string(stamp.astype("datetime64[ms]"), "ms")).replace("T", " ").removesuffix(".000")


def _listed(values: Doubles) -> list[Any]:
    """Numbers as lists, null where one is missing."""
    cells = values.astype(object)
    cells[np.isnan(values)] = None
    return list(cells.tolist())


def _tsf_frequency(frequency: Frequency) -> str:
    if frequency.count == 1:
        return _TSF_ONE.get(frequency.unit, _TSF_WORDS[frequency.unit])
    return f"{frequency.count}_{_TSF_WORDS[frequency.unit]}"


def _write_bytes(path: Path, data: bytes) -> None:
    with whole_file(path) as file:
        file.write(gzip.compress(data, mtime=0) if path.name.lower().endswith(".gz") else data)
