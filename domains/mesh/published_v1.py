"""Published checkpoints of MeshAnything V1: what they are of, their names, and back.

The repository ``Yiwen-ntu/MeshAnything`` (https://arxiv.org/abs/2406.10163) holds ``MeshAnything_350m.pth``, which is a
safetensors file. It has the generator, the decoder of the VQ-VAE and its codebook, but not the encoder of faces: see
``codes``. Ids are begin, end, padding, then the codes; kinds are the same three, then the places in a face.

The decoder is BERT's, and is saved by the names of BetterTransformer's fused layers; plain names are read too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.opt import OFFSET, OPTConfig, opt_350m, transformers_names
from vertebra.domains.conversion import Conversion, Converter, loaded, split_left_out
from vertebra.domains.mesh.codes import MeshCodeGenerator
from vertebra.domains.mesh.encoder import MICHELANGELO, ShapeEncoderConfig
from vertebra.domains.mesh.model import SPECIAL
from vertebra.domains.mesh.published_parts import (
    DECODER,
    LEFT_OUT,
    as_load_error,
    count_layers,
    encoder_config,
    heads_of,
    is_meshanything,
    shape_of,
    to_michelangelo,
    to_opt,
    to_ours,
)
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.model import DomainModel
from vertebra.errors import LoadError
from vertebra.tokenizers.mesh import CoordinateTokenizer

MAX_FACES = 800
"""Training left out meshes of more."""
POSITIONS = 18_259
"""Rows of learned positions: condition, begin, 2000 faces, end."""
FACE_POSITIONS = 18_000
"""Rows of the decoder's learned positions."""

TOKENIZER = "tokenizer."
"""Where the decoder of the VQ-VAE is."""
CODEBOOK = f"{DECODER}quantize_codebooks"
_LEFT_OUT = {
    **LEFT_OUT,
    rf"{re.escape(DECODER)}embed_tokens\.weight": "a table that the original never reads: codes have their codebook",
}
_NAMES = {
    "special_embed.weight": f"{DECODER}extra_embeds.weight",
    "code_proj.weight": f"{DECODER}input_layer.weight",
    "code_proj.bias": f"{DECODER}input_layer.bias",
    "kind_embed.weight": f"{DECODER}token_embed_positions.weight",
    "cond_embed.weight": f"{DECODER}cond_embed.weight",
    "head.weight": "transformer.lm_head.weight",
    "decoder.positions.weight": f"{TOKENIZER}pos_embedding.weight",
    "decoder.condition.positions.weight": f"{TOKENIZER}point_pe.weight",
} | {
    f"{ours}.{kind}": f"{theirs}.{kind}"
    for kind in ("weight", "bias")
    for ours, theirs in (
        ("cond_head_proj", "cond_head_proj"),
        ("cond_proj", "cond_proj"),
        ("decoder.proj", f"{TOKENIZER}project_down_codebook"),
        ("decoder.norm", f"{TOKENIZER}layernorm"),
        ("decoder.condition.head_proj", f"{TOKENIZER}cond_head_proj"),
        ("decoder.condition.proj", f"{TOKENIZER}cond_proj"),
        ("decoder.condition.norm", f"{TOKENIZER}point_layernorm"),
        ("decoder.head", f"{TOKENIZER}to_coor_logits.0"),
    )
}
_FUSED = {
    "norm1": "norm1",
    "mixer.qkv": "in_proj",
    "mixer.proj": "out_proj",
    "norm2": "norm2",
    "mlp.fc1": "linear1",
    "mlp.fc2": "linear2",
}
"""Parts of a layer of BERT by their names here and in BetterTransformer."""


def published_v1() -> tuple[OPTConfig, MeshSpec, dict[str, Any]]:
    """Return backbone, spec and arguments of the ``MeshCodeGenerator`` that the released V1 is."""
    spec = MeshSpec(
        tokenizer=CoordinateTokenizer(128).to_dict(),
        points=4096,
        max_faces=MAX_FACES,
        max_tokens=9 * MAX_FACES,
        place="lower",
    )
    decoder = OPTConfig(
        dim=768,
        depth=6,
        heads=12,
        hidden=3072,
        causal=False,
        norm_first=False,
        activation="gelu",
        positions="none",
        norm_eps=1e-12,
        dropout=0.1,
    )
    arguments = {
        "decoder": decoder,
        "encoder": MICHELANGELO,
        "codebook_size": 8192,
        "code_dim": 1024,
        "levels": 3,
        "face_positions": FACE_POSITIONS,
    }
    return replace(opt_350m(), max_length=POSITIONS, dropout=0.1), spec, arguments


def structure(tensors: Mapping[str, Tensor]) -> tuple[OPTConfig, MeshSpec, dict[str, Any]]:
    """Read what ``published_v1`` returns off the tensors of a V1 checkpoint.

    Raises:
        LoadError: A tensor is missing or misshapen.
        ConfigError: There is no such model of these sizes.
    """
    released, spec, arguments = published_v1()
    encoder = encoder_config(tensors)
    rows, width = shape_of(tensors, f"{DECODER}embed_positions.weight", 2)
    hidden, _ = shape_of(tensors, f"{DECODER}layers.0.fc1.weight", 2)
    books, codes, code_dim = shape_of(tensors, CODEBOOK, 3)
    if books != 1:
        raise LoadError(f"MeshAnything V1: {CODEBOOK} must be one codebook for all levels, got {books}.")
    kinds, _ = shape_of(tensors, f"{DECODER}token_embed_positions.weight", 2)
    per_face = kinds - SPECIAL
    if per_face < 1 or per_face % 3:
        raise LoadError(
            f"MeshAnything V1: {DECODER}token_embed_positions must have a row for each of three special tokens and for "
            f"each level of three vertices, got {kinds} rows."
        )
    backbone = replace(
        released,
        dim=width,
        depth=count_layers(tensors, f"{DECODER}layers."),
        heads=heads_of(width, "the OPT"),
        hidden=hidden,
        max_length=rows - OFFSET,
    )
    inner = [name for name in ("linear1_weight", "intermediate.dense.weight") if _layer(0, name) in tensors]
    decoder_hidden, decoder_width = shape_of(tensors, _layer(0, (inner or ["linear1_weight"])[0]), 2)
    decoder = replace(
        arguments["decoder"],
        dim=decoder_width,
        depth=count_layers(tensors, f"{TOKENIZER}decoder.layer."),
        heads=heads_of(decoder_width, "the decoder"),
        hidden=decoder_hidden,
    )
    places, _ = shape_of(tensors, f"{TOKENIZER}pos_embedding.weight", 2)
    logits, _ = shape_of(tensors, f"{TOKENIZER}to_coor_logits.0.weight", 2)
    room = (backbone.max_length - (1 + encoder.latents) - 2) // per_face  # begin and end
    faces = min(MAX_FACES, room, places)
    spec = replace(
        spec,
        tokenizer=CoordinateTokenizer(logits // 9).to_dict(),
        max_faces=faces,
        max_tokens=faces * per_face,
    )
    sizes = {"codebook_size": codes, "code_dim": code_dim, "levels": per_face // 3, "face_positions": places}
    return backbone, spec, {"decoder": decoder, "encoder": encoder, **sizes}


def from_published_v1(
    tensors: Mapping[str, Tensor], backbone: OPTConfig, encoder: ShapeEncoderConfig, decoder: OPTConfig
) -> dict[str, Tensor]:
    """Rename the tensors of a V1 checkpoint to those of a ``MeshCodeGenerator``.

    Args:
        tensors: Checkpoint, without the parts that are left out.
        backbone: Structure of its transformer.
        encoder: Structure of its point encoder.
        decoder: Structure of the decoder of its VQ-VAE.

    Raises:
        LoadError: A tensor is missing, or there is one without a place.
    """
    fused = any(name.startswith(f"{TOKENIZER}decoder.") and name.endswith("in_proj_weight") for name in tensors)
    names = _fused_names(decoder) if fused else _plain_names(decoder)
    names |= {ours: (theirs,) for ours, theirs in _NAMES.items()} | {"codebook": (CODEBOOK,)}
    found = to_ours(tensors, names, backbone, encoder, version=1, repository="Yiwen-ntu/MeshAnything")
    return found | {"codebook": found["codebook"][0]}


class MeshAnythingV1(Converter):
    """The generator of MeshAnything V1 with the decoder of its VQ-VAE, of any size."""

    name: ClassVar[str] = "meshanything_v1"
    summary: ClassVar[str] = "MeshAnything V1: points to codes of a VQ-VAE, an OPT behind Michelangelo's encoder"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """As in ``Converter``."""
        return is_meshanything(checkpoint, version=1)

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """As in ``Converter``; what no tensor tells, such as the number of points, is the released model's."""
        tensors, left = split_left_out(checkpoint.tensors, _LEFT_OUT)
        with as_load_error(checkpoint.source):
            backbone, spec, arguments = structure(tensors)
            model = MeshCodeGenerator(backbone.build(), spec, **arguments)
        found = from_published_v1(tensors, backbone, arguments["encoder"], arguments["decoder"])
        return loaded(model, found, checkpoint, left_out=left, notes=NOTES)

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As in ``Converter``, with BetterTransformer's names.

        The parts that ``convert`` left out are gone: the original must load without them.
        """
        if not isinstance(model, MeshCodeGenerator):
            raise LoadError(f"{self.name}: must be given a MeshCodeGenerator, got a {type(model).__name__}.")
        backbone, encoder, decoder = model.backbone.config, model.encoder.config, model.decoder.backbone.config
        kind = {"norm_first": False, "positions": "none", "activation": "gelu", "norm_eps": 1e-12}
        if (
            not (isinstance(backbone, OPTConfig) and isinstance(decoder, OPTConfig))
            or backbone.norm_first
            or (backbone.positions, backbone.activation) != ("learned", "relu")
            or any(getattr(decoder, name) != value for name, value in kind.items())
            or not encoder.bottleneck
            or encoder.queries != "learned"
        ):
            raise LoadError(
                f"{self.name}: the model is of another architecture; it must be an OPT with norm_first=False before a "
                "decoder with BERT's layers, behind an encoder with a bottleneck and learned queries."
            )
        own = model.state_dict()
        found = to_opt(backbone, own) | to_michelangelo(encoder, own)
        found |= {theirs: own[ours] for ours, theirs in _NAMES.items()}
        found |= {theirs: own[ours] for ours, (theirs,) in _fused_names(decoder).items()}
        return found | {CODEBOOK: own["codebook"][None]}, {}


def _layer(number: int, name: str) -> str:
    return f"{TOKENIZER}decoder.layer.{number}.{name}"


def _fused_names(decoder: OPTConfig) -> dict[str, tuple[str, ...]]:
    return {
        f"decoder.backbone.layers.{i}.{ours}.{kind}": (_layer(i, f"{theirs}_{kind}"),)
        for i in range(decoder.depth)
        for ours, theirs in _FUSED.items()
        for kind in ("weight", "bias")
    }


def _plain_names(decoder: OPTConfig) -> dict[str, tuple[str, ...]]:
    return {
        f"decoder.backbone.{ours}": tuple(f"{TOKENIZER}decoder.{name}" for name in theirs)
        for ours, theirs in transformers_names(decoder, "bert").items()
    }


NOTES = {
    "data": "Meshes of Objaverse and ShapeNet of at most 800 faces (the authors' selection).",
    "licence": "S-Lab License 1.0 of the authors, for non-commercial use.",
}
"""For the model card."""
