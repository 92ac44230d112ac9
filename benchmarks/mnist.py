"""Ten thousand digits: the four backbones on one budget, beside 1-nearest-neighbour and logistic regression.

    python benchmarks/mnist.py --data ../shared/data/vision/mnist_t10k     # about 25 minutes on two cores

Every fifth image (index % 5 == 4) is the test set; a tenth of the others is for validation, by which the checkpoint is
chosen; baselines are fitted on all others. Each backbone is trained by ``vertebra fit vision/classify`` with the settings
below and nothing else; the table says how long that took.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SIZE = "dim=64,depth=4,num_heads=2"
BACKBONES = {
    "iLLaMA, soft mask": f"illama_nano,{SIZE},hidden_dim=176,causal=false,soft_mask=true",
    "iLLaMA, causal": f"illama_nano,{SIZE},hidden_dim=176",
    "hybrid": "hybrid_nano,dim=64,depth=4,causal=false",
    "FIT": "fit_nano,dim=64,num_heads=2,group_size=16,causal=false",
    "Axial": f"axial_nano,{SIZE},causal=false",
    "timm ViT": "timm:vit_tiny_patch16_224,patch_size=4,embed_dim=64,depth=4,num_heads=2",
}
SETTINGS = {
    "data.root": "null",
    "data.test_every": "5",
    "data.augment.hflip": "0",
    "data.augment.degrees": "12",
    "data.augment.translate": "0.08",
    "model.optimizer.lr": "2e-3",
    "trainer.max_epochs": "25",
    "trainer.enable_progress_bar": "false",
}


def fit(word: str, folder: Path, data: Path, threads: int, seed: int) -> tuple[dict[str, float], float, Path]:
    """Train with the command line; return test numbers, seconds and the run folder."""
    command = [str(Path(sys.executable).with_name("vertebra")), "fit", "vision/classify", "--model.backbone", word]
    given = {
        **SETTINGS,
        "data.images": f"{data}/t10k-images-idx3-ubyte.gz",
        "data.labels": f"{data}/t10k-labels-idx1-ubyte.gz",
        "seed_everything": str(seed),
        "root": str(folder),
    }
    command += [w for key, value in given.items() for w in (f"--{key}", value)]
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_threads(threads))
    run = folder / "vision" / "classify" / "latest"
    metrics = json.loads((run / "metrics.json").read_text())
    return {**metrics["validation"], **metrics["test"]}, time.perf_counter() - start, run


def _threads(count: int) -> dict[str, str]:
    import os

    return {**os.environ, "OMP_NUM_THREADS": str(count)}


def speed(run: Path, threads: int) -> tuple[int, float, float]:
    """Parameters, images a second in training (batch 64) and in inference (batch 256)."""
    import torch
    import torch.nn.functional as F

    from vertebra.domains.saving import load_model

    torch.set_num_threads(threads)
    model = load_model(run / "model")
    images = torch.randn(256, 1, 28, 28)

    def train() -> None:
        model.zero_grad()
        F.cross_entropy(model.train()(images[:64]), torch.arange(64) % 10).backward()

    def infer() -> None:
        with torch.no_grad():
            model.eval()(images)

    rates = []
    for action, count in ((train, 64), (infer, 256)):
        times = []
        for _ in range(12):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        rates.append(count / statistics.median(times[2:]))
    return sum(p.numel() for p in model.parameters()), rates[0], rates[1]


def baselines(data: Path) -> dict[str, float]:
    """Test accuracy of 1-nearest-neighbour and of logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier

    from vertebra.domains.vision.sources import read_idx

    table = read_idx(f"{data}/t10k-images-idx3-ubyte.gz", f"{data}/t10k-labels-idx1-ubyte.gz")
    x, y = np.asarray(table.pixels).reshape(10_000, -1) / 255.0, np.array(table.labels)
    test = np.arange(10_000) % 5 == 4
    models = {
        "1-nearest-neighbour": KNeighborsClassifier(1),
        "logistic regression": LogisticRegression(C=0.05, max_iter=200),
    }
    return {name: float(m.fit(x[~test], y[~test]).score(x[test], y[test])) for name, m in models.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two idx.gz files")
    parser.add_argument("--root", type=Path, default=Path("runs/mnist"), help="folder for the runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(BACKBONES), help="some of the backbones")
    args = parser.parse_args()
    for name, accuracy in baselines(args.data).items():
        print(f"{name}: {accuracy:.4f}", flush=True)
    print("\n| backbone | parameters | val top-1 | test top-1 | test ECE | minutes | train img/s | infer img/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, word in BACKBONES.items():
        if args.only and name not in args.only:
            continue
        found, seconds, run = fit(word, args.root / name.replace(" ", "-"), args.data, args.threads, args.seed)
        size, train, infer = speed(run, args.threads)
        print(
            f"| {name} | {size:,} | {found['val/accuracy']:.4f} | {found['test/accuracy']:.4f} | {found['test/ece']:.3f} | "
            f"{seconds / 60:.1f} | {train:,.0f} | {infer:,.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
