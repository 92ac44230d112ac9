"""What ``fit`` adds to a training: the run folder, its configuration and checkpoints, and exact resuming."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.cli import SaveConfigCallback

from vertebra.backbones.loading.pretrained import LoadReport
from vertebra.cli.runs import BEST, INITIAL, LAST, create_folder, point_latest, whole_text
from vertebra.domains.base import BaseTask
from vertebra.errors import ConfigError

DEFAULT_MONITOR = "val/loss"
SAVE_EVERY_S = 600.0


class RunFolder:
    """Folder of one run, made when the training begins.

    Args:
        path: Where; a new run takes the next number if another run was faster.
        resumed: Whether it exists and the run goes on in it.
    """

    def __init__(self, path: Path, *, resumed: bool) -> None:
        self.path, self.resumed = path, resumed
        self.ready = False

    def open(self, trainer: pl.Trainer) -> None:
        """Make the folder on rank 0 and tell its path to all ranks."""
        if self.ready:
            return
        failure = ""
        if trainer.is_global_zero:
            try:
                if self.resumed:
                    point_latest(self.path)
                else:
                    self.path = create_folder(self.path)
            except (ConfigError, OSError) as e:
                failure = str(e)
        path, failure = trainer.strategy.broadcast((str(self.path), failure))
        if failure:
            raise ConfigError(failure)
        self.path, self.ready = Path(path), True


class SaveRunConfig(SaveConfigCallback):
    """Open the run folder and write the resolved configuration into it, once the data and the model are built."""

    def __init__(self, *args: Any, run: RunFolder, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.run = run

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave no folder behind for a run that fails while it reads its data."""

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``config.yaml``, and what was loaded where the training begins with weights from elsewhere."""
        self.run.open(trainer)
        if trainer.is_global_zero:
            config = self.config.clone()
            config["ckpt_path"] = None  # the file describes the run, not how far it had come
            text = self.parser.dump(config, skip_none=False)
            whole_text(self.run.path / "config.yaml", text)
            reports = pl_module.load_reports if isinstance(pl_module, BaseTask) else {}
            if reports and trainer.ckpt_path is None:
                whole_text(self.run.path / INITIAL, initial_text(reports))


def initial_text(reports: Mapping[str, LoadReport]) -> str:
    """Say what became of every tensor that a training began with, by the source it was taken from."""
    lines = []
    for source, report in reports.items():
        lines.append(f"{source}: {report.initial()}")
        for kind, names in (
            ("reshaped", report.reshaped),
            ("fresh", report.missing),
            ("not taken", report.unexpected),
            ("matched", report.matched),
        ):
            lines += [f"  {kind:<12}{name}" for name in names]
    return "\n".join(lines) + "\n"


class RunCheckpoint(Checkpoint):
    """``best.ckpt`` by the monitored metric; ``last.ckpt`` every epoch and ten minutes, on a signal, and at the end.

    A checkpoint also holds the state of the random number generators of every process and the settings of the data,
    so that a resumed run ends with the same weights, and the file alone is enough to test.

    Args:
        run: The run folder.
        monitor: Name of the metric; None for no ``best.ckpt``.
        mode: ``min`` or ``max``.
        data: ``{"class_path", "init_args"}`` of the data module.
        resumed: The checkpoint that the run goes on from.
        stop: Tells the signal that asks for an end, or 0.
    """

    def __init__(
        self,
        run: RunFolder,
        *,
        monitor: str | None,
        mode: str,
        data: dict[str, Any] | None,
        resumed: dict[str, Any] | None,
        stop: Callable[[], int],
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"monitor_mode must be 'min' or 'max', got {mode!r}.")
        self.run, self.monitor, self.mode, self.data, self.stop = run, monitor, mode, data, stop
        self.resumed, self._random_is_due = resumed, resumed is not None
        self.best: dict[str, float] = {}
        self._saved_step = -1
        self._saved_at = time.monotonic()
        self._owed = False
        self._between_epochs = False
        self._leaving = False

    # -------------------------------------------------------- paths

    @property
    def last_path(self) -> Path:
        """Where ``last.ckpt`` is or will be."""
        return self.run.path / "checkpoints" / LAST

    @property
    def best_path(self) -> Path:
        """The best checkpoint, or the last where no metric tells."""
        best = self.run.path / "checkpoints" / BEST
        return best if self.best and best.exists() else self.last_path

    # -------------------------------------------------------- hooks

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"monitor": self.monitor, "best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on comparing with the best so far, where its checkpoint is at hand."""
        if self.run.resumed and state_dict.get("monitor") == self.monitor:
            self.best = dict(state_dict["best"])

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Open the run folder; restore random numbers where the checkpoint was made between two epochs."""
        self.run.open(trainer)
        if self.resumed is not None and self.resumed.get("between_epochs", True):
            self._restore_random(trainer)
            self._random_is_due = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the loader where it was: Lightning does not when the optimizer's schedule asked for its length before."""
        loops = (self.resumed or {}).get("loops", {})
        states = loops.get("fit_loop", {}).get("state_dict", {}).get("combined_loader", [])
        loader = trainer.train_dataloader
        if len(states) == 1 and loader is not None and hasattr(loader, "load_state_dict"):
            loader.load_state_dict(states[0])

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Restore random numbers after the first batch was fetched, where the checkpoint was made within an epoch."""
        self._leave_if_asked()
        if self._random_is_due:
            self._restore_random(trainer)
            self._random_is_due = False

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave when a signal asked for it."""
        self._leave_if_asked()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save where it is due or when a signal asked for an end."""
        if trainer.is_last_batch:
            return  # the end of the epoch saves, after the validation
        signum = self._agree(trainer, self.stop())
        ends = trainer.should_stop or trainer.global_step >= trainer.max_steps > 0
        due = self._owed or ends or (batch_idx % 50 == 0 and self._time_is_up(trainer))
        if signum or due:
            self._save(trainer, between_epochs=False)
        self._leaving = bool(signum)  # before the next batch, when the numbers of this one are logged

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save ``last.ckpt``."""
        self._save(trainer, between_epochs=True)
        self._leaving = bool(self._agree(trainer, self.stop()))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Save ``best.ckpt`` when the metric improved."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        self._owed = True
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        if self.monitor and value is None:
            if self.monitor == DEFAULT_MONITOR:
                return
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise ConfigError(
                f"{type(pl_module).__name__}.monitor is {self.monitor!r}, which is not logged; logged are {logged}."
            )
        if value is None or not torch.isfinite(value):
            return
        sign = 1 if self.mode == "max" else -1
        if not self.best or sign * (float(value) - self.best["value"]) > 0:
            self.best = {"value": float(value), "epoch": trainer.current_epoch, "step": trainer.global_step}
            self._write(trainer, BEST, between_epochs=False)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the random state of every process and the settings of the data."""
        checkpoint["random"] = _gather(random_state())
        checkpoint["between_epochs"] = self._between_epochs
        checkpoint["data"] = self.data

    # -------------------------------------------------------- inside

    def _leave_if_asked(self) -> None:
        if self._leaving:
            raise KeyboardInterrupt

    def _restore_random(self, trainer: pl.Trainer) -> None:
        states = (self.resumed or {}).get("random") or []
        if trainer.global_rank < len(states):
            set_random_state(states[trainer.global_rank])

    def _time_is_up(self, trainer: pl.Trainer) -> bool:
        return bool(trainer.strategy.broadcast(time.monotonic() - self._saved_at > SAVE_EVERY_S))

    def _agree(self, trainer: pl.Trainer, signum: int) -> int:
        if trainer.world_size == 1:
            return signum
        if not trainer.strategy.reduce_boolean_decision(bool(signum), all=False):
            return 0
        return signum or signal.SIGINT

    def _save(self, trainer: pl.Trainer, *, between_epochs: bool) -> None:
        if self._saved_step != trainer.global_step:
            self._write(trainer, LAST, between_epochs=between_epochs)
            self._saved_step, self._saved_at, self._owed = trainer.global_step, time.monotonic(), False

    def _write(self, trainer: pl.Trainer, name: str, *, between_epochs: bool) -> None:
        folder = self.run.path / "checkpoints"
        partial = folder / f".{name}.partial"
        self._between_epochs = between_epochs
        trainer.save_checkpoint(partial, weights_only=False)  # whole, not the weights alone
        if trainer.is_global_zero:
            target = folder / name
            if target.is_dir():  # sharded checkpoints are folders
                shutil.rmtree(target)
            partial.replace(target)
        trainer.strategy.barrier("checkpoint renamed")


def random_state() -> dict[str, Any]:
    """State of all generators, in types that load without pickle."""
    kind, keys, *rest = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": [kind, [int(k) for k in keys], *rest],
        "python": random.getstate(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what ``random_state`` returned."""
    torch.set_rng_state(state["torch"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _gather(value: Any) -> list[Any]:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, value)
    return parts
