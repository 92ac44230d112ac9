"""What every backbone must do; a new preset named *_test is covered by being registered."""

import copy

import pytest
import torch
from torch import nn

from vertebra.backbones.base import BackboneConfig, Taps, create_backbone, resolve, split_name
from vertebra.backbones.catalog import families, presets
from vertebra.backbones.layers import recompute
from vertebra.errors import ConfigError, ShapeError, UnknownNameError

TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
FORMS = [(name, causal) for name in TEST_PRESETS for causal in (True, False)]
every_form = pytest.mark.parametrize(("name", "causal"), FORMS)
every_preset = pytest.mark.parametrize("name", TEST_PRESETS)


def build(name, causal):
    torch.manual_seed(0)
    backbone = create_backbone(name, causal=causal).eval()
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


def test_every_family_has_a_test_preset():
    assert {presets()[name].family for name in TEST_PRESETS} == set(families())


@every_form
@pytest.mark.parametrize("grid", [(1,), (63,), (5, 7), (2, 3, 4)])
def test_shape_and_dtype_are_kept(name, causal, grid):
    backbone = build(name, causal)
    x = torch.randn(2, *grid, backbone.config.dim)
    hidden = []
    y = backbone(x, hidden=hidden)
    assert y.shape == x.shape
    assert y.dtype == x.dtype
    assert [h.shape for h in hidden] == [x.shape] * backbone.num_layers


@every_form
def test_padding_does_not_leak(name, causal):
    backbone = build(name, causal)
    x = torch.randn(3, 21, backbone.config.dim)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[0, 13:] = False  # right
    mask[1, :6] = False  # left
    noisy = torch.where(mask[..., None], x, 100 * torch.randn_like(x))
    y, noisy_y = backbone(x, mask), backbone(noisy, mask)
    torch.testing.assert_close(y[mask], noisy_y[mask])
    torch.testing.assert_close(y[0, :13], backbone(x[:1, :13])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1, 6:], backbone(x[1:2, 6:])[0], atol=1e-5, rtol=1e-5)


@every_preset
def test_causal_output_ignores_the_future(name):
    backbone = build(name, True)
    x = torch.randn(1, 40, backbone.config.dim)
    for cut in (1, 17, 39):
        changed = x.clone()
        changed[:, cut:] += torch.randn_like(changed[:, cut:])
        torch.testing.assert_close(backbone(x)[:, :cut], backbone(changed)[:, :cut], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(backbone(x)[:, cut:], backbone(changed)[:, cut:])


@every_preset
def test_bidirectional_output_sees_both_sides(name):
    backbone = build(name, False)
    x = torch.randn(1, 20, backbone.config.dim, requires_grad=True)
    backbone(x)[0, 10].pow(2).sum().backward()
    assert (x.grad[0].abs().sum(-1) > 0).all()


@every_form
def test_reading_the_last_position_alone(name, causal):
    backbone = build(name, causal)
    x = torch.randn(2, 37, backbone.config.dim)
    torch.testing.assert_close(backbone.read_last(x), backbone(x)[:, -1], atol=1e-5, rtol=1e-5)


@every_form
def test_packed_sequences_are_as_if_alone(name, causal):
    backbone = build(name, causal)
    lengths = [1, 9, 70, 3, 1]
    x = torch.randn(1, sum(lengths), backbone.config.dim)
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    y = backbone(x, segments=segments)
    alone = torch.cat([backbone(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(y, alone, atol=1e-5, rtol=1e-5)


@every_form
def test_gradient_reaches_every_parameter(name, causal):
    backbone = build(name, causal)
    backbone(torch.randn(2, 33, backbone.config.dim)).pow(2).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_form
@pytest.mark.parametrize("kind", ["plain", "padded", "packed"])
def test_pieces_change_nothing(name, causal, kind):
    """Long sequences are read in pieces, with carried state; in training they are recomputed."""
    backbone = build(name, causal)
    x = torch.randn(2, 50, backbone.config.dim, requires_grad=True)
    options = {}
    if kind == "padded":
        options["mask"] = torch.ones(2, 50, dtype=torch.bool)
        options["mask"][0, :13] = options["mask"][1, 40:] = False
    elif kind == "packed":
        options["segments"] = (torch.arange(50) > torch.tensor([[16], [30]])).long() + (torch.arange(50) > 33)
    real = options.get("mask", torch.ones(2, 50, dtype=torch.bool))

    def outcome():
        backbone.zero_grad()
        y = backbone(x, **options)[real]
        (grad,) = torch.autograd.grad(y.pow(2).sum(), x, retain_graph=True)
        y.pow(2).sum().backward()
        return [y, grad, *(p.grad.clone() for p in backbone.parameters())]

    whole = outcome()
    backbone.set_recompute(True, piece=17)
    torch.testing.assert_close(outcome(), whole, atol=2e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x, **options)[real], whole[0], atol=1e-5, rtol=1e-5)


@every_preset
def test_recompute_keeps_dropout_and_skipped_branches(name, monkeypatch):
    backbone = build(f"{name},dropout=0.3,drop_path=0.5", True).train()
    x = torch.randn(3, 40, backbone.config.dim)
    backbone.set_recompute(True, piece=11)
    torch.manual_seed(1)
    backbone(x).pow(2).sum().backward()
    grads = [p.grad.clone() for p in backbone.parameters()]
    monkeypatch.setattr(recompute, "again", lambda run, *args, training: run(*args))  # the same draws, kept
    backbone.zero_grad()
    torch.manual_seed(1)
    backbone(x).pow(2).sum().backward()
    torch.testing.assert_close([p.grad for p in backbone.parameters()], grads, atol=1e-5, rtol=1e-5)


@every_preset
@pytest.mark.parametrize("prompt", [1, 2, 37])
def test_step_equals_forward(name, prompt):
    backbone = build(name, True)
    x = torch.randn(2, 50, backbone.config.dim)
    whole = backbone(x)
    state = backbone.init_state(2, 50)
    with torch.no_grad():
        parts = [backbone.step(x[:, :prompt], state)]
        parts += [backbone.step(x[:, prompt : prompt + 5], state)]
        parts += [backbone.step(x[:, t : t + 1], state) for t in range(prompt + 5, 50)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@every_preset
def test_left_padded_prompts_decode_as_if_alone(name):
    backbone = build(name, True)
    x = torch.randn(2, 24, backbone.config.dim)
    mask = torch.ones(2, 24, dtype=torch.bool)
    mask[1, :9] = False
    state = backbone.init_state(2, 24)
    with torch.no_grad():
        parts = [backbone.step(x[:, :16], state, mask[:, :16])]
        parts += [backbone.step(x[:, t : t + 1], state) for t in range(16, 24)]
    y = torch.cat(parts, 1)
    torch.testing.assert_close(y[0], backbone(x[:1])[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(y[1, 9:], backbone(x[1:, 9:])[0], atol=1e-5, rtol=1e-5)


@every_preset
def test_state_selects_forks_and_tells_its_size(name):
    backbone = build(name, True)
    x = torch.randn(3, 12, backbone.config.dim)
    state = backbone.init_state(3, 12)
    with torch.no_grad():
        backbone.step(x[:, :8], state)
        fork = state.fork()
        picked = state.select(torch.tensor([2, 0, 2, 1]))
        after = backbone.step(x[:, 8:9], state)
        torch.testing.assert_close(backbone.step(x[[2, 0, 2, 1], 8:9], picked), after[[2, 0, 2, 1]])
        torch.testing.assert_close(backbone.step(x[:, 8:9], fork), after)
    assert picked.batch_size == 4
    assert state.nbytes > 0
    assert state.growth in ("constant", "ring", "rows", "groups", "linear")


@every_preset
def test_steps_beyond_max_len_or_of_a_bidirectional_backbone_are_refused(name):
    with pytest.raises(ConfigError, match="causal=False"):
        build(name, False).init_state(1, 4)


@every_form
def test_state_dict_round_trip(name, causal):
    backbone = build(name, causal)
    other = BackboneConfig.from_dict(backbone.config.to_dict()).build().eval()
    other.load_state_dict(backbone.state_dict())
    x = torch.randn(1, 9, backbone.config.dim)
    torch.testing.assert_close(other(x), backbone(x), atol=0, rtol=0)
    assert other.config == backbone.config


@every_form
def test_bf16_runs_and_stays_near(name, causal):
    backbone = build(name, causal)
    x = torch.randn(2, 40, backbone.config.dim)
    low = copy.deepcopy(backbone).bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(x)
    for y in (low, mixed):
        assert nn.functional.cosine_similarity(y.float(), backbone(x), dim=-1).mean() > 0.99


@every_form
def test_export(name, causal):
    backbone = build(name, causal)
    x = torch.randn(2, 70, backbone.config.dim)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[0, 60:] = False
    program = torch.export.export(backbone, (x, mask))
    torch.testing.assert_close(program.module()(x, mask), backbone(x, mask), atol=1e-5, rtol=1e-5)


@every_form
def test_one_batch_overfits(name, causal):
    torch.manual_seed(0)
    backbone = create_backbone(name, causal=causal)
    x, target = torch.randn(4, 16, backbone.config.dim), torch.randn(4, 16, backbone.config.dim)
    head = nn.Linear(backbone.config.dim, backbone.config.dim)
    optimizer = torch.optim.Adam([*backbone.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (head(backbone(x)) - target).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 4


@every_form
def test_same_seed_same_weights(name, causal):
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(create_backbone(name, causal=causal).state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


def taps_of(layers, tap):
    return Taps(inside=dict.fromkeys(layers, tap), after=dict.fromkeys(layers, tap))


@every_form
@pytest.mark.parametrize("kind", ["grid", "plain", "padded", "packed"])
def test_taps_that_change_nothing_change_nothing(name, causal, kind):
    backbone = build(name, causal)
    shape = (2, 5, 7) if kind == "grid" else (2, 33)
    x, options, seen = torch.randn(*shape, backbone.config.dim), {}, []
    if kind == "padded":
        options["mask"] = torch.ones(2, 33, dtype=torch.bool)
        options["mask"][0, :13] = options["mask"][1, 20:] = False
    elif kind == "packed":
        options["segments"] = (torch.arange(33) > torch.tensor([[16], [30]])).long() + (torch.arange(33) > 31)
    real = options.get("mask", torch.ones(shape, dtype=torch.bool))

    def keep(features):
        seen.append(features)
        return features

    plain, tapped = [], []
    y = backbone(x, **options, hidden=plain)
    tapped_y = backbone(x, **options, hidden=tapped, taps=taps_of(range(backbone.num_layers), keep))
    torch.testing.assert_close(tapped_y[real], y[real], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close([h[real] for h in tapped], [h[real] for h in plain], atol=1e-6, rtol=1e-6)
    assert [h.shape for h in seen] == [x.shape] * 2 * backbone.num_layers
    torch.testing.assert_close([h[real] for h in seen[1::2]], [h[real] for h in plain], atol=1e-6, rtol=1e-6)


@every_form
def test_what_a_tap_returns_goes_on(name, causal):
    backbone = build(name, causal)
    x, vector = torch.randn(2, 21, backbone.config.dim), torch.randn(backbone.config.dim, requires_grad=True)
    last = backbone.num_layers - 1
    y = backbone(x, taps=Taps(after={last: lambda h: vector.expand_as(h)}))
    torch.testing.assert_close(y, backbone.norm(vector).expand_as(y))
    plain, after, inside = [], [], []
    backbone(x, hidden=plain)
    y = backbone(x, hidden=after, taps=Taps(after={0: lambda h: h + vector}))
    backbone(x, hidden=inside, taps=Taps(inside={0: lambda h: h + vector}))
    torch.testing.assert_close(after[0], plain[0], atol=0, rtol=0)
    assert not torch.allclose(after[1], plain[1])
    assert not torch.allclose(inside[0], plain[0])
    y.pow(2).sum().backward()
    assert vector.grad.abs().sum() > 0


@every_preset
@pytest.mark.parametrize("prompt", [1, 17])
def test_steps_with_taps_equal_forward_with_taps(name, prompt):
    backbone = build(name, True)
    x, vector = torch.randn(2, 30, backbone.config.dim), torch.randn(backbone.config.dim)
    taps = taps_of(range(backbone.num_layers), lambda h: torch.tanh(h) + vector)
    whole, state = backbone(x, taps=taps), backbone.init_state(2, 30)
    if backbone.config.family == "axial":
        with pytest.raises(ConfigError, match=r"Axial.step: takes no taps, its outer layers run once a row"):
            backbone.step(x[:, :prompt], state, taps=taps)
        return
    with torch.no_grad():
        parts = [backbone.step(x[:, :prompt], state, taps=taps)]
        parts += [backbone.step(x[:, t : t + 1], state, taps=taps) for t in range(prompt, 30)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)


@every_form
def test_wrong_taps_are_named(name, causal):
    backbone = build(name, causal)
    x, layers = torch.randn(2, 5, backbone.config.dim), backbone.num_layers
    for index in (-1, layers):
        with pytest.raises(ConfigError, match=rf"taps.inside has a tap for layer {index}, but.* 0 to {layers - 1}"):
            backbone(x, taps=Taps(inside={index: lambda h: h}))
        with pytest.raises(ConfigError, match=rf"taps.after has a tap for layer {index}, but"):
            backbone(x, taps=Taps(after={index: lambda h: h}))
    with pytest.raises(ShapeError, match=r"tap after\[0\] must return the shape it gets, \(2, 5, .*got \(2, 4, "):
        backbone(x, taps=Taps(after={0: lambda h: h[:, 1:]}))


@every_preset
def test_wrong_shapes_are_named(name):
    backbone = create_backbone(name)
    dim = backbone.config.dim
    with pytest.raises(ShapeError, match=rf"x must be \(B, \*grid, {dim}\).*got \(2, 5, {dim + 1}\)"):
        backbone(torch.randn(2, 5, dim + 1))
    with pytest.raises(ShapeError, match=r"mask must be bool \(2, 5\)"):
        backbone(torch.randn(2, 5, dim), torch.ones(2, 5))


@pytest.mark.parametrize("name", list(presets()))
def test_preset_metadata_is_true(name):
    info = presets()[name]
    config = resolve(name)
    with torch.device("meta"):
        backbone = config.build()
    assert sum(p.numel() for p in backbone.parameters()) == info.params
    assert config.family == info.family
    assert info.summary
    assert {k: getattr(config, k) for k in info.fields} == info.fields


def test_a_word_with_fields_changes_the_config():
    assert split_name("illama_test,depth=6,causal=false") == ("illama_test", {"depth": 6, "causal": False})
    config = resolve("hybrid_test,pattern=A,depth=1")
    assert (config.layout, config.depth) == ("A", 1)
    with pytest.raises(ConfigError, match=r"no field 'dept'. Did you mean 'depth'\?"):
        resolve("illama_test,dept=6")
    with pytest.raises(ConfigError, match="'6' must be field=value"):
        resolve("illama_test,6")


def test_a_wrong_name_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match=r"unknown backbone 'ilama_test'\. Did you mean 'illama_test'"):
        resolve("ilama_test")
    with pytest.raises(UnknownNameError, match=r"local-dir:org/name \(a folder\)"):
        resolve("org/name")
