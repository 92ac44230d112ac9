"""LLaMA and its kin as they are published: names, config, and the layout of the rotary pairs.

Sources: LLaMA (https://arxiv.org/abs/2302.13971), Mistral (https://arxiv.org/abs/2310.06825) and Qwen2
(https://arxiv.org/abs/2407.10671) as transformers names them, and Meta's own files with ``params.json``. Meta turns
neighbouring channels (2i, 2i+1), as we do; transformers turns (i, i + K/2), so its rows of queries and keys are put
back here.

Shapes: V vocabulary, D width, H query heads, G key-value heads, K head width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from vertebra.backbones.base import BackboneConfig
from vertebra.backbones.illama import ILLaMAConfig
from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.loading.files import read_json
from vertebra.backbones.published.base import (
    Head,
    Published,
    PublishedFamily,
    Renamer,
    Settings,
    check_plain,
    count_layers,
    fuse,
    need,
    rope_theta,
    settle_head,
    told_config,
    told_kind,
    told_names,
)
from vertebra.errors import ConfigError, LoadError

Kind = Literal["llama", "mistral", "qwen2"]

KINDS: tuple[Kind, ...] = ("llama", "mistral", "qwen2")
NEIGHBOURS = {
    "gemma": "its MLP has another activation and its embedding is scaled",
    "gemma2": "its norms stand on both sides of a branch and its logits are capped",
    "mixtral": "its MLPs are experts",
    "olmo2": "its norms stand behind the branches",
    "phi3": "its projections are fused in another way",
    "qwen2_moe": "its MLPs are experts",
    "qwen3": "it norms queries and keys",
    "qwen3_moe": "its MLPs are experts",
}
"""Kin that ours cannot be, by ``model_type``, and why."""

_NEW_NAMES = {
    "input_layernorm.": "norm1.",
    "post_attention_layernorm.": "norm2.",
    "self_attn.q_proj.": "mixer.q.",
    "self_attn.k_proj.": "mixer.k.",
    "self_attn.v_proj.": "mixer.v.",
    "self_attn.o_proj.": "mixer.proj.",
    "mlp.gate_proj.": "mlp.gate_proj.",
    "mlp.up_proj.": "mlp.up_proj.",
    "mlp.down_proj.": "mlp.down_proj.",
}
_META_NAMES = {
    "attention_norm.": "norm1.",
    "ffn_norm.": "norm2.",
    "attention.wq.": "mixer.q.",
    "attention.wk.": "mixer.k.",
    "attention.wv.": "mixer.v.",
    "attention.wo.": "mixer.proj.",
    "feed_forward.w1.": "mlp.gate_proj.",
    "feed_forward.w3.": "mlp.up_proj.",
    "feed_forward.w2.": "mlp.down_proj.",
}
_MISTRAL_WINDOW = 4096  # of transformers, where a config does not say
_COMPUTED = "a table that is computed, not learned"
_ATTENTION = re.compile(r"(?:model\.)?layers\.0\.(?:self_attn\.q_proj|attention\.wq)\.weight")
_MLP = re.compile(r"(?:model\.)?layers\.0\.(?:mlp\.gate_proj|feed_forward\.w1)\.weight")


class LLaMAFamily(PublishedFamily):
    """LLaMA, Mistral and Qwen2 in the naming of transformers, and Meta's naming."""

    name = "llama"
    summary = "LLaMA, Mistral and Qwen2 (transformers), LLaMA and Mistral with params.json"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Go by ``model_type``, else by ``params.json``, else by the names of the first layer."""
        if kind := told_kind(checkpoint):
            return kind in KINDS or kind in NEIGHBOURS
        if told_config(checkpoint):
            return False
        try:
            if checkpoint.file("params.json") is not None:
                return {"dim", "n_layers", "n_heads"} <= _params(checkpoint).values.keys()
        except LoadError:
            return False
        names = told_names(checkpoint)
        return all(any(pattern.fullmatch(name) for name in names) for pattern in (_ATTENTION, _MLP))

    def read(self, checkpoint: Checkpoint) -> Published:
        """Read a checkpoint in either naming; see ``PublishedFamily.read``."""
        if not checkpoint.config and checkpoint.file("params.json") is not None:
            return _read_meta(checkpoint)
        return _read_transformers(checkpoint)

    def write(
        self, config: BackboneConfig, tensors: Mapping[str, Tensor], head: Head
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and config as transformers has them; see ``PublishedFamily.write``."""
        if not isinstance(config, ILLaMAConfig) or not config.causal:
            raise LoadError("llama: only a causal iLLaMA backbone has this format.")
        kind, settings = _structure_of(config)
        prefix = "" if head == "none" else "model."
        found: dict[str, Tensor] = {}
        back = {ours: theirs for theirs, ours in _NEW_NAMES.items()}
        for name, tensor in tensors.items():
            if (match := re.fullmatch(r"backbone\.layers\.(\d+)\.mixer\.qkv\.(weight|bias)", name)) is not None:
                for part, rows in zip("qkv", _parts(config, tensor), strict=True):
                    found[f"{prefix}layers.{match[1]}.self_attn.{part}_proj.{match[2]}"] = rows
            elif (match := re.fullmatch(r"backbone\.layers\.(\d+)\.(.+\.)(weight|bias)", name)) is not None:
                found[f"{prefix}layers.{match[1]}.{back[match[2]]}{match[3]}"] = tensor.clone()
            elif name != "head.weight" or head == "own":
                theirs = {
                    "embed.weight": f"{prefix}embed_tokens.weight",
                    "backbone.norm.weight": f"{prefix}norm.weight",
                }
                found[theirs.get(name, "lm_head.weight")] = tensor.clone()
        whole = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}[kind]
        return found, {
            "architectures": [f"{whole}{'Model' if head == 'none' else 'ForCausalLM'}"],
            "model_type": kind,
            "vocab_size": len(tensors["embed.weight"]),
            "tie_word_embeddings": head == "tied",
            **settings,
        }


LLAMA = LLaMAFamily()


def interleaved(rows: Tensor, head_dim: int) -> Tensor:
    """Put rows (H * K, ...) with rotary pairs (i, i + K/2) into the order of pairs (2i, 2i+1)."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def half_split(rows: Tensor, head_dim: int) -> Tensor:
    """Put rows (H * K, ...) with rotary pairs (2i, 2i+1) into the order of pairs (i, i + K/2)."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


# ---------------------------------------------------------------- transformers


def _read_transformers(checkpoint: Checkpoint) -> Published:
    settings = Settings(checkpoint.source, checkpoint.config)
    kind = told_kind(checkpoint) or "llama"
    if kind in NEIGHBOURS:
        settings.values["model_type"] = kind
        settings.refuse("model_type", NEIGHBOURS[kind])
    if kind not in KINDS and "model_type" in settings.values:
        settings.refuse("model_type", "it is none of " + ", ".join(KINDS))
    check_plain(settings)
    settings.expect("hidden_act", "silu", "swish", why="the MLP is gated by SiLU")
    settings.expect("mlp_bias", False, why="the MLP has no biases")
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        settings.expect(name, 1, why="ours scales neither embedding, branches nor logits")
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        settings.expect(name, None, why="ours caps no logits")
    for place in (settings, settings.part("rope_parameters")):
        place.expect("partial_rotary_factor", 1, why="all channels of a head are rotated")

    bare = not any(name.startswith(("model.", "lm_head.")) for name in checkpoint.tensors)
    prefix = "" if bare else "model."
    rename = Renamer(
        {
            f"{prefix}embed_tokens.weight": "embed.weight",
            f"{prefix}norm.weight": "backbone.norm.weight",
            "lm_head.weight": "head.weight",
        },
        re.escape(prefix) + r"layers\.(\d+)\.(.+)",
        _NEW_NAMES,
    )
    found, left = _without_tables(checkpoint.tensors, r".*rotary_emb\.inv_freq")
    tensors = rename.all(found, checkpoint.source)
    outside = ["embed_tokens.weight", "norm.weight"]
    _check_whole(found, [prefix + name for name in outside], f"{prefix}layers.", _NEW_NAMES, checkpoint.source)
    if not bare and "lm_head.weight" not in found and not settings.flag("tie_word_embeddings", False):
        raise LoadError(
            f"{checkpoint.source}: the checkpoint has no tensor lm_head.weight; is it whole? Where the head is the "
            "embedding, config.json must say tie_word_embeddings = true."
        )
    config = _structure(
        tensors,
        settings,
        heads=settings.integer("num_attention_heads"),
        eps=settings.number("rms_norm_eps", default=1e-6),
        theta=rope_theta(settings),
        names={"depth": "num_hidden_layers", "dim": "hidden_size", "hidden": "intermediate_size",
               "kv": "num_key_value_heads", "head": "head_dim", "vocab": "vocab_size"},
    )  # fmt: skip
    config = config.replace(window=_windows(settings, kind, config.depth, checkpoint.config))
    _fuse_heads(tensors, config, split=True)
    head = settle_head(tensors, settings, "tie_word_embeddings", False, bare)
    return Published(config=config, tensors=tensors, head=head, left_out=left)


def _windows(settings: Settings, kind: str, depth: int, given: Mapping[str, Any]) -> int | tuple[int, ...]:
    """Return the window of all layers, or one a layer; ``given`` tells a window of null from none that is said."""
    if kind == "mistral" and "sliding_window" not in given:
        return _MISTRAL_WINDOW
    if kind == "llama" or "sliding_window" not in settings.values:
        return 0
    if kind == "mistral":
        return settings.integer("sliding_window")
    if not settings.flag("use_sliding_window", False):
        return 0
    first, width = settings.integer("max_window_layers", default=28), settings.integer("sliding_window")
    types = settings.values.get(
        "layer_types", ["full_attention" if i < first else "sliding_attention" for i in range(depth)]
    )
    known = {"full_attention": 0, "sliding_attention": width}
    if not isinstance(types, list) or len(types) != depth or any(kind not in known for kind in types):
        settings.refuse("layer_types", f"it must be one of {', '.join(known)} for each of the {depth} layers")
    return _shortest([known[kind] for kind in types])


def _shortest(windows: list[int]) -> int | tuple[int, ...]:
    return windows[0] if len(set(windows)) == 1 else tuple(windows)


def _structure_of(config: ILLaMAConfig) -> tuple[Kind, dict[str, Any]]:
    """Return the family of transformers that has such a backbone, and its settings."""
    windows = config.windows()
    settings: dict[str, Any] = {
        "hidden_size": config.dim,
        "intermediate_size": config.swiglu_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads or config.num_heads,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    if config.bias and not config.proj_bias and len(set(windows) - {0}) <= 1:
        if any(windows):
            types = ["sliding_attention" if window else "full_attention" for window in windows]
            settings |= {"use_sliding_window": True, "sliding_window": max(windows), "layer_types": types}
        return "qwen2", settings
    if not config.bias and windows[0] and len(set(windows)) == 1:
        return "mistral", settings | {"sliding_window": windows[0]}
    if any(windows) or (config.bias and not config.proj_bias):
        raise LoadError(
            f"llama: no family of transformers has windows {config.window} with bias={config.bias} and "
            f"proj_bias={config.proj_bias}."
        )
    return "llama", settings | {"attention_bias": config.bias}


def _parts(config: ILLaMAConfig, tensor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows of queries, keys and values in the order of transformers."""
    width, groups = config.dim // config.num_heads, config.num_kv_heads or config.num_heads
    q, k, v = tensor.split([config.dim, groups * width, groups * width])
    return half_split(q, width), half_split(k, width), v.clone()


# ---------------------------------------------------------------- Meta


def _params(checkpoint: Checkpoint) -> Settings:
    path = checkpoint.file("params.json")
    assert path is not None
    return Settings(checkpoint.source, read_json(path), "params.json")


def _read_meta(checkpoint: Checkpoint) -> Published:
    settings = _params(checkpoint)
    if checkpoint.path.is_dir() and len(parts := sorted(checkpoint.folder.glob("consolidated.*.pth"))) > 1:
        raise LoadError(
            f"{checkpoint.source}: the weights are cut over {len(parts)} devices (consolidated.*.pth), which are not "
            "put together here; give the model as transformers has it."
        )
    settings.expect("use_scaled_rope", False, why="its rotary wavelengths are scaled, ours are plain")
    for name in ("moe", "vision_encoder", "vision_chunk_size", "quantization_args"):
        settings.expect(name, None, why="ours is a plain language model")
    rename = Renamer(
        {
            "tok_embeddings.weight": "embed.weight",
            "norm.weight": "backbone.norm.weight",
            "output.weight": "head.weight",
        },
        r"layers\.(\d+)\.(.+)",
        _META_NAMES,
    )
    found, left = _without_tables(checkpoint.tensors, r"rope\.freqs")
    tensors = rename.all(found, checkpoint.source)
    _check_whole(found, ["tok_embeddings.weight", "norm.weight"], "layers.", _META_NAMES, checkpoint.source)
    config = _structure(
        tensors,
        settings,
        heads=settings.integer("n_heads"),
        eps=settings.number("norm_eps", default=1e-5),
        theta=settings.number("rope_theta", default=1e4),
        names={"depth": "n_layers", "dim": "dim", "hidden": "hidden_dim", "kv": "n_kv_heads", "head": "head_dim",
               "vocab": ""},
    )  # fmt: skip
    if "sliding_window" in settings.values:
        config = config.replace(window=settings.integer("sliding_window"))
    _fuse_heads(tensors, config, split=False)
    head = settle_head(tensors, settings, "tied_embeddings", False, bare=False)
    return Published(config=config, tensors=tensors, head=head, left_out=left)


# ---------------------------------------------------------------- both


def _without_tables(tensors: Mapping[str, Tensor], pattern: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    left = {name: _COMPUTED for name in tensors if re.fullmatch(pattern, name)}
    return {name: tensor for name, tensor in tensors.items() if name not in left}, left


def _check_whole(
    tensors: Mapping[str, Tensor], outside: list[str], layers: str, inside: Mapping[str, str], source: str
) -> None:
    """Refuse a checkpoint without a tensor that each of its kind has, by the name that the file would give it."""
    numbers = {int(m[1]) for name in tensors if (m := re.match(re.escape(layers) + r"(\d{1,6})\.", name))}
    wanted = [*outside, *(f"{layers}{i}.{part}weight" for i in sorted(numbers) for part in inside)]
    plain = not any(re.search(r"experts|block_sparse_moe|feed_forward\.gate", name) for name in tensors)
    if plain and (missing := [name for name in wanted if name not in tensors]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise LoadError(f"{source}: the checkpoint has no tensor {', '.join(missing[:3])}{more}; is it whole?")


def _structure(
    tensors: Mapping[str, Tensor], settings: Settings, *, heads: int, eps: float, theta: float, names: dict[str, str]
) -> ILLaMAConfig:
    """Read sizes off the tensors, and refuse settings that say otherwise."""
    source = settings.source
    depth = count_layers(tensors, source)
    if odd := [
        name for name in tensors if re.search(r"\.(q_norm|k_norm|experts|block_sparse_moe|feed_forward\.gate)\.", name)
    ]:
        raise LoadError(f"{source}: {odd[0]} cannot be converted: ours has neither norms of queries nor experts.")
    vocab, dim = need(tensors, "embed.weight", source).shape
    hidden = len(need(tensors, "backbone.layers.0.mlp.gate_proj.weight", source))
    q, k = (need(tensors, f"backbone.layers.0.mixer.{part}.weight", source) for part in "qk")
    for found, name in ((depth, "depth"), (dim, "dim"), (hidden, "hidden"), (vocab, "vocab")):
        settings.agree(found, *([names[name]] if names[name] else []))
    if len(q) != dim or dim % heads or (dim // heads) % 2:
        raise LoadError(
            f"{source}: {heads} heads with {len(q)} channels in all (head_dim) cannot be converted: ours have a head "
            f"width of {dim} / {heads}, an even number."
        )
    width = dim // heads
    settings.agree(width, names["head"])
    if len(k) % width or heads % (len(k) // width or heads + 1):
        raise LoadError(f"{source}: {len(k)} rows of keys are no divisor of {heads} heads of width {width}.")
    settings.agree(len(k) // width, names["kv"])
    bias = "backbone.layers.0.mixer.q.bias" in tensors
    try:
        return ILLaMAConfig(
            dim=dim,
            depth=depth,
            num_heads=heads,
            num_kv_heads=len(k) // width,
            hidden_dim=hidden,
            bias=bias,
            proj_bias=not bias or "backbone.layers.0.mixer.proj.bias" in tensors,
            rope_theta=theta,
            norm_eps=eps,
        )
    except ConfigError as error:
        raise LoadError(f"{source}: {error}") from error


def _fuse_heads(tensors: dict[str, Tensor], config: ILLaMAConfig, split: bool) -> None:
    """Put queries, keys and values of every layer together; ``split`` says that the pairs of rotary are half-split."""
    width = config.dim // config.num_heads
    for layer in range(config.depth):
        for kind in ("weight", "bias"):
            names = [f"backbone.layers.{layer}.mixer.{part}.{kind}" for part in "qkv"]
            for name in names[:2]:
                if split and name in tensors and len(tensors[name]) % width == 0:
                    tensors[name] = interleaved(tensors[name], width)
            fuse(tensors, names, f"backbone.layers.{layer}.mixer.qkv.{kind}")
