"""The scaling-law models against their definition, and checkpoints by the published names."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from made_series import made
from safetensors.torch import load_file, save_file
from tests.reference import tsfm as slow

from vertebra.backbones.base import create_backbone
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.backbones.tsfm import TSFMConfig
from vertebra.domains.conversion import convert, converters, find_converter
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.published import (
    TSFMConverter,
    from_published,
    load_published,
    published_config,
    published_names,
    to_published,
)
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, LoadError

KINDS = ("encoder", "decoder")
both_kinds = pytest.mark.parametrize("kind", KINDS)


def shape_of(**changes):
    return {**slow.SHAPE, **changes}


def drawn(kind, seed=0, **changes):
    torch.manual_seed(seed)
    return slow.published_tensors(**shape_of(**changes), decoder=kind == "decoder")


def saved(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def built(tmp_path, tensors, **options):
    return load_published(saved(tmp_path / "checkpoint", tensors), **options)


def log_prob(model, target, observed, sample_id, predicted):
    """Log density of raw values, (R, S, P)."""
    numbers, loc, scale = model.packed(target, observed, sample_id - 1, predicted)
    return model.param_proj.log_prob(numbers, (target - loc) / scale) - scale.log()


# ---------------------------------------------------------------- numbers


@both_kinds
@pytest.mark.parametrize(
    "changes",
    [{}, {"dim": 24, "heads": 1, "hidden": 64, "layers": 1, "patch": 8}, {"dim": 32, "heads": 4, "layers": 3}],
)
def test_densities_and_gradients_are_those_of_the_definition(tmp_path, kind, changes):
    tensors = drawn(kind, **changes)
    rows = slow.packed_rows(shape_of(**changes)["patch"])
    target, observed, sample_id, predicted = rows
    model = built(tmp_path, tensors)
    counted = observed & predicted[..., None]
    assert (~observed & (sample_id > 0)[..., None]).any(-1).sum() > 10  # values are missing inside of patches
    wanted = {name: tensor.double().requires_grad_() for name, tensor in tensors.items()}
    expected = slow.log_prob(wanted, *rows)
    assert (expected.isnan() == ~predicted[..., None]).all()
    found = log_prob(model, *rows)
    torch.testing.assert_close(found[counted].double(), expected[counted], atol=1e-5, rtol=0)
    loss, slow_loss = model.packed_loss(target, observed, sample_id - 1, predicted), slow.packed_nll(wanted, *rows)
    torch.testing.assert_close(loss.double(), slow_loss, atol=1e-5, rtol=0)
    loss.backward()
    slow_loss.backward()
    names = published_names(len(model.backbone.layers), kind == "decoder")
    for name, parameter in model.named_parameters():
        grad = torch.cat([wanted[theirs].grad for theirs in names[name]])
        assert grad.abs().max() > 0, name
        torch.testing.assert_close(
            parameter.grad.double(), grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@both_kinds
def test_series_far_from_zero_are_near_the_definition(tmp_path, kind):
    """At a level of 200 spreads, what float32 rounds off a location is seen; the definition subtracts in float64."""
    tensors, rows = drawn(kind), slow.packed_rows(slow.SHAPE["patch"], level=200.0)
    counted = rows[1] & rows[3][..., None]
    with torch.no_grad():
        found = log_prob(built(tmp_path, tensors), *rows)[counted].double()
        torch.testing.assert_close(found, slow.log_prob(tensors, *rows)[counted], atol=2e-3, rtol=0)


@both_kinds
def test_golden_numbers(golden, tmp_path, kind):
    found = load_file(golden / "timeseries" / f"tsfm_{kind}.safetensors")
    weights = {name.removeprefix("weights."): t for name, t in found.items() if name.startswith("weights.")}
    rows = [found[name] for name in ("target", "observed", "sample_id", "predicted")]
    model, expected = built(tmp_path, weights), found["log_prob"]
    counted = rows[1] & rows[3][..., None]
    assert counted.sum() > 20
    with torch.no_grad():
        torch.testing.assert_close(log_prob(model, *rows)[counted].double(), expected[counted], atol=1e-5, rtol=0)
        loss = model.packed_loss(rows[0], rows[1], rows[2] - 1, rows[3])
    torch.testing.assert_close(loss.double(), found["loss"], atol=1e-5, rtol=0)
    torch.testing.assert_close(slow.log_prob(weights, *rows), expected, atol=1e-9, rtol=0, equal_nan=True)


@both_kinds
def test_packed_series_are_as_if_alone(tmp_path, kind):
    model, rows = built(tmp_path, drawn(kind)), slow.packed_rows(slow.SHAPE["patch"])
    target, observed, sample_id, predicted = rows
    with torch.no_grad():
        whole, losses = log_prob(model, *rows), []
        for r, row in enumerate(sample_id):
            for sample in range(1, int(row.max()) + 1):
                here = row == sample
                alone = [t[None, r, here] for t in (target, observed, torch.ones_like(sample_id), predicted)]
                mark = predicted[r, here]
                told = log_prob(model, *alone)[0, mark]
                torch.testing.assert_close(told, whole[r, here][mark], atol=1e-5, rtol=1e-5)
                losses.append(model.packed_loss(alone[0], alone[1], alone[2] - 1, alone[3]))
        loss = model.packed_loss(target, observed, sample_id - 1, predicted)
    torch.testing.assert_close(torch.stack(losses).mean(), loss, atol=1e-5, rtol=1e-5)


@both_kinds
def test_what_is_predicted_is_not_seen(tmp_path, kind):
    """Nor is what a missing value holds; a decoder's patch reads those predicted before it, in training."""
    model, rows = built(tmp_path, drawn(kind)), slow.packed_rows(slow.SHAPE["patch"])
    target, observed, sample_id, predicted = rows
    hidden = predicted[..., None] | ~observed
    noisy = torch.where(hidden, 100 * torch.randn_like(target), target)
    with torch.no_grad():
        (a, *of_a), (b, *of_b) = (model.packed(t, observed, sample_id - 1, predicted) for t in (target, noisy))
    first = predicted & ~torch.nn.functional.pad(predicted[:, :-1], (1, 0))  # the first one of every series
    mark = first if kind == "decoder" else predicted
    torch.testing.assert_close(a[mark], b[mark], atol=0, rtol=0)
    torch.testing.assert_close(of_a, of_b, atol=0, rtol=0)


def test_windows_are_packed_rows_of_one_series(tmp_path):
    """What ``forward`` says of the steps behind a context is what ``packed`` says of marked patches behind it."""
    patch = slow.SHAPE["patch"]
    values = 5 + torch.randn(3, 6 * patch)
    segments, predicted = torch.zeros(3, 8, dtype=torch.long), torch.arange(8).expand(3, -1) >= 6
    rows = torch.nn.functional.pad(values, (0, 2 * patch)).unflatten(1, (8, patch))
    for kind in KINDS:
        model = built(tmp_path, drawn(kind), context=6 * patch, horizon=2 * patch)
        with torch.no_grad():
            numbers, loc, scale = model(values[:, None], torch.ones_like(values[:, None]).bool())
            packed, *of_packed = model.packed(rows, torch.ones_like(rows).bool(), segments, predicted)
        count = 1 if kind == "decoder" else 2  # a decoder says one patch at a time
        expected = packed[:, 6 : 6 + count].movedim(1, 2).flatten(2)  # (R, K, n P)
        torch.testing.assert_close(numbers[:, 0], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close([loc, scale], [t[:, :1] for t in of_packed])


@both_kinds
def test_a_loaded_model_forecasts_beyond_its_horizon(tmp_path, kind):
    model = built(tmp_path, drawn(kind), context=20, horizon=8)
    values = torch.randn(2, 1, 20)
    found = model.forecast({"values": values, "observed": torch.ones_like(values).bool()}, horizon=21)
    assert found.mean.shape == (2, 1, 21)
    assert found.quantiles.shape == (2, 1, 9, 21)
    assert found.quantiles.isfinite().all()
    assert (found.quantiles.diff(dim=2) >= 0).all()


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("backbone", "count"),
    [
        ("tsfm_1k", 5_752),
        ("tsfm_10k", 27_656),
        ("tsfm_100k", 136_384),
        ("tsfm_300k", 338_112),
        ("tsfm_1m", 1_877_056),
        ("tsfm_3m", 4_887_552),
        ("tsfm_10m", 14_373_504),
        ("tsfm_30m", 38_092_288),
        ("tsfm_100m", 127_852_544),
        ("tsfm_300m", 302_995_968),
        ("tsfm_1b", 1_020_171_776),
        ("tsfm_1b_decoder", 906_911_232),
    ],
)
def test_whole_models_have_the_published_sizes(backbone, count):
    with torch.device("meta"):
        model = forecaster(backbone, patch=32)
    assert sum(p.numel() for p in model.parameters()) == count
    names = published_names(model.backbone.config.depth, model.backbone.config.causal)
    assert names.keys() == model.state_dict().keys()


# ---------------------------------------------------------------- names


def forecaster(backbone="tsfm_test,causal=false", spec=None, **options):
    given = {"patch": 4, "head": "mixture", "tell_observed": False, **options}
    return PatchForecaster(create_backbone(backbone), spec or SeriesSpec(context=40, horizon=8), **given)


@both_kinds
def test_round_trip(tmp_path, kind):
    tensors = drawn(kind)
    model = built(tmp_path, tensors)
    again = to_published(model)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)
    assert len({t.data_ptr() for t in again.values()}) == len(again)
    own = model.state_dict()
    renamed = from_published(again)
    assert renamed.keys() == own.keys()
    assert all(torch.equal(renamed[name], own[name]) for name in own)
    other = built(tmp_path / "..", again)
    assert other.backbone.config == model.backbone.config
    again["in_proj.bias"].add_(1)  # a copy
    assert torch.equal(model.in_proj.bias, tensors["in_proj.bias"])


@pytest.mark.parametrize("causal", [True, False])
def test_structure_is_read_off_the_tensors(causal):
    config = TSFMConfig(dim=48, depth=12, num_heads=3, hidden_dim=40, causal=causal)
    tensors = to_published(
        PatchForecaster(
            config.build(), SeriesSpec(context=64, horizon=16), patch=7, head="mixture", tell_observed=False
        )
    )
    assert published_config(tensors) == (config, 7)


def test_a_file_or_its_folder_and_the_settings_beside_it(tmp_path):
    told = {"d_model": 16, "num_layers": 2, "scaling": True, "max_seq_len": 512}
    folder = saved(tmp_path / "hub", drawn("encoder"), told)
    for path in (folder, str(folder), folder / "model.safetensors"):
        model = load_published(path)
        assert not model.training
        assert (model.spec.context, model.spec.horizon, model.patch) == (1000, 192, 4)
        assert (
            dataclasses.replace(model.backbone.config, hidden_dim=0) == create_backbone("tsfm_test,causal=false").config
        )


# ---------------------------------------------------------------- as a converter


@both_kinds
def test_the_converter_finds_loads_and_restores(tmp_path, kind):
    tensors = drawn(kind)
    folder = saved(tmp_path / "hub", tensors)
    checkpoint = open_checkpoint(folder)
    assert [c.name for c in converters().values() if c.recognises(checkpoint)] == ["tsfm"]
    converter, conversion = convert(folder)
    assert conversion.left_out == {}
    assert len(conversion.report.matched) == len(conversion.model.state_dict())
    restored, config = converter.restore(conversion.model)
    assert restored.keys() == tensors.keys()
    assert all(torch.equal(restored[name], tensors[name]) for name in tensors)
    assert config == {"d_model": 16, "num_layers": 2, "patch_size": 4, "scaling": True}
    again = saved(tmp_path / "again", restored, config)
    assert find_converter(open_checkpoint(again)) is converter
    save_model(convert(again)[1].model, tmp_path / "ours")
    one, other = conversion.model, load_model(tmp_path / "ours")
    series = [made("a", steps=60), made("b", steps=9, seed=1)]
    first, second = (SeriesForecaster(m).forecast(series, horizon=6) for m in (one, other))
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a.quantiles, b.quantiles)
        assert np.isfinite(a.quantiles).all()


@both_kinds
def test_missing_values_of_converted_models_are_raw_zeros(tmp_path, kind):
    """As in the definition, which has no mask: a zero that is observed, but for location and scale, reads the same."""
    model = TSFMConverter(context=16, horizon=4).convert(open_checkpoint(saved(tmp_path / "hub", drawn(kind)))).model
    values, observed = 7 + torch.randn(1, 1, 16), torch.ones(1, 1, 16, dtype=torch.bool)
    observed[..., [5, 6, 11]] = False
    values = values.masked_fill(~observed, 0)
    target = (values - model(values, observed)[1]) / model(values, observed)[2]  # (1, 1, T), missing ones as raw zeros
    whole = model._context(target.float(), torch.ones_like(observed), torch.zeros(1, 1, 1), None)[0]
    seen = model._context(
        torch.where(observed, target.float(), model._blank(*model(values, observed)[1:])),
        observed,
        torch.zeros(1, 1, 1),
        None,
    )[0]
    torch.testing.assert_close(seen, whole, atol=1e-5, rtol=1e-5)
    mean = load_published(tmp_path / "hub", context=16, horizon=4)
    assert (model(values, observed)[0] - mean(values, observed)[0]).abs().max() > 1e-3


def test_models_of_another_form_are_not_restored():
    converter = TSFMConverter()
    with pytest.raises(LoadError, match=r"tsfm: to_published: the model must have a TSFM backbone, head=mixture"):
        converter.restore(forecaster(head="quantile"))
    for backbone in ("illama_test", "tsfm_test,causal=false,rope_theta=500"):
        with pytest.raises(LoadError, match="tsfm: the model must be a forecaster with a TSFM backbone of the publish"):
            converter.restore(forecaster(backbone))


def test_other_folders_are_not_claimed(tmp_path):
    converter, tensors = converters()["tsfm"], drawn("encoder")
    for config in ({"model_type": "t5", "d_model": 16}, {"patch_sizes": [8], "d_model": 16}, {"width": 16}, [1]):
        assert not converter.recognises(open_checkpoint(saved(tmp_path / "hub", tensors, config)))
    (tmp_path / "empty").mkdir()
    assert not converter.recognises(open_checkpoint(tmp_path / "empty"))


# ---------------------------------------------------------------- what is refused


def test_files_that_are_none(tmp_path):
    with pytest.raises(LoadError, match=r"model.safetensors: no such safetensors file; give a folder that holds"):
        load_published(tmp_path)
    other = tmp_path / "last.ckpt"
    other.write_bytes(b"x")
    with pytest.raises(LoadError, match=r"last.ckpt: no such safetensors file; give a folder that holds"):
        load_published(other)
    (tmp_path / "model.safetensors").write_bytes(b"not one")
    with pytest.raises(LoadError, match=r"/model.safetensors: not a safetensors file, or cut short"):
        load_published(tmp_path)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"d_model": 64}, r"d_model is 64, but the weights beside it need 16; both files must be of one"),
        ({"num_layers": 3}, r"num_layers is 3, but the weights beside it need 2"),
        ({"scaling": False}, r"scaling is False, but the weights beside it need True"),
        ([1], r"config.json: must hold a JSON object"),
    ],
)
def test_settings_of_another_model(tmp_path, told, message):
    with pytest.raises(LoadError, match=message):
        load_published(saved(tmp_path / "hub", drawn("decoder"), told))


def test_settings_that_are_no_json(tmp_path):
    folder = saved(tmp_path / "hub", drawn("decoder"))
    (folder / "config.json").write_text("{")
    with pytest.raises(LoadError, match=r"config.json: not readable as JSON \("):
        load_published(folder)


def test_tensors_of_another_model(tmp_path):
    tensors = drawn("encoder")
    q_norm = "encoder.layers.0.self_attn.q_norm.weight"

    def refused(message, changed):
        with pytest.raises(LoadError, match=message):
            built(tmp_path, changed)

    moirai = {"encoder.layers.0.self_attn.var_attn_bias.emb.weight": torch.zeros(2, 2)}
    refused(r"model.safetensors: published TSFM: .*\(var_attn_bias\), so it is Moirai's; give one of", tensors | moirai)
    refused(r"the checkpoint lacks 'in_proj.weight'; give one of", {"shared.weight": torch.zeros(2, 2)})
    refused(r"'in_proj.weight' must have 2 axes, got \(5, 16, 4\)", tensors | {"in_proj.weight": torch.zeros(5, 16, 4)})
    refused(
        r"a width of 16 must be that of whole heads, each a multiple of 4; got 12", tensors | {q_norm: torch.ones(12)}
    )
    lacking = {name: t for name, t in tensors.items() if "layers.1.ffn" not in name}
    refused(r"lacks 'encoder.layers.1.ffn.fc1.weight', 3 tensors in all; is the file whole\?", lacking)
    extra = {"param_proj.proj.components.4.df.bias": torch.zeros(4)}
    refused(r"has no place for 'param_proj.proj.components.4.df.bias', 1 tensors in all", tensors | extra)
    refused(r"the weights of .* do not fit PatchForecaster: 1 misshapen: backbone.norm.weight \(9,\) -> \(16,\)",
            tensors | {"encoder.norm.weight": torch.ones(9)})  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"head": "quantile"},
        {"tell_observed": True},
        {"readout": "flatten"},
        {"seasonal": True},
        {"backbone": "illama_test"},
        {"spec": SeriesSpec(context=40, horizon=8, past=("x",), past_center=(0.0,), past_scale=(1.0,))},
    ],
)
def test_models_of_another_form_have_no_published_names(options):
    with pytest.raises(ConfigError, match="to_published: the model must have a TSFM backbone, head=mixture"):
        to_published(forecaster(**options))
