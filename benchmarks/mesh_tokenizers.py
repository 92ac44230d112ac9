"""Tokens a face of every mesh tokenizer on real meshes, and what AMT's encoding costs by faces.

    python -P benchmarks/mesh_tokenizers.py --data ../shared/data/mesh       # half a minute on one core
    python -P benchmarks/mesh_tokenizers.py plain amt                        # these tokenizers only

The ratio is tokens / (9 faces). Every mesh is decoded again and its set of faces compared with what was encoded. Cost
is measured on a torus, whose edges have two faces each, and on a fan, whose faces all share one edge: seconds of the
processor, and the most memory that one call of ``encode`` holds besides the mesh. Prints the tables; writes
``mesh_tokenizers.png``.
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from pathlib import Path

import numpy as np

from vertebra.domains.mesh.files import find_shapes, read_mesh
from vertebra.domains.mesh.geometry import quantized
from vertebra.tokenizers.mesh import (
    MESH_TOKENIZERS,
    QuantizedMesh,
    canonical,
    make_mesh_tokenizer,
    quantize,
    same_faces,
)

BINS = 128
FINE = 1024  # cells a side of the synthetic meshes, so that no two vertices of 100,000 faces fall into one
SIZES = (1_000, 3_000, 10_000, 30_000, 100_000)
LEAST_FACES = 40  # of the meshes that MeshAnything V2 trains on
HERE = Path(__file__).parent


def compare(names: list[str], folder: str) -> None:
    """Print the tokens a face and the ratio of each tokenizer on each mesh."""
    tokenizers = {name: make_mesh_tokenizer(name, BINS) for name in names}
    print(f"Tokens a face (ratio), {BINS} bins\n")
    print(f"| mesh | faces | {' | '.join(names)} | faces come back |")
    print("| --- |" + " ---: |" * (len(names) + 1) + " --- |")
    faces: list[int] = []
    tokens: list[list[int]] = []
    for path in find_shapes([folder]):
        mesh, _ = quantized(read_mesh(path), BINS)
        lengths, lost = [], []
        for name, tokenizer in tokenizers.items():
            ids = tokenizer.encode(mesh)
            lengths.append(len(ids))
            if not same_faces(tokenizer.decode(ids), mesh):
                lost.append(name)
        faces.append(len(mesh.faces))
        tokens.append(lengths)
        row(
            path.stem,
            len(mesh.faces),
            np.array(lengths) / len(mesh.faces),
            f"not: {', '.join(lost)}" if lost else "all",
        )
    count, total = np.array(faces), np.array(tokens)
    costs = total / count[:, None]  # (meshes, tokenizers)
    usual = count >= LEAST_FACES
    row(f"mean of {len(count)} meshes", "", costs.mean(0))
    row(f"mean of the {usual.sum()} of {LEAST_FACES} faces or more", "", costs[usual].mean(0))
    row("all faces together", count.sum(), total.sum(0) / count.sum())


def row(name: str, faces: int | str, costs: np.ndarray, equal: str = "") -> None:
    """Print one line of the table."""
    count = f"{faces:,}" if faces != "" else ""
    print(f"| {name} | {count} | " + " | ".join(f"{c:.2f} ({c / 9:.3f})" for c in costs) + f" | {equal} |", flush=True)


def torus(faces: int) -> QuantizedMesh:
    """Make a torus of about so many faces, 2 b rows of b squares, each cut in two."""
    b = round((faces / 4) ** 0.5)
    u, v = np.meshgrid(np.arange(2 * b), np.arange(b), indexing="ij")
    a, c = np.pi * u / b, 2 * np.pi * v / b
    radius = 0.33 + 0.16 * np.cos(c)
    vertices = np.stack([radius * np.cos(a), radius * np.sin(a), 0.16 * np.sin(c)], axis=-1).reshape(-1, 3)
    i, right, up = u * b + v, (u + 1) % (2 * b) * b + v, u * b + (v + 1) % b
    across = (u + 1) % (2 * b) * b + (v + 1) % b
    halves = [np.stack(half, axis=-1).reshape(-1, 3) for half in ((i, right, up), (up, right, across))]
    return canonical(quantize(vertices, FINE), np.concatenate(halves))


def fan(faces: int) -> QuantizedMesh:
    """Make so many faces on one edge, whose two vertices come last in order: every strip starts and goes on there."""
    rim = np.arange(faces)
    top = FINE - 1
    vertices = np.concatenate([np.stack([rim % top, rim // top, 0 * rim], axis=1), [[0, 0, top], [1, 0, top]]])
    return canonical(vertices, np.stack([rim, 0 * rim + faces, 0 * rim + faces + 1], axis=1))


def scale(repeats: int) -> dict[str, np.ndarray]:
    """Print AMT's seconds and peak memory by faces, and the exponents; return faces, seconds, MB as columns."""
    tokenizer = make_mesh_tokenizer("amt", FINE)
    print(f"\nEncoding with AMT, the best of {repeats}\n\n| mesh | faces | tokens | seconds | µs a face | peak MB |")
    print("| --- |" + " ---: |" * 5)
    found = {}
    for name, make in (("torus", torus), ("one edge", fan)):
        rows = []
        for size in SIZES:
            mesh = make(size)
            times = []
            for _ in range(repeats):
                start = time.process_time()
                ids = tokenizer.encode(mesh)
                times.append(time.process_time() - start)
            tracemalloc.start()  # slows the call, so it has one of its own
            tokenizer.encode(mesh)
            peak = tracemalloc.get_traced_memory()[1] / 1e6
            tracemalloc.stop()
            assert same_faces(tokenizer.decode(ids), mesh)
            count, seconds = len(mesh.faces), min(times)
            rows.append((count, seconds, peak))
            print(f"| {name} | {count:,} | {len(ids):,} | {seconds:.4f} | {1e6 * seconds / count:.2f} | {peak:.2f} |")
        found[name] = np.array(rows)
    print()
    for name, rows in found.items():
        faces, seconds, memory = rows.T
        time_grows, memory_grows = exponent(faces, seconds), exponent(faces, memory)
        print(f"{name}: time grows as faces ^ {time_grows:.2f}, memory as faces ^ {memory_grows:.2f}")
    return found


def exponent(faces: np.ndarray, values: np.ndarray) -> float:
    """Slope of the values over the faces in double-logarithmic scale."""
    return float(np.polyfit(np.log(faces), np.log(values), 1)[0])


def draw(found: dict[str, np.ndarray]) -> None:
    """Draw time and memory over the faces."""
    from vertebra.pipelines.figures import PALETTE, new_figure

    figure, axes = new_figure(1, 2, width=9.0, height=3.4)
    for color, (name, rows) in zip(PALETTE, found.items(), strict=False):
        faces, seconds, memory = rows.T
        for place, values in zip(axes, (seconds, memory), strict=True):
            label = f"{name}: faces ^ {exponent(faces, values):.2f}"
            place.loglog(faces, values, "o-", color=color, markersize=4, label=label)
    axes[0].set_ylabel("seconds to encode (processor)")
    axes[1].set_ylabel("peak memory (MB)")
    for place in axes:
        place.set_xlabel("faces")
        place.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "mesh_tokenizers.png", dpi=100, bbox_inches="tight")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizers", nargs="*", default=list(MESH_TOKENIZERS), help="names; all if none")
    parser.add_argument("--data", default="../shared/data/mesh")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    compare(args.tokenizers, args.data)
    draw(scale(args.repeats))


if __name__ == "__main__":
    main()
