"""What pretraining brings: the bundled models on real data they have not seen, beside the same models from scratch.

    python benchmarks/finetuning.py --data ../shared/data --out DIR [--domains dna,speech] [--seeds 3]

For each domain the same structure is trained for the same number of steps four times: from fresh weights, whole from
the bundled model, its head alone (with what stands before the backbone), and by low-rank adapters
(``tune.lora_rank=8``, the extra `lora`). The first seed is trained at the recipe's learning rate and at three times
that; all seeds have the one that is better on the validation split, and their numbers on the test split are told.
Meshes have no split to spare: there fresh weights and whole models have the recipe's rate, the others three times that.

What the bundled models have seen is in their cards: fabricated data alone, but for ``dna_lm``, which read genomes of a
chloroplast, two plasmids and orchids, and ``mesh_generator``, which had nine meshes of Kenney. None has seen what is
measured here. A cell takes one to two minutes on one core; what is done is kept in DIR, and read when called again.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, str]] = {
    "from scratch": {"model.init_from": "null"},
    "whole": {},
    "head alone": {"model.tune.train": "head"},
    "low-rank adapters": {"model.tune.lora_rank": "8"},
}
RATES = (1.0, 3.0)
"""Learning rates that are tried, in units of the recipe's."""


MESHES = {"train": ("suzanne", "spot", "teapot", "fandisk"), "val": ("cow", "stanford-bunny")}
FACES = (60, 100, 150, 220)
"""Each model is tried with so many faces."""


@dataclass(frozen=True)
class Domain:
    """A pretrained model and the data it is tried on.

    Args:
        recipe: Recipe of the trainings.
        model: Bundled model.
        what: What is measured, on what.
        metric: Name of the number, without the split.
        better: Whether ``more`` or ``less`` of it is better.
        rate: The recipe's learning rate.
        options: Further options; ``{data}`` stands for the folder of data, ``{seed}`` for the seed.
        parts: ``init_parts``.
        split: Split whose number is told.
    """

    recipe: str
    model: str
    what: str
    metric: str
    better: str
    rate: float
    options: Mapping[str, str] = field(default_factory=dict)
    parts: str = "backbone"
    split: str = "test"


DOMAINS = {
    "dna": Domain(
        "dna/finetune", "dna_lm", "MCC of E. coli promoters (fold 0 of 5)", "mcc", "more", 1e-3,
        {
            "data.positives": "{data}/dna/cnnpromoter_ecoli_arabidopsis/Ecoli_prom.fa",
            "data.negatives": "{data}/dna/cnnpromoter_ecoli_arabidopsis/Ecoli_non_prom.fa",
            "data.folds": "5",
            "trainer.max_steps": "70",
        },
    ),
    "speech": Domain(
        "speech/digits", "speech_languages", "word errors of FSDD's test takes", "wer", "less", 3e-3,
        {
            "data.root": "{data}/speech/fsdd/recordings",
            "model.intermediate": "[1]",
            "data.seed": "{seed}",  # nothing else differs between seeds where all weights are loaded
            "model.feature_norm": "global",
            "model.optimizer.warmup": "0.1",
            "trainer.max_steps": "400",
        },
        parts="all",
    ),
    "vision": Domain(
        "vision/classify", "vision_shapes", "accuracy on handwritten digits, of 50 images a class", "accuracy", "more",
        1.5e-3,
        {
            "data.root": "null",
            "data.images": "{data}/vision/mnist_t10k/t10k-images-idx3-ubyte.gz",
            "data.labels": "{data}/vision/mnist_t10k/t10k-labels-idx1-ubyte.gz",
            "data.size": "32",
            "data.test_every": "5",
            "data.limit": "50",
            "data.augment.hflip": "0",
            "data.augment.degrees": "12",
            "model.soft_mask": "none",
            "model.soft_mask_epochs": "0",
            "trainer.max_steps": "200",
        },
    ),
    "mesh": Domain(
        "mesh/generate", "mesh_generator", "nats a face of a cow and a bunny", "nats_per_face", "less", 2e-3,
        {
            "data.root": "{out}/meshes",
            "data.points": "4096",
            "data.augment.turn": "any",
            "model.ema": "0",
            "trainer.max_steps": "60",
        },
        parts="all",
        split="val",
    ),
    "action": Domain(
        "action/policy", "action_arm", "RMSE of the next 30 actions of a Unitree G1", "rmse", "less", 2e-3,
        {
            "data.root": "{data}/action/unitree_g1",
            "data.val_episodes": "45:50",
            "data.test_episodes": "50:60",
            "data.horizon": "30",
            "data.tokenizer": "bspline,num_basis=6,degree=4",
            "data.every": "4",
            "model.ema": "0",
            "trainer.max_steps": "150",
        },
    ),
    "timeseries": Domain(
        "timeseries/finetune", "timeseries_zero", "MAE on ETTh1, 96 hours ahead, scaled", "mae", "less", 3e-4,
        {
            "data.path": "{data}/timeseries/etth1/ETTh1.csv",
            "data.borders": "[8640, 11520, 14400]",
            "data.standardise": "true",
            "data.multivariate": "true",
            "data.batch_size": "16",
            "trainer.max_steps": "100",
        },
        parts="all",
    ),
}  # fmt: skip


def backbone_of(model: str) -> str:
    """The structure of a bundled model's backbone, as the command line reads it."""
    from vertebra.backbones.base import config_class
    from vertebra.backbones.loading.pretrained import read_config

    fields = dict(read_config(model)["backbone"])
    cls = config_class(fields.pop("family"))
    return json.dumps({"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": fields})


def make_meshes(data: Path, out: Path) -> None:
    """Write well-known models with few faces: four to learn from, and two that are new."""
    from vertebra.domains.mesh.files import read_mesh, write_mesh
    from vertebra.domains.mesh.geometry import decimate

    for split, models in MESHES.items():
        for model in models:
            mesh = read_mesh(data / "mesh" / "common_test_models" / f"{model}.obj")
            for faces in FACES:
                path = out / split / f"{model}-{faces}.obj"
                if not path.is_file():
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_mesh(decimate(mesh, faces), path)


def train(domain: Domain, method: str, rate: float, seed: int, args: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Train one model, unless it is there; return what its ``metrics.json`` holds."""
    from vertebra.cli import main

    done = sorted(root.rglob("metrics.json"))
    if not done:
        places = {"data": args.data, "out": args.out, "seed": seed}
        options = {key: value.format(**places) if "{" in value else value for key, value in domain.options.items()}
        options = {
            "model.backbone": backbone_of(domain.model),
            "model.init_from": domain.model,
            "model.init_parts": domain.parts,
            "trainer.max_epochs": "-1",
            "trainer.check_val_every_n_epoch": "100000",
            "trainer.enable_progress_bar": "false",
            "trainer.accelerator": "cpu",
            "model.optimizer.lr": f"{rate * domain.rate:g}",
            "seed_everything": str(seed),
            "root": str(root),
            **options,
            **METHODS[method],
        }
        if args.steps:
            options["trainer.max_steps"] = str(args.steps)
        command = ["fit", domain.recipe, *(word for key, value in options.items() for word in (f"--{key}", value))]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
            status = main(command)
        if status:
            raise SystemExit(f"vertebra {' '.join(command)}: status {status}\n{errors.getvalue()[-2000:]}")
        done = sorted(root.rglob("metrics.json"))
    found: dict[str, Any] = json.loads(done[0].read_text(encoding="utf-8"))
    return found


def cells(name: str, method: str, args: argparse.Namespace) -> list[float]:
    """Return the numbers of all seeds, at the learning rate that is better on the first one's validation split."""
    domain = DOMAINS[name]

    def run(rate: float, seed: int) -> dict[str, Any]:
        root = Path(args.out) / name / method.replace(" ", "-") / f"seed{seed}" / f"{rate:g}"
        return train(domain, method, rate, seed, args, root)

    if domain.split == "val":  # nothing to choose by
        best = 1.0 if method in ("from scratch", "whole") else 3.0
    else:
        validated = {rate: run(rate, 0)["validation"][f"val/{domain.metric}"] for rate in RATES}
        best = (max if domain.better == "more" else min)(validated, key=validated.__getitem__)
    split = "validation" if domain.split == "val" else "test"
    found = []
    for seed in range(args.seeds):
        found.append(float(run(best, seed)[split][f"{domain.split}/{domain.metric}"]))
        print(
            f"{name}, {method}, seed {seed}: {found[-1]:.4g} (lr {best * domain.rate:g})", file=sys.stderr, flush=True
        )
    return found


def main() -> None:
    """Print a table of all domains asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data")
    parser.add_argument("--out", required=True, help="where runs are kept")
    parser.add_argument("--domains", default=",".join(DOMAINS))
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=0, help="other number of steps, to try the script")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    args.data, args.out = str(Path(args.data).resolve()), str(Path(args.out).resolve())
    names, methods = args.domains.split(","), args.methods.split(",")
    print(f"| domain | {' | '.join(methods)} |")
    print(f"| --- |{' ---: |' * len(methods)}", flush=True)
    for name in names:
        if name == "mesh":
            make_meshes(Path(args.data), Path(args.out) / "meshes")
        row = []
        for method in methods:
            values = cells(name, method, args)
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            row.append(f"{statistics.fmean(values):.3f} ± {spread:.3f}")
        domain = DOMAINS[name]
        arrow = "↑" if domain.better == "more" else "↓"
        print(f"| {name}: {domain.what} {arrow} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
