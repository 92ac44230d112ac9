"""Axial Transformer: attention along one axis of a grid at a time (https://arxiv.org/abs/1912.12180).

A layer attends along the lines of one axis, with all other axes as batch, so that N positions of a d-dimensional grid
cost N^((d+1)/d). One layer along each axis connects every pair of positions. The causal form is the paper's decoder: an
outer stack of whole rows and causal columns sees everything above a row; shifted down by one row, it is added to the
input of an inner stack, which sees what is to the left in the row. Decoding runs the outer stack once a finished row,
with the columns' keys and values kept, and the inner stack once a position.

The forms ``chain`` and ``sum`` have one attention per axis in every layer, applied one after the other or added, as in
the ``axial_attention`` package of P. Wang (https://github.com/lucidrains/axial-attention).

Beyond the paper: rotary positions along the attended axis, sequences folded into rows, padded and packed batches.

Shapes: B batch, T positions, H rows, W positions of a row, D width, G new rows, R kept rows, M lines, L their length,
N heads, K head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, Between, State, Taps, preset
from vertebra.backbones.layers import recompute
from vertebra.backbones.layers.attention import Attention, Rope
from vertebra.backbones.layers.axial import AxialAttention, AxialState, Lines, angles_at, project, variance_scaling_
from vertebra.backbones.layers.groups import Cursor, align, cut
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mlp import MLP
from vertebra.backbones.stack import DEVICE_PIECE, PIECE_FLOATS, SHORTEST_PIECE, StackConfig
from vertebra.errors import ConfigError, ShapeError

Combine = Literal["alternate", "chain", "sum"]
Positions = Literal["rope", "none"]


@dataclass(frozen=True, kw_only=True)
class AxialConfig(StackConfig):
    """Structure of an Axial Transformer.

    Args:
        num_heads: Heads; the head width is dim / num_heads.
        row: Width of the rows that a sequence is folded into; grids keep their own rows.
        inner_depth: Causal: the last ``inner_depth`` layers are the inner stack; the outer one has the rest, an even
            number. 0 for about half of depth. Not used otherwise.
        mlp_ratio: Inner width of the MLP over dim.
        combine: ``alternate``: a layer attends along one axis, the last one first, then the one before, and so on
            around; ``chain`` or ``sum``: each layer attends along every axis, one after the other or added.
        axes: Number of axes of ``chain`` and ``sum``.
        positions: ``rope`` rotates queries and keys along the attended axis; ``none`` leaves positions to the input.
        qkv_bias: Whether queries, keys and values have biases; the output always has one.
        final_norm: Whether a norm follows the last layer.
        norm_eps: Added to the variance of the norms.
        res_init_scale: Variance scale of fresh weights that end a branch; the paper's 1e-10 makes every layer begin as
            the identity.
        dropout: Share of each branch's output that is zeroed in training.
        drop_path: Share of items for which a branch of the last layer is skipped in training; grows linearly from 0.
    """

    num_heads: int
    row: int
    inner_depth: int = 0
    mlp_ratio: float = 4.0
    combine: Combine = "alternate"
    axes: int = 2
    positions: Positions = "rope"
    qkv_bias: bool = True
    final_norm: bool = True
    norm_eps: float = 1e-5
    res_init_scale: float = 0.1

    family: ClassVar[str] = "axial"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.num_heads or (self.positions == "rope" and self.dim // self.num_heads % 2):
            even = "an even multiple" if self.positions == "rope" else "a multiple"
            raise ConfigError(f"AxialConfig: dim ({self.dim}) must be {even} of num_heads ({self.num_heads}).")
        for name, known in (("combine", ("alternate", "chain", "sum")), ("positions", ("rope", "none"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"AxialConfig: {name} must be {', '.join(known)}, got {getattr(self, name)!r}.")
        if self.row < 1 or self.hidden_dim < 1 or not 1 <= self.axes <= 3:
            raise ConfigError(
                "AxialConfig: row must be at least 1, axes from 1 to 3 and mlp_ratio * dim at least 1, got "
                f"{self.row}, {self.axes} and {self.hidden_dim}."
            )
        if not self.causal:
            return
        if self.combine != "alternate":
            raise ConfigError(
                f"AxialConfig: combine {self.combine!r} sees all positions; set causal=False, or combine='alternate'."
            )
        inner = self.depth - self.outer_depth
        if inner < 1 or self.outer_depth < 2 or self.outer_depth % 2:
            raise ConfigError(
                "AxialConfig: a causal backbone needs at least one inner layer and an even number of outer ones, got "
                f"{inner} and {self.outer_depth}; change inner_depth ({self.inner_depth}) or depth ({self.depth})."
            )

    @property
    def outer_depth(self) -> int:
        """Layers of the causal form's outer stack."""
        return self.depth - self.inner_depth if self.inner_depth else 2 * max(1, round(self.depth / 4))

    @property
    def hidden_dim(self) -> int:
        """Inner width of the MLP."""
        return int(self.mlp_ratio * self.dim)

    def encoder(self) -> AxialConfig:
        """Return the bidirectional encoder of like structure: the paper's exterior encoder, without final norm."""
        if not self.causal:
            return self
        return self.replace(causal=False, depth=self.outer_depth, inner_depth=0, final_norm=False)

    def build(self) -> Axial:
        """Make the backbone with fresh weights."""
        return Axial(self)


# ---------------------------------------------------------------- backbone


class AxialBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on a grid.

    Where a layer attends along one axis, its lines are worked on some at a time where no gradient is asked for, and
    under ``recompute``: the numbers are those of one pass.

    Args:
        config: Structure.
        drop_path: Share of items for which a branch is skipped in training.

    Attributes:
        piece: Positions that are worked on at a time; None for what suits the device.
        recompute: Keep the input alone in training and compute the rest again in the backward pass.
    """

    def __init__(self, config: AxialConfig, drop_path: float) -> None:
        super().__init__()
        head_dim = config.dim // config.num_heads
        self.norm1 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mixer = AxialAttention(
            config.dim,
            config.num_heads,
            axes=1 if config.combine == "alternate" else config.axes,
            combine="chain" if config.combine == "chain" else "sum",
            qkv_bias=config.qkv_bias,
            rope=Rope(head_dim) if config.positions == "rope" else None,
        )
        self.norm2 = nn.LayerNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config.dim, config.hidden_dim, "quick_gelu")
        self.dropout = nn.Dropout(config.dropout)
        self.drop_path = drop_path
        self.widest = max(3 * config.dim, config.hidden_dim)
        self.piece: int | None = None
        self.recompute = False

    @property
    def attention(self) -> Attention:
        """The attention of a layer that has one."""
        attention = self.mixer.attentions[0]
        assert isinstance(attention, Attention)
        return attention

    def forward(self, x: Tensor, lines: Sequence[Lines]) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D).

        Args:
            x: Features.
            lines: What to attend along: one axis, or every axis of ``chain`` and ``sum``.
        """
        keep = self._keep(x)
        if len(lines) > 1:
            if keep is not None:
                keep = keep.reshape(*keep.shape, *[1] * (x.ndim - 1))
            return self._again(self._grid, x, lines, keep)
        (along,) = lines
        flat = along.split(x)  # (M, L, D)
        if keep is not None:
            keep = keep.repeat_interleave(along.per_item, 1)[..., None, None]  # (2, M, 1, 1)
        if torch.compiler.is_compiling():
            return along.join(self._again(self._some, flat, along.layout, keep), x)
        size = self._lines_at_once(flat)
        parts = []
        for start in range(0, len(flat), size):
            some = slice(start, start + size)
            kept = None if keep is None else keep[:, some]
            parts.append(self._again(self._some, flat[some], along.part(some), kept))
        return along.join(parts[0] if len(parts) == 1 else torch.cat(parts), x)

    def channels(self, x: Tensor) -> Tensor:
        """Map x (..., D) to x + mlp(norm(x)), without dropout."""
        return x + self.mlp(self.norm2(x))

    def _grid(self, x: Tensor, lines: Sequence[Lines], keep: Tensor | None) -> Tensor:
        return self._branches(x, self.mixer.mix(self.norm1(x), lines), keep)

    def _some(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        return self._branches(x, self.attention(self.norm1(x), layout), keep)

    def _branches(self, x: Tensor, mixed: Tensor, keep: Tensor | None) -> Tensor:
        mixed = self.dropout(mixed)
        x = x + (mixed if keep is None else mixed * keep[0])
        y = self.dropout(self.mlp(self.norm2(x)))
        return x + (y if keep is None else y * keep[1])

    def _again(self, run: Callable[..., Tensor], x: Tensor, how: object, keep: Tensor | None) -> Tensor:
        if not self.recompute:
            return run(x, how, keep)
        y: Tensor = recompute.again(run, x, how, keep, training=self.training)
        return y

    def _lines_at_once(self, lines: Tensor) -> int:
        count, length, _ = lines.shape
        if torch.is_grad_enabled() and not self.recompute:
            return count
        if self.piece is not None:
            positions = self.piece
        elif lines.device.type == "cpu":
            positions = max(SHORTEST_PIECE, PIECE_FLOATS // self.widest)
        else:
            positions = DEVICE_PIECE if self.recompute else count * length
        return max(1, positions // length)

    def _keep(self, x: Tensor) -> Tensor | None:
        """Draw which items keep which branch, and by how much they grow for it: (2, B)."""
        if not self.drop_path or not self.training:
            return None
        return (torch.rand(2, x.shape[0], device=x.device) >= self.drop_path) / (1 - self.drop_path)


class Axial(Backbone):
    """Layers of axial attention; the causal form has the outer layers first, then the inner ones."""

    config: AxialConfig

    def __init__(self, config: AxialConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(AxialBlock(config, rate) for rate in config.drop_paths())
        self.norm = nn.LayerNorm(config.dim, config.norm_eps) if config.final_norm else nn.Identity()
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights.

        | parameter | distribution |
        | --- | --- |
        | weights that end a branch | truncated normal, variance ``res_init_scale`` / inputs |
        | other weights of projections | truncated normal, variance 1 / inputs |
        | biases | 0 |
        | norms | 1 |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                last = name.endswith((".proj", ".fc2"))
                variance_scaling_(module.weight, self.config.res_init_scale if last else 1.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        hidden: list[Tensor] | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D); see ``Backbone.forward``.

        A sequence is folded into rows of ``config.row``. Causal: a grid of three axes is read as its rows, one below
        the other.

        Raises:
            ShapeError: Also for ``segments`` on a grid, and for ``chain`` and ``sum`` on another number of axes.
        """
        self._check(x, mask, segments)
        grid, masks, back = self._fold(x, mask, segments)

        def into(new: Tensor, old: Tensor) -> Tensor:  # free places of the rows stay as they are
            given = self._fold(torch.ones_like(new[..., :1]), mask, segments)[0] > 0
            return torch.where(given, self._fold(new, mask, segments)[0], old)

        between = Between(self, hidden, taps, back, into)
        if self.config.causal:
            return back(self._decode(grid, grid, masks[-1], between))
        return back(self._encode(grid, masks, between))

    def decode(self, outer: Tensor, inner: Tensor) -> Tensor:
        """Run the causal form on two inputs: what rows below may see, and what the row itself may see.

        The output at (r, c) depends on rows < r of ``outer``, and of ``inner`` on row r up to column c. An image model
        gives ``inner`` shifted right by one, so that a pixel does not see itself.

        Args:
            outer: (B, H, W, D).
            inner: (B, H, W, D).

        Returns:
            Features (B, H, W, D).

        Raises:
            ConfigError: The backbone is not causal.
        """
        if not self.config.causal:
            raise ConfigError("Axial.decode: needs a causal backbone, this one has causal=False.")
        return self._decode(outer, inner, None, Between(self, None, None))

    def _encode(self, x: Tensor, masks: list[Tensor | None], between: Between) -> Tensor:
        lines = [Lines(x, axis, mask=mask) for axis, mask in enumerate(masks)]
        for i, layer in enumerate(self.layers):
            x = between(i, layer(x, [lines[-1 - i % len(lines)]] if self.config.combine == "alternate" else lines))
        return self.norm(x)

    def _decode(self, outer: Tensor, inner: Tensor, mask: Tensor | None, between: Between) -> Tensor:
        rows, columns = Lines(outer, 1, mask=mask), Lines(outer, 0, causal=True, mask=mask)
        left = Lines(inner, 1, causal=True, mask=mask)
        u, split = outer, self.config.outer_depth
        for i, layer in enumerate(self.layers[:split]):
            u = between(i, layer(u, [columns if i % 2 else rows]))
        if mask is not None:  # a row of padding above the first real one adds nothing
            u = u * mask.any(-1)[..., None, None]
        y = inner + F.pad(u[:, :-1], (0, 0, 0, 0, 1, 0))
        for i, layer in enumerate(self.layers[split:], split):
            y = between(i, layer(y, [left]))
        return self.norm(y)

    def _fold(
        self, x: Tensor, mask: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, list[Tensor | None], Callable[[Tensor], Tensor]]:
        """Return the grid, the positions seen along each of its axes, and the way back to the shape of x."""
        config, shape = self.config, x.shape
        axes = x.ndim - 2
        if axes == 1:
            rows, real, restore = align(x, mask, segments)
            if config.combine != "alternate" and config.axes == 1:
                return rows, [real], restore
            grid, length = cut(rows, config.row), rows.shape[1]

            def back(y: Tensor) -> Tensor:
                return restore(y.flatten(1, 2)[:, :length])

            self._check_axes(2)
            # Causal: real positions come first, so that no finished row and nothing to the left is padding.
            if config.causal or (real is None and length % config.row == 0):
                return grid, [None, None], back
            seen = cut(torch.ones_like(rows[..., 0], dtype=torch.bool) if real is None else real, config.row)
            # The free places of a row begun are zeros, which carry the row's content to the other columns.
            live = None if real is None else seen.any(-1, keepdim=True).expand_as(seen)
            return grid.masked_fill(~seen[..., None], 0), [live, seen], back
        if segments is not None:
            raise ShapeError(f"Axial: segments are for sequences (B, T, D), got a grid {tuple(shape)}.")
        self._check_axes(axes)
        if mask is not None:
            x = x.masked_fill(~mask[..., None], 0)
        if config.causal and axes == 3:
            x, mask = x.flatten(1, 2), None if mask is None else mask.flatten(1, 2)
        return x, [mask] * (x.ndim - 2), lambda y: y.reshape(shape)

    def _check_axes(self, axes: int) -> None:
        if self.config.combine != "alternate" and axes != self.config.axes:
            raise ShapeError(
                f"Axial: combine={self.config.combine!r} was built for {self.config.axes} grid axes, got {axes}; "
                f"build it with axes={axes}."
            )

    def set_recompute(self, recompute: bool, piece: int | None = None) -> None:
        """Trade time for memory in training; see ``Backbone.set_recompute``."""
        if piece is not None and piece < 1:
            raise ConfigError(f"Axial.set_recompute: piece must be at least 1, got {piece}.")
        for i in range(len(self.layers)):
            self._layer(i).recompute, self._layer(i).piece = recompute, piece

    def _layer(self, index: int) -> AxialBlock:
        layer = self.layers[index]
        assert isinstance(layer, AxialBlock)
        return layer

    # ------------------------------------------------------------ decoding

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        row: int | None = None,
    ) -> AxialState:
        """Make the empty state for up to ``max_len`` positions; see ``Backbone.init_state``.

        Args:
            batch: Number of items B.
            max_len: Most positions.
            dtype: Of what is kept.
            device: Where it is kept.
            row: Row width W, for the rows of a grid; ``config.row`` when None.

        Raises:
            ConfigError: The backbone is not causal.
        """
        config = self.config
        if not config.causal:
            raise ConfigError("Axial: causal=False has no state; a later position changes all outputs.")
        weight = self._layer(0).attention.qkv.weight
        row = row or config.row
        heads, width = config.num_heads, config.dim // config.num_heads

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch, *shape, dtype=dtype or weight.dtype, device=device or weight.device)

        tensors = {"position": torch.zeros(batch, dtype=torch.long, device=device or weight.device)}
        tensors |= {"inputs": zeros(row, config.dim), "above": zeros(row, config.dim)}
        columns = [f"layers.{i}.{part}" for i in range(1, config.outer_depth, 2) for part in ("keys", "values")]
        inner = [f"layers.{i}.{p}" for i in range(config.outer_depth, config.depth) for p in ("keys", "values")]
        tensors |= {name: zeros(row, heads, 0, width) for name in columns}
        tensors |= {name: zeros(heads, row, width) for name in inner}
        return AxialState(tensors, "rows", dict.fromkeys(columns, 3), max_len)

    def step(self, x: Tensor, state: State, mask: Tensor | None = None, taps: Taps | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); see ``Backbone.step``.

        Raises:
            ConfigError: The state is another backbone's, or there are taps.
            ShapeError: x has another shape, padding is not on the left, or there is no room.
        """
        if taps is not None:
            raise ConfigError("Axial.step: takes no taps, its outer layers run once a row; use forward with taps.")
        if not isinstance(state, AxialState):
            raise ConfigError("Axial.step: the state must come from this backbone's init_state.")
        if x.ndim != 3 or x.shape[-1] != self.config.dim or x.shape[0] != state.batch_size:
            raise ShapeError(f"Axial.step: x must be ({state.batch_size}, T, {self.config.dim}), got {tuple(x.shape)}.")
        if mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ShapeError("Axial.step: padding must stand on the left of the real positions.")
        if x.shape[1] > 1 or mask is not None:
            return self._step_rows(x, state, mask)
        if not state.fixed:
            state.check_room(int(state.position.max()) + 1)
        inputs = state.tensors["inputs"]
        if state.column is None:
            inputs[torch.arange(x.shape[0], device=x.device), state.position % state.row] = x[:, 0].to(inputs.dtype)
        else:
            inputs[:, state.column] = x[:, 0]
        y = self.inner_step(x, state)
        if state.column == 0 or (
            state.column is None and (state.fixed or bool((state.position % state.row == 0).any()))
        ):
            self.finish_row(inputs, state)
        return y

    def inner_step(self, x: Tensor, state: AxialState) -> Tensor:
        """Map one position x (B, 1, D) of the current row through the inner stack to (B, 1, D); advance ``state``.

        After the last position of a row ``finish_row`` must follow; ``step`` does both.
        """
        row, column, above = state.row, state.column, state.tensors["above"]
        if column is not None:  # of all items, so that views do
            x = x + above[:, column : column + 1]
            angles, seen = state.column_angles(self._layer(0).attention), None
        else:
            phase, items = state.position % row, torch.arange(x.shape[0], device=x.device)
            x = x + above[items, phase][:, None]
            angles = angles_at(self._layer(0).attention, phase[:, None])
            seen = (torch.arange(row, device=x.device) <= phase[:, None])[:, None, None]  # (B, 1, 1, W)
        for i in range(self.config.outer_depth, self.config.depth):
            layer, keys, values = self._layer(i), *state.keys_values(i)  # (B, N, W, K)
            q, k, v = project(layer.attention, layer.norm1(x), angles)
            if column is None:
                keys[items, :, phase], values[items, :, phase] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(keys.dtype)
            else:
                keys[:, :, column], values[:, :, column] = k[:, :, 0], v[:, :, 0]
                keys, values = keys[:, :, : column + 1], values[:, :, : column + 1]
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
            x = layer.channels(x + layer.attention.proj(y.transpose(1, 2).flatten(2)))
        state.advance(state.position + 1, None if column is None else (column + 1) % row)
        return self.norm(x)

    def finish_row(self, row: Tensor, state: AxialState) -> None:
        """Run the outer stack on the row that ended, row (B, W, D), for the next row to see.

        Items that are in the middle of a row are left as they are, whatever their row holds.
        """
        number = (state.position[:, None] - 1) // state.row  # (B, 1)
        features = self._outer_rows(row[:, None], number, state)[:, 0]
        if state.column is None:
            ended = state.position % state.row == 0
            features = torch.where(ended[:, None, None], features, state.tensors["above"])
        state.tensors["above"] = features

    def read_rows(self, rows: Tensor, state: AxialState) -> None:
        """Run the outer stack on whole rows (B, G, W, D) in one go and advance ``state`` past them.

        Every item must be at the start of a row.
        """
        count = rows.shape[1]
        number = state.position[:, None] // state.row + torch.arange(count, device=rows.device)
        state.tensors["above"] = self._outer_rows(rows, number, state)[:, -1]
        state.advance(state.position + count * state.row, state.column)

    def _step_rows(self, x: Tensor, state: AxialState, mask: Tensor | None) -> Tensor:
        """Step over many positions, all rows at once."""
        x, real, restore = align(x, mask, None)
        cursor = Cursor(state.position, x.shape[1], state.row, real)
        state.check_room(int(cursor.advanced.max()))
        held = state.tensors["inputs"]
        window = cursor.place(x.to(held.dtype), held)  # (B, G, W, D)
        done = cursor.finished.sum(1)
        above, ended = state.tensors["above"][:, None], int(done.max())
        if ended:
            features = self._outer_rows(window[:, :ended], cursor.number[:, :ended], state)
            above = torch.cat([above, features], dim=1)
        state.tensors["above"] = above[torch.arange(len(x), device=x.device), done]
        x = x + cursor.take(F.pad(above, (0, 0, 0, 0, 0, max(0, cursor.groups - above.shape[1]))))
        angles = angles_at(self._layer(0).attention, cursor.slot % state.row)
        for i in range(self.config.outer_depth, self.config.depth):
            layer, kept = self._layer(i), [t.transpose(1, 2) for t in state.keys_values(i)]
            q, k, v = (t.transpose(1, 2) for t in project(layer.attention, layer.norm1(x), angles))  # (B, T, N, K)
            keys, values = (cursor.place(new.to(old.dtype), old) for new, old in zip((k, v), kept, strict=True))
            queries = cursor.place(q.to(keys.dtype), torch.zeros_like(kept[0]))
            lines = [t.flatten(0, 1).transpose(1, 2) for t in (queries, keys, values)]  # (B*G, N, W, K)
            y = F.scaled_dot_product_attention(lines[0], lines[1], lines[2], is_causal=True)
            y = cursor.take(y.transpose(1, 2).unflatten(0, keys.shape[:2])).flatten(2)  # (B, T, D)
            x = layer.channels(x + layer.attention.proj(y.to(x.dtype)))
            for part, new in (("keys", keys), ("values", values)):
                state.tensors[f"layers.{i}.{part}"] = cursor.rest(new).transpose(1, 2).contiguous()
        state.tensors["inputs"] = cursor.rest(window)
        together = mask is None and state.column is not None
        state.advance(
            cursor.advanced, (state.column + x.shape[1]) % state.row if together and state.column is not None else None
        )
        return restore(self.norm(x))

    def _outer_rows(self, rows: Tensor, number: Tensor, state: AxialState) -> Tensor:
        """Map new rows (B, G, W, D), of the given numbers (B, G), through the outer stack and keep their columns.

        What is kept of a row that is not finished yet is never seen, and replaced when it is.
        """
        if state.fixed:
            count = -(-state.max_len // state.row)
        else:
            count = int(number.max()) + 1
            state.make_room(count)
        seen = torch.arange(count, device=rows.device) <= number[..., None]  # (B, G, R)
        lines = [Lines(rows, 1)]
        width = rows.shape[2]
        seen = seen[:, None, None].expand(-1, width, -1, -1, -1).flatten(0, 1)  # (B*W, 1, G, R)
        angles = angles_at(self._layer(0).attention, number)
        if angles is not None:
            angles = (angles[0].repeat_interleave(width, 0), angles[1].repeat_interleave(width, 0))
        for i in range(0, self.config.outer_depth, 2):
            rows = self.layers[i](rows, lines)
            layer, keys, values = self._layer(i + 1), *state.keys_values(i + 1)  # (B, W, N, R, K)
            columns = layer.norm1(rows).transpose(1, 2).flatten(0, 1)  # (B*W, G, D)
            q, k, v = project(layer.attention, columns, angles)  # (B*W, N, G, K)
            at = number[:, None, None, :, None].expand(-1, *keys.shape[1:3], -1, keys.shape[4])
            keys.scatter_(3, at, k.unflatten(0, keys.shape[:2]).to(keys.dtype))
            values.scatter_(3, at, v.unflatten(0, keys.shape[:2]).to(keys.dtype))
            past = [t[:, :, :, :count].flatten(0, 1) for t in (keys, values)]
            y = F.scaled_dot_product_attention(q.to(keys.dtype), past[0], past[1], attn_mask=seen)
            y = layer.attention.proj(y.transpose(1, 2).flatten(2).to(rows.dtype))  # (B*W, G, D)
            rows = layer.channels(rows + y.unflatten(0, (-1, width)).transpose(1, 2))
        return rows


# ---------------------------------------------------------------- presets


@preset(params=5_120)
def axial_test() -> AxialConfig:
    """For tests: a few thousand parameters."""
    return AxialConfig(dim=16, depth=3, num_heads=2, mlp_ratio=1, row=5, inner_depth=1)


@preset(params=671_232)
def axial_nano() -> AxialConfig:
    """For a laptop: trains in minutes on two cores."""
    return AxialConfig(dim=96, depth=6, num_heads=4, row=32, inner_depth=2)


@preset(params=226_741_248)
def axial_imagenet32() -> AxialConfig:
    """The paper's decoder of ImageNet at 32 x 32 pixels."""
    return AxialConfig(
        dim=1536, depth=16, num_heads=16, mlp_ratio=1, row=32, inner_depth=8, positions="none", res_init_scale=1e-10
    )


@preset(params=402_984_960)
def axial_imagenet64() -> AxialConfig:
    """The paper's decoder of ImageNet at 64 x 64 pixels."""
    return AxialConfig(
        dim=2048, depth=16, num_heads=16, mlp_ratio=1, row=64, inner_depth=8, positions="none", res_init_scale=1e-10
    )
