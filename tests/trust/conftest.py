"""Small models of ours, to be damaged."""

import shutil
import sys
from pathlib import Path

import pytest

from vertebra.backbones.base import resolve
from vertebra.backbones.loading.pretrained import read_config
from vertebra.domains.saving import build_model, save_model
from vertebra.domains.spec import DataSpec

sys.path.insert(0, str(Path(__file__).parent))  # for `hostile`


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


@pytest.fixture(scope="module")
def lightning():
    """What a small checkpoint of a training holds."""
    from vertebra.domains.dna.task import DNAClassificationTask

    task = DNAClassificationTask(backbone="hybrid_test")
    task.build(DataSpec.from_dict(read_config("dna_promoter")["spec"]))
    checkpoint = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "epoch": 1, "global_step": 2}
    task.on_save_checkpoint(checkpoint)
    return checkpoint
