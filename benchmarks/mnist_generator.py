"""Bits per pixel of generated digits: an Axial Transformer beside a per-pixel histogram and a two-pixel context model.

    python benchmarks/mnist_generator.py --data ../shared/data/vision/mnist_t10k      # about 20 minutes on two cores

Every fifth image (index % 5 == 4) is the test set. The model is trained by ``vertebra fit vision/generate`` without
classes; its checkpoint, and the smoothing of the counted models, are chosen on the same validation images. Writes
samples as ``mnist_samples.png``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.int64]
HERE = Path(__file__).parent


def arguments(data: Path, root: Path, epochs: int, seed: int) -> list[str]:
    """The command line that trains the model."""
    given = {
        "model.backbone": "axial_nano,dim=64,positions=none",
        "model.levels": "256",
        "data.root": "null",
        "data.images": f"{data}/t10k-images-idx3-ubyte.gz",
        "data.size": "null",
        "data.test_every": "5",
        "data.test_fraction": "0",
        "data.augment.hflip": "0",
        "trainer.max_epochs": str(epochs),
        "trainer.enable_progress_bar": "false",
        "seed_everything": str(seed),
        "root": str(root),
    }
    return ["fit", "vision/generate", *(w for key, value in given.items() for w in (f"--{key}", value))]


def histogram_bits(train: Bytes, other: Bytes, smoothing: float) -> float:
    """Bits a pixel of images (N, H, W) under a histogram for every place."""
    counts = np.zeros((*train.shape[1:], 256))
    rows, columns = np.indices(train.shape[1:])
    for image in train:
        counts[rows, columns, image] += 1
    chances = (counts + smoothing) / (counts.sum(-1, keepdims=True) + 256 * smoothing)
    return float(-np.log2(chances[rows, columns, other]).mean())


def context_bits(train: Bytes, other: Bytes, levels: int, weight: float) -> float:
    """Bits a pixel given the pixels to the left and above, cut to ``levels``, backing off to the left one, to none."""

    def contexts(images: Bytes) -> tuple[Bytes, Bytes]:
        padded = np.pad(images, ((0, 0), (1, 0), (1, 0)))
        left, above = padded[:, 1:, :-1] * levels // 256, padded[:, :-1, 1:] * levels // 256
        return left, left * levels + above

    (left, both), (left_other, both_other) = contexts(train), contexts(other)
    chance = (np.bincount(train.ravel(), minlength=256) + 1) / (train.size + 256)
    result = np.broadcast_to(chance, (1, 256))
    tables = []
    for places, size in ((left, levels), (both, levels * levels)):
        counts = np.bincount((places * 256 + train).ravel(), minlength=size * 256).reshape(size, 256).astype(float)
        parent = result if len(result) == 1 else np.repeat(result, levels, axis=0)
        result = (counts + weight * parent) / (counts.sum(1, keepdims=True) + weight)
        tables.append(result)
    assert left_other.shape == other.shape
    return float(-np.log2(tables[-1][both_other, other]).mean())


def main() -> None:
    """Print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the idx.gz file")
    parser.add_argument("--root", type=Path, default=Path("runs/mnist_generator"), help="folder for the run")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from vertebra.domains.vision.data import ImageData

    images = ImageData(
        images=f"{args.data}/t10k-images-idx3-ubyte.gz", task="generation", test_every=5, val_fraction=0.05,
        test_fraction=0,
    )  # fmt: skip
    images.setup()
    parts = {}
    for split in ("train", "val", "test"):
        items = images.items(split)
        parts[split] = items.fetch(np.arange(len(items.names)), 0)["images"][:, 0].numpy().astype(np.int64)
    print({name: len(part) for name, part in parts.items()})
    smoothing = min((0.001, 0.003, 0.01, 0.03), key=lambda s: histogram_bits(parts["train"], parts["val"], s))
    print(f"per-pixel histogram: {histogram_bits(parts['train'], parts['test'], smoothing):.4f} bits a pixel")
    grid = list(itertools.product((8, 16, 32, 256), (3.0, 10.0, 30.0)))
    best = min(grid, key=lambda g: context_bits(parts["train"], parts["val"], *g))
    bits = context_bits(parts["train"], parts["test"], *best)
    print(f"two-pixel context ({best[0]} levels): {bits:.4f} bits a pixel", flush=True)

    vertebra = str(Path(sys.executable).with_name("vertebra"))
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    command = arguments(args.data, args.root, args.epochs, args.seed)
    subprocess.run([vertebra, *command], check=True, stdout=subprocess.DEVNULL, env=environment)
    run = args.root / "vision" / "generate" / "latest"
    found = json.loads((run / "metrics.json").read_text())
    print(f"Axial, {args.epochs} epochs: {found['test']['test/loss']:.4f} bits a pixel")
    grid_file = args.root / "samples.png"
    draw = ["run", "vision/generate", "-o", str(grid_file), "--model", str(run / "model")]
    subprocess.run([vertebra, *draw, "--count", "40", "--seed", "0"], check=True, env=environment)
    shutil.copy(grid_file, HERE / "mnist_samples.png")


if __name__ == "__main__":
    main()
