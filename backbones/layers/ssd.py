"""State-space duality: the scan of Mamba-2 (https://arxiv.org/abs/2405.21060), section 6.

Shapes: B batch, T positions, H heads, P head width, G groups, R = H/G heads a group, N state width, Q chunk, C chunks.

The recurrence of a head is h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T (P x N), y_t = h_t C_t + D x_t. Here it is cut
into chunks: quadratic and matmul-rich inside a chunk, linear from chunk to chunk. Decays and states are float32.

| implementation | what runs |
| --- | --- |
| torch | blocks of chunks with a hand-written backward pass, on any device: ``ssd_blocks.py`` |
| compiled | the chunked form as plain operations, through ``torch.compile`` |
| fla | Triton kernels of ``fla-core`` (the extra ``gpu``), CUDA only |
| mamba_ssm | Triton kernels of ``mamba_ssm`` where it is installed, CUDA only |
| auto | fla or mamba_ssm on CUDA where installed, else torch; ``VERTEBRA_SSD`` names another one |
"""

from __future__ import annotations

import functools
import os
from importlib.util import find_spec
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.backbones.layers.sizes import is_fixed
from vertebra.backbones.layers.ssd_blocks import forward_op
from vertebra.errors import ConfigError, MissingExtraError

Implementation = Literal["auto", "torch", "compiled", "fla", "mamba_ssm"]

MOST_CHUNKS = 32
"""Chunks whose states are passed on by one product: quadratic in them, but without a loop for a compiler to unroll."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    *,
    D: Tensor | None = None,  # noqa: N803
    chunk_size: int | None = None,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    implementation: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the scan over whole sequences; the same numbers whatever runs.

    Args:
        x: Input, shape (B, T, H, P).
        dt: Step sizes, positive (0 leaves the state as it is), shape (B, T, H).
        A: State decay, negative, shape (H,).
        B: Input projection, shape (B, T, G, N); head j uses group j // R.
        C: Output projection, shape (B, T, G, N).
        D: Skip: D x is added to the output, x not multiplied by dt, shape (H,); None for none.
        chunk_size: Largest Q; None for the fastest. The result does not depend on it.
        initial_state: State before the first position, shape (B, H, P, N); zero when None.
        segments: Packed sequence of each position, int (B, T), each in one piece; the state starts from zero at
            each one's first position (``initial_state`` belongs to the first sequence).
        implementation: What runs; see the table at the top.

    Returns:
        The output (B, T, H, P) in the dtype of ``x``, and the final state (B, H, P, N) in float32.

    Raises:
        ConfigError: No such implementation, or it cannot run here.
        MissingExtraError: Its package is not installed.
    """
    chosen = choose_implementation(implementation, x.device.type)
    if torch.compiler.is_exporting():  # a program must not depend on an operator of ours
        if not is_fixed(x.shape[1]) and segments is None:
            return ssd_quadratic(x, dt, A, B, C, D, initial_state)
        return ssd_chunked(x, dt, A, B, C, D, chunk_size or 64, initial_state, segments)
    if chosen == "fla":
        return _fla(x, dt, A, B, C, D, initial_state, segments)
    if chosen == "mamba_ssm":
        return _mamba_ssm(x, dt, A, B, C, D, chunk_size or 256, initial_state, segments)
    if chosen == "compiled":
        return ssd_chunked(x, dt, A, B, C, D, chunk_size or 64, initial_state, segments, run=_compiled())
    skip = None if D is None else D.float()
    y, state, _ = forward_op(x, dt, A.float(), B, C, skip, initial_state, segments, chunk_size or 64)
    return y, state


def choose_implementation(wanted: Implementation, device: str) -> Implementation:
    """Return what runs on a device type, never ``auto``.

    Raises:
        ConfigError: No such implementation, or it needs CUDA.
        MissingExtraError: Its package is not installed.
    """
    known = get_args(Implementation)
    if wanted == "auto":
        wanted = cast(Implementation, os.environ.get("VERTEBRA_SSD", "auto"))
    if wanted not in known:
        raise ConfigError(f"ssd: implementation must be one of {', '.join(known)}, got {wanted!r}.")
    if wanted == "auto":
        if device == "cuda":
            return "fla" if _installed("fla") else "mamba_ssm" if _installed("mamba_ssm") else "torch"
        return "torch"
    if wanted in ("fla", "mamba_ssm"):
        if not _installed(wanted):
            package = "fla-core" if wanted == "fla" else "mamba_ssm"
            raise MissingExtraError(package, "gpu", f"ssd with implementation {wanted!r}")
        if device != "cuda":
            raise ConfigError(f"ssd: implementation {wanted!r} needs CUDA, got tensors on {device}; use 'torch' there.")
    return wanted


@functools.cache
def _installed(name: str) -> bool:
    return find_spec(name) is not None


@functools.cache
def _compiled() -> Any:
    return torch.compile(_chunks, dynamic=False)


def _fla(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,  # noqa: N803
    initial_state: Tensor | None, segments: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run simple gated linear attention: q = C, k = B, v = dt x, log of the gate = dt A, scale 1."""
    from fla.ops.simple_gla import chunk_simple_gla

    batch, length, heads, _ = x.shape
    repeats = heads // B.shape[2]
    q, k = (t.repeat_interleave(repeats, 2).to(x.dtype) for t in (C, B))
    v, gate = (x * dt[..., None]).to(x.dtype), dt.float() * A.float()
    states = None if initial_state is None else initial_state.float().transpose(-1, -2).contiguous()  # (B, H, N, P)
    bounds, last = None, None
    if segments is not None:
        first = torch.ones_like(segments, dtype=torch.bool)
        first[:, 1:] = segments[:, 1:] != segments[:, :-1]
        starts = first.flatten().nonzero()[:, 0]
        bounds = torch.cat([starts, starts.new_tensor([batch * length])])
        q, k, v, gate = (t.flatten(0, 1)[None] for t in (q, k, v, gate))
        rows = first.sum(1).cumsum(0)  # sequences up to the end of each row
        last = rows - 1
        if states is not None:
            all_states = states.new_zeros(len(starts), *states.shape[1:])
            all_states[rows - first.sum(1)] = states
            states = all_states
    y, final = chunk_simple_gla(
        q, k, v, gate, scale=1.0, initial_state=states, output_final_state=True, cu_seqlens=bounds
    )
    y = y.reshape(x.shape)
    if D is not None:
        y = y + x * D.to(x.dtype)[:, None]
    final = final if last is None else final[last]
    return y.to(x.dtype), final.float().transpose(-1, -2)


def _mamba_ssm(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,  # noqa: N803
    chunk_size: int, initial_state: Tensor | None, segments: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    y, final = mamba_chunk_scan_combined(
        x, dt, A.float(), B, C, chunk_size, D=D, initial_states=initial_state, return_final_states=True,
        seq_idx=None if segments is None else segments.to(torch.int32),
    )  # fmt: skip
    return y, final.float()


def ssd_chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    chunk_size: int = 64,
    initial_state: Tensor | None = None,
    segments: Tensor | None = None,
    run: Any = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan as plain operations, for ``torch.export`` and for ``compiled``; arguments as in ``ssd``.

    ``run`` is ``_chunks``, or a compiled form of it; it is given ``MOST_CHUNKS`` chunks at a time.
    """
    run = run or _chunks
    batch, _, heads, width = x.shape
    state = x.new_zeros(batch, heads, width, B.shape[3], dtype=torch.float32)
    if initial_state is not None:
        state = initial_state.float()
    parts = []
    before = None
    pieces = [t.split(MOST_CHUNKS * chunk_size, dim=1) for t in (x, dt, B, C)]
    ids = [None] * len(pieces[0]) if segments is None else segments.split(MOST_CHUNKS * chunk_size, dim=1)
    for *arrays, own in zip(*pieces, ids, strict=True):
        if own is not None and before is not None:
            state = state * (own[:, 0] == before)[:, None, None, None]
        before = None if own is None else own[:, -1]
        y, state = run(*arrays, A, state, own, chunk_size)
        parts.append(y)
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if D is not None:
        y = y + x * D.to(x.dtype)[:, None]
    return y, state


def _chunks(
    x: Tensor,
    dt: Tensor,
    b: Tensor,
    c: Tensor,
    decay: Tensor,
    state: Tensor,
    segments: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    length, groups = x.shape[1], b.shape[2]
    chunks = -(-length // chunk_size)
    chunk_size = -(-length // chunks)  # evenly, so that little is padded
    pad = chunks * chunk_size - length  # dt = 0 there: no decay, no input

    def chunked(t: Tensor) -> Tensor:  # (B, T, ...) -> (B, C, Q, ...)
        t = F.pad(t.float(), (0, 0) * (t.ndim - 2) + (0, pad)) if pad else t.float()
        return t.unflatten(1, (chunks, chunk_size))

    log = chunked(dt * decay.float()).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2)  # (B, C, G, R, Q)
    xdt = chunked(x.float() * dt[..., None])
    xdt = xdt.unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)  # (B, C, G, R, Q, P)
    b, c = (chunked(t).transpose(2, 3) for t in (b, c))  # (B, C, G, Q, N)
    total = log.cumsum(-1)  # (B, C, G, R, Q)
    seen = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).tril()
    into, out = total.exp(), (total[..., -1:] - total).exp()  # from the state before, to the state after
    reach = torch.ones(chunks + 1, chunks + 1, dtype=torch.bool, device=x.device).tril()
    if segments is not None:
        ids = F.pad(segments[:, None].float(), (0, pad), mode="replicate")[:, 0] if pad else segments.float()
        ids = ids.unflatten(1, (chunks, chunk_size))  # (B, C, Q)
        last = ids[:, :, -1]
        before = torch.cat([ids[:, :1, 0], last[:, :-1]], dim=1)  # (B, C): the sequence the carried state belongs to
        seen = (seen & (ids[..., None] == ids[..., None, :]))[:, :, None, None]  # (B, C, 1, 1, Q, Q)
        into = into * (ids == before[..., None])[:, :, None, None]
        out = out * (ids == last[..., None])[:, :, None, None]
        stops = F.pad((before != last).int().cumsum(1), (1, 0))  # (B, C+1)
        reach = (reach & (stops[:, :, None] == stops[:, None]))[:, None, None]  # (B, 1, 1, C+1, C+1)

    # Within chunks. The mask comes before exp: above the diagonal the difference is positive and may overflow.
    gaps = (total[..., :, None] - total[..., None, :]).masked_fill(~seen, -torch.inf)  # (B, C, G, R, Q, Q)
    scores = (c @ b.transpose(-1, -2))[:, :, :, None]  # (B, C, G, 1, Q, Q)
    y = (scores * gaps.exp()) @ xdt  # (B, C, G, R, Q, P)

    # From chunk to chunk, by the same masked form.
    added = (xdt * out[..., None]).transpose(-1, -2) @ b[:, :, :, None]  # (B, C, G, R, P, N)
    items = torch.cat([state.unflatten(1, (groups, -1))[:, None], added], dim=1).movedim(1, 3)  # (B, G, R, C+1, P, N)
    along = F.pad(total[..., -1].cumsum(1), (0, 0, 0, 0, 1, 0)).movedim(1, 3)  # (B, G, R, C+1)
    gaps = (along[..., :, None] - along[..., None, :]).masked_fill(~reach, -torch.inf)  # (B, G, R, C+1, C+1)
    states = (gaps.exp() @ items.flatten(4)).unflatten(-1, items.shape[4:])  # (B, G, R, C+1, P, N)

    off = c[:, :, :, None] @ states[:, :, :, :-1].movedim(3, 1).transpose(-1, -2)  # (B, C, G, R, Q, P)
    y = y + off * into[..., None]
    y = y.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)[:, :length]  # (B, T, H, P)
    return y.to(x.dtype), states[:, :, :, -1].flatten(1, 2)


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
        state: State before, shape (B, H, P, N), float32; where no gradient is asked for it is advanced in place.

    Returns:
        The output (B, H, P) in the dtype of ``x``, and the state after.
    """
    batch, heads, width = x.shape
    groups = B.shape[1]
    decay = (dt * A.float()).exp()[..., None, None]  # (B, H, 1, 1)
    xdt = (x.float() * dt[..., None]).view(batch, groups, -1, 1)  # (B, G, R*P, 1)
    state = state * decay if torch.is_grad_enabled() else state.mul_(decay)
    grouped = state.view(batch, groups, heads // groups * width, -1)  # (B, G, R*P, N): a group shares B and C
    b, c = B.float()[:, :, None], C.float()[..., None]  # (B, G, 1, N), (B, G, N, 1)
    grouped = torch.addcmul(grouped, xdt, b) if torch.is_grad_enabled() else grouped.addcmul_(xdt, b)
    return (grouped @ c).view(x.shape).to(x.dtype), grouped.view(state.shape)


def ssd_quadratic(
    x: Tensor,
    dt: Tensor,
    A: Tensor,  # noqa: N803
    B: Tensor,  # noqa: N803
    C: Tensor,  # noqa: N803
    D: Tensor | None = None,  # noqa: N803
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the scan as masked attention, in time and memory quadratic in T; arguments and results as in ``ssd``.

    This is the form of exported programs that take any length: it has no chunk whose number a program would have to
    know. Long sequences are read by such programs in pieces, with the state carried.
    """
    repeats = x.shape[2] // B.shape[2]
    b, c = (t.float().repeat_interleave(repeats, 2).transpose(1, 2) for t in (B, C))  # (B, H, T, N)
    u = (x.float() * dt[..., None]).transpose(1, 2)  # (B, H, T, P)
    total = (dt * A.float()).double().cumsum(1).transpose(1, 2)  # (B, H, T); float32 would lose digits of long sums
    place = torch.arange(x.shape[1], device=x.device)
    gaps = (total[..., :, None] - total[..., None, :]).float()  # (B, H, T, T)
    weights = (c @ b.transpose(-1, -2)) * gaps.masked_fill(place[:, None] < place, -torch.inf).exp()
    y = weights @ u
    left = (total[..., -1:] - total).exp().float()  # (B, H, T): what is left at the end
    state = (u * left[..., None]).transpose(-1, -2) @ b  # (B, H, P, N)
    if initial_state is not None:
        into = total.exp().float()[..., None]
        y = y + into * (c @ initial_state.transpose(-1, -2))
        state = state + into[:, :, -1:] * initial_state
    y = y.transpose(1, 2).to(x.dtype)
    if D is not None:
        y = y + x * D.to(x.dtype)[:, None]
    return y, state


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
