"""Blocked and patchified tokenization (BPT): fans of faces around a centre, vertices as a block and a place in it.

Source: BPT (https://arxiv.org/abs/2411.07025). A patch is a centre c and a ring r0, r1, ... rm of vertices around it;
its faces are (c, r0, r1), (c, r1, r2), ... A vertex is two ids: the block it lies in, one of 8 x 8 x 8, and the offset
in that block. At 128 bins, where a block has 16 x 16 x 16 cells::

    block    0 ..  511     offset  512 .. 4607     block that opens a patch  4608 .. 5119

A vertex in the block of the one before is its offset alone. A patch is opened by its centre's block, in ids of its own,
so that nothing else parts patches::

    block offset  [block] offset  [block] offset ...  opening offset  block offset  [block] offset ...

As in the original, the first patch begins with an ordinary block, and after an opening one the ring's first vertex says
its block even where it is the same.

Patches: the first face left chooses its corner with the most faces left, and from that centre a ring goes from face to
face, from the lowest vertex with one face left at its edge to the centre, else from the lowest of all. What the ring
did not reach (a second fan, or a part that winds the other way) later patches take. Vertices are in the order of the
cells of a coarser grid of 4 x 4 x 4, and in a cell by y, then x, then z.

*How ours differs*: a ring ends where the winding changes, so that the winding of every face comes back, whatever the
mesh; and time is near-linear.
"""

from __future__ import annotations

from heapq import heappop, heappush

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import MeshGrammar, MeshTokenizer, QuantizedMesh

Ints = NDArray[np.int64]

SIDE = 8
"""Blocks a side of the grid."""
BLOCKS = SIDE**3

_ORDER_SIDE = 4  # cells a side of the coarser grid that orders vertices
_FEWEST_BINS = 2 * SIDE  # with one cell a block, a vertex could not differ from one in the same block
_MOST_BINS = 64 * SIDE  # 262,144 offsets; they grow with the cube of the bins

BLOCK, OFFSET, OPENING = range(3)
"""Kinds of tokens."""


class BPTTokenizer(MeshTokenizer):
    """Patches of faces around a centre, vertices as block and offset.

    Kinds: 0 block, 1 offset, 2 block that opens a patch.

    Args:
        bins: Cells a side, a multiple of 8 from 16 to 512. There are 1,024 + (bins / 8)^3 ids.

    Raises:
        ConfigError: Other bins.
    """

    num_kinds = 3

    def __init__(self, bins: int = 128) -> None:
        super().__init__(bins)
        if bins % SIDE or not _FEWEST_BINS <= bins <= _MOST_BINS:
            raise ConfigError(
                f"BPTTokenizer: bins must be a multiple of {SIDE} from {_FEWEST_BINS} to {_MOST_BINS}, got {bins}; "
                "128 is usual."
            )
        self.cells = bins // SIDE  # a side of a block
        self.vocab_size = BLOCKS + self.cells**3 + BLOCKS

    def grammar(self) -> MeshGrammar:
        """As in ``MeshTokenizer``."""
        return BPTGrammar(self.cells**3)

    def _ids(self, mesh: QuantizedMesh) -> Ints:
        x, y, z = mesh.vertices.T
        a, b, c = mesh.vertices.T * _ORDER_SIDE // self.bins
        order = np.lexsort((z, x, y, c, a, b))  # the last is the first to count
        vertices = mesh.vertices[order]
        rank = np.empty_like(order)
        rank[order] = np.arange(len(order))
        ring, opens = patch_order(_sorted(rank[mesh.faces]))

        places = vertices[ring]  # (N, 3), one row for every vertex written
        block = places // self.cells @ [SIDE**2, SIDE, 1]
        offset = places % self.cells @ [self.cells**2, self.cells, 1]
        opens[0] = False  # the first patch has an ordinary block
        written = opens.copy()
        written[0] = True
        written[1:] |= (block[1:] != block[:-1]) | opens[:-1]
        pairs = np.stack([block + opens * (BLOCKS + self.cells**3), BLOCKS + offset], axis=1)  # (N, 2)
        return pairs[np.stack([written, np.ones_like(written)], axis=1)]

    def _triangles(self, ids: Ints) -> Ints:
        opening = BLOCKS + self.cells**3
        ends = (ids >= BLOCKS) & (ids < opening)  # every offset ends a vertex
        latest = np.maximum.accumulate(np.where(ends, 0, np.arange(len(ids))))[ends]  # the block that it counts from
        block = ids[latest] - np.where(ids[latest] >= opening, opening, 0)
        offset = ids[ends] - BLOCKS
        vertices = _split(block, SIDE) * self.cells + _split(offset, self.cells)  # (N, 3)

        patch = np.cumsum(ids >= opening)[ends]  # of every vertex
        opens = np.append(True, patch[1:] != patch[:-1])[: len(patch)]
        centre = np.maximum.accumulate(np.where(opens, np.arange(len(patch)), 0))
        first = np.flatnonzero((patch[:-1] == patch[1:]) & ~opens[:-1])  # a ring's vertex before another
        return vertices[np.stack([centre[first], first, first + 1], axis=1)]


class BPTGrammar(MeshGrammar):
    """What may follow in patches.

    Registers: the block that an offset counts from; the centre; the latest vertex of the ring, the two as block x
    offsets + offset. An offset that would repeat the centre or the latest vertex is not allowed, nor is a block that
    says no more than the offset alone would.

    Args:
        offsets: Cells of a block.
    """

    # Names say what was read last. A ring of one vertex is no face yet: another must follow.
    _FIRST_BLOCK, _FIRST, _OPENING, _CENTRE, _BLOCK_1, _RING_1, _BLOCK, _RING = range(1, 9)

    def __init__(self, offsets: int) -> None:
        block, offset = slice(BLOCKS), slice(BLOCKS, BLOCKS + offsets)
        opening, end = slice(BLOCKS + offsets, -1), slice(-1, None)
        edges = [
            (0, block, self._FIRST_BLOCK),
            (self._FIRST_BLOCK, offset, self._FIRST),
            (self._FIRST, block, self._BLOCK_1),
            (self._FIRST, offset, self._RING_1),
            (self._OPENING, offset, self._CENTRE),
            (self._CENTRE, block, self._BLOCK_1),
            (self._BLOCK_1, offset, self._RING_1),
            (self._RING_1, block, self._BLOCK),
            (self._RING_1, offset, self._RING),
            (self._BLOCK, offset, self._RING),
            (self._RING, block, self._BLOCK),
            (self._RING, offset, self._RING),
            (self._RING, opening, self._OPENING),
            (self._RING, end, 0),
        ]
        allowed = np.zeros((9, BLOCKS + offsets + BLOCKS + 1), dtype=bool)
        following = np.zeros(allowed.shape, dtype=np.int64)
        for state, tokens, after in edges:
            allowed[state, tokens] = True
            following[state, tokens] = after
        kinds = np.repeat([BLOCK, OFFSET, OPENING], [BLOCKS, offsets, BLOCKS])
        super().__init__(allowed, following[:, :-1], np.tile(kinds, (9, 1)), registers=3)
        self.offsets = offsets

    def advance(self, state: Tensor, ids: Tensor) -> Tensor:
        """As in ``MeshGrammar``."""
        new = super().advance(state, ids)
        before, block, centre, latest = state.unbind(1)
        opens = (before == 0) | (ids >= BLOCKS + self.offsets)
        is_offset = (ids >= BLOCKS) & ~opens
        at_centre = (before == self._FIRST_BLOCK) | (before == self._OPENING)
        vertex = block * self.offsets + ids - BLOCKS
        new[:, 1] = torch.where(is_offset, block, torch.where(opens & (before > 0), ids - BLOCKS - self.offsets, ids))
        new[:, 2] = torch.where(opens, -1, torch.where(is_offset & at_centre, vertex, centre))
        new[:, 3] = torch.where(opens, -1, torch.where(is_offset & ~at_centre, vertex, latest))
        return new

    def allowed(self, state: Tensor) -> Tensor:
        """As in ``MeshGrammar``."""
        now, block, centre, latest = state.unbind(1)
        may = self.allowed_table[now].clone()
        # The ring's first vertex has a block even where it is the same.
        again = (block >= 0) & (now != self._CENTRE)
        _forbid(may, block, again)
        for vertex in (centre, latest):
            _forbid(may, BLOCKS + vertex % self.offsets, (vertex >= 0) & (vertex // self.offsets == block))
        return may


def _forbid(may: Tensor, column: Tensor, where: Tensor) -> None:
    """Clear one column (B,) of each row of ``may`` (B, V + 1), where (B,) says so."""
    index = column.clamp_min(0)[:, None]
    may.scatter_(1, index, may.gather(1, index) & ~where[:, None])


def _split(index: Ints, side: int) -> Ints:
    """Cells (N, 3) of a grid of ``side`` from their numbers (N,), the first coordinate the most significant."""
    return np.stack([index // side**2, index // side % side, index % side], axis=-1)


def _sorted(faces: Ints) -> Ints:
    """Put the lowest vertex of each face first, keep the winding, and sort faces by their sorted vertices."""
    first = faces.argmin(1)[:, None]
    faces = np.take_along_axis(faces, (first + np.arange(3)) % 3, axis=1)
    return faces[np.lexsort(np.sort(faces, axis=1).T[::-1])]


def patch_order(faces: Ints) -> tuple[Ints, NDArray[np.bool_]]:
    """Order the vertices of a mesh in patches, in time near-linear in the faces.

    Args:
        faces: Vertex indices (F, 3) of different faces, each of three different vertices, in the order in which they
            are to be taken.

    Returns:
        Vertex indices (N,), a centre and its ring in turn; and where centres are (N,).
    """
    # Side 3 f + k runs from corner k of face f to the next one. An arc is a pair of neighbours in one direction; every
    # pair has two, by number in the order of (from, to), so that the arcs from a vertex lie together, by neighbour.
    count = int(faces.max()) + 1
    tails, heads, across = (np.roll(faces, -k, axis=1).reshape(-1) for k in range(3))  # (3 F,) each
    arcs = np.unique(np.concatenate([tails * count + heads, heads * count + tails]))
    arc = np.searchsorted(arcs, tails * count + heads)  # of each side
    back = np.searchsorted(arcs, arcs % count * count + arcs // count)  # the arc the other way
    sides_on = np.bincount(arc, minlength=len(arcs))
    left_on = sides_on + sides_on[back]  # faces at the pair

    # The sides on an arc lie together, by the vertex across, so that the first whose face is left is the one to take.
    side_at = np.lexsort((across, arc)).tolist()
    stop_of = np.cumsum(sides_on).tolist()
    cursor_of = [0, *stop_of[:-1]]  # all before is used
    # Open ends around each vertex: arcs to neighbours with one face left. Kept as heaps; an entry is out of date once
    # that face is used.
    ends_of: list[list[int]] = [[] for _ in range(count)]
    for open_arc in np.flatnonzero(left_on == 1).tolist():
        ends_of[arcs[open_arc] // count].append(open_arc)
    lowest_of = np.searchsorted(arcs, np.arange(count) * count).tolist()  # arc from each vertex; all before is used

    arc_of, back_of, left_of = arc.tolist(), back.tolist(), left_on.tolist()
    tail_of, head_of = (arcs // count).tolist(), (arcs % count).tolist()
    degree_of = np.bincount(faces.reshape(-1)).tolist()
    corner_at, across_of = tails.tolist(), across.tolist()
    used = bytearray(len(faces))
    order: list[int] = []
    centres: list[int] = []  # places in the order
    seed = 0
    while seed < len(faces):
        if used[seed]:  # a patch need not reach the face that chose its centre
            seed += 1
            continue
        centre = max(corner_at[3 * seed : 3 * seed + 3], key=degree_of.__getitem__)
        ends = ends_of[centre]
        while ends and left_of[ends[0]] != 1:
            heappop(ends)
        if ends:
            start = ends[0]
        else:
            start = lowest_of[centre]
            while not left_of[start]:
                start += 1
            lowest_of[centre] = start

        # With the winding, the ring's arcs run from the centre out; against it, in.
        step, next_arc = 2, start
        side = _take(next_arc, side_at, cursor_of, stop_of, used)
        if side < 0:
            step, next_arc = 1, back_of[start]
            side = _take(next_arc, side_at, cursor_of, stop_of, used)
        ring = [head_of[start]]
        while side >= 0:
            ring.append(across_of[side])
            face = side // 3
            used[face] = True
            for corner in range(3 * face, 3 * face + 3):
                degree_of[corner_at[corner]] -= 1
                out = arc_of[corner]
                home = back_of[out]
                left_of[out] -= 1
                left_of[home] -= 1
                if left_of[out] == 1:
                    heappush(ends_of[tail_of[out]], out)
                    heappush(ends_of[tail_of[home]], home)
            next_arc = back_of[arc_of[3 * face + (side + step) % 3]]
            side = _take(next_arc, side_at, cursor_of, stop_of, used)
        centres.append(len(order))
        order.append(centre)
        order += ring if step == 2 else ring[::-1]
    opens = np.zeros(len(order), dtype=bool)
    opens[centres] = True
    return np.array(order, dtype=np.int64), opens


def _take(arc: int, side_at: list[int], cursor_of: list[int], stop_of: list[int], used: bytearray) -> int:
    """Find the first side on an arc whose face is left, or -1, and move the arc's cursor there."""
    cursor, stop = cursor_of[arc], stop_of[arc]
    while cursor < stop and used[side_at[cursor] // 3]:
        cursor += 1
    cursor_of[arc] = cursor
    return side_at[cursor] if cursor < stop else -1
