"""The residual quantizer by hand, and the VQ-VAE of meshes: tokens, padding, both stages, and what is refused."""

import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.base import create_backbone
from vertebra.backbones.opt import OPTConfig
from vertebra.domains.mesh.encoder import ShapeEncoderConfig
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.mesh.vqvae import MeshVQVAE, ResidualVQ
from vertebra.domains.optim import OptimizerConfig, parameter_table
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.mesh import make_mesh_tokenizer
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

BERT = OPTConfig(
    dim=48, depth=2, heads=4, hidden=96, causal=False, norm_first=False, activation="gelu", positions="none"
)
SPEC = MeshSpec(tokenizer=make_mesh_tokenizer("plain", 16).to_dict(), max_faces=12)
SIZES = {"codebook_size": 32, "code_dim": 16, "embed_dim": 8, "decay": 0.9, "patience": 50}
SHAPE = {"width": 8, "heads": 2, "layers": 1, "latents": 4, "frequencies": 2}
IDLE = ("embed.", "backbone.", "vertex_head.", "quantizer.")  # in stage 2


def build(seed=0, backbone=BERT, spec=SPEC, **changes):
    torch.manual_seed(seed)
    return MeshVQVAE(backbone.build(), spec, **{**SIZES, **changes})


def some_points(batch=3, count=20):
    """Clouds of points, each about a place of its own, so that they are easily told apart."""
    places = torch.rand(batch, 1, 3) - 0.5
    return torch.cat([places + torch.rand(batch, count, 3) / 2, F.normalize(torch.randn(batch, count, 3), dim=-1)], -1)


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
    model, faces = build(shape_encoder=SHAPE), some_faces()
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    losses = []
    for _ in range(60):
        losses.append(model(faces))
        optimizer.zero_grad()
        losses[-1].total.backward()
        optimizer.step()
    return model.eval(), faces, losses


def share(found, faces):
    return (found.faces == faces).float().mean().item()


def test_training_brings_the_faces_back(trained):
    model, faces, losses = trained
    assert share(losses[0], faces) < 0.15  # one in 16 by chance
    assert share(losses[-1], faces) > 0.98
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
    vectors = model.vertex_head(model.backbone(model.embed(faces))).unflatten(-1, (3, 16))
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
    assert torch.equal(losses.faces[mask], logits.argmax(-1))
    assert (losses.faces[~mask] == -1).all()
    assert torch.equal(losses.ids, model.encode_ids(faces, mask))


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


@pytest.mark.parametrize("stage", [1, 2])
def test_the_gradient_reaches_everything_that_learns(stage):
    model = build(shape_encoder=SHAPE, stage=stage)
    points, noise = (some_points(), 0.1) if stage == 2 else (None, 0.0)
    model(some_faces(), points=points, noise=noise).total.backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()}
    idle = IDLE if stage == 2 else ("shape.", "decoder.condition.")
    assert silent == {n for n, _ in model.named_parameters() if n.startswith(idle)}
    assert silent == {n for n, p in model.named_parameters() if not p.requires_grad}


# ---------------------------------------------------------------- stage 2


def test_stage_2_resists_noise_and_leaves_the_encoder_alone(trained):
    stage_1, faces, _ = trained
    model = build(1, shape_encoder=SHAPE, stage=2)
    model.load_state_dict(stage_1.state_dict())
    points, noise = some_points(), 1.0
    before = share(stage_1(faces, noise=noise), faces)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.decoder.training
    assert model.shape.training
    assert not any(part.training for part in (model.embed, model.backbone, model.vertex_head, model.quantizer))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 4e-3)
    for _ in range(60):
        losses = model(faces, points=points, noise=noise)
        assert torch.equal(losses.total, losses.reconstruction)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, kept[name])}
    assert same == {name for name in kept if name.startswith(IDLE)}
    model.eval()
    after = share(model(faces, points=points, noise=noise), faces)
    assert before < 0.7
    assert after > 0.85
    ids = model.encode_ids(faces)
    assert (model.decode_faces(ids, points=points) == faces).float().mean() > 0.98
    assert not torch.equal(model.encode_ids(faces, noise=noise), ids)
    flipped = model.decode_ids(ids, points=-points)
    assert not torch.allclose(flipped, model.decode_ids(ids, points=points), atol=1e-2)


def test_the_decoder_by_hand():
    model = build(shape_encoder=SHAPE, stage=2).eval()
    ids, points = torch.randint(32, (1, 18)), some_points(1)
    part, decoder, condition = model.decoder.condition, model.decoder, model.shape(points)  # (1, 5, 8)
    codes = model.quantizer.codebook[ids].unflatten(1, (2, 3, 3)).sum(3).flatten(2)  # (1, 2, 48)
    front = torch.cat([part.head_proj(condition[:, :1]), part.proj(condition[:, 1:])], 1) + part.positions.weight
    x = torch.cat([part.norm(front), decoder.norm(decoder.proj(codes) + decoder.positions.weight[:2])], 1)
    expected = decoder.head(decoder.backbone(x)[:, 5:]).view(1, 2, 3, 3, 16)
    torch.testing.assert_close(model.decode_ids(ids, points=points), expected)


# ---------------------------------------------------------------- model directories and optimizers


@pytest.mark.parametrize("changes", [{}, {"stage": 2, "shape_encoder": ShapeEncoderConfig(**SHAPE), "levels": 2}])
def test_a_model_directory_keeps_stage_and_codebook(changes, tmp_path):
    model, faces = build(**changes), some_faces()
    stage = changes.get("stage", 1)
    points = some_points() if stage == 2 else None
    model(faces, points=points)  # the codebook of stage 1 moves
    model.eval()
    other = load_model(save_model(model, tmp_path / "m"))
    assert (other.stage, other.arguments, other.spec) == (stage, model.arguments, SPEC)
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    found, expected = other(faces, points=points), model(faces, points=points)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.equal(other.quantizer.idle, model.quantizer.idle)


def test_no_weight_is_there_twice():
    model = build(shape_encoder=SHAPE)
    places = [value.data_ptr() for value in model.state_dict().values()]
    assert len(set(places)) == len(places)
    assert model.decoder.backbone.config == model.backbone.config
    assert set(model.input_parts) < dict(model.named_children()).keys()


def test_rates_and_decay():
    learned = create_backbone("opt_test", causal=False)
    model = MeshVQVAE(learned, SPEC, **SIZES, shape_encoder=SHAPE)
    table = parameter_table(model, OptimizerConfig(lr=1.0, weight_decay=0.1, layer_decay=0.5))
    depth = learned.config.depth
    assert table["embed.proj.weight"] == (0.5 ** (depth + 1), 0.1)
    assert table["vertex_head.weight"] == table["decoder.head.weight"] == table["shape.input_proj.weight"] == (1.0, 0.1)
    without = {n for n, p in model.named_parameters() if p.ndim >= 2 and table[n][1] == 0}
    assert without == {f"backbone.{n}" for n in learned.no_weight_decay()} | model.no_weight_decay()
    own = {"embed.coordinates", "embed.positions", "decoder.positions", "decoder.condition.positions"}
    expected = {f"{name}.weight" for name in own} | {"decoder.backbone.positions.weight", "shape.query"}
    assert model.no_weight_decay() == expected
    assert build().no_weight_decay() == expected - {
        "decoder.condition.positions.weight",
        "decoder.backbone.positions.weight",
        "shape.query",
    }


# ---------------------------------------------------------------- made and refused


def test_fresh_weights():
    model = build(spec=replace(SPEC, max_faces=500), shape_encoder=SHAPE)
    assert model.embed.coordinates.weight.std().item() == pytest.approx(1, rel=0.2)
    assert model.decoder.positions.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.decoder.head.bias.any()
    assert model.shape.config == ShapeEncoderConfig(**SHAPE)
    own_width = {name: value for name, value in SHAPE.items() if name != "width"}
    assert build(shape_encoder=own_width).shape.config.width == 48


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"codebook_size": 0}, "size must be at least 1, got 0"),
        ({"decay": 1.0}, "decay must be in [0, 1), got 1.0"),
        ({"stage": 3}, "stage must be 1 or 2, got 3"),
        ({"backbone": BERT.replace(causal=True)}, "needs a bidirectional backbone; set causal=false"),
        ({"spec": replace(SPEC, tokenizer=NucleotideTokenizer().to_dict())}, "the tokenizer must be one for meshes"),
        ({"shape_encoder": {"depth": 2}}, "shape_encoder has no setting 'depth'; settings: bottleneck, "),
        ({"shape_encoder": {**SHAPE, "bottleneck": 4}}, "bottleneck must be 0, got 4: the decoder sees the latents"),
    ],
)
def test_impossible_settings(changes, text):
    with pytest.raises(ConfigError) as caught:
        build(**changes)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda m, f: m(f.flatten(2)), ShapeError, "faces must be int64 (B, F, 3, 3), got torch.int64 (3, 12, 9)"),
        (lambda m, f: m(f + 9), DataError, "faces must be from 0 to 15, got 9 to"),
        (lambda m, f: m(f.repeat(1, 2, 1, 1)), ShapeError, "a mesh of 24 faces is larger than max_faces=12; raise"),
        (lambda m, f: m(f, torch.ones(3, 12)), ShapeError, "mask must be bool (3, 12) (True = real face), got torch."),
        (lambda m, f: m(f, torch.zeros(3, 12).bool()), ShapeError, "no face of the batch is real; leave empty meshes"),
        (
            lambda m, f: m(f, points=some_points()),
            ShapeError,
            "points must be None in stage 1 without shape_encoder, got",
        ),
        (lambda m, f: m.decode_ids(torch.zeros(3, 10).long()), ShapeError, "ids must be (B, F * 9), whole faces, got"),
        (lambda m, f: m.decode_ids(torch.full((3, 9), 32)), DataError, "ids must be from 0 to 31, got 32 to 32; use"),
        (lambda m, f: m.quantizer(torch.zeros(0, 16)), ShapeError, "x must be (N, 16) with at least one vector, got"),
    ],
)
def test_bad_input(call, error, text):
    with pytest.raises(error) as caught:
        call(build(), some_faces())
    assert text in str(caught.value)


def test_stage_2_wants_the_points_of_every_shape():
    model, faces = build(shape_encoder=SHAPE, stage=2), some_faces()
    with pytest.raises(ShapeError) as caught:
        model(faces)
    assert "points must be (3, P, 6) in stage 2 with shape_encoder, got None; the shape is seen in" in str(caught.value)
    with pytest.raises(ShapeError, match=r"got \(2, 20, 6\)"):
        model.decode_ids(model.encode_ids(faces), points=some_points(2))
    assert build(stage=2)(faces, noise=0.1).total.requires_grad
