"""dna/generate: prompts, labels, limits, methods, the files written, and what is refused."""

import json

import pytest
import torch
from tests.pipelines.test_dna import TOKENIZER, fasta, made, rows, sequences

from vertebra.cli import main
from vertebra.domains.dna import statistics
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import pipeline
from vertebra.pipelines.figures import png_bytes
from vertebra.tokenizers.nucleotide import KmerTokenizer


def language(backbone="hybrid_test", labels=("weak", "strong"), **facts):
    return made(DNALanguageModel, backbone, **{"task": "lm", "classes": labels, "bos": True, "eos": True, **facts})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return str(save_model(language(), tmp_path_factory.mktemp("models") / "toy"))


def test_files_of_a_run_with_labels_and_a_reference(saved, tmp_path, capsys):
    reference = fasta(tmp_path, sequences(*[60] * 30), "real.fa")
    out = tmp_path / "out.fa"
    words = ["run", "dna/generate", "-o", str(out), "--model", saved, "--label", "weak", "--label", "strong"]
    assert (
        main([*words, "--count", "7", "--reference", str(reference), "--motif", "TATA=TATAWAW", "--motif", "GC"]) == 0
    )
    assert "14 records done" in capsys.readouterr().out
    headers = [line for line in out.read_text().splitlines() if line.startswith(">")]
    assert headers[0].startswith(">weak_1 group=weak length=")
    assert headers[13].startswith(">strong_7 group=strong")
    table = rows(tmp_path / "out.fa.csv")
    assert [row["group"] for row in table] == ["weak"] * 7 + ["strong"] * 7
    summary = json.loads((tmp_path / "out.fa.json").read_text())
    assert set(summary) == {"weak", "strong", "reference"}
    assert summary["weak"]["sequences"] == 7
    assert 0 <= summary["weak"]["js_divergence_4mers_bits"] <= 1
    assert set(summary["weak"]["motifs"]) == {"TATA", "GC"}
    assert summary["weak"]["share_new"] == 1
    assert (tmp_path / "out.fa.png").read_bytes().startswith(b"\x89PNG")


def test_sequences_are_those_of_the_model_under_their_seed():
    model = language()
    run = pipeline("dna/generate", model, count=12, labels=["weak"], seed=5)
    first = run()
    again = pipeline("dna/generate", model, count=12, labels=["weak"], seed=5, batch_size=5)()
    assert [p.value for p in first] == [p.value for p in again]
    other = pipeline("dna/generate", model, count=12, labels=["strong"], seed=5)()
    assert [p.value for p in first] != [p.value for p in other]
    assert len({p.value for p in first}) > 6
    for p in first:
        assert set(p.value) <= set("ACGT")
        front = [TOKENIZER.bos_id, TOKENIZER.vocab_size]
        end = [TOKENIZER.sep_id] * p.details["ended"]
        ids = torch.tensor([[*front, *TOKENIZER.encode(p.value).tolist(), *end]])
        with torch.inference_mode():
            logs = model(ids).log_softmax(-1)[0]
        total = sum(float(logs[t - 1, ids[0, t]]) for t in range(2, ids.shape[1]))
        assert p.details["log_likelihood"] == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("method", ["sample", "greedy", "beam"])
def test_prompts_limits_and_methods(method, tmp_path):
    count = 1 if method == "greedy" else 3
    run = pipeline("dna/generate", language(), count=count, method=method, min_bases=6, max_bases=9)
    found = run(["ACGTA", "TTTTTTTTTT"])
    assert len(found) == 2 * count
    for p, start in zip(found, ["ACGTA"] * count + ["TTTTTTTTTT"] * count, strict=True):
        assert p.value.startswith(start)
        assert 6 <= len(p.value) - len(start) <= 9
    path = fasta(tmp_path, [("one", "ACGTA"), ("two", "TTTTTTTTTT")])
    assert [p.value for p in run(str(path))][:count] == [p.value for p in found][:count] or method == "sample"
    if method == "beam":
        scores = [p.details["log_likelihood"] for p in found[:3]]
        assert scores == sorted(scores, reverse=True)


def test_bad_prompts_are_listed_and_the_others_go_on(tmp_path, saved):
    path = fasta(tmp_path, [("good", "ACGT"), ("bad", "AC!T"), ("fine", "GG")])
    out = tmp_path / "out.fa"
    assert main(["run", "dna/generate", str(path), "-o", str(out), "--model", saved, "--count", "2"]) == 3
    assert [line.split()[0] for line in out.read_text().splitlines() if line[0] == ">"] == [
        ">good_1",
        ">good_2",
        ">fine_1",
        ">fine_2",
    ]
    assert "has '!' at base 3" in (tmp_path / "out.fa.errors.jsonl").read_text()


@pytest.mark.parametrize("stride", [1, 3])
def test_overlapping_kmers_agree(stride):
    model = language(tokenizer=KmerTokenizer(3, stride), labels=(), eos=False, max_length=40)
    for p in pipeline("dna/generate", model, count=4, max_bases=30)():
        assert set(p.value) <= set("ACGT")  # a contradiction would be written N
        assert len(p.value) == 30
    assert pipeline("dna/generate", model, count=1, max_bases=12)("ACGTAC")[0].value.startswith("ACGTAC")


def test_several_labels_at_once():
    run = pipeline("dna/generate", language(), count=1, labels=["weak+strong"])
    assert run()[0].details["group"] == "weak+strong"


def test_what_is_refused():
    model = language()
    for options, text in (
        ({"labels": ["medium"]}, "label: must be one of weak, strong, got 'medium'"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"min_bases": 200}, r"min_bases must be from 1 to max_bases \(98\), got 200"),
        ({"method": "beam", "count": 9}, r"beams must be at least count \(9\), got 8"),
        ({"method": "greedy"}, "greedy makes one sequence for each label or prompt; pass count 1"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"motifs": ["TATAX"]}, "motif: must be IUPAC letters such as TATAWAW, got 'TATAX'"),
    ):
        with pytest.raises(ConfigError, match=text):
            pipeline("dna/generate", model, **options)
    with pytest.raises(ConfigError, match="was trained without labels, got 'weak'; leave it out, or train one with"):
        pipeline("dna/generate", language(labels=()), labels=["weak"])
    with pytest.raises(ConfigError, match="needs a causal language model, and this one fills masks"):
        pipeline("dna/generate", language("hybrid_test,causal=false", labels=()))
    with pytest.raises(ConfigError, match=r"trained without \[BOS\], so it needs bases to begin with; give a prompt"):
        pipeline("dna/generate", language(labels=(), bos=False), count=1)()
    with pytest.raises(DataError, match="takes prompts of bases, paths or None, got int"):
        pipeline("dna/generate", model)(3)


def test_a_bad_reference_costs_no_work(tmp_path, saved):
    with pytest.raises(DataError, match="no such file"):
        pipeline("dna/generate", saved, reference=tmp_path / "none.fa").run([], tmp_path / "out.fa", progress=False)
    assert not (tmp_path / "out.fa").exists()


# ---------------------------------------------------------------- statistics


def test_spectrum_and_motifs_count_by_definition():
    texts = ["ACGTACGT", "nnACGTN", "AC"]
    spectrum = statistics.kmer_spectrum(texts, 4)
    names = {statistics.kmer_name(i, 4): v for i, v in enumerate(spectrum) if v}
    assert names == pytest.approx({"ACGT": 3 / 6, "CGTA": 1 / 6, "GTAC": 1 / 6, "TACG": 1 / 6})
    assert statistics.gc_content("GGCATN") == pytest.approx(3 / 5)
    assert statistics.motif_shares(["TATATAT", "GGTATAAAT", "CCC"], {"tata": "TATAWAW"})["tata"] == pytest.approx(2 / 3)
    assert statistics.jensen_shannon(spectrum, spectrum) == 0
    assert statistics.jensen_shannon(statistics.kmer_spectrum(["AAAA"], 2), statistics.kmer_spectrum(["CCC"], 2)) == 1
    planted = [s + "TTGACA" for _, s in sequences(*[40] * 50)]
    assert "TTGACA" in dict(statistics.enriched_kmers(planted, 6))


def test_the_summary_is_drawn_with_and_without_a_reference():
    from vertebra.pipelines.dna_generate import generation_figure

    groups = {"a": [s for _, s in sequences(30, 31, 32)], "b": [s for _, s in sequences(30)]}
    for real in ([], [s for _, s in sequences(25, 30)]):
        assert png_bytes(generation_figure(groups, real)).startswith(b"\x89PNG")
