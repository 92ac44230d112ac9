import json
import struct
import warnings

import numpy as np
import pytest
import trimesh

from vertebra.domains.mesh import files
from vertebra.domains.mesh.files import (
    WRITE_ENDINGS,
    MeshFileError,
    MeshRules,
    find_shapes,
    fingerprint,
    read_mesh,
    read_shape,
    reason_left_out,
    write_mesh,
)
from vertebra.domains.mesh.geometry import quantized
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.mesh import canonical

TRIANGLE = "v 0 0 0\nv 1 0 0\nv 0 1 0\n"
PLY = "ply\nformat ascii 1.0\nelement vertex 3\nproperty float x\nproperty float y\nproperty float z\n"
PLY_FACE = "element face 1\nproperty list uchar int vertex_indices\nend_header\n0 0 0\n1 0 0\n0 1 0\n"


def box_bytes(kind):
    data = trimesh.creation.box().export(file_type=kind)
    return data.encode() if isinstance(data, str) else data


def put(folder, name, data):
    path = folder / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# --- reading meshes ---


@pytest.mark.parametrize("ending", [*WRITE_ENDINGS, ".PLY"])
def test_written_meshes_are_read_back(tmp_path, ending):
    mesh = trimesh.creation.icosphere(2)
    mesh.apply_scale([1, 2, 3]).apply_translation([10, 0, -7])
    write_mesh(mesh, tmp_path / f"ball{ending}")
    shape = read_shape(tmp_path / f"ball{ending}")
    assert shape.points is shape.normals is None
    assert shape.notes == ()
    assert len(shape.mesh.vertices) == 162
    assert shape.mesh.is_watertight
    assert shape.mesh.volume == pytest.approx(mesh.volume, rel=1e-5)
    assert shape.mesh.triangles == pytest.approx(mesh.triangles, abs=2e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"ball{ending}"]  # no parts left


def test_scenes_are_placed_and_mirrors_turned(tmp_path):
    scene = trimesh.Scene()
    scene.add_geometry(trimesh.creation.box(), "a", geom_name="box")
    moved = trimesh.transformations.translation_matrix([5, 0, 0])
    scene.graph.update("b", matrix=moved, geometry="box")
    scene.graph.update("c", matrix=np.diag([-1, 2, 1, 1.0]) @ moved, geometry="box")
    path = put(tmp_path, "scene.glb", scene.export(file_type="glb"))
    mesh = read_mesh(path)
    assert mesh.bounds.tolist() == [[-5.5, -1, -0.5], [5.5, 1, 0.5]]
    assert len(mesh.faces) == 36
    assert sorted(part.volume for part in mesh.split()) == pytest.approx([1, 1, 2])


def test_gltf_with_its_buffers_beside(tmp_path):
    for name, data in trimesh.Scene(trimesh.creation.box()).export(file_type="gltf").items():
        put(tmp_path, name, data)
    path = tmp_path / "model.gltf"
    assert read_mesh(path).volume == pytest.approx(1)
    for buffer in tmp_path.glob("*.bin"):
        buffer.unlink()
    with pytest.raises(MeshFileError, match=r"model.gltf: .*; (put it beside|copy or export it again)\.$"):
        read_shape(path)


def test_polygons_relative_indices_textures_and_comments(tmp_path):
    text = "# Gr\xf6\xdfe\nmtllib none.mtl\nv 0 0 0\nv 1 0 0\nv 1 1 0\nv 0 1 0\n"
    text += "vt 0 0\nvn 0 0 1\nf 1/1/1 2/1/1 3/1/1 4/1/1\n"
    assert read_mesh(put(tmp_path, "quad.obj", text.encode("latin-1"))).area == pytest.approx(1)
    assert len(read_mesh(put(tmp_path, "back.obj", TRIANGLE + "f -3 -2 -1\n")).faces) == 1


def test_degenerate_faces_are_noted(tmp_path):
    path = put(tmp_path, "a.obj", TRIANGLE + "v 0 0 0\nf 1 2 3\nf 1 4 2\n")
    shape = read_shape(path)
    assert len(shape.mesh.faces) == 1
    assert shape.notes == ("1 of 2 faces with two corners at the same place left out",)


def test_lines_and_loose_points_of_a_scene_are_noted(tmp_path):
    scene = trimesh.Scene([trimesh.creation.box(), trimesh.PointCloud(np.eye(3))])
    shape = read_shape(put(tmp_path, "mixed.glb", scene.export(file_type="glb")))
    assert len(shape.mesh.faces) == 12
    assert shape.notes == ("1 part without faces left out",)


# --- reading point clouds ---


@pytest.fixture
def cloud():
    rng = np.random.default_rng(0)
    normals = rng.normal(size=(20, 3))
    return rng.normal(size=(20, 3)).astype(np.float32), normals / np.linalg.norm(normals, axis=1, keepdims=True)


def test_clouds_of_arrays(tmp_path, cloud):
    points, normals = cloud
    np.save(tmp_path / "a.npy", points)
    np.save(tmp_path / "b.npy", np.concatenate([points, 3 * normals], 1).astype(np.float16))
    np.savez(tmp_path / "c.npz", points=points, normals=normals)
    np.savez(tmp_path / "d.npz", points)
    for name in "a.npy", "b.npy", "c.npz", "d.npz":
        shape = read_shape(tmp_path / name)
        assert shape.mesh is None
        assert shape.points == pytest.approx(points, abs=2e-3)
        assert shape.points.dtype == np.float64
        if name[0] in "bc":
            assert shape.normals == pytest.approx(normals, abs=2e-3)
            assert np.linalg.norm(shape.normals, axis=1) == pytest.approx(np.ones(20))
        else:
            assert shape.normals is None


@pytest.mark.parametrize("form", ["ascii", "binary_little_endian", "binary_big_endian"])
@pytest.mark.parametrize("faces", ["", "element face 0\nproperty list uchar int vertex_indices\n"])
def test_clouds_of_ply(tmp_path, cloud, form, faces):
    rows = np.concatenate(cloud, 1)
    header = f"ply\nformat {form} 1.0\nelement vertex 20\n"
    header += "".join(f"property float {name}\n" for name in ("x", "y", "z", "nx", "ny", "nz")) + faces + "end_header\n"
    if form == "ascii":
        body = "\n".join(" ".join(map(repr, row)) for row in rows.tolist()).encode() + b"\n"
    else:
        body = rows.astype(">f4" if "big" in form else "<f4").tobytes()
    shape = read_shape(put(tmp_path, "a.ply", header.encode() + body))
    assert shape.points == pytest.approx(rows[:, :3], abs=1e-6)
    assert shape.normals == pytest.approx(rows[:, 3:], abs=1e-6)


def test_bad_normals_are_left_out_with_a_note(tmp_path, cloud):
    points, normals = cloud
    normals[3], normals[4] = 0, np.nan
    np.savez(tmp_path / "a.npz", points=points, normals=normals)
    shape = read_shape(tmp_path / "a.npz")
    assert shape.normals is None
    assert shape.notes == ("normals left out, because 2 of 20 are zero or not finite",)


def test_a_cloud_is_no_mesh(tmp_path, cloud):
    np.save(tmp_path / "a.npy", cloud[0])
    with pytest.raises(MeshFileError, match="a point cloud, where a mesh is needed; choose a file that has faces"):
        read_mesh(tmp_path / "a.npy")


# --- bad files ---

DAMAGED = "it is damaged, cut short, or of another kind; copy or export it again."
BAD = {
    **{f"empty{e}": (b"", "the file is empty; copy or export it again.") for e in (".obj", ".glb", ".npy", ".npz")},
    "blank.off": (b" \n\n", "the file is empty; copy or export it again."),
    "cut.glb": (box_bytes("glb")[:400], DAMAGED),
    "end.glb": (box_bytes("glb")[:-4], DAMAGED),
    "text.glb": (box_bytes("obj"), DAMAGED),
    "cut.ply": (box_bytes("ply")[:-9], DAMAGED),
    "head.ply": (box_bytes("ply")[:90], DAMAGED),
    "cut.stl": (box_bytes("stl")[:-9], "copy or export it again."),
    "cut.off": (box_bytes("off")[:-20], "ends after 9 of 12 faces; copy or export it again."),
    "rows.ply": (PLY + "end_header\n0 0 0\n1 1 1\n", "ends after 2 of 3 rows of the element 'vertex'; copy or"),
    "words.ply": (PLY + "end_header\n0 0 0\n1 x 1\n1 1 1\n", DAMAGED),
    "bomb.ply": (PLY.replace("vertex 3", "vertex 1000000000000").replace("ascii", "binary_little_endian"), DAMAGED),
    "nan.obj": (
        TRIANGLE.replace("1 0 0", "1 nan 0") + "f 1 2 3\n",
        "1 of 3 vertex positions are NaN, infinite or beyond 1e+30, the first [1.0, nan, 0.0]; leave them out.",
    ),
    "far.obj": (TRIANGLE.replace("1 0 0", "1 0 1e35") + "f 1 2 3\n", "the first [1.0, 0.0, 1e+35]; leave them out."),
    "none.obj": (TRIANGLE, "holds 3 vertices and no faces; save it as .ply or .npy if it is a point cloud."),
    "words.obj": ("no mesh at all\n", "holds no faces; export it again, with the mesh selected."),
    "thin.obj": (TRIANGLE + "f 1 1 2\n", "all of its 1 faces have two corners at the same place; copy"),
    "index.obj": (TRIANGLE + "f 1 2 9\n", DAMAGED),
    "zero.obj": (TRIANGLE + "f 1 2/1 0/2\n", "a face names vertex 0, and OBJ counts from 1; export it again."),
    "index.ply": (PLY + PLY_FACE + "3 0 1 7\n", "a face names vertex 7 (from 0), and there are 3; copy or export"),
    "minus.ply": (PLY + PLY_FACE + "3 0 1 -1\n", "a face names vertex -1 (from 0), and there are 3; copy or export"),
    "index.off": ("OFF\n3 1 0\n0 0 0\n1 0 0\n0 1 0\n3 0 1 7\n", DAMAGED),
    "binary.obj": (box_bytes("glb"), "holds binary data, and .obj is a text format; correct its ending."),
    "solid.stl": (
        "solid x\nfacet normal 0 0 1\nouter loop\nvertex 0 0 0\n",
        "has no line 'endsolid'; it is cut short or damaged; copy",
    ),
    "lines.stl": (trimesh.creation.box().export(file_type="stl_ascii")[:900], "has no line 'endsolid'; it is cut"),
    "text.npy": ("1 2 3\n4 5 6\n", "is no NumPy array of numbers, or is damaged; write it with numpy.save or numpy"),
    "shape.png": (b"\x89PNG", "'.png' is not a kind of file that is read; convert it to one of .glb, .gltf, .npy,"),
    "shape": (b"x", "'no ending' is not a kind of file that is read; convert it"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(tmp_path, name):
    data, text = BAD[name]
    path = put(tmp_path, name, data)
    with pytest.raises(MeshFileError) as error:
        read_shape(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert text in message
    assert message.endswith(".")
    assert len(message) - len(str(path)) < 250


ARRAYS = {
    "objects": (np.array([[{}, 1, 2]]), "is no NumPy array of numbers, or is damaged"),
    "letters": (np.array([["a", "b", "c"]]), "points must be numbers, got <U1; write them as float32."),
    "complex": (np.ones((4, 3), dtype=complex), "points must be numbers, got complex128"),
    "flat": (np.ones(12), "points must be (N, 3), or (N, 6) with normals, got (12,); reshape or transpose the array."),
    "wide": (np.ones((3, 40)), "points must be (N, 3), or (N, 6) with normals, got (3, 40)"),
    "none": (np.ones((0, 3)), "holds no points; copy or export it again."),
    "nan": (np.array([[0, 0, 0], [0, 1, np.nan]]), "1 of 2 point positions are NaN, infinite or beyond"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_bad_arrays(tmp_path, name):
    array, text = ARRAYS[name]
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(MeshFileError) as error:
        read_shape(tmp_path / "a.npy")
    assert text in str(error.value)


def test_bad_npz(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.eye(3), y=np.eye(3))
    with pytest.raises(MeshFileError, match="holds the arrays x, y; name the positions 'points', and normals 'norm"):
        read_shape(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", points=np.eye(3), normals=np.ones((2, 3)))
    with pytest.raises(
        MeshFileError, match=r"normals must be \(3, 3\) as the points are, got \(2, 3\); leave them out"
    ):
        read_shape(tmp_path / "b.npz")
    put(tmp_path, "c.npz", (tmp_path / "a.npz").read_bytes()[:200])
    with pytest.raises(MeshFileError, match="is no NumPy array of numbers, or is damaged"):
        read_shape(tmp_path / "c.npz")


def test_a_cut_array(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((100, 3)))
    path = put(tmp_path, "b.npy", (tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(MeshFileError, match="is no NumPy array of numbers, or is damaged"):
        read_shape(path)


@pytest.mark.parametrize("extension", ["KHR_draco_mesh_compression", "EXT_meshopt_compression"])
def test_compressed_scenes(tmp_path, extension):
    document = json.dumps({"asset": {"version": "2.0"}, "extensionsRequired": [extension]}).encode()
    document += b" " * (-len(document) % 4)
    data = struct.pack("<4sIIII", b"glTF", 2, 20 + len(document), len(document), 0x4E4F534A) + document
    with pytest.raises(MeshFileError, match=f"compressed by {extension}; export it without compression"):
        read_shape(put(tmp_path, "a.glb", data))


def test_huge_files_are_refused_unread(tmp_path):
    path = tmp_path / "a.stl"
    with path.open("wb") as stream:
        stream.truncate(3 << 30)  # sparse
    with pytest.raises(MeshFileError, match=r"3\.0 GiB, where at most 1 are read; decimate it first"):
        read_shape(path)


def test_too_many_faces(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_FACES", 11)
    with pytest.raises(MeshFileError, match="12 faces, where at most 11 are read; decimate it first"):
        read_shape(put(tmp_path, "a.glb", box_bytes("glb")))


def test_no_warning_and_no_open_file_is_left(tmp_path, recwarn, capsys):
    warnings.simplefilter("always")
    for name, (data, _) in BAD.items():
        with pytest.raises(MeshFileError):
            read_shape(put(tmp_path, name, data))
    assert [str(w.message) for w in recwarn] == []
    assert capsys.readouterr() == ("", "")


# --- finding ---


def test_find_shapes(tmp_path):
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "textures").mkdir()
    names = ["b/2.OBJ", "b/1.glb", "b/c/x.npy", "b/skin.png", "b/x.mtl", "a.ply", "odd.xyz"]
    for name in names:
        put(tmp_path, name, "x")
    found = find_shapes([tmp_path, tmp_path / "a.ply", tmp_path / "odd.xyz"])
    assert [str(p.relative_to(tmp_path)) for p in found] == ["a.ply", "b/1.glb", "b/2.OBJ", "b/c/x.npy", "odd.xyz"]
    with pytest.raises(DataError, match=r"textures: no mesh or point cloud is in this folder; choose one with \.glb"):
        find_shapes([tmp_path / "textures"])
    with pytest.raises(DataError, match=r"gone: there is no such file or folder; correct the path\."):
        find_shapes([tmp_path / "gone"])
    with pytest.raises(MeshFileError, match=r"gone\.obj: there is no such file; correct the path\."):
        read_shape(tmp_path / "gone.obj")


# --- writing ---


def test_write_refuses(tmp_path):
    box = trimesh.creation.box()
    with pytest.raises(ConfigError, match=r"the ending must be one of \.obj, .*, got '?\.fbx"):
        write_mesh(box, tmp_path / "a.fbx")
    with pytest.raises(DataError, match="the mesh has no faces; there is nothing to write"):
        write_mesh(trimesh.Trimesh(), tmp_path / "a.obj")
    with pytest.raises(DataError, match=r"a\.obj: cannot be written \(No such file or directory\); choose another"):
        write_mesh(box, tmp_path / "gone" / "a.obj")


def test_written_bytes_are_the_same_again(tmp_path):
    for ending in WRITE_ENDINGS:
        write_mesh(trimesh.creation.box(), tmp_path / f"a{ending}")
        write_mesh(trimesh.creation.box(), tmp_path / f"b{ending}")
        assert (tmp_path / f"a{ending}").read_bytes() == (tmp_path / f"b{ending}").read_bytes()


# --- choosing ---


def reason(mesh, bins=128, **rules):
    return reason_left_out(mesh, quantized(mesh, bins)[0], MeshRules(**rules))


def test_good_meshes_have_no_reason():
    assert reason(trimesh.creation.icosphere(2)) is None
    plane = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [1, 0, 1], [0, 0, 1]], [[0, 1, 2], [0, 2, 3]])
    assert reason(plane) is None


def test_reasons():
    ball, box = trimesh.creation.icosphere(2), trimesh.creation.box()
    assert reason(ball, max_faces=100) == "320 faces on the grid are more than max_faces 100"
    assert reason(box, min_faces=20) == "12 faces on the grid are fewer than min_faces 20"
    rod = trimesh.creation.box((100, 2, 1))
    assert reason(rod) == "its longest side is 50 times the second longest, above max_aspect 32"
    assert reason(rod, max_aspect=51) is None
    specks = [trimesh.creation.box((0.001,) * 3).apply_translation([x / 99, 0.001, 0.001]) for x in range(-20, 20)]
    crumbs = trimesh.util.concatenate([box, *specks])
    left = len(quantized(crumbs, 16)[0].faces)
    assert left < 0.2 * 492
    assert reason(crumbs, 16) == f"{left} of 492 faces are left on the grid, a share below min_kept 0.2"
    sliver = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0.5, 1e-4, 0]], [[0, 1, 2]])
    crumb = trimesh.Trimesh([[0, 0, 0], [1e-3, 1e-3, 0], [1, 1, 0]], [[0, 1, 2]])
    assert reason(crumb) == "none of its 1 faces is left on the grid"
    assert reason(sliver) == "its longest side is 10000 times the second longest, above max_aspect 32"
    assert reason(box, vertex_ratio=(0.4, 0.6)) == "0.67 vertices a face lie outside vertex_ratio 0.4 to 0.6"
    assert reason(ball, vertex_ratio=(0.4, 0.6)) is None


def test_rules_are_checked():
    with pytest.raises(ConfigError, match="1 <= min_faces <= max_faces must hold, got 9 and 3"):
        MeshRules(min_faces=9, max_faces=3)
    with pytest.raises(
        ConfigError, match=r"max_aspect must be at least 1 and min_kept between 0 and 1, got 0\.5 and 2"
    ):
        MeshRules(max_aspect=0.5, min_kept=2)


def test_fingerprints_tell_duplicates():
    rng = np.random.default_rng(0)
    vertices, faces = rng.integers(0, 9, (20, 3)), rng.integers(0, 20, (30, 3))
    first = fingerprint(canonical(vertices, faces))
    order = rng.permutation(20)
    shuffled = canonical(vertices[order], np.argsort(order)[faces][rng.permutation(30)][:, ::-1])
    assert fingerprint(shuffled) == first
    assert fingerprint(canonical(vertices, faces[:-1])) != first
    assert fingerprint(canonical(vertices + np.array([1, 0, 0]), faces)) != first


# --- real files ---


@pytest.mark.realdata
def test_real_meshes(shared_data):
    shapes = {p.stem: read_shape(p) for p in find_shapes([shared_data / "mesh"])}
    assert len(shapes) == 16
    counts = {name: len(shape.mesh.faces) for name, shape in shapes.items()}
    assert counts["pavement"] == 20
    assert counts["building-small-c"] == 834
    assert counts["suzanne"] == 968
    assert counts["stanford-bunny"] == 69451
    assert len(shapes["spot"].mesh.vertices) == 2930
    reasons = {n: reason(s.mesh, max_faces=834) for n, s in shapes.items() if counts[n] < 900}
    assert set(reasons.values()) == {None}
    assert len(reasons) == 10
