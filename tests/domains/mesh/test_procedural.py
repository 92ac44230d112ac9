"""Procedural shapes: what all of them must be, the splits, and dense versions."""

import subprocess
import sys
from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from vertebra.domains.mesh import solids
from vertebra.domains.mesh.procedural import FAMILIES, SPLITS, build, dense, draw, draw_parameters, split_of
from vertebra.errors import ConfigError, UnknownNameError
from vertebra.tokenizers.mesh import canonical, quantize

EACH = 240  # shapes of every split that tests look at


@pytest.fixture(scope="module")
def shapes():
    return {split: [draw(split, 0, i) for i in range(EACH)] for split in SPLITS}


@pytest.fixture(scope="module")
def every(shapes):
    return [mesh for split in SPLITS for mesh in shapes[split]]


def bodies(mesh):
    """Faces of every body of a mesh whose bodies share no vertex."""
    label = np.arange(len(mesh.vertices))
    while True:
        lowest = label.copy()
        for a, b in ((0, 1), (1, 2), (2, 0)):
            np.minimum.at(lowest, mesh.faces[:, a], label[mesh.faces[:, b]])
            np.minimum.at(lowest, mesh.faces[:, b], label[mesh.faces[:, a]])
        if (lowest == label).all():
            return [mesh.faces[label[mesh.faces[:, 0]] == root] for root in np.unique(label)]
        label = lowest


def volume(vertices, faces):
    a, b, c = vertices[faces].transpose(1, 0, 2)
    return (a * np.cross(b, c)).sum() / 6


def closed(faces):
    """Whether every edge is met once in each direction."""
    edges = faces[:, [[0, 1], [1, 2], [2, 0]]].reshape(-1, 2)
    once = len(np.unique(edges, axis=0)) == len(edges)
    return once and {tuple(e) for e in edges.tolist()} == {tuple(e) for e in edges[:, ::-1].tolist()}


def winding(corners, points):
    """How many bodies each point (N, 3) is in, by solid angles (Van Oosterom and Strackee 1983)."""
    to = corners[None] - points[:, None, None]  # (N, F, 3, 3)
    length = np.linalg.norm(to, axis=-1)
    a, b, c = to[:, :, 0], to[:, :, 1], to[:, :, 2]
    over = (a * np.cross(b, c)).sum(-1)
    under = length.prod(-1) + sum((x * y).sum(-1) * length[..., i] for x, y, i in ((a, b, 2), (b, c, 0), (c, a, 1)))
    return np.arctan2(over, under).sum(1) / (2 * np.pi)


# ---------------------------------------------------------------- meshes


def test_every_face_survives_the_grid(every):
    for mesh in every:
        assert 20 <= len(mesh.faces) <= 400
        cells = quantize(mesh.vertices, 128)
        on_grid = canonical(cells, mesh.faces)
        assert len(on_grid.faces) == len(mesh.faces), mesh.metadata
        a, b, c = on_grid.corners.transpose(1, 0, 2)
        assert np.cross(b - a, c - a).any(1).all(), mesh.metadata  # none is a line


def test_a_median_shape_has_about_a_hundred_faces(every):
    assert 80 <= np.median([len(mesh.faces) for mesh in every]) <= 120


def test_bodies_are_closed_and_face_outwards(every):
    for mesh in every[::3]:  # all families
        for faces in bodies(mesh):
            assert closed(faces), mesh.metadata
            assert volume(mesh.vertices, faces) > 0, mesh.metadata


def test_bodies_do_not_overlap(shapes):
    """Points just inside and outside of faces are in one body at most."""
    rng = np.random.default_rng(0)
    for mesh in shapes["train"][:120]:
        corners = mesh.vertices[mesh.faces]
        chosen = corners[rng.integers(len(corners), size=80)]
        weights = rng.dirichlet(np.ones(3), 80)
        normal = np.cross(chosen[:, 1] - chosen[:, 0], chosen[:, 2] - chosen[:, 0])
        normal /= np.linalg.norm(normal, axis=1, keepdims=True)
        points = (weights[:, :, None] * chosen).sum(1) + rng.choice([-0.004, 0.004], (80, 1)) * normal
        inside = winding(corners, points)
        assert inside.min() > -0.01
        assert inside.max() < 1.01, mesh.metadata


def test_shapes_fill_the_box_and_stand_on_its_floor_in_one_piece(every):
    for mesh in every:
        low, high = mesh.vertices.min(0), mesh.vertices.max(0)
        np.testing.assert_allclose(low, -high, atol=2e-6)
        assert (high - low).max() == pytest.approx(1, abs=3e-6)
        # Bodies touch, all through others: boxes around them meet.
        boxes = np.array([[x.min(0), x.max(0)] for x in (mesh.vertices[np.unique(f)] for f in bodies(mesh))])
        touch = (boxes[:, None, 0] <= boxes[None, :, 1] + 1e-5).all(-1)
        touch &= touch.T
        reached = np.linalg.matrix_power(touch.astype(float), len(boxes)) > 0
        assert reached.all(), mesh.metadata


def test_nearly_all_edges_lie_along_the_axes_or_in_a_face(shapes):
    """Faces look along an axis, but for roofs, rails and turned parts."""
    normals = np.concatenate([mesh.face_normals for mesh in shapes["train"]])
    assert (np.abs(normals).max(1) > 0.999).mean() > 0.75


def test_a_shape_is_the_same_in_another_process():
    code = (
        "from hashlib import sha256; from vertebra.domains.mesh.procedural import draw\n"
        "ms = [draw(s, 3, i) for s in ('train', 'test') for i in range(12)]\n"
        "print(sha256(b''.join(m.vertices.tobytes() + m.faces.tobytes() for m in ms)).hexdigest())"
    )
    other = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    meshes = [draw(split, 3, i) for split in ("train", "test") for i in reversed(range(12))]  # in any order
    meshes = meshes[11::-1] + meshes[:11:-1]
    here = sha256(b"".join(m.vertices.tobytes() + m.faces.tobytes() for m in meshes)).hexdigest()
    assert other.strip() == here
    assert not np.array_equal(draw("train", 4, 0).vertices, draw("train", 3, 0).vertices)


def test_metadata_builds_the_mesh_again(shapes):
    for mesh in shapes["val"][:24]:
        vertices, faces = build(mesh.metadata["family"], mesh.metadata["parameters"])
        np.testing.assert_array_equal(vertices, mesh.vertices)
        np.testing.assert_array_equal(faces, mesh.faces)


# ---------------------------------------------------------------- splits


def test_splits_are_disjoint_and_families_take_turns(shapes):
    seen = {}
    for split, meshes in shapes.items():
        assert [m.metadata["family"] for m in meshes[:12]] == 2 * list(FAMILIES)
        for mesh in meshes:
            assert split_of(mesh.metadata["family"], mesh.metadata["parameters"]) == split
            on_grid = canonical(quantize(mesh.vertices, 128), mesh.faces)
            key = on_grid.vertices.tobytes() + on_grid.faces.tobytes()
            assert seen.setdefault(key, split) == split
    assert len(seen) == 3 * EACH  # nor does a shape repeat


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tenth_of_the_shapes_are_held_out(family):
    """Among shapes of all splits; cells are kept apart whole."""
    rng = np.random.default_rng(0)
    ranges = [draw_parameters(rng, family, "train") for _ in range(300)]
    mixed = []
    for _ in range(1500):  # every parameter from another shape: as if no split had been asked for
        picks = rng.integers(len(ranges), size=len(ranges[0]))
        mixed.append({name: ranges[i][name] for name, i in zip(ranges[0], picks, strict=True)})
    share = Counter(split_of(family, parameters) for parameters in mixed)
    assert 0.7 < share["train"] / 1500 < 0.9
    assert 0.05 < share["val"] / 1500 < 0.2
    assert 0.05 < share["test"] / 1500 < 0.2


def test_splits_do_not_change():
    """Bundled models have been trained on them."""
    house = {"roof": "gable", "width": 0.8, "depth": 0.7, "story": 0.35, "stories": 1, "pitch": 0.3, "over": 0.05}
    house |= {"chimney": 1, "windows": "all", "entry": "porch"}
    quarters = [0.65, 0.75, 0.85, 0.95]
    found = [split_of("house", {**house, "width": x, "depth": z}) for x in quarters for z in quarters]
    assert "".join(split[1] for split in found) == "rarerrrrrrrerrrr"  # r of train, a of val, e of test
    same_cell = {**house, "width": 0.89, "depth": 0.61, "pitch": 0.2, "chimney": 0, "windows": "none"}
    assert split_of("house", same_cell) == split_of("house", {**house, "width": 0.81, "depth": 0.69})


# ---------------------------------------------------------------- errors


def test_what_cannot_be_drawn_or_built_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UnknownNameError, match=r"unknown family 'chairs'\. Did you mean 'chair' or 'stairs'\?"):
        draw_parameters(rng, "chairs", "train")
    for refused in (lambda: draw("valid", 0, 0), lambda: draw_parameters(rng, "chair", "valid")):
        with pytest.raises(UnknownNameError, match=r"unknown split 'valid'\. Did you mean 'val'\?"):
            refused()
    chair = draw_parameters(rng, "chair", "train")
    for change, text in (
        ({"seat": 2.0}, r"chair: seat is 2\.0; it must lie between 0\.4 and 0\.5"),
        ({"seat": "low"}, r"chair: seat is 'low'; it must lie between"),
        ({"back": "sofa"}, r"chair: back is 'sofa'; choose one of 'panel', 'slats', 'ladder', 'none'\."),
        ({"wheels": 5}, r"chair: missing or unknown parameters: wheels; pass exactly back, base, width"),
    ):
        with pytest.raises(ConfigError, match=text):
            build("chair", {**chair, **change})
    mesh = draw("train", 0, 0)
    with pytest.raises(ConfigError, match="dense needs a mesh with faces, and faces and noise of at least 0"):
        dense(mesh, rng, noise=-1)


# ---------------------------------------------------------------- dense


def test_dense_has_many_small_faces_on_the_same_surface(shapes):
    for mesh in shapes["train"][:6]:
        fine = dense(mesh, np.random.default_rng(0), 3000, noise=0)
        assert 3000 <= len(fine.faces) < 8000
        assert closed(fine.faces)
        assert volume(fine.vertices, fine.faces) == pytest.approx(volume(mesh.vertices, mesh.faces))
        assert fine.area == pytest.approx(mesh.area)
        assert len(np.unique(np.sort(fine.faces, axis=1), axis=0)) == len(fine.faces)
        assert fine.edges_unique_length.max() < 0.5 * mesh.edges_unique_length.max()


def test_noise_is_as_large_as_was_asked():
    mesh = draw("test", 0, 0)
    mesh.vertices = 7.0 * mesh.vertices  # its share of the longest side stays
    clean, rough, again = (dense(mesh, np.random.default_rng(1), 2000, noise) for noise in (0, 0.01, 0.01))
    np.testing.assert_array_equal(rough.vertices, again.vertices)
    np.testing.assert_array_equal(clean.faces, rough.faces)
    assert (rough.vertices - clean.vertices).std() == pytest.approx(0.07, rel=0.05)


def test_split_edges_keep_faces_whole():
    """Triangles with one, two and three long edges in one mesh."""
    vertices = np.array([[0, 0, 0], [8, 0, 0], [4, 7, 0], [4, -1, 0], [12, 1, 0]], dtype=float)
    faces = np.array([[0, 1, 2], [0, 3, 1], [1, 4, 2]])
    points, fine = solids.split_long_edges(vertices, faces, 0.75)
    assert len(fine) == 4 + 2 + 3
    corners = points[fine]
    areas = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])[:, 2] / 2
    assert areas.min() > 0
    a, b, c = vertices[faces].transpose(1, 0, 2)
    assert areas.sum() == pytest.approx(np.cross(b - a, c - a)[:, 2].sum() / 2)


# ---------------------------------------------------------------- bodies


@pytest.mark.parametrize(
    ("body", "faces", "size"),
    [
        (solids.box(-1, 2, 0, 1, 0, 2), 12, 6.0),
        (solids.turned(4, [(1, 0), (1, 2)]), 12, 8.0),
        (solids.turned(6, [(1, 0), (2, 1), (1, 2)]), 32, 2 * (1 + 2 + 4) / 3 * 2 * 3**0.5),
        (solids.tube(4, [(2, 0), (2, 1), (1, 1), (1, 0)]), 32, 12.0),
        (solids.extrude([(0, 0), (2, 0), (0, 1)], 0, 3), 8, 3.0),
        (solids.across([(-1, 2), (0, 2), (0, 1), (1, 1), (1, 0), (-1, 0)], 0, 2), 20, 6.0),
        (solids.hip(1, 2, 0, 3, 2), 8, 12.0),
        (solids.hip(1, 2, 0, 3, 0), 6, 8.0),
        (solids.quarter_turn(solids.hip(1, 2, 0, 3, 1)), 8, 10.0),
        (solids.join([solids.box(0, 1, 0, 1, 0, 1), solids.box(2, 3, 0, 1, 0, 2)]), 24, 3.0),
    ],
)
def test_bodies_are_what_they_say(body, faces, size):
    assert len(body[1]) == faces
    assert closed(body[1])
    assert volume(*body) == pytest.approx(size)
