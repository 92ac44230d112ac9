"""Backbones that write meshes: tokens a second, memory and the cost of a token as the sequence grows; training cost.

    taskset -c 0 python -P benchmarks/mesh_decoding.py             # 15 minutes of a core that others use too
    taskset -c 0 python -P benchmarks/mesh_decoding.py --quick     # two minutes, short sequences

Generators with random weights, equal in all but the backbone, whose layers have about 0.9 million parameters each,
write AMT tokens under the grammar (greedy, the end forbidden, so that all write the same number). Each lives in a
process of its own. Memory is what the process grows by at most while it writes. Then all take turns, some tokens each
from states that were kept on the way, so that what else the machine does hits every backbone and every length. Times
are seconds of the processor, one thread, the best of a few turns. Prints Markdown; writes ``mesh_decoding.png``.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.backbones.base import State, create_backbone
from vertebra.backbones.decoding import Decoder, Step, Stop, stream
from vertebra.domains.mesh.generation import GREEDY, decoder_of
from vertebra.domains.mesh.model import END, SPECIAL, MeshGenerator
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.tokenizers.mesh import make_mesh_tokenizer

REFERENCE = "OPT"
# Presets of one width (96) and six layers, their MLPs widened until the layers have as many parameters as FIT's.
BACKBONES = {
    REFERENCE: "opt_nano,hidden=576,norm_first=false",
    "iLLaMA": "illama_nano,hidden_dim=384",
    "iLLaMA, window 256": "illama_nano,hidden_dim=384,window=256",
    "hybrid, Mamba-2 and 1 of 6 attention": "hybrid_nano,hidden_dim=304",
    "hybrid, Mamba-2 alone": "hybrid_nano,pattern=M,hidden_dim=288",
    "FIT, groups of 64": "fit_nano",
    "Axial, rows of 32": "axial_nano,mlp_ratio=6",
}
CONDITION = 65  # tokens of the shape encoder before the sequence
POINTS = 4096
TURN = 64  # tokens; a whole number of FIT's groups and of Axial's rows, at whose end these do more
TRAIN_TOKENS, TRAIN_BATCH = 600, 8
HERE = Path(__file__).parent


def build(name: str, tokens: int) -> MeshGenerator:
    """Return a generator of meshes of up to so many tokens, with random weights."""
    torch.manual_seed(0)
    word = BACKBONES[name]
    if word.startswith("opt"):  # positions: the condition, the begin and the end beside the tokens
        word += f",max_length={CONDITION + tokens + 2}"
    spec = MeshSpec(tokenizer=make_mesh_tokenizer("amt").to_dict(), points=POINTS, max_tokens=tokens)
    encoder = {"layers": 1, "heads": 4, "latents": CONDITION - 1, "queries": "points"}
    return MeshGenerator(create_backbone(word), spec, encoder=encoder).eval()


def condition(batch: int) -> Tensor:
    """Return points with unit normals (B, N, 6)."""
    points = torch.rand(batch, POINTS, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return torch.cat([points[..., :3], F.normalize(points[..., 3:], dim=-1)], dim=-1)


# ---------------------------------------------------------------- decoding


@dataclass(frozen=True)
class ResumedDecoder(Decoder):
    """A decoder whose beginning can be read once and used again, from a state further on.

    Attributes:
        begun: What ``begin`` read, once it has; the state goes on with every step.
    """

    begun: list[tuple[State, Tensor, Tensor | None]] = field(default_factory=list)

    def begin(self, prompts: Sequence[Tensor] | Tensor, room: int, piece: int) -> tuple[State, Tensor, Tensor | None]:
        """As in ``Decoder``."""
        if not self.begun:
            self.begun.append(super().begin(prompts, room, piece))
        return self.begun[0]

    def fork(self) -> ResumedDecoder:
        """Return one that begins where this one is now, at the start of another mesh."""
        state, logits, states = self.begun[0]
        return dataclasses.replace(self, begun=[(state.fork(), logits, states)])


class Memory(NamedTuple):
    """Bytes at some number of tokens: the decoding state, and by how much the process has grown at most."""

    state: int
    growth: int


def high_water() -> int:
    """Return the most memory this process has had since ``restart_high_water``, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def restart_high_water() -> None:
    """Let the high-water mark begin at what is held now."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed but is still held would hide growth
    Path("/proc/self/clear_refs").write_text("5")


def work(name: str, batch: int, points: list[int], pipe: Connection) -> None:
    """Write in a process of its own.

    First ``max(points)`` tokens, in turns; what is remembered at each of the points is kept. The answer is the memory
    there. Then, for the number of one of the points, the seconds of a token behind it.
    """
    torch.set_num_threads(1)
    model = build(name, max(points) + TURN)
    may = torch.ones(SPECIAL + model.tokenizer.vocab_size, dtype=torch.bool)
    may[END] = False
    with torch.inference_mode():
        prefix = model.condition(condition(batch))

    def start(decoder: Decoder, count: int) -> Iterator[Step]:
        prompts = torch.empty(batch, 0, dtype=torch.long)
        return stream(decoder, prompts, Stop(max_new=count), GREEDY, allowed=lambda ids, items: may)

    decoder = ResumedDecoder(**vars(decoder_of(model, prefix)))
    for _ in start(dataclasses.replace(decoder, begun=[]), 2):  # libraries' own buffers
        pass
    restart_high_water()
    before, grown = high_water(), 0
    forks: list[ResumedDecoder] = []
    found: list[Memory] = []
    steps = start(decoder, max(points) + TURN)
    for done, _ in enumerate(steps, 1):
        if done in points:
            grown = max(grown, high_water() - before)
            found.append(Memory(decoder.begun[0][0].nbytes, grown))
            forks.append(decoder.fork())
            restart_high_water()
            before += forks[-1].begun[0][0].nbytes  # what only this measurement holds
        if done == max(points):
            break
    pipe.send(found)
    while (index := pipe.recv()) is not None:
        steps = start(forks[index].fork(), TURN + 1)
        next(steps)  # reads nothing yet
        began = time.process_time()
        for _ in steps:
            pass
        pipe.send((time.process_time() - began) / TURN)


def decode(batch: int, points: list[int], rounds: int) -> dict[str, tuple[list[Memory], list[float]]]:
    """Return the memory at so many tokens, and the seconds of a step there, of every backbone."""
    spawn = multiprocessing.get_context("spawn")  # processes that share no memory with this one
    workers = {}
    for name in BACKBONES:
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(target=work, args=(name, batch, points, theirs), daemon=True)
        worker.start()
        theirs.close()  # so that a worker that died is noticed
        workers[name] = (worker, ours)
    memory = {name: pipe.recv() for name, (_, pipe) in workers.items()}
    times: dict[str, list[list[float]]] = {name: [[] for _ in points] for name in BACKBONES}
    for _ in range(rounds):
        for index in range(len(points)):
            for name, (_, pipe) in workers.items():
                pipe.send(index)
                times[name][index].append(pipe.recv())
    for worker, pipe in workers.values():
        pipe.send(None)
        worker.join()
    return {name: (memory[name], [min(turns) for turns in times[name]]) for name in BACKBONES}


def print_decoding(
    batch: int, points: list[int], lengths: list[int], found: dict[str, tuple[list[Memory], list[float]]]
) -> None:
    """Print speed and memory at the given numbers of tokens."""
    header = " | ".join(f"{n:,}" for n in lengths)
    print(f"\nBatch {batch}: tokens a second behind so many (times {REFERENCE}'s), state and growth of memory in MB\n")
    print(f"| backbone | {header} | all {lengths[-1]:,}, s | state, {header} | memory, {header} |")
    print("| --- |" + " ---: |" * (3 * len(lengths) + 1))
    theirs = found[REFERENCE][1]
    at = [points.index(n) for n in lengths]
    for name, (memory, seconds) in found.items():
        rates = [f"{batch / seconds[i]:,.0f} ({theirs[i] / seconds[i]:.2f})" for i in at]
        held = [f"{memory[i].state / 1e6:.2f}" for i in at] + [f"{memory[i].growth / 1e6:.1f}" for i in at]
        whole = np.trapezoid([seconds[0], *seconds], [0, *points])
        print(f"| {name} | {' | '.join([*rates, f'{whole:.1f}', *held])} |", flush=True)


def draw(found: dict[int, tuple[list[int], dict[str, list[float]]]]) -> None:
    """Draw the time of a step over the tokens before it, one place a batch size."""
    from vertebra.pipelines.figures import PALETTE, new_figure

    figure, axes = new_figure(1, len(found), width=9.0, height=3.6)
    for place, (batch, (points, rows)) in zip(axes, found.items(), strict=True):
        for color, (name, seconds) in zip(PALETTE, rows.items(), strict=False):
            place.plot(points, [1000 * s for s in seconds], "o-", color=color, markersize=3, label=name)
        place.set_ylim(bottom=0)
        place.set_xlabel(f"tokens written, batch {batch}")
    axes[0].set_ylabel("ms a step (processor)")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "mesh_decoding.png", dpi=100, bbox_inches="tight")


# ---------------------------------------------------------------- training


def print_training(rounds: int) -> None:
    """Print what a forward and a backward pass cost, of the whole generator and of the backbone alone."""
    torch.set_num_threads(1)
    points = condition(TRAIN_BATCH)
    ids = torch.randint(SPECIAL, SPECIAL + 128, (TRAIN_BATCH, TRAIN_TOKENS))
    mask = torch.ones_like(ids, dtype=torch.bool)
    runs: dict[tuple[str, str], Callable[[], Tensor]] = {}
    parameters = {}
    for name in BACKBONES:
        model = build(name, TRAIN_TOKENS).train()
        tables = sum(p.numel() for key, p in model.backbone.named_parameters() if key == "positions.weight")
        parameters[name] = sum(p.numel() for p in model.backbone.parameters()) - tables
        x = torch.randn(TRAIN_BATCH, CONDITION - 1 + TRAIN_TOKENS, model.backbone.config.dim, requires_grad=True)

        def whole(model: MeshGenerator = model) -> Tensor:
            logits = model(points, ids, torch.ones_like(ids), mask)
            return F.cross_entropy(logits.flatten(0, 1), ids.flatten())

        def alone(model: MeshGenerator = model, x: Tensor = x) -> Tensor:
            return model.backbone(x).square().mean()

        runs[name, "whole"], runs[name, "alone"] = whole, alone
    times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(1 + rounds):
        for key, run in runs.items():
            began = time.process_time()
            run().backward()
            times[key].append(time.process_time() - began)
    fastest = {key: min(values[1:]) for key, values in times.items()}  # the first one makes buffers
    print(f"\nTraining: forward and backward, {TRAIN_BATCH} meshes of {TRAIN_TOKENS} tokens, {POINTS:,} points\n")
    print(f"| backbone | parameters of its layers | generator, s (times {REFERENCE}'s) | backbone alone, s |")
    print("| --- | ---: | ---: | ---: |")
    for name in BACKBONES:
        cells = [
            f"{fastest[name, part]:.3f} ({fastest[name, part] / fastest[REFERENCE, part]:.2f})"
            for part in ("whole", "alone")
        ]
        print(f"| {name} | {parameters[name]:,} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="256 and 768 tokens, no figure")
    args = parser.parse_args()
    # By batch size: where time is measured, and of these the ones that are printed.
    plan = {
        1: ([250, 1000, 2000, 4000, 7000, 10_000], [1000, 4000, 10_000]),
        8: ([250, 1000, 2000, 4000], [1000, 4000]),
    }
    rounds = 5  # turns a time is the best of
    if args.quick:
        plan, rounds = {1: ([256, 768], [256, 768]), 8: ([256], [256])}, 3
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, fp32, eager")
    curves = {}
    for batch, (points, lengths) in plan.items():
        found = decode(batch, points, rounds)
        print_decoding(batch, points, lengths, found)
        curves[batch] = (points, {name: seconds for name, (_, seconds) in found.items()})
    if not args.quick:
        draw(curves)
    print_training(rounds // 2)


if __name__ == "__main__":
    main()
