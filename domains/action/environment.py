"""What a simulator offers: environments that are stepped, and tasks that say how to make one.

Shapes: S state dimensions, D action dimensions, h x w pictures that a policy sees, H x W pictures for people.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.action.experts import Noise

Floats = NDArray[np.float32]
Frame = NDArray[np.uint8]
"""One picture, (H, W, 3)."""


class Environment(Protocol):
    """A robot at a task, one episode after another."""

    @property
    def success(self) -> bool:
        """Whether the task is done as things stand."""

    @property
    def tip(self) -> NDArray[Any]:
        """Where the gripper is, (3,), in metres."""

    @property
    def carried(self) -> NDArray[Any] | None:
        """Where the thing is that is to be moved, (3,), in metres; None where there is none."""

    @property
    def goal(self) -> NDArray[Any]:
        """Where the gripper, or the thing, belongs, (3,), in metres."""

    def reset(self, seed: int) -> Floats:
        """Begin the episode of a seed, and return its first state (S,)."""

    def step(self, action: Floats) -> Floats:
        """Carry out an action (D,), and return the state (S,) after it."""

    def images(self) -> dict[str, Frame]:
        """Return what a policy sees now, (h, w, 3) by camera; nothing where there is no camera."""

    def render(self) -> Frame:
        """Return a picture for people, (H, W, 3); what follows does not depend on whether one is taken.

        Raises:
            ConfigError: Drawing does not work on this machine.
        """

    def close(self) -> None:
        """Give back what it holds; it is of no use afterwards."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedTask:
    """A task of a simulator.

    Args:
        name: In short.
        source: In full; it stands in demonstrations.
        text: What is to be done, in words.
        robot: Its name.
        fps: Steps a second.
        steps: Steps of an episode; an expert needs fewer.
        state_names: Names of the S state dimensions.
        action_names: Names of the D action dimensions, the gripper's last.
        low: Least actions, (D,).
        high: Greatest actions, (D,).
        noise: Disturbances while demonstrations are recorded.
        make: Makes the environment for scenes of a split: ``train`` for demonstrations, ``test`` for policies; where
            scenes are not cut into splits, they are told apart by their seeds.
        expert: Yields the actions (D,) for an environment that it makes and that was reset, each for the state at
            that time; where they end, the episode does.
    """

    name: str
    source: str
    text: str
    robot: str
    fps: float
    steps: int
    state_names: tuple[str, ...]
    action_names: tuple[str, ...]
    low: Floats
    high: Floats
    noise: Noise
    make: Callable[[str], Environment]
    expert: Callable[[Any], Iterator[Floats]]
