"""mesh/tokenize: tokens of meshes and meshes of tokens, exact and in place; figures, limits, damaged files."""

import json

import numpy as np
import pytest
import torch
import trimesh

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.mesh.files import read_mesh, write_mesh
from vertebra.domains.mesh.geometry import Placement, quantized
from vertebra.domains.mesh.model import MeshGenerator
from vertebra.domains.mesh.procedural import draw
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.pipelines.base import pipeline
from vertebra.tokenizers.mesh import MESH_TOKENIZERS, canonical, make_mesh_tokenizer, quantize, same_faces

FORMS = ("obj", "ply", "glb", "stl", "off")


def made(max_faces=200, bins=32):
    torch.manual_seed(0)
    spec = MeshSpec(tokenizer=make_mesh_tokenizer("amt", bins).to_dict(), points=64, max_faces=max_faces, max_tokens=60)
    encoder = {"latents": 4, "layers": 0, "heads": 2}
    return MeshGenerator(create_backbone("illama_test", causal=True), spec, encoder=encoder).eval()


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Shapes of every family in every format, somewhere in a room."""
    folder = tmp_path_factory.mktemp("sample")
    for i in range(6):
        mesh = draw("test", 0, i)
        mesh.vertices = mesh.vertices * (0.5 + i) + [i, -2 * i, 30]
        write_mesh(mesh, folder / f"{i}.{FORMS[i % 5]}")
    return folder


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def loaded(path):
    return json.loads(path.read_text())


def upright(points, up):
    """Turn +Z up to +Y up, around X."""
    return points if up == "y" else np.asarray(points) @ [[1, 0, 0], [0, 0, -1], [0, 1, 0]]


def on_grid(mesh, placement, bins):
    """A mesh that came back, on the grid of the one it was made of."""
    return canonical(quantize(placement.into(mesh.vertices), bins), mesh.faces)


def ball():
    return trimesh.creation.icosphere(3)  # 1,280 faces


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("up", ["y", "z"])
@pytest.mark.parametrize("name", MESH_TOKENIZERS)
def test_meshes_come_back_exactly_and_in_place(name, up, model, sample, tmp_path):
    bins = 64
    tokens, back = tmp_path / "tokens.npz", tmp_path / "back.json"
    result = pipeline("mesh/tokenize", model, tokenizer=name, bins=bins, up=up).run([sample], tokens)
    assert (result.good, result.bad) == (6, 0)
    assert names(tmp_path) == ["tokens.npz", "tokens.npz.json"]
    form = FORMS[list(MESH_TOKENIZERS).index(name)]
    assert pipeline("mesh/tokenize", model, format=form, up=up).run([tokens], back).good == 6
    listed = loaded(back)["meshes"]
    assert [facts["file"] for facts in listed] == [f"back/000{i + 1}-{i}.{form}" for i in range(6)]
    for i, facts in enumerate(listed):
        source, found = read_mesh(sample / f"{i}.{FORMS[i % 5]}"), read_mesh(tmp_path / facts["file"])
        for mesh in (source, found):
            mesh.vertices = upright(mesh.vertices, up)
        expected, placement = quantized(source, bins)
        step = placement.scale / bins
        assert same_faces(on_grid(found, placement, bins), expected), i
        assert len(found.faces) == facts["faces"] == len(expected.faces)
        moved = (placement.into(found.vertices) + 0.5) * bins - 0.5  # vertices are at centres of cells
        np.testing.assert_allclose(moved, np.round(moved), atol=2e-3)
        np.testing.assert_allclose(found.bounds, source.bounds, atol=step / 2 + 1e-4)


def test_what_is_written_and_its_figures(model, sample, tmp_path):
    out = tmp_path / "new" / "tokens.npz"
    pipeline("mesh/tokenize", model).run([sample], out)
    summary, tokenizer = loaded(out.with_name("tokens.npz.json")), make_mesh_tokenizer("amt", 32)
    meshes = [read_mesh(sample / f"{i}.{FORMS[i % 5]}") for i in range(6)]
    grids = [quantized(mesh, 32) for mesh in meshes]
    ids = [tokenizer.encode(grid) for grid, _ in grids]
    faces = [len(grid.faces) for grid, _ in grids]
    assert summary["pipeline"] == "mesh/tokenize"
    assert summary["tokenizer"] == tokenizer.to_dict()
    assert (summary["tokens"], summary["faces"]) == (sum(map(len, ids)), sum(faces))
    assert summary["ratio"] == pytest.approx(sum(map(len, ids)) / sum(faces) / 9, abs=1e-6)
    ratios = [len(row) / 9 / count for row, count in zip(ids, faces, strict=True)]
    assert summary["ratio_mean"] == pytest.approx(np.mean(ratios), abs=1e-6)
    assert summary["ratio"] < 0.8  # adjacent faces share vertices
    for i, facts in enumerate(summary["meshes"]):
        assert (facts["name"], facts["input"]) == (str(i), str(sample / f"{i}.{FORMS[i % 5]}"))
        assert (facts["tokens"], facts["faces"], facts["input_faces"]) == (len(ids[i]), faces[i], len(meshes[i].faces))
        assert facts["ratio"] == pytest.approx(ratios[i], abs=1e-6)
    with np.load(out, allow_pickle=False) as data:
        np.testing.assert_array_equal(data["ids"], np.concatenate(ids))
        assert data["ids"].dtype == np.int32
        np.testing.assert_array_equal(data["ends"], np.cumsum([len(row) for row in ids]))
        assert data["names"].tolist() == [str(i) for i in range(6)]
        np.testing.assert_allclose(data["centres"], [placement.centre for _, placement in grids])
        np.testing.assert_allclose(data["scales"], [placement.scale for _, placement in grids])


def test_the_plain_form_has_the_ratio_one(model, sample, tmp_path):
    pipeline("mesh/tokenize", model, tokenizer="plain").run([sample], tmp_path / "a.npz")
    summary = loaded(tmp_path / "a.npz.json")
    assert summary["ratio"] == summary["ratio_mean"] == 1
    assert {facts["ratio"] for facts in summary["meshes"]} == {1}
    assert summary["tokenizer"] == {"tokenizer": "mesh.CoordinateTokenizer", "bins": 32}  # the model's bins


@pytest.mark.parametrize("form", FORMS)
def test_one_mesh_there_and_back(form, model, sample, tmp_path, capsys):
    folder = save_model(model, tmp_path / "model")
    tokens, out = tmp_path / "t.npz", tmp_path / f"back.{form}"
    shared = ["--model", str(folder), "--quiet"]
    assert main(["run", "mesh/tokenize", str(sample / "2.glb"), "-o", str(tokens), *shared]) == 0
    assert main(["run", "mesh/tokenize", str(tokens), "-o", str(out), *shared]) == 0
    assert capsys.readouterr().out == (
        f"1 records done; wrote {tokens}, {tokens}.json\n1 records done; wrote {out}, {out}.json\n"
    )
    expected, placement = quantized(read_mesh(sample / "2.glb"), 32)
    assert same_faces(on_grid(read_mesh(out), placement, 32), expected)
    (facts,) = loaded(tmp_path / f"back.{form}.json")["meshes"]
    assert facts["faces"] == len(expected.faces)
    assert facts["ratio"] == pytest.approx(facts["tokens"] / 9 / facts["faces"], abs=1e-6)


def test_several_token_files_to_one_folder(model, sample, tmp_path):
    for n, files in enumerate((["0.obj"], ["1.ply", "2.glb"])):
        pipeline("mesh/tokenize", model).run([sample / f for f in files], tmp_path / f"{n}.npz")
    out = tmp_path / "all.json"
    pipeline("mesh/tokenize", model).run([tmp_path / "0.npz", tmp_path / "1.npz"], out)
    assert names(tmp_path / "all") == ["0001-0.obj", "0002-1.obj", "0003-2.obj"]
    pipeline("mesh/tokenize", model).run([tmp_path / "0.npz"], out)
    assert names(tmp_path / "all") == ["0001-0.obj"]


def test_token_files_remember_their_tokenizer(model, sample, tmp_path):
    pipeline("mesh/tokenize", model, tokenizer="bpt", bins=128).run([sample / "0.obj"], tmp_path / "a.npz")
    (one,) = pipeline("mesh/tokenize", made(bins=16))(tmp_path / "a.npz")
    expected, placement = quantized(read_mesh(sample / "0.obj"), 128)
    assert same_faces(on_grid(one.value, placement, 128), expected)


# ---------------------------------------------------------------- in Python


def test_values_in_python(model, sample, tmp_path):
    mesh = draw("test", 0, 1)
    one = pipeline("mesh/tokenize", model)(mesh)
    grid, placement = quantized(mesh, 32)
    np.testing.assert_array_equal(one.value, make_mesh_tokenizer("amt", 32).encode(grid))
    assert (one.name, one.details["faces"], one.details["tokens"]) == ("mesh_1", len(grid.faces), len(one.value))
    assert Placement(one.details["centre"], one.details["scale"]) == placement
    json.loads(one.to_json())
    with pytest.raises(DataError, match=r"^mesh_1: is a point cloud and has no faces to write; give a mesh\.$"):
        pipeline("mesh/tokenize", model)(np.eye(3))
    with pytest.raises(DataError, match=r"^mesh/tokenize: takes a path, a trimesh.Trimesh, or points .* got str\.$"):
        pipeline("mesh/tokenize", model)("none.obj")


def test_what_was_turned_back_saves_and_draws_itself(model, sample, tmp_path):
    pipeline("mesh/tokenize", model).run([sample / "0.obj"], tmp_path / "a.npz")
    (one,) = pipeline("mesh/tokenize", model)(tmp_path / "a.npz")
    found = read_mesh(one.save(tmp_path / "back.ply"))
    np.testing.assert_allclose(found.bounds, one.value.bounds, atol=1e-5)
    assert one.save(tmp_path / "back.png").read_bytes().startswith(b"\x89PNG")
    assert repr(one).startswith(f"GeneratedMesh(0 = {len(one.value.vertices):,} vertices, ")
    assert [panel.label for panel in one.panels()] == ["mesh"]


# ---------------------------------------------------------------- limits


def test_meshes_that_are_too_large_are_refused_or_decimated(model, tmp_path):
    for name, mesh in (("ball", ball()), ("box", trimesh.creation.box())):
        write_mesh(mesh, tmp_path / f"{name}.obj")
    inputs, out = [tmp_path / "ball.obj", tmp_path / "box.obj"], tmp_path / "o.npz"
    result = pipeline("mesh/tokenize", model).run(inputs, out)
    assert (result.good, result.bad) == (1, 1)
    (facts,) = [json.loads(line) for line in (tmp_path / "o.npz.errors.jsonl").read_text().splitlines()]
    assert (facts["record"], facts["rule"]) == ("ball", "has 1,280 faces, more than max_faces=200")
    assert facts["advice"] == "pass --decimate to reduce it, or raise --max-faces"
    whole = pipeline("mesh/tokenize", model, max_faces=1280)(ball())
    assert whole.details["faces"] > 900
    pytest.importorskip("fast_simplification")
    result = pipeline("mesh/tokenize", model, decimate=True, max_faces=100).run(inputs, out)
    assert (result.good, result.bad) == (2, 0)
    assert not (tmp_path / "o.npz.errors.jsonl").exists()
    few, box = loaded(tmp_path / "o.npz.json")["meshes"]
    assert few["input_faces"] == 1280
    assert 80 <= few["faces"] <= 105
    assert (box["input_faces"], box["faces"]) == (12, 12)
    back = pipeline("mesh/tokenize", model)(out)[0].value
    np.testing.assert_allclose(np.linalg.norm(back.vertices, axis=1), 1, atol=0.1)  # still a ball, and in place


def test_nothing_left_on_the_grid(model):
    needle = trimesh.Trimesh([[0, 0, 0], [0.001, 0, 0], [1, 0.5, 0]], [[0, 1, 2]], process=False)
    with pytest.raises(DataError, match=r"a mesh must have at least one face, got none; leave it out\.$"):
        pipeline("mesh/tokenize", model)(needle)


# ---------------------------------------------------------------- files that do not fit


def test_directions_that_are_mixed_up(model, sample, tmp_path):
    tokens = tmp_path / "a.npz"
    pipeline("mesh/tokenize", model).run([sample / "0.obj", sample / "1.ply"], tokens)
    for inputs, out, text in (
        ([sample / "0.obj"], "b.obj", r"^mesh/tokenize: tokens are written as \.npz; let the output end in \.npz\.$"),
        (
            [tokens],
            "b.npz",
            r"a\.npz holds tokens already; to turn them back, let the output end in \.obj, .* or \.json\.$",
        ),
        ([tokens], "b.obj", r"^mesh/tokenize: the output holds one mesh, and the input has more; name a \.json\.$"),
        (
            [tokens, tokens],
            "b.obj",
            r"^mesh/tokenize: b\.obj holds one mesh, and there are several inputs; name a \.json",
        ),
        ([tokens], "b.csv", r"^mesh/tokenize: the output must end in \.npz or \.obj or .*, got 'b\.csv'"),
    ):
        with pytest.raises(ConfigError, match=text):
            pipeline("mesh/tokenize", model).run(inputs, tmp_path / out)
        assert names(tmp_path) == ["a.npz", "a.npz.json"]


def changed(path, **arrays):
    with np.load(path) as data:
        np.savez(path, **{**data, **arrays})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read as tokens of meshes"),
        (lambda p: p.write_text("tokens"), "cannot be read as tokens of meshes"),
        (lambda p: p.write_bytes(b""), "cannot be read as tokens of meshes"),
        (lambda p: changed(p, facts=np.frombuffer(b"{}", np.uint8)), "cannot be read as tokens of meshes"),
        (lambda p: changed(p, facts=np.frombuffer(b"[", np.uint8)), "cannot be read as tokens of meshes"),
        (lambda p: changed(p, ends=np.array([999, 20])), r"ends \[999, 20\] do not cut [\d,]+ tokens into sequences"),
        (lambda p: changed(p, scales=np.array([1.0])), "cannot be read as tokens of meshes"),
        (lambda p: changed(p, scales=np.array([1.0, np.nan])), "places that are not finite numbers"),
        (lambda p: changed(p, centres=np.zeros((2, 2))), "cannot be read as tokens of meshes"),
    ],
)
def test_damaged_token_files(damage, text, model, sample, tmp_path):
    path = tmp_path / "a.npz"
    pipeline("mesh/tokenize", model).run([sample / "0.obj", sample / "1.ply"], path)
    damage(path)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as tokens of meshes .*; write it again\.$") as caught:
        pipeline("mesh/tokenize", model).run([path], tmp_path / "b.json")
    assert caught.match(text)
    assert not (tmp_path / "b.json").exists()


def test_damaged_sequences_are_listed_and_the_others_turned_back(model, sample, tmp_path):
    path = tmp_path / "a.npz"
    pipeline("mesh/tokenize", model, tokenizer="plain").run([sample / f for f in ("0.obj", "1.ply", "2.glb")], path)
    with np.load(path) as data:
        ids, ends = data["ids"].copy(), data["ends"]
    ids[ends[0] + 4] = 999  # of the second
    ids[ends[1] :] = 0  # no face of the third has three corners
    changed(path, ids=ids)
    result = pipeline("mesh/tokenize", model).run([path], tmp_path / "b.json")
    assert (result.good, result.bad) == (1, 2)
    assert names(tmp_path / "b") == ["0001-0.obj"]
    bad = [json.loads(line) for line in (tmp_path / "b.json.errors.jsonl").read_text().splitlines()]
    assert [facts["record"] for facts in bad] == ["1", "2"]
    assert bad[0]["rule"] == "CoordinateTokenizer: token 999 cannot stand at position 4"
    assert bad[1]["rule"] == "its tokens hold no face"
    assert all(facts["advice"] for facts in bad)


def test_damaged_meshes_and_clouds_are_listed(model, sample, tmp_path, capsys):
    folder, source = save_model(model, tmp_path / "model"), tmp_path / "in"
    source.mkdir()
    write_mesh(draw("test", 0, 0), source / "a.obj")
    (source / "b.stl").write_text("This is not a mesh.\n")
    np.save(source / "c.npy", np.eye(3))
    np.savez(source / "d.npz", points=np.eye(3))
    write_mesh(draw("test", 0, 1), source / "e.obj")
    out = tmp_path / "o.npz"
    assert main(["run", "mesh/tokenize", str(source), "-o", str(out), "--model", str(folder), "--quiet"]) == 3
    assert "2 records done, 3 bad (listed in " in capsys.readouterr().out
    bad = [json.loads(line) for line in (tmp_path / "o.npz.errors.jsonl").read_text().splitlines()]
    assert [facts["file"] for facts in bad] == [str(source / name) for name in ("b.stl", "c.npy", "d.npz")]
    assert bad[1]["rule"] == bad[2]["rule"] == "is a point cloud and has no faces to write"
    assert [facts["name"] for facts in loaded(tmp_path / "o.npz.json")["meshes"]] == ["a", "e"]


def test_notes_of_files_are_kept(model, tmp_path):
    text = "v 0 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\nf 1 1 2\n"
    (tmp_path / "a.obj").write_text(text)
    pipeline("mesh/tokenize", model).run([tmp_path / "a.obj"], tmp_path / "o.npz")
    (facts,) = loaded(tmp_path / "o.npz.json")["meshes"]
    assert facts["notes"] == ["1 of 3 faces with two corners at the same place left out"]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"bins": 64}, ConfigError, r"^mesh/tokenize: bins=64 needs a tokenizer, the model's has 32; name one\.$"),
        ({"max_faces": 3}, ConfigError, r"^mesh/tokenize: max_faces must be at least 4, got 3\.$"),
        ({"up": "Z"}, ConfigError, r"^mesh/tokenize: up must be y or z, got 'Z'\.$"),
        (
            {"format": "npz"},
            ConfigError,
            r"^mesh/tokenize: format must be one of obj, glb, ply, stl, off, got 'npz'\.$",
        ),
        ({"tokenizer": "bpe"}, UnknownNameError, r"^unknown mesh tokenizer 'bpe'.* Known: "),
        ({"tokenizer": "plain", "bins": 2}, ConfigError, r"^mesh: bins must be between 4 and 1,048,576, got 2"),
        ({"seed": 1}, ConfigError, r"^mesh/tokenize: no option 'seed'\."),
    ],
)
def test_impossible_settings(model, options, error, text):
    with pytest.raises(error, match=text):
        pipeline("mesh/tokenize", model, **options)
    assert pipeline("mesh/tokenize", model, bins=32).tokenizer is model.tokenizer
