"""Files from elsewhere, read with care and without torch: JSON, headers of safetensors files, links.

Nothing here trusts a size, a name or a nesting that a file states before it was checked against the file itself.
"""

from __future__ import annotations

import json
import math
import os
import struct
from pathlib import Path
from typing import Any

from vertebra.errors import LoadError

MOST_JSON = 16 << 20  # bytes; Python objects take up to thirty times as much
_LONGEST_HEADER = 25_000_000  # bytes; the limit of the hub
_LONGEST_NAME = 255  # bytes; the limit of common file systems
_MOST_AXES = 64  # of a tensor; the limit of torch
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E5M2FNUZ", "F8_E4M3FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


def read_json(path: Path, *, finite: bool = True) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: The file.
        finite: Whether to refuse NaN and the infinities, which JSON does not have but Python writes and reads.

    Raises:
        LoadError: It cannot be read, is too long, nested too deeply, names a key twice, or holds no JSON object.
    """
    try:
        if path.stat().st_size > MOST_JSON:
            raise LoadError(f"{path}: too long for a JSON file of a model ({path.stat().st_size:,} bytes).")
        return parse_json(path.read_bytes(), str(path), finite=finite)
    except OSError as e:
        raise LoadError(f"{path}: cannot be read ({e.strerror or e}).") from e


def parse_json(content: bytes, name: str, *, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object of UTF-8; ``name`` is what errors call it, the rest as in ``read_json``."""

    def constant(word: str) -> float:
        if finite:
            raise ValueError(f"{word} is no number of JSON")
        return float(word)

    def number(text: str) -> float:
        value = float(text)
        if finite and math.isinf(value):
            raise ValueError(f"{text[:20]} is too large")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice[:80]!r} stands twice")
        return found

    try:
        found = json.loads(
            content.decode("utf-8"), parse_constant=constant, parse_float=number, object_pairs_hook=unique
        )
    except RecursionError:
        raise LoadError(f"{name}: not readable as JSON (nested too deeply).") from None
    except ValueError as e:
        raise LoadError(f"{name}: not readable as JSON ({_short(str(e))}).") from e
    if not isinstance(found, dict):
        raise LoadError(f"{name}: must hold a JSON object, got a {type(found).__name__}.")
    return found


def read_safetensors_header(path: Path) -> dict[str, dict[str, Any]]:
    """Return ``{tensor name: {"dtype", "shape", "data_offsets"}}`` of a safetensors file.

    Every entry is checked: known type, sizes that fill the file from its first to its last byte, each byte once.

    Raises:
        LoadError: Missing, truncated, or of another format.
    """
    if path.is_dir():
        raise LoadError(f"{path}: must be a file, is a folder.")
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            start = f.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise LoadError(f"{path}: not a safetensors file, or cut short; get or write it again.")
            content = f.read(length)
    except FileNotFoundError as e:
        raise LoadError(f"{path}: no such file.") from e
    except OSError as e:
        raise LoadError(f"{path}: cannot be read ({e.strerror or e}).") from e
    try:
        if content[:1] != b"{":
            raise LoadError("it does not begin with a brace")
        header = parse_json(content, "header")
        header.pop("__metadata__", None)
        spans = sorted(_span(name, entry) for name, entry in header.items())
        end = 0
        for first, last in spans:
            if first != end:
                raise LoadError(f"byte {min(first, end)} belongs to {'two tensors' if first < end else 'none'}")
            end = last
    except LoadError as e:
        raise LoadError(f"{path}: the header is not that of a safetensors file ({e}); get or write it again.") from e
    if 8 + length + end > size:
        raise LoadError(
            f"{path}: {8 + length + end:,} bytes are announced but the file has {size:,}; it was cut short."
        )
    if 8 + length + end < size:
        raise LoadError(f"{path}: no whole safetensors file, {size - 8 - length - end:,} bytes follow its last tensor.")
    return header


def _span(name: str, entry: object) -> tuple[int, int]:
    """Return the first byte of a tensor and the one behind its last, from its entry in a header."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise LoadError(f"{_short(name)!r} is described otherwise than by dtype, shape and data_offsets")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not isinstance(entry["dtype"], str) or entry["dtype"] not in _BITS:
        raise LoadError(f"{_short(name)!r} has the unknown type {_short(repr(entry['dtype']))}")
    if not _counts(shape) or not _counts(offsets) or len(offsets) != 2 or len(shape) > _MOST_AXES:
        raise LoadError(f"{_short(name)!r} has no shape or place that can be")
    bits = math.prod(shape) * _BITS[entry["dtype"]]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise LoadError(f"{_short(name)!r} of shape {_short(str(shape))} does not fill its place")
    return offsets[0], offsets[1]


def _counts(values: object) -> bool:
    return isinstance(values, list) and all(type(v) is int and 0 <= v < 1 << 63 for v in values)


def inside(folder: Path, name: str) -> Path | None:
    """Return the file ``name`` of a folder, or None where there is none.

    Links may lead to files in the folder, and in a cache of the hub to files of that cache.

    Raises:
        LoadError: It is a link that leads elsewhere.
    """
    path = folder / name
    if not path.is_file():
        return None
    root = folder.resolve()
    if root.parent.name == "snapshots" and root.parent.parent.name.startswith("models--"):
        root = root.parent.parent.parent  # files of the hub's cache are links to where their content is
    target = path.resolve()
    if not target.is_relative_to(root):
        raise LoadError(
            f"{path}: a link that leads out of its folder, to {target}; copy the file there if you trust it."
        )
    return path


def is_plain_name(name: object) -> bool:
    """Whether a name that a file gives is that of a file beside it, and no path."""
    if not isinstance(name, str) or name in ("", ".", "..") or set(name) & {"/", "\\", "\0", os.sep, ":"}:
        return False
    return len(name.encode("utf-8", "replace")) <= _LONGEST_NAME


def _short(text: str, most: int = 100) -> str:
    text = text.encode("unicode_escape", "backslashreplace").decode("ascii") if not text.isprintable() else text
    return text if len(text) <= most else text[: most - 3] + "..."
