"""Checkpoints of trainings, and specs, that were made to harm."""

import copy
import re
import resource
import time
import zipfile

import pytest
import torch
from hostile import change, saved

from vertebra.backbones.loading.pretrained import read_config
from vertebra.cli import main
from vertebra.domains.base import init_weights, load_task, read_checkpoint
from vertebra.domains.saving import load_model
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, LoadError, UnknownNameError, VertebraError

SMALL = 300 << 20  # bytes a refusal may take; what torch imports on the way counts too


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
