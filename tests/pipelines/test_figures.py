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
