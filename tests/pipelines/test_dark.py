"""Figures for dark pages: colours turned over, pictures and what lies upon them kept."""

import io
import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from vertebra.pipelines import dark, figures


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"), dtype=float)


def twin(figure):
    with dark.dark_twins():
        light = figures.png_bytes(figure)
        return pixels(light), pixels(dark.twin_of(light))


def shades(colour):
    return 255 * np.array(to_rgb(colour))


def test_paper_and_ink_change_places_and_hues_stay():
    figure = figures.bars({"a": 0.5, "b": 0.2})
    light, night = twin(figure)
    assert light.shape == night.shape
    assert light[0, 0] == pytest.approx(shades("white"))
    assert night[0, 0] == pytest.approx(shades(dark.PAPER), abs=1)
    assert light.mean() > 200
    assert night.mean() < 60
    first, second = (patch.get_facecolor()[:3] for patch in figure.axes[0].patches[:2])
    assert first[2] > first[1] > first[0]  # blue as before
    assert sum(first) > sum(to_rgb(figures.PALETTE[0]))  # and lighter
    assert sum(second) < sum(to_rgb("#9CC3DD"))


def test_lines_and_their_markers_are_turned_once():
    figure, (axes,) = figures.new_figure()
    axes.plot([0, 1], [0, 1], "o-", color="black")
    axes.plot([0, 1], [1, 0], "o", color="black", markerfacecolor="none")
    dark.darken(figure)
    full, hollow = axes.lines
    for colour in (full.get_color(), full.get_markerfacecolor(), full.get_markeredgecolor(), hollow.get_color()):
        assert colour[:3] == pytest.approx(to_rgb(dark.INK))
    assert hollow.get_markerfacecolor() == "none"


def test_bands_and_points_are_turned_and_maps_are_not():
    figure, (axes,) = figures.new_figure()
    band = axes.fill_between([0, 1], 0, 1, color="white")
    points = axes.scatter([0, 1], [0, 1], c=[0.0, 1.0])
    dark.darken(figure)
    assert band.get_facecolor()[0][:3] == pytest.approx(to_rgb(dark.PAPER))
    assert points.get_array() is not None
    figures.png_bytes(figure)


def test_pictures_and_what_lies_upon_them_are_left_alone():
    figure = figures.confusion(np.array([[5, 0], [1, 4]]), ["a", "b"])
    (axes,) = figure.axes
    before = [text.get_color() for text in axes.texts]
    light, night = twin(figure)
    assert [text.get_color() for text in axes.texts] == before
    blue = (light[..., 2] > light[..., 0] + 100).nonzero()
    np.testing.assert_allclose(light[blue], night[blue], atol=4)  # spines touch the border


def test_text_above_a_picture_is_turned_and_text_upon_it_is_not():
    figure, (axes,) = figures.new_figure()
    axes.imshow(np.zeros((4, 4)))
    above = axes.text(0.5, 1.1, "above", transform=axes.transAxes, color="black")
    upon = axes.text(1, 1, "upon", color="black")
    twin(figure)
    assert above.get_color()[:3] == pytest.approx(to_rgb(dark.INK))
    assert upon.get_color() == "black"


def test_text_beside_pictures_on_the_figures_own_paper_is_turned():
    tiles = [figures.Tile(np.full((8, 8, 3), 200, dtype=np.uint8), "a", "b.png")]
    figure = figures.contact_sheet(tiles, title="t")
    light, night = twin(figure)
    assert night[0, 0] == pytest.approx(shades(dark.PAPER), abs=1)
    grey = (light == 200).all(-1)
    assert grey.sum() > 5000
    assert (night[grey] == 200).all()
    assert sum(to_rgb(figure.axes[0].texts[0].get_color())) > 2


def test_nothing_is_drawn_twice_unless_asked_for():
    png = figures.png_bytes(figures.bars({"a": 0.5}))
    assert dark.twin_of(png) is None
    with dark.dark_twins():
        assert dark.twin_of(png) is None


def test_cards_of_reports_have_the_paper_and_ink_of_figures():
    style = (Path(dark.__file__).parent / "report.css").read_text(encoding="utf-8")
    for name, colour in (("card", dark.PAPER), ("ink", dark.INK)):
        (night,) = re.findall(rf"--{name}: light-dark\([^,]+, (#\w+)\)", style)
        assert night.lower() == colour.lower()
