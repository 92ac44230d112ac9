"""Published iLLaMA checkpoints: the key names of the paper's code, from and to ours.

The checkpoints of https://arxiv.org/abs/2404.06773 hold a bare state dict, or one under ``model``; their names are
those of a vision transformer with ``fc1``, ``fc2`` and ``fc3`` for SwiGLU's gate, down and up projections.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vertebra.backbones.pretrained import LoadReport, load_state
from vertebra.domains.conversion import Converter
from vertebra.domains.vision.model import ImageClassifier
from vertebra.errors import LoadError

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


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a published checkpoint to those of an ``ImageClassifier`` with an iLLaMA backbone."""
    return {
        _renamed(name, _THEIRS, _INSIDE, "backbone.layers", ("norm.", "backbone.norm.")): t for name, t in state.items()
    }


def to_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an ``ImageClassifier`` with an iLLaMA backbone to those of a published checkpoint."""
    return {_renamed(name, _OURS, _OUTSIDE, "blocks", ("backbone.norm.", "norm.")): t for name, t in state.items()}


def _renamed(name: str, pattern: re.Pattern[str], parts: dict[str, str], stack: str, norm: tuple[str, str]) -> str:
    if (match := pattern.fullmatch(name)) and match[2] in parts:
        return f"{stack}.{match[1]}.{parts[match[2]]}.{match[3]}"
    return norm[1] + name.removeprefix(norm[0]) if name.startswith(norm[0]) else name


def is_published(source: str) -> bool:
    """Whether the name is that of a file of weights from elsewhere."""
    return Path(source).suffix in (".pth", ".pt", ".bin") and Path(source).is_file()


def read_published(model: ImageClassifier, path: str) -> LoadReport:
    """Load a published checkpoint; a head for other classes stays fresh, positions are interpolated.

    Args:
        model: A classifier whose backbone is the checkpoint's, with ``causal=false,soft_mask=true``.
        path: The file.

    Raises:
        LoadError: It cannot be read, or its weights do not fit.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the paper's code saves its options beside them
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds: pickle, zip, runtime and end-of-file errors
        raise LoadError(
            f"{path}: cannot be read without running code from it ({str(e).splitlines()[0] if str(e) else e!r}); load "
            "it in a place you trust and save its state dict alone."
        ) from e
    state = found.get("model", found) if isinstance(found, dict) else None
    if not isinstance(state, dict) or "patch_embed.proj.weight" not in state:
        raise LoadError(f"{path}: must hold the state dict of an image model, with patch_embed.proj.weight.")
    tensors = model.adapt(from_published(state))
    own = model.state_dict()
    head = [k for k in ("head.weight", "head.bias") if k in own and k in tensors and own[k].shape != tensors[k].shape]
    tensors = {k: v for k, v in tensors.items() if k not in head}
    return load_state(model, tensors, source=f"the weights of {path}", allow_missing=tuple(head))


CONVERTERS: tuple[Converter, ...] = ()
