"""One sequence of up to 131,072 bases: time and memory of a forward pass and of a training step.

    python benchmarks/long.py [--figure benchmarks/long.png]

Every measurement is a process of its own, on an otherwise idle machine; memory is what its resident set grew by at its
peak, over what it was with the model built. A training step is embedding, backbone, head, loss, backward and AdamW,
with ``set_recompute``. The width is 256, the depth 8. Full attention layers cannot be linear: the hybrid that is has a
window.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch
from torch import nn

from vertebra.backbones.base import Backbone
from vertebra.backbones.hybrid import HybridConfig

SHAPE = {"dim": 256, "depth": 8, "hidden_dim": 512, "state_dim": 64, "num_heads": 8, "num_kv_heads": 4}
MODELS = {
    "Mamba-2": {"pattern": "M"},
    "hybrid, window 1,024": {"pattern": "MMMMAMMM", "window": 1024},
    "hybrid, full attention": {"pattern": "MMMMAMMM"},
    "attention only": {"pattern": "A", "rope_fraction": 1.0},
}
LENGTHS = (1024, 4096, 16_384, 65_536, 131_072)
LIMITS = {  # what would take longer than a minute or two is left out, and shown as such
    ("hybrid, full attention", "training step"): 65_536,
    ("attention only", "forward"): 65_536,
    ("attention only", "training step"): 16_384,
}


def build(name: str) -> Backbone:
    """Make a model."""
    torch.manual_seed(0)
    return HybridConfig(**SHAPE, **MODELS[name]).build()


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


def measure(name: str, length: int, kind: str, repeats: int) -> dict[str, float]:
    """Time one pass; the shortest of a few, and its memory."""
    backbone = build(name)
    embed, head = nn.Embedding(12, backbone.config.dim), nn.Linear(backbone.config.dim, 12)
    modules = nn.ModuleList([backbone, embed, head])
    ids = torch.randint(7, 11, (1, length))

    def forward() -> None:
        with torch.inference_mode():
            head(backbone(embed(ids)))

    optimizer = torch.optim.AdamW(modules.parameters())
    backbone.set_recompute(True)

    def train() -> None:
        logits = head(backbone(embed(ids)))
        nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    run = forward if kind == "forward" else train
    short, ids = ids, ids[:, :256]
    run()  # warm
    ids = short
    seconds = []
    with Peak() as peak:
        for _ in range(repeats):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    return {"seconds": min(seconds), "bytes": peak.most - peak.start}


def draw(results: dict[str, dict[str, dict[int, dict[str, float]]]], path: Path) -> None:
    """Draw time and memory over the length."""
    from vertebra.pipelines import figures

    figure, grid = figures.new_figure(1, 4, width=15.0, height=3.8)
    for column, (kind, what) in enumerate((k, w) for k in ("forward", "training step") for w in ("seconds", "bytes")):
        axes = grid[column]
        for colour, (name, by_kind) in zip(figures.PALETTE, results.items(), strict=False):
            found = by_kind[kind]
            values = [found[n][what] / (1 if what == "seconds" else 2**30) for n in found]
            axes.plot(list(found), values, marker="o", markersize=4, color=colour, label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("bases")
        axes.set_ylabel("time (s)" if what == "seconds" else "memory (GiB)")
        axes.set_title(f"{kind}: {'time' if what == 'seconds' else 'memory'}", fontsize=10, loc="left")
    grid[0].legend(frameon=False, fontsize=8)
    path.write_bytes(figures.png_bytes(figure))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument(
        "--kinds", nargs="+", choices=("forward", "training step"), default=["forward", "training step"]
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "LENGTH", "KIND"), help="measure one, print JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one:
        name, length, kind = args.one[0], int(args.one[1]), args.one[2]
        print(json.dumps(measure(name, length, kind, 3 if length <= 4096 else 1)))
        return
    print(f"torch {torch.__version__}, {args.threads} threads, fp32, batch 1, width 256, 8 layers")
    results: dict[str, dict[str, dict[int, dict[str, float]]]] = {n: {} for n in args.models}
    header = " | ".join(f"{n:,}" for n in args.lengths)
    for kind in args.kinds:
        print(f"\n{kind}: microseconds a base; peak memory in GiB\n\n| model | {header} | 131k / 16k |")
        print("| --- |" + " ---: |" * (len(args.lengths) + 1))
        for name in args.models:
            found = results[name].setdefault(kind, {})
            cells = []
            for length in args.lengths:
                if length > LIMITS.get((name, kind), length):
                    cells.append("not run")
                    continue
                words = [sys.executable, __file__, "--threads", str(args.threads), "--one", name, str(length), kind]
                out = subprocess.run(words, capture_output=True, text=True, check=True).stdout
                found[length] = json.loads(out.splitlines()[-1])
                per_base = 1e6 * found[length]["seconds"] / length
                cells.append(f"{per_base:.0f}; {found[length]['bytes'] / 2**30:.2f}")
            both = 131_072 in found and 16_384 in found
            ratio = f"{found[131_072]['seconds'] / found[16_384]['seconds']:.1f}" if both else "not run"
            print(f"| {name} | " + " | ".join(cells) + f" | {ratio} |", flush=True)
    if args.figure:
        draw(results, args.figure)


if __name__ == "__main__":
    main()
