"""From log-probabilities, piece by piece, to text with times.

A recording of any length is decoded in stretches that end in a pause, so that memory and time grow with the longest
stretch, not with the recording.

Shapes: T positions, V tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vertebra.domains.speech.alignment import forced_align, word_times
from vertebra.domains.speech.decoding import Hypothesis
from vertebra.domains.speech.loudness import SILENT_DB, Levels, grow
from vertebra.domains.speech.model import SpeechCTC
from vertebra.domains.speech.transcript import Word
from vertebra.tokenizers.text import TextTokenizer

Decode = Callable[[Tensor], Hypothesis]
"""Takes log-probabilities (T, V), gives the best hypothesis."""

PAUSE_SECONDS = 0.6
"""Silence at which a stretch may end."""
STRETCH_SECONDS = (10.0, 60.0)
"""A stretch ends at the first pause after the first of these, and at the most silent position before the second."""
SILENT = 0.95
"""Probability of the blank from which a position counts as silent."""


class RecordingDecoder:
    """Collects the log-probabilities of one recording and decodes what is complete.

    Args:
        model: Whose log-probabilities come.
        tokenizer: Of its spec.
        decode: How.
    """

    def __init__(self, model: SpeechCTC, tokenizer: TextTokenizer, decode: Decode) -> None:
        self.tokenizer, self.decode = tokenizer, decode
        self.step, self.frames = model.seconds_per_position, model.subsample.factor
        self.offset = position_offset(model)
        self.pause = max(round(PAUSE_SECONDS / self.step), 2)
        self.shortest, self.longest = (round(seconds / self.step) for seconds in STRETCH_SECONDS)
        prefix = model.prefix_length
        self._held: list[Tensor] = []
        self._levels = [np.full(prefix * self.frames, SILENT_DB, np.float32)]
        self._count = 0  # positions held
        self._begin = -prefix  # the first of them, counted from the recording's own first one
        self.words: list[Word] = []
        self.ids: list[int] = []

    def add(self, log_probs: Tensor, levels: Levels) -> None:
        """Take the next positions (T, V), the first ones with those of the prefix, and the levels (F,) of their sound.

        A position has ``subsampling`` frames of levels, those of the prefix none; the last call may bring more.
        """
        self._held.append(log_probs)
        self._levels.append(levels)
        self._count += len(log_probs)
        while self._count >= self.shortest:
            whole = torch.cat(self._held)
            cut = self._pause_in(whole)
            if not cut:
                self._held = [whole]
                return
            loud = np.concatenate(self._levels)
            self._decode(whole[:cut], loud[: cut * self.frames])
            self._held, self._count = [whole[cut:]], len(whole) - cut
            self._levels = [loud[cut * self.frames :]]

    def finish(self) -> list[Word]:
        """Decode the rest; return all words."""
        if self._count:
            self._decode(torch.cat(self._held), np.concatenate(self._levels))
            self._held, self._levels, self._count = [], [], 0
        return self.words

    def _pause_in(self, log_probs: Tensor) -> int:
        """Position in the middle of a pause; 0 where there is none yet."""
        silent = (log_probs[:, 0] > torch.tensor(SILENT).log()).int()
        runs = silent.unfold(0, self.pause, 1).sum(1) == self.pause  # (T - pause + 1,)
        first = self.shortest - self.pause
        found = runs[first:].nonzero()
        if len(found):
            return first + int(found[0]) + self.pause // 2
        if len(log_probs) >= self.longest:
            return self.shortest + int(log_probs[self.shortest : self.longest, 0].argmax())
        return 0

    def _decode(self, log_probs: Tensor, loud: Levels) -> None:
        found = self.decode(log_probs)
        begin, self._begin = self._begin * self.step, self._begin + len(log_probs)
        self.ids += found.ids
        words = timed_words(log_probs, list(found.ids), self.tokenizer, self.step, self.offset + begin)
        self.words += grow(words, loud, begin)


def timed_words(
    log_probs: Tensor, ids: list[int], tokenizer: TextTokenizer, seconds_per_position: float, offset: float
) -> list[Word]:
    """Align tokens to log-probabilities (T, V) and return the words with their times, none before 0.

    Args:
        log_probs: Of one recording, or a stretch of it.
        ids: Tokens that are said in it.
        tokenizer: Whose tokens they are.
        seconds_per_position: Seconds between two positions.
        offset: Second at which the first position begins.
    """
    if not ids:
        return []
    spans = forced_align(log_probs, ids)
    words, texts = tokenizer.words(ids), tokenizer.decode(ids).split()
    found = word_times(spans, words, texts, seconds_per_frame=seconds_per_position, offset=offset)
    return [dataclasses.replace(w, start=max(w.start, 0.0), end=max(w.end, 0.0)) for w in found]


def position_offset(model: SpeechCTC) -> float:
    """Second at which the first position's share of the recording begins.

    A position reads several frames; its share is a step wide and lies in their middle.
    """
    hop = model.logmel.hop / model.spec.sample_rate
    return (model.subsample.look_ahead * hop - model.seconds_per_position) / 2
