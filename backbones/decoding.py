"""Generation of tokens from any causal backbone, through its state.

Sources: nucleus sampling (https://arxiv.org/abs/1904.09751), top-k sampling (https://arxiv.org/abs/1805.04833), beam
search with the length penalty of https://arxiv.org/abs/1609.08144 (equation 14).

Shapes: B items, T positions, V vocabulary, K beams.

A prompt of any length is read in pieces of bounded size; then every step is one position. Items that end leave the
batch. The draws of an item depend on ``seed``, its number and its step alone: not on the batch it is in.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vertebra.backbones.base import Backbone, State
from vertebra.backbones.random import item_uniform
from vertebra.errors import ConfigError, LoadError, ShapeError

Allowed = Callable[[Tensor, Tensor], Tensor]
"""Grammar: given the tokens so far (B, n), prompts not included, and the items' numbers (B,), it returns which tokens
may come next, bool (B, V) or (V,). At least one must be allowed."""
Reason = Literal["stop", "length", "grammar"]


class Machine(Protocol):
    """A grammar with a memory of fixed size S an item, which follows items through the batch and through beams."""

    def begin(self, batch: int, device: torch.device) -> Tensor:
        """Return the states (B, S) before the first token."""

    def allowed(self, states: Tensor) -> Tensor:
        """Return which tokens may come next, bool (B, V)."""

    def read(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Read the tokens ids (B,); return what the embedding is given for them, (B, ...), and the new states."""


@dataclass(frozen=True)
class Decoder:
    """What generates: a causal backbone between an embedding and a head.

    Args:
        backbone: Causal.
        embed: Maps ids (B, T), or what the machine makes of them (B, T, ...), to features (B, T, D).
        head: Maps features (B, D) to logits (B, V).
        device: Where ids and state live.
        compiled: Compile the step of one position (half a minute, once for each batch size, then two to three times
            as fast for small batches, where a step's time is mostly that of calling many small operations).
        machine: Grammar with memory; it reads the prompts too.
        prefix: Features (B, P, D) of each item before its prompt, which may then be empty.
    """

    backbone: Backbone
    embed: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    compiled: bool = False
    machine: Machine | None = None
    prefix: Tensor | None = None

    def logits(self, features: Tensor, state: State, mask: Tensor | None = None) -> Tensor:
        """Advance ``state`` by features (B, T, D); return float32 logits (B, V) of the position after the last one."""
        step = self._compiled_step if self.compiled and features.shape[1] == 1 and mask is None else self.backbone.step
        return self.head(step(features, state, mask)[:, -1]).float()

    @functools.cached_property
    def _compiled_step(self) -> Callable[[Tensor, State, Tensor | None], Tensor]:
        return torch.compile(self.backbone.step)

    def read(self, ids: Tensor, states: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the features (B, 1, D) of tokens ids (B,), and the machine's states behind them."""
        if self.machine is None or states is None:
            return self.embed(ids[:, None]), None
        inputs, states = self.machine.read(states, ids)
        return self.embed(inputs[:, None]), states

    def begin(self, prompts: Sequence[Tensor] | Tensor, room: int, piece: int) -> tuple[State, Tensor, Tensor | None]:
        """Read prefix and prompts.

        Args:
            prompts: As in ``generate``.
            room: Positions to keep room for behind them.
            piece: Most positions that are read at a time.

        Returns:
            The state, the logits (B, V) of what comes next, and the machine's states.

        Raises:
            ShapeError: There is nothing to read.
        """
        ids, mask = _padded(prompts, self.device, empty=self.prefix is not None)
        count, longest = ids.shape
        states, inputs = None, ids
        if self.machine is not None:
            states = self.machine.begin(count, self.device)
            rows = []
            for place in range(longest):
                row, after = self.machine.read(states, ids[:, place])
                rows.append(row)
                states = after if mask is None else torch.where(mask[:, place, None], after, states)
            inputs = torch.stack(rows, dim=1) if rows else ids
        whole = None
        if self.prefix is not None:
            if len(self.prefix) != count:
                raise ShapeError(f"decoding: {count} prompts need as many prefixes, got {len(self.prefix)}.")
            whole = self.prefix if longest == 0 else torch.cat([self.prefix, self.embed(inputs)], dim=1)
            length = whole.shape[1]
            if mask is not None:  # padding goes before the prefix
                places = torch.arange(length, device=self.device)
                shift = longest - mask.sum(1)[:, None]  # (B, 1)
                inside = (places >= shift) & (places < shift + self.prefix.shape[1])
                source = torch.where(inside, places - shift, places)  # (B, P + T)
                whole = whole.gather(1, source[:, :, None].expand_as(whole))
                mask = places >= shift
        length = longest if whole is None else whole.shape[1]
        state = self.backbone.init_state(count, length + room, device=self.device)
        logits = None
        for start in range(0, length, piece):
            here = None if mask is None else mask[:, start : start + piece]
            if here is not None and bool(here.all()) and start == 0:
                here = None
            part = slice(start, start + piece)
            logits = self.logits(self.embed(inputs[:, part]) if whole is None else whole[:, part], state, here)
        assert logits is not None
        return state, logits, states


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """How the next token is chosen.

    Args:
        method: ``greedy``, ``sample`` or ``beam``.
        temperature: Divides the logits before sampling; below 1 sharpens.
        top_k: Sample from the k most likely tokens; 0 for all.
        top_p: Sample from the smallest set of most likely tokens whose probabilities sum to at least this; 1 for all.
        beams: Beams K of ``beam``.
        length_penalty: Beams are ranked by log-probability / ((5 + n) / 6) ** length_penalty; 0 for none.
        seed: Seed of sampling.

    Raises:
        ConfigError: A value out of its range.
    """

    method: Literal["greedy", "sample", "beam"] = "sample"
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    beams: int = 4
    length_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("greedy", "sample", "beam"):
            raise ConfigError(f"decoding: method must be greedy, sample or beam, got {self.method!r}.")
        for name, good, rule in (
            ("temperature", self.temperature > 0, "above 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("beams", self.beams >= 1, "at least 1"),
        ):
            if not good:
                raise ConfigError(f"decoding: {name} must be {rule}, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True)
class Stop:
    """When an item ends.

    Args:
        max_new: Most tokens.
        min_new: Fewest tokens: no stop before them.
        ids: Tokens that end an item; they belong to it.
        sequences: Runs of tokens that end an item.
    """

    max_new: int
    min_new: int = 0
    ids: Sequence[int] = ()
    sequences: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if self.max_new < 1:
            raise ConfigError(f"decoding: max_new must be at least 1, got {self.max_new}.")
        if not 0 <= self.min_new <= self.max_new:
            raise ConfigError(f"decoding: min_new must be from 0 to max_new ({self.max_new}), got {self.min_new}.")

    def ends(self, tokens: Tensor) -> Tensor:
        """Return which rows of tokens (B, n) have ended by their last token, bool (B,)."""
        ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        if tokens.shape[1] < self.min_new:
            return ended
        if self.ids:
            ended |= torch.isin(tokens[:, -1], torch.tensor(list(self.ids), device=tokens.device))
        for run in self.sequences:
            if 0 < len(run) <= tokens.shape[1]:
                ended |= (tokens[:, -len(run) :] == torch.tensor(list(run), device=tokens.device)).all(1)
        return ended


@dataclass(frozen=True)
class Step:
    """What one step added.

    Args:
        items: Numbers of the items that went on, (n,).
        ids: Their new tokens, (n,).
        log_probs: Log-probabilities of these under the model, before temperature and truncation, (n,).
        ended: Which of them ended with it, bool (n,).
    """

    items: Tensor
    ids: Tensor
    log_probs: Tensor
    ended: Tensor


@dataclass(frozen=True)
class Generated:
    """One generated continuation.

    Args:
        ids: New tokens, (n,).
        log_probs: Log-probability of each under the model, (n,).
        reason: Why it ended: by a stop rule, at ``max_new``, or because the grammar allowed nothing more.
    """

    ids: Tensor
    log_probs: Tensor
    reason: Reason

    @property
    def score(self) -> float:
        """Log-probability of all tokens, in nats."""
        return float(self.log_probs.sum())


@torch.inference_mode()
def generate(
    decoder: Decoder,
    prompts: Sequence[Tensor] | Tensor,
    stop: Stop,
    strategy: Strategy = Strategy(),  # frozen
    *,
    allowed: Allowed | None = None,
    numbers: Sequence[int] | None = None,
    piece: int = 2048,
) -> list[Generated]:
    """Continue every prompt.

    Args:
        decoder: What generates.
        prompts: Token ids of each item, (T_i,); or all of one length, (B, T).
        stop: When items end.
        strategy: How tokens are chosen.
        allowed: Grammar.
        numbers: Number of each item, which its draws depend on; 0, 1, ... when None.
        piece: Most prompt positions that are read at a time.

    Returns:
        One continuation an item, in the order of the prompts.
    """
    if strategy.method == "beam":
        found = []
        for i, prompt in enumerate(prompts):
            number = i if numbers is None else numbers[i]
            own = decoder if decoder.prefix is None else dataclasses.replace(decoder, prefix=decoder.prefix[i : i + 1])
            found.append(_beam(own, prompt, stop, strategy, allowed, number, piece)[0])
        return found
    count = len(prompts)
    tokens: list[list[int]] = [[] for _ in range(count)]
    log_probs: list[list[float]] = [[] for _ in range(count)]
    reasons: list[Reason] = ["length"] * count
    for step in stream(decoder, prompts, stop, strategy, allowed=allowed, numbers=numbers, piece=piece):
        rows = zip(step.items.tolist(), step.ids.tolist(), step.log_probs.tolist(), step.ended.tolist(), strict=True)
        for item, token, log_prob, ended in rows:
            if token < 0:
                reasons[item] = "grammar"
                continue
            tokens[item].append(token)
            log_probs[item].append(log_prob)
            if ended:
                reasons[item] = "stop"
    return [
        Generated(torch.tensor(t, dtype=torch.long), torch.tensor(p), reason)
        for t, p, reason in zip(tokens, log_probs, reasons, strict=True)
    ]


@torch.inference_mode()
def stream(
    decoder: Decoder,
    prompts: Sequence[Tensor] | Tensor,
    stop: Stop,
    strategy: Strategy = Strategy(),  # frozen
    *,
    allowed: Allowed | None = None,
    numbers: Sequence[int] | None = None,
    piece: int = 2048,
) -> Iterator[Step]:
    """Yield the tokens as they come, one step of all live items at a time; arguments as in ``generate``.

    An item for which the grammar allows nothing ends with the token -1.

    Raises:
        ConfigError: The strategy is ``beam``, whose tokens are known at the end only.
    """
    if strategy.method == "beam":
        raise ConfigError("decoding: beams cannot be streamed, their tokens are known at the end; use generate.")
    state, logits, states = decoder.begin(prompts, stop.max_new, piece)
    count = len(logits)
    items = torch.arange(count, device=decoder.device)
    draws = torch.as_tensor(list(numbers) if numbers is not None else range(count))
    written = torch.empty(count, stop.max_new, dtype=torch.long, device=decoder.device)
    for step in range(stop.max_new):
        raw = logits.log_softmax(-1)
        logits, stuck = _restrict(logits, decoder.machine, states, allowed, written[:, :step], items)
        if strategy.method == "greedy":
            chosen = logits.argmax(-1)
        else:
            uniform = torch.as_tensor(item_uniform(strategy.seed, step, draws[items.cpu()]), dtype=torch.float64)
            chosen = sample(logits, uniform.to(decoder.device), strategy)
        chosen = chosen.masked_fill(stuck, 0)
        log_probs = raw.gather(1, chosen[:, None])[:, 0]
        written[:, step] = chosen
        ended = stop.ends(written[:, : step + 1]) | stuck
        yield Step(items, chosen.masked_fill(stuck, -1), log_probs, ended)
        if step + 1 == stop.max_new or bool(ended.all()):
            return
        if bool(ended.any()):
            going = (~ended).nonzero()[:, 0]
            state, items, written, chosen = state.select(going), items[going], written[going], chosen[going]
            states = None if states is None else states[going]
        features, states = decoder.read(chosen, states)
        logits = decoder.logits(features, state)


def sample(logits: Tensor, uniform: Tensor, strategy: Strategy) -> Tensor:
    """Draw one token a row.

    Args:
        logits: (B, V), -inf for what may not come.
        uniform: One number in [0, 1) a row, (B,): the draw inverts the cumulative distribution with it.
        strategy: Temperature, top-k and top-p.

    Returns:
        Tokens (B,).
    """
    logits, order = (logits.double() / strategy.temperature).sort(dim=-1, descending=True, stable=True)
    probabilities = logits.softmax(-1)
    if strategy.top_k:
        probabilities[:, strategy.top_k :] = 0
    if strategy.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= strategy.top_p * probabilities.sum(-1, keepdim=True), 0)
    total = probabilities.cumsum(-1)
    place = (total <= uniform[:, None] * total[:, -1:]).sum(-1)
    last = (probabilities > 0).sum(-1) - 1  # rounding must not reach what may not come
    return order.gather(1, torch.minimum(place, last)[:, None])[:, 0]


def _restrict(
    logits: Tensor,
    machine: Machine | None,
    states: Tensor | None,
    allowed: Allowed | None,
    tokens: Tensor,
    items: Tensor,
) -> tuple[Tensor, Tensor]:
    """Return the logits with -inf for what the grammars forbid, and which rows have nothing left."""
    may = None
    if machine is not None and states is not None:
        may = machine.allowed(states)
    if allowed is not None:
        also = allowed(tokens, items).to(logits.device).expand(logits.shape)
        may = also if may is None else may & also
    if may is None:
        return logits, torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    stuck = ~may.any(-1)
    return logits.masked_fill(~may & ~stuck[:, None], -torch.inf), stuck


def _padded(
    prompts: Sequence[Tensor] | Tensor, device: torch.device, empty: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Put prompts into one batch (B, T), padded on the left, and return the mask of real positions."""
    rows = [torch.as_tensor(p, device=device).long() for p in prompts]
    if not rows or (min(map(len, rows)) == 0 and not empty):
        raise ShapeError("decoding: every prompt must have at least one token, got none; begin with a start token.")
    longest = max(map(len, rows))
    ids = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in rows])
    if all(len(row) == longest for row in rows):
        return ids, None
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) >= (longest - lengths)[:, None]


@torch.inference_mode()
def beam_search(
    decoder: Decoder,
    prompt: Tensor,
    stop: Stop,
    strategy: Strategy,
    *,
    allowed: Allowed | None = None,
    piece: int = 2048,
) -> list[Generated]:
    """Return the K best continuations of one prompt (T,), best first by the penalised log-probability.

    Args:
        decoder: What generates.
        prompt: Token ids (T,).
        stop: When a beam ends.
        strategy: Number of beams and length penalty.
        allowed: Grammar; its items' number is 0.
        piece: Most prompt positions that are read at a time.
    """
    return _beam(decoder, prompt, stop, strategy, allowed, 0, piece)


def _beam(
    decoder: Decoder, prompt: Tensor, stop: Stop, strategy: Strategy, allowed: Allowed | None, number: int, piece: int
) -> list[Generated]:
    state, logits, states = decoder.begin([prompt], stop.max_new, piece)
    tokens, log_probs = torch.empty(1, 0, dtype=torch.long, device=decoder.device), logits.new_empty(1, 0)
    done: list[tuple[float, Generated]] = []

    def rank(score: float, length: int) -> float:
        return score / ((5 + length) / 6) ** strategy.length_penalty

    def finish(row: int, reason: Reason, tokens: Tensor, log_probs: Tensor) -> None:
        result = Generated(tokens[row].cpu(), log_probs[row].cpu(), reason)
        done.append((rank(result.score, len(result.ids)), result))

    for step in range(stop.max_new):
        raw = logits.log_softmax(-1)
        items = torch.full((len(tokens),), number, device=decoder.device)
        restricted, stuck = _restrict(raw, decoder.machine, states, allowed, tokens, items)
        for row in stuck.nonzero()[:, 0].tolist():
            finish(row, "grammar", tokens, log_probs)
        scores = (log_probs.sum(1)[:, None] + restricted).masked_fill(stuck[:, None], -torch.inf)  # (K, V)
        best, flat = scores.flatten().topk(min(2 * strategy.beams, scores.numel()))
        flat = flat[best > -torch.inf]
        rows, chosen = flat // scores.shape[1], flat % scores.shape[1]
        tokens = torch.cat([tokens[rows], chosen[:, None]], dim=1)
        log_probs = torch.cat([log_probs[rows], raw[rows, chosen][:, None]], dim=1)
        ended = stop.ends(tokens)
        last = step + 1 == stop.max_new
        for row in range(min(len(tokens), strategy.beams)):
            if bool(ended[row]) or last:
                finish(row, "stop" if ended[row] else "length", tokens, log_probs)
        going = (~ended).nonzero()[: strategy.beams, 0]
        done = sorted(done, key=lambda pair: -pair[0])[: strategy.beams]
        if last or not len(going):
            break
        hope = rank(float(log_probs[going[0]].sum()), stop.max_new if strategy.length_penalty > 0 else step + 1)
        if len(done) == strategy.beams and done[-1][0] >= hope:
            break
        state, tokens, log_probs = state.select(rows[going]), tokens[going], log_probs[going]
        features, states = decoder.read(chosen[going], None if states is None else states[rows[going]])
        logits = decoder.logits(features, state)
    return [result for _, result in done]


# ---------------------------------------------------------------- states on disk


def save_state(state: State, path: str | Path) -> None:
    """Write a decoding state as safetensors, to go on from it later or elsewhere."""
    save_file({k: v.detach().cpu().contiguous() for k, v in state.state_dict().items()}, path)


def load_state(backbone: Backbone, path: str | Path, max_len: int) -> State:
    """Read the state of ``backbone`` that ``save_state`` wrote, with room for ``max_len`` positions in all.

    Raises:
        LoadError: The file is missing or damaged, or the state of another backbone.
    """
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoadError(f"{path}: cannot be read as a saved state ({str(error).splitlines()[0]}).") from error
    if "batch" not in tensors:
        raise LoadError(f"{path}: holds no decoding state; save_state writes one.")
    state = backbone.init_state(int(tensors["batch"]), max_len)
    wanted = state.state_dict()
    if wanted.keys() != tensors.keys():
        raise LoadError(f"{path}: is the state of another backbone than this {type(backbone).__name__}.")
    state.load_state_dict(tensors)
    return state
