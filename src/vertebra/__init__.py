"""Shared sequence backbones that plug into Lightning data and task modules of many domains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vertebra.backbones.base import create_backbone
    from vertebra.pipelines.base import pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "create_backbone", "pipeline"]

_LAZY = {
    "create_backbone": "vertebra.backbones.base",
    "pipeline": "vertebra.pipelines.base",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vertebra' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
