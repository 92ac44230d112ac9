"""The residual quantizer by hand, and the VQ-VAE of meshes: tokens, padding, both stages, and what is refused."""

import subprocess
import sys
from copy import deepcopy

import pytest
import torch

from vertebra.backbones.opt import OPTConfig
from vertebra.domains.mesh.vqvae import MeshVQVAE, ResidualVQ
from vertebra.errors import ConfigError, DataError, ShapeError, UnknownNameError

BERT = OPTConfig(
    dim=48, depth=2, heads=4, hidden=96, causal=False, norm_first=False, activation="gelu", positions="none"
)
SIZES = {"bins": 16, "codebook_size": 32, "code_dim": 16, "max_faces": 12, "embed_dim": 8, "decay": 0.9, "patience": 50}


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return MeshVQVAE(BERT, **{**SIZES, **changes})


def some_faces(batch=3, count=12, bins=16):
    """Random triangles over eight vertices a mesh, so that vertices are shared."""
    vertices = torch.randint(bins, (batch, 8, 3))
    picked = torch.rand(batch, count, 8).argsort(-1)[..., :3]
    return torch.stack([v[p] for v, p in zip(vertices, picked, strict=True)])  # (B, F, 3, 3)


def quantizer(codes, **changes):
    codes = torch.as_tensor(codes, dtype=torch.float32)
    made = ResidualVQ(codes.shape[1], len(codes), **{"levels": 1, "patience": 3, **changes})
    made.codebook.copy_(codes)
    made.sums.copy_(codes)
    made.counts.fill_(1)
    made.idle.zero_()
    return made


# ---------------------------------------------------------------- quantizer


def test_levels_take_the_nearest_code_of_the_rest():
    made = quantizer([[0.0, 0.0], [4.0, 0.0], [0.0, 1.0], [0.25, 0.0]], levels=3).eval()
    x = torch.tensor([[4.25, 1.0], [0.25, 0.1]])
    found = made(x)
    # The nearest to (4.25, 1) is (4, 0); the rest (0.25, 1) is nearest to (0, 1); what is left is a code itself.
    assert found.ids.tolist() == [[1, 2, 3], [3, 0, 0]]
    torch.testing.assert_close(found.vectors, torch.tensor([[4.25, 1.0], [0.25, 0.0]]))
    torch.testing.assert_close(made.lookup(found.ids), found.vectors)
    torch.testing.assert_close(made.assign(x), found.ids)
    # Rests behind the levels: (.25, 1), (.25, 0), (0, 0), and three times (0, .1).
    levels = [(0.0625 + 1 + 0.01) / 4, (0.0625 + 0.01) / 4, 0.01 / 4]
    assert found.commitment.item() == pytest.approx(sum(levels))


def test_the_codebook_follows_its_vectors_by_hand():
    made = quantizer([[0.0, 0.0], [10.0, 0.0], [0.0, 50.0]], decay=0.75)
    made(torch.tensor([[1.0, 0.0], [3.0, 2.0], [9.0, 1.0]]))
    # counts = .75 * 1 + .25 * (2, 1, 0); sums = .75 * codes + .25 * ((4, 2), (9, 1), (0, 0)); code = sum / count.
    torch.testing.assert_close(made.counts, torch.tensor([1.25, 1.0, 0.75]))
    torch.testing.assert_close(made.codebook, torch.tensor([[0.8, 0.4], [9.75, 0.25], [0.0, 50.0]]))
    made(torch.tensor([[0.8, 0.4], [0.8, 1.4]]))
    # counts = .75 * (1.25, 1, .75) + .25 * (2, 0, 0); sums = .75 * (1, .5) + .25 * (1.6, 1.8).
    torch.testing.assert_close(made.counts, torch.tensor([1.4375, 0.75, 0.5625]))
    torch.testing.assert_close(made.codebook[0], torch.tensor([1.15, 0.825]) / 1.4375)
    torch.testing.assert_close(made.codebook[1:], torch.tensor([[9.75, 0.25], [0.0, 50.0]]))
    assert made.idle.tolist() == [0, 1, 2]


def test_all_levels_move_the_one_codebook():
    made = quantizer([[0.0], [8.0]], levels=2, decay=0.5)
    made(torch.tensor([[10.0]]))
    # Level 1 gives 10 to code 8, level 2 its rest 2 to code 0.
    torch.testing.assert_close(made.counts, torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(made.codebook, torch.tensor([[1.0], [9.0]]))


def test_a_dead_code_begins_anew_at_a_vector_and_is_used():
    made = quantizer([[0.0, 0.0], [100.0, 100.0]], decay=0.75)
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0]])
    made(x)
    made(x)
    assert made.codebook[1].tolist() == [100, 100]
    assert made.idle.tolist() == [0, 2]
    made(x)
    assert made.codebook[1].tolist() in x.tolist()
    torch.testing.assert_close(made.sums[1], 0.25 * made.codebook[1])
    assert made.counts[1] == 0.25
    assert made.idle.tolist() == [0, 0]
    assert set(made.assign(x).flatten().tolist()) == {0, 1}


def test_the_first_step_puts_all_codes_on_the_data():
    made = ResidualVQ(2, 6, 1)
    x = torch.randn(20, 2) + 40
    made(x)
    assert made.codebook.min() > 30
    assert len(made.codebook.unique(dim=0)) == 6
    more = ResidualVQ(2, 30, 1)  # than vectors
    more(x)
    assert more.codebook.min() > 30
    assert not more.idle.any()


def test_the_gradient_passes_straight_through():
    made = quantizer(torch.randn(5, 3), levels=2)
    x = torch.randn(4, 3, requires_grad=True)
    pull = torch.randn(4, 3)
    (gradient,) = torch.autograd.grad((made(x).vectors * pull).sum(), x)
    assert torch.equal(gradient, pull)
    found = made.eval()(x)
    (gradient,) = torch.autograd.grad(found.commitment, x)
    sums = made.codebook[found.ids].cumsum(1)
    torch.testing.assert_close(gradient, (2 * (x[:, None] - sums) / 12).sum(1))
    assert not list(made.parameters())


def test_evaluation_and_assignment_change_nothing():
    made = quantizer(torch.randn(5, 3), levels=2)
    before = deepcopy(made.state_dict())
    made.assign(torch.randn(9, 3))
    made.eval()(torch.randn(9, 3))
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())


def test_one_seed_one_codebook_which_is_saved():
    made = []
    for _ in range(2):
        torch.manual_seed(5)
        made.append(ResidualVQ(3, 8, 2, patience=2))
        for _ in range(6):
            made[-1](torch.randn(10, 3), noise=0.3)
    first, second = (m.state_dict() for m in made)
    assert set(first) == {"codebook", "counts", "sums", "idle"}
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = ResidualVQ(3, 8, 2, patience=2)
    other.load_state_dict(first)
    for one in (made[0], other):
        torch.manual_seed(6)
        one(torch.ones(4, 3))
    assert torch.equal(other.codebook, made[0].codebook)
    assert torch.equal(other.idle, made[0].idle)


def test_noise_draws_codes_in_proportion_to_the_exponential_of_their_distances():
    made = quantizer([[0.0], [1.0], [3.0]])
    drawn = made.assign(torch.zeros(20_000, 1), noise=2.0).flatten()
    expected = (-torch.tensor([0.0, 1.0, 3.0]) / 2).softmax(0)
    torch.testing.assert_close(drawn.bincount(minlength=3) / 20_000, expected, atol=0.015, rtol=0)


def test_many_vectors_are_assigned_part_by_part(monkeypatch):
    made, x = quantizer(torch.randn(7, 3), levels=3), torch.randn(50, 3)
    whole = made.assign(x)
    monkeypatch.setattr("vertebra.domains.mesh.vqvae.DISTANCES", 7 * 4)
    assert torch.equal(made.assign(x), whole)


DDP = """
import sys, torch, torch.distributed as dist
from vertebra.domains.mesh.vqvae import ResidualVQ
torch.set_num_threads(1)
rank, folder = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
given = torch.load(f"{folder}/given.pt", weights_only=True)
follows, revives = ResidualVQ(3, 8, 2), ResidualVQ(3, 8, 2, patience=2)
for made in (follows, revives):
    made.load_state_dict(given["state"])
torch.manual_seed(rank)
for x in given["steps"]:
    share = x[:3] if rank else x[3:]
    follows(share)
    revives(share)
torch.save([follows.state_dict(), revives.state_dict()], f"{folder}/{rank}.pt")
dist.barrier()
dist.destroy_process_group()  # or its threads abort the interpreter at exit, now and then
"""


@pytest.mark.slow
def test_two_processes_keep_the_codebook_of_one(tmp_path):
    alone, steps = quantizer(torch.randn(8, 3), levels=2, decay=0.99, patience=100), torch.randn(5, 10, 3)
    torch.save({"state": alone.state_dict(), "steps": steps}, tmp_path / "given.pt")
    words = [sys.executable, "-P", "-c", DDP]
    running = [subprocess.Popen([*words, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(timeout=120) for process in running] == [0, 0]
    for x in steps:
        alone(x)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(first[0][name], value)
        assert torch.equal(first[0][name], second[0][name])
        assert torch.equal(first[1][name], second[1][name])
    assert not torch.equal(first[0]["codebook"], first[1]["codebook"])  # codes were drawn anew


# ---------------------------------------------------------------- model


@pytest.fixture(scope="module")
def trained():
    """A model that has learned three small meshes, and they."""
    model, faces = build(condition_tokens=9, condition_width=5), some_faces()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    losses = []
    for _ in range(60):
        losses.append(model(faces))
        optimizer.zero_grad()
        losses[-1].total.backward()
        optimizer.step()
    return model.eval(), faces, losses


def test_training_brings_the_faces_back(trained):
    model, faces, losses = trained
    assert losses[0].accuracy < 0.15  # one in 16 by chance
    assert losses[-1].accuracy > 0.98
    assert losses[0].reconstruction.item() == pytest.approx(2.77, abs=0.2)  # ln 16
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[1, 7:] = False
    ids = model.encode_ids(faces)
    assert (model.decode_faces(ids) == faces).float().mean() > 0.98
    assert (model.decode_faces(ids, mask)[1, 7:] == -1).all()
    assert len(ids.unique()) > 16  # the codebook is in use
    assert model.decode_ids(ids).shape == (3, 12, 3, 3, 16)


def test_tokens_are_face_by_face_vertex_by_vertex_level_by_level(trained):
    model, faces, _ = trained
    ids = model.encode_ids(faces)
    assert model.tokens_per_face == 9
    assert ids.shape == (3, 12 * 9)
    codes = ids.unflatten(1, (12, 3, 3))
    for item in range(3):
        by_vertex = {}
        for vertex, code in zip(faces[item].flatten(0, 1).tolist(), codes[item].flatten(0, 1).tolist(), strict=True):
            assert by_vertex.setdefault(tuple(vertex), code) == code  # a vertex has one code in all its faces
        assert len(by_vertex) == 8
    vectors = model.encoder(faces, torch.ones(3, 12, dtype=torch.bool))
    means = torch.empty_like(vectors)
    for item, face, corner in torch.cartesian_prod(*map(torch.arange, (3, 12, 3))).tolist():
        same = (faces[item] == faces[item, face, corner]).all(-1)
        means[item, face, corner] = vectors[item][same].mean(0)
    assert torch.equal(model.quantizer.assign(means.flatten(0, 2)).view_as(codes), codes)
    torch.testing.assert_close(
        model.decode_ids(ids), model.decoder(model.quantizer.lookup(codes), torch.ones(3, 12, dtype=torch.bool))
    )


def test_losses_by_hand(trained):
    model, faces, _ = trained
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[2, 4:] = False
    losses = model(faces, mask)
    logits = model.decode_ids(model.encode_ids(faces, mask), mask)[mask]
    likelihood = logits.log_softmax(-1).gather(-1, faces[mask][..., None])
    torch.testing.assert_close(losses.reconstruction, -likelihood.mean())
    torch.testing.assert_close(losses.total, losses.reconstruction + 0.1 * losses.commitment)
    assert losses.accuracy.item() == pytest.approx((logits.argmax(-1) == faces[mask]).float().mean().item())


def test_what_stands_at_padding_means_nothing():
    faces = some_faces()
    mask = torch.ones(3, 12, dtype=torch.bool)
    mask[0, 5:] = mask[1, 9:] = False
    other = faces.clone()
    other[~mask] = -77
    models = []
    for given in (faces, other):
        models.append(build())
        torch.manual_seed(1)
        losses = models[-1](given, mask)
        losses.total.backward()
    for (name, parameter), twin in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(parameter.grad, twin.grad), name
    assert torch.equal(models[0].quantizer.codebook, models[1].quantizer.codebook)
    model = models[0].eval()
    ids = model.encode_ids(other, mask)
    assert (ids.unflatten(1, (12, 9))[~mask] == -1).all()
    assert torch.equal(ids[0, :45], model.encode_ids(faces[:1, :5])[0])
    alone = model.decode_ids(ids[:1, :45])
    torch.testing.assert_close(model.decode_ids(ids, mask)[:1, :5], alone, atol=1e-5, rtol=1e-5)
    short = model(faces[:1, :5])
    cut = model(faces[:1], mask[:1])
    torch.testing.assert_close(cut.total, short.total, atol=1e-5, rtol=1e-5)


def test_the_gradient_reaches_everything_that_learns():
    model = build(condition_tokens=4, condition_width=6)
    faces, condition = some_faces(), torch.randn(3, 4, 6)
    model(faces).total.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert silent == {n for n, _ in model.named_parameters() if n.startswith("decoder.condition.")}
    model.zero_grad()
    model.set_stage(2)
    model(faces, condition=condition, noise=0.1).total.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    assert silent == {n for n, _ in model.named_parameters() if n.startswith("encoder.")}
    assert silent == {n for n, p in model.named_parameters() if not p.requires_grad}


# ---------------------------------------------------------------- stage 2


def test_stage_2_resists_noise_and_leaves_the_encoder_alone(trained):
    stage_1, faces, _ = trained
    model = deepcopy(stage_1).train()
    condition = torch.randn(3, 9, 5)
    noise = 1.0
    before = float(stage_1(faces, noise=noise).accuracy)
    kept = deepcopy({**model.encoder.state_dict(), **model.quantizer.state_dict()})
    model.set_stage(2)
    assert model.decoder.training
    assert not model.encoder.training
    assert not model.quantizer.training
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 4e-3)
    for _ in range(60):
        losses = model(faces, condition=condition, noise=noise)
        assert torch.equal(losses.total, losses.reconstruction)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    for name, value in {**model.encoder.state_dict(), **model.quantizer.state_dict()}.items():
        assert torch.equal(value, kept[name]), name
    model.eval()
    after = float(model(faces, condition=condition, noise=noise).accuracy)
    assert before < 0.7
    assert after > 0.95
    ids = model.encode_ids(faces)
    assert (model.decode_faces(ids, condition=condition) == faces).float().mean() > 0.98
    assert not torch.equal(model.encode_ids(faces, noise=noise), ids)
    flipped = model.decode_ids(ids, condition=-condition)
    assert not torch.allclose(flipped, model.decode_ids(ids, condition=condition), atol=1e-2)


def test_the_decoder_by_hand():
    model = build(condition_tokens=4, condition_width=6).eval()
    model.set_stage(2)
    ids, condition = torch.randint(32, (1, 18)), torch.randn(1, 4, 6)
    part, decoder = model.decoder.condition, model.decoder
    codes = model.quantizer.codebook[ids].unflatten(1, (2, 3, 3)).sum(3).flatten(2)  # (1, 2, 48)
    front = torch.cat([part.head_proj(condition[:, :1]), part.proj(condition[:, 1:])], 1) + part.positions.weight
    x = torch.cat([part.norm(front), decoder.norm(decoder.proj(codes) + decoder.positions.weight[:2])], 1)
    expected = decoder.head(decoder.backbone(x)[:, 4:]).view(1, 2, 3, 3, 16)
    torch.testing.assert_close(model.decode_ids(ids, condition=condition), expected)


# ---------------------------------------------------------------- made and refused


def test_backbones_by_name_by_config_and_ready_made():
    named = MeshVQVAE("opt_test,causal=false", **SIZES)
    assert named.encoder.backbone.config == named.decoder.backbone.config
    assert named.encoder.backbone is not named.decoder.backbone
    ready = BERT.build()
    assert MeshVQVAE(ready, **SIZES).encoder.backbone is ready
    with pytest.raises(UnknownNameError, match="Did you mean 'opt_test'"):
        MeshVQVAE("opt_tset", **SIZES)


def test_fresh_weights_and_the_names_that_do_not_decay():
    model = build(condition_tokens=4, condition_width=6, max_faces=500)
    assert model.encoder.embed.weight.std().item() == pytest.approx(1, rel=0.2)
    assert model.decoder.positions.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.decoder.head.bias.any()
    places = {"encoder.positions.weight", "decoder.positions.weight", "decoder.condition.positions.weight"}
    assert model.no_weight_decay() == places
    learned = MeshVQVAE("opt_test,causal=false", **SIZES).no_weight_decay()
    assert {"encoder.backbone.positions.weight", "decoder.backbone.positions.weight"} < learned


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"bins": 0}, "bins must be at least 1, got 0"),
        ({"codebook_size": 0}, "size must be at least 1, got 0"),
        ({"decay": 1.0}, "decay must be in [0, 1), got 1.0"),
        ({"condition_tokens": 3}, "must both be positive, or both 0 for a decoder that sees no shape, got 3 and 0"),
    ],
)
def test_impossible_settings(changes, text):
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    assert text in str(caught.value)


def test_a_causal_backbone_and_a_third_stage():
    with pytest.raises(ConfigError, match="must be bidirectional, got causal=True; set causal=False"):
        MeshVQVAE("opt_test", **SIZES)
    with pytest.raises(ConfigError, match="stage must be 1 or 2, got 3"):
        build().set_stage(3)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, f: m(f.flatten(2)), ShapeError, "faces must be int64 (B, F, 3, 3), got torch.int64 (3, 12, 9)"),
        (lambda m, f: m(f + 9), DataError, "faces must be from 0 to 15, got 9 to"),
        (lambda m, f: m(f.repeat(1, 2, 1, 1)), ShapeError, "a mesh of 24 faces is larger than max_faces=12; build"),
        (lambda m, f: m(f, torch.ones(3, 12)), ShapeError, "mask must be bool (3, 12) (True = real face), got torch."),
        (lambda m, f: m(f, torch.zeros(3, 12).bool()), ShapeError, "no face of the batch is real; leave empty meshes"),
        (lambda m, f: m(f, condition=torch.zeros(3, 4, 6)), ShapeError, "condition must be None in stage 1 with condi"),
        (lambda m, f: m.decode_ids(torch.zeros(3, 10).long()), ShapeError, "ids must be (B, F * 9), whole faces, got"),
        (lambda m, f: m.decode_ids(torch.full((3, 9), 32)), DataError, "ids must be from 0 to 31, got 32 to 32; use"),
        (lambda m, f: m.quantizer(torch.zeros(0, 16)), ShapeError, "x must be (N, 16) with at least one vector, got"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error) as caught:
        call(build(), some_faces())
    assert text in str(caught.value)


def test_stage_2_wants_the_shape_it_was_built_for():
    model, faces = build(condition_tokens=4, condition_width=6), some_faces()
    model.set_stage(2)
    with pytest.raises(ShapeError) as caught:
        model(faces)
    assert "must be (3, 4, 6) in stage 2 with condition_tokens=4, got None; see set_stage" in str(caught.value)
    with pytest.raises(ShapeError, match=r"got \(3, 4, 5\)"):
        model.decode_ids(model.encode_ids(faces), condition=torch.zeros(3, 4, 5))
    plain = build()
    plain.set_stage(2)
    assert plain(faces, noise=0.1).total.requires_grad
