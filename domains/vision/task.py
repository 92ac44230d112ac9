"""Vision tasks: classification and generation of images; losses, metrics, predictions."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.backbones.loading.pretrained import LoadReport
from vertebra.backbones.timm import TimmConfig
from vertebra.domains.averaging import AveragedTask
from vertebra.domains.base import DomainModel
from vertebra.domains.batching import Batch
from vertebra.domains.finetuning import TuneConfig, without_adapters
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.domains.vision.diffusion import ImageDiffusion, Target
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.model import ImageClassifier, Pooling, Positions
from vertebra.domains.vision.published import initial_arguments, is_published, read_published
from vertebra.domains.vision.schedule import SoftMask, soft_mask_rate
from vertebra.domains.vision.spec import Kind, VisionSpec
from vertebra.errors import ConfigError, DataError, VertebraError

log = logging.getLogger("vertebra")


class _VisionTask(AveragedTask):
    """Checks that the data is for the task."""

    kind: ClassVar[Kind]
    model: Any

    def build(self, spec: DataSpec) -> None:
        """Build model, average and metrics for data of this spec."""
        if not isinstance(spec, VisionSpec) or spec.task != self.kind:
            found = spec.task if isinstance(spec, VisionSpec) else f"the domain {spec.domain}"
            raise ConfigError(
                f"{type(self).__name__} needs images for {self.kind}, but the data is for {found}; set data.task to "
                f"{self.kind}, or choose another task."
            )
        if isinstance(self.backbone_config, TimmConfig):
            size = (spec.height, spec.width)
            self.backbone_config = self.backbone_config.replace(channels=spec.channels, size=size)
        super().build(spec)


class ImageClassificationTask(_VisionTask):
    """Classes of images.

    Logs, next to ``loss``: ``accuracy`` (top-1), ``top5``, ``f1`` (mean over classes) and ``ece``, the expected
    calibration error over 15 bins; a test leaves ``confusion.csv`` and a figure of it in the run folder.

    Args:
        backbone: A config, the name of a preset or pretrained backbone, or ``timm:NAME`` for a model of timm.
        optimizer: Optimizer and schedule.
        patch_size: Height and width of a patch.
        pooling: ``cls``, ``mean`` or ``auto``; see ``ImageClassifier``. Where no patch is hidden from another,
            ``auto`` is that of ``init_from``.
        positions: ``learned`` positions are added, or ``none``.
        with_cls: See ``ImageClassifier``; None for that of ``init_from``, or False.
        pooled_norm: See ``ImageClassifier``; None for that of ``init_from``, or 0.
        dropout: Share of the pooled features that is zeroed in training.
        soft_mask: How the weight of later patches falls, for a backbone with ``soft_mask=true``: ``constant`` at 1 up
            to ``soft_mask_epochs``, ``linear`` to 0 there, or ``none``: causal from the start. Other backbones have
            no such mask; a warning says so.
        soft_mask_epochs: Epoch at which it is 0.
        mixup: Parameter of timm's Mixup; 0 for none.
        cutmix: Parameter of CutMix; 0 for none. With both, half of the batches get either.
        label_smoothing: Share of the target that is spread over all classes.
        class_weights: Weight of each class in the training loss; ``balanced`` for the inverse of its share of the
            training data.
        ema: Decay of the average of the weights that is evaluated and saved; 0 for none.
        num_classes: Checked against the data where given.
        monitor: Validation metric that chooses the best checkpoint.
        init_from: Initial weights: a model directory, a bundled model's name, a ``.ckpt``, or a published checkpoint
            of iLLaMA or a vision transformer. Learned positions are interpolated for another image size.
        init_parts: ``backbone`` (with patch embedding and positions) alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
        seed: Seed of mixup.
    """

    kind: ClassVar[Kind] = "classification"
    reads_images: ClassVar[bool] = True
    model: ImageClassifier

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        patch_size: int = 16,
        pooling: Pooling | Literal["auto"] = "auto",
        positions: Positions = "learned",
        with_cls: bool | None = None,
        pooled_norm: float | None = None,
        dropout: float = 0.0,
        soft_mask: SoftMask = "none",
        soft_mask_epochs: int = 0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Literal["balanced"] | None = None,
        ema: float = 0.0,
        num_classes: int | None = None,
        monitor: str = "val/accuracy",
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "backbone",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
        seed: int = 0,
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
        if soft_mask not in ("none", "constant", "linear") or (soft_mask == "none") != (soft_mask_epochs == 0):
            raise ConfigError(
                "ImageClassificationTask: soft_mask must be none, or constant or linear with soft_mask_epochs above 0, "
                f"got {soft_mask!r} and {soft_mask_epochs}."
            )
        if soft_mask != "none" and not getattr(self.backbone_config, "soft_mask", False):
            log.warning("soft_mask=%s has no effect: %s is not built with soft_mask=true.", soft_mask, backbone)
            soft_mask, soft_mask_epochs = "none", 0
        self.arguments: dict[str, Any] = {
            "patch_size": patch_size,
            "pooling": pooling,
            "positions": positions,
            "with_cls": with_cls,
            "pooled_norm": pooled_norm,
            "dropout": dropout,
        }
        self.soft_mask, self.soft_mask_epochs = soft_mask, soft_mask_epochs
        self.mixup, self.cutmix, self.label_smoothing = mixup, cutmix, label_smoothing
        self.class_weights, self.num_classes, self.mix_seed = class_weights, num_classes, seed
        self.monitor = monitor
        self.monitor_mode = "min" if monitor.endswith(("loss", "ece")) else "max"
        self.register_buffer("weights", None, persistent=False)
        self._may_ask = True

    # ------------------------------------------------------------ building

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """Make the classifier; refuse a number of classes or weights that differ from the data's."""
        assert isinstance(spec, VisionSpec)
        names = ", ".join(spec.classes[:8]) + (", ..." if len(spec.classes) > 8 else "")
        if self.num_classes not in (None, len(spec.classes)):
            raise ConfigError(
                f"num_classes={self.num_classes} given, but the data has {len(spec.classes)} ({names}); remove the "
                "argument or fix the data."
            )
        weights = self.class_weights
        if isinstance(weights, str) and weights != "balanced":
            raise ConfigError(f"class_weights must be 'balanced' or one number a class, got {weights!r}.")
        if weights is not None and not isinstance(weights, str):
            if len(weights) != len(spec.classes):
                raise ConfigError(
                    f"class_weights has {len(weights)} numbers, but the data has {len(spec.classes)} classes "
                    f"({names}); give one weight a class."
                )
            self.weights = torch.tensor(weights)
        self._take_arguments()
        return ImageClassifier(backbone, spec, **self.arguments)

    def _take_arguments(self) -> None:
        """Let what the user left open be that of the initial weights; a checkpoint keeps it, and does not ask again."""
        open_ones = [name for name, value in self.arguments.items() if value is None or value == "auto"]
        found: dict[str, Any] = {}
        if open_ones and self.init_from is not None and self._may_ask:
            with suppress(VertebraError):  # `load_initial` tells, unless a checkpoint follows
                found = initial_arguments(self.init_from, self.backbone_config)
        if self.backbone_config.causal or getattr(self.backbone_config, "soft_mask", False):
            found.pop("pooling", None)
        defaults = {"pooling": "auto", "with_cls": False, "pooled_norm": 0.0}
        for name in open_ones:
            self.arguments[name] = self.hparams[name] = found.get(name, defaults[name])

    def make_metrics(self, spec: DataSpec) -> nn.ModuleDict:
        """Loss, accuracies, F1, calibration error, and the confusion matrix."""
        assert isinstance(spec, VisionSpec)
        count = len(spec.classes)
        return nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "accuracy": MulticlassAccuracy(count, average="micro"),
                "top5": MulticlassAccuracy(count, average="micro", top_k=min(5, count)),
                "f1": MulticlassF1Score(count, average="macro"),
                "ece": MulticlassCalibrationError(count, n_bins=15),
                "confusion": MulticlassConfusionMatrix(count),
            }
        )

    def read_initial(self, source: str) -> LoadReport:
        """Load initial weights: ours, or a published checkpoint; refuse arguments that contradict them."""
        own = {"pooled_norm": self.model.arguments["pooled_norm"]}
        if not self.model.whole and self.model.pooling != "cls":
            own["with_cls"] = self.model.cls_token is not None
        theirs = initial_arguments(source, self.backbone_config)
        for name, value in own.items():
            if theirs.get(name, value) != value:
                raise ConfigError(
                    f"{type(self).__name__}: {name}={value} given, but {source} has {name}={theirs[name]}; leave the "
                    "argument out, which takes it from there, or leave init_from out."
                )
        if not is_published(source):
            return super().read_initial(source)
        with without_adapters(self.model):
            return read_published(self.model, source)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the soft mask's rate to what is kept."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["soft_mask_rate"] = self.model.arguments["soft_mask_rate"]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the soft mask's rate along; a file that a checkpoint names is not read."""
        self._may_ask = False
        super().on_load_checkpoint(checkpoint)
        if getattr(self.backbone_config, "soft_mask", False):
            self._set_soft_mask(checkpoint.get("soft_mask_rate", 0.0))

    def _set_soft_mask(self, rate: float) -> None:
        self.model.set_soft_mask(rate)
        if self.ema_decay:
            self.ema.module.set_soft_mask(rate)

    # ------------------------------------------------------------ training

    def on_fit_start(self) -> None:
        """Take the shares of the classes from the data, and plan the soft mask."""
        super().on_fit_start()
        data = getattr(self.trainer, "datamodule", None)
        if self.class_weights == "balanced":
            counts = getattr(data, "class_counts", None)
            if not counts:
                raise DataError("class_weights=balanced needs training data that counts its classes, got none.")
            count = torch.tensor([float(counts[name]) for name in self.model.spec.classes])
            self.weights = (count.sum() / (len(count) * count.clamp(min=1))).to(self.device)
        if self.soft_mask != "none":
            steps, epochs = float(self.trainer.estimated_stepping_batches), self.trainer.max_epochs or 0
            if epochs < 1 or not np.isfinite(steps):
                raise ConfigError("soft_mask counts epochs; set trainer.max_epochs.")
            self._soft_mask_steps = round(self.soft_mask_epochs * steps / epochs)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the soft mask of this optimizer step."""
        super().on_train_batch_start(batch, batch_idx)
        if self.soft_mask != "none":
            self._set_soft_mask(soft_mask_rate(self.global_step, self.soft_mask, self._soft_mask_steps))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        images, labels = batch["images"], batch["labels"]
        if self.mixup or self.cutmix:
            images, targets = self._mixed(images, labels, batch)
            loss = F.cross_entropy(self.model(images), targets, weight=self.weights)
        else:
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels, weight=self.weights, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images))
        return loss

    def _mixed(self, images: Tensor, labels: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mix a batch with timm; of an odd number of images the last one stays as it is."""
        from timm.data.mixup import Mixup, mixup_target

        classes = len(self.model.spec.classes)
        mix = Mixup(self.mixup, self.cutmix, label_smoothing=self.label_smoothing, num_classes=classes)
        even = len(images) - len(images) % 2
        if not even:
            return images, mixup_target(labels, classes, 1.0, self.label_smoothing)
        with _numpy_seed(self.mix_seed, batch["epoch"], int(batch["index"][0])):
            mixed, targets = mix(images[:even].clone(), labels[:even])
        rest = mixup_target(labels[even:], classes, 1.0, self.label_smoothing) if even < len(images) else targets[:0]
        return torch.cat([mixed, images[even:]]), torch.cat([targets, rest])

    # ------------------------------------------------------------ evaluation

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""
        logits, labels = self.final_model(batch["images"]).float(), batch["labels"]
        metrics["loss"].update(F.cross_entropy(logits, labels), len(labels))
        scores = logits.softmax(-1)
        for name in ("accuracy", "top5", "f1", "ece", "confusion"):
            metrics[name].update(scores, labels)

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """All metrics by name but the confusion matrix, which ``write_results`` writes."""
        return {name: metric.compute() for name, metric in metrics.items() if name != "confusion"}

    def write_results(self, folder: Path) -> list[str]:
        """Write the confusion matrix of the test as ``confusion.csv``; rows are true classes."""
        counts, classes = self.metrics_of("test")["confusion"].confmat, self.model.spec.classes
        if not int(counts.sum()):
            return []
        with (folder / "confusion.csv").open("w", newline="", encoding="utf-8") as f:
            writer = csv.writer(f, lineterminator="\n")
            writer.writerow(["true", *classes])
            writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))
        return ["confusion.csv"]

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows with name, the most likely class, and all scores."""
        classes, scores = self.model.spec.classes, self.final_model(batch["images"]).float().softmax(-1).cpu()
        return [
            {
                "index": int(index),
                "name": name,
                "prediction": classes[int(row.argmax())],
                **{f"score_{c}": v for c, v in zip(classes, row.tolist(), strict=True)},
            }
            for index, name, row in zip(batch["index"], batch["names"], scores, strict=True)
        ]


class ImageGenerationTask(_VisionTask):
    """Generation of images: pixel by pixel, or by taking noise away.

    Logs ``loss``: for ``autoregressive`` bits a sub-pixel over all channels, for ``diffusion`` the mean squared error
    of the predicted noise at fixed draws.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone; causal for ``autoregressive``.
        optimizer: Optimizer and schedule.
        method: ``autoregressive`` or ``diffusion``; ``auto`` follows the backbone: causal ones draw pixels.
        levels: Values of a sub-pixel that an autoregressive model tells apart, at most 256.
        patch_size: Height and width of a patch of a diffusion model.
        target: What a diffusion model's output is, ``noise`` or ``velocity``; ``auto`` as in ``ImageDiffusion``.
        self_cond: Share of training images whose denoiser begins with the latents of a first pass, for a FIT with
            ``context``.
        ema: Decay of the average of the weights that is evaluated and saved; 0 for none.
        init_from: Initial weights: a model directory, a bundled model's name, or a ``.ckpt``.
        init_parts: ``backbone`` alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
        seed: Seed of the draws of an evaluation.
    """

    kind: ClassVar[Kind] = "generation"
    monitor = "val/loss"
    monitor_mode = "min"

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        method: Literal["auto", "autoregressive", "diffusion"] = "auto",
        levels: int = 256,
        patch_size: int = 4,
        target: Target | Literal["auto"] = "auto",
        self_cond: float = 0.0,
        ema: float = 0.0,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "all",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
        seed: int = 0,
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
        causal = self.backbone_config.causal
        if method == "auto":
            method = "autoregressive" if causal else "diffusion"
        if method not in ("autoregressive", "diffusion"):
            raise ConfigError(f"ImageGenerationTask: method must be auto, autoregressive or diffusion, got {method!r}.")
        if causal != (method == "autoregressive"):
            raise ConfigError(
                f"method={method} needs a backbone with causal={str(not causal).lower()}; write it behind the name, as "
                f"in NAME,causal={str(not causal).lower()}."
            )
        self.method, self.levels, self.draw_seed = method, levels, seed
        self.arguments: dict[str, Any] = {"patch_size": patch_size, "target": target, "self_cond": self_cond}

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """Make the generator."""
        assert isinstance(spec, VisionSpec)
        if self.method == "autoregressive":
            return ImageGenerator(backbone, spec, levels=self.levels)
        return ImageDiffusion(backbone, spec, **self.arguments)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self.model.loss(batch["images"], batch.get("labels"))
        assert isinstance(loss, Tensor)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["images"]))
        return loss

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """Mean of the loss over images."""
        return MeanMetric()

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """The loss."""
        return {"loss": metrics.compute()}

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""
        images, labels, model = batch["images"], batch.get("labels"), self.final_model
        if isinstance(model, ImageGenerator):
            loss = model.bits_per_dim(images, labels).mean()
        else:
            assert isinstance(model, ImageDiffusion)
            draws = torch.Generator(self.device).manual_seed(self.draw_seed + int(batch["index"][0]))
            loss = model.loss(images, labels, generator=draws)
        metrics.update(loss, len(images))


@contextmanager
def _numpy_seed(*numbers: int) -> Iterator[None]:
    """Make numpy's global draws, which timm's Mixup takes, depend on these numbers alone."""
    before = np.random.get_state()
    np.random.seed(np.random.SeedSequence(numbers).generate_state(1)[0])
    try:
        yield
    finally:
        np.random.set_state(before)
