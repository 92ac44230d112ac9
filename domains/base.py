"""What all domains share: the data module and the task.

A task takes the description of a backbone, never a module, and builds its model in ``configure_model`` from what the
data knows (``trainer.datamodule.spec``). Checkpoints carry both, so one file is enough to go on, test or predict.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

import lightning.pytorch as pl
import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import Metric

from vertebra.backbones.base import Backbone, BackboneConfig, is_pretrained, resolve, split_name
from vertebra.backbones.catalog import ADAPTERS
from vertebra.backbones.loading.guard import CHECKPOINT, cannot_be_built, check_numbers, check_size, header_of
from vertebra.backbones.loading.pretrained import LoadReport, load_state
from vertebra.domains.batching import Batch, BatchLoader, LengthBucketSampler, PlannedSampler
from vertebra.domains.finetuning import (
    TuneConfig,
    add_adapters,
    check_initial,
    drop_gradients,
    idle_adapters,
    merged,
    set_modes,
)
from vertebra.domains.initial import check_all_tensors, init_backbone, init_weights, read_checkpoint
from vertebra.domains.model import DomainModel
from vertebra.domains.optim import OptimizerConfig, build_optimizer
from vertebra.domains.predictions import PredictionWriter
from vertebra.domains.saving import class_path, import_class
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, DataError, LoadError, VertebraError

__all__ = [
    "BaseData",
    "BaseTask",
    "DomainModel",
    "Items",
    "MetricTask",
    "PredictionWriter",
    "TuneConfig",
    "init_weights",
    "load_task",
    "read_checkpoint",
]

log = logging.getLogger("vertebra")

Split = Literal["train", "val", "test", "predict"]


class Items(Protocol):
    """Items of one split, held in memory."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Length of every item, shape (N,)."""
        ...

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Make the batch of ``indices`` (B,) as it is in ``epoch``."""
        ...


class BaseData(pl.LightningDataModule, ABC):
    """Data module: a subclass reads files in ``load``; batches, seeds, ranks and resuming are done here.

    Args:
        batch_size: Items in a batch of one process.
        max_tokens: Positions in a batch, padding included; with ``batch_size`` the smaller of both limits holds.
        num_workers: Worker processes; data is in memory and 0 is fastest unless batches are heavy to make.
        pin_memory: Whether to copy batches into page-locked memory, for a GPU.
        seed: Seed of splits, order and augmentation.
    """

    def __init__(
        self,
        *,
        batch_size: int = 32,
        max_tokens: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ConfigError(f"data: {name} must be at least 1, got {value}.")
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self.num_workers, self.pin_memory, self.seed = num_workers, pin_memory, seed
        self._spec: DataSpec | None = None
        self._splits: dict[str, Items] = {}
        self._read: set[str] = set()

    @abstractmethod
    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """Read the files.

        Args:
            splits: The splits that are wanted; others may be returned too.
            spec: The spec of the model when it exists already: its classes, alphabet and lengths hold.

        Returns:
            The spec and the items of every split there is.
        """

    @property
    def spec(self) -> DataSpec:
        """Facts about the data.

        Raises:
            ConfigError: ``setup`` has not run.
        """
        if self._spec is None:
            raise ConfigError(f"{type(self).__name__}: spec is known after setup; call setup('fit') first.")
        return self._spec

    def use_spec(self, spec: DataSpec) -> None:
        """Read the data as the model of this spec expects it, whatever the files alone would suggest."""
        self._spec, self._splits, self._read = spec, {}, set()

    def setup(self, stage: str | None = None) -> None:
        """Read the files once."""
        wanted: dict[str, set[Split]] = {
            "fit": {"train", "val"},
            "validate": {"val"},
            "test": {"test"},
            "predict": {"predict"},
            "": {"train", "val", "test"},
        }
        splits = wanted[stage or ""]
        if splits <= self._read:
            return
        spec, items = self.load(splits, self._model_spec() or self._spec)
        self._spec, self._splits = spec, {**self._splits, **items}
        self._read |= splits | self._splits.keys()

    def _model_spec(self) -> DataSpec | None:
        task = getattr(self.trainer, "lightning_module", None)
        return task.spec if isinstance(task, BaseTask) else None

    def items(self, split: Split) -> Items:
        """Items of a split.

        Raises:
            DataError: There is no such split.
        """
        if split not in self._splits:
            raise DataError(f"{type(self).__name__}: no {split} data; {self.hint(split)}")
        return self._splits[split]

    def keep(self, split: Split, choose: Callable[[Items], Items]) -> None:
        """Replace the items of a split that was read by what ``choose`` makes of them, such as a part of them."""
        self._splits[split] = choose(self.items(split))

    def hint(self, split: Split) -> str:
        """What to do when a split is missing."""
        return f"give a {split} file or a share of the data."

    def sampler(self, split: Split, items: Items, *, shuffle: bool, rank: int, world_size: int) -> PlannedSampler:
        """Plan the batches of a split."""
        return LengthBucketSampler(
            items.lengths,
            batch_size=self.batch_size,
            max_tokens=self.max_tokens,
            shuffle=shuffle,
            seed=self.seed,
            rank=rank,
            world_size=world_size,
        )

    def loader(self, split: Split, *, shuffle: bool) -> BatchLoader:
        """Batches of a split for this process."""
        items, trainer = self.items(split), self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        sampler = self.sampler(split, items, shuffle=shuffle, rank=rank, world_size=world_size)
        return BatchLoader(items.fetch, sampler, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def train_dataloader(self) -> BatchLoader:
        """Shuffled batches of the training split."""
        return self.loader("train", shuffle=not getattr(self.trainer, "overfit_batches", 0))

    def val_dataloader(self) -> BatchLoader | list[BatchLoader]:
        """Batches of the validation split; none where there is no such split."""
        return self.loader("val", shuffle=False) if "val" in self._splits else []

    def test_dataloader(self) -> BatchLoader:
        """Batches of the test split."""
        return self.loader("test", shuffle=False)

    def predict_dataloader(self) -> BatchLoader:
        """Batches of the files to predict."""
        return self.loader("predict", shuffle=False)


class BaseTask(pl.LightningModule, ABC):
    """Task: loss, metrics, optimizer; builds its model from the data's spec.

    All constructor arguments of a subclass are saved as plain hyper-parameters, with the backbone resolved.

    Args:
        backbone: A config, a preset's name, or the name of a pretrained one, whose weights are then loaded.
        optimizer: AdamW and its schedule.
        init_from: Where to take initial weights: a model directory, a bundled model's name, or a ``.ckpt``.
        init_parts: ``backbone`` alone, or ``all`` that fits by name; a head of another shape stays fresh either way.
        freeze_backbone: Whether the backbone keeps its weights.
        unfreeze_at: Epoch at which a frozen backbone begins to learn; None for never.
        tune: What learns: all, the head, one layer after the other, or low-rank adapters.
    """

    reads_images: ClassVar[bool] = False
    """Whether the task takes whole image models of another library as its backbone."""
    model: DomainModel
    """Built by ``build``, once the data's spec is known."""
    _given: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> BaseTask:  # noqa: D102
        task = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(task, *args, **kwargs)
        bound.apply_defaults()
        object.__setattr__(task, "_given", {k: v for k, v in bound.arguments.items() if k != "self"})
        return task

    def __init__(
        self,
        *,
        backbone: BackboneConfig | str | Mapping[str, Any],
        optimizer: OptimizerConfig | Mapping[str, Any] | None = None,
        init_from: str | None = None,
        init_parts: Literal["backbone", "all"] = "backbone",
        freeze_backbone: bool = False,
        unfreeze_at: int | None = None,
        tune: TuneConfig | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._pretrained = split_name(backbone)[0] if isinstance(backbone, str) else ""
        if not is_pretrained(self._pretrained):
            self._pretrained = ""
        if isinstance(backbone, Mapping):
            self.backbone_config = BackboneConfig.from_dict(dict(backbone))
        else:
            self.backbone_config = resolve(backbone)
        if self.backbone_config.family in ADAPTERS and not self.reads_images:
            raise ConfigError(
                f"{type(self).__name__}: a model of {self.backbone_config.family} reads images only; choose a backbone "
                "of `vertebra list backbones`."
            )
        if isinstance(optimizer, Mapping):
            optimizer = OptimizerConfig(**optimizer)
        self.optimizer_config = optimizer or OptimizerConfig()
        if init_parts not in ("backbone", "all"):
            raise ConfigError(f"init_parts must be 'backbone' or 'all', got {init_parts!r}.")
        if unfreeze_at is not None and not freeze_backbone:
            raise ConfigError(f"unfreeze_at={unfreeze_at} needs freeze_backbone=true.")
        self.tune = TuneConfig(**tune) if isinstance(tune, Mapping) else tune or TuneConfig()
        if freeze_backbone and (self.tune.train != "all" or self.tune.lora_rank):
            raise ConfigError(
                "freeze_backbone=true and tune.train or tune.lora_rank do not go together; leave one of them out "
                "(tune.train=head freezes the backbone too)."
            )
        self.init_from, self.init_parts = init_from, init_parts
        self.freeze_backbone, self.unfreeze_at = freeze_backbone, unfreeze_at
        self.load_report: LoadReport | None = None
        self.load_reports: dict[str, LoadReport] = {}
        self._open_layers: int | None = None
        self._adapters_checked = False
        self._steps = math.inf
        self._initial_error: VertebraError | None = None
        self._loader_states: list[dict[str, Any]] = []
        given = {**self._given, "backbone": self.backbone_config, "optimizer": self.optimizer_config}
        if "tune" in given:
            given["tune"] = self.tune
        self.save_hyperparameters({k: _plain(v) for k, v in given.items()}, logger=False)

    # ------------------------------------------------------------ what a domain defines

    @abstractmethod
    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """Make the model; refuse a spec that contradicts what the user typed."""

    def build_metrics(self, spec: DataSpec) -> None:
        """Make the metrics, once the spec is known."""

    # ------------------------------------------------------------ building and loading

    @property
    def spec(self) -> DataSpec | None:
        """Spec of the model; None before it is built."""
        return self.model.spec if self.is_built else None

    @property
    def final_model(self) -> DomainModel:
        """What a training leaves: the model, or the average of its weights where the task keeps one."""
        return self.model

    @property
    def plain_model(self) -> DomainModel:
        """The final model as it is saved: a copy with merged weights where it has low-rank adapters."""
        return merged(self.final_model)

    def write_results(self, folder: Path) -> list[str]:
        """Write what is worth keeping of the last evaluation into a run folder; return the names of the files."""
        return []

    @property
    def is_built(self) -> bool:
        """Whether the model exists."""
        return "model" in self._modules

    def build(self, spec: DataSpec) -> None:
        """Build model and metrics for data of this spec."""
        self.model = self.build_model(self.backbone_config.build(), spec)
        # What never learns is frozen now: DDP waits for the gradients of all that need one.
        if self.tune.train == "head" or (self.freeze_backbone and self.unfreeze_at is None):
            self.model.backbone.requires_grad_(False)
        if self.tune.lora_rank:
            add_adapters(self.model.backbone, self.tune)
        self.build_metrics(spec)

    def configure_model(self) -> None:
        """Build the model once, with initial weights for a training."""
        if self.is_built:
            return
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, BaseData):
            raise ConfigError(
                f"{type(self).__name__}: the model is built from the data; give the trainer a datamodule."
            )
        self.build(data.spec)
        if self.trainer.state.fn == "fit":
            try:
                self.load_initial()
            except VertebraError as e:  # no matter where a checkpoint follows, which is not known yet
                self._initial_error = e

    def load_initial(self) -> None:
        """Load the weights of a pretrained backbone or of ``init_from``, and print what was loaded.

        Raises:
            ConfigError: There are none, and the backbone would keep random ones.
            LoadError: They do not fit.
        """
        check_initial(self.tune, given=bool(self._pretrained) or self.init_from is not None)
        if self._pretrained:
            self._loaded(self._pretrained, init_backbone(self.model.backbone, self._pretrained))
        if self.init_from is not None:
            self._loaded(self.init_from, self.read_initial(self.init_from))

    def read_initial(self, source: str) -> LoadReport:
        """Load the weights of ``init_from`` into the model."""
        return init_weights(self.model, source, self.init_parts)

    def _loaded(self, source: str, report: LoadReport) -> None:
        self.load_report = self.load_reports[source] = report
        log.log(logging.WARNING if report.unlike else logging.INFO, "%s: %s", source, report.initial())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to build this task again: ``class_path``, ``spec`` and ``backbone``."""
        checkpoint["class_path"] = class_path(self)
        checkpoint["spec"] = self.model.spec.to_dict()
        checkpoint["backbone"] = self.backbone_config.to_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the model, where no data did; refuse a checkpoint of data that differs."""
        if "spec" not in checkpoint:
            raise LoadError("the checkpoint holds no 'spec', so no task of vertebra wrote it.")
        spec = DataSpec.from_dict(checkpoint["spec"])
        if not self.is_built:
            self.build(spec)
        elif self.model.spec != spec:
            mine, theirs = self.model.spec.to_dict(), spec.to_dict()
            differing = [f"{k}: {theirs.get(k)} and {v}" for k, v in mine.items() if theirs.get(k) != v]
            raise ConfigError(
                f"{type(self).__name__}: the checkpoint and the data must agree, got {'; '.join(differing)} "
                "(checkpoint and data); use the data of the checkpoint, or --model.init_args.init_from for its weights."
            )
        loop = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
        self._loader_states = loop.get("combined_loader", [])

    # ------------------------------------------------------------ training

    def configure_optimizers(self) -> Any:
        """The optimizer, with its schedule stepped at every optimizer step."""
        self._steps = self.trainer.estimated_stepping_batches
        optimizer, schedule = build_optimizer(self.model, self.optimizer_config, self._steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    @property
    def open_layers(self) -> int:
        """How many of the backbone's layers learn now, counted from the last."""
        layers = self.model.backbone.num_layers
        if self.freeze_backbone:
            return 0 if self.unfreeze_at is None or self.current_epoch < self.unfreeze_at else layers
        return self.tune.open_layers(layers, self.current_epoch, self.global_step, self._steps)

    @property
    def backbone_is_frozen(self) -> bool:
        """Whether the backbone keeps its weights now."""
        return self.open_layers == 0

    def on_fit_start(self) -> None:
        """Refuse a training whose initial weights could not be loaded."""
        if self._initial_error is not None and self.trainer.ckpt_path is None:
            raise self._initial_error

    def on_train_start(self) -> None:
        """Put the loader where the checkpoint left it, and tell of layers that will never learn.

        Lightning does not when the schedule has asked for the length of the run, and so for the loader, before.
        """
        loader = self.trainer.train_dataloader
        if isinstance(loader, BatchLoader) and len(self._loader_states) == 1:
            loader.load_state_dict(self._loader_states[0])
        self._loader_states = []
        batches = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches  # of an epoch
        if 0 < batches < math.inf and self._steps < math.inf:
            epochs = math.ceil(self._steps / math.ceil(batches))
            if text := self.tune.never_open(self.model.backbone.num_layers, epochs, self._steps):
                log.warning("%s", text)

    def on_train_epoch_start(self) -> None:
        """What keeps its weights runs without dropout."""
        self.set_modes()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Let further layers learn when it is their turn, also in a run that goes on within an epoch."""
        if self.open_layers != self._open_layers:
            self.set_modes()

    def set_modes(self) -> None:
        """Let what keeps its weights run without dropout, and the rest with it."""
        before, self._open_layers = self._open_layers, self.open_layers
        set_modes(self.model.backbone, self._open_layers)
        changes = self.tune.train == "gradual" or self.unfreeze_at is not None
        if changes and before != self._open_layers:
            log.info(
                "epoch %d, step %d: %d of %d layers of the backbone learn",
                self.current_epoch, self.global_step, self._open_layers, self.model.backbone.num_layers,
            )  # fmt: skip

    def on_after_backward(self) -> None:
        """Drop the gradients of layers that are frozen for now; tell of adapters that do nothing."""
        drop_gradients(self.model.backbone, self.open_layers)
        if self.tune.lora_rank and not self._adapters_checked:
            self._adapters_checked = True
            if idle := idle_adapters(self.model.backbone):
                log.warning(
                    "the adapters of %s get no gradient: the model does not call these projections; name others with "
                    "tune.lora_targets.", ", ".join(idle[:5]) + (f" and {len(idle) - 5} more" if idle[5:] else ""),
                )  # fmt: skip


class MetricTask(BaseTask):
    """A task with metrics of validation and of test, logged as ``<stage>/<name>``; they are kept until the next one."""

    @abstractmethod
    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """Make the metrics of one split."""

    @abstractmethod
    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """Return the values of the metrics by name."""

    @abstractmethod
    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""

    def build_metrics(self, spec: DataSpec) -> None:
        """Make one set of metrics for validation and one for test."""
        self.metrics = nn.ModuleDict({f"{stage}_metrics": self.make_metrics(spec) for stage in ("val", "test")})

    def metrics_of(self, stage: Literal["val", "test"]) -> Any:
        """Return the metrics of a split."""
        return self.metrics[f"{stage}_metrics"]

    def on_validation_epoch_start(self) -> None:
        """Begin anew."""
        self._reset("val")

    def on_test_epoch_start(self) -> None:
        """Begin anew."""
        self._reset("test")

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the validation metrics."""
        self.evaluate(self.metrics_of("val"), batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to the test metrics."""
        self.evaluate(self.metrics_of("test"), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the validation metrics."""
        self._log("val")

    def on_test_epoch_end(self) -> None:
        """Log the test metrics."""
        self._log("test")

    def _reset(self, stage: Literal["val", "test"]) -> None:
        for metric in self.metrics_of(stage).modules():
            if isinstance(metric, Metric):
                metric.reset()

    def _log(self, stage: Literal["val", "test"]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # a split without one of the classes
            values = self.summarise(self.metrics_of(stage))
        self.log_dict({f"{stage}/{name}": value for name, value in values.items()}, prog_bar=True)


def _plain(value: Any) -> Any:
    """Turn configs and paths into JSON-able values."""
    if isinstance(value, BackboneConfig):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, os.PathLike) else value


def load_task(path: str | os.PathLike[str], *, allow_modules: Iterable[str] = ()) -> BaseTask:
    """Build the task a checkpoint describes, with its weights, in evaluation mode.

    Args:
        path: A ``.ckpt``.
        allow_modules: Modules besides ``vertebra`` that the task's class may come from.

    Raises:
        LoadError: Not a checkpoint of ours, a class that is not allowed, a task that cannot be built or that the
            tensors cannot be of, or weights that do not fit.
    """
    checkpoint = read_checkpoint(path)
    cls = import_class(checkpoint["class_path"], BaseTask, allow_modules=allow_modules, source=path)
    given, state = checkpoint["hyper_parameters"], check_all_tensors(checkpoint["state_dict"], path)
    header = header_of(state)
    check_numbers([given, checkpoint["spec"]], path, names=CHECKPOINT)
    if isinstance(backbone := given.get("backbone"), dict):
        check_numbers(backbone, path, header, CHECKPOINT)

    def build() -> BaseTask:
        task = cls(**given)
        assert isinstance(task, BaseTask)
        task.on_load_checkpoint(checkpoint)
        return task

    if cls.__module__.startswith("vertebra."):  # other classes need not bear to be built dry
        check_size(build, header, path, CHECKPOINT)
    try:
        task = build()
    except VertebraError:
        raise
    except Exception as e:  # whatever code of tasks raises when it gets values it was not written for
        raise cannot_be_built(e, path, CHECKPOINT) from e
    load_state(task, state, source=f"the weights of {path}")
    return task.eval()
