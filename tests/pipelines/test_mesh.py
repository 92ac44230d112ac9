"""mesh/generate: every kind of file in and out, one mesh and many, what a run leaves, and every bad setting."""

import json
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.mesh import generation, metrics
from vertebra.domains.mesh.files import Shape, read_mesh, write_mesh
from vertebra.domains.mesh.generation import GeneratedMesh as Written
from vertebra.domains.mesh.geometry import CONDITION_SCALE, sample_surface
from vertebra.domains.mesh.model import MeshGenerator
from vertebra.domains.mesh.showing import show
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, DataError
from vertebra.pipelines import base, figures, mesh
from vertebra.pipelines.base import PipelineInterrupted, pipeline
from vertebra.tokenizers.mesh import canonical, make_mesh_tokenizer, quantize

BINS, POINTS = 16, 64
COMPARE = metrics.compare
PLACED = {"extents": (2.0, 1.0, 3.0), "offset": np.array([10.0, -4.0, 7.0])}


def made(buckets=(50, 100)):
    torch.manual_seed(1)
    spec = MeshSpec(
        tokenizer=make_mesh_tokenizer("amt", BINS).to_dict(),
        points=POINTS,
        max_faces=40,
        max_tokens=60,
        face_buckets=buckets,
    )
    encoder = {"latents": 4, "layers": 0, "heads": 2}
    model = MeshGenerator(create_backbone("illama_test", causal=True), spec, encoder=encoder).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # so that shapes tell in an untrained model, and meshes come to an end
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(autouse=True)
def _uncompared(monkeypatch):
    """Draw no 100,000 points a mesh to find its edges; one test does."""
    monkeypatch.setattr(metrics, "compare", lambda output, truth: {"chamfer": 0.25, "edge_chamfer": float("nan")})


@pytest.fixture
def unseen(monkeypatch):
    """Draw no pictures."""
    monkeypatch.setattr(mesh._GenerateWriter, "_report", lambda *_: None)
    monkeypatch.setattr(mesh._GenerateWriter, "_figure", lambda _: None)
    monkeypatch.setattr(figures, "png_bytes", lambda figure: b"")


@pytest.fixture
def boxes(monkeypatch):
    """A model that writes the box around what it is shown, and a list of what that was."""
    seen = []

    def write(model, points, strategy, **options):
        seen.append((points, options))
        return [_box(row[:, :3].double().numpy() / CONDITION_SCALE) for row in points]

    monkeypatch.setattr(generation, "generate_best", write)
    return seen


def _box(points):
    low, high = points.min(0), points.max(0)
    box = trimesh.creation.box(bounds=[low, high])
    return Written(canonical(quantize(box.vertices, BINS), box.faces), 60, -1.0, True, 12)


def placed():
    solid = trimesh.creation.box(PLACED["extents"])
    solid.vertices += PLACED["offset"]
    return solid


def cloud(count=300, seed=0):
    solid = placed()
    return sample_surface(solid.vertices, solid.faces, count, np.random.default_rng(seed))


def write_inputs(folder):
    """The same box in every format that is read."""
    folder.mkdir()
    solid, (points, normals) = placed(), cloud()
    for ending_ in ("obj", "glb", "ply", "stl", "off"):
        write_mesh(solid, folder / f"{ending_}.{ending_}")
    for name, data in solid.export(file_type="gltf").items():
        (folder / name).write_bytes(data)
    np.save(folder / "npy.npy", np.concatenate([points, normals], axis=1).astype(np.float32))
    np.savez(folder / "npz.npz", points=points)
    header = f"ply\nformat ascii 1.0\nelement vertex {len(points)}\n"
    header += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    (folder / "points.ply").write_text(header + "\n".join(" ".join(map(str, row)) for row in points) + "\n")
    return ["glb", "model", "npy", "npz", "obj", "off", "ply", "points", "stl"]


def shapes(count=3):
    """Different bodies as values."""
    bodies = [
        trimesh.creation.icosphere(1),
        placed(),
        trimesh.creation.cone(1.0, 2.0),
        trimesh.creation.annulus(1, 2, 1),
    ]
    return bodies[:count]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def same(a, b):
    np.testing.assert_array_equal(a.value.vertices, b.value.vertices)
    np.testing.assert_array_equal(a.value.faces, b.value.faces)


def network(page):
    """What a page loads from elsewhere; base64 may hold anything."""
    bare = re.sub(r'"[A-Za-z0-9+/]{12,}=*"', '""', re.sub(r'"data:[^"]*"', '"data:"', page))
    return re.search(
        r'https?:|//[a-z]|url\(|@import|fetch\(|XMLHttpRequest|import\(|\bsrc="(?!data:")|\bhref="(?!#)', bare
    )


def summary_of(out):
    return json.loads(out.read_text(), parse_constant=pytest.fail)  # JSON knows no NaN


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("up", ["y", "z"])
@pytest.mark.parametrize("form", ["obj", "glb", "ply", "stl", "off"])
def test_all_formats_come_back_in_place(form, up, model, boxes, unseen, tmp_path):
    expected = write_inputs(tmp_path / "in")
    out = tmp_path / "out.json"
    result = pipeline("mesh/generate", model, format=form, up=up).run([tmp_path / "in"], out)
    assert (result.good, result.bad) == (9, 0)
    summary = summary_of(out)
    assert [facts["name"] for facts in summary["meshes"]] == expected
    files = [facts["file"] for facts in summary["meshes"]]
    assert files == [f"out/{n:04}-{name}.{form}" for n, name in enumerate(expected, start=1)]
    assert names(tmp_path / "out") == [file.removeprefix("out/") for file in files]
    cell = 3 / BINS
    for file in files:
        found = read_mesh(tmp_path / file)
        assert len(found.faces) == 12
        np.testing.assert_allclose(found.bounds, placed().bounds, atol=cell / 2 + 0.02)  # 0.02: the points' own box
    for points, _ in boxes:  # and the model saw it upright
        sides = np.ptp(points[:, :, :3].numpy(), axis=1)
        order = [0, 1, 2] if up == "y" else [0, 2, 1]
        expected_sides = np.array(PLACED["extents"])[order] / 3 * CONDITION_SCALE
        np.testing.assert_allclose(sides, np.broadcast_to(expected_sides, sides.shape), atol=0.02)


def test_one_shape_to_one_mesh_with_metrics_pictures_and_report(model, tmp_path, monkeypatch, capsys):
    compared = []

    def compare(output, truth):
        compared.append((output, truth, COMPARE(output, truth)))
        return compared[0][2]

    monkeypatch.setattr(metrics, "compare", compare)
    folder = save_model(model, tmp_path / "model")
    write_mesh(placed(), tmp_path / "a box.obj")
    out = tmp_path / "new" / "out.glb"
    arguments = ["-o", str(out), "--model", str(folder), "--seed", "2", "--faces", "30"]
    assert main(["run", "mesh/generate", str(tmp_path / "a box.obj"), *arguments]) == 0
    assert names(out.parent) == ["out.glb", "out.glb.html", "out.glb.json", "out.glb.png"]
    assert capsys.readouterr().out.startswith(f"1 records done; wrote {out}, ")
    found, summary = read_mesh(out), summary_of(out.with_name("out.glb.json"))
    (facts,) = summary["meshes"]
    assert "file" not in facts
    assert (facts["name"], facts["input"]) == ("a box", str(tmp_path / "a box.obj"))
    assert (summary["pipeline"], summary["model"], summary["seed"]) == ("mesh/generate", str(folder), 2)
    assert (summary["candidates"], summary["method"]) == (4, "greedy")
    assert summary["tokenizer"] == {"tokenizer": "mesh_amt.AMTTokenizer", "bins": BINS, "up": "y"}
    assert (facts["faces"], facts["vertices"]) == (len(found.faces), len(found.vertices))
    assert 0 < facts["tokens"] <= 60
    assert facts["input_faces"] == 12
    ((output, truth, expected),) = compared
    size = np.ptp(truth.vertices, axis=0).max() / 3  # in shares of the longest side
    np.testing.assert_allclose(output.bounds, found.bounds * size, atol=1e-5)
    np.testing.assert_allclose(truth.bounds, placed().bounds * size, atol=1e-5)
    for name, value in expected.items():
        assert facts[name] == (None if np.isnan(value) else pytest.approx(value, abs=1e-6)), name
    for name, value in metrics.describe(found).items():
        assert facts[name] == pytest.approx(value, abs=1e-6), name
    assert out.with_name("out.glb.png").read_bytes().startswith(b"\x89PNG")
    page = out.with_name("out.glb.html").read_text()
    assert page.count('<figure class="mesh-viewer">') == 1
    assert "<h1>mesh/generate</h1>" in page
    assert not network(page)


def test_several_shapes_to_a_folder(model, tmp_path):
    write_inputs(tmp_path / "in")
    (tmp_path / "in" / "deep").mkdir()
    write_mesh(shapes(3)[2], tmp_path / "in" / "deep" / "a cone!.stl")
    out = tmp_path / "out.json"
    work = pipeline("mesh/generate", model, candidates=1)
    result = work.run([tmp_path / "in" / "off.off", tmp_path / "in" / "deep", tmp_path / "in" / "npy.npy"], out)
    assert str(result).startswith(f"3 records done; wrote {out}, {out}.png")
    assert names(tmp_path) == ["in", "out", "out.json", "out.json.html", "out.json.png"]
    assert names(tmp_path / "out") == ["0001-off.obj", "0002-a_cone_.obj", "0003-npy.obj"]
    meshes = summary_of(out)["meshes"]
    assert [facts["name"] for facts in meshes] == ["off", "a cone!", "npy"]
    assert "input_points" in meshes[2]
    for facts in meshes:
        found = read_mesh(tmp_path / facts["file"])
        assert len(found.faces) == facts["faces"]
    page = (tmp_path / "out.json.html").read_text()
    assert page.count('<figure class="mesh-viewer">') == 3
    assert not network(page)


def test_a_mesh_alone_is_for_one_input(model, tmp_path):
    for name in ("a.obj", "b.obj"):
        write_mesh(placed(), tmp_path / name)
    text = (
        r"^mesh/generate: all\.ply holds one mesh, and there are several inputs; name a \.json, whose folder all/ gets "
        r"them all\.$"
    )
    with pytest.raises(ConfigError, match=text):
        pipeline("mesh/generate", model).run([tmp_path / "a.obj", tmp_path / "b.obj"], tmp_path / "all.ply")
    with pytest.raises(ConfigError, match=r"the output must end in \.obj or .* or \.json, got 'all\.fbx'"):
        pipeline("mesh/generate", model).run([tmp_path / "a.obj"], tmp_path / "all.fbx")
    assert names(tmp_path) == ["a.obj", "b.obj"]


# ---------------------------------------------------------------- what cannot be used


def test_damaged_files_are_listed_and_the_others_done(model, boxes, unseen, tmp_path, capsys):
    folder, source = save_model(model, tmp_path / "model"), tmp_path / "in"
    source.mkdir()
    write_mesh(placed(), source / "a.obj")
    (source / "b.stl").write_text("This is not a mesh.\n")
    (source / "c.obj").write_bytes(b"")
    np.save(source / "d.npy", np.zeros((5, 4)))
    np.save(source / "e.npy", np.eye(3))  # too few for normals
    (source / "f.obj").write_text("v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n")  # no area
    write_mesh(placed(), source / "g.glb")
    (source / "notes.txt").write_text("not read")
    out = tmp_path / "out.json"
    assert main(["run", "mesh/generate", str(source), "-o", str(out), "--model", str(folder), "--quiet"]) == 3
    assert "2 records done, 5 bad (listed in " in capsys.readouterr().out
    assert names(tmp_path / "out") == ["0001-a.obj", "0002-g.obj"]
    lines = (tmp_path / "out.json.errors.jsonl").read_text().splitlines()
    bad = [json.loads(line) for line in lines]
    assert [facts["file"] for facts in bad] == [
        str(source / name) for name in ("b.stl", "c.obj", "d.npy", "e.npy", "f.obj")
    ]
    assert "the file is empty" in bad[1]["rule"]
    assert "(N, 3), or (N, 6)" in bad[2]["rule"]
    assert "at least 4 points are needed" in bad[3]["rule"]
    assert "must have an area" in bad[4]["rule"]
    assert all(facts["advice"] for facts in bad)


def test_a_damaged_file_alone_leaves_nothing(model, tmp_path):
    (tmp_path / "c.obj").write_bytes(b"")
    with pytest.raises(DataError, match=r"c\.obj: the file is empty; copy or export it again\.$"):
        pipeline("mesh/generate", model).run([tmp_path / "c.obj"], tmp_path / "out.obj")
    assert names(tmp_path) == ["c.obj"]


def test_a_shape_without_a_face_is_listed(model, unseen, tmp_path, monkeypatch):
    best = generation.generate_best

    def write(model, points, strategy, **options):
        made = best(model, points, strategy, **options)
        return [made[0], replace(made[1], mesh=canonical(np.empty((0, 3)), np.empty((0, 3)))), *made[2:]]

    monkeypatch.setattr(generation, "generate_best", write)
    for name in "abc":
        write_mesh(placed(), tmp_path / f"{name}.obj")
    result = pipeline("mesh/generate", model, candidates=1).run(
        [tmp_path / f"{name}.obj" for name in "abc"], tmp_path / "out.json"
    )
    assert (result.good, result.bad) == (2, 1)
    assert names(tmp_path / "out") == ["0001-a.obj", "0002-c.obj"]
    (facts,) = [json.loads(line) for line in (tmp_path / "out.json.errors.jsonl").read_text().splitlines()]
    assert (facts["record"], facts["rule"]) == ("b", "the model wrote no whole face that has an area")
    assert facts["advice"] == "try another --seed, more --candidates, or --method sample"


def test_a_limit_below_a_face_leaves_no_mesh(model):
    work = pipeline("mesh/generate", model, max_tokens=5)
    with pytest.raises(
        DataError, match=r"^record 'shape_1': the model wrote no whole face that has an area; try another --seed"
    ):
        work(placed())


# ---------------------------------------------------------------- clouds


def test_clouds_and_what_is_said_of_them(model, tmp_path):
    points, normals = cloud()
    np.save(tmp_path / "whole.npy", np.concatenate([points, normals], axis=1))
    np.save(tmp_path / "bare.npy", points)
    np.save(tmp_path / "few.npy", points[:40])
    out = tmp_path / "out.json"
    pipeline("mesh/generate", model).run([tmp_path / f"{n}.npy" for n in ("whole", "bare", "few")], out)
    whole, bare, few = summary_of(out)["meshes"]
    estimated = "Normals were estimated from neighbouring points."
    assert "notes" not in whole
    assert bare["notes"] == [estimated]
    assert few["notes"] == ["The cloud has 40 points, fewer than the 64 the model reads.", estimated]
    assert [facts["input_points"] for facts in (whole, bare, few)] == [300, 300, 40]
    assert all("edge_chamfer" not in facts and facts["chamfer"] > 0 for facts in (whole, bare, few))
    page = (tmp_path / "out.json.html").read_text()
    assert "<p>The cloud has 40 points, fewer than the 64 the model reads: few.</p>" in page
    assert "<p>Normals were estimated from neighbouring points: bare, few.</p>" in page


def test_values_in_python(model):
    points, normals = cloud()
    work = pipeline("mesh/generate", model, candidates=1)
    found = work([placed(), points, np.concatenate([points, normals], axis=1)])
    assert [one.name for one in found] == ["shape_1", "shape_2", "shape_3"]
    for one in found:
        assert isinstance(one.value, trimesh.Trimesh)
        assert (one.value.bounds[0] >= placed().bounds.min(0) - 2).all()
    alone = work(placed())
    same(alone, found[0])
    assert (
        repr(alone)
        == f"GeneratedMesh(shape_1 = {len(alone.value.vertices)} vertices, {len(alone.value.faces)} faces; )"
    )
    for wrong, what in ((3, "int"), (np.zeros((4, 2)), r"ndarray of shape \(4, 2\)"), (np.zeros((0, 3)), "ndarray")):
        text = (
            rf"^mesh/generate: takes a path, a trimesh.Trimesh, or points as an array \(N, 3\) or \(N, 6\), got {what}"
        )
        with pytest.raises(DataError, match=text):
            work(wrong)


def test_a_result_saves_and_draws_itself(model, tmp_path):
    one = pipeline("mesh/generate", model, candidates=1)(placed())
    for form in mesh.MESHES:
        one.save(tmp_path / f"a{form}")
        np.testing.assert_allclose(read_mesh(tmp_path / f"a{form}").bounds, one.value.bounds, atol=1e-5)
    facts = json.loads(one.save(tmp_path / "a.json").read_text())
    assert facts["value"]["faces"] == one.value.faces.tolist()
    assert facts["tokens"] == one.details["tokens"]
    assert one.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"must end in \.json, \.csv or \.png, got 'a\.fbx'"):
        one.save(tmp_path / "a.fbx")


def test_pictures_stand_upright(model, boxes):
    one = pipeline("mesh/generate", model, up="z")(placed())
    assert one.value.extents[2] == one.value.extents.max()
    for panel in one.panels():
        assert np.ptp(np.asarray(panel.vertices), axis=0).argmax() == 1
    assert [panel.label for panel in one.panels()] == ["input", "output"]


def test_large_inputs_are_light_in_the_report():
    large = trimesh.creation.icosphere(6)  # 81,920 faces
    panel = mesh.input_panel(Shape(large), light=True)
    assert (panel.faces, len(panel.vertices)) == (None, 20_000)
    assert panel.note == "of 81,920 faces"
    assert len(mesh.input_panel(Shape(large)).faces) == 81_920
    assert len(mesh.input_panel(Shape(points=np.zeros((60_000, 3)))).vertices) == 20_000


def test_what_cannot_be_compared_is_null(model):
    one = pipeline("mesh/generate", model, candidates=1)(placed())
    assert one.details["edge_chamfer"] is None
    json.loads(one.to_json(), parse_constant=pytest.fail)


# ---------------------------------------------------------------- choices


@pytest.mark.parametrize(
    "options", [{"candidates": 1}, {"candidates": 3}, {"method": "sample"}, {"method": "beam", "beams": 2}]
)
def test_a_mesh_depends_on_shape_and_seed_alone(options, model):
    def write(values, seed=3, **more):
        return pipeline("mesh/generate", model, seed=seed, max_tokens=24, **options, **more)(values)

    together = write(shapes(3))
    assert len({one.value.vertices.tobytes() for one in together}) > 1
    for a, b in zip(together, write(shapes(3)[::-1], batch_size=2)[::-1], strict=True):
        same(a, b)
    same(together[2], write(shapes(3)[2]))
    other = write(shapes(3), seed=4)
    assert any(a.value.vertices.tobytes() != b.value.vertices.tobytes() for a, b in zip(together, other, strict=True))


def test_the_kept_candidate_is_never_farther_than_the_first(model):
    def distance(shape, one):
        shown = show(Shape(shape), POINTS, np.random.default_rng(0))
        vertices = shown.placement.into(one.value.vertices)
        drawn, _ = sample_surface(vertices, one.value.faces, 2048, np.random.default_rng(0))
        return metrics.chamfer(drawn, shown.condition[:, :3] / CONDITION_SCALE)

    first, best = (pipeline("mesh/generate", model, candidates=n)(shapes(4)) for n in (1, 8))
    nearer = 0
    for shape, a, b in zip(shapes(4), first, best, strict=True):
        assert a.details["finished"]
        assert b.details["finished"]
        assert distance(shape, b) <= distance(shape, a) + 1e-9
        nearer += distance(shape, b) < 0.95 * distance(shape, a)
    assert nearer > 0


def test_the_number_of_faces_is_told(model, boxes):
    for faces in (None, 30):
        pipeline("mesh/generate", model, faces=faces)(shapes(2))
    assert [options["faces"] for _, options in boxes] == [None, [30, 30]]


def test_what_is_told_of_faces_changes_the_mesh(model):
    found = [pipeline("mesh/generate", model, faces=n, candidates=1)(placed()) for n in (None, 30, 60, 1000)]
    assert len({one.value.vertices.tobytes() for one in found}) > 2


def test_batches_keep_to_the_positions_that_fit(model, boxes):
    size = model.prefix_length + 60
    for options, rows in (({"candidates": 1}, 4), ({"candidates": 3}, 2), ({"method": "beam", "beams": 4}, 1)):
        boxes.clear()
        pipeline("mesh/generate", model, batch_tokens=4 * size, **options)(shapes(4))
        assert [len(points) for points, _ in boxes] == [rows] * (4 // rows)


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("options", [{"candidates": 1}, {"candidates": 3}, {"method": "beam", "beams": 2}])
def test_progress_is_told_in_both_rounds(options, model, unseen, tmp_path, monkeypatch):
    told = []

    @contextmanager
    def bar(title, total, unit, hourly, show):
        told.append((total, unit))
        yield told.append

    monkeypatch.setattr(base, "progress_bar", bar)
    for name in "abc":
        write_mesh(placed(), tmp_path / f"{name}.obj")
    pipeline("mesh/generate", model, batch_size=2, **options).run(
        [tmp_path / f"{n}.obj" for n in "abc"], tmp_path / "o.json"
    )
    total, *steps = told
    assert total == (3.0, "shapes")
    assert min(steps) >= 0
    assert sum(steps) == pytest.approx(3.0)
    if options == {"candidates": 3}:
        so_far = np.cumsum(steps)
        assert ((so_far > 0) & (so_far < 1 - 1e-9)).sum() > 5
        assert ((so_far > 1 + 1e-9) & (so_far < 2 - 1e-9)).sum() > 5


def test_a_run_to_the_same_output_replaces_the_earlier_one_alone(model, boxes, unseen, tmp_path):
    source = tmp_path / "in"
    write_inputs(source)
    out = source / "out.json"  # beside the inputs
    pipeline("mesh/generate", model).run([source], out)
    first = names(source / "out")
    assert len(first) == 9
    pipeline("mesh/generate", model).run([source], out)  # does not read what it wrote
    assert names(source / "out") == first
    pipeline("mesh/generate", model, format="stl").run([source / "obj.obj", source / "off.off"], out)
    assert names(source / "out") == ["0001-obj.stl", "0002-off.stl"]
    (source / "out" / "mine.txt").write_text("mine")
    text = r"^output: the folder '.*out', where files go, holds others already, such as 'mine\.txt'; choose another"
    with pytest.raises(ConfigError, match=text):
        pipeline("mesh/generate", model).run([source / "obj.obj"], out)
    with pytest.raises(ConfigError, match=r"^output: the folder '.*in', where files go, holds others already"):
        pipeline("mesh/generate", model).run([source], tmp_path / "in.json")
    assert names(source / "out") == ["0001-obj.stl", "0002-off.stl", "mine.txt"]


def test_an_interruption_keeps_what_is_finished(model, tmp_path, monkeypatch):
    best, calls = generation.generate_best, []

    def stopping(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return best(*args, **options)

    monkeypatch.setattr(generation, "generate_best", stopping)
    for name in "abc":
        write_mesh(placed(), tmp_path / f"{name}.obj")
    inputs, out = [tmp_path / f"{name}.obj" for name in "abc"], tmp_path / "o.json"
    work = pipeline("mesh/generate", model, batch_size=1, candidates=1)
    with pytest.raises(PipelineInterrupted, match="the 2 finished results are in"):
        work.run(inputs, out)
    assert [n for n in names(tmp_path) if n.startswith("o")] == [
        "o", "o.json.html.partial", "o.json.partial", "o.json.png.partial",
    ]  # fmt: skip
    assert names(tmp_path / "o") == ["0001-a.obj.partial", "0002-b.obj.partial"]
    assert len(summary_of(tmp_path / "o.json.partial")["meshes"]) == 2
    work.run(inputs, out)
    assert names(tmp_path / "o") == ["0001-a.obj", "0002-b.obj", "0003-c.obj"]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"method": "best"}, r"^mesh/generate: method must be greedy, sample or beam, got 'best'\.$"),
        ({"candidates": 0}, r"^mesh/generate: candidates must be at least 1, got 0\.$"),
        ({"seed": -1}, r"^mesh/generate: seed must be at least 0, got -1\.$"),
        ({"faces": 0}, r"^mesh/generate: faces must be at least 1, got 0\.$"),
        ({"max_tokens": 0}, r"max_tokens must be between 1 and 60, the most this model was trained with, got 0\.$"),
        ({"max_tokens": 1061}, r"max_tokens must be between 1 and 60, .*, got 1,061\.$"),
        ({"temperature": 0.0}, r"^decoding: temperature must be above 0, got 0\.0\.$"),
        ({"up": "x"}, r"^mesh/generate: up must be y or z, got 'x'\.$"),
        ({"format": "fbx"}, r"^mesh/generate: format must be one of obj, glb, ply, stl, off, got 'fbx'\.$"),
        ({"batch_size": 0}, r"^mesh/generate: batch_size must be at least 1, got 0\.$"),
        ({"count": 2}, r"^mesh/generate: no option 'count'\."),
    ],
)
def test_impossible_settings(model, options, text):
    with pytest.raises(ConfigError, match=text):
        pipeline("mesh/generate", model, **options)


def test_models_that_cannot_be_told_faces_say_so():
    with pytest.raises(ConfigError, match=r"^faces: this model was trained without a face count; leave it out"):
        pipeline("mesh/generate", made(buckets=()), faces=30)
    assert pipeline("mesh/generate", made(buckets=()), format=".glb").format == "glb"
