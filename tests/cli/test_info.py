"""``vertebra info`` of what is not ours, and of names that are nearly right."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.backbones.loading.places import FAMILIES, family_of
from vertebra.cli import main
from vertebra.cli.info import _use
from vertebra.domains.conversion import converters


def written(folder, config, tensors=("x", "y"), name="model.safetensors"):
    folder.mkdir(exist_ok=True)
    save_file({n: torch.zeros(2, 3) for n in tensors}, folder / name)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def shown(capsys, *args):
    assert main(["info", *map(str, args)]) == 0
    return capsys.readouterr().out


def test_a_published_checkpoint_is_told_from_config_and_headers(tmp_path, capsys):
    folder = written(tmp_path / "m", {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    out = shown(capsys, folder)
    assert f"{folder}: not a model of vertebra, but to be converted to one" in out
    for line in (r"says +model_type 'llama', architectures LlamaForCausalLM",
                 r"family +llama", r"parameters +12 \(12\)",
                 r"tensors +2", r"dtype +F32", rf"use +vertebra convert {folder} -o DIR"):  # fmt: skip
        assert re.search(rf"^{line}$", out, re.MULTILINE), line
    assert all(len(line.split(None, 1)) == 2 for line in out.splitlines())  # no blank fields


def test_so_are_shards_and_files_of_torch(tmp_path, capsys):
    folder = written(tmp_path / "m", {"model_type": "strange"}, name="a-1.safetensors")
    written(folder, None, ("z",), name="a-2.safetensors")
    weights = {"x": "a-1.safetensors", "y": "a-1.safetensors", "z": "a-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weights}))
    out = shown(capsys, folder)
    assert re.search(r"^tensors +3$", out, re.MULTILINE)
    assert "not told by its config; vertebra convert looks at the names of the tensors too" in out
    for config in (None, {"architecture": "vit_tiny_patch16_224"}):
        other = tmp_path / ("timm" if config else "bin")
        other.mkdir()
        torch.save({"x": torch.zeros(2)}, other / "pytorch_model.bin")
        if config:
            (other / "config.json").write_text(json.dumps(config))
        out = shown(capsys, other)
        assert "not a model of vertebra, but to be converted to one" in out
        assert "not counted: pytorch_model.bin has no header to count them by" in out
        assert ("timm_vit" in out) is bool(config)


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_family_told_by_the_config_is_the_one_that_converts(kind, tmp_path):
    folder = written(tmp_path / "m", {"model_type": kind})
    found = [c.name for c in converters().values() if c.recognises(open_checkpoint(folder))]
    assert found == [family_of({"model_type": kind})]


def test_names_that_are_nearly_right(tmp_path, capsys):
    for name, text in (
        ("HF-HUB:a/b", "repositories of the hub are written hf-hub:a/b"),
        ("https://huggingface.co/a/b", "repositories of the hub are written hf-hub:a/b"),
        ("qqqqqq/zzzzzz", "if it is a repository of the hub, write hf-hub:qqqqqq/zzzzzz"),
        ("local-dir:", "local-dir: needs the path of a folder"),
    ):
        assert main(["info", name]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert "Known:" not in error
    assert main(["info", "dna_ml"]) == 2
    names = capsys.readouterr().err.partition("Known: ")[2].rstrip(".\n").split(", ")
    assert len(names) == len(set(names)) > 20


def test_a_published_checkpoint_is_described_without_torch(tmp_path):
    folder = written(tmp_path / "m", {"model_type": "llama"})
    code = (
        "import sys; from vertebra.cli import main; main(['info', sys.argv[1]]); "
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    ran = subprocess.run([sys.executable, "-P", "-c", code, str(folder)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_a_model_of_text_is_named_as_a_backbone_takes_it():
    for name, place in (("m/text", "local-dir:m/text"), ("hf-hub:a/b", "hf-hub:a/b")):
        assert _use("language/lm", None, name)[0] == f"vertebra fit RECIPE --model.backbone {place}"
