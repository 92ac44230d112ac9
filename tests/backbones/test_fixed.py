"""Steps of fixed shapes: the numbers of ``forward``, however the positions are cut, for every causal family."""

import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import presets
from vertebra.backbones.fixed import FixedSteps
from vertebra.backbones.layers.ssd import ssd, ssd_quadratic
from vertebra.errors import ConfigError

TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
NO_FIXED_SHAPE = ("fit_test",)
FORMS = [
    *((name, {}) for name in TEST_PRESETS if name not in NO_FIXED_SHAPE),
    ("illama_test", {"window": 3}),
    ("hybrid_test", {"window": 4}),
    ("hybrid_test", {"pattern": "SA"}),
    ("opt_test", {"positions": "none"}),
    ("axial_test", {"positions": "none"}),
]
every_form = pytest.mark.parametrize(("name", "changes"), FORMS, ids=str)


def build(name, changes):
    backbone = create_backbone(name, **changes)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return backbone.eval()


def read(steps, x, state, pieces):
    outputs = []
    for piece in x.split(list(pieces), dim=1):
        y, state = steps(piece, state)
        outputs.append(y)
    return torch.cat(outputs, dim=1), state


@every_form
@torch.no_grad()
def test_pieces_give_the_numbers_of_one_pass(name, changes):
    backbone = build(name, changes)
    steps, x = FixedSteps(backbone, 16), torch.randn(2, 13, backbone.config.dim)
    empty = steps.empty(2)
    y, state = read(steps, x, empty, [1] * 13 if steps.most else (4, 1, 1, 5, 2))
    torch.testing.assert_close(y, backbone(x), atol=1e-5, rtol=1e-5)
    assert {k: (v.shape, v.dtype) for k, v in state.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}
    assert state["position"].tolist() == [13, 13]
    assert not any(v.any() for v in empty.values())  # what went in is not changed


@every_form
@torch.no_grad()
def test_items_that_stand_elsewhere_go_together(name, changes):
    backbone = build(name, changes)
    steps, x = FixedSteps(backbone, 16), torch.randn(2, 11, backbone.config.dim)
    _, far = read(steps, x[:1, :7], steps.empty(1), [1] * 7)
    _, near = read(steps, x[1:, :2], steps.empty(1), [1] * 2)
    both = {name: torch.cat([far[name], near[name]]) for name in far}
    both = {name: tensor[[1, 0, 0]] for name, tensor in both.items()}  # rows of a beam
    nexts = torch.stack([x[1, 2:6], x[0, 7:11], x[0, 7:11]])
    y, state = read(steps, nexts, both, [1] * 4)
    wanted = torch.stack([backbone(x[1:, :6])[0, 2:], *backbone(x[:1])[:, 7:].expand(2, -1, -1)])
    torch.testing.assert_close(y, wanted, atol=1e-5, rtol=1e-5)
    assert state["position"].tolist() == [6, 11, 11]


@torch.no_grad()
def test_attention_forgets_what_is_older_than_it_keeps():
    backbone = build("illama_test", {"depth": 1})
    x = torch.randn(1, 9, backbone.config.dim)
    y, _ = read(FixedSteps(backbone, 4), x, FixedSteps(backbone, 4).empty(1), [1] * 9)
    windowed = build("illama_test", {"depth": 1, "window": 5})
    windowed.load_state_dict(backbone.state_dict())
    torch.testing.assert_close(y, windowed(x), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(y, backbone(x), atol=1e-3)


def test_what_has_no_fixed_shape_is_refused():
    with pytest.raises(ConfigError, match="FIT has no steps of a fixed shape: what it keeps grows with every group"):
        FixedSteps(create_backbone("fit_test"), 16)
    with pytest.raises(ConfigError, match="causal=False has no state"):
        FixedSteps(create_backbone("illama_test", causal=False), 16)
    with pytest.raises(ConfigError, match="max_len must be at least 1, got 0"):
        FixedSteps(create_backbone("illama_test"), 0)


@pytest.mark.parametrize("length", [1, 7, 65, 500])
def test_quadratic_scan_is_the_scan(length):
    x, dt = torch.randn(2, length, 4, 8), torch.rand(2, length, 4)
    b, c, a = torch.randn(2, length, 2, 5), torch.randn(2, length, 2, 5), -16 * torch.rand(4)
    start, skip = torch.randn(2, 4, 8, 5), torch.randn(4)
    for state in (None, start):
        y, end = ssd_quadratic(x, dt, a, b, c, skip, state)
        wanted, wanted_end = ssd(x, dt, a, b, c, D=skip, initial_state=state, implementation="torch")
        torch.testing.assert_close(y, wanted, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(end, wanted_end, atol=1e-4, rtol=1e-4)
