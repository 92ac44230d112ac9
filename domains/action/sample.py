"""Fabricated demonstrations of the seven-joint arm, in the formats that people have: reaches, and a block to move.

An episode is played on :class:`~vertebra.domains.action.arm.KinematicArm`; an action is where the joints shall be a
step later, and the gripper's command. Movements go from rest to rest with minimum jerk, in the space of the joints.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.arm import (
    ACTION_NAMES,
    JOINTS,
    SCENE_NAMES,
    SPLITS,
    STATE_NAMES,
    KinematicArm,
    Scene,
    draw_scene,
    inverse,
    minimum_jerk,
)
from vertebra.domains.action.episodes import Demonstrations, Episode
from vertebra.domains.action.tables import write_csv, write_npz
from vertebra.errors import ConfigError, UnknownNameError

FPS = 20.0
CAMERA_FPS = 10.0
CAMERA = "front"
TASKS = {"reach": "reach the target", "pick": "pick up the block and put it at the goal"}
COUNTS = {"train": 96, "val": 12, "test": 12}
"""Episodes of each split in ``arm/``, a third of them reaches."""

_MIX = ("reach", "pick", "pick")
_ABOVE = 0.12  # m over block and goal
_PEAK = 1.2  # rad/s of the fastest joint in the middle of a movement
_GRIP = 0.4  # s that the arm waits for its fingers
_LINGER = 0.3  # drift kept from step to step, of a disturbance


def demonstrations(
    split: str,
    count: int,
    seed: int,
    kinds: Sequence[str] = ("reach", "pick"),
    *,
    fps: float = FPS,
    camera: bool = False,
    disturb: float = 0.0,
) -> Demonstrations:
    """Fabricate episodes, as many as training asks for; the same arguments give the same numbers.

    Args:
        split: ``train``, ``val`` or ``test``: block and goal lie on squares of the table that no other split has.
        count: Episodes.
        seed: Seed of everything.
        kinds: ``reach`` and ``pick``, in turns.
        fps: Steps a second.
        camera: Show pictures, and leave block and goal out of the state.
        disturb: Standard deviation, in rad, of how far the joints are pushed off their way; the actions are those that
            lead back, so that a policy learns to.

    Raises:
        UnknownNameError: No such split or kind.
        ConfigError: A number is below what it can be.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    if count < 1 or not kinds or not fps > 0 or disturb < 0:
        raise ConfigError(
            "demonstrations: count must be at least 1, kinds not empty, fps above 0 and disturb not negative."
        )
    rngs = [np.random.default_rng([seed, SPLITS.index(split), i]) for i in range(count)]
    scenes = [draw_scene(rng, split, kinds[i % len(kinds)]) for i, rng in enumerate(rngs)]
    lift = np.array([0, 0, _ABOVE])
    corners = [[s.block, s.block + lift, s.goal, s.goal + lift] if s.kind == "pick" else [s.goal] * 4 for s in scenes]
    poses = inverse(np.array(corners))  # all at once: (count, 4, 7)
    episodes = []
    for i, (rng, scene, pose) in enumerate(zip(rngs, scenes, poses, strict=True)):
        plan = _plan(scene, pose, fps, rng.uniform(0.9, 1.1))
        episode = _play(scene, plan, rng, fps, camera, disturb)
        episodes.append(dataclasses.replace(episode, name=f"{split}_{i:05}"))
    names = STATE_NAMES if camera else (*STATE_NAMES, *SCENE_NAMES)
    return Demonstrations(
        episodes=tuple(episodes), fps=fps, state_names=names, action_names=ACTION_NAMES, robot="kinematic_arm"
    )


def write_sample(folder: Path, seed: int = 0) -> list[Path]:
    """Fabricate demonstrations in the formats that the action domain reads; the same seed gives the same bytes.

    Args:
        folder: Where to write; made when missing.
        seed: Seed of everything.

    Returns:
        The files: ``arm/`` (LeRobot v2.1: 120 episodes at 20 Hz, a third of them reaches, cut into train, val and
        test), ``arm_camera/`` (LeRobot v3.0: a block moved 12 times, at 10 Hz, seen by a camera only), ``held_out/``
        (12 more episodes of the test squares: ten npz, and a csv of two), and ``damaged/`` (a good npz, a csv with
        repeated and missing time stamps that can be used, and four files that cannot).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sets = [demonstrations(split, count, seed, _MIX) for split, count in COUNTS.items()]
    ends = np.cumsum([0, *COUNTS.values()]).tolist()
    splits = {split: tuple(range(ends[i], ends[i + 1])) for i, split in enumerate(COUNTS)}
    every = dataclasses.replace(sets[0], episodes=tuple(e for one in sets for e in one.episodes), splits=splits)
    seen = demonstrations("train", 12, seed + 1, ("pick",), fps=CAMERA_FPS, camera=True)
    paths = _write_set(folder / "arm", every, "v2.1") + _write_set(folder / "arm_camera", seen, "v3.0")
    return paths + _write_held_out(folder / "held_out", seed + 2) + _write_damaged(folder / "damaged", seed + 3)


# ---------------------------------------------------------------- episodes


def _plan(scene: Scene, poses: NDArray[np.float64], fps: float, pace: float) -> NDArray[np.float64]:
    """Return joints and gripper from the first step on, (T, 8)."""
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


def _play(
    scene: Scene, plan: NDArray[np.float64], rng: np.random.Generator, fps: float, camera: bool, disturb: float
) -> Episode:
    arm = KinematicArm(fps=fps)
    states, frames = [arm.place(scene, rng)], []
    off = np.zeros(JOINTS)
    moves = np.abs(np.diff(plan[:, :JOINTS], axis=0, prepend=scene.joints[None])).max(1) > 0
    for action, moving in zip(plan, moves, strict=True):
        if camera:
            frames.append(arm.render())
        if disturb:
            off = _LINGER * off + disturb * math.sqrt(1 - _LINGER**2) * rng.normal(size=JOINTS)
            off *= moving  # not where the gripper works: it would miss
        states.append(arm.step(np.concatenate([action[:JOINTS] + off, action[JOINTS:]])))
    width = len(STATE_NAMES) if camera else None
    return Episode(
        name="",
        states=np.array(states[:-1])[:, :width],
        actions=plan.astype(np.float32),
        times=np.arange(len(plan)) / fps,
        task=TASKS[scene.kind],
        images={CAMERA: np.array(frames)} if camera else {},
    )


# ---------------------------------------------------------------- files


def _write_set(folder: Path, made: Demonstrations, version: str) -> list[Path]:
    """Write a LeRobot set where an earlier one may stand."""
    from vertebra.domains.action.lerobot import write_lerobot

    with TemporaryDirectory(dir=folder.parent, prefix=".") as fresh:
        paths = []
        for path in write_lerobot(Path(fresh) / folder.name, made, version=version):
            paths.append(folder.parent / path.relative_to(fresh))
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            path.replace(paths[-1])
    return paths


def _write_held_out(folder: Path, seed: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    made = demonstrations("test", 12, seed, _MIX)
    *single, last, very_last = made.episodes
    paths = [folder / f"{_MIX[i % len(_MIX)]}_{i:02}.npz" for i in range(len(single))]
    for path, episode in zip(paths, single, strict=True):
        write_npz(path, episode, state_names=made.state_names, action_names=made.action_names)
    paths.append(folder / "more.csv")
    write_csv(paths[-1], [last, very_last], state_names=made.state_names, action_names=made.action_names)
    return paths


def _write_damaged(folder: Path, seed: int) -> list[Path]:
    folder.mkdir(exist_ok=True)
    made = demonstrations("test", 2, seed)
    reach, pick = made.episodes
    names = {"state_names": made.state_names, "action_names": made.action_names}
    paths = [folder / f"{name}.npz" for name in ("good", "nan", "truncated")]
    write_npz(paths[0], pick, **names)
    with np.load(paths[0], allow_pickle=False) as archive:
        arrays = dict(archive)
    arrays["actions"][len(pick) // 2, 2] = np.nan
    np.savez_compressed(paths[1], **arrays)
    whole = paths[0].read_bytes()
    paths[2].write_bytes(whole[: len(whole) // 2])

    paths += [folder / f"{name}.csv" for name in ("empty", "text", "gaps")]
    paths[3].write_bytes(b"")
    write_csv(paths[5], [reach], **names)
    header, *rows = paths[5].read_text(encoding="utf-8").splitlines(keepends=True)
    cells = rows[10].split(",")
    cells[header.split(",").index("state.joint_3")] = "open"
    texts = {4: [*rows[:10], ",".join(cells), *rows[11:]], 5: rows[:11] + rows[8:20] + rows[23:]}
    for i, lines in texts.items():  # of the last, steps 8 to 10 come twice, and 20 to 22 never
        paths[i].write_bytes("".join([header, *lines]).encode())
    return paths
