"""Read meshes and point clouds, say what is wrong with those that cannot be used, and write meshes.

trimesh decodes. What it passes over in silence is looked for here: files that end before the number of faces they
promise, indices without a vertex, numbers that are no coordinates.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import trimesh

from vertebra.domains.mesh.geometry import Floats, weld
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.mesh import QuantizedMesh

MESH_ENDINGS = frozenset((".obj", ".ply", ".glb", ".gltf", ".stl", ".off"))
"""Endings, in lower case, of the files that are taken for meshes; a .ply without faces is a point cloud."""
ARRAY_ENDINGS = frozenset((".npy", ".npz"))
"""Endings of point clouds as arrays."""
WRITE_ENDINGS = (".obj", ".glb", ".ply", ".stl", ".off")
"""Endings that :func:`write_mesh` knows."""

_ENDINGS = MESH_ENDINGS | ARRAY_ENDINGS
_KNOWN = ", ".join(sorted(_ENDINGS))
_LARGEST = 1e30  # of a coordinate: products of six of them, as areas need, are still float64
_MOST_BYTES = 1 << 30  # text takes ten times as much memory while it is decoded
_MOST_FACES = 50_000_000  # instances of a part may be many in a small file
_COPY = "copy or export it again"
_NO_VERTEX_0 = re.compile(rb"^[ \t]*f[ \t](?:[^\n]*[ \t])?0+(?:[/ \t\r]|$)", re.MULTILINE)
_COMPRESSED = (b"KHR_draco_mesh_compression", b"EXT_meshopt_compression")


class MeshFileError(DataError):
    """A mesh or point cloud that cannot be used.

    Args:
        file: Name of the file.
        rule: What is wrong.
        advice: What to do.
    """

    def __init__(self, file: str, rule: str, advice: str) -> None:
        super().__init__(f"{file}: {rule}; {advice}.")
        self.file, self.rule, self.advice = file, rule, advice

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.rule, self.advice)


@dataclass(frozen=True, eq=False)
class Shape:
    """What a file holds, in its own coordinates: either a mesh or points.

    Args:
        mesh: Welded; None of a point cloud. Colours, textures and normals are left out.
        points: (N, 3); None of a mesh.
        normals: Unit normals (N, 3) of the points; None where the file has none.
        notes: What was changed or left out, a sentence each.
    """

    mesh: trimesh.Trimesh | None = None
    points: Floats | None = None
    normals: Floats | None = None
    notes: tuple[str, ...] = ()


# --- reading ----------------------------------------------------------------------------------------------------------


def find_shapes(paths: Iterable[str | Path]) -> list[Path]:
    """List the meshes and point clouds among files and folders.

    Args:
        paths: Files, and folders that are searched with all that is in them.

    Returns:
        Each file once, sorted.

    Raises:
        DataError: A path does not exist, or nothing that can be read is in a folder.
    """
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            inside = [p for p in path.rglob("*") if p.suffix.lower() in _ENDINGS and p.is_file()]
            if not inside:
                raise DataError(f"{path}: no mesh or point cloud is in this folder; choose one with {_KNOWN}.")
            found.update(inside)
        elif path.exists():
            found.add(path)
        else:
            raise DataError(f"{path}: there is no such file or folder; correct the path.")
    return sorted(found)


def read_shape(path: str | Path) -> Shape:
    """Read a mesh or a point cloud.

    Meshes: obj, ply, glb, gltf, stl and off; the parts of a scene are put where it places them, polygons are cut into
    triangles, and vertices at the same position become one. Point clouds: ply without faces, and npy or npz with an
    array (N, 3), or (N, 6) with normals behind the positions; an npz may hold them as ``points`` and ``normals``.

    Raises:
        MeshFileError: Nothing there, unknown ending, damaged, truncated or too large, no faces or points, an index
            without a vertex, or coordinates that are not finite.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in _ENDINGS:
        raise MeshFileError(
            str(path), f"{ending or 'no ending'!r} is not a kind of file that is read", f"convert it to one of {_KNOWN}"
        )
    data = _bytes(path)
    if ending in ARRAY_ENDINGS:
        return _cloud(str(path), *_arrays(str(path), data), [])
    if ending in (".obj", ".off"):
        data = _text(str(path), ending, data)
    scene = _scene(path, ending, data)
    _check_counts(str(path), ending, data, scene)
    return _flatten(str(path), ending, scene)


def read_mesh(path: str | Path) -> trimesh.Trimesh:
    """Read a mesh as :func:`read_shape` does.

    Raises:
        MeshFileError: As of :func:`read_shape`, or the file is a point cloud.
    """
    shape = read_shape(path)
    if shape.mesh is None:
        raise MeshFileError(str(path), "a point cloud, where a mesh is needed", "choose a file that has faces")
    return shape.mesh


def _bytes(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise MeshFileError(
                str(path), f"{size / 2**30:.1f} GiB, where at most {_MOST_BYTES >> 30} are read", "decimate it first"
            )
        data = path.read_bytes()
    except FileNotFoundError:
        raise MeshFileError(str(path), "there is no such file", "correct the path") from None
    except OSError as e:
        rule = f"the file cannot be opened ({e.strerror or e})"
        raise MeshFileError(str(path), rule, "check what it is and who may read it") from None
    if not data.strip():
        raise MeshFileError(str(path), "the file is empty", _COPY)
    return data


def _text(file: str, ending: str, data: bytes) -> bytes:
    """Check text and make it UTF-8; only comments and names can lose letters."""
    if b"\0" in data:
        raise MeshFileError(file, f"holds binary data, and {ending} is a text format", "correct its ending")
    if ending == ".obj" and _NO_VERTEX_0.search(data):
        raise MeshFileError(file, "a face names vertex 0, and OBJ counts from 1", "export it again")
    return data.decode("utf-8", errors="replace").encode()


def _scene(path: Path, ending: str, data: bytes) -> trimesh.Scene:
    name = ending[1:]
    for extension in _COMPRESSED:
        if name in ("glb", "gltf") and b'"' + extension + b'"' in data:
            raise MeshFileError(str(path), f"compressed by {extension.decode()}", "export it without compression")
    resolver = trimesh.resolvers.FilePathResolver(str(path)) if name == "gltf" else None
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message=".*unmatched data.*")  # words among the numbers of a PLY
            return trimesh.load_scene(
                BytesIO(data), file_type=name, resolver=resolver, process=False, skip_materials=True
            )
    except MemoryError:
        raise MeshFileError(str(path), "does not fit into memory", "decimate it first") from None
    except FileNotFoundError as e:
        raise MeshFileError(
            str(path), f"the file {Path(str(e.filename)).name!r}, which it names, is missing", "put it beside"
        ) from None
    except Exception:  # whatever a decoder raises at damaged data
        rule = f"cannot be read as {name.upper()}; it is damaged, cut short, or of another kind"
        raise MeshFileError(str(path), rule, _COPY) from None


def _check_counts(file: str, ending: str, data: bytes, scene: trimesh.Scene) -> None:
    """Compare the rows of text formats with what their headers promise; trimesh takes what is there."""
    if ending == ".off":
        header = re.search(rb"OFF\s+(?:#[^\n]*\s+)*(\d+)\s+(\d+)", data)
        have = sum(len(getattr(part, "faces", ())) for part in scene.geometry.values())
        if header and have < int(header[2]):
            raise MeshFileError(file, f"ends after {have:,} of {int(header[2]):,} faces", _COPY)
    if ending == ".stl":
        binary = len(data) == 84 + 50 * int.from_bytes(data[80:84], "little")
        if not binary and b"endsolid" not in data.lower():
            raise MeshFileError(file, "has no line 'endsolid'; it is cut short or damaged", _COPY)
    if ending == ".ply":
        for part in scene.geometry.values():
            for name, element in part.metadata.get("_ply_raw", {}).items():
                rows = element.get("data")
                columns = list(rows.values()) if isinstance(rows, dict) else [rows]
                have = len(columns[0]) if columns and columns[0] is not None else 0
                if have < element["length"]:
                    rule = f"ends after {have:,} of {element['length']:,} rows of the element {name!r}"
                    raise MeshFileError(file, rule, _COPY)


def _flatten(file: str, ending: str, scene: trimesh.Scene) -> Shape:
    """Put the parts of a scene into one shape."""
    placed = [(*scene.graph[node], node) for node in sorted(scene.graph.nodes_geometry)]
    parts = [(matrix, scene.geometry[name]) for matrix, name, _ in placed]
    meshes = [(m, part) for m, part in parts if isinstance(part, trimesh.Trimesh) and len(part.faces)]
    clouds = [(m, part) for m, part in parts if isinstance(part, trimesh.PointCloud) and len(part.vertices)]
    notes = []
    if meshes:
        if other := len(parts) - len(meshes):
            notes.append(f"{other} part{'s' * (other > 1)} without faces left out")
        return _mesh(file, meshes, notes)
    if not clouds:
        raise MeshFileError(file, "holds no faces", "export it again, with the mesh selected")
    if ending != ".ply":
        rule = f"holds {sum(len(part.vertices) for _, part in clouds):,} vertices and no faces"
        raise MeshFileError(file, rule, "save it as .ply or .npy if it is a point cloud")
    part = clouds[0][1]  # a PLY has one
    raw = part.metadata["_ply_raw"]["vertex"]["data"]
    fields = raw.dtype.names if isinstance(raw, np.ndarray) else raw.keys()
    normals = None
    if {"nx", "ny", "nz"} <= set(fields):
        normals = np.stack([np.asarray(raw[axis], dtype=np.float64).reshape(-1) for axis in ("nx", "ny", "nz")], 1)
    return _cloud(file, np.asarray(part.vertices, dtype=np.float64), normals, notes)


def _mesh(file: str, parts: Sequence[tuple[Floats, trimesh.Trimesh]], notes: list[str]) -> Shape:
    if (total := sum(len(part.faces) for _, part in parts)) > _MOST_FACES:
        raise MeshFileError(file, f"{total:,} faces, where at most {_MOST_FACES:,} are read", "decimate it first")
    vertices, faces, start = [], [], 0
    for matrix, part in parts:
        corners = np.asarray(part.faces, dtype=np.int64)
        if corners.min() < 0 or corners.max() >= len(part.vertices):
            bad = corners[(corners < 0) | (corners >= len(part.vertices))][0]
            rule = f"a face names vertex {bad} (from 0), and there are {len(part.vertices):,}"
            raise MeshFileError(file, rule, _COPY)
        points = np.asarray(part.vertices, dtype=np.float64)
        _check_numbers(file, "vertex", points[np.unique(corners)])
        points = points @ matrix[:3, :3].T + matrix[:3, 3]
        if np.linalg.det(matrix[:3, :3]) < 0:  # a mirror turns faces inside out
            corners = corners[:, ::-1]
        vertices.append(points)
        faces.append(corners + start)
        start += len(points)
    corners = np.concatenate(faces)
    welded, kept = weld(np.concatenate(vertices), corners)
    if not len(kept):
        raise MeshFileError(file, f"all of its {total:,} faces have two corners at the same place", _COPY)
    _check_numbers(file, "vertex", welded)
    if lost := total - len(kept):
        notes.append(f"{lost:,} of {total:,} faces with two corners at the same place left out")
    return Shape(trimesh.Trimesh(welded, kept, process=False, validate=False), notes=tuple(notes))


def _arrays(file: str, data: bytes) -> tuple[Floats, Floats | None]:
    """Positions and normals of an npy or npz file."""
    try:
        loaded: Any = np.load(BytesIO(data), allow_pickle=False)
        arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception:  # NumPy, zipfile and zlib each have their own
        rule = "is no NumPy array of numbers, or is damaged"
        raise MeshFileError(file, rule, "write it with numpy.save or numpy.savez") from None
    if "points" in arrays:
        points, normals = arrays["points"], arrays.get("normals")
    elif len(arrays) == 1:
        points, normals = next(iter(arrays.values())), None
    else:
        rule = f"holds the arrays {', '.join(sorted(arrays)) or 'none'}"
        raise MeshFileError(file, rule, "name the positions 'points', and normals 'normals'")
    for what, array in (("points", points), ("normals", normals)):
        if array is not None and array.dtype.kind not in "fiu":
            raise MeshFileError(file, f"{what} must be numbers, got {array.dtype}", "write them as float32")
    if points.ndim == 2 and points.shape[1] == 6 and normals is None:
        points, normals = points[:, :3], points[:, 3:]
    if points.ndim != 2 or points.shape[1] != 3:
        rule = f"points must be (N, 3), or (N, 6) with normals, got {points.shape}"
        raise MeshFileError(file, rule, "reshape or transpose the array")
    if normals is not None and normals.shape != points.shape:
        rule = f"normals must be {points.shape} as the points are, got {normals.shape}"
        raise MeshFileError(file, rule, "leave them out to have them estimated")
    return points.astype(np.float64), None if normals is None else normals.astype(np.float64)


def _cloud(file: str, points: Floats, normals: Floats | None, notes: list[str]) -> Shape:
    if not len(points):
        raise MeshFileError(file, "holds no points", _COPY)
    _check_numbers(file, "point", points)
    if normals is not None:
        with np.errstate(over="ignore", invalid="ignore"):
            lengths = np.linalg.norm(normals, axis=1, keepdims=True)
        if bad := int((~((lengths > 0) & (lengths < np.inf))).sum()):
            notes.append(f"normals left out, because {bad:,} of {len(normals):,} are zero or not finite")
            normals = None
        else:
            normals = normals / lengths
    return Shape(None, points, normals, tuple(notes))


def _check_numbers(file: str, what: str, points: Floats) -> None:
    bad = np.flatnonzero(~(np.abs(points) < _LARGEST).all(1))
    if len(bad):
        rule = f"{len(bad):,} of {len(points):,} {what} positions are NaN, infinite or beyond {_LARGEST:g}"
        raise MeshFileError(file, f"{rule}, the first {points[bad[0]].tolist()}", "leave them out")


# --- writing ----------------------------------------------------------------------------------------------------------


def write_mesh(mesh: trimesh.Trimesh, path: str | Path) -> None:
    """Write vertices and faces as obj, glb, ply, stl or off, as the ending says.

    Colours and normals are not written, so that viewers shade the faces flat or as they are told. The file appears
    whole or not at all.

    Raises:
        ConfigError: Another ending.
        DataError: The mesh has no faces, or the file cannot be written.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if ending not in WRITE_ENDINGS:
        raise ConfigError(f"{path}: the ending must be one of {', '.join(WRITE_ENDINGS)}, got {ending or 'none'!r}.")
    if not len(mesh.faces):
        raise DataError(f"{path}: the mesh has no faces; there is nothing to write.")
    bare = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False, validate=False)
    options: dict[str, Any] = {"digits": 9} if ending in (".obj", ".off") else {}  # of float32
    if ending in (".obj", ".glb"):
        options["include_normals"] = False
    exported = bare.export(file_type=ending[1:], **options)
    data = exported.encode() if isinstance(exported, str) else bytes(exported)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError as e:
        part.unlink(missing_ok=True)
        raise DataError(f"{path}: cannot be written ({e.strerror or e}); choose another folder.") from None


# --- choosing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class MeshRules:
    """Which meshes a model is trained on.

    Args:
        min_faces: Fewest faces, after quantization.
        max_faces: Most faces, after quantization; 800 in MeshAnything, 1600 in its second version.
        max_aspect: Most that the longest side of the bounding box may be of the second longest. Flat meshes are kept;
            rods are left out whose width is a few cells: 4 of 128 at 32.
        min_kept: Least share of the faces that quantization must leave; 0.2 in MeshAnything V2.
        vertex_ratio: Least and most vertices for each face after quantization; None for any. MeshAnything V2 keeps
            0.40 to 0.70: closed meshes have about 0.5, loose triangles up to 3.
    """

    min_faces: int = 1
    max_faces: int = 800
    max_aspect: float = 32.0
    min_kept: float = 0.2
    vertex_ratio: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.min_faces <= self.max_faces:
            raise ConfigError(
                f"MeshRules: 1 <= min_faces <= max_faces must hold, got {self.min_faces} and {self.max_faces}."
            )
        if not self.max_aspect >= 1 or not 0 <= self.min_kept <= 1:
            raise ConfigError(
                "MeshRules: max_aspect must be at least 1 and min_kept between 0 and 1, "
                f"got {self.max_aspect} and {self.min_kept}."
            )


def reason_left_out(mesh: trimesh.Trimesh, qmesh: QuantizedMesh, rules: MeshRules) -> str | None:
    """Say why a mesh is not trained on.

    Args:
        mesh: Welded mesh.
        qmesh: The same on the grid.
        rules: What is allowed.

    Returns:
        The first rule that is broken, with the numbers; None if the mesh is good.
    """
    have, faces = len(mesh.faces), len(qmesh.faces)
    if not faces:
        return f"none of its {have:,} faces is left on the grid"
    if faces < rules.min_faces:
        return f"{faces:,} faces on the grid are fewer than min_faces {rules.min_faces:,}"
    if faces > rules.max_faces:
        return f"{faces:,} faces on the grid are more than max_faces {rules.max_faces:,}"
    if faces < rules.min_kept * have:
        return f"{faces:,} of {have:,} faces are left on the grid, a share below min_kept {rules.min_kept:g}"
    _, second, longest = np.sort(np.ptp(np.asarray(mesh.vertices)[np.unique(mesh.faces)], axis=0))
    if longest > rules.max_aspect * second:
        ratio = f"{longest / second:.0f}" if second else "infinitely many"
        return f"its longest side is {ratio} times the second longest, above max_aspect {rules.max_aspect:g}"
    if rules.vertex_ratio is not None:
        low, high = rules.vertex_ratio
        ratio_ = len(qmesh.vertices) / faces
        if not low <= ratio_ <= high:
            return f"{ratio_:.2f} vertices a face lie outside vertex_ratio {low:g} to {high:g}"
    return None


def fingerprint(qmesh: QuantizedMesh) -> str:
    """Name the faces on the grid, whichever way they wind: equal for duplicates, and for no others in practice."""
    faces = np.sort(qmesh.faces, axis=1)
    digest = blake2b(np.int64(len(qmesh.vertices)).tobytes(), digest_size=16)
    digest.update(np.ascontiguousarray(qmesh.vertices, dtype="<i8").tobytes())
    digest.update(np.ascontiguousarray(faces, dtype="<i8").tobytes())
    return digest.hexdigest()
