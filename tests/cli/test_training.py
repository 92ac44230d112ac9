import json
import os
from pathlib import Path

import pytest
import torch

from vertebra.cli import main

pytestmark = pytest.mark.slow

OWN = ("--model", "toys.ToyTask")  # what a checkpoint names is imported when it is of vertebra, or named


# ---------------------------------------------------------------- run folders


def test_fit_writes_a_run_folder(finished):
    run = finished / "runs" / "toy" / "points" / "1"
    assert (run.parent / "latest").resolve() == run.resolve()
    assert {p.name for p in run.iterdir()} >= {
        "config.yaml", "metrics.csv", "metrics.json", "checkpoints", "model", "figures", "report.html",
    }  # fmt: skip
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {p.name for p in (run / "model").iterdir()} == {"config.json", "model.safetensors", "README.md"}
    assert not list(finished.rglob("lightning_logs"))
    assert not list(finished.rglob("*.partial"))


def test_metrics_hold_final_validation_and_test_numbers_of_the_best(finished, rows_of):
    run = finished / "runs/toy/points/1"
    facts = json.loads((run / "metrics.json").read_text())
    assert facts["validation"].keys() == {"val/loss", "val/acc"}
    assert facts["test"].keys() == {"test/loss", "test/acc"}
    assert facts["monitor"] == "val/acc"
    assert facts["best"]["value"] == facts["validation"]["val/acc"]
    assert facts["seed"] == 0
    assert facts["command"] == "vertebra fit toy/points"
    rows = rows_of(run / "metrics.csv")
    assert [int(r["step"]) for r in rows] == list(range(8))
    assert max(float(r["val/acc"]) for r in rows if r["val/acc"]) == facts["best"]["value"]
    model = json.loads((run / "model" / "config.json").read_text())
    assert model["metrics"] == facts["validation"] | facts["test"]
    assert model["command"] == facts["command"]


def test_report_is_one_file_with_numbers_command_and_curves(finished):
    text = (finished / "runs/toy/points/1/report.html").read_text()
    for part in ("vertebra fit toy/points", "val/acc", "data:image/png;base64", "torch"):
        assert part in text
    assert "http://" not in text.replace("http://www.w3.org", "")


def test_second_run_gets_the_next_number_and_latest_moves(project, capsys):
    for _ in range(2):
        assert main(["fit", "toy/points", "--trainer.max_epochs=1"]) == 0
    parent = project / "runs/toy/points"
    assert sorted(p.name for p in parent.iterdir()) == ["1", "2", "latest"]
    assert os.readlink(parent / "latest") == "2"
    assert "to runs/toy/points/2" in capsys.readouterr().out


def test_same_command_gives_the_same_weights(finished, tmp_path, same_weights):
    assert main(["fit", "toy/points", "--root", str(tmp_path)]) == 0
    assert same_weights(tmp_path / "toy/points/1/checkpoints/last.ckpt", "runs/toy/points/1/checkpoints/last.ckpt")


def test_saved_config_runs_again(finished, tmp_path, same_weights):
    assert main(["fit", "-c", "runs/toy/points/1/config.yaml", "--root", str(tmp_path)]) == 0
    assert same_weights(tmp_path / "config/1/checkpoints/last.ckpt", "runs/toy/points/1/checkpoints/last.ckpt")


def test_run_without_recipe_is_named_after_its_file(project):
    assert main(["fit", "-c", "toy.yaml", "--trainer.max_epochs=1", "--data.with_test=false"]) == 0
    facts = json.loads((project / "runs/toy/1/metrics.json").read_text())
    assert facts["test"] == {}


def test_failing_data_leaves_no_run_folder(project, capsys):
    assert main(["fit", "toy/points", "--data.path", "nix.csv"]) == 2
    assert capsys.readouterr().err == "vertebra: error: nix.csv: no such file; give another --data.path.\n"
    assert not Path("runs").exists()


def test_unwritable_root(project, capsys):
    Path("taken").write_text("")
    assert main(["fit", "toy/points", "--root", "taken"]) == 2
    assert "cannot be made" in capsys.readouterr().err


def test_fast_dev_run_writes_nothing(project, capsys):
    assert main(["fit", "toy/points", "--trainer.fast_dev_run=true"]) == 0
    assert "nothing is written" in capsys.readouterr().out
    assert not Path("runs").exists()


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_alone_is_enough_to_test(finished, tmp_path, capsys):
    run = Path("runs/toy/points/1")
    expected = json.loads((run / "metrics.json").read_text())
    out = tmp_path / "numbers.json"
    before = sorted(finished.rglob("*"))
    for place in ("runs/toy/points/latest", run / "checkpoints" / "best.ckpt", run / "checkpoints"):
        assert main(["test", *OWN, "--ckpt_path", str(place), "-o", str(out)]) == 0
        assert json.loads(out.read_text()) == expected["test"]
    assert main(["validate", *OWN, f"--ckpt_path={run}", "-o", str(out)]) == 0
    assert json.loads(out.read_text()) == expected["validation"]
    assert sorted(finished.rglob("*")) == before, "evaluating must not litter"
    assert f"wrote 2 numbers to {out}" in capsys.readouterr().out


def test_checkpoint_alone_is_enough_to_predict(finished, tmp_path, capsys, rows_of):
    out = tmp_path / "p.csv"
    assert main(["predict", *OWN, "--ckpt_path", "runs/toy/points/latest", "-o", str(out)]) == 0
    rows = rows_of(out)
    assert [r["name"] for r in rows] == [f"p{i}" for i in range(32)]
    assert all(0 <= float(r["b"]) <= 1 for r in rows)
    assert f"wrote 32 predictions to {out}" in capsys.readouterr().out


def test_other_data_than_the_checkpoints(finished, tmp_path, rows_of):
    few = tmp_path / "few.csv"
    few.write_text("".join(Path("points.csv").read_text().splitlines(keepends=True)[:6]))
    out = tmp_path / "p.csv"
    words = ["--ckpt_path=runs/toy/points/latest", "--data.path", str(few), "-o", str(out)]
    assert main(["predict", *OWN, *words]) == 0
    assert len(rows_of(out)) == 6


def test_another_class_than_the_checkpoints_is_refused(finished, capsys):
    for words in (["--model", "OtherTask"], ["--model=toys.OtherTask"], ["--model.class_path", "OtherTask"]):
        for verb in ("test", "fit"):
            assert main([verb, *words, "--ckpt_path", "runs/toy/points/latest"]) == 2
            err = capsys.readouterr().err
            assert "holds a ToyTask, but the model asked for is OtherTask" in err
            assert "--model.init_from" in err


def test_another_class_in_a_file_is_refused(finished, tmp_path, capsys):
    other = tmp_path / "other.yaml"
    other.write_text("model: {class_path: toys.OtherTask}\n")
    assert main(["test", "-c", str(other), "--ckpt_path", "runs/toy/points/latest"]) == 2
    assert "holds a ToyTask, but the model asked for is OtherTask" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: None, "--ckpt_path: no file or run folder"),
        (lambda p: p.mkdir(), "holds no checkpoint; a run folder has checkpoints/last.ckpt"),
        (lambda p: p.write_bytes(b""), "not a readable checkpoint"),
        (lambda p: p.write_bytes(b"PK\x03\x04 cut"), "not a readable checkpoint"),
        (lambda p: torch.save({"weights": 1}, p), "must hold a Lightning checkpoint"),
        (lambda p: torch.save({"state_dict": Path("x")}, p), "not a readable checkpoint"),
    ],
)
def test_bad_checkpoints(project, capsys, make, text):
    path = project / "bad"
    make(path)
    assert main(["test", "toy/points", "--ckpt_path", str(path)]) == 2
    assert text in capsys.readouterr().err


def test_model_directory_is_no_checkpoint(finished, capsys):
    assert main(["test", "--ckpt_path", "runs/toy/points/1/model"]) == 2
    err = capsys.readouterr().err
    assert "is a model directory" in err
    assert "--model.init_from runs/toy/points/1/model" in err


def test_test_without_weights_is_refused(project, capsys):
    assert main(["test", "toy/points"]) == 2
    assert "test: the weights are missing; give --ckpt_path X" in capsys.readouterr().err


def test_info_of_a_run_folder_and_a_checkpoint(finished, capsys):
    assert main(["info", "runs/toy/points/latest"]) == 0
    out = capsys.readouterr().out
    assert "best.ckpt  last.ckpt" in out
    assert "toy/classify" in out
    assert main(["info", "runs/toy/points/1/checkpoints/last.ckpt"]) == 0
    out = capsys.readouterr().out
    assert "toys.ToyTask" in out
    assert "vertebra test --ckpt_path" in out


def test_backbone_of_the_checkpoint_may_be_changed_but_must_fit(finished, capsys):
    assert main(["test", *OWN, "--ckpt_path", "runs/toy/points/1", "--model.backbone", "hybrid_test"]) == 2
    err = capsys.readouterr().err
    assert "its weights do not fit the model as it is set up" in err
    assert err.count("\n") == 1


def test_place_of_the_link_taken_is_no_obstacle(project, capsys):
    Path("runs/toy/points/latest/x").mkdir(parents=True)
    assert main(["fit", "toy/points", "--trainer.max_epochs=1"]) == 0
    assert "no link runs/toy/points/latest was made" in capsys.readouterr().out
    assert sorted(p.name for p in Path("runs/toy/points").iterdir()) == ["1", "latest"]
