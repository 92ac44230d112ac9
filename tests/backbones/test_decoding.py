"""Generation against the uncached computation, for every preset; strategies against their definitions."""

import dataclasses
import functools
import itertools

import pytest
import torch
from torch import nn

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import presets
from vertebra.backbones.decoding import (
    Decoder,
    Stop,
    Strategy,
    beam_search,
    generate,
    load_state,
    sample,
    save_state,
    stream,
)
from vertebra.errors import ConfigError, LoadError, ShapeError

FORMS = [name for name in presets() if name.endswith("_test")]
FORMS += ["hybrid_test,window=5", "hybrid_test,pattern=M", "illama_test,window=6"]
every_form = pytest.mark.parametrize("name", FORMS)
VOCABULARY = 9


def make(name, sharp=3.0):
    torch.manual_seed(0)
    backbone = create_backbone(name).eval()
    embed, head = nn.Embedding(VOCABULARY, backbone.config.dim), nn.Linear(backbone.config.dim, VOCABULARY)
    with torch.no_grad():
        head.weight.mul_(sharp)
    return Decoder(backbone, embed, head)


def uncached(decoder, ids):
    """Log-probabilities of every next token, (T, V), by one pass over everything."""
    with torch.no_grad():
        return decoder.head(decoder.backbone(decoder.embed(ids[None])))[0].log_softmax(-1)


PROMPTS = [torch.tensor([1, 5, 2, 7, 3, 3, 8]), torch.tensor([4]), torch.tensor([0, 6, 2])]


@every_form
@pytest.mark.parametrize("piece", [2048, 3, 1])
def test_greedy_equals_the_uncached_computation(name, piece):
    decoder = make(name)
    for prompt, found in zip(
        PROMPTS, generate(decoder, PROMPTS, Stop(max_new=12), Strategy(method="greedy"), piece=piece), strict=True
    ):
        ids = prompt
        for token, log_prob in zip(found.ids, found.log_probs, strict=True):
            expected = uncached(decoder, ids)[-1]
            assert int(expected.argmax()) == int(token)
            torch.testing.assert_close(expected[token], log_prob, atol=1e-4, rtol=1e-4)
            ids = torch.cat([ids, token[None]])
        assert found.reason == "length"


@every_form
def test_draws_do_not_depend_on_the_batch_and_ended_items_leave_it(name):
    decoder = make(name, sharp=1.0)
    stop, strategy = Stop(max_new=25, ids=[0, 1]), Strategy(seed=3, temperature=1.3)
    together = generate(decoder, PROMPTS * 3, stop, strategy)
    alone = [generate(decoder, [p], stop, strategy, numbers=[i])[0] for i, p in enumerate(PROMPTS * 3)]
    for one, other in zip(together, alone, strict=True):
        assert one.ids.tolist() == other.ids.tolist()
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=1e-4, rtol=1e-4)
    assert len({tuple(g.ids.tolist()) for g in together}) > 3
    sizes = [len(step.items) for step in stream(decoder, PROMPTS * 3, stop, strategy)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 9
    assert len(set(sizes)) > 1
    assert {g.reason for g in together} <= {"stop", "length"}
    assert all((g.reason == "stop") == (int(g.ids[-1]) in (0, 1)) for g in together)
    again = generate(decoder, PROMPTS * 3, stop, strategy)
    assert [g.ids.tolist() for g in again] == [g.ids.tolist() for g in together]
    other = generate(decoder, PROMPTS * 3, stop, Strategy(seed=4, temperature=1.3))
    assert [g.ids.tolist() for g in other] != [g.ids.tolist() for g in together]


def test_sampling_follows_its_definition():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]])
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    rows = logits.expand(len(uniform), -1)

    def shares(**options):
        return torch.bincount(sample(rows, uniform.double(), Strategy(**options)), minlength=5) / len(uniform)

    torch.testing.assert_close(shares(), logits[0].softmax(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(shares(temperature=0.5), (logits[0] * 2).softmax(0), atol=1e-3, rtol=0)
    kept = torch.tensor([2.0, 1.0, -torch.inf, -torch.inf, -torch.inf]).softmax(0)
    torch.testing.assert_close(shares(top_k=2), kept, atol=1e-3, rtol=0)
    # 0.644, 0.237, 0.087, ...: the smallest set that reaches 0.8 is the first two
    torch.testing.assert_close(shares(top_p=0.8), kept, atol=1e-3, rtol=0)
    assert sample(rows[:1], torch.tensor([1 - 1e-12], dtype=torch.float64), Strategy(top_p=0.5)).tolist() == [0]


@every_form
def test_beams_find_the_best_of_all_continuations(name):
    decoder = make(name, sharp=1.0)
    length, prompt = 3, PROMPTS[0]
    scores = {}
    for tail in itertools.product(range(VOCABULARY), repeat=length):
        ids = torch.cat([prompt, torch.tensor(tail)])
        logs = uncached(decoder, ids)
        scores[tail] = sum(float(logs[len(prompt) - 1 + i, t]) for i, t in enumerate(tail))
    best = sorted(scores, key=lambda tail: -scores[tail])
    found = beam_search(decoder, prompt, Stop(max_new=length), Strategy(method="beam", beams=VOCABULARY**2))
    assert [tuple(g.ids.tolist()) for g in found[:5]] == best[:5]
    assert found[0].score == pytest.approx(scores[best[0]], abs=1e-3)
    greedy = generate(decoder, [prompt], Stop(max_new=length), Strategy(method="greedy"))[0]
    one = generate(decoder, [prompt], Stop(max_new=length), Strategy(method="beam", beams=1))[0]
    assert one.ids.tolist() == greedy.ids.tolist()


def test_beams_end_at_stops_and_length_penalty_prefers_longer_ones():
    decoder = make("illama_test", sharp=1.0)
    short, long = (
        beam_search(decoder, PROMPTS[0], Stop(max_new=8, ids=[2]), Strategy(method="beam", beams=6, length_penalty=p))
        for p in (0.0, 4.0)
    )
    for found in (short, long):
        assert all(2 not in g.ids[:-1].tolist() for g in found)
        assert all((g.reason == "stop") == (int(g.ids[-1]) == 2) for g in found)
    assert len(long[0].ids) > len(short[0].ids)


def test_stop_rules():
    decoder = make("hybrid_test", sharp=1.0)
    strategy = Strategy(seed=1)
    for found in generate(decoder, [PROMPTS[0]] * 20, Stop(max_new=30, ids=range(VOCABULARY), min_new=5), strategy):
        assert len(found.ids) == 5
    free = generate(decoder, [PROMPTS[0]], Stop(max_new=30), strategy)[0].ids.tolist()
    cut = generate(decoder, [PROMPTS[0]], Stop(max_new=30, sequences=[free[7:10]]), strategy)[0]
    assert cut.ids.tolist() == free[:10]
    assert cut.reason == "stop"


@pytest.mark.parametrize("method", ["sample", "greedy", "beam"])
def test_grammar_allows_only_its_tokens_and_may_end_an_item(method):
    decoder = make("hybrid_test", sharp=1.0)

    def rising(tokens, items):  # every token above the one before; nothing after 8
        last = tokens[:, -1:] if tokens.shape[1] else torch.full((len(tokens), 1), -1)
        return torch.arange(VOCABULARY) > last

    for found in generate(decoder, PROMPTS, Stop(max_new=20), Strategy(method=method, seed=2), allowed=rising):
        ids = found.ids.tolist()
        assert ids == sorted(set(ids))
        assert found.reason == "grammar"
        assert ids[-1] == 8


@every_form
def test_states_are_saved_and_go_on(name, tmp_path):
    decoder = make(name)
    backbone = decoder.backbone
    x = torch.randn(2, 30, backbone.config.dim)
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[0, :4] = False
    with torch.no_grad():
        state = backbone.init_state(2, 40)
        backbone.step(x[:, :11], state, mask)
        backbone.step(x[:, 11:12], state)
        save_state(state, tmp_path / "state.safetensors")
        again = load_state(backbone, tmp_path / "state.safetensors", 40)
        for t in range(12, 30):
            torch.testing.assert_close(backbone.step(x[:, t : t + 1], again), backbone.step(x[:, t : t + 1], state))


def test_unusable_states_are_refused(tmp_path):
    backbone = create_backbone("hybrid_test")
    (tmp_path / "bad").write_bytes(b"no state")
    with pytest.raises(LoadError, match="bad: cannot be read as a saved state"):
        load_state(backbone, tmp_path / "bad", 10)
    save_state(create_backbone("illama_test").init_state(1, 4), tmp_path / "other")
    with pytest.raises(LoadError, match="other: is the state of another backbone than this Hybrid"):
        load_state(backbone, tmp_path / "other", 10)
    save_state(create_backbone("hybrid_test,state_dim=5").init_state(1, 4), tmp_path / "wide")
    with pytest.raises(LoadError, match=r"conv must be \(1, 3, 48\), got \(1, 3, 52\); was it of another"):
        load_state(backbone, tmp_path / "wide", 10)
    state = backbone.init_state(1, 8)
    with torch.no_grad():
        backbone.step(torch.randn(1, 8, 16), state)
    save_state(state, tmp_path / "full")
    with pytest.raises(LoadError, match="8 positions do not fit in a state made for max_len=4; make it with a larger"):
        load_state(backbone, tmp_path / "full", 4)


def test_settings_say_what_is_wrong():
    for options, text in (
        ({"method": "random"}, "method must be greedy, sample or beam, got 'random'"),
        ({"temperature": 0}, "temperature must be above 0, got 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"beams": 0}, "beams must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=text):
            Strategy(**options)
    with pytest.raises(ConfigError, match="max_new must be at least 1, got 0"):
        Stop(max_new=0)
    with pytest.raises(ConfigError, match=r"min_new must be from 0 to max_new \(3\), got 4"):
        Stop(max_new=3, min_new=4)
    decoder = make("hybrid_test")
    with pytest.raises(ShapeError, match="every prompt must have at least one token"):
        generate(decoder, [torch.tensor([], dtype=torch.long)], Stop(max_new=1))
    with pytest.raises(ConfigError, match="beams cannot be streamed"):
        next(stream(decoder, PROMPTS, Stop(max_new=1), Strategy(method="beam")))


def test_a_compiled_step_gives_the_same_tokens(monkeypatch):
    decoder = make("hybrid_test,pattern=M,depth=1")
    wanted = [g.ids.tolist() for g in generate(decoder, PROMPTS[:1], Stop(max_new=9), Strategy(seed=1))]
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = dataclasses.replace(decoder, compiled=True)
    assert [g.ids.tolist() for g in generate(compiled, PROMPTS[:1], Stop(max_new=9), Strategy(seed=1))] == wanted


class Rising:
    """Tokens may not fall, 0 apart; the embedding is told the sum so far."""

    def begin(self, batch, device):
        return torch.zeros(batch, 2, dtype=torch.long, device=device)

    def allowed(self, states):
        tokens = torch.arange(VOCABULARY)
        return (tokens >= states[:, :1]) | (tokens == 0)

    def read(self, states, ids):
        total = states[:, 1] + ids
        return torch.stack([ids, total], dim=-1), torch.stack([ids, total], dim=-1)


def embed_sums(embed, inputs):
    return embed(inputs[..., 0]) * (1 + 0.1 * (inputs[..., 1:] % 7))


@every_form
@pytest.mark.parametrize("machine", [False, True])
@pytest.mark.parametrize("method", ["greedy", "beam"])
def test_prefix_and_machine_equal_the_uncached_computation(name, machine, method):
    decoder = make(name)
    prefix = torch.randn(4, 5, decoder.backbone.config.dim, generator=torch.Generator().manual_seed(1))
    prompts = [torch.tensor([1, 3, 5]), torch.tensor([], dtype=torch.long), torch.tensor([4]), torch.tensor([0, 2, 2])]
    embed = decoder.embed
    decoder = dataclasses.replace(decoder, prefix=prefix)
    if machine:
        decoder = dataclasses.replace(decoder, machine=Rising(), embed=functools.partial(embed_sums, embed))
    strategy = Strategy(method=method, beams=1)
    found = generate(decoder, prompts, Stop(max_new=8, ids=(8,)), strategy, piece=4)
    for prompt, before, one in zip(prompts, prefix, found, strict=True):
        ids = prompt
        for token, log_prob in zip(one.ids, one.log_probs, strict=True):
            inputs = torch.stack([ids, ids.cumsum(0)], dim=-1) if machine else ids
            features = torch.cat([before, decoder.embed(inputs)])
            with torch.no_grad():
                expected = decoder.head(decoder.backbone(features[None]))[0, -1].log_softmax(-1)
            assert torch.allclose(expected[token], log_prob, atol=1e-4)
            if machine and len(ids):
                expected = expected.masked_fill(~Rising().allowed(torch.stack([ids[-1:], ids[-1:]], 1))[0], -torch.inf)
            assert int(expected.argmax()) == int(token)
            ids = torch.cat([ids, token[None]])
        assert one.reason == ("stop" if int(ids[-1]) == 8 else "length")


def test_machine_follows_beams_and_joins_the_grammar():
    decoder = make("illama_test")
    embed = functools.partial(embed_sums, decoder.embed)
    decoder = dataclasses.replace(decoder, machine=Rising(), embed=embed)
    found = beam_search(decoder, torch.tensor([2]), Stop(max_new=6), Strategy(method="beam", beams=4))
    assert len({tuple(one.ids.tolist()) for one in found}) == 4
    for one in found:
        ids = [2, *one.ids.tolist()]
        assert all(b >= a or b == 0 for a, b in itertools.pairwise(ids))
        inputs = torch.tensor(ids)
        features = embed(torch.stack([inputs, inputs.cumsum(0)], dim=-1))
        with torch.no_grad():
            every = decoder.head(decoder.backbone(features[None]))[0].log_softmax(-1)
        expected = every[:-1].gather(1, inputs[1:, None])[:, 0]
        assert torch.allclose(expected, one.log_probs, atol=1e-4)

    def never_zero(tokens, items):
        return torch.arange(VOCABULARY) > 0

    (one,) = generate(decoder, [torch.tensor([7])], Stop(max_new=4), Strategy(seed=3), allowed=never_zero)
    assert set(one.ids.tolist()) <= {7, 8}


def test_prefixes_must_be_as_many_as_prompts():
    decoder = dataclasses.replace(make("illama_test"), prefix=torch.zeros(2, 3, 16))
    with pytest.raises(ShapeError, match="decoding: 1 prompts need as many prefixes, got 2"):
        generate(decoder, [torch.tensor([1])], Stop(max_new=2))
