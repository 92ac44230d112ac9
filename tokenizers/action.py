"""What all tokenizers of actions share: chunks of actions to ids or to continuous tokens, and back.

Shapes: B chunks, T steps, D action dimensions, L tokens of a chunk, N tokens of one dimension (L = N * D).
"""

from __future__ import annotations

import inspect
import json
import math
import re
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from vertebra.errors import ConfigError, ShapeError, UnknownNameError
from vertebra.tokenizers.base import Tokenizer

NONE = -1
"""What stands behind the end of a chunk that has fewer tokens than others."""
QUANTILES = (0.01, 0.99)
"""Shares of the values that lie below the bounds, as published."""


class ActionTokenizer(Tokenizer):
    """Chunks of actions (B, T, D) <-> ids (B, L).

    A tokenizer is made with what the user decides and learns the rest (bounds, merges) from data by ``fit``, which
    gives a new one. Columns that are angles are unwrapped along time before anything else and come back in
    (-pi, pi]; of quaternions the sign is made continuous, and they come back with norm 1.

    Args:
        horizon: Steps T of a chunk.
        dims: Action dimensions D.
        vocab_size: Number of ids.
        angles: Columns that are angles in radians and jump by 2 pi.
        quaternions: First columns of quaternions; each takes four.

    Raises:
        ConfigError: A number below 1, or a column that does not exist or is named twice.
    """

    fields: ClassVar[tuple[str, ...]] = ("horizon", "dims", "vocab_size", "angles", "quaternions")
    varies: ClassVar[bool] = False
    """Whether chunks differ in their number of tokens; ids then end in ``NONE``."""

    def __init__(
        self,
        *,
        horizon: int,
        dims: int,
        vocab_size: int = 256,
        angles: Sequence[int] = (),
        quaternions: Sequence[int] = (),
    ) -> None:
        for name, value, least in (("horizon", horizon, 1), ("dims", dims, 1), ("vocab_size", vocab_size, 2)):
            if value < least:
                raise ConfigError(f"{type(self).__name__}: {name} must be at least {least}, got {value}.")
        self.horizon, self.dims, self.vocab_size = horizon, dims, vocab_size
        self.angles, self.quaternions = tuple(angles), tuple(quaternions)
        used = [*self.angles, *(first + i for first in self.quaternions for i in range(4))]
        if len(set(used)) < len(used) or not all(0 <= column < dims for column in used):
            raise ConfigError(
                f"{type(self).__name__}: angles {list(self.angles)} and quaternions {list(self.quaternions)} (four "
                f"columns each) must be different columns from 0 to {dims - 1}."
            )

    # ---------------------------------------------------------------- what a subclass defines

    @property
    @abstractmethod
    def length(self) -> int:
        """L, tokens of a chunk; the most there can be where it varies."""

    @property
    @abstractmethod
    def sizes(self) -> Tensor:
        """Parts of a chunk that each id stands for, (V,); those of a chunk sum to the most tokens, ``length``."""

    @property
    @abstractmethod
    def is_fitted(self) -> bool:
        """Whether ``fit`` has been called, or its results were given."""

    @abstractmethod
    def fit(self, chunks: Tensor, start: Tensor | None = None, *, quantiles: tuple[float, float] = QUANTILES) -> Self:
        """Return a tokenizer that has learnt what it needs from chunks.

        Args:
            chunks: Actions (B, T, D) in their units.
            start: As in ``encode``.
            quantiles: Shares of the values below the bounds; (0, 1) cuts none of them off.
        """

    @abstractmethod
    def clipped(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Share of the numbers of chunks (B, T, D) that ``encode`` cuts off, for each dimension (D,)."""

    @abstractmethod
    def encode(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Map chunks (B, T, D) to ids, int64 (B, L).

        Args:
            chunks: Actions in their units.
            start: Position (B, D) that each chunk goes on from, for tokenizers that use it.
        """

    @abstractmethod
    def decode(self, ids: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to chunks (B, T, D) in their units.

        Args:
            ids: As ``encode`` gives them.
            steps: Other number of steps over the same time, for another rate of control; ``horizon`` when None.
            start: As in ``encode``.
        """

    def is_valid(self, ids: Tensor) -> Tensor:
        """Whether each row of ids (B, L) stands for a chunk, bool (B,)."""
        return ((ids >= 0) & (ids < self.vocab_size)).all(1)

    # ---------------------------------------------------------------- what they share

    def replace(self, **changes: Any) -> Self:
        """Return a tokenizer of the same class with other arguments."""
        return type(self)(**{**{name: getattr(self, name) for name in self.fields}, **changes})

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"tokenizer": "module.Class", argument: value}``, ready for JSON."""
        plain: dict[str, Any] = json.loads(json.dumps(super().to_dict()))  # no tuples, as it is read again
        return plain

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))

    def smooth(self, chunks: Tensor) -> Tensor:
        """Take the jumps out of angles and quaternions (B, T, D).

        Raises:
            ShapeError: The shape is not (B, T, D) for this tokenizer's T and D.
        """
        if chunks.ndim != 3 or chunks.shape[1:] != (self.horizon, self.dims):
            raise ShapeError(
                f"{type(self).__name__}: chunks must be (B, {self.horizon}, {self.dims}), got {tuple(chunks.shape)}."
            )
        if self.angles:
            columns = list(self.angles)
            chunks = chunks.clone()
            chunks[:, :, columns] = unwrap(chunks[:, :, columns])
        for first in self.quaternions:
            part = slice(first, first + 4)
            chunks = chunks.clone()
            chunks[:, :, part] = same_hemisphere(chunks[:, :, part])
        return chunks

    def restore(self, chunks: Tensor) -> Tensor:
        """Bring decoded angles into (-pi, pi] and quaternions to norm 1."""
        if self.angles:
            columns = list(self.angles)
            chunks = chunks.clone()
            chunks[:, :, columns] = wrap(chunks[:, :, columns])
        for first in self.quaternions:
            part = slice(first, first + 4)
            chunks = chunks.clone()
            chunks[:, :, part] = torch.nn.functional.normalize(chunks[:, :, part], dim=-1, eps=1e-6)
        return chunks


class ContinuousTokenizer(ActionTokenizer):
    """A tokenizer whose tokens are numbers in [0, 1], rounded to ``vocab_size`` levels for ids.

    Tokens are in order of time first, then of dimension: token n * D + d.
    """

    @property
    @abstractmethod
    def groups(self) -> int:
        """N, tokens of one dimension."""

    @property
    def length(self) -> int:
        """L = N * D."""
        return self.groups * self.dims

    @property
    def sizes(self) -> Tensor:
        """One part an id."""
        return torch.ones(self.vocab_size, dtype=torch.long)

    @abstractmethod
    def to_unit(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Map chunks (B, T, D) to tokens (B, L) in [0, 1]; what is out of bounds is cut off."""

    @abstractmethod
    def from_unit(self, tokens: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """Map tokens (B, L) in [0, 1] to chunks (B, T, D); differentiable."""

    def encode(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """As in ``ActionTokenizer``."""
        return (self.to_unit(chunks, start) * (self.vocab_size - 1)).round().long()  # half to even

    def decode(self, ids: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """As in ``ActionTokenizer``."""
        return self.from_unit(ids.float() / (self.vocab_size - 1), steps=steps, start=start)

    def encode_continuous(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Map chunks (B, T, D) to tokens (B, L) in [-1, 1]; differentiable."""
        return 2 * self.to_unit(chunks, start) - 1

    def decode_continuous(self, tokens: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """Map tokens (B, L) in [-1, 1] to chunks (B, T, D); differentiable."""
        return self.from_unit((tokens + 1) / 2, steps=steps, start=start)


def wrap(angles: Tensor) -> Tensor:
    """Bring angles into (-pi, pi]."""
    return math.pi - (math.pi - angles) % (2 * math.pi)


def unwrap(angles: Tensor) -> Tensor:
    """Take jumps of 2 pi out of angles (B, T, K) along time."""
    turns = (angles.diff(dim=1) / (2 * math.pi)).round().cumsum(1)
    return torch.cat([angles[:, :1], angles[:, 1:] - 2 * math.pi * turns], dim=1)


def same_hemisphere(quaternions: Tensor) -> Tensor:
    """Flip signs in quaternions (B, T, 4) so that neighbours lie on one side.

    The component of the first one that is largest is made positive.
    """
    first = quaternions[:, :1]
    largest = first.abs().argmax(-1, keepdim=True)  # (B, 1, 1)
    before = torch.cat([first * first.gather(-1, largest).sign(), quaternions[:, :-1]], dim=1)
    turned = torch.where((before * quaternions).sum(-1) < 0, -1.0, 1.0).to(quaternions)  # (B, T)
    return quaternions * turned.cumprod(1)[:, :, None]


def make_action_tokenizer(
    text: str,
    *,
    horizon: int,
    dims: int,
    grippers: Sequence[int] = (),
    angles: Sequence[int] = (),
    quaternions: Sequence[int] = (),
) -> ActionTokenizer:
    """Make a tokenizer that ``fit`` has not seen yet.

    Args:
        text: ``bspline``, ``binning`` or ``fast``, followed by what differs from its defaults or from what is given
            here: ``bspline,num_basis=10,degree=4``.
        horizon: Steps of a chunk.
        dims: Action dimensions.
        grippers: Columns that are open or closed.
        angles: Columns that are angles.
        quaternions: First columns of quaternions.

    Raises:
        UnknownNameError: No such tokenizer.
        ConfigError: An argument the tokenizer does not take, or a value of another kind.
    """
    name, *pairs = re.split(r",(?![^\[]*\])", text)  # not inside a list
    cls = _tokenizers().get(name.strip())
    if cls is None:
        raise UnknownNameError("action tokenizer", name.strip(), _tokenizers())
    arguments: dict[str, Any] = {"grippers": grippers, "angles": angles, "quaternions": quaternions}
    known = [field for field in cls.fields if field not in ("horizon", "dims")]
    for pair in pairs:
        key, equals, value = (part.strip() for part in pair.partition("="))
        if not equals or key not in known:
            raise ConfigError(
                f"tokenizer {text!r}: {pair.strip()!r} must be one of {', '.join(known)}, followed by = and a value."
            )
        try:
            arguments[key] = json.loads(value)
        except json.JSONDecodeError:
            arguments[key] = value
        default = inspect.signature(cls).parameters[key].default
        kind = next((kind for kind in _KINDS if isinstance(default, kind)), None)
        if kind and not (isinstance(arguments[key], kind) and isinstance(arguments[key], bool) == (kind is bool)):
            raise ConfigError(f"tokenizer {text!r}: {key} must be {_KINDS[kind]}, got {value!r}.")
    return cls(horizon=horizon, dims=dims, **arguments)


_KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    (float, int): "a number",
    str: "a word",
    (tuple, list): "a list of numbers",
}
"""Kinds of arguments, first the narrower ones."""


def _tokenizers() -> dict[str, Any]:
    from vertebra.tokenizers.binning import BinningTokenizer
    from vertebra.tokenizers.bspline import BSplineTokenizer
    from vertebra.tokenizers.fast import FASTTokenizer

    return {"bspline": BSplineTokenizer, "binning": BinningTokenizer, "fast": FASTTokenizer}
