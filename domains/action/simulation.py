"""Three tasks of the Fetch arm in MuJoCo: demonstrations by an expert, and policies in closed loop.

The environments are gymnasium-robotics' FetchReach, FetchPush and FetchPickAndPlace (https://robotics.farama.org). A
state is their observation followed by the goal; an action is (dx, dy, dz, fingers) in [-1, 1], 25 a second.

Pictures need a way to draw without a screen: EGL, which is tried where there is no other wish, or OSMesa (Debian:
libosmesa6) with MUJOCO_GL=osmesa. Where neither works there are no pictures, and a note that says why.

Shapes: E episodes, T steps of an episode, S state dimensions, F pictures.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vertebra.domains.action.control import Controller, Decision, Policy
from vertebra.domains.action.episodes import Demonstrations, Episode, LeftOut
from vertebra.domains.action.experts import EXPERTS, Noise
from vertebra.errors import ConfigError, MissingExtraError, ShapeError, UnknownNameError

Floats = NDArray[np.float32]
Frames = NDArray[np.uint8]

TASKS: dict[str, str] = {
    "FetchReach": "move the gripper to the goal",
    "FetchPush": "push the block to the goal",
    "FetchPickAndPlace": "pick up the block and put it at the goal",
}
"""What each task is, in words."""

VERSION = "-v4"
FPS = 25
STEPS = 50
"""Steps of an episode."""
ACTION_NAMES = ("dx", "dy", "dz", "fingers")
PICTURE = 240
"""Height and width of a picture."""
VIEW = {"distance": 1.6, "azimuth": 132.0, "elevation": -20.0, "lookat": np.array([1.25, 0.8, 0.5])}
"""Where pictures are taken from, and what they look at."""

NOISE = Noise()
"""Disturbances while demonstrations are recorded."""

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


# ---------------------------------------------------------------- environments


def plain_name(task: str) -> str:
    """Return a task's name without its version.

    Raises:
        UnknownNameError: There is no such task.
    """
    name = task.removesuffix(VERSION)
    if name not in TASKS:
        raise UnknownNameError("simulated task", task, TASKS)
    return name


def state_names(task: str) -> tuple[str, ...]:
    """Return the names of a task's S state dimensions; places in m and rad, speeds in m and rad a step.

    Raises:
        UnknownNameError: There is no such task.
    """
    if plain_name(task) == "FetchReach":
        return (*_GRIPPER, *_FINGERS, *_SPEEDS, *_GOAL)
    return (*_GRIPPER, *_BLOCK, *_FINGERS, *_BLOCK_MOVES, *_SPEEDS, *_GOAL)


def state_of(seen: Mapping[str, Any]) -> Floats:
    """Return the state (S,) of an environment's observation."""
    return np.concatenate([seen["observation"], seen["desired_goal"]]).astype(np.float32)


def make_env(task: str, *, pictures: bool = False) -> Any:
    """Make the gymnasium environment of a task.

    Args:
        task: A key of :data:`TASKS`, with or without its version.
        pictures: Whether its ``render`` is to return pictures (H, W, 3), uint8.

    Raises:
        UnknownNameError: There is no such task.
        MissingExtraError: The simulator is not installed, or too new.
        ConfigError: The simulator cannot be imported with the MUJOCO_GL that is set.
    """
    name = plain_name(task)
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


# ---------------------------------------------------------------- demonstrations


def record(
    task: str,
    episodes: int,
    *,
    seed: int = 0,
    noise: Noise | None = NOISE,
    only_successes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Demonstrations:
    """Record an expert.

    Args:
        task: A key of :data:`TASKS`, with or without its version.
        episodes: How many.
        seed: Of the first episode; the next ones count on.
        noise: Disturbances of what is carried out; the actions recorded are the expert's own.
        only_successes: Leave out, and note, episodes that do not end at the goal.
        progress: Called with the number of episodes that are done.

    Raises:
        UnknownNameError: There is no such task.
        MissingExtraError: The simulator is not installed, or too new.
        ConfigError: ``episodes`` is below 1, or the expert hardly ever succeeds.
    """
    _at_least_one("record", episodes=episodes)
    name = plain_name(task)
    found: list[Episode] = []
    left_out: list[LeftOut] = []
    with contextlib.closing(make_env(name)) as env:
        for number in itertools.count(seed):
            episode, success = _demonstrate(env, name, number, noise)
            if success or not only_successes:
                found.append(episode)
                if progress is not None:
                    progress(len(found))
            else:
                left_out.append(LeftOut(f"{name}: seed {number}", "the expert did not succeed", "it is left out"))
            if len(found) == episodes:
                break
            if len(left_out) > 20 + 4 * len(found):
                raise ConfigError(
                    f"record: the expert of {name} failed in {len(left_out)} of {len(left_out) + len(found)} episodes; "
                    "lower the strength or probability of noise."
                )
    return Demonstrations(
        episodes=tuple(found),
        fps=FPS,
        state_names=state_names(name),
        action_names=ACTION_NAMES,
        robot="fetch",
        left_out=tuple(left_out),
    )


def _demonstrate(env: Any, name: str, seed: int, noise: Noise | None) -> tuple[Episode, bool]:
    seen, _ = env.reset(seed=seed)
    pushes = np.zeros((STEPS, 4), np.float32) if noise is None else noise.draw(np.random.default_rng(seed), STEPS)
    states, actions, info = [], [], {}
    for push in pushes:
        action = EXPERTS[name](seen)
        states.append(state_of(seen))
        actions.append(action)
        seen, _, _, _, info = env.step(np.clip(action + push, -1, 1))
    episode = Episode(
        name=f"seed_{seed:06d}",
        source=name + VERSION,
        states=np.stack(states),
        actions=np.stack(actions),
        times=np.arange(STEPS) / FPS,
        task=TASKS[name],
    )
    return episode, bool(info["is_success"])


# ---------------------------------------------------------------- closed loop


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """What a policy did in closed loop.

    Args:
        task: Its name.
        seed: Of the first episode.
        success: Whether the goal is reached at the last step, (E,).
        first: Steps until it was reached for the first time, (E,); -1 where it never was.
        actions: What was carried out, (E, T, 4).
        gripper: Its path in metres, (E, T + 1, 3).
        block: The block's path in metres, (E, T + 1, 3); None where there is no block.
        goals: In metres, (E, 3).
        decisions: Calls of the policy.
        frames: Pictures of the first episode, (F, H, W, 3); none where nothing was to be drawn, or could be.
        notes: What could not be done, a sentence each.
    """

    task: str
    seed: int
    success: NDArray[np.bool_]
    first: NDArray[np.int64]
    actions: Floats
    gripper: Floats
    block: Floats | None
    goals: Floats
    decisions: tuple[Decision, ...]
    frames: Frames
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.success)

    @property
    def ever(self) -> NDArray[np.bool_]:
        """Whether the goal was reached at any step, (E,)."""
        return self.first > 0

    @property
    def jerk(self) -> Floats:
        """Root mean square of the jerk of the gripper's path, (E,) in m/s^3, by third differences."""
        return rms_jerk(self.gripper)

    @property
    def action_jerk(self) -> Floats:
        """The same of the actions without the fingers, (E,) in units of the action a s^3."""
        return rms_jerk(self.actions[..., :3])

    def summary(self) -> dict[str, float | int | None]:
        """Return the figures to report, ready for JSON; None where there is nothing to take a mean of.

        Success is that of the last step, with the bounds of its 95 % interval (Wilson). Times of decisions are
        medians in milliseconds, of a call and for one of its environments.
        """
        low, high = wilson(int(self.success.sum()), len(self))
        seconds = np.array([decision.seconds for decision in self.decisions])
        batch = np.array([decision.batch for decision in self.decisions])
        reached = self.first[self.ever]
        return {
            "episodes": len(self),
            "success": float(self.success.mean()),
            "success_low": low,
            "success_high": high,
            "ever": float(self.ever.mean()),
            "steps_to_success": float(reached.mean()) if len(reached) else None,
            "jerk": float(self.jerk.mean()),
            "action_jerk": float(self.action_jerk.mean()),
            "decisions": len(self.decisions),
            "decision_ms": 1e3 * float(np.median(seconds)),
            "decision_ms_per_environment": 1e3 * float(np.median(seconds / batch)),
        }


def rollout(
    policy: Policy,
    task: str,
    *,
    episodes: int = 100,
    seed: int = 10_000,
    parallel: int = 16,
    execute: int | None = None,
    ensemble: float | None = None,
    frames: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Rollouts:
    """Let a policy act, and watch.

    An episode depends on its seed alone, not on ``parallel``, as far as the policy's arithmetic does not depend on
    the size of its batch.

    Args:
        policy: Says the next actions (B, T, 4) from states (B, H, S); pictures it is shown none.
        task: A key of :data:`TASKS`, with or without its version.
        episodes: E.
        seed: Of the first episode; the next ones count on.
        parallel: Environments that go on side by side; the policy decides for all at once.
        execute: As of :class:`~vertebra.domains.action.control.Controller`.
        ensemble: As of the same.
        frames: How many pictures to draw of the first episode, evenly spread from its begin to its end.
        progress: Called with the number of episodes that are done.

    Raises:
        UnknownNameError: There is no such task.
        MissingExtraError: The simulator is not installed, or too new.
        ConfigError: A number out of its range.
        ShapeError: The policy does not say 4 numbers a step.
    """
    _at_least_one("rollout", episodes=episodes, parallel=parallel)
    if not 0 <= frames <= STEPS + 1:
        raise ConfigError(f"rollout: frames must be from 0 to {STEPS + 1}, got {frames}.")
    name = plain_name(task)
    watched = set(np.linspace(0, STEPS, frames).round().astype(int).tolist())
    parts: list[_Group] = []
    decisions: list[Decision] = []
    with contextlib.ExitStack() as stack:
        envs = [stack.enter_context(contextlib.closing(make_env(name))) for _ in range(min(parallel, episodes))]
        camera = stack.enter_context(contextlib.closing(_Camera(name))) if watched else None
        for done in range(0, episodes, parallel):
            group = envs[: episodes - done]
            controller = Controller(policy, len(group), execute=execute, ensemble=ensemble)
            parts.append(_play(group, name, seed + done, controller, None if done else camera, watched))
            decisions += controller.timings
            if progress is not None:
                progress(done + len(group))
    joined = [np.concatenate(arrays) for arrays in zip(*parts, strict=True)]
    success, first, actions, gripper, moved, goals = joined
    return Rollouts(
        task=name,
        seed=seed,
        success=success,
        first=first,
        actions=actions,
        gripper=gripper,
        block=None if name == "FetchReach" else moved,
        goals=goals,
        decisions=tuple(decisions),
        frames=_stacked(camera.frames if camera else []),
        notes=tuple(camera.notes) if camera else (),
    )


_Group = tuple[NDArray[Any], ...]


def _play(
    envs: Sequence[Any], name: str, seed: int, controller: Controller, camera: _Camera | None, watched: set[int]
) -> _Group:
    """Play one episode in each environment: success, first, actions, gripper, what moves to the goal, goals."""
    seen = [env.reset(seed=seed + number)[0] for number, env in enumerate(envs)]
    success = np.zeros(len(envs), bool)
    first = np.full(len(envs), -1)
    actions, paths = [], [_places(seen)]
    for step in range(STEPS + 1):
        if camera is not None and step in watched:
            camera.look(envs[0])
        if step == STEPS:
            break
        told = controller.act(np.stack([state_of(each) for each in seen]), tasks=[TASKS[name]] * len(envs))
        if told.shape[1] != 4:
            raise ShapeError(f"rollout: the policy says {told.shape[1]} numbers a step, but {name} takes 4.")
        told = told.clip(-1, 1)
        results = [env.step(action) for env, action in zip(envs, told, strict=True)]
        seen = [result[0] for result in results]
        success = np.array([bool(result[4]["is_success"]) for result in results])
        first[success & (first < 0)] = step + 1
        actions.append(told)
        paths.append(_places(seen))
    gripper, moved = np.stack(paths, axis=2)  # (E, T + 1, 3) each
    goals = np.stack([each["desired_goal"] for each in seen]).astype(np.float32)
    return success, first, np.stack(actions, axis=1), gripper, moved, goals


def _places(seen: Sequence[Mapping[str, Any]]) -> Floats:
    """Where the gripper is, and what is to be at the goal, (2, E, 3)."""
    return np.array([[each["observation"][:3], each["achieved_goal"]] for each in seen], np.float32).swapaxes(0, 1)


def wilson(successes: int, total: int) -> tuple[float, float]:
    """Return the bounds of the 95 % interval of a share (Wilson 1927).

    Raises:
        ConfigError: ``total`` is below 1.
    """
    _at_least_one("wilson", total=total)
    z = 1.959964
    share = successes / total
    middle = share + z * z / (2 * total)
    half = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def rms_jerk(paths: Floats) -> Floats:
    """Return the root mean square of the third derivative of paths (E, T, K) at 25 steps a second, (E,)."""
    jerk = np.diff(paths.astype(np.float64), 3, axis=1) * FPS**3
    return np.sqrt((jerk**2).sum(2).mean(1)).astype(np.float32)


def _at_least_one(who: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{who}: {name} must be at least 1, got {value}.")


# ---------------------------------------------------------------- pictures


class _Camera:
    """Draws environments as long as that works; then it notes why not."""

    def __init__(self, task: str) -> None:
        self.frames: list[Frames] = []
        self.notes: list[str] = []
        self._task = task
        self._twin: Any = None

    def look(self, env: Any) -> None:
        """Draw what ``env`` looks like now."""
        if self.notes:
            return
        try:
            if self._twin is None:  # to draw is to compute anew, which would change what follows in its last digits
                self._twin = make_env(self._task, pictures=True).unwrapped
            self._twin.data.qpos[:] = env.unwrapped.data.qpos
            self._twin.goal = env.unwrapped.goal
            with _graphics(first=not self.frames):
                frame = np.array(self._twin.render())
            if not frame.any():
                raise RuntimeError("what is drawn is black")
            self.frames.append(frame)
        except Exception as error:  # of whatever kind the graphics library is
            self.frames.clear()
            self.notes.append(
                f"No pictures: drawing does not work here ({error}); install EGL, or OSMesa and set MUJOCO_GL=osmesa."
            )

    def close(self) -> None:
        """Give back the graphics; one that is closed late makes later ones black."""
        if self._twin is not None:
            self._twin.close()


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


def _stacked(frames: Sequence[Frames]) -> Frames:
    return np.stack(frames) if frames else np.zeros((0, PICTURE, PICTURE, 3), np.uint8)


def filmstrip(frames: Frames, count: int = 8) -> Image.Image:
    """Put ``count`` of the pictures (F, H, W, 3) side by side, evenly spread; all when there are fewer.

    Raises:
        ConfigError: There is no picture, or ``count`` is below 1.
    """
    _at_least_one("filmstrip", count=count, frames=len(frames))
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return Image.fromarray(np.concatenate(list(frames[chosen]), axis=1))


def write_gif(path: Path, frames: Frames, fps: float = FPS) -> None:
    """Write pictures (F, H, W, 3) as a GIF that goes on for ever.

    Raises:
        ConfigError: There is no picture, or ``fps`` is not above 0.
    """
    _at_least_one("write_gif", frames=len(frames))
    if not fps > 0:
        raise ConfigError(f"write_gif: fps must be above 0, got {fps}.")
    first, *others = (Image.fromarray(frame) for frame in frames)
    part = path.with_name(path.name + ".part")
    try:
        first.save(part, format="GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
