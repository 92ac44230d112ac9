"""What domains share, shown on DNA: several processes, resuming inside an epoch, predictions."""

import csv
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from vertebra.domains.base import PredictionWriter, load_task
from vertebra.domains.dna.data import DNALanguageData, DNASequenceData
from vertebra.domains.dna.task import DNAClassificationTask, DNALanguageTask
from vertebra.errors import ConfigError, LoadError

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def letters(rng, length):
    return "".join(rng.choice(list("ACGT"), length))


def write_table(path, count, seed):
    rng = np.random.default_rng(seed)
    rows = [f"s{i},{letters(rng, int(rng.integers(12, 40)))},{i % 2}" for i in range(count)]
    path.write_text("name,sequence,label\n" + "\n".join(rows) + "\n")
    return str(path)


@pytest.fixture
def folder(tmp_path):
    write_table(tmp_path / "train.csv", 32, 0)
    write_table(tmp_path / "val.csv", 9, 1)
    return tmp_path


# ---------------------------------------------------------------- several processes


def results(out):
    with (out / "predictions.csv").open() as f:
        rows = list(csv.DictReader(f))
    return json.loads((out / "numbers.json").read_text()), torch.load(out / "weights.pt"), rows


@pytest.mark.slow
def test_two_processes_reproduce_the_numbers_of_one(folder, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import ddp_process

    ddp_process.prepare(folder)
    kinds = [kind for kind in ddp_process.TUNES if kind != "adapters" or find_spec("peft")]
    command = [sys.executable, ddp_process.__file__, str(folder), "2", *kinds]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    for kind in ("", *kinds):
        ddp_process.run(folder, 1, kind)
        (numbers, weights, rows), (numbers2, weights2, rows2) = (
            results(folder / (f"{count}-{kind}" if kind else count)) for count in "12"
        )
        assert {"val/loss", "val/mcc", "test/loss", "test/mcc", "test/auroc"} <= numbers.keys()
        for name in numbers:
            if not name.startswith("train/"):  # of the last batch, on rank 0
                assert numbers2[name] == pytest.approx(numbers[name], abs=1e-4), (kind, name)
        for name, tensor in weights.items():
            torch.testing.assert_close(weights2[name], tensor, atol=1e-4, rtol=1e-3, msg=f"{kind}: {name}")
        assert [r["name"] for r in rows] == [r["name"] for r in rows2] == [f"s{i}" for i in range(9)]
        for one, two in zip(rows, rows2, strict=True):
            assert float(two["score_1"]) == pytest.approx(float(one["score_1"]), abs=1e-4)


# ---------------------------------------------------------------- resuming


class Stop(pl.Callback):
    """Save in the middle of an epoch, as an interrupted run does."""

    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Losses(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((batch["index"].tolist(), round(outputs["loss"].item(), 6)))


def classification(folder):
    data = DNASequenceData(
        file=str(folder / "train.csv"),
        val_file=str(folder / "val.csv"),
        reverse_complement=0.5,
        crop="random",
        max_length=20,
        max_tokens=100,
    )
    return DNAClassificationTask("illama_test", dropout=0.0), data


def masked_language(folder):
    rng = np.random.default_rng(0)
    (folder / "g.fa").write_text("".join(f">r{i}\n{letters(rng, n)}\n" for i, n in enumerate((300, 20, 30, 400))))
    data = DNALanguageData(str(folder / "g.fa"), val=["r1"], test=0.0, length=32, batch_size=4)
    return DNALanguageTask("illama_test,causal=false"), data


@pytest.mark.parametrize("make", [classification, masked_language])
@pytest.mark.parametrize("step", [3, 8])
def test_a_run_resumed_inside_an_epoch_goes_on_exactly(make, step, folder):
    path = folder / "stop.ckpt"
    torch.manual_seed(0)
    task, data = make(folder)
    whole = Losses()
    trainer = pl.Trainer(max_epochs=3, callbacks=[whole, Stop(step, path)], enable_checkpointing=False, **QUIET)
    trainer.fit(task, datamodule=data)
    again, data = make(folder)
    rest = Losses()
    trainer = pl.Trainer(max_epochs=3, callbacks=[rest], enable_checkpointing=False, **QUIET)
    trainer.fit(again, datamodule=data, ckpt_path=path, weights_only=True)
    assert len(whole.seen) > step
    assert rest.seen == whole.seen[step:]
    for a, b in zip(task.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------- predictions and errors


def test_a_checkpoint_alone_predicts_in_the_order_of_the_file(folder):
    task, data = classification(folder)
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(folder / "x.ckpt")
    writer = PredictionWriter(folder / "out" / "p.csv")
    only = DNASequenceData(predict_file=str(folder / "val.csv"), batch_size=4)
    trainer = pl.Trainer(callbacks=[writer], **QUIET)
    trainer.predict(load_task(folder / "x.ckpt"), datamodule=only)
    with writer.path.open() as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["name", "prediction", "score_0", "score_1"]
    assert [r["name"] for r in rows] == [f"s{i}" for i in range(9)]
    assert [p.name for p in writer.path.parent.iterdir()] == ["p.csv"]


def test_other_data_than_the_checkpoint_is_refused(folder):
    task, data = classification(folder)
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, datamodule=data)
    checkpoint = {"spec": {**task.model.spec.to_dict(), "max_length": 99}}
    with pytest.raises(
        ConfigError, match=r"must agree, got max_length: 99 and 20 \(checkpoint and data\); use the data"
    ):
        task.on_load_checkpoint(checkpoint)


def test_spec_before_setup_is_an_error(folder):
    _, data = classification(folder)
    with pytest.raises(ConfigError, match=r"DNASequenceData: spec is known after setup; call setup\('fit'\) first"):
        _ = data.spec


def test_a_task_without_a_data_module_is_an_error(folder):
    task, data = classification(folder)
    data.setup("fit")
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(ConfigError, match="the model is built from the data; give the trainer a datamodule"):
        trainer.fit(task, train_dataloaders=[1], val_dataloaders=[1])


def test_initial_weights_are_needed_for_a_new_run_and_not_for_a_resumed_one(folder):
    task, data = classification(folder)
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    trainer.fit(task, datamodule=data)
    trainer.save_checkpoint(folder / "x.ckpt")
    gone = DNAClassificationTask("illama_test", dropout=0.0, init_from=str(folder / "gone.ckpt"))
    trainer = pl.Trainer(max_steps=2, enable_checkpointing=False, **QUIET)
    trainer.fit(gone, datamodule=data, ckpt_path=folder / "x.ckpt", weights_only=True)
    assert trainer.global_step == 2
    gone = DNAClassificationTask("illama_test", dropout=0.0, init_from=str(folder / "gone.ckpt"))
    with pytest.raises(LoadError, match=r"gone\.ckpt: no such checkpoint file"):
        pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET).fit(gone, datamodule=data)
