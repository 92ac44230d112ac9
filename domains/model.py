"""The base of every domain's model: plain torch, so that loading and running one needs no Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.backbones.loading.pretrained import Adapter
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError


@dataclass(frozen=True)
class Origin:
    """What is known of the model that weights are of.

    Args:
        spec: Facts about its data; None where only the weights are known.
        arguments: Its constructor's named arguments, or those of the task that made it.
        backbone: Its backbone; None where only the weights are known.
    """

    spec: DataSpec | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    backbone: BackboneConfig | None = None


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
    output_parts: ClassVar[tuple[str, ...]] = ()
    """Names of submodules behind the backbone that end it, such as a norm: its initial weights include theirs."""

    def __init__(self, backbone: Backbone, spec: DataSpec, **arguments: Any) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec
        self.arguments = arguments

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        return set()

    def token_logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits (B, L, V) of a batch of its domain's data, and the token each is asked for (B, L), or -100.

        What a language model must know to be distilled; see ``domains/distillation.py``.

        Raises:
            ConfigError: The model is no language model that can be distilled.
        """
        raise ConfigError(f"{type(self).__name__} gives no logits of tokens one by one, which distillation needs.")

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """Declare, by names of tensors, how weights of a like model become those of this one.

        A tensor without an adapter is taken where it has the same shape, and stays fresh where it has not.

        Args:
            origin: What the weights are of.
        """
        return {}

    def adapt(self, tensors: Mapping[str, Tensor], origin: Origin | None = None) -> dict[str, Tensor]:
        """Change weights of a like model, by name, to the shapes of this one, where that was declared."""
        own, declared = self.state_dict(), self.adapters(origin or Origin())
        changed = dict(tensors)
        for name in declared.keys() & tensors.keys() & own.keys():
            found = declared[name](name, tensors[name], own[name])
            if found is not None:
                changed[name] = found[0] if isinstance(found, tuple) else found
        return changed
