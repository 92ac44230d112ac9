"""Scripted experts of the Fetch tasks, for demonstrations to learn from and as an upper bound.

An expert keeps no memory: what it does follows from what it sees, so that a learner that sees the same can know it, and
it recovers from any disturbance. Where a script would switch from phase to phase, the height of the target rises
smoothly with what is still wrong sideways: the gripper comes down a funnel. Only the fingers switch.

Actions are (dx, dy, dz, fingers) in [-1, 1]; one step of 1 is a move of about 3 cm.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, UnknownNameError

Array = NDArray[np.float64]
Expert = Callable[[Mapping[str, Array]], NDArray[np.float32]]
"""Observation of the environment (``observation``, ``achieved_goal``, ``desired_goal``) to an action (4,)."""

STEP = 0.0315
"""Metres that an action of 1 moves the gripper in a step."""
GAIN = 0.3
"""Part of the way to the target that is made in a step."""
START = 0.3
"""Most by which an action is faster than the gripper is on its way."""
OPEN, CLOSE = 1.0, -1.0
BLOCK = 0.05
"""Side of the block in metres."""
BEHIND, ROUND = 0.06, 0.08
"""Distances from the block's centre, in metres, of the place to push from and of the way there."""
CLOSE_BY = 0.015
"""Metres from the goal at which a pushed block is left alone."""


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Disturbances of what is executed while the expert's own action is recorded (DART, arXiv:1703.09327).

    Now and then the gripper is pushed one way for a while; a learner sees how the expert comes back.

    Args:
        probability: That a push begins at a step.
        strength: Standard deviation of a push in each direction, in units of the action.
        steps: How long a push lasts.
        calm: Steps at the end of an episode at which no push begins; there is no coming back from those.

    Raises:
        ConfigError: A number out of its range.
    """

    probability: float = 0.06
    strength: float = 0.5
    steps: int = 2
    calm: int = 10

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1 or not self.strength >= 0 or self.steps < 1 or self.calm < 0:
            raise ConfigError(
                "Noise: probability must be from 0 to 1, strength and calm at least 0 and steps at least 1, got "
                f"{self.probability}, {self.strength}, {self.calm}, {self.steps}."
            )

    def draw(self, rng: np.random.Generator, steps: int, dims: int = 4) -> NDArray[np.float32]:
        """Return what is added to the actions of an episode, (steps, dims); the last, the gripper, is left alone."""
        pushes = np.zeros((steps, dims), np.float32)
        begins = (rng.random(steps) < self.probability) & (np.arange(steps) < steps - self.calm)
        strengths = rng.normal(0, self.strength, (steps, dims - 1))
        for first in np.flatnonzero(begins):
            pushes[first : first + self.steps, :-1] = strengths[first]
        return pushes


def reach(seen: Mapping[str, Array]) -> NDArray[np.float32]:
    """Bring the gripper to the goal."""
    observation = seen["observation"]
    return _move(observation[:3], observation[5:8], seen["desired_goal"], 0.0)


def push(seen: Mapping[str, Array]) -> NDArray[np.float32]:
    """Go round the block to the side away from the goal, and push it there."""
    observation, block, goal = seen["observation"], seen["achieved_goal"], seen["desired_goal"]
    hand = observation[:3]
    way = goal[:2] - block[:2]
    left = float(np.linalg.norm(way))
    ahead = way / max(left, 1e-6)
    side = np.array([-ahead[1], ahead[0]])
    offset = hand[:2] - block[:2]
    behind, aside = -float(offset @ ahead), float(offset @ side)
    if left < CLOSE_BY:  # the direction would turn with the least move of the block
        return _move(hand, observation[20:23], np.append(hand[:2], block[2]), 0.0)
    angle = float(np.arctan2(aside, behind))
    nearer = angle - np.clip(angle, -0.9, 0.9)
    radius = BEHIND + (ROUND - BEHIND) * min(1.0, abs(angle) / 0.8)
    orbit = block[:2] + radius * (np.sin(nearer) * side - np.cos(nearer) * ahead)
    straight = hand[:2] + (left + max(0.0, behind - BEHIND)) * ahead - 1.5 * aside * side
    ready = np.clip((0.025 - abs(aside)) / 0.01, 0, 1) if behind > 0 else 0.0
    target = np.append(ready * straight + (1 - ready) * orbit, block[2])
    return _move(hand, observation[20:23], target, 0.0)


def pick_and_place(seen: Mapping[str, Array]) -> NDArray[np.float32]:
    """Come down on the block, close the fingers and carry it to the goal."""
    observation, block, goal = seen["observation"], seen["achieved_goal"], seen["desired_goal"]
    hand, fingers = observation[:3], observation[9:11]
    aside = float(np.linalg.norm(block[:2] - hand[:2]))
    around = aside < 0.012 and abs(block[2] - hand[2]) < 0.012
    held = around and fingers.sum() < BLOCK + 0.004
    if held:
        far = float(np.linalg.norm(goal[:2] - block[:2]))
        target = goal + hand - block
        target[2] += np.clip(far - 0.03, 0, 0.03)  # off the table on the way
    else:
        target = block.copy()
        target[2] += np.clip(2.5 * (aside - 0.008), 0, 0.08)
    return _move(hand, observation[20:23], target, CLOSE if around else OPEN)


def _move(hand: Array, velocity: Array, target: Array, fingers: float) -> NDArray[np.float32]:
    """Go to the target, ever slower, never faster than 1; ``velocity`` (3,), metres a step, is for a soft start."""
    wanted = GAIN * (target - hand) / STEP
    speed = max(float(np.linalg.norm(wanted)), 1e-9)
    now = max(0.0, float(velocity @ wanted) / speed / STEP)
    wanted *= min(speed, 1.0, now + START) / speed
    return np.append(wanted, fingers).astype(np.float32)


EXPERTS: dict[str, Expert] = {"FetchReach": reach, "FetchPush": push, "FetchPickAndPlace": pick_and_place}
"""Expert of each task."""


class ExpertPolicy:
    """An expert as a policy that says one step at a time; what a learner can hope for.

    Args:
        task: A key of :data:`EXPERTS`.

    Raises:
        UnknownNameError: There is no expert of it.
    """

    horizon = 1
    history = 1

    def __init__(self, task: str) -> None:
        if task not in EXPERTS:
            raise UnknownNameError("expert", task, EXPERTS)
        self.expert = EXPERTS[task]
        self._place = slice(0, 3) if task == "FetchReach" else slice(3, 6)  # of what is to be at the goal

    def __call__(
        self,
        states: NDArray[np.float32],
        images: Mapping[str, NDArray[np.uint8]],
        tasks: Sequence[str],
        start: NDArray[np.float32] | None,
    ) -> NDArray[np.float32]:
        """Return actions (B, 1, 4) for states (B, 1, S): the observation, then the goal."""
        seen = states[:, -1].astype(np.float64)
        views = ({"observation": s[:-3], "achieved_goal": s[self._place], "desired_goal": s[-3:]} for s in seen)
        return np.stack([self.expert(view) for view in views])[:, None]
