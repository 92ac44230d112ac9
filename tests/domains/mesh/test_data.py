"""The data module: splits, draws, points and tokens of items."""

import logging
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh

from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.mesh.data import MeshAugment, MeshData, MeshItems, join, make_item
from vertebra.domains.mesh.files import MeshRules, write_mesh
from vertebra.domains.mesh.geometry import CONDITION_SCALE
from vertebra.domains.mesh.model import BEGIN, END, PAD, SPECIAL
from vertebra.domains.mesh.pool import procedural_pool
from vertebra.domains.mesh.procedural import draw
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.tokenizers.mesh import canonical, dequantize, make_mesh_tokenizer, quantize, same_faces
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

AMT = make_mesh_tokenizer("amt")
SPEC = MeshSpec(tokenizer=AMT.to_dict(), points=256, face_buckets=(30, 60, 120))
NO_CHANGE = MeshAugment(scale=(1.0, 1.0), turn="none", mirror=0, noise=0, normal_noise=0)


@pytest.fixture(scope="module")
def pool():
    return procedural_pool("train", 12, AMT, 3600)


def write_shapes(folder, numbers):
    folder.mkdir(parents=True, exist_ok=True)
    for i in numbers:
        write_mesh(draw("train", 0, i), folder / f"shape{i:02}.obj")
    return folder


def setup(stage="fit", **options):
    data = MeshData(**{"points": 64, **options})
    data.setup(stage)
    return data


def names(data, split):
    return [name.rpartition("/")[2] for name in data.items(split).pool.names]


def batches_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=0, rtol=0, equal_nan=True)


# ---------------------------------------------------------------- splits


def test_folders_of_splits_are_kept(tmp_path):
    for split, numbers in (("train", range(4)), ("val", (4, 5)), ("test", (6,))):
        write_shapes(tmp_path / split, numbers)
    write_shapes(tmp_path / "other", (7,))  # beside, and not read
    data = setup("", root=str(tmp_path))
    assert names(data, "train") == [f"shape{i:02}.obj" for i in range(4)]
    assert names(data, "val") == ["shape04.obj", "shape05.obj"]
    assert names(data, "test") == ["shape06.obj"]
    assert setup("test", root=[str(tmp_path)]).items("test").pool.names == data.items("test").pool.names
    given = setup("", root=str(tmp_path), val=str(tmp_path / "other"))
    assert names(given, "val") == ["shape07.obj"]
    assert names(given, "test") == ["shape06.obj"]


def test_folders_with_and_without_splits_come_together(tmp_path):
    write_shapes(tmp_path / "a" / "train", range(3))
    write_shapes(tmp_path / "a" / "val", (3,))
    write_shapes(tmp_path / "b", range(4, 7))
    data = setup("", root=[str(tmp_path / "a"), str(tmp_path / "b")], test_fraction=0.0)
    assert names(data, "train") == [f"shape{i:02}.obj" for i in (0, 1, 2, 4, 5, 6)]
    assert names(data, "val") == ["shape03.obj"]


def test_drawn_splits_depend_on_each_file_alone(tmp_path):
    """Many folders whose files have the same name, as ShapeNet's."""
    for i in range(24):
        (tmp_path / "all" / f"{i:02}").mkdir(parents=True)
        write_mesh(draw("train", 0, i), tmp_path / "all" / f"{i:02}" / "model.obj")
    options = {"val_fraction": 0.25, "test_fraction": 0.25}

    def splits(folder, **more):
        data = setup("", root=str(folder), **options, **more)
        return {s: {n.removeprefix(f"{folder}/") for n in data.items(s).pool.names} for s in ("train", "val", "test")}

    whole = splits(tmp_path / "all")
    assert sum(map(len, whole.values())) == len(set.union(*whole.values())) == 24
    assert all(2 <= len(part) <= 18 for part in whole.values())
    assert splits(tmp_path / "all", seed=1) != whole
    gone = {f"{i:02}/model.obj" for i in range(0, 24, 3)}
    for name in gone:
        shutil.rmtree((tmp_path / "all" / name).parent)
    (tmp_path / "all").rename(tmp_path / "moved")
    assert splits(tmp_path / "moved") == {split: part - gone for split, part in whole.items()}


def test_shares_of_drawn_splits(tmp_path):
    write_shapes(tmp_path, range(6))
    data = setup("", root=str(tmp_path), val_fraction=0, test_fraction=0)
    assert len(names(data, "train")) == 6
    for split in ("val", "test"):
        with pytest.raises(DataError, match=rf"^MeshData: no {split} data; give a {split} file or a share of the data"):
            data.items(split)
    assert data.val_dataloader() == []
    with pytest.raises(
        DataError,
        match=r"^MeshData: all 6 meshes were drawn to other splits; lower val_fraction and test_fraction\.$",
    ):
        setup(root=str(tmp_path), val_fraction=0.999, test_fraction=0)


def test_procedural_counts_are_those_asked_for():
    data = setup("", procedural=(7, 3, 2), seed=4)
    assert data.items("train").pool.names == tuple(f"procedural train 4 {i}" for i in range(7))
    assert data.items("val").pool.names == tuple(f"procedural val 4 {i}" for i in range(3))
    assert data.items("test").pool.names == tuple(f"procedural test 4 {i}" for i in range(2))
    only = setup("", procedural=(2, 0, 0))
    with pytest.raises(DataError, match="no val data"):
        only.items("val")


def test_files_and_procedural_shapes_are_joined_and_weighed(tmp_path):
    write_shapes(tmp_path, range(3))
    data = setup("", root=str(tmp_path), procedural=(2, 2, 1), repeat=3, seed=1)
    files = [f"shape{i:02}.obj" for i in range(3)]  # none is drawn to a split that procedural shapes fill
    assert names(data, "train") == files * 3 + ["procedural train 1 0", "procedural train 1 1"]
    assert names(data, "val") == ["procedural val 1 0", "procedural val 1 1"]
    pool = data.items("train").pool
    for i, name in enumerate(pool.names[:9]):
        mesh = draw("train", 0, int(name[-6:-4]))
        assert pool.face_counts[i] == len(mesh.faces)
        np.testing.assert_allclose(np.ptp(pool[i][0], axis=0), np.ptp(mesh.vertices, axis=0), atol=1e-6)
    items = data.items("train")
    assert not np.array_equal(items.item(0, 0).points, items.item(3, 0).points)  # each time drawn anew


def test_one_set_is_not_copied(pool):
    assert join([pool], [1]) is pool
    assert join([pool.take([0]), pool.take([1])], [1, 2]).names == tuple(pool.names[i] for i in (0, 1, 1))


def test_what_is_left_out_is_told(tmp_path, caplog):
    write_shapes(tmp_path, range(2))
    trimesh.creation.icosphere(4).export(tmp_path / "ball.ply")
    np.save(tmp_path / "cloud.npy", np.eye(3))
    with caplog.at_level(logging.WARNING, logger="vertebra"):
        data = setup(root=str(tmp_path), rules=MeshRules(max_faces=400), val_fraction=0, test_fraction=0)
    assert [one.name for one in data.left_out] == [str(tmp_path / n) for n in ("ball.ply", "cloud.npy")]
    assert f"left out: {tmp_path / 'ball.ply'}: 5,120 faces on the grid are more than max_faces 400" in caplog.text
    assert f"left out: {tmp_path / 'cloud.npy'}: is a point cloud, not a mesh" in caplog.text


def test_the_cache_is_used(tmp_path):
    write_shapes(tmp_path / "meshes", range(3))
    options = {"root": str(tmp_path / "meshes"), "cache": str(tmp_path / "cache"), "val_fraction": 0}
    first, again = (setup(test_fraction=0, **options) for _ in range(2))
    assert len(list((tmp_path / "cache").iterdir())) == 1
    batches_equal(*(data.items("train").fetch(np.arange(3), 0) for data in (first, again)))


# ---------------------------------------------------------------- spec


def test_the_spec_says_what_the_data_knows():
    data = setup(
        procedural=(1, 1, 1), points=99, tokenizer="bpt", bins=64, max_tokens=777, face_buckets=[20, 40],
        rules=MeshRules(max_faces=500),
    )  # fmt: skip
    assert data.spec == MeshSpec(
        tokenizer=make_mesh_tokenizer("bpt", 64).to_dict(),
        points=99,
        max_faces=500,
        max_tokens=777,
        face_buckets=(20, 40),
    )
    data = setup(procedural=(1, 1, 1), tokenizer="amt,up=z", place="lower")
    assert data.spec.tokenizer == AMT.to_dict() | {"up": "z"}
    assert data.spec.place == "lower"


def test_a_models_spec_holds():
    spec = replace(SPEC, tokenizer=make_mesh_tokenizer("plain", 32).to_dict(), points=10, max_tokens=1000)
    data = MeshData(procedural=(4, 1, 1))
    data.use_spec(spec)
    data.setup("fit")
    items = data.items("train")
    assert data.spec == spec
    assert (items.lengths <= 1002).all()
    assert ((items.lengths - 2) % 9 == 0).all()
    batch = items.fetch(np.arange(4), 0)
    assert batch["points"].shape == (4, 10, 6)
    assert batch["ids"].max() < SPECIAL + 32
    data = MeshData(procedural=(4, 1, 1))
    data.use_spec(DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="lm", max_length=9))
    with pytest.raises(ConfigError, match=r"^MeshData: the model is for dna, not for meshes\.$"):
        data.setup("fit")


# ---------------------------------------------------------------- draws


def test_training_is_drawn_anew_in_every_epoch(pool):
    items = MeshItems(pool, SPEC, 0, MeshAugment())
    all_of = np.arange(6)
    batches_equal(items.fetch(all_of, 2), MeshItems(pool, SPEC, 0, MeshAugment()).fetch(all_of, 2))
    first, second, other = items.item(0, 0), items.item(0, 1), MeshItems(pool, SPEC, 1, MeshAugment()).item(0, 0)
    for item in (second, other):
        assert (first.points != item.points).any(1).all()
        assert not np.array_equal(first.ids, item.ids)
        assert not np.array_equal(np.ptp(first.corners, axis=(0, 1)), np.ptp(item.corners, axis=(0, 1)))
    assert (items.item(1, 0).points != first.points).any(1).all()


def test_items_do_not_depend_on_their_batch(pool):
    items = MeshItems(pool, SPEC, 0, MeshAugment())
    together = items.fetch(np.array([5, 2, 9]), 1)
    for row, index in enumerate((5, 2, 9)):
        alone = items.fetch(np.array([index]), 1)
        length, faces = alone["ids"].shape[1], alone["corners"].shape[1]
        for name in ("points", "face_buckets", "index"):
            assert torch.equal(together[name][row], alone[name][0])
        for name in ("ids", "kinds", "mask"):
            assert torch.equal(together[name][row, :length], alone[name][0])
        assert torch.equal(together["corners"][row, :faces], alone["corners"][0])
        assert (together["ids"][row, length:] == PAD).all()
        assert (together["kinds"][row, length:] == PAD).all()
        assert not together["mask"][row, length:].any()
        assert together["corners"][row, faces:].isnan().all()


def test_evaluation_is_the_same_in_every_epoch(pool):
    items = MeshItems(pool, SPEC, 0)
    batches_equal(items.fetch(np.arange(4), 0), items.fetch(np.arange(4), 7))
    noisy = MeshItems(pool, SPEC, 0, noise=0.05)
    batches_equal(noisy.fetch(np.arange(4), 0), noisy.fetch(np.arange(4), 7))
    assert (noisy.item(0, 0).points != items.item(0, 0).points).any(1).all()
    assert (MeshItems(pool, SPEC, 1).item(0, 0).points != items.item(0, 0).points).any(1).all()
    known = items.item(0, 0)
    vertices, faces = pool[0]
    assert canonical(quantize(vertices, 128), faces).faces.shape[0] == len(known.cells)


def test_face_counts_are_told_and_hidden(pool):
    told = MeshItems(pool, SPEC, 0).fetch(np.arange(12), 0)
    counts = torch.tensor(pool.face_counts.astype(np.int64))
    assert told["face_buckets"].tolist() == [1 + sum(n > edge for edge in (30, 60, 120)) for n in counts.tolist()]
    assert len(set(told["face_buckets"].tolist())) > 1
    many = pool.take([0] * 200)
    small = replace(SPEC, points=8)
    items = MeshItems(many, small, 0, NO_CHANGE, unknown_faces=0.3)
    hidden = np.array(
        [items.fetch(np.arange(k, k + 100), e)["face_buckets"] for e in (0, 1) for k in range(0, 200, 100)]
    )
    assert set(hidden.flat) <= {0, 1, 2, 3, 4}
    assert (hidden == 0).mean() == pytest.approx(0.3, abs=0.06)
    assert ((hidden[:2] == 0) != (hidden[2:] == 0)).any()
    for share, expected in ((0.0, 0), (1.0, 20)):
        batch = MeshItems(many, small, 0, NO_CHANGE, unknown_faces=share).fetch(np.arange(20), 0)
        assert (batch["face_buckets"] == 0).sum() == expected


def test_batches_are_what_a_model_takes(pool):
    batch = MeshItems(pool, SPEC, 0).fetch(np.array([3, 1]), 0)
    assert batch.keys() == {"points", "ids", "kinds", "mask", "face_buckets", "corners", "cells", "index"}
    assert (batch["points"].dtype, batch["points"].shape) == (torch.float32, (2, 256, 6))
    for name in ("ids", "kinds", "face_buckets", "cells", "index"):
        assert batch[name].dtype == torch.int64
    assert batch["mask"].dtype == torch.bool
    assert batch["index"].tolist() == [3, 1]
    for row, i in enumerate((3, 1)):
        own = batch["ids"][row][batch["mask"][row]]
        assert (own[0], own[-1]) == (BEGIN, END)
        mesh = AMT.decode(own[1:-1].numpy() - SPECIAL)
        assert len(mesh.faces) <= pool.face_counts[i]
        kinds = batch["kinds"][row][batch["mask"][row]]
        assert kinds.tolist() == [BEGIN, *(AMT.kinds(own[1:-1].numpy() - SPECIAL) + SPECIAL), END]
        assert batch["corners"][row].isfinite().all((1, 2)).sum() == pool.face_counts[i]
        cells = batch["cells"][row]
        count = len(mesh.faces)
        known = canonical(cells[:count].reshape(-1, 3), np.arange(3 * count).reshape(-1, 3))
        assert same_faces(known, mesh)  # AMT does not write which way a face winds
        np.testing.assert_array_equal(known.corners, cells[:count])
        assert (cells[len(mesh.faces) :] == -1).all()
    assert not torch.equal(*(batch["cells"] >= 0).all((2, 3)).sum(1))  # one has padding


def test_loaders_bound_batches_by_tokens():
    data = setup(procedural=(12, 2, 2), batch_size=5, max_batch_tokens=1500)
    sizes = [tuple(batch["ids"].shape) for batch in data.train_dataloader()]
    assert sum(count for count, _ in sizes) == 12
    assert max(count for count, _ in sizes) <= 5
    assert all(count == 1 or count * length <= 1.2 * 1500 for count, length in sizes)  # augmentation changes lengths
    assert (data.items("val").lengths == data.items("val").pool.tokens + 2).all()


# ---------------------------------------------------------------- points


def test_points_fill_the_box_and_lie_on_the_faces(pool):
    items = MeshItems(pool, replace(SPEC, points=3000), 0)
    for i in range(4):
        item = items.item(i, 0)
        place, normals = item.points[:, :3].astype(np.float64), item.points[:, 3:]
        low, high = place.min(0), place.max(0)
        assert np.abs(place).max() == pytest.approx(0.9995, abs=1e-6)
        assert (high - low).max() == pytest.approx(CONDITION_SCALE, abs=1e-6)
        np.testing.assert_allclose(low + high, 0, atol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-5)
        corners = item.corners * CONDITION_SCALE
        assert len(corners) == pool.face_counts[i]
        some = np.random.default_rng(0).choice(len(place), 60, replace=False)
        point, face = (x.ravel() for x in np.meshgrid(some, np.arange(len(corners)), indexing="ij"))
        distances = np.linalg.norm(trimesh.triangles.closest_point(corners[face], place[point]) - place[point], axis=1)
        agree = (trimesh.triangles.normals(corners)[0][face] * normals[point]).sum(1) > 1 - 1e-5
        assert ((distances < 1e-5) & agree).reshape(60, -1).any(1).all()  # it is on a face that has its normal


def test_noise_has_the_deviation_asked_for():
    square = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0.0]])
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    quiet = make_item(square, faces, AMT, 20_000, np.random.default_rng(0))
    assert np.abs(quiet.points[:, 2]).max() == 0
    assert (quiet.points[:, 3:] == [0, 0, 1]).all()
    noisy = make_item(square, faces, AMT, 20_000, np.random.default_rng(0), 0.02, 0.1)
    grown = CONDITION_SCALE / np.ptp(noisy.corners * CONDITION_SCALE, axis=(0, 1))[:2].max()  # noise widens the box
    assert 1.0 < grown < 1.1
    assert noisy.points[:, 2].std() * grown == pytest.approx(0.02, rel=0.03)
    assert np.abs(noisy.points[:, :3]).max() == pytest.approx(0.9995, abs=1e-6)
    normals = noisy.points[:, 3:]
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=1e-6)
    assert (normals[:, 0] / normals[:, 2]).std() == pytest.approx(0.1, rel=0.1)


def test_corners_are_those_that_the_tokens_write(pool):
    bins = AMT.bins
    for items in (MeshItems(pool, replace(SPEC, points=2000), 0), MeshItems(pool, SPEC, 0, MeshAugment(turn="any"))):
        for i in range(6):
            item = items.item(i, 0)
            written = AMT.triangles(item.ids[1:-1] - SPECIAL)
            written = {tuple(sorted(map(tuple, face))) for face in written.tolist()}
            cells = quantize(item.corners, bins)
            inside = np.abs(item.corners) <= 0.5
            assert np.abs(dequantize(cells, bins) - item.corners)[inside].max() <= 0.5 / bins + 1e-12
            assert (np.clip(dequantize(cells, bins), -0.5, 0.5) == dequantize(cells, bins)).all()
            kept = [f for f in cells.tolist() if len({tuple(c) for c in f}) == 3]
            assert {tuple(sorted(map(tuple, f))) for f in kept} == written
            assert len(item.cells) == len(written)


def test_a_mesh_that_vanishes_is_an_error():
    sliver = np.array([[0, 0, 0], [1, 0.3001, 0], [1, 0.3, 0]])
    with pytest.raises(DataError, match=r"a mesh must have at least one face, got none; leave it out"):
        make_item(sliver, np.array([[0, 1, 2]]), AMT, 100, np.random.default_rng(0))


# ---------------------------------------------------------------- augmentation


@pytest.mark.parametrize("turn", ["none", "right", "any"])
@pytest.mark.parametrize("mirror", [0.0, 0.5, 1.0])
def test_changes_keep_the_outside_outside(turn, mirror, pool):
    augment = MeshAugment(turn=turn, mirror=mirror)
    for i in range(12):
        vertices, faces = pool[i]
        volume = trimesh.Trimesh(vertices, faces, process=False).volume
        rng = np.random.default_rng(i)
        changed, turned = augment(vertices, faces, rng)
        again = trimesh.Trimesh(changed, turned, process=False)
        assert 0.75**3 <= again.volume / volume <= 1.25**3
        assert np.array_equal(np.sort(turned, 1), np.sort(faces, 1))
        item = make_item(changed, turned, AMT, 50, rng)
        assert trimesh.triangles.mass_properties(item.corners)["volume"] > 0


def test_axes_are_scaled_each_by_its_own_factor():
    cube = trimesh.creation.box((1, 1, 1))
    augment = MeshAugment(scale=(0.5, 2.0), turn="none", mirror=0)
    rng = np.random.default_rng(0)
    sides = np.array([np.ptp(augment(cube.vertices, cube.faces, rng)[0], axis=0) for _ in range(300)])
    assert 0.5 <= sides.min() < 0.55
    assert 1.95 < sides.max() <= 2.0
    assert np.abs(np.corrcoef(sides.T) - np.eye(3)).max() < 0.2


def test_turns_are_about_the_vertical_axis():
    corner = np.array([[0.3, 0.2, 0.1]])
    faces = np.array([[0, 0, 0]])

    def spots(turn, mirror=0.0):
        augment = MeshAugment(scale=(1, 1), turn=turn, mirror=mirror)
        rng = np.random.default_rng(0)
        return np.array([augment(corner, faces, rng)[0][0] for _ in range(200)])

    assert (spots("none") == corner).all()
    right = np.unique(np.round(spots("right"), 12), axis=0)
    assert right.tolist() == [[-0.3, 0.2, -0.1], [-0.1, 0.2, 0.3], [0.1, 0.2, -0.3], [0.3, 0.2, 0.1]]
    every = spots("any")
    np.testing.assert_allclose(np.hypot(every[:, 0], every[:, 2]), np.hypot(0.3, 0.1))
    assert (every[:, 1] == 0.2).all()
    angles = np.sort(np.arctan2(every[:, 2], every[:, 0]))
    assert np.diff(angles).max() < 0.3
    mirrored = spots("none", mirror=0.25)
    assert np.unique(mirrored, axis=0).tolist() == [[-0.3, 0.2, 0.1], [0.3, 0.2, 0.1]]
    assert (mirrored[:, 0] < 0).mean() == pytest.approx(0.25, abs=0.08)


def test_training_noise_is_drawn_up_to_its_most(pool):
    augment = replace(NO_CHANGE, noise=0.2)
    quiet, noisy = (MeshItems(pool.take([0] * 40), SPEC, 0, one) for one in (NO_CHANGE, augment))
    # Noise widens the box of the points, and so narrows the mesh.
    assert all(np.ptp(quiet.item(i, 0).corners, axis=(0, 1)).max() > 0.97 for i in range(40))
    widths = np.sort([np.ptp(noisy.item(i, 0).corners, axis=(0, 1)).max() for i in range(40)])
    assert widths[-1] > 0.9
    assert widths[0] < 0.7
    assert np.diff(widths).max() < 0.12


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, r"MeshData: give root, files or folders of meshes, or procedural, numbers of shapes\."),
        (
            {"val_fraction": 0.5, "test_fraction": 0.5},
            r"MeshData: val_fraction and test_fraction must be from 0 and below 1 together, got 0\.5 and 0\.5\.",
        ),
        ({"val_fraction": -0.1}, r"MeshData: val_fraction and test_fraction must be .*, got -0\.1 and 0\.1\."),
        ({"procedural": (1, 2)}, r"MeshData: procedural must be three numbers from 0 on, got \[1, 2\]\."),
        ({"procedural": (1, -1, 0)}, r"MeshData: procedural must be three numbers from 0 on, got \[1, -1, 0\]\."),
        ({"repeat": 0}, r"MeshData: repeat must be at least 1, got 0\."),
        ({"points": 0}, r"MeshData: points must be at least 1, got 0\."),
        ({"unknown_faces": 1.5}, r"MeshData: unknown_faces must be between 0 and 1, got 1\.5\."),
        ({"noise": -0.5}, r"MeshData: noise must be between 0 and 1, got -0\.5\."),
        ({"batch_size": 0}, r"data: batch_size must be at least 1, got 0\."),
        ({"max_batch_tokens": 0}, r"data: max_tokens must be at least 1, got 0\."),
        ({"bins": 2}, r"mesh: bins must be between 4 and 1,048,576, got 2; 128 is usual\."),
    ],
)
def test_settings_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigError, match=f"^{text}$"):
        MeshData(**({"procedural": (1, 1, 1), **options} if options else {}))


def test_unknown_tokenizers_are_named():
    with pytest.raises(UnknownNameError, match=r"unknown mesh tokenizer 'atm'.*Did you mean.*amt|amt"):
        MeshData(procedural=(1, 1, 1), tokenizer="atm")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"scale": (0.0, 1.0)}, r"augment: scale must be a range above 0, got 0\.0 \.\. 1\.0\."),
        ({"scale": (2.0, 1.0)}, r"augment: scale must be a range above 0, got 2\.0 \.\. 1\.0\."),
        ({"turn": "left"}, r"augment: turn must be none, right or any, got 'left'\."),
        ({"mirror": 1.5}, r"augment: mirror must be between 0 and 1, got 1\.5\."),
        ({"noise": -1}, r"augment: noise must be between 0 and 1, got -1\."),
        ({"normal_noise": 2}, r"augment: normal_noise must be between 0 and 1, got 2\."),
    ],
)
def test_changes_that_cannot_be_are_refused(options, text):
    with pytest.raises(ConfigError, match=f"^{text}$"):
        MeshAugment(**options)
