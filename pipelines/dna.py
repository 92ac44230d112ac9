"""DNA: what all its pipelines share, and classes of the sequences in FASTA, FASTQ, GenBank and CSV files.

A record longer than what the model was trained on is read in windows; the windows of a record are joined to one
prediction, and their scores are kept beside it. Of a large FASTA file only the window at hand is in memory.
"""

from __future__ import annotations

import argparse
import csv
import functools
import re
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines import figures
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer, as_bad
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import BadRecord, Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vertebra.domains.dna.fasta_index import IndexedFasta
    from vertebra.domains.model import DomainModel

STREAM_BYTES = 1 << 22
"""A larger FASTA file is read window by window through its index, not record by record."""


@dataclass(frozen=True)
class Window:
    """A part of a record.

    Args:
        ids: Token ids, shape (L,); or the vector (D,) of a piece whose state was carried.
        start: First base, from 0.
        bases: Number of bases.
        length: Bases of the whole record.
        first: Whether it is the record's first part.
        last: Whether it is the record's last part.
    """

    ids: NDArray[np.int64] | NDArray[np.float32]
    start: int
    bases: int
    length: int
    first: bool
    last: bool


class DNAPipeline(Pipeline):
    """What both verbs share: reading, windows, batches of ids.

    Args:
        model: A model directory, the name of a bundled model, ``hf-hub:ORG/NAME``, or a model.
        device: ``auto``, ``cpu``, ``cuda``, ...
        batch_size: Most windows in a batch.
        batch_tokens: Most positions in a batch.
        window: Bases of a window; None for what the model was trained on.
        stride: Bases from window to window; None for the pipeline's default.
        max_length: Longest record in bases; longer ones are listed as bad.
    """

    unit = "bases"

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
        window: int | None = None,
        stride: int | None = None,
        max_length: int = 100_000_000,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.domains.dna.spec import DNASpec
        from vertebra.tokenizers.base import tokenizer_from_dict
        from vertebra.tokenizers.nucleotide import DNATokenizer

        spec = self.model.spec
        assert isinstance(spec, DNASpec)
        tokenizer = tokenizer_from_dict(spec.tokenizer)
        assert isinstance(tokenizer, DNATokenizer)
        self.spec, self.tokenizer = spec, tokenizer
        k, step = int(getattr(self.tokenizer, "k", 1)), int(getattr(self.tokenizer, "stride", 1))
        longest = (spec.max_length - spec.bos - 1) * step + k
        self.window = window or longest
        if not 1 <= self.window <= longest:
            raise ConfigError(f"{self.name}: window must be from 1 to {longest} bases for this model, got {window}.")
        self.stride = stride or self.default_stride()
        if not 1 <= self.stride <= self.window:
            raise ConfigError(f"{self.name}: stride must be from 1 to the window ({self.window} bases), got {stride}.")
        self.max_length = max_length
        self._begin_record()

    def default_stride(self) -> int:
        """Bases from window to window when the user names none."""
        return self.window

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("long records")
        group.add_argument(
            "--window", type=int, metavar="BASES", help="window (default: what the model was trained on)"
        )
        group.add_argument("--stride", type=int, metavar="BASES", help="bases from window to window")
        group.add_argument("--max-length", type=int, default=100_000_000, metavar="BASES", help="longest record")

    def amount(self, path: Path) -> float | None:
        """Bases of a file, roughly: its size; unknown for compressed files."""
        return None if path.suffix == ".gz" else float(path.stat().st_size)

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the windows of every record of a file."""
        from vertebra.domains.dna.formats import RecordError, read_sequences
        from vertebra.domains.dna.records import sequence_problem

        def on_error(error: RecordError) -> None:
            bad(BadRecord(**error.to_dict()))  # type: ignore[arg-type]

        if (index := self._index(path)) is not None:
            with index:
                for name, length in index.lengths.items():
                    fetch = functools.partial(_checked_fetch, index, name)
                    if problem := sequence_problem(fetch(0, min(length, 10_000)).encode(), length, self.max_length):
                        bad(BadRecord(file=str(path), record=name, line=None, rule=problem[0], advice=problem[1]))
                    else:
                        yield from self._windows(str(path), name, length, fetch, bad)
            return
        for record in read_sequences(path, on_error, max_length=self.max_length, duplicates="report"):
            yield from self._windows(str(path), record.name, len(record.sequence), _fetch_of(record.sequence), bad)

    def _index(self, path: Path) -> IndexedFasta | None:
        """Return access to parts of a large FASTA file; None where it is small, or has no such access."""
        from vertebra.domains.dna.fasta_index import IndexedFasta
        from vertebra.domains.dna.formats import sniff_format

        if path.stat().st_size <= STREAM_BYTES or sniff_format(path) != "fasta":
            return None
        try:
            return IndexedFasta(path, write_index=False)
        except DataError:  # plain gzip, lines of unequal length, bad records: the reader of records knows better
            return None

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the windows of a sequence, or of a ``(name, sequence)`` pair."""
        from vertebra.domains.dna.records import sequence_problem

        name, sequence = value if isinstance(value, tuple) else (f"sequence_{index}", value)
        if not isinstance(sequence, str):
            raise DataError(f"{self.name}: takes sequences, paths or (name, sequence), got {type(sequence).__name__}.")
        if (problem := sequence_problem(sequence.encode(), len(sequence), self.max_length)) is not None:
            bad(BadRecord(file="", record=name, line=None, rule=problem[0], advice=problem[1]))
            return
        yield from self._windows("", name, len(sequence), _fetch_of(sequence), bad)

    def join(self, item: Item, part: Prediction | None) -> Prediction | None:
        """Collect the windows of a record; a record with a bad window is bad."""
        window: Window = item.data
        if window.first and window.last:
            return part
        if window.first:
            self._begin_record()
        if part is None:
            self._broken = True
        else:
            self._starts.append(window.start)
            self._rows.frombytes(self.row(part).tobytes())
        if not window.last or self._broken:
            return None
        starts = np.array(self._starts)
        rows = np.array(self._rows).reshape(len(starts), -1)
        self._begin_record()
        return self.merge(item.record, window.length, starts, rows)

    def row(self, part: Prediction) -> NDArray[np.float32]:
        """Return the numbers of a window that ``merge`` needs, shape (C,)."""
        raise TypeError(f"{type(self).__name__} does not join windows.")

    def merge(self, name: str, length: int, starts: NDArray[np.int64], rows: NDArray[np.float32]) -> Prediction:
        """Make one prediction of a record's windows, all of ``window`` bases.

        Args:
            name: Of the record.
            length: Of the record, in bases.
            starts: First base of each window, shape (W,).
            rows: What ``row`` gave for each, shape (W, C).
        """
        raise TypeError(f"{type(self).__name__} does not join windows.")

    def _begin_record(self) -> None:
        # A chromosome has millions of windows: their numbers alone are kept, not their ids and predictions.
        self._starts, self._rows, self._broken = array("q"), array("f"), False

    def _windows(self, file: str, name: str, length: int, fetch: Callable[[int, int], str], bad: Bad) -> Iterator[Item]:
        last = max(length - self.window, 0)
        start = 0
        while True:
            start = min(start, last)  # the last window ends with the record
            stop = min(start + self.window, length)
            try:
                ids = self.tokenizer.encode(fetch(start, stop))
            except DataError as error:  # shorter than a token, or strange letters: only this record is bad
                bad(as_bad(error, file=file, record=name))
                return
            fresh = self.stride if start < last else stop - start
            data = Window(ids, start, stop - start, length, start == 0, start == last)
            size = len(ids) + self.spec.bos
            yield Item(file=file, record=name, data=data, size=size, weight=fresh, first=data.first)
            if start == last:
                return
            start += self.stride

    def _batch(self, items: list[Item]) -> tuple[Any, Any]:
        """Return ids (B, L), padded on the right, and the mask of real positions."""
        import torch

        bos = int(self.spec.bos)
        size = max(len(item.data.ids) for item in items) + bos
        ids = np.full((len(items), size), self.tokenizer.pad_id, dtype=np.int64)
        if bos:
            ids[:, 0] = self.tokenizer.bos_id
        for row, item in zip(ids, items, strict=True):
            row[bos : bos + len(item.data.ids)] = item.data.ids
        tokens = torch.from_numpy(ids)
        mask = torch.arange(size) < torch.tensor([len(item.data.ids) + bos for item in items])[:, None]
        return tokens.to(self.device), mask.to(self.device)


def _fetch_of(sequence: str) -> Callable[[int, int], str]:
    return lambda start, stop: sequence[start:stop]


def _checked_fetch(index: IndexedFasta, name: str, start: int, stop: int) -> str:
    """Read a part of a record; refuse what is no letter, which the reader of whole records does otherwise."""
    from vertebra.domains.dna.records import letter_problem

    letters = index.fetch(name, start, stop)
    if (problem := letter_problem(letters.encode("ascii", "replace"))) is not None and "looks like" not in problem[0]:
        raise DataError(f"{problem[0]} of bases {start + 1:,} to {stop:,}; {problem[1]}")
    return letters


# ---------------------------------------------------------------- dna/classify


@verb(
    "dna/classify",
    inputs="FASTA, FASTQ, GenBank, EMBL (gz too), CSV or TSV with a column `sequence`",
    outputs=".csv: a row a record; long records also get OUT.windows.csv and a figure",
    model="dna_promoter",
    tasks=("dna/classify",),
)
class Classify(DNAPipeline):
    """Classes, labels or numbers of sequences, with scores along long ones.

    Args:
        model: See ``DNAPipeline``.
        device: See ``DNAPipeline``.
        batch_size: See ``DNAPipeline``.
        batch_tokens: See ``DNAPipeline``.
        window: See ``DNAPipeline``.
        stride: A quarter of the window unless given.
        max_length: See ``DNAPipeline``.
        threshold: Score from which a label holds, and, for two classes, from which the second class is predicted.
        rc_average: Average the scores of both strands; None for the model's own setting.
        target: Class whose score is drawn and whose highest window is named; None for the last one.
        figures: Most records that get a figure.
    """

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
        window: int | None = None,
        stride: int | None = None,
        max_length: int = 100_000_000,
        threshold: float = 0.5,
        rc_average: bool | None = None,
        target: str | None = None,
        figures: int = 5,
    ) -> None:
        super().__init__(
            model,
            device=device,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            window=window,
            stride=stride,
            max_length=max_length,
        )
        if not 0 <= threshold <= 1:
            raise ConfigError(f"{self.name}: threshold must be from 0 to 1, got {threshold}.")
        chosen = self.spec.task == "multilabel" or (self.spec.task == "classification" and len(self.spec.classes) == 2)
        if threshold != 0.5 and not chosen:
            raise ConfigError(
                f"{self.name}: threshold={threshold} has no meaning for this model ({self.spec.task}, "
                f"{self.spec.num_outputs} outputs); leave it out."
            )
        self.outputs_of_model = self.spec.targets if self.spec.task == "regression" else self.spec.classes
        self.target = target or self.outputs_of_model[-1]
        if self.target not in self.outputs_of_model:
            known = ", ".join(self.outputs_of_model)
            raise ConfigError(f"{self.name}: target must be one of the model's outputs ({known}), got {target!r}.")
        self.threshold, self.figures = threshold, figures
        if rc_average is not None:
            setattr(self.model, "rc_average", rc_average)  # noqa: B010 - a DomainModel in general has none

    def default_stride(self) -> int:
        """A quarter of the window."""
        return max(1, self.window // 4)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("classification")
        group.add_argument("--threshold", type=float, default=0.5, help="score from which a label holds (default: 0.5)")
        group.add_argument(
            "--rc-average", action=argparse.BooleanOptionalAction, default=None, help="average both strands"
        )
        group.add_argument("--target", metavar="CLASS", help="class that is drawn (default: the model's last)")
        group.add_argument("--figures", type=int, default=5, metavar="N", help="most records drawn (default: 5)")

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Scores of one batch of windows."""
        import torch

        ids, mask = self._batch(items)
        with torch.inference_mode():
            logits = self.model(ids, mask).float()
        if self.spec.task == "classification":
            scores = logits.softmax(-1)
        elif self.spec.task == "multilabel":
            scores = logits.sigmoid()
        else:
            scores = logits * logits.new_tensor(self.spec.target_std) + logits.new_tensor(self.spec.target_mean)
        return [
            self._prediction(item.record, row, {"length": item.data.length})
            for item, row in zip(items, scores.cpu().numpy(), strict=True)
        ]

    def row(self, part: Prediction) -> NDArray[np.float32]:
        """Scores of a window."""
        return np.array(list(part.scores.values()), dtype=np.float32)

    def merge(self, name: str, length: int, starts: NDArray[np.int64], rows: NDArray[np.float32]) -> Prediction:
        """Mean scores over the windows of a record; the windows' own scores stay in ``details``."""
        curve = rows[:, self.outputs_of_model.index(self.target)]
        best = int(curve.argmax())
        details = {
            "length": length,
            "starts": starts,
            "window": self.window,
            "window_scores": rows,
            "best_start": int(starts[best]),
            "best_score": float(curve[best]),
        }
        return self._prediction(name, rows.mean(0, dtype=np.float64).astype(np.float32), details)

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the table of records."""
        return _ClassifyWriter(self, outputs, several_files)

    def _prediction(self, name: str, row: NDArray[np.float32], details: dict[str, Any]) -> Prediction:
        scores = {c: float(s) for c, s in zip(self.outputs_of_model, row, strict=True)}
        value: Any
        if self.spec.task == "multilabel":
            value = tuple(c for c, s in scores.items() if s >= self.threshold)
        elif self.spec.task == "regression":
            value = float(row[0]) if len(row) == 1 else tuple(float(s) for s in row)
        elif len(scores) == 2:
            value = self.outputs_of_model[int(row[1] >= self.threshold)]
        else:
            value = self.outputs_of_model[int(row.argmax())]
        label = "predicted value" if self.spec.task == "regression" else "score (probability)"
        return ScorePrediction(value, scores, name, details, label)


@dataclass(eq=False)
class ScorePrediction(Prediction):
    """Scores of a sequence; of a long one also along it."""

    def figure(self, target: str | None = None, marks: tuple[int, ...] = ()) -> Figure:
        """Draw the score along a sequence that was read in windows, the scores of all classes of another one.

        Args:
            target: Class to draw along a sequence; None for the last.
            marks: Positions (bases) of known sites.
        """
        if "starts" not in self.details:
            return super().figure()
        names = list(self.scores)
        target = target or names[-1]
        curve = self.details["window_scores"][:, names.index(target)]
        title = f"{self.name}: {target} in windows of {self.details['window']} bases"
        return figures.track(
            self.details["starts"],
            {target: curve},
            width=self.details["window"],
            title=title,
            label="score",
            marks=marks,
        )


class _ClassifyWriter(Writer):
    """OUT.csv; OUT.windows.csv and OUT.<record>.png for records that were read in windows."""

    def __init__(self, pipeline: Classify, outputs: Outputs, several_files: bool) -> None:
        self.pipeline, self.outputs, self.several_files = pipeline, outputs, several_files
        self.table = csv.writer(outputs.open(outputs.target), lineterminator="\n")
        self.windows: Any = None
        self.drawn = 0
        values = [] if pipeline.spec.task == "regression" else ["prediction"]
        named = ["file"] * several_files
        peak = ["windows", "best_start", "best_score"]
        self.table.writerow([*named, "name", "length", *values, *pipeline.outputs_of_model, *peak])

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write the row of a record."""
        details, scores = prediction.details, [f"{s:.6g}" for s in prediction.scores.values()]
        starts = details.get("starts", ())
        value = prediction.value
        shown = (
            [] if self.pipeline.spec.task == "regression" else [value if isinstance(value, str) else ";".join(value)]
        )
        peak = [1, 0, f"{prediction.scores[self.pipeline.target]:.6g}"]
        if len(starts):
            peak = [len(starts), details["best_start"], f"{details['best_score']:.6g}"]
            self._write_windows(item, prediction)
        file = [item.file] * self.several_files
        self.table.writerow([*file, prediction.name, details["length"], *shown, *scores, *peak])

    def _write_windows(self, item: Item, prediction: Prediction) -> None:
        if self.windows is None:
            stream = self.outputs.open(self.outputs.side(".windows.csv"))
            self.windows = csv.writer(stream, lineterminator="\n")
            named = ["file"] * self.several_files
            self.windows.writerow([*named, "name", "start", "end", *self.pipeline.outputs_of_model])
        details = prediction.details
        for start, row in zip(map(int, details["starts"]), details["window_scores"], strict=True):
            end = min(start + details["window"], details["length"])
            file = [item.file] * self.several_files
            self.windows.writerow([*file, prediction.name, start, end, *(f"{s:.6g}" for s in row)])
        if self.drawn < self.pipeline.figures and isinstance(prediction, ScorePrediction):
            self.drawn += 1
            name = re.sub(r"[^\w.-]+", "_", prediction.name)[:60] or "record"
            path = self.outputs.side(f".{self.drawn}.{name}.png")
            self.outputs.open(path, "wb").write(figures.png_bytes(prediction.figure(self.pipeline.target)))


__all__ = ["Classify", "DNAPipeline", "ScorePrediction", "Window"]
