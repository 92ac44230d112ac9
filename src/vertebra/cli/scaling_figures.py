"""Points, laws, figures and the report of a scaling study, from the results in its folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.cli.runs import whole_text
from vertebra.cli.scaling_grid import read_study, results
from vertebra.domains.laws import (
    Bootstrap,
    Floats,
    PowerLaw,
    bootstrap,
    compute_of_step,
    envelope,
    fit_power_law,
    pf_days,
)
from vertebra.errors import ConfigError, VertebraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AXES = {"params": "parameters N", "data": "training items D", "compute": "compute C, PF-days"}
SYMBOLS = {"params": "N", "data": "D", "compute": "C"}
FEWEST = 3
"""Points of different x with which a law is fitted: two always lie on a line."""


@dataclass(frozen=True)
class Fit:
    """What was fitted, or why not.

    Args:
        axis: ``params``, ``data`` or ``compute``.
        split: ``validation``, ``test`` or a name of other data.
        form: ``power`` or ``power+floor``.
        x: Of the points (N,).
        loss: Of the points (N,).
        law: The law; None where there is none.
        spread: Its resampled draws; None with a floor.
        note: Why there is no law; empty where there is.
    """

    axis: str
    split: str
    form: str
    x: Floats
    loss: Floats
    law: PowerLaw | None = None
    spread: Bootstrap | None = None
    note: str = ""


def write_report(folder: Path, metric: str, shift: float = 0.0) -> tuple[list[str], list[str]]:
    """Fit what can be fitted and write it.

    Args:
        folder: Of the study.
        metric: What is fitted, lower is better.
        shift: Added to it before.

    Returns:
        Names of what was written, and what there is to say.

    Raises:
        ConfigError: No cell is finished, or none has such a metric.
    """
    found = results(folder)
    if not found:
        raise ConfigError(f"scaling: no cell in {folder} is finished, so there is nothing to report.")
    splits = [s for s in dict.fromkeys(k for r in found for k in r["numbers"]) if _has(found, s, metric)]
    if not splits:
        known = sorted({name for r in found for values in r["numbers"].values() for name in values})
        raise ConfigError(f"scaling: --metric {metric}: no run has it; there are {', '.join(known) or 'none'}.")
    identity = "test" if "test" in splits else "validation"
    hull = {s: _hull(found, s, metric, shift) for s in splits}
    fits = [
        fit
        for split in splits
        for axis in AXES
        for fit in _fits(axis, split, *_points(found, axis, split, metric, shift, hull[split]))
    ]
    _write_csv(folder / "points.csv", *_point_rows(found, splits, metric))
    _write_csv(folder / "laws.csv", _LAW_HEADER, [_law_row(f) for f in fits])
    hull_rows = [[s, c, loss] for s, points in hull.items() for c, loss in zip(*points, strict=True)]
    _write_csv(folder / "envelope.csv", ["split", "compute_pf_days", metric], hull_rows)
    (folder / "figures").mkdir(exist_ok=True)
    figures = {axis: draw(axis, fits, found, metric, shift) for axis in AXES}
    for axis, figure in figures.items():
        figure.savefig(folder / "figures" / f"{axis}.png", dpi=110)
    notes = [_told(f, identity) for f in fits if f.form == "power"]
    _write_html(folder, found, fits, figures, metric, shift, identity)
    return ["points.csv", "laws.csv", "envelope.csv", "figures/", "report.html"], notes


# ---------------------------------------------------------------- points


def _has(found: Sequence[dict[str, Any]], split: str, metric: str) -> bool:
    return any(metric in r["numbers"].get(split, {}) for r in found)


def _points(
    found: Sequence[dict[str, Any]], axis: str, split: str, metric: str, shift: float, hull: tuple[Floats, Floats]
) -> tuple[Floats, Floats]:
    """Points of a law: over N those of the most data, over D those of the largest model, over C the envelope."""
    if axis == "compute":
        return hull
    key, other = ("params", "items") if axis == "params" else ("items", "params")
    have = [r for r in found if metric in r["numbers"].get(split, {})]
    most = max(r[other] for r in have)
    chosen = [r for r in have if r[other] == most]
    x = np.array([r[key] for r in chosen], float)
    return x, np.array([r["numbers"][split][metric] for r in chosen], float) + shift


def run_curve(result: dict[str, Any], split: str, metric: str) -> tuple[Floats, Floats]:
    """Return compute in PF-days and the metric in the course of a run; only its end for data other than validation."""
    step = pf_days(compute_of_step(result["params"], result["tokens"]))
    points = result["curve"].get(metric, []) if split == "validation" else []
    if not points and metric in result["numbers"].get(split, {}):
        points = [[result["steps"], result["numbers"][split][metric]]]
    values = np.array(points, float).reshape(-1, 2)
    return values[:, 0] * step, values[:, 1]


def _hull(found: Sequence[dict[str, Any]], split: str, metric: str, shift: float) -> tuple[Floats, Floats]:
    curves = [run_curve(r, split, metric) for r in found]
    compute, loss = (np.concatenate(parts) for parts in zip(*curves, strict=True))
    loss = loss + shift
    if not len(loss) or (loss <= 0).any():  # said where the law is fitted
        return compute, loss
    return envelope(compute, loss, monotone=True)


def _fits(axis: str, split: str, x: Floats, loss: Floats) -> list[Fit]:
    return [
        _fit(axis, split, "power", x, loss, FEWEST, lambda: fit_power_law(x, loss)),
        _fit(axis, split, "power+floor", x, loss, FEWEST + 2, lambda: fit_power_law(x, loss, offset=True)),
    ]


def _fit(axis: str, split: str, form: str, x: Floats, loss: Floats, fewest: int, make: Callable[[], PowerLaw]) -> Fit:
    if len(set(x.tolist())) < fewest:
        return Fit(
            axis, split, form, x, loss, note=f"needs {fewest} different {SYMBOLS[axis]}, got {len(set(x.tolist()))}"
        )
    try:
        law = make()
        spread = bootstrap(x, loss) if form == "power" else None
    except VertebraError as e:
        return Fit(axis, split, form, x, loss, note=str(e).partition(": ")[2])
    return Fit(axis, split, form, x, loss, law, spread)


def _told(fit: Fit, identity: str) -> str:
    name = f"{fit.split}{' (ID)' if fit.split == identity else ''}"
    if fit.law is None or fit.spread is None:
        return f"{name} over {SYMBOLS[fit.axis]}: no law; {fit.note}"
    low, high = fit.spread.exponent
    return (
        f"{name} over {SYMBOLS[fit.axis]}: ({fit.law.critical:.3g} / {SYMBOLS[fit.axis]})^{fit.law.exponent:.4f} "
        f"[{low:.4f}, {high:.4f}], r2 {fit.law.r2:.3f}, {fit.law.points} points"
    )


# ---------------------------------------------------------------- tables

_LAW_HEADER = [
    "axis", "split", "form", "exponent", "exponent_low", "exponent_high", "critical", "critical_low", "critical_high",
    "floor", "r2", "points", "note",
]  # fmt: skip


def _law_row(fit: Fit) -> list[Any]:
    head: list[Any] = [fit.axis, fit.split, fit.form]
    if fit.law is None:
        return [*head, *[""] * 8, len(fit.x), fit.note]
    low, high = fit.spread.exponent if fit.spread else ("", "")
    first, last = fit.spread.critical if fit.spread else ("", "")
    law = fit.law
    return [*head, law.exponent, low, high, law.critical, first, last, law.floor, law.r2, law.points, ""]


def _point_rows(found: Sequence[dict[str, Any]], splits: Sequence[str], metric: str) -> tuple[list[str], list[Any]]:
    keys = ["name", "size", "seed", "params", "params_all", "items", "steps", "tokens"]
    rows = [
        [*(r[k] for k in keys), pf_days(r["compute"]), *(r["numbers"].get(s, {}).get(metric, "") for s in splits)]
        for r in found
    ]
    return [*keys, "compute_pf_days", *(f"{s}_{metric}" for s in splits)], sorted(rows, key=lambda r: (r[3], r[5]))


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[f"{v:.8g}" if isinstance(v, float) else v for v in row] for row in rows])
    whole_text(path, text.getvalue())


# ---------------------------------------------------------------- figures


def draw(axis: str, fits: Sequence[Fit], found: Sequence[dict[str, Any]], metric: str, shift: float) -> Figure:
    """Draw the points and laws of one axis, both logarithmic where the values allow it.

    Args:
        axis: ``params``, ``data`` or ``compute``.
        fits: Of all axes.
        found: Results, whose curves are drawn in grey over compute.
        metric: Name of the loss.
        shift: What was added to it.
    """
    from vertebra.pipelines.figures import MUTED, PALETTE, new_figure

    figure, (axes,) = new_figure(width=6.5, height=4.2)
    here = [f for f in fits if f.axis == axis and f.form == "power" and len(f.x)]
    if axis == "compute":
        for result in found:
            compute, loss = run_curve(result, "validation", metric)
            if len(loss):
                axes.plot(compute, loss + shift, color=MUTED, linewidth=0.7, alpha=0.5, zorder=1)
    for color, fit in zip(PALETTE * (1 + len(here) // len(PALETTE)), here, strict=False):
        label = fit.split
        if fit.law is not None and fit.spread is not None:
            low, high = fit.spread.exponent
            label += f": exponent {fit.law.exponent:.3f} [{low:.3f}, {high:.3f}]"
            grid = np.logspace(np.log10(fit.x.min()), np.log10(fit.x.max()), 50)
            axes.plot(grid, fit.law(grid), color=color, linewidth=1.4)
            axes.fill_between(grid, *fit.spread.band(grid), color=color, alpha=0.15, linewidth=0)
        axes.plot(fit.x, fit.loss, "o", color=color, markersize=4, label=label)
    axes.set_xscale("log")
    if all((f.loss > 0).all() for f in here):
        axes.set_yscale("log")
        losses = np.concatenate([f.loss for f in here]) if here else np.ones(1)
        axes.yaxis.set_major_formatter("{x:.3g}")
        if losses.max() < 8 * losses.min():  # powers of ten alone would leave the axis without numbers
            axes.yaxis.set_minor_formatter("{x:.3g}")
    axes.set_xlabel(AXES[axis])
    axes.set_ylabel(metric if not shift else f"{metric} + {shift:g}")
    if here:
        axes.legend(fontsize=8, frameon=False)
    return figure


def _write_html(
    folder: Path,
    found: Sequence[dict[str, Any]],
    fits: Sequence[Fit],
    figures: dict[str, Figure],
    metric: str,
    shift: float,
    identity: str,
) -> None:
    from vertebra import __version__
    from vertebra.pipelines.report import Report

    study = read_study(folder)
    report = Report(f"Scaling of {study.recipe or 'a study'}")
    monitors = (
        ", ".join(sorted({str(r["monitor"]) for r in found if r["monitor"]})) or "nothing, so the last one counts"
    )
    report.text(
        f"{len(found)} runs; {metric} at the best checkpoint of each by {monitors}. In-distribution numbers (ID) are "
        f"of the {identity} split{'' if identity == 'test' else ', since there is no other'}."
        f"{f' {shift:g} was added to {metric} before the fits.' if shift else ''}"
    )
    report.text(
        "Laws over N use the most data, over D the largest model, over C the lower envelope of all runs, in which more "
        "compute gives a lower loss: of their curves in validation, elsewhere of their ends. Intervals hold 95 percent "
        "of 1,000 resamplings of the points."
    )
    report.section("Laws").table([_law_row(f) for f in fits], _LAW_HEADER)
    for axis, figure in figures.items():
        report.section(f"{metric} over {AXES[axis]}").figure(figure, f"{metric} over {AXES[axis]}")
    header, rows = _point_rows(found, list(dict.fromkeys(f.split for f in fits)), metric)
    report.section("Runs").table(rows, header)
    facts = {
        "recipe": study.recipe or "",
        "options": " ".join(study.words),
        "budget of a run": study.budget,
        "other data": "; ".join(f"{k}: {' '.join(v)}" for k, v in study.ood.items()),
        "vertebra": __version__,
    }
    report.section("Settings").facts(facts).write(folder / "report.html")
