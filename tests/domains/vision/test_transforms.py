"""What is done to images, against torchvision and timm."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as peer

from vertebra.domains.vision.spec import VisionSpec
from vertebra.domains.vision.transforms import (
    Augment,
    affine,
    draw_affine,
    eval_transform,
    item_generators,
    train_transform,
)
from vertebra.errors import ConfigError

RNG = np.random.default_rng(0)


def picture(seed=0, height=12, width=12, channels=3):
    shape = (height, width, 3) if channels == 3 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


# ---------------------------------------------------------------- transforms


def spec_of(channels=3, height=16, width=16, **options):
    return VisionSpec(
        **{"task": "classification", "mean": (0.5,) * channels, "std": (0.25,) * channels, **options},
        channels=channels,
        height=height,
        width=width,
    )


def test_evaluation_resizes_the_short_side_and_crops_the_centre():
    image = picture(height=300, width=400)
    out = eval_transform(spec_of(height=224, width=224, crop_fraction=0.875))(image)
    want = peer.center_crop(peer.resize(image, 256, InterpolationMode.BICUBIC), 224)
    assert torch.allclose(out, (peer.to_dtype(peer.pil_to_tensor(want), scale=True) - 0.5) / 0.25, atol=1e-5)
    squashed = eval_transform(spec_of(height=20, width=30, crop="squash", task="generation"))(image)
    assert torch.equal(squashed, peer.pil_to_tensor(peer.resize(image, [20, 30], InterpolationMode.BICUBIC)))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5000), (7, 3), (16, 16)])
@pytest.mark.parametrize("crop", ["centre", "squash"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_size_fits(height, width, crop, channels):
    image = picture(height=height, width=width, channels=channels)
    out = eval_transform(spec_of(channels, 16, 24, crop=crop))(image)
    assert out.shape == (channels, 16, 24)
    assert out.isfinite().all()


def test_an_image_of_the_right_size_is_not_touched():
    image = picture(height=16, width=16)
    pixels = eval_transform(spec_of(crop_fraction=0.5)).prepare(image)
    assert np.array_equal(pixels, np.asarray(image).transpose(2, 0, 1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [
        Augment(policy="light", hflip=0.5, erasing=0.5),
        Augment(policy="imagenet"),
        Augment(policy="imagenet", randaugment="", scale=(0.5, 1.0)),
        Augment(policy="imagenet", randaugment="rand-m10-n4-inc1"),
    ],
)
def test_policies_depend_on_seed_epoch_and_item_alone(channels, augment):
    transform = train_transform(spec_of(channels), augment)
    images = [transform.prepare(picture(i, 20, 18, channels)) for i in range(24)]
    items = np.arange(24)
    out = transform.batch(images, 3, 1, items)
    assert (out.shape, out.dtype) == ((24, channels, 16, 16), torch.float32)
    assert out.isfinite().all()
    random.seed(9)
    torch.manual_seed(9)
    parts = [transform.batch(images[i : i + 5], 3, 1, items[i : i + 5]) for i in range(0, 24, 5)]
    assert torch.equal(torch.cat(parts), out)
    for other in (transform.batch(images, 4, 1, items), transform.batch(images, 3, 2, items)):
        assert not torch.equal(other, out)


def test_the_highest_posterize_of_timm_is_survived():
    transform = train_transform(spec_of(1), Augment(policy="imagenet", randaugment="rand-m10-n8-inc1"))
    images = [transform.prepare(picture(i, channels=1)) for i in range(60)]
    assert transform.batch(images, 0, 0, np.arange(60)).isfinite().all()
    with pytest.raises(ConfigError, match="timm does not know randaugment 'nonsense'"):
        train_transform(spec_of(), Augment(policy="imagenet", randaugment="nonsense"))


def test_generators_are_put_back():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    with item_generators(0, 0) as start:
        start(5)
        first = random.random(), np.random.rand(), torch.rand(1).item()
        start(5)
        assert (random.random(), np.random.rand(), torch.rand(1).item()) == first
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize(("height", "width"), [(21, 21), (20, 31)])
def test_the_affine_map_is_torchvisions(height, width):
    images = torch.zeros(1, 1, height, width)
    images[:, :, 5:14, 6:15] = torch.rand(9, 9) * 255
    angle, shear, shift, scale = 17.0, 8.0, (2 / width, -1 / height), 1.2
    ours = affine(images, torch.tensor([angle]), torch.tensor([shear]), torch.tensor([shift]), torch.tensor([scale]))
    theirs = peer.affine(images, angle, [2, -1], scale, [shear, 0.0], InterpolationMode.BILINEAR, fill=[0.0])
    assert torch.allclose(ours, theirs, atol=1e-2)


def test_the_affine_map_fills_with_the_border():
    images = torch.full((4, 3, 12, 12), 77.0)
    out = affine(images, *draw_affine(Augment(policy="light", degrees=90, translate=0.5), 0, 0, np.arange(4)))
    assert torch.allclose(out, images)
    angle, shear, shift, scale = draw_affine(Augment(policy="light"), 0, 0, np.arange(1000))
    assert 9 < angle.max() <= 10
    assert -10 <= angle.min() < -9
    assert 4.5 < shear.abs().max() <= 5
    assert 0.09 < shift.abs().max() <= 0.1
    assert (scale.min() >= 0.9).all()
    assert (scale.max() <= 1.1).all()
