"""Adjacent mesh tokenization (AMT): a face that goes on from the one before costs one vertex, not three.

Source: MeshAnything V2 (https://arxiv.org/abs/2408.02555). Ids are the cells of coordinates, x y z of each vertex, and
``bins`` for the separator ``&`` between strips; every three vertices that follow each other in a strip are a face::

    x y z  x y z  x y z  x y z ...  &  x y z  x y z  x y z ...

A strip starts with the first of the faces left, its vertices in order, and goes on with the lowest vertex that makes
one of the faces left together with the strip's last two. A strip of m faces is 3 (m + 2) ids, and a separator but for
the last strip. As in the original, the winding of faces is lost.

*How ours differs*: linear time, and the decoder refuses a sequence that the original mends. The exchange token of the
paper, which the released model does not have either, is left out.
"""

from __future__ import annotations

from array import array
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import CoordinateGrammar, MeshGrammar, MeshTokenizer, QuantizedMesh, canonical

Ints = NDArray[np.int64]

_SEPARATOR = -1  # among the vertices of an order


class AMTTokenizer(MeshTokenizer):
    """Strips of faces, one vertex for each but the first of a strip.

    Kinds: 0 the separator; 1, 2, 3 x, y, z of a strip's first three vertices; 4, 5, 6 those of the vertices after.

    Args:
        bins: Cells a side; also the id of the separator.
        up: The vertical axis of meshes. The paper orders vertices by height first; the released model is given meshes
            with ``y`` up and takes ``z`` for the height all the same.

    Raises:
        ConfigError: No such axis.
    """

    fields = ("bins", "up")
    num_kinds = 7

    def __init__(self, bins: int = 128, up: Literal["y", "z"] = "y") -> None:
        super().__init__(bins)
        if up not in ("y", "z"):
            raise ConfigError(f"AMTTokenizer: up must be y or z, got {up!r}.")
        self.up = up
        self.vocab_size = bins + 1

    def grammar(self) -> MeshGrammar:
        """As in ``MeshTokenizer``."""
        # States 0 .. 8 read the coordinates of a strip's first three vertices, 9 .. 11 those of a vertex after.
        states = np.arange(12)
        allowed = np.ones((12, self.vocab_size + 1), dtype=bool)
        allowed[:, self.bins :] = (states == 9)[:, None]  # separator and end: the strip's last vertex is whole
        following = np.repeat(np.append(states[1:], 9)[:, None], self.vocab_size, axis=1)
        following[:, self.bins] = 0
        kinds = np.repeat(np.where(states < 9, 1, 4)[:, None] + states[:, None] % 3, self.vocab_size, axis=1)
        kinds[:, self.bins] = 0
        against = np.minimum(states // 3, 2)
        return CoordinateGrammar(self.bins, allowed, following, kinds, (states % 3).tolist(), against.tolist())

    def _ids(self, mesh: QuantizedMesh) -> Ints:
        if self.up == "y":
            mesh = canonical(mesh.vertices[:, [2, 0, 1]], mesh.faces)
        order = strip_order(mesh.faces)
        separators = order == _SEPARATOR
        ids = mesh.vertices[order]  # (N, 3), vertices and separators
        ids[separators, 0] = self.bins
        kept = np.ones_like(ids, dtype=bool)
        kept[separators, 1:] = False
        return ids[kept]

    def _triangles(self, ids: Ints) -> Ints:
        separators = ids == self.bins
        strips = np.cumsum(separators)[~separators][::3]  # strip of every vertex, the last perhaps not whole
        whole = len(ids) - separators.sum()
        vertices = ids[~separators][: whole // 3 * 3].reshape(-1, 3)  # only the last strip's end can be cut off
        strips = strips[: len(vertices)]
        corners = np.stack([vertices[:-2], vertices[1:-1], vertices[2:]], axis=1)  # (F + those across strips, 3, 3)
        corners = corners[strips[:-2] == strips[2:]]
        return corners[..., [1, 2, 0]] if self.up == "y" else corners


def strip_order(faces: Ints) -> Ints:
    """Order the vertices of a mesh in strips, in time linear in the faces but for one sort.

    Args:
        faces: Vertex indices (F, 3) of different faces without repeated vertices, sorted by their sorted indices.

    Returns:
        Vertex indices, with -1 between strips.
    """
    corners = np.sort(faces, axis=1)
    # Side 3 f + k is that of face f across from its corner k, so the other two corners are its ends.
    ends = corners[:, [[1, 2], [0, 2], [0, 1]]].reshape(-1, 2)
    _, edges = np.unique(ends[:, 0] * (faces.max() + 1) + ends[:, 1], return_inverse=True)  # (3 F,)
    # The sides at an edge lie together, by the vertex across, so that the first whose face is left is the one to take.
    sides = np.lexsort((corners.reshape(-1), edges))
    # Arrays: as fast to index as lists, and close together in memory, so that the time a face stays the same.
    stops = _array(np.cumsum(np.bincount(edges)))
    cursors = array("q", [0, *stops[:-1]])  # all before is used: an edge of many faces is read through once in all
    edge_of, side_at, corner_at = _array(edges), _array(sides), _array(corners)
    used = bytearray(len(faces))
    order = array("q")
    for start in range(len(faces)):
        if used[start]:
            continue
        if order:
            order.append(_SEPARATOR)
        used[start] = True
        _, before, last = corner_at[3 * start : 3 * start + 3]
        order += corner_at[3 * start : 3 * start + 3]
        edge = edge_of[3 * start]
        while True:
            cursor, stop = cursors[edge], stops[edge]
            while cursor < stop and used[side_at[cursor] // 3]:
                cursor += 1
            cursors[edge] = cursor
            if cursor == stop:
                break
            side = side_at[cursor]
            used[side // 3] = True
            vertex = corner_at[side]
            order.append(vertex)
            # The next edge is that of the last two vertices, across from the one before them.
            first = side - side % 3
            while corner_at[first] != before:
                first += 1
            edge, before, last = edge_of[first], last, vertex
    return np.array(order, dtype=np.int64)


def _array(x: Ints) -> array[int]:
    return array("q", x.astype(np.int64).tobytes())
