"""Random numbers that depend on nothing but their address: the same whatever the batch, the order or the device."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_WORD = 2**64 - 1


def item_uniform(seed: int, epoch: int, items: ArrayLike, salt: int = 0) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), one an item, that depend on nothing but the arguments (SplitMix64).

    Args:
        seed: Seed of the run.
        epoch: Epoch, or step.
        items: Non-negative item numbers, any shape.
        salt: Tells several draws for the same item apart.
    """
    x = np.asarray(items).astype(np.uint64)
    for key in (salt, epoch, seed):
        with np.errstate(over="ignore"):
            x = x * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key % 2**64) * np.uint64(0xD1B54A32D192ED03)
            x = x + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def draw_uniform(seed: int, epoch: int, item: int, salt: int = 0) -> float:
    """``item_uniform`` of one item, ten times as fast."""
    x = item
    for key in (salt, epoch, seed):
        x = x * 0x9E3779B97F4A7C15 + key * 0xD1B54A32D192ED03 + 0x9E3779B97F4A7C15 & _WORD
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB & _WORD
        x ^= x >> 31
    return (x >> 11) * 2.0**-53
