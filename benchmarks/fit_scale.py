"""One training step of a FIT encoder on ever larger images, beside full attention: time and peak memory by tokens.

    python benchmarks/fit_scale.py            # 1,600 to 6,400 pixels a side: about 10 minutes on two cores
    python benchmarks/fit_scale.py --pixels 6400

Every step is a process of its own: 16 x 16 patches through an ``ImageClassifier``, forward, backward and AdamW, all
layers recomputed. FIT's groups grow as the cube root of the tokens, as its paper's cost needs; full attention is
iLLaMA-S without a mask. Prints a table and the fitted exponents; writes ``fit_scale.png``.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

PATCH = 16
FIT = {1600: 64, 2400: 81, 3200: 100, 6400: 160}  # group size by pixels a side
FULL = (400, 800, 1200)
HERE = Path(__file__).parent


def step(word: str, pixels: int) -> None:
    """Take one step and print seconds and peak memory as JSON."""
    import torch
    import torch.nn.functional as F

    from vertebra.backbones.base import create_backbone
    from vertebra.domains.vision.model import ImageClassifier
    from vertebra.domains.vision.spec import VisionSpec

    torch.manual_seed(0)
    spec = VisionSpec(task="classification", channels=3, height=pixels, width=pixels, classes=("a", "b"))
    model = ImageClassifier(create_backbone(word), spec, patch_size=PATCH, pooling="mean")
    model.backbone.set_recompute(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = torch.rand(1, 3, pixels, pixels)
    start = time.perf_counter()
    loss = F.cross_entropy(model(images), torch.tensor([1]))
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    used = sum(p.grad.abs().sum() > 0 for p in model.parameters() if p.grad is not None)
    facts = {"seconds": seconds, "bytes": peak, "loss": loss.item(), "parameters": len(list(model.parameters()))}
    print(json.dumps({**facts, "with_gradient": int(used)}))


def measure(word: str, pixels: int) -> dict[str, float]:
    """Take a step in a fresh process."""
    command = [sys.executable, "-P", __file__, "--step", word, "--pixels", str(pixels)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def exponent(tokens: list[int], values: list[float]) -> float:
    """Slope of the values over the tokens in double-logarithmic scale."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def main() -> None:
    """Print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step", help="internal: take one step with this backbone")
    parser.add_argument("--pixels", type=int, help="one size only")
    args = parser.parse_args()
    if args.step:
        step(args.step, args.pixels)
        return
    rows: dict[str, list[tuple[int, float, float]]] = {"FIT": [], "full attention": []}
    print(f"{'':>16} {'pixels':>7} {'tokens':>8} {'seconds':>9} {'peak GB':>8}")
    plan = [("FIT", p, f"fit_small,causal=false,group_size={n}") for p, n in FIT.items()]
    plan += [("full attention", p, "illama_small,causal=false") for p in FULL]
    for name, pixels, word in plan:
        if args.pixels in (None, pixels):
            facts = measure(word, pixels)
            assert facts["with_gradient"] == facts["parameters"]
            tokens = (pixels // PATCH) ** 2
            rows[name].append((tokens, facts["seconds"], facts["bytes"] / 1e9))
            print(
                f"{name:>16} {pixels:>7} {tokens:>8,} {facts['seconds']:>9.1f} {facts['bytes'] / 1e9:>8.2f}", flush=True
            )
    if args.pixels is None:
        for name, found in rows.items():
            tokens, seconds, _ = (list(column) for column in zip(*found, strict=True))
            print(f"{name}: time grows as tokens ^ {exponent(tokens, seconds):.2f}")
        draw(rows)


def draw(rows: dict[str, list[tuple[int, float, float]]]) -> None:
    """Draw time and memory over the tokens."""
    from vertebra.pipelines.figures import PALETTE, new_figure

    figure, axes = new_figure(1, 2, width=9.0, height=3.4)
    for color, (name, found) in zip(PALETTE, rows.items(), strict=False):
        tokens, seconds, memory = (list(column) for column in zip(*found, strict=True))
        label = f"{name}: tokens ^ {exponent(tokens, seconds):.2f}"
        axes[0].loglog(tokens, seconds, "o-", color=color, markersize=4, label=label)
        axes[1].loglog(tokens, memory, "o-", color=color, markersize=4, label=name)
    axes[0].set_ylabel("seconds a training step")
    axes[1].set_ylabel("peak memory (GB)")
    for place in axes:
        place.set_xlabel("tokens")
        place.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "fit_scale.png", dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
