"""action/predict: chunks for recorded observations in three formats, in Python, and bad files."""

import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_policies import ACTIONS, FPS, HORIZON, STATES, loaded, motion, names, policy, put, rows_of, work

from vertebra.cli import main
from vertebra.domains.action.episodes import Demonstrations
from vertebra.domains.action.lerobot import write_lerobot
from vertebra.domains.action.tables import write_csv
from vertebra.domains.saving import save_model
from vertebra.errors import DataError
from vertebra.pipelines.action_predict import PredictActions
from vertebra.pipelines.base import PipelineInterrupted, pipeline


@pytest.fixture(scope="module")
def model():
    return policy(history=3, past_action=True)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return save_model(model, tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture
def sample(tmp_path):
    """Three episodes, 45, 37 and 12 steps long."""
    folder = tmp_path / "sample"
    folder.mkdir()
    for seed, steps in enumerate((45, 37, 12)):
        put(folder, motion(steps, seed))
    return folder


def by_hand(model, episode, step):
    """One chunk, asked for as the model wants it, (H, D)."""
    seen = [max(step - back, 0) for back in reversed(range(model.spec.history))]
    states = torch.from_numpy(episode.states[seen])[None]
    here = np.concatenate([episode.states[step, :2], [0]]).astype(np.float32)
    start = torch.from_numpy(episode.actions[step - 1] if step else here)[None]
    return model.act({"states": states, "start": start})[0].numpy()


# ---------------------------------------------------------------- what is written


def test_three_formats_hold_the_same(model, sample, tmp_path):
    for ending in ("csv", "parquet", "npz"):
        result = work(model, every=5).run([sample], tmp_path / f"o.{ending}")
        assert (result.good, result.bad) == (3, 0)
    expected = []
    for seed, steps in enumerate((45, 37, 12)):
        episode = motion(steps, seed)
        for step in range(0, steps, 5):
            for i, action in enumerate(by_hand(model, episode, step)):
                expected.append((f"run_{seed}", step, step / FPS + i / FPS, *action.tolist()))
    assert len(expected) == (9 + 8 + 3) * HORIZON

    table = pq.read_table(tmp_path / "o.parquet")
    assert table.column_names == ["episode", "step", "timestamp", *ACTIONS]
    rows = list(zip(*table.to_pydict().values(), strict=True))
    assert [row[:2] for row in rows] == [row[:2] for row in expected]
    np.testing.assert_allclose([row[2:] for row in rows], [row[2:] for row in expected], atol=1e-5)
    assert np.std([row[3:] for row in rows], axis=0).min() > 0.01  # the policy says something

    text = rows_of(tmp_path / "o.csv")
    assert list(text[0]) == table.column_names
    assert [(row["episode"], int(row["step"])) for row in text] == [row[:2] for row in rows]
    values = [[float(row[name]) for name in ("timestamp", *ACTIONS)] for row in text]
    np.testing.assert_allclose(values, [row[2:] for row in rows], atol=2e-6)

    with np.load(tmp_path / "o.npz", allow_pickle=False) as data:
        assert data["names"].tolist() == ["run_0", "run_1", "run_2"]
        assert data["action_names"].tolist() == list(ACTIONS)
        assert data["episode_ends"].tolist() == [9, 17, 20]
        assert data["fps"] == FPS
        assert data["steps"].tolist() == [row[1] for row in rows[::HORIZON]]
        np.testing.assert_allclose(data["times"], [row[2] for row in rows[::HORIZON]], atol=1e-9)
        np.testing.assert_array_equal(data["chunks"].reshape(-1, 3), np.float32([row[3:] for row in rows]))


def test_errors_and_times(model, sample, tmp_path):
    result = work(model, figures=2).run([sample], tmp_path / "o.csv")
    assert [p.name for p in result.paths] == ["o.csv", "o.csv.json", "o.csv.png", "o.csv.2.run_1.png"]
    assert (tmp_path / "o.csv.png").read_bytes().startswith(b"\x89PNG")
    squares, held, count = np.zeros(3), np.zeros(3), 0
    for seed, steps in enumerate((45, 37, 12)):
        episode = motion(steps, seed)
        for step in range(0, steps, HORIZON):
            true = episode.actions[step : step + HORIZON]
            here = np.append(episode.states[step, :2], episode.actions[step - 1, 2] if step else 0)
            squares += ((by_hand(model, episode, step)[: len(true)] - true) ** 2).sum(0)
            held += ((here - true) ** 2).sum(0)
            count += len(true)
    assert count == 45 + 37 + 12
    facts = loaded(tmp_path / "o.csv.json")
    assert facts["rmse"] == pytest.approx(np.sqrt(squares / count), rel=1e-4)
    assert facts["hold_rmse"] == pytest.approx(np.sqrt(held / count), rel=1e-4)
    assert facts["rmse_all"] == pytest.approx(np.sqrt(squares.sum() / 3 / count), rel=1e-4)
    assert facts["hold_rmse_all"] == pytest.approx(np.sqrt(held.sum() / 3 / count), rel=1e-4)
    assert (facts["fps"], facts["steps_of_a_chunk"], facts["every"], facts["decisions"]) == (FPS, 10, 10, 5 + 4 + 2)
    assert facts["chunk_ms"] == 500
    assert 0 < facts["decision_ms"] < 10_000
    assert facts["columns"] == list(ACTIONS)
    assert [(e["name"], e["steps"], e["decisions"]) for e in facts["episodes"]] == [
        ("run_0", 45, 5), ("run_1", 37, 4), ("run_2", 12, 2),
    ]  # fmt: skip
    assert facts["episodes"][2]["rmse"] != facts["rmse"]
    assert "notes" not in facts


def test_errors_of_angles_go_the_short_way(tmp_path):
    """A joint at pi and one at -pi are in one place."""
    near = policy("bspline,num_basis=6,angles=[0]", scale=0.01)
    episode = motion()
    chunks = work(near)(episode).value  # at about 0
    assert np.abs(chunks[..., 0]).max() < 0.5
    turned = dataclasses.replace(episode, actions=episode.actions + np.float32([2 * np.pi, 0, 0]))
    assert work(near)(turned).details["rmse"] == pytest.approx(work(near)(episode).details["rmse"], rel=1e-3)


def test_other_steps_between_decisions(model, sample):
    path = sample / "run_0.npz"
    (close,), (far,) = work(model, every=2)(path), work(model, every=15)(path)
    assert (close.value.shape, far.value.shape) == ((23, 10, 3), (3, 10, 3))
    assert (close.steps.tolist(), far.steps.tolist()) == (list(range(0, 45, 2)), [0, 15, 30])
    np.testing.assert_allclose(far.value[2], close.value[15], atol=1e-5)
    assert len(close.figure().axes) == 4


@pytest.mark.parametrize(("rate", "steps"), [(40, 19), (10, 5), (7, 4), (20, 10)])
def test_actions_at_another_rate_take_the_same_time(model, sample, tmp_path, rate, steps):
    (usual,), (fine,) = work(model)(sample / "run_0.npz"), work(model, steps_per_second=140)(sample / "run_0.npz")
    work(model, steps_per_second=rate).run([sample / "run_0.npz"], tmp_path / "o.npz")
    (made,) = work(model, steps_per_second=rate)(sample / "run_0.npz")
    assert made.value.shape == (5, steps, 3)
    assert (steps - 1) / rate <= (HORIZON - 1) / FPS < steps / rate
    np.testing.assert_allclose(made.value[:, :: max(1, rate // 20)], fine.value[:, :: max(7, 140 // rate)], atol=1e-5)
    np.testing.assert_array_equal(made.steps, usual.steps)
    if rate == 20:
        np.testing.assert_array_equal(made.value, usual.value)
    with np.load(tmp_path / "o.npz") as data:
        assert data["fps"] == rate
        np.testing.assert_array_equal(data["chunks"], made.value)
    facts = loaded(tmp_path / "o.npz.json")
    assert ("rmse" in facts) == (rate == 20)  # no demonstration has the other rate
    assert (facts["fps"], facts["chunk_ms"]) == (rate, 500)
    work(model, steps_per_second=rate).run([sample / "run_0.npz"], tmp_path / "o.csv")
    ahead = [float(row["timestamp"]) for row in rows_of(tmp_path / "o.csv")][steps : 2 * steps]
    assert ahead == pytest.approx(0.5 + np.arange(steps) / rate, abs=1e-6)
    if rate == 40:
        lines = made.figure().axes[0].get_lines()
        drawn = next(line.get_xdata() for line in lines if len(line.get_xdata()) > 2)
        assert drawn.max() == pytest.approx(2 + 19 / 40)  # seconds, and the hole behind the last chunk


class Asked:
    """Says zeros, and keeps what it was asked."""

    def __init__(self):
        self.calls = []

    def __call__(self, states, images, tasks, start):
        self.calls.append((states, images, tasks, start))
        return np.zeros((len(states), HORIZON, 3), np.float32)


def test_what_the_policy_is_shown(model):
    episode = motion(35, task="open it")
    asked = work(model)
    asked.runner = Asked()
    asked(episode)
    states, images, tasks, start = asked.runner.calls[0]
    assert states.shape == (4, 3, 3)
    np.testing.assert_array_equal(states[0], episode.states[[0, 0, 0]])  # nothing was before
    np.testing.assert_array_equal(states[1], episode.states[[8, 9, 10]])
    assert (images, tasks) == ({}, ["open it"] * 4)
    np.testing.assert_array_equal(start[0], [*episode.states[0, :2], 0])
    np.testing.assert_array_equal(start[1:], episode.actions[[9, 19, 29]])
    assert [len(states) for states, *_ in asked.runner.calls] == [4, 1, 1, 1, 1]  # the last ones are timed
    assert start.dtype == np.float32


def test_decisions_in_batches_are_the_same(model, sample):
    (one, *_), (many, *_) = (work(model, every=3, batch_size=size)(sample) for size in (4, 64))
    np.testing.assert_allclose(one.value, many.value, atol=1e-5)
    together = work(model)(sample)
    for path, own in zip(sorted(sample.iterdir()), together, strict=True):
        (alone,) = work(model)(path)
        assert alone.name == own.name
        np.testing.assert_array_equal(alone.value, own.value)


def test_an_enforced_start_is_the_action_before(sample):
    for text in ("fit", "overwrite"):
        enforced = policy(f"bspline,num_basis=6,initial={text}", scale=2.0)
        (made,) = work(enforced)(sample / "run_0.npz")
        episode = motion()
        np.testing.assert_allclose(made.value[1:, 0], episode.actions[9:44:10], atol=1e-5)
        np.testing.assert_allclose(made.value[0, 0, :2], episode.states[0, :2], atol=1e-5)
        (free,) = work(policy(scale=2.0))(sample / "run_0.npz")
        assert np.abs(free.value[1:, 0] - episode.actions[9:44:10]).max() > 0.1


def test_names_of_columns_and_episodes_stay_apart(tmp_path, sample):
    odd = policy(actions=("step", "elbow", "gripper"))
    put(sample, motion(), actions=odd.spec.action_names)
    other = tmp_path / "other"
    other.mkdir()
    put(other, motion(30), actions=odd.spec.action_names)
    result = work(odd).run([sample / "run_0.npz", other / "run_0.npz"], tmp_path / "o.csv")
    rows = rows_of(tmp_path / "o.csv")
    assert list(rows[0]) == ["episode", "step", "timestamp", "action.step", "elbow", "gripper"]
    assert list(dict.fromkeys(row["episode"] for row in rows)) == ["run_0", "run_0.2"]
    assert [e["name"] for e in loaded(tmp_path / "o.csv.json")["episodes"]] == ["run_0", "run_0.2"]
    assert result.good == 2


# ---------------------------------------------------------------- cameras, LeRobot, observations alone


def test_cameras_of_lerobot_folders(tmp_path):
    seeing = policy(cameras=("top",), image_size=8, tasks=("reach", "push"))
    episodes = tuple(motion(25, seed, ("top", "side"), "push") for seed in (0, 1))
    facts = {"fps": FPS, "state_names": STATES, "action_names": ACTIONS}
    write_lerobot(tmp_path / "set", Demonstrations(episodes=episodes, **facts))
    found = work(seeing)(tmp_path / "set")
    assert [made.name for made in found] == ["episode_000000", "episode_000001"]
    for episode, made in zip(episodes, found, strict=True):
        np.testing.assert_allclose(made.value, work(seeing)(episode).value, atol=1e-5)
    dark = dataclasses.replace(episodes[0], images={"top": np.zeros((25, 16, 20, 3), np.uint8)})
    changed = np.abs(work(seeing)(dark).value - found[0].value).max((1, 2))
    assert changed.shape == (3,)
    assert changed.min() > 1e-3
    with pytest.raises(DataError, match=r"run_0: has no images of the camera 'top', which the policy sees; give them"):
        work(seeing)(motion())
    with pytest.raises(DataError, match=r"episode_1: has no images of the camera 'top'"):
        work(seeing)(motion().states)
    with pytest.raises(DataError, match=r"run_0\.npz: there are no images of top; cameras: none\.$"):
        work(seeing)(put(tmp_path, motion(task="push")))
    write_lerobot(tmp_path / "other", Demonstrations(episodes=(motion(25, 0, ("top",), "fly"),), **facts))
    with pytest.raises(DataError, match=r"the model was not trained on the task 'fly'; tasks: reach, push\.$"):
        work(seeing)(tmp_path / "other")


def test_observations_alone(model, tmp_path):
    """Where actions are not known, neither are errors; a chunk then begins at the current state."""
    episode = motion()
    np.savez(tmp_path / "run_0.npz", states=episode.states, timestamps=episode.times, state_names=np.array(STATES))
    write_csv(tmp_path / "all.csv", [episode], state_names=STATES, action_names=ACTIONS)
    lines = [line.rsplit(",", 3)[0] for line in (tmp_path / "all.csv").read_text().splitlines()]
    (tmp_path / "run_0.csv").write_text("\n".join(lines) + "\n")
    for name in ("run_0.npz", "run_0.csv"):
        asked = work(model)
        expected = work(model)(episode.states)
        (made,) = asked(tmp_path / name)
        np.testing.assert_allclose(made.value, expected.value, atol=1e-5)
        asked.runner = Asked()
        asked(tmp_path / name)
        np.testing.assert_array_equal(asked.runner.calls[0][3][:, :2], episode.states[::HORIZON, :2])
        result = work(model, figures=1).run([tmp_path / name], tmp_path / "o.parquet")
        facts = loaded(tmp_path / "o.parquet.json")
        assert result.bad == 0
        assert facts["notes"] == [f"{tmp_path / name}: has no actions; what is predicted is compared with nothing."]
        assert "rmse" not in facts
        assert "rmse" not in facts["episodes"][0]
        assert (tmp_path / "o.parquet.png").exists()
    assert np.abs(made.value - work(model)(episode).value)[1:].max() > 1e-3  # the action before says something
    for verb, given in (("action/tokenize", None), ("action/predict", model)):
        strict = pipeline(verb, given, **({"action": "actions"} if given else {}))
        with pytest.raises(DataError, match=r"run_0\.npz: there is no array 'actions'"):
            strict(tmp_path / "run_0.npz")


def test_notes_are_those_of_a_run(model, tmp_path):
    episode = motion()
    rows = np.r_[0:20, 19:45]
    twice = dataclasses.replace(
        episode, states=episode.states[rows], actions=episode.actions[rows], times=episode.times[rows]
    )
    put(tmp_path, twice)
    again = work(model)
    for _ in range(2):
        again.run([tmp_path / "run_0.npz"], tmp_path / "o.csv")
        (note,) = loaded(tmp_path / "o.csv.json")["notes"]
        assert note.endswith("run_0: 1 frames repeat an earlier time stamp; they are left out.")
    assert loaded(tmp_path / "o.csv.json")["episodes"][0]["steps"] == 45


# ---------------------------------------------------------------- in Python


def test_arrays_and_episodes(model, tmp_path):
    episode = motion()
    made = work(model)(episode)
    assert (made.name, made.value.shape, made.details["decisions"]) == ("run_0", (5, 10, 3), 5)
    assert json.loads(made.to_json())["rmse"] == made.details["rmse"]
    assert made.save(tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    array = work(model)(episode.states)
    assert (array.name, array.value.shape, array.truth) == ("episode_1", (5, 10, 3), None)
    np.testing.assert_allclose(array.value[0], made.value[0], atol=1e-6)
    two = work(model)([episode.states, episode])
    assert [own.name for own in two] == ["episode_1", "run_0"]
    assert [own.name for own in work(model)([episode, episode])] == ["run_0", "run_0.2"]

    text = r"^action/predict: takes a path, an Episode, or states \(T, 3\), got ndarray of shape \(45, 2\)\.$"
    with pytest.raises(DataError, match=text):
        work(model)(episode.states[:, :2])
    with pytest.raises(DataError, match=r"or states \(T, 3\), got str\.$"):
        work(model)("none.npz")
    broken = episode.states.copy()
    broken[4, 1] = np.nan
    with pytest.raises(DataError, match=r"episode_1: states is not finite at step 4; mend or leave it out\.$"):
        work(model)(broken)
    with pytest.raises(DataError, match=r"run_0: actions must be \(T, 3\), got \(45, 2\); give all columns\.$"):
        work(model)(dataclasses.replace(episode, actions=episode.actions[:, :2]))
    with pytest.raises(DataError, match=r"run_0: has 10 steps a second, the model acts at 20; resample it\.$"):
        work(model)(dataclasses.replace(episode, times=2 * episode.times))
    with pytest.raises(DataError, match=r"times has 44 steps, but actions has 45"):
        work(model)(dataclasses.replace(episode, times=episode.times[1:]))


# ---------------------------------------------------------------- files that do not fit


def test_one_bad_episode_does_not_lose_the_others(saved, sample, tmp_path, capsys):
    with np.load(sample / "run_0.npz") as data:
        arrays = dict(data)
    arrays["states"][7, 1] = np.nan
    np.savez(sample / "a_nan.npz", **arrays)
    put(sample, dataclasses.replace(motion(30), name="b_other"), states=("hip", "elbow", "load"))
    (sample / "c_cut.npz").write_bytes((sample / "run_0.npz").read_bytes()[:300])
    out = tmp_path / "o.csv"
    line = ["run", "action/predict", str(sample), "-o", str(out), "--model", str(saved), "--figures", "0", "--quiet"]
    assert main(line) == 3
    assert f"3 records done, 3 bad (listed in {out}.errors.jsonl)" in capsys.readouterr().out
    bad = [json.loads(line) for line in (tmp_path / "o.csv.errors.jsonl").read_text().splitlines()]
    rules = {facts["file"].rpartition("/")[2]: facts["rule"] for facts in bad}
    assert rules["a_nan.npz"].endswith("states is not finite at step 7")
    assert "the model has 3 state_names (shoulder, elbow, load, ...), the data 3 (with hip)" in rules["b_other.npz"]
    assert set(rules) == {"a_nan.npz", "b_other.npz", "c_cut.npz"}
    assert all(facts["advice"] for facts in bad)
    assert [e["name"] for e in loaded(tmp_path / "o.csv.json")["episodes"]] == ["run_0", "run_1", "run_2"]
    assert {row["episode"] for row in rows_of(out)} == {"run_0", "run_1", "run_2"}


def test_demonstrations_of_another_robot(model, saved, tmp_path, capsys):
    for states, actions, text in (
        (
            STATES,
            ("shoulder", "wrist", "gripper"),
            r"3 action_names \(shoulder, .*the data 3 \(with wrist\); give data",
        ),
        (("elbow", "shoulder", "load"), ACTIONS, r"the data 3 \(with another order\); give data of the same robot"),
    ):
        path = put(tmp_path, motion(), states=states, actions=actions)
        with pytest.raises(DataError, match=text):
            work(model)(path)
    slow = dataclasses.replace(motion(), times=2 * motion().times)
    path = put(tmp_path, slow)
    with pytest.raises(DataError, match=r"the model acts at 20 steps a second, the data has 10; resample it\.$"):
        work(model)(path)
    assert work(model, fps=20)(path)[0].details["steps"] == 89  # which does so
    put(tmp_path, motion(), states=("a", "b", "c"))
    assert main(["run", "action/predict", str(path), "-o", str(tmp_path / "o.csv"), "--model", str(saved)]) == 2
    assert "the model has 3 state_names (shoulder, elbow, load, ...), the data 3 (with a)" in capsys.readouterr().err
    assert names(tmp_path) == ["run_0.npz"]


def test_an_interruption_keeps_what_is_finished(model, sample, tmp_path, monkeypatch):
    decided, calls = PredictActions._decided, []

    def stopping(self, item):
        calls.append(item)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return decided(self, item)

    monkeypatch.setattr(PredictActions, "_decided", stopping)
    with pytest.raises(PipelineInterrupted, match=r"the 2 finished results are in .*o\.csv\.partial"):
        work(model, batch_size=1).run([sample], tmp_path / "o.csv")
    assert names(tmp_path) == ["o.csv.json.partial", "o.csv.partial"]
    assert {row["episode"] for row in rows_of(tmp_path / "o.csv.partial")} == {"run_0", "run_1"}
    assert loaded(tmp_path / "o.csv.json.partial")["decisions"] == 9
