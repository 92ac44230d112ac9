"""Errors of chunks of actions, by step and by dimension."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

from vertebra.tokenizers.action import wrap


class ChunkErrors(Metric):
    """Squared errors of chunks over the steps that exist.

    Angles differ by half a turn at most, and a quaternion is the same with the other sign.

    Args:
        horizon: Steps T of a chunk.
        dims: Action dimensions A.
        angles: Columns that are angles.
        quaternions: First columns of quaternions.
    """

    higher_is_better = False
    squares: Tensor
    steps: Tensor

    def __init__(self, horizon: int, dims: int, angles: Sequence[int] = (), quaternions: Sequence[int] = ()) -> None:
        super().__init__()
        self.angles, self.quaternions = list(angles), tuple(quaternions)
        self.add_state("squares", torch.zeros(horizon, dims, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("steps", torch.zeros(horizon, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, actions: Tensor, truth: Tensor, real: Tensor) -> None:
        """Add actions (B, T, A) and the true ones, where ``real``, bool (B, T)."""
        away = actions - truth
        away[:, :, self.angles] = wrap(away[:, :, self.angles])
        for first in self.quaternions:
            part = slice(first, first + 4)
            same = (actions[:, :, part] * truth[:, :, part]).sum(-1, keepdim=True) >= 0
            away[:, :, part] = torch.where(same, away[:, :, part], -actions[:, :, part] - truth[:, :, part])
        self.squares += (away**2 * real[:, :, None]).sum(0)
        self.steps += real.sum(0)

    def compute(self) -> Tensor:
        """Return the mean squared error over all steps and dimensions."""
        return (self.squares.sum() / (self.steps.sum() * self.squares.shape[1])).float()

    def by_dimension(self) -> Tensor:
        """Return the root of the mean squared error of each dimension, (A,), in its unit."""
        return (self.squares.sum(0) / self.steps.sum()).sqrt()

    def by_step(self) -> Tensor:
        """Return the root of the mean squared error of each step of a chunk, (T,); 0 for steps that never exist."""
        return (self.squares.mean(1) / self.steps.clamp_min(1)).sqrt()
