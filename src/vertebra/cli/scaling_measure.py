"""What a cell of a scaling study adds to its training: part of the data, and counts of positions and parameters."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vertebra.cli.runs import whole_text
from vertebra.cli.scaling_grid import parse_data
from vertebra.domains.base import BaseData, Items
from vertebra.domains.batching import Batch
from vertebra.errors import ConfigError

FIRST = 8
"""Batches whose positions are counted."""


class Part:
    """Some of the items of a split.

    Args:
        items: All of them.
        rows: Which (N,), rising.
    """

    def __init__(self, items: Items, rows: NDArray[np.int64]) -> None:
        self.whole, self.rows = items, rows

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of every item, shape (N,)."""
        return np.asarray(self.whole.lengths)[self.rows]

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Make the batch of ``indices`` (B,), which count the items of this part."""
        return self.whole.fetch(self.rows[indices], epoch)


def take_part(items: Items, data: str) -> Items:
    """Return a part of the items; a smaller one lies within every larger one.

    Args:
        items: All of them.
        data: Number or share, as ``parse_data`` reads it.

    Raises:
        ConfigError: There are not so many.
    """
    share, number = parse_data(data)
    total = len(items.lengths)
    number = max(1, round(share * total)) if share is not None else int(number or 0)
    if number > total:
        raise ConfigError(f"scaling: --data {data}: the training split has {total:,} items only; ask for that or less.")
    if number == total:
        return items
    rows = np.sort(np.random.default_rng(0).permutation(total)[:number]).astype(np.int64)
    own = getattr(items, "take", None)  # a class that its data module knows
    return own(rows) if callable(own) else Part(items, rows)


class Measure(pl.Callback):
    """Trains on part of the data, and writes ``measured.json``.

    Positions are those that enter the backbone in the first batches, by its mask; with several processes or batches a
    step they are summed.

    Args:
        folder: Where to write.
        data: Items or share of the training data.
        tokens: Positions of a step where they are known.
    """

    def __init__(self, folder: str, data: str, tokens: int | None = None) -> None:
        self.folder, self.data, self.tokens = Path(folder), data, tokens
        self.batches = self.positions = 0
        self.items = self.items_all = 0
        self._hooks: list[RemovableHandle] = []
        self._counting = self._done = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave a part of the training data."""
        if stage != "fit":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, BaseData):
            raise ConfigError(
                f"scaling: the data module must be one of vertebra's, whose items can be counted, got "
                f"{type(data).__name__}."
            )
        self.items_all = len(data.items("train").lengths)
        data.keep("train", lambda items: take_part(items, self.data))
        self.items = len(data.items("train").lengths)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin to count, where that was not done before."""
        known = (self.folder / "measured.json").is_file()
        self._done = bool(trainer.strategy.broadcast(known))
        if self._done:
            return
        model: Any = pl_module.model
        backbone = model.backbone
        self._hooks.append(backbone.register_forward_hook(self._count, with_kwargs=True))
        before = backbone.read_last

        def read_last(x: Tensor) -> Tensor:  # of some families it is no call of the backbone
            seen = self.positions
            y = before(x)
            if self.positions == seen:
                self._count(backbone, (x,), {}, y)
            return y

        backbone.read_last = read_last

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count from here."""
        self._counting = not self._done

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count no further."""
        if not self._counting:
            return
        self._counting = False
        self.batches += 1
        if self.batches >= FIRST:
            self._write(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write what was counted in a short training."""
        if not self._done and self.batches:
            self._write(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """What was counted so far, for a run that goes on."""
        return {"batches": self.batches, "positions": self.positions}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.batches, self.positions = state_dict["batches"], state_dict["positions"]

    def _count(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not self._counting:
            return
        x = args[0] if args else kwargs["x"]
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        self.positions += int(mask.sum()) if isinstance(mask, Tensor) else math.prod(x.shape[:-1])

    def _write(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._done = True
        for hook in self._hooks:
            hook.remove()
        model: Any = pl_module.model
        model.backbone.__dict__.pop("read_last", None)
        counted = torch.tensor(float(self.positions), device=pl_module.device)
        positions = float(trainer.strategy.reduce(counted, reduce_op="sum"))
        if not positions and self.tokens is None:
            raise ConfigError(
                "scaling: no position entered model.backbone in the first batches, so compute is unknown; say the "
                "positions of a step with --tokens."
            )
        if trainer.is_global_zero:
            facts = {
                "items": self.items,
                "items_all": self.items_all,
                "tokens": self.tokens or positions / self.batches * trainer.accumulate_grad_batches,
                "params": sum(p.numel() for p in model.backbone.parameters()),
                "params_all": sum(p.numel() for p in model.parameters()),
            }
            whole_text(self.folder / "measured.json", json.dumps(facts, indent=2) + "\n")
