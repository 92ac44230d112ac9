"""Shape encoder: a point cloud with normals to latent tokens, in the form of Michelangelo.

Learned queries read the embedded points by cross-attention; self-attention layers follow
(https://arxiv.org/abs/2306.17115, section 3.1). The first token describes the shape as a whole, the others are its
latents. Queries can also be made of some of the points themselves (3DShape2VecSet, https://arxiv.org/abs/2301.11445,
section 4). Behind a bottleneck the latents are decoded by layers of their own, which MeshAnything V1 reads too.

Shapes: B batch, N points, L latents, D width, H heads, C bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.attention import Attention
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mlp import MLP
from vertebra.backbones.stack import Block
from vertebra.errors import ConfigError, LoadError, ShapeError

Queries = Literal["learned", "points"]

MLP_RATIO = 4
"""Inner width of the MLPs over the width."""
INIT_SCALE = 0.25
"""Standard deviation of fresh projections, times sqrt(D)."""


@dataclass(frozen=True, kw_only=True)
class ShapeEncoderConfig:
    """Structure of a shape encoder.

    Args:
        width: D.
        heads: Attention heads; the head width is width / heads.
        layers: Self-attention layers behind the cross-attention.
        latents: L; there is one token more, the first.
        frequencies: Coordinates enter with the sines and cosines of their products with 1, 2, 4, ..., so many each.
        queries: ``learned`` vectors, or the embeddings of L ``points`` that are spread over the shape.
        bottleneck: C, channels a latent is squeezed to before ``decode_latents``; 0 for no such part.
        decoder_layers: Self-attention layers behind the bottleneck.
        dropout: Share of each branch's output that is zeroed in training.
    """

    width: int = 768
    heads: int = 12
    layers: int = 8
    latents: int = 256
    frequencies: int = 8
    queries: Queries = "learned"
    bottleneck: int = 0
    decoder_layers: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        lowest = {"width": 1, "heads": 1, "layers": 0, "latents": 1, "frequencies": 0, "bottleneck": 0}
        for name, low in {**lowest, "decoder_layers": 0}.items():
            if getattr(self, name) < low:
                raise ConfigError(f"ShapeEncoderConfig: {name} must be at least {low}, got {getattr(self, name)}.")
        if self.width % self.heads:
            raise ConfigError(f"ShapeEncoderConfig: width ({self.width}) must be a multiple of heads ({self.heads}).")
        if self.queries not in ("learned", "points"):
            raise ConfigError(f"ShapeEncoderConfig: queries must be learned or points, got {self.queries!r}.")
        if self.decoder_layers and not self.bottleneck:
            raise ConfigError(
                f"ShapeEncoderConfig: decoder_layers={self.decoder_layers} stand behind a bottleneck; set bottleneck, "
                "or decoder_layers=0."
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"ShapeEncoderConfig: dropout must be in [0, 1), got {self.dropout}.")


MICHELANGELO = ShapeEncoderConfig(bottleneck=64, decoder_layers=16)
"""The ``shapevae-256`` that MeshAnything V1 and V2 read."""


# ---------------------------------------------------------------- encoder


class ShapeEncoder(nn.Module):
    """Points with normals to latent tokens.

    Args:
        config: Structure.
    """

    def __init__(self, config: ShapeEncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        own = 1 if config.queries == "points" else 1 + config.latents
        self.query = nn.Parameter(torch.empty(own, width))
        self.input_proj = nn.Linear(3 + 6 * config.frequencies + 3, width)
        self.cross = CrossBlock(width, config.heads, config.dropout)
        self.layers = nn.ModuleList(_block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width)
        if config.bottleneck:
            self.to_moments = nn.Linear(width, 2 * config.bottleneck)
            self.from_code = nn.Linear(config.bottleneck, width)
        self.decoder = nn.ModuleList(_block(config) for _ in range(config.decoder_layers))
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights.

        | parameter | distribution |
        | --- | --- |
        | queries | normal, std 0.02 |
        | weights of attention and MLPs | normal, std 0.25 / sqrt(D) |
        | their biases | 0 |
        | input projection, bottleneck | torch's default |
        | norms | 1 |
        """
        nn.init.normal_(self.query, std=0.02)
        for block in (self.cross, *self.layers, *self.decoder):
            for module in block.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=INIT_SCALE / math.sqrt(self.config.width))
                    if module.bias is not None:
                        nn.init.zeros_(module.bias)

    def forward(self, points: Tensor) -> Tensor:
        """Map points to tokens; their order does not matter.

        Args:
            points: Positions in [-1, 1] and unit normals, float (B, N, 6).

        Returns:
            (B, 1 + L, D): the token of the whole shape, then the latents.

        Raises:
            ShapeError: The shape is another, or there are fewer points than queries to be made of them.
        """
        if points.ndim != 3 or points.shape[-1] != 6 or not points.shape[1] or not points.is_floating_point():
            raise ShapeError(
                "ShapeEncoder: points must be float (B, N, 6), positions and normals of at least one point, "
                f"got {points.dtype} {tuple(points.shape)}."
            )
        position, normal = points.split(3, dim=-1)
        features = torch.cat([fourier_features(position, self.config.frequencies), normal], dim=-1)
        data = self.input_proj(features)  # (B, N, D)
        query = self.query[None]
        if self.config.queries == "points":
            chosen = spread_points(position, self.config.latents)[..., None]  # (B, L, 1)
            taken = data.gather(1, chosen.expand(-1, -1, data.shape[-1]))
            query = torch.cat([query.expand(data.shape[0], -1, -1), taken], dim=1)
        x = self.cross(query, data)  # (B, 1 + L, D)
        return self.norm(_run(self.layers, x))

    def moments(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map the tokens (B, 1 + L, D) of ``forward`` to mean and log-variance of the codes, each (B, L, C)."""
        if not self.config.bottleneck:
            raise ConfigError("ShapeEncoder: this encoder has no bottleneck; build it with bottleneck > 0.")
        wanted = (1 + self.config.latents, self.config.width)
        if tokens.ndim != 3 or tokens.shape[1:] != wanted:
            raise ShapeError(f"ShapeEncoder: tokens must be (B, {wanted[0]}, {wanted[1]}), got {tuple(tokens.shape)}.")
        mean, log_variance = self.to_moments(tokens[:, 1:]).chunk(2, dim=-1)
        return mean, log_variance

    def decode_latents(self, tokens: Tensor) -> Tensor:
        """Map the tokens (B, 1 + L, D) of ``forward`` to decoded latents (B, L, D), through the mean of the codes.

        Raises:
            ConfigError: The encoder has no bottleneck.
            ShapeError: The tokens have another shape.
        """
        mean, _ = self.moments(tokens)
        return _run(self.decoder, self.from_code(mean))

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that weight decay must leave alone."""
        return {"query"}


class CrossBlock(nn.Module):
    """Queries read data: x + attention(norm(x), norm(data)), then x + mlp(norm(x)).

    Args:
        width: D.
        heads: H.
        dropout: Share of each branch's output that is zeroed in training.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_data, self.norm = (nn.LayerNorm(width) for _ in range(3))
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.mlp = MLP(width, MLP_RATIO * width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, data: Tensor) -> Tensor:
        """Map queries x (B or 1, Q, D) and data (B, N, D) to (B, Q, D)."""
        q = self._split(self.q(self.norm_query(x))).expand(data.shape[0], -1, -1, -1)  # (B, H, Q, D/H)
        k, v = self.kv(self.norm_data(data)).chunk(2, dim=-1)
        y = F.scaled_dot_product_attention(q, self._split(k), self._split(v))
        x = x + self.dropout(self.proj(y.transpose(1, 2).flatten(2)))  # (B, Q, D)
        return x + self.dropout(self.mlp(self.norm(x)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)


def _block(config: ShapeEncoderConfig) -> Block:
    width = config.width
    attention = Attention(width, config.heads, config.heads, width // config.heads)
    attention.proj = nn.Linear(width, width)  # the one projection of these attentions with a bias
    return Block(attention, MLP(width, MLP_RATIO * width), lambda: nn.LayerNorm(width), config.dropout)


def _run(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    layout = Layout(batch=x.shape[0], length=x.shape[1], device=x.device)
    for block in blocks:
        x = block(x, layout)
    return x


# ---------------------------------------------------------------- points


def fourier_features(x: Tensor, frequencies: int) -> Tensor:
    """Return x (..., 3), then sin(2^i x), then cos(2^i x), each coordinate by coordinate: (..., 3 + 6 * frequencies).

    Args:
        x: Coordinates.
        frequencies: Number of i = 0, 1, ...
    """
    scales = 2.0 ** torch.arange(frequencies, dtype=x.dtype, device=x.device)
    angles = (x[..., None] * scales).flatten(-2)  # (..., 3 * frequencies)
    return torch.cat([x, angles.sin(), angles.cos()], dim=-1)


@torch.no_grad()
def spread_points(x: Tensor, count: int) -> Tensor:
    """Choose points that are spread evenly, each the farthest from those before it.

    This is farthest point sampling (Eldar et al. 1997), in time count * N. The first one is the farthest from the
    origin, so the choice does not depend on the order of the points, but for points that are equally far.

    Args:
        x: Positions (B, N, 3).
        count: Points wanted, L.

    Returns:
        Their indices, int64 (B, L), no two the same.

    Raises:
        ShapeError: There are fewer points.
    """
    if x.shape[1] < count:
        raise ShapeError(
            f"spread_points: {count} points cannot be chosen of {x.shape[1]}; give more points, or lower latents."
        )
    axes = x.float().movedim(-1, 0).contiguous()  # (3, B, N): a step reads each axis in one go
    nearest = torch.full(x.shape[:2], torch.inf, device=x.device)  # squared distance to the chosen ones
    last = axes.square().sum(0).argmax(1, keepdim=True)  # (B, 1)
    chosen = [last]
    for _ in range(count - 1):
        gap = (axes - axes.gather(2, last.expand(3, -1, -1))).square_().sum(0)
        nearest = torch.minimum(nearest, gap)
        nearest.scatter_(1, last, -1)  # for good, so that points in one place are not chosen twice over
        last = nearest.argmax(1, keepdim=True)
        chosen.append(last)
    return torch.cat(chosen, dim=1)


# ---------------------------------------------------------------- weights of Michelangelo

_LAYER = {
    "norm1": "ln_1",
    "mixer.qkv": "attn.c_qkv",
    "mixer.proj": "attn.c_proj",
    "norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_CROSS = {
    "norm_query": "ln_1",
    "norm_data": "ln_2",
    "q": "attn.c_q",
    "kv": "attn.c_kv",
    "proj": "attn.c_proj",
    "norm": "ln_3",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
"""Parts of the blocks by their names here and there."""


def michelangelo_names(config: ShapeEncoderConfig) -> dict[str, str]:
    """Return what each of our parameters is called in Michelangelo, relative to its ``shape_model``.

    Raises:
        ConfigError: Michelangelo's queries are learned.
    """
    if config.queries != "learned":
        raise ConfigError(f"michelangelo_names: Michelangelo has queries='learned', got {config.queries!r}.")
    parts = {"input_proj": "encoder.input_proj", "norm": "encoder.ln_post"}
    parts |= {f"cross.{ours}": f"encoder.cross_attn.{theirs}" for ours, theirs in _CROSS.items()}
    stacks = (("layers", "encoder.self_attn", config.layers), ("decoder", "transformer", config.decoder_layers))
    for ours, theirs, count in stacks:
        for i in range(count):
            parts |= {f"{ours}.{i}.{part}": f"{theirs}.resblocks.{i}.{name}" for part, name in _LAYER.items()}
    if config.bottleneck:
        parts |= {"to_moments": "pre_kl", "from_code": "post_kl"}
    found = {"query": "encoder.query"}
    for ours, theirs in parts.items():
        found[f"{ours}.weight"] = f"{theirs}.weight"
        if not ours.endswith((".qkv", ".q", ".kv")):
            found[f"{ours}.bias"] = f"{theirs}.bias"
    return found


def michelangelo_weights(
    config: ShapeEncoderConfig, tensors: Mapping[str, Tensor], prefix: str = ""
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of Michelangelo by our names.

    Michelangelo keeps queries, keys and values together head by head; here each kind stands together.

    Args:
        config: Structure.
        tensors: Checkpoint; other models' tensors may be among them.
        prefix: Of its names, ``model.shape_model.`` as published.

    Raises:
        LoadError: A tensor is missing, or the checkpoint has layers that the config does not have.
    """
    names = michelangelo_names(config)
    if missing := sorted({prefix + name for name in names.values()} - tensors.keys()):
        raise LoadError(
            f"michelangelo_weights: the checkpoint lacks {missing[0]!r}, {len(missing)} tensors in all; is the prefix "
            f"{prefix!r} right?"
        )
    used = {prefix + name for name in names.values()}
    own = [prefix + part for part in ("encoder.", *(("transformer.",) if config.bottleneck else ()))]
    if extra := sorted(name for name in tensors if name.startswith(tuple(own)) and name not in used):
        raise LoadError(
            f"michelangelo_weights: the config has no place for {extra[0]!r}, {len(extra)} tensors in all; change it "
            "to the checkpoint's."
        )
    found = {}
    for ours, theirs in names.items():
        tensor, kinds = tensors[prefix + theirs], 3 if ".qkv." in ours else 2 if ".kv." in ours else 0
        if kinds:
            tensor = tensor.unflatten(0, (config.heads, kinds, -1)).transpose(0, 1).flatten(0, 2)
        found[ours] = tensor
    return found
