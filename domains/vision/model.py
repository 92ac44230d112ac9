"""Image classifiers: patch embedding, backbone, head; plain torch.

With a causal backbone, or iLLaMA's soft mask, this is iLLaMA (https://arxiv.org/abs/2404.06773): learned positions
beside the rotary ones, and [cls] behind the patches, where it sees all of them. Other backbones read the patches as a
grid, and their features are averaged.

Shapes: B images, C channels, H x W pixels, P patch size, h x w patches, D width, K classes.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.backbones.illama import ILLaMA
from vertebra.backbones.timm import TimmBackbone
from vertebra.domains.adapting import Adapter, by_name
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.patches import PatchEmbedding
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, ShapeError

Pooling = Literal["cls", "mean"]
Positions = Literal["learned", "none"]


class ImageClassifier(DomainModel):
    """Classes of images.

    Args:
        backbone: The shared part; a model of timm is used whole, with its own patches and pooling.
        spec: Facts about the data; an empty ``classes`` makes a model without head, whose output is the features.
        patch_size: P.
        pooling: ``cls``: a learned token behind the patches is read, which a causal backbone needs; ``mean``: the mean
            of all patches; ``auto``: ``cls`` where later patches are hidden, otherwise ``mean``.
        positions: ``learned``: a vector for every patch is added, interpolated for images of another size.
        with_cls: Whether the token stands behind the patches although their mean is read, as in vision transformers
            that average; ``pooling="cls"`` has it anyway.
        pooled_norm: Added to the variance of a LayerNorm of the pooled features; 0 for no such norm.
        dropout: Share of the pooled features that is zeroed in training.
        soft_mask_rate: Weight of later patches in a backbone with ``soft_mask``, 1 to 0; see ``set_soft_mask``.
    """

    task: ClassVar[str] = "vision/classification"
    input_parts: ClassVar[tuple[str, ...]] = ("patch_embed", "cls_token", "pos_embed")
    output_parts: ClassVar[tuple[str, ...]] = ("pooled_norm",)
    spec: VisionSpec

    def __init__(
        self,
        backbone: Backbone,
        spec: VisionSpec,
        *,
        patch_size: int = 16,
        pooling: Pooling | Literal["auto"] = "auto",
        positions: Positions = "learned",
        with_cls: bool = False,
        pooled_norm: float = 0.0,
        dropout: float = 0.0,
        soft_mask_rate: float = 0.0,
    ) -> None:
        config = backbone.config
        if pooling == "auto":
            pooling = "cls" if config.causal or getattr(config, "soft_mask", False) else "mean"
        super().__init__(
            backbone,
            spec,
            patch_size=patch_size,
            pooling=pooling,
            positions=positions,
            with_cls=with_cls,
            pooled_norm=pooled_norm,
            dropout=dropout,
            soft_mask_rate=soft_mask_rate,
        )
        if pooling not in ("cls", "mean") or positions not in ("learned", "none"):
            raise ConfigError(
                f"ImageClassifier: pooling must be cls, mean or auto and positions learned or none, got {pooling!r} "
                f"and {positions!r}."
            )
        self.patch_size, self.pooling = patch_size, pooling
        self.whole = isinstance(backbone, TimmBackbone)
        self.pooled_norm = nn.LayerNorm(config.dim, pooled_norm) if pooled_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(config.dim, len(spec.classes)) if spec.classes else nn.Identity()
        if not self.whole:
            self.grid = self._grid(spec.height, spec.width)
            with_cls = with_cls or pooling == "cls"
            count = self.grid[0] * self.grid[1] + with_cls
            self.patch_embed = PatchEmbedding(spec.channels, config.dim, patch_size)
            self.cls_token = nn.Parameter(torch.zeros(1, 1, config.dim)) if with_cls else None
            self.pos_embed = nn.Parameter(torch.zeros(1, count, config.dim)) if positions == "learned" else None
        self.init_weights()
        if soft_mask_rate:
            self.set_soft_mask(soft_mask_rate)

    def init_weights(self) -> None:
        """Draw fresh weights of everything but the backbone.

        | parameter | distribution |
        | --- | --- |
        | cls_token, pos_embed, head | normal, std 0.02, cut at 2 std |
        | patch_embed | torch's default, as in the paper's code |
        | biases | 0 |
        """
        drawn = [self.head.weight] if isinstance(self.head, nn.Linear) else []
        drawn += [p for n in ("cls_token", "pos_embed") if (p := getattr(self, n, None)) is not None]
        for parameter in drawn:
            nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
        if isinstance(self.head, nn.Linear):
            nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to logits (B, K)."""
        return self.head(self.dropout(self.embed_images(images)))

    def embed_images(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to one vector an image (B, D)."""
        if isinstance(self.backbone, TimmBackbone):
            return self.pooled_norm(self.backbone.pooled(images))
        x = self.embed_patches(images)
        if self.pooling == "cls":
            return self.pooled_norm(self.backbone.read_last(x))
        y = self.backbone(x).flatten(1, -2)  # (B, N, D)
        return self.pooled_norm((y if self.cls_token is None else y[:, :-1]).mean(1))

    def embed_patches(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to what the backbone reads: (B, h, w, D), or (B, h * w + 1, D) with [cls] last."""
        if images.ndim != 4 or images.shape[1] != self.spec.channels:
            raise ShapeError(
                f"ImageClassifier: images must be (B, {self.spec.channels}, H, W), got {tuple(images.shape)}."
            )
        x = self.patch_embed(images)  # (B, h, w, D)
        grid = (x.shape[1], x.shape[2])
        positions: Tensor | None = self.pos_embed
        if positions is not None and grid != self.grid:
            positions = resize_positions(positions, self.grid, grid)
        if self.cls_token is None:
            return x if positions is None else x + positions.unflatten(1, grid)
        x = torch.cat([x.flatten(1, 2), self.cls_token.expand(x.shape[0], -1, -1)], dim=1)  # (B, h * w + 1, D)
        return x if positions is None else x + positions

    def set_soft_mask(self, rate: float) -> None:
        """Set the weight of later patches: 1 as in a vision transformer, 0 causal; the schedule calls it every step."""
        if not isinstance(self.backbone, ILLaMA):
            raise ConfigError(
                f"soft_mask_rate={rate} needs an iLLaMA backbone, got {self.backbone.config.family}; use "
                "illama_tiny,causal=false,soft_mask=true, or leave it out."
            )
        self.backbone.set_soft_mask(rate)
        self.arguments["soft_mask_rate"] = rate

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        return {"cls_token", "pos_embed"}

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: another image size, another number of channels, other classes.

        Learned positions are interpolated, as the paper does for 384 pixels; the patch embedding of RGB is summed for
        grey images, and that of grey images shared out over R, G and B, so that a grey picture gives the same features.
        """
        if self.whole:
            return self._head_adapters(origin)
        grid = None
        patch_size = origin.arguments.get("patch_size")
        if isinstance(origin.spec, VisionSpec) and patch_size:
            grid = (origin.spec.height // patch_size, origin.spec.width // patch_size)

        def positions(key: str, old: Tensor, new: Tensor) -> tuple[Tensor, str] | Tensor | None:
            count = old.shape[1] - (self.cls_token is not None)
            side = round(count**0.5)
            given = (side, side) if grid is None else grid
            if given == self.grid and old.shape == new.shape:
                return old
            if given[0] * given[1] != count or old.shape[-1] != new.shape[-1]:
                return None
            said = f"interpolated from {given[0]} x {given[1]} patches to {self.grid[0]} x {self.grid[1]}"
            return resize_positions(old, given, self.grid), said

        def channels(key: str, old: Tensor, new: Tensor) -> tuple[Tensor, str] | Tensor | None:
            if old.shape == new.shape:
                return old
            if old.shape[0] != new.shape[0] or old.shape[2:] != new.shape[2:]:
                return None
            grey, count = old.sum(1, keepdim=True), new.shape[1]
            said = f"the sum of {old.shape[1]} channels" + ("" if count == 1 else f", shared out over {count}")
            return grey.expand(-1, count, -1, -1) / count, said

        return {"pos_embed": positions, "patch_embed.proj.weight": channels, **self._head_adapters(origin)}

    def _head_adapters(self, origin: Origin) -> dict[str, Adapter]:
        if not isinstance(origin.spec, VisionSpec):
            return {}
        rows = by_name(origin.spec.classes, self.spec.classes, "classes")
        return {"head.weight": rows, "head.bias": rows}

    def _grid(self, height: int, width: int) -> tuple[int, int]:
        if self.patch_size < 1 or height % self.patch_size or width % self.patch_size:
            fitting = [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0]
            raise ConfigError(
                f"patch_size={self.patch_size} must divide the image size {height} x {width}; choose "
                f"{' or '.join(map(str, fitting[:4])) or 1}, or another data.size."
            )
        return height // self.patch_size, width // self.patch_size


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Interpolate learned positions for another grid of patches (bicubic, not antialiased, as iLLaMA's code does).

    Args:
        positions: (1, N, D), of a grid in raster order; a further row, which belongs to [cls], is kept.
        old: Rows and columns of that grid.
        new: Rows and columns that are wanted.
    """
    count = old[0] * old[1]
    grid = positions[:, :count].unflatten(1, old).movedim(-1, 1)  # (1, D, h, w)
    grid = F.interpolate(grid.float(), size=new, mode="bicubic", align_corners=False).to(positions.dtype)
    return torch.cat([grid.flatten(2).mT, positions[:, count:]], dim=1)
