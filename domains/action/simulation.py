"""Tasks in simulators: demonstrations by an expert, and policies in closed loop.

The arm's tasks need nothing besides this package, the Fetch arm's the extra ``sim``.

Shapes: E episodes, T steps of an episode, S state dimensions, D action dimensions, F pictures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vertebra.domains.action import arm_tasks, fetch
from vertebra.domains.action.control import Controller, Decision, Policy
from vertebra.domains.action.environment import Environment, Floats, Frame, SimulatedTask
from vertebra.domains.action.episodes import Demonstrations, Episode, LeftOut
from vertebra.errors import ConfigError, ShapeError, UnknownNameError

Frames = NDArray[np.uint8]

TASKS: dict[str, SimulatedTask] = {**arm_tasks.TASKS, **fetch.TASKS}


def find_task(name: str) -> SimulatedTask:
    """Return a task by its name, in short or in full (``FetchReach-v4``).

    Raises:
        UnknownNameError: There is no such task.
    """
    for task in TASKS.values():
        if name in (task.name, task.source):
            return task
    raise UnknownNameError("simulated task", name, TASKS)


# ---------------------------------------------------------------- demonstrations


def record(
    task: str,
    episodes: int,
    *,
    seed: int = 0,
    noise: float = 1.0,
    only_successes: bool = True,
    progress: Callable[[int], None] | None = None,
) -> Demonstrations:
    """Record an expert.

    Args:
        task: A name that :func:`find_task` knows.
        episodes: How many.
        seed: Of the first episode; the next ones count on.
        noise: How strong the disturbances of what is carried out are, as a multiple of the task's own; 0 for none. The
            actions recorded are the expert's own.
        only_successes: Leave out, and note, episodes that do not end at the goal.
        progress: Called with the number of episodes that are done.

    Raises:
        UnknownNameError: There is no such task.
        MissingExtraError: The simulator is not installed, or too new.
        ConfigError: A number is out of its range, or the expert hardly ever succeeds.
    """
    known = find_task(task)
    _at_least_one("record", episodes=episodes)
    if not 0 <= noise < math.inf:
        raise ConfigError(f"record: noise must be a finite number from 0 on, got {noise}.")
    found: list[Episode] = []
    left_out: list[LeftOut] = []
    with contextlib.closing(known.make("train")) as env:
        for number in itertools.count(seed):
            episode = _demonstrate(env, known, number, noise)
            if env.success or not only_successes:
                found.append(episode)
                if progress is not None:
                    progress(len(found))
            else:
                left_out.append(LeftOut(f"{known.name}: seed {number}", "the expert did not succeed", "it is left out"))
            if len(found) == episodes:
                break
            if len(left_out) > 20 + 4 * len(found):
                raise ConfigError(
                    f"record: the expert of {known.name} failed in {len(left_out)} of {len(left_out) + len(found)} "
                    "episodes; lower the noise."
                )
    return Demonstrations(
        episodes=tuple(found),
        fps=known.fps,
        state_names=known.state_names,
        action_names=known.action_names,
        robot=known.robot,
        left_out=tuple(left_out),
    )


def _demonstrate(env: Environment, task: SimulatedTask, seed: int, noise: float) -> Episode:
    disturbed = dataclasses.replace(task.noise, strength=noise * task.noise.strength)
    pushes = disturbed.draw(np.random.default_rng(seed), task.steps, len(task.action_names))
    states, actions, seen = [env.reset(seed)], [], []
    for push, action in zip(pushes, task.expert(env), strict=False):  # whichever ends first
        seen.append(env.images())
        actions.append(action)
        states.append(env.step(np.clip(action + push, task.low, task.high)))
    return Episode(
        name=f"seed_{seed:06d}",
        source=task.source,
        states=np.stack(states[:-1]),
        actions=np.stack(actions),
        times=np.arange(len(actions)) / task.fps,
        task=task.text,
        images=_by_camera(seen),
    )


def _by_camera(seen: Sequence[dict[str, Frame]]) -> dict[str, Frames]:
    return {camera: np.stack([images[camera] for images in seen]) for camera in seen[0]}


# ---------------------------------------------------------------- closed loop


@dataclass(frozen=True, kw_only=True, eq=False)
class Rollouts:
    """What a policy did in closed loop.

    Args:
        task: Its name.
        seed: Of the first episode.
        success: Whether the goal is reached at the last step, (E,).
        first: Steps until it was reached for the first time, (E,); -1 where it never was.
        actions: What was told, within the bounds of the task, (E, T, D).
        gripper: Its path in metres, (E, T + 1, 3).
        block: The block's path in metres, (E, T + 1, 3); None where there is no block.
        goals: In metres, (E, 3).
        fps: Steps a second.
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
    fps: float
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
        return rms_jerk(self.gripper, self.fps)

    @property
    def action_jerk(self) -> Floats:
        """The same of the actions without the fingers, (E,) in units of the action a s^3."""
        return rms_jerk(self.actions[..., :-1], self.fps)

    def outcome(self) -> dict[str, float | int | None]:
        """Return what became of the first episode, ready for JSON."""
        return {
            "success": int(self.success[0]),
            "steps_to_success": int(self.first[0]) if self.ever[0] else None,
            "jerk": float(self.jerk[0]),
            "action_jerk": float(self.action_jerk[0]),
        }

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
        policy: Says the next actions (B, T, D) from states (B, H, S), and pictures where the task has a camera.
        task: A name that :func:`find_task` knows.
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
        ShapeError: The policy does not say D numbers a step.
    """
    known = find_task(task)
    _at_least_one("rollout", episodes=episodes, parallel=parallel)
    if not 0 <= frames <= known.steps + 1:
        raise ConfigError(f"rollout: frames must be from 0 to {known.steps + 1}, got {frames}.")
    camera = _Camera(np.linspace(0, known.steps, frames).round().astype(int).tolist())
    parts: list[_Group] = []
    decisions: list[Decision] = []
    with contextlib.ExitStack() as stack:
        envs = [stack.enter_context(contextlib.closing(known.make("test"))) for _ in range(min(parallel, episodes))]
        for done in range(0, episodes, parallel):
            group = envs[: episodes - done]
            controller = Controller(policy, len(group), execute=execute, ensemble=ensemble)
            parts.append(_play(group, known, seed + done, controller, None if done else camera))
            decisions += controller.timings
            if progress is not None:
                progress(done + len(group))
        moves = envs[0].carried is not None
    success, first, actions, gripper, carried, goals = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return Rollouts(
        task=known.name,
        seed=seed,
        success=success,
        first=first,
        actions=actions,
        gripper=gripper,
        block=carried if moves else None,
        goals=goals,
        fps=known.fps,
        decisions=tuple(decisions),
        frames=_stacked(camera.frames),
        notes=tuple(camera.notes),
    )


_Group = tuple[NDArray[Any], ...]


def _play(
    envs: Sequence[Environment], task: SimulatedTask, seed: int, controller: Controller, camera: _Camera | None
) -> _Group:
    """Play one episode in each environment: success, first, actions, ways of gripper and block, goals."""
    states = [env.reset(seed + number) for number, env in enumerate(envs)]
    first = np.full(len(envs), -1)
    actions, paths = [], [_places(envs)]
    width = len(task.action_names)
    for step in range(task.steps):
        if camera is not None:
            camera.look(envs[0], step)
        images = _by_camera([env.images() for env in envs])
        told = controller.act(np.stack(states), images, [task.text] * len(envs))
        if told.shape[1] != width:
            raise ShapeError(f"rollout: the policy says {told.shape[1]} numbers a step, but {task.name} takes {width}.")
        told = told.clip(task.low, task.high)
        states = [env.step(action) for env, action in zip(envs, told, strict=True)]
        first[[env.success and first[row] < 0 for row, env in enumerate(envs)]] = step + 1
        actions.append(told)
        paths.append(_places(envs))
    if camera is not None:
        camera.look(envs[0], task.steps)
    success = np.array([env.success for env in envs])
    goals = np.array([env.goal for env in envs], np.float32)
    gripper, carried = np.stack(paths, axis=2)  # (E, T + 1, 3) each
    return success, first, np.stack(actions, axis=1), gripper, carried, goals


def _places(envs: Sequence[Environment]) -> Floats:
    """Where the gripper and what it moves are, (2, E, 3); the gripper twice where it moves nothing."""
    places = [(env.tip, env.tip if env.carried is None else env.carried) for env in envs]
    return np.array(places, np.float32).swapaxes(0, 1)


def split(whole: Rollouts) -> list[Rollouts]:
    """Take rollouts apart into single episodes; decisions, which were for all at once, and pictures go to the first."""
    own = ("success", "first", "actions", "gripper", "goals", *(() if whole.block is None else ("block",)))
    parts = []
    for number in range(len(whole)):
        arrays: dict[str, Any] = {name: getattr(whole, name)[number : number + 1] for name in own}
        rest: dict[str, Any] = {"decisions": (), "frames": whole.frames[:0]} if number else {}
        parts.append(dataclasses.replace(whole, seed=whole.seed + number, **arrays, **rest))
    return parts


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Put rollouts of one task, in the order of their seeds, together; the pictures are those of the first.

    Raises:
        ConfigError: There is none, the tasks differ, or seeds do not count on.
    """
    _at_least_one("joined", parts=len(parts))
    begin = parts[0]
    for before, part in itertools.pairwise(parts):
        if part.task != begin.task or part.seed != before.seed + len(before):
            raise ConfigError(
                f"joined: {before.task} up to seed {before.seed + len(before) - 1} cannot be followed by {part.task} "
                f"from seed {part.seed} on."
            )
    own = ("success", "first", "actions", "gripper", "goals", *(() if begin.block is None else ("block",)))
    arrays: dict[str, Any] = {name: np.concatenate([getattr(part, name) for part in parts]) for name in own}
    return dataclasses.replace(
        begin,
        **arrays,
        decisions=tuple(decision for part in parts for decision in part.decisions),
        notes=tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


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


def rms_jerk(paths: Floats, fps: float) -> Floats:
    """Return the root mean square of the third derivative of paths (E, T, K) with ``fps`` steps a second, (E,)."""
    jerk = np.diff(paths.astype(np.float64), 3, axis=1) * fps**3
    return np.sqrt((jerk**2).sum(2).mean(1)).astype(np.float32)


def _at_least_one(who: str, **numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"{who}: {name} must be at least 1, got {value}.")


# ---------------------------------------------------------------- pictures


class _Camera:
    """Draws an environment at chosen steps as long as that works; then it notes why not."""

    def __init__(self, steps: Sequence[int]) -> None:
        self.frames: list[Frame] = []
        self.notes: list[str] = []
        self._steps = set(steps)

    def look(self, env: Environment, step: int) -> None:
        """Draw what ``env`` looks like now, if the step is a chosen one."""
        if self.notes or step not in self._steps:
            return
        try:
            self.frames.append(env.render())
        except ConfigError as error:
            self.frames.clear()
            self.notes.append(f"No pictures: {error}")


def _stacked(frames: Sequence[Frame]) -> Frames:
    return np.stack(frames) if frames else np.zeros((0, 0, 0, 3), np.uint8)


def filmstrip(frames: Frames, count: int = 8) -> Image.Image:
    """Put ``count`` of the pictures (F, H, W, 3) side by side, evenly spread; all when there are fewer.

    Raises:
        ConfigError: There is no picture, or ``count`` is below 1.
    """
    _at_least_one("filmstrip", count=count, frames=len(frames))
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return Image.fromarray(np.concatenate(list(frames[chosen]), axis=1))


def gif_bytes(frames: Frames, fps: float = 25.0) -> bytes:
    """Return pictures (F, H, W, 3) as a GIF that goes on for ever, ``fps`` a second.

    Raises:
        ConfigError: There is no picture, or ``fps`` is not above 0.
    """
    _at_least_one("gif_bytes", frames=len(frames))
    if not fps > 0:
        raise ConfigError(f"gif_bytes: fps must be above 0, got {fps}.")
    first, *others = (Image.fromarray(frame) for frame in frames)
    content = io.BytesIO()
    first.save(content, "GIF", save_all=True, append_images=others, duration=round(1000 / fps), loop=0)
    return content.getvalue()


def write_gif(path: Path, frames: Frames, fps: float = 25.0) -> None:
    """Write pictures (F, H, W, 3) as a GIF that goes on for ever, ``fps`` a second.

    Raises:
        ConfigError: There is no picture, or ``fps`` is not above 0.
    """
    content = gif_bytes(frames, fps)
    part = path.with_name(path.name + ".part")
    try:
        part.write_bytes(content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
