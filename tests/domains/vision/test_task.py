"""Vision tasks: what is logged, mixed, averaged and scheduled."""

import csv

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from timm.data import Mixup

from vertebra.domains.base import load_task
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.vision.data import ImageData
from vertebra.domains.vision.sample import write_sample
from vertebra.domains.vision.task import ImageClassificationTask, ImageGenerationTask
from vertebra.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the average of the weights is
SOFT = "illama_test,causal=false,soft_mask=true"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_sample(folder)
    return folder / "shapes"


def data(shapes, **options):
    return ImageData(root=str(shapes), size=16, limit=20, batch_size=16, **options)


def trainer(folder, **options):
    settings = {"max_epochs": 2, "enable_progress_bar": False, "logger": False, "accelerator": "cpu", **options}
    return Trainer(default_root_dir=folder, enable_model_summary=False, **settings)


def test_fit_logs_all_metrics_and_leaves_a_confusion_matrix(shapes, tmp_path):
    task = ImageClassificationTask("illama_test", patch_size=4, mixup=0.2, cutmix=0.5, label_smoothing=0.1)
    fit, images = trainer(tmp_path), data(shapes)
    fit.fit(task, images)
    (found,) = fit.test(task, images, verbose=False)
    assert set(found) == {f"test/{n}" for n in ("loss", "accuracy", "top5", "f1", "ece")}
    assert 0 <= found["test/accuracy"] <= found["test/top5"] <= 1
    assert task.write_results(tmp_path) == ["confusion.csv"]
    with (tmp_path / "confusion.csv").open() as f:
        header, *rows = csv.reader(f)
    assert header[1:] == list(task.model.spec.classes)
    assert sum(int(v) for row in rows for v in row[1:]) == len(images.items("test").names)


def test_the_soft_mask_follows_optimizer_steps_and_is_restored(shapes, tmp_path, monkeypatch):
    rates = []

    def watch(task, optimizer):
        rates.append(task.model.backbone.layers[0].mixer.soft_mask_rate)

    monkeypatch.setattr(ImageClassificationTask, "on_before_optimizer_step", watch)
    task = ImageClassificationTask(SOFT, patch_size=4, soft_mask="linear", soft_mask_epochs=2, ema=0.9)
    fit, images = trainer(tmp_path, accumulate_grad_batches=2, max_epochs=3), data(shapes)
    fit.fit(task, images)
    cutoff = 2 * len(rates) // 3
    np.testing.assert_allclose(rates[:cutoff], np.linspace(1, 0, cutoff), atol=1e-6)
    assert set(rates[cutoff:]) == {0.0}
    task._set_soft_mask(0.25)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt")
    assert again.model.backbone.layers[1].mixer.soft_mask_rate == 0.25
    assert again.ema.module.backbone.layers[1].mixer.soft_mask_rate == 0.25


def test_a_backbone_without_soft_mask_is_told(caplog):
    with caplog.at_level("WARNING", logger="vertebra"):
        task = ImageClassificationTask("hybrid_test", soft_mask="linear", soft_mask_epochs=3)
    assert task.soft_mask == "none"
    assert "soft_mask=linear has no effect: hybrid_test is not built with soft_mask=true." in caplog.text
    with pytest.raises(
        ConfigError, match="soft_mask must be none, or constant or linear with soft_mask_epochs above 0"
    ):
        ImageClassificationTask(SOFT, soft_mask="constant")


def test_the_average_is_timms_and_is_what_is_evaluated_and_saved(shapes, tmp_path):
    task = ImageClassificationTask("illama_test", patch_size=4, ema=0.5)
    fit, images = trainer(tmp_path, max_epochs=1, limit_train_batches=3), data(shapes)
    fit.fit(task, images)
    weights, averages = task.model.head.weight, task.ema.module.head.weight
    assert not torch.equal(weights, averages)
    assert task.final_model is task.ema.module
    fit.save_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(load_task(tmp_path / "a.ckpt").final_model.head.weight, averages)


@pytest.mark.parametrize("count", [5, 6, 1])
def test_mixed_batches_are_timms_and_the_same_each_time(shapes, count):
    task = ImageClassificationTask("illama_test", patch_size=4, mixup=0.4, cutmix=1.0, label_smoothing=0.1)
    images = data(shapes)
    images.setup("fit")
    task.build(images.spec)
    batch = images.items("train").fetch(np.arange(count), 0)
    first, again = (task._mixed(batch["images"], batch["labels"], batch) for _ in range(2))
    torch.testing.assert_close(first, again, atol=0, rtol=0)
    torch.testing.assert_close(first[1].sum(1), torch.ones(count))
    assert torch.equal(first[0][-1], batch["images"][-1]) or count % 2 == 0
    even = count - count % 2
    if even:
        np.random.seed(np.random.SeedSequence([0, 0, 0]).generate_state(1)[0])
        mix = Mixup(0.4, 1.0, label_smoothing=0.1, num_classes=6)
        expected = mix(batch["images"][:even].clone(), batch["labels"][:even])
        torch.testing.assert_close((first[0][:even], first[1][:even]), expected)


def test_balanced_weights_are_the_inverse_shares_in_the_training_loss_alone(shapes, tmp_path):
    task = ImageClassificationTask("illama_test", patch_size=4, class_weights="balanced")
    images = data(shapes)
    fit = trainer(tmp_path, max_epochs=1)
    fit.fit(task, images)
    counts = torch.tensor([float(images.class_counts[c]) for c in images.spec.classes])
    torch.testing.assert_close(task.weights, counts.sum() / (6 * counts))
    batch = images.items("val").fetch(np.arange(4), 0)
    task.eval()._reset("val")
    task.evaluate(task.metrics_of("val"), batch)
    expected = F.cross_entropy(task.model(batch["images"]), batch["labels"])
    torch.testing.assert_close(task.metrics_of("val")["loss"].compute(), expected)


@pytest.mark.parametrize("name", ["lamb", "lion"])
def test_timms_optimizers_train(name, shapes, tmp_path):
    task = ImageClassificationTask("illama_test", patch_size=4, optimizer=OptimizerConfig(name=name, lr=1e-3))
    fit = trainer(tmp_path, max_epochs=1, limit_train_batches=2)
    fit.fit(task, data(shapes))
    assert type(fit.optimizers[0]).__name__.lower() == name


def test_a_model_of_another_size_gives_initial_weights(shapes, tmp_path):
    from vertebra.domains.saving import save_model

    small = ImageClassificationTask("illama_test", patch_size=4)
    images = data(shapes)
    images.setup("fit")
    small.build(images.spec)
    save_model(small.model, tmp_path / "m")
    large = ImageClassificationTask("illama_test", patch_size=4, init_from=str(tmp_path / "m"))
    other = ImageData(root=str(shapes), size=24, limit=20)
    other.setup("fit")
    large.build(other.spec)
    large.load_initial()
    assert torch.equal(large.model.patch_embed.proj.weight, small.model.patch_embed.proj.weight)
    assert torch.equal(large.model.pos_embed[:, -1], small.model.pos_embed[:, -1])
    assert large.model.pos_embed.shape[1] == 37


def test_timm_models_train_and_load(shapes, tmp_path):
    task = ImageClassificationTask("timm:vit_tiny_patch16_224,patch_size=4,embed_dim=24,depth=2,num_heads=2")
    fit, images = trainer(tmp_path, max_epochs=1, limit_train_batches=2), data(shapes)
    fit.fit(task, images)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt")
    batch = images.items("val").fetch(np.arange(2), 0)
    torch.testing.assert_close(again.model(batch["images"]), task.eval().model(batch["images"]))


def test_other_data_and_classes_are_refused(shapes):
    images = data(shapes, task="generation")
    images.setup("fit")
    with pytest.raises(ConfigError, match="needs images for classification, but the data is for generation"):
        ImageClassificationTask("illama_test").build(images.spec)
    images = data(shapes)
    images.setup("fit")
    with pytest.raises(ConfigError, match="num_classes=7 given, but the data has 6"):
        ImageClassificationTask("illama_test", patch_size=4, num_classes=7).build(images.spec)
    with pytest.raises(ConfigError, match="class_weights has 2 numbers, but the data has 6 classes"):
        ImageClassificationTask("illama_test", patch_size=4, class_weights=[1, 2]).build(images.spec)


@pytest.mark.parametrize(
    ("word", "kind"), [("illama_test", "vision/generate"), ("illama_test,causal=false", "vision/diffusion")]
)
def test_generators_train_and_are_saved(word, kind, shapes, tmp_path):
    task = ImageGenerationTask(word, levels=16, patch_size=4, ema=0.9)
    fit, images = (
        trainer(tmp_path, max_epochs=1, limit_train_batches=2, limit_val_batches=1),
        data(shapes, task="generation"),
    )
    fit.fit(task, images)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt").final_model
    assert again.task == kind
    pictures = again.sample(2, labels=torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0))
    assert (pictures.shape, pictures.dtype) == ((2, 3, 16, 16), torch.uint8)
    (first,), (second,) = (fit.validate(task, images, verbose=False) for _ in range(2))
    assert first == second
    with pytest.raises(ConfigError, match="method=diffusion needs a backbone with causal=false"):
        ImageGenerationTask("illama_test", method="diffusion")
