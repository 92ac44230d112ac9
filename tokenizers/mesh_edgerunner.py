"""EdgeRunner's tokenization: a walk over half edges, where a face beside the last one costs one vertex, not three.

Source: EdgeRunner (https://arxiv.org/abs/2409.18114), its form with absolute coordinates. Ids are 0 ``L``, 1 ``R``,
2 ``BOM`` (begin of a submesh), then the coordinates' cells from 3 on::

    BOM  x y z  x y z  x y z   L  x y z   R  x y z ...

A submesh starts with a whole face, its corners v0 v1 v2. ``L`` goes on across the edge v2 v0 and ``R`` across v0 v1,
each to a new vertex v that becomes v0: the faces (v, v0, v2) and (v, v1, v0). So the winding is kept, but where the
faces of a mesh do not agree on one: there a face takes that of the face before it. F faces in S submeshes are
4 F + 6 S ids.

Of the faces at one edge the first two are neighbours, the others end there. A vertex where faces meet in several fans
counts as one vertex for each.

*How ours differs*: iterative; the border of what is left is kept as linked half edges, and the shorter of its two loops
is found by walking both in step, so that the whole takes linear time but for a logarithm; the original knows one vertex
where faces meet in several fans.

Darts: half edge 3 f + j lies across from corner j of face f and runs from corner j + 1 to corner j + 2; its two ends
are darts 2 (3 f + j) and 2 (3 f + j) + 1. So ``dart ^ 1`` is the other end and ``dart // 6`` the face.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vertebra.tokenizers.mesh import MeshGrammar, MeshTokenizer, QuantizedMesh

Ints = NDArray[np.int64]

L, R, BOM = 0, 1, 2
_OPS = 3  # ids before the coordinates


class EdgeRunnerTokenizer(MeshTokenizer):
    """Submeshes of faces, one vertex for each face but the first of a submesh.

    Kinds: 0 ``BOM``; 1, 2, 3 x, y, z of a submesh's first three vertices; 4 ``L`` and ``R``; 5, 6, 7 the coordinates of
    the vertex after one.

    Args:
        bins: Cells a side; the original has 512.
    """

    num_kinds = 8

    def __init__(self, bins: int = 128) -> None:
        super().__init__(bins)
        self.vocab_size = bins + _OPS

    def grammar(self) -> MeshGrammar:
        """As in ``MeshTokenizer``."""
        return EdgeRunnerGrammar(self.bins)

    def _ids(self, mesh: QuantizedMesh) -> Ints:
        return self._encode(mesh.vertices, mesh.faces)

    def _encode(self, vertices: Ints, faces: Ints) -> Ints:
        """Write faces (F, 3) of cells (V, 3), no two of the same vertices, in whatever order they come."""
        order = edge_walk(vertices, faces)
        ops = order < 0
        ids = vertices[order] + _OPS  # (N, 3), vertices and ops
        ids[ops, 0] = ~order[ops]
        kept = np.ones_like(ids, dtype=bool)
        kept[ops, 1:] = False
        return ids[kept]

    def _triangles(self, ids: Ints) -> Ints:
        starts = np.flatnonzero(ids < _OPS)
        ops = ids[starts]
        whole = starts + np.where(ops == BOM, 10, 4) <= len(ids)  # all but perhaps the last
        starts, ops = starts[whole], ops[whole]
        tips = ids[starts[:, None] + np.arange(1, 4)]  # (F, 3)
        v1, v2 = tips.copy(), tips.copy()
        first = np.flatnonzero(ops == BOM)
        v1[first] = ids[starts[first, None] + np.arange(4, 7)]
        v2[first] = ids[starts[first, None] + np.arange(7, 10)]
        # L puts the tip before into v1, R into v2; what is not put stays as it was.
        v1[ops == L] = tips[np.flatnonzero(ops == L) - 1]
        v2[ops == R] = tips[np.flatnonzero(ops == R) - 1]
        at = np.arange(len(ops))
        v1 = v1[np.maximum.accumulate(np.where(ops != R, at, 0))]
        v2 = v2[np.maximum.accumulate(np.where(ops != L, at, 0))]
        return np.stack([tips, v1, v2], axis=1) - _OPS


class EdgeRunnerGrammar(MeshGrammar):
    """``BOM`` and nine coordinates, then any number of ``L`` or ``R`` with three.

    Registers: v0, v1, v2 of the face being written, one integer each, -1 for those still to come; then what is begun of
    the next one. No vertex may repeat another of its face, which its last coordinate is kept from.

    Args:
        bins: Cells a side.
    """

    V0, V1, V2, BEGUN = 1, 2, 3, 4  # columns

    def __init__(self, bins: int) -> None:
        self.bins = bins
        # States: 0 wants BOM, 1 .. 9 the coordinates of a submesh's first face; 10 an op or the end, 11 .. 13 a vertex.
        states = np.arange(14)
        first = states < 10
        axis = np.where(first, states - 1, states - 11) % 3
        axis[[0, 10]] = -1
        allowed = np.repeat(axis[:, None] >= 0, bins + _OPS + 1, axis=1)
        allowed[:, :_OPS] = allowed[:, -1:] = (states == 10)[:, None]
        allowed[0, BOM] = True
        following = np.repeat(np.append(states[1:], 10)[:, None], bins + _OPS, axis=1)
        following[:, [L, R, BOM]] = 11, 11, 1
        kinds = np.repeat((np.where(first, 1, 5) + axis)[:, None], bins + _OPS, axis=1)
        kinds[:, [L, R, BOM]] = 4, 4, 0
        super().__init__(allowed, following, kinds, registers=4)
        self.axis = torch.as_tensor(axis)
        # Column for what is begun after a coordinate: a vertex's once that is whole.
        self.column = torch.as_tensor(
            np.where(axis == 2, np.where(first, self.V0 + (states - 1) // 3, self.V0), self.BEGUN)
        )
        self.spare = torch.as_tensor(np.where(axis < 0, _OPS, L))  # a token that is never allowed in the state

    def begin(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """As in ``MeshGrammar``."""
        self.axis, self.column, self.spare = self.axis.to(device), self.column.to(device), self.spare.to(device)
        return super().begin(batch, device)

    def advance(self, state: Tensor, ids: Tensor) -> Tensor:
        """As in ``MeshGrammar``."""
        new = super().advance(state, ids)
        before, v0, v1, v2, begun = state.unbind(1)
        # An op leaves the edge to go on from in v1 and v2, and v0 to come.
        submesh = ids == BOM
        new[:, self.V0] = v0.masked_fill(ids < _OPS, -1)
        new[:, self.V1] = torch.where(ids == L, v0, v1).masked_fill(submesh, -1)
        new[:, self.V2] = torch.where(ids == R, v0, v2).masked_fill(submesh, -1)
        begun = (begun * self.bins).masked_fill(self.axis[before] == 0, 0) + ids - _OPS
        return new.scatter_(1, self.column[before][:, None], begun[:, None])

    def allowed(self, state: Tensor) -> Tensor:
        """As in ``MeshGrammar``."""
        vertices = state[:, self.V0 : self.BEGUN]  # (B, 3)
        # One to come is -1, and so is its quotient, which nothing begun is where z is read.
        clash = (self.axis[state[:, :1]] == 2) & (vertices // self.bins == state[:, self.BEGUN :])
        barred = torch.where(clash, vertices % self.bins + _OPS, self.spare[state[:, :1]])
        return super().allowed(state).scatter(1, barred, False)


# ---------------------------------------------------------------- the walk


def edge_walk(vertices: Ints, faces: Ints) -> Ints:
    """Order the vertices of a mesh as the tokens have them.

    Time is that of sorting the faces, linear but for a logarithm; a handle may add the length of a loop.

    Args:
        vertices: Cells (V, 3).
        faces: Vertex indices (F, 3) of different faces, each of three different vertices.

    Returns:
        Vertex indices, and ``~op`` for an op.
    """
    rest = _surface(vertices, faces)
    vertex, across, turn = rest.vertex, rest.across, rest.turn
    done = bytearray(len(faces))
    order: list[int] = []
    for start in rest.starts:
        waiting = [start]
        while waiting:
            half = waiting.pop()
            if done[half // 3]:
                continue
            dart = 2 * half  # the edge that the face is entered by, at the end that will be v1
            order += [~BOM, vertex[half], vertex[_next(half)], vertex[_next(_next(half))]]
            while True:
                done[dart // 6] = True
                right, left = turn[dart] ^ 1, turn[dart ^ 1] ^ 1  # both at the tip
                met = rest.bordered[rest.fan[left]]
                rest.remove(dart, left, right)
                to_left, to_right = across[left], across[right ^ 1]
                if to_left < 0 and to_right < 0:
                    break
                if met and to_left >= 0 and to_right >= 0:  # what is left falls apart here, or will at a later vertex
                    if rest.left_is_shorter(to_left, across[right]):
                        waiting.append(to_right // 2)
                        to_right = -1
                    else:
                        waiting.append(to_left // 2)
                        to_left = -1
                op, dart = (L, to_left) if to_left >= 0 else (R, to_right)
                order += [~op, vertex[dart // 2]]
    return np.array(order, dtype=np.int64)


def _next(half: int) -> int:
    return half - half % 3 + (half + 1) % 3


@dataclass
class _Surface:
    """The faces that are left, cut apart to fans with at most two faces at an edge; lists, which a loop reads fast.

    Args:
        vertex: Of every half edge, the one across from it (3 F,).
        starts: Half edges that a submesh may start from, one for each face (F,).
        turn: The dart at the same corner (6 F,).
        across: The dart of the neighbour's half edge at the same vertex, -1 where no face is left (6 F,).
        fan: Number of the fan that a dart is of (6 F,).
        bordered: Whether a fan has an end, as all have but those whose faces are all left and close a ring.
        link: Of a dart on the border of what is left, that at the other end of its fan (6 F,).
    """

    vertex: list[int]
    starts: list[int]
    turn: list[int]
    across: list[int]
    fan: list[int]
    bordered: bytearray
    link: list[int]

    def remove(self, dart: int, left: int, right: int) -> None:
        """Remove a face: ``dart`` is an end of one half edge, ``left`` and ``right`` lie at the corner across."""
        self._part(dart, right ^ 1)
        self._part(dart ^ 1, left ^ 1)
        self._part(left, right)
        across = self.across
        for d in (dart, dart ^ 1, left, left ^ 1, right, right ^ 1):
            if across[d] >= 0:
                across[across[d]] = -1

    def _part(self, p: int, q: int) -> None:
        """Part a fan at the corner of darts ``p`` and ``q``."""
        a, b = self.across[p], self.across[q]
        if a >= 0 and b >= 0:
            if self.bordered[self.fan[p]]:
                end_a, end_b = self._ends(a, b)
                self._tie(a, end_a)
                self._tie(b, end_b)
            else:
                self.bordered[self.fan[p]] = True
                self._tie(a, b)
        elif a >= 0:
            self._tie(a, self.link[q])
        elif b >= 0:
            self._tie(b, self.link[p])

    def _tie(self, a: int, b: int) -> None:
        self.link[a], self.link[b] = b, a

    def _ends(self, a: int, b: int) -> tuple[int, int]:
        """Turn from ``a`` and from ``b``, away from each other, to the ends of their fan; in step, to the nearer."""
        across, turn, link = self.across, self.turn, self.link
        while True:
            a, b = turn[a], turn[b]
            if across[a] < 0:
                return a, link[a]
            if across[b] < 0:
                return link[b], b
            a, b = across[a], across[b]

    def left_is_shorter(self, left: int, right: int) -> bool:
        """Compare the loops of the border through ``left`` and ``right``, darts at one vertex where the border parts.

        Walks in step from both sides of the parting, so that the cost is the shorter loop's. Where the two are one loop
        (behind a hole or handle that the walk has come upon), neither is shorter.
        """
        link = self.link
        end, begin = link[left], link[right]
        at_vertex = (left, right, end, begin)
        a, b = left, begin  # the half edges walked along, by the darts that they are entered at
        while a ^ 1 not in at_vertex and b ^ 1 not in at_vertex:
            a, b = link[a ^ 1], link[b ^ 1]
        return a ^ 1 == end and b ^ 1 != right


def _surface(vertices: Ints, faces: Ints) -> _Surface:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    def parts(a: Ints, b: Ints, size: int) -> Ints:
        links = coo_array((np.ones(len(a), dtype=bool), (a, b)), shape=(size, size))
        return connected_components(links, directed=False)[1].astype(np.int64)

    count = len(faces)
    vertex = faces.reshape(-1)
    sides = np.array([[0, 1, 2], [1, 2, 0], [2, 0, 1]])  # a half edge's corner across, first end, last end
    corner = (3 * np.arange(count)[:, None, None] + sides[1:].T).reshape(-1)  # (6 F,) of every dart
    turn = _partners(corner)

    ends = vertex[corner].reshape(-1, 2)
    _, edge, uses = np.unique(ends.min(1) * (vertex.max() + 1) + ends.max(1), return_inverse=True, return_counts=True)
    halves = np.argsort(edge, kind="stable")  # those of an edge together, in the order of faces
    first = (np.cumsum(uses) - uses)[uses > 1]
    one, two = halves[first], halves[first + 1]
    twins = np.full((3 * count, 2), -1)
    against = (ends[one, 0] != ends[two, 0])[:, None]  # the two run against each other, as they do in one winding
    twins[one] = 2 * two[:, None] + (np.arange(2) ^ against)
    twins[two] = 2 * one[:, None] + (np.arange(2) ^ against)
    across = twins.reshape(-1)

    inner = np.flatnonzero(across >= 0)
    fan = parts(corner[inner], corner[across[inner]], 3 * count)[corner]
    body = parts(inner // 6, across[inner] // 6, count)
    border = np.flatnonzero(across < 0)
    link = np.full(6 * count, -1)
    link[border] = border[_partners(fan[border])]
    bordered = np.zeros(fan.max() + 1, dtype=np.uint8)
    bordered[fan[border]] = True

    # Bodies in the order of their first faces, and faces by their centres' y, z, x. A face is started from across a
    # border, or else from across the edge whose two opposite vertices are nearest to each other.
    apart = vertices[vertex] - vertices[vertex[across[::2] // 2]]
    near = np.where(across[::2] < 0, -1, (apart**2).sum(1)).reshape(-1, 3).argmin(1)
    centre = vertices[faces].sum(1)
    order = np.lexsort((centre[:, 0], centre[:, 2], centre[:, 1]))
    _, lead = np.unique(body[order], return_index=True)
    order = order[np.argsort(lead[body[order]], kind="stable")]
    return _Surface(
        vertex.tolist(),
        (3 * order + near[order]).tolist(),
        turn.tolist(),
        across.tolist(),
        fan.tolist(),
        bytearray(bordered),
        link.tolist(),
    )


def _partners(groups: Ints) -> Ints:
    """For groups of two, (N,) numbers of them: where the other one stands."""
    pairs = np.argsort(groups, kind="stable").reshape(-1, 2)
    partner = np.empty(len(groups), dtype=np.int64)
    partner[pairs] = pairs[:, ::-1]
    return partner
