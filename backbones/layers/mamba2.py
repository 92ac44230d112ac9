"""Mamba-2 as a token mixer (https://arxiv.org/abs/2405.21060, section 7; the layout of ``mamba_ssm.Mamba2``).

Two other forms of it are made to take over from an attention layer: the discrete one of MOHAWK
(https://arxiv.org/abs/2408.10189) and that of mmMamba (https://arxiv.org/abs/2502.13145), whose x, B and C are the
values, keys and queries of attention.

| | mamba2 | mohawk | mmmamba |
| --- | --- | --- | --- |
| projections | z, x, B, C, dt at once | z, x, B, C, a at once | x, B, C at once; z; dt |
| convolution begins as | random taps | the identity | the identity |
| behind it | SiLU | nothing | SiLU |
| log of the decay | A dt, dt = softplus(. + dt_bias) | -softplus(a) | as mamba2 |
| into the state | dt x | x | dt x |
| skip | D x | D x | none |
| gate | norm(y SiLU(z)) in groups | y SiLU(z + z_bias), 1 at first | norm(y) of each head, SiLU(z) |

Shapes: B batch, T positions, D width, I inner width, H heads, P head width, G groups, N state width, K kernel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import Capabilities, Carried, MixerState, TokenMixer
from vertebra.backbones.layers.norm import GatedRMSNorm, RMSNorm
from vertebra.backbones.layers.recurrent import RecurrentState, causal_conv, join_piece, leave_piece
from vertebra.backbones.layers.sizes import is_fixed
from vertebra.backbones.layers.ssd import Implementation, ssd, ssd_matrix, ssd_step

Form = Literal["mamba2", "mohawk", "mmmamba"]
FORMS: tuple[Form, ...] = get_args(Form)

OPEN_GATE = 1.278464542761
"""Where SiLU is 1."""
LEAST_DECAY = 1e-8
"""Of the discrete form: the smallest softplus(a), so that dividing by it stays in range."""


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
        norm_eps: Added to the mean square of the norm.
        chunk_size: Positions a chunk of the scan, None for the fastest; the result does not depend on it.
        form: Column of the table above.
        bias: Whether ``in_proj`` and ``out_proj`` have biases.
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
    form: Form = "mamba2"
    bias: bool = False

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
        apart = shape.form == "mmmamba"
        widths = (shape.inner_dim, shape.conv_dim, shape.num_heads)
        self.in_proj = nn.Linear(dim, shape.conv_dim if apart else sum(widths), bias=shape.bias)
        self.z_proj = nn.Linear(dim, widths[0], bias=False) if apart else None
        self.dt_proj = nn.Linear(dim, widths[2], bias=False) if apart else None
        self.conv1d = nn.Conv1d(
            shape.conv_dim, shape.conv_dim, shape.kernel, groups=shape.conv_dim, bias=shape.conv_bias
        )
        discrete = shape.form == "mohawk"
        self.dt_bias = None if discrete else nn.Parameter(torch.empty(shape.num_heads))
        self.A_log = None if discrete else nn.Parameter(torch.empty(shape.num_heads))
        self.D = None if apart else nn.Parameter(torch.ones(shape.num_heads))
        self.z_bias = nn.Parameter(torch.empty(shape.inner_dim)) if discrete else None
        self.norm: GatedRMSNorm | RMSNorm | None = None
        if apart:
            self.norm = RMSNorm(shape.head_dim, shape.norm_eps)
        elif not discrete:
            self.norm = GatedRMSNorm(shape.inner_dim, shape.groups, shape.norm_eps)
        self.out_proj = nn.Linear(shape.inner_dim, dim, bias=shape.bias)
        self.reset_dynamics()
        self.reset_form()

    @torch.no_grad()
    def reset_dynamics(self) -> None:
        """Draw step sizes log-uniform in (0.001, 0.1) and decays uniform in (1, 16), as the original does."""
        if self.dt_bias is None or self.A_log is None:
            return
        low, high = math.log(1e-3), math.log(0.1)
        dt = torch.exp(torch.rand_like(self.dt_bias) * (high - low) + low).clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        self.A_log.uniform_(1, 16).log_()
        if self.D is not None:
            self.D.fill_(1)

    @torch.no_grad()
    def reset_form(self) -> None:
        """Set what the two other forms begin with: a convolution and a gate that change nothing or little."""
        if self.shape.form == "mamba2":
            return
        nn.init.zeros_(self.conv1d.weight)[..., -1] = 1
        if self.conv1d.bias is not None:
            nn.init.zeros_(self.conv1d.bias)
        for linear in (self.in_proj, self.out_proj):
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if self.z_bias is not None:
            nn.init.zeros_(self.in_proj.weight[: self.shape.inner_dim])
            self.z_bias.fill_(OPEN_GATE)
        if self.z_proj is not None and self.dt_proj is not None and self.A_log is not None:
            nn.init.xavier_uniform_(self.z_proj.weight, gain=2**-2.5)
            nn.init.zeros_(self.dt_proj.weight)
            self.A_log.fill_(1)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to (B, T, D)."""
        return self.carry(x, layout, None)[0]

    def inner(self, x: Tensor, layout: Layout) -> Tensor:
        """Map x (B, T, D) to what the last projection gets, (B, T, I): the heads side by side."""
        return self._read(x, layout, None)[0]

    def carry(self, x: Tensor, layout: Layout, carried: Carried | None) -> tuple[Tensor, Carried]:
        """Map a piece; carried are the last columns before the convolution, the scan's state, and their sequences."""
        y, carried = self._read(x, layout, carried)
        return self.out_proj(y), carried

    def _read(self, x: Tensor, layout: Layout, carried: Carried | None) -> tuple[Tensor, Carried]:
        mask, taps = layout.mask, self.shape.kernel - 1
        z, xbc, dt = self._project(x, mask)
        columns, ids, ssm = join_piece(
            xbc, layout.segments, carried, taps
        )  # before the convolution, (B, K-1+T, channels)
        y, ssm = self._scan(self._convolve(columns, ids), dt, mask, ssm, layout.segments)
        return self._gate(y, z), leave_piece(columns, ids, ssm, taps)

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

    def mixing_matrix(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Return the matrix (B, H, T, T), with the skip term on its diagonal, that maps the convolved x over time.

        Args:
            x: Features (B, T, D).
            layout: Padding and packed sequences; None for neither. Nothing goes from or to padding, or from one
                sequence to another.
        """
        mask, segments = (None, None) if layout is None else (layout.mask, layout.segments)
        _, xbc, dt = self._project(x, mask)
        columns, ids, _ = join_piece(xbc, segments, None, self.shape.kernel - 1)
        _, b, c = self._split(self._convolve(columns, ids))
        steps = self._step_sizes(dt)
        matrix = ssd_matrix(steps if mask is None else steps * mask[..., None], self._decay(), b, c)
        if self.shape.form == "mohawk":  # x goes in as it is
            matrix = matrix / steps.transpose(1, 2)[..., None, :]
        if self.D is not None:
            matrix = matrix + torch.eye(x.shape[1], device=x.device) * self.D.float()[:, None, None]
        if segments is not None:
            matrix = matrix * (segments[:, :, None] == segments[:, None])[:, None]
        return matrix if mask is None else matrix * (mask[:, :, None] & mask[:, None])[:, None]

    def _project(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gate z (B, T, I), the convolution's input (B, T, channels) and raw step sizes (B, T, H)."""
        s = self.shape
        if mask is not None:
            x = x * mask[..., None]
        if self.z_proj is not None and self.dt_proj is not None:
            z, xbc, dt = self.z_proj(x), self.in_proj(x), self.dt_proj(x)
        else:
            z, xbc, dt = self.in_proj(x).split([s.inner_dim, s.conv_dim, s.num_heads], dim=-1)
        if mask is not None and s.bias:
            xbc = xbc * mask[..., None]  # what stands before a sequence is 0
        return z, xbc, dt

    def _convolve(self, columns: Tensor, ids: Tensor | None) -> Tensor:
        return causal_conv(columns, self.conv1d.weight, self.conv1d.bias, ids, self.shape.form != "mohawk")

    def _split(self, xbc: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return x (B, T, H, P), B and C (B, T, G, N)."""
        s = self.shape
        x, b, c = xbc.split([s.inner_dim, s.groups * s.state_dim, s.groups * s.state_dim], dim=-1)
        grouped = (s.groups, s.state_dim)
        return x.unflatten(-1, (s.num_heads, s.head_dim)), b.unflatten(-1, grouped), c.unflatten(-1, grouped)

    def _step_sizes(self, dt: Tensor) -> Tensor:
        """Return positive step sizes (B, T, H) in float32."""
        if self.dt_bias is None:
            return F.softplus(dt.float()).clamp(min=LEAST_DECAY)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        return dt if self.shape.dt_limit is None else dt.clamp(*self.shape.dt_limit)

    def _decay(self) -> Tensor:
        """Return A (H,) in float32."""
        if self.A_log is None:
            return torch.full((self.shape.num_heads,), -1.0, device=self.in_proj.weight.device)
        return -self.A_log.float().exp()

    def _gate(self, y: Tensor, z: Tensor) -> Tensor:
        """Map y and z (B, T, I) to (B, T, I)."""
        if self.z_bias is not None:
            return y.to(z.dtype) * F.silu(z + self.z_bias)
        if isinstance(self.norm, RMSNorm):
            return self.norm(y.unflatten(-1, (-1, self.shape.head_dim))).flatten(-2).to(z.dtype) * F.silu(z)
        assert self.norm is not None
        return self.norm(y, z)

    def _scan(
        self, xbc: Tensor, dt: Tensor, mask: Tensor | None, state: Tensor | None, segments: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return y (B, T, I) and the state after."""
        if mask is not None:
            xbc = xbc * mask[..., None]  # the convolution's bias leaks into padding
        x, b, c = self._split(xbc)
        dt, skip, values = self._step_sizes(dt), self.D, x
        if self.shape.form == "mohawk":
            values = x / dt[..., None]  # the scan multiplies by dt
        if mask is not None:
            dt = dt * mask[..., None]  # 0 at padding, which leaves the state as it is
        a = self._decay()
        if is_fixed(x.shape[1]) and x.shape[1] == 1 and state is not None:
            y, state = ssd_step(values[:, 0], dt[:, 0], a, b[:, 0], c[:, 0], state)
            y = y[:, None]
        else:
            fused = skip if values is x else None
            y, state = ssd(
                values, dt, a, b, c, D=fused, chunk_size=self.shape.chunk_size, initial_state=state, segments=segments,
                implementation=self.implementation,
            )  # fmt: skip
            skip = skip if fused is None else None
        if skip is not None:
            y = y + x * skip.to(x.dtype)[:, None]  # the skip's x is not multiplied by dt
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
