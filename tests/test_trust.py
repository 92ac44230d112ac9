"""Model directories that were made to harm: each is refused in a sentence, without running code or taking memory."""

import copy
import io
import json
import re
import resource
import shutil
import time
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.catalog import bundled_models, presets
from vertebra.backbones.loading.files import read_safetensors_header
from vertebra.backbones.loading.guard import check_size
from vertebra.backbones.loading.pretrained import LoadReport, read_config, save_tensors
from vertebra.cli import main
from vertebra.cli.tables import print_table
from vertebra.domains.base import BaseTask, init_weights, load_task, read_checkpoint
from vertebra.domains.model import DomainModel
from vertebra.domains.saving import build_model, import_class, load_model, save_model
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, LoadError, UnknownNameError, VertebraError, printable
from vertebra.pipelines.prediction import Prediction

SMALL = 300 << 20  # bytes a refusal may take; what torch imports on the way counts too


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A small model directory."""
    config = read_config("dna_promoter")
    backbone = resolve("hybrid_test").replace(causal=config["backbone"]["causal"])
    return save_model(
        build_model({**config, "backbone": backbone.to_dict()}), tmp_path_factory.mktemp("good") / "model"
    )


@pytest.fixture
def folder(good, tmp_path):
    """A copy of it to damage."""
    return shutil.copytree(good, tmp_path / "model")


def change(folder, **changes):
    """Change values of config.json; ``part__key`` for those one level down."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            config[part][key] = value
        else:
            config[part] = value
    path.write_text(json.dumps(config))


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


# ---------------------------------------------------------------- specs and checkpoints of trainings


@pytest.mark.parametrize("values", [None, 3, "dna", [], {}, {"domain": 3}, {"domain": None}, {"domain": "dna" * 1000}])
def test_specs_that_are_none(values):
    with pytest.raises((ConfigError, UnknownNameError)) as told:
        DataSpec.from_dict(values)
    assert len(str(told.value)) < 500


def test_a_spec_with_values_of_other_types():
    values = read_config("dna_promoter")["spec"]
    for name in values:
        for value in (None, -1, "x", {"a": 1}, [[1]], 1e300):
            try:
                DataSpec.from_dict({**values, name: value})
            except VertebraError:
                continue


def test_a_lightning_checkpoint_that_needs_code(tmp_path):
    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"state_dict": {}, "spec": {}, "class_path": "x", "extra": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(LoadError, match="not a readable checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    with pytest.raises(LoadError, match="must hold state_dict, spec and class_path"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert not (tmp_path / "ran").exists()


def test_a_lightning_checkpoint_that_grows_when_it_is_read(tmp_path):
    plain, packed = tmp_path / "plain.ckpt", tmp_path / "packed.ckpt"
    torch.save({"state_dict": {"w": torch.zeros(1 << 20)}, "spec": {}, "class_path": "x"}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in source.infolist():
            archive.writestr(member.filename, source.read(member))
    assert packed.stat().st_size < 1 << 16
    with pytest.raises(LoadError, match=r"packed\.ckpt: not a readable checkpoint \(.*compress"):
        read_checkpoint(packed)
    assert main(["test", "dna/promoter", "--ckpt_path", str(packed)]) == 2


@pytest.fixture(scope="module")
def lightning():
    """What a small checkpoint of a training holds."""
    from vertebra.domains.dna.task import DNAClassificationTask

    task = DNAClassificationTask(backbone="hybrid_test")
    task.build(DataSpec.from_dict(read_config("dna_promoter")["spec"]))
    checkpoint = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "epoch": 1, "global_step": 2}
    task.on_save_checkpoint(checkpoint)
    return checkpoint


def saved(lightning, path, **changes):
    """Write it with changes; ``part__key`` for those one level down."""
    checkpoint = copy.deepcopy(lightning)
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            checkpoint[part][key] = value
        else:
            checkpoint[part] = value
    torch.save(checkpoint, path)
    return path


def test_the_undamaged_checkpoint_is_loaded(lightning, tmp_path):
    assert load_task(saved(lightning, tmp_path / "a.ckpt")).is_built


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"class_path": "os.system"}, "the class must come from vertebra or a module you allow, got 'os.system'"),
        ({"class_path": 3}, r"the class must be named as PACKAGE\.MODULE\.CLASS, got 3"),
        ({"class_path": None}, r"the class must be named as PACKAGE\.MODULE\.CLASS, got None"),
        ({"hyper_parameters": 3}, "hyper_parameters must be a dictionary, got a int"),
        ({"hyper_parameters": None}, "hyper_parameters must be a dictionary, got a NoneType"),
        ({"hyper_parameters": {}}, "no model can be built from its hyper_parameters .TypeError: .*backbone"),
        ({"hyper_parameters__nothing": 1}, "no model can be built from its hyper_parameters .TypeError: .*nothing"),
        ({"hyper_parameters__backbone": None}, "no model can be built from its hyper_parameters"),
        ({"hyper_parameters__backbone": [1, 2]}, "no model can be built from its hyper_parameters"),
        ({"hyper_parameters__backbone": {}}, "unknown backbone family ''"),
        ({"hyper_parameters__optimizer": {"nothing": 1}}, "no model can be built from its hyper_parameters"),
        ({"hyper_parameters__tune": {"nothing": 1}}, "no model can be built from its hyper_parameters"),
        ({"hyper_parameters__ngrams": "x"}, "no model can be built from its hyper_parameters|ngrams"),
        ({"hyper_parameters__dropout": "x"}, "no model can be built from its hyper_parameters|dropout"),
        ({"hyper_parameters__ngrams": [10**18]}, "hold the number 10{18}, which is too large"),
        ({"spec": 3}, "the spec of data must be an object with 'domain', got a int"),
        ({"spec": {"domain": "os"}}, "unknown domain 'os'"),
        ({"spec__classes": 3}, "a value is missing or of a wrong type|no model can be built|classes"),
        ({"state_dict": 3}, "state_dict must be a dictionary, got a int"),
        ({"state_dict": {"a": 3}}, "do not fit|must be a tensor, got a int"),
        ({"state_dict": {}}, "say depth 3, but its state_dict holds 0 tensors"),
        ({"state_dict": {3: torch.ones(2)}}, "state_dict must have names for keys, got 3"),
    ],
)  # fmt: skip
def test_checkpoints_with_values_that_cannot_be_meant(lightning, tmp_path, changes, match):
    path = saved(lightning, tmp_path / "a.ckpt", **changes)
    with pytest.raises(VertebraError, match=match) as told:
        load_task(path)
    assert len(str(told.value)) < 700


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hyper_parameters__backbone__depth": 10**7}, "its hyper_parameters say depth 10000000, but its state_dict "
         "holds [0-9]+ tensors; it was not built"),
        ({"hyper_parameters__backbone__dim": 16 * 10**6}, "its hyper_parameters describe a far larger model than its "
         "state_dict holds"),
        ({"hyper_parameters__backbone__hidden_dim": 10**9}, "its hyper_parameters describe a far larger model"),
        ({"hyper_parameters__backbone__dim": 1 << 62}, "its hyper_parameters hold the number 46116860184273879"),
        ({"spec__max_length": 10**9, "hyper_parameters__positions": "learned"}, "describe a far larger model"),
    ],
)  # fmt: skip
def test_checkpoints_of_sizes_that_their_tensors_do_not_have(lightning, tmp_path, changes, match):
    checkpoint = copy.deepcopy(lightning)
    for name, value in changes.items():
        *parts, last = name.split("__")
        place = checkpoint
        for part in parts:
            place = place[part]
        place[last] = value
    torch.save(checkpoint, tmp_path / "a.ckpt")
    load_task(saved(lightning, tmp_path / "b.ckpt"))  # what is imported on the way is none of its memory
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(LoadError, match=match):
        load_task(tmp_path / "a.ckpt")
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < SMALL
    assert time.monotonic() - start < 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"depth": 10**7}, "its settings, with what was typed, say depth 10000000, but its state_dict holds"),
        ({"dim": 16 * 10**6}, "its settings, with what was typed, describe a far larger model than its state_dict"),
        ({"hidden_dim": 10**9}, "its settings, with what was typed, describe a far larger model than its state_dict"),
        ({"dim": 1 << 62}, "its settings, with what was typed, hold the number 4611686018427387904"),
        ({}, r"nothing\.fa"),
    ],
)
def test_sizes_are_held_against_the_tensors_on_the_command_line_too(lightning, tmp_path, capsys, changes, match):
    backbone = {**lightning["hyper_parameters"]["backbone"], **changes}
    path = saved(lightning, tmp_path / "a.ckpt", hyper_parameters__backbone=backbone)
    words = ["--data", "DNASequenceData", "--data.positives", "nothing.fa", "--data.negatives", "nothing.fa"]
    assert main(["test", *words, "--ckpt_path", str(saved(lightning, tmp_path / "b.ckpt"))]) == 2  # imports take memory
    assert "nothing.fa" in capsys.readouterr().err
    for verb in ("test", "fit"):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
        rest = ["--root", str(tmp_path), "--trainer.max_epochs=1"] if verb == "fit" else []
        assert main([verb, *words, "--ckpt_path", str(path), *rest]) == 2
        err = capsys.readouterr().err
        assert re.search(match, err)
        assert err.count("\n") == 1
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < SMALL
        assert time.monotonic() - start < 20


def test_tensors_of_a_checkpoint_that_claim_more_than_is_stored(lightning, tmp_path):
    tensors = {**lightning["state_dict"], "x": torch.zeros(1).expand(1 << 40)}
    path = saved({**lightning, "state_dict": tensors}, tmp_path / "a.ckpt")
    for read in (read_checkpoint, load_task):
        with pytest.raises(LoadError, match="'x' claims more values than are stored"):
            read(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"hyper_parameters__tune": {"nothing": 1}}, {"hyper_parameters__tune": 3}, {"hyper_parameters__tune": None},
        {"hyper_parameters__tune": {"lora_rank": "x"}}, {"spec": {"domain": "os"}}, {"spec": 3},
        {"state_dict__model.embed.weight": 3}, {"hyper_parameters": 3}, {"spec__classes": 3},
        {"state_dict__model.backbone.x.base_layer.weight": torch.ones(2, 2)},
    ],
)  # fmt: skip
def test_initial_weights_with_values_that_cannot_be_meant(good, lightning, tmp_path, changes):
    path = saved(lightning, tmp_path / "a.ckpt", **changes)
    with pytest.raises(VertebraError) as told:
        init_weights(load_model(good), str(path), "all")
    assert len(str(told.value)) < 700


@pytest.mark.parametrize("value", [3, None, [], "x", {"positions": 3}, {"positions": {}}])
def test_initial_weights_of_a_directory_with_odd_arguments(good, folder, value):
    change(folder, arguments=value)
    try:
        init_weights(load_model(good), str(folder), "all")
    except VertebraError:
        return


# ---------------------------------------------------------------- what reaches the terminal

EVIL = "\x1b]0;owned\x07\x7f\x1b[31m[red]x[/red][link=http://a]\x9b2J\r\n\u202e\ud800"
SHOWN = r"\x1b]0;owned\x07\x7f\x1b[31m[red]x[/red][link=http://a]\x9b2J\r\n\u202e\ud800"


def plain(text):
    """Whether a terminal takes a text for what it says."""
    return all(c.isprintable() or c == "\n" for c in text)


def test_printable_text():
    assert printable(EVIL) == SHOWN
    assert printable("a\n\tb", lines=True) == "a\n\tb"
    assert printable("a\n\tb") == r"a\n\tb"
    assert printable("naïve 東京\u3000é", lines=True) == "naïve 東京\u3000é"
    assert printable(3) == "3"


@pytest.mark.parametrize("name", ["task", "model", "command", "vertebra", "metrics", "arguments", "backbone", "spec"])
def test_info_prints_what_a_config_holds_as_text(folder, name, capsys):
    for value in (EVIL, {EVIL: EVIL}, [EVIL], {"a": {EVIL: [EVIL]}}):
        change(folder, **{name: value})
        status = main(["info", str(folder)])
        told = capsys.readouterr()
        assert plain(told.out + told.err)
        assert status == 0 or "config.json" in told.err
        assert SHOWN[:20] in told.out or r"\\x1b" in told.out or r"\u001b" in told.out or status == 2
        if status == 0:
            assert main(["info", str(folder), "--json"]) == 0
            out = capsys.readouterr().out
            assert plain(out)
            assert json.loads(out)["model"] == str(folder)


def test_info_prints_what_a_checkpoint_and_a_run_hold_as_text(lightning, tmp_path, capsys):
    path = saved(
        lightning, tmp_path / "a.ckpt", class_path=EVIL, epoch=EVIL, backbone={EVIL: 1}, hyper_parameters__a=EVIL
    )
    assert main(["info", str(path)]) == 0
    out = capsys.readouterr().out
    assert plain(out)
    assert SHOWN in out
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.json").write_text(json.dumps({"test": {EVIL: 1.0}, "command": EVIL}))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert plain(out)
    assert SHOWN in out
    (tmp_path / "metrics.json").write_text("[" * 10**5)
    assert main(["info", str(tmp_path)]) == 2
    assert "nested too deeply" in capsys.readouterr().err


@pytest.mark.parametrize(
    "values",
    [
        {"arguments": {"parameters": "x", "b": {}}}, {"arguments": {"parameters": None, "b": {"parameters": []}}},
        {"backbone": 3}, {"backbone": None}, {"spec": []}, {"metrics": "x"}, {"vertebra": {}}, {"task": {"a": [1]}},
        {"arguments": {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"h": {}}}}}}}}}},
    ],
)  # fmt: skip
def test_info_of_odd_values(folder, values, capsys):
    change(folder, **values)
    assert main(["info", str(folder)]) == 0
    assert plain(capsys.readouterr().out)


def test_info_of_a_config_nested_as_deep_as_is_read(folder, capsys):
    nested = "[" * 700 + "]" * 700
    for value in (nested, '{"a":' * 700 + "1" + "}" * 700):
        config = json.loads((folder / "config.json").read_text())
        text = json.dumps({**config, "arguments": 1}).replace('"arguments": 1', f'"arguments": {value}')
        (folder / "config.json").write_text(text)
        assert main(["info", str(folder)]) in (0, 2)
        assert "Traceback" not in capsys.readouterr().err


def test_errors_quote_files_as_text(folder, capsys):
    change(folder, backbone__family=EVIL)
    with pytest.raises(VertebraError) as told:
        load_model(folder)
    assert plain(str(told.value))
    assert main(["export", str(folder), "-o", str(folder / "x.pt2")]) == 2
    err = capsys.readouterr().err
    assert plain(err)
    assert err.count("\n") == 1
    assert str(LoadError(EVIL)) == SHOWN.replace(r"\n", "\n")


def test_tables_show_markup_and_escapes_as_text(capsys):
    print_table(EVIL, ["name", EVIL], [[EVIL, EVIL]])
    out = capsys.readouterr().out
    assert plain(out)
    assert "[red]x[/red][link=http://a]" in out


def test_convert_prints_names_of_tensors_as_text(tmp_path, capsys, monkeypatch):
    from vertebra.domains import conversion

    report = LoadReport(matched=[EVIL], unexpected=[EVIL])
    model = load_model("dna_promoter")
    found = conversion.Conversion(model=model, report=report, left_out={EVIL: EVIL})
    converter = next(iter(conversion.converters().values()))
    monkeypatch.setattr(conversion, "convert", lambda source, family: (converter, found))
    assert main(["convert", "x", "-o", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert plain(out)
    assert SHOWN in out


def test_a_bug_prints_what_it_quotes_as_text(monkeypatch, capsys):
    def fails(name):
        raise RuntimeError(EVIL)

    monkeypatch.setattr("vertebra.cli.info.describe", fails)
    assert main(["info", "x"]) == 1
    err = capsys.readouterr().err
    assert plain(err)
    assert "RuntimeError" in err


def test_results_show_names_of_classes_as_text():
    from rich.console import Console

    prediction = Prediction(value=EVIL, scores={EVIL: 1.0}, name=EVIL)
    assert plain(repr(prediction))
    console = Console(record=True, width=400, file=io.StringIO())
    console.print(prediction)
    assert plain(console.export_text())


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
