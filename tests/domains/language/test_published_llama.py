"""LLaMA, Mistral and Qwen2: against transformers, from and to their files, and what is refused."""

import json

import pytest
import torch
from made_checkpoints import (
    ATTENTION,
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
from safetensors.torch import load_file

from vertebra.backbones.published.llama import half_split, interleaved
from vertebra.domains.conversion import convert, converters
from vertebra.domains.language.model import LanguageEncoder, LanguageModel
from vertebra.errors import LoadError

LLAMA = {**TINY, **ATTENTION}
ORIGINALS = {
    "llama": ("LlamaForCausalLM", LLAMA),
    "llama tied": ("LlamaForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "llama with biases": ("LlamaForCausalLM", {**LLAMA, "attention_bias": True, "rms_norm_eps": 1e-3}),
    "llama with all heads": ("LlamaForCausalLM", {**LLAMA, "num_key_value_heads": 4}),
    "llama with long waves": (
        "LlamaForCausalLM",
        {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "llama without head": ("LlamaModel", LLAMA),
    "mistral": ("MistralForCausalLM", {**LLAMA, "sliding_window": 6}),
    "mistral without window": ("MistralForCausalLM", {**LLAMA, "sliding_window": None}),
    "qwen2": ("Qwen2ForCausalLM", {**LLAMA, "tie_word_embeddings": True}),
    "qwen2 with windows": (
        "Qwen2ForCausalLM",
        {**LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
}


@pytest.mark.bench
@pytest.mark.parametrize("name", ORIGINALS)
def test_outputs_are_the_originals_there_and_back(name, tmp_path):
    kind, config = ORIGINALS[name]
    model = original(kind, **config)
    folder = saved(model, tmp_path / "original")
    assert recognised(folder) == ["llama"]
    ours = converted(folder).model
    assert type(ours) is (LanguageEncoder if kind.endswith("Model") else LanguageModel)
    assert difference(model, ours) < 1e-5
    assert difference(model, ours, padded=False) < 1e-5
    before, after = outputs_after_saving(ours, tmp_path / "model")
    torch.testing.assert_close(after, before, atol=0, rtol=0)

    tensors, settings = converters()["llama"].restore(ours)
    files = load_file(folder / "model.safetensors")
    assert tensors.keys() == files.keys()
    assert all(torch.equal(tensors[key], files[key]) for key in files)
    again = type(model).from_pretrained(written(tmp_path / "restored", tensors, settings)).eval()
    assert difference(again, ours) < 1e-5


@pytest.mark.bench
def test_files_in_shards_and_in_half_precision(tmp_path):
    model = original("LlamaForCausalLM", **LLAMA).to(torch.bfloat16)
    folder = saved(model, tmp_path / "shards", max_shard_size="8KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    ours = converted(folder).model
    assert ours.embed.weight.dtype == torch.float32
    assert difference(type(model).from_pretrained(folder, dtype=torch.float32).eval(), ours) < 1e-5


@pytest.mark.bench
@pytest.mark.parametrize("file", ["consolidated.00.pth", "consolidated.safetensors"])
def test_metas_files_have_the_outputs_of_the_same_model_of_transformers(file, tmp_path):
    peer = original("LlamaForCausalLM", **LLAMA)
    tensors = {"rope.freqs": torch.ones(4)}
    names = {
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name, tensor in peer.state_dict().items():
        if name.startswith("model.layers."):
            _, _, layer, part = name.removesuffix(".weight").split(".", 3)
            if part.endswith(("q_proj", "k_proj")):  # row 2i of a head is its row i there, and row 2i+1 its row i + 4
                order = torch.arange(8).reshape(2, 4).T.flatten()
                tensor = torch.cat([head[order] for head in tensor.split(8)])
            tensors[f"layers.{layer}.{names[part]}.weight"] = tensor
    outside = {"model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output"}
    tensors |= {f"{meta}.weight": peer.state_dict()[f"{name}.weight"] for name, meta in outside.items()}
    written(tmp_path, tensors, {})
    (tmp_path / "config.json").unlink()
    if file.endswith(".pth"):
        (tmp_path / "model.safetensors").unlink()
        torch.save(tensors, tmp_path / file)
    else:
        (tmp_path / "model.safetensors").rename(tmp_path / file)
    params = {"dim": 32, "n_layers": 3, "n_heads": 4, "n_kv_heads": 2, "norm_eps": 1e-6, "vocab_size": -1}
    (tmp_path / "params.json").write_text(json.dumps(params))
    assert recognised(tmp_path) == ["llama"]
    found = converted(tmp_path)
    assert found.left_out == {"rope.freqs": "a table that is computed, not learned"}
    assert difference(peer, found.model) < 1e-5

    (tmp_path / "params.json").write_text(json.dumps({**params, "use_scaled_rope": True}))
    with pytest.raises(LoadError, match=r"use_scaled_rope = True in params\.json cannot be converted"):
        convert(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps({**params, "moe": {"num_experts": 8}}))
    with pytest.raises(LoadError, match=r"moe = \{'num_experts': 8\} in params\.json cannot be converted"):
        convert(tmp_path)
    (tmp_path / "params.json").write_text(json.dumps(params))
    (tmp_path / "consolidated.00.pth").touch()
    (tmp_path / "consolidated.01.pth").touch()
    with pytest.raises(LoadError, match="cut over 2 devices"):
        convert(tmp_path)


def test_rows_are_put_in_order_and_back():
    rows = torch.arange(16.0)[:, None]
    turned = interleaved(rows, 8)
    assert turned[:8, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(half_split(turned, 8), rows)


# ---------------------------------------------------------------- without transformers


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("options", [{}, {"tie": True}, {"head": False}], ids=str)
def test_what_is_restored_is_converted_to_the_same_model(kind, options, tmp_path):
    model = made(kind, **options)
    folder = published(kind, tmp_path / "a", **options)
    assert json.loads((folder / "config.json").read_text())["model_type"] == kind
    assert recognised(folder) == ["llama"]
    found = convert(folder)
    assert found[0].name == "llama"
    again = found[1].model
    assert type(again) is type(model)
    assert again.spec == model.spec
    assert again.backbone.config == model.backbone.config
    ids, mask = left_padded(23)
    with torch.no_grad():
        torch.testing.assert_close(again(ids, mask), model(ids, mask), atol=0, rtol=0)


def test_old_files_hold_tables_and_a_copy_of_the_head(tmp_path):
    folder = published("llama", tmp_path / "a", tie=True)

    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    found = converted(change_tensors(folder, change))
    assert list(found.left_out) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert found.model.head.weight is found.model.embed.weight


def test_tokenizer_files_come_along_and_ids_are_read(tmp_path):
    folder = published("llama", tmp_path / "a")
    (folder / "tokenizer.json").write_text('{"model": {"vocab": {"the": 0}}}')
    change_config(folder, pad_token_id=-1, eos_token_id=2, bos_token_id=None, max_position_embeddings=None)
    found = converted(folder)
    assert [file.name for file in found.files] == ["tokenizer.json"]
    spec = found.model.spec
    assert (spec.bos_id, spec.eos_ids, spec.pad_id, spec.max_length) == (None, (2,), None, None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            r"rope_scaling = \{'rope_type': 'llama3', 'factor': 8\.0\} in config\.json cannot be converted: its rotary",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling = .*linear.* cannot be converted"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters = .*yarn.* cannot be converted"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5 in config\.json cannot be converted"),
        (
            {"embedding_multiplier": 12.0},
            r"embedding_multiplier = 12\.0 in config\.json cannot be converted: ours scales",
        ),
        ({"logits_scaling": 8.0}, r"logits_scaling = 8\.0 in config\.json cannot be converted: ours scales"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping = 30\.0 in .* cannot be converted: ours caps no"),
        (
            {"architectures": ["LlamaForSequenceClassification"]},
            r"architectures = .* it is a classifier, not a language model, .* save the LlamaModel inside of it",
        ),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' in config.json cannot be converted: the MLP is gated by SiLU"),
        ({"mlp_bias": True}, "mlp_bias = True in config.json cannot be converted"),
        ({"head_dim": 16}, "head_dim is 16 in config.json, but the weights have 8"),
        ({"num_attention_heads": 3}, r"3 heads with 32 channels in all \(head_dim\) cannot be converted"),
        ({"num_attention_heads": "4"}, "num_attention_heads = '4' in config.json .* must be a whole number"),
        ({"num_attention_heads": None}, r"config\.json must say num_attention_heads; get the whole folder"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 4 in config.json, but the weights have 2"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000 in config.json, but the weights have 3"),
        ({"intermediate_size": 41}, "intermediate_size is 41 in config.json, but the weights have 40"),
        ({"vocab_size": 24}, "vocab_size is 24 in config.json, but the weights have 23"),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0 in config.json cannot be converted: it must be a number"),
        ({"rope_theta": "big"}, "rope_theta = 'big' in config.json cannot be converted"),
        ({"quantization_config": {"bits": 4}}, "quantization_config = .* the weights are quantized"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True .* a head that is not the embedding"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings = 'yes' .* must be true or false"),
        ({"model_type": "qwen3"}, "model_type = 'qwen3' in config.json cannot be converted: it norms queries and keys"),
        ({"model_type": "mixtral"}, "model_type = 'mixtral' in config.json cannot be converted: its MLPs are experts"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4, "layer_types": ["full"]},
            "layer_types",
        ),
    ],
    ids=str,
)
def test_settings_that_ours_cannot_do_are_named(changes, words, tmp_path):
    folder = change_config(published("llama", tmp_path / "a"), **changes)
    assert recognised(folder) == ["llama"]
    with pytest.raises(LoadError, match=words):
        convert(folder)


@pytest.mark.parametrize("changes", [{"embedding_multiplier": 1.0, "logits_scaling": 1}, {"residual_multiplier": 1.0}])
def test_settings_that_change_nothing_are_taken(changes, tmp_path):
    assert converted(change_config(published("llama", tmp_path / "a"), **changes)).model.spec.vocab_size == 23


def test_a_mistral_that_does_not_say_has_the_window_of_transformers(tmp_path):
    folder = published("mistral", tmp_path / "a")
    assert converted(folder).model.backbone.config.window == 6
    assert converted(change_config(folder, sliding_window=None)).model.backbone.config.window == 4096
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": None}))
    assert converted(folder).model.backbone.config.window == 0


@pytest.mark.bench
def test_the_window_is_that_of_transformers():
    from vertebra.backbones.published.llama import _MISTRAL_WINDOW

    assert pytest.importorskip("transformers").MistralConfig().sliding_window == _MISTRAL_WINDOW


@pytest.mark.parametrize(
    ("config", "generation", "found"),
    [(2, [2, 5], (2, 5)), (None, 5, (5,)), ([2, 5], 2, (2, 5)), (2, None, (2,)), (2, [5, 99], (2,))],
)
def test_more_ends_are_read_from_the_settings_for_generation(config, generation, found, tmp_path):
    folder = change_config(published("llama", tmp_path / "a"), eos_token_id=config)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert converted(folder).model.spec.eos_ids == found


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight", r"has no tensor model\.layers\.1\.mlp\.up_proj\.weight; is it whole\?"),
        ("model.layers.1.self_attn.k_proj.weight", r"no tensor model\.layers\.1\.self_attn\.k_proj\.weight;"),
        ("model.embed_tokens.weight", r"has no tensor model\.embed_tokens\.weight; is it whole"),
        ("lm_head.weight", r"no tensor lm_head\.weight; is it whole\? .* must say tie_word_embeddings"),
    ],
)
def test_a_tensor_that_is_missing_is_named(name, words, tmp_path):
    folder = change_tensors(published("llama", tmp_path / "a"), lambda tensors: tensors.pop(name))
    with pytest.raises(LoadError, match=words):
        convert(folder)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.1.mlp.up_proj.scale", r"1 unexpected: model\.layers\.1\.mlp\.up_proj\.scale"),
        ("score.weight", r"1 unexpected: score\.weight"),
        ("model.layers.0.self_attn.q_norm.weight", "q_norm.weight cannot be converted: ours has neither norms"),
        ("model.layers.0.mlp.experts.0.w1.weight", "experts.0.w1.weight cannot be converted"),
        (
            "model.layers.7.input_layernorm.weight",
            r"no tensor model\.layers\.7\.post_attention_layernorm\.weight, .* and 5 more",
        ),
    ],
)
def test_a_tensor_too_many_is_named(name, words, tmp_path):
    folder = published("llama", tmp_path / "a")
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(LoadError, match=words):
        convert(folder)


def test_names_alone_are_recognised_and_the_config_asked_for(tmp_path):
    folder = published("llama", tmp_path / "a")
    (folder / "config.json").unlink()
    assert recognised(folder) == ["llama"]
    with pytest.raises(LoadError, match=r"config\.json must say num_attention_heads"):
        convert(folder)


def test_backbones_that_no_family_has_are_not_written():
    llama = converters()["llama"]
    for changes, words in (
        ({"causal": False}, "only a causal iLLaMA backbone"),
        ({"window": [0, 3, 0]}, r"no family of transformers has windows \(0, 3, 0\) with bias=False"),
        ({"window": [1, 2, 3], "bias": True, "proj_bias": False}, "no family of transformers has windows"),
    ):
        with pytest.raises(LoadError, match=words):
            llama.restore(made("llama", **changes))
    with pytest.raises(LoadError, match="only a causal iLLaMA backbone"):
        llama.restore(made("bamba"))
