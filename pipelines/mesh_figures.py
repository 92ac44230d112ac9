"""Figures that compare meshes and clouds of points: from four sides, and as sheets of many."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from vertebra.errors import ConfigError
from vertebra.pipelines.figures import shorten
from vertebra.pipelines.mesh_render import (
    BLUE,
    THREE_QUARTER,
    Floats,
    Frame,
    Image,
    View,
    check_mesh,
    check_points,
    render,
    render_points,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

VIEWS: dict[str, View] = {"front": (0, 12), "right": (90, 12), "back": (180, 12), "from above": (40, 32)}
"""The sides that ``four_views`` shows; a little from above, so that tops are seen."""
GREEN, ORANGE = "#86C5A4", "#E8B27A"
"""Colours of true and of other shapes; inputs are ``GREY`` and outputs ``BLUE``."""


@dataclass(frozen=True, eq=False)
class Panel:
    """A mesh, or a cloud of points, of a figure or viewer.

    Args:
        vertices: (V, 3); of points also (V, 6), with their normals.
        faces: (F, 3) vertices of each triangle; None for points.
        label: What it is, such as "output".
        note: A further line of its caption.
        colour: Such as "#7FB2DC".
        wire: Whether edges are drawn, where faces are large enough for that.
    """

    vertices: ArrayLike
    faces: ArrayLike | None = None
    label: str = ""
    note: str = ""
    colour: str = BLUE
    wire: bool = True

    @property
    def counts(self) -> str:
        """How many vertices and faces, or points, in words."""
        count = len(np.asarray(self.vertices))
        if self.faces is None:
            return f"{count:,} point{'s' * (count != 1)}"
        faces = len(np.asarray(self.faces))
        return f"{count:,} {'vertex' if count == 1 else 'vertices'}, {faces:,} face{'s' * (faces != 1)}"

    @property
    def places(self) -> Floats:
        """The (V, 3) vertices or points without their normals; of a mesh, those that a face uses."""
        if self.faces is None:
            return check_points(self.vertices)[0]
        points, corners = check_mesh(self.vertices, self.faces)
        return points[np.unique(corners)]

    def draw(self, view: View, size: int, frame: Frame | None = None) -> Image:
        """Draw it as ``render`` or ``render_points`` do, uint8 (size, size, 3)."""
        if self.faces is None:
            return render_points(self.vertices, *view, size, colour=self.colour, frame=frame)
        mesh = _Triangles(self.vertices, self.faces)
        return render(mesh, *view, size, wire=self.wire, colour=self.colour, frame=frame)


class _Triangles(NamedTuple):
    vertices: ArrayLike
    faces: ArrayLike


def four_views(*panels: Panel, title: str = "", size: int = 220) -> Figure:
    """Draw meshes or points, one a row and all at one scale, from the front, the right, the back and above.

    Args:
        panels: Such as the input, the output and, where it is known, the true one; with labels.
        title: Over the figure.
        size: Pixels of a picture's side.

    Raises:
        ConfigError: There is no panel.
        ShapeError: An array has another shape than ``Panel`` says.
        DataError: A number is not finite, or a face names a vertex that does not exist.
    """
    if not panels:
        raise ConfigError("four_views: must have something to draw, got no panels; give at least one.")
    frame = Frame.around([panel.places for panel in panels], list(VIEWS.values()))
    left, top, gap = 178, 22, 8
    canvas = _Canvas(left + len(VIEWS) * (size + gap) + 6, title)
    canvas.extend(top + len(panels) * (size + gap))
    for column, name in enumerate(VIEWS):
        canvas.write(left + column * (size + gap) + size / 2, canvas.top + 8, name, 9, "#666666", across="center")
    for row, panel in enumerate(panels):
        y = canvas.top + top + row * (size + gap)
        lines = [line for line in (*panel.counts.split(", "), *textwrap.wrap(panel.note, 27)) if line]
        middle = y + size / 2 - 9 * len(lines)
        canvas.write(14, middle, shorten(panel.label, 22), 11, "#222222", bold=True)
        for number, line in enumerate(lines):
            canvas.write(14, middle + 22 + 17 * number, line, 8.5, "#555555")
        for column, view in enumerate(VIEWS.values()):
            canvas.paste(left + column * (size + gap), y, panel.draw(view, size, frame))
    return canvas.figure()


def sheet(
    rows: Sequence[tuple[str, Sequence[Panel | None]]],
    heads: Sequence[str] = (),
    *,
    title: str = "",
    view: View = THREE_QUARTER,
    size: int = 180,
    across: int = 1,
) -> Figure:
    """Draw many meshes or points: a name and a row of pictures at one scale, with their counts and notes below.

    Args:
        rows: Name and panels of each; None leaves a place empty.
        heads: Titles of the columns; those left out are the labels of the first row.
        title: Over the figure.
        view: Azimuth and elevation of the camera, in degrees.
        size: Pixels of a picture's side.
        across: Rows side by side.

    Raises:
        ConfigError: There is no row, or ``across`` is below 1.
        ShapeError: An array has another shape than ``Panel`` says.
        DataError: A number is not finite, or a face names a vertex that does not exist.
    """
    if not rows:
        raise ConfigError("sheet: must have something to draw, got no rows; give at least one.")
    if across < 1:
        raise ConfigError(f"sheet: across must be at least 1, got {across}; give the rows side by side.")
    columns = max(1, *(len(panels) for _, panels in rows))
    firsts = [panel.label if panel else "" for panel in rows[0][1]]
    named = [*heads, *firsts[len(heads) :]][:columns]
    notes = max(
        (len(textwrap.wrap(panel.note, size // 6)) for _, panels in rows for panel in panels if panel), default=0
    )
    gap, margin, apart = 10, 14, 26
    name_height = 20 if any(name for name, _ in rows) else 0
    across = min(across, len(rows))
    wide = columns * (size + gap) - gap
    high = name_height + size + 20 + 15 * notes + 12
    canvas = _Canvas(2 * margin + across * (wide + apart) - apart, title)
    begin = 22 if any(named) else 0
    canvas.extend(begin + math.ceil(len(rows) / across) * high)
    for block in range(across):
        for column, head in enumerate(named):
            x = margin + block * (wide + apart) + column * (size + gap) + size / 2
            canvas.write(x, canvas.top + 8, shorten(head, size // 7), 9.5, "#222222", across="center", bold=True)
    for number, (name, panels) in enumerate(rows):
        x = margin + number % across * (wide + apart)
        y = canvas.top + begin + number // across * high
        canvas.write(x, y + name_height / 2, shorten(name, wide // 7), 9, "#222222")
        frame = Frame.around([panel.places for panel in panels if panel], [view])
        for column, panel in enumerate(panels):
            if panel is None:
                continue
            at, below = x + column * (size + gap), y + name_height + size
            canvas.paste(at, y + name_height, panel.draw(view, size, frame))
            for line, text in enumerate([panel.counts, *textwrap.wrap(panel.note, size // 6)]):
                canvas.write(at + size / 2, below + 9 + 15 * line, text, 7.5, "#555555", across="center")
    return canvas.figure()


class _Canvas:
    """Pixels and the text over them."""

    def __init__(self, width: int, title: str) -> None:
        self.title = textwrap.wrap(title, max(20, width // 8))
        self.top = 10 + 20 * len(self.title) + 4 * bool(self.title)
        self.pixels = np.full((self.top, width, 3), 255, dtype=np.uint8)
        self.texts: list[tuple[float, float, str, dict[str, Any]]] = []
        for number, line in enumerate(self.title):
            self.write(14, 20 + 20 * number, line, 11, "#222222")

    def extend(self, rows: int) -> None:
        """Add white rows below."""
        self.pixels = np.pad(self.pixels, ((0, rows), (0, 0), (0, 0)), constant_values=255)

    def paste(self, x: int, y: int, image: Image) -> None:
        self.pixels[y : y + image.shape[0], x : x + image.shape[1]] = image

    def write(
        self, x: float, y: float, text: str, points: float, colour: str, *, across: str = "left", bold: bool = False
    ) -> None:
        """Write a line whose middle is at height ``y``."""
        weight = "bold" if bold else "normal"
        self.texts.append((x, y, text, {"fontsize": points, "color": colour, "ha": across, "fontweight": weight}))

    def figure(self) -> Figure:
        """Make a figure of exactly these pixels."""
        from matplotlib.figure import Figure

        height, width = self.pixels.shape[:2]
        figure = Figure(figsize=(width / 110, height / 110), dpi=110)
        axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
        axes.set_axis_off()
        axes.imshow(self.pixels, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
        for x, y, text, style in self.texts:
            axes.text(x, y, text, va="center", parse_math=False, **style)
        return figure
