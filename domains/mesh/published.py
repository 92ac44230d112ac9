"""Published checkpoints of MeshAnything V2: what they are of, their names, and back; V1 is in ``published_v1``.

The repository ``Yiwen-ntu/MeshAnythingV2`` (https://arxiv.org/abs/2408.02555) holds ``model.safetensors``, of which
``vertebra convert`` makes a model directory. By hand::

    backbone, spec, arguments = published_v2()
    model = MeshGenerator(backbone.build(), spec, **arguments)
    read_published(model, "model.safetensors")

Its rows of embeddings and head are in our order: begin, end, padding, the 128 cells, the separator; and of kinds begin,
end, padding, separator, x y z of a strip's first three vertices, x y z of those after.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.loading.pretrained import LoadReport, load_state
from vertebra.backbones.opt import OFFSET, OPTConfig, opt_350m
from vertebra.domains.conversion import Conversion, Converter, loaded, split_left_out
from vertebra.domains.mesh.encoder import MICHELANGELO, ShapeEncoderConfig
from vertebra.domains.mesh.model import SPECIAL, MeshGenerator
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
from vertebra.domains.mesh.published_v1 import MeshAnythingV1
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.model import DomainModel
from vertebra.errors import ConfigError, LoadError
from vertebra.tokenizers.mesh_amt import AMTTokenizer

MAX_FACES = 1600
MAX_TOKENS = MAX_FACES * 9 * 7 // 10
"""Training left out meshes of 0.7 times the nine tokens a face of the plain form, and more."""
POSITIONS = (1 + MICHELANGELO.latents) + 3 + MAX_TOKENS
"""Rows of learned positions, 10,340: condition, three for specials, tokens."""

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
        tensors: Checkpoint; parts that no mesh comes from are passed over.
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
    kept, _ = split_left_out(tensors, LEFT_OUT)
    names = {ours: (theirs,) for ours, theirs in _NAMES.items()}
    return to_ours(kept, names, backbone, encoder, version=2, repository="Yiwen-ntu/MeshAnythingV2")


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
    backbone = _check(model)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise LoadError(f"{path}: cannot be read as a safetensors file ({error}).") from error
    tensors = from_published(tensors, backbone, model.encoder.config)
    return load_state(model, tensors, source=f"the weights of {path}")


def _check(model: MeshGenerator) -> OPTConfig:
    """Return the config of the model's backbone if the model is of V2's architecture."""
    backbone, tokenizer = model.backbone.config, AMTTokenizer(model.tokenizer.bins, up="z")
    if not isinstance(backbone, OPTConfig) or backbone.norm_first or model.head.weight is model.embed.weight:
        raise ConfigError(
            "MeshAnything V2: the model must have an OPT backbone with norm_first=False, and tie=False; build it of "
            "published_v2()."
        )
    if model.tokenizer != tokenizer:
        raise ConfigError(f"MeshAnything V2: the tokenizer must be {tokenizer!r}, got {model.tokenizer!r}.")
    return backbone


# ---------------------------------------------------------------- converter


class MeshAnythingV2(Converter):
    """The generator of MeshAnything V2, of any size."""

    name: ClassVar[str] = "meshanything_v2"
    summary: ClassVar[str] = "MeshAnything V2: points to adjacent-mesh tokens, an OPT behind Michelangelo's encoder"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """As in ``Converter``."""
        return is_meshanything(checkpoint, version=2)

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """As in ``Converter``; what no tensor tells, such as the number of points, is the released model's."""
        tensors, left = split_left_out(checkpoint.tensors, LEFT_OUT)
        with as_load_error(checkpoint.source):
            backbone, spec, encoder = structure(tensors)
            model = MeshGenerator(backbone.build(), spec, encoder=encoder)
        found = from_published(tensors, backbone, encoder)
        return loaded(model, found, checkpoint, left_out=left, notes=NOTES)

    def restore(self, model: DomainModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As in ``Converter``. The parts that ``convert`` left out are gone: the original must load without them."""
        if not isinstance(model, MeshGenerator):
            raise LoadError(f"{self.name}: must be given a MeshGenerator, got a {type(model).__name__}.")
        encoder, own = model.encoder.config, model.state_dict()
        if not encoder.bottleneck or model.face_embed is not None:
            raise LoadError(
                f"{self.name}: the model must have an encoder with a bottleneck and no face_buckets, which the "
                "original has no place for."
            )
        try:
            found = to_opt(_check(model), own) | to_michelangelo(encoder, own)
        except ConfigError as error:
            raise LoadError(f"{self.name}: the model is of another architecture. {error}") from error
        return found | {theirs: own[ours] for ours, theirs in _NAMES.items()}, {}


def structure(tensors: Mapping[str, Tensor]) -> tuple[OPTConfig, MeshSpec, ShapeEncoderConfig]:
    """Read backbone, spec and encoder off the tensors of a V2 checkpoint.

    Raises:
        LoadError: A tensor is missing or misshapen.
        ConfigError: There is no such model of these sizes.
    """
    released, spec, _ = published_v2()
    encoder = encoder_config(tensors)
    vocab, width = shape_of(tensors, f"{DECODER}embed_tokens.weight", 2)
    rows, _ = shape_of(tensors, f"{DECODER}embed_positions.weight", 2)
    hidden, _ = shape_of(tensors, f"{DECODER}layers.0.fc1.weight", 2)
    backbone = replace(
        released,
        dim=width,
        depth=count_layers(tensors, f"{DECODER}layers."),
        heads=heads_of(width, "the OPT"),
        hidden=hidden,
        max_length=rows - OFFSET,
    )
    most = backbone.max_length - 3 - (1 + encoder.latents)  # as POSITIONS counts
    tokenizer = AMTTokenizer(vocab - SPECIAL - 1, up="z")
    return backbone, replace(spec, tokenizer=tokenizer.to_dict(), max_tokens=most, max_faces=most * 10 // 63), encoder


NOTES = {
    "data": "Meshes of Objaverse of at most 1600 faces (the authors' selection).",
    "licence": "The authors' repository has the S-Lab License 1.0, for non-commercial use; the hub's page says MIT.",
}
"""For the model card."""

CONVERTERS: tuple[Converter, ...] = (MeshAnythingV2(), MeshAnythingV1())
"""The family's converters."""
