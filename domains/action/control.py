"""Policies at work: chunks of actions asked for and carried out step by step, and loops at a fixed rate.

Shapes: B environments, H observed steps, S state dimensions, T steps of a chunk, D action dimensions, h x w pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vertebra.errors import ConfigError, DataError, ShapeError

Floats = NDArray[np.float32]
Pictures = Mapping[str, NDArray[np.uint8]]


class Policy(Protocol):
    """What says the next actions from what was seen."""

    @property
    def horizon(self) -> int:
        """T, steps of a chunk."""

    @property
    def history(self) -> int:
        """H, observed steps that it is shown."""

    def __call__(self, states: Floats, images: Pictures, tasks: Sequence[str], start: Floats | None) -> Floats:
        """Return the next actions, (B, T, D).

        Args:
            states: (B, H, S), the current one last.
            images: Pictures by camera, (B, H, h, w, 3) each.
            tasks: What is to be done, in words, B.
            start: Actions (B, D) that were carried out last; None where there was none yet.
        """


class Decision(NamedTuple):
    """One call of a policy: how long it took, in seconds, and for how many environments it decided."""

    seconds: float
    batch: int


class Controller:
    """Carries out a policy's chunks in B environments: receding horizon, or a mean of overlapping chunks.

    Environments may begin anew at different times (:meth:`reset`); the policy is asked for those alone that need a
    chunk, and for those at their first step in a call of their own.

    Args:
        policy: What is asked.
        batch: B.
        execute: Steps of a chunk that are carried out before the next is asked for. The whole chunk when None, one
            step with ``ensemble``.
        ensemble: Temporal ensembling (ACT, arXiv:2304.13705): an action is the mean of what all chunks so far say for
            its step, the i-th oldest with weight exp(-ensemble * i). None for the newest chunk alone.
        clock: Seconds; for the times of decisions.

    Raises:
        ConfigError: A number out of its range.
    """

    def __init__(
        self,
        policy: Policy,
        batch: int,
        *,
        execute: int | None = None,
        ensemble: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if batch < 1:
            raise ConfigError(f"Controller: batch must be at least 1, got {batch}.")
        if execute is None:
            execute = policy.horizon if ensemble is None else 1
        if not 1 <= execute <= policy.horizon:
            raise ConfigError(
                f"Controller: execute must be from 1 to {policy.horizon}, the steps of the policy's chunk, "
                f"got {execute}."
            )
        if ensemble is not None and not np.isfinite(ensemble):
            raise ConfigError(f"Controller: ensemble must be a finite number, got {ensemble}.")
        self.policy, self.batch, self.execute, self.ensemble = policy, batch, execute, ensemble
        self.timings: list[Decision] = []
        self._clock = clock
        self._states: Floats | None = None  # (B, H, S)
        self._images: dict[str, NDArray[np.uint8]] = {}  # (B, H, h, w, 3)
        self._steps = np.zeros(batch, np.int64)  # since the beginning of each environment
        self._last: Floats | None = None  # (B, D)
        self._chunks: list[list[tuple[int, Floats]]] = [[] for _ in range(batch)]  # step it was asked at, (T, D)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Forget what was seen and planned in the environments ``rows``, which begin anew; in all when None.

        Raises:
            ConfigError: There is no such environment.
        """
        for row in range(self.batch) if rows is None else rows:
            if not 0 <= row < self.batch:
                raise ConfigError(f"Controller: there is no environment {row}; they are 0 to {self.batch - 1}.")
            self._steps[row] = 0
            self._chunks[row] = []

    def act(self, states: ArrayLike, images: Pictures | None = None, tasks: Sequence[str] | None = None) -> Floats:
        """Return the actions (B, D) of the current step.

        Args:
            states: What is seen now, (B, S).
            images: Pictures by camera, (B, h, w, 3) each.
            tasks: What is to be done, in words, B; nothing is said when None.

        Raises:
            ShapeError: The number of environments, or the shape of what the policy says, is another.
            DataError: The policy says what is not a finite number.
        """
        now = np.asarray(states, dtype=np.float32)
        tasks = [""] * self.batch if tasks is None else list(tasks)
        self._observe(now, images or {}, tasks)
        for rows in self._waiting():
            self._decide(rows, tasks)
        actions = np.stack([self._action(row) for row in range(self.batch)])
        self._steps += 1
        self._last = actions
        return actions

    def deadline_misses(self, rate: float) -> int:
        """Return how many decisions took longer than one step at ``rate`` steps a second.

        Raises:
            ConfigError: ``rate`` is not above 0.
        """
        _check_rate(rate)
        return sum(decision.seconds > 1 / rate for decision in self.timings)

    # ---------------------------------------------------------------- steps of a step

    def _observe(self, states: Floats, images: Pictures, tasks: Sequence[str]) -> None:
        lengths = {"states": len(states) if states.ndim == 2 else 0, "tasks": len(tasks)}
        lengths |= {f"images of {name}": len(pictures) for name, pictures in images.items()}
        for name, length in lengths.items():
            if length != self.batch:
                raise ShapeError(f"Controller: {name} must be given for each of the {self.batch} environments.")
        if images.keys() != self._images.keys() and self._steps.any():
            raise ShapeError("Controller: images must be of the same cameras at every step.")
        self._states = self._shift("states", self._states, states)
        self._images = {
            name: self._shift(f"images of {name}", self._images.get(name), np.asarray(each))
            for name, each in images.items()
        }

    def _shift(self, name: str, seen: NDArray[Any] | None, now: NDArray[Any]) -> NDArray[Any]:
        """Add the current observation (B, ...) to those seen, (B, H, ...); the first one fills them."""
        filled = np.repeat(now[:, None], self.policy.history, axis=1)
        if seen is None or not self._steps.any():
            return filled
        if seen.shape != filled.shape:
            raise ShapeError(f"Controller: {name} must be {seen.shape[2:]} at every step, got {now.shape[1:]}.")
        moved = np.concatenate([seen[:, 1:], now[:, None]], axis=1)
        first = (self._steps == 0).reshape(-1, *[1] * now.ndim)
        return np.where(first, filled, moved)

    def _waiting(self) -> list[list[int]]:
        """Environments that need a chunk: those at their first step, and the others."""
        due = self._steps % self.execute == 0
        groups = [np.flatnonzero(due & (self._steps == 0)), np.flatnonzero(due & (self._steps > 0))]
        return [group.tolist() for group in groups if len(group)]

    def _decide(self, rows: list[int], tasks: Sequence[str]) -> None:
        assert self._states is not None
        start = self._last[rows] if self._last is not None and self._steps[rows[0]] else None
        images = {name: seen[rows] for name, seen in self._images.items()}
        begin = self._clock()
        chunks = np.asarray(self.policy(self._states[rows], images, [tasks[row] for row in rows], start), np.float32)
        self.timings.append(Decision(self._clock() - begin, len(rows)))
        if chunks.ndim != 3 or chunks.shape[:2] != (len(rows), self.policy.horizon):
            raise ShapeError(
                f"Controller: the policy must say ({len(rows)}, {self.policy.horizon}, D) actions, "
                f"but they are {chunks.shape}."
            )
        if not np.isfinite(chunks).all():
            raise DataError("Controller: the policy's actions are not finite numbers; do not carry them out.")
        for row, chunk in zip(rows, chunks, strict=True):
            step = int(self._steps[row])
            kept = [(asked, old) for asked, old in self._chunks[row] if step - asked < len(old)]
            self._chunks[row] = [*(kept if self.ensemble is not None else []), (step, chunk)]

    def _action(self, row: int) -> Floats:
        step = int(self._steps[row])
        told = np.stack([chunk[step - asked] for asked, chunk in self._chunks[row] if step - asked < len(chunk)])
        exponents = -(self.ensemble or 0.0) * np.arange(len(told))
        weights = np.exp(exponents - exponents.max())
        return ((weights / weights.sum()) @ told).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class RateReport:
    """How a loop kept its rate.

    Args:
        rate: Steps a second that were wanted.
        reached: Steps a second that were made.
        late: Numbers of the steps that were not done when the next was due.
        longest: Seconds of the longest step.
    """

    rate: float
    reached: float
    late: tuple[int, ...]
    longest: float


def run_at_rate(
    step: Callable[[int], None],
    rate: float,
    steps: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> RateReport:
    """Call ``step`` with 0, 1, ... at a fixed rate.

    The beginnings lie on an even grid, so that small delays do not add up. After a late step
    the grid begins anew: a robot is not sent several commands at once to catch up.

    Args:
        step: What is done at each step.
        rate: Steps a second.
        steps: How many.
        clock: Seconds.
        sleep: Waits so many seconds.

    Raises:
        ConfigError: ``rate`` is not above 0, or ``steps`` below 1.
    """
    _check_rate(rate)
    if steps < 1:
        raise ConfigError(f"run_at_rate: steps must be at least 1, got {steps}.")
    late: list[int] = []
    longest = 0.0
    first = begin = clock()
    for number in range(steps):
        started = clock()
        step(number)
        ended = clock()
        longest = max(longest, ended - started)
        begin += 1 / rate
        if ended > begin:
            late.append(number)
            begin = ended
        elif ended < begin:
            sleep(begin - ended)
    return RateReport(rate=rate, reached=steps / max(clock() - first, 1e-9), late=tuple(late), longest=longest)


def _check_rate(rate: float) -> None:
    if not 0 < rate < np.inf:
        raise ConfigError(f"rate must be a finite number of steps a second above 0, got {rate}.")
