"""CTC decoding: our prefix beam search beside torchaudio's ``ctc_decoder`` (flashlight-text) without lexicon.

    python benchmarks/speech_decoding.py             (needs the extra `speech`)

Both read the same random, peaky log-probabilities with the same beam and add up paths; they run in turn, on one thread.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torchaudio
from torchaudio.models.decoder import CTCDecoder, ctc_decoder

from vertebra.domains.speech.decoding import greedy, prefix_beam_search
from vertebra.domains.speech.flashlight import ctc_score


def posteriors(frames: int, size: int, doubt: float, seed: int) -> torch.Tensor:
    """Return peaky log-probabilities (T, V): a token over two frames, then blanks.

    Args:
        frames: T.
        size: V.
        doubt: Share of the tokens that have a rival, of about the same probability.
        seed: Of all that is random.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(frames, size, generator=generator)
    peak = 9 + math.log(size)
    logits[:, 0] += peak / 2
    frame = 2
    while frame + 2 < frames:
        token, rival = torch.randint(1, size, (2,), generator=generator).tolist()
        logits[frame : frame + 2, token] += peak
        if torch.rand((), generator=generator).item() < doubt:
            logits[frame : frame + 2, rival] += peak + torch.randn((), generator=generator)
        frame += int(torch.randint(3, 7, (), generator=generator))
    return logits.log_softmax(-1)


def peer(size: int, beam: int, top_k: int) -> CTCDecoder:
    """Return the decoder of torchaudio, which tries as many tokens a frame."""
    return ctc_decoder(
        lexicon=None,
        tokens=[str(number) for number in range(size + 1)],
        beam_size=beam,
        beam_size_token=min(top_k + 1, size),
        log_add=True,
        blank_token="0",
        sil_token=str(size),  # a token that never sounds: no posteriors hold it
    )


def seconds(run: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=500)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 1000])
    parser.add_argument("--doubts", type=float, nargs="+", default=[0.02, 0.3])
    parser.add_argument("--beams", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--recordings", type=int, default=10)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, torchaudio {torchaudio.__version__}, 1 thread, {args.recordings} recordings of "
        f"{args.frames} frames, {args.top_k} tokens a frame. Speeds are ours / torchaudio's; 'pruned' drops tokens "
        "below the default min_log_prob, which torchaudio has no setting for. ln P is that of the text found."
    )
    print(
        "\n| tokens | in doubt | beam | speed, same tokens | same text | speed, pruned | same text "
        "| ln P, ours - torchaudio's | same as greedy | ours, ms |"
    )
    print("| ---: |" + " ---: |" * 9)
    for size, doubt, beam in itertools.product(args.sizes, args.doubts, args.beams):
        rows = [posteriors(args.frames, size, doubt, seed) for seed in range(args.recordings)]
        easy = [h.ids for h in greedy(torch.stack(rows), torch.full((len(rows),), args.frames))]
        decoder = peer(size, beam, args.top_k)
        full: dict[str, float] = {"min_log_prob": -math.inf}
        ratios: dict[str, list[float]] = {"full": [], "pruned": []}
        same, plain = {"full": 0, "pruned": 0}, 0
        spent, gains = [], []
        for row, best in zip(rows, easy, strict=True):
            wide = torch.nn.functional.pad(row, (0, 1), value=-1e4)[None]  # with the token that never sounds
            sounds = tuple(token for token in decoder(wide)[0][0].tokens.tolist() if token != size)
            theirs = seconds(partial(decoder, wide))
            for name, options in (("full", full), ("pruned", {})):
                search = partial(prefix_beam_search, row, beam=beam, top_k=args.top_k, **options)
                ids = search()[0].ids
                ours = seconds(search)
                ratios[name].append(theirs / ours)
                same[name] += ids == sounds
            plain += ids == best
            spent.append(ours)
            gains.append(ctc_score(row, ids, 0) - ctc_score(row, sounds, 0))
        speed = {name: statistics.median(values) for name, values in ratios.items()}
        count, ms = len(rows), 1000 * statistics.median(spent)
        print(
            f"| {size} | {doubt:.0%} | {beam} | {speed['full']:.2f} | {same['full'] / count:.0%} | "
            f"{speed['pruned']:.2f} | {same['pruned'] / count:.0%} | "
            f"{statistics.mean(gains):+.3f} | {plain / count:.0%} | {ms:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
