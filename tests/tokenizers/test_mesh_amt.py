import json
import sys

import numpy as np
import pytest
import torch
import trimesh
from tests.reference import mesh_amt as slow

from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.mesh import canonical, make_mesh_tokenizer, quantize, same_faces
from vertebra.tokenizers.mesh_amt import AMTTokenizer, strip_order

AMT = AMTTokenizer(up="z")
TETRAHEDRON = canonical(np.eye(4, 3, k=-1, dtype=int) * 127, [[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
TETRAHEDRON_IDS = [0, 0, 0, 127, 0, 0, 0, 127, 0, 0, 0, 127, 0, 0, 0, 127, 0, 0]
BOX_IDS = """0 0 0 127 0 0 0 127 0 127 127 0 127 127 127 127 0 127 0 0 127 127 0 0 0 0 0 128 0 0 0 0 127 0 0 127 127 127
    127 127 0 0 127 128 0 0 0 0 0 127 0 127 127 128 127 0 0 127 127 0 127 0 127"""


def quantized(mesh, bins=128):
    low, high = mesh.vertices.min(0), mesh.vertices.max(0)
    return canonical(quantize((mesh.vertices - (low + high) / 2) / (high - low).max(), bins), mesh.faces)


BOX = quantized(trimesh.creation.box())


def random_mesh(seed, bins=128):
    """Make a soup: few vertices, so that edges have many faces and components touch; every fourth one is flat."""
    draw = np.random.default_rng(seed)
    vertices = draw.integers(0, bins, (draw.integers(3, 12), 3))
    if seed % 4 == 0:
        vertices[:, draw.integers(3)] = 1
    return canonical(vertices, draw.integers(0, len(vertices), (draw.integers(4, 40), 3)))


def surface(seed):
    """Make a grid of triangles with holes, its indices shuffled: open, in several pieces."""
    draw = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(9), np.arange(7), indexing="ij")
    vertices = np.stack([x, y, draw.integers(0, 5, x.shape)], axis=-1).reshape(-1, 3)
    corner = (x * 7 + y)[:-1, :-1].reshape(-1)
    halves = [[corner, corner + 7, corner + 1], [corner + 1, corner + 7, corner + 8]]
    faces = np.concatenate([np.stack(half, axis=1) for half in halves])
    return canonical(vertices, draw.permutation(faces)[: draw.integers(20, len(faces) + 1)])


def fan(count):
    """Make ``count`` faces on one edge of the two highest vertices: every strip begins and goes on there."""
    rim = np.arange(count)
    vertices = np.concatenate([np.stack([rim % 127, rim // 127, 0 * rim], 1), [[0, 0, 127], [1, 0, 127]]])
    return canonical(vertices, np.stack([rim, 0 * rim + count, 0 * rim + count + 1], 1))


MESHES = {
    "tetrahedron": TETRAHEDRON,
    "box": BOX,
    "triangle": canonical(np.eye(3, dtype=int), [[0, 1, 2]]),
    "sphere": quantized(trimesh.creation.icosphere(2)),
    "torus": quantized(trimesh.creation.torus(1, 0.4, 12, 6)),
    "ring": quantized(trimesh.creation.annulus(0.3, 0.5, 1.0, sections=9)),
    "two bodies": quantized(trimesh.util.concatenate([trimesh.creation.box(), trimesh.creation.icosphere(1)])),
    "fan": fan(60),
    **{f"soup {seed}": random_mesh(seed) for seed in range(40)},
    **{f"coarse soup {seed}": random_mesh(seed, 4) for seed in range(20)},
    **{f"surface {seed}": surface(seed) for seed in range(12)},
}
each = pytest.mark.parametrize("mesh", [pytest.param(mesh, id=name) for name, mesh in MESHES.items()])


# ---------------------------------------------------------------- golden


def test_golden_tetrahedron():
    assert strip_order(TETRAHEDRON.faces).tolist() == [0, 1, 2, 3, 0, 1]
    assert AMT.encode(TETRAHEDRON).tolist() == TETRAHEDRON_IDS


def test_golden_box():
    order = "0 1 2 3 7 5 4 1 0 & 0 2 6 7 4 & 0 4 6 & 1 3 5".replace("&", "-1")
    assert strip_order(BOX.faces).tolist() == [int(word) for word in order.split()]
    assert AMT.encode(BOX).tolist() == [int(word) for word in BOX_IDS.split()]


def test_golden_kinds():
    first, later = [1, 2, 3], [4, 5, 6]
    expected = [*first * 3, *later * 6, 0, *first * 3, *later * 2, 0, *first * 3, 0, *first * 3]
    assert AMT.kinds(AMT.encode(BOX)).tolist() == expected
    assert set(expected) == set(range(AMT.num_kinds))


@pytest.mark.parametrize(
    ("mesh", "separators", "ratio"),
    [
        (trimesh.creation.icosphere(1), 11, 0.4486),
        (trimesh.creation.icosphere(2), 27, 0.4010),
        (trimesh.creation.icosphere(3), 55, 0.3673),
        (trimesh.creation.cylinder(radius=0.3, height=1, sections=16), 15, 0.5260),
        (trimesh.creation.torus(1, 0.4, 24, 12), 23, 0.3655),
        (trimesh.creation.capsule(), 152, 0.3635),
    ],
    ids=["sphere 1", "sphere 2", "sphere 3", "cylinder", "torus", "capsule"],
)
def test_golden_counts(mesh, separators, ratio):
    grid = quantized(mesh)
    ids = AMT.encode(grid)
    assert (ids == 128).sum() == separators
    assert round(len(ids) / (9 * len(grid.faces)), 4) == pytest.approx(ratio, abs=1.01e-4)
    assert same_faces(AMT.decode(ids), grid)


# ---------------------------------------------------------------- both ways


@each
def test_agrees_with_the_slow_twin(mesh):
    ids = AMT.encode(mesh)
    assert ids.dtype == np.int64
    assert ids.tolist() == slow.encode(mesh, 128)
    assert AMT.triangles(ids).tolist() == slow.decode(ids.tolist(), 128).tolist()
    assert AMT.kinds(ids).tolist() == slow.kinds(ids.tolist(), 128)


@each
def test_round_trip(mesh):
    ids = AMT.encode(mesh)
    back = AMT.decode(ids)
    assert same_faces(back, mesh)
    assert len(AMT.triangles(ids)) == len(mesh.faces)  # every face once
    assert np.array_equal(AMT.encode(back), ids)


def test_every_start_of_a_sequence_decodes_partially():
    ids = AMT.encode(BOX).tolist()
    for end in range(len(ids) + 1):
        faces = slow.decode(ids[:end], 128)
        assert AMT.triangles(ids[:end], partial=True).tolist() == faces.tolist()
        assert len(AMT.decode(ids[:end], partial=True).faces) == len(faces)


def lines_run(function, *arguments):
    """Count the lines that ``function`` runs, its callees' not among them."""
    count = 0

    def in_function(frame, event, argument):
        nonlocal count
        count += event == "line"
        return in_function

    def at_call(frame, event, argument):
        return in_function if frame.f_code is function.__code__ else None

    before = sys.gettrace()
    sys.settrace(at_call)
    try:
        function(*arguments)
    finally:
        sys.settrace(before)
    return count


def test_work_is_linear_even_where_one_edge_has_all_faces():
    small, large = (lines_run(strip_order, fan(count).faces) for count in (500, 2000))
    assert small > 500  # the loop is counted
    assert large / small == pytest.approx(4, rel=0.05)


def test_one_edge_of_10000_faces():
    mesh = fan(10_000)
    ids = AMT.encode(mesh)
    assert len(ids) == 5_000 * (3 * 4 + 1) - 1  # two faces a strip
    assert same_faces(AMT.decode(ids), mesh)


@pytest.mark.realdata
def test_real_meshes(shared_data):
    paths = sorted(p for p in (shared_data / "mesh").rglob("*") if p.suffix in (".glb", ".obj"))
    assert len(paths) == 16
    faces, tokens = [], []
    for path in paths:
        mesh = quantized(trimesh.load(path, force="mesh", process=False))
        ids = AMT.encode(mesh)
        assert same_faces(AMT.decode(ids), mesh), path.name
        faces.append(len(mesh.faces))
        tokens.append(len(ids))
    ratios = np.array(tokens) / (9 * np.array(faces))
    assert sum(tokens) / (9 * sum(faces)) < 0.46
    assert ratios[np.array(faces) >= 40].mean() < 0.51  # 40 faces: the least that MeshAnything V2 trains on
    assert ratios.mean() < 0.53  # two meshes of 20 and 30 faces are mostly starts of strips


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        (TETRAHEDRON_IDS[:8], "the sequence of 8 tokens ends within a face; decode it with partial=True"),
        (TETRAHEDRON_IDS[:10], "the sequence of 10 tokens ends within a face"),
        ([*TETRAHEDRON_IDS, 128], "the sequence of 19 tokens ends within a face"),
        ([*TETRAHEDRON_IDS, 128, 0, 0, 0], "the sequence of 22 tokens ends within a face"),
        ([*TETRAHEDRON_IDS, 128, 128], "token 128 cannot stand at position 19"),
        ([*TETRAHEDRON_IDS, 3, 128], "token 128 cannot stand at position 19"),
        ([*TETRAHEDRON_IDS[:6], 128], "token 128 cannot stand at position 6"),
        ([128, *TETRAHEDRON_IDS], "token 128 cannot stand at position 0"),
        ([*TETRAHEDRON_IDS, 129], "token 129 cannot stand at position 18"),
        ([], "the sequence of 0 tokens ends within a face"),
    ],
)
def test_strict_decoding_refuses(ids, error):
    with pytest.raises(DataError, match=f"AMTTokenizer: {error}"):
        AMT.decode(ids)


def test_partial_decoding_stops_where_the_sequence_breaks():
    broken = [*TETRAHEDRON_IDS[:12], 5, 128, *TETRAHEDRON_IDS]
    assert AMT.triangles(broken, partial=True).tolist() == slow.decode(TETRAHEDRON_IDS[:12], 128).tolist()


def test_a_mesh_beyond_the_grid_is_refused():
    with pytest.raises(DataError, match="AMTTokenizer: vertices must lie on a grid of 64 cells, got 127"):
        AMTTokenizer(64, "z").encode(BOX)


# ---------------------------------------------------------------- grammar


def test_grammar_allows_what_encode_writes():
    grammar = AMT.grammar()
    sequences = [torch.from_numpy(AMT.encode(mesh)) for mesh in MESHES.values()]
    kinds = [torch.from_numpy(AMT.kinds(ids)) for ids in sequences]
    lengths = torch.tensor([len(ids) for ids in sequences])
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # behind the end anything may stand
    kinds = torch.nn.utils.rnn.pad_sequence(kinds, batch_first=True)
    state = grammar.begin(len(ids))
    for at in range(int(lengths.max()) + 1):
        may = grammar.allowed(state)
        assert may[lengths == at, -1].all()
        if at < ids.shape[1]:
            left = lengths > at
            assert may.gather(1, ids[:, at : at + 1])[left].all()
            assert torch.equal(grammar.kinds(state, ids[:, at])[left], kinds[left, at])
            state = grammar.advance(state, ids[:, at])


@pytest.mark.parametrize("bins", [4, 5])
def test_grammar_agrees_with_the_slow_twin(bins):
    tokenizer = AMTTokenizer(bins, "z")
    grammar = tokenizer.grammar()
    generator = torch.Generator().manual_seed(bins)
    batch, length = 24, 60
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
        tokens = torch.multinomial(may[:, :-1].double(), 1, generator=generator)
        state = grammar.advance(state, tokens[:, 0])
        ids = torch.cat([ids, tokens], dim=1)
    assert ended > batch


def test_grammar_reaches_the_end_within_nine_tokens():
    grammar = AMTTokenizer(4, "z").grammar()
    generator = torch.Generator().manual_seed(0)
    state = grammar.begin(64)
    for _ in range(40):
        tokens = torch.multinomial(grammar.allowed(state)[:, :-1].double(), 1, generator=generator)
        state = grammar.advance(state, tokens[:, 0])
        ahead, left = state, torch.ones(64, dtype=torch.bool)
        for _ in range(9):
            may = grammar.allowed(ahead)
            left &= ~may[:, -1]
            ahead = grammar.advance(ahead, may[:, :4].double().argmax(1))
        assert not (left & ~grammar.allowed(ahead)[:, -1]).any()


# ---------------------------------------------------------------- the rest


def test_description():
    tokenizer = AMTTokenizer(64, "z")
    assert (tokenizer.vocab_size, tokenizer.num_kinds) == (65, 7)
    assert tokenizer_from_dict(json.loads(json.dumps(tokenizer.to_dict()))) == tokenizer
    assert make_mesh_tokenizer("amt", 64) == AMTTokenizer(64, "y")


def test_up_is_the_last_column_in_the_sequence():
    turned = canonical(BOX.vertices[:, [1, 2, 0]], BOX.faces)  # y up: what was z
    assert AMTTokenizer(up="y").encode(turned).tolist() == AMT.encode(BOX).tolist()
    assert same_faces(AMTTokenizer(up="y").decode(AMT.encode(BOX)), turned)
    with pytest.raises(ConfigError, match="AMTTokenizer: up must be y or z, got 'x'"):
        AMTTokenizer(up="x")
