"""A stack of blocks over a sequence: what iLLaMA, the hybrid, and later families of that kind share.

Shapes: B batch, T positions (a grid in raster order), D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, BackboneConfig, Between, State, Tap, Taps
from vertebra.backbones.layers import recompute
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import Carried, MixerState, TokenMixer
from vertebra.errors import ConfigError, ShapeError

PIECE_FLOATS = 1 << 21
"""Floats of a block's widest features that a CPU works on at a time: 8 MiB, so that they stay in its cache."""
SHORTEST_PIECE = 128
DEVICE_PIECE = 8192


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

    Where no gradient is asked for, a long sequence goes through the block in pieces: a mixer that carries takes what
    the piece before left, and the MLP needs nothing. With ``recompute`` a training does so too: the pieces keep their
    input alone and are computed again in the backward pass. The numbers are those of one pass.

    Args:
        mixer: Token mixer.
        mlp: Channel mixer; None for a block without one.
        norm: Makes one norm.
        dropout: Share of the branches' outputs that is zeroed in training.
        drop_path: Share of items for which a branch is skipped in training.

    Attributes:
        piece: Positions of a piece; None for what fits the cache of a CPU, elsewhere 8,192 under ``recompute``.
        recompute: Trade time for memory in training (https://arxiv.org/abs/1604.06174): about a third more time, and
            a layer keeps little more than its input.
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
        self.widest = max((m.out_features for m in self.modules() if isinstance(m, nn.Linear)), default=1)
        self.piece: int | None = None
        self.recompute = False

    def forward(self, x: Tensor, layout: Layout, inside: Tap | None = None) -> Tensor:
        """Map x (B, T, D) to (B, T, D).

        Args:
            x: Features.
            layout: What the positions are to each other.
            inside: Applied to the sum of the branches.
        """
        return self._close(self._branches(x, layout), inside)

    def _branches(self, x: Tensor, layout: Layout) -> Tensor:
        keep = self._keep(x)
        piece = self._piece_length(x)
        if piece >= x.shape[1]:
            return self._channels(self._mix(x, layout, keep), keep)
        pieces = x.split(piece, dim=1)
        if not self.mixer.capabilities.carries or not layout.causal:
            pieces = self._again(self._mix, x, layout, keep).split(piece, dim=1)
            return torch.cat([self._again(self._channels, part, keep) for part in pieces], dim=1)
        outputs, carried = [], None
        for number, part in enumerate(pieces):
            here = layout.piece(number * piece, number * piece + part.shape[1])
            part, carried = self._again(self._carry, part, here, carried, keep)
            outputs.append(part)
        return torch.cat(outputs, dim=1)

    def read_last(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to the output (B, 1, D) of the last position alone."""
        keep = self._keep(x)
        y = self.mixer.read_last(self.norm1(x), layout)
        y = self._channels(x[:, -1:] + self._branch(y, None if keep is None else keep[0]), keep)
        return self._close(y, None)

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None, inside: Tap | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); ``inside`` as in ``forward``."""
        x = x + self.mixer.step(self.norm1(x), state, mask)
        return self._close(self._channels(x, None), inside)

    def _close(self, x: Tensor, inside: Tap | None) -> Tensor:
        """Return what leaves the block from the sum x of its branches."""
        return x if inside is None else inside(x)

    def _piece_length(self, x: Tensor) -> int:
        whole: int = x.shape[1]
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and not self.recompute):
            return whole  # a compiler sees no loop; autograd would keep all pieces anyway
        if self.piece is not None:
            longest = self.piece
        elif x.device.type == "cpu":
            longest = max(SHORTEST_PIECE, PIECE_FLOATS // (x.shape[0] * self.widest))
        else:
            longest = DEVICE_PIECE if self.recompute else whole
        return -(-whole // -(-whole // longest))  # evenly

    def _again(self, run: Callable[..., Any], *args: Any) -> Any:
        return recompute.again(run, *args, training=self.training)

    def _mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        return x + self._branch(self.mixer(self.norm1(x), layout), None if keep is None else keep[0])

    def _carry(self, x: Tensor, layout: Layout, carried: Carried | None, keep: Tensor | None) -> tuple[Tensor, Carried]:
        y, carried = self.mixer.carry(self.norm1(x), layout, carried)
        return self._channels(x + self._branch(y, None if keep is None else keep[0]), keep), carried

    def _channels(self, x: Tensor, keep: Tensor | None) -> Tensor:
        if self.mlp is None or self.norm2 is None:
            return x
        return x + self._branch(self.mlp(self.norm2(x)), None if keep is None else keep[1])

    def _branch(self, y: Tensor, keep: Tensor | None) -> Tensor:
        y = self.dropout(y)
        return y if keep is None else y * keep

    def _keep(self, x: Tensor) -> Tensor | None:
        """Draw which items keep which branch, and by how much they grow for it: (2, B, 1, 1)."""
        if not self.drop_path or not self.training:
            return None
        keep = torch.rand(2, x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return keep / (1 - self.drop_path)


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

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered by name."""
        found = {"batch": torch.tensor(self._batch)}
        for i, layer in enumerate(self.layers):
            found |= {f"layers.{i}.{name}": tensor for name, tensor in layer.state_dict().items()}
        return found

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        for i, layer in enumerate(self.layers):
            prefix = f"layers.{i}."
            layer.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})


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
        taps: Taps | None = None,
    ) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D); see ``Backbone.forward``."""
        self._check(x, mask, segments)
        shape = x.shape
        between = Between(self, hidden, taps, lambda y: y.reshape(shape), lambda y, _: y.flatten(1, -2))
        x = x.flatten(1, -2)  # (B, T, D)
        layout = Layout(
            batch=x.shape[0],
            length=x.shape[1],
            device=x.device,
            causal=self.config.causal,
            mask=None if mask is None else mask.flatten(1),
            segments=segments,
        )
        x = self._place(x, layout)
        for index, layer in enumerate(self.layers):
            x = between.after(index, layer(x, layout, functools.partial(between.inside, index)))
        return self.norm(x).reshape(shape)

    def read_last(self, x: Tensor) -> Tensor:
        """Map x (B, T, D) to the features (B, D) of the last position: the last layer is spared the others."""
        self._check(x, None, None)
        layout = Layout(batch=x.shape[0], length=x.shape[1], device=x.device, causal=self.config.causal)
        x = self._place(x, layout)
        for layer in self.layers[:-1]:
            x = layer(x, layout)
        last = self.layers[-1]
        assert isinstance(last, Block)
        return self.norm(last.read_last(x, layout))[:, 0]

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

    def step(self, x: Tensor, state: State, mask: Tensor | None = None, taps: Taps | None = None) -> Tensor:
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
        between = Between(self, None, taps)
        x = self._place_next(x, state, mask)
        for index, (layer, layer_state) in enumerate(zip(self.layers, state.layers, strict=True)):
            assert isinstance(layer, Block)
            x = between.after(index, layer.step(x, layer_state, mask, functools.partial(between.inside, index)))
        return self.norm(x)

    def set_recompute(self, recompute: bool, piece: int | None = None) -> None:
        """Trade time for memory in training; see ``Backbone.set_recompute`` and ``Block``."""
        if piece is not None and piece < 1:
            raise ConfigError(f"{type(self).__name__}.set_recompute: piece must be at least 1, got {piece}.")
        for block in self.layers:
            assert isinstance(block, Block)
            block.recompute, block.piece = recompute, piece

    def _place(self, x: Tensor, layout: Layout) -> Tensor:
        """Return x (B, T, D) with what tells its positions; a family with positions of its own adds them here."""
        return x

    def _place_next(self, x: Tensor, state: StackState, mask: Tensor | None) -> Tensor:
        """Return the next positions x (B, T, D) with what ``_place`` adds, and count them in ``state``."""
        return x

    def _mixer(self, index: int) -> TokenMixer:
        block = self.layers[index]
        assert isinstance(block, Block)
        return block.mixer
