"""What ``action/predict`` gives: chunks and simulated episodes, their figures, and the files of a run.

Shapes: T steps of an episode, D action dimensions, C decisions, H steps of a chunk.
"""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.pipelines import figures
from vertebra.pipelines.action_figures import paths_figure, reconstruction_figure
from vertebra.pipelines.action_tokens import Floats, Integers, Reals, beside, short
from vertebra.pipelines.base import Item, Writer
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vertebra.domains.action.simulation import Rollouts
    from vertebra.pipelines.action_predict import PredictActions
    from vertebra.tokenizers.action import ActionTokenizer


_GIF_RATE = 8.0
"""Pictures a second."""


@dataclass(eq=False)
class PredictedActions(Prediction):
    """Chunks for one episode; ``value`` holds them, (C, H, D).

    Args:
        steps: Steps of the episode at which was decided, (C,).
        times: Their times in seconds, (C,).
        rate: Steps a second of the chunks.
        fps: Steps a second of the episode.
        names: The D names of the columns.
        truth: What was done, (T, D); None where it is not known.
        held: What staying in place would be, (C, D).
        tokenizer: Knows which columns are angles and quaternions.
    """

    steps: Integers = dataclasses.field(kw_only=True)
    times: Reals = dataclasses.field(kw_only=True)
    rate: float = dataclasses.field(kw_only=True)
    fps: float = dataclasses.field(kw_only=True)
    names: tuple[str, ...] = dataclasses.field(kw_only=True)
    truth: Floats | None = dataclasses.field(kw_only=True)
    held: Floats = dataclasses.field(kw_only=True)
    tokenizer: ActionTokenizer = dataclasses.field(kw_only=True)

    def figure(self) -> Figure:
        """Draw the chunks over what was done; of chunks that overlap, the steps up to the next decision."""
        firsts = np.round(self.steps * self.rate / self.fps).astype(int)  # steps at the rate of the chunks
        truth = self.truth if self.rate == self.fps else None
        ends = [*firsts[1:].tolist(), firsts[-1] + self.value.shape[1] if truth is None else len(truth)]
        pieces = [
            (int(first), chunk[: max(1, int(end - first))])
            for first, chunk, end in zip(firsts, self.value, ends, strict=True)
        ]
        return reconstruction_figure(
            truth, pieces, names=self.names, errors=self.details.get("rmse"), fps=self.rate,
            title=f"{self.name}: {len(self.steps):,} decisions", label="predicted",
        )  # fmt: skip

    def squares(self) -> tuple[Reals, Reals, int]:
        """Sums of squared errors of the chunks and of staying in place, (D,) each, over so many true steps."""
        zero = np.zeros(len(self.names))
        if self.truth is None or self.rate != self.fps:
            return zero, zero, 0
        places = self.steps[:, None] + np.arange(self.value.shape[1])  # (C, H)
        real = (places < len(self.truth))[..., None]
        true = self.truth[np.minimum(places, len(self.truth) - 1)]
        guesses = (self.value, np.broadcast_to(self.held[:, None], true.shape))
        errors = [
            ((beside(guess, true, self.tokenizer) - true) ** 2 * real).sum((0, 1), dtype=np.float64)
            for guess in guesses
        ]
        return errors[0], errors[1], int(real.sum())

    def errors(self) -> dict[str, Any]:
        """Root-mean-square errors by joint, of the chunks and of staying in place; none where nothing is true."""
        own, held, count = self.squares()
        return _errors(own, held, count)


def _errors(own: Reals, held: Reals, count: int) -> dict[str, Any]:
    if not count:
        return {}
    return {
        "rmse": [short(v) for v in np.sqrt(own / count)],
        "hold_rmse": [short(v) for v in np.sqrt(held / count)],
        "rmse_all": short(float(np.sqrt(own.mean() / count))),
        "hold_rmse_all": short(float(np.sqrt(held.mean() / count))),
    }


@dataclass(eq=False)
class Rolled(Prediction):
    """One simulated episode; ``value`` holds what happened."""

    value: Rollouts

    def figure(self) -> Figure:
        """Draw the paths of the gripper and of what it carries, from above and from the side."""
        return paths_figure(self.value.gripper, self.value.block, self.value.goals, self.value.success)


class ChunkFiles(Writer):
    """OUT.csv, OUT.parquet or OUT.npz with chunks; OUT.json; and figures."""

    def __init__(self, pipeline: PredictActions, outputs: Outputs) -> None:
        self.pipeline, self.outputs = pipeline, outputs
        self.kind = outputs.target.suffix
        self.file = outputs.open(outputs.target, "w" if self.kind == ".csv" else "wb")
        self.summary = outputs.open(outputs.side(".json"))
        self.made: list[PredictedActions] = []
        self.listed: list[dict[str, Any]] = []

    def write(self, item: Item, prediction: Prediction) -> None:
        """Keep one episode, and draw it."""
        assert isinstance(prediction, PredictedActions)
        self.made.append(prediction)
        self.listed.append({"name": prediction.name, "input": item.file, **prediction.details})
        if (number := len(self.made)) <= self.pipeline.figures:
            name = re.sub(r"[^\w.-]+", "_", prediction.name)[:60]
            path = self.outputs.side(".png" if number == 1 else f".{number}.{name}.png")
            self.outputs.write(path, figures.png_bytes(prediction.figure()))

    def finish(self) -> None:
        """Write all chunks, and the summary."""
        if not self.made:
            return
        first = self.made[0]
        if self.kind == ".npz":
            np.savez_compressed(
                self.file,
                chunks=np.concatenate([made.value for made in self.made]),
                steps=np.concatenate([made.steps for made in self.made]),
                times=np.concatenate([made.times for made in self.made]),
                episode_ends=np.cumsum([len(made.steps) for made in self.made]),
                names=np.array([made.name for made in self.made], dtype=np.str_),
                action_names=np.array(first.names, dtype=np.str_),
                fps=np.array(first.rate),
            )
        elif self.kind == ".csv":
            table = csv.writer(self.file, lineterminator="\n")
            columns = self._columns()
            table.writerow(columns)
            for episode, step, when, *values in zip(*columns.values(), strict=True):
                table.writerow([episode, step, f"{when:.6f}", *(f"{value:.7g}" for value in values)])
        else:
            import pyarrow
            import pyarrow.parquet

            pyarrow.parquet.write_table(pyarrow.table(self._columns()), self.file)
        own, held, counts = zip(*(made.squares() for made in self.made), strict=True)
        facts: dict[str, Any] = {
            "pipeline": self.pipeline.name,
            "fps": first.rate,
            "steps_of_a_chunk": first.value.shape[1],
            "every": self.pipeline.every,
            "decisions": sum(len(made.steps) for made in self.made),
            "decision_ms": short(float(np.median([made.details["decision_ms"] for made in self.made]))),
            "columns": first.names,
            **_errors(np.sum(own, axis=0), np.sum(held, axis=0), sum(counts)),
        }
        facts["chunk_ms"] = short(1e3 * self.pipeline.every / first.fps)
        if self.pipeline.notes:
            facts["notes"] = self.pipeline.notes
        json.dump({**facts, "episodes": self.listed}, self.summary, indent=1, ensure_ascii=False)
        self.summary.write("\n")

    def _columns(self) -> dict[str, list[Any]]:
        """A row for every action: whose, decided at which step, for which time."""
        first = self.made[0]
        count = first.value.shape[1]
        ahead = np.arange(count) / first.rate
        columns: dict[str, list[Any]] = {
            "episode": [made.name for made in self.made for _ in range(len(made.steps) * count)],
            "step": [step for made in self.made for step in np.repeat(made.steps, count).tolist()],
            "timestamp": [t for made in self.made for t in (made.times[:, None] + ahead).ravel().tolist()],
        }
        for i, name in enumerate(first.names):
            columns[f"action.{name}" if name in columns else name] = [
                v for made in self.made for v in made.value[..., i].ravel().tolist()
            ]
        return columns


class RolloutFiles(Writer):
    """OUT.csv with a row for every simulated episode; OUT.json; OUT.png with paths; pictures where they can be made."""

    def __init__(self, pipeline: PredictActions, outputs: Outputs) -> None:
        self.pipeline, self.outputs = pipeline, outputs
        self.file, self.summary = outputs.open(outputs.target), outputs.open(outputs.side(".json"))
        self.parts: list[Rollouts] = []

    def write(self, item: Item, prediction: Prediction) -> None:
        """Keep one episode."""
        assert isinstance(prediction, Rolled)
        self.parts.append(prediction.value)

    def finish(self) -> None:
        """Write rows, summary and pictures."""
        from vertebra.domains.action.simulation import filmstrip, gif_bytes, joined

        if not self.parts:
            return
        seeds = np.concatenate([part.seed + np.arange(len(part)) for part in self.parts])
        # an episode that could not be played leaves a hole, behind which the others move up
        places = self.parts[0].seed + np.cumsum([0, *map(len, self.parts)])
        whole = joined([dataclasses.replace(p, seed=int(s)) for p, s in zip(self.parts, places, strict=False)])
        table = csv.writer(self.file, lineterminator="\n")
        table.writerow(["episode", "seed", "success", "ever", "steps_to_success", "jerk", "action_jerk"])
        pipeline = self.pipeline
        rows = zip(seeds.tolist(), whole.success, whole.ever, whole.first, whole.jerk, whole.action_jerk, strict=True)
        for seed, success, ever, first, jerk, action_jerk in rows:
            steps = int(first) if ever else ""
            number = seed - pipeline.seed
            table.writerow([number, seed, int(success), int(ever), steps, f"{jerk:.6g}", f"{action_jerk:.6g}"])
        facts: dict[str, Any] = {
            "pipeline": pipeline.name,
            "task": whole.task,
            "execute": pipeline.execute or (pipeline.runner.horizon if pipeline.ensemble is None else 1),
            "ensemble": pipeline.ensemble,
            **{k: short(v) if isinstance(v, float) else v for k, v in whole.summary().items()},
        }
        if whole.notes:
            facts["notes"] = list(whole.notes)
        json.dump(facts, self.summary, indent=1, ensure_ascii=False)
        self.summary.write("\n")
        figure = paths_figure(whole.gripper, whole.block, whole.goals, whole.success)
        self.outputs.write(self.outputs.side(".png"), figures.png_bytes(figure))
        if len(whole.frames):
            picture = io.BytesIO()
            filmstrip(whole.frames).save(picture, "PNG")
            self.outputs.write(self.outputs.side(".film.png"), picture.getvalue())
            self.outputs.write(self.outputs.side(".gif"), gif_bytes(whole.frames, _GIF_RATE))
