"""Mamba-1 as a token mixer (https://arxiv.org/abs/2312.00752, section 3.4; the parameters of ``mamba_ssm.Mamba``).

Shapes: B batch, T positions, D width, I inner width, N state width, W width of the step sizes' bottleneck, K kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import Capabilities, MixerState, TokenMixer
from vertebra.backbones.layers.norm import RMSNorm
from vertebra.backbones.layers.recurrent import RecurrentState, causal_conv, join_piece, leave_piece
from vertebra.backbones.layers.selective_scan import selective_scan, selective_scan_step


@dataclass(frozen=True, kw_only=True)
class Mamba1Shape:
    """Sizes of a Mamba-1 mixer.

    Args:
        inner_dim: Inner width I.
        dt_rank: Width W from which the I step sizes are projected; usually a sixteenth of D, rounded up.
        state_dim: State width N.
        kernel: Taps K of the causal convolution.
        conv_bias: Whether the convolution has a bias.
        norm_dt_bc: RMSNorm on the narrow step sizes, B and C, as in Jamba (https://arxiv.org/abs/2403.19887).
        norm_eps: Added to the mean square of those norms.
        chunk_size: Positions a chunk of the scan; the result does not depend on it.
    """

    inner_dim: int
    dt_rank: int
    state_dim: int = 16
    kernel: int = 4
    conv_bias: bool = True
    norm_dt_bc: bool = False
    norm_eps: float = 1e-6
    chunk_size: int = 16


class Mamba1(TokenMixer):
    """One projection to x and a gate, causal convolution, selective scan, gate, projection.

    Args:
        dim: Width D.
        shape: Inner sizes.
    """

    capabilities = Capabilities(bidirectional=False, carries=True)

    def __init__(self, dim: int, shape: Mamba1Shape) -> None:
        super().__init__()
        self.shape = shape
        inner, rank, n = shape.inner_dim, shape.dt_rank, shape.state_dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, shape.kernel, groups=inner, bias=shape.conv_bias)
        self.x_proj = nn.Linear(inner, rank + 2 * n, bias=False)
        self.dt_layernorm = RMSNorm(rank, shape.norm_eps) if shape.norm_dt_bc else None
        self.b_layernorm = RMSNorm(n, shape.norm_eps) if shape.norm_dt_bc else None
        self.c_layernorm = RMSNorm(n, shape.norm_eps) if shape.norm_dt_bc else None
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, n))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_dynamics()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw step sizes log-uniform in (0.001, 0.1), and set decays to 1 .. N, as the original does."""
        bound = self.shape.dt_rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound)
        low, high = math.log(1e-3), math.log(0.1)
        dt = torch.exp(torch.rand_like(self.dt_proj.bias) * (high - low) + low).clamp(min=1e-4)
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.copy_(torch.arange(1, self.shape.state_dim + 1, device=self.A_log.device).log())
        self.D.fill_(1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        return self.carry(x, layout, None)[0]

    def carry(self, x: Tensor, layout: Layout, carried: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Map a piece of longer sequences.

        Args:
            x: The piece, (B, T, D).
            layout: Of the piece alone.
            carried: What the piece before left: the last columns before the convolution (B, K-1, I), the scan's state
                (B, I, N), and with packed sequences that of each column (B, max(K-1, 1)). None for the first piece.

        Returns:
            The output (B, T, D), and what the next piece needs.
        """
        mask, taps = layout.mask, self.shape.kernel - 1
        if mask is not None:
            x = x * mask[..., None]
        inner, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, I) both
        columns, ids, ssm = join_piece(inner, layout.segments, carried, taps)  # before the convolution, (B, K-1+T, I)
        inner = causal_conv(columns, self.conv1d.weight, self.conv1d.bias, ids)
        y, ssm = self._scan(inner, mask, ssm, layout.segments)
        return self.out_proj(y * F.silu(z)), leave_piece(columns, ids, ssm, taps)

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        """Make the empty state; its size does not depend on ``max_len``."""
        s = self.shape
        conv = torch.zeros(batch, s.kernel - 1, s.inner_dim, dtype=dtype, device=device)
        return RecurrentState(conv, torch.zeros(batch, s.inner_dim, s.state_dim, dtype=torch.float32, device=device))

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D)."""
        assert isinstance(state, RecurrentState)
        layout = Layout(x.shape[0], x.shape[1], x.device, causal=True, mask=mask)
        y, (state.conv, state.ssm) = self.carry(x, layout, (state.conv, state.ssm))
        return y

    def _scan(
        self, x: Tensor, mask: Tensor | None, state: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return y (B, T, I), the skip term in it, and the state after."""
        s = self.shape
        if mask is not None:
            x = x * mask[..., None]  # the convolution's bias leaks into padding
        narrow, b, c = self.x_proj(x).split([s.dt_rank, s.state_dim, s.state_dim], dim=-1)
        if self.dt_layernorm is not None and self.b_layernorm is not None and self.c_layernorm is not None:
            narrow, b, c = self.dt_layernorm(narrow), self.b_layernorm(b), self.c_layernorm(c)
        if type(self.dt_proj) is nn.Linear:
            dt = F.linear(narrow, self.dt_proj.weight).float() + self.dt_proj.bias.float()
        else:  # an adapter, which does more than multiply by its weights
            dt = self.dt_proj(narrow).float()
        dt = F.softplus(dt)  # (B, T, I)
        if mask is not None:
            dt = dt * mask[..., None]  # 0 leaves the state as it is
        a = -self.A_log.float().exp()
        if x.shape[1] == 1 and state is not None:
            y, state = selective_scan_step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
            y = y[:, None]
        else:
            y, state = selective_scan(x, dt, a, b, c, chunk_size=s.chunk_size, initial_state=state, segments=segments)
        return y + x * self.D.to(x.dtype), state  # the skip's x is not multiplied by dt
