"""What learns: low-rank adapters of every family, gradual unfreezing, and that both resume exactly."""

import copy
import logging
import re
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import presets
from vertebra.domains.base import load_task
from vertebra.domains.dna.data import DNASequenceData
from vertebra.domains.dna.model import DNAClassifier
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.dna.task import DNAClassificationTask
from vertebra.domains.finetuning import (
    TuneConfig,
    add_adapters,
    drop_gradients,
    find_targets,
    idle_adapters,
    merge_tensors,
    merged,
    set_modes,
    without_adapters,
)
from vertebra.domains.initial import read_source
from vertebra.domains.optim import OptimizerConfig, parameter_table
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.vision.data import ImageData
from vertebra.domains.vision.sample import write_sample
from vertebra.domains.vision.task import ImageClassificationTask
from vertebra.errors import ConfigError, MissingExtraError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
FORMS = [(name, causal) for name in TEST_PRESETS for causal in (True, False)]
LORA = TuneConfig(lora_rank=2, lora_alpha=4)
QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="the extra 'lora' is not installed")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes")
    write_sample(folder)
    return folder / "shapes"


def trained(backbone, seed=1):
    """Give the adapters values: fresh ones change nothing."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if ".lora_B" in name:
                parameter.normal_(std=0.3)
    return backbone


# ---------------------------------------------------------------- adapters, of every family


@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_adapters_learn_and_change_the_output_wherever_they_are(name, causal, peft):
    backbone = create_backbone(name, causal=causal)
    x = torch.randn(2, 33, backbone.config.dim)
    before = backbone(x)
    targets = add_adapters(backbone, LORA)
    assert targets == [n for n, m in create_backbone(name, causal=causal).named_modules() if isinstance(m, nn.Linear)]
    torch.testing.assert_close(backbone(x), before, atol=0, rtol=0)
    trained(backbone)(x).pow(2).sum().backward()
    assert idle_adapters(backbone) == []
    for key, parameter in backbone.named_parameters():
        assert parameter.requires_grad == (".lora_" in key), key
        assert (parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)) == (".lora_" in key), key
    for target in targets:  # one by one: an output that ignores one of them would hide among the others
        module = backbone.get_submodule(target)
        with torch.no_grad():
            whole = backbone(x)
            module.scaling["default"] *= 2
            assert not torch.allclose(backbone(x), whole, atol=1e-6), target
            module.scaling["default"] /= 2


@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_the_merged_model_says_the_same_and_has_ordinary_names(name, causal, peft):
    backbone = create_backbone(name, causal=causal)
    names = list(backbone.state_dict())
    add_adapters(backbone, LORA)
    trained(backbone).eval()
    x = torch.randn(2, 33, backbone.config.dim)
    plain = merged(backbone)
    assert list(plain.state_dict()) == names
    assert all(parameter.requires_grad for parameter in plain.parameters())
    with torch.no_grad():
        torch.testing.assert_close(plain(x), backbone(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(plain.read_last(x), backbone.read_last(x), atol=1e-5, rtol=1e-5)
        if causal:
            states = [b.init_state(2, 33) for b in (plain, backbone)]
            for part in x.split([20, 1, 1, 11], dim=1):
                one, two = (b.step(part, state) for b, state in zip((plain, backbone), states, strict=True))
                torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    by_hand = merge_tensors(backbone.state_dict(), LORA)
    assert by_hand.keys() == plain.state_dict().keys()
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(by_hand[key], value, atol=1e-6, rtol=1e-6)


def test_a_model_without_adapters_is_its_own_merged_one():
    backbone = create_backbone("illama_test")
    assert merged(backbone) is backbone


def test_adapters_are_set_aside_and_come_back(peft):
    backbone = create_backbone("illama_test")
    names = list(backbone.state_dict())
    add_adapters(backbone, LORA)
    adapted = list(backbone.state_dict())

    def fail():
        with without_adapters(backbone):
            assert list(backbone.state_dict()) == names
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert list(backbone.state_dict()) == adapted


def test_targets_are_names_or_patterns():
    backbone = create_backbone("hybrid_test")
    assert find_targets(backbone, ("qkv",)) == ["layers.1.mixer.qkv"]
    assert find_targets(backbone, ("layers.0.mlp.*", "qkv")) == [
        "layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.0.mlp.down_proj", "layers.1.mixer.qkv",
    ]  # fmt: skip
    with pytest.raises(
        ConfigError,
        match=r"tune.lora_targets: 'q_proj' is no projection of Hybrid; there are in_proj, out_proj, gate_proj, "
        r"up_proj, down_proj, qkv, proj, or patterns of whole names such as 'layers.0.mixer.in_proj'",
    ):
        find_targets(backbone, ("q_proj",))


def test_a_missing_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"tune.lora_rank=2 needs the package 'peft'.*vertebra\[lora\]"):
        add_adapters(create_backbone("illama_test"), LORA)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"train": "some"}, "tune.train must be all, head or gradual, got 'some'"),
        ({"every": 0}, "tune.every must be above 0, got 0"),
        ({"lora_rank": -1}, "lora_rank must be at least 0, lora_alpha at least 1 and lora_dropout .*got -1, 16 and 0"),
        ({"lora_rank": 2, "train": "head"}, "tune.train=head and tune.lora_rank=2 do not go together"),
        ({"lora_targets": ["qkv"]}, "tune.lora_targets needs adapters; set tune.lora_rank, such as 8"),
    ],
)
def test_impossible_settings_are_refused(options, text):
    with pytest.raises(ConfigError, match=text):
        TuneConfig(**options)


# ---------------------------------------------------------------- layers that learn


def test_open_layers_are_counted_from_the_last_by_epochs_or_steps():
    by_epochs, by_steps = TuneConfig(train="gradual", every=2), TuneConfig(train="gradual", every=0.1)
    assert [by_epochs.open_layers(3, epoch, 99, 100) for epoch in range(9)] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [by_steps.open_layers(3, 0, step, 50) for step in (0, 4, 5, 9, 10, 15, 50)] == [0, 0, 1, 1, 2, 3, 3]
    assert TuneConfig().open_layers(3, 0, 0, 1) == 3
    assert TuneConfig(train="head").open_layers(3, 9, 9, 1) == 0
    with pytest.raises(ConfigError, match=r"tune.every=0.1 is a share of the run, which has no end; set trainer"):
        by_steps.open_layers(3, 0, 0, float("inf"))


@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_closed_layers_have_no_gradient_and_no_dropout(name, causal):
    backbone = create_backbone(name, causal=causal)
    layers = backbone.num_layers
    for count in range(layers + 1):
        backbone(torch.randn(2, 33, backbone.config.dim)).pow(2).sum().backward()
        drop_gradients(backbone, count)
        set_modes(backbone, count)
        for key, parameter in backbone.named_parameters():
            learns = count > 0 and backbone.layer_of(key) >= layers - count
            assert (parameter.grad is not None) == learns, (count, key)
            if "." in key:  # not what is the whole backbone's own, such as first latents
                assert backbone.get_submodule(key.rpartition(".")[0]).training == learns, (count, key)
    assert all(module.training for module in backbone.modules())
    set_modes(backbone, 0)
    assert not any(module.training for module in backbone.modules())


# ---------------------------------------------------------------- training


def write_table(path, count, seed):
    rng = np.random.default_rng(seed)
    rows = [f"s{i},{''.join(rng.choice(list('ACGT'), int(rng.integers(12, 40))))},{i % 2}" for i in range(count)]
    path.write_text("name,sequence,label\n" + "\n".join(rows) + "\n")
    return str(path)


def data(folder):
    return DNASequenceData(
        file=write_table(folder / "train.csv", 32, 0), val_file=write_table(folder / "val.csv", 9, 1), batch_size=8
    )


def task(backbone="illama_test,dropout=0.2", **options):
    return DNAClassificationTask(backbone, optimizer=OptimizerConfig(warmup=0.0, lr=1e-2), **options)


def start(folder, backbone="illama_test"):
    """Initial weights: tuning the head alone, or layer after layer, is refused without."""
    spec = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="classification", max_length=39, classes=("0", "1"))
    return str(save_model(DNAClassifier(create_backbone(backbone), spec), folder / "start"))


def told(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "vertebra"]


class Stop(pl.Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


class Losses(pl.Callback):
    def __init__(self):
        self.seen, self.random = [], {}

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append(round(outputs["loss"].item(), 6))
        self.random[trainer.global_step] = torch.get_rng_state()


class SameRandom(pl.Callback):
    """Go on with the random numbers of the run that stopped, as the command line does."""

    def __init__(self, state):
        self.state = state

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if self.state is not None:
            torch.set_rng_state(self.state)
            self.state = None


TUNES = {
    "lora": {"tune": TuneConfig(lora_rank=2, lora_dropout=0.1)},
    "gradual": {"tune": TuneConfig(train="gradual", every=1)},
    "share": {"tune": TuneConfig(train="gradual", every=0.15)},
    "head": {"tune": TuneConfig(train="head")},
    "frozen": {"freeze_backbone": True, "unfreeze_at": 1},
}


@pytest.mark.parametrize(  # within an epoch of four steps; layers join in after 4, or after 2 (of 12) each
    ("kind", "step"), [("lora", 6), ("gradual", 6), ("share", 2), ("share", 3), ("head", 2), ("frozen", 6)]
)
def test_a_run_resumed_inside_an_epoch_goes_on_exactly(kind, step, tmp_path, request):
    if kind == "lora":
        request.getfixturevalue("peft")
    path = tmp_path / "stop.ckpt"
    torch.manual_seed(0)
    options = {**TUNES[kind], "init_from": start(tmp_path)}
    whole, first = Losses(), task(**options)
    pl.Trainer(max_epochs=3, callbacks=[whole, Stop(step, path)], **QUIET).fit(first, datamodule=data(tmp_path))
    rest, again = Losses(), task(**options)
    trainer = pl.Trainer(max_epochs=3, callbacks=[SameRandom(whole.random[step]), rest], **QUIET)
    trainer.fit(again, datamodule=data(tmp_path), ckpt_path=path, weights_only=True)
    assert len(whole.seen) == 12
    assert rest.seen == whole.seen[step:]
    for a, b in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_adapters_are_what_a_training_changes_in_the_backbone(tmp_path, peft):
    recordings = data(tmp_path)
    model = task("hybrid_test", tune=TuneConfig(lora_rank=2, lora_targets=("qkv", "in_proj")))
    recordings.setup("fit")
    model.build(recordings.spec)
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    trainer = pl.Trainer(max_epochs=2, **QUIET)
    trainer.fit(model, datamodule=recordings)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    moved = {name for name, value in model.model.state_dict().items() if not torch.equal(value, before[name])}
    learn = {n for n in before if not n.startswith("backbone.") or ".lora_" in n}
    assert moved == learn - {n for n in learn if "rotary" in n}
    assert sum(".lora_" in name for name in moved) == 2 * 3

    batch = recordings.items("val").fetch(np.arange(9), 0)
    model.eval()
    folder = save_model(model.plain_model, tmp_path / "model")
    again = load_task(tmp_path / "a.ckpt")
    with torch.no_grad():
        expected = model.model(batch["ids"], batch["mask"])
        assert torch.equal(again.model(batch["ids"], batch["mask"]), expected)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(sys.modules, "peft", None)
            loaded = load_model(folder)
        torch.testing.assert_close(loaded(batch["ids"], batch["mask"]), expected, atol=1e-5, rtol=1e-5)
    assert sorted(loaded.state_dict()) == sorted(DNAClassificationTask("hybrid_test").build_model(
        create_backbone("hybrid_test"), recordings.spec).state_dict())  # fmt: skip

    # The checkpoint gives initial weights to a task with adapters, and to one without.
    tensors, origin = read_source(str(tmp_path / "a.ckpt"))
    assert origin.spec == recordings.spec
    for name, value in loaded.state_dict().items():
        torch.testing.assert_close(tensors[name], value, atol=1e-6, rtol=1e-6)
    other = task("hybrid_test", tune=LORA, init_from=str(tmp_path / "a.ckpt"), init_parts="all")
    other.build(recordings.spec)
    other.load_initial()
    assert len(other.load_report.matched) == len(loaded.state_dict())
    assert other.load_report.missing == []
    with torch.no_grad():
        torch.testing.assert_close(other.eval().model(batch["ids"], batch["mask"]), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:.*in eval mode")
def test_the_average_of_a_model_with_adapters_is_merged_too(shapes, tmp_path, peft):
    images = ImageData(root=str(shapes), size=16, limit=24, batch_size=8)
    model = ImageClassificationTask("illama_test,causal=false", patch_size=4, ema=0.5, tune=LORA)
    pl.Trainer(max_epochs=2, **QUIET).fit(model, datamodule=images)
    assert model.final_model is model.ema.module
    adapter = "backbone.layers.0.mixer.qkv.lora_B.default.weight"
    averaged, last = model.final_model.state_dict()[adapter], model.model.state_dict()[adapter]
    assert averaged.abs().sum() > 0
    assert not torch.equal(averaged, last)
    plain = load_model(save_model(model.plain_model, tmp_path / "m"))
    pictures = images.items("val").fetch(np.arange(2), 0)["images"]
    with torch.no_grad():
        torch.testing.assert_close(plain(pictures), model.final_model.eval()(pictures), atol=1e-5, rtol=1e-5)


def test_a_model_of_timm_has_adapters(shapes, peft, caplog):
    images = ImageData(root=str(shapes), size=16, limit=24, batch_size=8)
    name = "timm:vit_tiny_patch16_224,patch_size=4,embed_dim=24,depth=2,num_heads=2"
    model = ImageClassificationTask(name, tune=TuneConfig(lora_rank=2, lora_targets=("qkv", "fc1")))
    pl.Trainer(max_epochs=1, **QUIET).fit(model, datamodule=images)
    assert told(caplog) == []
    adapters = {n: p for n, p in model.model.backbone.named_parameters() if ".lora_B" in n}
    assert len(adapters) == 4
    assert all(p.abs().sum() > 0 for p in adapters.values())
    assert model.plain_model.state_dict().keys() == model.build_model(
        model.backbone_config.build(), images.spec).state_dict().keys()  # fmt: skip


def test_adapters_that_are_not_called_are_told(tmp_path, peft, caplog):
    class Reads(nn.Module):
        """A projection whose weights are read, as some models of timm do."""

        def __init__(self, linear):
            super().__init__()
            self.inner = linear

        def forward(self, x):
            return nn.functional.linear(x, self.inner.weight, self.inner.bias)

    class Task(DNAClassificationTask):
        def build_model(self, backbone, spec):
            backbone.layers[0].mlp.fc1 = Reads(backbone.layers[0].mlp.fc1)
            return super().build_model(backbone, spec)

    model = Task("opt_test", tune=LORA)
    with caplog.at_level(logging.WARNING, logger="vertebra"):
        pl.Trainer(max_epochs=1, **QUIET).fit(model, datamodule=data(tmp_path))
    assert told(caplog) == [
        "the adapters of layers.0.mlp.fc1.inner get no gradient: the model does not call these projections; name "
        "others with tune.lora_targets."
    ]


def test_layers_join_in_one_after_the_other_and_that_is_told(tmp_path, caplog):
    class Moved(pl.Callback):
        def __init__(self):
            self.layers = []

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.before = copy.deepcopy(module.model.backbone.state_dict())

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            backbone = module.model.backbone
            now = backbone.state_dict()
            moved = {backbone.layer_of(n) for n, old in self.before.items() if not torch.equal(old, now[n])}
            self.layers.append(sorted(moved))

    moved, model = (
        Moved(),
        task(
            "illama_test,depth=2",
            tune=TuneConfig(train="gradual", every=1),
            init_from=start(tmp_path, "illama_test,depth=2"),
        ),
    )
    with caplog.at_level(logging.INFO, logger="vertebra"):
        pl.Trainer(max_epochs=4, limit_train_batches=2, callbacks=[moved], **QUIET).fit(
            model, datamodule=data(tmp_path)
        )
    assert moved.layers == [[], [], [1, 2], [1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert told(caplog)[1:] == [  # behind what was loaded
        f"epoch {epoch}, step {2 * epoch}: {count} of 2 layers of the backbone learn"
        for epoch, count in enumerate([0, 1, 2])
    ]


@pytest.mark.parametrize(
    ("every", "layers", "epochs", "steps", "words"),
    [
        (1, 6, 3, 30, "every=1 opens 2 of 6 layers in 3 epochs, .* set tune.every=0.142 .*, or train 7 epochs\\.$"),
        (2.5, 2, 1, 10, "every=2.5 opens 0 of 2 layers in 1 epoch, .* set tune.every=0.333 .*, or train 6 epochs\\.$"),
        (
            0.25,
            6,
            3,
            40,
            r"every=0.25 opens 3 of 6 layers in 3 epochs, .* set tune.every=0.142 \(a share of the run\)\.$",
        ),
        (1, 2, 3, 30, ""),
        (0.142, 6, 1, 1000, ""),  # what is recommended is enough
        (0.333, 2, 1, 3, ""),
        (1, 6, 3, float("inf"), ""),
    ],
)
def test_layers_that_never_join_in_are_counted(every, layers, epochs, steps, words):
    said = TuneConfig(train="gradual", every=every).never_open(layers, epochs, steps)
    assert re.search(words, said) if words else said == ""
    for train in ("all", "head"):
        assert TuneConfig(train=train, every=every).never_open(layers, epochs, steps) == ""


def test_layers_that_never_join_in_are_told_when_a_training_begins(tmp_path, caplog):
    model = task(tune=TuneConfig(train="gradual", every=1), init_from=start(tmp_path))
    pl.Trainer(max_epochs=1, limit_train_batches=2, **QUIET).fit(model, datamodule=data(tmp_path))
    layers = model.model.backbone.num_layers
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warned == [
        f"tune.train=gradual with tune.every=1 opens 0 of {layers} layers in 1 epoch, and the others keep their "
        f"weights; to open all, set tune.every={1000 // (layers + 1) / 1000:g} (a share of the run), or train "
        f"{layers + 1} epochs."
    ]


@pytest.mark.parametrize("train", ["head", "gradual"])
def test_a_backbone_of_random_weights_is_not_kept(train, tmp_path):
    model = task(tune=TuneConfig(train=train))
    with pytest.raises(ConfigError) as e:
        pl.Trainer(max_epochs=1, **QUIET).fit(model, datamodule=data(tmp_path))
    assert str(e.value) == (
        f"tune.train={train} keeps the backbone's weights, which are random here; name a trained model with "
        "--init_from MODEL, or leave tune.train out."
    )


def test_one_target_needs_no_list():
    assert TuneConfig(lora_rank=2, lora_targets="qkv") == TuneConfig(lora_rank=2, lora_targets=["qkv"])
    assert TuneConfig(lora_rank=2, lora_targets="qkv").targets == ("qkv",)


def test_settings_that_contradict_each_other_are_refused():
    for tune in (LORA, {"train": "gradual"}):
        with pytest.raises(
            ConfigError, match=r"freeze_backbone=true and tune.train or tune.lora_rank do not go togeth"
        ):
            DNAClassificationTask("illama_test", freeze_backbone=True, tune=tune)


def test_rates_and_decay_of_adapters_are_those_of_their_layer(tmp_path, peft):
    recordings = data(tmp_path)
    recordings.setup("fit")
    model = task("illama_test", tune=LORA)
    model.build(recordings.spec)
    table = parameter_table(model.model, OptimizerConfig(lr=1.0, layer_decay=0.5, weight_decay=0.1))
    layers = model.model.backbone.num_layers
    for side in "AB":
        for layer in range(layers):
            name = f"backbone.layers.{layer}.mixer.qkv.lora_{side}.default.weight"
            assert table[name] == (pytest.approx(0.5 ** (layers - layer)), 0.1)


def test_an_earlier_checkpoint_loads(tmp_path):
    model = task()
    trainer = pl.Trainer(max_steps=1, **QUIET)
    trainer.fit(model, datamodule=data(tmp_path))
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    tune = {"train": "all", "every": 1.0, "lora_rank": 0, "lora_alpha": 16, "lora_dropout": 0.0, "lora_targets": []}
    assert checkpoint["hyper_parameters"].pop("tune") == tune
    torch.save(checkpoint, tmp_path / "old.ckpt")
    assert load_task(tmp_path / "old.ckpt").tune == TuneConfig()
    assert read_source(str(tmp_path / "old.ckpt"))[0].keys() == model.model.state_dict().keys()
