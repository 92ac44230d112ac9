"""What readers of demonstrations share: numbers checked, names and rates made up where a file does not tell.

Shapes: T steps of an episode, S state dimensions, D action dimensions.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.episodes import Demonstrations, Episode, Floats, Frames, LeftOut
from vertebra.errors import ConfigError, DataError

FIRST = {"states": "state", "actions": "action"}
"""What the numbered names of the usual arrays begin with."""

_LONGEST_STEP = 2.0  # seconds; no robot is told what to do less often, but milliseconds look like this


@dataclass
class Part:
    """An episode as a file has it; without states, actions or times where the file has none."""

    name: str
    states: Floats | None
    actions: Floats | None
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


def check_observed(episode: Episode) -> None:
    """Check an episode whose actions are not known, and therefore not finite.

    Raises:
        DataError: As ``Episode.check``.
    """
    dataclasses.replace(episode, actions=np.zeros_like(episode.actions)).check()


def no_actions(where: Path) -> LeftOut:
    """The note that a file has no actions."""
    return LeftOut(str(where), "has no actions", "what is predicted is compared with nothing")


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
    """Make episodes of what a file has; actions that it does not have are NaN.

    Args:
        path: The file.
        parts: What it has; of states and actions one at least.
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
        states, actions = part.states, part.actions
        if states is None:
            assert actions is not None
            states = np.concatenate([actions[:1], actions[:-1]])
        if actions is None:
            actions = np.full((len(states), len(action_names)), np.nan, np.float32)
        times = np.arange(len(actions)) / rate if part.times is None else part.times
        episode = Episode(
            name=part.name,
            source=str(path),
            states=states,
            actions=actions,
            times=times - times[:1],
            task=part.task,
            images=part.images,
        )
        where = f"{path}: {part.name}"
        try:
            if part.actions is None:
                check_observed(episode)
            else:
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
    if parts[0].actions is None:
        left.append(no_actions(path))
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
