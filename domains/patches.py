"""Patches of images as features, for every domain that sees."""

from __future__ import annotations

from torch import Tensor, nn

from vertebra.errors import ShapeError


class PatchEmbedding(nn.Module):
    """Patches of P x P pixels to vectors (https://arxiv.org/abs/2010.11929, equation 1).

    Args:
        channels: C.
        dim: D.
        patch_size: P.
    """

    def __init__(self, channels: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(channels, dim, patch_size, patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to (B, h, w, D)."""
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ShapeError(
                f"PatchEmbedding: height and width must be multiples of {self.patch_size}, got {tuple(images.shape)}."
            )
        return self.proj(images).movedim(1, -1)
