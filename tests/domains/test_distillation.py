"""Distillation: its losses, what learns in which stage, resuming, and students that are ordinary models."""

import csv
import json
import math
import os
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.base import create_backbone
from vertebra.backbones.seeding import student_config
from vertebra.cli import main
from vertebra.cli.recipes import recipes
from vertebra.domains.base import load_task
from vertebra.domains.distillation import MmMambaTask, MohawkTask, stage_at, stage_borders
from vertebra.domains.dna import sample
from vertebra.domains.dna.data import DNALanguageData
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.lessons import (
    divergence,
    hidden_distances,
    inner_distances,
    matrix_distances,
    soft_loss,
    teach,
)
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import ConfigError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

TOKENS = NucleotideTokenizer().to_dict()
LENGTH = 24
SHAPE = "hybrid_test,depth=3,hidden_dim=32"
TASKS = {"mohawk": MohawkTask, "mmmamba": MmMambaTask}
every_method = pytest.mark.parametrize("method", TASKS)


def teacher_model(backbone="illama_test,depth=3", cls=DNALanguageModel, **facts):
    torch.manual_seed(3)
    spec = DNASpec(**{"tokenizer": TOKENS, "task": "lm", "max_length": LENGTH, "bos": True, **facts})
    model = cls(create_backbone(backbone), spec)
    with torch.no_grad():  # as if trained: attention that looks somewhere, logits that differ
        for name, parameter in model.named_parameters():
            parameter.add_((0.5 if "qkv" in name else 0.2) * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A teacher, and records to learn from: long ones, and short ones that are packed."""
    folder = tmp_path_factory.mktemp("distillation")
    save_model(teacher_model(), folder / "teacher")
    rng = np.random.default_rng(0)
    records = [(f"r{i}", sample.text(sample.background(rng, 1, 150)[0])) for i in range(2)]
    records += [(f"s{i}", sample.text(sample.background(rng, 1, 9)[0])) for i in range(8)]
    sample.write_fasta(folder / "genome.fa", records)
    return folder


@pytest.fixture
def data(folder):
    data = DNALanguageData(str(folder / "genome.fa"), length=LENGTH, batch_size=4, val=0.2, test=0.2)
    data.setup("")
    return data


@pytest.fixture
def batch(data):
    batches = list(data.train_dataloader())
    assert any(len(b["segments"].unique()) > 1 for b in batches if b.get("segments") is not None)
    return batches[0]


def padded(batch):
    """The same batch with padding on the right of one row and on the left of another."""
    mask = batch["mask"].clone()
    mask[0, 15:] = mask[1, :6] = False
    return {**batch, "mask": mask, "counted": batch["counted"] & mask}


def task_of(method, folder, data, pattern="MMA", **options):
    torch.manual_seed(0)
    task = TASKS[method](str(folder / "teacher"), f"{SHAPE},pattern={pattern}", **options)
    task.build(data.spec)
    task.load_initial()
    return task


# ---------------------------------------------------------------- losses


def test_a_student_that_keeps_all_attention_is_at_no_distance(folder, data, batch):
    teacher = load_model(folder / "teacher")
    config = student_config(teacher.backbone.config, f"{SHAPE},pattern=A", "mohawk")
    student = DNALanguageModel(config.build(), teacher.spec).eval()
    student.load_state_dict(teacher.state_dict())
    for given in (batch, padded(batch)):
        lesson = teach(teacher, given)
        for distances in (matrix_distances, hidden_distances, inner_distances):
            assert distances(teacher, student, lesson, range(3)) == [0, 0, 0]
        logits, targets = student.token_logits(given)
        wanted, _ = teacher.token_logits(given)
        torch.testing.assert_close(logits, wanted, atol=0, rtol=0)
        assert divergence(logits[targets >= 0], wanted[targets >= 0]) == 0


def test_a_lesson_is_what_the_layers_read_and_wrote(folder, batch):
    teacher = load_model(folder / "teacher")
    lesson = teach(teacher, batch)
    hidden = []
    ids, segments = batch["ids"].long(), batch.get("segments")
    features = teacher.embed(ids)
    teacher.backbone(features, batch["mask"], segments, hidden=hidden)
    torch.testing.assert_close(lesson.inputs, [features, *hidden[:-1]], atol=0, rtol=0)
    torch.testing.assert_close(lesson.outputs, hidden, atol=0, rtol=0)
    assert not any(block._forward_hooks for block in teacher.backbone.layers)


def test_distances_count_real_positions_alone(folder, data, batch):
    task = task_of("mohawk", folder, data)
    given = padded(batch)
    noisy = {**given, "ids": torch.where(given["mask"], given["ids"], 9)}
    for distances in (matrix_distances, hidden_distances, inner_distances):
        found = [
            torch.stack(distances(task.teacher, task.model, teach(task.teacher, b), [0, 1])) for b in (given, noisy)
        ]
        torch.testing.assert_close(*found)
        assert (found[0] > 0).all()


def test_hidden_distance_is_a_norm_a_token_and_that_of_matrices_a_head(folder, data, batch):
    task = task_of("mohawk", folder, data)
    lesson = teach(task.teacher, batch)
    block, old = task.model.backbone.layers[1], task.teacher.backbone.layers[1]
    x, layout = lesson.inputs[1], lesson.layouts[1]
    gap = (block(x, layout) - lesson.outputs[1])[batch["mask"]]
    (found,) = hidden_distances(task.teacher, task.model, lesson, [1])
    torch.testing.assert_close(found, gap.square().sum(-1).sqrt().mean())
    (found,) = hidden_distances(task.teacher, task.model, lesson, [1], mixers=True)
    gap = (block.mixer(block.norm1(x), layout) - old.mixer(old.norm1(x), layout))[batch["mask"]]
    torch.testing.assert_close(found, gap.square().sum(-1).sqrt().mean())
    gap = block.mixer.mixing_matrix(block.norm1(x), layout) - old.mixer.mixing_matrix(old.norm1(x), layout)
    (found,) = matrix_distances(task.teacher, task.model, lesson, [1])
    torch.testing.assert_close(found, gap.square().sum((-2, -1)).sqrt().mean())


def test_soft_loss_against_its_closed_form():
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    for temperature in (1.0, 2.0):
        p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
        wanted = -(p * q.log()).sum(-1).mean() * temperature**2
        torch.testing.assert_close(soft_loss(student, teacher, temperature), wanted)
        kl = F.kl_div(q.log(), p, reduction="batchmean") * temperature**2
        torch.testing.assert_close(divergence(student, teacher, temperature), kl)
    assert divergence(teacher, teacher) == 0


@pytest.mark.parametrize(("method", "stage"), [("mohawk", 0), ("mohawk", 1), ("mohawk", 2), ("mmmamba", 0)])
def test_the_loss_of_a_stage_falls(folder, data, batch, method, stage):
    """Of random attention, with what learns in that stage."""
    task = task_of(method, folder, data, stages=[1, 1, 1])
    learning = [p for n, p in task.model.named_parameters() if task.learns(stage, n)]
    optimizer = torch.optim.Adam(learning, lr=1e-2)

    def loss():
        if stage == 2:
            student, teacher, _ = task._asked(batch)
            return divergence(student, teacher)
        return task.combine(task.layer_losses(stage, batch))

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.6 * first


# ---------------------------------------------------------------- what learns


def fit(task, data, steps, **options):
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(task, datamodule=data)
    return trainer


INSIDE = {
    ("mohawk", 0): {"in_proj.weight", "conv1d.weight", "conv1d.bias", "D"},
    ("mohawk", 1): {"in_proj.weight", "conv1d.weight", "conv1d.bias", "D", "z_bias", "out_proj.weight"},
    ("mmmamba", 0): {
        "conv1d.weight", "conv1d.bias", "z_proj.weight", "dt_proj.weight", "dt_bias", "A_log", "norm.weight"
    },
}  # fmt: skip
INSIDE["mmmamba", 1] = INSIDE["mmmamba", 2] = INSIDE["mmmamba", 0] | {"in_proj.weight", "in_proj.bias"}
AROUND = {"norm1.weight", "norm2.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight"}


def expected(method, stage, names, frozen):
    if method == "mohawk" and stage == 2:
        return {n for n in names if not (frozen and ".mlp." in n)}
    inside = {f"backbone.layers.{i}.mixer.{n}" for i in (0, 1) for n in INSIDE[method, stage]}
    if method == "mohawk" and stage == 1:
        around = {"norm1.weight"} if frozen else AROUND  # what the mixers add does not depend on the second norm
        inside |= {f"backbone.layers.{i}.{n}" for i in (0, 1) for n in around}
    return inside


@pytest.mark.parametrize(
    ("method", "stage", "frozen"),
    [(m, s, False) for m in TASKS for s in range(3)] + [("mohawk", 1, True), ("mohawk", 2, True)],
)
@pytest.mark.filterwarnings("ignore")  # Lightning's, of a trainer without logger and workers
def test_a_stage_touches_what_it_should(folder, data, method, stage, frozen):
    options = {"freeze_mlps": True} if frozen else {}
    task = TASKS[method](
        str(folder / "teacher"), f"{SHAPE},pattern=MMA",
        stages=[float(s == stage) for s in range(3)],
        optimizer=OptimizerConfig(lr=1e-2, weight_decay=0.0), **options,
    )  # fmt: skip
    start = {}
    original = task.load_initial

    def load_initial():
        original()
        start.update({n: p.clone() for n, p in task.model.named_parameters()})

    task.load_initial = load_initial
    teacher = {n: p.clone() for n, p in task.teacher.named_parameters()}
    fit(task, data, 3)
    changed = {n for n, p in task.model.named_parameters() if not torch.equal(p, start[n])}
    assert changed == expected(method, stage, start, frozen)
    assert all(torch.equal(p, teacher[n]) for n, p in task.teacher.named_parameters())
    assert not any(key.startswith("teacher") for key in task.state_dict())
    if (method, stage) == ("mohawk", 0):  # matrices tell nothing of the gate and of what is mixed
        rows = task.model.backbone.layers[0].mixer.in_proj.weight, start["backbone.layers.0.mixer.in_proj.weight"]
        inner = task.model.backbone.layers[0].mixer.shape.inner_dim
        assert torch.equal(*(r[: 2 * inner] for r in rows))


def test_what_is_shared_is_copied_and_seeds_are_the_teachers(folder, data):
    for method, options in (("mohawk", {}), ("mmmamba", {})):
        task = task_of(method, folder, data, **options)
        own, theirs = task.model.state_dict(), task.teacher.state_dict()
        shared = own.keys() & theirs.keys()
        assert {k for k in own if not k.startswith(("backbone.layers.0.mixer", "backbone.layers.1.mixer"))} <= shared
        assert all(torch.equal(own[k], theirs[k]) for k in shared)
    attention, mixer = task.teacher.backbone.layers[0].mixer, task.model.backbone.layers[0].mixer
    torch.testing.assert_close(mixer.in_proj.weight[-16:], attention.qkv.weight[:16])
    torch.testing.assert_close(mixer.out_proj.weight, attention.proj.weight)
    task = task_of("mohawk", folder, data)
    assert not torch.equal(task.model.backbone.layers[0].mixer.out_proj.weight, attention.proj.weight)


def test_mohawk_may_begin_with_seeds(folder, data):
    torch.manual_seed(0)
    task = MohawkTask(str(folder / "teacher"), f"{SHAPE},pattern=M,state_dim=8,mamba_bias=true", seed_mixers=True)
    task.build(data.spec)
    task.load_initial()
    for old, new in zip(task.teacher.backbone.layers, task.model.backbone.layers, strict=True):
        torch.testing.assert_close(new.mixer.in_proj.weight[48:64], old.mixer.qkv.weight[:16])


# ---------------------------------------------------------------- stages


def test_stages_are_shared_out_over_the_run():
    assert stage_borders([10, 20, 70], 1000) == [0, 100, 300, 1000]
    assert stage_borders([80, 160, 2760], 3000) == [0, 80, 240, 3000]
    assert stage_borders([0, 0.5, 0.5], 7) == [0, 0, 4, 7]
    assert [stage_at([0, 2, 2, 5], s) for s in range(7)] == [0, 0, 2, 2, 2, 2, 2]
    assert [stage_at([0, 0, 3, 5], s) for s in range(6)] == [1, 1, 1, 2, 2, 2]
    assert [stage_at([0, 2, 5, 5], s) for s in range(7)] == [0, 0, 1, 1, 1, 1, 1]


def test_every_stage_has_a_schedule_of_its_own(folder, data):
    optimizer = OptimizerConfig(warmup=2, schedule="linear", min_lr_ratio=0)
    task = task_of("mohawk", folder, data, stages=[5, 4, 6], rates=[2, 1, 0.5], optimizer=optimizer)
    task._borders = stage_borders(task.stages, 15)
    third = [1 / 3, 2 / 3, 1]
    wanted = (
        [2 * r for r in [*third, 2 / 3, 1 / 3]] + [*third, 1 / 2] + [0.5 * r for r in [*third, 3 / 4, 1 / 2, 1 / 4]]
    )
    assert [task.rate(s) for s in range(15)] == pytest.approx(wanted)


@pytest.mark.filterwarnings("ignore")
def test_moments_begin_anew_with_a_stage(folder, data):
    seen = []

    class Watch(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            steps = {int(state["step"]) for state in optimizer.state.values()}
            seen.append((trainer.global_step, steps))

    task = TASKS["mmmamba"](str(folder / "teacher"), f"{SHAPE},pattern=MMA", stages=[2, 2, 2])
    fit(task, data, 6, callbacks=[Watch()])
    assert seen == [(0, set()), (1, {1}), (2, set()), (3, {1}), (4, set()), (5, {1})]


# ---------------------------------------------------------------- the command line


def words_of(folder, method, root, *more, stages="[2,2,3]", steps=7):
    layer = {
        "data": {
            "class_path": "vertebra.domains.dna.data.DNALanguageData",
            "init_args": {
                "files": str(folder / "genome.fa"),
                "length": LENGTH,
                "batch_size": 4,
                "val": 0.2,
                "test": 0.2,
            },
        }
    }
    (folder / "data.json").write_text(json.dumps(layer))
    limits = {"max_steps": steps, "max_epochs": "-1", "accelerator": "cpu", "log_every_n_steps": 1}
    quiet = {"enable_progress_bar": "false", "enable_model_summary": "false"}
    trainer = [w for k, v in {**limits, **quiet}.items() for w in (f"--trainer.{k}", str(v))]
    chosen = ["--model.teacher", str(folder / "teacher"), "--model.student", f"{SHAPE},pattern=MMA,dropout=0.1"]
    place = ["-c", str(folder / "data.json"), *chosen, "--model.stages", stages]
    return ["fit", f"distill/{method}", *place, *trainer, *(["--root", str(root)] if root else []), *more]


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory):
    """Runs of both methods, never interrupted."""
    root = tmp_path_factory.mktemp("finished")
    for method in TASKS:
        assert main(words_of(folder, method, root)) == 0
    return root


def same(found, wanted):
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[k], wanted[k]) for k in wanted)
    return found == wanted


@pytest.mark.slow
@pytest.mark.parametrize(("method", "step"), [("mohawk", 0), ("mohawk", 1), ("mohawk", 3), ("mmmamba", 1)])
def test_an_interrupted_run_ends_with_the_same_weights(finished, folder, tmp_path, monkeypatch, method, step):
    """Interrupted within a stage, and where the next one begins (after the steps 1 and 3)."""
    with monkeypatch.context() as patch:
        original = TASKS[method].training_step

        def training_step(self, batch, batch_idx):
            if self.global_step == step:
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, batch, batch_idx)

        patch.setattr(TASKS[method], "training_step", training_step)
        assert main(words_of(folder, method, tmp_path)) == 130
    run, whole = tmp_path / f"distill/{method}/1", finished / f"distill/{method}/1"
    left = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert left["global_step"] == step + 1
    assert left["stages"] == [0, 2, 4, 7]
    assert main(words_of(folder, method, None, "--ckpt_path", str(run))) == 0
    found, wanted = (torch.load(r / "checkpoints/last.ckpt", weights_only=True) for r in (run, whole))
    for key in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert same(found[key] if isinstance(found[key], dict) else dict(enumerate(found[key])),
                    wanted[key] if isinstance(wanted[key], dict) else dict(enumerate(wanted[key])))  # fmt: skip
    assert (run / "metrics.csv").read_text() == (whole / "metrics.csv").read_text()


def test_a_run_does_not_fall_back_into_an_earlier_stage(finished, folder, tmp_path, capsys):
    run = finished / "distill/mohawk/1"
    words = words_of(folder, "mohawk", tmp_path, "--ckpt_path", str(run / "checkpoints/last.ckpt"), steps=70)
    assert main(words) == 2
    err = " ".join(capsys.readouterr().err.split())
    assert (
        "step 7 was of stage 3, and would be of stage 1; leave trainer.max_steps and model.stages as they were" in err
    )


@every_method
def test_a_run_logs_its_stages_and_leaves_an_ordinary_model(finished, folder, tmp_path, method, capsys):
    run = finished / f"distill/{method}/1"
    rows = list(csv.DictReader((run / "metrics.csv").read_text().splitlines()))
    assert [float(r["train/stage"]) for r in rows] == [1, 1, 2, 2, 3, 3, 3]
    assert [bool(r["stage1/loss"]) for r in rows] == [False, True, *[False] * 5]
    assert [bool(r["stage2/loss"]) for r in rows] == [False, False, False, True, *[False] * 3]
    numbers = json.loads((run / "metrics.json").read_text())
    names = {"loss", "perplexity", "bits_per_token", "kl", "teacher_loss"}
    assert numbers["test"].keys() == {f"test/{n}" for n in names}
    assert numbers["validation"]["val/perplexity"] == pytest.approx(math.exp(numbers["validation"]["val/loss"]), 1e-5)
    model = load_model(run / "model")
    assert type(model) is DNALanguageModel
    assert model.backbone.config.mamba_form == method
    assert (
        f"by {'MOHAWK' if method == 'mohawk' else 'mmMamba'}. Of its layers 2 are"
        in (run / "model/README.md").read_text()
    )
    made = tmp_path / "made.fa"
    use = ["--model", str(run / "model"), "--quiet"]
    assert main(["run", "dna/generate", "-o", str(made), *use, "--count", "3", "--max-bases", "9"]) == 0
    assert main(["run", "dna/embed", str(made), "-o", str(tmp_path / "e.npz"), *use]) == 0
    assert np.load(tmp_path / "e.npz")["embeddings"].shape == (3, 16)
    assert main(["run", "dna/score", str(made), "-o", str(tmp_path / "s.csv"), *use]) == 0
    assert main(["test", "--ckpt_path", str(run), "-o", str(tmp_path / "again.json")]) == 0
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == pytest.approx(numbers["test"], rel=1e-5)


def test_a_checkpoint_builds_its_task_again(finished, folder):
    run = finished / "distill/mohawk/1"
    task = load_task(run / "checkpoints/best.ckpt")
    assert isinstance(task, MohawkTask)
    assert task.stages == [2, 2, 3]
    assert task.hparams["student"]["pattern"] == "MMA"
    model = load_model(run / "model")
    assert same(task.model.state_dict(), model.state_dict())


def test_the_measure_of_a_stage_is_the_validation_of_a_run_that_ends_there(finished, folder, tmp_path):
    assert main(words_of(folder, "mohawk", tmp_path, stages="[2,0,0]", steps=2)) == 0
    numbers = json.loads((tmp_path / "distill/mohawk/1/metrics.json").read_text())["validation"]
    row = list(csv.DictReader((finished / "distill/mohawk/1/metrics.csv").read_text().splitlines()))[1]
    for name in ("loss", "kl", "teacher_loss"):
        assert float(row[f"stage1/{name}"]) == pytest.approx(numbers[f"val/{name}"], rel=1e-5)


def test_a_run_goes_on_from_the_weights_of_another(finished, folder, tmp_path):
    before = finished / "distill/mohawk/1/model"
    more = ["--model.init_from", str(before), "--model.optimizer.lr", "1e-12"]
    assert main(words_of(folder, "mohawk", tmp_path, *more, stages="[0,0,1]", steps=1)) == 0
    found, wanted = load_model(tmp_path / "distill/mohawk/1/model"), load_model(before)
    torch.testing.assert_close(found.state_dict(), wanted.state_dict())


def test_a_trained_student_gives_its_structure_alone_and_that_is_told(folder, data, tmp_path, caplog):
    model = DNALanguageModel(task_of("mohawk", folder, data).backbone_config.build(), data.spec)
    place = str(save_model(model, tmp_path / "student"))

    def begun(**options):
        caplog.clear()
        task = MohawkTask(str(folder / "teacher"), f"local-dir:{place}", **options)
        task.build(data.spec)
        task.load_initial()
        told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        return told, same(task.model.state_dict(), model.state_dict())

    assert begun() == (
        [
            f"student: of local-dir:{place} the structure alone is taken, and none of its weights; a student's weights "
            "to begin with are named by --model.init_from."
        ],
        False,
    )
    assert begun(init_from=place) == ([], True)


# ---------------------------------------------------------------- refusals


def test_students_and_settings_that_cannot_work_are_refused(folder, data):
    teacher = str(folder / "teacher")
    for method, student, options, text in (
        (
            "mohawk",
            "pattern=A",
            {},
            "keeps all layers of the teacher, so nothing is left to learn; put M in its pattern",
        ),
        (
            "mohawk",
            "expand=2",
            {},
            r"must have 2 heads as the teacher's attention, got 4; write expand=1,mamba_head_dim=8",
        ),
        ("mohawk", "pattern=M", {"seed_mixers": True}, "state width 8, as attention has, got .* state width 4"),
        ("mmmamba", "state_dim=4", {}, "state width 8, as attention has, got .* state width 4"),
        (
            "mmmamba",
            "mamba_form=mohawk",
            {},
            "mmMamba's stages need its form of Mamba-2, got 'mohawk'; write mamba_form",
        ),
    ):
        task = TASKS[method](teacher, f"{SHAPE},{student}", **options)
        with pytest.raises(ConfigError, match=text):
            task.build(data.spec)
    MohawkTask(teacher, f"{SHAPE},expand=2", stages=[0, 1, 1]).build(data.spec)  # heads are not compared
    for options, text in (
        ({"stages": [1, 1]}, r"stages must be three lengths, of which one at least is above 0, got \[1, 1\]"),
        ({"stages": [0, 0, 0]}, r"got \[0, 0, 0\]"),
        ({"rates": [1, 0, 1]}, r"rates must be three multiples above 0 of optimizer.lr, got \[1, 0, 1\]"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
    ):
        with pytest.raises(ConfigError, match=text):
            MohawkTask(teacher, SHAPE, **options)


def test_data_of_another_kind_than_the_teachers_is_refused(folder, data):
    task = MohawkTask(str(folder / "teacher"), SHAPE)
    task.build(DNASpec(**{**vars(data.spec), "max_length": 7}))  # other lengths are another matter
    for changes, text in (
        ({"bos": False}, r"got bos: False and True \(data and teacher\)"),
        ({"classes": ("x",)}, r"got classes: \['x'\] and \[\]"),
    ):
        with pytest.raises(ConfigError, match=text):
            MohawkTask(str(folder / "teacher"), SHAPE).build(DNASpec(**{**vars(data.spec), **changes}))


def test_a_teacher_that_is_no_language_model_is_refused(folder, batch, tmp_path):
    facts = {"task": "classification", "classes": ("a", "b"), "bos": False}
    model = teacher_model(cls=DNAClassifier, **facts)
    with pytest.raises(
        ConfigError, match="DNAClassifier gives no logits of tokens one by one, which distillation needs"
    ):
        model.token_logits(batch)


def test_predictions_are_for_the_pipelines(folder, data, batch):
    with pytest.raises(ConfigError, match="MohawkTask does not predict; its run folder holds an ordinary model"):
        task_of("mohawk", folder, data).predict_step(batch, 0)


def test_several_processes_need_to_be_told_that_parts_learn(folder, data):
    task = task_of("mohawk", folder, data)
    trainer = pl.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    task._trainer = trainer
    with pytest.raises(ConfigError, match=r"set --trainer\.strategy ddp_find_unused_parameters_true"):
        task.on_fit_start()


# ---------------------------------------------------------------- recipes


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in recipes() if name.startswith("distill/")])
def test_every_recipe_runs_all_of_its_stages(recipe, tmp_path, monkeypatch, capsys):
    """On sample data, with the bundled teacher."""
    monkeypatch.chdir(tmp_path)
    sample.write_sample(tmp_path / "sample" / "dna")
    limits = {"max_steps": 3, "limit_val_batches": 1, "limit_test_batches": 1, "enable_progress_bar": "false"}
    command = ["fit", recipe, "--data.batch_size", "4", "--model.stages", "[1,1,1]", "--trainer.accelerator", "cpu"]
    command += [word for key, value in limits.items() for word in (f"--trainer.{key}", str(value))]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert all(f"stage {i}, steps {i - 1} to {i}: " in out for i in (1, 2, 3))
    run = tmp_path / "runs" / recipe / "1"
    assert (run / "model" / "model.safetensors").is_file()
    assert json.loads((run / "metrics.json").read_text())["steps"] == 3
