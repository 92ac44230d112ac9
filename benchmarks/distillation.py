"""Attention into Mamba-2 on the DNA language model: distilled students, the same from scratch, and what each costs.

    python benchmarks/distillation.py                                    # elements, 600 steps, 3 seeds: hours on a core
    python benchmarks/distillation.py --data genomes --teacher_steps 600 # real genomes, with a teacher of their own
    python benchmarks/distillation.py --steps 60 --batch 16 --ablation_seeds 0     # a small version
    python benchmarks/distillation.py --only costs                       # the costs alone, with their figure

``elements``: the bundled ``dna_elements`` (iLLaMA) on fabricated elements of `vertebra sample dna --seed 1`, which it
was trained on. ``genomes``: an iLLaMA trained first, by the recipe ``dna/lm`` with the files of ``dna_lm``'s card. All
students have the same layers, steps, batches and data; those from scratch have the learning rate of their domain's
recipe, distilled ones that of ``distill/mohawk`` and ``distill/mmmamba``. A run that is there is read, one that was
interrupted goes on, so the command may be stopped and given again.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from vertebra.backbones.base import Backbone, BackboneConfig, resolve
from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.seeding import student_config
from vertebra.cli import main as vertebra
from vertebra.domains.dna.sample import write_sample
from vertebra.domains.loading import load

GENOMES = Path("../shared/data/dna/biopython_genomes")
TRAIN = ["NC_000932.gb", "addgene-plasmid-11664-sequence-180430.gbk", "pBAD30.gb", "ls_orchid.fasta"]
VALID, TEST = "NC_001422.gbk", ["NC_005816.fna", "NC_001802.fna"]
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
STAGES = {
    "MOHAWK, stages 1 to 3": ("mohawk", "[10,20,70]"),
    "MOHAWK, stages 2 and 3": ("mohawk", "[0,30,70]"),
    "MOHAWK, stage 3 alone": ("mohawk", "[0,0,100]"),
    "mmMamba": ("mmmamba", "[20,40,40]"),
}
MAIN, SCRATCH = "MOHAWK, stages 1 to 3", "the same from scratch"


class Bench:
    """The runs of one table.

    Args:
        args: What was typed.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.root = Path(args.root) / args.data
        self.root.mkdir(parents=True, exist_ok=True)
        self.domain_recipe = "dna/generate" if args.data == "elements" else "dna/lm"
        self.data = self.root / "data.yaml"
        if args.data == "elements":
            sample = self.root / "sample"
            if not sample.is_dir():
                write_sample(sample, seed=1)
            given = {"file": str(sample / "elements.csv"), "split": "random", "batch_size": args.batch}
            name = "DNAElementData"
        else:
            files = {"files": [str(GENOMES / f) for f in TRAIN], "val": [str(GENOMES / VALID)]}
            more = {"length": args.length, "rename_letters": 0.7, "batch_size": args.batch}
            given = {**files, "test": [str(GENOMES / f) for f in TEST], **more}
            name = "DNALanguageData"
        layer = {"data": {"class_path": f"vertebra.domains.dna.data.{name}", "init_args": given}}
        self.data.write_text(json.dumps(layer, indent=1))
        self.teacher = self._teacher()
        self.pattern = f"hybrid_nano,pattern={args.pattern}"
        # the bias-free layers of MOHAWK, which the student from scratch has too
        self.student = student_config(load(self.teacher).backbone.config, self.pattern, "mohawk")

    def _teacher(self) -> str:
        if self.args.teacher:
            return str(self.args.teacher)
        if self.args.data == "elements":
            return "dna_elements"
        words = ["--model.backbone", "illama_nano,dropout=0.2"]
        run = self.fit("teacher", self.domain_recipe, self.args.teacher_steps, 0, words)
        return str(run / "model")

    def fit(self, name: str, recipe: str, steps: int, seed: int, words: list[str]) -> Path:
        """Train, or go on, or read; return the run folder."""
        root = self.root / f"{name.replace(' ', '_').replace(',', '')}-{steps}-{self.args.batch}-{seed}"
        run = root / recipe / "1"
        command = ["fit", recipe, "-c", str(self.data), "--seed_everything", str(seed), *words]
        command += ["--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1", "--trainer.accelerator", "cpu"]
        command += ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
        command += ["--trainer.check_val_every_n_epoch", str(self.args.val_epochs)]
        if not (run / "metrics.json").is_file():
            last = run / "checkpoints" / "last.ckpt"
            if last.is_file():
                command += ["--ckpt_path", str(last)]
            else:
                shutil.rmtree(root, ignore_errors=True)
                command += ["--root", str(root)]
            if vertebra(command):
                raise SystemExit(f"failed: vertebra {' '.join(command)}")
        return run

    def cells(self) -> Iterator[tuple[str, int]]:
        """Names and seeds of the runs, the two that matter first."""
        for seed in self.args.seeds:
            yield MAIN, seed
            yield SCRATCH, seed
        for name in STAGES:
            if name != MAIN:
                yield from ((name, seed) for seed in self.args.ablation_seeds)

    def run(self, name: str, seed: int) -> Path:
        """Make one run."""
        if name == SCRATCH:
            words = ["--model.backbone", as_name(self.student)]
            return self.fit("scratch", self.domain_recipe, self.args.steps, seed, words)
        recipe, stages = STAGES[name]
        words = ["--model.teacher", self.teacher, "--model.student", self.pattern, "--model.stages", stages]
        return self.fit(f"{recipe}{stages}", f"distill/{recipe}", self.args.steps, seed, words)

    def table(self) -> None:
        """Print bits of all runs that are there."""
        found: dict[str, list[tuple[float, float]]] = {}
        reference: tuple[float, float] | None = None
        for name, seed in self.cells():
            facts = json.loads((self.run(name, seed) / "metrics.json").read_text())
            pair = [facts[split][f"{short}/loss"] for split, short in (("validation", "val"), ("test", "test"))]
            found.setdefault(name, []).append((pair[0] / math.log(2), pair[1] / math.log(2)))
            if "val/teacher_loss" in facts["validation"]:
                both = (facts["validation"]["val/teacher_loss"], facts["test"]["test/teacher_loss"])
                reference = (both[0] / math.log(2), both[1] / math.log(2))
        print(f"\n{self.args.data}: {self.args.steps} steps of {self.args.batch}, pattern {self.args.pattern}\n")
        print("| model | seeds | validation, bits a token | test |\n| --- | ---: | ---: | ---: |")
        if reference:
            print(f"| teacher | | {reference[0]:.4f} | {reference[1]:.4f} |")
        for name, values in found.items():
            print(f"| {name} | {len(values)} | {spread([v for v, _ in values])} | {spread([t for _, t in values])} |")


def spread(values: list[float]) -> str:
    """Mean, and standard deviation where there are several."""
    more = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{more}"


def as_name(config: BackboneConfig) -> str:
    """Write a config as the command line takes it."""
    fields = {k: v for k, v in config.to_dict().items() if k != "family" and v is not None}
    return "hybrid_nano," + ",".join(f"{k}={json.dumps(v) if not isinstance(v, str) else v}" for k, v in fields.items())


# ---------------------------------------------------------------- costs


@torch.inference_mode()
def forward_ms(backbone: Backbone, length: int) -> float:
    """Milliseconds a token of one sequence read at once; the best of five."""
    x = torch.randn(1, length, backbone.config.dim)
    backbone(x)
    return min(_timed(lambda: backbone(x)) for _ in range(5)) / length


@torch.inference_mode()
def decoding(backbone: Backbone, length: int, steps: int = 32) -> tuple[float, int]:
    """Milliseconds a token that is decoded behind ``length`` others, the best of five, and bytes of the state."""
    state = backbone.init_state(1, length + 6 * steps)
    backbone.step(torch.randn(1, length, backbone.config.dim), state)
    held = state.nbytes
    x = torch.randn(1, 1, backbone.config.dim)

    def some() -> None:
        for _ in range(steps):
            backbone.step(x, state)

    some()
    return min(_timed(some) for _ in range(5)) / steps, held


def _timed(call: object) -> float:
    assert callable(call)
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def costs(teacher: BackboneConfig, students: dict[str, HybridConfig], path: Path, lengths: tuple[int, ...]) -> None:
    """Print time and memory against length, and draw them."""
    models = {"teacher": teacher, **students}
    rows: dict[str, list[tuple[float, float, int]]] = {name: [] for name in models}
    backbones = {name: config.build().eval() for name, config in models.items()}
    for length in lengths:
        for name, backbone in backbones.items():
            rows[name].append((forward_ms(backbone, length), *decoding(backbone, length)))
    print("\n| tokens | " + " | ".join(f"{n}: forward | decoding | state" for n in models) + " |")
    print("| ---: |" + " ---: | ---: | ---: |" * len(models))
    for i, length in enumerate(lengths):
        cells = [f"{r[i][0]:.4f} | {r[i][1]:.3f} | {r[i][2] / 1024:.0f} KiB" for r in rows.values()]
        print(f"| {length} | " + " | ".join(cells) + " |")
    print("\nForward and decoding in ms a token, batch 1, the backbones alone.")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    titles = ("forward, ms a token", "decoding, ms a token", "state, KiB")
    for column, (ax, title) in enumerate(zip(axes, titles, strict=True)):
        for name, values in rows.items():
            scale = 1024 if column == 2 else 1
            ax.plot(lengths, [v[column] / scale for v in values], marker="o", markersize=3, label=name)
        ax.set(xscale="log", yscale="log", xlabel="tokens", title=title)
        ax.xaxis.set_major_locator(plt.FixedLocator(list(lengths)))
        ax.xaxis.set_major_formatter(plt.FuncFormatter(lambda value, _: f"{value:g}"))
        ax.xaxis.set_minor_locator(plt.NullLocator())
        for which in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
            which(plt.FuncFormatter(lambda value, _: f"{value:,g}"))
        ax.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)
    print(f"wrote {path}")


def main() -> None:
    """Train what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("elements", "genomes"), default="elements")
    parser.add_argument("--root", default="runs/bench_distillation", help="where runs are kept")
    parser.add_argument("--teacher", help="a model trained on that data; default: see above")
    parser.add_argument("--teacher_steps", type=int, default=600)
    parser.add_argument("--pattern", default="MMMMAM", help="letters A are attention layers that are kept")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=512, help="tokens of a row of genomes")
    parser.add_argument("--val_epochs", type=int, default=1, help="epochs between validations")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--ablation_seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    parser.add_argument("--only", choices=("training", "costs"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", default="benchmarks/distillation.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.only != "costs":
        Bench(args).table()
    if args.only != "training":
        teacher = resolve("illama_nano")
        students = {
            f"student {pattern}": student_config(teacher, f"hybrid_nano,pattern={pattern}", "mohawk")
            for pattern in (args.pattern, "M")
        }
        costs(teacher, students, Path(args.figure), tuple(args.lengths))


if __name__ == "__main__":
    main()
