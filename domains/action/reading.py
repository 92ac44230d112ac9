"""What readers of demonstrations share: numbers checked, names and rates made up where a file does not tell.

Shapes: T steps of an episode, S state dimensions, D action dimensions.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.episodes import Demonstrations, Episode, Floats, Frames, LeftOut
from vertebra.errors import ConfigError, DataError

FIRST = {"states": "state", "actions": "action"}
"""What the numbered names of the usual arrays begin with."""

_LONGEST_STEP = 2.0  # seconds; no robot is told what to do less often, but milliseconds look like this


@dataclass
class Part:
    """An episode as a file has it; without states or times where the file has none."""

    name: str
    states: Floats | None
    actions: Floats
    times: NDArray[np.float64] | None
    task: str = ""
    images: dict[str, Frames] = field(default_factory=dict)


def matrix(values: NDArray[Any], what: str, dtype: Any = np.float32) -> NDArray[Any]:
    """Return numbers (T, D) as float32, or as another ``dtype``; too large ones become infinite.

    Raises:
        DataError: They are no numbers, or of another shape; the text begins with ``what``.
    """
    if values.dtype.kind not in "fiub" or values.ndim != 2 or not values.shape[1]:
        raise DataError(f"{what} must be numbers (steps, dimensions), got {values.dtype} {values.shape}.")
    with np.errstate(over="ignore"):
        return values.astype(dtype)


def numbered(key: str, width: int) -> tuple[str, ...]:
    """Names of the dimensions of an array that has none: ``state_0``, ``state_1``, ..."""
    return tuple(f"{FIRST.get(key, key)}_{i}" for i in range(width))


def stand_in(action_names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the states that are the actions of the step before."""
    return tuple(f"previous_{name}" for name in action_names)


def is_pictures(frames: Any) -> bool:
    """Whether an array or data set is pictures of 8 bits, (T, H, W, 3)."""
    return getattr(frames, "dtype", None) == np.uint8 and len(frames.shape) == 4 and frames.shape[3] == 3


def by_number(text: str) -> list[str | int]:
    """Key that sorts ``demo_10`` behind ``demo_9``."""
    return [int(part) if i % 2 else part for i, part in enumerate(re.split(r"(\d+)", text))]


def refused(where: str, error: DataError) -> LeftOut:
    """What is left out because of an error, whose text may begin with ``where``."""
    rule, semicolon, advice = str(error).removeprefix(where).lstrip(",: ").removesuffix(".").rpartition("; ")
    return LeftOut(where, rule, advice) if semicolon else LeftOut(where, advice)


def frame_rate(times: Sequence[NDArray[np.float64]]) -> float | None:
    """Steps a second of episodes (T,) in seconds, from the steps that are about as long as their median.

    What is within half a percent of a whole number is taken for it; None where no time passes.
    """
    steps = np.concatenate([np.diff(own) for own in times] or [np.zeros(0)])
    steps = steps[np.isfinite(steps) & (steps > 0)]
    if not len(steps):
        return None
    middle = np.median(steps)
    # the mean of those near it: a time stamp in hundredths of a second is 0.03 or 0.04 behind the last at 30 a second
    rate = 1 / float(steps[(steps > middle / 2) & (steps < 1.5 * middle)].mean())
    return float(round(rate)) if abs(rate - round(rate)) <= 0.005 * rate else float(f"{rate:.4g}")


def check_rate(fps: float | None) -> None:
    """Refuse a number of steps a second that is none.

    Raises:
        ConfigError: It is not above 0, or not finite.
    """
    if fps is not None and not 0 < fps < math.inf:
        raise ConfigError(f"fps must be above 0, got {fps}.")


def assemble(
    path: Path,
    parts: list[Part],
    state_names: tuple[str, ...],
    action_names: tuple[str, ...],
    fps: float | None,
    robot: str,
    left: list[LeftOut],
) -> Demonstrations:
    """Make episodes of what a file has.

    Args:
        path: The file.
        parts: What it has.
        state_names: Names of the S state dimensions.
        action_names: Names of the D action dimensions.
        fps: Steps a second; None for what the times tell.
        robot: Its name.
        left: What is left out already; more may be added.

    Raises:
        ConfigError: Neither the times nor ``fps`` tell the steps a second.
        DataError: None of the episodes can be used.
    """
    check_rate(fps)
    if not parts:
        raise DataError(str(left[0]))
    rate = frame_rate([part.times for part in parts if part.times is not None])
    if rate is not None and 1 / rate >= _LONGEST_STEP:
        raise DataError(f"{path}: time stamps are {1 / rate:.3g} apart; write them in seconds.")
    rate = fps if fps is not None else rate
    if rate is None:
        raise ConfigError(f"{path}: no time stamps tell how many steps a second has; set fps.")
    episodes = []
    for part in parts:
        times = np.arange(len(part.actions)) / rate if part.times is None else part.times
        states = part.states
        if states is None:
            states = np.concatenate([part.actions[:1], part.actions[:-1]])
        episode = Episode(
            name=part.name,
            source=str(path),
            states=states,
            actions=part.actions,
            times=times - times[:1],
            task=part.task,
            images=part.images,
        )
        where = f"{path}: {part.name}"
        try:
            episode.check()
        except DataError as e:
            left.append(refused(where, e))
            continue
        episodes.append(episode)
        if part.states is None:
            advice = "the action of the step before stands in for them, and at the first step its own"
            left.append(LeftOut(where, "has no states", advice))
    if not episodes:
        raise DataError(str(left[0]))
    return Demonstrations(
        episodes=tuple(episodes),
        fps=rate,
        state_names=state_names,
        action_names=action_names,
        robot=robot,
        left_out=tuple(left),
    )


def given_names(first: str, names: Sequence[str], width: int) -> tuple[str, ...]:
    """Return the names, or numbered ones where there are none.

    Raises:
        ConfigError: Their number is not ``width``.
    """
    names = tuple(names) or numbered(first, width)
    if len(names) != width:
        raise ConfigError(f"{first}_names must be {width}, as many as there are dimensions, got {len(names)}.")
    return names


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that appears as ``path`` only when the block ends well."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
        part.replace(path)
    except OSError as e:
        raise DataError(f"{path}: cannot be written ({e.strerror or e}); choose another folder.") from None
    finally:
        part.unlink(missing_ok=True)
