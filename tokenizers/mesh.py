"""Triangle meshes on a grid, and what every mesh tokenizer shares.

A mesh is moved into the box [-0.5, 0.5]^3, its vertices are rounded to ``bins`` cells a side, and those that fall into
one cell become one (MeshAnything, https://arxiv.org/abs/2406.10163, section 5.1). What is left, a
:class:`QuantizedMesh`, is what a tokenizer writes down exactly: the same set of faces comes back.

A new tokenizer is one file: a subclass of :class:`MeshTokenizer` with its :class:`MeshGrammar`, and a line in
:data:`MESH_TOKENIZERS`. The plain form, nine coordinates a face, is below.

Shapes: B items, V vertices (of grammars: vocabulary), F faces, N tokens, S states, R registers.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.tokenizers.base import Tokenizer, tokenizer_from_dict

Ints = NDArray[np.int64]
Place = Literal["centre", "lower"]

LEAST_BINS = 4
"""With these there is always a cell that none of a face's other vertices is in."""
MOST_BINS = 1 << 20
"""Three coordinates below this fit into one 64-bit key."""


# ---------------------------------------------------------------- meshes on the grid


@dataclass(frozen=True, eq=False)
class QuantizedMesh:
    """A mesh on the grid in canonical order; :func:`canonical` makes it.

    Args:
        vertices: Cells (V, 3), all different, all in use, sorted by their last column, then the middle, then the first.
        faces: Vertex indices (F, 3), the lowest first and the winding kept; sorted by their sorted indices; no two of
            the same vertices.
    """

    vertices: Ints
    faces: Ints

    @property
    def corners(self) -> Ints:
        """Cells of the corners of every face, (F, 3, 3)."""
        return self.vertices[self.faces]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, QuantizedMesh)
            and np.array_equal(self.vertices, other.vertices)
            and np.array_equal(self.faces, other.faces)
        )

    __hash__ = None  # type: ignore[assignment]  # arrays have none


def quantize(x: ArrayLike, bins: int) -> Ints:
    """Map coordinates in [-0.5, 0.5] to cells 0 .. ``bins`` - 1; what lies outside goes to the nearest cell.

    Raises:
        DataError: A coordinate is not finite.
        ConfigError: ``bins`` is below 4 or above 1,048,576.
    """
    _check_bins(bins)
    values = np.asarray(x, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError("quantize: coordinates must be finite numbers; leave out what is NaN or infinite.")
    return np.clip(np.round((values + 0.5) * bins - 0.5), 0, bins - 1).astype(np.int64)


def dequantize(cells: ArrayLike, bins: int, place: Place = "centre") -> NDArray[np.float64]:
    """Map cells to coordinates in [-0.5, 0.5].

    Args:
        cells: Any shape.
        bins: Cells a side.
        place: The ``centre`` of a cell, half a cell's width from what it stands for at most, or its ``lower`` edge, as
            MeshAnything has it.
    """
    _check_bins(bins)
    return (np.asarray(cells, dtype=np.float64) + (0.5 if place == "centre" else 0.0)) / bins - 0.5


def canonical(vertices: ArrayLike, faces: ArrayLike) -> QuantizedMesh:
    """Weld the vertices of a mesh on the grid, drop faces without area or said twice, and put it in order.

    Args:
        vertices: Cells (V, 3), each from 0 on.
        faces: Vertex indices (F, 3).

    Returns:
        The mesh, perhaps of no face. Of several faces of the same vertices the first is kept.

    Raises:
        DataError: A coordinate or an index is out of range.
    """
    cells = np.asarray(vertices, dtype=np.int64).reshape(-1, 3)
    corners = np.asarray(faces, dtype=np.int64).reshape(-1, 3)
    if cells.size and not 0 <= cells.min() <= cells.max() < MOST_BINS:
        raise DataError(
            f"canonical: cells must lie between 0 and {MOST_BINS - 1:,}, got {cells.min()} .. {cells.max()}."
        )
    if corners.size and not 0 <= corners.min() <= corners.max() < len(cells):
        raise DataError(
            f"canonical: faces must name vertices 0 .. {len(cells) - 1}, got {corners.min()} .. {corners.max()}."
        )
    keys, place = np.unique(pack(cells[corners]), return_inverse=True)
    corners = place.reshape(-1, 3)  # also drops what no face uses
    ordered = np.sort(corners, axis=1)
    kept = (ordered[:, 0] < ordered[:, 1]) & (ordered[:, 1] < ordered[:, 2])
    corners, ordered = corners[kept], ordered[kept]
    order = np.lexsort(ordered.T[::-1])  # stable: of equal faces the first stays the first
    corners, ordered = corners[order], ordered[order]
    fresh = np.ones(len(ordered), dtype=bool)
    fresh[1:] = (ordered[1:] != ordered[:-1]).any(1)
    corners = corners[fresh]
    first = corners.argmin(1)[:, None] if len(corners) else np.zeros((0, 1), dtype=np.int64)
    corners = np.take_along_axis(corners, (first + np.arange(3)) % 3, axis=1)
    used, place = np.unique(corners, return_inverse=True)
    return QuantizedMesh(unpack(keys[used]), place.reshape(-1, 3))


def same_faces(a: QuantizedMesh, b: QuantizedMesh) -> bool:
    """Whether two meshes have the same faces, whichever way they wind."""
    return np.array_equal(a.vertices, b.vertices) and np.array_equal(np.sort(a.faces, 1), np.sort(b.faces, 1))


def pack(cells: Ints) -> Ints:
    """Put cells (..., 3) into one integer each, (...); larger ones come later in the order of vertices."""
    return (cells[..., 2] * MOST_BINS + cells[..., 1]) * MOST_BINS + cells[..., 0]


def unpack(keys: Ints) -> Ints:
    """Undo :func:`pack`: (...) to (..., 3)."""
    return np.stack([keys % MOST_BINS, keys // MOST_BINS % MOST_BINS, keys // MOST_BINS**2], axis=-1)


def _check_bins(bins: int) -> None:
    if not LEAST_BINS <= bins <= MOST_BINS:
        raise ConfigError(f"mesh: bins must be between {LEAST_BINS} and {MOST_BINS:,}, got {bins}; 128 is usual.")


# ---------------------------------------------------------------- grammar


class MeshGrammar:
    """Which tokens may follow: a finite automaton with a few registers, for a whole batch at a time.

    The state of a batch is an integer tensor (B, 1 + R): the automaton's state, then registers, -1 while empty. It
    begins in state 0. Tables are indexed by state and token; the column ``vocab_size`` of ``allowed`` is the end.

    A subclass that must also look at registers overrides ``advance`` and ``allowed``. It keeps three promises: what
    :meth:`MeshTokenizer.encode` writes is allowed; what is allowed from the begin to the end decodes to faces of three
    different vertices; and the end is never out of reach.

    Args:
        allowed: Bool (S, V + 1).
        following: Next states (S, V); any where not allowed.
        kinds: Kinds of tokens (S, V).
        registers: R.
    """

    def __init__(self, allowed: ArrayLike, following: ArrayLike, kinds: ArrayLike, registers: int = 0) -> None:
        self.allowed_table = torch.as_tensor(np.asarray(allowed, dtype=bool))
        self.next_table = torch.as_tensor(np.asarray(following, dtype=np.int64))
        self.kind_table = torch.as_tensor(np.asarray(kinds, dtype=np.int64))
        self.registers = registers

    @property
    def vocab_size(self) -> int:
        """V, without the end."""
        return self.next_table.shape[1]

    def begin(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """Return the state (B, 1 + R) before the first token; the tables move to ``device``."""
        if self.next_table.device != torch.device(device):
            for name in ("allowed_table", "next_table", "kind_table"):
                setattr(self, name, getattr(self, name).to(device))
        state = torch.full((batch, 1 + self.registers), -1, dtype=torch.int64, device=device)
        state[:, 0] = 0
        return state

    def advance(self, state: Tensor, ids: Tensor) -> Tensor:
        """Return the state after reading ids (B,), each of them allowed."""
        state = state.clone()
        state[:, 0] = self.next_table[state[:, 0], ids]
        return state

    def allowed(self, state: Tensor) -> Tensor:
        """Return what may come next, bool (B, V + 1); the last column is the end."""
        return self.allowed_table[state[:, 0]]

    def kinds(self, state: Tensor, ids: Tensor) -> Tensor:
        """Return the kinds (B,) of tokens ids (B,) that are read in ``state``."""
        return self.kind_table[state[:, 0], ids]

    @cached_property
    def _lists(self) -> tuple[list[list[bool]], list[list[int]], list[list[int]]]:
        return self.allowed_table.tolist(), self.next_table.tolist(), self.kind_table.tolist()

    def walk(self, ids: Sequence[int]) -> tuple[list[int], int, int]:
        """Read a sequence with the tables alone.

        Returns:
            The kinds of the tokens, the state behind them, and the number of tokens read before one that the tables do
            not allow.
        """
        may, following, kinds = self._lists
        state, found = 0, []
        for token in ids:
            if not 0 <= token < len(following[0]) or not may[state][token]:
                break
            found.append(kinds[state][token])
            state = following[state][token]
        return found, state, len(found)


class CoordinateGrammar(MeshGrammar):
    """A grammar of vertices that are three coordinates x, y, z, ids 0 .. ``bins`` - 1.

    Registers: x and y of the vertex being written, then the last three whole vertices, the latest last. While the last
    coordinate is written, those that would repeat a vertex of the open face are not allowed.

    Args:
        bins: Cells a side.
        allowed: As in ``MeshGrammar``.
        following: As in ``MeshGrammar``.
        kinds: As in ``MeshGrammar``.
        axes: Which coordinate a state reads, 0, 1 or 2; -1 where none (S,).
        against: How many of the latest vertices the vertex of that state must differ from, 0 .. 3 (S,).
    """

    LAST = 5  # column of the latest vertex

    def __init__(
        self,
        bins: int,
        allowed: ArrayLike,
        following: ArrayLike,
        kinds: ArrayLike,
        axes: Sequence[int],
        against: Sequence[int],
    ) -> None:
        super().__init__(allowed, following, kinds, registers=5)
        self.bins = bins
        self.axes = torch.tensor(axes)
        self.against = torch.tensor(against)

    def begin(self, batch: int, device: torch.device | str = "cpu") -> Tensor:
        """As in ``MeshGrammar``."""
        self.axes, self.against = self.axes.to(device), self.against.to(device)
        return super().begin(batch, device)

    def advance(self, state: Tensor, ids: Tensor) -> Tensor:
        """As in ``MeshGrammar``."""
        new = super().advance(state, ids)
        axis = torch.where(ids < self.bins, self.axes[state[:, 0]], -1)
        new[:, 1] = torch.where(axis == 0, ids, state[:, 1])
        new[:, 2] = torch.where(axis == 1, ids, state[:, 2])
        vertex = (state[:, 1] * self.bins + state[:, 2]) * self.bins + ids
        shifted = torch.cat([state[:, 4:6], vertex[:, None]], dim=1)
        new[:, 3:6] = torch.where((axis == 2)[:, None], shifted, state[:, 3:6])
        return new

    def allowed(self, state: Tensor) -> Tensor:
        """As in ``MeshGrammar``."""
        may = self.allowed_table[state[:, 0]].clone()
        closing = self.axes[state[:, 0]] == 2
        begun = state[:, 1] * self.bins + state[:, 2]
        for back in range(3):
            vertex = state[:, self.LAST - back]
            clash = closing & (self.against[state[:, 0]] > back) & (vertex // self.bins == begun)
            column = (vertex % self.bins)[:, None]
            may.scatter_(1, column, may.gather(1, column) & ~clash[:, None])
        return may


# ---------------------------------------------------------------- tokenizers


class MeshTokenizer(Tokenizer):
    """Meshes on the grid <-> ids.

    Args:
        bins: Cells a side.

    Attributes:
        vocab_size: Number of ids. There is none for the begin, the end or padding: those are the model's.
        num_kinds: Number of kinds of tokens, which a model may tell apart.
    """

    fields: ClassVar[tuple[str, ...]] = ("bins",)
    num_kinds: int

    def __init__(self, bins: int = 128) -> None:
        _check_bins(bins)
        self.bins = bins

    def encode(self, value: QuantizedMesh) -> Ints:
        """Write a mesh as ids (N,).

        Raises:
            DataError: The mesh has no faces, or vertices beyond the grid.
        """
        if not len(value.faces):
            raise DataError(f"{type(self).__name__}: a mesh must have at least one face, got none; leave it out.")
        if value.vertices.max() >= self.bins:
            raise DataError(
                f"{type(self).__name__}: vertices must lie on a grid of {self.bins} cells, got {value.vertices.max()}; "
                "quantize the mesh to this tokenizer's bins."
            )
        return self._ids(value)

    def decode(self, ids: ArrayLike, *, partial: bool = False) -> QuantizedMesh:
        """Read a mesh from ids.

        Args:
            ids: (N,).
            partial: Take what is whole before the first token out of place, even no face, instead of refusing.

        Raises:
            DataError: A token is out of place, or the sequence ends in the middle of a face.
        """
        corners = self.triangles(ids, partial=partial)
        return canonical(corners.reshape(-1, 3), np.arange(3 * len(corners)).reshape(-1, 3))

    def triangles(self, ids: ArrayLike, *, partial: bool = False) -> Ints:
        """Read the corners (F, 3, 3) of the faces in the order of the sequence; arguments as in ``decode``."""
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
            raise DataError(
                f"{type(self).__name__}: ids must be one row of integers, got {tokens.dtype} {tokens.shape}."
            )
        tokens = tokens.astype(np.int64)
        _, state, good = self._grammar.walk(tokens.tolist())
        if not partial:
            if good < len(tokens):
                raise DataError(
                    f"{type(self).__name__}: token {int(tokens[good])} cannot stand at position {good}; the sequence "
                    "is damaged, or of another tokenizer."
                )
            if not self._grammar._lists[0][state][-1]:
                raise DataError(
                    f"{type(self).__name__}: the sequence of {len(tokens)} tokens ends within a face; decode it with "
                    "partial=True to keep the whole ones."
                )
        return self._triangles(tokens[:good])

    def kinds(self, ids: ArrayLike) -> Ints:
        """Return the kind of every token (N,), each below ``num_kinds``.

        Raises:
            DataError: A token is out of place.
        """
        tokens = np.asarray(ids, dtype=np.int64).tolist()
        found, _, good = self._grammar.walk(tokens)
        if good < len(tokens):
            raise DataError(f"{type(self).__name__}: token {tokens[good]} cannot stand at position {good}.")
        return np.array(found, dtype=np.int64)

    @abstractmethod
    def grammar(self) -> MeshGrammar:
        """Make the grammar that every sequence of this tokenizer keeps to."""

    @cached_property
    def _grammar(self) -> MeshGrammar:
        return self.grammar()

    @abstractmethod
    def _ids(self, mesh: QuantizedMesh) -> Ints:
        """Write a mesh that has been checked."""

    @abstractmethod
    def _triangles(self, ids: Ints) -> Ints:
        """Read the corners (F, 3, 3) of all whole faces; the grammar's tables allow the ids."""


class CoordinateTokenizer(MeshTokenizer):
    """Nine coordinates a face: x, y, z of its corners (PolyGen's order of faces; the "plain" form of MeshAnything V2).

    Kinds: the coordinate's place in its face, 0 .. 8.

    Args:
        bins: Cells a side.
    """

    num_kinds = 9

    def __init__(self, bins: int = 128) -> None:
        super().__init__(bins)
        self.vocab_size = bins

    def grammar(self) -> MeshGrammar:
        """As in ``MeshTokenizer``."""
        states = np.arange(9)
        allowed = np.ones((9, self.bins + 1), dtype=bool)
        allowed[:, -1] = False  # no end within a face, ...
        following = np.repeat((states + 1)[:, None], self.bins, axis=1)
        following[8] = 9
        # ... state 9 is that between faces: as 0, but the end may come.
        allowed = np.concatenate([allowed, np.ones((1, self.bins + 1), dtype=bool)])
        following = np.concatenate([following, following[:1]])
        kinds = np.repeat(np.append(states, 0)[:, None], self.bins, axis=1)
        axes = [*(states % 3).tolist(), 0]
        return CoordinateGrammar(self.bins, allowed, following, kinds, axes, [*(states // 3).tolist(), 0])

    def _ids(self, mesh: QuantizedMesh) -> Ints:
        return mesh.corners.reshape(-1)

    def _triangles(self, ids: Ints) -> Ints:
        return ids[: len(ids) // 9 * 9].reshape(-1, 3, 3)


MESH_TOKENIZERS = {
    "plain": ("mesh", "CoordinateTokenizer"),
    "amt": ("mesh_amt", "AMTTokenizer"),
    "edgerunner": ("mesh_edgerunner", "EdgeRunnerTokenizer"),
    "bpt": ("mesh_bpt", "BPTTokenizer"),
}
"""Modules and classes of the tokenizers by their names."""


def make_mesh_tokenizer(name: str, bins: int = 128) -> MeshTokenizer:
    """Make a tokenizer by its name, with arguments behind it as in ``amt,up=z``.

    Raises:
        UnknownNameError: No such tokenizer.
        ConfigError: An argument it does not take.
    """
    kind, *changes = name.split(",")
    if kind not in MESH_TOKENIZERS:
        raise UnknownNameError("mesh tokenizer", kind, MESH_TOKENIZERS)
    path = ".".join(MESH_TOKENIZERS[kind])
    made = tokenizer_from_dict({"tokenizer": path, "bins": bins, **dict(c.partition("=")[::2] for c in changes)})
    assert isinstance(made, MeshTokenizer)
    return made
