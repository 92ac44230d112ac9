"""Speed of speech encoders beside their peers, and what a long recording costs.

    python benchmarks/speech_speed.py encoder    # E-Branchformer beside Conformer and Wav2Vec2, about 2 minutes
    python benchmarks/speech_speed.py length --figure benchmarks/speech_length.png    # about 2 minutes

``encoder``: from waves to log-probabilities, fp32, no gradients. The E-Branchformer and torchaudio's Conformer have the
same log-mel front end, convolutional subsampling and head; Wav2Vec2 has its own convolutions, at 20 ms a position.
Rounds alternate between the models; a ratio is that of the medians. Speed is seconds of audio (padding not counted) in
a second.

``length``: a forward pass of backbones of equal size, one recording, 40 ms a position. Every measurement is a process
of its own, which also times one of 10 s; memory is what the resident set grew by at its peak.
"""

from __future__ import annotations

import argparse
import functools
import json
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vertebra.backbones.base import create_backbone
from vertebra.domains.speech.model import SpeechCTC
from vertebra.domains.speech.spec import SpeechSpec

SPEC = SpeechSpec(tokens=("<blank>", *(f"t{i}" for i in range(1, 1000))), vocabulary="words")
OURS, OURS_INTER = "ebranchformer_small", "ebranchformer_small, 3 intermediate CTC"
CONFORMER, WAV2VEC2 = "torchaudio Conformer", "transformers Wav2Vec2ForCTC"
INTERMEDIATE = (3, 6, 9)

POSITIONS_PER_SECOND = 25  # at /4
LENGTHS = (10, 60, 180, 600, 1800)  # seconds
BACKBONES = {
    "hybrid, Mamba-2 alone": "hybrid_nano,causal=false,pattern=M,depth=4",
    "hybrid, attention in windows of 4 s": "hybrid_nano,causal=false,pattern=MMAM,depth=4,hidden_dim=320,window=100",
    "attention (iLLaMA)": "illama_nano,causal=false,depth=7",
    "E-Branchformer": "ebranchformer_nano",
}
LIMITS = {"attention (iLLaMA)": 600, "E-Branchformer": 600}
"""Seconds from which a pass takes minutes; longer recordings are left out, and shown as such."""


# ---------------------------------------------------------------- encoders beside their peers


class WithConformer(nn.Module):
    """Our front end and head around torchaudio's Conformer."""

    def __init__(self, ours: SpeechCTC, ffn_dim: int) -> None:
        super().__init__()
        from torchaudio.models import Conformer

        dim = ours.backbone.config.dim
        self.logmel, self.normalise, self.subsample, self.head = (
            ours.logmel,
            ours.normalise,
            ours.subsample,
            ours.head,
        )
        self.encoder = Conformer(dim, 4, ffn_dim, ours.backbone.num_layers, 31)

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waves (B, N) to log-probabilities."""
        features, counts = self.logmel(waves, lengths)
        x, counts = self.subsample(self.normalise(features, counts), counts)
        x, counts = self.encoder(x, counts)
        return self.head(x).log_softmax(-1), counts


class WithWav2Vec2(nn.Module):
    """The Wav2Vec2 of transformers, half as wide as its base size."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

        config = Wav2Vec2Config(
            vocab_size=len(SPEC.tokens),
            hidden_size=384,
            num_attention_heads=6,
            intermediate_size=1536,
            conv_dim=(256,) * 7,
            attn_implementation="sdpa",
        )
        self.model = Wav2Vec2ForCTC(config)

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waves (B, N) to log-probabilities."""
        mask = (torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]).long()
        return self.model(waves, attention_mask=mask).logits.log_softmax(-1), lengths


def encoders(subsampling: int) -> dict[str, nn.Module]:
    """Make the models with the same seed; those with a front end of ours share it."""
    torch.manual_seed(0)
    backbone = create_backbone("ebranchformer_small")
    ours = SpeechCTC(backbone, SPEC, subsampling=subsampling)
    inter = SpeechCTC(backbone, SPEC, subsampling=subsampling, intermediate=INTERMEDIATE)
    inter.subsample, inter.head = ours.subsample, ours.head
    models = {OURS: ours, OURS_INTER: inter, CONFORMER: WithConformer(ours, 1376), WAV2VEC2: WithWav2Vec2()}
    return {name: model.eval() for name, model in models.items()}


def recordings(batch: int, rate: int) -> tuple[Tensor, Tensor]:
    """Make waves of 10 to 30 s (B, N), one of 20 s where B is 1, and their lengths."""
    seconds = torch.linspace(10, 30, batch) if batch > 1 else torch.tensor([20.0])
    lengths = (seconds * rate).long()
    waves = 0.1 * torch.randn(batch, int(lengths.max()), generator=torch.Generator().manual_seed(0))
    return waves * (torch.arange(waves.shape[1]) < lengths[:, None]), lengths


def compare(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def print_encoders(subsampling: int, batches: list[int], rounds: int, device: str) -> None:
    """Print the speed of all models."""
    import torchaudio
    import transformers

    models = {name: model.to(device) for name, model in encoders(subsampling).items()}
    sizes = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    where = f"{torch.get_num_threads()} threads" if device == "cpu" else torch.cuda.get_device_name()
    print(f"torch {torch.__version__}, torchaudio {torchaudio.__version__}, transformers {transformers.__version__}, ")
    print(f"{where}, fp32, subsampling {subsampling}, median of {rounds} rounds, {max(rounds // 2, 1)} for batches\n")
    heads = " | ".join(f"batch {b}: audio s/s | ratio to ours" for b in batches)
    print(f"| model | parameters (M) | {heads} |")
    print("| --- | ---: |" + " ---: | ---: |" * len(batches))
    cells: dict[str, list[str]] = {name: [] for name in models}

    def run(model: nn.Module, waves: Tensor, lengths: Tensor) -> None:
        with torch.inference_mode():
            model(waves, lengths)
        if device != "cpu":
            torch.cuda.synchronize()

    short = torch.zeros(1, 32_000, device=device)
    for model in models.values():
        run(model, short, torch.tensor([32_000], device=device))
    for batch in batches:
        waves, lengths = (t.to(device) for t in recordings(batch, SPEC.sample_rate))
        audio = float(lengths.sum()) / SPEC.sample_rate
        actions = {n: functools.partial(run, m, waves, lengths) for n, m in models.items()}
        count = rounds if batch == 1 else max(rounds // 2, 1)
        seconds = compare(actions, count)
        for name, taken in seconds.items():
            cells[name] += [f"{audio / taken:.1f}", f"{seconds[OURS] / taken:.2f}"]
    for name, row in cells.items():
        print(f"| {name} | {sizes[name] / 1e6:.1f} | {' | '.join(row)} |")


# ---------------------------------------------------------------- cost against length


class Peak:
    """Largest resident set while it runs, sampled every few milliseconds, in bytes."""

    def __enter__(self) -> Peak:
        self.start = self.most = self._now()
        self.going = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.going = False
        self.thread.join()
        self.most = max(self.most, self._now())

    def _watch(self) -> None:
        while self.going:
            self.most = max(self.most, self._now())
            time.sleep(0.003)

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def measure(name: str, seconds: int) -> dict[str, float]:
    """Time a forward pass of a recording, and one of the shortest; measure the memory of the former."""
    torch.manual_seed(0)
    backbone = create_backbone(name).eval()
    x = torch.randn(1, seconds * POSITIONS_PER_SECOND, backbone.config.dim)
    short = x[:, : LENGTHS[0] * POSITIONS_PER_SECOND]
    times: dict[str, list[float]] = {"short": [], "long": []}

    def run(which: str, x: Tensor) -> None:
        start = time.perf_counter()
        with torch.inference_mode():
            backbone(x)
        times[which].append(time.perf_counter() - start)

    run("short", short[:, :POSITIONS_PER_SECOND])
    times["short"].clear()
    with Peak() as peak:
        run("long", x)
    begin = time.perf_counter()
    while len(times["short"]) < 3 or (time.perf_counter() - begin < 1 and len(times["short"]) < 40):
        for _ in range(3):
            run("short", short)
        if times["long"][0] < 1 or (len(times["long"]) < 3 and times["long"][0] < 10):
            run("long", x)
    return {
        "seconds": statistics.median(times["long"]),
        "short": statistics.median(times["short"]),
        "bytes": peak.most - peak.start,
        "params": sum(p.numel() for p in backbone.parameters()),
    }


def print_lengths(lengths: list[int], figure: Path | None) -> None:
    """Print time and memory of all backbones over the length."""
    results: dict[str, dict[int, dict[str, float]]] = {}
    for name, spec in BACKBONES.items():
        results[name] = {}
        for seconds in lengths:
            if seconds > LIMITS.get(name, seconds):
                continue
            words = [sys.executable, __file__, "--threads", str(torch.get_num_threads()), "one", spec, str(seconds)]
            out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
            results[name][seconds] = json.loads(out.splitlines()[-1])
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, fp32, batch 1, {POSITIONS_PER_SECOND} ")
    print("positions a second")
    header = " | ".join(f"{n} s" if n < 60 else f"{n // 60} min" for n in lengths)
    rows = "| --- | ---: |" + " ---: |" * len(lengths)
    print(f"\nTime, in passes over 10 s\n\n| backbone | parameters (M) | {header} |\n{rows}")
    for name, found in results.items():
        cells = [f"{found[n]['seconds'] / found[n]['short']:.1f}" if n in found else "not run" for n in lengths]
        print(f"| {name} | {found[lengths[0]]['params'] / 1e6:.2f} | {' | '.join(cells)} |")
    print(f"\nSeconds of audio in a second\n\n| backbone | {header} |\n| --- |" + " ---: |" * len(lengths))
    for name, found in results.items():
        cells = [f"{n / found[n]['seconds']:.0f}" if n in found else "not run" for n in lengths]
        print(f"| {name} | {' | '.join(cells)} |")
    print(f"\nPeak memory in MiB\n\n| backbone | {header} |\n| --- |" + " ---: |" * len(lengths))
    for name, found in results.items():
        cells = [f"{found[n]['bytes'] / 2**20:.0f}" if n in found else "not run" for n in lengths]
        print(f"| {name} | {' | '.join(cells)} |")
    if figure:
        draw(results, figure)


def draw(results: dict[str, dict[int, dict[str, float]]], path: Path) -> None:
    """Draw time and memory over the length."""
    from vertebra.pipelines import figures

    figure, grid = figures.new_figure(1, 2, width=11.0, height=4.2)
    for axes, what, scale in zip(grid, ("seconds", "bytes"), (1.0, 2.0**20), strict=True):
        for colour, (name, found) in zip(figures.PALETTE, results.items(), strict=False):
            values = [max(one[what] / scale, 1e-3) for one in found.values()]
            axes.plot(list(found), values, marker="o", markersize=4, color=colour, label=name)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(list(LENGTHS), ["10 s", "1 min", "3 min", "10 min", "30 min"])
        axes.minorticks_off()
        axes.set_xlabel("recording")
        axes.set_ylabel("time (s)" if what == "seconds" else "memory (MiB)")
        axes.set_title("time of a pass" if what == "seconds" else "peak memory", fontsize=10, loc="left")
    grid[0].legend(frameon=False, fontsize=8)
    path.write_bytes(figures.png_bytes(figure))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parts = parser.add_subparsers(dest="part", required=True)
    encoder = parts.add_parser("encoder", help="beside Conformer and Wav2Vec2")
    encoder.add_argument("--subsampling", type=int, default=4)
    encoder.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    encoder.add_argument("--rounds", type=int, default=5)
    encoder.add_argument("--device", default="cpu")
    length = parts.add_parser("length", help="time and memory over the length")
    length.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS), metavar="S")
    length.add_argument("--figure", type=Path)
    one = parts.add_parser("one", help="measure one length, print JSON")
    one.add_argument("name")
    one.add_argument("seconds", type=int)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.part == "encoder":
        print_encoders(args.subsampling, args.batches, args.rounds, args.device)
    elif args.part == "length":
        print_lengths(args.lengths, args.figure)
    else:
        print(json.dumps(measure(args.name, args.seconds)))


if __name__ == "__main__":
    main()
