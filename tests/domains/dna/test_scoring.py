"""Scores of changes against a slow twin, windows at every place, and what no model can score."""

import random

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains.dna.changes import (
    Change,
    change_at,
    plain,
    saturation_matrix,
    substitutions,
    trim,
    variant_changes,
    with_flanks,
)
from vertebra.domains.dna.fasta_index import IndexedFasta
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.dna.scoring import (
    likelihood_ratios,
    log_likelihoods,
    longest_window,
    saturate,
    slow_likelihood_ratio,
)
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.dna.variants import Variant
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.nucleotide import KmerTokenizer, NucleotideTokenizer

MASKED = "hybrid_test,causal=false"
TEXT = "".join(random.Random(3).choices("ACGT", k=60))


def made(backbone="hybrid_test", tokenizer=None, bos=True, classes=()):
    torch.manual_seed(1)
    tokenizer = tokenizer or NucleotideTokenizer()
    spec = DNASpec(tokenizer=tokenizer.to_dict(), task="lm", max_length=41, bos=bos, classes=classes)
    model = DNALanguageModel(create_backbone(backbone), spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module", params=["hybrid_test", "illama_test"])
def causal(request):
    return made(request.param)


def change(position, ref, alt, window=21, text=TEXT):
    assert text[position : position + len(ref)] == ref
    return change_at(lambda a, b: text[a:b], len(text), position, ref, alt, window)


def examples():
    other = {"A": "C", "C": "G", "G": "T", "T": "A"}
    found = [change(at, TEXT[at], other[TEXT[at]]) for at in (0, 3, 30, 57, 59)]
    found += [change(at, "", "GATTA") for at in (0, 30, 60)]
    found += [change(at, TEXT[at : at + 4], "") for at in (0, 30, 56)]
    return [*found, change(20, TEXT[20:23], "CCAGT"), Change("ANNR", "C", "T", "NACGTY")]


# ---------------------------------------------------------------- causal models


@pytest.mark.parametrize("strands", ["both", "forward"])
def test_equals_the_slow_twin(causal, strands):
    expected = [slow_likelihood_ratio(causal, c, strands=strands) for c in examples()]
    np.testing.assert_allclose(likelihood_ratios(causal, examples(), strands=strands), expected, atol=2e-4)
    assert np.abs(expected).min() > 1e-3


def test_batches_padding_and_order_change_nothing(causal):
    changes = examples()
    expected = likelihood_ratios(causal, changes)
    for tokens in (1, 50, 10_000):
        found = likelihood_ratios(causal, changes[::-1], batch_tokens=tokens)[::-1]
        np.testing.assert_allclose(found, expected, atol=2e-5)
    assert likelihood_ratios(causal, []).shape == (0,)


def test_windows_in_common_are_read_once(causal, monkeypatch):
    rows = []
    read = causal.embed_positions
    monkeypatch.setattr(causal, "embed_positions", lambda ids, mask: rows.append(len(ids)) or read(ids, mask))
    changes = [change(30, TEXT[30], alt) for alt in "ACGT".replace(TEXT[30], "")]
    likelihood_ratios(causal, [*changes, *changes])
    assert sum(rows) == 8  # the reference and three others, on two strands


def test_whole_rows_have_the_likelihood_of_their_tokens(causal):
    ids = torch.tensor([[2, 7, 8, 11, 9, 4], [2, 10, 4, 4, 4, 4]])
    mask = ids != 4
    logits = causal(ids, mask).log_softmax(-1)
    expected = [logits[0, 0, 7] + logits[0, 1, 8] + logits[0, 3, 9], logits[1, 0, 10]]
    found = log_likelihoods(causal, ids, mask, mask & (ids != 11))
    torch.testing.assert_close(found, torch.stack(expected).double(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 3])
def test_kmers_and_no_bos(stride):
    model = made("illama_test", KmerTokenizer(3, stride), bos=False)
    expected = [slow_likelihood_ratio(model, c) for c in examples()]
    np.testing.assert_allclose(likelihood_ratios(model, examples()), expected, atol=2e-4)
    with pytest.raises(DataError, match=r"at least k = 3 bases, got 2"):
        likelihood_ratios(model, [Change("A", "C", "T", "")])
    assert longest_window(model) == (41 - 1) * stride + 3


def test_labels_stand_before_the_bases():
    model = made(classes=("liver", "brain"))
    changes = examples()[:4]
    scores = {}
    for label in ("liver", "brain", None):
        scores[label] = likelihood_ratios(model, changes, label=label)
        expected = [slow_likelihood_ratio(model, c, label=label) for c in changes]
        np.testing.assert_allclose(scores[label], expected, atol=2e-4)
    assert np.abs(scores["liver"] - scores["brain"]).max() > 1e-3
    assert np.abs(scores["liver"] - scores[None]).max() > 1e-3
    assert (longest_window(model), longest_window(model, "liver")) == (40, 39)
    with pytest.raises(ConfigError, match=r"^label: must be one of liver, brain, got 'skin'\.$"):
        likelihood_ratios(model, changes, label="skin")
    with pytest.raises(ConfigError, match=r"^label: this model was trained without labels, got 'a'; leave it out"):
        likelihood_ratios(made(), changes, label="a")


def test_saturation_holds_every_substitution(causal):
    sequence = TEXT[:12].lower().replace("t", "u") + "NR" + TEXT[14:20]
    matrix = saturate(causal, sequence, batch_tokens=100)
    text = plain(sequence)
    for at, ref in enumerate(text):
        for column, alt in enumerate("ACGT"):
            if ref not in "ACGT":
                assert np.isnan(matrix[at, column])
            elif ref == alt:
                assert matrix[at, column] == 0
            else:
                (single,) = likelihood_ratios(causal, [Change(text[:at], ref, alt, text[at + 1 :])])
                assert matrix[at, column] == pytest.approx(single, abs=2e-5)


def test_saturation_of_a_sequence_longer_than_the_window(causal):
    matrix = saturate(causal, TEXT, window=21)
    for at in (0, 5, 30, 59):
        for column, alt in enumerate("ACGT"):
            expected = likelihood_ratios(causal, [change(at, TEXT[at], alt)])[0] if alt != TEXT[at] else 0
            assert matrix[at, column] == pytest.approx(expected, abs=2e-5)


# ---------------------------------------------------------------- masked models


@pytest.mark.parametrize("bos", [True, False])
def test_masked_models_answer_at_the_masked_base(bos):
    model = made(MASKED, bos=bos)
    changes = [c for c in examples() if len(c.ref) == len(c.alt) == 1]

    def direct(c):
        ids = model.tokenizer.encode(c.ref_window)
        ref, alt = ids[len(c.left)], model.tokenizer.encode(c.alt)[0]
        ids[len(c.left)] = model.tokenizer.mask_id
        front = [model.tokenizer.bos_id] * bos
        logits = model(torch.tensor([[*front, *ids.tolist()]]))[0, len(c.left) + bos]
        return float((logits[alt] - logits[ref]).detach())

    forward = [direct(c) for c in changes]
    np.testing.assert_allclose(likelihood_ratios(model, changes, strands="forward"), forward, atol=2e-5)
    both = [(direct(c) + direct(c.other_strand())) / 2 for c in changes]
    np.testing.assert_allclose(likelihood_ratios(model, changes, batch_tokens=30), both, atol=2e-5)
    matrix = saturate(model, TEXT[:15])
    assert matrix.shape == (15, 4)
    assert likelihood_ratios(model, []).shape == (0,)


def test_masked_kmers_are_refused():
    with pytest.raises(ConfigError, match=r"^scoring: a masked model needs single nucleotides, got k-mers;"):
        likelihood_ratios(made(MASKED, KmerTokenizer(3)), examples())


# ---------------------------------------------------------------- windows


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((5, "A", "C"), (5, "A", "C")),
        ((5, "CT", "AT"), (5, "C", "A")),
        ((5, "A", "ACG"), (6, "", "CG")),
        ((5, "ACG", "A"), (6, "CG", "")),
        ((5, "A", "AAA"), (5, "", "AA")),
        ((5, "ACGT", "AGGT"), (6, "C", "G")),
        ((5, "AC", "AC"), (5, "", "")),
    ],
)
def test_alleles_are_trimmed(given, expected):
    assert trim(*given) == expected


def test_windows_have_the_change_in_their_middle_and_end_with_the_contig():
    middle = change(30, TEXT[30], "N")
    assert (middle.left, middle.right) == (TEXT[20:30], TEXT[31:41])
    assert [len(change(at, TEXT[at], "N").ref_window) for at in (0, 4, 59)] == [11, 15, 11]
    longer = change(30, "", "GATTA")
    assert len(longer.alt_window) == 21
    assert longer.ref_window == TEXT[22:38]
    assert longer.other_strand().other_strand() == longer
    fetch, size = (lambda a, b: TEXT[a:b]), len(TEXT)
    assert with_flanks(fetch, size, 20, 30, 20) == (TEXT[15:35], 5)
    assert with_flanks(fetch, size, 0, 10, 20) == (TEXT[:15], 0)
    assert with_flanks(fetch, size, 20, 50, 10) == (TEXT[15:55], 5)
    longest = list(substitutions(TEXT[15:55], 5, 35, 10))
    assert longest[0].ref_window == change(20, TEXT[20], "N", 10).ref_window
    assert len(longest) == 90


def test_matrix_of_nothing():
    assert saturation_matrix("", np.zeros(0)).shape == (0, 4)
    assert np.isnan(saturation_matrix("N-", np.zeros(0))).all()


def test_alleles_without_a_score_say_why(tmp_path):
    path = tmp_path / "ref.fa"
    path.write_text(">c\nacguNACGTACGTACGTACGTACGTACGT\n")
    reference = IndexedFasta(path, write_index=False)

    def rules(ref, alts, position=0, masked=False):
        variant = Variant("c", position, "", ref, alts, 1, ())
        return [
            c[0] if isinstance(c, tuple) else (c.ref, c.alt) for c in variant_changes(variant, reference, 8, masked)
        ]

    assert rules("a", ("c", "<DEL>", "R", "*")) == [
        ("A", "C"),
        "'<DEL>' is symbolic and has no sequence",
        "R in an allele stands for several bases",
        "'*' is a deletion of another record",
    ]
    assert rules("N", ("A",), 4) == ["N in an allele stands for several bases"]
    assert rules("NA", ("NG",), 4) == [("A", "G")]
    assert rules("u", ("C",), 3) == [("T", "C")]
    assert rules("A", ("AACGTACGT", "AACGTACGTA"), 5) == [
        ("", "ACGTACGT"),
        "9 bases change, more than the window has (8)",
    ]
    assert rules("AC", ("GC", "A", "GT"), 5, masked=True) == [
        ("A", "G"),
        *["a masked model scores substitutions of single bases only"] * 2,
    ]
