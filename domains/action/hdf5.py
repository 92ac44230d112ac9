"""Demonstrations in HDF5 files as robomimic and LIBERO lay them out.

Shapes: T steps of an episode, S state dimensions, D action dimensions.
"""

from __future__ import annotations

import contextlib
import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.episodes import Demonstrations, Episode, LeftOut
from vertebra.domains.action.reading import by_number, check_rate, is_pictures, matrix, numbered, refused
from vertebra.errors import DataError, MissingExtraError, VertebraError

STATE_KEYS = (
    *(f"robot{arm}_{part}" for arm in (0, 1) for part in ("eef_pos", "eef_quat", "gripper_qpos")),
    "object",
    "ee_states",
    "joint_states",
    "gripper_states",
)
"""Observations that make the state where the user names none: those of robomimic, then those of LIBERO."""
USUAL_RATE = 20.0
"""Steps a second of robomimic and LIBERO, for files that do not tell."""

_SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}
_DAMAGED = (OSError, KeyError, RuntimeError, ValueError)  # what h5py raises at damaged data


def read_hdf5(
    path: str | Path,
    *,
    state: Sequence[str] = (),
    action: str = "actions",
    cameras: Sequence[str] | None = None,
    fps: float | None = None,
    limit: int | None = None,
) -> Demonstrations:
    """Read ``data/demo_0``, ``data/demo_1``, ...: actions (T, D), and observations (T, ...) in ``obs``.

    A demonstration that cannot be used loses no other. Pictures are read when asked for, as they are stored; those of
    LIBERO stand on their heads. Splits are those of ``mask``.

    Args:
        path: The file.
        state: Observations that make the state, in this order; of a file without, data sets of the demonstration.
            Those of ``STATE_KEYS`` that are there, where none is given.
        action: Data set of the actions.
        cameras: Observations that are pictures; None for all that are.
        fps: Steps a second; None for what the file tells, else ``USUAL_RATE``.
        limit: Most demonstrations to read.

    Raises:
        MissingExtraError: h5py is not installed.
        ConfigError: ``fps`` is not above 0.
        DataError: The file is missing, damaged, or laid out in another way, or none of its demonstrations can be used.
    """
    check_rate(fps)
    path = Path(path)
    episodes: list[Episode] = []
    left: list[LeftOut] = []
    keys = tuple(state)
    names: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    with _opened(path) as file:
        data = file.get("data")
        if not isinstance(data, Mapping) or not len(data):
            raise DataError(
                f"{path}: there must be a group 'data' with demonstrations, got {', '.join(file) or 'nothing'}; only "
                "the layout of robomimic and LIBERO is read."
            )
        about = _json(data, "env_args")
        env = about.get("env_kwargs")
        env = env if isinstance(env, dict) else {}
        told = env.get("control_freq")
        rate = fps or (float(told) if isinstance(told, int | float) and told > 0 else USUAL_RATE)
        task = _task(data, about)
        for name in sorted(data, key=by_number):
            if limit is not None and len(episodes) >= limit:
                break
            where = f"{path}: {name}"
            try:
                demo = data[name]
                if not isinstance(demo, Mapping):
                    raise DataError(f"{where}: this is no demonstration but a data set; take it away.")
                keys = keys or _state_keys(where, demo)
                states, state_names = _states(where, demo, keys)
                actions = matrix(np.asarray(_data_set(where, demo, action)), f"{where}: {action}")
                episode = Episode(
                    name=name,
                    source=str(path),
                    states=states,
                    actions=actions,
                    times=np.arange(len(actions)) / rate,
                    task=task,
                    images=_images(path, where, demo, cameras),
                )
                episode.check()
                own = (state_names, numbered(action, actions.shape[1]))
                if episodes and own != names:
                    raise DataError(f"{where}: its dimensions are others than those of {episodes[0].name}.")
            except DataError as e:
                left.append(refused(where, e))
            except _DAMAGED as e:
                left.append(LeftOut(where, f"cannot be read ({e})", "copy the file again"))
            else:
                names = own
                episodes.append(episode)
        if not episodes:
            raise DataError(str(left[0]))
        splits = _splits(file, [episode.name for episode in episodes])
    robots = env.get("robots", "")
    return Demonstrations(
        episodes=tuple(episodes),
        fps=rate,
        state_names=names[0],
        action_names=names[1],
        robot=", ".join(map(str, robots)) if isinstance(robots, list) else str(robots),
        splits=splits,
        left_out=tuple(left),
    )


class StoredFrames(Sequence[NDArray[np.uint8]]):
    """Pictures (T, H, W, 3) of a camera that stay in their file; it is opened each time, so that workers can share it.

    Args:
        path: The file.
        key: The data set.
        length: T.
    """

    def __init__(self, path: Path, key: str, length: int) -> None:
        self.path, self.key, self.length = path, key, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index):  # type: ignore[no-untyped-def]  # noqa: ANN001
        if not isinstance(index, slice) and not -self.length <= index < self.length:
            raise IndexError(f"{self.key}: there is no frame {index} of {self.length:,}")
        with _opened(self.path) as file:
            return file[self.key][index]


def _h5py() -> Any:
    try:
        return importlib.import_module("h5py")
    except ImportError as e:
        raise MissingExtraError("h5py", "hdf5", "reading HDF5") from e


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            yield file
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct the path.") from None
    except VertebraError:
        raise
    except _DAMAGED:
        raise DataError(
            f"{path}: cannot be read as HDF5, being damaged, cut short or of another kind; copy it again."
        ) from None


def _json(data: Any, name: str) -> dict[str, Any]:
    """An attribute that is a JSON object; empty where there is none."""
    try:
        found = json.loads(data.attrs.get(name, "{}"))
    except (OSError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _task(data: Any, about: dict[str, Any]) -> str:
    text = _json(data, "problem_info").get("language_instruction") or about.get("env_name", "")
    return ("".join(text) if isinstance(text, list) else str(text)).strip(' "')


def _observations(demo: Any) -> Any:
    found = demo.get("obs")
    return found if isinstance(found, Mapping) else {}


def _data_set(where: str, demo: Any, key: str) -> Any:
    found = _observations(demo).get(key)
    found = demo.get(key) if found is None else found
    if getattr(found, "shape", None) is None:
        there = ", ".join([*demo, *(f"obs/{name}" for name in _observations(demo))])
        raise DataError(f"{where}: there is no data set {key!r}, only {there or 'none'}; name one that is there.")
    return found


def _state_keys(where: str, demo: Any) -> tuple[str, ...]:
    there = _observations(demo)
    keys = tuple(key for key in STATE_KEYS if key in there)
    if not keys:
        others = ", ".join(there) or f"none, but {', '.join(demo) or 'nothing'}"
        raise DataError(f"{where}: no usual observation is there; there are {others}; name those of the state.")
    return keys


def _states(where: str, demo: Any, keys: tuple[str, ...]) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    """States (T, S) and their names."""
    parts: list[NDArray[np.float32]] = []
    names: list[str] = []
    for key in keys:
        values = np.asarray(_data_set(where, demo, key))
        part = matrix(values[:, None] if values.ndim == 1 else values, f"{where}: {key}")
        if parts and len(part) != len(parts[0]):
            raise DataError(f"{where}: {key} has {len(part):,} steps, but {keys[0]} has {len(parts[0]):,}.")
        parts.append(part)
        names += numbered(key, part.shape[1])
    return np.concatenate(parts, axis=1), tuple(names)


def _images(path: Path, where: str, demo: Any, cameras: Sequence[str] | None) -> dict[str, StoredFrames]:
    there = {
        key: StoredFrames(path, found.name, len(found))
        for key, found in _observations(demo).items()
        if is_pictures(found)
    }
    for name in cameras or ():
        if name not in there:
            raise DataError(f"{where}: there are no pictures {name!r}; there are {', '.join(there) or 'none'}.")
    return {name: there[name] for name in (there if cameras is None else cameras)}


def _splits(file: Any, names: list[str]) -> dict[str, tuple[int, ...]]:
    """Numbers of the demonstrations of each split that ``mask`` tells."""
    splits = {}
    for key, split in _SPLITS.items():
        found = file.get(f"mask/{key}")
        if found is not None:
            members = {name.decode() if isinstance(name, bytes) else str(name) for name in np.asarray(found)}
            splits[split] = tuple(i for i, name in enumerate(names) if name in members)
    return {split: numbers for split, numbers in splits.items() if numbers}
