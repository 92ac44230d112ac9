"""``vertebra convert``: published checkpoints to model directories, and back."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import vertebra
from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.conversion import converters
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.spec import SeriesSpec


@pytest.fixture
def published(tmp_path):
    """A small scaling-law encoder by its published names."""
    torch.manual_seed(0)
    spec = SeriesSpec(context=1000, horizon=192)
    model = PatchForecaster(
        create_backbone("tsfm_test,causal=false"), spec, patch=32, head="mixture", tell_observed=False
    )
    tensors, config = converters()["tsfm"].restore(model.eval())
    folder = tmp_path / "published"
    folder.mkdir()
    save_file({k: v.clone() for k, v in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_checkpoint_becomes_a_model_directory_and_comes_back(published, tmp_path, capsys):
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(published), "-o", str(ours)]) == 0
    out = capsys.readouterr().out
    assert "family     tsfm: " in out
    assert "model      PatchForecaster, tsfm backbone" in out
    assert ", 0 missing, 0 unexpected" in out
    assert out.endswith(f"README.md, config.json, model.safetensors\nSee: vertebra info {ours}\n")
    assert "Converted from" in (ours / "README.md").read_text()
    assert json.loads((ours / "config.json").read_text())["command"] == f"vertebra convert {published} -o {ours}"
    assert f'vertebra.load("local-dir:{ours}")  # or wherever this folder is' in (ours / "README.md").read_text()
    assert vertebra.load(f"local-dir:{ours}").backbone.config.family == "tsfm"
    assert main(["info", str(ours)]) == 0
    assert main(["convert", str(ours), "-o", str(back), "--to", "tsfm"]) == 0
    before, after = load_file(published / "model.safetensors"), load_file(back / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_weights_are_written_in_the_type_asked_for(published, tmp_path, capsys):
    assert main(["convert", str(published), "-o", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for t in load_file(tmp_path / "half" / "model.safetensors").values()} == {torch.bfloat16}
    assert vertebra.load(tmp_path / "half").backbone.norm.weight.dtype in (torch.bfloat16, torch.float32)


def test_families_are_listed(capsys):
    assert main(["convert", "--families"]) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert listed == list(converters())
    assert {"illama", "timm_vit", "owsm_ctc", "meshanything_v2", "tsfm", "llama", "mamba", "hybridna"} <= set(listed)


def test_what_is_left_out_is_listed_by_name(published, tmp_path, capsys, monkeypatch):
    from vertebra.domains.timeseries.published import TSFMConverter

    convert = TSFMConverter.convert

    def with_rest(self, checkpoint):
        found = convert(self, checkpoint)
        left = {f"extra.{i}": "of the training alone" for i in range(20)}
        return type(found)(model=found.model, report=found.report, left_out=left)

    monkeypatch.setattr(TSFMConverter, "convert", with_rest)
    assert main(["convert", str(published), "-o", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "left out   20: of the training alone\n             extra.0\n" in out
    assert f"and 8 more, all in {tmp_path / 'ours' / 'left_out.json'}" in out
    assert len(json.loads((tmp_path / "ours" / "left_out.json").read_text())) == 20


FRONTS = {
    "---\nlicense: mit\n---\n# x\n": "mit, as the source's README says; vertebra has not checked it.",
    "---\nlicense: other\nlicense_name: a-b\n---\n": "other (a-b), as the source's README says",
    "---\nlicense:\n- mit\n- apache-2.0\n---\n": "mit (apache-2.0), as the source's README says",
    "# x\nlicense: mit\n": "Not stated by who trained it.",
    "---\nlicense: <script>\n---\n": "Not stated by who trained it.",
}


@pytest.mark.parametrize("front", FRONTS)
def test_the_card_says_what_the_source_says_of_its_licence(front, published, tmp_path):
    (published / "README.md").write_text(front)
    assert main(["convert", str(published), "-o", str(tmp_path / "ours"), "--family", "tsfm"]) == 0
    card = (tmp_path / "ours" / "README.md").read_text()
    assert f"## Licence\n\n{FRONTS[front]}" in card
    assert f"vertebra convert {published} -o {tmp_path / 'ours'} --family tsfm" in card


@pytest.mark.parametrize("source", ["dna_lm", "{ours}", "local-dir:{ours}"])
def test_a_model_of_ours_is_not_converted_again(source, published, tmp_path, capsys):
    ours = tmp_path / "ours"
    main(["convert", str(published), "-o", str(ours)])
    source = source.format(ours=ours)
    assert main(["convert", source, "-o", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert f"{source}: already a model of vertebra" in error
    assert f"vertebra convert {source} -o DIR --to FAMILY" in error


def theirs(folder, **config):
    folder.mkdir()
    save_file({"bert.x": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_an_unknown_kind_is_named(tmp_path, capsys):
    source = theirs(tmp_path / "m", model_type="bert", architectures=["BertModel"])
    assert main(["convert", source, "-o", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert "config.json says model_type 'bert', architectures BertModel, which is of no family that is known" in error
    assert "--family" not in error


def test_a_family_that_the_config_contradicts_is_refused(tmp_path, capsys):
    source = theirs(tmp_path / "m", model_type="llama", architectures=["LlamaForCausalLM"])
    assert main(["convert", source, "-o", str(tmp_path / "x"), "--family", "mamba"]) == 2
    error = capsys.readouterr().err
    assert "tells a model of the family llama (model_type 'llama', architectures LlamaForCausalLM), not mamba" in error
    assert "leave --family out, or say --family llama." in error


def taken(path):
    (path / "thing").mkdir(parents=True)
    return str(path)


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "convert: needs SOURCE and -o DIR. See: vertebra convert --help"),
        (["{published}", "-o", "x", "--family", "lama"], "unknown family 'lama'. Did you mean 'llama'"),
        (["{published}", "-o", "x", "--family", "tsfm", "--to", "tsfm"], "give one of them."),
        (["{published}", "-o", "{taken}"], "exists and is no model directory; choose another place."),
        (["{published}", "-o", "{taken}", "--to", "tsfm"], "is not empty; choose a new folder."),
        (["dna_lm", "-o", "x", "--to", "tsfm"], "tsfm"),
        (["nowhere.pth", "-o", "x"], "nowhere.pth: no such file or folder"),
        (["{odd}", "-o", "x"], "of no family that is known (illama, "),
    ],
)
def test_errors_are_sentences(args, text, published, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"strange.weight": torch.zeros(2)}, tmp_path / "odd.safetensors")
    places = {"published": published, "taken": taken(tmp_path / "taken"), "odd": tmp_path / "odd.safetensors"}
    assert main(["convert", *(word.format(**places) for word in args)]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()
