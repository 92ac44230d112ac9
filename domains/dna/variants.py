"""Variants (VCF) and regions (BED): streaming readers, checks against the reference, and a writer of annotated VCF.

VCF counts positions from 1 (https://samtools.github.io/hts-specs/VCFv4.3.pdf), BED from 0; here all are 0-based and
half-open. Text that is no UTF-8 is kept as surrogates, so that it is written back as it was.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BufferedIOBase
from pathlib import Path
from typing import BinaryIO, TypeVar

from vertebra.domains.dna.fasta_index import IndexedFasta
from vertebra.domains.dna.records import OnError, RecordError, TruncatedError, existing_file, report, text_blocks
from vertebra.errors import DataError

MAX_LINE = 1 << 27  # bytes of one line held in memory: 128 MiB, a million samples
COLUMNS = ("#CHROM", "POS", "ID", "REF", "ALT", "QUAL", "FILTER", "INFO")
_INFO = COLUMNS.index("INFO")
_INTEGER = re.compile("[0-9]{1,18}")
# N stands for itself: a gap of the assembly is no evidence for any base.
_CODES = dict(zip("RYSWKMBDHV", ["AG", "CT", "CG", "AT", "GT", "AC", "CGT", "AGT", "ACT", "ACG"], strict=True))
_OTHER_LETTER = re.compile(f"[^ACGTUN{''.join(_CODES)}]", re.IGNORECASE | re.ASCII)
_COPY_AGAIN = "copy or download the file again"
_SAME_REFERENCE = "use the reference that the file was made with"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Variant:
    """One record of a VCF file; ``fields`` are all columns of its line, to write it back."""

    chrom: str
    position: int  # of the first base of REF, counted from 0: POS - 1
    name: str  # ID, '' for '.'
    ref: str
    alts: tuple[str, ...]  # all of ALT in the order of the file, also what is no sequence
    line: int  # in the file, counted from 1
    fields: tuple[str, ...]

    @property
    def label(self) -> str:
        """What to call it in an error: ``chrom:POS``, counted from 1."""
        return f"{self.chrom}:{self.position + 1}"


@dataclass(frozen=True, slots=True)
class Region:
    """One line of a BED file: the bases ``start`` .. ``end`` - 1 of a contig, counted from 0."""

    chrom: str
    start: int
    end: int
    name: str  # '' where column 4 is missing or '.'
    strand: str  # '+', '-' or '.', which also stands for a missing column 6
    line: int  # in the file, counted from 1

    @property
    def label(self) -> str:
        """What to call it in an error and in results: its name, or ``chrom:start-end``."""
        return self.name or f"{self.chrom}:{self.start}-{self.end}"


class _BadLineError(Exception):
    """Carries rule and advice of a line that cannot be used."""


class VCFFile:
    """A VCF file, plain, gzip or bgzip; each iteration reads it anew, in memory that does not grow with it.

    ``header`` holds the lines that begin with '##', and the #CHROM line where there is one.

    Args:
        path: The file.
        on_error: Takes the error of each bad record; without it the first one is raised.

    Raises:
        DataError: The file is missing, empty, binary, BCF, no VCF, or holds a bad record and ``on_error`` is None.
    """

    def __init__(self, path: str | os.PathLike[str], on_error: OnError | None = None) -> None:
        self.path, self.on_error = _text_file(path, "VCF"), on_error
        self.header: list[str] = []
        first = ""
        try:
            for number, raw in _lines(self.path):
                line = _decode(raw)
                first = first or line.strip()
                if line.startswith(("##", "#CHROM")):
                    self.header.append(line)
                elif line.strip() and not line.startswith("#"):
                    if not self.header:
                        _variant(line, number)
                    break
            else:
                if not self.header:
                    raise _BadLineError
        except TruncatedError as error:
            if not self.header:
                raise DataError(f"{self.path}: {error}; {_COPY_AGAIN}.") from None
        except _BadLineError:
            raise DataError(
                f"{self.path}: is no VCF, it begins with {_shown(first, 40)}; VCF is text with the tab-separated "
                f"columns CHROM, POS, ID, REF, ALT, QUAL, FILTER and INFO after header lines that begin with '##'."
            ) from None

    def __iter__(self) -> Iterator[Variant]:
        return _items(self.path, _variant, lambda line: line.startswith("#"), self.on_error)


def read_vcf(path: str | os.PathLike[str], on_error: OnError | None = None) -> VCFFile:
    """Open a VCF file; arguments and errors as for ``VCFFile``."""
    return VCFFile(path, on_error)


def read_bed(path: str | os.PathLike[str], on_error: OnError | None = None) -> Iterator[Region]:
    """Read the regions of a BED file, plain, gzip or bgzip; arguments and errors as for ``VCFFile``.

    Columns are separated by tabs, or by other white space in lines without tabs.
    """
    file = _text_file(path, "BED")
    return _items(file, _region, lambda x: x[0] == "#" or x.split(None, 1)[0] in ("track", "browser"), on_error)


def _text_file(path: str | os.PathLike[str], kind: str) -> Path:
    file = existing_file(path)
    try:
        block = next(text_blocks(file), b"")
    except TruncatedError as error:
        raise DataError(f"{file}: {error}; {_COPY_AGAIN}.") from None
    if block.startswith(b"BCF\x02"):
        raise DataError(f"{file}: is BCF; convert it with: bcftools view FILE -O v.")
    if b"\0" in block:
        raise DataError(f"{file}: is a binary file, whatever its name says; give {kind} as text, plain, gzip or bgzip.")
    if not block.strip():
        raise DataError(f"{file}: holds only blank lines; was its export interrupted?")
    return file


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield numbered lines without their ends but with all else (``Lines`` strips); long ones cut to MAX_LINE + 1."""
    number, tail = 0, b""
    for block in text_blocks(file):
        if len(tail) > MAX_LINE:
            block = block[block.find(b"\n") :] if b"\n" in block else b""
        lines = (tail + block).split(b"\n")
        tail = lines.pop()[: MAX_LINE + 1]
        for line in lines:
            number += 1
            yield number, line.removesuffix(b"\r")
    if tail:
        yield number + 1, tail.removesuffix(b"\r")


def _items(
    file: Path, parse: Callable[[str, int], T], skip: Callable[[str], bool], on_error: OnError | None
) -> Iterator[T]:
    """Yield what ``parse`` makes of each line, and report the lines of which it makes nothing."""
    count = number = 0
    try:
        for number, raw in _lines(file):
            line = _decode(raw)
            if not line.strip() or skip(line):
                continue
            count += 1
            try:
                if len(raw) > MAX_LINE:
                    raise _BadLineError(f"is longer than {MAX_LINE:,} bytes", "split the file by samples")
                item = parse(line, number)
            except _BadLineError as bad:
                start = line[:200].split("\t", 2)
                label = ":".join(start[:2]) if parse is _variant and start[0] and start[2:] else f"#{count}"
                report(RecordError(str(file), label, number, *bad.args), on_error)
            else:
                yield item
    except TruncatedError as error:
        report(RecordError(str(file), f"#{count + 1}", number + 1, str(error), _COPY_AGAIN), on_error)


def _variant(line: str, number: int) -> Variant:
    fields = line.split("\t")
    if len(fields) < 5:
        advice = "separate the columns with tabs" if len(line.split()) > 4 else "was the line cut off?"
        raise _BadLineError(f"has {len(fields)} of at least 5 tab-separated columns", advice)
    chrom, pos, name, ref, alt = fields[:5]
    if not chrom:
        raise _BadLineError("has no CHROM", "give the name of its contig")
    if not _INTEGER.fullmatch(pos) or int(pos) < 1:
        raise _BadLineError(f"has the POS {_shown(pos)}", "give an integer, counted from 1")
    if ref in ("", "."):
        raise _BadLineError("has no REF", "give the bases of the reference; an insertion has the base before it")
    if other := _OTHER_LETTER.search(ref):
        raise _BadLineError(f"has {other[0]!r} in its REF {_shown(ref)}", "give the bases as A, C, G, T or N")
    return Variant(chrom, int(pos) - 1, "" if name == "." else name, ref, tuple(alt.split(",")), number, tuple(fields))


def _region(line: str, number: int) -> Region:
    fields = [field.strip() for field in line.split("\t")] if "\t" in line else line.split()
    if len(fields) < 3 or not fields[0]:
        raise _BadLineError("lacks one of the columns chrom, start and end", "separate the three with tabs")
    for column, value in zip(("start", "end"), fields[1:3], strict=True):
        if not _INTEGER.fullmatch(value):
            raise _BadLineError(f"has the {column} {_shown(value)}", "give an integer, counted from 0")
    start, end = int(fields[1]), int(fields[2])
    if start >= end:
        rule = f"has no bases, its start {start} is not below its end {end}"
        raise _BadLineError(rule, "BED counts from 0 and leaves out the end: base 5 alone is 4 to 5")
    name, strand = (fields[3:4] or [""])[0], (fields[5:6] or ["."])[0]
    if strand not in ("+", "-", "."):
        raise _BadLineError(f"has the strand {_shown(strand)} in column 6", "write '+', '-' or '.'")
    return Region(fields[0], start, end, "" if name == "." else name, strand, number)


def alt_problem(alt: str) -> str | None:
    """Return why an ALT allele is no plain sequence, or None where it is one."""
    fixed = {"": "an allele is empty", ".": "'.' names no allele", "*": "'*' is a deletion of another record"}
    if alt in fixed:
        return fixed[alt]
    if alt.startswith("<"):
        return f"{_shown(alt)} is symbolic and has no sequence"
    if "[" in alt or "]" in alt or alt.startswith(".") or alt.endswith("."):
        return f"{_shown(alt)} is a breakend"
    other = _OTHER_LETTER.search(alt)
    return f"{_shown(alt)} has {other[0]!r}, which is no nucleotide code" if other else None


def usable_alts(variant: Variant) -> list[tuple[int, str]]:
    """Return the alleles that are plain sequences, each after its index in ``variant.alts``."""
    return [(index, alt) for index, alt in enumerate(variant.alts) if alt_problem(alt) is None]


def check_variant(variant: Variant, reference: IndexedFasta) -> tuple[str, str] | None:
    """Return (rule, advice) where a variant cannot be scored on this reference, else None.

    Case does not count, U is T, and an IUPAC code is equal to each of its bases; N is only equal to N.
    """
    if variant.chrom not in reference:
        return _missing_contig(variant.chrom, reference)
    start, length = variant.position, reference.lengths[variant.chrom]
    if start + len(variant.ref) > length:
        where = f"at POS {start + 1} is beyond the end of contig {variant.chrom!r}, which has {length:,} bp"
        return f"its REF of {len(variant.ref):,} bp {where}", _SAME_REFERENCE
    alts = [alt for _, alt in usable_alts(variant)]
    longest = max(map(len, (variant.ref, *alts)))
    bases = reference.fetch(variant.chrom, start, min(start + longest, length))
    there = bases[: len(variant.ref)]
    if not _same_bases(variant.ref, there):
        swapped = any(_same_bases(alt, bases[: len(alt)]) for alt in alts)
        advice = "REF and ALT look swapped: swap them with their genotypes, or " if swapped else ""
        rule = f"its REF is {_shown(variant.ref)} but the reference has {_shown(there)} there"
        return rule, advice + _SAME_REFERENCE
    if not alts:
        reasons = dict.fromkeys(alt_problem(alt) or "" for alt in variant.alts)
        rule = "none of its ALT alleles can be scored: " + ", ".join(list(reasons)[:3])
        return rule, "write them as sequences, or leave the record out"
    return None


def check_region(region: Region, reference: IndexedFasta) -> tuple[str, str] | None:
    """Return (rule, advice) where a region does not lie inside of a contig of this reference, else None."""
    if region.chrom not in reference:
        return _missing_contig(region.chrom, reference)
    length = reference.lengths[region.chrom]
    if region.end > length:
        rule = f"its end {region.end} is beyond the end of contig {region.chrom!r}, which has {length:,} bp"
        return rule, f"clip it, or {_SAME_REFERENCE}"
    return None


def _missing_contig(chrom: str, reference: IndexedFasta) -> tuple[str, str]:
    rule = f"its contig {chrom!r} is not in the reference {reference.path.name}"
    return rule, _nearest(chrom, tuple(reference.lengths))


@lru_cache(maxsize=64)  # a file whose contigs are all missing asks the same few again and again
def _nearest(chrom: str, names: tuple[str, ...]) -> str:
    for name in names:
        if _bare(name) == _bare(chrom):
            return f"the reference calls it {name!r}: rename the contigs (bcftools annotate --rename-chrs for VCF)"
    if near := difflib.get_close_matches(chrom, names[:10_000], n=1):
        return f"the nearest contig there is {near[0]!r}: rename it, or {_SAME_REFERENCE}"
    return f"there it is {', '.join(map(repr, names[:3]))}{' ...' * (len(names) > 3)}: {_SAME_REFERENCE}"


def _bare(name: str) -> str:
    bare = name.lower().removeprefix("chr")
    return "mt" if bare == "m" else bare


def _same_bases(one: str, two: str) -> bool:
    one, two = (text.upper().replace("U", "T") for text in (one, two))
    if one == two or len(one) != len(two):
        return one == two
    return all(a == b or set(_CODES.get(a, a)) & set(_CODES.get(b, b)) for a, b in zip(one, two, strict=True))


def _shown(text: str, most: int = 20) -> str:
    return repr(text if len(text) <= most else text[:most] + "...")


def _decode(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")


class VCFWriter:
    """Writes variants back with more keys in INFO; all other columns stay as they were, byte for byte.

    Args:
        stream: Takes bytes, such as a file opened with "wb" or ``gzip.open``; closing it is up to the caller.
        header: As ``VCFFile.header``; a missing ##fileformat or #CHROM line is added, the latter with eight columns.
        info: (ID, Number, Type, Description) of each key, whose lines replace those of the same ID.
    """

    def __init__(
        self, stream: BinaryIO | BufferedIOBase, header: Iterable[str], info: Iterable[tuple[str, str, str, str]]
    ) -> None:
        self.stream = stream
        lines, columns, new = list[str](), "", dict[str, str]()
        for key, number, kind, text in info:
            text = text.replace("\\", "\\\\").replace('"', '\\"')
            new[key] = f'##INFO=<ID={key},Number={number},Type={kind},Description="{text}">'
        for line in header:
            named = re.match(r"##INFO=<(?:[^\"]*,)?ID=([^,>]+)", line)
            if line.startswith("#CHROM"):
                columns = line
            elif not named or named[1] not in new:
                lines.append(line)
        if not any(line.startswith("##fileformat=") for line in lines):
            lines.insert(0, "##fileformat=VCFv4.3")
        if columns.count("\t") < _INFO:
            columns = "\t".join(COLUMNS)
        for line in (*lines, *new.values(), columns):
            self._line(line)

    def write(self, variant: Variant, values: Mapping[str, str]) -> None:
        """Write one variant with ``key=value`` at the end of its INFO, in place of '.' and of the same keys."""
        fields = list(variant.fields) + ["."] * (len(COLUMNS) - len(variant.fields))
        if values:
            kept = [item for item in fields[_INFO].split(";") if item.split("=", 1)[0] not in ("", ".", *values)]
            fields[_INFO] = ";".join(kept + [f"{key}={value}" for key, value in values.items()])
        self._line("\t".join(fields))

    def _line(self, text: str) -> None:
        self.stream.write(text.encode("utf-8", "surrogateescape") + b"\n")
