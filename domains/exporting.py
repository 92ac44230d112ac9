"""Models as programs that run without this package: ``torch.export`` archives and ONNX, checked against the model.

A domain says in its ``exporting.py`` what of its models is a program: modules that map tensors to tensors, what their
axes mean, and what must be known to use them (``Exports``). Here they are traced once for all sizes, written, read back
and compared. A ``forward`` is one pass; causal models that write also have a ``step``, which takes the state as tensors
and returns the next one, and a ``begin`` where something stands before the first token.

Shapes are written with names of axes, ``("batch", "length")``.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from vertebra import __version__
from vertebra.backbones.base import Backbone
from vertebra.domains.model import DomainModel
from vertebra.domains.saving import model_config
from vertebra.errors import ConfigError, MissingExtraError

FORMAT = 1
"""Of the JSON file."""
TOLERANCE = 1e-4
"""Largest difference from the model, of an output whose largest number is 1 or less; else relative to that number."""
LONGEST = 4096
"""Positions of one call of a model whose context nobody stated: attention, and exported Mamba-2, are quadratic in
them."""
MOST_ITEMS = 4096
PROTOBUF_BYTES = 2**31 - 2**20
"""What fits into one file of ONNX."""
KINDS = {".pt2": "pt2", ".onnx": "onnx"}


@dataclass(frozen=True)
class Axis:
    """An axis whose size is free.

    Args:
        low: Smallest size.
        high: Largest.
        sizes: Some of them: the first is traced, all are compared.
    """

    low: int
    high: int
    sizes: tuple[int, ...]


BATCH = Axis(1, MOST_ITEMS, (2, 1, 3))


@dataclass(frozen=True)
class Port:
    """A tensor that goes in.

    Args:
        name: Its name.
        shape: Sizes, and names of axes.
        about: What it holds.
    """

    name: str
    shape: tuple[int | str, ...]
    about: str


@dataclass(frozen=True, kw_only=True)
class ExportForm:
    """One program.

    Args:
        about: What it does.
        module: Maps the inputs, by place, to a tensor or a tuple of them.
        inputs: What goes in.
        outputs: Names of what comes out, and what it holds.
        axes: The free ones, by name.
        draw: Makes inputs of given sizes, as they come in use.
        state: For each output that is a state, the input of the next call that it becomes.
    """

    about: str
    module: nn.Module
    inputs: tuple[Port, ...]
    outputs: Mapping[str, str]
    axes: Mapping[str, Axis]
    draw: Callable[[Mapping[str, int], torch.Generator], tuple[Tensor, ...]]
    state: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Exports:
    """What a model is as programs.

    Args:
        forms: By name: ``forward``, and ``step`` and ``begin`` where they were asked for.
        facts: What must be known to make inputs and read outputs; JSON-able.
    """

    forms: Mapping[str, ExportForm]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Written:
    """What became of one form.

    Args:
        form: Its name.
        path: Its file.
        seconds: How long it took, the comparison included.
        difference: Largest difference of any output from the model's.
        sizes: What was compared: sizes of the axes, and the largest difference there.
        facts: What the JSON file says of it.
    """

    form: str
    path: Path
    seconds: float
    difference: float
    sizes: tuple[tuple[Mapping[str, int], float], ...]
    facts: Mapping[str, Any]


# ---------------------------------------------------------------- what domains build forms with


def exports_of(model: DomainModel, *, steps: bool = False, max_length: int | None = None) -> Exports:
    """Ask a model's domain what of it is a program.

    A class outside of this package is asked itself, by a method ``exports(steps, max_length)``; without one, it is
    exported as the class it derives from.

    Args:
        model: In evaluation mode.
        steps: Whether the programs that write token after token are wanted too.
        max_length: Positions that the state of a step keeps; None for what the model was made for.

    Raises:
        ConfigError: The model is no program, or has no step.
    """
    if (own := getattr(model, "exports", None)) is not None:
        found = own(steps, max_length)
        assert isinstance(found, Exports)
        return found
    for cls in type(model).__mro__:
        name = f"{cls.__module__.rpartition('.')[0]}.exporting"
        if cls is not DomainModel and cls.__module__.startswith("vertebra.domains.") and find_spec(name) is not None:
            exports: Exports = import_module(name).exports(model, steps, max_length)
            return exports
    raise ConfigError(
        f"export: {type(model).__name__} says nothing of how it runs outside of Python; give it a method `exports`."
    )


def refuse_step(model: DomainModel, why: str) -> ConfigError:
    """Return the error that a model has no step."""
    return ConfigError(f"export: {type(model).__name__} has no step, {why}; leave --step out.")


def longest(backbone: Backbone, wanted: int | None = LONGEST, before: int = 0) -> int:
    """Return the most positions a backbone can read behind ``before`` others, ``wanted`` where it sets no limit.

    Args:
        backbone: What reads.
        wanted: The model's own context; None where nobody stated one.
        before: Positions that are taken.
    """
    wanted = LONGEST if wanted is None else wanted
    if getattr(backbone.config, "positions", "") == "learned":
        return min(wanted, int(getattr(backbone.config, "max_length")) - before)  # noqa: B009
    return wanted


def lengths(high: int, low: int = 1) -> Axis:
    """Return the axis of a sequence."""
    return Axis(low, high, tuple(min(max(n, low), high) for n in (21, low, 130)))


def draw_ids(shape: Sequence[int], low: int, high: int, generator: torch.Generator) -> Tensor:
    """Draw int64 from ``low`` to ``high`` - 1."""
    return torch.randint(low, high, tuple(shape), generator=generator)


# ---------------------------------------------------------------- writing


def file_kind(path: Path, wanted: str | None = None) -> str:
    """Return ``pt2`` or ``onnx``, by a file's ending.

    Raises:
        ConfigError: It has another one, or not the wanted one.
    """
    kind = KINDS.get(path.suffix)
    if kind is None:
        raise ConfigError(f"export: the file must end in .pt2 or .onnx, got {path.name!r}.")
    if wanted is not None and wanted != kind:
        raise ConfigError(f"export: --format {wanted} writes a file that ends in .{wanted}, got {path.name!r}.")
    return kind


def check_extra() -> None:
    """Refuse to write ONNX without its packages.

    Raises:
        MissingExtraError: One is not installed.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "onnx", "export to .onnx")


def write_form(name: str, form: ExportForm, path: Path, *, opset: int | None = None) -> Written:
    """Write one program and compare it, as it is read back, with the module.

    Args:
        name: Of the form.
        form: What to write.
        path: A new file that ends in ``.pt2`` or ``.onnx``.
        opset: Of ONNX; None for what torch recommends.

    Raises:
        ConfigError: The program is too large, has not the freedom its form says, or differs from the module.
        MissingExtraError: ONNX is wanted, and a package is missing.
    """
    began = time.perf_counter()
    kind = file_kind(path)
    module = form.module.eval().requires_grad_(False)
    with torch.no_grad():
        program = trace(name, form)
        if kind == "pt2":
            with quiet():
                torch.export.save(program, path)
                run: Callable[..., Sequence[Any]] = _reader(torch.export.load(path).module())
            more: dict[str, Any] = {}
        else:
            run, more = _write_onnx(name, form, program, path, opset)
        compared = []
        for number in range(max(len(axis.sizes) for axis in form.axes.values())):
            sizes = {key: axis.sizes[number % len(axis.sizes)] for key, axis in form.axes.items()}
            inputs = form.draw(sizes, torch.Generator().manual_seed(number))
            wanted = as_tuple(module(*(t.clone() for t in inputs)))
            compared.append((sizes, _compare(name, form, wanted, run(*inputs))))
    worst = max(difference for _, difference in compared)
    facts = {"file": path.name, **describe(form, program, kind), **more, "largest_difference": worst}
    return Written(name, path, time.perf_counter() - began, worst, tuple(compared), facts)


def trace(name: str, form: ExportForm) -> ExportedProgram:
    """Trace a form for all sizes of its axes.

    Raises:
        ConfigError: The module would need another program for other sizes.
    """
    sizes = {key: axis.sizes[0] for key, axis in form.axes.items()}
    inputs = form.draw(sizes, torch.Generator().manual_seed(0))
    for port, tensor in zip(form.inputs, inputs, strict=True):
        shape = tuple(sizes.get(s, s) if isinstance(s, str) else s for s in port.shape)
        if tensor.shape != shape:
            raise ConfigError(f"export: {name}.{port.name} must be {shape}, got {tuple(tensor.shape)}.")
    free = {key: Dim(key, min=axis.low, max=axis.high) for key, axis in form.axes.items()}
    shapes = tuple({i: free[s] for i, s in enumerate(port.shape) if isinstance(s, str)} for port in form.inputs)
    with quiet():
        try:
            program = torch.export.export(_Flat(form.module), inputs, dynamic_shapes={"tensors": shapes})
        except torch._dynamo.exc.UserError as e:
            reason = next((line.strip(" -") for line in str(e).splitlines()[1:] if line.strip()), str(e))
            raise ConfigError(f"export: {name} is no program for any {' and '.join(form.axes)}: {reason[:200]}") from e
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # paths of this machine
    return program


def describe(form: ExportForm, program: ExportedProgram, kind: str) -> dict[str, Any]:
    """Return what the JSON file says of a program: its inputs and outputs by place, with shapes, types and ranges.

    A ``.pt2`` refuses sizes out of range; ONNX has no place for ranges, and its program runs whatever it can.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    names = symbols(form, program)

    def facts(node: str) -> dict[str, Any]:
        value = nodes[node].meta["val"]
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": [_size(s, names) for s in value.shape]}

    outputs = zip(form.outputs.items(), program.graph_signature.user_outputs, strict=True)
    inputs = zip(form.inputs, program.graph_signature.user_inputs, strict=True)
    return {
        "about": form.about,
        "inputs": [{"name": p.name, **facts(str(node)), "about": p.about} for p, node in inputs],
        "outputs": [{"name": n, **facts(str(node)), "about": about} for (n, about), node in outputs],
        "axes": {
            key: {"min": axis.low, "max": axis.high, "enforced": kind == "pt2"} for key, axis in form.axes.items()
        },
        "state": dict(form.state),
    }


def symbols(form: ExportForm, program: ExportedProgram) -> dict[str, str]:
    """Return the name of every axis by its symbol in the program."""
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[str, str] = {}
    for port, name in zip(form.inputs, program.graph_signature.user_inputs, strict=True):
        for size, own in zip(nodes[str(name)].meta["val"].shape, port.shape, strict=True):
            if isinstance(own, str):
                found[str(size)] = own
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch and ONNX say of their own insides from the user."""
    names = ("torch.onnx", "onnx_ir", "onnxscript", "torch.export")
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


class _Flat(nn.Module):
    """A form's module, whose tensors have places and no names."""

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.form = form

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return as_tuple(self.form(*tensors))


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    """Return one or more tensors as a tuple, without any that are None."""
    return (value,) if isinstance(value, Tensor) else tuple(t for t in value if t is not None)


def _reader(module: nn.Module) -> Callable[..., Sequence[Any]]:
    return lambda *inputs: as_tuple(module(*inputs))


def _size(size: Any, names: Mapping[str, str]) -> int | str:
    return size if isinstance(size, int) else _renamed(str(size), names)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    return re.sub(r"[A-Za-z_]\w*", lambda m: names.get(m[0], m[0]), text)


def _compare(name: str, form: ExportForm, wanted: Sequence[Tensor], found: Sequence[Any]) -> float:
    """Return the largest difference of all outputs.

    Raises:
        ConfigError: An output differs too much.
    """
    worst = 0.0
    for output, own, other in zip(form.outputs, wanted, found, strict=True):
        a, b = own.double().numpy(), np.asarray(other, dtype=np.float64)
        if a.shape != b.shape:
            raise ConfigError(f"export: {name}.{output} is {b.shape} in the program and {a.shape} in the model.")
        same = (a == b) | (np.isnan(a) & np.isnan(b))  # infinities among them
        gap = float(np.abs(np.where(same, 0.0, a - b)).max(initial=0.0))
        size = float(np.abs(a, where=np.isfinite(a), out=np.zeros_like(a)).max(initial=0.0))
        if not gap <= TOLERANCE * max(1.0, size):
            raise ConfigError(
                f"export: {name}.{output} differs from the model by {gap:.3g}, more than {TOLERANCE:g} of its largest "
                f"number {size:.3g}; nothing was written."
            )
        worst = max(worst, gap)
    return worst


def _write_onnx(
    name: str, form: ExportForm, program: ExportedProgram, path: Path, opset: int | None
) -> tuple[Callable[..., Sequence[Any]], dict[str, Any]]:
    check_extra()
    import onnx
    import onnxruntime

    nbytes = sum(t.nbytes for t in form.module.state_dict().values())
    if nbytes >= PROTOBUF_BYTES:
        raise ConfigError(
            f"export: {name} has {nbytes / 2**30:.1f} GiB of weights, and a file of ONNX holds less than 2; write .pt2."
        )
    names = symbols(form, program)
    with quiet():
        made = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            optimize=False,  # the runtime does that
            opset_version=opset,
            input_names=[port.name for port in form.inputs],
        )
    assert made is not None
    named = dict(zip(made.model.graph.outputs, form.outputs, strict=True))
    for inner in made.model.graph:
        for value in inner.outputs:
            if value in named:
                value.name = f"{named[value]}.out"  # free its final name first
            elif value.name in form.outputs:
                value.name = f"{value.name}.inner"
    for value, output in named.items():
        value.name = output
    proto = made.model_proto
    for node in (proto.graph, *proto.graph.node):
        del node.metadata_props[:]  # paths of this machine
        node.doc_string = ""
    del proto.graph.value_info[:]
    for value in (*proto.graph.input, *proto.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_param = _renamed(dim.dim_param, names)
    path.write_bytes(proto.SerializeToString())
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    used = {port.name for port in session.get_inputs()}

    def run(*inputs: Tensor) -> Sequence[Any]:
        given = {p.name: t.numpy() for p, t in zip(form.inputs, inputs, strict=True) if p.name in used}
        found: Sequence[Any] = session.run(list(form.outputs), given)
        return found

    version = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    return run, {"opset": version, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__}


# ---------------------------------------------------------------- the whole


def description(path: Path) -> Path:
    """Return the JSON file of a program: ``NAME.pt2`` and ``NAME.onnx`` each have their own."""
    return path.with_name(f"{path.name}.json")


def check_beside(files: Sequence[Path], folder: Path) -> None:
    """Refuse to replace files of another model.

    Raises:
        ConfigError: The folder has one of that name and other content.
    """
    for file in files:
        there = folder / file.name
        if there.exists() and not (there.is_file() and there.read_bytes() == file.read_bytes()):
            raise ConfigError(
                f"export: {folder} has another {file.name}, which this model's would replace; choose another folder."
            )


def export_model(
    model: DomainModel,
    path: Path,
    *,
    name: str = "",
    steps: bool = False,
    max_length: int | None = None,
    opset: int | None = None,
    files: Sequence[Path] = (),
    told: Callable[[Written], None] = lambda written: None,
) -> list[Written]:
    """Write a model's programs, and beside them the JSON file that says how they are used.

    ``NAME.pt2`` is the forward, ``NAME.step.pt2`` and ``NAME.begin.pt2`` are the programs that write, and
    ``NAME.pt2.json`` holds inputs, outputs, axes, tokens, normalisation and the model's config. All of them appear, or
    none.

    Args:
        model: What to export; its parameters no longer want gradients.
        path: File of the forward; ends in ``.pt2`` or ``.onnx``. Its folder is made.
        name: What the JSON file calls the model.
        steps: Whether to write the programs of a model that writes token after token too.
        max_length: Positions that the state of a step keeps; None for what the model was made for.
        opset: Of ONNX; None for what torch recommends.
        files: What else is needed to use the model, such as a tokenizer's files: copied beside the programs, and named
            in the JSON file.
        told: Called with each program when it is written and compared.

    Raises:
        ConfigError: The model is no program, differs as one, or a file cannot be written, or would replace another.
        MissingExtraError: ONNX is wanted, and a package is missing.
    """
    kind = file_kind(path)
    if kind == "onnx":
        check_extra()
    if max_length is not None and max_length < 1:
        raise ConfigError(f"export: --max-length must be at least 1, got {max_length}.")
    exports = exports_of(model.eval(), steps=steps, max_length=max_length)
    target = description(path)
    check_beside(files, path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{path.stem}.", dir=path.parent))
    except OSError as e:
        raise ConfigError(f"export: {path} cannot be written ({e.strerror}); choose another place.") from e
    try:
        written = []
        for form_name, form in exports.forms.items():
            file = made / (path.name if form_name == "forward" else f"{path.stem}.{form_name}{path.suffix}")
            written.append(write_form(form_name, form, file, opset=opset))
            told(written[-1])
        facts = {
            "format": FORMAT,
            "vertebra": __version__,
            "torch": torch.__version__,
            "model": name or type(model).__name__,
            "task": model.task,
            "kind": kind,
            "programs": {w.form: w.facts for w in written},
            "facts": exports.facts,
            "files": [file.name for file in files],
            "config": model_config(model),
        }
        (made / target.name).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        for file in files:
            shutil.copyfile(file, made / file.name)
        for file in sorted(made.iterdir()):
            try:
                file.replace(path.parent / file.name)
            except OSError as e:
                raise ConfigError(f"export: {path} cannot be written ({e.strerror}); choose another place.") from e
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return [dataclasses.replace(w, path=path.parent / w.path.name) for w in written]
