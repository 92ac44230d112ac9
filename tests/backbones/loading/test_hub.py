"""Models from the hub: one that behaves, and one that does all the things a hub can do wrong."""

import hashlib
import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import zipfile
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

from vertebra.backbones.base import create_backbone, resolve
from vertebra.backbones.loading.checkpoints import open_checkpoint
from vertebra.backbones.loading.pretrained import load_state, model_folder, read_config, read_tensors, save_tensors
from vertebra.cli import main
from vertebra.errors import LoadError

COMMIT = "a1" * 20


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub's protocol as listing and downloading need; ``hub`` is the test's to set up."""

    protocol_version = "HTTP/1.1"
    hub = None

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        hub, path = self.hub, self.path.partition("?")[0]
        hub.log.append((self.command, path, self.headers.get("Range"), self.headers.get("Authorization")))
        parts = path.strip("/").split("/")
        listing = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if listing else parts[:2])
        if hub.status and (not listing or hub.status >= 500):
            code = {"GatedRepo": {"X-Error-Code": "GatedRepo"}}.get(hub.error, {})
            return self.reply(hub.status, code)
        if name != "org/tiny":
            return self.reply(401 if listing else 404, {"X-Error-Code": "RepoNotFound"})
        revision = parts[5] if listing and len(parts) > 5 else "main" if listing else parts[3]
        if revision not in hub.revisions:
            return self.reply(404, {"X-Error-Code": "RevisionNotFound"})
        if listing:
            if hub.slow_listing:
                time.sleep(hub.slow_listing)
            return self.reply(200, {"Content-Type": "application/json"}, self.listing())
        file = "/".join(parts[4:])
        if file not in hub.files:
            return self.reply(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = hub.files[file]
        large = file.endswith(hub.large)
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hub.digest(file)}"', "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{hub.digest(file)}"', "X-Linked-Size": str(len(content))}
        if not body:
            return self.reply(200, {**headers, "Content-Length": str(len(content))}, None)
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        piece = hub.sent.get(file, content)[start:]
        return self.reply(206 if start else 200, headers, piece, cut=self.cut(start) if large else None)

    def listing(self):
        files = []
        for name, content in self.hub.files.items():
            entry = {"rfilename": name, "size": len(content), "blobId": git_name(content)}
            if name.endswith(self.hub.large):
                entry["lfs"] = {"sha256": self.hub.digest(name), "size": len(content), "pointerSize": 130}
            files.append(entry)
        info = {"_id": "1", "id": "org/tiny", "modelId": "org/tiny", "sha": COMMIT, "siblings": files}
        return json.dumps({**info, "private": False, "tags": [], "downloads": 0, "likes": 0}).encode()

    def reply(self, status, headers, content=b"", cut=None):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD" or not content:
            return
        if cut is None:
            self.wfile.write(content)
            return
        self.wfile.write(content[:cut])
        self.wfile.flush()
        if self.hub.stall is not None:
            self.hub.stall.wait(5)
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def cut(self, start):
        """After how many bytes the answer ends; None for never."""
        if self.hub.stall is not None:
            return max(1000 - start, 0)
        return self.hub.cuts.pop(0) if self.hub.cuts else None

    def log_message(self, *args):
        pass


def git_name(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def make_hub(files, large=(".safetensors", ".bin", ".pth", ".zip")):
    hub = SimpleNamespace(
        files=files, large=large, log=[], status=0, error="", revisions={"main", "v1", COMMIT}, sent={}, cuts=[],
        stall=None, slow_listing=0.0, wrong={},
    )  # fmt: skip

    def digest(name):
        content = hub.files[name]
        return hub.wrong.get(name) or (
            hashlib.sha256(content).hexdigest() if name.endswith(large) else git_name(content)
        )

    hub.digest = digest
    hub.gets = lambda: [path.split("/")[-1] for verb, path, *_ in hub.log if verb == "GET" and "/resolve/" in path]
    return hub


@pytest.fixture(scope="module")
def model_files(tmp_path_factory):
    """The files of a small model directory."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(5)
    model = torch.nn.ModuleDict({"backbone": create_backbone("hybrid_test"), "head": torch.nn.Linear(16, 2)})
    (folder / "config.json").write_text(json.dumps({"backbone": resolve("hybrid_test").to_dict()}))
    save_tensors(model, folder / "model.safetensors")
    (folder / "README.md").write_text("# tiny\n")
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def hub(model_files, tmp_path, monkeypatch):
    """The hub, its cache empty, and its library set to it as environment variables would before its import."""
    found = make_hub(dict(model_files))
    handler = type("Handler", (Hub,), {"hub": found})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    found.url = f"http://127.0.0.1:{server.server_port}"
    found.cache = tmp_path / "cache"
    for name, value in {
        "ENDPOINT": found.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": found.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(found.cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_ETAG_TIMEOUT": 2,
        "HF_HUB_DOWNLOAD_TIMEOUT": 2,
        "DOWNLOAD_CHUNK_SIZE": 500,
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    no_wait = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(file_download, "time", no_wait)  # between two tries of the hub's library
    monkeypatch.setattr(_http, "time", no_wait)
    _http.close_session()
    yield found
    server.shutdown()
    server.server_close()
    _http.close_session()


def blobs(hub):
    return sorted(p.name for p in hub.cache.glob("models--org--tiny/blobs/*"))


def test_info_shows_a_repository_and_the_hubs_own_errors(hub, capsys):
    assert main(["info", "hf-hub:org/tiny"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^model +hf-hub:org/tiny$", out, re.MULTILINE)
    assert "(fetched into the hub's cache, as vertebra.load does)" in out
    for name, text in (
        ("hf-hub:org/none", "no such repository on the hub, or a private one"),
        ("hf-hub:org/tiny@v9", "the repository has no revision 'v9'"),
        ("hf-hub:a/b/c", "must be hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION."),
    ):
        assert main(["info", name]) == 2
        error = capsys.readouterr().err
        assert text in error
        assert "Known:" not in error


def test_a_model_is_fetched_once_and_then_read_from_the_cache(hub, model_files):
    folder = model_folder("hf-hub:org/tiny")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == model_files
    assert sorted(hub.gets()) == sorted(model_files)
    hub.log.clear()
    assert model_folder("hf-hub:org/tiny") == folder
    assert [verb for verb, path, *_ in hub.log if "/resolve/" in path] == []
    saved = load_state(create_backbone("hf-hub:org/tiny"), backbone_of(read_tensors("hf-hub:org/tiny")))
    assert not saved.missing
    assert hub.gets() == []
    assert read_config("hf-hub:org/tiny")["backbone"]["family"] == "hybrid"


def backbone_of(tensors):
    return {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_asked_for_by_name(hub, revision):
    folder = model_folder(f"hf-hub:org/tiny@{revision}")
    assert folder.name == COMMIT
    assert any(path.endswith(f"/revision/{revision}") for _, path, *_ in hub.log)
    with pytest.raises(LoadError, match=r"hf-hub:org/tiny@v9: the repository has no revision 'v9'; give a branch"):
        model_folder("hf-hub:org/tiny@v9")


@pytest.mark.parametrize("source", ["hf-hub:", "hf-hub:a/b/c", "hf-hub:../../etc", "hf-hub:a/b@../../x", "hf-hub:a/b@"])
def test_a_name_that_cannot_be_one_is_refused_before_asking(hub, source):
    with pytest.raises(LoadError, match=r"must be hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION"):
        model_folder(source)
    assert hub.log == []


def test_offline_the_cache_serves_and_what_is_not_there_is_said(hub, monkeypatch):
    online = model_folder("hf-hub:org/tiny")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.log.clear()
    assert model_folder("hf-hub:org/tiny") == online
    assert open_checkpoint(f"hf-hub:org/tiny@{COMMIT}").path == online
    for source in ("hf-hub:org/other", "hf-hub:org/tiny@v1"):
        with pytest.raises(LoadError, match=r"offline \(HF_HUB_OFFLINE is set\), and the model is not in the cache"):
            model_folder(source)
    assert hub.log == []


def test_a_hub_out_of_reach_leaves_the_cache(hub, caplog):
    folder = model_folder("hf-hub:org/tiny")
    hub.status = 503
    caplog.set_level("INFO", "vertebra")
    assert model_folder("hf-hub:org/tiny") == folder
    assert "the copy in the cache is used" in caplog.text
    with pytest.raises(LoadError, match=r"hf-hub:org/other: the hub answered 503 .*; try again later"):
        model_folder("hf-hub:org/other")


def test_no_server_at_all(hub, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
    with pytest.raises(LoadError, match=r"the hub cannot be reached \(.*\) and the model is not in the cache"):
        model_folder("hf-hub:org/tiny")


def test_missing_files_and_repositories_are_named(hub):
    del hub.files["model.safetensors"]
    with pytest.raises(LoadError, match=r"hf-hub:org/tiny: model\.safetensors is missing in that repository"):
        model_folder("hf-hub:org/tiny")
    with pytest.raises(LoadError, match="a file of weights is missing in that repository"):
        open_checkpoint("hf-hub:org/tiny")
    with pytest.raises(LoadError, match=r"hf-hub:org/none: no such repository on the hub, or a private one; check"):
        model_folder("hf-hub:org/none")


def test_gated_and_forbidden_repositories_say_what_to_do(hub):
    hub.status, hub.error = 403, "GatedRepo"
    with pytest.raises(LoadError, match=r"is gated; accept its terms on its page, log in with `hf auth login` or set"):
        model_folder("hf-hub:org/tiny")
    hub.error = ""
    for status in (401, 403):
        hub.status = status
        with pytest.raises(
            LoadError, match=rf"refuses access \({status}\)|no such repository on the hub, or a private"
        ):
            model_folder("hf-hub:org/tiny")
    assert blobs(hub) == []


def test_the_token_is_sent(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_test")
    model_folder("hf-hub:org/tiny")
    assert {token for *_, token in hub.log} == {"Bearer hf_of_the_test"}


def test_a_cut_connection_is_resumed_where_it_broke(hub, model_files):
    hub.cuts = [1000, 2000]
    folder = model_folder("hf-hub:org/tiny")
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    ranges = [r for verb, path, r, _ in hub.log if verb == "GET" and path.endswith("model.safetensors")]
    assert ranges == [None, "bytes=1000-", "bytes=3000-"]


def test_a_download_that_failed_goes_on_in_the_next_run(hub, model_files):
    hub.cuts = [1000, *[0] * 20]
    with pytest.raises(LoadError, match=r"cut while model\.safetensors was fetched .*what has arrived is kept"):
        model_folder("hf-hub:org/tiny")
    assert not list(hub.cache.rglob("refs/*"))  # offline, half a model is none
    hub.cuts, hub.log[:] = [], []
    folder = model_folder("hf-hub:org/tiny")
    assert (folder / "model.safetensors").read_bytes() == model_files["model.safetensors"]
    ranges = [r for verb, path, r, _ in hub.log if verb == "GET" and path.endswith("model.safetensors")]
    assert ranges == ["bytes=1000-"]
    assert not [name for name in blobs(hub) if "incomplete" in name]


def test_a_slow_server_is_waited_for_and_then_told(hub, monkeypatch, model_files):
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.stall = threading.Event()
    with pytest.raises(LoadError, match=r"the hub is slow, no answer within 0\.1 seconds; load it again, what has arr"):
        model_folder("hf-hub:org/tiny")
    hub.stall.set()
    hub.stall = None
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    hub.slow_listing = 0.5
    with pytest.raises(LoadError, match=r"the hub is slow, no answer within 0\.1 seconds; try again \(HF_HUB_ETAG_TIM"):
        model_folder("hf-hub:org/tiny")
    hub.slow_listing = 0.0
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 2)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 2)
    assert (model_folder("hf-hub:org/tiny") / "README.md").read_bytes() == model_files["README.md"]


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_content_of_another_checksum_is_refused_and_not_kept(hub, file):
    content = bytearray(hub.files[file])
    content[-1] ^= 1
    hub.sent[file] = bytes(content)
    with pytest.raises(LoadError, match=rf"{file} arrived damaged, its checksum is not the one .* load it again to"):
        model_folder("hf-hub:org/tiny")
    assert not list(hub.cache.rglob(f"snapshots/*/{file}"))
    assert hub.digest(file) not in blobs(hub)
    hub.sent.clear()
    assert (model_folder("hf-hub:org/tiny") / file).read_bytes() == hub.files[file]


def test_a_hub_that_announces_paths_is_refused(hub):
    hub.files["../../evil.json"] = b"{}"
    with pytest.raises(LoadError, match=r"lists the file '\.\./\.\./evil\.json', which is no path inside of it"):
        model_folder("hf-hub:org/tiny")
    del hub.files["../../evil.json"]
    hub.wrong["config.json"] = "../../../evil"
    with pytest.raises(LoadError, match="which is no name"):
        model_folder("hf-hub:org/tiny")


def test_an_answer_of_something_that_is_no_hub(hub, monkeypatch):
    monkeypatch.setattr(Hub, "listing", lambda self: b"<html>log in to the hotel's network</html>")
    with pytest.raises(LoadError, match=r"the hub's answer is not understood .* is HF_ENDPOINT set to a hub\?"):
        model_folder("hf-hub:org/tiny")


# ---------------------------------------------------------------- published checkpoints


def shards(tmp_path):
    tensors = {"a": torch.arange(4.0), "b": torch.ones(3)}
    files = {}
    for number, (name, value) in enumerate(tensors.items(), 1):
        path = tmp_path / "shard"
        torch.save({name: value}, path)
        files[f"pytorch_model-0000{number}-of-00002.bin"] = path.read_bytes()
    index = {"metadata": {}, "weight_map": dict(zip(tensors, files, strict=True))}
    return tensors, {**files, "pytorch_model.bin.index.json": json.dumps(index).encode()}


def test_of_several_formats_safetensors_alone_are_fetched(hub):
    hub.files |= {
        "pytorch_model.bin": b"x" * 100, "tf_model.h5": b"y", "tokenizer.model": b"pieces", "optimizer.pt": b"z",
        "onnx/model.onnx": b"o", "onnx/config.json": b"{}",
    }  # fmt: skip
    checkpoint = open_checkpoint("hf-hub:org/tiny")
    assert sorted(hub.gets()) == ["README.md", "config.json", "model.safetensors", "tokenizer.model"]
    assert checkpoint.source == "hf-hub:org/tiny"
    assert checkpoint.config["backbone"]["family"] == "hybrid"
    assert "head.weight" in checkpoint.tensors
    assert checkpoint.file("tokenizer.model", "spiece.model").read_bytes() == b"pieces"


def test_shards_are_fetched_by_their_index(hub, tmp_path):
    tensors, files = shards(tmp_path)
    hub.files = {"config.json": b'{"time_step_limit": [0.0, Infinity]}', "flax_model.msgpack": b"f", **files}
    checkpoint = open_checkpoint("hf-hub:org/tiny@v1")
    assert {k: v.tolist() for k, v in checkpoint.tensors.items()} == {k: v.tolist() for k, v in tensors.items()}
    assert sorted(hub.gets()) == sorted(["config.json", *files])
    assert checkpoint.config["time_step_limit"][1] == float("inf")
    del hub.files["pytorch_model-00002-of-00002.bin"]
    with pytest.raises(LoadError, match=r"pytorch_model-00002-of-00002\.bin is missing in that repository"):
        open_checkpoint("hf-hub:org/tiny")
    hub.files["pytorch_model.bin.index.json"] = b'{"weight_map": {"a": "../../../etc/passwd"}}'
    hub.cache.rename(tmp_path / "old")
    with pytest.raises(LoadError, match=r"a shard must be a file beside the index, got '\.\./\.\./\.\./etc/passwd'"):
        open_checkpoint("hf-hub:org/tiny")


def test_a_folder_as_espnet_publishes_it_and_a_zip(hub, tmp_path, monkeypatch):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.ones(2)}, path)
    hub.files = {
        "meta.yaml": b"a: 1\n", "exp/train/config.yaml": b"encoder: x\n", "exp/train/valid.pth": path.read_bytes(),
        "data/bpe/bpe.model": b"pieces", "exp/train/images/loss.png": b"png",
    }  # fmt: skip
    folder = open_checkpoint("hf-hub:org/tiny").folder
    found = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert found == ["data/bpe/bpe.model", "exp/train/config.yaml", "exp/train/valid.pth", "meta.yaml"]
    hub.files["exp/train/other.pth"] = path.read_bytes()
    with pytest.raises(LoadError, match=r"several files of weights \(exp/train/valid\.pth, .*\); fetch one with"):
        open_checkpoint("hf-hub:org/tiny")
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.write(path, "inner/model.pth")
        archive.writestr("inner/config.yaml", "a: 2\n")
    hub.files = {"m.zip": (tmp_path / "m.zip").read_bytes()}
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "another"))
    checkpoint = open_checkpoint("hf-hub:org/tiny")
    assert checkpoint.tensors["w"].tolist() == [1, 1]
    assert checkpoint.file("config.yaml").read_text() == "a: 2\n"


def test_the_environment_variables_of_the_hub_are_heard(hub, tmp_path):
    script = "import sys; from vertebra.backbones.loading.hub import fetch_model; print(fetch_model(sys.argv[1]))"
    home = tmp_path / "home"
    for offline in ("0", "1"):
        env = {
            **os.environ,
            "HF_HUB_OFFLINE": offline,
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", script, "hf-hub:org/tiny"],
            env=env,
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert done.stdout.strip() == str(home / "hub" / "models--org--tiny" / "snapshots" / COMMIT)
        assert (home / "hub" / "models--org--tiny" / "refs" / "main").read_text() == COMMIT
