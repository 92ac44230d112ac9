"""DNA letters <-> ids: single nucleotides and k-mers.

The first seven ids and the five letters are those of HyenaDNA's character tokenizer, whose sizes (12 tokens, a maximum
of 131,072 + 2 positions) HybriDNA (https://arxiv.org/abs/2502.10807) shares::

    [CLS] 0  [SEP] 1  [BOS] 2  [MASK] 3  [PAD] 4  [RESERVED] 5  [UNK] 6  A 7  C 8  G 9  T 10  N 11

*How ours differs*: IUPAC ambiguity codes become N (there: [UNK]), U becomes T, and ``encode`` adds no special token.
"""

from __future__ import annotations

import itertools
import sys
from typing import ClassVar, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.base import Tokenizer

SPECIAL_TOKENS = ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[PAD]", "[RESERVED]", "[UNK]")
IUPAC_AMBIGUOUS = "RYSWKMBDHVN"  # one letter for two or more of A, C, G, T

_FIRST_BASE = len(SPECIAL_TOKENS)
_COMPLEMENT = str.maketrans("ACGTURYSWKMBDHVNacgturyswkmbdhvn", "TGCAAYRSWMKVHDBNtgcaayrswmkvhdbn")
_LOWER = np.zeros(256, dtype=bool)
_LOWER[ord("a") : ord("z") + 1] = True

Ids = TypeVar("Ids")  # a numpy array or a torch tensor


def _base_codes(other: int, ambiguous: int, first: int) -> bytes:
    """Build a 256-entry table for ``bytes.translate``: A, C, G, T/U -> first + 0..3, IUPAC, and everything else."""
    table = bytearray([other] * 256)
    for letter in IUPAC_AMBIGUOUS:
        table[ord(letter)] = table[ord(letter.lower())] = ambiguous
    for code, letters in enumerate(("Aa", "Cc", "Gg", "TtUu")):
        for letter in letters:
            table[ord(letter)] = first + code
    return bytes(table)


def _as_bytes(sequence: str | bytes) -> bytes:
    # 'replace' keeps one byte per character, so a stray letter costs one [UNK] and shifts nothing.
    return sequence.encode("ascii", "replace") if isinstance(sequence, str) else bytes(sequence)


def reverse_complement_string(sequence: str) -> str:
    """Return the other strand, 5' to 3'; IUPAC codes and case are kept, U counts as T, other characters stay."""
    return sequence.translate(_COMPLEMENT)[::-1]


def soft_mask(sequence: str | bytes) -> NDArray[np.bool_]:
    """Return True where a letter is lower case, the soft mask of repeats; shape (L,)."""
    return _LOWER[np.frombuffer(_as_bytes(sequence), dtype=np.uint8)]


class DNATokenizer(Tokenizer):
    """What both tokenizers share: the special ids, and the other strand on ids.

    Attributes:
        complement: For every id the id of its reverse complement, shape (vocab_size,); specials map to themselves.
        base_ids: The ids that a model may generate or use as random replacements.
        tokens: Names of all ids: the special tokens, then letters or k-mers.
    """

    cls_id: ClassVar[int] = 0
    sep_id: ClassVar[int] = 1
    bos_id: ClassVar[int] = 2
    mask_id: ClassVar[int] = 3
    pad_id: ClassVar[int] = 4
    unk_id: ClassVar[int] = 6

    complement: NDArray[np.int64]
    base_ids: tuple[int, ...]
    tokens: tuple[str, ...]

    def reverse_complement(self, ids: Ids) -> Ids:
        """Return the ids of the other strand: the last axis reversed, every id complemented.

        Args:
            ids: Integer ids, shape (..., L), numpy array or torch tensor; special ids keep their value, and move with
                the reversal: pad after this call, or the padding changes sides.

        Returns:
            Same type, shape, dtype and device.
        """
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(ids, torch.Tensor):
            table = torch.as_tensor(self.complement, device=ids.device)
            return table[ids.flip(-1).long()].to(ids.dtype)
        array = np.asarray(ids)
        return self.complement[array[..., ::-1]].astype(array.dtype)

    def _checked(self, ids: ArrayLike) -> NDArray[np.int64]:
        array = np.asarray(ids)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise DataError(
                f"{type(self).__name__}: decode takes one row of integer ids, got shape {array.shape} of "
                f"{array.dtype}; decode a batch row by row."
            )
        if array.size and not (array.min() >= 0 and array.max() < self.vocab_size):
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise DataError(
                f"{type(self).__name__}: ids must lie in 0 .. {self.vocab_size - 1}, got {wrong}; "
                f"was the model made with another tokenizer?"
            )
        return array.astype(np.int64)


class NucleotideTokenizer(DNATokenizer):
    """One id per nucleotide; the table is at the top of this file."""

    vocab_size = 12
    n_id: ClassVar[int] = 11
    base_ids = (7, 8, 9, 10)
    tokens = (*SPECIAL_TOKENS, "A", "C", "G", "T", "N")
    complement = np.array([0, 1, 2, 3, 4, 5, 6, 10, 9, 8, 7, 11])

    _table: ClassVar[bytes] = _base_codes(other=6, ambiguous=11, first=_FIRST_BASE)
    # Specials that stand for no position vanish; [MASK] and [UNK] do stand for one.
    _letters: ClassVar[tuple[str, ...]] = ("", "", "", "_", "", "", "?", "A", "C", "G", "T", "N")

    def encode(self, sequence: str | bytes) -> NDArray[np.int64]:
        """Map letters to ids, shape (L,): case is ignored, U is T, other IUPAC codes are N, the rest is [UNK]."""
        return self.encode_uint8(sequence).astype(np.int64)

    def encode_uint8(self, sequence: str | bytes) -> NDArray[np.uint8]:
        """Do what ``encode`` does in an eighth of the memory; the array is read-only."""
        return np.frombuffer(_as_bytes(sequence).translate(self._table), dtype=np.uint8)

    def decode(self, ids: ArrayLike) -> str:
        """Map ids (L,) to letters; [MASK] is written ``_``, [UNK] ``?``, the other special tokens are left out.

        Raises:
            DataError: An id outside of the vocabulary, or more than one row.
        """
        return "".join(map(self._letters.__getitem__, self._checked(ids).tolist()))


class KmerTokenizer(DNATokenizer):
    """One id per window of k bases: 7 + the k-mer read as a number in base 4 (A 0, C 1, G 2, T 3).

    A window with any other letter is [UNK]. With ``stride`` k the up to k - 1 bases after the last whole window have
    no id.

    Args:
        k: Bases a window, 1 .. 8.
        stride: Bases from one window to the next: 1 (overlapping) or k.

    Raises:
        ConfigError: Another ``k`` or ``stride``.
    """

    fields = ("k", "stride")
    _codes: ClassVar[bytes] = _base_codes(other=4, ambiguous=4, first=0)

    def __init__(self, k: int, stride: int = 1) -> None:
        if not 1 <= k <= 8:
            raise ConfigError(f"KmerTokenizer: k must be 1 .. 8, got {k}; larger vocabularies are rarely trained.")
        if stride not in (1, k):
            raise ConfigError(f"KmerTokenizer: stride must be 1 or k ({k}), got {stride}.")
        self.k, self.stride = k, stride
        self.vocab_size = _FIRST_BASE + 4**k
        self.base_ids = tuple(range(_FIRST_BASE, self.vocab_size))
        self.tokens = (*SPECIAL_TOKENS, *map("".join, itertools.product("ACGT", repeat=k)))
        kmers = np.arange(4**k)
        reverse = np.zeros_like(kmers)
        for _ in range(k):
            reverse = reverse * 4 + (3 - kmers % 4)
            kmers = kmers // 4
        self.complement = np.concatenate([np.arange(_FIRST_BASE), _FIRST_BASE + reverse])

    def encode(self, sequence: str | bytes) -> NDArray[np.int64]:
        """Map L letters to (L - k) // stride + 1 ids; case is ignored, U is T.

        Raises:
            DataError: Fewer than k letters.
        """
        codes = np.frombuffer(_as_bytes(sequence).translate(self._codes), dtype=np.uint8)
        count = (len(codes) - self.k) // self.stride + 1
        if count < 1:
            raise DataError(
                f"KmerTokenizer: a sequence must have at least k = {self.k} bases, got {len(codes)}; "
                f"leave it out or use the nucleotide tokenizer."
            )
        ids = np.zeros(count, dtype=np.int32)
        seen = np.zeros(count, dtype=np.uint8)  # bit 2 is set by a letter other than A, C, G, T
        for offset in range(self.k):
            column = codes[offset : offset + (count - 1) * self.stride + 1 : self.stride]
            ids <<= 2
            ids += column
            seen |= column
        ids += _FIRST_BASE
        ids[seen >= 4] = self.unk_id
        return ids.astype(np.int64)

    def decode(self, ids: ArrayLike) -> str:
        """Map ids to letters; special tokens other than [MASK] and [UNK] are left out.

        A base that no known window covers is written N; with A, C, G, T alone it is the exact inverse of ``encode``.

        Raises:
            DataError: An id outside of the vocabulary, or more than one row.
        """
        array = self._checked(ids)
        array = array[(array >= _FIRST_BASE) | (array == self.unk_id) | (array == self.mask_id)]
        if not array.size:
            return ""
        letters = np.full((len(array) - 1) * self.stride + self.k, ord("N"), dtype=np.uint8)
        known = np.flatnonzero(array >= _FIRST_BASE)
        kmers = array[known] - _FIRST_BASE
        for offset in range(self.k):
            digit = kmers // 4 ** (self.k - 1 - offset) % 4
            letters[known * self.stride + offset] = np.frombuffer(b"ACGT", dtype=np.uint8)[digit]
        return letters.tobytes().decode("ascii")
