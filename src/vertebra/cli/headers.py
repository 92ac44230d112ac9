"""Model directories as their headers tell them, read without torch."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vertebra.backbones.loading.files import inside, read_json, read_safetensors_header
from vertebra.errors import LoadError

__all__ = ["TensorsInfo", "context_of", "licence_of", "read_model_config", "read_safetensors_header", "tensors_info"]


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
        LoadError: Missing, no JSON object, or a link out of the folder.
    """
    path = inside(folder, "config.json")
    if path is None:
        raise LoadError(f"{folder}: no config.json, so it is no model directory.")
    return read_json(path)


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
