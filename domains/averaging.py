"""Tasks that keep an average of the weights, which is then what is evaluated and saved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from vertebra.backbones.base import BackboneConfig
from vertebra.domains.base import DomainModel, MetricTask
from vertebra.domains.finetuning import TuneConfig
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError


class AveragedTask(MetricTask):
    """A task that may keep an exponential average of the weights.

    Args:
        backbone: As in ``BaseTask``.
        optimizer: As in ``BaseTask``.
        ema: Decay of the average; 0 for none.
        init_from: As in ``BaseTask``.
        init_parts: As in ``BaseTask``.
        freeze_backbone: As in ``BaseTask``.
        unfreeze_at: As in ``BaseTask``.
        tune: As in ``BaseTask``.
    """

    ema: Any

    def __init__(
        self,
        *,
        backbone: BackboneConfig | str | Mapping[str, Any],
        optimizer: OptimizerConfig | Mapping[str, Any] | None,
        ema: float,
        init_from: str | None,
        init_parts: Literal["backbone", "all"],
        freeze_backbone: bool,
        unfreeze_at: int | None,
        tune: TuneConfig | Mapping[str, Any] | None = None,
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
        if not 0 <= ema < 1:
            raise ConfigError(f"{type(self).__name__}: ema must be from 0 (none) and below 1, got {ema}.")
        self.ema_decay = ema
        self._averaged_step = 0

    def build(self, spec: DataSpec) -> None:
        """Build model, average and metrics for data of this spec."""
        super().build(spec)
        if self.ema_decay:
            from timm.utils.model_ema import ModelEmaV3

            self.ema = ModelEmaV3(self.model, decay=self.ema_decay, use_warmup=True)
            self.ema.requires_grad_(False)

    @property
    def final_model(self) -> DomainModel:
        """The average of the weights where the task keeps one, else the model."""
        model = self.ema.module if self.ema_decay else self.model
        assert isinstance(model, DomainModel)
        return model

    def load_initial(self) -> None:
        """Load initial weights; the average begins there too."""
        super().load_initial()
        if self.ema_decay:
            self.ema.module.load_state_dict(self.model.state_dict())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move the average towards the weights, once an optimizer step."""
        if self.ema_decay and self.global_step != self._averaged_step:
            self._averaged_step = self.global_step
            self.ema.update(self.model, step=self.global_step)
