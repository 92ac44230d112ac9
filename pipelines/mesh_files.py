"""What the verbs of meshes share: meshes of a run as files, inputs from Python, the vertical axis, options."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import Item
from vertebra.pipelines.files import Outputs

if TYPE_CHECKING:
    import trimesh

    from vertebra.domains.mesh.files import Shape

MESHES = (".obj", ".glb", ".ply", ".stl", ".off")
"""Endings of meshes that are written."""


class MeshFiles:
    """Meshes of a run: one beside its metrics, or many in a folder.

    Args:
        name: Of the pipeline.
        outputs: The files of the run; its target is a mesh, or a .json with a folder of meshes.
        several: Whether there are several inputs.
        ending: Ending of the meshes in the folder, without the dot.
    """

    def __init__(self, name: str, outputs: Outputs, several: bool, ending: str) -> None:
        self.outputs, self.ending = outputs, f".{ending}"
        self.made: list[dict[str, Any]] = []
        target = outputs.target
        self.single = target.suffix in MESHES
        if self.single and several:
            raise ConfigError(
                f"{name}: {target.name} holds one mesh, and there are several inputs; name a .json, whose folder "
                f"{target.stem}/ gets them all."
            )
        self.name = name
        self.summary = outputs.side(".json") if self.single else target
        self.stream = outputs.open(target, "wb") if self.single else outputs.open(target)
        if not self.single:
            folder = target.with_suffix("")
            self.folder = outputs.folder(folder, _written_before(target, folder.name))

    def add(self, item: Item, mesh: trimesh.Trimesh, details: dict[str, Any]) -> None:
        """Write one mesh.

        Raises:
            ConfigError: There is a second one, and the output holds one.
        """
        facts = {key: round(v, 6) if isinstance(v, float) else v for key, v in details.items()}
        listed: dict[str, Any] = {"name": item.record, "input": item.file}
        if self.single and self.made:
            raise ConfigError(f"{self.name}: the output holds one mesh, and the input has more; name a .json.")
        if self.single:
            self.stream.write(mesh_bytes(mesh, self.outputs.target.suffix))
        else:
            plain = re.sub(r"[^\w.-]+", "_", item.record)[:60]
            name = f"{len(self.made) + 1:04}-{plain}{self.ending}"
            self.outputs.write(self.folder / name, mesh_bytes(mesh, self.ending))
            listed["file"] = f"{self.folder.name}/{name}"
        self.made.append({**listed, **facts})

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, with what is known of every mesh."""
        stream = self.outputs.open(self.summary) if self.single else self.stream
        json.dump({**summary, "meshes": self.made}, stream, indent=1, ensure_ascii=False)
        stream.write("\n")


def mesh_bytes(mesh: trimesh.Trimesh, ending: str) -> bytes:
    """Return a mesh as the bytes of a file."""
    from vertebra.domains.mesh.files import write_mesh

    with TemporaryDirectory() as folder:
        path = Path(folder) / f"mesh{ending}"
        write_mesh(mesh, path)
        return path.read_bytes()


def without_results(files: list[Path], inputs: list[Path], target: Path) -> list[Path]:
    """Leave out the files of a folder that a run to ``target`` writes; those named one by one stay."""
    if target.suffix != ".json":
        return files
    folder = target.with_suffix("").resolve()
    return [file for file in files if file in inputs or file.parent.resolve() != folder]


def shape_of(name: str, value: Any) -> Shape:
    """Return the shape that a mesh of trimesh, or an array of points, stands for.

    Raises:
        DataError: Something else.
    """
    import trimesh

    from vertebra.domains.mesh.files import Shape

    if isinstance(value, trimesh.Trimesh):
        return Shape(mesh=value)
    array = np.asarray(value, dtype=np.float64) if isinstance(value, np.ndarray) else np.empty(0)
    if array.ndim != 2 or array.shape[1] not in (3, 6) or not len(array):
        raise DataError(
            f"{name}: takes a path, a trimesh.Trimesh, or points as an array (N, 3) or (N, 6), got "
            f"{type(value).__name__}{f' of shape {array.shape}' if array.ndim > 1 else ''}."
        )
    return Shape(points=array[:, :3], normals=array[:, 3:] if array.shape[1] == 6 else None)


def turned_shape(shape: Shape, up: str) -> Shape:
    """Return a shape whose vertical axis is ``up`` with ``y`` up."""
    import trimesh

    from vertebra.domains.mesh.files import Shape
    from vertebra.domains.mesh.showing import turn_up

    if up == "y":
        return shape
    if shape.mesh is not None:
        mesh = trimesh.Trimesh(turn_up(shape.mesh.vertices, up), shape.mesh.faces, process=False)
        return Shape(mesh=mesh, notes=shape.notes)
    assert shape.points is not None
    normals = None if shape.normals is None else turn_up(shape.normals, up)
    return Shape(points=turn_up(shape.points, up), normals=normals, notes=shape.notes)


def turned_back(vertices: np.ndarray, up: str) -> np.ndarray:
    """Undo ``turned_shape`` for vertices (V, 3)."""
    from vertebra.domains.mesh.showing import turn_up

    return turn_up(np.asarray(vertices), up, back=True)


def check_up(name: str, up: str) -> str:
    """Return the vertical axis if it is one."""
    if up not in ("y", "z"):
        raise ConfigError(f"{name}: up must be y or z, got {up!r}.")
    return up


def check_format(name: str, ending: str) -> str:
    """Return the ending of meshes without its dot if it is one."""
    ending = ending.removeprefix(".")
    if f".{ending}" not in MESHES:
        raise ConfigError(f"{name}: format must be one of {', '.join(e[1:] for e in MESHES)}, got {ending!r}.")
    return ending


def add_file_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options on files that the verbs of meshes share."""
    group = parser.add_argument_group("files")
    group.add_argument("--up", default="y", help="vertical axis of the input, y or z (default: y)")
    group.add_argument(
        "--format", default="obj", metavar="ENDING", help="of the meshes in a folder: obj, glb, ... (default: obj)"
    )


def _written_before(summary: Path, folder: str) -> list[str]:
    """Names in the folder that an earlier run to the same output wrote, by its summary."""
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        files = [Path(str(facts["file"])) for facts in found["meshes"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [file.name for file in files if file.parent.name == folder]
