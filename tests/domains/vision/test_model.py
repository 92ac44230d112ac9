"""The image classifier against the paper's own code, its positions, and models of timm beside it."""

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

import vertebra  # noqa: F401  # registers with timm
from vertebra.backbones.base import BackboneConfig, create_backbone, resolve
from vertebra.domains.optim import OptimizerConfig, parameter_table
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.vision.model import ImageClassifier, resize_positions
from vertebra.domains.vision.published import from_published, read_published, to_published
from vertebra.domains.vision.schedule import soft_mask_rate
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, LoadError, ShapeError, UnknownNameError


def spec(size=32, channels=3, classes=7):
    return VisionSpec(
        task="classification",
        channels=channels,
        height=size,
        width=size,
        classes=tuple(f"c{i}" for i in range(classes)),
    )


def classifier(word, size=32, patch_size=8, **changes):
    return ImageClassifier(create_backbone(word), spec(size, **changes), patch_size=patch_size).eval()


@pytest.fixture(scope="module")
def published():
    """The released state dict, of random weights, with inputs and outputs of the original code."""
    archive = np.load(Path(__file__).parents[2] / "golden" / "illama_small_random.npz")
    return {k: torch.from_numpy(archive[k]) for k in archive.files if k != "config"}


def from_golden(published, soft_mask=True):
    word = "illama_test,dim=48,depth=2,num_heads=3,num_kv_heads=0,hidden_dim=256"
    model = classifier(f"{word},causal={'false' if soft_mask else 'true'},soft_mask={str(soft_mask).lower()}")
    state = {k.removeprefix("w/"): v for k, v in published.items() if k.startswith("w/")}
    model.load_state_dict(from_published(state))
    return model, state


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_logits_and_features_are_those_of_the_original(published, rate):
    model, _ = from_golden(published)
    model.set_soft_mask(rate)
    torch.testing.assert_close(model(published["in/x"]), published[f"out/logits_alpha{rate}"], atol=1e-5, rtol=1e-5)
    features = model.embed_images(published["in/x"])
    torch.testing.assert_close(features, published[f"out/feat_alpha{rate}"], atol=1e-5, rtol=1e-5)


def test_names_go_to_the_published_ones_and_back(published):
    model, state = from_golden(published)
    assert {k: v.shape for k, v in to_published(model.state_dict()).items()} == {k: v.shape for k, v in state.items()}


def test_the_last_patch_changes_earlier_ones_after_the_softmax_but_not_in_additive_mode(published):
    images = published["in/x"]
    changed = images.clone()
    changed[:, :, -8:, -8:] += 1
    for soft_mask in (True, False):
        model, _ = from_golden(published, soft_mask)
        before, after = (model.backbone(model.embed_patches(x))[:, :-2] for x in (images, changed))
        assert torch.allclose(before, after, atol=1e-6) != soft_mask


COUNTS = {"tiny": 5_701_096, "small": 22_018_024, "base": 86_502_376, "large": 310_445_032}


@pytest.mark.parametrize(("size", "count"), COUNTS.items())
def test_parameters_of_the_papers_sizes(size, count):
    with torch.device("meta"):
        model = classifier(f"illama_{size},causal=false,soft_mask=true", 224, 16, classes=1000)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(("size", "pixels", "classes", "count"), [
    ("base", 384, 1000, 86_794_216), ("large", 384, 1000, 310_834_152), ("base", 224, 10_450, 93_769_426),
])  # fmt: skip
def test_parameters_of_other_published_models(size, pixels, classes, count):
    with torch.device("meta"):
        model = classifier(f"illama_{size}", pixels, 16, classes=classes)
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_schedule_has_the_published_check_values():
    means = [
        np.mean([soft_mask_rate(step, "linear", 25 * 312) for step in range(e * 312, (e + 1) * 312)]) for e in range(3)
    ]
    np.testing.assert_allclose(means, [0.98006, 0.94006, 0.90005], atol=1e-5)
    assert [soft_mask_rate(s, "constant", 10) for s in (0, 9, 10)] == [1, 1, 0]
    assert [soft_mask_rate(s, "linear", 10) for s in (0, 9, 10)] == [1, 0, 0]
    assert soft_mask_rate(0, "none", 10) == 0


def test_positions_are_interpolated_as_the_papers_code_does():
    positions = torch.randn(1, 17, 6)
    resized = resize_positions(positions, (4, 4), (7, 5))
    grid = positions[:, :16].reshape(1, 4, 4, 6).permute(0, 3, 1, 2)
    expected = F.interpolate(grid, size=(7, 5), mode="bicubic", align_corners=False).permute(0, 2, 3, 1).flatten(1, 2)
    torch.testing.assert_close(resized[:, :-1], expected)
    assert torch.equal(resized[:, -1:], positions[:, -1:])
    library = timm.layers.resample_abs_pos_embed(positions[:, :16], [7, 5], num_prefix_tokens=0, antialias=False)
    torch.testing.assert_close(resized[:, :-1], library, atol=0, rtol=0)


@pytest.mark.parametrize("word", ["illama_test", "illama_test,causal=false", "hybrid_test"])
def test_images_of_another_size_are_read_with_interpolated_positions(word):
    model = classifier(word)
    images = torch.randn(2, 3, 48, 40)
    larger = ImageClassifier(create_backbone(word), spec(48), patch_size=8).eval()
    larger.load_state_dict(larger.adapt(model.state_dict()))
    square = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(model(square), larger(square), atol=1e-5, rtol=1e-5)
    assert model(images).shape == (2, 7)
    with pytest.raises(ShapeError, match="height and width must be multiples of 8"):
        model(torch.randn(1, 3, 30, 32))


def test_weights_of_colour_models_serve_grey_images_and_the_other_way_round():
    colour = classifier("illama_test")
    grey = classifier("illama_test", channels=1)
    grey.load_state_dict(grey.adapt(colour.state_dict()))
    picture = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(picture), colour(picture.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)
    colour.load_state_dict(colour.adapt(grey.state_dict()))
    torch.testing.assert_close(grey(picture), colour(picture.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)


def test_a_published_file_is_loaded_strictly(published, tmp_path):
    model, state = from_golden(published)
    torch.save({"model": state, "args": argparse.Namespace(lr=4e-3)}, tmp_path / "w.pth")
    fresh = classifier(
        "illama_test,dim=48,depth=2,num_heads=3,num_kv_heads=0,hidden_dim=256,causal=false,soft_mask=true", classes=3
    )
    report = read_published(fresh, str(tmp_path / "w.pth"))
    assert set(report.missing) == {"head.weight", "head.bias"}
    images = published["in/x"]
    torch.testing.assert_close(fresh.embed_images(images), model.embed_images(images), atol=0, rtol=0)
    torch.save({**state, "blocks.0.attn.extra": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(LoadError, match=r"1 unexpected: blocks\.0\.attn\.extra"):
        read_published(fresh, str(tmp_path / "w.pth"))
    torch.save({"weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(LoadError, match=r"w\.pth: must hold the state dict of an image model"):
        read_published(fresh, str(tmp_path / "w.pth"))


def test_wrong_patch_sizes_name_the_fitting_ones():
    with pytest.raises(ConfigError, match="patch_size=16 must divide the image size 28 x 28; choose 2 or 4 or 7 or 14"):
        ImageClassifier(create_backbone("illama_test"), spec(28))


def test_the_soft_mask_needs_illama():
    with pytest.raises(ConfigError, match="needs an iLLaMA backbone, got hybrid"):
        classifier("hybrid_test").set_soft_mask(0.5)


# ---------------------------------------------------------------- models of timm


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet10t"])
def test_a_model_of_timm_is_a_baseline(name, tmp_path):
    config = resolve(f"timm:{name}", channels=1, size=(32, 32))
    assert BackboneConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    torch.manual_seed(0)
    model = ImageClassifier(config.build(), spec(channels=1)).eval()
    theirs = timm.create_model(name, in_chans=1, num_classes=7, **({"img_size": 32} if "vit" in name else {})).eval()
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in theirs.parameters())
    images = torch.randn(2, 1, 32, 32)
    loaded = load_model(save_model(model, tmp_path / "m"))
    torch.testing.assert_close(loaded(images), model(images), atol=0, rtol=0)


def test_fields_of_timm_models_are_theirs():
    config = resolve("timm:vit_tiny_patch16_224,patch_size=4,depth=3", channels=1, size=(28, 28))
    assert config.options == {"patch_size": 4, "depth": 3}
    assert (config.depth, config.dim, len(config.build().model.blocks)) == (3, 192, 3)
    assert ImageClassifier(config.build(), spec(28, channels=1)).eval()(torch.randn(1, 1, 28, 28)).shape == (1, 7)
    with pytest.raises(UnknownNameError, match=r"unknown timm model 'vit_tyni_patch16_224'\. Did you mean"):
        resolve("timm:vit_tyni_patch16_224")
    with pytest.raises(ConfigError, match="reads images, not features"):
        config.build()(torch.randn(1, 4, 192))


def test_rates_fall_from_the_head_down_and_positions_do_not_decay():
    model = classifier("illama_test,depth=3")
    table = parameter_table(model, OptimizerConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    names = ["head.weight", "backbone.norm.weight", "backbone.layers.2.mixer.qkv.weight"]
    names += ["backbone.layers.0.mixer.qkv.weight", "patch_embed.proj.weight", "pos_embed", "cls_token"]
    assert [table[n] for n in names] == [
        (1, 0.1), (1, 0), (0.5, 0.1), (0.125, 0.1), (0.0625, 0.1), (0.0625, 0), (0.0625, 0),
    ]  # fmt: skip
