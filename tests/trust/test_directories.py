"""Model directories that were made to harm: each is refused in a sentence, without running code or taking memory."""

import json
import resource
import shutil
import time

import pytest
import torch
from hostile import change
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.catalog import bundled_models, presets
from vertebra.backbones.loading.files import read_safetensors_header
from vertebra.backbones.loading.guard import check_size
from vertebra.backbones.loading.pretrained import save_tensors
from vertebra.cli import main
from vertebra.domains.base import BaseTask
from vertebra.domains.model import DomainModel
from vertebra.domains.saving import import_class, load_model
from vertebra.errors import ConfigError, LoadError, VertebraError

SMALL = 300 << 20  # bytes a refusal may take; what torch imports on the way counts too


def refused(folder, match, error=LoadError):
    """Check that the folder is refused as a model, quickly and cheaply."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(error, match=match):
        load_model(folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < SMALL
    assert time.monotonic() - start < 20


def test_the_undamaged_one_is_loaded(folder):
    assert load_model(folder).task == "dna/classify"
    assert create_backbone(f"local-dir:{folder}").config.dim == 16


# ---------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "path",
    [
        "os.system", "builtins.eval", "subprocess.Popen", "torch.nn.Linear", "vertebrae.domains.x.Y", "vertebra_evil.A",
        "domains.dna.model.DNALanguageModel",
    ],
)  # fmt: skip
def test_a_class_of_another_package_is_refused_with_the_way_out(folder, path):
    change(folder, model=path)
    top = path.partition(".")[0]
    refused(folder, rf"must come from vertebra or a module you allow, got '{path}'; .* pass allow_modules=\['{top}'\]")


@pytest.mark.parametrize(
    "path",
    [
        "vertebra.cli.main", "vertebra.__main__.main", "vertebra.os.system", "vertebra.backbones.base.Backbone",
        "vertebra.pipelines.base.Pipeline", "vertebra.create_backbone", "vertebra.domains._private.X",
        "vertebra.domains.saving.__builtins__.eval", "vertebra.domains.dna.model.__class__", "vertebra.domains",
    ],
)  # fmt: skip
def test_a_class_of_ours_that_is_no_model_is_refused_before_its_import(folder, path, monkeypatch):
    monkeypatch.setattr("vertebra.domains.saving.import_module", None)
    change(folder, model=path)
    refused(folder, "must come from a domain of vertebra, got .*; the file is damaged, or made to mislead")


@pytest.mark.parametrize(
    ("path", "match"),
    [
        ("vertebra.domains.saving.os.system", "cannot be imported"),
        ("vertebra.domains.nothing.model.X", "cannot be imported"),
        ("vertebra.domains.dna.model.nn", "must be a DomainModel"),
        ("vertebra.domains.saving.shutil", "must be a DomainModel"),
        ("vertebra.domains.saving.load_model", "must be a DomainModel"),
        ("vertebra.domains.base.BaseTask", "must be a DomainModel"),
        ("vertebra.domains.model.DomainModel", "is the base of such classes"),
    ],
)
def test_a_name_in_a_domain_that_is_no_model(folder, path, match):
    change(folder, model=path)
    refused(folder, match)


@pytest.mark.parametrize(
    "path", ["", ".", "..", ".x", "vertebra..x", "vertebra/domains", "a b.c", "x.y\n", "vertebra.domains.x;import os",
             3, None, [], {"a": 1}, "../x", "x" * 100_000 + "-"],
)  # fmt: skip
def test_what_names_no_class_is_refused(folder, path):
    change(folder, model=path)
    with pytest.raises(LoadError, match=r"must be named as PACKAGE\.MODULE\.CLASS, got") as told:
        load_model(folder)
    assert len(str(told.value)) < 500


def test_allowed_modules_stay_whole_words():
    for path in ("evil_sub.A", "evilsub.A", "os.path.A"):
        with pytest.raises(LoadError, match="must come from vertebra or a module you allow"):
            import_class(path, DomainModel, allow_modules=["evil", "osx", ""])
    with pytest.raises(LoadError, match="is the base of such classes"):
        import_class("vertebra.domains.base.BaseTask", BaseTask)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("loader", [load_model, lambda folder: create_backbone(f"local-dir:{folder}")])
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"backbone__depth": 10**7},
            "says depth 10000000, but model.safetensors holds [0-9]+ tensors; it was not built",
        ),
        ({"backbone__dim": 10**9}, "describes a far larger model than model.safetensors holds"),
        ({"backbone__dim": 16 * 200}, "describes a (far larger )?model"),
        ({"backbone__hidden_dim": 10**9}, "describes a far larger model"),
        ({"backbone__state_dim": 10**8}, "describes a far larger model"),
        ({"backbone__dim": 1 << 62}, "holds the number 4611686018427387904, which is too large"),
        ({"backbone__dim": -16}, "dim must be at least 1, got -16"),
        ({"backbone__dim": 0}, "dim must be at least 1, got 0"),
    ],
)
def test_sizes_that_the_weights_do_not_have_are_refused_before_they_take_memory(folder, loader, changes, match):
    change(folder, **changes)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(VertebraError, match=match):
        loader(folder)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < SMALL
    assert time.monotonic() - start < 20


def test_sizes_around_the_backbone_are_held_against_the_weights_too(folder):
    change(folder, spec__max_length=10**8, arguments__positions="learned")
    refused(folder, "describes a far larger model than model.safetensors holds")


@pytest.mark.parametrize("name", [n for n in presets() if n.endswith("_test")])
@pytest.mark.parametrize("causal", [True, False])
def test_no_model_of_ours_is_mistaken_for_a_hostile_one(name, causal, tmp_path):
    try:
        config = resolve(name).replace(causal=causal)
    except ConfigError:
        pytest.skip(f"{name} has no form with causal={causal}")
    model = config.build()
    save_tensors(model, tmp_path / "w.safetensors")
    state = torch.get_rng_state()
    check_size(config.build, read_safetensors_header(tmp_path / "w.safetensors"), name)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", list(bundled_models()))
def test_the_bundled_models_pass(name):
    assert isinstance(load_model(name), DomainModel)


# ---------------------------------------------------------------- other values


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": 99}, "format must be 1, got 99"),
        ({"arguments": []}, "arguments in config.json must be an object, got a list"),
        ({"spec": "dna"}, "spec in config.json must be an object, got a str"),
        ({"backbone": [1]}, "has no 'backbone' entry"),
        ({"backbone": {}}, "unknown backbone family ''"),
        ({"backbone__family": "../../x"}, "unknown backbone family"),
        ({"backbone__family": ["hybrid"]}, "unknown backbone family"),
        ({"backbone__nothing": 1}, "has no field 'nothing'"),
        ({"backbone__dim": "16"}, "no model can be built from config.json"),
        ({"backbone__dim": None}, "no model can be built from config.json"),
        ({"backbone__dim": [16]}, "no model can be built from config.json"),
        ({"backbone__dropout": {"a": 1}}, "no model can be built from config.json"),
        ({"arguments__nothing": 1}, "no model can be built from config.json .*nothing"),
        ({"arguments__backbone": 1}, "no model can be built from config.json"),
        ({"spec__domain": "../x"}, "unknown domain '../x'"),
        ({"spec__domain": "base"}, "unknown domain 'base'"),
        ({"spec__domain": "os"}, "unknown domain 'os'"),
        ({"spec__domain": "timeseries"}, "DataSpec|Spec"),
        ({"spec__nothing": 1}, "has no field 'nothing'"),
    ],
)
def test_values_that_cannot_be_meant(folder, changes, match):
    change(folder, **changes)
    refused(folder, match, VertebraError)


@pytest.mark.parametrize("missing", ["format", "model", "arguments", "spec", "backbone"])
def test_missing_parts(folder, missing):
    config = json.loads((folder / "config.json").read_text())
    del config[missing]
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, "config.json must hold|has no 'backbone' entry")


def test_weights_that_are_no_file_of_the_folder(folder, tmp_path):
    weights = folder / "model.safetensors"
    weights.rename(tmp_path / "w.safetensors")
    refused(folder, r"model\.safetensors: missing; a model directory holds")
    weights.symlink_to(tmp_path / "w.safetensors")
    refused(folder, "a link that leads out of its folder, to")
    weights.unlink()
    weights.symlink_to("/dev/zero")
    refused(folder, r"model\.safetensors: missing")
    weights.unlink()
    weights.mkdir()
    refused(folder, r"model\.safetensors: must be a file of weights, is a folder")


def test_a_pickle_in_the_place_of_the_weights(folder):
    torch.save({"a": torch.ones(1)}, folder / "model.safetensors")
    refused(folder, r"model\.safetensors: not a safetensors file, or cut short")


def test_a_config_that_leads_elsewhere(folder, tmp_path):
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    refused(folder, "a link that leads out of its folder, to")
    assert main(["info", str(folder)]) == 2


def test_the_command_line_answers_in_a_sentence(folder, capsys):
    change(folder, model="os.system")
    assert main(["info", str(folder)]) == 0  # headers alone are read, nothing is imported
    (folder / "config.json").write_text("[" * 100_000)
    assert main(["info", str(folder)]) == 2
    assert "nested too deeply" in capsys.readouterr().err


# ---------------------------------------------------------------- anything

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_any_value_in_any_place_is_loaded_or_refused(good, tmp_path_factory, data):
    config = json.loads((good / "config.json").read_text())
    part = data.draw(st.sampled_from(["format", "model", "arguments", "backbone", "spec"]))
    if isinstance(config[part], dict) and data.draw(st.booleans()):
        config[part][data.draw(st.sampled_from(sorted(config[part])))] = data.draw(JSON)
    else:
        config[part] = data.draw(JSON)
    folder = tmp_path_factory.mktemp("any")
    shutil.copyfile(good / "model.safetensors", folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    try:
        load_model(folder)
    except VertebraError:
        return
