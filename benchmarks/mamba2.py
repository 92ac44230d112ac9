"""Mamba-2 and the hybrid beside ``transformers``: equality, time and memory over the length, on the CPU.

    python benchmarks/mamba2.py                      (needs the extra `bench`)

Both sides hold the same random weights and run in one process in turn; a ratio above 1 says that ours is faster or
holds less. Memory is the peak of what the process allocates during the call, by the profiler's own accounting.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vertebra.backbones.hybrid import Hybrid, HybridConfig


def build_pair(dim: int, depth: int) -> tuple[Hybrid, torch.nn.Module]:
    """Return our plain Mamba-2 and the peer's, with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    shape = {"hidden_size": dim, "num_hidden_layers": depth, "num_heads": 2 * dim // 64, "head_dim": 64}
    peer = transformers.Mamba2Model(transformers.Mamba2Config(**shape, state_size=64, n_groups=1, vocab_size=12)).eval()
    ours = HybridConfig(dim=dim, depth=depth, pattern="M", hidden_dim=0, mamba_head_dim=64, state_dim=64).build().eval()
    ours.load_state_dict(rename(peer.state_dict()))
    return ours, peer


def rename(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the peer's weights our names."""
    state = {"norm.weight": weights["norm_f.weight"]}
    for key, value in weights.items():
        if key.startswith("layers"):
            state[key.replace(".norm.", ".norm1.", 1).replace(".mixer.norm1.", ".mixer.norm.")] = value
    return state


def timed(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    gc.collect()
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest sum of live allocations during the call."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    live = most = 0
    for event in sorted(prof.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live)
    return most


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    ours, peer = build_pair(args.dim, args.depth)
    embed = peer.embeddings

    print(f"torch {torch.__version__}, {args.threads} threads, dim {args.dim}, {args.depth} layers, batch 1, fp32")
    print("\n| length | largest difference |\n| ---: | ---: |")
    for length in (1, 7, 64, 1000):
        ids = torch.randint(12, (1, length))
        with torch.no_grad():
            gap = (ours(embed(ids)) - peer(ids, use_cache=False).last_hidden_state).abs().max()
        print(f"| {length} | {gap:.1e} |")

    print(
        "\n| length | pass | time, transformers / ours | memory, transformers / ours | ours, ms per 1,000 positions |"
    )
    print("| ---: | --- | ---: | ---: | ---: |")
    for length in args.lengths:
        x = embed(torch.randint(12, (1, length))).detach()

        def forward(model: torch.nn.Module, x: Tensor = x) -> None:
            with torch.no_grad():
                model(inputs_embeds=x, use_cache=False) if model is peer else model(x)

        def train(model: torch.nn.Module, x: Tensor = x) -> None:
            y = model(inputs_embeds=x, use_cache=False).last_hidden_state if model is peer else model(x)
            y.square().mean().backward()

        for name, run in (("forward", forward), ("forward + backward", train)):
            run(ours), run(peer)
            mine, theirs = [], []
            for _ in range(args.repeats):  # in turn, so that a drift of the machine meets both
                mine.append(timed(lambda r=run: r(ours)))
                theirs.append(timed(lambda r=run: r(peer)))
            ratio = statistics.median(t / m for m, t in zip(mine, theirs, strict=True))
            memory = peak_bytes(lambda r=run: r(peer)) / peak_bytes(lambda r=run: r(ours))
            rate = 1e6 * statistics.median(mine) / length
            print(f"| {length:,} | {name} | {ratio:.2f} | {memory:.2f} | {rate:.1f} |", flush=True)


if __name__ == "__main__":
    main()
