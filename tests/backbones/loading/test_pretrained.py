"""Strict loading with a report, and the places a model can come from."""

import json

import pytest
import torch

from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.loading.pretrained import (
    LoadReport,
    load_backbone,
    load_state,
    model_folder,
    read_config,
    read_tensors,
    save_tensors,
)
from vertebra.errors import LoadError, UnknownNameError


@pytest.fixture
def folder(tmp_path):
    """A small model directory: a backbone and a head."""
    torch.manual_seed(5)
    model = torch.nn.ModuleDict({"backbone": create_backbone("hybrid_test"), "head": torch.nn.Linear(16, 2)})
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"backbone": resolve("hybrid_test").to_dict()}))
    save_tensors(model, path / "model.safetensors")
    return path


def test_local_dir_gives_the_saved_weights(folder):
    saved = read_tensors(folder)
    backbone = create_backbone(f"local-dir:{folder}")
    assert all(torch.equal(v, saved[f"backbone.{k}"]) for k, v in backbone.state_dict().items())


def test_a_pretrained_name_may_change_what_has_no_weights(folder):
    assert create_backbone(f"local-dir:{folder},dropout=0.5").config.dropout == 0.5
    with pytest.raises(LoadError, match=r"another than this model's: depth 3 \(here 2\)\."):
        create_backbone(f"local-dir:{folder},depth=2")


def test_report_counts_and_errors_list_the_keys():
    module = torch.nn.Linear(3, 2)
    good = {"weight": torch.ones(2, 3), "bias": torch.ones(2)}
    report = load_state(module, good)
    assert str(report) == "2 matched, 0 reshaped, 0 missing, 0 unexpected"
    assert report.initial() == "2 matched, 0 reshaped, 0 fresh, 0 not taken"
    headed = LoadReport(["norm.weight"], [], ["head.weight", "head.bias"], ["old.weight"], ["num_heads 8, was 4"])
    assert headed.initial() == (
        "1 matched, 0 reshaped, 2 fresh (head.weight, head.bias), 1 not taken (old.weight); but with num_heads 8, was 4"
    )
    with pytest.raises(
        LoadError, match=r"the weights do not fit Linear: 1 missing: bias; 1 unexpected: b\. Nothing was"
    ):
        load_state(module, {"weight": good["weight"] * 2, "b": good["bias"]})
    assert torch.equal(module.weight, torch.ones(2, 3))
    with pytest.raises(LoadError, match=r"1 misshapen: weight \(5, 3\) -> \(2, 3\)"):
        load_state(module, {"weight": torch.ones(5, 3), "bias": good["bias"]})
    report = load_state(
        module, {"weight": good["weight"], "old": good["bias"]}, allow_missing=["bias"], allow_unexpected=["old"]
    )
    assert (report.missing, report.unexpected) == (["bias"], ["old"])


def test_an_adapter_declares_a_new_shape():
    module = torch.nn.Embedding(4, 2)
    saved = {"weight": torch.ones(3, 2)}
    grow = {"weight": lambda key, old, new: torch.cat([old, old.mean(0, keepdim=True)])}
    assert load_state(module, saved, adapters=grow).reshaped == ["weight (3, 2) -> (4, 2)"]
    assert torch.equal(module.weight, torch.ones(4, 2))
    keep = load_state(module, saved, adapters={"weight": lambda *_: None}, allow_missing=["weight"])
    assert keep.missing == ["weight"]


def test_an_adapter_is_asked_for_a_table_of_the_same_shape_too():
    module = torch.nn.Embedding(2, 2)
    saved = {"weight": torch.arange(4.0).view(2, 2)}
    swap = {"weight": lambda key, old, new: (old.flip(0), "rows by name")}
    assert load_state(module, saved, adapters=swap).reshaped == ["weight (2, 2): rows by name"]
    assert module.weight[0].tolist() == [2, 3]
    assert load_state(module, saved, adapters={"weight": lambda key, old, new: old}).matched == ["weight"]


@pytest.mark.parametrize(
    ("length", "said"), [(40, "the first 34 rows as saved, 8 fresh"), (20, "the first 22 rows as saved")]
)
def test_a_table_of_positions_is_extended_for_a_longer_context(length, said, tmp_path):
    short = create_backbone("opt_test,max_length=32")
    save_tensors(torch.nn.ModuleDict({"backbone": short}), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"backbone": short.config.to_dict()}))
    other = create_backbone(f"opt_test,max_length={length}").eval()
    fresh = other.positions.weight.detach().clone()
    report = load_backbone(other, f"local-dir:{tmp_path}")
    assert report.reshaped == [f"positions.weight (34, 16) -> ({length + 2}, 16): {said}"]
    assert torch.equal(other.positions.weight[34:], fresh[34:])
    x = torch.randn(1, 20, 16)
    assert torch.equal(other(x), short.eval()(x))


def test_wrong_places_are_named(tmp_path, folder):
    with pytest.raises(LoadError, match="no such folder"):
        model_folder(f"local-dir:{tmp_path}/nothing")
    with pytest.raises(LoadError, match=r"not a model directory, config\.json is missing"):
        model_folder((folder / "empty").mkdir() or folder / "empty")
    with pytest.raises(UnknownNameError, match="unknown model 'dna_promotr'"):
        model_folder("dna_promotr")
    (folder / "model.safetensors").write_bytes(b"\x00" * 10)
    with pytest.raises(LoadError, match=r"model\.safetensors: not a safetensors file, or cut short"):
        read_tensors(folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(LoadError, match="has no 'backbone' entry"):
        read_config(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(LoadError, match="not readable as JSON"):
        read_config(folder)
