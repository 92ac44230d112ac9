"""Softmax attention with grouped key-value heads, windows, rotary embedding and a key-value state.

Shapes: B batch, T positions, D width, H query heads, G key-value heads, K head width, S keys, W window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import Growth, MixerState, TokenMixer, check_state
from vertebra.backbones.layers.norm import RMSNorm
from vertebra.backbones.layers.rope import rope_angles, rotate
from vertebra.errors import LoadError, ShapeError

Implementation = Literal["sdpa", "flex"]

KEY_BLOCK = 8192
"""Keys from which a step attends part by part, and keys of a part."""
LONG_SOFT_MASK = 1024
"""Positions from which the soft mask is applied without making the weights; below, making them is faster."""
SOFT_MASK_FLOATS = 1 << 18
"""Attention weights that the soft mask is applied to at a time, where no gradient is asked for."""
MASK_ELEMENTS = 1 << 24
"""Largest mask of a step; a piece of a long prompt takes as few queries at a time as that needs."""


@dataclass(frozen=True)
class Rope:
    """Settings of the rotary embedding.

    Args:
        width: Channels of a head that are rotated.
        theta: Base of the wavelengths.
        interleaved: Pairing of the channels, see ``rotate``.
    """

    width: int
    theta: float = 10000.0
    interleaved: bool = True


class Attention(TokenMixer):
    """Scaled dot-product attention (https://arxiv.org/abs/1706.03762) with grouped key-value heads.

    Args:
        dim: Width D.
        num_heads: Query heads H.
        num_kv_heads: Key-value heads G; each serves H/G query heads (https://arxiv.org/abs/2305.13245).
        head_dim: Head width K.
        window: Keys at a distance of ``window`` or more are not seen.
        bias: Whether the projections have biases.
        out_bias: Whether the projection behind the heads has one; None for as ``bias``.
        rope: Rotary embedding of queries and keys; None for no position information.
        soft_mask: Multiply the attention weights by the causal soft mask after the softmax, without
            renormalising (https://arxiv.org/abs/2404.06773, equation 2); its rate is ``soft_mask_rate``.
        qk_norm: Eps of RMSNorms over the head width of queries and keys, before the rotary embedding, with weights
            that all heads share (https://arxiv.org/abs/2010.04245, with RMSNorm for its l2 norm); None for no norms.
    """

    soft_mask_rate: float

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        window: int | None = None,
        bias: bool = False,
        out_bias: bool | None = None,
        rope: Rope | None = None,
        soft_mask: bool = False,
        qk_norm: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.window, self.rope, self.soft_mask = window, rope, soft_mask
        self.soft_mask_rate = 0.0
        self.implementation: Implementation = "sdpa"
        self.qkv = nn.Linear(dim, (num_heads + 2 * num_kv_heads) * head_dim, bias=bias)
        self.q_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm)
        self.k_norm = None if qk_norm is None else RMSNorm(head_dim, qk_norm)
        self.proj = nn.Linear(num_heads * head_dim, dim, bias=bias if out_bias is None else out_bias)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        return self.proj(self.inner(x, layout))

    def inner(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to what the last projection gets, (B, T, H * K): the heads side by side."""
        ordered = not torch.compiler.is_compiling()  # nothing else will see these queries and keys
        q, k, v = self._project(x, torch.arange(x.shape[1], device=x.device), ordered=ordered)
        if self.soft_mask:
            y = soft_masked_attention(q, k, v, layout, self.soft_mask_rate)
        elif self.implementation == "flex":
            y = _flex(q, k, v, layout, self.window)
        elif self.window is not None and x.shape[1] > 2 * self.window and layout.prefix == 0 and layout.tree is None:
            y = windowed_attention(q, k, v, layout, self.window)
        elif layout.plain and self.window is None:
            y = _sdpa(q, k, v, is_causal=layout.causal)
        else:
            y = _sdpa(q, k, v, mask=layout.dense(self.window))
        return y.transpose(1, 2).flatten(2)

    def mixing_matrix(self, x: Tensor, layout: Layout) -> Tensor:
        """Return the attention weights (B, H, T, T) in float32, rows are queries; those of and to padding are 0."""
        q, k, _ = self._project(x, torch.arange(x.shape[1], device=x.device))
        k = k.repeat_interleave(self.num_heads // self.num_kv_heads, 1)
        scores = ((q * self.head_dim**-0.5) @ k.transpose(-1, -2)).float()  # (B, H, T, T)
        seen = layout.dense(self.window)
        weights = (scores if seen is None else scores.masked_fill(~seen, -torch.inf)).softmax(-1)
        if self.soft_mask:
            before = weights.new_ones(weights.shape[-2:]).tril()
            weights = weights * (before + self.soft_mask_rate * (1 - before))
        real = layout.mask
        return weights if real is None else weights * (real[:, :, None] & real[:, None])[:, None]

    def read_last(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to the output (B, 1, D) of the last position, which no causal or soft mask damps."""
        if self.window is not None or not layout.reads_all_last:
            return super().read_last(x, layout)
        cut = self.num_heads * self.head_dim
        if type(self.qkv) is nn.Linear:
            weight, bias = self.qkv.weight.split([cut, len(self.qkv.weight) - cut]), self.qkv.bias
            biases = (None, None) if bias is None else bias.split([cut, len(bias) - cut])
            q, keys_values = F.linear(x[:, -1:], weight[0], biases[0]), F.linear(x, weight[1], biases[1])
        else:  # an adapter, which does more than multiply by its weights
            joined = self.qkv(x)
            q, keys_values = joined[:, -1:, :cut], joined[..., cut:]
        q = q.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        k, v = keys_values.unflatten(-1, (-1, self.head_dim)).transpose(1, 2).chunk(2, dim=1)  # (B, G, T, K)
        q, k = self._normed(q, k)
        if self.rope is not None:
            angles = rope_angles(torch.arange(x.shape[1], device=x.device), self.rope.width, self.rope.theta)
            k = rotate(k, angles, self.rope.interleaved)
            q = rotate(q, (angles[0][-1:], angles[1][-1:]), self.rope.interleaved)
        return self.proj(_sdpa(q, k, v).transpose(1, 2).flatten(2))

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> AttentionState:
        """Make the empty state: a ring of ``window`` positions, or a buffer that grows up to ``max_len``."""
        ring = self.window is not None and self.window < max_len
        capacity = self.window if ring and self.window is not None else max_len
        empty = torch.empty(batch, self.num_kv_heads, 0, self.head_dim, dtype=dtype, device=device)
        return AttentionState(empty, empty.clone(), None, capacity, "ring" if ring else "linear")

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D)."""
        if isinstance(state, FixedKeys):
            return self._step_fixed(x, state)
        assert isinstance(state, AttentionState)
        start, length = state.position, x.shape[1]
        rotated = self.rope is not None
        q, k, v = self._project(x, torch.arange(start, start + length, device=x.device) if rotated else None)
        keys, values, real, first = state.extend(k, v, mask)  # (B, G, S, K)
        count = keys.shape[2]
        if length == 1 and real is None:
            y = attend_all(q, keys, values)
        else:  # of a long prompt's piece as many queries at a time as their mask may be large
            new = torch.arange(start, start + length, device=x.device)
            old = torch.arange(first, start + length, device=x.device)

            def seen(rows: slice) -> Tensor:  # (rows, S), or (B, 1, rows, S) with padding
                gap = new[rows, None] - old
                allowed = (gap >= 0) if self.window is None else (gap >= 0) & (gap < self.window)
                return allowed if real is None else ((allowed & real[:, None]) | (gap == 0))[:, None]

            size = max(1, MASK_ELEMENTS // count)
            rows = [slice(i, i + size) for i in range(0, length, size)]
            y = torch.cat([_sdpa(q[:, :, part], keys, values, mask=seen(part)) for part in rows], dim=2)
        return self.proj(y.transpose(1, 2).flatten(2))

    def _step_fixed(self, x: Tensor, state: FixedKeys) -> Tensor:
        length, held = x.shape[1], state.keys.shape[2]
        new = torch.arange(length, device=x.device)
        q, k, v = self._project(x, None if self.rope is None else state.position[:, None] + new)
        keys, values = torch.cat([state.keys, k], dim=2), torch.cat([state.values, v], dim=2)  # (B, G, M + T, K)
        old = torch.arange(held + length, device=x.device)
        gap = (held + new)[:, None] - old  # (T, M + T)
        seen = (gap >= 0) if self.window is None else (gap >= 0) & (gap < self.window)
        filled = old >= held - state.position[:, None]  # (B, M + T)
        y = _sdpa(q, keys, values, mask=(seen & filled[:, None])[:, None])
        state.keys, state.values = keys[:, :, length:], values[:, :, length:]
        return self.proj(y.transpose(1, 2).flatten(2))

    def _project(self, x: Tensor, positions: Tensor | None, *, ordered: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Return q (B, H, T, K), k and v (B, G, T, K).

        ``positions``, (T,) or those of each item (B, T), are needed for rotary embedding only.
        """
        sizes = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, H+2G, T, K)
        if self.rope is None:
            q, k, v = heads.split(sizes, dim=1)
            return *self._normed(q, k), v
        assert positions is not None
        angles = rope_angles(positions, self.rope.width, self.rope.theta)
        if positions.ndim == 2:
            angles = (angles[0][:, None], angles[1][:, None])  # (B, 1, T, width/2)
        turned, v = heads.split([sum(sizes[:2]), sizes[2]], dim=1)
        if self.q_norm is not None:
            turned = torch.cat(self._normed(*turned.split(sizes[:2], dim=1)), dim=1)
        q, k = rotate(turned, angles, self.rope.interleaved, ordered=ordered).split(sizes[:2], dim=1)
        return q, k, v

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        return self.q_norm(q), self.k_norm(k)


class AttentionState(MixerState):
    """Keys and values of earlier positions, oldest first.

    Args:
        keys: Keys (B, G, S, K); rows beyond the used ones are room to grow.
        values: Values, the same shape.
        real: Real positions (B, S); None when all are.
        capacity: Most positions held.
        growth: ``ring`` drops the oldest position when full, ``linear`` refuses more.
    """

    def __init__(self, keys: Tensor, values: Tensor, real: Tensor | None, capacity: int, growth: Growth) -> None:
        self.keys, self.values, self.real = keys, values, real
        self.capacity, self.growth = capacity, growth
        self.position = 0  # positions seen so far
        self.start = 0  # first used row
        self.used = 0

    def tensors(self) -> list[Tensor]:
        """Return the tensors held."""
        return [t for t in (self.keys, self.values, self.real) if t is not None]

    def select(self, indices: Tensor) -> AttentionState:
        """Return a new state of the batch items ``indices`` (N,)."""
        rows = indices.to(self.keys.device)
        real = None if self.real is None else self.real[rows]
        new = AttentionState(self.keys[rows], self.values[rows], real, self.capacity, self.growth)
        new.position, new.start, new.used = self.position, self.start, self.used
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``keys`` and ``values`` (B, G, S, K) of the positions held, ``real`` (B, S), and ``position``."""
        view = slice(self.start, self.start + self.used)
        shape = (self.keys.shape[0], self.used)
        real = torch.ones(shape, dtype=torch.bool) if self.real is None else self.real[:, view]
        found = {"keys": self.keys[:, :, view], "values": self.values[:, :, view], "real": real}
        return {**found, "position": torch.tensor(self.position)}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        check_state({k: v for k, v in self.state_dict().items() if k in ("keys", "values")}, tensors, free=(2,))
        used = tensors["keys"].shape[2]
        if used > self.capacity - (self.growth == "ring"):
            raise LoadError(
                f"state: {used} positions do not fit in a state made for max_len={self.capacity}; make it with a "
                "larger max_len."
            )
        self.keys, self.values = tensors["keys"].to(self.keys), tensors["values"].to(self.values)
        self.real = None if bool(tensors["real"].all()) else tensors["real"].to(self.keys.device)
        self.position, self.start, self.used = int(tensors["position"]), 0, used

    def extend(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """Append k and v (B, G, T, K); return all keys, values and marks in view, and the first one's position."""
        count = k.shape[2]
        if self.growth == "linear" and self.used + count > self.capacity:
            raise ShapeError(
                f"step: {self.used + count} positions do not fit in a state made for max_len={self.capacity}; "
                "make it with a larger max_len."
            )
        if mask is not None and self.real is None:
            self.real = torch.ones(self.keys.shape[0], self.keys.shape[2], dtype=torch.bool, device=k.device)
        if self.real is not None and mask is None:
            mask = torch.ones(k.shape[0], count, dtype=torch.bool, device=k.device)
        first = self.position - self.used
        self.position += count
        if self.growth == "ring" and count > 1:
            return *self._roll(k, v, mask), first
        self._make_room(count)
        stop = self.start + self.used + count
        rows, view = slice(stop - count, stop), slice(self.start, stop)
        self.keys[:, :, rows], self.values[:, :, rows] = k, v
        if self.real is not None and mask is not None:
            self.real[:, rows] = mask
        real = None if self.real is None else self.real[:, view]
        # In a ring the next query sees itself and capacity - 1 earlier positions.
        self.used = min(self.used + count, self.capacity - (self.growth == "ring"))
        self.start = stop - self.used
        return self.keys[:, :, view], self.values[:, :, view], real, first

    def _roll(self, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append many positions to a ring: all are in view now, the last capacity - 1 are kept."""
        view = slice(self.start, self.start + self.used)
        keys = torch.cat([self.keys[:, :, view], k], dim=2)
        values = torch.cat([self.values[:, :, view], v], dim=2)
        real = None if self.real is None or mask is None else torch.cat([self.real[:, view], mask], dim=1)
        self.start, self.used = 0, min(keys.shape[2], self.capacity - 1)
        tail = slice(keys.shape[2] - self.used, None)
        self.keys, self.values = keys[:, :, tail].clone(), values[:, :, tail].clone()
        self.real = None if real is None else real[:, tail].clone()
        return keys, values, real

    def _make_room(self, count: int) -> None:
        if self.start + self.used + count <= self.keys.shape[2]:
            return
        need = self.used + count
        # Twice the need, so that rows are moved once in as many steps; a ring stays below two windows.
        size = min(2 * need, self.capacity) if self.growth == "linear" else 2 * need
        view = slice(self.start, self.start + self.used)

        def moved(old: Tensor, axis: int) -> Tensor:
            shape = list(old.shape)
            shape[axis] = size
            fresh = old.new_zeros(shape)
            fresh.narrow(axis, 0, self.used).copy_(old.narrow(axis, view.start, self.used))
            return fresh

        self.keys, self.values = moved(self.keys, 2), moved(self.values, 2)
        self.real = None if self.real is None else moved(self.real, 1)
        self.start = 0


class FixedKeys(MixerState):
    """Keys and values of the last M positions, the newest last: tensors whose shapes never change, see ``fixed.py``.

    Args:
        keys: Keys (B, G, M, K); what stands before an item's first position is never seen.
        values: Values, the same shape.
        position: Positions that each item has read, int (B,); who steps counts them.
    """

    growth: Growth = "constant"

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        self.keys, self.values, self.position = keys, values, position

    def tensors(self) -> list[Tensor]:
        """Return the tensors held."""
        return [self.keys, self.values]

    def select(self, indices: Tensor) -> FixedKeys:
        """Return a new state of the batch items ``indices`` (N,)."""
        rows = indices.to(self.keys.device)
        return FixedKeys(self.keys[rows], self.values[rows], self.position[rows])

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``keys`` and ``values``."""
        return {"keys": self.keys, "values": self.values}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        check_state(self.state_dict(), tensors)
        self.keys, self.values = tensors["keys"], tensors["values"]


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int) -> Tensor:
    """Attend within a window in time and memory linear in T: blocks of W queries see their own and neighbour blocks.

    Args:
        q: Queries (B, H, T, K).
        k: Keys (B, G, T, K).
        v: Values (B, G, T, K).
        layout: What the positions are to each other.
        window: W; only keys at a distance below it are seen.

    Returns:
        (B, H, T, K).
    """
    batch, _, length, _ = q.shape
    blocks = -(-length // window)
    sides = (1, 0) if layout.causal and layout.block is None else (1, 1)
    pad = blocks * window - length
    span = (1 + sum(sides)) * window

    def near(x: Tensor) -> Tensor:  # (B, G, T, K) -> (B, blocks, G, span, K), a view
        padded = F.pad(x, (0, 0, sides[0] * window, sides[1] * window + pad))
        return padded.unfold(2, span, window).permute(0, 2, 1, 4, 3)

    folded = F.pad(q, (0, 0, 0, pad)).unflatten(2, (blocks, window)).transpose(1, 2)  # (B, blocks, H, W, K)
    keys, values = near(k), near(v)

    def attend(part: slice) -> Tensor:  # (B, blocks of the part, H, W, K)
        mask = _block_mask(layout, window, sides, part)
        count = part.stop - part.start
        mask = mask.expand(batch, count, 1, window, span).flatten(0, 1)
        here, ks, vs = (t[:, part].flatten(0, 1) for t in (folded, keys, values))
        y = _sdpa(here, ks, vs, mask=mask)
        return y.unflatten(0, (batch, count))

    # Without padding and packing all blocks that see no end of the sequence have one mask, made and held once.
    last = blocks - 1 - sides[1]
    if layout.plain:
        parts = [slice(0, 1), *[slice(1, last)] * (last > 1), *(slice(i, i + 1) for i in range(max(last, 1), blocks))]
    else:
        size = max(1, MASK_ELEMENTS // (batch * window * span))
        parts = [slice(start, min(start + size, blocks)) for start in range(0, blocks, size)]
    y = torch.cat([attend(part) for part in parts], dim=1)
    return y.transpose(1, 2).flatten(2, 3)[:, :, :length]


def _block_mask(layout: Layout, window: int, sides: tuple[int, int], part: slice) -> Tensor:
    """Return what the blocks of ``part`` see: bool (B or 1, blocks or 1, 1, W, span)."""
    device, length = layout.device, layout.length
    shared = layout.plain
    numbers = torch.arange(part.start, part.start + 1 if shared else part.stop, device=device)
    b = torch.arange(1 if shared else layout.batch, device=device)[:, None, None, None]
    start = numbers[:, None, None] * window
    q_at = start + torch.arange(window, device=device)[:, None]  # (blocks, W, 1)
    k_at = start - sides[0] * window + torch.arange((1 + sum(sides)) * window, device=device)  # (blocks, 1, span)
    inside = (k_at >= 0) & (k_at < length)
    seen = layout.predicate(window)(b, b, q_at.clamp(max=length - 1), k_at.clamp(0, length - 1)) & inside
    seen = seen | (q_at == k_at)
    return seen.expand(len(b), *seen.shape[-3:])[:, :, None]


def partial_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Attend to a part of the keys, in a form that ``merge_partials`` joins exactly.

    Args:
        q: Queries (B, H, T, K).
        k: Keys of the part (B, G, S, K).
        v: Values of the part (B, G, S, K).
        mask: Which keys a query sees, bool, broadcast to (B, G, H/G, T, S); a query may see none.

    Returns:
        The output over these keys alone (B, H, T, K) in float32, and the log of the sum of the exponentials of its
        scores (B, H, T), -inf where it saw none.
    """
    grouped = q.unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # (B, G, H/G * T, K): a group's keys are read once
    scores = (grouped @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B, G, H/G * T, S)
    if mask is not None:
        scores = scores.unflatten(2, (-1, q.shape[2])).masked_fill(~mask, -torch.inf).flatten(2, 3)
    total = scores.logsumexp(-1, keepdim=True)
    weights = (scores - total.clamp(min=torch.finfo(torch.float32).min)).exp()
    y = weights.to(v.dtype) @ v
    return y.float().reshape(q.shape), total.reshape(q.shape[:-1])


def merge_partials(outputs: Sequence[Tensor], totals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Join attention over parts of the keys to attention over all of them, exactly (split-KV, as in Flash-Decoding).

    Args:
        outputs: Of ``partial_attention``, each (B, H, T, K).
        totals: Of the same, each (B, H, T).

    Returns:
        Output and total of all parts together, which may be merged further.
    """
    total = torch.stack(list(totals))  # (parts, B, H, T)
    whole = total.logsumexp(0)
    weights = (total - whole.clamp(min=torch.finfo(torch.float32).min)).exp()
    return (torch.stack(list(outputs)) * weights[..., None]).sum(0), whole


def attend_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend from one query q (B, H, 1, K) to all keys (B, G, S, K), part by part where there are many."""
    return _sdpa(q, k, v) if k.shape[2] < KEY_BLOCK else split_attention(q, k, v)


def split_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Callable[[slice], Tensor | None] = lambda part: None, size: int | None = None
) -> Tensor:
    """Attend to the keys part by part and merge: exact, and scores of one part at a time are in memory.

    Args:
        q: Queries (B, H, T, K).
        k: Keys (B, G, S, K).
        v: Values (B, G, S, K).
        seen: Returns the mask of a part of the keys, as ``partial_attention`` takes it; None where all are seen.
        size: Keys of a part; None for ``KEY_BLOCK``.

    Returns:
        (B, H, T, K) in the dtype of q.
    """
    size = size or KEY_BLOCK
    parts = [slice(start, start + size) for start in range(0, k.shape[2], size)]
    done = [partial_attention(q, k[:, :, part], v[:, :, part], seen(part)) for part in parts]
    return merge_partials([y for y, _ in done], [total for _, total in done])[0].to(q.dtype)


def soft_masked_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, rate: float) -> Tensor:
    """Attend to all positions, then damp later ones: (softmax(q k / sqrt(K)) * S) v.

    S is ``rate`` above the diagonal and 1 elsewhere, and there is no renormalisation (iLLaMA,
    https://arxiv.org/abs/2404.06773, equation 2 and algorithm 1).
    """
    repeats = q.shape[1] // k.shape[1]
    if layout.mask is None and layout.segments is None and q.device.type == "cpu" and q.shape[2] >= LONG_SOFT_MASK:
        return long_soft_masked_attention(q, k, v, rate)
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    size = max(1, SOFT_MASK_FLOATS // (q.shape[1] * q.shape[2] ** 2))
    if layout.plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling() and size < len(q):
        parts = zip(*(t.split(size) for t in (q, k, v)), strict=True)  # whose weights stay in a CPU's cache
        return torch.cat([soft_masked_attention(a, b, c, layout, rate) for a, b, c in parts])
    scores = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).float()  # (B, H, T, T)
    mask = layout.dense()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if rate == 0:
        weights = weights.tril() if torch.is_grad_enabled() else weights.tril_()
    elif rate != 1:
        soft = weights.new_full(weights.shape[-2:], rate).triu(1) + weights.new_ones(weights.shape[-2:]).tril()
        weights = weights * soft  # (T, T)
    return weights.to(v.dtype) @ v


def long_soft_masked_attention(q: Tensor, k: Tensor, v: Tensor, rate: float) -> Tensor:
    """``soft_masked_attention`` of whole sequences in memory linear in T: the weights are never made.

    Causal attention has the same weights up to its smaller sum, so out = causal * exp(total_causal - total), and the
    soft mask mixes it with attention to all: rate * all + (1 - rate) * out.
    """
    everything, total = _AttentionWithTotal.apply(q, k, v, False)
    if rate == 1:
        return everything
    causal, total_causal = _AttentionWithTotal.apply(q, k, v, True)
    damped = causal * (total_causal - total).exp()[..., None].to(causal.dtype)
    return damped if rate == 0 else rate * everything + (1 - rate) * damped


class _AttentionWithTotal(torch.autograd.Function):
    """Attention and the log of the sum of its exponentials (B, H, T), which torch's kernel has no gradient for."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        repeats = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(repeats, 1) if repeats > 1 else t for t in (k, v))
        y, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, 0.0, causal)
        ctx.save_for_backward(q, k, v)
        ctx.causal = causal
        return y, total

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dtotal: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        scale, weight = q.shape[-1] ** -0.5, dtotal[..., None].to(q.dtype)
        with torch.enable_grad():
            y = _sdpa(q, k, v, is_causal=ctx.causal)
            # d total / d q is the mean of the keys under the weights; d total / d k what a value's gradient is for q.
            means = _sdpa(q.detach(), k.detach(), (stand_in := k.detach().requires_grad_()), is_causal=ctx.causal)
        dq, dk, dv = torch.autograd.grad(y, (q, k, v), dy)
        (spread,) = torch.autograd.grad(means, stand_in, q.detach() * weight)
        return dq + scale * weight * means.detach(), dk + scale * spread, dv, None


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped)


def _flex(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    length = q.shape[2]
    block_mask = create_block_mask(layout.predicate(window), q.shape[0], 1, length, length, device=q.device.type)
    run = torch.compile(flex_attention) if q.is_cuda else flex_attention
    y = run(q, k, v, block_mask=block_mask, enable_gqa=q.shape[1] != k.shape[1])
    assert isinstance(y, Tensor)
    return y
