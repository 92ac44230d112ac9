"""What readers of recordings share: the records they make, and the lines they refuse."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vertebra.domains.speech.audio import AUDIO_ENDINGS, AudioError, audio_info
from vertebra.domains.speech.utterance import Utterance
from vertebra.errors import DataError

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
    "eval": "test",
}
"""Words for a split, and what they mean."""

_TASK = re.compile(r"asr|st_\w+")


@dataclass(frozen=True)
class BadLine:
    """A line or file that became no utterance.

    Args:
        file: The manifest, or the file itself where there is none.
        line: Line, counted from 1; None where there is no manifest.
        rule: What is wrong.
        advice: What to do.
    """

    file: str
    line: int | None
    rule: str
    advice: str

    def __str__(self) -> str:
        at = self.file if self.line is None else f"{self.file}, line {self.line}"
        return f"{at}: {self.rule}; {self.advice}."


@dataclass(frozen=True)
class Source:
    """Utterances of a folder or file, and what was refused of it.

    Args:
        name: The folder or file.
        layout: How it was read.
        utterances: In the order of the source.
        bad: Lines and files that were refused.
    """

    name: str
    layout: str
    utterances: list[Utterance]
    bad: list[BadLine]

    def __len__(self) -> int:
        return len(self.utterances)


class Collector:
    """Gathers utterances, and refuses what cannot be one without losing the others.

    Args:
        name: The folder or file that is read.
        layout: How.
        measure: Whether to take durations that the source does not say from the headers of the files.
    """

    def __init__(self, name: str | Path, layout: str, measure: bool) -> None:
        self.name, self.layout, self.measure = str(name), layout, measure
        self.utterances: list[Utterance] = []
        self.bad: list[BadLine] = []
        self._ids: dict[str, str] = {}
        self._durations: dict[Path, float] = {}

    def refuse(self, file: str | Path, line: int | None, rule: str, advice: str) -> None:
        """Note a line that becomes no utterance."""
        self.bad.append(BadLine(str(file), line, rule, advice))

    def add(
        self,
        file: str | Path,
        line: int | None,
        *,
        name: str,
        path: Path,
        start: Any = None,
        end: Any = None,
        duration: Any = None,
        split: str = "",
        task: str = "asr",
        translation: str = "",
        **facts: str | None,
    ) -> None:
        """Check a record and keep it; or refuse it.

        Args:
            file: Where the record was found.
            line: Its line there.
            name: Id of the utterance.
            path: The audio file.
            start: Seconds; None for 0.
            end: Seconds; None where it is not said.
            duration: Seconds; None where it is not said.
            split: Any word for a split, or empty.
            task: ``asr`` or ``st_...``.
            translation: Target of a translation.
            facts: Other fields of ``Utterance``.
        """
        if not os.path.isfile(path):  # Path.is_file raises at a name that is too long
            return self.refuse(file, line, f"the audio must be a file, got {str(path)!r}", "correct the path")
        if name in self._ids:
            return self.refuse(
                file, line, f"ids must differ, got {name!r} again (first in {self._ids[name]})", "rename one of them"
            )
        if split.lower() not in SPLIT_NAMES and split:
            return self.refuse(file, line, f"split must be train, val or test, got {split!r}", "correct it")
        if not _TASK.fullmatch(task):
            return self.refuse(file, line, f"task must be asr, or such as st_deu, got {task!r}", "correct it")
        if task != "asr" and not translation:
            return self.refuse(file, line, f"task {task} needs a translation, got none", "give it, or make it asr")
        try:
            begin, length = self._span(path, start, end, duration)
        except AudioError as e:
            return self.refuse(file, line, f"{path.name}: {e.rule}", e.advice)
        except _SpanError as e:
            return self.refuse(file, line, str(e), "correct the times")
        self._ids[name] = str(file) if line is None else f"{file}, line {line}"
        self.utterances.append(
            Utterance(
                id=name,
                path=path,
                start=begin,
                duration=length,
                split=SPLIT_NAMES.get(split.lower(), ""),
                task=task,
                translation=translation,
                line=line,
                **facts,  # type: ignore[arg-type]
            )
        )
        return None

    def done(self) -> Source:
        """Return what was gathered.

        Raises:
            DataError: Nothing but refused lines, or nothing at all.
        """
        if not self.utterances:
            if self.bad:
                raise DataError(f"{self.name}: none of {len(self.bad)} lines can be used. The first: {self.bad[0]}")
            raise DataError(f"{self.name}: there must be an utterance, got none; is this the layout {self.layout}?")
        return Source(self.name, self.layout, self.utterances, self.bad)

    def _span(self, path: Path, start: Any, end: Any, duration: Any) -> tuple[float, float | None]:
        begin = 0.0 if _absent(start) else _seconds("start", start)
        if begin < 0:
            raise _SpanError(f"start must be 0 or more, got {begin:g}")
        length = None
        if not _absent(duration):
            length = _seconds("duration", duration)
            if length <= 0:
                raise _SpanError(f"duration must be above 0, got {length:g}")
        if not _absent(end):
            stop = _seconds("end", end)
            if stop <= begin:
                raise _SpanError(f"end must be after start, got {begin:g} to {stop:g}")
            length = stop - begin if length is None else length
        if length is None and self.measure:
            if path not in self._durations:
                self._durations[path] = audio_info(path).duration
            length = self._durations[path] - begin
            if length <= 0:
                raise _SpanError(f"start must be before the end at {self._durations[path]:.3f} s, got {begin:g}")
        return begin, length


class _SpanError(Exception):
    """Times that contradict each other."""


def _absent(value: Any) -> bool:
    return value is None or value == ""


def _seconds(what: str, value: Any) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise _SpanError(f"{what} must be a number of seconds, got {value!r}")
    return seconds


# ---------------------------------------------------------------- files


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts ``take 2`` before ``take 10``."""
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", name) if p] + [(2, 0, name)]


def list_audio(folder: Path) -> list[Path]:
    """Audio files in a folder and those below it, in natural order; hidden ones and other files are passed over."""
    found = []
    for top, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(top, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in AUDIO_ENDINGS]
    return sorted(found, key=lambda p: natural_key(p.relative_to(folder).as_posix()))


def split_of(name: str) -> str:
    """The split that the first word of a name tells: ``train-clean-100``, ``an4_test``; empty for none."""
    for word in re.split(r"[^a-z]+", name.lower()):
        if word in SPLIT_NAMES:
            return word
    return ""


def read_bytes(file: Path) -> bytes:
    """Read a file, unpacked where its name ends in ``.gz``.

    Raises:
        DataError: It cannot be read, or is damaged.
    """
    try:
        data = file.read_bytes()
        return gzip.decompress(data) if file.suffix == ".gz" else data
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{file}: the gzip file is truncated or damaged; download it again.") from None
    except OSError as e:
        raise DataError(f"{file}: the file cannot be read ({e.strerror or e}); correct the path.") from None


def read_text(file: Path) -> str:
    """Read a file of UTF-8.

    Raises:
        DataError: It cannot be read, or is no UTF-8.
    """
    data = read_bytes(file)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(f"{file}, line {line}: this must be text in UTF-8, got other bytes; save it as that.") from None


def read_lines(file: Path, into: Collector) -> Iterator[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1; those that are no UTF-8 are refused."""
    for number, line in enumerate(read_bytes(file).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError:
            into.refuse(file, number, "the line must be text in UTF-8, got other bytes", "save the file as that")
            continue
        if text:
            yield number, text
