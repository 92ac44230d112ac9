"""What the checkpoints of both MeshAnything share: whose they are, sizes that are read off them, and names.

Both are an OPT behind Michelangelo's shape encoder. In all published sizes of these, and of BERT, a head of attention
is 64 channels wide; no tensor tells.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.opt import OPTConfig, transformers_names
from vertebra.domains.mesh.encoder import ShapeEncoderConfig, michelangelo_names, michelangelo_weights
from vertebra.errors import ConfigError, LoadError

HEAD_WIDTH = 64
"""Channels of a head."""
DECODER, SHAPE = "transformer.model.decoder.", "point_encoder.model.shape_model."
"""Where the OPT is, and Michelangelo."""
LEFT_OUT = {
    rf"{re.escape(SHAPE)}geo_decoder\..+": "occupancy of points in space; no mesh is made of it",
    r"point_encoder\.model\.shape_projection": "the match of shapes with images and text; no mesh is made of it",
}
"""Parts without a place in ours, by the pattern of their names, and why."""
_CODEBOOK = f"{DECODER}quantize_codebooks"


def is_meshanything(checkpoint: Checkpoint, version: Literal[1, 2]) -> bool:
    """Whether a checkpoint is of that version."""
    try:
        config = checkpoint.config
        if config.get("model_type") not in (None, "shape_opt") or "backbone" in config:
            return False
        names = checkpoint.tensors.keys()
    except LoadError:
        return False
    ours = f"{DECODER}embed_positions.weight" in names and f"{SHAPE}encoder.query" in names
    return ours and (_CODEBOOK in names) == (version == 1)


@contextmanager
def as_load_error(source: str) -> Iterator[None]:
    """Tell of sizes that no config allows as of a checkpoint that cannot be loaded."""
    try:
        yield
    except ConfigError as error:
        raise LoadError(f"{source}: has sizes of no such model. {error}") from error


# ---------------------------------------------------------------- sizes


def shape_of(tensors: Mapping[str, Tensor], name: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a tensor that sizes are read off.

    Raises:
        LoadError: It is missing, or has another number of axes.
    """
    if name not in tensors:
        raise LoadError(f"MeshAnything: the checkpoint lacks {name!r}, which sizes are read off; is the file whole?")
    shape = tuple(tensors[name].shape)
    if len(shape) != axes:
        raise LoadError(f"MeshAnything: {name!r} must have {axes} axes, got the shape {shape}.")
    return shape


def heads_of(width: int, what: str) -> int:
    """Return how many heads of attention a width is.

    Raises:
        LoadError: It is not one of whole heads.
    """
    if not width or width % HEAD_WIDTH:
        raise LoadError(
            f"MeshAnything: the width of {what} must be a multiple of {HEAD_WIDTH}, the channels of a head in all "
            f"published models, got {width}; no tensor tells how many heads there are."
        )
    return width // HEAD_WIDTH


def count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Return one more than the highest number that stands behind ``prefix``; 0 where there is none."""
    found = (re.match(r"(\d+)\.", name[len(prefix) :]) for name in tensors if name.startswith(prefix))
    return max((int(match[1]) + 1 for match in found if match), default=0)


def encoder_config(tensors: Mapping[str, Tensor]) -> ShapeEncoderConfig:
    """Read the structure of Michelangelo off its tensors.

    Raises:
        LoadError: A tensor is missing or misshapen.
        ConfigError: There is no encoder of these sizes.
    """
    queries, width = shape_of(tensors, f"{SHAPE}encoder.query", 2)
    _, inputs = shape_of(tensors, f"{SHAPE}encoder.input_proj.weight", 2)
    moments, _ = shape_of(tensors, f"{SHAPE}pre_kl.weight", 2)
    return ShapeEncoderConfig(
        width=width,
        heads=heads_of(width, "Michelangelo"),
        layers=count_layers(tensors, f"{SHAPE}encoder.self_attn.resblocks."),
        latents=queries - 1,
        frequencies=(inputs - 6) // 6,  # a position and its normal, then a sine and a cosine of each coordinate
        bottleneck=moments // 2,
        decoder_layers=count_layers(tensors, f"{SHAPE}transformer.resblocks."),
    )


# ---------------------------------------------------------------- names


def to_ours(
    tensors: Mapping[str, Tensor],
    names: Mapping[str, Sequence[str]],
    backbone: OPTConfig,
    encoder: ShapeEncoderConfig,
    *,
    version: Literal[1, 2],
    repository: str,
) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint to those of a generator of ours: all of them, and no others.

    Args:
        tensors: Checkpoint, without the parts that are left out.
        names: By ours, those that are put together to it, beside the OPT and Michelangelo.
        backbone: Structure of the OPT.
        encoder: Structure of Michelangelo.
        version: For errors.
        repository: For errors.

    Raises:
        ConfigError: The encoder has other queries than Michelangelo's.
        LoadError: A tensor is missing, or there is one without a place.
    """
    opt = {f"backbone.{k}": [DECODER + name for name in theirs] for k, theirs in transformers_names(backbone).items()}
    parts = {**opt, **names}
    places = {SHAPE + name for name in michelangelo_names(encoder).values()}
    used = places.union(*parts.values())
    if missing := sorted(used - tensors.keys()):
        raise LoadError(
            f"MeshAnything V{version}: the checkpoint lacks {missing[0]!r}, {len(missing)} tensors in all; give that "
            f"of {repository}, and a model of its structure."
        )
    if extra := sorted(tensors.keys() - used):
        raise LoadError(
            f"MeshAnything V{version}: the model has no place for {extra[0]!r}, {len(extra)} tensors in all; build it "
            f"of published_v{version}()."
        )
    shape = michelangelo_weights(encoder, {name: tensors[name] for name in places}, SHAPE)
    found = {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in parts.items()}
    return found | {f"encoder.{name}": tensor for name, tensor in shape.items()}


def to_michelangelo(config: ShapeEncoderConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of our ``encoder`` as MeshAnything has them; ``michelangelo_weights`` is the way there.

    Args:
        config: Structure.
        tensors: Of a model with an ``encoder``.

    Raises:
        ConfigError: Michelangelo's queries are learned.
    """
    found = {}
    for ours, theirs in michelangelo_names(config).items():
        tensor, kinds = tensors[f"encoder.{ours}"], 3 if ".qkv." in ours else 2 if ".kv." in ours else 0
        if kinds:  # each kind together there, head by head here
            tensor = tensor.unflatten(0, (kinds, config.heads, -1)).transpose(0, 1).flatten(0, 2)
        found[SHAPE + theirs] = tensor
    return found


def to_opt(config: OPTConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of our ``backbone`` as MeshAnything has them."""
    found: dict[str, Tensor] = {}
    for ours, theirs in transformers_names(config).items():
        parts = tensors[f"backbone.{ours}"].chunk(len(theirs))
        found |= {DECODER + name: part for name, part in zip(theirs, parts, strict=True)}
    return found
