"""What sets of sequences are made of: GC, k-mer spectra, motifs, novelty.

Shapes: N sequences, S = 4**k k-mers in the order of A, C, G, T.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError

Floats = NDArray[np.float64]

_IUPAC = {
    **{base: base for base in "ACGT"},
    **{"U": "T", "R": "AG", "Y": "CT", "S": "CG", "W": "AT", "K": "GT", "M": "AC"},
    **{"B": "CGT", "D": "AGT", "H": "ACT", "V": "ACG", "N": "ACGT"},
}
_DIGITS = np.full(256, 4, dtype=np.int64)
for _digit, _letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
    _DIGITS[list(_letters.encode())] = _digit


def gc_content(sequence: str) -> float:
    """Return the share of G and C among A, C, G, T; NaN where there are none."""
    counts = np.bincount(_digits(sequence), minlength=5)[:4]
    return float((counts[1] + counts[2]) / counts.sum()) if counts.sum() else float("nan")


def kmer_spectrum(sequences: Sequence[str], k: int) -> Floats:
    """Return the share of every k-mer among all, (S,); zeros where there are none."""
    counts = np.zeros(4**k)
    for sequence in sequences:
        digits = _digits(sequence)
        size = len(digits) - k + 1
        if size < 1:
            continue
        code, good = np.zeros(size, dtype=np.int64), np.ones(size, dtype=bool)
        for i in range(k):
            part = digits[i : i + size]
            code = code * 4 + part
            good &= part < 4
        counts += np.bincount(code[good], minlength=len(counts))
    return counts / max(counts.sum(), 1.0)


def kmer_name(code: int, k: int) -> str:
    """Return the letters of a k-mer."""
    return "".join("ACGT"[code // 4 ** (k - 1 - i) % 4] for i in range(k))


def jensen_shannon(first: Floats, second: Floats) -> float:
    """Return the Jensen-Shannon divergence of two spectra in bits: 0 for equal ones, at most 1."""
    middle = (first + second) / 2
    total = 0.0
    for spectrum in (first, second):
        seen = spectrum > 0
        total += float((spectrum[seen] * np.log2(spectrum[seen] / middle[seen])).sum()) / 2
    return total


def enriched_kmers(sequences: Sequence[str], k: int, most: int = 5) -> list[tuple[str, float]]:
    """Return the k-mers that exceed what the composition alone would give the most, and by which factor."""
    base, spectrum = kmer_spectrum(sequences, 1), kmer_spectrum(sequences, k)
    expected = base
    for _ in range(k - 1):
        expected = np.multiply.outer(expected, base).ravel()
    excess = spectrum * np.log2(np.maximum(spectrum, 1e-12) / np.maximum(expected, 1e-12))
    top = np.argsort(-excess, kind="stable")[:most]
    return [(kmer_name(int(i), k), float(spectrum[i] / max(expected[i], 1e-12))) for i in top if excess[i] > 0]


def motif_pattern(motif: str) -> re.Pattern[str]:
    """Turn IUPAC letters into a pattern that finds them.

    Raises:
        ConfigError: Another letter, or none.
    """
    if not motif or set(motif.upper()) - _IUPAC.keys():
        raise ConfigError(f"motif: must be IUPAC letters such as TATAWAW, got {motif!r}.")
    return re.compile("".join(f"[{_IUPAC[letter]}]" for letter in motif.upper()), re.IGNORECASE)


def motif_shares(sequences: Sequence[str], motifs: Mapping[str, str]) -> dict[str, float]:
    """Return the share of sequences that hold each motif (IUPAC letters by name), on the strand that is given."""
    patterns = {name: motif_pattern(motif) for name, motif in motifs.items()}
    count = max(len(sequences), 1)
    return {name: sum(p.search(s) is not None for s in sequences) / count for name, p in patterns.items()}


def _digits(sequence: str) -> NDArray[np.int64]:
    return _DIGITS[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]
