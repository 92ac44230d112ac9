"""What Mamba-1 and Mamba-2 share: the causal convolution before the scan, and what goes from piece to piece.

Shapes: B batch, T positions, C channels, K kernel.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.backbones.layers.mixer import Carried, Growth, MixerState, check_state
from vertebra.backbones.layers.sizes import is_fixed


def causal_conv(
    columns: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None = None, activate: bool = True
) -> Tensor:
    """Convolve every channel by itself over time, then SiLU; taps do not cross into another sequence.

    Args:
        columns: Input (B, K-1+T, C), the K-1 columns before the piece first.
        weight: Taps (C, 1, K), the last one for the position itself.
        bias: (C,).
        ids: Packed sequence of every column (B, K-1+T); earlier ones than that may stand before.
        activate: Whether SiLU follows.

    Returns:
        (B, T, C).
    """
    y = _convolve(columns, weight, bias, ids)
    return F.silu(y) if activate else y


def _convolve(columns: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor | None) -> Tensor:
    taps, length = weight.shape[2] - 1, columns.shape[1] - weight.shape[2] + 1
    if ids is not None:
        ids = ids[:, ids.shape[1] - taps - length :]
        y = columns[:, taps:] * weight[:, 0, taps]
        for back in range(1, taps + 1):
            place = slice(taps - back, taps - back + length)
            y = y + columns[:, place] * (ids[:, taps:] == ids[:, place])[..., None] * weight[:, 0, taps - back]
        return y if bias is None else y + bias
    if is_fixed(length) and length == 1:  # one step of decoding
        y = (columns * weight[:, 0].T).sum(1, keepdim=True)
        return y if bias is None else y + bias
    if columns.device.type == "cpu":
        # As an image one pixel high whose channels are last, which is how the columns lie in memory.
        image = columns.transpose(1, 2)[:, :, None]  # (B, C, 1, K-1+T)
        return F.conv2d(image, weight[:, :, None], bias, groups=len(weight))[:, :, 0].transpose(1, 2)
    return F.conv1d(columns.transpose(1, 2), weight, bias, groups=len(weight)).transpose(1, 2)


def join_piece(
    new: Tensor, segments: Tensor | None, carried: Carried | None, taps: int
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Put a piece behind what the one before left.

    Args:
        new: The convolution's input (B, T, C).
        segments: Packed sequence of each position (B, T).
        carried: Of ``leave_piece``; None for the first piece.
        taps: K-1.

    Returns:
        The columns (B, K-1+T, C), their packed sequences, and the scan's state, zero where another sequence begins.
    """
    ids = ssm = None
    if carried is None:
        columns = F.pad(new, (0, 0, taps, 0))
    else:
        columns, ssm = torch.cat([carried[0], new], dim=1), carried[1]
    if segments is not None:
        before = segments[:, :1] if carried is None else carried[2]
        ids = torch.cat([before.expand(-1, max(taps, 1)), segments], dim=1)
        if ssm is not None:
            same = before[:, -1] == segments[:, 0]
            ssm = ssm * same.view(-1, *[1] * (ssm.ndim - 1))
    return columns, ids, ssm


def leave_piece(columns: Tensor, ids: Tensor | None, ssm: Tensor, taps: int) -> Carried:
    """Return what the next piece needs: the last K-1 columns, the scan's state, and the columns' sequences."""
    kept = columns[:, columns.shape[1] - taps :]
    if not is_fixed(columns.shape[1]) or columns.shape[1] > taps + 1:
        kept = kept.clone()  # a view would keep all columns alive
    return (kept, ssm) if ids is None else (kept, ssm, ids[:, ids.shape[1] - max(taps, 1) :])


class RecurrentState(MixerState):
    """The last K-1 columns before the convolution (B, K-1, C), and the scan's state (B, ..., N) in float32."""

    growth: Growth = "constant"

    def __init__(self, conv: Tensor, ssm: Tensor) -> None:
        self.conv, self.ssm = conv, ssm

    def tensors(self) -> list[Tensor]:
        """Return the tensors held."""
        return [self.conv, self.ssm]

    def select(self, indices: Tensor) -> RecurrentState:
        """Return a new state of the batch items ``indices`` (N,)."""
        rows = indices.to(self.ssm.device)
        return RecurrentState(self.conv[rows], self.ssm[rows])

    def state_dict(self) -> dict[str, Tensor]:
        """Return ``conv`` and ``ssm``."""
        return {"conv": self.conv, "ssm": self.ssm}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Remember what ``state_dict`` returned."""
        check_state(self.state_dict(), tensors)
        self.conv.copy_(tensors["conv"])  # steps change them in place
        self.ssm.copy_(tensors["ssm"])
