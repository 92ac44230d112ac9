import json
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_videos import write_video

from vertebra.domains.action import lerobot_writing
from vertebra.domains.action.episodes import Demonstrations, Episode
from vertebra.domains.action.lerobot import is_lerobot, read_lerobot, write_lerobot
from vertebra.domains.action.video import VideoFrames
from vertebra.errors import ConfigError, DataError, MissingExtraError, UnknownNameError

VERSIONS = ("v2.0", "v2.1", "v3.0")
LENGTHS = (5, 7, 4)


def demonstrations(cameras=(), dims=3, lengths=LENGTHS):
    rng = np.random.default_rng(0)
    episodes = []
    for number, length in enumerate(lengths):
        episodes.append(
            Episode(
                name=f"episode_{number:06d}",
                states=rng.normal(size=(length, 2)).astype(np.float32),
                actions=rng.normal(size=(length, dims)).astype(np.float32),
                times=np.arange(length) / 10,
                task="push ä" if number == 1 else "pull",
                images={name: rng.integers(0, 256, (length, 6, 8, 3), np.uint8) for name in cameras},
            )
        )
    return Demonstrations(
        episodes=tuple(episodes),
        fps=10.0,
        state_names=("x", "y.pos"),
        action_names=tuple(f"joint {i}" for i in range(dims)),
        robot="arm",
    )


def assert_same(found, expected):
    for name in ("fps", "state_names", "action_names", "robot", "splits", "tasks", "left_out"):
        assert getattr(found, name) == getattr(expected, name), name
    assert [e.name for e in found.episodes] == [e.name for e in expected.episodes]
    for a, b in zip(found.episodes, expected.episodes, strict=True):
        assert a.task == b.task
        assert np.array_equal(a.states, b.states)
        assert np.array_equal(a.actions, b.actions)
        assert a.states.dtype == a.actions.dtype == np.float32
        assert a.times == pytest.approx(b.times, abs=1e-6)
        assert a.times.dtype == np.float64
        assert list(a.images) == list(b.images)
        for camera, frames in a.images.items():
            assert len(frames) == len(a)
            assert np.array_equal(np.stack(frames[:]), np.stack(b.images[camera][:]))


def change_info(folder, **changes):
    path = folder / "meta" / "info.json"
    info = json.loads(path.read_text())
    for key, value in changes.items():
        info[key] = value(info[key]) if callable(value) else value
    path.write_text(json.dumps(info))


def episode_file(folder, number=0):
    return folder / f"data/chunk-000/episode_{number:06d}.parquet"


def change_table(path, change):
    pq.write_table(change(pq.read_table(path)), path)


def with_column(name, values):
    return lambda table: table.set_column(table.column_names.index(name), name, values)


# --- there and back ---


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("dims", [1, 3])
def test_what_is_written_is_read_back(tmp_path, version, dims):
    made = demonstrations(["front", "wrist.left"], dims)
    assert not is_lerobot(tmp_path)
    files = write_lerobot(tmp_path / "set", made, version=version)
    assert is_lerobot(tmp_path / "set")
    assert sorted(files) == sorted(p for p in (tmp_path / "set").rglob("*") if p.is_file())  # no parts left
    assert files[-1].name == "info.json"
    assert_same(read_lerobot(tmp_path / "set"), made)


def test_versions_hold_the_same(tmp_path):
    made = replace(demonstrations(["front"]), splits={"train": (0, 1), "test": (2,)})
    for version in VERSIONS:
        write_lerobot(tmp_path / version, made, version=version)
    old, new = (read_lerobot(tmp_path / version) for version in ("v2.1", "v3.0"))
    assert_same(old, new)
    assert new.splits == {"train": (0, 1), "test": (2,)}
    stats = [json.loads((tmp_path / version / "meta/stats.json").read_text()) for version in ("v2.0", "v3.0")]
    assert stats[0] == stats[1]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_same_bytes(tmp_path, version):
    folders = [tmp_path / "a", tmp_path / "b"]
    first, second = (write_lerobot(f, demonstrations(["front"]), version=version) for f in folders)
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_tables_are_those_of_lerobot(tmp_path, version):
    write_lerobot(tmp_path, demonstrations(["front"]), version=version)
    table = pq.read_table(next((tmp_path / "data").rglob("*.parquet")))
    assert table.schema.field("action").type == pa.list_(pa.field("element", pa.float32()), 3)
    assert table.schema.field("timestamp").type == pa.float32()
    assert table.schema.field("observation.images.front").type == pa.struct({"bytes": pa.binary(), "path": pa.string()})
    described = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert described["observation.images.front"] == {"_type": "Image"}
    assert described["index"] == {"dtype": "int64", "_type": "Value"}
    info = json.loads((tmp_path / "meta/info.json").read_text())
    assert list(described) == list(info["features"]) == table.column_names
    assert info["features"]["observation.images.front"] == {
        "dtype": "image",
        "shape": [6, 8, 3],
        "names": ["height", "width", "channel"],
    }
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 16, 2)
    assert info["splits"] == {"train": "0:3"}
    assert info["fps"] == 10
    assert info["video_path"] is None


def test_statistics(tmp_path):
    made = demonstrations(["front"])
    for version in VERSIONS:
        write_lerobot(tmp_path / version, made, version=version)
    actions = np.concatenate([e.actions for e in made.episodes]).astype(float)
    stats = json.loads((tmp_path / "v3.0/meta/stats.json").read_text())
    assert stats["action"]["mean"] == pytest.approx(actions.mean(0))
    assert stats["action"]["std"] == pytest.approx(actions.std(0))
    assert stats["action"]["max"] == pytest.approx(actions.max(0))
    assert stats["action"]["count"] == [16]
    colours = np.concatenate([e.images["front"] for e in made.episodes]) / 255
    assert np.shape(stats["observation.images.front"]["std"]) == (3, 1, 1)
    assert np.ravel(stats["observation.images.front"]["std"]) == pytest.approx(colours.std((0, 1, 2)))
    row = json.loads((tmp_path / "v2.1/meta/episodes_stats.jsonl").read_text().splitlines()[1])
    assert row["stats"]["index"]["min"] == [5]
    episodes = pq.read_table(tmp_path / "v3.0/meta/episodes/chunk-000/file-000.parquet").to_pylist()
    assert episodes[1]["stats/action/mean"] == pytest.approx(row["stats"]["action"]["mean"])
    assert (episodes[1]["dataset_from_index"], episodes[1]["dataset_to_index"]) == (5, 12)


def test_files_of_version_3_are_filled(tmp_path, monkeypatch):
    made = demonstrations(["front"])
    monkeypatch.setattr(lerobot_writing, "FILE_MB", 0.0035)  # two episodes
    monkeypatch.setattr(lerobot_writing, "CHUNK", 1)
    write_lerobot(tmp_path, made, version="v3.0")
    names = sorted(p.relative_to(tmp_path).as_posix() for p in (tmp_path / "data").rglob("*.parquet"))
    assert names == ["data/chunk-000/file-000.parquet", "data/chunk-001/file-000.parquet"]
    assert pq.ParquetFile(tmp_path / names[0]).num_row_groups == 2
    assert_same(read_lerobot(tmp_path), made)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"episodes": ()}, DataError, r"there is no episode"),
        ({"action_names": ("a",)}, DataError, r"actions is \(5, 3\), but there are 1 names"),
        ({"splits": {"train": (0, 2)}}, ConfigError, r"split 'train' must be a run"),
    ],
)
def test_what_cannot_be_written(tmp_path, change, error, message):
    with pytest.raises(error, match=message):
        write_lerobot(tmp_path, replace(demonstrations(), **change))
    assert not list(tmp_path.iterdir())


def test_episodes_that_differ_cannot_be_written(tmp_path):
    made = demonstrations(["front"])
    last = made.episodes[-1]
    with pytest.raises(DataError, match=r"has the cameras \[\], but the first episode \['front'\]"):
        write_lerobot(tmp_path, replace(made, episodes=(*made.episodes[:2], replace(last, images={}))))
    small = replace(last, images={"front": last.images["front"][:, 1:]})
    with pytest.raises(DataError, match=r"front at step 0 is uint8 \(5, 8, 3\); all must be .* \(6, 8, 3\)"):
        write_lerobot(tmp_path, replace(made, episodes=(*made.episodes[:2], small)))
    assert not list(tmp_path.iterdir())  # nothing half done
    with pytest.raises(ConfigError, match="must have no '/' in its name"):
        write_lerobot(tmp_path, demonstrations(["a/b"]))
    with pytest.raises(UnknownNameError, match=r"unknown version of LeRobot 'v2.2'. Did you mean"):
        write_lerobot(tmp_path, made, version="v2.2")


def test_nothing_is_overwritten(tmp_path):
    write_lerobot(tmp_path, demonstrations())
    with pytest.raises(ConfigError, match="holds meta/ already"):
        write_lerobot(tmp_path, demonstrations())
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\)"):
        write_lerobot(tmp_path / "file", demonstrations())


# --- features, names, times ---


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a", "b", "c"], ("a", "b", "c")),
        ([["a", "b", "c"]], ("a", "b", "c")),
        ({"motors": ["a", "b", "c"]}, ("a", "b", "c")),
        ({"c": 2, "a": 0, "b": 1}, ("a", "b", "c")),
        ([0, 1, 2], ("0", "1", "2")),
        (None, ("action_0", "action_1", "action_2")),
        (["a", "b"], ("action_0", "action_1", "action_2")),
        (["a", "a", "b"], ("action_0", "action_1", "action_2")),
    ],
)
def test_names(tmp_path, names, expected):
    write_lerobot(tmp_path, demonstrations())
    change_info(tmp_path, features=lambda f: {**f, "action": {**f["action"], "names": names}})
    assert read_lerobot(tmp_path).action_names == expected


def test_other_states(tmp_path):
    made = demonstrations()
    write_lerobot(tmp_path, made)
    found = read_lerobot(tmp_path, extra_state=("action",))
    assert found.state_names == ("x", "y.pos", "joint 0", "joint 1", "joint 2")
    assert np.array_equal(found.episodes[1].states[:, 2:], made.episodes[1].actions)
    twice = read_lerobot(tmp_path, state="action", extra_state=("action",))
    assert twice.state_names[2:4] == ("joint 2", "action.joint 0")
    assert read_lerobot(tmp_path, state="").episodes[1].states.shape == (7, 0)


def test_a_feature_that_is_not_there(tmp_path):
    write_lerobot(tmp_path, demonstrations(["front"]))
    for wanted in ("observation.environment_state", "observation.images.front"):
        with pytest.raises(
            DataError, match=rf"no vector feature '{wanted}'; name one of: observation.state \(2\), act"
        ):
            read_lerobot(tmp_path, extra_state=(wanted,))
    with pytest.raises(DataError, match="no vector feature 'actions'"):
        read_lerobot(tmp_path, action="actions")


def test_lists_of_any_kind(tmp_path):
    made = demonstrations(dims=4)
    write_lerobot(tmp_path, made)
    change_info(tmp_path, features=lambda f: {**f, "action": {"dtype": "float64", "shape": [2, 2], "names": None}})
    for number, episode in enumerate(made.episodes):
        values = episode.actions.astype(float).reshape(-1, 2, 2).tolist()
        nested = pa.array(values, pa.list_(pa.large_list(pa.float64())))
        change_table(episode_file(tmp_path, number), with_column("action", nested))
    found = read_lerobot(tmp_path)
    assert np.array_equal(found.episodes[2].actions, made.episodes[2].actions)
    assert found.action_names[3] == "action_3"


def test_times(tmp_path):
    write_lerobot(tmp_path, demonstrations())
    stamps = pa.array(np.array([3, 3.1, 3.2, 3.5, 3.6], np.float32))
    change_table(episode_file(tmp_path, 0), with_column("timestamp", stamps))
    change_table(episode_file(tmp_path, 1), lambda t: t.drop_columns("timestamp"))
    change_table(episode_file(tmp_path, 1), with_column("frame_index", pa.array([0, 1, 2, 4, 5, 6, 7])))
    change_table(episode_file(tmp_path, 2), lambda t: t.drop_columns(["timestamp", "frame_index"]))
    times = [e.times for e in read_lerobot(tmp_path).episodes]
    assert times[0] == pytest.approx([0, 0.1, 0.2, 0.5, 0.6], abs=1e-6)
    assert times[1] == pytest.approx([0, 0.1, 0.2, 0.4, 0.5, 0.6, 0.7])
    assert times[2] == pytest.approx([0, 0.1, 0.2, 0.3])


def test_splits(tmp_path):
    write_lerobot(tmp_path, demonstrations(lengths=(3, 3, 3, 3, 3)))
    change_info(tmp_path, splits={"train": "0:3", "val": "3:5", "odd": "80%"})
    episode_file(tmp_path, 1).unlink()
    found = read_lerobot(tmp_path)
    assert found.splits == {"train": (0, 1), "val": (2, 3)}  # positions, not numbers
    assert [str(n).partition(": ")[2] for n in found.left_out] == [
        "1 of 5 episodes in meta have no file (1); they are left out.",
        "the split 'odd' must be like '0:50', got '80%'; it is not used.",
    ]
    assert read_lerobot(tmp_path, limit=2).splits == {}


def test_tasks(tmp_path):
    write_lerobot(tmp_path / "old", demonstrations())
    (tmp_path / "old/meta/tasks.jsonl").unlink()
    assert read_lerobot(tmp_path / "old").tasks == ("pull", "push ä")  # those of episodes.jsonl
    write_lerobot(tmp_path / "new", demonstrations(), version="v3.0")
    path = tmp_path / "new/meta/tasks.parquet"
    pq.write_table(pq.read_table(path).rename_columns(["task_index", "__index_level_0__"]), path)
    assert read_lerobot(tmp_path / "new").tasks == ("pull", "push ä")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"tasks.parquet: is empty; copy it again"):
        read_lerobot(tmp_path / "new")


def test_limit(tmp_path):
    write_lerobot(tmp_path, demonstrations(), version="v3.0")
    assert len(read_lerobot(tmp_path, limit=2).episodes) == 2
    with pytest.raises(ConfigError, match="limit: must be at least 1"):
        read_lerobot(tmp_path, limit=0)


def test_rows_of_version_3_without_numbers_of_episodes(tmp_path):
    made = demonstrations(["front"])
    write_lerobot(tmp_path, made, version="v3.0")
    change_table(tmp_path / "data/chunk-000/file-000.parquet", lambda t: t.drop_columns("episode_index"))
    assert_same(read_lerobot(tmp_path), made)


# --- damaged files ---


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(b""), "is empty; copy it again or leave it out"),
        (lambda p: p.write_bytes(p.read_bytes()[:-100]), r"is damaged or no parquet file \(.*\); copy it again"),
        (lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), "run: git lfs pull"),
        (lambda p: p.write_bytes(b"PAR1" + bytes(500) + p.read_bytes()[504:]), "is damaged or no parquet file"),
        (lambda p: change_table(p, lambda t: t.drop_columns("action")), "has no column 'action'; write"),
        (lambda p: change_table(p, lambda t: t.slice(0, 0)), "holds no step; leave it out"),
        (
            lambda p: change_table(p, with_column("action", pa.array([[1.0]] * 7))),
            "action holds 1 x double a step, but meta says 3 numbers",
        ),
        (
            lambda p: change_table(p, with_column("action", pa.array([[1.0]] * 6 + [[1.0, 2.0]]))),
            "action has steps of different length",
        ),
        (
            lambda p: change_table(p, with_column("action", pa.array([["a"] * 3] * 7))),
            "action holds 3 x string a step",
        ),
        (
            lambda p: change_table(p, with_column("action", pa.array([[0.0, 1.0, np.nan]] * 7))),
            "actions is not finite at step 0; mend or leave it out",
        ),
        (
            lambda p: change_table(p, with_column("action", pa.array([[0.0, 1.0, 1e300]] * 7))),
            "actions is not finite at step 0",
        ),
        (
            lambda p: change_table(p, with_column("timestamp", pa.array([0.0] * 6 + [None]))),
            "times is not finite at step 6",
        ),
    ],
)
def test_one_bad_episode_does_not_lose_the_others(tmp_path, damage, message):
    made = demonstrations()
    write_lerobot(tmp_path, made)
    damage(episode_file(tmp_path, 1))
    found = read_lerobot(tmp_path)
    assert [e.name for e in found.episodes] == ["episode_000000", "episode_000002"]
    assert len(found.left_out) == 1
    assert found.left_out[0].source == f"{episode_file(tmp_path, 1)}: episode_000001"
    assert re.search(message, str(found.left_out[0]))


def test_a_bad_file_of_version_3(tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_writing, "FILE_MB", 0.0008)
    write_lerobot(tmp_path, demonstrations(), version="v3.0")
    (tmp_path / "data/chunk-000/file-000.parquet").write_bytes(b"no")
    found = read_lerobot(tmp_path)
    assert [e.name for e in found.episodes] == ["episode_000002"]
    assert [n.source[-14:] for n in found.left_out] == ["episode_000000", "episode_000001"]
    (tmp_path / "data/chunk-000/file-001.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"no episode can be read; the first reason: .*episode_000000: is damaged"):
        read_lerobot(tmp_path)
    (tmp_path / "meta/episodes/chunk-000/file-000.parquet").write_bytes(b"no")
    with pytest.raises(DataError, match=r"meta/episodes lists no episode; the first reason: .*is damaged"):
        read_lerobot(tmp_path)


def test_another_length_than_meta_says(tmp_path):
    write_lerobot(tmp_path, demonstrations())
    change_table(episode_file(tmp_path, 1), lambda t: t.slice(0, 6))
    found = read_lerobot(tmp_path)
    assert [len(e) for e in found.episodes] == [5, 6, 4]
    assert str(found.left_out[0]).endswith("episode_000001: has 6 steps, but meta says 7; it is used as it is.")


def test_episodes_without_a_list(tmp_path):
    write_lerobot(tmp_path, demonstrations())
    (tmp_path / "meta/episodes.jsonl").unlink()
    assert len(read_lerobot(tmp_path).episodes) == 3
    (tmp_path / "meta/episodes.jsonl").write_text('{"episode_index": 0}\n\n{"tasks": []}\n')
    with pytest.raises(DataError, match=r"episodes.jsonl: line 3 must be an object with episode_index"):
        read_lerobot(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codebase_version": "v1.6"}, r"must be v2.0, v2.1 or v3.0, got 'v1.6'; convert"),
        ({"fps": 0}, "'fps' must be above 0, got 0"),
        ({"features": None}, "must be an object with 'features'"),
        ({"data_path": "data/{shard}"}, "data_path is 'data/{shard}', which cannot be filled in"),
        ({"chunks_size": 1, "data_path": 3}, "data_path is 3, which cannot be filled in"),
        ({"data_path": "elsewhere/{episode_index}"}, "none of the 3 episodes in meta has its file"),
    ],
)
def test_bad_info(tmp_path, change, message):
    write_lerobot(tmp_path, demonstrations())
    change_info(tmp_path, **change)
    with pytest.raises(DataError, match=message):
        read_lerobot(tmp_path)


def test_no_info(tmp_path):
    with pytest.raises(DataError, match=r"has no meta/info\.json"):
        read_lerobot(tmp_path)
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta/info.json").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"info\.json: is not JSON"):
        read_lerobot(tmp_path)


# --- cameras ---


def test_cameras_by_name(tmp_path):
    write_lerobot(tmp_path, demonstrations(["front", "wrist"]))
    assert list(read_lerobot(tmp_path, cameras=("observation.images.wrist",)).episodes[0].images) == ["wrist"]
    assert read_lerobot(tmp_path, cameras=()).episodes[0].images == {}
    with pytest.raises(DataError, match="has no camera 'top'; cameras: front, wrist"):
        read_lerobot(tmp_path, cameras=("front", "top"))


def test_pictures_that_are_not_there(tmp_path):
    write_lerobot(tmp_path, demonstrations(["front", "wrist"]))
    change_info(tmp_path, features=lambda f: {**f, "depth": {"dtype": "image", "info": {"is_depth_map": True}}})
    for number in range(3):
        change_table(episode_file(tmp_path, number), lambda t: t.drop_columns("observation.images.wrist"))
    found = read_lerobot(tmp_path)
    assert list(found.episodes[0].images) == ["front"]
    assert [n.rule for n in found.left_out] == [
        "the camera wrist has no pictures in the data files",
        "the camera depth gives depth, not colours",
    ]
    with pytest.raises(DataError, match="the camera wrist has no pictures in the data files; fetch them"):
        read_lerobot(tmp_path, cameras=("wrist",))
    empty = pa.array([{"bytes": None, "path": "a.png"}] * 7, lerobot_writing.PICTURE)
    change_table(episode_file(tmp_path, 1), with_column("observation.images.front", empty))
    found = read_lerobot(tmp_path)
    assert len(found.episodes) == 2
    assert found.left_out[-1].rule == "observation.images.front is empty at step 0"


# --- videos ---


def as_video(folder, version, absent=()):
    """Turn the pictures of ``front`` in a data set into videos, each frame of one grey."""
    info = json.loads((folder / "meta/info.json").read_text())
    pattern = lerobot_writing.VIDEO_PATHS[int(version[1])]
    key = "observation.images.front"
    features = info["features"] | {key: {"dtype": "video", "shape": [32, 32, 3], "names": None}}
    change_info(folder, features=features, video_path=pattern)
    if version != "v3.0":
        for number, length in enumerate(LENGTHS):
            if number not in absent:
                path = folder / pattern.format(episode_chunk=0, episode_index=number, video_key=key)
                write_video(path, [greys(number, step) for step in range(length)])
    else:
        write_video(
            folder / pattern.format(chunk_index=0, file_index=0, video_key=key),
            [greys(number, step) for number, length in enumerate(LENGTHS) for step in range(length)],
        )
        starts = np.cumsum([0, *LENGTHS[:-1]]) / 10
        path = folder / "meta/episodes/chunk-000/file-000.parquet"
        table = pq.read_table(path)
        for name, values in (("chunk_index", [0] * 3), ("file_index", [0] * 3), ("from_timestamp", starts)):
            table = table.append_column(f"videos/{key}/{name}", pa.array(values))
        pq.write_table(table, path)


def greys(number, step):
    return 40 + 60 * number + 10 * step


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_videos(tmp_path, version):
    write_lerobot(tmp_path, demonstrations(), version=version)
    as_video(tmp_path, version)
    found = read_lerobot(tmp_path)
    assert found.left_out == ()
    for number, episode in enumerate(found.episodes):
        frames = episode.images["front"]
        assert len(frames) == len(episode)
        for step in (0, 1, 2, len(episode) - 1, 0, 3, 2):  # forwards, and back
            assert frames[step].shape == (32, 32, 3)
            assert frames[step].mean() == pytest.approx(greys(number, step), abs=4)


def test_videos_of_some_episodes(tmp_path):
    write_lerobot(tmp_path, demonstrations())
    as_video(tmp_path, "v2.1", absent=[1])
    found = read_lerobot(tmp_path)
    assert [e.images for e in found.episodes] == [{}] * 3
    assert found.left_out[0].rule == "the camera front has no video of 1 of 3 episodes"
    found = read_lerobot(tmp_path, cameras=("front",))
    assert [e.name for e in found.episodes] == ["episode_000000", "episode_000002"]
    assert found.left_out[0].rule == "has no pictures of the camera front"
    shutil.rmtree(tmp_path / "videos")
    with pytest.raises(DataError, match="no video of 3 of 3 episodes; fetch them, or do not name the camera"):
        read_lerobot(tmp_path, cameras=("front",))


def test_videos_without_the_extra(tmp_path, monkeypatch):
    write_lerobot(tmp_path, demonstrations())
    as_video(tmp_path, "v2.1")
    monkeypatch.setitem(sys.modules, "av", None)
    found = read_lerobot(tmp_path)
    assert found.episodes[0].images == {}
    assert "pip install 'vertebra[video]'" in str(found.left_out[0])
    with pytest.raises(MissingExtraError, match=r"the camera front needs the package 'av'; .*vertebra\[video\]"):
        read_lerobot(tmp_path, cameras=("front",))
    path = next(tmp_path.rglob("*.mp4"))
    with pytest.raises(MissingExtraError, match="reading videos needs the package 'av'"):
        VideoFrames(path, np.zeros(1), 0.05)[0]


# --- real files ---


@pytest.mark.realdata
def test_the_unitree_g1_set(shared_data):
    found = read_lerobot(shared_data / "action" / "unitree_g1")
    assert len(found.episodes) == 60
    assert found.fps == 30
    assert found.robot == "Unitree_G1_Inspire"
    assert len(found.action_names) == len(found.state_names) == 26
    assert found.action_names[::25] == ("kLeftShoulderPitch", "kRightHandThumbRotation")
    assert found.tasks == ("Pick up the yellow bottle on the table.",)
    assert found.splits == {}
    assert len(found.episodes[0]) == 479
    assert [n.rule for n in found.left_out] == [
        "40 of 100 episodes in meta have no file (60 to 99)",
        "the camera cam_high has no video of 60 of 60 episodes",
    ]
    assert all(np.diff(e.times) == pytest.approx(1 / 30, abs=1e-5) for e in found.episodes)
