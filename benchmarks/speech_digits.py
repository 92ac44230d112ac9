"""Spoken digits: word errors of seen and unseen speakers, of strings, and of every backbone.

    python benchmarks/speech_digits.py official --data ../shared/data/speech/fsdd/recordings    # a minute on one core
    python benchmarks/speech_digits.py speakers --data ...
    python benchmarks/speech_digits.py strings --data ...
    python benchmarks/speech_digits.py backbones --data ...

The data are those of the Free Spoken Digit Dataset, four speakers, 8 kHz; takes 0 to 4 are the test set. Every number
is that of a run of ``vertebra fit`` with the packaged recipe and the options printed above the table. A run that is
there already is read, not repeated.

``official``: isolated digits. ``speakers``: each speaker left out in turn, from no augmentation to all of it; the
settings were chosen on pairs: trained on two speakers, read on a third, the fourth never used. ``strings``: digits put
one behind the other with gaps, 1 to 6 in training and 1 to 10 in testing; with ``backbones`` the same for all of them,
and a pass over 16 strings of ten digits, models in turn, front end included; the peak is what such a pass adds to the
memory of the process, weights included.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPEAKERS = ("jackson", "nicolas", "theo", "yweweler")
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
RATE = 8000
Options = dict[str, str]

NONE: Options = {"data.augment": "null", "model.spec_augment": "null", "model.feature_norm": "global"}
SPEED: Options = {**NONE, "data.augment": '{"speed": [0.9, 1.1], "speed_step": 0.02}'}
WARP: Options = {**SPEED, "model.spec_augment": '{"freq_masks": 0, "time_masks": 0, "warp": 0.08}'}
ROUGH = '{"speed": [0.8, 1.2], "pad_seconds": 0.1, "noise_probability": 0.3, "reverb_probability": 0.3}'
STAGES: dict[str, Options] = {
    "no augmentation": NONE,
    "speed": SPEED,
    "+ warp": WARP,
    "+ masks, silence before and behind": {"model.feature_norm": "global"},
    "+ level norm: the recipe": {},
    "utterance norm instead of level": {"model.feature_norm": "utterance"},
    "recipe, more speed, noise, rooms": {"data.augment": ROUGH},
    "level norm alone": {**NONE, "model.feature_norm": "level"},
}
SIZE = "dim=64,depth=3,num_heads=2"
BACKBONES = {
    "E-Branchformer (the recipe)": "",
    "iLLaMA": f"illama_nano,{SIZE},hidden_dim=176,causal=false,dropout=0.1",
    "hybrid, bidirectional": "hybrid_nano,dim=64,depth=3,causal=false,dropout=0.1",
    "hybrid, causal": "hybrid_nano,dim=64,depth=3,causal=true,dropout=0.1",
    "FIT": "fit_nano,dim=64,num_heads=2,group_size=16,causal=false",
    "Axial, time x frequency": "axial_nano,dim=32,depth=3,num_heads=2,causal=false",
}


def fit(recipe: str, run: Path, data: Path, options: Options) -> Path:
    """Train with the command line into a folder, and note the minutes; return the run."""
    latest = run / "speech" / recipe / "latest"
    if (latest / "metrics.json").is_file():
        return latest
    given = {"data.root": str(data), "trainer.enable_progress_bar": "false", **options}
    command = [str(Path(sys.executable).with_name("vertebra")), "fit", f"speech/{recipe}", "--root", str(run)]
    command += [word for key, value in given.items() for word in (f"--{key}", value)]
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode:
        sys.exit(f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    (latest / "minutes").write_text(f"{(time.perf_counter() - start) / 60:.1f}")
    return latest


def metric(run: Path, split: str, name: str = "wer") -> float:
    """One number of a finished run."""
    split_name = {"val": "validation", "test": "test"}[split]
    return float(json.loads((run / "metrics.json").read_text())[split_name][f"{split}/{name}"])


def say(recipe: str, options: Options) -> None:
    """Print the command of a table."""
    print(
        f"vertebra fit speech/{recipe} " + shlex.join(w for k, v in options.items() for w in (f"--{k}", v)), flush=True
    )


# ---------------------------------------------------------------- baseline


def pictures(data: Path) -> tuple[NDArray[np.float64], list[tuple[str, str, int]]]:
    """Log-mel features, resized to 12 frames, (N, 480); digit, speaker and take of each recording."""
    import torch

    from vertebra.domains.speech.audio import read_audio
    from vertebra.domains.speech.frontend import LogMel

    logmel, rows, names = LogMel(RATE, 40), [], []
    for path in sorted(data.glob("*.wav")):
        wave = torch.from_numpy(read_audio(path, RATE))
        features, _ = logmel(wave[None], torch.tensor([len(wave)]))
        rows.append(torch.nn.functional.interpolate(features.mT, 12, mode="linear")[0].flatten().double().numpy())
        digit, speaker, take = path.stem.split("_")
        names.append((digit, speaker, int(take)))
    return np.stack(rows), names


def baseline(x: NDArray[np.float64], digits: NDArray[np.str_], test: NDArray[np.bool_]) -> float:
    """Share of errors of a logistic regression."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=2000))
    return 1 - float(model.fit(x[~test], digits[~test]).score(x[test], digits[test]))


# ---------------------------------------------------------------- the tables


def official(args: argparse.Namespace) -> None:
    """Isolated digits of speakers seen in training."""
    x, names = pictures(args.data)
    error = baseline(x, np.array([n[0] for n in names]), np.array([n[2] < 5 for n in names]))
    run = fit("digits", args.runs / "official", args.data, {})
    say("digits", {})
    print("\n| isolated digits, official split | val WER | test WER |\n| --- | ---: | ---: |")
    print(f"| logistic regression, 40 mel x 12 frames | | {error:.1%} |")
    print(
        f"| speech/digits, {(run / 'minutes').read_text()} min | {metric(run, 'val'):.1%} | {metric(run, 'test'):.1%} |"
    )


def speakers(args: argparse.Namespace) -> None:
    """Each speaker left out in turn."""
    x, names = pictures(args.data)
    digits, spoken = np.array([n[0] for n in names]), np.array([n[1] for n in names])
    level = x - x.max(1, keepdims=True)
    table = {
        "logistic regression": [baseline(x, digits, spoken == s) for s in SPEAKERS],
        "logistic regression, level norm": [baseline(level, digits, spoken == s) for s in SPEAKERS],
    }
    for number, (stage, options) in enumerate(STAGES.items()):
        if args.only and str(number) not in args.only:
            continue
        table[stage] = []
        for speaker in SPEAKERS:
            every = {**options, "data.test_speakers": json.dumps([speaker])}
            table[stage].append(
                metric(fit("digits", args.runs / f"speaker-{number}-{speaker}", args.data, every), "test")
            )
        say("digits", {**options, "data.test_speakers": "[NAME]"})
    print(f"\n| WER on the speaker who was left out | {' | '.join(SPEAKERS)} | mean |\n| --- |{' ---: |' * 5}")
    for stage, errors in table.items():
        print(f"| {stage} | {' | '.join(f'{e:.1%}' for e in errors)} | {np.mean(errors):.1%} |")


def by_length(run: Path) -> dict[int, tuple[int, float]]:
    """Number of strings and word error rate by the length of the reference."""
    from torchmetrics.text import WordErrorRate

    rows: dict[int, list[tuple[str, str]]] = defaultdict(list)
    with (run / "test_transcripts.csv").open(encoding="utf-8") as f:
        for row in csv.DictReader(f):
            rows[len(row["reference"].split())].append((row["hypothesis"], row["reference"]))
    found = {}
    for length, pairs in sorted(rows.items()):
        hypotheses, references = zip(*pairs, strict=True)
        found[length] = len(pairs), float(WordErrorRate()(list(hypotheses), list(references)))
    return found


def strings(args: argparse.Namespace) -> None:
    """Strings of test takes, by length."""
    run = fit("strings", args.runs / "strings", args.data, {})
    say("strings", {})
    found = by_length(run)
    print(
        f"\nWER of all: val {metric(run, 'val'):.2%}, test {metric(run, 'test'):.2%}; isolated digits of the test set "
    )
    print(f"{isolated(run, args.data):.2%}; {(run / 'minutes').read_text()} min\n")
    print(f"| digits | {' | '.join(map(str, found))} |\n| --- |{' ---: |' * len(found)}")
    print(f"| strings | {' | '.join(str(n) for n, _ in found.values())} |")
    print(f"| WER | {' | '.join(f'{e:.1%}' for _, e in found.values())} |")


def isolated(run: Path, data: Path) -> float:
    """Word error rate of a model on the single digits of the test set."""
    import torch
    from torchmetrics.text import WordErrorRate

    from vertebra.domains.speech.audio import read_audio
    from vertebra.domains.speech.decoding import greedy

    model, tokenizer = load(run)
    said, meant = [], []
    with torch.no_grad():
        for path in sorted(data.glob("*_[0-4].wav")):
            wave = torch.from_numpy(read_audio(path, RATE))
            log_probs, counts = model(wave[None], torch.tensor([len(wave)]))
            said.append(tokenizer.decode(greedy(log_probs, counts)[0].ids))
            meant.append(WORDS[int(path.stem[0])])
    return float(WordErrorRate()(said, meant))


def load(run: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a run."""
    from vertebra.domains.saving import load_model
    from vertebra.tokenizers.text import make_tokenizer

    model = load_model(run / "model").eval()
    return model, make_tokenizer(model.spec.vocabulary, model.spec.tokens, model.spec.pieces)


def long_batch(data: Path) -> tuple[Any, Any]:
    """Waves (16, N) of ten test digits each, one speaker, with gaps of 0.2 s; and their lengths."""
    import torch

    from vertebra.domains.speech.audio import read_audio

    waves = []
    for number in range(16):
        speaker, take = SPEAKERS[number % 4], number // 4
        parts = [read_audio(data / f"{d}_{speaker}_{take}.wav", RATE) for d in range(10)]
        waves.append(torch.from_numpy(np.concatenate([np.pad(p, (0, RATE // 5)) for p in parts])))
    lengths = torch.tensor([len(w) for w in waves])
    return torch.nn.utils.rnn.pad_sequence(waves, batch_first=True), lengths


def speeds(runs: dict[str, Path], data: Path) -> dict[str, tuple[int, float]]:
    """Parameters, and seconds of audio a second on one thread, by name."""
    import torch

    torch.set_num_threads(1)
    models = {name: load(run)[0] for name, run in runs.items()}
    waves, lengths = long_batch(data)
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(12):
            for name, model in models.items():
                start = time.perf_counter()
                model(waves, lengths)
                times[name].append(time.perf_counter() - start)
    seconds = float(lengths.sum()) / RATE
    return {
        name: (sum(p.numel() for p in model.parameters()), seconds / statistics.median(times[name][2:]))
        for name, model in models.items()
    }


def memory(args: argparse.Namespace) -> None:
    """Print the MiB that a model and one pass add to the peak of this process."""
    import torch

    torch.set_num_threads(1)
    import vertebra.domains.saving
    import vertebra.domains.speech.model  # noqa: F401

    waves, lengths = long_batch(args.data)
    torch.nn.Linear(4, 4)(
        torch.stft(torch.zeros(512), 256, window=torch.ones(256), return_complex=True).real[:4, :4]
    )  # what loads lazily
    Path("/proc/self/clear_refs").write_text("5")  # begin the peak anew; Linux
    before = peak_mib()
    model, _ = load(args.run)
    with torch.no_grad():
        model(waves, lengths)
    print(peak_mib() - before)


def peak_mib() -> float:
    """Most memory that this process had."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def backbones(args: argparse.Namespace) -> None:
    """One recipe, every backbone."""
    runs = {}
    for name, word in BACKBONES.items():
        if args.only and word and not any(part in word for part in args.only):
            continue
        family, kind = word.partition("_")[0], "-causal" if "causal=true" in word else ""
        place = f"backbone-{family}{kind}" if word else "strings"
        options = {"model.backbone": word} if word else {}
        runs[name] = fit("strings", args.runs / place, args.data, options)
        say("strings", options)
    print("\n| backbone | parameters | val WER | strings of 1-10 | of 7-10 | isolated | minutes | RTFx | peak MiB |")
    print("| --- |" + " ---: |" * 8)
    for name, (size, rate) in speeds(runs, args.data).items():
        run = runs[name]
        command = [sys.executable, "-P", __file__, "memory", "--data", str(args.data), "--run", str(run)]
        peak = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found = by_length(run)
        words = {n: n * count for n, (count, _) in found.items() if n >= 7}
        longer = sum(words[n] * found[n][1] for n in words) / sum(words.values())
        print(
            f"| {name} | {size:,} | {metric(run, 'val'):.1%} | {metric(run, 'test'):.1%} | {longer:.1%} | "
            f"{isolated(run, args.data):.1%} | {(run / 'minutes').read_text()} | {rate:,.0f} | {peak:,.0f} |",
            flush=True,
        )


PARTS = {"official": official, "speakers": speakers, "strings": strings, "backbones": backbones, "memory": memory}


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("--data", type=Path, required=True, help="folder of the wav files")
    parser.add_argument("--runs", type=Path, default=Path("runs/speech-digits"), help="folder for the runs")
    parser.add_argument(
        "--only", nargs="*", help="numbers of stages, for speakers, or parts of the words, for backbones"
    )
    parser.add_argument("--run", type=Path, help="one run, for memory")
    args = parser.parse_args()
    PARTS[args.part](args)


if __name__ == "__main__":
    main()
