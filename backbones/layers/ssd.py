"""State-space duality: the scan of Mamba-2 (https://arxiv.org/abs/2405.21060), section 6.

Shapes: B batch, T positions, H heads, P head width, G groups, R = H/G heads a group, N state width, Q chunk, C chunks.

The recurrence of a head is h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T (P x N), y_t = h_t C_t. Here it is cut into
chunks: quadratic and matmul-rich inside a chunk, linear from chunk to chunk. Decays and states are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan over whole sequences, without the skip term D x.

    Args:
        x: Input, shape (B, T, H, P).
        dt: Step sizes, positive (0 leaves the state as it is), shape (B, T, H).
        A: State decay, negative, shape (H,).
        B: Input projection, shape (B, T, G, N); head j uses group j // R.
        C: Output projection, shape (B, T, G, N).
        chunk_size: Largest Q; the result does not depend on it.
        initial_state: State before the first position, shape (B, H, P, N); zero when None.
        segments: Packed sequence of each position, int (B, T), each in one piece; the state starts from zero at
            each one's first position (``initial_state`` belongs to the first sequence).

    Returns:
        The output (B, T, H, P) in the dtype of ``x``, and the final state (B, H, P, N) in float32.
    """
    length, groups = x.shape[1], B.shape[2]
    chunks = -(-length // chunk_size)
    chunk_size = -(-length // chunks)  # evenly, so that little is padded
    pad = chunks * chunk_size - length  # dt = 0 there: no decay, no input

    def chunked(t: Tensor) -> Tensor:  # (B, T, ...) -> (B, C, Q, ...)
        t = F.pad(t.float(), (0, 0) * (t.ndim - 2) + (0, pad)) if pad else t.float()
        return t.unflatten(1, (chunks, chunk_size))

    decay = chunked(dt * A.float()).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # (B, C, G, R, Q)
    xdt = chunked(x.float() * dt[..., None])
    xdt = xdt.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)  # (B, C, G, R, Q, P)
    b = chunked(B).transpose(2, 3)  # (B, C, G, Q, N)
    c = chunked(C).transpose(2, 3)  # (B, C, G, Q, N)

    total = decay.cumsum(-1)  # (B, C, G, R, Q)
    seen = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    carried = kept = flows = None
    if segments is not None:
        ids = F.pad(segments[:, None].float(), (0, pad), mode="replicate")[:, 0] if pad else segments.float()
        ids = ids.unflatten(1, (chunks, chunk_size))  # (B, C, Q)
        last = ids[:, :, -1]
        before = torch.cat([ids[:, :1, 0], last[:, :-1]], dim=1)  # (B, C): the sequence the carried state belongs to
        seen = (seen & (ids[..., None] == ids[..., None, :]))[:, :, None, None]  # (B, C, 1, 1, Q, Q)
        carried = (ids == before[..., None])[:, :, None, None, :, None]  # (B, C, 1, 1, Q, 1)
        kept = (ids == last[..., None])[:, :, None, None, :]  # (B, C, 1, 1, Q)
        flows = (before == last)[:, :, None, None]  # (B, C, 1, 1)

    # Within chunks. The mask comes before exp: above the diagonal the difference is positive and may overflow.
    gaps = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf)  # (B, C, G, R, Q, Q)
    scores = (c @ b.transpose(-1, -2))[:, :, :, None]  # (B, C, G, 1, Q, Q)
    y = (scores * gaps.exp()) @ xdt  # (B, C, G, R, Q, P)

    # What each chunk adds to the state.
    remaining = (total[..., -1:] - total).exp()  # (B, C, G, R, Q)
    if kept is not None:
        remaining = remaining * kept
    weighted = (xdt * remaining[..., None]).transpose(-1, -2)  # (B, C, G, R, P, Q)
    added = weighted.flatten(3, 4) @ b  # (B, C, G, R*P, N)
    added = added.unflatten(3, (decay.shape[3], -1))  # (B, C, G, R, P, N)

    # From chunk to chunk.
    passing = total[..., -1].exp()  # (B, C, G, R)
    if flows is not None:
        passing = passing * flows
    state = torch.zeros_like(added[:, 0])  # (B, G, R, P, N)
    if initial_state is not None:
        state = initial_state.float().unflatten(1, (groups, -1))
    states = []
    # unbind, not indexing: the gradient of every index is as large as all chunks
    for decayed, new in zip(passing[..., None, None].unbind(1), added.unbind(1), strict=True):
        states.append(state)
        state = decayed * state + new
    before_chunk = torch.stack(states, dim=1)  # (B, C, G, R, P, N)

    off = c @ before_chunk.flatten(3, 4).transpose(-1, -2)  # (B, C, G, Q, R*P)
    off = off.unflatten(-1, (decay.shape[3], -1)).transpose(3, 4)  # (B, C, G, R, Q, P)
    off = off * total.exp()[..., None]
    y = y + (off if carried is None else off * carried)

    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length]  # (B, T, H, P)
    return y.to(x.dtype), state.flatten(1, 2)


def ssd_step(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Advance the recurrence by one position.

    Args:
        x: Input, shape (B, H, P).
        dt: Step size, shape (B, H).
        A: State decay, negative, shape (H,).
        B: Input projection, shape (B, G, N).
        C: Output projection, shape (B, G, N).
        state: State before, shape (B, H, P, N), float32.

    Returns:
        The output (B, H, P) in the dtype of ``x``, and the state after.
    """
    repeats = x.shape[1] // B.shape[1]
    b, c = (t.float().repeat_interleave(repeats, 1) for t in (B, C))  # (B, H, N)
    decay = (dt * A.float()).exp()[..., None, None]  # (B, H, 1, 1)
    state = decay * state + (dt[..., None] * x.float())[..., None] * b[..., None, :]
    return (state @ c[..., None])[..., 0].to(x.dtype), state


def ssd_matrix(dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:  # noqa: N803
    """Return the matrix M (B, H, T, T) with ``y = M x`` over time: the scan as masked attention (equation 20).

    Args:
        dt: Step sizes, shape (B, T, H).
        A: State decay, negative, shape (H,).
        B: Input projection, shape (B, T, G, N).
        C: Output projection, shape (B, T, G, N).
    """
    repeats = dt.shape[2] // B.shape[2]
    b, c = (t.float().repeat_interleave(repeats, 2).transpose(1, 2) for t in (B, C))  # (B, H, T, N)
    total = (dt * A.float()).cumsum(1).transpose(1, 2)  # (B, H, T)
    gaps = total[..., :, None] - total[..., None, :]  # (B, H, T, T)
    future = torch.ones(gaps.shape[-2:], dtype=torch.bool, device=dt.device).triu(1)
    return (c @ b.transpose(-1, -2)) * gaps.masked_fill(future, -torch.inf).exp() * dt.transpose(1, 2)[..., None, :]
