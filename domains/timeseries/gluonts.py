"""Series as GluonTS keeps them: one JSON object a line, and folders of ``train``, ``test`` and ``metadata``.

Shapes: T steps, V variates, C covariates, F steps beyond the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Frequency, parse_frequency
from vertebra.domains.timeseries.grids import assemble
from vertebra.domains.timeseries.reading import (
    LeftOut,
    Notes,
    Record,
    SourceOptions,
    check_utf8,
    data_of,
    log,
    side_by_side,
)
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.stamps import parse_stamps
from vertebra.errors import DataError, UnknownNameError

ENDINGS = (".json", ".jsonl")
_METADATA = ("metadata.json", "metadata/metadata.json")


def is_gluonts(folder: Path) -> bool:
    """Whether a folder is a data set of GluonTS: ``metadata.json`` beside ``train`` or ``test``."""
    has = any((folder / name).is_file() for name in _METADATA)
    return has and any((folder / split).is_dir() for split in ("train", "test"))


def read_gluonts(folder: Path, options: SourceOptions, left: list[LeftOut]) -> list[Series]:
    """Read a data set: the series of ``test``, which are those of ``train`` and what comes after; else of ``train``.

    Where a series is there several times, each time longer, the longest is read.

    Args:
        folder: The data set.
        options: How it is read.
        left: Gets what was left out.

    Raises:
        DataError: No file is in it.
    """
    split = next(folder / name for name in ("test", "train") if (folder / name).is_dir())
    files = [
        path
        for path in sorted(split.iterdir())
        if path.name.lower().removesuffix(".gz").endswith(ENDINGS) and not path.name.startswith(".")
    ]
    if not files:
        raise DataError(f"{folder}: no file of JSON is in {split.name}; copy or export it again.")
    log.info("%s: %s is read, which holds whole series; name a folder in it to read that alone.", folder, split.name)
    found: list[Series] = []
    for path in files:
        found += read_jsonl(path, options, left, longest=True)
    return found


def read_jsonl(path: Path, options: SourceOptions, left: list[LeftOut], longest: bool = False) -> list[Series]:
    """Read a file of one JSON object a line, packed with gzip or not; or of a list of such objects.

    Keys: ``target`` (T,) or (V, T) with null or "NaN" for what is missing, ``start``, ``item_id``, ``freq``,
    ``feat_dynamic_real`` (C, T + F), known beyond the end, and ``past_feat_dynamic_real`` (C, T).

    Args:
        path: The file.
        options: How it is read; ``frequency`` goes before that of a line, and that before the metadata beside it.
        left: Gets what was left out.
        longest: Whether of lines of the same id and start the longest is read; else a repeated id is left out.

    Raises:
        DataError: The file is empty or no text.
    """
    data = data_of(path, "JSON")
    check_utf8(path, data)
    usual = options.step() or _metadata_frequency(path)
    notes = Notes(path)
    entries: list[tuple[str, dict[str, Any], Record]] = []
    for where, entry in _entries(path, data, left):
        try:
            entries.append((where, entry, _record(entry, len(entries), options, usual)))
        except _WrongError as e:
            left.append(LeftOut(str(path), where, str(e)))
    starts = _starts(path, [entry.get("start") for _, entry, _ in entries], options)
    chosen: dict[Any, tuple[str, Record]] = {}
    for (where, _, record), start in zip(entries, starts, strict=True):
        if isinstance(start, str):
            left.append(LeftOut(str(path), where, f"{start!r} is no time to start at; correct it"))
            continue
        if start is not None:
            if record.frequency is None:
                left.append(LeftOut(str(path), where, "neither it nor metadata.json tells the freq; set frequency"))
                continue
            if record.frequency.unit != "step":
                record.stamps = record.frequency.stamps(start, len(record.rows))
        key = (record.name, str(start)) if longest else record.name
        if key in chosen and not longest:
            reason = f"has the item_id {record.name!r} of {chosen[key][0]}; give each series its own"
            left.append(LeftOut(str(path), where, reason))
        elif key not in chosen or len(record.rows) > len(chosen[key][1].rows):
            chosen[key] = (where, record)
    found: list[Series] = []
    for _, record in chosen.values():
        found += assemble(record, options, notes, left)
    notes.tell()
    return found


class _WrongError(Exception):
    """A line that is no series."""


def _entries(path: Path, data: bytes, left: list[LeftOut]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file, and where they are."""
    for where, entry in _listed(path, data) if data.lstrip()[:1] == b"[" else _lines(path, data, left):
        if isinstance(entry, dict):
            yield where, entry
        else:
            left.append(LeftOut(str(path), where, "is not a JSON object with start and target; write one a line"))


def _listed(path: Path, data: bytes) -> Iterator[tuple[str, Any]]:
    try:
        entries = json.loads(data)
    except (json.JSONDecodeError, RecursionError) as e:
        raise DataError(f"{path}: is not JSON ({e}); write one object a line.") from None
    yield from ((f"entry {number:,}", entry) for number, entry in enumerate(entries, 1))


def _lines(path: Path, data: bytes, left: list[LeftOut]) -> Iterator[tuple[str, Any]]:
    wrong: list[int] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            wrong.append(number)
            continue
        yield f"line {number:,}", entry
    if wrong:
        more = f" (such lines: {len(wrong):,})" if len(wrong) > 1 else ""
        reason = f"is not a JSON object, or is cut short{more}; write one object a line"
        left.append(LeftOut(str(path), f"line {wrong[0]:,}", reason))


def _record(entry: dict[str, Any], number: int, options: SourceOptions, usual: Frequency | None) -> Record:
    if "target" not in entry:
        raise _WrongError(f"has no target; keys: {', '.join(entry) or 'none'}")
    values = _numbers(entry, "target", "(T,) or (V, T)")
    steps, width = values.shape
    variates = ("target",) if width == 1 else tuple(f"target_{i}" for i in range(width))
    name = str(entry["item_id"]) if entry.get("item_id") is not None else str(number)
    blocks, names = [values], []
    for key in ("past_feat_dynamic_real", "feat_dynamic_real"):
        block = np.zeros((steps, 0))
        if entry.get(key):
            block = _numbers(entry, key, "(C, T)")
            if len(block) < steps or (len(block) > steps and key.startswith("past")):
                raise _WrongError(f"{key} has {len(block):,} steps, and target {steps:,}; write one for each step")
        blocks.append(block)
        names.append(tuple(f"{key}_{i}" for i in range(block.shape[1])))
    return Record(
        name=name,
        rows=side_by_side(blocks),
        variates=variates,
        past=names[0],
        known=names[1],
        frequency=_frequency(entry, usual, options),
    )


def _frequency(entry: dict[str, Any], usual: Frequency | None, options: SourceOptions) -> Frequency | None:
    if options.frequency is not None or not entry.get("freq"):
        return usual
    try:
        return parse_frequency(str(entry["freq"]))
    except UnknownNameError as e:
        raise _WrongError(f"{str(e).removesuffix('.')}; set frequency") from None


def _numbers(entry: dict[str, Any], key: str, shape: str) -> NDArray[np.float64]:
    """Numbers of a key, steps first."""
    try:
        values = np.array(entry[key], dtype=np.float64)  # None and "NaN" become NaN
    except (ValueError, TypeError):
        raise _WrongError(f"{key} must be numbers {shape}{_first_text(entry[key])}; write null for no value") from None
    if values.ndim not in (1, 2) or not values.size:
        raise _WrongError(f"{key} must be numbers {shape}, got the shape {values.shape}")
    if np.isinf(values).any():
        raise _WrongError(f"{key} holds an infinite number; write null for no value")
    return values[:, None] if values.ndim == 1 else values.T


def _first_text(values: Any) -> str:
    """What in a list is no number, for an error."""
    for row in values if isinstance(values, list) else [values]:
        for value in row if isinstance(row, list) else [row]:
            try:
                float("nan" if value is None else value)
            except (ValueError, TypeError):
                return f", got {value!r}"
    return " in rows of one length"


def _starts(path: Path, starts: list[Any], options: SourceOptions) -> list[np.datetime64 | str | None]:
    """Stamps; the text itself where it is none, and None where there is nothing."""
    texts = [None if start is None else str(start) for start in starts]
    if not any(texts):
        return [None] * len(starts)
    stamps, bad = parse_stamps(pa.array(texts, pa.string()), options.date_format, f"{path}: start")
    if stamps.dtype.kind != "M":
        return [None] * len(starts)
    return [None if text is None else text if no else stamp for text, stamp, no in zip(texts, stamps, bad, strict=True)]


def _metadata_frequency(path: Path) -> Frequency | None:
    """The frequency that the metadata of a data set tells, for a file in one of its folders."""
    for folder in (path.parent, path.parent.parent):
        for name in _METADATA:
            if not (folder / name).is_file():
                continue
            try:
                told = json.loads((folder / name).read_bytes())
                return parse_frequency(str(told["freq"]))
            except (OSError, ValueError, KeyError, TypeError, UnknownNameError):
                log.warning("%s: tells no known freq; set frequency.", folder / name)
    return None
