"""Beam search over the words of a lexicon, with KenLM: torchaudio's ``ctc_decoder``, which needs ``flashlight-text``.

It is fast, and it finds no word that the lexicon lacks. For open vocabularies and hot words see ``decoding``.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vertebra.domains.speech.alignment import IMPOSSIBLE
from vertebra.domains.speech.decoding import Hypothesis, check, check_lengths, check_values, peaks
from vertebra.domains.speech.language_model import LN10
from vertebra.errors import ConfigError, DataError, MissingExtraError

Lexicon = Mapping[str, Iterable[Sequence[int]]]


def read_lexicon(path: str | Path, tokens: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
    """Read a lexicon with a line ``WORD TOKEN TOKEN ...`` for each spelling.

    Args:
        path: The file, UTF-8.
        tokens: All tokens in the order of their ids.

    Raises:
        DataError: A line has no spelling, or a token is unknown.
    """
    ids = {token: number for number, token in enumerate(tokens)}
    lexicon: dict[str, list[tuple[int, ...]]] = {}
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            word, *spelling = line.split() or [""]
            unknown = [token for token in spelling if token not in ids]
            if unknown:
                raise DataError(f"{Path(path).name}, line {number}: {unknown[0]!r} is none of the {len(ids)} tokens.")
            if word and not spelling:
                raise DataError(
                    f"{Path(path).name}, line {number}: {word!r} has no spelling; write its tokens after it."
                )
            if word:
                lexicon.setdefault(word, []).append(tuple(ids[token] for token in spelling))
    return lexicon


class LexiconDecoder:
    """A beam search that is made once and called for many batches; see ``lexicon_decoder``."""

    def __init__(self, decoder: Any, size: int, blank: int, space: int | None) -> None:
        self.decoder, self.size, self.blank, self.space = decoder, size, blank, space

    def __call__(self, log_probs: torch.Tensor, lengths: torch.Tensor) -> list[list[Hypothesis]]:
        """Decode a batch.

        Args:
            log_probs: Log-probabilities (B, T, V).
            lengths: Frames of each recording (B,).

        Returns:
            The hypotheses of each recording, best first; none where no text of the lexicon fits.
        """
        check(log_probs, 3, self.blank, "lexicon_decoder")
        check_lengths(lengths, log_probs.shape[0], log_probs.shape[1], "lexicon_decoder")
        if log_probs.shape[2] != self.size:
            raise ConfigError(f"lexicon_decoder: made for {self.size} tokens, got {log_probs.shape[2]}.")
        values = log_probs.detach().to("cpu", torch.float32).clamp(min=IMPOSSIBLE)
        return [self.decode(row[:length]) for row, length in zip(values, lengths.tolist(), strict=True)]

    def decode(self, log_probs: torch.Tensor) -> list[Hypothesis]:
        """Decode one recording (T, V)."""
        check_values(log_probs, "lexicon_decoder")
        length = len(log_probs)
        # One more frame, which gives the last word its space for nothing; one more token, which never sounds.
        frames = log_probs.new_full((length + 1, self.size + 1), IMPOSSIBLE)
        frames[:length, : self.size] = log_probs
        frames[length, self.blank if self.space is None else self.space] = 0
        found: dict[tuple[int, ...], Hypothesis] = {}
        for result in self.decoder(frames[None])[0]:
            # Time 0 and the last one are the decoder's own, before and after all frames.
            pairs = zip(result.tokens.tolist(), result.timesteps.tolist(), strict=True)
            ids = tuple(token for token, time in pairs if 1 <= time <= length)
            score = ctc_score(log_probs, ids, self.blank)
            if ids not in found and score > IMPOSSIBLE:
                found[ids] = Hypothesis(ids, score, result.score, *peaks(log_probs, ids, self.blank))
        return list(found.values())


def lexicon_decoder(
    size: int,
    lexicon: Lexicon | None,
    *,
    model: str | Path | None = None,
    beam: int = 50,
    top_k: int | None = None,
    threshold: float = 50.0,
    nbest: int = 1,
    alpha: float = 0.5,
    beta: float = 1.5,
    unknown: float = -math.inf,
    blank: int = 0,
    space: int | None = None,
    log_add: bool = True,
) -> LexiconDecoder:
    """Make a beam search over the words of a lexicon.

    Args:
        size: Tokens of the model, V.
        lexicon: The spellings of each word as token ids, without ``space``; None for any token after any other.
        model: A language model of words for KenLM, ARPA or binary; needs a lexicon.
        beam: Hypotheses kept after each frame.
        top_k: Tokens tried at each frame; None for all.
        threshold: Hypotheses that are worse than the best by more than this are dropped.
        nbest: Hypotheses to return; there may be fewer.
        alpha: Weight of ln P of the language model.
        beta: Bonus a word.
        unknown: Added for a word that the language model lacks; -inf for none.
        blank: Id of the blank.
        space: The token between words, for vocabularies of characters.
        log_add: Add up the paths of a hypothesis, as ``prefix_beam_search`` does; else its best path counts.

    Returns:
        A decoder of batches. ``total`` of its hypotheses holds the language model and ``beta``; ``score`` does not.

    Raises:
        ConfigError: ``flashlight-text`` is not installed, or the settings contradict each other.
        DataError: A spelling or the language model cannot be used.
    """
    try:
        from torchaudio.models.decoder import ctc_decoder
    except (ImportError, RuntimeError) as error:
        raise MissingExtraError("flashlight-text", "speech", "a beam search with a lexicon") from error
    if model is not None and lexicon is None:
        raise ConfigError("lexicon_decoder: a language model of words needs a lexicon; give one.")
    if model is not None and not Path(model).is_file():
        raise DataError(f"lexicon_decoder: no language model at {model}.")
    if min(beam, nbest) < 1 or (top_k is not None and top_k < 1):
        raise ConfigError(f"lexicon_decoder: beam, nbest and top_k must be at least 1, got {beam}, {nbest}, {top_k}.")
    silence = size if space is None else space
    options = {
        "tokens": [str(number) for number in range(size + 1)],
        "lm": None if model is None else str(model),
        "nbest": nbest,
        "beam_size": beam,
        "beam_size_token": size + 1 if top_k is None else min(top_k + 1, size + 1),
        "beam_threshold": threshold,
        "lm_weight": alpha * LN10,  # KenLM's scores are log10
        "word_score": beta if lexicon is not None else 0.0,
        "unk_score": unknown,
        "log_add": log_add,
        "blank_token": str(blank),
        "sil_token": str(silence),
    }
    if lexicon is None:
        return LexiconDecoder(ctc_decoder(lexicon=None, **options), size, blank, space)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lexicon.txt"
        path.write_text(lexicon_text(lexicon, size, blank, space), encoding="utf-8")
        try:
            decoder = ctc_decoder(lexicon=str(path), **options)
        except RuntimeError as error:
            raise DataError(f"lexicon_decoder: the decoder could not be made: {error}") from error
    return LexiconDecoder(decoder, size, blank, space)


def lexicon_text(lexicon: Lexicon, size: int, blank: int, space: int | None) -> str:
    """Return the lines of a lexicon whose tokens are named by their ids."""
    lines = []
    for word, spellings in lexicon.items():
        if not word or word.split() != [word]:
            raise DataError(f"lexicon_decoder: a word must have no space in it and not be empty, got {word!r}.")
        for ids in spellings:
            if not ids or not all(0 <= token < size and token not in (blank, space) for token in ids):
                raise DataError(
                    f"lexicon_decoder: {word!r} must be spelt with tokens of 0..{size - 1} without blank and space, "
                    f"got {list(ids)}."
                )
            lines.append(" ".join([word, *map(str, ids if space is None else [*ids, space])]))
    if not lines:
        raise DataError("lexicon_decoder: the lexicon is empty; give at least one word.")
    return "\n".join(lines) + "\n"


def ctc_score(log_probs: torch.Tensor, ids: tuple[int, ...], blank: int) -> float:
    """Return ln P of a text, summed over its paths; log_probs is (T, V)."""
    length = len(log_probs)
    if not length:
        return 0.0 if not ids else -math.inf
    lengths = torch.tensor([length]), torch.tensor([len(ids)])
    targets = torch.tensor([ids], dtype=torch.long)
    return -torch.nn.functional.ctc_loss(log_probs[:, None], targets, *lengths, blank=blank, reduction="sum").item()
