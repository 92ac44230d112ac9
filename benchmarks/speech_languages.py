"""Three languages and two tasks in one model, chosen by the prefix: recognition, translation, language identification.

    python benchmarks/speech_languages.py --snr 10 0    # a quarter of an hour on two cores

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
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from torchmetrics.text import SacreBLEUScore, WordErrorRate

from vertebra.domains.speech.audio import read_audio
from vertebra.domains.speech.sample import write_languages
from vertebra.domains.speech.sources import read_source
from vertebra.domains.speech.synthesis import random_voice
from vertebra.domains.speech.utterance import Utterance
from vertebra.pipelines.speech import SpeechPipeline, Transcribe
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


def heard(utterance: Utterance, snr: float | None) -> NDArray[np.float32]:
    """Samples (N,) of a recording, with white noise so many dB below it."""
    wave = read_audio(utterance.path, 8000)
    if snr is None:
        return wave
    noise = np.random.default_rng(crc32(utterance.path.name.encode())).normal(0, 1, len(wave))
    return (wave + noise * wave.std() * 10 ** (-snr / 20)).astype(np.float32)


def say(pipeline: SpeechPipeline, utterances: list[Utterance], snr: float | None) -> list[str]:
    """What a model says of recordings: text, or language."""
    return [str(p.value) for p in pipeline([heard(u, snr) for u in utterances])]


def translation(said: list[str], goals: list[str]) -> list[str]:
    """BLEU and the share without any error, for a table."""
    bleu = float(SacreBLEUScore()(said, [[g] for g in goals]))
    return [f"{100 * bleu:.1f}", f"{sum(map(str.__eq__, said, goals)) / len(goals):.1%}"]


def measure(model: Path, data: Path, split: str, snr: float | None) -> None:
    """Print the table of one split."""

    def said(utterances: list[Utterance], language: str, task: str) -> list[str]:
        return say(Transcribe(model, device="cpu", language=language, task=task), utterances, snr)

    every = [u for u in read_source(str(data)).utterances if u.split == split]
    asr = [u for u in every if u.task == "asr"]
    identified = say(Identify(model, device="cpu"), asr, snr)
    found = dict(zip((u.id for u in asr), identified, strict=True))
    noise = "without noise" if snr is None else f"with white noise {snr:g} dB below them"
    print(f"{split}: {len(asr)} recordings {noise}, language given in the prefix, or hidden\n")
    print("| | WER, given | WER, hidden | language right | st_eng BLEU, given | exact | BLEU, hidden | exact |")
    print("| --- |" + " ---: |" * 7)
    goals_of_all, copied = [], []
    for language, name in NAMES.items():
        spoken = [u for u in asr if u.language == language]
        meant = [u.text or "" for u in spoken]
        errors = [float(WordErrorRate()(said(spoken, given, "asr"), meant)) for given in (language, "")]
        right = sum(found[u.id] == language for u in spoken) / len(spoken)
        cells = [*(f"{e:.2%}" for e in errors), f"{right:.1%}"]
        sources = [u for u in every if u.language == language and u.task == "st_eng"]
        goals = [u.translation for u in sources]
        for given in (language, "") if sources else ():
            cells += translation(said(sources, given, "st_eng"), goals)
        goals_of_all += goals
        copied += [u.text or "" for u in sources]
        print(f"| {name} | {' | '.join([*cells, *[''] * (7 - len(cells))])} |")
    (most, count) = Counter(u.language for u in asr).most_common(1)[0]
    cells = ["", "", f"{count / len(asr):.1%}", *translation(copied, goals_of_all), "", ""]
    print(f"| baselines: always {NAMES[most]}; the words as they are | {' | '.join(cells)} |\n", flush=True)


def main() -> None:
    """Fabricate, train, measure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/speech-languages"), help="folder for data and runs")
    parser.add_argument("--seed", type=int, default=1, help="seed of the data")
    parser.add_argument("--model", type=Path, help="a model to measure, in place of training one")
    parser.add_argument("--data", type=Path, help="a languages.jsonl to measure it on, in place of fabricated data")
    parser.add_argument("--split", default="test", help="what to measure on")
    parser.add_argument("--snr", type=float, nargs="*", default=[], help="also with white noise so many dB below")
    args, options = parser.parse_known_args()
    data = args.data or fabricate(args.runs / "data", args.seed)
    model = args.model or fit(args.runs, data, options)
    for snr in (None, *args.snr):
        measure(model, data, args.split, snr)


if __name__ == "__main__":
    main()
