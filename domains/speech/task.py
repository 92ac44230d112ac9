"""The speech task: recognition, translation and language identification by CTC; loss, metrics, predictions."""

from __future__ import annotations

import csv
import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, SumMetric
from torchmetrics.text import CharErrorRate, SacreBLEUScore, WordErrorRate

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.domains.base import DomainModel, MetricTask
from vertebra.domains.batching import Batch, BatchLoader
from vertebra.domains.buckets import BucketSampler, memory_try_step
from vertebra.domains.finetuning import TuneConfig
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.domains.speech.alignment import frames_needed
from vertebra.domains.speech.augment import SpecAugment
from vertebra.domains.speech.data import SpeechData, padding_line
from vertebra.domains.speech.decoding import greedy
from vertebra.domains.speech.items import SpeechItems
from vertebra.domains.speech.loss import recognition_loss
from vertebra.domains.speech.model import Emissions, PromptConfig, SpeechCTC
from vertebra.domains.speech.spec import SpeechSpec
from vertebra.errors import ConfigError
from vertebra.tokenizers.text import TextTokenizer, make_tokenizer

log = logging.getLogger("vertebra")


class SpeechRecognitionTask(MetricTask):
    """Text of recordings by CTC, with any backbone.

    Logs ``loss``; ``wer`` and ``cer``, errors of words and characters of recognition; ``exact``, the share of
    recordings without any; ``blank``, the share of positions that say nothing; with a prefix ``language_accuracy``,
    and with translations ``bleu``.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone; with ``causal=true`` the model can stream.
        optimizer: Optimizer and schedule.
        subsampling: Frames of 10 ms to one position: 1, 2, 4, 6 or 8.
        channels: Channels of the subsampling convolutions; 0 for as many as the backbone is wide.
        grid: Whether the backbone reads time x frequency.
        feature_norm: ``global``; ``utterance`` takes the mean of each recording away, ``level`` its loudness.
        intermediate: Layers, counted from 1, that have a loss of their own and feed back what they say.
        transcript_layers: Those that are trained on the transcript whatever the task.
        intermediate_weight: Share of their losses.
        prompt: Encoder of a text prompt.
        padding: ``espnet`` treats the ends of recordings as ESPnet does.
        dropout: Share of the backbone's input that is zeroed in training.
        spec_augment: Masks over time and channels in training; None for none.
        init_from: Initial weights: a model directory, a bundled model's name, or a ``.ckpt``.
        init_parts: ``backbone`` alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
        monitor: What the best checkpoint is best in.
        seed: Seed of the masks.
    """

    model: SpeechCTC
    monitor_mode: ClassVar[str]

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        subsampling: int = 4,
        channels: int = 0,
        grid: bool | Literal["auto"] = "auto",
        feature_norm: Literal["global", "utterance", "level"] = "global",
        intermediate: list[int] | None = None,
        transcript_layers: list[int] | None = None,
        intermediate_weight: float = 0.5,
        prompt: PromptConfig | None = None,
        padding: Literal["masked", "espnet"] = "masked",
        dropout: float = 0.0,
        spec_augment: SpecAugment | None = None,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "all",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
        monitor: str = "val/wer",
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
        if not 0 <= intermediate_weight < 1:
            raise ConfigError(f"intermediate_weight must be from 0 and below 1, got {intermediate_weight}.")
        self.arguments: dict[str, Any] = {
            "subsampling": subsampling,
            "channels": channels,
            "grid": grid,
            "feature_norm": feature_norm,
            "intermediate": tuple(intermediate or ()),
            "transcript_layers": tuple(transcript_layers or ()),
            "prompt": PromptConfig(**prompt) if isinstance(prompt, Mapping) else prompt,
            "padding": padding,
            "dropout": dropout,
        }
        self.spec_augment = SpecAugment(**spec_augment) if isinstance(spec_augment, Mapping) else spec_augment
        self.intermediate_weight, self.mask_seed = intermediate_weight, seed
        self.monitor = monitor
        self.monitor_mode = "max" if monitor.endswith(("exact", "accuracy", "bleu")) else "min"  # type: ignore[misc]
        self._said: list[dict[str, Any]] = []
        self._tokenizer: TextTokenizer | None = None

    # ------------------------------------------------------------ building

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """Make the recogniser."""
        if not isinstance(spec, SpeechSpec):
            raise ConfigError(
                f"SpeechRecognitionTask needs recordings, but the data is for the domain {spec.domain}; choose another "
                "task or other data."
            )
        if self.spec_augment is not None:
            self.spec_augment = dataclasses.replace(self.spec_augment, warp_top_hz=spec.sample_rate / 2)
        return SpeechCTC(backbone, spec, **self.arguments)

    def configure_model(self) -> None:
        """Build the model; leave out training recordings that are too short for their text, which are reported."""
        super().configure_model()
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SpeechData):
            data.keep_feasible(self._fits)

    def _fits(self, samples: Any, ids: list[list[int]]) -> Any:
        counts = self.model.position_count(torch.from_numpy(samples)).numpy()
        return counts >= np.array([frames_needed(row) for row in ids])

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the model's spec."""
        if self._tokenizer is None:
            spec = self.model.spec
            self._tokenizer = make_tokenizer(spec.vocabulary, spec.tokens, spec.pieces)
        return self._tokenizer

    # ------------------------------------------------------------ training

    def configure_optimizers(self) -> Any:
        """The optimizer; before it, and before the loader is made, search batches where the data asks for it."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SpeechData) and data.batch_memory is not None:
            self._find_batches(data, data.batch_memory)
        return super().configure_optimizers()

    def _find_batches(self, data: SpeechData, memory: float) -> None:
        items = data.items("train")
        assert isinstance(items, SpeechItems)

        def loss(count: int, length: float, target: float) -> Tensor:
            batch = self._random_batch(count, int(length), int(target), items.prompt_length)
            with self.trainer.precision_plugin.train_step_context():
                return self._loss(self._encode(batch, augment=True), batch)

        def agree(sizes: list[int]) -> list[int]:
            found = torch.tensor(sizes, device=self.device)
            if self.trainer.world_size > 1:
                torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MIN)
            return [int(n) for n in found.tolist()]

        mode = self.model.training
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            data.find_batches(memory_try_step(self.model.train(), loss, int(memory * 2**30)), agree)
        self.model.train(mode)

    def _random_batch(self, count: int, samples: int, tokens: int, prompt: int) -> Batch:
        """Make up a batch with everything that one of these sizes can have."""
        spec, device = self.model.spec, self.device

        def ids(length: int) -> Tensor:
            return torch.randint(1, len(spec.tokens), (count, length), device=device)

        def full(length: int) -> Tensor:
            return torch.full((count,), length, device=device)

        before = self.model.prefix_length
        batch = {
            "waves": 0.1 * torch.randn(count, samples, device=device),
            "lengths": full(samples),
            "targets": ids(before + tokens),
            "target_lengths": full(before + tokens),
            "index": torch.arange(count),
            "epoch": 0,
        }
        if spec.languages:
            batch["prefix"] = ids(before)
        if self.model.prompt_encoder is not None:
            batch |= {"prompt": ids(prompt), "prompt_lengths": full(prompt)}
        return batch

    def on_train_start(self) -> None:
        """Say how much of the batches is padding."""
        super().on_train_start()
        loader = self.trainer.train_dataloader
        if isinstance(loader, BatchLoader) and isinstance(loader.batch_sampler, BucketSampler):
            log.info("%s", padding_line(loader.batch_sampler))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        found = self._encode(batch, augment=True)
        loss = self._loss(found, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["waves"]))
        return loss

    def _encode(self, batch: Batch, *, augment: bool = False) -> Emissions:
        features, counts = self.model.features(batch["waves"], batch["lengths"])
        if augment and self.spec_augment is not None:
            items = batch["index"].cpu().numpy()
            features = self.spec_augment(features, counts, self.mask_seed, batch["epoch"], items)
        return self.model.encode(
            features, counts, batch.get("prefix"), batch.get("prompt"), batch.get("prompt_lengths")
        )

    def _loss(self, found: Emissions, batch: Batch) -> Tensor:
        return recognition_loss(
            found,
            batch["targets"],
            batch["target_lengths"],
            weight=self.intermediate_weight,
            transcripts=batch.get("transcripts"),
            transcript_lengths=batch.get("transcript_lengths"),
            transcript_layers=self.model.transcript_layers,
        )

    # ------------------------------------------------------------ evaluation

    def make_metrics(self, spec: DataSpec) -> nn.ModuleDict:
        """Loss, word and character errors, and what else the tasks ask for."""
        assert isinstance(spec, SpeechSpec)
        metrics: dict[str, nn.Module] = {
            "loss": MeanMetric(),
            "wer": WordErrorRate(),
            "cer": CharErrorRate(),
            "exact": MeanMetric(),
            "blank": MeanMetric(),
            "recognised": SumMetric(),
            "translated": SumMetric(),
        }
        if spec.languages:
            metrics["language_accuracy"] = MeanMetric()
        if any(task != "asr" for task in spec.tasks):
            metrics["bleu"] = SacreBLEUScore()
        return nn.ModuleDict(metrics)

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """All metrics that saw a recording, by name: in this process or in another."""
        needs = {"wer": "recognised", "cer": "recognised", "bleu": "translated"}
        seen = {name: bool(metrics[name].compute()) for name in ("recognised", "translated")}  # one order for all ranks
        wanted = [name for name in metrics if name not in seen and seen.get(needs.get(name, ""), True)]
        return {name: metrics[name].compute() for name in wanted}

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        super().on_test_epoch_start()
        self._said = []

    def on_test_epoch_end(self) -> None:
        """Log the metrics, and gather what all processes have read."""
        super().on_test_epoch_end()
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, self._said)
            self._said = list({row["index"]: row for part in parts for row in part}.values())

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""
        found = self._encode(batch)
        said = self.read(found)
        count = len(said)
        metrics["loss"].update(self._loss(found, batch), count)
        real = torch.arange(found.logits.shape[1], device=self.device) < found.lengths[:, None]
        metrics["blank"].update((found.logits.argmax(-1) == 0)[real].float())
        spoken = self._is_recognition(batch)
        metrics["recognised"].update(sum(spoken))
        metrics["translated"].update(count - sum(spoken))
        for hypothesis, reference, recognised in zip(said, batch["texts"], spoken, strict=True):
            if recognised:
                metrics["wer"].update([hypothesis["text"]], [reference])
                metrics["cer"].update([hypothesis["text"]], [reference])
            elif "bleu" in metrics:
                metrics["bleu"].update([hypothesis["text"]], [[reference]])
            metrics["exact"].update(float(hypothesis["text"] == reference))
        if "language_accuracy" in metrics:
            truth = [self.model.spec.tokens[i][1:-1] for i in batch["language"].tolist()]
            right = [float(s["language"] == t) for s, t in zip(said, truth, strict=True)]
            metrics["language_accuracy"].update(torch.tensor(right))
        if self.trainer.testing:
            rows = zip(batch["index"].tolist(), batch["names"], batch["texts"], said, strict=True)
            self._said += [
                {"index": i, "name": n, "reference": t, "hypothesis": s["text"], "confidence": s["confidence"]}
                for i, n, t, s in rows
            ]

    def _is_recognition(self, batch: Batch) -> list[bool]:
        if "prefix" not in batch:
            return [True] * len(batch["waves"])
        asr = self.model.ids.get("<asr>", -1)
        return [task == asr for task in batch["prefix"][:, 1].tolist()]

    def read(self, found: Emissions) -> list[dict[str, Any]]:
        """Return what a model says, greedily: ``text``, ``language`` (empty for none) and ``confidence``."""
        said = []
        languages = {f"<{name}>": name for name in self.model.spec.languages}
        for hypothesis in greedy(found.log_probs, found.lengths):
            tokens = [self.model.spec.tokens[i] for i in hypothesis.ids]
            said.append(
                {
                    "text": self.tokenizer.decode(hypothesis.ids),
                    "language": next((languages[t] for t in tokens if t in languages), ""),
                    "confidence": float(np.mean(hypothesis.confidence)) if hypothesis.confidence else 0.0,
                }
            )
        return said

    def write_results(self, folder: Path) -> list[str]:
        """Write ``test_transcripts.csv``, and ``rejected.jsonl`` where recordings were left out."""
        written = []
        if self._said:
            with (folder / "test_transcripts.csv").open("w", newline="", encoding="utf-8") as f:
                writer = csv.DictWriter(f, [k for k in self._said[0] if k != "index"], extrasaction="ignore")
                writer.writeheader()
                writer.writerows(sorted(self._said, key=lambda row: row["index"]))
            written.append("test_transcripts.csv")
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, SpeechData) and data.rejected:
            with (folder / "rejected.jsonl").open("w", encoding="utf-8") as f:
                f.writelines(json.dumps(vars(bad), ensure_ascii=False) + "\n" for bad in data.rejected)
            written.append("rejected.jsonl")
        return written

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows with name, text, language and confidence."""
        said = self.read(self._encode(batch))
        rows = zip(batch["index"].tolist(), batch["names"], said, strict=True)
        return [{"index": index, "name": name, **row} for index, name, row in rows]
