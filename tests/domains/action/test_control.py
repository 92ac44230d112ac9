"""Policies at work: chunks step by step, what is remembered, means of chunks, and loops at a fixed rate."""

import math

import numpy as np
import pytest

from vertebra.domains.action.control import Controller, RateReport, run_at_rate
from vertebra.errors import ConfigError, DataError, ShapeError


class Counting:
    """Says 100 * (number of the call) + step of the chunk, and keeps what it was shown."""

    def __init__(self, horizon=4, history=1, dims=2):
        self.horizon, self.history, self.dims = horizon, history, dims
        self.calls = []

    def __call__(self, states, images, tasks, start):
        self.calls.append((states.copy(), {k: v.copy() for k, v in images.items()}, list(tasks), start))
        steps = 100 * (len(self.calls) - 1) + np.arange(self.horizon)
        return np.broadcast_to(steps[None, :, None], (len(states), self.horizon, self.dims)).astype(np.float32)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        assert seconds > 0
        self.now += seconds


def said(controller, steps, batch=1):
    return [controller.act(np.full((batch, 3), step))[0, 0] for step in range(steps)]


# ---------------------------------------------------------------- receding horizon


@pytest.mark.parametrize(
    ("execute", "expected"),
    [
        (None, [0, 1, 2, 3, 100, 101, 102, 103, 200]),
        (3, [0, 1, 2, 100, 101, 102, 200, 201, 202]),
        (1, [0, 100, 200, 300, 400, 500, 600, 700, 800]),
    ],
)
def test_a_new_chunk_is_asked_for_after_as_many_steps(execute, expected):
    assert said(Controller(Counting(), 1, execute=execute), 9) == expected


def test_the_last_action_is_where_a_chunk_goes_on_from():
    policy = Counting()
    controller = Controller(policy, 2, execute=3)
    for step in range(7):
        controller.act(np.full((2, 3), step))
    starts = [call[3] for call in policy.calls]
    assert starts[0] is None
    np.testing.assert_array_equal(starts[1], np.full((2, 2), 2))
    np.testing.assert_array_equal(starts[2], np.full((2, 2), 102))
    assert starts[1].dtype == np.float32


def test_what_was_seen_is_remembered_and_the_first_repeated():
    policy = Counting(horizon=2, history=3)
    controller = Controller(policy, 1, execute=2)
    for step in range(5):
        controller.act([[step, 10 + step]], {"top": np.full((1, 2, 2, 3), step, np.uint8)}, ["lift"])
    seen = [call[0][0, :, 0].tolist() for call in policy.calls]
    assert seen == [[0, 0, 0], [0, 1, 2], [2, 3, 4]]
    assert policy.calls[1][0].shape == (1, 3, 2)
    assert policy.calls[1][0].dtype == np.float32
    assert policy.calls[1][1]["top"].shape == (1, 3, 2, 2, 3)
    assert policy.calls[1][1]["top"].dtype == np.uint8
    assert policy.calls[1][1]["top"][0, :, 0, 0, 0].tolist() == [0, 1, 2]
    assert policy.calls[1][2] == ["lift"]


def test_environments_that_begin_later_are_asked_for_alone():
    policy = Counting(horizon=4, history=2)
    controller = Controller(policy, 3)
    tasks = ["a", "b", "c"]
    rows = []
    for step in range(6):
        if step == 2:
            controller.reset([1])
        rows.append(controller.act([[10 * row + step] for row in range(3)], tasks=tasks)[:, 0].tolist())
    # Step 0: all (call 0). Step 2: row 1 (call 1). Step 4: rows 0 and 2 (call 2); row 1 at step 6.
    assert rows == [[0, 0, 0], [1, 1, 1], [2, 100, 2], [3, 101, 3], [200, 102, 200], [201, 103, 201]]
    states, _, told, start = policy.calls[1]
    assert states[:, :, 0].tolist() == [[12, 12]]  # what it saw before it began anew is forgotten
    assert told == ["b"]
    assert start is None
    assert policy.calls[2][0][:, :, 0].tolist() == [[3, 4], [23, 24]]
    assert policy.calls[2][2] == ["a", "c"]
    np.testing.assert_array_equal(policy.calls[2][3], np.full((2, 2), 3))
    assert [each.batch for each in controller.timings] == [3, 1, 2]


def test_those_at_their_first_step_have_a_call_of_their_own():
    policy = Counting(horizon=2)
    controller = Controller(policy, 2)
    controller.act([[0], [0]])
    controller.act([[1], [1]])
    controller.reset([0])
    controller.act([[2], [2]])
    assert [(len(call[0]), call[3] is None) for call in policy.calls] == [(2, True), (1, True), (1, False)]


def test_all_begin_anew():
    policy = Counting(history=2)
    controller = Controller(policy, 1)
    assert said(controller, 2) == [0, 1]
    controller.reset()
    assert controller.act([[7, 8]])[0, 0] == 100  # another number of sensors: another robot may begin
    assert policy.calls[1][0][0].tolist() == [[7, 8], [7, 8]]


# ---------------------------------------------------------------- means of chunks


def test_an_action_is_the_weighted_mean_of_all_chunks_for_its_step():
    m = 0.5
    actions = said(Controller(Counting(horizon=3), 1, ensemble=m), 5)
    # Call k is made at step k and says 100 k + (step - k) for a step; the oldest has weight 1.
    expected = []
    for step in range(5):
        calls = [k for k in range(step + 1) if step - k < 3]
        weights = [math.exp(-m * i) for i in range(len(calls))]
        expected.append(sum(w * (100 * k + step - k) for w, k in zip(weights, calls, strict=True)) / sum(weights))
    np.testing.assert_allclose(actions, expected, rtol=1e-6)
    assert actions[1] == pytest.approx((1 * 1 + math.exp(-0.5) * 100) / (1 + math.exp(-0.5)))


def test_chunks_asked_for_less_often_are_averaged_too():
    actions = said(Controller(Counting(horizon=4), 1, ensemble=0.0, execute=2), 6)
    assert actions == pytest.approx([0, 1, (2 + 100) / 2, (3 + 101) / 2, (102 + 200) / 2, (103 + 201) / 2])


def test_after_a_reset_old_chunks_are_not_averaged():
    controller = Controller(Counting(horizon=4), 1, ensemble=0.1)
    said(controller, 3)
    controller.reset([0])
    assert controller.act([[0, 0, 0]])[0, 0] == 300


@pytest.mark.parametrize(("ensemble", "expected"), [(1e4, 4), (-1e4, 400)])
def test_weights_of_any_size(ensemble, expected):
    assert said(Controller(Counting(horizon=9), 1, ensemble=ensemble), 5)[-1] == expected


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"execute": 0}, "execute must be from 1 to 4"),
        ({"execute": 5}, "execute must be from 1 to 4.*got 5"),
        ({"ensemble": math.nan}, "ensemble must be a finite number"),
    ],
)
def test_impossible_settings(arguments, message):
    with pytest.raises(ConfigError, match=message):
        Controller(Counting(), 1, **arguments)


def test_no_environment():
    with pytest.raises(ConfigError, match="batch must be at least 1, got 0"):
        Controller(Counting(), 0)
    with pytest.raises(ConfigError, match="no environment 2; they are 0 to 1"):
        Controller(Counting(), 2).reset([2])


def test_observations_of_other_shapes():
    controller = Controller(Counting(), 2)
    with pytest.raises(ShapeError, match="states must be given for each of the 2 environments"):
        controller.act([[1.0]])
    with pytest.raises(ShapeError, match="states must be given for each"):
        controller.act([1.0, 2.0])
    with pytest.raises(ShapeError, match="tasks must be given for each"):
        controller.act([[1.0], [2.0]], tasks=["one"])
    with pytest.raises(ShapeError, match="images of top must be given for each"):
        controller.act([[1.0], [2.0]], {"top": np.zeros((1, 2, 2, 3), np.uint8)})
    controller.act([[1.0], [2.0]])
    with pytest.raises(ShapeError, match=r"states must be \(1,\) at every step, got \(2,\)"):
        controller.act([[1.0, 1.0], [2.0, 2.0]])
    with pytest.raises(ShapeError, match="the same cameras at every step"):
        controller.act([[1.0], [2.0]], {"top": np.zeros((2, 2, 2, 3), np.uint8)})


class Saying(Counting):
    def __init__(self, chunk):
        super().__init__()
        self.chunk = chunk

    def __call__(self, states, images, tasks, start):
        return self.chunk


def test_actions_of_another_shape_or_not_finite():
    with pytest.raises(ShapeError, match=r"must say \(1, 4, D\) actions, but they are \(1, 3, 2\)"):
        Controller(Saying(np.zeros((1, 3, 2))), 1).act([[0.0]])
    with pytest.raises(DataError, match="not finite numbers; do not carry them out"):
        Controller(Saying(np.full((1, 4, 2), np.nan)), 1).act([[0.0]])


# ---------------------------------------------------------------- time


class Slow(Counting):
    """Takes its time, by the clock."""

    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, iter(seconds)

    def __call__(self, *arguments):
        self.clock.now += next(self.seconds)
        return super().__call__(*arguments)


def test_times_of_decisions_and_missed_deadlines():
    clock = Clock()
    controller = Controller(Slow(clock, [0.02, 0.1, 0.05]), 2, execute=1, clock=clock)
    for step in range(3):
        controller.act([[step], [step]])
    assert [each.seconds for each in controller.timings] == pytest.approx([0.02, 0.1, 0.05])
    assert [each.batch for each in controller.timings] == [2, 2, 2]
    assert controller.deadline_misses(25) == 2
    assert controller.deadline_misses(12.5) == 1
    assert controller.deadline_misses(5) == 0
    with pytest.raises(ConfigError, match="rate must be a finite number of steps a second above 0, got 0"):
        controller.deadline_misses(0)


def rate_of(durations, rate=10.0):
    clock, begins = Clock(), []

    def step(number):
        begins.append(clock.now)
        clock.now += durations[number]

    return run_at_rate(step, rate, len(durations), clock, clock.sleep), begins


def test_steps_lie_on_an_even_grid():
    report, begins = rate_of([0.03, 0.09, 0.01, 0.1])
    assert begins == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert report.late == ()
    assert report.longest == pytest.approx(0.1)
    assert report.reached == pytest.approx(10)


def test_a_late_step_is_reported_and_not_caught_up_with():
    report, begins = rate_of([0.02, 0.25, 0.02, 0.02, 0.12])
    assert begins == pytest.approx([0.0, 0.1, 0.35, 0.45, 0.55])
    assert report.late == (1, 4)
    assert report == RateReport(rate=10.0, reached=report.reached, late=(1, 4), longest=report.longest)
    assert report.reached == pytest.approx(5 / 0.67)
    assert report.longest == pytest.approx(0.25)


def test_loops_that_cannot_be():
    with pytest.raises(ConfigError, match="rate must be a finite number"):
        run_at_rate(print, math.inf, 1)
    with pytest.raises(ConfigError, match="steps must be at least 1, got 0"):
        run_at_rate(print, 10, 0)
