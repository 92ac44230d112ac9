"""Forecasts of series: the same whatever else is forecast, in the series' units, from its past alone."""

import dataclasses

import numpy as np
import pytest
import torch
from made_series import made

from vertebra.backbones.base import create_backbone
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, DataError

CONTEXT, HORIZON = 24, 8
COVARIATES = {
    "past": ("p0",),
    "past_center": (0.0,),
    "past_scale": (1.0,),
    "known": ("k0",),
    "known_center": (0.0,),
    "known_scale": (1.0,),
}
KINDS = {
    "mixture": {"head": "mixture"},
    "quantile": {"head": "quantile", "seasonal": True, "squash": True},
    "causal": {"head": "quantile", "causal": True},
    "flatten": {"head": "point", "readout": "flatten", "shortcut": True},
    "together": {"head": "quantile", "mode": "multivariate"},
}


def forecaster(kind="quantile", **facts):
    torch.manual_seed(0)
    settings = dict(KINDS[kind])
    backbone = create_backbone("illama_test", causal=settings.pop("causal", False))
    if kind == "together":
        facts = {"variates": ("v0", "v1"), **facts}
    model = PatchForecaster(backbone, SeriesSpec(context=CONTEXT, horizon=HORIZON, **facts), patch=4, **settings)
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return SeriesForecaster(model)


def walk(name="x", steps=40, seed=0, **options):
    """A series that wanders, around 100."""
    one = made(name, steps=steps, seed=seed, **options)
    return dataclasses.replace(one, values=100 + np.cumsum(np.nan_to_num(one.values), 0) + 0 * one.values)


def some(count, **options):
    return [walk(f"s{i}", steps=3 + 5 * i, seed=10 + i, **options) for i in range(count)]


def close(found, wanted, rtol=1e-5):
    """Equal but for rounding, relative to the size of the numbers."""
    size = np.abs(wanted.mean).max()
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=0, atol=rtol * size)
    np.testing.assert_allclose(found.quantiles, wanted.quantiles, rtol=0, atol=rtol * size)


# ---------------------------------------------------------------- what does not matter


@pytest.mark.parametrize(
    ("kind", "horizon"), [*((kind, HORIZON) for kind in KINDS), ("mixture", 11), ("quantile", 19), ("causal", 11)]
)
def test_the_same_among_any_others(kind, horizon):
    predictor = forecaster(kind, **COVARIATES)
    options = {"width": 2 if kind == "together" else 1, "past": 1, "known": 1, "ahead": horizon}
    count = 8 if kind == "mixture" else 20  # its quantiles take long
    one, others = walk(steps=33, holes=(12, 30), **options), some(count, **options)
    (alone,) = predictor.forecast([one], horizon)
    first = predictor.forecast([one, *others], horizon)[0]
    last = predictor.forecast([*others, one], horizon)[-1]
    among = predictor.forecast([*others[:7], one, *others[7:]], horizon, batch_size=3)[7]
    assert alone.mean.std() > 1e-3
    for found in (first, last, among):
        assert found.series is one
        close(found, alone)


def test_series_of_other_widths_in_one_call():
    predictor = forecaster()
    mixed = [walk("a", width=1), walk("b", width=3, seed=1), walk("c", width=3, seed=2), walk("d", width=1, seed=3)]
    found = predictor.forecast(mixed, batch_size=4)
    assert [one.mean.shape for one in found] == [(8, 1), (8, 3), (8, 3), (8, 1)]
    assert [one.quantiles.shape for one in found] == [(9, 8, 1), (9, 8, 3), (9, 8, 3), (9, 8, 1)]
    for one, own in zip(mixed, found, strict=True):
        close(predictor.forecast([one])[0], own)
    column = dataclasses.replace(mixed[1], values=mixed[1].values[:, 2:], variates=("v2",))
    np.testing.assert_allclose(predictor.forecast([column])[0].mean, found[1].mean[:, 2:], rtol=1e-5)
    assert predictor.forecast([]) == []


@pytest.mark.parametrize("kind", ["mixture", "quantile", "causal", "flatten"])
def test_units_do_not_matter(kind):
    predictor, one = forecaster(kind), walk()
    (found,) = predictor.forecast([one], 11)
    (scaled,) = predictor.forecast([dataclasses.replace(one, values=1000 * one.values - 7e4)], 11)
    wanted = dataclasses.replace(found, mean=1000 * found.mean - 7e4, quantiles=1000 * found.quantiles - 7e4)
    assert np.abs(found.mean - 100).max() > 0.1
    close(scaled, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_later_does_not_matter(kind):
    predictor = forecaster(kind, past=("p0",), past_center=(0.0,), past_scale=(1.0,))
    one = walk(steps=60, width=2, past=1)
    values, past = one.values.copy(), one.past.copy()
    values[45:], past[45:] = 1e6, -1e6
    other = dataclasses.replace(one, values=values, past=past)
    (found,), (wanted,) = (predictor.forecast([s.cut(0, 45)], 11) for s in (other, one))
    np.testing.assert_array_equal(found.mean, wanted.mean)
    np.testing.assert_array_equal(found.quantiles, wanted.quantiles)
    past[44] = -1e6  # the last step counts
    (moved,) = predictor.forecast([dataclasses.replace(one, past=past).cut(0, 45)], 11)
    assert not np.allclose(moved.mean, wanted.mean)


def test_a_history_longer_than_the_context_is_its_tail():
    predictor = forecaster(**COVARIATES)
    one = walk(steps=90, past=1, known=1, ahead=HORIZON)
    (found,), (wanted,) = (predictor.forecast([s]) for s in (one, one.cut(90 - CONTEXT, 90)))
    close(found, wanted)
    np.testing.assert_array_equal(found.stamps, wanted.stamps)
    (shorter,) = predictor.forecast([one.cut(90 - CONTEXT + 8, 90)])
    assert not np.allclose(shorter.mean, found.mean)


# ---------------------------------------------------------------- what matters


def test_known_covariates_matter_as_far_as_the_forecast():
    predictor = forecaster(**COVARIATES)
    one = walk(past=1, known=1, ahead=30)
    (found,) = predictor.forecast([one])
    for step, matters in ((40 + HORIZON, False), (40 + HORIZON - 1, True)):
        known = one.known.copy()
        known[step] += 3
        (other,) = predictor.forecast([dataclasses.replace(one, known=known)])
        assert np.array_equal(other.mean, found.mean) != matters


def test_covariates_in_another_order():
    predictor = forecaster(
        past=("p1", "p0"), past_center=(0.0, 5.0), past_scale=(1.0, 2.0), known=("k1",), known_center=(0.0,),
        known_scale=(1.0,),
    )  # fmt: skip
    one = walk(past=2, known=2, ahead=HORIZON)
    other = dataclasses.replace(
        one, past=one.past[:, ::-1], past_names=("p1", "p0"), known=one.known[:, 1:], known_names=("k1",)
    )
    close(predictor.forecast([one])[0], predictor.forecast([other])[0])


def test_forecasts_are_in_the_units_of_the_series():
    plain = forecaster("together")
    scaled = SeriesForecaster(plain.model)
    one = walk(width=2)
    (wanted,) = plain.forecast([one], 19)
    plain.model.spec = dataclasses.replace(plain.model.spec, center=(90.0, 110.0), scale=(5.0, 20.0))
    (found,) = scaled.forecast([one], 19)
    close(found, wanted, rtol=1e-4)


@pytest.mark.parametrize(("start", "frequency"), [("2024-01-31", "MS"), ("2024-02-27T22", "h"), (None, "h")])
def test_stamps_go_on(start, frequency):
    one = walk(steps=30, start=start, frequency=frequency)
    (found,) = forecaster().forecast([one], 5)
    whole = one.stamps(35)
    np.testing.assert_array_equal(found.stamps, whole[30:])
    assert len(found.mean) == 5


def test_longer_and_shorter_horizons():
    predictor = forecaster()
    one = walk()
    (once,), (longer,), (shorter,) = (predictor.forecast([one], steps) for steps in (None, 27, 3))
    assert [len(f.mean) for f in (once, longer, shorter)] == [8, 27, 3]
    assert longer.quantiles.shape == (9, 27, 1)
    np.testing.assert_allclose(longer.mean[:8], once.mean, rtol=1e-6)
    np.testing.assert_allclose(longer.quantiles[:, :8], once.quantiles, rtol=1e-6)
    np.testing.assert_allclose(shorter.mean, once.mean[:3], rtol=1e-6)
    assert (np.diff(longer.quantiles, axis=0) >= -1e-5).all()
    assert np.isfinite(longer.mean).all()


def test_levels():
    (found,) = forecaster("together").forecast([walk(width=2)], quantiles=[0.1, 0.25, 0.5])
    (own,) = forecaster("together").forecast([walk(width=2)])
    assert (found.levels, found.quantiles.shape) == ((0.1, 0.25, 0.5), (3, 8, 2))
    np.testing.assert_allclose(found.quantiles[0], own.quantiles[0], rtol=1e-6)
    np.testing.assert_allclose(found.quantiles[1], (own.quantiles[1] + own.quantiles[2]) / 2, rtol=1e-6)
    (wide,) = forecaster("mixture").forecast([walk()], quantiles=(0.01, 0.99))
    assert wide.levels == (0.01, 0.99)
    (point,) = forecaster("flatten").forecast([walk()])
    assert (point.levels, point.quantiles.shape) == ((), (0, 8, 1))


def test_seasons():
    predictor, one = forecaster(), walk(frequency="h")
    assert predictor.forecast([one])[0].season == 24
    assert predictor.forecast([one], season=5)[0].season == 5
    assert not np.allclose(predictor.forecast([one], season=5)[0].mean, predictor.forecast([one])[0].mean)
    assert forecaster(season=12).forecast([one])[0].season == 12


def test_the_model_is_evaluated():
    model = forecaster().model.train()
    SeriesForecaster(model, "cpu")
    assert not model.training


# ---------------------------------------------------------------- what is refused


def test_what_cannot_be_forecast_is_refused():
    predictor = forecaster()
    for horizon, season in ((0, 0), (5, -1)):
        with pytest.raises(
            ConfigError,
            match=rf"^forecast: horizon must be at least 1 and season at least 0, got {horizon} and {season}\.$",
        ):
            predictor.forecast([walk()], horizon, season=season)
    for levels in ([0.5, 0.1], [0.0, 0.5], [0.5, 1.0], [0.5, 0.5]):
        with pytest.raises(ConfigError, match=r"^forecast: quantiles must rise, between 0 and 1, got \["):
            predictor.forecast([walk()], quantiles=levels)
    with pytest.raises(
        ConfigError,
        match=r"^quantiles: the model has learnt levels from 0\.1 to 0\.9, got 0\.05; ask for levels between them, or "
        r"fit a model with head=mixture\.$",
    ):
        predictor.forecast([walk()], quantiles=[0.05, 0.5])


def test_series_that_do_not_fit_are_refused():
    predictor = forecaster(**COVARIATES)
    with pytest.raises(
        DataError,
        match=r"^series: x: the covariate k0 must be known 9 steps beyond the end, and is for 8; add rows without a "
        r"target, or lower the horizon\.$",
    ):
        predictor.forecast([walk(past=1, known=1, ahead=8)], 9)
    with pytest.raises(
        DataError, match=r"^series: x: the model needs the past covariate p0; the series has target, k0\."
    ):
        predictor.forecast([walk(known=1, ahead=8)])
    with pytest.raises(DataError, match=r"the model reads the variates v0, v1 together, the series has v0, v1, v2\.$"):
        forecaster("together").forecast([walk(width=3)])
