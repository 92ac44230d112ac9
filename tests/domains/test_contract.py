"""What every domain's models must do with every backbone; a new preset named *_test is covered by being registered."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import bundled_models, presets
from vertebra.cli import main
from vertebra.cli.recipes import recipes
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import class_path, load_model, model_config, save_model
from vertebra.errors import ConfigError, LoadError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

TOKENIZER = NucleotideTokenizer()
TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
HEADS = ("lm", "mean", "last", "echo", "rc_echo", "full")
# At the last position a backward scan has read one token only, so that pooling is for causal backbones.
FORMS = [
    (n, causal, head) for n in TEST_PRESETS for causal in (True, False) for head in HEADS if causal or head != "last"
]
every_form = pytest.mark.parametrize(("name", "causal", "head"), FORMS)
LENGTH = 12


class Foreign(DNAClassifier):
    """A model from outside of the package."""


def build(name, causal, head, cls=DNAClassifier):
    backbone = create_backbone(name, causal=causal)
    if head == "lm":
        spec = DNASpec(tokenizer=TOKENIZER.to_dict(), task="lm", max_length=LENGTH)
        model = DNALanguageModel(backbone, spec)
    else:
        spec = DNASpec(tokenizer=TOKENIZER.to_dict(), task="classification", max_length=LENGTH, classes=("a", "b", "c"))
        more = {"positions": "learned", "ngrams": (2, 3), "aligned": 2, "head": "mlp"} if head == "full" else {}
        model = cls(backbone, spec, pooling="mean" if head == "full" else head, **more)
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def random_ids(*shape):
    return torch.randint(7, 12, shape)


@every_form
def test_padding_never_changes_a_result(name, causal, head):
    model = build(name, causal, head)
    ids = random_ids(3, LENGTH)
    mask = torch.ones(3, LENGTH, dtype=torch.bool)
    mask[0, 8:] = False  # right
    mask[1, :5] = False  # left
    padded = ids.masked_fill(~mask, TOKENIZER.pad_id)
    outputs = [model(padded), model(ids, mask)]  # whatever stands under the mask does not count
    for i, real in enumerate(mask):
        alone = model(ids[i : i + 1, real])[0]
        for y in outputs:
            torch.testing.assert_close(y[i, real] if head == "lm" else y[i], alone, atol=2e-5, rtol=1e-4)


@every_form
def test_gradient_reaches_every_parameter(name, causal, head):
    model = build(name, causal, head)
    ids = torch.arange(12).repeat(6, 1) if head == "lm" else random_ids(6, LENGTH)
    F.cross_entropy(model(ids).flatten(0, -2), torch.arange(6 * LENGTH if head == "lm" else 6) % 3).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_form
def test_model_directory_round_trip(name, causal, head, tmp_path):
    model = build(name, causal, head)
    folder = save_model(model, tmp_path / "m", metrics={"val/loss": 0.5}, command="vertebra fit x")
    other = load_model(folder)
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(other(ids), model(ids), atol=0, rtol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config == model_config(other, metrics={"val/loss": 0.5}, command="vertebra fit x")
    assert config["backbone"] == model.backbone.config.to_dict()
    assert config["spec"] == model.spec.to_dict()
    assert config["arguments"] == model.arguments
    assert config["model"] == class_path(model)


@every_form
def test_export_equals_eager(name, causal, head):
    model = build(name, causal, head)
    ids = random_ids(2, LENGTH)
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[0, 9:] = False
    program = torch.export.export(model, (ids, mask))
    torch.testing.assert_close(program.module()(ids, mask), model(ids, mask), atol=1e-5, rtol=1e-5)


@every_form
def test_one_batch_overfits(name, causal, head):
    model = build(name, causal, head).train()
    ids = random_ids(6, LENGTH)
    # Position by position a causal model can only learn what the tokens up to there tell: here, the token itself.
    target = (ids - 7).flatten() if head == "lm" else torch.arange(6) % 3
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(80):
        loss = F.cross_entropy(model(ids).flatten(0, -2), target)
        if step == 0:
            first = loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < first / 4:
            return
    pytest.fail(f"loss went from {first:.3f} to {loss.item():.3f} only")


# ---------------------------------------------------------------- model directories


def test_a_class_from_elsewhere_is_loaded_only_where_allowed(tmp_path):
    model = build(TEST_PRESETS[0], True, "mean", Foreign)
    folder = save_model(model, tmp_path / "m")
    top = Foreign.__module__.partition(".")[0]
    with pytest.raises(
        LoadError,
        match=rf"must come from vertebra or a module you allow, got '{Foreign.__module__}\.Foreign'; if you trust it, "
        rf"pass allow_modules=\['{top}'\]",
    ):
        load_model(folder)
    other = load_model(folder, allow_modules=[top])
    assert type(other) is Foreign
    ids = random_ids(2, LENGTH)
    torch.testing.assert_close(other(ids), model(ids), atol=0, rtol=0)


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_configs_that_make_no_model_are_refused(tmp_path):
    folder = save_model(build(TEST_PRESETS[0], True, "mean"), tmp_path / "m")
    for changes, text in (
        ({"model": "vertebra.domains.dna.model.Nothing"}, "cannot be imported"),
        ({"model": "vertebra.domains.dna.spec.DNASpec"}, "must be a DomainModel"),
        ({"model": "vertebrate.Model"}, "must come from vertebra"),
        ({"format": 99}, "format must be 1, got 99"),
        ({"spec": None}, r"config\.json must hold spec; is it a vertebra model directory\?"),
    ):
        before = (folder / "config.json").read_text()
        edit(folder, **changes)
        with pytest.raises(LoadError, match=text):
            load_model(folder)
        (folder / "config.json").write_text(before)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = save_model(build(TEST_PRESETS[0], True, "mean"), tmp_path / "m")
    tensors = load_file(folder / "model.safetensors")
    embed = tensors["embed.weight"]
    for changed in (
        {k: v for k, v in tensors.items() if k != "embed.weight"},
        {**tensors, "extra.weight": embed.clone()},
        {**tensors, "embed.weight": embed[:-1].clone()},
    ):
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(LoadError, match=r"embed\.weight|extra\.weight"):
            load_model(folder)


def test_saving_replaces_a_model_but_nothing_else(tmp_path):
    model = build(TEST_PRESETS[0], True, "mean")
    save_model(model, tmp_path / "m")
    save_model(model, tmp_path / "m", notes={"data": "Fabricated."})
    assert "Fabricated." in (tmp_path / "m" / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with pytest.raises(ConfigError, match="exists and is no model directory; choose another place"):
        save_model(model, tmp_path / "mine")


# ---------------------------------------------------------------- recipes


# What keeps a step of a recipe short.
QUICK = {
    "action": ["--data.batch_size", "4", "--data.every", "50"],
    # Demonstrations of simulators are the user's to record.
    "action/arm": ["--data.root", "sample/action/arm"],
    "action/fetch": ["--data.root", "sample/action/arm", "--data.grippers", "[gripper]"],
    "vision": ["--data.limit", "20", "--data.batch_size", "4"],
    "mesh": [
        *("--data.procedural", "[6,2,2]", "--data.points", "64", "--data.max_tokens", "300", "--data.batch_size", "2"),
    ],
    "mesh/furniture": ["--model.encoder.latents", "4", "--model.encoder.heads", "2"],
    "mesh/vqvae": [
        *("--data.max_tokens", "900", "--model.shape_encoder.latents", "4", "--model.shape_encoder.heads", "2"),
    ],
    "timeseries": ["--data.batch_size", "4"],
    "timeseries/zero": ["--data.count", "16", "--data.val_count", "4", "--data.test_count", "4"],
    "timeseries/scaling": ["--data.count", "16", "--data.val_count", "4", "--data.test_count", "4"],
    # ETTh1 is the user's to have.
    "timeseries/etth1": ["--data.path", "sample/timeseries/power.csv", "--data.borders", "null"],
}
BIDIRECTIONAL = {"mesh/vqvae"}
"""Recipes that no causal backbone can follow."""
RECIPES = [name for name in recipes() if not name.startswith("distill/")]
"""Those of distillation have a teacher and a student instead of a backbone: see test_distillation.py."""


@pytest.fixture(scope="module")
def sample_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    for domain in sorted({recipe.partition("/")[0] for recipe in RECIPES}):
        import_module(f"vertebra.domains.{domain}.sample").write_sample(folder / "sample" / domain)
    return folder


@pytest.mark.parametrize("name", TEST_PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_one_step_with_every_backbone(recipe, name, sample_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(sample_folder)
    backbone = f"{name},causal=false" if recipe in BIDIRECTIONAL else name
    command = ["fit", recipe, "--model.backbone", backbone, "--root", str(tmp_path), "--trainer.accelerator", "cpu"]
    command += QUICK.get(recipe.partition("/")[0], []) + QUICK.get(recipe, [])
    limits = {"max_steps": 1, "limit_val_batches": 1, "limit_test_batches": 1, "enable_progress_bar": "false"}
    command += [word for key, value in limits.items() for word in (f"--trainer.{key}", str(value))]
    if recipe == "dna/finetune":
        if "dna_lm" not in bundled_models():
            pytest.skip("the bundled model dna_lm is not here")
        command += ["--model.init_from", "null"]  # its weights are of another backbone
    if recipe == "timeseries/finetune":
        command += ["--model.init_from", "null", "--model.init_parts", "backbone"]
    assert main(command) == 0
    assert list(Path(tmp_path).rglob("*.ckpt"))
