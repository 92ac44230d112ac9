"""Optimizers with warm-up and a schedule; decay on matrices only; learning rates by layer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from vertebra.domains.model import DomainModel
from vertebra.errors import ConfigError

_NEVER_DECAYED = ("A_log", "dt_bias", "D")
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """An optimizer and its schedule.

    Args:
        name: ``adamw``; ``lamb`` (https://arxiv.org/abs/1904.00962), for large batches and FIT, or ``lion``
            (https://arxiv.org/abs/2302.06675), which needs about a tenth of the learning rate; both are timm's.
        lr: Peak learning rate.
        weight_decay: Decoupled decay of the matrices; embeddings, norms, biases and state-space parameters have none.
        betas: Decay rates of the two moments.
        eps: Added to the root of the second moment.
        warmup: Linear warm-up: a fraction of all steps when below 1, otherwise a number of steps.
        schedule: Shape of the learning rate after warm-up.
        min_lr_ratio: Where cosine and linear end, as a fraction of the peak.
        layer_decay: Factor between the learning rates of a backbone layer and the one above it; 1 for none.
        backbone_lr_ratio: Learning rate of backbone and embedding, relative to that of the head.
    """

    name: Literal["adamw", "lamb", "lion"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    warmup: float = 0.1
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    min_lr_ratio: float = 0.05
    layer_decay: float = 1.0
    backbone_lr_ratio: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a list where it comes from JSON
        for name in ("lr", "layer_decay", "backbone_lr_ratio"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"OptimizerConfig: {name} must be above 0, got {getattr(self, name)}.")
        if self.name not in ("adamw", "lamb", "lion"):
            raise ConfigError(f"OptimizerConfig: name must be adamw, lamb or lion, got {self.name!r}.")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise ConfigError(f"OptimizerConfig: schedule must be cosine, linear or constant, got {self.schedule!r}.")
        if self.warmup < 0 or not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(
                f"OptimizerConfig: warmup must be at least 0 and min_lr_ratio from 0 to 1, "
                f"got {self.warmup} and {self.min_lr_ratio}."
            )


def lr_factor(step: int, config: OptimizerConfig, total_steps: int) -> float:
    """Learning rate before optimizer step ``step`` (from 0), as a fraction of the peak."""
    warmup = round(config.warmup * total_steps if config.warmup < 1 else config.warmup)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * shape


def parameter_table(module: nn.Module, config: OptimizerConfig) -> dict[str, tuple[float, float]]:
    """Peak learning rate and weight decay of every parameter, by name.

    Args:
        module: A ``DomainModel``, or any module: without a backbone all parameters have the same learning rate.
        config: Rates and factors.
    """
    model = module if isinstance(module, DomainModel) else None
    exempt = {f"backbone.{n}" for n in model.backbone.no_weight_decay()} | model.no_weight_decay() if model else set()
    plain = {id(p) for m in module.modules() if _never_decays(m) for p in m.parameters(recurse=False)}
    table = {}
    for name, parameter in module.named_parameters():
        leaf = name.rpartition(".")[2]
        decays = parameter.ndim >= 2 and id(parameter) not in plain and leaf not in _NEVER_DECAYED
        decays = decays and name not in exempt and "conv1d" not in name
        table[name] = (_rate(name, model, config), config.weight_decay if decays else 0.0)
    return table


def _never_decays(module: nn.Module) -> bool:
    depthwise = isinstance(module, nn.Conv1d) and module.groups > 1
    return depthwise or isinstance(module, (nn.Embedding, *_NORMS))


def _rate(name: str, model: DomainModel | None, config: OptimizerConfig) -> float:
    if model is None:
        return config.lr
    layers = model.backbone.num_layers
    if name.startswith("backbone."):
        below = layers - model.backbone.layer_of(name.removeprefix("backbone."))
    elif name.partition(".")[0] in model.input_parts:
        below = layers + 1
    else:
        return config.lr
    return config.lr * config.backbone_lr_ratio * config.layer_decay**below


def build_optimizer(
    module: nn.Module, config: OptimizerConfig, total_steps: float
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Make the optimizer over the parameter groups, and its schedule, stepped once an optimizer step.

    Frozen parameters are included, so that they can be unfrozen later; optimizers pass over those without gradient.

    Args:
        module: What to train.
        config: Rates, decay and schedule.
        total_steps: Optimizer steps of the whole run.

    Raises:
        ConfigError: The schedule needs an end and the run has none.
    """
    if not math.isfinite(total_steps):
        if config.schedule != "constant" or 0 < config.warmup < 1:
            raise ConfigError(
                f"optimizer: schedule {config.schedule!r} with warmup {config.warmup} needs a run of known length; set "
                "trainer.max_steps or trainer.max_epochs, or schedule 'constant' with warmup as a number of steps."
            )
        total_steps = 0
    table = parameter_table(module, config)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in module.named_parameters():
        lr, decay = table[name]
        groups.setdefault((lr, decay), {"params": [], "lr": lr, "weight_decay": decay})["params"].append(parameter)
    optimizer = _make(config, list(groups.values()))
    return optimizer, LambdaLR(optimizer, lambda step: lr_factor(step, config, int(total_steps)))


def _make(config: OptimizerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    from timm.optim.lamb import Lamb
    from timm.optim.lion import Lion

    if config.name == "lamb":
        return Lamb(groups, lr=config.lr, betas=config.betas, eps=config.eps)
    return Lion(groups, lr=config.lr, betas=config.betas)
