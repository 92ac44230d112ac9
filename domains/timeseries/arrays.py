"""Series in NumPy archives.

Shapes: T steps, V variates, Cp past and Ck known covariates, F steps beyond the end.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Frequency, parse_frequency
from vertebra.domains.timeseries.grids import assemble, is_even
from vertebra.domains.timeseries.reading import LeftOut, Notes, Record, SourceOptions, side_by_side
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.stamps import parse_stamps
from vertebra.errors import DataError, UnknownNameError

FACTS = ("stamps", "start", "freq", "names", "past", "past_names", "known", "known_names")
"""Arrays that are no series."""


def read_npz(path: Path, options: SourceOptions, left: list[LeftOut]) -> list[Series]:
    """Read an archive: an array ``values`` (T,) or (T, V), or several arrays, each a series.

    Facts beside them: ``stamps`` (T,) or ``start``, ``freq``, ``names`` (V,) of the variates, covariates ``past``
    (T, Cp) and ``known`` (T + F, Ck) with ``past_names`` and ``known_names``.

    Args:
        path: The file.
        options: How it is read; its ``target`` names arrays, or variates of ``values``.
        left: Gets what was left out.

    Raises:
        DataError: The file is no archive of arrays, or a fact does not fit.
    """
    arrays = _load(path)
    series = [key for key in arrays if key not in FACTS]
    if not series:
        raise DataError(f"{path}: holds no array of values; write it with numpy.savez(file, values=...).")
    frequency = _frequency(path, arrays)
    notes = Notes(path)
    found: list[Series] = []
    for key in series:
        try:
            record = _record(path, arrays, key, len(series) == 1, frequency, options)
        except _WrongError as e:
            left.append(LeftOut(str(path), key, str(e)))
            continue
        if options.target is not None:
            if len(series) > 1 and key not in options.target:
                continue
            if len(series) == 1:
                record = _chosen(path, record, options.target)
        found += assemble(record, options, notes, left, split=not options.multivariate)
    notes.tell()
    return found


class _WrongError(Exception):
    """An array that cannot be a series."""


def _load(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                return {"values": archive}
            return {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct the path.") from None
    except MemoryError:
        raise DataError(f"{path}: does not fit into memory; split it.") from None
    except Exception:  # NumPy, zipfile and zlib each have their own
        raise DataError(
            f"{path}: is no archive of plain arrays, or is empty, damaged or cut short; write it with numpy.savez."
        ) from None


def _frequency(path: Path, arrays: dict[str, NDArray[Any]]) -> Frequency | None:
    if "freq" not in arrays:
        return None
    try:
        return parse_frequency(str(arrays["freq"].item()))
    except (UnknownNameError, ValueError) as e:
        raise DataError(f"{path}: freq: {str(e).removesuffix('.')}.") from None


def _record(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    key: str,
    only: bool,
    frequency: Frequency | None,
    options: SourceOptions,
) -> Record:
    values = arrays[key]
    if values.dtype.kind not in "fiub" or values.ndim not in (1, 2) or not values.size:
        raise _WrongError(f"must be numbers (T,) or (T, V), got {values.dtype} {values.shape}; write it so")
    values = values.reshape(len(values), -1).astype(np.float64)
    if np.isinf(values).any():
        raise _WrongError(f"is infinite in row {int(np.isinf(values).any(1).argmax()) + 1:,}; write nan for no value")
    name = path.name.split(".")[0] if only and key == "values" else key
    width = values.shape[1]
    names = tuple(str(own) for own in np.atleast_1d(arrays["names"])) if only and "names" in arrays else ()
    if names and (len(names) != width or len(set(names)) < width):
        raise DataError(f"{path}: names must be {width} different ones, as many as variates, got {len(names)}.")
    if not names:
        names = (name,) if width == 1 else tuple(f"{name}_{i}" for i in range(width))
    blocks = [values]
    columns: dict[str, tuple[str, ...]] = {"past": (), "known": ()}
    for what in ("past", "known"):
        if what in arrays:
            block, columns[what] = _covariates(path, arrays, what, len(values))
            blocks.append(block)
    rows = side_by_side(blocks)
    stamps = _stamps(path, arrays, len(values), len(rows), frequency or options.step(), options)
    return Record(
        name=names[0] if only and "names" in arrays and width == 1 else name,
        rows=rows,
        variates=names,
        past=columns["past"],
        known=columns["known"],
        stamps=stamps,
        frequency=frequency,
    )


def _covariates(
    path: Path, arrays: dict[str, NDArray[Any]], what: str, steps: int
) -> tuple[NDArray[np.float64], tuple[str, ...]]:
    block = arrays[what]
    if block.dtype.kind not in "fiub" or block.ndim not in (1, 2) or len(block) < steps or np.isinf(block).any():
        raise DataError(f"{path}: {what} must be finite numbers ({steps}, ...), got {block.dtype} {block.shape}.")
    block = block.reshape(len(block), -1).astype(np.float64)
    if what == "past":
        block = block[:steps]
    width = block.shape[1]
    names = tuple(str(own) for own in np.atleast_1d(arrays.get(f"{what}_names", np.zeros(0, str))))
    names = names or tuple(f"{what}_{i}" for i in range(width))
    if len(names) != width:
        raise DataError(f"{path}: {what}_names must be {width}, as many as columns of {what}, got {len(names)}.")
    return block, names


def _stamps(
    path: Path,
    arrays: dict[str, NDArray[Any]],
    steps: int,
    rows: int,
    frequency: Frequency | None,
    options: SourceOptions,
) -> Any:
    """Stamps of all rows, those beyond the values included."""
    told = arrays.get("stamps", arrays.get("start"))
    if told is None:
        return None
    what = "stamps" if "stamps" in arrays else "start"
    told = np.atleast_1d(told)
    if told.dtype.kind == "M":
        stamps: Any = told.astype("datetime64[ms]")
        bad = np.isnat(stamps)
    else:
        texts = pa.array([str(own) for own in told.tolist()])
        stamps, bad = parse_stamps(texts, options.date_format, f"{path}: {what}", is_even)
    if bad.any():
        raise DataError(f"{path}: {what} {int(bad.argmax()) + 1:,} is no time; correct it.")
    if what == "start":
        if frequency is None:
            raise DataError(f"{path}: has a start and no freq; set frequency.")
        return frequency.stamps(stamps[0], rows)
    if len(stamps) not in (steps, rows):
        raise DataError(f"{path}: stamps must be {steps:,}, as many as values, got {len(stamps):,}.")
    if len(stamps) < rows:
        if frequency is None:
            raise DataError(f"{path}: known goes beyond stamps; write stamps for its rows too, or freq.")
        stamps = np.append(stamps, frequency.stamps(stamps[-1], rows - len(stamps), 1))
    return stamps


def _chosen(path: Path, record: Record, target: tuple[str, ...]) -> Record:
    """The variates that the user names."""
    if target == (record.name,):
        return record
    if missing := [name for name in target if name not in record.variates]:
        raise DataError(
            f"{path}: there is no variate {missing[0]!r} for target; variates: {', '.join(record.variates)}."
        )
    columns = [record.variates.index(name) for name in target]
    columns += range(len(record.variates), record.rows.shape[1])
    record.rows, record.variates = record.rows[:, columns], target
    return record
