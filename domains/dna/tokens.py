"""Sequences as token ids in one array, cut into batches without a loop over items."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vertebra.backbones.random import item_uniform
from vertebra.domains.batching import Batch, plan_packing
from vertebra.errors import DataError
from vertebra.tokenizers.nucleotide import DNATokenizer, NucleotideTokenizer

Ints = NDArray[np.int64]
_CROP, _STRAND, _SHIFT, _RENAME, _LETTERS, _LABELS = 1, 2, 3, 4, 5, 6  # tell the draws for one item apart
_ORDERS = np.array(list(itertools.permutations(range(4))))


@dataclass
class TokenArray:
    """Token ids of many sequences, end to end.

    Args:
        flat: Ids of all sequences, shape (total,), in the smallest type that holds the vocabulary.
        starts: Where each sequence begins, shape (N,).
        lengths: Length of each, in tokens, shape (N,).
        tokenizer: What made the ids.
    """

    flat: NDArray[np.unsignedinteger]
    starts: Ints
    lengths: Ints
    tokenizer: DNATokenizer

    @classmethod
    def encode(cls, sequences: Iterable[str | bytes], tokenizer: DNATokenizer) -> TokenArray:
        """Tokenize sequences."""
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
        if isinstance(tokenizer, NucleotideTokenizer):
            rows = [tokenizer.encode_uint8(s) for s in sequences]
        else:
            rows = [tokenizer.encode(s).astype(dtype) for s in sequences]
        lengths = np.array([len(r) for r in rows], dtype=np.int64)
        flat = np.concatenate(rows) if rows else np.zeros(0, dtype)
        return cls(flat, np.cumsum(lengths) - lengths, lengths, tokenizer)

    def rows(self, begins: Ints, lengths: Ints, other_strand: NDArray[np.bool_]) -> tuple[Tensor, Tensor]:
        """Cut pieces out of ``flat``.

        Args:
            begins: Where each piece begins in ``flat``, shape (B,).
            lengths: Length of each, shape (B,).
            other_strand: Which are to be reverse complements, shape (B,).

        Returns:
            ids uint8 or int64 (B, L), padded on the right, and the mask of real positions, bool (B, L).
        """
        at = np.arange(lengths.max())
        mask = at < lengths[:, None]
        along = np.where(other_strand[:, None], lengths[:, None] - 1 - at, at)
        ids = self.flat[np.where(mask, begins[:, None] + along, 0)]
        if other_strand.any():
            complement = self.tokenizer.complement.astype(ids.dtype)
            ids[other_strand] = complement[ids[other_strand]]
        ids[~mask] = self.tokenizer.pad_id
        return torch.from_numpy(ids if ids.dtype == np.uint8 else ids.astype(np.int64)), torch.from_numpy(mask)


@dataclass
class LabelledItems:
    """Sequences with labels.

    Args:
        tokens: The sequences.
        names: Name of each.
        labels: Class numbers int64 (N,), 0/1 flags float32 (N, C), numbers float32 (N, C), or None to predict.
        max_length: Longest input; longer sequences are cropped.
        crop: Which part is kept: ``left``, ``centre``, ``right``, or ``random``, the centre outside of training.
        strand_probability: Probability that an item is read from the other strand.
        seed: Seed of crop and strand.
    """

    tokens: TokenArray
    names: list[str]
    labels: NDArray[np.generic] | None
    max_length: int
    crop: str = "centre"
    strand_probability: float = 0.0
    seed: int = 0

    @property
    def lengths(self) -> Ints:
        """Length of every item after cropping."""
        return np.minimum(self.tokens.lengths, self.max_length)

    def fetch(self, indices: Ints, epoch: int) -> Batch:
        """Make ``ids`` (B, L), ``mask`` (B, L), ``index`` (B,) and, where labelled, ``labels``."""
        full = self.tokens.lengths[indices]
        lengths = np.minimum(full, self.max_length)
        share = {"left": 0.0, "centre": 0.5, "right": 1.0}.get(self.crop, 0.5)
        spare = full - lengths
        if self.crop == "random" and spare.any():
            offset = (item_uniform(self.seed, epoch, indices, _CROP) * (spare + 1)).astype(np.int64)
        else:
            offset = (spare * share).astype(np.int64)
        other = np.zeros(len(indices), dtype=bool)
        if self.strand_probability:
            other = item_uniform(self.seed, epoch, indices, _STRAND) < self.strand_probability
        ids, mask = self.tokens.rows(self.tokens.starts[indices] + offset, lengths, other)
        batch: Batch = {"ids": ids, "mask": mask, "index": torch.from_numpy(np.asarray(indices, dtype=np.int64))}
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[indices])
        else:
            batch["names"] = [self.names[i] for i in indices]
        return batch


@dataclass
class PromptedItems:
    """Whole sequences for a language model, each behind the tokens of its labels: ``[BOS] labels bases [SEP]``.

    Args:
        tokens: The sequences.
        names: Name of each.
        labels: Ids of the label tokens of each, without the tokenizer's offset; empty ones for no label.
        max_length: Longest input; longer sequences are cut on the right, and have no ``[SEP]``.
        label_dropout: Probability that a sequence stands without its labels.
        seed: Seed of that.
    """

    tokens: TokenArray
    names: list[str]
    labels: list[tuple[int, ...]]
    max_length: int
    label_dropout: float = 0.0
    seed: int = 0

    @property
    def lengths(self) -> Ints:
        """Length of every item, special tokens included."""
        extra = np.array([2 + len(labels) for labels in self.labels], dtype=np.int64)
        return np.minimum(self.tokens.lengths + extra, self.max_length)

    def fetch(self, indices: Ints, epoch: int) -> Batch:
        """Make ``ids`` (B, L), ``mask`` (B, L), ``counted`` bool (B, L): what is asked for, ``index`` and ``epoch``."""
        tokenizer = self.tokens.tokenizer
        rows, fronts = [], []
        without = item_uniform(self.seed, epoch, indices, _LABELS) < self.label_dropout
        for i, bare in zip(indices.tolist(), without.tolist(), strict=True):
            labels = [] if bare else [tokenizer.vocab_size + label for label in self.labels[i]]
            start = self.tokens.starts[i]
            bases = self.tokens.flat[start : start + self.tokens.lengths[i]].astype(np.int64)
            front = np.array([tokenizer.bos_id, *labels])
            rows.append(np.concatenate([front, bases, [tokenizer.sep_id]])[: self.max_length])
            fronts.append(len(front))
        ids = np.full((len(rows), max(map(len, rows))), tokenizer.pad_id, dtype=np.int64)
        for row, filled in zip(rows, ids, strict=True):
            filled[: len(row)] = row
        at = np.arange(ids.shape[1])
        mask = at < np.array([len(row) for row in rows])[:, None]
        batch: Batch = {
            "ids": torch.from_numpy(ids),
            "mask": torch.from_numpy(mask),
            "counted": torch.from_numpy(mask & (at >= np.array(fronts)[:, None])),
            "index": torch.from_numpy(np.asarray(indices, dtype=np.int64)),
            "names": [self.names[i] for i in indices.tolist()],
            "epoch": epoch,
        }
        return batch


class WindowItems:
    """Windows of genomes for a language model; short pieces are packed several to a row.

    Args:
        tokens: The records.
        ranges: Parts of records to read: (record number, begin, end) in tokens, shape (R, 3).
        length: Positions a row holds, ``[BOS]`` included.
        bos: Whether every window begins with ``[BOS]``.
        stride: Distance of windows; None for windows side by side that are shifted at random every epoch.
        strand_probability: Probability that a window is read from the other strand.
        rename_probability: Probability that the four letters of a window are exchanged for each other at random.
        seed: Seed of shifts, strands and letters.

    With a stride below the window, a token counts as a target only in the first window that holds it.
    """

    def __init__(
        self,
        tokens: TokenArray,
        ranges: Ints,
        length: int,
        *,
        bos: bool,
        stride: int | None,
        strand_probability: float = 0.0,
        rename_probability: float = 0.0,
        seed: int = 0,
    ) -> None:
        self.tokens, self.length, self.bos, self.seed = tokens, length, bos, seed
        self.strand_probability, self.rename_probability = strand_probability, rename_probability
        self.shifted = stride is None
        self.extra = int(bos)
        room = length - self.extra
        begins, sizes, fresh, spans = [], [], [], []
        for record, begin, end in ranges.tolist():
            size, at = end - begin, int(tokens.starts[record]) + begin
            if size <= room:
                starts = np.zeros(1, dtype=np.int64)
            elif self.shifted:
                starts = np.arange(-(-size // room))  # cell numbers, until an epoch is known
            else:
                starts = np.append(np.arange(0, size - room, stride), size - room)
            begins.append(np.full(len(starts), at) if self.shifted else at + starts)
            sizes.append(np.full(len(starts), min(size, room)))
            ends = starts + min(size, room)
            fresh.append(np.append(0, ends[:-1] - starts[1:]) if not self.shifted else np.zeros(len(starts), np.int64))
            spans.append(np.full(len(starts), (size - room + 1) / len(starts) if size > room else 0.0))
        if not begins:
            raise DataError("windows: there must be at least one sequence, got none; is the file empty?")
        self.begins, self.sizes = np.concatenate(begins), np.concatenate(sizes)
        self.seen, self.cell = np.concatenate(fresh), np.concatenate(spans)
        self.cell_number = np.concatenate([np.arange(len(b)) for b in begins])
        rows = plan_packing(self.sizes + self.extra, length)
        rows.sort(key=lambda row: row[0])  # full windows in the order of the genome
        self.pieces = np.concatenate([np.array(row) for row in rows])
        self.pieces_in_row = np.array([len(row) for row in rows])
        self.first_piece = np.cumsum(self.pieces_in_row) - self.pieces_in_row
        self.lengths = np.add.reduceat(self.sizes[self.pieces] + self.extra, self.first_piece)

    @property
    def packed(self) -> bool:
        """Whether a row may hold several pieces."""
        return bool((self.pieces_in_row > 1).any())

    def fetch(self, indices: Ints, epoch: int) -> Batch:
        """Make the batch of rows.

        Returns:
            ``ids`` (B, L), ``mask`` (B, L), ``counted`` bool (B, L): positions whose token counts as a target,
            ``segments`` (B, L) where rows are packed, ``index`` (B,), and the number ``epoch``.
        """
        counts = self.pieces_in_row[indices]
        row = np.repeat(np.arange(len(indices)), counts)
        slot = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        piece = self.pieces[np.repeat(self.first_piece[indices], counts) + slot]
        begins, sizes = self.begins[piece], self.sizes[piece]
        if self.shifted:
            shift = (self.cell_number[piece] + item_uniform(self.seed, epoch, piece, _SHIFT)) * self.cell[piece]
            begins = begins + shift.astype(np.int64)
        other = np.zeros(len(piece), dtype=bool)
        if self.strand_probability:
            other = item_uniform(self.seed, epoch, piece, _STRAND) < self.strand_probability
        ids, mask = self.tokens.rows(begins, sizes, other)
        if self.rename_probability:
            ids = self._rename(ids, piece, epoch)
        counted = mask & torch.from_numpy(np.arange(ids.shape[1]) >= self.seen[piece][:, None])
        if self.bos:
            first = torch.ones(len(piece), 1, dtype=torch.bool)
            ids = torch.cat([torch.full_like(ids[:, :1], self.tokens.tokenizer.bos_id), ids], 1)
            mask, counted = torch.cat([first, mask], 1), torch.cat([~first, counted], 1)
        index = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        batch: Batch = {"ids": ids, "mask": mask, "counted": counted, "index": index, "epoch": epoch}
        return self._packed(batch, row, slot, sizes + self.extra) if self.packed else batch

    def _rename(self, ids: Tensor, piece: Ints, epoch: int) -> Tensor:
        """Exchange the letters of some pieces, one a line, by one of their 24 permutations."""
        chosen = item_uniform(self.seed, epoch, piece, _RENAME) < self.rename_probability
        number = (item_uniform(self.seed, epoch, piece, _LETTERS) * len(_ORDERS)).astype(np.int64)
        letters = np.array(self.tokens.tokenizer.base_ids[:4])
        table = np.tile(np.arange(self.tokens.tokenizer.vocab_size), (len(piece), 1))  # (B, V)
        table[:, letters] = np.where(chosen[:, None], letters[_ORDERS[number]], letters)
        return torch.from_numpy(table).gather(1, ids.long()).to(ids.dtype)

    def _packed(self, batch: Batch, row: Ints, slot: Ints, sizes: Ints) -> Batch:
        """Move the pieces (one a line) to their places in the rows."""
        lines = int(row[-1]) + 1
        before = np.cumsum(sizes) - sizes
        offset = before - before[slot == 0][row]
        width = int((offset + sizes).max())
        mask = batch["mask"]
        at = torch.from_numpy(row * width + offset)[:, None] + torch.arange(mask.shape[1])
        out = dict(batch)
        moved = at[mask]
        for name, empty in (("ids", self.tokens.tokenizer.pad_id), ("mask", 0), ("counted", 0)):
            flat = torch.full((lines * width,), empty, dtype=batch[name].dtype)
            flat[moved] = batch[name][mask]
            out[name] = flat.view(lines, width)
        segments = torch.full((lines * width,), -1, dtype=torch.int64)
        segments[moved] = torch.from_numpy(slot)[:, None].expand_as(mask)[mask]
        out["segments"] = segments.view(lines, width)
        return out
