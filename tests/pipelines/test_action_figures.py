"""Figures of original and decoded actions: what is drawn where, in which unit, and what is left out."""

import numpy as np
import pytest
from matplotlib.colors import to_hex

from vertebra.errors import ConfigError, ShapeError
from vertebra.pipelines.action_figures import MOST_CHUNKS, MOST_PANELS, reconstruction_figure
from vertebra.pipelines.figures import PALETTE, png_bytes


def walk(steps, dims, seed=0):
    return np.random.default_rng(seed).normal(size=(steps, dims)).cumsum(0).astype(np.float32)


def pieces_of(actions, size, off=0.1):
    return [(first, actions[first : first + size] + np.float32(off)) for first in range(0, len(actions), size)]


def panels(figure):
    return [axes for axes in figure.axes if axes.axison]


def curve(axes, colour):
    """The one curve of a colour; borders of chunks are grey."""
    (line,) = [line for line in axes.lines if to_hex(line.get_color()) == colour.lower()]
    return np.array(line.get_xdata()), np.array(line.get_ydata())


@pytest.mark.parametrize(("dims", "rows"), [(1, 1), (2, 2), (3, 2), (6, 3), (7, 3), (12, 4)])
def test_every_joint_has_a_panel(dims, rows):
    actions, names = walk(50, dims), [f"joint_{d}" for d in range(dims)]
    figure = reconstruction_figure(
        actions, pieces_of(actions, 20), names=names, units=["rad"] * dims, errors=[0.1] * dims, fps=10, title="run"
    )
    shown = panels(figure)
    assert len(shown) == dims
    assert shown[0].get_gridspec().nrows == rows
    for d, axes in enumerate(shown):
        assert axes.get_title(loc="left") == f"joint_{d}   RMSE 0.1 rad"
        assert axes.get_ylabel() == "rad"
        x, y = curve(axes, "#1a1a1a")
        np.testing.assert_allclose(x, np.arange(50) / 10)
        np.testing.assert_array_equal(y, actions[:, d])
        x, y = curve(axes, PALETTE[0])
        there = np.isfinite(y)
        np.testing.assert_allclose(x[there], np.arange(50) / 10)
        np.testing.assert_allclose(y[there], actions[:, d] + 0.1, atol=1e-6)
        assert (~there).sum() == 3  # chunks are not joined by a line
        borders = [line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 2]
        np.testing.assert_allclose(borders, [0, 2, 4])
    assert shown[-1].get_xlabel() == "time (s)"
    assert figure.get_suptitle() == "run"
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["original", "decoded from tokens", "a chunk begins"]


def test_a_figure_is_a_picture_with_room_for_its_text():
    actions = walk(60, 4)
    names = ["left_$houlder_with_a_name_that_is_far_too_long_to_be_read", "b", "c", "d"]
    figure = reconstruction_figure(actions, pieces_of(actions, 20), names=names, title="t$_" * 60)
    assert png_bytes(figure).startswith(b"\x89PNG")
    assert "…" in panels(figure)[0].get_title(loc="left")
    assert len(figure.get_suptitle()) == 110


def test_the_worst_of_many_joints_are_drawn_in_their_order():
    actions = walk(40, 20)
    errors = np.linspace(0.02, 0.01, 20) * np.ptp(actions, axis=0)
    errors[17] = 9 * np.ptp(actions[:, 17])
    names = [str(d) for d in range(20)]
    figure = reconstruction_figure(actions, pieces_of(actions, 20), names=names, errors=errors, title="run")
    found = [axes.get_title(loc="left").split()[0] for axes in panels(figure)]
    assert found == [*map(str, range(MOST_PANELS - 1)), "17"]
    assert figure.get_suptitle() == "run\n12 of 20 joints, those with the largest errors for their range"
    figure = reconstruction_figure(None, pieces_of(actions, 20), names=names)
    assert [axes.get_title(loc="left") for axes in panels(figure)] == names[:MOST_PANELS]
    assert figure.get_suptitle() == "12 of 20 joints"


def test_long_episodes_are_cut():
    actions = walk(400, 2)
    figure = reconstruction_figure(actions, pieces_of(actions, 10), names="ab", fps=20)
    axes = panels(figure)[-1]
    assert axes.get_xlabel() == "time (s); the first 15 of 20"
    assert len(curve(axes, "#1a1a1a")[0]) == 10 * MOST_CHUNKS
    assert axes.get_xlim() == (0, (10 * MOST_CHUNKS - 1) / 20)


def test_without_an_original_and_without_a_rate():
    actions = walk(20, 1)
    figure = reconstruction_figure(None, [(0, actions)], names=["x"])
    (axes,) = panels(figure)
    assert axes.get_xlabel() == "step"
    assert axes.get_title(loc="left") == "x"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["decoded from tokens", "a chunk begins"]
    assert png_bytes(reconstruction_figure(None, [(0, actions[:1])], names=["x"])).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"pieces": []}, ConfigError, "must have a chunk to draw, got none; give at least one"),
        ({"pieces": [(0, np.zeros((3, 4)))]}, ShapeError, r"actions must be \(N, 2\), got \(3, 4\)"),
        ({"original": np.zeros(3)}, ShapeError, r"actions must be \(N, 2\), got \(3,\)"),
        ({"units": ["rad"]}, ShapeError, "units and errors must be 2, as the names"),
        ({"errors": [1.0]}, ShapeError, "units and errors must be 2, as the names"),
    ],
)
def test_what_cannot_be_drawn(change, error, text):
    given = {"original": np.zeros((3, 2)), "pieces": [(0, np.zeros((3, 2)))], "units": (), "errors": None, **change}
    original, pieces = given.pop("original"), given.pop("pieces")
    with pytest.raises(error, match=f"^reconstruction_figure: {text}"):
        reconstruction_figure(original, pieces, names=["a", "b"], **given)


def test_what_stands_still_looks_still():
    still = np.ones((10, 1), np.float32)
    figure = reconstruction_figure(still, [(0, still - 4e-6)], names=["gripper"])
    low, high = figure.axes[0].get_ylim()
    assert high - low == pytest.approx(2e-3, rel=1e-3)
    moving = np.linspace(0, 0.01, 10, dtype=np.float32)[:, None]
    low, high = reconstruction_figure(moving, [(0, moving)], names=["joint"]).axes[0].get_ylim()
    assert high - low == pytest.approx(0.011, rel=1e-2)
