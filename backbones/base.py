"""The contract every backbone keeps, and the registry of presets.

Shapes: B batch, T positions (grid axes in raster order), D width.

A backbone maps features to features of the same shape. Embedding, head and loss are the domain's. One call
form serves all: ``backbone(x, mask, segments)``, with True = real position. Causal backbones also decode:
``init_state`` once, then ``step`` with a prompt of any length and one or more positions at a time. A model reads the
features inside a backbone through ``hidden``, and changes them through ``taps``.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from vertebra.backbones.catalog import ADAPTERS, families, presets
from vertebra.errors import ConfigError, ShapeError, UnknownNameError

C = TypeVar("C", bound="BackboneConfig")

_FAMILIES: dict[str, type[BackboneConfig]] = {}


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Shape and structure of a backbone; plain JSON-able fields.

    Args:
        dim: Width D of the features.
        depth: Number of layers.
        causal: Whether an output may depend on earlier positions only.
    """

    dim: int
    depth: int
    causal: bool = True

    family: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.family:
            _FAMILIES[cls.family] = cls
        torch.serialization.add_safe_globals([cls])  # checkpoints made in Python load with weights_only=True

    def __post_init__(self) -> None:
        for name in ("dim", "depth"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be at least 1, got {getattr(self, name)}.")

    def encoder(self: C) -> C:
        """Return the config of a bidirectional encoder of the same structure."""
        return self.replace(causal=False)

    def build(self) -> Backbone:
        """Make the backbone with fresh weights."""
        raise TypeError(f"{type(self).__name__} is abstract; use a family's config or the name of a preset.")

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"family": ..., field: value}``, ready for JSON."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"family": self.family, **fields}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> BackboneConfig:
        """Make the config that ``to_dict`` described.

        Raises:
            UnknownNameError: No such family.
            ConfigError: A field the family does not have.
        """
        fields = dict(values)
        cls = config_class(str(fields.pop("family", "")))
        return cls(**_checked_fields(cls, fields))

    def unlike(self, other: BackboneConfig) -> dict[str, tuple[Any, Any]]:
        """Return what makes this backbone compute something else than another: by field, its value and the other's.

        Fields that only matter in training are left out; a family that differs stands for all others.
        """
        if self.family != other.family:
            return {"family": (self.family, other.family)}
        fields = [f.name for f in dataclasses.fields(self) if f.name not in ("dropout", "drop_path", "res_init_scale")]
        pairs = {name: (self._effective(name), other._effective(name)) for name in fields}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def _effective(self, name: str) -> Any:
        value = getattr(self, name)
        return getattr(self, "num_heads") if name == "num_kv_heads" and not value else value  # noqa: B009

    def replace(self: C, **changes: Any) -> C:
        """Return a copy with some fields changed.

        Raises:
            ConfigError: A field the family does not have.
        """
        return dataclasses.replace(self, **_checked_fields(type(self), changes))


def _checked_fields(cls: type[BackboneConfig], values: dict[str, Any]) -> dict[str, Any]:
    known = [f.name for f in dataclasses.fields(cls)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{cls.__name__} has no field {name!r}.{hint} Fields: {', '.join(known)}.")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}


class State(ABC):
    """What a causal backbone remembers between two calls of ``step``."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory held, in bytes."""

    @property
    @abstractmethod
    def growth(self) -> str:
        """How memory grows with the position.

        ``constant``, ``ring`` (up to a window), ``rows`` or ``groups`` (with every finished one), or ``linear``.
        """

    @abstractmethod
    def select(self, indices: Tensor) -> State:
        """Keep the batch items ``indices`` (N,), in that order, with repeats: beams, or items that go on."""

    def fork(self) -> State:
        """Return an independent copy."""
        return self.select(torch.arange(self.batch_size))

    @property
    @abstractmethod
    def batch_size(self) -> int:
        """Number of items B."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered by name, ``batch`` among it, to save it."""

    @abstractmethod
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned; this state must be fresh and of the same backbone and batch size.

        Raises:
            LoadError: The tensors are those of another backbone.
        """


Tap = Callable[[Tensor], Tensor]
"""Maps features (B, *grid, D) to what stands in their place."""


@dataclass(frozen=True)
class Taps:
    """What a model does to the features inside a backbone, by index of the layer.

    A tap gets all positions (B, *grid, D), padding included, and returns the same shape. What stands at padding means
    nothing. Taps are neither cut into pieces nor recomputed under ``set_recompute``.

    Args:
        inside: Applied at the end of the layer's branches, before the layer's own closing norm where it has one;
            elsewhere to the layer's output, before ``hidden`` and ``after``.
        after: Applied to the layer's output; what it returns goes on to the next layer, or to the last norm.
    """

    inside: Mapping[int, Tap] = field(default_factory=dict)
    after: Mapping[int, Tap] = field(default_factory=dict)


class Between:
    """What happens between the layers of one pass: features are kept in ``hidden`` and changed by ``taps``.

    Args:
        backbone: Whose layers they are.
        hidden: Receives the output of every layer, in the caller's shape; None where nobody asked.
        taps: Of the caller; None for none.
        out: Maps a layer's features to the caller's shape.
        into: Maps what a tap returned, and the layer's features before it, to the layer's shape.

    Raises:
        ConfigError: A tap is for a layer that the backbone does not have.
    """

    def __init__(
        self,
        backbone: Backbone,
        hidden: list[Tensor] | None,
        taps: Taps | None,
        out: Tap = lambda x: x,
        into: Callable[[Tensor, Tensor], Tensor] = lambda x, old: x,
    ) -> None:
        self.hidden, self.taps, self.out, self.into = hidden, taps, out, into
        self.name = type(backbone).__name__
        if taps is not None:
            for part, places in (("inside", taps.inside), ("after", taps.after)):
                self._check_places(part, places, backbone.num_layers)

    def __call__(self, index: int, x: Tensor) -> Tensor:
        """Return what goes on from layer ``index``, whose features before any tap are x."""
        return self.after(index, self.inside(index, x))

    def inside(self, index: int, x: Tensor) -> Tensor:
        """Apply the inner tap of layer ``index``."""
        return x if self.taps is None else self._apply("inside", self.taps.inside, index, x)

    def after(self, index: int, x: Tensor) -> Tensor:
        """Keep the output x of layer ``index`` and apply the outer tap."""
        if self.hidden is not None:
            self.hidden.append(self.out(x))
        return x if self.taps is None else self._apply("after", self.taps.after, index, x)

    def _apply(self, part: str, places: Mapping[int, Tap], index: int, x: Tensor) -> Tensor:
        if index not in places:
            return x
        given = self.out(x)
        y = places[index](given)
        if y.shape != given.shape:
            raise ShapeError(
                f"{self.name}: the tap {part}[{index}] must return the shape it gets, {tuple(given.shape)}, "
                f"got {tuple(y.shape)}."
            )
        return self.into(y, x)

    def _check_places(self, part: str, places: Iterable[int], layers: int) -> None:
        for index in places:
            if not 0 <= index < layers:
                raise ConfigError(
                    f"{self.name}: taps.{part} has a tap for layer {index}, but the layers are 0 to {layers - 1}."
                )


class Backbone(nn.Module, ABC):
    """Features (B, *grid, D) to features (B, *grid, D)."""

    position_tables: ClassVar[tuple[str, ...]] = ()
    """Names of parameters with a row a position, which weights of a shorter context fill in part."""
    config: BackboneConfig

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        hidden: list[Tensor] | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D).

        Args:
            x: Features, one to three grid axes.
            mask: Real positions, bool (B, *grid); None when all are.
            segments: Index of the packed sequence each position belongs to, int (B, T); positions see their own
                sequence only. None when a row is one sequence.
            hidden: A list that receives the output (B, *grid, D) of every layer, before the final norm and before the
                tap ``after`` of that layer.
            taps: What to do to the features between the layers.

        Raises:
            ShapeError: The shapes disagree with each other or with ``config.dim``, or a tap returns another shape.
            ConfigError: A tap is for a layer that the backbone does not have.
        """

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """Make the empty state for up to ``max_len`` positions.

        Raises:
            ConfigError: The backbone is not causal.
        """
        raise ConfigError(f"{type(self).__name__} (causal={self.config.causal}) does not decode step by step.")

    def step(self, x: Tensor, state: State, mask: Tensor | None = None, taps: Taps | None = None) -> Tensor:
        """Map the next T positions x (B, T, D) to (B, T, D) and advance ``state`` in place.

        Args:
            x: Features of the next positions, T >= 1.
            state: From ``init_state``, or advanced by earlier calls.
            mask: Real positions, bool (B, T). Padding may only stand on the left of the first call.
            taps: As in ``forward``; they get the new positions alone.

        Raises:
            ConfigError: The backbone is not causal, or it takes no taps step by step.
        """
        raise ConfigError(f"{type(self).__name__} (causal={self.config.causal}) does not decode step by step.")

    def set_recompute(self, recompute: bool, piece: int | None = None) -> None:
        """Trade time for memory in training: keep little more than each layer's input, compute the rest again.

        Args:
            recompute: Whether to.
            piece: Positions that are worked on at a time; None for what suits the device.

        Raises:
            ConfigError: This family cannot.
        """
        raise ConfigError(f"{type(self).__name__} cannot recompute its layers; train it with recompute=false.")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that weight decay must leave alone."""
        return set()

    def read_last(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to the features (B, D) of the last position alone."""
        return self(x)[:, -1]

    @property
    def num_layers(self) -> int:
        """Number of layers, as layer-wise learning rates count them."""
        return self.config.depth

    def layer_of(self, name: str) -> int:
        """Index of the layer the parameter ``name`` belongs to; ``num_layers`` for what follows the last one."""
        for part, index in zip(name.split("."), name.split(".")[1:], strict=False):
            if part == "layers" and index.isdigit():
                return int(index)
        return self.num_layers

    def _check(self, x: Tensor, mask: Tensor | None, segments: Tensor | None) -> None:
        if not 3 <= x.ndim <= 5 or x.shape[-1] != self.config.dim:
            raise ShapeError(
                f"{type(self).__name__}: x must be (B, *grid, {self.config.dim}) with one to three grid axes, "
                f"got {tuple(x.shape)}."
            )
        if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
            raise ShapeError(
                f"{type(self).__name__}: mask must be bool {tuple(x.shape[:-1])} (True = real position), "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        if segments is not None and segments.shape != (x.shape[0], math.prod(x.shape[1:-1])):
            raise ShapeError(
                f"{type(self).__name__}: segments must be (B, T) = {(x.shape[0], math.prod(x.shape[1:-1]))}, "
                f"got {tuple(segments.shape)}."
            )


# ---------------------------------------------------------------- registry


def preset(*, params: int) -> Callable[[Callable[[], C]], Callable[[], C]]:
    """Mark a function without arguments as the preset of its name.

    The function's first docstring line, ``params`` and the literal arguments of its ``return`` are what
    ``vertebra list`` shows; they are read from the source, so that listing needs no torch.

    Args:
        params: Number of parameters, checked by a test.
    """

    def register(function: Callable[[], C]) -> Callable[[], C]:
        function.__dict__["params"] = params
        return function

    return register


def config_class(family: str) -> type[BackboneConfig]:
    """Return the config class of a family, importing its file.

    Raises:
        UnknownNameError: No such family.
    """
    if family not in (*families(), *ADAPTERS):
        raise UnknownNameError("backbone family", family, families())
    import_module(f"vertebra.backbones.{family}")
    return _FAMILIES[family]


def resolve(backbone: BackboneConfig | str, **changes: Any) -> BackboneConfig:
    """Return the config a user's word stands for.

    Args:
        backbone: A config; or a preset's name, a bundled model's name, ``local-dir:PATH``, ``hf-hub:ORG/NAME``, or
            ``timm:NAME`` for an image model of timm, each optionally followed by changed fields:
            ``illama_nano,causal=false,depth=6``.
        **changes: Fields to replace, last.

    Raises:
        UnknownNameError: No preset and no bundled model of that name; the text names the nearest.
        ConfigError: A changed field the family does not have.
    """
    if isinstance(backbone, str):
        name, fields = split_name(backbone)
        changes = {**fields, **changes}
        if is_pretrained(name):
            from vertebra.backbones.loading.pretrained import read_backbone_config

            config = read_backbone_config(name)
        elif name.startswith("timm:"):
            from vertebra.backbones.timm import timm_config

            return timm_config(name.removeprefix("timm:"), changes)
        else:
            config = _preset_config(name)
    else:
        config = backbone
    return config.replace(**changes) if changes else config


def create_backbone(backbone: BackboneConfig | str, **changes: Any) -> Backbone:
    """Build a backbone; with its weights where the name is a pretrained one.

    Args:
        backbone: As in ``resolve``.
        **changes: Fields of the config to replace.
    """
    built = resolve(backbone, **changes).build()
    if isinstance(backbone, str) and is_pretrained(name := split_name(backbone)[0]):
        from vertebra.backbones.loading.pretrained import load_backbone

        load_backbone(built, name)
    return built


def is_pretrained(name: str) -> bool:
    """Whether the name means saved weights: ``hf-hub:``, ``local-dir:``, or a bundled model."""
    from vertebra.backbones.catalog import bundled_models

    return name.startswith(("hf-hub:", "local-dir:")) or name in bundled_models()


def split_name(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name,field=value,...`` into the name and its fields; values are JSON, or else strings."""
    name, *pairs = re.split(r",(?![^\[]*\])", text)  # not inside a list
    fields: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"backbone {text!r}: {pair!r} must be field=value, as in 'illama_nano,depth=6'.")
        try:
            fields[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            fields[key.strip()] = value
    return name.strip(), fields


def _preset_config(name: str) -> BackboneConfig:
    from vertebra.backbones.catalog import bundled_models
    from vertebra.backbones.loading.places import check_source

    known = presets()
    if name not in known:
        check_source(name)
        if "/" in name or name.startswith("."):
            raise UnknownNameError("backbone", name, [f"local-dir:{name} (a folder)", f"hf-hub:{name} (a repository)"])
        raise UnknownNameError("backbone", name, [*known, *bundled_models()])
    module = import_module(f"vertebra.backbones.{known[name].family}")
    config = getattr(module, name)()
    assert isinstance(config, BackboneConfig)
    return config
