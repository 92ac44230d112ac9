"""Transcripts: how they are made comparable, what they are made of, and how two of them differ."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from vertebra.domains.speech.spec import Normalisation
from vertebra.errors import ConfigError

_APOSTROPHES = str.maketrans(dict.fromkeys("\u2018\u2019\u201b\u02bc\uff07\u0060\u00b4", "'"))


class ErrorCounts(NamedTuple):
    """Edits that make the reference of a hypothesis, and the length of the reference."""

    substitutions: int
    deletions: int
    insertions: int
    length: int


def normalise(text: str, how: Normalisation) -> str:
    """Make a transcript comparable. Doing it twice changes nothing more.

    ``raw`` strips and collapses white space. ``basic`` also takes NFKC, lower case, and letters, marks, numbers and
    apostrophes inside of words alone. ``english`` also writes out numbers, amounts of money, per cents and titles;
    contractions stay as they are.

    Raises:
        ConfigError: ``how`` is none of these.
    """
    if how == "raw":
        return " ".join(text.split())
    if how not in ("basic", "english"):
        raise ConfigError(f"normalise: how must be raw, basic or english, got {how!r}.")
    while True:  # what is left may compose anew, as letters and the marks behind them
        before = text
        text = unicodedata.normalize("NFKC", text.translate(_APOSTROPHES)).lower().translate(_APOSTROPHES)
        if how == "english":
            text = _write_out(text)
        text = _bare(text)
        if text == before:
            return text


def characters(texts: Iterable[str]) -> list[str]:
    """All characters that occur, sorted."""
    found: set[str] = set()
    for text in texts:
        found.update(text)
    return sorted(found)


def word_error_counts(reference: Sequence[str], hypothesis: Sequence[str]) -> ErrorCounts:
    """Count the fewest edits between two sequences, of words or (given strings) of characters.

    Of alignments with equally many edits, one with the most matches counts.
    """
    ids: dict[str, int] = {}
    first = np.array([ids.setdefault(item, len(ids)) for item in reference], dtype=np.int64)
    second = np.array([ids.setdefault(item, len(ids)) for item in hypothesis], dtype=np.int64)
    unit = min(len(first), len(second)) + 1  # an edit; substitutions cost 1 more, and cannot add up to one
    steps = np.arange(len(second) + 1, dtype=np.int64) * unit
    costs = steps.copy()
    for item in first:
        reached = costs + unit  # deletion
        reached[1:] = np.minimum(reached[1:], costs[:-1] + np.where(second == item, 0, unit + 1))
        costs = np.minimum.accumulate(reached - steps) + steps  # any number of insertions
    edits, substitutions = divmod(int(costs[-1]), unit)
    longer = len(second) - len(first)
    insertions = (edits - substitutions + longer) // 2
    return ErrorCounts(substitutions, insertions - longer, insertions, len(first))


# ---------------------------------------------------------------- what is dropped

_INSIDE = re.compile(r"(?<![^\W_])'|'(?![^\W_])")
_JOINER = re.compile("(?<!\\w)[\u200c\u200d]+|[\u200c\u200d]+(?!\\w)")


def _bare(text: str) -> str:
    out = []
    for char in text:
        kind = unicodedata.category(char)
        if kind[0] in "LMN" or char == "'" or char in "\u200c\u200d":  # joiners shape Persian and Indic words
            out.append(char)
        elif kind != "Cf":  # soft hyphens and the like part no words
            out.append(" ")
    bare = _JOINER.sub("", "".join(out))
    return " ".join(_INSIDE.sub(" ", bare).split())


# ---------------------------------------------------------------- numbers in English

_ONES, _TEENS, _TENS = (
    tuple(words.split())
    for words in (
        "zero one two three four five six seven eight nine",
        "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen",
        "twenty thirty forty fifty sixty seventy eighty ninety",
    )
)
_SCALES = ("", " thousand", " million", " billion", " trillion", " quadrillion")
_ORDINALS = {
    "one": "first",
    "two": "second",
    "three": "third",
    "five": "fifth",
    "eight": "eighth",
    "nine": "ninth",
    "twelve": "twelfth",
}
_TITLES = {
    "mr": "mister",
    "mrs": "missus",
    "dr": "doctor",
    "prof": "professor",
    "jr": "junior",
    "sr": "senior",
    "vs": "versus",
}
_MONEY = {"$": ("dollar", "cent"), "£": ("pound", "penny"), "€": ("euro", "cent")}
_NUMBER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"

_TITLE = re.compile(rf"\b({'|'.join(_TITLES)})\b(?!')\.?")
_AMOUNT = re.compile(
    rf"([$£€]) ?({_NUMBER})(?:\.([0-9]+))?(?: (hundred|thousand|million|billion|trillion)\b)?(?![0-9])"
)
_PERCENT = re.compile(r"(?<=[0-9]) ?%")
_MINUS = re.compile(r"(?<![^\s(])[-\u2212](?=[0-9$£€])")
_ORDINAL = re.compile(rf"({_NUMBER})(?:st|nd|rd|th)\b")
_DECIMAL = re.compile(rf"({_NUMBER})?\.([0-9]+)")
_WHOLE = re.compile(_NUMBER)


def number_words(digits: str) -> str:
    """Write out a whole number in English; with leading zeros, or beyond quadrillions, digit by digit."""
    if len(digits) > 18 or (len(digits) > 1 and digits[0] == "0"):
        return " ".join(_ONES[int(d)] for d in digits)
    value = int(digits)
    if not value:
        return "zero"
    groups = []
    for scale in _SCALES:
        value, group = divmod(value, 1000)
        if group:
            groups.append(_below_thousand(group) + scale)
    return " ".join(reversed(groups))


def _below_thousand(value: int) -> str:
    words = []
    if value >= 100:
        words += [_ONES[value // 100], "hundred"]
        value %= 100
    if value >= 20:
        words.append(_TENS[value // 10 - 2])
        value %= 10
    if value:
        words.append((_ONES + _TEENS)[value])
    return " ".join(words)


def _ordinal_words(digits: str) -> str:
    *head, last = number_words(digits).split()
    last = last[:-1] + "ieth" if last.endswith("y") else _ORDINALS.get(last, last + "th")
    return " ".join((*head, last))


def _amount_words(match: re.Match[str]) -> str:
    sign, whole, part, scale = match.groups()
    unit, small = _MONEY[sign]
    whole = whole.replace(",", "")
    if scale or (part and len(part) != 2):
        return f" {whole}{f'.{part}' if part else ''} {scale or ''} {unit}s "
    words = f" {whole} {unit if whole == '1' else unit + 's'} "
    if part and int(part):
        cents = "pence" if small == "penny" and part != "01" else small if part == "01" else small + "s"
        words += f"and {int(part)} {cents} "
    return words


def _write_out(text: str) -> str:
    """Words for what is written in digits and signs; lower case in and out."""
    text = _TITLE.sub(lambda m: _TITLES[m[1]], text)
    text = text.replace("&", " and ")
    text = _MINUS.sub("minus ", text)
    text = _AMOUNT.sub(_amount_words, text)
    text = _PERCENT.sub(" percent ", text)
    text = _ORDINAL.sub(lambda m: f" {_ordinal_words(m[1].replace(',', ''))} ", text)
    text = _DECIMAL.sub(_decimal_words, text)
    return _WHOLE.sub(lambda m: f" {number_words(m[0].replace(',', ''))} ", text)


def _decimal_words(match: re.Match[str]) -> str:
    digits = " ".join(_ONES[int(d)] for d in match[2])
    return f" {number_words(match[1].replace(',', '')) if match[1] else ''} point {digits} "
