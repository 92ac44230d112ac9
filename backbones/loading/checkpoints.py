"""Checkpoints from elsewhere: found, and read without running code from them.

A source is a file (``.safetensors``; ``.pth``, ``.pt``, ``.bin`` and ``.ckpt`` of ``torch.save``), a folder with such
files, whole or in shards, a ``.zip`` of a folder, ``local-dir:PATH``, or ``hf-hub:ORG/NAME`` with ``@REVISION`` behind
it or not. What a file is is told by its first bytes; a file that is called safetensors and is none is refused.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import tempfile
import warnings
import weakref
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vertebra.backbones.loading.archives import check_torch_zip, is_torch_zip, unpack
from vertebra.backbones.loading.files import inside, read_json, read_safetensors_header
from vertebra.backbones.loading.hub import PREFIX, fetch_checkpoint, shard_names
from vertebra.backbones.loading.pickles import check_pickle
from vertebra.backbones.loading.places import check_source, is_hinted, local_path, missing
from vertebra.errors import LoadError

WRAPPERS = ("state_dict", "model", "module", "model_state_dict", "params")
"""Names under which training codes keep the state dict in their files."""

_INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_ADVICE = ("Weights only load failed", "(1)", "(2)", "Please", "Check the documentation")


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
            LoadError: It is no JSON object, or a link out of the folder.
        """
        path = self.file("config.json")
        return {} if path is None else read_json(path, finite=False)  # transformers writes Infinity

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
            LoadError: There is none, or several that do not belong together; or one is a link out of the folder.
        """
        if self.path.is_file():
            return (self.path,)
        for name in _INDEX:
            if (index := inside(self.folder, name)) is not None:
                return _shards(index)
        if (whole := self.file(*_WHOLE)) is not None:
            return (whole,)
        names_found = sorted(p.name for p in self.folder.iterdir() if p.suffix in _SUFFIXES)
        found = [file for name in names_found if (file := inside(self.folder, name)) is not None]
        if len(found) != 1:
            names = ", ".join(p.name for p in found[:4]) or "none"
            raise LoadError(f"{self.source}: must hold one file of weights, got {names}; name the file itself.")
        return (found[0],)

    def file(self, *names: str) -> Path | None:
        """Return the first of these files that stands beside the weights.

        Raises:
            LoadError: It is a link out of the folder.
        """
        return next((file for name in names if (file := inside(self.folder, name)) is not None), None)


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Find a checkpoint.

    A ``.zip`` is unpacked into a temporary folder that goes with the returned object.

    Args:
        source: A file, a folder, ``local-dir:PATH``, ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``.

    Raises:
        LoadError: There is nothing, the hub did not give it, or an archive may not be unpacked.
    """
    text = str(source)
    check_source(text)
    if text.startswith(PREFIX):
        folder = fetch_checkpoint(text)
        archives = sorted(folder.glob("*.zip"))
        only = len(archives) == 1 and not any(p.suffix in _SUFFIXES for p in folder.iterdir())
        return _opened(text, archives[0] if only else folder)
    path = local_path(text)
    if not os.path.exists(path):  # which, unlike the method, has no objection to a name that is too long
        if is_hinted(text):
            raise missing(text)
        raise LoadError(
            f"{text[:300]}: no such file or folder; give a file of weights, a folder with one, or hf-hub:ORG/NAME."
        )
    return _opened(text, path)


def _opened(source: str, path: Path) -> Checkpoint:
    if not (path.is_file() and _first_bytes(path).startswith(b"PK") and not is_torch_zip(path)):
        return Checkpoint(source, path)
    made = Path(tempfile.mkdtemp(prefix="vertebra-"))
    try:
        checkpoint = Checkpoint(source, unpack(path, made))
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    weakref.finalize(checkpoint, shutil.rmtree, made, ignore_errors=True)
    return checkpoint


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of one file.

    Raises:
        LoadError: The file is damaged, of another kind, or needs code of its own to be read.
    """
    start = _first_bytes(path)
    if start[8:9] == b"{" or path.suffix == ".safetensors":
        return read_safetensors(path)
    return _state_dict(read_torch(path), path)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, whose header is checked before.

    Raises:
        LoadError: It is missing, damaged, or of another kind.
    """
    read_safetensors_header(path)
    try:
        return load_file(path)
    except Exception as error:  # types of tensors that torch does not have raise others than the library's own
        raise LoadError(f"{path}: damaged, or no safetensors file ({_reason(error)}).") from error


def read_torch(path: Path) -> Any:
    """Read a file of ``torch.save``, without running code from it.

    Raises:
        LoadError: It is damaged, would take more memory than it has bytes, or needs code of its own to be read.
    """
    size = path.stat().st_size
    if not size:
        raise LoadError(f"{path}: empty; get it again.")
    if _first_bytes(path).startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise LoadError(f"{path}: cut short or damaged, it begins as a file of torch but has no end; get it again.")
        check_torch_zip(path)
    check_pickle(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that are older or newer than torch's own
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip, runtime and end-of-file errors
        raise LoadError(
            f"{path}: cannot be read without running code from it, or is damaged ({_reason(error)}). Load it in a "
            "place you trust, and save its state dict alone, best as safetensors."
        ) from error
    return found


def _first_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise LoadError(f"{path}: cannot be read ({error.strerror}).") from error


def _reason(error: Exception) -> str:
    """Return what is wrong, without torch's advice to read the file carelessly."""
    lines = [line.strip().removeprefix("WeightsUnpickler error: ") for line in str(error).splitlines()]
    told = [line for line in lines if line and not line.startswith(_ADVICE)]
    return (told[0] if told else repr(error)).partition(" Please use")[0][:200].rstrip(".")


def _state_dict(found: object, path: Path) -> dict[str, Tensor]:
    while isinstance(found, Mapping):
        tensors = {str(k): v for k, v in found.items() if isinstance(v, Tensor)}
        if tensors:
            check_tensors(tensors, path)
            return tensors
        inner = next((found[name] for name in WRAPPERS if isinstance(found.get(name), Mapping)), None)
        if inner is None:
            break
        found = inner
    raise LoadError(f"{path}: holds no state dict of tensors, also not under {', '.join(WRAPPERS)}.")


def check_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that claim more values than the file can hold.

    Raises:
        LoadError: There is such a tensor, or one that is not dense.
    """
    held, size = 0, path.stat().st_size
    storages: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise LoadError(f"{path}: {name!r} is no plain tensor; save the state dict with dense ones.")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise LoadError(f"{path}: {name!r} claims more values than are stored; save it with .contiguous().")
        if storage.data_ptr() not in storages:
            storages.add(storage.data_ptr())
            held += storage.nbytes()
    if held > size:
        raise LoadError(f"{path}: its tensors claim {held:,} bytes, the file has {size:,}; it is damaged.")


def _shards(index: Path) -> tuple[Path, ...]:
    shards = []
    for name in shard_names(index):
        if (shard := inside(index.parent, name)) is None:
            raise LoadError(f"{index}: the shard {name} is missing; get it again.")
        shards.append(shard)
    return tuple(shards)
