"""Meshes: clean ones of few faces for dense meshes, scans and point clouds."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines import figures
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.mesh_figures import Panel, four_views, sheet
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
from vertebra.pipelines.mesh_viewer import viewer
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.report import Report
from vertebra.pipelines.vision import model_name

if TYPE_CHECKING:
    import trimesh
    from matplotlib.figure import Figure

    from vertebra.domains.mesh.files import Shape
    from vertebra.domains.mesh.showing import Shown
    from vertebra.domains.model import DomainModel

SHEET, VIEWED = 24, 12
"""Most shapes of the sheet, and of the report's interactive views."""
HEAVY = 60_000
"""Inputs of more faces are shown as points in the report, which would become too large."""
POINT_COUNT = 20_000


@dataclass(frozen=True, eq=False)
class Job:
    """One shape on its way.

    Args:
        shape: As the file has it.
        shown: What the model is shown.
    """

    shape: Shape
    shown: Shown


@verb(
    "mesh/generate",
    inputs="meshes and scans (.obj, .ply, .glb, .gltf, .stl, .off), point clouds (.npy, .npz, .ply), folders of them",
    outputs=".obj, .glb, .ply, .stl, .off: the mesh of one input; .json: any number, in the folder OUT/; beside it "
    "OUT.json (metrics), OUT.png (pictures) and OUT.html (report with views to turn)",
    model="mesh_generator",
    tasks=("mesh/generate",),
)
class Generate(Pipeline):
    """Meshes of few faces for dense meshes, scans and point clouds, token after token.

    Args:
        model: See ``Pipeline``.
        device: See ``Pipeline``.
        batch_size: Most shapes at once.
        batch_tokens: Most positions of the backbone at once.
        faces: About how many faces a mesh shall have, for a model that can be told; None leaves it to the model.
        candidates: Meshes to write for each shape; the one that lies closest to the input's points is kept.
        method: ``greedy``, ``sample`` or ``beam``.
        temperature: Of sampling, also that of further candidates: below 1 likelier, above 1 more varied.
        top_k: Sample from so many of the likeliest tokens; 0 for all.
        top_p: Sample from the likeliest tokens that together have this probability.
        beams: Beams of ``beam``.
        max_tokens: Most tokens of a mesh; None for as many as the model was trained with.
        seed: Seed of points and draws.
        up: Vertical axis of the input, ``y`` or ``z``; the output has the same.
        format: Ending of the meshes in the folder.
    """

    endings = (*MESHES, ".json")
    unit = "shapes"
    reads_folders = True
    pool_batches = 1

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 16,
        batch_tokens: int = 65_536,
        faces: int | None = None,
        candidates: int = 4,
        method: str = "greedy",
        temperature: float = 0.7,
        top_k: int = 50,
        top_p: float = 0.95,
        beams: int = 4,
        max_tokens: int | None = None,
        seed: int = 0,
        up: str = "y",
        format: str = "obj",
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.backbones.decoding import Strategy
        from vertebra.domains.mesh.model import ShapeGenerator

        assert isinstance(self.model, ShapeGenerator)
        self.generator: ShapeGenerator = self.model
        self.model_name = model_name(self, model)
        if method not in ("greedy", "sample", "beam"):
            raise ConfigError(f"{self.name}: method must be greedy, sample or beam, got {method!r}.")
        for name, value, least in (("candidates", candidates, 1), ("seed", seed, 0)):
            if value < least:
                raise ConfigError(f"{self.name}: {name} must be at least {least}, got {value}.")
        if faces is not None:
            if faces < 1:
                raise ConfigError(f"{self.name}: faces must be at least 1, got {faces}.")
            self.generator.bucket_of(faces)
        most = self.generator.spec.max_tokens
        if max_tokens is not None and not 1 <= max_tokens <= most:
            raise ConfigError(
                f"{self.name}: max_tokens must be between 1 and {most:,}, the most this model was trained with, "
                f"got {max_tokens:,}."
            )
        self.strategy = Strategy(
            method=method,  # type: ignore[arg-type]  # checked above
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            beams=beams,
            seed=seed,
        )
        self.faces, self.candidates, self.max_tokens, self.seed = faces, candidates, max_tokens or most, seed
        self.up, self.format = check_up(self.name, up), check_format(self.name, format)

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        parser.set_defaults(batch_size=16, batch_tokens=65_536)
        group = parser.add_argument_group("generation")
        group.add_argument("--faces", type=int, metavar="N", help="about how many faces (default: the model decides)")
        group.add_argument(
            "--candidates", type=int, default=4, metavar="N",
            help="meshes to write for each shape, the one closest to its points is kept (default: 4)",
        )  # fmt: skip
        group.add_argument("--method", default="greedy", help="greedy, sample or beam (default: greedy)")
        group.add_argument(
            "--temperature", type=float, default=0.7, help="of sampling, below 1 likelier (default: 0.7)"
        )
        group.add_argument("--top-k", type=int, default=50, metavar="N", help="0 for all (default: 50)")
        group.add_argument("--top-p", type=float, default=0.95, metavar="P", help="1 for all (default: 0.95)")
        group.add_argument("--beams", type=int, default=4, metavar="N", help="of beam search (default: 4)")
        group.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of a mesh (default: the model's)")
        group.add_argument("--seed", type=int, default=0, metavar="N", help="of points and draws (default: 0)")
        add_file_arguments(parser)

    # ---------------------------------------------------------------- reading

    def folder_files(self, folder: Path) -> list[Path]:
        """List the meshes and point clouds of a folder."""
        from vertebra.domains.mesh.files import find_shapes

        return find_shapes([folder])

    def input_files(self, inputs: list[Path], target: Path) -> list[Path]:
        """As in ``Pipeline``; the folder of a .json is left out too."""
        return without_results(super().input_files(inputs, target), inputs, target)

    def amount(self, path: Path) -> float | None:
        """A file is one shape."""
        return 1.0

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the shape of a file."""
        from vertebra.domains.mesh.files import read_shape

        yield self._item(read_shape(path), str(path), path.stem)

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the shape that a mesh of trimesh, or points (N, 3) or (N, 6), stand for."""
        yield self._item(shape_of(self.name, value), "", f"shape_{index}")

    def _item(self, shape: Shape, file: str, record: str) -> Item:
        from vertebra.domains.mesh.showing import show

        turned = turned_shape(shape, self.up)
        shown = show(turned, self.generator.spec.points, np.random.default_rng(self.seed))
        at_once = max(1, self.candidates - 1, self.strategy.beams if self.strategy.method == "beam" else 1)
        size = at_once * (self.generator.prefix_length + self.max_tokens)
        return Item(file=file, record=record, data=Job(shape, shown), size=size, weight=0.0)

    # ---------------------------------------------------------------- writing meshes

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Write the meshes of one batch."""
        import torch

        from vertebra.domains.mesh.generation import generate_best
        from vertebra.domains.mesh.geometry import to_trimesh

        jobs: list[Job] = [item.data for item in items]
        points = torch.from_numpy(np.stack([job.shown.condition for job in jobs])).to(self.device)
        rounds = 1 if self.candidates == 1 else 2
        begun, done, begin = 0, 0.0, time.perf_counter()

        def progress(step: int, going: int) -> None:
            nonlocal begun, done
            begun += step == 1
            share = (begun - 1 + min(1.0, step / (self.max_tokens + 2))) / rounds
            self.advance((share - done) * len(items))
            done = share

        made = generate_best(
            self.generator,
            points,
            self.strategy,
            candidates=self.candidates,
            faces=None if self.faces is None else [self.faces] * len(items),
            max_tokens=self.max_tokens,
            numbers=[0] * len(items),  # a shape's draws depend on the seed alone, not on the shapes before it
            progress=progress,
        )
        self.advance((1 - done) * len(items))
        seconds = time.perf_counter() - begin
        results: list[Any] = []  # errors stand for shapes without a mesh
        spec = self.generator.spec
        for item, job, one in zip(items, jobs, made, strict=True):
            if not len(one.mesh.faces):
                advice = "try another --seed, more --candidates, or --method sample"
                results.append(DataError(f"{item.record}: the model wrote no whole face that has an area; {advice}."))
                continue
            mesh = to_trimesh(one.mesh, self.generator.tokenizer.bins, spec.place, job.shown.placement)
            mesh.vertices = turned_back(mesh.vertices, self.up)
            details: dict[str, Any] = {"tokens": one.tokens, "finished": one.finished}
            details |= {"seconds": seconds / len(items), **measured(mesh, job)}
            if job.shown.notes:
                details["notes"] = list(job.shown.notes)
            results.append(
                GeneratedMesh(mesh, name=item.record, details=details, label="mesh", source=job.shape, up=self.up)
            )
        return results

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the meshes, metrics, pictures and report."""
        return _GenerateWriter(self, outputs, several_files)


def measured(mesh: trimesh.Trimesh, job: Job) -> dict[str, Any]:
    """Say what a mesh is like, and how far it lies from the input; distances are shares of the input's longest side."""
    import trimesh

    from vertebra.domains.mesh.geometry import sample_surface
    from vertebra.domains.mesh.metrics import chamfer, compare, describe

    found: dict[str, Any] = dict(describe(mesh))
    if not len(mesh.faces):
        return found
    frame, source = job.shown.placement, job.shape
    if source.mesh is not None:
        output, truth = (trimesh.Trimesh(m.vertices / frame.scale, m.faces, process=False) for m in (mesh, source.mesh))
        found |= compare(output, truth)
        found["input_faces"] = len(source.mesh.faces)
    else:
        assert source.points is not None
        drawn, _ = sample_surface(mesh.vertices, mesh.faces, 10_000, np.random.default_rng(0))
        few = source.points[:: max(1, len(source.points) // 10_000)]
        found["chamfer"] = chamfer(drawn / frame.scale, few / frame.scale)
        found["input_points"] = len(source.points)
    # What cannot be compared, such as edges where one has none, is nothing; JSON knows no NaN.
    return {key: None if value != value else value for key, value in found.items()}


@dataclass(eq=False, repr=False)
class GeneratedMesh(Prediction):
    """A mesh that a model wrote; ``value`` is a ``trimesh.Trimesh`` where the input lay.

    Args:
        source: The input; None where there is none.
        up: Vertical axis of both.
    """

    source: Shape | None = None
    up: str = "y"

    def panels(self, light: bool = False) -> list[Panel]:
        """Return the input and the mesh, upright; ``light`` shows large inputs as points."""
        from vertebra.domains.mesh.showing import turn_up

        vertices = turn_up(np.asarray(self.value.vertices), self.up)
        output = Panel(vertices, self.value.faces, "output" if self.source is not None else "mesh", self._note())
        return [output] if self.source is None else [input_panel(turned_shape(self.source, self.up), light), output]

    def figure(self) -> Figure:
        """Draw input and output from four sides."""
        return four_views(*self.panels(), title=self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return name, vertices, faces and details as plain Python values."""
        value = {"vertices": self.value.vertices.tolist(), "faces": self.value.faces.tolist()}
        return {"name": self.name, "value": value, **self.details}

    def save(self, path: str | Path) -> Path:
        """Write the mesh as .obj, .glb, .ply, .stl or .off; other endings as ``Prediction.save``."""
        from vertebra.domains.mesh.files import write_mesh

        if Path(path).suffix in MESHES:
            write_mesh(self.value, path)
            return Path(path)
        return super().save(path)

    def _note(self) -> str:
        distance = self.details.get("chamfer")
        return "" if distance is None else f"Chamfer {distance:.4f}"

    def _brief(self) -> str:
        return f"{len(self.value.vertices):,} vertices, {len(self.value.faces):,} faces"


class _GenerateWriter(Writer):
    """The meshes, OUT.json, OUT.png and OUT.html."""

    def __init__(self, pipeline: Generate, outputs: Outputs, several_files: bool) -> None:
        self.pipeline = pipeline
        self.files = MeshFiles(pipeline.name, outputs, several_files, pipeline.format)
        self.outputs = outputs
        self.picture = outputs.open(outputs.side(".png"), "wb")
        self.page = outputs.side(".html")
        self.shown: list[GeneratedMesh] = []
        self.begin = time.perf_counter()

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one mesh."""
        assert isinstance(prediction, GeneratedMesh)
        self.files.add(item, prediction.value, prediction.details)
        if len(self.shown) < SHEET:
            self.shown.append(prediction)

    def finish(self) -> None:
        """Write metrics, pictures and report."""
        if not self.files.made:
            return
        p = self.pipeline
        seconds = time.perf_counter() - self.begin
        tokens = sum(facts["tokens"] for facts in self.files.made)
        summary: dict[str, Any] = {
            "pipeline": p.name,
            "model": p.model_name,
            "tokenizer": p.generator.token_facts(),
            "candidates": p.candidates,
            "method": p.strategy.method,
            "seed": p.seed,
            "tokens_per_second": round(tokens / seconds, 1),
            "peak_memory_mb": round(peak_memory(p.device.type) / 2**20),
        }
        self.files.finish(summary)
        figure = self._figure()
        self.picture.write(figures.png_bytes(figure))
        self._report(summary, figure)

    def _figure(self) -> Figure:
        if len(self.files.made) == 1:
            return self.shown[0].figure()
        rows = [(one.name, one.panels()) for one in self.shown]
        return sheet(rows, ["input", "output"], title=f"{len(self.files.made):,} meshes", across=2)

    def _report(self, summary: dict[str, Any], figure: Figure) -> None:
        report = Report("mesh/generate")
        report.section("Run").facts({k: v for k, v in summary.items() if not isinstance(v, dict)})
        names = [n for n in _COLUMNS if any(n in facts for facts in self.files.made)]
        rows = [[facts["name"], *(facts.get(n) for n in names)] for facts in self.files.made]
        report.section("Meshes").table(rows, ["name", *(_COLUMNS[n] for n in names)])
        report.text(
            "Distances are shares of the input's longest side. Chamfer: half the sum of both mean distances to the "
            "nearest of 10,000 points; edges: the same for points at sharp edges; normals: 1 where they agree."
        )
        noted: dict[str, list[str]] = {}
        for facts in self.files.made:
            for note in facts.get("notes", ()):
                noted.setdefault(note.rstrip("."), []).append(facts["name"])
        for note, of in noted.items():
            more = f" and {len(of) - 5:,} more" if len(of) > 5 else ""
            report.text(f"{note}: {', '.join(of[:5])}{more}.")
        report.figure(figure, "Inputs and outputs.")
        report.section("To turn")
        for one in self.shown[:VIEWED]:
            report.html(viewer(one.name, one.panels(light=True)))
        with TemporaryDirectory() as folder:
            self.outputs.write(self.page, report.write(Path(folder) / "report.html").read_bytes())


_COLUMNS = {
    "faces": "faces",
    "vertices": "vertices",
    "chamfer": "Chamfer",
    "edge_chamfer": "edges",
    "normal_consistency": "normals",
    "watertight": "watertight",
    "self_intersection_share": "self-intersecting",
    "tokens": "tokens",
    "finished": "finished",
}


def input_panel(shape: Shape, light: bool = False) -> Panel:
    """Return the panel of an input; ``light`` shows large meshes as points."""
    from vertebra.domains.mesh.geometry import sample_surface

    grey = "#B8BCC2"
    if shape.mesh is None:
        assert shape.points is not None
        few = shape.points[:: max(1, len(shape.points) // POINT_COUNT)]
        return Panel(few, None, "input", colour=grey)
    mesh = shape.mesh
    if light and len(mesh.faces) > HEAVY:
        points, _ = sample_surface(mesh.vertices, mesh.faces, POINT_COUNT, np.random.default_rng(0))
        return Panel(points, None, "input", f"of {len(mesh.faces):,} faces", colour=grey)
    return Panel(mesh.vertices, mesh.faces, "input", colour=grey)


def peak_memory(device: str) -> int:
    """Return the most memory that was held at once, in bytes: of the GPU where one is used, else of the process."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


__all__ = ["Generate", "GeneratedMesh", "Job"]
