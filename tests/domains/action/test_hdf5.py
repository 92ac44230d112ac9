import json
import pickle

import numpy as np
import pytest

from vertebra.domains.action import hdf5
from vertebra.domains.action.hdf5 import read_hdf5
from vertebra.errors import ConfigError, DataError, MissingExtraError

h5py = pytest.importorskip("h5py", reason="needs the extra hdf5")

PANDA = {"robot0_gripper_qpos": 2, "robot0_eef_pos": 3, "object": 4, "robot0_joint_pos": 7}
LIBERO = {"gripper_states": 2, "joint_states": 7, "ee_pos": 3, "ee_states": 6}


def write(path, demos=(0, 1, 2, 10), steps=5, obs=None, attributes=None, cameras=(), change=None):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        data = file.create_group("data")
        for name, value in (attributes or {}).items():
            data.attrs[name] = json.dumps(value)
        for number in demos:
            demo = data.create_group(f"demo_{number}")
            demo["actions"] = np.full((steps, 7), number, np.float64)
            demo["states"] = rng.normal(size=(steps, 12))
            for key, width in (PANDA if obs is None else obs).items():
                demo[f"obs/{key}"] = rng.normal(size=(steps, width))
            for camera in cameras:
                demo[f"obs/{camera}"] = rng.integers(0, 256, (steps, 6, 8, 3), dtype=np.uint8)
        if change:
            change(file)
    return path


def test_robomimic(tmp_path):
    def masks(file):
        file["mask/train"] = np.array([b"demo_10", b"demo_0", b"demo_1"])
        file["mask/valid"] = np.array([b"demo_2"])
        file["mask/20_percent"] = np.array([b"demo_0"])

    about = {"env_name": "Lift", "type": 1, "env_kwargs": {"robots": ["Panda"], "control_freq": 40}}
    path = write(tmp_path / "a.hdf5", attributes={"env_args": about}, change=masks)
    found = read_hdf5(path)
    assert [e.name for e in found.episodes] == ["demo_0", "demo_1", "demo_2", "demo_10"]
    assert [e.actions[0, 0] for e in found.episodes] == [0, 1, 2, 10]
    assert found.splits == {"train": (0, 1, 3), "val": (2,)}
    assert (found.fps, found.robot, found.tasks) == (40, "Panda", ("Lift",))
    assert found.action_names[-1] == "action_6"
    first = found.episodes[0]
    assert found.state_names[:4] == (
        "robot0_eef_pos_0",
        "robot0_eef_pos_1",
        "robot0_eef_pos_2",
        "robot0_gripper_qpos_0",
    )
    assert found.state_names[5:] == ("object_0", "object_1", "object_2", "object_3")
    with h5py.File(path) as file:
        obs = file["data/demo_0/obs"]
        expected = np.hstack([obs[key] for key in ("robot0_eef_pos", "robot0_gripper_qpos", "object")])
    assert first.states == pytest.approx(expected)
    assert first.times.tolist() == [0, 0.025, 0.05, pytest.approx(0.075), 0.1]
    assert first.images == {}
    assert found.left_out == ()
    assert read_hdf5(path, fps=10).episodes[0].times[1] == 0.1


def test_libero_and_its_pictures(tmp_path):
    about = {"problem_info": {"language_instruction": ' "open the drawer"'}, "env_args": {"env_name": "Kitchen"}}
    cameras = ("agentview_rgb", "eye_in_hand_rgb")
    path = write(tmp_path / "a.h5", obs=LIBERO, attributes=about, cameras=cameras)
    found = read_hdf5(path)
    assert (found.fps, found.tasks) == (hdf5.USUAL_RATE, ("open the drawer",))
    assert len(found.state_names) == 15
    assert found.state_names[::6] == ("ee_states_0", "joint_states_0", "joint_states_6")
    assert set(found.episodes[0].images) == set(cameras)
    frames = pickle.loads(pickle.dumps(found.episodes[1].images["eye_in_hand_rgb"]))  # as workers get them
    with h5py.File(path) as file:
        expected = file["data/demo_1/obs/eye_in_hand_rgb"][:]
    assert len(frames) == 5
    assert (frames[np.int64(3)] == expected[3]).all()
    assert (frames[-1] == expected[4]).all()
    assert (frames[1:3] == expected[1:3]).all()
    assert (np.stack(list(frames)) == expected).all()
    with pytest.raises(IndexError, match="there is no frame 5 of 5"):
        frames[5]
    assert list(read_hdf5(path, cameras=["agentview_rgb"]).episodes[0].images) == ["agentview_rgb"]
    assert read_hdf5(path, cameras=[]).episodes[0].images == {}
    with pytest.raises(DataError, match=r"there are no pictures 'wrist'; there are agentview_rgb, eye_in_hand_rgb"):
        read_hdf5(path, cameras=["wrist"])
    path.write_bytes(b"gone")
    with pytest.raises(DataError, match=r"a\.h5: cannot be read as HDF5"):
        frames[0]


def test_state_is_what_was_asked_for(tmp_path):
    path = write(tmp_path / "a.hdf5", change=lambda f: f.create_dataset("data/demo_0/obs/hand", data=np.arange(5)))
    found = read_hdf5(path, state=["object", "hand"], limit=1)
    assert found.state_names == ("object_0", "object_1", "object_2", "object_3", "hand_0")
    assert found.episodes[0].states[:, 4].tolist() == [0, 1, 2, 3, 4]
    assert len(read_hdf5(path, state=["states"]).state_names) == 12  # of a file without observations
    with pytest.raises(
        DataError, match=r"demo_0: there is no data set 'eef', only actions, obs, states, obs/hand, obs/o"
    ):
        read_hdf5(path, state=["eef"])
    with pytest.raises(DataError, match="there is no data set 'obs', only"):  # a group
        read_hdf5(path, state=["obs"])
    path = write(tmp_path / "b.hdf5", obs={"hand": 2})
    with pytest.raises(
        DataError, match="demo_0: no usual observation is there; there are hand; name those of the state"
    ):
        read_hdf5(path)


def test_a_bad_demonstration_loses_no_other(tmp_path):
    def spoil(file):
        data = file["data"]
        data["demo_0/actions"][3, 2] = np.nan
        del data["demo_1/actions"]
        del data["demo_3/obs/object"]
        data["demo_3/obs/object"] = np.zeros((4, 4))
        del data["demo_4/obs/object"]
        data["demo_4/obs/object"] = np.zeros((5, 3))
        del data["demo_5"]
        data["demo_5"] = np.zeros(3)
        del data["demo_6/obs/object"]
        data["demo_6/obs/object"] = np.array([b"a"] * 5)
        file["mask/train"] = np.array([b"demo_0", b"demo_7"])

    found = read_hdf5(write(tmp_path / "a.hdf5", demos=range(8), change=spoil))
    assert [e.name for e in found.episodes] == ["demo_2", "demo_7"]
    assert found.splits == {"train": (1,)}
    rules = [str(note).partition(".hdf5: ")[2] for note in found.left_out]
    assert rules[0] == "demo_0: actions is not finite at step 3; mend or leave it out."
    assert rules[1].startswith("demo_1: there is no data set 'actions', only obs, states, obs/object")
    assert rules[2] == "demo_3: object has 4 steps, but robot0_eef_pos has 5; mend it or leave it out."
    assert rules[3] == "demo_4: its dimensions are others than those of demo_2; mend it or leave it out."
    assert rules[4].startswith("demo_5: this is no demonstration but a data set")
    assert rules[5].startswith("demo_6: object must be numbers (steps, dimensions)")


def test_files_that_cannot_be_used(tmp_path):
    path = write(tmp_path / "a.hdf5")
    whole = path.read_bytes()
    for data in (b"", b"a,b\n1,2\n", whole[: len(whole) // 2]):
        path.write_bytes(data)
        with pytest.raises(DataError, match=r"a\.hdf5: cannot be read as HDF5, being damaged, cut short or of another"):
            read_hdf5(path)
    with pytest.raises(DataError, match="there is no such file"):
        read_hdf5(tmp_path / "absent.hdf5")
    with pytest.raises(DataError, match="there must be a group 'data' with demonstrations, got data; only the layout"):
        read_hdf5(write(path, demos=()))
    with h5py.File(path, "w") as file:
        file["qpos"] = np.zeros(3)
    with pytest.raises(DataError, match="got qpos; only the layout of robomimic and LIBERO is read"):
        read_hdf5(path)
    with pytest.raises(ConfigError, match="fps must be above 0, got 0"):
        read_hdf5(path, fps=0)


def test_damage_inside_loses_one_demonstration(tmp_path):
    def packed(file):
        del file["data/demo_1/actions"]
        file["data/demo_1"].create_dataset("actions", data=np.full((5, 7), 1.5), fletcher32=True, chunks=(5, 7))

    path = write(tmp_path / "a.hdf5", change=packed)
    data = path.read_bytes()
    assert data.count(np.full(35, 1.5).tobytes()) == 1
    path.write_bytes(data.replace(np.full(35, 1.5).tobytes(), np.full(35, 2.5).tobytes()))
    found = read_hdf5(path)
    assert [e.name for e in found.episodes] == ["demo_0", "demo_2", "demo_10"]
    assert "demo_1: cannot be read (" in str(found.left_out[0])


def test_without_the_package(tmp_path, monkeypatch):
    path = write(tmp_path / "a.hdf5")
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(MissingExtraError, match=r"reading HDF5 needs the package 'h5py'.*vertebra\[hdf5\]"):
        read_hdf5(path)
