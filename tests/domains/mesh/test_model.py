"""The generator's forward pass: what a logit may depend on, and what a model directory keeps."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import presets
from vertebra.domains.mesh.encoder import ShapeEncoderConfig
from vertebra.domains.mesh.geometry import quantized, sample_surface
from vertebra.domains.mesh.model import BEGIN, END, PAD, SPECIAL, MeshGenerator
from vertebra.domains.mesh.procedural import draw
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.saving import load_model, model_config, save_model
from vertebra.errors import ConfigError, ShapeError
from vertebra.tokenizers.mesh import make_mesh_tokenizer
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

BACKBONES = [name for name in presets() if name.endswith("_test")]
every_backbone = pytest.mark.parametrize("name", BACKBONES)
AMT = make_mesh_tokenizer("amt", 16)
ENCODER = {"width": 12, "heads": 2, "layers": 1, "latents": 3, "frequencies": 2}


def build(name="illama_test", *, buckets=(), tokenizer=AMT, encoder=ENCODER, **options):
    torch.manual_seed(0)
    spec = MeshSpec(tokenizer=tokenizer.to_dict(), points=32, max_tokens=200, face_buckets=buckets)
    model = MeshGenerator(create_backbone(name, causal=True), spec, encoder=encoder, **options).eval()
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(lengths=(40, 40), tokenizer=AMT):
    """Make points, ids, kinds and mask of real meshes, cut to lengths with begin and end."""
    rng = np.random.default_rng(0)
    points, ids, kinds = [], [], []
    for i, length in enumerate(lengths):
        mesh = draw("train", 0, i)
        own = tokenizer.encode(quantized(mesh, tokenizer.bins)[0])[: length - 2]
        points.append(np.concatenate(sample_surface(mesh.vertices, mesh.faces, 32, rng), axis=1))
        ids.append(torch.tensor([BEGIN, *(own + SPECIAL), END]))
        kinds.append(torch.tensor([BEGIN, *(tokenizer.kinds(own) + SPECIAL), END]))
    ids, kinds = (torch.nn.utils.rnn.pad_sequence(x, batch_first=True, padding_value=PAD) for x in (ids, kinds))
    return (
        torch.tensor(np.stack(points), dtype=torch.float32),
        ids,
        kinds,
        torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None],
    )


# ---------------------------------------------------------------- what logits depend on


@every_backbone
def test_logits_at_i_are_of_token_i(name):
    model = build(name)
    points, ids, kinds, mask = batch()
    logits = model(points, ids, kinds, mask)
    assert logits.shape == (2, 40, SPECIAL + AMT.vocab_size)
    for place in (0, 1, 20, 38):
        changed, other = ids.clone(), kinds.clone()
        changed[:, place] = (changed[:, place] - SPECIAL + 1) % 16 + SPECIAL
        other[:, place] = (other[:, place] + 1) % (SPECIAL + AMT.num_kinds)
        for result in (model(points, changed, kinds, mask), model(points, ids, other, mask)):
            torch.testing.assert_close(result[:, : place + 1], logits[:, : place + 1], atol=1e-5, rtol=1e-5)
            assert (result[:, place + 1] - logits[:, place + 1]).abs().max() > 1e-4  # the next is told
    last = ids.index_fill(1, torch.tensor([39]), 7)  # which is never read
    torch.testing.assert_close(model(points, last, kinds, mask), logits, atol=0, rtol=0)


@every_backbone
def test_all_logits_depend_on_all_points(name):
    model = build(name)
    points, ids, kinds, mask = batch()
    points.requires_grad_(True)
    for place in (0, 17, 39):
        (grad,) = torch.autograd.grad(model(points, ids, kinds, mask)[:, place].square().sum(), points)
        assert (grad.abs().sum(-1) > 0).all()
    moved = model(points + 0.3, ids, kinds, mask) - model(points, ids, kinds, mask)
    assert (moved.abs().amax(-1) > 1e-5).all()


@every_backbone
def test_padding_and_neighbours_change_nothing(name):
    model = build(name)
    lengths = (40, 23, 9)
    points, ids, kinds, mask = batch(lengths)
    logits = model(points, ids, kinds, mask)
    noise = torch.randint(0, 16, ids.shape)
    noisy = model(points, torch.where(mask, ids, noise), torch.where(mask, kinds, noise % 3), mask)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = model(points[one], ids[one, :length], kinds[one, :length], mask[one, :length])[0]
        torch.testing.assert_close(logits[row, :length], alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(noisy[row, :length], alone, atol=2e-5, rtol=1e-4)


@every_backbone
@pytest.mark.parametrize("encoder", [ENCODER, ENCODER | {"bottleneck": 4, "decoder_layers": 1, "queries": "points"}])
def test_gradient_reaches_every_parameter(name, encoder):
    model = build(name, encoder=encoder, buckets=(30, 60))
    points, ids, kinds, mask = batch()
    logits = model(points, ids, kinds, mask, torch.tensor([1, 3]))
    F.cross_entropy(logits.flatten(0, 1), ids.flatten()).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == set()


def test_one_batch_is_learnt():
    model = build().train()
    points, ids, kinds, mask = batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    losses = []
    for _ in range(50):
        logits = model(points, ids, kinds, mask)
        losses.append(F.cross_entropy(logits.flatten(0, 1), ids.flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] / 4


# ---------------------------------------------------------------- options


def test_face_counts_are_told_by_ranges():
    model = build(buckets=(30, 60, 90))
    assert [model.bucket_of(n) for n in (1, 30, 31, 60, 90, 91, 10_000)] == [1, 1, 2, 2, 3, 4, 4]
    assert model.face_embed.num_embeddings == 5  # 0 stands for unknown
    assert model.prefix_length == 1 + 3 + 1
    points, ids, kinds, mask = batch()
    told = [model(points, ids, kinds, mask, torch.full((2,), i)) for i in range(5)]
    for i in range(1, 5):
        assert ((told[i] - told[i - 1]).abs().amax(-1) > 1e-5).all()
    torch.testing.assert_close(model(points, ids, kinds, mask), told[0], atol=0, rtol=0)
    mixed = model(points, ids, kinds, mask, torch.tensor([4, 2]))
    torch.testing.assert_close(mixed, torch.stack([told[4][0], told[2][1]]), atol=1e-6, rtol=1e-5)
    plain = build()
    assert plain.face_embed is None
    assert plain.prefix_length == 1 + 3
    with pytest.raises(
        ConfigError,
        match=r"^faces: this model was trained without a face count; leave it out, "
        r"or train one with data\.face_buckets\.",
    ):
        plain.bucket_of(30)


def test_the_condition_stands_before_the_tokens():
    for model in (build(), build(buckets=(5,)), build(encoder=ENCODER | {"bottleneck": 4})):
        prefix = model.condition(batch()[0])
        assert prefix.shape == (2, model.prefix_length, 16)


def test_dropout_is_of_training_and_covers_the_condition():
    model = build(dropout=0.5)
    points, ids, kinds, mask = batch()
    torch.testing.assert_close(model(points, ids, kinds, mask), build()(points, ids, kinds, mask), atol=0, rtol=0)
    model.train()
    first, second = (model(points, ids, kinds, mask) for _ in range(2))
    assert (first[:, 0] - second[:, 0]).abs().max() > 1e-3  # the first depends on the condition alone


def test_a_tied_head_shares_its_matrix():
    model = build(tie=True)
    assert model.head.weight is model.embed.weight
    assert build().head.weight.data_ptr() != build().embed.weight.data_ptr()


def test_tables_are_not_decayed():
    names = build(buckets=(5,)).no_weight_decay()
    assert names == {
        *(f"{n}.weight" for n in ("embed", "kind_embed", "cond_embed", "face_embed")),
        "encoder.query",
    }
    assert "face_embed.weight" not in build().no_weight_decay()
    assert names <= dict(build(buckets=(5,)).named_parameters()).keys()


def test_parts_before_the_backbone_exist():
    model = build(buckets=(5,))
    assert set(MeshGenerator.input_parts) <= dict(model.named_children()).keys()
    assert {n for n, _ in model.named_children()} - set(MeshGenerator.input_parts) == {"backbone", "dropout", "head"}


# ---------------------------------------------------------------- settings and model directories


def test_without_a_width_the_encoder_is_as_wide_as_the_backbone():
    assert build(encoder={"heads": 2, "layers": 0}).encoder.config.width == 16
    assert build(encoder={"heads": 4, "layers": 0, "latents": 2}).cond_proj.weight.shape == (16, 16)
    assert build(encoder=ShapeEncoderConfig(width=24, heads=2, layers=0)).cond_proj.weight.shape == (16, 24)


@pytest.mark.parametrize("given", ["dict", "config"])
@pytest.mark.parametrize("more", [{}, {"bottleneck": 4, "decoder_layers": 1}])
def test_model_directory_round_trip(given, more, tmp_path):
    encoder = ENCODER | more
    model = build(encoder=encoder if given == "dict" else ShapeEncoderConfig(**encoder), buckets=(30,), tie=True)
    folder = save_model(model, tmp_path / "m", metrics={"test/chamfer": 0.01})
    other = load_model(folder)
    assert isinstance(other, MeshGenerator)
    assert other.encoder.config == model.encoder.config == ShapeEncoderConfig(**encoder)
    assert (other.spec, other.tokenizer) == (model.spec, model.tokenizer)
    assert other.head.weight is other.embed.weight
    points, ids, kinds, mask = batch()
    buckets = torch.tensor([1, 2])
    torch.testing.assert_close(
        other(points, ids, kinds, mask, buckets), model(points, ids, kinds, mask, buckets), atol=0, rtol=0
    )
    config = json.loads((folder / "config.json").read_text())
    assert config == model_config(other, metrics={"test/chamfer": 0.01})
    assert config["task"] == "mesh/generate"
    assert config["arguments"]["encoder"].items() >= encoder.items()


def test_settings_that_cannot_be_are_refused():
    spec = MeshSpec(tokenizer=AMT.to_dict())
    with pytest.raises(ConfigError, match=r"writes token after token and needs a causal backbone; set causal=true\.$"):
        MeshGenerator(create_backbone("illama_test", causal=False), spec, encoder=ENCODER)
    with pytest.raises(ConfigError, match=r"the tokenizer must be one for meshes, got NucleotideTokenizer"):
        build(tokenizer=NucleotideTokenizer())
    with pytest.raises(ConfigError, match=r"^encoder has no setting 'depth'; settings: bottleneck, .*, width\.$"):
        build(encoder={"depth": 2})
    with pytest.raises(ConfigError, match=r"width \(16\) must be a multiple of heads \(12\)"):
        build(encoder={})


def test_shapes_that_differ_are_refused():
    model = build()
    points, ids, kinds, mask = batch()
    text = "MeshGenerator: ids, kinds and mask must all be (B, L) for B = {}, got {}, {} and {}."
    for given, found in (
        ((points, ids[0], kinds, mask), (2, (40,), (2, 40), (2, 40))),
        ((points, ids, kinds[:, 1:], mask), (2, (2, 40), (2, 39), (2, 40))),
        ((points, ids, kinds, mask[:1]), (2, (2, 40), (2, 40), (1, 40))),
        ((points[:1], ids, kinds, mask), (1, (2, 40), (2, 40), (2, 40))),
    ):
        with pytest.raises(ShapeError, match=re.escape(text.format(*found))):
            model(*given)
    with pytest.raises(ShapeError, match=r"points must be float \(B, N, 6\)"):
        model(points[..., :3], ids, kinds, mask)
