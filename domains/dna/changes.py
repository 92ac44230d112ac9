"""Changes of DNA in their windows: variants of VCF records, and all substitutions of a region.

A window is a stretch of the sequence with the change in its middle, shorter where the sequence ends: nothing is padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.dna.fasta_index import IndexedFasta
from vertebra.domains.dna.variants import Variant, alt_problem
from vertebra.tokenizers.nucleotide import reverse_complement_string

Refusal = tuple[str, str]
"""Rule and advice of a change that cannot be scored."""

BASES = "ACGT"
_LETTERS = np.frombuffer(BASES.encode(), dtype=np.uint8)


@dataclass(frozen=True, slots=True)
class Change:
    """One allele in its window: ``left + ref + right`` becomes ``left + alt + right``."""

    left: str
    ref: str
    alt: str
    right: str

    @property
    def ref_window(self) -> str:
        """The window as it stands in the reference."""
        return self.left + self.ref + self.right

    @property
    def alt_window(self) -> str:
        """The window with the change; its flanks are the same."""
        return self.left + self.alt + self.right

    def other_strand(self) -> Change:
        """The same change, read on the other strand."""
        return Change(*map(reverse_complement_string, (self.right, self.ref, self.alt, self.left)))


def plain(sequence: str) -> str:
    """Write a sequence in capitals, and U as T."""
    return sequence.upper().replace("U", "T")


def trim(position: int, ref: str, alt: str) -> tuple[int, str, str]:
    """Take away the bases that both alleles end with, then those that they begin with."""
    while ref and alt and ref[-1] == alt[-1]:
        ref, alt = ref[:-1], alt[:-1]
    same = next((i for i, (a, b) in enumerate(zip(ref, alt, strict=False)) if a != b), min(len(ref), len(alt)))
    return position + same, ref[same:], alt[same:]


def change_at(fetch: Callable[[int, int], str], length: int, position: int, ref: str, alt: str, window: int) -> Change:
    """Put a change into the middle of its window, which is shorter where the sequence ends.

    Args:
        fetch: Gives the bases from .. to - 1 of the sequence.
        length: Of the sequence.
        position: Of the first base of ``ref``, from 0.
        ref: Reference allele; may be empty.
        alt: Other allele; may be empty.
        window: Bases of the longer one of both windows.
    """
    room, end = window - max(len(ref), len(alt)), position + len(ref)
    left = fetch(max(position - room // 2, 0), position)
    right = fetch(end, min(end + room - room // 2, length))
    return Change(plain(left), ref, alt, plain(right))


def variant_changes(
    variant: Variant, reference: IndexedFasta, window: int, masked: bool = False
) -> list[Change | Refusal]:
    """Return the change of each ALT allele, or why it has no score; ``check_variant`` comes before.

    Each allele has its own window, so that its score does not depend on the other alleles of the record.

    Args:
        variant: The record.
        reference: Genome that it was called on.
        window: Bases of a window.
        masked: Whether the model is a masked one.
    """

    def fetch(start: int, stop: int) -> str:
        return reference.fetch(variant.chrom, start, stop)

    found: list[Change | Refusal] = []
    for given in variant.alts:
        if (problem := alt_problem(given)) is not None:
            found.append((problem, "write them as sequences, or leave the record out"))
            continue
        position, ref, alt = trim(variant.position, plain(variant.ref), plain(given))
        if other := set(ref + alt) - set(BASES):
            rule = f"{', '.join(sorted(other))} in an allele stands for several bases"
            found.append((rule, "write A, C, G or T, or leave the record out"))
        elif max(len(ref), len(alt)) > window:
            rule = f"{max(len(ref), len(alt)):,} bases change, more than the window has ({window:,})"
            found.append((rule, "widen the window if the model allows it, or leave the record out"))
        elif masked and (len(ref), len(alt)) != (1, 1):
            rule = "a masked model scores substitutions of single bases only"
            found.append((rule, "use a causal model, or leave the record out"))
        else:
            found.append(change_at(fetch, reference.lengths[variant.chrom], position, ref, alt, window))
    return found


def with_flanks(fetch: Callable[[int, int], str], length: int, start: int, stop: int, window: int) -> tuple[str, int]:
    """Return a region with the flanks that ``substitutions`` needs, and where in it the region begins.

    A region that fits into the window stands in its middle; a longer one has half a window on each side.
    """
    room = window - (stop - start)
    before, after = (room // 2, room - room // 2) if room >= 0 else (window // 2, window // 2)
    begin = max(start - before, 0)
    return plain(fetch(begin, min(stop + after, length))), start - begin


def substitutions(sequence: str, start: int, stop: int, window: int) -> Iterator[Change]:
    """Yield the three substitutions of each base ``start`` .. ``stop`` - 1 that is A, C, G or T, by base.

    The whole sequence is the window where it fits; else each base stands in the middle of its own.

    Args:
        sequence: In capitals, U as T.
        start: First base to substitute, from 0.
        stop: Base after the last one.
        window: Bases of a window.
    """
    whole = len(sequence) <= window
    for at in range(start, stop):
        ref = sequence[at]
        for alt in BASES.replace(ref, "") if ref in BASES else "":
            if whole:
                yield Change(sequence[:at], ref, alt, sequence[at + 1 :])
            else:
                yield change_at(lambda a, b: sequence[a:b], len(sequence), at, ref, alt, window)


def saturation_matrix(sequence: str, scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Arrange the scores of all ``substitutions`` as (L, 4): 0 at the reference base, nan where it is none of four."""
    letters = np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)[:, None]  # (L, 1)
    known = np.isin(letters, _LETTERS)
    matrix = np.where(known, 0.0, np.nan) * np.ones(4)  # (L, 4)
    matrix[known & (letters != _LETTERS)] = scores
    return matrix
