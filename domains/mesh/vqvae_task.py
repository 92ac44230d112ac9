"""Training of the VQ-VAE of meshes: both stages, and how well faces come back."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.domains.base import DomainModel, MetricTask
from vertebra.domains.batching import Batch
from vertebra.domains.mesh.encoder import ShapeEncoderConfig
from vertebra.domains.mesh.geometry import sample_surface
from vertebra.domains.mesh.metrics import chamfer
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.mesh.vqvae import MeshVQVAE, Reconstruction, Stage
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, DataError, LoadError
from vertebra.tokenizers.mesh import dequantize

POINTS = 10_000
"""Points drawn from a mesh for its Chamfer distance, as in ``metrics.compare``."""
FROM_STAGE_1 = ("embed.", "backbone.", "vertex_head.", "quantizer.")
"""What stage 2 keeps."""


class MeshVQVAETask(MetricTask):
    """Faces to codes of their vertices and back, as in MeshAnything V1; the codes are what its generator writes.

    Stage 1 learns encoder, codebook and decoder. Stage 2 starts from the model directory of a stage 1, keeps encoder
    and codebook, and goes on with the decoder, which now reads codes drawn with noise and sees points of the shape.

    Logs ``loss``, ``reconstruction`` in nats a coordinate, ``commitment``, ``accuracy`` of coordinates; for validation
    and test also ``exact_faces``, the share of faces that come back with all nine coordinates, and ``codes``, how many
    are in use. These are of the likeliest codes; in stage 2 ``noisy_accuracy`` and ``noisy_exact_faces`` are of drawn
    ones. A test also logs ``chamfer``, the median distance of the meshes that came back to the true surface in units
    of the box, where anything of a surface came back.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone; bidirectional.
        optimizer: Optimizer and schedule.
        codebook_size: Codes; all levels share them.
        code_dim: Width of a code.
        levels: Codes that add up to a vertex, each of what those before left.
        embed_dim: Width of a coordinate's embedding.
        shape_encoder: Shape encoder whose tokens the decoder sees in stage 2; without ``width``, as wide as the
            backbone. None for a decoder that sees no shape.
        commitment_weight: Of the commitment loss.
        decay: Of the averages that the codebook follows, per step.
        patience: Steps without use after which a code begins anew.
        stage: 1 or 2.
        noise: Scale of the Gumbel noise on the distances that codes are chosen by in training in stage 2.
        freeze_shape: Whether the shape encoder keeps its weights, as in MeshAnything.
        init_from: Initial weights: a model directory, a bundled model's name, or a ``.ckpt``; stage 2 needs one.
        init_parts: ``backbone`` (with what comes before it) alone, or ``all`` that fits.
        monitor: What the best checkpoint is best in.
    """

    model: MeshVQVAE

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        codebook_size: int = 8192,
        code_dim: int = 1024,
        levels: int = 3,
        embed_dim: int = 64,
        shape_encoder: dict[str, Any] | ShapeEncoderConfig | None = None,  # dict first: a file's lack of width stays
        commitment_weight: float = 0.1,
        decay: float = 0.99,
        patience: int = 100,
        stage: Stage = 1,
        noise: float = 0.1,
        freeze_shape: bool = False,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "all",
        monitor: str = "val/loss",
    ) -> None:
        super().__init__(
            backbone=backbone,
            optimizer=optimizer,
            init_from=init_from,
            init_parts=init_parts,
            freeze_backbone=stage == 2,
        )
        if self.backbone_config.causal:
            raise ConfigError(
                "MeshVQVAETask: reads faces both ways and needs a bidirectional backbone; write causal=false behind "
                "the name, as in NAME,causal=false."
            )
        if stage == 2 and (init_from is None or init_parts != "all"):
            raise ConfigError(
                "MeshVQVAETask: stage=2 keeps encoder and codebook of a stage 1; set init_from to its model directory, "
                "and init_parts=all."
            )
        if noise < 0:
            raise ConfigError(f"MeshVQVAETask: noise must be at least 0, got {noise}.")
        if freeze_shape and shape_encoder is None:
            raise ConfigError("MeshVQVAETask: freeze_shape=true needs a shape_encoder.")
        self.arguments: dict[str, Any] = {
            "codebook_size": codebook_size,
            "code_dim": code_dim,
            "levels": levels,
            "embed_dim": embed_dim,
            "shape_encoder": shape_encoder,
            "commitment_weight": commitment_weight,
            "decay": decay,
            "patience": patience,
            "stage": stage,
        }
        self.stage, self.noise, self.freeze_shape = stage, noise, freeze_shape
        self.monitor = monitor
        self.monitor_mode = "min" if monitor.endswith(("loss", "reconstruction", "commitment")) else "max"
        self._distances: list[float] = []

    # ------------------------------------------------------------ building

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """As in ``BaseTask``."""
        if not isinstance(spec, MeshSpec):
            raise ConfigError(f"MeshVQVAETask needs meshes, but the data is for the domain {spec.domain}.")
        model = MeshVQVAE(backbone, spec, **self.arguments)
        if self.freeze_shape and model.shape is not None:
            model.shape.requires_grad_(False)
        return model

    def load_initial(self) -> None:
        """Load initial weights; refuse a stage 2 whose encoder or codebook would be fresh."""
        super().load_initial()
        if self.stage == 2 and self.load_report is not None:
            fresh = [name for name in self.load_report.missing if name.startswith(FROM_STAGE_1)]
            if fresh:
                raise LoadError(
                    f"{self.init_from}: stage 2 keeps encoder and codebook, but {fresh[0]} is not there or of another "
                    "shape; give the model of a stage 1 with the same settings."
                )

    def set_modes(self) -> None:
        """As in ``BaseTask``; the shape encoder may keep its weights too."""
        super().set_modes()
        if self.freeze_shape and self.model.shape is not None:
            self.model.shape.eval()

    # ------------------------------------------------------------ training and evaluation

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        found = self._reconstruct(batch, self.noise if self.stage == 2 else 0.0)
        values = {
            "train/loss": found.total,
            "train/reconstruction": found.reconstruction,
            "train/commitment": found.commitment,
            "train/accuracy": _correct(found, batch)[0],
        }
        self.log_dict(values, prog_bar=True, batch_size=len(batch["cells"]))
        return found.total

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """As in ``MetricTask``."""
        names = ["loss", "reconstruction", "commitment", "accuracy", "exact_faces"]
        names += ["noisy_accuracy", "noisy_exact_faces"] if self.stage == 2 and self.noise else []
        metrics: dict[str, nn.Module] = {name: MeanMetric() for name in names}
        return nn.ModuleDict(metrics | {"codes": CodesInUse(self.model.quantizer.size)})

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """As in ``MetricTask``."""
        self._add(metrics, batch, self._reconstruct(batch, 0.0))

    def _add(self, metrics: Any, batch: Batch, found: Reconstruction) -> None:
        count = _mask(batch).sum()  # means are over faces, whatever the batches
        metrics["loss"].update(found.total, count)
        metrics["reconstruction"].update(found.reconstruction, count)
        metrics["commitment"].update(found.commitment, count)
        metrics["codes"].update(found.ids)
        pairs = {"": found}
        if "noisy_accuracy" in metrics:
            device = batch["cells"].device
            with torch.random.fork_rng([device] if device.type == "cuda" else []):  # the same draws every time
                torch.manual_seed(int(batch["index"][0]))
                pairs["noisy_"] = self._reconstruct(batch, self.noise)
        for prefix, one in pairs.items():
            right, whole = _correct(one, batch)
            metrics[f"{prefix}accuracy"].update(right, count)
            metrics[f"{prefix}exact_faces"].update(whole, count)

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """As in ``MetricTask``."""
        return {name: metric.compute() for name, metric in metrics.items()}

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        super().on_test_epoch_start()
        self._distances = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the metrics, and compare what came back with the true surfaces."""
        found = self._reconstruct(batch, 0.0)
        self._add(self.metrics_of("test"), batch, found)
        bins, place = self.model.bins, self.model.spec.place
        for number, real, cells, truth in zip(
            batch["index"].tolist(), _mask(batch).cpu(), found.faces.cpu(), batch["corners"].cpu().numpy(), strict=True
        ):
            corners = dequantize(cells[real].numpy(), bins, place)
            self._distances.append(surface_distance(corners, truth[np.isfinite(truth[:, 0, 0])], seed=number))

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        super().on_test_epoch_end()
        finite = [value for value in self._distances if np.isfinite(value)]
        if finite:
            self.log("test/chamfer", float(np.median(finite)))

    def _reconstruct(self, batch: Batch, noise: float) -> Reconstruction:
        points = batch["points"] if self.model.sees_shape else None
        found: Reconstruction = self.model(batch["cells"], _mask(batch), points, noise)
        return found


class CodesInUse(Metric):
    """Number of codes that were chosen at all.

    Args:
        size: Codes there are.
    """

    full_state_update = False
    counts: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(size, dtype=torch.int64), "sum")

    def update(self, ids: Tensor) -> None:
        """Count codes, int64 of any shape; -1 is none."""
        self.counts += torch.bincount(ids[ids >= 0], minlength=len(self.counts))

    def compute(self) -> Tensor:
        """Return the number."""
        return (self.counts > 0).sum().float()


def surface_distance(corners: np.ndarray[Any, Any], truth: np.ndarray[Any, Any], seed: int = 0) -> float:
    """Chamfer distance of points drawn from two sets of faces.

    Args:
        corners: Corners (F, 3, 3).
        truth: Corners (G, 3, 3) of the others.
        seed: Of the draws.

    Returns:
        The distance, see ``metrics.chamfer``; NaN if a set has no area.
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for soup in (corners, truth):
        try:
            points, _ = sample_surface(soup.reshape(-1, 3), np.arange(3 * len(soup)).reshape(-1, 3), POINTS, rng)
        except DataError:
            return float("nan")
        drawn.append(points)
    return chamfer(*drawn)


def _mask(batch: Batch) -> Tensor:
    return batch["cells"][:, :, 0, 0] >= 0


def _correct(found: Reconstruction, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the share of coordinates that came back, and of whole faces."""
    right = (found.faces == batch["cells"])[_mask(batch)].flatten(1)  # (real faces, 9)
    return right.float().mean(), right.all(1).float().mean()
