"""Heads, paths and statistics against slow twins."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import AffineTransform, Categorical, MixtureSameFamily, StudentT, TransformedDistribution

from vertebra.domains.timeseries.heads import MixtureHead, MoiraiHead, QuantileHead
from vertebra.domains.timeseries.paths import COUNT, KNOTS, PATHS, join_paths, spread
from vertebra.domains.timeseries.scaling import packed_statistics, seasonal_channels, window_statistics


def test_the_mixture_is_that_of_torch():
    torch.manual_seed(0)
    head = MixtureHead(8, 5).double()
    y, target = torch.randn(3, 8, dtype=torch.double), torch.randn(3, 5, dtype=torch.double)
    numbers = head(y)
    logits, df, loc, scale = (t.movedim(-2, -1).double() for t in numbers.split(4, dim=-2))
    mixture = MixtureSameFamily(Categorical(logits=logits), StudentT(df, loc, scale))
    torch.testing.assert_close(
        head.log_prob(numbers, target.float()).double(), mixture.log_prob(target), atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(head.mean(numbers).double(), mixture.mean, atol=1e-5, rtol=1e-5)
    moved = TransformedDistribution(mixture, AffineTransform(7.0, 3.0))
    torch.testing.assert_close(mixture.log_prob(target) - np.log(3.0), moved.log_prob(7 + 3 * target))


def test_quantiles_of_the_mixture_invert_its_distribution_function():
    torch.manual_seed(1)
    head = MixtureHead(8, 6)
    torch.nn.init.normal_(head.proj.weights_logits.weight, std=1.0)
    numbers = head(3 * torch.randn(20, 8))
    levels = (0.01, 0.1, 0.5, 0.9, 0.99)
    told = head.quantiles(numbers, levels).double().numpy()  # (20, Q, P)
    logits, df, loc, scale = (t.double().detach().numpy() for t in numbers.split(4, dim=-2))
    for q, level in enumerate(levels):
        below = (np.exp(logits) * stats.t.cdf(told[:, q, None], df, loc, scale)).sum(1)
        np.testing.assert_allclose(below, level, atol=1e-4)


def moirai(count, seed, spread=1.0):
    """A head and numbers of some features, in float64 as (name, array) too."""
    torch.manual_seed(seed)
    head = MoiraiHead(8, 6)
    torch.nn.init.normal_(head.proj.weights_logits.weight, std=1.0)
    numbers = head(spread * torch.randn(count, 8))
    names = ("df", "loc", "scale", "narrow", "count", "going", "log_loc", "log_scale")
    parts = numbers.double().detach()
    return head, numbers, parts[:, :4].exp().numpy(), dict(zip(names, parts[:, 4:].unbind(1), strict=True))


def moirai_below(x, weights, p):
    """Its distribution function by scipy's distributions."""
    p = {name: part.numpy() for name, part in p.items()}
    return (
        weights[:, 0] * stats.t.cdf(x, p["df"], p["loc"], p["scale"])
        + weights[:, 1] * stats.norm.cdf(x, p["narrow"], 1e-3)
        + weights[:, 2] * stats.nbinom.cdf(x, p["count"], 1 / (1 + np.exp(p["going"])))
        + weights[:, 3] * stats.lognorm.cdf(x, p["log_scale"], scale=np.exp(p["log_loc"]))
    )


def test_moirais_mixture_is_that_of_torch():
    """Below 0, at 0, between counts and at counts; a count's probability is also taken between whole numbers."""
    head, numbers, weights, p = moirai(40, 0)
    for value in (-0.7, 0.0, 0.4, 2.0, 7.0):
        target = torch.full((40, 6), value)
        x = target.double()
        counts = torch.distributions.NegativeBinomial(p["count"], logits=p["going"], validate_args=False).log_prob(x)
        counts = counts if value >= 0 else torch.tensor(-torch.inf)
        logs = torch.distributions.LogNormal(p["log_loc"], p["log_scale"]).log_prob(x.clamp_min(0.1))
        logs = logs if value > 0 else torch.tensor(-torch.inf)
        own = (
            StudentT(p["df"], p["loc"], p["scale"]).log_prob(x),
            torch.distributions.Normal(p["narrow"], 1e-3).log_prob(x),
            *(part.expand(40, 6) for part in (counts, logs)),
        )
        wanted = (torch.from_numpy(weights).log() + torch.stack(own, 1)).logsumexp(1)
        torch.testing.assert_close(head.log_prob(numbers, target).double(), wanted, atol=2e-4, rtol=1e-5)
    at = (weights[:, 0] * p["loc"].numpy() + weights[:, 1] * p["narrow"].numpy()) + weights[:, 2] * (
        p["count"] * p["going"].exp()
    ).numpy()
    at = at + weights[:, 3] * (p["log_loc"] + p["log_scale"] ** 2 / 2).exp().numpy()
    np.testing.assert_allclose(head.mean(numbers).detach().numpy(), at, rtol=1e-4, atol=1e-4)


def test_moirais_loss_has_gradients_everywhere():
    """Finite ones at any value; at positive ones all parts learn, the narrow one where a value is near it."""
    for value in (-3.0, 0.0, 2.5, None):
        head, numbers, _, p = moirai(5, 1)
        near = p["narrow"].float() + 5e-4
        head.loss(numbers, near if value is None else torch.full((5, 6), value)).sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad.isfinite().all(), name
            learns = value is None if "components.1" in name else value == 2.5
            assert not learns or parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("spread", [1.0, 8.0])
def test_quantiles_of_moirais_mixture_invert_its_distribution_function(spread):
    """Where it jumps, the quantile is where the level is passed: below it just before, and not below it just after."""
    head, numbers, weights, p = moirai(60, 2, spread)
    levels = (0.01, 0.1, 0.5, 0.9, 0.99)
    told = head.quantiles(numbers, levels).double().numpy()  # (60, Q, P)
    assert np.isfinite(told).all()
    jumps = 0
    for q, level in enumerate(levels):
        away = 1e-5 * np.maximum(1, np.abs(told[:, q]))
        before, after = (moirai_below(told[:, q] + sign * away, weights, p) for sign in (-1, 1))
        assert (before <= level + 1e-6).all()
        assert (after >= level - 1e-6).all()
        jumps += ((after - before) > 0.01).sum()
    assert jumps > 5


def test_quantiles_of_single_parts_of_moirais_mixture():
    """All weight on counts, then on logarithms: scipy's quantiles."""
    head, numbers, _, p = moirai(30, 3)
    levels = (0.1, 0.5, 0.97)
    counts, logs = (numbers.detach().clone() for _ in range(2))
    counts[:, :4], logs[:, :4] = -torch.inf, -torch.inf
    counts[:, 2], logs[:, 3] = 0, 0
    own = {name: part.numpy() for name, part in p.items()}
    for q, level in enumerate(levels):
        wanted = stats.nbinom.ppf(level, own["count"], 1 / (1 + np.exp(own["going"])))
        np.testing.assert_allclose(head.quantiles(counts, levels)[:, q], wanted, atol=1e-5)
        wanted = stats.lognorm.ppf(level, own["log_scale"], scale=np.exp(own["log_loc"]))
        np.testing.assert_allclose(head.quantiles(logs, levels)[:, q], wanted, rtol=1e-5, atol=1e-6)


def test_the_pinball_loss_is_least_at_the_quantiles():
    head = QuantileHead(4, 1, (0.1, 0.5, 0.9))
    sample = torch.randn(20001, generator=torch.Generator().manual_seed(0))
    best = torch.quantile(sample, torch.tensor([0.1, 0.5, 0.9]))

    def mean_loss(values):
        return float(head.loss(values[None, :, None].expand(len(sample), -1, -1), sample[:, None]).mean())

    least = mean_loss(best)
    for i in range(3):
        for move in (-0.2, 0.2):
            changed = best.clone()
            changed[i] += move
            assert mean_loss(changed) > least
    crossed = torch.tensor([[[3.0], [1.0], [2.0]]])
    assert head.quantiles(crossed, (0.1, 0.5, 0.9)).flatten().tolist() == [1, 2, 3]


def test_the_mean_of_symmetric_quantiles_is_their_median():
    levels = tuple(float(level) for level in np.arange(1, 10) / 10)
    head = QuantileHead(4, 1, levels)
    numbers = 5 + 2 * torch.tensor(stats.norm.ppf(levels), dtype=torch.float32)[:, None]
    torch.testing.assert_close(head.mean(numbers), torch.tensor([5.0]))


def normal(levels):
    return torch.tensor(stats.norm.ppf(levels))[:, None]


def test_quantiles_between_and_beyond_those_given():
    told = tuple(np.arange(1, 10) / 10)
    np.testing.assert_allclose(spread(normal(told), told, KNOTS), normal(KNOTS), atol=1e-6)
    rough = spread(normal(told) ** 3, told, (0.15, 0.5))
    assert -(1.2816**3) < float(rough[0]) < -(0.8416**3)
    assert spread(normal((0.5,)), (0.5,), PATHS).shape == (COUNT, 1)


def test_paths_that_say_the_same_are_joined_to_what_they_say():
    generator = torch.Generator().manual_seed(0)
    one = torch.randn(2, 1, 3, len(KNOTS), 4, generator=generator).sort(dim=3).values
    joined = join_paths(one.expand(-1, COUNT, -1, -1, -1), (0.04, 0.35, 0.5, 0.99))
    torch.testing.assert_close(joined[:, :, 0], one[:, 0, :, 1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(joined[:, :, 1], one[:, 0, :, 4:6].mean(2), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(joined[:, :, 3], one[:, 0, :, -1], atol=1e-4, rtol=1e-4)


def test_uncertainty_of_joined_paths_adds_up():
    """Paths from N(0, 1), each going on as N(path, 1), then again: the standard deviation is sqrt(2), then sqrt(3)."""
    paths = normal(PATHS)  # (L, 1)
    for steps in (2, 3):
        knots = (paths + normal(KNOTS).T)[None, :, None, :, None]  # (1, L, 1, K, 1)
        told = join_paths(knots, (0.1, 0.3, 0.5, 0.7, 0.9))[0, 0, :, 0]
        np.testing.assert_allclose(told, np.sqrt(steps) * normal((0.1, 0.3, 0.5, 0.7, 0.9))[:, 0], rtol=0.02, atol=1e-3)
        paths = join_paths(knots, PATHS)[0, 0]


def test_statistics_are_those_of_numpy():
    values, observed = torch.randn(2, 3, 20) * 4 + 1000, torch.rand(2, 3, 20) > 0.3
    loc, scale = window_statistics(values, observed)
    for b in range(2):
        for v in range(3):
            own = values[b, v][observed[b, v]].double().numpy()
            np.testing.assert_allclose(loc[b, v, 0], own.mean(), rtol=1e-6)
            np.testing.assert_allclose(scale[b, v, 0], np.sqrt(own.var(ddof=1) + 1e-5), rtol=1e-5)
    none = window_statistics(values, torch.zeros_like(observed))
    assert none[0].abs().max() == 0
    assert (none[1] == 1).all()


def test_statistics_of_packed_series_are_those_of_each_alone():
    torch.manual_seed(0)
    values, observed = torch.randn(2, 6, 4) * 3 + 50, torch.rand(2, 6, 4) > 0.2
    segments = torch.tensor([[0, 0, 1, 1, 1, -1], [0, 1, 1, 2, -1, -1]])
    loc, scale = packed_statistics(values, observed, segments)
    for row in range(2):
        for number in range(int(segments[row].max()) + 1):
            own = segments[row] == number
            alone = window_statistics(values[row][own].flatten(), observed[row][own].flatten())
            torch.testing.assert_close(loc[row][own], alone[0].expand(int(own.sum()), 1))
            torch.testing.assert_close(scale[row][own], alone[1].expand(int(own.sum()), 1))
    assert loc[segments < 0].abs().max() == 0
    assert (scale[segments < 0] == 1).all()


def test_what_was_a_season_before():
    values = torch.arange(10.0)[None, None]
    observed = torch.ones(1, 1, 10, dtype=torch.bool)
    observed[0, 0, 8] = False
    last, mean, there = seasonal_channels(values, observed, torch.tensor([3]), 5)[0, 0]
    assert last[3:8].tolist() == [0, 1, 2, 3, 4]
    assert there[:3].tolist() == [0, 0, 0]
    assert last[10:].tolist() == [7, 3.5, 9, 7, 3.5]  # 8 is missing: the mean of 5 and 2 stands for it
    assert mean[10].item() == pytest.approx((7 + 4 + 1) / 3)
