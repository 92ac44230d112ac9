"""The selective scan of Mamba-1 (https://arxiv.org/abs/2312.00752, section 3), in chunks.

Shapes: B batch, T positions, D channels, N state width, Q chunk, C chunks, R = C * B rows, S rows of one block.

The recurrence is h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T (D x N), y_t = h_t C_t. Every channel has decays of its
own, so there is no matmul form as for Mamba-2. Here the positions of a chunk follow one another and all chunks of a
block advance side by side: first from zero, for what each adds to the state; then, after a loop over the chunks, from
their true states. Only decays, at most 1, are multiplied: nothing overflows. The backward pass keeps the state at the
start of every chunk, recomputes the others block by block, and runs the same two passes from the end. All is float32.

Both passes are operators of ``torch.library``, which ``torch.compile`` takes as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.backbones.layers.sizes import is_fixed
from vertebra.errors import ConfigError


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    chunk_size: int = 16,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan over whole sequences, without the skip term D x. Differentiable once.

    Args:
        x: Input, shape (B, T, D).
        dt: Step sizes, positive (0 leaves the state as it is), shape (B, T, D).
        A: State decay, negative, shape (D, N).
        B: Input projection, shape (B, T, N).
        C: Output projection, shape (B, T, N).
        chunk_size: Largest Q; the result does not depend on it. Training keeps T / Q states.
        initial_state: State before the first position, shape (B, D, N); zero when None.
        segments: Packed sequence of each position, int (B, T), each in one piece; the state starts from zero at
            each one's first position (``initial_state`` belongs to the first sequence).

    Returns:
        The output (B, T, D) in the dtype of ``x``, and the final state (B, D, N) in float32.
    """
    if torch.compiler.is_exporting():  # a program must not depend on an operator of ours
        if not is_fixed(x.shape[1]):
            raise ConfigError(
                "selective_scan: a program of any length cannot be written for Mamba-1 layers, whose loop it would "
                "have to unroll; export the `step`, which reads one position at a time."
            )
        chunk_size = math.isqrt(x.shape[1] - 1) + 1  # the shortest program: loops over Q and C are unrolled
        return _plain(_Chunks(x, dt, A, B, C, segments, chunk_size), x.dtype, initial_state)
    y, state, _ = _forward_op(x, dt, A, B, C, initial_state, segments, chunk_size)
    return y, state


def selective_scan_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one position.

    Args:
        x: Input, shape (B, D).
        dt: Step size, shape (B, D).
        A: State decay, negative, shape (D, N).
        B: Input projection, shape (B, N).
        C: Output projection, shape (B, N).
        state: State before, shape (B, D, N), float32.

    Returns:
        The output (B, D) in the dtype of ``x``, and the state after.
    """
    dt = dt.float()[..., None]  # (B, D, 1)
    state = (dt * A.float()).exp() * state + dt * x.float()[..., None] * B.float()[:, None]
    return (state * C.float()[:, None]).sum(-1).to(x.dtype), state


class _Chunks:
    """The inputs cut into chunks, position first; row r is chunk r // B of item r % B.

    States are (rows, N, D) here: the wide axis last, so that broadcasts over it are fast.
    """

    def __init__(
        self,
        x: Tensor,
        dt: Tensor,
        A: Tensor,  # noqa: N803
        B: Tensor,  # noqa: N803
        C: Tensor,  # noqa: N803
        segments: Tensor | None,
        chunk_size: int,
    ) -> None:
        self.batch, self.length = x.shape[:2]
        self.count = -(-self.length // chunk_size)
        self.size = -(-self.length // self.count)  # evenly, so that little is padded
        self.a = A.float().T.contiguous()  # (N, D)
        self.dt = self.split(dt)  # (Q, R, D)
        self.xdt = self.split(x) * self.dt  # (Q, R, D)
        self.b, self.c = self.split(B), self.split(C)  # (Q, R, N)
        self.keep: Tensor | None = None  # (Q, R, 1): 0 where a sequence but a row's first starts
        if segments is not None:
            starts = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0))
            self.keep = 1 - self.split(starts[..., None])

    def split(self, t: Tensor) -> Tensor:
        """Cut (B, T, W) into float32 (Q, R, W); padding is 0, and dt = 0 changes nothing."""
        t = F.pad(t.float(), (0, 0, 0, self.count * self.size - self.length))
        t = t.unflatten(1, (self.count, self.size)).permute(2, 1, 0, 3)  # (Q, C, B, W)
        return t.reshape(self.size, self.count * self.batch, -1).clone()  # reshape may be a view of an input

    def join(self, t: Tensor) -> Tensor:
        """Undo ``split``."""
        t = t.unflatten(1, (self.count, self.batch)).permute(2, 1, 0, 3)  # (B, C, Q, W)
        return t.flatten(1, 2)[:, : self.length].contiguous()

    def blocks(self) -> list[slice]:
        """Return rows that advance together: as many chunks as fit a CPU's cache, more elsewhere."""
        room = 2**18 if self.dt.device.type == "cpu" else 2**21
        step = max(1, room // (self.batch * self.a.numel())) * self.batch
        rows = self.count * self.batch
        return [slice(low, min(low + step, rows)) for low in range(0, rows, step)]

    def decay(self, q: int, rows: slice, out: Tensor) -> Tensor:
        """Write the decays of position q to ``out`` (S, N, D)."""
        torch.mul(self.dt[q, rows, None], self.a, out=out).exp_()
        return out if self.keep is None else out.mul_(self.keep[q, rows, None])

    def passing(self, rows: slice) -> Tensor:
        """Return what is left of a state after a whole chunk, (S, N, D)."""
        left = (self.dt[:, rows].sum(0)[:, None] * self.a).exp_()
        return left if self.keep is None else left.mul_(self.keep[:, rows].amin(0)[:, None])

    def update(self, h: Tensor, q: int, rows: slice) -> None:
        """Add the input of position q to ``h`` (S, N, D)."""
        h.addcmul_(self.b[q, rows, :, None], self.xdt[q, rows, None])


def _advance(p: _Chunks, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the outputs (Q, R, D), the final state (B, N, D) and the state at the start of every chunk (R, N, D)."""
    y = torch.empty_like(p.dt)
    starts = y.new_empty(y.shape[1], *p.a.shape)
    blocks = p.blocks()
    single = blocks[0].stop == p.batch  # one chunk a block: no first pass
    buffer = y.new_empty(1 if single else p.size, blocks[0].stop, *p.a.shape)
    for rows in blocks:
        start = starts[rows]
        decays = buffer[:, : len(start)]
        if not single:
            added = torch.zeros_like(start)
            for q in range(p.size):
                p.update(added.mul_(p.decay(q, rows, decays[q])), q, rows)
            for low, left in zip(range(0, len(start), p.batch), p.passing(rows).split(p.batch), strict=True):
                start[low : low + p.batch] = state
                state = torch.addcmul(added[low : low + p.batch], left, state)
        else:
            start.copy_(state)
        h = start.clone()
        for q in range(p.size):
            p.update(h.mul_(p.decay(q, rows, decays[0]) if single else decays[q]), q, rows)
            torch.bmm(p.c[q, rows, None], h, out=y[q, rows, None])  # with out=, autocast lets it be
        state = h[-p.batch :]
    return y, state, starts


def _retreat(p: _Chunks, starts: Tensor, grad_y: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """Return the gradients of xdt and, as decay, dt (Q, R, D), a (N, D), b and c (Q, R, N), and the state (B, D, N)."""
    grad_xdt, grad_dt, grad_a = torch.empty_like(p.dt), torch.empty_like(p.dt), torch.zeros_like(p.a)
    grad_b, grad_c = torch.empty_like(p.b), torch.empty_like(p.c)
    blocks = p.blocks()
    buffer = starts.new_empty(2 * p.size + 1, blocks[0].stop, *p.a.shape)
    for rows in reversed(blocks):
        start = starts[rows]
        states, decays = buffer[:, : len(start)].split([p.size + 1, p.size])  # states before and after each position
        states[0] = start
        for q in range(p.size):
            torch.mul(states[q], p.decay(q, rows, decays[q]), out=states[q + 1])
            p.update(states[q + 1], q, rows)

        # The gradient of the state before a position: first what each chunk adds, then from its end's true gradient.
        back = torch.zeros_like(start)
        if len(start) > p.batch:
            for q in reversed(range(p.size)):
                back.addcmul_(p.c[q, rows, :, None], grad_y[q, rows, None]).mul_(decays[q])
            passing = p.passing(rows)
            for low in reversed(range(0, len(start), p.batch)):
                one = slice(low, low + p.batch)
                before = torch.addcmul(back[one], passing[one], grad)
                back[one] = grad
                grad = before
        else:
            back.copy_(grad)
        sums = torch.zeros_like(start)
        for q in reversed(range(p.size)):
            gy = grad_y[q, rows, None]  # (S, 1, D)
            back.addcmul_(p.c[q, rows, :, None], gy)  # now of the state after position q
            torch.bmm(p.b[q, rows, None], back, out=grad_xdt[q, rows, None])
            torch.bmm(p.xdt[q, rows, None], back.transpose(1, 2), out=grad_b[q, rows, None])
            torch.bmm(gy, states[q + 1].transpose(1, 2), out=grad_c[q, rows, None])
            back.mul_(decays[q])
            product = torch.mul(back, states[q], out=decays[q])  # of dt_q A
            sums.addcmul_(product, p.dt[q, rows, None])
            torch.sum(product.mul_(p.a), 1, out=grad_dt[q, rows])
        grad_a += sums.sum(0)
        grad = back[: p.batch].clone()
    return grad_xdt, grad_dt, grad_a, grad_b, grad_c, grad.transpose(1, 2).contiguous()


def _plain(p: _Chunks, dtype: torch.dtype, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """Run the scan as one block of plain operations, which autograd follows."""

    def pass_on(h: Tensor, q: int) -> Tensor:
        return h * decays[q] + p.b[q, :, :, None] * p.xdt[q, :, None]

    decays = (p.dt[:, :, None] * p.a).exp()  # (Q, R, N, D)
    if p.keep is not None:
        decays = decays * p.keep[:, :, None]
    added = torch.zeros_like(decays[0])
    for q in range(p.size):
        added = pass_on(added, q)
    state = torch.zeros_like(added[: p.batch]) if initial_state is None else initial_state.float().transpose(1, 2)
    states = []
    for left, new in zip(decays.prod(0).split(p.batch), added.split(p.batch), strict=True):
        states.append(state)
        state = left * state + new
    h, outputs = torch.cat(states), []
    for q in range(p.size):
        h = pass_on(h, q)
        outputs.append((h * p.c[q, :, :, None]).sum(1))
    return p.join(torch.stack(outputs)).to(dtype), state.transpose(1, 2)


def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    state: Tensor | None,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the output (B, T, D), the final state (B, D, N), and the state at the start of every chunk (R, N, D)."""
    chunks = _Chunks(x, dt, A, B, C, segments, chunk_size)
    start = chunks.a.new_zeros(chunks.batch, *chunks.a.shape) if state is None else state.float().transpose(1, 2)
    y, final, starts = _advance(chunks, start)
    return chunks.join(y).to(x.dtype), final.transpose(1, 2).contiguous(), starts


def _backward(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    segments: Tensor | None,
    starts: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, dt, A, B and C in their dtypes, and of the initial state in float32."""
    chunks = _Chunks(x, dt, A, B, C, segments, chunk_size)
    grad = grad_state.float().transpose(1, 2)
    xdt, decay, a, b, c, state = _retreat(chunks, starts, chunks.split(grad_y), grad)
    xdt = chunks.join(xdt)
    return (
        (xdt * dt).to(x.dtype),
        chunks.join(decay).addcmul_(xdt, x.float()).to(dt.dtype),
        a.T.contiguous().to(A.dtype),
        chunks.join(b).to(B.dtype),
        chunks.join(c).to(C.dtype),
        state,
    )


def _forward_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    state: Tensor | None,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = -(-x.shape[1] // chunk_size) * x.shape[0]
    final = x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)
    return x.new_empty(x.shape), final, final.new_empty(rows, A.shape[1], A.shape[0])


def _backward_shapes(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    segments: Tensor | None,
    starts: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, dt, a, b, c = (t.new_empty(t.shape) for t in (x, dt, A, B, C))
    return x, dt, a, b, c, grad_state.new_empty(grad_state.shape, dtype=torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, state, segments, chunk_size = inputs
    ctx.save_for_backward(*tensors, segments, output[2])
    ctx.chunk_size, ctx.state_dtype = chunk_size, None if state is None else state.dtype
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *grads, state = _backward_op(grad_y, grad_state, *ctx.saved_tensors, ctx.chunk_size)
    return *grads, None if ctx.state_dtype is None else state.to(ctx.state_dtype), None, None


_forward_op = torch.library.custom_op("vertebra::selective_scan", _forward, mutates_args=())
_backward_op = torch.library.custom_op("vertebra::selective_scan_backward", _backward, mutates_args=())
_forward_op.register_fake(_forward_shapes)
_backward_op.register_fake(_backward_shapes)
_forward_op.register_autograd(_gradients, setup_context=_keep)
