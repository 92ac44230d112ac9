"""Markov models of DNA: the baselines that a language model has to beat.

Two forms of every order k, both fitted by counting (k+1)-mers on both strands: additive smoothing,
p(x | context) = (count + a) / (total + 4a), and interpolation with the lower orders,
p_k(x | context) = (count + a p_{k-1}(x | shorter context)) / (total + a). ``a`` is chosen on validation data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STRENGTHS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1e3, 3e3, 1e4, 1e5, 1e6)


def as_bases(sequence: str) -> np.ndarray:
    """Return A, C, G, T as 0..3 and all else as -1, int64 (T,)."""
    table = np.full(256, -1, dtype=np.int64)
    for value, letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
        table[list(letters.encode())] = value
    return table[np.frombuffer(sequence.encode("latin-1"), dtype=np.uint8)]


def kmer_codes(bases: np.ndarray, k: int) -> np.ndarray:
    """Return the k-mer that ends at each position as a number below 4^k, or -1 where it is cut or has other letters."""
    codes = np.zeros(len(bases), dtype=np.int64)
    good = np.ones(len(bases), dtype=bool)
    for back in range(k):
        shifted = np.concatenate([np.full(min(back, len(bases)), -1), bases[: len(bases) - back]])
        good &= shifted >= 0
        codes += shifted << (2 * back)
    return np.where(good, codes, -1)


@dataclass(frozen=True)
class Counts:
    """Sorted (k+1)-mers and contexts with their numbers."""

    kmers: np.ndarray
    kmer_counts: np.ndarray
    contexts: np.ndarray
    context_counts: np.ndarray

    @staticmethod
    def fit(sequences: Sequence[np.ndarray], order: int) -> Counts:
        """Count the (order+1)-mers of both strands."""
        codes = []
        for bases in sequences:
            other = np.where(bases >= 0, 3 - bases, -1)[::-1]
            for strand in (bases, other):
                found = kmer_codes(strand, order + 1)
                codes.append(found[found >= 0])
        kmers, counts = np.unique(np.concatenate(codes), return_counts=True)
        contexts, index = np.unique(kmers >> 2, return_inverse=True)
        return Counts(kmers, counts, contexts, np.bincount(index, counts).astype(np.int64))

    def look_up(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return how often each (k+1)-mer, and its context, was seen."""
        return _find(self.kmers, self.kmer_counts, codes), _find(self.contexts, self.context_counts, codes >> 2)


def _find(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0)


def bits_per_base(
    train: Sequence[np.ndarray], valid: Sequence[np.ndarray], test: Sequence[np.ndarray], orders: Sequence[int]
) -> list[dict[str, float]]:
    """Return, for each order, bits per base on ``test`` of both forms, with the strength chosen on ``valid``.

    The first bases of a sequence, whose context is shorter than the order, are scored by the lower orders, so that
    every order is measured on the same bases.
    """
    tables = {k: Counts.fit(train, k) for k in range(max(orders) + 1)}

    def score(sequences: Sequence[np.ndarray], order: int, strength: float, interpolate: bool) -> float:
        bits, count = 0.0, 0
        for bases in sequences:
            p = np.full(len(bases), 0.25)
            for k in range(order + 1):
                codes = kmer_codes(bases, k + 1)
                seen, total = tables[k].look_up(codes)
                mixed = (seen + strength * p) / (total + strength)
                added = (seen + strength) / (total + 4 * strength)
                p = np.where(codes >= 0, mixed if interpolate else added, p)
            real = bases >= 0
            bits -= np.log2(p[real]).sum()
            count += int(real.sum())
        return bits / count

    rows = []
    for order in orders:
        row: dict[str, float] = {"order": order}
        for name, interpolate in (("additive", False), ("interpolated", True)):
            best = min(STRENGTHS, key=lambda a, i=interpolate, k=order: score(valid, k, a, i))
            row[name], row[f"{name}_strength"] = score(test, order, best, interpolate), best
        rows.append(row)
    return rows
