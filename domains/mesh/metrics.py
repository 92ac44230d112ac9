"""How near a mesh is to the true one, and what a mesh is like. Training, pipelines and benchmarks call these functions.

Conventions. Distances are Euclidean, not squared, and in units of the box: the longest side of the true mesh is 1.
Chamfer is the *mean* of the two directions; MeshAnything's own code adds them up, which doubles it. Points are drawn
anew from each mesh, so that even a mesh beside itself has a distance, that of two samplings.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import trimesh
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

from vertebra.domains.mesh.geometry import Floats, Placement, quantized, sample_surface, to_trimesh, weld

MOST_NEIGHBOURS = 200
"""Points within EDGE_RADIUS of one, on average, that are drawn at most: their pairs have to fit into memory."""
EDGE_RADIUS = 0.004
"""Within which a point looks for another face, in box units (Neural Dual Contouring, Chen et al. 2022)."""
EDGE_COSINE = 0.1
"""A point is at a sharp edge if the |cosine| between its normal and a neighbour's is smaller (Chen et al. 2022)."""
EDGE_COUNT = 100_000
"""Points drawn to find those at edges: fewer would leave most without a neighbour."""

_NEAR = 1e-6  # share of the longest side up to which a vertex lies on a plane: float32 files are no better
_THIN = 1e-9  # height of a face, as a share of its longest side, that is taken for none
_GROUP = 64  # faces that are compared each with each
_PAIRS = 1 << 18  # pairs of faces looked at together, to bound memory

Ints = NDArray[np.int64]


# --- near the truth? --------------------------------------------------------------------------------------------------


def chamfer(a_points: ArrayLike, b_points: ArrayLike) -> float:
    """Mean of the two mean distances to the nearest point of the other set: L2, not squared, halved.

    Args:
        a_points: (N, 3).
        b_points: (M, 3).

    Returns:
        The distance in the units of the points; NaN if a set is empty.
    """
    a, b = np.asarray(a_points, dtype=np.float64), np.asarray(b_points, dtype=np.float64)
    if not len(a) or not len(b):
        return float("nan")
    return float(cKDTree(b).query(a)[0].mean() + cKDTree(a).query(b)[0].mean()) / 2


def normal_consistency(a_points: ArrayLike, a_normals: ArrayLike, b_points: ArrayLike, b_normals: ArrayLike) -> float:
    """Mean |cosine| between the normals of nearest points, both ways averaged; 1 is best, the winding does not matter.

    Args:
        a_points: (N, 3).
        a_normals: Unit normals (N, 3).
        b_points: (M, 3).
        b_normals: Unit normals (M, 3).
    """
    a, b = np.asarray(a_points, dtype=np.float64), np.asarray(b_points, dtype=np.float64)
    return _agreement(a_normals, b_normals, cKDTree(b).query(a)[1], cKDTree(a).query(b)[1])


def edge_points(points: ArrayLike, normals: ArrayLike) -> NDArray[np.bool_]:
    """Find the points at sharp edges: some point within 0.004 has a normal at about a right angle, |cosine| < 0.1.

    This is the rule of Neural Dual Contouring (Chen et al. 2022). Edges between faces that meet at other angles, such
    as those of a roof, are none to it.

    Args:
        points: (N, 3) in box units.
        normals: Unit normals (N, 3).

    Returns:
        (N,) True at edges.
    """
    cloud, direction = np.asarray(points, dtype=np.float64), np.asarray(normals, dtype=np.float64)
    a, b = cKDTree(cloud).query_pairs(EDGE_RADIUS, output_type="ndarray").T
    sharp = np.abs((direction[a] * direction[b]).sum(1)) < EDGE_COSINE
    found = np.zeros(len(cloud), dtype=bool)
    found[a[sharp]] = True
    found[b[sharp]] = True
    return found


def edge_chamfer(mesh_a: trimesh.Trimesh, mesh_b: trimesh.Trimesh, count: int = EDGE_COUNT, seed: int = 0) -> float:
    """Chamfer distance between the points at sharp edges of two meshes in box units.

    Args:
        mesh_a: A mesh.
        mesh_b: Another.
        count: Points drawn from each, of which those of :func:`edge_points` are kept.
        seed: Of the draws.

    Returns:
        The distance; 0 if neither mesh has sharp edges, NaN if only one has.

    Raises:
        DataError: A mesh has no area.
    """
    rng = np.random.default_rng(seed)
    sharp = []
    for mesh in (mesh_a, mesh_b):
        few = int(MOST_NEIGHBOURS * mesh.area / (np.pi * EDGE_RADIUS**2)) + 1  # a tiny surface needs no more
        points, normals = sample_surface(mesh.vertices, mesh.faces, min(count, few), rng)
        sharp.append(points[edge_points(points, normals)])
    return chamfer(*sharp) if any(map(len, sharp)) else 0.0


def compare(output: trimesh.Trimesh, truth: trimesh.Trimesh, count: int = 10_000, seed: int = 0) -> dict[str, float]:
    """Measure a mesh against the true one, both in world coordinates.

    Args:
        output: The mesh to judge.
        truth: The mesh it should be.
        count: Points drawn from each for ``chamfer`` and ``normal_consistency``; ``edge_chamfer`` has its own 100,000.
        seed: Of the draws.

    Returns:
        ``chamfer``, ``edge_chamfer`` (see :func:`edge_chamfer` for NaN), ``normal_consistency``, and ``vertex_ratio``
        and ``face_ratio``, output over truth after welding.

    Raises:
        DataError: A mesh has no area.
    """
    placement = Placement.of(np.asarray(truth.vertices)[np.unique(truth.faces)])
    a, b = (_bare(placement.into(mesh.vertices), mesh.faces) for mesh in (output, truth))
    rng = np.random.default_rng(seed)
    a_points, a_normals = sample_surface(a.vertices, a.faces, count, rng)
    b_points, b_normals = sample_surface(b.vertices, b.faces, count, rng)
    there, back = cKDTree(b_points).query(a_points), cKDTree(a_points).query(b_points)
    sizes = [[len(part) for part in weld(mesh.vertices, mesh.faces)] for mesh in (a, b)]
    return {
        "chamfer": float(there[0].mean() + back[0].mean()) / 2,
        "edge_chamfer": edge_chamfer(a, b, seed=seed),
        "normal_consistency": _agreement(a_normals, b_normals, there[1], back[1]),
        "vertex_ratio": sizes[0][0] / sizes[1][0],
        "face_ratio": sizes[0][1] / sizes[1][1],
    }


def quantization_floor(mesh: trimesh.Trimesh, bins: int, count: int = 10_000, seed: int = 0) -> float:
    """Chamfer distance, as in :func:`compare`, of the mesh that a perfect model on a grid of ``bins`` would make.

    Two samplings of ``count`` points lie apart even on one surface; that is part of this floor, as of every distance
    that is compared with it.

    Raises:
        DataError: The mesh has no area, or none is left on the grid.
    """
    qmesh, placement = quantized(mesh, bins)
    best = to_trimesh(qmesh, bins)
    rng = np.random.default_rng(seed)
    a_points, _ = sample_surface(best.vertices, best.faces, count, rng)
    b_points, _ = sample_surface(placement.into(mesh.vertices), mesh.faces, count, rng)
    return chamfer(a_points, b_points)


# --- what a mesh is like ----------------------------------------------------------------------------------------------


def describe(mesh: trimesh.Trimesh) -> dict[str, int | float | bool]:
    """Count what a mesh is made of, after welding.

    Returns:
        ``vertices`` and ``faces``; ``degenerate``, faces without area, among them those that welding takes away;
        ``watertight``, whether every edge has exactly two faces; ``bodies``, groups of faces that share vertices; and
        ``self_intersection_share`` (:func:`intersecting_faces`).
    """
    vertices, faces = weld(mesh.vertices, mesh.faces)
    lost = len(mesh.faces) - len(faces)
    return {
        "vertices": len(vertices),
        "faces": len(faces),
        "degenerate": lost + int(_flat(vertices, faces).sum()),
        "watertight": _watertight(faces),
        "bodies": _bodies(len(vertices), faces),
        "self_intersection_share": float(intersecting_faces(vertices, faces).mean()) if len(faces) else 0.0,
    }


def is_valid(mesh: trimesh.Trimesh) -> bool:
    """Whether a mesh has faces, and each of them an area."""
    vertices, faces = weld(mesh.vertices, mesh.faces)
    return 0 < len(faces) == len(mesh.faces) and not _flat(vertices, faces).any()


def intersecting_faces(vertices: ArrayLike, faces: ArrayLike) -> NDArray[np.bool_]:
    """Find the faces that pass through another one.

    Two faces intersect properly if they share no vertex, lie in different planes, and have inner points in common.
    Faces that touch, or overlap in one plane, as parts of furniture do, do not, nor do such as cross along an edge.
    Whatever lies within 1e-6 of the longest side counts as touching. The time grows with the number of pairs whose
    boxes overlap.

    Args:
        vertices: (V, 3), welded: vertices at the same position count as different ones.
        faces: (F, 3).

    Returns:
        (F,) True of faces that intersect another.
    """
    points, triangles = np.asarray(vertices, dtype=np.float64), np.asarray(faces, dtype=np.int64)
    found = np.zeros(len(triangles), dtype=bool)
    if len(triangles) < 2:
        return found
    used = points[np.unique(triangles)]
    side = float(np.ptp(used, axis=0).max())
    if not side > 0:
        return found
    corners = ((points - used.mean(0)) / side)[triangles]  # (F, 3, 3)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    lengths = np.linalg.norm(normals, axis=1, keepdims=True)
    normals = np.divide(normals, lengths, out=np.zeros_like(normals), where=lengths > 0)
    for a, b in _overlapping(corners.min(1), corners.max(1)):
        apart = (triangles[a][:, :, None] != triangles[b][:, None, :]).all((1, 2))
        a, b = a[apart], b[apart]
        crossed = _cross(corners[a], normals[a], corners[b], normals[b])
        found[a[crossed]] = True
        found[b[crossed]] = True
    return found


def _overlapping(low: Floats, high: Floats) -> Iterator[tuple[Ints, Ints]]:
    """Yield the pairs of boxes that overlap by more than a side, many at a time; some come more than once.

    The boxes are cut into two halves again and again, with those across the cut in both.

    Args:
        low: Lower corners (F, 3).
        high: Upper corners (F, 3).
    """
    centres = (low + high) / 2
    groups = [np.arange(len(low))]
    ready: list[tuple[Ints, Ints]] = []
    size = 0
    while groups:
        rows = groups.pop()
        if len(rows) > _GROUP:
            axis = int(np.ptp(centres[rows], axis=0).argmax())
            cut = np.median(centres[rows, axis])
            left, right = rows[low[rows, axis] <= cut], rows[high[rows, axis] > cut]
            if len(left) + len(right) < 1.25 * len(rows) and max(len(left), len(right)) < len(rows):
                groups += [left, right]
                continue
        step = max(_PAIRS // len(rows), 1)
        for start in range(0, len(rows), step):
            some = rows[start : start + step]
            close = np.arange(start, start + len(some))[:, None] < np.arange(len(rows))  # each pair once
            for axis in range(3):
                close &= low[some, axis][:, None] < high[rows, axis]
                close &= low[rows, axis] < high[some, axis][:, None]
            a, b = np.nonzero(close)
            ready.append((some[a], rows[b]))
            size += len(a)
            if size > _PAIRS:
                yield _joined(ready)
                ready, size = [], 0
    if ready:
        yield _joined(ready)


def _joined(pairs: list[tuple[Ints, Ints]]) -> tuple[Ints, Ints]:
    return np.concatenate([a for a, _ in pairs]), np.concatenate([b for _, b in pairs])


def _cross(a: Floats, a_normals: Floats, b: Floats, b_normals: Floats) -> NDArray[np.bool_]:
    """Whether the triangles ``a`` (P, 3, 3) and ``b``, with unit normals (P, 3), have inner points in common.

    The planes meet in a line, and each triangle covers a piece of it (Moeller 1997); the pieces must overlap.
    """
    a_sides, b_sides = _sides(a, b, b_normals), _sides(b, a, a_normals)  # (P, 3)
    split = (a_sides.min(1) < 0) & (a_sides.max(1) > 0) & (b_sides.min(1) < 0) & (b_sides.max(1) > 0)
    crossed = np.zeros(len(a), dtype=bool)
    line = np.cross(a_normals[split], b_normals[split])
    line /= np.maximum(np.linalg.norm(line, axis=1, keepdims=True), np.finfo(np.float64).tiny)
    a_low, a_high = _piece(a[split], a_sides[split], line)
    b_low, b_high = _piece(b[split], b_sides[split], line)
    crossed[split] = np.minimum(a_high, b_high) - np.maximum(a_low, b_low) > _NEAR
    return crossed


def _sides(a: Floats, b: Floats, b_normals: Floats) -> Floats:
    """Signed distances (P, 3) of the corners of ``a`` to the planes of ``b``; 0 where they lie on them."""
    distances = np.einsum("pci,pi->pc", a - b[:, :1], b_normals)
    return np.where(np.abs(distances) > _NEAR, distances, 0.0)


def _piece(corners: Floats, sides: Floats, line: Floats) -> tuple[Floats, Floats]:
    """Begin and end, along ``line`` (P, 3), of what triangles (P, 3, 3) cover of it; ``sides`` have both signs."""
    along = np.einsum("pci,pi->pc", corners, line)
    next_along, next_sides = np.roll(along, -1, 1), np.roll(sides, -1, 1)
    cut = sides * next_sides < 0
    share = np.divide(sides, sides - next_sides, out=np.zeros_like(sides), where=cut)
    at = np.concatenate([along + share * (next_along - along), along], axis=1)  # (P, 6) cut edges, corners on the line
    on = np.concatenate([cut, sides == 0], axis=1)
    return np.where(on, at, np.inf).min(1), np.where(on, at, -np.inf).max(1)


def _agreement(a_normals: ArrayLike, b_normals: ArrayLike, there: Ints, back: Ints) -> float:
    u, v = np.asarray(a_normals, dtype=np.float64), np.asarray(b_normals, dtype=np.float64)
    return float(np.abs((u * v[there]).sum(1)).mean() + np.abs((v * u[back]).sum(1)).mean()) / 2


def _bare(vertices: Floats, faces: ArrayLike) -> trimesh.Trimesh:
    return trimesh.Trimesh(vertices, faces, process=False, validate=False)


def _flat(vertices: Floats, faces: Ints) -> NDArray[np.bool_]:
    """Faces (F,) whose height is nothing beside their longest side."""
    corners = vertices[faces]
    sides = np.roll(corners, -1, 1) - corners  # (F, 3, 3)
    longest = (sides * sides).sum(2).max(1)  # squared
    doubled = np.linalg.norm(np.cross(sides[:, 0], sides[:, 1]), axis=1)  # height times longest side
    return doubled <= _THIN * longest


def _watertight(faces: Ints) -> bool:
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return len(edges) > 0 and bool((np.unique(edges, axis=0, return_counts=True)[1] == 2).all())


def _bodies(count: int, faces: Ints) -> int:
    if not count:
        return 0
    a, b = np.concatenate([faces[:, :2], faces[:, 1:]]).T
    return int(connected_components(coo_array((np.ones(len(a)), (a, b)), shape=(count, count)))[0])
