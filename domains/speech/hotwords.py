"""Hot words: phrases that are favoured while a beam search runs.

The phrases form an Aho-Corasick automaton over token ids (https://doi.org/10.1145/360825.360855). Half a phrase holds
its share of the bonus and gives it back when the phrase breaks off: a finished text has just the bonus of what it says.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence

from vertebra.errors import ConfigError


class Hotwords:
    """A scorer that adds a bonus for each phrase of a text; see ``decoding.Scorer``.

    The bonus of a phrase is ``min(weight * tokens, limit)``, for each place where it stands; phrases that overlap or
    contain one another all count. A state is a node of the automaton.

    Words have borders where ``space`` or ``starts`` is given: a phrase must then be whole words. Without both it counts
    anywhere.

    Args:
        phrases: Token ids of each phrase. Spaces around it do not count.
        weight: Bonus a token, natural log; one for all, or one for each phrase.
        limit: The most that one occurrence of a phrase may add.
        space: The token between words, for vocabularies of characters.
        starts: Tokens that begin a word, for SentencePiece (those with ``▁``). A phrase that begins with another
            token may begin anywhere.

    Raises:
        ConfigError: A phrase is empty or has a negative id, or a weight is not above 0.
    """

    def __init__(
        self,
        phrases: Sequence[Sequence[int]],
        weight: float | Sequence[float] = 1.5,
        *,
        limit: float = 10.0,
        space: int | None = None,
        starts: Collection[int] = (),
    ) -> None:
        weights = [float(weight)] * len(phrases) if isinstance(weight, (int, float)) else [float(w) for w in weight]
        if len(weights) != len(phrases):
            raise ConfigError(f"Hotwords: give one weight or one a phrase, got {len(weights)} for {len(phrases)}.")
        if not all(w > 0 for w in [*weights, limit]):
            raise ConfigError(f"Hotwords: weights and limit must be above 0, got {min([*weights, limit])}.")
        if space is not None and starts:
            raise ConfigError("Hotwords: words are parted by a space or begin with certain tokens; give one of both.")
        self.space = space
        self.borders = frozenset(starts) if space is None else frozenset([space])
        self.next: list[dict[int, int]] = [{}]
        self.fall: list[int] = [0]  # node of the longest proper suffix
        self.held: list[float] = [0.0]  # share of the bonus that a broken phrase gives back
        self.paid: list[float] = [0.0]  # bonus of all phrases that end here
        bonuses: dict[tuple[int, ...], float] = {}
        for number, (phrase, value) in enumerate(zip(phrases, weights, strict=True)):
            ids = self.strip(phrase)
            if not ids or min(ids) < 0:
                raise ConfigError(f"Hotwords: phrase {number} must have tokens, all at least 0; got {list(phrase)}.")
            bonuses[ids] = max(bonuses.get(ids, 0.0), min(value * len(ids), limit))
        for ids, bonus in bonuses.items():
            self.insert(ids, bonus)
        self.link()
        # Before the first token there is a border, as after a space.
        self.first = 0 if space is None else self.next[0].get(space, 0)
        self.cache: dict[tuple[int, int], int] = {}

    def strip(self, phrase: Sequence[int]) -> tuple[int, ...]:
        """Return a phrase without spaces around it."""
        ids = list(phrase)
        while ids and ids[-1] == self.space:
            ids.pop()
        while ids and ids[0] == self.space:
            ids.pop(0)
        return tuple(ids)

    def insert(self, ids: tuple[int, ...], bonus: float) -> None:
        """Add the nodes of a phrase; where spaces part words, it begins with one."""
        node = 0
        for depth, token in enumerate(ids if self.space is None else (self.space, *ids), start=int(self.space is None)):
            child = self.next[node].get(token)
            if child is None:
                child = self.next[node][token] = len(self.next)
                self.next.append({})
                self.fall.append(0)
                self.held.append(0.0)
                self.paid.append(0.0)
            node = child
            if depth < len(ids) or self.borders:  # a phrase that needs no border after it is paid at once
                self.held[node] = max(self.held[node], bonus * depth / len(ids))
        self.paid[node] += bonus

    def link(self) -> None:
        """Find the longest suffix of each node, from the root outwards, and add up what ends there."""
        queue = deque(self.next[0].values())
        while queue:
            node = queue.popleft()
            self.paid[node] += self.paid[self.fall[node]]
            for token, child in self.next[node].items():
                self.fall[child] = self.step(self.fall[node], token)
                queue.append(child)

    def step(self, node: int, token: int) -> int:
        """Return the node of the longest suffix that still is the begin of a phrase."""
        while node and token not in self.next[node]:
            node = self.fall[node]
        return self.next[node].get(token, 0)

    def start(self) -> int:
        """Return the state before the first token."""
        return self.first

    def extend(self, state: int, token: int) -> tuple[int, float]:
        """Return the state after a token, and what it adds."""
        key = (state, token)
        node = self.cache.get(key)
        if node is None:
            node = self.cache[key] = self.step(state, token)
        added = self.held[node] - self.held[state]
        if not self.borders:
            added += self.paid[node]
        elif token in self.borders:
            added += self.paid[state]
        return node, added

    def finish(self, state: int) -> float:
        """Return what the end adds: the bonus of phrases that end here, less what half a phrase holds."""
        return (self.paid[state] if self.borders else 0.0) - self.held[state]
