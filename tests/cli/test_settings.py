import shutil
from pathlib import Path

import pytest
import yaml

from vertebra.cli import main

pytestmark = pytest.mark.slow


def config_of(*words, capsys):
    """What ``vertebra config`` prints for these words."""
    capsys.readouterr()
    assert main(["config", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


# ---------------------------------------------------------------- precedence: each edge


def test_recipe_beats_defaults(project, capsys):
    config = config_of("toy/points", capsys=capsys)
    assert config["model"]["init_args"]["dropout"] == 0.2  # default 0.1
    assert config["model"]["init_args"]["mode"] == "plain"  # a default
    assert config["seed_everything"] == 0


def test_checkpoint_beats_recipe(finished, capsys):
    Path("other.yaml").write_text(Path("toy.yaml").read_text().replace("dropout: 0.2", "dropout: 0.7"))
    words = ["--ckpt_path", "runs/toy/points/1"]
    assert config_of("toy/points", *words, capsys=capsys)["model"]["init_args"]["dropout"] == 0.2
    shutil.copy("toy.yaml", "kept.yaml")
    try:
        shutil.copy("other.yaml", "toy.yaml")
        assert config_of("toy/points", capsys=capsys)["model"]["init_args"]["dropout"] == 0.7
        assert config_of("toy/points", *words, capsys=capsys)["model"]["init_args"]["dropout"] == 0.2
    finally:
        shutil.move("kept.yaml", "toy.yaml")


def test_file_beats_checkpoint_and_recipe(finished, tmp_path, capsys):
    part = tmp_path / "part.yaml"
    part.write_text("model: {init_args: {dropout: 0.5}}\ntrainer: {max_epochs: 7}\n")
    for words in (
        ["toy/points"],
        ["--ckpt_path=runs/toy/points/1", "--model=toys.ToyTask"],
        ["toy/points", "--ckpt_path", "runs/toy/points/1"],
    ):
        config = config_of(*words, "-c", str(part), capsys=capsys)
        assert config["model"]["init_args"]["dropout"] == 0.5
        assert config["model"]["init_args"]["optimizer"]["lr"] == 0.01, "the rest stays"
        assert config["trainer"]["max_epochs"] == 7


def test_later_file_beats_earlier(project, capsys):
    for number in (1, 2):
        Path(f"{number}.yaml").write_text(f"data: {{init_args: {{batch_size: {number}}}}}\n")
    config = config_of("toy/points", "-c", "1.yaml", "--config=2.yaml", capsys=capsys)
    assert config["data"]["init_args"]["batch_size"] == 2


def test_command_line_beats_file_wherever_it_stands(project, capsys):
    Path("part.yaml").write_text("model: {init_args: {dropout: 0.5}}\n")
    for words in (["-c", "part.yaml", "--model.dropout", "0.6"], ["--model.dropout=0.6", "-c", "part.yaml"]):
        assert config_of("toy/points", *words, capsys=capsys)["model"]["init_args"]["dropout"] == 0.6


def test_command_line_beats_checkpoint(finished, capsys):
    words = ["--ckpt_path", "runs/toy/points/1", "--model", "toys.ToyTask", "--model.optimizer.lr", "0.5"]
    config = config_of(*words, capsys=capsys)
    assert config["model"]["init_args"]["optimizer"]["lr"] == 0.5
    assert config["model"]["init_args"]["dropout"] == 0.2


def test_short_names_and_forms(project, capsys):
    words = ["--model", "ToyTask", "--model.backbone", "hybrid_test", "--data", "ToyData", "--data.path", "points.csv"]
    config = config_of(*words, "--model.optimizer.lr=1e-4", capsys=capsys)
    assert config["model"]["class_path"] == "toys.ToyTask"
    assert config["model"]["init_args"]["backbone"] == "hybrid_test"
    assert config["model"]["init_args"]["optimizer"]["lr"] == 1e-4
    assert config["data"]["init_args"]["path"] == "points.csv"


def test_initial_weights_without_the_word_model(project, capsys):
    for words in (["--init_from", "dna_lm"], ["--init_from=dna_lm"], ["--model.init_from", "dna_lm"]):
        assert config_of("toy/points", *words, capsys=capsys)["model"]["init_args"]["init_from"] == "dna_lm"


def test_backbone_config_class_by_short_name(project, capsys):
    words = ["--model.backbone", "ILLaMAConfig", "--model.backbone.dim", "8", "--model.backbone.depth", "1"]
    config = config_of(
        "toy/points", *words, "--model.backbone.num_heads=2", "--model.backbone.hidden_dim=8", capsys=capsys
    )
    assert config["model"]["init_args"]["backbone"]["class_path"] == "vertebra.backbones.illama.ILLaMAConfig"
    assert config["model"]["init_args"]["backbone"]["init_args"]["dim"] == 8


def test_printed_config_is_a_config(project, capsys):
    assert main(["config", "toy/points", "--model.dropout", "0"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# vertebra config toy/points --model.dropout 0\n")
    Path("mine.yaml").write_text(text)
    assert config_of("-c", "mine.yaml", capsys=capsys) == yaml.safe_load(text)


# ---------------------------------------------------------------- error texts


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("--model.dropot 0.3", "ToyTask has no option --model.dropot. Did you mean --model.dropout?"),
        ("--model.init_args.dropot=0.3", "ToyTask has no option --model.dropot. Did you mean --model.dropout?"),
        ("--model.optimizer.lrr 1", "OptimizerConfig has no option --model.optimizer.lrr. Did you mean "
         "--model.optimizer.lr?"),
        ("--data.pth x", "ToyData has no option --data.pth. Did you mean --data.path?"),
        ("--data.zzz x", "ToyData has no option --data.zzz. Its options: path, with_test, batch_size, seed."),
        ("--model.dropout abc", "--model.dropout: must be float, got 'abc'."),
        ("--model.dropout 3", "ToyTask: dropout must be below 1, got 3.0."),
        ("--model.optimizer.lr=-1", "OptimizerConfig: lr must be above 0, got -1.0."),
        ("--model.backbone illama_nan", "unknown backbone 'illama_nan'. Did you mean 'illama_nano'"),
        ("--model.backbone.depth 3", "--model.backbone.depth: fields of a backbone chosen by name are changed in its "
         "name: --model.backbone NAME,depth=3"),
        ("--model.mode evn", "--model.mode: must be one of plain, odd, got 'evn'."),
        ("--model ToyTsk", "--model: unknown class 'ToyTsk'. Did you mean ToyTask?"),
        ("--model toys.ToyTsk", "--model: the class 'toys.ToyTsk' cannot be imported"),
        ("--model nix.Task", "--model: the class 'nix.Task' cannot be imported (No module named 'nix')."),
        ("--trainer.max_step 3", "the trainer has no option --trainer.max_step. Did you mean --trainer.max_steps"),
        ("--trainer.max_steps abc", "--trainer.max_steps: must be int, got 'abc'."),
        ("--trainer.accelerator nix", "--trainer: You selected an invalid accelerator name"),
        ("--modl.dropout 3", "fit: there is no option --modl.dropout. Did you mean --model.dropout? See: vertebra fit "
         "--help"),
        ("--ckpt_pth x", "fit: there is no option --ckpt_pth. Did you mean --ckpt_path?"),
        ("stray", "fit: 'stray' is not understood here; RECIPE comes first and options begin with --."),
        ("-c nix.yaml", "-c: no such file 'nix.yaml'."),
        ("--root", "--root needs a value."),
        ("-o x", "fit: -o is for predict, test and validate"),
    ],
)  # fmt: skip
def test_error_texts(project, capsys, words, text):
    assert main(["fit", "toy/points", *words.split()]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"vertebra: error: {text}")
    assert err.count("\n") == 1
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("model: {init_args: {dropot: 1}}", "ToyTask has no option --model.dropot. Did you mean --model.dropout?"),
        (
            "trainer: {max_step: 1}",
            "the trainer has no option trainer.max_step (in a file). Did you mean --trainer.max_steps",
        ),
        ("modle: {x: 1}", "fit: there is no option modle.x (in a file). Did you mean --model.x?"),
        ("a: [", "bad.yaml, line 1: not YAML"),
        ("- a", "bad.yaml: must hold sections such as model:, data: and trainer:, got a list."),
    ],
)
def test_error_texts_for_files(project, capsys, content, text):
    Path("bad.yaml").write_text(content)
    assert main(["fit", "toy/points", "-c", "bad.yaml"]) == 2
    assert capsys.readouterr().err.startswith(f"vertebra: error: {text}")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            "--trainer.max_steps=1",
            "fit: no model is named; give a recipe (see: vertebra list recipes), -c FILE, --model CLASS",
        ),
        ("--model ToyTask", "fit: no data is named; give a recipe, -c FILE or --data CLASS."),
        ("--model ToyTask --data ToyData", "ToyData needs --data.path."),
        ("toy.yaml", "fit: RECIPE is the name of a packaged recipe, got a file; write -c toy.yaml"),
    ],
)
def test_incomplete_commands(project, capsys, words, text):
    assert main(["fit", *words.split()]) == 2
    assert capsys.readouterr().err.startswith(f"vertebra: error: {text}")


def test_bug_in_a_task_shows_its_traceback(project, capsys, monkeypatch):
    import toys

    monkeypatch.setattr(toys.ToyTask, "training_step", lambda self, batch, i: 1 / 0)
    assert main(["fit", "toy/points"]) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_help_is_short_and_help_all_is_whole(project, capsys):
    assert main(["fit", "--help"]) == 0
    short = capsys.readouterr().out
    assert "toy/points" in short or "recipes:" in short
    assert short.count("\n") < 40
    assert main(["fit", "toy/points", "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert "--trainer.accumulate_grad_batches" in whole
    assert "--model" in whole
