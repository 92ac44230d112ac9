"""Policies: what they learn from, their losses, and what is refused; test_contract.py has all backbones."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from made_demonstrations import made_batch, made_items, shaken

from vertebra.backbones.base import create_backbone
from vertebra.domains.action.model import (
    POLICIES,
    CVAEPolicy,
    DecoderPolicy,
    EncoderDecoderPolicy,
    Queries,
    level_losses,
)
from vertebra.errors import ConfigError
from vertebra.tokenizers.action import NONE
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

BSPLINE = "bspline,num_basis=4,degree=2,vocab_size=16"


def made(policy="decoder", tokenizer=BSPLINE, causal=False, options=None, **spec):
    """A policy in evaluation mode and a batch of six, the last one with one real step."""
    items = made_items(tokenizer, **spec)
    backbone = create_backbone("illama_test", causal=causal)
    return shaken(POLICIES[policy](backbone, items.spec, **(options or {}))), made_batch(items)


def written(tokenizer=BSPLINE, **spec):
    if tokenizer.startswith("fast"):
        pytest.importorskip("tokenizers", reason="FAST needs the extra action")
    return made(tokenizer=tokenizer, causal=True, options={"decoding": "autoregressive"}, **spec)


# ---------------------------------------------------------------- targets


def test_chunks_are_told_relative_where_the_spec_says():
    model, batch = made(relative=(0, -1, -1), history=2)
    x = batch["states"][:, -1, 0]
    chunks, start = model.target(batch)
    assert start is None
    torch.testing.assert_close(chunks[:, :, 0], batch["actions"][:, :, 0] - x[:, None])
    assert torch.equal(chunks[:, :, 1:], batch["actions"][:, :, 1:])
    torch.testing.assert_close(model.reference(batch["states"]), torch.stack([x, 0 * x, 0 * x], 1))
    told = model.decode(batch, None, None)
    torch.testing.assert_close(model.act(batch), told + model.reference(batch["states"])[:, None])
    model, batch = made(tokenizer=f"{BSPLINE},initial=fit", relative=(0, -1, -1))
    _, start = model.target(batch)
    torch.testing.assert_close(start[:, 0], batch["start"][:, 0] - batch["states"][:, -1, 0])
    assert torch.equal(start[:, 1:], batch["start"][:, 1:])


def test_without_states_nothing_is_relative():
    items = made_items(cameras=("top",))
    nothing = {"state_names": (), "state_mean": (), "state_std": (), "change_std": (), "positions": (-1, -1, -1)}
    spec = dataclasses.replace(items.spec, **nothing)
    model = shaken(DecoderPolicy(create_backbone("illama_test", causal=False), spec, patch_size=4))
    batch = made_batch(items) | {"states": torch.zeros(6, 1, 0)}
    assert torch.equal(model.reference(batch["states"]), torch.zeros(6, 3))
    assert model.act(batch).shape == (6, 6, 3)


@pytest.mark.parametrize(
    ("tokenizer", "count", "groups"),
    [
        ("binning,vocab_size=16", 6, [1, 1, 1, 1, 1, 1]),
        ("binning,vocab_size=16", 2, [1, 1, 0, 0, 0, 0]),
        (BSPLINE, 6, [1, 1, 1, 1]),
        (BSPLINE, 5, [1, 1, 1, 0]),  # their middles are at steps 0, 1 2/3, 3 1/3 and 5
        (BSPLINE, 4, [1, 1, 1, 0]),
        (BSPLINE, 3, [1, 1, 0, 0]),
        (BSPLINE, 1, [1, 0, 0, 0]),
    ],
)
def test_tokens_whose_time_is_real_count(tokenizer, count, groups):
    model, _ = made(tokenizer=tokenizer)
    found = model.token_weights((torch.arange(6) < count)[None])
    assert found.tolist() == [[float(g) for g in groups for _ in range(3)]]


# ---------------------------------------------------------------- levels


def test_the_loss_of_levels():
    logits, weights = torch.randn(2, 3, 5), torch.tensor([[1.0, 1, 0], [1, 0, 0]])
    places = torch.tensor([[0.0, 1.4, 2], [3.6, 0, 0]])
    found = level_losses(logits, places, weights, 0.0)
    rows = [(0, 0, 0), (0, 1, 1), (1, 0, 4)]
    expected = -sum(logits[b, t].log_softmax(0)[level] for b, t, level in rows) / 3
    torch.testing.assert_close(found["loss"], expected)
    right = [float(logits[b, t].argmax() == level) for b, t, level in rows]
    assert found["token_pred_acc"] == pytest.approx(sum(right) / 3)
    found = level_losses(logits, places, weights, 0.5)["loss"]
    expected = 0
    for b, t, place in ((0, 0, 0.0), (0, 1, 1.4), (1, 0, 3.6)):
        chances = torch.tensor([math.exp(-0.5 * ((level - place) / 0.5) ** 2) for level in range(5)])
        expected = expected - (chances / chances.sum() * logits[b, t].log_softmax(0)).sum() / 3
    torch.testing.assert_close(found, expected)
    narrow = level_losses(logits, places.round(), weights, 1e-3)["loss"]
    torch.testing.assert_close(narrow, level_losses(logits, places, weights, 0.0)["loss"])


def test_levels_are_read_by_argmax_or_mean():
    model, _ = made(options={"readout": "mean"})
    logits = torch.randn(2, 12, 16)
    levels = torch.linspace(0, 1, 16)
    best, mean = levels[logits.argmax(-1)], logits.softmax(-1) @ levels
    grippers = torch.tensor([False, False, True] * 4)
    torch.testing.assert_close(model.read_levels(logits), torch.where(grippers, best, mean))
    model, _ = made()
    torch.testing.assert_close(model.read_levels(logits), best)


def test_a_query_reads_its_tokens():
    tokenizer = made()[0].tokenizer
    for grouped, count in ((True, 4), (False, 12)):
        queries = Queries(tokenizer, 16, grouped, 5)
        assert len(queries) == count
        features = torch.randn(2, count, 16)
        found = queries.read(features)
        assert found.shape == (2, 12, 5)
        for token in (0, 4, 11):
            query, part = divmod(token, 3) if grouped else (token, 0)
            expected = queries.head(features[:, query])[:, 5 * part : 5 * part + 5]
            torch.testing.assert_close(found[:, token], expected)


@pytest.mark.parametrize("policy", ["decoder", "encoder-decoder"])
def test_losses_and_chunks_are_those_of_the_logits(policy):
    model, batch = made(policy, options={"readout": "mean", "smoothing": 1.0})
    logits = model(batch)
    places = model.tokenizer.to_unit(batch["actions"]) * 15
    expected = level_losses(logits, places, model.token_weights(batch["real"]), 1.0)
    assert model.losses(batch).keys() == {"loss", "token_pred_acc"}
    torch.testing.assert_close(model.losses(batch), expected)
    torch.testing.assert_close(model.act(batch), model.tokenizer.from_unit(model.read_levels(logits)))


def test_the_truth_has_no_error():
    model, batch = made()
    ids = model.tokenizer.encode(batch["actions"])
    model.forward = lambda _: 100.0 * F.one_hot(ids, 16)
    found = model.losses(batch)
    assert found["token_pred_acc"] == 1
    assert found["loss"] < 1e-6
    torch.testing.assert_close(model.act(batch), model.tokenizer.decode(ids))


# ---------------------------------------------------------------- one token after the other


def test_a_token_depends_on_those_before():
    model, batch = written(history=2)
    ids = model.tokenizer.encode(batch["actions"])
    logits = model(batch, ids)
    changed = ids.clone()
    changed[:, 5] = (ids[:, 5] + 1) % 16
    away = (model(batch, changed) - logits).abs().amax((0, 2))
    assert (away > 1e-5).nonzero()[:, 0].tolist() == list(range(6, 13))
    torch.testing.assert_close(model(batch, ids[:, :4]), logits[:, :5])


def test_losses_of_tokens_one_after_the_other():
    model, batch = written()
    ids = model.tokenizer.encode(batch["actions"])
    logits, weights = model(batch, ids), model.token_weights(batch["real"])
    expected = F.cross_entropy(logits[:, :12, :16].mT, ids, reduction="none")
    found = model.losses(batch)
    torch.testing.assert_close(found["loss"], (expected * weights).sum() / weights.sum())
    right = (logits[:, :12, :16].argmax(-1) == ids).float()
    torch.testing.assert_close(found["token_pred_acc"], (right * weights).sum() / weights.sum())


def test_chunks_of_other_lengths_end():
    model, batch = written("fast,vocab_size=128")
    ids = model.tokenizer.encode(batch["actions"])
    lengths = (ids != NONE).sum(1).tolist()
    assert len(set(lengths)) > 1
    losses, right = [], []
    for row, length in enumerate(lengths):
        own = {key: value[row : row + 1] for key, value in batch.items() if key in ("states", "start")}
        logits = model(own, ids[row : row + 1, :length])[0]  # nothing that is no token goes in
        truth = torch.cat([ids[row, :length], torch.tensor([model.end])])
        losses.append(F.cross_entropy(logits, truth, reduction="none"))
        right.append(logits.argmax(-1) == truth)
    found = model.losses(batch)
    torch.testing.assert_close(found["loss"], torch.cat(losses).mean())
    torch.testing.assert_close(found["token_pred_acc"], torch.cat(right).float().mean())


def test_chunks_are_those_of_the_written_tokens():
    model, batch = written(relative=(0, 1, -1))
    ids = model.write(batch)
    assert ids.shape == (6, 12)
    expected = model.tokenizer.decode(ids) + model.reference(batch["states"])[:, None]
    torch.testing.assert_close(model.act(batch), expected)


# ---------------------------------------------------------------- conditional VAE


def test_losses_of_a_cvae():
    model, batch = made("cvae", options={"latent": 3, "kl_weight": 0.5})
    told = model.tokenizer.encode_continuous(batch["actions"])
    moments = {}
    model.moments.register_forward_hook(lambda _, __, out: moments.update(out=out))
    found = model.losses(batch)
    mean, log_variance = moments["out"].chunk(2, dim=-1)
    prior, posterior = (
        torch.distributions.Normal(torch.zeros(6, 3), 1.0),
        torch.distributions.Normal(mean, (log_variance / 2).exp()),
    )
    kl = torch.distributions.kl_divergence(posterior, prior).sum(1).mean()
    torch.testing.assert_close(found["kl"], kl)
    weights = model.token_weights(batch["real"])
    l1 = ((model(batch, mean) - told).abs() * weights).sum() / weights.sum()  # in evaluation, without a draw
    torch.testing.assert_close(found["l1"], l1)
    torch.testing.assert_close(found["loss"], l1 + 0.5 * kl)
    assert model.losses(batch)["loss"] == found["loss"]
    model.train()
    assert model.losses(batch)["loss"] != model.losses(batch)["loss"]


def test_the_latent_says_which_way_and_is_zero_when_acting():
    model, batch = made("cvae", options={"latent": 3})
    tokens = model(batch)
    assert tokens.shape == (6, 12)
    assert torch.equal(model(batch, torch.zeros(6, 3)), tokens)
    assert (model(batch, torch.ones(6, 3)) - tokens).abs().max() > 1e-4
    torch.testing.assert_close(model.act(batch), model.tokenizer.decode_continuous(tokens.clamp(-1, 1)))
    other = batch | {"actions": batch["actions"] + 0.1}  # the posterior sees the actions, the policy does not
    assert torch.equal(model.act(other), model.act(batch))


def test_plain_regression_has_no_posterior():
    model, batch = made("cvae", options={"latent": 0, "regression": "l2"})
    assert not any("posterior" in name for name, _ in model.named_parameters())
    found = model.losses(batch)
    weights = model.token_weights(batch["real"])
    away = model(batch) - model.tokenizer.encode_continuous(batch["actions"])
    torch.testing.assert_close(found["l2"], (away**2 * weights).sum() / weights.sum())
    assert found["kl"] == 0
    assert found["loss"] == found["l2"]


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("policy", POLICIES)
def test_dropout_and_noise_are_for_training_alone(policy):
    for option in ("dropout", "observation_noise"):
        model, batch = made(policy, options={option: 0.5, **({"latent": 0} if policy == "cvae" else {})})
        assert torch.equal(model(batch), model(batch))
        model.train()
        assert not torch.equal(model(batch), model(batch))
        still, _ = made(policy, options={"latent": 0} if policy == "cvae" else {})
        still.train()
        assert torch.equal(still(batch), still(batch))


def test_what_weight_decay_leaves_alone_exists():
    for model in (
        *(made(policy, tasks=("reach",), cameras=("top",), options={"patch_size": 4})[0] for policy in POLICIES),
        written(tasks=("reach",))[0],
    ):
        names = model.no_weight_decay()
        assert names >= {"observe.positions", "observe.task_embed.weight"}
        own = dict(model.named_parameters())
        assert names <= own.keys()
        assert {name for name in own if name.endswith(("queries.embed", "places.weight", "summary"))} <= names
        assert model.input_parts == ("observe",)


AUTOREGRESSIVE = {"decoding": "autoregressive"}


@pytest.mark.parametrize(
    ("cls", "options", "text"),
    [
        (DecoderPolicy, {"decoding": "beam"}, r"^decoding must be parallel or autoregressive, got 'beam'\.$"),
        (DecoderPolicy, {"readout": "median"}, r"^readout must be argmax or mean, got 'median'\.$"),
        (DecoderPolicy, {"smoothing": -1.0}, r"^smoothing must be at least 0, got -1\.0\.$"),
        (
            DecoderPolicy,
            AUTOREGRESSIVE,
            r"^DecoderPolicy: decoding=autoregressive needs a causal backbone; set causal=t",
        ),
        (
            DecoderPolicy,
            {**AUTOREGRESSIVE, "grouped": True},
            r"grouped and readout=mean are for decoding=parallel; leave",
        ),
        (DecoderPolicy, {**AUTOREGRESSIVE, "readout": "mean"}, r"grouped and readout=mean are for decoding=parallel"),
        (EncoderDecoderPolicy, {"heads": 3}, r"^EncoderDecoderPolicy: heads=3 must divide the backbone's width 16\.$"),
        (EncoderDecoderPolicy, {"heads": 0}, r"heads=0 must divide"),
        (EncoderDecoderPolicy, {"readout": "median"}, r"^readout must be argmax or mean"),
        (CVAEPolicy, {"latent": -1}, r"^CVAEPolicy: latent and kl_weight must be at least 0, got -1 and 10\.0\.$"),
        (CVAEPolicy, {"kl_weight": -1.0}, r"got 32 and -1\.0\.$"),
        (CVAEPolicy, {"regression": "l3"}, r"^regression must be l1 or l2, got 'l3'\.$"),
        (CVAEPolicy, {"observation_noise": -1.0}, r"^observation_noise must be at least 0, got -1\.0\.$"),
    ],
)
def test_settings_that_cannot_be_are_refused(cls, options, text):
    with pytest.raises(ConfigError, match=text):
        cls(create_backbone("illama_test", causal=False), made_items().spec, **options)


@pytest.mark.parametrize("cls", [DecoderPolicy, EncoderDecoderPolicy, CVAEPolicy])
def test_tokens_in_varying_number_need_one_after_the_other(cls):
    pytest.importorskip("tokenizers", reason="FAST needs the extra action")
    spec = made_items("fast,vocab_size=128").spec
    with pytest.raises(
        ConfigError,
        match=rf"^{cls.__name__}: needs tokens in a fixed number, as bspline and binning give; got FASTTokenizer\. Cho",
    ):
        cls(create_backbone("illama_test", causal=False), spec)


def test_other_tokenizers_are_refused():
    spec = dataclasses.replace(made_items().spec, tokenizer=NucleotideTokenizer().to_dict())
    with pytest.raises(ConfigError, match=r"^DecoderPolicy: the tokenizer must be one for actions, got Nucleotide"):
        DecoderPolicy(create_backbone("illama_test", causal=False), spec)
