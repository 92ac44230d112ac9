import csv
import random
import sys
from pathlib import Path

import pytest
import torch

RECIPE = """\
# Toy points: a second.
#   vertebra fit toy/points
model:
  class_path: toys.ToyTask
  init_args:
    backbone: illama_test
    dropout: 0.2
    optimizer: {lr: 0.01, schedule: constant, warmup: 0}
data: {class_path: toys.ToyData, init_args: {path: points.csv}}
trainer:
  max_epochs: 2
  accelerator: cpu
  log_every_n_steps: 1
  enable_progress_bar: false
  enable_model_summary: false
"""


@pytest.fixture(scope="session", autouse=True)
def _toys_importable():
    sys.path.insert(0, str(Path(__file__).parent))
    yield
    sys.path.remove(str(Path(__file__).parent))


def write_project(folder):
    """Make a folder with 32 points, and the recipe as ``toy.yaml``."""
    rng = random.Random(0)
    rows = [f"{i % 2}," + ",".join(f"{rng.gauss(i % 2, 1):.3f}" for _ in range(6)) for i in range(32)]
    (folder / "points.csv").write_text("\n".join(rows) + "\n")
    (folder / "toy.yaml").write_text(RECIPE)


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A working folder with the toy's data; ``toy/points`` is a recipe in it."""
    write_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    _add_recipe(monkeypatch, tmp_path / "toy.yaml")
    return tmp_path


def _add_recipe(monkeypatch, path):
    from vertebra.cli import recipes

    packaged = recipes.recipes()
    monkeypatch.setattr(recipes, "recipes", lambda: {**packaged, "toy/points": path})


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A finished run of the toy, made once: its project folder."""
    import os

    from vertebra.cli import main

    folder = tmp_path_factory.mktemp("trained")
    write_project(folder)
    before = Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            _add_recipe(patch, folder / "toy.yaml")
            assert main(["fit", "toy/points"]) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def finished(trained, monkeypatch):
    """The project folder of the finished run, as working folder."""
    monkeypatch.chdir(trained)
    _add_recipe(monkeypatch, trained / "toy.yaml")
    return trained


@pytest.fixture
def rows_of():
    """A function: the rows of a CSV."""

    def read(path):
        with Path(path).open(newline="") as f:
            return list(csv.DictReader(f))

    return read


@pytest.fixture
def same_weights():
    """A function: whether two checkpoints hold equal weights."""

    def compare(a, b):
        a, b = (torch.load(p, weights_only=True)["state_dict"] for p in (a, b))
        return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    return compare
