"""Meshes to tokens and back."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.mesh import GeneratedMesh
from vertebra.pipelines.mesh_files import (
    MESHES,
    MeshFiles,
    add_file_arguments,
    check_format,
    check_up,
    shape_of,
    turned_back,
    turned_shape,
    without_results,
)
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from vertebra.domains.mesh.files import Shape
    from vertebra.domains.model import DomainModel
    from vertebra.tokenizers.mesh import MeshTokenizer

FORMAT = 1
_ARRAYS = ("ids", "ends", "names", "centres", "scales", "input_faces")


@dataclass(frozen=True, eq=False)
class TokenRecord:
    """One mesh of a token file.

    Args:
        tokenizer: What wrote it.
        ids: (N,).
        centre: Of its box, in the file's coordinates with ``y`` up.
        scale: Longest side of its box.
        input_faces: Faces it had before it was put on the grid.
    """

    tokenizer: MeshTokenizer
    ids: np.ndarray[Any, np.dtype[np.int64]]
    centre: tuple[float, float, float]
    scale: float
    input_faces: int


@verb(
    "mesh/tokenize",
    inputs="meshes (.obj, .ply, .glb, .gltf, .stl, .off) and folders of them; or token files (.npz) to turn back",
    outputs=".npz: tokens, their tokenizer and places, and OUT.json (tokens and ratio of each mesh); or from tokens "
    ".obj, .glb, .ply, .stl, .off: one mesh; .json: many, in the folder OUT/",
    model="mesh_generator",
    tasks=("mesh/generate",),
)
class Tokenize(Pipeline):
    """Tokens of meshes, as a generator reads and writes them, and meshes of tokens.

    Args:
        model: Model whose tokenizer and limits are used.
        device: See ``Pipeline``.
        tokenizer: ``plain``, ``amt``, ``edgerunner`` or ``bpt``; None for the model's.
        bins: Cells a side of the grid; None for the model's.
        max_faces: Meshes of more faces are refused; None for the model's limit.
        decimate: Reduce those to ``max_faces`` instead, by quadric errors.
        up: Vertical axis of the files, ``y`` or ``z``.
        format: Ending of the meshes in the folder.
    """

    endings = (".npz", *MESHES, ".json")
    unit = "meshes"
    reads_folders = True

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "cpu",
        tokenizer: str | None = None,
        bins: int | None = None,
        max_faces: int | None = None,
        decimate: bool = False,
        up: str = "y",
        format: str = "obj",
    ) -> None:
        super().__init__(model, device=device)
        from vertebra.domains.mesh.model import MeshGenerator, ShapeGenerator
        from vertebra.tokenizers.mesh import make_mesh_tokenizer

        assert isinstance(self.model, ShapeGenerator)
        own, spec = self.model.tokenizer, self.model.spec
        if tokenizer is None and not isinstance(self.model, MeshGenerator):
            raise ConfigError(
                f"{self.name}: the tokens of this {type(self.model).__name__} are codes that only its decoder is "
                "published for; name another --tokenizer, or take another --model."
            )
        if tokenizer is None and bins in (None, own.bins):
            self.tokenizer = own
        elif tokenizer is None:
            raise ConfigError(f"{self.name}: bins={bins} needs a tokenizer, the model's has {own.bins}; name one.")
        else:
            self.tokenizer = make_mesh_tokenizer(tokenizer, own.bins if bins is None else bins)
        self.max_faces = spec.max_faces if max_faces is None else max_faces
        if self.max_faces < 4:
            raise ConfigError(f"{self.name}: max_faces must be at least 4, got {max_faces}.")
        self.decimate, self.up = decimate, check_up(self.name, up)
        self.format = check_format(self.name, format)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        group = parser.add_argument_group("tokens")
        group.add_argument("--model", metavar="NAME|DIR", help="whose tokenizer and limits (default: mesh_generator)")
        group.add_argument("--tokenizer", metavar="NAME", help="plain, amt, edgerunner or bpt (default: the model's)")
        group.add_argument("--bins", type=int, metavar="N", help="cells a side of the grid (default: the model's)")
        group.add_argument("--max-faces", type=int, metavar="N", help="refuse meshes of more (default: the model's)")
        group.add_argument("--decimate", action="store_true", help="reduce them to --max-faces instead")
        add_file_arguments(parser)

    # ---------------------------------------------------------------- reading

    def folder_files(self, folder: Path) -> list[Path]:
        """List the meshes of a folder."""
        from vertebra.domains.mesh.files import find_shapes

        return find_shapes([folder])

    def input_files(self, inputs: list[Path], target: Path) -> list[Path]:
        """As in ``Pipeline``; the folder of a .json is left out too."""
        return without_results(super().input_files(inputs, target), inputs, target)

    def amount(self, path: Path) -> float | None:
        """A file of a mesh is one; of tokens, how many is not known at a glance."""
        return None if path.suffix == ".npz" else 1.0

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the mesh of a file, or the sequences of a token file."""
        from vertebra.domains.mesh.files import read_shape

        if path.suffix == ".npz" and (records := read_tokens(path)) is not None:
            for name, record in records:
                yield Item(file=str(path), record=name, data=record, size=len(record.ids))
            return
        yield self._item(read_shape(path), str(path), path.stem)

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the mesh that a mesh of trimesh stands for."""
        yield self._item(shape_of(self.name, value), "", f"mesh_{index}")

    def _item(self, shape: Shape, file: str, record: str) -> Item:
        if shape.mesh is None:
            raise DataError(f"{file or record}: is a point cloud and has no faces to write; give a mesh.")
        return Item(file=file, record=record, data=shape, size=len(shape.mesh.faces))

    # ---------------------------------------------------------------- both directions

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Encode or decode one batch."""
        results: list[Any] = []
        for item in items:
            try:
                turn_back = isinstance(item.data, TokenRecord)
                results.append(self._decoded(item) if turn_back else self._encoded(item))
            except DataError as error:
                results.append(error)
        return results

    def _encoded(self, item: Item) -> Prediction:
        from vertebra.domains.mesh.geometry import decimate, quantized

        mesh = turned_shape(item.data, self.up).mesh
        assert mesh is not None
        count = len(mesh.faces)
        if count > self.max_faces:
            if not self.decimate:
                raise DataError(
                    f"{item.record}: has {count:,} faces, more than max_faces={self.max_faces:,}; pass --decimate to "
                    "reduce it, or raise --max-faces."
                )
            mesh = decimate(mesh, self.max_faces)
        qmesh, placement = quantized(mesh, self.tokenizer.bins)
        ids = self.tokenizer.encode(qmesh)
        faces = len(qmesh.faces)
        details = {
            "tokens": len(ids),
            "faces": faces,
            "ratio": len(ids) / (9 * faces),
            "input_faces": count,
            "centre": placement.centre,
            "scale": placement.scale,
            **({"notes": list(item.data.notes)} if item.data.notes else {}),
        }
        return Prediction(ids, name=item.record, details=details, label="token")

    def _decoded(self, item: Item) -> Prediction:
        from vertebra.domains.mesh.geometry import Placement, to_trimesh

        record: TokenRecord = item.data
        qmesh = record.tokenizer.decode(record.ids)
        if not len(qmesh.faces):
            raise DataError(f"{item.record}: its tokens hold no face; write them again.")
        mesh = to_trimesh(qmesh, record.tokenizer.bins, placement=Placement(record.centre, record.scale))
        mesh.vertices = turned_back(mesh.vertices, self.up)
        details = {"tokens": len(record.ids), "faces": len(mesh.faces), "ratio": len(record.ids) / 9 / len(mesh.faces)}
        return GeneratedMesh(mesh, name=item.record, details=details, label="mesh", up=self.up)

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the token file, or the meshes."""
        if outputs.target.suffix == ".npz":
            return _TokenWriter(self, outputs)
        return _MeshWriter(self, outputs, several_files)


class _TokenWriter(Writer):
    """OUT.npz and OUT.npz.json."""

    def __init__(self, pipeline: Tokenize, outputs: Outputs) -> None:
        self.pipeline = pipeline
        self.file, self.summary = outputs.open(outputs.target, "wb"), outputs.open(outputs.side(".json"))
        self.made: list[tuple[Item, Prediction]] = []

    def write(self, item: Item, prediction: Prediction) -> None:
        """Keep one mesh's tokens."""
        if not isinstance(prediction.value, np.ndarray):
            raise ConfigError(
                f"{self.pipeline.name}: {item.file} holds tokens already; to turn them back, let the output end in "
                f"{', '.join(MESHES)} or .json."
            )
        self.made.append((item, prediction))

    def finish(self) -> None:
        """Write all arrays, and the summary."""
        if not self.made:
            return
        details = [prediction.details for _, prediction in self.made]
        arrays: dict[str, Any] = {
            "ids": np.concatenate([p.value for _, p in self.made]).astype(np.int32),
            "ends": np.cumsum([d["tokens"] for d in details], dtype=np.int64),
            "names": np.array([p.name for _, p in self.made], dtype=np.str_),
            "centres": np.array([d["centre"] for d in details]),
            "scales": np.array([d["scale"] for d in details]),
            "input_faces": np.array([d["input_faces"] for d in details], dtype=np.int64),
        }
        facts = {"format": FORMAT, "tokenizer": self.pipeline.tokenizer.to_dict()}
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
        np.savez_compressed(self.file, **arrays)
        names = ("tokens", "faces", "ratio", "input_faces", "notes")
        meshes = [
            {"name": p.name, "input": item.file, **{n: _short(p.details[n]) for n in names if n in p.details}}
            for item, p in self.made
        ]
        tokens, faces = sum(d["tokens"] for d in details), sum(d["faces"] for d in details)
        summary = {
            "pipeline": self.pipeline.name,
            **facts,
            "tokens": tokens,
            "faces": faces,
            "ratio": _short(tokens / (9 * faces)),
            "ratio_mean": _short(float(np.mean([d["ratio"] for d in details]))),
            "meshes": meshes,
        }
        json.dump(summary, self.summary, indent=1, ensure_ascii=False)
        self.summary.write("\n")


class _MeshWriter(Writer):
    """Meshes of tokens, one or a folder of them."""

    def __init__(self, pipeline: Tokenize, outputs: Outputs, several_files: bool) -> None:
        self.pipeline = pipeline
        self.files = MeshFiles(pipeline.name, outputs, several_files, pipeline.format)

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one mesh."""
        if isinstance(prediction.value, np.ndarray):
            raise ConfigError(f"{self.pipeline.name}: tokens are written as .npz; let the output end in .npz.")
        self.files.add(item, prediction.value, prediction.details)

    def finish(self) -> None:
        """Write the summary."""
        self.files.finish({"pipeline": self.pipeline.name})


def read_tokens(path: Path) -> list[tuple[str, TokenRecord]] | None:
    """Read a token file; None where the .npz is none, but points, say.

    Raises:
        DataError: The file is damaged.
    """
    from vertebra.tokenizers.base import tokenizer_from_dict
    from vertebra.tokenizers.mesh import MeshTokenizer

    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as data:
            if "facts" not in data.files:
                return None
            facts = json.loads(data["facts"].tobytes())
            ids, ends, names, centres, scales, faces = (data[name] for name in _ARRAYS)
        tokenizer = tokenizer_from_dict(facts["tokenizer"])
        if facts["format"] != FORMAT or not isinstance(tokenizer, MeshTokenizer):
            raise ValueError(f"format {facts['format']} of {tokenizer!r}")
        starts = np.concatenate([[0], ends[:-1]])
        if ids.shape != (ends[-1],) or not (starts < ends).all():
            raise ValueError(f"ends {ends.tolist()} do not cut {len(ids):,} tokens into sequences")
        if not (np.isfinite(centres).all() and np.isfinite(scales).all() and (scales > 0).all()):
            raise ValueError("places that are not finite numbers")
        found = []
        for name, start, end, (x, y, z), scale, count in zip(names, starts, ends, centres, scales, faces, strict=True):
            own, centre = ids[start:end].astype(np.int64), (float(x), float(y), float(z))
            found.append((str(name), TokenRecord(tokenizer, own, centre, float(scale), int(count))))
        return found
    except Exception as error:  # NumPy, zipfile, zlib and json each have their own
        raise DataError(f"{path}: cannot be read as tokens of meshes ({error}); write it again.") from error


def _short(value: Any) -> Any:
    return round(value, 6) if isinstance(value, float) else value


__all__ = ["TokenRecord", "Tokenize", "read_tokens"]
