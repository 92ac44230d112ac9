"""The original implementations' numbers: files in tests/golden, made with transformers 5.23.0 and iLLaMA's code."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

from vertebra.backbones.base import create_backbone
from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.illama import ILLaMAConfig
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.recurrent import causal_conv


def read(path):
    with safe_open(path, framework="pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    groups = {}
    for key, value in tensors.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return config, groups


@pytest.fixture
def mamba2(golden):
    config, data = read(golden / "mamba2_tiny.safetensors")
    backbone = HybridConfig(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        pattern="M",
        hidden_dim=0,
        mamba_head_dim=config["head_dim"],
        mamba_groups=config["n_groups"],
        state_dim=config["state_size"],
        conv_kernel=config["conv_kernel"],
        norm_eps=config["layer_norm_epsilon"],
    ).build()
    names = {
        k: k.removeprefix("backbone.").replace(".norm.", ".norm1.", 1).replace(".mixer.norm1.", ".mixer.norm.")
        for k in data["w"]
        if k.startswith("backbone.layers")
    }
    state = {new: data["w"][old] for old, new in names.items()}
    backbone.load_state_dict({**state, "norm.weight": data["w"]["backbone.norm_f.weight"]})
    return backbone, data, names


def test_mamba2_logits_hidden_loss_and_gradients(mamba2):
    backbone, data, names = mamba2
    ids = data["in"]["ids"]
    hidden = backbone(F.embedding(ids, data["w"]["backbone.embeddings.weight"]))
    torch.testing.assert_close(hidden, data["out"]["hidden_last"], atol=1e-5, rtol=1e-5)
    logits = hidden @ data["w"]["lm_head.weight"].T
    torch.testing.assert_close(logits, data["out"]["logits"], atol=1e-5, rtol=1e-5)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(loss[None], data["out"]["loss"], atol=1e-5, rtol=1e-5)
    loss.backward()
    parameters = dict(backbone.named_parameters())
    assert len(data["grad"]) == 9
    for name, expected in data["grad"].items():
        torch.testing.assert_close(parameters[names[name]].grad, expected, atol=1e-5, rtol=1e-4)


def test_mamba2_mixer_and_its_matrix(mamba2):
    backbone, data, _ = mamba2
    mixer, x = backbone.layers[0].mixer, data["in"]["mixer0"]
    y = mixer(x, Layout(batch=2, length=75, device=x.device, causal=True))
    torch.testing.assert_close(y, data["out"]["mixer0"], atol=1e-5, rtol=1e-5)
    z, xbc, _ = mixer._project(x, None)
    values, _, _ = mixer._split(causal_conv(F.pad(xbc, (0, 0, 3, 0)), mixer.conv1d.weight, mixer.conv1d.bias))
    mixed = (mixer.mixing_matrix(x) @ values.transpose(1, 2)).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mixer.out_proj(mixer.norm(mixed, z)), y, atol=1e-5, rtol=1e-5)


def test_bamba_logits_and_hidden_states(golden):
    config, data = read(golden / "bamba_tiny.safetensors")
    attention = config["attn_layer_indices"]
    backbone = HybridConfig(
        dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        pattern="".join("A" if i in attention else "M" for i in range(config["num_hidden_layers"])),
        hidden_dim=config["intermediate_size"],
        mamba_head_dim=config["mamba_d_head"],
        mamba_groups=config["mamba_n_groups"],
        state_dim=config["mamba_d_state"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        rope_fraction=0.5,
        norm_eps=config["rms_norm_eps"],
    ).build()
    w = data["w"]
    renamed = {"norm.weight": w["model.final_layernorm.weight"]}
    for key in w:
        if not key.startswith("model.layers"):
            continue
        layer, _, rest = key.removeprefix("model.layers.").partition(".")
        for old, new in (
            ("input_layernorm", "norm1"),
            ("pre_ff_layernorm", "norm2"),
            ("feed_forward", "mlp"),
            ("mamba", "mixer"),
            ("self_attn.o_proj", "mixer.proj"),
        ):
            if rest.startswith(old):
                renamed[f"layers.{layer}.{new}{rest.removeprefix(old)}"] = w[key]
    for i in attention:
        renamed[f"layers.{i}.mixer.qkv.weight"] = torch.cat(
            [w[f"model.layers.{i}.self_attn.{p}_proj.weight"] for p in "qkv"]
        )
    backbone.load_state_dict(renamed)
    hidden = backbone(F.embedding(data["in"]["ids"], w["model.embed_tokens.weight"]))
    torch.testing.assert_close(hidden, data["out"]["hidden_last"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(hidden @ w["lm_head.weight"].T, data["out"]["logits"], atol=1e-5, rtol=1e-5)


def test_illama_soft_mask(golden):
    data = np.load(golden / "illama_small_random.npz")
    config = json.loads(str(data["config"]))
    w = {k[2:]: torch.from_numpy(data[k]) for k in data.files if k.startswith("w/")}
    backbone = ILLaMAConfig(
        dim=48, depth=2, num_heads=3, hidden_dim=w["blocks.0.mlp.fc1.weight"].shape[0], causal=False, soft_mask=True
    ).build()
    names = {"attn": "mixer", "fc1": "gate_proj", "fc2": "down_proj", "fc3": "up_proj", "blocks": "layers"}
    state = {}
    for key, value in w.items():
        if key.startswith(("blocks", "norm")):
            state[".".join(names.get(part, part) for part in key.split("."))] = value
    backbone.load_state_dict(state)
    image = torch.from_numpy(data[next(k for k in data.files if k.startswith("in/"))])
    patches = F.conv2d(image, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=config["patch_size"])
    x = torch.cat([patches.flatten(2).mT, w["cls_token"].expand(len(image), -1, -1)], 1) + w["pos_embed"]
    checked = 0
    for key in data.files:
        if not key.startswith("out/"):
            continue
        kind, _, rate = key.removeprefix("out/").rpartition("_alpha")
        assert rate, key
        backbone.set_soft_mask(float(rate))
        feature = backbone(x)[:, -1]
        if "logits" in kind:
            feature = feature @ w["head.weight"].T + w["head.bias"]
        torch.testing.assert_close(feature, torch.from_numpy(data[key]), atol=1e-5, rtol=1e-5)
        checked += 1
    assert checked == 6


def test_soft_mask_needs_a_backbone_made_for_it():
    with pytest.raises(ValueError, match="built with soft_mask=False"):
        create_backbone("illama_test").set_soft_mask(0.5)


@pytest.mark.bench
@pytest.mark.parametrize("length", [1, 7, 64, 1000])
def test_mamba2_equals_transformers(length):
    transformers = pytest.importorskip("transformers")
    peer_config = transformers.Mamba2Config(
        hidden_size=64, num_hidden_layers=2, num_heads=8, head_dim=16, state_size=16, n_groups=2, vocab_size=12
    )
    torch.manual_seed(length)
    peer = transformers.Mamba2Model(peer_config).eval()
    ours = HybridConfig(
        dim=64, depth=2, pattern="M", hidden_dim=0, mamba_head_dim=16, mamba_groups=2, state_dim=16
    ).build()
    state = {}
    for key, value in peer.state_dict().items():
        if key.startswith("layers"):
            state[key.replace(".norm.", ".norm1.", 1).replace(".mixer.norm1.", ".mixer.norm.")] = value
    ours.load_state_dict({**state, "norm.weight": peer.state_dict()["norm_f.weight"]})
    ids = torch.randint(12, (2, length))
    with torch.no_grad():
        expected = peer(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(ours(peer.embeddings(ids)), expected, atol=1e-4, rtol=1e-4)
