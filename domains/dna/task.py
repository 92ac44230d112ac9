"""DNA tasks: language modelling and classification; losses, metrics, predictions."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    BinaryAccuracy,
    BinaryAUROC,
    BinaryAveragePrecision,
    BinaryF1Score,
    BinaryMatthewsCorrCoef,
    MulticlassAccuracy,
    MulticlassAUROC,
    MulticlassAveragePrecision,
    MulticlassF1Score,
    MulticlassMatthewsCorrCoef,
    MultilabelAccuracy,
    MultilabelAUROC,
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelMatthewsCorrCoef,
)
from torchmetrics.regression import MeanSquaredError, PearsonCorrCoef, R2Score, SpearmanCorrCoef

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.backbones.random import item_uniform
from vertebra.domains.base import BaseTask, DomainModel, MetricTask
from vertebra.domains.batching import Batch
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel, Head, Pooling, Positions
from vertebra.domains.dna.objectives import Objective, choose_objective, mask_tokens, token_loss
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.finetuning import TuneConfig
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.domains.targets import next_targets
from vertebra.errors import ConfigError


class DNALanguageTask(MetricTask):
    """Language modelling of DNA: the next token, or masked tokens.

    Logs ``loss`` (nats a token), ``perplexity`` and ``bits_per_base``. Only A, C, G, T count as targets, and the end of
    a sequence where the data marks it.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone.
        optimizer: AdamW and its schedule.
        objective: ``causal`` or ``masked``; ``auto`` follows the backbone.
        tie: Whether the head shares the embedding's matrix.
        mask_share: Share of tokens that a masked model is asked for.
        init_from: Initial weights: a model directory, a bundled model's name, or a ``.ckpt``.
        init_parts: ``backbone`` alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
        recompute: Compute layers again in the backward pass instead of keeping what they made: long contexts in little
            memory, for about a third more time.
        seed: Seed of the masks.
    """

    model: DNALanguageModel

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        objective: Objective = "auto",
        tie: bool = False,
        mask_share: float = 0.15,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "all",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
        recompute: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone=backbone,
            optimizer=optimizer,
            init_from=init_from,
            init_parts=init_parts,
            freeze_backbone=freeze_backbone,
            unfreeze_at=unfreeze_at,
            tune=tune,
        )
        if not 0 < mask_share < 1:
            raise ConfigError(f"DNALanguageTask: mask_share must be between 0 and 1, got {mask_share}.")
        self.objective = choose_objective(objective, self.backbone_config.causal)
        self.tie, self.mask_share, self.mask_seed, self.recompute = tie, mask_share, seed, recompute

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """Make the language model."""
        spec = dna_spec(self, spec, ("lm",))
        if self.recompute:
            backbone.set_recompute(True)
        return DNALanguageModel(backbone, spec, tie=self.tie)

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """Mean of the loss over all targets."""
        return MeanMetric()

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """Loss in nats a token, perplexity, bits a base."""
        loss = metrics.compute()
        bases = getattr(self.model.tokenizer, "stride", 1)
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_base": loss / (math.log(2) * bases)}

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean loss (nats a target) of a batch, and its number of targets."""
        if self.objective == "causal":
            return token_loss(*self.model.token_logits(batch))
        ids, segments = batch["ids"].long(), batch.get("segments")
        tokenizer = self.model.tokenizer
        bases = torch.as_tensor(tokenizer.base_ids, device=ids.device)
        asked = torch.as_tensor([*tokenizer.base_ids, *[tokenizer.sep_id] * self.model.spec.eos], device=ids.device)
        counted = batch["counted"] & torch.isin(ids, asked)
        at = batch["index"].cpu().numpy()[:, None] * 2**24 + np.arange(ids.shape[1])
        draw = torch.from_numpy(item_uniform(self.mask_seed, batch["epoch"], at)).to(ids.device, torch.float32)
        ids, targets = mask_tokens(ids, counted, draw, mask_id=tokenizer.mask_id, base_ids=bases, share=self.mask_share)
        return token_loss(self.model(ids, batch["mask"], segments), targets)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss, _ = self.loss(batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["ids"]))
        return loss

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""
        metrics.update(*self.loss(batch))

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows with the log-likelihood (nats) and bits per base of every sequence, given the tokens before."""
        if self.objective != "causal":
            raise ConfigError("DNALanguageTask: predict gives likelihoods and needs a causal backbone, got another.")
        ids = batch["ids"].long()
        counted = torch.isin(ids, torch.as_tensor(self.model.tokenizer.base_ids, device=ids.device))
        targets = next_targets(ids, counted & batch["mask"])
        logits = self.model(ids, batch["mask"]).float()
        nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=-100, reduction="none").sum(1)
        bits = nats / (targets >= 0).sum(1).clamp(min=1) / math.log(2)
        rows = zip(batch["index"].tolist(), batch["names"], (-nats).tolist(), bits.tolist(), strict=True)
        return [{"index": i, "name": n, "log_likelihood": ll, "bits_per_base": b} for i, n, ll, b in rows]


class DNAClassificationTask(MetricTask):
    """Classes, labels or numbers of DNA sequences.

    Logs, next to ``loss``: for two classes and more ``mcc``, ``f1`` (macro for more than two), ``auroc``, ``auprc`` and
    ``accuracy``, for labels the same as means over labels, for numbers ``mse``, ``pearson``, ``spearman`` and ``r2``.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone.
        optimizer: AdamW and its schedule.
        pooling: ``mean``, ``last``, ``echo`` or ``rc_echo``; ``auto`` is echo for causal backbones, else mean.
        head: ``linear``, ``mlp`` or ``cnn``.
        positions: ``learned`` for sequences that are aligned, ``none`` otherwise.
        dropout: Share of embedding and pooled features that is zeroed in training.
        rc_average: Whether to average the logits of both strands in evaluation.
        ngrams: Orders of overlapping n-grams embedded beside single bases, such as 3, 6 and 8; see ``DNAClassifier``.
        ngram_dropout: Share of n-grams that is left out in training.
        ngram_skip: Share of sequences for which a table above order 3 is left out whole in training.
        aligned: Channels a position that the head reads position by position, for aligned sequences; 0 for none.
        aligned_pool: Neighbouring positions that are averaged for it.
        num_classes: Checked against the data where given.
        monitor: Validation metric that chooses the best checkpoint: the smallest loss or mse, the largest of any other.
        class_weights: Weight of each class in the loss; ``balanced`` is for the data to compute.
        label_smoothing: Share of the target that is spread over all classes.
        init_from: Initial weights: a model directory, a bundled model's name, or a ``.ckpt``.
        init_parts: ``backbone`` (and embedding) alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
    """

    model: DNAClassifier
    weights: Tensor | None

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        pooling: Pooling | Literal["auto"] = "auto",
        head: Head = "linear",
        positions: Positions = "none",
        dropout: float = 0.1,
        rc_average: bool = False,
        ngrams: Sequence[int] = (),
        ngram_dropout: float = 0.3,
        ngram_skip: float = 0.5,
        aligned: int = 0,
        aligned_pool: int = 3,
        num_classes: int | None = None,
        monitor: str = "val/loss",
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "backbone",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
    ) -> None:
        super().__init__(
            backbone=backbone,
            optimizer=optimizer,
            init_from=init_from,
            init_parts=init_parts,
            freeze_backbone=freeze_backbone,
            unfreeze_at=unfreeze_at,
            tune=tune,
        )
        if pooling == "auto":
            pooling = "echo" if self.backbone_config.causal else "mean"
        self.arguments: dict[str, Any] = {
            "pooling": pooling,
            "head": head,
            "positions": positions,
            "dropout": dropout,
            "rc_average": rc_average,
            "ngrams": list(ngrams),
            "ngram_dropout": ngram_dropout,
            "ngram_skip": ngram_skip,
            "aligned": aligned,
            "aligned_pool": aligned_pool,
        }
        self.monitor = monitor
        self.monitor_mode = "min" if monitor.endswith(("loss", "mse")) else "max"
        self.num_classes, self.class_weights, self.label_smoothing = num_classes, class_weights, label_smoothing

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """Make the classifier; refuse a number of classes or weights that differ from the data's."""
        spec = dna_spec(self, spec, ("classification", "multilabel", "regression"))
        names = ", ".join(spec.classes or spec.targets)
        if self.num_classes not in (None, spec.num_outputs):
            raise ConfigError(
                f"num_classes={self.num_classes} given, but the data has {spec.num_outputs} ({names}); remove the "
                "argument or fix the data."
            )
        if self.class_weights is not None and len(self.class_weights) != len(spec.classes):
            raise ConfigError(
                f"class_weights has {len(self.class_weights)} numbers, but the data has {len(spec.classes)} classes "
                f"({names or 'none'}); give one weight a class."
            )
        self.register_buffer(
            "weights", None if self.class_weights is None else torch.tensor(self.class_weights), persistent=False
        )
        return DNAClassifier(backbone, spec, **self.arguments)

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """Loss, and the metrics of the task."""
        assert isinstance(spec, DNASpec)
        return nn.ModuleDict({"loss": MeanMetric(), "scores": score_metrics(spec)})

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """All metrics by name; undefined ones are NaN."""
        return {
            "loss": metrics["loss"].compute(),
            **{k: v.float().mean() for k, v in metrics["scores"].compute().items()},
        }

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean loss of logits (B, C): cross entropy, binary cross entropy, or squared error of standardised numbers."""
        spec = self.model.spec
        if spec.task == "classification":
            return F.cross_entropy(logits, labels, weight=self.weights, label_smoothing=self.label_smoothing)
        if spec.task == "multilabel":
            smooth = labels * (1 - self.label_smoothing) + 0.5 * self.label_smoothing
            return F.binary_cross_entropy_with_logits(logits, smooth, weight=self.weights)
        mean, std = logits.new_tensor(spec.target_mean), logits.new_tensor(spec.target_std)
        return F.mse_loss(logits, (labels - mean) / std)

    def scores(self, logits: Tensor) -> Tensor:
        """Map logits (B, C) to probabilities, or to numbers in the data's unit."""
        spec = self.model.spec
        if spec.task == "classification":
            return logits.float().softmax(-1)
        if spec.task == "multilabel":
            return logits.float().sigmoid()
        return logits.float() * logits.new_tensor(spec.target_std) + logits.new_tensor(spec.target_mean)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        loss = self.loss(self.model(batch["ids"], batch["mask"]), batch["labels"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["ids"]))
        return loss

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""
        logits, labels, spec = self.model(batch["ids"], batch["mask"]), batch["labels"], self.model.spec
        scores = self.scores(logits)
        metrics["loss"].update(self.loss(logits, labels), len(labels))
        if spec.task == "classification" and len(spec.classes) == 2:
            scores = scores[:, 1]
        elif spec.task == "regression" and len(spec.targets) == 1:
            scores, labels = scores[:, 0], labels[:, 0]
        metrics["scores"].update(scores, labels.int() if spec.task == "multilabel" else labels)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows with name, the most likely class (or the labels above one half), and all scores."""
        spec, scores = self.model.spec, self.scores(self.model(batch["ids"], batch["mask"])).cpu()
        return [
            {"index": int(index), "name": name, **prediction_row(spec, row)}
            for index, name, row in zip(batch["index"], batch["names"], scores, strict=True)
        ]


def prediction_row(spec: DNASpec, scores: Tensor) -> dict[str, Any]:
    """Columns that describe the scores (C,) of one sequence."""
    values = scores.tolist()
    if spec.task == "regression":
        return dict(zip(spec.targets, values, strict=True))
    named = {f"score_{name}": value for name, value in zip(spec.classes, values, strict=True)}
    if spec.task == "multilabel":
        return {"labels": ";".join(n for n, v in zip(spec.classes, values, strict=True) if v >= 0.5), **named}
    return {"prediction": spec.classes[int(scores.argmax())], **named}


def dna_spec(task: BaseTask, spec: DataSpec, kinds: tuple[str, ...]) -> DNASpec:
    """Check that the data is DNA of one of the kinds.

    Raises:
        ConfigError: It is not; the text names task and data.
    """
    if not isinstance(spec, DNASpec) or spec.task not in kinds:
        found = spec.task if isinstance(spec, DNASpec) else f"the domain {spec.domain}"
        raise ConfigError(
            f"{type(task).__name__} needs data for {' or '.join(kinds)}, but the data is for {found}; choose another "
            "task, or other data (DNALanguageData for lm, DNASequenceData for the others)."
        )
    return spec


class _MeanMatthewsCorrCoef(MultilabelMatthewsCorrCoef):
    """Mean over labels, 0 for a label without a value; torchmetrics has one value of all labels' cells together."""

    confmat: Tensor

    def compute(self) -> Tensor:
        tn, fp, fn, tp = self.confmat.double().flatten(1).unbind(1)  # (C,)
        below = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)).sqrt()
        return ((tp * tn - fp * fn) / below.clamp(min=1)).mean().float()


def score_metrics(spec: DNASpec) -> MetricCollection:
    """Make the metrics of a task; scores are probabilities (B, C), of the second class (B,) where there are two."""
    count = spec.num_outputs
    metrics: Mapping[str, Metric]
    if spec.task == "regression":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Spearman's ranks need all values in memory
            spearman = SpearmanCorrCoef(num_outputs=count)
        metrics = {
            "mse": MeanSquaredError(),
            "pearson": PearsonCorrCoef(num_outputs=count),
            "spearman": spearman,
            "r2": R2Score(),
        }
    elif spec.task == "multilabel":
        metrics = {
            "mcc": _MeanMatthewsCorrCoef(count),
            "f1": MultilabelF1Score(count),
            "auroc": MultilabelAUROC(count),
            "auprc": MultilabelAveragePrecision(count),
            "accuracy": MultilabelAccuracy(count),
        }
    elif count == 2:
        metrics = {
            "mcc": BinaryMatthewsCorrCoef(),
            "f1": BinaryF1Score(),
            "auroc": BinaryAUROC(),
            "auprc": BinaryAveragePrecision(),
            "accuracy": BinaryAccuracy(),
        }
    else:
        metrics = {
            "mcc": MulticlassMatthewsCorrCoef(count),
            "f1": MulticlassF1Score(count, average="macro"),
            "auroc": MulticlassAUROC(count),
            "auprc": MulticlassAveragePrecision(count),
            "accuracy": MulticlassAccuracy(count, average="micro"),
        }
    return MetricCollection(dict(metrics), compute_groups=False)
