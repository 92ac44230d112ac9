"""The fabricated demonstrations: what an episode is, and the files."""

import argparse
import contextlib
import zipfile

import numpy as np
import pytest

from vertebra.cli import main
from vertebra.domains.action import arm, sample
from vertebra.domains.action.episodes import regular
from vertebra.domains.action.lerobot import read_lerobot
from vertebra.domains.action.simulation import record
from vertebra.domains.action.sources import read_demonstrations
from vertebra.domains.action.tables import read_csv, read_npz
from vertebra.errors import ConfigError, DataError, UnknownNameError

REACH, PICK = sample.TASKS["reach"], sample.TASKS["pick"]


@pytest.fixture(scope="module")
def made():
    return sample.demonstrations("val", 16, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    sample.write_sample(root)
    return root


# ---------------------------------------------------------------- episodes


def test_demonstrations_are_whole(made):
    assert made.fps == 20
    assert made.tasks == (REACH, PICK)
    assert made.state_names[7:9] == ("gripper", "object_x")
    assert len({episode.name for episode in made.episodes}) == 16
    for episode in made.episodes:
        episode.check()
        assert episode.states.shape == (len(episode), 17)
        assert episode.actions.shape == (len(episode), 8)
        assert episode.states.dtype == episode.actions.dtype == np.float32
        np.testing.assert_allclose(episode.times, np.arange(len(episode)) / 20)
        assert set(np.unique(episode.actions[:, 7])) == ({1.0} if episode.task == REACH else {0.0, 1.0})


def test_same_seed_same_numbers(made):
    again, other = sample.demonstrations("val", 3, 5), sample.demonstrations("val", 3, 6)
    for a, b, c in zip(again.episodes, made.episodes, other.episodes, strict=False):  # as many as wanted
        np.testing.assert_array_equal(a.states, b.states)
        np.testing.assert_array_equal(a.actions, b.actions)
        assert np.abs(a.states[0, 8:] - c.states[0, 8:]).max() > 0.001


def test_actions_are_where_the_joints_are_a_step_later(made):
    for episode in made.episodes:
        off = episode.states[1:, :7] - episode.actions[:-1, :7]
        assert 0.8e-3 < off.std() < 1.2e-3  # the sensors
        speed = np.abs(np.diff(episode.actions[:, :7], axis=0)).max() * 20
        assert 0.1 < speed < arm.SPEED
        ends = np.concatenate(
            [episode.actions[:2, :7] - episode.states[0, :7], np.diff(episode.actions[-3:, :7], axis=0)]
        )
        assert np.abs(ends).max() < 0.02  # from rest to rest


def test_reaches_end_at_their_target(made):
    reaches = [episode for episode in made.episodes if episode.task == REACH]
    starts = np.array([episode.states[0, :7] for episode in reaches])
    assert starts.std(0).min() > 0.2
    for episode in reaches:
        assert 1.5 <= len(episode) / 20 <= 3.3
        np.testing.assert_allclose(episode.states[:, 8:11], episode.states[:, 11:14], atol=0.01)  # nothing but a target
        tip, rotation = arm.forward(episode.actions[-1, :7])
        np.testing.assert_allclose(tip, episode.states[:, 11:14].mean(0), atol=2e-3)
        assert rotation[2, 2] < -0.999


def test_blocks_end_at_their_goal(made):
    for episode in made.episodes:
        if episode.task == PICK:
            blocks, goal = episode.states[:, 8:11], episode.states[:, 11:14].mean(0)
            np.testing.assert_allclose(blocks[-1], goal, atol=0.01)
            assert blocks[:, 2].max() > 0.1  # lifted
            assert arm.success(episode.actions, blocks[0], goal)
            # a block elsewhere is not taken along
            assert not arm.success(episode.actions, blocks[0] + [0.04, 0, 0], goal)


def test_played_again_they_give_the_same_states(made):
    for episode in made.episodes[:4]:
        first = episode.states[0]
        kind = "reach" if episode.task == REACH else "pick"
        simulated = arm.KinematicArm(noise=0)
        simulated.place(arm.Scene(kind, first[:7], first[8:11], first[11:14]))
        states = np.array([simulated.step(action) for action in episode.actions])
        np.testing.assert_allclose(states[:-1], episode.states[1:], atol=8e-3)
        assert simulated.succeeded


def test_splits_lie_on_their_squares():
    for split in arm.SPLITS:
        for episode in sample.demonstrations(split, 4, 0).episodes:
            # the median is free of the sensors' noise, and of the way the block goes
            for x, y in (np.median(episode.states[:20, columns], axis=0) for columns in ([8, 9], [11, 12])):
                near = {arm.split_of(x + dx, y + dy) for dx in (-1e-3, 0, 1e-3) for dy in (-1e-3, 0, 1e-3)}
                assert split in near


def test_disturbed_states_have_actions_that_lead_back():
    plain, pushed = (sample.demonstrations("train", 6, 0, ("pick",), disturb=d) for d in (0.0, 0.015))
    for a, b in zip(plain.episodes, pushed.episodes, strict=True):
        np.testing.assert_array_equal(a.actions, b.actions)
        off = (b.states[1:, :7] - b.actions[:-1, :7])[np.abs(np.diff(b.actions[:, :7], axis=0)).max(1) > 0.01]
        assert 0.01 < off.std() < 0.02
        np.testing.assert_allclose(b.states[-1, 8:11], b.states[-1, 11:14], atol=0.03)  # and yet it gets there


def test_camera_takes_the_place_of_the_scene():
    seen = sample.demonstrations("train", 2, 0, ("pick",), fps=5, camera=True)
    assert seen.state_names == arm.STATE_NAMES
    known = sample.demonstrations("train", 2, 0, ("pick",), fps=5)
    for a, b in zip(seen.episodes, known.episodes, strict=True):
        a.check()
        np.testing.assert_array_equal(a.states, b.states[:, :8])
        np.testing.assert_array_equal(a.actions, b.actions)
        frames = a.images[sample.CAMERA]
        assert frames.shape == (len(a), 48, 48, 3)
        first = arm.render(b.states[0, :7], 1.0, b.states[0, 8:11], b.states[0, 11:14])
        assert np.abs(frames[0].astype(int) - first).mean() < 1
        assert np.abs(frames[len(a) // 2].astype(int) - first).mean() > 2
    assert not known.episodes[0].images


def test_wrong_arguments():
    with pytest.raises(UnknownNameError, match="unknown split 'testing'"):
        sample.demonstrations("testing", 1, 0)
    with pytest.raises(UnknownNameError, match="unknown kind of episode 'picks'"):
        sample.demonstrations("test", 1, 0, ("picks",))
    for count, kinds, options in (
        (0, ("pick",), {}),
        (1, (), {}),
        (1, ("pick",), {"fps": 0}),
        (1, ("pick",), {"disturb": -1}),
    ):
        with pytest.raises(ConfigError, match="count must be at least 1, kinds not empty, fps above 0"):
            sample.demonstrations("test", count, 0, kinds, **options)


# ---------------------------------------------------------------- files


def test_same_seed_same_bytes(folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    again = sample.write_sample(folder)  # over the first
    assert set(again) == set(before)
    assert len(again) == len(before)
    assert all(path.read_bytes() == content for path, content in before.items())
    assert sum(map(len, before.values())) < 4e6
    dates = {info.date_time for path in folder.rglob("good.npz") for info in zipfile.ZipFile(path).infolist()}
    assert dates == {(1980, 1, 1, 0, 0, 0)}


def test_arm(folder):
    read = read_lerobot(folder / "arm")
    assert not read.left_out
    assert (len(read.episodes), read.fps, read.robot) == (120, 20, "kinematic_arm")
    assert read.state_names == arm.FULL_NAMES
    assert read.action_names == arm.ACTION_NAMES
    assert {split: len(numbers) for split, numbers in read.splits.items()} == sample.COUNTS
    assert sum(episode.task == REACH for episode in read.episodes) == 40
    expected = sample.demonstrations("test", 12, 0, ("reach", "pick", "pick"))
    for number, episode in zip(read.splits["test"], expected.episodes, strict=True):
        np.testing.assert_array_equal(read.episodes[number].states, episode.states)
        np.testing.assert_array_equal(read.episodes[number].actions, episode.actions)


def test_arm_camera(folder):
    read = read_lerobot(folder / "arm_camera")
    assert (len(read.episodes), read.fps, read.tasks) == (12, 10, (PICK,))
    assert read.state_names == arm.STATE_NAMES
    for episode in read.episodes:
        assert 4 < len(episode) / 10 < 8
        frames = episode.images[sample.CAMERA]
        assert len(frames) == len(episode)
        assert frames[0].shape == (48, 48, 3)
    expected = sample.demonstrations("train", 12, 1, ("pick",), fps=10, camera=True).episodes[3]
    np.testing.assert_array_equal(read.episodes[3].images[sample.CAMERA][20], expected.images[sample.CAMERA][20])


def test_held_out(folder):
    files = sorted((folder / "held_out").glob("*.npz"))
    assert len(files) == 10
    read = read_demonstrations([folder / "held_out"])  # all of them together
    assert not read.left_out
    assert len(read.episodes) == 12
    assert read.state_names == arm.FULL_NAMES
    assert len(read_csv(folder / "held_out" / "more.csv").episodes) == 2
    for file in files:
        (episode,) = read_npz(file).episodes
        assert file.name.startswith("reach" if episode.task == REACH else "pick")
        assert arm.split_of(*np.median(episode.states[:, 11:13], axis=0)) == "test"


def test_damaged_files_are_bad_and_their_neighbours_good(folder):
    read = read_demonstrations([folder / "damaged"])
    bad = {each.source.split("damaged/")[1].split(":")[0]: str(each) for each in read.left_out}
    words = {
        "empty.csv": ("empty",),
        "nan.npz": ("not finite", "59"),
        "text.csv": ("line 12", "state.joint_3", "'open'"),
        "truncated.npz": ("cut short",),
    }
    assert bad.keys() == words.keys()
    for name, expected in words.items():
        assert all(word in bad[name] for word in expected)
    assert len(read.episodes) == 2
    good = read_npz(folder / "damaged" / "good.npz").episodes[0]
    assert regular(good, 20) == ([good], [])
    with pytest.raises(DataError, match="empty"):
        read_csv(folder / "damaged" / "empty.csv")


def test_gaps_can_be_mended(folder):
    (episode,) = read_csv(folder / "damaged" / "gaps.csv").episodes
    (mended,), notes = regular(episode, 20)
    assert [note.rule for note in notes] == ["3 frames repeat an earlier time stamp", "3 frames are missing"]
    whole = sample.demonstrations("test", 1, 3).episodes[0]
    assert len(mended) == len(whole)
    np.testing.assert_allclose(mended.actions, whole.actions, atol=0.02)
    np.testing.assert_allclose(mended.actions[:20], whole.actions[:20], atol=1e-6)


# ---------------------------------------------------------------- recorded in a simulator


@pytest.mark.parametrize("task", ["ArmReach", "ArmPickCamera", "FetchReach"])
def test_recorded_demonstrations(task, tmp_path, capsys):
    if task.startswith("Fetch"):
        pytest.importorskip("gymnasium_robotics", reason="the extra `sim` is not installed")
        capsys.readouterr()  # what the package says when it is imported for the first time
    folder = tmp_path / "made"
    assert main(["sample", "action", "--sim", task, "--episodes", "2", "--seed", "4", "-o", str(folder)]) == 0
    said = capsys.readouterr()
    assert said.out.endswith(f"wrote 6 sample files to {folder}\n")
    assert not said.err  # no bar where nobody looks
    read, expected = read_lerobot(folder), record(task, 2, seed=4)
    assert not read.left_out
    assert (read.fps, read.robot, read.tasks) == (expected.fps, expected.robot, expected.tasks)
    assert (read.state_names, read.action_names) == (expected.state_names, expected.action_names)
    assert len(read.episodes) == 2
    for a, b in zip(read.episodes, expected.episodes, strict=True):
        np.testing.assert_array_equal(a.states, b.states)
        np.testing.assert_array_equal(a.actions, b.actions)
        assert a.images.keys() == b.images.keys()
        for camera, frames in b.images.items():
            np.testing.assert_array_equal(a.images[camera][10], frames[10])


def test_recording_moves_a_bar_on(tmp_path):
    told = []

    @contextlib.contextmanager
    def bar(*what):
        told.append(what)
        yield told.append

    options = argparse.Namespace(sim="ArmReach", episodes=3, seed=0)
    paths = sample.from_args(tmp_path / "made", options, bar)
    assert told == [("ArmReach", 3, "episodes"), 1, 1, 1]
    assert all(path.is_file() for path in paths)


def test_what_cannot_be_recorded(tmp_path, capsys):
    def says(*words):
        assert main(["sample", *words, "-o", str(tmp_path)]) == 2
        return capsys.readouterr().err

    assert "unknown simulated task 'FetchPsh'. Did you mean 'FetchPush'" in says("action", "--sim", "FetchPsh")
    assert "episodes must be at least 1, got 0" in says("action", "--sim", "ArmPick", "--episodes", "0")
    assert "--episodes goes with --sim TASK" in says("action", "--episodes", "3")
    assert "'--sim' is not accepted" in says("mesh", "--sim", "ArmPick")
    assert not list(tmp_path.iterdir())
    (tmp_path / "data").mkdir()
    assert "holds data/ already; remove it or choose another folder" in says("action", "--sim", "ArmPick")


def test_help_of_recording(capsys):
    assert main(["sample", "action", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--sim TASK" in said
    assert "ArmPickCamera" in said
    assert main(["sample", "--help"]) == 0
    assert "--sim" not in capsys.readouterr().out
