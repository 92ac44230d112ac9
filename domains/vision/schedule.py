"""The schedule of iLLaMA's soft mask (https://arxiv.org/abs/2404.06773, section 3.6)."""

from __future__ import annotations

from typing import Literal

SoftMask = Literal["none", "constant", "linear"]


def soft_mask_rate(step: int, schedule: SoftMask, cutoff: int, start: float = 1.0) -> float:
    """Weight of later patches at an optimizer step.

    Args:
        step: Optimizer step, from 0.
        schedule: ``constant`` keeps ``start`` up to the cutoff, ``linear`` goes from it to 0, ``none`` is always 0.
        cutoff: First optimizer step with 0.
        start: Weight at step 0.
    """
    if schedule == "none" or step >= cutoff:
        return 0.0
    return start if schedule == "constant" else start * (1 - step / max(cutoff - 1, 1))
