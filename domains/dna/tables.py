"""CSV and TSV tables of sequences and labels: the layout of GUE (https://arxiv.org/abs/2306.15006)."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.dna.records import (
    MAX_LENGTH,
    Lines,
    OnError,
    RecordError,
    existing_file,
    first_text,
    guess_format,
    report,
    sequence_problem,
    text_blocks,
)
from vertebra.errors import DataError

LABEL_SEPARATOR = ";"  # between the labels of one multi-label field
_OTHER_FIELDS = 1 << 20  # letters that the other fields of a row may take
_MISSING = frozenset(("", "nan", "na", "n/a", "null", "none", "inf", "-inf", "+inf", "infinity", "-infinity"))


@dataclass(frozen=True)
class Table:
    """Rows of a table that could be used, labels still as text.

    Args:
        path: The file.
        names: One a row: its column ``name`` or ``id``, else ``row_1``, ``row_2``, ...
        sequences: One a row; of a sequence pair the first.
        seconds: The second sequence of a pair, one a row, or empty where the file has none.
        labels: One tuple a row, with one text a label column.
        label_columns: Names of the label columns.
        lines: Line of each row in the file, counted from 1.
    """

    path: Path
    names: list[str]
    sequences: list[str]
    seconds: list[str]
    labels: list[tuple[str, ...]]
    label_columns: tuple[str, ...]
    lines: list[int]

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def kind(self) -> Literal["classification", "multilabel", "regression"]:
        """What the labels look like.

        One column with a ``;``, or several columns of 0 and 1: multilabel. Numbers with a fraction, or several columns
        of numbers: regression. Everything else: classification.
        """
        values = {value for row in self.labels for value in row}
        if len(self.label_columns) == 1 and any(LABEL_SEPARATOR in value for value in values):
            return "multilabel"
        numbers = [_number(value) for value in values]
        known = [number for number in numbers if number is not None]
        if len(self.label_columns) > 1:
            return "multilabel" if len(known) == len(numbers) and set(known) <= {0.0, 1.0} else "regression"
        fraction = any(number != int(number) for number in known)
        return "regression" if len(known) == len(numbers) and fraction else "classification"

    def class_names(self) -> tuple[str, ...]:
        """Return the classes, or the labels of a multi-label table: numbers by value, other names by alphabet."""
        if len(self.label_columns) > 1:
            return self.label_columns
        names = {name for row in self.labels for name in _split(row[0])}
        return tuple(sorted(names, key=lambda n: (_number(n) is None, _number(n) or 0.0, n)))

    def class_ids(self, classes: Sequence[str] | None = None) -> NDArray[np.int64]:
        """Return the class of each row as an index into ``classes`` (own ones if None), shape (N,).

        Raises:
            DataError: A label that is not among them, or several label columns.
        """
        if len(self.label_columns) != 1:
            raise DataError(f"{self.path}: classes need one label column, got {', '.join(self.label_columns)}.")
        index = {name: i for i, name in enumerate(self.class_names() if classes is None else classes)}
        return np.array([self._find(index, row[0], n) for n, row in enumerate(self.labels)], dtype=np.int64)

    def indicator(self, classes: Sequence[str] | None = None) -> NDArray[np.float32]:
        """Return 1 where a row has a label, shape (N, len(classes)); own labels if ``classes`` is None.

        Raises:
            DataError: A label that is not among them, or a column with another value than 0 and 1.
        """
        names = self.class_names() if classes is None else tuple(classes)
        index = {name: i for i, name in enumerate(names)}
        out = np.zeros((len(self), len(names)), dtype=np.float32)
        for n, row in enumerate(self.labels):
            if len(self.label_columns) == 1:
                for name in _split(row[0]):
                    out[n, self._find(index, name, n)] = 1
                continue
            for column, value in zip(self.label_columns, row, strict=True):
                if _number(value) not in (0.0, 1.0):
                    rule = f"{column} must be 0 or 1, got {value!r}"
                    raise DataError(f"{self.path}, line {self.lines[n]}: {rule}; mend it or use regression.")
                out[n, self._find(index, column, n)] = float(value)
        return out

    def numbers(self) -> NDArray[np.float32]:
        """Return the labels as finite numbers, shape (N, len(label_columns)).

        Raises:
            DataError: A label that is no number.
        """
        out = np.zeros((len(self), len(self.label_columns)), dtype=np.float32)
        for n, row in enumerate(self.labels):
            for c, value in enumerate(row):
                number = _number(value)
                if number is None:
                    rule = f"{self.label_columns[c]} must be a number, got {value!r}"
                    raise DataError(f"{self.path}, line {self.lines[n]}: {rule}; mend it or use classification.")
                out[n, c] = number
        return out

    def _find(self, index: dict[str, int], name: str, row: int) -> int:
        if name not in index:
            raise DataError(
                f"{self.path}, line {self.lines[row]}: label {name!r} is not one of the classes "
                f"{', '.join(index)}; mend it, or train on a table that has it."
            )
        return index[name]


@dataclass(frozen=True)
class TableFolder:
    """The tables of a GUE data set; the caller decides what to do without ``dev`` or ``test``."""

    train: Path
    dev: Path | None
    test: Path | None


def find_tables(folder: str | os.PathLike[str]) -> TableFolder:
    """Find ``train``, ``dev`` (or ``valid``, ``val``) and ``test`` with the endings .csv, .tsv, and the same with .gz.

    Raises:
        DataError: No folder, no train table, or two files for one split.
    """
    root = Path(folder)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; name the folder that holds train.csv.")
    found: dict[str, Path | None] = {}
    for split, stems in {"train": ("train",), "dev": ("dev", "valid", "val"), "test": ("test",)}.items():
        files = [root / f"{stem}{end}" for stem in stems for end in (".csv", ".tsv", ".csv.gz", ".tsv.gz")]
        there = [file for file in files if file.is_file()]
        if len(there) > 1:
            names = " and ".join(file.name for file in there)
            raise DataError(f"{root}: has two files for the split {split}: {names}; keep one.")
        found[split] = there[0] if there else None
    train = found["train"]
    if train is None:
        names = ", ".join(sorted(file.name for file in root.iterdir())[:10]) or "nothing"
        raise DataError(f"{root}: has no train.csv; it holds {names}. Name the folder of one data set.")
    return TableFolder(train, found["dev"], found["test"])


def read_table(
    path: str | os.PathLike[str],
    on_error: OnError | None = None,
    *,
    sequence: str = "sequence",
    labels: Sequence[str] | None = None,
    max_length: int = MAX_LENGTH,
) -> Table:
    """Read a table with a header line, separated by comma, tab or semicolon (told by the header), plain or gzip.

    Args:
        path: The file.
        on_error: Called with each bad row; None raises at the first one.
        sequence: Name of the sequence column; case does not matter. A second one with the ending 2 (``sequence2``, or
            GUE's ``sequence1`` and ``sequence2``) makes pairs.
        labels: Names of the label columns; None takes ``label``, or all that begin with ``label_``; () takes none.
        max_length: Bases; a longer row is bad.

    Raises:
        DataError: A binary or empty file, no such columns, no row at all; a bad row without ``on_error``.
    """
    file = existing_file(path)
    kind = guess_format(file, first_text(file))
    if kind not in ("table", None):
        raise DataError(f"{file}: is {kind}, not a table; read it with read_sequences.")
    lines = Lines(text_blocks(file), max_length + _OTHER_FIELDS)
    while (header := lines.get(0)) == b"":
        lines.drop(1)
    columns, separator = _header((header or b"").decode("utf-8", "replace"), sequence)
    at = _columns(file, columns, sequence, labels)
    table = Table(file, [], [], [], [], tuple(columns[i] for i in at.labels), [])
    number = 0
    lines.drop(1)
    while (row := lines.get(0)) is not None:
        line = lines.number
        lines.drop(1)
        if not row:
            continue
        number += 1
        fields = _fields(row.decode("utf-8", "replace"), separator)
        label = f"row_{number}" if at.name is None or at.name >= len(fields) else fields[at.name]
        problem = _row_problem(fields, columns, at, max_length)
        if problem:
            report(RecordError(str(file), label, line, *problem), on_error)
            continue
        table.names.append(label)
        table.sequences.append(fields[at.sequence])
        if at.second is not None:
            table.seconds.append(fields[at.second])
        table.labels.append(tuple(fields[i] for i in at.labels))
        table.lines.append(line)
    if lines.truncated:
        advice = "copy or download the file again"
        report(RecordError(str(file), f"row_{number + 1}", lines.number, lines.truncated, advice), on_error)
    if not number:
        raise DataError(f"{file}: holds no row after its header; was its export interrupted?")
    return table


@dataclass(frozen=True)
class _Columns:
    sequence: int
    second: int | None
    name: int | None
    labels: tuple[int, ...]


def _header(text: str, sequence: str) -> tuple[list[str], str]:
    best = max(",\t;", key=lambda s: (sequence.lower() in [f.lower() for f in _fields(text, s)], text.count(s)))
    return _fields(text, best), best


def _columns(file: Path, columns: list[str], sequence: str, labels: Sequence[str] | None) -> _Columns:
    lower = [column.lower() for column in columns]

    def find(name: str) -> int | None:
        return lower.index(name.lower()) if name.lower() in lower else None

    def need(name: str) -> int:
        at = find(name)
        if at is None:
            raise DataError(
                f"{file}: has no column {name!r}, its columns are {', '.join(map(repr, columns))}; "
                f"rename one or name the column to use."
            )
        return at

    first = find(f"{sequence}1")
    at = first if find(sequence) is None and first is not None else need(sequence)
    if labels is None and find("label") is None:
        prefixed = tuple(i for i, name in enumerate(lower) if name.startswith("label_"))
        chosen = prefixed or (need("label"),)
    else:
        chosen = tuple(need(name) for name in (("label",) if labels is None else labels))
    name = find("name")
    return _Columns(at, find(f"{sequence}2"), find("id") if name is None else name, chosen)


def _row_problem(fields: list[str], columns: list[str], at: _Columns, limit: int) -> tuple[str, str] | None:
    if any(len(field) > limit for field in fields):
        return sequence_problem(b"", limit + 1, limit)
    if len(fields) != len(columns):
        return f"has {len(fields)} fields, the header {len(columns)}", "mend or remove the row"
    for index in (at.sequence,) if at.second is None else (at.sequence, at.second):
        letters = fields[index].encode("ascii", "replace")
        if problem := sequence_problem(letters, len(letters), limit):
            return problem
    for index in at.labels:
        if fields[index].lower() in _MISSING:
            return f"has no value in column {columns[index]!r} (got {fields[index]!r})", "give one or remove the row"
    return None


def _fields(text: str, separator: str) -> list[str]:
    # The csv module refuses fields over 131,072 letters, and only quotes need it.
    if '"' not in text:
        return [field.strip() for field in text.split(separator)]
    old = csv.field_size_limit(max(len(text), 1))
    try:
        return [field.strip() for field in next(csv.reader([text], delimiter=separator))]
    finally:
        csv.field_size_limit(old)


def _split(value: str) -> list[str]:
    return [part.strip() for part in value.split(LABEL_SEPARATOR) if part.strip()]


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
