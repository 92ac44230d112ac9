"""What every token mixer offers: a pass over whole sequences, and steps with a state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from vertebra.backbones.layers.masks import Layout

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

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(t.nbytes for t in self.tensors())


class TokenMixer(nn.Module, ABC):
    """Mixes positions: x (B, T, D) to (B, T, D)."""

    capabilities: Capabilities = Capabilities()

    @abstractmethod
    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""

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
