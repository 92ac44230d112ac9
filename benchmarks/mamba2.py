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


def set_chunk(peer: torch.nn.Module, size: int) -> None:
    """Make the peer scan in chunks of another size; its results do not depend on it."""
    for layer in peer.layers:
        layer.mixer.chunk_size = size


def flops_per_position(
    dim: int, depth: int, chunk: int = 64, state: int = 64, width: int = 64, kernel: int = 4
) -> float:
    """Count multiply-adds (as two) of a forward pass: projections, convolution, and the products of the scan."""
    inner = 2 * dim
    heads = inner // width
    projections = 2 * dim * (2 * inner + 2 * state + heads) + 2 * inner * dim
    scan = heads * 2 * ((chunk + state) * width + state * width) + 2 * chunk * state
    return depth * (projections + 2 * kernel * (inner + 2 * state) + scan)


def matmul_rate() -> float:
    """Measure what the machine does in large float32 products, in operations a second."""
    a, b = torch.randn(2048, 1024), torch.randn(1024, 1024)
    return 2 * 2048 * 1024 * 1024 / min(timed(lambda: a @ b) for _ in range(15))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--depths", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument(
        "--chunks", type=int, nargs="+", default=[32, 64, 128, 256], help="of the peer; 256 is its default"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, dim {args.dim}, batch 1, fp32")
    print("\n| length | largest difference of 4 layers |\n| ---: | ---: |")
    ours, peer = build_pair(args.dim, 4)
    for length in (1, 7, 64, 1000, 16_384):
        ids = torch.randint(12, (1, length))
        with torch.no_grad():
            gap = (ours(peer.embeddings(ids)) - peer(ids, use_cache=False).last_hidden_state).abs().max()
        print(f"| {length:,} | {gap:.1e} |")

    print("\nTimes of transformers over ours, its default chunk (256) and its best one; peak memory, its over ours.")
    print("Bound: operations counted over the rate of large products on this machine, as a share of our time.\n")
    print("| layers | length | pass | default chunk | best chunk | memory | ours, us a position | bound |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: |")
    rate = matmul_rate()
    for depth in args.depths:
        ours, peer = build_pair(args.dim, depth)
        for length in args.lengths:
            x = peer.embeddings(torch.randint(12, (1, length))).detach()

            def forward(model: torch.nn.Module, x: Tensor = x, peer: torch.nn.Module = peer) -> None:
                with torch.no_grad():
                    model(inputs_embeds=x, use_cache=False) if model is peer else model(x)

            def train(model: torch.nn.Module, x: Tensor = x, peer: torch.nn.Module = peer) -> None:
                y = model(inputs_embeds=x, use_cache=False).last_hidden_state if model is peer else model(x)
                y.square().mean().backward()

            for name, run, work in (("forward", forward, 1), ("forward + backward", train, 3)):
                mine: list[float] = []
                theirs: dict[int, list[float]] = {chunk: [] for chunk in args.chunks}
                run(ours), run(peer)
                for _ in range(args.repeats if length < 16_384 else 3):  # in turn: a drift of the machine meets all
                    mine.append(timed(lambda r=run, m=ours: r(m)))
                    for chunk, times in theirs.items():
                        set_chunk(peer, chunk)
                        times.append(timed(lambda r=run, m=peer: r(m)))
                middle = statistics.median(mine)
                ratios = {chunk: statistics.median(times) / middle for chunk, times in theirs.items()}
                best = min(ratios, key=lambda chunk: ratios[chunk])
                set_chunk(peer, 256)
                memory = peak_bytes(lambda r=run, m=peer: r(m)) / peak_bytes(lambda r=run, m=ours: r(m))
                bound = work * flops_per_position(args.dim, depth) * length / rate / middle
                print(
                    f"| {depth} | {length:,} | {name} | {ratios[256]:.2f} | {ratios[best]:.2f} ({best}) | {memory:.2f} "
                    f"| {1e6 * middle / length:.1f} | {bound:.0%} |",
                    flush=True,
                )

    ours, _ = build_pair(args.dim, 4)
    compiled = torch.compile(ours, fullgraph=True)
    print("\nWhole model compiled (4 layers, no graph break): compiling, and time of eager over compiled.\n")
    print("| length | pass | compile, s | eager / compiled |\n| ---: | --- | ---: | ---: |")
    for length in (4096,):
        x = torch.randn(1, length, args.dim)
        for name, grad in (("forward", False), ("forward + backward", True)):

            def once(model: torch.nn.Module, x: Tensor = x, grad: bool = grad) -> None:
                with torch.set_grad_enabled(grad):
                    y = model(x)
                    if grad:
                        y.square().mean().backward()

            first = timed(lambda r=once: r(compiled))
            once(ours)
            pairs = [(timed(lambda r=once: r(ours)), timed(lambda r=once: r(compiled))) for _ in range(args.repeats)]
            print(
                f"| {length:,} | {name} | {first:.0f} | {statistics.median(a / b for a, b in pairs):.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
