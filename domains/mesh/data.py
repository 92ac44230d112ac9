"""The data module of meshes: files, procedural shapes or both, to points of the surface and tokens.

Points and normals are drawn from the surface anew in every epoch, with noise where asked for. Both the points and the
mesh are then moved into the box of the points, which is all that is known of a shape when a mesh is wanted for it.

Shapes: B items, N points, L tokens with begin and end, F faces.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.backbones.random import item_uniform
from vertebra.domains.base import BaseData, Items, Split
from vertebra.domains.batching import Batch
from vertebra.domains.mesh.files import MeshRules
from vertebra.domains.mesh.geometry import CONDITION_SCALE, Floats, Placement, sample_surface
from vertebra.domains.mesh.model import BEGIN, END, PAD, SPECIAL
from vertebra.domains.mesh.pool import LeftOut, MeshPool, procedural_pool, read_pool
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.mesh import Ints, MeshTokenizer, Place, canonical, make_mesh_tokenizer, quantize

log = logging.getLogger("vertebra")

_ITEM = 602  # salt of the draws


@dataclass(frozen=True, kw_only=True)
class MeshAugment:
    """What training does to meshes at random.

    Args:
        scale: Range of a factor for each axis (MeshAnything V2: 0.75 to 1.25).
        turn: Turns about the vertical axis, +Y: ``none``, by right angles, or by ``any``.
        mirror: Share of meshes that are mirrored at x = 0.
        noise: Most Gaussian noise of the points, a standard deviation in units of [-1, 1]; drawn evenly from 0.
        normal_noise: The same for each component of the normals.
    """

    scale: tuple[float, float] = (0.75, 1.25)
    turn: str = "right"
    mirror: float = 0.5
    noise: float = 0.02
    normal_noise: float = 0.1

    def __post_init__(self) -> None:
        low, high = self.scale
        if not 0 < low <= high:
            raise ConfigError(f"augment: scale must be a range above 0, got {low} .. {high}.")
        if self.turn not in ("none", "right", "any"):
            raise ConfigError(f"augment: turn must be none, right or any, got {self.turn!r}.")
        for name in ("mirror", "noise", "normal_noise"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment: {name} must be between 0 and 1, got {getattr(self, name)}.")

    def __call__(self, vertices: Floats, faces: Ints, rng: np.random.Generator) -> tuple[Floats, Ints]:
        """Change a mesh of the box; return vertices (V, 3) and faces (F, 3)."""
        vertices = vertices * rng.uniform(*self.scale, 3)
        draw = rng.random()
        angle = {"none": 0.0, "right": np.pi / 2 * int(4 * draw), "any": 2 * np.pi * draw}[self.turn]
        cos, sin = np.round([np.cos(angle), np.sin(angle)], 15)
        x, z = vertices[:, 0], vertices[:, 2]
        vertices = np.stack([cos * x + sin * z, vertices[:, 1], cos * z - sin * x], axis=1)
        if rng.random() < self.mirror:
            return vertices * [-1, 1, 1], faces[:, ::-1]
        return vertices, faces


@dataclass(frozen=True)
class MeshItem:
    """What a model is shown of one mesh.

    Args:
        points: Condition (N, 6), float32.
        ids: Begin, tokens, end (L,).
        kinds: Their kinds (L,).
        corners: Corners (F, 3, 3) of the true faces in the box of the points.
        cells: Cells (G, 3, 3) of the corners of the faces that the tokens write, in canonical order.
    """

    points: NDArray[np.float32]
    ids: Ints
    kinds: Ints
    corners: Floats
    cells: Ints


def make_item(
    vertices: Floats,
    faces: Ints,
    tokenizer: MeshTokenizer,
    count: int,
    rng: np.random.Generator,
    noise: float = 0.0,
    normal_noise: float = 0.0,
) -> MeshItem:
    """Draw points from a mesh, and write it in their box.

    Args:
        vertices: (V, 3), anywhere.
        faces: (F, 3).
        tokenizer: How.
        count: Points N.
        rng: Source of randomness.
        noise: Standard deviation of the points' noise, in units of [-1, 1].
        normal_noise: Of the normals' components.

    Raises:
        DataError: Nothing is left of the mesh on the grid.
    """
    own = Placement.of(vertices)
    points, normals = sample_surface(own.into(vertices), faces, count, rng)
    points = points + rng.normal(0, noise / CONDITION_SCALE, points.shape)
    normals = normals + rng.normal(0, normal_noise, normals.shape)
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-6)
    seen = Placement.of(points)
    inside = seen.into(own.into(vertices))
    mesh = canonical(quantize(inside, tokenizer.bins), faces)
    ids = tokenizer.encode(mesh)
    condition = np.concatenate([seen.into(points) * CONDITION_SCALE, normals], axis=1).astype(np.float32)
    return MeshItem(
        condition,
        np.concatenate([[BEGIN], ids + SPECIAL, [END]]),
        np.concatenate([[BEGIN], tokenizer.kinds(ids) + SPECIAL, [END]]),
        inside[faces],
        mesh.corners,
    )


class MeshItems:
    """Meshes of a split.

    Args:
        pool: The meshes.
        spec: Facts about the data.
        seed: Of the draws.
        augment: What to do to them; None for evaluation, where every epoch is the same.
        noise: Noise of the points in evaluation, a standard deviation in units of [-1, 1].
        unknown_faces: Share of training items that are not told their face count.
    """

    def __init__(
        self,
        pool: MeshPool,
        spec: MeshSpec,
        seed: int,
        augment: MeshAugment | None = None,
        noise: float = 0.0,
        unknown_faces: float = 0.1,
    ) -> None:
        self.pool, self.spec, self.seed, self.augment, self.noise = pool, spec, seed, augment, noise
        self.unknown_faces = unknown_faces
        self.tokenizer = tokenizer_from_dict(spec.tokenizer)
        assert isinstance(self.tokenizer, MeshTokenizer)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of every mesh with begin and end, (M,); augmentation changes them little."""
        return self.pool.tokens + 2

    def item(self, index: int, epoch: int) -> MeshItem:
        """Make an item as it is in ``epoch``."""
        assert isinstance(self.tokenizer, MeshTokenizer)
        vertices, faces = self.pool[index]
        if self.augment is None:
            rng = np.random.default_rng([self.seed, _ITEM, index])
            return make_item(vertices, faces, self.tokenizer, self.spec.points, rng, self.noise)
        rng = np.random.default_rng([self.seed, _ITEM, index, 1 + epoch])
        changed, turned = self.augment(vertices, faces, rng)
        noise, normal_noise = rng.random(2) * (self.augment.noise, self.augment.normal_noise)
        return make_item(changed, turned, self.tokenizer, self.spec.points, rng, noise, normal_noise)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Make a batch: points, ids, kinds, mask, face_buckets, corners (NaN at padding), cells (-1 there), index."""
        items = [self.item(int(i), epoch) for i in indices]
        longest = max(len(item.ids) for item in items)
        ids, kinds = np.full((2, len(items), longest), PAD)
        for row, item in enumerate(items):
            ids[row, : len(item.ids)], kinds[row, : len(item.ids)] = item.ids, item.kinds
        most = max(len(item.corners) for item in items)
        corners = np.full((len(items), most, 3, 3), np.nan, dtype=np.float32)
        for row, item in enumerate(items):
            corners[row, : len(item.corners)] = item.corners
        cells = np.full((len(items), max(len(item.cells) for item in items), 3, 3), -1)
        for row, item in enumerate(items):
            cells[row, : len(item.cells)] = item.cells
        lengths = np.array([len(item.ids) for item in items])
        buckets = 1 + np.searchsorted(self.spec.face_buckets, [len(item.cells) for item in items])
        if self.augment is not None:
            hidden = item_uniform(self.seed, epoch, indices, salt=_ITEM) < self.unknown_faces
            buckets = np.where(hidden, 0, buckets)
        return {
            "points": torch.from_numpy(np.stack([item.points for item in items])),
            "ids": torch.from_numpy(ids),
            "kinds": torch.from_numpy(kinds),
            "mask": torch.from_numpy(np.arange(longest) < lengths[:, None]),
            "face_buckets": torch.from_numpy(buckets),
            "corners": torch.from_numpy(corners),
            "cells": torch.from_numpy(cells),
            "index": torch.from_numpy(np.asarray(indices)),
        }


class MeshData(BaseData):
    """Meshes from files, procedural ones, or both.

    Args:
        root: Files or folders of meshes (obj, ply, glb, gltf, stl, off). Of a folder with a folder ``train``, that and
            ``val`` and ``test`` beside it are read, and kept as splits; other meshes are drawn to splits.
        val: Other meshes for validation.
        test: Other meshes for testing.
        procedural: Numbers of procedural shapes for training, validation and testing; the latter two have parameters
            that training never sees.
        repeat: How many times each file's mesh appears in a training epoch, to weigh a few files against many
            procedural shapes.
        tokenizer: ``plain``, ``amt``, ``edgerunner`` or ``bpt``; ``amt,up=z`` is that of the released MeshAnything V2.
        bins: Cells a side of the grid.
        place: Point of a cell that stands for it; ``lower`` for the released MeshAnything.
        points: Points of the condition.
        rules: Which files are used; the others are reported.
        max_tokens: Meshes of more tokens are left out and reported.
        face_buckets: Upper ends of the ranges of face counts that the model is told; none for a model that is not.
        unknown_faces: Share of training items that are not told their face count (MeshAnything V2).
        augment: What training does to meshes at random.
        noise: Noise of the points in evaluation, a standard deviation in units of [-1, 1].
        val_fraction: Share of the files for validation, where there is no such split.
        test_fraction: Share for testing, likewise.
        cache: Folder in which the set is kept once read and counted; None for none.
        batch_size: Meshes in a batch.
        max_batch_tokens: Tokens in a batch, padding included; with ``batch_size`` the smaller of both limits holds.
        num_workers: Worker processes.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of splits, order, points and augmentation.
    """

    def __init__(
        self,
        *,
        root: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        procedural: tuple[int, int, int] = (0, 0, 0),
        repeat: int = 1,
        tokenizer: str = "amt",
        bins: int = 128,
        place: Place = "centre",
        points: int = 4096,
        rules: MeshRules | None = None,
        max_tokens: int = 3600,
        face_buckets: tuple[int, ...] = (),
        unknown_faces: float = 0.1,
        augment: MeshAugment | None = None,
        noise: float = 0.0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        cache: str | None = None,
        batch_size: int = 16,
        max_batch_tokens: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size,
            max_tokens=max_batch_tokens,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        if root is None and not any(procedural):
            raise ConfigError("MeshData: give root, files or folders of meshes, or procedural, numbers of shapes.")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ConfigError(
                "MeshData: val_fraction and test_fraction must be from 0 and below 1 together, got "
                f"{val_fraction} and {test_fraction}."
            )
        if len(procedural) != 3 or min(procedural) < 0:
            raise ConfigError(f"MeshData: procedural must be three numbers from 0 on, got {list(procedural)}.")
        for name, value in (("repeat", repeat), ("points", points)):
            if value < 1:
                raise ConfigError(f"MeshData: {name} must be at least 1, got {value}.")
        for name, share in (("unknown_faces", unknown_faces), ("noise", noise)):
            if not 0 <= share <= 1:
                raise ConfigError(f"MeshData: {name} must be between 0 and 1, got {share}.")
        self.sources = {"train": _paths(root), "val": _paths(val), "test": _paths(test)}
        self.procedural, self.repeat = dict(zip(("train", "val", "test"), procedural, strict=True)), repeat
        self.tokenizer = make_mesh_tokenizer(tokenizer, bins)
        self.place, self.points, self.face_buckets = place, points, tuple(face_buckets)
        self.rules, self.mesh_tokens = rules or MeshRules(), max_tokens
        self.augment, self.noise = augment or MeshAugment(), noise
        self.unknown_faces = unknown_faces
        self.fractions = {"val": val_fraction, "test": test_fraction}
        self.cache = None if cache is None else Path(cache)
        self.left_out: tuple[LeftOut, ...] = ()

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """As in ``BaseData``."""
        if spec is not None and not isinstance(spec, MeshSpec):
            raise ConfigError(f"MeshData: the model is for {spec.domain}, not for meshes.")
        if spec is None:
            spec = MeshSpec(
                tokenizer=self.tokenizer.to_dict(),
                points=self.points,
                max_faces=self.rules.max_faces,
                max_tokens=self.mesh_tokens,
                place=self.place,
                face_buckets=self.face_buckets,
            )
        tokenizer = tokenizer_from_dict(spec.tokenizer)
        assert isinstance(tokenizer, MeshTokenizer)
        files = self._files(tokenizer, spec.max_tokens)
        items: dict[str, Items] = {}
        for split in sorted(splits & {"train", "val", "test"}):
            pools = [files[split]] if split in files else []
            if self.procedural[split]:
                count = self.procedural[split]
                pools.append(procedural_pool(split, count, tokenizer, spec.max_tokens, self.seed))
            if pools:
                repeats = [self.repeat if split == "train" and pool is files.get(split) else 1 for pool in pools]
                pool = join(pools, repeats)
                augment = self.augment if split == "train" else None
                items[split] = MeshItems(pool, spec, self.seed, augment, self.noise, self.unknown_faces)
        return spec, items

    def _files(self, tokenizer: MeshTokenizer, max_tokens: int) -> dict[str, MeshPool]:
        found: dict[str, MeshPool] = {}
        left: list[LeftOut] = []
        for split, paths in self.sources.items():
            if not paths:
                continue
            own = {split: paths}
            if split == "train":
                kept = [p for p in paths if (p / "train").is_dir()]
                own = {"train": [p / "train" if p in kept else p for p in paths]}
                for other in ("val", "test"):
                    if not self.sources[other]:
                        own[other] = [p / other for p in kept if (p / other).is_dir()]
            for name, part in own.items():
                if not part:
                    continue
                pool = read_pool(part, tokenizer, self.rules, max_tokens, cache=self.cache)
                left += pool.left_out
                found[name] = pool
        if "train" in found:
            rest = found["train"]
            draws = np.array([_draw(Path(name), self.sources["train"], self.seed) for name in rest.names])
            start = 0.0
            for split in ("val", "test"):
                if split in found or self.procedural[split]:
                    continue
                end = start + self.fractions[split]
                chosen = np.flatnonzero((draws >= start) & (draws < end))
                start = end
                if len(chosen):
                    found[split] = rest.take(chosen)
            found["train"] = rest.take(np.flatnonzero(draws >= start))
            if not len(found["train"]):
                raise DataError(
                    f"MeshData: all {len(rest)} meshes were drawn to other splits; lower val_fraction and "
                    "test_fraction."
                )
        self.left_out = tuple(left)
        for one in left:
            log.warning("left out: %s: %s", one.name, one.reason)
        return found


def join(pools: list[MeshPool], repeats: list[int]) -> MeshPool:
    """Put pools behind one another, each ``repeats`` times; nothing is left out of the result."""
    pools = [pool for pool, times in zip(pools, repeats, strict=True) for _ in range(times)]
    if len(pools) == 1:
        return pools[0]

    def ends(name: str) -> Ints:
        return np.cumsum(np.concatenate([np.diff(getattr(pool, name), prepend=0) for pool in pools]))

    return MeshPool(
        tuple(name for pool in pools for name in pool.names),
        np.concatenate([pool.vertices for pool in pools]),
        np.concatenate([pool.faces for pool in pools]),
        ends("vertex_ends"),
        ends("face_ends"),
        np.concatenate([pool.tokens for pool in pools]),
    )


def _paths(value: str | list[str] | None) -> list[Path]:
    return [Path(p) for p in ([] if value is None else [value] if isinstance(value, str | os.PathLike) else value)]


def _draw(path: Path, roots: list[Path], seed: int) -> float:
    """Number in [0, 1) of a file's place in its folder: a split stays when files are added, or the folder is moved."""
    inside = next((path.relative_to(root) for root in roots if root in path.parents), Path(path.name))
    return int.from_bytes(blake2b(f"{seed} {inside.as_posix()}".encode(), digest_size=8).digest()) / 2**64
