"""The Fetch tasks: experts, recording, policies in closed loop, and pictures."""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os

import numpy as np
import pytest

from vertebra.domains.action import experts, fetch
from vertebra.domains.action.experts import EXPERTS, ExpertPolicy
from vertebra.domains.action.fetch import make_env
from vertebra.domains.action.simulation import TASKS, record, rollout
from vertebra.errors import ConfigError, MissingExtraError, ShapeError, UnknownNameError

NEAR = 0.05
"""Metres from the goal that count as a success."""


@pytest.fixture
def simulator():
    pytest.importorskip("gymnasium_robotics", reason="the extra `sim` is not installed")


def shorten(monkeypatch, steps):
    """Make episodes shorter."""
    for name in fetch.TASKS:
        monkeypatch.setitem(TASKS, name, dataclasses.replace(TASKS[name], steps=steps))


@pytest.fixture
def _short(monkeypatch):
    shorten(monkeypatch, 6)


# ---------------------------------------------------------------- without the simulator


def test_there_is_an_expert_of_each_task():
    assert EXPERTS.keys() == fetch.TASKS.keys()
    with pytest.raises(UnknownNameError, match="unknown expert 'FetchSlide'"):
        ExpertPolicy("FetchSlide")


def test_a_missing_simulator_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"simulation needs .*gymnasium_robotics.*vertebra\[sim\]"):
        make_env("FetchReach")


def test_a_simulator_that_is_too_new(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "4.0.1")
    with pytest.raises(MissingExtraError, match=r"mujoco 4.0.1 is installed.*'mujoco<4'.*vertebra\[sim\]"):
        make_env("FetchReach")


def test_graphics_that_cannot_be_imported(monkeypatch):
    def fails(name):
        raise AttributeError("no such library")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "3.3.7")
    monkeypatch.setattr(importlib, "import_module", fails)
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    with pytest.raises(ConfigError, match=r"MUJOCO_GL=osmesa \(no such library\); unset it, or install"):
        make_env("FetchReach")
    monkeypatch.delenv("MUJOCO_GL")
    with pytest.raises(AttributeError, match="no such library"):
        make_env("FetchReach")


# ---------------------------------------------------------------- experts


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("task", fetch.TASKS)
def test_experts_reach_the_goal_and_start_softly(task):
    rollouts = rollout(ExpertPolicy(task), task, episodes=3, parallel=3, seed=100)
    assert rollouts.success.all()
    assert np.linalg.norm(rollouts.actions[:, 0, :3], axis=1).max() < experts.START + 0.1
    assert np.abs(np.diff(rollouts.actions[..., :3], axis=1)).max() < 1
    assert len(TASKS[task].state_names) == (13 if task == "FetchReach" else 28)


@pytest.mark.usefixtures("simulator")
def test_names_of_the_state_say_what_it_is():
    with_block = record("FetchPickAndPlace", 1)
    column = dict(zip(with_block.state_names, with_block.episodes[0].states.T, strict=True))
    np.testing.assert_allclose(
        column["block_from_gripper_y"], column["block_y"] - column["gripper_y"], rtol=0, atol=1e-6
    )
    moved = np.diff(column["gripper_x"])
    assert np.corrcoef(moved, column["gripper_vx"][1:])[0, 1] > 0.9
    assert np.ptp(column["goal_z"]) == 0
    assert column["finger_left"].max() > 0.045  # open
    assert with_block.action_names == ("dx", "dy", "dz", "fingers")
    reach = record("FetchReach", 1)
    column = dict(zip(reach.state_names, reach.episodes[0].states.T, strict=True))
    assert np.corrcoef(np.diff(column["gripper_x"]), column["gripper_vx"][1:])[0, 1] > 0.9


# ---------------------------------------------------------------- recording


@pytest.mark.usefixtures("simulator")
def test_recording_is_deterministic_and_keeps_the_experts_own_actions():
    done = []
    demonstrations = record("FetchPush-v4", 3, seed=7, progress=done.append)
    again = record("FetchPush", 1, seed=8)
    assert done == [1, 2, 3]
    assert [episode.name for episode in demonstrations.episodes] == ["seed_000007", "seed_000008", "seed_000009"]
    for name in ("states", "actions", "times"):
        np.testing.assert_array_equal(getattr(demonstrations.episodes[1], name), getattr(again.episodes[0], name))
    quiet = record("FetchPush", 1, seed=8, noise=0).episodes[0]
    for episode in demonstrations.episodes:
        episode.check()
        assert (episode.states.shape, episode.actions.shape) == ((50, 28), (50, 4))
        assert episode.states.dtype == episode.actions.dtype == np.float32
        own = ExpertPolicy("FetchPush")(episode.states[:, None], {}, [], None)[:, 0]
        np.testing.assert_allclose(episode.actions, own, atol=1e-3)
    np.testing.assert_array_equal(quiet.states[0], again.episodes[0].states[0])
    assert np.abs(quiet.states - again.episodes[0].states).max() > 0.01  # it was pushed
    assert demonstrations.fps == 25
    np.testing.assert_allclose(np.diff(quiet.times), 1 / 25)
    assert demonstrations.tasks == ("push the block to the goal",)
    assert demonstrations.left_out == ()


@pytest.mark.usefixtures("simulator")
def test_episodes_that_fail_are_left_out(monkeypatch):
    shorten(monkeypatch, 4)  # enough for near goals alone
    wild = record("FetchReach", 2, seed=0, noise=0)
    assert len(wild.episodes) == 2
    assert len(wild.left_out) > 0
    assert str(wild.left_out[0]) == "FetchReach: seed 0: the expert did not succeed; it is left out."
    failed = [int(each.source.split()[-1]) for each in wild.left_out]
    assert not {f"seed_{seed:06d}" for seed in failed} & {episode.name for episode in wild.episodes}
    everything = record("FetchReach", 2, seed=0, noise=0, only_successes=False)
    assert [episode.name for episode in everything.episodes] == ["seed_000000", "seed_000001"]
    monkeypatch.setitem(EXPERTS, "FetchReach", lambda seen: np.ones(4, np.float32))
    with pytest.raises(ConfigError, match=r"the expert of FetchReach failed in \d+ of \d+ episodes; lower the noise"):
        record("FetchReach", 2)


# ---------------------------------------------------------------- closed loop


class Chasing:
    """Goes to the goal in chunks, each environment by itself."""

    horizon = 5
    history = 2

    def __call__(self, states, images, tasks, start):
        assert states.shape[1:] == (2, 13)
        assert set(tasks) == {"move the gripper to the goal"}
        away = states[:, -1, -3:] - states[:, -1, :3]
        shares = 6 * 0.7 ** np.arange(5)
        moves = np.tanh(away[:, None] * shares[:, None])
        return np.concatenate([moves, 0 * moves[..., :1]], axis=2).astype(np.float32)


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("arguments", [{}, {"execute": 2}, {"ensemble": 0.1}])
def test_an_episode_depends_on_its_seed_alone(arguments, monkeypatch):
    shorten(monkeypatch, 10)
    one = rollout(Chasing(), "FetchReach", episodes=3, parallel=1, seed=3, **arguments)
    two = rollout(Chasing(), "FetchReach", episodes=3, parallel=2, seed=3, **arguments)
    for name in ("success", "first", "actions", "gripper", "goals"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    late = rollout(Chasing(), "FetchReach", episodes=1, seed=5, **arguments)
    np.testing.assert_array_equal(late.gripper[0], one.gripper[2])
    each = {"execute": 5, "ensemble": 10}.get(next(iter(arguments), ""), 2)  # decisions of ten steps
    assert [decision.batch for decision in two.decisions] == [2] * each + [1] * each
    assert one.block is None


@pytest.mark.usefixtures("simulator")
def test_what_is_kept_of_rollouts():
    done = []
    rollouts = rollout(ExpertPolicy("FetchPush"), "FetchPush-v4", episodes=3, parallel=2, progress=done.append)
    assert done == [2, 3]
    assert (rollouts.task, rollouts.seed, len(rollouts)) == ("FetchPush", 10_000, 3)
    assert rollouts.actions.shape == (3, 50, 4)
    assert rollouts.gripper.shape == rollouts.block.shape == (3, 51, 3)
    near = np.linalg.norm(rollouts.block - rollouts.goals[:, None], axis=2)[:, 1:] < NEAR
    np.testing.assert_array_equal(rollouts.success, near[:, -1])
    np.testing.assert_array_equal(rollouts.first, 1 + near.argmax(1))
    assert not near[:, 0].any()
    assert rollouts.jerk.min() > 10
    assert rollouts.jerk.max() < 1000
    assert rollouts.notes == ()
    assert len(rollouts.frames) == 0


class Constant:
    horizon = 1
    history = 1

    def __init__(self, action):
        self.action = np.array(action, np.float32)

    def __call__(self, states, images, tasks, start):
        return np.broadcast_to(self.action, (len(states), 1, len(self.action)))


@pytest.mark.usefixtures("simulator", "_short")
def test_policies_that_do_not_get_there():
    rollouts = rollout(Constant([9, 9, 9, 9]), "FetchReach", episodes=2)
    assert not rollouts.ever.any()
    assert rollouts.first.tolist() == [-1, -1]
    assert rollouts.actions.max() == 1  # what is carried out
    with pytest.raises(ShapeError, match="the policy says 3 numbers a step, but FetchReach takes 4"):
        rollout(Constant([0, 0, 0]), "FetchReach", episodes=1)


# ---------------------------------------------------------------- pictures


@pytest.fixture
def _egl(simulator):
    try:
        importlib.import_module("mujoco.egl").GLContext(8, 8).free()
    except Exception as error:
        pytest.skip(f"EGL does not work here: {error}")


@pytest.mark.usefixtures("_egl", "_short")
def test_pictures_change_nothing(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    policy = ExpertPolicy("FetchPush")
    for _ in range(2):  # the graphics are given back
        drawn = rollout(policy, "FetchPush", episodes=2, parallel=1, frames=3, seed=4)
        assert drawn.notes == ()
        assert drawn.frames.shape == (3, 240, 240, 3)
        assert drawn.frames.dtype == np.uint8
        assert all(frame.std() > 10 for frame in drawn.frames)
        assert (drawn.frames[0] != drawn.frames[2]).any()
    assert "MUJOCO_GL" not in os.environ
    np.testing.assert_array_equal(drawn.gripper, rollout(policy, "FetchPush", episodes=2, parallel=1, seed=4).gripper)


@pytest.mark.usefixtures("simulator", "_short")
def test_where_drawing_does_not_work_there_is_a_note(monkeypatch):
    def fails(first):
        raise RuntimeError("no display")

    monkeypatch.setattr(fetch, "_graphics", fails)
    rollouts = rollout(ExpertPolicy("FetchReach"), "FetchReach", episodes=1, frames=3)
    assert len(rollouts.frames) == 0
    assert rollouts.notes == (
        "No pictures: FetchReach: drawing does not work here (no display); install EGL, or OSMesa and set "
        "MUJOCO_GL=osmesa.",
    )
