"""What ``dna/score`` reads: kinds of files, and the work that a record of each is."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vertebra.domains.dna.changes import Change, Refusal
    from vertebra.domains.dna.variants import Variant

KINDS = {"vcf": "variants", "bed": "regions", "sequences": "sequences"}
_NUMBERS = re.compile(rb"[^\s>@#]\S*\t\d+\t\d+[\t\r\n]")


@dataclass(frozen=True, eq=False)
class Alleles:
    """A record of a VCF file: the change of each ALT allele, or why it has none."""

    variant: Variant
    changes: list[Change | Refusal]


@dataclass(frozen=True, eq=False)
class Region:
    """What is mutated: ``sequence`` is on the strand that is read, ``first`` the position of its first base, from 1."""

    chrom: str
    strand: str
    first: int
    sequence: str

    @property
    def step(self) -> int:
        """From the position of one base to that of the next."""
        return -1 if self.strand == "-" else 1


@dataclass(frozen=True, eq=False)
class Part:
    """The bases ``start`` .. ``stop`` - 1 of ``context``, which are a part of the region."""

    region: Region
    context: str
    start: int
    stop: int
    first: bool
    last: bool


def input_kind(path: Path) -> str:
    """Tell by ending, then by content, whether a file holds variants, regions, or something that is left to others."""
    from vertebra.domains.dna.records import TruncatedError, text_blocks

    name = path.name.lower().removesuffix(".gz").removesuffix(".bgz")
    if name.endswith((".vcf", ".bed")):
        return name[-3:]
    try:
        text = next(text_blocks(path), b"")[:4096].lstrip()
    except (TruncatedError, OSError):
        return "sequences"  # the reader says what is wrong
    if text.startswith((b"##fileformat=VCF", b"#CHROM\t")):
        return "vcf"
    return "bed" if _NUMBERS.match(text) else "sequences"
