"""Fabricated demonstrations of the seven-joint arm, in the formats that people have: reaches, and a block to move.

An episode is played on :class:`~vertebra.domains.action.arm.KinematicArm`; an action is where the joints shall be a
step later, and the gripper's command. Movements go from rest to rest with minimum jerk, in the space of the joints.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.arm import (
    ACTION_NAMES,
    FULL_NAMES,
    JOINTS,
    SPLITS,
    STATE_NAMES,
    KinematicArm,
    Scene,
    draw_scene,
    inverse,
)
from vertebra.domains.action.arm_tasks import CAMERA, CAMERA_FPS, FPS, ROBOT, corners, plan
from vertebra.domains.action.arm_tasks import TEXTS as TASKS
from vertebra.domains.action.episodes import Demonstrations, Episode
from vertebra.domains.action.simulation import TASKS as SIMULATED
from vertebra.domains.action.simulation import find_task, record
from vertebra.domains.action.tables import write_csv, write_npz
from vertebra.errors import ConfigError, UnknownNameError

COUNTS = {"train": 96, "val": 12, "test": 12}
"""Episodes of each split in ``arm/``, a third of them reaches."""

_MIX = ("reach", "pick", "pick")
_EPISODES = 100  # of a simulated task, where nothing else is said
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
    poses = inverse(np.stack([corners(scene) for scene in scenes]))  # all at once: (count, 4, 7)
    episodes = []
    for i, (rng, scene, pose) in enumerate(zip(rngs, scenes, poses, strict=True)):
        way = plan(scene, pose, fps, rng.uniform(0.9, 1.1))
        episode = _play(scene, way, rng, fps, camera, disturb)
        episodes.append(dataclasses.replace(episode, name=f"{split}_{i:05}"))
    names = STATE_NAMES if camera else FULL_NAMES
    return Demonstrations(episodes=tuple(episodes), fps=fps, state_names=names, action_names=ACTION_NAMES, robot=ROBOT)


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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of demonstrations that are recorded in a simulator."""
    group = parser.add_argument_group("simulator", "record a scripted expert, as one LeRobot data set in DIR")
    group.add_argument("--sim", metavar="TASK", help=f"one of {', '.join(SIMULATED)}")
    group.add_argument("--episodes", type=int, metavar="N", help=f"that reach their goal (default: {_EPISODES})")


def from_args(
    folder: Path,
    options: argparse.Namespace,
    progress: Callable[[str, float, str], AbstractContextManager[Callable[[float], None]]],
) -> list[Path]:
    """Fabricate what the command line asks for: the sample, or demonstrations of a simulated task.

    Args:
        folder: Where to write; with ``--sim`` it becomes a LeRobot v2.1 data set.
        options: ``seed``, and what :func:`add_arguments` adds.
        progress: Shows a bar of a title, a total and a unit while it is open, and gives a function to move it on.

    Returns:
        The files.

    Raises:
        UnknownNameError: There is no such task.
        MissingExtraError: The simulator is not installed, or too new.
        ConfigError: The number of episodes is below 1 or given without a task, or the folder holds data already.
    """
    if options.sim is None:
        if options.episodes is not None:
            raise ConfigError("sample action: --episodes goes with --sim TASK; give both or none.")
        return write_sample(folder, options.seed)
    from vertebra.domains.action.lerobot import write_lerobot

    task, count = find_task(options.sim), _EPISODES if options.episodes is None else options.episodes
    if taken := [name for name in ("meta", "data") if (folder / name).exists()]:  # known before the long work
        raise ConfigError(f"{folder}: holds {taken[0]}/ already; remove it or choose another folder.")
    with progress(task.name, count, "episodes") as advance:
        made = record(task.name, count, seed=options.seed, progress=lambda done: advance(1))
    return write_lerobot(folder, made)


# ---------------------------------------------------------------- episodes


def _play(
    scene: Scene, way: NDArray[np.float64], rng: np.random.Generator, fps: float, camera: bool, disturb: float
) -> Episode:
    arm = KinematicArm(fps=fps)
    states, frames = [arm.place(scene, rng)], []
    off = np.zeros(JOINTS)
    moves = np.abs(np.diff(way[:, :JOINTS], axis=0, prepend=scene.joints[None])).max(1) > 0
    for action, moving in zip(way, moves, strict=True):
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
        actions=way.astype(np.float32),
        times=np.arange(len(way)) / fps,
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
