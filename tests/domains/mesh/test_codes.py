"""The generator of codes: its grammar, what a code and a face depend on, meshes from it, limits, what is refused."""

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.backbones.decoding import Strategy
from vertebra.backbones.opt import OPTConfig
from vertebra.domains.mesh.codes import CodeGrammar, MeshCodeGenerator
from vertebra.domains.mesh.generation import GREEDY, decoder_of, generate_best, generate_meshes, read_mesh_ids
from vertebra.domains.mesh.model import BEGIN, END, PAD, SPECIAL
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.optim import OptimizerConfig, parameter_table
from vertebra.domains.saving import load_model, save_model
from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.mesh import CoordinateTokenizer

BERT = OPTConfig(
    dim=16, depth=1, heads=2, hidden=24, causal=False, norm_first=False, activation="gelu", positions="none"
)
ENCODER = {"width": 12, "heads": 2, "layers": 1, "latents": 3, "frequencies": 2, "bottleneck": 4, "decoder_layers": 1}
SIZES = {"decoder": BERT, "encoder": ENCODER, "codebook_size": 20, "code_dim": 8, "face_positions": 9}
SAMPLE = Strategy(method="sample", temperature=2.0, seed=3)


def facts(**changes):
    own = {"tokenizer": CoordinateTokenizer(16).to_dict(), "points": 32, "max_faces": 7, "max_tokens": 63}
    return MeshSpec(**{**own, "place": "lower", **changes})


def build(name="opt_test", spec=None, **changes):
    torch.manual_seed(0)
    model = MeshCodeGenerator(create_backbone(name, causal=True), spec or facts(), **{**SIZES, **changes}).eval()
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def cloud(batch=2):
    points = torch.rand(batch, 32, 6, generator=torch.Generator().manual_seed(1)) * 2 - 1
    points[..., 3:] /= points[..., 3:].norm(dim=-1, keepdim=True)
    return points


def sequences():
    """Make ids of a mesh of three faces and of one of two, with begin, end and padding."""
    codes = torch.randint(20, (2, 27), generator=torch.Generator().manual_seed(2)) + SPECIAL
    ids = torch.full((2, 29), PAD)
    for row, length in enumerate((27, 18)):
        ids[row, : length + 2] = torch.cat([torch.tensor([BEGIN]), codes[row, :length], torch.tensor([END])])
    return ids


# ---------------------------------------------------------------- tokens


def test_the_grammar_writes_whole_faces():
    grammar = CodeGrammar(5, 9)
    state = grammar.begin(1)
    for place in range(27):
        may = grammar.allowed(state)[0]
        assert may[:5].all()
        assert bool(may[5]) == (place > 0 and place % 9 == 0)
        assert grammar.kinds(state, torch.tensor([3])).tolist() == [place % 9]
        state = grammar.advance(state, torch.tensor([place % 5]))
    assert grammar.allowed(state)[0, 5]


def test_kinds_are_places_in_a_face():
    ids = sequences()
    kinds = build().kinds_of(ids)
    assert kinds[0].tolist() == [0, *(list(range(3, 12)) * 3), 1]
    assert kinds[1, :20].tolist() == [0, *(list(range(3, 12)) * 2), 1]
    assert (kinds[1, 20:] == PAD).all()


def test_levels_say_how_many_codes_a_face_has():
    model = build(levels=2, spec=facts(max_tokens=42))
    assert model.tokens_per_face == 6
    assert model.kind_embed.num_embeddings == 9
    assert all(one.tokens % 6 == 0 and one.tokens for one in generate_meshes(model, cloud(), SAMPLE))
    assert model.token_facts() == {"name": "codes", "codes": 20, "levels": 2, "bins": 16}


@pytest.mark.parametrize("name", ["opt_test", "hybrid_test"])
def test_a_logit_depends_on_what_is_before_it(name):
    model, points, ids = build(name), cloud(), sequences()
    kinds = model.kinds_of(ids)
    logits = model(points, ids, kinds, ids != PAD)
    assert logits.shape == (2, 29, 23)
    for place in (0, 1, 13):
        changed = ids.clone()
        changed[:, place] = (changed[:, place] - SPECIAL + 1) % 20 + SPECIAL
        result = model(points, changed, kinds, ids != PAD)
        torch.testing.assert_close(result[:, : place + 1], logits[:, : place + 1], atol=1e-5, rtol=1e-5)
        assert (result[:, place + 1] - logits[:, place + 1]).abs().max() > 1e-4
    alone = model(points[1:], ids[1:, :20], kinds[1:, :20], ids[1:, :20] != PAD)
    torch.testing.assert_close(logits[1:, :20], alone, atol=2e-5, rtol=1e-4)
    assert (model(points.flip(0), ids, kinds, ids != PAD) - logits).abs().amax((1, 2)).min() > 1e-4


def test_steps_equal_the_forward_pass():
    model, points, ids = build(), cloud(), sequences()
    expected = model(points, ids, model.kinds_of(ids), ids != PAD)
    decoder = decoder_of(model, model.condition(points))
    with torch.inference_mode():
        _, logits, states = decoder.begin(torch.empty(2, 0, dtype=torch.long), 40, 3)
        torch.testing.assert_close(logits, expected[:, 0], atol=5e-5, rtol=1e-4)
        state, logits, states = decoder.begin(torch.empty(2, 0, dtype=torch.long), 40, 7)
        for place in range(20):
            torch.testing.assert_close(logits, expected[:, place], atol=5e-5, rtol=1e-4)
            features, states = decoder.read(ids[:, place], states)
            logits = decoder.logits(features, state)


def test_the_generator_learns_and_the_decoder_stays():
    model = build().train()
    ids = sequences()
    logits = model(cloud(), ids, model.kinds_of(ids), ids != PAD)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), ignore_index=PAD).backward()
    named = dict(model.named_parameters())
    idle = {name for name, p in named.items() if p.grad is None or not p.grad.abs().sum() > 0}
    assert idle == {name for name in named if name.startswith("decoder.")}
    assert all(not named[name].requires_grad for name in idle)
    assert "codebook" not in named
    rows = parameter_table(model, OptimizerConfig(weight_decay=0.5))
    assert (rows["kind_embed.weight"][1], rows["encoder.query"][1], rows["code_proj.weight"][1]) == (0, 0, 0.5)


# ---------------------------------------------------------------- faces


def test_a_face_depends_on_the_others_and_on_the_shape():
    model, points = build(), cloud(1)
    ids = torch.randint(20, (1, 27), generator=torch.Generator().manual_seed(4))
    logits = model.decode_ids(ids, points)
    assert logits.shape == (1, 3, 3, 3, 16)
    other = ids.clone()
    other[0, 20] = (other[0, 20] + 1) % 20  # in the third face
    assert (model.decode_ids(other, points) - logits).abs().amax((0, 2, 3, 4)).min() > 1e-5
    assert (model.decode_ids(ids, points + 0.3) - logits).abs().max() > 1e-4
    swapped = ids.view(1, 3, 3, 3).flip(-1).reshape(1, 27)  # the levels of a vertex are summed
    torch.testing.assert_close(model.decode_ids(swapped, points), logits, atol=1e-5, rtol=1e-5)


def test_a_face_that_is_padded_in_part_is_none():
    model, points = build(), cloud(1)
    ids = torch.randint(20, (1, 27))
    ids[0, 14] = -1
    corners = model.decode_faces(ids, points)
    assert corners.dtype == torch.float64
    assert corners.isnan().flatten(2).all(-1).tolist() == [[False, True, False]]
    assert corners[:, [0, 2]].isfinite().all()
    whole = ids.clone()
    whole[0, 9:18] = -1
    torch.testing.assert_close(model.decode_ids(ids, points)[:, [0, 2]], model.decode_ids(whole, points)[:, [0, 2]])
    assert ((corners[:, [0, 2]] + 0.5) * 16 % 1 == 0).all()  # lower edges of cells


# ---------------------------------------------------------------- meshes


@pytest.mark.parametrize("strategy", [GREEDY, SAMPLE, Strategy(method="beam", beams=2)], ids=lambda s: s.method)
def test_meshes_are_the_triangles_that_were_written(strategy):
    model, points = build(), cloud()
    triangles = model.generate(points, strategy)
    for one, found in zip(generate_meshes(model, points, strategy), triangles, strict=True):
        assert found.shape == (one.faces, 3, 3)
        assert one.faces == one.tokens // 9 >= 1
        cells = ((found + 0.5) * 16).round().long()
        said = {frozenset(map(tuple, face)) for face in cells.tolist()}
        assert {frozenset(map(tuple, face)) for face in one.mesh.corners.tolist()} <= said


def test_draws_depend_on_the_number_alone():
    model, points = build(), cloud()
    both = model.generate(points, SAMPLE, numbers=[5, 9])
    assert torch.equal(model.generate(points[1:], SAMPLE, numbers=[9])[0], both[1])
    assert any(not torch.equal(a, b) for a, b in zip(model.generate(points, SAMPLE), both, strict=True))


def test_the_best_of_several_is_kept():
    made = generate_best(build(), cloud(), SAMPLE, candidates=2)
    assert len(made) == 2


def test_a_limit_ends_the_writing():
    model, points = build(), cloud()
    with torch.no_grad():
        model.head.weight[END] = 0
        model.head.weight[SPECIAL:] += 1  # so that most shapes do not end
    assert [len(found) <= 2 for found in model.generate(points, SAMPLE, max_faces=2)] == [True, True]
    made = generate_meshes(model, points, SAMPLE, max_tokens=13)  # within a face
    assert [one.faces for one in made] == [1, 1]
    assert not any(one.finished for one in made)
    empty = read_mesh_ids(model, [BEGIN, 5, 6], [0.0] * 3, False, 2, points[0])
    assert (empty.faces, len(empty.mesh.faces)) == (0, 0)


def test_a_model_directory_keeps_it(tmp_path):
    model, points, ids = build(), cloud(), sequences()
    read = load_model(save_model(model, tmp_path / "model"))
    assert isinstance(read, MeshCodeGenerator)
    assert read.arguments == model.arguments
    assert not read.training
    with torch.no_grad():
        assert torch.equal(*(m(points, ids, m.kinds_of(ids), ids != PAD) for m in (model, read)))
        assert torch.equal(*(m.decode_ids(ids[:, 1:28] % 20, points) for m in (model, read)))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"codebook_size": 0}, "codebook_size must be at least 1, got 0"),
        ({"levels": 0}, "levels must be at least 1, got 0"),
        ({"decoder": {**BERT.to_dict(), "causal": True}}, "the decoder reads faces both ways; set causal=false"),
        ({"face_positions": 6}, "positions for 6 faces, fewer than the spec's max_faces=7; lower it"),
        ({"spec": facts(max_tokens=64)}, "max_tokens=64 are more than max_faces=7 faces of 9 codes; lower it"),
        ({"spec": facts(face_buckets=(3, 5))}, "cannot be told a number of faces; leave face_buckets empty"),
        ({"encoder": {"depth": 3}}, "encoder has no setting 'depth'"),
    ],
)
def test_impossible_settings_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        build(**changes)


def test_a_backbone_that_looks_ahead_is_refused():
    with pytest.raises(ConfigError, match="MeshCodeGenerator: writes token after token and needs a causal backbone"):
        MeshCodeGenerator(create_backbone("opt_test", causal=False), facts(), **SIZES)


def test_ids_that_are_no_codes_are_refused():
    model, points = build(), cloud()
    for shape in ((2, 10), (1, 9), (18,)):
        with pytest.raises(ShapeError, match=r"ids must be \(2, F \* 9\), whole faces for each shape, got"):
            model.decode_ids(torch.zeros(shape, dtype=torch.long), points)
    with pytest.raises(ShapeError, match="at most max_faces=7 faces, got 8; write fewer"):
        model.decode_ids(torch.zeros(2, 72, dtype=torch.long), points)
    for wrong in (20, -2):
        with pytest.raises(DataError, match=r"codes from 0 to 19, or -1 at padding, got"):
            model.decode_ids(torch.full((2, 9), wrong), points)
    with pytest.raises(ShapeError, match="faces depend on the shape too; pass its points"):
        model.corners(np.zeros(9, dtype=np.int64))
    with pytest.raises(DataError, match="of 10 codes ends within a face; decode it with partial=True"):
        model.corners(np.zeros(10, dtype=np.int64), points[0])
    for most in (0, 8):
        with pytest.raises(ConfigError, match=f"max_faces must be between 1 and 7, .*, got {most}"):
            model.generate(points, max_faces=most)
    with pytest.raises(ConfigError, match="was trained without a face count"):
        generate_meshes(model, points, faces=[3, 3])
