"""Shared sequence backbones that plug into Lightning data and task modules of many domains."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vertebra.backbones.base import create_backbone
    from vertebra.domains.loading import load, load_backbone
    from vertebra.pipelines.base import pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "create_backbone", "load", "load_backbone", "pipeline"]

_LAZY = {
    "create_backbone": "vertebra.backbones.base",
    "load": "vertebra.domains.loading",
    "load_backbone": "vertebra.domains.loading",
    "pipeline": "vertebra.pipelines.base",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vertebra' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)


class _AfterTimm:
    """Enters our image models into timm's registry once somebody imports timm; importing us stays fast."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm.models":
            return None
        from importlib.machinery import PathFinder

        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(name, path)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                import vertebra.domains.vision.registry  # noqa: F401

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "timm.models" in sys.modules:
    import vertebra.domains.vision.registry  # noqa: F401
else:
    sys.meta_path.insert(0, _AfterTimm())
