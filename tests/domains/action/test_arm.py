"""The arm: kinematics against slow twins, scenes of splits, and the simulator without forces."""

import numpy as np
import pytest

from vertebra.domains.action import arm
from vertebra.domains.action.arm import HALF, HOME, JOINTS, KinematicArm, Scene
from vertebra.errors import ConfigError, DataError, ShapeError, UnknownNameError

BLOCK, GOAL = np.array([0.45, 0.1, HALF]), np.array([0.5, -0.15, HALF])


def poses(*shape):
    return np.random.default_rng(0).uniform(arm.LOWER, arm.UPPER, (*shape, JOINTS))


def walk(*places, fps=20.0):
    """Actions that go through places with a gripper command each, and wait there until the fingers have moved."""
    here, rows = HOME, []
    for place, gripper in places:
        there = arm.inverse(place)
        way = arm.minimum_jerk(here, there, round(1.5 * fps))[1:]
        before = rows[-1][-1, -1] if rows else 1
        rows.append(np.column_stack([way, np.full(len(way), before)]))
        rows.append(np.tile([*there, gripper], (10, 1)))
        here = there
    return np.concatenate(rows)


# ---------------------------------------------------------------- kinematics


def test_stretched_arm_is_as_high_as_its_parts():
    tip, rotation = arm.forward(np.zeros(JOINTS))
    # the wrist stands out, and the hand hangs down from it
    np.testing.assert_allclose(tip, [0.08, 0, 0.34 + 0.32 + 0.38 - 0.20], atol=1e-12)
    np.testing.assert_allclose(rotation, np.diag([1, -1, -1]), atol=1e-12)


def test_home_points_down_over_the_table():
    tip, rotation = arm.forward(HOME)
    np.testing.assert_allclose(rotation[:, 2], [0, 0, -1], atol=1e-12)
    assert 0.25 < tip[0] < 0.5
    assert 0.3 < tip[2] < 0.6


def test_frames_are_rigid_and_of_any_leading_shape():
    joints = poses(2, 3)
    origins, rotations = arm.frames(joints)
    assert origins.shape == (2, 3, 8, 3)
    np.testing.assert_allclose(
        rotations @ rotations.swapaxes(-1, -2), np.broadcast_to(np.eye(3), rotations.shape), atol=1e-12
    )
    np.testing.assert_allclose(np.linalg.det(rotations), 1)
    single = arm.frames(joints[1, 2])
    np.testing.assert_allclose(origins[1, 2], single[0])
    # bones keep their length whatever the joints are
    lengths = np.linalg.norm(np.diff(origins, axis=-2), axis=-1)
    np.testing.assert_allclose(
        lengths,
        np.broadcast_to([0.34, 0, 0.32, 0.08, np.hypot(0.08, 0.38), 0, np.hypot(0.08, 0.2)], lengths.shape),
        atol=1e-12,
    )


@pytest.mark.parametrize("joint", range(JOINTS))
def test_a_joint_turns_what_follows_about_its_axis(joint):
    before, after = poses(), poses()
    after[:] = before
    after[joint] += 0.4
    origins, rotations = arm.frames(before)
    moved, turned = arm.frames(after)
    np.testing.assert_allclose(moved[: joint + 2], origins[: joint + 2], atol=1e-12)
    np.testing.assert_allclose(turned[: joint + 1], rotations[: joint + 1], atol=1e-12)
    change = turned[-1] @ rotations[-1].T
    np.testing.assert_allclose(change @ rotations[joint + 1, :, 2], rotations[joint + 1, :, 2], atol=1e-12)
    np.testing.assert_allclose(np.trace(change), 1 + 2 * np.cos(0.4))


def test_jacobian_is_the_derivative():
    joints, small = poses(4), 1e-6
    found = arm.jacobian(joints)
    assert found.shape == (4, 6, JOINTS)
    for j in range(JOINTS):
        step = small * np.eye(JOINTS)[j]
        (after, turned), (before, rotation) = arm.forward(joints + step), arm.forward(joints - step)
        np.testing.assert_allclose(found[:, :3, j], (after - before) / (2 * small), atol=1e-8)
        spin = (turned - rotation) / (2 * small) @ arm.forward(joints)[1].swapaxes(-1, -2)  # antisymmetric
        vector = np.stack([spin[:, 2, 1], spin[:, 0, 2], spin[:, 1, 0]], axis=-1)
        np.testing.assert_allclose(found[:, 3:, j], vector, atol=1e-8)


def test_inverse_reaches_the_table_with_the_gripper_down():
    places = np.stack(
        np.meshgrid([0.35, 0.5, 0.65], np.linspace(-0.3, 0.3, 5), [HALF, 0.2, 0.4], indexing="ij"), axis=-1
    )
    joints = arm.inverse(places)
    assert joints.shape == (3, 5, 3, JOINTS)
    tip, rotation = arm.forward(joints)
    np.testing.assert_allclose(tip, places, atol=1e-4)
    np.testing.assert_allclose(rotation[..., 2], np.broadcast_to([0, 0, -1], tip.shape), atol=1e-3)
    assert (joints >= arm.LOWER).all()
    assert (joints <= arm.UPPER).all()


def test_near_positions_have_near_angles():
    line = np.linspace([0.4, -0.2, 0.1], [0.4, -0.1, 0.1], 11)  # steps of 1 cm
    assert np.abs(np.diff(arm.inverse(line), axis=0)).max() < 0.05


def test_inverse_goes_on_from_where_it_begins():
    start = arm.inverse([0.5, 0.1, 0.1])
    np.testing.assert_allclose(arm.inverse([0.5, 0.1, 0.1], start), start, atol=1e-4)
    elsewhere = arm.inverse([0.5, 0.1, 0.1], np.add(HOME, [0, 0, 0.5, 0, 0, 0, 0]))
    assert np.abs(elsewhere - start).max() > 0.1  # the same place, reached in another way
    np.testing.assert_allclose(arm.forward(elsewhere)[0], [0.5, 0.1, 0.1], atol=1e-4)


def test_out_of_reach():
    with pytest.raises(
        DataError, match=r"cannot reach \(1\.40, 0\.00, 0\.10\) m with its gripper down; choose a place"
    ):
        arm.inverse([[0.5, 0, 0.1], [1.4, 0, 0.1]])


def test_minimum_jerk():
    way = arm.minimum_jerk([0.0, 1.0], [2.0, 1.0], 100)
    assert way.shape == (101, 2)
    np.testing.assert_array_equal(way[[0, -1]], [[0, 1], [2, 1]])
    np.testing.assert_allclose(way[50], [1, 1])
    np.testing.assert_allclose(way + way[::-1], np.broadcast_to([2, 2], way.shape))  # forth is as back
    speed = np.diff(way[:, 0]) * 100
    assert speed[0] < 0.01
    np.testing.assert_allclose(speed.max(), 2 * 1.875, rtol=1e-3)
    # of all ways from rest to rest it has the least jerk: a cubic has more, also with its ends left out
    s = np.linspace(0, 1, 101)
    cubic = 2 * s**2 * (3 - 2 * s)
    jerk = [np.square(np.diff(each, n=3)).sum() for each in (np.pad(way[:, 0], 3, "edge"), np.pad(cubic, 3, "edge"))]
    assert jerk[0] < jerk[1] / 5
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        arm.minimum_jerk([0], [1], 0)


def test_wrong_shape():
    with pytest.raises(ShapeError, match=r"angles must be \(\.\.\., 7\), got \(2, 6\)"):
        arm.frames(np.zeros((2, 6)))


# ---------------------------------------------------------------- scenes


def test_splits_share_no_square():
    squares = {split: set() for split in arm.SPLITS}
    rng = np.random.default_rng(0)
    for split, kind in ((s, k) for s in arm.SPLITS for k in arm.KINDS for _ in range(300)):
        scene = arm.draw_scene(rng, split, kind)
        for x, y, z in (scene.block, scene.goal):
            assert arm.split_of(x, y) == split
            assert 0.35 <= x <= 0.65
            assert -0.3 <= y <= 0.3
            assert z == HALF if kind == "pick" else 0.08 <= z <= 0.4
            squares[split].add((int((x - 0.35) / 0.05), int((y + 0.3) / 0.05)))
        if kind == "pick":
            assert np.linalg.norm(scene.block - scene.goal) >= 0.12
        assert arm.frames(scene.joints)[0][3:, 2].min() > 0.1
    assert {split: len(found) for split, found in squares.items()} == {"train": 54, "val": 9, "test": 9}
    assert not squares["train"] & squares["val"]
    assert not squares["train"] & squares["test"]
    assert not squares["val"] & squares["test"]


def test_unknown_split_and_kind():
    rng = np.random.default_rng(0)
    with pytest.raises(UnknownNameError, match=r"unknown split 'tset'\. Did you mean 'test'"):
        arm.draw_scene(rng, "tset", "pick")
    with pytest.raises(UnknownNameError, match="unknown split 'tset'"):
        KinematicArm().reset(0, "tset")
    with pytest.raises(UnknownNameError, match="unknown kind of episode 'push'"):
        KinematicArm().reset(0, "test", "push")
    with pytest.raises(ConfigError, match="fps must be above 0, got 0"):
        KinematicArm(fps=0)


# ---------------------------------------------------------------- the simulator


def begun(kind="pick"):
    simulated = KinematicArm(noise=0)
    simulated.place(Scene(kind, HOME, BLOCK, GOAL))
    return simulated


def test_reset_is_of_its_seed():
    simulated = KinematicArm()
    first, other = simulated.reset(3), simulated.reset(4)
    assert first.shape == (17,)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(KinematicArm().reset(3), first)
    assert np.abs(first - other).max() > 0.01
    assert not np.array_equal(simulated.reset(3, "train"), first)
    assert arm.split_of(*simulated.block[:2]) == "train"
    simulated.reset(3, "val", "reach")
    assert arm.split_of(*simulated.goal[:2]) == "val"
    np.testing.assert_array_equal(simulated.block, simulated.goal)


def test_joints_go_no_faster_than_they_can_and_stop_at_their_limits():
    simulated = begun()
    far = np.array([*(HOME + 1), 1.0])
    states = np.array([simulated.step(far) for _ in range(15)])
    np.testing.assert_allclose(states[0, :JOINTS], HOME + 0.1, atol=1e-6)
    np.testing.assert_allclose(states[-1, :JOINTS], np.minimum(HOME + 1, arm.UPPER), atol=1e-6)
    for _ in range(40):
        state = simulated.step(np.full(8, 9.0))
    np.testing.assert_allclose(state[:JOINTS], arm.UPPER, atol=1e-6)


def test_sensors_are_noisy_and_what_they_say_stays():
    simulated = KinematicArm(noise=1e-3)
    scene = Scene("pick", HOME, BLOCK, GOAL)
    simulated.place(scene, np.random.default_rng(0))
    seen = np.array([simulated.step([*HOME, 1.0]) for _ in range(400)])
    np.testing.assert_allclose(seen[:, :14].std(0), 1e-3, rtol=0.15)
    np.testing.assert_allclose(seen[:, :14].mean(0), [*HOME, 1, *BLOCK, *GOAL], atol=3e-4)
    np.testing.assert_allclose(seen[:, 14:], arm.forward(seen[:, :JOINTS])[0], atol=1e-5)
    np.testing.assert_array_equal(simulated.observe(), simulated.observe())
    np.testing.assert_array_equal(simulated.observe(), seen[-1])


def test_gripper_takes_hold_carries_and_lets_go():
    simulated = begun()
    above = np.array([0, 0, 0.15])
    actions = walk((BLOCK + above, 1), (BLOCK, 0), (BLOCK + above, 0), (GOAL, 1), (GOAL + above, 1))
    states = np.array([simulated.step(action) for action in actions])
    assert simulated.succeeded
    assert not simulated.holds
    assert states[:, 7].min() == 0.5  # the block keeps the fingers apart
    tips = arm.forward(states[:, :JOINTS])[0]
    np.testing.assert_allclose(states[:73, 8:11], np.broadcast_to(BLOCK, (73, 3)), atol=1e-6)
    np.testing.assert_allclose(states[75:150, 8:11], tips[75:150], atol=1e-3)  # carried
    assert states[119, 10] > 0.15
    np.testing.assert_allclose(states[155:, 8:11], np.broadcast_to(GOAL, (45, 3)), atol=1e-3)


@pytest.mark.parametrize(("off", "held"), [(0.022, True), (0.028, False)])
def test_how_near_a_gripper_must_be(off, held):
    simulated = begun()
    for action in walk((BLOCK + np.array([0, off, 0]), 0)):
        simulated.step(action)
    assert simulated.holds == held


def whole(offset=(0, 0, 0), goal=(0, 0, 0), above=0.15):
    """A pick and a place, each off by so much."""
    lift, block, place = np.array([0, 0, above]), BLOCK + offset, GOAL + goal
    return walk((block + lift, 1), (block, 0), (block + lift, 0), (place + lift, 0), (place, 1), (place + lift, 1))


def test_success():
    assert arm.success(whole(), BLOCK, GOAL)
    for actions in (whole((0.02, 0, 0)), whole(goal=(0, 0.025, 0))):
        assert arm.success(actions, BLOCK, GOAL)


@pytest.mark.parametrize(
    "actions",
    [
        whole((0.03, 0, 0)),  # closes beside the block
        whole(goal=(0, 0.04, 0)),  # opens beside the goal
        whole(goal=(0, 0, 0.05)),  # lets it drop from above
        whole()[:185],  # not yet there
        walk((GOAL, 0), (GOAL, 1)),  # carries nothing
        walk((BLOCK, 0), (BLOCK, 1)),  # puts it down again
    ],
)
def test_no_success(actions):
    assert not arm.success(actions, BLOCK, GOAL)


def test_taking_it_up_again_undoes_the_success():
    actions = whole()
    assert arm.success(actions, BLOCK, GOAL)
    again = np.concatenate([actions, walk((GOAL, 0))])
    assert not arm.success(again, BLOCK, GOAL)


def test_half_open_and_bare_hands():
    simulated = begun()
    for action in walk((BLOCK, 0.4)):  # below half is closed
        simulated.step(action)
    assert simulated.holds
    simulated = begun()
    for action in walk((BLOCK, 0.6)):
        simulated.step(action)
    assert not simulated.holds
    assert simulated.opening == 1
    for action in walk((np.add(BLOCK, [0, 0, 0.1]), 0)):  # an empty gripper closes wholly
        simulated.step(action)
    assert simulated.opening == 0
    np.testing.assert_array_equal(simulated.block, BLOCK)


def test_a_dropped_block_falls_to_the_table():
    simulated = begun()
    for action in walk((BLOCK, 0), (np.add(BLOCK, [0, 0.05, 0.2]), 1)):
        state = simulated.step(action)
    np.testing.assert_allclose(state[8:11], np.add(BLOCK, [0, 0.05, 0]), atol=1e-3)


def test_reach():
    target = np.array([0.5, 0.1, 0.3])
    simulated = KinematicArm(noise=0)
    simulated.place(Scene("reach", HOME, target, target))
    assert not simulated.succeeded
    for action in walk((np.add(target, [0, 0, 0.015]), 0)):
        simulated.step(action)
    assert simulated.succeeded
    assert not simulated.holds  # there is no block
    for action in walk((np.add(target, [0, 0, 0.025]), 1)):
        simulated.step(action)
    assert not simulated.succeeded


def test_bad_actions():
    simulated = KinematicArm()
    with pytest.raises(ShapeError, match=r"7 joints and the gripper, got shape \(7,\)"):
        simulated.step(HOME)
    with pytest.raises(DataError, match="the action is not finite"):
        simulated.step([*HOME, np.nan])
    with pytest.raises(ShapeError, match=r"must be \(T, 8\) with T at least 1, got \(0, 8\)"):
        arm.success(np.zeros((0, 8)), BLOCK, GOAL)


# ---------------------------------------------------------------- the camera


def middle(picture, like):
    """Mean place of the pixels nearest to a colour, (x, y), and how many they are."""
    near = np.abs(picture.astype(int) - like).sum(-1) < 60
    return np.argwhere(near).mean(0)[::-1], near.sum()


def test_picture_shows_block_goal_and_arm():
    red, green, steel = (206, 52, 48), (60, 160, 80), (70, 80, 96)
    simulated = begun()
    picture = simulated.render(96)
    assert picture.shape == (96, 96, 3)
    assert picture.dtype == np.uint8
    (block, _), (goal, size) = middle(picture, red), middle(picture, green)
    assert size > 15
    # the camera looks at the arm, so that +y is to the right, and +x nearer, below
    assert block[0] > goal[0] + 10
    simulated.place(Scene("pick", HOME, BLOCK - [0.1, 0.1, 0], GOAL))
    farther, _ = middle(simulated.render(96), red)
    assert farther[0] < block[0] - 4
    assert farther[1] < block[1] - 2
    before = middle(picture, steel)
    simulated.place(Scene("pick", np.add(HOME, [0.8, 0, 0, 0, 0, 0, 0]), BLOCK, GOAL))
    after = middle(simulated.render(96), steel)
    assert after[0][0] > before[0][0] + 1


def test_reach_has_no_block_to_show():
    red = (206, 52, 48)
    assert (np.abs(begun("reach").render().astype(int) - red).sum(-1) >= 60).all()
    assert begun("reach").render().shape == (48, 48, 3)


def test_fingers_show_whether_they_are_open():
    closed, wide = (arm.render(HOME, opening, BLOCK, GOAL, 96) for opening in (0.0, 1.0))
    assert (closed != wide).any()
