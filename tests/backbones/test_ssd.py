"""The chunked scan against the plain recurrence, outputs and gradients."""

import sys
import types

import pytest
import torch

from vertebra.backbones.layers import ssd as ssd_module
from vertebra.backbones.layers.ssd import choose_implementation, ssd, ssd_chunked, ssd_matrix, ssd_step
from vertebra.backbones.reference.scan import ssd_recurrent
from vertebra.errors import ConfigError, MissingExtraError


def inputs(length, groups=2, heads=4, width=3, state=5, batch=2, heavy=1.0):
    g = torch.Generator().manual_seed(length)
    x, b, c = (torch.randn(batch, length, *s, generator=g) for s in ((heads, width), (groups, state), (groups, state)))
    dt = torch.rand(batch, length, heads, generator=g) * heavy
    a = -torch.rand(heads, generator=g) * 4 - 0.1
    return x, dt, a, b, c


def packed(length, batch=2):
    """Sequences of uneven lengths in every row, some of one position."""
    g = torch.Generator().manual_seed(length)
    return (torch.rand(batch, length, generator=g) < 0.1).long().cumsum(1)


def outcome(run, args, start, skip):
    """Outputs, final state, and gradients of all inputs for an arbitrary loss of both."""
    args = [t.clone().requires_grad_() for t in (*args, start, skip)]
    y, state = run(*args)
    weights = [torch.linspace(-1, 1, t.numel(), dtype=t.dtype).reshape(t.shape) for t in (y, state)]
    grads = torch.autograd.grad((y * weights[0]).sum() + (state * weights[1]).sum(), args)
    return [y, state, *grads]


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("form", ["alone", "packed"])
@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("form_of_scan", ["torch", "chunked"])
def test_scan_equals_recurrence_with_gradients(monkeypatch, form_of_scan, groups, length, form, small_blocks):
    if small_blocks:  # one chunk a block: states go from block to block
        monkeypatch.setattr("vertebra.backbones.layers.ssd_blocks.CACHE_FLOATS", 1)
        monkeypatch.setattr(ssd_module, "MOST_CHUNKS", 2)
    segments = packed(length) if form == "packed" else None
    start, skip = torch.randn(2, 4, 3, 5), torch.randn(4)

    def fast(x, dt, a, b, c, start, skip):
        if form_of_scan == "chunked":
            return ssd_chunked(x, dt, a, b, c, skip, 16, start, segments)
        return ssd(x, dt, a, b, c, D=skip, chunk_size=16, initial_state=start, segments=segments)

    def slow(x, dt, a, b, c, start, skip):
        y, state = ssd_recurrent(x, dt, a, b, c, start, segments)
        return y + x * skip[:, None], state

    args = inputs(length, groups)
    exact = outcome(slow, [t.double() for t in args], start.double(), skip.double())
    for got, wanted in zip(outcome(fast, args, start, skip), exact, strict=True):
        scale = wanted.abs().max().item() + 1e-3
        torch.testing.assert_close(got.double(), wanted, atol=3e-6 * scale, rtol=1e-4)


@pytest.mark.parametrize("name", ["compiled", "fla", "mamba_ssm"])
@pytest.mark.parametrize("form", ["alone", "packed"])
def test_every_implementation_gives_the_same_numbers(monkeypatch, name, form):
    """The kernels themselves need a GPU; here stand-ins of their documented meaning check what is given to them."""
    args, start, skip = inputs(70), torch.randn(2, 4, 3, 5), torch.randn(4)
    segments = packed(70) if form == "packed" else None
    wanted = ssd(*args, D=skip, initial_state=start, segments=segments, implementation="torch")
    if name == "compiled":
        monkeypatch.setattr(ssd_module, "_compiled", lambda: torch.compile(ssd_module._chunks, backend="aot_eager"))
        got = ssd(*args, D=skip, initial_state=start, segments=segments, implementation="compiled")
    elif name == "fla":
        install(monkeypatch, "fla.ops.simple_gla", chunk_simple_gla=simple_gla)
        got = ssd_module._fla(*args, skip, start, segments)
    else:
        install(monkeypatch, "mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined=chunk_scan)
        got = ssd_module._mamba_ssm(*args, skip, 64, start, segments)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=1e-4)


def install(monkeypatch, path, **functions):
    """Put a module of that name, with its parents, where imports look."""
    parts = path.split(".")
    for end in range(1, len(parts) + 1):
        monkeypatch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
    vars(sys.modules[path]).update(functions)


def simple_gla(q, k, v, g, *, scale, initial_state, output_final_state, cu_seqlens):
    """Gated linear attention by its definition: S = exp(g) S + k v^T, o = scale q S; a state (H, K, V) a sequence."""
    assert output_final_state
    bounds = cu_seqlens.tolist() if cu_seqlens is not None else [0, q.shape[1]]
    outputs, finals = torch.empty_like(v), []
    count = len(bounds) - 1 if cu_seqlens is not None else len(q)
    for n in range(count):
        row, begin, end = (0, bounds[n], bounds[n + 1]) if cu_seqlens is not None else (n, 0, q.shape[1])
        state = initial_state[n] if initial_state is not None else q.new_zeros(*k.shape[2:], v.shape[-1])
        for t in range(begin, end):
            state = g[row, t].exp()[:, None, None] * state + k[row, t][..., None] * v[row, t][:, None]
            outputs[row, t] = scale * (q[row, t][:, None] @ state)[:, 0]
        finals.append(state)
    return outputs, torch.stack(finals)


def chunk_scan(x, dt, A, B, C, chunk_size, *, D, initial_states, return_final_states, seq_idx):  # noqa: N803
    """mamba_ssm's scan by its definition."""
    assert return_final_states
    assert seq_idx is None or seq_idx.dtype == torch.int32
    y, state = ssd_recurrent(x, dt, A, B, C, initial_states, seq_idx)
    return y + x * D[:, None], state


def test_unusable_implementations_say_what_to_do(monkeypatch):
    with pytest.raises(ConfigError, match=r"must be one of auto, torch, compiled, fla, mamba_ssm, got 'triton'"):
        choose_implementation("triton", "cpu")
    monkeypatch.setattr(ssd_module, "_installed", lambda name: False)
    with pytest.raises(MissingExtraError, match=r"'fla-core'; install it with: pip install 'vertebra\[gpu\]'"):
        choose_implementation("fla", "cuda")
    assert choose_implementation("auto", "cuda") == "torch"
    monkeypatch.setattr(ssd_module, "_installed", lambda name: True)
    with pytest.raises(ConfigError, match=r"'fla' needs CUDA, got tensors on cpu; use 'torch'"):
        choose_implementation("fla", "cpu")
    assert choose_implementation("auto", "cuda") == "fla"
    assert choose_implementation("auto", "cpu") == "torch"
    monkeypatch.setenv("VERTEBRA_SSD", "compiled")
    assert choose_implementation("auto", "cpu") == "compiled"


def test_bf16_inputs_keep_a_float32_state():
    x, dt, a, b, c = inputs(130)
    wanted, state = ssd(x.bfloat16(), dt, a, b.bfloat16(), c.bfloat16())
    exact, exact_state = ssd_recurrent(
        *(t.bfloat16().float() for t in (x,)), dt, a, *(t.bfloat16().float() for t in (b, c))
    )
    assert (wanted.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(state, exact_state, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(wanted.float(), exact, atol=2e-2, rtol=1e-2)


def test_operator_is_registered_as_the_compiler_needs_it():
    args = [t.requires_grad_() for t in inputs(37)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.vertebra.ssd, (*args, None, None, None, 16), test_utils=checks)
    plain = torch.autograd.grad(ssd(*args)[0].pow(2).sum(), args)
    compiled = torch.compile(lambda *args: ssd(*args)[0].pow(2).sum(), fullgraph=True, backend="aot_eager")
    for mine, theirs in zip(torch.autograd.grad(compiled(*args), args), plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_compile_has_no_graph_break_and_no_unrolled_loop():
    x, dt, a, b, c = inputs(1000)
    seen = []

    def backend(graph, _):
        seen.append(len(graph.graph.nodes))
        return graph.forward

    compiled = torch.compile(lambda *args: ssd(*args, chunk_size=16)[0], fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x, dt, a, b, c), ssd(x, dt, a, b, c)[0], atol=1e-5, rtol=1e-4)
    assert len(seen) == 1
    assert seen[0] < 20


def test_result_does_not_depend_on_chunk_size_or_split():
    x, dt, a, b, c = inputs(150)
    whole, final = ssd(x, dt, a, b, c, chunk_size=64)
    for size in (8, 32, 256):
        torch.testing.assert_close(ssd(x, dt, a, b, c, chunk_size=size)[0], whole, atol=1e-5, rtol=1e-4)
    first, state = ssd(x[:, :47], dt[:, :47], a, b[:, :47], c[:, :47])
    second, state = ssd(x[:, 47:], dt[:, 47:], a, b[:, 47:], c[:, 47:], initial_state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, final, atol=1e-5, rtol=1e-4)


def test_segments_equal_recurrence_with_resets():
    x, dt, a, b, c = inputs(130)
    ids = torch.stack([torch.tensor([0] * 5 + [1] * 90 + [2] * 35), torch.tensor([7] * 64 + [8] * 1 + [9] * 65)])
    y, state = ssd(x, dt, a, b, c, chunk_size=32, segments=ids)
    slow, slow_state = ssd_recurrent(x, dt, a, b, c, segments=ids)
    torch.testing.assert_close(y, slow, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(state, slow_state, atol=1e-5, rtol=1e-4)


def test_step_equals_recurrence():
    x, dt, a, b, c = inputs(9)
    state = torch.zeros(2, 4, 3, 5)
    slow, _ = ssd_recurrent(x, dt, a, b, c)
    for t in range(9):
        y, state = ssd_step(x[:, t], dt[:, t], a, b[:, t], c[:, t], state)
        torch.testing.assert_close(y, slow[:, t], atol=1e-5, rtol=1e-4)


def test_matrix_form_equals_scan():
    x, dt, a, b, c = inputs(70)
    y = (ssd_matrix(dt, a, b, c) @ x.transpose(1, 2)).transpose(1, 2)
    torch.testing.assert_close(y, ssd(x, dt, a, b, c)[0], atol=1e-5, rtol=1e-4)


def test_heavy_decay_gives_no_nan():
    args = [t.requires_grad_() for t in inputs(300, heavy=400.0)]
    y, _ = ssd(*args, chunk_size=128)
    grads = torch.autograd.grad(y.sum(), args)
    assert all(t.isfinite().all() for t in (y, *grads))


def test_zero_step_leaves_the_state():
    x, dt, a, b, c = inputs(20)
    dt[:, 12:] = 0
    torch.testing.assert_close(ssd(x, dt, a, b, c)[1], ssd_recurrent(x[:, :12], dt[:, :12], a, b[:, :12], c[:, :12])[1])
