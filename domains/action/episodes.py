"""Demonstrations in memory, whatever file they come from; gaps and repeated frames; chunks of actions.

Shapes: T steps of an episode, S state dimensions, D action dimensions, H steps of a chunk.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError

Floats = NDArray[np.float32]
Frames = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
"""Pictures of one camera, (H, W, 3) each: an array (T, H, W, 3), or what decodes each when it is asked for."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Episode:
    """One demonstration.

    Args:
        name: Unique within its set.
        source: The file it comes from.
        states: What the robot's sensors say, (T, S).
        actions: What it was told to do then, (T, D).
        times: Seconds from the beginning, (T,).
        task: What was to be done, in words.
        images: Pictures by camera, T each.
    """

    name: str
    source: str = ""
    states: Floats
    actions: Floats
    times: NDArray[np.float64]
    task: str = ""
    images: Mapping[str, Frames] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.actions)

    def check(self) -> None:
        """Refuse what no model can learn from.

        Raises:
            DataError: There is no step, a length differs, or a number is not finite.
        """
        where = f"{self.source or 'episode'}: {self.name}"
        if not len(self.actions):
            raise DataError(f"{where}: holds no step; leave it out.")
        lengths = {"states": len(self.states), "times": len(self.times)}
        lengths |= {f"images of {name}": len(frames) for name, frames in self.images.items()}
        for name, length in lengths.items():
            if length != len(self.actions):
                raise DataError(f"{where}: {name} has {length:,} steps, but actions has {len(self.actions):,}.")
        for name, values in (("states", self.states), ("actions", self.actions), ("times", self.times)):
            finite = np.isfinite(values).reshape(len(values), -1).all(1)
            if not finite.all():
                raise DataError(f"{where}: {name} is not finite at step {int(finite.argmin())}; mend or leave it out.")


@dataclass(frozen=True)
class LeftOut:
    """What was not used as it stands, and why."""

    source: str
    rule: str
    advice: str = "mend it or leave it out"

    def __str__(self) -> str:
        return f"{self.source}: {self.rule}; {self.advice}."


@dataclass(frozen=True, kw_only=True, eq=False)
class Demonstrations:
    """A set of episodes of one robot.

    Args:
        episodes: In the order of the files.
        fps: Steps a second.
        state_names: Names of the S state dimensions.
        action_names: Names of the D action dimensions.
        robot: Its name, where the files tell.
        splits: Numbers of episodes by split, where the files tell.
        left_out: Episodes and files that could not be used.
    """

    episodes: tuple[Episode, ...]
    fps: float
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    robot: str = ""
    splits: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()

    @property
    def tasks(self) -> tuple[str, ...]:
        """Tasks of the episodes, each once, in order of appearance."""
        return tuple(dict.fromkeys(episode.task for episode in self.episodes))


def regular(episode: Episode, fps: float, max_gap: float = 0.5) -> tuple[list[Episode], list[LeftOut]]:
    """Put an episode on an even grid of ``fps`` steps a second.

    Frames that repeat a time stamp, or come after a later one, are dropped. Missing frames of a gap up to ``max_gap``
    seconds are put in between their neighbours, states and actions linearly and pictures from the nearest; at a longer
    gap the episode is cut. More frames a second than ``fps`` become fewer in the same way. An episode that is even
    already is returned as it is.

    Args:
        episode: Checked.
        fps: Steps a second.
        max_gap: Seconds.

    Returns:
        The parts, and what was done to them.
    """
    where = f"{episode.source or 'episode'}: {episode.name}"
    notes: list[LeftOut] = []
    latest = np.maximum.accumulate(np.concatenate([[-np.inf], episode.times[:-1]]))
    gaps = np.diff(episode.times)
    usual = float(np.median(gaps[gaps > 0])) if (gaps > 0).any() else 1 / fps
    kept = np.flatnonzero(episode.times > latest + 0.1 * min(usual, 1 / fps))
    if dropped := len(episode) - len(kept):
        notes.append(LeftOut(where, f"{dropped:,} frames repeat an earlier time stamp", "they are left out"))
    times = episode.times[kept]
    steps = np.round(np.diff(times) * fps)
    cuts = np.flatnonzero((np.diff(times) > max_gap) & (steps > 1)) + 1
    if not dropped and not len(cuts) and (steps == 1).all():
        return [episode], notes
    parts = []
    edges = [0, *cuts.tolist(), len(kept)]
    filled = 0
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        own = times[first:last]
        rows = kept[first:last]
        count = 1 + round((own[-1] - own[0]) * fps)
        grid = own[0] + np.arange(count) / fps
        if (np.round(np.diff(own) * fps) == 1).all():
            grid, count = own, len(own)
        filled += count - len(own)
        nearest = rows[_nearest(grid, own)]
        parts.append(
            dataclasses.replace(
                episode,
                name=episode.name if len(edges) == 2 else f"{episode.name}.{number}",
                states=_between(grid, own, episode.states[rows]),
                actions=_between(grid, own, episode.actions[rows]),
                times=grid - grid[0],
                images={name: _Picked(frames, nearest) for name, frames in episode.images.items()},
            )
        )
    if filled > 0:
        notes.append(LeftOut(where, f"{filled:,} frames are missing", "they are put in between their neighbours"))
    if filled < 0:
        notes.append(LeftOut(where, f"{-filled:,} frames are more than {fps:g} a second", "they are left out"))
    if len(cuts):
        notes.append(LeftOut(where, f"{len(cuts):,} gaps are longer than {max_gap:g} s", "it is cut there"))
    return parts, notes


def windows(episode: Episode, horizon: int) -> tuple[Floats, NDArray[np.bool_]]:
    """Return the next ``horizon`` actions at every step, (T, H, D), and which of them exist, bool (T, H).

    Behind the end the last action is repeated.
    """
    places = np.arange(len(episode))[:, None] + np.arange(horizon)
    return episode.actions[np.minimum(places, len(episode) - 1)], places < len(episode)


def columns_of(names: Sequence[str], wanted: Sequence[str | int], what: str) -> tuple[int, ...]:
    """Return the numbers of columns given by name or, where no name is the same, by number.

    Raises:
        ConfigError: There is no such column.
    """
    found = []
    for each in wanted:
        if isinstance(each, str) and each in names:
            number = names.index(each)
        else:
            number = int(each) if isinstance(each, int) or each.isdecimal() else len(names)
        if not 0 <= number < len(names):
            raise ConfigError(f"{what}: no column {each!r}; columns: {', '.join(names)} (or 0 to {len(names) - 1}).")
        found.append(number)
    return tuple(found)


class _Picked(Sequence[NDArray[np.uint8]]):
    """Frames of a camera in another order."""

    def __init__(self, frames: Frames, rows: NDArray[np.int64]) -> None:
        self.frames, self.rows = frames, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.frames[int(self.rows[index])]


def _between(grid: NDArray[np.float64], times: NDArray[np.float64], values: Floats) -> Floats:
    columns = [np.interp(grid, times, column) for column in values.T]
    return np.stack(columns, axis=1).astype(np.float32) if columns else np.zeros((len(grid), 0), np.float32)


def _nearest(grid: NDArray[np.float64], times: NDArray[np.float64]) -> NDArray[np.int64]:
    right = np.searchsorted(times, grid).clip(1, len(times) - 1)
    return np.where(grid - times[right - 1] <= times[right] - grid, right - 1, right)
