"""action/predict in a simulator: the closed loop, its figures, and settings that do not go together."""

import dataclasses
import json

import numpy as np
import pytest
from made_policies import HORIZON, loaded, motion, names, policy, put, rows_of, work
from PIL import Image

from vertebra.cli import main
from vertebra.domains.action import arm, simulation
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, DataError, MissingExtraError, UnknownNameError
from vertebra.pipelines import figures
from vertebra.pipelines.action_figures import paths_figure
from vertebra.pipelines.base import PipelineInterrupted

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


def test_inputs_and_outputs_that_do_not_go_together(reacher, tmp_path):
    (tmp_path / "sample").mkdir()
    sample, model, out = put(tmp_path / "sample", motion()), policy(), tmp_path / "o.csv"
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
