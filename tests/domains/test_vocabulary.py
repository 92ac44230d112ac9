"""Vocabularies beside weights: what their files say, and which are of nucleotides."""

import json

import pytest

from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.vocabulary import nucleotide_ids, read_vocabulary
from vertebra.errors import LoadError

BASES = {"[PAD]": 0, "<s>": 1, "A": 2, "C": 3, "G": 4, "T": 5}


def put(folder, **files):
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        (folder / f"{stem}.{suffix}").write_text(content if isinstance(content, str) else json.dumps(content))
    return open_checkpoint(folder)


@pytest.mark.parametrize(
    "files",
    [
        {"vocab_json": BASES},
        {"vocab_txt": "\n".join(BASES)},
        {"tokenizer_json": {"model": {"type": "WordLevel", "vocab": BASES}, "added_tokens": []}},
        {
            "tokenizer_json": {
                "model": {"vocab": {k: v for k, v in BASES.items() if len(k) == 1}},
                "added_tokens": [{"id": 0, "content": "[PAD]"}, {"id": 1, "content": "<s>"}],
            }
        },
        {"tokenizer_json": {"model": {"type": "Unigram", "vocab": [[token, 0.0] for token in BASES]}}},
        {
            "vocab_json": {k: v for k, v in BASES.items() if len(k) == 1},
            "tokenizer_config_json": {"added_tokens_decoder": {"0": {"content": "[PAD]"}, "1": {"content": "<s>"}}},
        },
    ],
    ids=lambda files: "+".join(files),
)
def test_all_files_of_tokenizers_say_the_same(files, tmp_path):
    checkpoint = put(tmp_path, **files)
    assert read_vocabulary(checkpoint) == BASES
    assert nucleotide_ids(checkpoint) == BASES


@pytest.mark.parametrize("more", ["N", "a", "R", "-", "[MASK]", "<|endoftext|>"])
def test_letters_of_nucleic_acids_marks_and_special_tokens_are_of_nucleotides(more, tmp_path):
    assert nucleotide_ids(put(tmp_path, vocab_json={**BASES, more: 6}))


@pytest.mark.parametrize("more", ["E", "AA", "the", " ", "1"])
def test_other_tokens_are_not(more, tmp_path):
    assert nucleotide_ids(put(tmp_path, vocab_json={**BASES, more: 6})) == {}


def test_three_bases_or_no_file_or_a_large_vocabulary_are_not(tmp_path):
    assert nucleotide_ids(put(tmp_path)) == {}
    assert nucleotide_ids(put(tmp_path, vocab_json={k: v for k, v in BASES.items() if k != "T"})) == {}
    assert nucleotide_ids(put(tmp_path, vocab_json=BASES, config_json={"vocab_size": 12}))
    assert nucleotide_ids(put(tmp_path, vocab_json=BASES, config_json={"vocab_size": 50280})) == {}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"vocab_json": "{"}, r"vocab\.json: not readable as JSON"),
        ({"vocab_json": "[" * 100000}, r"vocab\.json: not readable as JSON"),
        ({"vocab_json": []}, r"vocab\.json: must hold a JSON object"),
        ({"vocab_json": {"A": "2"}}, r"vocab\.json: every token must have a whole number, got 'A': '2'"),
        ({"vocab_json": {"A": -1}}, r"got 'A': -1"),
        ({"tokenizer_json": {"model": {"vocab": 3}}}, r"tokenizer\.json: the vocabulary must be a JSON object"),
        ({"tokenizer_json": {"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}}, "got None: 1"),
    ],
    ids=["cut", "deep", "list", "text", "negative", "number", "no text"],
)
def test_damaged_files_are_named_and_are_of_no_nucleotides(files, words, tmp_path):
    checkpoint = put(tmp_path, **files)
    with pytest.raises(LoadError, match=words):
        read_vocabulary(checkpoint)
    assert nucleotide_ids(checkpoint) == {}
