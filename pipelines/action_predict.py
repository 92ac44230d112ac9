"""Chunks of actions for recorded observations, and policies at work in a simulator.

Shapes: T steps of an episode, S state dimensions, D action dimensions, C decisions, H steps of a chunk.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.action_files import read_even
from vertebra.pipelines.action_predicted import ChunkFiles, PredictedActions, Rolled, RolloutFiles
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from vertebra.domains.action.episodes import Episode
    from vertebra.domains.model import DomainModel

_TIMED = 20
"""Decisions that are timed one by one."""


@verb(
    "action/predict",
    inputs="demonstrations (LeRobot folders, .npz, .csv, .hdf5, folders of these), which may lack actions, but for "
    ".hdf5; none with --sim",
    outputs=".csv, .parquet or .npz: a chunk of actions for every decision, OUT.json (errors by joint, time of a "
    "decision) and OUT.png; with --sim .csv: a row for every episode, OUT.json (success, jerk, time) and pictures",
    model="action_arm",
    tasks=("action/policy",),
    needs_input=False,
)
class PredictActions(Pipeline):
    """Chunks of actions for what robots observed; or closed loop in a simulator.

    Args:
        model: Policy.
        device: See ``Pipeline``.
        batch_size: Most decisions at once.
        every: Steps from one decision to the next; None for those of a chunk, of which all are then used.
        steps_per_second: Rate of the actions of a chunk, whose time stays the same; None for that of the
            demonstrations the model has learnt from.
        state: Where files keep the states; None for the usual place.
        action: Where files keep the actions; None for the usual place.
        fps: Steps a second of files that do not say.
        figures: Most episodes that get a figure.
        sim: Task of a simulator to act in, instead of input files.
        episodes: How many of those.
        parallel: How many go on side by side.
        execute: Steps of a chunk that are carried out in the simulator before the next is asked for; None for all.
        ensemble: Temporal ensembling: actions are means over chunks, the i-th oldest weighs exp(-ensemble * i).
        seed: Of the first simulated episode.
        frames: Pictures of the first simulated episode; 0 for none.
    """

    endings = (".csv", ".parquet", ".npz")
    unit = "episodes"
    reads_folders = True
    pool_batches = 1

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        every: int | None = None,
        steps_per_second: float | None = None,
        state: str | None = None,
        action: str | None = None,
        fps: float | None = None,
        figures: int = 1,
        sim: str | None = None,
        episodes: int = 100,
        parallel: int = 16,
        execute: int | None = None,
        ensemble: float | None = None,
        seed: int = 10_000,
        frames: int = 24,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size if sim is None else max(parallel, 1))
        from vertebra.domains.action.inference import PolicyRunner
        from vertebra.domains.action.model import ActionPolicy

        assert isinstance(self.model, ActionPolicy)
        self.tokenizer = self.model.tokenizer
        for name, value in (("every", every), ("episodes", episodes), ("parallel", parallel), ("execute", execute)):
            if value is not None and value < 1:
                raise ConfigError(f"{self.name}: {name} must be at least 1, got {value}.")
        for name, number in (("figures", figures), ("frames", frames), ("seed", seed)):
            if number < 0:
                raise ConfigError(f"{self.name}: {name} must be 0 or more, got {number}.")
        self.spec = self.model.spec
        steps, ratio = self.tokenizer.horizon, Fraction(1)
        if steps_per_second is not None:
            if not 0 < steps_per_second < 1e6:
                raise ConfigError(f"{self.name}: steps_per_second must be above 0, got {steps_per_second}.")
            ratio = Fraction(steps_per_second / self.spec.fps).limit_denominator(1000)
            if (steps - 1) * ratio < 1:
                raise ConfigError(
                    f"{self.name}: steps_per_second={steps_per_second} leaves a chunk of one step; raise it."
                )
        # of a step's ``numerator`` parts, each ``denominator``-th is a step of the other rate
        self.rate, self.taken = self.spec.fps * float(ratio), ratio.denominator
        self.runner = PolicyRunner(self.model, self.device, (steps - 1) * ratio.numerator + 1)
        self.every = self.tokenizer.horizon if every is None else every
        self.state, self.action, self.fps, self.figures = state, action, fps, figures
        self.sim, self.episodes, self.parallel, self.seed, self.frames = sim, episodes, parallel, seed, frames
        self.execute, self.ensemble = execute, ensemble
        self.notes: list[str] = []
        """What was mended in the files of a run."""
        of_sim = {"execute": execute, "ensemble": ensemble}
        of_files = {"every": every, "steps_per_second": steps_per_second, "state": state, "action": action, "fps": fps}
        for given, reason in ((of_sim, "is for a simulator"), (of_files, "is for files, not for a simulator")):
            if (sim is None) == (given is of_sim):
                for name, option in given.items():
                    if option is not None:
                        raise ConfigError(f"{self.name}: {name} {reason}; leave it out.")
        if sim is not None:
            self._check_sim(sim)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("decisions")
        add = group.add_argument
        add("--every", type=int, metavar="N", help="steps from one decision to the next (default: those of a chunk)")
        add("--steps-per-second", type=float, metavar="HZ", help="rate of the actions (default: that of the training)")
        add("--figures", type=int, default=1, metavar="N", help="most episodes drawn (default: 1)")
        group = parser.add_argument_group("files")
        add = group.add_argument
        add("--state", metavar="NAME", help="where files keep the states (default: the usual place)")
        add("--action", metavar="NAME", help="where files keep the actions (default: the usual place)")
        add("--fps", type=float, metavar="HZ", help="steps a second, for files that do not say")
        group = parser.add_argument_group("simulator")
        add = group.add_argument
        add("--sim", metavar="TASK", help="act in a simulator: ArmReach, ArmPick, FetchReach, FetchPush, ...")
        add("--episodes", type=int, default=100, metavar="N", help="(default: 100)")
        add("--parallel", type=int, default=16, metavar="N", help="episodes side by side (default: 16)")
        add("--execute", type=int, metavar="N", help="steps of a chunk that are carried out (default: all)")
        add("--ensemble", type=float, metavar="M", help="mean of overlapping chunks, the i-th oldest with exp(-M i)")
        add("--seed", type=int, default=10_000, metavar="N", help="of the first episode (default: 10000)")
        add("--frames", type=int, default=24, metavar="N", help="pictures of the first episode (default: 24)")

    # ---------------------------------------------------------------- reading

    def folder_files(self, folder: Path) -> list[Path]:
        """List the demonstrations in a folder, which may be one itself."""
        from vertebra.domains.action.sources import find_demonstrations

        return find_demonstrations([folder])

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the episodes of a file or LeRobot folder."""
        from vertebra.domains.action.data import check_names

        self._check_inputs()
        found = read_even(
            path,
            bad,
            self.notes,
            fps=self.fps,
            state=self.state,
            action=self.action,
            cameras=self.spec.cameras,
            unknown_actions=self.spec.action_names,
        )
        check_names(self.spec, found)
        for episode in found.episodes:
            yield Item(file=str(path), record=episode.name, data=episode, size=len(episode))

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the observations that an array (T, S) or an ``Episode`` stands for."""
        from vertebra.domains.action.episodes import Episode

        self._check_inputs()
        if not isinstance(value, Episode):
            try:
                states = np.asarray(value, dtype=np.float32)
            except (TypeError, ValueError):
                states = np.empty(0, np.float32)
            if states.ndim != 2 or states.shape[1] != len(self.spec.state_names) or not len(states):
                raise DataError(
                    f"{self.name}: takes a path, an Episode, or states (T, {len(self.spec.state_names)}), got "
                    f"{type(value).__name__}{f' of shape {states.shape}' if states.size else ''}."
                )
            value = Episode(
                name=f"episode_{index}",
                states=states,
                actions=np.full((len(states), len(self.spec.action_names)), np.nan, np.float32),
                times=np.arange(len(states)) / self.spec.fps,
                task=self.spec.tasks[0] if len(self.spec.tasks) == 1 else "",
            )
        self._check_episode(value)
        yield Item(file="", record=value.name, data=value, size=len(value))

    def _check_episode(self, episode: Episode) -> None:
        from vertebra.domains.action.reading import check_observed, frame_rate

        check_observed(episode)
        spec = self.spec
        for what, values, names in (
            ("states", episode.states, spec.state_names), ("actions", episode.actions, spec.action_names)
        ):  # fmt: skip
            if values.shape[1:] != (len(names),):
                raise DataError(
                    f"{episode.name}: {what} must be (T, {len(names)}), got {values.shape}; give all columns."
                )
        if lost := [camera for camera in spec.cameras if camera not in episode.images]:
            raise DataError(
                f"{episode.name}: has no images of the camera {lost[0]!r}, which the policy sees; give them."
            )
        rate = frame_rate([episode.times])
        if rate is not None and abs(rate - spec.fps) > 0.01 * spec.fps:
            raise DataError(
                f"{episode.name}: has {rate:g} steps a second, the model acts at {spec.fps:g}; resample it."
            )

    def prepared(self, items: Iterator[Item], bad: Bad) -> Iterator[Item]:
        """Give each episode a name of its own."""
        self.notes = []
        seen: Counter[str] = Counter()
        for item in items:
            seen[item.record] += 1
            again = seen[item.record]
            yield item if again == 1 else dataclasses.replace(item, record=f"{item.record}.{again}")

    # ---------------------------------------------------------------- simulators

    def _check_sim(self, name: str) -> None:
        """Refuse a task that the policy is not for, and settings that it does not allow."""
        from vertebra.domains.action.control import Controller
        from vertebra.domains.action.simulation import find_task

        task, spec = find_task(name), self.spec
        for what, mine, its in (
            ("states", spec.state_names, task.state_names), ("actions", spec.action_names, task.action_names)
        ):  # fmt: skip
            if mine != its:
                raise ConfigError(
                    f"{self.name}: {task.name} has the {what} {', '.join(its)}, and the policy {', '.join(mine)}; "
                    "choose a task, or a model, of the same robot."
                )
        if abs(spec.fps - task.fps) > 0.01 * spec.fps:
            raise ConfigError(
                f"{self.name}: {task.name} has {task.fps:g} steps a second, and the policy {spec.fps:g}; train one at "
                "its rate."
            )
        if spec.tasks and task.text not in spec.tasks:
            raise ConfigError(
                f"{self.name}: {task.name} is to {task.text!r}, and the policy knows {', '.join(spec.tasks)} alone."
            )
        if self.frames > task.steps + 1:
            raise ConfigError(f"{self.name}: frames must be at most {task.steps + 1}, got {self.frames}.")
        Controller(self.runner, 1, execute=self.execute, ensemble=self.ensemble)

    def without_input(self, bad: Bad) -> Iterator[Item]:
        """Yield the numbers of the simulated episodes."""
        from vertebra.domains.action.simulation import find_task

        if self.sim is None:
            raise ConfigError(f"{self.name}: no input file given; name at least one, or a simulator's task by --sim.")
        # what fails here fails for all of them
        with contextlib.closing(find_task(self.sim).make("test")) as env:
            env.reset(self.seed)
            shown = env.images()
        if lost := [camera for camera in self.spec.cameras if camera not in shown]:
            raise ConfigError(
                f"{self.name}: {self.sim} has no camera {lost[0]!r}, which the policy sees; choose another."
            )
        for number in range(self.episodes):
            yield Item(file="", record=f"{self.sim}: episode {number}", data=number, size=1)

    def planned(self) -> float | None:
        """How many episodes a simulation has."""
        return float(self.episodes)

    def _check_inputs(self) -> None:
        if self.sim is not None:
            raise ConfigError(f"{self.name}: a simulator needs no input; leave the files or --sim out.")

    # ---------------------------------------------------------------- predicting

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Let the policy decide: for recorded episodes one after the other, in the simulator for all at once."""
        return self._simulated(items) if self.sim is not None else [self._decided(item) for item in items]

    def _decided(self, item: Item) -> Prediction:
        episode: Episode = item.data
        steps = np.arange(0, len(episode), self.every)
        chunks = np.concatenate(
            [self._ask(episode, steps[i : i + self.batch_size]) for i in range(0, len(steps), self.batch_size)]
        )
        seconds = []
        for step in steps[:_TIMED]:
            begin = time.perf_counter()
            self._ask(episode, steps[:1] * 0 + step)
            seconds.append(time.perf_counter() - begin)
        made = PredictedActions(
            chunks,
            name=item.record,
            label="action",
            steps=steps,
            times=episode.times[steps],
            rate=self.rate,
            fps=self.spec.fps,
            names=self.spec.action_names,
            truth=episode.actions if np.isfinite(episode.actions).all() else None,
            held=self._held(episode, steps),
            tokenizer=self.tokenizer,
        )
        made.details = {"steps": len(episode), "decisions": len(steps), "decision_ms": 1e3 * float(np.median(seconds))}
        made.details |= made.errors()
        return made

    def _ask(self, episode: Episode, steps: NDArray[np.int64]) -> NDArray[np.float32]:
        """Chunks (C, H, D) for what was observed up to ``steps`` (C,)."""
        behind = np.maximum(steps[:, None] + np.arange(1 - self.spec.history, 1), 0)
        states = episode.states[behind]  # (C, observed, S)
        images = {
            camera: np.stack([np.asarray(episode.images[camera][int(step)]) for step in steps])[:, None]
            for camera in self.spec.cameras
        }
        chunks = self.runner(states, images, [episode.task] * len(steps), self._before(episode, steps))
        return chunks[:, :: self.taken]

    def _before(self, episode: Episode, steps: NDArray[np.int64]) -> NDArray[np.float32]:
        """The actions before, (C, D); where there is none, or it is not known, what staying would be."""
        from vertebra.domains.action.data import starts_of

        before = episode.actions[np.maximum(steps - 1, 0)]
        known = (steps > 0) & np.isfinite(before).all(1)
        return np.where(known[:, None], before, starts_of(self.spec, episode.states[steps]))

    def _held(self, episode: Episode, steps: NDArray[np.int64]) -> NDArray[np.float32]:
        """What staying at the current state would be, (C, D); where there is none, the action before."""
        from vertebra.domains.action.data import starts_of

        here = starts_of(self.spec, episode.states[steps])
        return np.where(np.array(self.spec.positions) >= 0, here, self._before(episode, steps))

    def _simulated(self, items: list[Item]) -> list[Prediction]:
        from vertebra.domains.action.simulation import rollout, split

        assert self.sim is not None
        first: int = items[0].data
        done = rollout(
            self.runner,
            self.sim,
            episodes=len(items),
            seed=self.seed + first,
            parallel=self.parallel,
            execute=self.execute,
            ensemble=self.ensemble,
            frames=self.frames if first == 0 else 0,
        )
        parts = zip(items, split(done), strict=True)
        return [Rolled(own, name=item.record, details=own.outcome(), label="success") for item, own in parts]

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the files of chunks, or of simulated episodes."""
        if self.sim is None:
            return ChunkFiles(self, outputs)
        if outputs.target.suffix != ".csv":
            raise ConfigError(f"{self.name}: simulated episodes are written as .csv; let the output end in .csv.")
        return RolloutFiles(self, outputs)


__all__ = ["PredictActions", "PredictedActions", "Rolled"]
