"""A tiny domain, kept out of the package: points of two classes, read from a CSV."""

import csv
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import nn

from vertebra.backbones.base import BackboneConfig
from vertebra.domains.base import BaseData, BaseTask
from vertebra.domains.model import DomainModel
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class ToySpec(DataSpec):
    domain: ClassVar[str] = "toy"
    classes: tuple[str, ...] = ()


class ToyItems:
    def __init__(self, points, labels):
        self.points, self.labels = points, labels
        self.lengths = np.full(len(points), points.shape[1])

    def fetch(self, indices, epoch):
        return {"x": self.points[indices], "y": self.labels[indices], "index": torch.as_tensor(indices)}


class ToyData(BaseData):
    """Toy data.

    Args:
        path: The CSV.
        with_test: Whether there is a test split.
    """

    def __init__(self, *, path: str, with_test: bool = True, batch_size: int = 4, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.path, self.with_test = path, with_test

    def load(self, splits, spec):
        if not Path(self.path).is_file():
            raise DataError(f"{self.path}: no such file; give another --data.path.")
        with open(self.path, newline="") as f:
            rows = list(csv.reader(f))
        labels = torch.tensor([int(r[0]) for r in rows])
        points = torch.tensor([[float(v) for v in r[1:]] for r in rows])
        count = len(rows) // 2
        items = {
            "train": ToyItems(points[:count], labels[:count]),
            "val": ToyItems(points[count:], labels[count:]),
            "predict": ToyItems(points, labels),
        }
        if self.with_test:
            items["test"] = items["val"]
        return ToySpec(classes=("a", "b")), items


class ToyModel(DomainModel):
    task = "toy/classify"

    def __init__(self, backbone, spec, dropout=0.0):
        super().__init__(backbone, spec, dropout=dropout)
        self.embed = nn.Linear(1, backbone.config.dim)
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(backbone.config.dim, len(spec.classes))

    def forward(self, x):
        return self.head(self.backbone(self.drop(self.embed(x[..., None]))).mean(1))


class ToyTask(BaseTask):
    """Toy task.

    Args:
        backbone: Backbone.
        optimizer: Optimizer.
        init_from: Initial weights.
        dropout: Share of features dropped.
    """

    monitor: ClassVar[str] = "val/acc"
    monitor_mode: ClassVar[str] = "max"

    def __init__(
        self,
        *,
        backbone: BackboneConfig | str = "illama_test",
        optimizer: OptimizerConfig | None = None,
        init_from: str | None = None,
        dropout: float = 0.1,
        mode: Literal["plain", "odd"] = "plain",
    ) -> None:
        super().__init__(backbone=backbone, optimizer=optimizer, init_from=init_from)
        if dropout >= 1:
            raise ConfigError(f"ToyTask: dropout must be below 1, got {dropout}.")
        self.dropout = dropout

    def build_model(self, backbone, spec):
        return ToyModel(backbone, spec, dropout=self.dropout)

    def _loss(self, batch):
        logits = self.model(batch["x"])
        return nn.functional.cross_entropy(logits, batch["y"]), (logits.argmax(-1) == batch["y"]).float().mean()

    def training_step(self, batch, batch_idx):
        if os.environ.get("TOY_KILL_AT") == str(self.global_step):
            os.kill(os.getpid(), signal.SIGKILL)
        loss, _ = self._loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        loss, acc = self._loss(batch)
        self.log_dict({"val/loss": loss, "val/acc": acc}, batch_size=len(batch["y"]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        loss, acc = self._loss(batch)
        self.log_dict({"test/loss": loss, "test/acc": acc}, batch_size=len(batch["y"]), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        scores = self.model(batch["x"]).softmax(-1)
        return [
            {"index": int(i), "name": f"p{i}", "b": float(s[1])} for i, s in zip(batch["index"], scores, strict=True)
        ]


class OtherTask(ToyTask):
    """Another task."""
