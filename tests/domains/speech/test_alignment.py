"""Forced alignment beside a slow Viterbi; times of words by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from vertebra.domains.speech.alignment import (
    STAR,
    TokenSpan,
    feasible,
    forced_align,
    frames_needed,
    peak_times,
    word_times,
)
from vertebra.errors import ConfigError, DataError, ShapeError


def random_posteriors(seed, length, size):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(length, size, generator=generator)).log_softmax(-1)


def slow_viterbi(log_probs, ids, blank=0):
    """Best score and labels of a CTC path that spells ids: a table over frames and states, in plain Python."""
    labels = [blank]
    for token in ids:
        labels += [token, blank]
    length, count = len(log_probs), len(labels)
    values = log_probs.double().tolist()
    score = [[-math.inf] * count for _ in range(length)]
    origin = [[0] * count for _ in range(length)]
    score[0][:2] = [values[0][label] for label in labels[:2]]
    for t in range(1, length):
        for s in range(count):
            sources = [s] + [s - 1] * (s > 0)
            if s > 1 and labels[s] != blank and labels[s] != labels[s - 2]:
                sources.append(s - 2)
            best = max(sources, key=lambda source: score[t - 1][source])
            score[t][s], origin[t][s] = score[t - 1][best] + values[t][labels[s]], best
    state = max(range(max(count - 2, 0), count), key=lambda s: score[-1][s])
    total, path = score[-1][state], []
    for t in reversed(range(length)):
        path.append(labels[state])
        state = origin[t][state]
    return total, path[::-1]


def path_of(spans, length, blank=0):
    path = [blank] * length
    for span in spans:
        path[span.start : span.end] = [span.id] * (span.end - span.start)
    return path


def path_score(log_probs, path):
    return sum(log_probs[t, token].item() for t, token in enumerate(path))


def random_case(seed):
    generator = torch.Generator().manual_seed(100 + seed)
    size = 3 + seed % 4
    ids = torch.randint(1, size, (1 + seed % 6,), generator=generator).tolist()
    length = frames_needed(ids) + int(torch.randint(0, 9, (), generator=generator))
    return random_posteriors(seed, length, size), ids


@pytest.mark.parametrize("seed", range(20))
def test_alignment_is_the_best_path(seed):
    log_probs, ids = random_case(seed)
    total, path = slow_viterbi(log_probs, ids)
    spans = forced_align(log_probs, ids)
    assert [s.id for s in spans] == ids
    assert path_of(spans, len(log_probs)) == path
    assert path_score(log_probs, path) == pytest.approx(total, abs=1e-4)
    for span in spans:
        assert span.confidence == pytest.approx(log_probs[span.start : span.end, span.id].exp().mean().item())


@pytest.mark.parametrize("seed", range(20))
def test_a_wide_band_is_exact(seed):
    hard, ids = random_case(seed)
    easy, _ = spoken([1, 2] * 10, hard.shape[1], seed)
    log_probs, text = torch.cat([hard, easy]), ids + [1, 2] * 10
    spans = forced_align(log_probs, text, band=4 * len(ids) + 8)  # does not move before the hard part is over
    assert [s.id for s in spans] == text
    assert path_of(spans, len(log_probs)) == slow_viterbi(log_probs, text)[1]


def spoken(ids, size, seed, pause=(1, 6)):
    """Posteriors of a long recording with pauses of random length, and the frames at which its tokens begin."""
    generator = torch.Generator().manual_seed(seed)
    path, starts = [], []
    for token in ids:
        path += [0] * int(torch.randint(*pause, (), generator=generator))
        starts.append(len(path))
        path += [token] * int(torch.randint(1, 4, (), generator=generator))
    logits = torch.randn(len(path), size, generator=generator)
    logits[torch.arange(len(path)), torch.tensor(path)] += 6
    return logits.log_softmax(-1), starts


def test_a_narrow_band_follows_a_long_recording():
    ids = torch.randint(1, 8, (400,), generator=torch.Generator().manual_seed(1)).tolist()
    log_probs, starts = spoken(ids, 8, seed=2)
    silence = torch.full((300, 8), -9.0)
    silence[:, 0] = -1e-3
    log_probs = torch.cat([log_probs[: starts[100]], silence, log_probs[starts[100] :]])
    exact, narrow = forced_align(log_probs, ids), forced_align(log_probs, ids, band=40)
    assert narrow == exact
    assert sum(s.start == b for s, b in zip(exact[:100], starts, strict=False)) > 90


def test_a_band_that_loses_the_path_says_so():
    log_probs = torch.full((12, 3), -20.0)
    log_probs[:, 0] = 0  # nothing is heard until there is hardly time left
    log_probs[11, 1] = 0
    assert len(forced_align(log_probs, [1, 1] * 3)) == 6
    with pytest.raises(DataError, match="no path through a band of 4 states ends with the transcript; give a wider"):
        forced_align(log_probs, [1, 1] * 3, band=4)


def test_frames_needed():
    assert frames_needed([]) == 0
    assert frames_needed([1, 2, 3]) == 3
    assert frames_needed([1, 1, 1, 2, 2]) == 8
    assert feasible(8, [1, 1, 1, 2, 2])
    assert not feasible(7, [1, 1, 1, 2, 2])
    assert [s.start for s in forced_align(random_posteriors(0, 8, 3), [1, 1, 1, 2, 2])] == [0, 2, 4, 5, 7]


def test_no_text_no_spans():
    assert forced_align(random_posteriors(0, 5, 3), []) == []
    assert forced_align(torch.zeros(0, 3), []) == []


def test_another_blank():
    log_probs, ids = random_case(9)
    moved = log_probs.roll(-1, dims=1)  # the blank goes last, every token down by one
    expected = [TokenSpan(s.id - 1, s.start, s.end, s.confidence) for s in forced_align(log_probs, ids)]
    assert forced_align(moved, [i - 1 for i in ids], blank=log_probs.shape[1] - 1) == expected


def test_star_takes_what_is_not_transcribed():
    ids = [1, 2, 3, 4, 5, 6, 7, 1, 2, 3]
    log_probs, starts = spoken(ids, 8, seed=5, pause=(2, 4))
    spans = forced_align(log_probs, [1, 2, STAR, 2, 3])
    assert [s.id for s in spans] == [1, 2, STAR, 2, 3]
    assert [spans[k].start for k in (0, 1, 3, 4)] == [starts[k] for k in (0, 1, 8, 9)]
    star = spans[2]
    assert star.start <= starts[2]
    assert star.end >= starts[7] + 1
    assert star.confidence == 1
    assert forced_align(log_probs, [1, 2, STAR, 2, 3], band=10) == spans


def test_improbable_is_not_impossible():
    log_probs = torch.full((4, 3), -math.inf)
    log_probs[:, 0] = 0
    assert [s.id for s in forced_align(log_probs, [1, 2])] == [1, 2]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: forced_align(torch.zeros(4, 3), [1, 1, 2, 2]),
            DataError,
            "4 tokens need 6 frames and there are 4; shorten the text",
        ),
        (lambda: forced_align(torch.zeros(4, 3), [1, 3]), DataError, r"ids must lie in 0\.\.2.*found 3"),
        (lambda: forced_align(torch.zeros(4, 3), [1, 0]), DataError, r"without the blank 0.*found 0"),
        (lambda: forced_align(torch.zeros(4, 3), [-2]), DataError, "found -2"),
        (lambda: forced_align(torch.zeros(1, 4, 3), [1]), ShapeError, r"\(T, V\), got \(1, 4, 3\)"),
        (lambda: forced_align(torch.zeros(4, 3), [1], band=2), ConfigError, "at least 4 states, got 2"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


SPANS = [TokenSpan(5, 2, 4, 0.5), TokenSpan(6, 5, 6, 0.8), TokenSpan(1, 6, 7, 0.9), TokenSpan(7, 10, 13, 0.4)]


def test_word_times_by_hand():
    first, second = word_times(SPANS, [(0, 2), (3, 4)], ["ab", "c"], seconds_per_frame=0.04, offset=10.0)
    assert (first.text, second.text) == ("ab", "c")
    assert (first.start, first.end) == pytest.approx((10.08, 10.24))
    assert first.confidence == pytest.approx((2 * 0.5 + 0.8) / 3)
    assert (second.start, second.end) == pytest.approx((10.4, 10.52))
    assert second.confidence == pytest.approx(0.4)


def test_peak_times_by_hand():
    hypothesis = SimpleNamespace(frames=(2, 6, 40), confidence=(0.5, 0.7, 0.9))
    times = peak_times(hypothesis, [(0, 2), (2, 3)], ["ab", "c"], seconds_per_frame=0.04, offset=1.0, duration=1.7)
    # Peaks at 0.1, 0.26 and 1.62 s.
    assert [t.text for t in times] == ["ab", "c"]
    assert (times[0].start, times[0].end) == pytest.approx((1.0, 1.76))  # the begin of the recording; 0.5 s later
    assert (times[1].start, times[1].end) == pytest.approx((2.12, 2.7))  # 0.5 s before; the end of the recording
    assert times[0].confidence == pytest.approx(0.6)
    a, b, c = peak_times(hypothesis, [(0, 1), (1, 2), (2, 3)], list("abc"), seconds_per_frame=0.04)
    assert a.end == b.start == pytest.approx(0.18)  # half way
    assert c.end == pytest.approx(2.12)


def test_peak_times_of_nothing():
    assert peak_times(SimpleNamespace(frames=(), confidence=()), [], [], seconds_per_frame=0.04) == []
    assert word_times([], [], [], seconds_per_frame=0.04) == []


def test_words_must_have_tokens_and_texts():
    with pytest.raises(DataError, match=r"word 1 has tokens 2\.\.2 of 4"):
        word_times(SPANS, [(0, 2), (2, 2)], ["a", "b"], seconds_per_frame=0.04)
    with pytest.raises(DataError, match=r"word 0 has tokens 0\.\.5 of 4"):
        word_times(SPANS, [(0, 5)], ["a"], seconds_per_frame=0.04)
    with pytest.raises(DataError, match="got 1 words and 2 texts"):
        word_times(SPANS, [(0, 1)], ["a", "b"], seconds_per_frame=0.04)
