"""Decode one image, whatever its mode, to grey or RGB bytes; say what is wrong with those that cannot be."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vertebra.errors import DataError

Channels = Literal[1, 3]

IMAGE_ENDINGS = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2", ".avif")
)
"""Endings, in lower case, of the files that are taken for images when a folder is read."""

_WHITE = (255, 255, 255, 255)


class ImageError(DataError):
    """An image that cannot be used.

    Args:
        file: Name of the file.
        rule: What is wrong.
        advice: What to do.
    """

    def __init__(self, file: str, rule: str, advice: str) -> None:
        super().__init__(f"{file}: {rule}; {advice}.")
        self.file, self.rule, self.advice = file, rule, advice

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.file, self.rule, self.advice)


def read_image(source: str | Path | bytes, channels: Channels, *, name: str | None = None) -> Image.Image:
    """Decode an image to mode ``L`` or ``RGB``.

    The first frame is taken, turned as its EXIF orientation says, and laid over white where it is transparent. 16 bits
    are scaled to 8 by ``round(x / 257)`` (colour of 16 bits a channel is cut to its high byte by Pillow); numbers from
    0 to 1 in floating point are scaled by 255.

    Args:
        source: File, or the bytes of one.
        channels: 1 for grey (ITU-R 601), 3 for RGB.
        name: What messages call the image; the path, or ``image`` for bytes.

    Returns:
        The decoded image, of its own size.

    Raises:
        ImageError: Nothing there, not an image, damaged, or too large.
    """
    label = name or ("image" if isinstance(source, bytes) else str(source))
    if isinstance(source, bytes):
        if not source:
            raise ImageError(label, "the file is empty", "copy it again")
        return _decode(BytesIO(source), channels, label)
    path = Path(source)
    try:
        with path.open("rb") as stream:
            if not stream.read(1):
                raise ImageError(label, "the file is empty", "copy it again")
            stream.seek(0)
            return _decode(stream, channels, label)
    except FileNotFoundError:
        raise ImageError(label, "there is no such file", "correct the path") from None
    except OSError as e:
        raise ImageError(
            label, f"the file cannot be opened ({e.strerror or e})", "check what it is and who may read it"
        ) from None


def to_channels(image: Image.Image, channels: Channels, name: str = "image") -> Image.Image:
    """Convert a decoded image of any mode to ``L`` or ``RGB``, as ``read_image`` does.

    Raises:
        ImageError: Its numbers have no fixed meaning as grey.
    """
    mode = "L" if channels == 1 else "RGB"
    if image.mode == mode and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        image = _from_integers(image, name)
    elif image.mode == "F":
        image = _from_floats(image, name)
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if image.mode == "La":  # Pillow knows no other way out of premultiplied grey
            image = image.convert("LA")
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, _WHITE), image).convert("RGB")
    if image.mode not in ("1", "L", "RGB"):  # Pillow has no direct way from CMYK, YCbCr, HSV and LAB to grey
        image = image.convert("RGB")
    return image.convert(mode)


def is_grey(image: Image.Image) -> bool:
    """Whether an RGB image holds nothing but grey."""
    pixels = np.asarray(image.convert("RGB"))
    return bool((pixels == pixels[..., :1]).all())


def _decode(stream: Any, channels: Channels, name: str) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata that Pillow reads over
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            with Image.open(stream) as image:
                image.load()
                return to_channels(_upright(image), channels, name)
        except ImageError:
            raise
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            raise ImageError(
                name, f"the image has more than {Image.MAX_IMAGE_PIXELS:,} pixels", "make it smaller"
            ) from None
        except UnidentifiedImageError:
            raise ImageError(
                name, "this is not an image of a format that Pillow reads", "check what it is, or convert it to PNG"
            ) from None
        except Exception as e:  # the readers of the formats raise anything at damaged bytes
            reason = " ".join(str(e).split()) or type(e).__name__
            raise ImageError(name, f"the image is damaged ({reason})", "copy or export it again") from None


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # metadata beyond reading tell no orientation; the pixels are good
        return image


def _from_integers(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ImageError(
            name, f"grey levels must be from 0 to 65535, got {values.min()} to {values.max()}", "scale it to 8 bits"
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))  # round(x / 257), exactly


def _from_floats(image: Image.Image, name: str) -> Image.Image:
    values = np.asarray(image).astype(np.float64)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ImageError(name, "floating-point pixels must be from 0 to 1", "scale them, or save it with 8 bits")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))
