"""A small renderer in numpy: meshes with their edges, and clouds of points, to arrays of pixels.

The camera is orthographic and turns around +Y, which is up: azimuth 0 looks from +Z (the front), 90 from +X, and
elevation 90 from above. Vertices go to samples, several a pixel along each side; faces become rows of samples, the
nearest of a sample wins, and pixels are the means of their samples. Nothing is drawn at random: equal shapes give
equal bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vertebra.errors import ConfigError, DataError, ShapeError

Floats = NDArray[np.float64]
Singles = NDArray[np.float32]
Ints = NDArray[np.int64]
Image = NDArray[np.uint8]
View = tuple[float, float]
"""Azimuth and elevation of the camera, in degrees."""

THREE_QUARTER: View = (35, 25)
"""The view of single pictures."""
GREY, BLUE = "#A4ABB5", "#7FB2DC"
"""Colours of points and of meshes."""
INK = np.array([0.10, 0.12, 0.16], dtype=np.float32)
"""Colour of lines, 0 to 1."""
KEY_LIGHT = np.array([-0.35, 0.60, 0.72]) / np.sqrt(1.0009)
FILL_LIGHT = np.array([0.80, 0.05, 0.60]) / np.sqrt(1.0025)
"""Unit vectors towards the lights: right, up, towards the camera."""
AMBIENT, UPWARD, KEY, FILL = 0.46, 0.05, 0.50, 0.14
"""Light of any surface, of those that look up, and of the two lights; top, front and side of a box in
``THREE_QUARTER`` are told apart: 0.97, 0.71 and 0.58."""

_SAMPLES = 3  # along each side of a pixel
_MARGIN = 0.94  # of the picture that a frame fills
_CHUNK = 1 << 21  # samples at once
_DEPTHS = (1 << 31) - 1  # steps of the depth buffer


class Mesh(Protocol):
    """Anything with vertices (V, 3) and triangles (F, 3), such as a ``trimesh.Trimesh`` or a ``QuantizedMesh``."""

    @property
    def vertices(self) -> ArrayLike:
        """Places, (V, 3)."""

    @property
    def faces(self) -> ArrayLike:
        """Vertices of each triangle, (F, 3)."""


@dataclass(frozen=True, eq=False)
class Frame:
    """What a camera looks at; shapes that are compared share one.

    Args:
        centre: In the middle of the picture, (3,).
        radius: Distance from there that still is in the picture, up, down, left and right.
    """

    centre: Floats
    radius: float

    @classmethod
    def around(cls, shapes: Sequence[ArrayLike], views: Sequence[View] = ()) -> Frame:
        """Return the smallest frame about the middle of all points, (N, 3) each, that cuts none of them off.

        Args:
            shapes: Points; those of them without any do not count.
            views: The only views that count; none for all that there are.
        """
        arrays = [_points(s, "frame") for s in shapes]
        points = np.concatenate([*arrays, np.zeros((0, 3))])
        if not len(points):
            return cls(np.zeros(3), 1.0)
        centre = (points.min(0) + points.max(0)) / 2
        moved = points - centre
        if views:
            radius = max(float(np.abs(moved @ camera(view)[:2].T).max()) for view in views)
        else:
            radius = float(np.sqrt((moved**2).sum(1).max()))
        return cls(centre, radius or 1.0)


def camera(view: View) -> Floats:
    """Return the camera's axes as rows, (3, 3): to the right, up, and from the shape towards the camera."""
    azimuth, elevation = (math.radians(angle) for angle in view)
    sine, cosine = math.sin(azimuth), math.cos(azimuth)
    up, level = math.sin(elevation), math.cos(elevation)
    return np.array([[cosine, 0.0, -sine], [-sine * up, level, -cosine * up], [sine * level, up, cosine * level]])


def render(
    mesh: Mesh,
    azimuth: float = THREE_QUARTER[0],
    elevation: float = THREE_QUARTER[1],
    size: int = 320,
    *,
    wire: bool = True,
    colour: str = BLUE,
    frame: Frame | None = None,
) -> Image:
    """Draw a mesh on white: flat faces, lit from both sides, with thin lines along the edges that are seen.

    Lines fade where faces are only a few pixels large, so that dense meshes stay bright.

    Args:
        mesh: Faces without area are left out; none at all gives a white picture.
        azimuth: Of the camera, in degrees.
        elevation: Of the camera, in degrees.
        size: Pixels of a side.
        wire: Whether edges are drawn.
        colour: Of the surface, such as "#7FB2DC".
        frame: What the picture shows; None for the whole mesh.

    Returns:
        uint8 (size, size, 3).

    Raises:
        ShapeError: An array has another shape.
        DataError: A vertex is not finite, or a face names one that does not exist.
    """
    view = (azimuth, elevation)
    points, corners = check_mesh(mesh.vertices, mesh.faces)
    triangles = points[corners]  # (F, 3, 3)
    if frame is None:
        frame = Frame.around([triangles.reshape(-1, 3)], [view])
    seen, scale = _project(triangles, view, size, frame)  # (F, 3, 3): samples right, samples down, samples near
    first, second = seen[:, 1] - seen[:, 0], seen[:, 2] - seen[:, 0]
    normals = np.cross(first, second) * [1.0, -1.0, 1.0]  # (F, 3); down is up again
    lengths = np.linalg.norm(normals, axis=1)
    kept = np.abs(normals[:, 2]) > 1e-9 * np.maximum(lengths, 1e-9)
    seen, normals = seen[kept], normals[kept] / lengths[kept, None]
    side = size * _SAMPLES
    nearest = _rasterise(seen, side)  # (side * side,)
    covered = np.flatnonzero(nearest >= 0)
    face = _face(nearest[covered], len(seen))
    colours = (_light(normals)[:, None] * rgb(colour)).astype(np.float32)  # (F, 3)
    samples = colours[face]  # (N, 3)
    depth = _depth_map(nearest, covered, seen)
    ink = _outline(depth, side, covered, scale * frame.radius)
    if wire:
        ink = np.maximum(ink, _wires(seen, face, covered, side))
    samples += ink[:, None] * (INK - samples)
    return _compose(samples, covered, depth, size, scale * frame.radius)


def render_points(
    points: ArrayLike,
    azimuth: float = THREE_QUARTER[0],
    elevation: float = THREE_QUARTER[1],
    size: int = 320,
    *,
    colour: str = GREY,
    frame: Frame | None = None,
) -> Image:
    """Draw points on white as small balls, the farther the paler.

    With normals, a ball has the light of its surface, and those of the far side, which shine through between the near
    ones, are pale.

    Args:
        points: (N, 3); with normals of any length in three further columns (N, 6).
        azimuth: Of the camera, in degrees.
        elevation: Of the camera, in degrees.
        size: Pixels of a side.
        colour: Such as "#B4BAC2".
        frame: What the picture shows; None for all points.

    Returns:
        uint8 (size, size, 3).

    Raises:
        ShapeError: An array has another shape.
        DataError: A number is not finite.
    """
    places, facing = check_points(points)
    view = (azimuth, elevation)
    if frame is None:
        frame = Frame.around([places], [view])
    seen, scale = _project(places, view, size, frame)  # (N, 3)
    side, reach = size * _SAMPLES, scale * frame.radius
    # Balls cover about half of the picture once, and stay between a dot and a bead, in pixels, whatever their number.
    radius = _SAMPLES * float(np.clip(0.42 * size / math.sqrt(max(len(places), 1)), 0.9, 2.6))
    steps = np.arange(-math.ceil(radius), math.ceil(radius) + 1)
    down, right = (a.ravel() for a in np.meshgrid(steps, steps, indexing="ij"))
    inside = right**2 + down**2 <= radius**2
    right, down = right[inside], down[inside]  # (K,)
    height = np.sqrt(radius**2 - right**2 - down**2)
    nearest = np.full(side * side, -1, dtype=np.int64)
    low, span = _range(seen[:, 2], radius)
    column, row = (np.floor(seen[:, i]).astype(np.int64) for i in (0, 1))
    each = max(1, _CHUNK // len(right))
    for start in range(0, len(seen), each):
        x = column[start : start + each, None] + right  # (n, K)
        y = row[start : start + each, None] + down
        near = seen[start : start + each, 2, None] + height
        index = np.broadcast_to(np.arange(start, start + len(x))[:, None], x.shape)
        good = (x >= 0) & (x < side) & (y >= 0) & (y < side)
        _put(nearest, (y * side + x)[good], (near[good] - low) / span, index[good], len(seen))
    covered = np.flatnonzero(nearest >= 0)
    point = _face(nearest[covered], len(seen))
    x, y = covered % side - column[point], covered // side - row[point]
    bump = np.stack([x, -y, np.sqrt(np.maximum(radius**2 - x**2 - y**2, 0.0))], axis=1) / radius  # (M, 3)
    away = np.zeros(len(point))
    if facing is not None:
        turned = facing @ camera(view).T
        turned /= np.maximum(np.linalg.norm(turned, axis=1, keepdims=True), 1e-12)
        away = np.where(turned[point, 2] < 0, 0.6, 0.0)  # what shines through is seen to be behind
        # Mostly the light of the surface, and enough of the ball's own that single points are told apart.
        bump = 0.35 * bump + turned[point] * np.sign(turned[point, 2:] + 1e-9)
        bump /= np.maximum(np.linalg.norm(bump, axis=1, keepdims=True), 1e-12)
    pale = np.clip(0.5 - 0.5 * seen[point, 2] / max(reach, 1e-9), 0.0, 1.0)  # 0 near, 1 far
    pale = np.maximum(away, 0.55 * pale if facing is None else 0.3 * pale)
    samples = (_light(bump)[:, None] * rgb(colour) * (0.92 if facing is None else 1.0)).astype(np.float32)
    samples += (pale[:, None] * (0.96 - samples)).astype(np.float32)
    return _compose(samples, covered, None, size, reach)


def check_mesh(vertices: ArrayLike, faces: ArrayLike) -> tuple[Floats, Ints]:
    """Return vertices as float64 (V, 3) and faces as int64 (F, 3).

    Raises:
        ShapeError: An array has another shape.
        DataError: A vertex is not finite, or a face names one that does not exist.
    """
    points = _points(vertices, "vertices")
    corners = np.asarray(faces)
    corners = corners.reshape(-1, 3) if not corners.size else corners
    if corners.ndim != 2 or corners.shape[1] != 3:
        raise ShapeError(f"faces: expected triangles (F, 3), got {corners.shape}; triangulate first.")
    corners = corners.astype(np.int64)
    if corners.size and not (corners.min() >= 0 and corners.max() < len(points)):
        raise DataError(
            f"faces: must name vertices from 0 to {len(points) - 1}, got {corners.min()} to {corners.max()}; "
            "the mesh is broken."
        )
    return points, corners


def check_points(points: ArrayLike) -> tuple[Floats, Floats | None]:
    """Return the places of points, float64 (N, 3), and their normals or None.

    Args:
        points: (N, 3) or, with normals, (N, 6).

    Raises:
        ShapeError: The array has another shape.
        DataError: A number is not finite.
    """
    table = np.asarray(points, dtype=np.float64)
    if table.ndim == 2 and table.shape[1] == 6:
        return _points(table[:, :3], "points"), _points(table[:, 3:], "normals")
    return _points(table, "points"), None


def _points(value: ArrayLike, name: str) -> Floats:
    array = np.asarray(value, dtype=np.float64)
    array = array.reshape(-1, 3) if not array.size else array
    if array.ndim != 2 or array.shape[1] != 3:
        raise ShapeError(f"{name}: expected (N, 3), got {array.shape}; give one row a point.")
    if not np.isfinite(array).all():
        raise DataError(
            f"{name}: must be finite, row {int(np.argmin(np.isfinite(array).all(1)))} is not; leave it out."
        )
    return array


def _project(points: Floats, view: View, size: int, frame: Frame) -> tuple[Floats, float]:
    """Turn points (..., 3) into samples to the right, down and near, and tell the samples of a unit of length."""
    if size < 1:
        raise ConfigError(f"render: size must be at least 1, got {size}; give the pixels of a side.")
    side = size * _SAMPLES
    scale = _MARGIN * side / (2 * frame.radius)
    seen = (points - frame.centre) @ camera(view).T * scale
    seen[..., 1] *= -1
    seen[..., :2] += side / 2
    return seen, scale


def _rasterise(seen: Floats, side: int) -> Ints:
    """Key (depth and face) of the nearest face at the middle of every sample, (side * side,); -1 for none.

    Two faces with an edge in common never share a sample nor leave one out: both find the same crossing of edge and
    row, as every edge is followed downwards, and rows and columns take their lower end and not their upper one.
    """
    nearest = np.full(side * side, -1, dtype=np.int64)
    if not len(seen):
        return nearest
    order = np.argsort(seen[:, :, 1], axis=1, kind="stable")
    a, b, c = np.take_along_axis(seen, order[..., None], axis=1).transpose(1, 0, 2)  # (F, 3) each, downwards
    first = np.clip(np.ceil(a[:, 1] - 0.5), 0, side).astype(np.int64)
    rows = np.clip(np.ceil(c[:, 1] - 0.5), 0, side).astype(np.int64) - first
    with np.errstate(divide="ignore", invalid="ignore"):
        slopes = [(q[:, 0] - p[:, 0]) / (q[:, 1] - p[:, 1]) for p, q in ((a, c), (a, b), (b, c))]
        across, down = _gradients(seen)
    low, span = _range(seen[..., 2])
    face = np.repeat(np.arange(len(seen)), rows)  # (R,)
    row = _counted(rows) + first[face]
    y = row + 0.5
    long = a[face, 0] + (y - a[face, 1]) * slopes[0][face]
    with np.errstate(invalid="ignore"):
        upper = a[face, 0] + (y - a[face, 1]) * slopes[1][face]
        lower = b[face, 0] + (y - b[face, 1]) * slopes[2][face]
    short = np.where(y < b[face, 1], upper, lower)
    left = np.clip(np.ceil(np.minimum(long, short) - 0.5), 0, side).astype(np.int64)
    length = np.clip(np.ceil(np.maximum(long, short) - 0.5), 0, side).astype(np.int64) - left
    some = length > 0
    face, row, left, length = face[some], row[some], left[some], length[some]
    start = seen[face, 0, 2] + (left + 0.5 - seen[face, 0, 0]) * across[face]
    start = (start + (row + 0.5 - seen[face, 0, 1]) * down[face] - low) / span  # depth of a row's first sample, 0..1
    step = across[face] / span
    place = row * side + left
    edges = np.searchsorted(np.cumsum(length), np.arange(0, length.sum() + _CHUNK, _CHUNK), side="left")
    for begin, end in zip(edges[:-1], np.maximum(edges[1:], edges[:-1] + 1), strict=True):
        count = length[begin:end]
        offset = _counted(count)
        which = np.repeat(np.arange(len(count)), count)
        depth = start[begin:end][which] + offset * step[begin:end][which]
        _put(nearest, place[begin:end][which] + offset, depth, face[begin:end][which], len(seen))
    return nearest


def _gradients(seen: Floats) -> tuple[Floats, Floats]:
    """Change of depth from a sample to the next to the right, and to the next below, of each face (F, 3, 3)."""
    (x1, y1, z1), (x2, y2, z2) = (seen[:, 1] - seen[:, 0]).T, (seen[:, 2] - seen[:, 0]).T
    area = x1 * y2 - x2 * y1
    return (z1 * y2 - z2 * y1) / area, (x1 * z2 - x2 * z1) / area


def _range(depths: Floats, more: float = 0.0) -> tuple[float, float]:
    """Least depth and span of depths, both with ``more`` added, never 0."""
    low, high = float(depths.min(initial=np.inf)), float(depths.max(initial=-np.inf))
    if low > high:
        return 0.0, 1.0
    return low - more, high - low + 2 * more or 1.0


def _counted(counts: Ints) -> Ints:
    """0, 1, ... of each count, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - counts, counts)


def _put(nearest: Ints, place: Ints, depth: Floats, index: Ints, count: int) -> None:
    """Keep, at each place, the key with the greatest depth (0..1) and, where these are equal, the first index."""
    key = (np.clip(depth, 0.0, 1.0) * _DEPTHS).astype(np.int64) << 32
    np.maximum.at(nearest, place, key | (count - 1 - index))


def _face(keys: Ints, count: int) -> Ints:
    return count - 1 - (keys & 0xFFFFFFFF)


def _depth_map(nearest: Ints, covered: Ints, seen: Floats) -> Singles:
    """Depth of every sample (side, side), in samples; -inf for the background."""
    low, span = _range(seen[..., 2])
    side = math.isqrt(len(nearest))
    depth = np.full(side * side, -np.inf, dtype=np.float32)
    depth[covered] = (nearest[covered] >> 32) * (span / _DEPTHS) + low
    return depth.reshape(side, side)


def _light(normals: Floats) -> Floats:
    """Light of surfaces with these unit normals (N, 3), right, up, towards the camera; their far side is lit too."""
    facing = normals * np.where(normals[:, 2:] < 0, -1.0, 1.0)
    key, fill = (np.maximum(facing @ light, 0.0) for light in (KEY_LIGHT, FILL_LIGHT))
    return AMBIENT + UPWARD * facing[:, 1] + KEY * key + FILL * fill


def rgb(colour: str) -> Floats:
    """Return the red, green and blue (3,) from 0 to 1 of a colour such as "#7FB2DC"."""
    digits = colour.removeprefix("#")
    if len(digits) != 6 or any(c not in "0123456789abcdefABCDEF" for c in digits):
        raise ConfigError(f"colour: must be six hexadecimal digits such as '#7FB2DC', got {colour!r}.")
    return np.array([int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)])


def _wires(seen: Floats, face: Ints, covered: Ints, side: int) -> Singles:
    """Share of ink (N,) of covered samples: lines along the edges of their face, paler on small faces."""
    start, end = seen[:, :, :2], np.roll(seen[:, :, :2], -1, axis=1)  # (F, 3, 2)
    along = end - start
    length = np.maximum(np.linalg.norm(along, axis=2), 1e-9)
    normal = np.stack([-along[..., 1], along[..., 0]], axis=2) / length[..., None]  # (F, 3, 2)
    area = np.abs(along[:, 0, 0] * along[:, 1, 1] - along[:, 0, 1] * along[:, 1, 0])
    inner = area / length.sum(1) / _SAMPLES  # radius of the circle inside, in pixels
    # Below a pixel lines would be all there is; from four on they are as dark as ever.
    strength = (0.72 * _smooth((inner - 0.9) / 3.0)).astype(np.float32)
    offset = -(normal * start).sum(2)
    lines = np.concatenate([normal, offset[..., None]], axis=2).astype(np.float32)  # (F, 3, 3)
    share = strength[face]
    drawn = np.flatnonzero(share > 0)
    x = (covered[drawn] % side + 0.5).astype(np.float32)
    y = (covered[drawn] // side + 0.5).astype(np.float32)
    owner = face[drawn]
    near = np.full(len(drawn), np.inf, dtype=np.float32)
    for edge in range(3):
        a, b, c = lines[owner, edge].T
        np.minimum(near, np.abs(a * x + b * y + c), out=near)
    # Half a line: the neighbour draws the other half.
    ink = np.zeros(len(face), dtype=np.float32)
    ink[drawn] = share[drawn] * np.clip(0.5 * _SAMPLES + 0.5 - near, 0.0, 1.0)
    return ink


def _outline(depth: Singles, side: int, covered: Ints, reach: float) -> Singles:
    """Share of ink (N,) of covered samples: a line where the surface ends before what is behind it."""
    least = np.float32(0.06 * reach)  # more than steep faces fall in two samples
    behind = np.zeros((side, side), dtype=bool)
    for step in (1, 2):
        for axis in (0, 1):
            near = depth[step:] if axis == 0 else depth[:, step:]
            far = depth[:-step] if axis == 0 else depth[:, :-step]
            one, other = (behind[step:], behind[:-step]) if axis == 0 else (behind[:, step:], behind[:, :-step])
            one |= near > far + least
            other |= far > near + least
    return np.float32(0.62) * behind.ravel()[covered]


def _smooth(share: Floats) -> Floats:
    share = np.clip(share, 0.0, 1.0)
    return share * share * (3 - 2 * share)


def _compose(samples: Singles, covered: Ints, depth: Singles | None, size: int, reach: float) -> Image:
    """Average the covered samples (N, 3) over white to uint8 (size, size, 3); hollows are darkened by depth."""
    layers = np.zeros((size * size * _SAMPLES * _SAMPLES, 4), dtype=np.float32)
    layers[covered, :3] = np.clip(samples, 0.0, 1.0)
    layers[covered, 3] = 1.0
    pixels = layers.reshape(size, _SAMPLES, size, _SAMPLES, 4).mean(axis=(1, 3))  # (size, size, 4)
    if depth is not None:
        pixels[..., :3] *= _hollows(depth[_SAMPLES // 2 :: _SAMPLES, _SAMPLES // 2 :: _SAMPLES], reach)[..., None]
    final = pixels[..., :3] + (1 - pixels[..., 3:])  # white
    return np.clip(np.rint(final * 255), 0, 255).astype(np.uint8)


def _hollows(depth: Singles, reach: float) -> Singles:
    """Light that is left (size, size) where opposite neighbours are nearer to the camera than a pixel."""
    size = len(depth)
    dark = np.zeros_like(depth)
    # Corners of rooms and of small parts alike: shares of the picture.
    rings = [max(1, round(size * r)) for r in (0.012, 0.03, 0.06)]
    pad = max(rings)
    filled = np.where(np.isfinite(depth), depth, np.float32(-1e9))
    padded = np.pad(filled, pad, constant_values=-1e9)
    for ring in rings:
        limit = np.float32(2.2 * ring * _SAMPLES)  # what is far nearer is something else, and counts little
        for angle in range(0, 180, 30):
            x, y = (round(ring * f(math.radians(angle))) for f in (math.cos, math.sin))
            one = padded[pad + y : pad + y + size, pad + x : pad + x + size] - filled
            other = padded[pad - y : pad - y + size, pad - x : pad - x + size] - filled
            rise = np.minimum(one, limit) + np.minimum(other, limit)
            dark += np.clip(rise / (2 * limit), 0.0, 1.0)
    dark /= 6 * len(rings)  # angles and rings
    return np.float32(1.0) - np.float32(0.85) * np.clip(dark, 0.0, 0.6)  # half of the light is left at least
