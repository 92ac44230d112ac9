"""``metrics.csv`` of a run folder."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from vertebra.cli.callbacks import RunFolder


class RunLogger(Logger):
    """Metrics as ``metrics.csv``: a row a step, columns in the order they appeared.

    Args:
        run: The run folder.
        first_step: When resuming, rows from this step on are dropped: they will be made again.
    """

    def __init__(self, run: RunFolder, first_step: int | None = None) -> None:
        super().__init__()
        self.run, self.first_step = run, first_step
        self.closed = False
        self.rows: list[dict[str, Any]] = []
        self.fields: list[str] = ["epoch", "step"]
        self._written = -1  # rows in the file; -1: the file must be written anew

    @property
    def name(self) -> str:
        """Empty: callbacks that build paths from it then write into the run folder itself."""
        return ""

    @property
    def version(self) -> str:
        """Empty, as ``name``."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.run.path)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: ``config.yaml`` holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add metrics to the row of a step."""
        if self.closed or not self.run.ready:
            return
        if self.first_step is not None:
            self._read(self.first_step)
            self.first_step = None
        row = {"step": step if step is not None else len(self.rows), **metrics}
        new = [k for k in row if k not in self.fields]
        if new:
            self.fields += sorted(new)
            self._written = -1
        if self.rows and self.rows[-1]["step"] == row["step"]:
            self.rows[-1].update(row)
        else:
            self.rows.append(row)

    @rank_zero_only
    def save(self) -> None:
        """Write all rows but the last, which may still grow."""
        self._write(len(self.rows) - 1)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write all rows; what is logged later, by the final evaluation, is not of the training."""
        self._write(len(self.rows))
        self.closed = True

    def _path(self) -> Path:
        return self.run.path / "metrics.csv"

    def _write(self, count: int) -> None:
        if not self.run.ready or count <= max(self._written, 0):
            return
        anew = self._written < 0
        with self._path().open("w" if anew else "a", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, self.fields, lineterminator="\n")
            if anew:
                writer.writeheader()
            writer.writerows(self.rows[max(self._written, 0) : count])
        self._written = count

    def _read(self, first_step: int) -> None:
        if self._path().is_file():
            with self._path().open(newline="", encoding="utf-8") as f:
                reader = csv.DictReader(f)
                kept = [r for r in reader if r.get("step", "").isdecimal() and int(r["step"]) < first_step]
                self.fields = list(reader.fieldnames or self.fields)
            self.rows = [{k: int(v) if k in ("step", "epoch") else float(v) for k, v in r.items() if v} for r in kept]
