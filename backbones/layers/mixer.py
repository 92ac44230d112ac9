"""What every token mixer offers: a pass over whole sequences, and steps with a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.backbones.layers.masks import Layout
from vertebra.errors import LoadError

Growth = Literal["constant", "ring", "linear"]
Carried = tuple[Tensor, ...]


@dataclass(frozen=True)
class Capabilities:
    """What a token mixer can do.

    Args:
        causal: It can hide later positions.
        bidirectional: It can see later positions.
        packed: It can keep packed sequences apart.
        needs_grid: It works on a 2-D grid only.
        max_length: Longest sequence, None for any.
        carries: It has ``carry``: a long sequence can be read in pieces, each from what the one before left.
    """

    causal: bool = True
    bidirectional: bool = True
    packed: bool = True
    needs_grid: bool = False
    max_length: int | None = None
    carries: bool = False


class MixerState(ABC):
    """What one layer remembers; advanced in place by ``TokenMixer.step``."""

    growth: Growth

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """Return the tensors held."""

    @abstractmethod
    def select(self, indices: Tensor) -> MixerState:
        """Return a new state of the batch items ``indices`` (N,)."""

    @abstractmethod
    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered by name."""

    @abstractmethod
    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned.

        Raises:
            LoadError: The tensors are those of another layer.
        """

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.nbytes for t in self.tensors())


def check_state(wanted: dict[str, Tensor], found: dict[str, Tensor], free: tuple[int, ...] = ()) -> None:
    """Refuse tensors whose names or shapes are not those of a layer's state.

    Args:
        wanted: What the layer has.
        found: What was saved.
        free: Axes whose size may differ.

    Raises:
        LoadError: They differ.
    """

    def shape(t: Tensor) -> list[int]:
        return [size for axis, size in enumerate(t.shape) if axis not in free]

    for name, tensor in wanted.items():
        if name not in found or shape(found[name]) != shape(tensor):
            have = tuple(found[name].shape) if name in found else "nothing"
            raise LoadError(f"state: {name} must be {tuple(tensor.shape)}, got {have}; was it of another backbone?")


class TokenMixer(nn.Module, ABC):
    """Mixes positions: x (B, T, D) to (B, T, D)."""

    capabilities: Capabilities = Capabilities()

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""

    def read_last(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to the output (B, 1, D) of the last position alone."""
        return self(x, layout)[:, -1:]

    def carry(self, x: Tensor, layout: Layout, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Map a piece x (B, T, D) of longer sequences to (B, T, D), with gradients from piece to piece.

        Args:
            x: The piece.
            layout: Of the piece alone.
            carried: What the piece before left; None for the first one.

        Returns:
            The output (B, T, D), and what the next piece needs.
        """
        raise TypeError(f"{type(self).__name__} cannot read a sequence in pieces.")

    @abstractmethod
    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> MixerState:
        """Make the empty state for up to ``max_len`` positions."""

    @abstractmethod
    def step(self, x: Tensor, state: MixerState, mask: Tensor | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); ``mask`` (B, T) marks the real ones."""
