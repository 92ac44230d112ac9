"""Converters of all domains: what none of them may do."""

import json

import pytest
import torch
from safetensors.torch import save_file

from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.conversion import convert, converters, find_converter, loaded
from vertebra.domains.saving import load_model
from vertebra.errors import LoadError

NAMES = {
    "images": ("patch_embed.proj.weight", "blocks.0.norm1.weight", "blocks.0.mlp.fc3.weight", "cls_token"),
    "text": ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight", "backbone.layers.0.mixer.A_log"),
    "series": ("in_proj.weight", "param_proj.proj.weights_logits.weight", "shared.weight"),
}
FILES = {
    "no JSON": ("config.json", b"{"),
    "no object": ("config.json", b"[1]"),
    "no text": ("config.json", b"\xff\xfe\x00"),
    "a key twice": ("config.json", b'{"model_type": "llama", "model_type": "mamba"}'),
    "nested": ("config.json", b'{"a": ' * 5000 + b"1" + b"}" * 5000),
    "odd values": (
        "config.json",
        json.dumps(
            {"model_type": [1], "architectures": [{}], "patch_sizes": 3, "d_model": {}, "vocab_size": "x",
             "architecture": 7, "pretrained_cfg": "x", "attn_layer_idx": "x", "ssm_cfg": []}
        ).encode(),
    ),
    "another library": ("config.json", b'{"model_type": "bert", "architectures": ["BertModel"]}'),
    "parameters": ("params.json", b"{"),
    "a vocabulary": ("tokenizer.json", b"[" * 5000),
    "words": ("vocab.txt", b"\xff\xfe\x00"),
    "settings": ("config.yaml", b"encoder: [\xff"),
}  # fmt: skip


@pytest.mark.parametrize("tensors", [*NAMES, "none", "damaged"])
@pytest.mark.parametrize("damage", FILES)
def test_no_converter_minds_a_folder_of_another_kind(damage, tensors, tmp_path):
    name, content = FILES[damage]
    (tmp_path / name).write_bytes(content)
    if tensors in NAMES:
        save_file({n: torch.zeros(2) for n in NAMES[tensors]}, tmp_path / "model.safetensors")
    elif tensors == "damaged":
        (tmp_path / "model.safetensors").write_bytes(b"\x00" * 9)
    for converter in converters().values():
        assert converter.recognises(open_checkpoint(tmp_path)) in (True, False), converter.name


@pytest.mark.parametrize("damage", ["no JSON", "no object", "no text", "a key twice"])
@pytest.mark.parametrize("tensors", NAMES)
def test_a_damaged_config_is_what_the_user_is_told_of(damage, tensors, tmp_path):
    (tmp_path / "config.json").write_bytes(FILES[damage][1])
    save_file({n: torch.zeros(2) for n in NAMES[tensors]}, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"config\.json: "):
        convert(tmp_path)


def test_a_link_out_of_the_folder_is_told_and_not_followed(tmp_path):
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "config.json").write_text("{}")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    save_file({n: torch.zeros(2) for n in NAMES["images"]}, folder / "model.safetensors")
    assert not any(converter.recognises(open_checkpoint(folder)) for converter in converters().values())
    with pytest.raises(LoadError, match="a link that leads out of its folder"):
        find_converter(open_checkpoint(folder))


def test_whose_names_are_missing_is_told(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    model = load_model("dna_lm")
    words = (
        r"2 unexpected: .*Nothing was loaded\. Names of missing tensors are those of the DNALanguageModel; unexpected"
    )
    tensors = {**model.state_dict(), "y": torch.zeros(2), "z": torch.zeros(2)}
    with pytest.raises(LoadError, match=words):
        loaded(model, tensors, open_checkpoint(tmp_path))
