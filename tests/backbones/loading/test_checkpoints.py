"""Checkpoints from elsewhere: what is found in a file, a folder or a zip, and what is refused."""

import argparse
import gc
import json
import os
import pickle
import struct
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from vertebra.backbones.loading.archives import unpack
from vertebra.backbones.loading.checkpoints import open_checkpoint, read_weights
from vertebra.backbones.loading.files import read_json, read_safetensors_header
from vertebra.errors import LoadError, VertebraError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.int8)}


class Evil:
    """Makes a file when somebody unpickles it."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def same(found):
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[k], v) for k, v in TENSORS.items())


def safetensors(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


# ---------------------------------------------------------------- what is read


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.bin", "wrapped.ckpt", "named.pth"])
def test_a_file_is_what_its_bytes_say(tmp_path, name):
    path = tmp_path / name
    if name in ("w.safetensors", "named.pth"):
        save_file(TENSORS, path)
    elif name == "wrapped.ckpt":
        torch.save({"epoch": 1, "args": argparse.Namespace(lr=1.0), "model": {"state_dict": TENSORS}}, path)
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "legacy.bin")
    same(open_checkpoint(path).tensors)
    same(open_checkpoint(f"local-dir:{tmp_path}").tensors)


def test_shards_and_what_stands_beside(tmp_path):
    index = {"weight_map": {}}
    for number, (key, value) in enumerate(TENSORS.items()):
        save_file({key: value}, tmp_path / f"part-{number}.safetensors")
        index["weight_map"][key] = f"part-{number}.safetensors"
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text('{"limit": Infinity, "a": [1]}')
    checkpoint = open_checkpoint(tmp_path)
    same(checkpoint.tensors)
    assert checkpoint.config == {"limit": float("inf"), "a": [1]}
    assert checkpoint.file("none", "config.json") == tmp_path / "config.json"
    assert checkpoint.file("none") is None
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(LoadError, match=r"the shard part-1\.safetensors is missing; get it again"):
        _ = open_checkpoint(tmp_path).tensors


def test_no_weights_or_several(tmp_path):
    with pytest.raises(LoadError, match="no such file or folder; give a file of weights, a folder with one, or hf-hub"):
        open_checkpoint(tmp_path / "none")
    with pytest.raises(LoadError, match="no such file or folder"):
        open_checkpoint("MA" * 5000)
    with pytest.raises(LoadError, match="must hold one file of weights, got none"):
        _ = open_checkpoint(tmp_path).tensors
    for name in ("a.pth", "b.pth"):
        torch.save(TENSORS, tmp_path / name)
    with pytest.raises(LoadError, match=r"got a\.pth, b\.pth; name the file itself"):
        _ = open_checkpoint(tmp_path).tensors


# ---------------------------------------------------------------- zips


@pytest.mark.parametrize("top", ["", "inner/"])
def test_a_zip_is_unpacked_for_as_long_as_it_is_used(tmp_path, top):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with zipfile.ZipFile(tmp_path / "m.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(tmp_path / "model.safetensors", f"{top}model.safetensors")
        archive.writestr(f"{top}config.json", "{}")
    checkpoint = open_checkpoint(tmp_path / "m.zip")
    same(checkpoint.tensors)
    folder = checkpoint.folder
    assert checkpoint.file("config.json").parent == folder
    del checkpoint
    gc.collect()
    assert not folder.exists()


def zipped(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.external_attr, info.compress_type = mode << 16, zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return path


@pytest.mark.parametrize("name", ["/tmp/x", "../x", "a/../../x", "c:\\x", "a\\..\\x", "."])
def test_a_member_outside_of_the_folder_is_refused(tmp_path, name):
    path = zipped(tmp_path / "m.zip", ("model.pth", b"x", 0), (name, b"x", 0))
    with pytest.raises(LoadError, match="would be written outside of the archive's folder"):
        open_checkpoint(path)
    assert [p.name for p in tmp_path.iterdir()] == ["m.zip"]


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o010644])
def test_links_and_devices_are_refused(tmp_path, mode):
    path = zipped(tmp_path / "m.zip", ("model.pth", b"/etc/passwd", mode))
    with pytest.raises(LoadError, match=r"'model\.pth' is a link or a device; an archive may hold files and folders"):
        open_checkpoint(path)


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = zipped(tmp_path / "m.zip", *((f"{i}.bin", bytes(1 << 24), 0) for i in range(5)))
    monkeypatch.setattr("vertebra.backbones.loading.archives._write", None)
    with pytest.raises(LoadError, match=r"would unpack from [\d,]+ to 83,886,080 bytes; at most 100 times as much"):
        open_checkpoint(path)
    monkeypatch.setattr("vertebra.backbones.loading.archives.MOST_MEMBERS", 4)
    with pytest.raises(LoadError, match="5 members, at most 4 are unpacked"):
        open_checkpoint(path)


def test_a_member_that_lies_about_its_size(tmp_path):
    path = zipped(tmp_path / "m.zip", ("a.bin", bytes(1 << 20), 0))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02") + 24  # the size in the directory
    data[at : at + 4] = struct.pack("<I", 10)
    path.write_bytes(data)
    with pytest.raises(LoadError, match="cannot be unpacked"):
        open_checkpoint(path)


def test_members_twice_passwords_and_damage(tmp_path, monkeypatch):
    path = tmp_path / "m.zip"
    with pytest.warns(UserWarning, match="Duplicate name"):
        zipped(path, ("a.pth", b"1", 0), ("a.pth", b"2", 0))
    with pytest.raises(LoadError, match=r"'a\.pth' stands twice"):
        open_checkpoint(path)
    zipped(path, ("a.pth", b"1" * 100, 0))
    data = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        data[data.index(signature) + flags] |= 1
    path.write_bytes(data)
    with pytest.raises(LoadError, match=r"cannot be unpacked .*(password|encrypted)"):
        open_checkpoint(path)
    path.write_bytes(data[:-10])
    with pytest.raises(LoadError, match="a damaged zip archive"):
        open_checkpoint(path)


def test_a_checkpoint_of_torch_that_unpacks_to_more_than_it_is(tmp_path):
    torch.save({"w": torch.zeros(1 << 20)}, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as source:
        members = {info.filename: source.read(info) for info in source.infolist()}
    bomb = tmp_path / "bomb.pth"
    zipped(bomb, *((name, content, 0) for name, content in members.items()))
    assert bomb.stat().st_size < 20_000
    with pytest.raises(LoadError, match="a checkpoint of torch holds its tensors as they are, these are compressed"):
        read_weights(bomb)


# ---------------------------------------------------------------- pickles


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.ckpt", "model.safetensors"])
@pytest.mark.parametrize("new", [True, False])
def test_a_pickle_that_needs_code_is_refused_with_the_way_out(tmp_path, name, new):
    path, canary = tmp_path / name, tmp_path / "ran"
    torch.save({"model": TENSORS, "extra": Evil(canary)}, path, _use_new_zipfile_serialization=new)
    with pytest.raises(LoadError) as told:
        read_weights(path)
    if name == "model.safetensors":
        assert "not a safetensors file" in str(told.value)
    else:
        assert "GLOBAL posix.system" in str(told.value)
        assert "save its state dict alone, best as safetensors" in str(told.value)
        assert "weights_only" not in str(told.value)  # torch's own advice is to be careless
    path.write_bytes(pickle.dumps(Evil(canary)))
    with pytest.raises(LoadError):
        read_weights(path)
    assert not canary.exists()


def test_a_good_pickle_that_is_called_safetensors_is_refused_too(tmp_path):
    torch.save(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match=r"model\.safetensors: not a safetensors file"):
        read_weights(tmp_path / "model.safetensors")


def test_tensors_that_claim_more_than_the_file_has(tmp_path):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.ones(1).expand(10**9)}, path)
    with pytest.raises(LoadError, match=r"'w' claims more values than are stored; save it with \.contiguous\(\)"):
        read_weights(path)
    torch.save({"w": torch.ones(3).to_sparse()}, path)
    with pytest.raises(LoadError, match="'w' is no plain tensor"):
        read_weights(path)
    torch.save({"w": torch.ones(3), "tied": torch.ones(9)[:3]}, path)
    assert list(read_weights(path)) == ["w", "tied"]


BYTEARRAY = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R."  # of ten thousand million bytes
AGAIN = b"".join(b"q%ch%c\x86" % (i, i) for i in range(45))  # a pair of the last pair, 45 times
KEY = b"\x80\x02}K\x01\x85" + AGAIN + b"K\x01s."


@pytest.mark.parametrize("new", [True, False])
@pytest.mark.parametrize(("pickled", "match"), [(BYTEARRAY, "asks for memory by a number"), (KEY, "again and again")])
def test_pickles_that_take_all_memory_or_all_time(tmp_path, new, pickled, match):
    path = tmp_path / "w.pth"
    torch.save(TENSORS, path, _use_new_zipfile_serialization=new)
    if new:
        with zipfile.ZipFile(path) as source:
            members = {info.filename: source.read(info) for info in source.infolist()}
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, pickled if name.endswith("data.pkl") else content)
    else:
        head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({}, 2)
        path.write_bytes(head + pickled + pickle.dumps([], 2))
    with pytest.raises(LoadError, match=match):
        read_weights(path)


@pytest.mark.parametrize("content", [b"", b"hello world, this is text", bytes(64), b"PK\x03\x04cut", b"\x80\x02bad."])
def test_other_bytes_are_refused(tmp_path, content):
    path = tmp_path / "w.pth"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=r"w\.pth: (empty|cut short|a damaged zip|cannot be read without run)"):
        _ = open_checkpoint(path).tensors


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "legacy.bin", "m.zip"])
def test_files_cut_anywhere_are_refused(tmp_path, name):
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(TENSORS, path)
    elif name == "m.zip":
        torch.save(TENSORS, tmp_path / "w.pth")
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(tmp_path / "w.pth", "w.pth")
    else:
        torch.save(TENSORS, path, _use_new_zipfile_serialization=name != "legacy.bin")
    whole = path.read_bytes()
    for part in (0.0, 0.02, 0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(LoadError):
            _ = open_checkpoint(path).tensors


# ---------------------------------------------------------------- headers of safetensors files

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not a safetensors file, or cut short"),
        (b"\0" * 8, "not a safetensors file, or cut short"),
        (safetensors({}, length=0), "or cut short"),
        (safetensors({"a": F32}, bytes(4), length=1 << 63), "or cut short"),
        (safetensors({"a": F32}, bytes(4), length=(1 << 64) - 1), "or cut short"),
        (safetensors({"a": F32}, bytes(3)), "5[0-9] bytes are announced|it was cut short"),
        (safetensors({"a": F32}, bytes(5)), "1 bytes follow its last tensor"),
        (safetensors(b'{"a": "\xff\xfe"}'), "not readable as JSON"),
        (safetensors(b"[" * 100_000), "does not begin with a brace"),
        (safetensors(b'{"a":' * 100_000 + b"}" * 100_000), "nested too deeply"),
        (safetensors(b'{"a": {}, "a": {}}'), "the key 'a' stands twice"),
        (safetensors({"a": []}), "'a' is described otherwise than by dtype, shape and data_offsets"),
        (safetensors({"a": {**F32, "x": 1}}, bytes(4)), "is described otherwise"),
        (safetensors({"a": {**F32, "dtype": "F99"}}, bytes(4)), "'a' has the unknown type 'F99'"),
        (safetensors({"a": {**F32, "dtype": ["F32"]}}, bytes(4)), "unknown type"),
        (safetensors({"a": {**F32, "dtype": "F64"}}, bytes(4)), "does not fill its place"),
        (safetensors({"a": {**F32, "shape": [2]}}, bytes(4)), "does not fill its place"),
        (safetensors({"a": {**F32, "shape": [-1]}}, bytes(4)), "has no shape or place that can be"),
        (safetensors({"a": {**F32, "shape": [1.0]}}, bytes(4)), "has no shape or place that can be"),
        (safetensors({"a": {**F32, "shape": [True]}}, bytes(4)), "has no shape or place that can be"),
        (safetensors({"a": {**F32, "shape": [1 << 62, 1 << 62]}}, bytes(4)), "does not fill its place"),
        (safetensors({"a": {**F32, "shape": [1] * 100}}, bytes(4)), "has no shape or place that can be"),
        (safetensors({"a": {**F32, "data_offsets": [4, 0]}}, bytes(4)), "does not fill its place"),
        (safetensors({"a": {**F32, "data_offsets": [0]}}, bytes(4)), "has no shape or place that can be"),
        (safetensors({"a": {**F32, "data_offsets": [4, 8]}}, bytes(8)), "byte 0 belongs to none"),
        (safetensors({"a": F32, "b": F32}, bytes(4)), "belongs to two tensors"),
        (safetensors({"a": {**F32, "data_offsets": [0, 1e400]}}, bytes(4)), "not readable as JSON"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, content, match):
    path = tmp_path / "w.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=match):
        read_safetensors_header(path)
    with pytest.raises(LoadError, match=match):
        read_weights(path)


def test_a_folder_called_as_a_file_of_weights(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(LoadError, match=r"model\.safetensors: must be a file, is a folder"):
        read_safetensors_header(tmp_path / "model.safetensors")
    with pytest.raises(LoadError, match="must hold one file of weights, got none"):
        _ = open_checkpoint(tmp_path).tensors


@settings(max_examples=25, derandomize=True, deadline=None, database=None)
@given(st.dictionaries(st.text(max_size=5), st.lists(st.integers(0, 4), max_size=3), max_size=4))
def test_what_the_library_writes_is_read_and_header_and_tensors_agree(tmp_path_factory, shapes):
    shapes.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("st") / "w.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, path)
    assert {name: entry["shape"] for name, entry in read_safetensors_header(path).items()} == shapes
    assert {name: list(value.shape) for name, value in read_weights(path).items()} == shapes


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_a_damaged_safetensors_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("st") / "w.safetensors"
    save_file(TENSORS, path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        found = read_weights(path)
    except VertebraError:
        return
    assert sum(v.nbytes for v in found.values()) == sum(v.nbytes for v in TENSORS.values())


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.lists(st.tuples(st.text("ab./\\:~", min_size=1, max_size=6), st.binary(max_size=9)), max_size=4))
def test_a_zip_writes_into_its_folder_or_nowhere(tmp_path_factory, members):
    outer = tmp_path_factory.mktemp("zip")
    path, folder = outer / "m.zip", outer / "deep" / "folder"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in dict(members).items():
            archive.writestr(name, content)
    try:
        unpack(path, folder)
    except LoadError:
        pass
    else:
        assert sum(p.is_file() for p in folder.rglob("*")) <= len(members)
    assert [p for p in outer.rglob("*") if p.is_file() and folder not in p.parents] == [path]


# ---------------------------------------------------------------- links, indexes, JSON


def test_links_that_leave_the_folder_are_refused(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    (folder / "config.json").symlink_to("../secret.json")
    checkpoint = open_checkpoint(folder)
    for read in (lambda: checkpoint.tensors, lambda: checkpoint.config, lambda: checkpoint.file("config.json")):
        with pytest.raises(LoadError, match=r"a link that leads out of its folder, to .*; copy the file there if you"):
            read()
    (folder / "model.safetensors").unlink()
    (folder / "own.safetensors").write_bytes((tmp_path / "outside.safetensors").read_bytes())
    (folder / "model.safetensors").symlink_to("own.safetensors")
    same(open_checkpoint(folder).tensors)
    link = tmp_path / "link"
    link.symlink_to(folder)
    same(open_checkpoint(link).tensors)
    same(open_checkpoint(link / "model.safetensors").tensors)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "a\\b", "", ".", "..", 3, None, ["x"], "a\0b", "MA" * 500]
)
def test_an_index_that_names_paths_is_refused(tmp_path, name):
    folder = tmp_path / "model"
    folder.mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(LoadError, match="a shard must be a file beside the index, got"):
        _ = open_checkpoint(folder).tensors


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": 3}', "\x00"]
)
def test_an_index_that_is_none(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    with pytest.raises(LoadError, match=r"not an index of shards|not readable as JSON|must hold a JSON object"):
        _ = open_checkpoint(tmp_path).tensors


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[1]", "must hold a JSON object, got a list"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a": NaN}', "NaN is no number of JSON"),
        (b'{"a": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"a": 1e999}', "1e999 is too large"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "not readable as JSON"),
        (b'{"a": 1, "a": 2}', "the key 'a' stands twice"),
    ],
)
def test_hostile_json_is_refused(tmp_path, content, match):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(LoadError, match=match):
        read_json(path)


def test_a_long_json_file_is_not_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(LoadError, match=r"too long for a JSON file of a model \(1,073,741,824 bytes\)"):
        read_json(path)
