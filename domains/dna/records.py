"""What all readers share: the record, the error of one record, blocks of bytes from plain and gz files, sniffing."""

from __future__ import annotations

import os
import string
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError

BLOCK = 1 << 22  # bytes read at a time: 4 MiB
MAX_LENGTH = 100_000_000  # bases of one record held in memory
NUCLEOTIDES = b"ACGTUNRYSWKMBDHVacgtunryswkmbdhv*-"  # IUPAC codes, stop and gap
WHITESPACE = b"\r\n\t \x0b\x0c"
PROTEIN_SHARE = 0.05  # share of letters that are no nucleotide code from which a record looks like protein

BGZF_EOF = bytes.fromhex("1f8b08040000000000ff0600424302001b0003000000000000000000")
_LETTERS = string.ascii_letters.encode()
_MAGIC = {
    b"PK\x03\x04": "a zip archive; unpack it",
    b"BZh": "compressed with bzip2; decompress it",
    b"\xfd7zXZ\x00": "compressed with xz; decompress it",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; decompress it",
    b"BAM\x01": "a BAM file; convert it with: samtools fastq FILE",
    b"CRAM": "a CRAM file; convert it with: samtools fastq FILE",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}

Format = Literal["fasta", "fastq", "genbank", "embl", "table"]
Duplicates = Literal["error", "report", "allow"]


@dataclass(slots=True)
class Record:
    """One sequence as it stands in its file: case, IUPAC codes, U and gaps are kept.

    Args:
        name: The first word of the header.
        sequence: The letters, without white space.
        description: The rest of the header.
        quality: Of FASTQ, the quality letters (Phred + 33), one a base.
    """

    name: str
    sequence: str
    description: str = ""
    quality: str | None = None

    @property
    def phred(self) -> NDArray[np.uint8] | None:
        """Phred scores, shape (L,), or None without qualities."""
        if self.quality is None:
            return None
        return np.frombuffer(self.quality.encode("ascii"), dtype=np.uint8) - np.uint8(33)


@dataclass(frozen=True)
class RecordError:
    """Why one record cannot be used.

    Args:
        file: Path as it was given.
        record: Its name, or ``#3`` for a third record without one.
        line: Line of its header (or row), counted from 1.
        rule: What is wrong.
        advice: What to do.
    """

    file: str
    record: str
    line: int
    rule: str
    advice: str

    def __str__(self) -> str:
        return f"{self.file}, record {self.record!r} (line {self.line}): {self.rule}; {self.advice}."

    def to_dict(self) -> dict[str, str | int]:
        """Return the fields, ready for a line of JSON."""
        return asdict(self)


OnError = Callable[[RecordError], None]


def report(bad: RecordError, on_error: OnError | None) -> None:
    """Hand the error to ``on_error``, or raise it as a DataError."""
    if on_error is None:
        raise DataError(str(bad))
    on_error(bad)


class Names:
    """Watches for a second record of the same name; keeps all names in memory unless the policy is "allow".

    Args:
        path: File, for the text.
        policy: "error": the second record is bad; "report": it is kept, and reported where ``on_error`` is given;
            "allow": names are not looked at.
    """

    def __init__(self, path: Path, policy: Duplicates) -> None:
        if policy not in ("error", "report", "allow"):
            raise ConfigError(f"duplicates: must be 'error', 'report' or 'allow', got {policy!r}.")
        self.path, self.policy = path, policy
        self.lines: dict[str, int] = {}

    def admit(self, name: str, line: int, on_error: OnError | None) -> bool:
        """Return whether to keep a record of this name."""
        if self.policy == "allow":
            return True
        first = self.lines.setdefault(name, line)
        if first == line:
            return True
        rule = f"has the name of the record in line {first}"
        bad = RecordError(str(self.path), name, line, rule, "rename one of them, or set duplicates to 'allow'")
        if self.policy == "error":
            report(bad, on_error)
            return False
        if on_error is not None:
            on_error(bad)
        return True


def letter_problem(sequence: bytes) -> tuple[str, str] | None:
    """Return (rule, advice) where the letters are not those of a nucleotide sequence, else None.

    A few letters outside of the nucleotide codes are let through (the tokenizer makes them [UNK]).
    """
    other = sequence.translate(None, NUCLEOTIDES)
    if not other:
        return None
    strange = other.translate(None, _LETTERS)
    if strange:
        at = sequence.index(strange[:1])
        letter = strange[:1].decode("ascii", "backslashreplace")
        return f"has {letter!r} at base {at + 1:,}, which is no nucleotide code", "remove it or mend the file"
    share = len(other) / len(sequence)
    if len(other) > 1 and share > PROTEIN_SHARE:
        kinds = ", ".join(sorted(set(other.decode("ascii").upper()))[:8])
        rule = f"looks like protein: {share:.0%} of its letters ({kinds}) are not nucleotide codes"
        return rule, "give the nucleotide sequence"
    return None


def sequence_problem(sequence: bytes, size: int, max_length: int) -> tuple[str, str] | None:
    """Return (rule, advice) where a sequence of ``size`` bases is empty, too long, or not of nucleotides."""
    if size > max_length:
        return (
            f"has more than {max_length:,} bases, the most read whole",
            "cut it into windows with IndexedFasta, or raise max_length",
        )
    if size == 0:
        return "has no bases", "remove the record or add its sequence"
    return letter_problem(sequence)


class TruncatedError(Exception):
    """A compressed file ends early or is damaged; raised after all that could be read was given."""


def existing_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of a file that exists and is not empty.

    Raises:
        DataError: It is missing, a folder, not readable, or empty.
    """
    file = Path(path)
    if file.is_dir():
        raise DataError(f"{file}: is a folder; name a file in it.")
    if not file.exists():
        raise DataError(f"{file}: no such file; check the path.")
    if not os.access(file, os.R_OK):
        raise DataError(f"{file}: may not be read; check its permissions.")
    if file.stat().st_size == 0:
        raise DataError(f"{file}: the file is empty; was its download or export interrupted?")
    return file


def is_gzip(path: Path) -> bool:
    """Tell by content whether a file is compressed with gzip or bgzip."""
    with path.open("rb") as file:
        return file.read(2) == b"\x1f\x8b"


def read_blocks(path: Path, size: int = BLOCK) -> Iterator[bytes]:
    """Yield the content of a plain, gzip or bgzip file, told apart by content, in blocks of at most ``size`` bytes.

    Raises:
        TruncatedError: The compressed data end early or are damaged; all before that was yielded.
    """
    with path.open("rb") as file:
        if is_gzip(path):
            yield from _gunzip(file, size)
        else:
            while block := file.read(size):
                yield block


def _gunzip(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yield the content of all members; the checksum of each is checked."""
    blocked = is_bgzf_header(file.read(18))
    file.seek(0)
    engine = zlib.decompressobj(wbits=31)
    fed = False  # whether the current member has begun
    pieces: list[bytes] = []
    ready = 0
    problem = ""
    # Small reads, as every member's end copies what is left of them.
    while not problem and (raw := file.read(1 << 17)):
        while raw:
            if not fed and not raw.strip(b"\0"):
                break  # zero padding after the last member
            fed = True
            before = engine.copy()  # a call that fails keeps none of its output
            try:
                out = engine.decompress(raw, size)
            except zlib.error as error:
                problem = f"its compressed data are damaged ({error})"
                out = _before_damage(before, raw)
                pieces.append(out)
                ready += len(out)
                break
            pieces.append(out)
            ready += len(out)
            if ready >= size:
                yield b"".join(pieces)
                pieces, ready = [], 0
            raw = engine.unconsumed_tail
            if engine.eof:
                raw, fed, engine = engine.unused_data, False, zlib.decompressobj(wbits=31)
    if ready:
        yield b"".join(pieces)
    if not problem and fed:
        problem = "its compressed data end early"
    if not problem and blocked:
        file.seek(-min(len(BGZF_EOF), file.tell()), os.SEEK_END)
        if file.read() != BGZF_EOF:
            problem = "its compressed data end early (the bgzip end marker is missing)"
    if problem:
        raise TruncatedError(problem)


def _before_damage(engine: zlib._Decompress, raw: bytes) -> bytes:
    """Return what ``raw`` gives before it is damaged, to the byte, by ever smaller steps."""
    pieces = []
    step = 1 << 16
    while step:
        before = engine.copy()
        try:
            out = engine.decompress(raw, step)
        except zlib.error:
            engine, step = before, step // 2
            continue
        if not out:
            break
        pieces.append(out)
        raw = engine.unconsumed_tail
    return b"".join(pieces)


def is_bgzf_header(head: bytes) -> bool:
    """Tell whether 18 bytes begin a block of bgzip: a gzip member whose extra field holds its own size."""
    return len(head) == 18 and head[:4] == b"\x1f\x8b\x08\x04" and head[12:14] == b"BC" and head[14:16] == b"\x02\x00"


def bgzf_blocks(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read where the blocks of a bgzip file begin, from their headers alone.

    Returns:
        Offsets in the file and in the uncompressed data, one more than there are blocks (the last are the ends).

    Raises:
        DataError: A header or the end is not that of bgzip.
    """
    packed, plain = [0], [0]
    with path.open("rb") as file:
        end = file.seek(0, os.SEEK_END)
        while packed[-1] < end:
            file.seek(packed[-1])
            head = file.read(18)
            if not is_bgzf_header(head):
                raise DataError(f"{path}: its compressed data are damaged at byte {packed[-1]:,}; copy it again.")
            after = packed[-1] + struct.unpack("<H", head[16:18])[0] + 1
            if after > end:
                raise DataError(f"{path}: its compressed data end early; copy or compress it again.")
            file.seek(after - 4)
            plain.append(plain[-1] + struct.unpack("<I", file.read(4))[0])
            packed.append(after)
    return np.array(packed), np.array(plain)


def text_blocks(path: Path) -> Iterator[bytes]:
    """Yield blocks as ``read_blocks`` does, without a byte order mark and with old Macintosh line ends mended."""
    macintosh = False
    for number, block in enumerate(read_blocks(path)):
        if number == 0:
            block = block.removeprefix(b"\xef\xbb\xbf")
            macintosh = b"\r" in block[:-1] and b"\n" not in block
        yield block.replace(b"\r", b"\n") if macintosh else block


class Lines:
    """Lines without their ends, with as much look-ahead as is asked for.

    Args:
        blocks: The file.
        limit: A longer line is cut to ``limit`` + 1 bytes, so that it is still seen to be too long.
    """

    def __init__(self, blocks: Iterator[bytes], limit: int) -> None:
        self.blocks, self.limit = blocks, limit
        self.lines: list[bytes] = []
        self.at = 0
        self.number = 1  # in the file, of the line that get(0) returns
        self.tail = b""
        self.truncated = ""

    def get(self, index: int) -> bytes | None:
        """Return the line ``index`` lines ahead, or None after the end."""
        while self.at + index >= len(self.lines):
            if not self._fill():
                return None
        return self.lines[self.at + index]

    def drop(self, count: int) -> None:
        """Go ``count`` lines ahead."""
        self.at += count
        self.number += count

    def _fill(self) -> bool:
        try:
            block = next(self.blocks, None)
        except TruncatedError as error:
            self.truncated, self.tail, block = str(error), b"", None
        if block is None:
            tail, self.tail = self.tail, b""
            if tail:
                self.lines.append(tail.strip())
            return bool(tail)
        if len(self.tail) > self.limit and (end := block.find(b"\n")) >= 0:
            block = block[end:]  # the cut line ends here
        elif len(self.tail) > self.limit:
            return True
        del self.lines[: self.at]
        self.at = 0
        lines = (self.tail + block).split(b"\n")
        self.tail = lines.pop()[: self.limit + 1]
        self.lines.extend(line.strip() for line in lines)
        return True


def sniff_format(path: str | os.PathLike[str]) -> Format:
    """Tell a file's format by its content; the extension only helps to tell a table without known columns.

    Raises:
        DataError: The file is missing, empty, binary, truncated before its first record, or in no known format.
    """
    file = existing_file(path)
    text = first_text(file)
    found = guess_format(file, text)
    if found is not None:
        return found
    first = text.split(b"\n", 1)[0].rstrip()
    shown = first[:40].decode("utf-8", "backslashreplace")
    if len(first) > 9 and not first.translate(None, NUCLEOTIDES):
        advice = "it looks like a sequence without a header: add a line '>name' before it"
    else:
        advice = "FASTA begins with '>', FASTQ with '@', a table with its column names (sequence,label)"
    raise DataError(f"{file}: holds no FASTA or FASTQ record, it begins with {shown!r}; {advice}.")


def first_text(file: Path) -> bytes:
    """Return the first block of a file from its first letter on.

    Raises:
        DataError: It is binary, blank, or truncated before anything could be read.
    """
    try:
        block = next(text_blocks(file), b"")
    except TruncatedError as error:
        raise DataError(f"{file}: {error}; copy or download it again.") from None
    for magic, what in _MAGIC.items():
        if block.startswith(magic):
            raise DataError(f"{file}: is {what}.")
    if b"\0" in block:
        raise DataError(
            f"{file}: is a binary file (a NUL byte at offset {block.index(0):,}), whatever its name says; "
            f"give FASTA, FASTQ, GenBank, EMBL or a CSV table as text."
        )
    text = block.lstrip()
    if not text:
        raise DataError(f"{file}: holds no record, only blank lines; a FASTA record begins with a line '>name'.")
    if text.startswith((b"@HD\t", b"@SQ\t", b"@RG\t", b"@PG\t", b"@CO\t")):
        raise DataError(f"{file}: is a SAM file; convert it with: samtools fastq FILE.")
    return text


def guess_format(file: Path, text: bytes) -> Format | None:
    """Return the format of a file that begins with ``text``, or None."""
    starts: tuple[tuple[bytes, Format], ...] = (
        (b">", "fasta"),
        (b"@", "fastq"),
        (b"LOCUS ", "genbank"),
        (b"ID   ", "embl"),
    )
    for start, name in starts:
        if text.startswith(start):
            return name
    first = text.split(b"\n", 1)[0]
    columns = {c.strip(b" \r\"'").lower() for d in (b",", b"\t", b";") for c in first.split(d)}
    named = Path(file.name.removesuffix(".gz")).suffix.lower() in (".csv", ".tsv")
    if b"sequence" in columns or (named and any(d in first for d in (b",", b"\t", b";"))):
        return "table"
    return None
