"""Vision transformers as timm has them: their names, their config, and what of both ours has.

The architecture is that of https://arxiv.org/abs/2010.11929 with a classifier on [cls] or on the mean of the patches.
Our form is the bidirectional OPT stack inside ``ImageClassifier``: there [cls] stands behind the patches, which changes
nothing, since positions are learned rows. LayerScale (https://arxiv.org/abs/2103.17239) is multiplied into the
projections that it follows, and biases that a model does without are zeros.

Shapes: N patches, D width, K classes.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.opt import OPTConfig
from vertebra.domains.conversion import Conversion, Converter, loaded, split_left_out
from vertebra.domains.model import DomainModel
from vertebra.domains.vision.model import ImageClassifier, Pooling
from vertebra.domains.vision.spec import Crop, VisionSpec
from vertebra.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

NORM_EPS = 1e-6
HEADS = {192: 3, 384: 6, 512: 8, 640: 10, 768: 12, 896: 14, 1024: 16, 1280: 16, 1408: 16, 1664: 16}
"""Heads by the width of the models with [cls] in timm; weights do not tell them."""
SIZES = {192: "tiny", 384: "small", 768: "base", 1024: "large"}

_INSIDE = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.qkv": "mixer.qkv",
    "attn.proj": "mixer.proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_OUTSIDE = {ours: theirs for theirs, ours in _INSIDE.items()}
_SCALES = {"ls1.gamma": "attn.proj", "gamma_1": "attn.proj", "ls2.gamma": "mlp.fc2", "gamma_2": "mlp.fc2"}
"""LayerScale, in timm's and in DeiT III's words, and what it follows."""
_BIASED = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_PARTS = re.compile(r"blocks\.(\d+)\.(.+)")
_REFUSED = {
    r"dist_token|head_dist\..+": "a distillation token",
    r"reg_token|register_tokens": "register tokens",
    r"norm_pre\..+": "a norm before the blocks (pre_norm)",
    r"attn_pool\..+": "pooling by attention (global_pool=map)",
    r"patch_embed\.(backbone|norm)\..+": "a patch embedding that is more than a projection",
    r".+\.attn\.[qk]_norm\..+": "norms of queries and keys (qk_norm)",
    r".+\.(attn|mlp)\.norm\..+": "norms inside of the branches (scale_attn_norm, scale_mlp_norm)",
    r".+\.attn\.([qv]_bias|[qkv]_proj\..+)": "separate queries, keys and values",
    r".*(rope|rel_pos|relative_position).*": "rotary or relative positions",
    r".+\.mlp\.(fc1_[gx]|w12|w[123])\..+": "SwiGLU",
}
_LEFT_OUT = {"mask_token": "stands for hidden patches in a pretraining; nothing is hidden from a classifier"}


# ---------------------------------------------------------------- the converter


class ViT(Converter):
    """Plain vision transformers of timm."""

    name: ClassVar[str] = "timm_vit"
    summary: ClassVar[str] = "vision transformers of timm (ViT, DeiT, DeiT III, DINOv2 without registers)"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell by the names of blocks and patch embedding."""
        names = image_names(checkpoint)
        return "blocks.0.norm1.weight" in names and not any(name.startswith("blocks.0.mlp.fc3.") for name in names)

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make the model; see ``Converter``."""
        tensors, left_out = split_left_out(checkpoint.tensors, _LEFT_OUT)
        structure = read_structure(tensors, checkpoint)
        spec = image_spec(checkpoint, tensors, structure.size, Preparation((0.5,) * 3, (0.5,) * 3, 0.9))
        model = ImageClassifier(structure.backbone.build(), spec, **structure.arguments)
        changes = [what for what, there in (
            ("LayerScale is multiplied into the projections that it follows.", structure.scaled),
            ("Biases that the original does without are zeros.", structure.biasless),
            ("The original adds no position to [cls]: its row is zero.", structure.no_embed_class),
            ("No config stood beside the weights: heads and normalisation are those that timm's models of this width "
             "have.", not checkpoint.config),
        ) if there]  # fmt: skip
        notes = {"conversion": " ".join(changes)} if changes else {}
        return loaded(model, from_timm(tensors, structure), checkpoint, left_out=left_out, notes=notes)

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and ``config.json`` as timm has them; see ``Converter``."""
        fc_norm = _check_restorable(model)
        assert isinstance(model, ImageClassifier)
        assert isinstance(model.backbone.config, OPTConfig)
        return to_timm(model), _timm_config(model, model.backbone.config, fc_norm)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """What a checkpoint is of.

    Args:
        backbone: The blocks.
        arguments: Of ``ImageClassifier``.
        size: Height and width of the images.
        no_embed_class: Whether [cls] has no position.
        scaled: Whether there is LayerScale.
        biasless: Whether projections lack biases.
    """

    backbone: OPTConfig
    arguments: dict[str, Any]
    size: tuple[int, int]
    no_embed_class: bool
    scaled: bool
    biasless: bool


class Preparation(NamedTuple):
    """What images go through, in the words of ``VisionSpec``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_fraction: float
    crop: Crop = "centre"


def image_names(checkpoint: Checkpoint) -> frozenset[str]:
    """Return the names of a checkpoint's tensors, if it is of an image model with blocks; else none."""
    try:
        if {"model_type", "spec", "backbone"} & checkpoint.config.keys():  # of transformers, or ours
            return frozenset()
        names = frozenset(checkpoint.tensors)
    except LoadError:  # a folder of another kind
        return frozenset()
    return names if "patch_embed.proj.weight" in names else frozenset()


def read_structure(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> Structure:
    """Work out what a checkpoint is of, from tensors and config.

    Raises:
        LoadError: Something in it is not in our form; the text names the tensor, or the field of the config.
    """
    source = checkpoint.source
    for pattern, what in _REFUSED.items():
        if found := next((name for name in tensors if re.fullmatch(pattern, name)), None):
            raise LoadError(f"{source}: {found} is of {what}, which our vision transformer has not.")
    dim, patch = patch_shape(tensors, source)
    depth = block_count(tensors, source)
    fc1, fc2 = (_matrix(tensors, f"blocks.0.mlp.{name}.weight", source) for name in ("fc1", "fc2"))
    if fc1.shape[0] != fc2.shape[1]:
        raise LoadError(
            f"{source}: blocks.0.mlp.fc1.weight makes {fc1.shape[0]} features of which fc2 takes {fc2.shape[1]}: that "
            "is SwiGLU, which our vision transformer has not."
        )
    norms = [name for name in ("norm.weight", "fc_norm.weight") if name in tensors]
    if len(norms) != 1:
        raise LoadError(
            f"{source}: one of norm.weight and fc_norm.weight must stand behind the blocks, got "
            f"{' and '.join(norms) or 'neither'}."
        )
    has_cls = "cls_token" in tensors
    told = _told(checkpoint, dim, has_cls)
    fc_norm = "fc_norm.weight" in tensors
    pooling = told.pooling or ("cls" if has_cls and not fc_norm else "mean")
    if pooling == "cls" and not has_cls:
        raise LoadError(f"{source}: global_pool=token reads [cls], but there is no cls_token; is the config another's?")
    size, no_embed_class = grid_size(checkpoint, tensors, patch, has_cls)
    separate = fc_norm and pooling == "mean"  # of a single token, both are the same
    try:
        backbone = OPTConfig(
            dim=dim,
            depth=depth,
            causal=False,
            heads=told.heads,
            hidden=fc1.shape[0],
            activation="gelu",
            final_norm=not separate,
            positions="none",
            norm_eps=told.norm_eps,
        )
    except ConfigError as error:
        raise LoadError(f"{source}: {error}") from error
    return Structure(
        backbone=backbone,
        arguments={
            "patch_size": patch,
            "pooling": pooling,
            "positions": "learned" if "pos_embed" in tensors else "none",
            "with_cls": has_cls,
            "pooled_norm": told.norm_eps if separate else 0.0,
        },
        size=size,
        no_embed_class=no_embed_class,
        scaled=any(name.endswith(tuple(_SCALES)) for name in tensors),
        biasless=any(f"blocks.0.{part}.bias" not in tensors for part in _BIASED),
    )


def from_timm(tensors: Mapping[str, Tensor], structure: Structure) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint to those of an ``ImageClassifier``; names without a place stay as they are."""
    scales: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    last = "pooled_norm." if structure.arguments["pooled_norm"] else "backbone.norm."
    for name, tensor in tensors.items():
        part = _PARTS.fullmatch(name)
        inner, _, kind = part[2].rpartition(".") if part else ("", "", "")
        if part and part[2] in _SCALES:
            scales[name] = tensor
        elif part and inner in _INSIDE:
            found[f"backbone.layers.{part[1]}.{_INSIDE[inner]}.{kind}"] = tensor
        elif name.startswith(("norm.", "fc_norm.")):
            found[last + name.rpartition(".")[2]] = tensor
        else:
            found[name] = tensor
    for part_name in _BIASED:
        if not any(f"blocks.{i}.{part_name}.bias" in tensors for i in range(structure.backbone.depth)):
            for i in range(structure.backbone.depth):
                ours = f"backbone.layers.{i}.{_INSIDE[part_name]}"
                if f"{ours}.weight" in found:
                    found[f"{ours}.bias"] = found[f"{ours}.weight"].new_zeros(len(found[f"{ours}.weight"]))
    for name, scale in scales.items():
        _, number, kind = name.split(".", 2)
        ours = f"backbone.layers.{number}.{_INSIDE[_SCALES[kind]]}"
        weight, bias = found.get(f"{ours}.weight"), found.get(f"{ours}.bias")
        if weight is None or bias is None or not len(weight) == len(bias) == scale.numel() == len(scale):
            found[name] = scale  # has no place, so that loading lists it
        else:
            found[f"{ours}.weight"], found[f"{ours}.bias"] = weight * scale[:, None], bias * scale
    if "pos_embed" in found and structure.arguments["with_cls"]:
        rows = found["pos_embed"]  # (1, N + 1, D), [cls] first; or (1, N, D)
        cls = torch.zeros_like(rows[:, :1]) if structure.no_embed_class else rows[:, :1]
        found["pos_embed"] = torch.cat([rows if structure.no_embed_class else rows[:, 1:], cls], dim=1)
    return found


def to_timm(model: ImageClassifier) -> dict[str, Tensor]:
    """Return a model's weights by timm's names, the inverse of ``from_timm`` where nothing was put together."""
    found: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        part = re.fullmatch(r"backbone\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        if part:
            found[f"blocks.{part[1]}.{_OUTSIDE[part[2]]}.{part[3]}"] = tensor
        elif name.startswith("backbone.norm."):
            found[name.removeprefix("backbone.")] = tensor
        elif name.startswith("pooled_norm."):
            found[f"fc_norm.{name.removeprefix('pooled_norm.')}"] = tensor
        elif name == "pos_embed" and model.cls_token is not None:
            found[name] = torch.cat([tensor[:, -1:], tensor[:, :-1]], dim=1)
        else:
            found[name] = tensor
    return found


# ---------------------------------------------------------------- what tensors tell of any image model


def patch_shape(tensors: Mapping[str, Tensor], source: str) -> tuple[int, int]:
    """Return width D and patch size of a convolution over patches.

    Raises:
        LoadError: There is none, or its patches are no squares of grey or RGB pixels.
    """
    weight = tensors.get("patch_embed.proj.weight")
    if weight is None or weight.ndim != 4 or weight.shape[2] != weight.shape[3] or weight.shape[1] not in (1, 3):
        shape = "nothing" if weight is None else tuple(weight.shape)
        raise LoadError(
            f"{source}: patch_embed.proj.weight must be (width, channels, P, P) for squares of grey or RGB pixels, got "
            f"{shape}."
        )
    return weight.shape[0], weight.shape[2]


def block_count(tensors: Mapping[str, Tensor], source: str) -> int:
    """Return the number of blocks.

    Raises:
        LoadError: One is missing.
    """
    numbers = {int(part[1]) for name in tensors if (part := _PARTS.fullmatch(name))}
    if not numbers or numbers != set(range(len(numbers))):
        missing = next(i for i in range(len(numbers) + 1) if i not in numbers)
        raise LoadError(f"{source}: blocks.{missing}.* is missing; is the file whole?")
    return len(numbers)


def grid_size(
    checkpoint: Checkpoint, tensors: Mapping[str, Tensor], patch: int, has_cls: bool
) -> tuple[tuple[int, int], bool]:
    """Return height and width of the images, and whether [cls] is without a position.

    Raises:
        LoadError: The rows of ``pos_embed`` are those of no square, and of no size that the config has.
    """
    sizes = []
    arguments, image = mapping(checkpoint, "model_args"), image_config(checkpoint)
    for found in (arguments.get("img_size"), image.get("img_size"), image.get("input_size")):
        numbers = [found, found] if isinstance(found, int) else found
        if isinstance(numbers, list) and len(numbers) >= 2 and all(type(n) is int and n > 0 for n in numbers):
            sizes.append((numbers[-2] // patch, numbers[-1] // patch))
    if "pos_embed" not in tensors:
        grid = sizes[0] if sizes else (224 // patch, 224 // patch)
        return (grid[0] * patch, grid[1] * patch), False
    rows = tensors["pos_embed"].shape[1] if tensors["pos_embed"].ndim == 3 else 0
    for count, no_embed_class in ((rows - 1, False), (rows, True)) if has_cls else ((rows, False),):
        side = math.isqrt(max(count, 0))
        for grid in (*sizes, (side, side)):
            if count > 0 and grid[0] * grid[1] == count:
                return (grid[0] * patch, grid[1] * patch), no_embed_class
    raise LoadError(
        f"{checkpoint.source}: pos_embed {tuple(tensors['pos_embed'].shape)} is of no square image, nor of the size in "
        'config.json; put one beside the weights with {"pretrained_cfg": {"input_size": [3, HEIGHT, WIDTH]}}.'
    )


def image_spec(
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    size: tuple[int, int],
    otherwise: Preparation,
) -> VisionSpec:
    """Return the facts about images: those of timm's config, and ``otherwise`` what it does not tell.

    Raises:
        LoadError: The config has an interpolation or a crop that ours has not.
    """
    config, channels = image_config(checkpoint), tensors["patch_embed.proj.weight"].shape[1]
    crop = config.get("crop_mode") or ("squash" if otherwise.crop == "squash" else "center")
    interpolation = config.get("interpolation") or "bicubic"
    if crop not in ("center", "squash"):
        raise LoadError(
            f"{checkpoint.source}: crop_mode must be center or squash, got {crop!r}; change it in config.json."
        )
    if interpolation not in ("bilinear", "bicubic"):
        raise LoadError(
            f"{checkpoint.source}: interpolation must be bilinear or bicubic, got {interpolation!r}; change it in "
            "config.json."
        )
    count = len(tensors["head.weight"]) if "head.weight" in tensors else 0
    try:
        return VisionSpec(
            task="classification",
            channels=channels,
            height=size[0],
            width=size[1],
            classes=_class_names(checkpoint, count),
            mean=_per_channel(config.get("mean"), otherwise.mean, channels),
            std=_per_channel(config.get("std"), otherwise.std, channels),
            crop="squash" if crop == "squash" else "centre",
            crop_fraction=float(config.get("crop_pct") or otherwise.crop_fraction),
            interpolation=interpolation,
        )
    except (TypeError, ValueError) as error:
        raise LoadError(
            f"{checkpoint.source}: config.json has a mean, std or crop_pct of no numbers ({error})."
        ) from error


def image_config(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return what timm's config says of the images; older ones say it at the top."""
    return mapping(checkpoint, "pretrained_cfg") or checkpoint.config


def mapping(checkpoint: Checkpoint, field: str) -> Mapping[str, Any]:
    """Return an object in the config, empty where there is none.

    Raises:
        LoadError: The field holds something else.
    """
    found = checkpoint.config.get(field) or {}
    if not isinstance(found, dict):
        raise LoadError(f"{checkpoint.source}: {field} in config.json must be an object, got {found!r}.")
    return found


def _class_names(checkpoint: Checkpoint, count: int) -> tuple[str, ...]:
    labels = checkpoint.config.get("label_names") or image_config(checkpoint).get("label_names")
    if isinstance(labels, list) and len(labels) == count and all(isinstance(name, str) for name in labels):
        return tuple(labels)
    return imagenet_names() if count == 1000 else tuple(str(i) for i in range(count))


def imagenet_names() -> tuple[str, ...]:
    """Return the words for ImageNet's 1,000 classes; where two have the same, WordNet's number stands behind."""
    from timm.data.imagenet_info import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    words = [info.index_to_description(i) for i in range(1000)]
    return tuple(
        word if words.count(word) == 1 else f"{word} ({info.index_to_label_name(i)})" for i, word in enumerate(words)
    )


def _per_channel(given: Any, otherwise: tuple[float, ...], channels: int) -> tuple[float, ...]:
    numbers = tuple(float(n) for n in given) if given else otherwise
    return numbers if len(numbers) == channels else (sum(numbers) / len(numbers),) * channels


def _matrix(tensors: Mapping[str, Tensor], name: str, source: str) -> Tensor:
    if name not in tensors or tensors[name].ndim != 2:
        raise LoadError(f"{source}: {name} must be a matrix; is it a vision transformer?")
    return tensors[name]


# ---------------------------------------------------------------- what timm's config tells


@dataclass(frozen=True)
class _Told:
    """What tensors do not tell.

    Args:
        heads: Of the attention.
        norm_eps: Of the norms.
        pooling: None where nothing is said.
    """

    heads: int
    norm_eps: float = NORM_EPS
    pooling: Pooling | None = None


def _told(checkpoint: Checkpoint, dim: int, has_cls: bool) -> _Told:
    config, arguments = checkpoint.config, dict(mapping(checkpoint, "model_args"))
    if config.get("global_pool") and "global_pool" not in arguments:
        arguments["global_pool"] = config["global_pool"]
    pooling = _pooling(checkpoint, arguments.get("global_pool"))
    if isinstance(config.get("architecture"), str):
        model = _built(checkpoint, config["architecture"], arguments)
        block: Any = model.blocks[0]
        return _Told(block.attn.num_heads, block.norm1.eps, _pooling(checkpoint, model.global_pool))
    heads = arguments.get("num_heads") or config.get("num_heads") or (HEADS.get(dim) if has_cls else None)
    if not isinstance(heads, int) or heads < 1 or dim % heads:
        raise LoadError(
            f"{checkpoint.source}: how many heads a width of {dim} has is not known from the weights; put a "
            'config.json beside them with {"num_heads": N}, or with the "architecture" in timm.'
        )
    return _Told(heads, pooling=pooling)


def _pooling(checkpoint: Checkpoint, word: object) -> Pooling | None:
    if word is None:
        return None
    if word not in ("token", "avg"):
        raise LoadError(f"{checkpoint.source}: global_pool must be token or avg, got {word!r}.")
    return "cls" if word == "token" else "mean"


def _built(checkpoint: Checkpoint, architecture: str, arguments: Mapping[str, Any]) -> VisionTransformer:
    """Return timm's model of one block, without memory for weights, and refuse what ours cannot do."""
    import timm
    from timm.layers.attention import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    source, name = checkpoint.source, architecture.partition(".")[0]
    if not timm.is_model(name):
        raise LoadError(f"{source}: the architecture {name!r} is no model of the timm that is installed; is it newer?")
    known = set(inspect.signature(VisionTransformer.__init__).parameters) - {"self", "device", "dtype"}
    if unknown := sorted(arguments.keys() - known):  # others would make timm read files, or ask the hub
        raise LoadError(f"{source}: model_args.{unknown[0]} in config.json is no argument of a vision transformer.")
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **{**arguments, "depth": 1, "num_classes": 0})
    except Exception as error:  # whatever a config can make timm raise
        raise LoadError(
            f"{source}: timm cannot build {name!r} with the model_args of config.json ({error})."
        ) from error
    if type(model) is not VisionTransformer:
        raise LoadError(f"{source}: {name!r} is a {type(model).__name__}, not a plain vision transformer.")
    block = model.blocks[0]
    for what, fits in (
        ("block", type(block) is Block),
        ("attention", type(getattr(block, "attn", None)) is Attention),
        ("activation", _is_gelu(getattr(getattr(block, "mlp", None), "act", None))),
        ("norm", isinstance(getattr(block, "norm1", None), torch.nn.LayerNorm)),
        ("pooling", not model.pool_include_prefix),
    ):
        if not fits:
            raise LoadError(f"{source}: the {what} of {name!r} with these model_args is none that ours can do.")
    return model


def _is_gelu(module: object) -> bool:
    return isinstance(module, torch.nn.GELU) and module.approximate == "none"


# ---------------------------------------------------------------- the way back


def _check_restorable(model: DomainModel) -> bool:
    """Return whether the norm is ``fc_norm``; refuse what timm's model is not."""
    config = model.backbone.config
    if not isinstance(model, ImageClassifier) or not isinstance(config, OPTConfig):
        raise LoadError(
            f"{ViT.name}: the model must be an image classifier with an OPT backbone, got a {type(model).__name__} "
            f"with {config.family}."
        )
    for what, found, wanted in (
        ("causal", config.causal, False),
        ("norm_first", config.norm_first, True),
        ("activation", config.activation, "gelu"),
        ("positions", config.positions, "none"),
        ("norm_eps", config.norm_eps, NORM_EPS),
    ):
        if found != wanted:
            raise LoadError(f"{ViT.name}: the backbone must have {what}={wanted}, got {found}; timm has no such model.")
    separate = not isinstance(model.pooled_norm, torch.nn.Identity)
    if separate == config.final_norm or model.arguments["pooled_norm"] not in (0.0, NORM_EPS):
        raise LoadError(
            f"{ViT.name}: the model must have either the backbone's final_norm or a pooled_norm of {NORM_EPS}."
        )
    return separate


def _timm_config(model: ImageClassifier, backbone: OPTConfig, fc_norm: bool) -> dict[str, Any]:
    spec, pool = model.spec, "token" if model.pooling == "cls" else "avg"
    ratio = backbone.hidden / backbone.dim
    if int(backbone.dim * ratio) != backbone.hidden:  # timm cuts off what floats leave
        ratio = (backbone.hidden + 0.5) / backbone.dim
    classes = len(spec.classes)
    return {
        "architecture": f"vit_{SIZES.get(backbone.dim, 'base')}_patch16_224",
        "num_classes": classes,
        "num_features": backbone.dim,
        "global_pool": pool,
        "label_names": list(spec.classes),
        "model_args": {
            "img_size": [spec.height, spec.width],
            "patch_size": model.patch_size,
            "in_chans": spec.channels,
            "num_classes": classes,
            "global_pool": pool,
            "embed_dim": backbone.dim,
            "depth": backbone.depth,
            "num_heads": backbone.heads,
            "mlp_ratio": ratio,
            "class_token": model.cls_token is not None,
            "pos_embed": "none" if model.pos_embed is None else "learn",
            "fc_norm": fc_norm,
        },
        "pretrained_cfg": {
            "num_classes": classes,
            "input_size": [spec.channels, spec.height, spec.width],
            "fixed_input_size": True,
            "mean": list(spec.mean),
            "std": list(spec.std),
            "crop_pct": spec.crop_fraction,
            "crop_mode": "squash" if spec.crop == "squash" else "center",
            "interpolation": spec.interpolation,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
