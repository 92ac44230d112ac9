"""``vertebra list``: backbones, bundled models, recipes and pipelines, without torch."""

from __future__ import annotations

import fnmatch
import json
from typing import Any

from vertebra.backbones.catalog import bundled_models, presets
from vertebra.cli.headers import context_of, licence_of, read_model_config, tensors_info
from vertebra.cli.parsing import Parser
from vertebra.cli.recipes import recipe_header, recipes
from vertebra.cli.tables import print_table, short_number
from vertebra.errors import ConfigError
from vertebra.pipelines.catalog import pipelines

KINDS = ("backbones", "models", "recipes", "pipelines")
_COLUMNS = {
    "backbones": ("name", "family", "params", "dim", "depth", "causal", "summary"),
    "models": ("name", "task", "family", "params", "size", "context", "licence", "metrics"),
    "recipes": ("name", "summary"),
    "pipelines": ("name", "inputs", "outputs", "model", "summary"),
}

_MOST_METRICS = 3


def run(verb: str, args: list[str]) -> int:
    """Print what there is."""
    parser = Parser(verb, "List backbones (presets), bundled models, recipes and pipelines.")
    parser.add_argument("words", nargs="*", metavar="KIND|PATTERN", help=f"one of {', '.join(KINDS)}; and a pattern")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(args)
    words = list(options.words)
    kinds = (words.pop(0),) if words and words[0] in KINDS else KINDS
    if len(words) > 1:
        raise ConfigError(f"list: at most one of {', '.join(KINDS)} and one pattern, got {' '.join(options.words)!r}.")
    pattern = words[0] if words else "*"
    found = {kind: [row for row in entries(kind) if _fits(row["name"], pattern)] for kind in kinds}
    if options.json:
        print(json.dumps(found if len(kinds) > 1 else found[kinds[0]], indent=2))
        return 0
    if not any(found.values()) and words:
        raise ConfigError(f"list: nothing among the {' and '.join(kinds)} is called like {pattern!r}.")
    for number, (kind, rows) in enumerate((k, r) for k, r in found.items() if r or len(kinds) == 1):
        if number:
            print()
        print_table(kind, _COLUMNS[kind], [[_cell(k, row.get(k)) for k in _COLUMNS[kind]] for row in rows])
    return 0


def entries(kind: str) -> list[dict[str, Any]]:
    """Return one JSON-able dict for each thing of a kind."""
    if kind == "backbones":
        return [
            {
                "name": p.name,
                "family": p.family,
                "params": p.params,
                "dim": p.fields.get("dim"),
                "depth": p.fields.get("depth"),
                "causal": p.fields.get("causal", True),
                "summary": p.summary,
            }
            for p in presets().values()
        ]
    if kind == "models":
        return [_model_entry(name) for name in bundled_models()]
    if kind == "recipes":
        return [{"name": n, "summary": " ".join(recipe_header(p)[:1]), "path": str(p)} for n, p in recipes().items()]
    return [
        {"name": p.name, "inputs": p.inputs, "outputs": p.outputs, "model": p.model, "summary": p.summary}
        for p in pipelines().values()
    ]


def _model_entry(name: str) -> dict[str, Any]:
    folder = bundled_models()[name]
    config = read_model_config(folder)
    tensors = tensors_info(folder / "model.safetensors")
    return {
        "name": name,
        "task": config.get("task", ""),
        "family": config.get("backbone", {}).get("family", ""),
        "params": tensors.params,
        "size": f"{tensors.nbytes / 1e6:.1f} MB",
        "context": context_of(config.get("spec", {})),
        "licence": licence_of(folder / "README.md"),
        "metrics": _best_known(config.get("metrics", {})),
        "path": str(folder),
    }


def _best_known(metrics: dict[str, float]) -> dict[str, float]:
    """Return a few metrics, of the test if there was one; loss, and what has the data's units, for want of others."""
    tested = {k: v for k, v in metrics.items() if k.startswith("test/")} or metrics
    units = ("loss", "mse", "mae", "naive_mse", "naive_mae")
    told = {k: v for k, v in tested.items() if k.partition("/")[2] not in units} or tested
    return dict(list(told.items())[:_MOST_METRICS])


def _fits(name: str, pattern: str) -> bool:
    return fnmatch.fnmatch(name, pattern if any(c in pattern for c in "*?[") else f"*{pattern}*")


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if column == "params":
        return short_number(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in value.items())
    return str(value)
