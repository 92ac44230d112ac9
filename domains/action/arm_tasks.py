"""Tasks of the seven-joint arm, which need no simulator besides ours: reach a target, move a block, and do so by sight.

An action is where the joints shall be a step later, and the gripper's command. The expert plans its way when an episode
begins: movements from rest to rest with minimum jerk, in the space of the joints.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.arm import (
    ACTION_NAMES,
    FULL_NAMES,
    LOWER,
    STATE_NAMES,
    UPPER,
    KinematicArm,
    Scene,
    inverse,
    minimum_jerk,
)
from vertebra.domains.action.environment import Environment, Floats, Frame, SimulatedTask
from vertebra.domains.action.experts import Noise

FPS = 20.0
CAMERA_FPS = 10.0
CAMERA = "front"
ROBOT = "kinematic_arm"
TEXTS = {"reach": "reach the target", "pick": "pick up the block and put it at the goal"}
SECONDS = {"reach": 4.8, "pick": 11.4}
"""Length of an episode by kind: half as much again as the slowest plan takes."""
PICTURE = 240
"""Height and width of a picture for people."""

_ABOVE = 0.12  # m over block and goal
_PEAK = 1.2  # rad/s of the fastest joint in the middle of a movement
_GRIP = 0.4  # s that the arm waits for its fingers


# ---------------------------------------------------------------- the expert


def corners(scene: Scene) -> NDArray[np.float64]:
    """Return the places (4, 3) that a plan leads through: at the block, over it, at the goal, over it."""
    if scene.kind == "reach":
        return np.array([scene.goal] * 4)
    lift = np.array([0, 0, _ABOVE])
    return np.array([scene.block, scene.block + lift, scene.goal, scene.goal + lift])


def plan(scene: Scene, poses: NDArray[np.float64], fps: float, pace: float = 1.0) -> NDArray[np.float64]:
    """Return joints and gripper from the first step on, (T, 8).

    Args:
        scene: How the episode begins.
        poses: Joints at its :func:`corners`, (4, 7).
        fps: Steps a second.
        pace: How slow, as a multiple of the usual.
    """
    if scene.kind == "reach":
        parts = [(poses[0], 1, 1.5, 3.0), (poses[0], 1, 0.2, 0.2)]
    else:
        at_block, over_block, at_goal, over_goal = poses
        parts = [
            (over_block, 1, 0.6, 2.0),
            (at_block, 1, 0.6, 2.0),
            (at_block, 0, _GRIP, _GRIP),
            (over_block, 0, 0.6, 2.0),
            (over_goal, 0, 0.6, 2.0),
            (at_goal, 0, 0.6, 2.0),
            (at_goal, 1, _GRIP, _GRIP),
            (over_goal, 1, 0.6, 2.0),
            (over_goal, 1, 0.2, 0.2),
        ]
    here, rows = scene.joints, []
    for there, gripper, shortest, longest in parts:
        needed = 1.875 * np.abs(there - here).max() / _PEAK  # the fastest moment is 1.875 times as fast as the mean
        seconds = min(max(pace * needed, shortest), longest)
        joints = minimum_jerk(here, there, max(1, math.ceil(seconds * fps)))[1:]
        rows.append(np.column_stack([joints, np.full(len(joints), gripper)]))
        here = there
    return np.concatenate(rows)


# ---------------------------------------------------------------- the environment


class ArmEnvironment:
    """The arm at scenes of a split, as :class:`~vertebra.domains.action.environment.Environment`.

    Args:
        kind: ``reach`` or ``pick``.
        split: ``train``, ``val`` or ``test``: whose squares of the table block and goal lie on.
        fps: Steps a second.
        camera: Show pictures, and leave block and goal out of the state.
    """

    def __init__(self, kind: str, split: str, *, fps: float = FPS, camera: bool = False) -> None:
        self.kind, self.split, self.camera = kind, split, camera
        self.arm = KinematicArm(fps=fps)

    @property
    def success(self) -> bool:
        """Whether the fingertips are at the goal, or the block was let go there."""
        return self.arm.succeeded

    @property
    def tip(self) -> NDArray[np.float64]:
        """Point between the fingertips, (3,)."""
        return self.arm.tip

    @property
    def carried(self) -> NDArray[np.float64] | None:
        """Where the block is, (3,); None without one."""
        return None if self.kind == "reach" else self.arm.block

    @property
    def goal(self) -> NDArray[np.float64]:
        """Where the fingertips, or the block, belong, (3,)."""
        return self.arm.goal

    def reset(self, seed: int) -> Floats:
        """Begin the episode of a seed, and return its first state: (14,), or (8,) with the camera."""
        return self._state(self.arm.reset(seed, self.split, self.kind))

    def step(self, action: Floats) -> Floats:
        """Carry out an action (8,), and return the state after it: (14,), or (8,) with the camera."""
        return self._state(self.arm.step(action))

    def images(self) -> dict[str, Frame]:
        """Return what the camera shows, (48, 48, 3); nothing without it."""
        return {CAMERA: self.arm.render()} if self.camera else {}

    def render(self) -> Frame:
        """Return a picture, (240, 240, 3)."""
        return self.arm.render(PICTURE)

    def close(self) -> None:
        """Do nothing: there is nothing to give back."""

    def expert(self) -> Iterator[Floats]:
        """Yield the actions (8,) of a plan for the scene as it is now."""
        arm = self.arm
        scene = Scene(self.kind, arm.joints.copy(), arm.block.copy(), arm.goal.copy())
        yield from plan(scene, inverse(corners(scene)), arm.fps).astype(np.float32)

    def _state(self, sensed: Floats) -> Floats:
        return sensed[: len(STATE_NAMES)] if self.camera else sensed


# ---------------------------------------------------------------- the tasks


def _task(name: str, kind: str, fps: float = FPS, camera: bool = False) -> SimulatedTask:
    def make(split: str) -> Environment:
        return ArmEnvironment(kind, split, fps=fps, camera=camera)

    return SimulatedTask(
        name=name,
        source=name,
        text=TEXTS[kind],
        robot=ROBOT,
        fps=fps,
        steps=round(SECONDS[kind] * fps),
        state_names=STATE_NAMES if camera else FULL_NAMES,
        action_names=ACTION_NAMES,
        low=np.append(LOWER, 0).astype(np.float32),
        high=np.append(UPPER, 1).astype(np.float32),
        noise=Noise(strength=0.02),
        make=make,
        expert=ArmEnvironment.expert,
    )


TASKS: dict[str, SimulatedTask] = {
    "ArmReach": _task("ArmReach", "reach"),
    "ArmPick": _task("ArmPick", "pick"),
    "ArmPickCamera": _task("ArmPickCamera", "pick", CAMERA_FPS, camera=True),
}
