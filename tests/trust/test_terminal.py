"""What a file holds reaches the terminal as text."""

import io
import json

import pytest
from hostile import change, saved

from vertebra.backbones.loading.pretrained import LoadReport
from vertebra.cli import main
from vertebra.cli.tables import print_table
from vertebra.domains.saving import load_model
from vertebra.errors import LoadError, VertebraError, printable
from vertebra.pipelines.prediction import Prediction

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
