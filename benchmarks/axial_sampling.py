"""Sampling one image of 32 x 32 RGB pixels: with the column and row caches, and the naive way.

    python benchmarks/axial_sampling.py          # about 6 minutes on two cores

Both draw from the same noise and must give identical pixels. The ratio is that of one naive run and the median of five
cached ones, in the same process.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from vertebra.backbones.base import create_backbone
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.spec import VisionSpec


def timed(run: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Call and time."""
    start = time.perf_counter()
    result = run()
    return result, time.perf_counter() - start


def main() -> None:
    """Print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="axial_nano,positions=none")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="one is fastest for tensors this small")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    spec = VisionSpec(task="generation", channels=3, height=args.pixels, width=args.pixels)
    model = ImageGenerator(create_backbone(args.backbone), spec, logits_scale=1.0).eval()
    shape = (1, 3, args.pixels, args.pixels, model.levels)
    noise = -torch.empty(shape).exponential_().log()
    runs = [timed(lambda: model.sample(1, noise=noise)) for _ in range(6)][1:]
    fast = statistics.median(seconds for _, seconds in runs)
    naive, slow = timed(lambda: model.sample_naive(1, noise=noise))
    assert all(torch.equal(image, naive) for image, _ in runs)
    print(
        f"{args.backbone}: {args.pixels} x {args.pixels} RGB, identical pixels, {slow / fast:.0f} times the naive speed"
    )
    print(f"naive {slow:.1f} s, cached {fast:.2f} s")


if __name__ == "__main__":
    main()
