"""How cost grows with the length: time of a forward pass, and bytes of the decoding state.

    python benchmarks/length.py [PRESET ...]

Linear models keep microseconds a position constant; those of attention grow. A Mamba layer's state is constant,
a windowed attention layer's a ring, a full attention layer's grows.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from vertebra.backbones.base import create_backbone

DEFAULT = ["hybrid_nano,pattern=M", "hybrid_nano", "illama_nano", "illama_nano,window=256"]


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=DEFAULT)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    print(f"torch {torch.__version__}, {args.threads} threads, batch 1, fp32")
    header = " | ".join(f"{length:,}" for length in args.lengths)
    print(f"\nmicroseconds a position, relative to the first column's\n\n| backbone | {header} |")
    print("| --- |" + " ---: |" * len(args.lengths))
    states = {}
    for name in args.backbones:
        backbone = create_backbone(name).eval()
        costs, sizes = [], []
        for length in args.lengths:
            x = torch.randn(1, length, backbone.config.dim)
            times = []
            with torch.no_grad():
                backbone(x)
                for _ in range(args.repeats):
                    start = time.perf_counter()
                    backbone(x)
                    times.append(time.perf_counter() - start)
                state = backbone.init_state(1, length)
                for part in x.split(1024, dim=1):
                    backbone.step(part, state)
            costs.append(1e6 * statistics.median(times) / length)
            sizes.append(state.nbytes)
        states[name] = sizes
        print(
            f"| {name} | {costs[0]:.0f} µs | " + " | ".join(f"{c / costs[0]:.2f}" for c in costs[1:]) + " |", flush=True
        )

    print(f"\nstate in KiB after so many positions\n\n| backbone | {header} |")
    print("| --- |" + " ---: |" * len(args.lengths))
    for name, sizes in states.items():
        print(f"| {name} | " + " | ".join(f"{s / 1024:,.0f}" for s in sizes) + " |")


if __name__ == "__main__":
    main()
