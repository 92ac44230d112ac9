"""Text from a language model: what ``vertebra.backbones.decoding`` needs of it."""

from __future__ import annotations

from vertebra.backbones.decoding import Decoder, Stop
from vertebra.domains.language.model import LanguageModel
from vertebra.errors import ConfigError


def decoder_of(model: LanguageModel) -> Decoder:
    """Return what generates with a causal model.

    Raises:
        ConfigError: The model is not causal.
    """
    if not model.backbone.config.causal:
        raise ConfigError("generation: needs a causal backbone; build the model with causal=true.")
    return Decoder(model.backbone, model.embed, model.head, model.embed.weight.device)


def stop_of(model: LanguageModel, max_new: int, min_new: int = 0) -> Stop:
    """Return the rule that ends a text at the model's own end tokens, or after ``max_new`` tokens."""
    return Stop(max_new=max_new, min_new=min_new, ids=model.spec.eos_ids)
