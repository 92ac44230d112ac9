"""Generation pixel by pixel: the original numbers, what a pixel depends on, and sampling against its slow twin."""

import json

import numpy as np
import pytest
import torch

from vertebra.backbones.axial import AxialConfig
from vertebra.backbones.base import create_backbone, resolve
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, ShapeError

BACKBONES = ["axial_test", "axial_test,depth=6,inner_depth=2,positions=none", "illama_test", "hybrid_test"]
every_backbone = pytest.mark.parametrize("name", BACKBONES)
every_colour = pytest.mark.parametrize("channels", [1, 3])


def make(name="axial_test", channels=1, height=4, width=5, classes=(), **arguments):
    torch.manual_seed(0)
    spec = VisionSpec(task="generation", channels=channels, height=height, width=width, classes=classes)
    model = ImageGenerator(create_backbone(name), spec, **{"levels": 16, "logits_scale": 1.0, **arguments}).eval()
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def random_images(model, count=2):
    spec = model.spec
    return torch.randint(256, (count, spec.channels, spec.height, spec.width)).to(torch.uint8)


def gumbel(model, count=2):
    spec = model.spec
    shape = (count, spec.channels, spec.height, spec.width, model.levels)
    return -torch.empty(shape).exponential_().log()


# ---------------------------------------------------------------- the original numbers


def published_block(weights, source, target):
    """Rename one block of Google's code: its Dense weights are (inputs, outputs)."""
    names = {
        "norm1.weight": "layernorm_attn/g",
        "norm1.bias": "layernorm_attn/b",
        "norm2.weight": "layernorm_mlp/g",
        "norm2.bias": "layernorm_mlp/b",
        "mixer.attentions.0.proj.weight": "attn/proj_out/w",
        "mixer.attentions.0.proj.bias": "attn/proj_out/b",
        "mlp.fc1.weight": "mlp/proj_in/w",
        "mlp.fc1.bias": "mlp/proj_in/b",
        "mlp.fc2.weight": "mlp/proj_out/w",
        "mlp.fc2.bias": "mlp/proj_out/b",
    }
    found = {f"{target}.{new}": weights[f"{source}/{old}"].mT for new, old in names.items() if old.endswith("w")}
    found |= {f"{target}.{new}": weights[f"{source}/{old}"] for new, old in names.items() if not old.endswith("w")}
    attention = f"{target}.mixer.attentions.0.qkv"
    found[f"{attention}.weight"] = torch.cat([weights[f"{source}/attn/{p}/w"].mT for p in "qkv"])
    found[f"{attention}.bias"] = torch.cat([weights[f"{source}/attn/{p}/b"] for p in "qkv"])
    return found


def published_2d(weights, prefix, config):
    outer, inner = config["num_outer_layers"], config["num_inner_layers"]
    found = {
        "embed.weight": weights[f"{prefix}embs"],
        "positions.height": weights[f"{prefix}pos_embs_h"],
        "positions.width": weights[f"{prefix}pos_embs_w"],
        "backbone.norm.weight": weights[f"{prefix}final_ln/g"],
        "backbone.norm.bias": weights[f"{prefix}final_ln/b"],
        "head.weight": weights[f"{prefix}final_dense/w"].mT,
        "head.bias": weights[f"{prefix}final_dense/b"],
    }
    for i in range(outer):
        kind = "col" if i % 2 else "row"
        found |= published_block(weights, f"{prefix}outer_{kind}_{i // 2}", f"backbone.layers.{i}")
    for i in range(inner):
        found |= published_block(weights, f"{prefix}inner_row_{i}", f"backbone.layers.{outer + i}")
    return found


def published(golden, name, channels):
    data = np.load(golden / "backbones" / name)
    config = json.loads(str(data["config"]))
    arrays = {k: torch.from_numpy(data[k]) for k in data.files if k != "config"}
    weights = {k[2:]: v for k, v in arrays.items() if k.startswith("w/")}
    structure = AxialConfig(
        dim=config["emb_dim"],
        depth=config["num_outer_layers"] + config["num_inner_layers"],
        inner_depth=config["num_inner_layers"],
        num_heads=config["num_heads"],
        mlp_ratio=config["hdim_factor"],
        row=config["img_width"],
        positions="none",
    )
    size = {"height": config["img_height"], "width": config["img_width"]}
    spec = VisionSpec(task="generation", channels=channels, **size)
    exterior = structure.encoder().replace(depth=config.get("num_exterior_layers", 2)).to_dict()
    model = ImageGenerator(structure.build(), spec, levels=config["num_embs"], exterior=exterior).eval()
    if channels == 1:
        state = published_2d(weights, "model/", config)
    else:
        state = published_2d(weights, "ar_decoder/transformer2d/", config)
        state |= {
            "exterior.positions.height": weights["ar_decoder/pos_embs_h"],
            "exterior.positions.width": weights["ar_decoder/pos_embs_w"],
            "exterior.conv.weight": weights["ar_decoder/exterior_input_conv/w"].permute(3, 2, 0, 1),
            "exterior.conv.bias": weights["ar_decoder/exterior_input_conv/b"],
        }
        for i, kind in enumerate(("row", "col")):
            state |= published_block(weights, f"ar_decoder/exterior_{kind}_0", f"exterior.encoder.layers.{i}")
    model.load_state_dict(state)
    return model, arrays


def test_grey_logits_are_those_of_the_original(golden):
    model, data = published(golden, "axial_2d.npz", 1)
    ids = data["in/x"].long()
    for condition, name in ((data["in/cond"], "out/logits"), (None, "out/logits_nocond")):
        torch.testing.assert_close(model.channel_logits(ids, condition), data[name], atol=1e-5, rtol=0)


def test_colour_logits_are_those_of_the_original(golden):
    model, data = published(golden, "axial_3d.npz", 3)
    images, channel = data["in/x"].movedim(-1, 1), data["in/slice"].long()
    condition = model.condition(images.to(torch.uint8), channel)
    torch.testing.assert_close(condition, data["out/cond"], atol=1e-5, rtol=0)
    logits = model.channel_logits(images[torch.arange(len(images)), channel].long(), condition)
    torch.testing.assert_close(logits, data["out/logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["sample", "sample_naive"])
def test_samples_are_those_of_the_original(golden, method, monkeypatch):
    model, _ = published(golden, "axial_2d.npz", 1)
    data = np.load(golden / "backbones" / "axial_2d_sampling.npz")
    condition = torch.from_numpy(data["cond"])
    monkeypatch.setattr(model, "condition", lambda *args: condition)
    images = getattr(model, method)(len(condition), noise=torch.from_numpy(data["gumbel"])[:, None])
    assert torch.equal(model.quantise(images[:, 0]), torch.from_numpy(data["samples"]))


@pytest.mark.parametrize(("size", "count"), [(32, 341_178_112), (64, 606_161_152)])
def test_models_of_the_paper_have_its_parameters(size, count):
    spec = VisionSpec(task="generation", channels=3, height=size, width=size)
    with torch.device("meta"):
        model = ImageGenerator(resolve(f"axial_imagenet{size}").build(), spec)
    assert sum(p.numel() for p in model.parameters()) == count


# ---------------------------------------------------------------- likelihood


@every_backbone
@every_colour
def test_a_fresh_model_needs_eight_bits(name, channels):
    spec = VisionSpec(task="generation", channels=channels, height=6, width=4)
    model = ImageGenerator(create_backbone(name), spec)
    images = random_images(model)
    assert model.loss(images).item() == pytest.approx(8, abs=1e-3)
    assert model.bits_per_dim(images).tolist() == pytest.approx([8, 8], abs=1e-3)


@every_backbone
@every_colour
def test_a_sub_pixel_depends_on_those_before_it_alone(name, channels):
    model = make(name, channels)
    images = random_images(model, 1)
    logits = model(images)[0].flatten(0, 2)  # in the order of generation: channel, row, column
    for at in range(0, images.numel(), 7):
        other = images.clone()
        other.view(-1)[at] ^= 128
        same = (model(other)[0].flatten(0, 2) - logits).abs().amax(-1) < 1e-6
        assert same[: at + 1].all()
        assert not same[at + 1 :].any()


@every_colour
def test_loss_and_bits_are_those_of_the_logits(channels):
    model = make(channels=channels)
    images = random_images(model, 8)
    bits = -model(images).log_softmax(-1).gather(-1, model.quantise(images)[..., None])[..., 0] / np.log(2)
    torch.testing.assert_close(model.bits_per_dim(images), bits.flatten(1).mean(1))
    draws = torch.randint(channels, (8,), generator=torch.Generator().manual_seed(4))
    loss = model.loss(images, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(loss, bits[torch.arange(8), draws].mean())


@pytest.mark.parametrize("levels", [2, 3, 32, 100, 200, 255, 256])
def test_levels_cut_the_bytes_into_equal_ranges(levels):
    model = make(levels=levels)
    values = torch.arange(256).to(torch.uint8)
    ids = model.quantise(values)
    assert ids.unique().tolist() == list(range(levels))
    counts = ids.bincount()
    assert counts.max() - counts.min() <= 1
    assert torch.equal(model.quantise(model.dequantise(ids)), ids)
    assert (model.dequantise(ids).int() - values.int()).abs().max() <= -(-256 // levels) // 2
    if levels == 256:
        assert torch.equal(model.dequantise(ids), values)


@every_backbone
@every_colour
def test_classes_change_the_logits(name, channels):
    model = make(name, channels, classes=("a", "b"))
    images = random_images(model, 1)
    a, b = (model(images, torch.tensor([k])) for k in (0, 1))
    assert ((a - b).abs().amax(-1) > 1e-5).all()
    noise = gumbel(model)
    both = model.sample(2, labels=torch.tensor([0, 1]), noise=noise)
    for k in (0, 1):
        alone = model.sample(1, labels=torch.tensor([k]), noise=noise[k : k + 1])
        assert torch.equal(alone[0], both[k])


@every_backbone
@every_colour
def test_gradient_reaches_every_parameter(name, channels):
    model = make(name, channels, classes=("a", "b")).train()
    model(random_images(model), torch.tensor([0, 1])).log_softmax(-1)[..., 0].sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_backbone
@every_colour
def test_one_batch_overfits(name, channels):
    torch.manual_seed(0)
    spec = VisionSpec(task="generation", channels=channels, height=3, width=4)
    model = ImageGenerator(create_backbone(name), spec, levels=8)
    images = random_images(model, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(images).backward()
        optimizer.step()
    assert model.bits_per_dim(images).mean() < 1.0


# ---------------------------------------------------------------- sampling


@every_backbone
@every_colour
@pytest.mark.parametrize("temperature", [1.0, 0.0, 0.5])
def test_sampling_equals_its_slow_twin(name, channels, temperature):
    model = make(name, channels)
    noise = gumbel(model)
    shares = []
    images = model.sample(2, temperature=temperature, noise=noise, progress=shares.append)
    assert torch.equal(images, model.sample_naive(2, temperature=temperature, noise=noise))
    assert (images.dtype, images.shape) == (torch.uint8, (2, channels, 4, 5))
    assert shares == pytest.approx([(i + 1) / (4 * channels) for i in range(4 * channels)])
    assert len(images.unique()) > 4 or temperature == 0


@every_backbone
@every_colour
@pytest.mark.parametrize("rows", [0, 1, 3, 4])
def test_given_rows_stay_and_the_rest_follows_them(name, channels, rows):
    model = make(name, channels)
    noise, given = gumbel(model), random_images(model)[:, :, :rows]
    images = model.sample(2, noise=noise, given=given)
    assert torch.equal(images[:, :, :rows], given)
    assert torch.equal(images, model.sample_naive(2, noise=noise, given=given))
    free = model.sample(2, noise=noise)  # an image's own upper rows lead to the same image
    assert torch.equal(model.sample(2, noise=noise, given=free[:, :, :rows]), free)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 6), (7, 1), (9, 3), (6, 11)])
@every_colour
def test_images_of_any_size(height, width, channels):
    model = make(channels=channels, height=height, width=width)
    noise = gumbel(model, 1)
    assert torch.equal(model.sample(1, noise=noise), model.sample_naive(1, noise=noise))
    assert model.bits_per_dim(random_images(model)).shape == (2,)


def test_samples_follow_the_model():
    """Two pixels of three levels: frequencies against probabilities."""
    model = make(height=1, width=2, levels=3)
    images = model.sample(20_000, generator=torch.Generator().manual_seed(0))
    ids = model.quantise(images).flatten(1)
    found = torch.bincount(ids[:, 0] * 3 + ids[:, 1], minlength=9) / len(ids)
    every = torch.cartesian_prod(torch.arange(3), torch.arange(3)).reshape(9, 1, 1, 2)
    expected = (-model.bits_per_dim(model.dequantise(every)) * 2 * np.log(2)).exp()
    torch.testing.assert_close(expected.sum().item(), 1.0, atol=1e-4, rtol=0)
    torch.testing.assert_close(found, expected, atol=0.015, rtol=0)


def test_a_generator_and_training_mode():
    model = make("axial_test,dropout=0.5", 3).train()
    draws = [model.sample(2, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(draws[0], model.sample_naive(2, generator=torch.Generator().manual_seed(1)))
    assert model.training
    model.loss(draws[0]).backward()


@every_backbone
@every_colour
def test_model_directory_round_trip(name, channels, tmp_path):
    exterior = resolve(name).encoder().replace(depth=2).to_dict()
    model = make(name, channels, classes=("a", "b"), exterior=exterior)
    save_model(model, tmp_path / "model")
    other = load_model(tmp_path / "model")
    images, labels = random_images(model), torch.tensor([1, 0])
    torch.testing.assert_close(other(images, labels), model(images, labels), atol=0, rtol=0)
    assert (other.spec, other.arguments) == (model.spec, model.arguments)


def test_mistakes_are_named():
    spec = VisionSpec(task="generation", channels=3, height=4, width=5)
    with pytest.raises(ConfigError, match="the backbone must be causal, got causal=False"):
        ImageGenerator(create_backbone("axial_test", causal=False), spec)
    for options, text in (
        ({"levels": 257}, "levels must be from 2 to 256, got 257"),
        ({"exterior": resolve("axial_test").to_dict()}, "exterior must have dim=16"),
        ({"exterior": resolve("axial_nano").encoder().to_dict()}, "got dim=96"),
    ):
        with pytest.raises(ConfigError, match=text):
            ImageGenerator(create_backbone("axial_test"), spec, **options)
    model, classes = make(channels=3), make(classes=("a", "b"))
    images = random_images(model)
    for call, text in (
        (lambda: model.loss(images.float()), r"images must be uint8 \(B, 3, 4, 5\), got torch.float32"),
        (lambda: model.loss(images[:, :1]), r"got torch.uint8 \(2, 1, 4, 5\)"),
        (lambda: model.loss(images, torch.tensor([0, 1])), "without classes; leave labels out"),
        (lambda: classes.sample(2), r"labels must be int \(2,\), the model has 2 classes"),
        (lambda: classes.sample(2, labels=torch.zeros(3, dtype=torch.long)), r"got torch.int64 \(3,\)"),
        (lambda: model.sample(2, noise=torch.zeros(2, 3, 4, 5, 8)), r"noise must be \(2, 3, 4, 5, 16\)"),
        (lambda: model.sample(2, given=images[:1]), "given must be uint8"),
    ):
        with pytest.raises(ShapeError, match=text):
            call()
    for options, text in (({"temperature": -1}, "temperature at least 0"), ({"guidance": 2.0}, "guidance is for")):
        with pytest.raises(ConfigError, match=text):
            model.sample(2, **options)


def test_export():
    model = make(channels=3)
    images = random_images(model)
    program = torch.export.export(model, (images,))
    torch.testing.assert_close(program.module()(images), model(images), atol=1e-5, rtol=1e-5)
