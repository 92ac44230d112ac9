"""Three languages and two tasks in one model, chosen by the prefix: recognition, translation, language identification.

    python benchmarks/speech_languages.py    # ten minutes on two cores

The data are fabricated: strings of one to four digits in English, German and Spanish, of 240 voices for training, 30
others for validation and 40 others for testing, all drawn at random. The recipe was chosen on validation alone. Texts
are those of ``vertebra run speech/transcribe``; the language is what ``vertebra run speech/identify`` says, which does
not know it. A run that is there already is read, not repeated; options of ``vertebra fit`` are passed on.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from torchmetrics.text import SacreBLEUScore, WordErrorRate

from vertebra.domains.speech.sample import write_languages
from vertebra.domains.speech.sources import read_source
from vertebra.domains.speech.synthesis import random_voice
from vertebra.domains.speech.utterance import Utterance
from vertebra.pipelines.speech import Transcribe
from vertebra.pipelines.speech_identify import Identify

VOICES = {"train": 240, "val": 30, "test": 40}
STRINGS = 5  # of a voice in each language
NAMES = {"eng": "English", "deu": "German", "spa": "Spanish"}


def fabricate(folder: Path, seed: int) -> Path:
    """Write the recordings, unless they are there; return their list."""
    listed = folder / "languages.jsonl"
    if not listed.is_file():
        starts = {"train": 0, "val": 10_000, "test": 20_000}
        voices = {
            split: [random_voice(f"{split}{n}", (seed, starts[split] + n)) for n in range(count)]
            for split, count in VOICES.items()
        }
        write_languages(folder, voices, STRINGS, seed)
    return listed


def fit(runs: Path, data: Path, options: list[str]) -> Path:
    """Train with the command line, unless that was done; return the model."""
    latest = runs / "speech" / "multitask" / "latest"
    command = [str(Path(sys.executable).with_name("vertebra")), "fit", "speech/multitask", "--root", str(runs)]
    command += ["--data.root", str(data), "--trainer.enable_progress_bar", "false", *options]
    if not (latest / "metrics.json").is_file():
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        if done.returncode:
            sys.exit(f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        (latest / "minutes").write_text(f"{(time.perf_counter() - start) / 60:.1f}")
    print(f"{shlex.join(['vertebra', *command[1:]])}\n{(latest / 'minutes').read_text()} minutes\n")
    return latest / "model"


def texts(model: Path, utterances: list[Utterance], language: str, task: str) -> list[str]:
    """What the model says of recordings."""
    pipeline = Transcribe(model, device="cpu", language=language, task=task)
    return [p.value for p in pipeline([u.path for u in utterances])]


def measure(model: Path, data: Path, split: str) -> None:
    """Print the table of one split."""
    every = [u for u in read_source(str(data)).utterances if u.split == split]
    asr, translated = [u for u in every if u.task == "asr"], [u for u in every if u.task == "st_eng"]
    said = [p.value for p in Identify(model, device="cpu")([u.path for u in asr])]
    most = Counter(u.language for u in asr).most_common(1)[0][0]
    print(
        f"| {split} | recordings | WER, language given | hidden | language right | (always {NAMES[most]}) "
        "| BLEU of st_eng | exact | (words copied) |\n| --- |" + " ---: |" * 8
    )
    for language, name in NAMES.items():
        spoken = [u for u in asr if u.language == language]
        meant = [u.text or "" for u in spoken]
        errors = [float(WordErrorRate()(texts(model, spoken, given, "asr"), meant)) for given in (language, "")]
        pairs = zip(asr, said, strict=True)
        right = [float(found == language) for u, found in pairs if u.language == language]
        cells = [str(len(spoken)), *(f"{e:.2%}" for e in errors), f"{sum(right) / len(right):.1%}"]
        cells.append(f"{float(language == most):.0%}")
        sources = [u for u in translated if u.language == language]
        if sources:
            goals = [u.translation for u in sources]
            found = texts(model, sources, language, "st_eng")
            bleu = float(SacreBLEUScore()(found, [[g] for g in goals]))
            exact = sum(f == g for f, g in zip(found, goals, strict=True)) / len(goals)
            copied = sum(u.text == u.translation for u in sources) / len(goals)
            cells += [f"{100 * bleu:.1f}", f"{exact:.1%}", f"{copied:.0%}"]
        else:
            cells += ["", "", ""]
        print(f"| {name} | {' | '.join(cells)} |")
    print(flush=True)


def main() -> None:
    """Fabricate, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/speech-languages"), help="folder for data and runs")
    parser.add_argument("--seed", type=int, default=1, help="seed of the data")
    parser.add_argument("--model", type=Path, help="a model to measure, in place of training one")
    parser.add_argument("--data", type=Path, help="a languages.jsonl to measure it on, in place of fabricated data")
    parser.add_argument("--split", default="test", help="what to measure on")
    args, options = parser.parse_known_args()
    data = args.data or fabricate(args.runs / "data", args.seed)
    model = args.model or fit(args.runs, data, options)
    measure(model, data, args.split)


if __name__ == "__main__":
    main()
