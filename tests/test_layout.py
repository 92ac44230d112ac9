"""The floors of the house, its links, and the sizes of its files."""

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("backbones", "configs", "domains", "pipelines", "tokenizers")
# Each floor may import from those to its left; tokenizers and backbones stand side by side.
FLOORS = {"errors": 0, "tokenizers": 1, "backbones": 1, "domains": 2, "pipelines": 3, "cli": 4}
NO_LIGHTNING = ("tokenizers", "backbones", "pipelines")


def sources():
    for folder in (*FOLDERS, "src/vertebra"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def imports(path):
    """All modules a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; imports are absolute"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    """Floor and, for what is a domain's own, the domain."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "src":
        parts = parts[2:]
    return parts[0], next((part for part in parts[1:] if (ROOT / "domains" / part).is_dir()), None)


@pytest.mark.parametrize("path", list(sources()), ids=lambda p: str(p.relative_to(ROOT)))
def test_no_import_runs_up(path):
    floor, domain = room(path)
    if floor not in FLOORS:
        return
    for module in imports(path):
        parts = module.split(".")
        if floor in NO_LIGHTNING:
            assert parts[0] not in ("lightning", "pytorch_lightning"), f"{path}: {floor} must not import lightning"
        if parts[0] != "vertebra" or len(parts) < 2 or parts[1] not in FLOORS:
            continue
        assert FLOORS[parts[1]] <= FLOORS[floor], f"{path} imports {module}, a higher floor"
        side_by_side = {floor, parts[1]} == {"tokenizers", "backbones"}
        assert not side_by_side, f"{path} imports {module}; tokenizers and backbones do not know each other"
        if domain and len(parts) > 2 and (ROOT / "domains" / parts[2]).is_dir():
            assert parts[1] != "domains" or parts[2] == domain, f"{path} imports another domain, {module}"


@pytest.mark.parametrize("path", [*sources()], ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_can_be_read_from_top_to_bottom(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 600


def test_links_setup_and_disk_agree():
    for folder in FOLDERS:
        link = ROOT / "src" / "vertebra" / folder
        assert (ROOT / folder).is_dir()
        assert link.resolve() == (ROOT / folder).resolve()
        assert not link.readlink().is_absolute()
    assert f"FOLDERS = {FOLDERS!r}".replace("'", '"') in (ROOT / "setup.py").read_text(encoding="utf-8")


def test_every_domain_has_the_same_files():
    domains = [p for p in (ROOT / "domains").iterdir() if p.is_dir() and (p / "task.py").exists()]
    assert domains
    for domain in domains:
        for name in ("data.py", "model.py", "task.py", "sample.py", "README.md"):
            assert (domain / name).is_file(), f"domains/{domain.name}/{name} is missing"


def test_our_tokenizers_say_who_they_are(tmp_path):
    result = subprocess.run([sys.executable, "-c", "import tokenizers"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "is vertebra.tokenizers, not the library 'tokenizers'" in result.stderr


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_whole_package(tmp_path):
    copy = tmp_path / "copy"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, tracked.stdout.split("\0")):
        source, target = ROOT / name, copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        elif source.is_file():
            target.write_bytes(source.read_bytes())
    command = [
        sys.executable,
        "-P",
        "-c",
        "import setuptools.build_meta as b; print(b.build_wheel('.'), b.build_sdist('.'))",
    ]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    wheel, sdist = result.stdout.split()[-2:]
    names = set(zipfile.ZipFile(copy / wheel).namelist())
    expected = set()
    for path in (p.relative_to(ROOT) for p in sources()):
        if (copy / path).exists():
            expected.add(str(path).removeprefix("src/") if path.parts[0] == "src" else f"vertebra/{path}")
    assert expected <= names
    assert "vertebra/py.typed" in names
    assert any(n.startswith("vertebra/configs/") and n.endswith(".yaml") for n in names)
    assert not any(n.startswith(("tokenizers/", "tests/", "vertebra/tests")) for n in names)
    with tarfile.open(copy / sdist) as archive:
        held = {n.partition("/")[2] for n in archive.getnames()}
    assert {"setup.py", "pyproject.toml", "backbones/base.py", "src/vertebra/errors.py"} <= held
