"""Attention into Mamba-2: MOHAWK's three stages and mmMamba's, over the language models of any domain.

MOHAWK (https://arxiv.org/abs/2408.10189, section 4): the matrices that mix positions, then the features behind each
layer, then the logits are made those of a teacher. mmMamba (https://arxiv.org/abs/2502.13145, section 3): Mamba-2
layers are seeded with the weights of attention; then their new parameters, then all of theirs learn to give what
attention gives, then the logits. Both are one task that changes its loss, and what learns, within one training.

The student is a model of the teacher's class with another backbone. What it shares with the teacher is copied before
the first stage: embedding, norms, MLPs, head, and the attention layers that its pattern keeps.

Shapes: B batch, L positions, V vocabulary, N tokens that are asked for.
"""

from __future__ import annotations

import itertools
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from vertebra.backbones.base import Backbone, BackboneConfig, is_pretrained, split_name
from vertebra.backbones.layers.mamba2 import Form
from vertebra.backbones.loading.pretrained import load_state
from vertebra.backbones.seeding import check_seed, new_layers, replaced, seed_mamba2, student_config
from vertebra.domains.base import BaseData, MetricTask
from vertebra.domains.batching import Batch
from vertebra.domains.lessons import (
    divergence,
    hidden_distances,
    inner_distances,
    matrix_distances,
    soft_loss,
    teach,
)
from vertebra.domains.loading import load
from vertebra.domains.model import DomainModel
from vertebra.domains.optim import OptimizerConfig, build_optimizer, lr_factor
from vertebra.domains.spec import DataSpec
from vertebra.domains.targets import IGNORED
from vertebra.errors import ConfigError

log = logging.getLogger("vertebra")

STAGES = 3


# ---------------------------------------------------------------- stages


def stage_borders(stages: Sequence[float], steps: int) -> list[int]:
    """Return the steps at which each stage begins, and that at which the last one ends.

    Args:
        stages: Lengths, in any unit: they are shared out over the run.
        steps: Optimizer steps of the run.
    """
    ends = itertools.accumulate(stages, initial=0.0)
    return [round(end / sum(stages) * steps) for end in ends]


def stage_at(borders: Sequence[int], step: int) -> int:
    """Return the stage, from 0, that optimizer step ``step`` belongs to; behind the end it is the last there was."""
    step = min(step, borders[-1] - 1)
    return max(i for i in range(len(borders) - 1) if borders[i] <= step or i == 0)


class DistillationTask(MetricTask):
    """What both methods share: teacher, student, stages, and the measures of the student.

    Logs the student's ``loss`` (nats a token), ``perplexity`` and ``bits_per_token`` as a language model of its domain,
    its ``kl`` from the teacher, and ``teacher_loss``; at the end of a stage the same as ``stage1/...`` over the
    validation data. ``train/loss`` is what the stage minimises, so it jumps from one to the next.

    Several processes need ``--trainer.strategy ddp_find_unused_parameters_true``.

    Args:
        teacher: A causal language model with attention layers: a bundled name, a model directory, a run folder, or
            what else ``vertebra.load`` takes.
        student: A hybrid preset with changed fields, whose pattern says which layers stay attention, or a config. Of a
            trained model's name the structure alone is taken.
        optimizer: AdamW and its schedule, which every stage runs through from its beginning, with fresh moments.
        stages: Lengths of the three stages: optimizer steps, or any other numbers, for they are shared out over the
            run; 0 leaves a stage out.
        rates: Learning rate of each stage, as a multiple of the optimizer's.
        temperature: What logits are divided by in the last stage.
        init_from: Weights of a student to go on with: a model directory or a ``.ckpt``.
    """

    form: ClassVar[Form]
    method: ClassVar[str]

    def __init__(
        self,
        teacher: str,
        student: BackboneConfig | str | Mapping[str, Any],
        *,
        optimizer: OptimizerConfig | Mapping[str, Any] | None,
        stages: Sequence[float],
        rates: Sequence[float],
        temperature: float,
        init_from: str | None,
    ) -> None:
        if isinstance(student, Mapping):
            student = BackboneConfig.from_dict(dict(student))
        self._student_name = split_name(student)[0] if isinstance(student, str) else ""
        loaded = load(teacher)
        super().__init__(
            backbone=student_config(loaded.backbone.config, student, self.form),
            optimizer=optimizer,
            init_from=init_from,
            init_parts="all",
        )
        for name in ("backbone", "tune"):  # no arguments of this task
            self.hparams.pop(name, None)
        self.hparams["student"] = self.backbone_config.to_dict()
        if len(stages) != STAGES or min(stages) < 0 or not sum(stages) > 0:
            raise ConfigError(f"stages must be three lengths, of which one at least is above 0, got {list(stages)}.")
        if len(rates) != STAGES or not min(rates) > 0:
            raise ConfigError(f"rates must be three multiples above 0 of optimizer.lr, got {list(rates)}.")
        if not temperature > 0:
            raise ConfigError(f"temperature must be above 0, got {temperature}.")
        self.teacher_name, self.temperature = teacher, temperature
        self.stages, self.rates = list(stages), list(rates)
        self._teachers = [loaded.eval().requires_grad_(False)]  # in a list: it is no part of what is saved
        self.new_layers: list[int] = []
        self._borders: list[int] = []
        self._saved_borders: list[int] = []
        self._stage: int | None = None

    # ------------------------------------------------------------ what a method defines

    @abstractmethod
    def layer_losses(self, stage: int, batch: Batch) -> list[Tensor]:
        """Return what the first two stages (0 and 1) minimise, for each new layer."""

    @abstractmethod
    def combine(self, losses: list[Tensor]) -> Tensor:
        """Return the loss of the first two stages."""

    @abstractmethod
    def learns(self, stage: int, name: str) -> bool:
        """Whether the student's parameter ``name`` learns in a stage."""

    def check(self, teacher: Backbone, student: Backbone) -> None:
        """Refuse a student that the stages cannot work on."""

    # ------------------------------------------------------------ teacher and student

    @property
    def teacher(self) -> DomainModel:
        """The teacher, on the device of the student."""
        model = self._teachers[0]
        if next(model.parameters()).device != self.device:
            model.to(self.device)
        return model

    def build_model(self, backbone: Backbone, spec: DataSpec) -> DomainModel:
        """Make a model of the teacher's class, for data as the teacher's."""
        teacher = self._teachers[0]
        theirs, ours = teacher.spec.to_dict(), spec.to_dict()
        differing = [k for k in theirs if k != "max_length" and theirs[k] != ours.get(k)]
        if type(spec) is not type(teacher.spec) or differing:
            text = "; ".join(f"{k}: {ours.get(k)} and {theirs[k]}" for k in differing or ["domain"])
            raise ConfigError(
                f"{type(self).__name__}: the data must be as the teacher's, got {text} (data and teacher); use "
                f"the data module that {self.teacher_name} was trained with."
            )
        student = type(teacher)(backbone, spec, **teacher.arguments)
        self.new_layers = new_layers(teacher.backbone, backbone)
        if not self.new_layers:
            raise ConfigError(
                "student: keeps all layers of the teacher, so nothing is left to learn; put M in its pattern, such as "
                "pattern=MMMA."
            )
        self.check(teacher.backbone, backbone)
        return student

    def load_initial(self) -> None:
        """Copy what the student shares with the teacher; then load ``init_from``."""
        fresh = tuple(f"backbone.layers.{i}.mixer." for i in self.new_layers)
        tensors = {k: v for k, v in self._teachers[0].state_dict().items() if not k.startswith(fresh)}
        report = load_state(self.model, tensors, source=f"the weights of {self.teacher_name}", allow_missing=fresh)
        self._loaded(self.teacher_name, report)
        if is_pretrained(self._student_name) and self.init_from is None:
            log.warning(
                "student: of %s the structure alone is taken, and none of its weights; a student's weights to begin "
                "with are named by --model.init_from.", self._student_name,
            )  # fmt: skip
        self.seed()
        super().load_initial()

    def seed(self) -> None:
        """Set the new layers' weights from the teacher's, where the method does."""

    def seed_new_layers(self) -> None:
        """Give the new layers the teacher's values, keys and queries."""
        for old, new in replaced(self._teachers[0].backbone, self.model.backbone):
            seed_mamba2(old, new)

    def card_notes(self) -> dict[str, str]:
        """What the model's card says beside its numbers."""
        kept = [i for i in range(self.model.backbone.num_layers) if i not in self.new_layers]
        layers = f"Of its layers {', '.join(map(str, kept))} are the teacher's own." if kept else ""
        return {"distillation": f"Student of {self.teacher_name} by {self.method}. {layers}".strip()}

    # ------------------------------------------------------------ training

    def configure_optimizers(self) -> Any:
        """The optimizer, with a schedule that begins anew with every stage."""
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError(f"{type(self).__name__}: stages need a run of known length; set trainer.max_steps.")
        self._steps, self._borders = steps, stage_borders(self.stages, int(steps))
        optimizer, _ = build_optimizer(self.model, self.optimizer_config, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": LambdaLR(optimizer, self.rate), "interval": "step"},
        }

    def rate(self, step: int) -> float:
        """Learning rate before optimizer step ``step``, as a multiple of the optimizer's."""
        stage = stage_at(self._borders, step)
        begin, end = self._borders[stage : stage + 2]
        return self.rates[stage] * lr_factor(step - begin, self.optimizer_config, end - begin)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add where the stages begin."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["stages"] = list(self._borders)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember where the stages began."""
        super().on_load_checkpoint(checkpoint)
        self._saved_borders = list(checkpoint.get("stages", []))

    def on_fit_start(self) -> None:
        """Refuse processes that would wait for gradients that a stage does not make."""
        super().on_fit_start()
        kwargs = getattr(self.trainer.strategy, "_ddp_kwargs", None)
        if kwargs is not None and self.trainer.world_size > 1 and not kwargs.get("find_unused_parameters"):
            raise ConfigError(
                f"{type(self).__name__}: a stage trains a part of the student; with several processes set "
                "--trainer.strategy ddp_find_unused_parameters_true."
            )

    def on_train_start(self) -> None:
        """Refuse to go on in another stage than the one that was left."""
        super().on_train_start()
        step, before = self.global_step, self._saved_borders
        if before and before != self._borders and stage_at(before, step) != stage_at(self._borders, step):
            raise ConfigError(
                f"{type(self).__name__}: step {step} was of stage {stage_at(before, step) + 1}, and would be of stage "
                f"{stage_at(self._borders, step) + 1}; leave trainer.max_steps and model.stages as they were."
            )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Begin a stage when it is its turn."""
        super().on_train_batch_start(batch, batch_idx)
        stage = stage_at(self._borders, self.global_step)
        if stage != self._stage:
            self._begin(stage)

    def _begin(self, stage: int) -> None:
        fresh = self.global_step == self._borders[stage]
        if fresh and self.global_step > 0:
            self.measure(stage_at(self._borders, self.global_step - 1))
        if fresh:
            self.optimizers(use_pl_optimizer=False).state.clear()  # type: ignore[union-attr]
        count = 0
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(self.learns(stage, name))
            parameter.grad = None
            count += parameter.numel() * parameter.requires_grad
        self._stage = stage
        log.info(
            "stage %d, steps %d to %d: %s parameters learn", stage + 1, *self._borders[stage : stage + 2], f"{count:,}"
        )

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of a batch in the current stage."""
        assert self._stage is not None
        loss = self.logit_loss(batch) if self._stage == 2 else self.combine(self.layer_losses(self._stage, batch))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["ids"]))
        self.log("train/stage", float(self._stage + 1), batch_size=len(batch["ids"]))
        return loss

    def logit_loss(self, batch: Batch) -> Tensor:
        """Loss of the last stage: the student's logits against the teacher's, where a token is asked for."""
        student, teacher, _ = self._asked(batch)
        return soft_loss(student, teacher, self.temperature)

    def _asked(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits of student and teacher (N, V) and the true tokens (N,), where one is asked for."""
        with torch.no_grad():
            wanted, targets = self.teacher.token_logits(batch)
        logits, _ = self.model.token_logits(batch)
        asked = targets != IGNORED
        return logits[asked], wanted[asked], targets[asked]

    # ------------------------------------------------------------ evaluation

    def make_metrics(self, spec: DataSpec) -> nn.Module:
        """Means over all tokens that are asked for."""
        return nn.ModuleDict({name: MeanMetric() for name in ("loss", "kl", "teacher_loss")})

    def evaluate(self, metrics: Any, batch: Batch) -> None:
        """Add a batch to the metrics."""
        student, teacher, targets = self._asked(batch)
        if len(targets):
            metrics["loss"].update(F.cross_entropy(student.float(), targets), len(targets))
            metrics["kl"].update(divergence(student, teacher), len(targets))
            metrics["teacher_loss"].update(F.cross_entropy(teacher.float(), targets), len(targets))

    def summarise(self, metrics: Any) -> dict[str, Tensor]:
        """Loss, perplexity and bits of the student, and its distance from the teacher."""
        loss = metrics["loss"].compute()
        bits = loss / torch.log(torch.tensor(2.0, device=loss.device))
        others = {name: metrics[name].compute() for name in ("kl", "teacher_loss")}
        return {"loss": loss, "perplexity": loss.exp(), "bits_per_token": bits, **others}

    @torch.no_grad()
    def measure(self, stage: int) -> None:
        """Log what the student is worth at the end of a stage, over the validation data."""
        data = getattr(self.trainer, "datamodule", None)
        loader = data.val_dataloader() if isinstance(data, BaseData) else []
        limit = self.trainer.limit_val_batches
        count = limit if isinstance(limit, int) else int(limit * len(loader))
        if not len(loader) or not count:
            return
        training, metrics = self.training, self.make_metrics(self.model.spec).to(self.device)
        self.eval()
        with self.trainer.precision_plugin.val_step_context():
            for batch in itertools.islice(loader, count):
                moved = self.trainer.strategy.batch_to_device(batch, self.device, 0)
                self.evaluate(metrics, moved)
        self.train(training)
        found = {f"stage{stage + 1}/{name}": float(value) for name, value in self.summarise(metrics).items()}
        log.info("end of stage %d: %s", stage + 1, "  ".join(f"{k} {v:.4g}" for k, v in found.items()))
        for logger in self.trainer.loggers:  # once; what `log` is given stands in all further rows
            logger.log_metrics(found, step=self.global_step - 1)

    def predict_step(self, batch: Batch, batch_idx: int) -> Any:
        """Refuse: what a student predicts is for the pipelines of its domain.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            f"{type(self).__name__} does not predict; its run folder holds an ordinary model, for `vertebra run`."
        )


class MohawkTask(DistillationTask):
    """MOHAWK: matrices, then features, then logits.

    | stage | minimises | learns |
    | --- | --- | --- |
    | 1 | distance of the mixing matrices, summed over layers | the new layers' Mamba-2 |
    | 2 | distance of the features behind the layers, on the teacher's input, summed over layers | the new layers |
    | 3 | cross-entropy against the teacher's soft-max | all |

    With frozen MLPs stage 2 compares what the token mixers add, and MLPs learn in no stage. The first stage compares
    head by head, at a cost quadratic in the length.

    Args:
        teacher: See ``DistillationTask``.
        student: See ``DistillationTask``; the name of a preset gets MOHAWK's form of Mamba-2, with a head for every
            head of attention, unless ``mamba_form`` or sizes are typed.
        optimizer: See ``DistillationTask``.
        stages: See ``DistillationTask``; the paper's are 80 M, 160 M and 2.76 B tokens.
        rates: See ``DistillationTask``.
        temperature: See ``DistillationTask``.
        freeze_mlps: Whether the MLPs keep the teacher's weights.
        seed_mixers: Begin with the teacher's values, keys and queries, as mmMamba does.
        init_from: See ``DistillationTask``.
    """

    form: ClassVar[Form] = "mohawk"
    method: ClassVar[str] = "MOHAWK"

    def __init__(
        self,
        teacher: str,
        student: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        stages: Sequence[float] = (80, 160, 2760),
        rates: Sequence[float] = (2.0, 1.0, 1.0),
        temperature: float = 1.0,
        freeze_mlps: bool = False,
        seed_mixers: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            teacher,
            student,
            optimizer=optimizer,
            stages=stages,
            rates=rates,
            temperature=temperature,
            init_from=init_from,
        )
        self.freeze_mlps, self.seed_mixers = freeze_mlps, seed_mixers

    def check(self, teacher: Backbone, student: Backbone) -> None:
        """Refuse other numbers of heads where they are compared, and weights that cannot be seeds."""
        for old, new in replaced(teacher, student):
            if self.stages[0] and new.shape.num_heads != old.num_heads:
                raise ConfigError(
                    f"student: stage 1 compares head by head, so Mamba-2 must have {old.num_heads} heads as the "
                    f"teacher's attention, got {new.shape.num_heads}; write expand=1,mamba_head_dim={old.head_dim}, or "
                    "leave the stage out with stages [0, ...]."
                )
            if self.seed_mixers:
                check_seed(old, new)

    def seed(self) -> None:
        """Seed the new layers where that was asked for."""
        if self.seed_mixers:
            self.seed_new_layers()

    def layer_losses(self, stage: int, batch: Batch) -> list[Tensor]:
        """As in ``DistillationTask``."""
        lesson = teach(self.teacher, batch)
        if stage == 0:
            return matrix_distances(self.teacher, self.model, lesson, self.new_layers)
        return hidden_distances(self.teacher, self.model, lesson, self.new_layers, mixers=self.freeze_mlps)

    def combine(self, losses: list[Tensor]) -> Tensor:
        """Sum over layers."""
        return torch.stack(losses).sum()

    def learns(self, stage: int, name: str) -> bool:
        """As in ``DistillationTask``."""
        if self.freeze_mlps and ".mlp." in name:
            return False
        if stage == 2:
            return True
        part = "mixer." if stage == 0 else ""
        return name.startswith(tuple(f"backbone.layers.{i}.{part}" for i in self.new_layers))


class MmMambaTask(DistillationTask):
    """mmMamba: Mamba-2 seeded with the weights of attention; its new parameters, then all of its own, then the logits.

    | stage | minimises | learns |
    | --- | --- | --- |
    | 1 | 1000 x squared difference of the heads' outputs, meant over layers | what attention does not have |
    | 2 | the same | also the seeded queries, keys and values |
    | 3 | KL from the teacher | the same as in stage 2 |

    In the first two stages every layer reads what the teacher's read. The last projection of the layers, MLPs, norms,
    embedding, head and kept attention layers stay the teacher's.

    Args:
        teacher: See ``DistillationTask``.
        student: See ``DistillationTask``; the name of a preset gets mmMamba's form of Mamba-2, and all of its sizes.
        optimizer: See ``DistillationTask``.
        stages: See ``DistillationTask``; the paper's are 20,000, 50,000 and 20,000 steps.
        rates: See ``DistillationTask``; the paper's learning rates are 1e-3, 5e-4 and 5e-5.
        temperature: See ``DistillationTask``.
        init_from: See ``DistillationTask``.
    """

    form: ClassVar[Form] = "mmmamba"
    method: ClassVar[str] = "mmMamba"
    NEW: ClassVar[tuple[str, ...]] = ("conv1d.", "z_proj.", "dt_proj.", "dt_bias", "A_log", "norm.")
    SEEDED: ClassVar[tuple[str, ...]] = ("in_proj.",)

    def __init__(
        self,
        teacher: str,
        student: BackboneConfig | str,
        *,
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008  # frozen
        stages: Sequence[float] = (20, 50, 20),
        rates: Sequence[float] = (1.0, 0.5, 0.05),
        temperature: float = 1.0,
        init_from: str | None = None,
    ) -> None:
        super().__init__(
            teacher,
            student,
            optimizer=optimizer,
            stages=stages,
            rates=rates,
            temperature=temperature,
            init_from=init_from,
        )

    def check(self, teacher: Backbone, student: Backbone) -> None:
        """Refuse another form of Mamba-2, and weights that cannot be seeds."""
        for old, new in replaced(teacher, student):
            if new.shape.form != self.form:
                raise ConfigError(
                    f"student: mmMamba's stages need its form of Mamba-2, got {new.shape.form!r}; write "
                    "mamba_form=mmmamba."
                )
            check_seed(old, new)

    def seed(self) -> None:
        """Seed all new layers."""
        self.seed_new_layers()

    def layer_losses(self, stage: int, batch: Batch) -> list[Tensor]:
        """As in ``DistillationTask``."""
        return inner_distances(self.teacher, self.model, teach(self.teacher, batch), self.new_layers)

    def combine(self, losses: list[Tensor]) -> Tensor:
        """1000 times the mean over layers."""
        return 1000 * torch.stack(losses).mean()

    def logit_loss(self, batch: Batch) -> Tensor:
        """KL from the teacher."""
        student, teacher, _ = self._asked(batch)
        return divergence(student, teacher, self.temperature)

    def learns(self, stage: int, name: str) -> bool:
        """As in ``DistillationTask``."""
        parts = self.NEW if stage == 0 else self.NEW + self.SEEDED
        return name.startswith(tuple(f"backbone.layers.{i}.mixer.{part}" for i in self.new_layers for part in parts))
