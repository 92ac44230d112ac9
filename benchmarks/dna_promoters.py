"""Promoters by cross-validation, beside a k-mer logistic regression and the majority class.

    python benchmarks/dna_promoters.py --species ecoli --backbone illama_pico,causal=false,dropout=0.3

Fixed folds (``vertebra fit dna/promoter`` with ``--data.folds 5``); a tenth of the other sequences of a fold chooses
the checkpoint. ``--members`` models of different seeds are trained a fold, and scored one by one and as the mean of
their probabilities. ``--init_from`` starts from a model directory. Needs the data of Umarov & Solovyev 2017
(https://doi.org/10.1371/journal.pone.0171410) in ``--data``, and the extra `bench` for the baseline.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

FILES = {
    "ecoli": ("Ecoli_prom.fa", "Ecoli_non_prom.fa"),
    "arabidopsis": ("Arabidopsis_tata.fa", "Arabidopsis_non_prom.fa"),
}


def mcc(truth: np.ndarray, said: np.ndarray) -> float:
    """Matthews correlation coefficient of two boolean arrays."""
    tp, tn = float((said & truth).sum()), float((~said & ~truth).sum())
    fp, fn = float((said & ~truth).sum()), float((~said & truth).sum())
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return (tp * tn - fp * fn) / root if root else 0.0


def options_of_data(args: argparse.Namespace, fold: int) -> dict[str, Any]:
    """Arguments of the data module of one fold."""
    positives, negatives = (str(Path(args.data) / name) for name in FILES[args.species])
    return {"positives": positives, "negatives": negatives, "split": args.split, "folds": args.folds, "fold": fold}


def train(job: tuple[argparse.Namespace, int, int]) -> dict[str, Any]:
    """Train one model; return fold, test labels and test probabilities."""
    args, fold, seed = job
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from vertebra.cli import main
    from vertebra.domains.dna.data import DNASequenceData
    from vertebra.domains.saving import load_model

    torch.set_num_threads(1)
    data = options_of_data(args, fold)
    root = Path(args.root) / f"{args.species}-{fold}-{seed}"
    command = ["fit", args.recipe, "--root", str(root), "--seed_everything", str(seed)]
    command += [part for key, value in data.items() for part in (f"--data.{key}", str(value))]
    command += ["--model.backbone", args.backbone, *args.options]
    if args.init_from:
        command += ["--model.init_from", args.init_from]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        status = main(command)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}\n{errors.getvalue()[-2000:]}")
    run = next(root.rglob("metrics.json")).parent
    module = DNASequenceData(**data, batch_size=256)
    module.setup("test")
    model = load_model(run / "model")
    truth, scores = [], []
    with torch.inference_mode():
        for batch in module.test_dataloader():
            scores.append(model(batch["ids"], batch["mask"]).softmax(-1)[:, 1].numpy())
            truth.append(batch["labels"].numpy() == 1)
    facts = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {
        "fold": fold,
        "seed": seed,
        "truth": np.concatenate(truth),
        "scores": np.concatenate(scores),
        "val": facts["validation"]["val/mcc"],
        "best": facts["best"],
    }


def baselines(args: argparse.Namespace) -> dict[str, list[float]]:
    """MCC by fold of logistic regressions on k-mer counts and on aligned bases."""
    from sklearn.linear_model import LogisticRegression

    from vertebra.domains.dna.data import DNASequenceData

    found: dict[str, list[float]] = {"4-mer logistic regression": [], "aligned-base logistic regression": []}
    for fold in range(args.folds):
        module = DNASequenceData(**options_of_data(args, fold), val_fraction=0.0, batch_size=10**6)
        module.setup()
        batches = {name: next(iter(module.loader(name, shuffle=False))) for name in ("train", "test")}
        sets = {}
        for name, batch in batches.items():
            codes = batch["ids"].numpy().astype(np.int64) - 7  # A, C, G, T are 7 to 10
            grams = sum(codes[:, i : codes.shape[1] - 3 + i] * 4 ** (3 - i) for i in range(4))
            counts = np.stack([np.bincount(row, minlength=256) for row in grams])
            sets[name] = (counts, np.eye(4)[codes].reshape(len(codes), -1), batch["labels"].numpy() == 1)
        for index, name in enumerate(found):
            scale = sets["train"][index].std(0) + 1e-9
            fitted = LogisticRegression(max_iter=2000, C=0.1).fit(sets["train"][index] / scale, sets["train"][2])
            found[name].append(mcc(sets["test"][2], fitted.predict(sets["test"][index] / scale)))
    return found


def main() -> None:
    """Print the table of one species and backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/dna/cnnpromoter_ecoli_arabidopsis")
    parser.add_argument("--species", choices=FILES, required=True)
    parser.add_argument("--backbone", required=True)
    parser.add_argument("--recipe", default="dna/promoter")
    parser.add_argument("--init_from", default="")
    parser.add_argument("--split", default="random", choices=("random", "identity"))
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--members", type=int, default=1, help="models a fold")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--root", default="", help="where runs are kept (default: a temporary folder)")
    parser.add_argument("options", nargs="*", help="more options of `vertebra fit`, after --")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        args.root = args.root or temporary
        start = time.perf_counter()
        jobs = [(args, fold, seed) for fold in range(args.folds) for seed in range(args.members)]
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            results = pool.map(train, jobs, chunksize=1)
            pool.close()
            pool.join()
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = (used.ru_utime + used.ru_stime) / 60
        minutes = (time.perf_counter() - start) / 60
    rows = [("majority class", [0.0] * args.folds)] + ([] if args.no_baselines else list(baselines(args).items()))
    by_fold = [[r for r in results if r["fold"] == fold] for fold in range(args.folds)]
    single = [float(np.mean([mcc(r["truth"], r["scores"] >= 0.5) for r in rs])) for rs in by_fold]
    rows.append((f"{args.backbone}, one model", single))
    if args.members > 1:
        means = [mcc(rs[0]["truth"], np.mean([r["scores"] for r in rs], axis=0) >= 0.5) for rs in by_fold]
        rows.append((f"{args.backbone}, mean of {args.members} models", means))
    start_from = f", from {args.init_from}" if args.init_from else ""
    cost = f"{minutes:.1f} minutes, {cpu:.1f} CPU minutes, {args.processes} processes"
    print(f"{args.species}, {args.split} folds{start_from}: {cost}")
    print(f"validation MCC {np.mean([r['val'] for r in results]):.3f}")
    print("\n| model | " + " | ".join(f"fold {f}" for f in range(args.folds)) + " | mean MCC | spread (std) |")
    print("| --- |" + " ---: |" * (args.folds + 2))
    for name, values in rows:
        cells = " | ".join(f"{v:.3f}" for v in values)
        print(f"| {name} | {cells} | {np.mean(values):.3f} | {np.std(values):.3f} |")


if __name__ == "__main__":
    main()
