"""Chunks of actions as control points of B-splines (BEAST, https://arxiv.org/abs/2506.06072).

Every dimension of a chunk becomes a clamped uniform B-spline over phases 0 to 1: N control points, found by ridge
regression and rounded within bounds that come from data. The basis is the same for all dimensions, so that a batch is
encoded by one product with a matrix that is made once. Grippers, which open or close at once, have degree 0: a step
function of N steps.

Shapes: B chunks, T steps, D action dimensions, N control points of one dimension, F of them fixed by the start.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.interpolate import BSpline
from torch import Tensor

from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.action import QUANTILES, ContinuousTokenizer, same_hemisphere, wrap
from vertebra.tokenizers.binning import checked_grippers, checked_steps

Reals = NDArray[np.float64]
Initial = Literal["free", "overwrite", "fit"]
Bounds = tuple[tuple[float, ...], ...]

STILL = 1e-6
"""A control point that moves less than this, relative to max(1, its size), only moves by rounding."""
STILL_RANGE = 1e-2
"""Range of such a control point, relative to max(1, its size): a token is far wider than rounding errors."""


# ---------------------------------------------------------------- splines


def clamped_knots(num_basis: int, degree: int) -> Reals:
    """Return the knots (N + P + 1,) of N basis functions of degree P: both ends P + 1 times, even in between.

    Raises:
        ConfigError: There are fewer than P + 1 basis functions.
    """
    if degree < 0 or num_basis < degree + 1:
        raise ConfigError(
            f"clamped_knots: a spline of degree {degree} needs a degree from 0 on and at least degree + 1 control "
            f"points, got num_basis {num_basis}."
        )
    return np.concatenate([np.zeros(degree), np.linspace(0, 1, num_basis - degree + 1), np.ones(degree)])


def basis_matrix(num_basis: int, degree: int, phases: ArrayLike) -> Reals:
    """Return the N basis functions at phases (T,), (T, N); a row sums to 1.

    Functions of degree 0 are 1 from their knot on up to the next one; the last one also at phase 1.

    Raises:
        ConfigError: A phase is not in [0, 1], or there are fewer than ``degree`` + 1 basis functions.
    """
    knots = clamped_knots(num_basis, degree)
    x = np.asarray(phases, dtype=np.float64)
    nearest = knots[np.abs(x[:, None] - knots).argmin(1)]
    x = np.where(np.abs(x - nearest) < 1e-9, nearest, x)  # 0.3 and 3 * 0.1 are the same knot
    if not ((x >= 0) & (x <= 1)).all():
        raise ConfigError("basis_matrix: phases must lie in [0, 1]; divide times by the last one.")
    matrix: Reals = BSpline.design_matrix(x, knots, degree).toarray()
    return matrix


def ridge_matrix(basis: Reals, ridge: float) -> Reals:
    """Return the matrix (N, T) that maps samples to the control points which fit them, for a basis (T, N).

    It is (basis^T basis + ridge I)^-1 basis^T.
    """
    gram = basis.T @ basis + ridge * np.eye(basis.shape[1])
    return np.asarray(np.linalg.solve(gram, basis.T), dtype=np.float64)


# ---------------------------------------------------------------- tokenizer


class _Tables(NamedTuple):
    """What one rate, device and precision needs."""

    encode: Tensor  # (N, T + F)
    encode_grippers: Tensor
    decode: Tensor  # (steps, N)
    decode_grippers: Tensor
    is_gripper: Tensor  # (D,)
    low: Tensor  # (N, D)
    step: Tensor  # between two levels
    zero: Tensor  # level of a control point of 0
    per_unit: Tensor  # levels


class BSplineTokenizer(ContinuousTokenizer):
    """Actions as control points of B-splines, each a token; group n of D tokens holds control point n of all.

    A chunk spans phases 0 to 1, its first step at 0 and its last at 1; ``steps=2 * horizon - 1`` decodes at twice the
    rate.

    Args:
        horizon: Steps T of a chunk.
        dims: Action dimensions D.
        vocab_size: Levels of a control point.
        angles: As in ``ActionTokenizer``.
        quaternions: As in ``ActionTokenizer``.
        num_basis: Control points N of a dimension, at most ``horizon``.
        degree: Degree P of the splines, below ``num_basis``.
        grippers: Columns that are step functions, of degree 0.
        ridge: Weight of the squared control points in the fit.
        initial: How chunks begin where the one before ended, in all columns but the grippers. ``free``: they need not.
            ``overwrite``: ``decode`` replaces the first control point by ``start``, where it is given; what ``encode``
            writes does not depend on it. ``fit``: the first control point is ``start`` and the others are fitted to
            what it leaves; ``encode`` takes the chunk's own first action where ``start`` is not given, ``decode``
            cannot do without it. The tokens of the first group then say nothing: they are the middle, and ignored.
        velocity: Whether the second control point is set as well, so that chunks begin with a given velocity.
            ``start`` is then (B, 2, D): position, and velocity in units per step of the horizon.
        low: Lower bounds of control points, (N, D), from ``fit``.
        high: Upper bounds, (N, D).

    Raises:
        ConfigError: Arguments that contradict each other; the text says which.
    """

    fields: ClassVar[tuple[str, ...]] = (
        *ContinuousTokenizer.fields,
        *("num_basis", "degree", "grippers", "ridge", "initial", "velocity", "low", "high"),
    )

    def __init__(
        self,
        horizon: int,
        dims: int,
        vocab_size: int = 256,
        angles: Sequence[int] = (),
        quaternions: Sequence[int] = (),
        num_basis: int = 10,
        degree: int = 4,
        grippers: Sequence[int] = (),
        ridge: float = 1e-5,
        initial: Initial = "free",
        velocity: bool = False,
        low: Sequence[Sequence[float]] | None = None,
        high: Sequence[Sequence[float]] | None = None,
    ) -> None:
        super().__init__(horizon=horizon, dims=dims, vocab_size=vocab_size, angles=angles, quaternions=quaternions)
        self.num_basis, self.degree, self.grippers = num_basis, degree, checked_grippers(self, grippers)
        self.ridge, self.initial, self.velocity = ridge, initial, velocity
        self.fixed = 0 if initial == "free" else 1 + velocity  # F
        self._check()
        self.low, self.high = self._bounds(low, high)
        if velocity:  # the curve's derivative at phase 0 is degree * (c1 - c0) / (knots[1 + degree] - knots[1])
            knots = clamped_knots(num_basis, degree)
            self._reach = float((horizon - 1) * (knots[1 + degree] - knots[1]) / degree)
        self._tables_made: dict[tuple[int, torch.device, torch.dtype], _Tables] = {}

    @property
    def groups(self) -> int:
        """N."""
        return self.num_basis

    @property
    def is_fitted(self) -> bool:
        """Whether there are bounds."""
        return self.low is not None

    # ---------------------------------------------------------------- bounds

    def fit(self, chunks: Tensor, start: Tensor | None = None, *, quantiles: tuple[float, float] = QUANTILES) -> Self:
        """Return a tokenizer with bounds from chunks (B, T, D).

        The bounds of a control point are two quantiles. They are the least and the largest value in grippers, and where
        both quantiles are one number because it moves so rarely; what never moves gets a narrow range around it.

        Args:
            chunks: Actions.
            start: As in ``encode``.
            quantiles: Shares of the chunks below the bounds.

        Raises:
            ConfigError: Impossible quantiles.
            DataError: There is no chunk, or a number is not finite.
        """
        if not 0 <= quantiles[0] < quantiles[1] <= 1:
            raise ConfigError(f"fit: quantiles must be two numbers from 0 to 1, the lower first, got {quantiles}.")
        points = self._finite_points(chunks, start)
        low, high = np.quantile(points, quantiles, axis=0)
        whole = _still(low, high)
        whole[:, self.grippers] = True
        low, high = np.where(whole, points.min(0), low), np.where(whole, points.max(0), high)
        still, middle, size = _still(low, high), (low + high) / 2, _size(low, high)
        below = (self.vocab_size // 2) / (self.vocab_size - 1)  # the middle is a level, not between two
        low = np.where(still, middle - below * STILL_RANGE * size, low)
        high = np.where(still, middle + (1 - below) * STILL_RANGE * size, high)
        return self.replace(low=low.tolist(), high=high.tolist())

    def grow(self, chunks: Tensor, start: Tensor | None = None, *, tolerance: float = 1e-4) -> Self:
        """Return a tokenizer whose bounds are widened to hold chunks (B, T, D), where they miss by over ``tolerance``.

        Raises:
            ConfigError: There are no bounds yet.
            DataError: There is no chunk, or a number is not finite.
        """
        self._need_bounds()
        points = self._finite_points(chunks, start)
        low, high = np.asarray(self.low), np.asarray(self.high)
        least, most = points.min(0), points.max(0)
        low = np.where(least < low - tolerance, least, low)
        high = np.where(most > high + tolerance, most, high)
        return self.replace(low=low.tolist(), high=high.tolist())

    def clipped(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Return the share of control points of chunks (B, T, D) that are out of bounds, for each dimension (D,)."""
        levels = self._scaled(self.control_points(chunks, start))
        beyond = (levels - levels.clamp(0, self.vocab_size - 1)).abs()
        return (beyond > 1e-5 * self.vocab_size).float().mean((0, 1))  # not what is out by rounding

    def _finite_points(self, chunks: Tensor, start: Tensor | None) -> NDArray[np.float32]:
        with torch.no_grad():
            points: NDArray[np.float32] = self.control_points(chunks, start).float().cpu().numpy()
        if not len(points):
            raise DataError("BSplineTokenizer: bounds need at least one chunk of actions.")
        if not np.isfinite(points).all():
            raise DataError("BSplineTokenizer: chunks must be finite numbers; mend or leave out those that are not.")
        return points

    # ---------------------------------------------------------------- both directions

    def encode(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """As in ``ActionTokenizer``.

        Raises:
            ConfigError: There are no bounds yet.
            ShapeError: A shape is not this tokenizer's.
        """
        return self._levels(chunks, start).round().long()  # half to even

    def decode(self, ids: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """As in ``ActionTokenizer``.

        Raises:
            ConfigError: There are no bounds yet, ``steps`` is below 1, or ``start`` is missing.
            ShapeError: A shape is not this tokenizer's.
        """
        return self._from_levels(ids.float(), steps, start)

    def to_unit(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """As in ``ContinuousTokenizer``; differentiable where nothing is cut off. Raises what ``encode`` does."""
        return self._levels(chunks, start) / (self.vocab_size - 1)

    def from_unit(self, tokens: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """As in ``ContinuousTokenizer``. Raises what ``decode`` does."""
        return self._from_levels(_real(tokens) * (self.vocab_size - 1), steps, start)

    def _levels(self, chunks: Tensor, start: Tensor | None) -> Tensor:
        """Map chunks (B, T, D) to levels (B, L) from 0 to V - 1, not rounded."""
        return self._scaled(self.control_points(chunks, start)).clamp(0, self.vocab_size - 1).flatten(1)

    def _scaled(self, points: Tensor) -> Tensor:
        self._need_bounds()
        tables = self._tables(self.horizon, points)
        return torch.addcmul(tables.zero, points, tables.per_unit)

    def _from_levels(self, levels: Tensor, steps: int | None, start: Tensor | None) -> Tensor:
        self._need_bounds()
        if levels.ndim != 2 or levels.shape[1] != self.length:
            raise ShapeError(f"BSplineTokenizer: tokens must be (B, {self.length}), got {tuple(levels.shape)}.")
        tables = self._tables(self.horizon, levels)
        points = torch.addcmul(tables.low, levels.view(-1, self.num_basis, self.dims), tables.step)
        return self.restore(self.curve(points, steps=steps, start=start))

    def control_points(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Map chunks (B, T, D) to control points (B, N, D) in the unit of the actions; those that ``fit`` fixes are 0.

        Raises:
            ShapeError: A shape is not this tokenizer's.
        """
        chunks = _real(self.smooth(chunks))
        if self.initial != "fit":
            samples = self._beside(chunks)
        elif start is None:
            chunks = self._beside(chunks)
            own = torch.stack([chunks[:, 0], chunks[:, 1] - chunks[:, 0]], 1) if self.velocity else chunks[:, 0]
            samples = torch.cat([chunks, self._head(own, chunks)], 1)
        else:
            head = self._beside(self._head(start, chunks))
            samples = torch.cat([self._beside(chunks, head), head], 1)
        tables = self._tables(self.horizon, samples)
        return self._each(tables.encode, tables.encode_grippers, tables.is_gripper, samples)

    def curve(self, points: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """Map control points (B, N, D) to samples (B, steps, D); angles and quaternions come as the spline has them.

        Args:
            points: As ``control_points`` gives them.
            steps: As in ``decode``.
            start: As in ``decode``.

        Raises:
            ConfigError: ``steps`` is below 1, or ``start`` is missing.
            ShapeError: A shape is not this tokenizer's.
        """
        tables = self._tables(checked_steps(self, steps), points)
        if start is None and self.initial == "fit":
            raise ConfigError(
                "BSplineTokenizer: with initial='fit' tokens do not say where a chunk begins; pass start to decode."
            )
        if start is not None and self.fixed:
            head = self._beside(self._head(start, points), None if self.initial == "fit" else points)
            head = torch.where(tables.is_gripper, points[:, : self.fixed], head)
            points = torch.cat([head, points[:, self.fixed :]], 1)
        return self._each(tables.decode, tables.decode_grippers, tables.is_gripper, points)

    def _each(self, joints: Tensor, grippers: Tensor, is_gripper: Tensor, rows: Tensor) -> Tensor:
        if torch.is_autocast_enabled(rows.device.type):  # which would round the product to half precision
            with torch.autocast(rows.device.type, enabled=False):
                return self._each(joints, grippers, is_gripper, rows)
        batch = rows.shape[0]  # bmm, which spares a single chunk half of what @ costs
        result = torch.bmm(joints.expand(batch, -1, -1), rows)
        if self.grippers:
            result = torch.where(is_gripper, torch.bmm(grippers.expand(batch, -1, -1), rows), result)
        return result

    def _head(self, start: Tensor, like: Tensor) -> Tensor:
        """Return the fixed control points (B, F, D) of ``start``."""
        batch = like.shape[0]  # len() would fix it in an exported program
        shape = (batch, 2, self.dims) if self.velocity else (batch, self.dims)
        if start.shape != shape:
            what = "position and velocity" if self.velocity else "positions"
            raise ShapeError(f"BSplineTokenizer: start must be {shape}, {what}, got {tuple(start.shape)}.")
        start = start.to(like)
        if not self.velocity:
            return start[:, None]
        return torch.stack([start[:, 0], start[:, 0] + self._reach * start[:, 1]], 1)

    def _beside(self, rows: Tensor, near: Tensor | None = None) -> Tensor:
        """Turn angles of rows (B, R, D) by 2 pi k and flip quaternions so that the first row comes next to ``near``'s.

        Without ``near``, its angles come into (-pi, pi], and the largest component of quaternions is positive.
        """
        if not self.angles and not self.quaternions:
            return rows
        rows = rows.clone()
        if self.angles:
            columns = list(self.angles)
            first = rows[:, :1, columns]
            anchor = torch.zeros_like(first) if near is None else near[:, :1, columns]
            rows[:, :, columns] += anchor + wrap(first - anchor) - first
        for at in self.quaternions:
            first = rows[:, :1, at : at + 4]
            anchor = same_hemisphere(first) if near is None else near[:, :1, at : at + 4]
            rows[:, :, at : at + 4] *= torch.where((first * anchor).sum(-1, keepdim=True) < 0, -1.0, 1.0)
        return rows

    # ---------------------------------------------------------------- matrices

    def _tables(self, steps: int, like: Tensor) -> _Tables:
        key = (steps, like.device, like.dtype)
        found = self._tables_made.get(key)
        if found is None:
            with torch.inference_mode(False):  # what is made in it could not be used in training later
                found = self._make_tables(steps, like.device, like.dtype)
            if not torch.compiler.is_compiling():  # what is made then has no values
                self._tables_made[key] = found
        return found

    def _make_tables(self, steps: int, device: torch.device, dtype: torch.dtype) -> _Tables:
        count, fixed = self.num_basis, self.fixed if self.initial == "fit" else 0
        seen, asked = np.linspace(0, 1, self.horizon), np.linspace(0, 1, steps)
        basis = basis_matrix(count, self.degree, seen)
        free = ridge_matrix(basis[:, fixed:], self.ridge)
        joints = np.zeros((count, self.horizon + fixed))
        joints[fixed:] = np.concatenate([free, -free @ basis[:, :fixed]], 1)  # what the fixed ones leave is fitted
        grippers = np.zeros_like(joints)
        grippers[:, : self.horizon] = ridge_matrix(basis_matrix(count, 0, seen), self.ridge)
        low = np.zeros((count, self.dims)) if self.low is None else np.asarray(self.low)
        high = np.ones((count, self.dims)) if self.high is None else np.asarray(self.high)
        step = (high - low) / (self.vocab_size - 1)
        return _Tables(
            encode=torch.tensor(joints, dtype=dtype, device=device),
            encode_grippers=torch.tensor(grippers, dtype=dtype, device=device),
            decode=torch.tensor(basis_matrix(count, self.degree, asked), dtype=dtype, device=device),
            decode_grippers=torch.tensor(basis_matrix(count, 0, asked), dtype=dtype, device=device),
            is_gripper=torch.tensor(np.isin(np.arange(self.dims), self.grippers), device=device),
            low=torch.tensor(low, dtype=dtype, device=device),
            step=torch.tensor(step, dtype=dtype, device=device),
            zero=torch.tensor(-low / step, dtype=dtype, device=device),
            per_unit=torch.tensor(1 / step, dtype=dtype, device=device),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables_made": {}}  # what is quick to make need not travel

    # ---------------------------------------------------------------- checks

    def _need_bounds(self) -> None:
        if self.low is None:
            raise ConfigError("BSplineTokenizer: there are no bounds yet; call fit on chunks of actions first.")

    def _check(self) -> None:
        count, degree, forms = self.num_basis, self.degree, get_args(Initial)
        rules = (
            (0 <= degree < count, f"degree must be from 0 to num_basis - 1 = {count - 1}, got {degree}"),
            (count <= self.horizon, f"num_basis must be at most the horizon of {self.horizon} steps, got {count}"),
            (0 <= self.ridge < math.inf, f"ridge must be a number from 0 on, got {self.ridge}"),
            (self.initial in forms, f"initial must be one of {', '.join(forms)}, got {self.initial!r}"),
            (not self.velocity or self.initial != "free", "velocity needs initial='overwrite' or initial='fit'"),
            (not self.velocity or degree >= 1, "velocity needs a degree of at least 1"),
            (count > self.fixed, f"start sets {self.fixed} control points; num_basis must be more, got {count}"),
        )
        for holds, rule in rules:
            if not holds:
                raise ConfigError(f"BSplineTokenizer: {rule}.")

    def _bounds(
        self, low: Sequence[Sequence[float]] | None, high: Sequence[Sequence[float]] | None
    ) -> tuple[Bounds | None, Bounds | None]:
        if low is None and high is None:
            return None, None
        shape = (self.num_basis, self.dims)
        if low is not None and high is not None:
            least, most = np.asarray(low, dtype=np.float32), np.asarray(high, dtype=np.float32)
            if least.shape == most.shape == shape and (most > least).all():
                return tuple(map(tuple, least.tolist())), tuple(map(tuple, most.tolist()))
        raise ConfigError(
            f"BSplineTokenizer: low and high must both be {shape[0]} rows of {shape[1]} numbers, each high above its "
            f"low; call fit to get them."
        )


def _real(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _size(low: Reals, high: Reals) -> Reals:
    return np.maximum(1, np.maximum(np.abs(low), np.abs(high)))


def _still(low: Reals, high: Reals) -> NDArray[np.bool_]:
    """Where bounds differ by rounding at most."""
    return high - low <= STILL * _size(low, high)
