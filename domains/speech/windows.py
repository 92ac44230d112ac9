"""Recordings of any length in overlapping windows, of which the middles are kept.

Source: the long-form decoding of OWSM-CTC (https://arxiv.org/abs/2402.12654, section 4.5). Unlike there the first
window begins with the recording and the last one ends with it, so that a recording of one window is read as it is.

Shapes: N samples of a recording, T positions of a window.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.speech.model import SpeechCTC
from vertebra.errors import ConfigError

Wave = NDArray[np.float32]


@dataclass(frozen=True)
class Window:
    """A piece of a recording.

    Args:
        wave: Its samples.
        start: Its first sample, counted from the recording's beginning.
        skip: Positions at its beginning that the window before answers for.
        keep: Positions behind those that it answers for; None for all up to its end.
    """

    wave: Wave
    start: int
    skip: int
    keep: int | None

    @property
    def last(self) -> bool:
        """Whether the recording ends with it."""
        return self.keep is None


class Windows:
    """Cuts recordings.

    Args:
        model: Who will read the windows.
        seconds: Length of a window.
        context: Seconds at either side of a window whose positions are left to its neighbours.

    Raises:
        ConfigError: Nothing would be left between the contexts.
    """

    def __init__(self, model: SpeechCTC, seconds: float = 30.0, context: float = 4.0) -> None:
        step, rate = model.samples_per_position, model.spec.sample_rate
        self.step = step
        self.length, self.context = round(seconds * rate / step), round(context * rate / step)  # in positions
        ahead = -(-model.subsample.look_ahead // model.subsample.factor) + 1  # positions that a window's end lacks
        if self.context < ahead or self.length <= 2 * self.context:
            least = ahead * model.seconds_per_position
            raise ConfigError(
                f"windows: context must be at least {least:.2g} seconds and less than half a window, got {context:g} "
                f"of {seconds:g} seconds."
            )

    def cut(self, blocks: Iterable[Wave]) -> Iterator[Window]:
        """Cut a recording that comes in blocks of samples; no more than a window and a block are held."""
        size, hop = self.length * self.step, self.length - 2 * self.context
        held, start, number = np.zeros(0, np.float32), 0, 0
        for block in blocks:
            held = np.concatenate([held, block])
            while len(held) > size:
                skip = self.context if number else 0
                yield Window(held[:size].copy(), start, skip, hop + self.context - skip)
                held, start, number = held[hop * self.step :], start + hop * self.step, number + 1
        yield Window(held, start, self.context if number else 0, None)
