"""action/predict: chunks for recorded observations in three formats, closed loop in a simulator, what is refused."""

import csv
import dataclasses
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.action import arm, simulation
from vertebra.domains.action.episodes import Demonstrations, Episode
from vertebra.domains.action.lerobot import write_lerobot
from vertebra.domains.action.model import CVAEPolicy
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.action.tables import write_csv, write_npz
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from vertebra.pipelines import figures
from vertebra.pipelines.action_figures import paths_figure
from vertebra.pipelines.action_predict import PredictActions
from vertebra.pipelines.base import PipelineInterrupted, pipeline
from vertebra.tokenizers.action import make_action_tokenizer

STATES, ACTIONS = ("shoulder", "elbow", "load"), ("shoulder", "elbow", "gripper")
FPS, HORIZON = 20.0, 10


def motion(steps=45, seed=0, cameras=(), task="reach"):
    """Two joints that fall short of what they are told; a gripper that closes for a while."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps + 1) / FPS
    joints = np.stack([np.sin(2 * t + seed) * 0.8, np.cos(3 * t) * rng.uniform(0.3, 0.6)], axis=1)
    gripper = ((t > 0.5) & (t < 1.5))[:, None]
    return Episode(
        name=f"run_{seed}",
        states=np.concatenate([joints, t[:, None]], axis=1)[:-1].astype(np.float32),
        actions=np.concatenate([1.1 * joints, gripper], axis=1)[1:].astype(np.float32),
        times=t[:-1],
        task=task,
        images={name: rng.integers(0, 256, (steps, 16, 20, 3), dtype=np.uint8) for name in cameras},
    )


def policy(tokenizer="bspline,num_basis=6", *, states=STATES, actions=ACTIONS, fps=FPS, scale=1.0, **facts):
    """An untrained policy whose actions depend on all it sees."""
    torch.manual_seed(3)
    made = make_action_tokenizer(tokenizer, horizon=HORIZON, dims=len(actions))
    made = made.fit(scale * (2 * torch.rand(200, HORIZON, len(actions)) - 1))
    names = {"state_names": states, "action_names": actions}
    ones = {"state_std": (1,) * len(states), "change_std": (0.1,) * len(states), "start_std": (1,) * len(actions)}
    columns = tuple(states.index(name) if name in states else -1 for name in actions)
    places = {"positions": columns, "relative": (-1,) * len(actions), "state_mean": (0,) * len(states)}
    spec = ActionSpec(tokenizer=made.to_dict(), fps=fps, **{**names, **ones, **places, **facts})
    model = CVAEPolicy(create_backbone("illama_test"), spec, latent=0, patch_size=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


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


def put(folder, episode, states=STATES, actions=ACTIONS):
    path = folder / f"{episode.name}.npz"
    write_npz(path, episode, state_names=states, action_names=actions)
    return path


def work(model, **options):
    return pipeline("action/predict", model, **{"figures": 0, "device": "cpu", **options})


def loaded(path):
    return json.loads(path.read_text())


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_file())


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


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


# ---------------------------------------------------------------- closed loop


@pytest.fixture(scope="module")
def reacher():
    """Untrained, for ArmReach: the first chunk of an episode says where the arm ends."""
    return policy(states=arm.FULL_NAMES, actions=arm.ACTION_NAMES, history=2)


@pytest.fixture
def easy(monkeypatch):
    """A goal as wide as the room, so that some episodes succeed."""
    success = arm.KinematicArm.succeeded.fget
    monkeypatch.setattr(arm.KinematicArm, "succeeded", property(lambda self: success(self) or self.goal[1] > 0))


def test_a_simulated_robot(reacher, easy, tmp_path):
    out = tmp_path / "r.csv"
    result = work(reacher, sim="ArmReach", episodes=4, parallel=3, seed=50, frames=3).run([], out)
    assert (result.good, result.bad) == (4, 0)
    assert names(tmp_path) == ["r.csv", "r.csv.film.png", "r.csv.gif", "r.csv.json", "r.csv.png"]
    rows = rows_of(out)
    assert [(row["episode"], row["seed"]) for row in rows] == [(str(i), str(50 + i)) for i in range(4)]
    runner = work(reacher).runner
    whole = simulation.rollout(runner, "ArmReach", episodes=4, seed=50, parallel=1)
    assert [int(row["success"]) for row in rows] == whole.success.astype(int).tolist()
    assert 0 < whole.success.sum() < 4
    assert [row["steps_to_success"] for row in rows] == [str(n) if n > 0 else "" for n in whole.first]
    np.testing.assert_allclose([float(row["jerk"]) for row in rows], whole.jerk, rtol=1e-3)
    facts = loaded(tmp_path / "r.csv.json")
    assert (facts["task"], facts["execute"], facts["ensemble"], facts["episodes"]) == ("ArmReach", HORIZON, None, 4)
    assert facts["success"] == pytest.approx(whole.success.mean())
    assert (facts["success_low"], facts["success_high"]) == pytest.approx(
        simulation.wilson(int(whole.success.sum()), 4), abs=1e-4
    )
    assert facts["jerk"] == pytest.approx(float(whole.jerk.mean()), rel=1e-3)
    assert facts["decisions"] == 2 * 10  # of two groups, in 96 steps
    assert facts["decision_ms"] > 0
    with Image.open(tmp_path / "r.csv.film.png") as strip, Image.open(tmp_path / "r.csv.gif") as moving:
        assert (strip.size, moving.n_frames) == ((3 * 240, 240), 3)
    assert (tmp_path / "r.csv.png").read_bytes().startswith(b"\x89PNG")
    assert "notes" not in facts


def test_it_is_the_same_whatever_goes_on_side_by_side(reacher, tmp_path):
    for parallel in (1, 2):
        work(reacher, sim="ArmReach", episodes=3, parallel=parallel, frames=0).run([], tmp_path / f"{parallel}.csv")
    one, two = (rows_of(tmp_path / f"{parallel}.csv") for parallel in (1, 2))
    assert [list(row.values())[:5] for row in two] == [list(row.values())[:5] for row in one]
    for key in ("jerk", "action_jerk"):
        np.testing.assert_allclose([float(r[key]) for r in two], [float(r[key]) for r in one], rtol=1e-3)
    assert len({row["jerk"] for row in one}) == 3
    assert not list(tmp_path.glob("*.gif"))


def test_simulated_on_the_command_line(reacher, tmp_path, capsys):
    where = save_model(reacher, tmp_path / "model")
    out = tmp_path / "r.csv"
    line = ["run", "action/predict", "--sim", "ArmReach", "--episodes", "2", "--model", str(where), "--frames", "0"]
    assert main([*line, "-o", str(out), "--quiet"]) == 0
    assert [row["seed"] for row in rows_of(out)] == ["10000", "10001"]
    assert f"wrote {out}" in capsys.readouterr().out
    assert main(["run", "action/predict", "--model", str(where), "-o", str(out)]) == 2
    assert "no input file given; name at least one, or a simulator's task by --sim." in capsys.readouterr().err


class Played:
    """Rollouts of nothing but zeros: what was asked for, and the seeds at which it fails."""

    def __init__(self):
        self.calls, self.fails = [], {}

    def __call__(self, runner, task, *, episodes, seed, **options):
        self.calls.append({"episodes": episodes, "seed": seed, **options})
        if seed in self.fails:
            raise self.fails[seed]
        zeros = np.zeros((episodes, 5, 3), np.float32)
        return simulation.Rollouts(
            task=task, seed=seed, success=np.zeros(episodes, bool), first=np.full(episodes, -1), actions=zeros,
            gripper=zeros, block=None, goals=zeros[:, 0], fps=20.0, decisions=(simulation.Decision(0.01, 1),),
            frames=np.zeros((0, 0, 0, 3), np.uint8), notes=("No pictures: none.",),
        )  # fmt: skip


@pytest.fixture
def played(monkeypatch):
    """Play nothing, and draw nothing."""
    stand_in = Played()
    monkeypatch.setattr(simulation, "rollout", stand_in)
    monkeypatch.setattr(figures, "png_bytes", lambda figure: b"")
    return stand_in


@pytest.mark.parametrize(
    ("options", "execute"), [({}, 10), ({"execute": 4}, 4), ({"ensemble": 0.1}, 1), ({"execute": 2, "ensemble": 0}, 2)]
)
def test_how_chunks_are_carried_out(reacher, played, tmp_path, options, execute):
    work(reacher, sim="ArmReach", episodes=3, parallel=2, seed=7, frames=5, **options).run([], tmp_path / "a.csv")
    facts = loaded(tmp_path / "a.csv.json")
    assert (facts["execute"], facts["ensemble"]) == (execute, options.get("ensemble"))
    usual = {"parallel": 2, "execute": None, "ensemble": None, **options}
    assert played.calls == [
        {"episodes": 2, "seed": 7, "frames": 5, **usual}, {"episodes": 1, "seed": 9, "frames": 0, **usual},
    ]  # fmt: skip


def test_an_episode_that_fails_loses_no_other(reacher, played, tmp_path):
    played.fails[12] = DataError("Controller: the policy's actions are not finite numbers; do not carry them out.")
    result = work(reacher, sim="ArmReach", episodes=5, parallel=2, seed=10).run([], tmp_path / "r.csv")
    assert [(call["seed"], call["episodes"]) for call in played.calls] == [
        (10, 2), (12, 2), (12, 1), (13, 1), (14, 1),
    ]  # fmt: skip
    assert (result.good, result.bad) == (4, 1)
    assert [(row["episode"], row["seed"]) for row in rows_of(tmp_path / "r.csv")] == [
        ("0", "10"), ("1", "11"), ("3", "13"), ("4", "14"),
    ]  # fmt: skip
    (bad,) = [json.loads(line) for line in (tmp_path / "r.csv.errors.jsonl").read_text().splitlines()]
    assert bad["record"] == "ArmReach: episode 2"
    assert "actions are not finite numbers" in bad["rule"]
    facts = loaded(tmp_path / "r.csv.json")
    assert (facts["episodes"], facts["success"], facts["steps_to_success"]) == (4, 0, None)
    assert facts["notes"] == ["No pictures: none."]
    assert not (tmp_path / "r.csv.gif").exists()


def test_an_interrupted_simulation_keeps_what_is_finished(reacher, played, tmp_path):
    played.fails[14] = KeyboardInterrupt()
    with pytest.raises(PipelineInterrupted, match=r"the 4 finished results are in .*r\.csv\.partial"):
        work(reacher, sim="ArmReach", episodes=6, parallel=2, seed=10).run([], tmp_path / "r.csv")
    assert len(rows_of(tmp_path / "r.csv.partial")) == 4
    assert names(tmp_path) == ["r.csv.json.partial", "r.csv.partial", "r.csv.png.partial"]


@pytest.mark.parametrize("carries", [True, False])
def test_paths_are_drawn_from_above_and_from_the_side(carries):
    rng = np.random.default_rng(0)
    tip, block = rng.normal(size=(2, 5, 8, 3)).astype(np.float32)
    goals, success = rng.normal(size=(5, 3)).astype(np.float32), np.array([1, 0, 1, 1, 0], bool)
    figure = paths_figure(tip, block if carries else None, goals, success, most=3)
    assert figure.get_suptitle() == "3 of 5 episodes reached the goal; the first 3 are drawn"
    for axes, (x, y) in zip(figure.axes, ((0, 1), (0, 2)), strict=True):
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("x (m)", f"{'xyz'[y]} (m)")
        assert len(axes.lines) == 3 * (4 if carries else 2)
        for number in range(3):
            own = axes.lines[number * len(axes.lines) // 3 :][: len(axes.lines) // 3]
            path, goal = own[-2:]
            moved = block if carries else tip
            np.testing.assert_array_equal(path.get_xydata(), moved[number][:, [x, y]])
            np.testing.assert_array_equal(goal.get_xydata(), goals[number : number + 1, [x, y]])
            assert {path.get_color(), goal.get_color()} == {figures.PALETTE[0 if success[number] else 1]}
            assert goal.get_marker() == ("o" if success[number] else "x")
            if carries:
                np.testing.assert_array_equal(own[0].get_xydata(), tip[number][:, [x, y]])
                np.testing.assert_array_equal(own[1].get_xydata(), block[number, :1, [x, y]].T)
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == [*(["gripper", "what is moved"] if carries else []), "goal reached", "missed"]


# ---------------------------------------------------------------- settings


def test_inputs_and_outputs_that_do_not_go_together(model, reacher, sample, tmp_path):
    out = tmp_path / "o.csv"
    playing = work(reacher, sim="ArmReach")
    with pytest.raises(ConfigError, match=r"^action/predict: a simulator needs no input; leave the files or --sim out"):
        playing.run([sample], out)
    with pytest.raises(ConfigError, match=r"^action/predict: a simulator needs no input"):
        playing(np.zeros((4, 14)))
    with pytest.raises(ConfigError, match=r"simulated episodes are written as \.csv; let the output end in \.csv\.$"):
        playing.run([], tmp_path / "o.npz")
    with pytest.raises(ConfigError, match=r"no input file given; name at least one, or a simulator's task by --sim\.$"):
        work(model).run([], out)
    with pytest.raises(ConfigError, match=r"the output must end in \.csv or \.parquet or \.npz, got 'o\.txt'"):
        work(model).run([sample], tmp_path / "o.txt")
    assert names(tmp_path) == []
    tokens = policy()
    tokens.task = "mesh/generate"
    with pytest.raises(ConfigError, match=r"needs a model of the task action/policy, got one of mesh/generate"):
        work(tokens)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"every": 0}, r"^action/predict: every must be at least 1, got 0\.$"),
        ({"episodes": 0}, r"^action/predict: episodes must be at least 1, got 0\.$"),
        ({"figures": -1}, r"^action/predict: figures must be 0 or more, got -1\.$"),
        ({"frames": -1}, r"^action/predict: frames must be 0 or more, got -1\.$"),
        ({"seed": -1}, r"^action/predict: seed must be 0 or more, got -1\.$"),
        ({"steps_per_second": 0}, r"^action/predict: steps_per_second must be above 0, got 0\.$"),
        ({"steps_per_second": 2}, r"^action/predict: steps_per_second=2 leaves a chunk of one step; raise it\.$"),
        ({"execute": 5}, r"^action/predict: execute is for a simulator; leave it out\.$"),
        ({"ensemble": 0.1}, r"^action/predict: ensemble is for a simulator; leave it out\.$"),
        ({"sims": "ArmReach"}, r"^action/predict: no option 'sims'\. Did you mean 'sim'"),
        ({"sim": "ArmReach", "every": 5}, r"^action/predict: every is for files, not for a simulator; leave it out\.$"),
        ({"sim": "ArmReach", "steps_per_second": 5}, r"steps_per_second is for files, not for a simulator"),
        ({"sim": "ArmReach", "execute": 11}, r"^Controller: execute must be from 1 to 10, the steps of the policy's"),
        ({"sim": "ArmReach", "ensemble": float("nan")}, r"^Controller: ensemble must be a finite number, got nan\.$"),
        ({"sim": "ArmReach", "frames": 98}, r"^action/predict: frames must be at most 97, got 98\.$"),
        ({"sim": "FetchReach"}, r"^action/predict: FetchReach has the states gripper_x, .*, and the policy joint_"),
    ],
)
def test_impossible_settings(reacher, options, text):
    with pytest.raises(ConfigError, match=text):
        work(reacher, **options)


def test_simulators_of_another_kind(reacher, monkeypatch, tmp_path):
    with pytest.raises(UnknownNameError, match=r"^unknown simulated task 'ArmRaech'\. Did you mean 'ArmReach'"):
        work(reacher, sim="ArmRaech")
    own = {"states": arm.FULL_NAMES, "actions": arm.ACTION_NAMES}
    with pytest.raises(ConfigError, match=r"ArmReach has 20 steps a second, and the policy 10; train one at its rate"):
        work(policy(**own, fps=10.0), sim="ArmReach")
    with pytest.raises(ConfigError, match=r"ArmReach is to 'reach the target', and the policy knows fly alone\.$"):
        work(policy(**own, tasks=("fly",)), sim="ArmReach")
    with pytest.raises(ConfigError, match=r"ArmReach has no camera 'front', which the policy sees; choose another\.$"):
        work(policy(**own, cameras=("front",), image_size=8), sim="ArmReach").run([], tmp_path / "o.csv")

    def missing(split):
        raise MissingExtraError("mujoco", "sim", "the task")

    task = dataclasses.replace(simulation.TASKS["ArmReach"], make=missing)
    monkeypatch.setitem(simulation.TASKS, "ArmReach", task)
    with pytest.raises(MissingExtraError, match=r"the task needs the package 'mujoco'"):  # and is no bad record
        work(reacher, sim="ArmReach").run([], tmp_path / "o.csv")
    assert names(tmp_path) == []
