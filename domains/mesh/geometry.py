"""Meshes and points in space: placement in the unit box, sampling, normals, quantization, decimation.

Three frames are in use. *World*: what the file says. *Box*: centred, longest side 1, so coordinates lie in
[-0.5, 0.5]; meshes are quantized there. *Condition*: the box times 2 * 0.9995, so coordinates lie in [-1, 1]; points
are shown to a model there. These are the frames of MeshAnything (https://arxiv.org/abs/2406.10163, section 5.1).

Shapes: V vertices, F faces, N points.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import trimesh
from numpy.typing import ArrayLike, NDArray

from vertebra.errors import ConfigError, DataError, MissingExtraError
from vertebra.tokenizers.mesh import QuantizedMesh, canonical, dequantize, quantize

Floats = NDArray[np.float64]

CONDITION_SCALE = 2 * 0.9995
"""From box to condition coordinates."""

_decimating = threading.Lock()  # fast_simplification keeps its mesh in a global variable


@dataclass(frozen=True)
class Placement:
    """Where a mesh lay before it was moved into the box.

    Args:
        centre: Centre of its bounding box, in world coordinates.
        scale: Longest side of its bounding box.
    """

    centre: tuple[float, float, float]
    scale: float

    @classmethod
    def of(cls, vertices: ArrayLike) -> Placement:
        """Place ``vertices`` (V, 3) so that they fill the box.

        Raises:
            DataError: No vertices, NaN or infinite ones, or all in one place.
        """
        points = _points(vertices, "vertices")
        low, high = points.min(0), points.max(0)
        scale = float((high - low).max())
        if not 0 < scale < np.inf:
            raise DataError(f"Placement: the vertices must span a box of finite size > 0, got {scale}; check the file.")
        x, y, z = (low + (high - low) / 2).tolist()
        return cls((x, y, z), scale)

    def into(self, x: ArrayLike) -> Floats:
        """Map world coordinates (..., 3) to box coordinates."""
        return (np.asarray(x, dtype=np.float64) - self.centre) / self.scale

    def back(self, x: ArrayLike) -> Floats:
        """Map box coordinates (..., 3) to world coordinates."""
        return np.asarray(x, dtype=np.float64) * self.scale + self.centre


def weld(vertices: ArrayLike, faces: ArrayLike) -> tuple[Floats, NDArray[np.int64]]:
    """Make one vertex of those at the same position.

    Args:
        vertices: (V, 3).
        faces: (F, 3) vertex indices.

    Returns:
        The vertices in use, in the order of their first appearance, and the faces without those that have lost a
        corner. Repeated faces are kept.
    """
    points = np.asarray(vertices, dtype=np.float64).reshape(-1, 3) + 0.0  # no -0.0
    triangles = np.asarray(faces, dtype=np.int64).reshape(-1, 3)
    order = np.lexsort(points.T)
    new = np.ones(len(points), dtype=bool)
    new[1:] = (points[order[1:]] != points[order[:-1]]).any(1)
    leader = np.empty(len(points), dtype=np.int64)  # first vertex of each position: the sort is stable
    leader[order] = order[new][np.cumsum(new) - 1]
    triangles = leader[triangles]
    a, b, c = triangles.T
    triangles = triangles[(a != b) & (b != c) & (c != a)]
    used = np.zeros(len(points), dtype=bool)
    used[triangles] = True
    return points[used], (np.cumsum(used) - 1)[triangles]


def sample_surface(
    vertices: ArrayLike, faces: ArrayLike, count: int, rng: np.random.Generator
) -> tuple[Floats, Floats]:
    """Draw points evenly over the surface.

    Args:
        vertices: (V, 3).
        faces: (F, 3) vertex indices.
        count: N.
        rng: Source of randomness.

    Returns:
        Points (N, 3) and the unit normals (N, 3) of their faces; the winding of a face gives its normal's side.

    Raises:
        DataError: The faces have no area.
    """
    corners = np.asarray(vertices, dtype=np.float64)[np.asarray(faces)]  # (F, 3, 3)
    origin = corners[:, 0]
    first, second = corners[:, 1] - origin, corners[:, 2] - origin
    normals = _cross(first, second)
    lengths = np.sqrt((normals * normals).sum(1))  # twice the areas
    edges = np.cumsum(lengths)
    if not (len(edges) and 0 < edges[-1] < np.inf):
        raise DataError("sample_surface: the faces must have an area that is finite and > 0; check the mesh.")
    # A rounded-up draw could fall behind the last face that has an area.
    last = int(np.searchsorted(edges, edges[-1]))
    chosen = np.minimum(np.searchsorted(edges, rng.random(count) * edges[-1], side="right"), last)  # (N,)
    u, v = rng.random((2, count, 1))
    u = np.sqrt(u)  # even over the triangle: Osada et al. 2002, equation 1
    points = origin[chosen] + u * (1 - v) * first[chosen] + u * v * second[chosen]
    return points, normals[chosen] / lengths[chosen, None]


def condition(
    points: ArrayLike, normals: ArrayLike, count: int, rng: np.random.Generator, noise: float = 0.0
) -> NDArray[np.float32]:
    """Make what a model is shown of a shape.

    Args:
        points: (N, 3) in box coordinates.
        normals: (N, 3), of any length but 0.
        count: Rows wanted: more points than that are thinned at random, fewer are repeated at random.
        rng: Source of randomness.
        noise: Standard deviation of Gaussian noise on positions, in units of [-1, 1] (MeshAnything, Table 6).

    Returns:
        (count, 6) positions in condition coordinates and unit normals, float32.

    Raises:
        DataError: No points, or a normal that is zero or not finite.
    """
    place, direction = _points(points, "points"), _points(normals, "normals")
    if len(place) != len(direction):
        raise DataError(f"condition: every point needs a normal, got {len(place)} points and {len(direction)} normals.")
    if len(place) >= count:
        rows = rng.choice(len(place), count, replace=False, shuffle=False)
    else:
        rows = np.concatenate([np.arange(len(place)), rng.integers(len(place), size=count - len(place))])
    direction = direction[rows]
    lengths = np.linalg.norm(direction, axis=1, keepdims=True)
    if not lengths.all():
        raise DataError("condition: normals must not be zero; leave them out to have them estimated.")
    place = place[rows] * CONDITION_SCALE
    if noise:
        place = place + rng.normal(0.0, noise, place.shape)
    return np.concatenate([place, direction / lengths], axis=1).astype(np.float32)


def estimate_normals(points: ArrayLike, neighbours: int = 16) -> Floats:
    """Estimate unit normals of a point cloud that point out of the shape (Hoppe et al. 1992, section 3).

    The plane of a point is fitted to its neighbours. Sides are then made to agree along a minimum spanning tree of the
    graph of neighbours, whose edges cost ``1 - |cos|``, from the point that is farthest from the centre and whose
    normal must point away from it. Parts that no edge joins are each begun in this way; an inner wall of a hollow
    shape that is a part of its own thus points outwards too. Walls thinner than the distance of points mislead it.

    Args:
        points: (N, 3).
        neighbours: How many points make a plane, the point itself among them.

    Returns:
        (N, 3).

    Raises:
        DataError: Fewer than 4 points, or points that are not finite.
        ConfigError: ``neighbours`` < 3.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import breadth_first_order, connected_components, minimum_spanning_tree
    from scipy.spatial import cKDTree

    cloud = _points(points, "points")
    if neighbours < 3:
        raise ConfigError(f"estimate_normals: neighbours must be at least 3, got {neighbours}; 16 is usual.")
    if len(cloud) < 4:
        raise DataError(f"estimate_normals: at least 4 points are needed, got {len(cloud)}; add points.")
    count, k = len(cloud), min(neighbours, len(cloud))
    near = cKDTree(cloud).query(cloud, k)[1]  # (N, k)
    normals = _plane_normals(cloud, near)

    source, target = np.repeat(np.arange(count), k), near.ravel()
    low, high = np.minimum(source, target), np.maximum(source, target)
    keys = np.unique(low * count + high)
    low, high = keys // count, keys % count
    low, high = low[low != high], high[low != high]
    # A cost of 0 would read as "no edge".
    cost = 1 + 1e-6 - np.abs((normals[low] * normals[high]).sum(1))
    tree = minimum_spanning_tree(coo_array((cost, (low, high)), shape=(count, count)).tocsr())
    parts, part = connected_components(tree, directed=False)

    # Centres of parts, and the point of each that is farthest from its centre.
    sizes = np.bincount(part, minlength=parts)
    centres = np.stack([np.bincount(part, cloud[:, i], parts) for i in range(3)], axis=1) / sizes[:, None]
    away = cloud - centres[part]
    order = np.lexsort(((away * away).sum(1), part))
    roots = order[np.cumsum(sizes) - 1]  # (parts,)

    # One more node joins the roots, so that one walk visits all parts.
    branches = tree.tocoo()
    rows = np.concatenate([branches.row, np.full(parts, count)])
    columns = np.concatenate([branches.col, roots])
    joined = coo_array((np.ones(len(rows)), (rows, columns)), shape=(count + 1, count + 1)).tocsr()
    parent = breadth_first_order(joined, count, directed=False)[1].astype(np.int64)
    parent[count] = count
    sign = np.ones(count + 1)
    inner = np.flatnonzero(parent[:count] != count)
    sign[inner] = _signs((normals[inner] * normals[parent[inner]]).sum(1))
    sign[roots] = _signs((normals[roots] * away[roots]).sum(1))
    while (parent != count).any():  # products along the ways to the root, twice as long each time
        sign *= sign[parent]
        parent = parent[parent]
    return normals * sign[:count, None]


def quantized(mesh: trimesh.Trimesh, bins: int) -> tuple[QuantizedMesh, Placement]:
    """Move a mesh into the box and round its vertices to a grid of ``bins`` cells a side.

    Returns:
        The mesh on the grid in canonical order, which may have lost faces, even all, and where it lay.

    Raises:
        DataError: The mesh has no size, or vertices that are not finite.
    """
    faces = np.asarray(mesh.faces, dtype=np.int64)
    vertices = np.asarray(mesh.vertices, dtype=np.float64)
    placement = Placement.of(vertices[np.unique(faces)])
    used = np.zeros(len(vertices), dtype=bool)
    used[faces] = True
    inside = np.where(used[:, None], placement.into(vertices), 0.0)  # what no face uses may lie anywhere
    return canonical(quantize(inside, bins), faces), placement


def to_trimesh(
    qmesh: QuantizedMesh,
    bins: int,
    place: Literal["centre", "lower"] = "centre",
    placement: Placement | None = None,
) -> trimesh.Trimesh:
    """Turn a mesh on the grid into one in space.

    Faces that share an edge are made to wind alike, and closed bodies to face outwards, as MeshAnything does after
    decoding; a mesh that already winds alike is kept as it is, save for bodies turned inside out.

    Args:
        qmesh: The mesh on the grid; it may be empty.
        bins: Cells a side.
        place: Point of a cell that stands for it.
        placement: Where to put the mesh; None leaves it in the box.
    """
    vertices = dequantize(qmesh.vertices, bins, place)
    if placement is not None:
        vertices = placement.back(vertices)
    mesh = trimesh.Trimesh(vertices=vertices, faces=qmesh.faces.copy(), process=False, validate=False)
    if len(qmesh.faces):
        with np.errstate(invalid="ignore", divide="ignore"):  # a flat body has no centre of mass
            trimesh.repair.fix_normals(mesh, multibody=True)
    return mesh


def decimate(mesh: trimesh.Trimesh, faces: int) -> trimesh.Trimesh:
    """Reduce a mesh to about ``faces`` faces by collapsing edges (Garland and Heckbert 1997, quadric errors).

    Args:
        mesh: Welded; colours and textures are lost.
        faces: Faces wanted, at least 4. A mesh of fewer is returned as it is; one of many bodies may keep more.

    Raises:
        ConfigError: ``faces`` < 4.
        MissingExtraError: The package is not installed.
    """
    if faces < 4:
        raise ConfigError(f"decimate: faces must be at least 4, got {faces}; no closed shape has fewer.")
    if len(mesh.faces) <= faces:
        return mesh.copy()
    try:
        from fast_simplification import simplify
    except ImportError:
        raise MissingExtraError("fast-simplification", "mesh", "decimate") from None
    corners = np.ascontiguousarray(mesh.faces, dtype=np.int32)
    # In the box: its thresholds are absolute numbers.
    placement = Placement.of(np.asarray(mesh.vertices)[np.unique(corners)])
    points = np.ascontiguousarray(placement.into(mesh.vertices))
    for haste in (3.0, 5.0, 7.0, 9.0):  # a careful pass may stop early
        with _decimating:
            vertices, triangles = simplify(points, corners, target_count=int(faces), agg=haste)
        if len(triangles) <= 1.05 * faces:
            break
    result = trimesh.Trimesh(placement.back(vertices), triangles.astype(np.int64), process=False, validate=False)
    distinct = np.sort(result.faces, axis=1)
    result.update_faces((np.diff(distinct, axis=1) > 0).all(1))
    result.remove_unreferenced_vertices()
    return result


def _points(x: ArrayLike, what: str) -> Floats:
    array = np.asarray(x, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != 3 or not len(array):
        raise DataError(f"{what} must be (N, 3) with N > 0, got shape {array.shape}.")
    if not np.isfinite(array).all():
        row = int(np.flatnonzero(~np.isfinite(array).all(1))[0])
        raise DataError(f"{what} must be finite numbers, got {array[row].tolist()} in row {row}; leave it out.")
    return array


def _cross(a: Floats, b: Floats) -> Floats:
    """Cross products of rows; ``np.cross`` takes several times as long for a few hundred."""
    result = np.empty_like(a)
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        result[:, i] = a[:, j] * b[:, k] - a[:, k] * b[:, j]
    return result


def _plane_normals(cloud: Floats, near: NDArray[Any]) -> Floats:
    """Unit normals (N, 3), of either side, of the planes fitted to the points ``near`` (N, k)."""
    normals = np.empty_like(cloud)
    for start in range(0, len(cloud), 16_384):  # bounds memory
        rows = slice(start, start + 16_384)
        group = cloud[near[rows]]  # (n, k, 3)
        group = group - group.mean(1, keepdims=True)
        normals[rows] = np.linalg.eigh(np.einsum("nki,nkj->nij", group, group))[1][:, :, 0]
    return normals


def _signs(x: Floats) -> Floats:
    return np.where(x < 0, -1.0, 1.0)
