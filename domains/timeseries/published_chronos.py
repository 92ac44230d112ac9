"""Chronos-Bolt: recognised, and refused with the names of what has no counterpart here.

It is a T5 (https://arxiv.org/abs/1910.10683): an encoder with relative positions reads the patches, and a decoder of as
many layers reads the encoder from one start token, whose features become all quantiles of all steps. A forecaster here
is one stack from patches to forecasts, so that neither half has a place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.domains.conversion import Conversion, Converter
from vertebra.domains.timeseries.published_trunk import tensors_of
from vertebra.errors import LoadError

_CLASS = "ChronosBoltModelForForecasting"
_LACKING = {
    "relative positions": r".*\.relative_attention_bias\.weight",
    "attention from the decoder to the encoder": r"decoder\..*\.EncDecAttention\..*",
    "the decoder": r"decoder\..*",
    "the embedding of its start token": r"shared\..*|.*\.embed_tokens\.weight",
    "residual blocks around patches": r"(input|output)_patch_embedding\..*",
    "layers of attention without scaling and of ReLU": r"encoder\..*",
}
"""What has no counterpart, by a pattern of its tensors' names; the first that fits counts."""


class ChronosBoltConverter(Converter):
    """Chronos-Bolt, which is told apart and refused."""

    name = "chronos_bolt"
    summary = "Chronos-Bolt: recognised and refused, since it is an encoder with a decoder"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell by the class that the config names, or without one by the blocks around patches."""
        try:
            config = checkpoint.config
        except LoadError:
            return False
        if config:
            return isinstance(named := config.get("architectures"), list) and _CLASS in named
        tensors = tensors_of(checkpoint)
        return "input_patch_embedding.hidden_layer.weight" in tensors and "shared.weight" in tensors

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Refuse.

        Raises:
            LoadError: Always; the text lists the checkpoint's tensors by what they are of.
        """
        groups: dict[str, list[str]] = {}
        for name in checkpoint.tensors:
            what = next((what for what, pattern in _LACKING.items() if re.fullmatch(pattern, name)), "other tensors")
            groups.setdefault(what, []).append(name)
        listed = "; ".join(f"{what}: {', '.join(_short(names))}" for what, names in groups.items())
        raise LoadError(
            f"{checkpoint.source}: Chronos-Bolt is an encoder with a decoder, and forecasters here are one stack from "
            f"patches to forecasts; convert Moirai or a scaling-law model instead. Without a counterpart are {listed}."
        )


def _short(names: Iterable[str]) -> list[str]:
    """Write names that differ in their layer alone as one, with ``*`` for it."""
    return sorted({re.sub(r"\.block\.\d+\.", ".block.*.", name) for name in names})
