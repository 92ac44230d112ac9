"""Meshes from generators: steps equal the whole, grammar, strategies, limits."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import trimesh
from tests.domains.mesh.test_model import AMT, BACKBONES, batch, build

from vertebra.backbones.decoding import Stop, Strategy, stream
from vertebra.domains.mesh.generation import (
    GREEDY,
    GeneratedMesh,
    MeshMachine,
    closest,
    decoder_of,
    generate_best,
    generate_meshes,
    read_mesh_ids,
)
from vertebra.domains.mesh.geometry import CONDITION_SCALE, quantized, sample_surface
from vertebra.domains.mesh.model import BEGIN, END, PAD, SPECIAL
from vertebra.domains.mesh.procedural import draw
from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import MESH_TOKENIZERS, CoordinateTokenizer, canonical, make_mesh_tokenizer, same_faces

SAMPLE = Strategy(method="sample", seed=3)


def ending(model, push=2.0):
    """Make the end likelier, so that an untrained model comes to one."""
    with torch.no_grad():
        model.head.weight.mul_(0.2)
    head, shift = model.head, torch.zeros(model.head.out_features)
    shift[END] = push
    model.head = torch.nn.Linear(head.in_features, head.out_features)
    with torch.no_grad():
        model.head.weight.copy_(head.weight)
        model.head.bias.copy_(shift)
    return model.eval()


def same(a, b):
    assert a.mesh == b.mesh
    assert (a.tokens, a.finished, a.faces) == (b.tokens, b.finished, b.faces)
    assert a.log_prob == pytest.approx(b.log_prob, abs=1e-3)


# ---------------------------------------------------------------- steps


@pytest.mark.parametrize("name", BACKBONES)
def test_steps_equal_the_forward_pass(name):
    model = build(name, buckets=(30,))
    points, ids, kinds, mask = batch()
    buckets = torch.tensor([1, 2])
    expected = model(points, ids, kinds, mask, buckets)
    decoder = decoder_of(model, model.condition(points, buckets))
    with torch.inference_mode():
        state, logits, states = decoder.begin(torch.empty(2, 0, dtype=torch.long), 40, 7)
        for i in range(40):
            torch.testing.assert_close(logits, expected[:, i], atol=5e-5, rtol=1e-4)
            assert decoder.machine.allowed(states).gather(1, ids[:, i : i + 1]).all() or i == 39  # cut: END is early
            if i < 39:
                features, states = decoder.read(ids[:, i], states)
                logits = decoder.logits(features, state)


def test_what_is_generated_has_the_probability_that_the_forward_pass_gives_it():
    model = ending(build("hybrid_test"))
    points = batch()[0]
    made = generate_meshes(model, points, SAMPLE)
    assert all(one.finished for one in made)
    steps = list(
        stream(
            decoder_of(model, model.condition(points).detach()),
            torch.empty(2, 0, dtype=torch.long),
            Stop(max_new=202, ids=(END,)),
            SAMPLE,
        )
    )
    for row, one in enumerate(made):
        ids = torch.cat([step.ids[step.items == row] for step in steps])
        assert (int(ids[0]), int(ids[-1])) == (BEGIN, END)
        own = (ids[1:-1] - SPECIAL).numpy()
        kinds = torch.tensor([[BEGIN, *(model.tokenizer.kinds(own) + SPECIAL), END]])
        logits = model(points[row : row + 1], ids[None], kinds, torch.ones_like(kinds, dtype=torch.bool))
        log_probs = logits.log_softmax(-1)[0].gather(1, ids[:, None])
        assert one.log_prob == pytest.approx(log_probs.sum().item(), abs=2e-3)
        assert one.mesh == model.tokenizer.decode(own)
        assert one.tokens == len(own)


# ---------------------------------------------------------------- grammar


def test_the_machine_frames_the_grammar():
    machine = MeshMachine(AMT.grammar())
    states = machine.begin(2, torch.device("cpu"))
    may = machine.allowed(states)
    assert may.shape == (2, SPECIAL + AMT.vocab_size)
    assert may.nonzero()[:, 1].tolist() == [BEGIN, BEGIN]
    inputs, states = machine.read(states, torch.tensor([BEGIN, BEGIN]))
    assert inputs.tolist() == [[BEGIN, BEGIN]] * 2
    assert not machine.allowed(states)[:, :SPECIAL].any()  # neither another begin, nor the end, nor padding
    triangle = canonical(np.eye(3, dtype=int), [[0, 1, 2]])
    own = AMT.encode(triangle)
    for token, kind in zip(own, AMT.kinds(own), strict=True):
        assert not machine.allowed(states)[0, END]
        inputs, states = machine.read(states, torch.tensor([token + SPECIAL] * 2))
        assert inputs.tolist() == [[token + SPECIAL, kind + SPECIAL]] * 2
    assert machine.allowed(states)[:, END].all()
    assert not machine.allowed(states)[:, [BEGIN, PAD]].any()
    inputs, states = machine.read(states, torch.tensor([END, END]))
    assert inputs.tolist() == [[END, END]] * 2


@pytest.mark.parametrize("strategy", [GREEDY, SAMPLE, Strategy(method="beam", beams=2)], ids=lambda s: s.method)
@pytest.mark.parametrize("name", MESH_TOKENIZERS)
def test_untrained_models_write_meshes(name, strategy):
    tokenizer = make_mesh_tokenizer(name, 16)
    ended = 0
    for push in (0, 4):
        model = ending(build(tokenizer=tokenizer), push)
        points = batch((12, 12, 12), AMT)[0]
        for one in generate_meshes(model, points, strategy, max_tokens=60):
            assert one.tokens <= 60
            ended += one.finished
            assert one.faces > 0 or not one.finished
            assert len(one.mesh.faces) <= one.faces
            if len(one.mesh.faces):  # those without an area are left out
                assert 0 <= one.mesh.vertices.min() <= one.mesh.vertices.max() < 16
                assert all(len({tuple(corner) for corner in face}) == 3 for face in one.mesh.corners.tolist())
                assert same_faces(tokenizer.decode(tokenizer.encode(one.mesh)), one.mesh)
    assert ended >= 2


@pytest.mark.parametrize("name", MESH_TOKENIZERS)
def test_finished_sequences_decode_strictly(name):
    tokenizer = make_mesh_tokenizer(name, 16)
    model = ending(build(tokenizer=tokenizer), 3)
    prefix = model.condition(batch((12,) * 6)[0]).detach()
    prompts = torch.empty(6, 0, dtype=torch.long)
    ids = [[] for _ in range(6)]
    for step in stream(decoder_of(model, prefix), prompts, Stop(max_new=400, ids=(END,)), SAMPLE):
        for item, token in zip(step.items.tolist(), step.ids.tolist(), strict=True):
            ids[item].append(token)
    ended = [row for row in ids if row[-1] == END]
    assert len(ended) >= 3
    for row in ended:
        own = np.array(row[1:-1]) - SPECIAL
        assert own.min() >= 0
        corners = tokenizer.triangles(own)  # strict
        assert len(corners) > 0
        for a, b in ((0, 1), (1, 2), (2, 0)):
            assert (corners[:, a] != corners[:, b]).any(1).all()


# ---------------------------------------------------------------- batches and strategies


@pytest.mark.parametrize("strategy", [GREEDY, SAMPLE, Strategy(method="beam", beams=3)], ids=lambda s: s.method)
@pytest.mark.parametrize("name", ["hybrid_test", "fit_test", "opt_test"])
def test_a_result_does_not_depend_on_its_batch(name, strategy):
    model = ending(build(name), 1)
    points = batch((12,) * 4)[0]
    together = generate_meshes(model, points, strategy, max_tokens=50)
    assert len({one.tokens for one in together}) > 1 or strategy.method != "sample"  # items leave at different times
    for row, one in enumerate(together):
        (alone,) = generate_meshes(model, points[row : row + 1], strategy, max_tokens=50, numbers=[row])
        same(alone, one)


def test_draws_follow_seed_and_number():
    model = ending(build(), 1)
    points = batch((12,))[0].expand(4, -1, -1)
    first, again = (generate_meshes(model, points, SAMPLE, max_tokens=60) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        same(a, b)
    assert any(one.mesh != first[0].mesh for one in first[1:])
    moved = generate_meshes(model, points[:2], SAMPLE, max_tokens=60, numbers=[3, 1])
    same(moved[0], first[3])
    same(moved[1], first[1])
    other = generate_meshes(model, points, replace(SAMPLE, seed=4), max_tokens=60)
    assert any(a.mesh != b.mesh for a, b in zip(first, other, strict=True))


def test_strategies_choose_as_they_say():
    model = ending(build(), 1)
    points = batch((12, 12))[0]
    greedy = generate_meshes(model, points, max_tokens=40)
    for strategy in (
        Strategy(method="sample", top_k=1),
        Strategy(method="sample", top_p=1e-9),
        Strategy(method="sample", temperature=1e-4),
        Strategy(method="beam", beams=1),
    ):
        for a, b in zip(generate_meshes(model, points, strategy, max_tokens=40), greedy, strict=True):
            same(a, b)
    some = generate_meshes(model, points, Strategy(method="sample", top_k=3, top_p=0.9, seed=1), max_tokens=40)
    assert any(a.mesh != b.mesh for a, b in zip(some, greedy, strict=True))
    beams = generate_meshes(model, points, Strategy(method="beam", beams=8), max_tokens=40)
    for beam, one in zip(beams, greedy, strict=True):
        assert beam.log_prob >= one.log_prob


def test_the_number_of_faces_reaches_the_model():
    model = build(buckets=(30, 60))
    points = batch()[0]
    low, high, unknown = (
        generate_meshes(model, points, faces=faces, max_tokens=30) for faces in ([10, 10], [99, 10], None)
    )
    assert low[0].log_prob != high[0].log_prob
    assert low[0].log_prob != unknown[0].log_prob
    same(low[1], high[1])
    with pytest.raises(ConfigError, match=r"^faces: this model was trained without a face count"):
        generate_meshes(build(), points, faces=[10, 10])


# ---------------------------------------------------------------- the best of several


EMPTY = canonical(np.zeros((0, 3), int), np.zeros((0, 3), int))


def made_of(mesh, finished=True):
    return GeneratedMesh(mesh, 9, -1.0, finished, len(mesh.faces))


def test_faces_without_an_area_are_left_out():
    model = build()
    corners = np.array([[[0, 0, 0], [1, 1, 1], [3, 3, 3]], [[0, 0, 0], [1, 1, 1], [3, 3, 2]]])
    model.tokenizer = CoordinateTokenizer(16)
    ids = [BEGIN, *(SPECIAL + int(i) for i in corners.reshape(-1)), END]
    made = read_mesh_ids(model, ids, [-1.0] * len(ids), True, 40)
    assert made.faces == 2
    assert len(made.mesh.faces) == 1
    assert made.tokens == 18


def test_the_closest_is_found():
    model = build()
    box, ball = draw("train", 0, 0), trimesh.creation.icosphere(1, 0.5)
    own, other = (made_of(quantized(mesh, 16)[0]) for mesh in (box, ball))
    points = sample_surface(box.vertices * CONDITION_SCALE, box.faces, 500, np.random.default_rng(0))
    points = torch.tensor(np.concatenate(points, axis=1), dtype=torch.float32)
    cut, far = made_of(own.mesh, finished=False), made_of(other.mesh, finished=False)
    for few, best in (
        ([other, own], 1),
        ([own, other], 0),
        ([made_of(EMPTY), made_of(EMPTY), other], 2),
        ([cut, other], 1),
        ([far, cut], 1),
        ([made_of(EMPTY), cut], 1),
        ([made_of(EMPTY)], 0),
    ):
        assert closest(model, points, few) == best


def test_the_best_of_several_is_kept():
    model = ending(build(buckets=(30,)), 1)
    points = batch((12,) * 3)[0]
    for strategy in (GREEDY, SAMPLE, Strategy(method="beam", beams=2)):
        alone = generate_meshes(model, points, strategy, max_tokens=40)
        for one, best in zip(alone, generate_best(model, points, strategy, max_tokens=40), strict=True):
            same(one, best)
    told = {"max_tokens": 40, "faces": [10, 50, 10]}
    rounds = [generate_meshes(model, points, SAMPLE, numbers=[5, 6, 7], **told)]
    rounds += [generate_meshes(model, points, SAMPLE, numbers=[15 + k, 18 + k, 21 + k], **told) for k in (1, 2)]
    best = generate_best(model, points, SAMPLE, candidates=3, numbers=[5, 6, 7], **told)
    for row, one in enumerate(best):
        few = [made[row] for made in rounds]
        same(one, few[closest(model, points[row], few)])
    assert any(a.mesh != b.mesh for a, b in zip(rounds[0], best, strict=True))
    with pytest.raises(ConfigError, match=r"^candidates must be at least 1, got 0\.$"):
        generate_best(model, points, candidates=0)


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("method", ["greedy", "sample", "beam"])
def test_no_more_than_max_tokens(method):
    model = ending(build(), -50.0)
    points = batch()[0]
    for most in (1, 8, 9, 10, 37):
        for one in generate_meshes(model, points, Strategy(method=method, beams=2), max_tokens=most):
            assert not one.finished
            assert one.tokens == most
            assert (one.faces > 0) == (most >= 9)


def test_a_mesh_of_exactly_max_tokens_is_finished():
    model = ending(build(), 50.0)  # the end comes as soon as it may: after nine tokens
    for most, finished in ((8, False), (9, True), (10, True)):
        for one in generate_meshes(model, batch()[0], max_tokens=most):
            assert (one.finished, one.tokens) == (finished, min(most, 9))
            assert one.faces == int(finished)


def test_limits_beyond_training_are_refused():
    model = build()
    for most in (0, 201, -1):
        with pytest.raises(
            ConfigError,
            match=rf"^max_tokens must be between 1 and 200, the most this model was trained with, got {most}\.$",
        ):
            generate_meshes(model, batch()[0], max_tokens=most)


def test_progress_counts_steps_and_items():
    model = ending(build(), 1)
    calls = []
    made = generate_meshes(
        model, batch((12,) * 4)[0], SAMPLE, max_tokens=50, progress=lambda done, going: calls.append((done, going))
    )
    assert [done for done, _ in calls] == list(range(1, len(calls) + 1))
    assert calls[0][1] == 4
    assert all(a >= b for (_, a), (_, b) in pairwise(calls))
    assert sum(going for _, going in calls) == sum(one.tokens + 2 if one.finished else 52 for one in made)
