"""Padding of batches with and without length buckets, and what it costs in training.

    python benchmarks/speech_padding.py            # about a minute on one core

Lengths are simulated: ``books`` as of read books (most utterances near 15 s, none above 34), ``wide`` lognormal up to
40 s; 3.5 tokens a second on average. Batches hold 500 s, padding included; random ones 32 items, as is usual.

Training is forward and backward of a small backbone on random features, 12.5 positions a second. Both plans hold the
same seconds with padding; a random batch is filled up item by item. The plans take turns batch by batch, and the ratio
is that of seconds of real audio a second.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from vertebra.backbones.base import create_backbone
from vertebra.domains.buckets import BucketSampler, padding_of

Floats = NDArray[np.float64]
Plan = list[NDArray[np.int64]]
POSITIONS = 12.5  # a second
PLANS = ((5, 1), (10, 1), (30, 1), (30, 2), (30, 5))


def utterances(kind: str, count: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Simulated seconds and tokens of utterances."""
    rng = np.random.default_rng(seed)
    if kind == "books":
        seconds = np.where(rng.random(count) < 0.6, rng.normal(14.5, 1.2, count), rng.uniform(1.5, 14, count))
        seconds = np.clip(seconds, 1.3, 34)
    else:
        seconds = rng.lognormal(np.log(6), 0.9, count)
        seconds = np.where((seconds > 0.5) & (seconds < 40), seconds, rng.uniform(0.5, 40, count))
    tokens = np.round(seconds * rng.lognormal(np.log(3.5), 0.3, count))
    return seconds, np.maximum(tokens, 1)


def random_plan(seconds: Floats, *, size: int | None = None, total: float = 0.0) -> Plan:
    """Batches in random order: ``size`` items each, or as many as ``total`` seconds hold, padding included."""
    order = np.random.default_rng(1).permutation(len(seconds))
    if size is not None:
        return np.split(order, range(size, len(order), size))
    cuts, start, longest = [], 0, 0.0
    for i, length in enumerate(seconds[order].tolist()):
        if i > start and (i + 1 - start) * max(longest, length) > total:
            cuts.append(i)
            start, longest = i, 0.0
        longest = max(longest, length)
    return np.split(order, cuts)


def print_padding(count: int) -> None:
    """Print the share of padding of all plans."""
    data = {kind: utterances(kind, count) for kind in ("books", "wide")}
    print(f"share of padding, {count:,} utterances\n")
    print("| batches | books: audio | books: tokens | wide: audio | wide: tokens |")
    print("| --- | ---: | ---: | ---: | ---: |")
    rows: dict[str, list[Plan]] = {"random, 32 items": [random_plan(s, size=32) for s, _ in data.values()]}
    rows["random, 500 s"] = [random_plan(s, total=500) for s, _ in data.values()]
    for bins, sub_bins in PLANS:
        name = f"{bins} buckets" if sub_bins == 1 else f"{bins} x {sub_bins} buckets"
        rows[name] = [
            BucketSampler(s, targets=t, bins=bins, sub_bins=sub_bins, max_total=500).batches() for s, t in data.values()
        ]
    for name, plans in rows.items():
        cells = [
            f"{padding_of(plan, lengths):.1%}"
            for plan, pair in zip(plans, data.values(), strict=True)
            for lengths in pair
        ]
        print(f"| {name} | {' | '.join(cells)} |")


def train(model: nn.Module, seconds: Floats, width: int) -> float:
    """Wall seconds of a forward and backward pass of a batch of random features."""
    lengths = torch.from_numpy(np.maximum(np.round(seconds * POSITIONS), 1))
    longest = int(lengths.max())
    x = torch.randn(len(lengths), longest, width)
    mask = torch.arange(longest) < lengths[:, None]
    start = time.perf_counter()
    model.zero_grad()
    (model(x, mask) * mask[..., None]).square().mean().backward()
    return time.perf_counter() - start


def print_training(name: str, count: int, batches: int, total: float) -> None:
    """Print the seconds of audio that are trained on in a second."""
    torch.manual_seed(0)
    backbone = create_backbone(name).train()
    width = backbone.config.dim
    print(f"\n{name}, forward and backward, {total:g} s a batch with padding, {batches} batches of each plan\n")
    print("| lengths | random: audio s/s | 30 buckets: audio s/s | ratio |")
    print("| --- | ---: | ---: | ---: |")
    for kind in ("books", "wide"):
        seconds, _ = utterances(kind, count)
        plans = (random_plan(seconds, total=total), BucketSampler(seconds, bins=30, max_total=total).batches())
        train(backbone, seconds[plans[1][0]], width)
        wall, audio = [0.0, 0.0], [0.0, 0.0]
        for number in range(batches):
            for i, plan in enumerate(plans):
                mine = seconds[plan[number]]
                wall[i] += train(backbone, mine, width)
                audio[i] += float(mine.sum())
        speed = [a / w for a, w in zip(audio, wall, strict=True)]
        print(f"| {kind} | {speed[0]:.0f} | {speed[1]:.0f} | {speed[1] / speed[0]:.2f} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="illama_nano,causal=false")
    parser.add_argument("--count", type=int, default=60_000)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--total", type=float, default=200.0, help="seconds of a batch in training")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print_padding(args.count)
    print(f"\ntorch {torch.__version__}, {args.threads} threads, fp32")
    print_training(args.backbone, args.count, args.batches, args.total)


if __name__ == "__main__":
    main()
