"""Ten thousand digits: the four backbones on one budget, beside 1-nearest-neighbour and logistic regression.

    python benchmarks/mnist.py --data ../shared/data/vision/mnist_t10k     # about 25 minutes on two cores

Every fifth image (index % 5 == 4) is the test set; a tenth of the others is for validation, by which the checkpoint is
chosen; baselines are fitted on all others. Each backbone is trained by ``vertebra fit vision/classify`` with the
settings below and nothing else; the table says how long that took. Speeds are measured at the end, the models in turn.
A run that is there already is read, not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
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
    "timm ViT, 12 layers": "timm:vit_tiny_patch16_224,patch_size=4,embed_dim=64,num_heads=2",
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


def fit(word: str, folder: Path, data: Path, threads: int, seed: int) -> Path:
    """Train with the command line, and note the minutes; return the run folder."""
    run = folder / "vision" / "classify" / "latest"
    if (run / "model").is_dir():
        return run
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
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    (run / "minutes").write_text(f"{(time.perf_counter() - start) / 60:.1f}")
    return run


def speeds(runs: dict[str, Path], threads: int) -> dict[str, tuple[int, float, float]]:
    """Parameters, and images a second in training (batch 64) and in inference (batch 256), by name."""
    import torch
    import torch.nn.functional as F

    from vertebra.domains.saving import load_model

    torch.set_num_threads(threads)
    models = {name: load_model(run / "model") for name, run in runs.items()}
    images = torch.randn(256, 1, 28, 28)

    def train(model: torch.nn.Module) -> None:
        model.zero_grad()
        F.cross_entropy(model.train()(images[:64]), torch.arange(64) % 10).backward()

    def infer(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model.eval()(images)

    rates: dict[str, list[float]] = {name: [] for name in models}
    for action, count in ((train, 64), (infer, 256)):
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(12):
            for name, model in models.items():
                start = time.perf_counter()
                action(model)
                times[name].append(time.perf_counter() - start)
        for name in models:
            rates[name].append(count / statistics.median(times[name][2:]))
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    return {name: (sizes[name], *rates[name]) for name in models}


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
    """Print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the two idx.gz files")
    parser.add_argument("--root", type=Path, default=Path("runs/mnist"), help="folder for the runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", choices=list(BACKBONES), help="some of the backbones")
    args = parser.parse_args()
    for name, accuracy in baselines(args.data).items():
        print(f"{name}: {accuracy:.4f}", flush=True)
    names = args.only or list(BACKBONES)
    runs = {}
    for name in names:
        runs[name] = fit(BACKBONES[name], args.root / name.replace(" ", "-"), args.data, args.threads, args.seed)
    print("\n| backbone | parameters | val top-1 | test top-1 | test ECE | minutes | train img/s | infer img/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for name, (size, train, infer) in speeds(runs, args.threads).items():
        metrics = json.loads((runs[name] / "metrics.json").read_text())
        val, test = metrics["validation"], metrics["test"]
        print(
            f"| {name} | {size:,} | {val['val/accuracy']:.4f} | {test['test/accuracy']:.4f} | {test['test/ece']:.3f} | "
            f"{(runs[name] / 'minutes').read_text()} | {train:,.0f} | {infer:,.0f} |"
        )


if __name__ == "__main__":
    main()
