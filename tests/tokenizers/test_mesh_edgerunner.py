import json
import sys

import numpy as np
import pytest
import torch
import trimesh
from tests.reference import mesh_edgerunner as slow

from vertebra.errors import DataError
from vertebra.tokenizers import mesh_edgerunner
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.mesh import canonical, make_mesh_tokenizer, quantize, same_faces
from vertebra.tokenizers.mesh_edgerunner import BOM, EdgeRunnerTokenizer, L, R, edge_walk

TOKENIZER = EdgeRunnerTokenizer()
ORIGINAL = EdgeRunnerTokenizer(bins=512)


def numbers(text):
    return [int(word) for word in text.split()]


TETRAHEDRON_IDS = numbers("2 15 15 15 502 15 15 15 15 502 0 15 502 15 0 502 15 15 1 15 15 15")
BOX_IDS = numbers(
    "2 15 15 502 15 15 15 502 15 15 0 502 15 502 0 502 502 15 0 15 502 15 0 15 15 15 1 15 502 502 0 15 15 502 "
    "1 502 502 502 0 502 15 502 1 502 502 15 1 15 502 15 1 15 502 502"
)
TETRAHEDRON = np.eye(4, 3, k=-1, dtype=int) * 487 + 12, np.array([(0, 2, 1), (0, 1, 3), (0, 3, 2), (1, 2, 3)])
BOX_FACES = numbers("1 3 0 4 1 0 0 3 2 2 4 0 1 7 3 5 1 4 5 7 1 3 7 2 6 4 2 2 7 6 6 5 4 7 5 6")
BOX = np.array([(x, y, z) for x in (12, 499) for y in (12, 499) for z in (12, 499)]), np.reshape(BOX_FACES, (-1, 3))


def original_cells(mesh):
    """Quantize as the original: the longest side is 1.9, cells are cut off, not rounded."""
    low, high = mesh.bounds
    x = (mesh.vertices - (low + high) / 2) / (high - low).max() * 1.9
    return np.minimum(((x + 1) * 256).astype(int), 511)


def quantized(mesh, bins=128):
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    return canonical(quantize((mesh.vertices - (low + high) / 2) / (high - low).max(), bins), mesh.faces)


def soup(seed, bins):
    """Make any faces of few vertices: edges of many faces, vertices of many fans, windings that disagree."""
    draw = np.random.default_rng(seed)
    vertices = draw.integers(0, bins, (draw.integers(3, 14), 3))
    return canonical(vertices, draw.integers(0, len(vertices), (draw.integers(4, 50), 3)))


def sheet(seed, closed=False, twisted=False, height=5, width=9):
    """Make a grid of triangles with holes; its ends may be glued to a ring, or with a half twist to a Moebius strip."""
    draw = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(width), np.arange(height), indexing="ij")
    vertex = x * height + y
    if closed:
        vertex = np.concatenate([vertex, vertex[:1, ::-1] if twisted else vertex[:1]])
    a, b, c, d = vertex[:-1, :-1], vertex[1:, :-1], vertex[:-1, 1:], vertex[1:, 1:]
    faces = np.concatenate([np.stack(half, -1).reshape(-1, 3) for half in ([a, b, c], [c, b, d])])
    kept = draw.permutation(faces)[: draw.integers(len(faces) * 2 // 3, len(faces) + 1)] if seed else faces
    cells = np.stack([x, y, draw.integers(0, 3, x.shape)], -1).reshape(-1, 3)
    return canonical(cells, kept)


def plate(size):
    """Make a flat plate of ``size`` x ``size`` squares with a hole in every ninth."""
    x, y = np.meshgrid(np.arange(size + 1), np.arange(size + 1), indexing="ij")
    a = (x * (size + 1) + y)[:-1, :-1]
    a = a[(x[:-1, :-1] % 3 != 1) | (y[:-1, :-1] % 3 != 1)]
    b = a + size + 1
    faces = np.concatenate([np.stack([a, b, a + 1], 1), np.stack([a + 1, b, b + 1], 1)])
    return canonical(np.stack([x, y, 0 * x], -1).reshape(-1, 3), faces)


def spindle(count):
    """Make a closed fan of ``count`` faces on each of two poles."""
    t = np.arange(count)
    angle = 2 * np.pi * t / count
    ring = np.stack([np.round(500_000 * (1 + np.cos(angle))), np.round(500_000 * (1 + np.sin(angle))), 0 * t + 9], 1)
    poles = [[500_000, 500_000, 0], [500_000, 500_000, 800_000]]
    faces = [np.stack([t, (t + 1) % count, 0 * t + count], 1), np.stack([(t + 1) % count, t, 0 * t + count + 1], 1)]
    return canonical(np.concatenate([ring, poles]), np.concatenate(faces))


def blocks(seed):
    """Make the skin of random voxels: handles, edges of four faces, vertices of two fans, several bodies."""
    full = np.pad(np.random.default_rng(seed).random((3, 3, 3)) < 0.5, 1)
    vertices, faces = [], []
    for axis in range(3):
        for step in (0, 1):
            skin = full & ~np.roll(full, 1 - 2 * step, axis)
            for cell in np.argwhere(skin):
                u, v = np.eye(3, dtype=int)[[(axis + 1) % 3, (axis + 2) % 3]]
                base = cell + step * np.eye(3, dtype=int)[axis]
                at = len(vertices)
                vertices += [base, base + u, base + u + v, base + v]
                corners = [at, at + 1, at + 2, at + 3][:: 1 if step else -1]
                faces += [corners[:3], [corners[0], *corners[2:]]]
    return canonical(vertices, faces)


def crowns():
    """Make two faces, each with three neighbours bent up to above the other: the walk of one falls apart in three."""
    crown = np.array([[2, 0, 0], [0, 0, 4], [4, 0, 4], [5, 6, 1], [0, 6, 1], [2, 6, 6]])
    faces = np.array([[0, 1, 2], [0, 2, 3], [1, 0, 4], [2, 1, 5]])
    return canonical(np.concatenate([crown, crown + np.array([9, 1, 0])]), np.concatenate([faces, faces + 6]))


MESHES = {
    "triangle": canonical(np.eye(3, dtype=int), [[0, 1, 2]]),
    "tetrahedron": canonical(TETRAHEDRON[0] // 4, TETRAHEDRON[1]),
    "box": quantized(trimesh.creation.box()),
    "sphere": quantized(trimesh.creation.icosphere(1)),
    "torus": quantized(trimesh.creation.torus(1, 0.4, 12, 6)),
    "ring": quantized(trimesh.creation.annulus(0.3, 0.5, 1.0, sections=9)),
    "two bodies": quantized(trimesh.util.concatenate([trimesh.creation.box(), trimesh.creation.icosphere(1)])),
    "crowns": crowns(),
    "fan edge": canonical(
        [[0, 0, 0], [9, 9, 9], *([k, 9 - k, 3] for k in range(9))], [[0, 1, k + 2] for k in range(9)]
    ),
    "bow tie": canonical([[5, 5, 5], [0, 0, 0], [1, 0, 0], [9, 9, 9], [9, 8, 9]], [[0, 1, 2], [0, 3, 4]]),
    "flat": plate(6),
    "moebius": sheet(0, closed=True, twisted=True),
    "spindle": canonical(spindle(12).vertices >> 13, spindle(12).faces),
    **{f"soup {seed}": soup(seed, 6) for seed in range(20)},
    **{f"coarse soup {seed}": soup(seed, 3) for seed in range(20)},
    **{f"sheet {seed}": sheet(seed) for seed in range(1, 11)},
    **{f"tube {seed}": sheet(seed, closed=True) for seed in range(1, 6)},
    **{f"moebius {seed}": sheet(seed, closed=True, twisted=True) for seed in range(1, 11)},
    **{f"blocks {seed}": blocks(seed) for seed in range(6)},
}
each = pytest.mark.parametrize("mesh", [pytest.param(mesh, id=name) for name, mesh in MESHES.items()])


# ---------------------------------------------------------------- golden


def test_golden_tetrahedron():
    assert ORIGINAL._encode(*TETRAHEDRON).tolist() == TETRAHEDRON_IDS
    vertices, faces = TETRAHEDRON
    assert (
        ORIGINAL.triangles(TETRAHEDRON_IDS).tolist() == vertices[[[0, 1, 3], [2, 0, 3], [1, 2, 3], [0, 2, 1]]].tolist()
    )
    assert ORIGINAL.decode(TETRAHEDRON_IDS) == canonical(vertices, faces)


def test_golden_box():
    assert ORIGINAL._encode(*BOX).tolist() == BOX_IDS
    vertices, faces = BOX
    order = numbers("1 5 10 8 3 2 0 4 6 11 9 7")
    found = ORIGINAL.triangles(BOX_IDS)
    assert [{*map(tuple, face)} for face in found.tolist()] == [
        {*map(tuple, f)} for f in vertices[faces[order]].tolist()
    ]
    assert ORIGINAL.decode(BOX_IDS) == canonical(vertices, faces)  # with the winding


@pytest.mark.parametrize(
    ("mesh", "tokens", "submeshes"),
    [
        (trimesh.creation.icosphere(1), 332, 2),
        (trimesh.creation.icosphere(2), 1304, 4),
        (trimesh.creation.icosphere(3), 5180, 10),
        (trimesh.creation.cylinder(radius=0.3, height=1, sections=16), 262, 1),
        (trimesh.creation.torus(1, 0.4, 24, 12), 2370, 11),
        (trimesh.creation.capsule(), 16744, 60),
    ],
    ids=["sphere 1", "sphere 2", "sphere 3", "cylinder", "torus", "capsule"],
)
def test_golden_counts(mesh, tokens, submeshes):
    ids = ORIGINAL._encode(original_cells(mesh), np.asarray(mesh.faces))
    assert (len(ids), (ids == BOM).sum()) == (tokens, submeshes)
    assert ORIGINAL.decode(ids) == canonical(original_cells(mesh), mesh.faces)


# ---------------------------------------------------------------- both ways


@each
def test_agrees_with_the_slow_twin(mesh):
    ids = TOKENIZER.encode(mesh)
    assert ids.dtype == np.int64
    assert ids.tolist() == slow.encode(mesh.vertices, mesh.faces)
    assert TOKENIZER.triangles(ids).tolist() == slow.decode(ids.tolist()).tolist()


@each
def test_round_trip(mesh):
    ids = TOKENIZER.encode(mesh)
    assert same_faces(TOKENIZER.decode(ids), mesh)
    assert len(TOKENIZER.triangles(ids)) == len(mesh.faces)  # every face once


@pytest.mark.parametrize(
    "name", ["box", "sphere", "torus", "ring", "two bodies", "flat", "spindle", "sheet 3", "tube 3"]
)
def test_winding_is_kept_where_the_faces_agree_on_one(name):
    assert TOKENIZER.decode(TOKENIZER.encode(MESHES[name])) == MESHES[name]


def test_faces_that_disagree_take_one_winding():
    mesh = MESHES["torus"]
    flipped = np.where(np.random.default_rng(0).random((len(mesh.faces), 1)) < 0.5, mesh.faces, mesh.faces[:, ::-1])
    ids = TOKENIZER._encode(mesh.vertices, flipped)
    found = TOKENIZER.decode(ids)
    assert same_faces(found, mesh)
    ends = np.concatenate([found.faces[:, [0, 1]], found.faces[:, [1, 2]], found.faces[:, [2, 0]]])
    twice = len(ends) - len(np.unique(ends, axis=0))  # edges whose two faces run along them the same way
    assert twice < 0.1 * len(ends)  # random windings: a quarter


def test_one_twist_has_no_one_winding():
    mesh = MESHES["moebius"]
    found = TOKENIZER.decode(TOKENIZER.encode(mesh))
    assert same_faces(found, mesh)
    assert not trimesh.Trimesh(found.vertices, found.faces, process=False).is_winding_consistent


def test_every_start_of_a_sequence_decodes_partially():
    ids = BOX_IDS + TETRAHEDRON_IDS
    whole = ORIGINAL.triangles(ids).tolist()
    finished = {10: 1, 64: 13} | {14 + 4 * i: 2 + i for i in range(11)} | {68 + 4 * i: 14 + i for i in range(3)}
    faces = 0
    for end in range(len(ids) + 1):
        faces = finished.get(end, faces)
        assert ORIGINAL.triangles(ids[:end], partial=True).tolist() == whole[:faces]
    assert faces == len(whole)


# ---------------------------------------------------------------- cost


def lines_run(function, *arguments):
    """Count the lines of the tokenizer's file that a call runs."""
    count = 0

    def in_function(frame, event, argument):
        nonlocal count
        count += event == "line"
        return in_function

    def at_call(frame, event, argument):
        return in_function if frame.f_code.co_filename == mesh_edgerunner.__file__ else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize(
    ("make", "small", "large"),
    [(plate, 12, 48), (spindle, 100, 1600), (lambda n: quantized(trimesh.creation.icosphere(n)), 2, 4)],
    ids=["holes", "poles", "sphere"],
)
def test_work_is_linear(make, small, large):
    meshes = make(small), make(large)
    work = [lines_run(edge_walk, mesh.vertices, mesh.faces) / len(mesh.faces) for mesh in meshes]
    assert work[0] > 20  # the loop is counted
    assert work[1] / work[0] == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("face", [1, 997], ids=["near one end", "near the other"])
def test_parting_a_fan_costs_the_smaller_part(face):
    rim = np.arange(1001)
    vertices = np.concatenate([np.stack([rim, 0 * rim, 0 * rim], 1), [[0, 9, 0]]])
    faces = np.stack([rim[:-1], rim[1:], 0 * rim[1:] + 1001], 1)
    rest = mesh_edgerunner._surface(vertices, faces)
    dart = 2 * (3 * face + 2)  # across from the pole
    assert lines_run(rest.remove, dart, rest.turn[dart ^ 1] ^ 1, rest.turn[dart] ^ 1) < 100


def test_20000_faces():
    mesh = plate(108)
    assert len(mesh.faces) > 20_000
    assert TOKENIZER.decode(TOKENIZER.encode(mesh)) == mesh


@pytest.mark.realdata
def test_real_meshes(shared_data):
    paths = sorted(p for p in (shared_data / "mesh").rglob("*") if p.suffix in (".glb", ".obj"))
    assert len(paths) == 16
    faces = tokens = 0
    for path in paths:
        mesh = quantized(trimesh.load(path, force="mesh", process=False))
        ids = TOKENIZER.encode(mesh)
        assert same_faces(TOKENIZER.decode(ids), mesh), path.name
        assert len(TOKENIZER.triangles(ids)) == len(mesh.faces)
        assert len(ids) == 4 * len(mesh.faces) + 6 * (ids == BOM).sum()
        faces, tokens = faces + len(mesh.faces), tokens + len(ids)
    assert tokens / faces < 4.5


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (TETRAHEDRON_IDS[:9], "the sequence of 9 tokens ends within a face; decode it with partial=True"),
        (TETRAHEDRON_IDS[:11], "the sequence of 11 tokens ends within a face"),
        ([*TETRAHEDRON_IDS, R], "the sequence of 23 tokens ends within a face"),
        ([*TETRAHEDRON_IDS, BOM, 5], "the sequence of 24 tokens ends within a face"),
        ([*TETRAHEDRON_IDS, L, R], "token 1 cannot stand at position 23"),
        ([*TETRAHEDRON_IDS, 3], "token 3 cannot stand at position 22"),
        (TETRAHEDRON_IDS[1:], "token 15 cannot stand at position 0"),
        (TETRAHEDRON_IDS[10:], "token 0 cannot stand at position 0"),
        ([*TETRAHEDRON_IDS, L, 515], "token 515 cannot stand at position 23"),
        ([], "the sequence of 0 tokens ends within a face"),
    ],
)
def test_strict_decoding_refuses(ids, error):
    with pytest.raises(DataError, match=f"EdgeRunnerTokenizer: {error}"):
        ORIGINAL.decode(ids)


# ---------------------------------------------------------------- grammar


def test_kinds_by_hand():
    assert TOKENIZER.num_kinds == 8
    kinds = [0, *[1, 2, 3] * 3, 4, 5, 6, 7, 4, 5, 6, 7, 4, 5, 6, 7]
    assert ORIGINAL.kinds(TETRAHEDRON_IDS).tolist() == kinds
    assert ORIGINAL.kinds(TETRAHEDRON_IDS * 2).tolist() == kinds * 2


def test_grammar_allows_what_encode_writes():
    grammar = TOKENIZER.grammar()
    sequences = [torch.from_numpy(TOKENIZER.encode(mesh)) for mesh in MESHES.values()]
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    kinds = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(TOKENIZER.kinds(s)) for s in sequences], batch_first=True)
    state = grammar.begin(len(ids))
    for at in range(int(lengths.max()) + 1):
        left = lengths > at  # those behind their end no longer count
        state, ids, kinds, ended = state[left], ids[left], kinds[left], state[lengths == at]
        lengths = lengths[left]
        assert grammar.allowed(ended)[:, -1].all()
        if len(ids):
            assert grammar.allowed(state).gather(1, ids[:, at : at + 1]).all()
            assert torch.equal(grammar.kinds(state, ids[:, at]), kinds[:, at])
            state = grammar.advance(state, ids[:, at])


@pytest.mark.parametrize("bins", [4, 5])
def test_grammar_agrees_with_the_slow_twin(bins):
    tokenizer = EdgeRunnerTokenizer(bins)
    grammar, generator = tokenizer.grammar(), torch.Generator().manual_seed(bins)
    state, ids, ended = grammar.begin(12), torch.zeros(12, 0, dtype=torch.int64), 0
    for _ in range(50):
        may = grammar.allowed(state)
        assert [set(np.flatnonzero(row).tolist()) for row in may] == [slow.allowed(row, bins) for row in ids.tolist()]
        for row, end in zip(ids.tolist(), may[:, -1], strict=True):
            if end:
                ended += 1
                faces = tokenizer.triangles(row)
                assert faces.tolist() == slow.decode(row).tolist()
                assert all(len(np.unique(face, axis=0)) == 3 for face in faces)
                assert len(tokenizer.decode(row).faces) >= 1
        tokens = torch.multinomial(may[:, :-1].double(), 1, generator=generator)
        state = grammar.advance(state, tokens[:, 0])
        ids = torch.cat([ids, tokens], dim=1)
    assert ended > 12


def test_grammar_forbids_exactly_the_repeats_on_fine_grids():
    bins = 1 << 16
    token = torch.tensor([bins + 2])  # the last cell: a vertex takes 48 bits
    grammar = EdgeRunnerTokenizer(bins).grammar()
    state = grammar.advance(grammar.begin(1), torch.tensor([BOM]))
    for _ in range(5):
        state = grammar.advance(state, token)
    assert torch.equal(grammar.allowed(state)[0].nonzero()[:, 0], torch.arange(3, bins + 2))


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize("bins", [4, 100, 512])
def test_any_number_of_bins(bins):
    tokenizer = EdgeRunnerTokenizer(bins)
    mesh = quantized(trimesh.creation.icosphere(2), bins)
    ids = tokenizer.encode(mesh)
    assert ids.max() < tokenizer.vocab_size == bins + 3
    assert same_faces(tokenizer.decode(ids), mesh)


def test_description():
    tokenizer = EdgeRunnerTokenizer(bins=64)
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    assert make_mesh_tokenizer("edgerunner", 64) == tokenizer
