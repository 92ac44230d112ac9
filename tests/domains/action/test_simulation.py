"""Tasks by name, recording, policies in closed loop, figures of rollouts, and pictures."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from vertebra.domains.action.control import Decision
from vertebra.domains.action.experts import Noise
from vertebra.domains.action.simulation import (
    TASKS,
    Rollouts,
    filmstrip,
    find_task,
    gif_bytes,
    joined,
    record,
    rms_jerk,
    rollout,
    split,
    wilson,
    write_gif,
)
from vertebra.errors import ConfigError, ShapeError, UnknownNameError


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
        "fps": 25.0,
        "decisions": (Decision(0.01, 2), Decision(0.03, 2), Decision(0.02, 1)),
        "frames": np.zeros((0, 8, 8, 3), np.uint8),
    }
    return Rollouts(**{**given, **changes})


class Line:
    """An environment: a point goes along x as it is told, to the goal; the state is x, the goal's and a constant."""

    carried = None

    def __init__(self, split, kept):
        self.split, kept[:] = split, [*kept, self]
        self.closed, self.drawn = False, 0

    @property
    def success(self):
        return abs(self.x - self.goal[0]) < 0.045

    @property
    def tip(self):
        return np.array([self.x, 0, 0])

    def reset(self, seed):
        self.x, self.goal = 0.0, np.array([0.1 * seed, 0, 0])
        return self._state()

    def step(self, action):
        self.x += float(action[0])
        return self._state()

    def images(self):
        return {}

    def render(self):
        self.drawn += 1
        return np.full((4, 6, 3), self.drawn, np.uint8)

    def close(self):
        self.closed = True

    def _state(self):
        return np.array([self.x, self.goal[0], 1], np.float32)


def steady(env):
    """An expert that goes to the goal at up to 0.2 a step."""
    while True:
        yield np.array([np.clip(env.goal[0] - env.x, -0.2, 0.2), 0], np.float32)


@pytest.fixture
def line(monkeypatch):
    """The environments of the task ``Line`` that were made."""
    made = []
    task = dataclasses.replace(
        TASKS["ArmReach"],
        name="Line",
        source="Line-v9",
        steps=8,
        fps=4.0,
        state_names=("x", "goal", "one"),
        action_names=("dx", "gripper"),
        low=np.array([-0.3, -1], np.float32),
        high=np.array([0.3, 1], np.float32),
        noise=Noise(probability=1, strength=0.1, steps=1, calm=4),
        make=lambda split: Line(split, made),
        expert=steady,
    )
    monkeypatch.setitem(TASKS, "Line", task)
    return made


class Chasing:
    """Goes to the goal in chunks of three steps, and closes the gripper on the way."""

    horizon = 3
    history = 2

    def __init__(self, width=2):
        self.width, self.starts = width, []

    def __call__(self, states, images, tasks, start):
        assert not images
        assert set(tasks) == {"reach the target"}
        self.starts.append(start)
        steps = (states[:, -1, 1] - states[:, -1, 0])[:, None] * [0.5, 0.25, 0.125]
        others = (states[:, -1, 0] > 0)[:, None] * np.ones(3)
        return np.stack([steps] + [others] * (self.width - 1), axis=2).astype(np.float32)


class Constant:
    """Goes on at the same speed."""

    horizon = 1
    history = 1

    def __init__(self, speed):
        self.speed = speed

    def __call__(self, states, images, tasks, start):
        return np.full((len(states), 1, 2), self.speed, np.float32)


# ---------------------------------------------------------------- tasks


def test_names_in_short_and_in_full():
    assert find_task("FetchPush") is find_task("FetchPush-v4") is TASKS["FetchPush"]
    assert find_task("ArmPick").name == "ArmPick"
    everything = "ArmPick, ArmPickCamera, ArmReach, FetchPickAndPlace, FetchPush, FetchReach"
    with pytest.raises(UnknownNameError, match=rf"unknown simulated task 'FetchPsh'.*'FetchPush'.*{everything}"):
        find_task("FetchPsh")
    for wrong in ("FetchReach-v1", "ArmPick-v4"):
        with pytest.raises(UnknownNameError, match=wrong):
            rollout(Chasing(), wrong)
    with pytest.raises(UnknownNameError, match="ArmPeck"):
        record("ArmPeck", 1)


def test_tasks_agree_with_themselves():
    for name, task in TASKS.items():
        assert task.name == name
        assert len(task.low) == len(task.high) == len(task.action_names)
        assert (task.low < task.high).all()


# ---------------------------------------------------------------- recording


def test_recording(line):
    done = []
    made = record("Line", 3, seed=2, progress=done.append)
    assert done == [1, 2, 3]
    assert [episode.name for episode in made.episodes] == ["seed_000002", "seed_000003", "seed_000004"]
    assert (made.fps, made.state_names, made.action_names) == (4.0, ("x", "goal", "one"), ("dx", "gripper"))
    for episode in made.episodes:
        episode.check()
        assert (episode.states.shape, episode.actions.shape) == ((8, 3), (8, 2))
        assert (episode.source, episode.task) == ("Line-v9", "reach the target")
        own = np.clip(episode.states[:, 1] - episode.states[:, 0], -0.2, 0.2)
        np.testing.assert_allclose(episode.actions[:, 0], own, atol=1e-6)  # not what disturbs it
        assert np.abs(np.diff(episode.states[:4, 0]) - own[:3]).max() > 0.02
        np.testing.assert_allclose(np.diff(episode.states[4:, 0]), own[4:-1], atol=1e-6)
    again = record("Line", 1, seed=3).episodes[0]
    np.testing.assert_array_equal(again.states, made.episodes[1].states)
    quiet = record("Line", 1, seed=3, noise=0).episodes[0]
    np.testing.assert_allclose(np.diff(quiet.states[:, 0]), quiet.actions[:-1, 0], atol=1e-6)
    wild = record("Line", 1, seed=3, noise=100, only_successes=False).episodes[0]
    assert np.abs(np.diff(wild.states[:, 0])).max() == pytest.approx(0.3)  # within the bounds
    assert {(env.split, env.closed) for env in line} == {("train", True)}


def test_failures_are_left_out(line, monkeypatch):
    def late(env):  # goes in two steps, where the seed is even
        even = round(10 * env.goal[0]) % 2 == 0
        yield from 2 * [np.array([even * env.goal[0] / 2, 0], np.float32)]

    monkeypatch.setitem(TASKS, "Line", dataclasses.replace(TASKS["Line"], expert=late))
    made = record("Line", 2, seed=1, noise=0)
    assert [episode.name for episode in made.episodes] == ["seed_000002", "seed_000004"]
    assert [len(episode) for episode in made.episodes] == [2, 2]  # as long as the expert goes on
    assert [str(each) for each in made.left_out] == [
        "Line: seed 1: the expert did not succeed; it is left out.",
        "Line: seed 3: the expert did not succeed; it is left out.",
    ]
    whole = record("Line", 2, seed=1, noise=0, only_successes=False)
    assert [episode.name for episode in whole.episodes] == ["seed_000001", "seed_000002"]
    assert whole.left_out == ()
    monkeypatch.setitem(TASKS, "Line", dataclasses.replace(TASKS["Line"], expert=lambda env: iter([np.zeros(2)])))
    with pytest.raises(ConfigError, match=r"the expert of Line failed in 21 of 21 episodes; lower the noise"):
        record("Line", 2, seed=1)


def test_bad_numbers(line):
    with pytest.raises(ConfigError, match="record: episodes must be at least 1, got 0"):
        record("Line", 0)
    for noise in (-1, np.inf, np.nan):
        with pytest.raises(ConfigError, match="noise must be a finite number from 0 on"):
            record("Line", 1, noise=noise)
    with pytest.raises(ConfigError, match="rollout: episodes must be at least 1, got 0"):
        rollout(Chasing(), "Line", episodes=0)
    with pytest.raises(ConfigError, match="parallel must be at least 1"):
        rollout(Chasing(), "Line", parallel=0)
    with pytest.raises(ConfigError, match="frames must be from 0 to 9, got 10"):
        rollout(Chasing(), "Line", frames=10)
    with pytest.raises(ShapeError, match="the policy says 3 numbers a step, but Line takes 2"):
        rollout(Chasing(3), "Line", episodes=1)
    assert all(env.closed for env in line)


# ---------------------------------------------------------------- closed loop


@pytest.mark.parametrize("arguments", [{}, {"execute": 2}, {"ensemble": 0.1}])
def test_an_episode_depends_on_its_seed_alone(line, arguments):
    policy = Chasing()
    one = rollout(Chasing(), "Line", episodes=5, parallel=1, seed=3, **arguments)
    two = rollout(policy, "Line", episodes=5, parallel=2, seed=3, **arguments)
    for name in ("success", "first", "actions", "gripper", "goals"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    late = rollout(Chasing(), "Line", episodes=1, seed=5, **arguments)
    np.testing.assert_array_equal(late.gripper[0], one.gripper[2])
    each = {"execute": 4, "ensemble": 8}.get(next(iter(arguments), ""), 3)  # decisions of eight steps
    assert [decision.batch for decision in two.decisions] == [2] * each * 2 + [1] * each
    assert [start is None for start in policy.starts] == ([True] + [False] * (each - 1)) * 3
    assert {env.split for env in line} == {"test"}


def test_what_is_kept_of_rollouts(line):
    done = []
    rollouts = rollout(Chasing(), "Line-v9", episodes=5, parallel=2, seed=0, progress=done.append)
    assert done == [2, 4, 5]
    assert (rollouts.task, rollouts.seed, rollouts.fps, len(rollouts)) == ("Line", 0, 4.0, 5)
    assert rollouts.actions.shape == (5, 8, 2)
    assert rollouts.gripper.shape == (5, 9, 3)
    assert rollouts.block is None
    np.testing.assert_allclose(rollouts.goals[:, 0], 0.1 * np.arange(5), atol=1e-6)
    np.testing.assert_allclose(np.diff(rollouts.gripper[..., 0]), rollouts.actions[..., 0], atol=1e-6)
    near = np.abs(rollouts.gripper - rollouts.goals[:, None])[:, 1:, 0] < 0.045
    np.testing.assert_array_equal(rollouts.success, near[:, -1])
    np.testing.assert_array_equal(rollouts.first, 1 + near.argmax(1))
    assert rollouts.success.all()
    np.testing.assert_array_equal(rollouts.jerk, rms_jerk(rollouts.gripper, 4.0))
    np.testing.assert_array_equal(rollouts.action_jerk, rms_jerk(rollouts.actions[..., :1], 4.0))
    assert rollouts.jerk[1:].min() > 0.3
    assert rollouts.notes == ()
    assert len(rollouts.frames) == 0
    far = rollout(Chasing(), "Line", episodes=1, seed=100)
    assert far.first.tolist() == [-1]
    assert far.actions[..., 0].max() == pytest.approx(0.3)  # within the bounds
    assert len(line) == 3
    assert all(env.closed for env in line)


def test_success_is_that_of_the_last_step(line):
    rollouts = rollout(Constant(0.1), "Line", episodes=3, parallel=3, seed=6)
    assert rollouts.first.tolist() == [6, 7, 8]
    assert rollouts.success.tolist() == [False, False, True]
    assert rollouts.ever.all()


def test_rollouts_of_groups_are_joined(line):
    whole = rollout(Chasing(), "Line", episodes=5, seed=1, frames=2)
    parts = [rollout(Chasing(), "Line", episodes=e, seed=s, frames=f) for e, s, f in ((2, 1, 2), (3, 3, 0))]
    together = joined(parts)
    for name in ("success", "first", "actions", "gripper", "goals", "frames", "block", "seed", "task", "fps"):
        np.testing.assert_array_equal(getattr(together, name), getattr(whole, name))
    assert together.decisions == parts[0].decisions + parts[1].decisions
    with pytest.raises(ConfigError, match="Line up to seed 5 cannot be followed by Line from seed 1 on"):
        joined(parts[::-1])
    with pytest.raises(ConfigError, match="parts must be at least 1"):
        joined([])
    blocks = few([True], [1], block=np.ones((1, 6, 3), np.float32), notes=("a",))
    both = joined([blocks, dataclasses.replace(blocks, seed=1)])
    assert both.block.shape == (2, 6, 3)
    assert both.notes == ("a",)


def test_rollouts_are_taken_apart_into_episodes(line):
    whole = rollout(Chasing(), "Line", episodes=3, seed=1, frames=2)
    parts = split(whole)
    assert [(len(part), part.seed, len(part.frames)) for part in parts] == [(1, 1, 2), (1, 2, 0), (1, 3, 0)]
    again = joined(parts)
    for name in ("success", "first", "actions", "gripper", "goals", "frames", "block", "seed"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    assert again.decisions == whole.decisions
    facts = few([False, True], [-1, 4], block=np.ones((2, 6, 3), np.float32))
    assert [part.outcome()["success"] for part in split(facts)] == [0, 1]
    assert [part.outcome()["steps_to_success"] for part in split(facts)] == [None, 4]
    assert split(facts)[1].block.shape == (1, 6, 3)


# ---------------------------------------------------------------- figures


def test_the_interval_of_a_share():
    assert wilson(95, 100) == pytest.approx((0.8882, 0.9785), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ConfigError, match="total must be at least 1"):
        wilson(0, 0)


def test_jerk_is_the_third_derivative():
    seconds = np.arange(20) / 25
    path = np.stack([3 * seconds**3 / 6, 4 * seconds**3 / 6, seconds**2], axis=1)  # m
    np.testing.assert_allclose(rms_jerk(np.stack([path, 0 * path]), 25), [5, 0], rtol=1e-5)


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
    assert np.abs(noise.draw(np.random.default_rng(0), 50, 8)[:, :-1]).max(0).all()
    assert not Noise(probability=0.0).draw(np.random.default_rng(0), 50).any()
    for wrong in ({"probability": 1.5}, {"strength": -1.0}, {"steps": 0}, {"calm": -1}):
        with pytest.raises(ConfigError, match="Noise: probability must be from 0 to 1"):
            Noise(**wrong)


# ---------------------------------------------------------------- pictures


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
    assert gif_bytes(frames, fps=10) == (tmp_path / "a.gif").read_bytes()
    with pytest.raises(ConfigError, match="filmstrip: frames must be at least 1"):
        filmstrip(frames[:0])
    with pytest.raises(ConfigError, match="gif_bytes: frames must be at least 1"):
        write_gif(tmp_path / "b.gif", frames[:0])
    with pytest.raises(ConfigError, match="fps must be above 0"):
        write_gif(tmp_path / "b.gif", frames, fps=0)


@pytest.mark.parametrize(("frames", "steps"), [(1, [0]), (3, [0, 4, 8]), (9, range(9))])
def test_pictures_are_of_the_first_episode(line, frames, steps, monkeypatch):
    class Watched(Line):
        def render(self):
            return np.full((2, 2, 3), round(10 * self.x), np.uint8)

    monkeypatch.setitem(TASKS, "Line", dataclasses.replace(TASKS["Line"], make=lambda split: Watched(split, line)))
    rollouts = rollout(Constant(0.1), "Line", episodes=3, parallel=2, frames=frames)
    assert rollouts.frames.shape == (frames, 2, 2, 3)
    assert rollouts.frames[:, 0, 0, 0].tolist() == list(steps)


def test_where_drawing_does_not_work_there_is_a_note(line, monkeypatch):
    def fails(self):
        self.drawn += 1
        if self.drawn == 2:
            raise ConfigError("Line: no display.")
        return np.zeros((2, 2, 3), np.uint8)

    monkeypatch.setattr(Line, "render", fails)
    rollouts = rollout(Chasing(), "Line", episodes=2, parallel=2, frames=5)
    assert len(rollouts.frames) == 0
    assert rollouts.notes == ("No pictures: Line: no display.",)
    assert [env.drawn for env in line] == [2, 0]  # it is not tried again
