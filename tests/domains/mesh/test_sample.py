"""The fabricated meshes and points."""

from collections import Counter

import numpy as np
import pytest
from scipy.spatial import cKDTree

from vertebra.domains.mesh import sample
from vertebra.domains.mesh.files import MeshFileError, read_mesh, read_shape
from vertebra.domains.mesh.geometry import quantized
from vertebra.domains.mesh.procedural import FAMILIES
from vertebra.tokenizers.mesh import canonical, quantize, same_faces


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    sample.write_sample(root)
    return root


def test_same_seed_same_bytes(folder, tmp_path):
    again = sample.write_sample(tmp_path / "again")
    assert len(again) == len(set(again)) == len([p for p in (tmp_path / "again").rglob("*") if p.is_file()])
    for path in again:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path / "again")).read_bytes()
    assert sum(path.stat().st_size for path in again) < 3e6
    other = {path.name: path.read_bytes() for path in sample.write_sample(tmp_path / "other", seed=1)}
    changed = [path for path in again if path.parent.name == "train" and other.get(path.name) != path.read_bytes()]
    assert len(changed) == sample.COUNTS["train"]


def test_shapes_come_in_all_formats_and_families(folder):
    for split, count in sample.COUNTS.items():
        files = sorted((folder / "shapes" / split).iterdir())
        assert Counter(f.stem.split("_")[0] for f in files) == dict.fromkeys(FAMILIES, count // len(FAMILIES))
        assert {f.suffix for f in files} == {".obj", ".ply", ".glb", ".stl", ".off"}
        drawn = [sample.draw(split, 0, int(f.stem.split("_")[1])) for f in files]
        for file, mesh in zip(files, drawn, strict=True):
            # The grid of the unit box: files keep float32, and a coordinate on a border of cells may fall either way.
            read = read_mesh(file)
            assert len(read.faces) == len(mesh.faces)
            np.testing.assert_allclose(read.bounds, mesh.bounds, atol=1e-6)
            welded = canonical(quantize(np.round(read.vertices, 6), 128), read.faces)
            assert same_faces(welded, canonical(quantize(mesh.vertices, 128), mesh.faces)), file.name


def test_scans_and_clouds_lie_on_their_truth(folder):
    names = sorted(path.stem for path in (folder / "truth").iterdir())
    scans, clouds = (sorted((folder / kind).iterdir()) for kind in ("scans", "clouds"))
    assert sorted(p.stem for p in scans + clouds) == names
    assert {p.suffix for p in scans} == {".ply", ".obj"}
    rng = np.random.default_rng(0)
    for path in scans + clouds:
        truth, shape = read_mesh(folder / "truth" / f"{path.stem}.obj"), read_shape(path)
        size = truth.extents.max()
        points, _ = sample.sample_surface(truth.vertices, truth.faces, 20_000, rng)
        assert len(quantized(truth, 128)[0].faces) == len(truth.faces)
        if path in scans:
            assert shape.mesh is not None
            assert len(shape.mesh.faces) >= 4000
            there = shape.mesh.vertices
        else:
            assert len(shape.points) == sample.POINTS
            assert (shape.normals is not None) == (path.suffix == ".npy")
            there = shape.points
        distance = cKDTree(points).query(there)[0] / size
        assert 0.001 < np.median(distance) < 0.01
        back = cKDTree(there).query(points)[0] / size
        assert np.percentile(back, 95) < 0.06


def test_damaged_meshes_are_bad_and_their_neighbours_good(folder):
    bad, good = [], {}
    for path in sorted((folder / "damaged").iterdir()):
        try:
            good[path.name] = len(read_mesh(path).faces)
        except MeshFileError as e:
            bad.append((path.name, e.rule))
    assert [name for name, _ in bad] == ["empty.obj", "nan.obj", "text.stl", "truncated.ply"]
    for (_, rule), word in zip(bad, ("empty", "NaN", "cut short or damaged", "damaged"), strict=True):
        assert word in rule
    assert good.keys() == {"good-house.glb", "good-table.obj", "too-large.ply"}
    assert good["too-large.ply"] >= 8000
    assert max(good["good-house.glb"], good["good-table.obj"]) <= 400
