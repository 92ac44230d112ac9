"""Long recordings: windows in batches beside one at a time, memory over the length, and streaming.

    python benchmarks/speech_long.py windows --data ../shared/data/speech/fsdd/recordings --model MODEL
        --window 8 --context 1.5
    python benchmarks/speech_long.py stream --data ../shared/data/speech/fsdd/recordings --model CAUSAL_MODEL

The recordings are spoken digits of the Free Spoken Digit Dataset, one behind the other with gaps of 0.1 to 1 s, drawn
with a fixed seed. The models are those that these commands write (two minutes each on an idle core):

    vertebra fit speech/digits --data.root DATA --data.concatenate '{items: [1,6]}' --trainer.max_epochs 25
    vertebra fit speech/digits --data.root DATA --data.concatenate '{items: [1,6]}' --trainer.max_epochs 12
        --model.backbone hybrid_pico,causal=true,window=64 --model.feature_norm global

The windows are about as long as what the model was trained on: attention does not carry over to longer ones.

``windows``: the pipeline ``speech/transcribe`` on one hour, 16 windows a batch and one a batch in turn, and where the
time goes. Memory is what the peak of a process grew by, over what it was after a minute of audio, which fills no pool
of batches; a process a length.

``stream``: chunks as a microphone gives them; the text beside that of one pass over all.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import wave as wav
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.domains.saving import load_model
from vertebra.domains.speech.decoding import greedy
from vertebra.domains.speech.model import SpeechCTC
from vertebra.domains.speech.streaming import StreamingRecogniser
from vertebra.pipelines.speech import Transcribe

RATE = 8000
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
MINUTES = (10, 30, 60)
STREAM_MINUTES = (1, 5, 20)
CHUNK_SECONDS = 0.08
BATCH = 16


def digits(folder: Path, seconds: float) -> tuple[NDArray[np.int16], list[str]]:
    """Put recordings one behind the other: samples (N,), and the words that are said."""
    paths = sorted(folder.glob("*_*_*.wav"))
    if not paths:
        sys.exit(f"{folder}: holds no recordings of digits; pass --data DIR.")
    clips = []
    for path in paths:
        with wav.open(str(path)) as file:
            clips.append(np.frombuffer(file.readframes(file.getnframes()), np.int16))
    random = np.random.default_rng(0)
    parts, words, count = [], [], 0
    while count < seconds * RATE:
        number = int(random.integers(len(clips)))
        parts += [clips[number], np.zeros(round(random.uniform(0.1, 1.0) * RATE), np.int16)]
        words.append(WORDS[int(paths[number].name[0])])
        count += len(parts[-1]) + len(parts[-2])
    return np.concatenate(parts), words


def write(folder: Path, data: Path, minutes: float) -> tuple[Path, list[str]]:
    """Write a recording of so many minutes; return its path and what is said in it."""
    samples, words = digits(data, 60 * minutes)
    path = folder / f"{minutes:g}.wav"
    with wav.open(str(path), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", "not compressed"))
        file.writeframes(samples.tobytes())
    return path, words


def words_of(pipeline: Transcribe, path: Path) -> list[tuple[str, float, float]]:
    """Words of a recording with their times."""
    found = pipeline([path])[0]
    return [(w["text"], w["start"], w["end"]) for w in found.to_dict()["words"]]


def error_rate(said: list[str], found: list[str]) -> float:
    """Word error rate; looks for partners of a word near where it should be, as the sequences are long."""
    width, far = 300, 10**9
    row = {j: j for j in range(width + 1)}
    for i, word in enumerate(said, start=1):
        middle = round(i * len(found) / len(said))
        after: dict[int, int] = {}
        for j in range(max(0, middle - width), min(len(found), middle + width) + 1):
            best = min(row.get(j, far), after.get(j - 1, far)) + 1
            if j:
                best = min(best, row.get(j - 1, far) + (word != found[j - 1]))
            after[j] = best
        row = after
    return row[len(found)] / len(said)


# ---------------------------------------------------------------- windows


def print_windows(args: argparse.Namespace) -> None:
    """Print the speed of batches, where the time goes, and the memory."""
    batched, single = (
        Transcribe(str(args.model), device="cpu", batch_size=size, window=args.window, context=args.context)
        for size in (BATCH, 1)
    )
    with tempfile.TemporaryDirectory() as folder:
        path, said = write(Path(folder), args.data, args.minutes)
        times: dict[str, list[float]] = {"batched": [], "single": []}
        texts: dict[str, list[tuple[str, float, float]]] = {}
        for _ in range(args.rounds):
            for name, pipeline in (("batched", batched), ("single", single)):
                start = time.perf_counter()
                texts[name] = words_of(pipeline, path)
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(t) for name, t in times.items()}
        shares = parts_of(batched, path)
        memory = {minutes: grown(args, write(Path(folder), args.data, minutes)[0]) for minutes in MINUTES}
    found = [word for word, _, _ in texts["batched"]]
    same = [word for word, _, _ in texts["single"]] == found
    moved = max((abs(a[1] - b[1]) for a, b in zip(*texts.values(), strict=False)), default=0.0) if same else None
    print(
        f"torch {torch.__version__}, {args.threads} threads, median of {args.rounds} rounds, {args.minutes:g} minutes"
    )
    print(f"in windows of {args.window:g} s with {args.context:g} s of context at either side, {len(said):,} words, ")
    print(f"word error rate {error_rate(said, found):.2%}\n")
    print("| windows a batch | audio s/s | ratio | words | same text |\n| ---: | ---: | ---: | ---: | --- |")
    for name, size in (("single", 1), ("batched", BATCH)):
        speed, ratio = 60 * args.minutes / medians[name], medians["single"] / medians[name]
        print(f"| {size} | {speed:.0f} | {ratio:.2f} | {len(texts[name]):,} | {'yes' if same else 'NO'} |")
    if moved is not None:
        print(f"\nLargest difference between the times of a word: {moved:.3f} s")
    print(f"\n| {' | '.join(shares)} |\n|{' ---: |' * len(shares)}")
    print(f"| {' | '.join(f'{share:.0%}' for share in shares.values())} |")
    print(f"\n| peak memory, MiB | {' | '.join(f'{n} min' for n in memory)} |\n| --- |{' ---: |' * len(memory)}")
    print(f"| grown by | {' | '.join(f'{size / 2**20:.0f}' for size in memory.values())} |")


def parts_of(pipeline: Transcribe, path: Path) -> dict[str, float]:
    """Shares of the time that the parts of a transcription take."""
    spent: dict[str, float] = {}

    def timed(name: str, owner: Any, method: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def run(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                spent[name] = spent.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, method, run)

    model = pipeline.recogniser
    timed("log-mel", model, "features")
    timed("subsampling", model.subsample, "forward")
    timed("encoder", model.backbone, "forward")
    timed("decoding and times", pipeline, "join")
    read = pipeline.read

    def reading(*args: Any) -> Iterator[Any]:
        items = read(*args)
        while True:
            start = time.perf_counter()
            item = next(items, None)
            spent["reading"] = spent.get("reading", 0.0) + time.perf_counter() - start
            if item is None:
                return
            yield item

    pipeline.read = reading  # type: ignore[method-assign]
    start = time.perf_counter()
    words_of(pipeline, path)
    total = time.perf_counter() - start
    for owner, method in ((model, "features"), (model.subsample, "forward"), (model.backbone, "forward")):
        delattr(owner, method)
    del pipeline.read, pipeline.join
    shares = {name: seconds / total for name, seconds in spent.items()}
    return {**shares, "rest": 1 - sum(shares.values())}


def grown(args: argparse.Namespace, path: Path) -> int:
    """Bytes by which the peak of a process grows with a recording."""
    words = [sys.executable, __file__, "--threads", str(args.threads), "one", "--data", str(args.data)]
    words += ["--model", str(args.model), "--window", str(args.window), "--context", str(args.context), str(path)]
    out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    return int(json.loads(out.splitlines()[-1]))


def print_grown(args: argparse.Namespace) -> None:
    """Print the bytes of ``grown``, measured here."""
    options = {"window": args.window, "context": args.context}
    pipeline = Transcribe(str(args.model), device="cpu", batch_size=BATCH, **options)
    with tempfile.TemporaryDirectory() as folder:
        words_of(pipeline, write(Path(folder), args.data, 1)[0])
    before = most = resident()
    ended = threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.003):
            most = max(most, resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    words_of(pipeline, args.path)
    ended.set()
    watcher.join()
    print(json.dumps(most - before))


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ---------------------------------------------------------------- streaming


def print_stream(args: argparse.Namespace) -> None:
    """Print delay, time a chunk, and the size of the state."""
    model = load_model(str(args.model))
    assert isinstance(model, SpeechCTC)
    samples, said = digits(args.data, 60 * max(args.stream_minutes))
    waves = samples.astype(np.float32) / 32768
    stream = StreamingRecogniser(model)
    size = round(CHUNK_SECONDS * RATE)
    marks = {round(60 * minutes / CHUNK_SECONDS): minutes for minutes in args.stream_minutes}
    taken: list[float] = []
    rows = []
    for number, at in enumerate(range(0, len(waves), size), start=1):
        start = time.perf_counter()
        stream.feed(waves[at : at + size])
        taken.append(time.perf_counter() - start)
        if number in marks:
            last = np.array(taken[-round(60 / CHUNK_SECONDS) :]) / CHUNK_SECONDS  # of the last minute
            rows.append(
                f"| {marks[number]:g} min | {np.median(last):.1%} | {np.quantile(last, 0.99):.1%} | "
                f"{stream.state_bytes / 1024:.1f} |"
            )
    text = stream.finish()
    start = time.perf_counter()
    with torch.inference_mode():
        log_probs, counts = model(torch.from_numpy(waves)[None], torch.tensor([len(waves)]))
    whole = time.perf_counter() - start
    offline = greedy(log_probs, counts)[0]
    same = list(offline.ids) == stream.ids
    parameters = sum(p.numel() for p in model.parameters())
    print(f"torch {torch.__version__}, {args.threads} threads, chunks of {1000 * CHUNK_SECONDS:.0f} ms, ")
    print(f"{parameters:,} parameters, delay {1000 * stream.delay:.0f} ms\n")
    print("| after | time a chunk, share of its duration | 99 % of chunks below | state (KiB) |")
    print("| --- | ---: | ---: | ---: |")
    print("\n".join(rows))
    print(f"\n{len(stream.ids):,} tokens, {'the same' if same else 'NOT the same'} as in one pass over all; ")
    print(f"word error rate {error_rate(said, text.split()):.2%}; time over that of one pass {sum(taken) / whole:.1f}")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parts = parser.add_subparsers(dest="part", required=True)
    windows = parts.add_parser("windows", help="batches, parts and memory of the pipeline")
    windows.add_argument("--minutes", type=float, default=60.0)
    windows.add_argument("--rounds", type=int, default=3)
    stream = parts.add_parser("stream", help="chunks, delay and state")
    stream.add_argument("--stream-minutes", type=float, nargs="+", default=STREAM_MINUTES)
    one = parts.add_parser("one", help="measure the memory of one recording, print JSON")
    one.add_argument("path", type=Path)
    for part in (windows, one):
        part.add_argument("--window", type=float, default=30.0, help="seconds")
        part.add_argument("--context", type=float, default=4.0, help="seconds at its sides that only help")
    for part in (windows, stream, one):
        part.add_argument("--data", type=Path, required=True, help="folder of the recordings")
        part.add_argument("--model", type=Path, required=True, help="model directory")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    {"windows": print_windows, "stream": print_stream, "one": print_grown}[args.part](args)


if __name__ == "__main__":
    main()
