"""Scores of changes by a language model of DNA: how much likelier a stretch of DNA becomes by them, without training.

The score is a log-likelihood ratio in nats, log p(alt window) - log p(ref window): below 0 where the model finds the
change less likely than the reference, as harmful ones tend to be. A causal model reads both windows whole, and the
tokens before the change, which cancel, are left out of the sum. A masked model is asked for the base at the masked
position, so that it scores substitutions of single bases only.

An insertion adds tokens, each of about -1.3 nats, and a deletion takes them away: compare indels of equal length only.

Shapes: B rows, L positions, V vocabulary, N changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vertebra.domains.dna.changes import BASES, Change, plain, saturation_matrix, substitutions
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.targets import IGNORED, next_targets
from vertebra.errors import ConfigError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

Strands = Literal["both", "forward"]
_LOGITS = 1 << 24  # logits held at a time: 64 MiB


# ---------------------------------------------------------------- what a model can do


def is_masked(model: DNALanguageModel) -> bool:
    """Whether a model is asked for masked bases (bidirectional) instead of for next ones.

    Raises:
        ConfigError: It is, and its tokens are k-mers, of which each shows the bases of its neighbours.
    """
    masked = not model.backbone.config.causal
    if masked and not isinstance(model.tokenizer, NucleotideTokenizer):
        raise ConfigError("scoring: a masked model needs single nucleotides, got k-mers; use a causal model.")
    return masked


def _labels(label: str | None) -> list[str]:
    return [] if label is None else [label]


def longest_window(model: DNALanguageModel, label: str | None = None) -> int:
    """Bases of the longest window that the model was trained on."""
    k, stride = int(getattr(model.tokenizer, "k", 1)), int(getattr(model.tokenizer, "stride", 1))
    return (model.spec.max_length - len(model.front_ids(_labels(label))) - 1) * stride + k


# ---------------------------------------------------------------- scores


def token_log_probs(model: DNALanguageModel, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """Log-probability (nats) of every counted token given those before it: (B, L), 0 for the others and the first.

    Args:
        model: A causal model.
        ids: Token ids (B, L), padded on the right, with ``[BOS]`` and label where the model wants them.
        mask: Real positions, bool (B, L).
        counted: Tokens to score, bool (B, L).
    """
    features = model.embed_positions(ids, mask)[:, :-1]  # (B, L - 1, D)
    targets = next_targets(ids, counted & mask)[:, :-1]  # (B, L - 1)
    rows = max(1, _LOGITS // model.tokenizer.vocab_size)  # k-mers have many logits
    losses = [
        F.cross_entropy(model.head(x).float(), y, ignore_index=IGNORED, reduction="none")
        for x, y in zip(features.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
    ]
    return F.pad(-torch.cat(losses).view(targets.shape), (1, 0))


def log_likelihoods(model: DNALanguageModel, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """Log-likelihood (nats) of the counted tokens of each row: (B,) float64; arguments as ``token_log_probs``."""
    return token_log_probs(model, ids, mask, counted).double().sum(1)


@torch.inference_mode()
def likelihood_ratios(
    model: DNALanguageModel,
    changes: Sequence[Change],
    *,
    strands: Strands = "both",
    label: str | None = None,
    batch_tokens: int = 32_768,
) -> NDArray[np.float64]:
    """Score changes: (N,) log-likelihood ratios in nats.

    Tokens of N and other IUPAC codes are read but do not count. Without ``[BOS]`` the first token has no probability.

    Args:
        model: Causal or masked; in evaluation mode.
        changes: The changes; windows that several have in common are read once.
        strands: ``both`` for the mean of both strands, ``forward`` for the given one.
        label: Label that stands before the bases.
        batch_tokens: Most positions in a batch, padding counted.

    Raises:
        ConfigError: Unknown label, or a masked model of k-mers.
        DataError: A window is shorter than a token.
    """
    front, masked = model.front_ids(_labels(label)), is_masked(model)
    both = [*changes, *(change.other_strand() for change in changes)] if strands == "both" else list(changes)
    score = _masked_ratios if masked else _causal_ratios
    ratios = score(model, both, front, batch_tokens)
    return ratios.reshape(-1, len(changes)).mean(0) if changes else ratios


def saturate(
    model: DNALanguageModel,
    sequence: str,
    *,
    window: int | None = None,
    strands: Strands = "both",
    label: str | None = None,
    batch_tokens: int = 32_768,
) -> NDArray[np.float64]:
    """Score every substitution of a sequence: (L, 4) for A, C, G, T; 0 at the reference base, nan where it is none.

    Args:
        model: See ``likelihood_ratios``.
        sequence: The bases.
        window: Bases of a window; None for what the model was trained on.
        strands: See ``likelihood_ratios``.
        label: See ``likelihood_ratios``.
        batch_tokens: See ``likelihood_ratios``.
    """
    sequence, window = plain(sequence), window or longest_window(model, label)
    step = max(1, batch_tokens // min(window, max(len(sequence), 1)))  # bases whose windows are held together
    parts = [np.zeros(0)]
    for at in range(0, len(sequence), step):
        changes = list(substitutions(sequence, at, min(at + step, len(sequence)), window))
        parts.append(likelihood_ratios(model, changes, strands=strands, label=label, batch_tokens=batch_tokens))
    return saturation_matrix(sequence, np.concatenate(parts))


def _causal_ratios(
    model: DNALanguageModel, changes: Sequence[Change], front: list[int], batch_tokens: int
) -> NDArray[np.float64]:
    number: dict[str, int] = {}  # of each distinct window
    pairs = [[number.setdefault(w, len(number)) for w in (c.ref_window, c.alt_window)] for c in changes]
    rows = [model.tokenizer.encode(text) for text in number]
    scores: list[NDArray[np.float64]] = [np.zeros(0)] * len(rows)
    bases = torch.tensor(model.tokenizer.base_ids)
    for batch, ids, mask in _batches(model, rows, front, batch_tokens):
        counted = torch.isin(ids, bases.to(ids.device))
        values = token_log_probs(model, ids, mask, counted)[:, len(front) :].double().cpu().numpy()
        for i, value in zip(batch, values, strict=True):
            scores[i] = value[: len(rows[i])].copy()  # not a view that keeps the batch
    ratios = np.zeros(len(changes))
    for i, (ref, alt) in enumerate(pairs):
        start = _first_difference(rows[ref], rows[alt])
        ratios[i] = scores[alt][start:].sum() - scores[ref][start:].sum()
    return ratios


def _masked_ratios(
    model: DNALanguageModel, changes: Sequence[Change], front: list[int], batch_tokens: int
) -> NDArray[np.float64]:
    number: dict[tuple[str, str], int] = {}  # of each distinct pair of flanks
    places = [number.setdefault((c.left, c.right), len(number)) for c in changes]
    at = np.array([len(left) for left, _ in number], dtype=np.int64)
    rows = [model.tokenizer.encode(f"{left}N{right}") for left, right in number]
    for row, place in zip(rows, at, strict=True):
        row[place] = model.tokenizer.mask_id
    scores = np.zeros((len(rows), 4))
    for batch, ids, mask in _batches(model, rows, front, batch_tokens):
        place = torch.from_numpy(at[batch] + len(front)).to(ids.device)
        features = model.embed_positions(ids, mask)[torch.arange(len(batch), device=ids.device), place]  # (B, D)
        scores[batch] = model.head(features).double()[:, list(model.tokenizer.base_ids)].cpu().numpy()
    ref, alt = ([BASES.index(getattr(c, allele)) for c in changes] for allele in ("ref", "alt"))
    return np.asarray(scores[places, alt] - scores[places, ref], dtype=np.float64)  # the normaliser cancels


def _batches(
    model: DNALanguageModel, rows: list[NDArray[np.int64]], front: list[int], batch_tokens: int
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield batches of rows of like length: their numbers, ids (B, L) and the mask of real positions (B, L)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    device = next(model.parameters()).device
    while order:
        size = len(front) + len(rows[order[0]])
        count = max(1, batch_tokens // size)
        batch, order = order[:count], order[count:]
        ids = np.full((len(batch), size), model.tokenizer.pad_id, dtype=np.int64)
        for i, line in zip(batch, ids, strict=True):
            line[: len(front)] = front
            line[len(front) : len(front) + len(rows[i])] = rows[i]
        lengths = np.array([len(front) + len(rows[i]) for i in batch])
        mask = np.arange(size) < lengths[:, None]
        yield batch, torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _first_difference(one: NDArray[np.int64], two: NDArray[np.int64]) -> int:
    size = min(len(one), len(two))
    different = np.flatnonzero(one[:size] != two[:size])
    return int(different[0]) if len(different) else size


# ---------------------------------------------------------------- the slow twin


@torch.inference_mode()
def slow_likelihood_ratio(
    model: DNALanguageModel, change: Change, *, strands: Strands = "both", label: str | None = None
) -> float:
    """Do what ``likelihood_ratios`` does for one change and a causal model, whole windows, one token at a time."""
    front = model.front_ids(_labels(label))

    def total(window: str) -> float:
        ids, score = front + model.tokenizer.encode(window).tolist(), 0.0
        for at in range(max(len(front), 1), len(ids)):
            if ids[at] in model.tokenizer.base_ids:
                logits = model(torch.tensor([ids[:at]], device=next(model.parameters()).device))[0, -1]
                score += float(logits.double().log_softmax(-1)[ids[at]])
        return score

    read = [change, change.other_strand()] if strands == "both" else [change]
    return sum(total(c.alt_window) - total(c.ref_window) for c in read) / len(read)
