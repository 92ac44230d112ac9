"""What the readers of published language models share: settings, names of tensors, and how something is refused.

A family reads a checkpoint into a ``Published``: the config of a backbone of ours, and the tensors by the names of a
model with the parts ``embed``, ``backbone`` and ``head``. What a config says that ours cannot do is a ``LoadError``
that names the setting and its value; settings that no output depends on are not looked at.

Shapes: V vocabulary, D width, H heads, K head width.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from vertebra.backbones.base import BackboneConfig
from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.errors import LoadError

Head = Literal["own", "tied", "none"]
"""A matrix of its own, the embedding's, or no head at all."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """A published language model in our terms.

    Args:
        config: Of the backbone.
        tensors: ``embed.weight`` (V, D), ``backbone.*``, and ``head.weight`` (V, D) with a head of its own. A name
            that no rule translates is kept, so that strict loading shows it.
        head: What maps features to logits.
        left_out: Names of tensors without a place in ours, each with the reason.
        notes: Sections for the model's card.
    """

    config: BackboneConfig
    tensors: dict[str, Tensor]
    head: Head
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, str] = field(default_factory=dict)


class PublishedFamily(ABC):
    """One way in which language models are published."""

    name: ClassVar[str]
    """For the command line."""
    summary: ClassVar[str]
    """What it reads: a line."""

    @abstractmethod
    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell from config, files or names of tensors whether a checkpoint is of this family; never raises."""

    @abstractmethod
    def read(self, checkpoint: Checkpoint) -> Published:
        """Read a checkpoint.

        Raises:
            LoadError: It does what ours cannot, or its config and tensors contradict each other.
        """

    def write(
        self, config: BackboneConfig, tensors: Mapping[str, Tensor], head: Head
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and ``config.json`` as the family has them.

        Args:
            config: Of the backbone.
            tensors: As in ``Published``.
            head: As in ``Published``.

        Raises:
            LoadError: The family's format is not written, or has no such backbone.
        """
        raise LoadError(f"{self.name}: models of ours are not written in this family's format.")


class Settings:
    """Settings of a published model; a setting that is null counts as not there.

    Args:
        source: What the user calls the checkpoint.
        values: The settings.
        where: The file they stand in, or the part of it.
    """

    def __init__(self, source: str, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.source, self.where = source, where
        self.values = {name: value for name, value in values.items() if value is not None}

    def part(self, name: str) -> Settings:
        """Return the settings under one name; none where it is not there.

        Raises:
            LoadError: It is no object.
        """
        found = self.values.get(name, {})
        if not isinstance(found, dict):
            self.refuse(name, "it must be a JSON object")
        return Settings(self.source, found, f"{name} of {self.where}")

    def integer(self, *names: str, default: int | None = None) -> int:
        """Return the first of these settings that is there, a positive int, or the default.

        Raises:
            LoadError: None of them is there and there is no default, or it is no such number.
        """
        name = self._first(names, default)
        if name is None:
            assert default is not None
            return default
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.refuse(name, "it must be a whole number of at least 1")
        return value

    def number(self, *names: str, default: float | None = None) -> float:
        """Return the first of these settings that is there, a float of at least 0, or the default.

        Raises:
            LoadError: As in ``integer``.
        """
        name = self._first(names, default)
        if name is None:
            assert default is not None
            return default
        value = self.values[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            self.refuse(name, "it must be a number of at least 0")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        """Return a setting that is true or false.

        Raises:
            LoadError: It is neither.
        """
        value = self.values.get(name, default)
        if not isinstance(value, bool):
            self.refuse(name, "it must be true or false")
        return value

    def expect(self, name: str, *allowed: Any, why: str) -> None:
        """Refuse a setting of another value than these; one that is not there has the first of them.

        Raises:
            LoadError: It has another value.
        """
        if self.values.get(name, allowed[0]) not in allowed:
            self.refuse(name, why)

    def agree(self, found: object, *names: str) -> None:
        """Refuse settings that say otherwise than the tensors; one that is ``auto`` says nothing.

        Raises:
            LoadError: One does.
        """
        for name in names:
            if (value := self.values.get(name, found)) not in (found, "auto"):
                raise LoadError(
                    f"{self.source}: {name} is {value!r} in {self.where}, but the weights have {found!r}; both must "
                    "be of one model."
                )

    def refuse(self, name: str, why: str) -> NoReturn:
        """Raise the error that a setting cannot be converted."""
        shown = repr(self.values.get(name))
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        raise LoadError(f"{self.source}: {name} = {shown} in {self.where} cannot be converted: {why}.")

    def _first(self, names: tuple[str, ...], default: float | None) -> str | None:
        found = next((name for name in names if name in self.values), None)
        if found is None and default is None:
            raise LoadError(
                f"{self.source}: {self.where} must say {' or '.join(names)}; get the whole folder of the model."
            )
        return found


# ---------------------------------------------------------------- what is recognised


def told_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return ``config.json``; empty where there is none, or none that can be read."""
    try:
        return checkpoint.config
    except (LoadError, OSError):
        return {}


def told_names(checkpoint: Checkpoint) -> Collection[str]:
    """Return the names of the tensors; none where they cannot be read."""
    try:
        return checkpoint.tensors.keys()
    except (LoadError, OSError):
        return ()


def told_kind(checkpoint: Checkpoint) -> str:
    """Return ``model_type`` of ``config.json``, or the beginning of its first architecture; else nothing."""
    config = told_config(checkpoint)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind:
        return kind
    classes = config.get("architectures")
    first = classes[0] if isinstance(classes, list) and classes else None
    return first.partition("For")[0].removesuffix("Model").lower() if isinstance(first, str) else ""


_CLASSIFIER = re.compile(r"(\w+?)For(?:SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)")

# ---------------------------------------------------------------- tensors

_PARAMETER = re.compile(r"(\w+\.)?(weight|bias)|A_log|D|dt_bias")


class Renamer:
    """Names of a family to names of ours.

    Args:
        outside: Whole names, theirs to ours.
        layer: Pattern of the names inside a layer, with groups for its number and the rest.
        inside: What the rest begins with, theirs to ours; the first that fits is taken.
    """

    def __init__(self, outside: Mapping[str, str], layer: str, inside: Mapping[str, str]) -> None:
        self.outside, self.layer, self.inside = dict(outside), re.compile(layer), dict(inside)

    def __call__(self, name: str) -> str:
        """Return our name; the same where there is none."""
        if name in self.outside:
            return self.outside[name]
        if (match := self.layer.fullmatch(name)) is None:
            return name
        number, rest = match.groups()
        for theirs, ours in self.inside.items():
            if rest.startswith(theirs) and _PARAMETER.fullmatch(rest, len(theirs)):
                return f"backbone.layers.{number}.{ours}{rest[len(theirs) :]}"
        return name

    def all(self, tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
        """Rename tensors.

        Raises:
            LoadError: Two of them have one name of ours.
        """
        found: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            ours = self(name)
            if ours in found:
                raise LoadError(f"{source}: two tensors are {ours}, one of them {name!r}; the file is of no one model.")
            found[ours] = tensor
        return found


def need(tensors: Mapping[str, Tensor], name: str, source: str, axes: int = 2) -> Tensor:
    """Return a tensor that the structure is read from.

    Raises:
        LoadError: It is not there, or has another number of axes.
    """
    if name not in tensors:
        raise LoadError(f"{source}: there is no tensor for {name}; is the checkpoint whole?")
    if tensors[name].ndim != axes:
        raise LoadError(f"{source}: {name} must have {axes} axes, got {tuple(tensors[name].shape)}.")
    return tensors[name]


def count_layers(tensors: Iterable[str], source: str) -> int:
    """Return the number of layers, from names of ours.

    Raises:
        LoadError: There is none, or one is missing between others.
    """
    numbers = {int(m[1]) for name in tensors if (m := re.match(r"backbone\.layers\.(\d{1,6})\.", name))}
    if not numbers or len(numbers) != max(numbers) + 1:
        raise LoadError(
            f"{source}: the layers in the file are {sorted(numbers)[:8]}, not a whole stack; is the checkpoint whole?"
        )
    return len(numbers)


def fuse(tensors: dict[str, Tensor], names: Iterable[str], ours: str) -> None:
    """Put tensors together along axis 0, in place, where all of them are there and fit."""
    names = list(names)
    parts = [tensors[name] for name in names if name in tensors]
    if len(parts) == len(names) and len({p.shape[1:] for p in parts}) == 1 and len({p.dtype for p in parts}) == 1:
        tensors[ours] = torch.cat(parts)
        for name in names:
            del tensors[name]


def settle_head(tensors: dict[str, Tensor], settings: Settings, name: str, default: bool, bare: bool) -> Head:
    """Tell what the head is, and drop the copy of the embedding that files of tied models may hold.

    Args:
        tensors: By names of ours, changed in place.
        settings: Of the model.
        name: The setting that ties head and embedding.
        default: Its value where it is not there.
        bare: Whether the file is of a model without a head.

    Raises:
        LoadError: The head of a tied model is another matrix.
    """
    if bare and "head.weight" not in tensors:
        return "none"
    if not settings.flag(name, default):
        return "own"
    head, embed = tensors.get("head.weight"), tensors.get("embed.weight")
    if head is not None and embed is not None and not torch.equal(head, embed):
        settings.values[name] = True
        settings.refuse(name, "the file has a head that is not the embedding; set it to false if the head is right")
    tensors.pop("head.weight", None)
    return "tied"


def rope_theta(settings: Settings) -> float:
    """Return the base of plain rotary embedding, from either place where transformers keeps it.

    Raises:
        LoadError: The wavelengths are scaled.
    """
    for name in ("rope_parameters", "rope_scaling"):
        found = settings.part(name).values
        if found.get("rope_type", found.get("type", "default")) != "default":
            settings.refuse(name, "its rotary wavelengths are scaled, ours are plain")
    return settings.part("rope_parameters").number("rope_theta", default=settings.number("rope_theta", default=1e4))


def check_plain(settings: Settings) -> None:
    """Refuse weights that are not numbers as they are, and models that end in something else than words.

    Raises:
        LoadError: They are quantized, or the model is a classifier.
    """
    classes = settings.values.get("architectures")
    for name in classes if isinstance(classes, list) else ():
        if isinstance(name, str) and (found := _CLASSIFIER.fullmatch(name)):
            settings.refuse(
                "architectures",
                f"it is a classifier, not a language model, and its head has no place here; save the {found[1]}Model "
                "inside of it and convert that",
            )
    if "quantization_config" in settings.values:
        settings.refuse("quantization_config", "the weights are quantized; give the model's float weights")
