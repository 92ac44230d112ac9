"""dna/classify and dna/embed: files of every format, windows, outputs of every task, and every bad input."""

import csv
import gzip
import json
import random
import tracemalloc

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import pipeline
from vertebra.pipelines.dna import Classify
from vertebra.tokenizers.nucleotide import KmerTokenizer, NucleotideTokenizer, reverse_complement_string

TOKENIZER = NucleotideTokenizer()
WINDOW = 100


def made(kind=DNAClassifier, backbone="hybrid_test", tokenizer=TOKENIZER, bos=False, **facts):
    torch.manual_seed(1)
    facts = {"task": "classification", "classes": ("no", "yes"), "max_length": WINDOW, **facts}
    spec = DNASpec(tokenizer=tokenizer.to_dict(), bos=bos, **facts)
    model = kind(create_backbone(backbone), spec)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return str(save_model(model, tmp_path_factory.mktemp("models") / "toy"))


def sequences(*lengths):
    rng = random.Random(0)
    return [(f"s{i}", "".join(rng.choices("ACGT", k=n))) for i, n in enumerate(lengths)]


def fasta(folder, records, name="in.fa"):
    path = folder / name
    path.write_text("".join(f">{n}\n{s}\n" for n, s in records))
    return path


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def direct(model, sequence, averaged=False):
    """Class scores from the model itself, one sequence at a time."""
    strands = (sequence, reverse_complement_string(sequence)) if averaged else (sequence,)
    with torch.inference_mode():
        logits = [model(torch.from_numpy(TOKENIZER.encode(s))[None])[0] for s in strands]
    return torch.stack(logits).mean(0)


# ---------------------------------------------------------------- dna/classify


def test_files_of_all_formats_give_the_models_own_scores_in_order(model, saved, tmp_path):
    first, second, third = records = sequences(80, 33, 100)
    files = [fasta(tmp_path, [first]), tmp_path / "in.fastq.gz", tmp_path / "in.csv"]
    files[1].write_bytes(gzip.compress(f"@{second[0]}\n{second[1]}\n+\n{'I' * 33}\n".encode()))
    files[2].write_text(f"name,sequence\n{third[0]},{third[1]}\n")
    out = tmp_path / "out.csv"
    assert main(["run", "dna/classify", *map(str, files), "-o", str(out), "--model", saved]) == 0
    found = rows(out)
    assert list(found[0]) == [
        "file",
        "name",
        "length",
        "prediction",
        "no",
        "yes",
        "windows",
        "best_start",
        "best_score",
    ]
    assert [r["file"] for r in found] == [str(f) for f in files]
    for row, (name, sequence) in zip(found, records, strict=True):
        scores = direct(model, sequence).softmax(-1)
        assert (row["name"], row["length"], row["windows"]) == (name, str(len(sequence)), "1")
        np.testing.assert_allclose([float(row["no"]), float(row["yes"])], scores, atol=2e-5)
        assert row["prediction"] == ("yes" if scores[1] >= 0.5 else "no")
        assert row["best_score"] == row["yes"]


def test_one_by_one_equals_batched(model, tmp_path):
    path = fasta(tmp_path, sequences(*range(1, 100, 3)))
    for batch in (1, 64):
        pipeline("dna/classify", model, batch_size=batch).run([path], tmp_path / f"{batch}.csv")
    one, many = rows(tmp_path / "1.csv"), rows(tmp_path / "64.csv")
    assert [r["name"] for r in one] == [r["name"] for r in many] == [f"s{i}" for i in range(33)]
    np.testing.assert_allclose([float(r["yes"]) for r in one], [float(r["yes"]) for r in many], atol=2e-5)


def test_windows_cover_a_long_record(model, tmp_path):
    (short, (name, sequence)) = sequences(50, 333)
    bad = ("bad", "")
    out = tmp_path / "out.csv"
    path = fasta(tmp_path, [bad, short, ("a long/one", sequence)])
    result = pipeline("dna/classify", model, target="no").run([path], out)
    windows = rows(tmp_path / "out.csv.windows.csv")
    starts = [0, 25, 50, 75, 100, 125, 150, 175, 200, 225, 233]
    assert [(int(w["start"]), int(w["end"])) for w in windows] == [(s, s + WINDOW) for s in starts]
    assert {w["name"] for w in windows} == {"a"}
    table = np.array([[float(w["no"]), float(w["yes"])] for w in windows])
    for start, row in zip(starts, table, strict=True):
        np.testing.assert_allclose(row, direct(model, sequence[start : start + WINDOW]).softmax(-1), atol=2e-5)
    row = rows(out)[1]
    np.testing.assert_allclose([float(row["no"]), float(row["yes"])], table.mean(0), atol=2e-5)
    assert (row["length"], row["windows"], row["best_start"]) == ("333", "11", str(starts[table[:, 0].argmax()]))
    assert float(row["best_score"]) == pytest.approx(table[:, 0].max(), abs=1e-5)
    image = tmp_path / "out.csv.1.a.png"
    assert image.read_bytes().startswith(b"\x89PNG")
    assert set(result.paths) == {out, image, *(tmp_path / f"out.csv.{e}" for e in ("windows.csv", "errors.jsonl"))}
    assert f"1 bad (listed in {out}.errors.jsonl)" in str(result)
    assert name == "s1"


def test_stride_window_and_figures(model, tmp_path):
    path = fasta(tmp_path, sequences(130, 130))
    pipeline("dna/classify", model, window=60, stride=60, figures=1).run([path], tmp_path / "out.csv")
    found = [(w["name"], int(w["start"])) for w in rows(tmp_path / "out.csv.windows.csv")]
    assert found == [(n, s) for n in ("s0", "s1") for s in (0, 60, 70)]
    assert [p.name for p in tmp_path.glob("*.png")] == ["out.csv.1.s0.png"]


def test_windows_of_a_long_record_take_little_memory(model, tmp_path):
    class Constant(Classify):
        def predict(self, items):
            row = np.array([0.25, 0.75], dtype=np.float32)
            return [self._prediction(item.record, row, {"length": item.data.length}) for item in items]

    peaks = []
    for length in (50_000, 250_000):
        path = fasta(tmp_path, sequences(length))
        classify = Constant(model, stride=10, figures=0)
        tracemalloc.start()
        try:
            assert classify.run([path], tmp_path / "out.csv").good == 1
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 20_000 < 200  # bytes a window; ids and predictions kept would be 1,600


def test_threshold_and_target(model):
    ((_, sequence),) = sequences(60)
    score = float(direct(model, sequence).softmax(-1)[1])
    assert pipeline("dna/classify", model, threshold=score - 0.01)(sequence).value == "yes"
    assert pipeline("dna/classify", model, threshold=score + 0.01)(sequence).value == "no"
    with pytest.raises(ConfigError, match=r"^dna/classify: threshold must be from 0 to 1, got 2\.$"):
        pipeline("dna/classify", model, threshold=2)
    with pytest.raises(ConfigError, match=r"one of the model's outputs \(no, yes\), got 'maybe'\.$"):
        pipeline("dna/classify", model, target="maybe")
    with pytest.raises(ConfigError, match=r"window must be from 1 to 100 bases for this model, got 101\.$"):
        pipeline("dna/classify", model, window=101)
    with pytest.raises(ConfigError, match=r"stride must be from 1 to the window \(50 bases\), got 51\.$"):
        pipeline("dna/classify", model, window=50, stride=51)


def test_averaging_both_strands():
    ((_, sequence),) = sequences(60)
    expected = direct(made(), sequence, averaged=True).softmax(-1)
    both = pipeline("dna/classify", made(), rc_average=True)
    other = both(reverse_complement_string(sequence)).scores
    np.testing.assert_allclose(list(both(sequence).scores.values()), expected, atol=1e-5)
    np.testing.assert_allclose(list(other.values()), expected, atol=1e-5)


def test_labels_and_numbers(tmp_path):
    records = sequences(60, 90)
    path = fasta(tmp_path, records)
    labels = made(task="multilabel", classes=("a", "b", "c"))
    pipeline("dna/classify", labels, threshold=0.4).run([path], tmp_path / "labels.csv")
    for row, (_, sequence) in zip(rows(tmp_path / "labels.csv"), records, strict=True):
        scores = direct(labels, sequence).sigmoid()
        np.testing.assert_allclose([float(row[c]) for c in "abc"], scores, atol=2e-5)
        assert row["prediction"] == ";".join(c for c, s in zip("abc", scores, strict=True) if s >= 0.4)
    facts = {"classes": (), "targets": ("x", "y"), "target_mean": (10.0, -1.0), "target_std": (2.0, 3.0)}
    values = made(task="regression", **facts)
    pipeline("dna/classify", values).run([path], tmp_path / "numbers.csv")
    for row, (_, sequence) in zip(rows(tmp_path / "numbers.csv"), records, strict=True):
        expected = direct(values, sequence) * torch.tensor([2.0, 3.0]) + torch.tensor([10.0, -1.0])
        assert "prediction" not in row
        np.testing.assert_allclose([float(row["x"]), float(row["y"])], expected, atol=1e-4)
    one = made(task="regression", classes=(), targets=("x",), target_mean=(0.0,), target_std=(1.0,))
    assert isinstance(pipeline("dna/classify", one)(records[0][1]).value, float)


def test_a_long_record_with_bad_windows_is_listed_once(tmp_path):
    model = made()
    with torch.no_grad():
        model.embed.weight[TOKENIZER.n_id] = float("nan")
    (good, (_, long), last) = sequences(50, 500, 300)
    path = fasta(tmp_path, [good, ("gap", long[:150] + "N" * 200 + long[350:]), last])
    result = pipeline("dna/classify", model).run([path], tmp_path / "out.csv")
    assert (result.good, result.bad) == (2, 1)
    assert [r["name"] for r in rows(tmp_path / "out.csv")] == ["s0", "s2"]


def test_records_shorter_than_a_token_cost_no_other(tmp_path):
    model = made(tokenizer=KmerTokenizer(6))
    path = fasta(tmp_path, [("short", "ACG"), *sequences(50, 60)])
    result = pipeline("dna/classify", model).run([path], tmp_path / "out.csv")
    assert [r["name"] for r in rows(tmp_path / "out.csv")] == ["s0", "s1"]
    assert result.bad == 1
    with pytest.raises(
        DataError, match=r"^record 'sequence_1': KmerTokenizer: .* at least k = 6 bases, got 3; leave it out"
    ):
        pipeline("dna/classify", model)("ACG")


# ---------------------------------------------------------------- from Python


def test_predictions_in_python(model, tmp_path):
    (_, short), (_, long) = sequences(60, 250)
    classify = pipeline("dna/classify", model)
    one, two = classify([("mine", short), long])
    assert (one.name, two.name, classify(short).name) == ("mine", "sequence_2", "sequence_1")
    assert list(one.scores) == ["no", "yes"]
    assert [p.name for p in classify(fasta(tmp_path, [("f", short)]))] == ["f"]
    for prediction in (one, two):
        told = json.loads(prediction.to_json())
        assert (told["name"], told["value"], told["scores"]) == (prediction.name, prediction.value, prediction.scores)
        assert len(prediction.figure().axes) == 1
        assert prediction.value in repr(prediction)
        assert "<table>" in prediction._repr_html_()
    assert told["starts"][-1] + told["window"] == told["length"] == 250
    assert json.loads(one.save(tmp_path / "p.json").read_text())["name"] == "mine"
    assert one.save(tmp_path / "p.csv").read_text().startswith("name,value,no,yes\nmine,")
    assert two.save(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match=r"the name must end in \.json, \.csv or \.png, got 'p\.xls'\.$"):
        one.save(tmp_path / "p.xls")
    with pytest.raises(DataError, match=r"^record 'sequence_1': has '!' at base 3, which is no nucleotide code"):
        classify("AC!")
    with pytest.raises(DataError, match=r"^dna/classify: takes sequences, paths or \(name, sequence\), got int\.$"):
        classify(3)


# ---------------------------------------------------------------- dna/embed


@pytest.mark.parametrize("kind", ["lm", "lm-bos", "classifier"])
def test_embeddings_are_those_of_the_model_and_alike_in_both_formats(tmp_path, kind):
    import pyarrow.parquet as pq

    lm = {"kind": DNALanguageModel, "backbone": "illama_test", "task": "lm", "classes": (), "bos": kind == "lm-bos"}
    model = made() if kind == "classifier" else made(**lm)
    records = sequences(70, 20, 230, 45)
    path = fasta(tmp_path, records)
    embed = pipeline("dna/embed", model)
    for ending in ("npz", "parquet"):
        assert embed.run([path], tmp_path / f"out.{ending}").good == 4
    with np.load(tmp_path / "out.npz") as archive:
        names, lengths, vectors = archive["names"], archive["lengths"], archive["embeddings"]
    table = pq.read_table(tmp_path / "out.parquet").to_pydict()
    assert names.tolist() == table["name"] == [n for n, _ in records]
    assert lengths.tolist() == table["length"] == [70, 20, 230, 45]
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.array(table["embedding"], dtype=np.float32))

    def vector(sequence):
        ids = torch.from_numpy(TOKENIZER.encode(sequence))[None]
        with torch.inference_mode():
            if kind != "lm-bos":
                return model.embed_sequences(ids)[0]
            ids = torch.cat([torch.tensor([[TOKENIZER.bos_id]]), ids], 1)
            return model.embed_positions(ids)[0, 1:].mean(0)

    for row, (_, sequence) in zip(vectors, records, strict=True):
        if len(sequence) < WINDOW:
            np.testing.assert_allclose(row, vector(sequence), atol=2e-5, rtol=1e-4)
    window = embed.window  # side by side, the last one ends with the record
    long = records[2][1]
    mean = torch.stack([vector(long[s : s + window]) for s in (0, window, 230 - window)]).mean(0)
    np.testing.assert_allclose(vectors[2], mean, atol=2e-5, rtol=1e-4)


def test_embeddings_across_row_groups(model, tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    monkeypatch.setattr("vertebra.pipelines.dna_embed.EMBED_ROWS", 2)
    pipeline("dna/embed", model).run([fasta(tmp_path, sequences(9, 8, 7, 6, 5))], tmp_path / "out.parquet")
    file = pq.ParquetFile(tmp_path / "out.parquet")
    assert file.num_row_groups == 3
    assert file.read()["name"].to_pylist() == [f"s{i}" for i in range(5)]


# ---------------------------------------------------------------- bad input

GOOD = ">good\nACGTACGT\n"
LONG = GOOD + ">long\n" + "ACGTA" * 300 + "\n"
PROTEIN = ">p\nMEEPQSDPSVEPPLSQETFSDLWKLLPENN\n"
BAD = {
    "empty.fa": (b"", 2, "empty.fa: the file is empty; was its download or export interrupted?"),
    "blank.fa": (b"\n\n", 2, "blank.fa: holds no record, only blank lines"),
    "protein.fa": (PROTEIN.encode(), 2, "protein.fa, record 'p', line 1: looks like protein: "),
    "binary.fa": (b"\x7fELF\0\0\1", 2, "binary.fa: is a binary file (a NUL byte at offset 4), whatever its name says"),
    "cut.fa.gz": (gzip.compress(GOOD.encode())[:12], 2, "its compressed data end early; copy or download"),
    "text.fa": (b"hello\n", 2, "holds no FASTA or FASTQ record, it begins with 'hello'"),
    "mixed.fa": ((GOOD + PROTEIN).encode(), 3, "looks like protein: "),
    "no_bases.fa": ((GOOD + ">e\n").encode(), 3, "has no bases"),
    "long.fa": (LONG.encode(), 3, "has more than 1,000 bases, the most read whole"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(saved, tmp_path, capsys, name):
    content, status, text = BAD[name]
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out.csv"
    words = ["run", "dna/classify", str(tmp_path / name), "-o", str(out), "--model", saved, "--max-length", "1000"]
    assert main(words) == status
    told = capsys.readouterr()
    if status == 2:
        assert text in told.err
        assert "Traceback" not in told.err
        assert told.err.strip().count("\n") <= 1
        assert not out.exists()
    else:
        assert [r["name"] for r in rows(out)] == ["good"]
        (line,) = (tmp_path / "out.csv.errors.jsonl").read_text().splitlines()
        assert text in json.loads(line)["rule"]
        assert f"1 records done, 1 bad (listed in {out}.errors.jsonl)" in told.out
    assert not list(tmp_path.glob(".*"))


def test_truncated_gzip_keeps_the_records_before(saved, tmp_path):
    records = sequences(*[60] * 300)
    path = tmp_path / "in.fa.gz"
    whole = gzip.compress("".join(f">{n}\n{s}\n" for n, s in records).encode())
    path.write_bytes(whole[: len(whole) // 2])
    out = tmp_path / "out.csv"
    assert main(["run", "dna/classify", str(path), "-o", str(out), "--model", saved]) == 3
    found = [r["name"] for r in rows(out)]
    assert 100 < len(found) < 200
    assert found == [n for n, _ in records[: len(found)]]
    (line,) = (tmp_path / "out.csv.errors.jsonl").read_text().splitlines()
    assert json.loads(line)["rule"] == "its compressed data end early"


def test_duplicate_names_are_kept_and_listed(saved, tmp_path):
    path = fasta(tmp_path, [("a", "ACGT"), ("b", "GGGG"), ("a", "TTTT")])
    out = tmp_path / "out.csv"
    assert main(["run", "dna/classify", str(path), "-o", str(out), "--model", saved]) == 3
    assert [r["name"] for r in rows(out)] == ["a", "b", "a"]
    (line,) = map(json.loads, (tmp_path / "out.csv.errors.jsonl").read_text().splitlines())
    assert (line["record"], line["line"], line["rule"]) == ("a", 5, "has the name of the record in line 1")


def test_outputs_and_models_that_are_not_there(saved, tmp_path, capsys):
    path = fasta(tmp_path, sequences(20))
    lm = str(save_model(made(DNALanguageModel, task="lm", classes=()), tmp_path / "lm"))
    for words, text in (
        (["-o", f"{path}/out.csv", "--model", saved], "cannot be written (File exists); choose another folder"),
        (["-o", "out.npz", "--model", saved], "dna/classify: the output must end in .csv, got 'out.npz'"),
        (["-o", "out.csv", "--model", str(tmp_path / "none")], str(tmp_path / "none")),
        (["-o", "out.csv", "--model", lm], "needs a model of the task dna/classify, got one of dna/lm"),
        (["-o", "out.csv", "--model", saved, "--window", "500"], "window must be from 1 to 100 bases"),
    ):
        assert main(["run", "dna/classify", str(path), *words]) == 2
        told = capsys.readouterr().err
        assert text in told
        assert "Traceback" not in told


@pytest.mark.slow
def test_a_record_of_200_megabases_is_refused_without_being_held(model, tmp_path):
    path = tmp_path / "big.fa"
    line = b"ACGTACGTAC" * 8 + b"\n"
    with path.open("wb") as stream:
        stream.write(b">good\nACGTACGT\n>big\n")
        for _ in range(250):
            stream.write(line * 10_000)
        stream.write(b">after\nACGT\n")
    classify = pipeline("dna/classify", model, max_length=10_000_000)
    tracemalloc.start()
    try:
        result = classify.run([path], tmp_path / "out.csv")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        path.unlink()
    assert [r["name"] for r in rows(tmp_path / "out.csv")] == ["good", "after"]
    assert result.bad == 1
    assert peak < 64e6


def test_a_threshold_without_meaning_is_refused(model):
    numbers = made(task="regression", targets=("a",), target_mean=(0.0,), target_std=(1.0,), classes=())
    with pytest.raises(ConfigError, match=r"threshold=0\.4 has no meaning for this model \(regression, 1 outputs\)"):
        pipeline("dna/classify", numbers, threshold=0.4)
