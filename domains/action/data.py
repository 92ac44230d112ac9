"""The data module of actions: demonstrations to observations and the chunks of actions behind them.

Every step of an episode is an item: what was observed up to it, and the next actions. Behind the end of an episode the
last action is repeated and marked as not real; before its beginning the first observation is.

Shapes: B items, H observed steps, S state dimensions, T steps of a chunk, A action dimensions, C cameras, R x R pixels.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vertebra.backbones.random import item_uniform
from vertebra.domains.action.episodes import (
    Demonstrations,
    Episode,
    Floats,
    LeftOut,
    columns_of,
    regular,
    windows,
)
from vertebra.domains.action.sources import read_demonstrations
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.action.tables import ColumnMap
from vertebra.domains.base import BaseData, Items, Split
from vertebra.domains.batching import Batch
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.action import QUANTILES, ActionTokenizer, make_action_tokenizer

log = logging.getLogger("vertebra")

Doubles = NDArray[np.float64]
Columns = list[str] | tuple[str, ...]

_SHIFT, _SPLIT = 701, 702  # salts of the draws
_FITTED = 20_000  # most chunks that a tokenizer learns from
_STILL = 1e-6  # standard deviation below which a state does not move


@dataclass(frozen=True, kw_only=True)
class ActionAugment:
    """What training does to observations at random.

    Args:
        shift: Most pixels that pictures are moved by, their edges repeated.
    """

    shift: int = 0

    def __post_init__(self) -> None:
        if self.shift < 0:
            raise ConfigError(f"augment: shift must be at least 0, got {self.shift}.")


class ActionItems:
    """Steps of the episodes of a split.

    Args:
        episodes: On an even grid.
        spec: Facts about the data.
        horizon: T.
        seed: Of the draws.
        augment: What to do to observations; None for evaluation.
        every: Steps between two items.
    """

    def __init__(
        self,
        episodes: Sequence[Episode],
        spec: ActionSpec,
        horizon: int,
        seed: int = 0,
        augment: ActionAugment | None = None,
        every: int = 1,
    ) -> None:
        self.episodes, self.spec, self.horizon, self.seed, self.augment = tuple(episodes), spec, horizon, seed, augment
        self.states = np.concatenate([e.states for e in episodes])
        self.actions = np.concatenate([e.actions for e in episodes])
        counts = np.array([len(e) for e in episodes])
        firsts = np.cumsum(counts) - counts
        self.of_item = np.concatenate([np.full(len(range(0, n, every)), i) for i, n in enumerate(counts)])
        steps = [first + np.arange(0, n, every) for first, n in zip(firsts, counts, strict=True)]
        self.steps = np.concatenate(steps)  # (N,), in the joined arrays
        self.first, self.last = firsts[self.of_item], (firsts + counts - 1)[self.of_item]
        self.tasks = np.array([spec.tasks.index(e.task) if spec.tasks else 0 for e in episodes])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of every item, (N,); all the same."""
        return np.full(len(self.steps), self.horizon)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Make a batch.

        Returns:
            states, actions, real, start, index, names and places (episodes, and steps of them); tasks and images where
            the spec has them.
        """
        steps, first, last = (values[indices, None] for values in (self.steps, self.first, self.last))
        ahead = steps + np.arange(self.horizon)
        behind = np.maximum(steps + np.arange(1 - self.spec.history, 1), first)
        states = self.states[behind]  # (B, H, S)
        begins = starts_of(self.spec, states[:, -1])
        start = np.where(steps > first, self.actions[np.maximum(steps[:, 0] - 1, 0)], begins)
        batch: Batch = {
            "states": torch.from_numpy(states.astype(np.float32)),
            "actions": torch.from_numpy(self.actions[np.minimum(ahead, last)]),
            "real": torch.from_numpy(ahead <= last),
            "start": torch.from_numpy(start.astype(np.float32)),
            "index": torch.from_numpy(np.asarray(indices)),
        }
        places = [self.place(int(i)) for i in indices]
        batch["names"], batch["places"] = [name for name, _ in places], [step for _, step in places]
        if self.spec.tasks:
            batch["tasks"] = torch.from_numpy(self.tasks[self.of_item[indices]])
        if self.spec.cameras:
            batch["images"] = torch.from_numpy(self._images(indices, epoch))
        return batch

    def place(self, index: int) -> tuple[str, int]:
        """Return the episode's name and the step of an item."""
        return self.episodes[self.of_item[index]].name, int(self.steps[index] - self.first[index])

    def _images(self, indices: NDArray[np.int64], epoch: int) -> NDArray[np.uint8]:
        size, shift = self.spec.image_size, 0 if self.augment is None else self.augment.shift
        made = np.empty((len(indices), len(self.spec.cameras), size, size, 3), np.uint8)
        draws = item_uniform(self.seed, epoch, np.repeat(indices, 2) * 2 + np.tile([0, 1], len(indices)), salt=_SHIFT)
        moves = np.floor(draws * (2 * shift + 1)).astype(int).reshape(-1, 2)
        for row, index in enumerate(indices):
            episode, step = self.episodes[self.of_item[index]], int(self.steps[index] - self.first[index])
            for column, camera in enumerate(self.spec.cameras):
                image = resized(np.asarray(episode.images[camera][step]), size)
                if shift:
                    down, right = moves[row]
                    padded = np.pad(image, ((shift, shift), (shift, shift), (0, 0)), mode="edge")
                    image = padded[down : down + size, right : right + size]
                made[row, column] = image
        return made


class ActionData(BaseData):
    """Demonstrations from files.

    Args:
        root: LeRobot folders, .npz, .csv, .hdf5, or folders of such files; a list joins several.
        val: Other demonstrations for validation.
        test: Other demonstrations for testing.
        predict: Demonstrations to predict chunks for.
        val_episodes: Episodes of ``root`` for validation, as a range of their numbers, ``45:50``.
        test_episodes: Likewise for testing.
        val_fraction: Share of the episodes for validation, where neither files nor ranges tell; one at least of three
            or more.
        test_fraction: Share for testing, likewise. What is left is for training, or of that what files say is.
        fps: Steps a second; None where the files tell.
        state: Feature, keys or columns of the states, for files with several; None for the format's usual one.
        action: Feature, key or columns of the actions, likewise.
        columns: Columns of .csv files.
        cameras: Cameras whose pictures are used; none for states alone.
        image_size: Height and width R that pictures are brought to.
        horizon: Steps T of a chunk.
        history: Observed steps H, the current one last.
        tokenizer: ``bspline``, ``binning`` or ``fast``, with what differs from its defaults:
            ``bspline,num_basis=5,initial=fit``.
        quantiles: Shares of the training chunks' values below the tokenizer's bounds; 0 and 1 cut nothing off.
        grippers: Action columns that are open or closed, by name or number; None for those with gripper in the name.
        angles: Action columns that jump by 2 pi.
        quaternions: First columns of quaternions.
        relative: Action columns that are told relative to the current state of the same name: ``all`` of those that
            have one but grippers, angles and quaternions, or a list.
        past_action: Whether the action before is observed.
        tell_task: Whether the model is told the task, one of those in the training episodes.
        augment: What training does to observations at random.
        every: Steps between two training items.
        max_gap: Longest gap of missing frames that is filled, in seconds; an episode is cut at longer ones.
        batch_size: Items in a batch.
        num_workers: Worker processes; worth it for pictures.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of splits, order and augmentation.
    """

    def __init__(
        self,
        *,
        root: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        val_episodes: str | None = None,
        test_episodes: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        fps: float | None = None,
        state: Columns | None = None,
        action: str | None = None,
        columns: ColumnMap | None = None,
        cameras: Columns = (),
        image_size: int = 64,
        horizon: int = 20,
        history: int = 1,
        tokenizer: str = "bspline",
        quantiles: tuple[float, float] = QUANTILES,
        grippers: Columns | None = None,
        angles: Columns = (),
        quaternions: Columns = (),
        relative: Literal["none", "all"] | list[str] = "none",
        past_action: bool = False,
        tell_task: bool = False,
        augment: ActionAugment | None = None,
        every: int = 1,
        max_gap: float = 0.5,
        batch_size: int = 128,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, seed=seed)
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ConfigError(
                "ActionData: val_fraction and test_fraction must be from 0 and below 1 together, got "
                f"{val_fraction} and {test_fraction}."
            )
        for name, value in (("horizon", horizon), ("history", history), ("every", every), ("image_size", image_size)):
            if value < 1:
                raise ConfigError(f"ActionData: {name} must be at least 1, got {value}.")
        if isinstance(relative, str) and relative not in ("none", "all"):
            raise ConfigError(f"ActionData: relative must be none, all or a list of columns, got {relative!r}.")
        self.sources = {"train": _paths(root), "val": _paths(val), "test": _paths(test), "predict": _paths(predict)}
        self.ranges = {"val": _range(val_episodes), "test": _range(test_episodes)}
        self.fractions = {"test": test_fraction, "val": val_fraction}
        self.fps, self.state, self.action, self.columns = fps, None if state is None else tuple(state), action, columns
        self.cameras, self.image_size = tuple(cameras), image_size
        self.horizon, self.history, self.tokenizer = horizon, history, tokenizer
        self.quantiles = quantiles
        self.grippers = None if grippers is None else tuple(grippers)
        self.angles, self.quaternions = tuple(angles), tuple(quaternions)
        self.relative = relative if isinstance(relative, str) else tuple(relative)
        self.past_action, self.tell_task = past_action, tell_task
        self.augment, self.every, self.max_gap = augment or ActionAugment(), every, max_gap
        self.left_out: tuple[LeftOut, ...] = ()

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """As in ``BaseData``."""
        if spec is not None and not isinstance(spec, ActionSpec):
            raise ConfigError(f"ActionData: the model is for {spec.domain}, not for actions.")
        parts: dict[str, Sequence[Episode]] = {}
        if spec is None or splits - {"predict"}:
            own = {
                split: self._even(self._demonstrations(split, spec)) for split in ("val", "test") if self.sources[split]
            }
            read = self._demonstrations("train", spec)
            whole = self._even(dataclasses.replace(read, splits=self._shares(read, own)))
            parts |= {split: [whole.episodes[n] for n in numbers] for split, numbers in whole.splits.items()}
            parts |= {split: found.episodes for split, found in own.items()}
            spec = spec or self._spec_of(whole, parts["train"])
            for found in (whole, *own.values()):
                check_names(spec, found)
        if "predict" in splits and self.sources["predict"]:
            found = self._even(self._demonstrations("predict", spec))
            check_names(spec, found)
            parts["predict"] = found.episodes
        horizon = int(spec.tokenizer["horizon"])
        return spec, {
            split: ActionItems(
                episodes,
                spec,
                horizon,
                self.seed,
                self.augment if split == "train" else None,
                self.every if split == "train" else 1,
            )
            for split, episodes in parts.items()
        }

    def hint(self, split: Split) -> str:
        """What to do when a split is missing."""
        if split == "predict":
            return "give data.predict, files to predict chunks for."
        return f"give data.{split}, data.{split}_episodes such as 50:60, or a data.{split}_fraction above 0."

    # ---------------------------------------------------------------- reading

    def _demonstrations(self, split: str, spec: ActionSpec | None) -> Demonstrations:
        return read_demonstrations(
            self.sources[split],
            fps=self.fps,
            state=self.state,
            action=self.action,
            cameras=self.cameras if spec is None else spec.cameras,
            columns=self.columns,
        )

    def _even(self, read: Demonstrations) -> Demonstrations:
        found, notes = even(read, self.max_gap)
        for note in notes:
            log.warning("%s", note)
        self.left_out += notes
        return found

    def _shares(self, read: Demonstrations, own: Collection[str]) -> dict[str, tuple[int, ...]]:
        """Share the episodes out, but to splits with files of their own: by range, as the files say, or at random.

        It is done before episodes are cut at gaps, so that the parts of one stay together.
        """
        count = len(read.episodes)
        told = {split: set(numbers) for split, numbers in read.splits.items()}
        training = told.get("train", set(range(count)).difference(*told.values()))
        shares: dict[str, set[int]] = {}
        for split, chosen in self.ranges.items():
            if chosen is not None and split not in own:
                shares[split] = set(range(count)[chosen])
                if not shares[split]:
                    raise DataError(f"ActionData: {split}_episodes holds none of the {count} episodes; correct it.")
        if both := set.intersection(*shares.values()) if len(shares) > 1 else ():
            raise ConfigError(f"ActionData: val_episodes and test_episodes must differ, and both hold {min(both)}.")
        shuffled = np.random.default_rng([self.seed, _SPLIT]).permutation(count).tolist()
        for split, fraction in self.fractions.items():
            if split not in own and split not in shares:
                taken = set[int]().union(*shares.values())
                rest = training - taken
                wanted = max(round(fraction * count), int(fraction > 0 and count > 2))  # an episode at least
                drawn = [n for n in shuffled if n in rest][:wanted]
                shares[split] = told[split] - taken if split in told else set(drawn)
        shares["train"] = training.difference(*shares.values())
        if not shares["train"]:
            raise DataError(f"ActionData: no episode of {count} is left for training; leave fewer for val and test.")
        return {split: tuple(sorted(numbers)) for split, numbers in shares.items() if numbers}

    def _spec_of(self, whole: Demonstrations, training: Sequence[Episode]) -> ActionSpec:
        names, states = whole.action_names, whole.state_names
        if self.grippers is None:
            grippers = tuple(i for i, name in enumerate(names) if "gripper" in name.lower())
        else:
            grippers = columns_of(names, self.grippers, "data.grippers")
        angles = columns_of(names, self.angles, "data.angles")
        quaternions = columns_of(names, self.quaternions, "data.quaternions")
        turning = {*angles, *(first + i for first in quaternions for i in range(4))}
        positions = tuple(states.index(name) if name in states else -1 for name in names)
        if self.relative == "all":
            moved = {i for i in range(len(names)) if positions[i] >= 0} - {*grippers, *turning}
        else:
            moved = set() if self.relative == "none" else set(columns_of(names, self.relative, "data.relative"))
        if turned := [names[i] for i in sorted(moved & turning)]:
            raise ConfigError(f"data.relative: {turned[0]} is an angle or part of a quaternion; leave it out.")
        if alone := [names[i] for i in sorted(moved) if positions[i] < 0]:
            raise ConfigError(f"data.relative: {alone[0]} has no state of the same name; states: {', '.join(states)}.")
        stacked = np.concatenate([episode.states for episode in training]).astype(np.float64)
        std = stacked.std(0)
        change, begins = _scales(training, self.history, positions)
        spec = ActionSpec(
            tokenizer={},
            fps=whole.fps,
            history=self.history,
            state_names=states,
            action_names=names,
            state_mean=tuple(stacked.mean(0).tolist()),
            state_std=tuple(np.where(std < _STILL, 1.0, std).tolist()),
            change_std=tuple(change.tolist()),
            start_std=tuple(begins.tolist()),
            positions=positions,
            relative=tuple(positions[i] if i in moved else -1 for i in range(len(names))),
            past_action=self.past_action,
            cameras=self.cameras,
            image_size=self.image_size,
            tasks=tuple(dict.fromkeys(episode.task for episode in training)) if self.tell_task else (),
        )
        tokenizer = make_action_tokenizer(
            self.tokenizer,
            horizon=self.horizon,
            dims=len(names),
            grippers=grippers,
            angles=angles,
            quaternions=quaternions,
        )
        if getattr(tokenizer, "velocity", False):
            raise ConfigError("data.tokenizer: velocity is for tokens alone; policies enforce the first position only.")
        if getattr(tokenizer, "initial", "free") != "free":
            for i, name in enumerate(names):
                if positions[i] < 0 and i not in grippers:
                    raise ConfigError(
                        f"data.tokenizer: an enforced first position needs a state of the same name for every action "
                        f"but grippers, and {name} has none; use initial=free."
                    )
        return dataclasses.replace(spec, tokenizer=fitted(tokenizer, training, spec, self.quantiles).to_dict())


def fitted(
    tokenizer: ActionTokenizer, episodes: Sequence[Episode], spec: ActionSpec, quantiles: tuple[float, float]
) -> ActionTokenizer:
    """Fit a tokenizer to chunks of the episodes, relative where the spec says, evenly spread if there are many."""
    total = sum(len(episode) for episode in episodes)
    every = max(1, -(-total // _FITTED))
    chunks, starts = [], []
    for episode in episodes:
        reference, begins = reference_of(spec, episode.states), starts_of(spec, episode.states)
        before = np.concatenate([begins[:1], episode.actions[:-1]])
        chunks.append((windows(episode, tokenizer.horizon)[0] - reference[:, None])[::every])
        starts.append((before - reference)[::every])
    start = torch.from_numpy(np.concatenate(starts)) if getattr(tokenizer, "initial", "free") != "free" else None
    return tokenizer.fit(torch.from_numpy(np.concatenate(chunks)), start, quantiles=quantiles)


def reference_of(spec: ActionSpec, states: Floats) -> Floats:
    """Return what actions are relative to, (N, A), for states (N, S)."""
    return _columns(states, spec.relative)


def starts_of(spec: ActionSpec, states: Floats) -> Floats:
    """Return where chunks begin when no action was before, (N, A), for states (N, S)."""
    return _columns(states, spec.positions)


def even(demonstrations: Demonstrations, max_gap: float = 0.5) -> tuple[Demonstrations, tuple[LeftOut, ...]]:
    """Put all episodes on an even grid (see ``regular``).

    Returns:
        The set, with the numbers of its splits kept right, and what was done to it or left out of it.
    """
    episodes: list[Episode] = []
    notes = list(demonstrations.left_out)
    parts_of: list[list[int]] = []
    for episode in demonstrations.episodes:
        parts, said = regular(episode, demonstrations.fps, max_gap)
        parts_of.append(list(range(len(episodes), len(episodes) + len(parts))))
        episodes += parts
        notes += said
    splits = {
        name: tuple(part for number in numbers for part in parts_of[number])
        for name, numbers in demonstrations.splits.items()
    }
    return dataclasses.replace(demonstrations, episodes=tuple(episodes), splits=splits), tuple(notes)


def check_names(spec: ActionSpec, demonstrations: Demonstrations) -> None:
    """Refuse demonstrations that a model of this spec cannot read.

    Raises:
        DataError: Names, rate or tasks differ.
    """
    for what in ("state_names", "action_names"):
        mine, theirs = getattr(spec, what), getattr(demonstrations, what)
        if mine != theirs:
            odd = next((name for name in theirs if name not in mine), None) or "another order"
            raise DataError(
                f"the model has {len(mine)} {what} ({', '.join(mine[:3])}, ...), the data {len(theirs)} (with {odd}); "
                "give data of the same robot, or its columns by data.state and data.action."
            )
    if abs(spec.fps - demonstrations.fps) > 0.01 * spec.fps:
        raise DataError(
            f"the model acts at {spec.fps:g} steps a second, the data has {demonstrations.fps:g}; resample it."
        )
    if spec.tasks:
        for task in demonstrations.tasks:
            if task not in spec.tasks:
                raise DataError(f"the model was not trained on the task {task!r}; tasks: {', '.join(spec.tasks)}.")


def resized(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Bring a picture (H, W, 3) to ``size`` by ``size`` pixels, the middle of its longer side kept."""
    height, width = image.shape[:2]
    if (height, width) == (size, size):
        return image
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    part = Image.fromarray(image[top : top + side, left : left + side])
    return np.asarray(part.resize((size, size), Image.Resampling.BILINEAR))


def _columns(states: Floats, columns: Sequence[int]) -> Floats:
    picked = np.zeros((len(states), len(columns)), np.float32)
    for i, column in enumerate(columns):
        if column >= 0:
            picked[:, i] = states[:, column]
    return picked


def _scales(episodes: Sequence[Episode], history: int, positions: Sequence[int]) -> tuple[Doubles, Doubles]:
    """Root mean squares of how states change over the observed steps (S,), and of actions less their states (A,)."""
    changes = np.concatenate([e.states[max(history - 1, 1) :] - e.states[: -max(history - 1, 1)] for e in episodes])
    away = np.concatenate([e.actions[:-1] - _columns(e.states[1:], positions) for e in episodes])
    found = [
        np.sqrt((values.astype(np.float64) ** 2).mean(0)) if len(values) else np.zeros(values.shape[1])
        for values in (changes, away)
    ]
    change, start = (np.where(rms > _STILL, rms, 1.0) for rms in found)
    return change, start


def _paths(given: str | list[str] | None) -> list[Path]:
    return [] if given is None else [Path(given)] if isinstance(given, str) else [Path(p) for p in given]


def _range(text: str | None) -> slice | None:
    if text is None:
        return None
    first, colon, last = text.partition(":")
    if not colon or not all(part.strip().isdigit() or not part.strip() for part in (first, last)):
        raise ConfigError(f"ActionData: a range of episodes must be like 50:60, got {text!r}.")
    return slice(int(first or 0), int(last) if last.strip() else None)
