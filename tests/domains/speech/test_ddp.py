"""Two processes that train recognition together."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    """A manifest whose one test recording for translation meets one rank alone."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(24):
        sf.write(tmp_path / f"{i}.wav", rng.standard_normal(2400 + 100 * i) / 10, 8000)
        record = {"path": f"{i}.wav", "text": ("ab", "ba", "abb")[i % 3], "lang": "eng"}
        record["split"] = "train" if i < 16 else ("val", "test")[i % 2]
        if i in (3, 7, 19):
            record |= {"task": "st_deu", "translation": "bab ab"}
        lines.append(json.dumps(record))
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    return tmp_path


def results(folder):
    found = json.loads((folder / "numbers.json").read_text())
    with (folder / "test_transcripts.csv").open() as f:
        said = [(r["name"], r["reference"], r["hypothesis"]) for r in csv.DictReader(f)]
    return found["numbers"], found["sizes"], said


def test_two_processes_reproduce_the_numbers_of_one(folder, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)
    import ddp_speech_process

    command = [sys.executable, ddp_speech_process.__file__, str(folder), "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    ddp_speech_process.run(folder, 1)
    (one, _, said), (two, _, said2) = (results(folder / name) for name in "12")
    assert {"val/wer", "test/wer", "test/bleu", "test/language_accuracy"} <= one.keys()
    assert "val/bleu" not in one
    assert two.keys() == one.keys()
    for name, value in one.items():
        if not name.startswith("train/"):  # of the last batch, on rank 0
            assert two[name] == pytest.approx(value, abs=1e-3), name
    assert said == said2
    assert len(said) == 4
    _, sizes, _ = results(folder / "2-fits")
    assert len(sizes) > 1
    assert max(sizes) > 4
