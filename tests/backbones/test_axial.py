"""Axial attention and the Axial Transformer: original numbers, what sees what, and decoding in rows."""

import json

import numpy as np
import pytest
import torch

from vertebra.backbones.axial import AxialConfig
from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.layers.axial import AxialAttention, angles_at, project
from vertebra.backbones.layers.masks import Layout
from vertebra.errors import ConfigError, LoadError, ShapeError


def build(name="axial_test", **changes):
    torch.manual_seed(0)
    backbone = create_backbone(name, **changes).eval()
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def dependencies(function, x):
    """Which outputs depend on which inputs, bool (outputs, inputs), for x (1, *grid, D)."""
    count = x[0, ..., 0].numel()
    jacobian = torch.autograd.functional.jacobian(lambda z: function(z).reshape(count, -1).pow(2).sum(-1), x)
    return jacobian.abs().reshape(count, count, -1).sum(-1) > 0


# ---------------------------------------------------------------- the original numbers


@pytest.mark.parametrize("kind", ["sum", "seq"])
def test_axial_attention_is_that_of_lucidrains(golden, kind):
    data = np.load(golden / "backbones" / f"lucidrains_axial_attention_{kind}.npz")
    config = json.loads(str(data["config"]))
    layer = AxialAttention(config["dim"], config["heads"], combine="sum" if config["sum_axial_out"] else "chain")
    state = {}
    for k in range(2):
        q, kv, out, bias = (
            torch.from_numpy(data[f"w/axial_attentions.{k}.fn.{name}"])
            for name in ("to_q.weight", "to_kv.weight", "to_out.weight", "to_out.bias")
        )
        state |= {f"attentions.{k}.qkv.weight": torch.cat([q, kv])}
        state |= {f"attentions.{k}.proj.weight": out, f"attentions.{k}.proj.bias": bias}
    layer.load_state_dict(state)
    y = layer(torch.from_numpy(data["in/x"]).movedim(1, -1)).movedim(-1, 1)
    torch.testing.assert_close(y, torch.from_numpy(data["out/y"]), atol=1e-5, rtol=0)


def test_attention_along_an_axis_takes_its_lines():
    """Against a loop over the lines of an index-like grid: a forgotten transpose would mix them."""
    layer = AxialAttention(8, 2, axes=3, combine="sum", qkv_bias=True)
    x = torch.randn(2, 3, 4, 5, 8)
    expected = torch.zeros_like(x)
    for axis in range(3):
        lines = x.movedim(axis + 1, -2)
        for at in np.ndindex(*lines.shape[:3]):
            layout = Layout(batch=1, length=lines.shape[-2], device=x.device)
            expected.movedim(axis + 1, -2)[at] += layer.attentions[axis](lines[at][None], layout)[0]
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeError, match=r"x must be \(B, 3 grid axes, D\), got \(2, 3, 8\)"):
        layer(x[:, :, 0, 0])


def test_swapped_axes_and_weights_give_the_transposed_output():
    layer, swapped = AxialAttention(8, 2), AxialAttention(8, 2)
    for k in range(2):
        swapped.attentions[k].load_state_dict(layer.attentions[1 - k].state_dict())
    x = torch.randn(2, 4, 7, 8)
    torch.testing.assert_close(swapped(x.transpose(1, 2)), layer(x).transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_projections_are_those_of_attention():
    backbone = build()
    attention = backbone.layers[0].attention
    x = torch.randn(2, 6, 16)
    expected = attention._project(x, torch.arange(6))
    torch.testing.assert_close(project(attention, x, angles_at(attention, torch.arange(6).expand(2, -1))), expected)


# ---------------------------------------------------------------- what sees what


@pytest.mark.parametrize("grid", [(23,), (4, 5), (2, 3, 4)])
@pytest.mark.parametrize("positions", ["rope", "none"])
def test_causal_sees_all_that_came_before_and_nothing_else(grid, positions):
    backbone = build(positions=positions)
    seen = dependencies(backbone, torch.randn(1, *grid, 16))
    assert torch.equal(seen, torch.ones_like(seen).tril())


def test_two_inputs_of_the_decoder():
    backbone = build()
    outer, inner = torch.randn(2, 1, 4, 5, 16)
    row, column = torch.arange(20) // 5, torch.arange(20) % 5
    above = row[:, None] > row
    left = (row[:, None] == row) & (column[:, None] >= column)
    assert torch.equal(dependencies(lambda z: backbone.decode(z, inner), outer), above)
    assert torch.equal(dependencies(lambda z: backbone.decode(outer, z), inner), left)
    torch.testing.assert_close(backbone.decode(inner, inner), backbone(inner), atol=0, rtol=0)
    with pytest.raises(ConfigError, match="causal=False"):
        build(causal=False).decode(outer, inner)


@pytest.mark.parametrize("grid", [(1,), (4,), (23,), (25,), (4, 7), (2, 3, 4)])
def test_bidirectional_sees_everything(grid):
    backbone = build(causal=False, depth=max(2, len(grid)))
    assert dependencies(backbone, torch.randn(1, *grid, 16)).all()


@pytest.mark.parametrize("combine", ["chain", "sum"])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_every_axis_in_a_layer(combine, axes):
    backbone = build(causal=False, combine=combine, axes=axes, depth=1 if combine == "chain" else axes)
    grid = (3, 4, 5)[:axes]
    x = torch.randn(2, *grid, 16)
    assert dependencies(backbone, x[:1]).all()
    backbone.train().set_recompute(True)
    backbone(x).sum().backward()
    if axes == 2:  # and a sequence, in rows
        sequence, mask = torch.randn(2, 13, 16), torch.ones(2, 13, dtype=torch.bool)
        mask[1, :6] = False
        y = backbone(sequence, mask)
        torch.testing.assert_close(y[1, 6:], backbone(sequence[1:, 6:])[0], atol=1e-5, rtol=1e-5)
    else:
        with pytest.raises(ShapeError, match=f"built for {axes} grid axes, got 2; build it with axes=2"):
            backbone(torch.randn(1, 3, 4, 16))


@pytest.mark.parametrize("causal", [True, False])
def test_padded_grids_are_as_if_alone(causal):
    backbone = build(causal=causal)
    x, mask = torch.randn(2, 5, 6, 16), torch.zeros(2, 5, 6, dtype=torch.bool)
    mask[0, :3, :4] = True
    mask[1, 2:, 1:] = True
    y = backbone(x, mask)
    torch.testing.assert_close(y[0, :3, :4], backbone(x[:1, :3, :4])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1, 2:, 1:], backbone(x[1:, 2:, 1:])[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ShapeError, match="segments are for sequences"):
        backbone(x, segments=torch.zeros(2, 30, dtype=torch.long))


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize("prompt", [1, 4, 5, 11, 20])
def test_rows_of_a_grid_decode_as_the_grid(prompt):
    backbone = build(depth=6, inner_depth=2)
    x = torch.randn(2, 4, 7, 16)
    whole, flat = backbone(x).flatten(1, 2), x.flatten(1, 2)
    state = backbone.init_state(2, 28, row=7)
    with torch.no_grad():
        parts = [backbone.step(flat[:, :prompt], state)]
        parts += [backbone.step(flat[:, t : t + 1], state) for t in range(prompt, 28)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


def test_items_at_different_places_go_on_one_by_one_and_many_at_a_time():
    backbone = build()
    x, mask = torch.randn(3, 40, 16), torch.ones(3, 16, dtype=torch.bool)
    mask[1, :9], mask[2, :4] = False, False
    state = backbone.init_state(3, 40)
    with torch.no_grad():
        parts = [backbone.step(x[:, :16], state, mask)]
        for start, stop in ((16, 17), (17, 29), (29, 30), (30, 31), (31, 40)):
            parts.append(backbone.step(x[:, start:stop], state))
    y = torch.cat(parts, 1)
    for i, skipped in enumerate((0, 9, 4)):
        torch.testing.assert_close(y[i, skipped:], backbone(x[i : i + 1, skipped:])[0], atol=1e-5, rtol=1e-5)


def test_rows_read_at_once_are_rows_stepped_through():
    backbone = build()
    x = torch.randn(2, 4, 5, 16)
    states = [backbone.init_state(2, 20) for _ in range(2)]
    with torch.no_grad():
        backbone.step(x[:, :3].flatten(1, 2), states[0])
        backbone.read_rows(x[:, :3], states[1])
        a, b = (backbone.step(x[:, 3], state) for state in states)
    torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_the_outer_stack_runs_once_a_row(monkeypatch):
    backbone = build()
    calls = []
    run = backbone._outer_rows
    monkeypatch.setattr(backbone, "_outer_rows", lambda *args: calls.append(args[0].shape) or run(*args))
    state = backbone.init_state(1, 23)
    with torch.no_grad():
        for _ in range(23):
            backbone.step(torch.randn(1, 1, 16), state)
    assert calls == [(1, 1, 5, 16)] * 4
    assert state.growth == "rows"


def test_a_full_state_refuses_more():
    backbone = build()
    state = backbone.init_state(1, 7)
    with torch.no_grad():
        backbone.step(torch.randn(1, 7, 16), state)
        for count in (1, 2):
            with pytest.raises(ShapeError, match=rf"step: {7 + count} positions do not fit .* max_len=7; make it with"):
                backbone.step(torch.randn(1, count, 16), state)
        saved = state.state_dict()
        with pytest.raises(LoadError, match="7 positions do not fit in a state made for max_len=6"):
            backbone.init_state(1, 6).load_state_dict(saved)
        with pytest.raises(ShapeError, match=r"x must be \(1, T, 16\)"):
            backbone.step(torch.randn(2, 1, 16), state)
        with pytest.raises(ShapeError, match="padding must stand on the left"):
            backbone.step(torch.randn(1, 2, 16), state, torch.tensor([[True, False]]))
        with pytest.raises(ConfigError, match="must come from this backbone's init_state"):
            backbone.step(torch.randn(1, 1, 16), create_backbone("illama_test").init_state(1, 4))


# ---------------------------------------------------------------- config and weights


def test_settings_say_what_is_wrong():
    for changes, text in (
        ({"num_heads": 3}, r"dim \(16\) must be an even multiple of num_heads \(3\)"),
        ({"num_heads": 16}, "even multiple"),
        ({"inner_depth": 2}, r"even number of outer ones, got 2 and 1; change inner_depth \(2\) or depth \(3\)"),
        ({"depth": 2, "inner_depth": 0}, "got 0 and 2"),
        ({"combine": "sum"}, "combine 'sum' sees all positions; set causal=False"),
        ({"combine": "mean"}, "combine must be alternate, chain, sum, got 'mean'"),
        ({"row": 0}, "row must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            resolve("axial_test", **changes)
    with pytest.raises(ConfigError, match="piece must be at least 1"):
        build().set_recompute(True, piece=0)


def test_the_depth_alone_may_be_changed():
    for depth, outer in ((3, 2), (4, 2), (6, 4), (8, 4), (16, 8)):
        assert resolve("axial_test", depth=depth, inner_depth=0).outer_depth == outer


def test_the_encoder_of_a_decoder():
    encoder = resolve("axial_imagenet32").encoder()
    assert (encoder.depth, encoder.causal, encoder.final_norm) == (8, False, False)
    assert encoder.encoder() == encoder
    assert resolve("illama_test").encoder() == resolve("illama_test", causal=False)


def test_layers_of_the_paper_begin_as_the_identity():
    config = AxialConfig(dim=64, depth=4, num_heads=4, row=8, causal=False, final_norm=False, res_init_scale=1e-10)
    backbone = config.build()
    x = torch.randn(2, 8, 8, 64)
    torch.testing.assert_close(backbone(x), x, atol=1e-3, rtol=0)
    assert backbone.layers[0].attention.qkv.weight.var().item() == pytest.approx(1 / 64, rel=0.05)
    assert backbone.layers[0].mlp.fc2.weight.var().item() == pytest.approx(1e-10 / 256, rel=0.05)
