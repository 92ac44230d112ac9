"""Tasks of DNA: metrics against closed forms, checkpoints, initial weights."""

import math

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.base import create_backbone, resolve
from vertebra.domains.base import load_task, read_checkpoint
from vertebra.domains.dna.data import DNALanguageData, DNASequenceData
from vertebra.domains.dna.model import DNALanguageModel
from vertebra.domains.dna.sample import background, text, write_fasta
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.dna.task import DNAClassificationTask, DNALanguageTask, prediction_row, score_metrics
from vertebra.domains.saving import save_model
from vertebra.errors import ConfigError, LoadError
from vertebra.tokenizers.nucleotide import KmerTokenizer, NucleotideTokenizer

TOKENIZER = NucleotideTokenizer()


def spec(**changes):
    facts = {"task": "classification", "classes": ("a", "b"), "max_length": 20}
    return DNASpec(**{"tokenizer": TOKENIZER.to_dict(), **facts, **changes})


def language_spec(**changes):
    return spec(**{"task": "lm", "classes": (), **changes})


def built(task, facts=None):
    task.build(facts or spec())
    return task.eval()


def evaluate(task, batches):
    """Metrics of batches of (ids, labels), or of language batches."""
    for batch in batches:
        task.validation_step(batch, 0)
    return {k: v.item() for k, v in task.summarise(task.metrics_of("val")).items()}


def batches_of(ids, labels, size=8):
    parts = zip(ids.split(size), labels.split(size), strict=True)
    return [{"ids": i, "mask": torch.ones_like(i, dtype=torch.bool), "labels": y} for i, y in parts]


class Fixed(torch.nn.Module):
    """A model whose logits are given: the first id of a row tells which."""

    def __init__(self, logits, facts):
        super().__init__()
        self.logits, self.spec = logits, facts

    def forward(self, ids, mask=None, segments=None):
        return self.logits[ids[:, 0]]


def scores_of(logits, labels, facts):
    task = built(DNAClassificationTask("illama_test"), facts)
    task.model = Fixed(logits, facts)
    ids = torch.arange(len(logits))[:, None].repeat(1, 3)
    return evaluate(task, batches_of(ids, labels))


# ---------------------------------------------------------------- metrics


def test_binary_metrics_equal_the_confusion_matrix():
    tp, fp, fn, tn = 7, 2, 3, 9
    truth = torch.tensor([1] * tp + [0] * fp + [1] * fn + [0] * tn)
    guess = torch.tensor([1] * (tp + fp) + [0] * (fn + tn))
    score = guess * 2.0 - 1 + torch.linspace(-0.5, 0.5, len(guess))
    got = scores_of(torch.stack([-score, score], 1), truth, spec())
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert got["mcc"] == pytest.approx(mcc)
    assert got["accuracy"] == pytest.approx((tp + tn) / len(truth))
    assert got["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    pairs = [(p > n) + (p == n) / 2 for p in score[truth == 1].tolist() for n in score[truth == 0].tolist()]
    assert got["auroc"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)
    ranked = truth[score.argsort(descending=True)]
    precision = ranked.cumsum(0) / torch.arange(1, len(ranked) + 1)
    assert got["auprc"] == pytest.approx(precision[ranked == 1].mean().item(), abs=1e-6)
    assert got["loss"] == pytest.approx(F.cross_entropy(torch.stack([-score, score], 1), truth).item(), abs=1e-6)


def test_multiclass_metrics_equal_the_confusion_matrix():
    table = torch.tensor([[5, 1, 0], [2, 6, 1], [0, 3, 4]])  # rows truth, columns guess
    cells = [(t, g) for t in range(3) for g in range(3) for _ in range(int(table[t, g]))]
    truth, guess = torch.tensor(cells).unbind(1)
    got = scores_of(F.one_hot(guess, 3).float() * 3, truth, spec(classes=("a", "b", "c")))
    rows, columns, n, hits = table.sum(1), table.sum(0), table.sum(), table.diagonal()
    above = hits.sum() * n - (rows * columns).sum()
    below = ((n**2 - (columns**2).sum()) * (n**2 - (rows**2).sum())).sqrt()
    assert got["mcc"] == pytest.approx((above / below).item())
    assert got["accuracy"] == pytest.approx((hits.sum() / n).item())
    assert got["f1"] == pytest.approx((2 * hits / (rows + columns)).mean().item())


def test_multilabel_metrics_are_means_over_labels():
    truth = torch.randint(0, 2, (40, 3)).float()
    logits = torch.randn(40, 3) + truth
    got = scores_of(logits, truth, spec(task="multilabel", classes=("a", "b", "c")))
    each = [score_metrics(spec()) for _ in range(3)]
    for i, metrics in enumerate(each):
        metrics.update(logits[:, i].sigmoid(), truth[:, i].int())
    for name in ("mcc", "f1", "auroc", "auprc", "accuracy"):
        assert got[name] == pytest.approx(sum(m.compute()[name].item() for m in each) / 3, abs=1e-6)


@pytest.mark.parametrize("targets", [1, 2])
def test_regression_metrics_are_in_the_unit_of_the_data(targets):
    mean, std = (10.0, -3.0)[:targets], (4.0, 0.5)[:targets]
    facts = spec(task="regression", classes=(), targets=("x", "y")[:targets], target_mean=mean, target_std=std)
    truth, logits = torch.randn(30, targets) * torch.tensor(std) + torch.tensor(mean), torch.randn(30, targets)
    got = scores_of(logits, truth, facts)
    guess = logits * torch.tensor(std) + torch.tensor(mean)
    assert got["mse"] == pytest.approx((guess - truth).pow(2).mean().item(), rel=1e-4)
    assert got["loss"] == pytest.approx((((guess - truth) / torch.tensor(std)) ** 2).mean().item(), rel=1e-4)
    r = [torch.corrcoef(torch.stack([guess[:, i], truth[:, i]]))[0, 1].item() for i in range(targets)]
    assert got["pearson"] == pytest.approx(sum(r) / targets, abs=1e-4)
    ranks = guess.argsort(0).argsort(0).float(), truth.argsort(0).argsort(0).float()
    r = [torch.corrcoef(torch.stack([ranks[0][:, i], ranks[1][:, i]]))[0, 1].item() for i in range(targets)]
    assert got["spearman"] == pytest.approx(sum(r) / targets, abs=1e-4)
    r2 = 1 - (guess - truth).pow(2).sum(0) / (truth - truth.mean(0)).pow(2).sum(0)
    assert got["r2"] == pytest.approx(r2.mean().item(), abs=1e-4)


def language_batch(ids, **more):
    every = torch.ones_like(ids, dtype=torch.bool)
    return {"ids": ids, "mask": every, "counted": every, "index": torch.arange(len(ids)), "epoch": 0, **more}


@pytest.mark.parametrize("k", [1, 3])
def test_bits_per_base_are_nats_by_ln_2_and_bases(k):
    tokenizer = KmerTokenizer(k, k) if k > 1 else TOKENIZER
    task = built(DNALanguageTask("illama_test"), language_spec(tokenizer=tokenizer.to_dict()))
    ids = torch.randint(7, 11, (4, 15))
    got = evaluate(task, [language_batch(ids[:1, :5]), language_batch(ids[1:])])  # unequal: weighted by targets
    with torch.no_grad():
        nats = [
            F.cross_entropy(task.model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten(), reduction="sum").item()
            for x in (ids[:1, :5], ids[1:])
        ]
    assert got["loss"] == pytest.approx(sum(nats) / (4 + 3 * 14), rel=1e-5)
    assert got["bits_per_base"] == pytest.approx(got["loss"] / math.log(2) / k, rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(got["loss"]), rel=1e-5)


def test_a_uniform_model_needs_log2_of_the_vocabulary():
    task = built(DNALanguageTask("illama_test"), language_spec())
    torch.nn.init.zeros_(task.model.head.weight)
    got = evaluate(task, [language_batch(torch.randint(7, 12, (2, 20)))])
    assert got["bits_per_base"] == pytest.approx(math.log2(12), rel=1e-5)


def test_only_bases_that_count_are_targets():
    task = built(DNALanguageTask("illama_test"), language_spec())
    ids = torch.tensor([[2, 7, 8, 11, 9, 6, 10, 4]])
    counted = torch.tensor([[False, True, True, True, True, True, False, False]])
    _, count = task.loss(language_batch(ids) | {"counted": counted})
    assert count == 3  # 7, 8 and 9


def test_masks_repeat_in_evaluation_and_change_with_the_epoch():
    task = built(DNALanguageTask("illama_test,causal=false", mask_share=0.3), language_spec())
    batch = language_batch(torch.randint(7, 11, (8, 20)))
    first, again, other = (task.loss(batch | {"epoch": e})[0].item() for e in (0, 0, 1))
    assert first == again != other


def test_likelihoods_of_prediction_add_up():
    task = built(DNALanguageTask("illama_test"), language_spec())
    ids = torch.randint(7, 11, (2, 9))
    ids[1, 6:] = TOKENIZER.pad_id
    rows = task.predict_step({"ids": ids, "mask": ids != 4, "index": torch.arange(2), "names": ["x", "y"]}, 0)
    for row, x in zip(rows, (ids[:1], ids[1:, :6]), strict=True):
        total = -F.cross_entropy(task.model(x)[0, :-1], x[0, 1:], reduction="sum").item()
        assert row["log_likelihood"] == pytest.approx(total, rel=1e-4)
        assert row["bits_per_base"] == pytest.approx(-total / (x.shape[1] - 1) / math.log(2), rel=1e-4)
    masked = built(DNALanguageTask("illama_test,causal=false"), language_spec())
    with pytest.raises(ConfigError, match="predict gives likelihoods and needs a causal backbone"):
        masked.predict_step({}, 0)


def test_prediction_rows():
    assert prediction_row(spec(), torch.tensor([0.25, 0.75])) == {"prediction": "b", "score_a": 0.25, "score_b": 0.75}
    labels = prediction_row(spec(task="multilabel"), torch.tensor([0.5, 0.25]))
    assert labels == {"labels": "a", "score_a": 0.5, "score_b": 0.25}
    facts = spec(task="regression", classes=(), targets=("x",), target_mean=(0.0,), target_std=(1.0,))
    assert prediction_row(facts, torch.tensor([1.5])) == {"x": 1.5}


# ---------------------------------------------------------------- training and checkpoints


@pytest.fixture
def data(tmp_path, rng):
    files = {}
    for name, gc in (("positives", 0.7), ("negatives", 0.3)):
        rows = enumerate(background(rng, 24, 20, gc))
        files[name] = str(write_fasta(tmp_path / f"{name}.fa", [(f"{name}_{i}", text(row)) for i, row in rows]))
    return DNASequenceData(**files, batch_size=8)


@pytest.fixture
def rng():
    import numpy as np

    return np.random.default_rng(0)


def fit(task, data, steps=2):
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
    )
    trainer.fit(task, datamodule=data)
    return trainer


@pytest.mark.parametrize("form", ["name", "dict", "config"])
def test_a_checkpoint_loads_whatever_named_the_backbone(form, data, tmp_path):
    name = "hybrid_test,dropout=0.1"
    backbone = {"name": name, "dict": resolve(name).to_dict(), "config": resolve(name)}[form]
    task = DNAClassificationTask(backbone, optimizer={"lr": 0.01}, ngrams=[3], class_weights=[1.0, 2.0])
    fit(task, data).save_checkpoint(tmp_path / "x.ckpt")
    stored = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert stored["hyper_parameters"]["backbone"] == stored["backbone"] == resolve(name).to_dict()
    other = load_task(tmp_path / "x.ckpt")
    assert not other.training
    assert other.backbone_config == resolve(name)
    assert other.optimizer_config.lr == 0.01
    ids = torch.randint(7, 12, (3, 15))
    torch.testing.assert_close(other.model(ids), task.eval().model(ids), atol=0, rtol=0)
    assert other.spec == data.spec


def test_a_language_checkpoint_is_where_a_classifier_begins(data, tmp_path, rng):
    path = str(write_fasta(tmp_path / "genome.fa", [("g", text(background(rng, 1, 2000)[0]))]))
    language = DNALanguageTask("illama_test", tie=True)
    genome = DNALanguageData(path, length=40)
    fit(language, genome).save_checkpoint(tmp_path / "lm.ckpt")
    assert load_task(tmp_path / "lm.ckpt").model.head.weight.shape == (12, 16)
    task = DNAClassificationTask("illama_test", init_from=str(tmp_path / "lm.ckpt"), freeze_backbone=True)
    fit(task, data)
    for key, value in language.model.backbone.state_dict().items():
        assert torch.equal(task.model.backbone.state_dict()[key], value)


def test_files_that_are_no_checkpoints_are_named(tmp_path):
    with pytest.raises(LoadError, match="no such checkpoint file"):
        read_checkpoint(tmp_path / "none.ckpt")
    (tmp_path / "bad.ckpt").write_text("no")
    with pytest.raises(LoadError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "bad.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(LoadError, match="must hold state_dict, spec and class_path"):
        read_checkpoint(tmp_path / "other.ckpt")


def language_folder(path, backbone="illama_test"):
    model = DNALanguageModel(create_backbone(backbone), language_spec())
    save_model(model, path)
    return model


def test_init_from_a_model_directory_loads_backbone_and_embedding(tmp_path):
    model = language_folder(tmp_path / "lm")
    task = built(DNAClassificationTask("illama_test", init_from=str(tmp_path / "lm")))
    assert not torch.equal(task.model.embed.weight, model.embed.weight)
    task.load_initial()
    for part in ("backbone", "embed"):
        mine, theirs = getattr(task.model, part).state_dict(), getattr(model, part).state_dict()
        assert all(torch.equal(mine[k], theirs[k]) for k in theirs)
    assert {k.partition(".")[0] for k in task.load_report.missing} == {"head"}


def test_init_from_another_backbone_is_refused(tmp_path):
    language_folder(tmp_path / "lm", "hybrid_test")
    task = built(DNAClassificationTask("illama_test", init_from=str(tmp_path / "lm")))
    with pytest.raises(LoadError, match=r"another than this model's: family"):
        task.load_initial()


def weights(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize(("unfreeze_at", "moves"), [(None, False), (100, False), (0, True)])
def test_a_frozen_backbone_keeps_its_weights(data, unfreeze_at, moves):
    data.setup("fit")
    task = built(
        DNAClassificationTask("illama_test", freeze_backbone=True, unfreeze_at=unfreeze_at, optimizer={"warmup": 0}),
        data.spec,
    )
    backbone, head = weights(task.model.backbone), weights(task.model.head)
    task.train()
    fit(task, data, steps=3)
    assert any(not torch.equal(head[k], v) for k, v in task.model.head.state_dict().items())
    assert any(not torch.equal(backbone[k], v) for k, v in task.model.backbone.state_dict().items()) == moves


def test_class_weights_weigh_the_loss():
    task = built(DNAClassificationTask("illama_test", class_weights=[1.0, 3.0], label_smoothing=0.1))
    logits, labels = torch.randn(6, 2), torch.tensor([0, 1, 1, 0, 0, 1])
    expected = F.cross_entropy(logits, labels, weight=torch.tensor([1.0, 3.0]), label_smoothing=0.1)
    assert task.loss(logits, labels) == expected


# ---------------------------------------------------------------- choices and errors


def test_pooling_follows_the_backbone():
    assert DNAClassificationTask("illama_test").arguments["pooling"] == "echo"
    assert DNAClassificationTask("illama_test,causal=false").arguments["pooling"] == "mean"
    assert DNAClassificationTask("illama_test", monitor="val/mse").monitor_mode == "min"
    assert DNAClassificationTask("illama_test", monitor="val/mcc").monitor_mode == "max"


def test_arguments_that_contradict_the_data_are_named():
    for arguments, facts, message in (
        (
            {"num_classes": 3},
            spec(),
            r"num_classes=3 given, but the data has 2 \(a, b\); remove the argument or fix the data",
        ),
        (
            {"class_weights": [1.0, 2.0, 3.0]},
            spec(),
            r"class_weights has 3 numbers, but the data has 2 classes \(a, b\); give one weight a class",
        ),
        ({}, language_spec(), "needs data for classification or multilabel or regression, but the data is for lm"),
    ):
        with pytest.raises(ConfigError, match=message):
            DNAClassificationTask("illama_test", **arguments).build(facts)
    with pytest.raises(ConfigError, match="DNALanguageTask needs data for lm, but the data is for classification"):
        DNALanguageTask("illama_test").build(spec())


def test_arguments_that_contradict_each_other_are_named():
    for make, message in (
        (lambda: DNALanguageTask("illama_test", objective="masked"), "objective 'masked' does not go with a backbone"),
        (lambda: DNALanguageTask("illama_test", mask_share=1.0), "mask_share must be between 0 and 1, got 1.0"),
        (lambda: DNAClassificationTask("illama_test", unfreeze_at=1), "unfreeze_at=1 needs freeze_backbone=true"),
        (lambda: DNAClassificationTask("illama_test", init_parts="head"), "init_parts must be 'backbone' or 'all'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
