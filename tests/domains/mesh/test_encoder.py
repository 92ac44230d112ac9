"""The shape encoder: Michelangelo's numbers and names, queries of both kinds, and what is refused."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vertebra.backbones.layers.masks import Layout
from vertebra.domains.mesh.encoder import (
    MICHELANGELO,
    ShapeEncoder,
    ShapeEncoderConfig,
    fourier_features,
    michelangelo_names,
    michelangelo_weights,
    spread_points,
)
from vertebra.errors import ConfigError, LoadError, ShapeError

sys.path.append(str(Path(__file__).parents[2] / "reference"))
import mesh_encoder as slow

SMALL = ShapeEncoderConfig(width=24, heads=3, layers=2, latents=5, frequencies=3, bottleneck=4, decoder_layers=2)
both_queries = pytest.mark.parametrize("queries", ["learned", "points"])


def cloud(batch=2, count=13):
    points = torch.rand(batch, count, 6) * 2 - 1
    points[..., 3:] /= points[..., 3:].norm(dim=-1, keepdim=True)
    return points


def layout_of(batch, length):
    return Layout(batch=batch, length=length, device=torch.device("cpu"))


def build(**changes):
    encoder = ShapeEncoder(replace(SMALL, **changes))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return encoder.eval()


def loaded(prefix=""):
    tensors = slow.encoder_tensors(24, 5, 3, 2, 4, 2, prefix)
    encoder = ShapeEncoder(SMALL)
    encoder.load_state_dict(michelangelo_weights(SMALL, tensors, prefix))
    return encoder, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------- numbers


def test_outputs_and_gradients_are_those_of_the_slow_twin():
    encoder, tensors = loaded()
    points = cloud().requires_grad_()
    twin_points = points.detach().clone().requires_grad_()
    for tensor in tensors.values():
        tensor.requires_grad_()
    tokens, twin = encoder(points), slow.encode(tensors, twin_points, 3, 3, 2)
    decoded, twin_decoded = encoder.decode_latents(tokens), slow.decode(tensors, twin, 3, 4, 2)
    assert tokens.shape == (2, 6, 24)
    assert decoded.shape == (2, 5, 24)
    torch.testing.assert_close(tokens, twin, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded, twin_decoded, atol=1e-5, rtol=1e-5)
    pull = torch.randn_like(tokens), torch.randn_like(decoded)
    torch.autograd.backward((tokens, decoded), pull)
    torch.autograd.backward((twin, twin_decoded), pull)
    expected = michelangelo_weights(SMALL, {name: tensor.grad for name, tensor in tensors.items()})
    for name, parameter in encoder.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4, msg=name)
    torch.testing.assert_close(points.grad, twin_points.grad, atol=1e-4, rtol=1e-4)


def test_features_of_one_point():
    x = torch.tensor([0.5, -0.25, 0.125])
    waves = [0.5, 1.0, -0.25, -0.5, 0.125, 0.25]  # each coordinate times 1 and 2
    expected = torch.cat([x, torch.tensor(waves).sin(), torch.tensor(waves).cos()])
    torch.testing.assert_close(fourier_features(x, 2), expected)
    assert torch.equal(fourier_features(x, 0), x)


def test_michelangelo_has_51_features_and_257_tokens():
    assert (MICHELANGELO.layers, MICHELANGELO.decoder_layers, MICHELANGELO.heads) == (8, 16, 12)
    encoder = ShapeEncoder(replace(MICHELANGELO, layers=1, decoder_layers=0))
    assert tuple(encoder.input_proj.weight.shape) == (768, 51 + 3)
    assert tuple(encoder.query.shape) == (257, 768)
    assert tuple(encoder.to_moments.weight.shape) == (2 * 64, 768)
    assert {name: tuple(p.shape) for name, p in encoder.layers[0].named_parameters()} == {
        "norm1.weight": (768,),
        "norm1.bias": (768,),
        "mixer.qkv.weight": (2304, 768),
        "mixer.proj.weight": (768, 768),
        "mixer.proj.bias": (768,),
        "norm2.weight": (768,),
        "norm2.bias": (768,),
        "mlp.fc1.weight": (3072, 768),
        "mlp.fc1.bias": (3072,),
        "mlp.fc2.weight": (768, 3072),
        "mlp.fc2.bias": (768,),
    }


def test_the_latents_are_decoded_through_the_mean():
    encoder = build()
    tokens = encoder(cloud())
    mean, log_variance = encoder.moments(tokens)
    assert mean.shape == log_variance.shape == (2, 5, 4)
    with torch.no_grad():
        encoder.to_moments.weight[4:] += 1  # of the log-variance
        changed = encoder.moments(tokens)
    assert torch.equal(changed[0], mean)
    assert not torch.allclose(changed[1], log_variance)
    expected = encoder.decoder[1](encoder.decoder[0](encoder.from_code(mean), layout := layout_of(2, 5)), layout)
    assert torch.equal(encoder.decode_latents(tokens), expected)
    assert torch.equal(encoder.moments(tokens * torch.tensor([9, 1, 1, 1, 1, 1])[:, None])[0], mean)


# ---------------------------------------------------------------- points


@both_queries
def test_the_order_of_the_points_does_not_matter(queries):
    encoder, points = build(queries=queries), cloud(count=40)
    shuffled = points[:, torch.randperm(40)]
    torch.testing.assert_close(encoder(shuffled), encoder(points), atol=1e-5, rtol=1e-5)
    moved = points.clone()
    moved[:, 7] = -moved[:, 7]
    assert not torch.allclose(encoder(moved), encoder(points), atol=1e-3)


@both_queries
def test_items_do_not_see_each_other_and_gradients_reach_everything(queries):
    encoder, points = build(queries=queries), cloud(3)
    together = encoder(points)
    torch.testing.assert_close(together[1:2], encoder(points[1:2]), atol=1e-5, rtol=1e-5)
    (together.square().sum() + encoder.decode_latents(together).square().sum()).backward()
    silent = [n for n, p in encoder.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert silent == []


def test_queries_are_the_embeddings_of_the_chosen_points():
    encoder, points, seen = build(queries="points", layers=0), cloud(), []
    encoder.cross.register_forward_pre_hook(lambda module, args: seen.extend(args))
    encoder(points)
    query, data = seen
    chosen = spread_points(points[..., :3], 5)
    assert torch.equal(query[:, 0], encoder.query.expand(2, -1))
    for item in range(2):
        assert torch.equal(query[item, 1:], data[item, chosen[item]])


def test_spread_points_are_the_farthest_each():
    points = torch.randn(3, 30, 3)
    assert spread_points(points, 9).tolist() == [slow.spread(item, 9) for item in points]


def test_points_in_one_place_are_chosen_once_each():
    points = torch.zeros(1, 8, 3)
    points[0, 3] = 1
    chosen = spread_points(points, 8)[0]
    assert chosen[0] == 3
    assert sorted(chosen.tolist()) == list(range(8))


def test_spread_points_cover_a_sphere():
    points = torch.nn.functional.normalize(torch.randn(1, 4096, 3), dim=-1)
    chosen = points[0, spread_points(points, 64)[0]]
    gaps = torch.cdist(chosen, chosen) + 9 * torch.eye(64)
    assert gaps.min() > 0.3  # 64 caps of equal area have a diameter of 0.5
    assert torch.cdist(points[0], chosen).min(1).values.max() <= gaps.min()


# ---------------------------------------------------------------- weights


def test_published_names_are_read_with_their_prefix():
    encoder, tensors = loaded("model.shape_model.")
    points = cloud()
    torch.testing.assert_close(encoder(points), slow.encode(tensors, points, 3, 3, 2), atol=1e-5, rtol=1e-5)
    assert set(michelangelo_names(SMALL)) == set(encoder.state_dict())


def test_other_models_tensors_are_passed_over_and_an_encoder_alone_is_read():
    plain = replace(SMALL, bottleneck=0, decoder_layers=0)
    tensors = slow.encoder_tensors(24, 5, 3, 2, 4, 2) | {"geo_decoder.x": torch.zeros(1)}
    assert set(michelangelo_weights(plain, tensors)) == set(ShapeEncoder(plain).state_dict())


@pytest.mark.parametrize(
    ("config", "prefix", "text"),
    [
        (replace(SMALL, layers=3), "", "lacks 'encoder.self_attn.resblocks.2.attn.c_proj.bias', 11 tensors in all"),
        (SMALL, "model.", "is the prefix 'model.' right?"),
        (replace(SMALL, layers=1), "", "has no place for 'encoder.self_attn.resblocks.1.attn.c_proj.bias', 11 tensors"),
        (replace(SMALL, decoder_layers=0), "", "has no place for 'transformer.resblocks.0"),
    ],
)
def test_a_checkpoint_of_another_structure_is_refused(config, prefix, text):
    with pytest.raises(LoadError) as caught:
        michelangelo_weights(config, slow.encoder_tensors(24, 5, 3, 2, 4, 2), prefix)
    assert text in str(caught.value)


def test_point_queries_have_no_published_names():
    with pytest.raises(ConfigError, match="Michelangelo has queries='learned', got 'points'"):
        michelangelo_names(replace(SMALL, queries="points"))


def test_fresh_weights():
    encoder = ShapeEncoder(replace(SMALL, width=192, heads=3))
    assert encoder.layers[0].mlp.fc2.weight.std().item() == pytest.approx(0.25 / 192**0.5, rel=0.05)
    assert encoder.cross.kv.weight.std().item() == pytest.approx(0.25 / 192**0.5, rel=0.05)
    assert encoder.query.std().item() == pytest.approx(0.02, rel=0.1)
    assert not encoder.decoder[1].mixer.proj.bias.any()
    assert encoder.no_weight_decay() == {"query"}


def test_dropout_acts_in_training_alone():
    encoder, points = build(dropout=0.5), cloud()
    assert torch.equal(encoder(points), encoder(points))
    encoder.train()
    assert not torch.allclose(encoder(points), encoder(points))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"layers": -1}, "layers must be at least 0, got -1"),
        ({"heads": 7}, "width (24) must be a multiple of heads (7)"),
        ({"queries": "grid"}, "queries must be learned or points, got 'grid'"),
        ({"bottleneck": 0}, "decoder_layers=2 stand behind a bottleneck; set bottleneck, or decoder_layers=0"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
    ],
)
def test_impossible_settings(changes, text):
    with pytest.raises(ConfigError) as caught:
        replace(SMALL, **changes)
    assert text in str(caught.value)


@pytest.mark.parametrize("points", [torch.zeros(2, 9, 3), torch.zeros(9, 6), torch.zeros(1, 0, 6), cloud().long()])
def test_points_of_another_shape(points):
    with pytest.raises(ShapeError, match=r"points must be float \(B, N, 6\)"):
        build()(points)


def test_too_few_points_for_their_queries():
    with pytest.raises(ShapeError, match="5 points cannot be chosen of 4; give more points, or lower latents"):
        build(queries="points")(cloud(count=4))


def test_no_bottleneck():
    encoder = build(bottleneck=0, decoder_layers=0)
    with pytest.raises(ConfigError, match="no bottleneck; build it with bottleneck > 0"):
        encoder.decode_latents(encoder(cloud()))
    with pytest.raises(ShapeError, match=r"tokens must be \(B, 6, 24\), got \(2, 5, 24\)"):
        build().decode_latents(torch.zeros(2, 5, 24))
