"""Model directories as their headers tell them, read without torch."""

from __future__ import annotations

import json
import math
import re
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vertebra.errors import LoadError

_LONGEST_HEADER = 100_000_000  # bytes; the limit of the safetensors library


@dataclass(frozen=True)
class TensorsInfo:
    """What the header of a safetensors file says.

    Args:
        tensors: Number of tensors.
        params: Number of values in all of them.
        dtypes: Number of values of each type.
        nbytes: Size of the file in bytes.
    """

    tensors: int
    params: int
    dtypes: dict[str, int]
    nbytes: int


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return ``{tensor name: {"dtype", "shape", "data_offsets"}}`` of a safetensors file.

    Raises:
        LoadError: Missing, truncated, or of another format.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise LoadError(f"{path}: not a safetensors file, or cut short; get or write it again.")
            header = json.loads(f.read(length))
        end = max((t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"), default=0)
    except FileNotFoundError as e:
        raise LoadError(f"{path}: no such file.") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        if isinstance(e, LoadError):
            raise
        raise LoadError(f"{path}: the header is not that of a safetensors file; get or write it again.") from e
    if 8 + length + end > size:
        raise LoadError(
            f"{path}: {8 + length + end:,} bytes are announced but the file has {size:,}; it was cut short."
        )
    return {name: t for name, t in header.items() if name != "__metadata__"}


def tensors_info(path: Path) -> TensorsInfo:
    """Count what a safetensors file holds, from its header."""
    header = read_safetensors_header(path)
    dtypes: Counter[str] = Counter()
    for tensor in header.values():
        dtypes[tensor["dtype"]] += math.prod(tensor["shape"])
    return TensorsInfo(len(header), sum(dtypes.values()), dict(dtypes), path.stat().st_size)


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json`` of a model directory.

    Raises:
        LoadError: Missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise LoadError(f"{folder}: no config.json, so it is no model directory.") from e
    except ValueError as e:
        raise LoadError(f"{path}: not JSON ({e}).") from e
    if not isinstance(config, dict):
        raise LoadError(f"{path}: must hold a JSON object, got a {type(config).__name__}.")
    return config


def context_of(spec: Mapping[str, Any]) -> str:
    """Say how much a model reads at once, from the spec of its ``config.json``."""
    domain = spec.get("domain")
    if domain == "vision":
        return f"{spec.get('height')} x {spec.get('width')} px"
    if domain == "speech":
        return f"any, {spec.get('sample_rate', 0) / 1000:g} kHz"
    if domain == "action":
        return f"{spec.get('tokenizer', {}).get('horizon')} steps, {spec.get('fps'):g} Hz"
    for field, unit in (("context", "steps"), ("max_faces", "faces"), ("max_length", "tokens")):
        if isinstance(spec.get(field), int):
            return f"{spec[field]:,} {unit}"
    return ""


def licence_of(card: Path) -> str:
    """Return the first words of a model card's section on its licence; nothing where there is no card."""
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    found = re.search(r"^## Licence\s+(.+?)(?:[.,;](?:\s|$)|\n)", text, re.MULTILINE)
    return found[1].removeprefix("Weights: ") if found else ""
