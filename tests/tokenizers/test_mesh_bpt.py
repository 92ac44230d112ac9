import json
import sys

import numpy as np
import pytest
import torch
import trimesh
from tests.reference import mesh_bpt as slow

from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers import mesh_bpt
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.mesh import canonical, make_mesh_tokenizer, quantize
from vertebra.tokenizers.mesh_bpt import BPTTokenizer, patch_order

BPT = BPTTokenizer()
TETRAHEDRON_IDS = [0, 1331, 7, 1340, 56, 1475, 448, 3635, 7, 1340, 4615, 1340, 448, 3635, 56, 1475]
BOX_IDS = """448 3635 0 1331 56 1475 504 3779 455 3644 7 1340 0 1331 4671 1484 0 1331 7 1340 511 3788 56 1475 0 1331
    5119 3788 7 1340 455 3644 504 3779 56 1475"""


def quantized(mesh, bins=128, length=1.0):
    """Quantize with the longest side a share ``length`` of the box."""
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    return canonical(quantize((mesh.vertices - (low + high) / 2) / (high - low).max() * length, bins), mesh.faces)


# BPT leaves a margin: its longest side is 0.95 of the box, cells 3 .. 124.
TETRAHEDRON = canonical(np.eye(4, 3, k=-1, dtype=int) * 121 + 3, [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
BOX = quantized(trimesh.creation.box(), length=0.95)


def random_mesh(seed, bins=128):
    """Make a soup: few vertices, so that edges have many faces and components touch; every fourth one is flat."""
    draw = np.random.default_rng(seed)
    vertices = draw.integers(0, bins, (draw.integers(3, 12), 3))
    if seed % 4 == 0:
        vertices[:, draw.integers(3)] = 1
    return canonical(vertices, draw.integers(0, len(vertices), (draw.integers(4, 40), 3)))


def surface(seed, *, mixed=False):
    """Make a grid of triangles with holes, in several pieces; ``mixed`` turns a quarter of its faces over."""
    draw = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(9), np.arange(7), indexing="ij")
    vertices = np.stack([x * 9, y * 9, draw.integers(0, 50, x.shape)], axis=-1).reshape(-1, 3)
    corner = (x * 7 + y)[:-1, :-1].reshape(-1)
    halves = [[corner, corner + 7, corner + 1], [corner + 1, corner + 7, corner + 8]]
    faces = np.concatenate([np.stack(half, axis=1) for half in halves])
    faces = draw.permutation(faces)[: draw.integers(20, len(faces) + 1)]
    if mixed:
        faces[::4] = faces[::4, ::-1]
    return canonical(vertices, faces)


def rim(count):
    place = np.arange(count)
    return np.stack([place % 127, place // 127 % 127, place // 127**2], axis=1)


def book(count):
    """Make ``count`` faces on one edge."""
    page = np.arange(count)
    vertices = np.concatenate([rim(count), [[0, 0, 127], [1, 0, 127]]])
    return canonical(vertices, np.stack([page, 0 * page + count, 0 * page + count + 1], axis=1))


def bows(count):
    """Make ``count`` faces that share one vertex and nothing else."""
    face = np.arange(count)
    vertices = np.concatenate([rim(2 * count), [[0, 0, 127]]])
    return canonical(vertices, np.stack([2 * face, 2 * face + 1, 0 * face + 2 * count], axis=1))


MESHES = {
    "tetrahedron": TETRAHEDRON,
    "box": BOX,
    "triangle": canonical(np.eye(3, dtype=int), [[0, 1, 2]]),
    "sphere": quantized(trimesh.creation.icosphere(1)),
    "torus": quantized(trimesh.creation.torus(1, 0.4, 12, 6)),
    "ring": quantized(trimesh.creation.annulus(0.3, 0.5, 1.0, sections=9)),
    "two bodies": quantized(trimesh.util.concatenate([trimesh.creation.box(), trimesh.creation.icosphere(1)])),
    "book": book(30),
    "bows": bows(30),
    **{f"soup {seed}": random_mesh(seed) for seed in range(40)},
    **{f"coarse soup {seed}": random_mesh(seed, 4) for seed in range(20)},
    **{f"surface {seed}": surface(seed) for seed in range(8)},
    **{f"mixed surface {seed}": surface(seed, mixed=True) for seed in range(8)},
}
each = pytest.mark.parametrize("mesh", [pytest.param(mesh, id=name) for name, mesh in MESHES.items()])


# ---------------------------------------------------------------- golden


def test_golden_tetrahedron():
    assert BPT.encode(TETRAHEDRON).tolist() == TETRAHEDRON_IDS


def test_golden_box():
    assert BPT.encode(BOX).tolist() == [int(word) for word in BOX_IDS.split()]


@pytest.mark.parametrize(
    ("mesh", "ratio"),
    [
        (trimesh.creation.icosphere(1), 0.3333),
        (trimesh.creation.icosphere(2), 0.3104),
        (trimesh.creation.icosphere(3), 0.2664),
        (trimesh.creation.cylinder(radius=0.3, height=1, sections=16), 0.2917),
        (trimesh.creation.torus(1, 0.4, 24, 12), 0.2718),
        (trimesh.creation.capsule(), 0.2276),
    ],
    ids=["sphere 1", "sphere 2", "sphere 3", "cylinder", "torus", "capsule"],
)
def test_golden_counts(mesh, ratio):
    grid = quantized(mesh, length=0.95)
    ids = BPT.encode(grid)
    assert round(len(ids) / (9 * len(grid.faces)), 4) == ratio
    assert BPT.decode(ids) == grid


# ---------------------------------------------------------------- both ways


@each
def test_agrees_with_the_slow_twin(mesh):
    ids = BPT.encode(mesh)
    assert ids.dtype == np.int64
    assert ids.tolist() == slow.encode(mesh, 128)
    assert BPT.triangles(ids).tolist() == slow.decode(ids.tolist(), 128).tolist()
    assert BPT.kinds(ids).tolist() == slow.kinds(ids.tolist(), 128)


@each
def test_round_trip_keeps_the_winding(mesh):
    ids = BPT.encode(mesh)
    back = BPT.decode(ids)
    assert back == mesh
    assert len(BPT.triangles(ids)) == len(mesh.faces)  # every face once
    assert np.array_equal(BPT.encode(back), ids)


@pytest.mark.parametrize("bins", [16, 64, 256])
def test_other_bins(bins):
    tokenizer = BPTTokenizer(bins)
    assert tokenizer.vocab_size == 1024 + (bins // 8) ** 3
    for seed in range(10):
        mesh = random_mesh(seed, bins)
        ids = tokenizer.encode(mesh)
        assert ids.tolist() == slow.encode(mesh, bins)
        assert tokenizer.decode(ids) == mesh


def test_every_start_of_a_sequence_decodes_partially():
    ids = BPT.encode(BOX).tolist()
    for end in range(len(ids) + 1):
        faces = slow.decode(ids[:end], 128)
        assert BPT.triangles(ids[:end], partial=True).tolist() == faces.tolist()
        assert len(BPT.decode(ids[:end], partial=True).faces) == len(faces)


def lines_run(mesh):
    """Count the lines that ``patch_order`` and what it calls in its file run."""
    count, file = 0, mesh_bpt.__file__

    def in_function(frame, event, argument):
        nonlocal count
        count += event == "line"
        return in_function

    before = sys.gettrace()
    sys.settrace(lambda frame, event, argument: in_function if frame.f_code.co_filename == file else None)
    try:
        patch_order(mesh.faces)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("make", [book, bows])
def test_work_is_linear_even_where_one_vertex_has_all_faces(make):
    small, large = (lines_run(make(count)) for count in (300, 1200))
    assert small > 300  # the loop is counted
    assert large / small == pytest.approx(4, rel=0.05)


@pytest.mark.realdata
def test_real_meshes(shared_data):
    paths = sorted(p for p in (shared_data / "mesh").rglob("*") if p.suffix in (".glb", ".obj"))
    assert len(paths) == 16
    faces, tokens = [], []
    for path in paths:
        mesh = quantized(trimesh.load(path, force="mesh", process=False))
        ids = BPT.encode(mesh)
        assert BPT.decode(ids) == mesh, path.name
        faces.append(len(mesh.faces))
        tokens.append(len(ids))
    ratios = np.array(tokens) / (9 * np.array(faces))
    assert ratios.mean() < 0.30
    assert sum(tokens) / (9 * sum(faces)) < 0.23


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (TETRAHEDRON_IDS[:4], "the sequence of 4 tokens ends within a face; decode it with partial=True"),
        (TETRAHEDRON_IDS[:7], "the sequence of 7 tokens ends within a face"),
        (TETRAHEDRON_IDS[:11], "the sequence of 11 tokens ends within a face"),
        (TETRAHEDRON_IDS[:14], "the sequence of 14 tokens ends within a face"),
        ([*TETRAHEDRON_IDS[:4], 4615], "token 4615 cannot stand at position 4"),
        ([*TETRAHEDRON_IDS[:12], 1340], "token 1340 cannot stand at position 12"),
        ([*TETRAHEDRON_IDS[:3], 7], "token 7 cannot stand at position 3"),
        ([4608, *TETRAHEDRON_IDS[1:]], "token 4608 cannot stand at position 0"),
        (TETRAHEDRON_IDS[1:], "token 1331 cannot stand at position 0"),
        ([*TETRAHEDRON_IDS, 5120], "token 5120 cannot stand at position 16"),
        ([*TETRAHEDRON_IDS, -1], "token -1 cannot stand at position 16"),
        ([], "the sequence of 0 tokens ends within a face"),
    ],
)
def test_strict_decoding_refuses(ids, error):
    with pytest.raises(DataError, match=f"BPTTokenizer: {error}"):
        BPT.decode(ids)


def test_partial_decoding_stops_where_the_sequence_breaks():
    broken = [*TETRAHEDRON_IDS[:6], 4608, 4608, *TETRAHEDRON_IDS]
    assert BPT.triangles(broken, partial=True).tolist() == slow.decode(TETRAHEDRON_IDS[:6], 128).tolist()


@pytest.mark.parametrize("bins", [8, 100, 520])
def test_bins_are_checked(bins):
    with pytest.raises(ConfigError, match=f"bins must be a multiple of 8 from 16 to 512, got {bins}; 128 is usual"):
        BPTTokenizer(bins)


# ---------------------------------------------------------------- grammar


def test_grammar_allows_what_encode_writes():
    grammar = BPT.grammar()
    sequences = [torch.from_numpy(BPT.encode(mesh)) for mesh in MESHES.values()]
    kinds = [torch.from_numpy(BPT.kinds(ids)) for ids in sequences]
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    sequences, kinds = [sequences[i] for i in order], [kinds[i] for i in order]
    state = grammar.begin(len(sequences))
    for at in range(len(sequences[0]) + 1):  # those that have ended are the last of the batch, and leave it
        going = sum(len(ids) > at for ids in sequences)
        may = grammar.allowed(state)
        assert may[going:, -1].all()
        state = state[:going]
        if going:
            tokens = torch.stack([ids[at] for ids in sequences[:going]])
            assert may[:going].gather(1, tokens[:, None]).all()
            assert grammar.kinds(state, tokens).tolist() == [int(row[at]) for row in kinds[:going]]
            state = grammar.advance(state, tokens)


def draw(may, generator, home):
    """Draw tokens, blocks mostly ``home`` so that vertices meet."""
    weights = may[:, :-1].double()
    weights[:, :512] *= torch.where(torch.arange(512) == home, 1.0, 1e-3)
    weights[:, -512:] *= torch.where(torch.arange(512) == home, 1.0, 1e-3)
    return torch.multinomial(weights, 1, generator=generator)


def test_grammar_agrees_with_the_slow_twin():
    bins = 16
    tokenizer = BPTTokenizer(bins)
    grammar = tokenizer.grammar()
    generator = torch.Generator().manual_seed(0)
    batch, length = 24, 40
    state, ids = grammar.begin(batch), torch.zeros(batch, 0, dtype=torch.int64)
    ended = 0
    for _ in range(length):
        may = grammar.allowed(state)
        assert [set(np.flatnonzero(row).tolist()) for row in may] == [slow.allowed(row, bins) for row in ids.tolist()]
        ended += int(may[:, -1].sum())
        for row, end in zip(ids.tolist(), may[:, -1], strict=True):
            if end:
                faces = tokenizer.triangles(row)
                assert faces.tolist() == slow.decode(row, bins).tolist()
                assert all(len(np.unique(face, axis=0)) == 3 for face in faces)
                assert len(tokenizer.decode(row).faces) >= 1
        tokens = draw(may, generator, home=9)
        state = grammar.advance(state, tokens[:, 0])
        ids = torch.cat([ids, tokens], dim=1)
    assert ended > batch


def test_grammar_reaches_the_end_within_four_tokens():
    grammar = BPTTokenizer(16).grammar()
    generator = torch.Generator().manual_seed(0)
    state = grammar.begin(64)
    for _ in range(30):
        state = grammar.advance(state, draw(grammar.allowed(state), generator, home=9)[:, 0])
        ahead, left = state, torch.ones(64, dtype=torch.bool)
        for _ in range(4):
            may = grammar.allowed(ahead)
            left &= ~may[:, -1]
            offset, block = may[:, 512:520].int().argmax(1) + 512, may[:, :512].int().argmax(1)
            ahead = grammar.advance(ahead, torch.where(may[:, 512:520].any(1), offset, block))
        assert not (left & ~grammar.allowed(ahead)[:, -1]).any()


# ---------------------------------------------------------------- the rest


def test_description():
    assert (BPT.vocab_size, BPT.num_kinds) == (5120, 3)
    tokenizer = BPTTokenizer(bins=64)
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    assert make_mesh_tokenizer("bpt", 64) == tokenizer
