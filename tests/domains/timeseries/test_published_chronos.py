"""Chronos-Bolt is told apart, and refused by name of what has no counterpart."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.conversion import convert, converters
from vertebra.errors import LoadError

CONFIG = {
    "architectures": ["ChronosBoltModelForForecasting"],
    "model_type": "t5",
    "chronos_config": {"context_length": 2048, "input_patch_size": 16, "prediction_length": 64},
}


def names(depth=2):
    """All names of a Chronos-Bolt, as its classes of T5 give them."""
    found = ["shared.weight", "encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"]
    for block in ("input_patch_embedding", "output_patch_embedding"):
        for layer in ("hidden_layer", "output_layer", "residual_layer"):
            found += [f"{block}.{layer}.{kind}" for kind in ("weight", "bias")]
    for side, attentions in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        found.append(f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight")
        for i in range(depth):
            for layer, attention in enumerate(attentions):
                found += [f"{side}.block.{i}.layer.{layer}.{attention}.{part}.weight" for part in "qkvo"]
            last = len(attentions)
            found += [f"{side}.block.{i}.layer.{last}.DenseReluDense.{part}.weight" for part in ("wi", "wo")]
            found += [f"{side}.block.{i}.layer.{layer}.layer_norm.weight" for layer in range(last + 1)]
    return found


def checkpoint(folder, extra=(), config=CONFIG):
    folder.mkdir(exist_ok=True)
    save_file({name: torch.zeros(2) for name in (*names(), *extra)}, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.mark.parametrize("config", [CONFIG, None])
def test_only_this_family_claims_it(tmp_path, config):
    found = checkpoint(tmp_path / "hub", config=config)
    assert [c.name for c in converters().values() if c.recognises(found)] == ["chronos_bolt"]


def test_every_tensor_is_listed(tmp_path):
    with pytest.raises(LoadError) as error:
        convert(checkpoint(tmp_path / "hub", extra=["head.weight"]).path)
    text = str(error.value)
    assert "Chronos-Bolt is an encoder with a decoder, and forecasters here are one stack" in text
    assert "relative positions: decoder.block.*.layer.0.SelfAttention.relative_attention_bias.weight, encoder" in text
    assert "from the decoder to the encoder: decoder.block.*.layer.1.EncDecAttention.k.weight, " in text
    assert "other tensors: head.weight;" in text
    listed = {name.rpartition(": ")[2] for part in text.removesuffix(".").split("; ") for name in part.split(", ")}
    for name in names():
        assert any(name.replace(f".block.{i}.", ".block.*.") in listed for i in range(2)) or name in listed, name


def test_other_models_of_t5_are_not_claimed(tmp_path):
    other = checkpoint(tmp_path / "hub", config=CONFIG | {"architectures": ["T5ForConditionalGeneration"]})
    assert not converters()["chronos_bolt"].recognises(other)
    (tmp_path / "hub" / "config.json").write_text("{")
    assert not converters()["chronos_bolt"].recognises(open_checkpoint(tmp_path / "hub"))
