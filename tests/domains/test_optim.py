import math

import pytest
import torch
from torch import nn

from vertebra.backbones.base import create_backbone
from vertebra.domains.dna.model import DNAClassifier, DNALanguageModel
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.optim import OptimizerConfig, build_optimizer, lr_factor, parameter_table
from vertebra.errors import ConfigError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

SPEC = DNASpec(
    tokenizer=NucleotideTokenizer().to_dict(), task="classification", max_length=10, classes=("no", "yes"), bos=True
)


@pytest.mark.parametrize("name", ["illama_test", "hybrid_test"])
def test_only_matrices_decay(name):
    model = DNAClassifier(create_backbone(name), SPEC, head="cnn", positions="learned")
    table = parameter_table(model, OptimizerConfig(weight_decay=0.1))
    assert table.keys() == dict(model.named_parameters()).keys()
    for key, parameter in model.named_parameters():
        free = parameter.ndim < 2 or key.split(".")[-1] in ("A_log", "dt_bias", "D")
        free = free or key.startswith(("embed.", "positions.")) or "conv1d" in key
        assert (table[key][1] == 0) == free, key


def test_tied_matrix_does_not_decay():
    model = DNALanguageModel(create_backbone("illama_test"), SPEC, tie=True)
    table = parameter_table(model, OptimizerConfig())
    assert table["embed.weight"][1] == 0
    assert "head.weight" not in table


def test_layer_wise_rates():
    model = DNAClassifier(create_backbone("illama_test"), SPEC)
    table = parameter_table(model, OptimizerConfig(lr=1.0, layer_decay=0.5, backbone_lr_ratio=0.1))
    layers = model.backbone.num_layers
    assert table["head.1.weight"][0] == 1.0
    assert table["embed.weight"][0] == pytest.approx(0.1 * 0.5 ** (layers + 1))
    for key, (rate, _) in table.items():
        if key.startswith("backbone."):
            depth = model.backbone.layer_of(key.removeprefix("backbone."))
            assert rate == pytest.approx(0.1 * 0.5 ** (layers - depth)), key


def test_groups_hold_every_parameter_once():
    model = DNAClassifier(create_backbone("hybrid_test"), SPEC)
    optimizer, _ = build_optimizer(model, OptimizerConfig(layer_decay=0.9), 10)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


@pytest.mark.parametrize(("schedule", "last"), [("cosine", 0.1), ("linear", 0.1), ("constant", 1.0)])
def test_schedule(schedule, last):
    config = OptimizerConfig(schedule=schedule, warmup=0.2, min_lr_ratio=0.1)
    factors = [lr_factor(step, config, 100) for step in range(101)]
    assert factors[:20] == pytest.approx([(step + 1) / 21 for step in range(20)])
    assert factors[20] == pytest.approx(1.0)
    assert factors[100] == pytest.approx(last)
    assert lr_factor(500, config, 100) == pytest.approx(last)
    if schedule == "cosine":
        assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)


def test_warmup_as_a_number_of_steps():
    assert lr_factor(3, OptimizerConfig(warmup=7), 100) == pytest.approx(0.5)


def test_learning_rate_follows_the_schedule():
    layer = nn.Linear(2, 2)
    optimizer, schedule = build_optimizer(layer, OptimizerConfig(lr=0.5, warmup=1, schedule="linear"), 11)
    rates = []
    for _ in range(3):
        rates.append(optimizer.param_groups[0]["lr"])
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.25, 0.5, 0.5 * (0.05 + 0.95 * 0.9)])


def test_endless_run_needs_a_constant_schedule():
    with pytest.raises(
        ConfigError, match=r"schedule 'cosine' with warmup 0\.1 needs a run of known length; set trainer"
    ):
        build_optimizer(nn.Linear(1, 1), OptimizerConfig(), math.inf)
    build_optimizer(nn.Linear(1, 1), OptimizerConfig(schedule="constant", warmup=10), math.inf)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"lr": 0.0}, "lr must be above 0, got 0.0"),
        ({"schedule": "step"}, "schedule must be cosine, linear or constant, got 'step'"),
        ({"min_lr_ratio": 2.0}, "min_lr_ratio from 0 to 1, got 0.1 and 2.0"),
    ],
)
def test_impossible_settings_are_refused(change, text):
    with pytest.raises(ConfigError, match=text):
        OptimizerConfig(**change)
