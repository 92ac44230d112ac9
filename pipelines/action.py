"""Robot actions to tokens and back.

Shapes: T steps of an episode, D action dimensions, C chunks of an episode, H steps of a chunk, L tokens of a chunk.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.errors import ConfigError, DataError, VertebraError
from vertebra.pipelines.action_files import read_even
from vertebra.pipelines.action_results import DecodedActions, TokenizedActions, TokenizerFiles
from vertebra.pipelines.action_tokens import (
    Floats,
    Integers,
    Measures,
    Tokens,
    beside,
    continuous,
    cut,
    goes_on,
    one_after_another,
    origin,
    read_tokens,
    short,
)
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import BadRecord, Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from vertebra.domains.model import DomainModel
    from vertebra.tokenizers.action import ActionTokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Recording:
    """Actions of one demonstration.

    Args:
        actions: (T, D).
        states: (T, S).
        names: The D names of the columns.
        fps: Steps a second; None where not known.
    """

    actions: Floats
    states: Floats
    names: tuple[str, ...]
    fps: float | None


@verb(
    "action/tokenize",
    inputs="demonstrations (LeRobot folders, .npz, .csv, .hdf5, folders of these); or token files (.npz) to turn back",
    outputs=".npz: tokens with their tokenizer, OUT.json (errors by joint, tokens, compression, jumps) and OUT.png; or "
    "from tokens .npz or .csv: actions, at any rate",
    tasks=("action/policy",),
    needs_model=False,
)
class TokenizeActions(Pipeline):
    """Tokens of robot actions, as policies predict them, and actions of tokens.

    Args:
        model: Model whose tokenizer, with its bounds, is used.
        device: See ``Pipeline``.
        tokenizer: ``bspline``, ``binning`` or ``fast``, with what differs from its defaults, as in
            ``bspline,num_basis=10,degree=4``: learns its bounds from all demonstrations of a call. Or a token file, or
            a fitted tokenizer, which is used as it is. None means the model's, or ``bspline``.
        horizon: Steps of a chunk; None for 20, or those of a tokenizer that is used as it is.
        every: Steps from one chunk to the next; None for the horizon, so that chunks do not overlap.
        gripper: Columns that open and close, by name or number, also as a text with commas.
        angles: Columns that are angles in radians.
        quaternions: First of the four columns of each quaternion.
        quantiles: Shares of the values below the bounds that are learnt; 0 and 1, which cut nothing off, when None.
        units: Unit of all columns, or of each; angles are ``rad`` where nothing is given.
        state: Where files keep the states; None for the usual place.
        action: Where files keep the actions; None for the usual place.
        fps: Steps a second of files that do not say; and of arrays.
        steps_per_second: Rate of the actions that tokens are turned into; None for that of the demonstrations.
        figures: Most demonstrations that get a figure.
    """

    endings = (".npz", ".csv")
    unit = "episodes"
    reads_folders = True

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "cpu",
        tokenizer: str | ActionTokenizer | None = None,
        horizon: int | None = None,
        every: int | None = None,
        gripper: str | Sequence[str | int] = (),
        angles: str | Sequence[str | int] = (),
        quaternions: str | Sequence[str | int] = (),
        quantiles: Sequence[float] | None = None,
        units: str | Sequence[str] = (),
        state: str | None = None,
        action: str | None = None,
        fps: float | None = None,
        steps_per_second: float | None = None,
        figures: int = 1,
    ) -> None:
        super().__init__(model, device=device)
        for name, value in (("horizon", horizon), ("every", every)):
            if value is not None and value < 1:
                raise ConfigError(f"{self.name}: {name} must be at least 1, got {value}.")
        for name, rate in (("fps", fps), ("steps_per_second", steps_per_second)):
            if rate is not None and not 0 < rate < 1e6:
                raise ConfigError(f"{self.name}: {name} must be above 0 and below 1,000,000, got {rate}.")
        if figures < 0:
            raise ConfigError(f"{self.name}: figures must be 0 or more, got {figures}.")
        self.columns = {"grippers": _listed(gripper), "angles": _listed(angles), "quaternions": _listed(quaternions)}
        low, high = (0.0, 1.0) if quantiles is None else quantiles
        self.quantiles = (float(low), float(high))
        self.units = tuple(units.split(",") if isinstance(units, str) and units else units)
        self.state, self.action, self.fps = state, action, fps
        self.steps_per_second, self.figures = steps_per_second, figures
        self.relative: tuple[int, ...] = ()
        self.notes: list[str] = []
        """What was mended in the files of a run."""
        if model is not None and tokenizer is not None:
            raise ConfigError(f"{self.name}: the model has a tokenizer; give a model or a tokenizer, not both.")
        self.made = "bspline"
        self.tokenizer: ActionTokenizer | None = None
        """In use; None before the first demonstrations."""
        if model is not None:
            self.tokenizer = self._of_model()
        elif isinstance(tokenizer, str) and tokenizer.endswith(".npz"):
            self.tokenizer = self._of_file(Path(tokenizer))
        elif isinstance(tokenizer, str):
            self.made = tokenizer
        else:
            self.tokenizer = tokenizer
        self.fits = self.tokenizer is None
        """Whether every call learns bounds from its demonstrations."""
        self.horizon = 20 if horizon is None else horizon
        if self.tokenizer is not None:
            self._check_given(self.tokenizer, horizon)
            self.horizon = self.tokenizer.horizon
        self.every = self.horizon if every is None else every

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        group = parser.add_argument_group("tokens")
        add = group.add_argument
        add("--tokenizer", metavar="NAME[,KEY=VALUE...]|OUT.npz", help="bspline, binning or fast, as "
            "in bspline,num_basis=10,degree=4, fitted to the input; or that of a file (default: bspline)")  # fmt: skip
        add("--model", metavar="NAME|DIR", help="use this model's tokenizer instead")
        add("--horizon", type=int, metavar="N", help="steps of a chunk (default: 20)")
        add("--every", type=int, metavar="N", help="steps from one chunk to the next (default: the horizon)")
        add("--quantiles", type=float, nargs=2, metavar=("LOW", "HIGH"),
            help="shares of the values below the bounds (default: 0 1, which cuts nothing off)")  # fmt: skip
        add("--steps-per-second", type=float, metavar="HZ", help="rate of actions from tokens (default: as they were)")
        group = parser.add_argument_group("columns, by name or number, with commas between")
        add = group.add_argument
        add("--gripper", default="", metavar="NAMES", help="those that open and close")
        add("--angles", default="", metavar="NAMES", help="those that are angles in radians and may wrap around")
        add("--quaternions", default="", metavar="NAMES", help="first of the four of each quaternion")
        add("--units", default="", metavar="TEXT", help="unit of all of them, or of each, as in rad,rad,m")
        group = parser.add_argument_group("files")
        add = group.add_argument
        add("--state", metavar="NAME", help="where files keep the states (default: the usual place)")
        add("--action", metavar="NAME", help="where files keep the actions (default: the usual place)")
        add("--fps", type=float, metavar="HZ", help="steps a second, for files that do not say")
        add("--figures", type=int, default=1, metavar="N", help="most demonstrations drawn (default: 1)")

    def _of_model(self) -> ActionTokenizer:
        from vertebra.domains.action.spec import ActionSpec
        from vertebra.tokenizers.action import ActionTokenizer
        from vertebra.tokenizers.base import tokenizer_from_dict

        spec = self.model.spec
        assert isinstance(spec, ActionSpec)
        tokenizer = tokenizer_from_dict(spec.tokenizer)
        assert isinstance(tokenizer, ActionTokenizer)
        if any(column >= 0 for column in spec.relative):
            self.relative, self.states = spec.relative, len(spec.state_names)
        return tokenizer

    def _of_file(self, path: Path) -> ActionTokenizer:
        if not path.is_file():
            raise DataError(f"{path}: no such file; check the name.")
        if not (records := read_tokens(path)):
            raise DataError(f"{path}: holds no tokens of actions; name a file that action/tokenize wrote.")
        return records[0][1].tokenizer

    def _check_given(self, tokenizer: ActionTokenizer, horizon: int | None) -> None:
        if not tokenizer.is_fitted:
            raise ConfigError(f"{self.name}: the tokenizer must be fitted; call its fit, or give its name instead.")
        if horizon not in (None, tokenizer.horizon):
            raise ConfigError(f"{self.name}: the tokenizer has the horizon {tokenizer.horizon}, not {horizon}.")
        if any(self.columns.values()):
            raise ConfigError(
                f"{self.name}: the tokenizer knows its grippers, angles and quaternions; leave these options out."
            )

    # ---------------------------------------------------------------- reading

    def folder_files(self, folder: Path) -> list[Path]:
        """List the demonstrations in a folder, which may be one itself."""
        from vertebra.domains.action.sources import find_demonstrations

        return find_demonstrations([folder])

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the episodes of a file or LeRobot folder, or of a token file."""
        if path.suffix == ".npz" and (records := read_tokens(path)) is not None:
            for name, record in records:
                yield Item(file=str(path), record=name, data=record, size=record.ids.size)
            return
        found = read_even(path, bad, self.notes, fps=self.fps, state=self.state, action=self.action, cameras=())
        for own in found.episodes:
            data = Recording(actions=own.actions, states=own.states, names=found.action_names, fps=found.fps)
            yield Item(file=str(path), record=own.name, data=data, size=len(own))

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the episode that an array (T, D) stands for."""
        try:
            actions = np.asarray(value, dtype=np.float32)
        except (TypeError, ValueError):
            actions = np.empty(0, np.float32)
        if actions.ndim != 2 or not actions.size:
            shape = f" of shape {actions.shape}" if actions.ndim > 1 else ""
            raise DataError(f"{self.name}: takes a path or an array (T, D), got {type(value).__name__}{shape}.")
        record = f"episode_{index}"
        if not (finite := np.isfinite(actions).all(1)).all():
            raise DataError(f"{record}: actions is not finite at step {int(finite.argmin())}; mend or leave it out.")
        names = tuple(f"action_{column}" for column in range(actions.shape[1]))
        states = np.empty((len(actions), 0), np.float32)
        recording = Recording(actions=actions, states=states, names=names, fps=self.fps)
        yield Item(file="", record=record, data=recording, size=len(actions))

    def prepared(self, items: Iterator[Item], bad: Bad) -> Iterator[Item]:
        """Read all episodes, leave out those of another robot, give each its name, and fit the tokenizer."""
        self.notes = []
        found = list(items)
        kinds = {type(item.data) for item in found}
        if len(kinds) > 1:
            raise ConfigError(f"{self.name}: some inputs are demonstrations, others are tokens; run them apart.")
        found = list(self._of_one_kind(found, bad))
        if kinds == {Recording}:
            if self.steps_per_second is not None:
                raise ConfigError(f"{self.name}: steps_per_second is for turning tokens back; leave it out.")
            if self.fits:
                self.tokenizer = self._fitted(found)
        yield from found

    def _of_one_kind(self, items: list[Item], bad: Bad) -> Iterator[Item]:
        """Yield the items of one robot, each with a name of its own."""
        seen: Counter[str] = Counter()
        first: Item | None = None
        for item in items:
            if rule := self._stranger(item.data, first or item):
                advice = "give the states too" if "relative" in rule else "run it apart"
                bad(BadRecord(file=item.file, record=item.record, line=None, rule=rule, advice=advice))
                continue
            first = first or item
            seen[item.record] += 1
            again = seen[item.record]
            yield item if again == 1 else dataclasses.replace(item, record=f"{item.record}.{again}")

    def _stranger(self, own: Recording | Tokens, first: Item) -> str:
        """Why an episode cannot go with the first one, or with the tokenizer; empty where it can."""
        if not self.fits and isinstance(own, Recording):
            assert self.tokenizer is not None
            if len(own.names) != self.tokenizer.dims:
                return f"has {len(own.names)} columns of actions, and the tokenizer is for {self.tokenizer.dims}"
            if self.relative and own.states.shape[1] != self.states:
                return (
                    f"has {own.states.shape[1]} columns of states, and actions of the model are relative to "
                    f"{self.states}"
                )
        if own.names != first.data.names:
            return f"has the columns {', '.join(own.names)}, and {first.record} has {', '.join(first.data.names)}"
        if own.fps != first.data.fps and not math.isclose(own.fps or 0, first.data.fps or 0, rel_tol=0.01):
            return f"has {own.fps:g} steps a second, and {first.record} has {first.data.fps:g}"
        return ""

    def _fitted(self, items: list[Item]) -> ActionTokenizer:
        import torch

        from vertebra.domains.action.episodes import columns_of
        from vertebra.tokenizers.action import make_action_tokenizer

        names = items[0].data.names
        given = {key: columns_of(names, wanted, f"{self.name}: {key}") for key, wanted in self.columns.items()}
        tokenizer = make_action_tokenizer(self.made, horizon=self.horizon, dims=len(names), **given)
        if tokenizer.is_fitted:
            raise ConfigError(f"{self.name}: the tokenizer's bounds come from the input; leave low and high out.")
        self._units(tokenizer, names)
        all_actions = [item.data.actions for item in items]
        chunks = torch.from_numpy(np.concatenate([cut(a, self._starts(a), self.horizon) for a in all_actions]))
        if goes_on(tokenizer):
            origins = [origin(tokenizer, a, int(start)) for a in all_actions for start in self._starts(a)]
            return tokenizer.fit(chunks, torch.from_numpy(np.stack(origins)), quantiles=self.quantiles)
        return tokenizer.fit(chunks, quantiles=self.quantiles)

    def _starts(self, actions: Floats) -> Integers:
        return np.arange(0, len(actions), self.every)

    def _units(self, tokenizer: ActionTokenizer, names: Sequence[str]) -> tuple[str, ...]:
        """The unit of each column."""
        if not self.units:
            return tuple("rad" if column in tokenizer.angles else "" for column in range(len(names)))
        if len(self.units) not in (1, len(names)):
            raise ConfigError(
                f"{self.name}: units must be one for all or one for each of {len(names)} columns, got "
                f"{len(self.units)}; columns: {', '.join(names)}."
            )
        return tuple(unit.strip() for unit in (self.units * len(names) if len(self.units) == 1 else self.units))

    # ---------------------------------------------------------------- both directions

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Encode or decode one batch."""
        results: list[Any] = []
        for item in items:
            try:
                results.append(self._decoded(item) if isinstance(item.data, Tokens) else self._encoded(item))
            except VertebraError as error:
                results.append(error)
        return results

    def _encoded(self, item: Item) -> Prediction:
        import torch

        recording: Recording = item.data
        tokenizer, actions = self.tokenizer, recording.actions
        assert tokenizer is not None
        starts = self._starts(actions)
        tokens = Tokens(
            tokenizer=tokenizer,
            ids=np.empty((0, 0), np.int64),
            starts=starts,
            lengths=np.minimum(self.horizon, len(actions) - starts),
            offsets=self._offsets(recording.states[starts]) if self.relative else None,
            names=recording.names,
            units=self._units(tokenizer, recording.names),
            fps=recording.fps,
        )
        chunks = torch.from_numpy(cut(actions, starts, self.horizon))
        if tokens.offsets is not None:
            chunks = chunks - torch.from_numpy(tokens.offsets)[:, None]
        if goes_on(tokenizer):
            tokens = one_after_another(tokens, chunks, actions)
        else:
            tokens = dataclasses.replace(tokens, ids=tokenizer.encode(chunks).numpy())
        original = continuous(actions, tokenizer)
        decoded = beside(tokens.decode(), cut(original, starts, self.horizon), tokenizer)
        start = None if tokens.origins is None else torch.from_numpy(tokens.origins)
        clipped = tokenizer.clipped(chunks, start).numpy()
        measures = Measures(tokenizer.dims)
        measures.add(tokens, original, decoded, clipped)
        count = int(tokens.counts.sum())
        details = {
            "steps": len(actions),
            "chunks": len(starts),
            "tokens": count,
            "compression": short(len(starts) * self.horizon * tokenizer.dims / count),
            "rmse": [short(value) for value in measures.rmse()],
            "largest": [short(value) for value in measures.largest],
            **measures.overall(),
        }
        return TokenizedActions(
            tokens.ids, name=item.record, details=details, label="token", tokens=tokens, original=original,
            decoded=decoded, clipped=clipped,
        )  # fmt: skip

    def _offsets(self, states: Floats) -> Floats:
        """What the actions of chunks are relative to, (C, D), for the states (C, S) where they begin."""
        columns = np.array(self.relative)
        return np.where(columns >= 0, states[:, np.maximum(columns, 0)], np.float32(0))

    def _decoded(self, item: Item) -> Prediction:
        import torch

        own: Tokens = item.data
        valid = own.tokenizer.is_valid(torch.from_numpy(own.ids)).numpy()
        if not valid.all():
            raise DataError(
                f"{item.record}: the ids of chunk {int(valid.argmin()) + 1:,} stand for no actions; write them again."
            )
        rate = Fraction(1)
        if self.steps_per_second is not None:
            if own.fps is None:
                raise DataError(f"{item.record}: its rate is not known; leave --steps-per-second out.")
            rate = Fraction(self.steps_per_second / own.fps).limit_denominator(1000)
            if not rate:
                raise ConfigError(f"{self.name}: steps_per_second must be at least a thousandth of {own.fps:g}.")
        steps, values = own.resampled(rate)
        fps = None if own.fps is None else own.fps * float(rate)
        details = {"steps": len(values), "chunks": len(own.ids), "tokens": int(own.counts.sum()), "fps": fps}
        return DecodedActions(
            values, name=item.record, details=details, label="action", times=steps / (own.fps or 1.0),
            names=own.names, units=own.units, fps=fps,
        )  # fmt: skip

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the output; what it is to hold is known when the first result comes."""
        return TokenizerFiles(self, outputs)


def _listed(value: str | Sequence[str | int]) -> tuple[str | int, ...]:
    """What a text with commas, or a list, holds."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return tuple(value)


__all__ = ["DecodedActions", "TokenizeActions", "TokenizedActions"]
