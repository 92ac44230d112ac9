"""DNA: one vector a sequence."""

from __future__ import annotations

import argparse
import io
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import Bad, Item, Writer, as_bad
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.dna import DNAPipeline, Window
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from vertebra.domains.dna.model import DNALanguageModel
    from vertebra.domains.model import DomainModel

EMBED_ROWS = 4096
"""Embeddings that a Parquet row group holds."""
CARRY_PIECE = 2048
"""Bases that are read at a time where the state is carried."""
CARRY_ITEM = 1 << 18
"""Bases whose vectors are summed up before they go on: little is kept of a chromosome, yet progress shows."""


@verb(
    "dna/embed",
    inputs="FASTA, FASTQ, GenBank, EMBL (gz too), CSV or TSV with a column `sequence`",
    outputs=".npz (names, embeddings) or .parquet (name, length, embedding)",
    model="dna_lm",
    tasks=("dna/lm", "dna/classify"),
)
class Embed(DNAPipeline):
    """One vector a sequence, float32: of a language model the mean of its states, of a classifier what its head reads.

    The vector of a long record is the mean over its windows: side by side, the last one ending with the record. With
    ``context="carry"`` a causal language model reads the record from end to end instead, its state going from piece to
    piece: every position sees all before it, and memory does not grow with the record.

    Args:
        model: See ``DNAPipeline``.
        device: See ``DNAPipeline``.
        batch_size: See ``DNAPipeline``.
        batch_tokens: See ``DNAPipeline``.
        window: See ``DNAPipeline``.
        stride: See ``DNAPipeline``.
        max_length: See ``DNAPipeline``.
        context: What a position of a long record sees: its ``window``, or ``carry``: all before it.
    """

    endings = (".npz", ".parquet")

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
        context: Literal["window", "carry"] = "window",
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
        if context not in ("window", "carry"):
            raise ConfigError(f"{self.name}: context must be window or carry, got {context!r}.")
        self.context = context
        if context == "carry":
            self._check_carry()

    def _check_carry(self) -> None:
        config = self.model.backbone.config
        if self.model.task != "dna/lm" or not config.causal:
            raise ConfigError(f"{self.name}: context 'carry' needs a causal language model; use context 'window'.")
        if getattr(self.tokenizer, "k", 1) > 1:
            raise ConfigError(f"{self.name}: context 'carry' reads single bases, not k-mers; use context 'window'.")
        if self.model.backbone.init_state(1, self.max_length).growth == "linear":
            raise ConfigError(
                f"{self.name}: context 'carry' needs a state that does not grow, and this model has attention without "
                "a window; use context 'window', or a model of a backbone such as hybrid_nano,pattern=M."
            )

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("embedding")
        group.add_argument(
            "--context", choices=("window", "carry"), default="window",
            help="what a position of a long record sees: its window, or all before it (default: window)",
        )  # fmt: skip

    def _windows(self, file: str, name: str, length: int, fetch: Callable[[int, int], str], bad: Bad) -> Iterator[Item]:
        if self.context == "window" or length <= self.window:
            yield from super()._windows(file, name, length, fetch, bad)
            return
        import torch

        model: DNALanguageModel = self.model  # type: ignore[assignment]
        with torch.inference_mode():
            state = model.backbone.init_state(1, length + 1)
            if self.spec.bos:
                model.backbone.step(model.embed(torch.tensor([[self.tokenizer.bos_id]], device=self.device)), state)
        for begin in range(0, length, CARRY_ITEM):
            end = min(begin + CARRY_ITEM, length)
            total = np.zeros(self.model.backbone.config.dim)
            for start in range(begin, end, CARRY_PIECE):
                try:
                    ids = self.tokenizer.encode(fetch(start, min(start + CARRY_PIECE, end)))
                except DataError as error:
                    bad(as_bad(error, file=file, record=name))
                    return
                with torch.inference_mode():
                    inputs = torch.from_numpy(ids)[None].to(self.device)
                    features = model.backbone.step(model.embed(inputs), state)  # (1, T, D)
                    total += features[0].double().sum(0).cpu().numpy()
            vector = (total / (end - begin)).astype(np.float32)
            data = Window(vector, begin, end - begin, length, begin == 0, end == length)
            yield Item(file=file, record=name, data=data, size=1, weight=end - begin, first=data.first)

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Embeddings of one batch of windows."""
        import torch

        from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel, masked_mean

        ready = {i: item.data.ids for i, item in enumerate(items) if item.data.ids.dtype.kind == "f"}
        if ready:  # pieces whose state was carried: their vector came with them
            rest = [item for i, item in enumerate(items) if i not in ready]
            others = iter(self.predict(rest) if rest else [])
            return [self._vector(item, ready[i]) if i in ready else next(others) for i, item in enumerate(items)]
        ids, mask = self._batch(items)
        with torch.inference_mode():
            if isinstance(self.model, DNALanguageModel):
                states = self.model.embed_positions(ids, mask)
                if self.spec.bos:
                    mask[:, 0] = False
                vectors = masked_mean(states, mask)
            else:
                assert isinstance(self.model, DNAClassifier)
                vectors = self.model.embed_sequences(ids, mask)
        rows = vectors.float().cpu().numpy()
        return [self._vector(item, row) for item, row in zip(items, rows, strict=True)]

    def _vector(self, item: Item, row: NDArray[np.float32]) -> Prediction:
        return Prediction(row, name=item.record, details={"length": item.data.length}, label="embedding")

    def row(self, part: Prediction) -> NDArray[np.float32]:
        """Vector of a window."""
        return np.asarray(part.value, dtype=np.float32)

    def merge(self, name: str, length: int, starts: NDArray[np.int64], rows: NDArray[np.float32]) -> Prediction:
        """Mean over the windows of a record; over its positions where the state was carried."""
        weights = np.ones(len(rows))
        if self.context == "carry":
            weights = np.minimum(CARRY_ITEM, length - starts).astype(np.float64)
        vector = np.average(rows.astype(np.float64), axis=0, weights=weights).astype(np.float32)
        return Prediction(vector, name=name, details={"length": length}, label="embedding")

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the output in the format of its ending."""
        return _NpzWriter(outputs) if outputs.target.suffix == ".npz" else _ParquetWriter(outputs)


class _NpzWriter(Writer):
    """``names`` (N,), ``lengths`` (N,) and ``embeddings`` (N, D); rows wait on disk, not in memory."""

    def __init__(self, outputs: Outputs) -> None:
        self.stream = outputs.open(outputs.target, "wb")
        self.rows = tempfile.TemporaryFile()  # noqa: SIM115 - closed in finish
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.width = 0

    def write(self, item: Item, prediction: Prediction) -> None:
        """Keep one row."""
        self.names.append(prediction.name)
        self.lengths.append(prediction.details["length"])
        self.width = len(prediction.value)
        self.rows.write(np.ascontiguousarray(prediction.value, dtype="<f4").tobytes())

    def finish(self) -> None:
        """Write the archive."""
        with zipfile.ZipFile(self.stream, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in (("names", np.array(self.names)), ("lengths", np.array(self.lengths))):
                buffer = io.BytesIO()
                np.lib.format.write_array(buffer, array, allow_pickle=False)
                archive.writestr(f"{name}.npy", buffer.getvalue())
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(self.names), self.width)}
            with archive.open("embeddings.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                self.rows.seek(0)
                while block := self.rows.read(1 << 20):
                    member.write(block)
        self.rows.close()


class _ParquetWriter(Writer):
    """Columns ``name``, ``length`` and ``embedding`` (a list of float32 of fixed size)."""

    def __init__(self, outputs: Outputs) -> None:
        self.stream = outputs.open(outputs.target, "wb")
        self.rows: list[Prediction] = []
        self.file: Any = None

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write a row group whenever one is full."""
        self.rows.append(prediction)
        if len(self.rows) == EMBED_ROWS:
            self._flush()

    def finish(self) -> None:
        """Write the rest."""
        self._flush()
        if self.file is not None:
            self.file.close()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not self.rows:
            return
        flat = pa.array(np.concatenate([p.value for p in self.rows]), pa.float32())
        columns = {
            "name": pa.array([p.name for p in self.rows]),
            "length": pa.array([p.details["length"] for p in self.rows], pa.int64()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, len(self.rows[0].value)),
        }
        table = pa.table(columns)
        if self.file is None:
            self.file = pq.ParquetWriter(self.stream, table.schema)
        self.file.write_table(table)
        self.rows = []


__all__ = ["Embed"]
