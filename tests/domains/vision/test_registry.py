"""Our models in timm's registry."""

import subprocess
import sys

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2

import vertebra  # noqa: F401
from vertebra.backbones.catalog import presets

PUBLISHED = ("cls_token", "pos_embed", "patch_embed.proj.weight", "norm.weight", "head.bias")


def test_every_preset_is_registered():
    names = timm.list_models()
    assert [name for name in presets() if not name.endswith("_test") and name not in names] == []


def test_illama_tiny_has_the_published_names_and_size():
    model = timm.create_model("illama_tiny")
    state = model.state_dict()
    assert sum(t.numel() for t in state.values()) == 5_701_096
    assert set(PUBLISHED) < set(state)
    assert state["blocks.11.attn.qkv.weight"].shape == (576, 192)
    other = timm.create_model("illama_tiny")
    other.load_state_dict(state, strict=True)
    images = torch.randn(1, 3, 224, 224)
    model.eval(), other.eval()
    torch.testing.assert_close(other(images), model(images), atol=0, rtol=0)
    torch.testing.assert_close(model.forward_head(model.forward_features(images)), model(images), atol=1e-5, rtol=1e-4)


def test_a_checkpoint_file_is_loaded_by_timm(tmp_path):
    model = timm.create_model("illama_nano", img_size=32, num_classes=5)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    options = {"img_size": 32, "num_classes": 5, "checkpoint_path": str(tmp_path / "w.pth")}
    again = timm.create_model("illama_nano", **options)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_timms_optimizer_sees_layers():
    model = timm.create_model("illama_nano", img_size=32, in_chans=1, num_classes=5, drop_path_rate=0.1)
    optimizer = create_optimizer_v2(model, "lamb", lr=1e-3, weight_decay=0.05, layer_decay=0.5)
    scales = sorted({group["lr_scale"] for group in optimizer.param_groups})
    assert len(scales) == 8  # before the backbone, its six layers, behind them
    assert scales[0] == pytest.approx(0.5**7)
    undecayed = [p for g in optimizer.param_groups if not g["weight_decay"] for p in g["params"]]
    assert any(p is model.pos_embed for p in undecayed)


def test_the_head_can_be_changed():
    model = timm.create_model("hybrid_nano", img_size=32, num_classes=0).eval()
    images = torch.randn(2, 3, 32, 32)
    assert model(images).shape == (2, model.num_features)
    model.reset_classifier(4)
    assert model(images).shape == (2, 4)
    assert model.get_classifier().out_features == 4


@pytest.mark.parametrize("first", ["vertebra", "timm"])
def test_the_order_of_the_imports_does_not_matter(first):
    second = {"vertebra": "timm", "timm": "vertebra"}[first]
    code = f"import {first}, {second}; import timm; print(timm.is_model('illama_tiny'))"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "True"


def test_importing_us_imports_no_torch():
    code = "import sys, vertebra; print('torch' in sys.modules, 'timm' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False False"
