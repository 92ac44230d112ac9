"""Figures of one look: a colour-blind-safe palette, labels with units, no pyplot state.

Colours are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), black first left out.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

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
    """Render a figure as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    stream = io.BytesIO()
    FigureCanvasAgg(figure).print_png(stream)  # type: ignore[no-untyped-call]
    return stream.getvalue()


def data_uri(figure: Any) -> str:
    """Render a figure as a ``data:`` address that HTML can embed."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(figure)).decode("ascii")


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
