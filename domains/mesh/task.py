"""Mesh tasks: generation conditioned on a shape; losses, metrics, files of an evaluation."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch.nn.functional as F
import trimesh
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.backbones.decoding import Strategy
from vertebra.backbones.loading.pretrained import LoadReport
from vertebra.domains.averaging import AveragedTask
from vertebra.domains.base import DomainModel
from vertebra.domains.batching import Batch
from vertebra.domains.finetuning import TuneConfig, without_adapters
from vertebra.domains.mesh.encoder import ShapeEncoderConfig
from vertebra.domains.mesh.generation import GREEDY, generate_meshes
from vertebra.domains.mesh.geometry import to_trimesh, weld
from vertebra.domains.mesh.metrics import compare
from vertebra.domains.mesh.model import PAD, MeshGenerator
from vertebra.domains.mesh.published import is_published, read_published
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError


class MeshGenerationTask(AveragedTask):
    """Meshes of few faces for points of a surface, token after token, by any causal backbone.

    Logs ``loss``, in nats a token, and for validation and test ``nats_per_face``, which compares tokenizers, and
    ``accuracy`` of the next token. A test also writes a mesh for every shape and logs the medians of what
    ``metrics.compare`` finds between it and the truth, where its surface is not tiny, the median ratio of their
    face counts and the share of ``valid`` ones: ended, not flat to a line, no face twice. ``meshes.csv`` in the run
    folder has a row for each.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone; causal.
        optimizer: Optimizer and schedule.
        encoder: Shape encoder; without ``width``, as wide as the backbone.
        dropout: Share of the backbone's input that is zeroed in training.
        tie: Whether embedding and head share a matrix.
        label_smoothing: Share of the target that is spread over all tokens.
        freeze_encoder: Whether the shape encoder keeps its weights, as in MeshAnything.
        decoding: How a test chooses tokens.
        ema: Decay of the average of the weights that is evaluated and saved; 0 for none.
        init_from: Initial weights: a model directory, a bundled model's name, a ``.ckpt``, or a checkpoint of
            MeshAnything V2 (``.safetensors``).
        init_parts: ``backbone`` (with what comes before it) alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
        monitor: What the best checkpoint is best in.
    """

    model: MeshGenerator
    monitor_mode = "min"

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        encoder: dict[str, Any] | ShapeEncoderConfig | None = None,  # dict first: a file's lack of width stays one
        dropout: float = 0.0,
        tie: bool = False,
        label_smoothing: float = 0.0,
        freeze_encoder: bool = False,
        decoding: Strategy = GREEDY,
        ema: float = 0.0,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "all",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
        monitor: str = "val/loss",
    ) -> None:
        super().__init__(
            backbone=backbone,
            optimizer=optimizer,
            ema=ema,
            init_from=init_from,
            init_parts=init_parts,
            freeze_backbone=freeze_backbone,
            unfreeze_at=unfreeze_at,
            tune=tune,
        )
        if not 0 <= label_smoothing < 1:
            raise ConfigError(f"label_smoothing must be from 0 and below 1, got {label_smoothing}.")
        self.arguments: dict[str, Any] = {"encoder": encoder, "dropout": dropout, "tie": tie}
        self.label_smoothing, self.freeze_encoder, self.monitor = label_smoothing, freeze_encoder, monitor
        self.decoding = Strategy(**decoding) if isinstance(decoding, Mapping) else decoding
        self._meshes: list[dict[str, float]] = []

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """As in ``BaseTask``."""
        if not isinstance(spec, MeshSpec):
            raise ConfigError(f"MeshGenerationTask needs meshes, but the data is for the domain {spec.domain}.")
        model = MeshGenerator(backbone, spec, **self.arguments)
        if self.freeze_encoder:
            model.encoder.requires_grad_(False)
        return model

    def read_initial(self, source: str) -> LoadReport:
        """Load initial weights: ours, or a published checkpoint of MeshAnything V2."""
        if not is_published(source):
            return super().read_initial(source)
        with without_adapters(self.model):
            return read_published(self.model, source)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        losses, mask = token_losses(self.model, batch, self.label_smoothing)
        loss = losses.sum() / mask.sum()
        self.log("train/loss", loss, prog_bar=True, batch_size=len(mask))
        return loss

    # ------------------------------------------------------------ evaluation

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """As in ``MetricTask``."""
        return nn.ModuleDict(
            {"loss": MeanMetric(), "accuracy": MeanMetric(), "nats": SumMetric(), "faces": SumMetric()}
        )

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """As in ``MetricTask``."""
        model = self.final_model
        assert isinstance(model, MeshGenerator)
        logits, _ = model.token_logits(batch)
        mask = batch["mask"]
        losses = _losses(logits, batch["ids"], mask, 0.0)
        metrics["loss"].update(losses.sum() / mask.sum(), mask.sum())
        metrics["accuracy"].update((logits.argmax(-1) == batch["ids"])[mask].float().mean(), mask.sum())
        metrics["nats"].update(losses.sum())
        metrics["faces"].update(batch["corners"][:, :, 0, 0].isfinite().sum().float())

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """As in ``MetricTask``."""
        return {
            "loss": metrics["loss"].compute(),
            "accuracy": metrics["accuracy"].compute(),
            "nats_per_face": metrics["nats"].compute() / metrics["faces"].compute(),
        }

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        super().on_test_epoch_start()
        self._meshes = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics, and compare generated meshes with the truth."""
        super().test_step(batch, batch_idx)
        model = self.final_model
        assert isinstance(model, MeshGenerator)
        numbers = batch["index"].tolist()
        # A mesh twice as long as the longest of the batch is a miss, however it ends.
        most = min(model.spec.max_tokens, 2 * batch["ids"].shape[1])
        made = generate_meshes(model, batch["points"], self.decoding, max_tokens=most, numbers=numbers)
        for number, one, corners in zip(numbers, made, batch["corners"].cpu().numpy(), strict=True):
            kept = corners[np.isfinite(corners[:, 0, 0])].astype(np.float64)
            truth = _soup(kept)
            row: dict[str, float] = {"index": number, "tokens": one.tokens, "finished": float(one.finished)}
            output = to_trimesh(one.mesh, model.tokenizer.bins, model.spec.place)
            whole = len(one.mesh.faces) > 0
            valid = whole and one.finished and len(one.mesh.faces) == one.faces
            row |= {"valid": float(valid), "faces": len(output.faces), "true_faces": len(truth.faces)}
            if whole:
                row |= compare(output, truth)
            self._meshes.append(row)

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        super().on_test_epoch_end()
        rows = self._meshes
        if not rows:
            return
        found = {}
        for name in ("chamfer", "edge_chamfer", "normal_consistency", "vertex_ratio"):
            values = [row[name] for row in rows if np.isfinite(row.get(name, np.nan))]
            if values:
                found[name] = float(np.median(values))
        found["valid"] = float(np.mean([row["valid"] for row in rows]))
        found["face_ratio"] = float(np.median([row["faces"] / row["true_faces"] for row in rows]))
        self.log_dict({f"test/{name}": value for name, value in found.items()})

    def write_results(self, folder: Path) -> list[str]:
        """Write ``meshes.csv``, a row for every shape of the test."""
        if not self._meshes:
            return []
        names = list(dict.fromkeys(name for row in self._meshes for name in row))
        with (folder / "meshes.csv").open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows({k: f"{v:.6g}" for k, v in row.items()} for row in self._meshes)
        return ["meshes.csv"]


def token_losses(model: MeshGenerator, batch: Batch, label_smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of every token (B, L), 0 at padding, and what is not padding, bool (B, L)."""
    return _losses(model.token_logits(batch)[0], batch["ids"], batch["mask"], label_smoothing), batch["mask"]


def _losses(logits: Tensor, ids: Tensor, mask: Tensor, label_smoothing: float) -> Tensor:
    target = ids.masked_fill(~mask, PAD)
    return F.cross_entropy(
        logits.transpose(1, 2).float(), target, ignore_index=PAD, label_smoothing=label_smoothing, reduction="none"
    )


def _soup(corners: np.ndarray[Any, np.dtype[np.float64]]) -> trimesh.Trimesh:
    vertices, faces = weld(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3))
    return trimesh.Trimesh(vertices, faces, process=False)
