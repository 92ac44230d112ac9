import gzip
import io
import tracemalloc

import pytest
from Bio import bgzf

from vertebra.domains.dna import variants
from vertebra.domains.dna.fasta_index import IndexedFasta
from vertebra.domains.dna.records import BGZF_EOF
from vertebra.domains.dna.variants import (
    Region,
    Variant,
    VCFWriter,
    alt_problem,
    check_region,
    check_variant,
    read_bed,
    read_vcf,
    usable_alts,
)
from vertebra.errors import DataError

COLUMNS = "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO"
HEADER = f"##fileformat=VCFv4.2\n##contig=<ID=chr1>\n{COLUMNS}\n"
ROWS = "chr1\t1\trs1\tA\tC\t.\tPASS\tDP=3\nchr1\t3\t.\tGT\tG,<DEL>\t9\t.\t.\tGT\t0/1\n"
SAME = "use the reference that the file was made with"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def message(call):
    with pytest.raises(DataError) as error:
        list(call())
    return str(error.value)


def variant(chrom="chr1", pos=1, ref="A", alt="C", extra=()):
    fields = (chrom, str(pos), ".", ref, alt, *extra)
    return Variant(chrom, pos - 1, "", ref, tuple(alt.split(",")), 1, fields)


@pytest.fixture
def reference(tmp_path):
    # chr1: A1 C2 G3 T4 a5 c6 g7 t8 N9 R10 U11 A12
    path = write(tmp_path, "ref.fa", ">chr1\nACGTacgtNRUA\n>chr2\nAC\n>chrM\nA\n>scaffold_17\nA\n")
    with IndexedFasta(path, write_index=False) as fasta:
        yield fasta


# VCF: reading


def pack(content, packing):
    if packing == "bgzip":
        target = io.BytesIO()
        writer = bgzf.BgzfWriter(fileobj=target)
        writer.write(content)
        writer.flush()
        return target.getvalue() + BGZF_EOF
    return gzip.compress(content, mtime=0) if packing == "gzip" else content


@pytest.mark.parametrize("packing", ["plain", "gzip", "bgzip"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_vcf_of_every_packing_and_line_end(tmp_path, packing, end, last, mark):
    text = (mark + HEADER + ROWS).replace("\n", end)
    content = (text if last else text.removesuffix(end)).encode()
    vcf = read_vcf(write(tmp_path, "misnamed.txt", pack(content, packing)))
    assert vcf.header == HEADER.splitlines()
    expected = [
        Variant("chr1", 0, "rs1", "A", ("C",), 4, ("chr1", "1", "rs1", "A", "C", ".", "PASS", "DP=3")),
        Variant(
            "chr1", 2, "", "GT", ("G", "<DEL>"), 5, ("chr1", "3", ".", "GT", "G,<DEL>", "9", ".", ".", "GT", "0/1")
        ),
    ]
    assert list(vcf) == expected
    assert list(vcf) == expected  # each iteration begins anew
    assert expected[1].label == "chr1:3"


def test_blank_lines_and_comments_are_skipped_but_counted(tmp_path):
    text = f"\n##a\n# remark\n{COLUMNS}\n\nchr1\t1\t.\ta\tc\n#no\n##no\nchr1\t2\t.\tN\tT\n"
    vcf = read_vcf(write(tmp_path, "a.vcf", text))
    assert vcf.header == ["##a", COLUMNS]
    assert [(v.position, v.ref, v.line) for v in vcf] == [(0, "a", 6), (1, "N", 9)]


@pytest.mark.parametrize(("head", "header"), [("", []), ("##a=b\n", ["##a=b"]), ("# remark\n\n", [])])
def test_vcf_without_column_names(tmp_path, head, header):
    vcf = read_vcf(write(tmp_path, "a.vcf", head + "1\t5\t.\tA\tAT\n"))
    assert vcf.header == header
    assert [(v.chrom, v.position, v.alts) for v in vcf] == [("1", 4, ("AT",))]


@pytest.mark.parametrize("text", ["##fileformat=VCFv4.3\n", COLUMNS + "\n", HEADER])
def test_vcf_without_records_is_empty(tmp_path, text):
    vcf = read_vcf(write(tmp_path, "a.vcf", text))
    assert vcf.header == text.splitlines()
    assert list(vcf) == []


BAD_ROWS = [
    ("chr1\t5\t.\tA", "chr1:5", "has 4 of at least 5 tab-separated columns", "was the line cut off?"),
    ("chr1 5 . A C", "#2", "has 1 of at least 5 tab-separated columns", "separate the columns with tabs"),
    ("\t5\t.\tA\tC", "#2", "has no CHROM", "give the name of its contig"),
    ("chr1\t0\t.\tA\tC", "chr1:0", "has the POS '0'", "give an integer, counted from 1"),
    ("chr1\t-4\t.\tA\tC", "chr1:-4", "has the POS '-4'", "give an integer, counted from 1"),
    ("chr1\t1_0\t.\tA\tC", "chr1:1_0", "has the POS '1_0'", "give an integer, counted from 1"),
    ("chr1\t²\t.\tA\tC", "chr1:²", "has the POS '²'", "give an integer, counted from 1"),
    (
        "chr1\t5\t.\t\tC",
        "chr1:5",
        "has no REF",
        "give the bases of the reference; an insertion has the base before it",
    ),
    (
        "chr1\t5\t.\t.\tC",
        "chr1:5",
        "has no REF",
        "give the bases of the reference; an insertion has the base before it",
    ),
    ("chr1\t5\t.\tAX\tC", "chr1:5", "has 'X' in its REF 'AX'", "give the bases as A, C, G, T or N"),
    ("chr1\t5\t.\t\u017f\tC", "chr1:5", "has '\u017f' in its REF '\u017f'", "give the bases as A, C, G, T or N"),
]


@pytest.mark.parametrize(("row", "label", "rule", "advice"), BAD_ROWS)
def test_bad_vcf_line_is_reported_and_the_next_ones_go_on(tmp_path, row, label, rule, advice):
    path = write(tmp_path, "a.vcf", f"{HEADER}chr1\t1\t.\tA\tC\n{row}\nchr1\t9\t.\tRYSWKMBDHVU\tC\n")
    bad = []
    assert [v.position for v in read_vcf(path, bad.append)] == [0, 8]
    assert [(b.file, b.record, b.line, b.rule, b.advice) for b in bad] == [(str(path), label, 5, rule, advice)]
    assert message(lambda: read_vcf(path)) == str(bad[0])
    assert str(bad[0]).endswith(f"(line 5): {rule}; {advice}.")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("CHROM\tPOS\tID\tREF\tALT\n1\t5\t.\tA\tC\n", "'CHROM\\tPOS\\tID\\tREF\\tALT'"),
        (">chr1\nACGT\n", "'>chr1'"),
        ("\n# only a remark which is longer than forty letters\n", "'# only a remark which is longer than for...'"),
    ],
)
def test_what_is_no_vcf(tmp_path, text, shown):
    path = write(tmp_path, "a.vcf", text)
    assert message(lambda: read_vcf(path)) == (
        f"{path}: is no VCF, it begins with {shown}; VCF is text with the tab-separated columns CHROM, POS, ID, REF, "
        f"ALT, QUAL, FILTER and INFO after header lines that begin with '##'."
    )


@pytest.mark.parametrize("packing", ["plain", "gzip", "bgzip"])
def test_bcf(tmp_path, packing):
    path = write(tmp_path, "a.vcf.gz", pack(b"BCF\x02\x02\x00\x00\x00", packing))
    assert message(lambda: read_vcf(path)) == f"{path}: is BCF; convert it with: bcftools view FILE -O v."


def test_binary_blank_and_missing_files(tmp_path):
    path = write(tmp_path, "a.bb", b"\xeb\xf2\x89\x87\0\0")
    for reader, kind in ((read_vcf, "VCF"), (read_bed, "BED")):
        assert message(lambda reader=reader: reader(path)) == (
            f"{path}: is a binary file, whatever its name says; give {kind} as text, plain, gzip or bgzip."
        )
        blank = write(tmp_path, "blank", gzip.compress(b"\n\n"))
        assert message(lambda reader=reader, blank=blank: reader(blank)) == (
            f"{blank}: holds only blank lines; was its export interrupted?"
        )
        missing = tmp_path / "none"
        assert (
            message(lambda reader=reader, missing=missing: reader(missing))
            == f"{missing}: no such file; check the path."
        )


def long_vcf():
    rows = "".join(f"chr1\t{pos}\trs{pos * 7919 % 1000}\tA\tC\n" for pos in range(1, 3000))
    return (HEADER + rows).encode()


@pytest.mark.parametrize("packing", ["gzip", "bgzip"])
def test_truncated_vcf_gives_the_records_before_the_cut_and_one_error(tmp_path, packing):
    packed = pack(long_vcf(), packing)
    path = write(tmp_path, "a.vcf.gz", packed[: len(packed) * 2 // 3])
    bad = []
    found = list(read_vcf(path, bad.append))
    assert 1000 < len(found) < 2999
    assert [v.position for v in found] == list(range(len(found)))
    assert [(b.record, b.line, b.advice) for b in bad] == [
        (f"#{len(found) + 1}", len(found) + 4, "copy or download the file again")
    ]
    assert bad[0].rule.startswith("its compressed data end early")
    assert message(lambda: read_vcf(path)) == str(bad[0])


def test_vcf_truncated_before_its_first_line_ends(tmp_path):
    path = write(tmp_path, "a.vcf.gz", gzip.compress(long_vcf())[:12])
    assert message(lambda: read_vcf(path)) == (
        f"{path}: its compressed data end early; copy or download the file again."
    )
    whole = gzip.compress(b"##fileformat=VCFv4.3")
    path = write(tmp_path, "b.vcf.gz", whole[:-4])
    assert message(lambda: read_vcf(path)) == (
        f"{path}: its compressed data end early; copy or download the file again."
    )


@pytest.mark.parametrize("size", [80, 200, 1000])
def test_too_long_line_is_reported_whatever_the_blocks(tmp_path, monkeypatch, size):
    content = f"{HEADER}chr1\t1\t.\tA\tC\nchr1\t2\t.\tA\t{'C' * size}\nchr1\t3\t.\tA\tC\n".encode()
    path = write(tmp_path, "a.vcf", content)
    monkeypatch.setattr(variants, "MAX_LINE", 70)
    monkeypatch.setattr(variants, "text_blocks", lambda _: (content[i : i + 50] for i in range(0, len(content), 50)))
    bad = []
    assert [(v.position, v.line) for v in read_vcf(path, bad.append)] == [(0, 4), (2, 6)]
    assert [(b.record, b.line, b.rule, b.advice) for b in bad] == [
        ("chr1:2", 5, "is longer than 70 bytes", "split the file by samples")
    ]


def test_memory_does_not_grow_with_the_file(tmp_path, monkeypatch):
    def peak(rows):
        content = HEADER.encode() + b"chr1\t1\t.\tA\tC\t.\t.\t.\n" * rows
        monkeypatch.setattr(
            variants, "text_blocks", lambda _: (content[i : i + 4096] for i in range(0, len(content), 4096))
        )
        path = write(tmp_path, "a.vcf", content)
        tracemalloc.start()
        assert sum(1 for _ in read_vcf(path)) == rows
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(8000) < peak(1000) * 1.5


# Alleles and checks


@pytest.mark.parametrize(
    ("alt", "reason"),
    [
        ("", "an allele is empty"),
        (".", "'.' names no allele"),
        ("*", "'*' is a deletion of another record"),
        ("<DEL>", "'<DEL>' is symbolic and has no sequence"),
        ("<DUP:TANDEM>", "'<DUP:TANDEM>' is symbolic and has no sequence"),
        ("<*>", "'<*>' is symbolic and has no sequence"),
        ("G]17:198982]", "'G]17:198982]' is a breakend"),
        ("[13:123457[C", "'[13:123457[C' is a breakend"),
        ("]13:123456]AGTNNNNNCAT", "']13:123456]AGTNNNNNC...' is a breakend"),
        (".A", "'.A' is a breakend"),
        ("A.", "'A.' is a breakend"),
        ("AXC", "'AXC' has 'X', which is no nucleotide code"),
        ("A-", "'A-' has '-', which is no nucleotide code"),
        ("A ", "'A ' has ' ', which is no nucleotide code"),
    ],
)
def test_alleles_that_are_no_sequence(reference, alt, reason):
    assert alt_problem(alt) == reason
    assert usable_alts(variant(alt=alt)) == []
    assert check_variant(variant(alt=alt), reference) == (
        f"none of its ALT alleles can be scored: {reason}",
        "write them as sequences, or leave the record out",
    )


@pytest.mark.parametrize("alt", ["A", "acgtun", "RYSWKMBDHVN", "ACGT" * 1000])
def test_alleles_that_are_sequences(alt):
    assert alt_problem(alt) is None


def test_usable_alleles_keep_their_index(reference):
    several = variant(alt="<DEL>,C,*,AT")
    assert usable_alts(several) == [(1, "C"), (3, "AT")]
    assert check_variant(several, reference) is None
    assert check_variant(variant(alt="<DEL>,*,<DEL>"), reference)[0] == (
        "none of its ALT alleles can be scored: '<DEL>' is symbolic and has no sequence, "
        "'*' is a deletion of another record"
    )


@pytest.mark.parametrize(
    ("pos", "ref", "alt"),
    [
        (1, "A", "C"),
        (1, "a", "c"),
        (1, "ACGT", "A"),
        (1, "A", "ATTT"),
        (5, "ACGT", "A"),  # soft-masked
        (8, "TN", "T"),
        (9, "N", "A"),
        (10, "A", "T"),  # R: A or G
        (10, "G", "T"),
        (10, "R", "T"),
        (11, "T", "C"),  # U
        (11, "u", "C"),
        (12, "A", "C"),  # the last base
        (12, "A", "ACCCC"),
        (11, "TA", "T"),
    ],
)
def test_variants_that_fit_the_reference(reference, pos, ref, alt):
    assert check_variant(variant(pos=pos, ref=ref, alt=alt), reference) is None


SWAPPED = f"REF and ALT look swapped: swap them with their genotypes, or {SAME}"


@pytest.mark.parametrize(
    ("pos", "ref", "alt", "there", "advice"),
    [
        (1, "G", "C", "A", SAME),
        (1, "N", "C", "A", SAME),
        (9, "A", "C", "N", SAME),  # a gap is no evidence
        (10, "C", "A", "R", SWAPPED),
        (10, "C", "T", "R", SAME),
        (5, "CC", "C", "ac", SAME),
        (1, "C", "A", "A", SWAPPED),
        (5, "C", "G,<DEL>,A", "a", SWAPPED),
        (11, "G", "T", "U", SWAPPED),
        (12, "G", "ACC", "A", SAME),  # the allele runs beyond the end
        (1, "AT", "ACG", "AC", SWAPPED),
    ],
)
def test_ref_mismatch(reference, pos, ref, alt, there, advice):
    rule = f"its REF is {ref!r} but the reference has {there!r} there"
    assert check_variant(variant(pos=pos, ref=ref, alt=alt), reference) == (rule, advice)


def test_long_mismatch_is_shortened(tmp_path):
    with IndexedFasta(write(tmp_path, "a.fa", ">chr1\n" + "A" * 50 + "\n"), write_index=False) as fasta:
        rule, _ = check_variant(variant(ref="C" * 30, alt="T"), fasta)
    assert rule == f"its REF is '{'C' * 20}...' but the reference has '{'A' * 20}...' there"


@pytest.mark.parametrize(("pos", "ref"), [(13, "A"), (12, "AC"), (9_000, "A")])
def test_position_beyond_the_end(reference, pos, ref):
    assert check_variant(variant(pos=pos, ref=ref), reference) == (
        f"its REF of {len(ref)} bp at POS {pos} is beyond the end of contig 'chr1', which has 12 bp",
        SAME,
    )


RENAME = "rename the contigs (bcftools annotate --rename-chrs for VCF)"


@pytest.mark.parametrize(
    ("chrom", "advice"),
    [
        ("1", f"the reference calls it 'chr1': {RENAME}"),
        ("Chr2", f"the reference calls it 'chr2': {RENAME}"),
        ("MT", f"the reference calls it 'chrM': {RENAME}"),
        ("scaffold_71", f"the nearest contig there is 'scaffold_17': rename it, or {SAME}"),
        ("NC_000001.11", f"there it is 'chr1', 'chr2', 'chrM' ...: {SAME}"),
    ],
)
def test_missing_contig(reference, chrom, advice):
    expected = (f"its contig {chrom!r} is not in the reference ref.fa", advice)
    assert check_variant(variant(chrom), reference) == expected
    assert check_region(Region(chrom, 0, 1, "", ".", 1), reference) == expected


def test_contig_without_chr(tmp_path):
    with IndexedFasta(write(tmp_path, "a.fa", ">1\nA\n>MT\nA\n"), write_index=False) as fasta:
        assert check_variant(variant("chr1"), fasta)[1] == f"the reference calls it '1': {RENAME}"
        assert check_variant(variant("chrM"), fasta)[1] == f"the reference calls it 'MT': {RENAME}"
        assert check_variant(variant("?"), fasta)[1] == f"there it is '1', 'MT': {SAME}"


# BED


@pytest.mark.parametrize("packing", ["plain", "gzip", "bgzip"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_bed(tmp_path, packing, end):
    text = (
        "browser position chr1:1-9\ntrack name=a\n# remark\n\n"
        "chr1\t0\t4\nchr1 2 3 a 0 -\nchr1\t5\t9\ttwo words\t0\t+\textra\ntrack1\t0\t1\t.\t.\t.\nchr1\t1\t2\t\t\t.\n"
    )
    text = text.replace("\n", end)
    assert list(read_bed(write(tmp_path, "a.bed", pack(text.encode(), packing)))) == [
        Region("chr1", 0, 4, "", ".", 5),
        Region("chr1", 2, 3, "a", "-", 6),
        Region("chr1", 5, 9, "two words", "+", 7),
        Region("track1", 0, 1, "", ".", 8),
        Region("chr1", 1, 2, "", ".", 9),
    ]


def test_region_labels():
    assert Region("chr1", 0, 4, "", ".", 5).label == "chr1:0-4"
    assert Region("chr1", 0, 4, "exon", ".", 5).label == "exon"


HALF_OPEN = "BED counts from 0 and leaves out the end: base 5 alone is 4 to 5"


@pytest.mark.parametrize(
    ("row", "rule", "advice"),
    [
        ("chr1\t4", "lacks one of the columns chrom, start and end", "separate the three with tabs"),
        ("chr1,4,5", "lacks one of the columns chrom, start and end", "separate the three with tabs"),
        ("\t4\t5", "lacks one of the columns chrom, start and end", "separate the three with tabs"),
        ("chrom\tstart\tend", "has the start 'start'", "give an integer, counted from 0"),
        ("chr1\t-1\t5", "has the start '-1'", "give an integer, counted from 0"),
        ("chr1\t1\t1e3", "has the end '1e3'", "give an integer, counted from 0"),
        ("chr1\t5\t5", "has no bases, its start 5 is not below its end 5", HALF_OPEN),
        ("chr1\t6\t5", "has no bases, its start 6 is not below its end 5", HALF_OPEN),
        ("chr1\t4\t5\ta\t0\tplus", "has the strand 'plus' in column 6", "write '+', '-' or '.'"),
    ],
)
def test_bad_bed_line_is_reported_and_the_next_ones_go_on(tmp_path, row, rule, advice):
    path = write(tmp_path, "a.bed", f"# remark\nchr1\t0\t1\n{row}\nchr1\t1\t2\n")
    bad = []
    assert [r.start for r in read_bed(path, bad.append)] == [0, 1]
    assert [(b.file, b.record, b.line, b.rule, b.advice) for b in bad] == [(str(path), "#2", 3, rule, advice)]
    assert message(lambda: read_bed(path)) == f"{path}, record '#2' (line 3): {rule}; {advice}."


def test_truncated_bed(tmp_path):
    rows = "".join(f"chr1\t{i}\t{i + i * 7919 % 1000 + 1}\n" for i in range(2000)).encode()
    bad = []
    found = list(read_bed(write(tmp_path, "a.bed.gz", gzip.compress(rows)[:-3000]), bad.append))
    assert 100 < len(found) < 2000
    assert [(b.record, b.line, b.rule) for b in bad] == [
        (f"#{len(found) + 1}", len(found) + 1, "its compressed data end early")
    ]


def test_region_against_the_reference(reference):
    assert check_region(Region("chr1", 0, 12, "", ".", 1), reference) is None
    assert check_region(Region("chr1", 11, 13, "", ".", 1), reference) == (
        "its end 13 is beyond the end of contig 'chr1', which has 12 bp",
        f"clip it, or {SAME}",
    )


# VCF: writing


def written(header, info=(), rows=()):
    stream = io.BytesIO()
    writer = VCFWriter(stream, header, info)
    for row, values in rows:
        writer.write(row, values)
    return stream.getvalue().decode()


DELTA = ("DELTA", "A", "Float", "Change of the score")
DELTA_LINE = '##INFO=<ID=DELTA,Number=A,Type=Float,Description="Change of the score">'


def test_round_trip_is_byte_equal(tmp_path):
    content = (
        HEADER.encode().replace(b"INFO\n", b"INFO\tFORMAT\ts\xe9\n")
        + b"chr1\t1\trs1;rs2\ta\tC,<DEL>\t1e-3\tq10;s50\tDP=3;;X=a b;FLAG;\tGT:DP\t0|1:3\t\n"
        + b"chr1\t007\t.\tA\t.\t.\t.\tNOTE=\xff\xe9\xc3\xa9\tGT\t./.\n"
    )
    for ends in (content, content.replace(b"\n", b"\r\n")):
        vcf = read_vcf(write(tmp_path, "a.vcf", ends))
        stream = io.BytesIO()
        writer = VCFWriter(stream, vcf.header, [])
        for item in vcf:
            writer.write(item, {})
        assert stream.getvalue() == content


def test_columns_beside_info_stay_byte_equal(tmp_path):
    row = b"chr1\t01\trs1\ta\tC,*\t1.50\tPASS\tDP=3\tGT\t0|1\xff \t"
    stream = io.BytesIO()
    vcf = read_vcf(write(tmp_path, "a.vcf", HEADER.encode() + row + b"\n"))
    writer = VCFWriter(stream, vcf.header, [DELTA])
    for item in vcf:
        writer.write(item, {"DELTA": "0.5,."})
    assert stream.getvalue().splitlines()[-1] == row.replace(b"DP=3", b"DP=3;DELTA=0.5,.")


def test_header_gets_the_new_keys_before_the_column_names():
    old = '##INFO=<ID=DELTA,Number=1,Type=String,Description="old">'
    shifted = '##INFO=<Number=1,ID=DELTA,Type=String,Description="old">'
    other = '##INFO=<ID=DELTA2,Number=1,Type=String,Description="kept, ID=DELTA, too">'
    kept = '##FORMAT=<ID=DELTA,Number=1,Type=String,Description="kept">'
    header = ["##fileformat=VCFv4.1", old, other, shifted, kept, COLUMNS + "\tFORMAT\ts1"]
    info = [DELTA, ("BEST", "1", "Integer", 'a "quoted" \\ word')]
    assert written(header, info).splitlines() == [
        "##fileformat=VCFv4.1",
        other,
        kept,
        DELTA_LINE,
        '##INFO=<ID=BEST,Number=1,Type=Integer,Description="a \\"quoted\\" \\\\ word">',
        COLUMNS + "\tFORMAT\ts1",
    ]


@pytest.mark.parametrize("header", [[], ["#CHROM\tPOS\tID\tREF\tALT"], [COLUMNS]])
def test_missing_header_lines_are_added(header):
    assert written(header, [DELTA]) == f"##fileformat=VCFv4.3\n{DELTA_LINE}\n{COLUMNS}\n"


@pytest.mark.parametrize(
    ("extra", "values", "rest"),
    [
        ((), {}, ".\t.\t."),
        ((), {"D": "1"}, ".\t.\tD=1"),
        (("9",), {"D": "1"}, "9\t.\tD=1"),
        (("9", "PASS", "."), {"D": "1", "E": "2,."}, "9\tPASS\tD=1;E=2,."),
        (("9", "PASS", ""), {"D": "1"}, "9\tPASS\tD=1"),
        (("9", "PASS", "DP=3;FLAG;"), {"D": "1"}, "9\tPASS\tDP=3;FLAG;D=1"),
        (("9", "PASS", "D=0;DP=3;D;DD=4"), {"D": "1"}, "9\tPASS\tDP=3;DD=4;D=1"),
        (("9", "PASS", "DP=3", "GT", "0/1"), {"D": "1"}, "9\tPASS\tDP=3;D=1\tGT\t0/1"),
    ],
)
def test_values_go_to_the_end_of_info(extra, values, rest):
    text = written([COLUMNS], rows=[(variant(extra=extra), values)])
    assert text.splitlines()[-1] == f"chr1\t1\t.\tA\tC\t{rest}"


def test_what_is_written_is_read_again(tmp_path):
    path = tmp_path / "out.vcf.gz"
    with gzip.open(path, "wb") as stream:
        VCFWriter(stream, [], [DELTA]).write(variant(alt="C,<DEL>"), {"DELTA": "0.25,."})
    vcf = read_vcf(path)
    assert vcf.header == ["##fileformat=VCFv4.3", DELTA_LINE, COLUMNS]
    assert [v.fields for v in vcf] == [("chr1", "1", ".", "A", "C,<DEL>", ".", ".", "DELTA=0.25,.")]
