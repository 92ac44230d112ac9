"""Figures whose parts can be told apart without looking."""

import numpy as np
import pytest

from vertebra.pipelines import figures


@pytest.mark.parametrize("length", [1, 20, 250])
def test_heat_maps(length):
    sequence = ("ACGTN" * length)[:length]
    matrix = np.where(np.array(list(sequence))[:, None] == "N", np.nan, np.linspace(-3, 1, 4 * length).reshape(-1, 4))
    figure = figures.heatmap(matrix, sequence, first=length, step=-1, title="t", label="nats")
    *lines, bar = figure.axes
    assert len(lines) == -(-length // 100)
    assert bar.get_ylabel() == "nats"
    assert [t.get_text() for t in lines[0].get_yticklabels()] == list("ACGT")
    image = lines[0].images[0]
    assert image.norm.vmin == -image.norm.vmax
    dots = lines[0].lines[0]
    letters = ["ACGT"[int(y)] for y in dots.get_ydata()]
    assert letters == [sequence[int(x)] for x in dots.get_xdata()]
    assert figures.png_bytes(figures.heatmap(np.full((2, 4), np.nan), "NN")).startswith(b"\x89PNG")


def texts(figure):
    return [t.get_text() for t in figure.axes[0].texts]


@pytest.mark.parametrize("count", [1, 8, 21])
def test_contact_sheets_show_every_tile_within_the_figure(count):
    rng = np.random.default_rng(0)
    sizes = [(32, 32, 3), (300, 20), (7, 200, 3), (1, 1)]
    tiles = [
        figures.Tile(rng.integers(0, 256, sizes[i % 4], dtype=np.uint8), f"class {i} 0.99", f"a-long-name-of-{i}.png")
        for i in range(count)
    ]
    figure = figures.contact_sheet(tiles, title="first\nsecond")
    shown = texts(figure)
    assert sum(t.startswith("class ") for t in shown) == count
    assert all(len(t) <= 19 for t in shown if t != "first\nsecond")
    assert figures.png_bytes(figure).startswith(b"\x89PNG")
    width, height = figure.get_size_inches() * figure.dpi
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 <= box.y0
        assert (box.x1, box.y1) <= (width, height)


def test_frames_have_the_colour_of_their_tile():
    image = np.zeros((10, 10), dtype=np.uint8)
    figure = figures.contact_sheet([figures.Tile(image, "a", colour="#C62828"), figures.Tile(image, "b")])
    (frame,) = figure.axes[0].patches
    assert frame.get_edgecolor() == pytest.approx((0xC6 / 255, 0x28 / 255, 0x28 / 255, 1))


@pytest.mark.parametrize("shape", [(8, 8), (28, 28, 3), (5, 9, 3), (300, 300, 3)])
def test_image_grids_magnify_by_whole_pixels(shape):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 12, *shape), dtype=np.uint8)
    rows = [("a class", list(images[0])), ("a class with a very long name", list(images[1, :3]))]
    figure = figures.image_grid(rows, heads=["original", "kept"], title="title")
    assert texts(figure) == ["title", "a class", "a class with a very lon…", *texts(figure)[3:]]
    canvas = figure.axes[0].images[0].get_array()
    factor = max(1, round(80 / max(shape[:2])))
    large = images[0, 0].repeat(factor, 0).repeat(factor, 1)
    large = figures.opaque(large)
    height, width = large.shape[:2]
    found = [
        (y, x) for y in range(20, 70) for x in range(80, 260) if (canvas[y : y + height, x : x + width] == large).all()
    ]
    assert len(found) == 1
    for text in figure.axes[0].texts:
        assert text.get_window_extent().x0 >= 0


def test_attention_ranks_by_layer():
    ranks = [(f"layers.{n}", head, 10.0 * n + head, 65) for n in range(3) for head in range(2)]
    (axes,) = figures.attention_ranks(ranks, title="t").axes
    mean, heads = axes.lines
    assert list(mean.get_ydata()) == [0.5, 10.5, 20.5]
    assert list(heads.get_ydata()) == [r[2] for r in ranks]
    assert "65" in axes.get_ylabel()


def test_shortening():
    assert figures.shorten("abc", 3) == "abc"
    assert figures.shorten("abcdef", 4) == "abc…"
    assert figures.shorten("abcdefgh.png", 9, middle=True) == "abcd….png"
