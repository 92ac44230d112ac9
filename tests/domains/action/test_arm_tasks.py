"""The arm's tasks: what experts do, scenes of splits, the camera, and policies in closed loop."""

import numpy as np
import pytest

from vertebra.domains.action import arm, arm_tasks
from vertebra.domains.action.arm import LOWER, Scene
from vertebra.domains.action.arm_tasks import TASKS, corners, plan
from vertebra.domains.action.simulation import record, rollout


class Planner:
    """Plans the whole episode from the first state, and follows it; at its end it stays where it is."""

    history = 1

    def __init__(self, name):
        self.task = TASKS[name]
        self.horizon = self.task.steps
        self.kind = "reach" if name == "ArmReach" else "pick"
        self.cameras = set()

    def __call__(self, states, images, tasks, start):
        assert start is None
        assert set(tasks) == {self.task.text}
        self.cameras |= {(camera, seen.shape[1:]) for camera, seen in images.items()}
        ways = []
        for state in states[:, -1]:
            scene = Scene(self.kind, state[:7], state[8:11], state[11:14])
            way = plan(scene, arm.inverse(corners(scene)), self.task.fps)
            ways.append(np.concatenate([way, way[-1:].repeat(self.horizon - len(way), axis=0)]))
        return np.array(ways, np.float32)


class Still:
    """Stays as it begins; remembers what it was shown."""

    horizon = 50
    history = 2

    def __init__(self):
        self.shown = []

    def __call__(self, states, images, tasks, start):
        self.shown.append((states, images))
        return np.repeat(states[:, -1:, :8], self.horizon, axis=1)


@pytest.mark.parametrize(
    ("name", "width", "fps"), [("ArmReach", 17, 20), ("ArmPick", 17, 20), ("ArmPickCamera", 8, 10)]
)
def test_demonstrations(name, width, fps):
    made = record(name, 4, seed=3)
    task = TASKS[name]
    assert (made.fps, made.robot, made.tasks) == (fps, "kinematic_arm", (task.text,))
    assert len(made.state_names) == width
    longest = max(len(episode) for episode in made.episodes)
    assert longest < task.steps / 1.4
    for episode in made.episodes:
        episode.check()
        assert episode.states.shape == (len(episode), width)
        assert episode.actions.dtype == episode.states.dtype == np.float32
        np.testing.assert_allclose(np.diff(episode.times), 1 / fps)
        if width == 17:
            assert arm.split_of(*np.median(episode.states[:, 11:13], axis=0)) == "train"
    quiet = record(name, 1, seed=3, noise=0).episodes[0]
    pushed = record(name, 1, seed=3, only_successes=False).episodes[0]
    np.testing.assert_array_equal(quiet.actions, pushed.actions)
    off = np.abs(pushed.states[1:, :7] - pushed.actions[:-1, :7])
    assert off.max() > 0.01
    assert np.abs(quiet.states[1:, :7] - quiet.actions[:-1, :7]).max() < 6e-3  # the sensors


@pytest.mark.parametrize("name", ["ArmReach", "ArmPick"])
def test_a_plan_succeeds_in_scenes_of_the_test_squares(name):
    done = rollout(Planner(name), name, episodes=5, parallel=2, frames=3)
    assert done.success.all()
    assert done.first.max() < TASKS[name].steps / 1.4
    assert (done.block is None) == (name == "ArmReach")
    assert done.frames.shape == (3, 240, 240, 3)
    assert (done.frames[0] != done.frames[2]).any()
    assert {arm.split_of(*goal[:2]) for goal in done.goals} == {"test"}
    moved = done.gripper if done.block is None else done.block
    assert np.linalg.norm(moved[:, -1] - done.goals, axis=1).max() < 0.03
    assert (np.linalg.norm(moved[:, 0] - done.goals, axis=1) > 0.05).all()
    again = rollout(Planner(name), name, episodes=2, parallel=2, seed=10_001)
    np.testing.assert_array_equal(again.gripper, done.gripper[1:3])
    np.testing.assert_array_equal(again.actions, done.actions[1:3])


def test_a_policy_sees_the_camera():
    policy = Still()
    done = rollout(policy, "ArmPickCamera", episodes=2, seed=4)
    assert not done.ever.any()
    states, images = policy.shown[0]
    assert states.shape == (2, 2, 8)
    assert images.keys() == {"front"}
    assert images["front"].shape == (2, 2, 48, 48, 3)
    assert (images["front"][0] != images["front"][1]).any()
    seen = arm.KinematicArm(fps=10)
    np.testing.assert_array_equal(seen.reset(5, "test", "pick")[:8], states[1, -1])
    np.testing.assert_array_equal(seen.render(), images["front"][1, -1])


def test_recorded_pictures_are_those_of_the_state():
    episode = record("ArmPickCamera", 1, seed=2, noise=0).episodes[0]
    pictures = episode.images[arm_tasks.CAMERA]
    assert pictures.shape == (len(episode), 48, 48, 3)
    env = TASKS["ArmPickCamera"].make("train")
    np.testing.assert_array_equal(env.reset(2), episode.states[0])
    for action, state, picture in zip(episode.actions[:30], episode.states[:30], pictures, strict=False):
        np.testing.assert_array_equal(env.images()["front"], picture)
        assert state.shape == (8,)
        env.step(action)


def test_joints_are_told_no_more_than_they_can():
    class Low(Still):
        def __call__(self, states, images, tasks, start):
            return np.full((len(states), self.horizon, 8), -9, np.float32)

    done = rollout(Low(), "ArmReach", episodes=1)
    np.testing.assert_allclose(done.actions[0, -1], [*LOWER, 0], rtol=1e-6)
