"""Training of the VQ-VAE of meshes: both stages, metrics by hand, checkpoints and model directories."""

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer

from vertebra.backbones.opt import OPTConfig
from vertebra.domains.base import load_task
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.mesh.data import MeshData
from vertebra.domains.mesh.vqvae import Reconstruction
from vertebra.domains.mesh.vqvae_task import CodesInUse, MeshVQVAETask, surface_distance
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import ConfigError, LoadError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode")  # what stage 2 keeps is
BERT = OPTConfig(
    dim=16,
    depth=1,
    heads=2,
    hidden=32,
    causal=False,
    norm_first=False,
    activation="gelu",
    positions="none",
    dropout=0.1,  # which a frozen encoder must not have
)
SHAPE = {"heads": 2, "layers": 1, "latents": 3, "frequencies": 2}
KEPT = ("embed.", "backbone.", "vertex_head.", "quantizer.")


def data(**options):
    return MeshData(
        **{
            "procedural": (6, 2, 2),
            "points": 32,
            "bins": 16,
            "tokenizer": "plain",
            "max_tokens": 600,
            "batch_size": 3,
            **options,
        }
    )


def task(backbone=BERT, **options):
    sizes = {"codebook_size": 24, "code_dim": 6, "levels": 2, "embed_dim": 4, "shape_encoder": SHAPE}
    return MeshVQVAETask(backbone, **{**sizes, **options})


def trainer(folder, **options):
    settings = {"max_epochs": 1, "enable_checkpointing": False, "enable_progress_bar": False, "logger": False}
    settings |= {"accelerator": "cpu", "enable_model_summary": False, **options}
    return Trainer(default_root_dir=folder, **settings)


@pytest.fixture(scope="module")
def stage_1(tmp_path_factory):
    """A model directory of a stage 1 of two steps, and its trainer and task."""
    folder = tmp_path_factory.mktemp("stage_1")
    torch.manual_seed(0)
    fit, made = trainer(folder), task()
    fit.fit(made, data())
    fit.save_checkpoint(folder / "a.ckpt")
    return save_model(made.final_model, folder / "model"), fit, made, folder / "a.ckpt"


# ---------------------------------------------------------------- stages


def test_stage_1_fits_tests_and_is_saved(stage_1, tmp_path):
    folder, fit, made, checkpoint = stage_1
    assert fit.global_step == 2
    logged = ["loss", "reconstruction", "commitment", "accuracy"]
    assert set(fit.callback_metrics) == {
        *(f"train/{name}" for name in logged),
        *(f"val/{name}" for name in [*logged, "exact_faces", "codes"]),
    }
    assert fit.callback_metrics["val/reconstruction"] < 2.8  # ln 16 = 2.77
    (found,) = trainer(tmp_path).test(made, data(), verbose=False)
    assert set(found) == {f"test/{name}" for name in [*logged, "exact_faces", "codes", "chamfer"]}
    assert all(np.isfinite(value) for value in found.values())
    assert 1 <= found["test/codes"] <= 24
    again = load_task(checkpoint)
    assert isinstance(again, MeshVQVAETask)
    for other in (again.model, load_model(folder)):
        assert other.stage == 1
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in made.model.state_dict().items())


def test_stage_2_keeps_encoder_and_codebook(stage_1, tmp_path):
    folder, _, first, checkpoint = stage_1
    meshes = data()
    for source in (folder, checkpoint):
        torch.manual_seed(1)
        made = task(stage=2, noise=0.3, init_from=str(source))
        fit = trainer(tmp_path, max_epochs=2)
        fit.fit(made, meshes)
        assert fit.global_step == 4
        before, after = first.model.state_dict(), made.model.state_dict()
        same = {name for name, value in after.items() if torch.equal(value, before[name])}
        assert same == {name for name in before if name.startswith(KEPT)}
        assert not any(made.model.get_submodule(name[:-1]).training for name in KEPT)
        assert made.model.decoder.training
        assert made.model.shape.training
    assert {"val/noisy_accuracy", "val/noisy_exact_faces"} < set(fit.callback_metrics)
    batch = meshes.items("val").fetch(np.arange(2), 0)
    mask = batch["cells"][..., 0, 0] >= 0
    again = load_model(save_model(made.model, tmp_path / "model"))
    assert again.stage == 2
    ours, theirs = (model.eval()(batch["cells"], mask, batch["points"]) for model in (made.model, again))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    first_ids = first.model.eval().encode_ids(batch["cells"], mask)
    assert torch.equal(first_ids, ours.ids)  # what a generator has learned to write still means the same


@pytest.mark.parametrize("freeze", [False, True])
def test_the_shape_encoder_learns_where_it_may(stage_1, freeze, tmp_path):
    folder, _, first, _ = stage_1
    made = task(stage=2, freeze_shape=freeze, init_from=str(folder))
    trainer(tmp_path, limit_val_batches=0).fit(made, data())
    assert made.model.shape.training is not freeze
    before = first.model.state_dict()
    changed = {name for name, p in made.model.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith("decoder.condition.") for name in changed)
    assert any(name.startswith("shape.") for name in changed) is not freeze


def test_a_stage_2_without_shape_sees_none(stage_1, tmp_path):
    folder = tmp_path / "plain"
    first = task(shape_encoder=None)
    trainer(tmp_path).fit(first, data())
    save_model(first.model, folder)
    made = task(shape_encoder=None, stage=2, noise=0.0, init_from=str(folder))
    fit = trainer(tmp_path)
    fit.fit(made, data())
    assert "val/noisy_accuracy" not in fit.callback_metrics
    # A shape encoder that stage 1 did not have begins fresh.
    seeing = task(stage=2, init_from=str(folder))
    trainer(tmp_path, limit_val_batches=0).fit(seeing, data())
    assert all(name.startswith(("shape.", "decoder.condition.")) for name in seeing.load_report.missing)


def test_a_stage_2_of_other_settings_is_refused(stage_1, tmp_path):
    folder = stage_1[0]
    with pytest.raises(LoadError) as caught:
        trainer(tmp_path).fit(task(stage=2, init_from=str(folder), codebook_size=25), data())
    assert "stage 2 keeps encoder and codebook, but quantizer.codebook is not there or of another shape; give the" in (
        str(caught.value)
    )


# ---------------------------------------------------------------- metrics


def test_metrics_by_hand(monkeypatch):
    made, meshes = task(), data()
    meshes.setup("fit")
    made.build(meshes.spec)
    cells = torch.full((2, 3, 3, 3), 5)
    cells[1, 1:] = -1  # four real faces, 36 coordinates
    found = cells.clone()
    found[0, 0, 0, 0], found[0, 0, 2, 1], found[1, 0, 1, 1] = 6, 7, 4
    ids = torch.full((2, 18), -1)
    ids[0], ids[1, :6] = 3, 8
    losses = [torch.tensor(value) for value in (2.0, 1.5, 5.0)]
    outputs = [Reconstruction(*losses, found, ids), Reconstruction(*(2 * v for v in losses), cells[:1], ids[:1] + 1)]
    monkeypatch.setattr(made.model, "forward", lambda *_: outputs.pop(0))
    metrics = made.metrics_of("val")
    made.evaluate(metrics, {"cells": cells})
    made.evaluate(metrics, {"cells": cells[:1]})  # three more faces, all right
    values = {name: value.item() for name, value in made.summarise(metrics).items()}
    assert values == pytest.approx(
        {
            "loss": (4 * 2 + 3 * 4) / 7,
            "reconstruction": (4 * 1.5 + 3 * 3) / 7,
            "commitment": (4 * 5 + 3 * 10) / 7,
            "accuracy": (33 + 27) / 63,
            "exact_faces": (2 + 3) / 7,
            "codes": 3,  # 3, 8 and 4
        }
    )


def test_noisy_metrics_are_the_same_every_time_and_leave_the_draws_alone(stage_1):
    made, meshes = task(stage=2, noise=5.0, init_from=str(stage_1[0])), data()
    meshes.setup("fit")
    made.build(meshes.spec)
    made.load_initial()
    made.eval()
    batch = meshes.items("val").fetch(np.arange(2), 0)
    values = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        metrics = made.make_metrics(meshes.spec)
        made.evaluate(metrics, batch)
        values.append(made.summarise(metrics))
        torch.testing.assert_close(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(seed)))
    assert values[0] == values[1]
    assert values[0]["noisy_accuracy"] != values[0]["accuracy"]


def test_codes_in_use():
    metric = CodesInUse(6)
    metric.update(torch.tensor([[1, 1, -1], [4, 1, -1]]))
    assert metric.compute() == 2
    metric.update(torch.tensor([5, 4]))
    assert metric.compute() == 3


def test_surfaces_a_step_apart():
    square = np.array([[[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0], [0, 1, 0]]]) * 0.5
    assert surface_distance(square, square + np.array([0, 0, 0.25])) == pytest.approx(0.25, abs=2e-3)
    assert surface_distance(square, square[:, ::-1], seed=1) < 0.01
    assert np.isnan(surface_distance(square[:, [0, 0, 1]], square))
    assert np.isnan(surface_distance(square[:0], square))


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"backbone": "opt_test"},
            "needs a bidirectional backbone; write causal=false behind the name, as in NAME,cau",
        ),
        (
            {"stage": 2},
            "stage=2 keeps encoder and codebook of a stage 1; set init_from to its model directory, and ini",
        ),
        ({"stage": 2, "init_from": "x", "init_parts": "backbone"}, "and init_parts=all."),
        ({"noise": -0.1}, "noise must be at least 0, got -0.1."),
        ({"freeze_shape": True, "shape_encoder": None}, "freeze_shape=true needs a shape_encoder."),
    ],
)
def test_settings_that_cannot_be(options, text):
    with pytest.raises(ConfigError) as caught:
        task(**options)
    assert text in str(caught.value)


def test_other_data_is_refused():
    with pytest.raises(ConfigError, match=r"^MeshVQVAETask needs meshes, but the data is for the domain dna\.$"):
        task().build(DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=9))


@pytest.mark.parametrize(
    ("monitor", "mode"), [("val/loss", "min"), ("val/reconstruction", "min"), ("val/exact_faces", "max")]
)
def test_what_is_best(monitor, mode):
    assert task(monitor=monitor).monitor_mode == mode
