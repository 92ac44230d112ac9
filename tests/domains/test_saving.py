import json
import os

import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import ConfigError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

SPEC = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="classification", max_length=20, classes=("no", "yes"))
IDS = torch.randint(7, 11, (3, 20), generator=torch.Generator().manual_seed(0))


def make_model():
    return DNAClassifier(create_backbone("hybrid_test"), SPEC, pooling="echo", head="mlp", positions="learned")


def test_tied_model_round_trip(tmp_path):
    model = DNALanguageModel(create_backbone("illama_test"), SPEC, tie=True).eval()
    again = load_model(save_model(model, tmp_path / "m"))
    assert again.head.weight is again.embed.weight
    torch.testing.assert_close(again(IDS), model(IDS))


def test_card_says_what_it_is(tmp_path):
    notes = {"data": "Made-up promoters.", "licence": "CC0-1.0", "limits": "A toy."}
    folder = save_model(
        make_model(), tmp_path / "m", metrics={"test/mcc": 0.875}, command="vertebra fit x", notes=notes
    )
    card = (folder / "README.md").read_text()
    for text in (
        "Made-up promoters.",
        "CC0-1.0",
        "| test/mcc | 0.875 |",
        "    vertebra fit x",
        "## Limits",
        "hybrid backbone",
    ):
        assert text in card
    config = json.loads((folder / "config.json").read_text())
    assert config["task"] == "dna/classify"
    assert config["model"] == "vertebra.domains.dna.model.DNAClassifier"
    assert config["metrics"] == {"test/mcc": 0.875}


def test_a_failed_save_leaves_the_older_model(tmp_path):
    folder = save_model(make_model(), tmp_path / "m")
    with pytest.raises(TypeError):
        save_model(make_model(), folder, metrics={"bad": object()})
    load_model(folder)
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_place(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be written"):
        save_model(make_model(), tmp_path / "m")
