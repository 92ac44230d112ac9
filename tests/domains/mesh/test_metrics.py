from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
import trimesh

from vertebra.domains.mesh import metrics
from vertebra.domains.mesh.geometry import quantized, sample_surface, to_trimesh, weld
from vertebra.domains.mesh.metrics import (
    chamfer,
    compare,
    describe,
    edge_chamfer,
    edge_points,
    intersecting_faces,
    is_valid,
    normal_consistency,
    quantization_floor,
)
from vertebra.errors import DataError


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plane(side=1.0, y=0.0):
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]]) * side
    return trimesh.Trimesh(corners + np.array([0, y, 0]), [[0, 2, 1], [0, 3, 2]], process=False)


# --- distances ---


def test_chamfer_against_all_pairs(rng):
    a, b = rng.normal(size=(70, 3)), rng.normal(size=(50, 3)) + 0.3
    table = np.linalg.norm(a[:, None] - b, axis=2)
    assert chamfer(a, b) == pytest.approx((table.min(1).mean() + table.min(0).mean()) / 2)
    assert chamfer(b, a) == pytest.approx(chamfer(a, b))
    assert chamfer(a, a) == 0
    assert chamfer([[0, 0, 0]], [[3, 4, 0]]) == 5  # neither squared nor added up
    assert np.isnan(chamfer(a, np.zeros((0, 3))))


def test_normal_consistency_against_all_pairs(rng):
    a, b = rng.normal(size=(70, 3)), rng.normal(size=(50, 3))
    u, v = unit(rng.normal(size=(70, 3))), unit(rng.normal(size=(50, 3)))
    table = np.linalg.norm(a[:, None] - b, axis=2)
    there = [abs(u[i] @ v[table[i].argmin()]) for i in range(70)]
    back = [abs(v[j] @ u[table[:, j].argmin()]) for j in range(50)]
    assert normal_consistency(a, u, b, v) == pytest.approx((np.mean(there) + np.mean(back)) / 2)
    assert normal_consistency(a, u, a, -u) == pytest.approx(1)


def test_edge_points_against_all_pairs(rng):
    box = trimesh.creation.box((0.1, 0.1, 0.1))
    points, normals = sample_surface(box.vertices, box.faces, 1500, rng)
    near = np.linalg.norm(points[:, None] - points, axis=2) < 0.004
    sharp = (near & (np.abs(normals @ normals.T) < 0.1)).any(1)
    assert 30 < sharp.sum() < 500
    assert (edge_points(points, normals) == sharp).all()


def test_edge_points_lie_at_edges(rng):
    box = trimesh.creation.box()
    points, normals = sample_surface(box.vertices, box.faces, 100_000, rng)
    found = points[edge_points(points, normals)]
    second = np.sort(0.5 - np.abs(found), axis=1)[:, 1]  # distance from the second nearest face
    assert len(found) > 100
    assert second.max() < 0.004


def test_edge_chamfer():
    box, ball = trimesh.creation.box((1, 0.2, 0.2)), trimesh.creation.icosphere(3, radius=0.5)
    wide = trimesh.creation.box((1, 0.3, 0.2))
    same, other = edge_chamfer(box, box, seed=1), edge_chamfer(box, wide)
    assert 0 < same < 0.02
    assert other == pytest.approx(0.045, abs=0.01)  # the long edges have moved by 0.05, half of the short ones
    assert edge_chamfer(ball, ball) == 0.0
    assert np.isnan(edge_chamfer(box, ball))
    assert np.isnan(edge_chamfer(ball, box))
    assert edge_chamfer(box, box, seed=1) == same != edge_chamfer(box, box, seed=2)


# --- compare ---


@pytest.mark.parametrize("scale", [1.0, 250.0])
def test_compare_is_in_box_units_of_the_truth(scale):
    truth, output = plane(scale), plane(scale, y=0.1 * scale)
    found = compare(output, truth, count=4000)
    assert found["chamfer"] == pytest.approx(0.1, abs=0.003)
    assert found["normal_consistency"] == pytest.approx(1)
    assert found["edge_chamfer"] == 0
    assert found["vertex_ratio"] == found["face_ratio"] == 1


def test_compare_agrees_with_its_parts(monkeypatch):
    monkeypatch.setattr(metrics, "EDGE_COUNT", 100)
    a, b = trimesh.creation.box(), trimesh.creation.icosphere(2, radius=0.5)
    found = compare(a, b, count=500, seed=3)
    side = np.ptp(b.vertices, axis=0).max()
    rng = np.random.default_rng(3)
    x, u = sample_surface(a.vertices / side, a.faces, 500, rng)
    y, v = sample_surface(b.vertices / side, b.faces, 500, rng)
    assert found["chamfer"] == pytest.approx(chamfer(x, y))
    assert found["normal_consistency"] == pytest.approx(normal_consistency(x, u, y, v))
    assert (found["vertex_ratio"], found["face_ratio"]) == (8 / 162, 12 / 320)
    assert all(isinstance(value, float) for value in found.values())
    assert compare(a, b, count=500, seed=3)["chamfer"] == found["chamfer"]
    assert compare(a, b, count=500, seed=4)["chamfer"] != found["chamfer"]


def test_compare_counts_after_welding():
    box = trimesh.creation.box()
    soup = trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False)
    assert compare(soup, box, count=100)["vertex_ratio"] == 1


def test_compare_with_nothing():
    with pytest.raises(DataError, match="must have an area"):
        compare(trimesh.Trimesh(), plane(), count=10)


def test_quantization_floor():
    ball = trimesh.creation.icosphere(3).apply_scale(7).apply_translation([1, 2, 3])
    floors = [quantization_floor(ball, bins, count=5000) for bins in (8, 32, 128, 1024)]
    assert floors[0] > 1.8 * floors[1] > 2 * floors[2] > 2 * floors[3]
    best = to_trimesh(quantized(ball, 128)[0], 128, placement=quantized(ball, 128)[1])
    assert compare(best, ball, count=5000)["chamfer"] == pytest.approx(floors[2], rel=1e-6)
    assert floors[3] == pytest.approx(compare(ball, ball, count=5000)["chamfer"], rel=0.02)  # two samplings


# --- what a mesh is like ---


def test_describe_a_box_and_a_ball():
    assert describe(trimesh.creation.box()) == {
        "vertices": 8,
        "faces": 12,
        "degenerate": 0,
        "watertight": True,
        "bodies": 1,
        "self_intersection_share": 0.0,
    }
    ball = trimesh.creation.icosphere(1)
    moved = ball.copy().apply_translation([5, 0, 0])
    both = trimesh.util.concatenate([ball, moved, plane(y=3)])
    found = describe(both)
    assert (found["bodies"], found["watertight"], found["faces"]) == (3, False, 162)


def test_describe_nothing():
    assert describe(trimesh.Trimesh()) == {
        "vertices": 0,
        "faces": 0,
        "degenerate": 0,
        "watertight": False,
        "bodies": 0,
        "self_intersection_share": 0.0,
    }


def test_degenerate_faces_are_counted_and_not_valid():
    corners = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [0.3, 0, 0], [0, 0, 0]]
    for odd in ([0, 1, 1], [0, 1, 4], [0, 3, 1]):
        mesh = trimesh.Trimesh(corners, [[0, 1, 2], odd], process=False, validate=False)
        assert describe(mesh)["degenerate"] == 1
        assert not is_valid(mesh)
    assert is_valid(trimesh.Trimesh(corners, [[0, 1, 2]], process=False))
    assert not is_valid(trimesh.Trimesh())


def test_three_faces_at_an_edge_are_not_watertight():
    box = trimesh.creation.box()
    fin = trimesh.Trimesh(np.concatenate([box.vertices, [[0, 0, 2]]]), [*box.faces, [*box.faces[0][:2], 8]])
    assert not describe(fin)["watertight"]
    assert describe(fin)["bodies"] == 1


# --- self-intersection ---


def faces_of(*meshes):
    whole = trimesh.util.concatenate(meshes)
    return weld(whole.vertices, whole.faces)


def shifted(x, y=0.0, z=0.0, size=(1, 1, 1)):
    return trimesh.creation.box(size).apply_translation([x, y, z])


def test_bodies_that_touch_do_not_intersect():
    touching = faces_of(shifted(0), shifted(1), shifted(0.2, 1.0, 0.1), shifted(0, 0, -0.75, size=(0.5, 0.5, 0.5)))
    assert intersecting_faces(*touching).sum() == 0


def test_bodies_that_overlap_intersect():
    found = intersecting_faces(*faces_of(shifted(0), shifted(0.5, 0.3, 0.2), shifted(4)))
    assert 6 <= found.sum() <= 24
    assert not found[24:].any()
    rod = shifted(0, size=(0.2, 0.2, 9))
    found = intersecting_faces(*faces_of(rod, plane(4).apply_translation([-1.7, 0, -1.9])))
    assert found[-2:].any()


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e5])
def test_size_and_place_do_not_matter(scale):
    vertices, faces = faces_of(shifted(0), shifted(0.5, 0.3, 0.2))
    assert (intersecting_faces(vertices * scale + 3 * scale, faces) == intersecting_faces(vertices, faces)).all()


def pierces(a, b):
    """Whether two triangles of integers in different planes have inner points in common, in exact numbers."""

    def cross(u, v):
        return [u[1] * v[2] - u[2] * v[1], u[2] * v[0] - u[0] * v[2], u[0] * v[1] - u[1] * v[0]]

    def minus(u, v):
        return [x - y for x, y in zip(u, v, strict=True)]

    def dot(u, v):
        return sum(x * y for x, y in zip(u, v, strict=True))

    normal = cross(minus(b[1], b[0]), minus(b[2], b[0]))
    sides = [dot(minus(p, b[0]), normal) for p in a]
    if not any(normal) or not any(cross(minus(a[1], a[0]), minus(a[2], a[0]))) or min(sides) >= 0 or max(sides) <= 0:
        return False
    ends = [p for p, s in zip(a, sides, strict=True) if s == 0]  # where the plane of b cuts a
    for i, j in ((0, 1), (1, 2), (2, 0)):
        if sides[i] * sides[j] < 0:
            t = Fraction(sides[i], sides[i] - sides[j])
            ends.append([x + t * (y - x) for x, y in zip(a[i], a[j], strict=True)])
    start, step = ends[0], minus(ends[1], ends[0])
    low, high = Fraction(0), Fraction(1)
    for i in range(3):  # cut by the edges of b
        inward = cross(normal, minus(b[(i + 1) % 3], b[i]))
        here, slope = dot(minus(start, b[i]), inward), dot(step, inward)
        if slope == 0:
            if here <= 0:
                return False
        elif slope > 0:
            low = max(low, Fraction(-here) / slope)
        else:
            high = min(high, Fraction(-here) / slope)
    return low < high


@pytest.mark.parametrize(("size", "seed"), [(2, 0), (3, 1), (5, 2), (20, 3)])
def test_intersections_against_exact_numbers(size, seed):
    rng = np.random.default_rng(seed)
    vertices = np.unique(rng.integers(-size, size + 1, (60, 3)), axis=0)
    faces = np.array([rng.choice(len(vertices), 3, replace=False) for _ in range(60)])
    corners = vertices[faces].tolist()
    expected = np.zeros(len(faces), dtype=bool)
    for i, j in combinations(range(len(faces)), 2):
        if not set(faces[i]) & set(faces[j]) and pierces(corners[i], corners[j]):
            expected[[i, j]] = True
    for few in range(3, 61, 19):  # a pair at a time would hide behind others
        part = intersecting_faces(vertices, faces[:few])
        wanted = [
            any(pierces(corners[i], corners[j]) for j in range(few) if not set(faces[i]) & set(faces[j]))
            for i in range(few)
        ]
        assert part.tolist() == wanted
    assert (intersecting_faces(vertices, faces) == expected).all()


def test_groups_of_boxes_find_the_same_pairs(monkeypatch, rng):
    centres = rng.uniform(-1, 1, (600, 1, 3))
    vertices = np.round(centres + rng.normal(0, 0.15, (600, 3, 3)), 1).reshape(-1, 3)  # many flat boxes
    faces = np.arange(1800).reshape(-1, 3)
    cut = intersecting_faces(vertices, faces)
    monkeypatch.setattr(metrics, "_PAIRS", 500)
    assert (intersecting_faces(vertices, faces) == cut).all()
    monkeypatch.setattr(metrics, "_GROUP", 10**9)
    assert (intersecting_faces(vertices, faces) == cut).all()
    assert 0 < cut.sum() < 600
    low, high = vertices[faces].min(1), vertices[faces].max(1)
    monkeypatch.setattr(metrics, "_GROUP", 16)
    pairs = {frozenset(pair) for a, b in metrics._overlapping(low, high) for pair in zip(a, b, strict=True)}
    close = (low[:, None] < high) & (low < high[:, None])
    expected = {frozenset(pair) for pair in zip(*np.nonzero(np.triu(close.all(2), 1)), strict=True)}
    assert pairs == expected
