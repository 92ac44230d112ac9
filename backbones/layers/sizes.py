"""Sizes of tensors while a program is exported that serves any of them."""

from __future__ import annotations

import torch


def is_fixed(size: int) -> bool:
    """Whether ``size`` is a number; where an exported program shall serve many sizes, code must not branch on it."""
    return not isinstance(size, torch.SymInt)
