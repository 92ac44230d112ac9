"""Models in one line: ours as they were saved, published ones converted on the way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vertebra.backbones.base import Backbone, split_name
from vertebra.backbones.catalog import bundled_models
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.backbones.loading.places import check_source, is_run, local_path, no_model
from vertebra.backbones.loading.pretrained import load_backbone as load_into
from vertebra.backbones.loading.pretrained import load_state, model_folder, read_backbone_config, read_config
from vertebra.domains.model import DomainModel
from vertebra.domains.saving import load_model
from vertebra.errors import LoadError


def load(
    source: str | Path,
    *,
    family: str | None = None,
    allow_modules: Iterable[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> DomainModel:
    """Load a model, with its weights, in evaluation mode.

    Args:
        source: A bundled model's name, a model directory, a run folder, a ``.ckpt`` of ours, ``local-dir:PATH`` or
            ``hf-hub:ORG/NAME``; or a published checkpoint, file or folder, that ``vertebra convert`` knows.
        family: The checkpoint's family where it is not found by itself; see ``vertebra convert --help``.
        allow_modules: Modules besides ``vertebra`` that the model's class may come from.
        device: Where to put it; None for the CPU.
        dtype: Type of the weights; None for float32, whatever the file has.

    Raises:
        LoadError: There is no model, it is of no known family, or weights do not fit.
        UnknownNameError: No bundled model and no file of that name.
    """
    model = _load(source, family, allow_modules)
    return model.to(device=device, dtype=dtype).eval()


def _load(source: str | Path, family: str | None, allow_modules: Iterable[str]) -> DomainModel:
    from vertebra.domains.conversion import convert

    if str(source).endswith(".ckpt") and family is None and _is_ours(local_path(source)):
        from vertebra.domains.base import load_task  # Lightning, for the one case that needs it

        return load_task(local_path(source), allow_modules=allow_modules).plain_model
    folder = saved_folder(source) if family is None else None
    if folder is not None:
        return load_model(folder, allow_modules=allow_modules)
    return convert(source, family)[1].model


def load_backbone(source: str | Path, **changes: Any) -> Backbone:
    """Load the backbone of a model, in evaluation mode; of what stands around it nothing is built.

    Args:
        source: As in ``load``, but for a ``.ckpt``; with fields behind it or not, as in ``dna_lm,dropout=0.3``.
        **changes: Fields of the backbone's config to replace, such as ``dropout=0.1``; these win.

    Raises:
        LoadError: There is no model, or its weights do not fit the changed config.
    """
    if "=" in str(source) and not local_path(source).exists():
        source, fields = split_name(str(source))
        changes = {**fields, **changes}
    folder = saved_folder(source)
    if folder is None:
        model = load(source)
        if not changes:
            return model.backbone
        backbone = model.backbone.config.replace(**changes).build()
        load_state(backbone, model.backbone.state_dict(), source=f"the backbone weights of {source}")
        return backbone.eval()
    config = read_backbone_config(folder)
    backbone = (config.replace(**changes) if changes else config).build()
    load_into(backbone, folder)
    return backbone.eval()


def saved_folder(source: str | Path) -> Path | None:
    """Return the model directory that a name means; None where it means a checkpoint from elsewhere.

    Raises:
        LoadError: There is nothing of that name, or the hub did not answer.
        UnknownNameError: Neither a bundled model nor a file.
    """
    text = str(source)
    check_source(text)
    if text in bundled_models():
        return model_folder(text)
    path = open_checkpoint(text).path if text.startswith("hf-hub:") else local_path(text)
    if (path / "model" / "config.json").is_file():
        return path / "model"  # a run folder
    if path.is_dir() and is_run(path):
        raise no_model(path)
    if path.is_file() or (path.is_dir() and not _names_ours(path)):
        return None
    return model_folder(path if path.is_dir() else text)


def _names_ours(folder: Path) -> bool:
    try:
        return "spec" in read_config(folder)
    except LoadError:
        return False


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        raise LoadError(f"{path}: no such checkpoint file.")
    from vertebra.domains.base import read_checkpoint

    try:
        read_checkpoint(path)
    except LoadError:
        return False
    return True
