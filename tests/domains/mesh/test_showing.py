"""What a model is shown: the frame of training, clouds of every kind, and the vertical axis."""

import numpy as np
import pytest
import trimesh

from vertebra.domains.mesh import showing
from vertebra.domains.mesh.data import make_item
from vertebra.domains.mesh.files import Shape
from vertebra.domains.mesh.geometry import CONDITION_SCALE, sample_surface
from vertebra.domains.mesh.procedural import draw
from vertebra.domains.mesh.showing import show, turn_up
from vertebra.errors import DataError
from vertebra.tokenizers.mesh import make_mesh_tokenizer

FEW = "The cloud has 40 points, fewer than the 64 the model reads."
ESTIMATED = "Normals were estimated from neighbouring points."


def rng(seed=0):
    return np.random.default_rng(seed)


def ball(count, seed=0):
    points = rng(seed).normal(size=(count, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def rows(array):
    return array[np.lexsort(array.T)]


def back(shown):
    """Points in the coordinates of the file."""
    return shown.placement.back(shown.condition[:, :3].astype(np.float64) / CONDITION_SCALE)


# ---------------------------------------------------------------- meshes


def test_a_mesh_is_shown_as_in_training():
    mesh = draw("test", 0, 3)
    vertices = mesh.vertices * 7 + [3.0, -20.0, 5.0]
    shown = show(Shape(trimesh.Trimesh(vertices, mesh.faces, process=False)), 200, rng())
    item = make_item(vertices, mesh.faces, make_mesh_tokenizer("amt", 16), 200, rng())
    assert shown.condition.dtype == np.float32
    np.testing.assert_allclose(rows(shown.condition), rows(item.points), atol=1e-6)
    triangles = shown.placement.into(vertices)[mesh.faces]
    np.testing.assert_allclose(triangles, item.corners, atol=1e-6)
    assert shown.notes == ()


@pytest.mark.parametrize("offset", [0.0, 1e7])
def test_points_lie_on_the_surface_that_the_placement_names(offset):
    box = trimesh.creation.box((2.0, 1.0, 3.0))
    shown = show(Shape(trimesh.Trimesh(box.vertices + offset, box.faces, process=False)), 500, rng())
    points, normals = back(shown) - offset, shown.condition[:, 3:]
    axis = np.abs(normals).argmax(1)
    np.testing.assert_allclose(np.abs(normals[np.arange(500), axis]), 1, atol=1e-6)
    on = points[np.arange(500), axis] * np.sign(normals[np.arange(500), axis])
    np.testing.assert_allclose(on, np.array([1.0, 0.5, 1.5])[axis], atol=1e-6)  # and normals look outwards
    assert shown.placement.scale == pytest.approx(3, abs=1e-6)
    np.testing.assert_allclose(shown.placement.centre, [offset] * 3, atol=1e-6)
    places = shown.condition[:, :3]
    assert np.ptp(places, axis=0).max() == pytest.approx(CONDITION_SCALE, abs=1e-6)
    assert np.abs(places).max() <= 1


def test_the_frame_is_that_of_the_points_and_unused_vertices_do_not_count():
    needle = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0], [99, 99, 99]], [[0, 1, 2]], process=False)
    shown = show(Shape(needle), 20, rng())
    points = back(shown)
    np.testing.assert_allclose(points[:, 2], 0, atol=1e-7)
    sides = np.ptp(points, axis=0)
    assert shown.placement.scale == pytest.approx(sides.max(), abs=1e-6)
    assert 0.4 < sides.max() < 1  # corners are hardly ever drawn


def test_draws_follow_the_generator():
    shape = Shape(draw("test", 0, 1))
    first, again, other = (show(shape, 50, rng(seed)).condition for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


# ---------------------------------------------------------------- clouds


def test_a_cloud_of_as_many_points_is_kept_whole():
    cloud, normals = ball(64) * 5 + [1, 2, 3], ball(64, 1)
    shown = show(Shape(None, cloud, normals * 3, notes=("2 parts left out",)), 64, rng())
    assert shown.notes == ("2 parts left out",)
    expected = np.concatenate([cloud, normals], axis=1)
    found = np.concatenate([back(shown), shown.condition[:, 3:]], axis=1)
    np.testing.assert_allclose(rows(found), rows(expected), atol=2e-6)


def test_few_points_are_repeated_and_said():
    cloud = ball(40)
    shown = show(Shape(None, cloud, cloud), 64, rng())
    assert shown.notes == (FEW,)
    points = back(shown)
    np.testing.assert_allclose(points[:40], cloud, atol=1e-6)
    assert (np.linalg.norm(points[:, None] - cloud[None], axis=2).min(1) < 1e-6).all()
    np.testing.assert_allclose(shown.condition[:, 3:], points, atol=1e-6)  # each keeps its normal


def test_normals_are_estimated_where_the_cloud_has_none():
    cloud = ball(600)
    shown = show(Shape(None, cloud), 64, rng())
    assert shown.notes == (ESTIMATED,)
    np.testing.assert_allclose(np.linalg.norm(shown.condition[:, 3:], axis=1), 1, atol=1e-6)
    assert ((back(shown) * shown.condition[:, 3:]).sum(1) > 0.9).all()  # out of the ball
    assert show(Shape(None, ball(40)), 64, rng()).notes == (FEW, ESTIMATED)


def test_zero_normals_are_replaced_and_said():
    cloud = ball(300)
    normals = cloud.copy()
    normals[7] = 0
    shown = show(Shape(None, cloud, normals), 64, rng())
    assert shown.notes == ("Some normals were zero or NaN; all were estimated anew.",)
    assert ((back(shown) * shown.condition[:, 3:]).sum(1) > 0.9).all()
    normals[7] = np.nan
    assert show(Shape(None, cloud, normals), 64, rng()).notes == shown.notes


@pytest.mark.parametrize(("points", "with_normals", "seen"), [(1000, False, 256), (200, False, 200), (1000, True, 0)])
def test_no_more_normals_are_estimated_than_are_of_use(points, with_normals, seen, monkeypatch):
    counts = [0]
    estimate = showing.estimate_normals
    monkeypatch.setattr(showing, "estimate_normals", lambda cloud: counts.append(len(cloud)) or estimate(cloud))
    cloud = ball(points)
    show(Shape(None, cloud, cloud if with_normals else None), 64, rng())
    assert counts[-1] == seen


# ---------------------------------------------------------------- what cannot be shown


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        (Shape(trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [2, 0, 0]], [[0, 1, 2]], process=False)), "must have an area"),
        (Shape(None, np.eye(3)), "at least 4 points are needed, got 3; add points"),
        (Shape(None, np.zeros((9, 3))), "must span a box of finite size > 0, got 0.0; check the file"),
        (Shape(None, np.full((9, 3), np.nan)), "vertices must be finite numbers"),
        (Shape(None, ball(9), np.full((9, 3), np.inf)), "normals must be finite numbers"),
    ],
)
def test_unusable_shapes(shape, text):
    with pytest.raises(DataError, match=text):
        show(shape, 64, rng())


# ---------------------------------------------------------------- the vertical axis


def test_up_is_turned_and_turned_back():
    axes = np.eye(3)
    np.testing.assert_array_equal(turn_up(axes, "y"), axes)
    turned = turn_up(axes, "z")
    np.testing.assert_array_equal(turned[2], [0, 1, 0])  # what was up still is
    assert np.linalg.det(turned) == 1  # nothing is mirrored
    points = rng().normal(size=(5, 3))
    np.testing.assert_array_equal(turn_up(turn_up(points, "z"), "z", back=True), points)
    np.testing.assert_array_equal(turn_up(points, "y", back=True), points)


def test_a_turned_mesh_is_seen_upright():
    cone = trimesh.creation.cone(1.0, 2.0, sections=24)  # its tip at +z
    points, _ = sample_surface(turn_up(cone.vertices, "z"), cone.faces, 400, rng())
    shown = show(Shape(trimesh.Trimesh(turn_up(cone.vertices, "z"), cone.faces, process=False)), 400, rng())
    height = shown.condition[:, 1]
    assert height.mean() < -0.2  # most of the surface is low
    assert np.hypot(*points[points[:, 1] > 1.8][:, [0, 2]].T).max() < 0.2  # and the tip high
