"""Random access to FASTA files through their index."""

import gzip
import os
import pickle

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.domains.dna.test_formats import SEQUENCES, message, pack, write

from vertebra.domains.dna import records
from vertebra.domains.dna.formats import (
    IndexedFasta,
)
from vertebra.errors import UnknownNameError


@given(
    content=st.lists(st.tuples(SEQUENCES), min_size=1, max_size=10),
    width=st.integers(1, 30),
    block=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
    packed=st.booleans(),
    last=st.booleans(),
    data=st.data(),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range_of_any_fasta(tmp_path, monkeypatch, content, width, block, end, packed, last, data):
    monkeypatch.setattr(records.read_blocks, "__defaults__", (block,))
    lines = []
    for number, (sequence,) in enumerate(content):
        lines += [f">s{number} about", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    path = tmp_path / "x.fa"
    pack(path, (end.join(lines) + end * last).encode(), "bgzip" if packed else "plain")
    monkeypatch.setattr(records.read_blocks, "__defaults__", (1 << 22,))
    with IndexedFasta(path, write_index=False) as made:
        pass
    monkeypatch.setattr(records.read_blocks, "__defaults__", (block,))
    from vertebra.domains.dna.fasta_index import build_index

    with IndexedFasta(path, write_index=False) as fasta:
        assert build_index(path) == made.entries
        assert fasta.lengths == {f"s{n}": len(s) for n, (s,) in enumerate(content)}
        for number, (sequence,) in enumerate(content):
            start = data.draw(st.integers(0, len(sequence)))
            stop = data.draw(st.integers(start, len(sequence)))
            assert fasta.fetch(f"s{number}", start, stop) == sequence[start:stop]
            assert fasta.fetch(f"s{number}") == sequence


def test_index_is_that_of_samtools(tmp_path):
    path = write(tmp_path, "a.fa", ">one x\nACGTA\nCGTAC\nGT\n>two\r\nAC\r\nG\r\n>empty\n>three\nACG\n")
    fasta = IndexedFasta(path)
    assert (
        fasta.index_path.read_text() == "one\t12\t7\t5\t6\ntwo\t3\t28\t2\t4\nempty\t0\t42\t0\t0\nthree\t3\t49\t3\t4\n"
    )
    assert oct(fasta.index_path.stat().st_mode & 0o777) == oct(path.stat().st_mode & 0o666)
    assert list(fasta.entries) == ["one", "two", "empty", "three"]
    assert ("one" in fasta, "four" in fasta, len(fasta)) == (True, False, 4)
    assert fasta.fetch("one", 3, 11) == "TACGTACG"
    assert fasta.fetch("empty") == ""


def test_a_good_index_is_used_and_a_stale_or_damaged_one_made_anew(tmp_path):
    path = write(tmp_path, "a.fa", ">a\nACGT\nAC\n")
    index = IndexedFasta(path).index_path
    index.write_text("renamed\t6\t3\t4\t5\n")
    assert IndexedFasta(path).lengths == {"renamed": 6}
    for broken in ("a\t6\t3\t4\n", "a\tx\t3\t4\t5\n", "", "a\t60\t3\t4\t5\n", "a\t2\t3\t4\t5\n", "\0\1"):
        index.write_text(broken)
        assert IndexedFasta(path).lengths == {"a": 6}
        assert index.read_text() == "a\t6\t3\t4\t5\n"
    index.write_text("renamed\t6\t3\t4\t5\n")
    os.utime(index, (1, 1))
    assert IndexedFasta(path).lengths == {"a": 6}
    index.write_text("a\t6\t3\t2\t3\n")
    assert "record 'a': the index a.fa.fai does not fit the file; delete it" in message(
        lambda: IndexedFasta(path).fetch("a", 2, 4)
    )


def test_index_stays_in_memory_where_it_cannot_be_written(tmp_path, monkeypatch):
    path = write(tmp_path, "a.fa", ">a\nACGT\nAC\n")

    def refuse(**_):
        raise PermissionError

    monkeypatch.setattr("tempfile.mkstemp", refuse)
    assert IndexedFasta(path).fetch("a", 2) == "GTAC"
    assert [p.name for p in tmp_path.iterdir()] == ["a.fa"]


def test_indexed_fasta_survives_pickling(tmp_path):
    path = tmp_path / "a.fa"
    pack(path, b">a\n" + b"ACGTT\n" * 50_000, "bgzip")
    fasta = pickle.loads(pickle.dumps(IndexedFasta(path)))
    assert fasta.fetch("a", 150_003, 150_008) == "TTACG"


def test_index_refusals(tmp_path):
    path = write(tmp_path, "a.fa", ">a\nAC\nACGT\n")
    assert message(lambda: IndexedFasta(path)) == (
        f"{path}, record 'a' (line 3): the lines of a record must have one length to be read in part; "
        "wrap it anew, for example with: seqkit seq -w 60."
    )
    for text, part in {
        ">a\n\nAC\n": "record 'a' (line 3): the lines of a record must have one length",
        ">a\nAC\nA\nAC\n": "record 'a' (line 4): the lines of a record must have one length",
        ">a\nAC\n>a\nAC\n": "record 'a' (line 3): a record before it has the same name; rename one of them.",
        ">\nAC\n": "record '' (line 1): has no name after '>'; give it one.",
        "@a\nAC\n+\nII\n": "holds no FASTA record; only FASTA can be indexed.",
    }.items():
        assert part in message(lambda text=text: IndexedFasta(write(tmp_path, "b.fa", text)))
    packed = write(tmp_path, "c.fa.gz", gzip.compress(b">a\nAC\n"))
    assert "c.fa.gz: a gzip file cannot be read in part; decompress it (gunzip)" in message(
        lambda: IndexedFasta(packed)
    )
    good = IndexedFasta(write(tmp_path, "d.fa", ">chr1\nACGT\n>chr2\nAC\n"))
    assert "must satisfy 0 <= start <= stop <= 4, got 2 and 5; clip the range" in message(
        lambda: good.fetch("chr1", 2, 5)
    )
    with pytest.raises(UnknownNameError, match=r"unknown record of .*d.fa 'chr'. Did you mean"):
        good.fetch("chr")


# Parity with Biopython on real files
