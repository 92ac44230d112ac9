"""Spectrograms with the words that were recognised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from vertebra.pipelines import figures

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from vertebra.domains.speech.transcript import Word

ROW = 10.0
"""Seconds of a row; longer recordings take several."""
MOST_ROWS = 6
_WIDTH, _HEIGHT = 11.0, 1.6  # inches of the figure, and of a row
_RANGE = 65.0  # decibels from white to black
_FLOOR = 1e-10  # power of silence
_HIGHEST = 8000.0  # Hz
_LANES, _LANE = 3, 11.0  # heights at which words are written where they are close, and their distance in points
_LETTER = 0.075  # inches
_COLOURS = (figures.PALETTE[1], figures.PALETTE[4], figures.PALETTE[5], figures.PALETTE[0])  # of confidence, from 0


def spectrogram_figure(
    wave: NDArray[np.float32], sample_rate: int, words: Sequence[Word] = (), title: str = ""
) -> Figure:
    """Draw the spectrogram of a recording, and over it each word where it is said, coloured by its confidence.

    Args:
        wave: Samples (N,). Up to a minute is drawn, in rows of 10 s; of a longer recording, the first minute.
        sample_rate: Samples a second.
        words: With times in seconds.
        title: Over the figure.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LinearSegmentedColormap

    whole = len(wave) / sample_rate
    shown = min(whole, ROW * MOST_ROWS)
    lines = max(1, math.ceil(shown / ROW - 1e-6))
    length = ROW if lines > 1 else max(shown, 0.05)
    figure, rows = figures.new_figure(lines, width=_WIDTH, height=1.1 + (_HEIGHT + 0.35) * lines)
    colours = ScalarMappable(cmap=LinearSegmentedColormap.from_list("confidence", _COLOURS))
    colours.set_clim(0, 1)
    power, step = _decibels(np.asarray(wave[: math.ceil(shown * sample_rate)], dtype=np.float64), sample_rate)
    top = float(power.max())
    if top < 10 * math.log10(_FLOOR) + 1:  # silence is white
        top += _RANGE
    used = []
    for number, axes in enumerate(rows):
        begin = number * length
        part = power[round(begin / step) : round((begin + length) / step) + 1]  # (frames, bins)
        kilohertz = (power.shape[1] - 1) * sample_rate / _size(sample_rate) / 1000
        axes.imshow(
            part.T, origin="lower", aspect="auto", cmap="Greys", vmin=top - _RANGE, vmax=top, interpolation="bilinear",
            extent=(begin - step / 2, begin + (len(part) - 0.5) * step, 0, kilohertz),
        )  # fmt: skip
        here = [w for w in words if w.start < begin + length and w.end > begin]
        used.append(_write_words(axes, here, begin, length, colours))
        axes.set_xlim(begin, begin + length)
        axes.set_ylim(0, kilohertz)
        axes.grid(visible=False)
        axes.set_ylabel("kHz", fontsize=9)
    rows[-1].set_xlabel("time (s)" if shown == whole else f"time (s); the first {shown:.0f} of {whole:,.0f} s")
    if words:
        bar = figure.colorbar(colours, ax=rows, aspect=12, shrink=min(1.0, 1.6 / lines), pad=0.012, anchor=(0.0, 1.0))
        bar.set_label("confidence", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    if title:
        shortened = figures.shorten(title, 110, middle=True)
        rows[0].set_title(shortened, fontsize=11, loc="left", pad=8 + _LANE * used[0])
    return figure


def _write_words(axes: Axes, words: Sequence[Word], begin: float, length: float, colours: ScalarMappable) -> int:
    """Mark each word and write it above, at the first height where it finds room; how many heights are used."""
    above = axes.get_xaxis_transform()
    letter = _LETTER / (0.88 * _WIDTH / length)  # s
    free = [-math.inf] * _LANES
    for word in words:
        start, end = max(word.start, begin), min(word.end, begin + length)
        colour = colours.to_rgba(float(np.clip(word.confidence, 0.0, 1.0)))  # type: ignore[arg-type]
        axes.axvspan(start, end, facecolor=colour, alpha=0.15, linewidth=0)
        axes.vlines([start, end], 0, 1, color=colour, linewidth=0.9, transform=above)
        axes.hlines(1.0, start, end, color=colour, linewidth=5, transform=above, clip_on=False)
        if not begin <= (word.start + word.end) / 2 < begin + length:  # written in the row of its middle
            continue
        text = word.text
        half = len(text) * letter / 2
        middle = max(min((start + end) / 2, begin + length - half), begin + half)
        lane = next((n for n, edge in enumerate(free) if middle - half >= edge), None)
        if lane is None:  # as much of the word as there is room for
            lane = free.index(min(free))
            text = figures.shorten(text, max(1, int(2 * (middle - free[lane]) / letter)))
            half = len(text) * letter / 2
            middle = max(middle, free[lane] + half)
        free[lane] = middle + half + letter
        axes.annotate(
            text, (middle, 1.0), (0, 5 + _LANE * lane), xycoords=above, textcoords="offset points", ha="center",
            va="bottom", fontsize=8.5, color="#222222", annotation_clip=False, parse_math=False,
        )  # fmt: skip
    return sum(edge > begin for edge in free)


def _size(sample_rate: int) -> int:
    """Samples of a spectrum: 25 ms."""
    return max(16, round(0.025 * sample_rate))


def _decibels(wave: NDArray[np.float64], sample_rate: int) -> tuple[NDArray[np.float32], float]:
    """Power (frames, bins) up to 8 kHz in decibels, and the seconds between two frames; the first is at 0 s."""
    size = _size(sample_rate)
    hop = max(1, round(0.005 * sample_rate))
    padded = np.pad(wave, (size // 2, size))
    frames = np.lib.stride_tricks.sliding_window_view(padded, size)[::hop][: len(wave) // hop + 1]
    bins = min(size // 2, round(_HIGHEST * size / sample_rate)) + 1
    window = np.hanning(size + 2)[1:-1].astype(np.float32)
    power = np.abs(np.fft.rfft(frames.astype(np.float32) * window)[:, :bins]) ** 2
    return (10 * np.log10(power / window.sum() ** 2 + _FLOOR)).astype(np.float32), hop / sample_rate
