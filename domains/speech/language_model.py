"""N-gram language models of words: a reader of ARPA files, KenLM, and the scorer that a beam search takes.

ARPA format: https://cmusphinx.github.io/wiki/arpaformat; scores are log10 in the file and natural logs here.
"""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from vertebra.domains.speech.spec import Vocabulary
from vertebra.errors import ConfigError, DataError, MissingExtraError

LN10 = math.log(10)
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
MARK = "▁"  # begins a word in SentencePiece


class WordModel(Protocol):
    """The probability of a text, word by word; a state is never changed."""

    def start(self) -> Any:
        """Return the state at the begin of a text."""

    def score(self, state: Any, word: str) -> tuple[Any, float, bool]:
        """Return the state after a word, ln P of the word, and whether the model knows it."""

    def finish(self, state: Any) -> float:
        """Return ln P of the end of the text."""


class NGramModel:
    """A backoff n-gram model.

    Args:
        grams: ln P and ln backoff of each n-gram.
        order: Length of the longest.
    """

    def __init__(self, grams: dict[tuple[str, ...], tuple[float, float]], order: int) -> None:
        self.grams, self.order = grams, order
        self.unknown = grams.get((UNKNOWN,)) or grams.get((UNKNOWN.upper(),)) or (0.0, 0.0)

    def start(self) -> tuple[str, ...]:
        """Return the words that the first one is seen after."""
        return (BEGIN,)[: self.order - 1]

    def score(self, state: tuple[str, ...], word: str) -> tuple[tuple[str, ...], float, bool]:
        """Return the last words, ln P of the word, and whether the model knows it.

        An unknown word has the probability of ``<unk>``, or 1 where the model has none, and nothing is known of what
        follows it.
        """
        known = (word,) in self.grams
        value = self.log_prob(state, word) if known else self.unknown[0] + self.backoff(state)
        context = (*state, word) if known else ()
        context = context[len(context) - self.order + 1 :] if len(context) >= self.order else context
        while context and context not in self.grams:  # what was never seen says nothing
            context = context[1:]
        return context, value, known

    def log_prob(self, context: tuple[str, ...], word: str) -> float:
        """Return ln P of a known word."""
        value = 0.0
        while (found := self.grams.get((*context, word))) is None:
            value += self.grams[context][1] if context in self.grams else 0.0
            context = context[1:]
        return value + found[0]

    def backoff(self, context: tuple[str, ...]) -> float:
        """Return the sum of all backoffs of a context."""
        return math.fsum(self.grams.get(context[k:], (0.0, 0.0))[1] for k in range(len(context)))

    def finish(self, state: tuple[str, ...]) -> float:
        """Return ln P of the end of the text; 0 where the model has no ``</s>``."""
        return self.log_prob(state, END) if (END,) in self.grams else 0.0


def read_arpa(path: str | Path) -> NGramModel:
    """Read an ARPA file, or one packed with gzip (``.gz``).

    Raises:
        DataError: The file is broken; the text names the line.
    """
    path = Path(path)
    opener: Callable[..., Any] = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            return parse_arpa(Lines(lines, path.name))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not an ARPA file in UTF-8: {error}.") from error
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such language model.") from error


class Lines:
    """The lines of a file without the space around them, and errors that name the one that was read last."""

    def __init__(self, lines: Iterable[str], name: str) -> None:
        self.lines, self.name, self.number = iter(lines), name, 0

    def __iter__(self) -> Iterator[str]:
        for line in self.lines:
            self.number += 1
            yield line.strip()

    def error(self, what: str) -> DataError:
        """Return an error about the line that was read last."""
        return DataError(f"{self.name}, line {self.number}: {what}.")


def parse_arpa(lines: Lines) -> NGramModel:
    """Read the lines of an ARPA file."""
    if not any(line == "\\data\\" for line in lines):
        raise lines.error("an ARPA file has a line \\data\\, and none was found")
    counts: list[int] = []
    grams: dict[tuple[str, ...], tuple[float, float]] = {}
    section, read = 0, 0
    for line in lines:
        if not line:
            continue
        if line.startswith("\\"):
            if section and read != counts[section - 1]:
                raise lines.error(f"there should be {counts[section - 1]} {section}-grams before {line}, found {read}")
            section, read = section + 1, 0
            wanted = f"\\{section}-grams:" if section <= max(len(counts), 1) else "\\end\\"
            if line != wanted or not counts:
                raise lines.error(f"expected {wanted if counts else 'ngram 1=COUNT'}, found {line}")
            if line == "\\end\\":
                return NGramModel(grams, len(counts))
        elif section:
            add_gram(grams, line, section, section == len(counts), lines)
            read += 1
        else:
            head, _, count = line.partition("=")
            if head.split() != ["ngram", str(len(counts) + 1)] or not count.strip().isdecimal():
                raise lines.error(f"expected ngram {len(counts) + 1}=COUNT, found {line!r}")
            counts.append(int(count))
    raise lines.error("the file ends without \\end\\")


def add_gram(
    grams: dict[tuple[str, ...], tuple[float, float]],
    line: str,
    order: int,
    last: bool,
    lines: Lines,
) -> None:
    """Read a line ``log10(P) WORDS [log10(backoff)]``."""
    parts = line.split()
    if len(parts) not in ((order + 1,) if last else (order + 1, order + 2)):
        raise lines.error(f"expected log10(P), {order} words{'' if last else ' and maybe a backoff'}, found {line!r}")
    try:
        value, backoff = float(parts[0]), float(parts[order + 1]) if len(parts) > order + 1 else 0.0
    except ValueError:
        raise lines.error(f"log10(P) and backoff must be numbers, found {line!r}") from None
    if not value <= 0 or math.isnan(backoff):
        raise lines.error(f"log10(P) must be at most 0, found {parts[0]}")
    words = tuple(parts[1 : order + 1])
    if words in grams:
        raise lines.error(f"{' '.join(words)!r} comes twice")
    grams[words] = (value * LN10, backoff * LN10)


class KenLMModel:
    """An ARPA or binary file read by KenLM, through ``flashlight-text``.

    Args:
        path: The file.
        words: All words that may be asked for; KenLM wants them beforehand, and only others count as unknown.

    Raises:
        ConfigError: ``flashlight-text`` is not installed.
        DataError: The file is missing or KenLM cannot read it.
    """

    def __init__(self, path: str | Path, words: Iterable[str]) -> None:
        try:
            from flashlight.lib.text.decoder.kenlm import KenLM
            from flashlight.lib.text.dictionary import Dictionary
        except ImportError as error:
            raise MissingExtraError("flashlight-text", "speech", "KenLM") from error
        if not Path(path).is_file():
            raise DataError(f"KenLM: no language model at {path}.")
        self.words = list(dict.fromkeys(w for w in words if w not in (BEGIN, END, UNKNOWN)))
        self.dictionary = Dictionary([*self.words, UNKNOWN])
        self.ids = {word: self.dictionary.get_index(word) for word in self.words}
        try:
            self.model = KenLM(str(path), self.dictionary)
        except RuntimeError as error:
            raise DataError(f"KenLM cannot read {path}: {error}") from error
        self.unknown = self.dictionary.get_index(UNKNOWN)

    def start(self) -> Any:
        """Return the state after ``<s>``."""
        return self.model.start(False)

    def score(self, state: Any, word: str) -> tuple[Any, float, bool]:
        """Return the state after a word, ln P of the word, and whether it was among the words."""
        index = self.ids.get(word)
        after, value = self.model.score(state, self.unknown if index is None else index)
        return after, value * LN10, index is not None

    def finish(self, state: Any) -> float:
        """Return ln P of the end of the text."""
        return self.model.finish(state)[1] * LN10


class LanguageModelScorer:
    """Scores each word when it ends: ``alpha * ln P + beta``; see ``decoding.Scorer``.

    Args:
        model: From ``read_arpa``, or ``KenLMModel``.
        tokens: All tokens in the order of their ids. Those in <> are no text.
        vocabulary: Where words end: at ``space`` (characters), before a piece that begins with ``▁`` (sentencepiece),
            or after each token (words).
        alpha: Weight of ln P.
        beta: Bonus a word, against the short texts that a language model likes.
        unknown: Added, unweighted, for a word that the model does not know; should be below 0.
        space: Id of the token between words; for characters.
    """

    def __init__(
        self,
        model: WordModel,
        tokens: Sequence[str],
        *,
        vocabulary: Vocabulary = "characters",
        alpha: float = 0.5,
        beta: float = 1.5,
        unknown: float = -10.0,
        space: int | None = None,
    ) -> None:
        if (space is None) == (vocabulary == "characters"):
            raise ConfigError(
                f"LanguageModelScorer: space is the token between words of characters; got {space} for {vocabulary}."
            )
        if space is not None and not 0 <= space < len(tokens):
            raise ConfigError(f"LanguageModelScorer: space must be one of {len(tokens)} tokens, got {space}.")
        self.model, self.vocabulary = model, vocabulary
        self.alpha, self.beta, self.unknown, self.space = alpha, beta, unknown, space
        self.texts = ["" if len(t) > 2 and t.startswith("<") and t.endswith(">") else t for t in tokens]

    def start(self) -> tuple[Any, str]:
        """Return the state of the model, and an empty word."""
        return self.model.start(), ""

    def extend(self, state: tuple[Any, str], token: int) -> tuple[tuple[Any, str], float]:
        """Return the state after a token, and the score of the word that it ends, if any."""
        inner, word = state
        text = self.texts[token]
        if self.vocabulary == "words":
            after, added = self.end_word(inner, text)
            return (after, ""), added
        ends = token == self.space if self.vocabulary == "characters" else text.startswith(MARK)
        if not ends:
            return (inner, word + text), 0.0
        after, added = self.end_word(inner, word)
        return (after, "" if token == self.space else text[1:]), added

    def end_word(self, inner: Any, word: str) -> tuple[Any, float]:
        """Return the state of the model after a word, and its score."""
        if not word:
            return inner, 0.0
        after, value, known = self.model.score(inner, word)
        return after, self.alpha * value + self.beta + (0.0 if known else self.unknown)

    def finish(self, state: tuple[Any, str]) -> float:
        """Return the score of the last word and of the end of the text."""
        after, added = self.end_word(*state)
        return added + self.alpha * self.model.finish(after)
