"""Chunks a second of tokenizers of actions, beside FAST and beside what the original of BEAST computes.

    OMP_NUM_THREADS=1 taskset -c 1 python -P benchmarks/action_speed.py --data ../shared/data/action    # 90 s

Chunks of the Unitree G1 that begin at every step, in random order, all 26 dimensions or the 7 of one arm; 10 control
points of degree 4; one thread. Encoding goes from actions to ids, decoding back. The peers:

- FAST, original: orthonormal DCT of scipy, byte-level BPE of the library ``tokenizers``, a chunk after the other.
- FAST, ours: a product with the cosines, BPE of the same library, a batch at once.
- system a chunk: the original of BEAST writes down one system for all dimensions of every chunk, block-diagonal
  (D * T, D * N), and solves it with ``torch.linalg.solve``. Both directions evaluate the basis in every call, here over
  all functions at once.
- system a call: the same, but one system for the whole batch, which is what the chunks have in common.

Actions come to the original FAST scaled already, which ours does itself. Before it is timed, what a peer encodes and
decodes is compared with ours. Every call has other chunks, so that no peer finds in its cache what it was asked before.
Rounds alternate between all of them; a number is the median of the rounds, in seconds of the processor, and a ratio how
many times faster the B-splines are than the peer. Prints the table.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scipy.fft
import torch
from tokenizers import ByteLevelBPETokenizer  # type: ignore[attr-defined]  # the library, not our folder
from tokenizers.trainers import BpeTrainer
from torch import Tensor

from vertebra.domains.action.episodes import windows
from vertebra.domains.action.sources import read_demonstrations
from vertebra.tokenizers.bspline import BSplineTokenizer, clamped_knots
from vertebra.tokenizers.fast import FASTTokenizer

BASIS, DEGREE, RIDGE = 10, 4, 1e-5
HORIZONS, DIMS, BATCHES = (20, 50), (7, 26), (1, 256)
EVERY = 10  # of the chunks, one is learnt from
SCALE = 10
LEAST_S = 0.02  # seconds of one measurement; calls are repeated until then
ROUNDS = 9
SLOW_S = 0.5  # from here on a call is measured in the first rounds only
SLOW_ROUNDS = 3
MOST_CALLS = 8000  # of which every one has other chunks
Call = Callable[[Any], object]


# ---------------------------------------------------------------- peers


class OriginalFAST:
    """Rounded DCT coefficients as characters, and byte-level BPE; chunks (B, T, D) scaled to [-1, 1]."""

    def __init__(self, chunks: np.ndarray) -> None:
        self.shape = chunks.shape[1:]
        found = self.coefficients(chunks)
        self.least = int(found.min())
        alphabet = [chr(i) for i in range(int(found.max()) - self.least + 1)]
        trainer = BpeTrainer(
            vocab_size=1024,
            min_frequency=2,
            show_progress=False,
            special_tokens=[],
            initial_alphabet=alphabet,
            max_token_length=10_000,
        )
        self.bpe = ByteLevelBPETokenizer()
        self.bpe._tokenizer.train_from_iterator(map(self.text, found), trainer)

    def coefficients(self, chunks: np.ndarray) -> np.ndarray:
        """Return rounded coefficients (B, T, D)."""
        return np.around(scipy.fft.dct(chunks, axis=1, norm="ortho") * SCALE)

    def text(self, rounded: np.ndarray) -> str:
        """Write the coefficients (T, D) of one chunk."""
        return "".join(map(chr, np.maximum(rounded.flatten() - self.least, 0).astype(int)))

    def encode(self, chunks: np.ndarray) -> list[list[int]]:
        """Return the ids of each chunk."""
        return [self.bpe.encode(self.text(each)).ids for each in self.coefficients(chunks)]

    def decode(self, ids: list[list[int]]) -> np.ndarray:
        """Return chunks (B, T, D); as in the original, zeros for what has lost a coefficient that was never seen."""
        rows = [np.array([ord(char) for char in self.bpe.decode(row)]) + self.least for row in ids]
        size = math.prod(self.shape)
        found = np.stack([(row if len(row) == size else np.zeros(size)).reshape(self.shape) for row in rows])
        return scipy.fft.idct(found / SCALE, axis=1, norm="ortho")


class BlockDiagonal:
    """B-splines as one problem for all dimensions; ``shared`` for one system a call instead of one a chunk."""

    def __init__(self, like: BSplineTokenizer, shared: bool) -> None:
        self.shared, self.horizon, self.dims, self.levels = shared, like.horizon, like.dims, like.vocab_size - 1
        self.knots = torch.tensor(clamped_knots(BASIS, DEGREE), dtype=torch.float32)
        self.times = torch.linspace(0, 1, like.horizon)
        self.low, self.high = (torch.tensor(bounds).T.flatten() for bounds in (like.low, like.high))  # (D * N,)

    def basis(self, times: Tensor) -> Tensor:
        """Evaluate all functions at times (B, T) by the recursion of Cox and de Boor, (B, T, N)."""
        x, knots = times[..., None], self.knots
        last = BASIS - 1  # of the spans that are not empty; it holds its right end
        found = ((x >= knots[:-1]) & (x < knots[1:])).float()
        found[..., last] += (times == 1).float()
        for order in range(1, DEGREE + 1):
            width = knots[order:] - knots[:-order]
            part = torch.where(width > 0, (x - knots[:-order]) / width, 0.0)  # of each function of the order before
            found = (
                part[..., :-1] * found[..., :-1] + torch.where(width[1:] > 0, 1 - part[..., 1:], 0.0) * found[..., 1:]
            )
        return found

    def encode(self, chunks: Tensor) -> Tensor:
        """Map chunks (B, T, D) to ids (B, N * D)."""
        batch, dims = len(chunks), self.dims
        times = self.times.repeat(1 if self.shared else batch, 1)
        basis = self.basis(times)
        big = torch.zeros(len(times), dims, self.horizon, dims, BASIS)
        for d in range(dims):
            big[:, d, :, d] = basis
        big = big.view(len(times), dims * self.horizon, dims * BASIS)
        gram = big.mT @ big + RIDGE * torch.eye(dims * BASIS)
        targets = chunks.mT.reshape(batch, -1)
        if self.shared:
            points = torch.linalg.solve(gram[0], (targets @ big[0]).T).T
        else:
            points = torch.linalg.solve(gram, (big.mT @ targets[..., None])[..., 0])
        points = torch.clamp(points, self.low, self.high)
        ids = torch.round((points - self.low) / (self.high - self.low) * self.levels).long()
        return ids.view(batch, dims, BASIS).mT.reshape(batch, -1)

    def decode(self, ids: Tensor) -> Tensor:
        """Map ids (B, N * D) to chunks (B, T, D)."""
        rows = ids.view(len(ids), BASIS, self.dims).mT.reshape(len(ids), -1)
        points = rows / self.levels * (self.high - self.low) + self.low
        basis = self.basis(self.times.repeat(1 if self.shared else len(ids), 1))
        return basis @ points.view(len(ids), self.dims, BASIS).mT


# ---------------------------------------------------------------- timing


def medians(calls: list[tuple[Call, list[Any]]]) -> list[float]:
    """Time functions in turn, each on its own inputs one after the other; return the median seconds of a call."""
    counts, inputs = [], [itertools.cycle(own) for _, own in calls]
    for (call, _), own in zip(calls, inputs, strict=True):
        call(next(own))
        start = time.process_time()
        call(next(own))
        counts.append(max(1, round(LEAST_S / max(time.process_time() - start, 1e-6))))
    found: list[list[float]] = [[] for _ in calls]
    for number in range(ROUNDS):
        for (call, _), own, count, times in zip(calls, inputs, counts, found, strict=True):
            if number >= SLOW_ROUNDS and times[0] > SLOW_S:
                continue
            given = list(itertools.islice(own, count))
            start = time.process_time()
            for each in given:
                call(each)
            times.append((time.process_time() - start) / count)
    return [statistics.median(times) for times in found]


def compare(chunks: Tensor) -> None:
    """Print the lines of all batch sizes for chunks (n, T, D), in random order."""
    horizon, dims = chunks.shape[1:]
    known = chunks[::EVERY]
    ours = BSplineTokenizer(horizon, dims, num_basis=BASIS, degree=DEGREE, ridge=RIDGE).fit(known)
    fast = FASTTokenizer(horizon=horizon, dims=dims, scale=SCALE).fit(known)
    low, high = torch.tensor(fast.low), torch.tensor(fast.high)
    scaled = ((chunks - low) / (high - low) * 2 - 1).double().numpy()
    original = OriginalFAST(scaled[::EVERY])
    a_chunk, a_call = BlockDiagonal(ours, shared=False), BlockDiagonal(ours, shared=True)
    check(ours, (a_chunk, a_call), chunks[:16])
    back = torch.from_numpy(original.decode(original.encode(scaled[:256]))).float()
    back = (back + 1) / 2 * (high - low) + low
    lost = (back - fast.decode(fast.encode(chunks[:256]))).abs().amax((1, 2)) > 1e-4
    assert lost.float().mean() < 0.1, f"FAST: {lost.sum()} of 256 chunks differ"  # coefficients that were never seen
    for batch in BATCHES:
        whole = min(len(chunks) // batch, MOST_CALLS) * batch
        x, y = list(chunks[:whole].split(batch)), np.split(scaled[:whole], whole // batch)
        ids, fast_ids = ([tokenizer.encode(each) for each in x] for tokenizer in (ours, fast))
        original_ids = [original.encode(each) for each in y]
        peers: list[tuple[Any, list[Any], list[Any]]] = [
            (ours, x, ids),
            (original, y, original_ids),
            (fast, x, fast_ids),
            (a_chunk, x, ids),
            (a_call, x, ids),
        ]
        for name, calls in (
            ("encode", [(peer.encode, given) for peer, given, _ in peers]),
            ("decode", [(peer.decode, given) for peer, _, given in peers]),
        ):
            first, *others = medians(calls)
            cells = [f"{1e6 * first:.1f}", f"{batch / first:,.0f}"]
            cells += [f"{batch / seconds:,.0f} ({seconds / first:.1f})" for seconds in others]
            print(f"| {name} | {horizon} | {dims} | {batch} | {' | '.join(cells)} |", flush=True)


def check(ours: BSplineTokenizer, peers: Sequence[BlockDiagonal], chunks: Tensor) -> None:
    """Compare ids and decoded chunks with those of the systems; ids may round the other way, to the next one."""
    ids = ours.encode(chunks)
    for peer in peers:
        assert (peer.encode(chunks) - ids).abs().max() <= 1, "ids"
        torch.testing.assert_close(peer.decode(ids), ours.decode(ids), atol=1e-5, rtol=0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/action"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    episodes = read_demonstrations([args.data / "unitree_g1"]).episodes
    names = ("FAST, original", "FAST, ours", "system a chunk", "system a call")
    print(f"| | T | D | batch | B-splines, µs a call | chunks/s | {' | '.join(f'{each} (ratio)' for each in names)} |")
    print("| --- |" + " ---: |" * (5 + len(names)))
    for horizon in HORIZONS:
        chunks = torch.from_numpy(np.concatenate([windows(each, horizon)[0] for each in episodes]))
        order = torch.randperm(len(chunks), generator=torch.Generator().manual_seed(0))
        for dims in DIMS:
            compare(chunks[order, :, :dims])


if __name__ == "__main__":
    main()
