"""Text <-> ids of characters, words or SentencePiece pieces.

Id 0 is the blank of CTC. Tokens in angle brackets, such as ``<asr>``, are special: they stand for no text.
"""

from __future__ import annotations

import base64
import binascii
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from io import BytesIO
from typing import Any

from vertebra.errors import ConfigError, DataError, MissingExtraError

BLANK = "<blank>"
UNKNOWN = "<unk>"
_SPACE = "\u2581"  # how SentencePiece writes a space


def is_special(token: str) -> bool:
    """Whether a token stands for no text."""
    return len(token) > 2 and token[0] == "<" and token[-1] == ">"


class TextTokenizer(ABC):
    """Text <-> ids 0 .. len(tokens) - 1.

    Args:
        tokens: All tokens in the order of their ids; the first is ``<blank>``.

    Raises:
        ConfigError: The first token is another, or one comes twice.
    """

    kind = "tokens"  # what messages call the units

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens = tuple(tokens)
        if self.tokens[:1] != (BLANK,):
            raise ConfigError(f"{type(self).__name__}: the first token must be {BLANK}, got {list(self.tokens[:1])}.")
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self._ids) < len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self._ids[t] != i)
            raise ConfigError(f"{type(self).__name__}: tokens must differ, got {twice!r} twice; remove one.")
        self._special = frozenset(i for i, token in enumerate(self.tokens) if is_special(token))

    def __len__(self) -> int:
        return len(self.tokens)

    def id_of(self, token: str) -> int:
        """Id of a token.

        Raises:
            DataError: No such token.
        """
        found = self._ids.get(token)
        if found is None:
            raise DataError(
                f"{type(self).__name__}: there is no token {token!r} among {len(self.tokens)}; special ones are "
                f"{', '.join(self.tokens[i] for i in sorted(self._special)[:20])}."
            )
        return found

    def encode(self, text: str) -> list[int]:
        """Map text to ids; what the vocabulary lacks becomes ``<unk>`` where it has that.

        Raises:
            DataError: Something the vocabulary lacks, without ``<unk>``.
        """
        other = self._ids.get(UNKNOWN)
        ids = [other if i is None else i for _, i in self._units(text)]
        if None in ids:
            missing = self.unknown(text)
            more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
            raise DataError(
                f"{self.kind} must be of the vocabulary, got {', '.join(map(repr, missing[:10]))}{more}; "
                "normalise the text, leave it out, or learn the vocabulary from it too."
            )
        return [i for i in ids if i is not None]

    def unknown(self, text: str) -> list[str]:
        """Units of a text that the vocabulary lacks, each once."""
        return list(dict.fromkeys(unit for unit, i in self._units(text) if i is None))

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Map ids back to text; special tokens are left out, or put in as they are.

        Raises:
            DataError: An id outside of the vocabulary.
        """
        known = self._checked(ids)
        return self._join([self.tokens[i] for i in known if not (skip_special and i in self._special)])

    def words(self, ids: Iterable[int]) -> list[tuple[int, int]]:
        """Find words: the ids from ``start`` to before ``end`` of each (start, end) spell one word.

        They are as many as ``decode(ids).split()`` and in the same order. Special tokens part no words.

        Raises:
            DataError: An id outside of the vocabulary.
        """
        found: list[tuple[int, int]] = []
        goes_on = False
        for at, i in enumerate(self._checked(ids)):
            if i in self._special:
                continue
            begins, spells, ends = self._shape(self.tokens[i])
            if begins:
                goes_on = False
            if spells:
                found.append((found.pop()[0] if goes_on else at, at + 1))
                goes_on = True
            if ends:
                goes_on = False
        return found

    def _checked(self, ids: Iterable[int]) -> list[int]:
        known = [int(i) for i in ids]
        for i in known:
            if not 0 <= i < len(self.tokens):
                raise DataError(f"{type(self).__name__}: ids must be from 0 to {len(self.tokens) - 1}, got {i}.")
        return known

    @abstractmethod
    def _units(self, text: str) -> list[tuple[str, int | None]]:
        """Cut text; each unit with its id, None where the vocabulary lacks it."""

    @abstractmethod
    def _join(self, tokens: list[str]) -> str:
        """Make text of tokens."""

    @abstractmethod
    def _shape(self, token: str) -> tuple[bool, bool, bool]:
        """Whether a token begins a word, spells a part of one, and ends one."""

    def _known(self, unit: str) -> int | None:
        found = self._ids.get(unit)
        return None if found in self._special else found


class CharacterTokenizer(TextTokenizer):
    """A token is a character; the space is one of them."""

    kind = "characters"

    def _units(self, text: str) -> list[tuple[str, int | None]]:
        return [(char, self._known(char)) for char in text]

    def _join(self, tokens: list[str]) -> str:
        return " ".join("".join(tokens).split())

    def _shape(self, token: str) -> tuple[bool, bool, bool]:
        return False, not token.isspace(), token.isspace()


class WordTokenizer(TextTokenizer):
    """A token is a word; words are parted by white space."""

    kind = "words"

    def _units(self, text: str) -> list[tuple[str, int | None]]:
        return [(word, self._known(word)) for word in text.split()]

    def _join(self, tokens: list[str]) -> str:
        return " ".join(tokens)

    def _shape(self, token: str) -> tuple[bool, bool, bool]:
        return True, True, True


class SentencePieceTokenizer(TextTokenizer):
    """A token is a piece of a SentencePiece model; pieces are found by what they spell, whatever their ids there.

    Args:
        tokens: All tokens in the order of their ids.
        model: The SentencePiece model.

    Raises:
        ConfigError: Not a SentencePiece model, or one with other pieces.
        MissingExtraError: The package is not installed.
    """

    kind = "pieces"

    def __init__(self, tokens: Sequence[str], model: bytes) -> None:
        super().__init__(tokens)
        self._processor = _library().SentencePieceProcessor()
        try:
            self._processor.LoadFromSerializedProto(model)
            size = self._processor.GetPieceSize()
        except RuntimeError:
            size = 0
        if not size:
            raise ConfigError(f"{type(self).__name__}: {len(model)} bytes are no SentencePiece model; give that of it.")
        # Each id of the model, as an id of ours; its unknown and control pieces have none.
        self._ours = [
            None
            if self._processor.IsUnknown(i) or self._processor.IsControl(i)
            else self._ids.get(self._processor.IdToPiece(i))
            for i in range(size)
        ]
        if not any(i is not None for i in self._ours):
            raise ConfigError(f"{type(self).__name__}: the model and the tokens have no piece in common; they differ.")

    def _units(self, text: str) -> list[tuple[str, int | None]]:
        pieces = self._processor.EncodeAsPieces(text)
        return [(piece.removeprefix(_SPACE) or piece, self._ours[self._processor.PieceToId(piece)]) for piece in pieces]

    def unknown(self, text: str) -> list[str]:
        """Characters of a text that the vocabulary lacks, each once."""
        return list(dict.fromkeys("".join(super().unknown(text))))

    def _join(self, tokens: list[str]) -> str:
        return " ".join("".join(tokens).replace(_SPACE, " ").split())

    def _shape(self, token: str) -> tuple[bool, bool, bool]:
        return token.startswith(_SPACE), token != _SPACE, False


# ---------------------------------------------------------------- learning


def learn_characters(texts: Iterable[str], specials: Sequence[str] = ()) -> tuple[str, ...]:
    """Tokens for ``CharacterTokenizer``: the blank, all characters sorted, then ``specials``.

    Raises:
        DataError: No text.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    return _tokens(sorted(found), specials)


def learn_words(texts: Iterable[str], specials: Sequence[str] = ()) -> tuple[str, ...]:
    """Tokens for ``WordTokenizer``: the blank, all words sorted, then ``specials``.

    Raises:
        DataError: No text, or a word that looks like a special token.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text.split())
    return _tokens(sorted(found), specials)


def learn_pieces(
    texts: Iterable[str], size: int, specials: Sequence[str] = (), *, seed: int = 0
) -> tuple[tuple[str, ...], bytes]:
    """Train a unigram SentencePiece model; the same texts and seed give the same bytes.

    Args:
        texts: Normalised transcripts; the model normalises nothing but spaces.
        size: Pieces, with the blank.
        specials: Tokens put behind them.
        seed: Of the library's random numbers.

    Returns:
        Tokens and the model. Ids of the model are those of the tokens; its unknown piece is called as the blank.

    Raises:
        ConfigError: ``size`` is too large or too small for the texts.
        DataError: No text.
        MissingExtraError: The package is not installed.
    """
    library = _library()
    lines = [line for text in texts if (line := " ".join(text.split()))]
    if not lines:
        raise DataError("learn_pieces: there must be text to learn from, got none.")
    model = BytesIO()
    library.set_random_generator_seed(seed)
    try:
        library.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=size,
            model_type="unigram",
            character_coverage=1.0,
            normalization_rule_name="identity",
            unk_id=0,
            unk_piece=BLANK,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            shuffle_input_sentence=False,
            max_sentence_length=max(len(line.encode()) for line in lines) + 1,  # longer ones are passed over
            minloglevel=2,
        )
    except (RuntimeError, OSError) as e:
        most, least = re.search(r"value <= (\d+)", str(e)), re.search(r"\d+ vs (\d+)", str(e))
        found = f"at most {most[1]}" if most else f"at least {least[1]}" if least else "no such number of"
        raise ConfigError(
            f"learn_pieces: {len(lines)} texts allow {found} pieces, got size {size}; change it, or give other texts."
        ) from None
    processor = library.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.getvalue())
    pieces = [processor.IdToPiece(i) for i in range(1, processor.GetPieceSize())]
    return _tokens(pieces, specials), model.getvalue()


def piece_tokens(model: bytes, specials: Sequence[str] = ()) -> tuple[str, ...]:
    """Tokens for a SentencePiece model that was trained elsewhere: the blank, its pieces, then ``specials``.

    Raises:
        ConfigError: Not a SentencePiece model.
        MissingExtraError: The package is not installed.
    """
    processor = _library().SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(model)
        size = processor.GetPieceSize()
    except RuntimeError:
        size = 0
    if not size:
        raise ConfigError(f"piece_tokens: {len(model)} bytes are no SentencePiece model; give the .model file of one.")
    known = (i for i in range(size) if not (processor.IsUnknown(i) or processor.IsControl(i)))
    pieces = [piece for i in known if not is_special(piece := processor.IdToPiece(i))]
    return _tokens(pieces, specials)


def make_tokenizer(vocabulary: str, tokens: Sequence[str], pieces: str = "") -> TextTokenizer:
    """Make the tokenizer that a ``SpeechSpec`` describes.

    Args:
        vocabulary: ``characters``, ``words`` or ``sentencepiece``.
        tokens: All tokens.
        pieces: The SentencePiece model, base64.

    Raises:
        ConfigError: No such vocabulary, or no model for it.
        MissingExtraError: The package ``sentencepiece`` is not installed.
    """
    if vocabulary == "characters":
        return CharacterTokenizer(tokens)
    if vocabulary == "words":
        return WordTokenizer(tokens)
    if vocabulary != "sentencepiece":
        raise ConfigError(f"make_tokenizer: vocabulary must be characters, words or sentencepiece, got {vocabulary!r}.")
    try:
        model = base64.b64decode(pieces, validate=True)
    except (binascii.Error, ValueError):
        raise ConfigError("make_tokenizer: pieces must be a SentencePiece model in base64, got another text.") from None
    if not model:
        raise ConfigError("make_tokenizer: the vocabulary sentencepiece needs pieces, its model in base64.")
    return SentencePieceTokenizer(tokens, model)


def _tokens(units: Sequence[str], specials: Sequence[str]) -> tuple[str, ...]:
    if not units:
        raise DataError("a vocabulary must be learnt from text, got none; give transcripts.")
    for unit in units:
        if is_special(unit):
            raise DataError(f"text must not hold what looks like a special token, got {unit!r}; normalise it.")
    for token in specials:
        if not is_special(token):
            raise ConfigError(f"special tokens must be written in angle brackets, got {token!r}.")
    return BLANK, *units, *(t for t in dict.fromkeys(specials) if t != BLANK)


def _library() -> Any:
    try:
        import sentencepiece  # an extra
    except ImportError:
        raise MissingExtraError("sentencepiece", "speech", "a vocabulary of SentencePiece") from None
    return sentencepiece
