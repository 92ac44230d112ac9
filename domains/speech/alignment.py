"""Where tokens and words lie in time: forced alignment of a transcript, and times from the peaks of a hypothesis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torchaudio.functional as F
from numpy.typing import NDArray

from vertebra.domains.speech.transcript import Word
from vertebra.errors import ConfigError, DataError, ShapeError

STAR = -1  # stands for any stretch of speech
IMPOSSIBLE = -1e4  # sums of it stay finite


@dataclass(frozen=True)
class TokenSpan:
    """The frames of one token.

    Args:
        id: The token, or ``STAR``.
        start: First frame.
        end: Frame after the last.
        confidence: Mean probability of the token over its frames; 1 for ``STAR``.
    """

    id: int
    start: int
    end: int
    confidence: float


class Peaks(Protocol):
    """What ``peak_times`` reads of a hypothesis."""

    @property
    def frames(self) -> tuple[int, ...]:
        """Frame of each token."""

    @property
    def confidence(self) -> tuple[float, ...]:
        """Probability of each token."""


def frames_needed(ids: Sequence[int]) -> int:
    """Frames that CTC needs for ``ids``: one a token, and a blank between equal neighbours."""
    return len(ids) + sum(a == b for a, b in itertools.pairwise(ids))


def feasible(length: int, ids: Sequence[int]) -> bool:
    """Whether ``length`` frames are enough for ``ids``."""
    return length >= frames_needed(ids)


def forced_align(
    log_probs: torch.Tensor, ids: Sequence[int], blank: int = 0, *, band: int | None = None
) -> list[TokenSpan]:
    """Find the most probable CTC path that spells ``ids``.

    The exact search takes time and memory T x (2 L + 1), a byte each: 1 MB for T = 750 and L = 500, 7 GB for an hour of
    characters (T = 90,000, L = 40,000). Cut long recordings at pauses, or give ``band``: T x ``band`` bytes.

    Args:
        log_probs: Log-probabilities (T, V) of one recording.
        ids: The transcript (L,), without blanks. ``STAR`` stands for speech that is not transcribed: it fits any frame
            with probability 1, so it takes what the tokens beside it can spare.
        blank: Id of the blank.
        band: States (tokens and the blanks around them) that are followed at a time, around the best one; None for
            all; 4096 suits an hour. Exact as long as the true path stays within, which a transcript that lacks or
            adds long parts does not ensure.

    Returns:
        A span for each id, in their order.

    Raises:
        DataError: There are fewer frames than ``ids`` needs, or an id is outside of the vocabulary.
    """
    if log_probs.ndim != 2:
        raise ShapeError(f"forced_align: log_probs must be (T, V), got {tuple(log_probs.shape)}.")
    length, size = log_probs.shape
    for token in ids:
        if token == blank or not (0 <= token < size or token == STAR):
            raise DataError(
                f"forced_align: ids must lie in 0..{size - 1}, without the blank {blank}, or be STAR ({STAR}); "
                f"found {token}."
            )
    if not feasible(length, ids):
        raise DataError(
            f"forced_align: {len(ids)} tokens need {frames_needed(ids)} frames and there are {length}; "
            "shorten the text or take a longer part of the recording."
        )
    if band is not None and band < 4:
        raise ConfigError(f"forced_align: band must be at least 4 states, got {band}.")
    if not ids:
        return []
    values = log_probs.detach().to("cpu", torch.float32).clamp(min=IMPOSSIBLE)
    if STAR in ids:
        values = torch.cat([values, values.new_zeros(length, 1)], dim=1)
    targets = [size if token == STAR else token for token in ids]
    if band is None or band >= 2 * len(ids) + 1:
        path = F.forced_align(values[None], torch.tensor([targets], dtype=torch.int32), blank=blank)[0][0].numpy()
    else:
        path = banded_path(values.numpy(), targets, blank, band)
    probs = np.exp(values.numpy()[np.arange(length), path].astype(np.float64))
    starts = np.flatnonzero(np.diff(path, prepend=-1))
    ends = np.append(starts[1:], length)
    means = np.add.reduceat(probs, starts) / (ends - starts)
    voiced = path[starts] != blank
    rows = zip(starts[voiced].tolist(), ends[voiced].tolist(), means[voiced].tolist(), strict=True)
    return [TokenSpan(token, *row) for token, row in zip(ids, rows, strict=True)]


def banded_path(log_probs: NDArray[np.float32], ids: Sequence[int], blank: int, band: int) -> NDArray[np.int64]:
    """Viterbi over a window of ``band`` states that moves along with the best one; the label of each frame (T,)."""
    length, count = len(log_probs), 2 * len(ids) + 1
    labels = np.full(count, blank)
    labels[1::2] = ids
    jumps = np.zeros(count, dtype=bool)  # whether a state can be reached from two before it, over the blank
    jumps[3::2] = labels[3::2] != labels[1:-2:2]
    low, lows = 0, np.zeros(length, dtype=np.int64)
    back = np.zeros((length, band), dtype=np.int8)
    # Two places before the window, and room for it to move on by.
    padded = np.full(2 * band + 2, -np.inf)
    padded[2:4] = log_probs[0, labels[:2]]
    for t in range(1, length):
        best = low + int(padded[2 : band + 2].argmax())
        last = count - band
        # At most two states a frame: the window must not stay so far behind that the end is out of reach.
        move = max(min(best - band // 2, last), last - 2 * (length - 1 - t), low) - low
        move = min(move, band)
        stay, step, jump = (padded[2 + move - k : 2 + move - k + band].copy() for k in range(3))
        low += move
        lows[t] = low
        jump[~jumps[low : low + band]] = -np.inf
        choice = back[t]
        choice[step > stay] = 1
        np.maximum(stay, step, out=stay)
        choice[jump > stay] = 2
        np.maximum(stay, jump, out=stay)
        padded[2 : band + 2] = stay + log_probs[t, labels[low : low + band]]
    tail = padded[band : band + 2]  # the last token, and the blank after it
    state = count - 2 + int(tail.argmax())
    if low != count - band or not np.isfinite(tail.max()):
        raise DataError(
            f"forced_align: no path through a band of {band} states ends with the transcript; give a wider band."
        )
    path = np.empty(length, dtype=np.int64)
    for t in range(length - 1, -1, -1):
        path[t] = labels[state]
        state -= int(back[t, state - lows[t]])
    return path


def word_times(
    spans: Sequence[TokenSpan],
    words: Sequence[tuple[int, int]],
    texts: Sequence[str],
    *,
    seconds_per_frame: float,
    offset: float = 0.0,
) -> list[Word]:
    """Turn the spans of tokens into times of words.

    Args:
        spans: Of all tokens, from ``forced_align``.
        words: First token of each word, and the one after its last, as indices into ``spans``.
        texts: The words.
        seconds_per_frame: Duration of the recording over its number of frames; better than the nominal stride.
        offset: Second at which the first frame begins.
    """
    check_words(words, texts, len(spans), "word_times")
    times = []
    for (first, stop), text in zip(words, texts, strict=True):
        part = spans[first:stop]
        frames = sum(s.end - s.start for s in part)
        mean = sum(s.confidence * (s.end - s.start) for s in part) / frames
        start, end = (offset + frame * seconds_per_frame for frame in (part[0].start, part[-1].end))
        times.append(Word(text, start, end, mean))
    return times


def peak_times(
    hypothesis: Peaks,
    words: Sequence[tuple[int, int]],
    texts: Sequence[str],
    *,
    seconds_per_frame: float,
    offset: float = 0.0,
    duration: float | None = None,
    reach: float = 0.5,
) -> list[Word]:
    """Guess the times of words from the frames at which their tokens fire.

    A token reaches half way to its neighbours, and no farther than ``reach``. CTC fires late or early as it learned to:
    where a transcript is known, ``forced_align`` is no worse and often better.

    Args:
        hypothesis: From ``decoding``: the frame and the probability of each token.
        words: First token of each word, and the one after its last, as indices into the tokens.
        texts: The words.
        seconds_per_frame: Duration of the recording over its number of frames.
        offset: Second at which the first frame begins.
        duration: Seconds from ``offset`` that no word may pass; None for no limit.
        reach: Seconds.
    """
    check_words(words, texts, len(hypothesis.frames), "peak_times")
    peaks = [(frame + 0.5) * seconds_per_frame for frame in hypothesis.frames]
    middles = [(a + b) / 2 for a, b in itertools.pairwise(peaks)]
    starts = [max(p - reach, m) for p, m in zip(peaks, [0.0, *middles], strict=False)]
    limit = float("inf") if duration is None else duration
    ends = [min(p + reach, m) for p, m in zip(peaks, [*middles, limit], strict=False)]
    times = []
    for (first, stop), text in zip(words, texts, strict=True):
        mean = sum(hypothesis.confidence[first:stop]) / (stop - first)
        times.append(Word(text, offset + starts[first], offset + ends[stop - 1], mean))
    return times


def check_words(words: Sequence[tuple[int, int]], texts: Sequence[str], count: int, who: str) -> None:
    """Raise a ``DataError`` unless every word has a text and tokens that exist."""
    if len(words) != len(texts):
        raise DataError(f"{who}: every word needs its text; got {len(words)} words and {len(texts)} texts.")
    for number, (first, stop) in enumerate(words):
        if not 0 <= first < stop <= count:
            raise DataError(f"{who}: word {number} has tokens {first}..{stop} of {count}; it needs at least one.")
