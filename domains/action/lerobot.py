"""Demonstrations as LeRobot keeps them: versions 2.0 and 2.1 (a file an episode) and 3.0 (many episodes a file).

Shapes: T steps of an episode, S state dimensions, D action dimensions.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from vertebra.domains.action.episodes import Demonstrations, Episode, Floats, Frames, LeftOut
from vertebra.domains.action.lerobot_writing import CHUNK, DATA_PATHS, VIDEO_PATHS, write_lerobot
from vertebra.domains.action.reading import check_observed, no_actions
from vertebra.domains.action.video import EncodedFrames, VideoFrames, can_read_videos
from vertebra.errors import ConfigError, DataError, MissingExtraError

__all__ = ["is_lerobot", "read_lerobot", "write_lerobot"]

_BROKEN = (pa.ArrowException, OSError)
"""What pyarrow raises on a damaged file."""


@dataclass(frozen=True, kw_only=True)
class _Listed:
    """An episode as the tables in ``meta`` list it."""

    number: int
    path: Path
    length: int | None = None
    task: str = ""
    first: int | None = None  # its first step within the whole set; None where it has a file of its own
    videos: Mapping[str, tuple[Path, float]] = field(default_factory=dict)  # by feature: file, and seconds in it


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """What is read of each episode, and how."""

    state: Mapping[str, int]  # features, and their columns
    action: str  # empty where there is none
    action_width: int
    cameras: Mapping[str, str]  # features by name
    fps: float
    tasks: Mapping[int, str]

    def columns(self) -> list[str]:
        usual = ("timestamp", "frame_index", "task_index", "episode_index")
        return [*self.state, *filter(None, [self.action]), *self.cameras.values(), *usual]


def is_lerobot(folder: Path) -> bool:
    """Whether the folder is a data set of LeRobot."""
    return (folder / "meta" / "info.json").is_file()


def read_lerobot(
    folder: Path,
    *,
    state: str = "observation.state",
    action: str = "action",
    cameras: tuple[str, ...] | None = None,
    extra_state: tuple[str, ...] = (),
    limit: int | None = None,
    unknown_actions: Sequence[str] = (),
) -> Demonstrations:
    """Read a data set of LeRobot, of version 2.0, 2.1 or 3.0.

    An episode that is listed but absent, damaged or not finite is left out and named in ``left_out``. The task of an
    episode is that of its first step. Pictures are decoded when they are asked for; those of parquet files stay in
    memory as they are stored.

    Args:
        folder: Holds ``meta/info.json``.
        state: Feature with the state; empty for none.
        action: Feature with the actions.
        cameras: Features with pictures, with or without ``observation.images.`` in front. None takes those that every
            episode has and can be read.
        extra_state: Further features, put behind the state.
        limit: Read no more episodes than this.
        unknown_actions: Names of the actions of a data set without the feature, which are then NaN; without names such
            a one is refused.

    Raises:
        DataError: The folder is no such data set, lacks a feature that was named, or no episode can be read.
        MissingExtraError: A camera that was named is a video, and ``av`` is not installed.
        ConfigError: ``limit`` is below 1.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit: must be at least 1, got {limit}.")
    info = _read_info(folder)
    features = info["features"]
    where = folder / "meta" / "info.json"
    keys = ((state,) if state else ()) + extra_state
    action_names = tuple(unknown_actions)
    if unknown_actions and action not in features:
        action = ""
    for key in filter(None, (*keys, action)):
        _need_vector(where, features, key)
    if action:
        action_names = _names(action, features[action])
    notes: list[LeftOut] = [] if action else [no_actions(folder)]
    listed = _list_v3(folder, info, notes) if info["major"] == 3 else _list_v2(folder, info)
    there = [each for each in listed if each.path.is_file()]
    if not there:
        raise DataError(f"{folder}: none of the {len(listed):,} episodes in meta has its file; is data/ there?")
    if absent := [each.number for each in listed if not each.path.is_file()]:
        rule = f"{len(absent):,} of {len(listed):,} episodes in meta have no file ({_ranges(absent)})"
        notes.append(LeftOut(str(folder), rule, "they are left out"))
    chosen = _choose_cameras(where, features, cameras, there, notes)
    wanted = _Wanted(
        state={key: math.prod(features[key]["shape"]) for key in keys},
        action=action,
        action_width=len(action_names),
        cameras=chosen,
        fps=float(info["fps"]),
        tasks=_read_tasks(folder),
    )
    episodes: list[Episode] = []
    places: dict[int, int] = {}  # position by number
    for each, content in _read_each(there, wanted):
        if len(episodes) == limit:
            break
        name = f"episode_{each.number:06d}"
        try:
            if isinstance(content, Exception):
                raise DataError(f"{each.path}: {name}: {_why(each.path, content)}; copy it again or leave it out.")
            episode = _episode(name, each, content, wanted)
            if action:
                episode.check()
            else:
                check_observed(episode)
        except DataError as e:
            notes.append(_left_out(f"{each.path}: {name}", e))
            continue
        if each.length is not None and each.length != len(episode):
            rule = f"has {len(episode):,} steps, but meta says {each.length:,}"
            notes.append(LeftOut(f"{each.path}: {name}", rule, "it is used as it is"))
        places[each.number] = len(episodes)
        episodes.append(episode)
    if not episodes:
        raise DataError(f"{folder}: no episode can be read; the first reason: {notes[-len(there)]}")
    return Demonstrations(
        episodes=tuple(episodes),
        fps=wanted.fps,
        state_names=_state_names(features, keys),
        action_names=action_names,
        robot=str(info.get("robot_type") or ""),
        splits=_splits(where, info.get("splits"), places, notes),
        left_out=tuple(notes),
    )


# ---------------------------------------------------------------- meta


def _read_info(folder: Path) -> dict[str, Any]:
    """Return ``info.json``, checked, and with the first part of its version as ``major``."""
    path = folder / "meta" / "info.json"
    if not path.is_file():
        raise DataError(f"{folder}: has no meta/info.json; give the folder of a LeRobot data set.")
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError(f"{path}: is not JSON ({e}); copy it again.") from e
    if not isinstance(info, dict) or not isinstance(info.get("features"), dict):
        raise DataError(f"{path}: must be an object with 'features'; is it the file of a LeRobot data set?")
    fps = info.get("fps")
    if not isinstance(fps, int | float) or not 0 < fps < math.inf:
        raise DataError(f"{path}: 'fps' must be above 0, got {fps!r}; set it to the steps a second.")
    version = re.fullmatch(r"v?([23])\.\d+.*", str(info.get("codebase_version")))
    if not version:
        raise DataError(
            f"{path}: codebase_version must be v2.0, v2.1 or v3.0, got {info.get('codebase_version')!r}; convert the "
            "data set with LeRobot's own scripts."
        )
    return {**info, "major": int(version[1])}


def _list_v2(folder: Path, info: Mapping[str, Any]) -> list[_Listed]:
    path = folder / "meta" / "episodes.jsonl"
    rows = _read_lines(path, "episode_index") if path.is_file() else []
    if not rows:
        rows = [{"episode_index": i} for i in range(int(info.get("total_episodes") or 0))]
    listed = []
    for row in rows:
        number = int(row["episode_index"])
        numbers = {"episode_index": number, "episode_chunk": number // int(info.get("chunks_size") or CHUNK)}
        videos = {key: (_place(folder, info, numbers, key), 0.0) for key in _videos(info["features"])}
        listed.append(
            _Listed(
                number=number,
                path=_place(folder, info, numbers),
                length=row.get("length"),
                task=str((row.get("tasks") or [""])[0]),
                videos=videos,
            )
        )
    return sorted(listed, key=lambda each: each.number)


def _list_v3(folder: Path, info: Mapping[str, Any], notes: list[LeftOut]) -> list[_Listed]:
    listed = []
    paths = sorted((folder / "meta" / "episodes").glob("*/*.parquet"))
    for path in paths:
        try:
            file = pq.ParquetFile(path)
            rows = file.read([n for n in file.schema_arrow.names if not n.startswith("stats/")]).to_pylist()
            for row in rows:
                data = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
                videos = {}
                for key in _videos(info["features"]):
                    if (chunk := row.get(f"videos/{key}/chunk_index")) is not None:
                        numbers = {"chunk_index": chunk, "file_index": row[f"videos/{key}/file_index"]}
                        start = float(row[f"videos/{key}/from_timestamp"])
                        videos[key] = (_place(folder, info, numbers, key), start)
                listed.append(
                    _Listed(
                        number=row["episode_index"],
                        path=_place(folder, info, data),
                        length=row.get("length"),
                        task=str((row.get("tasks") or [""])[0]),
                        first=int(row.get("dataset_from_index") or 0),
                        videos=videos,
                    )
                )
        except (*_BROKEN, KeyError) as e:
            rule = f"has no column {e}" if isinstance(e, KeyError) else _why(path, e)
            notes.append(LeftOut(str(path), rule, "its episodes are left out"))
    if not listed:
        reason = f"; the first reason: {notes[0]}" if notes else f"; {len(paths)} files in meta/episodes."
        raise DataError(f"{folder}: meta/episodes lists no episode{reason}")
    return sorted(listed, key=lambda each: each.number)


def _place(folder: Path, info: Mapping[str, Any], numbers: Mapping[str, int], video: str | None = None) -> Path:
    what, usual = ("data_path", DATA_PATHS) if video is None else ("video_path", VIDEO_PATHS)
    pattern = info.get(what) or usual[info["major"]]
    try:
        return folder / pattern.format(video_key=video, **numbers)
    except (LookupError, ValueError, TypeError, AttributeError) as e:
        raise DataError(
            f"{folder / 'meta' / 'info.json'}: {what} is {pattern!r}, which cannot be filled in ({e}); "
            f"expected something like {usual[info['major']]!r}."
        ) from e


def _read_lines(path: Path, *needed: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
                for name in needed:
                    rows[-1][name]
            except (ValueError, LookupError, TypeError) as e:
                raise DataError(
                    f"{path}: line {number} must be an object with {', '.join(needed)}; copy the file again."
                ) from e
    return rows


def _read_tasks(folder: Path) -> dict[int, str]:
    path = folder / "meta" / "tasks.parquet"
    if not path.is_file():
        path = path.with_suffix(".jsonl")
        rows = _read_lines(path, "task_index", "task") if path.is_file() else []
        return {int(row["task_index"]): str(row["task"]) for row in rows}
    try:
        table = pq.ParquetFile(path).read()
    except _BROKEN as e:
        raise DataError(f"{path}: {_why(path, e)}; copy it again.") from e
    # pandas keeps the texts as the index, which may have no name.
    texts = [name for name in table.column_names if _is_text(table.schema.field(name).type)]
    if "task_index" not in table.column_names or not texts:
        raise DataError(f"{path}: must have a column task_index and one of texts, got {table.column_names}.")
    text = "task" if "task" in texts else texts[0]
    return dict(zip(table["task_index"].to_pylist(), map(str, table[text].to_pylist()), strict=True))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


# ---------------------------------------------------------------- features


def _videos(features: Mapping[str, Any]) -> list[str]:
    return [key for key, feature in features.items() if feature.get("dtype") == "video"]


def _is_vector(feature: Mapping[str, Any]) -> bool:
    return re.match("u?int|float|bool", str(feature.get("dtype"))) is not None and bool(feature.get("shape"))


def _need_vector(where: Path, features: Mapping[str, Any], key: str) -> None:
    if key not in features or not _is_vector(features[key]):
        usual = ("timestamp", "frame_index", "episode_index", "index", "task_index")
        known = [
            f"{k} ({'x'.join(map(str, f['shape']))})" for k, f in features.items() if _is_vector(f) and k not in usual
        ]
        raise DataError(f"{where}: has no vector feature {key!r}; name one of: {', '.join(known) or 'none'}.")


def _names(key: str, feature: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of its columns; numbered ones where the file has none, or one name for two."""
    width = math.prod(feature["shape"])
    names = feature.get("names")
    if isinstance(names, dict) and all(isinstance(place, int) for place in names.values()):
        names = [name for name, _ in sorted(names.items(), key=lambda each: each[1])]
    flat = tuple(_flat(names))
    if len(set(flat)) == len(flat) == width:
        return flat
    return tuple(f"{key.rpartition('.')[2]}_{i}" for i in range(width))


def _flat(names: object) -> Iterator[str]:
    if isinstance(names, Mapping):
        names = names.values()
    if isinstance(names, str | int | float):
        yield str(names)
    elif isinstance(names, Iterable):
        for each in names:
            yield from _flat(each)


def _state_names(features: Mapping[str, Any], keys: Sequence[str]) -> tuple[str, ...]:
    names: list[str] = []
    for key in keys:
        own = _names(key, features[key])
        if set(own) & set(names):
            own = tuple(f"{key}.{name}" for name in own)
        names += own
    return tuple(names)


def _choose_cameras(
    where: Path,
    features: Mapping[str, Any],
    asked: Sequence[str] | None,
    listed: Sequence[_Listed],
    notes: list[LeftOut],
) -> dict[str, str]:
    """Return the features with pictures to read, by name; without ``asked`` all that work, and a note for others."""
    keys = {_camera_name(key): key for key, f in features.items() if f.get("dtype") in ("image", "video")}
    if asked is not None:
        names = [_camera_name(name) for name in asked]
        if unknown := [name for name in names if name not in keys]:
            raise DataError(f"{where}: has no camera {unknown[0]!r}; cameras: {', '.join(keys) or 'none'}.")
        keys = {name: keys[name] for name in names}
    chosen = {}
    for name, key in keys.items():
        problem = None
        if _is_depth(features[key]):
            problem = f"the camera {name} gives depth, not colours"
        elif features[key]["dtype"] == "video":
            absent = sum(key not in each.videos or not each.videos[key][0].is_file() for each in listed)
            if absent == len(listed) or (absent and asked is None):
                problem = f"the camera {name} has no video of {absent:,} of {len(listed):,} episodes"
            elif not can_read_videos():
                error = MissingExtraError("av", "video", f"the camera {name}")
                if asked is not None:
                    raise error
                problem = str(error)
        elif not any(_holds_pictures(each.path, key) for each in listed):
            problem = f"the camera {name} has no pictures in the data files"
        if problem is None:
            chosen[name] = key
        elif asked is not None:
            raise DataError(f"{where}: {problem}; fetch them, or do not name the camera.")
        else:
            notes.append(LeftOut(str(where), problem, "episodes are read without it"))
    return chosen


def _camera_name(key: str) -> str:
    return key.removeprefix("observation.images.").removeprefix("observation.")


def _is_depth(feature: Mapping[str, Any]) -> bool:
    marks = {**(feature.get("video_info") or {}), **(feature.get("info") or {})}
    return bool(marks.get("is_depth_map") or marks.get("video.is_depth_map"))


def _holds_pictures(path: Path, key: str) -> bool:
    try:
        schema = pq.read_schema(path)
    except _BROKEN:
        return False
    kind = schema.field(key).type if key in schema.names else None
    return kind is not None and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _splits(where: Path, splits: Any, places: Mapping[int, int], notes: list[LeftOut]) -> dict[str, tuple[int, ...]]:
    """Return positions of the episodes by split; nothing where there are not two or more splits."""
    found = {}
    for name, text in (splits or {}).items():
        match = re.fullmatch(r"(\d+):(\d+)", str(text))
        if match is None:
            notes.append(LeftOut(str(where), f"the split {name!r} must be like '0:50', got {text!r}", "it is not used"))
            continue
        found[name] = tuple(places[i] for i in range(int(match[1]), int(match[2])) if i in places)
    found = {name: numbers for name, numbers in found.items() if numbers}
    return found if len(found) > 1 else {}


# ---------------------------------------------------------------- episodes


def _read_each(listed: Sequence[_Listed], wanted: _Wanted) -> Iterator[tuple[_Listed, pa.Table | Exception]]:
    """Read every file once and cut it in its episodes; what a damaged file raises stands for each of them."""
    path, table, first = None, None, 0
    for each in listed:
        if each.path != path:
            path, first = each.path, each.first or 0
            try:
                file = pq.ParquetFile(path)
                # Names are those of LeRobot, with dots, so that more columns than these may be read.
                table = file.read([c for c in wanted.columns() if c in file.schema_arrow.names], use_threads=False)
            except _BROKEN as e:
                table = e
        part = table
        if isinstance(table, pa.Table) and each.first is not None:
            if "episode_index" in table.column_names:
                rows = np.flatnonzero(table["episode_index"].to_numpy() == each.number)
                together = len(rows) and rows[-1] - rows[0] < len(rows)
                part = table.slice(rows[0], len(rows)) if together else table.take(rows)
            elif each.length is not None:
                part = table.slice(each.first - first, each.length)
        yield each, part


def _episode(name: str, listed: _Listed, table: pa.Table, wanted: _Wanted) -> Episode:
    where = f"{listed.path}: {name}"
    states = [_numbers(where, table, key, width) for key, width in wanted.state.items()]
    actions = np.full((len(table), wanted.action_width), np.nan)
    if wanted.action:
        actions = _numbers(where, table, wanted.action, wanted.action_width)
    if "timestamp" in table.column_names:
        stamps = _numbers(where, table, "timestamp", 1)[:, 0].astype(np.float64)
    elif "frame_index" in table.column_names:
        stamps = _numbers(where, table, "frame_index", 1)[:, 0] / wanted.fps
    else:
        stamps = np.arange(len(actions)) / wanted.fps
    task = listed.task
    if len(actions) and "task_index" in table.column_names:
        task = wanted.tasks.get(table["task_index"][0].as_py(), task)
    images: dict[str, Frames] = {}
    for camera, key in wanted.cameras.items():
        if key in table.column_names:
            files = [picture and picture["bytes"] for picture in table[key].to_pylist()]
            if None in files:
                raise DataError(f"{where}: {key} is empty at step {files.index(None)}; write the data set again.")
            images[camera] = EncodedFrames(files, f"{where}: {key}")
        elif key in listed.videos and listed.videos[key][0].is_file():
            path, start = listed.videos[key]
            images[camera] = VideoFrames(path, start + stamps, 0.5 / wanted.fps)
        else:
            raise DataError(f"{where}: has no pictures of the camera {camera}; fetch them, or do not name the camera.")
    return Episode(
        name=name,
        source=str(listed.path),
        states=_floats(np.concatenate(states, axis=1) if states else np.zeros((len(actions), 0))),
        actions=_floats(actions),
        times=stamps - stamps[0] if len(stamps) else stamps,
        task=task,
        images=images,
    )


def _numbers(where: str, table: pa.Table, key: str, width: int) -> NDArray[Any]:
    """Return a column of numbers, or of lists of them, as (T, width)."""
    if key not in table.column_names:
        raise DataError(f"{where}: has no column {key!r}; write the data set again.")
    column = table[key].combine_chunks()
    steps = len(column)
    while pa.types.is_nested(column.type) and not pa.types.is_struct(column.type):
        if column.null_count or len(set(column.value_lengths().to_pylist())) > 1:
            raise DataError(f"{where}: {key} has steps of different length; mend or leave it out.")
        column = column.flatten()
    if not pa.types.is_primitive(column.type) or len(column) != steps * width:
        found = f"{len(column) / max(1, steps):g} x {column.type}"
        raise DataError(
            f"{where}: {key} holds {found} a step, but meta says {width} numbers; write the data set again."
        )
    values: NDArray[Any] = column.to_numpy(zero_copy_only=False)
    return values.reshape(steps, width)


def _floats(values: NDArray[Any]) -> Floats:
    with np.errstate(over="ignore"):  # Episode.check refuses what becomes infinite
        return values.astype(np.float32)


def _left_out(where: str, error: DataError) -> LeftOut:
    rule, _, advice = str(error).removeprefix(f"{where}: ").removesuffix(".").rpartition("; ")
    return LeftOut(where, rule, advice) if rule else LeftOut(where, advice)


def _why(path: Path, error: Exception) -> str:
    """Say what is wrong with a file that pyarrow refuses."""
    try:
        with path.open("rb") as stream:
            start = stream.read(40)
    except OSError as e:
        return f"cannot be opened ({e.strerror})"
    if not start:
        return "is empty"
    if start.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the data (run: git lfs pull)"
    return f"is damaged or no parquet file ({' '.join(str(error).split())[:120].rstrip('.')})"


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ranges, at most four."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = [f"{first}" if first == last else f"{first} to {last}" for first, last in runs[:4]]
    return ", ".join(texts) + (", ..." if len(runs) > 4 else "")
