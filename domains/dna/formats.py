"""Readers of sequence files: FASTA and FASTQ (plain, gzip, bgzip), and every other format by its content.

All readers stream: memory holds one block of the file and one record. A bad record is handed to ``on_error`` and
reading goes on with the next one; without ``on_error`` the first bad record raises a DataError of the same text. A file
that cannot be read at all (empty, binary, another format) always raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from vertebra.domains.dna.fasta_index import IndexedFasta
from vertebra.domains.dna.genbank import AnnotatedRecord, Feature, read_genbank
from vertebra.domains.dna.records import (
    MAX_LENGTH,
    NUCLEOTIDES,
    WHITESPACE,
    Duplicates,
    Lines,
    Names,
    OnError,
    Record,
    RecordError,
    TruncatedError,
    existing_file,
    report,
    sequence_problem,
    sniff_format,
    text_blocks,
)
from vertebra.domains.dna.tables import Table, TableFolder, find_tables, read_table
from vertebra.errors import DataError

__all__ = [
    "AnnotatedRecord",
    "Feature",
    "IndexedFasta",
    "Record",
    "RecordError",
    "Table",
    "TableFolder",
    "find_tables",
    "read_fasta",
    "read_fastq",
    "read_genbank",
    "read_sequences",
    "read_table",
    "sniff_format",
]

_MAX_HEADER = 1 << 20  # bytes
_QUALITIES = bytes(range(33, 127))
_COPY_AGAIN = "copy or download the file again"


def read_sequences(
    path: str | os.PathLike[str],
    on_error: OnError | None = None,
    *,
    max_length: int = MAX_LENGTH,
    duplicates: Duplicates = "error",
) -> Iterator[Record]:
    """Read the records of a FASTA, FASTQ, GenBank, EMBL or CSV/TSV file, told apart by content.

    Args:
        path: Plain, gzip or bgzip file; the rows of a table are named by its column ``name`` or ``id``, else ``row_1``.
        on_error: Called with each bad record; None raises at the first one.
        max_length: Bases; a longer record is bad. It is noticed while reading, before the whole of it is held.
        duplicates: A second record of the same name is bad ("error"), kept and reported ("report") or kept ("allow").

    Raises:
        DataError: At once where the file cannot be read at all, while iterating at a bad record without ``on_error``.
        ConfigError: Another policy for duplicates.
    """
    kind = sniff_format(path)
    if kind == "fasta":
        return read_fasta(path, on_error, max_length=max_length, duplicates=duplicates)
    if kind == "fastq":
        return read_fastq(path, on_error, max_length=max_length, duplicates=duplicates)
    names = Names(Path(path), duplicates)
    if kind == "table":
        table = read_table(path, labels=(), on_error=on_error, max_length=max_length)
        rows = zip(table.names, table.sequences, table.lines, strict=True)
        return (Record(name, sequence) for name, sequence, line in rows if names.admit(name, line, on_error))
    annotated = read_genbank(path, on_error, max_length=max_length)
    return (
        Record(r.name, r.sequence, r.description)
        for number, r in enumerate(annotated, start=1)
        if names.admit(r.name, number, on_error)
    )


def read_fasta(
    path: str | os.PathLike[str],
    on_error: OnError | None = None,
    *,
    max_length: int = MAX_LENGTH,
    duplicates: Duplicates = "error",
) -> Iterator[Record]:
    """Read FASTA; arguments and errors as for ``read_sequences``."""
    file = _expect(path, "fasta")
    return _fasta_records(file, on_error, max_length, Names(file, duplicates))


def read_fastq(
    path: str | os.PathLike[str],
    on_error: OnError | None = None,
    *,
    max_length: int = MAX_LENGTH,
    duplicates: Duplicates = "error",
) -> Iterator[Record]:
    """Read FASTQ, also with wrapped lines; arguments and errors as for ``read_sequences``."""
    file = _expect(path, "fastq")
    return _fastq_records(file, on_error, max_length, Names(file, duplicates))


def _expect(path: str | os.PathLike[str], wanted: str) -> Path:
    found = sniff_format(path)
    if found != wanted:
        raise DataError(f"{path}: holds no {wanted.upper()} record, it is {found}; read it with read_sequences.")
    return existing_file(path)


def _split_header(header: bytes, number: int) -> tuple[str, str, str]:
    """Return name, description, and what to call the record in an error."""
    words = header.decode("utf-8", "replace").split(None, 1)
    name = words[0] if words else ""
    return name, words[1].rstrip() if len(words) > 1 else "", name or f"#{number}"


def _fasta_records(file: Path, on_error: OnError | None, max_length: int, names: Names) -> Iterator[Record]:
    for number, (header, body, size, line, cut) in enumerate(_split_fasta(file, max_length), start=1):
        name, description, label = _split_header(header, number)
        if cut:
            problem: tuple[str, str] | None = (cut, _COPY_AGAIN)
        elif not name:
            problem = "has no name after '>'", "give it one"
        else:
            problem = sequence_problem(body, size, max_length)
        if problem:
            report(RecordError(str(file), label, line, *problem), on_error)
        elif names.admit(name, line, on_error):
            yield Record(name, body.decode("ascii"), description)


def _split_fasta(file: Path, limit: int) -> Iterator[tuple[bytes, bytes, int, int, str]]:
    """Yield header, letters without white space, their count, line of the header, and why the record is cut off.

    A record over ``limit`` is yielded as soon as that shows, with no letters; the rest of it is skipped.
    """
    line = 1  # of where ``data`` begins
    record = _OpenRecord(limit)
    held = b""  # a line end at the end of a block: the next block may begin with '>'
    try:
        for index, block in enumerate(text_blocks(file)):
            if index == 0:
                text = block.lstrip()
                line += block.count(b"\n", 0, len(block) - len(text))
                block = text.removeprefix(b">")
                record.begin(line)
            data = held + block
            held = b"\n" if data.endswith(b"\n") else b""
            parts = data.removesuffix(b"\n").split(b"\n>")
            line += record.add(parts[0])
            if len(parts) > 1:
                if not record.done:
                    yield record.item()
                for part in parts[1:-1]:
                    line += 1
                    header, _, body = part.partition(b"\n")
                    body = body.translate(None, WHITESPACE)
                    yield header, body, len(body), line, ""
                    line += part.count(b"\n")
                line += 1
                record.begin(line)
                line += record.add(parts[-1])
            if record.size > limit and not record.done:
                yield record.item()
    except TruncatedError as error:
        yield record.header, b"", 0, record.line, str(error)
        return
    if not record.done:
        yield record.item()


class _OpenRecord:
    """The record whose end is not read yet."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.begin(1)

    def begin(self, line: int) -> None:
        self.line, self.header, self.size, self.done, self.complete = line, b"", 0, False, False
        self.chunks: list[bytes] = []

    def add(self, part: bytes) -> int:
        """Add what follows in the file; return the number of line ends in it."""
        lines = part.count(b"\n")
        if not self.complete:
            head, end, part = part.partition(b"\n")
            if len(self.header) < _MAX_HEADER:
                self.header += head
            self.complete = bool(end)
        letters = part.translate(None, WHITESPACE)
        self.size += len(letters)
        if self.size > self.limit:
            self.chunks.clear()
        else:
            self.chunks.append(letters)
        return lines

    def item(self) -> tuple[bytes, bytes, int, int, str]:
        self.done = True
        body = b"".join(self.chunks)
        self.chunks.clear()
        return self.header, body, self.size, self.line, ""


def _fastq_records(file: Path, on_error: OnError | None, max_length: int, names: Names) -> Iterator[Record]:
    lines = Lines(text_blocks(file), max_length)
    number = 0
    while (header := lines.get(0)) is not None:
        if not header:
            lines.drop(1)
            continue
        number += 1
        name, description, label = _split_header(header[1:], number)
        line = lines.number
        sequence, quality, used, problem = _fastq_record(lines, header, max_length)
        if not problem and not name:
            problem = "has no name after '@'", "give it one"
        problem = problem or sequence_problem(sequence, len(sequence), max_length)
        if not problem and quality.translate(None, _QUALITIES):
            problem = "has a quality letter outside of '!' .. '~'", "qualities must be Phred + 33; export it again"
        if problem and lines.truncated and lines.get(used) is None:
            problem = lines.truncated, _COPY_AGAIN
            lines.truncated = ""
        lines.drop(used)
        if problem:
            report(RecordError(str(file), label, line, *problem), on_error)
        elif names.admit(name, line, on_error):
            yield Record(name, sequence.decode("ascii"), description, quality.decode("ascii"))
    if lines.truncated:
        report(RecordError(str(file), f"#{number + 1}", lines.number, lines.truncated, _COPY_AGAIN), on_error)


def _fastq_record(lines: Lines, header: bytes, limit: int) -> tuple[bytes, bytes, int, tuple[str, str] | None]:
    """Return letters, qualities, lines used, and (rule, advice) of what is wrong; uses at least one line."""
    if not header.startswith(b"@"):
        return b"", b"", _next_record(lines), ("does not begin with '@'", "mend or remove the record")
    first, plus, quality = lines.get(1), lines.get(2), lines.get(3)
    if quality is not None and (plus or b"").startswith(b"+") and len(first or b"") == len(quality):
        return first or b"", quality, 4, None
    # Wrapped lines: '@' and '+' may begin a quality line, so only lengths tell where the record ends.
    used, parts, size = 1, list[bytes](), 0
    while (part := lines.get(used)) is not None and not part.startswith((b"+", b"@")) and size <= limit:
        parts.append(part)
        size += len(part)
        used += 1
    if size > limit:
        return b"", b"", _next_record(lines), sequence_problem(b"", size, limit)
    if part is None or part.startswith(b"@"):
        return b"", b"", _next_record(lines), ("has no line '+' after its sequence", "mend or remove the record")
    used += 1
    begin, qualities, length = used, list[bytes](), 0
    while length < size and (part := lines.get(used)) is not None:
        qualities.append(part)
        length += len(part)
        used += 1
    if length == size:
        after = used
        while (part := lines.get(after)) == b"":
            after += 1
        if part is None or part.startswith(b"@"):
            return b"".join(parts), b"".join(qualities), used, None
    end = _next_record(lines)
    length = sum(len(lines.get(i) or b"") for i in range(begin, end))
    rule = f"has {size:,} bases but {length:,} qualities"
    return b"", b"", end, (rule, "mend or remove the record; was the file cut off?")


def _next_record(lines: Lines) -> int:
    """Return the first line from 1 on that begins a record: '@', and a line of nucleotides after it."""
    at = 1
    while (line := lines.get(at)) is not None:
        if line.startswith(b"@"):
            after = lines.get(at + 1)
            if after and not after.translate(None, NUCLEOTIDES):
                return at
        at += 1
    return at
