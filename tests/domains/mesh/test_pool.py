"""Sets of meshes: what is kept, what is left out and why, and the cache."""

import os
from dataclasses import replace

import numpy as np
import pytest
import trimesh

from vertebra.domains.mesh import pool as pools
from vertebra.domains.mesh.files import MeshRules, write_mesh
from vertebra.domains.mesh.geometry import quantized
from vertebra.domains.mesh.pool import LeftOut, MeshPool, collect, procedural_pool, read_pool
from vertebra.domains.mesh.procedural import draw
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.mesh import canonical, make_mesh_tokenizer, quantize, same_faces

AMT = make_mesh_tokenizer("amt")
RULES = MeshRules()


@pytest.fixture
def folder(tmp_path):
    """Three procedural shapes, a copy of one, a sphere of many faces, a point cloud and a damaged file."""
    root = tmp_path / "meshes"
    root.mkdir()
    for i in range(3):
        write_mesh(draw("train", 0, i), root / f"shape{i}.obj")
    moved = draw("train", 0, 1)
    moved.apply_scale(3).apply_translation([5, 6, 7])
    write_mesh(moved, root / "shape1-again.ply")
    write_mesh(trimesh.creation.icosphere(4), root / "ball.ply")
    np.save(root / "cloud.npy", np.random.default_rng(0).random((50, 3)))
    (root / "damaged.obj").write_text("v 0 0 nan\nv 1 0 0\nv 0 1 0\nf 1 2 3\n")
    return root


def equal(a, b):
    assert (a.names, a.left_out) == (b.names, b.left_out)
    for name in ("vertices", "faces", "vertex_ends", "face_ends", "tokens"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), strict=True)


# ---------------------------------------------------------------- reading


def test_meshes_are_kept_in_the_box_and_counted(folder):
    pool = read_pool([folder], AMT, RULES, 3600)
    assert [os.path.basename(name) for name in pool.names] == ["shape0.obj", "shape1-again.ply", "shape2.obj"]
    assert len(pool) == 3
    for i in range(3):
        vertices, faces = pool[i]
        mesh = draw("train", 0, i)
        assert (vertices.dtype, faces.dtype) == (np.float64, np.int64)
        assert np.abs(vertices).max() == 0.5
        np.testing.assert_allclose(np.ptp(vertices, axis=0), np.ptp(mesh.vertices, axis=0), atol=1e-6)
        assert pool.face_counts[i] == len(mesh.faces) == len(faces)
        assert trimesh.Trimesh(vertices, faces, process=False).volume == pytest.approx(mesh.volume, rel=1e-4)
        assert same_faces(canonical(quantize(np.round(vertices, 6), 128), faces), quantized(mesh, 128)[0])
        assert pool.tokens[i] == len(AMT.encode(quantized(mesh, 128)[0]))


def test_each_that_is_left_out_has_its_name_and_reason(folder):
    pool = read_pool([folder], AMT, RULES, 3600)
    assert {os.path.basename(one.name): one.reason for one in pool.left_out} == {
        "ball.ply": "5,120 faces on the grid are more than max_faces 800",
        "cloud.npy": "is a point cloud, not a mesh",
        "damaged.obj": f"{folder / 'damaged.obj'}: 1 of 3 vertex positions are NaN, infinite or beyond 1e+30, "
        "the first [0.0, 0.0, nan]; leave them out.",
        "shape1.obj": f"is the same mesh as {folder / 'shape1-again.ply'}",
    }


def test_meshes_of_too_many_tokens_are_left_out(folder):
    counts = read_pool([folder], AMT, RULES, 3600).tokens
    most = int(np.sort(counts)[1])
    pool = read_pool([folder], AMT, RULES, most)
    assert sorted(pool.tokens) == sorted(counts)[:2]
    (reason,) = [one.reason for one in pool.left_out if "max_tokens=" in one.reason]
    assert reason == f"has {counts.max():,} tokens, more than max_tokens={most:,}"
    text = (
        rf"^none of 7 files can be used; {folder / 'ball.ply'}: 5,120 faces on the grid are more than max_faces 800\."
    )
    with pytest.raises(DataError, match=text):
        read_pool([folder], AMT, RULES, 9)


def test_progress_names_files_done_and_all(folder):
    calls = []
    read_pool([folder], AMT, RULES, 3600, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 7) for i in range(1, 8)]


def test_meshes_without_a_file_are_collected():
    meshes = [("a", trimesh.creation.box()), ("b", LeftOut("b", "is lost")), ("c", trimesh.creation.box((2, 2, 2)))]
    pool = collect(meshes, AMT, RULES, 3600)
    assert pool.names == ("a",)
    assert pool.left_out == (LeftOut("b", "is lost"), LeftOut("c", "is the same mesh as a"))


def test_some_are_taken_in_any_order(folder):
    pool = read_pool([folder], AMT, RULES, 3600)
    some = pool.take([2, 0, 2])
    assert some.names == (pool.names[2], pool.names[0], pool.names[2])
    assert some.left_out == ()
    for i, j in enumerate([2, 0, 2]):
        for mine, theirs in zip(some[i], pool[j], strict=True):
            np.testing.assert_array_equal(mine, theirs)
        assert some.tokens[i] == pool.tokens[j]
    assert len(pool.take([])) == 0


# ---------------------------------------------------------------- procedural shapes


def test_procedural_shapes_are_those_that_are_drawn():
    calls = []
    pool = procedural_pool("val", 7, AMT, 3600, 5, progress=lambda done, total: calls.append((done, total)))
    assert pool.names == tuple(f"procedural val 5 {i}" for i in range(7))
    assert calls == [(i, 7) for i in range(1, 8)]
    for i in (0, 6):
        mesh = draw("val", 5, i)
        np.testing.assert_allclose(pool[i][0], mesh.vertices, atol=1e-6)
        np.testing.assert_array_equal(pool[i][1], mesh.faces)
    assert procedural_pool("val", 2, AMT, 3600, 6).vertices.shape != pool.take([0, 1]).vertices.shape


def test_procedural_shapes_of_too_many_tokens_are_replaced_by_the_next():
    every = procedural_pool("train", 24, AMT, 3600)
    most = int(np.sort(every.tokens)[7])
    few = procedural_pool("train", 6, AMT, most)
    equal(few, every.take(np.flatnonzero(every.tokens <= most)[:6]))
    with pytest.raises(
        ConfigError,
        match=r"^procedural: 0 of the first 46 shapes have at most max_tokens=9 tokens, where 2 are wanted; raise "
        r"max_tokens\.$",
    ):
        procedural_pool("train", 2, AMT, 9)
    with pytest.raises(ConfigError, match=r"^procedural: a split must have at least 1 shape, got 0\.$"):
        procedural_pool("train", 0, AMT, 9)


# ---------------------------------------------------------------- files of sets


def test_a_set_is_the_same_after_saving(folder, tmp_path):
    pool = read_pool([folder], AMT, RULES, 3600)
    pool.save(tmp_path / "deep" / "set.npz")
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set.npz"]
    equal(MeshPool.load(tmp_path / "deep" / "set.npz"), pool)


def test_saving_leaves_no_halves(tmp_path, monkeypatch):
    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(pools.np, "savez_compressed", full)
    text = rf"^{tmp_path}/set\.npz: cannot be written \(no space left on device\); choose another folder\.$"
    with pytest.raises(DataError, match=text):
        procedural_pool("val", 1, AMT, 3600).save(tmp_path / "set.npz")
    assert list(tmp_path.iterdir()) == []


def damaged(whole):
    yield b""
    yield b"This is no set of meshes."
    yield whole[: len(whole) // 2]
    yield whole[:40] + bytes(40) + whole[80:]


def test_damaged_sets_are_named(tmp_path):
    path = tmp_path / "set.npz"
    procedural_pool("val", 1, AMT, 3600).save(path)
    contents = list(damaged(path.read_bytes()))
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"^{path}: is no readable cache of meshes \(.*\); delete it\.$"):
            MeshPool.load(path)
    np.savez(path, facts=np.zeros(3))
    with pytest.raises(DataError, match="is no readable cache of meshes"):
        MeshPool.load(path)


def test_sets_of_another_format_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pools, "FORMAT", 99)
    procedural_pool("val", 1, AMT, 3600).save(tmp_path / "set.npz")
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"is no readable cache of meshes \(format 99\); delete it\."):
        MeshPool.load(tmp_path / "set.npz")


# ---------------------------------------------------------------- cache


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were read."""
    names = []
    read = pools.read_shape
    monkeypatch.setattr(pools, "read_shape", lambda path: names.append(path.name) or read(path))
    return names


def test_a_set_is_read_once(folder, tmp_path, reads):
    cache = tmp_path / "cache"
    first = read_pool([folder], AMT, RULES, 3600, cache=cache)
    assert len(reads) == 7
    equal(read_pool([folder], AMT, RULES, 3600, cache=cache), first)
    equal(read_pool(sorted(folder.iterdir()), AMT, RULES, 3600, cache=cache), first)
    assert len(reads) == 7
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("change", ["touched", "rewritten", "added", "removed", "moved"])
def test_changed_files_are_read_again(change, folder, tmp_path, reads):
    cache = tmp_path / "cache"
    read_pool([folder], AMT, RULES, 3600, cache=cache)
    reads.clear()
    path = folder / "shape2.obj"
    if change == "touched":
        os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns + 1))
    elif change == "rewritten":
        write_mesh(draw("train", 0, 8), path)
    elif change == "added":
        write_mesh(draw("train", 0, 8), folder / "shape8.obj")
    elif change == "removed":
        path.unlink()
    else:
        folder = folder.rename(tmp_path / "elsewhere")
    pool = read_pool([folder], AMT, RULES, 3600, cache=cache)
    assert len(reads) == {"added": 8, "removed": 6}.get(change, 7)
    assert all(name.startswith(str(folder)) for name in pool.names)
    equal(pool, read_pool([folder], AMT, RULES, 3600))


def test_other_settings_are_another_set(folder, tmp_path, reads):
    cache = tmp_path / "cache"
    for tokenizer, rules, most in (
        (AMT, RULES, 3600),
        (make_mesh_tokenizer("amt", 64), RULES, 3600),
        (make_mesh_tokenizer("plain"), RULES, 3600),
        (AMT, replace(RULES, max_faces=6000), 3600),
        (AMT, RULES, 3000),
    ):
        reads.clear()
        pool = read_pool([folder], tokenizer, rules, most, cache=cache)
        assert len(reads) == 7
        equal(pool, read_pool([folder], tokenizer, rules, most))
    assert len(list(cache.iterdir())) == 5


def test_a_set_of_nothing_is_not_kept(folder, tmp_path):
    with pytest.raises(DataError, match="none of 7 files can be used"):
        read_pool([folder], AMT, RULES, 9, cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
