"""Series from whatever a user has: tables, GluonTS, Monash, Parquet, NumPy archives, and folders of them."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vertebra.domains.timeseries.arrays import read_npz
from vertebra.domains.timeseries.frequency import Frequency
from vertebra.domains.timeseries.gluonts import is_gluonts, read_gluonts, read_jsonl
from vertebra.domains.timeseries.grids import show_stamp
from vertebra.domains.timeseries.reading import LeftOut, SourceOptions, plain
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.tables import read_csv, read_parquet
from vertebra.domains.timeseries.tsf import read_tsf
from vertebra.errors import ConfigError, DataError

__all__ = ["ENDINGS", "LeftOut", "SourceOptions", "describe", "find_series", "read_series"]

_READERS = {
    ".csv": read_csv,
    ".tsv": read_csv,
    ".txt": read_csv,
    ".json": read_jsonl,
    ".jsonl": read_jsonl,
    ".tsf": read_tsf,
    ".npz": read_npz,
    ".parquet": read_parquet,
}
ENDINGS = tuple(_READERS)
"""Endings, in lower case, of the files that are read; those of text may have ``.gz`` behind them."""

_READ = f"files {', '.join(ENDINGS)} (text also with .gz), a data set of GluonTS, or folders of them"
_WORDS = {
    "ms": "milliseconds", "s": "seconds", "min": "minutes", "h": "hours", "D": "days", "B": "weekdays", "W": "weeks",
    "MS": "months", "QS": "quarters", "YS": "years",
}  # fmt: skip
_ADVERBS = {"s": "every second", "ms": "every millisecond", "min": "every minute", "h": "hourly", "D": "daily"}
_ADVERBS |= {"B": "every weekday", "W": "weekly", "MS": "monthly", "QS": "quarterly", "YS": "yearly"}


def read_series(
    paths: Sequence[str | Path], options: SourceOptions | None = None
) -> tuple[list[Series], list[LeftOut]]:
    """Read series from files and folders.

    What cannot be used is left out and told, as long as something is left. What was mended (gaps filled, rows sorted)
    is told in the log. A series whose name is in several files is named by its file too.

    Args:
        paths: Files, data sets of GluonTS, or folders that are searched for them.
        options: How they are read; None for all found out.

    Raises:
        ConfigError: There is no path.
        DataError: Nothing can be read; the text is the first reason.
    """
    options = options or SourceOptions()
    left: list[LeftOut] = []
    found: list[tuple[Path, list[Series]]] = []
    for place in find_series(paths, left):
        try:
            reader = read_gluonts if place.is_dir() else _READERS[_ending(place)]
            found.append((place, reader(place, options, left)))
        except DataError as e:
            left.append(LeftOut(str(place), "", plain(e, place)))
    series = _named(found)
    if not series:
        raise DataError(str(left[0]))
    return series, left


def find_series(paths: Sequence[str | Path], left: list[LeftOut]) -> list[Path]:
    """List what can be read among files and folders, each once; numbers in names are sorted as such.

    Args:
        paths: Files and folders.
        left: Gets the paths at which there is nothing to read.

    Raises:
        ConfigError: There is no path.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    if not paths:
        raise ConfigError(f"no series are given; give {_READ}.")
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        inside = [path]
        reason = ""
        if path.is_dir():
            inside = [path] if is_gluonts(path) else _search(path)
            reason = "" if inside else f"no series are in this folder; give {_READ}"
        elif not path.exists():
            reason = "there is no such file or folder; correct the path"
        elif _ending(path) not in _READERS:
            reason = f"{_ending(path) or 'no ending'!r} is not a kind of file that is read; give {_READ}"
        if reason:
            left.append(LeftOut(str(path), "", reason))
            continue
        for one in inside:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def describe(series: Sequence[Series]) -> str:
    """Return a line for the log: how many series, how often, how long, from when to when, what is missing."""
    if not series:
        return "no series"
    sources = {own.source for own in series}
    where = Path(series[0].source).name or "series" if len(sources) == 1 else f"{len(sources):,} files"
    width = {own.values.shape[1] for own in series}
    variates = f" of {max(width)} variates" if width != {1} else ""
    lengths = [len(own) for own in series]
    steps = f"{min(lengths):,}" if min(lengths) == max(lengths) else f"{min(lengths):,} to {max(lengths):,}"
    parts = [f"{len(series):,} series{variates}"]
    common = Counter(own.frequency for own in series).most_common()
    parts.append(", ".join(_often(frequency) for frequency, _ in common[:3]) + (", ..." if len(common) > 3 else ""))
    parts.append(f"{steps} values")
    begins = [own.start for own in series if own.start is not None]
    if begins:
        ends = [own.frequency.stamps(own.start, 1, len(own) - 1)[0] for own in series if own.start is not None]
        parts.append(f"{show_stamp(min(begins))} to {show_stamp(max(ends))}")
    parts.append(f"{sum(int(np.isnan(own.values).sum()) for own in series):,} missing")
    return f"{where}: {', '.join(parts)}"


def _often(frequency: Frequency) -> str:
    if frequency.unit == "step":
        return "without stamps"
    if frequency.count == 1:
        return f"{_ADVERBS[frequency.unit]} ({frequency})"
    return f"every {frequency.count} {_WORDS[frequency.unit]} ({frequency})"


def _ending(path: Path) -> str:
    """The ending in lower case, without ``.gz``."""
    name = path.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return inner if not name.endswith(".gz") or inner not in (".npz", ".parquet") else f"{inner}.gz"


def _search(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir(), key=lambda p: _by_number(p.name)):
        if path.name.startswith("."):  # also what macOS puts beside files
            continue
        if path.is_dir():
            found += [path] if is_gluonts(path) else _search(path)
        elif _ending(path) in _READERS and _ending(path) != ".txt" and path.name != "metadata.json":
            found.append(path)
    return found


def _by_number(text: str) -> list[str | int]:
    """Key that sorts ``part_10`` behind ``part_9``."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))]


def _named(found: list[tuple[Path, list[Series]]]) -> list[Series]:
    """All series, those of one name in several files named by their file too."""
    counts = Counter(name for _, own in found for name in {series.name for series in own})
    named: list[Series] = []
    root = os.path.commonpath([place.resolve().parent for place, _ in found]) if found else ""
    for place, own in found:
        inside = place.resolve().relative_to(root).as_posix()
        stem = inside[: len(inside) - len(place.name)] + place.name.split(".")[0]
        for series in own:
            name = series.name if counts[series.name] == 1 else f"{stem}/{series.name}"
            named.append(series if name == series.name else dataclasses.replace(series, name=name))
    return named
