"""Random access to the records of FASTA files larger than memory, with the index of ``samtools faidx``.

A line of the index is ``name length offset linebases linewidth``: bases of the record, offset of its first base, bases
a line, bytes a line with its end (http://www.htslib.org/doc/faidx.html).
"""

from __future__ import annotations

import contextlib
import difflib
import mmap
import os
import tempfile
import zlib
from bisect import bisect_right
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.dna.records import (
    TruncatedError,
    bgzf_blocks,
    existing_file,
    is_bgzf_header,
    is_gzip,
    read_blocks,
    sniff_format,
)
from vertebra.errors import DataError, UnknownNameError


class Entry(NamedTuple):
    """One line of the index."""

    length: int
    offset: int
    linebases: int
    linewidth: int

    def at(self, base: int) -> int:
        """Return the offset of a base, counted from 0."""
        return self.offset + base // self.linebases * self.linewidth + base % self.linebases if self.linebases else 0


class IndexedFasta:
    """A FASTA file, plain or bgzip, whose records can be read in part.

    An index ``FILE.fai`` beside the file is used if it is not older than the file and fits its size. Otherwise the file
    is read through once, in memory that does not grow with it, and the index is written beside it where that is
    possible. Can be shared by threads, forked workers, and pickled.

    Args:
        path: The file.
        write_index: Whether an index that was made is written.

    Attributes:
        lengths: Bases of each record, by name, in the order of the file.

    Raises:
        DataError: No FASTA, plain gzip, two records of one name, or lines of unequal length inside a record.
    """

    def __init__(self, path: str | os.PathLike[str], *, write_index: bool = True) -> None:
        self.path = existing_file(path)
        self.packed = is_gzip(self.path)
        if self.packed:
            with self.path.open("rb") as file:
                blocked = is_bgzf_header(file.read(18))
            if not blocked:
                raise DataError(
                    f"{self.path}: a gzip file cannot be read in part; decompress it (gunzip), "
                    f"or compress it in blocks: gunzip -c FILE.gz | bgzip > FILE.bgz."
                )
        if sniff_format(self.path) != "fasta":
            raise DataError(f"{self.path}: holds no FASTA record; only FASTA can be indexed.")
        self._open()
        size = int(self._plain_at[-1]) if self.packed else self.path.stat().st_size
        entries = self._read_index(size)
        if entries is None:
            entries = build_index(self.path)
            if write_index:
                self._write_index(entries)
        self.entries = entries
        self.lengths = {name: entry.length for name, entry in entries.items()}

    @property
    def index_path(self) -> Path:
        """Where the index is, or would be."""
        return self.path.with_name(self.path.name + ".fai")

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def __len__(self) -> int:
        return len(self.entries)

    def fetch(self, name: str, start: int = 0, stop: int | None = None) -> str:
        """Return the bases ``start`` .. ``stop`` - 1 of a record (0-based, half-open), as they stand in the file.

        Raises:
            UnknownNameError: No such record.
            DataError: The range is not inside of the record.
        """
        entry = self.entries.get(name)
        if entry is None:
            near = difflib.get_close_matches(name, list(self.entries)[:10_000], n=10, cutoff=0.5)
            raise UnknownNameError(f"record of {self.path}", name, near or list(self.entries)[:10])
        stop = entry.length if stop is None else stop
        if not 0 <= start <= stop <= entry.length:
            raise DataError(
                f"{self.path}, record {name!r}: start and stop must satisfy 0 <= start <= stop <= {entry.length}, "
                f"got {start} and {stop}; clip the range or pad it with N."
            )
        if start == stop:
            return ""
        raw = self._bytes(entry.at(start), entry.at(stop - 1) + 1)
        letters = raw.translate(None, b"\r\n")
        if len(letters) != stop - start or b">" in letters:
            raise DataError(
                f"{self.path}, record {name!r}: the index {self.index_path.name} does not fit the file; "
                f"delete it, it is made again."
            )
        return letters.decode("ascii", "replace")

    def close(self) -> None:
        """Close the file."""
        self._map.close()

    def __enter__(self) -> IndexedFasta:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path, "packed": self.packed, "entries": self.entries, "lengths": self.lengths}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        with self.path.open("rb") as file:
            # A map has no position, so that threads and forked workers do not disturb each other.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self.packed:
            self._packed_at, self._plain_at = bgzf_blocks(self.path)
            self._block = lru_cache(maxsize=64)(self._unpacked)  # 64 blocks of at most 64 KiB

    def _unpacked(self, number: int) -> bytes:
        raw = self._map[int(self._packed_at[number]) : int(self._packed_at[number + 1])]
        try:
            return zlib.decompress(raw, wbits=31)
        except zlib.error as error:
            at = int(self._packed_at[number])
            raise DataError(f"{self.path}: its data are damaged at byte {at:,} ({error}); copy it again.") from None

    def _bytes(self, start: int, stop: int) -> bytes:
        if not self.packed:
            return self._map[start:stop]
        first = bisect_right(self._plain_at, start) - 1
        pieces = []
        for number in range(first, len(self._packed_at) - 1):
            at = int(self._plain_at[number])
            if at >= stop:
                break
            pieces.append(self._block(number)[max(start - at, 0) : stop - at])
        return b"".join(pieces)

    def _read_index(self, size: int) -> dict[str, Entry] | None:
        """Return the index beside the file, or None where it is missing, stale or damaged."""
        try:
            if self.index_path.stat().st_mtime < self.path.stat().st_mtime:
                return None
            lines = self.index_path.read_text("utf-8").splitlines()
            entries = {}
            for line in lines:
                name, *numbers = line.split("\t")
                entry = Entry(*map(int, numbers))
                if entry.length and not 0 < entry.linebases <= entry.linewidth <= entry.linebases + 2:
                    return None
                entries[name] = entry
        except (OSError, ValueError, TypeError):
            return None
        if not entries or len(entries) != len(lines):
            return None
        last = max(entries.values(), key=lambda entry: entry.offset)
        end = last.at(last.length - 1) + 1 if last.length else last.offset
        # Only line ends may follow the last base.
        if not 0 <= size - end <= 1 << 20 or self._bytes(end, size).strip():
            return None
        return entries

    def _write_index(self, entries: dict[str, Entry]) -> None:
        text = "".join(f"{name}\t" + "\t".join(map(str, entry)) + "\n" for name, entry in entries.items())
        # A folder that may not be written costs the next user the same scan, and is no error.
        with contextlib.suppress(OSError):
            handle, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=".fai")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                os.chmod(temporary, self.path.stat().st_mode & 0o666 | 0o200)
                os.replace(temporary, self.index_path)
            except OSError:
                os.unlink(temporary)
                raise


def build_index(path: Path) -> dict[str, Entry]:
    """Read a FASTA file through once, in memory that does not grow with it, and return its index.

    Raises:
        DataError: Lines of unequal length inside a record, a record without a name, two of one name, a truncated file.
    """
    scan = _Scan(path)
    try:
        for block in read_blocks(path):
            scan.add(block)
    except TruncatedError as error:
        raise DataError(f"{path}: {error}; copy or download it again.") from None
    return scan.finish()


class _Scan:
    """Finds line ends with numpy, and looks at the lines of one block at a time.

    What the next block needs is kept: the beginning of its unfinished line, and the open record's last line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, Entry] = {}
        self.name: str | None = None
        self.length = self.offset = self.linebases = self.linewidth = 0
        self.last = (0, 0)  # bases and bytes of the open record's last line
        self.position = 0  # of the current block
        self.begun = 0  # where the unfinished line begins
        self.line = 0  # lines before it
        self.head = b""  # its beginning, or all of it where it is a header
        self.before = b""  # the last byte of the previous block

    def add(self, block: bytes) -> None:
        data = np.frombuffer(block, dtype=np.uint8)
        ends = np.flatnonzero(data == 10)
        if not len(ends):
            self._keep(block, 0)
            return
        starts = np.concatenate([[self.begun - self.position], ends[:-1] + 1])
        carriage = np.zeros(len(ends), dtype=np.int64)
        inner = ends > 0
        carriage[inner] = data[ends[inner] - 1] == 13
        if ends[0] == 0:
            carriage[0] = self.before == b"\r"
        widths = ends - starts + 1
        bases = widths - 1 - carriage
        header = np.zeros(len(ends), dtype=bool)
        header[1:] = data[np.minimum(starts[1:], len(data) - 1)] == ord(">")
        header[0] = (self.head or block)[:1] == b">"
        if self.position == 0 and block.startswith(b"\xef\xbb\xbf"):
            header[0] = block[3:4] == b">"
        marks = np.flatnonzero(header)
        self._lines(bases[: marks[0] if len(marks) else None], widths, starts, 0)
        for number, mark in enumerate(marks):
            self._close()
            text = (self.head if starts[mark] < 0 else b"") + block[max(starts[mark], 0) : ends[mark]]
            self._begin(text, int(mark), self.position + int(ends[mark]) + 1)
            stop = int(marks[number + 1]) if number + 1 < len(marks) else len(ends)
            self._lines(bases[mark + 1 : stop], widths, starts, int(mark) + 1)
        self.line += len(ends)
        self.begun, self.head = self.position + int(ends[-1]) + 1, b""
        self._keep(block, int(ends[-1]) + 1)

    def _keep(self, block: bytes, start: int) -> None:
        rest = block[start:]
        if not self.head:
            self.head = rest if rest.startswith(b">") or (self.begun == 0 and b">" in rest[:4]) else rest[:1]
        elif b">" in self.head[:4]:
            self.head += rest
        self.before = block[-1:]
        self.position += len(block)

    def _begin(self, text: bytes, line: int, offset: int) -> None:
        words = text.removeprefix(b"\xef\xbb\xbf")[1:].decode("utf-8", "replace").split(None, 1)
        self.name = words[0] if words else ""
        where = f"{self.path}, record {self.name!r} (line {self.line + line + 1})"
        if not self.name:
            raise DataError(f"{where}: has no name after '>'; give it one.")
        if self.name in self.entries:
            raise DataError(f"{where}: a record before it has the same name; rename one of them.")
        self.length, self.offset, self.linebases, self.linewidth, self.last = 0, offset, 0, 0, (0, 0)

    def _lines(
        self, bases: NDArray[np.int64], widths: NDArray[np.int64], starts: NDArray[np.int64], first: int
    ) -> None:
        """Take the next lines of the open record."""
        if not len(bases):
            return
        if self.name is None:
            if bases.any():
                raise DataError(f"{self.path} (line {self.line + first + 1}): text before the first '>'; remove it.")
            return
        width = widths[first : first + len(bases)]
        if self.last == (0, 0):
            self.linebases, self.linewidth = int(bases[0]), int(width[0]) if bases[0] else 0
        # Every line but the last must be full; after a shorter one only blank lines may come.
        full = np.empty(len(bases), dtype=bool)
        full[0] = self.last in ((0, 0), (self.linebases, self.linewidth))
        full[1:] = (bases[:-1] == self.linebases) & (width[:-1] == self.linewidth)
        wrong = (bases > self.linebases) | (~full & (bases > 0))
        if wrong.any():
            line = self.line + first + int(np.argmax(wrong)) + 1
            raise DataError(
                f"{self.path}, record {self.name!r} (line {line}): the lines of a record must have one length to be "
                f"read in part; wrap it anew, for example with: seqkit seq -w 60."
            )
        self.length += int(bases.sum())
        self.last = (int(bases[-1]), int(width[-1]))

    def _close(self) -> None:
        if self.name is not None:
            self.entries[self.name] = Entry(self.length, self.offset, self.linebases, self.linewidth)

    def finish(self) -> dict[str, Entry]:
        """Take the last line, where it has no end, and return the index."""
        if self.position > self.begun:
            missing = b"\n"
            self.add(missing)
        self._close()
        return self.entries
