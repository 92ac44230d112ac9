"""Initial weights of a training: where they are, and how they are made to fit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from vertebra.backbones.base import Backbone
from vertebra.backbones.loading.checkpoints import check_tensors, read_torch
from vertebra.backbones.loading.guard import Names, cannot_be_built
from vertebra.backbones.loading.pretrained import (
    LoadReport,
    backbone_config,
    compared,
    extend,
    load_state,
    read_config,
    read_tensors,
)
from vertebra.domains.finetuning import TuneConfig, merge_tensors, without_adapters
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.spec import DataSpec
from vertebra.errors import LoadError, VertebraError


def init_weights(model: DomainModel, source: str, parts: str = "backbone") -> LoadReport:
    """Load initial weights into a model.

    What the model declares in ``adapters``, and a backbone in ``position_tables``, is made to fit: another vocabulary,
    other inputs, a longer context. Of a model of another domain the backbone alone is taken.

    Args:
        model: Where to load; it may have low-rank adapters already, which are left alone.
        source: A ``.ckpt``, a run folder, a model directory, a bundled model's name, or what else ``vertebra.load``
            takes.
        parts: ``backbone``: the backbone, and what stands before it. ``all``: whatever has the same name; what has
            another shape, or does not exist in the source, keeps its fresh values.

    Raises:
        LoadError: There are no weights, the backbone does not fit, or what describes them is damaged.
    """
    try:
        return _init_weights(model, source, parts)
    except VertebraError:
        raise
    except Exception as e:  # whatever a model's adapters raise when they get values they were not written for
        raise cannot_be_built(e, source, Names("its description")) from e


def _init_weights(model: DomainModel, source: str, parts: str) -> LoadReport:
    tensors, origin = read_source(source)
    with without_adapters(model):
        own = model.state_dict()
        alike = isinstance(origin.spec, type(model.spec))
        adapters = {f"backbone.{name}": extend for name in model.backbone.position_tables}
        if alike:
            adapters |= model.adapters(origin)
        keep = ("backbone", *model.input_parts, *model.output_parts) if alike else ("backbone",)
        known = [name for name in own if name in tensors]
        taken = {
            name: tensors[name]
            for name in [*known, *(tensors.keys() - own.keys())]
            if (name.partition(".")[0] in keep or (alike and parts == "all"))
            and (name.startswith("backbone.") or name in adapters or _same_shape(own.get(name), tensors[name]))
        }

        def load() -> LoadReport:
            return load_state(
                model,
                taken,
                source=f"the weights of {source}",
                allow_missing=[name for name in own if not name.startswith("backbone.")],
                allow_unexpected=[name for name in adapters if not name.startswith("backbone.")],
                adapters=adapters,
            )

        report = compared(load, model.backbone.config, origin.backbone, source)
    report.unexpected = [name for name in tensors if name not in own or name not in taken]
    return report


def _same_shape(own: Tensor | None, saved: Tensor) -> bool:
    return own is not None and own.shape == saved.shape


def init_backbone(backbone: Backbone, source: str) -> LoadReport:
    """Load the backbone of a pretrained name, which may have low-rank adapters already."""
    from vertebra.backbones.loading.pretrained import load_backbone

    with without_adapters(backbone):
        return load_backbone(backbone, source)


def read_source(source: str) -> tuple[dict[str, Tensor], Origin]:
    """Return the tensors of a model, and what it is; low-rank adapters are merged.

    Raises:
        LoadError: There are no weights.
    """
    if source.endswith(".ckpt"):
        checkpoint = read_checkpoint(source)
        given, state = checkpoint["hyper_parameters"], check_all_tensors(checkpoint["state_dict"], source)
        state = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
        saved = checkpoint.get("backbone")
        backbone = backbone_config(saved, source) if isinstance(saved, dict) else None
        origin = Origin(DataSpec.from_dict(checkpoint["spec"]), given, backbone)
        return merge_tensors(state, TuneConfig(**given.get("tune", {}))), origin
    from vertebra.domains.loading import load, saved_folder

    path = Path(source.removeprefix("local-dir:"))
    if (path / "checkpoints").is_dir() and not (path / "model" / "config.json").is_file():
        raise LoadError(
            f"{path}: this run has no model yet, `fit` writes it at its end; name a checkpoint of it, such as "
            f"{path / 'checkpoints' / 'last.ckpt'}."
        )
    folder = saved_folder(source)
    if folder is None:
        model = load(source)
        return model.state_dict(), Origin(model.spec, model.arguments, model.backbone.config)
    config = read_config(folder)
    spec = DataSpec.from_dict(config["spec"]) if "spec" in config else None
    return read_tensors(folder), Origin(spec, config.get("arguments", {}), backbone_config(config["backbone"], source))


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a Lightning checkpoint, without running code from it.

    Raises:
        LoadError: No such file, or none that a task of ``vertebra`` wrote.
    """
    if not Path(path).is_file():
        raise LoadError(f"{path}: no such checkpoint file.")
    checkpoint = read_lightning(path)
    if not isinstance(checkpoint, dict) or not {"state_dict", "spec", "class_path"} <= checkpoint.keys():
        raise LoadError(f"{path}: must hold state_dict, spec and class_path, as checkpoints of vertebra's tasks do.")
    checkpoint.setdefault("hyper_parameters", {})
    return checkpoint


def read_lightning(path: str | os.PathLike[str]) -> Any:
    """Read a file that Lightning wrote, without running code from it, nor letting it take memory it does not hold.

    Raises:
        LoadError: It cannot be read, or its parts are none of a checkpoint.
    """
    try:
        found = read_torch(Path(path))
    except LoadError as e:
        reason = str(e).removeprefix(f"{path}: ").rstrip(".")
        raise LoadError(f"{path}: not a readable checkpoint ({reason}).") from e
    if isinstance(found, dict):
        for part in ("state_dict", "hyper_parameters"):
            _check_part(found, part, path)
        state = found.get("state_dict", {})
        check_tensors({name: value for name, value in state.items() if isinstance(value, Tensor)}, Path(path))
    return found


def check_all_tensors(state: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the state dict of a checkpoint of ours, which holds nothing but tensors.

    Raises:
        LoadError: It holds something else.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise LoadError(f"{path}: {name[:100]!r} in state_dict must be a tensor, got a {type(value).__name__}.")
    return state


def _check_part(checkpoint: dict[str, Any], part: str, path: str | os.PathLike[str]) -> None:
    values = checkpoint.get(part, {})
    if not isinstance(values, dict):
        raise LoadError(f"{path}: {part} must be a dictionary, got a {type(values).__name__}.")
    for name in values:
        if not isinstance(name, str):
            raise LoadError(f"{path}: {part} must have names for keys, got {repr(name)[:100]}.")
