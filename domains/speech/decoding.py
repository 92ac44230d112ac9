"""From CTC posteriors to token ids: greedy, and prefix beam search with scorers.

Prefix beam search sums over all paths that spell a prefix (https://arxiv.org/abs/1408.2873, algorithm 1): it holds, for
each prefix, the log-probability of the paths that end in a blank and of those that do not.

Legend: B batch, T frames, V tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vertebra.domains.speech.alignment import forced_align
from vertebra.errors import ConfigError, DataError, ShapeError

NEVER = -math.inf
EXACT_BYTES = 2**30  # beyond it, hypotheses are aligned in a band
BAND = 4096
MEMORY = 2**18  # answers of a scorer that are remembered


@dataclass(frozen=True)
class Hypothesis:
    """A decoded recording.

    Args:
        ids: Its tokens, without blanks.
        score: Natural log-probability that the CTC posteriors give them: of the single best path for greedy, of all
            paths for a beam search, save those that its pruning lost.
        total: ``score`` and what scorers added; hypotheses are ranked by it.
        frames: Frame of the best path at which each token is most probable.
        confidence: Probability of each token at that frame.
    """

    ids: tuple[int, ...]
    score: float
    total: float
    frames: tuple[int, ...]
    confidence: tuple[float, ...]


class Scorer(Protocol):
    """Adds to the log-probability of a prefix while it grows; a state belongs to one prefix and is never changed."""

    def start(self) -> Any:
        """Return the state of the empty prefix."""

    def extend(self, state: Any, token: int) -> tuple[Any, float]:
        """Return the state after one more token, and what the token adds (natural log)."""

    def finish(self, state: Any) -> float:
        """Return what the end of the text adds."""


@dataclass(frozen=True)
class CombinedScorer:
    """The sum of several scorers."""

    scorers: tuple[Scorer, ...]

    def start(self) -> tuple[Any, ...]:
        """Return the states of all."""
        return tuple(s.start() for s in self.scorers)

    def extend(self, state: tuple[Any, ...], token: int) -> tuple[tuple[Any, ...], float]:
        """Return the states after one more token, and the sum of what it adds."""
        states, total = [], 0.0
        for scorer, part in zip(self.scorers, state, strict=True):
            after, added = scorer.extend(part, token)
            states.append(after)
            total += added
        return tuple(states), total

    def finish(self, state: tuple[Any, ...]) -> float:
        """Return the sum of what the end adds."""
        return sum(s.finish(part) for s, part in zip(self.scorers, state, strict=True))


def greedy(log_probs: torch.Tensor, lengths: torch.Tensor, blank: int = 0) -> list[Hypothesis]:
    """Take the best token of every frame, merge repeats and drop blanks.

    Args:
        log_probs: Log-probabilities (B, T, V).
        lengths: Frames of each recording (B,).
        blank: Id of the blank.
    """
    check(log_probs, 3, blank, "greedy")
    batch, length, _ = log_probs.shape
    check_lengths(lengths, batch, length, "greedy")
    if not batch or not length:
        return [Hypothesis((), 0.0, 0.0, (), ()) for _ in range(batch)]
    frame = torch.arange(length, device=log_probs.device)
    real = frame < lengths.to(log_probs.device)[:, None]  # (B, T)
    values, best = log_probs.max(dim=2)
    check_values(values[real], "greedy")  # padding may hold anything
    values = values.float()
    best = best.masked_fill(~real, blank)
    scores = values.masked_fill(~real, 0).double().sum(dim=1).tolist()
    voiced = best != blank
    fires = voiced & (best != torch.nn.functional.pad(best[:, :-1], (1, 0), value=blank))
    counts = fires.sum(dim=1).tolist()
    number = fires.flatten().cumsum(0)[voiced.flatten()] - 1  # which token of the batch a voiced frame belongs to
    inside = values[voiced]
    peak = inside.new_full((sum(counts),), NEVER).scatter_reduce(0, number, inside, "amax")
    when = frame.expand(batch, -1)[voiced]
    when = torch.where(inside == peak[number], when, length)
    first = when.new_full((sum(counts),), length).scatter_reduce(0, number, when, "amin")
    parts = [tensor.split(counts) for tensor in (best[fires].cpu(), first.cpu(), peak.exp().cpu())]
    return [
        Hypothesis(tuple(ids.tolist()), score, score, tuple(frames.tolist()), tuple(probs.tolist()))
        for score, ids, frames, probs in zip(scores, *parts, strict=True)
    ]


def beam_decode(log_probs: torch.Tensor, lengths: torch.Tensor, **options: Any) -> list[list[Hypothesis]]:
    """Run ``prefix_beam_search`` on each recording of a batch.

    Args:
        log_probs: Log-probabilities (B, T, V).
        lengths: Frames of each recording (B,).
        **options: Those of ``prefix_beam_search``.

    Returns:
        The hypotheses of each recording, best first.
    """
    check(log_probs, 3, options.get("blank", 0), "beam_decode")
    check_lengths(lengths, log_probs.shape[0], log_probs.shape[1], "beam_decode")
    return [prefix_beam_search(row[:n], **options) for row, n in zip(log_probs, lengths.tolist(), strict=True)]


def prefix_beam_search(
    log_probs: torch.Tensor,
    *,
    beam: int = 16,
    top_k: int = 20,
    min_log_prob: float = -5.0,
    blank: int = 0,
    nbest: int = 1,
    scorer: Scorer | None = None,
    blank_skip: float | None = None,
) -> list[Hypothesis]:
    """Search for the token sequences of greatest probability, summed over their paths.

    Exact when ``beam``, ``top_k`` and ``min_log_prob`` drop nothing. Equal totals are ordered by their ids. No scorer
    brings back a token that was not tried: for rare hot words lower ``min_log_prob``.

    Args:
        log_probs: Log-probabilities (T, V) of one recording, without padding.
        beam: Prefixes kept after each frame.
        top_k: Tokens tried at each frame; the blank is always one more.
        min_log_prob: Tokens below it are not tried, save the best of the frame.
        blank: Id of the blank.
        nbest: Hypotheses to return; there may be fewer.
        scorer: Adds to the log-probability: hot words, a language model.
        blank_skip: Of neighbouring frames in which the blank is more probable than this all but one count as
            blank for certain; faster. None for all frames.

    Returns:
        The hypotheses, best first.
    """
    check(log_probs, 2, blank, "prefix_beam_search")
    check_values(log_probs, "prefix_beam_search")
    if min(beam, top_k, nbest) < 1:
        raise ConfigError(
            f"prefix_beam_search: beam, top_k and nbest must be at least 1, got {beam}, {top_k} and {nbest}."
        )
    if nbest > beam:
        raise ConfigError(f"prefix_beam_search: nbest must not exceed the beam, got {nbest} and {beam}.")
    kept, skipped = kept_frames(log_probs, blank, blank_skip)
    values = log_probs if len(kept) == len(log_probs) else log_probs[kept.to(log_probs.device)]
    search = Search(values.shape[1], blank, beam, scorer)
    for blank_score, tokens in frame_tokens(values, top_k, min_log_prob, blank):
        search.advance(blank_score, tokens)
    if not search.nodes:
        raise DataError("prefix_beam_search: some frame gives every token that is tried a probability of 0.")
    found = []
    for ids, score, total in search.results(nbest):
        frames, probs = peaks(values, ids, blank)
        times = tuple(kept[list(frames)].tolist())
        found.append(Hypothesis(ids, score + skipped, total + skipped, times, probs))
    return found


class Search:
    """The prefixes of one recording: a tree of which some nodes are in the beam.

    A prefix outside of the beam can be reached from its parent alone. So probabilities are added only where a prefix
    and its parent both are in the beam, and a node is made only for what survives.
    """

    def __init__(self, size: int, blank: int, beam: int, scorer: Scorer | None) -> None:
        self.size, self.beam, self.scorer = size, beam, scorer
        self.children: dict[int, int] = {}  # node * V + token -> node
        self.parents, self.lasts = [-1], [blank]
        self.states: list[Any] = [None if scorer is None else scorer.start()]
        self.added = [0.0]  # by the scorer, up to the node
        self.known: dict[int, tuple[Any, float]] = {}  # node * V + token -> what the scorer said
        # The beam: node, log P of paths that end in a blank, of those that do not, of both.
        self.nodes, self.blanks, self.voiced, self.both = [0], [0.0], [NEVER], [0.0]

    def advance(self, blank_score: float, tokens: dict[int, float]) -> None:
        """Read one frame: log P of the blank, and of the tokens to try."""
        if not tokens and blank_score > NEVER:
            self.blanks = self.both = [b + blank_score for b in self.both]
            self.voiced = [NEVER] * len(self.nodes)
            return
        if len(self.known) > MEMORY:
            self.known.clear()
        nodes, size, children, added = self.nodes, self.size, self.children, self.added
        blanks = [b + blank_score for b in self.both]
        lasts = [self.lasts[node] for node in nodes]
        voiced = [v + tokens.get(last, NEVER) for v, last in zip(self.voiced, lasts, strict=True)]
        floor = NEVER
        if len(nodes) == self.beam:  # what is worse than all that stay cannot come in
            floor = min(max(b, v) + added[n] for b, v, n in zip(blanks, voiced, nodes, strict=True))
        place = {node: index for index, node in enumerate(nodes)}
        fresh: list[tuple[float, float, int]] = []  # total, log P, node * V + token
        for node, last, old_blank, old_both in zip(nodes, lasts, self.blanks, self.both, strict=True):
            base, so_far = node * size, added[node]
            for token, value in tokens.items():
                score = (old_blank if token == last else old_both) + value
                key = base + token
                index = place.get(children.get(key, -1))
                if index is not None:
                    voiced[index] = log_add(voiced[index], score)
                elif score > NEVER:
                    total = score + so_far if self.scorer is None else score + so_far + self.extend(key, token)
                    if total >= floor:
                        fresh.append((total, score, key))
        self.keep(blanks, voiced, fresh)

    def extend(self, key: int, token: int) -> float:
        """Ask the scorer once about a token after a node."""
        known = self.known.get(key)
        if known is None:
            assert self.scorer is not None
            known = self.known[key] = self.scorer.extend(self.states[key // self.size], token)
        return known[1]

    def keep(self, blanks: list[float], voiced: list[float], fresh: list[tuple[float, float, int]]) -> None:
        """Make the best of old and new prefixes the beam; of equals, those that came first."""
        rows: list[tuple[float, int, float, float, float]] = []  # total, node or ~key, blank, voiced, both
        for node, b, v in zip(self.nodes, blanks, voiced, strict=True):
            both = log_add(b, v)
            if both > NEVER:
                rows.append((both + self.added[node], node, b, v, both))
        rows += [(total, ~key, NEVER, score, score) for total, score, key in fresh]
        rows.sort(key=first, reverse=True)
        del rows[self.beam :]
        self.nodes = [row[1] if row[1] >= 0 else self.node(~row[1]) for row in rows]
        self.blanks = [row[2] for row in rows]
        self.voiced = [row[3] for row in rows]
        self.both = [row[4] for row in rows]

    def node(self, key: int) -> int:
        """Return the node of a parent and a token, made if it is new."""
        node = self.children.get(key)
        if node is None:
            node = self.children[key] = len(self.parents)
            parent, token = divmod(key, self.size)
            state, gain = (None, 0.0) if self.scorer is None else self.known.pop(key)
            self.parents.append(parent)
            self.lasts.append(token)
            self.states.append(state)
            self.added.append(self.added[parent] + gain)
        return node

    def results(self, count: int) -> list[tuple[tuple[int, ...], float, float]]:
        """Ids, log P and total of the best prefixes."""
        rows = []
        for node, score in zip(self.nodes, self.both, strict=True):
            end = 0.0 if self.scorer is None else self.scorer.finish(self.states[node])
            rows.append((self.ids(node), score, score + self.added[node] + end))
        rows.sort(key=lambda row: (-row[2], row[0]))
        return rows[:count]

    def ids(self, node: int) -> tuple[int, ...]:
        """Spell a prefix."""
        tokens = []
        while node:
            tokens.append(self.lasts[node])
            node = self.parents[node]
        return tuple(reversed(tokens))


def first(row: tuple[float, int, float, float, float]) -> float:
    """Return what rows are sorted by."""
    return row[0]


def log_add(a: float, b: float) -> float:
    """Return log(exp(a) + exp(b))."""
    if a < b:
        a, b = b, a
    return a if b == NEVER else a + math.log1p(math.exp(b - a))


def kept_frames(log_probs: torch.Tensor, blank: int, threshold: float | None) -> tuple[torch.Tensor, float]:
    """Return the frames to search, and the log-probability of the blanks in the others.

    One of a run of blank frames stays: without it, ``a blank a`` would become a single ``a``.
    """
    length = len(log_probs)
    if threshold is None or not length:
        return torch.arange(length), 0.0
    if not 0 < threshold < 1:
        raise ConfigError(f"prefix_beam_search: blank_skip must lie between 0 and 1, got {threshold}.")
    column = log_probs[:, blank].double().cpu()
    silent = column > math.log(threshold)
    drop = silent & torch.nn.functional.pad(silent[:-1], (1, 0))
    return torch.arange(length)[~drop], column[drop].sum().item()


def frame_tokens(
    log_probs: torch.Tensor, top_k: int, min_log_prob: float, blank: int
) -> list[tuple[float, dict[int, float]]]:
    """Return for each frame log P of the blank, and of the other tokens to try, in the order of their ids."""
    length, size = log_probs.shape
    blanks = log_probs[:, blank].double().tolist()
    if not length:
        return []
    values, ids = log_probs.topk(min(top_k + 1, size), dim=1)  # one more, as the blank may be among them
    best = values[:, :1].clone()
    values = values.masked_fill(ids == blank, NEVER)
    tries = ((values >= min_log_prob) | (values == best)) & (values > NEVER)
    tries &= tries.cumsum(1) <= top_k
    rows = tries.nonzero()[:, 0].tolist()
    chosen = zip(rows, ids[tries].tolist(), values[tries].double().tolist(), strict=True)
    frames: list[dict[int, float]] = [{} for _ in range(length)]
    for row, token, value in sorted(chosen):
        frames[row][token] = value
    return list(zip(blanks, frames, strict=True))


def peaks(log_probs: torch.Tensor, ids: tuple[int, ...], blank: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Align a hypothesis; the frame of each token where it is most probable, and its probability there."""
    if not ids:
        return (), ()
    band = BAND if len(log_probs) * (2 * len(ids) + 1) > EXACT_BYTES else None
    spans = forced_align(log_probs, ids, blank, band=band)
    starts = torch.tensor([s.start for s in spans])
    widths = torch.tensor([s.end for s in spans]) - starts
    owner = torch.arange(len(ids)).repeat_interleave(widths)
    step = torch.arange(len(owner)) - (widths.cumsum(0) - widths)[owner]
    frame = starts[owner] + step
    values = log_probs[frame.to(log_probs.device), torch.tensor(ids)[owner].to(log_probs.device)].float().cpu()
    peak = torch.full((len(ids),), NEVER).scatter_reduce(0, owner, values, "amax")
    when = torch.where(values == peak[owner], frame, len(log_probs))
    frames = torch.full((len(ids),), len(log_probs)).scatter_reduce(0, owner, when, "amin")
    return tuple(frames.tolist()), tuple(peak.exp().tolist())


def check(log_probs: torch.Tensor, dims: int, blank: int, who: str) -> None:
    """Raise unless the shape is right and the blank is among the tokens."""
    names = "(T, V)" if dims == 2 else "(B, T, V)"
    if log_probs.ndim != dims or log_probs.shape[-1] < 1:
        raise ShapeError(f"{who}: log_probs must be {names}, got {tuple(log_probs.shape)}.")
    if not 0 <= blank < log_probs.shape[-1]:
        raise ConfigError(f"{who}: the blank must be one of the {log_probs.shape[-1]} tokens, got {blank}.")


def check_values(log_probs: torch.Tensor, who: str) -> None:
    """Raise unless these can be log-probabilities."""
    if log_probs.numel():
        greatest = log_probs.max().item()  # a NaN wins
        if math.isnan(greatest):
            raise DataError(f"{who}: the log-probabilities hold NaN; the model or its input is broken.")
        if greatest > 1e-3:
            raise DataError(f"{who}: log-probabilities are at most 0, found {greatest:.3g}; apply log_softmax.")


def check_lengths(lengths: torch.Tensor, batch: int, length: int, who: str) -> None:
    """Raise unless there is a length within the frames for each recording."""
    if lengths.shape != (batch,):
        raise ShapeError(f"{who}: lengths must be ({batch},), got {tuple(lengths.shape)}.")
    if batch and not 0 <= int(lengths.min()) <= int(lengths.max()) <= length:
        raise DataError(f"{who}: lengths must lie in 0..{length}, found {int(lengths.min())}..{int(lengths.max())}.")


def combine(scorers: Sequence[Scorer]) -> Scorer | None:
    """Return one scorer for all of them; None for none."""
    if len(scorers) < 2:
        return scorers[0] if scorers else None
    return CombinedScorer(tuple(scorers))
