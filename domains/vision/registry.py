"""Our image classifiers in timm's registry: ``timm.create_model("illama_tiny")`` after ``import vertebra``.

Every preset but those for tests is there by its name. iLLaMA has the paper's soft mask, and state dicts with the key
names of its published checkpoints.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vertebra.backbones.base import resolve
from vertebra.backbones.catalog import presets
from vertebra.domains.vision.model import ImageClassifier
from vertebra.domains.vision.published import from_published, to_published
from vertebra.domains.vision.spec import VisionSpec

_LICENCE = "apache-2.0"


class TimmImageClassifier(ImageClassifier):
    """An ``ImageClassifier`` with the methods that timm's scripts call."""

    def __init__(self, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.num_classes = len(self.spec.classes)
        self.num_features = self.head_hidden_size = self.embed_dim = self.backbone.config.dim
        self.published_names = self.backbone.config.family == "illama"

    def forward_features(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to what the backbone makes of every position (B, N, D), [cls] last."""
        y = self.backbone(self.embed_patches(images))
        return y if y.ndim == 3 else y.flatten(1, -2)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map features (B, N, D) to logits (B, K), or to the pooled features (B, D)."""
        pooled = self.dropout(x[:, -1] if self.pooling == "cls" else x.mean(1))
        return pooled if pre_logits else self.head(pooled)

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Put a fresh head on; 0 classes for none."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute layers again in the backward pass, in less memory."""
        self.backbone.set_recompute(enable)

    def group_matcher(self, coarse: bool = False) -> Callable[[str], int]:
        """Return what tells timm the layer of a parameter: 0 before the backbone, then its layers, then the rest."""

        def layer(name: str) -> int:
            if name.partition(".")[0] in self.input_parts:
                return 0
            inside = name.removeprefix("backbone.")
            return 1 + (self.backbone.layer_of(inside) if inside != name else self.backbone.num_layers)

        return layer

    def state_dict(self, *args: Any, **options: Any) -> Any:
        """Return the weights, under the published names where there are such."""
        state = super().state_dict(*args, **options)
        return to_published(state) if self.published_names else state

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Load weights, under the published names where there are such."""
        return super().load_state_dict(from_published(dict(state_dict)), strict=strict, assign=assign)


def _classifier(
    word: str,
    *,
    img_size: int | tuple[int, int] = 224,
    in_chans: int = 3,
    num_classes: int = 1000,
    patch_size: int = 16,
    drop_rate: float = 0.0,
    drop_path_rate: float = 0.0,
    global_pool: str | None = None,
) -> TimmImageClassifier:
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    spec = VisionSpec(
        task="classification",
        channels=in_chans,
        height=height,
        width=width,
        classes=tuple(str(i) for i in range(num_classes)),
        mean=(0.485, 0.456, 0.406)[:in_chans],
        std=(0.229, 0.224, 0.225)[:in_chans],
        crop="squash" if height >= 384 else "centre",
        crop_fraction=1.0 if height >= 384 else 0.875,
    )
    changes: dict[str, Any] = {"drop_path": drop_path_rate} if drop_path_rate else {}
    config = resolve(word)
    changes |= {"causal": False, "soft_mask": True} if config.family == "illama" else {"causal": False}
    pooling: Any = {"avg": "mean", "token": "cls", None: "auto"}.get(global_pool, "auto")
    return TimmImageClassifier(
        config.replace(**changes).build(), spec, patch_size=patch_size, dropout=drop_rate, pooling=pooling
    )


def _entry(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **options: Any) -> nn.Module:
        def build(**given: Any) -> TimmImageClassifier:
            return _classifier(name, **given)

        return build_model_with_cfg(build, name, pretrained, **options)

    create.__name__ = create.__qualname__ = name
    create.__module__ = __name__
    create.__doc__ = f"Image classifier on the preset {name}."
    return create


def register() -> list[str]:
    """Enter the models into timm's registry; return their names."""
    module = sys.modules[__name__]
    names = [name for name in presets() if not name.endswith("_test")]
    settings = {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": False,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": _LICENCE,
    }
    module.default_cfgs = generate_default_cfgs({name: dict(settings) for name in names})  # type: ignore[attr-defined]
    module.__all__ = []  # type: ignore[attr-defined]  # timm adds the names
    for name in names:
        register_model(_entry(name))
    return names


NAMES = register()
