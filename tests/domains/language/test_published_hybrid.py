"""Mamba, Bamba, Jamba, Granite and other hybrids: against transformers and golden numbers, and what is refused."""

import json

import pytest
import torch
from made_checkpoints import (
    BAMBA,
    FAMILY_OF,
    GRANITE,
    JAMBA,
    TINY,
    change_config,
    change_tensors,
    converted,
    difference,
    left_padded,
    made,
    original,
    outputs_after_saving,
    published,
    recognised,
    saved,
    written,
)
from safetensors import safe_open
from safetensors.torch import load_file

from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.conversion import convert, converters
from vertebra.domains.dna.published import CONVERTERS as DNA
from vertebra.domains.language.published import CONVERTERS
from vertebra.errors import LoadError

MAMBA2 = {**TINY, "state_size": 6, "num_heads": 8, "head_dim": 8, "n_groups": 2}
ORIGINALS = {
    "mamba": ("MambaForCausalLM", {**TINY, "state_size": 5}),
    "mamba untied": ("MambaForCausalLM", {**TINY, "tie_word_embeddings": False, "time_step_rank": 3}),
    "mamba without a bias": ("MambaForCausalLM", {**TINY, "use_conv_bias": False, "conv_kernel": 3}),
    "mamba without head": ("MambaModel", TINY),
    "mamba2": ("Mamba2ForCausalLM", MAMBA2),
    "mamba2 tied": ("Mamba2ForCausalLM", {**MAMBA2, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-3}),
    "mamba2 with biases": ("Mamba2ForCausalLM", {**MAMBA2, "use_bias": True}),
    "mamba2 with limits": ("Mamba2ForCausalLM", {**MAMBA2, "time_step_limit": (0.3, 0.9)}),
    "bamba": ("BambaForCausalLM", BAMBA),
    "bamba tied": ("BambaForCausalLM", {**BAMBA, "tie_word_embeddings": True, "mamba_n_groups": 1}),
    "bamba with biases": ("BambaForCausalLM", {**BAMBA, "attention_bias": True, "mamba_proj_bias": True}),
    "bamba without head": ("BambaModel", BAMBA),
    "jamba": ("JambaForCausalLM", JAMBA),
    "jamba tied": ("JambaForCausalLM", {**JAMBA, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "jamba without head": ("JambaModel", JAMBA),
}
GRANITES = {
    "granite": GRANITE,
    "granite tied, rotary": {**GRANITE, "tie_word_embeddings": True, "position_embedding_type": "rope"},
    "granite with biases": {**GRANITE, "attention_bias": True, "mamba_proj_bias": True},
    "granite without multipliers": {
        **GRANITE,
        **{f"{name}_multiplier": 1.0 for name in ("embedding", "residual", "attention")},
        "logits_scaling": 1.0,
        "tie_word_embeddings": True,
    },
}


@pytest.mark.bench
@pytest.mark.parametrize("name", ORIGINALS)
def test_outputs_are_the_originals_there_and_back(name, tmp_path):
    kind, config = ORIGINALS[name]
    model = original(kind, **config)
    folder = saved(model, tmp_path / "original")
    family = FAMILY_OF.get(model.config.model_type, model.config.model_type)
    assert recognised(folder) == [family]
    ours = converted(folder).model
    if "biases" not in name:  # theirs lets the biases of padding into the first real positions
        assert difference(model, ours) < 1e-5
    assert difference(model, ours, padded=False) < 1e-5
    before, after = outputs_after_saving(ours, tmp_path / "model")
    torch.testing.assert_close(after, before, atol=0, rtol=0)

    tensors, settings = converters()[family].restore(ours)
    files = load_file(folder / "model.safetensors")
    assert tensors.keys() == files.keys()
    assert all(torch.equal(tensors[key], files[key]) for key in files)
    again = type(model).from_pretrained(written(tmp_path / "restored", tensors, settings)).eval()
    assert difference(again, ours, padded=False) < 1e-5


@pytest.mark.bench
@pytest.mark.parametrize("name", GRANITES)
def test_granites_multipliers_are_in_the_weights(name, tmp_path):
    model = original("GraniteMoeHybridForCausalLM", **GRANITES[name])
    with torch.no_grad():
        model.model.norm.weight.mul_(6)  # so that logits are not small for their divisor
    folder = saved(model, tmp_path / "original")
    assert recognised(folder) == ["bamba"]
    found = converted(folder)
    assert found.model.tie == (name == "granite without multipliers")
    assert "Multipliers of the original (embedding" in found.notes["weights"]
    assert difference(model, found.model, padded="biases" not in name) < 1e-5
    before, after = outputs_after_saving(found.model, tmp_path / "model")
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    change_config(folder, num_local_experts=4)
    with pytest.raises(
        LoadError, match=r"num_local_experts = 4 in config\.json cannot be converted: ours has no experts"
    ):
        convert(folder)


# ---------------------------------------------------------------- golden numbers, in the naming of mamba_ssm


def read_golden(path):
    with safe_open(path, framework="pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        config = json.loads(file.metadata()["config"])
    weights = {key.removeprefix("w/"): tensor for key, tensor in tensors.items() if key.startswith("w/")}
    return config, weights, tensors


NATIVE = {
    "d_model": 48, "n_layer": 3, "vocab_size": 11, "d_intermediate": 0, "rms_norm": True, "residual_in_fp32": True,
    "fused_add_norm": True, "pad_vocab_size_multiple": 4, "tie_embeddings": False, "attn_layer_idx": [], "attn_cfg": {},
    "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 16, "ngroups": 2},
}  # fmt: skip


def native_mamba2(golden, folder, **changes):
    _, weights, tensors = read_golden(golden / "mamba2_tiny.safetensors")
    named = {key.replace("embeddings.", "embedding."): tensor for key, tensor in weights.items()}
    return written(folder, named, {**NATIVE, **changes}), tensors


def native_bamba(golden, folder, **attention):
    config, weights, tensors = read_golden(golden / "bamba_tiny.safetensors")
    named = {
        "backbone.embedding.weight": weights.pop("model.embed_tokens.weight"),
        "backbone.norm_f.weight": weights.pop("model.final_layernorm.weight"),
        "lm_head.weight": weights.pop("lm_head.weight"),
    }
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"backbone.layers.{layer}."
        part = {key.removeprefix(old): tensor for key, tensor in weights.items() if key.startswith(old)}
        named[f"{new}norm.weight"] = part.pop("input_layernorm.weight")
        named[f"{new}norm2.weight"] = part.pop("pre_ff_layernorm.weight")
        named[f"{new}mlp.fc1.weight"] = torch.cat([part.pop(f"feed_forward.{n}_proj.weight") for n in ("up", "gate")])
        named[f"{new}mlp.fc2.weight"] = part.pop("feed_forward.down_proj.weight")
        if "self_attn.q_proj.weight" in part:
            named[f"{new}mixer.in_proj.weight"] = torch.cat([part.pop(f"self_attn.{n}_proj.weight") for n in "qkv"])
            named[f"{new}mixer.out_proj.weight"] = part.pop("self_attn.o_proj.weight")
        named |= {key.replace("mamba.", f"{new}mixer."): tensor for key, tensor in part.items()}
    native = {
        **NATIVE,
        "d_model": 32,
        "n_layer": 4,
        "vocab_size": 12,
        "d_intermediate": 64,
        "ssm_cfg": {"layer": "Mamba2", "headdim": 16, "d_state": 16},
        "attn_layer_idx": [2],
        "attn_cfg": {"causal": True, "d_conv": 0, "head_dim": 8, "num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4,
                     "out_proj_bias": False, "qkv_proj_bias": False, **attention},
    }  # fmt: skip
    return written(folder, named, native), tensors


@torch.no_grad()
def test_mamba2_of_mamba_ssm_has_the_golden_logits(golden, tmp_path):
    folder, tensors = native_mamba2(golden, tmp_path / "a")
    assert recognised(folder) == ["mamba"]
    found = converted(folder)
    torch.testing.assert_close(found.model(tensors["in/ids"]), tensors["out/logits"], atol=1e-5, rtol=1e-5)
    assert found.model.spec.vocab_size == 12
    assert found.notes["vocabulary"] == "11 tokens; the rows from 11 to 11 are padding."


@torch.no_grad()
def test_bamba_of_mamba_ssm_has_the_golden_logits(golden, tmp_path):
    folder, tensors = native_bamba(golden, tmp_path / "a")
    assert recognised(folder) == ["bamba"]
    model = converted(folder).model
    assert model.backbone.config.layout == "MMAM"
    torch.testing.assert_close(model(tensors["in/ids"]), tensors["out/logits"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_biases_of_mamba_ssm_are_read(tmp_path):
    """Those of transformers' Bamba, which has them too, by the names of mamba_ssm."""
    model = made("bamba", attention_bias=True, mamba_bias=True)
    tensors = model.state_dict()
    named = {
        "backbone.embedding.weight": tensors.pop("embed.weight"),
        "backbone.norm_f.weight": tensors.pop("backbone.norm.weight"),
        "lm_head.weight": tensors.pop("head.weight"),
    }
    for layer in range(3):
        at = f"backbone.layers.{layer}.mlp."
        named[f"{at}fc1.weight"] = torch.cat([tensors.pop(f"{at}{part}_proj.weight") for part in ("up", "gate")])
    for name, tensor in tensors.items():
        for ours, theirs in (
            ("norm1", "norm"),
            ("down_proj", "fc2"),
            (".qkv", ".in_proj"),
            ("mixer.proj", "mixer.out_proj"),
        ):
            name = name.replace(ours, theirs)
        named[name] = tensor
    config = {
        **NATIVE,
        "d_model": 32,
        "vocab_size": 23,
        "ssm_cfg": {"layer": "Mamba2", "ngroups": 2, "bias": True},
        "attn_layer_idx": [1],
        "attn_cfg": {"num_heads": 4, "num_heads_kv": 2, "rotary_emb_dim": 4},
    }
    found = converted(written(tmp_path / "a", named, config)).model
    ids, mask = left_padded(23)
    torch.testing.assert_close(found(ids, mask), model(ids, mask), atol=0, rtol=0)


@torch.no_grad()
def test_bamba_of_transformers_has_the_golden_logits(golden, tmp_path):
    config, weights, tensors = read_golden(golden / "bamba_tiny.safetensors")
    folder = written(tmp_path / "a", weights, {**config, "model_type": "bamba"})
    model = converted(folder).model
    torch.testing.assert_close(model(tensors["in/ids"]), tensors["out/logits"], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_mamba1_of_mamba_ssm_is_the_one_of_transformers(tmp_path):
    model = made("mamba", tie=True)
    tensors, _ = converters()["mamba"].restore(model)
    named = {key.replace("embeddings.", "embedding."): tensor for key, tensor in tensors.items()}
    named["lm_head.weight"] = named["backbone.embedding.weight"]  # as the released files have it
    native = {"d_model": 32, "n_layer": 3, "vocab_size": 21, "ssm_cfg": {}, "rms_norm": True}
    folder = written(tmp_path / "a", named, native)
    assert recognised(folder) == ["mamba"]
    found = converted(folder).model
    assert found.tie
    ids, _ = left_padded(23)
    torch.testing.assert_close(found(ids), model(ids), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rms_norm": False}, "rms_norm = False in config.json cannot be converted: ours has RMSNorm"),
        ({"n_layer": 4}, "n_layer is 4 in config.json, but the weights have 3"),
        ({"vocab_size": 13}, "vocab_size = 13 in config.json cannot be converted: the embedding has 12 rows"),
        ({"tie_embeddings": True}, "tie_embeddings = True in config.json .* a head that is not the embedding"),
        ({"attn_layer_idx": [1], "attn_cfg": {"num_heads": 4, "out_proj_bias": False, "qkv_proj_bias": False}},
         r"attn_layer_idx is \[1\] in config\.json, but the weights have \[\]"),
        ({"ssm_cfg": []}, r"ssm_cfg = \[\] in config\.json cannot be converted: it must be a JSON object"),
    ],
    ids=str,
)  # fmt: skip
def test_settings_of_mamba_ssm_that_ours_cannot_do_are_named(changes, words, golden, tmp_path):
    folder, _ = native_mamba2(golden, tmp_path / "a", **changes)
    with pytest.raises(LoadError, match=words):
        convert(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": "Mamba3"}, "layer = 'Mamba3' in ssm_cfg of config.json cannot be converted"),
        ({"layer": "Mamba1"}, "layer = 'Mamba1' in ssm_cfg of config.json .* the layers in the file are MMM"),
        ({"rmsnorm": False}, "rmsnorm = False in ssm_cfg of config.json cannot be converted"),
        ({"norm_before_gate": True}, "norm_before_gate = True in ssm_cfg"),
        ({"D_has_hdim": True}, "D_has_hdim = True in ssm_cfg"),
        ({"bias": True}, "bias is True in config.json, but the weights have False"),
        ({"d_ssm": 48}, "d_ssm = 48 in ssm_cfg"),
        ({"ngroups": 3}, r"Mamba-2 with 160 channels before its scan, 96 of them in 6 heads, and 3 groups"),
        ({"headdim": 32}, "headdim is 32 in config.json, but the weights have 16"),
        ({"new_thing": 1}, "new_thing = 1 in ssm_cfg of config.json cannot be converted: what it does is not known"),
        ({"dt_limit": [0.1]}, r"dt_limit = \[0\.1\] in config\.json .* two numbers, the lower first"),
    ],
    ids=str,
)
def test_mamba_layers_that_ours_cannot_be_are_named(changes, words, golden, tmp_path):
    folder, _ = native_mamba2(golden, tmp_path / "a", ssm_cfg={**NATIVE["ssm_cfg"], **changes})
    with pytest.raises(LoadError, match=words):
        convert(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"d_conv": 4},
            "d_conv = 4 in attn_cfg of config.json cannot be converted: attention of ours has no convolution",
        ),
        ({"mlp_dim": 8}, "mlp_dim = 8 in attn_cfg"),
        ({"causal": False}, "causal = False in attn_cfg"),
        ({"rotary_emb_interleaved": True}, "rotary_emb_interleaved = True in attn_cfg"),
        ({"out_proj_bias": None}, "out_proj_bias is True in attn_cfg of config.json, but the weights have False"),
        ({"softmax_scale": 0.1}, "softmax_scale = 0.1 in attn_cfg"),
        ({"num_heads": 3}, r"3 heads with 32 channels in all \(head_dim\) cannot be converted"),
        ({"num_heads_kv": 4}, "num_heads_kv is 4 in config.json, but the weights have 2"),
        ({"qk_norm": True}, "qk_norm = True in attn_cfg of config.json cannot be converted: what it does is not known"),
    ],
    ids=str,
)
def test_attention_of_mamba_ssm_that_ours_cannot_be_is_named(changes, words, golden, tmp_path):
    folder, _ = native_bamba(golden, tmp_path / "a", **changes)
    with pytest.raises(LoadError, match=words):
        convert(folder)


# ---------------------------------------------------------------- without transformers


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "bamba", "jamba"])
@pytest.mark.parametrize("options", [{}, {"tie": True}, {"head": False}, {"conv_bias": False}], ids=str)
def test_what_is_restored_is_converted_to_the_same_model(kind, options, tmp_path):
    model = made(kind, **options)
    folder = published(kind, tmp_path / "a", **options)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    family = FAMILY_OF.get(kind, kind)
    assert recognised(folder) == [family]
    found = convert(folder)
    assert found[0].name == family
    again = found[1].model
    assert again.spec == model.spec
    assert again.backbone.config.layout == model.backbone.config.layout
    ids, mask = left_padded(23)
    with torch.no_grad():
        torch.testing.assert_close(again(ids, mask), model(ids, mask), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("mamba2", {"use_bias": True}, "use_bias is True in config.json, but the weights have False"),
        ("mamba2", {"hidden_act": "relu"}, "hidden_act = 'relu' in config.json cannot be converted"),
        ("mamba2", {"n_groups": None}, "and 8 groups is not possible"),
        ("mamba2", {"n_groups": 4}, "state_size is 6 in config.json, but the weights have 3"),
        ("mamba2", {"time_step_limit": [0.5, 0.1]}, r"time_step_limit = \[0\.5, 0\.1\] .* the lower first"),
        ("mamba2", {"expand": 4}, "expand is 4 in config.json, but the weights have 2"),
        ("mamba", {"state_size": 16}, "state_size is 16 in config.json, but the weights have 5"),
        (
            "mamba",
            {"model_type": "falcon_mamba"},
            "model_type = 'falcon_mamba' .* norms of step sizes, B and C have no",
        ),
        ("bamba", {"mamba_proj_bias": True}, "mamba_proj_bias is True in config.json, but the weights have False"),
        ("bamba", {"attention_bias": True}, "attention_bias is True in config.json, but the weights have False"),
        ("bamba", {"mlp_bias": True}, "mlp_bias = True in config.json cannot be converted"),
        (
            "bamba",
            {"attn_layer_indices": [0]},
            r"attn_layer_indices is \[0\] in config\.json, but the weights have \[1\]",
        ),
        ("bamba", {"partial_rotary_factor": 1.0}, "partial_rotary_factor = 1.0 in config.json cannot be converted"),
        ("bamba", {"rope_scaling": {"type": "yarn"}}, "rope_scaling = .*yarn.* cannot be converted"),
        ("bamba", {"num_attention_heads": None}, "config.json must say num_attention_heads"),
        (
            "bamba",
            {"model_type": "zamba2"},
            "model_type = 'zamba2' in config.json cannot be converted: its layers share",
        ),
        ("bamba", {"model_type": "nemotron_h"}, "model_type = 'nemotron_h' .* one branch each"),
        ("jamba", {"mamba_dt_rank": 4}, "mamba_dt_rank is 4 in config.json, but the weights have 5"),
        ("jamba", {"attn_layer_offset": 0}, r"attn_layer_period = 2 .* it is not the layers \[1\]"),
        ("jamba", {"intermediate_size": 4}, "intermediate_size is 4 in config.json, but the weights have 40"),
    ],
    ids=str,
)
def test_settings_that_ours_cannot_do_are_named(kind, changes, words, tmp_path):
    folder = change_config(published(kind, tmp_path / "a"), **changes)
    assert len(recognised(folder)) == 1
    with pytest.raises(LoadError, match=words):
        convert(folder)


def test_limits_of_step_sizes_in_all_their_writings(tmp_path):
    folder = published("mamba2", tmp_path / "a")
    for limit, found in (
        ([0.0, {"__float__": "Infinity"}], None),
        ([0.0, float("inf")], None),
        ([0.5, {"__float__": "Infinity"}], (0.5, torch.finfo(torch.float32).max)),
        ([0.0, 0.25], (0.0, 0.25)),
    ):
        model = converted(change_config(folder, time_step_limit=limit)).model
        assert model.backbone.config.dt_limit == found


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("mamba", "backbone.layers.0.mixer.in_proj.bias", "projections of Mamba-1 have no biases in ours"),
        ("mamba2", "backbone.layers.1.mixer.in_proj.bias", r"1 unexpected: backbone\.layers\.1\.mixer\.in_proj\.bias"),
        ("bamba", "model.layers.1.feed_forward.gate.weight", r"1 unexpected: model\.layers\.1\.feed_forward\.gate"),
        (
            "jamba",
            "model.layers.1.feed_forward.router.weight",
            r"num_experts = 1 .* has model\.layers\.1\.feed_forward",
        ),
        ("jamba", "model.layers.1.feed_forward.experts.0.up_proj.weight", r"ours has no experts"),
    ],
)
def test_a_tensor_too_many_is_named(kind, name, words, tmp_path):
    folder = change_tensors(published(kind, tmp_path / "a"), lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(LoadError, match=words):
        convert(folder)


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        ("mamba2", "backbone.layers.1.mixer.D", r"1 missing: backbone\.layers\.1\.mixer\.D"),
        ("mamba", "backbone.layers.0.mixer.x_proj.weight", r"no tensor for backbone\.layers\.0\.mixer\.x_proj\.weight"),
        ("bamba", "model.layers.1.self_attn.k_proj.weight", "layer 1 has neither Mamba's tensors nor attention's"),
        ("jamba", "model.layers.2.mamba.b_layernorm.weight", r"1 missing: backbone\.layers\.2\.mixer\.b_layernorm"),
    ],
)
def test_a_tensor_that_is_missing_is_named(kind, name, words, tmp_path):
    folder = change_tensors(published(kind, tmp_path / "a"), lambda tensors: tensors.pop(name))
    with pytest.raises(LoadError, match=words):
        convert(folder)


def test_backbones_that_no_family_has_are_not_written():
    for kind, changes, words in (
        ("mamba", {"pattern": "MS"}, "mamba: all layers must be M, or all S, got MSM"),
        ("mamba", {"hidden_dim": 8}, "mamba: only a causal hybrid backbone of Mamba layers alone"),
        ("bamba", {"rope_fraction": 1.0}, "bamba: rope_fraction must be 0.5, of half-split pairs, got 1.0"),
        ("bamba", {"rope_interleaved": True}, "bamba: rope_fraction must be 0.5, of half-split pairs"),
        ("bamba", {"attention_bias": True, "proj_bias": False}, "bamba: with attention_bias the projection behind"),
        ("bamba", {"mamba_form": "mmmamba"}, "bamba: mamba_form must be mamba2, got mmmamba"),
        ("mamba", {"pattern": "M", "mamba_form": "mmmamba"}, "mamba: mamba_form must be mamba2, got mmmamba"),
        ("bamba", {"window": 4}, "bamba: its attention has no window, got window=4"),
        ("bamba", {"pattern": "MAS"}, "bamba: layers must be M or A, got MAS"),
        ("bamba", {"hidden_dim": 0}, "bamba: only a causal hybrid backbone with an MLP in every layer"),
        ("jamba", {"s6_norms": False}, "jamba: the backbone must have s6_norms=True, rope_fraction=0"),
        ("jamba", {"pattern": "SAAS", "depth": 4}, "jamba: attention layers must come at equal distances, got SAAS"),
    ):
        with pytest.raises(LoadError, match=words):
            converters()[kind].restore(made(kind, **changes))
    with pytest.raises(LoadError, match="hybridna: models of ours are not written in this family's format"):
        converters()["hybridna"].restore(made("bamba"))


# ---------------------------------------------------------------- hybrids of unknown configs


def hybridna(folder, kind="bamba", **settings):
    """A checkpoint as HybriDNA's may be: names of Bamba, a config of its own."""
    model = made(kind, rope_fraction=0.0)
    tensors, _ = converters()["bamba"].restore(made("bamba"))
    told = {"model_type": "hybridna", "num_attention_heads": 4, "rms_norm_eps": 1e-5, "mamba_d_state": 6, **settings}
    told = {name: value for name, value in told.items() if value is not None}
    return written(folder, tensors, told), model


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"model_type": "other"}, {"n_groups": 2, "mamba_d_state": None}], ids=str)
def test_a_hybrid_is_read_off_its_tensors(settings, tmp_path):
    folder, model = hybridna(tmp_path / "a", **settings)
    assert recognised(folder) == ["hybridna"]
    found = converted(folder)
    assert found.notes["structure"] == (
        "Read off the tensors: layers MAM; attention has no positions, as the paper says."
    )
    ids, mask = left_padded(23)
    torch.testing.assert_close(found.model(ids, mask), model(ids, mask), atol=0, rtol=0)


@torch.no_grad()
def test_a_hybrid_with_mamba1_and_rotary_embedding_is_read_too(tmp_path):
    model = made("jamba", rope_fraction=0.5)
    tensors, _ = converters()["jamba"].restore(made("jamba"))
    told = {"model_type": "hybridna", "num_attention_heads": 4, "rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5}
    found = converted(written(tmp_path / "a", tensors, told))
    assert "SAS; attention has rotary embedding of 0.5 of the channels" in found.notes["structure"]
    ids, mask = left_padded(23)
    torch.testing.assert_close(found.model(ids, mask), model(ids, mask), atol=0, rtol=0)


def test_what_the_tensors_do_not_show_is_asked_for(tmp_path):
    folder, _ = hybridna(tmp_path / "a", mamba_d_state=None)
    with pytest.raises(LoadError, match=r"config\.json must say mamba_d_state or state_size or d_state"):
        convert(folder)
    folder, _ = hybridna(tmp_path / "b", rms_norm_eps=None)
    with pytest.raises(LoadError, match=r"config\.json must say rms_norm_eps or layer_norm_epsilon or norm_eps"):
        convert(folder)
    folder, _ = hybridna(tmp_path / "c")
    change_tensors(folder, lambda tensors: tensors.update({"score.weight": torch.ones(2, 32)}))
    with pytest.raises(LoadError, match=r"1 unexpected: score\.weight"):
        convert(folder)


@pytest.mark.parametrize("name", ["config.json", "params.json", "model.safetensors", "tokenizer.json"])
def test_folders_of_other_kinds_are_nobodys(name, tmp_path):
    def claimed():
        checkpoint = open_checkpoint(tmp_path)
        return [converter.name for converter in (*CONVERTERS, *DNA) if converter.recognises(checkpoint)]

    (tmp_path / name).write_bytes(b"{nonsense")
    assert claimed() == []
    (tmp_path / "config.json").write_text('{"model_type": 3, "architectures": [7], "ssm_cfg": 1}')
    assert claimed() == []
