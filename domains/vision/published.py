"""Published image models: the converters, and the key names of the iLLaMA paper's code, from and to ours.

The checkpoints of https://arxiv.org/abs/2404.06773 hold a bare state dict, or one under ``model``; their names are
those of a vision transformer with ``fc1``, ``fc2`` and ``fc3`` for SwiGLU's gate, down and up projections.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from vertebra.backbones.base import BackboneConfig
from vertebra.backbones.illama import ILLaMAConfig
from vertebra.backbones.loading.checkpoints import Checkpoint, read_weights
from vertebra.backbones.loading.pretrained import LoadReport, load_state
from vertebra.backbones.opt import OPTConfig
from vertebra.domains.conversion import Conversion, Converter, loaded
from vertebra.domains.initial import read_source
from vertebra.domains.model import DomainModel
from vertebra.domains.vision.model import ImageClassifier
from vertebra.domains.vision.published_vit import (
    Preparation,
    ViT,
    block_count,
    from_timm,
    grid_size,
    image_names,
    image_spec,
    mapping,
    patch_shape,
    read_structure,
)
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, LoadError

HEAD_WIDTH = 64
"""Of all sizes in the paper; weights do not tell it."""

_INSIDE = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "mixer.qkv",
    "attn.proj": "mixer.proj",
    "mlp.fc1": "mlp.gate_proj",
    "mlp.fc2": "mlp.down_proj",
    "mlp.fc3": "mlp.up_proj",
}
_OUTSIDE = {theirs: ours for ours, theirs in _INSIDE.items()}
_THEIRS = re.compile(r"blocks\.(\d+)\.(.+)\.(weight|bias)")
_OURS = re.compile(r"backbone\.layers\.(\d+)\.(.+)\.(weight|bias)")
_SMALL = Preparation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 0.875)
_LARGE = _SMALL._replace(crop_fraction=1.0, crop="squash")


def from_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published checkpoint to those of an ``ImageClassifier`` with an iLLaMA backbone."""
    return {
        _renamed(name, _THEIRS, _INSIDE, "backbone.layers", ("norm.", "backbone.norm.")): t for name, t in state.items()
    }


def to_published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an ``ImageClassifier`` with an iLLaMA backbone to those of a published checkpoint."""
    return {_renamed(name, _OURS, _OUTSIDE, "blocks", ("backbone.norm.", "norm.")): t for name, t in state.items()}


def _renamed(name: str, pattern: re.Pattern[str], parts: dict[str, str], stack: str, norm: tuple[str, str]) -> str:
    if (match := pattern.fullmatch(name)) and match[2] in parts:
        return f"{stack}.{match[1]}.{parts[match[2]]}.{match[3]}"
    return norm[1] + name.removeprefix(norm[0]) if name.startswith(norm[0]) else name


class PublishedILLaMA(Converter):
    """The checkpoints of the iLLaMA paper."""

    name: ClassVar[str] = "illama"
    summary: ClassVar[str] = "iLLaMA image classifiers (.pth of the paper's code)"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell by SwiGLU's third matrix beside a patch embedding and [cls]."""
        return {"blocks.0.mlp.fc3.weight", "blocks.0.attn.qkv.weight", "cls_token"} <= image_names(checkpoint)

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make the model; see ``Converter``."""
        source, tensors = checkpoint.source, checkpoint.tensors
        dim, patch = patch_shape(tensors, source)
        for name, axes in (("cls_token", 3), ("pos_embed", 3), ("blocks.0.mlp.fc1.weight", 2)):
            if name not in tensors or tensors[name].ndim != axes:
                raise LoadError(f"{source}: {name} with {axes} axes is missing; is it a checkpoint of iLLaMA?")
        size, no_position = grid_size(checkpoint, tensors, patch, has_cls=True)
        if no_position:
            raise LoadError(f"{source}: pos_embed must have a row for [cls] behind those of the patches.")
        try:
            backbone = ILLaMAConfig(
                dim=dim,
                depth=block_count(tensors, source),
                causal=False,
                soft_mask=True,
                num_heads=_heads(checkpoint, dim),
                hidden_dim=len(tensors["blocks.0.mlp.fc1.weight"]),
            )
        except ConfigError as error:
            raise LoadError(f"{source}: {error}") from error
        large = size[0] >= 384  # as the paper evaluates
        spec = image_spec(checkpoint, tensors, size, _LARGE if large else _SMALL)
        model = ImageClassifier(backbone.build(), spec, patch_size=patch, pooling="cls")
        return loaded(model, from_published(tensors), checkpoint)

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and ``config.json``, which tells what they do not; see ``Converter``."""
        config = model.backbone.config
        if not isinstance(model, ImageClassifier) or not isinstance(config, ILLaMAConfig):
            raise LoadError(
                f"{self.name}: the model must be an image classifier with an iLLaMA backbone, got a "
                f"{type(model).__name__} with {config.family}."
            )
        found = {
            "soft_mask": config.soft_mask,
            "soft_mask_rate": model.arguments["soft_mask_rate"],
            "num_kv_heads": config.num_kv_heads or config.num_heads,
            "window": max(config.windows()),
            "bias": config.bias,
            "rope_theta": config.rope_theta,
            "norm_eps": config.norm_eps,
            "pooling": model.pooling,
            "positions": "none" if model.pos_embed is None else "learned",
            "pooled_norm": model.arguments["pooled_norm"],
        }
        wanted = {
            "soft_mask": True,
            "soft_mask_rate": 0.0,
            "num_kv_heads": config.num_heads,
            "window": 0,
            "bias": True,
            "rope_theta": 10000.0,
            "norm_eps": 1e-6,
            "pooling": "cls",
            "positions": "learned",
            "pooled_norm": 0.0,
        }
        for name, value in wanted.items():
            if found[name] != value:
                raise LoadError(f"{self.name}: the model must have {name}={value}, got {found[name]}.")
        spec = model.spec
        return to_published(model.state_dict()), {
            "num_heads": config.num_heads,
            "num_classes": len(spec.classes),
            "label_names": list(spec.classes),
            "pretrained_cfg": {
                "input_size": [spec.channels, spec.height, spec.width],
                "mean": list(spec.mean),
                "std": list(spec.std),
                "crop_pct": spec.crop_fraction,
                "crop_mode": "squash" if spec.crop == "squash" else "center",
                "interpolation": spec.interpolation,
            },
        }


def _heads(checkpoint: Checkpoint, dim: int) -> int:
    told = checkpoint.config.get("num_heads") or mapping(checkpoint, "model_args").get("num_heads")
    heads = dim // HEAD_WIDTH if told is None and dim % HEAD_WIDTH == 0 else told
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise LoadError(
            f"{checkpoint.source}: a width of {dim} is that of no whole number of heads of {HEAD_WIDTH}, and the "
            'weights do not tell how many there are; put a config.json beside them with {"num_heads": N}.'
        )
    return heads


# ---------------------------------------------------------------- initial weights of a training


def is_published(source: str) -> bool:
    """Whether the name is that of a file of weights from elsewhere."""
    return Path(source).suffix in (".pth", ".pt", ".bin", ".safetensors") and Path(source).is_file()


def initial_arguments(source: str, backbone: BackboneConfig) -> dict[str, Any]:
    """Return pooling, with_cls and pooled_norm of the ``ImageClassifier`` that initial weights are of.

    Args:
        source: As ``init_weights`` or ``read_published`` takes it.
        backbone: That of the model to load into.

    Returns:
        The arguments; none where the weights are of another kind of model.

    Raises:
        LoadError: There are no weights, or they cannot be read.
        UnknownNameError: Neither a bundled model nor a file.
    """
    found: Mapping[str, Any]
    if is_published(source):
        tensors = read_weights(Path(source))
        vit = isinstance(backbone, OPTConfig)
        found = read_structure(tensors, Checkpoint(source, Path(source))).arguments if vit else {"pooling": "cls"}
    else:
        tensors, origin = read_source(source)
        if not isinstance(origin.spec, VisionSpec) or origin.spec.task != "classification":
            return {}
        found = origin.arguments
    return {
        "pooling": found.get("pooling", "auto"),
        "with_cls": "cls_token" in tensors,
        "pooled_norm": found.get("pooled_norm") or 0.0,
    }


def read_published(model: ImageClassifier, path: str) -> LoadReport:
    """Load a published checkpoint; a head for other classes stays fresh, positions are interpolated.

    Args:
        model: A classifier whose backbone is the checkpoint's: iLLaMA with ``causal=false,soft_mask=true``, or OPT
            with ``causal=false,positions=none,activation=gelu,norm_eps=1e-6`` for a vision transformer of timm.
        path: The file.

    Raises:
        LoadError: It cannot be read, or its weights do not fit.
    """
    state = read_weights(Path(path))
    if "patch_embed.proj.weight" not in state:
        raise LoadError(f"{path}: must hold the state dict of an image model, with patch_embed.proj.weight.")
    if isinstance(model.backbone.config, OPTConfig):
        tensors = from_timm(state, read_structure(state, Checkpoint(path, Path(path))))
    else:
        tensors = from_published(state)
    tensors = model.adapt(tensors)
    own = model.state_dict()
    head = [k for k in ("head.weight", "head.bias") if k in own and k in tensors and own[k].shape != tensors[k].shape]
    tensors = {k: v for k, v in tensors.items() if k not in head}
    return load_state(model, tensors, source=f"the weights of {path}", allow_missing=tuple(head))


CONVERTERS: tuple[Converter, ...] = (PublishedILLaMA(), ViT())
