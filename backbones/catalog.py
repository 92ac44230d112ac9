"""What backbones and bundled models exist, read without torch.

Presets are functions in the families' files; their metadata is read from the source by ``ast``, so that there is
one place to write them and ``vertebra list`` stays fast.
"""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent
ADAPTERS = ("timm",)
"""Families without presets: whole models of other libraries."""


@dataclass(frozen=True)
class PresetInfo:
    """One preset.

    Args:
        name: Name for the command line.
        family: File in ``backbones/`` that holds it.
        summary: First line of its docstring.
        params: Number of parameters.
        fields: The config's fields that the preset sets.
    """

    name: str
    family: str
    summary: str
    params: int
    fields: dict[str, Any] = field(default_factory=dict)


def families() -> list[str]:
    """Names of the backbone families: the files of this folder that hold presets."""
    return sorted({info.family for info in presets().values()})


@functools.cache
def presets() -> dict[str, PresetInfo]:
    """All presets by name, in the order of their files."""
    found = {}
    for file in sorted(_HERE.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and (params := _preset_params(node)) is not None:
                summary = (ast.get_docstring(node) or "").partition("\n")[0]
                found[node.name] = PresetInfo(node.name, file.stem, summary, params, _returned_fields(node))
    return found


def _preset_params(node: ast.FunctionDef) -> int | None:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "preset":
            return next(int(ast.literal_eval(k.value)) for k in decorator.keywords if k.arg == "params")
    return None


def _returned_fields(node: ast.FunctionDef) -> dict[str, Any]:
    for statement in node.body:
        if isinstance(statement, ast.Return) and isinstance(statement.value, ast.Call):
            return {k.arg: ast.literal_eval(k.value) for k in statement.value.keywords if k.arg is not None}
    return {}


def bundled_models() -> dict[str, Path]:
    """Model directories that ship with the package, by name."""
    import vertebra

    root = Path(vertebra.__file__).parent / "models"
    return {p.name: p for p in sorted(root.iterdir()) if (p / "config.json").is_file()} if root.is_dir() else {}
