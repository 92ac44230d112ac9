"""Names and folders that are no model directory: what they are, and what the user is told to do."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import vertebra
from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.loading.pretrained import model_folder, read_backbone_config, read_config
from vertebra.domains.saving import load_model
from vertebra.errors import LoadError, VertebraError

MISSPELT = {
    "HF-HUB:a/b": "hf-hub:a/b",
    "hf_hub:a/b@v1": "hf-hub:a/b@v1",
    "hf://a/b": "hf-hub:a/b",
    "https://huggingface.co/a/b": "hf-hub:a/b",
    "https://huggingface.co/a/b/tree/main": "hf-hub:a/b",
    "huggingface.co/a/b/tree/v1/": "hf-hub:a/b@v1",
}


@pytest.fixture
def run(tmp_path):
    """A run folder with a finished model."""
    folder = tmp_path / "runs" / "1"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"x")
    (folder / "model").mkdir()
    bundled = model_folder("dna_lm")
    for name in ("config.json", "model.safetensors"):
        (folder / "model" / name).symlink_to(folder / "model" / f"of_{name}")
        (folder / "model" / f"of_{name}").write_bytes((bundled / name).read_bytes())
    return folder


@pytest.fixture
def elsewhere(tmp_path):
    """A published checkpoint."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def told(function, *args):
    with pytest.raises(VertebraError) as error:
        function(*args)
    return str(error.value)


def test_a_run_folder_is_the_model_in_it(run, monkeypatch):
    for source in (run, str(run), f"local-dir:{run}"):
        assert model_folder(source) == run / "model"
    assert type(load_model(run)).__name__ == "DNALanguageModel"
    assert resolve(f"local-dir:{run}").family == resolve("dna_lm").family
    assert create_backbone(f"local-dir:{run}").config == resolve("dna_lm")
    monkeypatch.setenv("HOME", str(run.parent))
    assert model_folder("~/1") == model_folder("local-dir:~/1") == run / "model"
    assert vertebra.load_backbone("~/1").config == resolve("dna_lm")


def test_a_run_without_a_finished_model_says_what_to_do(run):
    (run / "model" / "config.json").unlink()
    for function in (model_folder, vertebra.load, load_model):
        text = told(function, run)
        assert "a run folder without a finished model (model/config.json); finish it: vertebra fit --ckpt_path" in text
    (run / "checkpoints" / "last.ckpt").unlink()
    assert "it has no checkpoint either, so fit it again" in told(vertebra.load, run)


def test_a_checkpoint_is_no_model_directory(run):
    text = told(model_folder, run / "checkpoints" / "last.ckpt")
    assert "a checkpoint of a training, not a model directory" in text
    assert text.endswith(f"name the `model` in its run folder: {run / 'model'}")
    text = told(model_folder, run / "checkpoints")
    assert "checkpoints of a training, not a model directory" in text
    assert text.endswith(f"{run / 'model'}")
    assert "no such checkpoint file" in told(model_folder, "none.ckpt")


@pytest.mark.parametrize("function", [read_config, read_backbone_config, load_model, resolve])
def test_a_published_checkpoint_is_called_one(function, elsewhere):
    source = f"local-dir:{elsewhere}" if function is resolve else elsewhere
    text = told(function, source)
    assert "it is a published checkpoint (model_type 'llama', architectures LlamaForCausalLM)." in text
    assert text.endswith(f"Convert it: vertebra convert {elsewhere} -o DIR")
    (elsewhere / "model.safetensors").rename(elsewhere / "model-00001-of-00001.safetensors")
    assert "it is a published checkpoint (model_type 'llama'" in told(function, source)


@pytest.mark.parametrize("config", [None, {"architecture": "vit_tiny_patch16_224", "num_classes": 10}])
def test_so_is_one_with_torchs_file_or_of_timm(config, tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "pytorch_model.bin")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    text = told(load_model, tmp_path)
    assert "it is a published checkpoint" in text
    assert ("architecture 'vit_tiny_patch16_224'" in text) is bool(config)
    assert text.endswith(f"vertebra convert {tmp_path} -o DIR")
    assert "of a published checkpoint: vertebra convert" in told(model_folder, tmp_path / "pytorch_model.bin")


@pytest.mark.parametrize("function", [model_folder, vertebra.load, vertebra.load_backbone])
def test_names_that_can_mean_nothing(function):
    assert "no model is named" in told(function, "")
    assert "local-dir: needs the path of a folder behind it" in told(function, "local-dir:")
    for name, right in MISSPELT.items():
        assert told(function, name).endswith(f"repositories of the hub are written {right}")
    text = told(function, "org/name")
    assert text == "org/name: no such folder; if it is a repository of the hub, write hf-hub:org/name"
    assert "hybrid_nano is a preset, an architecture without weights" in told(function, "hybrid_nano")


def test_backbones_by_names_of_the_hub_in_another_spelling():
    assert told(resolve, "HF-HUB:a/b").endswith("are written hf-hub:a/b")


def test_a_backbone_takes_fields_behind_its_name(tmp_path):
    assert vertebra.load_backbone("dna_lm,dropout=0.3").config.dropout == 0.3
    assert vertebra.load_backbone("dna_lm,dropout=0.3", dropout=0.2).config.dropout == 0.2
    odd = tmp_path / "a,b=c"
    odd.symlink_to(model_folder("dna_lm"))
    assert vertebra.load_backbone(Path(odd)).config == resolve("dna_lm")


def test_a_folder_of_nothing_is_what_it_was(tmp_path):
    with pytest.raises(LoadError, match=r"not a model directory, config\.json is missing"):
        model_folder(tmp_path)
