"""Episodes: what is refused, even grids of time, windows, and columns by name."""

import dataclasses
import math

import numpy as np
import pytest
from made_demonstrations import demonstrations, episode

from vertebra.domains.action.episodes import LeftOut, columns_of, regular, windows
from vertebra.errors import ConfigError, DataError


def at(times, fps=10.0, max_gap=0.5):
    """Put an episode with these time stamps on an even grid; x of a state is its time, that of an action 100 more."""
    times = np.asarray(times, np.float64)
    rows = times.astype(np.float32)[:, None]
    frames = np.arange(len(times), dtype=np.uint8)[:, None, None, None] + np.zeros((1, 2, 2, 3), np.uint8)
    made = dataclasses.replace(
        episode(0, len(times)), states=rows, actions=rows + 100, times=times, images={"top": frames}
    )
    parts, notes = regular(made, fps, max_gap)
    for part in parts:
        part.check()
    return made, parts, [f"{note.rule}; {note.advice}" for note in notes]


def shown(part):
    """Numbers of the frames that the pictures are."""
    return [int(part.images["top"][i][0, 0, 0]) for i in range(len(part))]


# ---------------------------------------------------------------- episodes


def test_what_no_model_can_learn_from_is_refused():
    good = episode(3, cameras=("top",))
    good.check()
    assert len(good) == 12
    with pytest.raises(DataError, match=r"^episode: episode_3: holds no step; leave it out\.$"):
        dataclasses.replace(good, actions=good.actions[:0]).check()
    short = dataclasses.replace(good, states=good.states[1:], source="a.npz")
    with pytest.raises(DataError, match=r"^a\.npz: episode_3: states has 11 steps, but actions has 12\.$"):
        short.check()
    with pytest.raises(DataError, match=r"times has 13 steps, but actions has 12\.$"):
        dataclasses.replace(good, times=np.arange(13.0)).check()
    with pytest.raises(DataError, match=r"images of top has 5 steps, but actions has 12\.$"):
        dataclasses.replace(good, images={"top": good.images["top"][:5]}).check()


@pytest.mark.parametrize("what", ["states", "actions", "times"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_refused(what, value):
    made = episode()
    values = getattr(made, what).copy()
    values[4:6] = value
    with pytest.raises(DataError, match=rf"{what} is not finite at step 4; mend or leave it out\.$"):
        dataclasses.replace(made, **{what: values}).check()


def test_tasks_come_once_in_order():
    assert demonstrations(5, tasks=("lift", "drop")).tasks == ("lift", "drop")
    assert str(LeftOut("a.npz", "is empty")) == "a.npz: is empty; mend it or leave it out."


# ---------------------------------------------------------------- an even grid


def test_an_even_episode_is_returned_as_it_is():
    for times in (np.arange(5) / 10, 7 + np.arange(5) / 10, [0, 0.11, 0.19, 0.3, 0.42], [3.0]):
        made, (part,), notes = at(times)
        assert part is made
        assert notes == []


def test_repeated_and_late_frames_are_left_out():
    _, (part,), notes = at([0, 0.1, 0.1, 0.2, 0.05, 0.1999, 0.3])
    np.testing.assert_allclose(part.states[:, 0], [0, 0.1, 0.2, 0.3], atol=1e-6)
    np.testing.assert_allclose(part.actions[:, 0], [100, 100.1, 100.2, 100.3], atol=1e-5)
    assert shown(part) == [0, 1, 3, 6]
    assert notes == ["3 frames repeat an earlier time stamp; they are left out"]


def test_missing_frames_are_put_in_between():
    _, (part,), notes = at([1.0, 1.1, 1.4, 1.5])
    np.testing.assert_allclose(part.times, np.arange(6) / 10, atol=1e-9)
    np.testing.assert_allclose(part.states[:, 0], 1 + np.arange(6) / 10, atol=1e-6)
    np.testing.assert_allclose(part.actions[:, 0], 101 + np.arange(6) / 10, atol=1e-5)
    assert shown(part) == [0, 1, 1, 2, 2, 3]
    assert part.name == "episode_0"
    assert notes == ["2 frames are missing; they are put in between their neighbours"]


def test_an_episode_is_cut_at_long_gaps():
    times = [0, 0.1, 0.2, 1.0, 1.1, 3.0, 3.1, 3.4]
    _, parts, notes = at(times)
    assert [part.name for part in parts] == ["episode_0.0", "episode_0.1", "episode_0.2"]
    assert [len(part) for part in parts] == [3, 2, 5]
    assert all(part.times[0] == 0 for part in parts)
    np.testing.assert_allclose(parts[2].states[:, 0], [3, 3.1, 3.2, 3.3, 3.4], atol=1e-6)
    assert [shown(part) for part in parts] == [[0, 1, 2], [3, 4], [5, 6, 6, 7, 7]]
    assert notes == [
        "2 frames are missing; they are put in between their neighbours",
        "2 gaps are longer than 0.5 s; it is cut there",
    ]
    _, (part,), notes = at(times, max_gap=2.0)
    assert len(part) == 35
    assert notes == ["27 frames are missing; they are put in between their neighbours"]


def test_a_slow_rate_has_no_gaps():
    made, (part,), notes = at(np.arange(4) * 2.0, fps=0.5)
    assert part is made
    assert notes == []


def test_a_lower_rate_takes_fewer_frames():
    _, (part,), notes = at(np.arange(21) / 100, fps=10.0)
    np.testing.assert_allclose(part.states[:, 0], [0, 0.1, 0.2], atol=1e-6)
    assert shown(part) == [0, 10, 20]
    assert notes == ["18 frames are more than 10 a second; they are left out"]
    _, (part,), _ = at(np.arange(201) / 1000, fps=10.0)
    np.testing.assert_allclose(part.states[:, 0], [0, 0.1, 0.2], atol=1e-6)
    assert shown(part) == [0, 100, 200]


def test_a_higher_rate_takes_more_frames():
    _, (part,), _ = at(np.arange(4) / 10, fps=30.0)
    np.testing.assert_allclose(part.states[:, 0], np.arange(10) / 30, atol=1e-6)
    assert shown(part) == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]


def test_without_states_nothing_is_put_in_between():
    made = dataclasses.replace(episode(0, 3), states=np.zeros((3, 0), np.float32), times=np.array([0, 0.1, 0.3]))
    (part,), _ = regular(made, 10.0)
    assert part.states.shape == (4, 0)
    assert part.states.dtype == part.actions.dtype == np.float32


# ---------------------------------------------------------------- windows and columns


def test_the_last_action_is_repeated_behind_the_end():
    made = episode(0, 5)
    ahead, real = windows(made, 3)
    assert ahead.shape == (5, 3, 3)
    np.testing.assert_array_equal(ahead[1], made.actions[1:4])
    np.testing.assert_array_equal(ahead[3], made.actions[[3, 4, 4]])
    np.testing.assert_array_equal(ahead[4], made.actions[[4, 4, 4]])
    assert real.tolist() == [[True] * 3] * 3 + [[True, True, False], [True, False, False]]
    ahead, real = windows(episode(0, 1), 4)
    assert ahead.shape == (1, 4, 3)
    assert real.tolist() == [[True, False, False, False]]


def test_columns_by_name_and_by_number():
    names = ("x", "y", "1", "grip")
    assert columns_of(names, ["grip", "x"], "grippers") == (3, 0)
    assert columns_of(names, ["3", 0], "grippers") == (3, 0)
    assert columns_of(names, ["1", 1], "grippers") == (2, 1)  # the name first
    assert columns_of(names, [], "grippers") == ()
    for wanted in ("z", "4", 4, -1, "-1", "²"):
        with pytest.raises(
            ConfigError, match=rf"^grippers: no column '?{wanted}'?; columns: x, y, 1, grip \(or 0 to 3\)\.$"
        ):
            columns_of(names, [wanted], "grippers")
