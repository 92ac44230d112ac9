"""Vision: images of every kind and damaged ones, an evaluation; then images made and completed."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vertebra.pipelines.demo.base import Demo


def show(demo: Demo) -> None:
    """Run the pipelines of the domain and show what they write."""
    samples, results, report = demo.samples, demo.results, demo.report
    report.section("vision/classify: images of every kind")
    table = demo.run("vision/classify", [samples / "unsorted", samples / "damaged"], "classes.csv")
    caption = (
        "Grey, CMYK, 16 bits, transparent, turned, tiny, large: what the model says below, the file's name in grey."
    )
    report.image(results / "classes.csv.png", caption)
    demo.damaged(table.with_name("classes.csv.errors.jsonl"), "files cannot be read")

    report.section("vision/classify: how good")
    table = demo.run("vision/classify", [_fresh_shapes(results / "fresh")], "evaluation.csv", "--labels folder --ranks")
    summary = json.loads(table.with_name("evaluation.csv.json").read_text(encoding="utf-8"))
    chance = 1 / len(summary["confusion"])
    rows = [
        ("accuracy", summary["accuracy"], chance),
        ("top-5 accuracy", summary["top5_accuracy"], min(1.0, 5 * chance)),
        ("calibration error", summary["calibration_error"], None),
    ]
    report.table(rows, ("metric", "model", "by chance"))
    for ending, caption in (
        (".png", f"Some of {summary['labelled']} shapes, drawn for this report; folders are classes."),
        (".confusion.png", "True and predicted classes."),
        (".ranks.png", "How many directions the attention of every head has; iLLaMA, section 3.7."),
    ):
        report.image(results / f"evaluation.csv{ending}", caption)

    report.section("vision/generate")
    made = demo.run("vision/generate", [], "made.png", "--count 4")
    report.image(made, "Four images of every class.")
    half = samples / "top_half.png"
    completed = demo.run("vision/generate", [], "completed.png", f"--count 2 --complete {half}")
    report.image(completed, "The upper half of an image is kept, and the model draws the lower one, for every class.")


def _fresh_shapes(folder: Path, count: int = 20) -> Path:
    """Draw shapes that no model was trained on, in a folder for each class."""
    from vertebra.domains.vision.sample import CLASSES, draw_shape

    for number, kind in enumerate(CLASSES):
        rng = np.random.default_rng([2024, number])
        (folder / kind).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            draw_shape(rng, kind).save(folder / kind / f"{i:02}.png")
    return folder
