"""Saved weights: where they are, and strict loading with a report.

A model directory holds ``config.json`` and ``model.safetensors``; the backbone's tensors are those under ``backbone.``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.backbones.catalog import bundled_models
from vertebra.backbones.loading.checkpoints import read_safetensors
from vertebra.backbones.loading.files import inside, read_json, read_safetensors_header
from vertebra.backbones.loading.guard import cannot_be_built, check_numbers, check_size
from vertebra.backbones.loading.hub import PREFIX, fetch_model
from vertebra.backbones.loading.places import check_source, config_of, local_path, missing, no_model, published
from vertebra.errors import LoadError, VertebraError

Adapter = Callable[[str, Tensor, Tensor], "Tensor | tuple[Tensor, str] | None"]
"""Takes a key, the saved tensor and the module's own; returns what to load, alone or with what was done in a few words:
the saved tensor itself where it fits as it is, or None to keep the module's own."""


@dataclass
class LoadReport:
    """What happened to each key.

    Args:
        matched: Loaded as saved.
        reshaped: Loaded after a change that an adapter declared, with a description.
        missing: Keys of the module that got no saved value.
        unexpected: Saved keys that the module does not have.
        unlike: What tensors do not show and is not as it was when they were trained, such as ``num_heads 8, was 4``.
    """

    matched: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unlike: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self._told("missing", "unexpected")

    def initial(self) -> str:
        """Say the same of the initial weights of a training: there a new head, or an old one, is no fault."""
        return self._told("fresh", "not taken")

    def _told(self, missing: str, unexpected: str) -> str:
        counts = f"{len(self.matched)} matched"
        named = {"reshaped": self.reshaped, missing: self.missing, unexpected: self.unexpected}
        for name, keys in named.items():
            counts += f", {len(keys)} {name}" + (f" ({_shorten(keys)})" if keys else "")
        return counts + (f"; but with {'; '.join(self.unlike)}" if self.unlike else "")


def load_state(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    source: str = "the weights",
    allow_missing: Collection[str] = (),
    allow_unexpected: Collection[str] = (),
    adapters: Mapping[str, Adapter] | None = None,
) -> LoadReport:
    """Load tensors into a module; what does not fit is an error unless it was declared.

    Args:
        module: Where to load.
        tensors: State dict.
        source: What to call the tensors in errors.
        allow_missing: Prefixes of keys that may keep the module's fresh values (a new head).
        allow_unexpected: Prefixes of saved keys that may be dropped (the old head).
        adapters: By key prefix, functions that turn a saved tensor into the module's (more positions, another
            vocabulary, other input channels). They are asked for tensors of the same shape too: rows may be others.

    Returns:
        The report; the module is only changed when nothing is wrong.

    Raises:
        LoadError: Missing, unexpected or misshapen keys that were not declared; the text lists them.
    """
    own = module.state_dict()
    report, loaded, misshapen = LoadReport(), {}, []
    for key, value in tensors.items():
        if key not in own:
            report.unexpected.append(key)
            continue
        same = value.shape == own[key].shape
        change = f"{key} {tuple(value.shape)}" + ("" if same else f" -> {tuple(own[key].shape)}")
        adapter = next((a for prefix, a in (adapters or {}).items() if key.startswith(prefix)), None)
        found = adapter(key, value, own[key]) if adapter is not None else value if same else None
        changed, done = found if isinstance(found, tuple) else (found, "")
        if adapter is None and not same:
            misshapen.append(change)
        elif changed is None:
            report.missing.append(key)
        elif changed is value and same:
            report.matched.append(key)
            loaded[key] = value
        else:
            report.reshaped.append(f"{change}: {done}" if done else change)
            loaded[key] = changed
    report.missing += [key for key in own if key not in tensors]
    wrong = {
        "missing": [k for k in report.missing if not k.startswith(tuple(allow_missing) or "\0")],
        "unexpected": [k for k in report.unexpected if not k.startswith(tuple(allow_unexpected) or "\0")],
        "misshapen": misshapen,
    }
    if any(wrong.values()):
        details = "; ".join(f"{len(keys)} {name}: {_shorten(keys)}" for name, keys in wrong.items() if keys)
        raise LoadError(f"{source} do not fit {type(module).__name__}: {details}. Nothing was loaded.")
    module.load_state_dict(loaded, strict=False)
    return report


def _shorten(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")


def model_folder(source: str | Path) -> Path:
    """Return the folder of a model directory.

    Args:
        source: A bundled model's name, a folder, a run folder, ``local-dir:PATH`` of either, or ``hf-hub:ORG/NAME``
            with ``@REVISION`` behind it or not (files are fetched into the hub's cache when they are not there).

    Raises:
        LoadError: The folder is no model directory, the run has no finished model, or the hub did not give it.
        UnknownNameError: Neither a bundled model nor a folder.
    """
    text = str(source)
    check_source(text)
    if text.startswith(PREFIX):
        return fetch_model(text)
    bundled = bundled_models()
    if text in bundled:
        return bundled[text]
    folder = local_path(text)
    if not folder.exists():
        raise missing(text)
    if (folder / "config.json").is_file():
        return folder
    if (folder / "model" / "config.json").is_file():
        return folder / "model"  # of a run
    raise no_model(folder)


def read_config(source: str | Path) -> dict[str, Any]:
    """Return ``config.json`` of a model directory.

    Raises:
        LoadError: It is no JSON object, no model of ours, or a link out of the folder.
    """
    folder = model_folder(source)
    config = read_json(inside(folder, "config.json") or folder / "config.json")
    if not isinstance(config.get("backbone"), dict):
        raise published(folder, config)
    return config


def read_tensors(source: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a model directory.

    Raises:
        LoadError: ``model.safetensors`` is missing, damaged, or a link out of the folder.
    """
    return read_safetensors(weights_file(model_folder(source)))


def weights_file(folder: Path) -> Path:
    """Return the file of weights of a model directory.

    Raises:
        LoadError: There is none, or it is a link out of the folder.
    """
    path = folder / "model.safetensors"
    if path.is_dir():
        raise LoadError(f"{path}: must be a file of weights, is a folder.")
    if inside(folder, path.name) is None:
        if (config := config_of(folder)) and "backbone" not in config:
            raise published(folder, config)
        raise LoadError(f"{path}: missing; a model directory holds config.json and model.safetensors.")
    return path


def read_backbone_config(source: str | Path) -> BackboneConfig:
    """Return the backbone's config in a model directory.

    Raises:
        LoadError: It is no model directory, or the config is of a backbone that its weights cannot be of.
        VertebraError: The config has a wrong field or value.
    """
    folder = model_folder(source)
    header = read_safetensors_header(weights_file(folder))
    config = backbone_config(read_config(folder)["backbone"], source, header)
    check_size(config.build, header, source)
    return config


def backbone_config(
    values: dict[str, Any], source: object, header: Mapping[str, Mapping[str, Any]] | None = None
) -> BackboneConfig:
    """Make the config that a file describes; ``header`` is that of its weights.

    Raises:
        LoadError: It has a value that none can be made of.
        VertebraError: It has a wrong field or value.
    """
    check_numbers(values, source, header)
    try:
        return BackboneConfig.from_dict(values)
    except VertebraError:
        raise
    except Exception as error:  # checks of configs expect values of the right types
        raise cannot_be_built(error, source) from error


def load_backbone(backbone: Backbone, source: str | Path) -> LoadReport:
    """Load the backbone of a model directory, leaving its embedding and head.

    Raises:
        LoadError: It does not fit.
    """
    prefix = "backbone."
    tensors = {k.removeprefix(prefix): v for k, v in read_tensors(source).items() if k.startswith(prefix)}
    adapters: dict[str, Adapter] = dict.fromkeys(backbone.position_tables, extend)
    saved = backbone_config(read_config(source)["backbone"], source)
    what = f"the backbone weights of {source}"
    return compared(
        lambda: load_state(backbone, tensors, source=what, adapters=adapters), backbone.config, saved, source
    )


# of a backbone; where all tensors fit, they agree, or do not matter
_SIZES = ("dim", "depth", "hidden_dim", "hidden", "cgmlp_dim", "latent_dim", "mlp_ratio", "max_length", "groups")


def compared(
    load: Callable[[], LoadReport], own: BackboneConfig, saved: BackboneConfig | None, source: object
) -> LoadReport:
    """Load weights, and tell how their backbone differs: shapes alone do not show heads, bases of rotation or masks.

    Args:
        load: Loads them.
        own: The backbone they are loaded into.
        saved: The one they are of; None where that is not known.
        source: What to call them in errors.

    Raises:
        LoadError: They do not fit; where the backbones differ, the text says in what, and the way out.
    """
    pairs = {} if saved is None else own.unlike(saved)
    try:
        report = load()
    except LoadError as e:
        if saved is None or not pairs:
            raise
        what = ", ".join(f"{name} {_said(theirs)} (here {_said(mine)})" for name, (mine, theirs) in pairs.items())
        raise LoadError(
            f"{source}: its backbone ({saved.family}, dim {saved.dim}, depth {saved.depth}) is another than this "
            f"model's: {what}. Give the model the same one with --model.backbone{_typed(source)}."
        ) from e
    report.unlike = [
        f"{name} {_said(mine)}, was {_said(theirs)}" for name, (mine, theirs) in pairs.items() if name not in _SIZES
    ]
    return report


def _said(value: object) -> str:
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def _typed(source: object) -> str:
    text = str(source)
    known = text in bundled_models() or text.startswith(("local-dir:", PREFIX))
    return f" {text}" if known else f" local-dir:{text}" if Path(text).is_dir() else ""


def extend(key: str, saved: Tensor, own: Tensor) -> tuple[Tensor, str] | Tensor | None:
    """Adapter of a table with a row a position: of a longer one the first rows are the saved ones, the others fresh.

    None where the rows are of another width.
    """
    if saved.shape == own.shape:
        return saved
    if saved.shape[1:] != own.shape[1:]:
        return None
    count, table = min(len(saved), len(own)), own.clone()
    table[:count] = saved[:count]
    rest = len(own) - count
    return table, f"the first {count} rows as saved" + (f", {rest} fresh" if rest else "")


def save_tensors(module: nn.Module, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a module's state dict as safetensors; tensors that share memory are written once each."""
    from safetensors.torch import save_file

    state = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in module.state_dict().items()}
    save_file(state, path, metadata={"format": "pt", **(metadata or {})})
    path.chmod(0o644)  # the library makes files that only their owner can read


__all__ = [
    "LoadReport",
    "backbone_config",
    "compared",
    "load_backbone",
    "load_state",
    "model_folder",
    "read_backbone_config",
    "read_config",
    "read_tensors",
    "save_tensors",
    "weights_file",
]
