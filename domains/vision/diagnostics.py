"""What image classifiers compute inside: the rank of their attention maps.

Shapes: B images, C channels, H x W pixels, M maps (B, or B times the groups of a backbone that cuts its input), T
positions, N heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vertebra.backbones.layers.attention import Attention
from vertebra.backbones.layers.masks import Layout
from vertebra.domains.vision.model import ImageClassifier
from vertebra.errors import ConfigError

MAPS = 4
"""Images whose maps are in memory at once."""


class AttentionRank(NamedTuple):
    """Rank of one head.

    Args:
        layer: Name of the attention layer in the backbone.
        head: Number of the head, from 0.
        rank: Mean over the images.
        size: Positions T, the largest rank that the map could have.
    """

    layer: str
    head: int
    rank: float
    size: int


def attention_layers(model: ImageClassifier) -> dict[str, Attention]:
    """Return the softmax attention layers of the backbone by name; those of timm's models are not among them."""
    return {name: module for name, module in model.backbone.named_modules() if isinstance(module, Attention)}


@torch.no_grad()
def attention_ranks(model: ImageClassifier, images: Tensor, threshold: float = 0.8) -> list[AttentionRank]:
    """Measure how many directions the attention map of every head has (iLLaMA, section 3.7).

    The rank of a map is the least number of its singular values, largest first, whose sum is ``threshold`` of the sum
    of all.

    Args:
        model: A classifier.
        images: What it reads, float (B, C, H, W).
        threshold: Share of the sum of the singular values, above 0, at most 1.

    Returns:
        One for each head of each layer, in the order of the layers.

    Raises:
        ConfigError: The model has no attention layers, or the threshold is impossible.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"attention_ranks: threshold must be above 0 and at most 1, got {threshold}.")
    layers = attention_layers(model)
    if not layers:
        raise ConfigError(
            "attention_ranks: needs a model with softmax attention layers, got one whose "
            f"{model.backbone.config.family} backbone has none; use another model."
        )
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def add(name: str, attention: Attention, x: Tensor, layout: Layout) -> None:
        maps = attention_map(attention, x, layout)
        ranks = effective_rank(maps, threshold).double()  # (M, N)
        sums[name] = sums.get(name, 0) + ranks.sum(0)
        counts[name] = counts.get(name, 0) + len(ranks)
        sizes[name] = max(sizes.get(name, 0), maps.shape[-1])

    training = model.training
    model.eval()
    try:
        with _watching(layers, add):
            for part in images.split(MAPS):
                # Not embed_images: the last layer would compute its last position alone.
                model.backbone(model.embed_patches(part))
    finally:
        model.train(training)
    return [
        AttentionRank(name, head, rank, sizes[name])
        for name in layers
        for head, rank in enumerate((sums[name] / counts[name]).tolist())
    ]


def attention_map(attention: Attention, x: Tensor, layout: Layout) -> Tensor:
    """Return the weights (M, N, T, T) that an attention layer gives to positions (columns) for each position (rows).

    Args:
        attention: The layer.
        x: Its input, (M, T, D).
        layout: What the positions are to each other.
    """
    q, k, _ = attention._project(x, torch.arange(x.shape[1], device=x.device))
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = (q * q.shape[-1] ** -0.5 @ k.mT).float()
    if (mask := layout.dense(attention.window)) is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1)
    if attention.soft_mask:
        ones = torch.ones_like(weights[0, 0])
        weights = weights * (ones.tril() + attention.soft_mask_rate * ones.triu(1))
    return weights


def effective_rank(matrices: Tensor, threshold: float = 0.8) -> Tensor:
    """Return the least number of singular values whose sum is ``threshold`` of all: (..., T, T) to (...)."""
    values = torch.linalg.svdvals(matrices.double()).cumsum(-1)
    shares = values / values[..., -1:].clamp(min=torch.finfo(values.dtype).tiny)
    return (shares < threshold - 1e-12).sum(-1) + 1


@contextmanager
def _watching(layers: dict[str, Attention], add: Any) -> Iterator[None]:
    """Call ``add(name, layer, x, layout)`` for every call of a layer."""

    def hook(name: str) -> Any:
        def look(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = given[0] if given else named["x"]
            add(name, module, x, given[1] if len(given) > 1 else named["layout"])

        return look

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


__all__ = ["AttentionRank", "attention_layers", "attention_map", "attention_ranks", "effective_rank"]
