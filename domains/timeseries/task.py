"""The task of forecasts, by any backbone."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.domains.averaging import AveragedTask
from vertebra.domains.base import DomainModel
from vertebra.domains.batching import Batch
from vertebra.domains.finetuning import TuneConfig
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.domains.timeseries.heads import HeadName
from vertebra.domains.timeseries.metrics import ForecastErrors
from vertebra.domains.timeseries.model import Mode, PatchForecaster, Readout, Space
from vertebra.domains.timeseries.scaling import seasonal_channels
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError


class ForecastTask(AveragedTask):
    """Forecasts of windows, or of packed rows as the scaling-law models train.

    Logs ``loss``, and for windows of validation and test ``mse`` and ``mae`` of the mean forecast, ``crps`` (weighted
    quantile loss) and ``coverage`` (of the interval between the outermost levels) where quantiles are told, and
    ``naive_mse`` and ``naive_mae`` of repeating the last season. They are in the units of the data module: scaled ones
    with ``data.standardise``. ``horizon.csv`` in the run folder has the errors by step, ``variates.csv`` by variate.

    Args:
        backbone: A config, or the name of a preset or pretrained backbone.
        optimizer: Optimizer and schedule.
        patch: Steps of a patch.
        stride: Steps from one patch to the next; 0 for those of a patch.
        mode: ``independent``, each variate by itself, or ``multivariate``, all together.
        head: ``mixture``, ``quantile`` or ``point``.
        readout: ``patch``, or ``flatten`` for one linear map from all positions to all steps.
        error: What a point head minimises: ``mse``, ``mae`` or ``huber``.
        space: Where quantile and point losses are taken: ``instance`` or ``data``.
        tell_observed: Whether the model sees which values are missing.
        seasonal: Whether each step is told what was a season before it.
        shortcut: Add a linear map of the context to what a quantile or point head says.
        squash: Read and tell scaled values through asinh, for a quantile head.
        dropout: Share of the embedded patches that is zeroed in training.
        ema: Decay of the average of the weights that is evaluated and saved; 0 for none.
        init_from: Initial weights: a model directory, a bundled model's name or a ``.ckpt``.
        init_parts: ``backbone`` (with what comes before it) alone, or ``all`` that fits.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which it begins to learn.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
        monitor: What the best checkpoint is best in.
    """

    model: PatchForecaster

    def __init__(
        self,
        backbone: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        patch: int = 16,
        stride: int = 0,
        mode: Mode = "independent",
        head: HeadName = "quantile",
        readout: Readout = "patch",
        error: Literal["mse", "mae", "huber"] = "mse",
        space: Space = "instance",
        tell_observed: bool = True,
        seasonal: bool = False,
        shortcut: bool = False,
        squash: bool = False,
        dropout: float = 0.0,
        ema: float = 0.0,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "backbone",
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
        self.monitor, self.monitor_mode = monitor, "min"
        self.arguments: dict[str, Any] = {
            "patch": patch,
            "stride": stride,
            "mode": mode,
            "head": head,
            "readout": readout,
            "error": error,
            "space": space,
            "tell_observed": tell_observed,
            "seasonal": seasonal,
            "shortcut": shortcut,
            "squash": squash,
            "dropout": dropout,
        }

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """As in ``BaseTask``."""
        if not isinstance(spec, SeriesSpec):
            raise ConfigError(f"ForecastTask needs time series, but the data is for the domain {spec.domain}.")
        return PatchForecaster(backbone, spec, **self.arguments)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        loss = self.model.losses(batch)["loss"]
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["index"]))
        return loss

    # ------------------------------------------------------------ evaluation

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """As in ``MetricTask``."""
        assert isinstance(spec, SeriesSpec)
        levels = () if self.arguments["head"] == "point" else spec.quantiles
        return nn.ModuleDict(
            {
                "loss": MeanMetric(),
                "errors": ForecastErrors(spec.horizon, levels),
                "naive": ForecastErrors(spec.horizon, ()),
            }
        )

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """As in ``MetricTask``."""
        model = self.final_model
        assert isinstance(model, PatchForecaster)
        metrics["loss"].update(model.losses(batch)["loss"], len(batch["index"]))
        if "segments" in batch:
            return
        found = model.forecast(batch)
        truth = batch["target"], batch["target_observed"]
        metrics["errors"].update(*truth, found.mean, found.quantiles)
        metrics["naive"].update(*truth, seasonal_naive(batch, model.spec.horizon), None)

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """As in ``MetricTask``."""
        found = {"loss": metrics["loss"].compute()}
        if not metrics["errors"].seen:
            return found
        naive = metrics["naive"].compute()
        return {**found, **metrics["errors"].compute(), "naive_mse": naive["mse"], "naive_mae": naive["mae"]}

    def write_results(self, folder: Path) -> list[str]:
        """Write ``horizon.csv`` and ``variates.csv`` of the last test."""
        metrics = self.metrics_of("test")
        errors, naive = metrics["errors"], metrics["naive"]
        if not errors.seen:
            return []
        steps = list(range(1, self.model.spec.horizon + 1))
        count = len(errors.by_variate()["mse"])
        names = self.model.spec.variates or tuple(str(i + 1) for i in range(count))
        tables = {
            "horizon.csv": ("step", steps, errors.by_step(), naive.by_step()),
            "variates.csv": ("variate", names, errors.by_variate(), naive.by_variate()),
        }
        for file, (key, keys, own, other) in tables.items():
            with (folder / file).open("w", newline="", encoding="utf-8") as stream:
                writer = csv.writer(stream, lineterminator="\n")
                writer.writerow([key, "mse", "mae", "naive_mse", "naive_mae"])
                columns = [own["mse"], own["mae"], other["mse"], other["mae"]]
                writer.writerows([name, *(f"{float(c[i]):.6g}" for c in columns)] for i, name in enumerate(keys))
        return list(tables)

    def predict_step(self, batch: Batch, batch_idx: int) -> list[dict[str, Any]]:
        """Rows with the series, the variate, the step ahead, the mean and the quantiles, in units of the files."""
        model = self.final_model
        assert isinstance(model, PatchForecaster)
        spec = model.spec
        found = model.forecast(batch)
        parts = [found.mean.unsqueeze(2)] + ([] if found.quantiles is None else [found.quantiles])
        told = torch.cat(parts, dim=2)  # (B, V, 1 + Q, H)
        if spec.center:
            center, scale = (told.new_tensor(values)[:, None, None] for values in (spec.center, spec.scale))
            told = told * scale + center
        columns = ["mean", *(f"{level:g}" for level in spec.quantiles)][: told.shape[2]]
        rows = []
        for index, name, series in zip(batch["index"].tolist(), batch["names"], told.cpu(), strict=True):
            for v, numbers in enumerate(series):
                variate = spec.variates[v] if spec.variates else str(v + 1)
                first = (index * len(series) + v) * numbers.shape[-1]  # rows are told apart by their index
                rows += [
                    {"index": first + step, "series": name, "variate": variate, "step": step + 1}
                    | dict(zip(columns, values.tolist(), strict=True))
                    for step, values in enumerate(numbers.T)
                ]
        return rows


def seasonal_naive(batch: Batch, horizon: int) -> Tensor:
    """Return the last season of the context repeated, (B, V, H)."""
    channels = seasonal_channels(batch["values"], batch["observed"], batch["season"], horizon)
    shown = batch["values"] * batch["observed"]
    mean = shown.sum(-1, keepdim=True) / batch["observed"].sum(-1, keepdim=True).clamp_min(1)
    last, _, there = channels[..., -horizon:].unbind(2)
    return torch.where(there > 0, last, mean)  # of a context shorter than a season, its mean
