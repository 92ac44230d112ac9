"""The chunked scan against the plain recurrence, outputs and gradients."""

import pytest
import torch

from vertebra.backbones.layers.ssd import ssd, ssd_matrix, ssd_step
from vertebra.backbones.reference.scan import ssd_recurrent


def inputs(length, groups=2, heads=4, width=3, state=5, batch=2, heavy=1.0):
    g = torch.Generator().manual_seed(length)
    x, b, c = (torch.randn(batch, length, *s, generator=g) for s in ((heads, width), (groups, state), (groups, state)))
    dt = torch.rand(batch, length, heads, generator=g) * heavy
    a = -torch.rand(heads, generator=g) * 4 - 0.1
    return x, dt, a, b, c


@pytest.mark.parametrize("length", [1, 7, 63, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_chunks_equal_recurrence_with_gradients(length, groups):
    args = [t.requires_grad_() for t in inputs(length, groups)]
    start = torch.randn(2, 4, 3, 5, requires_grad=True)
    results = []
    for run in (lambda: ssd(*args, chunk_size=16, initial_state=start), lambda: ssd_recurrent(*args, start)):
        y, state = run()
        loss = (y * torch.linspace(-1, 1, y.numel()).reshape(y.shape)).sum() + state.pow(2).sum()
        results.append((y, state, *torch.autograd.grad(loss, [*args, start])))
    for fast, slow in zip(*results, strict=True):
        torch.testing.assert_close(fast, slow, atol=2e-4, rtol=2e-4)


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
