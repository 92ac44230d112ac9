"""Similar sequences: groups for splits that do not leak, and the check of splits that are given.

Two sequences are neighbours when they share enough of their k-mers, on either strand; a group is everything that
neighbours connect (single linkage), so that no sequence has a neighbour in another group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

K = 16
"""Length of the k-mers: 4**16 is far above the number of k-mers in a data set, so chance hits are rare."""
SHARE = 0.3
"""Share of the shorter sequence's distinct k-mers from which two sequences are neighbours."""
_COMMON = 200
_ANCHORS = 16
"""Of a k-mer in more than ``_COMMON`` sequences, only pairs with its first ``_ANCHORS`` sequences are counted: the cost
stays linear, and a large family still hangs together through its first members."""


@dataclass(frozen=True)
class Leakage:
    """What of one split is also in the training split.

    Args:
        sequences: Number of sequences looked at.
        exact: How many occur letter by letter in training, on either strand.
        similar: How many have a neighbour in training, the exact ones included.
    """

    sequences: int
    exact: int
    similar: int

    @property
    def share(self) -> float:
        """Share of sequences with a neighbour in training."""
        return self.similar / max(1, self.sequences)


def canonical_kmers(sequences: Sequence[str], k: int = K) -> tuple[Ints, Ints]:
    """Return the distinct k-mers of every sequence, the smaller of both strands, as (code, sequence number) pairs.

    Args:
        sequences: Letters of any case; k-mers with other letters than A, C, G, T (or U) are left out.
        k: At most 31.
    """
    table = np.full(256, -1, dtype=np.int64)
    for value, letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
        table[list(letters.encode())] = value
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    codes = table[np.frombuffer("".join(sequences).encode("latin-1"), dtype=np.uint8)]
    owner = np.repeat(np.arange(len(sequences)), lengths)
    count = len(codes) - k + 1
    if count < 1:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    ahead, back = np.zeros(count, np.int64), np.zeros(count, np.int64)
    good = owner[:count] == owner[k - 1 :]  # within one sequence
    for i in range(k):
        part = codes[i : i + count]
        good &= part >= 0
        ahead = ahead * 4 + part
        back += (3 - part) << (2 * i)
    pairs = np.unique(np.stack([np.minimum(ahead, back)[good], owner[:count][good]]), axis=1)
    return pairs[0], pairs[1]


def neighbours(sequences: Sequence[str], k: int = K, share: float = SHARE) -> tuple[Ints, Ints]:
    """Return the pairs of numbers of sequences that are neighbours, the smaller number first.

    Sequences shorter than k are neighbours of equal ones only. In a family of more than 200 the pairs with one of its
    first members are found, which connects it.

    Args:
        sequences: Letters.
        k: Length of the k-mers.
        share: Share of the shorter sequence's k-mers that both must have.
    """
    from scipy.sparse import csr_matrix

    codes, owner = canonical_kmers(sequences, k)
    _, column, seen = np.unique(codes, return_inverse=True, return_counts=True)
    sizes = np.bincount(owner, minlength=len(sequences))
    # The pairs come sorted by k-mer, then by sequence: a k-mer's sequences stand together, in order.
    rank = np.arange(len(column)) - (np.cumsum(seen) - seen)[column]
    shape = (len(sequences), len(seen))
    shared_by_two = (seen > 1)[column]
    anchors = shared_by_two & ((seen <= _COMMON)[column] | (rank < _ANCHORS))
    every, some = (
        csr_matrix((np.ones(int(kept.sum()), dtype=np.int32), (owner[kept], column[kept])), shape=shape)
        for kept in (shared_by_two, anchors)
    )
    shared = (every @ some.T).tocoo()
    second, first = shared.row.astype(np.int64), shared.col.astype(np.int64)  # anchors are the smaller numbers
    enough = (first < second) & (shared.data >= share * np.minimum(sizes[first], sizes[second]))
    equal = _equal_pairs(sequences)
    return np.concatenate([first[enough], equal[0]]), np.concatenate([second[enough], equal[1]])


def identity_groups(sequences: Sequence[str], k: int = K, share: float = SHARE) -> Ints:
    """Number the groups that neighbours connect, shape (N,)."""
    from scipy.sparse import csr_matrix
    from scipy.sparse.csgraph import connected_components

    first, second = neighbours(sequences, k, share)
    ones = np.ones(len(first), dtype=np.int8)
    graph = csr_matrix((ones, (first, second)), shape=(len(sequences), len(sequences)))
    groups: Ints = connected_components(graph, directed=False)[1].astype(np.int64)
    return groups


def leakage(train: Sequence[str], other: Sequence[str], k: int = K, share: float = SHARE) -> Leakage:
    """Look for sequences of ``other`` in ``train``: equal ones and neighbours, on either strand."""
    exact, similar = known_in(train, other, k, share)
    return Leakage(len(other), int(exact.sum()), int(similar.sum()))


def known_in(
    train: Sequence[str], other: Sequence[str], k: int = K, share: float = SHARE
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tell which sequences of ``other`` are equal to one of ``train``, and which are similar or equal, each (N,)."""
    keys = _strandless([*train, *other])
    seen = set(keys[: len(train)])
    exact = np.array([key in seen for key in keys[len(train) :]], dtype=bool)
    first, second = neighbours([*train, *other], k, share)
    across = (first < len(train)) & (second >= len(train))
    similar = exact.copy()
    similar[second[across] - len(train)] = True
    return exact, similar


def _strandless(sequences: Sequence[str]) -> list[str]:
    from vertebra.tokenizers.nucleotide import reverse_complement_string

    upper = (s.upper() for s in sequences)
    return [min(s, reverse_complement_string(s)) for s in upper]


def _equal_pairs(sequences: Sequence[str]) -> tuple[Ints, Ints]:
    """Return pairs that connect all sequences of equal letters, on either strand."""
    _, number = np.unique(_strandless(sequences), return_inverse=True)
    order = np.argsort(number, kind="stable")
    same = number[order[1:]] == number[order[:-1]]
    return order[:-1][same].astype(np.int64), order[1:][same].astype(np.int64)
