"""The chunked scan of Mamba-2 with a hand-written backward pass, block by block of the sequence.

Shapes: B batch, T positions, H heads, P head width, G groups, R = H/G heads a group, N state width, Q chunk, C chunks.

With u = dt x, cs the sum of dt A from the chunk's start, S = C B^T below the diagonal, h the state before the chunk
(N x P), a chunk's output is one product of two factors, ``y = [exp(cs_i - cs_j) S_ij | exp(cs_i) C_i] [u; h]``, and the
state after it is ``exp(cs_Q) h + (exp(cs_Q - cs_j) B_j)^T u``. A block is as many chunks as fit the processor's cache;
its buffers are used again by the next one. Nothing of a block is kept but the state before it: the backward pass makes
the factors again.

The gradient of cs_i needs no product of its own: it is ``dy_i . y_i - u_i . du_i`` (all that flows out of row i, less
all that flows out of column i), and ``dh . h`` of the state after the chunk at its end.

Both passes are operators of ``torch.library``, which ``torch.compile`` takes as they are: no graph break, no unrolled
loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

LOWEST = -80.0
"""Smallest exponent: exp(-80) is nothing beside 1 in float32, and still far from slow subnormal numbers."""
CACHE_FLOATS = 1 << 19
"""Floats of the widest buffer of a block on a CPU: 2 MiB."""
CUDA_FLOATS = 1 << 26


@dataclass
class _Factors:
    """What a block of C chunks is made of."""

    left: Tensor  # [decayed scores | decayed C], (B, C, G, R, Q, Q+N)
    right: Tensor  # [u; state before], (B, C, G, R, Q+N, P)
    scores: Tensor  # C B^T below the diagonal, (B, C, G, Q, Q)
    decay: Tensor  # exp(cs_i - cs_j), 1 above the diagonal, (B, C, G, R, Q, Q); the memory of left's first part
    into: Tensor  # exp(cs_i): from the state before, (B, C, G, R, Q)
    out: Tensor  # exp(cs_Q - cs_j): to the state after, (B, C, G, R, Q)
    b: Tensor  # (B, C, G, Q, N)
    c: Tensor  # (B, C, G, Q, N)
    b_out: Tensor  # out * b, (B, C, G, R, Q, N)
    seen: Tensor | None  # pairs of one sequence, (B, C, 1, Q, Q)


def _plan(x: Tensor, b: Tensor, chunk_size: int) -> tuple[int, int, int]:
    """Return positions of a chunk, chunks of a block, and the number of blocks."""
    batch, length, heads = x.shape[:3]
    chunks = -(-length // chunk_size)
    chunk = -(-length // chunks)  # evenly, so that little is padded
    row = batch * heads * chunk * (chunk + b.shape[3])
    budget = CACHE_FLOATS if x.device.type == "cpu" else CUDA_FLOATS
    per_block = max(1, min(chunks, budget // row))
    return chunk, per_block, -(-length // (per_block * chunk))


class _Blocks:
    """Cuts inputs into blocks and holds the buffers that all blocks share."""

    def __init__(
        self, x: Tensor, dt: Tensor, decay: Tensor, b: Tensor, c: Tensor, segments: Tensor | None, chunk_size: int
    ) -> None:
        self.batch, _, heads, self.width = x.shape
        self.groups, self.state_dim = b.shape[2:]
        self.per_group = heads // self.groups
        self.x, self.dt, self.decay, self.b, self.c = x, dt, decay, b, c
        self.chunk, self.chunks, self.count = _plan(x, b, chunk_size)
        self.step = self.chunks * self.chunk
        self.segments = None
        if segments is not None:
            ids = segments.to(x.device)
            before = torch.cat([ids[:, :1], ids[:, :-1]], dim=1)[:, :: self.chunk]  # of each chunk's first position
            self.segments = (ids, before)
        q, n, p = self.chunk, self.state_dim, self.width
        lead = (self.batch, self.chunks, self.groups, self.per_group)
        floats = torch.empty((), dtype=torch.float32, device=x.device)
        self.left = floats.new_empty(*lead, q, q + n)
        self.right = floats.new_empty(lead[0], lead[1] + 1, *lead[2:], q + n, p)
        self.b_out = floats.new_empty(*lead, q, n)

    def cut(self, t: Tensor, block: int) -> Tensor:
        """Return the block of t (B, T, ...) as chunks (B, C, Q, ...), the last one padded with zeros."""
        t = t[:, block * self.step : (block + 1) * self.step]
        pad = -t.shape[1] % self.chunk
        if pad:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, pad))
        return t.unflatten(1, (-1, self.chunk))

    def heads_first(self, t: Tensor) -> Tensor:
        """Turn (B, C, Q, H, ...) into (B, C, G, R, Q, ...), a view."""
        return t.unflatten(3, (self.groups, -1)).movedim(2, 4)

    def positions_first(self, t: Tensor) -> Tensor:
        """Turn (B, C, G, R, Q, ...) into (B, C, Q, H, ...), a view."""
        return t.flatten(2, 3).movedim(3, 2)

    def store(self, t: Tensor, block: int, target: Tensor) -> None:
        """Write chunks (B, C, Q, ...) to their place in target (B, T, ...)."""
        place = target[:, block * self.step : (block + 1) * self.step]
        place.copy_(t.flatten(1, 2)[:, : place.shape[1]])

    def make(self, block: int) -> _Factors:
        """Make the factors of a block; the state before it must stand in ``right[:, 0]``."""
        q = self.chunk
        dt = self.heads_first(self.cut(self.dt, block))  # (B, C, G, R, Q)
        x = self.heads_first(self.cut(self.x, block))  # (B, C, G, R, Q, P)
        b = self.cut(self.b, block).transpose(2, 3).float()
        c = self.cut(self.c, block).transpose(2, 3).float()
        chunks = dt.shape[1]
        left, right, b_out = self.left[:, :chunks], self.right[:, :chunks], self.b_out[:, :chunks]
        total = (dt * self.decay.view(self.groups, -1, 1)).cumsum(-1)  # (B, C, G, R, Q)
        into = total.clamp(min=LOWEST).exp_()
        out = (total[..., -1:] - total).clamp_(min=LOWEST).exp_()
        scores = (c @ b.transpose(-1, -2)).tril_()
        seen = None
        if self.segments is not None:
            ids, before = self.segments
            at = block * self.step
            own = ids[:, at : at + self.step]
            pad = -own.shape[1] % q
            own = F.pad(own[:, None].float(), (0, pad), mode="replicate")[:, 0] if pad else own
            own = own.unflatten(1, (-1, q))  # (B, C, Q)
            first = before[:, block * self.chunks : block * self.chunks + chunks, None]
            seen = (own[..., None] == own[..., None, :])[:, :, None]
            scores.mul_(seen)
            into.mul_((own == first)[:, :, None, None])
            out.mul_((own == own[..., -1:])[:, :, None, None])
        decay = left[..., :q]
        torch.sub(total[..., :, None], total[..., None, :], out=decay)
        decay.clamp_(LOWEST, 0.0).exp_()  # above the diagonal the difference is positive
        torch.mul(c[:, :, :, None], into[..., None], out=left[..., q:])
        torch.mul(x, dt[..., None], out=right[..., :q, :])
        torch.mul(b[:, :, :, None], out[..., None], out=b_out)
        return _Factors(left, right, scores, decay, into, out, b, c, b_out, seen)

    def pass_states(self, f: _Factors) -> None:
        """Fill the states before all chunks, and the one after the block in ``right[:, C]``."""
        q = self.chunk
        added = f.b_out.transpose(-1, -2) @ f.right[..., :q, :]  # (B, C, G, R, N, P)
        states = self.right[..., q:, :]
        kept = f.into[..., -1, None, None]  # (B, C, G, R, 1, 1)
        for i in range(added.shape[1]):
            torch.addcmul(added[:, i], states[:, i], kept[:, i], out=states[:, i + 1])

    def begin(self, state: Tensor | None) -> None:
        """Put the state (B, H, P, N) before the first chunk."""
        place = self.right[:, 0, :, :, self.chunk :]
        if state is None:
            place.zero_()
        else:
            place.copy_(state.unflatten(1, (self.groups, -1)).transpose(-1, -2))

    def next_block(self, chunks: int) -> Tensor:
        """Move the state after ``chunks`` chunks to the front; return a view of it (B, G, R, N, P)."""
        states = self.right[..., self.chunk :, :]
        states[:, 0].copy_(states[:, chunks])
        return states[:, 0]


def _forward(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _Blocks(x, dt, decay, b, c, segments, chunk_size)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    blocks.begin(state)
    saved = torch.empty(blocks.count, *blocks.right[:, 0, :, :, blocks.chunk :].shape, device=x.device)
    end = blocks.right[:, 0, :, :, blocks.chunk :]
    for i in range(blocks.count):
        saved[i] = end
        f = blocks.make(i)
        f.decay.mul_(f.scores[:, :, :, None])
        blocks.pass_states(f)
        part = blocks.positions_first(f.left @ f.right)  # (B, C, Q, H, P)
        if skip is not None:
            part = torch.addcmul(part, blocks.cut(x, i), skip[:, None])
        blocks.store(part, i, y)
        end = blocks.next_block(f.left.shape[1])
    return y, end.transpose(-1, -2).flatten(1, 2).contiguous(), saved


def _backward(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    segments: Tensor | None,
    saved: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    blocks = _Blocks(x, dt, decay, b, c, segments, chunk_size)
    q, groups = blocks.chunk, blocks.groups
    dx, ddt, db, dc = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, dt, b, c))
    ddecay = torch.zeros(groups, blocks.per_group, device=x.device)
    dskip = torch.zeros(x.shape[2], device=x.device)
    later = torch.zeros_like(blocks.right[:, :, :, :, q:])  # gradient of the state after each chunk, (B, C+1, ...)
    if dstate is not None:
        later[:, -1] = dstate.unflatten(1, (groups, -1)).transpose(-1, -2)
    dleft, dy_buffer = torch.empty_like(blocks.left), torch.empty_like(blocks.right[:, :-1, :, :, :q])
    for i in reversed(range(blocks.count)):
        blocks.right[:, 0, :, :, q:] = saved[i]
        f = blocks.make(i)
        blocks.pass_states(f)
        chunks = f.left.shape[1]
        dy_part = blocks.heads_first(blocks.cut(dy, i))  # (B, C, G, R, Q, P)
        grad = dy_buffer[:, :chunks].copy_(dy_part)
        d_left = dleft[:, :chunks]
        torch.matmul(grad, f.right.transpose(-1, -2), out=d_left)  # (B, C, G, R, Q, Q+N)

        # To C B^T, then with the decays on both factors.
        dscores = torch.mul(d_left[..., :q], f.decay).sum(3).tril_()  # (B, C, G, Q, Q)
        if f.seen is not None:
            dscores.mul_(f.seen)
        f.decay.mul_(f.scores[:, :, :, None])  # from here on the factor whole
        dright = f.left.transpose(-1, -2) @ grad  # (B, C, G, R, Q+N, P)

        # Back through the states: ``after[:, j]`` is the gradient of the state after chunk j.
        after = later[:, -chunks - 1 :]
        kept = f.into[..., -1, None, None]
        for j in reversed(range(chunks)):
            torch.addcmul(dright[:, j, :, :, q:], after[:, j + 1], kept[:, j], out=after[:, j])
        after = after[:, 1:]
        states = blocks.right[:, 1 : chunks + 1, :, :, q:]
        du = dright[..., :q, :].add_(f.b_out @ after)  # (B, C, G, R, Q, P)
        db_out = f.right[..., :q, :] @ after.transpose(-1, -2)  # (B, C, G, R, Q, N)

        dc_part = dscores @ f.b + (d_left[..., q:] * f.into[..., None]).sum(3)  # (B, C, G, Q, N)
        db_part = dscores.transpose(-1, -2) @ f.c + db_out.mul_(f.out[..., None]).sum(3)
        blocks.store(dc_part.transpose(2, 3), i, dc)
        blocks.store(db_part.transpose(2, 3), i, db)

        x_part = blocks.heads_first(blocks.cut(x, i))
        dt_part = blocks.heads_first(blocks.cut(dt, i)).float()
        along = (du * x_part).sum(-1)  # (B, C, G, R, Q)
        dcs = d_left.mul_(f.left).sum(-1) - dt_part * along
        dcs[..., -1] += (after * states).sum((-1, -2))
        dlog = dcs.flip(-1).cumsum(-1).flip(-1)  # of dt A
        ddecay += (dlog * dt_part).sum((0, 1, 4))
        blocks.store(blocks.positions_first(dlog * decay.view(groups, -1, 1) + along), i, ddt)
        dx_part = du.mul_(dt_part[..., None])
        if skip is not None:
            dx_part.addcmul_(grad, skip.view(groups, -1, 1, 1))
            dskip += (grad * x_part).sum((0, 1, 4, 5)).flatten()
        blocks.store(blocks.positions_first(dx_part), i, dx)
        later[:, -1] = later[:, -chunks - 1]
    dinitial = later[:, -1].transpose(-1, -2).flatten(1, 2).contiguous()
    return dx, ddt, ddecay.flatten(), db, dc, dskip, dinitial


_INPUTS = "Tensor x, Tensor dt, Tensor decay, Tensor b, Tensor c, Tensor? skip"

forward_op = torch.library.custom_op(
    "vertebra::ssd",
    _forward,
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor? state, Tensor? segments, int chunk_size) -> (Tensor, Tensor, Tensor)",
)
backward_op = torch.library.custom_op(
    "vertebra::ssd_backward",
    _backward,
    mutates_args=(),
    schema=f"(Tensor dy, Tensor? dstate, {_INPUTS}, Tensor? segments, Tensor saved, int chunk_size)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


def _forward_shapes(
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, heads, width = x.shape
    groups, state_dim = b.shape[2:]
    _, _, count = _plan(x, b, chunk_size)
    floats = x.new_empty((), dtype=torch.float32)
    return (
        x.new_empty(x.shape),
        floats.new_empty(batch, heads, width, state_dim),
        floats.new_empty(count, batch, groups, heads // groups, state_dim, width),
    )


def _backward_shapes(
    dy: Tensor,
    dstate: Tensor | None,
    x: Tensor,
    dt: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    segments: Tensor | None,
    saved: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, _, heads, width = x.shape
    floats = x.new_empty((), dtype=torch.float32)
    x, dt, b, c = (t.new_empty(t.shape) for t in (x, dt, b, c))
    head, state = floats.new_empty(heads), floats.new_empty(batch, heads, width, b.shape[3])
    return x, dt, head, b, c, head.new_empty(heads), state


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, dt, decay, b, c, skip, _, segments, chunk_size = inputs
    ctx.save_for_backward(x, dt, decay, b, c, skip, segments, output[2])
    ctx.chunk_size = chunk_size
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, dy: Tensor | None, dstate: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    x, dt, decay, b, c, skip, segments, saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(x)
    inputs = (x, dt, decay, b, c, skip)
    *grads, dskip, dinitial = backward_op(dy, dstate, *inputs, segments, saved, ctx.chunk_size)
    wants_skip, wants_state = ctx.needs_input_grad[5:7]
    return (*grads, dskip if wants_skip else None, dinitial if wants_state else None, None, None)


forward_op.register_fake(_forward_shapes)
backward_op.register_fake(_backward_shapes)
forward_op.register_autograd(_gradients, setup_context=_keep)
