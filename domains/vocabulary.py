"""Vocabularies as tokenizers of other libraries leave them beside the weights: token texts and their ids."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vertebra.backbones.loading.checkpoints import Checkpoint
from vertebra.backbones.loading.files import inside, read_json
from vertebra.errors import LoadError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
    "spiece.model",
    "sentencepiece.bpe.model",
    "bpe.model",
)
"""Files of a tokenizer that are kept beside a converted model, and beside its programs."""

_SPECIAL = re.compile(r"\[.+\]|<.+>")
_BASES = set("ACGT")
_LETTERS = set("ACGTUNRYSWKMBDHV")
_MARKS = set(".-*?_")
_MOST = 256


def tokenizer_files(folder: Path) -> list[Path]:
    """Return the files of a tokenizer that stand in a folder.

    Raises:
        LoadError: One is a link out of the folder.
    """
    return [file for name in TOKENIZER_FILES if (file := inside(folder, name)) is not None]


def read_vocabulary(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the id of every token from the files of a tokenizer; nothing where there are none.

    Raises:
        LoadError: A file is not what its name says.
    """
    found: dict[str, int] = {}
    path = checkpoint.file("tokenizer.json", "vocab.json", "vocab.txt")
    if path is not None and path.suffix == ".txt":
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise LoadError(f"{path}: not readable as text ({error}).") from error
        found = {line: i for i, line in enumerate(lines)}
    elif path is not None:
        found = dict(_tokens(read_json(path), str(path)))
    path = checkpoint.file("tokenizer_config.json")
    if path is not None:
        added = read_json(path).get("added_tokens_decoder", {})
        for number, token in added.items() if isinstance(added, dict) else ():
            if number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
                found[token["content"]] = int(number)
    return found


def nucleotide_ids(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the vocabulary of a model of single nucleotides; nothing where the files tell of another, or of none.

    A vocabulary is one of nucleotides if it has A, C, G and T, and beside special tokens in brackets only letters of
    IUPAC's code for nucleic acids and marks for gaps and the like.
    """
    try:
        size = checkpoint.config.get("vocab_size", 0)
        if not isinstance(size, int) or size > _MOST:
            return {}
        found = read_vocabulary(checkpoint)
    except (LoadError, OSError):
        return {}
    plain = {token for token in found if not _SPECIAL.fullmatch(token)}
    upper = {token.upper() for token in plain}
    return found if plain >= _BASES and upper <= _LETTERS | _MARKS else {}


def _tokens(values: dict[str, Any], source: str) -> Iterator[tuple[str, int]]:
    """Yield tokens and ids of a vocab.json, or of the tokenizer.json of the library ``tokenizers``."""
    model, added = values.get("model"), values.get("added_tokens", [])
    whole = isinstance(model, dict)
    vocabulary = model.get("vocab", {}) if isinstance(model, dict) else values
    if isinstance(vocabulary, list):  # a unigram model: tokens and their scores
        vocabulary = {row[0]: i for i, row in enumerate(vocabulary) if isinstance(row, list) and row}
    if not isinstance(vocabulary, dict):
        raise LoadError(f"{source}: the vocabulary must be a JSON object, got a {type(vocabulary).__name__}.")
    pairs = list(vocabulary.items())
    if whole and isinstance(added, list):
        pairs += [(row.get("content"), row.get("id")) for row in added if isinstance(row, dict)]
    for token, number in pairs:
        if not isinstance(token, str) or isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise LoadError(f"{source}: every token must have a whole number, got {token!r}: {number!r}.")
        yield token, number
