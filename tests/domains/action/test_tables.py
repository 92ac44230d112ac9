import dataclasses

import numpy as np
import pytest

from vertebra.domains.action.episodes import Episode
from vertebra.domains.action.tables import ColumnMap, read_csv, read_npz, write_csv, write_npz
from vertebra.errors import ConfigError, DataError


def made(name="a", steps=6, fps=20.0, pictures=False, seed=0):
    rng = np.random.default_rng(seed)
    return Episode(
        name=name,
        states=rng.normal(size=(steps, 3)).astype(np.float32),
        actions=rng.normal(size=(steps, 2)).astype(np.float32),
        times=np.arange(steps) / fps,
        task="open the drawer, then wait",
        images={"top": rng.integers(0, 256, (steps, 4, 5, 3), dtype=np.uint8)} if pictures else {},
    )


def put(folder, text, name="a.csv"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def table(rows, header="timestamp,episode,state.x,action_0"):
    return "\n".join([header, *rows]) + "\n"


def good_rows(episode, steps=4):
    return [f"{i / 10},{episode},{i},{-i}" for i in range(steps)]


def same(a, b):
    assert (a.name, a.task, list(a.images)) == (b.name, b.task, list(b.images))
    for what in ("states", "actions"):
        assert getattr(a, what).dtype == np.float32
        assert (getattr(a, what) == getattr(b, what)).all()
    assert a.times == pytest.approx(b.times)
    for camera, frames in b.images.items():
        assert (a.images[camera] == frames).all()


# --- npz ---


def test_a_written_archive_is_read_back(tmp_path):
    episode, names = made("reach", pictures=True), {"state_names": ("x", "y", "z"), "action_names": ("left", "right")}
    write_npz(tmp_path / "reach.npz", episode, **names)
    found = read_npz(tmp_path / "reach.npz")
    same(found.episodes[0], episode)
    assert (found.fps, found.state_names, found.action_names) == (20, *names.values())
    assert found.episodes[0].source == str(tmp_path / "reach.npz")
    assert found.left_out == ()
    assert [p.name for p in tmp_path.iterdir()] == ["reach.npz"]  # no parts left
    assert read_npz(tmp_path / "reach.npz", cameras=()).episodes[0].images == {}
    with pytest.raises(DataError, match=r"reach\.npz: there are no images of side; cameras: top\.$"):
        read_npz(tmp_path / "reach.npz", cameras=["side"])


def test_several_episodes_in_one_archive(tmp_path):
    actions = np.arange(20.0).reshape(10, 2)
    states = -actions
    states[4, 1] = np.nan
    arrays = {"action": actions, "state": states, "episode_ends": [3, 6, 6, 10], "fps": 5, "tasks": list("abcd")}
    np.savez(tmp_path / "all.npz", **arrays, other=np.array([None]))  # objects that nobody asks for do no harm
    found = read_npz(tmp_path / "all.npz")
    assert [e.name for e in found.episodes] == ["all_0", "all_3"]
    assert [e.task for e in found.episodes] == ["a", "d"]
    assert found.episodes[1].actions.tolist() == actions[6:].tolist()
    assert found.episodes[1].times.tolist() == [0, 0.2, 0.4, pytest.approx(0.6)]
    assert found.fps == 5
    assert found.state_names == ("state_0", "state_1")
    assert [str(note).removeprefix(f"{tmp_path}/") for note in found.left_out] == [
        "all.npz: all_1: states is not finite at step 1; mend or leave it out.",
        "all.npz: all_2: holds no step; leave it out.",
    ]
    with pytest.raises(ConfigError, match=r"fps must be above 0, got -1"):
        read_npz(tmp_path / "all.npz", fps=-1)


@pytest.mark.parametrize(
    ("ends", "match"),
    [
        ([3, 2, 10], "must not fall and end with the 10 steps of actions, got 3, 2, 10 .. 10"),
        ([3, 9], "got 3, 9 .. 9"),
        ([0.5, 10], r"must be whole numbers \(E,\), got float64"),
    ],
)
def test_wrong_ends_of_episodes(tmp_path, ends, match):
    np.savez(tmp_path / "a.npz", actions=np.zeros((10, 2)), states=np.zeros((10, 2)), episode_ends=ends)
    with pytest.raises(DataError, match=match):
        read_npz(tmp_path / "a.npz", fps=10)


def test_states_are_chosen_or_stood_in_for(tmp_path):
    actions = np.arange(8.0).reshape(4, 2)
    np.savez(tmp_path / "a.npz", actions=actions, qpos=actions + 1, gripper=actions[:, :1])
    found = read_npz(tmp_path / "a.npz", state=("qpos", "gripper"), fps=10)
    assert found.state_names == ("qpos_0", "qpos_1", "gripper_0")
    assert found.episodes[0].states.tolist() == np.hstack([actions + 1, actions[:, :1]]).tolist()
    found = read_npz(tmp_path / "a.npz", fps=10)
    assert found.state_names == ("previous_action_0", "previous_action_1")
    assert found.episodes[0].states.tolist() == actions[[0, 0, 1, 2]].tolist()
    assert str(found.left_out[0]).endswith(
        "a.npz: a: has no states; the action of the step before stands in for them, and at the first step its own."
    )
    with pytest.raises(DataError, match=r"a\.npz: there is no array 'eef'; arrays: actions, gripper, qpos\.$"):
        read_npz(tmp_path / "a.npz", state="eef", fps=10)
    with pytest.raises(ConfigError, match=r"a\.npz: no time stamps tell how many steps a second has; set fps\.$"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"actions": np.zeros(7)}, r"actions must be numbers \(steps, dimensions\), got float64 \(7,\)"),
        ({"actions": np.array([["a", "b"]])}, r"actions must be numbers .*, got <U1 \(1, 2\)"),
        ({"actions": np.array([[None]])}, "is no archive of plain arrays"),
        ({"states": np.zeros((4, 2))}, "there is no array 'actions'; arrays: states"),
        ({"actions": np.zeros((4, 2)), "states": np.zeros((3, 2))}, "states has 3 steps, but actions has 4"),
        ({"actions": np.zeros((4, 2)), "timestamps": np.zeros(5)}, "timestamps has 5 steps, but actions has 4"),
        ({"actions": np.zeros((0, 2)), "fps": 10}, "a: holds no step"),
        ({"actions": np.full((4, 2), 1e300), "fps": 10}, "is not finite at step 0"),
        ({"actions": np.zeros((4, 2)), "fps": 0}, "fps must be one number above 0"),
        ({"actions": np.zeros((4, 2)), "action_names": ["x"]}, r"action_names must be 2 texts, got <U1 \(1,\)"),
        ({"actions": np.zeros((4, 2)), "tasks": ["x", "y"]}, "tasks must be one for each of the 1 episodes, got 2"),
        (
            {"actions": np.zeros((4, 2)), "images/a": np.zeros((4, 8, 8, 3))},
            r"images of a must be uint8 \(N, H, W, 3\)",
        ),
        (
            {"actions": np.zeros((4, 2)), "timestamps": np.arange(4) * 33},
            "time stamps are 33 apart; write them in seconds",
        ),
    ],
)
def test_archives_that_cannot_be_used(tmp_path, arrays, match):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=rf"a\.npz: .*{match}"):
        read_npz(tmp_path / "a.npz")


def test_files_that_are_no_archives(tmp_path):
    write_npz(tmp_path / "whole.npz", made())
    whole = (tmp_path / "whole.npz").read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    array = (tmp_path / "one.npy").read_bytes()
    for data in (b"", b"timestamp,action_0\n0,1\n", whole[: len(whole) // 2], array):
        with pytest.raises(
            DataError, match=r"a\.npz: is no archive of plain arrays, or is empty, damaged or cut short"
        ):
            read_npz(put(tmp_path, data, "a.npz"))
    with pytest.raises(DataError, match="there is no such file; correct the path"):
        read_npz(tmp_path / "absent.npz")
    with pytest.raises(DataError, match="the file cannot be opened"):
        read_npz(tmp_path)


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ConfigError, match="state_names must be 3, as many as there are dimensions, got 1"):
        write_npz(tmp_path / "a.npz", made(), state_names=("x",))
    with pytest.raises(DataError, match=r"absent.a\.npz: cannot be written .*; choose another folder"):
        write_npz(tmp_path / "absent" / "a.npz", made())
    with pytest.raises(DataError, match="holds no step"):
        write_npz(tmp_path / "a.npz", made(steps=0))
    with pytest.raises(ConfigError, match="there is no episode to write"):
        write_csv(tmp_path / "a.csv", [])
    with pytest.raises(DataError, match="two episodes have the same name"):
        write_csv(tmp_path / "a.csv", [made(), made()])
    wide = dataclasses.replace(made("b"), actions=np.zeros((6, 3), np.float32))
    with pytest.raises(DataError, match="b has other dimensions than a"):
        write_csv(tmp_path / "a.csv", [made(), wide])
    assert list(tmp_path.iterdir()) == []


# --- CSV ---


def test_a_written_table_is_read_back(tmp_path):
    episodes = [made("reach", 5), made("episode_007", 9, seed=1)]
    write_csv(tmp_path / "a.csv", episodes, state_names=("x", "y", "z"))
    found = read_csv(tmp_path / "a.csv")
    for own, episode in zip(found.episodes, episodes, strict=True):
        same(own, episode)
    assert (found.fps, found.state_names, found.action_names) == (20, ("x", "y", "z"), ("action_0", "action_1"))
    assert found.left_out == ()
    assert [p.name for p in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_marks_between_columns_and_what_tables_look_like(tmp_path, mark):
    text = table(["0,3,1,2,", "", "0.1,3,2,3,", ",,,,"], '\ufefftimestamp,"episode",state,action,note')
    found = read_csv(put(tmp_path, text.replace(",", mark).replace("\n", "\r\n")))
    assert found.episodes[0].name == "episode_3"
    assert found.episodes[0].states.tolist() == [[1], [2]]
    assert found.episodes[0].actions.tolist() == [[2], [3]]
    assert (found.fps, found.state_names, found.action_names) == (10, ("state",), ("action",))


def test_columns_are_told_by_name_or_beginning(tmp_path):
    header = "t,demo,obs.q1,obs.q2,stated,cmd_10,cmd_2,goal"
    path = put(tmp_path, table(["1700000000.0,a,1,2,x,3,4,pick", "1700000000.5,a,5,6,y,7,8,pick"], header), "log.csv")
    columns = ColumnMap(time="t", episode="demo", state="obs.", action=("cmd_2", "cmd_10"), task="goal")
    found = read_csv(path, columns=columns)
    assert (found.fps, found.state_names, found.action_names) == (2, ("q1", "q2"), ("cmd_2", "cmd_10"))
    assert found.episodes[0].actions.tolist() == [[4, 3], [8, 7]]
    assert found.episodes[0].times.tolist() == [0, 0.5]
    assert found.episodes[0].task == "pick"
    mixed = dataclasses.replace(columns, state=("obs.q2", "cmd"), action="goal")
    with pytest.raises(
        DataError, match=r"log\.csv: a: line 2 must have a finite number in the column 'goal', got 'pick'"
    ):
        read_csv(path, columns=dataclasses.replace(mixed, task=""))
    found = read_csv(path, columns=dataclasses.replace(columns, state=("obs.q2", "obs"), action=("cmd_2", "cmd")))
    assert found.state_names == ("obs.q2", "q1")
    assert found.action_names == ("cmd_2", "cmd_10")


@pytest.mark.parametrize(
    ("columns", "match"),
    [
        (ColumnMap(), "no free column is called 'action' or begins so; columns: t, obs.q, stated, cmd. Say which"),
        (ColumnMap(action="cmd", state="state"), None),
        (ColumnMap(action="cmd", state="states"), "no free column is called 'states' or begins so"),
        (ColumnMap(action="cmd", time="time"), "there is no column 'time' for the time"),
        (ColumnMap(action=("cmd", "grip")), "no free column is called 'grip'"),
        (ColumnMap(action="cmd", state=("cmd",)), "no free column is called 'cmd'"),
    ],
)
def test_columns_that_are_not_there(tmp_path, columns, match):
    path = put(tmp_path, table(["0,1,2,3", "1,1,2,3"], "t,obs.q,stated,cmd"))
    if match is None:  # the usual beginning may be absent
        assert read_csv(path, columns=columns, fps=10).state_names == ("previous_cmd",)
        return
    with pytest.raises(DataError, match=rf"a\.csv: {match}"):
        read_csv(path, columns=columns, fps=10)


@pytest.mark.parametrize(
    ("row", "rule"),
    [
        ("0.1,b,low,1", "line 7 must have a finite number in the column 'state.x', got 'low'"),
        ("0.1,b,1,", "line 7 must have a finite number in the column 'action_0', got ''"),
        ("now,b,1,1", "line 7 must have a finite number in the column 'timestamp', got 'now'"),
        ("0.1,b,1,NaN", "line 7 must have a finite number in the column 'action_0', got 'NaN'"),
        ("0.1,b,-inf,1", "line 7 must have a finite number in the column 'state.x', got '-inf'"),
        ("0.1,b,1", "line 7 must have the 4 columns of the header, got 3"),
        ("0.1,b,1,2,3", "line 7 must have the 4 columns of the header, got 5"),
        ("0.1", "line 7 must have the 4 columns of the header, got 1"),
        ("0.1,1,1", "line 7 must have the 4 columns of the header, got 3"),  # the episode is missing
        ('0.1,b,"1"2,1', "line 7 is not a row of a table"),
    ],
)
def test_a_bad_row_loses_its_episode_alone(tmp_path, row, rule):
    path = put(tmp_path, table([*good_rows("a"), "0,b,1,1", row, "0.2,b,1,1", "0.3,b,x,y", *good_rows("c")]))
    found = read_csv(path)
    assert [e.name for e in found.episodes] == ["a", "c"]
    assert found.episodes[1].states[:, 0].tolist() == [0, 1, 2, 3]
    (note,) = found.left_out
    assert str(note).startswith(f"{path}: b: {rule}")


def test_an_episode_of_bad_rows_alone(tmp_path):
    path = put(tmp_path, table([*good_rows("a"), "0,b,x,1", "0.1,b,x,1"]))
    found = read_csv(path)
    assert [e.name for e in found.episodes] == ["a"]
    assert [note.source for note in found.left_out] == [f"{path}: b"]
    with pytest.raises(DataError, match=r"a\.csv: b: line 2 must have a finite number"):
        read_csv(put(tmp_path, table(["0,b,x,1", "0.1,b,x,1"])))


def test_a_cut_table_loses_its_last_episode(tmp_path):
    text = table([*good_rows("a"), *good_rows("b")])
    found = read_csv(put(tmp_path, text[:-4]))
    assert [e.name for e in found.episodes] == ["a"]
    assert "line 9 must have the 4 columns of the header, got 3" in str(found.left_out[0])


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"timestamp,action\n", "there is no row below the header"),
        (b"action\n\xff\xfe\x00", "line 2: this is no text in UTF-8"),
        (b"PK\x03\x04\0\0\0\0", "holds binary data, and CSV is text"),
        ("action\n1\n".encode("utf-16-le"), "holds binary data"),
        (b"action,state,action\n1,2,3\n", "line 1: there are two columns 'action'"),
        (b'"action\n1\n', "line 1: this is not a row of a table"),
        (b"1,2,3\n1,2,3\n", "no free column is called 'action'"),
    ],
)
def test_files_that_are_no_tables(tmp_path, data, match):
    with pytest.raises(DataError, match=rf"a\.csv(: |, ){match}"):
        read_csv(put(tmp_path, data), fps=10)


@pytest.mark.parametrize(
    ("times", "fps"),
    [
        ([0, 0.03, 0.07, 0.1, 0.13, 0.17, 0.2], 30),  # in hundredths
        ([0, 0.033, 0.067, 0.067, 0.1, 0.4, 0.433], 30),  # one twice, and a gap
        ([5, 5.08, 5.16, 5.24], 12.5),
        ([0, 0.0333667, 0.0667333, 0.1001], 30),
    ],
)
def test_rate_of_time_stamps(tmp_path, times, fps):
    path = put(tmp_path, table([f"{t},{i}" for i, t in enumerate(times)], "timestamp,action"))
    assert read_csv(path).fps == fps
    assert read_csv(path, fps=7).fps == 7
    assert read_csv(path, fps=7).episodes[0].times == pytest.approx(np.array(times) - times[0])


def test_tables_without_time(tmp_path):
    path = put(tmp_path, table(["1", "2", "3"], "action"))
    with pytest.raises(ConfigError, match=r"a\.csv: no time stamps tell how many steps a second has; set fps"):
        read_csv(path)
    assert read_csv(path, fps=4).episodes[0].times.tolist() == [0, 0.25, 0.5]
    assert read_csv(path, fps=4).episodes[0].name == "a"
    with pytest.raises(ConfigError, match="set fps"):
        read_csv(put(tmp_path, table(["2,1", "2,2"], "timestamp,action")))
