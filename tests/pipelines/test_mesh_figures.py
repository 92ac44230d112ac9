"""Pictures of meshes: what is nearest is seen, everything is in the frame, equal shapes give equal bytes."""

from typing import NamedTuple

import numpy as np
import pytest

from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.pipelines.figures import png_bytes
from vertebra.pipelines.mesh_figures import VIEWS, Panel, four_views, sheet
from vertebra.pipelines.mesh_render import Frame, camera, render, render_points, rgb


class Mesh(NamedTuple):
    vertices: object
    faces: object


RED, LIME = "#CC2020", "#20CC20"
CUBE = Mesh(
    np.array([(x, y, z) for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)]),
    np.array([(0, 1, 3), (0, 3, 2), (4, 6, 7), (4, 7, 5), (0, 4, 5), (0, 5, 1),
              (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 5, 7), (1, 7, 3)]),
)  # fmt: skip


def square(z=0.0, half=0.5, diagonal=0):
    corners = half * np.array([(-1.0, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0)]) + [0, 0, z]
    return Mesh(corners, np.array([[(0, 1, 2), (0, 2, 3)], [(0, 1, 3), (1, 2, 3)]][diagonal]))


def together(*meshes):
    starts = np.cumsum([0] + [len(m.vertices) for m in meshes])
    return Mesh(
        np.concatenate([m.vertices for m in meshes]),
        np.concatenate([m.faces + s for m, s in zip(meshes, starts, strict=False)]),
    )


def ball(rings=12, sectors=24):
    up, around = np.meshgrid(np.linspace(0, np.pi, rings + 1), np.linspace(0, 2 * np.pi, sectors + 1), indexing="ij")
    places = np.stack([np.sin(up) * np.cos(around), np.cos(up), np.sin(up) * np.sin(around)], -1).reshape(-1, 3)
    i, j = (a.ravel() for a in np.meshgrid(np.arange(rings), np.arange(sectors), indexing="ij"))
    a = i * (sectors + 1) + j
    c = a + sectors + 1
    return Mesh(places, np.concatenate([np.stack([a, a + 1, c], 1), np.stack([a + 1, c + 1, c], 1)]))


def drawn(image):
    """Pixels that are not white."""
    return (image != 255).any(-1)


def test_the_camera_turns_around_y():
    turns = {(0, 0): (0, 0, 1), (90, 0): (1, 0, 0), (180, 0): (0, 0, -1), (0, 90): (0, 1, 0)}
    for view, towards in turns.items():
        axes = camera(view)
        np.testing.assert_allclose(axes[2], towards, atol=1e-12)
        np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(axes) == pytest.approx(1)


def test_a_square_covers_the_pixels_it_should():
    frame = Frame(np.zeros(3), 1.0)
    image = render(square(), 0, 0, 100, wire=False, frame=frame)
    assert image.shape == (100, 100, 3)
    assert image.dtype == np.uint8
    rows, columns = np.nonzero(drawn(image))
    # The frame's radius 1 is .94 of 50 pixels, the square's .5 half of that: 23.5 on either side of the middle.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (26, 73, 26, 73)
    assert len(rows) == 48**2


@pytest.mark.parametrize(("azimuth", "nearer"), [(0, 1), (180, 0)])
def test_the_nearer_of_two_is_seen(azimuth, nearer):
    far, near = square(-0.3, 0.5), square(0.3, 0.2, diagonal=1)
    frame = Frame(np.zeros(3), 1.0)
    both = render(together(far, near), azimuth, 0, 90, wire=True, frame=frame)
    # From the front the small one cuts its lines into the large one, from the back it is hidden.
    alone = render(far, azimuth, 0, 90, wire=True, frame=frame)
    assert (both == alone).all() == (nearer == 0)
    middle = render(near, azimuth, 0, 90, wire=True, frame=frame)[40:50, 40:50]
    assert (both[40:50, 40:50] == middle).all() == (nearer == 1)


@pytest.mark.parametrize("view", [(0, 0), (33, 21), (120, -50)])
def test_no_gaps_between_faces_and_none_beyond(view):
    # Without lines a ball is a disc: no white inside, and nothing outside of its circle.
    image = render(ball(60, 120), *view, 120, wire=False)
    y, x = np.mgrid[:120, :120] + 0.5 - 60
    distance = np.hypot(x, y)
    assert drawn(image)[distance < 0.94 * 60 - 1.5].all()
    assert not drawn(image)[distance > 0.94 * 60 + 1].any()


def test_coplanar_faces_do_not_fight():
    one, other = square(), square(diagonal=1)
    first = render(one, 31, 17, 200).astype(int)
    assert np.abs(first - render(other, 31, 17, 200)).max() > 60
    assert np.abs(first - render(together(one, other), 31, 17, 200)).max() <= 12


def test_edges_are_drawn_and_fade_on_dense_meshes():
    plain, lines = (render(CUBE, size=200, wire=wire).astype(int) for wire in (False, True))
    assert (lines <= plain).all()
    assert 0.01 < ((plain - lines).max(-1) > 40).mean() < 0.2
    dense = ball(150, 300)
    np.testing.assert_array_equal(render(dense, size=100, wire=False), render(dense, size=100, wire=True))


def test_faces_are_lit_by_where_they_look_whatever_their_winding():
    image = render(CUBE, 45, 30, 120, wire=False, colour="#FFFFFF").astype(int)
    top, left, right = image[30, 60, 0], image[75, 35, 0], image[75, 85, 0]
    assert top > left + 15 > right + 30
    np.testing.assert_array_equal(image, render(Mesh(CUBE.vertices, CUBE.faces[:, ::-1]), 45, 30, 120, wire=False,
                                                colour="#FFFFFF"))  # fmt: skip


def test_equal_shapes_give_equal_bytes_wherever_and_however_large_they_are():
    reference = render(CUBE, size=90).astype(int)
    assert (render(CUBE, size=90) == reference).all()
    moved = render(Mesh(CUBE.vertices * 4096 + [2**20, -(2**18), 2**16], CUBE.faces), size=90)
    assert np.abs(moved - reference).max() <= 2
    unused = render(Mesh(np.concatenate([CUBE.vertices, [[99.0, 99, 99]]]), CUBE.faces), size=90)
    assert (unused == reference).all()


def test_meshes_without_area_are_white():
    flat = Mesh([(0.0, 0, 0), (1, 1, 1), (2, 2, 2)], [(0, 1, 2), (0, 0, 1)])
    for mesh in (flat, Mesh(np.zeros((0, 3)), np.zeros((0, 3), dtype=int)), Mesh([], []), Mesh(CUBE.vertices, [])):
        assert not drawn(render(mesh, size=20)).any()
    assert not drawn(render_points(np.zeros((0, 3)), size=20)).any()
    assert drawn(render_points([(1.0, 2, 3)], size=20)).sum() > 3


def test_points_with_normals_show_their_near_side():
    rng = np.random.default_rng(0)
    places = rng.normal(size=(3000, 3))
    places /= np.linalg.norm(places, axis=1, keepdims=True)
    bare, lit = (render_points(p, 0, 0, 120) for p in (places, np.hstack([places, 5 * places])))
    for image in (bare, lit):
        y, x = np.mgrid[:120, :120] + 0.5 - 60
        assert drawn(image)[np.hypot(x, y) < 52].mean() > 0.6
        assert not drawn(image)[np.hypot(x, y) > 61].any()
    upper, lower = (lit[rows, 55:65].astype(int) for rows in (slice(10, 25), slice(95, 110)))
    assert upper[drawn(upper)].mean() > lower[drawn(lower)].mean() + 15
    far = render_points(np.concatenate([places, -places], 1)[places[:, 2] > 0], 0, 0, 120)
    assert far[drawn(far)].mean() > lit[drawn(lit)].mean() + 15  # pale, as they look away


def test_points_hide_what_is_behind_them():
    frame = Frame(np.zeros(3), 1.0)
    near, far = [(0, 0, 0.9)], [(0, 0, -0.9)]
    alone = render_points(near, 0, 0, 40, frame=frame)
    assert (render_points(far + near, 0, 0, 40, frame=frame) == render_points(near + near, 0, 0, 40, frame=frame)).all()
    behind = render_points(far, 0, 0, 40, frame=frame)
    assert behind[drawn(behind)].mean() > alone[drawn(alone)].mean() + 20  # and are darker


def test_frames_hold_every_point():
    assert Frame.around([CUBE.vertices]).radius == pytest.approx(np.sqrt(3) / 2)
    one = Frame.around([CUBE.vertices, CUBE.vertices + np.array([3, 0, 0])], [(0, 0)])
    np.testing.assert_allclose(one.centre, [1.5, 0, 0])
    assert one.radius == pytest.approx(2.0)
    assert Frame.around([]).radius == Frame.around([[(5.0, 5, 5)]]).radius == 1.0


@pytest.mark.parametrize(
    ("mesh", "error", "text"),
    [
        (Mesh([(0, 0)], []), ShapeError, r"^vertices: expected \(N, 3\), got \(1, 2\); give one row a point\.$"),
        (Mesh(CUBE.vertices, [(0, 1, 2, 3)]), ShapeError, r"^faces: expected triangles \(F, 3\), got \(1, 4\); tri"),
        (Mesh([(0, 0, 0), (0, np.nan, 0)], []), DataError, r"^vertices: must be finite, row 1 is not; leave it out\.$"),
        (Mesh(CUBE.vertices, [(0, 1, 8)]), DataError, r"^faces: must name vertices from 0 to 7, got 0 to 8; the mesh "),
        (Mesh(CUBE.vertices, [(0, 1, -1)]), DataError, r"^faces: must name vertices from 0 to 7, got -1 to 1; the "),
    ],
)
def test_broken_meshes(mesh, error, text):
    with pytest.raises(error, match=text):
        render(mesh)
    with pytest.raises(error, match=text):
        four_views(Panel(*mesh))


def test_broken_points_sizes_and_colours():
    with pytest.raises(ShapeError, match=r"^points: expected \(N, 3\), got \(2, 4\); give one row a point\.$"):
        render_points(np.zeros((2, 4)))
    with pytest.raises(DataError, match=r"^normals: must be finite, row 0 is not; leave it out\.$"):
        render_points([(0, 0, 0, 0, 0, np.inf)])
    with pytest.raises(ConfigError, match=r"^render: size must be at least 1, got 0; give the pixels of a side\.$"):
        render(CUBE, size=0)
    with pytest.raises(ConfigError, match=r"^colour: must be six hexadecimal digits such as '#7FB2DC', got 'red'\.$"):
        render(CUBE, colour="red")
    np.testing.assert_allclose(rgb("#FF8000"), [1, 128 / 255, 0])


# -------------------------------------------------------------------- figures


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


def pixels(figure):
    return figure.axes[0].images[0].get_array()


def overlaps(figure):
    """Pairs of texts that overlap, and texts that leave the figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in figure.axes[0].texts if t.get_text()]
    outside = [s for s, b in boxes if b.x0 < 0 or b.y0 < 0 or b.x1 > figure.bbox.x1 or b.y1 > figure.bbox.y1]
    pairs = [(s, t) for i, (s, a) in enumerate(boxes) for t, b in boxes[:i] if a.overlaps(b)]
    return outside + pairs


CLOUD = np.concatenate([ball().vertices, ball().vertices], axis=1)


def test_four_views_are_rows_of_labelled_pictures_at_one_scale():
    panels = [
        Panel(CLOUD, None, "input", note="scan.ply, a note that is too long for a single line of it"),
        Panel(*CUBE, "output", colour=RED),
        Panel(*CUBE, "truth", colour=LIME),
    ]
    figure = four_views(*panels, title="scan.ply, $x_1$ Chamfer distance 0.0123", size=100)
    said = texts(figure)
    for word in (*VIEWS, "input", "output", "truth", "325 points", "8 vertices", "12 faces"):
        assert word in said
    assert said[0] == "scan.ply, $x_1$ Chamfer distance 0.0123"
    assert overlaps(figure) == []
    image = pixels(figure).astype(int)
    frame = Frame.around([CLOUD[:, :3], CUBE.vertices], list(VIEWS.values()))
    top = len(image) - 3 * 108
    for row, panel in enumerate(panels):
        for column, view in enumerate(VIEWS.values()):
            y, x = top + 108 * row, 178 + 108 * column
            np.testing.assert_array_equal(image[y : y + 100, x : x + 100], panel.draw(view, 100, frame))
    assert png_bytes(figure) == png_bytes(four_views(*panels, title=said[0], size=100))


@pytest.mark.parametrize("across", [1, 2, 9])
def test_sheets_show_every_panel(across):
    rows = [
        (f"object_{i}.glb", [Panel(CLOUD, None, "input"), Panel(*CUBE, "output", note="CD 0.012"), None][: 3 - i % 2])
        for i in range(3)
    ]
    figure = sheet(rows, ["points", "generated"], title="Held-out shapes", across=across, size=120)
    said = texts(figure)
    assert said[0] == "Held-out shapes"
    assert [s for s in said if s.startswith("object")] == [name for name, _ in rows]
    assert said.count("points") == said.count("generated") == min(across, 3)
    assert "output" not in said
    assert said.count("325 points") == said.count("8 vertices, 12 faces") == said.count("CD 0.012") == 3
    assert overlaps(figure) == []
    assert "input" in texts(sheet(rows, size=120))


def test_figures_of_nothing():
    with pytest.raises(ConfigError, match=r"^four_views: must have something to draw, got no panels; give at least"):
        four_views()
    with pytest.raises(ConfigError, match=r"^sheet: must have something to draw, got no rows; give at least one\.$"):
        sheet([])
    with pytest.raises(ConfigError, match=r"^sheet: across must be at least 1, got 0; give the rows side by side\.$"):
        sheet([("a", [Panel(*CUBE)])], across=0)
    assert overlaps(sheet([("empty.obj", [Panel([], [], "input"), None])])) == []
    assert Panel([(0, 0, 0)]).counts == "1 point"
    assert Panel([(0, 0, 0)], [(0, 0, 0)]).counts == "1 vertex, 1 face"
