"""iLLaMA: the LLaMA block for any sequence (https://arxiv.org/abs/2404.06773).

The paper turns a vision transformer into LLaMA's decoder block: RMSNorm, SwiGLU, rotary embedding, causal
attention. Here is the block stack alone: patches, learned positions and [cls] belong to the vision domain. Beyond the
paper: grouped key-value heads, windows per layer, packed and padded batches, and decoding.

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
class ILLaMAConfig(StackConfig):
    """Structure of an iLLaMA stack.

    Args:
        num_heads: Query heads; the head width is dim / num_heads.
        num_kv_heads: Key-value heads, a divisor of num_heads; 0 for as many as query heads.
        hidden_dim: Inner width of SwiGLU; 0 for 8/3 of dim, rounded up to a multiple of 256 (of 16 below 256).
        window: Keys at this distance or more are not seen: one number for all layers, or a list that is repeated
            over the layers, with 0 for no window.
        soft_mask: The paper's mask after the softmax instead of an additive one. Needs causal=False: its softmax
            sees all positions.
        bias: Whether the attention projections have biases, as in the paper.
        proj_bias: Whether the projection behind the heads has one too where the others have; Qwen2's has none.
        rope_theta: Base of the rotary wavelengths.
        norm_eps: Added to the mean square of the norms.
        dropout: Share of each branch's output that is zeroed in training.
        drop_path: Share of items for which a branch of the last layer is skipped in training; grows linearly from 0.
    """

    num_heads: int
    num_kv_heads: int = 0
    hidden_dim: int = 0
    window: int | tuple[int, ...] = 0
    soft_mask: bool = False
    bias: bool = True
    proj_bias: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    family: ClassVar[str] = "illama"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise ConfigError(
                f"ILLaMAConfig: dim ({self.dim}) must be an even multiple of num_heads ({self.num_heads}), "
                "since rotary embedding turns pairs of channels."
            )
        if self.num_kv_heads and self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"ILLaMAConfig: num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads})."
            )
        if self.soft_mask and self.causal:
            raise ConfigError("ILLaMAConfig: soft_mask needs causal=False: its softmax sees later positions.")
        if self.soft_mask and any(self.windows()):
            raise ConfigError("ILLaMAConfig: soft_mask and window exclude each other; set one of them to its default.")

    @property
    def swiglu_dim(self) -> int:
        """Inner width of SwiGLU."""
        if self.hidden_dim:
            return self.hidden_dim
        multiple = 256 if self.dim >= 192 else 16
        return multiple * -(-(8 * self.dim // 3) // multiple)

    def windows(self) -> list[int]:
        """Window of every layer, 0 for none."""
        return self.per_layer(self.window)

    def build(self) -> ILLaMA:
        """Make the backbone with fresh weights."""
        return ILLaMA(self)


class ILLaMA(SequenceBackbone):
    """Pre-norm blocks of rotary attention and SwiGLU."""

    config: ILLaMAConfig

    def __init__(self, config: ILLaMAConfig) -> None:
        def norm() -> nn.Module:
            return RMSNorm(config.dim, config.norm_eps)

        head_dim = config.dim // config.num_heads
        blocks = [
            Block(
                Attention(
                    config.dim,
                    config.num_heads,
                    config.num_kv_heads or config.num_heads,
                    head_dim,
                    window=window or None,
                    bias=config.bias,
                    out_bias=config.bias and config.proj_bias,
                    rope=Rope(head_dim, config.rope_theta, interleaved=True),
                    soft_mask=config.soft_mask,
                ),
                SwiGLU(config.dim, config.swiglu_dim),
                norm,
                config.dropout,
                drop_path,
            )
            for window, drop_path in zip(config.windows(), config.drop_paths(), strict=True)
        ]
        super().__init__(config, blocks, norm())
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights.

        | parameter | distribution |
        | --- | --- |
        | weights of projections | normal, std 0.02, cut at 2 std |
        | biases | 0 |
        | norms | 1 |
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def set_soft_mask(self, rate: float) -> None:
        """Set the weight of later positions, 1 (bidirectional) to 0 (causal); the schedule calls it every step."""
        if not self.config.soft_mask:
            raise ConfigError("ILLaMA.set_soft_mask: this backbone was built with soft_mask=False.")
        for index in range(len(self.layers)):
            mixer = self._mixer(index)
            assert isinstance(mixer, Attention)
            mixer.soft_mask_rate = rate


# ---------------------------------------------------------------- presets


@preset(params=4_784)
def illama_test() -> ILLaMAConfig:
    """For tests: a few thousand parameters."""
    return ILLaMAConfig(dim=16, depth=2, num_heads=2, num_kv_heads=1, hidden_dim=32)


@preset(params=20_896)
def illama_pico() -> ILLaMAConfig:
    """For thousands of short sequences: seconds an epoch on two cores."""
    return ILLaMAConfig(dim=32, depth=2, num_heads=2, hidden_dim=64)


@preset(params=667_104)
def illama_nano() -> ILLaMAConfig:
    """For a laptop: trains in minutes on two cores."""
    return ILLaMAConfig(dim=96, depth=6, num_heads=4, hidden_dim=256)


@preset(params=5_322_432)
def illama_tiny() -> ILLaMAConfig:
    """The paper's T."""
    return ILLaMAConfig(dim=192, depth=12, num_heads=3)


@preset(params=21_261_696)
def illama_small() -> ILLaMAConfig:
    """The paper's S."""
    return ILLaMAConfig(dim=384, depth=12, num_heads=6)


@preset(params=84_990_720)
def illama_base() -> ILLaMAConfig:
    """The paper's B."""
    return ILLaMAConfig(dim=768, depth=12, num_heads=12)


@preset(params=308_429_824)
def illama_large() -> ILLaMAConfig:
    """The paper's L."""
    return ILLaMAConfig(dim=1024, depth=24, num_heads=16)
