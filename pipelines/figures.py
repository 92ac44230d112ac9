"""Figures of one look: a colour-blind-safe palette, labels with units, no pyplot state.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), black first left out.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.pipelines.dark import CANVAS, darken, keep_twin, twins_wanted

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C6D1F", "#4D4D4D")
MUTED = "#8A8A8A"


def new_figure(rows: int = 1, columns: int = 1, width: float = 8.0, height: float = 3.0) -> tuple[Figure, list[Axes]]:
    """Make a figure with ``rows * columns`` plain axes; width and height in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    grid = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for axes in grid:
        style(axes)
    return figure, list(grid)


def style(axes: Axes) -> None:
    """Give ``axes`` the house's look."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(MUTED)
    axes.tick_params(color=MUTED, labelsize=9)
    axes.grid(True, axis="y", color="#E4E4E4", linewidth=0.7)
    axes.set_axisbelow(True)


def bars(scores: Mapping[str, float], *, title: str = "", label: str = "score", most: int = 20) -> Figure:
    """Draw scores as horizontal bars, highest first, at most ``most`` of them."""
    ranked = sorted(scores.items(), key=lambda pair: -pair[1])[:most]
    figure, (axes,) = new_figure(width=6.5, height=0.9 + 0.36 * max(len(ranked), 1))
    values = [value for _, value in ranked]
    names = [name if len(name) <= 32 else name[:31] + "…" for name, _ in ranked]
    drawn = axes.barh(
        names, values, color=[PALETTE[0] if i == 0 else "#9CC3DD" for i in range(len(ranked))], height=0.7
    )
    axes.bar_label(drawn, [f"{v:.3g}" for v in values], padding=4, fontsize=9)
    axes.invert_yaxis()
    axes.grid(False)
    axes.grid(True, axis="x", color="#E4E4E4", linewidth=0.7)
    if values and min(values) >= 0:
        axes.set_xlim(0, max(1.0, 1.12 * max(values)) if max(values) > 1 else 1.08)
    axes.set_xlabel(label)
    if title:
        axes.set_title(title, fontsize=11, loc="left")
    return figure


def track(
    starts: Sequence[int] | np.ndarray,
    values: Mapping[str, np.ndarray],
    *,
    width: int,
    title: str = "",
    label: str = "score",
    threshold: float | None = None,
    marks: Iterable[int] = (),
    mark_label: str = "known site",
    axes: Axes | None = None,
) -> Figure:
    """Draw window scores along a sequence, each at the middle of its window.

    Args:
        starts: First base of each window, from 0, shape (W,).
        values: Scores of each class to draw, shape (W,).
        width: Length of a window in bases.
        title: Over the figure.
        label: Of the vertical axis.
        threshold: Draws a dashed line there.
        marks: Positions in bases that get a triangle under the curve.
        mark_label: What the triangles mean.
        axes: Draw here instead of in a new figure.
    """
    if axes is None:
        figure, (axes,) = new_figure(width=9.5, height=2.9)
    else:
        figure = axes.figure  # type: ignore[assignment]
    middle = np.asarray(starts, dtype=np.float64) + width / 2
    scale, unit = base_unit(float(middle.max()) + width / 2 if len(middle) else 1.0)
    for colour, (name, scores) in zip(PALETTE, values.items(), strict=False):
        x, low, high = envelope(middle, np.asarray(scores, dtype=np.float64))
        axes.fill_between(x / scale, low, high, color=colour, alpha=0.22, linewidth=0)
        axes.plot(x / scale, high, color=colour, linewidth=1.3, label=name)
    bottom, top = axes.get_ylim()
    flat = np.concatenate([np.ravel(v) for v in values.values()]) if values else np.zeros(1)
    if flat.size and flat.min() >= 0 and flat.max() <= 1:
        bottom, top = -0.02, 1.05
    sites = np.asarray(list(marks), dtype=np.float64)
    if len(sites):
        bottom -= 0.12 * (top - bottom)
        height = bottom + 0.055 * (top - bottom)
        axes.plot(
            sites / scale, np.full(len(sites), height), "^", color=PALETTE[1], markersize=7, label=mark_label,
            clip_on=False,
        )  # fmt: skip
    axes.set_ylim(bottom, top)
    if threshold is not None:
        axes.axhline(threshold, color=MUTED, linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    if len(middle):
        axes.set_xlim(min(0.0, float(middle.min())) / scale, (float(middle.max()) + width / 2) / scale)
    axes.set_xlabel(f"position ({unit})")
    axes.set_ylabel(label)
    entries = len(values) + bool(len(sites)) + (threshold is not None)
    if title:
        axes.set_title(title, fontsize=11, loc="left")
    if entries:
        axes.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=entries, frameon=False, fontsize=9, borderpad=0)
    return figure


def heatmap(
    matrix: np.ndarray,
    sequence: str,
    *,
    rows: str = "ACGT",
    first: int = 1,
    step: int = 1,
    title: str = "",
    label: str = "score",
    wrap: int = 100,
) -> Figure:
    """Draw a score of every letter at every position, blue above 0 and red below; a dot marks the sequence's letter.

    Args:
        matrix: Scores, shape (L, R); nan is drawn grey.
        sequence: The L letters of the sequence.
        rows: The R letters, from top to bottom.
        first: Number of the first position.
        step: 1, or -1 where positions count down.
        title: Over the figure.
        label: What the scores are, beside the colour bar.
        wrap: Positions a line; longer sequences take several.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import FixedLocator

    length = len(sequence)
    lines = max(1, math.ceil(length / wrap))
    width = min(length, wrap)
    figure, all_axes = new_figure(lines, width=max(4.5, 1.9 + 0.095 * width), height=1.25 + 0.85 * lines)
    size = np.abs(matrix[np.isfinite(matrix)])
    # A few strong scores shall not make all others pale.
    limit = float(np.quantile(size, 0.99)) if size.size else 0.0
    limit = limit or float(size.max(initial=0.0)) or 1.0
    colours = colormaps["RdBu"].with_extremes(bad="#C8C8C8")
    every = 10 if len(str(max(first, first + step * length))) < 6 else 20
    for number, axes in enumerate(all_axes):
        begin = number * wrap
        part = matrix[begin : begin + wrap]  # (W, R)
        image = axes.imshow(
            np.ma.masked_invalid(part.T), cmap=colours, vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest"
        )
        shown = [(x, rows.index(c)) for x, c in enumerate(sequence[begin : begin + wrap]) if c in rows]
        if shown:
            axes.plot(*zip(*shown, strict=True), ".", color="#222222", markersize=3.5, linestyle="none")
        names = first + step * (begin + np.arange(len(part)))
        ticks = [x for x, name in enumerate(names.tolist()) if name % every == 0] or [0]
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.set_xticklabels([f"{names[x]:,}" for x in ticks])
        axes.set_yticks(range(len(rows)), list(rows))
        axes.grid(False)
        axes.spines[["left", "bottom"]].set_visible(False)
        axes.tick_params(length=2, labelsize=8)
        axes.set_xlim(-0.5, width - 0.5)  # the last line has the scale of the others
    all_axes[-1].set_xlabel("position (the dot is the base of the sequence)", fontsize=9)
    extend = "both" if size.max(initial=0.0) > limit else "neither"
    # A bar as tall as many lines would be mostly empty.
    bar = figure.colorbar(image, ax=all_axes, extend=extend, aspect=12, shrink=min(1.0, 3 / lines), pad=0.015)
    bar.set_label(label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if title:
        all_axes[0].set_title(title, fontsize=11, loc="left")
    return figure


def envelope(x: np.ndarray, y: np.ndarray, most: int = 2000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thin a curve to at most ``most`` points, keeping the lowest and highest value of each group: x, low, high."""
    if len(x) <= most:
        return x, y, y
    group = math.ceil(len(x) / most)
    edges = np.arange(0, len(x), group)
    return x[edges], np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)


def base_unit(length: float) -> tuple[float, str]:
    """Divisor and unit for positions up to ``length`` bases."""
    return next((s, u) for s, u in ((1e6, "Mb"), (1e3, "kb"), (1.0, "bases")) if length >= 5 * s or s == 1.0)


def png_bytes(figure: Any) -> bytes:
    """Return a figure as PNG; within ``dark.dark_twins`` it is drawn for dark pages too, and cannot be used again."""
    png = _render(figure)
    if twins_wanted():
        darken(figure)
        keep_twin(png, _render(figure))
    return png


def _render(figure: Any) -> bytes:
    """Draw a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()


def confusion(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Draw counts of true (rows) and predicted classes (columns), coloured by the share of the true class.

    Args:
        counts: (K, K).
        classes: The K names.
    """
    size = len(classes)
    side = min(12.0, 2.2 + 0.42 * size)
    figure, (axes,) = new_figure(width=side + 0.6, height=side)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i, j in zip(*np.nonzero(counts), strict=True):
        if size <= 30:
            color = "white" if shares[i, j] > 0.5 else "#333333"
            axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=7, color=color)
    every = range(0, size, max(1, size // 40))
    axes.set_xticks(list(every), [classes[i] for i in every], rotation=90, fontsize=8)
    axes.set_yticks(list(every), [classes[i] for i in every], fontsize=8)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.grid(visible=False)
    return figure


@dataclass(frozen=True, eq=False)
class Tile:
    """One picture of a contact sheet.

    Args:
        image: uint8 (H, W) or (H, W, 3), any size.
        title: First line below it.
        note: Second line, in grey.
        colour: Of its frame and title; empty for none.
    """

    image: np.ndarray
    title: str = ""
    note: str = ""
    colour: str = ""


def contact_sheet(tiles: Sequence[Tile], *, title: str = "", side: int = 96, columns: int = 8) -> Figure:
    """Draw pictures in rows, each in a square of the same size with two lines of text below.

    Args:
        tiles: The pictures.
        title: Over the figure; may have several lines.
        side: Of a square, in pixels of the figure.
        columns: Most in a row.
    """
    columns = max(1, min(columns, len(tiles)))
    gap, across, text, margin = 16, side + 30, 36, 14
    top = margin + (20 * (title.count("\n") + 1) + 6 if title else 0)
    rows = math.ceil(len(tiles) / columns)
    width = max(2 * margin + columns * across, 560)
    canvas = np.zeros((top + rows * (side + text + gap), width, 4), dtype=np.uint8)
    places = []
    for number, tile in enumerate(tiles):
        y, x = top + number // columns * (side + text + gap), margin + number % columns * across
        picture = fit_square(tile.image, side)
        height, wide = picture.shape[:2]
        up, left = y + (side - height) // 2, x + (side - wide) // 2
        canvas[up : up + height, left : left + wide] = opaque(picture)
        places.append((x, y, (left - 2, up - 2, wide + 4, height + 4)))
    figure, axes = _picture(canvas, title, margin)
    for tile, (x, y, (left, up, wide, high)) in zip(tiles, places, strict=True):
        if tile.colour:
            _frame(axes, left, up, wide, high, tile.colour)
        said = axes.text(x, y + side + 5, shorten(tile.title, 17), fontsize=8, va="top", color=tile.colour or "#222222")
        said.set_fontweight("bold" if tile.colour else "normal")
        axes.text(x, y + side + 21, shorten(tile.note, 19, middle=True), fontsize=7.5, va="top", color="#666666")
    return figure


def image_grid(
    rows: Sequence[tuple[str, Sequence[np.ndarray]]],
    *,
    heads: Sequence[str] = (),
    title: str = "",
    side: int = 80,
) -> Figure:
    """Draw small images of one size in rows, every pixel as a square of whole pixels of the figure.

    Args:
        rows: Name, shown on the left, and images, uint8 (H, W) or (H, W, 3), of every row.
        heads: Titles of the first columns.
        title: Over the figure.
        side: Images are magnified to about this size, in pixels of the figure.
    """
    height, width = rows[0][1][0].shape[:2]
    most = max(len(images) for _, images in rows)
    factor = max(1, round(side / max(height, width)))
    while factor > 1 and most * (factor * width + 6) > 1400:
        factor -= 1
    high, wide = factor * height, factor * width
    gap, margin = 6, 12
    names = [shorten(name, 24) for name, _ in rows]
    left = margin + (round(8.2 * max(map(len, names))) + 10 if any(names) else 0)
    top = margin + (26 if title else 0) + (20 if heads else 0)
    full = max(left + most * (wide + gap) - gap + margin, margin * 2 + round(8.6 * len(title)))
    canvas = np.zeros((top + len(rows) * (high + gap) - gap + margin, full, 4), dtype=np.uint8)
    for row, (_, images) in enumerate(rows):
        for column, image in enumerate(images):
            y, x = top + row * (high + gap), left + column * (wide + gap)
            large = image.repeat(factor, 0).repeat(factor, 1)
            canvas[y : y + high, x : x + wide] = opaque(large)
    figure, axes = _picture(canvas, title, margin)
    for row, name in enumerate(names):
        y = top + row * (high + gap) + high / 2
        axes.text(left - 10, y, name, fontsize=9, ha="right", va="center", color="#222222")
    for column, head in enumerate(heads):
        x = left + column * (wide + gap) + wide / 2
        fitting = max(3, wide // 7)
        axes.text(x, top - 5, shorten(head, fitting), fontsize=8, ha="center", va="bottom", color="#666666")
    return figure


def attention_ranks(ranks: Sequence[tuple[str, int, float, int]], *, threshold: float = 0.8, title: str = "") -> Figure:
    """Draw the rank of the attention map of every head, by layer, and the mean of each layer.

    Args:
        ranks: Name of the layer, number of the head, rank, and the size of the map, layer by layer.
        threshold: Share of the sum of the singular values that the rank holds.
        title: Over the figure.
    """
    layers = list(dict.fromkeys(layer for layer, *_ in ranks))
    place = {layer: i + 1 for i, layer in enumerate(layers)}
    figure, (axes,) = new_figure(width=min(11.0, 4.6 + 0.32 * len(layers)), height=3.6)
    means = [float(np.mean([rank for layer, _, rank, _ in ranks if layer == name])) for name in layers]
    axes.plot(list(place.values()), means, "-", color=PALETTE[0], linewidth=1.6, label="mean of a layer", zorder=2)
    across = {name: sum(layer == name for layer, *_ in ranks) for name in layers}
    at = [place[layer] + 0.05 * (head - (across[layer] - 1) / 2) for layer, head, *_ in ranks]
    axes.plot(
        at, [rank for _, _, rank, _ in ranks], "o", color=PALETTE[1], markersize=5, alpha=0.75, label="one head",
        markeredgewidth=0, zorder=3,
    )  # fmt: skip
    sizes = sorted({size for *_, size in ranks})
    axes.set_ylim(0, 1.08 * max(rank for _, _, rank, _ in ranks))
    axes.set_xlim(0.5, len(layers) + 0.5)
    every = max(1, len(layers) // 24)
    axes.set_xticks(range(1, len(layers) + 1, every))
    axes.set_xlabel("layer")
    of = f" of {sizes[0]}" if len(sizes) == 1 else ""
    axes.set_ylabel(f"rank{of} (singular values\nthat sum to {100 * threshold:g} %)")
    if title:
        axes.set_title(title, fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def picture(image: np.ndarray, *, title: str = "") -> Figure:
    """Draw one image, uint8 (H, W) or (H, W, 3), small ones magnified."""
    return image_grid([("", [image])], title=title, side=256)


def image_with_scores(
    image: np.ndarray, scores: Mapping[str, float], *, title: str = "", label: str = "score"
) -> Figure:
    """Draw an image, uint8 (H, W) or (H, W, 3), and its highest scores, at most 8, as bars."""
    ranked = sorted(scores.items(), key=lambda pair: -pair[1])[:8]
    figure, (left, right) = new_figure(1, 2, width=8.0, height=2.9)
    colour = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
    left.imshow(colour, interpolation="nearest" if max(image.shape[:2]) < 128 else "antialiased")
    left.set_axis_off()
    colours = [PALETTE[0], *["#9CC3DD"] * (len(ranked) - 1)]
    drawn = right.barh([shorten(name, 24) for name, _ in ranked], [v for _, v in ranked], color=colours, height=0.7)
    right.bar_label(drawn, [f"{v:.3f}" for _, v in ranked], padding=4, fontsize=9)
    right.invert_yaxis()
    right.set_xlim(0, 1.15)
    right.grid(False)
    right.set_xlabel(label)
    if title:
        left.set_title(shorten(title, 40, middle=True), fontsize=10, loc="left")
    return figure


def fit_square(image: np.ndarray, side: int) -> np.ndarray:
    """Scale an image, uint8 (H, W) or (H, W, 3), to RGB whose longer side is ``side``; small ones keep their pixels."""
    from PIL import Image

    source = Image.fromarray(image).convert("RGB")
    longest = max(source.size)
    if longest * 2 <= side:
        factor = side // longest
        size, how = (source.width * factor, source.height * factor), Image.Resampling.NEAREST
    else:
        size = tuple(max(1, round(s * side / longest)) for s in source.size)  # type: ignore[assignment]
        how = Image.Resampling.LANCZOS
    return np.asarray(source.resize(size, how))


def opaque(image: np.ndarray) -> np.ndarray:
    """Give an image, uint8 (H, W) or (H, W, 3), four channels (H, W, 4)."""
    colours = image if image.ndim == 3 else np.stack([image] * 3, axis=-1)
    return np.concatenate([colours, np.full((*colours.shape[:2], 1), 255, dtype=np.uint8)], axis=-1)


def shorten(text: str, most: int, *, middle: bool = False) -> str:
    """Cut a text to ``most`` characters, at its end or in its middle, with a mark where something is left out."""
    if len(text) <= most:
        return text
    if not middle:
        return text[: most - 1] + "…"
    tail = most // 2
    return text[: most - 1 - tail] + "…" + text[len(text) - tail :]


def _picture(canvas: np.ndarray, title: str, margin: int) -> tuple[Figure, Axes]:
    """Make a figure of exactly the canvas's pixels (H, W, 4); its axes count them."""
    from matplotlib.figure import Figure

    height, width = canvas.shape[:2]
    figure = Figure(figsize=(width / 110, height / 110), dpi=110)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    axes.set_gid(CANVAS)
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    if title:
        axes.text(margin, margin, title, fontsize=10.5, va="top", linespacing=1.35, color="#222222")
    return figure, axes


def _frame(axes: Axes, left: float, up: float, wide: float, high: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((left, up), wide, high, fill=False, edgecolor=colour, linewidth=2.2))
