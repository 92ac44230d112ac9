"""OPT: the decoder of GPT-3 with learned positions (https://arxiv.org/abs/2205.01068), in both norm forms.

Biases everywhere, LayerNorm, an MLP with ReLU. Most sizes norm before a branch and once at the end; the one of 350M,
which the released MeshAnything models are (https://arxiv.org/abs/2406.10163), norms the sum behind a branch, and not at
the end. That form with causal=False, GELU and no positions is the layer of BERT (https://arxiv.org/abs/1810.04805).
Embedding, projections to and from its width, and head belong to the domain. Beyond the original: grids, packed batches,
and padding anywhere.

Shapes: B batch, T positions (a grid in raster order), D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import State, Tap, Taps, preset
from vertebra.backbones.layers.attention import Attention, AttentionState, attend_all
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import MixerState, check_state
from vertebra.backbones.layers.mlp import MLP
from vertebra.backbones.loading.pretrained import load_state
from vertebra.backbones.stack import Block, SequenceBackbone, StackConfig, StackState
from vertebra.errors import ConfigError, LoadError, ShapeError

Positions = Literal["learned", "none"]
Naming = Literal["opt", "bert"]

OFFSET = 2
"""Rows of the table before that of the first position; padding has the row before it, and one is never read."""


@dataclass(frozen=True, kw_only=True)
class OPTConfig(StackConfig):
    """Structure of an OPT stack.

    Args:
        heads: Attention heads; the head width is dim / heads.
        hidden: Inner width of the MLP.
        activation: Of the MLP, ``relu`` or ``gelu`` (exact).
        norm_first: Norm before every branch and once at the end, instead of the sum behind every branch alone.
        final_norm: Whether there is that norm at the end.
        positions: ``learned`` adds a row of a table for the place among the real positions of the sequence; ``none``
            leaves positions to the input.
        max_length: Most real positions of a sequence with learned positions; the table has two rows more.
        norm_eps: Added to the variance of the norms.
        dropout: Share of each branch's output that is zeroed in training.
        drop_path: Share of items for which a branch of the last layer is skipped in training; grows linearly from 0.
    """

    heads: int
    hidden: int
    activation: Literal["relu", "gelu"] = "relu"
    norm_first: bool = True
    final_norm: bool = True
    positions: Positions = "learned"
    max_length: int = 2048
    norm_eps: float = 1e-5

    family: ClassVar[str] = "opt"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads < 1 or self.dim % self.heads:
            raise ConfigError(f"OPTConfig: dim ({self.dim}) must be a multiple of heads ({self.heads}).")
        for name in ("hidden", "max_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"OPTConfig: {name} must be at least 1, got {getattr(self, name)}.")
        if self.activation not in ("relu", "gelu"):
            raise ConfigError(f"OPTConfig: activation must be relu or gelu, got {self.activation!r}.")
        if self.positions not in ("learned", "none"):
            raise ConfigError(f"OPTConfig: positions must be learned or none, got {self.positions!r}.")

    @property
    def ends_in_norm(self) -> bool:
        """Whether a norm stands behind the last layer."""
        return self.norm_first and self.final_norm

    def build(self) -> OPT:
        """Make the backbone with fresh weights."""
        return OPT(self)


# ---------------------------------------------------------------- backbone


class OPT(SequenceBackbone):
    """Learned positions, then blocks of attention and an MLP."""

    position_tables = ("positions.weight",)
    config: OPTConfig

    def __init__(self, config: OPTConfig) -> None:
        def norm() -> nn.Module:
            return nn.LayerNorm(config.dim, config.norm_eps)

        kind = Block if config.norm_first else PostNormBlock
        blocks = [
            kind(
                Attention(config.dim, config.heads, config.heads, config.dim // config.heads, bias=True),
                MLP(config.dim, config.hidden, config.activation),
                norm,
                config.dropout,
                drop_path,
            )
            for drop_path in config.drop_paths()
        ]
        super().__init__(config, blocks, norm() if config.ends_in_norm else nn.Identity())
        learned = config.positions == "learned"
        self.positions = nn.Embedding(config.max_length + OFFSET, config.dim) if learned else None
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights.

        | parameter | distribution |
        | --- | --- |
        | weights of projections, positions | normal, std 0.02 |
        | biases | 0 |
        | norms | 1 |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def init_state(
        self,
        batch: int,
        max_len: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> OPTState:
        """Make the empty state for up to ``max_len`` positions; see ``Backbone.init_state``.

        Raises:
            ConfigError: The backbone is not causal, or has fewer learned positions.
        """
        layers = super().init_state(batch, max_len, dtype=dtype, device=device).layers
        if self.positions is not None and max_len > self.config.max_length:
            raise ConfigError(
                f"OPT.init_state: max_len={max_len} is beyond the {self.config.max_length} learned positions; build "
                "the backbone with a larger max_length, or decode less."
            )
        return OPTState(layers, batch, self._weights())

    def step(self, x: Tensor, state: State, mask: Tensor | None = None, taps: Taps | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); see ``Backbone.step``.

        One position without padding takes a short way with the same numbers: in small models the calls of modules take
        longer than their arithmetic.
        """
        known = isinstance(state, OPTState) and state.weights is not None and state.real is None
        if known and mask is None and taps is None and not self.training and not torch.compiler.is_compiling():
            assert isinstance(state, OPTState)
            if x.shape == (state.batch_size, 1, self.config.dim) and len(state.layers) == len(self.layers):
                return self._step_one(x, state)
        return super().step(x, state, mask, taps)

    def _step_one(self, x: Tensor, state: OPTState) -> Tensor:
        assert state.weights is not None
        config = self.config
        heads, first = config.heads, config.norm_first
        activate = F.relu if config.activation == "relu" else F.gelu

        def norm(x: Tensor, weights: tuple[Tensor, Tensor]) -> Tensor:
            return F.layer_norm(x, (config.dim,), *weights, config.norm_eps)

        x = self._place_next(x, state, None)  # (B, 1, D)
        for weights, layer in zip(state.weights, state.layers, strict=True):
            assert isinstance(layer, AttentionState)
            joined = F.linear(norm(x, weights.norm1) if first else x, *weights.qkv)  # (B, 1, 3D)
            q, k, v = joined.view(len(x), 3 * heads, 1, -1).split(heads, dim=1)  # (B, H, 1, K)
            keys, values, _, _ = layer.extend(k, v, None)
            x = x + F.linear(attend_all(q, keys, values).reshape(x.shape), *weights.proj)
            x = x if first else norm(x, weights.norm1)
            h = activate(F.linear(norm(x, weights.norm2) if first else x, *weights.fc1))
            x = x + F.linear(h, *weights.fc2)
            x = x if first else norm(x, weights.norm2)
        return self.norm(x)

    def _weights(self) -> list[LayerWeights] | None:
        """Return the weights of all layers; None if a part does more than multiply by them (an adapter, a hook)."""
        found = []
        for block in self.layers:
            if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules()):
                return None
            parts = [block.get_submodule(name) for name in _PARTS["opt"]]
            if any(type(part) not in (nn.Linear, nn.LayerNorm) for part in parts):
                return None
            found.append(LayerWeights._make((part.weight, part.bias) for part in parts))
        return found

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that weight decay must leave alone."""
        return set() if self.positions is None else {"positions.weight"}

    def layer_of(self, name: str) -> int:
        """Index of the layer the parameter ``name`` belongs to; positions count as the first."""
        return 0 if name == "positions.weight" else super().layer_of(name)

    def _place(self, x: Tensor, layout: Layout) -> Tensor:
        if self.positions is None:
            return x
        rows = places(layout)
        self._check_length(layout.length, rows)
        return x + self._rows(0, layout.length, rows).to(x.dtype)

    def _place_next(self, x: Tensor, state: StackState, mask: Tensor | None) -> Tensor:
        assert isinstance(state, OPTState)
        start = state.count
        rows = state.advance(x.shape[1], mask)
        if self.positions is None:
            return x
        self._check_length(state.count, rows)
        return x + self._rows(start, state.count, rows).to(x.dtype)

    def _rows(self, start: int, stop: int, rows: Tensor | None) -> Tensor:
        assert self.positions is not None
        if rows is None:
            return self.positions.weight[OFFSET + start : OFFSET + stop]
        return F.embedding(rows + OFFSET, self.positions.weight)

    def _check_length(self, length: int, rows: Tensor | None) -> None:
        most = self.config.max_length
        if length <= most or (rows is not None and torch.compiler.is_compiling()):
            return
        longest = length if rows is None else int(rows.max()) + 1
        if longest > most:
            raise ShapeError(
                f"OPT: a sequence of {longest} positions is longer than the {most} learned ones; build the backbone "
                "with a larger max_length, or cut the sequence."
            )


class PostNormBlock(Block):
    """norm(x + mixer(x)), then norm(x + mlp(x)); arguments and pieces as in ``Block``."""

    def read_last(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to the output (B, 1, D) of the last position alone."""
        keep = self._keep(x)
        y = self.norm1(x[:, -1:] + self._branch(self.mixer.read_last(x, layout), None if keep is None else keep[0]))
        return self._close(self._channels(y, keep), None)

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None, inside: Tap | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D); ``inside`` as in ``forward``."""
        x = self.norm1(x + self.mixer.step(x, state, mask))
        return self._close(self._channels(x, None), inside)

    def _mix(self, x: Tensor, layout: Layout, keep: Tensor | None) -> Tensor:
        return self.norm1(x + self._branch(self.mixer(x, layout), None if keep is None else keep[0]))

    def _channels(self, x: Tensor, keep: Tensor | None) -> Tensor:
        assert self.mlp is not None
        return x + self._branch(self.mlp(x), None if keep is None else keep[1])

    def _close(self, x: Tensor, inside: Tap | None) -> Tensor:
        assert self.norm2 is not None
        y = self.norm2(x if inside is None else inside(x))
        assert isinstance(y, Tensor)
        return y


def places(layout: Layout) -> Tensor | None:
    """Return the place of every position among the real ones of its sequence, int (B, T), from 0; -1 at padding.

    None where a row is one sequence without padding: places are then indices.
    """
    if layout.mask is None and layout.segments is None:
        return None
    shape = (layout.batch, layout.length)
    real = torch.ones(shape, dtype=torch.long, device=layout.device) if layout.mask is None else layout.mask.long()
    before = real.cumsum(1) - real
    found = before
    if layout.segments is not None:
        begins = F.pad(layout.segments[:, 1:] != layout.segments[:, :-1], (1, 0), value=True)
        found = before - (before * begins).cummax(1).values
    return torch.where(real > 0, found, -1)


class LayerWeights(NamedTuple):
    """Weight and bias of each part of a layer, in the order of ``_PARTS``."""

    norm1: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    proj: tuple[Tensor, Tensor]
    norm2: tuple[Tensor, Tensor]
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]


class OPTState(StackState):
    """The states of all layers, and how many positions have been read.

    Args:
        layers: Of the layers.
        batch: Number of items B.
        weights: Of the layers as they were when the state was made, if a step may use them without the modules.

    Attributes:
        count: Positions read, padding included.
        real: Real positions read by each item, int (B,); None while no item has had padding.
    """

    def __init__(self, layers: list[MixerState], batch: int, weights: list[LayerWeights] | None = None) -> None:
        super().__init__(layers, batch)
        self.weights = weights
        self.count = 0
        self.real: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return super().nbytes + (0 if self.real is None else self.real.nbytes)

    def advance(self, count: int, mask: Tensor | None) -> Tensor | None:
        """Count the next positions, and return what ``places`` does for them."""
        start = self.count
        self.count += count
        if mask is None and self.real is None:
            return None
        if mask is None:
            assert self.real is not None
            found = self.real[:, None] + torch.arange(count, device=self.real.device)
            self.real = self.real + count
            return found
        real = torch.full((len(mask),), start, device=mask.device) if self.real is None else self.real
        total = real[:, None] + mask.cumsum(1)
        self.real = total[:, -1]
        return torch.where(mask, total - 1, -1)

    def select(self, indices: Tensor) -> OPTState:
        """Keep the batch items ``indices`` (N,), in that order."""
        new = OPTState(super().select(indices).layers, len(indices), self.weights)
        new.count = self.count
        new.real = None if self.real is None else self.real[indices.to(self.real.device)]
        return new

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything that is remembered by name."""
        real = torch.full((self.batch_size,), self.count) if self.real is None else self.real
        return {**super().state_dict(), "count": torch.tensor(self.count), "real": real}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        check_state({k: v for k, v in self.state_dict().items() if k in ("count", "real")}, tensors)
        super().load_state_dict(tensors)
        self.count = int(tensors["count"])
        padded = bool((tensors["real"] != self.count).any())
        self.real = tensors["real"].to(self.layers[0].tensors()[0].device, copy=True) if padded else None


# ---------------------------------------------------------------- weights of transformers

_PARTS: dict[Naming, dict[str, tuple[str, ...]]] = {
    "opt": {
        "norm1": ("self_attn_layer_norm",),
        "mixer.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mixer.proj": ("self_attn.out_proj",),
        "norm2": ("final_layer_norm",),
        "mlp.fc1": ("fc1",),
        "mlp.fc2": ("fc2",),
    },
    "bert": {
        "norm1": ("attention.output.LayerNorm",),
        "mixer.qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
        "mixer.proj": ("attention.output.dense",),
        "norm2": ("output.LayerNorm",),
        "mlp.fc1": ("intermediate.dense",),
        "mlp.fc2": ("output.dense",),
    },
}
"""Parts of a layer by their names here and in transformers; several are put together along their outputs."""


def transformers_names(config: OPTConfig, naming: Naming = "opt") -> dict[str, tuple[str, ...]]:
    """Return what each of our parameters is called in transformers, relative to its decoder or encoder.

    Args:
        config: Structure.
        naming: ``opt`` for an ``OPTDecoder``, ``bert`` for a ``BertEncoder``.

    Returns:
        ``{ours: (theirs, ...)}``; several are one of ours, put together along axis 0.

    Raises:
        ConfigError: BERT's encoder has no such structure.
    """
    if naming == "bert" and (config.norm_first or config.positions != "none"):
        raise ConfigError("transformers_names: BERT's encoder is norm_first=False and positions='none'.")
    layers = "layers" if naming == "opt" else "layer"
    found = {
        f"layers.{i}.{ours}.{kind}": tuple(f"{layers}.{i}.{name}.{kind}" for name in theirs)
        for i in range(config.depth)
        for ours, theirs in _PARTS[naming].items()
        for kind in ("weight", "bias")
    }
    if config.ends_in_norm:
        found |= {f"norm.{kind}": (f"final_layer_norm.{kind}",) for kind in ("weight", "bias")}
    if config.positions == "learned":
        found["positions.weight"] = ("embed_positions.weight",)
    return found


def load_opt(backbone: OPT, tensors: Mapping[str, Tensor], prefix: str = "", naming: Naming = "opt") -> set[str]:
    """Load the weights of a decoder or encoder of transformers.

    Args:
        backbone: Where to load.
        tensors: Checkpoint; other models' tensors may be among them.
        prefix: Of the decoder's names, ``model.decoder.`` in an ``OPTForCausalLM``.
        naming: As in ``transformers_names``.

    Returns:
        The names that were loaded. Embedding, projections and head are left to the caller.

    Raises:
        LoadError: A tensor is missing or misshapen, or the checkpoint has layers, a last norm or positions that the
            backbone does not have; nothing is loaded then.
    """
    names = transformers_names(backbone.config, naming)
    used = {prefix + name for theirs in names.values() for name in theirs}
    if missing := sorted(used - tensors.keys()):
        raise LoadError(f"load_opt: the checkpoint lacks {_few(missing)}; is the prefix {prefix!r} right?")
    own = tuple(prefix + part for part in ("layers.", "layer.", "final_layer_norm.", "embed_positions."))
    if extra := sorted(name for name in tensors if name.startswith(own) and name not in used):
        raise LoadError(
            f"load_opt: the backbone has no place for {_few(extra)}; change its config to the checkpoint's."
        )
    joined = {ours: torch.cat([tensors[prefix + name] for name in theirs]) for ours, theirs in names.items()}
    load_state(backbone, joined, source=f"load_opt: the tensors {prefix}*")
    return used


def _few(names: list[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# ---------------------------------------------------------------- presets


@preset(params=70_016)
def opt_test() -> OPTConfig:
    """For tests: norms behind the branches; most parameters are positions, enough for every recipe's sequences."""
    return OPTConfig(dim=16, depth=2, heads=2, hidden=32, norm_first=False, max_length=4096)


@preset(params=719_808)
def opt_nano() -> OPTConfig:
    """For a laptop: trains in minutes on two cores."""
    return OPTConfig(dim=96, depth=6, heads=4, hidden=256)


@preset(params=86_630_400)
def opt_125m() -> OPTConfig:
    """The paper's 125M, without embedding."""
    return OPTConfig(dim=768, depth=12, heads=12, hidden=3072)


@preset(params=304_408_576)
def opt_350m() -> OPTConfig:
    """The paper's 350M without embedding and projections; its norms stand behind the branches."""
    return OPTConfig(dim=1024, depth=24, heads=16, hidden=4096, norm_first=False)
