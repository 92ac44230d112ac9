"""Published checkpoints of MeshAnything V2: what they are of, and their names.

The repository ``Yiwen-ntu/MeshAnythingV2`` (https://arxiv.org/abs/2408.02555) holds ``model.safetensors``::

    backbone, spec, arguments = published_v2()
    model = MeshGenerator(backbone.build(), spec, **arguments)
    read_published(model, "model.safetensors")

Its rows of embeddings and head are in our order: begin, end, padding, the 128 cells, the separator; and of kinds begin,
end, padding, separator, x y z of a strip's first three vertices, x y z of those after. Checkpoints of V1, whose tokens
are codes of a VQ-VAE, are not read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vertebra.backbones.opt import OPTConfig, opt_350m, transformers_names
from vertebra.backbones.pretrained import LoadReport, load_state
from vertebra.domains.conversion import Converter
from vertebra.domains.mesh.encoder import MICHELANGELO, ShapeEncoderConfig, michelangelo_names, michelangelo_weights
from vertebra.domains.mesh.model import MeshGenerator
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.errors import ConfigError, LoadError
from vertebra.tokenizers.mesh_amt import AMTTokenizer

MAX_FACES = 1600
MAX_TOKENS = MAX_FACES * 9 * 7 // 10
"""Training left out meshes of 0.7 times the nine tokens a face of the plain form, and more."""
POSITIONS = (1 + MICHELANGELO.latents) + 3 + MAX_TOKENS
"""Rows of learned positions, 10,340: condition, three for specials, tokens."""

DECODER, SHAPE = "transformer.model.decoder.", "point_encoder.model.shape_model."
_NAMES = {
    "embed.weight": f"{DECODER}embed_tokens.weight",
    "kind_embed.weight": f"{DECODER}token_embed_positions.weight",
    "cond_embed.weight": f"{DECODER}cond_embed.weight",
    "head.weight": "transformer.lm_head.weight",
    "cond_head_proj.weight": "cond_head_proj.weight",
    "cond_head_proj.bias": "cond_head_proj.bias",
    "cond_proj.weight": "cond_proj.weight",
    "cond_proj.bias": "cond_proj.bias",
}
UNUSED = (f"{SHAPE}geo_decoder.", "point_encoder.model.shape_projection")
"""Prefixes of parts of Michelangelo that no mesh comes from: occupancy, and the match with images and text."""


def published_v2() -> tuple[OPTConfig, MeshSpec, dict[str, Any]]:
    """Return backbone, spec and arguments of the ``MeshGenerator`` that the released V2 is.

    Meshes have +Y up, though its tokenizer takes z for the height, and points come from meshes on the grid.
    """
    spec = MeshSpec(
        tokenizer=AMTTokenizer(128, up="z").to_dict(),
        points=8192,
        max_faces=MAX_FACES,
        max_tokens=MAX_TOKENS,
        place="lower",
    )
    return replace(opt_350m(), max_length=POSITIONS, dropout=0.1), spec, {"encoder": MICHELANGELO}


def from_published(
    tensors: Mapping[str, Tensor], backbone: OPTConfig, encoder: ShapeEncoderConfig
) -> dict[str, Tensor]:
    """Rename the tensors of a V2 checkpoint to those of a ``MeshGenerator``.

    Args:
        tensors: Checkpoint.
        backbone: Structure of its transformer.
        encoder: Structure of its point encoder.

    Raises:
        ConfigError: The point encoder has other queries than Michelangelo's.
        LoadError: A tensor is missing, or there is one without a place.
    """
    if any(name.startswith("tokenizer.") for name in tensors):
        raise LoadError(
            "MeshAnything V2: the checkpoint has a VQ-VAE, so it is V1's; give that of Yiwen-ntu/MeshAnythingV2."
        )
    decoder = {
        f"backbone.{ours}": tuple(DECODER + name for name in theirs)
        for ours, theirs in transformers_names(backbone).items()
    }
    names = decoder | {ours: (theirs,) for ours, theirs in _NAMES.items()}
    used = {name for theirs in names.values() for name in theirs}
    used |= {SHAPE + name for name in michelangelo_names(encoder).values()}
    if missing := sorted(used - tensors.keys()):
        raise LoadError(
            f"MeshAnything V2: the checkpoint lacks {missing[0]!r}, {len(missing)} tensors in all; give that of "
            "Yiwen-ntu/MeshAnythingV2, and a model of its structure."
        )
    if extra := sorted(name for name in tensors if name not in used and not name.startswith(UNUSED)):
        raise LoadError(
            f"MeshAnything V2: the model has no place for {extra[0]!r}, {len(extra)} tensors in all; build it of "
            "published_v2()."
        )
    shape = {name: tensors[name] for name in used if name.startswith(SHAPE)}
    found = {f"encoder.{name}": tensor for name, tensor in michelangelo_weights(encoder, shape, SHAPE).items()}
    return found | {ours: torch.cat([tensors[name] for name in theirs]) for ours, theirs in names.items()}


def is_published(source: str) -> bool:
    """Whether the name is that of a file of weights from elsewhere; our own are in model directories."""
    return Path(source).suffix == ".safetensors" and Path(source).is_file()


def read_published(model: MeshGenerator, path: str | Path) -> LoadReport:
    """Load a published checkpoint of MeshAnything V2, strictly.

    Args:
        model: With the structure of the checkpoint, for the released one that of ``published_v2``.
        path: The safetensors file.

    Raises:
        ConfigError: The model is of another kind.
        LoadError: The file cannot be read, or its tensors do not fit; nothing is loaded then.
    """
    backbone, tokenizer = model.backbone.config, AMTTokenizer(model.tokenizer.bins, up="z")
    if not isinstance(backbone, OPTConfig) or backbone.norm_first or model.head.weight is model.embed.weight:
        raise ConfigError(
            "MeshAnything V2: the model must have an OPT backbone with norm_first=False, and tie=False; build it of "
            "published_v2()."
        )
    if model.tokenizer != tokenizer:
        raise ConfigError(f"MeshAnything V2: the tokenizer must be {tokenizer!r}, got {model.tokenizer!r}.")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path}: cannot be read as a safetensors file ({error}).") from error
    tensors = from_published(tensors, backbone, model.encoder.config)
    return load_state(model, tensors, source=f"the weights of {path}")


CONVERTERS: tuple[Converter, ...] = ()
