"""TSFM: the published sizes, half-rotary heads with normed queries and keys; the rest is in test_contract."""

import pytest
import torch

from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.tsfm import TSFMConfig
from vertebra.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "width", "depth", "count"),
    [
        ("tsfm_1k", 8, 1, 872),
        ("tsfm_10k,depth=1", 24, 1, 7_032),  # the paper's table
        ("tsfm_10k", 24, 2, 14_040),
        ("tsfm_100k", 64, 2, 100_928),
        ("tsfm_300k", 64, 6, 302_656),
        ("tsfm_1m", 192, 4, 1_771_712),
        ("tsfm_3m", 256, 6, 4_747_264),
        ("tsfm_10m", 384, 8, 14_163_328),
        ("tsfm_30m", 512, 12, 37_812_224),
        ("tsfm_100m", 768, 18, 127_432_704),
        ("tsfm_100m,causal=true", 768, 18, 127_432_704),
        ("tsfm_300m", 1024, 24, 302_436_352),
        ("tsfm_1b", 1536, 36, 1_019_332_608),
        ("tsfm_1b_decoder", 1536, 32, 906_073_600),
    ],
)
def test_published_sizes(name, width, depth, count):
    config = resolve(name)
    with torch.device("meta"):
        backbone = config.build()
    assert (config.dim, config.depth, config.head_dim) == (width, depth, min(width, 64))
    assert config.causal == ("decoder" in name or "causal" in name)
    assert sum(p.numel() for p in backbone.parameters()) == count
    hidden = 8 * ((4 * width * 2 // 3 + 7) // 8)
    assert config.swiglu_dim == hidden
    assert count == depth * (4 * width**2 + 2 * config.head_dim + 3 * width * hidden + 2 * width) + width


def test_hidden_dim_is_taken_where_given():
    assert TSFMConfig(dim=16, depth=1, num_heads=1, hidden_dim=20).build().layers[0].mlp.up_proj.out_features == 20


def test_half_of_each_head_is_turned():
    """By distance alone: in a sequence of one repeated input, scores of the turned half depend on where a key is."""
    torch.manual_seed(0)
    mixer = create_backbone("tsfm_test,causal=false").layers[0].mixer
    x = torch.randn(1, 1, 16).expand(1, 6, 16)
    q, k, _ = mixer._project(x, torch.arange(6))  # (1, 2, 6, 8)
    torch.testing.assert_close(q[..., 4:], q[:, :, :1, 4:].expand_as(q[..., 4:]))
    torch.testing.assert_close(k[..., 4:], k[:, :, :1, 4:].expand_as(k[..., 4:]))
    assert (q[:, :, 1:, :4] - q[:, :, :1, :4]).abs().amax(-1).min() > 1e-3
    scores = q @ k.mT
    for gap in range(-5, 6):
        along = scores.diagonal(gap, dim1=-2, dim2=-1)
        torch.testing.assert_close(along, along[..., :1].expand_as(along))
    torch.testing.assert_close(q.square().mean(-1), torch.ones(1, 2, 6), atol=1e-3, rtol=0)


def test_a_layer_by_hand():
    torch.manual_seed(0)
    backbone = create_backbone("tsfm_test,depth=1,causal=false").eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x, block = torch.randn(2, 9, 16), backbone.layers[0]
    h = x + block.mixer(block.norm1(x), Layout(batch=2, length=9, device=x.device))
    torch.testing.assert_close(backbone(x), backbone.norm(h + block.mlp(block.norm2(h))))
    assert not [name for name, _ in backbone.named_parameters() if name.endswith("bias")]


def test_fresh_weights_spread_with_the_width():
    for name in ("tsfm_1k", "tsfm_100k"):
        torch.manual_seed(0)
        backbone = create_backbone(name)
        for key, parameter in backbone.named_parameters():
            if parameter.ndim == 1:
                assert (parameter == 1).all(), key
                continue
            bound = parameter.shape[1] ** -0.5
            assert 0.8 * bound < parameter.abs().max() <= bound, key
            assert parameter.mean().abs() < 0.2 * bound, key


def test_wrong_structures_are_named():
    with pytest.raises(ConfigError, match=r"dim \(24\) must be a multiple of 4 \* num_heads \(4\), since rotary"):
        TSFMConfig(dim=24, depth=1, num_heads=4)
    with pytest.raises(ConfigError, match=r"num_heads \(0\)"):
        TSFMConfig(dim=24, depth=1, num_heads=0)
    with pytest.raises(ConfigError, match="hidden_dim must be 0 or positive, got -8"):
        TSFMConfig(dim=24, depth=1, num_heads=1, hidden_dim=-8)
