"""Convolution of every channel by itself.

Shapes: B batch, T positions, C channels, K kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.sizes import is_fixed


def depthwise(x: Tensor, conv: nn.Conv1d, sides: tuple[int, int] = (0, 0)) -> Tensor:
    """Convolve every channel of x (B, T, C) by itself over time.

    Args:
        x: Features.
        conv: Weights (C, 1, K) and biases (C,).
        sides: Zeros to put before and behind.

    Returns:
        (B, T + sum(sides) - K + 1, C).
    """
    weight = conv.weight  # (C, 1, K)
    length = x.shape[1] + sum(sides) - weight.shape[2] + 1
    if is_fixed(length) and length == 1 and not any(sides):  # one step of decoding
        y = (x * weight[:, 0].T).sum(1, keepdim=True)
        return y if conv.bias is None else y + conv.bias
    even = sides[0] == sides[1]
    x, padding = (x, sides[0]) if even else (F.pad(x, (0, 0, *sides)), 0)
    if x.device.type != "cpu":
        return F.conv1d(x.transpose(1, 2), weight, conv.bias, padding=padding, groups=len(weight)).transpose(1, 2)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not torch.is_autocast_enabled("cpu"):
        y = _Depthwise.apply(x, weight, conv.bias, padding)
        assert isinstance(y, Tensor)
        return y
    return _image(x, weight, conv.bias, padding)


class _Depthwise(torch.autograd.Function):
    """``depthwise`` on a CPU, where torch's own gradient of the weights is several times slower than this one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.padding, ctx.biased = padding, bias is not None
        return _image(x, weight, bias, padding)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        taps, length = weight.shape[2], dy.shape[1]
        dx = _image(dy, weight.flip(2), None, taps - 1 - ctx.padding)
        columns = F.pad(x, (0, 0, ctx.padding, ctx.padding))
        rows = [(columns[:, k : k + length] * dy).flatten(0, 1).sum(0) for k in range(taps)]
        return dx, torch.stack(rows, dim=1)[:, None], dy.flatten(0, 1).sum(0) if ctx.biased else None, None


def _image(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """Convolve as an image one pixel high whose channels are last, which is how x (B, T, C) lies in memory."""
    y = F.conv2d(x.transpose(1, 2)[:, :, None], weight[:, :, None], bias, padding=(0, padding), groups=len(weight))
    return y[:, :, 0].transpose(1, 2)
