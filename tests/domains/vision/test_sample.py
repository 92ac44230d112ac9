"""The fabricated images."""

import csv
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vertebra.domains.vision import sample
from vertebra.domains.vision.images import ImageError, read_image


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    sample.write_sample(root)
    return root


def test_same_seed_same_bytes(folder, tmp_path):
    again = sample.write_sample(tmp_path)
    other = np.random.default_rng([1, 0])
    for path in again:
        assert path.read_bytes() == (folder / path.relative_to(tmp_path)).read_bytes()
    assert len(again) == len(set(again)) == len([p for p in tmp_path.rglob("*") if p.is_file()])
    first = np.asarray(Image.open(folder / "shapes" / "circle" / "0000.png"))
    assert not np.array_equal(np.asarray(sample.draw_shape(other, "circle")), first)


def test_shapes_are_small_rgb_images(folder):
    for kind in sample.CLASSES:
        files = sorted((folder / "shapes" / kind).iterdir())
        assert len(files) == sample.COUNT
        with Image.open(files[0]) as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))


def test_colour_tells_nothing_of_the_class(folder):
    """A nearest-mean classifier of an image's mean and deviation of colour is about as good as guessing."""
    features, labels = [], []
    for number, kind in enumerate(sample.CLASSES):
        for path in sorted((folder / "shapes" / kind).iterdir()):
            pixels = np.asarray(Image.open(path)).reshape(-1, 3) / 255
            features.append([*pixels.mean(0), *pixels.std(0)])
            labels.append(number)
    features, labels = np.array(features), np.array(labels)
    even = np.arange(len(labels)) % 2 == 0
    means = np.stack([features[even & (labels == c)].mean(0) for c in range(6)])
    guess = ((features[~even, None] - means) ** 2).sum(2).argmin(1)
    assert (guess == labels[~even]).mean() < 0.3


def test_outlines_differ_and_fit(folder):
    rng = np.random.default_rng(0)
    for kind in sample.CLASSES:
        assert np.linalg.norm(sample.outline(kind), axis=1).max() <= 1.0001
        masks = [sample.draw_mask(rng, kind, 32, 32) for _ in range(20)]
        assert all(0 < m.sum() < 32 * 32 and m.max() == 1 for m in masks)
        assert all(len(np.unique(m)) > 4 for m in masks)  # soft edges


def test_the_table_names_files_and_splits(folder):
    with (folder / "labels.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 120
    assert all((folder / row["path"]).is_file() and row["path"].split("/")[1] == row["label"] for row in rows)
    assert Counter(row["split"] for row in rows) == {"train": 84, "val": 18, "test": 18}


def test_unsorted_images_have_many_formats(folder):
    files = sorted((folder / "unsorted").iterdir())
    assert len(files) == 12
    assert {f.name.split("-")[0] for f in files} == set(sample.CLASSES)
    assert {read_image(f, 3).mode for f in files} == {"RGB"}
    modes = set()
    for path in files:
        with Image.open(path) as image:
            modes.add(image.mode)
    assert {"L", "P", "CMYK", "I;16", "RGBA", "RGB"} <= modes
    assert read_image(folder / "unsorted" / "cross-rotated.jpg", 3).size == (48, 64)
    assert read_image(folder / "unsorted" / "triangle-tiny.png", 3).size == (8, 8)


def test_damaged_images_are_bad_and_their_neighbours_good(folder):
    bad = []
    for path in sorted((folder / "damaged").iterdir()):
        try:
            read_image(path, 3)
        except ImageError as e:
            bad.append((path.name, e.rule.partition(" (")[0]))
    assert bad == [
        ("empty.png", "the file is empty"),
        ("text.png", "this is not an image of a format that Pillow reads"),
        ("truncated.jpg", "the image is damaged"),
        ("truncated.png", "the image is damaged"),
    ]
    assert len(list((folder / "damaged").iterdir())) == 10
    assert read_image(folder / "top_half.png", 3).size == (16, 16)
