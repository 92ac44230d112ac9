"""Words cut into pieces of the size of a subtitle."""

import numpy as np
import pytest

from vertebra.domains.speech.transcript import Segment, Transcript, Word, cut_segments
from vertebra.errors import ConfigError


def said(text, *, pace=0.4, pauses=None):
    """Words of 0.3 s, ``pace`` apart; ``pauses`` adds silence before a word."""
    words, at = [], 0.0
    for i, token in enumerate(text.split()):
        at += (pauses or {}).get(i, 0.0)
        words.append(Word(token, round(at, 3), round(at + 0.3, 3), 0.5))
        at += pace
    return words


def texts(segments):
    return [segment.text for segment in segments]


def test_pauses_and_sentences_end_a_segment():
    words = said("well then. Go (now!) and come back", pauses={5: 1.0})
    assert texts(cut_segments(words)) == ["well then.", "Go (now!)", "and", "come back"]
    assert texts(cut_segments(words, gap=2.0)) == ["well then.", "Go (now!)", "and come back"]
    assert texts(cut_segments(said("it is 3.5 or so"))) == ["it is 3.5 or so"]


def test_a_segment_spans_its_words():
    words = [Word("a", 0.5, 0.9, 1.0), Word("b", 1.0, 1.4, 0.5)]
    assert cut_segments(words, language="deu", task="st_eng") == (
        Segment("a b", 0.5, 1.4, 0.75, tuple(words), "deu", "st_eng"),
    )
    assert cut_segments([]) == ()


def test_long_speech_is_cut_at_its_longest_pause_or_comma():
    words = said("one two three four five six seven eight", pauses={3: 0.2})
    assert texts(cut_segments(words, max_seconds=3.0)) == ["one two three", "four five six seven eight"]
    words = said("one two three four five, six seven eight", pauses={3: 0.2})
    assert texts(cut_segments(words, max_seconds=3.0)) == ["one two three four five,", "six seven eight"]
    assert texts(cut_segments(said("one two three four"), max_seconds=1.2)) == ["one two", "three four"]


@pytest.mark.parametrize("seed", range(4))
def test_limits_hold_and_no_word_is_lost(seed):
    rng = np.random.default_rng(seed)
    text = " ".join("x" * n for n in rng.integers(1, 12, 700))
    words = said(text, pauses={int(i): 0.3 for i in rng.integers(0, 700, 100)})
    segments = cut_segments(words, max_seconds=5.0, max_characters=60)
    assert [w for s in segments for w in s.words] == words
    assert max(len(s.text) for s in segments) <= 60
    assert max(s.end - s.start for s in segments) <= 5.0
    assert len(segments) < 700 / 4
    assert Transcript("a.wav", 400.0, segments).text == text
    assert Transcript("a.wav", 400.0, segments).words == tuple(words)


def test_a_single_word_is_never_cut():
    words = [Word("x" * 200, 0.0, 9.0, 1.0), Word("y", 9.0, 9.1, 1.0)]
    assert texts(cut_segments(words)) == ["x" * 200, "y"]


def test_limits_must_be_positive():
    with pytest.raises(ConfigError, match="cut_segments: gap must be above 0, got 0"):
        cut_segments([], gap=0)
