"""A stack of blocks over a sequence: what iLLaMA, the hybrid, and later families of that kind share.

Shapes: B batch, T positions (a grid in raster order), D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, BackboneConfig, State
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import MixerState, TokenMixer
from vertebra.errors import ConfigError, ShapeError


@dataclass(frozen=True, kw_only=True)
class StackConfig(BackboneConfig):
    """Fields that all stacks of blocks share.

    Args:
        dropout: Share of each branch's output that is zeroed in training.
        drop_path: Share of items for which a branch of the last layer is skipped in training; grows linearly from 0.
    """

    dropout: float = 0.0
    drop_path: float = 0.0

    family: ClassVar[str] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{type(self).__name__}: {name} must be in [0, 1), got {getattr(self, name)}.")

    def drop_paths(self) -> list[float]:
        """Return the share of skipped items for every layer."""
        return [self.drop_path * i / max(self.depth - 1, 1) for i in range(self.depth)]

    def per_layer(self, value: int | tuple[int, ...]) -> list[int]:
        """Return one number a layer, from one for all or a tuple that is repeated."""
        values = (value,) if isinstance(value, int) else value
        if not values or min(values) < 0:
            raise ConfigError(f"{type(self).__name__}: window must be 0 or positive numbers, got {value}.")
        return [values[i % len(values)] for i in range(self.depth)]


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)).

    Args:
        mixer: Token mixer.
        mlp: Channel mixer; None for a block without one.
        norm: Makes one norm.
        dropout: Share of the branches' outputs that is zeroed in training.
        drop_path: Share of items for which a branch is skipped in training.
    """

    def __init__(
        self,
        mixer: TokenMixer,
        mlp: nn.Module | None,
        norm: Callable[[], nn.Module],
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm()
        self.mixer = mixer
        self.norm2 = None if mlp is None else norm()
        self.mlp = mlp
        self.dropout = nn.Dropout(dropout)
        self.drop_path = drop_path

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        x = x + self._branch(self.mixer(self.norm1(x), layout))
        return self._channels(x)

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D)."""
        x = x + self.mixer.step(self.norm1(x), state, mask)
        return self._channels(x)

    def _channels(self, x: Tensor) -> Tensor:
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self._branch(self.mlp(self.norm2(x)))

    def _branch(self, y: Tensor) -> Tensor:
        y = self.dropout(y)
        if self.drop_path and self.training:
            keep = torch.rand(y.shape[0], 1, 1, device=y.device) >= self.drop_path
            y = y * keep / (1 - self.drop_path)
        return y


class StackState(State):
    """The states of all layers."""

    def __init__(self, layers: list[MixerState], batch: int) -> None:
        self.layers, self._batch = layers, batch

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(layer.nbytes for layer in self.layers)

    @property
    def growth(self) -> str:
        """The fastest growth among the layers."""
        return max((layer.growth for layer in self.layers), key=["constant", "ring", "linear"].index)

    @property
    def batch_size(self) -> int:
        """Number of items B."""
        return self._batch

    def select(self, indices: Tensor) -> StackState:
        """Keep the batch items ``indices`` (N,), in that order."""
        return StackState([layer.select(indices) for layer in self.layers], len(indices))


class SequenceBackbone(Backbone):
    """Blocks one after another, and a last norm; a grid is read in raster order.

    Args:
        config: Shape and structure.
        blocks: The layers.
        norm: Norm after the last layer.
    """

    def __init__(self, config: BackboneConfig, blocks: list[Block], norm: nn.Module) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(blocks)
        self.norm = norm

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        hidden: list[Tensor] | None = None,
    ) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D); see ``Backbone.forward``."""
        self._check(x, mask, segments)
        shape = x.shape
        x = x.flatten(1, -2)  # (B, T, D)
        layout = Layout(
            batch=x.shape[0],
            length=x.shape[1],
            device=x.device,
            causal=self.config.causal,
            mask=None if mask is None else mask.flatten(1),
            segments=segments,
        )
        for layer in self.layers:
            x = layer(x, layout)
            if hidden is not None:
                hidden.append(x.reshape(shape))
        return self.norm(x).reshape(shape)

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StackState:
        """Make the empty state for up to ``max_len`` positions; see ``Backbone.init_state``."""
        if not self.config.causal:
            raise ConfigError(
                f"{type(self).__name__}: causal=False has no state; a later position changes all outputs."
            )
        weight = next(self.parameters())
        dtype, where = dtype or weight.dtype, torch.device(device or weight.device)
        return StackState(
            [self._mixer(i).init_state(batch, max_len, dtype, where) for i in range(len(self.layers))], batch
        )

    def step(self, x: Tensor, state: State, mask: Tensor | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); see ``Backbone.step``."""
        if not isinstance(state, StackState) or len(state.layers) != len(self.layers):
            raise ConfigError(f"{type(self).__name__}.step: the state must come from this backbone's init_state.")
        if x.ndim != 3 or x.shape[-1] != self.config.dim or x.shape[0] != state.batch_size:
            raise ShapeError(
                f"{type(self).__name__}.step: x must be ({state.batch_size}, T, {self.config.dim}), "
                f"got {tuple(x.shape)}."
            )
        if mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ShapeError(f"{type(self).__name__}.step: padding must stand on the left of the real positions.")
        for layer, layer_state in zip(self.layers, state.layers, strict=True):
            assert isinstance(layer, Block)
            x = layer.step(x, layer_state, mask)
        return self.norm(x)

    def _mixer(self, index: int) -> TokenMixer:
        block = self.layers[index]
        assert isinstance(block, Block)
        return block.mixer
