"""Greedy and prefix beam search beside sums over all paths; hot words beside sums by hand."""

import itertools
import math

import pytest
import torch

from vertebra.domains.speech.decoding import CombinedScorer, beam_decode, combine, greedy, prefix_beam_search
from vertebra.domains.speech.hotwords import Hotwords
from vertebra.errors import ConfigError, DataError, ShapeError

WIDE = {"beam": 2000, "top_k": 10, "min_log_prob": -math.inf}


def random_posteriors(seed, length, size, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(length, size, generator=generator, dtype=torch.float64)).log_softmax(-1)


def collapse(path, blank=0):
    return tuple(token for token, _ in itertools.groupby(path) if token != blank)


def all_prefixes(log_probs, blank=0):
    """Log-probability of every text, from the sum over all paths, best first."""
    length, size = log_probs.shape
    sums = {}
    for path in itertools.product(range(size), repeat=length):
        score = sum(log_probs[t, token].item() for t, token in enumerate(path))
        sums.setdefault(collapse(path, blank), []).append(score)
    table = {ids: math.log(sum(math.exp(s) for s in scores)) for ids, scores in sums.items()}
    return sorted(table.items(), key=lambda row: (-row[1], row[0]))


def peaky(texts, size, length, seed=0, noise=0.3):
    """Posteriors in which each text is as good as certain; a blank between all tokens."""
    generator = torch.Generator().manual_seed(seed)
    logits = noise * torch.randn(len(texts), length, size, generator=generator)
    logits[:, :, 0] += 9
    for row, ids in enumerate(texts):
        for number, token in enumerate(ids):
            logits[row, 1 + 3 * number : 3 + 3 * number, token] += 20
            logits[row, 2 + 3 * number, token] += 1
    return logits.log_softmax(-1)


@pytest.mark.parametrize("seed", range(24))
def test_beam_ranks_as_the_sum_over_all_paths(seed):
    log_probs = random_posteriors(seed, 1 + seed % 5, 2 + seed % 3)
    expected = all_prefixes(log_probs)
    found = prefix_beam_search(log_probs, nbest=2000, **WIDE)
    assert [h.ids for h in found] == [ids for ids, _ in expected]
    assert [h.score for h in found] == pytest.approx([score for _, score in expected], abs=1e-9)
    assert all(h.total == h.score for h in found)


@pytest.mark.parametrize("seed", range(6))
def test_beam_with_another_blank(seed):
    log_probs = random_posteriors(seed, 4, 3)
    expected = all_prefixes(log_probs, blank=2)
    found = prefix_beam_search(log_probs, nbest=2000, blank=2, **WIDE)
    assert [h.ids for h in found] == [ids for ids, _ in expected]


def test_default_pruning_keeps_the_best_of_random_cases():
    for seed in range(30):
        log_probs = random_posteriors(seed, 5, 4)
        assert prefix_beam_search(log_probs)[0].ids == all_prefixes(log_probs)[0][0]


def test_scores_are_those_of_the_ctc_loss():
    log_probs = random_posteriors(3, 12, 6, scale=4)
    for found in prefix_beam_search(log_probs, nbest=5, **WIDE):
        loss = torch.nn.functional.ctc_loss(
            log_probs[:, None], torch.tensor([found.ids]), torch.tensor([12]), torch.tensor([len(found.ids)])
        )
        assert found.score == pytest.approx(-loss.item() * max(len(found.ids), 1), abs=1e-6)


def test_the_sum_of_paths_beats_the_best_path():
    log_probs = torch.tensor([[0.6, 0.4], [0.6, 0.4]], dtype=torch.float64).log()
    assert greedy(log_probs[None], torch.tensor([2]))[0].ids == ()
    best, second = prefix_beam_search(log_probs, nbest=2)
    assert best.ids == (1,)
    assert best.score == pytest.approx(math.log(0.64))
    assert second.ids == ()
    assert second.score == pytest.approx(math.log(0.36))


def test_ties_are_ordered_by_their_ids():
    even = torch.full((2, 3), 1 / 3, dtype=torch.float64).log()
    found = prefix_beam_search(even, nbest=7, **WIDE)
    assert [h.ids for h in found] == [(1,), (2,), (), (1, 2), (2, 1)]
    assert found == prefix_beam_search(even, nbest=7, **WIDE)
    narrow = prefix_beam_search(even, beam=2, nbest=2)
    assert [h.ids for h in narrow] == [(1,), ()]


def test_greedy_against_a_loop():
    log_probs = torch.stack([random_posteriors(seed, 17, 4, 1.0) for seed in range(8)])
    lengths = torch.tensor([17, 0, 1, 5, 16, 17, 9, 2])
    found = greedy(log_probs, lengths)
    for row, hypothesis in enumerate(found):
        path = log_probs[row, : lengths[row]].argmax(-1).tolist()
        values = log_probs[row, : lengths[row]].amax(-1).tolist()
        frames, t = [], 0
        for token, run in itertools.groupby(path):
            count = len(list(run))
            if token:
                frames.append(max(range(t, t + count), key=lambda i: values[i]))
            t += count
        assert hypothesis.ids == collapse(path)
        assert hypothesis.frames == tuple(frames)
        assert hypothesis.confidence == pytest.approx([math.exp(values[t]) for t in frames])
        assert hypothesis.score == pytest.approx(sum(values))
        assert hypothesis.total == hypothesis.score


def test_beam_is_greedy_where_nothing_is_in_doubt():
    texts = [(3, 3, 1), (2,), (), (4, 1, 4, 2)]
    log_probs = peaky(texts, size=5, length=14)
    lengths = torch.full((4,), 14)
    easy = greedy(log_probs, lengths)
    beams = beam_decode(log_probs, lengths, beam=4)
    for text, a, (b,) in zip(texts, easy, beams, strict=True):
        assert a.ids == b.ids == text
        assert a.frames == b.frames == tuple(2 + 3 * number for number in range(len(text)))
        assert a.confidence == pytest.approx(b.confidence)
        assert a.score <= b.score


def test_padding_may_hold_anything():
    log_probs = peaky([(1, 2), (3,)], size=5, length=14)
    expected = greedy(log_probs[:, :7], torch.tensor([7, 4]))
    log_probs[0, 7:] = math.nan
    log_probs[1, 4:] = math.inf
    assert greedy(log_probs, torch.tensor([7, 4])) == expected
    found = [rows[0] for rows in beam_decode(log_probs, torch.tensor([7, 4]))]
    assert [h.ids for h in found] == [h.ids for h in expected] == [(1, 2), (3,)]
    with pytest.raises(DataError, match="greedy: the log-probabilities hold NaN"):
        greedy(log_probs, torch.tensor([8, 4]))
    with pytest.raises(DataError, match="prefix_beam_search: the log-probabilities hold NaN"):
        beam_decode(log_probs, torch.tensor([8, 4]))


def test_beam_decode_reads_no_padding():
    log_probs = peaky([(1, 2, 3, 4)], size=5, length=14)
    (found,) = beam_decode(log_probs, torch.tensor([6]))
    assert found == prefix_beam_search(log_probs[0, :6])
    assert found[0].ids == (1, 2)


@pytest.mark.parametrize("length", [0, 1, 40])
def test_silence_is_empty(length):
    log_probs = peaky([()], size=5, length=length)
    for found in (greedy(log_probs, torch.tensor([length]))[0], prefix_beam_search(log_probs[0])[0]):
        assert (found.ids, found.frames, found.confidence) == ((), (), ())
        assert found.score == pytest.approx(log_probs[0, :, 0].sum().item(), abs=1e-3)


def test_no_frames_at_all():
    assert greedy(torch.zeros(0, 3, 4), torch.zeros(0, dtype=torch.long)) == []
    (found,) = prefix_beam_search(torch.zeros(0, 4), nbest=3)
    assert (found.ids, found.score) == ((), 0.0)


def test_one_frame():
    log_probs = torch.tensor([[0.2, 0.5, 0.3]], dtype=torch.float64).log()
    found = prefix_beam_search(log_probs, nbest=3)
    assert [(h.ids, h.frames) for h in found] == [((1,), (0,)), ((2,), (0,)), ((), ())]
    assert [h.confidence for h in found[:2]] == [pytest.approx((0.5,)), pytest.approx((0.3,))]


def test_blank_skip_keeps_repeats_apart_and_the_score():
    log_probs = peaky([(3, 3, 1)], size=5, length=60)[0]
    whole, skipped = prefix_beam_search(log_probs)[0], prefix_beam_search(log_probs, blank_skip=0.95)[0]
    assert whole.ids == skipped.ids == (3, 3, 1)
    assert whole.frames == skipped.frames
    assert skipped.score == pytest.approx(whole.score, abs=1e-2)
    with pytest.raises(ConfigError, match=r"blank_skip must lie between 0 and 1, got 1\.5"):
        prefix_beam_search(log_probs, blank_skip=1.5)


def test_the_best_token_is_tried_however_improbable():
    even = torch.zeros(1, 1000)
    even[0, 7] = 1e-3
    assert prefix_beam_search(even.log_softmax(-1))[0].ids == (7,)  # -6.9, below the -5 of the default


def test_top_k_counts_tokens_beside_the_blank():
    log_probs = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    assert [h.ids for h in prefix_beam_search(log_probs, top_k=1, nbest=4)] == [(), (1,)]
    assert [h.ids for h in prefix_beam_search(log_probs, top_k=2, nbest=4)] == [(), (1,), (2,)]


class Prefers:
    """Adds a value for each occurrence of a token, and one at the end if it came last."""

    def __init__(self, token, value, end=0.0):
        self.token, self.value, self.end = token, value, end

    def start(self):
        return None

    def extend(self, state, token):
        return token, self.value if token == self.token else 0.0

    def finish(self, state):
        return self.end if state == self.token else 0.0


@pytest.mark.parametrize("seed", range(8))
def test_scorers_add_and_rank_exactly(seed):
    log_probs = random_posteriors(seed, 5, 4)
    scorer = combine([Prefers(1, 0.7, -0.4), Prefers(2, -1.3)])
    assert isinstance(scorer, CombinedScorer)

    def extra(ids):
        return 0.7 * ids.count(1) - 1.3 * ids.count(2) - (0.4 if ids and ids[-1] == 1 else 0.0)

    expected = [(ids, score, score + extra(ids)) for ids, score in all_prefixes(log_probs)]
    expected.sort(key=lambda row: -row[2])
    found = prefix_beam_search(log_probs, nbest=2000, scorer=scorer, **WIDE)
    assert [h.ids for h in found] == [row[0] for row in expected]
    assert [h.score for h in found] == pytest.approx([row[1] for row in expected])
    assert [h.total for h in found] == pytest.approx([row[2] for row in expected])


def test_forgetting_what_a_scorer_said_and_a_band_change_nothing(monkeypatch):
    log_probs = random_posteriors(4, 40, 5)
    scorer = Prefers(1, 0.7, -0.4)
    expected = prefix_beam_search(log_probs, nbest=4, scorer=scorer)
    monkeypatch.setattr("vertebra.domains.speech.decoding.MEMORY", 3)
    monkeypatch.setattr("vertebra.domains.speech.decoding.EXACT_BYTES", 0)
    monkeypatch.setattr("vertebra.domains.speech.decoding.BAND", 30)
    assert len(expected[0].ids) > 15  # more than 30 states
    assert prefix_beam_search(log_probs, nbest=4, scorer=scorer) == expected


def slow_search(log_probs, beam, top_k, min_log_prob, scorer):
    """Prefix beam search as it is written down: a table of texts, all of them scored anew after each frame."""

    def extra(ids):
        state, total = scorer.start(), 0.0
        for token in ids:
            state, added = scorer.extend(state, token)
            total += added
        return total, scorer.finish(state)

    table = {(): (1.0, 0.0)}
    for frame in log_probs.tolist():
        order = sorted(range(1, len(frame)), key=lambda token: -frame[token])[:top_k]
        tokens = [token for token in order if frame[token] >= min_log_prob or frame[token] == max(frame)]
        after = {}

        def add(ids, blank, voiced, after=after):
            old = after.get(ids, (0.0, 0.0))
            after[ids] = (old[0] + blank, old[1] + voiced)

        for ids, (blank, voiced) in table.items():
            add(ids, (blank + voiced) * math.exp(frame[0]), 0.0)
            for token in tokens:
                p = math.exp(frame[token])
                if ids and token == ids[-1]:
                    add(ids, 0.0, voiced * p)
                    add((*ids, token), 0.0, blank * p)
                else:
                    add((*ids, token), 0.0, (blank + voiced) * p)
        ranked = {ids: math.log(sum(both)) + extra(ids)[0] for ids, both in after.items() if sum(both) > 0}
        table = {ids: after[ids] for ids in sorted(ranked, key=ranked.get, reverse=True)[:beam]}
    rows = [(ids, math.log(sum(both)), math.log(sum(both)) + sum(extra(ids))) for ids, both in table.items()]
    return sorted(rows, key=lambda row: -row[2])


@pytest.mark.parametrize("seed", range(12))
def test_a_narrow_search_is_that_of_the_slow_twin(seed):
    log_probs = random_posteriors(seed, 25, 7)
    hot = Hotwords([[1, 2], [3, 3, 4], [5]], 0.8)
    for beam, top_k, low, scorer in (
        (1, 6, -math.inf, Prefers(0, 0.0)),
        (3, 3, -2.5, Prefers(1, 0.5, -1.0)),
        (8, 6, -4.0, hot),
        (5, 2, -0.1, combine([hot, Prefers(2, -0.3)])),
    ):
        options = {"beam": beam, "top_k": top_k, "min_log_prob": low}
        expected = slow_search(log_probs, scorer=scorer, **options)
        found = prefix_beam_search(log_probs, scorer=scorer, nbest=beam, **options)
        assert [h.ids for h in found] == [row[0] for row in expected]
        assert [h.score for h in found] == pytest.approx([row[1] for row in expected])
        assert [h.total for h in found] == pytest.approx([row[2] for row in expected])


def test_combine_of_none_and_one():
    scorer = Prefers(1, 1.0)
    assert combine([]) is None
    assert combine([scorer]) is scorer


def test_frames_are_those_of_the_best_path_at_its_peaks():
    log_probs = torch.tensor(
        [[0.1, 0.8, 0.1], [0.05, 0.9, 0.05], [0.96, 0.02, 0.02], [0.1, 0.7, 0.2], [0.1, 0.1, 0.8]]
    ).log()
    best = prefix_beam_search(log_probs)[0]
    assert best.ids == (1, 1, 2)
    assert best.frames == (1, 3, 4)
    assert best.confidence == pytest.approx((0.9, 0.7, 0.8))


def test_half_precision_and_gradients_are_no_obstacle():
    log_probs = peaky([(3, 1)], size=5, length=10).requires_grad_()
    assert prefix_beam_search(log_probs[0])[0].ids == (3, 1)
    for dtype in (torch.float16, torch.bfloat16):
        half = log_probs.detach().to(dtype)
        assert prefix_beam_search(half[0])[0].ids == greedy(half, torch.tensor([10]))[0].ids == (3, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: prefix_beam_search(torch.zeros(2, 3, 4)), ShapeError, r"must be \(T, V\), got \(2, 3, 4\)"),
        (lambda: greedy(torch.zeros(3, 4), torch.tensor([3])), ShapeError, r"must be \(B, T, V\), got \(3, 4\)"),
        (lambda: greedy(torch.zeros(1, 3, 4), torch.tensor([4])), DataError, r"lie in 0\.\.3, found 4\.\.4"),
        (lambda: greedy(torch.zeros(1, 3, 4), torch.tensor([1, 2])), ShapeError, r"lengths must be \(1,\), got \(2,\)"),
        (lambda: prefix_beam_search(torch.full((2, 2), 3.0)), DataError, "at most 0, found 3; apply log_softmax"),
        (lambda: prefix_beam_search(torch.full((2, 2), math.nan)), DataError, "hold NaN"),
        (lambda: prefix_beam_search(torch.full((2, 2), -math.inf)), DataError, "a probability of 0"),
        (lambda: prefix_beam_search(torch.zeros(2, 2), blank=2), ConfigError, "one of the 2 tokens, got 2"),
        (lambda: prefix_beam_search(torch.zeros(2, 2), beam=0), ConfigError, "at least 1, got 0, 20 and 1"),
        (lambda: prefix_beam_search(torch.zeros(2, 2), nbest=17), ConfigError, "exceed the beam, got 17 and 16"),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()


LETTERS = " abcdefghijklmnopqrstuvwxyz"


def spell(text):
    return [LETTERS.index(letter) + 1 for letter in text]  # 0 is the blank, 1 the space


def bonus(scorer, ids):
    state, total = scorer.start(), 0.0
    for token in ids:
        state, added = scorer.extend(state, token)
        total += added
    return total + scorer.finish(state)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("the cat sat", 3.0),
        ("cat", 3.0),
        ("cat cat", 6.0),
        ("concatenate", 0.0),
        ("cats", 0.0),
        ("a tomcat", 0.0),
        ("ca", 0.0),
        ("cat c", 3.0),
        ("new york", 8.0),
        ("new york city", 8.0 + 10.0),  # 13 tokens, at most 10; and the shorter phrase in it
        ("new york cit", 8.0),
        ("new yorkshire", 0.0),
        ("new new york", 8.0),
    ],
)
def test_hot_words_by_hand(text, expected):
    phrases = [spell(p) for p in ("cat", "new york", " new york city ", "cat")]
    scorer = Hotwords(phrases, 1.0, limit=10.0, space=1)
    assert bonus(scorer, spell(text)) == pytest.approx(expected)


def test_hot_words_of_pieces_end_before_the_next_word():
    cat, s, con, enate, new = 5, 6, 7, 8, 9
    scorer = Hotwords([[cat], [new, cat]], [2.0, 1.5], starts={cat, con, new})
    assert bonus(scorer, [con, cat, new, cat]) == pytest.approx(2 + 2 + 3)
    assert bonus(scorer, [cat, s, con]) == 0
    assert bonus(scorer, [new, cat, enate, cat]) == pytest.approx(2)


def occurrences(ids, phrase, mode):
    count = 0
    for begin in range(len(ids) - len(phrase) + 1):
        end = begin + len(phrase)
        if tuple(ids[begin:end]) != tuple(phrase):
            continue
        before = mode != "space" or begin == 0 or ids[begin - 1] == 1
        after = end == len(ids) or {"none": True, "space": ids[end] == 1, "starts": ids[end] in (1, 2)}[mode]
        count += before and after
    return count


@pytest.mark.parametrize("mode", ["none", "space", "starts"])
def test_hot_words_of_random_texts_are_counted(mode):
    generator = torch.Generator().manual_seed(5)
    options = {"none": {}, "space": {"space": 1}, "starts": {"starts": {1, 2}}}[mode]
    seen = 0
    for _ in range(200):
        lengths = torch.randint(1, 5, (3,), generator=generator).tolist()
        phrases = [torch.randint(2, 5, (n,), generator=generator).tolist() for n in lengths]
        phrases[0] = [phrases[0][0], 1, *phrases[0]] if mode == "space" else phrases[0]
        ids = torch.randint(1, 5, (30,), generator=generator).tolist()
        weights = [0.5, 1.25, 2.0]
        scorer = Hotwords(phrases, weights, limit=4.0, **options)
        values = {}
        for phrase, weight in zip(phrases, weights, strict=True):
            values[tuple(phrase)] = max(values.get(tuple(phrase), 0), min(4.0, weight * len(phrase)))
        expected = sum(value * occurrences(ids, phrase, mode) for phrase, value in values.items())
        assert bonus(scorer, ids) == pytest.approx(expected)
        seen += expected > 0
    assert seen > 30


def test_half_a_phrase_holds_no_more_than_its_limit():
    scorer = Hotwords([list(range(1, 101))], 3.0, limit=6.0)
    state, total = scorer.start(), 0.0
    for token in range(1, 100):
        state, added = scorer.extend(state, token)
        total += added
        assert 0 < total < 6
    assert scorer.finish(state) == pytest.approx(-total)
    state, added = scorer.extend(state, 100)
    assert total + added + scorer.finish(state) == pytest.approx(6.0)


def test_a_phrase_is_found_with_its_bonus_only():
    """The posteriors hear "cab"; the last letter of "cat" is e^2.3 times less likely."""
    texts = spell("a cab")
    log_probs = peaky([tuple(texts)], size=28, length=20)[0]
    last = slice(1 + 3 * 4, 3 + 3 * 4)
    log_probs = log_probs.exp()
    log_probs[last, spell("b")[0]] = 0.9
    log_probs[last, spell("t")[0]] = 0.09
    log_probs = log_probs.log()
    assert list(prefix_beam_search(log_probs)[0].ids) == spell("a cab")
    found = prefix_beam_search(log_probs, scorer=Hotwords([spell("cat")], 1.6, space=1))[0]
    assert list(found.ids) == spell("a cat")
    assert found.total == pytest.approx(found.score + 4.8)
    for weight, phrase in ((0.7, "cat"), (1.6, "cats"), (1.6, "at")):  # too little; not the word; within the word
        scorer = Hotwords([spell(phrase)], weight, space=1)
        other = prefix_beam_search(log_probs, scorer=scorer)[0]
        assert list(other.ids) == spell("a cab")
        assert other.total == pytest.approx(other.score)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Hotwords([[1, 2], [1]], space=1), "phrase 1 must have tokens, all at least 0; got \\[1\\]"),
        (lambda: Hotwords([[-1]]), r"phrase 0 must have tokens, all at least 0; got \[-1\]"),
        (lambda: Hotwords([[2]], 0.0), r"weights and limit must be above 0, got 0\.0"),
        (lambda: Hotwords([[2]], [1.0, 2.0]), "one weight or one a phrase, got 2 for 1"),
        (lambda: Hotwords([[2]], space=1, starts={2}), "give one of both"),
    ],
)
def test_hot_word_errors(call, words):
    with pytest.raises(ConfigError, match=words):
        call()


def test_no_hot_words_add_nothing():
    assert bonus(Hotwords([], space=1), spell("the cat")) == 0
