"""What forecasters must do with every backbone; a new preset named *_test is covered by being registered."""

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import presets
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, ShapeError

TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
FORMS = [(name, causal) for name in TEST_PRESETS for causal in (True, False)]
every_backbone = pytest.mark.parametrize(("name", "causal"), FORMS)
SETTINGS = (
    {"head": "mixture", "readout": "patch"},
    {"head": "quantile", "readout": "patch", "seasonal": True, "squash": True},
    {"head": "point", "readout": "flatten", "shortcut": True, "space": "data"},
    {"head": "quantile", "readout": "flatten", "mode": "multivariate"},
    {"head": "mixture", "readout": "patch", "mode": "multivariate", "seasonal": True},
)
CONTEXT, HORIZON, VARIATES = 27, 12, 3


def build(name, causal, **settings):
    torch.manual_seed(0)
    covariates = settings.pop("covariates", True)
    spec = SeriesSpec(
        context=CONTEXT,
        horizon=HORIZON,
        variates=("a", "b", "c"),
        past=("load",) if covariates else (),
        known=("holiday",) if covariates else (),
        past_center=(0.0,) * covariates,
        past_scale=(1.0,) * covariates,
        known_center=(0.0,) * covariates,
        known_scale=(1.0,) * covariates,
    )
    model = PatchForecaster(create_backbone(name, causal=causal), spec, **{"patch": 8, **settings})
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def windows(count=4, ahead=HORIZON):
    generator = torch.Generator().manual_seed(1)
    values = 5 * torch.randn(count, VARIATES, CONTEXT + HORIZON, generator=generator).cumsum(-1) + 100
    observed = torch.rand(values.shape, generator=generator) > 0.1
    observed[1, :, :15] = False  # a short series
    return {
        "values": values[..., :CONTEXT] * observed[..., :CONTEXT],
        "observed": observed[..., :CONTEXT],
        "target": values[..., CONTEXT:] * observed[..., CONTEXT:],
        "target_observed": observed[..., CONTEXT:],
        "past": torch.randn(count, 1, CONTEXT, generator=generator),
        "known": torch.randn(count, 1, CONTEXT + ahead, generator=generator),
        "season": torch.tensor([7, 1, 12, 60])[:count],
        "index": torch.arange(count),
    }


def some(batch, rows):
    return {name: values[rows] for name, values in batch.items()}


@every_backbone
@pytest.mark.parametrize("settings", SETTINGS)
def test_gradient_reaches_every_parameter(name, causal, settings):
    model = build(name, causal, patch=2, **settings).train()  # enough patches for every group and row of a backbone
    model.losses(windows())["loss"].backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_backbone
@pytest.mark.parametrize("settings", SETTINGS)
def test_alone_or_in_a_batch_a_window_has_the_same_forecast(name, causal, settings):
    model, batch = build(name, causal, **settings), windows(ahead=30)
    together = model.forecast(batch, 30)
    for row in range(4):
        alone = model.forecast(some(batch, slice(row, row + 1)), 30)
        torch.testing.assert_close(alone.mean[0], together.mean[row], atol=1e-3, rtol=1e-5)
        if together.quantiles is not None:
            torch.testing.assert_close(alone.quantiles[0], together.quantiles[row], atol=1e-3, rtol=1e-5)


@every_backbone
@pytest.mark.parametrize("settings", SETTINGS)
def test_a_forecast_does_not_read_what_it_forecasts_nor_what_is_missing(name, causal, settings):
    model, batch = build(name, causal, **settings), windows()
    before = model.forecast(batch)
    batch["target"] = torch.full_like(batch["target"], 1e6)
    batch["values"] = torch.where(batch["observed"], batch["values"], 777.0)
    after = model.forecast(batch)
    torch.testing.assert_close(before.mean, after.mean, atol=0, rtol=0)


@every_backbone
def test_what_a_causal_backbone_is_taught_with_does_not_leak(name, causal):
    """The numbers of a patch do not depend on its own truth, nor on later ones."""
    model, batch = build(name, causal, head="mixture"), windows()
    inputs = (*(batch[n] for n in ("values", "observed", "past", "known", "season")), batch["target"])
    before = model(*inputs)[0]
    changed = batch["target"].clone()
    changed[..., 8:] += 50  # the second patch
    after = model(*inputs[:-1], changed)[0]
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


@every_backbone
def test_units_of_the_series_do_not_matter(name, causal):
    model, batch = build(name, causal, head="quantile", seasonal=True, covariates=False), windows()
    plain = model.forecast(batch, 30)
    batch["values"] = torch.where(batch["observed"], 1000 * batch["values"] - 7, 0)
    moved = model.forecast(batch, 30)
    torch.testing.assert_close(moved.quantiles, 1000 * plain.quantiles - 7, atol=1.0, rtol=1e-3)


@every_backbone
@pytest.mark.parametrize("head", ["mixture", "quantile"])
def test_quantiles_rise_over_any_horizon(name, causal, head):
    told = build(name, causal, head=head, covariates=False).forecast(windows(), 60).quantiles
    assert told.shape == (4, VARIATES, 9, 60)
    assert (told.diff(dim=2) >= -1e-4).all()


class RandomWalk(PatchForecaster):
    """Says of every step what is true of a random walk: the last value, give or take the root of the steps ahead."""

    def forward(self, values, observed, past=None, known=None, season=None, target=None):
        steps = torch.arange(1.0, self.patch + 1 if self.stepwise else self.spec.horizon + 1)
        scores = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(self.spec.quantiles))
        numbers = values[..., -1, None, None] + scores[:, None] * steps.sqrt()
        return numbers, torch.zeros_like(values[..., :1]), torch.ones_like(values[..., :1])


@pytest.mark.parametrize("causal", [True, False])
def test_beyond_the_horizon_uncertainty_grows_as_it_must(causal):
    """Forecasts that go on from their own median alone would stay as sure as at the first horizon."""
    walk = build("illama_test", causal, head="quantile", covariates=False)
    model = RandomWalk(walk.backbone, walk.spec, patch=8)
    batch = windows()
    told = model.forecast(batch, 5 * HORIZON)
    width = (told.quantiles[:, :, -1] - told.quantiles[:, :, 0])[0, 0]
    truth = 2 * 1.2816 * torch.arange(1.0, 5 * HORIZON + 1).sqrt()
    torch.testing.assert_close(width, truth, rtol=0.05, atol=0)
    torch.testing.assert_close(told.mean, batch["values"][..., -1:].expand_as(told.mean), atol=0.05, rtol=1e-3)


@every_backbone
def test_a_packed_row_says_what_its_series_say_alone(name, causal):
    model = build(name, causal, head="mixture", covariates=False, tell_observed=False)
    torch.manual_seed(3)
    lengths = [[3, 2, 4], [5, 3]]
    segments = torch.full((2, 10), -1)
    predicted = torch.zeros(2, 10, dtype=torch.bool)
    values, observed = 50 + 9 * torch.randn(2, 10, 8), torch.rand(2, 10, 8) > 0.1
    for row, counts in enumerate(lengths):
        ends = np.cumsum(counts)
        for number, (end, count) in enumerate(zip(ends, counts, strict=True)):
            segments[row, end - count : end] = number
            predicted[row, end - 1 : end] = True
    together, loc, scale = model.packed(values, observed, segments, predicted)
    whole = model.packed_loss(values, observed, segments, predicted)
    losses = []
    for row in range(2):
        for number in range(len(lengths[row])):
            own = segments[row] == number
            parts = [t[row][own][None] for t in (values, observed)]
            here = torch.zeros(1, int(own.sum()), dtype=torch.long)
            alone = model.packed(*parts, here, predicted[row][own][None])
            ahead = predicted[row][own]
            torch.testing.assert_close(together[row][own][ahead], alone[0][0][ahead], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(loc[row][own][:1], alone[1][0, :1])
            torch.testing.assert_close(scale[row][own][:1], alone[2][0, :1])
            losses.append(model.packed_loss(*parts, here, predicted[row][own][None]))
    torch.testing.assert_close(whole, torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)
    before = model.packed(values, observed, segments, predicted)[0][predicted]
    values[predicted] += 1e3  # the truth enters neither numbers nor statistics
    torch.testing.assert_close(model.packed(values, observed, segments, predicted)[0][predicted], before)


def test_what_cannot_be_judged_does_not_count():
    model, batch = build("illama_test", False, head="quantile", covariates=False), windows()
    batch["observed"][0] = False  # no value, so no scale
    before = model.losses(batch)["loss"]
    batch["target"][0] += 1e6
    torch.testing.assert_close(model.losses(batch)["loss"], before)
    packed = build("illama_test", False, head="mixture", covariates=False)
    row = torch.zeros(1, 4, dtype=torch.long)
    unknown = torch.tensor([[True, True, False, False]])[..., None].expand(1, 4, 8)
    assert packed.packed_loss(torch.randn(1, 4, 8), unknown, row, torch.tensor([[False, False, True, True]])) == 0


@every_backbone
@pytest.mark.parametrize("settings", SETTINGS)
def test_model_directory_round_trip(name, causal, settings, tmp_path):
    model, batch = build(name, causal, **settings), windows()
    other = load_model(save_model(model, tmp_path / "m"))
    torch.testing.assert_close(other.forecast(batch).mean, model.forecast(batch).mean, atol=0, rtol=0)
    assert other.arguments == model.arguments
    assert other.spec == model.spec


@pytest.mark.parametrize("head", ["mixture", "quantile", "point"])
def test_one_batch_overfits(head):
    model, batch = build("illama_test", False, head=head, covariates=False).train(), windows()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    first = last = model.losses(batch)["loss"].item()
    for _ in range(150):
        optimizer.zero_grad()
        loss = model.losses(batch)["loss"]
        loss.backward()
        optimizer.step()
        last = loss.item()
    assert last < first - 1 if head == "mixture" else last < first / 4


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"mode": "both"}, "mode must be independent or multivariate, got 'both'"),
        ({"head": "mean"}, "head must be mixture, moirai, quantile or point, got 'mean'"),
        ({"stride": 4, "head": "point"}, "stride=4 needs readout=flatten"),
        ({"shortcut": True, "head": "mixture"}, "shortcut=true is for head=quantile or point"),
        ({"squash": True, "head": "mixture"}, "squash=true is for head=quantile and space=instance"),
        ({"space": "data", "head": "mixture"}, "a mixture's loss is a density of the data"),
        ({"shortcut": True, "head": "moirai"}, "shortcut=true is for head=quantile or point"),
        ({"space": "data", "head": "moirai"}, "a mixture's loss is a density of the data"),
        ({"missing": "median"}, "missing must be mean or zero, got 'median'"),
        ({"patch": 0}, "patch must be at least 1 and stride 0 or more, got 0, 0"),
        ({"head": "point", "error": "rmse"}, "error must be mse, mae or huber, got 'rmse'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, text):
    with pytest.raises(ConfigError, match=text):
        build("illama_test", False, **settings)


def test_what_is_missing_is_named():
    model, batch = build("illama_test", False), windows()
    with pytest.raises(ShapeError, match="needs past covariates: load"):
        model(batch["values"], batch["observed"], None, batch["known"])
    with pytest.raises(ShapeError, match="needs known covariates: holiday"):
        model(batch["values"], batch["observed"], batch["past"])
    with pytest.raises(ShapeError, match="known covariates must reach 40 steps beyond the context, got 12"):
        model.forecast(batch, 40)
    with pytest.raises(ShapeError, match=r"must be \(B, V, 27\)"):
        model(batch["values"][..., :20], batch["observed"][..., :20])


def test_levels_that_were_not_learnt():
    model, batch = build("illama_test", False, head="quantile"), windows()
    told = model.forecast(batch, quantiles=[0.25, 0.5]).quantiles
    every = model.forecast(batch).quantiles
    torch.testing.assert_close(told[:, :, 0], every[:, :, 1:3].mean(2))
    torch.testing.assert_close(told[:, :, 1], every[:, :, 4])
    with pytest.raises(ConfigError, match=r"levels from 0.1 to 0.9, got 0.05; ask for levels between them"):
        model.forecast(batch, quantiles=[0.05, 0.5])
    sure = build("illama_test", False, head="mixture").forecast(batch, quantiles=[0.005, 0.995]).quantiles
    assert (sure[:, :, 1] > sure[:, :, 0]).all()
