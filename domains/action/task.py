"""The task of policies: chunks of actions for observations, by any backbone."""

from __future__ import annotations

import csv
import inspect
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.domains.action.metrics import ChunkErrors
from vertebra.domains.action.model import POLICIES, ActionPolicy, Readout
from vertebra.domains.action.observation import starts
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.averaging import AveragedTask
from vertebra.domains.base import DomainModel
from vertebra.domains.batching import Batch
from vertebra.domains.finetuning import TuneConfig
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError


class ActionPolicyTask(AveragedTask):
    """Imitation of demonstrations: the next chunk of actions from what is observed.

    Logs ``loss`` and what the policy has besides (``token_pred_acc``, or ``l1`` and ``kl``), and for validation and
    test ``reconstruct_mse``, the mean squared error of the actions that the policy writes, over steps that exist, its
    root ``rmse``, and ``hold_rmse``, that of staying at the current state (or, where actions have no state, of
    repeating the action before). ``joints.csv`` in the run folder has both for each action dimension, and
    ``horizon.csv`` for each step of a chunk.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone.
        policy: ``decoder``, ``encoder-decoder`` or ``cvae``.
        optimizer: Optimizer and schedule.
        decoding: Of a decoder: ``parallel``, or ``autoregressive``, which needs a causal backbone.
        grouped: One query for all dimensions of a control point instead of one a token; None for the policy's usual
            form (a CVAE groups, the others do not).
        readout: ``argmax``, or ``mean`` of the levels by probability.
        smoothing: Standard deviation, in levels, of a target spread over neighbouring levels; 0 for none.
        latent: Latent dimensions of a CVAE; 0 for plain regression.
        kl_weight: Weight of a CVAE's divergence from its prior.
        regression: ``l1`` or ``l2``, a CVAE's error of tokens.
        heads: Heads of an encoder-decoder's attention to what the encoder says.
        vision: ``patch``, or a model of timm as ``timm:NAME``, where there are pictures.
        patch_size: Height and width of the patches.
        observation_noise: Standard deviation of what is added in training to what is observed but pictures, once
            scaled.
        dropout: Share of the embedded tokens that is zeroed in training.
        ema: Decay of the average of the weights that is evaluated and saved; 0 for none.
        init_from: Initial weights: a model directory, a bundled model's name or a ``.ckpt``.
        init_parts: ``backbone`` (with what comes before it) alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
        monitor: What the best checkpoint is best in.
    """

    model: ActionPolicy

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        policy: Literal["decoder", "encoder-decoder", "cvae"] = "decoder",
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        decoding: Literal["parallel", "autoregressive"] = "parallel",
        grouped: bool | None = None,
        readout: Readout = "argmax",
        smoothing: float = 0.0,
        latent: int = 32,
        kl_weight: float = 10.0,
        regression: Literal["l1", "l2"] = "l1",
        heads: int = 4,
        vision: str = "patch",
        patch_size: int = 8,
        observation_noise: float = 0.0,
        dropout: float = 0.0,
        ema: float = 0.0,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "backbone",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig = TuneConfig(),  # noqa: B008  # frozen
        monitor: str = "val/reconstruct_mse",
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
        if policy not in POLICIES:
            raise ConfigError(f"policy must be {', '.join(POLICIES)}, got {policy!r}.")
        self.policy, self.monitor = policy, monitor
        self.monitor_mode = "max" if monitor.endswith("token_pred_acc") else "min"
        self.arguments: dict[str, Any] = {
            "vision": vision,
            "patch_size": patch_size,
            "observation_noise": observation_noise,
            "dropout": dropout,
        }
        if grouped is not None:
            self.arguments["grouped"] = grouped
        own = {
            "decoding": decoding,
            "readout": readout,
            "smoothing": smoothing,
            "latent": latent,
            "kl_weight": kl_weight,
            "regression": regression,
            "heads": heads,
        }
        defaults, takes = (inspect.signature(f).parameters for f in (ActionPolicyTask.__init__, POLICIES[policy]))
        for name, value in own.items():
            if name in takes:
                self.arguments[name] = value
            elif value != defaults[name].default:
                others = [other for other, cls in POLICIES.items() if name in inspect.signature(cls).parameters]
                raise ConfigError(f"{name}={value} is for policy={' or '.join(others)}, got policy={policy}.")

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """As in ``BaseTask``."""
        if not isinstance(spec, ActionSpec):
            raise ConfigError(f"ActionPolicyTask needs demonstrations, but the data is for the domain {spec.domain}.")
        return POLICIES[self.policy](backbone, spec, **self.arguments)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        losses = self.model.losses(batch)
        count = len(batch["states"])
        for name, value in losses.items():
            self.log(f"train/{name}", value, prog_bar=name == "loss", batch_size=count)
        return losses["loss"]

    # ------------------------------------------------------------ evaluation

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """As in ``MetricTask``."""
        assert isinstance(spec, ActionSpec)
        names = [self.arguments["regression"], "kl"] if self.policy == "cvae" else ["token_pred_acc"]
        about = spec.tokenizer
        errors = {
            name: ChunkErrors(about["horizon"], about["dims"], about["angles"], about["quaternions"])
            for name in ("errors", "hold")
        }
        return nn.ModuleDict({"loss": MeanMetric(), **{name: MeanMetric() for name in names}, **errors})

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """As in ``MetricTask``."""
        model = self.final_model
        assert isinstance(model, ActionPolicy)
        count = len(batch["states"])
        for name, value in model.losses(batch).items():
            metrics[name].update(value, count)
        metrics["errors"].update(model.act(batch), batch["actions"], batch["real"])
        metrics["hold"].update(hold(model.spec, batch)[:, None], batch["actions"], batch["real"])

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """As in ``MetricTask``."""
        means = {name: metric.compute() for name, metric in metrics.items() if isinstance(metric, MeanMetric)}
        mse = metrics["errors"].compute()
        return {**means, "reconstruct_mse": mse, "rmse": mse.sqrt(), "hold_rmse": metrics["hold"].compute().sqrt()}

    def write_results(self, folder: Path) -> list[str]:
        """Write ``joints.csv`` and ``horizon.csv`` of the last test."""
        metrics = self.metrics_of("test")
        errors, held = metrics["errors"], metrics["hold"]
        if not float(errors.steps.sum()):
            return []
        names = self.model.spec.action_names
        steps = [f"{(i + 1) / self.model.spec.fps:g}" for i in range(len(errors.steps))]
        tables = {
            "joints.csv": ("action", names, errors.by_dimension(), held.by_dimension()),
            "horizon.csv": ("seconds", steps, errors.by_step(), held.by_step()),
        }
        for file, (key, keys, own, other) in tables.items():
            with (folder / file).open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow([key, "rmse", "hold_rmse"])
                rows = zip(keys, own.tolist(), other.tolist(), strict=True)
                writer.writerows((name, f"{a:.6g}", f"{b:.6g}") for name, a, b in rows)
        return list(tables)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows with the episode, the step and the chunk: a column for each of its steps and dimensions."""
        names = self.model.spec.action_names
        chunks = self.final_model.act(batch).cpu()  # type: ignore[operator]  # (B, T, A)
        rows = zip(batch["index"].tolist(), batch["names"], batch["places"], chunks, strict=True)
        return [
            {
                "index": index,
                "episode": name,
                "step": step,
                **{
                    f"{joint}[{i}]": float(v)
                    for i, row in enumerate(chunk)
                    for joint, v in zip(names, row, strict=True)
                },
            }
            for index, name, step, chunk in rows
        ]


def hold(spec: ActionSpec, batch: Batch) -> Tensor:
    """Return what staying where the robot is would be, (B, A); where an action has no state, the action before."""
    columns = torch.tensor(spec.positions, device=batch["states"].device)
    return torch.where(columns >= 0, starts(spec, batch["states"]), batch["start"])
