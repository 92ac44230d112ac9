"""The fabricated files: the same bytes for the same seed, readable in their formats, neither trivial nor hopeless."""

from itertools import pairwise

import numpy as np
import pytest

from vertebra.domains.dna import sample
from vertebra.domains.dna.formats import IndexedFasta, find_tables, read_sequences, read_table


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    sample.write_sample(root)
    return root


def test_same_seed_same_bytes_and_another_seed_others(folder, tmp_path):
    again = sample.write_sample(tmp_path / "again")
    other = sample.write_sample(tmp_path / "other", seed=1)
    for path, changed in zip(again, other, strict=True):
        name = path.relative_to(tmp_path / "again")
        assert path.read_bytes() == (folder / name).read_bytes()
        assert changed.read_bytes() != path.read_bytes()
    written = {p for p in (tmp_path / "again").rglob("*") if p.is_file()}
    assert written == set(again)


def test_promoters_and_background_are_81_bases_and_distinct(folder):
    for name in ("promoters.fa", "background.fa"):
        records = list(read_sequences(folder / name))
        assert len(records) == len({r.sequence for r in records}) == 2000
        assert {len(r.sequence) for r in records} == {sample.LENGTH}
        assert set("".join(r.sequence for r in records)) == set("ACGT")


def test_tables_have_three_balanced_classes(folder):
    found = find_tables(folder / "gue")
    for path, count in ((found.train, 400), (found.dev, 50), (found.test, 50)):
        assert path is not None
        assert np.bincount(read_table(path).class_ids(["0", "1", "2"])).tolist() == [count] * 3


def test_bed_names_the_promoters_of_the_genome(folder):
    genome = IndexedFasta(folder / "genome.fa", write_index=False)
    rows = [line.split("\t") for line in (folder / "genome.bed").read_text().splitlines()]
    assert {row[0] for row in rows} == set(genome.lengths)
    spans = sorted((int(row[1]), int(row[2])) for row in rows)
    assert {stop - start for start, stop in spans} == {sample.LENGTH}
    assert all(stop <= start for (_, stop), (start, _) in pairwise(spans))
    assert 0 <= spans[0][0] < spans[-1][1] <= genome.lengths[rows[0][0]]
    letters = "".join(r.sequence for r in read_sequences(folder / "genome.fa"))
    assert set(letters) == set("ACGTacgt")
    promoters = np.array([["ACGT".index(c) for c in genome.fetch(r[0], int(r[1]), int(r[2])).upper()] for r in rows])
    assert likelihood_ratio(promoters).mean() > 2 > -2 > likelihood_ratio(background(2000)).mean()


def test_reads_have_qualities_and_genomes_genes(folder):
    reads = list(read_sequences(folder / "reads.fastq.gz"))
    assert len(reads) == 200
    assert {len(r.sequence) == len(r.quality or "") for r in reads} == {True}
    assert {int(q) for r in reads for q in r.phred} <= set(range(2, 42))
    content = []
    for path in sorted((folder / "genomes").iterdir()):
        (record,) = read_sequences(path)
        content.append(sum(map(record.sequence.count, "GC")) / len(record.sequence))
    assert content == sorted(content)


def test_background_has_the_documented_statistics():
    codes = background(4000)
    base = np.bincount(codes.ravel(), minlength=4) / codes.size
    np.testing.assert_allclose(base, base[::-1], atol=0.01)  # both strands alike
    pairs = np.zeros((4, 4))
    np.add.at(pairs, (codes[:, :-1].ravel(), codes[:, 1:].ravel()), 1)
    bias = pairs / pairs.sum() / np.outer(base, base)
    np.testing.assert_allclose(bias, sample._BIAS, atol=0.06)


def test_the_best_possible_scorer_is_right_in_some_94_of_100():
    rng = np.random.default_rng(7)
    hits = (likelihood_ratio(sample.bacterial_promoters(rng, 1000)) > 0).mean()
    misses = (likelihood_ratio(background(1000)) < 0).mean()
    assert 0.90 <= (hits + misses) / 2 <= 0.96


def background(count):
    return sample.background(np.random.default_rng(3), count)


def likelihood_ratio(codes):
    """Log ratio of promoter and background, from the very model that draws them, summed over all placements."""
    gcs = np.arange(0.3, 0.71, 0.02)
    chain = np.stack([_chain(codes, gc) for gc in gcs], axis=1)  # (N, G, L)
    other = _logsumexp(_normal(gcs, 0.5) + chain.sum(-1), axis=1)
    minus_10, minus_35 = _matrix(*sample._MINUS_10), _matrix(*sample._MINUS_35)
    at_start = np.log([0.5, 0.1, 0.3, 0.1])[codes[:, sample.START]] - chain[:, :, sample.START].T
    placed = []
    for jitter in (-1, 0, 1):
        for spacer, share in zip(sample._SPACERS, sample._SPACER_SHARES, strict=True):
            gain = at_start.T + np.log(share / 3)
            for matrix, at in ((minus_10, sample.START - 12 + jitter), (minus_35, sample.START - 18 + jitter - spacer)):
                found = matrix[np.arange(6), codes[:, at : at + 6]].sum(-1)
                gain = gain + found[:, None] - chain[:, :, at : at + 6].sum(-1)
            placed.append(chain.sum(-1) + gain)
    promoter = _logsumexp(_normal(gcs, 0.46) + _logsumexp(np.stack(placed), axis=0), axis=1)
    return promoter - other


def _chain(codes, gc):
    base = np.array([1 - gc, gc, gc, 1 - gc]) / 2
    steps = base * sample._BIAS
    steps = np.log(steps / steps.sum(-1, keepdims=True))
    return np.concatenate([np.log(base)[codes[:, :1]], steps[codes[:, :-1], codes[:, 1:]]], axis=1)


def _matrix(box, certain):
    matrix = np.repeat((1 - np.array(certain))[:, None] / 4, 4, axis=1)
    matrix[np.arange(6), ["ACGT".index(c) for c in box]] += certain
    return np.log(matrix)


def _normal(gcs, mean):
    weight = np.exp(-((gcs - mean) ** 2) / (2 * 0.05**2))
    return np.log(weight / weight.sum())


def _logsumexp(values, axis):
    return np.logaddexp.reduce(values, axis=axis)
