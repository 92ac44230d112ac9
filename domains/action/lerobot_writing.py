"""Writes demonstrations as LeRobot keeps them, so that its own loader takes them.

Shapes: T steps of an episode, S state dimensions, D action dimensions.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from vertebra.domains.action.episodes import Demonstrations, Episode, Frames
from vertebra.errors import ConfigError, DataError, UnknownNameError

VERSIONS = ("v2.0", "v2.1", "v3.0")
DATA_PATHS = {
    2: "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
    3: "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
}
VIDEO_PATHS = {
    2: "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    3: "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
}
CHUNK = 1000
"""Files a folder."""
FILE_MB = 100
"""Size from which a data file of version 3 takes no more episodes."""
PICTURE = pa.struct({"bytes": pa.binary(), "path": pa.string()})

Stats = dict[str, dict[str, NDArray[Any]]]
"""``min``, ``max``, ``mean``, ``std`` and ``count`` by feature."""


@dataclass(frozen=True)
class _Written:
    """What meta says of an episode."""

    number: int
    first: int
    length: int
    task: str
    stats: Stats
    file: int = 0  # number of its data file, version 3


def write_lerobot(folder: Path, demonstrations: Demonstrations, *, version: str = "v2.1") -> list[Path]:
    """Write a data set of LeRobot; the same demonstrations give the same bytes.

    States become ``observation.state``, pictures PNGs in the data files under ``observation.images.NAME``.
    ``meta/info.json`` is written last: without it the folder is no data set.

    Args:
        folder: New, or without ``meta`` and ``data``.
        demonstrations: With at least one episode.
        version: ``v2.0``, ``v2.1`` or ``v3.0``.

    Returns:
        The files.

    Raises:
        UnknownNameError: There is no such version.
        ConfigError: The folder holds a data set or cannot be written to, or a name or split cannot be written.
        DataError: There is no episode, or one differs from the others in its dimensions or cameras.
    """
    if version not in VERSIONS:
        raise UnknownNameError("version of LeRobot", version, VERSIONS)
    if taken := [name for name in ("meta", "data") if (folder / name).exists()]:
        raise ConfigError(f"{folder}: holds {taken[0]}/ already; remove it or choose another folder.")
    features = _features(demonstrations)
    splits = _splits(demonstrations)
    files = _Files(folder)
    try:
        write = _write_v3 if version == "v3.0" else _write_v2
        written = write(files, demonstrations, features)
        _write_meta(files, demonstrations, written, version)
        files.json("meta/info.json", _info(demonstrations, written, version) | {"splits": splits, "features": features})
    except BaseException:
        for name in ("meta", "data"):
            shutil.rmtree(folder / name, ignore_errors=True)
        raise
    return files.done


class _Files:
    """Files of a folder, each written under another name first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.done: list[Path] = []

    def write(self, name: str, content: Callable[[Path], None]) -> None:
        path = self.folder / name
        temporary = path.with_name(f"{path.name}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            content(temporary)
            os.replace(temporary, path)
        except OSError as e:
            raise ConfigError(f"{path}: cannot be written ({e.strerror or e}); choose another folder.") from e
        self.done.append(path)

    def json(self, name: str, content: object) -> None:
        text = json.dumps(content, indent=4, ensure_ascii=False) + "\n"
        self.write(name, lambda path: _put(path, text))

    def lines(self, name: str, rows: Sequence[object]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        self.write(name, lambda path: _put(path, text))

    def tables(self, name: str, tables: Sequence[pa.Table]) -> None:
        """Write a parquet file with a row group a table."""

        def content(path: Path) -> None:
            with pq.ParquetWriter(path, tables[0].schema, compression="snappy") as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=max(1, len(table)))

        self.write(name, content)


def _put(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


# ---------------------------------------------------------------- data


def _features(demonstrations: Demonstrations) -> dict[str, dict[str, Any]]:
    """Describe the columns; refuse episodes that do not agree."""
    if not demonstrations.episodes:
        raise DataError("write_lerobot: there is no episode; read or record one first.")
    columns = {"states": demonstrations.state_names, "actions": demonstrations.action_names}
    cameras = list(demonstrations.episodes[0].images)
    for episode in demonstrations.episodes:
        episode.check()
        for name, names in columns.items():
            shape = getattr(episode, name).shape
            if shape != (len(episode), len(names)):
                raise DataError(
                    f"{episode.name}: {name} is {shape}, but there are {len(names)} names; give one a column."
                )
        if list(episode.images) != cameras:
            raise DataError(
                f"{episode.name}: has the cameras {list(episode.images)}, but the first episode {cameras}; "
                "leave out what not all have."
            )
    features: dict[str, dict[str, Any]] = {}
    for key, names in zip(("observation.state", "action"), columns.values(), strict=True):
        if names:
            features[key] = {"dtype": "float32", "shape": [len(names)], "names": list(names)}
    for camera, frames in demonstrations.episodes[0].images.items():
        if "/" in camera:
            raise ConfigError(f"write_lerobot: the camera {camera!r} must have no '/' in its name; rename it.")
        shape = list(frames[0].shape)
        features[_camera(camera)] = {"dtype": "image", "shape": shape, "names": ["height", "width", "channel"]}
    features["timestamp"] = {"dtype": "float32", "shape": [1], "names": None}
    for key in ("frame_index", "episode_index", "index", "task_index"):
        features[key] = {"dtype": "int64", "shape": [1], "names": None}
    return features


def _camera(name: str) -> str:
    return f"observation.images.{name}"


def _splits(demonstrations: Demonstrations) -> dict[str, str]:
    splits = {}
    for name, numbers in demonstrations.splits.items():
        if not numbers or tuple(numbers) != tuple(range(numbers[0], numbers[0] + len(numbers))):
            raise ConfigError(f"write_lerobot: the split {name!r} must be a run of episodes; put them in order first.")
        splits[name] = f"{numbers[0]}:{numbers[-1] + 1}"
    return splits or {"train": f"0:{len(demonstrations.episodes)}"}


def _episodes(
    demonstrations: Demonstrations, features: dict[str, dict[str, Any]]
) -> Iterator[tuple[_Written, pa.Table]]:
    tasks = demonstrations.tasks
    schema = _schema(features)
    first = 0
    for number, episode in enumerate(demonstrations.episodes):
        steps = np.arange(len(episode))
        values: dict[str, NDArray[Any]] = {
            "observation.state": episode.states,
            "action": episode.actions,
            "timestamp": episode.times.astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full_like(steps, number),
            "index": first + steps,
            "task_index": np.full_like(steps, tasks.index(episode.task)),
        }
        stats: Stats = {}
        arrays = []
        for key, feature in features.items():
            if feature["dtype"] == "image":
                camera = key.removeprefix(_camera(""))
                array, stats[key] = _pictures(episode, camera, feature["shape"])
            else:
                column = values[key].reshape(len(episode), -1)
                stats[key] = _stats(column.astype(np.float64))
                array = _array(column, schema.field(key).type)
            arrays.append(array)
        yield (
            _Written(number, first, len(episode), episode.task, stats),
            pa.Table.from_arrays(arrays, schema=schema),
        )
        first += len(episode)


def _schema(features: dict[str, dict[str, Any]]) -> pa.Schema:
    """Return arrow's description of the columns, with the one that the library ``datasets`` looks for."""
    fields = []
    described: dict[str, Any] = {}
    for key, feature in features.items():
        width = feature["shape"][0]
        if feature["dtype"] == "image":
            kind, described[key] = PICTURE, {"_type": "Image"}
        else:
            kind = pa.type_for_alias(feature["dtype"])
            described[key] = {"dtype": feature["dtype"], "_type": "Value"}
            if width > 1:  # a single number is not a list there
                kind = pa.list_(kind, width)
                described[key] = {"feature": described[key], "length": width, "_type": "Sequence"}
        fields.append(pa.field(key, kind))
    return pa.schema(fields, metadata={"huggingface": json.dumps({"info": {"features": described}})})


def _array(column: NDArray[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_fixed_size_list(kind):
        return pa.FixedSizeListArray.from_arrays(pa.array(column.ravel(), kind.value_type), type=kind)
    return pa.array(column[:, 0], kind)


def _pictures(episode: Episode, camera: str, shape: list[int]) -> tuple[pa.Array, dict[str, NDArray[Any]]]:
    """Return a column of PNGs, and statistics of the colours, from 0 to 1, each (3, 1, 1)."""
    frames: Frames = episode.images[camera]
    files, sums = [], []
    for step in range(len(episode)):
        frame = np.asarray(frames[step])
        if frame.dtype != np.uint8 or list(frame.shape) != shape or shape[2:] != [3]:
            raise DataError(
                f"{episode.name}: the picture of {camera} at step {step} is {frame.dtype} {frame.shape}; all must be "
                f"uint8 and of one size (H, W, 3), that of the first is {tuple(shape)}."
            )
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, "PNG")
        files.append({"bytes": stream.getvalue(), "path": f"frame-{step:06d}.png"})
        colours = frame.reshape(-1, 3) / 255
        sums.append((colours.min(0), colours.max(0), colours.mean(0), (colours**2).mean(0)))
    least, most, mean, square = (np.stack(each) for each in zip(*sums, strict=True))
    stats = {
        "min": least.min(0),
        "max": most.max(0),
        "mean": mean.mean(0),
        "std": np.sqrt((square.mean(0) - mean.mean(0) ** 2).clip(0)),
    }
    array = pa.array(files, PICTURE)
    return array, {**{k: v.reshape(3, 1, 1) for k, v in stats.items()}, "count": np.array([len(files)])}


def _stats(values: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    return {
        "min": values.min(0),
        "max": values.max(0),
        "mean": values.mean(0),
        "std": values.std(0),
        "count": np.array([len(values)]),
    }


def _all_stats(written: Sequence[_Written]) -> Stats:
    """Put the statistics of the episodes together."""
    whole: Stats = {}
    for key in written[0].stats:
        parts = {name: np.stack([each.stats[key][name] for each in written]) for name in written[0].stats[key]}
        counts = parts["count"].reshape(-1, *[1] * (parts["mean"].ndim - 1))
        share = counts / counts.sum()
        mean = (share * parts["mean"]).sum(0)
        whole[key] = {
            "min": parts["min"].min(0),
            "max": parts["max"].max(0),
            "mean": mean,
            "std": np.sqrt((share * (parts["std"] ** 2 + (parts["mean"] - mean) ** 2)).sum(0)),
            "count": parts["count"].sum(0),
        }
    return whole


def _write_v2(files: _Files, demonstrations: Demonstrations, features: dict[str, dict[str, Any]]) -> list[_Written]:
    written = []
    for each, table in _episodes(demonstrations, features):
        name = DATA_PATHS[2].format(episode_chunk=each.number // CHUNK, episode_index=each.number)
        files.tables(name, [table])
        written.append(each)
    return written


def _write_v3(files: _Files, demonstrations: Demonstrations, features: dict[str, dict[str, Any]]) -> list[_Written]:
    written: list[_Written] = []
    waiting: list[pa.Table] = []
    file = 0

    def flush() -> None:
        files.tables(DATA_PATHS[3].format(chunk_index=file // CHUNK, file_index=file % CHUNK), waiting)

    for each, table in _episodes(demonstrations, features):
        if waiting and sum(part.nbytes for part in [*waiting, table]) > FILE_MB * 2**20:
            flush()
            waiting, file = [], file + 1
        waiting.append(table)
        written.append(dataclasses.replace(each, file=file))
    flush()
    return written


# ---------------------------------------------------------------- meta


def _info(demonstrations: Demonstrations, written: Sequence[_Written], version: str) -> dict[str, Any]:
    info: dict[str, Any] = {
        "codebase_version": version,
        "robot_type": demonstrations.robot or None,
        "total_episodes": len(written),
        "total_frames": sum(each.length for each in written),
        "total_tasks": len(demonstrations.tasks),
        "chunks_size": CHUNK,
        "fps": int(demonstrations.fps) if demonstrations.fps == int(demonstrations.fps) else demonstrations.fps,
        "data_path": DATA_PATHS[int(version[1])],
        "video_path": None,
    }
    if version == "v3.0":
        return info | {"data_files_size_in_mb": FILE_MB, "video_files_size_in_mb": 2 * FILE_MB}
    return info | {"total_videos": 0, "total_chunks": 1 + (len(written) - 1) // CHUNK}


def _write_meta(files: _Files, demonstrations: Demonstrations, written: Sequence[_Written], version: str) -> None:
    tasks = demonstrations.tasks
    if version == "v3.0":
        files.tables("meta/tasks.parquet", [_task_table(tasks)])
        files.tables("meta/episodes/chunk-000/file-000.parquet", [_episode_table(written)])
    else:
        files.lines("meta/tasks.jsonl", [{"task_index": i, "task": task} for i, task in enumerate(tasks)])
        rows = [{"episode_index": each.number, "tasks": [each.task], "length": each.length} for each in written]
        files.lines("meta/episodes.jsonl", rows)
    if version == "v2.1":
        lines = [{"episode_index": each.number, "stats": _plain(each.stats)} for each in written]
        files.lines("meta/episodes_stats.jsonl", lines)
    else:
        files.json("meta/stats.json", _plain(_all_stats(written)))


def _plain(stats: Stats) -> dict[str, dict[str, Any]]:
    return {key: {name: values.tolist() for name, values in each.items()} for key, each in stats.items()}


def _task_table(tasks: Sequence[str]) -> pa.Table:
    """Return the tasks as pandas writes a frame with the texts as its index."""
    columns = [("task_index", "int64", "int64"), ("task", "unicode", "object")]
    pandas = {
        "index_columns": ["task"],
        "column_indexes": [],
        "columns": [
            {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": numpy, "metadata": None}
            for name, kind, numpy in columns
        ],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.2.0",
    }
    schema = pa.schema([("task_index", pa.int64()), ("task", pa.string())], metadata={"pandas": json.dumps(pandas)})
    return pa.table([list(range(len(tasks))), list(tasks)], schema=schema)


def _episode_table(written: Sequence[_Written]) -> pa.Table:
    columns: dict[str, Any] = {
        "episode_index": [each.number for each in written],
        "tasks": [[each.task] for each in written],
        "length": [each.length for each in written],
        "data/chunk_index": [each.file // CHUNK for each in written],
        "data/file_index": [each.file % CHUNK for each in written],
        "dataset_from_index": [each.first for each in written],
        "dataset_to_index": [each.first + each.length for each in written],
    }
    for key, stats in written[0].stats.items():
        for name in stats:
            columns[f"stats/{key}/{name}"] = [each.stats[key][name].tolist() for each in written]
    columns["meta/episodes/chunk_index"] = columns["meta/episodes/file_index"] = [0] * len(written)
    return pa.table(columns)
