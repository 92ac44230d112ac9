"""Closed bodies that procedural shapes are put together from: boxes, prisms, turned parts.

A body is a pair of vertices (V, 3) and faces (F, 3), closed, with outward faces. +Y is up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from itertools import product
from math import cos, pi

import numpy as np
from numpy.typing import ArrayLike, NDArray

Points = NDArray[np.float64]
Faces = NDArray[np.int64]
Body = tuple[Points, Faces]

# Columns of (x0, x1, y0, y1, z0, z1): the lower ring, then the upper one, counter-clockwise as seen from above.
_BOX = np.array([[x, y, z] for y in (2, 3) for x, z in ((1, 5), (1, 4), (0, 4), (0, 5))])


def box(x0: float, x1: float, y0: float, y1: float, z0: float, z1: float) -> Body:
    """Return a box along the axes, 12 faces."""
    return np.array([x0, x1, y0, y1, z0, z1], dtype=np.float64)[_BOX], _loft_faces(2, 4, False, False)


def loft(rings: ArrayLike, *, wrap: bool = False, fan: bool = False) -> Body:
    """Join rings of corners.

    Args:
        rings: (levels, sides, 3), each counter-clockwise as seen from the next.
        wrap: Join the last ring to the first; otherwise flat ends close the body.
        fan: Ends are fans from their last corner, which must see all others; otherwise strips, for convex ends.
    """
    corners = np.asarray(rings, dtype=np.float64)
    return corners.reshape(-1, 3), _loft_faces(corners.shape[0], corners.shape[1], wrap, fan)


def turned(sides: int, levels: Sequence[tuple[float, float]], at: tuple[float, float] = (0, 0)) -> Body:
    """Return an upright part with polygons across.

    Args:
        sides: Of the polygons.
        levels: Radius and y from below; the radius is that of the inner circle, so that a square has half its side.
        at: x and z of the axis.
    """
    return loft([_level(polygon(sides) * radius + at, y) for radius, y in levels])


def tube(sides: int, levels: Sequence[tuple[float, float]]) -> Body:
    """Return a ring around the y axis from (radius, y): up its outer side, then down its inner one."""
    return loft([_level(polygon(sides) * radius, y) for radius, y in levels], wrap=True)


def extrude(outline: ArrayLike, z0: float, z1: float) -> Body:
    """Return a prism along z of convex x and y (N, 2), counter-clockwise as seen from +Z."""
    front = np.asarray(outline, dtype=np.float64)
    return loft([np.column_stack([front, np.full(len(front), z)]) for z in (z0, z1)])


def across(outline: ArrayLike, x0: float, x1: float) -> Body:
    """Return a prism along x of z and y (N, 2), clockwise with z to the right; the last corner must see all others."""
    side = np.asarray(outline, dtype=np.float64)
    return loft([np.column_stack([np.full(len(side), x), side[:, 1], side[:, 0]]) for x in (x0, x1)], fan=True)


def hip(x: float, z: float, y0: float, y1: float, ridge: float) -> Body:
    """Return a roof over the rectangle of half sides ``x`` and ``z``, whose ridge runs ``ridge`` to both ends of z.

    The ridge may be as long as the roof (a gable) or 0 (a pyramid).
    """
    corners = [(x, y0, z), (x, y0, -z), (-x, y0, -z), (-x, y0, z)]
    if ridge == 0:
        return np.array([*corners, (0.0, y1, 0.0)]), _PYRAMID
    return np.array([*corners, (0.0, y1, ridge), (0.0, y1, -ridge)]), _HIP


_PYRAMID = np.array([[0, 3, 2], [0, 2, 1], [0, 1, 4], [1, 2, 4], [2, 3, 4], [3, 0, 4]])
_HIP = np.array([[0, 3, 2], [0, 2, 1], [0, 1, 5], [0, 5, 4], [1, 2, 5], [2, 3, 4], [2, 4, 5], [3, 0, 4]])


def quarter_turn(body: Body) -> Body:
    """Turn a body about the y axis so that its +X side looks along -Z."""
    vertices, faces = body
    return vertices[:, [2, 1, 0]] * (1.0, 1.0, -1.0), faces


def join(bodies: Iterable[Body]) -> Body:
    """Return all bodies as one pair of arrays; they share no vertex."""
    parts = list(bodies)
    starts = np.cumsum([0] + [len(vertices) for vertices, _ in parts])
    return (
        np.concatenate([vertices for vertices, _ in parts]),
        np.concatenate([faces + start for (_, faces), start in zip(parts, starts, strict=False)]),
    )


def split_long_edges(vertices: Points, faces: Faces, share: float = 0.75) -> Body:
    """Halve all edges longer than ``share`` of the longest one, with all faces at them: closed bodies stay closed."""
    sides = np.sort(faces[:, [[0, 1], [1, 2], [2, 0]]], axis=2).reshape(-1, 2)  # (3 F, 2)
    key, back = np.unique(sides[:, 0] * len(vertices) + sides[:, 1], return_inverse=True)
    ends = np.stack([key // len(vertices), key % len(vertices)], 1)
    length = np.linalg.norm(vertices[ends[:, 0]] - vertices[ends[:, 1]], axis=1)
    long = length > share * length.max()
    middle = np.full(len(key), -1)
    middle[long] = len(vertices) + np.arange(long.sum())
    middles = middle[back].reshape(-1, 3)  # (F, 3) of edges 01, 12, 20; -1 where the edge stays
    count = (middles >= 0).sum(1)
    # Turned so that one split edge is 01, and two are 01 and 12.
    first = np.where(count == 1, (middles >= 0).argmax(1), (middles < 0).argmax(1) + 1) * (count % 3 > 0)
    order = (first[:, None] + np.arange(3)) % 3
    corner = np.concatenate([np.take_along_axis(x, order, 1) for x in (faces, middles)], 1)  # (F, 6) a b c ab bc ca
    done = [corner[count == split][:, pattern].reshape(-1, 3) for split, pattern in enumerate(_SPLITS)]
    return np.concatenate([vertices, vertices[ends[long]].mean(1)]), np.concatenate(done)


_SPLITS = (  # faces in place of one that has 0, 1, 2 or 3 split edges
    [[0, 1, 2]],
    [[0, 3, 2], [3, 1, 2]],
    [[3, 1, 4], [0, 3, 4], [0, 4, 2]],
    [[0, 3, 5], [3, 1, 4], [5, 4, 2], [3, 4, 5]],
)


@cache
def polygon(sides: int) -> Points:
    """Return x and z (N, 2) of a regular polygon around the unit circle, counter-clockwise from above, a side at +X."""
    angle = 2 * pi * (np.arange(sides) + 0.5) / sides
    return np.stack([np.cos(angle), -np.sin(angle)], 1) / cos(pi / sides)


@cache
def _loft_faces(levels: int, sides: int, wrap: bool, fan: bool) -> Faces:
    faces: list[tuple[int, int, int]] = []
    for level, i in product(range(levels if wrap else levels - 1), range(sides)):
        low, high, j = level * sides, (level + 1) % levels * sides, (i + 1) % sides
        faces += [(low + i, low + j, high + j), (low + i, high + j, high + i)]
    if not wrap:
        left, right, end = 0, sides - 1, []
        while right - left > 1:
            if fan or (left + sides - 1 - right) % 2 == 0:
                end.append((left, left + 1, right))
                left += 1
            else:
                end.append((left, right - 1, right))
                right -= 1
        top = (levels - 1) * sides
        faces += [(a + top, b + top, c + top) for a, b, c in end] + [(c, b, a) for a, b, c in end]
    return np.array(faces, dtype=np.int64)


def _level(outline: Points, y: float) -> Points:
    """Lift x and z (N, 2) to height ``y``: (N, 3)."""
    return np.stack([outline[:, 0], np.full(len(outline), y), outline[:, 1]], 1)
