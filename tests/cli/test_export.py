"""``vertebra export`` from the command line: words, files, and the bundled models."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import bundled_models
from vertebra.cli import main
from vertebra.domains import exporting
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import save_model
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

WRITE = ("dna_lm", "dna_elements", "mesh_generator", "vision_generator")
"""Bundled models that write token after token."""

ALONE = """\
import json, sys
import torch
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "vertebra":
            raise ImportError(name)
sys.meta_path.insert(0, Gone())
program = torch.export.load(sys.argv[1]).module()
facts = json.load(open(sys.argv[2]))["programs"]["forward"]
assert [i["name"] for i in facts["inputs"]] == ["ids"]
assert "vertebra" not in sys.modules
print(program(torch.tensor(json.loads(sys.argv[3])))[0].tolist())
"""


@pytest.fixture
def small(tmp_path, request):
    """A language model of a few thousand parameters, as a model directory."""
    spec = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=24)
    model = DNALanguageModel(create_backbone(getattr(request, "param", "illama_test")), spec)
    return model.eval(), str(save_model(model, tmp_path / "small"))


def fails(capsys, *args):
    assert main(["export", *map(str, args)]) == 2
    return capsys.readouterr().err.strip().removeprefix("vertebra: error: ")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pt2", "onnx"])
@pytest.mark.parametrize("name", sorted(bundled_models()))
def test_every_bundled_model_is_a_program(name, kind, tmp_path, capsys):
    if kind == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    steps = kind == "pt2" and name in WRITE
    assert main(["export", name, "-o", str(tmp_path / f"m.{kind}"), *["--step"] * steps]) == 0
    facts = json.loads((tmp_path / f"m.{kind}.json").read_text())
    programs = facts["programs"]
    begins = steps and name in ("mesh_generator", "vision_generator")  # something stands before the first token
    assert list(programs) == ["forward", *["begin"] * begins, *["step"] * steps]
    assert all(p["largest_difference"] <= 1e-4 for p in programs.values())
    assert all(i["shape"][0] == "batch" for p in programs.values() for i in p["inputs"])
    assert facts["model"] == name
    assert facts["config"]["spec"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f"m.{kind}.json", *(p["file"] for p in programs.values())]
    )
    for program in programs.values():  # no paths of this machine
        assert str(Path.cwd()).encode() not in (tmp_path / program["file"]).read_bytes()
    out = capsys.readouterr().out
    assert "largest difference from the model" in out
    assert f"wrote m.{kind}" in out
    if steps:  # what one call returns is what the next one takes
        step = programs["step"]
        inputs = {i["name"]: (i["shape"], i["dtype"]) for i in step["inputs"]}
        outputs = {o["name"]: (o["shape"], o["dtype"]) for o in step["outputs"]}
        assert {outputs[after] == inputs[before] for after, before in step["state"].items()} == {True}


def test_a_program_runs_where_this_package_is_not(small, tmp_path):
    model, folder = small
    assert main(["export", folder, "-o", str(tmp_path / "m.pt2")]) == 0
    ids = [[7, 8, 9, 10, 7], [10, 10, 8, 7, 9]]
    args = [str(tmp_path / "m.pt2"), str(tmp_path / "m.pt2.json"), json.dumps(ids)]
    done = subprocess.run([sys.executable, "-P", "-c", ALONE, *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        wanted = model(torch.tensor(ids))
    np.testing.assert_allclose(json.loads(done.stdout), wanted, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("small", ["hybrid_test"], indirect=True)
def test_onnx_runs_from_the_json_alone_and_decodes(small, tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, folder = small
    assert main(["export", folder, "-o", str(tmp_path / "m.onnx"), "--step", "--max-length", "8"]) == 0
    facts = json.loads((tmp_path / "m.onnx.json").read_text())
    step = facts["programs"]["step"]
    session = runtime.InferenceSession(str(tmp_path / step["file"]))
    assert [i.name for i in session.get_inputs()] == [i["name"] for i in step["inputs"]]
    assert session.get_inputs()[0].shape == ["batch", "length"]
    state = {
        i["name"]: np.zeros([2 if s == "batch" else s for s in i["shape"]], i["dtype"]) for i in step["inputs"][1:]
    }
    ids = np.array([[7, 8, 9, 10, 7, 7, 10, 8], [10, 10, 8, 7, 9, 9, 9, 8]])
    said = []
    for t in range(8):
        found = dict(
            zip(
                [o["name"] for o in step["outputs"]],
                session.run(None, {"ids": ids[:, t : t + 1], **state}),
                strict=True,
            )
        )
        said.append(found["logits"])
        state = {before: found[after] for after, before in step["state"].items()}
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids))
    np.testing.assert_allclose(np.concatenate(said, 1), wanted, atol=1e-5)
    assert facts["facts"]["tokens"][ids[0, 0]] == "A"


def test_a_program_that_differs_leaves_nothing(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporting, "TOLERANCE", -1.0)
    (tmp_path / "out").mkdir()
    text = fails(capsys, small[1], "-o", tmp_path / "out" / "m.pt2")
    assert text.startswith("export: forward.logits differs from the model by ")
    assert text.endswith("; nothing was written.")
    assert list((tmp_path / "out").iterdir()) == []


def test_words_of_what_cannot_be(small, tmp_path, capsys, monkeypatch):
    folder = small[1]
    assert "unknown model 'dna_ml'. Did you mean 'dna_lm'" in fails(capsys, "dna_ml", "-o", tmp_path / "m.pt2")
    assert fails(capsys, folder, "-o", "m.bin") == "export: the file must end in .pt2 or .onnx, got 'm.bin'."
    assert (
        fails(capsys, folder, "-o", "m.pt2", "--format", "onnx")
        == "export: --format onnx writes a file that ends in .onnx, got 'm.pt2'."
    )
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "m.pt2"
    assert (
        fails(capsys, folder, "-o", place) == f"export: {place} cannot be written (File exists); choose another place."
    )
    assert (
        fails(capsys, folder, "-o", tmp_path / "m.pt2", "--step", "--max-length", "0")
        == "export: --max-length must be at least 1, got 0."
    )
    assert (
        fails(capsys, "vision_shapes", "-o", tmp_path / "m.pt2", "--step")
        == "export: ImageClassifier has no step, it sees an image whole; leave --step out."
    )
    assert "'-o/--output' is" in (text := fails(capsys, folder)) or "required: -o/--output" in text
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_onnx_names_its_extra(package, small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(exporting, "find_spec", lambda name: None if name == package else object())
    assert fails(capsys, small[1], "-o", tmp_path / "m.onnx") == (
        f"export to .onnx needs the package '{package}'; install it with: pip install 'vertebra[onnx]'"
    )


def test_the_format_gives_the_ending(small, tmp_path):
    assert main(["export", small[1], "-o", str(tmp_path / "m"), "--format", "pt2"]) == 0
    assert (tmp_path / "m.pt2").is_file()


@pytest.mark.slow
def test_both_kinds_keep_their_facts(small, tmp_path):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model, folder = small
    assert main(["export", folder, "-o", str(tmp_path / "m.pt2"), "--step"]) == 0
    assert main(["export", folder, "-o", str(tmp_path / "m.onnx")]) == 0
    facts = {kind: json.loads((tmp_path / f"m.{kind}.json").read_text()) for kind in ("pt2", "onnx")}
    assert list(facts["pt2"]["programs"]) == ["forward", "step"]
    assert list(facts["onnx"]["programs"]) == ["forward"]
    lengths = [found["programs"]["forward"]["axes"]["length"]["max"] for found in facts.values()]
    assert lengths == [model.spec.max_length] * 2


def test_a_tokenizer_comes_along_and_another_one_is_never_replaced(small, tmp_path, capsys):
    folder, out = Path(small[1]), tmp_path / "out"
    (folder / "tokenizer.json").write_text('{"model": {}}')
    (folder / "bpe.model").write_bytes(b"pieces")
    assert main(["export", str(folder), "-o", str(out / "m.pt2")]) == 0
    facts = json.loads((out / "m.pt2.json").read_text())
    assert facts["files"] == ["tokenizer.json", "bpe.model"]
    assert (out / "tokenizer.json").read_text() == '{"model": {}}'
    assert (out / "bpe.model").read_bytes() == b"pieces"
    assert "m.pt2.json, tokenizer.json, bpe.model to" in capsys.readouterr().out
    assert main(["export", str(folder), "-o", str(out / "again.pt2")]) == 0  # the same ones
    (out / "tokenizer.json").write_text("{}")
    assert fails(capsys, folder, "-o", out / "third.pt2") == (
        f"export: {out} has another tokenizer.json, which this model's would replace; choose another folder."
    )
    assert (out / "tokenizer.json").read_text() == "{}"
    assert not list(out.glob("third*"))


def test_help_does_not_import_torch():
    code = "import sys; from vertebra.cli import main; main(['export', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--max-length" in done.stdout
