"""Attention paths against the definition; masks against leakage."""

import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.base import create_backbone
from vertebra.backbones.layers import attention
from vertebra.backbones.layers.attention import (
    Attention,
    Rope,
    long_soft_masked_attention,
    soft_masked_attention,
    split_attention,
)
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.rope import rope_angles, rotate
from vertebra.backbones.reference.attention import attention_by_query
from vertebra.errors import ConfigError, ShapeError


def layout(batch, length, **kwargs):
    return Layout(batch=batch, length=length, device=torch.device("cpu"), **kwargs)


@pytest.mark.parametrize("length", [1, 7, 63])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", ["plain", "padded", "packed"])
def test_attention_equals_definition_with_gradients(length, window, causal, form):
    mixer = Attention(12, 4, 2, 6, window=window, bias=True, rope=Rope(4))
    mask = segments = None
    if form == "padded":
        mask = torch.arange(length)[None] < torch.tensor([[length], [max(length - 9, 1)]])
    if form == "packed":
        segments = (torch.arange(length) // 8).expand(2, length)
    where = layout(2, length, causal=causal, mask=mask, segments=segments)
    x = torch.randn(2, length, 12, requires_grad=True)
    q, k, v = mixer._project(x, torch.arange(length))
    dense = where.dense(window)
    allowed = torch.ones(2, length, length, dtype=torch.bool) if dense is None else dense[:, 0].expand(2, -1, -1)
    slow = mixer.proj(attention_by_query(q, k, v, allowed).transpose(1, 2).flatten(2))
    fast = mixer(x, where)
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    weights = torch.randn_like(fast)
    grads = [torch.autograd.grad((y * weights).sum(), [x, mixer.qkv.weight], retain_graph=True) for y in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rope", [None, Rope(4)])
@pytest.mark.parametrize("bias", [False, True])
def test_queries_and_keys_are_normed_before_they_are_turned(rope, bias):
    torch.manual_seed(0)
    mixer = Attention(12, 4, 2, 6, bias=bias, rope=rope, qk_norm=1e-3)
    with torch.no_grad():
        for norm in (mixer.q_norm, mixer.k_norm):
            norm.weight.add_(0.5 * torch.randn(6))  # one weight a channel, so that the order of norm and turn shows
    x = torch.randn(2, 9, 12, requires_grad=True)
    q, k, v = mixer.qkv(x).unflatten(-1, (8, 6)).split([4, 2, 2], dim=2)  # (B, T, heads, K)

    def normed(heads, weight):
        return heads / (heads.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    q, k = normed(q, mixer.q_norm.weight).transpose(1, 2), normed(k, mixer.k_norm.weight).transpose(1, 2)
    if rope is not None:
        q, k = (rotate(heads, rope_angles(torch.arange(9), 4), True) for heads in (q, k))
    seen = torch.ones(9, 9, dtype=torch.bool).tril().expand(2, -1, -1)
    expected = mixer.proj(attention_by_query(q, k, v.transpose(1, 2), seen).transpose(1, 2).flatten(2))
    y = mixer(x, layout(2, 9, causal=True))
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-4)
    weights, inputs = torch.randn_like(y), [x, *mixer.parameters()]
    grads = [torch.autograd.grad((out * weights).sum(), inputs, retain_graph=True) for out in (y, expected)]
    torch.testing.assert_close(*grads, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        state = mixer.init_state(2, 9, x.dtype, x.device)
        steps = torch.cat([mixer.step(part, state) for part in x.split([4, 1, 1, 3], dim=1)], dim=1)
        torch.testing.assert_close(steps, expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            mixer.read_last(x, layout(2, 9, causal=True)), expected[:, -1:], atol=1e-5, rtol=1e-4
        )


def test_without_qk_norm_there_are_no_such_weights():
    assert set(Attention(12, 4, 2, 6).state_dict()) == {"qkv.weight", "proj.weight"}
    normed = Attention(12, 4, 2, 6, qk_norm=1e-5)
    assert set(normed.state_dict()) == {"qkv.weight", "proj.weight", "q_norm.weight", "k_norm.weight"}
    assert normed.q_norm.weight.shape == (6,)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 16])
def test_flex_equals_sdpa(window):
    mixer = Attention(32, 2, 1, 16, window=window)
    segments = torch.repeat_interleave(torch.arange(4), 32)[None].expand(2, -1)
    x, where = torch.randn(2, 128, 32), layout(2, 128, causal=True, segments=segments)
    with torch.no_grad():
        expected = mixer(x, where)
        mixer.implementation = "flex"
        torch.testing.assert_close(mixer(x, where), expected, atol=1e-5, rtol=1e-4)


def seen_by(where, query, window=None):
    return where.dense(window)[0, 0, query].nonzero()[:, 0].tolist()


def test_masks_say_which_key_is_seen():
    assert seen_by(layout(1, 6, causal=True), 2) == [0, 1, 2]
    assert seen_by(layout(1, 6, causal=True), 4, window=2) == [3, 4]
    assert seen_by(layout(1, 6), 3, window=2) == [2, 3, 4]
    assert seen_by(layout(1, 6, causal=True, prefix=3), 0) == [0, 1, 2]
    assert seen_by(layout(1, 6, causal=True, block=2), 2) == [0, 1, 2, 3]
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    assert seen_by(layout(1, 3, tree=tree), 2) == [0, 2]
    assert seen_by(layout(1, 4, causal=True, segments=torch.tensor([[0, 0, 1, 1]])), 3) == [2, 3]
    mask = torch.tensor([[False, True, True]])
    assert seen_by(layout(1, 3, mask=mask), 1) == [1, 2]
    assert seen_by(layout(1, 3, mask=mask), 0) == [0, 1, 2]
    assert layout(1, 3).dense() is None


def test_windowed_state_is_a_ring_and_full_attention_grows():
    ring = create_backbone("illama_test", window=8).init_state(1, 1000)
    full = create_backbone("illama_test").init_state(1, 1000)
    assert (ring.growth, full.growth) == ("ring", "linear")
    sizes = {}
    for name, state in (("illama_test,window=8", ring), ("illama_test", full)):
        backbone = create_backbone(name)
        with torch.no_grad():
            for _ in range(10):
                backbone.step(torch.randn(1, 20, 16), state)
                for _ in range(20):
                    backbone.step(torch.randn(1, 1, 16), state)
                sizes.setdefault(name, []).append(state.nbytes)
    assert max(sizes["illama_test,window=8"]) <= 2 * 8 * 2 * 2 * 8 * 4
    assert sizes["illama_test"][-1] > 5 * sizes["illama_test"][0]


@pytest.mark.parametrize("prompt", [1, 3, 30])
def test_windowed_steps_equal_forward(prompt):
    backbone = create_backbone("illama_test,window=[5,0]").eval()
    x = torch.randn(2, 60, 16)
    state = backbone.init_state(2, 60)
    with torch.no_grad():
        parts = [backbone.step(x[:, :prompt], state), backbone.step(x[:, prompt : prompt + 11], state)]
        parts += [backbone.step(x[:, t : t + 1], state) for t in range(prompt + 11, 60)]
        torch.testing.assert_close(torch.cat(parts, 1), backbone(x), atol=1e-5, rtol=1e-5)


def test_a_full_state_refuses_more():
    backbone = create_backbone("illama_test")
    state = backbone.init_state(1, 4)
    with pytest.raises(ShapeError, match="5 positions do not fit in a state made for max_len=4"):
        backbone.step(torch.randn(1, 5, 16), state)


def test_padding_on_the_right_of_a_prompt_is_refused():
    backbone = create_backbone("illama_test")
    with pytest.raises(ShapeError, match="padding must stand on the left"):
        backbone.step(torch.randn(1, 2, 16), backbone.init_state(1, 4), torch.tensor([[True, False]]))


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("illama_test,num_heads=3", r"dim \(16\) must be an even multiple of num_heads \(3\)"),
        ("illama_test,num_kv_heads=3", r"num_heads \(2\) must be a multiple of num_kv_heads \(3\)"),
        ("illama_test,soft_mask=true", "soft_mask needs causal=False"),
        ("illama_test,soft_mask=true,causal=false,window=3", "exclude each other"),
        ("illama_test,dropout=1.5", r"dropout must be in \[0, 1\), got 1.5"),
        ("illama_test,depth=0", "depth must be at least 1, got 0"),
        ("hybrid_test,pattern=MXA", "letters M, S and A, as in 'MMMMAMMM', got 'MXA'"),
        ("hybrid_test,mamba_head_dim=5", r"expand \* dim \(32\) must be a multiple"),
        ("hybrid_test,num_heads=3", r"dim \(16\) must be a multiple of num_heads \(3\)"),
        ("hybrid_test,rope_fraction=0.4", "must be an even number of channels, got 3"),
    ],
)
def test_impossible_settings_are_refused(word, message):
    with pytest.raises(ConfigError, match=message):
        create_backbone(word)


@pytest.mark.parametrize("parts", [1, 2, 5])
@pytest.mark.parametrize("queries", [1, 6])
def test_partial_attention_merges_exactly(parts, queries):
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, 2, 23, 8), torch.randn(2, 2, 23, 8)
    mask = torch.rand(2, 1, 1, queries, 23) > 0.4
    mask[..., 0] = True
    mask[0, ..., 5:15] = False  # a whole part unseen by some
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, 0], enable_gqa=True)
    split = split_attention(q, k, v, lambda part: mask[..., part], size=-(-23 // parts))
    torch.testing.assert_close(split, dense, atol=1e-5, rtol=1e-5)
    plain = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(split_attention(q, k, v, size=-(-23 // parts)), plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["illama_test", "illama_test,window=9", "hybrid_test"])
def test_long_contexts_attend_part_by_part_with_the_same_numbers(monkeypatch, name):
    backbone = create_backbone(name).eval()
    x, mask = torch.randn(2, 40, backbone.config.dim), torch.ones(2, 40, dtype=torch.bool)
    mask[1, :7] = False

    def outputs():
        with torch.no_grad():
            state = backbone.init_state(2, 40)
            parts = [backbone.step(x[:, a : a + 12], state, mask[:, a : a + 12]) for a in (0, 12, 24)]
            plain = backbone.init_state(2, 40)
            parts += [backbone.step(x[:, a : a + 12], plain) for a in (0, 12, 24)]
            return torch.cat([*parts, *(backbone.step(x[:, t : t + 1], plain) for t in range(36, 40))], 1)

    whole = outputs()
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 100)
    monkeypatch.setattr(attention, "KEY_BLOCK", 8)
    real = torch.cat([mask[:, :36], torch.ones(2, 40, dtype=torch.bool)], 1)
    torch.testing.assert_close(outputs()[real], whole[real], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_the_soft_mask_without_its_weights_equals_the_plain_product(rate, kv_heads):
    results = []
    for form in (soft_masked_attention, None):
        torch.manual_seed(0)
        q, k, v = (torch.randn(2, h, 37, 8, requires_grad=True) for h in (4, kv_heads, kv_heads))
        y = form(q, k, v, layout(2, 37), rate) if form else long_soft_masked_attention(q, k, v, rate)
        y.pow(3).sum().backward()
        results.append([y, q.grad, k.grad, v.grad])
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)


def test_long_soft_masks_take_the_form_without_weights(monkeypatch):
    q = torch.randn(1, 2, 50, 8)
    plain = soft_masked_attention(q, q, q, layout(1, 50), 0.3)
    monkeypatch.setattr(attention, "LONG_SOFT_MASK", 50)
    monkeypatch.setattr(torch.Tensor, "softmax", None)
    torch.testing.assert_close(soft_masked_attention(q, q, q, layout(1, 50), 0.3), plain)


@pytest.mark.parametrize("width", [8, 4])
def test_rotation_that_moves_channels_keeps_the_products(width):
    q, k = torch.randn(2, 1, 2, 9, 8).unbind()
    angles = rope_angles(torch.arange(9), width)
    kept, moved = ([rotate(x, angles, True, ordered=o) for x in (q, k)] for o in (True, False))
    torch.testing.assert_close(kept[0] @ kept[1].mT, moved[0] @ moved[1].mT, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(kept[0], moved[0])
