import base64
import builtins
import copy
import pickle
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.errors import ConfigError, DataError, MissingExtraError
from vertebra.tokenizers.text import (
    CharacterTokenizer,
    SentencePieceTokenizer,
    WordTokenizer,
    is_special,
    learn_characters,
    learn_pieces,
    learn_words,
    make_tokenizer,
)

TEXTS = ["the cat sat on the mat", "the dog ate the cat's food", "a man a plan a canal"] * 3
SPECIALS = ("<na>", "<eng>", "<asr>")


@pytest.fixture(scope="module")
def learnt():
    pytest.importorskip("sentencepiece", reason="the extra `speech` is not installed")
    return learn_pieces(TEXTS, 22, SPECIALS, seed=1)


def spelt(tokenizer, ids):
    return [tokenizer.decode(ids[a:b]) for a, b in tokenizer.words(ids)]


def test_characters():
    tokens = learn_characters(["ba c", "a"], SPECIALS)
    assert tokens == ("<blank>", " ", "a", "b", "c", *SPECIALS)
    made = CharacterTokenizer(tokens)
    assert made.encode("ab c") == [2, 3, 1, 4]
    assert made.decode([2, 3, 1, 4]) == "ab c"
    assert made.decode([6, 7, 2, 0, 3]) == "ab"
    assert made.decode([6, 7, 2], skip_special=False) == "<eng><asr>a"
    assert made.words([6, 7, 1, 2, 3, 1, 1, 4, 0, 2]) == [(3, 5), (7, 10)]
    assert made.id_of("<asr>") == 7
    assert len(made) == 8
    assert made.encode("") == []
    assert made.words([]) == []


def test_what_the_alphabet_lacks():
    made = CharacterTokenizer(learn_characters(["abc"]))
    assert made.unknown("xaxyb") == ["x", "y"]
    with pytest.raises(DataError, match=r"^characters must be of the vocabulary, got 'x', 'y'; normalise the text"):
        made.encode("xaxyb")
    with pytest.raises(DataError, match="'l' and 5 more; "):
        made.encode("0defghijklmnopq")
    words = WordTokenizer(("<blank>", "yes", "no", "<unk>"))
    assert words.encode("yes maybe no") == [1, 3, 2]
    assert words.unknown("yes maybe no maybe <unk>") == ["maybe", "<unk>"]
    assert words.decode([1, 3, 2]) == "yes no"
    assert words.decode([1, 3, 2], skip_special=False) == "yes <unk> no"


def test_words():
    made = WordTokenizer(learn_words(["yes no", "go"], SPECIALS))
    assert made.tokens == ("<blank>", "go", "no", "yes", *SPECIALS)
    assert made.encode(" no  go ") == [2, 1]
    assert made.words([5, 2, 0, 1, 1]) == [(1, 2), (3, 4), (4, 5)]


@pytest.mark.parametrize("ids", [[-1], [8], [1, 100]])
def test_ids_outside(ids):
    made = CharacterTokenizer(learn_characters(["ba c"], SPECIALS))
    for use in (made.decode, made.words):
        with pytest.raises(DataError, match=rf"CharacterTokenizer: ids must be from 0 to 7, got {ids[-1]}"):
            use(ids)


def test_tokens_are_checked():
    with pytest.raises(ConfigError, match="the first token must be <blank>, got \\['a'\\]"):
        CharacterTokenizer(["a", "<blank>"])
    with pytest.raises(ConfigError, match="tokens must differ, got 'a' twice"):
        CharacterTokenizer(["<blank>", "a", "b", "a"])
    with pytest.raises(DataError, match=r"there is no token '<st_deu>' among 3; special ones are <blank>, <asr>"):
        CharacterTokenizer(["<blank>", "a", "<asr>"]).id_of("<st_deu>")
    with pytest.raises(ConfigError, match="special tokens must be written in angle brackets, got 'asr'"):
        learn_characters(["a"], ["asr"])
    with pytest.raises(DataError, match="must not hold what looks like a special token, got '<unk>'"):
        learn_words(["a <unk>"])
    for learn in (learn_characters, learn_words):
        with pytest.raises(DataError, match="must be learnt from text, got none"):
            learn([])
    assert [is_special(t) for t in ("<asr>", "<", "<>", "a>", "<a")] == [True, False, False, False, False]
    assert learn_characters(["a"], ["<blank>", "<na>", "<na>"]) == ("<blank>", "a", "<na>")


def test_pieces(learnt):
    tokens, model = learnt
    assert tokens[0] == "<blank>"
    assert tokens[-3:] == SPECIALS
    assert len(tokens) == 22 + 3
    made = SentencePieceTokenizer(tokens, model)
    for text in TEXTS:
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert spelt(made, ids) == text.split()
        assert ids == made._processor.EncodeAsIds(text)  # of a model of our own, ids are the same
    prefix = [made.id_of("<eng>"), made.id_of("<asr>")]
    assert made.decode([*prefix, 0, *made.encode("the cat")]) == "the cat"
    assert made.words([*prefix, *made.encode("the cat")])[0][0] >= 2


def test_tokenizers_travel_to_workers(learnt):
    for made in (CharacterTokenizer(["<blank>", *"the ca"]), SentencePieceTokenizer(*learnt)):
        assert pickle.loads(pickle.dumps(made)).encode("the cat") == made.encode("the cat")
        assert copy.deepcopy(made).tokens == made.tokens


def test_pieces_are_learnt_the_same_each_time(learnt, capfd):
    tokens, model = learn_pieces(TEXTS, 22, SPECIALS, seed=1)
    assert (tokens, model) == learnt
    assert capfd.readouterr() == ("", "")
    long = " ".join(["abc", "abd", "b"] * 3000)
    assert "c" in "".join(learn_pieces([long, "d a b"], 7)[0][1:])


def test_pieces_by_what_they_spell(learnt):
    """As in OWSM: <unk> behind the blank, and ids of the model shifted and permuted."""
    tokens, model = learnt
    theirs = ("<blank>", "<unk>", *reversed(tokens[1:-3]), "<na>", "<eng>", "<asr>", "<sos>")
    made = SentencePieceTokenizer(theirs, model)
    ids = made.encode("the cat sat")
    assert [theirs[i] for i in ids] == [tokens[i] for i in SentencePieceTokenizer(tokens, model).encode("the cat sat")]
    assert made.decode(ids) == "the cat sat"
    assert 1 in made.encode("the zebra")
    assert made.unknown("the zq zoo") == ["z", "q"]
    fewer = SentencePieceTokenizer([t for t in theirs if t != "<unk>"], model)
    with pytest.raises(DataError, match="pieces must be of the vocabulary, got 'z', 'q'; normalise"):
        fewer.encode("the zq zoo")


def test_pieces_that_cannot_be(learnt):
    tokens, model = learnt
    with pytest.raises(ConfigError, match="9 texts allow at most 23 pieces, got size 500"):
        learn_pieces(TEXTS, 500)
    with pytest.raises(ConfigError, match="9 texts allow at least 17 pieces, got size 5"):
        learn_pieces(TEXTS, 5)
    with pytest.raises(DataError, match="there must be text to learn from"):
        learn_pieces(["", " "], 10)
    with pytest.raises(ConfigError, match="3 bytes are no SentencePiece model"):
        SentencePieceTokenizer(tokens, b"abc")
    with pytest.raises(ConfigError, match="no piece in common"):
        SentencePieceTokenizer(["<blank>", "X"], model)


def test_make(learnt):
    tokens, model = learnt
    text = base64.b64encode(model).decode()
    assert isinstance(make_tokenizer("characters", ["<blank>", "a"]), CharacterTokenizer)
    assert isinstance(make_tokenizer("words", ["<blank>", "a"]), WordTokenizer)
    assert make_tokenizer("sentencepiece", tokens, text).encode("the cat") != []
    with pytest.raises(ConfigError, match="vocabulary must be characters, words or sentencepiece, got 'bpe'"):
        make_tokenizer("bpe", tokens)
    with pytest.raises(ConfigError, match="needs pieces"):
        make_tokenizer("sentencepiece", tokens)
    with pytest.raises(ConfigError, match="base64, got another text"):
        make_tokenizer("sentencepiece", tokens, "model.bpe")


def test_the_library_may_be_missing(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "sentencepiece", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingExtraError, match=r"install it with: pip install 'vertebra\[speech\]'"):
        learn_pieces(TEXTS, 22)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.lists(st.text("abcxyz'", min_size=1, max_size=6), max_size=8))
def test_words_are_those_of_the_text(words):
    text = " ".join(words)
    for made in (
        CharacterTokenizer(learn_characters(["abcxyz' "], SPECIALS)),
        WordTokenizer(learn_words([text, "a"], SPECIALS)),
    ):
        ids = made.encode(text)
        assert made.decode(ids) == text
        assert spelt(made, ids) == words
