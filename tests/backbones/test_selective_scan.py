"""Mamba-1: the chunked scan against the plain recurrence, and the mixer against its own steps and transformers."""

import pytest
import torch

from vertebra.backbones.hybrid import HybridConfig
from vertebra.backbones.layers import selective_scan as module
from vertebra.backbones.layers.mamba1 import Mamba1, Mamba1Shape
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.selective_scan import selective_scan, selective_scan_step
from vertebra.backbones.reference.selective_scan import selective_scan_recurrent
from vertebra.errors import ConfigError, LoadError


def inputs(length, width=6, state=5, batch=2, heavy=1.0):
    g = torch.Generator().manual_seed(length)
    x, b, c = (torch.randn(batch, length, w, generator=g) for w in (width, state, state))
    dt = torch.rand(batch, length, width, generator=g) * heavy
    return x, dt, -torch.rand(width, state, generator=g) * 4 - 0.1, b, c


def ids_of(*rows):
    return torch.stack([torch.repeat_interleave(torch.arange(len(r)), torch.tensor(r)) for r in rows])


def compare(args, start=None, segments=None, tolerance=2e-4, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (*args, *(() if start is None else (start,)))]
    args, start = leaves[:5], leaves[5] if start is not None else None
    results = []
    for run in (
        lambda: selective_scan(*args, initial_state=start, segments=segments, **options),
        lambda: selective_scan_recurrent(*args, start, segments),
    ):
        y, state = run()
        loss = (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() + state.pow(2).sum()
        results.append((y, state, *torch.autograd.grad(loss, leaves)))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=tolerance, rtol=tolerance)
    with torch.no_grad():
        y, state = selective_scan(*args, initial_state=start, segments=segments, **options)
    torch.testing.assert_close(y, results[0][0], atol=0, rtol=0)
    torch.testing.assert_close(state, results[0][1], atol=0, rtol=0)


@pytest.fixture(params=["wide blocks", "blocks of two chunks", "blocks of one chunk"])
def blocks(request, monkeypatch):
    if request.param != "wide blocks":
        step = 4 if "two" in request.param else 2  # rows of a batch of 2

        def narrow(self):
            rows = self.count * self.batch
            return [slice(low, min(low + step, rows)) for low in range(0, rows, step)]

        monkeypatch.setattr(module._Chunks, "blocks", narrow)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("length", [1, 7, 33, 257])
@pytest.mark.parametrize("started", [False, True])
def test_chunks_equal_recurrence_with_gradients(length, started):
    compare(inputs(length), torch.randn(2, 6, 5) if started else None)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("chunk_size", [1, 5, 64, 1000])
def test_segments_equal_recurrence_with_resets(chunk_size):
    segments = ids_of([5, 80, 1, 44], [64, 1, 65])
    compare(inputs(130), torch.randn(2, 6, 5), segments, chunk_size=chunk_size)


def test_split_calls_equal_one_call():
    x, dt, a, b, c = inputs(150)
    whole, final = selective_scan(x, dt, a, b, c)
    first, state = selective_scan(x[:, :47], dt[:, :47], a, b[:, :47], c[:, :47])
    second, state = selective_scan(x[:, 47:], dt[:, 47:], a, b[:, 47:], c[:, 47:], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, final, atol=1e-5, rtol=1e-4)


def test_step_equals_recurrence():
    x, dt, a, b, c = inputs(9)
    state = torch.zeros(2, 6, 5)
    slow, _ = selective_scan_recurrent(x, dt, a, b, c)
    for t in range(9):
        y, state = selective_scan_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        torch.testing.assert_close(y, slow[:, t], atol=1e-5, rtol=1e-4)


def test_zero_step_leaves_the_state():
    x, dt, a, b, c = inputs(40)
    dt[:, 21:] = 0
    short = (x[:, :21], dt[:, :21], a, b[:, :21], c[:, :21])
    torch.testing.assert_close(selective_scan(x, dt, a, b, c)[1], selective_scan_recurrent(*short)[1])
    compare((x, dt, a, b, c))


def test_heavy_decay_gives_no_nan():
    args = [t.requires_grad_() for t in inputs(300, heavy=400.0)]
    y, _ = selective_scan(*args)
    assert all(t.isfinite().all() for t in (y, *torch.autograd.grad(y.sum(), args)))


def test_long_sequence_over_many_blocks():
    x, dt, a, b, c = inputs(5000, width=3, state=2, heavy=0.05)
    compare((x, dt, a, b, c), torch.randn(2, 3, 2), tolerance=1e-3)


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_keeps_a_float32_state(autocast):
    x, dt, a, b, c = inputs(70)
    x, b, c = (t.bfloat16().requires_grad_() for t in (x, b, c))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, state = selective_scan(x, dt, a, b, c)
        grads = torch.autograd.grad(y.float().sum(), (x, b, c))
    exact_y, exact_state = selective_scan_recurrent(x.float(), dt, a, b.float(), c.float())
    exact_grads = torch.autograd.grad(exact_y.sum(), (x, b, c))
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, exact_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(y, exact_y.bfloat16(), atol=1e-2, rtol=1e-2)
    for grad, exact in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, exact, atol=1e-2, rtol=1e-2)


def test_operator_is_well_formed_and_compiles_without_a_break():
    args = [t.requires_grad_() for t in inputs(20)]
    segments = ids_of([5, 15], [20])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._forward_op, (*args, torch.randn(2, 6, 5), segments, 8), test_utils=checks)
    compiled = torch.compile(selective_scan, backend="aot_eager", fullgraph=True)
    results = []
    for run in (compiled, selective_scan):
        y, state = run(*args, segments=segments)
        results.append((y, state, *torch.autograd.grad(y.sum() + state.sum(), args)))
    torch.testing.assert_close(*results)


# ---------------------------------------------------------------- the mixer


def mixer(**changes):
    torch.manual_seed(0)
    made = Mamba1(16, Mamba1Shape(**{"inner_dim": 32, "dt_rank": 3, "state_dim": 4, **changes}))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


def layout(x, **fields):
    return Layout(batch=x.shape[0], length=x.shape[1], device=x.device, causal=True, **fields)


def step_all(made, x, cuts, mask=None):
    state = made.init_state(x.shape[0], x.shape[1], x.dtype, x.device)
    masks = [None] * len(cuts) if mask is None else mask.split(cuts, dim=1)
    with torch.no_grad():
        parts = [made.step(part, state, m) for part, m in zip(x.split(cuts, dim=1), masks, strict=True)]
    return torch.cat(parts, 1), state


@pytest.mark.parametrize("changes", [{}, {"norm_dt_bc": True}, {"kernel": 1}, {"conv_bias": False, "kernel": 3}])
def test_mixer_steps_padding_and_packing(changes):
    made = mixer(**changes)
    x = torch.randn(2, 50, 16)
    whole = made(x, layout(x))
    stepped, state = step_all(made, x, [1, 29, 5, *[1] * 15])
    torch.testing.assert_close(stepped, whole, atol=1e-5, rtol=1e-5)
    assert [tuple(t.shape) for t in state.tensors()] == [(2, made.shape.kernel - 1, 32), (2, 32, 4)]
    picked = state.select(torch.tensor([1, 1, 0]))
    assert all(torch.equal(new, old[[1, 1, 0]]) for new, old in zip(picked.tensors(), state.tensors(), strict=True))

    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[0, 41:], mask[1, :9] = False, False
    padded = made(torch.where(mask[..., None], x, 100.0), layout(x, mask=mask))
    torch.testing.assert_close(padded[0, :41], whole[0, :41], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(padded[1, 9:], made(x[1:, 9:], layout(x[1:, 9:]))[0], atol=1e-5, rtol=1e-5)
    mask[0] = True
    stepped, _ = step_all(made, x, [16, *[1] * 34], mask)
    torch.testing.assert_close(stepped[1, 9:], padded[1, 9:], atol=1e-5, rtol=1e-5)

    lengths = [1, 9, 2, 37, 1]
    segments = ids_of(lengths, lengths)
    alone = torch.cat([made(part, layout(part)) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(made(x, layout(x, segments=segments)), alone, atol=1e-5, rtol=1e-5)
    carried, outputs = None, []
    for part, ids in zip(x.split([10, 1, 20, 19], 1), segments.split([10, 1, 20, 19], 1), strict=True):
        y, carried = made.carry(part, layout(part, segments=ids), carried)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), alone, atol=1e-5, rtol=1e-5)


def test_state_is_saved_and_loaded():
    made = mixer()
    x = torch.randn(2, 12, 16)
    _, state = step_all(made, x, [11, 1])
    fresh = made.init_state(2, 12, x.dtype, x.device)
    fresh.load_state_dict(state.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made.step(x[:, :1], fresh), made.step(x[:, :1], state), atol=0, rtol=0)
    with pytest.raises(LoadError, match=r"ssm must be \(2, 32, 4\), got nothing"):
        fresh.load_state_dict({"conv": state.conv})
    with pytest.raises(LoadError, match=r"conv must be \(3, 3, 32\), got \(2, 3, 32\)"):
        made.init_state(3, 12, x.dtype, x.device).load_state_dict(state.state_dict())


@pytest.mark.bench
@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_mixer_equals_transformers(family):
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    if family == "mamba":
        from transformers.models.mamba.modeling_mamba import MambaConfig, MambaMixer

        other = MambaMixer(MambaConfig(hidden_size=16, state_size=4, time_step_rank=3, num_hidden_layers=1), 0)
    else:
        from transformers.models.jamba.modeling_jamba import JambaConfig, JambaMambaMixer

        sizes = {"mamba_d_state": 4, "mamba_dt_rank": 3, "mamba_expand": 2, "num_attention_heads": 2}
        other = JambaMambaMixer(JambaConfig(hidden_size=16, num_key_value_heads=1, **sizes), 0)
    made = mixer(norm_dt_bc=family == "jamba")
    other.load_state_dict(made.state_dict())
    x = torch.randn(2, 37, 16)
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[1, :8] = False
    for m in (None, mask):
        theirs = other(x, attention_mask=None if m is None else m.long())
        torch.testing.assert_close(made(x, layout(x, mask=m)), theirs, atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- in the hybrid


def hybrid(**changes):
    sizes = {"dim": 20, "depth": 2, "pattern": "SA", "hidden_dim": 24, "num_heads": 2, "s6_state_dim": 4}
    return HybridConfig(**{**sizes, **changes})


def test_hybrid_keeps_the_dynamics_and_decodes():
    torch.manual_seed(0)
    backbone = hybrid(depth=3).build().eval()
    made = backbone.layers[2].mixer
    assert made.shape.dt_rank == 2
    torch.testing.assert_close(made.A_log.exp(), torch.arange(1.0, 5).expand(40, -1))
    steps = torch.nn.functional.softplus(made.dt_proj.bias)
    assert 9e-4 < steps.min() < steps.max() < 0.11
    x = torch.randn(2, 30, 20)
    whole = backbone(x)
    state = backbone.init_state(2, 30)
    with torch.no_grad():
        parts = [backbone.step(part, state) for part in x.split([13, *[1] * 17], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(backbone(x), whole, atol=1e-5, rtol=1e-5)
    whole.pow(2).sum().backward()
    assert [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_hybrid_exports():
    backbone = hybrid(depth=1, hidden_dim=0).build().eval()
    x = torch.randn(2, 20, 20)
    given = (x, None, ids_of([7, 13], [20]))
    program = torch.export.export(backbone, given)
    assert not [n for n in program.graph.nodes if "vertebra" in str(n.target)]
    torch.testing.assert_close(program.module()(*given), backbone(*given), atol=1e-5, rtol=1e-5)


def test_hybrid_in_bf16_stays_near():
    backbone = hybrid().build().eval()
    x = torch.randn(2, 40, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = backbone(x)
    exact, low = backbone(x), backbone.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    for y in (low, mixed):
        assert torch.nn.functional.cosine_similarity(y.float(), exact, dim=-1).mean() > 0.99


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"causal": False}, r"S in pattern \('SA'\) is causal only; use M with causal=False"),
        ({"dt_rank": -1}, "dt_rank must be at least 0 and s6_state_dim at least 1, got -1 and 4"),
        ({"s6_state_dim": 0}, "got 0 and 0"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        hybrid(**changes)
