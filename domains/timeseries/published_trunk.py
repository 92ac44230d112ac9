"""Names of what the scaling-law models and Moirai share: the transformer between embedding and head.

Both are of one code, so that a layer's parts are called the same, and are those of ``TSFM`` here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.tsfm import TSFMConfig
from vertebra.errors import LoadError

_LAYER = {
    "norm1": ("norm1",),
    "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mixer.q_norm": ("self_attn.q_norm",),
    "mixer.k_norm": ("self_attn.k_norm",),
    "mixer.proj": ("self_attn.out_proj",),
    "norm2": ("norm2",),
    "mlp.gate_proj": ("ffn.fc_gate",),
    "mlp.up_proj": ("ffn.fc1",),
    "mlp.down_proj": ("ffn.fc2",),
}
"""Parts of a layer by their names here and there; several are put together along their outputs."""


def trunk_names(depth: int) -> dict[str, tuple[str, ...]]:
    """Return what each parameter of a ``TSFM`` backbone is called: ``{ours: (theirs, ...)}``.

    Args:
        depth: Number of layers.
    """
    names: dict[str, tuple[str, ...]] = {}
    for layer in range(depth):
        for ours, theirs in _LAYER.items():
            parts = tuple(f"encoder.layers.{layer}.{name}.weight" for name in theirs)
            names[f"backbone.layers.{layer}.{ours}.weight"] = parts
    return names | {"backbone.norm.weight": ("encoder.norm.weight",)}


def trunk_config(tensors: Mapping[str, Tensor], *, causal: bool, who: str, give: str) -> TSFMConfig:
    """Work out the structure of a trunk from its tensors.

    Args:
        tensors: The checkpoint's.
        causal: Whether it is a decoder.
        who: What to call it in errors.
        give: What to ask for in errors.

    Raises:
        LoadError: The tensors are not those of such a trunk.
    """
    norm_name, inner_name = "encoder.layers.0.self_attn.q_norm.weight", "encoder.layers.0.ffn.fc1.weight"
    for name, axes in ((norm_name, 1), (inner_name, 2)):
        if name not in tensors:
            raise LoadError(f"{who}: the checkpoint lacks {name!r}; give {give}.")
        if tensors[name].ndim != axes:
            raise LoadError(f"{who}: {name!r} must have {axes} axes, got {tuple(tensors[name].shape)}; give {give}.")
    (width,), (hidden, dim) = tensors[norm_name].shape, tensors[inner_name].shape
    if dim % width or width % 4:
        raise LoadError(f"{who}: a width of {dim} must be that of whole heads, each a multiple of 4; got {width}.")
    layers = [int(m[1]) for name in tensors if (m := re.match(r"encoder\.layers\.(\d+)\.", name))]
    return TSFMConfig(dim=dim, depth=max(layers) + 1, causal=causal, num_heads=dim // width, hidden_dim=hidden)


def check_names(tensors: Mapping[str, Tensor], used: Collection[str], *, who: str, give: str) -> None:
    """Refuse a checkpoint that has other tensors than those that are used.

    Raises:
        LoadError: A tensor is missing, or there is one without a place.
    """
    if missing := sorted(set(used) - tensors.keys()):
        raise LoadError(
            f"{who}: the checkpoint lacks {missing[0]!r}, {len(missing)} tensors in all; is the file whole?"
        )
    if extra := sorted(tensors.keys() - set(used)):
        raise LoadError(f"{who}: the model has no place for {extra[0]!r}, {len(extra)} tensors in all; give {give}.")


def gathered(tensors: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Return tensors by names of ours, from ``{ours: (theirs, ...)}``."""
    return {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names.items()}


def scattered(own: Mapping[str, Tensor], names: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Return copies of tensors by their names, the inverse of ``gathered``."""
    found: dict[str, Tensor] = {}
    for ours, theirs in names.items():
        parts = own[ours].chunk(len(theirs))
        found |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    return found


def plain_trunk(config: object) -> bool:
    """Whether a backbone's constants, which tensors do not show, are those of the published ones."""
    return isinstance(config, TSFMConfig) and (config.rope_theta, config.norm_eps) == (10000.0, 1e-5)


def told(checkpoint: Checkpoint) -> dict[str, object] | None:
    """Return ``config.json``, empty where there is none; None where it cannot be read or is of another library."""
    try:
        config = checkpoint.config
    except LoadError:
        return None
    foreign = "model_type" in config or "architectures" in config or "format" in config
    return None if foreign else dict(config)


def tensors_of(checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """Return the tensors; none where they cannot be read, which is told when they are asked for."""
    try:
        return checkpoint.tensors
    except LoadError:
        return {}
