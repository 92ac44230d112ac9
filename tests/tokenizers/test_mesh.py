"""Meshes on the grid, and what every mesh tokenizer must do; a new one is tested by its line in MESH_TOKENIZERS."""

import json
from importlib import import_module

import numpy as np
import pytest
import torch
import trimesh

from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.mesh import (
    MESH_TOKENIZERS,
    CoordinateTokenizer,
    QuantizedMesh,
    canonical,
    dequantize,
    make_mesh_tokenizer,
    pack,
    quantize,
    same_faces,
    unpack,
)

TETRAHEDRON = canonical([[0, 0, 0], [7, 0, 0], [0, 7, 0], [0, 0, 7]], [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])


def on_grid(mesh, bins):
    low, high = mesh.bounds
    return canonical(quantize((mesh.vertices - (low + high) / 2) / (high - low).max(), bins), mesh.faces)


def shapes(bins=16):
    """Closed, open, flat, of several bodies, non-manifold at an edge and at a vertex, one-sided, random."""
    rng = np.random.default_rng(0)
    fan = [[0, 1, k] for k in range(2, 9)]
    strip = [[2 * i + a, 2 * i + b, 2 * i + c] for i in range(4) for a, b, c in ((0, 1, 2), (1, 3, 2))]
    found = {
        "box": on_grid(trimesh.creation.box(), bins),
        "sphere": on_grid(trimesh.creation.icosphere(subdivisions=2), bins),
        "torus": on_grid(trimesh.creation.torus(1, 0.4, 10, 6), bins),
        "annulus": on_grid(trimesh.creation.annulus(0.3, 1, 0.5), bins),
        "tetrahedron": TETRAHEDRON,
        "one face": canonical([[0, 0, 0], [3, 0, 0], [0, 4, 0]], [[0, 2, 1]]),
        "flat": canonical([[x, y, 5] for y in range(2) for x in range(5)], [[0, 1, 5], [1, 6, 5], [3, 4, 8]]),
        "fan edge": canonical([[0, 0, 0], [1, 1, 1], *[[k, 9 - k, 3] for k in range(7)]], fan),
        "bow tie": canonical([[5, 5, 5], [0, 0, 0], [1, 0, 0], [9, 9, 9], [9, 8, 9]], [[0, 1, 2], [0, 3, 4]]),
        "moebius": canonical(
            [[round(6 + 5 * np.cos(t)), round(6 + 5 * np.sin(t)), z] for t in np.arange(5) for z in (2, 7)],
            [*strip, [8, 9, 1], [9, 0, 1]],
        ),
        "two bodies": canonical(
            np.concatenate([TETRAHEDRON.vertices, TETRAHEDRON.vertices + 8]),
            np.concatenate([TETRAHEDRON.faces, TETRAHEDRON.faces + 4]),
        ),
    }
    for i in range(12):  # any faces whatever: edges and vertices of every degree
        count = int(rng.integers(4, 40))
        found[f"random {i}"] = canonical(rng.integers(0, bins, (count, 3)), rng.integers(0, count, (3 * count, 3)))
    return found


SHAPES = shapes()


@pytest.fixture(params=MESH_TOKENIZERS)
def tokenizer(request):
    return make_mesh_tokenizer(request.param, bins=16)


def test_quantize_gives_the_nearest_of_the_cells_centres():
    cells = np.arange(128)
    assert np.array_equal(quantize(dequantize(cells, 128), 128), cells)
    assert np.array_equal(quantize([-0.5, -0.49, 0.0, 0.5, 2.0, -9.0], 4), [0, 0, 2, 3, 3, 0])
    x = np.random.default_rng(0).uniform(-0.5, 0.5, 1000)
    assert np.abs(dequantize(quantize(x, 128), 128) - x).max() <= 0.5 / 128
    assert dequantize(0, 128, "lower") == -0.5
    with pytest.raises(DataError, match="coordinates must be finite numbers"):
        quantize([np.nan], 128)
    with pytest.raises(ConfigError, match="bins must be between 4 and 1,048,576, got 1; 128 is usual"):
        quantize([0.0], 1)


def test_canonical_welds_drops_and_sorts():
    vertices = [[5, 0, 0], [0, 5, 0], [0, 0, 5], [5, 0, 0], [9, 9, 9], [0, 0, 0]]
    faces = [[2, 1, 0], [3, 2, 1], [0, 3, 1], [5, 5, 1], [1, 0, 5], [0, 1, 5]]
    mesh = canonical(vertices, faces)
    assert mesh.vertices.tolist() == [[0, 0, 0], [5, 0, 0], [0, 5, 0], [0, 0, 5]]
    assert mesh.faces.tolist() == [[0, 2, 1], [1, 3, 2]]  # the windings of those that came first
    assert canonical(mesh.vertices, mesh.faces) == mesh
    assert mesh.corners.shape == (2, 3, 3)
    assert canonical([[1, 1, 1]], [[0, 0, 0]]).vertices.shape == (0, 3)
    with pytest.raises(DataError, match=r"faces must name vertices 0 \.\. 0, got 0 \.\. 1"):
        canonical([[1, 1, 1]], [[0, 1, 0]])
    with pytest.raises(DataError, match="cells must lie between 0 and 1,048,575, got -1"):
        canonical([[-1, 1, 1]], [[0, 0, 0]])


def test_order_does_not_depend_on_the_order_of_the_input():
    rng = np.random.default_rng(1)
    for mesh in SHAPES.values():
        turned = np.stack([np.roll(f, rng.integers(3)) for f in mesh.faces])
        mixed = rng.permutation(len(mesh.vertices))
        again = canonical(mesh.vertices[mixed], np.argsort(mixed)[rng.permutation(turned)])
        assert again == mesh


def test_packed_cells_sort_like_vertices():
    cells = np.random.default_rng(2).integers(0, 1 << 20, (50, 3))
    assert np.array_equal(unpack(pack(cells)), cells)
    assert np.array_equal(np.argsort(pack(cells)), np.lexsort(cells.T))


@pytest.mark.parametrize("shape", SHAPES)
def test_round_trip(tokenizer, shape):
    mesh = SHAPES[shape]
    ids = tokenizer.encode(mesh)
    assert ids.dtype == np.int64
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size
    assert same_faces(tokenizer.decode(ids), mesh)
    assert len(tokenizer.triangles(ids)) == len(mesh.faces)
    kinds = tokenizer.kinds(ids)
    assert kinds.shape == ids.shape
    assert kinds.max() < tokenizer.num_kinds


@pytest.mark.parametrize("shape", SHAPES)
def test_the_grammar_allows_what_encode_writes(tokenizer, shape):
    ids, grammar = tokenizer.encode(SHAPES[shape]), tokenizer.grammar()
    state, kinds = grammar.begin(1), []
    for token in torch.as_tensor(ids)[:, None]:
        assert grammar.allowed(state)[0, token]
        kinds += grammar.kinds(state, token).tolist()
        state = grammar.advance(state, token)
    assert grammar.allowed(state)[0, -1]
    assert kinds == tokenizer.kinds(ids).tolist()


def test_whatever_the_grammar_allows_is_a_mesh(tokenizer):
    # Few cells: draws would often repeat a vertex.
    grammar, rng = tokenizer.grammar(), torch.Generator().manual_seed(0)
    state = grammar.begin(64)
    rows, alive = [[] for _ in range(64)], torch.ones(64, dtype=torch.bool)
    near = torch.arange(tokenizer.vocab_size) % 16 < 2
    for step in range(600):
        may = grammar.allowed(state)
        assert may.any(1).all()
        weights = may.double()
        weights[:, :-1] *= 0.02 + near
        weights[:, -1] *= 1.0 if step < 300 else 1e6
        chosen = torch.multinomial(weights, 1, generator=rng)[:, 0]
        alive &= chosen < tokenizer.vocab_size
        if not alive.any():
            break
        for i in alive.nonzero()[:, 0].tolist():
            rows[i].append(int(chosen[i]))
        spare = may[:, :-1].int().argmax(1)  # for those that have ended
        state = grammar.advance(state, torch.where(alive, chosen, spare))
    assert not alive.any()  # the end is within reach
    for row in rows:
        corners = tokenizer.triangles(row)
        assert len(corners) > 0
        for a, b in ((0, 1), (1, 2), (2, 0)):
            assert (corners[:, a] != corners[:, b]).any(1).all()
        assert len(tokenizer.decode(row).faces) > 0


def test_unfinished_and_damaged_sequences(tokenizer):
    name = type(tokenizer).__name__
    ids = tokenizer.encode(SHAPES["torus"])
    whole = {tuple(sorted(map(tuple, f))) for f in SHAPES["torus"].corners.tolist()}
    for end in range(len(ids)):
        some = tokenizer.decode(ids[:end], partial=True)
        assert {tuple(sorted(map(tuple, f))) for f in some.corners.tolist()} <= whole
    assert len(tokenizer.decode([], partial=True).faces) == 0
    with pytest.raises(DataError, match=f"{name}: the sequence of {len(ids) - 1} tokens ends within a face"):
        tokenizer.decode(ids[:-1])
    with pytest.raises(DataError, match=f"{name}: token {tokenizer.vocab_size} cannot stand at position {len(ids)}"):
        tokenizer.decode([*ids, tokenizer.vocab_size])
    assert same_faces(tokenizer.decode([*ids, tokenizer.vocab_size], partial=True), SHAPES["torus"])
    with pytest.raises(DataError, match=f"{name}: ids must be one row of integers"):
        tokenizer.decode(np.zeros((2, 3)))


def test_meshes_that_cannot_be_written(tokenizer):
    name = type(tokenizer).__name__
    with pytest.raises(DataError, match=f"{name}: a mesh must have at least one face, got none; leave it out"):
        tokenizer.encode(canonical(np.zeros((0, 3)), np.zeros((0, 3))))
    with pytest.raises(DataError, match=f"{name}: vertices must lie on a grid of 16 cells, got 20; quantize"):
        tokenizer.encode(canonical([[20, 0, 0], [0, 1, 0], [0, 0, 1]], [[0, 1, 2]]))


def test_description(tokenizer):
    again = tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict())))
    assert again == tokenizer
    assert type(again) is type(tokenizer)


def test_names():
    assert make_mesh_tokenizer("plain").bins == 128
    assert make_mesh_tokenizer("amt,up=z").to_dict() == {"tokenizer": "mesh_amt.AMTTokenizer", "bins": 128, "up": "z"}
    with pytest.raises(ConfigError, match="CoordinateTokenizer has no argument 'up'"):
        make_mesh_tokenizer("plain,up=z")
    with pytest.raises(UnknownNameError, match=r"unknown mesh tokenizer 'amd'\. Did you mean 'amt'"):
        make_mesh_tokenizer("amd")
    for module, cls in MESH_TOKENIZERS.values():
        assert hasattr(import_module(f"vertebra.tokenizers.{module}"), cls)


def test_plain_by_hand():
    mesh = canonical([[1, 2, 3], [4, 5, 6], [7, 8, 9]], [[0, 2, 1]])
    tokenizer = CoordinateTokenizer(16)
    assert tokenizer.encode(mesh).tolist() == [1, 2, 3, 7, 8, 9, 4, 5, 6]
    assert tokenizer.decode([1, 2, 3, 7, 8, 9, 4, 5, 6]) == mesh  # with its winding
    assert tokenizer.kinds([1, 2, 3, 7, 8, 9, 4, 5, 6] * 2).tolist() == [*range(9)] * 2
    assert isinstance(mesh, QuantizedMesh)


def test_plain_forbids_exactly_the_repeats():
    grammar = CoordinateTokenizer(16).grammar()
    state = grammar.begin(1)
    for token in [1, 2, 3, 1, 2]:
        assert grammar.allowed(state)[0].tolist() == [True] * 16 + [False]
        state = grammar.advance(state, torch.tensor([token]))
    assert grammar.allowed(state)[0].nonzero()[:, 0].tolist() == [i for i in range(16) if i != 3]
    for token in [4, 1, 2]:
        state = grammar.advance(state, torch.tensor([token]))
    assert grammar.allowed(state)[0].nonzero()[:, 0].tolist() == [i for i in range(16) if i not in (3, 4)]
    for token in [5, 1, 2]:
        state = grammar.advance(state, torch.tensor([token]))
    assert grammar.allowed(state)[0, :16].all()  # a new face may use any vertex
