"""Output files that are written whole: under a temporary name beside the target, then renamed.

``Outputs`` holds the main file of a run and its side files (``OUT.errors.jsonl``, ``OUT.windows.csv``, ...). Until
``commit`` nothing is visible under the final names; ``commit(".partial")`` puts what is finished in ``OUT.partial``.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from vertebra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BadRecord:
    """A record that could not be used, as listed in ``OUT.errors.jsonl``.

    Args:
        file: The input file.
        record: Name of the record; empty when the file as a whole is meant.
        line: Line of the file where the record begins, from 1; None when unknown.
        rule: What is wrong.
        advice: What to do.
    """

    file: str
    record: str
    line: int | None
    rule: str
    advice: str

    def __str__(self) -> str:
        where = ", ".join(
            part
            for part in (
                self.file,
                f"record {self.record!r}" if self.record else "",
                f"line {self.line}" if self.line else "",
            )
            if part
        )
        rule = self.rule.rstrip(".")
        return f"{where}: {rule}; {self.advice.rstrip('.')}." if self.advice else f"{where}: {rule}."


class Outputs:
    """The files of one run; use as a context manager: left without ``commit``, it removes what it wrote.

    Args:
        target: The main output file. Side files are named ``target`` plus an ending.

    Raises:
        ConfigError: Nothing can be written there.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._open: dict[Path, tuple[IO[Any], Path]] = {}
        self._made: list[Path] = []
        self._outdated: set[Path] = set()
        check_writable(target)

    def side(self, ending: str) -> Path:
        """Path of a side file: the target's whole name plus ``ending``."""
        return self.target.with_name(self.target.name + ending)

    def open(self, path: Path, mode: str = "w") -> IO[Any]:
        """Open a file that appears as ``path`` on ``commit``; ``mode`` is ``w`` (UTF-8 text) or ``wb``."""
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with told_as_config_error(path):
            stream: IO[Any] = (
                temporary.open("wb") if mode == "wb" else temporary.open("w", encoding="utf-8", newline="")
            )
        self._open[path] = (stream, temporary)
        return stream

    def write(self, path: Path, data: bytes) -> None:
        """Write a whole file that appears as ``path`` on ``commit``; of such files there may be thousands."""
        with told_as_config_error(path), self.open(path, "wb") as stream:
            stream.write(data)

    def folder(self, path: Path, earlier: Iterable[str] = ()) -> Path:
        """Make a folder for side files; ``open`` then takes names in it.

        Args:
            path: The folder.
            earlier: Names of files in it that an earlier run wrote; those not written anew go on ``commit``.

        Raises:
            ConfigError: It cannot be made, or holds other files.
        """
        with told_as_config_error(path):
            found = {f.name for f in path.iterdir()} if path.exists() else set()
            if foreign := sorted(n for n in found.difference(earlier) if not n.endswith((".partial", ".tmp"))):
                raise ConfigError(
                    f"output: the folder {str(path)!r}, where files go, holds others already, such as {foreign[0]!r}; "
                    "choose another name."
                )
            if not path.exists():
                path.mkdir(parents=True)
                self._made.append(path)
        self._outdated |= {path / name for name in found if not name.endswith(".tmp")}
        return path

    def keep_only(self, path: Path) -> None:
        """Discard every file but ``path``."""
        for each in [p for p in self._open if p != path]:
            self.discard(each)

    def commit(self, ending: str = "") -> list[Path]:
        """Put every file in its place, its final name plus ``ending``; return the paths in order of opening."""
        done = []
        for path, (stream, temporary) in list(self._open.items()):
            final = path.with_name(path.name + ending)
            with told_as_config_error(final):
                if not stream.closed:
                    stream.flush()
                    os.fsync(stream.fileno())
                    stream.close()
                os.replace(temporary, final)
            del self._open[path]
            done.append(final)
        if not ending:
            for path in self._outdated.difference(done):
                path.unlink(missing_ok=True)
            self._outdated.clear()
        return done

    def discard(self, path: Path | None = None) -> None:
        """Remove what was written for ``path``, or for all files."""
        for each in [path] if path is not None else list(self._open):
            if each in self._open:
                stream, temporary = self._open.pop(each)
                with contextlib.suppress(OSError):  # a full disk fails again on close
                    stream.close()
                temporary.unlink(missing_ok=True)
        for folder in self._made if path is None else ():
            with contextlib.suppress(OSError):  # it holds something, or is gone
                folder.rmdir()

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class ErrorLog:
    """Counts bad records and writes them to ``OUT.errors.jsonl``, a file that exists only when there are some."""

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self.path = outputs.side(".errors.jsonl")
        self.count = 0
        self.first: BadRecord | None = None
        self._stream: IO[Any] | None = None

    def add(self, bad: BadRecord) -> None:
        """List one bad record."""
        if self._stream is None:
            self._stream, self.first = self.outputs.open(self.path), bad
        self.count += 1
        self._stream.write(json.dumps(asdict(bad), ensure_ascii=False) + "\n")


def check_writable(target: Path) -> None:
    """Find out before the work begins whether ``target`` can be written; makes its folder.

    Raises:
        ConfigError: It is a folder, or its folder cannot be made or written.
    """
    if target.is_dir():
        raise ConfigError(f"output: must be a file, got the folder {str(target)!r}; add a file name.")
    with told_as_config_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
        try:
            probe.touch()
        finally:
            with contextlib.suppress(OSError):
                probe.unlink(missing_ok=True)


@contextlib.contextmanager
def told_as_config_error(path: Path) -> Iterator[None]:
    """Turn an operating system's refusal to write ``path`` into a ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"output: {str(path)!r} cannot be written ({error.strerror or error}); choose another folder or free space."
        ) from error


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open one file that appears as ``path`` only when the block ends well."""
    with Outputs(path) as outputs:
        yield outputs.open(path, mode)
        outputs.commit()
