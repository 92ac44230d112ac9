"""Binning: every value of a chunk of actions is a token (RT-1, https://arxiv.org/abs/2212.06817, section 5.1).

Shapes: B chunks, T steps, D action dimensions, L tokens of a chunk (T * D).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.action import QUANTILES, ActionTokenizer, ContinuousTokenizer

Bounds = tuple[float, ...]


class BinningTokenizer(ContinuousTokenizer):
    """A token is one value, cut off at bounds and rounded to ``vocab_size`` levels; token t * D + d.

    A dimension that never moves comes back as the number it is, whatever its tokens. ``start`` is not used: it would
    shift a chunk by a whole turn, or turn a quaternion's sign, away from the bounds, and mean the same.

    Args:
        horizon: As in ``ActionTokenizer``.
        dims: As in ``ActionTokenizer``.
        vocab_size: Levels of a value.
        angles: As in ``ActionTokenizer``.
        quaternions: As in ``ActionTokenizer``.
        grippers: Columns with bounds that no value is beyond, and that are never interpolated.
        low: Lower bound of each dimension (D,), from ``fit``.
        high: Upper bound of each dimension (D,), from ``fit``.

    Raises:
        ConfigError: An impossible number, a column that does not exist, or bounds that do not fit.
    """

    fields: ClassVar[tuple[str, ...]] = (*ContinuousTokenizer.fields, "grippers", "low", "high")

    def __init__(
        self,
        *,
        horizon: int,
        dims: int,
        vocab_size: int = 256,
        angles: Sequence[int] = (),
        quaternions: Sequence[int] = (),
        grippers: Sequence[int] = (),
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
    ) -> None:
        super().__init__(horizon=horizon, dims=dims, vocab_size=vocab_size, angles=angles, quaternions=quaternions)
        self.grippers = checked_grippers(self, grippers)
        self.low, self.high = checked_bounds(self, low, high)
        if self.low and self.high:
            self._low = torch.tensor(self.low)
            self._span = torch.tensor(self.high) - self._low

    @property
    def groups(self) -> int:
        """T."""
        return self.horizon

    @property
    def is_fitted(self) -> bool:
        """As in ``ActionTokenizer``."""
        return self.low is not None

    def fit(self, chunks: Tensor, start: Tensor | None = None, *, quantiles: tuple[float, float] = QUANTILES) -> Self:
        """Return a tokenizer with bounds from chunks (B, T, D), as ``quantile_bounds`` finds them.

        Args:
            chunks: Actions in their units.
            start: Not used.
            quantiles: Shares of the values below the bounds of a dimension; (0, 1) cuts none of them off.

        Raises:
            ConfigError: Impossible quantiles.
            ShapeError: Chunks of another shape.
            DataError: No chunk, or numbers that are not finite.
        """
        low, high = quantile_bounds(self.smooth(chunks), self.grippers, quantiles)
        return self.replace(low=low, high=high)

    def to_unit(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """As in ``ContinuousTokenizer``.

        Raises:
            ConfigError: Not fitted.
            ShapeError: Chunks of another shape.
        """
        low, span = self._bounds(chunks.device)
        return ((self.smooth(chunks) - low) / torch.where(span > 0, span, 1.0)).clamp(0, 1).flatten(1)

    def from_unit(self, tokens: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """As in ``ContinuousTokenizer``; at other ``steps`` values are interpolated, those of grippers the nearest.

        Raises:
            ConfigError: Not fitted, or ``steps`` below 1.
            ShapeError: Tokens of another shape.
        """
        low, span = self._bounds(tokens.device)
        if tokens.ndim != 2 or tokens.shape[1] != self.length:
            raise ShapeError(f"BinningTokenizer: tokens must be (B, {self.length}), got {tuple(tokens.shape)}.")
        chunks = low + tokens.unflatten(1, (self.horizon, self.dims)) * span
        return self.restore(self._resample(chunks, checked_steps(self, steps)))

    def clipped(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Share of the values of chunks (B, T, D) beyond the bounds, for each dimension (D,).

        Raises:
            ConfigError: Not fitted.
            ShapeError: Chunks of another shape.
        """
        low, _ = self._bounds(chunks.device)
        values, high = self.smooth(chunks), torch.tensor(self.high, device=chunks.device)
        return ((values < low) | (values > high)).float().mean((0, 1))

    def _bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if not self.is_fitted:
            raise ConfigError("BinningTokenizer: there are no bounds yet; use what fit(chunks) returns.")
        if self._low.device != device:
            self._low, self._span = self._low.to(device), self._span.to(device)
        return self._low, self._span

    def _resample(self, chunks: Tensor, steps: int) -> Tensor:
        if steps == self.horizon:
            return chunks
        made = F.interpolate(chunks.mT, size=steps, mode="linear", align_corners=True).mT
        if self.grippers:
            nearest = torch.linspace(0, self.horizon - 1, steps, device=chunks.device).round().long()
            columns = torch.zeros(self.dims, dtype=torch.bool, device=chunks.device)
            columns[list(self.grippers)] = True
            made = torch.where(columns, chunks[:, nearest], made)
        return made


# ---------------------------------------------------------------- bounds, also of other tokenizers


def quantile_bounds(
    chunks: Tensor, grippers: Sequence[int] = (), quantiles: tuple[float, float] = QUANTILES
) -> tuple[Bounds, Bounds]:
    """Find between which numbers nearly all values of each dimension lie.

    These are two quantiles. They are the least and the largest value for grippers, which may move too rarely to count,
    and for what moves so rarely that both quantiles are one number.

    Args:
        chunks: (B, T, D), smooth.
        grippers: Their columns.
        quantiles: Shares of the values below the bounds.

    Returns:
        Lower and upper bounds (D,); equal where a dimension never moves.

    Raises:
        ConfigError: Impossible quantiles.
        DataError: No chunk, or numbers that are not finite.
    """
    if not 0 <= quantiles[0] < quantiles[1] <= 1:
        raise ConfigError(f"fit: quantiles must be two numbers from 0 to 1, the lower first, got {quantiles}.")
    values = chunks.detach().cpu().float().flatten(0, 1).numpy()
    if not len(values):
        raise DataError("fit: there must be at least one chunk, got none; give other demonstrations.")
    if not np.isfinite(values).all():
        raise DataError("fit: actions must be finite numbers; leave out what is NaN or infinite.")
    low, high = np.quantile(values, quantiles, axis=0).astype(np.float32)
    whole = low == high
    whole[list(grippers)] = True
    low, high = np.where(whole, values.min(0), low), np.where(whole, values.max(0), high)
    return tuple(low.tolist()), tuple(high.tolist())


def checked_bounds(
    owner: ActionTokenizer, low: Sequence[float] | None, high: Sequence[float] | None
) -> tuple[Bounds | None, Bounds | None]:
    """Return bounds as tuples, or None for both.

    Raises:
        ConfigError: One without the other, not one for each dimension, or a lower one above an upper one.
    """
    if low is None and high is None:
        return None, None
    if low is None or high is None or not len(low) == len(high) == owner.dims:
        raise ConfigError(f"{type(owner).__name__}: low and high must both have {owner.dims} numbers, one a dimension.")
    if not all(a <= b for a, b in zip(low, high, strict=True)):  # also NaN
        raise ConfigError(f"{type(owner).__name__}: no bound in low may be above that in high.")
    return tuple(float(a) for a in low), tuple(float(b) for b in high)


def checked_grippers(owner: ActionTokenizer, grippers: Sequence[int]) -> tuple[int, ...]:
    """Return columns of grippers as a tuple.

    Raises:
        ConfigError: A column that does not exist, is named twice, or is an angle or a part of a quaternion.
    """
    turning = {*owner.angles, *(first + i for first in owner.quaternions for i in range(4))}
    if len(set(grippers)) < len(grippers) or not set(grippers) <= set(range(owner.dims)) - turning:
        raise ConfigError(
            f"{type(owner).__name__}: grippers {list(grippers)} must be different columns from 0 to {owner.dims - 1}, "
            "and neither angles nor quaternions."
        )
    return tuple(grippers)


def checked_steps(owner: ActionTokenizer, steps: int | None) -> int:
    """Return the number of steps to decode to, ``horizon`` for None.

    Raises:
        ConfigError: It is below 1.
    """
    if steps is not None and steps < 1:
        raise ConfigError(f"{type(owner).__name__}: steps must be at least 1, got {steps}.")
    return owner.horizon if steps is None else steps
