"""Mamba-2 as a token mixer (https://arxiv.org/abs/2405.21060, section 7; the layout of ``mamba_ssm.Mamba2``).

Shapes: B batch, T positions, D width, I inner width, H heads, P head width, G groups, N state width, K kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import Capabilities, Carried, MixerState, TokenMixer
from vertebra.backbones.layers.norm import GatedRMSNorm
from vertebra.backbones.layers.recurrent import RecurrentState, causal_conv, join_piece, leave_piece
from vertebra.backbones.layers.ssd import Implementation, ssd, ssd_matrix, ssd_step


@dataclass(frozen=True, kw_only=True)
class Mamba2Shape:
    """Sizes and limits of a Mamba-2 mixer.

    Args:
        inner_dim: Inner width I, H heads of width P.
        head_dim: Head width P.
        groups: Groups G that share B and C.
        state_dim: State width N.
        kernel: Taps K of the causal convolution.
        conv_bias: Whether the convolution has a bias.
        dt_limit: Step sizes are clamped to this range after softplus; None for no limits.
        norm_eps: Added to the mean square of the gated norm.
        chunk_size: Positions a chunk of the scan, None for the fastest; the result does not depend on it.
    """

    inner_dim: int
    head_dim: int = 64
    groups: int = 1
    state_dim: int = 128
    kernel: int = 4
    conv_bias: bool = True
    dt_limit: tuple[float, float] | None = None
    norm_eps: float = 1e-5
    chunk_size: int | None = None

    @property
    def num_heads(self) -> int:
        """Number of heads H."""
        return self.inner_dim // self.head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.inner_dim + 2 * self.groups * self.state_dim


class Mamba2(TokenMixer):
    """One projection, causal convolution, selective scan, gated norm, projection.

    Args:
        dim: Width D.
        shape: Inner sizes.
    """

    capabilities = Capabilities(bidirectional=False, carries=True)

    def __init__(self, dim: int, shape: Mamba2Shape) -> None:
        super().__init__()
        self.shape = shape
        self.implementation: Implementation = "auto"
        self.in_proj = nn.Linear(dim, shape.inner_dim + shape.conv_dim + shape.num_heads, bias=False)
        self.conv1d = nn.Conv1d(
            shape.conv_dim, shape.conv_dim, shape.kernel, groups=shape.conv_dim, bias=shape.conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(shape.num_heads))
        self.A_log = nn.Parameter(torch.empty(shape.num_heads))
        self.D = nn.Parameter(torch.ones(shape.num_heads))
        self.norm = GatedRMSNorm(shape.inner_dim, shape.groups, shape.norm_eps)
        self.out_proj = nn.Linear(shape.inner_dim, dim, bias=False)
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw step sizes log-uniform in (0.001, 0.1) and decays uniform in (1, 16), as the original does."""
        low, high = math.log(1e-3), math.log(0.1)
        dt = torch.exp(torch.rand_like(self.dt_bias) * (high - low) + low).clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        return self.carry(x, layout, None)[0]

    def carry(self, x: Tensor, layout: Layout, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Map a piece; carried are the last columns before the convolution, the scan's state, and their sequences."""
        mask, taps = layout.mask, self.shape.kernel - 1
        z, xbc, dt = self._project(x, mask)
        columns, ids, ssm = join_piece(
            xbc, layout.segments, carried, taps
        )  # before the convolution, (B, K-1+T, channels)
        xbc = causal_conv(columns, self.conv1d.weight, self.conv1d.bias, ids)
        y, ssm = self._scan(xbc, dt, mask, ssm, layout.segments)
        return self.out_proj(self.norm(y, z)), leave_piece(columns, ids, ssm, taps)

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        """Make the empty state; its size does not depend on ``max_len``."""
        s = self.shape
        conv = torch.zeros(batch, s.kernel - 1, s.conv_dim, dtype=dtype, device=device)
        ssm = torch.zeros(batch, s.num_heads, s.head_dim, s.state_dim, dtype=torch.float32, device=device)
        return RecurrentState(conv, ssm)

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D)."""
        assert isinstance(state, RecurrentState)
        layout = Layout(x.shape[0], x.shape[1], x.device, causal=True, mask=mask)
        y, (state.conv, state.ssm) = self.carry(x, layout, (state.conv, state.ssm))
        return y

    def mixing_matrix(self, x: Tensor) -> Tensor:
        """Return the matrix (B, H, T, T), with the skip term on its diagonal, that maps the convolved x over time."""
        _, xbc, dt = self._project(x, None)
        columns, _, _ = join_piece(xbc, None, None, self.shape.kernel - 1)
        _, b, c = self._split(causal_conv(columns, self.conv1d.weight, self.conv1d.bias))
        skip = torch.eye(x.shape[1], device=x.device) * self.D.float()[:, None, None]
        return ssd_matrix(self._step_sizes(dt, None), -self.A_log.float().exp(), b, c) + skip

    def _project(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gate z (B, T, I), the convolution's input (B, T, channels) and raw step sizes (B, T, H)."""
        s = self.shape
        if mask is not None:
            x = x * mask[..., None]
        z, xbc, dt = self.in_proj(x).split([s.inner_dim, s.conv_dim, s.num_heads], dim=-1)
        return z, xbc, dt

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (B, T, H, P), B and C (B, T, G, N)."""
        s = self.shape
        x, b, c = xbc.split([s.inner_dim, s.groups * s.state_dim, s.groups * s.state_dim], dim=-1)
        grouped = (s.groups, s.state_dim)
        return x.unflatten(-1, (s.num_heads, s.head_dim)), b.unflatten(-1, grouped), c.unflatten(-1, grouped)

    def _step_sizes(self, dt: Tensor, mask: Tensor | None) -> Tensor:
        """Return positive step sizes (B, T, H) in float32; 0 at padding, which leaves the state as it is."""
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if self.shape.dt_limit is not None:
            dt = dt.clamp(*self.shape.dt_limit)
        return dt if mask is None else dt * mask[..., None]

    def _scan(
        self, xbc: Tensor, dt: Tensor, mask: Tensor | None, state: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return y (B, T, I) and the state after."""
        if mask is not None:
            xbc = xbc * mask[..., None]  # the convolution's bias leaks into padding
        x, b, c = self._split(xbc)
        dt = self._step_sizes(dt, mask)
        a = -self.A_log.float().exp()
        if x.shape[1] == 1 and state is not None:
            y, state = ssd_step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
            y = y[:, None] + x * self.D.to(x.dtype)[:, None]  # the skip's x is not multiplied by dt
        else:
            y, state = ssd(
                x, dt, a, b, c, D=self.D, chunk_size=self.shape.chunk_size, initial_state=state, segments=segments,
                implementation=self.implementation,
            )  # fmt: skip
        return y.flatten(2), state


class BidirectionalMamba2(TokenMixer):
    """A Mamba-2 over the sequence plus another one over its reverse, outputs added.

    Args:
        dim: Width D.
        shape: Inner sizes of each direction.
    """

    capabilities = Capabilities(causal=False)

    def __init__(self, dim: int, shape: Mamba2Shape) -> None:
        super().__init__()
        self.ahead = Mamba2(dim, shape)
        self.back = Mamba2(dim, shape)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        return self.ahead(x, layout) + self.back(x.flip(1), layout.reversed()).flip(1)

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> MixerState:
        """Refuse: a later position changes earlier outputs."""
        raise TypeError("BidirectionalMamba2 has no state: a later position changes earlier outputs.")

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None = None) -> Tensor:
        """Refuse: a later position changes earlier outputs."""
        raise TypeError("BidirectionalMamba2 has no state: a later position changes earlier outputs.")
