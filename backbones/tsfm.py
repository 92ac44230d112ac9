"""TSFM: the transformers of the scaling laws for time series (https://arxiv.org/abs/2410.12360).

Pre-norm blocks as in Moirai (https://arxiv.org/abs/2402.02592): RMSNorm, attention with normed queries and keys and a
rotary embedding of half of each head, SwiGLU; no biases. The paper compares a bidirectional encoder with a causal
decoder of the same blocks, in eleven sizes, here without what embeds patches and what reads distributions.

The paper turns a patch by its index in its own series, this stack by its index in the row: attention sees the distance
of two patches alone, and a packed series stands in one piece.

Shapes: B batch, T positions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from vertebra.backbones.base import preset
from vertebra.backbones.layers.attention import Attention, Rope
from vertebra.backbones.layers.mlp import SwiGLU
from vertebra.backbones.layers.norm import RMSNorm
from vertebra.backbones.stack import Block, SequenceBackbone, StackConfig
from vertebra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TSFMConfig(StackConfig):
    """Structure of a TSFM stack.

    Args:
        num_heads: Heads; the head width is dim / num_heads, and its first half is rotated.
        hidden_dim: Inner width of SwiGLU; 0 for 8/3 of dim, rounded up to a multiple of 8.
        rope_theta: Base of the rotary wavelengths.
        norm_eps: Added to the mean square of all norms.
        causal: Whether an output depends on earlier positions only; the paper's encoders are not causal.
        dropout: Share of each branch's output that is zeroed in training.
        drop_path: Share of items for which a branch of the last layer is skipped in training; grows linearly from 0.
    """

    num_heads: int
    hidden_dim: int = 0
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    causal: bool = False

    family: ClassVar[str] = "tsfm"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_heads < 1 or self.dim % (4 * self.num_heads):
            raise ConfigError(
                f"TSFMConfig: dim ({self.dim}) must be a multiple of 4 * num_heads ({self.num_heads}), since rotary "
                "embedding turns pairs of channels in the first half of each head."
            )
        if self.hidden_dim < 0:
            raise ConfigError(f"TSFMConfig: hidden_dim must be 0 or positive, got {self.hidden_dim}.")

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads

    @property
    def swiglu_dim(self) -> int:
        """Inner width of SwiGLU."""
        return self.hidden_dim or (8 * self.dim // 3 + 7) // 8 * 8

    def build(self) -> TSFM:
        """Make the backbone with fresh weights."""
        return TSFM(self)


class TSFM(SequenceBackbone):
    """Pre-norm blocks of attention, with normed queries and keys and half-rotary heads, and SwiGLU."""

    config: TSFMConfig

    def __init__(self, config: TSFMConfig) -> None:
        def norm() -> nn.Module:
            return RMSNorm(config.dim, config.norm_eps)

        heads, width = config.num_heads, config.head_dim
        blocks = [
            Block(
                Attention(
                    config.dim,
                    heads,
                    heads,
                    width,
                    rope=Rope(width // 2, config.rope_theta, interleaved=True),
                    qk_norm=config.norm_eps,
                ),
                SwiGLU(config.dim, config.swiglu_dim),
                norm,
                config.dropout,
                drop_path,
            )
            for drop_path in config.drop_paths()
        ]
        super().__init__(config, blocks, norm())
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights; with one spread for widths from 8 to 1536 the small sizes would hardly start.

        | parameter | distribution |
        | --- | --- |
        | weights of projections | uniform, within 1 / sqrt(inputs) |
        | norms | 1 |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                bound = module.in_features**-0.5
                nn.init.uniform_(module.weight, -bound, bound)


# ---------------------------------------------------------------- presets


@preset(params=6_768)
def tsfm_test() -> TSFMConfig:
    """For tests: a few thousand parameters, two heads; causal as all test presets are."""
    return TSFMConfig(dim=16, depth=2, num_heads=2, causal=True)


@preset(params=872)
def tsfm_1k() -> TSFMConfig:
    """The paper's 1K."""
    return TSFMConfig(dim=8, depth=1, num_heads=1)


@preset(params=14_040)
def tsfm_10k() -> TSFMConfig:
    """The 10K that was trained: two layers; the paper's table counts 7,032, which is one layer."""
    return TSFMConfig(dim=24, depth=2, num_heads=1)


@preset(params=100_928)
def tsfm_100k() -> TSFMConfig:
    """The paper's 100K."""
    return TSFMConfig(dim=64, depth=2, num_heads=1)


@preset(params=302_656)
def tsfm_300k() -> TSFMConfig:
    """The paper's 300K."""
    return TSFMConfig(dim=64, depth=6, num_heads=1)


@preset(params=1_771_712)
def tsfm_1m() -> TSFMConfig:
    """The paper's 1M."""
    return TSFMConfig(dim=192, depth=4, num_heads=3)


@preset(params=4_747_264)
def tsfm_3m() -> TSFMConfig:
    """The paper's 3M."""
    return TSFMConfig(dim=256, depth=6, num_heads=4)


@preset(params=14_163_328)
def tsfm_10m() -> TSFMConfig:
    """The paper's 10M."""
    return TSFMConfig(dim=384, depth=8, num_heads=6)


@preset(params=37_812_224)
def tsfm_30m() -> TSFMConfig:
    """The paper's 30M."""
    return TSFMConfig(dim=512, depth=12, num_heads=8)


@preset(params=127_432_704)
def tsfm_100m() -> TSFMConfig:
    """The paper's 100M; its decoder is ``tsfm_100m,causal=true``."""
    return TSFMConfig(dim=768, depth=18, num_heads=12)


@preset(params=302_436_352)
def tsfm_300m() -> TSFMConfig:
    """The paper's 300M."""
    return TSFMConfig(dim=1024, depth=24, num_heads=16)


@preset(params=1_019_332_608)
def tsfm_1b() -> TSFMConfig:
    """The paper's 1B, encoder."""
    return TSFMConfig(dim=1536, depth=36, num_heads=24)


@preset(params=906_073_600)
def tsfm_1b_decoder() -> TSFMConfig:
    """The paper's 1B, decoder: four layers fewer than the encoder."""
    return TSFMConfig(dim=1536, depth=32, num_heads=24, causal=True)
