"""Procedural furniture and houses: clean meshes of few faces, as many as training asks for.

A shape is a family and its parameters; the same parameters give the same mesh. +Y is up, the front looks along +Z, and
the box is centred with its longest side 1. A mesh is a set of closed bodies with outward faces, as artists build them,
that touch but do not overlap, and nearly all edges lie along the axes. Lengths among the parameters are those before
that scaling, about shares of the longest side. Parts and the gaps between them are wide enough that all faces survive
rounding to 128 steps a side.

Test shapes differ from training shapes in kind, not only in digits: the space of parameters is cut into cells, and
whole cells belong to one split (:func:`split_of`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise, product

import numpy as np
import trimesh

from vertebra.domains.mesh.solids import (
    Body,
    Faces,
    Points,
    across,
    box,
    extrude,
    hip,
    join,
    quarter_turn,
    split_long_edges,
    tube,
    turned,
)
from vertebra.errors import ConfigError, DataError, UnknownNameError

SPLITS = ("train", "val", "test")
_CUTS = 4  # cells that a length's range is cut into
_TRIES = 2000  # a split has about one cell in ten, so that so many draws do not all miss it
_THIN = 0.03  # of parts that no parameter sets: nearly 4 steps of 128

Parameters = Mapping[str, float | int | str]


@dataclass(frozen=True)
class Span:
    """A length or ratio drawn evenly from ``low`` to ``high``."""

    low: float
    high: float


@dataclass(frozen=True)
class _Family:
    """What a family's shapes may be.

    Attributes:
        space: A range or choices for every parameter; a choice named twice is drawn twice as often.
        cells: The parameters whose cells are held out.
        parts: Makes the bodies.
    """

    space: Mapping[str, Span | tuple[int, ...] | tuple[str, ...]]
    cells: tuple[str, ...]
    parts: Callable[..., list[Body]]


def draw_parameters(rng: np.random.Generator, family: str, split: str) -> dict[str, float | int | str]:
    """Draw the parameters of a shape: each evenly over its range or choices, until their cell is of the split.

    Args:
        rng: Where the draws come from.
        family: One of :data:`FAMILIES`.
        split: One of :data:`SPLITS`.

    Raises:
        UnknownNameError: No such family or split.
        DataError: The split was not met in 2,000 draws.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    space = _family(family).space
    for _ in range(_TRIES):
        drawn: dict[str, float | int | str] = {}
        for name, room in space.items():
            if isinstance(room, Span):
                drawn[name] = round(room.low + (room.high - room.low) * rng.random(), 4)
            else:
                drawn[name] = room[int(rng.integers(len(room)))]
        if split_of(family, drawn) == split:
            return drawn
    raise DataError(f"{family}: {_TRIES:,} draws met no cell of the split {split!r}; draw from another split.")


def split_of(family: str, parameters: Parameters) -> str:
    """Return ``"train"``, ``"val"`` or ``"test"``, about 80, 10 and 10 of 100 shapes.

    A cell of the parameter space is the kinds of a shape's parts together with the quarter of its range that each of
    its main measures lies in. A hash of the cell, the same on every machine, decides; no two splits share a cell.
    """
    chosen = _family(family)
    cell = [family]
    for name in chosen.cells:
        room, value = chosen.space[name], parameters[name]
        if isinstance(room, Span):
            value = min(int((float(value) - room.low) / (room.high - room.low) * _CUTS), _CUTS - 1)
        cell.append(f"{name}={value}")
    digit = int.from_bytes(blake2b("|".join(cell).encode(), digest_size=8).digest(), "big") % 10
    return "val" if digit == 8 else "test" if digit == 9 else "train"


def build(family: str, parameters: Parameters) -> tuple[Points, Faces]:
    """Build a mesh.

    Args:
        family: One of :data:`FAMILIES`.
        parameters: As :func:`draw_parameters` returns them: every name of the family, within its range or choices.

    Returns:
        Vertices (V, 3) in [-0.5, 0.5], and outward faces (F, 3).

    Raises:
        UnknownNameError: No such family.
        ConfigError: A parameter is missing, unknown or out of range.
    """
    chosen = _family(family)
    space = chosen.space
    if parameters.keys() != space.keys():
        odd = ", ".join(sorted(parameters.keys() ^ space.keys()))
        raise ConfigError(f"{family}: missing or unknown parameters: {odd}; pass exactly {', '.join(space)}.")
    for name, value in parameters.items():
        room = space[name]
        if isinstance(room, Span):
            if isinstance(value, str) or not room.low <= value <= room.high:
                raise ConfigError(f"{family}: {name} is {value!r}; it must lie between {room.low} and {room.high}.")
        elif value not in room:
            choices = ", ".join(map(repr, dict.fromkeys(room)))
            raise ConfigError(f"{family}: {name} is {value!r}; choose one of {choices}.")
    vertices, faces = join(chosen.parts(**parameters))
    low, high = vertices.min(0), vertices.max(0)
    # Rounded, so that vertices in one plane stay so to the last digit: x = 0 is a border of cells of an even grid.
    return np.round((vertices - (low + high) / 2) / (high - low).max(), 6) + 0.0, faces


def draw(split: str, seed: int, index: int) -> trimesh.Trimesh:
    """Draw the shape of that number; families take turns.

    Args:
        split: One of :data:`SPLITS`.
        seed: Seed of the set, at least 0.
        index: Number of the shape, at least 0.

    Returns:
        A mesh of 20 to 400 faces in the box [-0.5, 0.5], whose ``metadata`` holds ``family`` and ``parameters``.

    Raises:
        UnknownNameError: No such split.
    """
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    family = FAMILIES[index % len(FAMILIES)]
    parameters = draw_parameters(rng, family, split)
    vertices, faces = build(family, parameters)
    return _mesh(vertices, faces, {"family": family, "parameters": parameters})


def dense(mesh: trimesh.Trimesh, rng: np.random.Generator, faces: int = 4000, noise: float = 0.003) -> trimesh.Trimesh:
    """Turn a clean mesh into one like a scan: small faces and rough.

    The longest edges are halved, with all faces at them, so that closed bodies stay closed.

    Args:
        mesh: A clean mesh.
        rng: Where the noise comes from.
        faces: Least number of faces; there are seldom more than twice as many.
        noise: Standard deviation of each coordinate's noise as a share of the longest side.

    Raises:
        ConfigError: There is no face, or ``faces`` or ``noise`` is negative.
    """
    if not len(mesh.faces) or faces < 0 or noise < 0:
        raise ConfigError("dense needs a mesh with faces, and faces and noise of at least 0.")
    points, triangles = np.array(mesh.vertices, dtype=np.float64), np.array(mesh.faces, dtype=np.int64)
    while len(triangles) < faces:
        points, triangles = split_long_edges(points, triangles)
    points = points + rng.normal(0, noise * np.ptp(points, axis=0).max(), points.shape)
    return _mesh(points, triangles, dict(mesh.metadata))


def _mesh(vertices: Points, faces: Faces, metadata: dict[str, object]) -> trimesh.Trimesh:
    return trimesh.Trimesh(vertices, faces, process=False, validate=False, metadata=metadata)


def _family(name: str) -> _Family:
    if name not in _FAMILIES:
        raise UnknownNameError("family", name, FAMILIES)
    return _FAMILIES[name]


def _sides(inner: float, outer: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return the range from ``inner`` to ``outer`` on both sides of 0."""
    return (-outer, -inner), (inner, outer)


def _spread(count: int, low: float, high: float, size: float) -> list[tuple[float, float]]:
    """Return ``count`` ranges of ``size`` between ``low`` and ``high``, with equal gaps, at the ends too."""
    gap = (high - low - count * size) / (count + 1)
    return [(low + gap + i * (size + gap), low + (i + 1) * (size + gap)) for i in range(count)]


# --- families ---------------------------------------------------------------------------------------------------------


def _table(*, style: str, depth: float, height: float, thickness: float, leg: float, sides: int) -> list[Body]:
    x, z, below = 0.5, depth / 2, height - thickness
    if style in ("round", "pedestal"):
        top = turned(sides, [(z, below), (z, height)])
        if style == "pedestal":
            foot = 0.6 * z
            return [top, turned(sides, [(foot, 0), (foot, 0.05)]), turned(4, [(leg, 0.05), (leg, below)])]
        x = z = 0.7 * z  # so that the corners of the legs are below the top
    else:
        top = box(-x, x, below, height, -z, z)
        x, z = x - 0.03, z - 0.03
    if style in ("panels", "desk"):
        parts = [top, box(-x, -x + leg, 0, below, -z, z)]
        if style == "panels":
            y = 0.3 * height
            return [*parts, box(x - leg, x, 0, below, -z, z), box(-x + leg, x - leg, y, y + _THIN, -z, z)]
        block = x - 0.3  # a chest of three drawers
        parts += [box(block, x, 0, below, -z, z - _THIN), box(-x + leg, block, 0.4 * below, below, -z, -z + _THIN)]
        drawers = _spread(3, 0, below, 0.26 * below)
        return [*parts, *(box(block + _THIN, x - _THIN, y0, y1, z - _THIN, z) for y0, y1 in drawers)]
    legs = product(_sides(x - leg, x), _sides(z - leg, z))
    parts = [top, *(box(x0, x1, 0, below, z0, z1) for (x0, x1), (z0, z1) in legs)]
    if style == "shelf":
        y = 0.25 * height
        parts.append(box(-x + leg, x - leg, y, y + _THIN, -z, z))
    elif style == "apron":
        y = below - 0.15 * height
        parts += [box(-x + leg, x - leg, y, below, z0, z1) for z0, z1 in _sides(z - _THIN, z)]
        parts += [box(x0, x1, y, below, -z + leg, z - leg) for x0, x1 in _sides(x - _THIN, x)]
    return parts


def _chair(
    *, back: str, base: str, width: float, depth: float, seat: float, leg: float, count: int, arms: int
) -> list[Body]:
    x, z, under = width / 2, depth / 2, seat - 0.05
    parts = [box(-x, x, under, seat, -z, z)]
    if base == "pedestal":
        foot = 0.8 * min(x, z)
        parts += [turned(6, [(foot, 0), (foot, 0.04)]), turned(4, [(0.7 * leg, 0.04), (0.7 * leg, under)])]
    elif base == "sled":
        for x0, x1 in _sides(x - 0.02 - leg, x - 0.02):
            parts.append(box(x0, x1, 0, _THIN, -z, z))
            parts += [box(x0, x1, _THIN, under, z0, z1) for z0, z1 in _sides(z - 0.02 - leg, z - 0.02)]
    else:
        for (x0, x1), (z0, z1) in product(*(_sides(side - 0.02 - leg, side - 0.02) for side in (x, z))):
            parts.append(box(x0, x1, 0, under, z0, z1))
    front, inner = -z + leg, x - leg
    if back == "panel":
        parts.append(box(-x, x, seat, 1, -z, front))
    elif back != "none":
        parts += [box(x0, x1, seat, 1, -z, front) for x0, x1 in _sides(inner, x)]
        if back == "slats":
            parts.append(box(-inner, inner, 0.9, 0.98, -z, front))
            bars = _spread(count, -inner, inner, _THIN)
            parts += [box(x0, x1, seat, 0.9, -z, -z + _THIN) for x0, x1 in bars]
        else:
            parts += [box(-inner, inner, y0, y1, -z, -z + _THIN) for y0, y1 in _spread(count, seat, 1, 0.08)]
    if arms and back != "none":
        y = seat + 0.2
        for x0, x1 in _sides(inner, x):
            parts.append(box(x0, x1, y, y + 0.04, front, z))
            parts.append(box(x0, x1, seat, y, z - 0.02 - leg, z - 0.02))
    return parts


def _shelf(
    *, style: str, width: float, height: float, depth: float, thickness: float, boards: int, columns: int, back: int
) -> list[Body]:
    x, z, t = width / 2, depth / 2, thickness
    uprights = [(-z, z)] if style != "posts" else _sides(z - t, z)
    parts = [box(x0, x1, 0, height, z0, z1) for (x0, x1), (z0, z1) in product(_sides(x - t, x), uprights)]
    inner, low = x - t, 0.0 if style == "case" else 0.08
    rear = -z + _THIN if back else -z
    if style == "plinth":
        parts.append(box(-inner, inner, 0, low, -z, z - 0.04))
    if back:
        parts.append(box(-inner, inner, low, height, -z, rear))
    step = (height - low - t) / (boards - 1)
    floors = [low + i * step for i in range(boards)]
    parts += [box(-inner, inner, y, y + t, rear, z) for y in floors]
    walls = _spread(columns - 1, -inner, inner, t)
    for y, above in pairwise(floors):
        parts += [box(x0, x1, y + t, above, rear, z - 0.02) for x0, x1 in walls]
    return parts


def _lamp(
    *, style: str, height: float, base: float, pole: float, shade: float, drop: float, flare: float, sides: int
) -> list[Body]:
    lower, upper, rim = shade, flare * shade, height - drop
    if style == "arm":  # from which the shade hangs to the front
        reach, under = shade + base, height - 0.06
        return [
            turned(sides, [(base, 0), (base, 0.05)]),
            box(-pole, pole, 0.05, height, -pole, pole),
            box(-pole, pole, under, height, pole, reach + pole),
            turned(sides, [(lower, under - drop), (upper, under)], (0, reach)),
        ]
    parts = [
        turned(sides, [(base, 0), (base, 0.05)]),
        tube(sides, [(lower, rim), (upper, height), (upper - _THIN, height), (lower - _THIN, rim)]),
    ]
    start = 0.05
    if style == "table":  # a bellied stand
        belly, start = 0.05 + 0.25 * (rim - 0.05), 0.05 + 0.6 * (rim - 0.05)
        parts.append(turned(sides, [(0.6 * base, 0.05), (0.9 * base, belly), (2 * pole, start)]))
    end = height - 0.05
    parts.append(turned(4, [(pole, start), (pole, end)]))
    # Two spokes hold the shade; they end at its wall.
    wall = upper + (lower - upper) * 0.05 / drop - _THIN
    return [*parts, *(box(x0, x1, end - _THIN, end, -pole, pole) for x0, x1 in _sides(pole, wall))]


def _stairs(
    *, style: str, steps: int, width: float, slope: float, rails: str, landing: int
) -> list[Body]:  # fmt: skip
    x, tread = width / 2, 1 / steps
    rise = slope * tread
    heights = [rise * (i + 1) for i in range(steps)]
    # Steps go from z = 0 to the rear; the last one is deeper where there is a landing.
    edges = [-tread * i for i in range(steps)] + [-1 - 2 * tread * landing]
    top, rear = heights[-1], edges[-1]
    if style == "solid":
        outline = [(z, y) for i, y in enumerate(heights) for z in edges[i : i + 2]][::-1]
        parts = [across([*outline, (0, 0), (rear, 0)], -x, x)]
    elif style == "stacked":
        parts = [box(-x, x, y - rise, y, rear, front) for y, front in zip(heights, edges, strict=False)]
    else:
        parts = [box(-x, x, y - 0.5 * rise, y, edges[i + 1], edges[i]) for i, y in enumerate(heights)]
        over, under = 0.4 * rise, 1.5 * rise  # how far the two beams beside the steps reach
        beam = [
            (-1, top - under),
            (-1, top + over),
            (-1 + tread, top + over),
            (0, rise + over),
            (0, 0),
            (-1.5 * tread, 0),
        ]
        parts += [across(beam, x0, x1) for x0, x1 in _sides(x, x + 0.04)]
        if landing:
            parts += [box(x0, x1, 0, top - 0.5 * rise, rear, rear + 0.05) for x0, x1 in _sides(x - 0.05, x)]
    for x0, x1 in {"none": (), "one": _sides(x - _THIN, x)[1:], "both": _sides(x - _THIN, x)}[rails]:
        # Along the middles of steps, 0.25 over them.
        def height(z: float) -> float:
            return (0.5 - z / tread) * rise + 0.25

        first, last = -0.5 * tread + _THIN / 2, -1 + 0.5 * tread - _THIN / 2
        rail = [
            (last, height(last)),
            (last, height(last) + 0.04),
            (first, height(first) + 0.04),
            (first, height(first)),
        ]
        parts.append(across(rail, x0, x1))
        for i in sorted({*range(0, steps, 3), steps - 1}):
            z0, z1 = -(i + 0.5) * tread - _THIN / 2, -(i + 0.5) * tread + _THIN / 2
            post = [(z0, heights[i]), (z0, height(z0)), (z1, height(z1)), (z1, heights[i])]
            parts.append(across(post, x0, x1))
    return parts


def _house(
    *, roof: str, width: float, depth: float, story: float, stories: int, pitch: float, over: float, chimney: int,
    windows: str, entry: str,
) -> list[Body]:  # fmt: skip
    x, z, wall = width / 2, depth / 2, story * stories
    parts = [box(-x, x, 0, wall, -z, z), *_roof(roof, x + over, z + over, wall, pitch, chimney)]
    # Doors and windows are plates on the walls.
    sill = 0.04 if entry != "plain" else 0.0
    parts.append(box(-0.06, 0.06, sill, 0.22, z, z + _THIN))
    if sill:
        parts.append(box(-0.11, 0.11, 0, sill, z, z + 0.16))
    if entry == "porch":
        parts.append(box(-0.11, 0.11, 0.25, 0.28, z, z + 0.16))
        parts += [box(x0, x1, sill, 0.25, z + 0.12, z + 0.15) for x0, x1 in _sides(0.07, 0.1)]
    for floor in range(stories) if windows != "none" else ():
        y0, y1 = (floor + 0.38) * story, (floor + 0.74) * story
        across_front = _spread(3, -x, x, 0.12)
        parts += [box(x0, x1, y0, y1, z, z + _THIN) for x0, x1 in across_front if floor or x0 * x1 > 0]
        if windows == "all":
            sides = product(_sides(x, x + _THIN), _spread(2, -z, z, 0.14))
            parts += [box(x0, x1, y0, y1, z0, z1) for (x0, x1), (z0, z1) in sides]
    return parts


def _roof(kind: str, x: float, z: float, y: float, pitch: float, chimney: int) -> list[Body]:
    """Return a roof over half sides ``x`` and ``z``, eaves and all."""
    if kind == "flat":
        roof = [box(-x, x, y, y + 0.05, -z, z)]
        return [*roof, box(0.3 * x, 0.3 * x + 0.1, y + 0.05, y + 0.15, -0.05, 0.05)] if chimney else roof
    if kind.endswith("side"):
        return [quarter_turn(part) for part in _roof(kind.removesuffix(" side"), z, x, y, pitch, chimney)]
    ridge = {"gable": z, "hip": 0.5 * z, "pyramid": 0.0}[kind]
    roof = [hip(x, z, y, y + pitch, ridge)]
    if chimney:  # stands on the slope that looks along +X
        x0, x1, top = 0.4 * x, 0.4 * x + 0.1, y + pitch + 0.06
        foot = [(at, y + pitch * (1 - at / x)) for at in (x0, x1)]
        at = -0.5 * z if kind == "gable" else 0.0
        roof.append(extrude([*foot, (x1, top), (x0, top)], at - 0.05, at + 0.05))
    return roof


_FAMILIES = {
    "table": _Family(
        {
            "style": ("legs", "apron", "shelf", "panels", "desk", "round", "pedestal"),
            "depth": Span(0.5, 1),
            "height": Span(0.4, 0.8),
            "thickness": Span(0.03, 0.07),
            "leg": Span(0.04, 0.08),
            "sides": (6, 8, 12),
        },
        ("style", "depth", "height"),
        _table,
    ),
    "chair": _Family(
        {
            "back": ("panel", "panel", "slats", "slats", "ladder", "ladder", "none"),
            "base": ("legs", "legs", "sled", "pedestal"),
            "width": Span(0.4, 0.6),
            "depth": Span(0.4, 0.55),
            "seat": Span(0.4, 0.5),
            "leg": Span(0.035, 0.06),
            "count": (2, 3, 4),
            "arms": (0, 0, 1),
        },
        ("back", "base", "width", "seat"),
        _chair,
    ),
    "shelf": _Family(
        {
            "style": ("case", "plinth", "posts"),
            "width": Span(0.4, 1),
            "height": Span(0.6, 1),
            "depth": Span(0.2, 0.4),
            "thickness": Span(0.03, 0.05),
            "boards": (3, 4, 5),
            "columns": (1, 1, 2, 3),
            "back": (0, 1),
        },
        ("style", "boards", "columns", "width", "height"),
        _shelf,
    ),
    "lamp": _Family(
        {
            "style": ("floor", "table", "arm"),
            "height": Span(0.6, 1),
            "base": Span(0.1, 0.16),
            "pole": Span(0.015, 0.025),
            "shade": Span(0.14, 0.24),
            "drop": Span(0.16, 0.28),
            "flare": Span(0.6, 1),
            "sides": (4, 6, 8, 12),
        },
        ("style", "sides", "height", "shade"),
        _lamp,
    ),
    "stairs": _Family(
        {
            "style": ("solid", "stacked", "beams"),
            "steps": (4, 5, 6, 7, 8, 9, 10),
            "width": Span(0.3, 0.8),
            "slope": Span(0.5, 0.9),
            "rails": ("none", "one", "both"),
            "landing": (0, 1),
        },
        ("style", "steps", "rails", "slope"),
        _stairs,
    ),
    "house": _Family(
        {
            "roof": ("gable", "gable side", "hip", "hip side", "pyramid", "flat"),
            "width": Span(0.6, 1),
            "depth": Span(0.6, 1),
            "story": Span(0.32, 0.42),
            "stories": (1, 1, 2),
            "pitch": Span(0.2, 0.4),
            "over": Span(0.04, 0.08),
            "chimney": (0, 1),
            "windows": ("none", "front", "all"),
            "entry": ("plain", "step", "porch"),
        },
        ("roof", "stories", "width", "depth"),
        _house,
    ),
}

FAMILIES = tuple(_FAMILIES)
"""Names of the families."""
