"""Published language models of single nucleotides, as models of ours.

HybriDNA (https://arxiv.org/abs/2502.10807) and any other family of language models that ``vertebra.backbones`` reads,
where the files of a tokenizer beside the weights tell a vocabulary of nucleotides. Rows of embedding and head are put
in the order of our tokens; without such files the rows have no names, and the checkpoint is one of the domain
``language``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.published.base import told_config
from vertebra.backbones.published.hybrid import BAMBA, HYBRIDNA, JAMBA, MAMBA
from vertebra.backbones.published.llama import LLAMA
from vertebra.domains.conversion import Conversion, Converter, loaded
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.vocabulary import nucleotide_ids
from vertebra.errors import LoadError
from vertebra.tokenizers.nucleotide import SPECIAL_TOKENS, NucleotideTokenizer

FAMILIES = (HYBRIDNA, BAMBA, JAMBA, MAMBA, LLAMA)
TOKENS = (*SPECIAL_TOKENS, "A", "C", "G", "T", "N")
"""Our tokens, in the order of their ids."""

_OTHER_NAMES = {
    "[CLS]": ("<cls>",),
    "[SEP]": ("[EOS]", "<sep>", "<eos>", "</s>", "<|endoftext|>"),
    "[BOS]": ("<bos>", "<s>"),
    "[MASK]": ("<mask>",),
    "[PAD]": ("<pad>",),
    "[UNK]": ("<unk>",),
}
_STAND_INS = {
    "N": ("[UNK]",),
    "[PAD]": ("[RESERVED]", "[UNK]", "[CLS]", "[MASK]"),
    **dict.fromkeys(
        ("[CLS]", "[SEP]", "[BOS]", "[MASK]", "[RESERVED]", "[UNK]"), ("[PAD]", "[UNK]", "[CLS]", "[MASK]")
    ),
}
"""For a token that a vocabulary lacks, those whose row it gets: none of them follows a base in training."""
_LENGTH = 131_072
"""Tokens that HybriDNA was made for, where a config says nothing."""


class NucleotideConverter(Converter):
    """Language models of single nucleotides, of all families of language models."""

    name: ClassVar[str] = "nucleotides"
    summary: ClassVar[str] = "HybriDNA, LLaMA, Mamba and hybrids with a tokenizer of single nucleotides beside them"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Go by the family, and by the vocabulary of the tokenizer beside the weights."""
        return any(family.recognises(checkpoint) for family in FAMILIES) and bool(nucleotide_ids(checkpoint))

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make a ``DNALanguageModel``."""
        vocabulary = nucleotide_ids(checkpoint)
        if not vocabulary:
            raise LoadError(
                f"{checkpoint.source}: no tokenizer.json, vocab.json or vocab.txt beside the weights tells which row "
                "is which nucleotide; put one there, or convert it as a language model (--family hybridna or another)."
            )
        family = next((family for family in FAMILIES if family.recognises(checkpoint)), None)
        if family is None:
            raise LoadError(f"{checkpoint.source}: of no known family ({', '.join(f.name for f in FAMILIES)}).")
        found = family.read(checkpoint)
        if found.head == "none":
            raise LoadError(
                f"{checkpoint.source}: the checkpoint has no head, so it is no language model; convert it with "
                f"--family {family.name}."
            )
        tensors = dict(found.tensors)
        rows, stood_in, left = _rows(vocabulary, len(tensors["embed.weight"]), checkpoint.source)
        for name in ("embed.weight", "head.weight"):
            if name in tensors:
                tensors[name] = _taken(tensors[name], rows, name, checkpoint.source)
        if found.head == "tied":
            tensors["head.weight"] = tensors["embed.weight"]
        spec = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=_length(checkpoint))
        model = DNALanguageModel(found.config.build(), spec, tie=found.head == "tied")
        notes = dict(found.notes)
        if stood_in:
            notes["tokens"] = "Tokens that the original lacks have the rows of others: " + ", ".join(
                f"{ours} those of {theirs}" for ours, theirs in stood_in.items()
            )
            notes["tokens"] += "."
        return loaded(model, tensors, checkpoint, left_out={**found.left_out, **left}, notes=notes)


def _rows(vocabulary: Mapping[str, int], size: int, source: str) -> tuple[list[int], dict[str, str], dict[str, str]]:
    """Return the row of each of our tokens, stand-ins among them, and the rows that none of ours has.

    Raises:
        LoadError: A token of ours has neither a row nor a stand-in, or the vocabulary is of another model.
    """
    if (most := max(vocabulary.values())) >= size:
        raise LoadError(
            f"{source}: the tokenizer has the id {most}, but the embedding {size} rows; both must be of one model."
        )
    known: dict[str, int] = {}
    for ours in TOKENS:
        names = (ours, *_OTHER_NAMES.get(ours, ()))
        row = next((vocabulary[name] for name in names if name in vocabulary), None)
        if row is not None:
            known[ours] = row
    stood_in = {
        ours: next((other for other in _STAND_INS.get(ours, ()) if other in known), "")
        for ours in TOKENS
        if ours not in known
    }
    if lacking := [ours for ours, other in stood_in.items() if not other]:
        raise LoadError(
            f"{source}: the vocabulary has no row for {', '.join(lacking)}, and no special token whose row could stand "
            "in; convert it as a language model (--family)."
        )
    rows = [known[ours] if ours in known else known[stood_in[ours]] for ours in TOKENS]
    texts = {row: token for token, row in vocabulary.items()}
    left = {
        f"row {row} of embedding and head ({texts.get(row, 'no token')})": "our tokenizer has no such token"
        for row in range(size)
        if row not in rows
    }
    return rows, stood_in, left


def _taken(table: Tensor, rows: list[int], name: str, source: str) -> Tensor:
    if table.ndim != 2 or len(table) <= max(rows):
        raise LoadError(f"{source}: {name} {tuple(table.shape)} has no rows up to {max(rows)}; is the file whole?")
    return table[torch.tensor(rows)]


def _length(checkpoint: Checkpoint) -> int:
    found = told_config(checkpoint).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else _LENGTH


CONVERTERS: tuple[Converter, ...] = (NucleotideConverter(),)
