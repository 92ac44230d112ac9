"""What a recogniser returns: words with times, and pieces of text of the size of a subtitle."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from vertebra.errors import ConfigError

_SENTENCE_ENDS = ".?!…。？！"  # noqa: RUF001
_CLAUSE_ENDS = ",;:、，；："  # noqa: RUF001
_CLOSERS = "\"'”’»)]」』）"  # noqa: RUF001
_CLAUSE_BONUS = 0.3  # s of pause that a comma is worth as a place to cut


@dataclass(frozen=True)
class Word:
    """A word in time.

    Args:
        text: The word.
        start: Its begin, in seconds.
        end: Its end, in seconds.
        confidence: From 0 to 1.
    """

    text: str
    start: float
    end: float
    confidence: float


@dataclass(frozen=True)
class Segment:
    """Some words that belong together.

    Args:
        text: What is said.
        start: Begin of the first word, in seconds.
        end: End of the last one, in seconds.
        confidence: Mean of the words.
        words: The words.
        language: ISO 639-3; empty when unknown.
        task: ``asr``, or ``st_deu`` for a translation into German.
    """

    text: str
    start: float
    end: float
    confidence: float
    words: tuple[Word, ...]
    language: str = ""
    task: str = "asr"


@dataclass(frozen=True)
class Transcript:
    """The text of a recording.

    Args:
        file: The recording.
        duration: Its length, in seconds.
        segments: In the order in which they are said.
    """

    file: str
    duration: float
    segments: tuple[Segment, ...]

    @property
    def text(self) -> str:
        """The whole text."""
        return " ".join(segment.text for segment in self.segments)

    @property
    def words(self) -> tuple[Word, ...]:
        """The words of all segments."""
        return tuple(word for segment in self.segments for word in segment.words)


def cut_segments(
    words: Sequence[Word],
    *,
    max_seconds: float = 6.0,
    max_characters: int = 84,
    gap: float = 0.8,
    language: str = "",
    task: str = "asr",
) -> tuple[Segment, ...]:
    """Cut words into pieces of the size of a subtitle.

    A piece ends at a pause and at the end of a sentence. What is still too long is cut at the longest pause of its
    middle third, where a comma counts as a pause of 0.3 s, until all fits; a single word is never cut.

    Args:
        words: In the order in which they are said.
        max_seconds: Longest piece, in seconds; 6 s are the usual limit of subtitles.
        max_characters: Characters of a piece, spaces counted; 84 fill two lines.
        gap: Seconds of silence that end a piece.
        language: Of the segments.
        task: Of the segments.

    Raises:
        ConfigError: A limit is not positive.
    """
    for name, value in (("max_seconds", max_seconds), ("max_characters", max_characters), ("gap", gap)):
        if not value > 0:
            raise ConfigError(f"cut_segments: {name} must be above 0, got {value}.")
    words = list(words)
    sizes = [0, *itertools.accumulate(len(word.text) + 1 for word in words)]
    pauses = [b.start - a.end for a, b in itertools.pairwise(words)]
    hard = [i for i, pause in enumerate(pauses, 1) if pause > gap or _ends(words[i - 1], _SENTENCE_ENDS)]
    edges = [0, *hard, len(words)] if words else []
    open_, pieces = [(a, b) for a, b in itertools.pairwise(edges)][::-1], []
    while open_:
        first, stop = open_.pop()
        short = sizes[stop] - sizes[first] - 1 <= max_characters
        if stop - first == 1 or (short and words[stop - 1].end - words[first].start <= max_seconds):
            pieces.append(words[first:stop])
            continue
        third = (stop - first) // 3
        middle = (first + stop) / 2
        cut = max(
            range(first + max(third, 1), stop - third),
            key=lambda i: (
                round(pauses[i - 1] + _CLAUSE_BONUS * _ends(words[i - 1], _CLAUSE_ENDS), 2),
                -abs(i - middle),
            ),
        )
        open_ += [(cut, stop), (first, cut)]
    return tuple(
        Segment(
            text=" ".join(word.text for word in piece),
            start=piece[0].start,
            end=max(word.end for word in piece),
            confidence=sum(word.confidence for word in piece) / len(piece),
            words=tuple(piece),
            language=language,
            task=task,
        )
        for piece in pieces
    )


def _ends(word: Word, marks: str) -> bool:
    return word.text.rstrip(_CLOSERS).endswith(tuple(marks))
