"""Figures and ``report.html`` of a run folder, from the files in it."""

from __future__ import annotations

import csv
import math
import platform
from html import escape
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from vertebra import __version__
from vertebra.cli.runs import whole_text
from vertebra.pipelines.figures import PALETTE, data_uri, new_figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { text-align: left; padding: .2rem 1.2rem .2rem 0; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; } img { max-width: 100%; }
"""


def write_report(folder: Path, facts: dict[str, Any]) -> list[str]:
    """Draw the curves of ``metrics.csv`` and write ``report.html``, one file that shows in any browser.

    Args:
        folder: The run folder, with ``metrics.csv`` and ``config.yaml``.
        facts: What ``metrics.json`` holds.

    Returns:
        Names of what was written.
    """
    figure = draw_curves(read_curves(folder / "metrics.csv"))
    written = ["report.html"]
    sections = [("Command", _code(facts["command"])), ("Final numbers", _numbers(facts))]
    if figure is not None:
        (folder / "figures").mkdir(exist_ok=True)
        figure.savefig(folder / "figures" / "curves.png", dpi=110)
        sections.append(("Curves", f'<img alt="metrics by step" src="{data_uri(figure)}">'))
        written.insert(0, "figures/")
    sections += [
        ("Environment", _rows(_environment())),
        ("Configuration", _code((folder / "config.yaml").read_text(encoding="utf-8"))),
    ]
    title = f"Run {folder.name} of {folder.parent.name}" if folder.name.isdecimal() else f"Run {folder.name}"
    body = "\n".join(f"<h2>{name}</h2>\n{content}" for name, content in sections)
    page = f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
    page += f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    whole_text(folder / "report.html", page)
    return written


def _numbers(facts: dict[str, Any]) -> str:
    names = dict.fromkeys(n.partition("/")[2] for split in ("validation", "test") for n in facts[split])
    lines = ["<table><tr><th>metric</th><th>validation</th><th>test</th></tr>"]
    for name in names:
        values = (facts["validation"].get(f"val/{name}"), facts["test"].get(f"test/{name}"))
        cells = "".join(f'<td class="number">{"" if v is None else format(v, ".4g")}</td>' for v in values)
        lines.append(f"<tr><td>{escape(name)}</td>{cells}</tr>")
    best = facts["best"]
    chosen = f"{facts['monitor']} was best at step {best['step']}, epoch {best['epoch']}" if best else "the last state"
    note = (
        f"Of {facts['checkpoint']}: {chosen}; {facts['steps']} steps in {facts['epochs']} epochs, seed {facts['seed']}."
    )
    return "\n".join([*lines, "</table>", f"<p>{escape(note)}</p>"])


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


def _rows(values: dict[str, str]) -> str:
    return (
        "<table>"
        + "".join(f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in values.items())
        + "</table>"
    )


def _code(text: str) -> str:
    return f"<pre>{escape(text.strip())}</pre>"


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
