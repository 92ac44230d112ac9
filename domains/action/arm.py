"""A made-up arm of seven joints with a two-finger gripper at a table: kinematics, and a simulator without forces.

Lengths are in metres, angles in radians, times in seconds. The base stands at the origin, +X points over the table and
+Z up; the table's surface is z = 0. Joints turn about the vertical and about crosswise axes in turns, so that a
position can be reached in many ways, as with human arms.

Shapes: any leading dimensions ``...``; T steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vertebra.errors import ConfigError, DataError, ShapeError, UnknownNameError

Doubles = NDArray[np.float64]
Floats = NDArray[np.float32]

SPLITS = ("train", "val", "test")
KINDS = ("reach", "pick")
JOINTS = 7
HOME = np.array([0.0, -0.7, 0.0, -2.3, 0.0, 1.6, 0.8])
"""The pose of rest: hand over the table, gripper down."""
LOWER = np.array([-2.8, -1.7, -2.8, -3.0, -2.8, 0.0, -2.8])
UPPER = np.array([2.8, 1.7, 2.8, -0.1, 2.8, 3.6, 2.8])
SPEED = 2.0
"""Fastest turn of a joint, rad/s."""
HALF = 0.02
"""Half the side of the block, and the height of its middle when it lies on the table."""
NOISE = 1e-3
"""Standard deviation of the sensors: rad, share of the gripper's opening, m."""
STATE_NAMES = (*(f"joint_{i + 1}" for i in range(JOINTS)), "gripper")
SCENE_NAMES = ("object_x", "object_y", "object_z", "goal_x", "goal_y", "goal_z")
TIP_NAMES = ("tip_x", "tip_y", "tip_z")
FULL_NAMES = (*STATE_NAMES, *SCENE_NAMES, *TIP_NAMES)
"""What the sensors say: the arm, the scene, and where the joints that were sensed put the fingertips."""
ACTION_NAMES = STATE_NAMES

_TURN = np.pi / 2
# From base to fingertips, before each joint: a step along the x axis of the last, a turn about it, and a step along the
# z axis, about which the joint turns. Shoulder at 0.34, elbow and wrist 0.08 beside their bones, fingertips 0.20 below
# the wrist.
_TABLE = (
    (0.0, 0.0, 0.34),
    (0.0, -_TURN, 0.0),
    (0.0, _TURN, 0.32),
    (0.08, _TURN, 0.0),
    (-0.08, -_TURN, 0.38),
    (0.0, _TURN, 0.0),
    (0.08, _TURN, 0.20),
)
_LINKS = np.array(
    [
        [
            [1, 0, 0, along],
            [0, np.cos(turn), -np.sin(turn), -np.sin(turn) * lift],
            [0, np.sin(turn), np.cos(turn), np.cos(turn) * lift],
            [0, 0, 0, 1],
        ]
        for along, turn, lift in _TABLE
    ]
)
_X, _Y, _CELL = (0.35, 0.65), (-0.3, 0.3), 0.05  # where blocks lie, and the squares that belong to one split
_HEIGHTS = (0.08, 0.4)  # of targets to reach
_APART = 0.12  # block and goal, at least
_GRASP, _PLACE, _REACH = 0.025, 0.03, 0.02  # how near is near enough
_GRIPPER_SPEED = 3.0  # openings a second
_BLOCKED = 0.5  # the opening that fits the block


# ---------------------------------------------------------------- kinematics


def frames(joints: ArrayLike) -> tuple[Doubles, Doubles]:
    """Return where the parts of the arm are.

    Args:
        joints: Angles (..., 7).

    Returns:
        Origins (..., 8, 3) of base, joints, the last one being the point between the fingertips, and their rotations
        (..., 8, 3, 3), whose columns are axes. A joint turns about the third.

    Raises:
        ShapeError: There are not seven angles.
    """
    joints = np.asarray(joints, np.float64)
    if joints.shape[-1:] != (JOINTS,):
        raise ShapeError(f"the arm has {JOINTS} joints: angles must be (..., {JOINTS}), got {joints.shape}.")
    turns = np.zeros((*joints.shape, 4, 4))
    turns[..., 0, 0] = turns[..., 1, 1] = np.cos(joints)
    turns[..., 1, 0] = np.sin(joints)
    turns[..., 0, 1] = -turns[..., 1, 0]
    turns[..., 2, 2] = turns[..., 3, 3] = 1
    links = _LINKS @ turns
    poses = np.empty((*joints.shape[:-1], JOINTS + 1, 4, 4))
    poses[..., 0, :, :] = np.eye(4)
    for i in range(JOINTS):
        np.matmul(poses[..., i, :, :], links[..., i, :, :], out=poses[..., i + 1, :, :])
    return poses[..., :3, 3], poses[..., :3, :3]


def forward(joints: ArrayLike) -> tuple[Doubles, Doubles]:
    """Map joint angles (..., 7) to the point between the fingertips (..., 3) and the gripper's rotation (..., 3, 3).

    The third column of the rotation is where the gripper points, and the fingers open along the second.
    """
    origins, rotations = frames(joints)
    return origins[..., -1, :], rotations[..., -1, :, :]


def jacobian(joints: ArrayLike) -> Doubles:
    """Return how the fingertips move and the gripper turns with each joint, (..., 6, 7): m and rad a rad."""
    return _jacobian(*frames(joints))


def inverse(positions: ArrayLike, start: ArrayLike = HOME) -> Doubles:
    """Return joint angles that bring the fingertips to positions, with the gripper pointing down.

    Damped least squares; what freedom is left draws the joints to ``start``, so that near positions give near angles.

    Args:
        positions: (..., 3).
        start: Angles to begin with, (7,) or (..., 7).

    Returns:
        Angles (..., 7).

    Raises:
        DataError: A position is out of reach.
    """
    positions = np.asarray(positions, np.float64)
    flat = positions.reshape(-1, 3)
    start = np.broadcast_to(np.asarray(start, np.float64), (*positions.shape[:-1], JOINTS)).reshape(-1, JOINTS)
    joints = start.copy()
    rows = np.arange(len(flat))  # that still move: a result does not depend on its neighbours
    for _ in range(100):
        step = _step(joints[rows], flat[rows], start[rows])
        joints[rows] = (joints[rows] + step).clip(LOWER, UPPER)
        rows = rows[np.abs(step).max(1) >= 1e-6]
        if not len(rows):
            break
    reached, rotations = forward(joints)
    missed = (np.linalg.norm(reached - flat, axis=1) > 1e-3) | (rotations[:, 2, 2] > -0.999)
    if missed.any():
        where = ", ".join(f"{value:.2f}" for value in flat[missed.argmax()])
        raise DataError(f"the arm cannot reach ({where}) m with its gripper down; choose a place on the table.")
    return joints.reshape(*positions.shape[:-1], JOINTS)


def minimum_jerk(start: ArrayLike, end: ArrayLike, steps: int) -> Doubles:
    """Return the smoothest way from rest to rest, (steps + 1, D), both ends included.

    Args:
        start: (D,).
        end: (D,).
        steps: At least 1.

    Raises:
        ConfigError: There is no step.
    """
    if steps < 1:
        raise ConfigError(f"minimum_jerk: steps must be at least 1, got {steps}.")
    start, end = np.asarray(start, np.float64), np.asarray(end, np.float64)
    s = np.linspace(0, 1, steps + 1)
    return start + (s**3 * (10 - 15 * s + 6 * s**2))[:, None] * (end - start)


def _step(joints: Doubles, positions: Doubles, rest: Doubles) -> Doubles:
    """Return what brings joints (B, 7) nearer to positions (B, 3) with the gripper down, and to their rest (B, 7)."""
    origins, rotations = frames(joints)
    both = _jacobian(origins, rotations)
    pointing = rotations[:, -1, :, 2]
    both[:, 3:] = np.cross(both[:, 3:], pointing[:, :, None], axis=1)  # how the direction moves, not the turn
    error = np.concatenate([positions - origins[:, -1], [0, 0, -1] - pointing], axis=1)  # (B, 6)
    damping = 1e-6 + 1e-2 * np.square(error).sum(1)  # careful far away, exact near the end
    inner = both @ both.swapaxes(1, 2) + damping[:, None, None] * np.eye(6)
    pulled = 0.5 * (rest - joints)
    left = error[:, :, None] - both @ pulled[:, :, None]
    step = pulled + (both.swapaxes(1, 2) @ np.linalg.solve(inner, left))[:, :, 0]
    return step * np.minimum(1, 0.3 / np.abs(step).max(1, keepdims=True, initial=1e-9))


def _jacobian(origins: Doubles, rotations: Doubles) -> Doubles:
    axes = rotations[..., 1:, :, 2]
    linear = np.cross(axes, origins[..., -1:, :] - origins[..., 1:, :])
    return np.concatenate([linear, axes], axis=-1).swapaxes(-1, -2)


# ---------------------------------------------------------------- scenes


@dataclass(frozen=True, eq=False)
class Scene:
    """How an episode begins.

    Args:
        kind: ``reach`` or ``pick``.
        joints: (7,).
        block: Middle of the block, (3,); what is to be reached has no block, and this is the goal.
        goal: (3,).
    """

    kind: str
    joints: Doubles
    block: Doubles
    goal: Doubles


def draw_scene(rng: np.random.Generator, split: str, kind: str) -> Scene:
    """Draw a scene whose block and goal lie on squares of the table that belong to a split.

    Args:
        rng: Where the draws come from.
        split: ``train``, ``val`` or ``test``.
        kind: ``reach`` or ``pick``.

    Raises:
        UnknownNameError: No such split or kind.
    """
    if kind not in KINDS:
        raise UnknownNameError("kind of episode", kind, KINDS)
    goal = _draw_place(rng, split)
    if kind == "reach":
        goal[2] = rng.uniform(*_HEIGHTS)
        while True:
            joints = (HOME + rng.uniform(-0.6, 0.6, JOINTS)).clip(LOWER, UPPER)
            if frames(joints)[0][3:, 2].min() > 0.12:  # off the table
                return Scene(kind, joints, goal, goal)
    while True:
        block = _draw_place(rng, split)
        if np.linalg.norm(block - goal) >= _APART:
            return Scene(kind, HOME + rng.uniform(-0.05, 0.05, JOINTS), block, goal)


def split_of(x: float, y: float) -> str:
    """Return the split of a place on the table: of squares of 5 cm 6 in 8 are train, one val and one test."""
    column, row = int(np.floor((x - _X[0]) / _CELL)), int(np.floor((y - _Y[0]) / _CELL))
    return {2: "val", 6: "test"}.get((3 * column + row) % 8, "train")


@cache
def _squares() -> Mapping[str, Sequence[tuple[float, float]]]:
    """Lower corners of the squares of each split."""
    found: dict[str, list[tuple[float, float]]] = {split: [] for split in SPLITS}
    counts = (round((high - low) / _CELL) for low, high in (_X, _Y))
    for i, j in product(*map(range, counts)):
        corner = (_X[0] + i * _CELL, _Y[0] + j * _CELL)
        found[split_of(corner[0] + _CELL / 2, corner[1] + _CELL / 2)].append(corner)
    return found


def _draw_place(rng: np.random.Generator, split: str) -> Doubles:
    if split not in SPLITS:
        raise UnknownNameError("split", split, SPLITS)
    squares = _squares()[split]
    corner = squares[int(rng.integers(len(squares)))]
    return np.array([*(corner + rng.uniform(0.01, 0.99, 2) * _CELL), HALF])


# ---------------------------------------------------------------- the simulator


class KinematicArm:
    """The arm, one block and one goal: joints go where they are told as fast as they can, a closed gripper carries.

    An action is seven joint angles and the gripper, 1 for open and 0 for closed (0.5 decides). A gripper that closes
    within 2.5 cm of the block holds it; when it opens, the block falls to the table.

    Args:
        fps: Steps a second.
        noise: Standard deviation of the sensors.
    """

    def __init__(self, *, fps: float = 20.0, noise: float = NOISE) -> None:
        if not fps > 0:
            raise ConfigError(f"KinematicArm: fps must be above 0, got {fps}.")
        self.fps, self.noise = fps, noise
        self.reset(0)

    def reset(self, seed: int, split: str = "test", kind: str = "pick") -> Floats:
        """Begin a scene of a split, and return what the sensors say.

        Args:
            seed: Seed of the scene and of the sensors' noise.
            split: As in :func:`draw_scene`.
            kind: ``reach`` (the fingertips belong at the goal) or ``pick`` (the block does).
        """
        rng = np.random.default_rng([seed, *split.encode()])
        return self.place(draw_scene(rng, split, kind), rng)

    def place(self, scene: Scene, rng: np.random.Generator | None = None) -> Floats:
        """Begin a given scene, and return what the sensors say.

        Args:
            scene: As :func:`draw_scene` gives it.
            rng: Where the noise of the sensors comes from.
        """
        self.kind, self.joints = scene.kind, np.array(scene.joints, np.float64)
        self.block, self.goal = np.array(scene.block, np.float64), np.array(scene.goal, np.float64)
        self.opening = 1.0
        self.holds = self.placed = False
        self._grip = np.zeros(3)  # from the fingertips to the block
        self._rng = rng or np.random.default_rng(0)
        return self._sense()

    @property
    def tip(self) -> Doubles:
        """Point between the fingertips, (3,)."""
        return forward(self.joints)[0]

    @property
    def succeeded(self) -> bool:
        """Whether the fingertips are within 2 cm of the goal, or the block was let go within 3 cm of it."""
        if self.kind == "reach":
            return bool(np.linalg.norm(self.tip - self.goal) <= _REACH)
        return self.placed

    def observe(self) -> Floats:
        """Return what the sensors say: joints, opening of the gripper (0 to 1), block, goal and fingertips, (17,)."""
        return self._seen.copy()

    def step(self, action: ArrayLike) -> Floats:
        """Do an action (8,), and return what the sensors say afterwards, (17,).

        Raises:
            ShapeError: It is not of eight numbers.
            DataError: It is not finite.
        """
        action = np.asarray(action, np.float64)
        if action.shape != (JOINTS + 1,):
            raise ShapeError(f"KinematicArm: an action is {JOINTS} joints and the gripper, got shape {action.shape}.")
        if not np.isfinite(action).all():
            raise DataError("KinematicArm: the action is not finite.")
        limit = SPEED / self.fps
        self.joints += (action[:JOINTS].clip(LOWER, UPPER) - self.joints).clip(-limit, limit)
        before, wanted = self.opening, float(action[JOINTS] > 0.5)
        limit = _GRIPPER_SPEED / self.fps
        self.opening = min(max(wanted, before - limit), before + limit)
        if self.holds:
            self.block = self.tip + self._grip
            if wanted:
                self.holds = False
                self.placed = bool(np.linalg.norm(self.block - self.goal) <= _PLACE)
                self.block[2] = HALF
        elif self.kind == "pick" and before > _BLOCKED >= self.opening:
            self._grip = self.block - self.tip
            self.holds = bool(np.linalg.norm(self._grip) <= _GRASP)
            self.placed = self.placed and not self.holds
        if self.holds:
            self.opening = _BLOCKED
        return self._sense()

    def render(self, size: int = 48) -> NDArray[np.uint8]:
        """Return a picture from a camera in front of the arm, (size, size, 3)."""
        block = self.block if self.kind == "pick" else None
        return render(self.joints, self.opening, block, self.goal, size)

    def _sense(self) -> Floats:
        exact = np.concatenate([self.joints, [self.opening], self.block, self.goal])
        seen = exact + self.noise * self._rng.normal(size=len(exact))
        self._seen = np.concatenate([seen, forward(seen[:JOINTS])[0]]).astype(np.float32)
        return self.observe()


def success(actions: ArrayLike, block: ArrayLike, goal: ArrayLike, *, fps: float = 20.0) -> bool:
    """Return whether actions pick the block up and put it at the goal: the check of :class:`KinematicArm`.

    Args:
        actions: Joints and gripper, (T, 8); the arm begins at the first, with an open gripper.
        block: Where the block lies, (3,).
        goal: Where it belongs, (3,).
        fps: Steps a second.

    Raises:
        ShapeError: Actions are not (T, 8), or there is none.
    """
    actions, block, goal = (np.asarray(each, np.float64) for each in (actions, block, goal))
    if actions.ndim != 2 or actions.shape[1] != JOINTS + 1 or not len(actions):
        raise ShapeError(f"success: actions must be (T, {JOINTS + 1}) with T at least 1, got {actions.shape}.")
    arm = KinematicArm(fps=fps)
    arm.place(Scene("pick", actions[0, :JOINTS], block, goal))
    for action in actions:
        arm.step(action)
    return arm.succeeded


# ---------------------------------------------------------------- the camera

_EYE = np.array([1.4, 0.0, 1.0])
_TILT = 0.69  # down, rad
_VIEW = np.array([[0, np.sin(_TILT), -np.cos(_TILT)], [1, 0, 0], [0, -np.cos(_TILT), -np.sin(_TILT)]])
_CORNERS = np.array([[-0.15, -0.5, 0], [0.75, -0.5, 0], [0.75, 0.5, 0], [-0.15, 0.5, 0]])
_FOCAL = 1.75  # of half the picture's width
_FINE = 4  # times finer is it drawn, so that edges show parts of pixels
_WALL, _WOOD, _STEEL, _FINGER = (214, 222, 228), (168, 132, 96), (70, 80, 96), (24, 26, 32)
_GOAL, _BLOCK = (60, 160, 80), (206, 52, 48)


def render(
    joints: ArrayLike, opening: float, block: Doubles | None, goal: Doubles, size: int = 48
) -> NDArray[np.uint8]:
    """Draw the arm from a camera in front of it.

    Args:
        joints: (7,).
        opening: Of the gripper, 0 to 1.
        block: Middle of the block, (3,), or None where there is none.
        goal: (3,).
        size: Pixels of a side.

    Returns:
        RGB, uint8 (size, size, 3).
    """
    from PIL import Image, ImageDraw

    origins, rotations = frames(joints)
    tip, hand = origins[-1], rotations[-1]
    palm = tip - 0.06 * hand[:, 2]
    beside = (0.005 + 0.04 * opening) * hand[:, 1]
    fingers = np.stack([palm - beside, tip - beside, palm + beside, tip + beside])
    places = goal if block is None else block
    fine = size * _FINE
    seen = np.concatenate([_CORNERS, origins[:-1], [palm], fingers, [goal, places]]) - _EYE
    seen = seen @ _VIEW  # right, down, ahead
    pixels = (1 + _FOCAL * seen[:, :2] / seen[:, 2:]) * fine / 2
    points = [(x, y) for x, y in pixels.tolist()]

    picture = Image.new("RGB", (fine, fine), _WALL)
    draw = ImageDraw.Draw(picture)

    def square(row: int, half: float, colour: tuple[int, int, int]) -> None:
        (x, y), reach = points[row], half * _FOCAL * fine / 2 / float(seen[row, 2])
        draw.rectangle((x - reach, y - reach, x + reach, y + reach), fill=colour)

    draw.polygon(points[:4], fill=_WOOD)
    square(-2, 2.4 * HALF, _GOAL)  # both larger than they are, to be seen
    draw.line(points[4:-6], fill=_STEEL, width=fine // 16)
    if block is not None:
        square(-1, 1.4 * HALF, _BLOCK)
    draw.line(points[-6:-4], fill=_FINGER, width=fine // 32)
    draw.line(points[-4:-2], fill=_FINGER, width=fine // 32)
    return np.asarray(picture.reduce(_FINE)).copy()
