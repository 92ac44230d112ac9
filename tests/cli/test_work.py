import argparse
from pathlib import Path
from typing import ClassVar

import pytest

from vertebra.cli import main
from vertebra.pipelines.base import RunResult
from vertebra.pipelines.catalog import PipelineInfo


class ToyPipeline:
    """Stands in for a pipeline: fails on what is called bad."""

    calls: ClassVar[list[dict]] = []

    def __init__(self, model=None, window=3):
        self.model, self.window = model, window

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--model")
        parser.add_argument("--window", type=int, default=3)

    @classmethod
    def from_args(cls, args):
        return cls(args.model, args.window)

    def run(self, inputs, output, *, progress=True):
        ToyPipeline.calls.append({"model": self.model, "window": self.window, "inputs": inputs, "progress": progress})
        bad = sum("bad" in name for name in inputs)
        return RunResult(len(inputs) - bad, bad, [Path(output)] + [Path(output + ".errors.jsonl")] * (bad > 0))


@pytest.fixture
def toy_pipeline(monkeypatch):
    info = PipelineInfo("toy/run", "Run a toy", "toys", "CSV", "", (), "toys", "ToyPipeline")
    monkeypatch.setattr("vertebra.cli.work.pipelines", lambda: {"toy/run": info})
    monkeypatch.setattr("vertebra.pipelines.base.pipeline_class", lambda name: ToyPipeline)
    ToyPipeline.calls.clear()
    return ToyPipeline.calls


def test_run_hands_inputs_and_options_to_the_pipeline(toy_pipeline, capsys):
    assert main(["run", "toy/run", "a", "b", "-o", "out.csv", "--model", "m", "--window", "5"]) == 0
    assert toy_pipeline == [{"model": "m", "window": 5, "inputs": ["a", "b"], "progress": True}]
    assert capsys.readouterr().out == "2 records done; wrote out.csv\n"


def test_run_has_status_3_when_records_were_bad(toy_pipeline, capsys):
    assert main(["run", "toy/run", "a", "bad", "-o", "out.csv", "--quiet"]) == 3
    assert "1 bad (listed in out.csv.errors.jsonl)" in capsys.readouterr().out


def test_run_errors_and_help(toy_pipeline, capsys):
    assert main(["run", "toy/run", "a", "-o", "out.csv", "--windw", "5"]) == 2
    err = capsys.readouterr().err
    assert err.startswith(
        "vertebra: error: run toy/run: '--windw' is not accepted. Did you mean --window? See: vertebra run"
    )
    assert main(["run", "toy/run", "a"]) == 2
    assert "the following arguments are required: -o/--output" in capsys.readouterr().err
    assert main(["run", "toy/run", "--help"]) == 0
    assert "--window" in capsys.readouterr().out
    assert main(["run"]) == 0
    assert "toy/run" in capsys.readouterr().out


def test_sample_sums_up_folders_of_many_files(tmp_path, capsys):
    assert main(["sample", "vision", "-o", str(tmp_path / "v")]) == 0
    out = capsys.readouterr().out
    assert f"  {tmp_path / 'v' / 'shapes' / 'star'}/  200 files, " in out
    assert f"  {tmp_path / 'v' / 'top_half.png'}  " in out
    assert len(out.splitlines()) < 40
