"""What a model is shown of a file: points with normals in the frame of those points, and where that frame lies."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.mesh.files import Shape
from vertebra.domains.mesh.geometry import (
    CONDITION_SCALE,
    Floats,
    Placement,
    condition,
    estimate_normals,
    sample_surface,
)

Up = str
"""``y`` or ``z``, the vertical axis of a file; models know ``y`` alone."""


@dataclass(frozen=True, eq=False)
class Shown:
    """A shape as a model sees it.

    Args:
        condition: (N, 6), positions in [-1, 1] and unit normals, float32.
        placement: Where the frame lies, in coordinates with ``y`` up.
        notes: What was done to the shape, a sentence each.
    """

    condition: NDArray[np.float32]
    placement: Placement
    notes: tuple[str, ...] = ()


def show(shape: Shape, count: int, rng: np.random.Generator) -> Shown:
    """Draw ``count`` points of a mesh's surface, or thin a cloud, and estimate the normals that it lacks.

    The frame is the box of these points, as it was in training: a mesh's own box would say more than points do.

    Args:
        shape: With ``y`` up.
        count: N.
        rng: Source of randomness.

    Raises:
        DataError: There is no surface, or too few points.
    """
    notes = list(shape.notes)
    if shape.mesh is not None:
        own = Placement.of(shape.mesh.vertices[np.unique(shape.mesh.faces)])  # float64 far from the origin
        points, normals = sample_surface(own.into(shape.mesh.vertices), shape.mesh.faces, count, rng)
    else:
        assert shape.points is not None
        own = Placement.of(shape.points)
        points = own.into(shape.points)
        if len(points) < count:
            notes.append(f"The cloud has {len(points):,} points, fewer than the {count:,} the model reads.")
        found = shape.normals
        if found is None:
            notes.append("Normals were estimated from neighbouring points.")
        else:
            bad = ~(np.linalg.norm(found, axis=1) > 0)
            if bad.any():
                notes.append("Some normals were zero or NaN; all were estimated anew.")
                found = None
        if found is None and len(points) > 4 * count:  # planes of more neighbours would not be better
            points = points[rng.choice(len(points), 4 * count, replace=False)]
        normals = estimate_normals(points) if found is None else found
    thinned = condition(points, normals, count, rng)
    places = thinned[:, :3].astype(np.float64) / CONDITION_SCALE
    frame = Placement.of(places)
    thinned[:, :3] = frame.into(places) * CONDITION_SCALE
    x, y, z = own.back(frame.centre).tolist()
    return Shown(thinned, Placement((x, y, z), own.scale * frame.scale), tuple(notes))


def turn_up(points: Floats, up: Up, back: bool = False) -> Floats:
    """Turn coordinates (N, 3) with ``up`` vertical so that ``y`` is, or back."""
    if up == "y":
        return points
    x, y, z = points.T
    return np.stack([x, -z, y] if back else [x, z, -y], axis=1)
