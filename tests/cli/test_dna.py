"""The real classes of a domain through the command line."""

import csv
import json
import random
from pathlib import Path

import pytest

from vertebra.cli import main
from vertebra.cli.recipes import recipes

pytestmark = pytest.mark.slow

FAST = ["--model.backbone=hybrid_test", "--trainer.max_steps=4", "--trainer.accelerator=cpu"]
FAST += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]


@pytest.fixture
def sequences(tmp_path, monkeypatch):
    """A working folder with ``pos.fa`` and ``neg.fa``: 40 records each, those of the first with a TATA box."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for name, box in (("pos", "TATAAAAG"), ("neg", "")):
        made = ["".join(rng.choices("ACGT", k=60)) for _ in range(40)]
        Path(f"{name}.fa").write_text("".join(f">{name}{i}\n{s[:20]}{box}{s[28:]}\n" for i, s in enumerate(made)))
    return tmp_path


def test_classes_by_short_name_train_test_and_predict(sequences, capsys):
    data = ["--data", "DNASequenceData", "--data.positives", "pos.fa", "--data.negatives", "neg.fa"]
    assert main(["fit", "--model", "DNAClassificationTask", *FAST, *data]) == 0
    run = Path("runs/DNAClassificationTask/1")
    model = json.loads((run / "model/config.json").read_text())
    assert model["task"] == "dna/classify"
    assert model["backbone"]["family"] == "hybrid"
    assert main(["test", "--ckpt_path", str(run), "-o", "numbers.json"]) == 0
    numbers = json.loads(Path("numbers.json").read_text())
    assert numbers == json.loads((run / "metrics.json").read_text())["test"]
    assert main(["predict", "--ckpt_path", str(run), "--data.predict_file", "neg.fa", "-o", "p.csv"]) == 0
    with Path("p.csv").open(newline="") as f:
        assert [row["name"] for row in csv.DictReader(f)] == [f"neg{i}" for i in range(40)]
    capsys.readouterr()
    assert main(["info", str(run / "model")]) == 0
    assert "DNAClassifier" in capsys.readouterr().out


@pytest.mark.skipif("dna/promoter" not in recipes(), reason="the recipe dna/promoter is not packaged")
def test_recipe_runs_on_other_files_by_their_paths_alone(sequences):
    assert main(["fit", "dna/promoter", "--data.positives=pos.fa", "--data.negatives=neg.fa", *FAST]) == 0
    assert (sequences / "runs/dna/promoter/latest/report.html").is_file()
    assert main(["test", "--ckpt_path", "runs/dna/promoter/latest"]) == 0
