"""Small originals of transformers with random weights, and checkpoints of them."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from vertebra.backbones.base import BackboneConfig
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.conversion import convert, converters
from vertebra.domains.language.model import LanguageEncoder, LanguageModel
from vertebra.domains.language.spec import LanguageSpec
from vertebra.domains.saving import load_model, save_model

TINY = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 3}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
BAMBA = {**TINY, **ATTENTION, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2,
         "mamba_d_state": 6, "num_logits_to_keep": None}  # fmt: skip
JAMBA = {**TINY, **ATTENTION, "num_experts": 1, "num_experts_per_tok": 1, "attn_layer_period": 2,
         "attn_layer_offset": 1, "mamba_d_state": 6, "mamba_dt_rank": 5}  # fmt: skip
GRANITE = {**TINY, "num_attention_heads": 4, "num_key_value_heads": 2, "shared_intermediate_size": 40,
           "num_local_experts": 0, "layer_types": ["mamba", "attention", "mamba"], "mamba_n_heads": 8,
           "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "embedding_multiplier": 12.0,
           "residual_multiplier": 0.22, "attention_multiplier": 0.3, "logits_scaling": 6.0}  # fmt: skip


STACKS = {
    "llama": {"family": "illama", "dim": 32, "depth": 3, "num_heads": 4, "num_kv_heads": 2, "hidden_dim": 40,
              "bias": False},
    "mistral": {"window": 6},
    "qwen2": {"bias": True, "proj_bias": False, "window": [0, 0, 5]},
    "mamba2": {"family": "hybrid", "dim": 32, "depth": 3, "pattern": "M", "hidden_dim": 0, "mamba_head_dim": 8,
               "mamba_groups": 2, "state_dim": 6},
    "mamba": {"pattern": "S", "s6_state_dim": 5},
    "bamba": {"pattern": "MAM", "hidden_dim": 40, "num_heads": 4, "num_kv_heads": 2, "rope_fraction": 0.5},
    "jamba": {"pattern": "SA", "hidden_dim": 40, "num_heads": 4, "num_kv_heads": 2, "s6_norms": True, "dt_rank": 5},
}  # fmt: skip
"""Backbones by the ``model_type`` that they have in transformers, each on top of the first of its kind."""
FAMILY_OF = {"mistral": "llama", "qwen2": "llama", "mamba2": "mamba"}


def made(kind, tie=False, head=True, seed=0, **changes):
    """Build a model of ours with the backbone of a published kind, every weight drawn."""
    base = (
        "llama"
        if STACKS[kind].get("family", "illama") == "illama" and kind in ("llama", "mistral", "qwen2")
        else "mamba2"
    )
    torch.manual_seed(seed)
    backbone = BackboneConfig.from_dict({**STACKS[base], **STACKS[kind], **changes}).build()
    spec = LanguageSpec(vocab_size=23, max_length=64, bos_id=1, eos_ids=(2, 5), pad_id=0)
    model = (LanguageModel(backbone, spec, tie=tie) if head else LanguageEncoder(backbone, spec)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def published(kind, folder, **options):
    """Write a small checkpoint of a kind by the converter that reads it; needs no transformers."""
    return written(folder, *converters()[FAMILY_OF.get(kind, kind)].restore(made(kind, **options)))


def original(name, seed=0, **config):
    """Build ``nameForCausalLM`` or ``nameModel`` with every weight drawn, none left at 1 or 0."""
    transformers = pytest.importorskip("transformers")
    cls = getattr(transformers, name)
    torch.manual_seed(seed)
    model = cls(cls.config_class(**config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def saved(model, folder, **options):
    """Write a checkpoint as users have it."""
    model.save_pretrained(folder, **options)
    return folder


def written(folder, tensors, config):
    """Write a checkpoint from its parts."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def change_config(folder, **changes):
    """Change ``config.json`` of a checkpoint; None takes a setting away."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))
    return folder


def change_tensors(folder, change):
    """Rewrite the tensors of a checkpoint."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    path.unlink()
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return folder


def left_padded(vocab, length=19, seed=1):
    """Ids (2, L) and a mask of real positions, the second row with padding before it."""
    torch.manual_seed(seed)
    ids = torch.randint(vocab, (2, length))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, :5] = False
    return ids, mask


@torch.no_grad()
def difference(model, ours, padded=True):
    """Return the largest difference of logits or features at real positions."""
    ids, mask = left_padded(ours.spec.vocab_size)
    if not padded:
        mask = torch.ones_like(mask)
    out = model(ids, attention_mask=mask.long() if padded else None, use_cache=False)
    theirs = out.logits if hasattr(out, "logits") else out.last_hidden_state
    found = ours(ids, mask if padded else None)
    assert found.shape == theirs.shape
    assert theirs[mask].std() > 0.05  # so that a difference would show
    return (found - theirs)[mask].abs().max().item()


def recognised(folder):
    """Names of all converters that take a checkpoint for theirs."""
    checkpoint = open_checkpoint(folder)
    return [name for name, converter in converters().items() if converter.recognises(checkpoint)]


def converted(folder, family=None):
    return convert(folder, family)[1]


@torch.no_grad()
def outputs_after_saving(model, folder):
    """Return outputs of a model before, and of what was saved and loaded after."""
    ids, mask = left_padded(model.spec.vocab_size)
    before = model(ids, mask)
    again = load_model(save_model(model, folder))
    shutil.rmtree(folder)
    return before, again(ids, mask)
