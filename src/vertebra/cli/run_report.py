"""Figures and ``report.html`` of a run folder, from the files in it."""

from __future__ import annotations

import csv
import math
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vertebra import __version__
from vertebra.cli.runs import INITIAL
from vertebra.pipelines.figures import PALETTE, confusion, new_figure
from vertebra.pipelines.report import Report


def write_report(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Draw the curves of ``metrics.csv`` and write ``report.html``, one file that shows in any browser.

    Args:
        folder: The run folder, with ``metrics.csv`` and ``config.yaml``.
        facts: What ``metrics.json`` holds.

    Returns:
        Names of what was written.
    """
    title = f"Run {folder.name} of {folder.parent.name}" if folder.name.isdecimal() else f"Run {folder.name}"
    report = Report(title).section("Command").code(facts["command"])
    report.section("Final numbers").table(_numbers(facts), ("metric", "validation", "test")).text(_choice(facts))
    written = ["report.html"]
    figure = draw_curves(read_curves(folder / "metrics.csv"))
    if figure is not None:
        (folder / "figures").mkdir(exist_ok=True)
        figure.savefig(folder / "figures" / "curves.png", dpi=110)
        report.section("Curves").figure(figure, "Metrics by optimizer step.")
        written.insert(0, "figures/")
    if (folder / "confusion.csv").is_file():
        figure = draw_confusion(folder / "confusion.csv")
        (folder / "figures").mkdir(exist_ok=True)
        figure.savefig(folder / "figures" / "confusion.png", dpi=110)
        report.section("Confusion").figure(figure, "Test items by true class (rows) and predicted class (columns).")
        written = list(dict.fromkeys(["figures/", *written]))
    if (folder / INITIAL).is_file():
        report.section("Initial weights").code((folder / INITIAL).read_text(encoding="utf-8"))
    report.section("Environment").facts(_environment())
    report.section("Configuration").code((folder / "config.yaml").read_text(encoding="utf-8"))
    report.write(folder / "report.html")
    return written


def _numbers(facts: dict[str, Any]) -> list[list[Any]]:
    names = dict.fromkeys(n.partition("/")[2] for split in ("validation", "test") for n in facts[split])
    return [[name, facts["validation"].get(f"val/{name}"), facts["test"].get(f"test/{name}")] for name in names]


def _choice(facts: dict[str, Any]) -> str:
    best = facts["best"]
    chosen = f"{facts['monitor']} was best at step {best['step']}, epoch {best['epoch']}" if best else "the last state"
    return (
        f"Of {facts['checkpoint']}: {chosen}; {facts['steps']} steps in {facts['epochs']} epochs, seed {facts['seed']}."
    )


def _environment() -> dict[str, str]:
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "vertebra": __version__,
        "torch": str(torch.__version__),
        "lightning": version("lightning"),
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": ", ".join(devices) or f"cpu, {torch.get_num_threads()} threads",
    }


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Return ``{metric: [(step, value), ...]}`` of a ``metrics.csv``."""
    curves: dict[str, list[tuple[int, float]]] = {}
    if path.is_file():
        with path.open(newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                for name, text in row.items():
                    if text and name not in ("epoch", "step") and math.isfinite(value := float(text)):
                        curves.setdefault(name, []).append((int(row["step"]), value))
    return curves


def draw_curves(curves: dict[str, list[tuple[int, float]]]) -> Any:
    """Draw one panel for each metric, the same metric of several splits in one.

    Args:
        curves: As ``read_curves`` returns them.

    Returns:
        The figure, or None where nothing was logged during the training.
    """
    panels: dict[str, list[str]] = {}
    for name in curves:
        split, _, metric = name.partition("/")
        if split in ("train", "val"):
            panels.setdefault(metric, []).append(name)
        elif not metric:
            panels.setdefault(name, []).append(name)
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = new_figure(rows, columns, width=3.6 * columns, height=2.5 * rows)
    for place, (metric, names) in zip(axes, panels.items(), strict=False):
        for color, name in zip(PALETTE, sorted(names), strict=False):
            steps, values = zip(*curves[name], strict=True)
            marker = "o" if len(steps) < 20 else ""
            place.plot(steps, values, color=color, marker=marker, markersize=3, linewidth=1.3, label=name)
        place.set_title(metric, fontsize=10, loc="left")
        place.set_xlabel("step", fontsize=9)
        if len(names) > 1:
            place.legend(fontsize=8, frameon=False)
    for place in axes[len(panels) :]:
        place.set_visible(False)
    return figure


def draw_confusion(path: Path) -> Any:
    """Draw the table of true and predicted classes that a task wrote, coloured by the share of the true class."""
    with path.open(newline="", encoding="utf-8") as f:
        header, *rows = csv.reader(f)
    return confusion(np.array([[int(v) for v in row[1:]] for row in rows]), header[1:])
