"""OPT decoding beside ``transformers``: tokens a second, what a token costs as the sequence grows, and peak memory.

    python benchmarks/mesh_opt.py                    (needs the extra `bench`)

Both sides hold the same random weights and must give the same tokens (greedy), after features as many as the shape
condition of a mesh. They take turns within one run, some tokens each, so that what else the machine does hits both.
Peak memory is that of a process of its own above what it had before decoding.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from vertebra.backbones.decoding import Decoder, Step, Stop, Strategy, stream
from vertebra.backbones.opt import OPTConfig, load_opt

VOCABULARY = 132  # 128 coordinates and a few special tokens
PREFIX = 257  # positions of the shape condition: 256 latents and one of the whole
TURN = 50  # tokens that a side generates before the other one's turn
SIZES = {
    "small": {"dim": 128, "depth": 6, "heads": 4, "hidden": 512},
    "opt_125m": {"dim": 768, "depth": 12, "heads": 12, "hidden": 3072},
    "opt_350m, 4 of 24 layers": {"dim": 1024, "depth": 4, "heads": 16, "hidden": 4096, "norm_first": False},
}
GREEDY = Strategy(method="greedy")


def build_pair(size: str, length: int) -> tuple[Decoder, nn.Module]:
    """Return our decoder and the peer's causal language model, with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = OPTConfig(**SIZES[size], max_length=length)
    shape = transformers.OPTConfig(
        hidden_size=config.dim,
        num_hidden_layers=config.depth,
        num_attention_heads=config.heads,
        ffn_dim=config.hidden,
        word_embed_proj_dim=config.dim,
        max_position_embeddings=config.max_length,
        do_layer_norm_before=config.norm_first,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    peer = transformers.OPTForCausalLM(shape).eval()
    with torch.no_grad():
        peer.lm_head.weight.mul_(30)  # so that the next token is no toss-up that rounding decides
        for name, weight in peer.model.decoder.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight.mul_(2)  # so that it depends on more than the token before
    ours = config.build().eval()
    load_opt(ours, peer.state_dict(), "model.decoder.")
    return Decoder(ours, peer.model.decoder.embed_tokens, peer.lm_head), peer


def run_ours(decoder: Decoder, prefix: Tensor, new: int) -> Iterator[Step]:
    """Yield the new tokens of ours after the features prefix (B, P, D)."""
    empty = torch.empty(len(prefix), 0, dtype=torch.long)
    return stream(dataclasses.replace(decoder, prefix=prefix), empty, Stop(max_new=new), GREEDY)


def run_theirs(peer: nn.Module, prefix: Tensor, new: int, cache: str, after: object = None) -> Tensor:
    """Return the new tokens (B, new) of the peer after the features prefix (B, P, D); ``after`` follows each one."""
    options = {"max_new_tokens": new, "do_sample": False, "cache_implementation": cache}
    options |= {} if after is None else {"stopping_criteria": [after]}
    return peer.generate(inputs_embeds=prefix, attention_mask=torch.ones(prefix.shape[:2]), **options)


def compare(
    decoder: Decoder, peer: nn.Module, prefix: Tensor, new: int, cache: str
) -> tuple[list[float], list[float], int]:
    """Generate with both in turn and check the tokens.

    Returns:
        The seconds of each turn, ours and theirs, and how many kinds of tokens came.

    Raises:
        SystemExit: The tokens differ.
    """
    ours: list[Step] = []
    mine, theirs = [], []
    steps = run_ours(decoder, prefix, new)
    began = 0.0

    def after(ids: Tensor, scores: object) -> Tensor:
        nonlocal began
        if ids.shape[1] % TURN == 0:
            theirs.append(time.perf_counter() - began)
            start = time.perf_counter()
            ours.extend(next(steps) for _ in range(TURN))
            mine.append(time.perf_counter() - start)
            began = time.perf_counter()
        return torch.zeros(len(ids), dtype=torch.bool)

    began = time.perf_counter()
    expected = run_theirs(peer, prefix, new, cache, after)
    found = torch.stack([step.ids for step in ours], dim=1)
    if not torch.equal(found, expected):
        first = int((found != expected).any(0).nonzero()[0])
        raise SystemExit(f"the tokens differ, the first time at token {first}")
    return mine, theirs, len(found.unique())


def peak(side: str, size: str, batch: int, length: int, new: int, cache: str) -> float:
    """Return by how much a process grows (MiB) while it decodes."""
    options = {"memory-of": side, "sizes": size, "batches": batch, "new": new, "cache": cache, "prefix": length}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run([sys.executable, "-P", __file__, *arguments], stdout=subprocess.PIPE, check=True)
    grown: float = json.loads(done.stdout)
    return grown


def high_water() -> float:
    """Return the most memory this process has had, in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def print_growth(side: str, size: str, batch: int, length: int, new: int, cache: str) -> None:
    """Decode, and print the growth of this process in MiB."""
    decoder, peer = build_pair(size, length + new)
    prefix = torch.randn(batch, length, decoder.backbone.config.dim)

    def run(count: int) -> None:
        if side == "ours":
            for _ in run_ours(decoder, prefix, count):
                pass
        else:
            run_theirs(peer, prefix, count, cache)

    run(2)  # libraries' own buffers
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark restarts at what is held now
    before = high_water()
    run(new)
    print(json.dumps(high_water() - before))


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, nargs="+", default=[1000, 4000], help="new tokens; the most are generated")
    parser.add_argument("--prefix", type=int, default=PREFIX, help="more shows what a token costs late in a sequence")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--cache", default="dynamic", choices=["dynamic", "static"], help="the peer's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true", help="peak memory too, in processes of its own")
    parser.add_argument("--memory-of", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if any(new % TURN for new in args.new):
        parser.error(f"--new must be multiples of {TURN}")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    most = max(args.new)
    if args.memory_of:
        print_growth(args.memory_of, args.sizes[0], args.batches[0], args.prefix, most, args.cache)
        return
    print(
        f"torch {torch.__version__}, {args.threads} threads, fp32, greedy, prefix of {args.prefix}; {args.cache} cache"
    )
    for size in args.sizes:
        decoder, peer = build_pair(size, args.prefix + most)
        for batch in args.batches:
            shape = (batch, args.prefix, decoder.backbone.config.dim)
            prefix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            compare(decoder, peer, prefix[:, :PREFIX], min(most, 2 * TURN), args.cache)  # warm-up
            mine, theirs, distinct = compare(decoder, peer, prefix, most, args.cache)
            print(f"\n{size}, batch {batch}: same {most:,} tokens, of {distinct} kinds\n")
            print("| new tokens | ours, tokens/s | transformers, tokens/s | ratio | ours, ms of the last | theirs |")
            print("| ---: | ---: | ---: | ---: | ---: | ---: |")
            for new in args.new:
                turns, last = new // TURN, max(1, new // TURN // 10)  # the last tenth
                a, b = sum(mine[:turns]), sum(theirs[:turns])
                ends = [1000 * sum(t[turns - last : turns]) / (last * TURN) for t in (mine, theirs)]
                rates = f"{batch * new / a:,.1f} | {batch * new / b:,.1f} | {b / a:.2f}"
                print(f"| {new:,} | {rates} | {ends[0]:.2f} | {ends[1]:.2f} |", flush=True)
            if args.memory:
                grown = [peak(side, size, batch, args.prefix, most, args.cache) for side in ("ours", "theirs")]
                print(f"\nmemory for it: ours {grown[0]:,.0f} MiB, transformers {grown[1]:,.0f} MiB", flush=True)


if __name__ == "__main__":
    main()
