"""What pipelines exist, read without torch.

A pipeline is a class marked by ``@verb("domain/verb", ...)``; name, inputs, outputs and default model are the literals
of that call and the summary is the first line of the class's docstring. They are read from the source by ``ast``, so
that there is one place to write them and ``vertebra list`` stays fast.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from vertebra.errors import UnknownNameError

T = TypeVar("T", bound=type)

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PipelineInfo:
    """One pipeline.

    Args:
        name: Name for the command line, ``domain/verb``.
        summary: First line of the docstring of its class.
        inputs: What files it reads, for people.
        outputs: What files it writes, for people.
        model: Name of the bundled model it uses when none is given; empty when there is none.
        tasks: Tasks of the models it can use; empty for all.
        needs_input: Whether a run needs at least one input file.
        needs_model: Whether it cannot do without a model.
        module: Module that holds the class.
        class_name: Name of the class.
    """

    name: str
    summary: str
    inputs: str
    outputs: str
    model: str
    tasks: tuple[str, ...]
    module: str
    class_name: str
    needs_input: bool = True
    needs_model: bool = True

    @property
    def domain(self) -> str:
        """The part of the name before the slash."""
        return self.name.partition("/")[0]


def verb(
    name: str,
    *,
    inputs: str,
    outputs: str,
    model: str = "",
    tasks: tuple[str, ...] = (),
    needs_input: bool = True,
    needs_model: bool = True,
) -> Callable[[T], T]:
    """Mark a subclass of ``Pipeline`` as the pipeline ``name``; all arguments must be literals.

    Args:
        name: ``domain/verb``.
        inputs: What files it reads, for people.
        outputs: What files it writes, for people.
        model: Name of the bundled model it uses when none is given.
        tasks: Tasks of the models it can use; empty for all.
        needs_input: Whether a run needs at least one input file.
        needs_model: Whether it cannot do without a model.
    """

    def register(cls: T) -> T:
        setattr(cls, "name", name)  # noqa: B010 - `type` has no such attribute for the type checker
        setattr(cls, "default_model", model)  # noqa: B010
        setattr(cls, "tasks", tasks)  # noqa: B010
        setattr(cls, "needs_input", needs_input)  # noqa: B010
        setattr(cls, "needs_model", needs_model)  # noqa: B010
        return cls

    return register


@functools.cache
def pipelines() -> dict[str, PipelineInfo]:
    """All pipelines by name, sorted."""
    found = {}
    for file in sorted(_HERE.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and (fields := _verb_fields(node)) is not None:
                summary = (ast.get_docstring(node) or "").partition("\n")[0].removesuffix(".")
                info = PipelineInfo(
                    summary=summary, module=f"vertebra.pipelines.{file.stem}", class_name=node.name, **fields
                )
                found[info.name] = info
    return dict(sorted(found.items()))


def pipeline_info(name: str) -> PipelineInfo:
    """Return the pipeline of that name.

    Raises:
        UnknownNameError: There is none; the text names the nearest.
    """
    known = pipelines()
    if name not in known:
        raise UnknownNameError("pipeline", name, known)
    return known[name]


def domains() -> list[str]:
    """Names of the domains that have a pipeline."""
    return sorted({info.domain for info in pipelines().values()})


def _verb_fields(node: ast.ClassDef) -> dict[str, Any] | None:
    for decorator in node.decorator_list:
        if isinstance(decorator, ast.Call) and isinstance(decorator.func, ast.Name) and decorator.func.id == "verb":
            given = {k.arg: ast.literal_eval(k.value) for k in decorator.keywords if k.arg is not None}
            return {"model": "", "tasks": (), "name": ast.literal_eval(decorator.args[0]), **given}
    return None
