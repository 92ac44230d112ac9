"""Decoding: tokens a second beside ``transformers``, and what a longer context costs in time and state.

    python benchmarks/decoding.py                    (needs the extra `bench`)

Both sides hold the same random Mamba-2 weights and must give the same tokens (greedy); they run in turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable

import torch
from mamba2 import rename
from torch import nn

from vertebra.backbones.base import create_backbone
from vertebra.backbones.decoding import Decoder, Stop, Strategy, generate
from vertebra.backbones.hybrid import HybridConfig

VOCABULARY = 12


def build_pair(dim: int, depth: int) -> tuple[Decoder, nn.Module]:
    """Return our decoder and the peer's causal language model, with the same weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    shape = {"hidden_size": dim, "num_hidden_layers": depth, "num_heads": 2 * dim // 64, "head_dim": 64}
    config = transformers.Mamba2Config(**shape, state_size=64, n_groups=1, vocab_size=VOCABULARY, eos_token_id=None)
    peer = transformers.Mamba2ForCausalLM(config).eval()
    with torch.no_grad():
        peer.lm_head.weight.mul_(30)  # so that the next token is no toss-up that rounding decides
    ours = HybridConfig(dim=dim, depth=depth, pattern="M", hidden_dim=0, mamba_head_dim=64, state_dim=64).build().eval()
    ours.load_state_dict(rename(peer.backbone.state_dict()))
    return Decoder(ours, peer.backbone.embeddings, peer.lm_head), peer


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--new", type=int, default=128, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 8192, 65536])
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {args.threads} threads, fp32, greedy, {args.new} new tokens")
    decoder, peer = build_pair(256, 4)
    print("\n| Mamba-2, 4 layers, width 256 | tokens/s, ours / transformers | same tokens | ours, ms a step |")
    print("| --- | ---: | ---: | ---: |")
    stop, strategy = Stop(max_new=args.new), Strategy(method="greedy")
    for batch, compiled in ((1, False), (1, True), (16, False), (16, True)):
        decoder = dataclasses.replace(decoder, compiled=compiled)
        prompts = torch.randint(VOCABULARY, (batch, 128))

        def ours(prompts: torch.Tensor = prompts, decoder: Decoder = decoder) -> torch.Tensor:
            return torch.stack([g.ids for g in generate(decoder, prompts, stop, strategy)])

        def theirs(prompts: torch.Tensor = prompts) -> torch.Tensor:
            options = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False}
            mask = torch.ones_like(prompts)  # else the peer takes some tokens for padding
            return peer.generate(prompts, attention_mask=mask, **options)[:, prompts.shape[1] :]

        same = (ours() == theirs()).float().mean().item()
        times = [(seconds(ours), seconds(theirs)) for _ in range(args.repeats)]
        ratio = statistics.median(b / a for a, b in times)
        step = 1000 * statistics.median(a for a, _ in times) / args.new
        print(
            f"| batch {batch}, {'compiled' if compiled else 'eager'} | {ratio:.2f} | {same:.1%} | {step:.2f} |",
            flush=True,
        )

    names = {
        "Mamba-2": "hybrid_nano,pattern=M",
        "hybrid (1 of 6 layers attention)": "hybrid_nano",
        "attention": "illama_nano",
        "attention, window 256": "illama_nano,window=256",
    }
    header = " | ".join(f"{c:,}" for c in args.contexts)
    speed, size = [], []
    for label, name in names.items():
        backbone = create_backbone(name).eval()
        rates, bytes_held = [], []
        for context in args.contexts:
            state = backbone.init_state(1, context + args.new + 16)
            with torch.inference_mode():
                for part in torch.randn(1, context, backbone.config.dim).split(2048, dim=1):
                    backbone.step(part, state)
                x = torch.randn(1, 1, backbone.config.dim)
                for _ in range(8):
                    backbone.step(x, state)
                start = time.perf_counter()
                for _ in range(args.new):
                    backbone.step(x, state)
            rates.append(args.new / (time.perf_counter() - start))
            bytes_held.append(state.nbytes / 1024)
        speed.append(f"| {label} | {rates[0]:.0f}/s | " + " | ".join(f"{r / rates[0]:.2f}" for r in rates[1:]) + " |")
        size.append(f"| {label} | " + " | ".join(f"{b:,.0f}" for b in bytes_held) + " |")
    for title, table in (("steps a second, relative to the first context", speed), ("state in KiB", size)):
        print(f"\n{title} (batch 1)\n\n| backbone | {header} |\n| --- |" + " ---: |" * len(args.contexts))
        print("\n".join(table))


if __name__ == "__main__":
    main()
