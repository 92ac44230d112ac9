"""FIT: transformer layers within groups of positions, and between the groups through latents.

Far-reaching Interleaved Transformers (https://arxiv.org/abs/2305.12689). A sequence is cut into groups of n positions
("x"), and every group owns m latents ("z"). Local layers work on x within a group, latent layers on the latents of all
groups; in between latents read from their group and positions read the latents back. With m fixed and n growing as
L^(1/3), the cost of attention over L positions is O(L^(4/3)). The arithmetic is that of the authors' FIT, FITAR and
FITDenoiser (pix2seq, ``architectures/transformers.py``). Beyond the paper: any number of groups, grids of any shape,
padded and packed batches, and decoding.

The layers are in ``layers/interleaved.py``; here is what is around them: groups, positions, first latents, states.

Shapes: B batch, G groups, S positions of a group (n), M latents of a group (m), D width of x, E width of the latents,
H heads, K head width, C context tokens, T positions of a call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, BackboneConfig, Between, State, Taps, preset
from vertebra.backbones.layers.attention import Attention
from vertebra.backbones.layers.groups import Cursor, TensorState, align, cut
from vertebra.backbones.layers.interleaved import CrossAttention, FITLayers, Plan
from vertebra.backbones.layers.mlp import MLP
from vertebra.errors import ConfigError, LoadError, ShapeError

Positions = Literal["learned", "sin_cos", "none"]
C = TypeVar("C", bound="FITConfig")


@dataclass(frozen=True, kw_only=True)
class FITConfig(BackboneConfig):
    """Structure of a FIT.

    Args:
        dim: Width D of x.
        layers: Local layers in brackets and latent layers between them, as in ``(2)4(2)``: two local layers, read,
            four latent layers, write, two local layers.
        depth: Number of layers, counted from ``layers``; leave it out.
        group_size: Positions n of a group. Grids are cut into blocks of that volume.
        latents: Latents m of a group.
        latent_dim: Width E of the latents.
        num_heads: Heads of the local layers; cross attention has the smaller of both numbers.
        latent_heads: Heads of the latent layers.
        mlp_ratio: Inner width of the MLPs, relative to their outer one.
        groups: Most groups there may be, each with learned latents of its own, as in the paper; 0 for any number:
            learned latents that all groups share, plus a sin/cos code of the group's place.
        x_positions: What tells the positions of a group apart.
        x_self_attention: Whether local layers attend; otherwise they are MLPs alone, without dropout.
        cross_mlp: Whether an MLP follows each read and write.
        kv_norm: Whether what cross attention reads is normalised.
        context: Whether latents also read context tokens after each read of x; see ``FIT.with_latents``.
        norm_eps: Added to the variance of the norms.
        dropout: Share of the outputs of a layer's branches that is zeroed in training.
        drop_path: Share of items (in local layers: of groups) for which a branch is skipped in training, the same for
            all layers.
    """

    depth: int = 0
    layers: str
    group_size: int
    latents: int
    latent_dim: int
    num_heads: int
    latent_heads: int
    mlp_ratio: int = 4
    groups: int = 0
    x_positions: Positions = "learned"
    x_self_attention: bool = True
    cross_mlp: bool = False
    kv_norm: bool = True
    context: bool = False
    norm_eps: float = 1e-6
    dropout: float = 0.0
    drop_path: float = 0.0

    family: ClassVar[str] = "fit"

    def __post_init__(self) -> None:
        plan = self.plan
        if plan[-1][1]:
            raise ConfigError(
                f"FITConfig: layers must end with local layers in brackets, whose output the backbone returns; got "
                f"{self.layers!r}, use {self.layers + '(1)'!r}."
            )
        if len(plan) == 1:
            raise ConfigError(
                f"FITConfig: layers must hold latent layers, without which no group sees another; got {self.layers!r}, "
                f"use {self.layers + '1(1)'!r}."
            )
        count = sum(map(sum, plan))
        if self.depth not in (0, count):
            raise ConfigError(
                f"FITConfig: depth is counted from layers, {count} in {self.layers!r}, got {self.depth}; leave depth "
                "out and set layers."
            )
        object.__setattr__(self, "depth", count)
        super().__post_init__()
        for name in ("group_size", "latents", "latent_dim", "num_heads", "latent_heads", "mlp_ratio"):
            if getattr(self, name) < 1:
                raise ConfigError(f"FITConfig: {name} must be at least 1, got {getattr(self, name)}.")
        if self.groups < 0:
            raise ConfigError(f"FITConfig: groups must be 0 (any number) or positive, got {self.groups}.")
        for width, divisor in (("dim", "num_heads"), ("latent_dim", "latent_heads")):
            if getattr(self, width) % getattr(self, divisor):
                raise ConfigError(
                    f"FITConfig: {width} ({getattr(self, width)}) must be a multiple of {divisor} "
                    f"({getattr(self, divisor)})."
                )
        narrow, heads = min(self.dim, self.latent_dim), min(self.num_heads, self.latent_heads)
        if narrow % heads:
            raise ConfigError(
                f"FITConfig: the smaller of dim and latent_dim ({narrow}) must be a multiple of the smaller of "
                f"num_heads and latent_heads ({heads}), which cross attention has."
            )
        if self.x_positions not in ("learned", "sin_cos", "none"):
            raise ConfigError(f"FITConfig: x_positions must be learned, sin_cos or none, got {self.x_positions!r}.")
        for name in ("dropout", "drop_path"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"FITConfig: {name} must be in [0, 1), got {getattr(self, name)}.")

    @property
    def plan(self) -> Plan:
        """Numbers of local and latent layers, by block."""
        return parse_layers(self.layers)

    def replace(self: C, **changes: Any) -> C:
        """Return a copy with some fields changed; new ``layers`` are counted anew.

        Raises:
            ConfigError: A field the family does not have.
        """
        return super().replace(**({"depth": 0, **changes} if "layers" in changes else changes))

    def build(self) -> FIT:
        """Make the backbone with fresh weights."""
        return FIT(self)


class FIT(Backbone):
    """Groups of positions with latents between them.

    The bidirectional form cuts a sequence into segments and a grid into blocks, ``block_shape``. The causal form is
    the paper's FITAR: a grid is read in raster order and cut into segments; positions see earlier ones of their group,
    and the latents of the groups before, which they read from the group before theirs.
    """

    config: FITConfig

    def __init__(self, config: FITConfig) -> None:
        super().__init__(config)
        learned = config.x_positions == "learned"
        self.x_positions = nn.Parameter(torch.empty(config.group_size, config.dim)) if learned else None
        self.latents = nn.Parameter(torch.empty(max(config.groups, 1) * config.latents, config.latent_dim))
        self.core = FITLayers(
            config.plan,
            config.dim,
            config.latent_dim,
            config.num_heads,
            config.latent_heads,
            mlp_ratio=config.mlp_ratio,
            causal=config.causal,
            x_self_attention=config.x_self_attention,
            cross_mlp=config.cross_mlp,
            kv_norm=config.kv_norm,
            context=config.context,
            norm_eps=config.norm_eps,
            dropout=config.dropout,
            drop_path=config.drop_path,
        )
        self.norm = nn.LayerNorm(config.dim, config.norm_eps)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights.

        | parameter | distribution |
        | --- | --- |
        | queries, keys, values | uniform up to sqrt(6 / (inputs * (H + K))), as Keras draws them by head |
        | output of attention | uniform up to sqrt(6 / (H * (K + outputs))), likewise |
        | MLPs | Glorot uniform |
        | x_positions, latents | normal, std 0.02, cut at 2 std |
        | biases | 0 |
        | norms | 1 |
        """
        for module in self.modules():
            if isinstance(module, Attention | CrossAttention):
                heads, width = module.num_heads, module.head_dim
                drawn = [module.qkv] if isinstance(module, Attention) else [module.q, module.kv]
                for linear in drawn:
                    _uniform(linear, 6 / (linear.in_features * (heads + width)))
                _uniform(module.proj, 6 / (heads * (width + module.proj.out_features)))
            elif isinstance(module, MLP):
                for linear in (module.fc1, module.fc2):
                    _uniform(linear, 6 / (linear.in_features + linear.out_features))
        for table in (self.x_positions, self.latents):
            if table is not None:
                nn.init.trunc_normal_(table, std=0.02, a=-0.04, b=0.04)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        hidden: list[Tensor] | None = None,
        taps: Taps | None = None,
    ) -> Tensor:
        """Map x (B, *grid, D) to (B, *grid, D); see ``Backbone.forward``.

        Packed sequences of a grid are read in raster order. Latent layers add x as it stands to ``hidden``, and their
        taps change x, not the latents.

        Raises:
            ShapeError: The shapes disagree, or there are more groups than ``config.groups``.
        """
        return self.with_latents(x, mask, segments, hidden, taps)[0]

    def with_latents(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        segments: Tensor | None = None,
        hidden: list[Tensor] | None = None,
        taps: Taps | None = None,
        *,
        context: Tensor | None = None,
        add: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map x (B, *grid, D) to (B, *grid, D), and give the latents (B, G, M, E) after the last read, not normalised.

        Args:
            x: As in ``forward``.
            mask: As in ``forward``.
            segments: As in ``forward``; every packed sequence is then an item of the latents.
            hidden: As in ``forward``.
            taps: As in ``forward``.
            context: Tokens (B, C, E) that the latents read, with ``config.context``; without them they are left out.
            add: Added to the first latents: (B, G, M, E), or what broadcasts to it.

        Raises:
            ConfigError: There is a context, and the backbone was built without.
            ShapeError: The shapes disagree, or there are more groups than ``config.groups``.
        """
        self._check(x, mask, segments)
        if context is not None and not self.config.context:
            raise ConfigError("FIT: this backbone was built with context=False; set context=true.")
        groups = self._group(x, mask, segments)
        between = Between(self, hidden, taps, groups.back, lambda y, _: self._group(y, mask, segments).x)
        x = groups.x if (code := self._x_code(groups.block, x)) is None else groups.x + code
        z = self._first_latents(groups.grid).to(x.dtype).expand(len(x), -1, -1, -1)
        if add is not None:
            z = z + add
        x, z = self.core(x, z, groups.real, context=context, may_be_empty=groups.may_be_empty, visit=between)
        return groups.back(self.norm(x)), z

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FITState:
        """Make the empty state for up to ``max_len`` positions; see ``Backbone.init_state``."""
        if not self.config.causal:
            raise ConfigError("FIT: causal=False has no state; a later position changes all outputs.")
        dtype, device = dtype or self.latents.dtype, torch.device(device or self.latents.device)
        tensors = self.core.init_state(batch, self.config.group_size, self.config.latents, dtype, device)
        tensors["position"] = torch.zeros(batch, dtype=torch.long, device=device)
        free = {name: 1 for name in tensors if name.endswith("latents")}
        return FITState(tensors, free, max_len)

    def step(self, x: Tensor, state: State, mask: Tensor | None = None, taps: Taps | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); see ``Backbone.step``.

        Raises:
            ShapeError: The shapes disagree, or there are more positions than the state was made for.
        """
        size = self.config.group_size
        if not isinstance(state, FITState):
            raise ConfigError("FIT.step: the state must come from this backbone's init_state.")
        if x.ndim != 3 or x.shape[-1] != self.config.dim or x.shape[0] != state.batch_size:
            raise ShapeError(f"FIT.step: x must be ({state.batch_size}, T, {self.config.dim}), got {tuple(x.shape)}.")
        if mask is not None and bool((mask[:, :-1] & ~mask[:, 1:]).any()):
            raise ShapeError("FIT.step: padding must stand on the left of the real positions.")
        rows, real, back = align(x, mask, None)
        cursor = Cursor(state.tensors["position"], x.shape[1], size, real)
        last = int(cursor.advanced.max())
        if last > state.capacity:
            raise ShapeError(
                f"step: {last} positions do not fit in a state made for max_len={state.capacity}; make it with a "
                "larger max_len."
            )
        self._check_groups(-(-last // size))
        if (code := self._x_code((size,), rows)) is not None:
            rows = rows + code[cursor.slot % size]
        between = Between(self, None, taps, back, lambda y, _: align(y, mask, None)[0])
        rows = self.core.step(
            rows, state.tensors, cursor, lambda numbers: self._latents_of(numbers[..., None]), between
        )
        state.tensors["position"] = cursor.advanced
        return back(self.norm(rows))

    def set_recompute(self, recompute: bool, piece: int | None = None) -> None:
        """Trade time for memory in training; see ``Backbone.set_recompute`` and ``FITLayers``."""
        if piece is not None and piece < 1:
            raise ConfigError(f"FIT.set_recompute: piece must be at least 1, got {piece}.")
        self.core.recompute, self.core.piece = recompute, piece

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that weight decay must leave alone."""
        return {"latents", "x_positions"} if self.config.x_positions == "learned" else {"latents"}

    def layer_of(self, name: str) -> int:
        """Index of the layer a parameter belongs to: reads count as the layer after them, writes as that before."""
        parts = name.split(".")
        if parts[0] == "core" and parts[1] in ("reads", "contexts", "writes"):
            latent = self.core.stages[int(parts[2])].latent
            return latent[-1] if parts[1] == "writes" else latent[0]
        return 0 if parts[0] in ("latents", "x_positions") else super().layer_of(name)

    def _group(self, x: Tensor, mask: Tensor | None, segments: Tensor | None) -> Groups:
        shape, size = x.shape, self.config.group_size
        if not self.config.causal and x.ndim > 3 and segments is None:
            groups = group_grid(x, mask, block_shape(size, x.ndim - 2))
        else:
            rows, real, back = align(x.flatten(1, -2), None if mask is None else mask.flatten(1), segments)
            length, may_be_empty = rows.shape[1], real is not None
            if real is None and length % size:
                real = torch.ones(rows.shape[:2], dtype=torch.bool, device=x.device)
            groups = Groups(
                cut(rows, size),
                # In the causal form padding stands behind all that is real, where no mask is needed to hide it.
                None if real is None or self.config.causal else cut(real, size),
                may_be_empty,
                (-(-length // size),),
                (size,),
                lambda y: back(y.flatten(1, 2)[:, :length]).reshape(shape),
            )
        self._check_groups(math.prod(groups.grid))
        return groups

    def _check_groups(self, count: int) -> None:
        if 0 < self.config.groups < count:
            raise ShapeError(
                f"FIT: at most groups={self.config.groups} groups of {self.config.group_size} positions fit, got "
                f"{count}; set a larger groups, or 0 for any number."
            )

    def _x_code(self, block: tuple[int, ...], like: Tensor) -> Tensor | None:
        """Return what is added to the positions of a group (S, D)."""
        if self.config.x_positions == "none":
            return None
        if self.config.x_positions == "learned":
            return self.x_positions
        return sin_cos(spread(block, like.device), self.config.dim).to(like.dtype)

    def _first_latents(self, grid: tuple[int, ...]) -> Tensor:
        """Return the latents (G, M, E) that all items begin with."""
        if self.config.groups:
            return self._latents_of(torch.arange(math.prod(grid), device=self.latents.device)[:, None])
        axes = [torch.arange(size, device=self.latents.device) for size in grid]
        return self._latents_of(torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2))

    def _latents_of(self, places: Tensor) -> Tensor:
        """Map the places of groups (..., axes) to their first latents (..., M, E)."""
        if self.config.groups:
            return self.latents.unflatten(0, (self.config.groups, -1))[places[..., 0].clamp(max=self.config.groups - 1)]
        code = sin_cos(places.flatten(0, -2).float(), self.config.latent_dim).to(self.latents.dtype)
        return code.unflatten(0, places.shape[:-1])[..., None, :] + self.latents


class FITState(TensorState):
    """What a causal FIT remembers: the unfinished group, and keys and values of the latents of finished ones.

    Args:
        tensors: By name, batch axis first.
        free: Axes, by name of the tensor, whose size grows with the position.
        capacity: Most positions there may be.
    """

    def __init__(self, tensors: dict[str, Tensor], free: dict[str, int], capacity: int) -> None:
        super().__init__(tensors, "groups", free)
        self.capacity = capacity

    def select(self, indices: Tensor) -> FITState:
        """Keep the batch items ``indices`` (N,), in that order."""
        return FITState(super().select(indices).tensors, self.free, self.capacity)

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        own = dict(self.tensors)
        super().load_state_dict({k: v.clone() for k, v in tensors.items()})  # steps write into them
        if (last := int(self.tensors["position"].max())) > self.capacity:
            self.tensors = own
            raise LoadError(
                f"state: {last} positions do not fit in a state made for max_len={self.capacity}; make it with a "
                "larger max_len."
            )


# ---------------------------------------------------------------- parts


class Groups(NamedTuple):
    """Positions cut into groups.

    Args:
        x: (B, G, S, D).
        real: Real positions, bool (B, G, S); None when all are, or where none need be hidden.
        may_be_empty: Whether there may be groups without a real position.
        grid: Groups along every axis.
        block: Positions of a group along every axis.
        back: Maps groups (B, G, S, D) to (B, *grid, D).
    """

    x: Tensor
    real: Tensor | None
    may_be_empty: bool
    grid: tuple[int, ...]
    block: tuple[int, ...]
    back: Callable[[Tensor], Tensor]


# ---------------------------------------------------------------- functions


def parse_layers(text: str) -> Plan:
    """Read numbers of local and latent layers, by block: ``(2)4(2)`` is ((2, 4), (2, 0)).

    Raises:
        ConfigError: The text is of another form, or a block other than the last has no latent layers.
    """
    full = f"{text}0" if text.endswith(")") else text
    if not re.fullmatch(r"(\([0-9]+\)[0-9]+)+", full):
        raise ConfigError(
            f"layers must be numbers of local layers in brackets and of latent layers between them, as in '(2)4(2)', "
            f"got {text!r}."
        )
    plan = tuple((int(local), int(latent)) for local, latent in re.findall(r"\(([0-9]+)\)([0-9]+)", full))
    if not all(latent for _, latent in plan[:-1]):
        raise ConfigError(f"layers must have at least one latent layer between two brackets, got {text!r}.")
    return plan


def block_shape(size: int, axes: int) -> tuple[int, ...]:
    """Share the prime factors of ``size`` out over ``axes`` axes, as evenly as the largest first gives: 8 is 4 x 2."""
    factors, rest, prime = [], size, 2
    while rest > 1:
        if rest % prime:
            prime += 1
        else:
            factors.append(prime)
            rest //= prime
    sides = [1] * axes
    for factor in reversed(factors):
        sides[sides.index(min(sides))] *= factor
    return tuple(sorted(sides, reverse=True))


def group_grid(x: Tensor, mask: Tensor | None, block: tuple[int, ...]) -> Groups:
    """Cut a grid into blocks, both in raster order; blocks at the far ends are filled up.

    Args:
        x: (B, *grid, D).
        mask: Real positions, bool (B, *grid); None when all are.
        block: Positions of a block along every axis.
    """
    shape = x.shape[1:-1]
    padding = [-side % part for side, part in zip(shape, block, strict=True)]
    may_be_empty = mask is not None
    if mask is None and any(padding):
        mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)
    grid = tuple((side + more) // part for side, more, part in zip(shape, padding, block, strict=True))
    pad = [end for more in reversed(padding) for end in (0, more)]
    pairs = [size for pair in zip(grid, block, strict=True) for size in pair]
    axes = [*range(1, 2 * len(block), 2), *range(2, 2 * len(block) + 1, 2)]  # groups, then positions of a group

    def laid(t: Tensor) -> Tensor:  # (B, *grid, F) -> (B, G, S, F)
        t = F.pad(t, [0, 0, *pad]) if any(padding) else t
        t = t.reshape(len(t), *pairs, t.shape[-1]).permute(0, *axes, 2 * len(block) + 1)
        return t.reshape(len(t), math.prod(grid), math.prod(block), t.shape[-1])

    def back(y: Tensor) -> Tensor:
        order = [0] * len(axes)
        for place, axis in enumerate(axes):
            order[axis - 1] = place + 1
        y = y.reshape(len(y), *grid, *block, y.shape[-1]).permute(0, *order, len(axes) + 1)
        y = y.reshape(len(y), *(g * b for g, b in zip(grid, block, strict=True)), y.shape[-1])
        for axis, side in enumerate(shape):
            y = y.narrow(axis + 1, 0, side)
        return y

    real = None if mask is None else laid(mask[..., None])[..., 0]
    return Groups(laid(x), real, may_be_empty, grid, block, back)


def spread(shape: Sequence[int], device: torch.device | None = None, top: float = 1000.0) -> Tensor:
    """Coordinates (N, axes) of a grid in raster order, from 0 to ``top`` along every axis; axes of 1 are left out."""
    axes = [torch.linspace(0, top, side, device=device) for side in shape if side > 1]
    if not axes:
        return torch.zeros(1, 1, device=device)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)


def sin_cos(places: Tensor, dim: int) -> Tensor:
    """Sines, then cosines of coordinates at wavelengths that grow geometrically to 10,000 turns.

    Args:
        places: Coordinates (N, axes).
        dim: Channels, shared out over the axes.

    Returns:
        (N, dim) in float32.
    """
    parts, axes = [], places.shape[1]
    for axis in range(axes):
        channels = dim // axes + (axis < dim % axes)
        j = torch.arange(channels, device=places.device)
        angles = places[:, axis, None].float() * (1 / 10000.0 ** (2.0 * (j // 2) / channels))
        parts += [angles[:, 0::2].sin(), angles[:, 1::2].cos()]
    return torch.cat(parts, dim=-1)


def _uniform(linear: nn.Linear, square: float) -> None:
    nn.init.uniform_(linear.weight, -math.sqrt(square), math.sqrt(square))
    nn.init.zeros_(linear.bias)


# ---------------------------------------------------------------- presets


@preset(params=12_384)
def fit_test() -> FITConfig:
    """For tests: some thousand parameters."""
    return FITConfig(
        dim=16, layers="(1)1(1)", group_size=8, latents=2, latent_dim=24, num_heads=2, latent_heads=4, mlp_ratio=2
    )


@preset(params=938_976)
def fit_nano() -> FITConfig:
    """For a laptop: trains in minutes on two cores."""
    return FITConfig(dim=96, layers="(2)2(2)", group_size=64, latents=8, latent_dim=128, num_heads=4, latent_heads=4)


@preset(params=37_684_096)
def fit_small() -> FITConfig:
    """For one GPU, with the compute of iLLaMA's S; the paper's sizes are not known to us."""
    return FITConfig(
        dim=384, layers="(3)3(3)3(3)", group_size=64, latents=16, latent_dim=512, num_heads=6, latent_heads=8
    )


@preset(params=252_995_840)
def fit_base() -> FITConfig:
    """For long sequences on large GPUs; the paper's sizes are not known to us."""
    return FITConfig(
        dim=768, layers="(3)4(3)4(3)4(3)", group_size=256, latents=32, latent_dim=1024, num_heads=12, latent_heads=16
    )
