"""Attention along one axis of a grid at a time, and what decoding in rows remembers.

Sources: the Axial Transformer (https://arxiv.org/abs/1912.12180); ``AxialAttention`` as in the ``axial_attention``
package of P. Wang (https://github.com/lucidrains/axial-attention).

Shapes: B batch, T positions, W positions of a row, D width, R kept rows, M lines, L their length, N heads,
K head width.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.attention import Attention, Rope
from vertebra.backbones.layers.groups import TensorState
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.rope import rope_angles, rotate
from vertebra.errors import LoadError, ShapeError

Angles = tuple[Tensor, Tensor]


class Lines:
    """The lines of a grid along one axis, as a batch of sequences.

    Args:
        x: Features (B, *grid, D), of which the shape counts.
        axis: Grid axis, from 0.
        causal: Whether a position sees no later one of its line.
        mask: Positions that are seen, bool (B, *grid); None for all. A position always sees itself.
    """

    def __init__(self, x: Tensor, axis: int, causal: bool = False, mask: Tensor | None = None) -> None:
        self.axis = axis + 1
        self.length: int = x.shape[self.axis]
        self.per_item = math.prod(x.shape[1:-1]) // self.length
        self.layout = Layout(
            batch=x.shape[0] * self.per_item,
            length=self.length,
            device=x.device,
            causal=causal,
            mask=None if mask is None else mask.movedim(self.axis, -1).flatten(0, -2),
        )

    def split(self, x: Tensor) -> Tensor:
        """Return the lines (M, L, D) of x (B, *grid, D), those of an item together."""
        return x.movedim(self.axis, -2).flatten(0, -3)

    def join(self, lines: Tensor, x: Tensor) -> Tensor:
        """Put lines (M, L, D) into the grid of x (B, *grid, D)."""
        return lines.reshape(x.movedim(self.axis, -2).shape).movedim(-2, self.axis)

    def part(self, some: slice) -> Layout:
        """Return the layout of some of the lines."""
        mask = self.layout.mask
        if mask is None:
            return self.layout  # one mask serves every line
        return dataclasses.replace(self.layout, batch=len(mask[some]), mask=mask[some], _dense={})


class AxialAttention(nn.Module):
    """Attention along each axis of a grid, bare: no norm, residual or position of its own.

    Args:
        dim: Width D.
        num_heads: Heads N.
        axes: Number of grid axes, each with weights of its own.
        combine: ``sum`` adds the outputs; ``chain`` gives each axis the output of the one before.
        qkv_bias: Whether queries, keys and values have biases; the output always has one.
        rope: Rotary embedding along the attended axis.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        axes: int = 2,
        combine: Literal["sum", "chain"] = "sum",
        qkv_bias: bool = False,
        rope: Rope | None = None,
    ) -> None:
        super().__init__()
        self.combine = combine
        self.attentions = nn.ModuleList(
            Attention(dim, num_heads, num_heads, dim // num_heads, bias=True, rope=rope) for _ in range(axes)
        )
        if not qkv_bias:
            for attention in self.attentions:
                assert isinstance(attention, Attention)
                attention.qkv = nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D).

        Args:
            x: Features on a grid of ``axes`` axes.
            mask: Real positions, bool (B, *grid); None when all are.

        Raises:
            ShapeError: The grid has another number of axes.
        """
        if x.ndim - 2 != len(self.attentions):
            raise ShapeError(
                f"AxialAttention: x must be (B, {len(self.attentions)} grid axes, D), got {tuple(x.shape)}."
            )
        return self.mix(x, [Lines(x, axis, mask=mask) for axis in range(x.ndim - 2)])

    def mix(self, x: Tensor, lines: Sequence[Lines]) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D), attending along ``lines``, one entry an attention."""
        outputs = []
        for attention, along in zip(self.attentions, lines, strict=True):
            outputs.append(along.join(attention(along.split(x), along.layout), x))
            x = outputs[-1] if self.combine == "chain" else x
        return sum(outputs[1:], outputs[0]) if self.combine == "sum" else x


def angles_at(attention: Attention, positions: Tensor) -> Angles | None:
    """Return what rotates heads (B, N, T, K) at positions (B, T): cosine and sine (B, 1, T, K/2); None without rope."""
    if attention.rope is None:
        return None
    cos, sin = rope_angles(positions, attention.rope.width, attention.rope.theta)
    return cos[:, None], sin[:, None]


def project(attention: Attention, x: Tensor, angles: Angles | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values, each (B, N, T, K), of x (B, T, D), rotated by ``angles``."""
    heads = attention.qkv(x).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # (B, 3N, T, K)
    if angles is None or attention.rope is None:
        q, k, v = heads.chunk(3, dim=1)
        return q, k, v
    turned, v = heads.split([2 * attention.num_heads, attention.num_heads], dim=1)
    q, k = rotate(turned, angles, attention.rope.interleaved).chunk(2, dim=1)
    return q, k, v


def variance_scaling_(weight: Tensor, scale: float) -> Tensor:
    """Fill weight (outputs, inputs, ...) with a normal cut at two deviations, of variance scale / inputs."""
    fan_in = weight[0].numel()
    std = math.sqrt(scale / fan_in) / 0.87962566103423978  # what cutting at 2 takes from the deviation
    return nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class AxialState(TensorState):
    """What ``Axial`` remembers: columns of finished rows, and the row it is in.

    Args:
        tensors: By name: ``position`` (B,); ``inputs`` (B, W, D) of the current row; ``above`` (B, W, D), the outer
            features of the row before; ``layers.I.keys`` and ``layers.I.values``, (B, W, N, R, K) of outer columns and
            (B, N, W, K) of the inner stack.
        growth: ``rows``.
        free: Axes that grow.
        max_len: Most positions.
    """

    def __init__(self, tensors: dict[str, Tensor], growth: str, free: dict[str, int], max_len: int) -> None:
        super().__init__(tensors, growth, free)
        self.max_len = max_len
        self.row = tensors["inputs"].shape[1]
        self.column: int | None = 0  # of all items, where it is one and the same
        self.angles: Angles | None = None  # of all columns of a row
        self.fixed = False  # whether nothing may depend on how far items have read, see ``fixed.py``

    @property
    def position(self) -> Tensor:
        """Positions read, int (B,)."""
        return self.tensors["position"]

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return the keys and values kept for a layer."""
        return self.tensors[f"layers.{layer}.keys"], self.tensors[f"layers.{layer}.values"]

    def column_angles(self, attention: Attention) -> Angles | None:
        """Return ``angles_at`` the common column; those of a row are computed once."""
        if attention.rope is None or self.column is None:
            return None
        if self.angles is None:
            self.angles = angles_at(attention, torch.arange(self.row, device=self.position.device)[None])
            assert self.angles is not None
        at = slice(self.column, self.column + 1)
        return self.angles[0][:, :, at], self.angles[1][:, :, at]

    def select(self, indices: Tensor) -> AxialState:
        """Keep the batch items ``indices`` (N,), in that order."""
        new = AxialState(super().select(indices).tensors, self.growth, self.free, self.max_len)
        new.column, new.fixed = self.column, self.fixed
        return new

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        super().load_state_dict(tensors)
        if (longest := int(self.position.max())) > self.max_len:
            raise LoadError(
                f"state: {longest} positions do not fit in a state made for max_len={self.max_len}; make it with a "
                "larger max_len."
            )
        self.column = None

    def advance(self, position: Tensor, column: int | None) -> None:
        """Set the positions read."""
        self.tensors["position"], self.column = position, column

    def check_room(self, position: int) -> None:
        """Refuse more positions than the state was made for."""
        if position > self.max_len:
            raise ShapeError(
                f"step: {position} positions do not fit in a state made for max_len={self.max_len}; make it with a "
                "larger max_len."
            )

    def make_room(self, rows: int) -> None:
        """Give the columns room for ``rows`` rows; twice the need, so that they move seldom."""
        for name in self.free:
            held = self.tensors[name]
            if held.shape[3] < rows:
                size = max(rows, min(2 * rows, -(-self.max_len // self.row)))
                self.tensors[name] = F.pad(held, (0, 0, 0, size - held.shape[3]))
