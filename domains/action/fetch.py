"""Three tasks of the Fetch arm in MuJoCo: gymnasium-robotics' FetchReach, FetchPush and FetchPickAndPlace.

A state is the observation of the environment (https://robotics.farama.org) followed by the goal; an action is
(dx, dy, dz, fingers) in [-1, 1], 25 a second.

Pictures need a way to draw without a screen: EGL, which is tried where there is no other wish, or OSMesa (Debian:
libosmesa6) with MUJOCO_GL=osmesa.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.environment import Environment, Floats, Frame, SimulatedTask
from vertebra.domains.action.experts import EXPERTS, Noise
from vertebra.errors import ConfigError, MissingExtraError

VERSION = "-v4"
FPS = 25.0
STEPS = 50
PICTURE = 240
"""Height and width of a picture."""
VIEW = {"distance": 1.6, "azimuth": 132.0, "elevation": -20.0, "lookat": np.array([1.25, 0.8, 0.5])}
"""Where pictures are taken from, and what they look at."""

_GRIPPER = ("gripper_x", "gripper_y", "gripper_z")
_BLOCK = ("block_x", "block_y", "block_z", "block_from_gripper_x", "block_from_gripper_y", "block_from_gripper_z")
_FINGERS = ("finger_right", "finger_left")
_BLOCK_MOVES = (
    *("block_roll", "block_pitch", "block_yaw"),
    *("block_vx_from_gripper", "block_vy_from_gripper", "block_vz_from_gripper"),
    *("block_v_roll", "block_v_pitch", "block_v_yaw"),
)
_SPEEDS = ("gripper_vx", "gripper_vy", "gripper_vz", "finger_right_v", "finger_left_v")
_GOAL = ("goal_x", "goal_y", "goal_z")
_ALONE = (*_GRIPPER, *_FINGERS, *_SPEEDS, *_GOAL)  # places in m and rad, speeds in m and rad a step
_WITH_BLOCK = (*_GRIPPER, *_BLOCK, *_FINGERS, *_BLOCK_MOVES, *_SPEEDS, *_GOAL)


class FetchEnvironment:
    """One of the tasks, as :class:`~vertebra.domains.action.environment.Environment`.

    Args:
        name: A key of :data:`TASKS`.

    Raises:
        MissingExtraError: The simulator is not installed, or too new.
        ConfigError: The simulator cannot be imported with the MUJOCO_GL that is set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.seen: Mapping[str, NDArray[np.float64]] = {}  # the observation, whole
        self.success = False
        self._env = make_env(name)
        self._twin: Any = None
        self._drawn = False

    @property
    def tip(self) -> NDArray[np.float64]:
        """Where the gripper is, (3,)."""
        return self.seen["observation"][:3]

    @property
    def carried(self) -> NDArray[np.float64] | None:
        """Where the block is, (3,); None without one."""
        return None if self.name == "FetchReach" else self.seen["achieved_goal"]

    @property
    def goal(self) -> NDArray[np.float64]:
        """Where the gripper, or the block, belongs, (3,)."""
        return self.seen["desired_goal"]

    def reset(self, seed: int) -> Floats:
        """Begin the episode of a seed, and return its first state (S,)."""
        self.seen, _ = self._env.reset(seed=seed)
        self.success = False
        return self._state()

    def step(self, action: Floats) -> Floats:
        """Carry out an action (4,), and return the state (S,) after it."""
        self.seen, _, _, _, info = self._env.step(action)
        self.success = bool(info["is_success"])
        return self._state()

    def images(self) -> dict[str, Frame]:
        """Return nothing: there is no camera."""
        return {}

    def render(self) -> Frame:
        """Return a picture, (240, 240, 3).

        Raises:
            ConfigError: Drawing does not work on this machine.
        """
        try:
            if self._twin is None:  # to draw is to compute anew, which would change what follows in its last digits
                self._twin = make_env(self.name, pictures=True).unwrapped
            self._twin.data.qpos[:] = self._env.unwrapped.data.qpos
            self._twin.goal = self._env.unwrapped.goal
            with _graphics(first=not self._drawn):
                frame = np.array(self._twin.render())
            if not frame.any():
                raise RuntimeError("what is drawn is black")
        except Exception as error:  # of whatever kind the graphics library is
            raise ConfigError(
                f"{self.name}: drawing does not work here ({error}); install EGL, or OSMesa and set MUJOCO_GL=osmesa."
            ) from error
        self._drawn = True
        return frame

    def close(self) -> None:
        """Give back the simulator, and the graphics: those that are closed late make later ones black."""
        self._env.close()
        if self._twin is not None:
            self._twin.close()

    def _state(self) -> Floats:
        return np.concatenate([self.seen["observation"], self.seen["desired_goal"]]).astype(np.float32)


def make_env(name: str, *, pictures: bool = False) -> Any:
    """Make the gymnasium environment of a task.

    Args:
        name: A key of :data:`TASKS`.
        pictures: Whether its ``render`` is to return pictures (H, W, 3), uint8.

    Raises:
        MissingExtraError: The simulator is not installed, or too new.
        ConfigError: The simulator cannot be imported with the MUJOCO_GL that is set.
    """
    gymnasium = _simulator()
    drawn: dict[str, Any] = {}
    if pictures:
        drawn = {"render_mode": "rgb_array", "width": PICTURE, "height": PICTURE, "default_camera_config": VIEW}
    return gymnasium.make(name + VERSION, disable_env_checker=True, **drawn)


def _simulator() -> Any:
    """Return the module gymnasium, which knows the tasks after this."""
    for package in ("gymnasium", "mujoco", "gymnasium_robotics"):
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError("gymnasium_robotics", "sim", "simulation")
    version = importlib.metadata.version("mujoco")
    if int(version.split(".")[0]) >= 4:
        raise MissingExtraError("mujoco<4", "sim", f"simulation (mujoco {version} is installed)")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # remarks about other environments
            gymnasium, robotics = map(importlib.import_module, ("gymnasium", "gymnasium_robotics"))
    except Exception as error:  # of whatever kind the graphics library is
        wish = os.environ.get("MUJOCO_GL")
        if wish is None:
            raise
        raise ConfigError(
            f"simulation: mujoco cannot be imported with MUJOCO_GL={wish} ({error}); unset it, or install its library."
        ) from error
    gymnasium.register_envs(robotics)
    return gymnasium


@contextlib.contextmanager
def _graphics(*, first: bool) -> Iterator[None]:
    """Draw without a screen, unless the user wishes otherwise."""
    wish = os.environ.get("MUJOCO_GL")
    backend = wish or ("egl" if sys.platform == "linux" else "")
    if backend in ("egl", "osmesa"):
        if first:  # a viewer whose context cannot be made cannot be taken down properly, so one is tried before
            importlib.import_module(f"mujoco.{backend}").GLContext(8, 8).free()
        os.environ["MUJOCO_GL"] = backend
    try:
        yield
    finally:
        if wish is None:
            os.environ.pop("MUJOCO_GL", None)


def _task(name: str, text: str) -> SimulatedTask:
    def make(split: str) -> Environment:  # scenes differ by their seeds alone
        return FetchEnvironment(name)

    def expert(env: FetchEnvironment) -> Iterator[Floats]:
        while True:
            yield EXPERTS[name](env.seen)

    return SimulatedTask(
        name=name,
        source=name + VERSION,
        text=text,
        robot="fetch",
        fps=FPS,
        steps=STEPS,
        state_names=_ALONE if name == "FetchReach" else _WITH_BLOCK,
        action_names=("dx", "dy", "dz", "fingers"),
        low=np.full(4, -1, np.float32),
        high=np.ones(4, np.float32),
        noise=Noise(),
        make=make,
        expert=expert,
    )


TASKS: dict[str, SimulatedTask] = {
    "FetchReach": _task("FetchReach", "move the gripper to the goal"),
    "FetchPush": _task("FetchPush", "push the block to the goal"),
    "FetchPickAndPlace": _task("FetchPickAndPlace", "pick up the block and put it at the goal"),
}
