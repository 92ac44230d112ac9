import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.nucleotide import KmerTokenizer, NucleotideTokenizer, reverse_complement_string, soft_mask

TOKENIZER = NucleotideTokenizer()
ACGTN = st.text(alphabet="ACGTN", max_size=200)
ACGT = st.text(alphabet="ACGT", min_size=1, max_size=200)


def test_ids_are_those_of_hyenadna():
    assert TOKENIZER.vocab_size == 12
    assert TOKENIZER.encode("ACGTN").tolist() == [7, 8, 9, 10, 11]
    specials = (TOKENIZER.cls_id, TOKENIZER.sep_id, TOKENIZER.bos_id, TOKENIZER.mask_id, TOKENIZER.pad_id)
    assert specials == (0, 1, 2, 3, 4)
    assert TOKENIZER.unk_id == 6
    assert TOKENIZER.base_ids == (7, 8, 9, 10)


def test_lower_case_u_iupac_and_the_rest():
    assert TOKENIZER.encode("acgtuU").tolist() == [7, 8, 9, 10, 10, 10]
    assert TOKENIZER.encode("RYSWKMBDHVNryswkmbdhvn").tolist() == [11] * 22
    assert TOKENIZER.encode("X-*.?1 é\x00").tolist() == [6] * 9
    assert TOKENIZER.encode(b"AC\xff").tolist() == [7, 8, 6]
    assert TOKENIZER.encode("").shape == (0,)
    assert TOKENIZER.encode("A").dtype == np.int64
    assert TOKENIZER.encode_uint8("ACGTN?").tolist() == TOKENIZER.encode("ACGTN?").tolist()


@given(ACGTN)
def test_decode_inverts_encode(sequence):
    assert TOKENIZER.decode(TOKENIZER.encode(sequence)) == sequence
    assert TOKENIZER.decode(TOKENIZER.encode(sequence.lower().replace("t", "u"))) == sequence


@given(st.text(max_size=100))
def test_any_text_has_one_id_a_character(text):
    ids = TOKENIZER.encode(text)
    assert len(ids) == len(text)
    assert set(ids.tolist()) <= {6, 7, 8, 9, 10, 11}
    assert TOKENIZER.encode(TOKENIZER.decode(ids)).tolist() == ids.tolist()


@given(st.lists(st.integers(0, 11), max_size=100))
def test_reverse_complement_of_ids_is_an_involution_in_numpy_and_torch(values):
    ids = np.array(values, dtype=np.int64)
    once = TOKENIZER.reverse_complement(ids)
    assert TOKENIZER.reverse_complement(once).tolist() == values
    assert TOKENIZER.reverse_complement(torch.tensor(values, dtype=torch.long)).tolist() == once.tolist()
    special = ids < 7
    assert (once[::-1][special] == ids[special]).all()


@given(st.text(alphabet="ACGTRYSWKMBDHVNacgtryswkmbdhvn*-", max_size=100))
def test_reverse_complement_of_letters_is_an_involution_and_agrees_with_ids(sequence):
    other = reverse_complement_string(sequence)
    assert reverse_complement_string(other) == sequence
    assert TOKENIZER.encode(other).tolist() == TOKENIZER.reverse_complement(TOKENIZER.encode(sequence)).tolist()


def test_reverse_complement_keeps_case_dtype_and_batch_axes():
    assert reverse_complement_string("AaCcRkBn-U") == "A-nVmYgGtT"
    batch = torch.tensor([[7, 8, 4], [10, 10, 1]], dtype=torch.uint8)
    other = TOKENIZER.reverse_complement(batch)
    assert other.dtype == torch.uint8
    assert other.tolist() == [[4, 9, 10], [1, 7, 7]]
    assert TOKENIZER.reverse_complement(batch.numpy()).dtype == np.uint8


def test_reverse_complement_agrees_with_biopython():
    from Bio.Seq import Seq

    letters = "ACGTRYSWKMBDHVNacgtryswkmbdhvn"
    assert reverse_complement_string(letters) == str(Seq(letters).reverse_complement())


def test_soft_mask_marks_lower_case():
    assert soft_mask("ACgtNn-").tolist() == [False, False, True, True, False, True, False]
    assert soft_mask(b"aC").tolist() == [True, False]


def test_decode_writes_mask_and_unknown_and_drops_the_other_specials():
    assert TOKENIZER.decode([0, 2, 7, 3, 6, 11, 1, 4, 5]) == "A_?N"
    assert TOKENIZER.decode(torch.tensor([7, 10])) == "AT"


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([7, 12], "NucleotideTokenizer: ids must lie in 0 .. 11, got 12; was the model made with another tokenizer?"),
        ([-1], "NucleotideTokenizer: ids must lie in 0 .. 11, got -1; was"),
        ([[7]], "NucleotideTokenizer: decode takes one row of integer ids, got shape (1, 1) of int64; decode a batch"),
        ([7.0], "NucleotideTokenizer: decode takes one row of integer ids, got shape (1,) of float64"),
    ],
)
def test_decode_refuses_what_is_no_row_of_ids(ids, text):
    with pytest.raises(DataError) as error:
        TOKENIZER.decode(ids)
    assert text in str(error.value)


@given(ACGT, st.integers(1, 8), st.booleans())
@settings(max_examples=200)
def test_kmers_round_trip_and_reverse(sequence, k, overlapping):
    tokenizer = KmerTokenizer(k, stride=1 if overlapping else k)
    if len(sequence) < k:
        return
    ids = tokenizer.encode(sequence)
    covered = sequence[: (len(ids) - 1) * tokenizer.stride + k]
    assert tokenizer.decode(ids) == covered
    other = tokenizer.reverse_complement(ids)
    assert other.tolist() == tokenizer.encode(reverse_complement_string(covered)).tolist()
    assert tokenizer.reverse_complement(other).tolist() == ids.tolist()


def test_kmer_ids_by_hand():
    tokenizer = KmerTokenizer(2)
    assert tokenizer.vocab_size == 7 + 16
    assert tokenizer.encode("AACu").tolist() == [7, 8, 7 + 4 + 3]
    assert KmerTokenizer(2, stride=2).encode("AAcGT").tolist() == [7, 7 + 4 + 2]
    assert tokenizer.encode("ANA").tolist() == [6, 6]
    assert tokenizer.decode(tokenizer.encode("ACGNTT")) == "ACGNTT"
    assert tokenizer.decode([0, 7, 1]) == "AA"


def test_kmer_refusals():
    with pytest.raises(ConfigError, match=r"KmerTokenizer: k must be 1 .. 8, got 9"):
        KmerTokenizer(9)
    with pytest.raises(ConfigError, match=r"KmerTokenizer: stride must be 1 or k \(6\), got 3"):
        KmerTokenizer(6, stride=3)
    with pytest.raises(DataError, match="a sequence must have at least k = 6 bases, got 3; leave it out"):
        KmerTokenizer(6).encode("ACG")


@pytest.mark.parametrize("tokenizer", [NucleotideTokenizer(), KmerTokenizer(3), KmerTokenizer(4, stride=4)])
def test_dict_round_trip_through_json(tokenizer):
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again == tokenizer
    assert type(again) is type(tokenizer)
    assert hash(again) == hash(tokenizer)
    assert again.encode("ACGTACGT").tolist() == tokenizer.encode("ACGTACGT").tolist()


@pytest.mark.parametrize(
    "path", [None, "os.system", "nucleotide.Nothing", "base.Tokenizer", "..errors.DataError", "nucleotide.np"]
)
def test_only_tokenizers_of_vertebra_are_made(path):
    with pytest.raises(ConfigError, match="tokenizer_from_dict: 'tokenizer' must name a tokenizer of vertebra"):
        tokenizer_from_dict({"tokenizer": path})


def test_unknown_argument_is_named():
    with pytest.raises(ConfigError, match="KmerTokenizer has no argument 'size'; its arguments are: k, stride"):
        tokenizer_from_dict({"tokenizer": "nucleotide.KmerTokenizer", "size": 3})
