"""Students of attention: a hybrid's config made to fit a teacher, and Mamba-2 seeded with the weights of attention.

Sources: MOHAWK (https://arxiv.org/abs/2408.10189) and mmMamba (https://arxiv.org/abs/2502.13145, section 3.2). What a
student takes over as it is, the MLPs, norms and the attention layers that it keeps, must be built as the teacher's; a
Mamba-2 head takes the place of an attention head.

Shapes: D width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vertebra.backbones.base import Backbone, BackboneConfig, resolve, split_name
from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.illama import ILLaMAConfig
from vertebra.backbones.layers.attention import Attention
from vertebra.backbones.layers.mamba2 import Form, Mamba2
from vertebra.backbones.layers.mixer import TokenMixer
from vertebra.backbones.stack import Block
from vertebra.errors import ConfigError

SHAPE = ("dim", "depth", "hidden_dim", "causal")
"""Fields of a student that must be the teacher's."""
TAKEN = (
    "num_heads", "num_kv_heads", "window", "attention_bias", "proj_bias", "rope_fraction", "rope_theta",
    "rope_interleaved", "norm_eps",
)  # fmt: skip
"""Fields that follow the teacher, since the weights they belong to do."""
RECURRENT = (
    "mamba_form", "mamba_bias", "expand", "mamba_head_dim", "mamba_groups", "state_dim", "s6_state_dim", "dt_rank",
    "s6_norms", "conv_kernel", "conv_bias", "dt_limit",
)  # fmt: skip
"""The same for a teacher that has Mamba layers, which the student keeps."""


def teacher_fields(teacher: BackboneConfig) -> dict[str, Any]:
    """Return the fields of a hybrid whose attention layers, MLPs and norms are those of a teacher.

    Raises:
        ConfigError: The teacher is of a family without such layers, or not causal.
    """
    if not isinstance(teacher, (ILLaMAConfig, HybridConfig)):
        raise ConfigError(
            f"teacher: must be built of RMSNorm, attention and SwiGLU, an iLLaMA or a hybrid, got one of the family "
            f"{teacher.family}."
        )
    if not teacher.causal:
        raise ConfigError("teacher: must be causal, since its student reads from left to right; got causal=false.")
    if isinstance(teacher, HybridConfig):
        return {name: getattr(teacher, name) for name in (*SHAPE, *TAKEN)}
    return {
        "dim": teacher.dim,
        "depth": teacher.depth,
        "hidden_dim": teacher.swiglu_dim,
        "causal": True,
        "num_heads": teacher.num_heads,
        "num_kv_heads": teacher.num_kv_heads,
        "window": teacher.window,
        "attention_bias": teacher.bias,
        "proj_bias": teacher.proj_bias,
        "rope_fraction": 1.0,
        "rope_theta": teacher.rope_theta,
        "rope_interleaved": True,
        "norm_eps": teacher.norm_eps,
    }


def form_fields(teacher: dict[str, Any], form: Form) -> dict[str, Any]:
    """Return the fields that give a student one Mamba-2 head for every query head.

    Args:
        teacher: Of ``teacher_fields``.
        form: Form of Mamba-2; that of mmMamba also has the width and biases of the teacher's heads.
    """
    heads = teacher["num_heads"]
    width = teacher["dim"] // heads
    fields: dict[str, Any] = {"mamba_form": form, "expand": 1, "mamba_head_dim": width, "mamba_groups": heads}
    if form == "mmmamba":
        fields |= {"state_dim": width, "conv_kernel": 2, "mamba_bias": teacher["attention_bias"]}
    return fields


def student_config(teacher: BackboneConfig, student: BackboneConfig | str, form: Form) -> HybridConfig:
    """Return the config of a student, with the teacher's fields where its weights are taken over.

    A name brings the pattern and the sizes that the method leaves open. What follows from teacher and method is filled
    in, unless it was typed (``hybrid_nano,pattern=MMA,expand=2``) or stands in a config: that must fit.

    Args:
        teacher: Config of the teacher.
        student: A hybrid preset, with or without changed fields, or a config.
        form: Form of Mamba-2 where the name tells none.

    Raises:
        ConfigError: The student is no hybrid, or does not fit the teacher; the text says what to change.
    """
    wanted = teacher_fields(teacher)
    typed = split_name(student)[1] if isinstance(student, str) else {}
    config = resolve(student)
    if not isinstance(config, HybridConfig):
        raise ConfigError(
            f"student: must be a hybrid, such as hybrid_nano,pattern=MMMA, got one of the family {config.family}."
        )
    if isinstance(student, str):
        filled = form_fields(wanted, form) if typed.get("mamba_form", form) == form else {}
        if isinstance(teacher, HybridConfig) and set(teacher.layout) != {"A"}:
            filled = {name: getattr(teacher, name) for name in RECURRENT}
        for name in typed:
            filled.pop(name, None)
        taken = {name: wanted[name] for name in TAKEN if name not in typed}
        own = [name for name in SHAPE if getattr(config, name) != wanted[name]]
        if own:
            raise ConfigError(_mismatch(config, wanted, own))
        config = config.replace(**taken, **filled)
    wrong = [name for name in (*SHAPE, *TAKEN) if not _same(config, wanted, name)]
    if wrong:
        raise ConfigError(_mismatch(config, wanted, wrong))
    return config


def _same(config: HybridConfig, wanted: dict[str, Any], name: str) -> bool:
    if name == "num_kv_heads":
        return (config.num_kv_heads or config.num_heads) == (wanted[name] or wanted["num_heads"])
    if name == "proj_bias" and not wanted["attention_bias"]:
        return True
    found: bool = getattr(config, name) == wanted[name]
    return found


def _mismatch(config: HybridConfig, wanted: dict[str, Any], names: list[str]) -> str:
    found = ", ".join(f"{name} {getattr(config, name)}" for name in names)
    asked = ",".join(f"{name}={str(wanted[name]).lower()}" for name in names)
    return f"student: must have what it takes over from the teacher, got {found}; write {asked}."


def _mixer(backbone: Backbone, index: int) -> TokenMixer:
    block = backbone.get_submodule(f"layers.{index}")
    assert isinstance(block, Block)
    return block.mixer


def new_layers(teacher: Backbone, student: Backbone) -> list[int]:
    """Return the layers whose attention the student replaces by Mamba-2; all others are built alike.

    Raises:
        ConfigError: A layer is neither.
    """
    found = []
    for index in range(teacher.num_layers):
        old, new = _mixer(teacher, index), _mixer(student, index)
        if isinstance(old, Attention) and isinstance(new, Mamba2):
            found.append(index)
        elif not _alike(old, new):
            raise ConfigError(
                f"student: layer {index} must be as in the teacher, or Mamba-2 in place of attention, got "
                f"{type(new).__name__} for {type(old).__name__}; change the pattern, or the sizes of Mamba-2."
            )
    return found


def replaced(teacher: Backbone, student: Backbone) -> Iterator[tuple[Attention, Mamba2]]:
    """Yield attention and the Mamba-2 in its place, for every one of ``new_layers``."""
    for index in new_layers(teacher, student):
        old, new = _mixer(teacher, index), _mixer(student, index)
        assert isinstance(old, Attention)
        assert isinstance(new, Mamba2)
        yield old, new


def _alike(old: TokenMixer, new: TokenMixer) -> bool:
    if type(old) is not type(new) or getattr(old, "shape", None) != getattr(new, "shape", None):
        return False
    return {n: p.shape for n, p in old.named_parameters()} == {n: p.shape for n, p in new.named_parameters()}


@torch.no_grad()
def seed_mamba2(attention: Attention, mamba: Mamba2) -> None:
    """Set x, B and C of a Mamba-2 to the values, keys and queries of attention, and the last projection to its own.

    Without rotary embedding. Key-value heads that several query heads share are repeated. All else keeps its values.

    Args:
        attention: Weights of the teacher.
        mamba: With as many heads and groups as attention has query heads, and states as wide as its heads.

    Raises:
        ConfigError: Heads, widths or biases differ.
    """
    check_seed(attention, mamba)
    heads, width = attention.num_heads, attention.head_dim
    repeats = heads // attention.num_kv_heads
    begin = 0 if mamba.z_proj is not None else mamba.shape.inner_dim  # behind the gate's rows

    def moved(rows: Tensor) -> Tensor:
        q, k, v = rows.unflatten(0, (-1, width)).split([heads, attention.num_kv_heads, attention.num_kv_heads])
        return torch.cat([v.repeat_interleave(repeats, 0), k.repeat_interleave(repeats, 0), q]).flatten(0, 1)

    place = slice(begin, begin + 3 * heads * width)
    mamba.in_proj.weight[place] = moved(attention.qkv.weight)
    mamba.out_proj.weight.copy_(attention.proj.weight)
    if mamba.in_proj.bias is not None:
        mamba.in_proj.bias.zero_()
        if attention.qkv.bias is not None:
            mamba.in_proj.bias[place] = moved(attention.qkv.bias)
    if mamba.out_proj.bias is not None:
        mamba.out_proj.bias.zero_()
        if attention.proj.bias is not None:
            mamba.out_proj.bias.copy_(attention.proj.bias)


def check_seed(attention: Attention, mamba: Mamba2) -> None:
    """Refuse a Mamba-2 that cannot take the weights of an attention layer.

    Raises:
        ConfigError: Heads, widths or biases differ, or attention has norms of queries and keys.
    """
    shape, heads, width = mamba.shape, attention.num_heads, attention.head_dim
    asked = {"heads": heads, "groups": heads, "head width": width, "state width": width}
    found = {
        "heads": shape.num_heads, "groups": shape.groups, "head width": shape.head_dim, "state width": shape.state_dim,
    }  # fmt: skip
    if found != asked:
        raise ConfigError(
            f"seed: Mamba-2 must have {_list(asked)}, as attention has, got {_list(found)}; write expand=1,"
            f"mamba_head_dim={width},mamba_groups={heads},state_dim={width}."
        )
    if attention.qkv.bias is not None and not shape.bias:
        raise ConfigError("seed: the teacher's projections have biases, so Mamba-2's must too; write mamba_bias=true.")
    if attention.q_norm is not None:
        raise ConfigError("seed: attention with norms of its queries and keys cannot become Mamba-2, which has none.")


def _list(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {value}" for name, value in sizes.items())
