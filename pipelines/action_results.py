"""What ``action/tokenize`` gives: predictions with figures, and the files of a run.

Shapes: T steps of an episode, D action dimensions, C chunks of an episode, H steps of a chunk, L tokens of a chunk.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.errors import ConfigError
from vertebra.pipelines import figures
from vertebra.pipelines.action_figures import reconstruction_figure
from vertebra.pipelines.action_tokens import Floats, Measures, Reals, Tokens, short, write_tokens
from vertebra.pipelines.base import Item, Writer
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vertebra.pipelines.action import TokenizeActions


@dataclass(eq=False)
class TokenizedActions(Prediction):
    """Tokens of one demonstration; ``value`` holds the ids (C, L).

    Args:
        tokens: The same with all that decoding needs.
        original: What was demonstrated, (T, D), without jumps of angles and quaternions.
        decoded: Beside it what the tokens say, (C, H, D).
        clipped: Share of its numbers that the tokenizer cut off, by dimension, (D,).
    """

    tokens: Tokens = dataclasses.field(kw_only=True)
    original: Floats = dataclasses.field(kw_only=True)
    decoded: Floats = dataclasses.field(kw_only=True)
    clipped: Floats = dataclasses.field(kw_only=True)

    def figure(self) -> Figure:
        """Draw decoded over original actions."""
        own = self.tokens
        pieces = [
            (int(s), chunk[:n]) for s, chunk, n in zip(own.starts, self.decoded, own.used, strict=True)
        ]  # fmt: skip
        count = self.details["tokens"]
        title = f"{self.name}: {count:,} tokens for {self.original.size:,} numbers"
        return reconstruction_figure(
            self.original, pieces, names=own.names, units=own.units, errors=self.details["rmse"], fps=own.fps,
            title=title,
        )  # fmt: skip


@dataclass(eq=False)
class DecodedActions(Prediction):
    """Actions that tokens stand for; ``value`` holds them, (T, D).

    Args:
        times: Seconds, or steps where their rate is not known, (T,).
        names: The D names of the columns.
        units: Their D units.
        fps: Steps a second; None where not known.
    """

    times: Reals = dataclasses.field(kw_only=True)
    names: tuple[str, ...] = dataclasses.field(kw_only=True)
    units: tuple[str, ...] = dataclasses.field(kw_only=True)
    fps: float | None = dataclasses.field(kw_only=True)

    def figure(self) -> Figure:
        """Draw the actions."""
        return reconstruction_figure(
            None, [(0, self.value)], names=self.names, units=self.units, fps=self.fps, title=self.name
        )


class TokenizerFiles(Writer):
    """OUT.npz with tokens or actions, or OUT.csv with actions; OUT.json; and figures of what was made into tokens."""

    def __init__(self, pipeline: TokenizeActions, outputs: Outputs) -> None:
        self.pipeline, self.outputs = pipeline, outputs
        self.table = outputs.target.suffix == ".csv"
        self.file, self.summary = outputs.open(outputs.target, "w" if self.table else "wb"), outputs.side(".json")
        self.stream = outputs.open(self.summary)
        self.tokens: list[tuple[str, Tokens]] = []
        self.actions: list[DecodedActions] = []
        self.listed: list[dict[str, Any]] = []
        self.measures: Measures | None = None

    def write(self, item: Item, prediction: Prediction) -> None:
        """Keep one episode, and draw it."""
        self.listed.append({"name": prediction.name, "input": item.file, **prediction.details})
        if isinstance(prediction, DecodedActions):
            self.actions.append(prediction)
            return
        assert isinstance(prediction, TokenizedActions)
        if self.table:
            raise ConfigError(f"{self.pipeline.name}: tokens are written as .npz; let the output end in .npz.")
        self.tokens.append((prediction.name, prediction.tokens))
        self.measures = self.measures or Measures(len(prediction.clipped))
        self.measures.add(prediction.tokens, prediction.original, prediction.decoded, prediction.clipped)
        if (number := len(self.tokens)) <= self.pipeline.figures:
            name = re.sub(r"[^\w.-]+", "_", prediction.name)[:60]
            path = self.outputs.side(".png" if number == 1 else f".{number}.{name}.png")
            self.outputs.write(path, figures.png_bytes(prediction.figure()))

    def finish(self) -> None:
        """Write all arrays, and the summary."""
        facts: dict[str, Any] = {"pipeline": self.pipeline.name}
        if self.tokens:
            write_tokens(self.file, self.tokens, self.pipeline.every)
            facts |= self._about_tokens()
        elif self.actions:
            first = self.actions[0]
            facts |= {"fps": first.fps, "columns": first.names, "units": first.units}
            self._write_table() if self.table else self._write_arrays()
        if self.pipeline.notes:
            facts["notes"] = self.pipeline.notes
        json.dump({**facts, "episodes": self.listed}, self.stream, indent=1, ensure_ascii=False)
        self.stream.write("\n")

    def _about_tokens(self) -> dict[str, Any]:
        assert self.measures is not None
        pipeline, (_, first) = self.pipeline, self.tokens[0]
        counts = np.concatenate([tokens.counts for _, tokens in self.tokens])
        described = first.tokenizer.to_dict()
        learnt = {"low", "high", "minimum", "model", "longest"}  # long, and in the token file
        binned = first.tokenizer.horizon * first.tokenizer.dims
        return {
            "tokenizer": {key: value for key, value in described.items() if key not in learnt},
            "bounds": "learnt from these episodes" if pipeline.fits else "given with the tokenizer",
            "fps": first.fps,
            "every": pipeline.every,
            "steps": sum(facts["steps"] for facts in self.listed),
            "chunks": len(counts),
            "tokens": int(counts.sum()),
            "tokens_per_chunk": {
                "mean": short(counts.mean()), "min": int(counts.min()), "max": int(counts.max()), "binning": binned,
            },
            "compression": short(binned * len(counts) / counts.sum()),
            **self.measures.overall(),
            "joints": self.measures.joints(first.names, first.units),
        }  # fmt: skip

    def _write_arrays(self) -> None:
        first = self.actions[0]
        rate: dict[str, Any] = {"fps": np.array(first.fps)} if first.fps else {}
        np.savez_compressed(
            self.file,
            actions=np.concatenate([made.value for made in self.actions]),
            timestamps=np.concatenate([made.times for made in self.actions]),
            episode_ends=np.cumsum([len(made.value) for made in self.actions]),
            names=np.array([made.name for made in self.actions], dtype=np.str_),
            action_names=np.array(first.names, dtype=np.str_),
            **rate,
        )

    def _write_table(self) -> None:
        table = csv.writer(self.file, lineterminator="\n")
        table.writerow(["episode", "timestamp", *self.actions[0].names])
        for made in self.actions:
            for time, row in zip(made.times, made.value, strict=True):
                table.writerow([made.name, f"{time:.6f}", *(f"{value:.7g}" for value in row)])
