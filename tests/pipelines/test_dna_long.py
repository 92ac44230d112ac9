"""Long records: windows of large files through their index, and vectors by carried state."""

import tracemalloc

import numpy as np
import pytest
import torch
from tests.pipelines.test_dna import TOKENIZER, fasta, made, sequences

from vertebra.domains.dna import records
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import pipeline


def language(backbone="hybrid_test,pattern=M", **facts):
    return made(DNALanguageModel, backbone, task="lm", classes=(), bos=True, **facts)


@pytest.mark.parametrize("name", ["dna/classify", "dna/embed"])
def test_large_files_are_read_through_their_index_with_the_same_results(name, tmp_path, monkeypatch):
    lines = [(n, "\n".join(s[i : i + 60] for i in range(0, len(s), 60))) for n, s in sequences(1030, 80, 350)]
    path = fasta(tmp_path, lines)
    run = pipeline(name, made())
    whole = run(str(path))
    monkeypatch.setattr("vertebra.pipelines.dna.STREAM_BYTES", 0)
    monkeypatch.setattr("vertebra.domains.dna.formats.read_fasta", None)
    for mine, theirs in zip(run(str(path)), whole, strict=True):
        assert mine.name == theirs.name
        values = [p.value if name == "dna/embed" else list(p.scores.values()) for p in (mine, theirs)]
        np.testing.assert_allclose(*values, atol=1e-6)


def test_strange_letters_in_a_large_file_cost_their_record_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("vertebra.pipelines.dna.STREAM_BYTES", 0)
    (one, first), (two, second), (three, third) = sequences(20_000, 20_000, 500)
    path = fasta(
        tmp_path, [(one, first), (two, second[:15_000] + "!" + second[15_000:]), (three, third), ("p", "MKLVEP" * 99)]
    )
    out = tmp_path / "out.npz"
    result = pipeline("dna/embed", language()).run([path], out, progress=False)
    assert (result.good, result.bad) == (2, 2)
    assert np.load(out)["names"].tolist() == [one, three]
    errors = (tmp_path / "out.npz.errors.jsonl").read_text()
    assert "has '!' at base" in errors
    assert "looks like protein" in errors


@pytest.mark.parametrize("backbone", ["hybrid_test,pattern=M", "illama_test,window=7", "hybrid_test,pattern=S"])
def test_carried_state_equals_one_pass_over_the_whole_record(backbone, monkeypatch):
    monkeypatch.setattr("vertebra.pipelines.dna_embed.CARRY_PIECE", 64)
    monkeypatch.setattr("vertebra.pipelines.dna_embed.CARRY_ITEM", 150)
    model = language(backbone)
    (_, long), (_, short) = sequences(777, 60)
    carried, within = pipeline("dna/embed", model, context="carry")([long, short])
    for sequence, prediction in ((long, carried), (short, within)):
        ids = torch.from_numpy(np.concatenate([[TOKENIZER.bos_id], TOKENIZER.encode(sequence)]))[None]
        with torch.inference_mode():
            whole = model.embed_positions(ids)[0, 1:].mean(0)
        np.testing.assert_allclose(prediction.value, whole.numpy(), atol=1e-5)
    windows = pipeline("dna/embed", model)(long)
    assert not np.allclose(windows.value, carried.value, atol=1e-3)


def test_memory_does_not_grow_with_the_record(tmp_path, monkeypatch):
    monkeypatch.setattr("vertebra.pipelines.dna.STREAM_BYTES", 0)
    monkeypatch.setattr(records.read_blocks, "__defaults__", (1 << 16,))  # blocks of a file, below the files' size
    run = pipeline("dna/embed", language(), context="carry")
    peaks = []
    for length in (100_000, 400_000):
        letters = np.random.default_rng(0).choice(list(b"ACGT"), length).astype(np.uint8).tobytes().decode()
        lines = "\n".join(letters[i : i + 80] for i in range(0, length, 80))
        path = fasta(tmp_path, [("long", lines)], f"{length}.fa")
        del letters, lines
        tracemalloc.start()
        run.run([path], tmp_path / "out.npz", progress=False)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 100_000  # the record itself would be 300,000 more


def test_carrying_is_refused_where_it_cannot_be():
    with pytest.raises(ConfigError, match="context must be window or carry, got 'all'"):
        pipeline("dna/embed", language(), context="all")
    with pytest.raises(ConfigError, match="needs a causal language model; use context 'window'"):
        pipeline("dna/embed", made(DNAClassifier), context="carry")
    with pytest.raises(
        ConfigError, match=r"this model has attention without a window; use context 'window', or a model"
    ):
        pipeline("dna/embed", language("hybrid_test"), context="carry")
    with pytest.raises(DataError, match="has '!' at base 3"):
        pipeline("dna/embed", language(), context="carry")("AC!T")
