"""Which classes a checkpoint may name: those of vertebra, a few of its libraries, and what the user named himself.

A checkpoint, and the ``config.yaml`` of the run around it, may be anybody's, and to import a module is to run it. So
each class that they name is looked at before: first those that stand under ``class_path``, for an error that says what
to do; then, by the parser's own policy, whatever it takes for a name (a string, a string of JSON, another file).
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from vertebra.cli.invocation import Invocation
from vertebra.errors import LoadError, printable

OURS = ("vertebra.domains", "vertebra.backbones", "vertebra.tokenizers", "vertebra.cli.scaling_measure")
_PARTS = ("callbacks", "loggers", "profilers", "strategies", "plugins", "accelerators")
LIBRARIES = (
    *(f"{top}.{part}" for top in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning") for part in _PARTS),
    "torch.optim",
)
"""What settings of a trainer, or of an optimizer, legitimately hold."""

_BY_FULL_NAME = {"vertebra", "lightning", "pytorch_lightning", "lightning_fabric", "torch", "builtins"}
_SHORTHANDS = ("callbacks", "logger", "strategy", "plugins", "profiler", "accelerator")
_MOST_VALUES = 100_000  # of the settings of a run, copies counted
_DEEPEST = 100


def allowed_names(call: Invocation) -> frozenset[str]:
    """Return the packages, modules and classes that a checkpoint of this call may name.

    Of what was typed, or stands in the recipe or a ``-c`` file, the whole package counts; of the standard library and
    of the libraries that everything is made of, no more than what was named.
    """
    found = {*OURS, *LIBRARIES}
    for name in _typed_names(call):
        top = name.partition(".")[0]
        if top != "jsonargparse":  # which refuses to be named
            found.add(name if top in _BY_FULL_NAME or top in sys.stdlib_module_names else top)
    return frozenset(found)


def is_allowed(name: str, allowed: Collection[str]) -> bool:
    """Whether a class path is one of these names, or lies in one of them."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in allowed for count in range(1, len(parts) + 1))


def check_names(call: Invocation, layer: Mapping[str, Any], sources: Mapping[str, Path]) -> None:
    """Refuse settings that name a class which the user does not know of.

    Args:
        call: What was typed.
        layer: Settings by section: ``model``, ``data``, ``trainer``.
        sources: The file that each section is from.

    Raises:
        LoadError: A class is not allowed, or is no class path; or there are far too many values.
    """
    allowed, budget = allowed_names(call), [_MOST_VALUES]
    refused: dict[str, str] = {}
    first = ""
    for section, values in layer.items():
        source = sources[section]
        for place, name in _named(values, section, source, budget):
            if not _is_path(name):
                raise LoadError(f"{source}: a class must be named as PACKAGE.MODULE.CLASS, got {_brief(name)}.")
            if not is_allowed(name, allowed):
                first = first or f"{source} names the class {_brief(name)}"
                way = f"--{place} {name}" if place in ("model", "data") else f"in a file, with -c FILE ({_brief(name)})"
                refused.setdefault(name.partition(".")[0], way)
    if refused:
        raise LoadError(
            f"{first}, which is neither of vertebra nor named by you, so it was not imported. If you trust it, name it "
            f"yourself: {' '.join(refused.values())}"
        )


@contextmanager
def imports_of(call: Invocation) -> Iterator[None]:
    """Let the parser import nothing but what a checkpoint may name, where there is one."""
    if call.checkpoint is None:
        yield
        return
    import jsonargparse._common as common
    from jsonargparse import set_parsing_settings

    before = dict(getattr(common, "parsing_settings", {}))  # there is no public way back to what was
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=sorted(allowed_names(call)))
    try:
        yield
    finally:
        getattr(common, "parsing_settings", {}).update(before)


def denied_name(text: str) -> str | None:
    """Say, for the parser's text that a name is not allowed, what to do; None for other texts."""
    found = re.search(r"Importing '([\w.]{1,300})' is not allowed", text)
    if found is None:
        return None
    return (
        f"the checkpoint, or a file that it leads to, names {found[1]!r}, which is neither of vertebra nor named by "
        "you, so it was not imported. If you trust it, name it yourself, in a file given with -c."
    )


def _typed_names(call: Invocation) -> Iterator[str]:
    for _, document in call.documents():
        yield from _names_in(document)
    for word in call.rest:
        value = word.partition("=")[2] if word.startswith("-") else word
        try:
            yield from _names_in(yaml.safe_load(value))
        except yaml.YAMLError:
            continue
    yield from _short_names(call)


def _names_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from _names_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _names_in(inner)
    elif _is_path(value) and not Path(value).exists():
        yield value


def _short_names(call: Invocation) -> Iterator[str]:
    """Yield the full names of imported tasks and data modules that were named by their class alone."""
    from lightning.pytorch import LightningDataModule, LightningModule

    from vertebra.cli.layers import class_names

    asked = {name for section, name in class_names(call) if section in ("model", "data") and name and "." not in name}
    todo: list[type] = [LightningModule, LightningDataModule] if asked else []
    while todo:
        below: list[type] = todo.pop().__subclasses__()
        todo += below
        yield from (f"{cls.__module__}.{cls.__qualname__}" for cls in below if cls.__name__ in asked)


def _named(value: Any, place: str, source: Path, budget: list[int], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield (place, class path) for everything that is named as a class in settings."""
    budget[0] -= 1
    if budget[0] < 0 or depth > _DEEPEST:
        raise LoadError(f"{source}: holds more settings than a run has; it is damaged, or made to mislead.")
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield place, value["class_path"]
        for key, inner in value.items():
            where = f"{place}.{key}"
            if place == "trainer" and key in _SHORTHANDS:
                for one in inner if isinstance(inner, list | tuple) else (inner,):
                    if _is_path(one):
                        yield where, one
            yield from _named(inner, where, source, budget, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _named(inner, f"{place}[]", source, budget, depth + 1)


def _is_path(name: object) -> bool:
    return isinstance(name, str) and "." in name and all(part.isidentifier() for part in name.split("."))


def _brief(value: object) -> str:
    text = printable(repr(value))
    return text if len(text) <= 120 else text[:117] + "..."
