"""Moirai 1.x against numbers of the original, and what is refused.

``golden/timeseries/moirai.npz``: weights (int8, in sixteenths), inputs and outputs of ``MoiraiModule`` and
``MoiraiForecast`` of uni2ts 2.0.0 with drawn weights: width 128, two layers, patches of 8, 16 and 32.
"""

import json

import numpy as np
import pytest
import torch
from made_series import made
from safetensors.torch import load_file, save_file

from vertebra.backbones.base import create_backbone
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.domains.conversion import convert, converters, find_converter
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.published_moirai import MoiraiConverter
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import LoadError

SIZES = (8, 16, 32)
PARTS = ("df", "t_loc", "t_scale", "normal_loc", "total_count", "logits", "log_loc", "log_scale")
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


@pytest.fixture
def original(golden):
    with np.load(golden / "timeseries" / "moirai.npz") as file:
        return {name: file[name] for name in file.files}


def published(original):
    """Tensors and config as the original saves them."""
    tensors = {n.removeprefix("weights."): torch.from_numpy(a) / 16 for n, a in original.items() if "weights." in n}
    return tensors, json.loads(original["config"].tobytes())


def written(folder, tensors, config=None):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


@pytest.fixture
def checkpoint(tmp_path, original):
    return written(tmp_path / "hub", *published(original))


def converted(checkpoint, patch=16, context=40, horizon=24):
    return MoiraiConverter(patch=patch, context=context, horizon=horizon).convert(checkpoint)


def told(model, original):
    """Numbers of the forecast windows, (3, 12, H), and location and scale."""
    past, seen = (torch.from_numpy(original[name])[:, None] for name in ("past", "seen"))
    with torch.no_grad():
        numbers, loc, scale = model(past, seen)
    return numbers[:, 0], loc[:, 0], scale[:, 0]


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("patch", SIZES)
def test_forecasts_are_those_of_the_original(original, checkpoint, patch):
    """A window that is not whole patches, a short series and one with gaps; every number of the mixture."""
    model = converted(checkpoint, patch).model
    numbers, loc, scale = told(model, original)
    wanted = {name: torch.from_numpy(original[f"patch{patch}.{name}"]) for name in ("weights", *PARTS)}
    assert not original["seen"][1, :10].any()
    torch.testing.assert_close(numbers[:, :4], wanted["weights"], **CLOSE)
    for i, name in enumerate(PARTS):
        torch.testing.assert_close(numbers[:, 4 + i], wanted[name], **CLOSE, msg=lambda m, n=name: f"{n}: {m}")
    truth = torch.from_numpy(original["truth"])
    found = model.param_proj.log_prob(numbers, ((truth - loc) / scale).float()) - scale.log()
    torch.testing.assert_close(found.float(), torch.from_numpy(original[f"patch{patch}.log_prob"]), atol=1e-4, rtol=0)
    mean = (model.param_proj.mean(numbers) * scale + loc).float()
    torch.testing.assert_close(mean, torch.from_numpy(original[f"patch{patch}.mean"]), atol=1e-4, rtol=1e-5)


def test_densities_of_packed_rows_are_those_of_the_original(original, checkpoint):
    model = converted(checkpoint).model
    rows = {name: torch.from_numpy(original[f"packed.{name}"]) for name in ("target", "observed", "predicted")}
    segments = torch.from_numpy(original["packed.sample_id"]).long() - 1
    with torch.no_grad():
        numbers, loc, scale = model.packed(rows["target"], rows["observed"], segments, rows["predicted"])
        z = ((rows["target"] - loc) / scale).float()
        found = model.param_proj.log_prob(numbers, z) - scale.log()
    counted = rows["observed"] & rows["predicted"][..., None]
    wanted = torch.from_numpy(original["packed.log_prob"])[counted]
    assert counted.sum() > 50
    assert (z[counted] < 0).any()
    assert (z[counted] > 0).any()
    torch.testing.assert_close(found[counted].float(), wanted, atol=1e-4, rtol=0)


def test_missing_values_are_read_as_the_original_does(original, checkpoint):
    """As a raw zero: with the window's mean instead, forecasts of the window with gaps differ, and only those."""
    conversion = converted(checkpoint, patch=8)
    model = conversion.model
    other = PatchForecaster(model.backbone, model.spec, **{**model.arguments, "missing": "mean"})
    other.load_state_dict(model.state_dict())
    (a, *_), (b, *_) = told(model, original), told(other.eval(), original)
    differs = (a - b).abs().amax((1, 2)) > 1e-3
    assert differs.tolist() == [False, True, True]


# ---------------------------------------------------------------- models


def test_a_converted_model_is_saved_loaded_and_forecasts(tmp_path, original, checkpoint):
    model = converted(checkpoint).model
    save_model(model, tmp_path / "saved")
    again = load_model(tmp_path / "saved")
    assert torch.equal(told(model, original)[0], told(again, original)[0])
    series = [made("a", steps=40), made("b", steps=21, seed=1)]
    first, second = (SeriesForecaster(m).forecast(series, horizon=20) for m in (model, again))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one.quantiles, other.quantiles)
        assert one.quantiles.shape == (9, 20, 1)
        assert (np.diff(one.quantiles, axis=0) >= 0).all()
        assert np.isfinite(one.mean).all()


def test_forecasts_say_what_the_mixture_is(original, checkpoint):
    """Levels of the forecast against the distribution function of its numbers, in the series' units."""
    from vertebra.domains.timeseries.heads import MoiraiHead

    model = converted(checkpoint).model
    values, seen = (torch.from_numpy(original[name])[:, None] for name in ("past", "seen"))
    numbers, loc, scale = told(model, original)
    quantiles = model.forecast({"values": values, "observed": seen}, quantiles=(0.1, 0.5, 0.9)).quantiles
    z = ((quantiles[:, 0].double() - loc[:, None]) / scale[:, None]).numpy()  # (3, Q, H)
    parts = numbers.double().numpy()
    for q, level in enumerate((0.1, 0.5, 0.9)):
        low, high = (MoiraiHead._below(z[:, q] + away, *np.moveaxis(parts, 1, 0)) for away in (-1e-5, 1e-5))
        assert (low <= level + 1e-9).all()
        assert (high >= level - 1e-9).all()


def test_what_is_left_out_is_told(checkpoint):
    conversion = converted(checkpoint)
    left = conversion.left_out
    assert "cancels in the softmax" in left["encoder.layers.1.self_attn.var_attn_bias.emb.weight"]
    assert left["in_proj.weight[0,2]"] == "for patches of 8, 32 steps; the model has patches of 16"
    assert "param_proj.proj.components.2.total_count.bias[0,2]" in left
    assert len(left) == 2 + 20
    assert "CC BY-NC 4.0" in conversion.notes["licence"]
    assert (conversion.report.missing, conversion.report.unexpected) == ([], [])


def test_the_family_is_found_and_the_usual_patch_taken(tmp_path, original, checkpoint):
    assert [c.name for c in converters().values() if c.recognises(checkpoint)] == ["moirai"]
    bare = written(tmp_path / "bare", published(original)[0])
    assert find_converter(bare).name == "moirai"
    tensors, config = published(original)
    wide = written(tmp_path / "wide", tensors, config | {"max_seq_len": 512})
    converter, conversion = convert(wide.path)
    assert converter.name == "moirai"
    spec = conversion.model.spec
    assert (conversion.model.patch, spec.context, spec.horizon) == (32, 2048, 192)


# ---------------------------------------------------------------- and back


def test_restored_models_have_one_patch_size(tmp_path, original, checkpoint):
    model = converted(checkpoint).model
    tensors, config = MoiraiConverter().restore(model)
    assert config["patch_sizes"] == [16]
    assert config["distr_output"] == published(original)[1]["distr_output"]
    assert tensors["in_proj.weight"].shape == (1, 128, 16)
    again = written(tmp_path / "again", tensors, config)
    back = converted(again)
    assert torch.equal(told(model, original)[0], told(back.model, original)[0])
    assert all("var_attn_bias" in name for name in back.left_out)
    twice, same = MoiraiConverter().restore(back.model)
    assert same == config
    saved = load_file(again.path / "model.safetensors")
    assert saved.keys() == twice.keys()
    assert all(torch.equal(saved[name], twice[name]) for name in saved)
    shared = tensors.keys() & published(original)[0].keys()
    assert shared == tensors.keys()
    tensors["mask_encoding.weight"].add_(1)  # a copy
    assert not torch.equal(tensors["mask_encoding.weight"], model.mask_encoding.weight)


def test_models_of_another_form_are_not_restored():
    def forecaster(backbone, **options):
        given = {"patch": 16, "head": "moirai", "tell_observed": False, **options}
        return PatchForecaster(create_backbone(backbone), SeriesSpec(context=32, horizon=16), **given)

    for model in (
        forecaster("tsfm_test"),
        forecaster("illama_test,causal=false"),
        forecaster("tsfm_100k", head="mixture"),
        forecaster("tsfm_100k", tell_observed=True),
    ):
        with pytest.raises(LoadError, match="moirai: the model must have a bidirectional TSFM backbone, head=moirai"):
            MoiraiConverter().restore(model)
    with pytest.raises(LoadError, match=r"a width of 16 has 0 heads in this family and 8/3 of it .* got 2 and 48"):
        MoiraiConverter().restore(forecaster("tsfm_test,causal=false"))
    tensors, config = MoiraiConverter().restore(forecaster("tsfm_100k"))
    assert tensors["encoder.layers.0.self_attn.var_attn_bias.emb.weight"].shape == (2, 1)
    assert config["max_seq_len"] == 512


# ---------------------------------------------------------------- what is refused


def student_alone(config):
    return config | {"distr_output": {"_target_": "uni2ts.distribution.student_t.StudentTOutput"}}


def wide_normal(config):
    parts = [dict(part) for part in config["distr_output"]["components"]]
    parts[1]["scale"] = 0.01
    return config | {"distr_output": config["distr_output"] | {"components": parts}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"patch_sizes": [8, 32, 64]}, r"patch_sizes is \[8, 32, 64\], without 16; take a patch of one"),
        (lambda c: c | {"patch_sizes": 16}, r"patch_sizes must be a list of numbers of steps, got 16"),
        (lambda c: c | {"patch_sizes": [8, 16]}, r"must be of shape \(2, 128, 16\) for its patch_sizes, got \(3, 128,"),
        (lambda c: c | {"scaling": False}, r"scaling is False; windows are always scaled here"),
        (lambda c: c | {"max_seq_len": 4}, r"max_seq_len is 4 patches, and 40 steps .* make 5 of 16; take fewer"),
        (lambda c: c | {"d_model": 64}, r"d_model is 64 in config.json, but the weights beside it need 128"),
        (lambda c: c | {"num_layers": 3}, r"num_layers is 3 in config.json, but the weights beside it need 2"),
        (student_alone, r"distr_output is StudentT; the head here is Mixture\(StudentT, NormalFixedScale\(scale=0.001"),
        (
            wide_normal,
            r"distr_output is Mixture\(StudentT, NormalFixedScale\(scale=0.01\), NegativeBinomial, LogNormal",
        ),
        (lambda c: {k: v for k, v in c.items() if k != "distr_output"}, r"distr_output is None; the head here"),
    ],
)
def test_settings_that_are_not_ours(tmp_path, original, change, message):
    tensors, config = published(original)
    with pytest.raises(LoadError, match=message):
        converted(written(tmp_path / "hub", tensors, change(config)))


def test_tensors_that_are_not_ours(tmp_path, original):
    tensors, config = published(original)

    def refused(message, changed, config=config):
        with pytest.raises(LoadError, match=message):
            converted(written(tmp_path / "hub", changed, config))

    name = "encoder.layers.1.ffn.fc2.weight"
    refused(rf"lacks '{name}', 1 tensors in all; is the file whole\?", {k: v for k, v in tensors.items() if k != name})
    refused(
        r"has no place for 'res_proj.weight', 1 tensors in all; give a", tensors | {"res_proj.weight": torch.ones(2)}
    )
    experts = {"encoder.layers.0.ffn.experts.3.fc1.weight": torch.zeros(2, 2)}
    refused(r"has experts \(ffn.experts\), so it is Moirai-MoE; give a checkpoint of Moirai 1.0", tensors | experts)
    refused(r"misshapen: backbone.norm.weight \(9,\)", tensors | {"encoder.norm.weight": torch.ones(9)})
    (tmp_path / "hub" / "config.json").unlink()
    refused(r"config.json with patch_sizes must stand beside the weights", tensors, None)
