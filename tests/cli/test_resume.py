import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vertebra.cli import main

pytestmark = pytest.mark.slow


def interrupt_at(monkeypatch, step, signum=signal.SIGINT):
    import toys

    original = toys.ToyTask.training_step

    def training_step(self, batch, batch_idx):
        if self.global_step == step:
            os.kill(os.getpid(), signum)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(toys.ToyTask, "training_step", training_step)


@pytest.mark.parametrize("step", [1, 3, 5, 6])
def test_interrupted_fit_resumes_exactly(finished, tmp_path, monkeypatch, capsys, same_weights, step):
    with monkeypatch.context() as patch:
        interrupt_at(patch, step)
        assert main(["fit", "toy/points", "--root", str(tmp_path)]) == 130
    run = tmp_path / "toy/points/1"
    err = capsys.readouterr().err
    assert f"interrupted; the state is in {run}/checkpoints/last.ckpt" in err
    assert f"vertebra fit toy/points --ckpt_path {run}" in err
    assert not (run / "metrics.json").exists()
    assert main(["fit", "toy/points", "--ckpt_path", str(run)]) == 0
    assert sorted(p.name for p in run.parent.iterdir()) == ["1", "latest"]
    for name in ("last.ckpt", "best.ckpt"):
        assert same_weights(run / "checkpoints" / name, f"runs/toy/points/1/checkpoints/{name}")
    assert (run / "metrics.csv").read_text() == Path("runs/toy/points/1/metrics.csv").read_text()


def test_sigterm_saves_too(project, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(patch, 2, signal.SIGTERM)
        assert main(["fit", "toy/points"]) == 143
    assert torch.load("runs/toy/points/1/checkpoints/last.ckpt", weights_only=True)["global_step"] == 3


def test_two_and_two_steps_equal_four(project, same_weights):
    rest = ["--trainer.max_epochs=-1", "--model.dropout=0.3"]
    assert main(["fit", "toy/points", *rest, "--trainer.max_steps=7", "--root", "whole"]) == 0
    assert main(["fit", "toy/points", *rest, "--trainer.max_steps=2", "--root", "parts"]) == 0
    run = Path("parts/toy/points/latest")
    own = ["--model", "toys.ToyTask"]  # a class of one's own is named; the run folder tells the rest
    assert main(["fit", *own, "--ckpt_path", str(run), "--trainer.max_steps=5"]) == 0
    assert main(["fit", *own, "--ckpt_path", str(run / "checkpoints/last.ckpt"), "--trainer.max_steps=7"]) == 0
    assert same_weights(run / "checkpoints/last.ckpt", "whole/toy/points/1/checkpoints/last.ckpt")
    assert os.readlink(run) == "1"


def test_root_with_a_checkpoint_begins_a_new_folder(finished, tmp_path):
    words = ["--ckpt_path", "runs/toy/points/1", "--root", str(tmp_path), "--trainer.max_epochs", "3"]
    assert main(["fit", "toy/points", *words]) == 0
    assert (tmp_path / "toy/points/1/checkpoints/last.ckpt").is_file()


def test_checkpoint_loads_without_pickle_and_describes_itself(finished):
    checkpoint = torch.load("runs/toy/points/1/checkpoints/best.ckpt", weights_only=True)
    assert checkpoint["class_path"] == "toys.ToyTask"
    assert checkpoint["data"]["class_path"] == "toys.ToyData"
    assert checkpoint["hyper_parameters"]["backbone"]["family"] == "illama"


def in_a_process(*words, **environment):
    """Run the command line in a process of its own."""
    script = Path(__file__).with_name("toy_process.py")
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, script, *words], capture_output=True, text=True, env=env, check=False)


def test_killed_fit_resumes_to_the_same_weights(finished, tmp_path, same_weights):
    done = in_a_process("fit", "-c", "toy.yaml", "--root", str(tmp_path), TOY_KILL_AT="6")
    assert done.returncode == -signal.SIGKILL
    run = tmp_path / "toy/1"
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert main(["fit", "-c", "toy.yaml", "--ckpt_path", str(run)]) == 0
    assert same_weights(run / "checkpoints/last.ckpt", "runs/toy/points/1/checkpoints/last.ckpt")
    assert (run / "metrics.csv").read_text() == Path("runs/toy/points/1/metrics.csv").read_text()


def test_two_processes_share_a_run_folder_and_train_as_one(project, same_weights):
    rest = ["-c", "toy.yaml", "--model.dropout=0", "--trainer.max_epochs=1"]
    rest += ["--model.optimizer.eps=1e-5"]  # with 1e-8 Adam makes whole steps of the rounding of gradients near 0
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=2"]
    done = in_a_process("fit", *rest, *two, "--root", "two")
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in Path("two/toy").iterdir()) == ["1", "latest"]
    assert (Path("two/toy/1") / "model" / "model.safetensors").is_file()
    assert main(["fit", *rest, "--root", "one"]) == 0
    a, b = (torch.load(f"{n}/toy/1/checkpoints/last.ckpt", weights_only=True) for n in ("one", "two"))
    assert len(b["random"]) == 2
    for name, tensor in a["state_dict"].items():
        torch.testing.assert_close(b["state_dict"][name], tensor, rtol=1e-4, atol=1e-5)
