"""Series in the ``.tsf`` files of the Monash archive of forecasting."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from vertebra.domains.timeseries.frequency import Frequency, parse_frequency
from vertebra.domains.timeseries.grids import assemble
from vertebra.domains.timeseries.reading import LeftOut, Notes, Record, SourceOptions, data_of, log
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.stamps import parse_stamps
from vertebra.errors import DataError, UnknownNameError

_KINDS = ("string", "numeric", "date")


@dataclass(frozen=True, kw_only=True)
class TsfHeader:
    """What a ``.tsf`` file says of all its series.

    Args:
        relation: Name of the data set.
        frequency: Step between two values; None where it is not told.
        horizon: Steps the data set is meant to be forecast for; 0 where it is not told.
        missing: Whether values are missing, written as ``?``.
        equal_length: Whether all series have the same length.
        attributes: Name and kind (string, numeric, date) of what stands before the values of each series.
    """

    relation: str = ""
    frequency: Frequency | None = None
    horizon: int = 0
    missing: bool = False
    equal_length: bool = False
    attributes: tuple[tuple[str, str], ...] = ()


def read_tsf_header(path: str | Path) -> TsfHeader:
    """Read the header of a ``.tsf`` file.

    Raises:
        DataError: It is no such file, or a line of the header is wrong.
    """
    path = Path(path)
    return _header(path, _text(path).split("\n"))[0]


def read_tsf(path: Path, options: SourceOptions, left: list[LeftOut]) -> list[Series]:
    """Read a ``.tsf`` file, packed with gzip or not.

    Args:
        path: The file.
        options: How it is read; ``frequency`` goes before the header.
        left: Gets what was left out.

    Raises:
        DataError: It is no such file, or a line of the header is wrong.
    """
    lines = _text(path).split("\n")
    header, begin = _header(path, lines)
    frequency = options.step() or header.frequency
    kinds = [kind for _, kind in header.attributes]
    names = [name.lower() for name, _ in header.attributes]
    name_at = names.index("series_name") if "series_name" in names else -1
    date_at = kinds.index("date") if "date" in kinds else -1
    notes = Notes(path)
    records: list[tuple[str, Record]] = []
    starts: list[str | None] = []
    lines_of: dict[str, str] = {}
    for number, line in enumerate(lines[begin:], begin + 1):
        where = f"line {number:,}"
        if not line.strip() or line.startswith("#"):
            continue
        *cells, text = line.strip().split(":")
        if len(cells) != len(kinds):
            reason = f"has {len(cells)} attributes before the values, and the header {len(kinds)}; correct the line"
            left.append(LeftOut(str(path), where, reason))
            continue
        name = cells[name_at].strip() if name_at >= 0 else str(len(records) + 1)
        if name in lines_of:
            reason = f"has the series_name {name!r} of {lines_of[name]}; give each series its own"
            left.append(LeftOut(str(path), where, reason))
            continue
        lines_of[name] = where
        try:
            values = np.array(text.replace("?", "nan").split(","), dtype=np.float64)
            wrong = "inf" if np.isinf(values).any() else ""
        except ValueError:
            wrong = next(cell.strip() for cell in text.split(",") if not _is_number(cell))
            values = np.zeros(0)
        if not text.strip() or wrong or not len(values):
            reason = f"has {wrong!r} for a value, which is no finite number; write ? for no value"
            left.append(LeftOut(str(path), where, reason))
            continue
        records.append((where, Record(name, values[:, None], ("target",), frequency=frequency)))
        starts.append(cells[date_at].strip() if date_at >= 0 else None)
    if not records and not left:
        raise DataError(f"{path}: holds no series below @data; copy or export it again.")
    if date_at >= 0 and records:
        records = _place(path, records, starts, frequency, options, left)
    if not header.missing and any(np.isnan(record.rows).any() for _, record in records):
        log.warning("%s: says @missing false, yet values are missing; they are read as such.", path)
    if header.horizon:
        log.info("%s: @horizon %d.", path, header.horizon)
    found: list[Series] = []
    for _, record in records:
        found += assemble(record, options, notes, left)
    notes.tell()
    return found


def _is_number(cell: str) -> bool:
    try:
        float(cell.replace("?", "nan"))
    except ValueError:
        return False
    return True


def _text(path: Path) -> str:
    data = data_of(path, "text of the format .tsf")
    try:
        text = data.decode()
    except UnicodeDecodeError:  # the archive has files in it
        text = data.decode("cp1252", errors="replace")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _header(path: Path, lines: list[str]) -> tuple[TsfHeader, int]:
    """The header, and how many lines it has."""
    told: dict[str, str] = {}
    attributes: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        if not line.startswith("@"):
            raise DataError(f"{path}: line {number} must begin with @ or #, before @data; it is no .tsf file.")
        key = words[0].lower()
        if key == "@data":
            return _header_of(path, told, attributes), number
        if key == "@attribute":
            if len(words) != 3 or words[2].lower() not in _KINDS:
                raise DataError(
                    f"{path}: line {number}: an attribute has a name and a kind ({', '.join(_KINDS)}), got "
                    f"{line.strip()!r}; correct the header."
                )
            attributes.append((words[1], words[2].lower()))
        else:
            told[key] = " ".join(words[1:])
    raise DataError(f"{path}: has no line @data; it is no .tsf file, or is cut short.")


def _header_of(path: Path, told: dict[str, str], attributes: list[tuple[str, str]]) -> TsfHeader:
    frequency = None
    if told.get("@frequency"):
        try:
            frequency = parse_frequency(told["@frequency"])
        except UnknownNameError as e:
            raise DataError(f"{path}: @frequency: {str(e).removesuffix('.')}; correct the header.") from None
    horizon = told.get("@horizon", "0")
    if not horizon.isdigit():
        raise DataError(f"{path}: @horizon must be a whole number, got {horizon!r}; correct the header.")
    return TsfHeader(
        relation=told.get("@relation", ""),
        frequency=frequency,
        horizon=int(horizon),
        missing=told.get("@missing", "").lower() == "true",
        equal_length=told.get("@equallength", "").lower() == "true",
        attributes=tuple(attributes),
    )


def _place(
    path: Path,
    records: list[tuple[str, Record]],
    starts: list[str | None],
    frequency: Frequency | None,
    options: SourceOptions,
    left: list[LeftOut],
) -> list[tuple[str, Record]]:
    """Give records their stamps."""
    if frequency is None:
        raise DataError(f"{path}: series have a start, and the header no @frequency; set frequency.")
    if frequency.unit == "step":
        return records
    stamps, bad = parse_stamps(pa.array(starts, pa.string()), options.date_format, f"{path}: the start")
    found = []
    for (where, record), start, stamp, no in zip(records, starts, stamps, bad, strict=True):
        if no or stamps.dtype.kind != "M":
            left.append(LeftOut(str(path), where, f"{start!r} is no time to start at; correct it"))
            continue
        record.stamps = frequency.stamps(stamp, len(record.rows))
        found.append((where, record))
    return found
