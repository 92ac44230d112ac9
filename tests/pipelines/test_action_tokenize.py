"""action/tokenize: demonstrations to tokens and back, at other rates; what is measured; limits and damaged files."""

import csv
import json

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.action.episodes import windows
from vertebra.domains.action.lerobot import write_lerobot
from vertebra.domains.action.sources import read_demonstrations
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.model import DomainModel
from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.pipelines.action_tokens import read_tokens
from vertebra.pipelines.base import pipeline
from vertebra.tokenizers.action import make_action_tokenizer

NAMES = ("shoulder", "elbow", "gripper")
FPS = 20.0


def motion(steps=90, seed=0):
    """Two smooth joints and a gripper in the middle of the vector's end that closes for a while, (T, 3)."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps) / FPS
    joints = [np.sin(2 * t * rng.uniform(0.5, 1) + phase) * size for phase, size in ((0.3, 0.8), (seed, 0.4))]
    return np.stack([*joints, np.where((t > 1) & (t < 3), 1.0, 0.0)], axis=1).astype(np.float32)


def write(path, actions, names=NAMES, **arrays):
    times = np.arange(len(actions)) / FPS
    arrays = {"states": actions, "timestamps": times, "action_names": np.array(names), **arrays}
    np.savez(path, actions=actions, **arrays)
    return path


@pytest.fixture
def sample(tmp_path):
    """Three episodes; the last chunks are shorter than 20 steps."""
    folder = tmp_path / "sample"
    folder.mkdir()
    for number, steps in enumerate((90, 75, 47)):
        write(folder / f"run_{number}.npz", motion(steps, number))
    return folder


def loaded(path):
    return json.loads(path.read_text())


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_file())


def chunks_of(folder, horizon=20):
    """Chunks as the domain cuts them, one behind the other, and which of their steps exist."""
    pairs = [windows(e, horizon) for e in read_demonstrations([folder]).episodes]
    return [(actions[::horizon], real[::horizon]) for actions, real in pairs]


# ---------------------------------------------------------------- there


@pytest.mark.parametrize("text", ["bspline", "binning", "fast,scale=20"])
def test_what_is_written_and_its_measures(text, sample, tmp_path):
    if text.startswith("fast"):
        pytest.importorskip("tokenizers", reason="FAST needs the package tokenizers")
    out = tmp_path / "new" / "tokens.npz"
    work = pipeline("action/tokenize", tokenizer=text, gripper="gripper", units="rad,rad")
    with pytest.raises(ConfigError, match=r"^action/tokenize: units must be one for all or one for each of 3 columns"):
        work.run([sample], out)
    assert not out.exists()
    units = ("rad", "rad", "") if text == "bspline" else "rad, rad,"
    work = pipeline("action/tokenize", tokenizer=text, gripper="gripper", units=units, figures=0)
    result = work.run([sample], out)
    assert (result.good, result.bad) == (3, 0)
    assert names(out.parent) == ["tokens.npz", "tokens.npz.json"]

    cuts = chunks_of(sample)
    chunks = torch.from_numpy(np.concatenate([c for c, _ in cuts]))
    real = np.concatenate([r for _, r in cuts])
    tokenizer = make_action_tokenizer(text, horizon=20, dims=3, grippers=(2,)).fit(chunks, quantiles=(0, 1))
    ids = tokenizer.encode(chunks)
    counts = (ids >= 0).sum(1)
    decoded = tokenizer.decode(ids).numpy()
    with np.load(out, allow_pickle=False) as data:
        np.testing.assert_array_equal(data["ids"], ids[ids >= 0])
        np.testing.assert_array_equal(data["ends"], counts.cumsum(0))
        assert data["names"].tolist() == ["run_0", "run_1", "run_2"]
        assert data["episodes"].tolist() == [0] * 5 + [1] * 4 + [2] * 3
        assert data["starts"].tolist() == [0, 20, 40, 60, 80, 0, 20, 40, 60, 0, 20, 40]
        assert data["lengths"].tolist() == [20, 20, 20, 20, 10, 20, 20, 20, 15, 20, 20, 7]
        assert json.loads(data["facts"].tobytes())["tokenizer"] == tokenizer.to_dict()

    summary = loaded(out.with_name("tokens.npz.json"))
    assert summary["bounds"] == "learnt from these episodes"
    assert (summary["steps"], summary["chunks"], summary["tokens"]) == (212, 12, int(counts.sum()))
    per_chunk = {"mean": counts.double().mean().item(), "min": counts.min().item(), "max": counts.max().item()}
    assert summary["tokens_per_chunk"] == {
        **{k: pytest.approx(v, abs=1e-3) for k, v in per_chunk.items()},
        "binning": 60,
    }
    assert summary["compression"] == pytest.approx(12 * 60 / int(counts.sum()), rel=1e-5)
    errors = (decoded - chunks.numpy())[real]  # (212, 3)
    for d, joint in enumerate(summary["joints"]):
        assert (joint["name"], joint["unit"]) == (NAMES[d], ("rad", "rad", "")[d])
        assert joint["rmse"] == pytest.approx(np.sqrt((errors[:, d] ** 2).mean()), rel=1e-4, abs=1e-7)
        assert joint["largest"] == pytest.approx(np.abs(errors[:, d]).max(), rel=1e-4, abs=1e-7)
        assert joint["clipped"] == pytest.approx(tokenizer.clipped(chunks)[d].item(), abs=1e-5)
    assert errors.std() > 0
    last, first, own = [], [], []
    for k in (0, 5, 9):  # where episodes begin
        count = {0: 5, 5: 4, 9: 3}[k]
        last += [decoded[k + i, -1] for i in range(count - 1)]
        first += [decoded[k + i + 1, 0] for i in range(count - 1)]
        own += [chunks[k + i + 1, 0] - chunks[k + i, -1] for i in range(count - 1)]
    jumps, moves = np.abs(np.array(first) - np.array(last)), torch.stack(own).abs().numpy()
    assert summary["borders"] == 9
    for d, joint in enumerate(summary["joints"]):
        for key, values in (("jump", jumps), ("step", moves)):
            assert joint[key]["mean"] == pytest.approx(values[:, d].mean(), abs=1e-6)
            assert joint[key]["max"] == pytest.approx(values[:, d].max(), abs=1e-6)
    assert summary["jump"]["max"] == pytest.approx(jumps.max(), abs=1e-6)
    assert summary["step"]["mean"] == pytest.approx(moves.mean(), abs=1e-6)
    assert [e["name"] for e in summary["episodes"]] == ["run_0", "run_1", "run_2"]
    assert summary["episodes"][2]["chunks"] == 3


def test_the_end_of_an_episode_is_repeated_and_not_counted(tmp_path):
    """What stands behind the end would be in the errors, if it were counted: a chunk of 2 real steps and 18 others."""
    actions = np.zeros((22, 1), np.float32)
    actions[21] = 5.0
    work = pipeline("action/tokenize", tokenizer="binning")
    one = work([actions])[0]
    assert one.tokens.lengths.tolist() == [20, 2]
    np.testing.assert_allclose(one.decoded[1, 1:], 5.0)
    one = pipeline("action/tokenize", tokenizer="bspline,num_basis=5")([actions])[0]
    errors = (one.decoded[1, :2] - actions[20:])[:, 0]
    assert one.details["rmse"][0] == pytest.approx(np.sqrt((errors**2).sum() / 22), rel=0.02)


def test_chunks_may_overlap_or_leave_gaps(sample, tmp_path):
    actions = motion(50)
    one = pipeline("action/tokenize", horizon=10, every=4, tokenizer="binning,vocab_size=4096")(actions)
    assert one.tokens.starts.tolist() == list(range(0, 50, 4))
    assert one.tokens.lengths.tolist() == [10] * 11 + [6, 2]
    assert one.tokens.used.tolist() == [4] * 12 + [2]
    assert one.details["borders"] == 12
    jumps = np.abs(one.decoded[1:, 0] - one.decoded[:-1, 3])  # the robot leaves a chunk after 4 steps
    assert one.details["jump"]["max"] == pytest.approx(jumps.max(), abs=1e-6)
    apart = pipeline("action/tokenize", horizon=10, every=15, tokenizer="binning,vocab_size=4096", figures=0)
    apart.run([sample / "run_2.npz"], tmp_path / "a.npz")
    assert loaded(tmp_path / "a.npz.json")["borders"] == 0
    (back,) = apart(tmp_path / "a.npz")
    steps = [*range(10), *range(15, 25), *range(30, 40), 45, 46]
    np.testing.assert_allclose(back.times * FPS, steps, atol=1e-9)
    np.testing.assert_allclose(back.value, motion(47, 2)[steps], atol=2e-2)


# ---------------------------------------------------------------- and back


@pytest.mark.parametrize(
    "text", ["bspline,vocab_size=4096", "binning,vocab_size=4096", "fast,scale=100,vocab_size=4096"]
)
@pytest.mark.parametrize("form", ["npz", "csv"])
def test_there_and_back_on_the_command_line(text, form, sample, tmp_path, capsys):
    if text.startswith("fast"):
        pytest.importorskip("tokenizers", reason="FAST needs the package tokenizers")
    tokens, back = tmp_path / "t.npz", tmp_path / f"back.{form}"
    words = ["--tokenizer", text, "--gripper", "2", "--figures", "0", "--quiet"]
    assert main(["run", "action/tokenize", str(sample), "-o", str(tokens), *words]) == 0
    assert main(["run", "action/tokenize", str(tokens), "-o", str(back), "--quiet"]) == 0
    assert capsys.readouterr().out == (
        f"3 records done; wrote {tokens}, {tokens}.json\n3 records done; wrote {back}, {back}.json\n"
    )
    if form == "npz":
        found = read_demonstrations([back])  # as demonstrations are read
        assert found.action_names == NAMES
        assert found.fps == pytest.approx(FPS)
        episodes = [e.actions for e in found.episodes]
    else:
        with back.open(newline="") as stream:
            rows = list(csv.reader(stream))
        assert rows[0] == ["episode", "timestamp", *NAMES]
        episodes = []
        for number in range(3):
            own = [[float(v) for v in row[1:]] for row in rows[1:] if row[0] == f"run_{number}"]
            np.testing.assert_allclose([row[0] for row in own], np.arange(len(own)) / FPS, atol=1e-6)
            episodes.append(np.array(own)[:, 1:])
    for number, (steps, made) in enumerate(zip((90, 75, 47), episodes, strict=True)):
        assert made.shape == (steps, 3)
        np.testing.assert_allclose(made[:, :2], motion(steps, number)[:, :2], atol=0.06)
        assert np.abs(made[:, :2] - motion(steps, number)[:, :2]).mean() < 5e-3
    assert loaded(tmp_path / f"back.{form}.json")["episodes"][1]["steps"] == 75


@pytest.mark.parametrize("rate", [40.0, 10.0, 30.0, 50.0, 19.98])
def test_any_rate_is_the_same_curve(rate, sample, tmp_path):
    work = pipeline("action/tokenize", tokenizer="bspline,vocab_size=65536", gripper=[2], figures=0)
    work.run([sample], tmp_path / "t.npz")
    (own, *_), (made, *_) = (
        work(tmp_path / "t.npz"),
        pipeline("action/tokenize", steps_per_second=rate)(tmp_path / "t.npz"),
    )
    assert made.fps == pytest.approx(rate, rel=1e-6)
    assert np.diff(made.times) == pytest.approx(1 / rate)
    assert made.times[0] == 0
    assert own.times[-1] - 1 / rate < made.times[-1] <= own.times[-1] + 1e-9
    for d in (0, 1):
        expected = np.interp(made.times, own.times, own.value[:, d])  # the curves bend a little between steps
        np.testing.assert_allclose(made.value[:, d], expected, atol=5e-3)
    assert set(np.round(made.value[:, 2], 3)) <= set(np.round(own.value[:, 2], 3))  # never in between
    shared = np.flatnonzero(np.abs(made.times * FPS - np.round(made.times * FPS)) < 1e-6)
    steps = np.round(made.times[shared] * FPS).astype(int)
    assert len(shared) >= (1 if rate == 19.98 else 10)
    np.testing.assert_allclose(made.value[shared], own.value[steps], atol=1e-5)


def test_angles_and_quaternions_are_compared_and_joined_the_short_way(tmp_path):
    """An angle that wraps, and a rotation whose sign flips at a border of chunks."""
    t = np.arange(60) / FPS
    angle = (3 * t + 2.5 + np.pi) % (2 * np.pi) - np.pi
    half = 0.4 + t
    turn = np.stack([np.cos(half), np.sin(half), 0 * t, 0 * t], axis=1)
    turn[20:40] *= -1
    columns = ("yaw", "q.w", "q.x", "q.y", "q.z")
    path = write(tmp_path / "a.npz", np.column_stack([angle, turn]).astype(np.float32), columns)
    text = "bspline,vocab_size=4096,num_basis=15"
    work = pipeline("action/tokenize", angles="yaw", quaternions=["q.w"], tokenizer=text, figures=0)
    work.run([path], tmp_path / "t.npz")
    joints = loaded(tmp_path / "t.npz.json")["joints"]
    assert [joint["unit"] for joint in joints] == ["rad", "", "", "", ""]
    assert max(joint["largest"] for joint in joints) < 0.1  # cut off at quantiles of three chunks
    assert max(joint["jump"]["max"] for joint in joints) < 0.3
    (made,) = pipeline("action/tokenize", steps_per_second=80)(tmp_path / "t.npz")
    assert np.abs(made.value[:, 0]).max() <= np.pi + 1e-6
    yaw = np.unwrap(made.value[:, 0])
    np.testing.assert_allclose(yaw, 3 * made.times + 2.5, atol=0.1)  # also between chunks
    np.testing.assert_allclose(np.linalg.norm(made.value[:, 1:], axis=1), 1, atol=1e-5)
    expected = np.stack([np.cos(0.4 + made.times), np.sin(0.4 + made.times)], axis=1)
    assert np.abs((made.value[:, 1:3] * expected).sum(1)).min() > 0.999
    plain = pipeline("action/tokenize", tokenizer=text)(np.column_stack([angle, turn]))
    assert max(plain.details["largest"]) > 1  # without being told


@pytest.mark.parametrize("velocity", ["false", "true"])
@pytest.mark.parametrize("initial", ["overwrite", "fit"])
def test_an_enforced_start_leaves_no_jump(initial, velocity, sample, tmp_path):
    free = pipeline("action/tokenize", gripper="gripper", figures=0)
    text = f"bspline,initial={initial},velocity={velocity}"
    held = pipeline("action/tokenize", tokenizer=text, gripper="gripper", figures=0)
    for name, work in (("free", free), ("held", held)):
        work.run([sample], tmp_path / f"{name}.npz")
    free_joints, joints = (loaded(tmp_path / f"{name}.npz.json")["joints"] for name in ("free", "held"))
    for d in (0, 1):
        assert joints[d]["jump"]["max"] < 1e-6 < free_joints[d]["jump"]["max"]
    (name, tokens), *_ = read_tokens(tmp_path / "held.npz")
    assert tokens.origins.shape == ((5, 2, 3) if velocity == "true" else (5, 3))
    own = held(sample / "run_0.npz")[0]
    position = tokens.origins[:, 0] if velocity == "true" else tokens.origins
    decoded = tokens.decode()
    np.testing.assert_allclose(position[1:, :2], decoded[:-1, -1, :2], atol=1e-6)  # of what was decoded, not shown
    np.testing.assert_array_equal(position[0], motion(90)[0])
    assert len(own.value) == 5
    (back, *_) = pipeline("action/tokenize")(tmp_path / "held.npz")
    np.testing.assert_allclose(back.value[20:40], decoded[1], atol=1e-6)
    assert name == "run_0"
    assert np.sqrt(((back.value - motion(90)) ** 2).mean()) < 0.08


# ---------------------------------------------------------------- whose bounds


def test_bounds_of_an_earlier_file_of_a_tokenizer_and_of_a_model(sample, tmp_path):
    first = tmp_path / "train.npz"
    pipeline("action/tokenize", horizon=15, gripper="gripper", figures=0).run([sample / "run_0.npz"], first)
    given = read_tokens(first)[0][1].tokenizer
    for tokenizer in (str(first), given):
        work = pipeline("action/tokenize", tokenizer=tokenizer, figures=0)
        assert work.horizon == work.every == 15
        work.run([sample / "run_1.npz"], tmp_path / "test.npz")
        assert read_tokens(tmp_path / "test.npz")[0][1].tokenizer == given
        assert loaded(tmp_path / "test.npz.json")["bounds"] == "given with the tokenizer"
    for options, text in (
        ({"horizon": 20}, r"^action/tokenize: the tokenizer has the horizon 15, not 20\.$"),
        ({"angles": "0"}, r"^action/tokenize: the tokenizer knows its grippers, angles and quaternions; leave these"),
    ):
        with pytest.raises(ConfigError, match=text):
            pipeline("action/tokenize", tokenizer=given, **options)
    with pytest.raises(DataError, match=r"has 2 columns of actions, and the tokenizer is for 3; run it apart\.$"):
        pipeline("action/tokenize", tokenizer=given)(np.zeros((40, 2)))
    with pytest.raises(ConfigError, match=r"the tokenizer must be fitted; call its fit, or give its name instead\.$"):
        pipeline("action/tokenize", tokenizer=make_action_tokenizer("bspline", horizon=15, dims=3))
    with pytest.raises(DataError, match=r"none\.npz: no such file; check the name\.$"):
        pipeline("action/tokenize", tokenizer=str(tmp_path / "none.npz"))
    with pytest.raises(DataError, match=r"run_0\.npz: holds no tokens of actions; name a file that action/tokenize"):
        pipeline("action/tokenize", tokenizer=str(sample / "run_0.npz"))


class Told(DomainModel):
    """A policy that only knows its tokenizer."""

    task = "action/policy"


def test_a_model_s_tokenizer_and_what_its_actions_are_relative_to(tmp_path):
    """Positions relative to where a chunk begins, except for the gripper."""
    actions = [motion(60, seed) for seed in range(3)]
    states = [np.concatenate([a[:1], a[:-1]]) for a in actions]
    offsets = [s[::10] * [1, 1, 0] for s in states]
    chunks = [a.reshape(-1, 10, 3) - o[:, None] for a, o in zip(actions, offsets, strict=True)]
    tokenizer = make_action_tokenizer("bspline,vocab_size=4096,num_basis=8", horizon=10, dims=3, grippers=(2,))
    tokenizer = tokenizer.fit(torch.from_numpy(np.concatenate(chunks)).float())
    spec = ActionSpec(
        tokenizer=tokenizer.to_dict(), fps=FPS, state_names=NAMES, action_names=NAMES, state_mean=(0,) * 3,
        state_std=(1,) * 3, change_std=(1,) * 3, start_std=(1,) * 3, positions=(0, 1, 2), relative=(0, 1, -1),
    )  # fmt: skip
    model = Told(create_backbone("illama_test"), spec)
    path = write(tmp_path / "a.npz", actions[0], states=states[0])
    work = pipeline("action/tokenize", model, figures=0)
    work.run([path], tmp_path / "t.npz")
    tokens = read_tokens(tmp_path / "t.npz")[0][1]
    np.testing.assert_allclose(tokens.offsets, offsets[0], atol=1e-6)
    np.testing.assert_array_equal(tokens.ids, tokenizer.encode(torch.from_numpy(chunks[0]).float()))
    (back,) = pipeline("action/tokenize")(tmp_path / "t.npz")
    expected = tokenizer.decode(torch.from_numpy(tokens.ids)).numpy() + offsets[0][:, None]
    np.testing.assert_allclose(back.value, expected.reshape(60, 3), atol=1e-5)
    assert np.abs(back.value - actions[0])[:, :2].mean() < 0.02
    with pytest.raises(
        DataError, match=r"has 0 columns of states, and actions .* relative to 3; give the states too\.$"
    ):
        work(actions[0])
    with pytest.raises(ConfigError, match=r"the model has a tokenizer; give a model or a tokenizer, not both\.$"):
        pipeline("action/tokenize", model, tokenizer="fast")
    model.task = "mesh/generate"
    with pytest.raises(ConfigError, match=r"needs a model of the task action/policy, got one of mesh/generate"):
        pipeline("action/tokenize", model)


def test_an_enforced_start_of_relative_actions(tmp_path):
    """The start is told relative to the same state as the chunk."""
    actions = motion(40)[:, :2]
    chunks = (actions.reshape(4, 10, 2) - actions[::10, None]).astype(np.float32)
    tokenizer = make_action_tokenizer("bspline,num_basis=8,initial=fit,velocity=true", horizon=10, dims=2)
    tokenizer = tokenizer.fit(torch.from_numpy(chunks))
    spec = ActionSpec(
        tokenizer=tokenizer.to_dict(), fps=FPS, state_names=NAMES[:2], action_names=NAMES[:2], state_mean=(0, 0),
        state_std=(1, 1), change_std=(1, 1), start_std=(1, 1), positions=(0, 1), relative=(0, 1),
    )  # fmt: skip
    path = write(tmp_path / "a.npz", actions, NAMES[:2])
    (one,) = pipeline("action/tokenize", Told(create_backbone("illama_test"), spec))(path)
    decoded = one.tokens.decode()
    np.testing.assert_allclose(decoded[1:, 0], decoded[:-1, -1], atol=1e-6)
    moved = decoded[:-1, -1] - decoded[:-1, -2]
    np.testing.assert_allclose(one.tokens.origins[1:, 1], moved, atol=1e-6)
    np.testing.assert_allclose(one.tokens.origins[1:, 0] + actions[10::10], decoded[:-1, -1], atol=1e-6)
    assert np.abs(decoded.reshape(40, 2) - actions).mean() < 0.05


def test_quantiles_cut_off_what_is_rare():
    actions = np.cumsum(np.random.default_rng(0).normal(size=(200, 2)), axis=0).astype(np.float32)
    whole, cut = (pipeline("action/tokenize", quantiles=q)(actions) for q in (None, (0.1, 0.9)))
    assert whole.details["clipped"] == 0
    assert cut.details["clipped"] == pytest.approx(0.2, abs=0.05)
    with pytest.raises(ConfigError, match=r"^fit: quantiles must be two numbers from 0 to 1, the lower first, got"):
        pipeline("action/tokenize", quantiles=(0.9, 0.1))(actions)


def test_every_call_learns_its_own_bounds():
    work = pipeline("action/tokenize", tokenizer="binning")
    small, large = work(motion(40)), work(10 * motion(40))
    assert large.tokens.tokenizer.high[0] == pytest.approx(10 * small.tokens.tokenizer.high[0], rel=1e-4)
    both = work([motion(40), 10 * motion(40)])
    assert both[0].tokens.tokenizer == both[1].tokens.tokenizer
    assert both[0].tokens.tokenizer.high[0] > 5 * small.tokens.tokenizer.high[0]


# ---------------------------------------------------------------- in Python


def test_values_in_python(sample, tmp_path):
    one = pipeline("action/tokenize", tokenizer="bspline", fps=20, units="rad")(motion())
    assert (one.name, one.value.shape) == ("episode_1", (5, 30))
    assert (one.details["steps"], one.details["tokens"], one.details["compression"]) == (90, 150, 2.0)
    assert len(one.details["rmse"]) == 3
    json.loads(one.to_json())
    assert one.save(tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    found = pipeline("action/tokenize")(sample)
    assert [p.name for p in found] == ["run_0", "run_1", "run_2"]
    assert len({id(p.tokens.tokenizer) for p in found}) == 1  # of all of them
    with pytest.raises(DataError, match=r"^action/tokenize: takes a path or an array \(T, D\), got list of shape"):
        pipeline("action/tokenize")([[[[1.0]]]])
    with pytest.raises(DataError, match=r"^action/tokenize: takes a path or an array \(T, D\), got str\.$"):
        pipeline("action/tokenize")("none.npz")
    broken = motion()
    broken[7, 1] = np.nan
    with pytest.raises(DataError, match=r"^episode_1: actions is not finite at step 7; mend or leave it out\.$"):
        pipeline("action/tokenize")(broken)


def test_figures_are_as_many_as_asked_for(sample, tmp_path):
    pipeline("action/tokenize", figures=2).run([sample], tmp_path / "a.npz")
    assert names(tmp_path) == ["a.npz", "a.npz.2.run_1.png", "a.npz.json", "a.npz.png"]
    assert (tmp_path / "a.npz.png").read_bytes().startswith(b"\x89PNG")
    (made, *_) = pipeline("action/tokenize")(tmp_path / "a.npz")
    assert len(made.figure().axes) == 4  # the fourth is empty


# ---------------------------------------------------------------- files that do not fit


def test_one_bad_episode_does_not_lose_the_others(sample, tmp_path, capsys):
    broken = motion()
    broken[7, 1] = np.nan
    write(sample / "a_nan.npz", broken, states=motion())
    write(sample / "b_other.npz", motion()[:, :2], NAMES[:2])
    (sample / "c_cut.npz").write_bytes((sample / "run_0.npz").read_bytes()[:300])
    (sample / "d_empty.csv").write_text("")
    files = [
        sample / f"{n}" for n in ("run_0.npz", "a_nan.npz", "b_other.npz", "c_cut.npz", "d_empty.csv", "run_1.npz")
    ]
    out = tmp_path / "o.npz"
    assert main(["run", "action/tokenize", *map(str, files), "-o", str(out), "--figures", "0", "--quiet"]) == 3
    assert f"2 records done, 4 bad (listed in {out}.errors.jsonl)" in capsys.readouterr().out
    bad = [json.loads(line) for line in (tmp_path / "o.npz.errors.jsonl").read_text().splitlines()]
    rules = {facts["file"].rpartition("/")[2]: facts["rule"] for facts in bad}
    assert rules["a_nan.npz"].endswith("actions is not finite at step 7")
    assert rules["b_other.npz"] == "has the columns shoulder, elbow, and run_0 has shoulder, elbow, gripper"
    assert set(rules) == {"a_nan.npz", "b_other.npz", "c_cut.npz", "d_empty.csv"}
    assert all(facts["advice"] for facts in bad)
    assert [e["name"] for e in loaded(tmp_path / "o.npz.json")["episodes"]] == ["run_0", "run_1"]


def test_repeated_and_missing_frames_are_mended_and_noted(tmp_path):
    actions, times = motion(60), np.arange(60) / FPS
    kept = np.r_[0:10, 9:30, 32:60]  # one twice, two missing
    write(tmp_path / "a.npz", actions[kept], timestamps=times[kept])
    out = tmp_path / "o.npz"
    result = pipeline("action/tokenize", tokenizer="binning,vocab_size=4096", figures=0).run([tmp_path / "a.npz"], out)
    assert result.bad == 0
    summary = loaded(tmp_path / "o.npz.json")
    assert summary["steps"] == 60
    assert any("1 frames repeat an earlier time stamp" in note for note in summary["notes"])
    assert any("2 frames are missing" in note for note in summary["notes"])
    (back,) = pipeline("action/tokenize")(out)
    np.testing.assert_allclose(back.value[:, :2], actions[:, :2], atol=0.02)


def test_the_first_file_may_be_the_stranger(sample, tmp_path):
    given = tmp_path / "train.npz"
    pipeline("action/tokenize", figures=0).run([sample], given)
    path = write(tmp_path / "other.npz", motion()[:, :2], NAMES[:2])
    result = pipeline("action/tokenize", tokenizer=str(given), figures=0).run([path, sample], tmp_path / "o.npz")
    assert (result.good, result.bad) == (3, 1)


def test_lerobot_folders(sample, tmp_path):
    found = read_demonstrations([sample])
    write_lerobot(tmp_path / "set", found)
    for inputs, out in ((sample, "a.npz"), (tmp_path / "set", "b.npz")):
        assert pipeline("action/tokenize", figures=0).run([inputs], tmp_path / out).bad == 0
    (_, one), (name, other) = read_tokens(tmp_path / "a.npz")[1], read_tokens(tmp_path / "b.npz")[1]
    assert name == "episode_000001"
    np.testing.assert_array_equal(one.ids, other.ids)
    assert (other.names, other.fps) == (NAMES, pytest.approx(FPS))


def test_names_are_told_apart(sample, tmp_path):
    (tmp_path / "other").mkdir()
    write(tmp_path / "other" / "run_0.npz", motion(30, 9))
    inputs = [sample / "run_0.npz", tmp_path / "other" / "run_0.npz"]
    pipeline("action/tokenize", figures=0).run(inputs, tmp_path / "o.npz")
    assert [name for name, _ in read_tokens(tmp_path / "o.npz")] == ["run_0", "run_0.2"]


def test_directions_that_are_mixed_up(sample, tmp_path):
    work, tokens = pipeline("action/tokenize", figures=0), tmp_path / "a.npz"
    work.run([sample], tokens)
    for inputs, out, text in (
        ([sample], "b.csv", r"^action/tokenize: tokens are written as \.npz; let the output end in \.npz\.$"),
        ([sample, tokens], "b.npz", r"^action/tokenize: some inputs are demonstrations, others are tokens; run them"),
        ([tokens], "b.txt", r"^action/tokenize: the output must end in \.npz or \.csv, got 'b\.txt'"),
    ):
        with pytest.raises(ConfigError, match=text):
            work.run(inputs, tmp_path / out)
        assert names(tmp_path) == ["a.npz", "a.npz.json"]
    with pytest.raises(ConfigError, match=r"steps_per_second is for turning tokens back; leave it out\.$"):
        pipeline("action/tokenize", steps_per_second=5)(sample)


def changed(path, **arrays):
    with np.load(path) as data:
        np.savez(path, **{**data, **arrays})


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:200]), "cannot be read as tokens"),
        (lambda p: p.write_bytes(b""), "cannot be read as tokens"),
        (lambda p: changed(p, facts=np.frombuffer(b"{}", np.uint8)), "cannot be read as tokens"),
        (lambda p: changed(p, ends=np.arange(1, 13)), r"ends do not cut [\d,]+ tokens into chunks"),
        (lambda p: changed(p, lengths=np.full(12, 21)), "lengths that are not between 1 and the horizon 20"),
        (lambda p: changed(p, lengths=np.ones(11, int)), "arrays of different lengths"),
        (lambda p: changed(p, starts=np.zeros(12, int)), "starts do not grow"),
        (lambda p: changed(p, episodes=np.zeros(12, int)), "episodes are not numbered in order"),
        (lambda p: changed(p, offsets=np.full((12, 3), np.nan, np.float32)), "offsets that are not finite numbers"),
        (lambda p: changed(p, origins=np.zeros((2, 3), np.float32)), r"origins of shape \(2, 3\)"),
    ],
)
def test_damaged_token_files(damage, text, sample, tmp_path):
    path = tmp_path / "a.npz"
    pipeline("action/tokenize", figures=0).run([sample], path)
    damage(path)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as tokens of actions .*; write it again\.$") as caught:
        pipeline("action/tokenize").run([path], tmp_path / "b.csv")
    assert caught.match(text)
    assert not (tmp_path / "b.csv").exists()


def test_damaged_ids_are_listed_and_the_others_turned_back(sample, tmp_path):
    path = tmp_path / "a.npz"
    pipeline("action/tokenize", figures=0).run([sample], path)
    with np.load(path) as data:
        ids, ends = data["ids"].copy(), data["ends"]
    ids[ends[5] + 4] = 999  # in the second chunk of run_1
    changed(path, ids=ids)
    result = pipeline("action/tokenize").run([path], tmp_path / "b.npz")
    assert (result.good, result.bad) == (2, 1)
    (bad,) = [json.loads(line) for line in (tmp_path / "b.npz.errors.jsonl").read_text().splitlines()]
    assert (bad["record"], bad["rule"]) == ("run_1", "the ids of chunk 2 stand for no actions")
    assert loaded(tmp_path / "b.npz.json")["episodes"][1]["name"] == "run_2"


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"tokenizer": "bpe"}, UnknownNameError, r"^unknown action tokenizer 'bpe'.* Known: "),
        ({"tokenizer": "bspline,bases=3"}, ConfigError, r"^tokenizer 'bspline,bases=3': 'bases=3' must be one of"),
        ({"horizon": 0}, ConfigError, r"^action/tokenize: horizon must be at least 1, got 0\.$"),
        ({"every": -1}, ConfigError, r"^action/tokenize: every must be at least 1, got -1\.$"),
        ({"figures": -1}, ConfigError, r"^action/tokenize: figures must be 0 or more, got -1\.$"),
        ({"fps": 0}, ConfigError, r"^action/tokenize: fps must be above 0 and below 1,000,000, got 0\.$"),
        ({"gripper": "hand"}, ConfigError, r"^action/tokenize: grippers: no column 'hand'; columns: action_0,"),
        ({"angles": "2", "gripper": "2"}, ConfigError, r"^BSplineTokenizer: grippers \[2\] .* angles"),
        ({"horizon": 5}, ConfigError, r"^BSplineTokenizer: num_basis must be at most .* 5.*, got 10\.$"),
        ({"seed": 1}, ConfigError, r"^action/tokenize: no option 'seed'\."),
    ],
)
def test_impossible_settings(options, error, text):
    with pytest.raises(error, match=text):
        pipeline("action/tokenize", **options)(motion())


def test_errors_have_status_2(sample, tmp_path, capsys):
    out = str(tmp_path / "o.npz")
    assert main(["run", "action/tokenize", str(sample), "-o", out, "--angles", "wrist", "--quiet"]) == 2
    assert "angles: no column 'wrist'; columns: shoulder, elbow, gripper (or 0 to 2)." in capsys.readouterr().err
    assert names(tmp_path) == []
    (tmp_path / "none").mkdir()
    assert main(["run", "action/tokenize", str(tmp_path / "none"), "-o", out, "--quiet"]) == 2
    assert "no demonstrations are in this folder" in capsys.readouterr().err
