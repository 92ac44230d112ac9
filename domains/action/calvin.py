"""Demonstrations of CALVIN (https://arxiv.org/abs/2112.03227): a folder with a NumPy archive for each step.

Shapes: T steps of an episode, S state dimensions, D action dimensions.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.episodes import Demonstrations, Episode, LeftOut
from vertebra.domains.action.reading import check_rate, is_pictures, matrix, numbered, refused
from vertebra.errors import DataError

RATE = 30.0
"""Steps a second of CALVIN."""

_POSE = ("x", "y", "z", "euler_x", "euler_y", "euler_z")
_NAMES = {
    "robot_obs": (*_POSE, "gripper_width", *(f"joint_{i}" for i in range(7)), "gripper"),
    "actions": (*_POSE, "gripper"),
    "rel_actions": (*_POSE, "gripper"),
}
_SPLITS = {"training": "train", "validation": "val"}
_ENDS = "ep_start_end_ids.npy"
_DAMAGED = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error)  # what NumPy raises


def is_calvin(folder: Path) -> bool:
    """Whether the folder is ``training`` or ``validation`` of CALVIN, whatever it is called."""
    return (folder / _ENDS).is_file()


def read_calvin(
    folder: str | Path,
    *,
    state: Sequence[str] = ("robot_obs",),
    action: str = "rel_actions",
    cameras: Sequence[str] | None = None,
    fps: float | None = None,
    limit: int | None = None,
) -> Demonstrations:
    """Read the episodes of play. Steps that are absent or damaged are passed over, and leave a gap in the times.

    Tasks are not told: CALVIN keeps them as a pickle, which may run code when it is opened. Pictures are read when
    asked for.

    Args:
        folder: Holds ``ep_start_end_ids.npy`` and ``episode_0000000.npz``, ...
        state: Keys of what makes the state.
        action: Key of the actions.
        cameras: Keys of pictures; None for all that have three colours.
        fps: Steps a second; None for those of CALVIN.
        limit: Most episodes to read.

    Raises:
        ConfigError: ``fps`` is not above 0.
        DataError: The folder is no such one, a key is absent, or no episode can be used.
    """
    check_rate(fps)
    folder, rate = Path(folder), fps or RATE
    episodes: list[Episode] = []
    left: list[LeftOut] = []
    names: dict[str, tuple[str, ...]] = {}
    for first, last in _ends(folder):
        if limit is not None and len(episodes) >= limit:
            break
        name = f"episode_{first:07d}"
        where = f"{folder}: {name}"
        try:
            numbers, values, there = _steps(folder, first, last, (*state, action))
            for key in cameras or ():
                if key not in there:
                    raise DataError(f"{where}: there are no pictures {key!r}; there are {', '.join(there) or 'none'}.")
            found = {key: matrix(np.stack(values[key]), f"{where}: {key}") for key in (*state, action)}
            own = {key: _names(key, part.shape[1]) for key, part in found.items()}
            if episodes and own != names:
                raise DataError(f"{where}: its dimensions are others than those of {episodes[0].name}.")
            paths = [folder / f"episode_{number:07d}.npz" for number in numbers]
            episode = Episode(
                name=name,
                source=str(folder),
                states=np.concatenate([found[key] for key in state], axis=1),
                actions=found[action],
                times=(np.array(numbers) - numbers[0]) / rate,
                images={key: StepFrames(paths, key) for key in (there if cameras is None else cameras)},
            )
            episode.check()
        except DataError as e:
            left.append(refused(where, e))
            continue
        names = own
        episodes.append(episode)
        if absent := last + 1 - first - len(numbers):
            left.append(LeftOut(where, f"{absent:,} steps are absent or damaged", "they are passed over"))
    if not episodes:
        raise DataError(str(left[0]))
    split = _SPLITS.get(folder.resolve().name)
    return Demonstrations(
        episodes=tuple(episodes),
        fps=rate,
        state_names=tuple(name for key in state for name in names[key]),
        action_names=names[action],
        robot="Panda",
        splits={split: tuple(range(len(episodes)))} if split else {},
        left_out=tuple(left),
    )


class StepFrames(Sequence[NDArray[np.uint8]]):
    """Pictures (T, H, W, 3) of a camera, each in the archive of its step.

    Args:
        paths: T archives.
        key: The camera.
    """

    def __init__(self, paths: Sequence[Path], key: str) -> None:
        self.paths, self.key = paths, key

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001
        if isinstance(index, slice):
            return np.stack([self[i] for i in range(*index.indices(len(self)))])
        path = self.paths[index]
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                return archive[self.key]
        except _DAMAGED as e:
            raise DataError(f"{path}: {self.key} cannot be read ({e}); copy the file again.") from None


def _ends(folder: Path) -> list[tuple[int, int]]:
    """First and last step of each episode."""
    path = folder / _ENDS
    try:
        ends = np.load(path, allow_pickle=False)
    except _DAMAGED:
        raise DataError(f"{path}: there is no such file, or it is damaged; copy it again.") from None
    if not isinstance(ends, np.ndarray) or ends.dtype.kind not in "iu" or ends.ndim != 2 or ends.shape[1] != 2:
        raise DataError(f"{path}: must be whole numbers (E, 2), the first and last step of each episode.")
    if not len(ends):
        raise DataError(f"{path}: names no episode; copy it again.")
    return sorted((int(first), int(last)) for first, last in ends)


def _steps(
    folder: Path, first: int, last: int, keys: Sequence[str]
) -> tuple[list[int], dict[str, list[NDArray[Any]]], list[str]]:
    """Numbers of the steps that can be read, their values by key, and the cameras of the first."""
    numbers: list[int] = []
    values: dict[str, list[NDArray[Any]]] = {key: [] for key in keys}
    cameras: list[str] = []
    for number in range(first, last + 1):
        path = folder / f"episode_{number:07d}.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                there = archive.files
                own = [archive[key] for key in keys if key in there]
                if not numbers:
                    cameras = [key for key in there if key.startswith("rgb_") and is_pictures(archive[key][None])]
        except _DAMAGED:
            continue
        if missing := [key for key in keys if key not in there]:
            raise DataError(f"{path}: there is no array {missing[0]!r}; arrays: {', '.join(there) or 'none'}.")
        if numbers and any(part.shape != values[key][0].shape for key, part in zip(keys, own, strict=True)):
            continue
        numbers.append(number)
        for key, part in zip(keys, own, strict=True):
            values[key].append(part)
    if not numbers:
        raise DataError(f"{folder}: episode_{first:07d}: none of its {last + 1 - first:,} steps can be read.")
    return numbers, values, cameras


def _names(key: str, width: int) -> tuple[str, ...]:
    names = _NAMES.get(key, ())
    return names if len(names) == width else numbered(key, width)
