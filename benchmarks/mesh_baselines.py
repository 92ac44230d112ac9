"""Unseen shapes remade from noisy points by a generator, beside quadric decimation, marching cubes and the grid itself.

    python benchmarks/mesh_baselines.py --shapes 120 --model mesh_generator --sheet benchmarks/mesh_sheet.png

Each test shape, of parameters that training never saw, is made dense (4,000 faces and more) and rough (noise 0.003 of
its longest side): the *scan*. *Decimation* reduces the scan to the number of faces of the truth, which it is told.
*Marching cubes* runs at 128 cells a side on distances to the scan, negative inside. *The grid* is the truth itself
rounded to 128 bins: the floor of what a generator can reach; the first column says how much of that comes from drawing
points twice. The generator is shown 4,096 points of the scan with the normals of its faces, or a *cloud*: as many
points of the truth with noise 0.005 of the longest side and no normals, which are then estimated. All are measured by
``vertebra.domains.mesh.metrics`` with 10,000 points. ``python benchmarks/mesh_baselines.py`` alone has no generator.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import trimesh
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from vertebra.backbones.decoding import Strategy
from vertebra.domains.mesh.files import Shape
from vertebra.domains.mesh.generation import generate_best
from vertebra.domains.mesh.geometry import Placement, decimate, quantized, sample_surface, to_trimesh
from vertebra.domains.mesh.metrics import compare, is_valid
from vertebra.domains.mesh.model import MeshGenerator
from vertebra.domains.mesh.procedural import dense, draw
from vertebra.domains.mesh.showing import show
from vertebra.domains.saving import load_model
from vertebra.pipelines.figures import png_bytes
from vertebra.pipelines.mesh_figures import GREEN, Panel, sheet

BINS = 128
POINTS = 4096
CLOUD_NOISE = 0.005
BATCH = 16  # shapes that are written at once
SAMPLING = Strategy(method="greedy", temperature=0.7, top_k=50, top_p=0.95)  # the pipeline's
CELLS = 128  # of marching cubes along the longest side; MeshAnything uses as many
ROWS = {
    "chamfer": ("Chamfer distance, median", "{:.4f}"),
    "chamfer_to_floor": ("times that of the grid", "{:.2f}"),
    "edge_chamfer": ("edge Chamfer, median", "{:.4f}"),
    "normal_consistency": ("normal consistency, median", "{:.3f}"),
    "faces": ("faces, median", "{:.0f}"),
    "face_ratio": ("faces over true faces, median", "{:.2f}"),
    "valid": ("valid", "{:.0%}"),
}


@dataclass(frozen=True)
class Case:
    """A held-out shape.

    Args:
        truth: Its mesh, in box coordinates.
        scan: The dense and rough mesh.
        cloud: Noisy points (4096, 3) of the truth.
    """

    truth: trimesh.Trimesh
    scan: trimesh.Trimesh
    cloud: NDArray[np.float64]


def held_out(count: int, seed: int = 0) -> list[Case]:
    """Draw shapes of the test split."""
    cases = []
    for index in range(count):
        truth = draw("test", seed, index)
        rng = np.random.default_rng([seed, index])
        scan = dense(truth, rng)
        points, _ = sample_surface(truth.vertices, truth.faces, POINTS, rng)
        cases.append(Case(truth, scan, points + rng.normal(0, CLOUD_NOISE, points.shape)))
    return cases


def itself(case: Case) -> trimesh.Trimesh:
    """The truth."""
    return case.truth


def on_grid(case: Case) -> trimesh.Trimesh:
    """The truth rounded to the grid."""
    qmesh, placement = quantized(case.truth, BINS)
    return to_trimesh(qmesh, BINS, placement=placement)


def decimated(case: Case) -> trimesh.Trimesh:
    """The scan with as many faces as the truth."""
    return decimate(case.scan, len(case.truth.faces))


def marching_cubes(case: Case, cells: int = CELLS) -> trimesh.Trimesh:
    """The surface of distance 0 to the scan, negative inside, on a grid of ``cells`` along the longest side."""
    from skimage.measure import marching_cubes as march

    place = Placement.of(case.scan.vertices)
    vertices = place.into(case.scan.vertices)
    pitch = 1 / cells
    low = vertices.min(0) - 2.5 * pitch
    shape = np.ceil((vertices.max(0) + 2.5 * pitch - low) / pitch).astype(int) + 1
    axes = [start + pitch * np.arange(n) for start, n in zip(low, shape, strict=True)]
    surface, _ = sample_surface(vertices, case.scan.faces, 200_000, np.random.default_rng(0))
    nodes = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)  # (X, Y, Z, 3)
    reach = 3 * pitch
    distance = np.minimum(cKDTree(surface).query(nodes, distance_upper_bound=reach)[0], reach)
    field = np.where(_inside(vertices[case.scan.faces], axes), -distance, distance)
    points, faces, _, _ = march(field, 0.0, spacing=(pitch,) * 3)
    return trimesh.Trimesh(place.back(points + low), faces, process=False, validate=False)


def _inside(corners: NDArray[np.float64], axes: Sequence[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """Nodes (X, Y, Z) around which closed bodies wind: faces above a node count +1 if they look up, -1 if down."""
    x, y, z = axes
    low, high = corners.min(1), corners.max(1)
    first = np.stack([np.searchsorted(axis, low[:, i]) for i, axis in enumerate((x, y))], 1)  # (F, 2) columns covered
    last = np.stack([np.searchsorted(axis, high[:, i], side="right") for i, axis in enumerate((x, y))], 1)
    wide, deep = (last - first).T
    counts = wide * deep
    face = np.repeat(np.arange(len(corners)), counts)  # (P,) a face and a column of nodes that may cross
    local = np.arange(len(face)) - np.repeat(np.cumsum(counts) - counts, counts)
    i, j = first[face, 0] + local // deep[face], first[face, 1] + local % deep[face]
    a, b, c = (corners[face, k, :2] - np.stack([x[i], y[j]], 1) for k in range(3))
    weights = np.stack([_area(b, c), _area(c, a), _area(a, b)], 1)  # barycentric, times twice the area
    twice = weights.sum(1)
    hit = ((weights > 0).all(1) | (weights < 0).all(1)) & (twice != 0)
    height = (weights[hit] * corners[face[hit], :, 2]).sum(1) / twice[hit]
    below = np.zeros((len(x), len(y), len(z) + 1), dtype=np.int64)  # at k: faces above the nodes up to k - 1
    np.add.at(below, (i[hit], j[hit], np.searchsorted(z, height)), np.sign(twice[hit]).astype(np.int64))
    winding = below[:, :, ::-1].cumsum(2)[:, :, ::-1][:, :, 1:]
    return winding > 0


def _area(u: NDArray[np.float64], v: NDArray[np.float64]) -> NDArray[np.float64]:
    return u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]


def score(outputs: Sequence[trimesh.Trimesh], truths: Sequence[trimesh.Trimesh], seed: int = 0) -> dict[str, float]:
    """Measure meshes against the truth.

    Returns:
        The rows of the table but ``chamfer_to_floor``. An invalid mesh counts as infinitely far with consistency 0;
        ``edge_chamfer`` leaves out those where one of the two meshes has no sharp edges, and is NaN if all are so.
    """
    valid = [is_valid(mesh) for mesh in outputs]
    rows = [
        compare(output, truth, seed=seed) if good else None
        for output, truth, good in zip(outputs, truths, valid, strict=True)
    ]
    edges = [row["edge_chamfer"] for row in rows if row is not None and not np.isnan(row["edge_chamfer"])]
    return {
        "chamfer": float(np.median([row["chamfer"] if row else np.inf for row in rows])),
        "edge_chamfer": float(np.median(edges)) if edges else float("nan"),
        "normal_consistency": float(np.median([row["normal_consistency"] if row else 0.0 for row in rows])),
        "faces": float(np.median([len(mesh.faces) for mesh in outputs])),
        "face_ratio": float(np.median([len(a.faces) / len(b.faces) for a, b in zip(outputs, truths, strict=True)])),
        "valid": float(np.mean(valid)),
    }


def table(columns: Mapping[str, Mapping[str, float]], floor: str) -> str:
    """Write scores as a table in Markdown; ``floor`` names the column that others are divided by."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for key, (name, form) in ROWS.items():
        cells = []
        for scores in columns.values():
            value = scores["chamfer"] / columns[floor]["chamfer"] if key == "chamfer_to_floor" else scores[key]
            cells.append("none" if np.isnan(value) else form.format(value))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def generated(cases: Sequence[Case], model: str, *, candidates: int, clouds: bool = False) -> list[trimesh.Trimesh]:
    """Meshes of a generator, as the pipeline ``mesh/generate`` makes them; an empty one where it writes no face."""
    generator = load_model(model).eval()
    assert isinstance(generator, MeshGenerator)
    shapes = [Shape(points=case.cloud) if clouds else Shape(mesh=case.scan) for case in cases]
    shown = [show(shape, POINTS, np.random.default_rng(0)) for shape in shapes]
    outputs: list[trimesh.Trimesh] = []
    for start in range(0, len(shown), BATCH):
        few = shown[start : start + BATCH]
        points = torch.from_numpy(np.stack([one.condition for one in few]))
        numbers = range(start, start + len(few))
        made = generate_best(generator, points, SAMPLING, candidates=candidates, numbers=numbers)
        spec = generator.spec
        for one, where in zip(made, few, strict=True):
            outputs.append(to_trimesh(one.mesh, generator.tokenizer.bins, spec.place, where.placement))
    return outputs


def draw_sheet(cases: Sequence[Case], outputs: Sequence[trimesh.Trimesh], path: Path, count: int = 18) -> None:
    """Draw inputs, outputs and truths of the first cases."""
    rows = []
    for case, output in list(zip(cases, outputs, strict=True))[:count]:
        near = compare(output, case.truth)["chamfer"] if len(output.faces) else float("inf")
        rows.append(
            (
                str(case.truth.metadata["family"]),
                [
                    Panel(case.cloud, None, colour="#B8BCC2"),
                    Panel(output.vertices, output.faces, note=f"Chamfer {near:.4f}"),
                    Panel(case.truth.vertices, case.truth.faces, colour=GREEN),
                ],
            )
        )
    picture = Image.open(io.BytesIO(png_bytes(sheet(rows, ["points", "output", "truth"], across=3, size=150))))
    picture.convert("RGB").quantize(64).save(path, optimize=True)  # a quarter of the bytes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", help="a generator: a model directory or the name of a bundled model")
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--quick", action="store_true", help="neither decimation nor marching cubes")
    parser.add_argument("--sheet", type=Path, help="where to draw inputs, outputs and truths")
    args = parser.parse_args()
    cases = held_out(args.shapes, args.seed)
    truths = [case.truth for case in cases]
    floor = f"truth at {BINS} bins"
    makers: dict[str, Callable[[], list[trimesh.Trimesh]]] = {
        "truth, sampled again": lambda: [itself(case) for case in cases],
        floor: lambda: [on_grid(case) for case in cases],
    }
    if not args.quick:
        makers["quadric decimation"] = lambda: [decimated(case) for case in cases]
        makers["marching cubes"] = lambda: [marching_cubes(case) for case in cases]
    best = max(args.candidates)
    if args.model:
        for count in args.candidates:
            makers[f"generator, best of {count}"] = lambda n=count: generated(cases, args.model, candidates=n)
        makers[f"from clouds, best of {best}"] = lambda: generated(cases, args.model, candidates=best, clouds=True)
    columns = {}
    for name, make in makers.items():
        start = time.perf_counter()
        outputs = make()
        seconds = (time.perf_counter() - start) / len(cases)
        columns[name] = score(outputs, truths, args.seed)
        print(f"{name}: {seconds:.2f} s a shape", flush=True)
        if args.sheet and name.startswith("from clouds"):
            draw_sheet(cases, outputs, args.sheet)
    print(f"\n{len(cases)} test shapes of {np.median([len(t.faces) for t in truths]):.0f} faces (median), ", end="")
    print(f"scans of {np.median([len(case.scan.faces) for case in cases]):.0f} faces (median)\n")
    print(table(columns, floor))


if __name__ == "__main__":
    main()
