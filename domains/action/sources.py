"""Demonstrations from whatever a user has: folders of LeRobot and CALVIN, HDF5, NumPy archives, tables."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from vertebra.domains.action.calvin import is_calvin, read_calvin
from vertebra.domains.action.episodes import Demonstrations, Episode, LeftOut
from vertebra.domains.action.hdf5 import read_hdf5
from vertebra.domains.action.reading import by_number, check_rate, refused
from vertebra.domains.action.tables import ColumnMap, read_csv, read_npz
from vertebra.errors import ConfigError, DataError

HDF5_ENDINGS = (".hdf5", ".h5")
TABLE_ENDINGS = (".csv", ".tsv")
ENDINGS = (".npz", *TABLE_ENDINGS, *HDF5_ENDINGS)
"""Endings, in lower case, of the files that are read."""

_READ = f"a folder of LeRobot (with meta/info.json) or CALVIN, or files {', '.join(ENDINGS)}"
_SAME_RATE = 0.01  # share by which steps a second of files may differ


def read_demonstrations(
    paths: Sequence[str | Path],
    *,
    fps: float | None = None,
    state: str | Sequence[str] | None = None,
    action: str | None = None,
    cameras: Sequence[str] | None = None,
    columns: ColumnMap | None = None,
    limit: int | None = None,
    unknown_actions: Sequence[str] = (),
) -> Demonstrations:
    """Read demonstrations of one robot from files and folders.

    A file that cannot be used is left out, if there is another. An episode whose name is in several files is named by
    the path of its file too.

    Args:
        paths: Folders of LeRobot or CALVIN, files .npz, .csv, .tsv, .hdf5 or .h5, or folders that are searched for all
            these.
        fps: Steps a second; None for what the files tell.
        state: Names of what makes the state: features (LeRobot), observations (HDF5), keys (npz, CALVIN), or columns
            (CSV; also what they begin with). None for the usual ones.
        action: Name of the actions, likewise.
        cameras: Names of the cameras; None for all.
        columns: Which columns of a CSV mean what; ``state`` and ``action`` go before.
        limit: Most episodes to read.
        unknown_actions: Names of the actions where LeRobot, .npz or .csv holds observations alone; the actions are then
            NaN. Without names, or where ``action`` names them, such data is refused.

    Raises:
        ConfigError: No path, ``limit`` below 1, or steps a second that neither ``fps`` nor a file tells.
        MissingExtraError: A package that a file needs is not installed.
        DataError: A path does not exist or is of another kind, no file can be used, or files differ in their
            dimensions or steps a second.
    """
    check_rate(fps)
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, got {limit}.")
    unnamed = tuple(unknown_actions) if action is None else ()
    keys = None if state is None else (state,) if isinstance(state, str) else tuple(state)
    table = columns or ColumnMap()
    if state is not None:
        table = dataclasses.replace(table, state=state if isinstance(state, str) else tuple(state))
    if action is not None:
        table = dataclasses.replace(table, action=action)

    def read(place: Path, most: int | None) -> Demonstrations:
        ending = place.suffix.lower()
        if place.is_dir() and is_calvin(place):
            return read_calvin(
                place,
                state=keys or ("robot_obs",),
                action=action or "rel_actions",
                cameras=cameras,
                fps=fps,
                limit=most,
            )
        if place.is_dir():
            from vertebra.domains.action.lerobot import read_lerobot

            first, *more = keys or ("observation.state",)
            return read_lerobot(
                place,
                state=first,
                action=action or "action",
                cameras=None if cameras is None else tuple(cameras),
                extra_state=tuple(more),
                limit=most,
                unknown_actions=unnamed,
            )
        if ending in HDF5_ENDINGS:
            return read_hdf5(place, state=keys or (), action=action or "actions", cameras=cameras, fps=fps, limit=most)
        if ending in TABLE_ENDINGS:
            return read_csv(place, columns=table, fps=fps, unknown_actions=unnamed)
        return read_npz(
            place,
            state=keys or "states",
            action=action or "actions",
            cameras=cameras,
            fps=fps,
            unknown_actions=unnamed,
        )

    found: list[tuple[Path, Demonstrations]] = []
    left: list[LeftOut] = []
    error: DataError | None = None
    for place in find_demonstrations(paths):
        most = None if limit is None else limit - sum(len(own.episodes) for _, own in found)
        if most is not None and most < 1:
            break
        try:
            found.append((place, _take(read(place, most), most, fps)))
        except DataError as e:
            error = error or e
            left.append(refused(str(place), e))
    if not found:
        assert error is not None
        raise error
    return _join(found, left)


def find_demonstrations(paths: Sequence[str | Path]) -> list[Path]:
    """List what can be read among files and folders, each once; numbers in names are sorted as such.

    Raises:
        ConfigError: There is no path.
        DataError: A path does not exist or is of another kind, or nothing that can be read is in a folder.
    """
    if not paths:
        raise ConfigError(f"no demonstrations are given; give {_READ}.")
    found: dict[Path, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            inside = [path] if _is_set(path) else _search(path)
            if not inside:
                raise DataError(f"{path}: no demonstrations are in this folder; give {_READ}.")
        elif not path.exists():
            raise DataError(f"{path}: there is no such file or folder; correct the path.")
        elif path.suffix.lower() in ENDINGS:
            inside = [path]
        else:
            raise DataError(f"{path}: {path.suffix or 'no ending'!r} is not a kind of file that is read; give {_READ}.")
        for one in inside:
            found.setdefault(one.resolve(), one)
    return list(found.values())


def _is_set(folder: Path) -> bool:
    from vertebra.domains.action.lerobot import is_lerobot

    return is_lerobot(folder) or is_calvin(folder)


def _search(folder: Path) -> list[Path]:
    found: list[Path] = []
    for path in sorted(folder.iterdir(), key=lambda p: by_number(p.name)):
        if path.name.startswith("."):  # also what macOS puts beside files
            continue
        if path.is_dir():
            found += [path] if _is_set(path) else _search(path)
        elif path.suffix.lower() in ENDINGS:
            found.append(path)
    return found


def _take(found: Demonstrations, most: int | None, fps: float | None) -> Demonstrations:
    """The first episodes, at the steps a second that the user wants."""
    count = len(found.episodes) if most is None else min(most, len(found.episodes))
    splits = {name: tuple(i for i in numbers if i < count) for name, numbers in found.splits.items()}
    splits = {name: numbers for name, numbers in splits.items() if numbers}
    return dataclasses.replace(found, episodes=found.episodes[:count], splits=splits, fps=fps or found.fps)


def _join(found: list[tuple[Path, Demonstrations]], left: list[LeftOut]) -> Demonstrations:
    """Put the episodes of files behind one another."""
    first_place, first = found[0]
    for place, own in found[1:]:
        for what in ("state_names", "action_names"):
            if getattr(own, what) != getattr(first, what):
                raise DataError(
                    f"{first_place} and {place}: {what} differ, {', '.join(getattr(first, what))} and "
                    f"{', '.join(getattr(own, what))}; read together what one robot did, or name the same dimensions."
                )
        if abs(own.fps - first.fps) > _SAME_RATE * first.fps:
            raise DataError(
                f"{first_place} and {place}: steps a second differ, {first.fps:g} and {own.fps:g}; set fps."
            )
    counts = Counter(name for _, own in found for name in {episode.name for episode in own.episodes})
    root = os.path.commonpath([place.resolve().parent for place, _ in found])
    episodes: list[Episode] = []
    splits: dict[str, tuple[int, ...]] = {}
    for place, own in found:
        for split, numbers in own.splits.items():
            splits[split] = splits.get(split, ()) + tuple(len(episodes) + i for i in numbers)
        inside = place.resolve().relative_to(root).as_posix()
        for episode in own.episodes:
            name = episode.name
            if counts[name] > 1:
                name = inside if name == place.stem else f"{inside}/{name}"
            episodes.append(dataclasses.replace(episode, name=name))
    left = [*(note for _, own in found for note in own.left_out), *left]
    if silent := [place for place, own in found if splits and not own.splits]:
        left.append(LeftOut(str(silent[0]), "tells no splits", "those of the other files are not used either"))
        splits = {}
    robots = {own.robot for _, own in found}
    return Demonstrations(
        episodes=tuple(episodes),
        fps=first.fps,
        state_names=first.state_names,
        action_names=first.action_names,
        robot=robots.pop() if len(robots) == 1 else "",
        splits=splits,
        left_out=tuple(left),
    )
