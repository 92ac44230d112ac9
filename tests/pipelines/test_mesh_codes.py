"""The pipelines of meshes with a model whose tokens are codes."""

import json

import pytest
import torch
import trimesh

from vertebra.backbones.base import create_backbone
from vertebra.backbones.opt import OPTConfig
from vertebra.cli import main
from vertebra.domains.mesh.codes import MeshCodeGenerator
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError
from vertebra.pipelines.base import pipeline
from vertebra.tokenizers.mesh import CoordinateTokenizer

BERT = OPTConfig(
    dim=16, depth=1, heads=2, hidden=24, causal=False, norm_first=False, activation="gelu", positions="none"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    spec = MeshSpec(tokenizer=CoordinateTokenizer(16).to_dict(), points=64, max_faces=6, max_tokens=54, place="lower")
    encoder = {"width": 16, "heads": 2, "layers": 1, "latents": 3, "frequencies": 2, "bottleneck": 4}
    made = MeshCodeGenerator(
        create_backbone("opt_test"), spec, decoder=BERT, encoder=encoder, codebook_size=20, code_dim=8
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made.eval()


def test_meshes_are_written_where_the_input_lay(model, tmp_path, capsys):
    box = trimesh.creation.box((2.0, 1.0, 3.0))
    box.vertices += (10.0, -4.0, 7.0)
    box.export(tmp_path / "box.ply")
    save_model(model, tmp_path / "model")
    out = tmp_path / "out.obj"
    args = ["--model", str(tmp_path / "model"), "--method", "sample", "--candidates", "2"]
    assert main(["run", "mesh/generate", str(tmp_path / "box.ply"), "-o", str(out), *args]) == 0
    assert "1 records done" in capsys.readouterr().out
    mesh = trimesh.load(out, force="mesh")
    assert 1 <= len(mesh.faces) <= 6
    assert abs(mesh.vertices - (10.0, -4.0, 7.0)).max() <= 1.5 + 1e-6  # the box around it has sides of 3
    told = json.loads((tmp_path / "out.obj.json").read_text())
    assert told["tokenizer"] == {"name": "codes", "codes": 20, "levels": 3, "bins": 16}


def test_meshes_cannot_be_turned_into_its_codes(model):
    with pytest.raises(ConfigError, match=r"codes that only its decoder is published for; name another --tokenizer"):
        pipeline("mesh/tokenize", model=model)
    assert pipeline("mesh/tokenize", model=model, tokenizer="amt").tokenizer.bins == 16
