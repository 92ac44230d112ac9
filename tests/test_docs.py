"""Every command and every Python block of the README files runs, in order, on sample data."""

import re
import shlex
from pathlib import Path

import pytest

from vertebra.backbones.catalog import bundled_models
from vertebra.cli import main

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "domains").glob("*/README.md")))]
SHORT = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.limit_test_batches", "1"]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.slow
@pytest.mark.timeout(900)  # a page is dozens of commands, some of which start processes
@pytest.mark.parametrize("page", PAGES)
def test_commands_run(page, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    lines = [line for block in blocks(page, "bash") for line in block.splitlines() if line.startswith("vertebra ")]
    assert lines
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        status = main([*words, *(SHORT if words[0] == "fit" else [])])
        assert status == 0, f"{line}\n{capfd.readouterr().err[-2000:]}"


@pytest.mark.parametrize("page", PAGES)
def test_python_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "python"):
        exec(compile(block, page, "exec"), {"__name__": "readme"})


def test_make_targets_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks("README.md", "bash"):
        for line in block.splitlines():
            if line.startswith("make "):
                assert re.search(rf"^{line.split()[1]}:", makefile, re.M)


@pytest.mark.parametrize("name", list(bundled_models()))
def test_bundled_models_are_small_and_described(name):
    folder = bundled_models()[name]
    assert (folder / "model.safetensors").stat().st_size <= 4 * 2**20
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in ("## Data", "## Licence", "## Metrics", "vertebra fit"):
        assert part in card
    assert "Not stated" not in card
