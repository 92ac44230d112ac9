"""FIT against the authors' numbers (tests/golden, TF 2.15), and what the contract tests do not see."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.fit import FIT, FITConfig, block_shape, group_grid, parse_layers, sin_cos, spread
from vertebra.backbones.layers.interleaved import FITLayers
from vertebra.errors import ConfigError, LoadError, ShapeError


def read(path):
    with np.load(path) as file:
        config = json.loads(str(file["config"])) if "config" in file else {}
        tensors = {k: torch.from_numpy(file[k]) for k in file.files if k != "config"}
    return config, {k.partition("/")[2] if k.startswith("w/") else k: t for k, t in tensors.items()}


def norm(module, data, name):
    module.weight.data, module.bias.data = data[f"{name}/gamma"], data[f"{name}/beta"]


def linear(module, data, *names):
    """One Linear from one or several kernels whose first axis is the input."""
    width = module.in_features
    weights = [data[f"{n}/kernel"].reshape(width, -1).T for n in names]
    biases = [data[f"{n}/bias"].flatten() for n in names]
    module.weight.data, module.bias.data = torch.cat(weights), torch.cat(biases)
    assert module.weight.shape == (module.out_features, width)


def mlp(module, data, name):
    norm(module.norm2, data, f"{name}/ffn/ln")
    linear(module.mlp.fc1, data, f"{name}/ffn/dense1")
    linear(module.mlp.fc2, data, f"{name}/ffn/dense2")


def cross(module, data, name):
    norm(module.norm, data, f"{name}/cross_mha/ln")
    if module.kv_norm is not None:
        norm(module.kv_norm, data, f"{name}/cross_mha/enc_ln")
    linear(module.q, data, f"{name}/cross_mha/query")
    linear(module.kv, data, f"{name}/cross_mha/key", f"{name}/cross_mha/value")
    linear(module.proj, data, f"{name}/cross_mha/attention_output")
    if module.mlp is not None:
        mlp(module.mlp, data, f"{name}/mlp")


def load_layers(core, data, layer="transformer_encoder", attention="mha"):
    """Fill ``FITLayers`` with the weights of the original, whose names have the model's name cut off."""

    def at(name, index):
        return name if index == 0 else f"{name}_{index}"

    for number, stage in enumerate(core.stages):
        for network, indices in (("x_network", stage.local), ("l_network", stage.latent)):
            for place, index in enumerate(indices):
                name, own = f"{at(network, number)}/{at(layer, place)}", core.layers[index]
                mlp(own, data, f"{name}/mlp")
                if hasattr(own, "mixer"):
                    mha = f"{name}/{attention}"
                    norm(own.norm1, data, f"{mha}/ln")
                    linear(own.mixer.qkv, data, f"{mha}/query", f"{mha}/key", f"{mha}/value")
                    mixed = own.mixer.proj
                    mixed.weight.data = data[f"{mha}/attention_output/kernel"].flatten(0, 1).T
                    mixed.bias.data = data[f"{mha}/attention_output/bias"]
        if stage.latent:
            cross(core.reads[number], data, at("l2x_cross_attn", number))
            if len(core.contexts):
                cross(core.contexts[number], data, at("l2c_cross_attn", number))
        if stage.writes:
            cross(core.writes[number], data, at("x2l_cross_attn", number))


def golden_config(config, **fields):
    return FITConfig(
        dim=config["x_dim"],
        layers=config["layers"],
        group_size=config["x_size"] // config["num_groups"],
        latents=config["latents_per_group"],
        latent_dim=config["latent_dim"],
        num_heads=config["x_num_heads"],
        latent_heads=config["latent_num_heads"],
        groups=config["num_groups"],
        **fields,
    )


def golden_backbone(config, data, **names):
    fields = {k: names.pop(k) for k in list(names) if k not in ("layer", "attention")}
    backbone = golden_config(config, **fields).build().eval()
    load_layers(backbone.core, data, **names)
    backbone.x_positions.data = data["x_pos_emb/kernel/vis_pos_embedding"]
    backbone.latents.data = data["latent_pos_emb/kernel/vis_pos_embedding"]
    norm(backbone.norm, data, "x_output_ln")
    return backbone


def stem(x, data, name="stem"):
    y = x @ data[f"{name}/kernel"] + data[f"{name}/bias"]
    return F.layer_norm(y, y.shape[-1:], data[f"{name}_ln/gamma"], data[f"{name}_ln/beta"], 1e-6)


def without(data, model):
    return {k.removeprefix(f"{model}/"): v for k, v in data.items()}


# ---------------------------------------------------------------- the authors' numbers


def test_encoder(golden):
    config, data = read(golden / "backbones" / "fit_encoder.npz")
    data = without(data, "fit")
    backbone = golden_backbone(config, data, causal=False)
    with torch.no_grad():
        x, z = backbone.with_latents(stem(data["in/x"], data).flatten(1, 2))
        z = F.layer_norm(z, z.shape[-1:], data["l_output_ln/gamma"], data["l_output_ln/beta"], 1e-6)
    torch.testing.assert_close(x.unflatten(1, (4, 6)), data["out/x"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z, data["out/latents"], atol=1e-5, rtol=1e-5)


def test_encoder_that_ends_in_causal_latents_with_sin_cos_positions_and_a_token_a_group(golden):
    config, data = read(golden / "backbones" / "fit_encoder_causal_y_sincos.npz")
    data = without(data, "fit")
    core = FITLayers(parse_layers(config["layers"]), 24, 16, 4, 2, causal_latents=True)
    load_layers(core, data)
    x = stem(data["in/x"], data) + sin_cos(spread((2, 2)), 24)
    x = torch.cat([stem(data["in/y"], data, "stem_y"), x], dim=2)
    z = sin_cos(spread((3, 2)), 16).reshape(1, 3, 2, 16).expand(2, -1, -1, -1)
    with torch.no_grad():
        x, z = core(x, z)
        x = F.layer_norm(x, (24,), data["x_output_ln/gamma"], data["x_output_ln/beta"], 1e-6)
        z = F.layer_norm(z, (16,), data["l_output_ln/gamma"], data["l_output_ln/beta"], 1e-6)
    torch.testing.assert_close(x, data["out/x"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(z, data["out/latents"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["fit_ar", "fit_ar_untied"])
@torch.no_grad()
def test_autoregressive_by_a_pass_and_by_steps(golden, name):
    config, data = read(golden / "backbones" / f"{name}.npz")
    data = without(data, "fitar")
    backbone = golden_backbone(config, data, layer="transformer_decoder_layer", attention="self_mha")
    read_table = data.get("token_embedding", data.get("inp_token_embedding"))
    head, bias = data.get("token_embedding", data.get("outp_token_embedding")), data.get("outp_bias", 0.0)
    x = F.embedding(data["in/x"].long().flatten(1), read_table)
    logits = (backbone(x) @ head.T + bias).unflatten(1, (4, 6))
    torch.testing.assert_close(logits, data["out/logits"], atol=1e-5, rtol=1e-5)
    state = backbone.init_state(2, 24)
    parts = [backbone.step(part, state) for part in x.split([7, 1, 1, 1, 1, 1, 1, 11], dim=1)]
    logits = (torch.cat(parts, 1) @ head.T + bias).unflatten(1, (4, 6))
    torch.testing.assert_close(logits, data["out/logits"], atol=1e-5, rtol=1e-5)


def test_sin_cos_tables(golden):
    _, data = read(golden / "backbones" / "fit_sincos_tables.npz")
    for found, expected in (
        (sin_cos(spread((2, 2)), 24), data["x_pos_emb"]),
        (sin_cos(spread((3, 2)), 16), data["latent_pos_emb"]),
        (sin_cos(spread((8,), top=2 * math.pi), 6), data["seq1d_8x6_max2pi"][0]),
        (sin_cos(spread((3, 5)), 8).reshape(1, 3, 5, 8), data["grid_3x5x8_max1000"]),
    ):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert sin_cos(spread((1, 4)), 6).tolist() == sin_cos(spread((4,)), 6).tolist()
    assert sin_cos(spread((1,)), 4).tolist() == [[0, 0, 1, 1]]
    assert sin_cos(torch.zeros(2, 3), 8).shape == (2, 8)


# ---------------------------------------------------------------- the layers string


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("(2)4(2)", ((2, 4), (2, 0))),
        ("(0)3(1)12(0)", ((0, 3), (1, 12), (0, 0))),
        ("(1)1(1)2", ((1, 1), (1, 2))),
        ("(5)", ((5, 0),)),
    ],
)
def test_layers_are_read(text, plan):
    assert parse_layers(text) == plan


@pytest.mark.parametrize("text", ["", "2(2)", "(2", "(2)4(2)x", "(-1)2(1)", "(2) 4(2)", "()2(1)"])
def test_other_texts_are_refused(text):
    with pytest.raises(ConfigError, match=r"as in '\(2\)4\(2\)', got "):
        parse_layers(text)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"layers": "(2)0(2)"}, r"at least one latent layer between two brackets, got '\(2\)0\(2\)'"),
        ({"layers": "(2)(2)"}, "as in"),
        ({"layers": "(1)2"}, r"must end with local layers in brackets.*got '\(1\)2', use '\(1\)2\(1\)'"),
        ({"layers": "(3)"}, r"must hold latent layers.*got '\(3\)', use '\(3\)1\(1\)'"),
        ({"depth": 7}, r"depth is counted from layers, 3 in '\(1\)1\(1\)', got 7; leave depth out and set layers"),
        ({"num_heads": 3}, r"dim \(16\) must be a multiple of num_heads \(3\)"),
        ({"latent_heads": 5}, r"latent_dim \(24\) must be a multiple of latent_heads \(5\)"),
        ({"num_heads": 4, "latent_heads": 3}, r"\(16\) must be a multiple of the smaller of num_heads.*\(3\)"),
        ({"x_positions": "rope"}, "x_positions must be learned, sin_cos or none, got 'rope'"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"groups": -1}, "groups must be 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    ],
)
def test_impossible_configs_are_refused(fields, text):
    with pytest.raises(ConfigError, match=text):
        resolve("fit_test", **fields)


def test_depth_follows_layers():
    config = resolve("fit_test,layers=(2)1(0)3(2)")
    assert (config.depth, config.layers) == (8, "(2)1(0)3(2)")
    assert FITConfig.from_dict(config.to_dict()) == config
    assert config.replace(dim=32).depth == 8
    backbone = config.build()
    layers = {name: backbone.layer_of(name) for name, _ in backbone.named_parameters()}
    assert {v for k, v in layers.items() if k.startswith("core.layers.4")} == {4}
    assert {v for k, v in layers.items() if k.startswith("core.reads.1")} == {3}
    assert {v for k, v in layers.items() if k.startswith("core.writes.1")} == {5}
    assert (layers["latents"], layers["x_positions"], layers["norm.weight"]) == (0, 0, 8)
    assert backbone.no_weight_decay() == {"latents", "x_positions"}


# ---------------------------------------------------------------- groups


def build(name, **fields):
    torch.manual_seed(0)
    backbone = create_backbone(name, **fields).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


@pytest.mark.parametrize(
    ("size", "axes", "shape"), [(8, 2, (4, 2)), (64, 3, (4, 4, 4)), (36, 2, (6, 6)), (7, 2, (7, 1))]
)
def test_block_shapes(size, axes, shape):
    assert block_shape(size, axes) == shape


@pytest.mark.parametrize(
    ("grid", "block"), [((4, 6), (2, 3)), ((5, 7), (4, 2)), ((3, 4, 5), (2, 2, 2)), ((1, 1), (3, 3))]
)
def test_grids_are_cut_into_blocks(grid, block):
    index = torch.arange(1, 1 + math.prod(grid)).reshape(1, *grid, 1)
    groups = group_grid(index, None, block)
    counts = [-(-side // part) for side, part in zip(grid, block, strict=True)]
    assert groups.grid == tuple(counts)
    for number, place in enumerate(np.ndindex(*counts)):
        corner = [slice(p * b, (p + 1) * b) for p, b in zip(place, block, strict=True)]
        expected = index[(0, *corner)].flatten()
        assert groups.x[0, number].flatten()[groups.x[0, number].flatten() > 0].tolist() == expected.tolist()
        assert groups.real is None or int(groups.real[0, number].sum()) == len(expected)
    assert groups.back(groups.x).tolist() == index.tolist()


def test_neighbours_in_a_block_see_each_other_at_once():
    """With one local layer before the read, a position's group is what it reaches without latents."""
    core = FITLayers(((1, 0),), 16, 16, 2, 2)
    x = torch.randn(1, 4, 4, 16, requires_grad=True)  # four blocks of 2 x 2
    groups = group_grid(x, None, (2, 2))
    y = groups.back(core(groups.x, torch.zeros(1, 4, 1, 16))[0])
    y[0, 1, 2].sum().backward()
    reached = x.grad[0].abs().sum(-1) > 0
    assert reached.nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]


def test_permuting_whole_groups_with_their_latents_permutes_the_output():
    backbone = build("fit_test", causal=False, groups=5, layers="(1)2(1)1(1)")
    x, order = torch.randn(2, 40, 16), torch.tensor([3, 0, 4, 1, 2])
    y = backbone(x).unflatten(1, (5, 8))
    with torch.no_grad():
        backbone.latents.data = backbone.latents.unflatten(0, (5, 2))[order].flatten(0, 1)
    permuted = backbone(x.unflatten(1, (5, 8))[:, order].flatten(1, 2)).unflatten(1, (5, 8))
    torch.testing.assert_close(permuted, y[:, order], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
def test_more_groups_than_learned_are_refused(causal):
    backbone = build("fit_test", causal=causal, groups=3)
    assert backbone(torch.randn(1, 24, 16)).shape == (1, 24, 16)
    with pytest.raises(ShapeError, match="at most groups=3 groups of 8 positions fit, got 4"):
        backbone(torch.randn(1, 25, 16))
    if causal:
        state = backbone.init_state(1, 100)
        with torch.no_grad():
            backbone.step(torch.randn(1, 24, 16), state)
            with pytest.raises(ShapeError, match="got 4"):
                backbone.step(torch.randn(1, 1, 16), state)


@pytest.mark.parametrize("grid", [(5, 7), (3, 4, 5), (9,)])
def test_what_is_padded_changes_nothing(grid):
    """A masked margin, with groups that are all padding, against the grid without it; no NaN anywhere."""
    backbone = build("fit_test", causal=False, group_size=4)
    x = torch.randn(2, *grid, 16)
    big = 100 * torch.randn(2, *(side + 8 for side in grid), 16)
    mask = torch.zeros(big.shape[:-1], dtype=torch.bool)
    inner = (slice(None), *(slice(0, side) for side in grid))
    big[inner], mask[inner] = x, True
    big.requires_grad_()
    y = backbone(big, mask)
    torch.testing.assert_close(y[inner], backbone(x), atol=1e-5, rtol=1e-5)
    y[mask].pow(2).sum().backward()
    assert bool(big.grad.isfinite().all())
    assert not big.grad[~mask].any()
    assert all(p.grad.isfinite().all() for p in backbone.parameters())


@pytest.mark.parametrize("causal", [True, False])
def test_no_real_position_at_all_gives_no_nan(causal):
    backbone = build("fit_test", causal=causal)
    x = torch.randn(2, 30, 16, requires_grad=True)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[1] = False
    backbone(x, mask).pow(2).sum().backward()
    assert bool(x.grad.isfinite().all())


@pytest.mark.parametrize("positions", ["learned", "sin_cos", "none"])
@pytest.mark.parametrize("groups", [0, 12])
def test_causal_to_the_position_at_every_place(positions, groups):
    backbone = build("fit_test", x_positions=positions, groups=groups, layers="(1)2(1)1(1)", cross_mlp=True)
    x = torch.randn(1, 90, 16, requires_grad=True)
    y = backbone(x)
    for at in (0, 7, 8, 15, 40, 63, 64, 89):
        (grad,) = torch.autograd.grad(y[0, at].pow(2).sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(-1) > 0
        assert reached.tolist() == [i <= at for i in range(90)]
    state = backbone.init_state(1, 90)
    with torch.no_grad():
        steps = torch.cat([backbone.step(x[:, t : t + 1], state) for t in range(90)], 1)
    torch.testing.assert_close(steps, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{"x_self_attention": False}, {"kv_norm": False}, {"layers": "(0)1(0)"}])
@torch.no_grad()
def test_options_decode_too(options):
    backbone = build("fit_test", **options)
    x = torch.randn(3, 45, 16)
    state = backbone.init_state(3, 45)
    parts = [backbone.step(part, state) for part in x.split([20, 1, 1, 1, 9, 1, 12], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), backbone(x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_states_hold_a_group_and_refuse_too_many_positions():
    backbone = build("fit_test")
    state = backbone.init_state(1, 20)
    backbone.step(torch.randn(1, 20, 16), state)
    saved = state.state_dict()
    small = backbone.init_state(1, 19)
    with pytest.raises(
        LoadError, match="20 positions do not fit in a state made for max_len=19; make it with a larger"
    ):
        small.load_state_dict(saved)
    with pytest.raises(
        ShapeError, match="21 positions do not fit in a state made for max_len=20; make it with a larger"
    ):
        backbone.step(torch.randn(1, 1, 16), state)
    with pytest.raises(ShapeError, match=r"x must be \(1, T, 16\), got \(2, 1, 16\)"):
        backbone.step(torch.randn(2, 1, 16), state)
    with pytest.raises(ShapeError, match="padding must stand on the left"):
        backbone.step(torch.randn(1, 2, 16), backbone.init_state(1, 9), torch.tensor([[True, False]]))
    with pytest.raises(ConfigError, match="must come from this backbone's init_state"):
        backbone.step(torch.randn(1, 1, 16), create_backbone("illama_test").init_state(1, 3))
    long = backbone.init_state(1, 10_000)
    backbone.step(torch.randn(1, 4000, 16), long)
    assert long.nbytes < 4000 * 16 * 4  # two latents a group of eight positions, keys and values


def test_context_and_added_latents_change_the_output():
    backbone = build("fit_test", causal=False, context=True)
    x = torch.randn(2, 20, 16)
    context, add = torch.randn(2, 3, 24), torch.randn(2, 1, 1, 24)
    y, z = backbone.with_latents(x, context=context, add=add)
    assert z.shape == (2, 3, 2, 24)
    y.pow(2).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())
    for other in ({"context": context}, {"add": add}, {}):
        assert not torch.allclose(backbone.with_latents(x, **other)[0], y)
    with pytest.raises(ConfigError, match=r"built with context=False; set context=true"):
        build("fit_test", causal=False).with_latents(x, context=context)


# ---------------------------------------------------------------- cost and memory


@pytest.mark.parametrize("piece", [None, 1, 20])
def test_recomputing_a_grid_with_a_mask_in_pieces_changes_nothing(piece):
    backbone = build("fit_test", causal=False, layers="(1)1(1)1(1)")
    x = torch.randn(2, 9, 11, 16, requires_grad=True)
    mask = torch.rand(2, 9, 11) > 0.3
    mask[0, 4:] = False

    def outcome():
        backbone.zero_grad()
        y = backbone(x, mask)[mask]
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x, retain_graph=True)
        y.pow(2).sum().backward()
        return [y, grad, *(p.grad.clone() for p in backbone.parameters())]

    whole = outcome()
    backbone.set_recompute(True, piece)
    torch.testing.assert_close(outcome(), whole, atol=2e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match="piece must be at least 1, got 0"):
        backbone.set_recompute(True, 0)


def flops(backbone, length):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.randn(1, length, backbone.config.dim))
    return counter.get_total_flops()


def test_cost_grows_almost_linearly():
    """Twice as long a sequence: nearly twice the work; four times as long with larger groups: below L^(4/3)."""
    fit, full = build("fit_test", causal=False, group_size=32), build("illama_test", causal=False)
    assert flops(fit, 4096) / flops(fit, 2048) < 2.3 < 3.5 < flops(full, 4096) / flops(full, 2048)
    grown = build("fit_test", causal=False, group_size=64)
    assert flops(grown, 16384) / flops(fit, 2048) < 8 ** (4 / 3)


def test_initial_weights_are_drawn_by_head_as_keras_does():
    torch.manual_seed(0)
    backbone = FITConfig(
        dim=512, layers="(1)1(1)", group_size=8, latents=2, latent_dim=512, num_heads=8, latent_heads=8
    ).build()
    block = backbone.core.layers[0]
    for module, bound in ((block.mixer.qkv, 0.0128), (block.mixer.proj, 0.0361), (block.mlp.fc1, 0.0484)):
        assert float(module.weight.detach().abs().max()) == pytest.approx(bound, rel=0.01)
        assert not module.bias.any()
    assert isinstance(backbone, FIT)
    assert isinstance(backbone.norm, nn.LayerNorm)
    assert float(backbone.latents.detach().std()) == pytest.approx(0.0176, rel=0.1)
