"""Predictions of a trainer as a CSV file, in the order of the input."""

from __future__ import annotations

import csv
import io
import logging
import math
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor

from vertebra.domains.writing import whole_file
from vertebra.errors import DataError

log = logging.getLogger("vertebra")


class PredictionWriter(pl.Callback):
    """Write what ``predict_step`` returns, a list of dicts per batch, as one CSV.

    The file appears whole at the end, in the order of the items' ``index``, which is not written.

    Args:
        path: The CSV.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._rows: list[dict[str, Any]] = []

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin with no rows."""
        self._rows = []

    def on_predict_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows of a batch."""
        self._rows += outputs

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Gather the rows of all processes and write them."""
        rows = self._rows
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(parts, rows)
            rows = [row for part in parts for row in part]
        if trainer.is_global_zero:
            unique = {row["index"]: row for row in rows}  # the last batch repeats items where ranks would have none
            write_csv(self.path, [unique[i] for i in sorted(unique)])
            log.info("wrote %d predictions to %s", len(unique), self.path)


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV, whole or not at all; the folder is made.

    Raises:
        DataError: The file cannot be written.
    """
    names = [k for k in rows[0] if k != "index"] if rows else []
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"{path}: cannot be written ({e.strerror}); choose another folder.") from e
    with whole_file(path) as file, io.TextIOWrapper(file, encoding="utf-8", newline="") as text:
        writer = csv.DictWriter(text, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: _short(v) for k, v in row.items()} for row in rows)


def _short(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.item()
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.6g}"
    return value
