"""A set of meshes that were read, checked and counted once: kept in memory as a few arrays, and on disk as an .npz.

Shapes: M meshes, V vertices and F faces of all of them.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import trimesh
from numpy.typing import NDArray

from vertebra.domains.mesh.files import MeshRules, find_shapes, fingerprint, read_shape, reason_left_out
from vertebra.domains.mesh.geometry import Floats, quantized
from vertebra.domains.mesh.procedural import FAMILIES, draw
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.mesh import Ints, MeshTokenizer

log = logging.getLogger("vertebra")

FORMAT = 1
_TRIES = 20
"""Shapes that are drawn for one that is wanted, before a limit of tokens is called too low."""


@dataclass(frozen=True)
class LeftOut:
    """A mesh that is not used.

    Args:
        name: Of its file.
        reason: Why, in a few words.
    """

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class MeshPool:
    """Meshes in the box [-0.5, 0.5], one behind the other.

    Args:
        names: Where each came from.
        vertices: (V, 3) float32.
        faces: (F, 3), numbered within the mesh.
        vertex_ends: End of each mesh's vertices (M,).
        face_ends: End of each mesh's faces (M,).
        tokens: Tokens of each mesh (M,).
        left_out: What is not in it.
    """

    names: tuple[str, ...]
    vertices: NDArray[np.float32]
    faces: NDArray[np.int32]
    vertex_ends: Ints
    face_ends: Ints
    tokens: Ints
    left_out: tuple[LeftOut, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Floats, Ints]:
        """Return vertices (V_i, 3) and faces (F_i, 3) of a mesh."""
        v0, f0 = (int(ends[index - 1]) if index else 0 for ends in (self.vertex_ends, self.face_ends))
        vertices = self.vertices[v0 : int(self.vertex_ends[index])]
        return vertices.astype(np.float64), self.faces[f0 : int(self.face_ends[index])].astype(np.int64)

    @property
    def face_counts(self) -> Ints:
        """Faces of each mesh (M,)."""
        return np.diff(self.face_ends, prepend=0)

    def take(self, indices: Sequence[int] | Ints) -> MeshPool:
        """Return the meshes ``indices``, in that order; nothing is left out of it."""
        chosen = [int(i) for i in indices]
        return _pool([(self.names[i], *self[i], int(self.tokens[i])) for i in chosen], ())

    def save(self, path: Path) -> None:
        """Write the pool as .npz, whole or not at all.

        Raises:
            DataError: The file cannot be written.
        """
        facts = {"format": FORMAT, "names": self.names, "left_out": [[x.name, x.reason] for x in self.left_out]}
        arrays = {name: getattr(self, name) for name in _ARRAYS}
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                np.savez_compressed(file, facts=np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8), **arrays)
            part.replace(path)
        except OSError as e:
            part.unlink(missing_ok=True)
            raise DataError(f"{path}: cannot be written ({e.strerror or e}); choose another folder.") from None

    @staticmethod
    def load(path: Path) -> MeshPool:
        """Read what ``save`` wrote.

        Raises:
            DataError: The file is damaged.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                facts = json.loads(data["facts"].tobytes())
                arrays = {name: data[name] for name in _ARRAYS}
            if facts["format"] != FORMAT:
                raise ValueError(f"format {facts['format']}")
            left_out = tuple(LeftOut(*x) for x in facts["left_out"])
        except Exception as e:  # NumPy, zipfile, zlib and json each have their own
            raise DataError(f"{path}: is no readable cache of meshes ({e}); delete it.") from e
        return MeshPool(tuple(facts["names"]), **arrays, left_out=left_out)


_ARRAYS = ("vertices", "faces", "vertex_ends", "face_ends", "tokens")


def _pool(meshes: list[tuple[str, Floats, Ints, int]], left_out: tuple[LeftOut, ...]) -> MeshPool:
    return MeshPool(
        tuple(name for name, *_ in meshes),
        np.concatenate([np.zeros((0, 3)), *(v for _, v, _, _ in meshes)]).astype(np.float32),
        np.concatenate([np.zeros((0, 3)), *(f for _, _, f, _ in meshes)]).astype(np.int32),
        np.cumsum([len(v) for _, v, _, _ in meshes], dtype=np.int64),
        np.cumsum([len(f) for _, _, f, _ in meshes], dtype=np.int64),
        np.array([t for *_, t in meshes], dtype=np.int64),
        left_out,
    )


def read_pool(
    sources: Sequence[str | Path],
    tokenizer: MeshTokenizer,
    rules: MeshRules,
    max_tokens: int,
    *,
    cache: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> MeshPool:
    """Read files and folders of meshes.

    Args:
        sources: Files and folders.
        tokenizer: Counts tokens, and says which grid meshes are checked on.
        rules: Which meshes are used.
        max_tokens: Meshes of more are left out.
        cache: Folder in which the set is kept, and found again while files and settings are the same.
        progress: Called with the number of files that were read and that there are.

    Raises:
        DataError: There is no file, or none can be used.
    """
    paths = find_shapes(sources)
    kept: Path | None = None
    if cache is not None:
        facts = [FORMAT, tokenizer.to_dict(), repr(rules), max_tokens]
        facts += [[str(p), str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in paths]
        kept = cache / f"{blake2b(json.dumps(facts).encode(), digest_size=12).hexdigest()}.npz"
        if kept.is_file():
            return MeshPool.load(kept)
    pool = collect(_read(paths, progress), tokenizer, rules, max_tokens)
    if not len(pool):
        first = pool.left_out[0]
        raise DataError(f"none of {len(paths)} files can be used; {first.name}: {first.reason}.")
    if kept is not None:
        pool.save(kept)
    return pool


def _read(
    paths: Sequence[Path], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, trimesh.Trimesh | LeftOut]]:
    for i, path in enumerate(paths):
        try:
            mesh = read_shape(path).mesh
            yield str(path), LeftOut(str(path), "is a point cloud, not a mesh") if mesh is None else mesh
        except DataError as e:
            yield str(path), LeftOut(str(path), str(e))
        if progress is not None:
            progress(i + 1, len(paths))


def procedural_pool(
    split: str,
    count: int,
    tokenizer: MeshTokenizer,
    max_tokens: int,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> MeshPool:
    """Draw procedural shapes of a split; those of too many tokens are replaced by the next.

    Args:
        split: One of ``procedural.SPLITS``.
        count: Shapes wanted.
        tokenizer: As in ``read_pool``.
        max_tokens: Most tokens of a shape.
        seed: Of the shapes.
        progress: Called with the number of shapes that were found and that are wanted.

    Raises:
        ConfigError: ``count`` is below 1, or too few shapes have so few tokens.
    """
    if count < 1:
        raise ConfigError(f"procedural: a split must have at least 1 shape, got {count}.")
    used: list[tuple[str, Floats, Ints, int]] = []
    drawn = 0
    while len(used) < count:
        if drawn == _TRIES * count + len(FAMILIES):
            raise ConfigError(
                f"procedural: {len(used)} of the first {drawn:,} shapes have at most max_tokens={max_tokens:,} tokens, "
                f"where {count:,} are wanted; raise max_tokens."
            )
        mesh = draw(split, seed, drawn)
        qmesh, placement = quantized(mesh, tokenizer.bins)
        tokens = len(tokenizer.encode(qmesh))
        if tokens <= max_tokens:
            faces = np.asarray(mesh.faces, dtype=np.int64)
            used.append((f"procedural {split} {seed} {drawn}", placement.into(mesh.vertices), faces, tokens))
            if progress is not None:
                progress(len(used), count)
        drawn += 1
    return _pool(used, ())


def collect(
    meshes: Iterable[tuple[str, trimesh.Trimesh | LeftOut]],
    tokenizer: MeshTokenizer,
    rules: MeshRules,
    max_tokens: int,
) -> MeshPool:
    """Check and count meshes.

    Args:
        meshes: Names, and meshes or why there is none.
        tokenizer: As in ``read_pool``.
        rules: As in ``read_pool``.
        max_tokens: As in ``read_pool``.
    """
    used: list[tuple[str, Floats, Ints, int]] = []
    left: list[LeftOut] = []
    seen: dict[str, str] = {}
    for name, mesh in meshes:
        if isinstance(mesh, LeftOut):
            left.append(mesh)
            continue
        qmesh, placement = quantized(mesh, tokenizer.bins)
        reason = reason_left_out(mesh, qmesh, rules)
        if reason is None:
            first = seen.setdefault(fingerprint(qmesh), name)
            reason = None if first is name else f"is the same mesh as {first}"
        tokens = len(tokenizer.encode(qmesh)) if reason is None else 0
        if reason is None and tokens > max_tokens:
            reason = f"has {tokens:,} tokens, more than max_tokens={max_tokens:,}"
        if reason is not None:
            left.append(LeftOut(name, reason))
        else:
            used.append((name, placement.into(mesh.vertices), np.asarray(mesh.faces, dtype=np.int64), tokens))
    return _pool(used, tuple(left))
