"""Images to tensors: what is done to every image, and what training adds at random.

A transform has two steps. ``prepare`` depends on the image alone, so its bytes can be kept; ``batch`` draws what is
random, from (seed, epoch, item) only: the same batch comes out whatever the workers, the ranks or a resume.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from timm.data.random_erasing import RandomErasing
from timm.data.transforms_factory import create_transform
from torch import Tensor
from torch.nn import functional as F

from vertebra.backbones.random import item_uniform
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError

Pixels = NDArray[np.uint8]
Ints = NDArray[np.int64]

_FLIP, _ANGLE, _RIGHT, _DOWN, _SIZE, _SHEAR, _LIBRARY = range(101, 108)  # salts of the draws
_LONGEST = 32  # longest side in shortest ones; a thinner image would grow beyond memory when its short side is resized


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training does to images at random.

    Args:
        policy: ``none``; ``light``, a small affine map, for digits and small images; ``imagenet``, a random resized
            crop, RandAugment or colour jitter, for classifiers of photographs.
        hflip: Probability of a horizontal flip; None for 0.5 with ``imagenet`` and 0 otherwise.
        erasing: Probability that a rectangle is replaced by noise, for classifiers; None for 0.25 with ``imagenet``
            and 0 otherwise.
        randaugment: RandAugment of ``imagenet`` in timm's words; empty for none.
        colour_jitter: Range of brightness, contrast and saturation with ``imagenet``; as in timm, only where
            ``randaugment`` is empty.
        degrees: Largest rotation either way, with ``light``.
        translate: Largest shift either way, as a share of width and height, with ``light``.
        scale: Smallest and largest: magnification with ``light`` (None for 0.9 to 1.1), share of the area that is cut
            out with ``imagenet`` (None for 0.08 to 1).
        shear: Largest horizontal shear either way, in degrees, with ``light``.
    """

    policy: Literal["none", "light", "imagenet"] = "none"
    hflip: float | None = None
    erasing: float | None = None
    randaugment: str = "rand-m9-mstd0.5-inc1"
    colour_jitter: float = 0.4
    degrees: float = 10.0
    translate: float = 0.1
    scale: tuple[float, float] | None = None
    shear: float = 5.0

    def __post_init__(self) -> None:
        if self.policy not in ("none", "light", "imagenet"):
            raise ConfigError(f"augment: policy must be none, light or imagenet, got {self.policy!r}.")
        for name in ("hflip", "erasing", "translate"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"augment: {name} must be from 0 to 1, got {value}.")
        for name, limit in (("degrees", 180), ("shear", 80)):
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"augment: {name} must be from 0 to {limit}, got {getattr(self, name)}.")
        if self.scale is not None:
            object.__setattr__(self, "scale", tuple(self.scale))  # a list, from JSON
            if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
                raise ConfigError(f"augment: scale must be two numbers above 0, the smaller first, got {self.scale}.")
        if self.colour_jitter < 0:
            raise ConfigError(f"augment: colour_jitter must be at least 0, got {self.colour_jitter}.")

    @property
    def flip_probability(self) -> float:
        """Probability of a horizontal flip."""
        return (0.5 if self.policy == "imagenet" else 0.0) if self.hflip is None else self.hflip

    @property
    def erase_probability(self) -> float:
        """Probability of a rectangle of noise."""
        return (0.25 if self.policy == "imagenet" else 0.0) if self.erasing is None else self.erasing


class Transform(Protocol):
    """Images to tensors."""

    def prepare(self, image: Image.Image) -> Pixels:
        """Do what depends on the image alone; ``image`` has the mode of the spec's channels."""
        ...

    def batch(self, prepared: Sequence[Pixels], seed: int, epoch: int, items: Ints) -> Tensor:
        """Make (B, C, H, W): normalised float32 for a classifier, uint8 for a generator."""
        ...


class PlainTransform:
    """Resize and crop; then, in training, flip and a small affine map.

    Args:
        spec: What the model reads.
        augment: What is random; None for nothing.
    """

    def __init__(self, spec: VisionSpec, augment: Augment | None = None) -> None:
        self.spec = spec
        self.augment = augment or Augment(policy="none")
        self.resize = create_transform(
            (spec.channels, spec.height, spec.width),
            crop_mode="squash" if spec.crop == "squash" else "center",
            crop_pct=1.0 if spec.crop == "squash" else spec.crop_fraction,
            interpolation=spec.interpolation,
            normalize=False,
        )
        self.erase = _eraser(spec, self.augment)

    def prepare(self, image: Image.Image) -> Pixels:
        """Resize and crop to uint8 (C, H, W); an image of the model's size is taken as it is."""
        spec = self.spec
        if image.size != (spec.width, spec.height):
            if spec.crop == "centre":
                image = _shorten(image)
            pixels: Pixels = self.resize(image).numpy()
            return pixels
        values = np.asarray(image)
        return values[None] if values.ndim == 2 else np.ascontiguousarray(values.transpose(2, 0, 1))

    def batch(self, prepared: Sequence[Pixels], seed: int, epoch: int, items: Ints) -> Tensor:
        """Flip, map and normalise: float32 or uint8 (B, C, H, W)."""
        images = torch.from_numpy(np.stack(prepared))
        if self.augment.flip_probability:
            flip = torch.from_numpy(item_uniform(seed, epoch, items, _FLIP) < self.augment.flip_probability)
            images[flip] = images[flip].flip(-1)
        if self.augment.policy == "light":
            images = affine(images.float(), *draw_affine(self.augment, seed, epoch, items))
        if self.spec.task == "generation":
            return images if images.dtype == torch.uint8 else images.round_().clamp_(0, 255).to(torch.uint8)
        images = normalise(images, self.spec)
        if self.erase is not None:
            with item_generators(seed, epoch) as start:
                for i, item in enumerate(items.tolist()):
                    start(item)
                    images[i] = self.erase(images[i])
        return images

    def __call__(self, image: Image.Image) -> Tensor:
        """Make one image ready for the model, (C, H, W), with nothing random."""
        pixels = torch.from_numpy(self.prepare(image).copy())
        return pixels if self.spec.task == "generation" else normalise(pixels[None], self.spec)[0]


class ImageNetTransform:
    """timm's training transform: random resized crop, flip, RandAugment or colour jitter, erasing.

    Args:
        spec: What the classifier reads.
        augment: Its settings.
    """

    def __init__(self, spec: VisionSpec, augment: Augment) -> None:
        if spec.task != "classification":
            raise ConfigError("augment: policy imagenet is for classifiers; a generator takes none or light.")
        self.spec = spec
        try:
            self.transform = create_transform(
                (spec.channels, spec.height, spec.width),
                is_training=True,
                scale=augment.scale or (0.08, 1.0),
                hflip=augment.flip_probability,
                color_jitter=augment.colour_jitter,
                auto_augment=augment.randaugment or None,
                interpolation=spec.interpolation,
                mean=spec.mean,
                std=spec.std,
                re_prob=augment.erase_probability,
                re_mode="pixel",
            )
        except (AssertionError, ValueError, KeyError) as e:
            raise ConfigError(f"augment: timm does not know randaugment {augment.randaugment!r} ({e}).") from None
        for step in self.transform.transforms:
            for op in getattr(step, "ops", ()):
                if op.name.startswith("Posterize"):
                    op.level_fn = partial(_some_bits, op.level_fn)

    def prepare(self, image: Image.Image) -> Pixels:
        """Take the image as it is, uint8 (H, W) or (H, W, 3)."""
        return np.asarray(image)

    def batch(self, prepared: Sequence[Pixels], seed: int, epoch: int, items: Ints) -> Tensor:
        """Transform each: float32 (B, C, H, W)."""
        with item_generators(seed, epoch) as start:
            images = []
            for pixels, item in zip(prepared, items.tolist(), strict=True):
                start(item)
                images.append(self.transform(Image.fromarray(pixels)))
        return torch.stack(images)


def eval_transform(spec: VisionSpec) -> PlainTransform:
    """Transform without anything random; call it with a PIL image of the spec's channels for one (C, H, W)."""
    return PlainTransform(spec)


def train_transform(spec: VisionSpec, augment: Augment | None = None) -> Transform:
    """Transform for training.

    Raises:
        ConfigError: The policy is not for generators, or timm does not know its RandAugment.
    """
    if augment is not None and augment.policy == "imagenet":
        return ImageNetTransform(spec, augment)
    return PlainTransform(spec, augment)


def normalise(images: Tensor, spec: VisionSpec) -> Tensor:
    """(x / 255 - mean) / std as float32, for uint8 or float (B, C, H, W) from 0 to 255."""
    mean, std = (torch.tensor(v, dtype=torch.float32).view(-1, 1, 1) for v in (spec.mean, spec.std))
    return (
        images.float().sub_(mean * 255).div_(std * 255)
        if images.dtype == torch.uint8
        else ((images - mean * 255) / (std * 255))
    )


# ---------------------------------------------------------------- the affine map


def draw_affine(augment: Augment, seed: int, epoch: int, items: Ints) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the small affine map of every item.

    Returns:
        ``angle`` (B,) and ``shear`` (B,) in degrees, ``shift`` (B, 2) as shares of width and height, ``scale`` (B,).
    """

    def uniform(salt: int, low: float, high: float) -> Tensor:
        return torch.from_numpy(low + (high - low) * item_uniform(seed, epoch, items, salt)).float()

    def either(salt: int, most: float) -> Tensor:
        return uniform(salt, -most, most)

    shift = torch.stack([either(_RIGHT, augment.translate), either(_DOWN, augment.translate)], 1)
    scale = uniform(_SIZE, *(augment.scale or (0.9, 1.1)))
    return either(_ANGLE, augment.degrees), either(_SHEAR, augment.shear), shift, scale


def affine(images: Tensor, angle: Tensor, shear: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Turn, shear, magnify and shift every image about its centre, bilinear, over the mean of its own border.

    What ``torchvision.transforms.v2.functional.affine`` does to one image, for a batch with a map each.

    Args:
        images: float (B, C, H, W).
        angle: Clockwise turn in degrees, (B,).
        shear: Horizontal shear in degrees, (B,).
        shift: Shift as shares of width and height, (B, 2).
        scale: Magnification, (B,).
    """
    height, width = images.shape[-2:]
    turn, lean = torch.deg2rad(angle), torch.tan(torch.deg2rad(shear))
    cos, sin = torch.cos(turn), torch.sin(turn)
    # the forward map is scale * [[cos, -cos lean - sin], [sin, -sin lean + cos]]; sampling needs its inverse
    inverse = torch.stack([cos - sin * lean, cos * lean + sin, -sin, cos], 1).view(-1, 2, 2) / scale.view(-1, 1, 1)
    sides = torch.tensor([width / 2, height / 2])
    inverse = inverse * sides / sides[:, None]  # from pixels to the coordinates of grid_sample, -1 to 1
    offset = -(inverse @ (2 * shift)[..., None])
    grid = F.affine_grid(torch.cat([inverse, offset], 2), list(images.shape), align_corners=False)
    border = torch.cat([images[:, :, 0], images[:, :, -1], images[:, :, :, 0], images[:, :, :, -1]], 2)
    ground = border.mean(2)[:, :, None, None]
    return F.grid_sample(images - ground, grid, align_corners=False) + ground


# ---------------------------------------------------------------- randomness of the libraries


@contextmanager
def item_generators(seed: int, epoch: int) -> Iterator[Callable[[int], None]]:
    """Let timm and torchvision draw from (seed, epoch, item).

    Gives a function to call with every item's number before it is transformed. The global generators of ``random``,
    NumPy and torch (CPU), which those libraries use, are put back afterwards.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()

    def start(item: int) -> None:
        number = int(item_uniform(seed, epoch, item, _LIBRARY) * 2**32)
        random.seed(number)
        np.random.seed(number)
        torch.default_generator.manual_seed(number)  # torch.manual_seed would seed the GPU too

    try:
        yield start
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def _eraser(spec: VisionSpec, augment: Augment) -> Any:
    if spec.task == "generation" or not augment.erase_probability:
        return None
    make: Any = RandomErasing  # timm has no types for it
    return make(augment.erase_probability, mode="pixel", device="cpu")


def _some_bits(level_to_bits: Callable[[float, Any], tuple[int]], level: float, settings: Any) -> tuple[int]:
    """Keep at least one bit: timm asks Pillow for none at the highest level, and Pillow refuses."""
    return (max(1, level_to_bits(level, settings)[0]),)


def _shorten(image: Image.Image) -> Image.Image:
    """Cut the ends off an image that is very long and thin."""
    width, height = image.size
    most = _LONGEST * min(width, height)
    if max(width, height) <= most:
        return image
    left, top = max(0, width - most) // 2, max(0, height - most) // 2
    return image.crop((left, top, left + min(width, most), top + min(height, most)))
