"""The Fetch tasks: experts, recording, policies in closed loop, and pictures."""

import importlib
import importlib.metadata
import importlib.util
import json
import os

import numpy as np
import pytest
from PIL import Image

from vertebra.domains.action import experts, simulation
from vertebra.domains.action.control import Decision
from vertebra.domains.action.experts import EXPERTS, ExpertPolicy, Noise
from vertebra.domains.action.simulation import (
    TASKS,
    Rollouts,
    filmstrip,
    make_env,
    plain_name,
    record,
    rms_jerk,
    rollout,
    state_names,
    wilson,
    write_gif,
)
from vertebra.errors import ConfigError, MissingExtraError, ShapeError, UnknownNameError

NEAR = 0.05
"""Metres from the goal that count as a success."""


@pytest.fixture
def simulator():
    pytest.importorskip("gymnasium_robotics", reason="the extra `sim` is not installed")


@pytest.fixture
def _short(monkeypatch):
    monkeypatch.setattr(simulation, "STEPS", 6)


def few(success, first, **changes):
    """Rollouts of made-up episodes."""
    count = len(success)
    rng = np.random.default_rng(0)
    given = {
        "task": "FetchReach",
        "seed": 0,
        "success": np.array(success),
        "first": np.array(first),
        "actions": rng.normal(size=(count, 5, 4)).astype(np.float32),
        "gripper": np.zeros((count, 6, 3), np.float32),
        "block": None,
        "goals": np.zeros((count, 3), np.float32),
        "decisions": (Decision(0.01, 2), Decision(0.03, 2), Decision(0.02, 1)),
        "frames": np.zeros((0, 8, 8, 3), np.uint8),
    }
    return Rollouts(**{**given, **changes})


# ---------------------------------------------------------------- without the simulator


def test_names_with_and_without_version():
    assert plain_name("FetchPush") == plain_name("FetchPush-v4") == "FetchPush"
    with pytest.raises(UnknownNameError, match=r"unknown simulated task 'FetchPsh'.*Did you mean 'FetchPush'"):
        plain_name("FetchPsh")
    with pytest.raises(UnknownNameError, match="FetchReach-v1"):
        make_env("FetchReach-v1")
    with pytest.raises(UnknownNameError, match="unknown expert 'FetchSlide'"):
        ExpertPolicy("FetchSlide")
    assert EXPERTS.keys() == TASKS.keys()


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


def test_the_interval_of_a_share():
    assert wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ConfigError, match="total must be at least 1"):
        wilson(0, 0)


def test_jerk_is_the_third_derivative():
    seconds = np.arange(20) / 25
    path = np.stack([3 * seconds**3 / 6, 4 * seconds**3 / 6, seconds**2], axis=1)  # m
    np.testing.assert_allclose(rms_jerk(np.stack([path, 0 * path])), [5, 0], rtol=1e-5)


def test_the_summary():
    summary = few([True, False, False], [2, 4, -1]).summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["success"] == pytest.approx(1 / 3)
    assert (summary["success_low"], summary["success_high"]) == wilson(1, 3)
    assert summary["ever"] == pytest.approx(2 / 3)
    assert summary["steps_to_success"] == 3
    assert (summary["episodes"], summary["decisions"], summary["jerk"]) == (3, 3, 0)
    assert summary["action_jerk"] > 0
    assert summary["decision_ms"] == pytest.approx(20)
    assert summary["decision_ms_per_environment"] == pytest.approx(15)
    assert few([False], [-1]).summary()["steps_to_success"] is None


def test_pushes_leave_the_fingers_and_the_end_alone():
    noise = Noise(probability=0.5, strength=0.4, steps=2, calm=10)
    pushes = noise.draw(np.random.default_rng(0), 50)
    np.testing.assert_array_equal(pushes, noise.draw(np.random.default_rng(0), 50))
    assert not pushes[:, 3].any()
    assert not pushes[41:].any()  # one that begins at step 39 lasts until 40
    assert 0.3 < pushes[pushes != 0].std() < 0.5
    assert not Noise(probability=0.0).draw(np.random.default_rng(0), 50).any()
    for wrong in ({"probability": 1.5}, {"strength": -1.0}, {"steps": 0}, {"calm": -1}):
        with pytest.raises(ConfigError, match="Noise: probability must be from 0 to 1"):
            Noise(**wrong)


def test_strips_and_films(tmp_path):
    frames = np.arange(10, dtype=np.uint8)[:, None, None, None] * np.full((1, 4, 6, 3), 20, np.uint8)
    strip = np.asarray(filmstrip(frames, count=4))
    assert strip.shape == (4, 24, 3)
    assert strip[0, ::6, 0].tolist() == [0, 60, 120, 180]
    assert filmstrip(frames[:2]).size == (12, 4)
    write_gif(tmp_path / "a.gif", frames, fps=10)
    with Image.open(tmp_path / "a.gif") as film:
        assert (film.n_frames, film.info["duration"], film.info["loop"]) == (10, 100, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["a.gif"]
    with pytest.raises(ConfigError, match="filmstrip: frames must be at least 1"):
        filmstrip(frames[:0])
    with pytest.raises(ConfigError, match="write_gif: frames must be at least 1"):
        write_gif(tmp_path / "b.gif", frames[:0])
    with pytest.raises(ConfigError, match="fps must be above 0"):
        write_gif(tmp_path / "b.gif", frames, fps=0)


# ---------------------------------------------------------------- experts


@pytest.mark.usefixtures("simulator")
@pytest.mark.parametrize("task", TASKS)
def test_experts_reach_the_goal_and_start_softly(task):
    rollouts = rollout(ExpertPolicy(task), task, episodes=3, parallel=3, seed=100)
    assert rollouts.success.all()
    assert np.linalg.norm(rollouts.actions[:, 0, :3], axis=1).max() < experts.START + 0.1
    assert np.abs(np.diff(rollouts.actions[..., :3], axis=1)).max() < 1
    assert len(state_names(task)) == (13 if task == "FetchReach" else 28)


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
    quiet = record("FetchPush", 1, seed=8, noise=None).episodes[0]
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
    monkeypatch.setattr(simulation, "STEPS", 4)  # enough for near goals alone
    wild = record("FetchReach", 2, seed=0, noise=None)
    assert len(wild.episodes) == 2
    assert len(wild.left_out) > 0
    assert str(wild.left_out[0]) == "FetchReach: seed 0: the expert did not succeed; it is left out."
    failed = [int(each.source.split()[-1]) for each in wild.left_out]
    assert not {f"seed_{seed:06d}" for seed in failed} & {episode.name for episode in wild.episodes}
    everything = record("FetchReach", 2, seed=0, noise=None, only_successes=False)
    assert [episode.name for episode in everything.episodes] == ["seed_000000", "seed_000001"]
    monkeypatch.setitem(EXPERTS, "FetchReach", lambda seen: np.ones(4, np.float32))
    with pytest.raises(ConfigError, match=r"the expert of FetchReach failed in \d+ of \d+ episodes; lower"):
        record("FetchReach", 2)
    with pytest.raises(ConfigError, match="record: episodes must be at least 1"):
        record("FetchReach", 0)


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
    monkeypatch.setattr(simulation, "STEPS", 10)
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
    with pytest.raises(ConfigError, match="parallel must be at least 1"):
        rollout(Constant([0, 0, 0, 0]), "FetchReach", parallel=0)
    with pytest.raises(ConfigError, match="frames must be from 0 to 7, got 8"):
        rollout(Constant([0, 0, 0, 0]), "FetchReach", frames=8)


# ---------------------------------------------------------------- pictures


@pytest.mark.usefixtures("simulator", "_short")
def test_pictures_change_nothing(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    policy = ExpertPolicy("FetchPush")
    for _ in range(2):  # the graphics are given back
        drawn = rollout(policy, "FetchPush", episodes=2, parallel=1, frames=3, seed=4)
        if drawn.notes:
            pytest.skip(drawn.notes[0])
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

    monkeypatch.setattr(simulation, "_graphics", fails)
    rollouts = rollout(ExpertPolicy("FetchReach"), "FetchReach", episodes=1, frames=3)
    assert rollouts.frames.shape == (0, 240, 240, 3)
    assert rollouts.notes == (
        "No pictures: drawing does not work here (no display); install EGL, or OSMesa and set MUJOCO_GL=osmesa.",
    )
