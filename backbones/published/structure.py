"""The structure of a published hybrid of Mamba and attention, read off its tensors; and the files of mamba_ssm.

Sizes, the kind of every layer, norms inside and biases show in the tensors. What does not is asked of the settings, and
settings that say otherwise than the tensors are refused.

Shapes: V vocabulary, D width, I inner width, H heads, G groups, N state width, K head width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.published.base import (
    Published,
    Renamer,
    Settings,
    count_layers,
    fuse,
    need,
    rope_theta,
    settle_head,
    told_config,
)
from vertebra.errors import ConfigError, LoadError

_SSM_FREE = {
    "layer", "d_state", "d_conv", "conv_init", "expand", "headdim", "ngroups", "A_init_range", "dt_min", "dt_max",
    "dt_init", "dt_scale", "dt_init_floor", "dt_limit", "dt_rank", "conv_bias", "chunk_size", "use_mem_eff_path",
    "use_fast_path", "rmsnorm", "norm_before_gate", "D_has_hdim", "d_ssm", "bias", "process_group", "sequence_parallel",
}  # fmt: skip
_ATTENTION_FREE = {
    "causal", "d_conv", "head_dim", "num_heads", "num_heads_kv", "out_proj_bias", "qkv_proj_bias", "rotary_emb_dim",
    "rotary_emb_base", "rotary_emb_interleaved", "mlp_dim", "softmax_scale",
}  # fmt: skip


def read_structure(
    tensors: Mapping[str, Tensor],
    settings: Settings,
    *,
    eps: float,
    groups: int | None,
    names: Mapping[str, str],
    rope: float = 0.0,
    theta: float | None = None,
) -> HybridConfig:
    """Read the structure off tensors by names of ours, and refuse settings that say otherwise.

    Args:
        tensors: By names of ours.
        settings: Of the model.
        eps: Of all norms.
        groups: Groups of Mamba-2 heads; None to tell them from the setting for the state width.
        names: What the settings call ``depth``, ``dim``, ``vocab``, ``hidden``, ``state``, ``kernel``, ``expand``,
            ``heads`` and ``head`` of Mamba-2, ``rank``, ``kv``, ``mamba_bias`` and ``attention_bias``.
        rope: Share of an attention head's channels that are rotated.
        theta: Base of the wavelengths; None to ask the settings.
    """
    source = settings.source
    depth = count_layers(tensors, source)
    vocab, dim = need(tensors, "embed.weight", source).shape
    letters = ""
    for i in range(depth):
        a_log = tensors.get(f"backbone.layers.{i}.mixer.A_log")
        if a_log is None and f"backbone.layers.{i}.mixer.qkv.weight" not in tensors:
            raise LoadError(
                f"{source}: layer {i} has neither Mamba's tensors nor attention's; is the checkpoint whole?"
            )
        letters += "A" if a_log is None else "S" if a_log.ndim == 2 else "M"
    gate = tensors.get("backbone.layers.0.mlp.gate_proj.weight")
    found: dict[str, object] = {"depth": depth, "dim": dim, "vocab": vocab}
    fields: dict[str, Any] = {"hidden_dim": 0 if gate is None else len(gate)}
    if gate is not None:
        found["hidden"] = len(gate)
    if "M" in letters:
        fields |= _mamba2_fields(tensors, settings, letters.index("M"), groups, found, names)
    if "S" in letters:
        fields |= _mamba1_fields(tensors, source, letters.index("S"), found)
    inner = found.pop("inner", 0)
    if inner:
        assert isinstance(inner, int)
        fields["expand"] = found["expand"] = inner // dim
        if inner % dim:
            raise LoadError(f"{source}: an inner width of {inner} is no whole multiple of the width {dim} (expand).")
    if "A" in letters:
        fields |= _attention_fields(tensors, settings, letters.index("A"), dim, found)
        fields |= {"rope_fraction": rope, "rope_theta": rope_theta(settings) if theta is None else theta}
        if not rope:
            fields["rope_theta"] = 10000.0
    for part, value in found.items():
        settings.agree(value, *([names[part]] if part in names else []))
    if (limit := _limits(settings)) is not None and "M" in letters:
        fields["dt_limit"] = limit
    try:
        return HybridConfig(dim=dim, depth=depth, pattern=_shortest(letters), norm_eps=eps, **fields)
    except ConfigError as error:
        raise LoadError(f"{source}: {error}") from error


def _mamba2_fields(
    tensors: Mapping[str, Tensor],
    settings: Settings,
    layer: int,
    groups: int | None,
    found: dict[str, object],
    names: Mapping[str, str],
) -> dict[str, Any]:
    at, source = f"backbone.layers.{layer}.mixer.", settings.source
    heads = len(need(tensors, f"{at}A_log", source, 1))
    inner = need(tensors, f"{at}out_proj.weight", source).shape[1]
    channels, _, kernel = need(tensors, f"{at}conv1d.weight", source, 3).shape
    width = (channels - inner) // 2  # of B, and of C: G * N
    if groups is None:
        state = settings.integer(names["state"], "state_size", "d_state")
        groups = max(width // state, 1)
    if width < 1 or width % groups or not heads or inner % heads:
        raise LoadError(
            f"{source}: Mamba-2 with {channels} channels before its scan, {inner} of them in {heads} heads, and "
            f"{groups} groups is not possible; is the config of this model?"
        )
    found |= {"inner": inner, "heads": heads, "head": inner // heads, "state": width // groups, "kernel": kernel}
    found["mamba_bias"] = f"{at}in_proj.bias" in tensors
    return {
        "mamba_head_dim": inner // heads,
        "mamba_groups": groups,
        "state_dim": width // groups,
        "conv_kernel": kernel,
        "conv_bias": f"{at}conv1d.bias" in tensors,
        "mamba_bias": found["mamba_bias"],
    }


def _mamba1_fields(tensors: Mapping[str, Tensor], source: str, layer: int, found: dict[str, object]) -> dict[str, Any]:
    at = f"backbone.layers.{layer}.mixer."
    inner, state = need(tensors, f"{at}A_log", source).shape
    kernel = need(tensors, f"{at}conv1d.weight", source, 3).shape[2]
    rank = len(need(tensors, f"{at}x_proj.weight", source)) - 2 * state
    if f"{at}in_proj.bias" in tensors:
        raise LoadError(
            f"{source}: {at}in_proj.bias cannot be converted: projections of Mamba-1 have no biases in ours."
        )
    if rank < 1:
        raise LoadError(f"{source}: {at}x_proj.weight has too few rows for a state width of {state}.")
    found |= {"inner": inner, "kernel": kernel, "rank": rank}
    found.setdefault("state", state)
    return {
        "s6_state_dim": state,
        "dt_rank": rank,
        "s6_norms": f"{at}dt_layernorm.weight" in tensors,
        "conv_kernel": kernel,
        "conv_bias": f"{at}conv1d.bias" in tensors,
    }


def _attention_fields(
    tensors: Mapping[str, Tensor], settings: Settings, layer: int, dim: int, found: dict[str, object]
) -> dict[str, Any]:
    at, source = f"backbone.layers.{layer}.mixer.", settings.source
    heads = settings.integer("num_attention_heads")
    rows = len(need(tensors, f"{at}qkv.weight", source))
    inner = need(tensors, f"{at}proj.weight", source).shape[1]
    if inner != dim or dim % heads:
        raise LoadError(
            f"{source}: {heads} heads with {inner} channels in all (head_dim) cannot be converted: ours have a head "
            f"width of {dim} / {heads}."
        )
    groups = (rows - dim) // (2 * (dim // heads))
    if groups < 1 or heads % groups:
        raise LoadError(f"{source}: {rows} rows of queries, keys and values are not those of {heads} heads.")
    bias = f"{at}qkv.bias" in tensors
    found |= {"kv": groups, "attention_bias": bias}
    proj_bias = not bias or f"{at}proj.bias" in tensors
    return {"num_heads": heads, "num_kv_heads": groups, "attention_bias": bias, "proj_bias": proj_bias}


def _shortest(letters: str) -> str:
    """Return the shortest pattern that, repeated and cut, is these letters."""
    size = next(n for n in range(1, len(letters) + 1) if (letters[:n] * len(letters))[: len(letters)] == letters)
    return letters[:size]


def _limits(settings: Settings) -> tuple[float, float] | None:
    """Return the limits of step sizes; None where they are 0 and infinity."""
    name = next((n for n in ("time_step_limit", "dt_limit") if n in settings.values), None)
    if name is None:
        return None
    values = settings.values[name]
    limits = [_number(v) for v in values] if isinstance(values, list | tuple) else []
    if len(limits) != 2 or not limits[0] <= limits[1]:
        settings.refuse(name, "it must be two numbers, the lower first")
    low, high = limits
    if low <= 0 and high == math.inf:
        return None
    return low, min(high, torch.finfo(torch.float32).max)


def _number(value: object) -> float:
    if isinstance(value, dict):  # transformers writes infinity so
        value = value.get("__float__")
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except ValueError:
        return math.nan


def fuse_heads(tensors: dict[str, Tensor]) -> None:
    """Put queries, keys and values of every attention layer together, in place."""
    for name in [name for name in tensors if name.endswith((".mixer.q.weight", ".mixer.q.bias"))]:
        at, _, kind = name.rpartition("q.")
        fuse(tensors, [f"{at}{part}.{kind}" for part in "qkv"], f"{at}qkv.{kind}")


# ---------------------------------------------------------------- mamba_ssm


def is_native(checkpoint: Checkpoint) -> bool:
    """Tell whether ``config.json`` is one of mamba_ssm."""
    config = told_config(checkpoint)
    return {"d_model", "n_layer", "ssm_cfg"} <= config.keys()


def read_native(checkpoint: Checkpoint, settings: Settings) -> Published:
    """Read a model of mamba_ssm: Mamba-1 or Mamba-2, attention in some layers, MLPs in all or none."""
    settings.expect("rms_norm", True, why="ours has RMSNorm")
    ssm, attention = settings.part("ssm_cfg"), settings.part("attn_cfg")
    ssm.expect("layer", "Mamba1", "Mamba2", why="ours has Mamba-1 and Mamba-2")
    ssm.expect("rmsnorm", True, why="ours norms behind the scan")
    ssm.expect("d_ssm", None, why="all inner channels go through the scan in ours")
    for name in ("norm_before_gate", "D_has_hdim"):
        ssm.expect(name, False, why="ours has no such option")
    _no_others(ssm, _SSM_FREE)
    heads, rope, theta = None, 0.0, 1e4
    if settings.values.get("attn_layer_idx"):
        attention.expect("d_conv", 0, why="attention of ours has no convolution before it")
        attention.expect("mlp_dim", 0, why="attention of ours has no MLP in it")
        attention.expect("causal", True, why="ours is causal here")
        attention.expect("rotary_emb_interleaved", False, why="ours turns pairs of channels half a width apart")
        attention.expect("softmax_scale", None, why="ours divides scores by the root of the head width")
        _no_others(attention, _ATTENTION_FREE)
        heads = attention.integer("num_heads")
        width = attention.number("rotary_emb_dim", default=0)
        rope = width * heads / settings.integer("d_model")
        theta = attention.number("rotary_emb_base", default=1e4)
    tensors = backbone_names("backbone.").all(checkpoint.tensors, checkpoint.source)
    for name in list(tensors):
        if match := re.fullmatch(r"(backbone\.layers\.\d+\.)(mixer|mlp)\.(\w+)\.(weight|bias)", name):
            layer, part, inner, kind = match.groups()
            plain = f"{layer}mixer.A_log" not in tensors
            if part == "mixer" and plain and inner in ("in_proj", "out_proj"):
                tensors[f"{layer}mixer.{'qkv' if inner == 'in_proj' else 'proj'}.{kind}"] = tensors.pop(name)
            elif part == "mlp" and inner == "fc1":
                up, gate = tensors.pop(name).chunk(2)
                tensors[f"{layer}mlp.up_proj.{kind}"], tensors[f"{layer}mlp.gate_proj.{kind}"] = up, gate
            elif part == "mlp" and inner == "fc2":
                tensors[f"{layer}mlp.down_proj.{kind}"] = tensors.pop(name)
    told = Settings(
        settings.source,
        {"n_layer": settings.values.get("n_layer"), "d_model": settings.values.get("d_model"), **ssm.values,
         "num_attention_heads": heads, "num_heads_kv": attention.values.get("num_heads_kv")},
        settings.where,
    )  # fmt: skip
    config = read_structure(
        tensors,
        told,
        eps=1e-5,
        groups=ssm.integer("ngroups", default=1),
        names={"depth": "n_layer", "dim": "d_model", "state": "d_state", "kernel": "d_conv", "expand": "expand",
               "head": "headdim", "rank": "dt_rank", "kv": "num_heads_kv", "mamba_bias": "bias"},
        rope=rope,
        theta=theta,
    )  # fmt: skip
    settings.agree([i for i, letter in enumerate(config.layout) if letter == "A"], "attn_layer_idx")
    if "A" in config.layout:
        for name, bias in (("qkv_proj_bias", True), ("out_proj_bias", config.proj_bias)):
            attention.values.setdefault(name, True)  # as mamba_ssm takes it
            attention.agree(config.attention_bias and bias, name)
    if ("S" in config.layout) != (ssm.values.get("layer", "Mamba1") == "Mamba1") and set(config.layout) != {"A"}:
        ssm.refuse("layer", f"the layers in the file are {config.layout}")
    head = settle_head(tensors, settings, "tie_embeddings", True, bare=False)
    rows, used = len(tensors["embed.weight"]), settings.integer("vocab_size")
    if used > rows:
        settings.refuse("vocab_size", f"the embedding has {rows} rows")
    notes = {"vocabulary": f"{used} tokens; the rows from {used} to {rows - 1} are padding."} if used < rows else {}
    return Published(config=config, tensors=tensors, head=head, notes=notes)


def _no_others(settings: Settings, known: set[str]) -> None:
    for name in settings.values:
        if name not in known:
            settings.refuse(name, "what it does is not known")


def backbone_names(prefix: str) -> Renamer:
    """Names of mamba_ssm, and of transformers' Mamba and Mamba-2, which begin with ``backbone.`` or nothing."""
    outside = {f"{prefix}{name}.weight": "embed.weight" for name in ("embedding", "embeddings")}
    return Renamer(
        {**outside, f"{prefix}norm_f.weight": "backbone.norm.weight", "lm_head.weight": "head.weight"},
        re.escape(prefix) + r"layers\.(\d+)\.(.+)",
        {"norm.": "norm1.", "norm2.": "norm2.", "mixer.": "mixer.", "mlp.": "mlp."},
    )
