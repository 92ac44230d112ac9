import numpy as np
import pytest

from vertebra.domains.action.calvin import is_calvin, read_calvin
from vertebra.domains.action.episodes import regular
from vertebra.errors import ConfigError, DataError


def write(folder, ends=((10, 15), (3, 6)), skip=()):
    folder.mkdir(exist_ok=True)
    np.save(folder / "ep_start_end_ids.npy", np.array(ends))
    for first, last in ends:
        for i in range(first, last + 1):
            arrays = {
                "rel_actions": np.full(7, i / 100),
                "actions": np.full(7, float(i)),
                "robot_obs": np.full(15, i, np.float32),
                "scene_obs": np.zeros(24),
                "rgb_static": np.full((4, 4, 3), i, np.uint8),
                "rgb_tactile": np.zeros((4, 4, 6), np.uint8),
                "depth_static": np.zeros((4, 4), np.float32),
            }
            if i not in skip:
                np.savez_compressed(folder / f"episode_{i:07d}.npz", **arrays)
    return folder


def test_episodes_of_play(tmp_path):
    folder = write(tmp_path / "training")
    assert is_calvin(folder)
    assert not is_calvin(tmp_path)
    found = read_calvin(folder)
    assert [e.name for e in found.episodes] == ["episode_0000003", "episode_0000010"]
    assert [len(e) for e in found.episodes] == [4, 6]
    second = found.episodes[1]
    assert second.actions[:, 6] == pytest.approx(np.arange(10, 16) / 100)
    assert second.states[:, 0].tolist() == [10, 11, 12, 13, 14, 15]
    assert second.times == pytest.approx(np.arange(6) / 30)
    assert (found.fps, found.splits, found.left_out) == (30, {"train": (0, 1)}, ())
    assert found.action_names == (*found.state_names[:6], "gripper")
    assert found.state_names[6:8] == ("gripper_width", "joint_0")
    assert list(second.images) == ["rgb_static"]
    assert [frame[0, 0, 0] for frame in second.images["rgb_static"]] == [10, 11, 12, 13, 14, 15]
    assert second.images["rgb_static"][1:3][:, 0, 0, 0].tolist() == [11, 12]
    found = read_calvin(folder, state=["scene_obs", "robot_obs"], action="actions", cameras=[], fps=15, limit=1)
    assert len(found.episodes) == 1
    assert found.episodes[0].images == {}
    assert found.episodes[0].times[1] == pytest.approx(1 / 15)
    assert found.state_names[23:25] == ("scene_obs_23", "x")


def test_lost_steps_leave_a_gap(tmp_path):
    folder = write(tmp_path / "play", skip=(12, 13))
    (folder / "episode_0000005.npz").write_bytes((folder / "episode_0000005.npz").read_bytes()[:200])
    found = read_calvin(folder)
    assert found.splits == {}
    assert [str(note) for note in found.left_out] == [
        f"{folder}: episode_0000003: 1 steps are absent or damaged; they are passed over.",
        f"{folder}: episode_0000010: 2 steps are absent or damaged; they are passed over.",
    ]
    assert found.episodes[1].times == pytest.approx(np.array([0, 1, 4, 5]) / 30)
    (whole,), _ = regular(found.episodes[1], found.fps)
    assert whole.states[:, 0] == pytest.approx(np.arange(10, 16))
    picture = found.episodes[1].images["rgb_static"]
    (folder / "episode_0000010.npz").unlink()
    with pytest.raises(DataError, match=r"episode_0000010\.npz: rgb_static cannot be read"):
        picture[0]
    with pytest.raises(IndexError):
        picture[4]


def test_an_episode_that_is_lost_whole(tmp_path):
    folder = write(tmp_path / "play", skip=range(10, 16))
    found = read_calvin(folder)
    assert [e.name for e in found.episodes] == ["episode_0000003"]
    assert "episode_0000010: none of its 6 steps can be read" in str(found.left_out[0])


def test_folders_that_cannot_be_used(tmp_path):
    folder = write(tmp_path / "play")
    for options, match in (
        (
            {"action": "acts"},
            r"episode_0000003\.npz: there is no array 'acts'; arrays: rel_actions, actions, robot_obs",
        ),
        ({"cameras": ["rgb_tactile"]}, "there are no pictures 'rgb_tactile'; there are rgb_static"),
        ({"action": "depth_static"}, r"depth_static must be numbers \(steps, dimensions\)"),
    ):
        with pytest.raises(DataError, match=match):
            read_calvin(folder, **options)
    with pytest.raises(ConfigError, match="fps must be above 0"):
        read_calvin(folder, fps=0)
    np.save(folder / "ep_start_end_ids.npy", np.zeros((0, 2), int))
    with pytest.raises(DataError, match=r"ep_start_end_ids\.npy: names no episode"):
        read_calvin(folder)
    np.save(folder / "ep_start_end_ids.npy", np.zeros(4))
    with pytest.raises(DataError, match=r"must be whole numbers \(E, 2\)"):
        read_calvin(folder)
    (folder / "ep_start_end_ids.npy").write_bytes(b"")
    with pytest.raises(DataError, match="there is no such file, or it is damaged"):
        read_calvin(folder)
