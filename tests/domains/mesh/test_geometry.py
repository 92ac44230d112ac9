import sys

import numpy as np
import pytest
import trimesh

from vertebra.domains.mesh.geometry import (
    CONDITION_SCALE,
    Placement,
    condition,
    decimate,
    estimate_normals,
    quantized,
    sample_surface,
    to_trimesh,
    weld,
)
from vertebra.errors import ConfigError, DataError, MissingExtraError
from vertebra.tokenizers.mesh import QuantizedMesh, same_faces


def plain(vertices, faces):
    return trimesh.Trimesh(vertices, faces, process=False, validate=False)


def soup(mesh):
    """Every face with vertices of its own."""
    return mesh.triangles.reshape(-1, 3), np.arange(3 * len(mesh.faces)).reshape(-1, 3)


# --- placement ---


def test_placement_fills_the_box_and_goes_back():
    points = np.random.default_rng(0).normal(size=(50, 3)) * [3, 1, 2] + [100, -5, 0.1]
    placement = Placement.of(points)
    inside = placement.into(points)
    assert np.ptp(inside, axis=0).max() == pytest.approx(1)
    assert (inside.min(0) + inside.max(0)).tolist() == pytest.approx([0, 0, 0], abs=1e-12)
    assert placement.back(inside) == pytest.approx(points)
    assert placement.into(points.reshape(5, 10, 3)).shape == (5, 10, 3)


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([[1, 2, 3], [1, 2, 3]], "must span a box of finite size > 0, got 0.0"),
        (np.zeros((0, 3)), "must be (N, 3) with N > 0, got shape (0, 3)"),
        ([[0, 0, 0], [0, np.nan, 1]], "got [0.0, nan, 1.0] in row 1"),
        ([[0, 0, 0], [0, np.inf, 1]], "got [0.0, inf, 1.0] in row 1"),
    ],
)
def test_placement_refuses(points, text):
    with pytest.raises(DataError) as error:
        Placement.of(points)
    assert text in str(error.value)


# --- welding ---


def test_weld_gives_the_box_back_from_its_triangles():
    box = trimesh.creation.box()
    vertices, faces = weld(*soup(box))
    assert vertices.shape == (8, 3)
    assert vertices[faces].tolist() == box.triangles.tolist()
    assert plain(vertices, faces).is_watertight


def test_weld_against_a_dictionary():
    rng = np.random.default_rng(1)
    points = rng.integers(-1, 2, (200, 3)) * 1.0
    points[points == 0] *= rng.choice([-1, 1], (points == 0).sum())  # -0.0 is 0.0
    faces = rng.integers(0, 200, (150, 3))
    vertices, welded = weld(points, faces)
    keep = [f for f in faces if len({tuple(points[i] + 0) for i in f}) == 3]
    assert vertices[welded].tolist() == (points[np.array(keep)] + 0).tolist()
    assert len({tuple(v) for v in vertices}) == len(vertices) == len(np.unique(welded))
    firsts = [next(i for i, p in enumerate(points) if (p == v).all()) for v in vertices]
    assert firsts == sorted(firsts)


def test_weld_of_nothing():
    vertices, faces = weld(np.zeros((4, 3)), [[0, 1, 2], [1, 2, 3]])
    assert vertices.shape == faces.shape == (0, 3)
    vertices, faces = weld(np.zeros((0, 3)), np.zeros((0, 3)))
    assert vertices.shape == faces.shape == (0, 3)


# --- sampling ---


def test_samples_lie_on_the_faces_evenly():
    vertices = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 0, 1], [0, 1, 1.0], [9, 9, 9]])
    faces = [[0, 1, 2], [6, 6, 6], [3, 5, 4]]
    points, normals = sample_surface(vertices, faces, 40_000, np.random.default_rng(0))
    upper = points[:, 2] > 0.5
    assert upper.mean() == pytest.approx(0.75, abs=0.01)  # area 3 of 4
    assert normals[~upper].tolist() == [[0, 0, 1]] * (~upper).sum()
    assert normals[upper].tolist() == [[0, 0, -1]] * upper.sum()
    x, y, z = points[~upper].T
    assert (z == 0).all()
    assert (x >= 0).all()
    assert (y >= 0).all()
    assert (x + y <= 1 + 1e-12).all()
    assert [x.mean(), y.mean()] == pytest.approx([1 / 3, 1 / 3], abs=0.01)
    assert x.var() == pytest.approx(1 / 18, abs=0.002)  # of a flat triangle


def test_samples_follow_the_seed():
    box = trimesh.creation.box()
    draws = [sample_surface(box.vertices, box.faces, 9, np.random.default_rng(seed))[0].tolist() for seed in (3, 3, 4)]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize("faces", [np.zeros((0, 3), dtype=int), [[0, 1, 1]]])
def test_no_samples_without_area(faces):
    with pytest.raises(DataError, match="must have an area that is finite and > 0; check the mesh"):
        sample_surface(np.eye(3), faces, 5, np.random.default_rng(0))


# --- condition ---


def test_condition_thins_and_repeats():
    rng = np.random.default_rng(0)
    points, normals = rng.uniform(-0.5, 0.5, (100, 3)), rng.normal(size=(100, 3))
    fewer = condition(points, normals, 60, rng)
    assert fewer.shape == (60, 6)
    assert fewer.dtype == np.float32
    rows = [int(np.abs(points * CONDITION_SCALE - row[:3]).sum(1).argmin()) for row in fewer]
    assert len(set(rows)) == 60
    assert fewer[:, :3] == pytest.approx(points[rows] * 1.999, abs=1e-6)
    unit = normals[rows] / np.linalg.norm(normals[rows], axis=1, keepdims=True)
    assert fewer[:, 3:] == pytest.approx(unit, abs=1e-6)
    more = condition(points, normals, 150, rng)
    assert more[:100, :3] == pytest.approx(points * 1.999, abs=1e-6)
    assert {tuple(row) for row in more} == {tuple(row) for row in more[:100]}


def test_condition_noise_is_on_positions_in_its_own_units():
    points, normals = np.zeros((5000, 3)), np.tile([0, 0, 2.0], (5000, 1))
    noisy = condition(points, normals, 5000, np.random.default_rng(0), noise=0.02)
    assert noisy[:, :3].std() == pytest.approx(0.02, rel=0.05)
    assert (noisy[:, 3:] == [0, 0, 1]).all()


def test_condition_refuses():
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match="normals must not be zero; leave them out to have them estimated"):
        condition(np.ones((3, 3)), np.zeros((3, 3)), 3, rng)
    with pytest.raises(DataError, match="every point needs a normal, got 3 points and 2 normals"):
        condition(np.ones((3, 3)), np.ones((2, 3)), 3, rng)


# --- normals ---


@pytest.mark.parametrize("shape", ["sphere", "box", "two"])
def test_estimated_normals_point_outwards(shape):
    if shape == "sphere":
        mesh = trimesh.creation.icosphere(3)
    elif shape == "box":
        mesh = trimesh.creation.box((1, 2, 0.7))
    else:
        mesh = trimesh.util.concatenate(
            [trimesh.creation.box(), trimesh.creation.icosphere(3).apply_translation([5, 0, 0])]
        )
    points, normals = sample_surface(mesh.vertices, mesh.faces, 3000, np.random.default_rng(0))
    found = estimate_normals(points)
    cosines = (found * normals).sum(1)
    assert np.linalg.norm(found, axis=1) == pytest.approx(np.ones(3000))
    assert np.median(cosines) > 0.99
    assert (cosines > 0).mean() > 0.97  # edges are rounded off


def test_estimate_normals_refuses():
    with pytest.raises(DataError, match="at least 4 points are needed, got 3; add points"):
        estimate_normals(np.eye(3))
    with pytest.raises(ConfigError, match="neighbours must be at least 3, got 2; 16 is usual"):
        estimate_normals(np.random.default_rng(0).normal(size=(9, 3)), 2)


# --- the grid ---


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_quantized_and_back_is_within_half_a_cell(scale):
    mesh = trimesh.creation.icosphere(2).apply_scale(scale).apply_translation([7, -3, 2])
    qmesh, placement = quantized(mesh, 128)
    assert len(qmesh.faces) == 320
    back = to_trimesh(qmesh, 128, placement=placement)
    assert back.is_watertight
    assert back.is_winding_consistent
    assert back.volume > 0
    distances = np.linalg.norm(back.vertices[:, None] - mesh.vertices, axis=2)
    assert distances.min(1).max() <= 2 * scale / 128 / 2 * np.sqrt(3) + 1e-9
    assert same_faces(quantized(to_trimesh(qmesh, 128), 128)[0], qmesh)


def test_vertices_that_no_face_uses_do_not_count():
    mesh = trimesh.creation.box()
    far = plain(np.concatenate([[[1e9, np.nan, 0]], mesh.vertices]), mesh.faces + 1)
    qmesh, placement = quantized(far, 128)
    assert placement == Placement((0.0, 0.0, 0.0), 1.0)
    assert same_faces(qmesh, quantized(mesh, 128)[0])


def test_faces_smaller_than_a_cell_are_lost():
    speck = trimesh.creation.box((1e-5,) * 3).apply_translation([0.03] * 3)
    mesh = trimesh.util.concatenate([trimesh.creation.box(), speck])
    assert len(quantized(mesh, 16)[0].faces) == 12


def test_bodies_turned_inside_out_are_turned_back():
    box = trimesh.creation.box()
    box.invert()
    qmesh, _ = quantized(box, 64)
    assert to_trimesh(qmesh, 64).volume > 0


def test_an_empty_grid_mesh():
    empty = QuantizedMesh(np.zeros((0, 3), dtype=np.int64), np.zeros((0, 3), dtype=np.int64))
    assert to_trimesh(empty, 128).faces.shape == (0, 3)


# --- decimation ---


def test_decimate_keeps_the_shape():
    pytest.importorskip("fast_simplification", reason="the extra `mesh` is not installed")
    dense = trimesh.creation.box((2, 1, 1))
    for _ in range(4):
        dense = dense.subdivide()
    dense.apply_scale(1000)
    few = decimate(dense, 12)
    assert 8 <= len(few.faces) <= 12
    assert few.volume == pytest.approx(2e9, rel=1e-3)
    assert few.bounds == pytest.approx(dense.bounds)
    for wanted in (100, 500):
        ball = decimate(trimesh.creation.icosphere(4), wanted)
        assert 0.9 * wanted <= len(ball.faces) <= 1.05 * wanted
        assert np.linalg.norm(ball.vertices, axis=1) == pytest.approx(np.ones(len(ball.vertices)), abs=0.06)


def test_decimate_leaves_small_meshes_alone():
    box = trimesh.creation.box()
    same = decimate(box, 12)
    assert same is not box
    assert same.faces.tolist() == box.faces.tolist()
    with pytest.raises(ConfigError, match="faces must be at least 4, got 3; no closed shape has fewer"):
        decimate(box, 3)


def test_decimate_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "fast_simplification", None)
    with pytest.raises(MissingExtraError, match=r"decimate needs .*'fast-simplification'.*vertebra\[mesh\]"):
        decimate(trimesh.creation.icosphere(2), 20)


def test_a_flat_body_has_no_inside_and_is_kept():
    corners = np.array([[2, 2, 2], [1, 2, 2], [3, 3, 3], [1, 1, 2], [0, 1, 2]])
    faces = np.array([[1, 4, 3], [4, 3, 0], [1, 0, 3], [0, 1, 1], [1, 4, 0], [2, 4, 3]])
    flat = to_trimesh(QuantizedMesh(corners, faces), 64)  # four of the faces close, and hold nothing
    assert len(flat.faces) == 6
    assert np.isfinite(flat.vertices).all()
