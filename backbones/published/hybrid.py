"""Mamba-1, Mamba-2 and hybrids with attention as they are published: names and config.

Sources: Mamba (https://arxiv.org/abs/2312.00752) and Mamba-2 (https://arxiv.org/abs/2405.21060) in the naming of
``mamba_ssm`` and of transformers; Bamba, Jamba (https://arxiv.org/abs/2403.19887) and GraniteMoeHybrid without experts
in that of transformers; HybriDNA (https://arxiv.org/abs/2502.10807), whose names are of the same kind. Sizes, the kind
of every layer, and biases are read off the tensors; the config tells what they do not show.

Shapes: V vocabulary, D width, I inner width, H heads, G groups, N state width, K head width.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vertebra.backbones.base import BackboneConfig
from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.published.base import (
    Head,
    Published,
    PublishedFamily,
    Renamer,
    Settings,
    check_plain,
    settle_head,
    told_config,
    told_kind,
    told_names,
)
from vertebra.backbones.published.structure import (
    backbone_names,
    fuse_heads,
    is_native,
    read_native,
    read_structure,
)
from vertebra.errors import LoadError

NEIGHBOURS = {
    "falcon_h1": "its layers run Mamba and attention side by side",
    "falcon_mamba": "its norms of step sizes, B and C have no weights",
    "nemotron_h": "its layers have one branch each, and its MLP is no gated one",
    "zamba": "its layers share one attention over features and embedding",
    "zamba2": "its layers share attention over features and embedding",
}
"""Kin that ours cannot be, by ``model_type``, and why."""
_MAMBA_SETTINGS = {
    "depth": "num_hidden_layers", "dim": "hidden_size", "vocab": "vocab_size", "state": "state_size",
    "rank": "time_step_rank", "kernel": "conv_kernel", "expand": "expand", "heads": "num_heads", "head": "head_dim",
    "mamba_bias": "use_bias",
}  # fmt: skip
_BRANCH_SETTINGS = {
    "depth": "num_hidden_layers", "dim": "hidden_size", "vocab": "vocab_size", "hidden": "intermediate_size",
    "kernel": "mamba_d_conv", "expand": "mamba_expand", "state": "mamba_d_state", "heads": "mamba_n_heads",
    "head": "mamba_d_head", "kv": "num_key_value_heads", "rank": "mamba_dt_rank",
    "mamba_bias": "mamba_proj_bias", "attention_bias": "attention_bias",
}  # fmt: skip

_BRANCHES = {
    "input_layernorm.": "norm1.",
    "pre_ff_layernorm.": "norm2.",
    "mamba.": "mixer.",
    "self_attn.q_proj.": "mixer.q.",
    "self_attn.k_proj.": "mixer.k.",
    "self_attn.v_proj.": "mixer.v.",
    "self_attn.o_proj.": "mixer.proj.",
    "feed_forward.gate_proj.": "mlp.gate_proj.",
    "feed_forward.up_proj.": "mlp.up_proj.",
    "feed_forward.down_proj.": "mlp.down_proj.",
}
_GRANITE = {
    **{theirs: ours for theirs, ours in _BRANCHES.items() if not theirs.startswith(("pre_ff", "feed_forward"))},
    "post_attention_layernorm.": "norm2.",
    "shared_mlp.input_linear.": "mlp.fused.",
    "shared_mlp.output_linear.": "mlp.down_proj.",
}
_HYBRID_LAYER = re.compile(r"(?:model\.)?layers\.\d+\.mamba\.A_log")
_HYBRID_NORM = re.compile(r"(?:model\.)?layers\.\d+\.pre_ff_layernorm\.weight")
_KNOWN_KINDS = {"mamba", "mamba2", "bamba", "jamba", "granitemoehybrid"}


# ---------------------------------------------------------------- families


class MambaFamily(PublishedFamily):
    """Plain Mamba-1 and Mamba-2 in the naming of mamba_ssm and of transformers."""

    name = "mamba"
    summary = "Mamba-1 and Mamba-2 (state-spaces, transformers)"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Go by ``model_type``, else by the config of mamba_ssm."""
        if kind := told_kind(checkpoint):
            return kind in ("mamba", "mamba2", "falcon_mamba")
        return is_native(checkpoint) and not told_config(checkpoint).get("attn_layer_idx")

    def read(self, checkpoint: Checkpoint) -> Published:
        """Read a checkpoint in either naming; see ``PublishedFamily.read``."""
        settings = _checked(checkpoint)
        if "d_model" in settings.values and "hidden_size" not in settings.values:
            return read_native(checkpoint, settings)
        bare = not any(name.startswith(("backbone.", "lm_head.")) for name in checkpoint.tensors)
        tensors = backbone_names("" if bare else "backbone.").all(checkpoint.tensors, checkpoint.source)
        config = read_structure(
            tensors,
            settings,
            eps=settings.number("layer_norm_epsilon", default=1e-5),
            groups=settings.integer("n_groups", default=8) if told_kind(checkpoint) == "mamba2" else 1,
            names=_MAMBA_SETTINGS,
        )
        head = settle_head(tensors, settings, "tie_word_embeddings", told_kind(checkpoint) == "mamba", bare)
        return Published(config=config, tensors=tensors, head=head)

    def write(
        self, config: BackboneConfig, tensors: Mapping[str, Tensor], head: Head
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and config as transformers has them; see ``PublishedFamily.write``."""
        letters = set(config.layout) if isinstance(config, HybridConfig) else set()
        if not isinstance(config, HybridConfig) or not config.causal or config.hidden_dim or config.s6_norms:
            raise LoadError(
                "mamba: only a causal hybrid backbone of Mamba layers alone, without MLPs, has this format."
            )
        if letters not in ({"M"}, {"S"}):
            raise LoadError(f"mamba: all layers must be M, or all S, got {config.layout}.")
        if letters == {"M"} and config.mamba_form != "mamba2":
            raise LoadError(f"mamba: mamba_form must be mamba2, got {config.mamba_form}.")
        prefix = "" if head == "none" else "backbone."
        names = {
            "embed.weight": f"{prefix}embeddings.weight",
            "backbone.norm.weight": f"{prefix}norm_f.weight",
            "head.weight": "lm_head.weight",
        }
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if name != "head.weight" or head == "own":
                inside = prefix + name.removeprefix("backbone.").replace(".norm1.", ".norm.", 1)
                found[names.get(name, inside)] = tensor.clone()
        one = letters == {"S"}
        settings = {
            "architectures": [f"{'Mamba' if one else 'Mamba2'}{'Model' if head == 'none' else 'ForCausalLM'}"],
            "model_type": "mamba" if one else "mamba2",
            "vocab_size": len(tensors["embed.weight"]),
            "tie_word_embeddings": head == "tied",
            "hidden_size": config.dim,
            "num_hidden_layers": config.depth,
            "expand": config.expand,
            "conv_kernel": config.conv_kernel,
            "use_conv_bias": config.conv_bias,
            "use_bias": config.mamba_bias and not one,
            "hidden_act": "silu",
            "layer_norm_epsilon": config.norm_eps,
        }
        if one:
            rank = config.dt_rank or -(-config.dim // 16)
            return found, settings | {"state_size": config.s6_state_dim, "time_step_rank": rank}
        return found, settings | {
            "state_size": config.state_dim,
            "num_heads": config.expand * config.dim // config.mamba_head_dim,
            "head_dim": config.mamba_head_dim,
            "n_groups": config.mamba_groups,
            **_limit_setting(config),
        }


class BambaFamily(PublishedFamily):
    """Mamba-2 and attention with partial rotary embedding, and GraniteMoeHybrid without experts."""

    name = "bamba"
    summary = "Bamba (transformers, state-spaces), GraniteMoeHybrid without experts"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Go by ``model_type``, else by the config of mamba_ssm with attention layers."""
        if kind := told_kind(checkpoint):
            return kind in ("bamba", "granitemoehybrid") or (kind in NEIGHBOURS and kind != "falcon_mamba")
        return is_native(checkpoint) and bool(told_config(checkpoint).get("attn_layer_idx"))

    def read(self, checkpoint: Checkpoint) -> Published:
        """Read a checkpoint of any of them; see ``PublishedFamily.read``."""
        settings = _checked(checkpoint)
        if "d_model" in settings.values and "hidden_size" not in settings.values:
            return read_native(checkpoint, settings)
        if told_kind(checkpoint) == "granitemoehybrid":
            return _read_granite(checkpoint, settings)
        for place in (settings, settings.part("rope_parameters")):
            place.expect(
                "partial_rotary_factor", 0.5, why="transformers rotates half of the channels, whatever it says"
            )
        return _read_branches(
            checkpoint,
            settings,
            eps=settings.number("rms_norm_eps", default=1e-5),
            groups=settings.integer("mamba_n_groups", default=1),
            rope=0.5,
        )

    def write(
        self, config: BackboneConfig, tensors: Mapping[str, Tensor], head: Head
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and config of a Bamba of transformers; see ``PublishedFamily.write``."""
        config = _writable(config, "bamba", "MA")
        attention = [i for i, letter in enumerate(config.layout) if letter == "A"]
        if attention and (config.rope_fraction != 0.5 or config.rope_interleaved):
            raise LoadError(f"bamba: rope_fraction must be 0.5, of half-split pairs, got {config.rope_fraction}.")
        if attention and config.attention_bias and not config.proj_bias:
            raise LoadError("bamba: with attention_bias the projection behind the heads has one too (proj_bias).")
        found, settings = _write_branches(config, tensors, head, "Bamba")
        return found, settings | {
            "attn_layer_indices": attention,
            "rope_theta": config.rope_theta,
            "attention_bias": config.attention_bias,
            "mamba_n_heads": config.expand * config.dim // config.mamba_head_dim,
            "mamba_d_head": config.mamba_head_dim,
            "mamba_n_groups": config.mamba_groups,
            "mamba_d_state": config.state_dim,
            **_limit_setting(config),
        }


class JambaFamily(PublishedFamily):
    """Mamba-1 with norms inside, and attention without positions; no experts."""

    name = "jamba"
    summary = "Jamba without experts (transformers)"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Go by ``model_type``."""
        return told_kind(checkpoint) == "jamba"

    def read(self, checkpoint: Checkpoint) -> Published:
        """Read a checkpoint; see ``PublishedFamily.read``."""
        settings = _checked(checkpoint)
        return _read_branches(
            checkpoint, settings, eps=settings.number("rms_norm_eps", default=1e-6), groups=1, rope=0.0
        )

    def write(
        self, config: BackboneConfig, tensors: Mapping[str, Tensor], head: Head
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and config of a Jamba of transformers; see ``PublishedFamily.write``."""
        config = _writable(config, "jamba", "SA")
        if config.rope_fraction or config.attention_bias or not config.s6_norms:
            raise LoadError("jamba: the backbone must have s6_norms=True, rope_fraction=0 and attention_bias=False.")
        found, settings = _write_branches(config, tensors, head, "Jamba")
        wanted = [letter == "A" for letter in config.layout]
        # One past the depth stands for no attention at all.
        every = next(
            (
                (period, offset)
                for period in range(1, config.depth + 2)
                for offset in range(period)
                if [i % period == offset for i in range(config.depth)] == wanted
            ),
            None,
        )
        if every is None:
            raise LoadError(f"jamba: attention layers must come at equal distances, got {config.layout}.")
        return found, settings | {
            "attn_layer_period": every[0],
            "attn_layer_offset": every[1],
            "num_experts": 1,
            "num_experts_per_tok": 1,
            "mamba_d_state": config.s6_state_dim,
            "mamba_dt_rank": config.dt_rank or -(-config.dim // 16),
        }


class HybriDNAFamily(PublishedFamily):
    """Any dense hybrid in the naming of Bamba and Jamba; released configs are not known, so the tensors decide."""

    name = "hybridna"
    summary = "HybriDNA, and other hybrids with the names of Bamba and Jamba"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Go by ``model_type``, else by the names of tensors under a ``model_type`` that nobody else claims."""
        kind = told_kind(checkpoint)
        if "hybridna" in kind.lower():
            return True
        if kind in _KNOWN_KINDS or kind in NEIGHBOURS or not told_config(checkpoint):
            return False
        names = told_names(checkpoint)
        return all(any(p.fullmatch(name) for name in names) for p in (_HYBRID_LAYER, _HYBRID_NORM))

    def read(self, checkpoint: Checkpoint) -> Published:
        """Read a checkpoint; see ``PublishedFamily.read``."""
        settings = _checked(checkpoint)
        names = ("mamba_n_groups", "n_groups", "ngroups")
        groups = settings.integer(*names) if any(name in settings.values for name in names) else None
        places = (settings, settings.part("rope_parameters"))
        rope = next((p.number("partial_rotary_factor") for p in places if "partial_rotary_factor" in p.values), 0.0)
        found = _read_branches(
            checkpoint,
            settings,
            eps=settings.number("rms_norm_eps", "layer_norm_epsilon", "norm_eps"),
            groups=groups,
            rope=rope,
        )
        assert isinstance(found.config, HybridConfig)
        positions = f"rotary embedding of {rope:g} of the channels" if rope else "no positions, as the paper says"
        seen = f"Read off the tensors: layers {found.config.layout}; attention has {positions}."
        return Published(
            config=found.config,
            tensors=found.tensors,
            head=found.head,
            left_out=found.left_out,
            notes={"structure": seen},
        )


MAMBA, BAMBA, JAMBA, HYBRIDNA = MambaFamily(), BambaFamily(), JambaFamily(), HybriDNAFamily()


# ---------------------------------------------------------------- reading


def _checked(checkpoint: Checkpoint) -> Settings:
    settings, kind = Settings(checkpoint.source, checkpoint.config), told_kind(checkpoint)
    if kind in NEIGHBOURS:
        settings.values["model_type"] = kind
        settings.refuse("model_type", NEIGHBOURS[kind])
    check_plain(settings)
    settings.expect("hidden_act", "silu", "swish", why="Mamba layers and MLPs are gated by SiLU")
    return settings


def _read_branches(
    checkpoint: Checkpoint, settings: Settings, *, eps: float, groups: int | None, rope: float
) -> Published:
    """Read a model in the naming of Bamba and Jamba."""
    settings.expect("mlp_bias", False, why="the MLP has no biases")
    if experts := sorted(
        n for n in checkpoint.tensors if ".feed_forward.router." in n or ".feed_forward.experts." in n
    ):
        settings.values.setdefault("num_experts", "unsaid")
        settings.refuse("num_experts", f"ours has no experts, the checkpoint has {experts[0]}")
    bare = not any(name.startswith(("model.", "lm_head.")) for name in checkpoint.tensors)
    prefix = "" if bare else "model."
    rename = Renamer(
        {
            f"{prefix}embed_tokens.weight": "embed.weight",
            f"{prefix}final_layernorm.weight": "backbone.norm.weight",
            "lm_head.weight": "head.weight",
        },
        re.escape(prefix) + r"layers\.(\d+)\.(.+)",
        _BRANCHES,
    )
    tensors = rename.all(checkpoint.tensors, checkpoint.source)
    fuse_heads(tensors)
    config = read_structure(tensors, settings, eps=eps, groups=groups, names=_BRANCH_SETTINGS, rope=rope)
    _check_layers(settings, config)
    head = settle_head(tensors, settings, "tie_word_embeddings", False, bare)
    return Published(config=config, tensors=tensors, head=head)


def _check_layers(settings: Settings, config: HybridConfig) -> None:
    """Refuse a config that has attention in other layers than the tensors."""
    attention = [i for i, letter in enumerate(config.layout) if letter == "A"]
    settings.agree(attention, "attn_layer_indices")
    if "attn_layer_period" in settings.values and "attn_layer_indices" not in settings.values:
        period = settings.integer("attn_layer_period")
        offset = settings.values.get("attn_layer_offset", 4)
        if attention != [i for i in range(config.depth) if i % period == offset]:
            settings.refuse(
                "attn_layer_period", f"with attn_layer_offset = {offset!r} it is not the layers {attention}"
            )


def _read_granite(checkpoint: Checkpoint, settings: Settings) -> Published:
    """Read a GraniteMoeHybrid; its multipliers go into the weights, which ours has none for."""
    if settings.values.get("num_local_experts", 8) != 0:
        settings.refuse("num_local_experts", "ours has no experts")
    settings.expect("position_embedding_type", "nope", "rope", why="ours has rotary embedding or none")
    bare = not any(name.startswith(("model.", "lm_head.")) for name in checkpoint.tensors)
    prefix = "" if bare else "model."
    rename = Renamer(
        {
            f"{prefix}embed_tokens.weight": "embed.weight",
            f"{prefix}norm.weight": "backbone.norm.weight",
            "lm_head.weight": "head.weight",
        },
        re.escape(prefix) + r"layers\.(\d+)\.(.+)",
        _GRANITE,
    )
    tensors = rename.all(checkpoint.tensors, checkpoint.source)
    fuse_heads(tensors)
    for name in [n for n in tensors if n.endswith(".mlp.fused.weight")]:
        layer = name.removesuffix("fused.weight")
        tensors[f"{layer}gate_proj.weight"], tensors[f"{layer}up_proj.weight"] = tensors.pop(name).chunk(2)
    config = read_structure(
        tensors,
        settings,
        eps=settings.number("rms_norm_eps", default=1e-6),
        groups=settings.integer("mamba_n_groups", default=1),
        names={**_BRANCH_SETTINGS, "hidden": "shared_intermediate_size"},
        rope=1.0 if settings.values.get("position_embedding_type") == "rope" else 0.0,
    )
    head = settle_head(tensors, settings, "tie_word_embeddings", False, bare)
    embed, residual, scores = (
        settings.number(f"{name}_multiplier", default=1.0) for name in ("embedding", "residual", "attention")
    )
    logits = settings.number("logits_scaling", default=1.0)
    if head == "tied" and embed * logits != 1:
        tensors["head.weight"], head = tensors["embed.weight"].float(), "own"
    if head == "own" and "head.weight" in tensors:
        tensors["head.weight"] = tensors["head.weight"].float() / logits
    tensors["embed.weight"] = tensors["embed.weight"].float() * embed
    for name, tensor in list(tensors.items()):
        if re.fullmatch(r"backbone\.layers\.\d+\.(mixer\.proj|mixer\.out_proj|mlp\.down_proj)\.(weight|bias)", name):
            tensors[name] = tensor.float() * residual
        if name.endswith((".mixer.qkv.weight", ".mixer.qkv.bias")):  # ours divides scores by the root of the head width
            width = config.dim // config.num_heads
            rows = tensor.float().clone()
            rows[: config.dim] *= scores * math.sqrt(width)
            tensors[name] = rows
    note = f"Multipliers of the original (embedding {embed:g}, residual {residual:g}, attention {scores:g}, logits "
    return Published(
        config=config, tensors=tensors, head=head, notes={"weights": note + f"1/{logits:g}) are in the weights."}
    )


# ---------------------------------------------------------------- writing


def _writable(config: BackboneConfig, name: str, letters: str) -> HybridConfig:
    if not isinstance(config, HybridConfig) or not config.causal or not config.hidden_dim:
        raise LoadError(f"{name}: only a causal hybrid backbone with an MLP in every layer has this format.")
    if "M" in config.layout and config.mamba_form != "mamba2":
        raise LoadError(f"{name}: mamba_form must be mamba2, got {config.mamba_form}.")
    if set(config.layout) - set(letters):
        raise LoadError(f"{name}: layers must be {' or '.join(letters)}, got {config.layout}.")
    if "A" in config.layout and any(config.per_layer(config.window)):
        raise LoadError(f"{name}: its attention has no window, got window={config.window}.")
    return config


def _write_branches(
    config: HybridConfig, tensors: Mapping[str, Tensor], head: Head, whole: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    prefix = "" if head == "none" else "model."
    outside = {
        "embed.weight": f"{prefix}embed_tokens.weight",
        "backbone.norm.weight": f"{prefix}final_layernorm.weight",
        "head.weight": "lm_head.weight",
    }
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in outside:
            if name != "head.weight" or head == "own":
                found[outside[name]] = tensor.clone()
            continue
        number, _, rest = name.removeprefix("backbone.layers.").partition(".")
        at = f"{prefix}layers.{number}."
        if rest in ("mixer.qkv.weight", "mixer.qkv.bias"):
            groups = (config.num_kv_heads or config.num_heads) * (config.dim // config.num_heads)
            for part, rows in zip("qkv", tensor.split([config.dim, groups, groups]), strict=True):
                found[f"{at}self_attn.{part}_proj{rest.removeprefix('mixer.qkv')}"] = rows.clone()
            continue
        theirs, ours = next(pair for pair in reversed(_BRANCHES.items()) if rest.startswith(pair[1]))
        found[f"{at}{theirs}{rest.removeprefix(ours)}"] = tensor.clone()
    return found, {
        "architectures": [f"{whole}{'Model' if head == 'none' else 'ForCausalLM'}"],
        "model_type": whole.lower(),
        "vocab_size": len(tensors["embed.weight"]),
        "tie_word_embeddings": head == "tied",
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "mamba_d_conv": config.conv_kernel,
        "mamba_expand": config.expand,
        "mamba_conv_bias": config.conv_bias,
        "mamba_proj_bias": config.mamba_bias and "M" in config.layout,
    }


def _limit_setting(config: HybridConfig) -> dict[str, Any]:
    """Return the setting for limits of step sizes; none where there are none."""
    return {} if config.dt_limit is None else {"time_step_limit": list(config.dt_limit)}
