"""Words reach as far as their sound."""

import numpy as np

from vertebra.domains.speech.loudness import SILENT_DB, grow, levels
from vertebra.domains.speech.synthesis import VOICES, say
from vertebra.domains.speech.transcript import Word

RATE = 8000


def tones(*spans, seconds=3.0):
    """A wave with a tone in each span, over faint noise."""
    time = np.arange(round(seconds * RATE)) / RATE
    wave = 1e-4 * np.random.default_rng(0).normal(size=len(time))
    for start, end in spans:
        wave += 0.3 * np.sin(2 * np.pi * 440 * time) * ((time >= start) & (time < end))
    return wave.astype(np.float32)


def spans(words):
    return np.array([(w.start, w.end) for w in words])


def test_levels_are_in_db_below_full_scale():
    time = np.arange(800) / RATE
    wave = np.concatenate([np.sin(2 * np.pi * 400 * time), np.zeros(85)]).astype(np.float32)
    found = levels(wave, RATE)
    assert len(found) == 12
    np.testing.assert_allclose(found[:10], 10 * np.log10(0.5), atol=1e-3)
    assert (found[10:] == SILENT_DB).all()


def test_words_grow_to_their_sound():
    wave = tones((0.5, 1.0), (1.4, 1.9))
    words = [Word("a", 0.7, 0.74, 0.9), Word("b", 1.5, 1.54, 0.8)]
    found = grow(words, levels(wave, RATE))
    np.testing.assert_allclose(spans(found), [(0.5, 1.0), (1.4, 1.9)], atol=0.021)
    assert [w.text for w in found] == ["a", "b"]
    assert [w.confidence for w in found] == [0.9, 0.8]


def test_a_closure_is_part_of_a_word_and_a_pause_is_not():
    wave = tones((0.5, 0.8), (0.86, 1.0), (1.3, 1.4))
    (found,) = grow([Word("eight", 0.6, 0.64, 1.0)], levels(wave, RATE))
    np.testing.assert_allclose((found.start, found.end), (0.5, 1.0), atol=0.021)


def test_words_without_a_pause_meet_between_them():
    wave = tones((0.5, 1.5))
    found = grow([Word("a", 0.7, 0.74, 1.0), Word("b", 1.2, 1.24, 1.0)], levels(wave, RATE))
    assert found[0].end <= found[1].start
    np.testing.assert_allclose((found[0].start, found[1].end), (0.5, 1.5), atol=0.021)


def test_nothing_is_lost_in_silence_or_without_words():
    quiet = levels(np.zeros(8000, np.float32), RATE)
    words = [Word("a", 0.3, 0.34, 0.5)]
    assert grow([], quiet) == []
    (found,) = grow(words, quiet)
    assert found.start <= 0.3
    assert found.end >= 0.34
    assert grow(words, quiet[:0]) == words


def test_an_offset_moves_everything():
    wave = tones((0.5, 1.0))
    there = grow([Word("a", 0.7, 0.74, 1.0)], levels(wave, RATE))
    later = grow([Word("a", 10.7, 10.74, 1.0)], levels(wave, RATE), offset=10.0)
    np.testing.assert_allclose(spans(later), spans(there) + 10, atol=1e-6)


def test_boundaries_of_synthetic_words_are_found_to_some_hundredths_of_a_second():
    errors = []
    for seed, voice in enumerate(VOICES[:4]):
        wave, truth = say(["seven", "one", "six", "eight", "four"], voice, seed=seed, gap=0.15)
        middles = [(start + end) / 2 for _, start, end in truth]
        words = [Word(text, m - 0.02, m + 0.02, 1.0) for (text, _, _), m in zip(truth, middles, strict=True)]
        found = grow(words, levels(wave, RATE))
        errors.append(np.abs(spans(found) - [(s, e) for _, s, e in truth]))
    assert np.mean(errors) < 0.03
