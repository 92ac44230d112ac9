"""Backbones that write meshes: tokens a second, memory and the cost of a token as the sequence grows; training cost.

    taskset -c 0 python -P benchmarks/mesh_decoding.py             # ten minutes on one core
    taskset -c 0 python -P benchmarks/mesh_decoding.py --quick     # one minute, short sequences

Generators with random weights, equal in all but the backbone, whose layers have about 0.9 million parameters each,
write AMT tokens under the grammar (greedy, the end forbidden, so that all write the same number). Each lives in a
process of its own; they take turns, some tokens each, so that what else the machine does hits all of them. Times are
seconds of the processor, one thread, and the best of a few turns. Memory is what the process has grown by at most since
it was ready to begin. Prints Markdown; writes ``mesh_decoding.png``.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

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
BEST_OF = 4  # turns a time is the best of
STRETCH = TURN * BEST_OF
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
class WatchedDecoder(Decoder):
    """A decoder that keeps hold of the state it began."""

    states: list[State] = field(default_factory=list)

    def begin(self, prompts: Sequence[Tensor] | Tensor, room: int, piece: int) -> tuple[State, Tensor, Tensor | None]:
        """As in ``Decoder``."""
        begun = super().begin(prompts, room, piece)
        self.states.append(begun[0])
        return begun


class Turn(NamedTuple):
    """What one turn took, and memory behind it, in bytes."""

    seconds: float
    state: int
    growth: int


def high_water() -> int:
    """Return the most memory this process has had, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def write_in_turns(name: str, batch: int, tokens: int, pipe: Connection) -> None:
    """Generate in a process of its own: ``TURN`` tokens for each message, answered with the ``Turn``."""
    torch.set_num_threads(1)
    model = build(name, tokens)
    may = torch.ones(SPECIAL + model.tokenizer.vocab_size, dtype=torch.bool)
    may[END] = False
    with torch.inference_mode():
        prefix = model.condition(condition(batch))

    def start(count: int) -> tuple[WatchedDecoder, Iterator[Step]]:
        decoder = WatchedDecoder(**vars(decoder_of(model, prefix)))
        prompts = torch.empty(batch, 0, dtype=torch.long)
        return decoder, stream(decoder, prompts, Stop(max_new=count), GREEDY, allowed=lambda ids, items: may)

    for _ in start(2)[1]:  # libraries' own buffers
        pass
    ctypes.CDLL(None).malloc_trim(0)  # what the encoder freed would hide the growth
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts at what is held now
    before = high_water()
    decoder, steps = start(tokens)
    pipe.send("ready")
    while pipe.recv():
        began = time.process_time()
        for _ in range(TURN):
            next(steps)
        seconds = time.process_time() - began
        pipe.send(Turn(seconds, decoder.states[0].nbytes, high_water() - before))


def decode(batch: int, tokens: int) -> dict[str, list[Turn]]:
    """Return the turns of every backbone that writes at least so many tokens, and not more than a stretch beyond."""
    stretches = -(-tokens // STRETCH)
    spawn = multiprocessing.get_context("spawn")  # processes that share no memory with this one
    workers = {}
    for name in BACKBONES:
        ours, theirs = spawn.Pipe()
        worker = spawn.Process(target=write_in_turns, args=(name, batch, stretches * STRETCH, theirs), daemon=True)
        worker.start()
        theirs.close()  # so that a worker that died is noticed
        workers[name] = (worker, ours)
    for _, pipe in workers.values():
        pipe.recv()
    turns: dict[str, list[Turn]] = {name: [] for name in BACKBONES}
    for _ in range(stretches * BEST_OF):
        for name, (_, pipe) in workers.items():
            pipe.send(True)
            turns[name].append(pipe.recv())
    for worker, pipe in workers.values():
        pipe.send(False)
        worker.join()
    return turns


def best(turns: list[Turn]) -> list[float]:
    """Return the seconds of a token in each stretch."""
    parts = [turns[i : i + BEST_OF] for i in range(0, len(turns), BEST_OF)]
    return [min(turn.seconds for turn in part) / TURN for part in parts]


def print_decoding(batch: int, lengths: list[int], turns: dict[str, list[Turn]]) -> None:
    """Print speed and memory at the given numbers of tokens."""
    header = " | ".join(f"{n:,}" for n in lengths)
    print(
        f"\nBatch {batch}: tokens a second at so many tokens (times {REFERENCE}'s), state and growth of memory in MB\n"
    )
    print(f"| backbone | {header} | whole, s | state, {header} | memory, {header} |")
    print("| --- |" + " ---: |" * (3 * len(lengths) + 1))
    theirs = best(turns[REFERENCE])
    for name, own in turns.items():
        seconds = best(own)
        stretches = [(n - 1) // STRETCH for n in lengths]
        rates = [f"{batch / seconds[i]:,.0f} ({theirs[i] / seconds[i]:.2f})" for i in stretches]
        after = [own[(n - 1) // TURN] for n in lengths]
        memory = [f"{turn.state / 1e6:.2f}" for turn in after] + [f"{turn.growth / 1e6:.1f}" for turn in after]
        whole = STRETCH * sum(seconds[: stretches[-1] + 1])
        print(f"| {name} | {' | '.join([*rates, f'{whole:.1f}', *memory])} |", flush=True)


def draw(found: dict[int, dict[str, list[Turn]]]) -> None:
    """Draw the time of a token over the sequence, one place a batch size."""
    from vertebra.pipelines.figures import PALETTE, new_figure

    figure, axes = new_figure(1, len(found), width=9.0, height=3.6)
    for place, (batch, turns) in zip(axes, found.items(), strict=True):
        for color, (name, own) in zip(PALETTE, turns.items(), strict=False):
            milliseconds = [1000 * s for s in best(own)]
            place.plot([STRETCH * (i + 1) for i in range(len(milliseconds))], milliseconds, color=color, label=name)
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
    plan = {1: [256, 768], 8: [256]} if args.quick else {1: [1000, 4000, 10_000], 8: [1000, 4000]}
    print(f"torch {torch.__version__}, {platform.machine()}, one thread, fp32, eager")
    found: dict[int, dict[str, list[Turn]]] = {}
    for batch, lengths in plan.items():
        found[batch] = decode(batch, max(lengths))
        print_decoding(batch, lengths, found[batch])
    print_training(rounds=2 if args.quick else 5)
    if not args.quick:
        draw(found)


if __name__ == "__main__":
    main()
