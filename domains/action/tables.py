"""Demonstrations in NumPy archives and CSV tables: read and written.

Shapes: E episodes, N steps of a file, T steps of an episode, S state dimensions, D action dimensions.
"""

from __future__ import annotations

import csv
import itertools
import math
from collections.abc import Container, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.episodes import Demonstrations, Episode, LeftOut
from vertebra.domains.action.reading import (
    FIRST,
    Part,
    assemble,
    given_names,
    is_pictures,
    matrix,
    numbered,
    stand_in,
)
from vertebra.domains.writing import whole_file
from vertebra.errors import ConfigError, DataError

_COPY = "copy or export it again"


@dataclass(frozen=True, kw_only=True)
class ColumnMap:
    """Which columns of a table mean what.

    State and action are told by names of columns, or by what these begin with: ``state`` for ``state_0``, ``state.x``,
    ``state[1]`` and ``state2``; the dimension of ``state.x`` is then called ``x``.

    Args:
        time: Seconds. A table may lack it where it is called as here; so with ``episode``, ``state`` and ``task``.
        episode: Same text in all rows of an episode; without it a table is one episode.
        state: What the robot's sensors say.
        action: What it was told to do.
        task: What was to be done, in words; the first row of an episode counts.
    """

    time: str = "timestamp"
    episode: str = "episode"
    state: str | tuple[str, ...] = "state"
    action: str | tuple[str, ...] = "action"
    task: str = "task"


# ---------------------------------------------------------------- NumPy archives


def read_npz(
    path: str | Path,
    *,
    state: str | Sequence[str] = "states",
    action: str = "actions",
    cameras: Sequence[str] | None = None,
    fps: float | None = None,
    unknown_actions: Sequence[str] = (),
) -> Demonstrations:
    """Read an archive of one episode, or of several behind one another with ``episode_ends`` (E,), their ends.

    Arrays: actions (N, D), states (N, S), and where there are some ``timestamps`` (N,) in seconds, ``images/NAME`` or
    ``images.NAME`` (N, H, W, 3) of 8 bits, ``task`` or one of the ``tasks`` for each episode, ``fps``, ``robot``,
    ``state_names`` and ``action_names``. Where there are no states, the action of the step before stands in for them.

    Args:
        path: The file.
        state: Key of the states, or of several arrays that are put side by side.
        action: Key of the actions.
        cameras: Names of those that are read; None for all.
        fps: Steps a second; None for what the file tells.
        unknown_actions: Names of the actions of an archive without the array, which are then NaN; without names such a
            one is refused.

    Raises:
        ConfigError: Neither the file nor ``fps`` tells the steps a second.
        DataError: The file is missing or damaged, lacks an array, has one of another shape, or none of its episodes
            can be used.
    """
    path = Path(path)
    keys = (state,) if isinstance(state, str) else tuple(state)
    arrays = _load(path, {*keys, action}, cameras)
    actions, names = None, tuple(unknown_actions)
    if not unknown_actions or _key(arrays, action):
        actions = matrix(_get(path, arrays, action), f"{path}: {action}")
        names = numbered(action, actions.shape[1])
    action_names = _names(path, arrays, "action_names", names)
    states, state_names = None, stand_in(action_names)
    what, steps = action, 0 if actions is None else len(actions)
    if actions is None or keys != ("states",) or _key(arrays, "states"):
        found = {key: matrix(_get(path, arrays, key), f"{path}: {key}") for key in keys}
        if actions is None:
            what, steps = keys[0], len(found[keys[0]])
        _check_lengths(path, found, what, steps)
        states = np.concatenate(list(found.values()), axis=1)
        state_names = tuple(name for key, part in found.items() for name in numbered(key, part.shape[1]))
        state_names = _names(path, arrays, "state_names", state_names)
    times = None
    if found_times := _key(arrays, "timestamps"):
        times = matrix(arrays[found_times].reshape(-1, 1), f"{path}: {found_times}", np.float64)[:, 0]
    images = {key[7:]: arrays[key] for key in arrays if _is_picture(key, cameras)}
    for name, frames in images.items():
        if not is_pictures(frames):
            raise DataError(
                f"{path}: images of {name} must be uint8 (N, H, W, 3), got {frames.dtype} {frames.shape}; write them "
                "so, or leave the camera out of cameras."
            )
    if missing := [name for name in cameras or () if name not in images]:
        there = ", ".join(key[7:] for key in arrays if _is_picture(key, None))
        raise DataError(f"{path}: there are no images of {missing[0]}; cameras: {there or 'none'}.")
    _check_lengths(path, {"timestamps": times} | {f"images of {k}": v for k, v in images.items()}, what, steps)

    edges, single = _edges(path, arrays.get("episode_ends"), what, steps)
    tasks = [str(text) for text in arrays.get("tasks", arrays.get("task", np.array(""))).ravel()]
    if len(tasks) not in (1, len(edges)):
        raise DataError(f"{path}: tasks must be one for each of the {len(edges):,} episodes, got {len(tasks):,}.")
    parts = [
        Part(
            path.stem if single else f"{path.stem}_{number}",
            None if states is None else states[rows],
            None if actions is None else actions[rows],
            None if times is None else times[rows],
            tasks[number if len(tasks) > 1 else 0],
            {name: frames[rows] for name, frames in images.items()},
        )
        for number, rows in enumerate(edges)
    ]
    if fps is None and times is None and (told := arrays.get("fps")) is not None:
        if told.size != 1 or told.dtype.kind not in "fiu" or not 0 < told.item() < math.inf:
            raise DataError(f"{path}: fps must be one number above 0, got {told.dtype} {told.shape}; set fps.")
        fps = float(told.item())
    robot = str(arrays.get("robot", ""))
    return assemble(path, parts, state_names, action_names, fps, robot, [])


def write_npz(
    path: str | Path,
    episode: Episode,
    *,
    state_names: Sequence[str] = (),
    action_names: Sequence[str] = (),
) -> None:
    """Write an episode as :func:`read_npz` reads it; its name is that of the file.

    Args:
        path: The file, which appears whole or not at all.
        episode: What to write.
        state_names: Names of the S state dimensions; numbers where there are none.
        action_names: Of the D action dimensions.

    Raises:
        ConfigError: The number of names is another.
        DataError: The episode cannot be used, or the file cannot be written.
    """
    episode.check()
    arrays: dict[str, Any] = {
        "states": episode.states,
        "actions": episode.actions,
        "timestamps": episode.times,
        "task": np.array(episode.task),
        "state_names": np.array(given_names("state", state_names, episode.states.shape[1]), dtype=np.str_),
        "action_names": np.array(given_names("action", action_names, episode.actions.shape[1]), dtype=np.str_),
    }
    for name, frames in episode.images.items():
        arrays[f"images/{name}"] = np.stack([frames[i] for i in range(len(frames))])
    with whole_file(Path(path)) as file:
        np.savez_compressed(file, **arrays)


def _load(path: Path, wanted: set[str], cameras: Sequence[str] | None) -> dict[str, NDArray[Any]]:
    """Arrays of an archive that are used, by key; other ones may be of any kind."""
    used = wanted | {"timestamps", "episode_ends", "task", "tasks", "fps", "robot", "state_names", "action_names"}
    used |= {key.removesuffix("s") for key in (*wanted & set(FIRST), "timestamps")}
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {
                key: archive[key] if key in used or _is_picture(key, cameras) else np.zeros(0) for key in archive.files
            }
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct the path.") from None
    except OSError as e:
        raise DataError(f"{path}: the file cannot be opened ({e.strerror or e}); check what it is.") from None
    except MemoryError:
        raise DataError(f"{path}: does not fit into memory; split it, or choose fewer cameras.") from None
    except Exception:  # NumPy, zipfile and zlib each have their own
        raise DataError(
            f"{path}: is no archive of plain arrays, or is empty, damaged or cut short; write it with numpy.savez."
        ) from None


def _key(arrays: dict[str, NDArray[Any]], key: str) -> str:
    """The key as it is in the file, perhaps in the singular; empty where it is not."""
    return next((k for k in (key, key.removesuffix("s")) if k in arrays), "")


def _get(path: Path, arrays: dict[str, NDArray[Any]], key: str) -> NDArray[Any]:
    if not (found := _key(arrays, key) if key in FIRST else key if key in arrays else ""):
        raise DataError(f"{path}: there is no array {key!r}; arrays: {', '.join(sorted(arrays)) or 'none'}.")
    return arrays[found]


def _names(path: Path, arrays: dict[str, NDArray[Any]], key: str, default: tuple[str, ...]) -> tuple[str, ...]:
    names = arrays.get(key)
    if names is None:
        return default
    if names.shape != (len(default),) or names.dtype.kind != "U":
        raise DataError(f"{path}: {key} must be {len(default)} texts, got {names.dtype} {names.shape}.")
    return tuple(map(str, names))


def _check_lengths(path: Path, arrays: dict[str, Any], what: str, steps: int) -> None:
    for name, array in arrays.items():
        if array is not None and len(array) != steps:
            raise DataError(f"{path}: {name} has {len(array):,} steps, but {what} has {steps:,}; write both again.")


def _edges(path: Path, ends: NDArray[Any] | None, what: str, steps: int) -> tuple[list[slice], bool]:
    """Rows of each episode, and whether the file is one episode."""
    if ends is None:
        return [slice(0, steps)], True
    if ends.ndim != 1 or ends.dtype.kind not in "iu" or not len(ends):
        raise DataError(f"{path}: episode_ends must be whole numbers (E,), got {ends.dtype} {ends.shape}.")
    edges = [0, *map(int, ends)]
    if sorted(edges) != edges or edges[-1] != steps:
        raise DataError(
            f"{path}: episode_ends must not fall and end with the {steps:,} steps of {what}, got "
            f"{', '.join(map(str, edges[1:4]))} .. {edges[-1]}."
        )
    return [slice(first, last) for first, last in itertools.pairwise(edges)], False


def _is_picture(key: str, cameras: Sequence[str] | None) -> bool:
    return key.startswith(("images/", "images.")) and (cameras is None or key[7:] in cameras)


# ---------------------------------------------------------------- CSV


def read_csv(
    path: str | Path,
    *,
    columns: ColumnMap | None = None,
    fps: float | None = None,
    unknown_actions: Sequence[str] = (),
) -> Demonstrations:
    """Read a table with a step a row, columns set apart by comma, semicolon or tab, names in the first line.

    A row that cannot be used loses its episode, and no other one. Where there are no columns of the state, the action
    of the step before stands in for it.

    Args:
        path: The file, in UTF-8.
        columns: Which columns mean what.
        fps: Steps a second; None for what the time stamps tell.
        unknown_actions: Names of the actions of a table without such columns, which are then NaN; without names such a
            one is refused.

    Raises:
        ConfigError: Neither time stamps nor ``fps`` tell the steps a second.
        DataError: The file is missing, no text, or empty, lacks a column, or none of its episodes can be used.
    """
    path, columns = Path(path), columns or ColumnMap()
    text = _text(path)
    first = text.partition("\n")[0]
    reader = csv.reader(StringIO(text, newline=""), delimiter=max(",;\t", key=first.count), strict=True)
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as e:
        raise DataError(f"{path}, line 1: this is not a row of a table ({e}); mend the line.") from None
    if doubled := [name for name in header if name and header.count(name) > 1]:
        raise DataError(f"{path}, line 1: there are two columns {doubled[0]!r}; rename one.")
    time, episode, task = (_optional(path, header, columns, what) for what in ("time", "episode", "task"))
    actions: dict[int, str] = {}
    named = columns.action != ColumnMap.action or any(_begins(name, "action") for name in header)
    if named or not unknown_actions:
        actions = _columns(path, header, columns.action, {time, episode, task})
    states: dict[int, str] = {}
    if not actions or columns.state != ColumnMap.state or any(_begins(name, "state") for name in header):
        states = _columns(path, header, columns.state, {time, episode, task, *actions})
    first_number = int(time is not None)
    table = _Table(path, header, episode, task, [*([] if time is None else [time]), *states, *actions])
    table.read(reader)
    if not table.rows and not table.bad:
        raise DataError(f"{path}: there is no row below the header; {_COPY}.")

    left = table.left_out()
    lost = {note.source for note in left}
    parts = []
    for own, rows in table.rows.items():
        if f"{path}: {_episode_name(path, own)}" in lost:
            continue
        values = np.array(rows, dtype=np.float64)
        with np.errstate(over="ignore"):
            plain = values[:, first_number:].astype(np.float32)
        parts.append(
            Part(
                _episode_name(path, own),
                plain[:, : len(states)] if states else None,
                plain[:, len(states) :] if actions else None,
                None if time is None else values[:, 0],
                table.tasks[own],
            )
        )
    action_names = tuple(actions.values()) or tuple(unknown_actions)
    return assemble(path, parts, tuple(states.values()) or stand_in(action_names), action_names, fps, "", left)


def write_csv(
    path: str | Path,
    episodes: Sequence[Episode],
    *,
    state_names: Sequence[str] = (),
    action_names: Sequence[str] = (),
) -> None:
    """Write episodes as one table that :func:`read_csv` reads; pictures have no place in it.

    Args:
        path: The file, which appears whole or not at all.
        episodes: Of the same dimensions.
        state_names: Names of the S state dimensions; numbers where there are none.
        action_names: Of the D action dimensions.

    Raises:
        ConfigError: No episode, or the number of names is another.
        DataError: An episode cannot be used, or the file cannot be written.
    """
    if not episodes:
        raise ConfigError(f"{path}: there is no episode to write.")
    if len({episode.name for episode in episodes}) < len(episodes):
        raise DataError(f"{path}: two episodes have the same name; rename one.")
    columns = ["timestamp", "episode", "task"]
    for first, names, width in (
        ("state", state_names, episodes[0].states.shape[1]),
        ("action", action_names, episodes[0].actions.shape[1]),
    ):
        given = given_names(first, names, width)
        columns += [name if name == f"{first}_{i}" else f"{first}.{name}" for i, name in enumerate(given)]
    with whole_file(Path(path)) as file, StringIO(newline="") as text:
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        for episode in episodes:
            episode.check()
            numbers = np.hstack([episode.states, episode.actions])
            if numbers.shape[1] != len(columns) - 3:
                raise DataError(f"{path}: {episode.name} has other dimensions than {episodes[0].name}.")
            for values, time in zip(numbers, episode.times, strict=True):
                writer.writerow([f"{time:.6f}", episode.name, episode.task, *(f"{x:.9g}" for x in values)])
        file.write(text.getvalue().encode())


class _Table:
    """Rows of a table by episode, and what is wrong with others.

    Args:
        path: The file.
        header: Names of the columns.
        episode: Place of the episodes.
        task: Place of the tasks.
        numbers: Places of the numbers.
    """

    def __init__(
        self,
        path: Path,
        header: list[str],
        episode: int | None,
        task: int | None,
        numbers: list[int],
    ) -> None:
        self.path, self.header = path, header
        self.episode, self.task, self.numbers = episode, task, numbers
        self.rows: dict[str, list[list[float]]] = {}
        self.tasks: dict[str, str] = {}
        self.bad: list[tuple[str, str, str]] = []  # episode, that of the row before, what is wrong

    def read(self, reader: Any) -> None:
        """Sort all rows in; blank ones are passed over."""
        own = ""
        while True:
            row, rule = [], ""
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                rule = f"is not a row of a table ({e})"
            if not rule and not any(cell.strip() for cell in row):
                continue
            if not rule and len(row) != len(self.header):
                rule = f"must have the {len(self.header)} columns of the header, got {len(row)}"
            cell = row[self.episode].strip() if self.episode is not None and len(row) > self.episode else own
            if rule:
                self.bad.append((cell, own, f"line {reader.line_num} {rule}"))
                continue
            own = cell
            values = [self._number(row[i]) for i in self.numbers]
            if all(map(math.isfinite, values)):
                self.rows.setdefault(own, []).append(values)
                self.tasks.setdefault(own, "" if self.task is None else row[self.task].strip())
            else:
                self.bad.append((own, own, f"line {reader.line_num} {self._wrong(row)}"))

    def left_out(self) -> list[LeftOut]:
        """The first bad row of each episode."""
        first: dict[str, LeftOut] = {}
        for own, before, rule in self.bad:
            # a row with a column too few or too many may tell the episode in another place
            where = f"{self.path}: {_episode_name(self.path, own if own in self.rows else before)}"
            first.setdefault(where, LeftOut(where, rule, "mend the row, or leave the episode out"))
        return list(first.values())

    @staticmethod
    def _number(text: str) -> float:
        try:
            return float(text)
        except ValueError:
            return math.nan

    def _wrong(self, row: list[str]) -> str:
        at = next(i for i in self.numbers if not math.isfinite(self._number(row[i])))
        return f"must have a finite number in the column {self.header[at]!r}, got {row[at]!r}"


def _episode_name(path: Path, text: str) -> str:
    return f"episode_{text}" if text.isdigit() else text or path.stem


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; correct the path.") from None
    except OSError as e:
        raise DataError(f"{path}: the file cannot be opened ({e.strerror or e}); check what it is.") from None
    if not data.strip():
        raise DataError(f"{path}: the file is empty; {_COPY}.")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(
            f"{path}, line {line}: this is no text in UTF-8; save it as that, or correct its ending."
        ) from None
    if "\0" in text:
        raise DataError(f"{path}: holds binary data, and CSV is text; correct its ending, or save it in UTF-8.")
    return text


def _optional(path: Path, header: list[str], columns: ColumnMap, what: str) -> int | None:
    """Place of a column that a table may lack, unless the user named it."""
    name = getattr(columns, what)
    if name in header:
        return header.index(name)
    if name and name != getattr(ColumnMap, what):
        raise DataError(f"{path}: there is no column {name!r} for the {what}; columns: {', '.join(header)}.")
    return None


def _begins(column: str, wanted: str) -> bool:
    """Whether a column is one of those that begin so: ``state`` is the beginning of ``state_0``, not of ``stated``."""
    behind = column.removeprefix(wanted)
    return len(behind) < len(column) and (not wanted[-1:].isalnum() or not behind[:1].isalpha())


def _columns(
    path: Path, header: list[str], wanted: str | Sequence[str], taken: Container[int | None]
) -> dict[int, str]:
    """Columns given by name, or by what they begin with: names of the dimensions by place."""
    found: dict[int, str] = {}
    for name in (wanted,) if isinstance(wanted, str) else wanted:
        own = {i: one for i, one in enumerate(header) if one == name}
        own = own or {i: _behind(one, name) for i, one in enumerate(header) if _begins(one, name)}
        own = {i: one for i, one in own.items() if i not in taken and i not in found}
        if not own:
            raise DataError(
                f"{path}: no free column is called {name!r} or begins so; columns: {', '.join(header)}. Say which are "
                "the state and the action."
            )
        found |= own
    return found


def _behind(column: str, wanted: str) -> str:
    """What is behind the dot, unless it is a mere number."""
    behind = column.removeprefix(wanted.removesuffix(".") + ".")
    return column if behind.isdigit() or not behind else behind
