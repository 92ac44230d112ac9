"""Where the sound of a word begins and ends.

CTC says when it is sure of a token, which is a few frames within the word. The sound around them tells the rest: a word
reaches as far as it is loud, and not into its neighbours.

Shapes: N samples, F frames of 10 ms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.speech.transcript import Word

Levels = NDArray[np.float32]

FRAME_SECONDS = 0.01
LOUD_SHARE = 0.35
"""A frame is loud from this share of the way from the background to the word's loudest frame, in dB."""
CLOSURE_SECONDS = 0.09
"""Longest silence within a word, as before a plosive."""
REACH_SECONDS = 0.6
"""How far a word may reach beyond its tokens."""
SILENT_DB = -100.0
"""Level of digital silence."""


def levels(wave: NDArray[np.float32], sample_rate: int) -> Levels:
    """Return the level of a wave (N,) in dB below full scale, (F,), of frames that begin every 10 ms."""
    hop = round(FRAME_SECONDS * sample_rate)
    whole = np.pad(wave, (0, -len(wave) % hop)).reshape(-1, hop)
    power = np.square(whole, dtype=np.float32).mean(1)
    return np.maximum(10 * np.log10(np.maximum(power, 1e-12)), SILENT_DB).astype(np.float32)


def grow(words: Sequence[Word], loud: Levels, offset: float = 0.0) -> list[Word]:
    """Move the begins and ends of words outwards, to where their sound does.

    Args:
        words: In order, with the times of their tokens.
        loud: Levels (F,) of the sound, of ``levels``.
        offset: Second at which the first frame begins.
    """
    if not words or not len(loud):
        return list(words)
    smooth = np.convolve(np.pad(loud, 1, mode="edge"), np.full(3, 1 / 3), "valid")
    floor = float(np.percentile(smooth, 10))
    last = len(smooth) - 1
    first = [min(max(round((w.start - offset) / FRAME_SECONDS), 0), last) for w in words]
    stop = [
        min(max(round((w.end - offset) / FRAME_SECONDS), f + 1), last + 1) for w, f in zip(words, first, strict=True)
    ]
    peaks = [float(smooth[max(a - 5, 0) : b + 5].max()) for a, b in zip(first, stop, strict=True)]
    bars = [floor + LOUD_SHARE * (peak - floor) for peak in peaks]
    borders = [0]
    for i in range(len(words) - 1):
        borders.append(_border(smooth, stop[i], max(first[i + 1], stop[i]), min(bars[i], bars[i + 1])))
    borders.append(last + 1)
    grown = []
    for i, word in enumerate(words):
        reach = round(REACH_SECONDS / FRAME_SECONDS)
        low, high = max(borders[i], first[i] - reach), min(borders[i + 1], stop[i] + reach)
        begin = first[i] - _run(smooth[low : first[i]][::-1] >= bars[i])
        end = stop[i] + _run(smooth[stop[i] : high] >= bars[i])
        start, finish = (offset + frame * FRAME_SECONDS for frame in (begin, end))
        grown.append(dataclasses.replace(word, start=min(start, word.start), end=max(finish, word.end)))
    return grown


def _border(smooth: Levels, begin: int, end: int, bar: float) -> int:
    """Frame between two words: the middle of the longest silence there, or the softest frame."""
    if end <= begin:
        return begin
    between = smooth[begin:end]
    silent = np.concatenate([[False], between < bar, [False]])
    edges = np.flatnonzero(silent[1:] != silent[:-1]).reshape(-1, 2)  # of each silence
    if not len(edges):
        return begin + int(between.argmin())
    longest = edges[int((edges[:, 1] - edges[:, 0]).argmax())]
    return begin + int(longest.sum()) // 2


def _run(loud: NDArray[np.bool_]) -> int:
    """Frames up to the last loud one that no silence longer than a closure parts from the first."""
    at = np.flatnonzero(loud)
    most = round(CLOSURE_SECONDS / FRAME_SECONDS)
    gaps = np.diff(at, prepend=-1) - 1
    far = np.flatnonzero(gaps > most)
    kept = at[: far[0]] if len(far) else at
    return int(kept[-1]) + 1 if len(kept) else 0
