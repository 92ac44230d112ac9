"""GenBank and EMBL files through Biopython: sequence and features."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vertebra.domains.dna.records import (
    MAX_LENGTH,
    OnError,
    RecordError,
    existing_file,
    is_gzip,
    report,
    sequence_problem,
    sniff_format,
)
from vertebra.errors import DataError
from vertebra.tokenizers.nucleotide import reverse_complement_string


@dataclass(frozen=True)
class Feature:
    """A stretch of a sequence.

    Args:
        start: First base, counted from 0.
        stop: One past the last base.
        strand: 1, -1, or 0 where the file says neither or both.
        type: ``gene``, ``CDS``, ...
        parts: (start, stop, strand) of each piece, in the order in which they are joined, 5' to 3' of the feature.
    """

    start: int
    stop: int
    strand: int
    type: str
    parts: tuple[tuple[int, int, int], ...]

    def extract(self, sequence: str) -> str:
        """Return the feature's bases, 5' to 3', pieces joined."""
        pieces = (
            reverse_complement_string(sequence[start:stop]) if strand < 0 else sequence[start:stop]
            for start, stop, strand in self.parts
        )
        return "".join(pieces)


@dataclass(frozen=True)
class AnnotatedRecord:
    """A sequence and its features.

    Args:
        name: Accession with version.
        sequence: Upper case letters.
        features: In the order of the file; those that lie on another record are left out.
        description: The definition line.
    """

    name: str
    sequence: str
    features: tuple[Feature, ...]
    description: str = ""


def read_genbank(
    path: str | os.PathLike[str], on_error: OnError | None = None, *, max_length: int = MAX_LENGTH
) -> Iterator[AnnotatedRecord]:
    """Read the records of a GenBank or EMBL file (plain or gzip), told apart by content.

    Biopython holds one whole record while it reads, of any length. A line that it cannot parse ends the file: the
    records before it are good.

    Args:
        path: The file.
        on_error: Called with each bad record; None raises at the first one.
        max_length: Bases; a longer record is bad.

    Raises:
        DataError: Another format (at once); a bad record without ``on_error``.
    """
    kind = sniff_format(path)
    if kind not in ("genbank", "embl"):
        raise DataError(f"{path}: holds no GenBank or EMBL record, it is {kind}; read it with read_sequences.")
    return _records(path, kind, on_error, max_length)


def _records(
    path: str | os.PathLike[str], kind: str, on_error: OnError | None, max_length: int
) -> Iterator[AnnotatedRecord]:
    import gzip

    from Bio import BiopythonWarning, SeqIO
    from Bio.Seq import UndefinedSequenceError

    file = existing_file(path)
    number = 0
    with gzip.open(file, "rt") if is_gzip(file) else file.open("rt") as handle:
        parser: Iterator[Any] = SeqIO.parse(handle, kind)  # type: ignore[no-untyped-call]
        while True:
            number += 1
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", BiopythonWarning)
                    parsed = next(parser, None)
            except (ValueError, EOFError, OSError) as error:
                rule = f"cannot be parsed ({str(error).strip() or type(error).__name__})"
                advice = "mend it or export the file again; nothing after it was read"
                report(RecordError(str(file), f"#{number}", 1, rule, advice), on_error)
                return
            if parsed is None:
                return
            name = str(parsed.id or parsed.name)
            try:
                sequence = str(parsed.seq)
            except UndefinedSequenceError:
                sequence = ""
            problem = sequence_problem(sequence.encode("ascii", "replace"), len(sequence), max_length)
            if problem:
                report(RecordError(str(file), name, 1, *problem), on_error)
                continue
            features = tuple(f for f in map(_feature, parsed.features) if f is not None)
            yield AnnotatedRecord(name, sequence, features, str(parsed.description))


def _feature(found: Any) -> Feature | None:
    location = found.location
    if location is None or location.ref is not None or any(part.ref is not None for part in location.parts):
        return None
    parts = tuple((int(p.start), int(p.end), int(p.strand or 0)) for p in location.parts)
    return Feature(int(location.start), int(location.end), int(location.strand or 0), str(found.type), parts)
