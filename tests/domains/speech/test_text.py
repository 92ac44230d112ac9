import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.domains.speech.text import characters, normalise, number_words, word_error_counts
from vertebra.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "basic", "english"),
    [
        (
            "Mr. Brown's $3.50 — it's OK!",
            "mr brown's 3 50 it's ok",
            "mister brown's three dollars and fifty cents it's ok",
        ),
        ("  HELLO,\n WORLD ", "hello world", "hello world"),
        (
            "\u2019Tis the dogs\u2019 well-known \u2018bone\u2019",
            "tis the dogs well known bone",
            "tis the dogs well known bone",
        ),
        ("\uff21\ufb01\u00ad nal\u200b", "afi nal", "afi nal"),
        ("Straße, ÉCOLE, Ελλάς", "straße école ελλάς", "straße école ελλάς"),
        ("\u4f60\u597d\uff0c\u4e16\u754c\u3002", "\u4f60\u597d \u4e16\u754c", "\u4f60\u597d \u4e16\u754c"),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645 \u200d\U0001f44d",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
        ),
        ("", "", ""),
        ("!!! ... '", "", ""),
        ("1st 22nd 33rd 12th 30th 1,000th", "1st 22nd 33rd 12th 30th 1 000th", None),
    ],
)
def test_normalise(text, basic, english):
    assert normalise(text, "basic") == basic
    if english is not None:
        assert normalise(text, "english") == english


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0", "zero"),
        ("19", "nineteen"),
        ("40", "forty"),
        ("342", "three hundred forty two"),
        ("1,234,567", "one million two hundred thirty four thousand five hundred sixty seven"),
        ("1000000", "one million"),
        ("007", "zero zero seven"),
        ("1st 22nd 33rd 12th 30th 1,000th", "first twenty second thirty third twelfth thirtieth one thousandth"),
        ("3.14 and .5", "three point one four and point five"),
        ("-5 degrees, not 4-5", "minus five degrees not four five"),
        ("99% of 3.5 %", "ninety nine percent of three point five percent"),
        ("$1 $1.01 $0.5", "one dollar one dollar and one cent zero point five dollars"),
        ("£2.02 €7", "two pounds and two pence seven euros"),
        ("$2 million, $1.5 billion", "two million dollars one point five billion dollars"),
        ("$1,200.00", "one thousand two hundred dollars"),
        ("b2b & R2-D2", "b two b and r two d two"),
        ("Dr. Who vs. Mrs. Smith, Jr.", "doctor who versus missus smith junior"),
        ("I've won't John's", "i've won't john's"),
        ("9" * 19, " ".join(["nine"] * 19)),
    ],
)
def test_english_is_written_out(text, words):
    assert normalise(text, "english") == words


def test_number_words_differ():
    numbers = [*range(2000), *(10**k + d for k in range(4, 18) for d in (-1, 0, 1))]
    assert len({number_words(str(n)) for n in numbers}) == len(set(numbers))


def test_raw_and_unknown():
    assert normalise(" A\tB,\n c ", "raw") == "A B, c"
    with pytest.raises(ConfigError, match="how must be raw, basic or english, got 'full'"):
        normalise("a", "full")


TEXTS = st.text(max_size=40) | st.text("0123456789$£€%.,-' stndrhmillioMrDr&½①\u0301\u200d\u00b4", max_size=30)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(TEXTS, st.sampled_from(["raw", "basic", "english"]))
def test_twice_is_once(text, how):
    once = normalise(text, how)
    assert normalise(once, how) == once
    assert once == " ".join(once.split())
    if how == "english":
        assert not set("0123456789$%") & set(once)


def test_characters():
    assert characters(["ba", "ac b"]) == [" ", "a", "b", "c"]
    assert characters([]) == []


@pytest.mark.parametrize(
    ("reference", "hypothesis", "counts"),
    [
        ("", "", (0, 0, 0, 0)),
        ("", "a b", (0, 0, 2, 0)),
        ("a b", "", (0, 2, 0, 2)),
        ("a b c", "a b c", (0, 0, 0, 3)),
        ("a b c", "a x c", (1, 0, 0, 3)),
        ("a b c", "b c d e", (0, 1, 2, 3)),
        ("a b", "b c", (0, 1, 1, 2)),
        ("the cat sat", "cat sat down", (0, 1, 1, 3)),
    ],
)
def test_word_errors(reference, hypothesis, counts):
    assert word_error_counts(reference.split(), hypothesis.split()) == counts


def test_character_errors():
    counts = word_error_counts("kitten", "sitting")
    assert (counts.substitutions, counts.deletions, counts.insertions, counts.length) == (2, 0, 1, 6)


def slow_counts(a, b):
    """Best (edits, substitutions) over all alignments."""
    best = {}
    for i, j in itertools.product(range(len(a) + 1), range(len(b) + 1)):
        options = [(0, 0, 0, 0)] if i == j == 0 else []
        if i:
            e, s, d, n = best[i - 1, j]
            options.append((e + 1, s, d + 1, n))
        if j:
            e, s, d, n = best[i, j - 1]
            options.append((e + 1, s, d, n + 1))
        if i and j:
            e, s, d, n = best[i - 1, j - 1]
            x = int(a[i - 1] != b[j - 1])
            options.append((e + x, s + x, d, n))
        best[i, j] = min(options)
    return best[len(a), len(b)]


def test_against_the_slow_way():
    rng = random.Random(0)
    for _ in range(200):
        a, b = ("".join(rng.choices("abc", k=rng.randrange(9))) for _ in range(2))
        edits, substitutions, deletions, insertions = slow_counts(a, b)
        got = word_error_counts(a, b)
        assert got == (substitutions, deletions, insertions, len(a))
        assert got.substitutions + got.deletions + got.insertions == edits
