import contextlib
import csv
import io
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import numpy as np
import pytest

from vertebra.cli import main
from vertebra.cli.scaling import Scheduler
from vertebra.cli.scaling_cell import STALE_S, TAKEN, claim, claim_state
from vertebra.cli.scaling_cell import main as run_cell
from vertebra.cli.scaling_grid import (
    Size,
    Study,
    make_grid,
    parse_budget,
    parse_data,
    parse_number,
    parse_ood,
    plan_steps,
    read_cell,
    recipe_backbone,
    resize,
    split_words,
)
from vertebra.errors import ConfigError

GRID = ["-c", "toy.yaml", "--params", "illama_test,depth=1", "illama_test", "--data", "8", "1"]
REST = ["--budget", "8", "--evaluations", "4", "--jobs", "0", "--ood", "far:data.path=far.csv"]


def table(path):
    with Path(path).open(newline="") as f:
        return list(csv.DictReader(f))


def result(cell):
    return json.loads(Path(cell, "result.json").read_text())


def write_far(folder):
    """Points whose labels are the wrong ones."""
    lines = (folder / "points.csv").read_text().splitlines()
    (folder / "far.csv").write_text("\n".join(f"{1 - int(line[0])}{line[1:]}" for line in lines) + "\n")


@pytest.fixture
def folder(project):
    write_far(project)
    return project


@pytest.fixture(scope="module")
def grid(trained, tmp_path_factory):
    """A finished study of two sizes on two amounts of data, made once: its project, and what was said."""
    place = tmp_path_factory.mktemp("grid")
    for name in ("points.csv", "toy.yaml"):
        shutil.copy(trained / name, place)
    write_far(place)
    said, before = io.StringIO(), Path.cwd()
    os.chdir(place)
    try:
        with contextlib.redirect_stdout(said):
            assert main(["scaling", *GRID, *REST, "-o", "out"]) == 0
    finally:
        os.chdir(before)
    return place, said.getvalue()


# ---------------------------------------------------------------- a grid from end to end


@pytest.mark.slow
def test_a_grid_gives_a_result_for_every_cell(grid):
    place, said = grid
    cells = sorted((place / "out/cells").iterdir())
    assert [c.name for c in cells] == sorted(
        f"illama_test{depth}-d{data}-s0" for depth in ("", "_depth=1") for data in ("8", "1")
    )
    found = {c.name: result(c) for c in cells}
    assert {(r["items"], r["items_all"], r["steps"]) for r in found.values()} == {(8, 16, 8), (16, 16, 8)}
    small, large = found["illama_test_depth=1-d1-s0"], found["illama_test-d1-s0"]
    assert small["params"] < large["params"] == 4784
    assert large["params_all"] == 4784 + 2 * 16 + 2 * 16 + 2, "embedding and head"
    assert large["tokens"] == 4 * 6, "points of a batch"
    assert large["compute"] == 6 * 4784 * 24 * 8
    assert set(large["numbers"]) == {"validation", "test", "far"}
    assert large["numbers"]["far"]["loss"] > large["numbers"]["test"]["loss"]
    assert [step for step, _ in large["curve"]["loss"]] == [2, 4, 6, 8]
    facts = json.loads((cells[0] / found[cells[0].name]["run"] / "metrics.json").read_text())
    assert facts["validation"]["val/loss"] == found[cells[0].name]["numbers"]["validation"]["loss"]
    assert not list(place.rglob("claim*")), "claims are given back"
    assert not list((place / "out/cells").rglob(".*")), "no temporary files are left"
    assert "4 runs of 8 steps: 2 sizes x 2 data x 1 seeds" in said
    assert "[4/4] illama_test-d1-s0: loss of validation 0." in said
    assert " left\n" in said


@pytest.mark.slow
def test_a_grid_is_reported(grid):
    place, said = grid
    points = table(place / "out/points.csv")
    assert len(points) == 4
    assert all(float(p["far_loss"]) > 0 for p in points)
    laws = {(r["axis"], r["split"], r["form"]): r for r in table(place / "out/laws.csv")}
    assert len(laws) == 3 * 3 * 2
    assert laws["params", "test", "power"]["note"] == "needs 3 different N, got 2"
    assert laws["params", "test", "power"]["exponent"] == ""
    assert "test (ID) over D: no law; needs 3 different D, got 2" in said
    assert table(place / "out/envelope.csv")
    assert {p.name for p in (place / "out/figures").iterdir()} == {"params.png", "data.png", "compute.png"}
    text = (place / "out/report.html").read_text()
    assert "4 runs; loss at the best checkpoint of each by val/acc" in text
    assert "http://" not in text.replace("http://www.w3.org", "")


@pytest.mark.slow
def test_a_second_time_nothing_is_trained(grid, monkeypatch, capsys):
    place, _ = grid
    monkeypatch.chdir(place)
    monkeypatch.setattr(Scheduler, "_here", lambda self, cell: 1 / 0)
    before = {p: p.read_text() for p in Path("out").rglob("result.json")}
    assert main(["scaling", *GRID, *REST, "-o", "out"]) == 0
    assert "4 of 4 are finished already" in capsys.readouterr().out
    assert {p: p.read_text() for p in Path("out").rglob("result.json")} == before
    assert main(["scaling", "--report", "out", "--metric", "acc"]) == 0
    assert "validation over N: no law" in capsys.readouterr().out
    assert main(["scaling", "--report", "out", "--metric", "crps"]) == 2
    assert "--metric crps: no run has it; there are acc, loss." in capsys.readouterr().err


@pytest.mark.slow
def test_other_settings_need_another_folder(grid, monkeypatch, capsys):
    place, _ = grid
    monkeypatch.chdir(place)
    assert main(["scaling", *GRID, *REST, "--budget", "9", "-o", "out"]) == 2
    assert "out holds a study of another budget (8, now 9); choose another folder with -o" in capsys.readouterr().err


@pytest.mark.slow
def test_an_interrupted_cell_goes_on_to_the_same_numbers(grid, folder, monkeypatch, capsys):
    import toys

    words = ["scaling", *GRID[:3], "illama_test", "--data", "8", *REST, "-o", "out"]
    original = toys.ToyTask.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(toys.ToyTask, "training_step", training_step)
        assert main(words) == 130
    captured = capsys.readouterr()
    assert "the others go on from their last checkpoint with:\n  vertebra scaling -c toy.yaml" in captured.err
    assert not list(folder.rglob("claim"))
    cell = folder / "out/cells/illama_test-d8-s0"
    assert not (cell / "result.json").exists()
    assert (cell / "runs/toy/1/checkpoints/last.ckpt").is_file()
    assert main(words) == 0
    mine, whole = result(cell), result(grid[0] / "out/cells/illama_test-d8-s0")
    assert {**mine, "seconds": 0} == {**whole, "seconds": 0}


@pytest.mark.slow
def test_a_cell_that_fails_does_not_stop_the_others(folder, capsys):
    words = ["-c", "toy.yaml", "--params", "illama_test,depth=1", "--data", "99", "4", "--budget", "2", "--jobs", "0"]
    assert main(["scaling", *words, "-o", "out"]) == 3
    captured = capsys.readouterr()
    assert "1 of 2 cells failed:" in captured.err
    assert "illama_test_depth=1-d99-s0: scaling: --data 99: the training split has 16 items only" in captured.err
    assert "[1/2] illama_test_depth=1-d99-s0: failed with status 2" in captured.out
    assert result("out/cells/illama_test_depth=1-d4-s0")["items"] == 4


@pytest.mark.slow
def test_processes_side_by_side_share_operations(folder, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    words = ["-c", "toy.yaml", "--params", "500", "4784", "--budget", "1e7F", "--jobs", "2", "--evaluations", "2"]
    assert main(["scaling", *words, "-o", "out"]) == 0, capsys.readouterr()
    found = [result(c) for c in Path("out/cells").iterdir()]
    assert len(found) == 2
    for r in found:
        step = 6 * r["params"] * r["tokens"]
        assert 1e7 - 2 * step < r["compute"] <= 1e7 + step, "to whole steps, shared by the evaluations"
    assert max(r["steps"] for r in found) > 2 * min(r["steps"] for r in found)
    assert all(len(r["curve"]["loss"]) >= 2 for r in found)


@pytest.mark.slow
def test_two_processes_train_a_cell_as_one(folder, grid, monkeypatch, capsys):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"]
    words = ["-c", "toy.yaml", "--params", "illama_test", "--data", "8", "--budget", "8", "--evaluations", "4"]
    assert main(["scaling", *words, *two, "--ood", "far:data.path=far.csv", "-o", "out"]) == 0, capsys.readouterr()
    mine, whole = result("out/cells/illama_test-d8-s0"), result(grid[0] / "out/cells/illama_test-d8-s0")
    assert mine["tokens"] == whole["tokens"], "two batches of half the size"
    assert mine["compute"] == whole["compute"]
    assert set(mine["numbers"]) == {"validation", "test", "far"}
    assert not list(folder.rglob("claim*"))


# ---------------------------------------------------------------- parts and claims


def a_grid(count=3):
    sizes = [Size(f"s{i}", f"s{i}", 10**i, "") for i in range(count)]
    return make_grid(sizes, ["0.1", "1"], [0, 1])


@pytest.mark.parametrize("parts", [1, 2, 5, 20])
def test_parts_cover_the_grid_once(monkeypatch, tmp_path, parts, capsys):
    import vertebra.cli.scaling as module

    taken = []
    monkeypatch.setattr(module, "_plan", lambda *a: (Study(recipe="x"), a_grid()))
    monkeypatch.setattr(Scheduler, "work", lambda self: taken.extend(self.cells))
    for part in range(1, parts + 1):
        assert main(["scaling", "x", "--only", f"{part}/{parts}", "-o", str(tmp_path)]) == 0
    assert sorted(c.name for c in taken) == sorted(c.name for c in a_grid())
    assert read_cell(tmp_path / "cells/s1-d0.1-s1") in taken
    assert "no cell is finished, so there is nothing to report" in capsys.readouterr().out


def test_a_cell_is_claimed_once(tmp_path):
    with claim(tmp_path) as mine:
        assert mine
        state, who = claim_state(tmp_path)
        assert state == "held"
        assert who.startswith(f"process {os.getpid()} on {socket.gethostname()}, last seen 0 min ago")
        with claim(tmp_path) as second:
            assert not second
        assert run_cell([str(tmp_path)]) == TAKEN
    assert claim_state(tmp_path) == ("free", "")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_left_behind_is_told_and_taken_over(tmp_path, capsys):
    (tmp_path / "claim").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1}))
    with claim(tmp_path) as mine:
        assert mine
    assert "the claim of process 4194305 on" in capsys.readouterr().out


@pytest.mark.parametrize(("age", "state"), [(STALE_S - 60, "held"), (STALE_S + 60, "stale")])
def test_a_claim_of_another_machine_ages(tmp_path, age, state):
    (tmp_path / "claim").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    os.utime(tmp_path / "claim", (time.time() - age,) * 2)
    assert claim_state(tmp_path)[0] == state
    with claim(tmp_path) as mine:
        assert mine == (state == "stale")


def test_a_cell_of_another_process_is_left_to_it(tmp_path, monkeypatch, capsys):
    cells = a_grid(1)[:2]
    for cell in cells:
        (tmp_path / "cells" / cell.name).mkdir(parents=True)
    monkeypatch.setattr(Scheduler, "_numbers", lambda self, cell: "done")
    monkeypatch.setattr(Scheduler, "_here", lambda self, cell: (self._place(cell) / "result.json").write_text("") and 0)
    scheduler = Scheduler(tmp_path, cells, jobs=0)
    with claim(tmp_path / "cells" / cells[0].name):
        scheduler.work()
    assert scheduler.elsewhere == [cells[0].name]
    out = capsys.readouterr().out
    assert f"{cells[0].name}: process {os.getpid()}" in out
    assert f"[1/2] {cells[1].name}: done" in out


# ---------------------------------------------------------------- laws of results


def write_results(folder, loss, floor=0.0):
    """Results of a made-up study whose losses follow ``loss(params, items)``."""
    (folder / "study.json").write_text('{"recipe": "a/b"}')
    for n in (1e3, 1e4, 1e5, 1e6, 1e7):
        for d in (100, 1000, 10_000):
            value = loss(n, d)
            place = folder / "cells" / f"{n:.0f}-{d}"
            place.mkdir(parents=True)
            values = {
                "name": place.name, "size": f"{n:.0f}", "data": str(d), "seed": 0, "items": d, "items_all": 10_000,
                "tokens": 1000.0, "params": n, "params_all": n + 10, "steps": 100, "compute": 6 * n * 1e5,
                "checkpoint": "", "monitor": "val/loss", "best": None, "run": "",
                "numbers": {"validation": {"loss": value}, "test": {"loss": value}, "far": {"loss": 2 * value}},
                "curve": {"loss": [[step, value * (100 / step) ** 0.3] for step in (10, 20, 50, 100)]}, "seconds": 1,
            }  # fmt: skip
            (place / "result.json").write_text(json.dumps(values))


def test_laws_of_known_results(tmp_path, capsys):
    write_results(tmp_path, lambda n, d: (1e9 / n) ** 0.08 * (1e4 / d) ** 0.2)
    assert main(["scaling", "--report", str(tmp_path)]) == 0
    laws = {(r["axis"], r["split"], r["form"]): r for r in table(tmp_path / "laws.csv")}
    n, d = laws["params", "test", "power"], laws["data", "test", "power"]
    assert float(n["exponent"]) == pytest.approx(0.08)
    assert float(n["critical"]) == pytest.approx(1e9, rel=1e-4)
    assert float(n["points"]) == 5, "those of the most data"
    assert float(d["exponent"]) == pytest.approx(0.2)
    assert float(d["points"]) == 3
    assert float(n["exponent_low"]) <= 0.08 + 1e-9
    assert float(laws["params", "far", "power"]["exponent"]) == pytest.approx(0.08)
    assert float(laws["compute", "validation", "power"]["exponent"]) == pytest.approx(0.08, rel=0.5)
    assert "show no floor" in laws["params", "test", "power+floor"]["note"]
    assert "test (ID) over N: (1e+09 / N)^0.0800" in capsys.readouterr().out
    rows = [r for r in table(tmp_path / "envelope.csv") if r["split"] == "validation"]
    compute = np.array([float(r["compute_pf_days"]) for r in rows])
    assert (np.diff(compute) > 0).all()
    assert compute[0] == pytest.approx(6e3 * 1000 * 10 / 8.64e19, rel=0.15)


def test_losses_below_zero_need_a_shift(tmp_path, capsys):
    write_results(tmp_path, lambda n, d: 4 - np.log10(n))
    assert main(["scaling", "--report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "test (ID) over N: no law; every loss must be above 0, got -3" in out
    assert "use a metric that is positive, such as crps, or shift the loss: --shift" in out
    assert main(["scaling", "--report", str(tmp_path), "--shift", "5"]) == 0
    assert "test (ID) over N: (" in capsys.readouterr().out
    assert "5 was added to loss before the fits" in (tmp_path / "report.html").read_text()


def test_a_loss_that_rises_has_no_law(tmp_path, capsys):
    write_results(tmp_path, lambda n, d: n**0.1)
    assert main(["scaling", "--report", str(tmp_path)]) == 0
    assert "test (ID) over N: no law; the loss must fall with x, got a slope of +0.1" in capsys.readouterr().out


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "the recipe comes first, as in `vertebra scaling dna/lm"),
        (["dna/lmm"], "unknown recipe 'dna/lmm'. Did you mean 'dna/lm'"),
        (["dna/lm"], "--params is missing. See: vertebra scaling --help"),
        (["dna/lm", "--params", "1K"], "--budget is missing"),
        (["dna/lm", "--params", "1K", "--budget", "0"], "--budget must be steps, as 2000, or operations, as 1e14F"),
        (["dna/lm", "--params", "1K", "--budget", "1e9X"], "--budget must be steps"),
        (["dna/lm", "--params", "1K", "--budget", "9", "--data", "1.5"], "--data must be items, as 10K, or shares"),
        (["dna/lm", "--params", "1K", "--budget", "9", "--data", "all"], "--data must be items, as 10K, or shares"),
        (["dna/lm", "--params", "1K", "--budget", "9", "--only", "3/2"], "--only must be I/N with I from 1 to N"),
        (["dna/lm", "--params", "1K", "--budget", "9", "--jobs", "-1"], "--jobs must be at least 0, got -1"),
        (["dna/lm", "--params", "1K", "--budget", "9", "--tokens", "0"], "--tokens must be at least 1, got 0"),
        (["dna/lm", "--params", "1K", "--budget", "9", "--ood", "x"], "--ood must be NAME:data.KEY=VALUE"),
        (["dna/lm", "--params", "1K", "--budget", "9", "--ood", "test:data.a=1"], "--ood test: the name is taken"),
        (["dna/lm", "--trainer.max_steps", "5"], "--trainer.max_steps is set by the command itself; use --budget"),
        (["dna/lm", "--model.dropout"], "--model.dropout needs a value"),
        (["dna/lm", "--prams", "1K"], "'--prams' is not accepted. Did you mean --params?"),
        (["dna/lm", "--params", "fit_nano", "--budget", "9", "--model.backbone", "x"], "--params names the backbones"),
        (["--report", "nowhere"], "nowhere/study.json: no such file; a folder of `vertebra scaling` holds study.json"),
        (["dna/lm", "--report", "nowhere"], "--report only reads a folder"),
        (["dna/lm", "--shift", "x"], "--shift must be a number, got 'x'"),
    ],
)
def test_bad_input_is_one_sentence(args, text, capsys):
    assert main(["scaling", *args]) == 2
    err = capsys.readouterr().err
    assert text in err
    assert err.startswith("vertebra: error: ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_options_of_fit_are_checked_before_anything_runs(folder, capsys):
    words = ["-c", "toy.yaml", "--params", "illama_test", "--budget", "2", "-o", "out"]
    assert main(["scaling", *words, "--model.dropuot", "0.1"]) == 2
    assert "Did you mean --model.dropout?" in capsys.readouterr().err
    assert main(["scaling", *words[:3], "ilama_test", *words[4:]]) == 2
    assert "unknown backbone 'ilama_test'. Did you mean 'illama_test'" in capsys.readouterr().err
    assert main(["scaling", *words, "--jobs", "0", "--trainer.devices", "2"]) == 2
    assert "--jobs 0 trains in this process, on one device" in capsys.readouterr().err
    assert not Path("out").exists()


def test_words_are_sorted():
    own, passed = split_words(
        ["r", "--params", "1K", "--model.a", "1", "--data", "0.1", "--data.path=x", "--trainer.b", "-1", "-c", "f"]
    )
    assert own == ["r", "--params", "1K", "--data", "0.1"]
    assert passed == ["--model.a", "1", "--data.path=x", "--trainer.b", "-1", "-c", "f"]


def test_numbers():
    assert [parse_number(t) for t in ("10", "1e6", "10K", "2.5m", "1B", "tsfm_1k", "1K,x=1")] == [
        10, 1e6, 1e4, 2.5e6, 1e9, None, None,
    ]  # fmt: skip
    assert parse_budget("2K") == (2000, None)
    assert parse_budget("1e14F") == (None, 1e14)
    assert [parse_data(t) for t in ("1", "0.1", "1000", "10K")] == [
        (1.0, None), (0.1, None), (None, 1000), (None, 10_000),
    ]  # fmt: skip
    assert parse_ood(["a:data.path=[x,y],data.h=2", "b:data.path=z"]) == {
        "a": ["--data.path=[x,y]", "--data.h=2"],
        "b": ["--data.path=z"],
    }


@pytest.mark.parametrize(
    ("steps", "evaluations", "planned"),
    [(2000, 10, (2000, 200)), (7, 10, (7, 1)), (1, 5, (1, 1)), (21, 10, (20, 2)), (22, 10, (22, 2)), (26, 10, (26, 2))],
)
def test_the_last_evaluation_is_at_the_end(steps, evaluations, planned):
    assert plan_steps(steps, evaluations) == planned
    assert planned[0] % planned[1] == 0


# ---------------------------------------------------------------- sizes and parts of the data


@pytest.mark.parametrize("name", ["illama_nano", "fit_nano"])
def test_a_family_is_resized(name):
    base = recipe_backbone({"model": {"init_args": {"backbone": f"{name},causal=false"}}})
    config, params = resize(base, 100_000)
    assert params == sum(p.numel() for p in config.build().parameters())
    assert 0.5 < params / 100_000 < 1.5
    assert config.family == base.family
    assert not config.causal


def test_what_cannot_be_resized():
    base = recipe_backbone({"model": {"init_args": {"backbone": "fit_nano"}}})
    with pytest.raises(ConfigError, match=r"no fit of about 10 parameters can be made, the nearest has [\d,]+; ask"):
        resize(base, 10)
    with pytest.raises(ConfigError, match="takes no backbone, so there is nothing to resize"):
        recipe_backbone({"model": {"class_path": "x.Y", "init_args": {}}})
    with pytest.raises(ConfigError, match="is of one size; name backbones after --params"):
        recipe_backbone({"model": {"class_path": "x.Y", "init_args": {"backbone": "timm:resnet18"}}})


def test_parts_of_the_data_lie_in_each_other():
    import torch
    from toys import ToyItems

    from vertebra.cli.scaling_measure import Part, take_part

    items = ToyItems(torch.arange(40.0)[:, None], torch.zeros(40))
    seen = {}
    for data in ("5", "0.25", "20", "1"):
        part = take_part(items, data)
        seen[data] = set(part.fetch(np.arange(len(part.lengths)), 0)["x"].flatten().tolist())
    assert [len(s) for s in seen.values()] == [5, 10, 20, 40]
    assert seen["5"] < seen["0.25"] < seen["20"] < seen["1"]
    assert take_part(items, "1") is items
    assert isinstance(take_part(items, "5"), Part)
    assert seen["5"] != set(range(5)), "not the first ones of the file"
    with pytest.raises(ConfigError, match="--data 41: the training split has 40 items only"):
        take_part(items, "41")


def test_positions_are_counted_by_the_mask(tmp_path):
    import torch

    from vertebra.backbones.base import create_backbone
    from vertebra.cli.scaling_measure import Measure

    class Trainer:
        accumulate_grad_batches, is_global_zero = 2, True

        class strategy:  # noqa: N801
            broadcast = staticmethod(lambda value: value)
            reduce = staticmethod(lambda value, reduce_op: 3 * value)  # three processes

    class Task(torch.nn.Module):
        device = "cpu"

        def __init__(self):
            super().__init__()
            self.model = torch.nn.Module()
            self.model.backbone = create_backbone("illama_test")

    task, measure = Task(), Measure(str(tmp_path), "1")
    x, mask = torch.randn(2, 5, 16), torch.arange(5) < torch.tensor([[3], [5]])
    measure.on_train_start(Trainer, task)
    task.model.backbone(x)  # a validation: not counted
    for _ in range(4):
        measure.on_train_batch_start(Trainer, task, None, 0)
        task.model.backbone(x, mask)
        task.model.backbone(x, mask=mask)
        task.model.backbone.read_last(x)
        measure.on_train_batch_end(Trainer, task, None, None, 0)
    again = Measure(str(tmp_path), "1")
    again.load_state_dict(measure.state_dict())
    again.on_train_end(Trainer, task)
    facts = json.loads((tmp_path / "measured.json").read_text())
    assert facts["tokens"] == 3 * 2 * (8 + 8 + 10)
    assert facts["params"] == 4784
    assert not task.model.backbone.__dict__.get("read_last"), "the backbone is left as it was"
