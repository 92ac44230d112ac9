"""Image models of timm as a whole, to stand beside the shared backbones: ``timm:vit_tiny_patch16_224``.

They read pixels and have their own patches, positions and pooling, so only the vision domain takes them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from vertebra.backbones.base import Backbone, BackboneConfig, Taps
from vertebra.errors import ConfigError, UnknownNameError


@dataclass(frozen=True, kw_only=True)
class TimmConfig(BackboneConfig):
    """A model of timm.

    Args:
        name: Its name there.
        channels: Channels of the images.
        size: Height and width of the images, for models that must know it; empty for the model's own.
        options: Further arguments of the model, as ``timm.create_model`` takes them.
        dim: Width of its pooled features; found out.
        depth: Number of its blocks, 1 where it has no such list; found out.
        causal: Always false.
    """

    name: str
    channels: int = 3
    size: tuple[int, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    dim: int = 0
    depth: int = 0
    causal: bool = False

    family: ClassVar[str] = "timm"

    def __post_init__(self) -> None:
        if self.causal:
            raise ConfigError(f"timm:{self.name}: causal must be false; models of timm see the whole image.")
        if not self.dim:
            import torch

            with torch.device("meta"):
                model = self.create()
            object.__setattr__(self, "dim", int(getattr(model, "head_hidden_size", model.num_features)))
            blocks = getattr(model, "blocks", None)
            object.__setattr__(self, "depth", len(blocks) if blocks is not None else 1)
        super().__post_init__()

    def create(self) -> Any:
        """Make the model without its classifier.

        Raises:
            UnknownNameError: timm has no such model.
            ConfigError: It refuses the channels, the size or the options.
        """
        import timm

        if not timm.is_model(self.name):
            raise UnknownNameError("timm model", self.name, timm.list_models())
        options = dict(self.options)
        if self.size:
            options["img_size"] = tuple(self.size)
        try:
            return timm.create_model(self.name, in_chans=self.channels, num_classes=0, **options)
        except TypeError as error:
            if not self.size or "img_size" not in str(error):
                raise ConfigError(f"timm:{self.name}: {error}.") from error
            options.pop("img_size")  # a convolutional network takes any size
            return timm.create_model(self.name, in_chans=self.channels, num_classes=0, **options)

    def build(self) -> TimmBackbone:
        """Make the model with fresh weights."""
        return TimmBackbone(self)


class TimmBackbone(Backbone):
    """A model of timm without its classifier."""

    config: TimmConfig

    def __init__(self, config: TimmConfig) -> None:
        super().__init__(config)
        self.model = config.create()

    def pooled(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to pooled features (B, D)."""
        return self.model(images)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        hidden: list[Tensor] | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Refuse features: the model reads pixels, see ``pooled``."""
        raise ConfigError(
            f"timm:{self.config.name} reads images, not features; it serves vision/classify only. Choose a backbone of "
            "`vertebra list backbones`."
        )

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that the model exempts from weight decay."""
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else set()
        return {f"model.{name}" for name in names}

    def layer_of(self, name: str) -> int:
        """Index of the block the parameter ``name`` belongs to; 0 before the blocks, ``num_layers`` behind them."""
        parts = name.split(".")
        if "blocks" in parts and parts[parts.index("blocks") + 1].isdigit():
            return min(int(parts[parts.index("blocks") + 1]), self.num_layers - 1)
        return 0 if any(p in parts for p in ("patch_embed", "pos_embed", "cls_token", "stem")) else self.num_layers


def timm_config(name: str, fields: dict[str, Any]) -> TimmConfig:
    """Make the config that ``timm:NAME,field=value`` means; fields that are not ours go to timm."""
    own = {f.name for f in dataclasses.fields(TimmConfig)} - {"dim", "depth"}  # which timm's own arguments decide
    options = {k: v for k, v in fields.items() if k not in own}
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items() if k in own}
    return TimmConfig(name=name, **{**given, "options": {**options, **given.get("options", {})}})
