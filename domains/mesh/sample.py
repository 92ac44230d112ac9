"""Fabricated furniture and houses, in the formats that people have: clean, scanned, as points, and damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vertebra.domains.mesh.files import write_mesh
from vertebra.domains.mesh.geometry import sample_surface
from vertebra.domains.mesh.procedural import FAMILIES, SPLITS, dense, draw

COUNTS = {"train": 60, "val": 12, "test": 12}
"""Shapes of each split, as many of every family."""
POINTS = 4096
"""Points of a cloud."""

_ENDINGS = ("obj", "ply", "glb", "stl", "off")
_SCANNED = 600  # number of the first test shape that is scanned; those before are for shapes/
_NOISE = 0.003  # of scans and clouds, a share of the longest side: a third of a step of 128


def write_sample(folder: Path, seed: int = 0) -> list[Path]:
    """Fabricate meshes and points in the formats that the mesh domain reads; the same seed gives the same bytes.

    Args:
        folder: Where to write; made when missing.
        seed: Seed of everything.

    Returns:
        The files: ``shapes/SPLIT/FAMILY_NN.*`` (60 clean meshes for training, 12 each for validation and testing, whose
        parameters training does not have; obj, ply, glb, stl and off), ``scans/`` (six more test shapes as dense, noisy
        meshes, ply and obj), ``clouds/`` (six as 4,096 noisy points: npy with normals, ply without), ``truth/`` (the
        clean meshes of scans and clouds, under the same names), and ``damaged/`` (two good meshes, four files that
        cannot be read, and one of more faces than models write).
    """
    folder = Path(folder)
    for name in (*(f"shapes/{split}" for split in SPLITS), "scans", "clouds", "truth", "damaged"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    paths = []
    for split in SPLITS:
        for i in range(COUNTS[split]):
            mesh = draw(split, seed, i)
            # Families take turns in six, so that endings in five come to each of them.
            paths.append(folder / "shapes" / split / f"{mesh.metadata['family']}_{i:02}.{_ENDINGS[i % len(_ENDINGS)]}")
            write_mesh(mesh, paths[-1])
    paths += _write_scans(folder, seed)
    return paths + _write_damaged(folder / "damaged", seed)


def _write_scans(folder: Path, seed: int) -> list[Path]:
    paths = []
    for i in range(2 * len(FAMILIES)):
        rng = np.random.default_rng([seed, 1, i])
        mesh = draw("test", seed, _SCANNED + i)
        name = f"{mesh.metadata['family']}_{i:02}"
        mesh.vertices = mesh.vertices * rng.uniform(0.5, 3) + rng.uniform(-2, 2, 3)  # metres, somewhere in a room
        paths.append(folder / "truth" / f"{name}.obj")
        write_mesh(mesh, paths[-1])
        if i < len(FAMILIES):
            paths.append(folder / "scans" / f"{name}.{('ply', 'obj')[i % 3 == 2]}")
            write_mesh(dense(mesh, rng, 4000, _NOISE), paths[-1])
            continue
        points, normals = sample_surface(mesh.vertices, mesh.faces, POINTS, rng)
        points += rng.normal(0, _NOISE * mesh.extents.max(), points.shape)
        if i % 2:
            paths.append(folder / "clouds" / f"{name}.ply")
            header = f"ply\nformat binary_little_endian 1.0\nelement vertex {POINTS}\n"
            header += "property float x\nproperty float y\nproperty float z\nend_header\n"
            paths[-1].write_bytes(header.encode() + points.astype("<f4").tobytes())
        else:
            paths.append(folder / "clouds" / f"{name}.npy")
            np.save(paths[-1], np.concatenate([points, normals], axis=1).astype(np.float32))
    return sorted(paths)


def _write_damaged(folder: Path, seed: int) -> list[Path]:
    first = 2 * _SCANNED
    table, house = (draw("test", seed, first + FAMILIES.index(name)) for name in ("table", "house"))
    large = dense(house, np.random.default_rng([seed, 2]), 8000, _NOISE)
    meshes = {
        "good-table.obj": table,
        "good-house.glb": house,
        "too-large.ply": large,
        "nan.obj": table,
        "truncated.ply": house,
    }
    for name, mesh in meshes.items():
        write_mesh(mesh, folder / name)
    lines = (folder / "nan.obj").read_bytes().splitlines(keepends=True)
    row = next(i for i, line in enumerate(lines) if line.startswith(b"v "))
    lines[row] = b"v nan 0.1 0.2\n"
    (folder / "nan.obj").write_bytes(b"".join(lines))
    whole = (folder / "truncated.ply").read_bytes()
    (folder / "truncated.ply").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.obj").write_bytes(b"")
    (folder / "text.stl").write_bytes(b"This is not a mesh.\n")
    return [folder / name for name in (*meshes, "empty.obj", "text.stl")]
