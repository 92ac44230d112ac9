"""The denoiser against the authors' numbers, and diffusion models of images from end to end."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn

from vertebra.backbones.base import create_backbone
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.vision.diffusion import ImageDiffusion, cosine_gamma, mix
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, ShapeError

BACKBONES = ["fit_test,context=true", "fit_test", "illama_test"]
every_backbone = pytest.mark.parametrize("name", BACKBONES)


def build(name=BACKBONES[0], *, classes=("a", "b", "c"), channels=3, height=8, width=12, **options):
    torch.manual_seed(0)
    spec = VisionSpec(task="generation", channels=channels, height=height, width=width, classes=classes)
    options.setdefault("patch_size", 2)
    return ImageDiffusion(create_backbone(f"{name},causal=false"), spec, **options)


def random_images(count, channels=3, height=8, width=12):
    return torch.randint(0, 256, (count, channels, height, width), dtype=torch.uint8)


# ---------------------------------------------------------------- the authors' numbers


@pytest.fixture(scope="module")
def fit_weights():
    """The mapping of names, which the tests of the backbone have."""
    path = Path(__file__).parents[2] / "backbones" / "test_fit.py"
    spec = importlib.util.spec_from_file_location("fit_weights", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["fit_denoiser_selfcond", "fit_denoiser_nolocalattn_xmlp"])
def test_denoiser(golden, fit_weights, name):
    config, data = fit_weights.read(golden / "backbones" / f"{name}.npz")
    data = fit_weights.without(data, "fitd")
    backbone = fit_weights.golden_backbone(
        config,
        data,
        causal=False,
        context=True,
        x_self_attention=config.get("x_self_attention", True),
        cross_mlp=config.get("xattn_with_mlp", False),
        kv_norm=config.get("xattn_enc_ln", True),
    )
    self_cond = config["self_cond"] == "latent"
    spec = VisionSpec(task="generation", channels=1, height=4, width=6, classes=tuple("abcdefg"))
    model = ImageDiffusion(backbone, spec, patch_size=1, self_cond=0.9 * self_cond).eval()
    model.stem, model.head = nn.Linear(5, 16), nn.Linear(16, 5)
    fit_weights.linear(model.stem, data, "stem")
    fit_weights.norm(model.stem_norm, data, "stem_ln")
    fit_weights.linear(model.time_embed.fc1, data, "time_emb/dense0")
    fit_weights.linear(model.time_embed.fc2, data, "time_emb/dense1")
    fit_weights.linear(model.cond_proj, data, "cond_proj")
    fit_weights.linear(model.head, data, "x_output_linear")
    if self_cond:
        fit_weights.mlp(model.previous_mlp, data, "latent_prev_proj")
        fit_weights.norm(model.previous_norm, data, "latent_prev_ln")
    with torch.no_grad():
        x, latents = model.denoise(
            data["in/x"].flatten(1, 2), data["in/time"], data["in/cond"], data.get("in/latents_prev")
        )
    torch.testing.assert_close(x.unflatten(1, (4, 6)), data["out/x"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(latents, data["out/latents"], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- training


@every_backbone
@pytest.mark.parametrize("classes", [(), ("a", "b", "c")])
def test_one_batch_overfits(name, classes):
    model = build(name, classes=classes, channels=1, height=8, width=8)
    images = random_images(4, 1, 8, 8)
    images[:, :, :4] = 0  # half is known once the noise is
    labels = torch.tensor([0, 1, 2, 0]) if classes else None
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(1)
    losses = []
    for _ in range(150):
        loss = model.loss(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-20:]) / 20 < 0.6 * sum(losses[:5]) / 5


@pytest.mark.parametrize("self_cond", [0.0, 0.5])
def test_gradient_reaches_every_parameter(self_cond):
    model = build(self_cond=self_cond)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.loss(random_images(16), torch.randint(0, 3, (16,))).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_the_loss_is_that_of_its_generator():
    model = build(self_cond=0.5).eval()
    images, labels = random_images(4), torch.tensor([0, 1, 2, -1])
    losses = [model.loss(images, labels, generator=torch.Generator().manual_seed(s)).item() for s in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_hidden_classes_are_as_no_classes():
    model = build().eval()
    noisy, gamma = torch.randn(3, 3, 8, 12), torch.rand(3)
    hidden = model(noisy, gamma, torch.tensor([-1, -1, -1]))[0]
    torch.testing.assert_close(hidden, model(noisy, gamma)[0])
    assert not torch.allclose(hidden, model(noisy, gamma, torch.tensor([0, 1, 2]))[0])


def test_the_noise_follows_from_the_velocity():
    model = build("illama_test")
    images, noise, gamma = torch.randn(2, 3, 8, 12), torch.randn(2, 3, 8, 12), torch.tensor([0.01, 0.7])
    velocity = mix(noise, -images, gamma)
    model.denoise = lambda tokens, gamma, cond, previous: (model._patches(velocity), None)
    assert (model.target, build().target) == ("velocity", "noise")
    torch.testing.assert_close(model(mix(images, noise, gamma), gamma)[0], noise, atol=1e-5, rtol=1e-5)


def test_noise_levels_go_from_all_to_none():
    gamma = cosine_gamma(torch.linspace(0, 1, 11))
    assert gamma[0] == pytest.approx(1)
    assert gamma[-1] == pytest.approx(1e-5)
    assert bool((gamma[:-1] > gamma[1:]).all())
    assert gamma[5] == pytest.approx(0.494, abs=1e-3)  # equation 17 at half the time
    x, noise = torch.randn(2, 1, 400, 400), torch.randn(2, 1, 400, 400)
    assert mix(x, noise, torch.tensor([0.3, 0.9])).std() == pytest.approx(1, abs=0.01)


def test_patches_keep_rows_columns_and_channels_together():
    model = build()
    images = torch.arange(3 * 8 * 12.0).reshape(1, 3, 8, 12)
    patches = model._patches(images)
    assert patches.shape == (1, 4, 6, 12)
    assert patches[0, 1, 2].tolist() == images[0, :, 2:4, 4:6].permute(1, 2, 0).flatten().tolist()
    assert torch.equal(model._pixels(patches), images)


# ---------------------------------------------------------------- sampling


@every_backbone
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_samples_are_bytes_and_repeat(name, eta):
    model = build(name).train()
    labels, shares = torch.tensor([0, 2]), []

    def draw(seed, progress=None):
        generator = torch.Generator().manual_seed(seed)
        return model.sample(2, labels=labels, steps=5, eta=eta, generator=generator, progress=progress)

    images = draw(0, shares.append)
    assert (images.shape, images.dtype) == ((2, 3, 8, 12), torch.uint8)
    assert shares == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert torch.equal(draw(0), images)
    assert not torch.equal(draw(1), images)
    assert model.training


@every_backbone
def test_bfloat16_samples_too(name):
    images = build(name).bfloat16().sample(2, labels=torch.tensor([0, 1]), steps=50, guidance=1.0)
    assert images.float().std() > 1


@pytest.mark.parametrize("self_cond", [0.0, 0.9])
@pytest.mark.parametrize("guidance", [0.0, 2.0])
def test_given_rows_are_kept(self_cond, guidance):
    model = build(self_cond=self_cond)
    given = random_images(2, height=3)
    images = model.sample(2, labels=torch.tensor([0, 1]), steps=4, given=given, guidance=guidance)
    assert torch.equal(images[:, :, :3], given)
    whole = random_images(2)
    assert torch.equal(model.sample(2, steps=2, given=whole), whole)


def test_guidance_moves_from_without_to_with_the_class():
    model = build().eval()
    x, labels = torch.randn(2, 3, 8, 12), torch.tensor([0, 1])
    gamma = torch.tensor([0.2, 0.7])
    with torch.no_grad():
        with_class, without = model(x, gamma, labels)[0], model(x, gamma)[0]
        for weight in (0.0, 1.5):
            expected = (1 + weight) * with_class - weight * without
            torch.testing.assert_close(model._guided(x, gamma, labels, weight, None)[0], expected)


def test_a_perfect_denoiser_draws_its_image():
    """With the exact noise of one image, every step leads to that image, and bytes are rounded, not cut off."""
    model = build(b_scale=0.7)
    target = random_images(1)
    clean = model.scale(target)

    def exact(noisy, gamma, labels=None, previous=None):
        gamma = gamma.reshape(-1, 1, 1, 1)
        return (noisy - gamma.sqrt() * clean) / (1 - gamma).sqrt(), None

    model.forward = exact
    for options in ({"eta": 0.0}, {"eta": 1.0}, {"temperature": 0.0}, {"given": target[:, :, :2]}):
        assert torch.equal(model.sample(1, steps=7, **options), target)


@pytest.mark.parametrize("name", ["fit_test,context=true", "illama_test"])
def test_samples_follow_the_class_they_are_asked_for(name):
    """Dark and bright images; after some seconds of training, a class's samples are of its brightness."""
    model = build(name, classes=("dark", "bright"), channels=1, height=8, width=8)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(2)
    for _ in range(250):
        labels = torch.randint(0, 2, (32,))
        images = torch.randint(0, 40, (32, 1, 8, 8)) + 200 * labels[:, None, None, None]
        loss = model.loss(images.to(torch.uint8), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for guidance in (0.0, 1.0):
        labels = torch.tensor([0, 1] * 8)
        generator = torch.Generator().manual_seed(0)
        images = model.sample(16, labels=labels, steps=20, guidance=guidance, generator=generator)
        brightness = images.float().mean((1, 2, 3))
        assert bool(((brightness > 128) == (labels == 1)).all())


# ---------------------------------------------------------------- saving and refusals


def test_model_directory_round_trip(tmp_path):
    model = build(self_cond=0.5, b_scale=0.5).eval()
    save_model(model, tmp_path / "model")
    again = load_model(tmp_path / "model")
    assert isinstance(again, ImageDiffusion)
    assert again.arguments == {"patch_size": 2, "cond_drop": 0.1, "self_cond": 0.5, "b_scale": 0.5, "target": "noise"}
    noisy, gamma, labels = torch.randn(2, 3, 8, 12), torch.rand(2), torch.tensor([0, 2])
    torch.testing.assert_close(again(noisy, gamma, labels), model(noisy, gamma, labels), atol=0, rtol=0)


def test_impossible_models_are_refused():
    with pytest.raises(ConfigError, match=r"use causal=false, as in 'fit_nano,causal=false,context=true'"):
        ImageDiffusion(create_backbone("fit_test"), build().spec)
    for options, text in (
        ({"patch_size": 5}, "patch_size must divide the image size 8 x 12, got 5"),
        ({"cond_drop": 1.5}, "cond_drop must be from 0 to 1, got 1.5"),
        ({"b_scale": 0.0}, "b_scale must be above 0"),
        ({"target": "image"}, "target must be noise, velocity or auto, got 'image'"),
        ({"name": "illama_test", "self_cond": 0.5}, "self_cond=0.5 needs a FIT with context=true, got illama"),
    ):
        with pytest.raises(ConfigError, match=text):
            build(**options)


def test_wrong_inputs_are_named():
    model, without = build(), build(classes=())
    for call, error, text in (
        (
            lambda: model.loss(torch.rand(2, 3, 8, 12)),
            ShapeError,
            r"images must be uint8 \(B, 3, 8, 12\), got torch.fl",
        ),
        (lambda: model.loss(random_images(2), torch.tensor([0])), ShapeError, r"labels must be integers \(2,\)"),
        (lambda: model.loss(random_images(1), torch.tensor([3])), ConfigError, "labels must be from 0 to 2, or -1"),
        (lambda: without.loss(random_images(1), torch.tensor([0])), ConfigError, "trained without classes"),
        (lambda: model(torch.rand(2, 1, 8, 12), torch.rand(2)), ShapeError, r"\(B, 3, 8, 12\), got \(2, 1, 8, 12\)"),
        (lambda: model.sample(0), ConfigError, "count and steps must be at least 1, got 0 and 100"),
        (lambda: model.sample(1, temperature=-1), ConfigError, "temperature must be at least 0"),
        (lambda: model.sample(1, guidance=1.0), ConfigError, "guidance=1.0 needs labels"),
        (
            lambda: model.sample(1, given=random_images(2)),
            ShapeError,
            r"given must be uint8 \(1, 3, up to 8 rows, 12\)",
        ),
    ):
        with pytest.raises(error, match=text):
            call()
