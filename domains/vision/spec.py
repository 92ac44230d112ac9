"""Facts about images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError

Kind = Literal["classification", "generation"]
Crop = Literal["centre", "squash"]


@dataclass(frozen=True, kw_only=True)
class VisionSpec(DataSpec):
    """Facts about images.

    Args:
        task: What is done with them.
        channels: 1 (grey) or 3 (RGB).
        height: Height of the model's input, in pixels.
        width: Width of the model's input, in pixels.
        classes: Class names in the order of the logits; of a generator, the classes it can be asked for.
        mean: Mean of each channel, for values in [0, 1]; a classifier reads (x - mean) / std. Generators read bytes.
        std: Standard deviation of each channel.
        crop: How an image becomes height x width: ``centre`` resizes the shorter side to 1/``crop_fraction`` of the
            input and cuts out the centre, ``squash`` resizes both sides.
        crop_fraction: Share of the resized side that the crop keeps.
        interpolation: ``bilinear`` or ``bicubic``.
    """

    task: Kind
    channels: int
    height: int
    width: int
    classes: tuple[str, ...] = ()
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    crop: Crop = "centre"
    crop_fraction: float = 1.0
    interpolation: str = "bicubic"

    domain: ClassVar[str] = "vision"

    def __post_init__(self) -> None:
        if self.channels not in (1, 3) or min(self.height, self.width) < 1:
            raise ConfigError(
                f"VisionSpec: channels must be 1 or 3 and height and width at least 1, got {self.channels} channels "
                f"of {self.height} x {self.width}."
            )
