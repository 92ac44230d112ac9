"""Data modules of DNA: splits, batches, windows."""

import logging
import math
import random
from collections import Counter

import numpy as np
import pytest
import torch

from vertebra.domains.dna.data import DNALanguageData, DNASequenceData
from vertebra.domains.dna.labelled import share_out
from vertebra.domains.dna.objectives import mask_tokens
from vertebra.domains.dna.sample import write_fasta
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.spec import DataSpec
from vertebra.domains.targets import next_targets
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer, reverse_complement_string

TOKENIZER = NucleotideTokenizer()
PAD = TOKENIZER.pad_id


def letters(seed, length=40):
    return "".join(random.Random(seed).choices("ACGT", k=length))


@pytest.fixture
def fasta(tmp_path):
    """Keyword arguments: files of 30 positives and 20 negatives."""
    files = {}
    for name, count, start in (("positives", 30, 0), ("negatives", 20, 1000)):
        records = [(f"r{i // 2}:{i}", letters(start + i, 30 + i)) for i in range(count)]
        files[name] = str(write_fasta(tmp_path / f"{name}.fa", records))
    return files


@pytest.fixture
def table(tmp_path):
    """A function: write rows of sequence and label, return the path."""

    def write(rows, name="data.csv"):
        (tmp_path / name).write_text("sequence,label\n" + "".join(f"{s},{label}\n" for s, label in rows))
        return str(tmp_path / name)

    return write


def texts(items, epoch=0):
    batch = items.fetch(np.arange(len(items.lengths)), epoch)
    return [TOKENIZER.decode(row[mask]) for row, mask in zip(batch["ids"], batch["mask"], strict=True)]


def split_texts(data):
    data.setup("")
    return {name: texts(data.items(name)) for name in ("train", "val", "test")}


# ---------------------------------------------------------------- splits


@pytest.mark.parametrize("split", ["identity", "random", "record"])
def test_splits_are_disjoint_complete_stratified_and_deterministic(fasta, split):
    options = {**fasta, "split": split, "val_fraction": 0.2, "test_fraction": 0.2}
    parts = split_texts(DNASequenceData(**options))
    everything = [s for part in parts.values() for s in part]
    assert len(everything) == len(set(everything)) == 50
    assert {k: len(v) for k, v in parts.items()} == pytest.approx({"train": 32, "val": 8, "test": 10}, abs=2)
    assert split_texts(DNASequenceData(**options)) == parts
    assert split_texts(DNASequenceData(**options, seed=1)) != parts
    data = DNASequenceData(**options)
    data.setup("")
    for name in parts:
        assert data.items(name).labels.mean() == pytest.approx(0.6, abs=0.15)


def test_records_stay_together(fasta):
    data = DNASequenceData(**fasta, split="record")
    data.setup("")
    sides = {}
    for name in ("train", "val", "test"):
        for record in data.items(name).names:
            sides.setdefault(record.partition(":")[0], set()).add(name)
    assert all(len(side) == 1 for side in sides.values())


def test_similar_sequences_stay_together_or_are_reported(table, caplog):
    rows = [(letters(i // 5, 60), i // 5 % 2) for i in range(60)]
    data = DNASequenceData(file=table(rows))
    parts = split_texts(data)
    assert not set(parts["train"]) & set(parts["test"])
    assert data.leakage["test"].similar == 0
    with caplog.at_level(logging.WARNING, "vertebra"):
        data = DNASequenceData(file=table(rows), split="random")
        data.setup("")
    assert data.leakage["test"].exact > 0
    assert "are similar to a training sequence" in caplog.text


def test_folds_test_everything_once(fasta):
    folds = [split_texts(DNASequenceData(**fasta, folds=4, fold=i)) for i in range(4)]
    tested = [s for fold in folds for s in fold["test"]]
    assert len(tested) == len(set(tested)) == 50
    for fold in folds:
        assert not set(fold["test"]) & {*fold["train"], *fold["val"]}


def test_files_of_their_own_are_taken_whole(table):
    rows = [(letters(i), i % 2) for i in range(30)]
    train, val, test = table(rows[:20]), table(rows[20:25], "v.csv"), table(rows[25:], "t.csv")
    parts = split_texts(DNASequenceData(file=train, val_file=val, test_file=test))
    assert [len(parts[k]) for k in ("train", "val", "test")] == [20, 5, 5]
    assert set(parts["test"]) == {s for s, _ in rows[25:]}
    with pytest.raises(ConfigError, match="folds make the test set, but there is a test file"):
        DNASequenceData(file=train, test_file=test, folds=3).setup("fit")


def test_a_folder_in_the_gue_layout(table, tmp_path):
    for name, count in (("train", 12), ("dev", 4), ("test", 6)):
        table([(letters(count * 100 + i), i % 3) for i in range(count)], f"{name}.csv")
    data = DNASequenceData(root=str(tmp_path))
    assert [len(part) for part in split_texts(data).values()] == [12, 4, 6]
    assert data.spec.classes == ("0", "1", "2")


# ---------------------------------------------------------------- spec and labels


def test_spec_of_classes(fasta):
    data = DNASequenceData(**fasta)
    with pytest.raises(ConfigError, match=r"spec is known after setup; call setup\('fit'\) first"):
        _ = data.spec
    data.setup("fit")
    longest = max(map(len, texts(data.items("train"))))
    assert data.spec == DNASpec(
        tokenizer=TOKENIZER.to_dict(), task="classification", max_length=longest, classes=("negative", "positive")
    )
    assert data.spec.num_outputs == 2


def test_spec_of_several_labels_and_of_numbers(table):
    sequences = [letters(i) for i in range(40)]
    kinds = ["a", "b;a", "c", "c;a"]
    data = DNASequenceData(file=table([(s, kinds[i % 4]) for i, s in enumerate(sequences)]), task="multilabel")
    data.setup("fit")
    assert (data.spec.task, data.spec.classes) == ("multilabel", ("a", "b", "c"))
    flags = data.items("train").labels
    assert {tuple(row) for row in flags.tolist()} == {(1, 0, 0), (1, 1, 0), (0, 0, 1), (1, 0, 1)}

    data = DNASequenceData(file=table([(s, i + 0.5) for i, s in enumerate(sequences)]))
    data.setup("fit")
    numbers = data.items("train").labels
    assert (data.spec.task, data.spec.num_outputs) == ("regression", 1)
    assert data.spec.target_mean == pytest.approx((numbers.mean(),), rel=1e-5)
    assert data.spec.target_std == pytest.approx((numbers.std(),), rel=1e-5)


@pytest.mark.parametrize(
    "facts",
    [
        {"task": "classification", "classes": ("a", "b")},
        {"task": "regression", "targets": ("x", "y"), "target_mean": (0.5, 1.0), "target_std": (2.0, 3.0)},
        {"task": "lm", "bos": True},
    ],
)
def test_spec_round_trip(facts):
    spec = DNASpec(tokenizer=TOKENIZER.to_dict(), max_length=9, **facts)
    values = spec.to_dict()
    assert values["domain"] == "dna"
    assert DataSpec.from_dict(values) == spec
    with pytest.raises(ConfigError, match="DNASpec has no field 'lenght'"):
        DataSpec.from_dict({**values, "lenght": 1})


def test_the_spec_of_a_model_rules(table):
    data = DNASequenceData(file=table([(letters(i, 30), "ab"[i % 2]) for i in range(20)]))
    spec = DNASpec(tokenizer=TOKENIZER.to_dict(), task="classification", max_length=10, classes=("b", "a"), bos=False)
    data.use_spec(spec)
    data.setup("fit")
    assert data.spec == spec
    assert data.items("train").lengths.max() == 10
    strange = DNASequenceData(file=table([(letters(i), "xy"[i % 2]) for i in range(20)]))
    strange.use_spec(spec)
    with pytest.raises(DataError, match=r"every label must be one of b, a, got '[xy]' \(sequence \d+\)"):
        strange.setup("fit")


@pytest.mark.parametrize("count", [24, 40, 60, 300])
@pytest.mark.parametrize("label", [lambda i: i + 0.5, lambda i: f"class {i}"])
def test_labels_that_occur_once_are_shared_out_too(count, label):
    part = share_out([str(label(i)) for i in range(count)], np.arange(count), [0.1, 0.9], seed=0)
    assert (part == 0).sum() == pytest.approx(0.1 * count, abs=1 + count / 50)


def test_no_sequences_are_shared_out_to_nobody():
    assert share_out([], np.zeros(0, np.int64), [0.1, 0.9], seed=0).shape == (0,)


# ---------------------------------------------------------------- batches


def test_reverse_complement_one_reads_the_other_strand_in_training_alone(fasta):
    plain = split_texts(DNASequenceData(**fasta))
    other = split_texts(DNASequenceData(**fasta, reverse_complement=1.0))
    assert other["train"] == [reverse_complement_string(s) for s in plain["train"]]
    assert other["test"] == plain["test"]


def test_strands_change_with_the_epoch_and_repeat(fasta):
    data = DNASequenceData(**fasta, reverse_complement=0.5)
    data.setup("fit")
    items = data.items("train")
    assert texts(items, 0) == texts(items, 0) != texts(items, 1)


@pytest.mark.parametrize(("crop", "begin"), [("left", 0), ("centre", 10), ("right", 20)])
def test_crop(table, crop, begin):
    rows = [(letters(i, 30), i % 2) for i in range(20)]
    parts = split_texts(DNASequenceData(file=table(rows), max_length=10, crop=crop))
    assert {s for part in parts.values() for s in part} == {s[begin : begin + 10] for s, _ in rows}


def test_random_crop_is_random_in_training_alone(table):
    rows = [(letters(i, 30), i % 2) for i in range(20)]
    data = DNASequenceData(file=table(rows), max_length=10, crop="random")
    parts = split_texts(data)
    centres = {s[10:20] for s, _ in rows}
    assert set(parts["test"]) <= centres
    assert not set(parts["train"]) <= centres
    assert all(any(part in s for s, _ in rows) for part in parts["train"])
    assert texts(data.items("train"), 1) != parts["train"]


def test_batches_hold_all_within_their_limits(fasta):
    data = DNASequenceData(**fasta, batch_size=8, max_tokens=300, predict_file=fasta["positives"])
    data.setup("fit")
    seen = []
    for batch in data.train_dataloader():
        assert len(batch["ids"]) <= 8
        assert batch["ids"].numel() <= 300
        assert torch.equal(batch["mask"], batch["ids"] != PAD)
        seen += batch["index"].tolist()
    assert sorted(seen) == list(range(len(data.items("train").lengths)))
    data.setup("predict")
    batch = next(iter(data.predict_dataloader()))
    assert "labels" not in batch
    assert set(batch["names"]) <= set(data.items("predict").names)


def test_kmers(fasta):
    data = DNASequenceData(**fasta, k=3, stride=3)
    plain = DNASequenceData(**fasta)
    data.setup("fit")
    plain.setup("fit")
    assert data.items("train").lengths.tolist() == [n // 3 for n in plain.items("train").lengths]
    assert data.items("train").fetch(np.arange(3), 0)["ids"].max() < 7 + 64


# ---------------------------------------------------------------- errors


def test_wrong_arguments_are_named(tmp_path):
    for arguments, text in (
        ({"positives": "a.fa"}, "positives needs negatives; give both files"),
        ({"negatives": "a.fa"}, "negatives needs positives; give both files"),
        ({"root": "x", "file": "y"}, "give one of root, positives with negatives, or file, got root and file"),
        ({}, "give one of root, positives with negatives, or file, got none"),
        ({"file": "x", "folds": 3, "fold": 3}, "fold must be from 0 to folds - 1 and folds at least 2, got 3 of 3"),
        ({"file": "x", "folds": 1}, "folds at least 2, got 0 of 1"),
        ({"file": "x", "val_fraction": 0.6, "test_fraction": 0.4}, "below 1 together, got 0.6 and 0.4"),
        ({"file": "x", "batch_size": 0}, "batch_size must be at least 1, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            DNASequenceData(**arguments)


def test_data_that_cannot_be_used_is_named(table):
    with pytest.raises(DataError, match="at least two classes in training, got a"):
        DNASequenceData(file=table([(letters(i), "a") for i in range(20)])).setup("fit")
    with pytest.raises(DataError, match="the train split must not be empty; give more data or another share"):
        DNASequenceData(file=table([(letters(0), "a"), (letters(1), "b")])).setup("fit")
    data = DNASequenceData(file=table([(letters(i), i % 2) for i in range(20)]), test_fraction=0)
    data.setup("")
    with pytest.raises(DataError, match="no test data; give test_file, or test_fraction above 0"):
        data.test_dataloader()


# ---------------------------------------------------------------- language models


@pytest.fixture
def genome(tmp_path):
    """A file with records of 500, 203 and 11 bases."""
    records = [(f"c{n}", letters(n, n)) for n in (500, 203, 11)]
    return str(write_fasta(tmp_path / "genome.fa", records))


def targets_of(items):
    """Tokens that count, of all rows."""
    counted = []
    for i in range(len(items.lengths)):
        batch = items.fetch(np.array([i]), 0)
        targets = next_targets(batch["ids"].long(), batch["counted"], batch.get("segments"))
        counted += targets[targets >= 0].tolist()
    return counted


@pytest.mark.parametrize("stride", [None, 1, 7, 15, 31])
def test_every_base_is_counted_once_in_evaluation(genome, tmp_path, stride):
    data = DNALanguageData(genome, val=["c203", "c11"], test=["c500:100-400"], length=32, eval_stride=stride)
    data.setup("")
    for name, wanted in (("val", letters(203, 203) + letters(11, 11)), ("test", letters(500, 500)[100:400])):
        assert Counter(targets_of(data.items(name))) == Counter(TOKENIZER.encode(wanted).tolist())
    starts = data.items("test").begins - data.items("test").begins[0]
    context = data.items("test").seen
    hits = Counter(
        int(p)
        for s, n, seen in zip(starts, data.items("test").sizes, context, strict=True)
        for p in range(s + seen, s + n)
    )
    assert hits == Counter(range(300))
    assert (context[1:] >= 32 - 1 - (stride or 16)).all()


def test_shares_are_the_ends_of_records(genome):
    data = DNALanguageData(genome, val=0.1, test=0.2, length=600, bos=False, reverse_complement=0, batch_size=1)
    parts = split_texts(data)
    whole = letters(500, 500)
    assert any(whole[:350] in row for row in parts["train"])
    assert any(whole[350:400] in row for row in parts["val"])
    assert any(whole[400:] in row for row in parts["test"])
    assert sum(len(row) for part in parts.values() for row in part) == 500 + 203 + 11


def test_held_out_ranges_are_not_trained_on(genome):
    data = DNALanguageData(genome, val=["c500:200-260"], test=["c203"], length=40, bos=False, reverse_complement=0)
    data.setup("")
    items = data.items("train")
    for epoch in range(10):
        shown = texts(items, epoch)
        assert not any(letters(500, 500)[i : i + 12] in row for row in shown for i in range(200, 249))
    assert not any(letters(203, 203)[i : i + 20] in row for row in texts(items) for i in range(0, 180, 20))


def test_training_windows_move_with_the_epoch_and_stay_inside(genome):
    data = DNALanguageData(genome, val=0.0, test=0.0, length=33, reverse_complement=0)
    data.setup("fit")
    whole = [letters(n, n) for n in (500, 203, 11)]
    first, again, second = (texts(data.items("train"), epoch) for epoch in (0, 0, 1))
    assert first == again != second
    items = data.items("train")
    single = [i for i in range(len(items.lengths)) if items.pieces_in_row[i] == 1]
    for row in (first[i] for i in single):
        assert any(row in record for record in whole)


def test_short_records_are_packed_with_segments(tmp_path):
    sequences = [letters(i, 5 + i) for i in range(8)]
    path = str(write_fasta(tmp_path / "reads.fa", [(f"r{i}", s) for i, s in enumerate(sequences)]))
    data = DNALanguageData(path, val=0.0, test=0.0, length=30, reverse_complement=0)
    data.setup("fit")
    items = data.items("train")
    assert items.packed
    batch = items.fetch(np.arange(len(items.lengths)), 0)
    assert batch["ids"].shape[1] <= 30
    assert torch.equal(batch["segments"] >= 0, batch["mask"])
    found = []
    for ids, segments in zip(batch["ids"], batch["segments"], strict=True):
        for s in range(int(segments.max()) + 1):
            piece = ids[segments == s]
            assert piece[0] == TOKENIZER.bos_id
            found.append(TOKENIZER.decode(piece))
    assert sorted(found) == sorted(sequences)
    targets = next_targets(batch["ids"].long(), batch["counted"], batch["segments"])
    assert (targets >= 0).sum() == sum(map(len, sequences))  # the first base of each too, after its [BOS]


def test_rename_letters_permutes_bases_alone(tmp_path):
    sequence = "NN" + letters(3, 28) + "N"
    path = str(write_fasta(tmp_path / "g.fa", [(f"r{i}", sequence) for i in range(300)]))
    data = DNALanguageData(path, val=0.0, test=0.0, length=32, reverse_complement=0, rename_letters=1.0)
    data.setup("fit")
    items = data.items("train")
    rows = items.fetch(np.arange(300), 0)["ids"][:, 1:].tolist()
    plain = TOKENIZER.encode(sequence).tolist()
    maps = Counter()
    for row in rows:
        pairs = dict(zip(plain, row, strict=True))
        assert all(pairs[a] == b for a, b in zip(plain, row, strict=True))  # one map a window
        assert pairs.pop(TOKENIZER.n_id) == TOKENIZER.n_id
        assert sorted(pairs.values()) == list(TOKENIZER.base_ids)
        maps[tuple(sorted(pairs.items()))] += 1
    assert len(maps) == 24


def test_reverse_complement_one_and_evaluation_without(genome):
    data = DNALanguageData(genome, val=["c203"], test=0.0, length=40, bos=False, reverse_complement=1.0)
    data.setup("fit")
    items = data.items("train")
    whole = [letters(500, 500), letters(11, 11)]
    for i in np.flatnonzero(items.pieces_in_row == 1):
        row = TOKENIZER.decode(items.fetch(np.array([i]), 0)["ids"][0])
        assert any(reverse_complement_string(row) in record for record in whole)
    assert all(row in letters(203, 203) for row in texts(data.items("val")))


def test_masking_share():
    ids = torch.randint(7, 11, (200, 500))
    counted = torch.rand(ids.shape) < 0.9
    draw = torch.rand(ids.shape)
    changed, targets = mask_tokens(ids, counted, draw, mask_id=3, base_ids=torch.arange(7, 11), share=0.2)
    chosen = targets >= 0
    assert not (chosen & ~counted).any()
    assert torch.equal(changed[~chosen], ids[~chosen])
    assert torch.equal(targets[chosen], ids[chosen])
    assert chosen.sum() / counted.sum() == pytest.approx(0.2, abs=0.01)
    masked = (changed == 3)[chosen].float().mean()
    kept = (changed == ids)[chosen].float().mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / 4, abs=0.01)  # a random base is the same one in four
    other = changed[chosen & (changed != 3)]
    assert other.unique().tolist() == [7, 8, 9, 10]
    for base in (7, 8, 9, 10):
        assert (other == base).float().mean() == pytest.approx(0.25, abs=0.02)


def test_predict_takes_whole_sequences(genome):
    data = DNALanguageData("absent.fa", length=16, predict_file=genome)
    data.setup("predict")
    assert data.items("predict").lengths.tolist() == [500, 203, 11]
    assert math.isclose(data.items("predict").fetch(np.arange(3), 0)["mask"].sum(), 714)


def test_wrong_language_data_is_named(genome):
    for arguments, text in (
        ({"length": 2}, "length must be at least 3, got 2"),
        ({"length": 8, "eval_stride": 8}, "eval_stride must be from 1 to 7, got 8"),
        ({"val": 0.5, "test": 0.5}, "val and test must be from 0 and below 1 together, got 0.5 and 0.5"),
        ({"k": 3, "rename_letters": 0.5}, r"rename_letters needs single nucleotides \(k=1\), got k=3"),
    ):
        with pytest.raises(ConfigError, match=text):
            DNALanguageData(genome, **arguments)
    for arguments, text in (
        ({"val": ["c500:400-501"]}, "val: the range must lie in the 500 bases of c500, got 'c500:400-501'"),
        ({"val": ["c500:40-40"]}, "val: the range must lie in the 500 bases of c500"),
        (
            {"test": ["c9"]},
            r"test: each entry must be a record's name, NAME:BEGIN-END, or a file, got 'c9'; records: c",
        ),
        ({"val": ["c500", "c203", "c11"], "test": 0.0}, "no bases are left for training; hold out less"),
        ({"files": "none.fa"}, "none.fa: no such file"),
    ):
        with pytest.raises(DataError, match=text):
            DNALanguageData(**{"files": genome, **arguments}).setup("fit")
