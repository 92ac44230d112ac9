"""Fabricated images: six shapes, of any colour, on textures, in the formats that people have; and damaged files.

What class an image has is decided by the outline alone: colour, texture, place, size and turn are drawn in the same
way for all classes.
"""

from __future__ import annotations

import csv
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASSES = ("circle", "cross", "ring", "square", "star", "triangle")
SIDE = 32
COUNT = 200
_FINE = 4  # edges are drawn this much larger, then averaged
_UNLIKE = 0.4  # least distance of the shape's colour from the background's, in the unit cube
Values = NDArray[np.float64]


def outline(kind: str) -> Values:
    """Corners (N, 2) of a shape that fits into the unit circle; ``circle`` and ``ring`` get many."""
    if kind in ("circle", "ring"):
        return _corners(48, np.ones(1))
    if kind == "square":
        return _corners(4, np.ones(1))
    if kind == "triangle":
        return _corners(3, np.ones(1))
    if kind == "star":
        return _corners(10, np.array([1.0, 0.42]))
    arm, end = 0.3, 0.95  # a cross
    return np.array(
        [
            *((-arm, -end), (arm, -end), (arm, -arm), (end, -arm), (end, arm), (arm, arm)),
            *((arm, end), (-arm, end), (-arm, arm), (-end, arm), (-end, -arm), (-arm, -arm)),
        ]
    )


def draw_shape(
    rng: np.random.Generator, kind: str, height: int = SIDE, width: int = SIDE, *, grey: bool = False
) -> Image.Image:
    """Draw one shape on a texture, RGB; ``grey`` draws in grey colours alone."""
    colour, first, second = draw_colours(rng, grey=grey)
    share = draw_mask(rng, kind, height, width)[..., None]
    ground = draw_texture(rng, first, second, height, width)
    shade = rng.uniform(-0.08, 0.08) * np.linspace(-1, 1, height)[:, None, None]
    values = share * (colour + shade) + (1 - share) * ground
    return Image.fromarray(np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8))


def draw_mask(rng: np.random.Generator, kind: str, height: int, width: int) -> Values:
    """Draw the share of every pixel that a shape covers, (H, W), at a random place, size and turn."""
    side = min(height, width)
    radius = side * rng.uniform(0.26, 0.44)
    centre = [rng.uniform(radius, size - radius) for size in (width, height)]
    angle = rng.uniform(0, 2 * np.pi)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    corners = outline(kind) @ turn.T
    image = Image.new("L", (width * _FINE, height * _FINE))
    pen = ImageDraw.Draw(image)
    for scale, value in ((1.0, 255), (0.55, 0)) if kind == "ring" else ((1.0, 255),):
        points = (np.array(centre) + radius * scale * corners) * _FINE
        pen.polygon([(x, y) for x, y in points.tolist()], fill=value)
    fine = np.asarray(image, dtype=np.float64) / 255
    return fine.reshape(height, _FINE, width, _FINE).mean((1, 3))


def draw_colours(rng: np.random.Generator, *, grey: bool = False) -> tuple[Values, Values, Values]:
    """Draw the colour of a shape and two of its background; neither these nor their mixtures are like it."""
    channels = 1 if grey else 3
    colour = np.resize(rng.random(channels), 3)
    while True:
        first, second = (np.resize(rng.random(channels), 3) for _ in range(2))
        mixtures = first + np.linspace(0, 1, 9)[:, None] * (second - first)
        if np.linalg.norm(mixtures - colour, axis=1).min() > _UNLIKE:
            return colour, first, second


def draw_texture(rng: np.random.Generator, first: Values, second: Values, height: int, width: int) -> Values:
    """Draw a background (H, W, 3) of two colours: a gradient, stripes or a checker, and noise."""
    y, x = np.mgrid[:height, :width] / min(height, width)
    angle, wave = rng.uniform(0, 2 * np.pi), rng.uniform(2, 6)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    phase = rng.uniform(0, 2 * np.pi)
    kind = rng.integers(3)
    if kind == 0:
        mix = (along - along.min()) / np.ptp(along)
    elif kind == 1:
        mix = 0.5 + 0.5 * np.sin(2 * np.pi * wave * along + phase)
    else:
        mix = ((np.floor(along * wave + phase) + np.floor(across * wave)) % 2).astype(np.float64)
    middle = (first + second) / 2
    strength = rng.uniform(0.3, 1)  # of the contrast between the two
    one, two = middle + strength * (first - middle), middle + strength * (second - middle)
    noise = rng.normal(0, rng.uniform(0.01, 0.06), (height, width, 3))
    values: Values = one + mix[..., None] * (two - one) + noise
    return values


def _corners(count: int, radii: Values) -> Values:
    angles = 2 * np.pi * np.arange(count) / count
    return np.resize(radii, count)[:, None] * np.stack([np.sin(angles), -np.cos(angles)], 1)


def write_sample(folder: Path, seed: int = 0) -> list[Path]:
    """Fabricate images in the formats that the vision domain reads; the same seed gives the same bytes.

    Args:
        folder: Where to write; made when missing.
        seed: Seed of everything.

    Returns:
        The files: ``shapes/CLASS/NNNN.png`` (six classes of 200, 32 x 32 RGB), ``labels.csv`` (``path``, ``label``
        and ``split`` of 120 of them), ``unsorted/`` (12 fresh shapes in as many formats, called by their class),
        ``damaged/`` (6 good shapes, and four files that cannot be read), and ``top_half.png`` (16 x 16), whose lower
        half a generator can draw anew.
    """
    folder = Path(folder)
    paths = []
    for number, kind in enumerate(CLASSES):
        rng = np.random.default_rng([seed, number])
        (folder / "shapes" / kind).mkdir(parents=True, exist_ok=True)
        for i in range(COUNT):
            paths.append(folder / "shapes" / kind / f"{i:04}.png")
            draw_shape(rng, kind).save(paths[-1])
    rng = np.random.default_rng([seed, len(CLASSES)])
    paths.append(_write_table(folder / "labels.csv"))
    paths += _write_unsorted(rng, folder / "unsorted")
    paths += _write_damaged(rng, folder / "damaged")
    paths.append(folder / "top_half.png")
    draw_shape(rng, "circle", 16, 16).save(paths[-1])
    return paths


def _write_table(path: Path, count: int = 20) -> Path:
    with path.open("w", newline="", encoding="ascii") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["path", "label", "split"])
        for i in range(count):
            split = "train" if i < 0.7 * count else "val" if i < 0.85 * count else "test"
            writer.writerows((f"shapes/{kind}/{i:04}.png", kind, split) for kind in CLASSES)
    return path


def _write_unsorted(rng: np.random.Generator, folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)

    def path(name: str) -> Path:
        paths.append(folder / name)
        return paths[-1]

    paths: list[Path] = []
    draw_shape(rng, "circle", grey=True).convert("L").save(path("circle-grey.png"))
    draw_shape(rng, "square").quantize(64).save(path("square-palette.png"))
    draw_shape(rng, "triangle", 64, 64).convert("CMYK").save(path("triangle-cmyk.jpg"), quality=95)
    grey = np.asarray(draw_shape(rng, "star", grey=True).convert("L")).astype(np.uint16)
    Image.fromarray(grey * 257).save(path("star-16bit.png"))
    exif = Image.Exif()
    exif[0x0112] = 6  # held upright
    draw_shape(rng, "cross", 48, 64).save(path("cross-rotated.jpg"), quality=95, exif=exif)
    draw_shape(rng, "ring").save(path("ring-lossless.webp"), lossless=True)
    frames = [draw_shape(rng, "circle").quantize(64) for _ in range(2)]
    frames[0].save(path("circle-frames.gif"), save_all=True, append_images=frames[1:])
    draw_shape(rng, "square").save(path("square-plain.bmp"))
    draw_shape(rng, "triangle", 8, 8).save(path("triangle-tiny.png"))
    draw_shape(rng, "star", 200, 300).save(path("star-large.jpg"), quality=95)
    clear = draw_shape(rng, "cross").convert("RGBA")
    clear.putalpha(Image.fromarray(np.rint(draw_mask(rng, "cross", SIDE, SIDE) * 255).astype(np.uint8)))
    clear.save(path("cross-transparent.png"))
    draw_shape(rng, "ring").save(path("ring-scan.tif"))
    return paths


def _write_damaged(rng: np.random.Generator, folder: Path) -> list[Path]:
    folder.mkdir(exist_ok=True)
    paths = []
    for kind in CLASSES:
        paths.append(folder / f"{kind}-good.png")
        draw_shape(rng, kind).save(paths[-1])
    halves = []
    for kind, format_ in (("circle", "JPEG"), ("star", "PNG")):
        stream = BytesIO()
        draw_shape(rng, kind, 64, 64).save(stream, format_)
        halves.append(stream.getvalue()[: len(stream.getvalue()) // 2])
    contents = {
        "empty.png": b"",
        "truncated.jpg": halves[0],
        "text.png": b"This is not an image.\n",
        "truncated.png": halves[1],
    }
    for name, content in contents.items():
        paths.append(folder / name)
        paths[-1].write_bytes(content)
    return paths
