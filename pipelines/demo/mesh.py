"""Meshes: clean ones for scans and clouds; then meshes to tokens and back."""

from __future__ import annotations

import json
from typing import Any

from vertebra.pipelines.demo.base import Demo

TURNED = 2
"""Shapes in views to turn."""


def show(demo: Demo) -> None:
    """Run the pipelines of the domain and show what they write."""
    samples, results, report = demo.samples, demo.results, demo.report
    report.section("mesh/generate: scans and clouds of points")
    scans = demo.run("mesh/generate", [samples / "clouds", samples / "scans"], "meshes.json")
    report.text("These shapes have parameters that training never saw; meshes.json.html has all of them to turn.")
    made = json.loads(scans.read_text(encoding="utf-8"))["meshes"]
    for facts in made[:TURNED]:
        report.html(_view(demo, facts))
    report.image(results / "meshes.json.png", "Inputs and the meshes that were written for them.")
    names = ("faces", "input_faces", "chamfer", "watertight", "self_intersection_share")
    rows = [(facts["name"], *(facts.get(name) for name in names)) for facts in made]
    report.table(rows, ("shape", "faces", "faces of the input", "Chamfer", "watertight", "self-intersecting"))

    report.section("mesh/tokenize")
    tokens = demo.run("mesh/tokenize", [samples / "shapes"], "tokens.npz")
    demo.run("mesh/tokenize", [tokens], "back.json")
    facts = json.loads(tokens.with_name("tokens.npz.json").read_text(encoding="utf-8"))
    report.facts({"meshes": len(facts["meshes"]), "tokens": facts["tokens"], "of nine a face": facts["ratio"]})

    report.section("mesh/generate: damaged files")
    damaged = demo.run("mesh/generate", [samples / "damaged"], "damaged.json", "--candidates 1")
    demo.damaged(damaged.with_name("damaged.json.errors.jsonl"), "damaged files are listed")


def _view(demo: Demo, facts: dict[str, Any]) -> str:
    """The input, the mesh that was made for it, and the truth, to turn together."""
    from vertebra.domains.mesh.files import read_mesh, read_shape
    from vertebra.pipelines.mesh import input_panel
    from vertebra.pipelines.mesh_figures import Panel
    from vertebra.pipelines.mesh_viewer import viewer

    truth = next((demo.samples / "truth").glob(f"{facts['name']}.*"))
    meshes = ((read_mesh(demo.results / facts["file"]), "output"), (read_mesh(truth), "truth"))
    panels = [Panel(mesh.vertices, mesh.faces, label) for mesh, label in meshes]
    return viewer(facts["name"], [input_panel(read_shape(facts["input"]), light=True), *panels])
