import gzip
import pickle
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from Bio import SeqIO, bgzf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vertebra.domains.dna import formats, records
from vertebra.domains.dna.formats import (
    RecordError,
    find_tables,
    read_fasta,
    read_fastq,
    read_genbank,
    read_sequences,
    read_table,
    sniff_format,
)
from vertebra.errors import ConfigError, DataError

REAL = Path(__file__).parents[4] / "shared" / "data" / "dna"
realdata = pytest.mark.realdata
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason="no data sets in ../shared/data")


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def pairs(path, **options):
    return [(r.name, r.sequence) for r in read_sequences(path, **options)]


def message(call):
    def run():
        result = call()
        return list(result) if hasattr(result, "__next__") else result

    with pytest.raises(DataError) as error:
        run()
    return str(error.value)


# FASTA


def test_fasta_keeps_case_iupac_u_gaps_and_descriptions(tmp_path):
    path = write(tmp_path, "a.fa", "\n>one first of two\nACGTnn\nuRYK\n\n>two\n*-acgt\n")
    found = list(read_fasta(path))
    assert [(r.name, r.sequence, r.description) for r in found] == [
        ("one", "ACGTnnuRYK", "first of two"),
        ("two", "*-acgt", ""),
    ]
    assert found[0].quality is None
    assert found[0].phred is None


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_fasta_line_ends(tmp_path, end, last, mark):
    text = mark + end.join([">a x", "ACGT", "AC", "> b", "GG"]) + end * last
    assert pairs(write(tmp_path, "a.fa", text)) == [("a", "ACGTAC"), ("b", "GG")]


def test_format_is_told_by_content_not_by_extension(tmp_path):
    assert sniff_format(write(tmp_path, "a.fastq", ">a\nAC\n")) == "fasta"
    assert sniff_format(write(tmp_path, "a.fa", "@a\nAC\n+\nII\n")) == "fastq"
    assert sniff_format(write(tmp_path, "a.txt", "sequence,label\nAC,1\n")) == "table"
    assert sniff_format(write(tmp_path, "b.tsv", "seq\ty\nAC\t1\n")) == "table"
    assert sniff_format(write(tmp_path, "a.csv", gzip.compress(b">a\nAC\n"))) == "fasta"
    assert pairs(tmp_path / "a.csv") == [("a", "AC")]


NAMES = st.text(alphabet="abcXYZ019._|", min_size=1, max_size=8)
SEQUENCES = st.text(alphabet="ACGTNacgtnRYU*-", min_size=1, max_size=60)


@given(
    content=st.lists(st.tuples(NAMES, SEQUENCES), min_size=1, max_size=12),
    width=st.integers(1, 30),
    block=st.integers(1, 40),
    end=st.sampled_from(["\n", "\r\n"]),
    packing=st.sampled_from(["plain", "gzip", "bgzip"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fasta_comes_back_whatever_the_blocks(tmp_path, monkeypatch, content, width, block, end, packing):
    monkeypatch.setattr(records, "BLOCK", block)
    monkeypatch.setattr(records.read_blocks, "__defaults__", (block,))
    lines = []
    for name, sequence in content:
        lines += [f">{name} about", *(sequence[i : i + width] for i in range(0, len(sequence), width))]
    raw = (end.join(lines) + end).encode()
    path = tmp_path / "x.fa"
    pack(path, raw, packing)
    found = list(read_fasta(path, duplicates="allow"))
    assert [(r.name, r.sequence) for r in found] == content
    assert {r.description for r in found} == {"about"}


def pack(path, raw, packing):
    if packing == "bgzip":
        with bgzf.BgzfWriter(path) as file:
            file.write(raw)
    else:
        path.write_bytes(gzip.compress(raw) if packing == "gzip" else raw)


def test_line_numbers_and_record_errors_are_exact_whatever_the_blocks(tmp_path, monkeypatch):
    path = write(tmp_path, "a.fa", "\n>a\nAC\nGT\n\n>empty\n>b\nA!C\n>\nAC\n>c\nAC\n")
    for block in (1, 2, 3, 5, 8, 1000):
        monkeypatch.setattr(records.read_blocks, "__defaults__", (block,))
        bad = []
        if block > 1:  # a first block of one blank line is refused as blank
            assert [r.name for r in read_fasta(path, bad.append)] == ["a", "c"]
            assert [(e.record, e.line) for e in bad] == [("empty", 6), ("b", 7), ("#4", 9)]


def test_what_is_wrong_with_a_record_is_said(tmp_path):
    path = write(tmp_path, "a.fa", ">a\nAC\n>empty\n\n>b\nAC1\n>\nAC\n>p\nMKVLEFPQWW\n>a\nGG\n>x\nACGTX\n")
    bad = []
    assert [r.name for r in read_sequences(path, bad.append)] == ["a", "x"]
    assert [str(e).removeprefix(f"{path}, record ") for e in bad] == [
        "'empty' (line 3): has no bases; remove the record or add its sequence.",
        "'b' (line 5): has '1' at base 3, which is no nucleotide code; remove it or mend the file.",
        "'#4' (line 7): has no name after '>'; give it one.",
        "'p' (line 9): looks like protein: 50% of its letters (E, F, L, P, Q) are not nucleotide codes; "
        "give the nucleotide sequence.",
        "'a' (line 11): has the name of the record in line 1; rename one of them, or set duplicates to 'allow'.",
    ]
    assert bad[0].to_dict() == {
        "file": str(path),
        "record": "empty",
        "line": 3,
        "rule": "has no bases",
        "advice": "remove the record or add its sequence",
    }
    assert message(lambda: read_sequences(path)) == str(bad[0])


def test_duplicate_names_by_policy(tmp_path):
    path = write(tmp_path, "a.fa", ">a\nAC\n>a\nGG\n")
    assert "record 'a' (line 3): has the name of the record in line 1; rename" in message(lambda: read_sequences(path))
    bad = []
    assert pairs(path, on_error=bad.append, duplicates="report") == [("a", "AC"), ("a", "GG")]
    assert [e.line for e in bad] == [3]
    assert pairs(path, duplicates="allow") == [("a", "AC"), ("a", "GG")]
    with pytest.raises(ConfigError, match="duplicates: must be 'error', 'report' or 'allow', got 'keep'"):
        read_fasta(path, duplicates="keep")


def test_one_bad_record_in_ten_thousand_loses_nothing(tmp_path):
    rng = random.Random(0)
    content = [(f"r{i}", "".join(rng.choices("ACGT", k=50))) for i in range(10_000)]
    text = "".join(f">{n}\n{s if n != 'r4321' else 'MKVLEFPQWW'}\n" for n, s in content)
    bad = []
    assert pairs(write(tmp_path, "a.fa", text), on_error=bad.append) == [p for p in content if p[0] != "r4321"]
    assert [e.record for e in bad] == ["r4321"]
    text = "".join(f"@{n}\n{s}\n+\n{'I' * (len(s) - 7 * (n == 'r4321'))}\n" for n, s in content)
    bad.clear()
    assert pairs(write(tmp_path, "a.fq", text), on_error=bad.append) == [p for p in content if p[0] != "r4321"]
    assert [(e.record, e.rule) for e in bad] == [("r4321", "has 50 bases but 43 qualities")]


# Files that cannot be read at all


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.fa", b"", "a.fa: the file is empty; was its download or export interrupted?"),
        ("a.fa", b"\n \n", "a.fa: holds no record, only blank lines; a FASTA record begins with a line '>name'."),
        ("a.csv", b"\x00\x01ACGT", "a.csv: is a binary file (a NUL byte at offset 0), whatever its name says; give"),
        ("a.fa", b">x\nAC\x00GT", "a.fa: is a binary file (a NUL byte at offset 5), whatever its name says; give"),
        ("a.fa", b"hello world\n", "a.fa: holds no FASTA or FASTQ record, it begins with 'hello world'; FASTA begins"),
        ("a.fa", b"ACGTACGTACGT\n", "it looks like a sequence without a header: add a line '>name' before it."),
        ("a.fa", b"PK\x03\x04\x00", "a.fa: is a zip archive; unpack it."),
        ("a.fa", b"BZh91AY", "a.fa: is compressed with bzip2; decompress it."),
        ("a.fa", gzip.compress(b"BAM\x01\x00", mtime=0), "a.fa: is a BAM file; convert it with: samtools fastq FILE."),
        ("a.sam", b"@HD\tVN:1.6\n", "a.sam: is a SAM file; convert it with: samtools fastq FILE."),
        ("a.fa", ">x\nAC".encode("utf-16"), "a.fa: is UTF-16 text; save it as UTF-8."),
        (
            "a.fa",
            gzip.compress(b">x\nAC\n", mtime=0)[:6],
            "a.fa: its compressed data end early; copy or download it again.",
        ),
        ("a.fa", b"\x1f\x8b\x08\x00rubbish and more rubbish", "a.fa: its compressed data are damaged (Error -3"),
    ],
)
def test_unreadable_files(tmp_path, name, content, text):
    path = write(tmp_path, name, content)
    bad = []
    for options in ({}, {"on_error": bad.append}):
        assert text in message(lambda options=options: read_sequences(path, **options))
    assert not bad


def test_missing_file_folder_and_wrong_reader(tmp_path):
    assert message(lambda: read_sequences(tmp_path / "no.fa")).endswith("no.fa: no such file; check the path.")
    assert message(lambda: read_sequences(tmp_path)).endswith(": is a folder; name a file in it.")
    fastq = write(tmp_path, "a.fq", "@a\nAC\n+\nII\n")
    assert message(lambda: read_fasta(fastq)).endswith(
        "holds no FASTA record, it is fastq; read it with read_sequences."
    )
    assert message(lambda: read_genbank(fastq)).endswith(
        "holds no GenBank or EMBL record, it is fastq; read it with read_sequences."
    )
    assert message(lambda: read_table(fastq)).endswith("a.fq: is fastq, not a table; read it with read_sequences.")


@pytest.mark.parametrize("packing", ["gzip", "bgzip"])
@pytest.mark.parametrize("kind", ["fasta", "fastq"])
def test_truncated_gzip_gives_the_good_records_and_one_error(tmp_path, packing, kind):
    rng = random.Random(1)
    content = [(f"r{i}", "".join(rng.choices("ACGT", k=500))) for i in range(2000)]
    text = "".join(f">{n}\n{s}\n" if kind == "fasta" else f"@{n}\n{s}\n+\n{'I' * 500}\n" for n, s in content)
    path = tmp_path / "a.gz"
    pack(path, text.encode(), packing)
    whole = path.read_bytes()
    assert pairs(path) == content
    for cut in (len(whole) * 2 // 3, len(whole) - 4, len(whole) - 30):
        path.write_bytes(whole[:cut])
        bad = []
        found = pairs(path, on_error=bad.append)
        assert found == content[: len(found)]
        assert len(found) > 1000
        assert len(bad) == 1
        assert bad[0].rule.startswith("its compressed data end early")
        assert "compressed data end early; copy or download the file again." in message(
            lambda: read_sequences(path)
        ) or ("end marker is missing" in bad[0].rule)
    path.write_bytes(whole[:-28] if packing == "bgzip" else whole[:-8] + b"\0" * 8)
    bad = []
    assert len(pairs(path, on_error=bad.append)) >= 1999  # a wrong checksum at the end costs at most the last record
    assert len(bad) == 1
    rule = "its compressed data end early (the bgzip end marker is missing)"
    assert bad[0].rule == rule if packing == "bgzip" else "its compressed data are damaged" in bad[0].rule


def test_gzip_members_and_padding_are_read_through(tmp_path):
    raw = gzip.compress(b">a\nAC") + gzip.compress(b"GT\n>b\nTT\n") + b"\0" * 100
    assert pairs(write(tmp_path, "a.gz", raw)) == [("a", "ACGT"), ("b", "TT")]


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_record_of_200_megabases_is_refused_without_being_held(tmp_path, wrapped):
    path = tmp_path / "long.fa"
    line = b"ACGTACGTAC" * 100_000
    with path.open("wb") as file:
        file.write(b">first\nACGT\n>long\n")
        for _ in range(200):
            file.write(line + (b"\n" if wrapped else b""))
        file.write(b"\n>last\nACGT\n")
    bad = []
    tracemalloc.start()
    assert pairs(path, on_error=bad.append, max_length=10_000_000) == [("first", "ACGT"), ("last", "ACGT")]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60e6
    rule = "has more than 10,000,000 bases, the most read whole"
    assert str(bad[0]) == f"{path}, record 'long' (line 3): {rule}; {bad[0].advice}."
    assert bad[0].advice == "cut it into windows with IndexedFasta, or raise max_length"
    assert "record 'long' (line 3): has more than 100,000,000 bases" in message(lambda: read_sequences(path))


# FASTQ


def test_fastq_plain_and_wrapped_with_marks_in_the_qualities(tmp_path):
    text = "@a one\nACGT\n+\nII!~\n\n@b\nAC\nGT\n+b\n@I\n+@\n@c\nacgtn\n+\n@@@@@\n"
    found = list(read_fastq(write(tmp_path, "a.fq", text)))
    assert [(r.name, r.sequence, r.quality, r.description) for r in found] == [
        ("a", "ACGT", "II!~", "one"),
        ("b", "ACGT", "@I+@", ""),
        ("c", "acgtn", "@@@@@", ""),
    ]
    assert found[0].phred.tolist() == [40, 40, 0, 93]


@pytest.mark.parametrize(
    ("middle", "rule"),
    [
        ("@bad\nACGT\n+\nIII\n", "has 4 bases but 3 qualities"),
        ("@bad\nACGT\n+\nIIIII\n", "has 4 bases but 5 qualities"),
        ("@bad\nACGT\nIIII\n", "has no line '+' after its sequence"),
        ("@bad\n\n+\n\n", "has no bases"),
        ("bad\nACGT\n+\nIIII\n", "does not begin with '@'"),
        ("@\nACGT\n+\nIIII\n", "has no name after '@'"),
        ("@bad\nAC.T\n+\nIIII\n", "has '.' at base 3, which is no nucleotide code"),
        ("@bad\nACGT\n+\nII\x7fI\n", "has a quality letter outside of '!' .. '~'"),
    ],
)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_bad_fastq_record_costs_only_itself(tmp_path, middle, rule, end):
    text = "@a\nACGT\n+\n@@@@\n" + middle + "@b\nGGGG\n+\nIIII\n"
    bad = []
    path = write(tmp_path, "a.fq", text.replace("\n", end))
    assert pairs(path, on_error=bad.append) == [("a", "ACGT"), ("b", "GGGG")]
    assert [(e.line, e.rule) for e in bad] == [(5, rule)]
    assert f"a.fq, record '{bad[0].record}' (line 5): {rule}; " in message(lambda: read_sequences(path))


def test_a_cut_fastq_says_so(tmp_path):
    path = write(tmp_path, "a.fq", "@a\nACGT\n+\nIIII\n@b\nGGGG\n+\nII")
    bad = []
    assert pairs(path, on_error=bad.append) == [("a", "ACGT")]
    assert str(bad[0]).endswith(
        "record 'b' (line 5): has 4 bases but 2 qualities; mend or remove the record; was the file cut off?."
    )


def test_a_long_fastq_record_is_refused(tmp_path):
    wrapped = "@w\n" + "ACGT\n" * 100 + "+\n" + "IIII\n" * 100
    path = write(tmp_path, "a.fq", f"@a\n{'A' * 500}\n+\n{'I' * 500}\n{wrapped}@b\nAC\n+\nII\n")
    bad = []
    assert pairs(path, on_error=bad.append, max_length=300) == [("b", "AC")]
    assert [(e.record, e.line) for e in bad] == [("a", 1), ("w", 5)]
    assert {e.rule for e in bad} == {"has more than 300 bases, the most read whole"}


@given(
    content=st.lists(
        st.tuples(NAMES, st.text(alphabet="ACGTN", min_size=1, max_size=40), st.randoms()), min_size=1, max_size=8
    ),
    width=st.integers(1, 50),
    block=st.integers(2, 40),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_fastq_comes_back_whatever_the_blocks(tmp_path, monkeypatch, content, width, block):
    monkeypatch.setattr(records.read_blocks, "__defaults__", (block,))
    lines, wanted = [], []
    for name, sequence, rng in content:
        quality = "".join(rng.choices("!@+IJ~", k=len(sequence)))
        wanted.append((name, sequence, quality))
        cut = lambda text: [text[i : i + width] for i in range(0, len(text), width)]  # noqa: E731
        lines += [f"@{name}", *cut(sequence), "+", *cut(quality)]
    found = read_fastq(write(tmp_path, "x.fq", "\n".join(lines) + "\n"), duplicates="allow")
    assert [(r.name, r.sequence, r.quality) for r in found] == wanted


# Tables


def test_table_of_gue_and_its_separators(tmp_path):
    for text in (
        "sequence,label\nACGT,1\nGG,0\n",
        "label\tsequence\n1\tACGT\n0\tGG\n",
        'sequence;label\r\n"ACGT";"1"\r\nGG;0',
    ):
        table = read_table(write(tmp_path, "t.csv", text))
        assert table.sequences == ["ACGT", "GG"]
        assert table.labels == [("1",), ("0",)]
        assert table.names == ["row_1", "row_2"]
        assert table.lines == [2, 3]
        assert table.kind == "classification"
        assert table.class_names() == ("0", "1")
        assert table.class_ids().tolist() == [1, 0]
    assert pairs(tmp_path / "t.csv") == [("row_1", "ACGT"), ("row_2", "GG")]


def test_table_kinds(tmp_path):
    floats = read_table(write(tmp_path, "f.csv", "id,sequence,label\nx,AC,0.5\ny,GT,-1e2\n"))
    assert (floats.kind, floats.names) == ("regression", ["x", "y"])
    assert floats.numbers().tolist() == [[0.5], [-100.0]]
    several = read_table(write(tmp_path, "m.csv", "sequence,label_b,label_a\nAC,1,0\nGT,1,1\n"))
    assert (several.kind, several.class_names()) == ("multilabel", ("label_b", "label_a"))
    assert several.indicator().tolist() == [[1, 0], [1, 1]]
    joined = read_table(write(tmp_path, "j.csv", "sequence,label\nAC,x;y\nGT,y\nGG,;\n"))
    assert (joined.kind, joined.class_names()) == ("multilabel", ("x", "y"))
    assert joined.indicator().tolist() == [[1, 1], [0, 1], [0, 0]]
    named = read_table(write(tmp_path, "n.csv", "sequence,label\nAC,yes\nGT,no\n"))
    assert named.class_ids(["yes", "no"]).tolist() == [0, 1]
    both = read_table(write(tmp_path, "p.csv", "sequence1,sequence2,label\nAC,GG,10\nGT,TT,9\n"))
    assert (both.sequences, both.seconds, both.class_names()) == (["AC", "GT"], ["GG", "TT"], ("9", "10"))
    chosen = read_table(write(tmp_path, "c.csv", "seq,activity\nAC,1.5\n"), sequence="seq", labels=["activity"])
    assert chosen.numbers().tolist() == [[1.5]]


def test_bad_rows_are_reported_and_the_others_kept(tmp_path):
    text = "sequence,label\nAC,1\nGT,nan\nGT,\n,1\nGT,1,2\n\nMKVLEFPQ,0\nGT,inf\nGG,0\n"
    path = write(tmp_path, "t.csv", text)
    bad = []
    table = read_table(path, bad.append)
    assert table.sequences == ["AC", "GG"]
    assert table.lines == [2, 10]
    assert [str(e).removeprefix(f"{path}, record ") for e in bad] == [
        "'row_2' (line 3): has no value in column 'label' (got 'nan'); give one or remove the row.",
        "'row_3' (line 4): has no value in column 'label' (got ''); give one or remove the row.",
        "'row_4' (line 5): has no bases; remove the record or add its sequence.",
        "'row_5' (line 6): has 3 fields, the header 2; mend or remove the row.",
        "'row_6' (line 8): looks like protein: 62% of its letters (E, F, L, P, Q) are not nucleotide codes; "
        "give the nucleotide sequence.",
        "'row_7' (line 9): has no value in column 'label' (got 'inf'); give one or remove the row.",
    ]
    assert message(lambda: read_table(path)) == str(bad[0])


def test_tables_that_cannot_be_used(tmp_path):
    path = write(tmp_path, "t.csv", "dna,target\nAC,1\n")
    assert message(lambda: read_table(path)) == (
        f"{path}: has no column 'sequence', its columns are 'dna', 'target'; rename one or name the column to use."
    )
    path = write(tmp_path, "u.csv", "sequence,target\nAC,1\n")
    assert "u.csv: has no column 'label', its columns are 'sequence', 'target'" in message(lambda: read_table(path))
    assert "b.csv: is a binary file" in message(
        lambda: read_table(write(tmp_path, "b.csv", b"sequence,label\nA\0,1\n"))
    )
    empty = write(tmp_path, "e.csv", "sequence,label\n")
    assert message(lambda: read_table(empty)) == f"{empty}: holds no row after its header; was its export interrupted?"
    table = read_table(write(tmp_path, "l.csv", "sequence,label\nAC,1\nAC,2\n"))
    assert "line 3: label '2' is not one of the classes 0, 1; mend it, or" in message(
        lambda: table.class_ids(["0", "1"])
    )
    words = read_table(write(tmp_path, "w.csv", "sequence,label\nAC,high\n"))
    assert "line 2: label must be a number, got 'high'; mend it" in message(words.numbers)
    several = read_table(write(tmp_path, "s.csv", "sequence,label_a,label_b\nAC,1,3\n"))
    assert "line 2: label_b must be 0 or 1, got '3'; mend it" in message(several.indicator)
    assert "classes need one label column, got label_a, label_b" in message(several.class_ids)


def test_long_rows_are_read_and_too_long_ones_refused(tmp_path):
    path = write(tmp_path, "t.csv", f'sequence,label\n"{"ACGT" * 100_000}",1\n{"A" * 500_000},0\n')
    bad = []
    assert [len(s) for s in read_table(path, bad.append, max_length=400_000).sequences] == [400_000]
    assert bad[0].rule == "has more than 400,000 bases, the most read whole"


def test_truncated_table(tmp_path):
    rng = random.Random(0)
    raw = gzip.compress(
        ("sequence,label\n" + "".join(f"{''.join(rng.choices('ACGT', k=80))},1\n" for _ in range(2000))).encode()
    )
    bad = []
    table = read_table(write(tmp_path, "t.csv.gz", raw[: len(raw) // 2]), bad.append)
    assert 500 < len(table) < 1500
    assert [e.rule for e in bad] == ["its compressed data end early"]


def test_find_tables(tmp_path):
    assert "no such folder; name the folder that holds train.csv" in message(lambda: find_tables(tmp_path / "no"))
    write(tmp_path, "test.csv", "x")
    assert message(lambda: find_tables(tmp_path)) == (
        f"{tmp_path}: has no train.csv; it holds test.csv. Name the folder of one data set."
    )
    train = write(tmp_path, "train.csv", "x")
    assert find_tables(tmp_path) == formats.TableFolder(train, None, tmp_path / "test.csv")
    valid = write(tmp_path, "valid.tsv", "x")
    assert find_tables(tmp_path).dev == valid
    write(tmp_path, "dev.csv", "x")
    assert "has two files for the split dev: dev.csv and valid.tsv; keep one." in message(lambda: find_tables(tmp_path))


# GenBank and EMBL


GENBANK = """LOCUS       toy                       12 bp    DNA     linear   UNK 01-JAN-1980
DEFINITION  fabricated.
ACCESSION   toy
VERSION     toy.1
FEATURES             Location/Qualifiers
     gene            2..4
     CDS             complement(join(1..2,5..7))
     CDS             join(other:1..3,4..5)
ORIGIN
        1 acgtaaccgg tt
//
"""


def test_genbank_features(tmp_path):
    (record,) = read_genbank(write(tmp_path, "a.gb", GENBANK))
    assert (record.name, record.sequence, record.description) == ("toy.1", "ACGTAACCGGTT", "fabricated")
    gene, cds = record.features
    assert (gene.start, gene.stop, gene.strand, gene.type) == (1, 4, 1, "gene")
    assert gene.extract(record.sequence) == "CGT"
    assert (cds.start, cds.stop, cds.strand) == (0, 7, -1)
    assert cds.extract(record.sequence) == "GTTGT"
    assert pairs(tmp_path / "a.gb") == [("toy.1", "ACGTAACCGGTT")]
    assert pairs(write(tmp_path, "a.txt", gzip.compress(GENBANK.encode()))) == [("toy.1", "ACGTAACCGGTT")]


def test_genbank_errors(tmp_path):
    path = write(tmp_path, "a.gb", GENBANK + GENBANK.replace("        1 acgtaaccgg tt\n", ""))
    bad = []
    assert pairs(path, on_error=bad.append) == [("toy.1", "ACGTAACCGGTT")]
    assert bad[0].rule == "has no bases"
    cut = write(tmp_path, "b.gb", GENBANK + GENBANK[:300])
    bad.clear()
    assert pairs(cut, on_error=bad.append) == [("toy.1", "ACGTAACCGGTT")]
    assert len(bad) == 1


# Random access


def peers(path, kind):
    with path.open() as file:
        return list(SeqIO.parse(file, kind))


@realdata
@needs_real
def test_real_files_agree_with_biopython():
    for path in sorted([*REAL.rglob("*.fna"), *REAL.rglob("*.ffn"), *REAL.rglob("*.fa"), *REAL.rglob("*.fasta")]):
        peer = [str(r.seq) for r in peers(path, "fasta")]
        assert [r.sequence for r in read_sequences(path, duplicates="allow")] == peer
    path = REAL / "biopython_genomes" / "longreads_original_sanger.fastq"
    peer = [(r.id, str(r.seq), r.letter_annotations["phred_quality"]) for r in peers(path, "fastq")]
    assert [(r.name, r.sequence, r.phred.tolist()) for r in read_sequences(path)] == peer


@realdata
@needs_real
@pytest.mark.filterwarnings("ignore::Bio.BiopythonWarning")
def test_real_annotations_agree_with_each_other():
    folder = REAL / "biopython_genomes"
    (genbank,) = read_genbank(folder / "NC_005816.gb")
    (embl,) = read_genbank(folder / "AE017046.embl")
    (fasta,) = read_sequences(folder / "NC_005816.fna")
    assert genbank.sequence == embl.sequence == fasta.sequence
    assert len(genbank.features) == 41
    coding = [f.extract(genbank.sequence) for f in genbank.features if f.type == "CDS"]
    assert sorted(coding) == sorted(r.sequence for r in read_sequences(folder / "NC_005816.ffn"))
    for path in [*folder.glob("*.gb"), *folder.glob("*.gbk")]:
        for record, peer in zip(read_genbank(path), peers(path, "genbank"), strict=True):
            placed = [f for f in peer.features if f.location is not None]  # None: wraps a molecule said to be linear
            for feature, other in zip(record.features, placed, strict=True):
                assert feature.extract(record.sequence) == str(other.extract(peer.seq))


@realdata
@needs_real
def test_real_gue_tables():
    folder = find_tables(REAL / "dnabert2_sample")
    for path in (folder.train, folder.dev, folder.test):
        table = read_table(path)
        assert (len(table), table.kind, table.class_names()) == (15, "classification", ("0", "1"))
        assert {len(s) for s in table.sequences} == {101}


def test_record_error_is_a_plain_value():
    bad = RecordError("f", "r", 1, "rule", "advice")
    assert pickle.loads(pickle.dumps(bad)) == bad
    assert str(bad) == "f, record 'r' (line 1): rule; advice."
    assert np.array(formats.Record("a", "AC", quality="!I").phred).tolist() == [0, 40]
