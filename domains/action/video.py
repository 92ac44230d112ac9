"""Pictures of a camera that are decoded when they are asked for: picture files in memory, and videos."""

from __future__ import annotations

import functools
import io
import os
from abc import abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vertebra.errors import DataError, MissingExtraError

Picture = NDArray[np.uint8]

OPEN = 4
"""Videos a process holds open."""
RECENT = 8
"""Decoded frames an open video keeps, so that a short look back decodes nothing again."""
AHEAD = 1.0
"""Seconds up to which decoding goes on rather than jumping to a key frame."""


class LazyFrames(Sequence[Picture]):
    """T pictures (H, W, 3); a slice gives a list of them."""

    @abstractmethod
    def decode(self, index: int) -> Picture:
        """Return one picture; ``index`` is from 0 to T - 1."""

    @overload
    def __getitem__(self, index: int) -> Picture: ...
    @overload
    def __getitem__(self, index: slice) -> list[Picture]: ...
    def __getitem__(self, index: int | slice) -> Picture | list[Picture]:
        if isinstance(index, slice):
            return [self.decode(i) for i in range(len(self))[index]]
        return self.decode(range(len(self))[index])


class EncodedFrames(LazyFrames):
    """Pictures as PNG or JPEG files in memory.

    Args:
        files: Contents of T files.
        where: What they belong to, for error texts.

    Raises:
        DataError: (On access) the file is damaged.
    """

    def __init__(self, files: Sequence[bytes], where: str) -> None:
        self.files, self.where = files, where

    def __len__(self) -> int:
        return len(self.files)

    def decode(self, index: int) -> Picture:
        """Return one picture."""
        try:
            with Image.open(io.BytesIO(self.files[index])) as image:
                return np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as e:  # the last is what PIL says of damaged PNGs
            raise DataError(f"{self.where}: the picture of step {index} is damaged ({e}); leave it out.") from e


class VideoFrames(LazyFrames):
    """Frames of a video, each the nearest to its time.

    Going through them in order decodes each once; any other order decodes from the key frame before. Needs the extra
    ``video``.

    Args:
        path: Video file.
        times: Seconds in the video, (T,).
        tolerance: Seconds that a frame may be away from its time.

    Raises:
        MissingExtraError: (On access) ``av`` is not installed.
        DataError: (On access) the file is damaged, or has no frame at that time.
    """

    def __init__(self, path: Path, times: NDArray[np.float64], tolerance: float) -> None:
        self.path, self.times, self.tolerance = path, times, tolerance

    def __len__(self) -> int:
        return len(self.times)

    def decode(self, index: int) -> Picture:
        """Return one frame."""
        # A forked process must not read on through the file of its parent.
        return _open(str(self.path), os.getpid()).at(float(self.times[index]), self.tolerance)


def can_read_videos() -> bool:
    """Whether the extra ``video`` is installed."""
    return find_spec("av") is not None


class _Decoder:
    def __init__(self, path: str) -> None:
        try:
            self.av: Any = import_module("av")
        except ImportError as e:
            raise MissingExtraError("av", "video", "reading videos") from e
        self.path = path
        self.recent: deque[tuple[float, Any]] = deque(maxlen=RECENT)
        self.frames: Iterator[Any] = iter(())
        try:
            self.container = self.av.open(path)
        except (self.av.FFmpegError, OSError) as e:
            raise DataError(f"{path}: is no video that can be read ({e}); copy it again or leave it out.") from e
        if not self.container.streams.video:
            raise DataError(
                f"{path}: is no video that can be read (it holds no pictures); copy it again or leave it out."
            )
        self.stream = self.container.streams.video[0]
        self.stream.codec_context.thread_count = 1  # threads would not survive a fork

    def at(self, time: float, tolerance: float) -> Picture:
        try:
            if not self.recent or not self.recent[0][0] - tolerance <= time <= self.recent[-1][0] + AHEAD:
                self.recent.clear()
                self.container.seek(max(0, int(time / self.stream.time_base)), stream=self.stream)
                self.frames = self.container.decode(self.stream)
            while not self.recent or self.recent[-1][0] < time:
                frame = next(self.frames, None)
                if frame is None:
                    break
                if frame.time is not None:
                    self.recent.append((frame.time, frame))
        except (self.av.FFmpegError, OSError) as e:
            self.recent.clear()
            raise DataError(f"{self.path}: is damaged near {time:.3f} s ({e}); copy it again or leave it out.") from e
        away, best = min(((abs(t - time), i) for i, (t, _) in enumerate(self.recent)), default=(np.inf, 0))
        if away > tolerance:
            raise DataError(
                f"{self.path}: has no frame within {tolerance:.3f} s of {time:.3f} s; is it the video of this episode?"
            )
        return np.asarray(self.recent[best][1].to_ndarray(format="rgb24"), np.uint8)


@functools.lru_cache(maxsize=OPEN)
def _open(path: str, process: int) -> _Decoder:
    return _Decoder(path)
