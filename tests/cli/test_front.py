import json
import re
import struct
import subprocess
import sys
import time

import pytest

from vertebra import __version__
from vertebra.backbones.catalog import bundled_models
from vertebra.cli import VERBS, main
from vertebra.cli.headers import read_safetensors_header
from vertebra.errors import LoadError

LIGHT = [
    ["--help"],
    ["--version"],
    ["list"],
    ["list", "backbones"],
    ["convert", "--help"],
    ["export", "--help"],
    ["info", "illama_nano"],
    ["doctor", "--short"],
    ["fit", "--help"],
    ["run", "--help"],
    ["scaling", "--help"],
]


@pytest.mark.parametrize("args", LIGHT, ids=" ".join)
def test_light_verbs_do_not_import_torch(args):
    code = (
        "import sys; from vertebra.cli import main; main(sys.argv[1:]); print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code, *args], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "False"
    assert done.stdout


def test_help_imports_little_and_is_quick():
    times = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-P", "-X", "importtime", "-m", "vertebra", "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        times.append(time.perf_counter() - start)
    imported = re.findall(r"\|\s+([\w.]+)$", done.stderr, re.M)
    assert not {"torch", "numpy", "lightning", "rich", "yaml", "jsonargparse"} & set(imported)
    assert min(times) < 1, times


def test_help_names_every_verb(capsys):
    assert main(["--help"]) == main([]) == 0
    out = capsys.readouterr().out
    assert all(f"vertebra {verb} " in out for verb in VERBS)


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"vertebra {__version__}\n"


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["tset"], "unknown command 'tset'. Did you mean 'test'"),
        (["list", "--jsn"], "list: '--jsn' is not accepted. Did you mean --json? See: vertebra list --help"),
        (["list", "backbones", "a", "b"], "list: at most one of"),
        (
            ["list", "nosuchthing"],
            "list: nothing among the backbones and models and recipes and pipelines is called like",
        ),
        (["info", "ilama_nano"], "unknown name 'ilama_nano'. Did you mean 'illama_nano'"),
        (["info"], "info: the following arguments are required: NAME|DIR|FILE.ckpt. See: vertebra info --help"),
        (["sample", "dan", "-o", "x"], "unknown domain 'dan'"),
        (["run", "dna/clasify", "x", "-o", "y"], "unknown pipeline 'dna/clasify'"),
        (["run", "--model", "x"], "run: the pipeline comes first"),
        (["demo", "dan"], "unknown domain 'dan'"),
        (["fit"], "fit: give a recipe, -c FILE or --ckpt_path X; see: vertebra fit --help"),
        (["fit", "no/such"], "unknown recipe 'no/such'"),
    ],
)
def test_user_errors_are_one_sentence_with_status_2(args, text, capsys):
    assert main(args) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"vertebra: error: {text}")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err


def test_bug_has_status_1_and_a_traceback(monkeypatch, capsys):
    monkeypatch.setattr("vertebra.cli.listing.entries", lambda kind: 1 / 0)
    assert main(["list"]) == 1
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err
    assert "this is a bug in vertebra" in err


def test_interrupt_has_status_130(monkeypatch, capsys):
    def interrupt(kind):
        raise KeyboardInterrupt

    monkeypatch.setattr("vertebra.cli.listing.entries", interrupt)
    assert main(["list"]) == 130
    assert capsys.readouterr().err == "\ninterrupted.\n"


def test_list_filters_by_kind_and_pattern(capsys):
    assert main(["list", "backbones", "hybrid_3*", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == ["hybrid_300m", "hybrid_3b"]
    assert rows[0]["family"] == "hybrid"
    assert rows[0]["params"] > 1e8
    assert main(["list", "nano", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"] for row in found["backbones"]} >= {"illama_nano", "hybrid_nano"}


def test_list_prints_whole_lines_to_a_pipe(capsys):
    assert main(["list", "backbones"]) == 0
    line = next(n for n in capsys.readouterr().out.splitlines() if n.startswith("illama_tiny"))
    assert line.split()[:6] == ["illama_tiny", "illama", "5.3M", "192", "12", "yes"]


def test_info_of_a_preset(capsys):
    assert main(["info", "hybrid_test"]) == 0
    out = capsys.readouterr().out
    assert "family      hybrid" in out
    assert "vertebra fit RECIPE --model.backbone hybrid_test" in out


def test_info_says_whether_a_pipeline_needs_a_model(capsys):
    assert main(["info", "action/tokenize"]) == 0
    assert re.search(r"^model +not needed$", capsys.readouterr().out, re.M)
    assert main(["info", "action/predict"]) == 0
    assert re.search(r"^model +action_arm$", capsys.readouterr().out, re.M)


def test_info_of_a_model_directory_reads_headers_alone(tmp_path, capsys):
    header = {"w": {"dtype": "F32", "shape": [3, 4], "data_offsets": [0, 48]}, "__metadata__": {"a": "b"}}
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(48))
    config = {"format": 1, "task": "toy/x", "model": "toys.ToyModel", "backbone": {"family": "illama", "dim": 4}}
    config |= {
        "spec": {"domain": "toy", "classes": ["a"]},
        "metrics": {"test/acc": 0.51234},
        "command": "vertebra fit x",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["info", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for text in ("toy/x", "12 (12)", "F32", "family=illama  dim=4", "test/acc=0.5123", "vertebra fit x", '["a"]'):
        assert text in out
    assert main(["info", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 12


def test_info_of_a_folder_of_another_kind(tmp_path, capsys):
    assert main(["info", str(tmp_path)]) == 2
    assert "neither a model directory (config.json) nor a run folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\xff" * 64, struct.pack("<Q", 4) + b"nope", struct.pack("<Q", 2) + b"[]"]
)
def test_broken_safetensors_headers_are_refused(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoadError, match="safetensors file"):
        read_safetensors_header(path)


def test_truncated_safetensors_file_is_refused(tmp_path):
    text = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(5))
    with pytest.raises(LoadError, match="it was cut short"):
        read_safetensors_header(path)


def test_doctor_names_versions_devices_and_extras(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"torch \d", out)
    assert "threads used by torch" in out
    assert "cuda" in out


def test_doctor_tells_a_missing_core_package(monkeypatch, capsys):
    monkeypatch.setattr("vertebra.cli.doctor.CORE", ["numpy", "no-such-package"])
    assert main(["doctor", "--short"]) == 2
    assert "missing: no-such-package; repair with" in capsys.readouterr().err


def test_list_models_shows_size_context_and_licence(capsys):
    assert main(["list", "models", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == set(bundled_models())
    for row in rows.values():
        assert all(row[key] for key in ("size", "context", "licence", "metrics")), row
        assert len(row["metrics"]) <= 3
    assert rows["speech_digits"]["licence"] == "CC BY-SA 4.0"
    assert rows["timeseries_zero"]["context"] == "512 steps"
