"""E-Branchformer against its definition in plain loops, and against ESPnet's numbers (tests/golden/speech)."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from vertebra.backbones.base import Taps, create_backbone
from vertebra.backbones.ebranchformer import EBranchformerConfig, KeyLayout, places
from vertebra.backbones.layers.depthwise import depthwise
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.positions import sinusoid
from vertebra.errors import ConfigError, LoadError, ShapeError

# ---------------------------------------------------------------- the slow twin, one sequence (T, D) at a time


def slow_conv(rows, conv, causal):
    taps = conv.weight[:, 0]  # (C, K)
    kernel = taps.shape[1]
    first = kernel - 1 if causal else kernel // 2
    out = []
    for t in range(len(rows)):
        y = conv.bias
        for k in range(kernel):
            if 0 <= t - first + k < len(rows):
                y = y + taps[:, k] * rows[t - first + k]
        out.append(y)
    return torch.stack(out)


def slow_attention(rows, attention, causal):
    heads, width = attention.num_heads, attention.head_dim
    q, k, v = (attention.qkv(rows).reshape(len(rows), 3, heads, width)[:, i] for i in range(3))
    out = []
    for t in range(len(rows)):
        seen = range(t + 1 if causal else len(rows))
        parts = []
        for h in range(heads):
            weights = torch.stack([q[t, h] @ k[s, h] / math.sqrt(width) for s in seen]).softmax(0)
            parts.append(sum(weights[i] * v[s, h] for i, s in enumerate(seen)))
        out.append(attention.proj(torch.cat(parts)))
    return torch.stack(out)


def slow_layer(rows, layer, causal):
    x = rows + 0.5 * layer.macaron.fc2(F.silu(layer.macaron.fc1(layer.norm_macaron(rows))))
    far = slow_attention(layer.norm_attention(x), layer.attention, causal)
    a, b = F.gelu(layer.local.fc1(layer.norm_local(x))).chunk(2, dim=-1)
    near = layer.local.fc2(a * slow_conv(layer.local.norm(b), layer.local.conv, causal))
    both = torch.cat([far, near], dim=-1)
    x = x + layer.merge(both + slow_conv(both, layer.merge_conv, causal))
    return layer.norm(x + 0.5 * layer.mlp.fc2(F.silu(layer.mlp.fc1(layer.norm_mlp(x)))))


def slow_backbone(rows, backbone):
    width = rows.shape[1]
    code = torch.empty(len(rows), width)
    for t in range(len(rows)):
        for c in range(width):
            angle = t / 10000 ** ((c - c % 2) / width)
            code[t, c] = math.cos(angle) if c % 2 else math.sin(angle)
    x = rows * math.sqrt(width) + code
    for layer in backbone.layers:
        x = slow_layer(x, layer, backbone.config.causal)
    return backbone.norm(x)


def build(name="ebranchformer_test", **changes):
    torch.manual_seed(0)
    backbone = create_backbone(name, **changes).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["plain", "padded", "packed", "packed and padded"])
def test_outputs_and_gradients_equal_plain_loops(causal, kind):
    backbone = build(causal=causal)
    x = torch.randn(2, 13, 16, requires_grad=True)
    mask, segments = torch.ones(2, 13, dtype=torch.bool), None
    if "padded" in kind:
        mask[0, 9:] = mask[1, :4] = False
    if "packed" in kind:
        segments = torch.tensor([[4] * 3 + [1] * 10, [0] * 5 + [1] * 1 + [2] * 7])
    ids = torch.zeros(2, 13, dtype=torch.long) if segments is None else segments
    weights = torch.randn(2, 13, 16)
    fast = backbone(x, mask if "padded" in kind else None, segments)
    slow = torch.zeros_like(fast)
    for b in range(2):
        for number in ids[b].unique():
            here = (ids[b] == number) & mask[b]
            if here.any():
                slow[b, here] = slow_backbone(x[b, here], backbone)
    torch.testing.assert_close(fast[mask], slow[mask], atol=2e-5, rtol=1e-4)
    wanted = [x, *backbone.parameters()]
    found = [torch.autograd.grad((y * weights)[mask].sum(), wanted) for y in (fast, slow)]
    torch.testing.assert_close(found[0], found[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("sides", [(0, 0), (2, 2), (4, 0)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_the_depthwise_convolution(sides, bias):
    conv = nn.Conv1d(6, 6, 5, groups=6, bias=bias).double()
    x = torch.randn(2, 9, 6, dtype=torch.double, requires_grad=True)
    weight = torch.randn(2, 5 + sum(sides), 6, dtype=torch.double)
    wanted = [x, *conv.parameters()]
    y = depthwise(x, conv, sides)
    plain = conv(F.pad(x.transpose(1, 2), sides)).transpose(1, 2)
    torch.testing.assert_close(y, plain)
    found = [torch.autograd.grad((z * weight).sum(), wanted) for z in (y, plain)]
    torch.testing.assert_close(found[0], found[1])


# ---------------------------------------------------------------- positions, padding, packing


def test_places_count_from_the_first_real_position():
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1], [1, 1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    segments = torch.tensor([[0, 0, 0, 0, 5, 5, 5], [1, 1, 2, 2, 2, 2, 0]])
    alone = Layout(2, 7, mask.device, mask=mask)
    assert places(alone).tolist() == [[0, 0, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]
    packed = Layout(2, 7, mask.device, segments=segments)
    assert places(packed).tolist() == [[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 3, 0]]
    both = Layout(2, 7, mask.device, mask=mask, segments=segments)
    assert places(both).tolist() == [[0, 0, 0, 1, 0, 0, 1], [0, 1, 0, 1, 2, 3, 0]]
    assert places(Layout(2, 4, mask.device)).tolist() == [[0, 1, 2, 3]]


def test_without_positions_the_input_goes_in_as_it_is():
    backbone = build(positions="none", causal=False)
    x = torch.randn(1, 7, 16)
    y = x[0]
    for layer in backbone.layers:
        y = slow_layer(y, layer, False)
    torch.testing.assert_close(backbone(x)[0], backbone.norm(y), atol=2e-5, rtol=1e-4)


def test_unmasked_convolutions_read_padding_but_nobody_attends_to_it():
    x, mask = torch.randn(1, 30, 16), torch.ones(1, 30, dtype=torch.bool)
    mask[0, 20:] = False
    noisy = torch.where(mask[..., None], x, torch.randn_like(x))
    backbone = build(causal=False, mask_conv=False)
    y, other = backbone(x, mask), backbone(noisy, mask)
    # Two layers of kernels 5 and 3 reach 2 * (2 + 1) positions; the attention carries it on from the second layer.
    assert not torch.allclose(y[0, 14:20], other[0, 14:20], atol=1e-4)
    layout = KeyLayout(1, 30, x.device, mask=mask)
    assert torch.equal(layout.dense()[0, 0], mask.expand(30, 30))
    torch.testing.assert_close(backbone(x), build(causal=False)(x), atol=0, rtol=0)  # no padding, no difference


def test_a_step_from_a_saved_state_goes_on():
    backbone = build()
    x = torch.randn(2, 12, 16)
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, :3] = False
    state, other = backbone.init_state(2, 12), backbone.init_state(2, 12)
    with torch.no_grad():
        backbone.step(x[:, :7], state, mask)
        saved = {name: t.clone() for name, t in state.state_dict().items()}
        other.load_state_dict(saved)
        torch.testing.assert_close(backbone.step(x[:, 7:], other), backbone.step(x[:, 7:], state), atol=0, rtol=0)
    assert state.position.tolist() == [12, 9]
    with pytest.raises(LoadError, match=r"state: gate must be .*was it of another backbone\?"):
        build(conv_kernel=7).init_state(2, 12).load_state_dict(saved)
    with pytest.raises(ShapeError, match="do not fit in a state made for max_len=12"):
        backbone.step(x[:, :1], state)


def test_steps_of_wrong_shapes_and_states_are_refused():
    backbone = build()
    state = backbone.init_state(2, 12)
    with pytest.raises(ShapeError, match=r"x must be \(2, T, 16\), got \(1, 3, 16\)"):
        backbone.step(torch.randn(1, 3, 16), state)
    with pytest.raises(ShapeError, match="padding must stand on the left"):
        backbone.step(torch.randn(2, 2, 16), state, torch.tensor([[True, False], [True, True]]))
    with pytest.raises(ConfigError, match="must come from this backbone's init_state"):
        backbone.step(torch.randn(2, 2, 16), create_backbone("illama_test").init_state(2, 12))
    with pytest.raises(ConfigError, match="piece must be at least 1, got 0"):
        backbone.set_recompute(True, 0)


# ---------------------------------------------------------------- structure


def test_the_gate_begins_open():
    layer = create_backbone("ebranchformer_test").layers[1]
    assert layer.local.conv.weight.abs().max() < 1e-4
    assert torch.equal(layer.local.conv.bias, torch.ones(12))


def test_size_of_owsm_ctc():
    with torch.device("meta"):
        backbone = create_backbone("ebranchformer_1b")
    assert sum(p.numel() for p in backbone.layers[0].parameters()) == 29_526_016
    assert sum(p.numel() for p in backbone.norm.parameters()) == 2 * 1024
    # The encoder of OWSM-CTC v3.1 less its front end, cross-attention of nine layers and conditioning layer.
    encoder, front, cross, conditioning = 914_536_448, 28_324_864, 9 * (33_726_464 - 29_526_016), 51_203_072
    assert sum(p.numel() for p in backbone.parameters()) == encoder - front - cross - conditioning


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"num_heads": 3}, r"dim \(16\) must be a multiple of num_heads \(3\)"),
        ({"cgmlp_dim": 25}, "cgmlp_dim an even number, got 24 and 25"),
        ({"conv_kernel": 4}, "conv_kernel must be an odd number, .*got 4"),
        ({"merge_kernel": 0}, "merge_kernel must be an odd number, .*got 0"),
        ({"positions": "rope"}, "positions must be sinusoid or none, got 'rope'"),
        ({"mask_conv": False}, "mask_conv=False is ESPnet's bidirectional form; set causal=False"),
    ],
)
def test_wrong_structures_are_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        create_backbone("ebranchformer_test", **changes)


# ---------------------------------------------------------------- ESPnet


RENAMED = {
    "attn.linear_out": "attention.proj",
    "cgmlp.channel_proj1.0": "local.fc1",
    "cgmlp.channel_proj2": "local.fc2",
    "cgmlp.csgu": "local",
    "feed_forward_macaron.w_": "macaron.fc",
    "feed_forward.w_": "mlp.fc",
    "norm_ff_macaron": "norm_macaron",
    "norm_ff": "norm_mlp",
    "norm_mha": "norm_attention",
    "norm_mlp": "norm_local",
    "norm_final": "norm",
    "depthwise_conv_fusion": "merge_conv",
    "merge_proj": "merge",
}


def renamed(weights):
    """Map ESPnet's names of the encoder's layers to ours."""
    found = {"norm.weight": weights["encoder.after_norm.weight"], "norm.bias": weights["encoder.after_norm.bias"]}
    for name, tensor in weights.items():
        if not name.startswith("encoder.encoders.") or "cross_attn" in name or "attn.linear_" in name:
            continue
        layer, _, part = name.removeprefix("encoder.encoders.").partition(".")
        old = next(k for k in RENAMED if part.startswith(k))
        found[f"layers.{layer}.{RENAMED[old]}{part.removeprefix(old)}"] = tensor
    for layer in range(3):
        at = f"encoder.encoders.{layer}.attn.linear_"
        for kind in ("weight", "bias"):
            found[f"layers.{layer}.attention.qkv.{kind}"] = torch.cat([weights[f"{at}{c}.{kind}"] for c in "qkv"])
            found[f"layers.{layer}.attention.proj.{kind}"] = weights[f"{at}out.{kind}"]
    return found


def attend(weights, at, x, source, mask, heads):
    q, k, v = (
        F.linear(y, weights[f"{at}.linear_{c}.weight"], weights[f"{at}.linear_{c}.bias"])
        .unflatten(-1, (heads, -1))
        .transpose(1, 2)
        for c, y in (("q", x), ("k", source), ("v", source))
    )
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None]).transpose(1, 2).flatten(2)
    return F.linear(y, weights[f"{at}.linear_out.weight"], weights[f"{at}.linear_out.bias"])


def linear(weights, at, x):
    return F.linear(x, weights[f"{at}.weight"], weights[f"{at}.bias"])


def norm(weights, at, x):
    return F.layer_norm(x, x.shape[-1:], weights[f"{at}.weight"], weights[f"{at}.bias"], 1e-12)


def prompt_memory(w, mask):
    """What OWSM-CTC's cross-attention reads: a small transformer's features of the prompt."""
    x = F.embedding(w["io.prev"].masked_fill(~mask, 39), w["embed.weight"])
    x = x * math.sqrt(16) + sinusoid(torch.arange(x.shape[1]), 16)
    for i in range(2):
        at = f"prompt_encoder.encoders.{i}"
        y = norm(w, f"{at}.norm1", x)
        x = x + attend(w, f"{at}.self_attn", y, y, mask, heads=2)
        y = F.relu(linear(w, f"{at}.feed_forward.w_1", norm(w, f"{at}.norm2", x)))
        x = x + linear(w, f"{at}.feed_forward.w_2", y)
    return linear(w, "prompt_proj", norm(w, "prompt_encoder.after_norm", x))


def test_owsm_ctc_of_espnet(golden):
    """Its encoder around our layers: prefix, self-conditioning on two layers, cross-attention inside the third."""
    w = load_file(golden / "speech" / "owsm_ctc_tiny.safetensors")
    backbone = EBranchformerConfig(
        dim=32, depth=3, causal=False, num_heads=4, hidden_dim=64, cgmlp_dim=64, mask_conv=False
    ).build()
    backbone.load_state_dict(renamed(w))
    x = w["io.feats"][:, None]
    for i in (0, 2, 4):
        x = F.relu(F.conv2d(x, w[f"encoder.embed.conv.{i}.weight"], w[f"encoder.embed.conv.{i}.bias"], stride=2))
    x = linear(w, "encoder.embed.out", x.transpose(1, 2).flatten(2))
    x = torch.cat([linear(w, "embed_proj", F.embedding(w["io.prefix"], w["embed.weight"])), x], dim=1)
    mask = torch.arange(x.shape[1]) < w["io.enc_lens"][:, None]
    prompt = torch.arange(w["io.prev"].shape[1]) < w["io.prev_lens"][:, None]
    memory = prompt_memory(w, prompt)

    def condition(y):
        return y + linear(w, "encoder.conditioning_layer", linear(w, "ctc.ctc_lo", y).softmax(-1))

    def cross(y):
        at = "encoder.encoders.2"
        return y + attend(w, f"{at}.cross_attn", norm(w, f"{at}.norm_cross_attn", y), memory, prompt, heads=4)

    hidden = []
    with torch.no_grad():
        taps = Taps(inside={2: cross}, after={0: condition, 1: condition})
        y = backbone.eval()(x, mask, hidden=hidden, taps=taps)
    for found, name in ((hidden[0], "inter1"), (hidden[1], "inter2"), (y, "enc")):
        torch.testing.assert_close(found[mask], w[f"io.{name}"][mask], atol=1e-5, rtol=1e-5)
    scores = linear(w, "ctc.ctc_lo", y).log_softmax(-1)
    torch.testing.assert_close(scores[mask], w["io.logp"][mask], atol=1e-5, rtol=1e-5)
