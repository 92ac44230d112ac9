"""ARPA files and their scores by hand, beside KenLM, and in a beam search; the decoder with a lexicon."""

import gzip
import itertools
import math
import re
import sys

import pytest
import torch
import torchaudio.models.decoder

from vertebra.domains.speech.decoding import combine, prefix_beam_search
from vertebra.domains.speech.flashlight import lexicon_decoder, read_lexicon
from vertebra.domains.speech.hotwords import Hotwords
from vertebra.domains.speech.language_model import KenLMModel, LanguageModelScorer, read_arpa
from vertebra.errors import ConfigError, DataError, MissingExtraError

LN10 = math.log(10)
ARPA = """
\\data\\
ngram 1=6
ngram 2=4
ngram 3=2

\\1-grams:
-1.5\t<unk>
0\t<s>\t-0.3
-0.9\t</s>
-0.7\tred\t-0.2
-0.8\tcat\t-0.4
-1.1\tsat\t-0.1

\\2-grams:
-0.2\t<s> red\t-0.25
-0.5\tred cat\t-0.15
-0.6\tcat sat\t-0.05
-0.3\tsat </s>

\\3-grams:
-0.1\t<s> red cat
-0.15\tred cat sat

\\end\\
"""


@pytest.fixture
def arpa(tmp_path):
    path = tmp_path / "small.arpa"
    path.write_text(ARPA, encoding="utf-8")
    return path


def log10s(model, text):
    """log10 P of each word and of the end."""
    state, values = model.start(), []
    for word in text.split():
        state, value, _ = model.score(state, word)
        values.append(value / LN10)
    return [*values, model.finish(state) / LN10]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("red cat sat", [-0.2, -0.1, -0.15, -0.05 - 0.3]),
        ("", [-0.3 - 0.9]),
        ("sat red", [-0.3 - 1.1, -0.1 - 0.7, -0.2 - 0.9]),
        ("red sat", [-0.2, -0.25 - 0.2 - 1.1, -0.3]),
        ("cat cat", [-0.3 - 0.8, -0.4 - 0.8, -0.4 - 0.9]),
        ("red dog cat", [-0.2, -0.25 - 0.2 - 1.5, -0.8, -0.4 - 0.9]),
    ],
)
def test_scores_by_hand(arpa, text, expected):
    assert log10s(read_arpa(arpa), text) == pytest.approx(expected)


def test_unknown_words_are_told():
    model = read_arpa_text(ARPA)
    assert model.score(model.start(), "dog")[2] is False
    assert model.score(model.start(), "cat")[2] is True


def read_arpa_text(text):
    from vertebra.domains.speech.language_model import Lines, parse_arpa

    return parse_arpa(Lines(text.splitlines(), "x.arpa"))


def test_gzip_reads_the_same(arpa, tmp_path):
    packed = tmp_path / "small.arpa.gz"
    packed.write_bytes(gzip.compress(ARPA.encode()))
    assert read_arpa(packed).grams == read_arpa(arpa).grams
    packed.write_bytes(gzip.compress(ARPA.encode())[:60])
    with pytest.raises(DataError, match=r"small\.arpa\.gz: not an ARPA file"):
        read_arpa(packed)
    packed.write_bytes(ARPA.encode())
    with pytest.raises(DataError, match=r"small\.arpa\.gz: not an ARPA file"):
        read_arpa(packed)
    with pytest.raises(DataError, match="no such language model"):
        read_arpa(tmp_path / "none.arpa")


def test_unigrams_alone():
    model = read_arpa_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-0.5\ta\n-0.25 </s>\n\\end\\\n")
    assert log10s(model, "a a") == pytest.approx([-0.5, -0.5, -0.25])
    assert model.score(model.start(), "b")[1:] == (0.0, False)  # no <unk>: the scorer's penalty alone


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("\\data\\", "data", "line 25: an ARPA file has a line \\data\\, and none was found"),
        ("ngram 2=4", "ngram 3=4", "line 4: expected ngram 2=COUNT, found 'ngram 3=4'"),
        ("ngram 2=4", "ngram 2=four", "line 4: expected ngram 2=COUNT, found 'ngram 2=four'"),
        ("ngram 2=4", "ngram 2=5", "line 21: there should be 5 2-grams before \\3-grams:, found 4"),
        ("-0.8\tcat\t-0.4", "-0.8\tcat\t-0.4\t1", "line 12: expected log10(P), 1 words and maybe a backoff"),
        ("-0.8\tcat\t-0.4", "x\tcat\t-0.4", "line 12: log10(P) and backoff must be numbers, found 'x\\tcat\\t-0.4'"),
        ("-0.8\tcat\t-0.4", "0.8\tcat\t-0.4", "line 12: log10(P) must be at most 0, found 0.8"),
        ("-0.8\tcat\t-0.4", "nan\tcat\t-0.4", "line 12: log10(P) must be at most 0, found nan"),
        ("-1.1\tsat", "-1.1\tcat", "line 13: 'cat' comes twice"),
        ("-0.1\t<s> red cat", "-0.1\t<s> red cat -1", "line 22: expected log10(P), 3 words, found"),
        ("\\2-grams:", "\\4-grams:", "line 15: expected \\2-grams:, found \\4-grams:"),
        ("\\3-grams:", "\\end\\", "line 21: expected \\3-grams:, found \\end\\"),
        ("\\end\\", "", "line 25: the file ends without \\end\\"),
    ],
)
def test_broken_files_are_told_by_line(old, new, words):
    with pytest.raises(DataError, match=re.escape(f"x.arpa, {words}")):
        read_arpa_text(ARPA.replace(old, new, 1))


def test_no_counts():
    with pytest.raises(DataError, match=re.escape("line 2: expected ngram 1=COUNT, found \\1-grams:")):
        read_arpa_text("\\data\\\n\\1-grams:\n\\end\\\n")


def test_kenlm_says_the_same(arpa):
    pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    ours, theirs = read_arpa(arpa), KenLMModel(arpa, ["red", "cat", "sat"])
    for count in range(5):
        for words in itertools.product(["red", "cat", "sat", "dog"], repeat=count):
            assert log10s(theirs, " ".join(words)) == pytest.approx(log10s(ours, " ".join(words)), abs=1e-5)
    assert theirs.score(theirs.start(), "dog")[2] is False


def test_kenlm_errors(arpa, tmp_path, monkeypatch):
    pytest.importorskip("flashlight.lib.text.decoder.kenlm")
    with pytest.raises(DataError, match="no language model at"):
        KenLMModel(tmp_path / "none.bin", [])
    broken = tmp_path / "broken.arpa"
    broken.write_text("no model\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"KenLM cannot read .*broken\.arpa"):
        KenLMModel(broken, [])
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder.kenlm", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'vertebra[speech]'")):
        KenLMModel(arpa, [])


LETTERS = ["<blank>", " ", *"abcdefghijklmnopqrstuvwxyz", "<eng>"]
PIECES = ["<blank>", "<eng>", "▁red", "▁c", "at", "▁", "s", "▁dog"]


def spell(text):
    return tuple(LETTERS.index(letter) for letter in text)


def steps(scorer, ids):
    state, values = scorer.start(), []
    for token in ids:
        state, added = scorer.extend(state, token)
        values.append(added)
    return values, scorer.finish(state)


def test_words_of_characters_are_scored_when_they_end(arpa):
    scorer = LanguageModelScorer(read_arpa(arpa), LETTERS, alpha=0.5, beta=1.5, unknown=-4.0, space=1)
    ids = [LETTERS.index("<eng>"), *spell(" red  dog cat")]  # spaces in a row part two words, not three
    values, end = steps(scorer, ids)
    expected = [0.0] * len(ids)
    expected[5] = 0.5 * -0.2 * LN10 + 1.5
    expected[10] = 0.5 * (-0.25 - 0.2 - 1.5) * LN10 + 1.5 - 4
    assert values == pytest.approx(expected)
    assert end == pytest.approx(0.5 * (-0.8 - 0.4 - 0.9) * LN10 + 1.5)


def test_words_of_pieces_are_scored_when_the_next_begins(arpa):
    scorer = LanguageModelScorer(read_arpa(arpa), PIECES, vocabulary="sentencepiece", alpha=1.0, beta=0.0)
    values, end = steps(scorer, [1, 2, 3, 4, 5, 6, 4])  # red c|at ▁|s|at
    assert values == pytest.approx([0, 0, -0.2 * LN10, 0, -0.1 * LN10, 0, 0])
    assert end == pytest.approx((-0.15 - 0.05 - 0.3) * LN10)


def test_words_as_tokens(arpa):
    tokens = ["<blank>", "red", "cat", "<eng>"]
    scorer = LanguageModelScorer(read_arpa(arpa), tokens, vocabulary="words", alpha=1.0, beta=0.25)
    values, end = steps(scorer, [3, 1, 2])
    assert values == pytest.approx([0, -0.2 * LN10 + 0.25, -0.1 * LN10 + 0.25])
    assert end == pytest.approx((-0.15 - 0.4 - 0.9) * LN10)


def test_scorer_settings(arpa):
    model = read_arpa(arpa)
    with pytest.raises(ConfigError, match="got None for characters"):
        LanguageModelScorer(model, LETTERS)
    with pytest.raises(ConfigError, match="got 1 for sentencepiece"):
        LanguageModelScorer(model, PIECES, vocabulary="sentencepiece", space=1)
    with pytest.raises(ConfigError, match="one of 29 tokens, got 29"):
        LanguageModelScorer(model, LETTERS, space=29)


def heard(text, doubt=None, length=None):
    """Posteriors of a text, a token and a blank in turn; doubt is (place, letter, probability) of another reading."""
    ids = spell(text)
    probs = torch.full((length or 2 * len(ids) + 1, len(LETTERS)), 1e-6)
    probs[:, 0] = 1
    for place, token in enumerate(ids):
        probs[2 * place + 1, 0] = 1e-6
        probs[2 * place + 1, token] = 1
    if doubt:
        place, letter, share = doubt
        probs[2 * place + 1, LETTERS.index(letter)] = share
        probs[2 * place + 1, ids[place]] = 1 - share
    return (probs / probs.sum(-1, keepdim=True)).log()


def test_the_language_model_changes_the_result(arpa):
    log_probs = heard("red kat sat", (4, "c", 0.3))
    assert prefix_beam_search(log_probs)[0].ids == spell("red kat sat")
    scorer = LanguageModelScorer(read_arpa(arpa), LETTERS, space=1)
    best, second = prefix_beam_search(log_probs, scorer=scorer, nbest=2)
    assert best.ids == spell("red cat sat")
    assert best.total == pytest.approx(best.score + 0.5 * (-0.2 - 0.1 - 0.15 - 0.05 - 0.3) * LN10 + 3 * 1.5)
    assert second.ids == spell("red kat sat")
    both = combine([scorer, Hotwords([spell("kat")], 10.0, limit=20.0, space=1)])
    found = prefix_beam_search(log_probs, scorer=both)[0]
    assert found.ids == spell("red kat sat")
    assert found.total == pytest.approx(second.total + 20)


@pytest.fixture
def decoder():
    pytest.importorskip("flashlight.lib.text.decoder")
    return lexicon_decoder


def batch(*rows):
    lengths = torch.tensor([len(row) for row in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), lengths


def test_without_lexicon_it_finds_what_the_prefix_search_finds(decoder):
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (1, 4, 9, 14, 20, 25):
        logits = torch.randn(length, 6, generator=generator)
        logits.scatter_add_(1, torch.randint(6, (length, 1), generator=generator), torch.full((length, 1), 7.0))
        rows.append(logits.log_softmax(-1))
    for log_add in (True, False):
        found = decoder(6, None, log_add=log_add, beam=200)(*batch(*rows))
        for row, (ours,) in zip(rows, found, strict=True):
            expected = prefix_beam_search(row, beam=200, top_k=6, min_log_prob=-math.inf)[0]
            assert ours.ids == expected.ids
            assert ours.frames == expected.frames
            assert ours.confidence == pytest.approx(expected.confidence)
            assert ours.score == pytest.approx(expected.score, abs=1e-4)
            if log_add:
                assert ours.total == pytest.approx(expected.score, abs=1e-3)
            else:
                assert ours.total <= expected.score + 1e-3


def test_the_lexicon_is_all_it_knows(decoder):
    words = {word: [spell(word)] for word in ("red", "cat", "sat")}
    rows = heard("red kat", (4, "c", 0.3)), heard("sat sat sat"), heard("cat ")
    found = decoder(len(LETTERS), words, space=1, beta=0.0)(*batch(*rows))
    assert [h[0].ids for h in found] == [spell("red cat"), spell("sat sat sat"), spell("cat ")]
    for row, (best,) in zip(rows, found, strict=True):
        assert best.frames == tuple(2 * place + 1 for place in range(len(best.ids)))
        assert best.total == pytest.approx(best.score, abs=1e-3)
        assert best.score <= prefix_beam_search(row)[0].score + 1e-3


def test_kenlm_in_the_decoder_scores_as_our_scorer(decoder, arpa):
    words = {word: [spell(word)] for word in ("red", "cat", "kat", "sat")}
    log_probs = heard("red kat sat", (4, "c", 0.3))
    settings = {"alpha": 0.7, "beta": 0.4}
    plain = decoder(len(LETTERS), words, space=1, beta=0.0)
    assert plain(*batch(log_probs))[0][0].ids == spell("red kat sat")
    known = {word: spelling for word, spelling in words.items() if word != "kat"}
    for lexicon, unknown in ((words, -10.0), (known, -math.inf)):
        search = decoder(len(LETTERS), lexicon, space=1, model=arpa, unknown=unknown, **settings)
        best = search(*batch(log_probs))[0][0]
        scorer = LanguageModelScorer(read_arpa(arpa), LETTERS, space=1, **settings)
        expected = prefix_beam_search(log_probs, scorer=scorer)[0]
        assert best.ids == expected.ids == spell("red cat sat")
        assert best.total == pytest.approx(expected.total, abs=1e-3)
        assert best.score == pytest.approx(expected.score, abs=1e-3)


def test_pieces_need_no_space(decoder):
    lexicon = {"red": [(2,)], "cats": [(3, 4, 6)], "cat": [(3, 4)]}
    probs = torch.full((7, len(PIECES)), 1e-6)
    for frame, token in enumerate([2, 0, 3, 4, 0, 0, 2]):
        probs[frame, token] = 1
    log_probs = (probs / probs.sum(-1, keepdim=True)).log()
    best = decoder(len(PIECES), lexicon)(*batch(log_probs))[0][0]
    assert best.ids == (2, 3, 4, 2)
    assert best.frames == (0, 2, 3, 6)
    assert best.total == pytest.approx(best.score + 3 * 1.5, abs=1e-3)


def test_nbest_are_different_texts_in_order(decoder):
    words = {word: [spell(word)] for word in ("cat", "kat", "rat")}
    found = decoder(len(LETTERS), words, space=1, nbest=3)(*batch(heard("cat", (0, "k", 0.4))))[0]
    assert [h.ids for h in found][:2] == [spell("cat"), spell("kat")]
    assert len({h.ids for h in found}) == len(found)
    assert [h.total for h in found] == sorted((h.total for h in found), reverse=True)


def test_silence_and_no_frames(decoder):
    words = {"cat": [spell("cat")]}
    found = decoder(len(LETTERS), words, space=1)(*batch(heard("", length=9), torch.zeros(0, len(LETTERS))))
    assert [h[0].ids for h in found] == [(), ()]


def test_lexicon_files(tmp_path):
    path = tmp_path / "lexicon.txt"
    path.write_text("cat c a t\nread r e d\n\nread r e a d\n", encoding="utf-8")
    assert read_lexicon(path, LETTERS) == {"cat": [spell("cat")], "read": [spell("red"), spell("read")]}
    path.write_text("cat c a t\ncar c ä r\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"lexicon\.txt, line 2: 'ä' is none of the 29 tokens"):
        read_lexicon(path, LETTERS)
    path.write_text("cat\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"lexicon\.txt, line 1: 'cat' has no spelling"):
        read_lexicon(path, LETTERS)


def test_decoder_errors(decoder, arpa, tmp_path):
    words = {"cat": [spell("cat")]}
    with pytest.raises(ConfigError, match="a language model of words needs a lexicon"):
        decoder(29, None, model=arpa)
    with pytest.raises(DataError, match="no language model at"):
        decoder(29, words, model=tmp_path / "none.bin")
    with pytest.raises(DataError, match="the lexicon is empty"):
        decoder(29, {})
    with pytest.raises(DataError, match=r"'cat' must be spelt with tokens of 0\.\.28 without blank and space"):
        decoder(29, {"cat": [spell("cat ")]}, space=1)
    with pytest.raises(DataError, match="no space in it and not be empty, got 'a b'"):
        decoder(29, {"a b": [spell("ab")]})
    with pytest.raises(ConfigError, match="at least 1, got 0, 1, None"):
        decoder(29, words, beam=0)
    with pytest.raises(ConfigError, match="made for 29 tokens, got 4"):
        decoder(29, words)(torch.zeros(1, 2, 4), torch.tensor([2]))
    broken = tmp_path / "broken.arpa"
    broken.write_text("no model\n", encoding="utf-8")
    with pytest.raises(DataError, match="the decoder could not be made"):
        decoder(29, words, model=broken)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.delitem(vars(torchaudio.models.decoder), "ctc_decoder", raising=False)
    monkeypatch.delitem(sys.modules, "torchaudio.models.decoder._ctc_decoder", raising=False)
    monkeypatch.delattr("torchaudio.models.decoder._ctc_decoder", raising=False)
    monkeypatch.setitem(sys.modules, "flashlight.lib.text.decoder", None)
    with pytest.raises(MissingExtraError, match=re.escape("pip install 'vertebra[speech]'")):
        lexicon_decoder(3, None)
