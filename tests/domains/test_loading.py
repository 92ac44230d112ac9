"""Models and backbones in one line."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import vertebra
from vertebra.backbones.base import create_backbone
from vertebra.domains.loading import saved_folder
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, LoadError, UnknownNameError


@pytest.fixture
def model() -> PatchForecaster:
    torch.manual_seed(0)
    return PatchForecaster(create_backbone("illama_test"), SeriesSpec(context=32, horizon=8), patch=8).eval()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def test_a_model_directory_a_run_folder_and_a_prefix_mean_the_same(tmp_path, model):
    run = tmp_path / "runs" / "1"
    save_model(model, run / "model")
    for source in (run, run / "model", f"local-dir:{run / 'model'}", str(run / "model")):
        found = vertebra.load(source)
        assert same(found, model)
        assert not found.training
        assert same(vertebra.load_backbone(source), model.backbone)


def test_a_bundled_name_is_its_model():
    assert same(vertebra.load("dna_lm"), load_model("dna_lm"))
    backbone = vertebra.load_backbone("dna_lm")
    assert same(backbone, load_model("dna_lm").backbone)
    assert not backbone.training


def test_the_type_is_changed_where_asked(tmp_path, model):
    save_model(model, tmp_path / "m")
    assert vertebra.load(tmp_path / "m", dtype=torch.bfloat16).backbone.norm.weight.dtype == torch.bfloat16


def test_fields_of_a_backbone_are_changed_where_weights_still_fit(tmp_path, model):
    save_model(model, tmp_path / "m")
    assert vertebra.load_backbone(tmp_path / "m", dropout=0.1).config.dropout == 0.1
    with pytest.raises(LoadError, match=r"depth 2 \(here 3\)"):
        vertebra.load_backbone(tmp_path / "m", depth=3)
    with pytest.raises(ConfigError, match="has no field 'width'"):
        vertebra.load_backbone(tmp_path / "m", width=3)


def test_what_is_not_ours_is_converted_on_the_way(tmp_path, model):
    from vertebra.domains.conversion import converters

    trunk = PatchForecaster(create_backbone("tsfm_test,causal=false"), SeriesSpec(context=64, horizon=32), patch=32,
                            head="mixture", tell_observed=False)  # fmt: skip
    tensors, config = converters()["tsfm"].restore(trunk.eval())
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    assert saved_folder(folder) is None
    for source in (folder, folder / "model.safetensors"):
        assert same(vertebra.load(source).backbone, trunk.backbone)
        assert same(vertebra.load_backbone(source), trunk.backbone)
    assert vertebra.load_backbone(folder, dropout=0.2).config.dropout == 0.2
    with pytest.raises(LoadError, match=r"published do not fit TSFM: \d+ missing"):
        vertebra.load_backbone(folder, depth=3)


def test_what_is_not_there_is_told(tmp_path):
    with pytest.raises(UnknownNameError, match="dna_lm"):
        vertebra.load("dna_ml")
    with pytest.raises(LoadError, match=r"nowhere: no such folder"):
        vertebra.load(tmp_path / "nowhere")
    with pytest.raises(LoadError, match=r"a\.ckpt: no such checkpoint file\."):
        vertebra.load(tmp_path / "a.ckpt")
    with pytest.raises(UnknownNameError, match="family"):
        vertebra.load(tmp_path, family="lama")
