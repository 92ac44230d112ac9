"""The generation task: losses, metrics, files, checkpoints."""

import csv
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from lightning.pytorch import Trainer

from vertebra.backbones.decoding import Strategy
from vertebra.cli import main
from vertebra.domains.base import load_task
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.mesh import task as tasks
from vertebra.domains.mesh.data import MeshData
from vertebra.domains.mesh.encoder import ShapeEncoderConfig
from vertebra.domains.mesh.generation import GeneratedMesh
from vertebra.domains.mesh.model import END, PAD, SPECIAL
from vertebra.domains.mesh.task import MeshGenerationTask, token_losses
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import canonical, quantize
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # the average of the weights is
ENCODER = {"heads": 2, "layers": 1, "latents": 3, "frequencies": 2}


def data(**options):
    return MeshData(
        **{"procedural": (6, 2, 2), "points": 32, "bins": 16, "max_tokens": 300, "batch_size": 3, **options}
    )


def task(backbone="illama_test", **options):
    return MeshGenerationTask(backbone, **{"encoder": ENCODER, **options})


def trainer(folder, **options):
    settings = {
        "max_epochs": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "logger": False,
        "accelerator": "cpu",
        **options,
    }
    return Trainer(default_root_dir=folder, enable_model_summary=False, **settings)


def built(**options):
    """Make a task in evaluation mode, its data and a batch of two."""
    made, meshes = task(**options), data(face_buckets=(30, 60))
    meshes.setup("")
    made.build(meshes.spec)
    return made.eval(), meshes, meshes.items("test").fetch(np.arange(2), 0)


# ---------------------------------------------------------------- losses


def test_losses_are_of_real_tokens_alone():
    made, _, batch = built()
    losses, mask = token_losses(made.model, batch)
    assert torch.equal(mask, batch["mask"])
    assert not mask.all()
    assert (losses[~mask] == 0).all()
    logits = made.model(*(batch[n] for n in ("points", "ids", "kinds", "mask", "face_buckets")))
    for row, length in enumerate(mask.sum(1).tolist()):
        ids = batch["ids"][row, :length]
        assert ids[-1] == END
        expected = F.cross_entropy(logits[row, :length], ids, reduction="none")
        torch.testing.assert_close(losses[row, :length], expected)
    smooth, _ = token_losses(made.model, batch, 0.1)
    chances = logits.log_softmax(-1)
    expected = 0.9 * losses - 0.1 * chances.mean(-1)
    torch.testing.assert_close(smooth[mask], expected[mask])
    changed = batch | {"ids": torch.where(mask, batch["ids"], PAD + 5), "kinds": torch.where(mask, batch["kinds"], 4)}
    torch.testing.assert_close(token_losses(made.model, changed)[0], losses)


def test_the_training_loss_is_a_token_s():
    made, meshes, _ = built(label_smoothing=0.1)
    batch = meshes.items("train").fetch(np.arange(3), 0)
    losses, mask = token_losses(made.model, batch, 0.1)
    made.log = lambda *_, **__: None
    torch.testing.assert_close(made.training_step(batch, 0), losses[mask].mean())


def test_metrics_are_means_over_all_tokens_and_faces():
    made, meshes, _ = built()
    items = meshes.items("train")
    metrics = made.metrics_of("val")
    parts = [items.fetch(np.array(rows), 0) for rows in ([0, 1, 2], [3])]
    for part in parts:
        made.evaluate(metrics, part)
    found = made.summarise(metrics)
    losses = [token_losses(made.model, part) for part in parts]
    total = sum(loss.sum() for loss, _ in losses)
    torch.testing.assert_close(found["loss"], total / sum(mask.sum() for _, mask in losses))
    torch.testing.assert_close(found["nats_per_face"], total / int(items.pool.face_counts[:4].sum()))
    right = []
    for part in parts:
        logits = made.model(*(part[n] for n in ("points", "ids", "kinds", "mask", "face_buckets")))
        right.append((logits.argmax(-1) == part["ids"])[part["mask"]])
    torch.testing.assert_close(found["accuracy"], torch.cat(right).float().mean())


# ---------------------------------------------------------------- training and testing


def test_fit_test_and_what_is_left(tmp_path):
    made, meshes = task(ema=0.5, decoding=Strategy(method="sample", seed=1)), data(face_buckets=(30, 60))
    fit = trainer(tmp_path)
    fit.fit(made, meshes)
    assert fit.global_step == 2
    assert set(fit.callback_metrics) >= {"train/loss", "val/loss", "val/accuracy", "val/nats_per_face"}
    (found,) = fit.test(made, meshes, verbose=False)
    assert set(found) >= {f"test/{n}" for n in ("loss", "accuracy", "nats_per_face", "valid", "face_ratio")}
    assert all(np.isfinite(value) for value in found.values())
    assert made.write_results(tmp_path) == ["meshes.csv"]
    with (tmp_path / "meshes.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert [row["index"] for row in rows] == ["0", "1"]
    assert [int(row["true_faces"]) for row in rows] == meshes.items("test").pool.face_counts.tolist()
    assert all(0 < int(row["tokens"]) <= 300 for row in rows)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt")
    assert isinstance(again, MeshGenerationTask)
    assert again.decoding == Strategy(method="sample", seed=1)
    assert again.final_model is again.ema.module
    batch = meshes.items("test").fetch(np.arange(2), 0)
    for model in ("model", "final_model"):
        expected, _ = token_losses(getattr(made.eval(), model), batch)
        torch.testing.assert_close(token_losses(getattr(again, model), batch)[0], expected, atol=0, rtol=0)
    assert not torch.equal(made.model.head.weight, made.final_model.head.weight)
    folder = save_model(made.final_model, tmp_path / "model", metrics=found)
    torch.testing.assert_close(token_losses(load_model(folder), batch)[0], token_losses(made.final_model, batch)[0])


@pytest.mark.parametrize("encoder", [None, ENCODER, ShapeEncoderConfig(width=8, heads=2, layers=0)])
def test_settings_of_the_encoder_are_kept(encoder, tmp_path):
    made, meshes = task("illama_test,dim=24,num_heads=3", encoder=encoder), data()
    fit = trainer(tmp_path, max_steps=1, limit_val_batches=0)
    fit.fit(made, meshes)
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt")
    expected = (
        encoder if isinstance(encoder, ShapeEncoderConfig) else ShapeEncoderConfig(**{"width": 24, **(encoder or {})})
    )
    assert made.model.encoder.config == again.model.encoder.config == expected
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]["encoder"]
    assert kept == (asdict(encoder) if isinstance(encoder, ShapeEncoderConfig) else encoder)


def test_a_recipe_without_a_width_has_none(capsys):
    """A width filled in while a file is parsed would not be the backbone's."""
    assert main(["config", "mesh/furniture", "--model.encoder.layers", "3"]) == 0
    encoder = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["encoder"]
    assert encoder["layers"] == 3
    assert "width" not in encoder


def test_a_frozen_encoder_keeps_its_weights(tmp_path):
    meshes = data()
    for freeze in (True, False):
        made = task(freeze_encoder=freeze)
        meshes.setup("fit")
        made.build(meshes.spec)
        before = {name: p.clone() for name, p in made.model.named_parameters()}
        trainer(tmp_path, limit_val_batches=0).fit(made, meshes)
        same = {name for name, p in made.model.named_parameters() if torch.equal(p, before[name])}
        encoder = {name for name in before if name.startswith("encoder.")}
        assert same >= encoder if freeze else not same & encoder
        assert not {"cond_proj.weight", "head.weight", "cond_head_proj.weight"} & same


def mesh_of(corners):
    cells = quantize(np.asarray(corners), 16)
    return canonical(cells.reshape(-1, 3), np.arange(3 * len(cells)).reshape(-1, 3))


EMPTY = canonical(np.zeros((0, 3), int), np.zeros((0, 3), int))


def test_meshes_are_judged(monkeypatch, tmp_path):
    """The truth, one not ended, one with a face twice, one whose face has no area, nothing, a face of a few cells."""
    made, meshes = task(), data(procedural=(1, 1, 6), bins=128)
    meshes.setup("")
    made.build(meshes.spec)
    items = meshes.items("test")
    truths = [made.model.tokenizer.decode(items.item(i, 0).ids[1:-1] - SPECIAL) for i in range(6)]
    counts = [len(mesh.faces) for mesh in truths]
    outputs = [
        GeneratedMesh(truths[0], 50, -1.0, True, counts[0]),
        GeneratedMesh(truths[1], 50, -1.0, False, counts[1]),
        GeneratedMesh(truths[2], 50, -1.0, True, counts[2] + 1),
        GeneratedMesh(EMPTY, 9, -1.0, True, 1),
        GeneratedMesh(EMPTY, 0, -1.0, False, 0),
        GeneratedMesh(canonical(np.eye(3, dtype=int), [[0, 1, 2]]), 9, -1.0, True, 1),
    ]
    seen = []

    def generate(model, points, strategy, *, max_tokens, numbers):
        longest = max(len(items.item(i, 0).ids) for i in numbers)
        assert max_tokens == min(meshes.spec.max_tokens, 2 * longest)
        seen.append((strategy, numbers))
        return [outputs[i] for i in numbers]

    monkeypatch.setattr(tasks, "generate_meshes", generate)
    test = trainer(tmp_path)
    (found,) = test.test(made, meshes, verbose=False)
    assert [numbers for _, numbers in seen] == [[0, 1, 2], [3, 4, 5]]
    assert {strategy for strategy, _ in seen} == {Strategy(method="greedy")}
    assert found["test/valid"] == pytest.approx(2 / 6)
    rows = made._meshes
    assert [row["valid"] for row in rows] == [1, 0, 0, 0, 0, 1]
    assert [row["finished"] for row in rows] == [1, 0, 1, 1, 0, 1]
    assert [row["faces"] for row in rows] == [*counts[:3], 0, 0, 1]
    assert ["chamfer" in row for row in rows] == [True, True, True, False, False, True]
    for row in rows[:3]:
        assert row["chamfer"] < 0.03
        assert row["normal_consistency"] > 0.8
    assert found["test/chamfer"] == pytest.approx(np.median([row["chamfer"] for row in [*rows[:3], rows[5]]]))
    true = [row["true_faces"] for row in rows]
    shares = [n / t for n, t in zip([*counts[:3], 0, 0, 1], true, strict=True)]
    assert found["test/face_ratio"] == pytest.approx(np.median(shares))
    assert made.write_results(tmp_path) == ["meshes.csv"]


def test_without_a_finite_value_there_is_no_median(monkeypatch, tmp_path):
    made, meshes = task(), data()
    nothing = GeneratedMesh(EMPTY, 0, -1.0, False, 0)
    monkeypatch.setattr(tasks, "generate_meshes", lambda *_, numbers, **__: [nothing for _ in numbers])
    meshes.setup("")
    made.build(meshes.spec)
    (found,) = trainer(tmp_path).test(made, meshes, verbose=False)
    assert found["test/valid"] == found["test/face_ratio"] == 0
    assert "test/chamfer" not in found
    good = GeneratedMesh(
        mesh_of([[[-0.5, 0, 0], [0, 0.5, 0], [0.5, -0.4, 0]]]), 9, -1.0, True, 1
    )  # without sharp edges
    monkeypatch.setattr(tasks, "generate_meshes", lambda *_, numbers, **__: [good for _ in numbers])
    (found,) = trainer(tmp_path).test(made, meshes, verbose=False)
    assert "test/edge_chamfer" not in found
    assert all(np.isfinite(value) for value in found.values())


def test_nothing_is_written_without_a_test(tmp_path):
    assert task().write_results(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- settings


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ConfigError, match=r"^label_smoothing must be from 0 and below 1, got 1\.0\.$"):
        task(label_smoothing=1.0)
    with pytest.raises(ConfigError, match=r"^MeshGenerationTask: ema must be from 0 \(none\) and below 1, got 1\.5\.$"):
        task(ema=1.5)
    with pytest.raises(ConfigError, match=r"^MeshGenerationTask needs meshes, but the data is for the domain dna\.$"):
        task().build(DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=9))
    meshes = data()
    meshes.setup("fit")
    with pytest.raises(ConfigError, match=r"needs a causal backbone; set causal=true\.$"):
        task("illama_test,causal=false").build(meshes.spec)
    with pytest.raises(ConfigError, match=r"^encoder has no setting 'depth'; settings: bottleneck"):
        task(encoder={"depth": 1}).build(meshes.spec)
