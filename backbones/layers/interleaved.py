"""Interleaved layers: within groups of positions, and between the groups through latents; the core of FIT.

Shapes: B batch, G groups, S positions of a group, M latents of a group, D width of x, E width of the latents, H heads,
K head width, C context tokens, T positions of a call, N groups of all items (B * G).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers import recompute
from vertebra.backbones.layers.attention import Attention
from vertebra.backbones.layers.groups import Cursor
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mlp import MLP
from vertebra.backbones.stack import DEVICE_PIECE, PIECE_FLOATS, Block

Plan = tuple[tuple[int, int], ...]
"""Numbers of local and latent layers, by block."""


class Stage(NamedTuple):
    """One block: indices of its local layers, then of its latent layers, and whether a write follows."""

    local: range
    latent: range
    writes: bool


class FITLayers(nn.Module):
    """The layers of a FIT on groups that are cut already: x (B, G, S, D) and z (B, G, M, E) to the same.

    Args:
        plan: Numbers of local and latent layers, by block.
        dim: D.
        latent_dim: E.
        num_heads: Heads of the local layers.
        latent_heads: Heads of the latent layers.
        mlp_ratio: Inner width of the MLPs, relative to their outer one.
        causal: The autoregressive form: local layers are causal, and a group reads the latents of the one before.
        causal_latents: Whether latents see those of their own and earlier groups only; None for as ``causal``.
        x_self_attention: As in ``FITConfig``.
        cross_mlp: As in ``FITConfig``.
        kv_norm: As in ``FITConfig``.
        context: As in ``FITConfig``.
        norm_eps: As in ``FITConfig``.
        dropout: As in ``FITConfig``.
        drop_path: As in ``FITConfig``.

    Attributes:
        recompute: Keep the inputs of every layer, read and write alone in training, and compute the rest again.
        piece: Positions, in whole groups, that local layers, reads and writes work on at a time under ``recompute``
            and where no gradient is asked for; None for what fits the cache of a CPU.
    """

    def __init__(
        self,
        plan: Plan,
        dim: int,
        latent_dim: int,
        num_heads: int,
        latent_heads: int,
        *,
        mlp_ratio: int = 4,
        causal: bool = False,
        causal_latents: bool | None = None,
        x_self_attention: bool = True,
        cross_mlp: bool = False,
        kv_norm: bool = True,
        context: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.causal_latents = causal if causal_latents is None else causal_latents
        self.widest = max(mlp_ratio, 3) * dim
        self.recompute = False
        self.piece: int | None = None
        self.stages: list[Stage] = []
        self.layers, self.reads, self.contexts, self.writes = (nn.ModuleList() for _ in range(4))

        def layer(width: int, heads: int) -> nn.Module:
            return Block(
                Attention(width, heads, heads, width // heads, bias=True),
                MLP(width, mlp_ratio * width),
                lambda: nn.LayerNorm(width, norm_eps),
                dropout,
                drop_path,
            )

        def cross(width: int, source: int, heads: int) -> CrossAttention:
            mlp = MLPLayer(width, mlp_ratio, norm_eps) if cross_mlp else None
            return CrossAttention(width, source, heads, kv_norm=kv_norm, norm_eps=norm_eps, mlp=mlp)

        heads = min(num_heads, latent_heads)
        for number, (local, latent) in enumerate(plan):
            start, last = len(self.layers), number == len(plan) - 1
            for _ in range(local):
                self.layers.append(layer(dim, num_heads) if x_self_attention else MLPLayer(dim, mlp_ratio, norm_eps))
            for _ in range(latent):
                self.layers.append(layer(latent_dim, latent_heads))
            self.stages.append(Stage(range(start, start + local), range(start + local, len(self.layers)), not last))
            if latent:
                self.reads.append(cross(latent_dim, dim, heads))
                if context:
                    read = CrossAttention(latent_dim, latent_dim, latent_heads, kv_norm=kv_norm, norm_eps=norm_eps)
                    self.contexts.append(read)
                if not last:
                    self.writes.append(cross(dim, latent_dim, heads))

    def forward(
        self,
        x: Tensor,
        z: Tensor,
        real: Tensor | None = None,
        *,
        context: Tensor | None = None,
        may_be_empty: bool = True,
        visit: Callable[[int, Tensor], Tensor] = lambda index, x: x,
    ) -> tuple[Tensor, Tensor]:
        """Map x (B, G, S, D) and z (B, G, M, E) to the same.

        Args:
            x: Positions of the groups.
            z: Latents of the groups.
            real: Real positions, bool (B, G, S); None when all are. The causal form expects padding behind all others.
            context: Tokens (B, C, E) that the latents read, where the layers were built for them.
            may_be_empty: Whether there may be groups without a real position.
            visit: Maps the index of a layer, local or latent, and x (B, G, S, D) behind it to the x that goes on.
        """
        batch, groups = x.shape[:2]
        x, latents = x.flatten(0, 1), z.shape[2]
        filled = None if real is None or not may_be_empty else real.any(-1).repeat_interleave(latents, 1)
        between = Layout(
            batch=batch,
            length=groups * latents,
            device=x.device,
            causal=self.causal_latents,
            mask=filled,
            block=latents if self.causal_latents else None,
        )
        within = readable = None
        if real is not None:
            within = real.flatten(0, 1)  # (N, S)
            readable = within | ~within.any(-1, keepdim=True)  # what an empty group's latents read, nobody sees
        for number, stage in enumerate(self.stages):
            for index in stage.local:
                x = self._pieces(functools.partial(self._local, self.layers[index]), x.shape[1], x, within)
                x = visit(index, x.unflatten(0, (batch, groups))).flatten(0, 1)
            if not stage.latent:
                continue
            z = self._pieces(self.reads[number], x.shape[1], z.flatten(0, 1), x, readable)
            z = z.unflatten(0, (batch, -1)).flatten(1, 2)  # (B, G * M, E)
            if context is not None:
                z = self._again(self.contexts[number], z, context)
            for index in stage.latent:
                z = self._again(self.layers[index], z, between)
                x = visit(index, x.unflatten(0, (batch, groups))).flatten(0, 1)
            z = z.unflatten(1, (groups, latents))
            if stage.writes:
                source = torch.cat([torch.zeros_like(z[:, :1]), z[:, :-1]], dim=1) if self.causal else z
                x = self._pieces(self.writes[number], x.shape[1], x, source.flatten(0, 1))
        return x.unflatten(0, (batch, groups)), z

    def init_state(
        self, batch: int, size: int, latents: int, dtype: torch.dtype, device: torch.device
    ) -> dict[str, Tensor]:
        """Make what ``step`` remembers, for groups of ``size`` positions and ``latents`` latents."""
        tensors = {}
        for number, stage in enumerate(self.stages):
            for index in stage.local:
                layer = self.layers[index]
                if isinstance(layer, Block):  # keys and values of the unfinished group
                    tensors[f"layers.{index}.group"] = torch.zeros(batch, size, 2 * _width(layer))
            for index in stage.latent:  # of the latents of finished groups
                tensors[f"layers.{index}.latents"] = torch.zeros(batch, 0, 2 * _width(self.layers[index]))
            if stage.latent:  # x of the unfinished group
                tensors[f"reads.{number}"] = torch.zeros(batch, size, self._cross(self.reads, number).kv.in_features)
            if stage.writes:  # keys and values of the latents of the group before, which are 0 for the first one
                write = self._cross(self.writes, number)
                with torch.no_grad():
                    none = write.kv.weight.new_zeros(batch, latents, write.kv.in_features)
                    tensors[f"writes.{number}"] = write.keys_values(none)
        return {name: t.to(device, dtype) for name, t in tensors.items()}

    def step(
        self,
        x: Tensor,
        held: dict[str, Tensor],
        cursor: Cursor,
        first: Callable[[Tensor], Tensor],
        visit: Callable[[int, Tensor], Tensor] = lambda index, x: x,
    ) -> Tensor:
        """Map the next positions x (B, T, D), real ones first, to (B, T, D).

        Latents are computed once, when their group is finished, for the items that finish one.

        Args:
            x: With their positions in the group.
            held: From ``init_state``, or an earlier step; its tensors are replaced.
            cursor: Where the positions stand.
            first: Gives the first latents (..., M, E) of groups by number (...).
            visit: Maps the index of a layer, and x (B, T, D) behind it, to the x that goes on.
        """
        finished = cursor.finished.sum(1)
        count = int(finished.max())
        items = finished.nonzero()[:, 0]
        numbers = cursor.number[items, :count]  # (items, count): beyond its own an item computes what nobody reads
        z = first(numbers).to(x.dtype)  # (items, count, M, E)
        for number, stage in enumerate(self.stages):
            for index in stage.local:
                x = visit(index, self._step_local(index, x, held, cursor))
            if not stage.latent:
                continue
            name = f"reads.{number}"
            window = cursor.place(x.to(held[name].dtype), held[name])
            held[name] = _rest(cursor, window)
            if count:
                z = self.reads[number](z.flatten(0, 1), window[items, :count].flatten(0, 1).to(x.dtype))
                z = z.unflatten(0, numbers.shape)
                for index in stage.latent:
                    z = self._step_latent(index, z, held, items, numbers)
            for index in stage.latent:
                x = visit(index, x)
            if stage.writes:
                x = self._step_write(number, x, z, held, cursor, items)
        return x

    def _step_local(self, index: int, x: Tensor, held: dict[str, Tensor], cursor: Cursor) -> Tensor:
        layer, name = self.layers[index], f"layers.{index}.group"
        if not isinstance(layer, Block):
            return layer(x)
        attention = _attention(layer)
        q, new = attention.qkv(layer.norm1(x)).split([_width(layer), 2 * _width(layer)], dim=-1)
        window = cursor.place(new.to(held[name].dtype), held[name])  # (B, G, S, 2D)
        held[name] = _rest(cursor, window)
        keys_values = window.flatten(0, 1).to(q.dtype)
        if x.shape[1] == 1:  # one query: it sees what of its group is filled
            y = _attend(q, keys_values, attention.num_heads, cursor.filled[:, 0][:, None, None])
        else:
            queries = cursor.place(q, q.new_zeros(len(q), cursor.size, q.shape[-1]))
            y = _attend(queries.flatten(0, 1), keys_values, attention.num_heads, is_causal=True)
            y = cursor.take(y.unflatten(0, (len(x), -1)))
        return _channels(layer, x + attention.proj(y))

    def _step_latent(self, index: int, z: Tensor, held: dict[str, Tensor], items: Tensor, numbers: Tensor) -> Tensor:
        layer, name, latents = self.layers[index], f"layers.{index}.latents", z.shape[2]
        assert isinstance(layer, Block)
        attention, flat = _attention(layer), z.flatten(1, 2)  # (items, count * M, E)
        q, new = attention.qkv(layer.norm1(flat)).split([_width(layer), 2 * _width(layer)], dim=-1)
        need = (int(numbers.max()) + 1) * latents
        if (room := held[name].shape[1]) < need:  # twice the need, so that rows are moved once in as many groups
            held[name] = F.pad(held[name], (0, 0, 0, (2 * need if room else need) - room))
        rows = (numbers[..., None] * latents + torch.arange(latents, device=z.device)).flatten(1)
        held[name][items[:, None], rows] = new.to(held[name].dtype)
        owner = torch.arange(need, device=z.device) // latents
        seen = owner <= numbers.repeat_interleave(latents, 1)[..., None]  # (items, count * M, need)
        y = _attend(q, held[name][items, :need].to(q.dtype), attention.num_heads, seen[:, None])
        return _channels(layer, flat + attention.proj(y)).unflatten(1, (-1, latents))

    def _step_write(
        self, number: int, x: Tensor, z: Tensor, held: dict[str, Tensor], cursor: Cursor, items: Tensor
    ) -> Tensor:
        write, name = self._cross(self.writes, number), f"writes.{number}"
        before = held[name]
        sources = before[:, None].repeat(1, cursor.groups, 1, 1)  # (B, G, M, 2HK)
        if len(items):
            new = write.keys_values(z).to(before.dtype)  # (items, count, M, 2HK)
            inside = min(new.shape[1], cursor.groups - 1)
            sources[items, 1 : inside + 1] = new[:, :inside]
            last = cursor.finished[items].sum(1) - 1
            held[name] = before.index_copy(0, items, new[torch.arange(len(items), device=x.device), last])
        if x.shape[1] == 1:
            return write.attend(x, sources[:, 0])
        window = cursor.place(x, x.new_zeros(len(x), cursor.size, x.shape[-1]))
        y = write.attend(window.flatten(0, 1), sources.flatten(0, 1))
        return cursor.take(y.unflatten(0, (len(x), -1)))

    def _local(self, layer: nn.Module, x: Tensor, real: Tensor | None) -> Tensor:
        if not isinstance(layer, Block):
            return layer(x)
        return layer(x, Layout(batch=len(x), length=x.shape[1], device=x.device, causal=self.causal, mask=real))

    def _pieces(self, run: Callable[..., Tensor], size: int, *args: Tensor | None) -> Tensor:
        """Call ``run`` on some groups (N, ...) of ``size`` positions at a time."""
        whole = next(len(a) for a in args if a is not None)
        count = whole
        if not torch.compiler.is_compiling() and (self.recompute or not torch.is_grad_enabled()):
            device = next(a.device for a in args if a is not None)
            if self.piece is not None:
                count = self.piece // size
            elif device.type == "cpu":
                count = PIECE_FLOATS // (size * self.widest)
            elif self.recompute:
                count = DEVICE_PIECE // size
        count = max(count, 1)
        if count >= whole:
            return self._again(run, *args)
        count = -(-whole // -(-whole // count))  # evenly
        parts = [[None] * -(-whole // count) if a is None else a.split(count) for a in args]
        return torch.cat([self._again(run, *part) for part in zip(*parts, strict=True)])

    def _again(self, run: Callable[..., Tensor], *args: Any) -> Tensor:
        if not self.recompute:
            return run(*args)
        result = recompute.again(run, *args, training=self.training)
        assert isinstance(result, Tensor)
        return result

    def _cross(self, modules: nn.ModuleList, number: int) -> CrossAttention:
        module = modules[number]
        assert isinstance(module, CrossAttention)
        return module


class CrossAttention(nn.Module):
    """x + attention(norm(x), norm(source)), and an MLP layer if there is one.

    Args:
        dim: Width of x.
        source_dim: Width of what is read.
        num_heads: H; the head width K is the smaller of both widths / H.
        kv_norm: Whether what is read is normalised.
        norm_eps: Added to the variance of the norms.
        mlp: What follows.
    """

    def __init__(
        self,
        dim: int,
        source_dim: int,
        num_heads: int,
        *,
        kv_norm: bool = True,
        norm_eps: float = 1e-6,
        mlp: MLPLayer | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, min(dim, source_dim) // num_heads
        inner = self.num_heads * self.head_dim
        self.norm = nn.LayerNorm(dim, norm_eps)
        self.kv_norm = nn.LayerNorm(source_dim, norm_eps) if kv_norm else None
        self.q = nn.Linear(dim, inner)
        self.kv = nn.Linear(source_dim, 2 * inner)
        self.proj = nn.Linear(inner, dim)
        self.mlp = mlp

    def forward(self, x: Tensor, source: Tensor, real: Tensor | None = None) -> Tensor:
        """Map x (N, T, D) to (N, T, D).

        Args:
            x: What reads.
            source: What is read (N, S, E).
            real: What of it is real, bool (N, S), at least one a row; None when all is.
        """
        return self.attend(x, self.keys_values(source), real)

    def keys_values(self, source: Tensor) -> Tensor:
        """Map what is read (..., S, E) to its keys and values (..., S, 2HK)."""
        return self.kv(source if self.kv_norm is None else self.kv_norm(source))

    def attend(self, x: Tensor, keys_values: Tensor, real: Tensor | None = None) -> Tensor:
        """Map x (N, T, D) to (N, T, D), with ``keys_values`` (N, S, 2HK)."""
        q = self.q(self.norm(x))
        x = x + self.proj(
            _attend(q, keys_values.to(q.dtype), self.num_heads, None if real is None else real[:, None, None])
        )
        return x if self.mlp is None else self.mlp(x)


class MLPLayer(nn.Module):
    """x + mlp(norm(x)).

    Args:
        dim: Width of x.
        mlp_ratio: Inner width, relative to ``dim``.
        norm_eps: Added to the variance of the norm.
    """

    def __init__(self, dim: int, mlp_ratio: int = 4, norm_eps: float = 1e-6) -> None:
        super().__init__()
        self.norm2 = nn.LayerNorm(dim, norm_eps)
        self.mlp = MLP(dim, mlp_ratio * dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., D) to (..., D)."""
        return x + self.mlp(self.norm2(x))


def _attend(q: Tensor, keys_values: Tensor, heads: int, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attend with q (N, T, HK) to ``keys_values`` (N, S, 2HK); ``mask`` is bool and broadcasts to (N, 1, T, S)."""
    k, v = keys_values.unflatten(-1, (2 * heads, -1)).transpose(1, 2).chunk(2, dim=1)
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal).transpose(1, 2).flatten(2)


def _rest(cursor: Cursor, window: Tensor) -> Tensor:
    return window[:, 0] if cursor.groups == 1 else cursor.rest(window)  # spares one-position steps a gather


def _channels(layer: Block, x: Tensor) -> Tensor:
    assert layer.mlp is not None
    assert layer.norm2 is not None
    return x + layer.mlp(layer.norm2(x))


def _attention(layer: nn.Module) -> Attention:
    assert isinstance(layer, Block)
    assert isinstance(layer.mixer, Attention)
    return layer.mixer


def _width(layer: nn.Module) -> int:
    attention = _attention(layer)
    return attention.num_heads * attention.head_dim
