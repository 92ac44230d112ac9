"""E-Branchformer: attention and a convolutional gate side by side (https://arxiv.org/abs/2210.00077).

A layer looks at the whole sequence through attention and at the neighbourhood through a gated MLP with a depthwise
convolution (cgMLP, https://arxiv.org/abs/2207.02971), merges both with a second depthwise convolution, and has half an
MLP before and behind them. The arithmetic is that of ESPnet's ``EBranchformerEncoder`` with absolute positions, which
OWSM-CTC is made of (https://arxiv.org/abs/2402.12654). Beyond it: grids, packed batches, batches in which padding
changes nothing, a causal form, and decoding.

Shapes: B batch, T positions (a grid in raster order), D width, C channels of a convolution, K its kernel.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, Between, State, Tap, Taps, preset
from vertebra.backbones.layers import recompute
from vertebra.backbones.layers.attention import Attention, AttentionState, FixedKeys
from vertebra.backbones.layers.depthwise import depthwise
from vertebra.backbones.layers.masks import Layout, Predicate
from vertebra.backbones.layers.mixer import Growth, MixerState, check_state
from vertebra.backbones.layers.positions import sinusoid
from vertebra.backbones.stack import DEVICE_PIECE, PIECE_FLOATS, SHORTEST_PIECE, StackConfig, StackState
from vertebra.errors import ConfigError, ShapeError

Positions = Literal["sinusoid", "none"]
Convolve = Callable[[Tensor, nn.Conv1d], Tensor]


@dataclass(frozen=True, kw_only=True)
class EBranchformerConfig(StackConfig):
    """Structure of an E-Branchformer.

    Args:
        num_heads: Heads; the head width is dim / num_heads.
        hidden_dim: Inner width of the two MLPs.
        cgmlp_dim: Inner width of the cgMLP; one half gates the other.
        conv_kernel: Positions that the convolution of the gate reads, an odd number.
        merge_kernel: Positions that the convolution of the merge reads, an odd number.
        positions: ``sinusoid`` multiplies the input by sqrt(dim) and adds sines and cosines of the place in the
            sequence, counted from its first real position; ``none`` leaves positions to the input.
        mask_conv: Whether padding is zeroed before every convolution, so that it changes nothing. Without, as in
            ESPnet, convolutions read what stands at padding, which attends to real positions only.
        norm_eps: Added to the variance of the norms.
        dropout: Share of each branch's output, of its inner features and of the input that is zeroed in training;
            attention weights are spared.
        drop_path: Share of items for which a branch of the last layer is skipped in training; grows linearly from 0.
    """

    num_heads: int
    hidden_dim: int
    cgmlp_dim: int
    conv_kernel: int = 31
    merge_kernel: int = 31
    positions: Positions = "sinusoid"
    mask_conv: bool = True
    norm_eps: float = 1e-12

    family: ClassVar[str] = "ebranchformer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1 or self.dim % self.num_heads:
            raise ConfigError(
                f"EBranchformerConfig: dim ({self.dim}) must be a multiple of num_heads ({self.num_heads})."
            )
        if self.hidden_dim < 1 or self.cgmlp_dim < 2 or self.cgmlp_dim % 2:
            raise ConfigError(
                "EBranchformerConfig: hidden_dim must be at least 1 and cgmlp_dim an even number, got "
                f"{self.hidden_dim} and {self.cgmlp_dim}."
            )
        for name in ("conv_kernel", "merge_kernel"):
            if getattr(self, name) < 1 or getattr(self, name) % 2 == 0:
                raise ConfigError(
                    f"EBranchformerConfig: {name} must be an odd number, so that as many positions are read on either "
                    f"side, got {getattr(self, name)}."
                )
        if self.positions not in ("sinusoid", "none"):
            raise ConfigError(f"EBranchformerConfig: positions must be sinusoid or none, got {self.positions!r}.")
        if self.causal and not self.mask_conv:
            raise ConfigError(
                "EBranchformerConfig: mask_conv=False is ESPnet's bidirectional form; set causal=False with it."
            )

    def build(self) -> EBranchformer:
        """Make the backbone with fresh weights."""
        return EBranchformer(self)


# ---------------------------------------------------------------- backbone


class EBranchformer(Backbone):
    """Layers of attention beside a convolutional gate, and a last norm.

    The causal form pads the convolutions on the left alone; a position then reads K positions up to itself.
    """

    config: EBranchformerConfig

    def __init__(self, config: EBranchformerConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(EBranchformerLayer(config, rate) for rate in config.drop_paths())
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.dropout = nn.Dropout(config.dropout)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights.

        | parameter | distribution |
        | --- | --- |
        | projections and convolutions, with their biases | uniform within 1/sqrt(inputs) |
        | convolution of the gate | normal, std 1e-6, with biases of 1: the gate begins open |
        | norms | 1 |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                module.reset_parameters()
        for index in range(len(self.layers)):
            gate = self._layer(index).local.conv
            assert gate.bias is not None
            nn.init.normal_(gate.weight, std=1e-6)
            nn.init.ones_(gate.bias)

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
        x, mask = x.flatten(1, -2), None if mask is None else mask.flatten(1)  # (B, T, D)
        if mask is not None and x.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all()):
            mask = None  # attention without a mask is faster
        kind = Layout if self.config.mask_conv else KeyLayout
        layout = kind(
            batch=x.shape[0],
            length=x.shape[1],
            device=x.device,
            causal=self.config.causal,
            mask=mask,
            segments=segments,
        )
        around = Around(layout, self.config)
        x = self._place(x, places(layout))
        for index in range(len(self.layers)):
            x = self._layer(index)(x, around, functools.partial(between.inside, index))
            x = between.after(index, x)
        return self.norm(x).reshape(shape)

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> EBranchformerState:
        """Make the empty state for up to ``max_len`` positions; see ``Backbone.init_state``."""
        if not self.config.causal:
            raise ConfigError("EBranchformer: causal=False has no state; a later position changes all outputs.")
        weight = self.norm.weight
        dtype, where = dtype or weight.dtype, torch.device(device or weight.device)
        layers: list[MixerState] = [
            self._layer(i).init_state(batch, max_len, dtype, where) for i in range(len(self.layers))
        ]
        return EBranchformerState(layers, torch.zeros(batch, dtype=torch.long, device=where))

    def step(self, x: Tensor, state: State, mask: Tensor | None = None, taps: Taps | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); see ``Backbone.step``."""
        if not isinstance(state, EBranchformerState) or len(state.layers) != len(self.layers):
            raise ConfigError("EBranchformer.step: the state must come from this backbone's init_state.")
        if x.ndim != 3 or x.shape[-1] != self.config.dim or x.shape[0] != state.batch_size:
            raise ShapeError(
                f"EBranchformer.step: x must be ({state.batch_size}, T, {self.config.dim}), got {tuple(x.shape)}."
            )
        if mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ShapeError("EBranchformer.step: padding must stand on the left of the real positions.")
        between = Between(self, None, taps)
        x = self._place(x, state.advance(x.shape[1], mask))
        for index, layer_state in enumerate(state.layers):
            assert isinstance(layer_state, LayerState)
            x = self._layer(index).step(x, layer_state, mask, functools.partial(between.inside, index))
            x = between.after(index, x)
        return self.norm(x)

    def set_recompute(self, recompute: bool, piece: int | None = None) -> None:
        """Trade time for memory in training; see ``Backbone.set_recompute`` and ``EBranchformerLayer``."""
        if piece is not None and piece < 1:
            raise ConfigError(f"EBranchformer.set_recompute: piece must be at least 1, got {piece}.")
        for index in range(len(self.layers)):
            self._layer(index).recompute, self._layer(index).piece = recompute, piece

    def _place(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.config.positions == "none":
            return x
        return self.dropout(x * math.sqrt(self.config.dim) + sinusoid(positions, self.config.dim).to(x.dtype))

    def _layer(self, index: int) -> EBranchformerLayer:
        layer = self.layers[index]
        assert isinstance(layer, EBranchformerLayer)
        return layer


# ---------------------------------------------------------------- layer


class EBranchformerLayer(nn.Module):
    """Half an MLP, attention beside cgMLP, half an MLP, and a norm.

    The MLPs work on some positions at a time where no gradient is asked for, and under ``recompute``: the numbers are
    those of one pass. The branches between them always see the whole sequence.

    Args:
        config: Structure.
        drop_path: Share of items for which a branch is skipped in training.

    Attributes:
        piece: Positions the MLPs work on at a time; None for what suits the device.
        recompute: Keep the inputs of the three branches alone in training and compute the rest again in the backward
            pass.
    """

    def __init__(self, config: EBranchformerConfig, drop_path: float) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(dim, config.norm_eps)

        self.norm_macaron = norm()
        self.macaron = FeedForward(dim, config.hidden_dim, config.dropout)
        self.norm_attention = norm()
        self.attention = Attention(dim, heads, heads, dim // heads, bias=True)
        self.norm_local = norm()
        self.local = ConvGatedMLP(dim, config.cgmlp_dim, config.conv_kernel, config.norm_eps, config.dropout)
        self.merge_conv = nn.Conv1d(2 * dim, 2 * dim, config.merge_kernel, groups=2 * dim)
        self.merge = nn.Linear(2 * dim, dim)
        self.norm_mlp = norm()
        self.mlp = FeedForward(dim, config.hidden_dim, config.dropout)
        self.norm = norm()
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path
        self.widest = config.hidden_dim
        self.piece: int | None = None
        self.recompute = False

    def forward(self, x: Tensor, around: Around, inside: Tap) -> Tensor:
        """Map x (B, T, D) to (B, T, D).

        Args:
            x: Features.
            around: What a position sees.
            inside: Applied before the last norm.
        """
        keep: Any = self._keep(x)
        x = self._pieces(self._half_first, x, keep[0])
        x = self._again(self._mix, x, around, keep[1])
        x = self._pieces(self._half_last, x, keep[2])
        return self.norm(inside(x))

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> LayerState:
        """Make the empty state for up to ``max_len`` positions."""
        columns = {
            name: torch.zeros(batch, conv.kernel_size[0] - 1, conv.in_channels, dtype=dtype, device=device)
            for name, conv in (("gate", self.local.conv), ("merge", self.merge_conv))
        }
        return LayerState(self.attention.init_state(batch, max_len, dtype, device), columns)

    def step(self, x: Tensor, state: LayerState, mask: Tensor | None, inside: Tap) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D)."""
        names = iter(("gate", "merge"))  # in the order in which ``_both`` convolves

        def convolve(new: Tensor, conv: nn.Conv1d) -> Tensor:
            name = next(names)
            new = new if mask is None else new.masked_fill(~mask[..., None], 0)
            columns = torch.cat([state.columns[name].to(new.dtype), new], dim=1)  # (B, K-1+T, C)
            state.columns[name] = columns[:, new.shape[1] :].to(state.columns[name].dtype, copy=True)
            return depthwise(columns, conv)

        x = self._half_first(x, None)
        x = x + self._both(x, lambda y: self.attention.step(y, state.attention, mask), convolve)
        return self.norm(inside(self._half_last(x, None)))

    def _half_first(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return x + self._branch(0.5 * self.macaron(self.norm_macaron(x)), keep)

    def _half_last(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return x + self._branch(0.5 * self.mlp(self.norm_mlp(x)), keep)

    def _mix(self, x: Tensor, around: Around, keep: Tensor | None) -> Tensor:
        mixed = self._both(x, lambda y: self.attention(y, around.layout), around.convolve)
        return x + (mixed if keep is None else mixed * keep)

    def _both(self, x: Tensor, attend: Tap, convolve: Convolve) -> Tensor:
        near = self.local(self.norm_local(x), convolve)
        both = self.dropout(torch.cat([attend(self.norm_attention(x)), near], dim=-1))  # (B, T, 2D)
        return self.dropout(self.merge(both + convolve(both, self.merge_conv)))

    def _branch(self, y: Tensor, keep: Tensor | None) -> Tensor:
        y = self.dropout(y)
        return y if keep is None else y * keep

    def _pieces(self, run: Callable[..., Tensor], x: Tensor, keep: Tensor | None) -> Tensor:
        whole = size = x.shape[1]
        if not torch.compiler.is_compiling() and (self.recompute or not torch.is_grad_enabled()):
            if self.piece is not None:
                size = self.piece
            elif x.device.type == "cpu":
                size = max(SHORTEST_PIECE, PIECE_FLOATS // (x.shape[0] * self.widest))
            elif self.recompute:
                size = DEVICE_PIECE
        if size >= whole:
            return self._again(run, x, keep)
        size = -(-whole // -(-whole // size))  # evenly
        return torch.cat([self._again(run, part, keep) for part in x.split(size, dim=1)], dim=1)

    def _again(self, run: Callable[..., Tensor], *args: Any) -> Tensor:
        if not self.recompute:
            return run(*args)
        y = recompute.again(run, *args, training=self.training)
        assert isinstance(y, Tensor)
        return y

    def _keep(self, x: Tensor) -> Tensor | list[None]:
        """Draw which items keep which branch, and by how much they grow for it: (3, B, 1, 1)."""
        if not self.drop_path or not self.training:
            return [None] * 3
        keep = torch.rand(3, x.shape[0], 1, 1, device=x.device) >= self.drop_path
        return keep / (1 - self.drop_path)


class FeedForward(nn.Module):
    """fc2(dropout(SiLU(fc1(x)))).

    Args:
        dim: Width D.
        hidden_dim: Width between the projections.
        dropout: Share of the inner features that is zeroed in training.
    """

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        return self.fc2(self.dropout(F.silu(self.fc1(x), inplace=not torch.is_grad_enabled())))


class ConvGatedMLP(nn.Module):
    """fc2(a * conv(norm(b))), with a and b the halves of GELU(fc1(x)) (cgMLP, https://arxiv.org/abs/2207.02971).

    Args:
        dim: Width D.
        hidden_dim: Width between the projections, before it is halved.
        kernel: Positions that the convolution reads.
        norm_eps: Added to the variance of the norm.
        dropout: Share of the gated features that is zeroed in training.
    """

    def __init__(self, dim: int, hidden_dim: int, kernel: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        half = hidden_dim // 2
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.norm = nn.LayerNorm(half, norm_eps)
        self.conv = nn.Conv1d(half, half, kernel, groups=half)
        self.fc2 = nn.Linear(half, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, convolve: Convolve) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        a, b = F.gelu(self.fc1(x)).chunk(2, dim=-1)
        return self.fc2(self.dropout(a * convolve(self.norm(b), self.conv)))


# ---------------------------------------------------------------- what a position sees


class KeyLayout(Layout):
    """The layout of ESPnet: padding is seen by nobody, not even by itself."""

    def predicate(self, window: int | None = None) -> Predicate:
        """Return ``allowed(b, h, q, k)``; see ``Layout.predicate``."""
        everything = super().predicate(window)

        def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = everything(b, h, q, k)
            return seen if self.mask is None else seen & self.mask[b, k]

        return allowed


class Around:
    """What attention and convolutions read around a position; made once a forward pass, shared by all layers.

    Packed sequences are laid out with gaps of zeros between them, as wide as a convolution reads on one side.

    Args:
        layout: What the positions are to each other.
        config: Structure.
    """

    def __init__(self, layout: Layout, config: EBranchformerConfig) -> None:
        self.layout, self.causal = layout, config.causal
        self.zeroed = None if layout.mask is None or not config.mask_conv else ~layout.mask[..., None]
        self.at: Tensor | None = None
        if layout.segments is not None:
            span = max(config.conv_kernel, config.merge_kernel) - 1
            number = (layout.segments[:, 1:] != layout.segments[:, :-1]).cumsum(1)  # of the sequence in its row
            gaps = F.pad(number, (1, 0)) * (span if config.causal else span // 2)
            self.length = layout.length + int(gaps.max())
            self.at = (torch.arange(layout.length, device=gaps.device) + gaps)[..., None]  # (B, T, 1)

    def convolve(self, x: Tensor, conv: nn.Conv1d) -> Tensor:
        """Convolve every channel of x (B, T, C) by itself."""
        if self.zeroed is not None:
            x = x.masked_fill(self.zeroed, 0)
        span = conv.kernel_size[0] - 1
        sides = (span, 0) if self.causal else (span // 2, span // 2)
        if self.at is None:
            return depthwise(x, conv, sides)
        at = self.at.expand_as(x)
        return depthwise(x.new_zeros(len(x), self.length, x.shape[2]).scatter(1, at, x), conv, sides).gather(1, at)


def places(layout: Layout) -> Tensor:
    """Return the place of every position in its sequence (B or 1, T), from 0 at the first real one."""
    index = torch.arange(layout.length, device=layout.device)[None]
    first = torch.zeros_like(index)
    if layout.segments is not None:
        begins = F.pad(layout.segments[:, 1:] != layout.segments[:, :-1], (1, 0), value=True)
        first = (index * begins).cummax(1).values  # of the own sequence
    if layout.mask is not None:
        real = index.masked_fill(~layout.mask, layout.length)
        if layout.segments is None:
            return (index - real.amin(1, keepdim=True)).clamp(min=0)
        following = real.flip(1).cummin(1).values.flip(1)  # the next real position
        first = following.gather(1, first.expand_as(following))
    return (index - first).clamp(min=0)


# ---------------------------------------------------------------- states


class LayerState(MixerState):
    """Keys and values of earlier positions, and the last K-1 columns before both convolutions.

    Args:
        attention: Of the attention.
        columns: ``gate`` and ``merge``, each (B, K-1, C).
    """

    growth: Growth = "linear"

    def __init__(self, attention: AttentionState | FixedKeys, columns: dict[str, Tensor]) -> None:
        self.attention, self.columns = attention, columns

    def tensors(self) -> list[Tensor]:
        """Return the tensors held."""
        return [*self.attention.tensors(), *self.columns.values()]

    def select(self, indices: Tensor) -> LayerState:
        """Return a new state of the batch items ``indices`` (N,)."""
        rows = indices.to(self.columns["gate"].device)
        return LayerState(self.attention.select(indices), {name: t[rows] for name, t in self.columns.items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``gate``, ``merge``, and what attention holds."""
        return {**self.columns, **{f"attention.{name}": t for name, t in self.attention.state_dict().items()}}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        check_state(self.columns, tensors)
        own = "attention."
        self.attention.load_state_dict({k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)})
        self.columns = {name: tensors[name].to(t, copy=True) for name, t in self.columns.items()}


class EBranchformerState(StackState):
    """The states of all layers, and how many positions each item has read.

    Args:
        layers: Of the layers.
        position: Positions since the first real one, int (B,).
    """

    def __init__(self, layers: list[MixerState], position: Tensor) -> None:
        super().__init__(layers, position.shape[0])
        self.position = position

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return super().nbytes + self.position.nbytes

    def advance(self, count: int, mask: Tensor | None) -> Tensor:
        """Count the next positions, and return their places in the sequence (B, T)."""
        ones = torch.ones(self.batch_size, count, dtype=torch.long, device=self.position.device)
        begun = ones if mask is None else ((mask.cumsum(1) + self.position[:, None]) > 0).long()
        found = (self.position[:, None] + begun.cumsum(1) - 1).clamp(min=0)
        self.position = self.position + begun.sum(1)
        return found

    def select(self, indices: Tensor) -> EBranchformerState:
        """Keep the batch items ``indices`` (N,), in that order."""
        layers = [layer.select(indices) for layer in self.layers]
        return EBranchformerState(layers, self.position[indices.to(self.position.device)])

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered by name."""
        return {**super().state_dict(), "position": self.position}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        check_state({"position": self.position}, tensors)
        super().load_state_dict(tensors)
        self.position = tensors["position"].to(self.position, copy=True)


# ---------------------------------------------------------------- presets


@preset(params=8_496)
def ebranchformer_test() -> EBranchformerConfig:
    """For tests: a few thousand parameters."""
    return EBranchformerConfig(dim=16, depth=2, num_heads=2, hidden_dim=24, cgmlp_dim=24, conv_kernel=5, merge_kernel=3)


@preset(params=819_072)
def ebranchformer_nano() -> EBranchformerConfig:
    """For a laptop: trains in minutes on two cores."""
    return EBranchformerConfig(
        dim=96, depth=5, num_heads=4, hidden_dim=192, cgmlp_dim=192, conv_kernel=15, merge_kernel=15
    )


@preset(params=22_518_272)
def ebranchformer_small() -> EBranchformerConfig:
    """As ESPnet's recipe for 100 hours of LibriSpeech, with absolute positions."""
    return EBranchformerConfig(dim=256, depth=12, num_heads=4, hidden_dim=1024, cgmlp_dim=1024)


@preset(params=89_076_736)
def ebranchformer_base() -> EBranchformerConfig:
    """For one GPU and about a thousand hours of speech."""
    return EBranchformerConfig(dim=512, depth=12, num_heads=8, hidden_dim=2048, cgmlp_dim=2048)


@preset(params=797_204_480)
def ebranchformer_1b() -> EBranchformerConfig:
    """The layers of OWSM-CTC 1B, without its cross-attention."""
    return EBranchformerConfig(dim=1024, depth=27, num_heads=16, hidden_dim=4096, cgmlp_dim=4096)
