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
from vertebra.backbones.layers.mixer import Capabilities, Carried, Growth, MixerState, TokenMixer
from vertebra.backbones.layers.norm import RMSNorm
from vertebra.backbones.layers.selective_scan import selective_scan, selective_scan_step
from vertebra.errors import LoadError


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
        mask, segments, taps = layout.mask, layout.segments, self.shape.kernel - 1
        if mask is not None:
            x = x * mask[..., None]
        inner, z = self.in_proj(x).chunk(2, dim=-1)  # (B, T, I) both
        conv, ssm = (inner.new_zeros(x.shape[0], taps, self.shape.inner_dim), None) if carried is None else carried[:2]
        columns = torch.cat([conv, inner], dim=1)  # before the convolution, (B, K-1+T, I)
        ids = None
        if segments is not None:
            before = segments[:, :1] if carried is None else carried[2]
            ids = torch.cat([before.expand(-1, max(taps, 1)), segments], dim=1)
            if ssm is not None:
                ssm = ssm * (before[:, -1] == segments[:, 0])[:, None, None]
        y, ssm = self._scan(self._convolve(columns, ids), mask, ssm, segments)
        after: Carried = (columns[:, columns.shape[1] - taps :], ssm)
        if ids is not None:
            after = (*after, ids[:, ids.shape[1] - max(taps, 1) :])
        return self.out_proj(y * F.silu(z)), after

    def init_state(self, batch: int, max_len: int, dtype: torch.dtype, device: torch.device) -> Mamba1State:
        """Make the empty state; its size does not depend on ``max_len``."""
        s = self.shape
        conv = torch.zeros(batch, s.kernel - 1, s.inner_dim, dtype=dtype, device=device)
        return Mamba1State(conv, torch.zeros(batch, s.inner_dim, s.state_dim, dtype=torch.float32, device=device))

    def step(self, x: Tensor, state: MixerState, mask: Tensor | None = None) -> Tensor:
        """Map the next positions x (B, T, D) to (B, T, D)."""
        assert isinstance(state, Mamba1State)
        layout = Layout(x.shape[0], x.shape[1], x.device, causal=True, mask=mask)
        y, (conv, state.ssm) = self.carry(x, layout, (state.conv, state.ssm))
        state.conv = conv.clone()
        return y

    def _convolve(self, columns: Tensor, ids: Tensor | None) -> Tensor:
        """Convolve (B, K-1+T, I) to (B, T, I), then SiLU; taps do not cross into another sequence.

        Args:
            columns: Input, the K-1 columns before the piece first.
            ids: Packed sequence of every column, the last ones at least.
        """
        if ids is None:
            return F.silu(self.conv1d(columns.transpose(1, 2)).transpose(1, 2))
        weight, bias, taps = self.conv1d.weight[:, 0], self.conv1d.bias, self.shape.kernel - 1  # (I, K)
        length = columns.shape[1] - taps
        first = ids.shape[1] - length
        y = columns[:, taps:] * weight[:, taps]
        for back in range(1, taps + 1):
            same = (ids[:, first:] == ids[:, first - back : first - back + length])[..., None]  # (B, T, 1)
            y = y + columns[:, taps - back : taps - back + length] * same * weight[:, taps - back]
        return F.silu(y if bias is None else y + bias)

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
        dt = F.softplus(F.linear(narrow, self.dt_proj.weight).float() + self.dt_proj.bias.float())  # (B, T, I)
        if mask is not None:
            dt = dt * mask[..., None]  # 0 leaves the state as it is
        a = -self.A_log.float().exp()
        if x.shape[1] == 1 and state is not None:
            y, state = selective_scan_step(x[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
            y = y[:, None]
        else:
            y, state = selective_scan(x, dt, a, b, c, chunk_size=s.chunk_size, initial_state=state, segments=segments)
        return y + x * self.D.to(x.dtype), state  # the skip's x is not multiplied by dt


class Mamba1State(MixerState):
    """The last K-1 columns before the convolution (B, K-1, I), and the scan's state (B, I, N)."""

    growth: Growth = "constant"

    def __init__(self, conv: Tensor, ssm: Tensor) -> None:
        self.conv, self.ssm = conv, ssm

    def tensors(self) -> list[Tensor]:
        """Return the tensors held."""
        return [self.conv, self.ssm]

    def select(self, indices: Tensor) -> Mamba1State:
        """Return a new state of the batch items ``indices`` (N,)."""
        rows = indices.to(self.ssm.device)
        return Mamba1State(self.conv[rows], self.ssm[rows])

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``conv`` and ``ssm``."""
        return {"conv": self.conv, "ssm": self.ssm}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned.

        Raises:
            LoadError: The tensors are those of another layer.
        """
        for name, mine in self.state_dict().items():
            if name not in tensors or tensors[name].shape != mine.shape:
                have = tuple(tensors[name].shape) if name in tensors else "nothing"
                raise LoadError(f"state: {name} must be {tuple(mine.shape)}, got {have}; was it of another backbone?")
        self.conv, self.ssm = tensors["conv"].to(self.conv), tensors["ssm"].to(self.ssm)
