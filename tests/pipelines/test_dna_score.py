"""dna/score: variants, regions and sequences, their outputs, and every refusal."""

import csv
import gzip
import json
import random

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.dna.changes import Change, change_at, trim
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.dna.scoring import likelihood_ratios, saturate
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import pipeline
from vertebra.tokenizers.nucleotide import NucleotideTokenizer, reverse_complement_string

GENOME = "".join(random.Random(5).choices("ACGT", k=300))
WINDOW = 40
HEADER = "##fileformat=VCFv4.3\n##contig=<ID=c1,length=300>\n#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO\n"
OTHER = {"A": "C", "C": "G", "G": "T", "T": "A"}


def made(backbone="hybrid_test", classes=()):
    torch.manual_seed(1)
    tokenizer = NucleotideTokenizer().to_dict()
    spec = DNASpec(tokenizer=tokenizer, task="lm", max_length=WINDOW + 1, bos=True, classes=classes)
    model = DNALanguageModel(create_backbone(backbone), spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture
def genome(tmp_path):
    path = tmp_path / "genome.fa"
    path.write_text(f">c1\n{GENOME}\n")
    return path


def vcf(folder, lines, name="in.vcf"):
    path = folder / name
    text = HEADER + "".join("\t".join([*map(str, line), ".", "PASS", "DP=3"]) + "\n" for line in lines)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


def fasta(folder, *records, name="in.fa"):
    path = folder / name
    path.write_text("".join(f">{n}\n{s}\n" for n, s in records))
    return path


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def errors(out):
    return [json.loads(line) for line in (out.parent / f"{out.name}.errors.jsonl").read_text().splitlines()]


def score(model, position, ref, alt, window=WINDOW, **options):
    assert GENOME[position : position + len(ref)] == ref
    change = change_at(lambda a, b: GENOME[a:b], len(GENOME), *trim(position, ref, alt), window)
    return float(likelihood_ratios(model, [change], **options)[0])


def lines():
    a, b = GENOME[9], GENOME[99]
    return [
        ("c1", 10, "snv", a, OTHER[a]),
        ("c1", 100, "two", b, f"{OTHER[b]},<DEL>,{b}GATT"),
        ("c1", 200, ".", GENOME[199:203], GENOME[199]),
        ("c1", 300, "end", GENOME[299], OTHER[GENOME[299]]),
    ]


def expected(model, **options):
    a, b, z = GENOME[9], GENOME[99], GENOME[299]
    found = [score(model, 9, a, OTHER[a], **options), score(model, 99, b, OTHER[b], **options), None]
    found.append(score(model, 99, b, f"{b}GATT", **options))
    found.append(score(model, 199, GENOME[199:203], GENOME[199], **options))
    return [*found, score(model, 299, z, OTHER[z], **options)]


# ---------------------------------------------------------------- variants


@pytest.mark.parametrize("name", ["in.vcf", "in.vcf.gz", "in.txt"])
def test_vcf_comes_back_with_scores(model, genome, tmp_path, name):
    path, out = vcf(tmp_path, lines(), name), tmp_path / "out.vcf"
    result = pipeline("dna/score", model, reference=genome).run([path], out)
    assert (result.good, result.bad, result.paths) == (4, 0, [out])
    head, body = out.read_text().split("#CHROM")
    assert "##contig=<ID=c1,length=300>\n" in head
    assert head.splitlines()[-1] == (
        '##INFO=<ID=VTB_LLR,Number=A,Type=Float,Description="Log-likelihood ratio (nats) of the ALT against the REF '
        'window, below 0 where ALT is less likely: a model, window 40 bases, mean of both strands">'
    )
    told = [line.split("\t") for line in body.splitlines()[1:]]
    assert [row[:7] for row in told] == [[*map(str, line), ".", "PASS"] for line in lines()]
    assert all(row[7].startswith("DP=3;VTB_LLR=") for row in told)
    values = [v for row in told for v in row[7].partition("VTB_LLR=")[2].split(",")]
    assert values[2] == "."
    numbers = [np.nan if v == "." else float(v) for v in values]
    np.testing.assert_allclose(numbers, np.array(expected(model), dtype=float), atol=2e-4)


def test_csv_has_a_row_an_allele(genome, tmp_path, capsys):
    model = made("illama_test")
    saved = str(save_model(model, tmp_path / "toy"))
    out = tmp_path / "out.csv"
    words = ["run", "dna/score", str(vcf(tmp_path, lines())), "-o", str(out), "--model", saved, "--window", "20"]
    assert main([*words, "--reference", str(genome), "--strands", "forward", "--batch-tokens", "100"]) == 0
    assert capsys.readouterr().out == f"4 records done; wrote {out}\n"
    found = rows(out)
    assert list(found[0]) == ["chrom", "pos", "id", "ref", "alt", "llr"]
    assert [(r["pos"], r["id"], r["alt"]) for r in found][:4] == [
        ("10", "snv", OTHER[GENOME[9]]),
        ("100", "two", OTHER[GENOME[99]]),
        ("100", "two", "<DEL>"),
        ("100", "two", f"{GENOME[99]}GATT"),
    ]
    numbers = [float(r["llr"] or "nan") for r in found]
    wanted = np.array(expected(model, window=20, strands="forward"), dtype=float)
    np.testing.assert_allclose(numbers, wanted, atol=2e-4)
    two = [vcf(tmp_path, lines()[:1]), vcf(tmp_path, lines()[1:], "b.vcf")]
    pipeline("dna/score", model, reference=genome).run(two, out)
    assert [r["file"] for r in rows(out)] == [str(two[0])] + [str(two[1])] * 5


def test_bad_variants_are_listed_with_the_reason(model, genome, tmp_path):
    base = GENOME[9]
    wrong = next(b for b in "ACGT" if b not in GENOME[19:21])
    good = lines()[0]
    path = vcf(
        tmp_path,
        [
            ("c1", 20, ".", wrong, "N"),
            ("c2", 1, ".", "A", "C"),
            ("c1", 300, ".", GENOME[299] + "A", "A"),
            ("c1", 10, ".", base, "<DEL>"),
            ("c1", 10, ".", base, base + "ACGT" * 11),
            good,
            ("c1", 10, ".", base, "N"),
            ("c1", "x", ".", base, "N"),
        ],
    )
    out = tmp_path / "out.csv"
    result = pipeline("dna/score", model, reference=genome).run([path], out)
    assert (result.good, result.bad) == (1, 7)
    told = {e["line"]: (e["rule"], e["advice"]) for e in errors(out)}
    none = "none of its ALT alleles can be scored: "
    assert told == {
        4: (
            f"its REF is {wrong!r} but the reference has {GENOME[19]!r} there",
            "use the reference that the file was made with",
        ),
        5: (
            "its contig 'c2' is not in the reference genome.fa",
            "there it is 'c1': use the reference that the file was made with",
        ),
        6: (
            "its REF of 2 bp at POS 300 is beyond the end of contig 'c1', which has 300 bp",
            "use the reference that the file was made with",
        ),
        7: (none + "'<DEL>' is symbolic and has no sequence", "write them as sequences, or leave the record out"),
        8: (
            none + "44 bases change, more than the window has (40)",
            "widen the window if the model allows it, or leave the record out",
        ),
        10: (none + "N in an allele stands for several bases", "write A, C, G or T, or leave the record out"),
        11: ("has the POS 'x'", "give an integer, counted from 1"),
    }
    assert {e["record"] for e in errors(out)} >= {"c1:20", "c2:1"}


def test_masked_models_score_single_bases(genome, tmp_path):
    model, out = made("hybrid_test,causal=false"), tmp_path / "out.csv"
    result = pipeline("dna/score", model, reference=genome).run([vcf(tmp_path, lines())], out)
    assert (result.good, result.bad) == (3, 1)
    found = [float(r["llr"] or "nan") for r in rows(out)]
    np.testing.assert_allclose(found[0], score(model, 9, GENOME[9], OTHER[GENOME[9]]), atol=2e-5)
    assert np.isnan(found[2:4]).all()
    (error,) = errors(out)
    assert error["rule"].endswith("scored: a masked model scores substitutions of single bases only")
    assert error["advice"] == "use a causal model, or leave the record out"
    prediction = pipeline("dna/score", model)(GENOME[:30])
    np.testing.assert_allclose(prediction.value, saturate(model, GENOME[:30]), atol=2e-5)


def test_variants_in_python(model, genome, tmp_path):
    one, two, *_ = pipeline("dna/score", model, reference=str(genome))(vcf(tmp_path, lines()))
    assert isinstance(one.value, float)
    assert (one.name, one.details["position"]) == ("c1:10", 10)
    assert two.value[1] is None
    assert list(two.scores) == [f"{GENOME[99]}>{OTHER[GENOME[99]]}", f"{GENOME[99]}>{GENOME[99]}GATT"]
    assert json.loads(two.save(tmp_path / "p.json").read_text())["llr"] == list(two.value)
    assert two.save(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- regions and sequences


def test_regions_are_read_with_their_flanks(model, genome, tmp_path):
    path, out = tmp_path / "in.bed", tmp_path / "out.csv"
    path.write_text(
        "c1\t100\t110\tplus\t0\t+\nc1\t100\t110\tminus\t0\t-\nc1\t0\t70\n" + "c1\t1\t2\nc1\t290\t301\nx\t1\t2\n"
    )
    result = pipeline("dna/score", model, reference=genome, max_region=80, figures=2).run([path], out)
    assert (result.good, result.bad) == (4, 2)
    assert [e["rule"].split(" ")[1] for e in errors(out)] == ["end", "contig"]
    found = rows(out)
    assert list(found[0]) == ["name", "chrom", "strand", "position", "ref", *"ACGT"]
    by_name = {n: [r for r in found if r["name"] == n] for n in ("plus", "minus", "c1:0-70", "c1:1-2")}
    assert [len(r) for r in by_name.values()] == [10, 10, 70, 1]
    plus = {r["position"]: r for r in by_name["plus"]}
    assert list(plus) == [str(p) for p in range(101, 111)]
    context = GENOME[85:125]
    for at, row in enumerate(by_name["plus"]):
        here = 15 + at
        for alt in "ACGT".replace(row["ref"], ""):
            change = Change(context[:here], row["ref"], alt, context[here + 1 :])
            assert float(row[alt]) == pytest.approx(likelihood_ratios(model, [change])[0], abs=2e-5)
        assert row[row["ref"]] == "0"
    for row in by_name["minus"]:
        other = plus[row["position"]]
        assert (row["strand"], row["ref"]) == ("-", reverse_complement_string(other["ref"]))
        assert [float(row[b]) for b in "TGCA"] == pytest.approx([float(other[b]) for b in "ACGT"], abs=2e-5)
    assert [int(r["position"]) for r in by_name["minus"]] == list(range(110, 100, -1))
    for at in (0, 35, 69):  # longer than the window: each base as a variant of its own
        ref = GENOME[at]
        row = by_name["c1:0-70"][at]
        assert float(row[OTHER[ref]]) == pytest.approx(score(model, at, ref, OTHER[ref]), abs=2e-5)
    alone = by_name["c1:1-2"][0]
    assert float(alone[OTHER[GENOME[1]]]) == pytest.approx(score(model, 1, GENOME[1], OTHER[GENOME[1]]), abs=2e-5)
    drawn = sorted(tmp_path.glob("*.png"))
    assert [p.name for p in drawn] == ["out.csv.1.plus.png", "out.csv.2.minus.png"]
    assert drawn[0].read_bytes().startswith(b"\x89PNG")


def test_sequences_as_they_stand(model, tmp_path):
    long, short = GENOME[:75], "ACgtNRu"
    path = fasta(tmp_path, ("a/b long", long), ("short", short), ("huge", GENOME))
    out = tmp_path / "out.csv"
    result = pipeline("dna/score", model, batch_tokens=400, max_region=100).run([path], out)
    assert (result.good, result.bad) == (2, 1)
    (error,) = errors(out)
    assert (error["record"], error["rule"]) == ("huge", "has 300 bases, more than the 100 that are scored base by base")
    assert error["advice"] == "cut it into shorter ones, or raise --max-region"
    found = rows(out)
    matrix = np.array([[float(r[b] or "nan") for b in "ACGT"] for r in found])
    np.testing.assert_allclose(matrix[:75], saturate(model, long), atol=2e-5)
    np.testing.assert_allclose(matrix[75:], saturate(model, short), atol=2e-5)
    assert "".join(r["ref"] for r in found[75:]) == "ACGTNRT"
    assert [found[79][b] for b in "ACGT"] == [""] * 4
    assert sorted(p.name for p in tmp_path.glob("*.png")) == ["out.csv.1.a_b.png", "out.csv.2.short.png"]


def test_sequences_in_python(tmp_path):
    model = made(classes=("liver", "brain"))
    liver = pipeline("dna/score", model, label="liver")
    assert liver.window == WINDOW - 1
    prediction = liver("ACGTNACGT")
    np.testing.assert_allclose(prediction.value, saturate(model, "ACGTNACGT", label="liver"), atol=2e-5)
    assert (prediction.value.shape, prediction.name) == ((9, 4), "sequence_1")
    assert json.loads(prediction.save(tmp_path / "p.json").read_text())["value"][4] == [None] * 4
    table = prediction.save(tmp_path / "p.csv").read_text().splitlines()
    assert table[0] == "position,ref,A,C,G,T"
    assert table[5] == "5,N,,,,"
    assert prediction.save(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in liver([("mine", "ACGT"), "A"])] == ["mine", "sequence_2"]
    with pytest.raises(DataError, match=r"^record 'sequence_1': has '!' at base 3, which is no nucleotide code"):
        liver("AC!")
    with pytest.raises(DataError, match=r"^dna/score: takes sequences, paths or \(name, sequence\), got int\.$"):
        liver(3)


def test_a_region_whose_model_output_is_not_finite_is_bad(tmp_path):
    model = made()
    with torch.no_grad():
        model.embed.weight[NucleotideTokenizer.n_id] = float("nan")
    path = fasta(tmp_path, ("gap", GENOME[:60] + "N" + GENOME[61:90]), ("good", GENOME[:30]))
    result = pipeline("dna/score", model, batch_tokens=100).run([path], tmp_path / "out.csv")
    assert (result.good, result.bad) == (1, 1)
    assert {r["name"] for r in rows(tmp_path / "out.csv")} == {"good"}


# ---------------------------------------------------------------- refusals


def test_settings_that_cannot_be(model, genome, tmp_path):
    variants, sequences, bed = vcf(tmp_path, lines()), fasta(tmp_path, ("a", "ACGT")), tmp_path / "in.regions"
    bed.write_text("c1\t1\t5\n")
    score = pipeline("dna/score", model, reference=genome)
    for files, out, text in (
        (
            [variants, sequences],
            "out.csv",
            "the inputs of a run must be of one kind, got variants (in.vcf) and sequences (in.fa); "
            "run them separately.",
        ),
        ([bed], "out.vcf", "a .vcf output needs VCF input, got regions (in.regions); write out.csv instead."),
        ([sequences], "out.vcf", "a .vcf output needs VCF input, got sequences (in.fa); write out.csv instead."),
        (
            [variants, vcf(tmp_path, lines(), "b.vcf")],
            "out.vcf",
            "a .vcf output takes one VCF file, whose header it keeps, got 2; run them separately, or write out.csv.",
        ),
    ):
        with pytest.raises(ConfigError) as error:
            score.run(files, tmp_path / out)
        assert str(error.value) == f"dna/score: {text}"
        assert not (tmp_path / out).exists()
    with pytest.raises(
        ConfigError, match=r"in\.vcf holds variants, which need a genome; pass --reference genome\.fa\.$"
    ):
        pipeline("dna/score", model).run([variants], tmp_path / "out.csv")
    with pytest.raises(ConfigError, match=r"in\.regions holds regions, which need a genome; pass --reference"):
        pipeline("dna/score", model)(bed)
    with pytest.raises(DataError, match=r"none\.fa: no such file"):
        pipeline("dna/score", model, reference=tmp_path / "none.fa")
    with pytest.raises(DataError, match=r"none\.vcf: no such file"):
        score.run([tmp_path / "none.vcf"], tmp_path / "out.vcf")
    for options, text in (
        ({"window": 41}, r"^dna/score: window must be from 1 to 40 bases for this model, got 41\.$"),
        ({"strands": "one"}, r"^dna/score: strands must be 'both' or 'forward', got 'one'\.$"),
        ({"max_region": 0}, r"^dna/score: max_region must be at least 1, got 0\.$"),
        ({"label": "x"}, r"^label: this model was trained without labels, got 'x'; leave it out"),
    ):
        with pytest.raises(ConfigError, match=text):
            pipeline("dna/score", model, **options)


def test_help(capsys):
    assert main(["run", "dna/score", "--help"]) == 0
    options = {"--reference", "--window", "--strands", "--label", "--max-region", "--figures"}
    assert options <= set(capsys.readouterr().out.split())
