"""Sequences from a language model of DNA: prompts, labels, and a grammar that keeps to A, C, G and T.

Shapes: B items, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vertebra.backbones.decoding import Allowed, Decoder
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.errors import ConfigError
from vertebra.tokenizers.nucleotide import KmerTokenizer


def decoder_of(model: DNALanguageModel) -> Decoder:
    """Return what generates with a causal model.

    Raises:
        ConfigError: The model is not causal.
    """
    if not model.backbone.config.causal:
        raise ConfigError(
            "generation: needs a causal language model, and this one fills masks; train one with backbone,causal=true."
        )
    return Decoder(model.backbone, model.embed, model.head, model.embed.weight.device)


def prompt_ids(model: DNALanguageModel, labels: Sequence[str] = (), bases: str = "") -> Tensor:
    """Return the ids (T,) that stand before what is generated: ``[BOS]``, labels, bases.

    Raises:
        ConfigError: The model was trained without ``[BOS]`` and nothing else is given, or a label is unknown.
        DataError: Fewer bases than a token has.
    """
    ids = torch.tensor(
        [*model.front_ids(labels), *(model.tokenizer.encode(bases).tolist() if bases else [])], dtype=torch.long
    )
    if not len(ids):
        raise ConfigError(
            "prompt: this model was trained without [BOS], so it needs bases to begin with; give a prompt."
        )
    return ids


def tokens_for(model: DNALanguageModel, bases: int) -> int:
    """Return how many tokens ``bases`` more bases are, at least one."""
    tokenizer = model.tokenizer
    if not isinstance(tokenizer, KmerTokenizer):
        return max(1, bases)
    return max(1, -(-(bases - tokenizer.k + tokenizer.stride) // tokenizer.stride))


def grammar(model: DNALanguageModel, prompts: Sequence[Tensor], min_tokens: int, max_tokens: int) -> Allowed:
    """Allow bases up to ``max_tokens``, and from ``min_tokens`` on the end where the model has learned it.

    Overlapping k-mers must agree in the bases they share.

    Args:
        model: What generates.
        prompts: Ids (T_i,) of each item.
        min_tokens: Fewest tokens of an item, the end not counted.
        max_tokens: Most of them.
    """
    tokenizer = model.tokenizer
    device = model.embed.weight.device
    may = torch.zeros(tokenizer.vocab_size, dtype=torch.bool, device=device)
    may[list(tokenizer.base_ids)] = True
    first = tokenizer.base_ids[0]
    chained = isinstance(tokenizer, KmerTokenizer) and tokenizer.stride == 1 and tokenizer.k > 1
    last = torch.tensor([int(p[-1]) for p in prompts], device=device)

    def allowed(tokens: Tensor, items: Tensor) -> Tensor:
        now = may.expand(len(tokens), -1).clone()  # (B, V)
        if chained:
            assert isinstance(tokenizer, KmerTokenizer)
            before = tokens[:, -1] if tokens.shape[1] else last[items]
            shared = (before - first) % 4 ** (tokenizer.k - 1)  # the bases that both k-mers hold
            fits = (torch.arange(len(may), device=device) - first)[None] // 4 == shared[:, None]
            now &= fits | (before < first)[:, None]
        if model.spec.eos and tokens.shape[1] >= max_tokens:
            now.fill_(False)
        if model.spec.eos and tokens.shape[1] >= min_tokens:
            now[:, tokenizer.sep_id] = True
        return now

    return allowed


def bases_of(model: DNALanguageModel, prompt: Tensor, ids: Tensor) -> str:
    """Return the letters of prompt and continuation; labels and special tokens have none."""
    known = torch.cat([prompt.cpu(), ids.cpu()])
    return model.tokenizer.decode(known[known < model.tokenizer.vocab_size].numpy())
