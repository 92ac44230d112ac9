"""Ranks of attention maps: against maps that a formula gives, for every mask, and of which models there are none."""

import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.backbones.layers.attention import Attention, Rope
from vertebra.backbones.layers.masks import Layout
from vertebra.domains.vision.diagnostics import attention_layers, attention_map, attention_ranks, effective_rank
from vertebra.domains.vision.model import ImageClassifier
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError


def made(backbone, **options):
    spec = VisionSpec(
        task="classification", channels=3, height=16, width=16, classes=("a", "b"), mean=(0.5,) * 3, std=(0.25,) * 3
    )
    return ImageClassifier(create_backbone(backbone), spec, patch_size=4, **options).eval()


def test_effective_rank():
    diagonal = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    assert effective_rank(diagonal, 0.8).item() == 3  # 4, 7, 9 of 10
    assert [effective_rank(diagonal, t).item() for t in (0.1, 0.4, 0.7, 0.71, 0.9, 1.0)] == [1, 1, 2, 3, 3, 4]
    assert effective_rank(torch.eye(10)).item() == 8
    assert effective_rank(torch.ones(10, 10)).item() == 1
    assert effective_rank(torch.stack([torch.eye(4), torch.ones(4, 4)])[None]).tolist() == [[4, 1]]


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, {}),
        ({}, {"causal": True}),
        ({"window": 3}, {"causal": True}),
        ({"window": 2}, {}),
        ({"soft_mask": True}, {}),
        ({"rope": Rope(8)}, {"causal": True, "block": 3}),
        ({"rope": Rope(8), "bias": True}, {"mask": torch.arange(9).expand(2, 9) < torch.tensor([[9], [5]])}),
    ],
)
def test_maps_times_values_are_what_the_layer_gives(options, layout):
    torch.manual_seed(0)
    attention = Attention(16, 4, 2, 8, **options)
    attention.soft_mask_rate = 0.3
    x, layout = torch.randn(2, 9, 16), Layout(2, 9, torch.device("cpu"), **layout)
    maps = attention_map(attention, x, layout)
    v = attention._project(x, torch.arange(9))[2].repeat_interleave(2, 1)
    expected = attention(x, layout)
    torch.testing.assert_close(attention.proj((maps @ v).transpose(1, 2).flatten(2)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rate", [0.0, 0.5, 1.0])
def test_ranks_of_every_head_by_hand(rate):
    torch.manual_seed(0)
    model = made("illama_test,causal=false,soft_mask=true", soft_mask_rate=rate)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    images = torch.randn(6, 3, 16, 16)
    found = attention_ranks(model, images)
    assert [(r.layer, r.head, r.size) for r in found] == [
        (f"layers.{layer}.mixer", head, 17) for layer in range(2) for head in range(2)
    ]
    with torch.no_grad():
        x, layout = model.embed_patches(images), Layout(6, 17, torch.device("cpu"))
        for number, block in enumerate(model.backbone.layers):
            maps = attention_map(block.mixer, block.norm1(x), layout)
            for head in range(2):
                ranks = []
                for one in maps[:, head]:
                    values = torch.linalg.svdvals(one.double())
                    ranks.append(next(k for k in range(1, 18) if values[:k].sum() >= 0.8 * values.sum()))
                assert found[2 * number + head].rank == pytest.approx(sum(ranks) / 6)
            x = block(x, layout)


def test_a_causal_map_has_full_rank_and_a_uniform_one_the_rank_one():
    for soft_mask, expected in ((1.0, 1.0), (0.0, None)):
        model = made("illama_test,causal=false,soft_mask=true", soft_mask_rate=soft_mask)
        for layer in attention_layers(model).values():
            torch.nn.init.zeros_(layer.qkv.weight)
        ranks = [r.rank for r in attention_ranks(model, torch.randn(2, 3, 16, 16))]
        assert ranks == [expected] * 4 if expected else min(ranks) > 5


@pytest.mark.parametrize("name", ["illama_test", "axial_test,causal=false", "fit_test,causal=false"])
def test_other_backbones_with_attention(name):
    model = made(name)
    before = model.training
    found = attention_ranks(model, torch.randn(2, 3, 16, 16))
    assert {r.layer for r in found} == set(attention_layers(model))
    assert all(1 <= r.rank <= r.size for r in found)
    assert model.training is before
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_what_cannot_be_ranked():
    images = torch.randn(1, 3, 16, 16)
    model = made("hybrid_test,pattern=M")
    assert attention_layers(model) == {}
    with pytest.raises(ConfigError, match=r"one whose hybrid backbone has none; use another model\.$"):
        attention_ranks(model, images)
    with pytest.raises(ConfigError, match=r"threshold must be above 0 and at most 1, got 1\.5\.$"):
        attention_ranks(made("illama_test"), images, 1.5)
