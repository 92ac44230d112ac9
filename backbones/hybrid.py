"""Hybrid of Mamba-2, Mamba-1 and attention, in any pattern of layers.

Sources: Mamba-2 (https://arxiv.org/abs/2405.21060) and HybriDNA (https://arxiv.org/abs/2502.10807), whose layout is
the presets': one attention layer in every eight, no positional encoding, SwiGLU after every mixer. With
``pattern="M"`` and ``hidden_dim=0`` it is plain Mamba-2; with ``rope_fraction=0.5`` it is Bamba; with ``pattern="S"``
and ``hidden_dim=0`` it is Mamba-1 (https://arxiv.org/abs/2312.00752); with S in place of M and ``s6_norms`` it is a
Jamba without experts (https://arxiv.org/abs/2403.19887). ``mamba_form`` has the students of two distillations from
attention, see ``layers/mamba2.py``. Beyond the papers: an encoder form (causal=False) in which a second Mamba-2 reads
each sequence from its end.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from vertebra.backbones.base import preset
from vertebra.backbones.layers.attention import Attention, Rope
from vertebra.backbones.layers.mamba1 import Mamba1, Mamba1Shape
from vertebra.backbones.layers.mamba2 import FORMS, BidirectionalMamba2, Form, Mamba2, Mamba2Shape
from vertebra.backbones.layers.mixer import TokenMixer
from vertebra.backbones.layers.mlp import SwiGLU
from vertebra.backbones.layers.norm import RMSNorm
from vertebra.backbones.stack import Block, SequenceBackbone, StackConfig
from vertebra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class HybridConfig(StackConfig):
    """Structure of a hybrid stack.

    Args:
        pattern: One letter a layer, M for Mamba-2, S for Mamba-1 (causal only) and A for attention, repeated to
            ``depth``: ``MMMMAMMM``.
        hidden_dim: Inner width of SwiGLU after every mixer; 0 for none.
        expand: Inner width of Mamba-2 and Mamba-1 as a multiple of dim.
        mamba_head_dim: Width of a Mamba-2 head.
        mamba_groups: Groups of Mamba-2 heads that share B and C.
        mamba_form: Mamba-2 as it is, or as MOHAWK's or mmMamba's student of an attention layer: ``mamba2``, ``mohawk``
            or ``mmmamba``.
        mamba_bias: Whether the first and the last projection of Mamba-2 have biases.
        state_dim: State width of Mamba-2.
        s6_state_dim: State width of Mamba-1.
        dt_rank: Width from which Mamba-1's step sizes are projected; 0 for dim / 16, rounded up.
        s6_norms: RMSNorms on Mamba-1's narrow step sizes, B and C, as in Jamba.
        conv_kernel: Taps of the causal convolution of Mamba-2 and Mamba-1.
        conv_bias: Whether that convolution has a bias.
        dt_limit: Range that Mamba-2's step sizes are clamped to; None for none.
        num_heads: Query heads of attention layers; the head width is dim / num_heads.
        num_kv_heads: Key-value heads, a divisor of num_heads; 0 for as many as query heads.
        window: Window of attention layers: one number, or a list repeated over all layers; 0 for none.
        attention_bias: Whether the projections of attention layers have biases.
        proj_bias: Whether the one behind the heads has one too where the others have.
        rope_fraction: Share of an attention head's channels that rotary embedding turns; 0 for no positional encoding.
        rope_theta: Base of the rotary wavelengths.
        rope_interleaved: Whether it turns pairs of neighbours, as in iLLaMA, instead of half-split pairs.
        norm_eps: Added to the mean square of all norms.
        dropout: Share of each branch's output that is zeroed in training.
        drop_path: Share of items for which a branch of the last layer is skipped in training; grows linearly from 0.
    """

    pattern: str = "MMMMAMMM"
    hidden_dim: int
    expand: int = 2
    mamba_head_dim: int = 64
    mamba_groups: int = 1
    mamba_form: Form = "mamba2"
    mamba_bias: bool = False
    state_dim: int = 128
    s6_state_dim: int = 16
    dt_rank: int = 0
    s6_norms: bool = False
    conv_kernel: int = 4
    conv_bias: bool = True
    dt_limit: tuple[float, float] | None = None
    num_heads: int = 8
    num_kv_heads: int = 0
    window: int | tuple[int, ...] = 0
    attention_bias: bool = False
    proj_bias: bool = True
    rope_fraction: float = 0.0
    rope_theta: float = 10000.0
    rope_interleaved: bool = False
    norm_eps: float = 1e-5

    family: ClassVar[str] = "hybrid"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pattern or set(self.pattern) - {"M", "S", "A"}:
            raise ConfigError(
                f"HybridConfig: pattern must be letters M, S and A, as in 'MMMMAMMM', got {self.pattern!r}."
            )
        if "S" in self.layout:
            if not self.causal:
                raise ConfigError(
                    f"HybridConfig: S in pattern ({self.pattern!r}) is causal only; use M with causal=False."
                )
            if self.dt_rank < 0 or self.s6_state_dim < 1:
                raise ConfigError(
                    f"HybridConfig: dt_rank must be at least 0 and s6_state_dim at least 1, got {self.dt_rank} and "
                    f"{self.s6_state_dim}."
                )
        if self.mamba_form not in FORMS:
            raise ConfigError(f"HybridConfig: mamba_form must be one of {', '.join(FORMS)}, got {self.mamba_form!r}.")
        if self.mamba_form == "mohawk" and self.dt_limit is not None:
            raise ConfigError(
                "HybridConfig: dt_limit has no meaning with mamba_form 'mohawk', which has no step sizes."
            )
        if "M" in self.layout and (self.expand * self.dim) % (self.mamba_head_dim * self.mamba_groups):
            raise ConfigError(
                f"HybridConfig: expand * dim ({self.expand * self.dim}) must be a multiple of mamba_head_dim * "
                f"mamba_groups ({self.mamba_head_dim * self.mamba_groups})."
            )
        if "A" in self.layout:
            if self.dim % self.num_heads:
                raise ConfigError(f"HybridConfig: dim ({self.dim}) must be a multiple of num_heads ({self.num_heads}).")
            if self.num_kv_heads and self.num_heads % self.num_kv_heads:
                raise ConfigError(
                    f"HybridConfig: num_heads ({self.num_heads}) must be a multiple of num_kv_heads "
                    f"({self.num_kv_heads})."
                )
            if self.rope_width % 2:
                raise ConfigError(
                    f"HybridConfig: rope_fraction ({self.rope_fraction}) of the head width "
                    f"({self.dim // self.num_heads}) must be an even number of channels, got {self.rope_width}."
                )

    @property
    def layout(self) -> str:
        """The pattern, repeated to ``depth`` letters."""
        return (self.pattern * self.depth)[: self.depth]

    @property
    def rope_width(self) -> int:
        """Channels of an attention head that are rotated."""
        return round(self.rope_fraction * (self.dim // self.num_heads))

    def build(self) -> Hybrid:
        """Make the backbone with fresh weights."""
        return Hybrid(self)


class Hybrid(SequenceBackbone):
    """Pre-norm blocks of Mamba-2, Mamba-1 or attention, each followed by SwiGLU."""

    config: HybridConfig

    def __init__(self, config: HybridConfig) -> None:
        def norm() -> nn.Module:
            return RMSNorm(config.dim, config.norm_eps)

        windows, drop_paths = config.per_layer(config.window), config.drop_paths()
        blocks = [
            Block(
                _mixer(config, letter, windows[i] or None),
                SwiGLU(config.dim, config.hidden_dim) if config.hidden_dim else None,
                norm,
                config.dropout,
                drop_paths[i],
            )
            for i, letter in enumerate(config.layout)
        ]
        super().__init__(config, blocks, norm())
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draw fresh weights, as ``mamba_ssm`` does.

        | parameter | distribution |
        | --- | --- |
        | projections | uniform within 1/sqrt(inputs) |
        | last projection of each branch | the same, divided by sqrt(number of branches) |
        | biases of attention | 0 |
        | dt_bias, dt_proj, A_log, D | see ``Mamba2.reset_dynamics`` and ``Mamba1.reset_dynamics`` |
        | the two other forms of Mamba-2 | also ``Mamba2.reset_form`` |
        | norms | 1 |
        """
        branches = self.config.depth * (2 if self.config.hidden_dim else 1)
        for name, module in self.named_modules():
            last = name.rpartition(".")[2]
            if isinstance(module, nn.Linear) and last != "dt_proj":
                nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5))
                if last in ("out_proj", "down_proj", "proj"):
                    module.weight /= math.sqrt(branches)
                if last in ("qkv", "proj") and module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Mamba2):
                module.reset_form()


def _mixer(config: HybridConfig, letter: str, window: int | None) -> TokenMixer:
    if letter == "A":
        return _attention(config, window)
    return _mamba1(config) if letter == "S" else _mamba2(config)


def _mamba1(config: HybridConfig) -> TokenMixer:
    shape = Mamba1Shape(
        inner_dim=config.expand * config.dim,
        dt_rank=config.dt_rank or -(-config.dim // 16),
        state_dim=config.s6_state_dim,
        kernel=config.conv_kernel,
        conv_bias=config.conv_bias,
        norm_dt_bc=config.s6_norms,
        norm_eps=config.norm_eps,
    )
    return Mamba1(config.dim, shape)


def _mamba2(config: HybridConfig) -> TokenMixer:
    shape = Mamba2Shape(
        inner_dim=config.expand * config.dim,
        head_dim=config.mamba_head_dim,
        groups=config.mamba_groups,
        state_dim=config.state_dim,
        kernel=config.conv_kernel,
        conv_bias=config.conv_bias,
        dt_limit=config.dt_limit,
        norm_eps=config.norm_eps,
        form=config.mamba_form,
        bias=config.mamba_bias,
    )
    return Mamba2(config.dim, shape) if config.causal else BidirectionalMamba2(config.dim, shape)


def _attention(config: HybridConfig, window: int | None) -> TokenMixer:
    return Attention(
        config.dim,
        config.num_heads,
        config.num_kv_heads or config.num_heads,
        config.dim // config.num_heads,
        window=window,
        bias=config.attention_bias,
        out_bias=config.attention_bias and config.proj_bias,
        rope=Rope(config.rope_width, config.rope_theta, config.rope_interleaved) if config.rope_width else None,
    )


# ---------------------------------------------------------------- presets


@preset(params=8_616)
def hybrid_test() -> HybridConfig:
    """For tests: a few thousand parameters."""
    return HybridConfig(
        dim=16,
        depth=3,
        pattern="MAM",
        hidden_dim=24,
        mamba_head_dim=8,
        mamba_groups=2,
        state_dim=4,
        num_heads=2,
        num_kv_heads=1,
    )


@preset(params=23_372)
def hybrid_pico() -> HybridConfig:
    """For thousands of short sequences: seconds an epoch on two cores."""
    return HybridConfig(
        dim=32, depth=2, pattern="MA", hidden_dim=64, mamba_head_dim=16, state_dim=16, num_heads=2, num_kv_heads=1
    )


@preset(params=788_794)
def hybrid_nano() -> HybridConfig:
    """For a laptop: trains in minutes on two cores."""
    return HybridConfig(
        dim=96,
        depth=6,
        pattern="MMMMAM",
        hidden_dim=256,
        mamba_head_dim=32,
        state_dim=32,
        num_heads=4,
        num_kv_heads=2,
    )


@preset(params=299_082_976)
def hybrid_300m() -> HybridConfig:
    """HybriDNA-300M: attention at layers 4, 12, 20; inner sizes by parameter count (not published)."""
    return HybridConfig(dim=1024, depth=24, hidden_dim=2048, num_heads=16, num_kv_heads=8)


@preset(params=3_126_651_648)
def hybrid_3b() -> HybridConfig:
    """HybriDNA-3B: attention at layers 4, 12; inner sizes by parameter count (not published)."""
    return HybridConfig(dim=4096, depth=16, hidden_dim=8192, num_heads=32, num_kv_heads=8)


@preset(params=6_253_299_200)
def hybrid_7b() -> HybridConfig:
    """HybriDNA-7B: attention at layers 4, 12, 20, 28; inner sizes by parameter count (not published)."""
    return HybridConfig(dim=4096, depth=32, hidden_dim=8192, num_heads=32, num_kv_heads=8)
