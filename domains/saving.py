"""Model directories: ``config.json``, ``model.safetensors`` and a model card; written whole, loaded strictly."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from vertebra import __version__
from vertebra.backbones.loading.files import read_safetensors_header
from vertebra.backbones.loading.guard import cannot_be_built, check_numbers, check_size
from vertebra.backbones.loading.pretrained import (
    backbone_config,
    load_state,
    model_folder,
    read_config,
    read_tensors,
    save_tensors,
    weights_file,
)
from vertebra.domains.model import DomainModel
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, LoadError, VertebraError

FORMAT = 1


def import_class(path: str, base: type, *, allow_modules: Iterable[str] = (), source: object = "") -> type[Any]:
    """Import the class a file names, if its module may be trusted.

    Args:
        path: Full class path.
        base: What the class must derive from.
        allow_modules: Modules besides ``vertebra`` that classes may come from.
        source: Where the path was read, for the error text.

    Raises:
        LoadError: The module is not allowed, or holds no such class.
    """
    allowed = tuple(allow_modules)
    if not isinstance(path, str) or not all(part.isidentifier() for part in path.split(".")):
        raise LoadError(f"{source}: the class must be named as PACKAGE.MODULE.CLASS, got {_brief(path)}.")
    module, _, name = path.rpartition(".")
    ours = module.startswith("vertebra.domains.") and not any(part.startswith("_") for part in path.split("."))
    if not ours and not any(module == t or module.startswith(f"{t}.") for t in allowed):
        if module.partition(".")[0] == "vertebra":
            raise LoadError(
                f"{source}: the class must come from a domain of vertebra, got {_brief(path)}; the file is damaged, or "
                "made to mislead."
            )
        raise LoadError(
            f"{source}: the class must come from vertebra or a module you allow, got {_brief(path)}; if you trust it, "
            f"pass allow_modules=[{module.partition('.')[0][:80]!r}]."
        )
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError) as e:
        raise LoadError(
            f"{source}: the class {_brief(path)} cannot be imported ({_brief(e)}); was it moved or renamed?"
        ) from e
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise LoadError(f"{source}: {_brief(path)} must be a {base.__name__}; is the file of another kind?")
    if inspect.isabstract(cls) or cls is base:
        raise LoadError(f"{source}: {_brief(path)} is the base of such classes; is the file damaged?")
    return cls


def _brief(value: object) -> str:
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 120 else text[:117] + "..."


def class_path(value: object) -> str:
    """Full path of the class of ``value``."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def model_config(
    model: DomainModel, *, metrics: Mapping[str, float] | None = None, command: str = ""
) -> dict[str, Any]:
    """Describe a model as ``config.json`` does."""
    return {
        "format": FORMAT,
        "vertebra": __version__,
        "task": model.task,
        "model": class_path(model),
        "arguments": model.arguments,
        "backbone": model.backbone.config.to_dict(),
        "spec": model.spec.to_dict(),
        "metrics": dict(metrics or {}),
        "command": command,
    }


def save_model(
    model: DomainModel,
    folder: str | os.PathLike[str],
    *,
    metrics: Mapping[str, float] | None = None,
    command: str = "",
    notes: Mapping[str, str] | None = None,
    files: Iterable[Path] = (),
) -> Path:
    """Write a model directory, replacing an older one there.

    Args:
        model: What to save.
        folder: Where; its parents are made.
        metrics: Final numbers, by name.
        command: The command that made the model.
        notes: For the card: ``data``, ``licence`` and whatever else is worth a section.
        files: Files to keep beside the model, such as a tokenizer's; they are copied.

    Raises:
        ConfigError: The place is taken by something that is no model directory, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"save_model: {folder} exists and is no model directory; choose another place.")
    config = model_config(model, metrics=metrics, command=command)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as e:
        raise ConfigError(f"save_model: {folder} cannot be written ({e.strerror}); choose another place.") from e
    try:
        (made / "config.json").write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (made / "README.md").write_text(_card(folder, model, config, notes or {}), encoding="utf-8")
        save_tensors(model, made / "model.safetensors")
        for file in files:
            shutil.copyfile(file, made / file.name)
        made.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    return folder


def load_model(source: str | os.PathLike[str], *, allow_modules: Iterable[str] = ()) -> DomainModel:
    """Build the model a directory describes, with its weights, in evaluation mode.

    Args:
        source: A bundled model's name, a folder, ``local-dir:PATH`` or ``hf-hub:ORG/NAME``.
        allow_modules: Modules besides ``vertebra`` that the model's class may come from.

    Raises:
        LoadError: No model there, a class that is not allowed, or weights that do not fit.
    """
    folder = model_folder(str(source))  # once, so that both files are of the same commit of a repository
    header = read_safetensors_header(weights_file(folder))
    model = build_model(read_config(folder), allow_modules=allow_modules, source=source, header=header)
    load_state(model, read_tensors(folder), source=f"the weights of {source}")
    return model.eval()


def build_model(
    config: Mapping[str, Any],
    *,
    allow_modules: Iterable[str] = (),
    source: object = "",
    header: Mapping[str, Mapping[str, Any]] | None = None,
) -> DomainModel:
    """Build the model, with fresh weights, that a ``config.json`` describes.

    Args:
        config: What the file holds.
        allow_modules: Modules besides ``vertebra`` that the model's class may come from.
        source: What to call it in errors.
        header: Of the model's weights, as ``read_safetensors_header`` gives it, to refuse a model that they cannot be
            of before it takes memory; None where the description is trusted.

    Raises:
        LoadError: A key is missing, the class is not allowed, or no model can be built from the values.
    """
    missing = [k for k in ("format", "model", "arguments", "backbone", "spec") if k not in config]
    if missing:
        raise LoadError(f"{source}: config.json must hold {', '.join(missing)}; is it a vertebra model directory?")
    if config["format"] != FORMAT:
        raise LoadError(
            f"{source}: format must be {FORMAT}, got {config['format']}; "
            f"it was written by vertebra {config.get('vertebra', '?')}, this is {__version__}."
        )
    for name in ("arguments", "backbone", "spec"):
        if not isinstance(config[name], dict):
            raise LoadError(f"{source}: {name} in config.json must be an object, got a {type(config[name]).__name__}.")
    cls = import_class(config["model"], DomainModel, allow_modules=allow_modules, source=source)
    backbone = backbone_config(config["backbone"], source, header)
    check_numbers([config["arguments"], config["spec"]], source)

    def build() -> DomainModel:
        model = cls(backbone.build(), DataSpec.from_dict(config["spec"]), **config["arguments"])
        assert isinstance(model, DomainModel)
        return model

    if header is not None and cls.__module__.startswith("vertebra."):  # other classes need not know the meta device
        check_size(build, header, source)
    try:
        return build()
    except VertebraError:
        raise
    except Exception as e:  # whatever code of models raises when it gets values it was not written for
        raise cannot_be_built(e, source) from e


def _card(folder: Path, model: DomainModel, config: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    count = sum(p.numel() for p in model.parameters())
    backbone = config["backbone"]
    lines = [
        f"# {folder.name}",
        "",
        f"A `vertebra` model for `{config['task']}`: {backbone['family']} backbone, width {backbone['dim']}, "
        f"{backbone['depth']} layers, {count:,} parameters.",
        "",
        "## Data",
        "",
        notes.get("data", "Not stated."),
        "",
        "## Licence",
        "",
        notes.get("licence", "Not stated by who trained it."),
        "",
        "## Metrics",
        "",
    ]
    metrics = config["metrics"]
    rows = [f"| {k} | {v:.4g} |" for k, v in metrics.items()]
    lines += ["| metric | value |", "| --- | --- |", *rows] if rows else ["None recorded."]
    for title, text in notes.items():
        if title not in ("data", "licence"):
            lines += ["", f"## {title.capitalize()}", "", text]
    lines += ["", "## Use", ""]
    if config["command"]:
        lines += ["Made with:", "", f"    {config['command']}", ""]
    name = json.dumps(f"local-dir:{folder.as_posix()}", ensure_ascii=False)
    lines += [f"    vertebra.load({name})  # or wherever this folder is", ""]
    return "\n".join(lines)
