"""Checkpoints from elsewhere: found, and read without running code from them.

A source is a file (``.safetensors``; ``.pth``, ``.pt``, ``.bin`` and ``.ckpt`` of ``torch.save``), a folder with such
files, whole or in shards, a ``.zip`` of a folder, ``local-dir:PATH``, or ``hf-hub:ORG/NAME`` with ``@REVISION`` behind
it or not. What a file is is told by its first bytes, not by its name.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from vertebra.errors import LoadError

WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "params")
"""Names under which training codes keep the state dict in their files."""

_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")


class Checkpoint:
    """A checkpoint on disk; tensors are read when they are asked for.

    Args:
        source: What the user calls it.
        path: A file of weights, or a folder.
    """

    def __init__(self, source: str, path: Path) -> None:
        self.source, self.path = source, path
        self.folder = path if path.is_dir() else path.parent

    @functools.cached_property
    def config(self) -> dict[str, Any]:
        """``config.json`` of the folder; empty where there is none.

        Raises:
            LoadError: It is no JSON object.
        """
        path = self.folder / "config.json"
        if not path.is_file():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise LoadError(f"{path}: not readable as JSON ({error}).") from error
        if not isinstance(found, dict):
            raise LoadError(f"{path}: must hold a JSON object, got a {type(found).__name__}.")
        return found

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The state dict, as the files name it.

        Raises:
            LoadError: There is no file of weights, or several; or one cannot be read without running code from it.
        """
        tensors: dict[str, Tensor] = {}
        for file in self.weight_files:
            tensors |= read_weights(file)
        return tensors

    @functools.cached_property
    def weight_files(self) -> tuple[Path, ...]:
        """The files that hold the weights.

        Raises:
            LoadError: There is none, or several that do not belong together.
        """
        if self.path.is_file():
            return (self.path,)
        for name in _INDEX:
            if (index := self.folder / name).is_file():
                return _shards(index)
        for name in _WHOLE:
            if (self.folder / name).is_file():
                return (self.folder / name,)
        found = sorted(p for p in self.folder.iterdir() if p.suffix in _SUFFIXES and p.is_file())
        if len(found) != 1:
            names = ", ".join(p.name for p in found[:4]) or "none"
            raise LoadError(f"{self.source}: must hold one file of weights, got {names}; name the file itself.")
        return (found[0],)

    def file(self, *names: str) -> Path | None:
        """Return the first of these files that stands beside the weights."""
        return next((self.folder / name for name in names if (self.folder / name).is_file()), None)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find a checkpoint.

    Args:
        source: A file, a folder, ``local-dir:PATH`` or ``hf-hub:ORG/NAME``.

    Raises:
        LoadError: There is nothing, or the hub did not answer.
    """
    text = str(source)
    path = Path(text.removeprefix("local-dir:"))
    if not path.exists():
        raise LoadError(
            f"{text}: no such file or folder; give a file of weights, a folder with one, or hf-hub:ORG/NAME."
        )
    return Checkpoint(text, path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of one file.

    Raises:
        LoadError: The file is damaged, of another kind, or needs code of its own to be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}).") from error
    if start[8:9] == b"{":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise LoadError(f"{path}: damaged, or no safetensors file ({error}).") from error
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # options that training codes save beside weights
            found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime and end-of-file errors
        reason = str(error).splitlines()[0] if str(error) else repr(error)
        raise LoadError(
            f"{path}: cannot be read without running code from it ({reason}); load it in a place you trust, and save "
            "its state dict alone, best as safetensors."
        ) from error
    return _state_dict(found, path)


def _state_dict(found: object, path: Path) -> dict[str, Tensor]:
    while isinstance(found, Mapping):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        if tensors:
            return tensors
        inner = next((found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        found = inner
    raise LoadError(f"{path}: holds no state dict of tensors, also not under {', '.join(WRAPPERS)}.")


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise LoadError(f"{index}: not an index of shards ({error}).") from error
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise LoadError(f"{index}: a shard must be a file beside the index, got {name!r}.")
        if not (index.parent / name).is_file():
            raise LoadError(f"{index}: the shard {name} is missing; get it again.")
    return tuple(index.parent / name for name in names)
