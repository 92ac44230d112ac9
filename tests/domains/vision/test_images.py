"""Decoding images: modes, depths, orientation, damage."""

import io
import pickle
import warnings

import numpy as np
import pytest
from PIL import Image, ImageFile

from vertebra.domains.vision.images import IMAGE_ENDINGS, ImageError, is_grey, read_image

RAMP = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
COLOUR = (200, 40, 90)


def encoded(image, kind="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixels(source, channels=3):
    return np.asarray(read_image(source, channels))


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "LAB"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_is_read(mode, channels):
    image = Image.new("RGB", (5, 4), COLOUR)
    image = image.quantize() if mode == "P" else image.convert(mode)
    data = encoded(image, {"CMYK": "JPEG", "YCbCr": "JPEG", "LAB": "TIFF"}.get(mode, "PNG"))
    out = read_image(data, channels)
    assert (out.mode, out.size) == (("L", "RGB")[channels == 3], (5, 4))
    luma = 0.299 * COLOUR[0] + 0.587 * COLOUR[1] + 0.114 * COLOUR[2]
    want = luma if mode in ("L", "LA") or channels == 1 else COLOUR
    if mode != "1":
        assert np.allclose(np.asarray(out), want, atol=4)


def test_an_inverted_cmyk_jpeg_of_adobe_has_its_colours():
    ink = Image.new("RGB", (8, 8), (250, 250, 250)).convert("CMYK")
    assert b"Adobe" in encoded(ink, "JPEG")  # Pillow writes CMYK inverted, as Adobe does
    assert pixels(encoded(ink, "JPEG")).min() > 240


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    out = pixels(encoded(Image.fromarray(RAMP), kind), 1)
    assert np.array_equal(out, np.rint(RAMP / 257).astype(np.uint8))


def test_sixteen_bits_of_either_byte_order_and_mode_i():
    big = Image.frombytes("I;16B", (32, 32), RAMP.astype(">u2").tobytes())
    wide = Image.fromarray(RAMP.astype(np.int32))
    want = np.rint(RAMP / 257)
    for image in (big, wide):
        assert np.array_equal(pixels(encoded(image, "TIFF"), 1), want)
    assert (pixels(encoded(Image.new("I", (2, 2), 65535), "TIFF"), 3) == 255).all()
    with pytest.raises(ImageError, match="grey levels must be from 0 to 65535, got 70000 to 70000; scale it to 8 bits"):
        read_image(encoded(Image.new("I", (2, 2), 70000), "TIFF"), 1)


def test_floats_from_zero_to_one():
    assert (pixels(encoded(Image.new("F", (2, 2), 0.5), "TIFF"), 1) == 128).all()
    for value in (1.5, -0.1, float("nan")):
        with pytest.raises(ImageError, match="floating-point pixels must be from 0 to 1"):
            read_image(encoded(Image.new("F", (2, 2), value), "TIFF"), 1)


def test_transparency_is_laid_over_white():
    half = Image.new("RGBA", (3, 3), (0, 0, 0, 128))
    assert np.allclose(pixels(encoded(half)), 127, atol=1)
    assert np.allclose(pixels(encoded(Image.new("LA", (3, 3), (0, 0)))), 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, *COLOUR])
    palette.paste(0, (0, 0, 2, 4))
    for transparency in (0, bytes([0, 255])):
        out = pixels(encoded(palette, transparency=transparency))
        assert (out[:, :2] == 255).all()
        assert (out[:, 2:] == COLOUR).all()
    keyed = Image.new("RGB", (2, 2), COLOUR)
    assert (pixels(encoded(keyed, transparency=COLOUR), 1) == 255).all()


def test_orientation_of_a_camera():
    image = Image.new("RGB", (8, 4), "white")
    image.paste((0, 0, 0), (0, 0, 2, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    out = pixels(encoded(image, "PNG", exif=exif))
    assert out.shape == (8, 4, 3)
    assert (out[:2] == 0).all()
    assert (out[2:] == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "TIFF"])
def test_the_first_frame_is_taken(kind):
    frames = [Image.new("L", (4, 4), level) for level in (10, 200)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    assert (pixels(data, 1) == 10).all()


@pytest.mark.parametrize("kind", ["WEBP", "BMP", "PPM"])
def test_other_formats(kind):
    options = {"lossless": True} if kind == "WEBP" else {}
    assert (pixels(encoded(Image.new("RGB", (1, 1), COLOUR), kind, **options)) == COLOUR).all()


def test_paths_are_read_and_the_mode_l_is_kept(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3))))
    assert np.array_equal(pixels(path, 1), [[0, 1, 2], [3, 4, 5]])
    assert is_grey(read_image(str(path), 3))
    assert not is_grey(Image.new("RGB", (2, 2), COLOUR))
    assert path.suffix in IMAGE_ENDINGS


# ---------------------------------------------------------------- damage


def noisy(kind):
    return encoded(Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)), kind)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_image_is_damaged(tmp_path, kind, share):
    data = noisy(kind)
    path = tmp_path / "cut.img"
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ImageError, match=r"cut\.img: (the image is damaged|this is not an image)"):
        read_image(path, 3)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


def test_a_broken_checksum_is_damage():
    data = bytearray(noisy("PNG"))
    data[len(data) // 2] ^= 255
    with pytest.raises(ImageError, match="the image is damaged"):
        read_image(bytes(data), 3)


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("a list of things")
    with pytest.raises(ImageError, match=r"empty\.png: the file is empty; copy it again\.$"):
        read_image(tmp_path / "empty.png", 3)
    with pytest.raises(ImageError, match=r"text\.png: this is not an image of a format that Pillow reads; check"):
        read_image(tmp_path / "text.png", 3)
    with pytest.raises(ImageError, match=r"none\.png: there is no such file; correct the path"):
        read_image(tmp_path / "none.png", 3)
    with pytest.raises(ImageError, match="the file cannot be opened"):
        read_image(tmp_path, 3)
    with pytest.raises(ImageError, match="upload 3: the file is empty"):
        read_image(b"", 3, name="upload 3")


@pytest.mark.parametrize("limit", [60, 20])
def test_too_many_pixels(monkeypatch, limit):
    data = encoded(Image.new("L", (10, 10)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ImageError, match=f"more than {limit} pixels; make it smaller"):
            read_image(data, 1)


def test_zero_pixels():
    data = b"P5 0 4 255\n"
    with pytest.raises(ImageError, match=r"damaged|not an image"):
        read_image(data, 1)


def test_the_error_survives_pickling_and_names_its_parts():
    error = pickle.loads(pickle.dumps(ImageError("a.png", "the file is empty", "copy it again")))
    assert (error.file, error.rule, error.advice) == ("a.png", "the file is empty", "copy it again")
    assert str(error) == "a.png: the file is empty; copy it again."
