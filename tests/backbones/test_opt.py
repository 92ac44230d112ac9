"""OPT: both norm forms, learned positions, and the numbers of transformers."""

import pytest
import torch
from torch import nn

from vertebra.backbones.base import Taps, create_backbone
from vertebra.backbones.decoding import load_state, save_state
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.opt import OFFSET, OPT, OPTConfig, load_opt, places, transformers_names
from vertebra.errors import ConfigError, LoadError, ShapeError

both_forms = pytest.mark.parametrize("norm_first", [True, False])
SHAPE = {"dim": 32, "depth": 3, "heads": 4, "hidden": 48, "max_length": 40}


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def build(**changes):
    torch.manual_seed(0)
    return shaken(OPTConfig(**{**SHAPE, **changes}).build())


def layout(mask=None, segments=None):
    given = mask if mask is not None else segments
    return Layout(batch=len(given), length=given.shape[1], device=given.device, mask=mask, segments=segments)


# ---------------------------------------------------------------- forms


@both_forms
def test_a_layer_by_hand(norm_first):
    backbone = build(norm_first=norm_first, depth=1)
    x, block = torch.randn(2, 9, 32), backbone.layers[0]
    attend = Layout(batch=2, length=9, device=x.device, causal=True)
    h = x + backbone.positions.weight[OFFSET : OFFSET + 9]
    if norm_first:
        h = h + block.mixer(block.norm1(h), attend)
        expected = backbone.norm(h + block.mlp(block.norm2(h)))
    else:
        h = block.norm1(h + block.mixer(h, attend))
        expected = block.norm2(h + block.mlp(h))
    torch.testing.assert_close(backbone(x), expected)
    assert isinstance(backbone.norm, nn.LayerNorm if norm_first else nn.Identity)


@both_forms
def test_steps_of_both_forms_equal_forward(norm_first):
    backbone, x = build(norm_first=norm_first), torch.randn(2, 30, 32)
    taps = Taps(inside={1: torch.tanh}, after={0: torch.sin})
    state = backbone.init_state(2, 30)
    with torch.no_grad():
        parts = [backbone.step(part, state, taps=taps) for part in x.split([5, 1, 7, *[1] * 17], dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), backbone(x, taps=taps), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(backbone.read_last(x), backbone(x)[:, -1], atol=1e-5, rtol=1e-5)


@both_forms
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_one_position_at_a_time_takes_the_short_way_with_the_same_numbers(norm_first, activation, monkeypatch):
    backbone, x = build(norm_first=norm_first, activation=activation), torch.randn(3, 12, 32)
    short, long = backbone.init_state(3, 12), backbone.init_state(3, 12)
    long.weights, taken = None, []
    monkeypatch.setattr(OPT, "_step_one", lambda *a, real=OPT._step_one: taken.append(1) or real(*a))
    with torch.no_grad():
        for state in (short, long):
            backbone.step(x[:, :5], state)
        for t in range(5, 12):
            a, b = (backbone.step(x[:, t : t + 1], state) for state in (short, long))
            torch.testing.assert_close(a, b, atol=0, rtol=0)
        assert len(taken) == 7
        kept = short.select(torch.tensor([2, 0]))
        with pytest.raises(ShapeError, match="do not fit in a state made for max_len=12"):
            backbone.step(x[[2, 0], :1], kept)
    assert len(taken) == 8


@pytest.mark.parametrize("change", ["hook", "adapter", "training", "padding", "tap"])
def test_what_the_short_way_would_miss_takes_the_long_one(change, monkeypatch):
    backbone, x = build(dropout=0.5), torch.randn(2, 6, 32)
    fc1, taps = backbone.layers[1].mlp.fc1, None
    if change == "hook":
        fc1.register_forward_hook(lambda module, given, y: 2 * y)
    if change == "adapter":
        backbone.layers[1].mlp.fc1 = nn.Sequential(fc1, nn.Tanh())
    if change == "tap":
        taps = Taps(after={0: torch.sin})
    backbone.train(change == "training")
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]).bool() if change == "padding" else None
    state = backbone.init_state(2, 6)
    monkeypatch.setattr(OPT, "_step_one", lambda *a: pytest.fail("the short way was taken"))
    with torch.no_grad():
        backbone.step(x[:, :5], state, mask, taps)
        y = backbone.step(x[:, 5:], state, taps=taps)
        if change != "training":
            whole = None if mask is None else torch.cat([mask, mask[:, -1:]], 1)
            torch.testing.assert_close(y, backbone(x, whole, taps=taps)[:, 5:], atol=1e-5, rtol=1e-5)


def test_the_inner_tap_stands_before_the_closing_norm():
    backbone, hidden = build(norm_first=False, depth=1), []
    backbone(torch.randn(2, 5, 32), hidden=hidden, taps=Taps(inside={0: lambda h: 7 * h}))
    block, scaled = backbone.layers[0], []
    backbone(torch.randn(2, 5, 32), taps=Taps(inside={0: lambda h: scaled.append(h) or h}))
    assert not torch.allclose(scaled[0], block.norm2(scaled[0]))
    normed = (hidden[0] - block.norm2.bias) / block.norm2.weight
    torch.testing.assert_close(normed.std(-1, correction=0), torch.ones(2, 5), atol=1e-3, rtol=1e-3)


def test_activation_changes_the_numbers():
    x, outputs = torch.randn(1, 6, 32), []
    for activation in ("relu", "gelu"):
        outputs.append(build(activation=activation)(x))
    assert not torch.allclose(*outputs)


# ---------------------------------------------------------------- positions


def test_places_count_real_positions_of_the_own_sequence():
    mask = torch.tensor([[0, 0, 1, 1, 1, 0], [1, 1, 0, 1, 1, 1]]).bool()
    assert places(layout(mask)).tolist() == [[-1, -1, 0, 1, 2, -1], [0, 1, -1, 2, 3, 4]]
    segments = torch.tensor([[4, 4, 7, 7, 7, 4], [0, 0, 0, 0, 1, 1]])
    assert places(layout(segments=segments)).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 0, 1]]
    assert places(layout(mask, segments)).tolist() == [[-1, -1, 0, 1, 2, -1], [0, 1, -1, 2, 0, 1]]
    assert places(Layout(batch=1, length=3, device=mask.device)) is None


def test_padding_in_several_pieces_of_a_prompt_does_not_advance():
    backbone, x = build(), torch.randn(3, 20, 32)
    mask = torch.ones(3, 20, dtype=torch.bool)
    mask[0, :9] = mask[1, :3] = False
    state = backbone.init_state(3, 20)
    cuts = [(0, 4), (4, 8), (8, 12)]
    with torch.no_grad():
        parts = [backbone.step(x[:, a:b], state, mask[:, a:b]) for a, b in cuts]
        kept = state.select(torch.tensor([0, 2]))
        parts += [backbone.step(x[:, t : t + 1], state) for t in range(12, 20)]
        later = torch.cat([backbone.step(x[[0, 2], t : t + 1], kept) for t in range(12, 20)], 1)
    y = torch.cat(parts, 1)
    for item, start in enumerate((9, 3, 0)):
        alone = backbone(x[item : item + 1, start:])[0]
        torch.testing.assert_close(y[item, start:], alone, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(later, y[[0, 2], 12:], atol=1e-5, rtol=1e-5)
    assert state.real.tolist() == [11, 17, 20]


@pytest.mark.parametrize("padded", [True, False])
def test_a_saved_state_goes_on(tmp_path, padded):
    backbone, x = build(), torch.randn(2, 12, 32)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = not padded
    state = backbone.init_state(2, 12)
    with torch.no_grad():
        backbone.step(x[:, :8], state, mask if padded else None)
        save_state(state, tmp_path / "state")
        again = load_state(backbone, tmp_path / "state", 12)
        torch.testing.assert_close(backbone.step(x[:, 8:], again), backbone.step(x[:, 8:], state))
    assert (again.real is not None) == padded
    assert again.count == 12


def test_too_long_a_sequence_is_refused():
    backbone = build(max_length=6)
    with pytest.raises(ShapeError, match="a sequence of 7 positions is longer than the 6 learned ones; build the back"):
        backbone(torch.randn(1, 7, 32))
    with pytest.raises(ConfigError, match="max_len=7 is beyond the 6 learned positions; build the backbone with"):
        backbone.init_state(1, 7)
    x, segments = torch.randn(1, 8, 32), torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])
    assert backbone(x, segments=segments).shape == x.shape
    assert backbone(x, torch.arange(8)[None] > 1).shape == x.shape
    with pytest.raises(ShapeError, match="a sequence of 7 positions"):
        backbone(x, torch.arange(8)[None] > 0)
    state = backbone.init_state(1, 6)
    backbone.step(x[:, :6], state)
    with pytest.raises(ShapeError, match="a sequence of 7 positions"):
        backbone.step(x[:, 6:7], state)
    assert build(max_length=6, positions="none")(x).shape == x.shape
    assert build(max_length=6, positions="none").init_state(1, 99).batch_size == 1


def test_positions_are_spared_weight_decay_and_count_as_the_first_layer():
    backbone = build()
    assert backbone.no_weight_decay() == {"positions.weight"}
    assert backbone.layer_of("positions.weight") == 0
    assert backbone.layer_of("layers.2.norm1.weight") == 2
    assert backbone.layer_of("norm.weight") == 3
    assert build(positions="none").no_weight_decay() == set()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"heads": 5}, r"dim \(32\) must be a multiple of heads \(5\)"),
        ({"heads": 0}, r"dim \(32\) must be a multiple of heads \(0\)"),
        ({"hidden": 0}, "hidden must be at least 1, got 0"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"activation": "tanh"}, "activation must be relu or gelu, got 'tanh'"),
        ({"positions": "sinusoid"}, "positions must be learned or none, got 'sinusoid'"),
    ],
)
def test_settings_say_what_is_wrong(changes, text):
    with pytest.raises(ConfigError, match=text):
        OPTConfig(**{**SHAPE, **changes})


# ---------------------------------------------------------------- weights


def checkpoint(backbone, prefix=""):
    """What transformers would save."""
    found, state = {}, backbone.state_dict()
    for ours, theirs in transformers_names(backbone.config).items():
        found |= {prefix + n: part.clone() for n, part in zip(theirs, state[ours].chunk(len(theirs)), strict=True)}
    return found


@both_forms
def test_weights_under_the_names_of_transformers(norm_first):
    backbone = build(norm_first=norm_first)
    tensors = checkpoint(backbone, "model.decoder.")
    others = {"model.decoder.embed_tokens.weight": torch.ones(3, 32), "lm_head.weight": torch.ones(3, 32)}
    other = OPTConfig(**SHAPE, norm_first=norm_first).build().eval()
    assert load_opt(other, {**tensors, **others}, "model.decoder.") == set(tensors)
    x = torch.randn(2, 11, 32)
    torch.testing.assert_close(other(x), backbone(x), atol=0, rtol=0)
    assert ("model.decoder.final_layer_norm.weight" in tensors) == norm_first
    assert set(transformers_names(backbone.config)) == set(backbone.state_dict())
    assert "model.decoder.layers.2.self_attn.k_proj.bias" in tensors


def test_checkpoints_that_do_not_fit_are_refused():
    backbone = build(norm_first=False)
    before, tensors = backbone.state_dict(), checkpoint(backbone)
    before = {k: v.clone() for k, v in before.items()}
    with pytest.raises(
        LoadError, match=r"lacks decoder.embed_positions.weight, .* and 46 more; is the prefix 'decoder.'"
    ):
        load_opt(backbone, tensors, "decoder.")
    with pytest.raises(
        LoadError, match=r"no place for layers.2.fc1.bias, layers.2.fc1.weight, layers.2.fc2.bias and 13"
    ):
        load_opt(build(norm_first=False, depth=2), tensors)
    with pytest.raises(LoadError, match=r"no place for embed_positions.weight; change its config"):
        load_opt(build(norm_first=False, positions="none"), tensors)
    with pytest.raises(LoadError, match=r"lacks final_layer_norm.bias, final_layer_norm.weight; is the prefix"):
        load_opt(build(norm_first=True), tensors)
    with pytest.raises(LoadError, match=r"positions.weight \(42, 32\) -> \(32, 32\). Nothing was loaded"):
        load_opt(build(norm_first=False, max_length=30), tensors)
    with pytest.raises(ConfigError, match="BERT's encoder is norm_first=False and positions='none'"):
        transformers_names(backbone.config, "bert")
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items())


# ---------------------------------------------------------------- parity


def opt_pair(norm_first):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.OPTConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        ffn_dim=48,
        max_position_embeddings=40,
        word_embed_proj_dim=32,
        vocab_size=11,
        do_layer_norm_before=norm_first,
        dropout=0.0,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    peer = shaken(transformers.OPTForCausalLM(config))
    ours = OPTConfig(**SHAPE, norm_first=norm_first).build().eval()
    used = load_opt(ours, peer.state_dict(), "model.decoder.")
    assert set(peer.state_dict()) - used == {"model.decoder.embed_tokens.weight", "lm_head.weight"}
    return ours, peer


def assert_same_gradients(ours, theirs, prefix, naming="opt"):
    """Every gradient of ours against those of the peer."""
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    names = transformers_names(ours.config, naming)
    for name, parameter in ours.named_parameters():
        expected = torch.cat([grads[prefix + n] for n in names[name]])
        torch.testing.assert_close(parameter.grad, expected, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.bench
@both_forms
@pytest.mark.parametrize("padded", [True, False])
def test_opt_outputs_and_gradients_equal_transformers(norm_first, padded):
    ours, peer = opt_pair(norm_first)
    mask = torch.ones(3, 21, dtype=torch.bool)
    if padded:
        mask[0, :6] = mask[2, :15] = False
    x, weight = torch.randn(3, 21, 32), torch.randn(3, 21, 32) / 50
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = ours(a, mask if padded else None)
    expected = peer.model(inputs_embeds=b, attention_mask=mask.long() if padded else None).last_hidden_state
    torch.testing.assert_close(y[mask], expected[mask], atol=1e-5, rtol=1e-5)
    (y * weight)[mask].sum().backward()
    (expected * weight)[mask].sum().backward()
    torch.testing.assert_close(a.grad[mask], b.grad[mask], atol=1e-5, rtol=1e-5)
    assert_same_gradients(ours, peer, "model.decoder.")


@pytest.mark.bench
@both_forms
def test_opt_steps_equal_transformers_steps(norm_first):
    ours, peer = opt_pair(norm_first)
    x, mask = torch.randn(2, 18, 32), torch.ones(2, 18, dtype=torch.bool)
    mask[1, :7] = False
    state, cache = ours.init_state(2, 18), None
    with torch.no_grad():
        for start, stop in ((0, 10), *((t, t + 1) for t in range(10, 18))):
            y = ours.step(x[:, start:stop], state, mask[:, :10] if start == 0 else None)
            out = peer.model(
                inputs_embeds=x[:, start:stop],
                attention_mask=mask[:, :stop].long(),
                past_key_values=cache,
                use_cache=True,
            )
            cache, real = out.past_key_values, mask[:, start:stop]
            torch.testing.assert_close(y[real], out.last_hidden_state[real], atol=1e-5, rtol=1e-5)


@pytest.mark.bench
def test_bert_layers_equal_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=48,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        vocab_size=5,
    )
    peer = shaken(transformers.BertModel(config, add_pooling_layer=False)).encoder
    options = {"causal": False, "activation": "gelu", "norm_first": False, "positions": "none", "norm_eps": 1e-12}
    ours = OPTConfig(**{**SHAPE, **options}).build().eval()
    assert load_opt(ours, peer.state_dict(), naming="bert") == set(peer.state_dict())
    x, mask = torch.randn(2, 13, 32), torch.ones(2, 13, dtype=torch.bool)
    mask[1, 8:] = False
    seen = mask[:, None, None].expand(2, 1, 13, 13)
    y, expected = ours(x, mask), peer(x, attention_mask=seen).last_hidden_state
    torch.testing.assert_close(y[mask], expected[mask], atol=1e-5, rtol=1e-5)
    weight = torch.randn(2, 13, 32) / 50
    (y * weight)[mask].sum().backward()
    (expected * weight)[mask].sum().backward()
    assert_same_gradients(ours, peer, "", "bert")


@pytest.mark.bench
def test_the_presets_have_the_published_sizes():
    transformers = pytest.importorskip("transformers")
    for name, ours in (("opt_125m", {}), ("opt_350m", {"do_layer_norm_before": False})):
        with torch.device("meta"):
            backbone = create_backbone(name)
            config = backbone.config
            peer = transformers.OPTModel(
                transformers.OPTConfig(
                    hidden_size=config.dim,
                    num_hidden_layers=config.depth,
                    num_attention_heads=config.heads,
                    ffn_dim=config.hidden,
                    word_embed_proj_dim=config.dim,
                    max_position_embeddings=config.max_length,
                    **ours,
                )
            )
        theirs = sum(p.numel() for n, p in peer.named_parameters() if "embed_tokens" not in n)
        assert sum(p.numel() for p in backbone.parameters()) == theirs
