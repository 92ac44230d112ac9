"""Figures of robot actions: what was demonstrated beside what its tokens say."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, ShapeError
from vertebra.pipelines.figures import MUTED, PALETTE, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_PANELS = 12
MOST_CHUNKS = 30

Floats = NDArray[np.floating[Any]]


def reconstruction_figure(
    original: Floats | None,
    pieces: Sequence[tuple[int, Floats]],
    *,
    names: Sequence[str],
    units: Sequence[str] = (),
    errors: Sequence[float] | None = None,
    fps: float | None = None,
    title: str = "",
    label: str = "decoded from tokens",
) -> Figure:
    """Draw decoded or predicted actions over the original ones, a panel a joint.

    Of more than 12 joints, those are drawn whose error is largest for their range, or the first ones where no errors
    are given; of more than 30 chunks, the first ones.

    Args:
        original: Actions (T, D); None where only the tokens are left.
        pieces: Of every chunk its first step and the decoded actions (N, D) of the steps it is used for.
        names: The D names of the joints.
        units: Their D units, empty where there is none.
        errors: Root-mean-square error of each joint in its unit.
        fps: Steps a second; None draws over steps.
        title: Over the figure.
        label: What the pieces are.

    Raises:
        ConfigError: There is no chunk to draw.
        ShapeError: An array, or a list, is not for D joints.
    """
    if not pieces:
        raise ConfigError("reconstruction_figure: must have a chunk to draw, got none; give at least one.")
    dims = len(names)
    units = list(units) or [""] * dims
    for values in [*(piece for _, piece in pieces), *([] if original is None else [original])]:
        if values.ndim != 2 or values.shape[1] != dims:
            raise ShapeError(f"reconstruction_figure: actions must be (N, {dims}), got {values.shape}.")
    if len(units) != dims or (errors is not None and len(errors) != dims):
        raise ShapeError(f"reconstruction_figure: units and errors must be {dims}, as the names.")
    whole = max(first + len(piece) for first, piece in pieces)
    pieces = pieces[:MOST_CHUNKS]
    shown = max(first + len(piece) for first, piece in pieces)
    scale = fps or 1.0
    columns = _chosen(original, errors, dims)
    across = 1 if len(columns) < 3 else 2 if len(columns) < 7 else 3
    rows = math.ceil(len(columns) / across)
    figure, panels = new_figure(rows, across, width=(9.5, 10.5, 12.0)[across - 1], height=1.0 + 1.75 * rows)
    for axes in panels[len(columns) :]:
        axes.set_axis_off()
    x, y = _broken(pieces)
    for axes, column in zip(panels, columns, strict=False):
        for first, _ in pieces:
            axes.axvline(first / scale, color="#D0D0D0", linewidth=0.8, linestyle=(0, (2, 2)), zorder=1)
        axes.plot(x / scale, y[:, column], color=PALETTE[0], linewidth=2.2, alpha=0.8, zorder=2)
        if original is not None:
            axes.plot(np.arange(shown) / scale, original[:shown, column], color="#1A1A1A", linewidth=0.9, zorder=3)
        low, high = axes.get_ylim()
        least = 2e-3 * max(1.0, abs(low))  # so that what stands still looks still
        if high - low < least:
            axes.set_ylim((low + high - least) / 2, (low + high + least) / 2)
        unit = units[column]
        error = "" if errors is None else f"   RMSE {errors[column]:.2g}{f' {unit}' if unit else ''}"
        axes.set_title(shorten(names[column], 28, middle=True) + error, fontsize=9.5, loc="left", parse_math=False)
        axes.set_ylabel(unit, fontsize=9)
        axes.set_xlim(0, max(shown - 1, 1) / scale)
    what = "time (s)" if fps else "step"
    if shown < whole:
        what += f"; the first {shown / scale:,.3g} of {whole / scale:,.4g}"
    for axes in panels[max(0, len(columns) - across) : len(columns)]:
        axes.set_xlabel(what, fontsize=9)
    left = "" if len(columns) == dims else f"{len(columns)} of {dims} joints" + (
        "" if errors is None else ", those with the largest errors for their range"
    )  # fmt: skip
    figure.suptitle(
        "\n".join(filter(None, [shorten(title, 110, middle=True), left])), fontsize=11, x=0.01, ha="left",
        parse_math=False,
    )  # fmt: skip
    _legend(figure, original is not None, label)
    return figure


def paths_figure(
    tip: Floats, carried: Floats | None, goals: Floats, success: NDArray[np.bool_], *, most: int = 60
) -> Figure:
    """Draw paths of simulated episodes from above and from the side, coloured by success.

    Where something is carried, that is its path, and the gripper's is grey.

    Args:
        tip: Paths of the gripper in m, (E, T, 3).
        carried: Paths of what is moved, (E, T, 3); None where nothing is.
        goals: (E, 3).
        success: Which episodes ended at the goal, (E,).
        most: Episodes that are drawn.
    """
    figure, panels = new_figure(1, 2, width=10.0, height=4.6)
    for axes, (x, y), view in zip(panels, ((0, 1), (0, 2)), ("from above", "from the side"), strict=True):
        for number in range(min(len(tip), most)):
            color = PALETTE[0] if success[number] else PALETTE[1]
            moved = tip if carried is None else carried
            if carried is not None:
                axes.plot(tip[number, :, x], tip[number, :, y], color=MUTED, linewidth=0.5, alpha=0.6)
                axes.plot(*carried[number, 0, [x, y]], marker="s", color=color, markersize=4, fillstyle="none")
            axes.plot(moved[number, :, x], moved[number, :, y], color=color, linewidth=1.1)
            axes.plot(*goals[number, [x, y]], marker="o" if success[number] else "x", color=color, markersize=4)
        axes.set_xlabel("x (m)")
        axes.set_ylabel(f"{'xyz'[y]} (m)")
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_title(view, fontsize=10, loc="left")
    shown = "" if len(tip) <= most else f"; the first {most} are drawn"
    figure.suptitle(f"{int(success.sum()):,} of {len(success):,} episodes reached the goal{shown}", x=0.01, ha="left")
    from matplotlib.lines import Line2D

    lines = []
    if carried is not None:
        lines.append(Line2D([], [], color=MUTED, linewidth=0.8, label="gripper"))
        lines.append(
            Line2D([], [], color=MUTED, marker="s", fillstyle="none", markersize=4, linewidth=0, label="what is moved")
        )
    for color, marker, text in ((PALETTE[0], "o", "goal reached"), (PALETTE[1], "x", "missed")):
        lines.append(Line2D([], [], color=color, marker=marker, markersize=4, linewidth=1.1, label=text))
    figure.legend(handles=lines, loc="outside lower right", ncols=len(lines), frameon=False, fontsize=9)
    return figure


def _chosen(original: Floats | None, errors: Sequence[float] | None, dims: int) -> list[int]:
    """The columns to draw, in their order."""
    if dims <= MOST_PANELS or errors is None or original is None:
        return list(range(min(dims, MOST_PANELS)))
    share = np.asarray(errors) / np.maximum(np.ptp(original, axis=0), 1e-9)
    return sorted(np.argsort(-share, kind="stable")[:MOST_PANELS].tolist())


def _broken(pieces: Sequence[tuple[int, Floats]]) -> tuple[Floats, Floats]:
    """Steps and values of all pieces with a hole behind each, so that a jump is not drawn as a line."""
    steps, values = [], []
    for first, piece in pieces:
        steps.append(np.arange(first, first + len(piece) + 1, dtype=np.float64))
        values.append(np.concatenate([piece, np.full((1, piece.shape[1]), np.nan)]))
    return np.concatenate(steps), np.concatenate(values)


def _legend(figure: Figure, with_original: bool, label: str) -> None:
    from matplotlib.lines import Line2D

    lines = [
        Line2D([], [], color=PALETTE[0], linewidth=2.2, alpha=0.8, label=label),
        Line2D([], [], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), label="a chunk begins"),
    ]
    if with_original:
        lines.insert(0, Line2D([], [], color="#1A1A1A", linewidth=0.9, label="original"))
    figure.legend(handles=lines, loc="outside lower right", ncols=len(lines), frameon=False, fontsize=9)
