"""Elements with labels for a language model that generates them: tokens, bins, splits, loss."""

import random

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains.dna.data import DNAElementData
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.dna.task import DNALanguageTask
from vertebra.domains.targets import next_targets
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

TOKENIZER = NucleotideTokenizer()
BOS, SEP, PAD = TOKENIZER.bos_id, TOKENIZER.sep_id, TOKENIZER.pad_id
FIRST_LABEL = TOKENIZER.vocab_size


@pytest.fixture
def table(tmp_path):
    def write(labels, header="label"):
        rng = random.Random(0)
        rows = [f"{''.join(rng.choices('ACGT', k=rng.randint(20, 30)))},{label}" for label in labels]
        (tmp_path / "data.csv").write_text(f"sequence,{header}\n" + "\n".join(rows) + "\n")
        return str(tmp_path / "data.csv")

    return write


def ready(file, **options):
    data = DNAElementData(file=file, **{"split": "random", "label_dropout": 0.0, **options})
    data.setup("fit")
    return data


def test_a_sequence_stands_between_its_label_and_the_end(table):
    data = ready(table(["weak", "strong"] * 20))
    assert data.spec.classes == ("strong", "weak")
    assert (data.spec.task, data.spec.bos, data.spec.eos) == ("lm", True, True)
    items = data.items("train")
    batch = items.fetch(np.arange(8), 0)
    for row, mask, counted, i in zip(batch["ids"], batch["mask"], batch["counted"], range(8), strict=True):
        ids = row[mask].tolist()
        assert ids[0] == BOS
        assert ids[1] == FIRST_LABEL + items.labels[i][0]
        assert ids[-1] == SEP
        assert set(ids[2:-1]) <= set(TOKENIZER.base_ids)
        assert row[~mask].eq(PAD).all()
        assert counted.nonzero()[:, 0].tolist() == list(range(2, len(ids)))
    assert len(items.lengths) == 32
    assert items.lengths[:8].tolist() == batch["mask"].sum(1).tolist()


def test_labels_are_dropped_in_training_alone_anew_every_epoch(table):
    data = ready(table(["a", "b"] * 100), label_dropout=0.4)
    items = data.items("train")

    def bare(items, epoch):
        batch = items.fetch(np.arange(len(items.lengths)), epoch)
        return (batch["ids"][:, 1] < FIRST_LABEL).numpy()

    assert 0.3 < bare(items, 0).mean() < 0.5
    assert (bare(items, 0) != bare(items, 1)).any()
    assert (bare(items, 0) == bare(items, 0)).all()
    assert not bare(data.items("val"), 0).any()


def test_numbers_become_bins_with_as_many_sequences_each(table):
    data = ready(table([i / 7 for i in range(200)]), bins=4)
    assert data.spec.classes == ("label:1", "label:2", "label:3", "label:4")
    assert len(data.spec.bin_edges) == 3
    counts = np.bincount([labels[0] for labels in data.items("train").labels])
    assert counts.max() - counts.min() <= 2


def test_several_labels_are_several_tokens(table):
    data = ready(table(["liver;brain", "brain", "liver", "liver;brain"] * 10))
    assert data.spec.classes == ("brain", "liver")
    assert {len(labels) for labels in data.items("train").labels} == {1, 2}
    longest = data.items("train").lengths.max()
    assert data.spec.max_length >= longest


def test_longer_sequences_are_cut_and_have_no_end(table):
    data = ready(table(["a", "b"] * 20), max_length=12)
    batch = data.items("train").fetch(np.arange(5), 0)
    assert batch["ids"].shape == (5, 12)
    assert SEP not in batch["ids"]


def test_the_loss_asks_for_bases_and_the_end(table):
    data = ready(table(["a", "b"] * 20))
    task = DNALanguageTask("hybrid_test")
    task.build(data.spec)
    batch = data.items("train").fetch(np.arange(6), 0)
    loss, count = task.loss(batch)
    assert int(count) == int(batch["counted"].sum())
    logits = task.model(batch["ids"], batch["mask"])
    assert logits.shape[-1] == TOKENIZER.vocab_size
    targets = next_targets(batch["ids"], batch["counted"])
    chosen = logits.log_softmax(-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    torch.testing.assert_close(loss, -(chosen[targets >= 0]).mean())
    assert SEP in targets
    loss.backward()
    assert task.model.embed.weight.grad[FIRST_LABEL:].abs().sum() > 0


def test_what_is_wrong_is_said(table, tmp_path):
    with pytest.raises(ConfigError, match="bins must be at least 2, got 1"):
        DNAElementData(file="x.csv", bins=1)
    with pytest.raises(ConfigError, match="label_dropout must be from 0 to 1, got 2"):
        DNAElementData(file="x.csv", label_dropout=2)
    data = ready(table(["a", "b"] * 20))
    other = tmp_path / "other.csv"
    other.write_text("sequence,label\nACGTACGT,c\n")
    later = DNAElementData(file=str(other), val_fraction=0, test_fraction=0)
    later.use_spec(data.spec)
    with pytest.raises(DataError, match="every label must be one of a, b, got 'c'; is the file of another task"):
        later.setup("fit")
    with pytest.raises(ConfigError, match="tie needs a model without labels"):
        DNALanguageModel(create_backbone("hybrid_test"), data.spec, tie=True)


def test_recompute_trains_with_the_same_gradients(table):
    data = ready(table(["a", "b"] * 20))
    batch = data.items("train").fetch(np.arange(6), 0)
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        task = DNALanguageTask("hybrid_test", recompute=recompute)
        task.build(data.spec)
        assert all(block.recompute == recompute for block in task.model.backbone.layers)
        task.loss(batch)[0].backward()
        grads.append([p.grad for p in task.model.parameters()])
    torch.testing.assert_close(*grads, atol=1e-6, rtol=1e-4)
