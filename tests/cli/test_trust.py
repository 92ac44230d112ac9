"""Checkpoints that name classes: those of vertebra are taken, others only when the user names them himself."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from vertebra.cli import main
from vertebra.cli.invocation import parse_invocation
from vertebra.cli.trust import allowed_names, is_allowed
from vertebra.errors import LoadError

pytestmark = pytest.mark.slow

EVIL = """\
import pathlib
pathlib.Path(__file__).with_name("was_imported").touch()
import toys
from lightning.pytorch import Callback
class Task(toys.ToyTask): pass
class Data(toys.ToyData): pass
class Seen(Callback): pass
def called(*args): pass
"""
TYPED = ["--model", "toys.ToyTask"]


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that tells when it was imported: a function that says so."""
    place = tmp_path / "elsewhere"
    place.mkdir()
    (place / "evil.py").write_text(EVIL)
    monkeypatch.syspath_prepend(str(place))
    yield lambda: (place / "was_imported").exists() or "evil" in sys.modules
    sys.modules.pop("evil", None)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run, to be changed: a function that takes changes and returns the folder."""
    folder = shutil.copytree(finished / "runs/toy/points/1", tmp_path / "run")

    def change(trainer=None, **changes):
        for path in (folder / "checkpoints").glob("*.ckpt"):
            checkpoint = torch.load(path, weights_only=True)
            for name, value in changes.items():
                *parts, last = name.split("__")
                place = checkpoint
                for part in parts:
                    place = place[part]
                place[last] = value
            torch.save(checkpoint, path)
        if trainer is not None:
            config = yaml.safe_load((folder / "config.yaml").read_text())
            config["trainer"].update(trainer)
            (folder / "config.yaml").write_text(yaml.safe_dump(config))
        return folder

    return change


# ---------------------------------------------------------------- the user's own


def test_a_task_of_ones_own_is_taken_when_it_is_named(run, tmp_path, capsys):
    folder = run()
    out = ["-o", str(tmp_path / "numbers.json")]
    assert main(["test", "--ckpt_path", str(folder), *out]) == 2
    assert capsys.readouterr().err == (
        f"vertebra: error: {folder}/checkpoints/best.ckpt names the class 'toys.ToyTask', which is neither of vertebra "
        "nor named by you, so it was not imported. If you trust it, name it yourself: --model toys.ToyTask\n"
    )
    ways = (["--model", "toys.ToyTask"], ["--model=toys.ToyTask"], ["--model", "ToyTask"], ["toy/points"],
            ["--data", "toys.ToyData"], ["-c", str(folder / "config.yaml")],
            ["--trainer.callbacks", '[{"class_path": "toys.Nothing"}]'])  # fmt: skip
    for words in ways[:-1]:
        assert main(["test", *words, "--ckpt_path", str(folder), *out]) == 0, words
        assert (tmp_path / "numbers.json").is_file()
    assert main(["test", *ways[-1], "--ckpt_path", str(folder), *out]) == 2
    assert "toys.Nothing" in capsys.readouterr().err


def test_what_is_named_keeps_the_settings_of_the_checkpoint(run, capsys):
    folder = run(hyper_parameters__dropout=0.35)
    assert main(["config", *TYPED, "--data", "toys.ToyData", "--ckpt_path", str(folder)]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["init_args"]["dropout"] == 0.35
    assert config["data"]["init_args"]["path"] == "points.csv"


def test_fit_and_info_say_how_a_task_of_ones_own_is_tested(project, capsys):
    assert main(["fit", "toy/points", "--trainer.max_epochs=1"]) == 0
    out = capsys.readouterr().out
    assert "next: vertebra test --ckpt_path runs/toy/points/1 --model toys.ToyTask\n" in out
    assert main(["info", "runs/toy/points/1/checkpoints/last.ckpt"]) == 0
    assert "if you trust its class: --model toys.ToyTask" in capsys.readouterr().out
    assert main(["test", "--ckpt_path", "runs/toy/points/1", "--model", "toys.ToyTask"]) == 0


# ---------------------------------------------------------------- what is refused before its import

NESTED = {"class_path": "evil.Task", "init_args": {}}


@pytest.mark.parametrize(
    ("changes", "way"),
    [
        ({"class_path": "evil.Task"}, "--model evil.Task"),
        ({"data__class_path": "evil.Data"}, "--data evil.Data"),
        ({"data": {"class_path": "evil.Data"}}, "--data evil.Data"),
        ({"data": None, "datamodule_hyper_parameters": {"_class_path": "evil.Data", "path": "x"}}, "--data evil.Data"),
        ({"hyper_parameters__backbone": NESTED}, "-c FILE"),
        ({"hyper_parameters__optimizer": NESTED}, "-c FILE"),
        ({"hyper_parameters__optimizer": {"lr": NESTED}}, "-c FILE"),
        ({"hyper_parameters__init_from": [{"a": NESTED}]}, "-c FILE"),
        ({"data__init_args__path": NESTED}, "-c FILE"),
        ({"data__init_args": {"path": {"x": [[NESTED]]}}}, "-c FILE"),
        ({"trainer": {"callbacks": [{"class_path": "evil.Seen"}]}}, "-c FILE"),
        ({"trainer": {"callbacks": "evil.Seen"}}, "-c FILE"),
        ({"trainer": {"callbacks": ["evil.Seen"]}}, "-c FILE"),
        ({"trainer": {"logger": "evil.Seen"}}, "-c FILE"),
        ({"trainer": {"strategy": {"class_path": "evil.Seen"}}}, "-c FILE"),
        ({"trainer": {"plugins": ["evil.Seen"]}}, "-c FILE"),
        ({"trainer": {"profiler": "evil.Seen"}}, "-c FILE"),
    ],
)  # fmt: skip
def test_a_class_of_somebody_else_is_not_imported(run, evil, capsys, changes, way):
    verb = "fit" if "trainer" in changes else "test"
    folder = run(**changes)
    assert main([verb, *TYPED, "--ckpt_path", str(folder)]) == 2
    err = capsys.readouterr().err
    assert not evil()
    name = "config.yaml" if "trainer" in changes else "checkpoints/best.ckpt"
    assert err.startswith(f"vertebra: error: {folder}/{name} names the class 'evil.")
    assert "which is neither of vertebra nor named by you, so it was not imported. If you trust it, name it" in err
    assert way in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "changes",
    [
        {"hyper_parameters__backbone": "evil.Task"},
        {"hyper_parameters__backbone": json.dumps(NESTED)},
        {"hyper_parameters__optimizer": "evil.Task"},
        {"hyper_parameters__optimizer": json.dumps(NESTED)},
        {"hyper_parameters__backbone": "evil.yaml"},
        {"hyper_parameters__optimizer": "evil.yaml"},
        {"hyper_parameters__mode": "Problem with given class_path 'evil.Task'"},
        {"hyper_parameters__mode": "Problem with given class_path 'evil.Task': No module named 'x'"},
        {"data__init_args": json.dumps(NESTED)},
        {"trainer": {"callbacks": json.dumps([NESTED])}},
        {"trainer": {"callbacks": "evil.yaml"}},
        {"trainer": {"callbacks": [{"class_path": "lightning.pytorch.callbacks.LambdaCallback",
                                    "init_args": {"on_fit_start": "evil.called"}}]}},
    ],
)  # fmt: skip
def test_names_that_only_the_parser_finds_are_not_imported_either(run, evil, capsys, changes):
    Path("evil.yaml").write_text(yaml.safe_dump(NESTED))
    try:
        status = main(["fit", *TYPED, "--ckpt_path", str(run(**changes))])
    finally:
        Path("evil.yaml").unlink()
    assert status == 2
    assert not evil()
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    "name",
    ["os.system", "shutil.rmtree", "vertebra.domains.saving.shutil.rmtree", "vertebra.domains.base.log.warning",
     "torch.optim.adamw.torch.load", "lightning.pytorch.callbacks.timer.re.compile", "torch.load",
     "lightning.pytorch.callbacks.lambda_function.Callback"],
)  # fmt: skip
def test_functions_are_not_reached_through_what_is_allowed(run, capsys, name):
    callback = {"class_path": "lightning.pytorch.callbacks.LambdaCallback", "init_args": {"on_fit_start": name}}
    status = main(["fit", *TYPED, "--ckpt_path", str(run(trainer={"callbacks": [callback]}))])
    assert status == 2
    assert "bug" not in capsys.readouterr().err


@pytest.mark.parametrize("name", [3, None, "", "Task", ".x", "a b.c", "x" * 10**5, "../x.y", ["evil.Task"], "toys.a-b"])
def test_what_names_no_class(run, evil, capsys, name):
    assert main(["test", *TYPED, "--ckpt_path", str(run(data__class_path=name))]) == 2
    err = capsys.readouterr().err
    assert "a class must be named as PACKAGE.MODULE.CLASS, got" in err
    assert len(err) < 500


def test_the_parser_is_left_as_it_was(run, evil):
    from jsonargparse._common import parsing_settings

    before = dict(parsing_settings)
    assert main(["test", *TYPED, "--ckpt_path", str(run())]) == 0
    assert main(["test", "--ckpt_path", str(run(class_path="evil.Task"))]) == 2
    assert parsing_settings == before
    assert not evil()


def test_callbacks_of_lightning_and_named_ones_are_taken(run, evil, tmp_path):
    stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
    folder = run(trainer={"callbacks": [stopping], "max_epochs": 3})
    words = [*TYPED, "--ckpt_path", str(folder), "--root", str(tmp_path / "a")]
    assert main(["fit", *words]) == 0
    assert not evil()
    folder = run(trainer={"callbacks": [{"class_path": "evil.Seen"}], "max_epochs": 3})
    assert main(["fit", "-c", str(folder / "config.yaml"), "--ckpt_path", str(folder)]) == 0
    assert evil()


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hyper_parameters": 3}, "hyper_parameters must be a dictionary, got a int"),
        ({"hyper_parameters": {3: 4}}, "hyper_parameters must have names for keys, got 3"),
        ({"hyper_parameters__backbone": {"family": ["x"]}}, "unknown backbone family"),
        ({"hyper_parameters__backbone": {"family": "os"}}, "unknown backbone family"),
        ({"hyper_parameters__backbone": {"family": "illama", "nothing": 1}}, "nothing"),
        ({"hyper_parameters__nothing": 1}, "ToyTask has no option --model.nothing"),
        ({"hyper_parameters__dropout": torch.zeros(3)}, "holds settings that are none (a Tensor)"),
        ({"hyper_parameters__dropout": "\ud800"}, "Problems parsing config"),
        ({"data": 3}, "data must be a dictionary, got a int"),
        ({"data": [1]}, "data must be a dictionary, got a list"),
        ({"datamodule_hyper_parameters": 3, "data": None}, "datamodule_hyper_parameters must be a dictionary"),
        ({"spec": 3}, "the spec of data must be an object with 'domain', got a int"),
        ({"spec": {"domain": "os"}}, "unknown domain 'os'"),
    ],
)
def test_settings_that_are_none(run, capsys, changes, match):
    assert main(["test", *TYPED, "--ckpt_path", str(run(**changes))]) == 2
    err = capsys.readouterr().err
    assert match in err
    assert err.count("\n") == 1


def test_settings_that_grow_without_end(run, capsys):
    folder = run()
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]" for i in range(12)]
    (folder / "config.yaml").write_text("trainer:\n" + "\n".join(f"  {line}" for line in lines))
    assert main(["fit", *TYPED, "--ckpt_path", str(folder)]) == 2
    assert "more settings than a run has" in capsys.readouterr().err
    (folder / "config.yaml").write_text("trainer: &a [*a]")
    assert main(["fit", *TYPED, "--ckpt_path", str(folder)]) == 2
    assert "more settings than a run has" in capsys.readouterr().err


# ---------------------------------------------------------------- what counts as named


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        ([], "vertebra.domains.dna.task.DNALanguageTask", True),
        ([], "vertebra.backbones.hybrid.HybridConfig", True),
        ([], "lightning.pytorch.callbacks.EarlyStopping", True),
        ([], "lightning.pytorch.trainer.trainer.Trainer", False),
        ([], "torch.optim.AdamW", True),
        ([], "torch.load", False),
        ([], "vertebrae.x.Y", False),
        ([], "vertebra_plugin.Y", False),
        ([], "my.Task", False),
        (["--model", "my.sub.Task"], "my.Task", True),
        (["--model=my.sub.Task"], "my.other.Data", True),
        (["--model", "my.sub.Task"], "mine.Task", False),
        (["--model.init_args.backbone", "illama_test"], "model.Task", False),
        (["--data.path", "points.csv"], "points.Task", False),  # which is a file
        (["--data.path", "os.csv"], "os.system", False),
        (["--data.path", "/data/os.csv"], "os.system", False),
        (["--trainer.callbacks", "[my.A, {class_path: your.B}]"], "your.C", True),
        (["--trainer.callbacks+=my.A"], "my.C", True),
        (["--trainer.plugins", "torch.Thing"], "torch.load", False),
        (["--trainer.plugins", "torch.Thing"], "torch.Thing", True),
        (["--trainer.plugins", "jsonargparse.Thing"], "jsonargparse.Thing", False),
        (["-c", "named.yaml"], "filed.Other", True),
        (["-c", "named.yaml"], "listed.Other", True),
        (["-c", "named.yaml"], "key.Other", False),
        (["toy/points"], "toys.ToyData", True),
    ],
)
def test_what_counts_as_named(project, words, name, expected):
    Path("named.yaml").write_text(
        "model: {class_path: filed.Task, init_args: {key.x: 3}}\ntrainer: {callbacks: [listed.A]}\n"
    )
    names = allowed_names(parse_invocation("test", words or ["--trainer.devices=1"]))
    assert is_allowed(name, names) is expected
    if expected:
        assert not is_allowed(f"x{name}", names)


def test_a_refusal_is_a_load_error(run):
    from vertebra.cli.layers import check_class, read_checkpoint_of

    call = parse_invocation("test", ["--ckpt_path", str(run())])
    with pytest.raises(LoadError, match=r"names the class 'toys\.ToyTask'"):
        check_class(call, read_checkpoint_of(call))
