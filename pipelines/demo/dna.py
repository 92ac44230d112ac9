"""DNA: promoters against background, a genome in windows, embeddings; then elements generated and scored."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np

from vertebra.pipelines import figures
from vertebra.pipelines.demo.base import Demo


def show(demo: Demo) -> None:
    """Run the pipelines of the domain and show what they write."""
    samples, report = demo.samples, demo.report
    inputs = [_head(samples / f"{name}.fa", demo.results) for name in ("promoters", "background")]
    report.section("dna/classify: promoters")
    truth, scores = _labels_and_scores(demo.run("dna/classify", inputs, "classes.csv"), inputs[0])
    report.table(_binary_metrics(truth, scores), ("metric", "model", "always the larger class"))
    report.figure(_histogram(truth, scores), "Score of every sample sequence, by what it is.")

    report.section("dna/classify: a genome in windows")
    scan = demo.run("dna/classify", [samples / "genome.fa"], "genome.csv", "--stride 8")
    starts, curve, width, name = _windows(scan.with_name("genome.csv.windows.csv"))
    sites = _bed_middles(samples / "genome.bed")
    caption = f"Promoter score along {name}; triangles are the promoters that the sample planted."
    report.figure(figures.track(starts, {"promoter": curve}, width=width, marks=sites, mark_label="planted"), caption)

    report.section("dna/embed")
    with np.load(demo.run("dna/embed", inputs, "embeddings.npz")) as archive:
        caption = "First two principal components of the language model's embeddings; it has seen no label."
        report.figure(_components(archive["embeddings"], truth), caption)
    _show_elements(demo)


def _show_elements(demo: Demo) -> None:
    """Generated promoters beside real ones, and what every substitution of a planted promoter costs."""
    samples, report = demo.samples, demo.report
    words = f"--label bacterial --label background --count 60 --reference {samples / 'elements.csv'} "
    words += "--motif minus10=TATAAT --motif minus35=TTGACA"
    report.section("dna/generate")
    made = demo.run("dna/generate", [], "generated.fa", words)
    summary = json.loads(made.with_name("generated.fa.json").read_text(encoding="utf-8"))
    rows = [
        (
            group,
            facts["gc_mean"],
            facts["motifs"]["minus10"],
            facts["motifs"]["minus35"],
            facts.get("share_new", float("nan")),
        )
        for group, facts in summary.items()
    ]
    report.table(rows, ("sequences", "GC", "share with TATAAT", "share with TTGACA", "share new"))
    caption = "4-mers, GC and lengths of what was generated, beside the sample's elements."
    report.image(made.with_name("generated.fa.png"), caption)

    one = demo.results / "one.bed"
    one.write_text((samples / "genome.bed").read_text(encoding="ascii").splitlines()[0] + "\n", encoding="ascii")
    words = f"--reference {samples / 'genome.fa'} --model dna_elements --label bacterial --window 81 --strands forward"
    report.section("dna/score")
    demo.run("dna/score", [one], "scores.csv", f"{words} --figures 1")
    caption = "What every substitution of a planted promoter costs, in nats: its -35 and -10 boxes stand out."
    report.image(next(demo.results.glob("scores.csv.1.*.png")), caption)


def _head(source: Path, folder: Path, count: int = 300) -> Path:
    """Copy the first records of a FASTA file: enough to show, and quick."""
    folder.mkdir(parents=True, exist_ok=True)
    records = source.read_text(encoding="ascii").split("\n>")[:count]
    target = folder / source.name
    target.write_text("\n>".join(records).rstrip("\n") + "\n", encoding="ascii")
    return target


def _labels_and_scores(table: Path, positives: Path) -> tuple[np.ndarray, np.ndarray]:
    with table.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    truth = np.array([row["file"] == str(positives) for row in rows])
    return truth, np.array([float(row["positive"]) for row in rows])


def _binary_metrics(truth: np.ndarray, scores: np.ndarray) -> list[tuple[str, float, float]]:
    """Accuracy, MCC and AUROC at a threshold of one half, and of a constant answer."""
    from scipy.stats import rankdata

    said = scores >= 0.5
    tp, tn = float((said & truth).sum()), float((~said & ~truth).sum())
    fp, fn = float((said & ~truth).sum()), float((~said & truth).sum())
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    ranks = rankdata(scores)  # ties share their mean rank
    positives = truth.sum()
    auroc = (ranks[truth].sum() - positives * (positives + 1) / 2) / max(positives * (~truth).sum(), 1)
    return [
        ("accuracy", (tp + tn) / len(truth), max(truth.mean(), 1 - truth.mean())),
        ("MCC", (tp * tn - fp * fn) / root if root else 0.0, 0.0),
        ("AUROC", float(auroc), 0.5),
    ]


def _bed_middles(path: Path) -> list[int]:
    """Middles of the intervals of a BED file, where the scores of windows are drawn too."""
    lines = (line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", ""))
    return [(int(fields[1]) + int(fields[2])) // 2 for fields in lines]


def _windows(path: Path) -> tuple[np.ndarray, np.ndarray, int, str]:
    """Starts, scores of the class ``positive``, and the width of the windows of the first record."""
    with path.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    rows = [row for row in rows if row["name"] == rows[0]["name"]]
    starts = np.array([int(row["start"]) for row in rows])
    return starts, np.array([float(r["positive"]) for r in rows]), int(rows[0]["end"]) - int(starts[0]), rows[0]["name"]


def _histogram(truth: np.ndarray, scores: np.ndarray) -> Any:
    figure, (axes,) = figures.new_figure(width=7.0, height=2.8)
    bins = np.linspace(0, 1, 41).tolist()
    for keep, name, color in ((truth, "promoters", figures.PALETTE[1]), (~truth, "background", figures.PALETTE[0])):
        axes.hist(scores[keep], bins=bins, histtype="stepfilled", alpha=0.55, label=name, color=color)
    axes.set_xlabel("score of the class promoter (probability)")
    axes.set_ylabel("sequences")
    axes.legend(frameon=False, loc="upper center")
    return figure


def _components(vectors: np.ndarray, truth: np.ndarray) -> Any:
    centred = vectors - vectors.mean(0)
    _, _, axes_of_change = np.linalg.svd(centred, full_matrices=False)
    places = centred @ axes_of_change[:2].T
    figure, (axes,) = figures.new_figure(width=5.2, height=4.0)
    for keep, name, color in ((~truth, "background", figures.PALETTE[0]), (truth, "promoters", figures.PALETTE[1])):
        axes.scatter(places[keep, 0], places[keep, 1], s=5, alpha=0.5, linewidths=0, label=name, color=color)
    axes.set_xlabel("component 1")
    axes.set_ylabel("component 2")
    axes.legend(frameon=False, markerscale=3)
    return figure
