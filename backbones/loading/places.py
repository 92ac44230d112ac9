"""What a name or a folder is that is no model directory of ours, in words; read without torch.

Most wrong names are nearly right ones, and most wrong folders are a run, or a model that somebody else published. So
the errors say which of these it is, and what to do with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vertebra.backbones.catalog import bundled_models, presets
from vertebra.backbones.loading.files import inside, read_json
from vertebra.errors import LoadError, UnknownNameError, VertebraError, printable

LOCAL = "local-dir:"
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
"""Endings of files of weights, also of those that others wrote."""

FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "qwen2"), "llama"),
    **dict.fromkeys(("mamba", "mamba2"), "mamba"),
    **dict.fromkeys(("bamba", "granitemoehybrid"), "bamba"),
    "jamba": "jamba",
    "hybridna": "hybridna",
}
"""Converters by ``model_type``, for those that it tells alone."""

_HUB = re.compile(
    r"(?:(?:hf|huggingface)[-_]?(?:hub)?:/{0,2}|(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/)"
    r"([\w.-]+(?:/[\w.-]+)?)(?:/(?:tree|blob|resolve)/([\w.-]+)(?:/.*)?|@([\w./-]+))?/?",
    re.IGNORECASE,
)
_REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
_MOST_CLASSES = 4  # of "architectures" that are shown


def local_path(source: str | Path) -> Path:
    """Return the path that a name means: without ``local-dir:``, with ``~`` as the home folder."""
    path = Path(str(source).removeprefix(LOCAL))
    try:
        return path.expanduser()
    except RuntimeError:  # of a user who does not exist
        return path


def check_source(text: str) -> None:
    """Refuse a name that can mean nothing.

    Raises:
        LoadError: It is empty, or a repository of the hub that is written in another way.
    """
    if not text.strip():
        raise LoadError("no model is named, the name is empty; give a bundled model, a folder, or hf-hub:ORG/NAME.")
    if text.strip() == LOCAL:
        raise LoadError("local-dir: needs the path of a folder behind it, as in local-dir:runs/NAME/model.")
    if not text.startswith("hf-hub:") and (found := _HUB.fullmatch(text.strip())):
        name, revision = found[1], found[2] or found[3]
        name = f"hf-hub:{name}" + (f"@{revision}" if revision and revision != "main" else "")
        raise LoadError(f"{text[:300]}: repositories of the hub are written {name}")


def missing(text: str) -> VertebraError:
    """Return the error for a name that is neither a bundled model nor a file or folder."""
    name, shown = text.partition(",")[0], text[:300]
    if name in presets():
        return LoadError(
            f"{name} is a preset, an architecture without weights; --model.backbone {name} trains one from scratch, "
            "and `vertebra list models` shows the models that have weights."
        )
    path = local_path(text)
    if path.suffix == ".ckpt":
        return LoadError(f"{shown}: no such checkpoint file.")
    if _REPOSITORY.fullmatch(text):
        return LoadError(f"{shown}: no such folder; if it is a repository of the hub, write hf-hub:{text}")
    if text.startswith((LOCAL, "~")) or "/" in text:
        return LoadError(f"{path}: no such folder; a model directory holds config.json and model.safetensors.")
    return UnknownNameError("model", text, bundled_models())


def is_hinted(text: str) -> bool:
    """Whether ``missing`` knows more of a name than that there is nothing: a preset, or a repository of the hub."""
    return text.partition(",")[0] in presets() or is_repository(text)


def is_repository(text: str) -> bool:
    """Whether a name looks as a repository's on the hub: ``ORG/NAME``."""
    return _REPOSITORY.fullmatch(text) is not None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a training run."""
    told = (folder / "checkpoints").is_dir() or (
        (folder / "config.yaml").is_file() and (folder / "metrics.csv").exists()
    )
    return told and not (folder / "config.json").exists() and not weight_names(folder)


def no_model(path: Path) -> LoadError:
    """Return the error for a file, or a folder without ``config.json``, where a model directory is wanted."""
    if path.suffix == ".ckpt":
        run = path.parent.parent if path.parent.name == "checkpoints" else None
        where = f"{run / 'model'}" if run is not None else "RUN/model"
        return LoadError(
            f"{path}: a checkpoint of a training, not a model directory; name the `model` in its run folder: {where}"
        )
    if path.is_file():
        told = f"; of a published checkpoint: vertebra convert {path} -o DIR" if path.suffix in WEIGHTS else "."
        return LoadError(f"{path}: a file; a model directory is a folder with config.json and model.safetensors{told}")
    if is_run(path):
        saved = any((path / "checkpoints").glob("*.ckpt"))
        way = (
            f"finish it: vertebra fit --ckpt_path {path}" if saved else "it has no checkpoint either, so fit it again."
        )
        return LoadError(f"{path}: a run folder without a finished model (model/config.json); {way}")
    if weight_names(path):
        return published(path)
    if path.name == "checkpoints" and any(path.glob("*.ckpt")):
        return LoadError(
            f"{path}: checkpoints of a training, not a model directory; name the `model` in its run folder: "
            f"{path.parent / 'model'}"
        )
    return LoadError(f"{path}: not a model directory, config.json is missing; `vertebra fit` writes one per run.")


def published(folder: Path, config: Mapping[str, Any] | None = None) -> LoadError:
    """Return the error for a published checkpoint where a model directory of ours is wanted.

    Args:
        folder: Where it is.
        config: What its ``config.json`` holds, if it has one.
    """
    kind = told_kind(config or {})
    return LoadError(
        (f"{folder}: not written by vertebra" if config is None else f"{folder / 'config.json'}: has no 'backbone' "
         "entry, so it was not written by vertebra") +
        f"; it is a published checkpoint{f' ({kind})' if kind else ''}. Convert it: vertebra convert {folder} -o DIR"
    )  # fmt: skip


def told_kind(config: Mapping[str, Any]) -> str:
    """Return what a config from elsewhere says that it is of, for errors; nothing where it says nothing."""
    words = [f"{name} {printable(repr(config[name])[:80])}" for name in ("model_type", "architecture")
             if isinstance(config.get(name), str) and config[name]]  # fmt: skip
    if classes := classes_of(config):
        words.append(f"architectures {', '.join(printable(c[:80]) for c in classes[:_MOST_CLASSES])}")
    return ", ".join(words)


def classes_of(config: Mapping[str, Any]) -> list[str]:
    """Return the class names under ``architectures``."""
    classes = config.get("architectures")
    return [c for c in classes if isinstance(c, str)] if isinstance(classes, list) else []


def family_of(config: Mapping[str, Any]) -> str:
    """Return the converter that a config alone tells; nothing where it does not."""
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in FAMILIES:
        return FAMILIES[kind]
    if any("ChronosBolt" in name for name in classes_of(config)):
        return "chronos_bolt"
    if isinstance(kind, str) and "hybridna" in kind.lower():
        return "hybridna"
    if isinstance(name := config.get("architecture"), str) and re.match(r"(vit|deit)3?_", name):
        return "timm_vit"
    if "patch_sizes" in config and "d_model" in config:
        return "moirai"
    if not kind and {"d_model", "n_layer", "vocab_size"} <= config.keys():  # as mamba_ssm writes it
        return "bamba" if config.get("attn_layer_idx") else "mamba"
    return ""


def weight_names(folder: Path) -> list[str]:
    """Return the names of the files of weights in a folder, but for checkpoints of trainings."""
    return sorted(p.name for p in folder.iterdir() if p.suffix in WEIGHTS and p.suffix != ".ckpt" and p.is_file())


def config_of(folder: Path) -> dict[str, Any]:
    """Return ``config.json`` of a folder; empty where there is none.

    Raises:
        LoadError: It is no JSON object, or a link out of the folder.
    """
    path = inside(folder, "config.json")
    return {} if path is None else read_json(path, finite=False)
