"""Layers of settings: which classes they name, what a checkpoint brings, and the files the parser reads in order."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from vertebra.cli.invocation import Invocation, read_yaml
from vertebra.cli.recipes import recipe_path
from vertebra.cli.runs import run_folder_of
from vertebra.cli.trust import check_names
from vertebra.errors import ConfigError, LoadError


def domain_names() -> list[str]:
    """Names of the domains that have a task."""
    return sorted(p.parent.name for p in (Path(str(files("vertebra"))) / "domains").glob("*/task.py"))


def import_domains(call: Invocation, *, everything: bool) -> None:
    """Import the classes that short names may mean: those of the recipe's domain, else of all."""
    names = [name for word, name in class_names(call) if name and "." not in name]
    if not (names or everything):
        return
    recipe = call.recipe.partition("/")[0] if call.recipe and not everything else None
    for domain in [recipe] if recipe else domain_names():
        for part in ("data", "task"):
            if find_spec(f"vertebra.domains.{domain}") and find_spec(f"vertebra.domains.{domain}.{part}"):
                import_module(f"vertebra.domains.{domain}.{part}")
    if everything or any(name.endswith("Config") for name in names):
        from vertebra.backbones.base import config_class
        from vertebra.backbones.catalog import families

        for family in families():
            config_class(family)


def class_names(call: Invocation) -> Iterator[tuple[str, str]]:
    """Yield (section or option, class name) for every class that is named in files or words."""
    for _, document in call.documents():
        for section in ("model", "data"):
            value = document.get(section)
            if isinstance(value, str):
                yield section, value
            elif isinstance(value, dict):
                yield section, str(value.get("class_path") or "")
                backbone = (value.get("init_args") or value).get("backbone")
                if isinstance(backbone, dict):
                    yield "backbone", str(backbone.get("class_path") or "")
    for word, following in zip(call.rest, [*call.rest[1:], ""], strict=False):
        option, equals, value = word.partition("=")
        named = {"--model": "model", "--data": "data", "--model.class_path": "model", "--data.class_path": "data",
                   "--model.backbone": "backbone"}.get(option)  # fmt: skip
        if named:
            yield named, value if equals else following


def read_checkpoint_of(call: Invocation) -> dict[str, Any] | None:
    """Read the checkpoint that was named, without running code from it.

    Raises:
        LoadError: Not a Lightning checkpoint.
    """
    if call.checkpoint is None:
        return None
    from vertebra.domains.initial import read_lightning

    checkpoint = read_lightning(call.checkpoint)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise LoadError(f"{call.checkpoint}: must hold a Lightning checkpoint, with a state_dict.")
    return checkpoint


def model_class_of(checkpoint: dict[str, Any]) -> str | None:
    """Class path of the task that wrote a checkpoint; None where it says none."""
    return checkpoint.get("class_path") or checkpoint.get("hyper_parameters", {}).get("_class_path") or None


def check_class(call: Invocation, checkpoint: dict[str, Any]) -> None:
    """Refuse a model class that the user does not know of, or another than that of the checkpoint.

    Raises:
        LoadError: The checkpoint's class is neither of vertebra nor named by the user.
        ConfigError: It is not the class that was named.
    """
    held = model_class_of(checkpoint)
    if held is None:
        return
    assert call.checkpoint is not None
    data = _data_of(call, checkpoint)  # looked at too, so that one answer is enough
    check_names(call, {"model": {"class_path": held}, "data": data}, dict.fromkeys(("model", "data"), call.checkpoint))
    for section, name in class_names(call):
        if section == "model" and name and not name.endswith((".yaml", ".json")) and not same_class(name, held):
            raise ConfigError(mismatch_text(call, held, name))


def mismatch_text(call: Invocation, held: str, asked: str) -> str:
    """Text for a model class that differs from that of the checkpoint."""
    return (
        f"--ckpt_path {call.checkpoint} holds a {held.rpartition('.')[2]}, but the model asked for is "
        f"{asked.rpartition('.')[2]}; leave the model out, or take the weights alone with "
        f"--model.init_from {call.checkpoint}"
    )


def same_class(name: str, path: str) -> bool:
    """Whether a short or full class name means the class of ``path``."""
    if "." not in name:
        return name == path.rpartition(".")[2]
    if name == path:
        return True
    try:
        return _imported(name) is _imported(path)
    except (ImportError, AttributeError):
        return True  # the parser says what is wrong with it


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def config_layers(call: Invocation, checkpoint: dict[str, Any] | None, scratch: Path) -> list[str]:
    """Return ``--config`` words for recipe, checkpoint and ``-c`` files, weakest first."""
    paths = [recipe_path(call.recipe)] if call.recipe else []
    if checkpoint is not None:
        paths.append(scratch / "checkpoint.yaml")
        paths[-1].write_text(yaml.safe_dump(checkpoint_layer(call, checkpoint), sort_keys=False), encoding="utf-8")
    for number, path in enumerate(call.configs):
        document = call.documents()[number + (call.recipe is not None)][1]
        if "ckpt_path" in document:  # it was followed already, and stays the weaker of two
            document = {k: v for k, v in document.items() if k != "ckpt_path"}
            path = scratch / f"{number}-{path.name}"
            path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        paths.append(path)
    return [f"--config={p}" for p in paths] + ([f"--ckpt_path={call.checkpoint}"] if call.checkpoint else [])


def checkpoint_layer(call: Invocation, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Settings a checkpoint brings: model and data; for ``fit`` also the trainer's, from the run folder around it.

    Raises:
        LoadError: A class is neither of vertebra nor named by the user, or there are values that no settings have.
    """
    layer: dict[str, Any] = {}
    assert call.checkpoint is not None
    sources = dict.fromkeys(("model", "data"), call.checkpoint)
    folder = run_folder_of(call.checkpoint)
    if call.subcommand == "fit" and folder is not None:
        settings = read_yaml(folder / "config.yaml")
        layer = {k: settings[k] for k in ("seed_everything", "trainer") if k in settings}
        sources |= dict.fromkeys(layer, folder / "config.yaml")
    given = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if not k.startswith("_")}
    for name in ("backbone", "student"):
        backbone = given.get(name)
        if isinstance(backbone, dict) and "family" in backbone:
            given[name] = _as_class(backbone)
    if held := model_class_of(checkpoint):
        layer["model"] = {"class_path": held, "init_args": given}
    if data := _data_of(call, checkpoint):
        layer["data"] = data
    check_names(call, layer, sources)
    try:
        return json.loads(json.dumps(layer, default=_listed))  # tuples are no plain YAML
    except (TypeError, ValueError) as e:
        raise LoadError(f"{call.checkpoint}: holds settings that are none ({e}).") from e


def _data_of(call: Invocation, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Settings of the data module that a checkpoint was made with; empty where it says none."""
    parts = {name: checkpoint.get(name) or {} for name in ("data", "datamodule_hyper_parameters")}
    for name, value in parts.items():
        if not isinstance(value, dict):
            raise LoadError(f"{call.checkpoint}: {name} must be a dictionary, got a {type(value).__name__}.")
    data, saved = parts["data"], parts["datamodule_hyper_parameters"]
    if not data and "_class_path" in saved:
        arguments = {k: v for k, v in saved.items() if not str(k).startswith("_")}
        return {"class_path": saved["_class_path"], "init_args": arguments}
    return data


def _listed(value: object) -> list[Any]:
    if isinstance(value, set | frozenset):
        return list(value)
    raise TypeError(f"a {type(value).__name__}")


def _as_class(backbone: dict[str, Any]) -> dict[str, Any]:
    """Turn ``BackboneConfig.to_dict()`` into the form that the parser reads."""
    from vertebra.backbones.base import config_class

    fields = {k: v for k, v in backbone.items() if k != "family"}
    cls = config_class(str(backbone["family"])[:100])
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": fields}
