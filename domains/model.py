"""The base of every domain's model: plain torch, so that loading and running one needs no Lightning."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.domains.spec import DataSpec


class DomainModel(nn.Module):
    """Input adapter, backbone and head.

    Subclasses take ``(backbone, spec, **named arguments)`` and pass the named ones, JSON-able, to this constructor;
    a model directory stores them.

    Args:
        backbone: The shared part.
        spec: Facts about the data.
        **arguments: The subclass's other constructor arguments.
    """

    task: ClassVar[str]
    input_parts: ClassVar[tuple[str, ...]] = ("embed",)
    """Names of the submodules before the backbone; layer-wise learning rates count them as its layer -1."""

    def __init__(self, backbone: Backbone, spec: DataSpec, **arguments: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.arguments = arguments

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        return set()

    def adapt(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Change weights of a like model, by name, to the shapes of this one, where that has a meaning."""
        return tensors
