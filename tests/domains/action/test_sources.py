import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from vertebra.domains.action import lerobot
from vertebra.domains.action.episodes import Demonstrations, Episode
from vertebra.domains.action.sources import find_demonstrations, read_demonstrations
from vertebra.domains.action.tables import ColumnMap, write_csv, write_npz
from vertebra.errors import ConfigError, DataError


def made(name="a", steps=4, fps=10.0, dims=2):
    return Episode(
        name=name,
        states=np.ones((steps, 3), np.float32),
        actions=np.zeros((steps, dims), np.float32),
        times=np.arange(steps) / fps,
    )


def put(folder, *names, **options):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write = write_npz if path.suffix == ".npz" else lambda path, episode: write_csv(path, [episode])
        write(path, made(path.stem, **options))


def names(found):
    return [episode.name for episode in found.episodes]


@pytest.fixture
def no_lerobot(monkeypatch):
    """Two folders called robot_... that a stand-in reads, and what it was asked for."""
    asked = []

    def read(folder, **options):
        asked.append(options)
        episodes = tuple(dataclasses.replace(made(f"episode_{i}"), source=str(folder)) for i in range(3))
        return Demonstrations(
            episodes=episodes,
            fps=10.0,
            state_names=("state_0", "state_1", "state_2"),
            action_names=("action_0", "action_1"),
            robot="arm",
            splits={"train": (0, 1), "val": (2,)},
        )

    monkeypatch.setattr(lerobot, "is_lerobot", lambda folder: folder.name.startswith("robot_"))
    monkeypatch.setattr(lerobot, "read_lerobot", read)
    return asked


def test_a_folder_is_searched_in_order(tmp_path):
    put(tmp_path, "ep10.npz", "ep9.NPZ".lower(), "sub/more.csv", ".hidden.npz")
    (tmp_path / "notes.txt").write_text("no demonstration")
    found = read_demonstrations([tmp_path])
    assert names(found) == ["ep9", "ep10", "more"]
    assert (found.fps, len(found.state_names), found.left_out) == (10, 3, ())
    assert found.episodes[0].source == str(tmp_path / "ep9.npz")
    assert names(read_demonstrations([tmp_path, tmp_path / "ep9.npz", str(tmp_path / "sub" / ".." / "ep10.npz")])) == [
        "ep9", "ep10", "more",
    ]  # each once  # fmt: skip
    assert names(read_demonstrations([tmp_path], limit=2)) == ["ep9", "ep10"]


def test_the_same_name_twice_is_told_by_its_path(tmp_path):
    put(tmp_path, "x/a.npz", "y/a.npz", "y/b.npz")
    write_csv(tmp_path / "y" / "all.csv", [made("a"), made("c")])
    found = read_demonstrations([tmp_path / "x", tmp_path / "y"])
    assert names(found) == ["x/a.npz", "y/a.npz", "y/all.csv/a", "c", "b"]


def test_bad_files_are_left_out(tmp_path):
    put(tmp_path, "a.npz", "c.npz")
    (tmp_path / "b.csv").write_bytes(b"")
    (tmp_path / "d.npz").write_bytes((tmp_path / "c.npz").read_bytes()[:-100])
    found = read_demonstrations([tmp_path])
    assert names(found) == ["a", "c"]
    assert [str(note) for note in found.left_out] == [
        f"{tmp_path / 'b.csv'}: the file is empty; copy or export it again.",
        f"{tmp_path / 'd.npz'}: is no archive of plain arrays, or is empty, damaged or cut short; write it with "
        "numpy.savez.",
    ]
    with pytest.raises(DataError, match=r"b\.csv: the file is empty; copy or export it again\.$"):
        read_demonstrations([tmp_path / "b.csv", tmp_path / "d.npz"])


def test_files_must_agree(tmp_path):
    put(tmp_path, "a.npz")
    put(tmp_path, "fast.csv", fps=20.0)
    put(tmp_path, "nearly.csv", fps=10.04)
    put(tmp_path, "wide.npz", dims=3)
    a = tmp_path / "a.npz"
    with pytest.raises(
        DataError, match=r"a\.npz and .*wide\.npz: action_names differ, action_0, action_1 and action_0,"
    ):
        read_demonstrations([a, tmp_path / "wide.npz"])
    with pytest.raises(DataError, match=r"a\.npz and .*fast\.csv: steps a second differ, 10 and 20; set fps\.$"):
        read_demonstrations([a, tmp_path / "fast.csv"])
    assert read_demonstrations([a, tmp_path / "nearly.csv"]).fps == 10
    assert read_demonstrations([a, tmp_path / "fast.csv"], fps=5).fps == 5


def test_what_is_no_demonstration(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"")
    (tmp_path / "plain").write_bytes(b"")
    kinds = r"a folder of LeRobot \(with meta/info\.json\) or CALVIN, or files \.npz, \.csv, \.tsv, \.hdf5, \.h5\."
    for name, match in (
        ("a.parquet", f"'.parquet' is not a kind of file that is read; give {kinds}"),
        ("plain", "'no ending' is not a kind of file"),
        ("absent.npz", "there is no such file or folder; correct the path"),
        ("", f"no demonstrations are in this folder; give {kinds}"),
    ):
        with pytest.raises(DataError, match=match):
            read_demonstrations([tmp_path / name])
    with pytest.raises(ConfigError, match="no demonstrations are given; give a folder of LeRobot"):
        read_demonstrations([])
    for options, match in (({"limit": 0}, "limit must be at least 1"), ({"fps": 0}, "fps must be above 0")):
        with pytest.raises(ConfigError, match=match):
            read_demonstrations([tmp_path], **options)


def test_names_of_arrays_and_columns_are_passed_on(tmp_path):
    np.savez(tmp_path / "a.npz", q=np.ones((3, 2)), u=np.zeros((3, 2)), **{"images/top": np.zeros((3, 2, 2, 3), "u1")})
    (tmp_path / "b.csv").write_text("t,q_0,q_1,u_0,u_1\n0,1,1,0,0\n0.1,1,1,0,0\n")
    both = [tmp_path / "a.npz", tmp_path / "b.csv"]
    found = read_demonstrations(both, state="q", action="u", fps=10, cameras=[], columns=ColumnMap(time="t"))
    assert names(found) == ["a", "b"]
    assert (found.state_names, found.action_names) == (("q_0", "q_1"), ("u_0", "u_1"))
    found = read_demonstrations(both[1:], state=["q_1"], action="u", columns=ColumnMap(time="t", state="nothing"))
    assert found.state_names == ("q_1",)
    assert list(read_demonstrations(both[:1], state=["q"], action="u", fps=10).episodes[0].images) == ["top"]


def test_lerobot_folders_are_found_and_joined(tmp_path, no_lerobot):
    for name in ("robot_1", "robot_2"):
        (tmp_path / name).mkdir()
    put(tmp_path, "robot_1/inside.npz")  # not looked at
    assert find_demonstrations([tmp_path]) == [tmp_path / "robot_1", tmp_path / "robot_2"]
    found = read_demonstrations([tmp_path])
    assert names(found) == [f"robot_{k}/episode_{i}" for k in (1, 2) for i in range(3)]
    assert found.splits == {"train": (0, 1, 3, 4), "val": (2, 5)}
    assert (found.robot, found.left_out) == ("arm", ())
    assert no_lerobot[0] == {
        "state": "observation.state", "action": "action", "cameras": None, "extra_state": (), "limit": None,
        "unknown_actions": (),
    }  # fmt: skip
    found = read_demonstrations([tmp_path], state=["q", "force"], action="u", cameras=["top"], fps=5, limit=5)
    assert found.splits == {"train": (0, 1, 3, 4), "val": (2,)}
    assert found.fps == 5
    assert no_lerobot[-1] == {
        "state": "q", "action": "u", "cameras": ("top",), "extra_state": ("force",), "limit": 2,
        "unknown_actions": (),
    }  # fmt: skip


def test_splits_of_some_files_alone_are_not_used(tmp_path, no_lerobot):
    (tmp_path / "robot_1").mkdir()
    put(tmp_path, "a.npz")
    found = read_demonstrations([tmp_path])
    assert len(found.episodes) == 4
    assert (found.splits, found.robot) == ({}, "")
    assert str(found.left_out[0]) == (
        f"{tmp_path / 'a.npz'}: tells no splits; those of the other files are not used either."
    )


def test_calvin_is_read_too(tmp_path):
    for name, first in (("training", 0), ("validation", 5)):
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "ep_start_end_ids.npy", [[first, first + 2]])
        for i in range(first, first + 3):
            arrays = {"robot_obs": np.zeros(15), "rel_actions": np.zeros(7), "scene_obs": np.zeros(24)}
            np.savez(tmp_path / name / f"episode_{i:07d}.npz", **arrays)
    found = read_demonstrations([tmp_path])
    assert names(found) == ["episode_0000000", "episode_0000005"]
    assert found.splits == {"train": (0,), "val": (1,)}
    assert (found.fps, found.action_names[-1]) == (30, "gripper")
    found = read_demonstrations([tmp_path / "training"], state="scene_obs", action="robot_obs", fps=15, limit=1)
    assert (found.fps, found.state_names[-1], found.action_names[6]) == (15, "scene_obs_23", "gripper_width")


def test_hdf5_is_read_too(tmp_path):
    h5py = pytest.importorskip("h5py", reason="needs the extra hdf5")
    for name in ("a.hdf5", "b.h5"):
        with h5py.File(tmp_path / name, "w") as file:
            for i in (0, 1):
                file[f"data/demo_{i}/actions"] = np.zeros((3, 2))
                file[f"data/demo_{i}/obs/object"] = np.zeros((3, 2))
    found = read_demonstrations([tmp_path], limit=3)
    assert names(found) == ["a.hdf5/demo_0", "demo_1", "b.h5/demo_0"]
    assert found.fps == 20


# ---------------------------------------------------------------- observations alone


def observed(folder, kind):
    """The episode of ``made`` without its actions."""
    folder.mkdir(exist_ok=True)
    if kind == "npz":
        path = folder / "a.npz"
        np.savez(path, states=np.ones((4, 3)), timestamps=np.arange(4) / 10)
    elif kind == "csv":
        path = folder / "a.csv"
        write_csv(path, [made("a")])
        rows = [line.split(",")[:-2] for line in path.read_text().splitlines()]
        path.write_text("".join(",".join(row) + "\n" for row in rows))
    else:
        path = folder / "set"
        lerobot.write_lerobot(path, _set())
        info = json.loads((path / "meta/info.json").read_text())
        del info["features"]["action"]
        (path / "meta/info.json").write_text(json.dumps(info))
        file = next(path.glob("data/*/*.parquet"))
        pq.write_table(pq.read_table(file).drop_columns("action"), file)
    return path


def _set():
    states = ("state_0", "state_1", "state_2")
    return Demonstrations(episodes=(made("a"),), fps=10.0, state_names=states, action_names=("action_0", "action_1"))


@pytest.mark.parametrize("kind", ["npz", "csv", "lerobot"])
def test_observations_without_actions_are_read_where_names_are_given(kind, tmp_path):
    path = observed(tmp_path / kind, kind)
    with pytest.raises(
        DataError, match=r"there is no array 'actions'|is called 'action' or|no vector feature 'action'"
    ):
        read_demonstrations([path])
    found = read_demonstrations([path], unknown_actions=["left", "right"])
    (own,) = found.episodes
    assert (found.action_names, found.fps, len(found.state_names)) == (("left", "right"), 10, 3)
    assert own.actions.shape == (4, 2)
    assert np.isnan(own.actions).all()
    assert own.actions.dtype == np.float32
    assert (own.states == made().states).all()
    assert own.times == pytest.approx(made().times)
    assert str(found.left_out[0]) == f"{path}: has no actions; what is predicted is compared with nothing."
    with pytest.raises(DataError, match="'cmd'"):  # a name that the user gave must be there
        read_demonstrations([path], action="cmd", unknown_actions=["left", "right"])


def test_names_do_no_harm_where_there_are_actions(tmp_path):
    put(tmp_path, "a.npz", "b.csv")
    lerobot.write_lerobot(tmp_path / "set", _set())
    for name in ("a.npz", "b.csv", "set"):
        found = read_demonstrations([tmp_path / name], unknown_actions=["left", "right"])
        assert found.action_names == ("action_0", "action_1")
        assert (found.episodes[0].actions == 0).all()
        assert found.left_out == ()


def test_observations_are_checked_all_the_same(tmp_path):
    path, states, wanted = tmp_path / "a.npz", np.ones((4, 3)), {"unknown_actions": ["left"]}
    np.savez(path, timestamps=np.arange(4) / 10)
    with pytest.raises(DataError, match=r"there is no array 'states'; arrays: timestamps\.$"):
        read_demonstrations([path], **wanted)
    np.savez(path, states=states, timestamps=np.arange(5) / 10)
    with pytest.raises(DataError, match=r"timestamps has 5 steps, but states has 4; write both again\.$"):
        read_demonstrations([path], **wanted)
    np.savez(path, states=states, fps=10, action_names=["left", "right"])
    with pytest.raises(DataError, match=r"action_names must be 1 texts"):
        read_demonstrations([path], **wanted)
    states[2] = np.nan
    np.savez(path, states=states, fps=10)
    with pytest.raises(DataError, match=r"a\.npz: a: states is not finite at step 2; mend or leave it out\.$"):
        read_demonstrations([path], **wanted)
    path = tmp_path / "b.csv"
    path.write_text("timestamp,x\n0,1\n0.1,2\n")
    with pytest.raises(DataError, match=r"no free column is called 'state' or begins so"):
        read_demonstrations([path], **wanted)
