"""What the readers of series share: options, what is left out, notes of what was mended, bytes of a file."""

from __future__ import annotations

import gzip
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Frequency, parse_frequency
from vertebra.errors import ConfigError, DataError

log = logging.getLogger("vertebra")

_KINDS = {
    b"PAR1": "a Parquet file",
    b"PK\x03\x04": "a spreadsheet or a zip archive",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet",
    b"\x89HDF": "an HDF5 file",
    b"\xff\xfe": "text in UTF-16",
    b"\xfe\xff": "text in UTF-16",
}
"""What the first bytes of a file that is no text in UTF-8 tell."""


@dataclass(frozen=True, kw_only=True)
class SourceOptions:
    """How files are read; whatever is not told is found out.

    Args:
        frequency: Step between two stamps, such as ``h``, ``15min``, ``MS``.
        layout: Of tables: ``wide`` has a column for each variate, ``long`` one column that says which series a row is
            of; ``auto`` takes a table with a column such as ``unique_id`` for long.
        time: Column of the stamps.
        item: Column that tells the series of a long table apart.
        target: Wide: columns to forecast, all columns of numbers by default. Long: the one column of the values.
        past: Columns of covariates known up to the end of a series.
        known: Columns of covariates known beyond it: rows whose target is empty, at the end, are the future.
        delimiter: Between the cells of a row: ``,`` ``;`` a tab or ``|``.
        decimal: The decimal sign of a table.
        date_format: Of the stamps, as ``strptime`` takes it: ``%d.%m.%Y %H:%M``.
        multivariate: Whether the columns of a wide table or an array are variates of one series; else each is a series.
        gaps: Most missing rows in a run that are filled with NaN; None for any.

    Raises:
        ConfigError: A setting is impossible, or a column is told to be two things.
        UnknownNameError: There is no such frequency.
    """

    frequency: str | None = None
    layout: Literal["auto", "wide", "long"] = "auto"
    time: str | None = None
    item: str | None = None
    target: tuple[str, ...] | None = None
    past: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    delimiter: str | None = None
    decimal: Literal["auto", ".", ","] = "auto"
    date_format: str | None = None
    multivariate: bool = False
    gaps: int | None = None

    def __post_init__(self) -> None:
        for what, choices in (("layout", ("auto", "wide", "long")), ("decimal", ("auto", ".", ","))):
            if getattr(self, what) not in choices:
                raise ConfigError(f"{what} must be one of {' '.join(choices)}; got {getattr(self, what)!r}.")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\n\r'):
            raise ConfigError(f"delimiter must be one character, such as ',' or ';'; got {self.delimiter!r}.")
        if self.delimiter is not None and self.delimiter == self.decimal:
            raise ConfigError(f"delimiter and decimal must differ; both are {self.delimiter!r}.")
        if self.gaps is not None and self.gaps < 0:
            raise ConfigError(f"gaps must be at least 0, or None for any; got {self.gaps}.")
        if self.layout == "wide" and self.item is not None:
            raise ConfigError(f"item is {self.item!r}, but a wide table has no such column; set layout to long.")
        for what in ("target", "past", "known"):
            if isinstance(getattr(self, what), str):
                raise ConfigError(f"{what} must be a list of names; got the text {getattr(self, what)!r}.")
        roles: list[tuple[str, tuple[str | None, ...]]] = [
            ("time", (self.time,)),
            ("item", (self.item,)),
            ("target", self.target or ()),
            ("past", self.past),
            ("known", self.known),
        ]
        taken: dict[str, str] = {}
        for role, names in roles:
            for name in names:
                if name is not None and taken.setdefault(name, role) != role:
                    raise ConfigError(f"the column {name!r} is both {taken[name]} and {role}; name it once.")
        self.step()

    def step(self) -> Frequency | None:
        """The frequency that is told."""
        return None if self.frequency is None else parse_frequency(self.frequency)


@dataclass(frozen=True)
class LeftOut:
    """A file, series or row that was not read.

    Args:
        file: Its path.
        record: Which series or row of the file; empty for all of it.
        reason: What is wrong, and what to do.
    """

    file: str
    record: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.file, self.record, self.reason) if part) + "."


@dataclass(eq=False)
class Record:
    """A series, or several side by side, as a file has it.

    Args:
        name: Of the series.
        rows: N rows of numbers, (N, V + Cp + Ck): values, past and known covariates; NaN where empty.
        variates: Names of the first V columns.
        past: Names of the Cp next.
        known: Names of the Ck last.
        stamps: datetime64[ms] (N,), or counted rows as int64 (N,); None where rows have none.
        frequency: Step that the file tells.
    """

    name: str
    rows: NDArray[np.float64]
    variates: tuple[str, ...]
    past: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    stamps: NDArray[np.datetime64] | NDArray[np.int64] | None = None
    frequency: Frequency | None = None


@dataclass
class Notes:
    """What was mended in a file, told in one line for each kind however many series it is about.

    Args:
        path: The file.
        found: By kind: how much, in how many series, which was the first.
    """

    path: Path
    found: dict[str, tuple[int, int, str]] = field(default_factory=dict)

    def add(self, kind: str, record: str, count: int = 1) -> None:
        """Count ``count`` more of a kind, a text with ``{count}``, in one series."""
        if count:
            before, series, first = self.found.get(kind, (0, 0, record))
            self.found[kind] = (before + count, series + 1, first)

    def tell(self) -> None:
        """Write the notes to the log, once."""
        for kind, (count, series, first) in self.found.items():
            where = f"{self.path}: {first}" if first and series == 1 else str(self.path)
            more = f" ({series:,} series, the first is {first})" if series > 1 else ""
            log.warning("%s: %s%s.", where, kind.format(count=f"{count:,}"), more)
        self.found.clear()


def side_by_side(blocks: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Put columns (N, C) of different lengths side by side; NaN below the shorter ones."""
    rows = np.full((max(map(len, blocks)), sum(block.shape[1] for block in blocks)), np.nan)
    at = 0
    for block in blocks:
        rows[: len(block), at : at + block.shape[1]] = block
        at += block.shape[1]
    return rows


def plain(error: DataError, path: Path) -> str:
    """The reason of an error, without the file it begins with and without a full stop."""
    return str(error).removeprefix(f"{path}: ").removesuffix(".")


def data_of(path: Path, what: str) -> bytes:
    """Return the bytes of a file of text, unpacked where it is packed with gzip, and without a byte order mark.

    Args:
        path: The file.
        what: The kind of text, for errors.

    Raises:
        DataError: It is missing, empty, cut short, binary, or not in UTF-8.
    """
    data = raw_bytes(path)
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error):
            raise DataError(f"{path}: the gzip file is damaged or cut short; copy or export it again.") from None
    for begin, kind in _KINDS.items():
        if data.startswith(begin):
            advice = "save it in UTF-8" if "UTF-16" in kind else f"export it as {what}, or correct its ending"
            raise DataError(f"{path}: this is {kind}, not {what}; {advice}.")
    if b"\0" in data:
        raise DataError(f"{path}: holds binary data (a zero byte), and {what} is text; copy or export it again.")
    data = data.removeprefix(b"\xef\xbb\xbf")
    if not data.strip():
        raise DataError(f"{path}: the file is empty; copy or export it again.")
    return data


def raw_bytes(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        DataError: It is missing or cannot be opened.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct the path.") from None
    except OSError as e:
        raise DataError(f"{path}: the file cannot be opened ({e.strerror or e}); check what it is.") from None


def check_utf8(path: Path, data: bytes) -> None:
    """Refuse what is not UTF-8.

    Raises:
        DataError: With the line of the first wrong byte.
    """
    try:
        data.decode()
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path}: line {line:,} is no text in UTF-8; save the file in UTF-8.") from None
