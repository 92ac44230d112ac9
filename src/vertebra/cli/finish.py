"""The end of ``fit``: test the best checkpoint, write ``metrics.json``, the model directory, figures and the report."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from vertebra import __version__
from vertebra.cli.callbacks import RunCheckpoint
from vertebra.cli.invocation import Invocation, read_yaml
from vertebra.cli.run_report import write_report
from vertebra.cli.runs import INITIAL, whole_text
from vertebra.cli.trust import OURS, is_allowed
from vertebra.domains.base import BaseTask
from vertebra.domains.model import DomainModel
from vertebra.domains.saving import class_path, save_model
from vertebra.errors import DataError, printable


def finish_fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: pl.LightningDataModule,
    saver: RunCheckpoint,
    call: Invocation,
    *,
    with_test: bool,
) -> None:
    """Evaluate the best checkpoint and write everything that a run folder holds at the end.

    Args:
        trainer: After ``fit``.
        model: The task; holds the weights of the best checkpoint afterwards.
        data: Its data module.
        saver: Knows the run folder and the checkpoints.
        call: The command.
        with_test: Whether the task can test.
    """
    best = saver.best_path
    if not best.exists():  # no step was taken
        print(f"nothing was trained; wrote the configuration to {saver.run.path}")
        return
    numbers: dict[str, dict[str, float]] = {"validation": {}, "test": {}}
    if _batches(data, "validate", "val_dataloader"):
        numbers["validation"] = _merged(
            trainer.validate(model, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
        )
    if with_test and _batches(data, "test", "test_dataloader"):
        numbers["test"] = _merged(
            trainer.test(model, datamodule=data, ckpt_path=best, weights_only=True, verbose=False)
        )
    if trainer.is_global_zero:
        _write_all(trainer, model, saver, call, numbers, best)
    trainer.strategy.barrier("run folder written")


def resume_command(call: Invocation, folder: Path) -> str:
    """The command that goes on with an interrupted run."""
    kept = [w for w in call.typed if not w.startswith("--ckpt_path=")]
    while "--ckpt_path" in kept:
        at = kept.index("--ckpt_path")
        del kept[at : at + 2]
    while "--root" in kept:
        at = kept.index("--root")
        del kept[at : at + 2]
    kept = [w for w in kept if not w.startswith("--root=")]
    return shlex.join(["vertebra", call.verb, *kept, "--ckpt_path", str(folder)])


def _batches(data: pl.LightningDataModule, stage: str, loader: str) -> bool:
    """Whether the data has a split: its loader is defined and is not empty."""
    if not is_overridden(loader, data, pl.LightningDataModule):
        return False
    data.setup(stage)
    try:
        found = getattr(data, loader)()
    except DataError:  # how a data module says that there is no such split
        return False
    return found is not None and (not isinstance(found, list) or len(found) > 0)


def _merged(results: list[Any]) -> dict[str, float]:
    return {k: float(v) for part in results for k, v in part.items()}


def _write_all(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    saver: RunCheckpoint,
    call: Invocation,
    numbers: dict[str, dict[str, float]],
    best: Path,
) -> None:
    folder = saver.run.path
    facts: dict[str, Any] = {
        **numbers,
        "checkpoint": f"checkpoints/{best.name}",
        "monitor": saver.monitor if saver.best else None,
        "best": saver.best or None,
        "epochs": trainer.current_epoch,
        "steps": trainer.global_step,
        "seed": trainer_seed(folder),
        "command": call.command,
        "vertebra": __version__,
    }
    whole_text(folder / "metrics.json", json.dumps(facts, indent=2) + "\n")
    written = ["config.yaml", "metrics.csv", "metrics.json", "checkpoints/"]
    if (folder / INITIAL).is_file():
        written.insert(1, INITIAL)
    inner = model.plain_model if isinstance(model, BaseTask) else getattr(model, "model", None)
    if isinstance(inner, DomainModel):
        final = {k: v for part in numbers.values() for k, v in part.items()}
        save_model(inner.eval(), folder / "model", metrics=final, command=call.command, notes=_notes(model))
        written.append("model/")
    if isinstance(model, BaseTask):
        written += model.write_results(folder)
    written += write_report(folder, facts)
    _print_numbers(numbers)
    print(f"wrote {', '.join(written)} to {folder}")
    named = "" if is_allowed(class_path(model), OURS) else f" --model {class_path(model)}"
    print(f"next: vertebra test --ckpt_path {folder}{named}")
    if isinstance(inner, DomainModel):
        print(f"      vertebra info {folder / 'model'}")


def _notes(model: pl.LightningModule) -> dict[str, str]:
    notes = getattr(model, "card_notes", None)
    return dict(notes()) if callable(notes) else {}


def trainer_seed(folder: Path) -> Any:
    """The seed in the run's ``config.yaml``."""
    return read_yaml(folder / "config.yaml").get("seed_everything")


def _print_numbers(numbers: dict[str, dict[str, float]]) -> None:
    for split, values in numbers.items():
        if values:
            print(f"{split}: " + "  ".join(f"{printable(k)} {v:.4g}" for k, v in values.items()))
