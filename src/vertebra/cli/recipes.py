"""Packaged recipes, found and described without torch."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from vertebra.errors import UnknownNameError


def recipes() -> dict[str, Path]:
    """All packaged recipes: name ``domain/name`` to YAML file."""
    root = Path(str(files("vertebra"))) / "configs"
    return {p.relative_to(root).with_suffix("").as_posix(): p for p in sorted(root.glob("*/*.yaml"))}


def recipe_path(name: str) -> Path:
    """Return the file of a recipe.

    Raises:
        UnknownNameError: There is none of that name; the text names the nearest.
    """
    known = recipes()
    if name not in known:
        raise UnknownNameError("recipe", name, known)
    return known[name]


def recipe_header(path: Path) -> list[str]:
    """Lines of the comment a recipe begins with: what it does, how long it takes, the command."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines
