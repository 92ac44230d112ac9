"""Models from the Hugging Face hub: ``hf-hub:ORG/NAME`` with ``@REVISION`` behind it or not.

Through ``huggingface_hub``: its cache, its offline mode, its tokens, its endpoint, all set by its environment variables
(``HF_HOME``, ``HF_HUB_OFFLINE``, ``HF_TOKEN``, ``HF_ENDPOINT``). Added here: one commit for all files of a model;
downloads that go on where an earlier process stopped; checksums; and errors in a sentence.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vertebra.backbones.loading.files import is_plain_name, read_json
from vertebra.errors import LoadError

log = logging.getLogger("vertebra")

PREFIX = "hf-hub:"
_BESIDE = (".json", ".md", ".txt", ".model", ".yaml", ".yml", ".vocab", ".tsv", ".npz")
_MOST_BESIDE = 32 << 20  # bytes of one file beside the weights; a tokenizer with a large vocabulary has 17 MB
INDEX = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".zip")
_NO_MODEL = re.compile(r"(training_args|optimizer|scheduler|scaler|rng_state.*)\.\w+")
_PIECE = 1 << 20
_SLOW = {"TimeoutException", "Timeout", "TimeoutError"}
_NO_ANSWER = {*_SLOW, "TransportError", "RequestException"}


@dataclass(frozen=True)
class _File:
    name: str
    size: int | None
    sha256: str | None  # of the content, for large files
    blob: str | None  # git's name of the content


@dataclass(frozen=True)
class _Repo:
    """A repository at one commit."""

    source: str
    name: str
    commit: str
    files: dict[str, _File]

    def missing(self, names: str) -> LoadError:
        return LoadError(f"{self.source}: {names} is missing in that repository (commit {self.commit[:8]}).")


def fetch_model(source: str) -> Path:
    """Return the folder of a model directory on the hub, fetching what is not in the cache.

    Args:
        source: ``hf-hub:ORG/NAME`` or ``hf-hub:ORG/NAME@REVISION``, a branch, tag or commit.

    Raises:
        LoadError: The repository has no model directory of ours, or the hub did not give it.
    """
    return _fetch(source, ours=True)


def fetch_checkpoint(source: str) -> Path:
    """Return the folder of a published checkpoint on the hub, fetching what is not in the cache.

    Of weights in several formats one is fetched, safetensors if there are any; of other files the small ones that
    describe the model and its tokenizer.

    Args:
        source: As in ``fetch_model``.

    Raises:
        LoadError: The repository has no weights, or several, or the hub did not give them.
    """
    return _fetch(source, ours=False)


def _fetch(source: str, *, ours: bool) -> Path:
    name, revision = _split(source)
    try:
        repo = _look_up(source, name, revision)
    except Exception as error:  # of the hub's library, of its HTTP library, of the disk
        problem = _explain(error, source, revision)
        folder = _cached(name, revision) if _is_out_of_reach(error) else None
        if folder is None or not _is_whole(folder, ours=ours):
            raise problem from error
        log.info("%s: the hub is out of reach; the copy in the cache is used", source)
        return folder
    wanted = _ours(repo) if ours else _published(repo)
    folder = _download(repo, wanted, revision)
    _remember(name, revision, repo.commit)  # last, so that offline one finds whole models only
    return folder


def _split(source: str) -> tuple[str, str]:
    name, at, revision = source.removeprefix(PREFIX).partition("@")
    good = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and ".." not in name and "--" not in name
    if not good or (at and not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", revision)) or ".." in revision:
        raise LoadError(f"{source}: must be hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION.")
    return name, revision or "main"


def _look_up(source: str, name: str, revision: str) -> _Repo:
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise ConnectionError("offline mode")
    info = HfApi(endpoint=constants.ENDPOINT).model_info(
        name, revision=revision, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
    )
    files = {}
    for file in info.siblings or ():
        path = file.rfilename
        if path.startswith("/") or "\\" in path or ".." in path.split("/"):
            raise LoadError(f"{source}: the repository lists the file {path!r}, which is no path inside of it.")
        files[path] = _File(path, file.size, getattr(file.lfs, "sha256", None), file.blob_id)
    if info.sha is None or not re.fullmatch("[0-9a-f]{40}", info.sha):
        raise LoadError(f"{source}: the hub names no commit; is HF_ENDPOINT set to a hub?")
    return _Repo(source, name, info.sha, files)


# ---------------------------------------------------------------- which files


def _ours(repo: _Repo) -> list[str]:
    wanted = ["config.json", "model.safetensors"]
    for name in wanted:
        if name not in repo.files:
            raise repo.missing(name)
    return wanted + [name for name in _beside(repo, nested=False) if name not in wanted]


def _published(repo: _Repo) -> list[str]:
    weights = _weights(repo)
    beside = _beside(repo, nested=any("/" in name for name in weights))
    return [name for name in beside if name not in weights] + weights


def _beside(repo: _Repo, *, nested: bool) -> list[str]:
    return [
        f.name
        for f in repo.files.values()
        if (f.name.endswith(_BESIDE) or f.name.startswith("LICENSE"))
        and (f.size or 0) <= _MOST_BESIDE
        and (nested or "/" not in f.name)
    ]


def _weights(repo: _Repo) -> list[str]:
    for whole, index in zip(_WHOLE, INDEX, strict=True):
        if index in repo.files:
            shards = _shards(repo, index)
            for shard in shards:
                if shard not in repo.files:
                    raise repo.missing(shard)
            return [index, *shards]
        if whole in repo.files:
            return [whole]
    for ending in _WEIGHTS:
        found = [n for n in repo.files if n.endswith(ending) and not _NO_MODEL.fullmatch(n.rpartition("/")[2])]
        found = [n for n in found if "/" not in n] or found
        if len(found) == 1:
            return found
        if found:
            raise LoadError(
                f"{repo.source}: holds several files of weights ({', '.join(found[:4])}); fetch one with `hf download "
                f"{repo.name} FILE` and give its path."
            )
    raise repo.missing("a file of weights")


def _shards(repo: _Repo, index: str) -> list[str]:
    folder = _download(repo, [index], "")
    return shard_names(folder / index)


def shard_names(index: Path) -> list[str]:
    """Return the files that an index of shards names, which must stand beside it.

    Raises:
        LoadError: It is no index, or names a path.
    """
    weights = read_json(index, finite=False).get("weight_map")
    if not isinstance(weights, dict) or not weights:
        raise LoadError(f"{index}: not an index of shards (no weight_map).")
    for name in weights.values():
        if not is_plain_name(name):
            raise LoadError(f"{index}: a shard must be a file beside the index, got {repr(name)[:100]}.")
    return sorted(set(weights.values()))


# ---------------------------------------------------------------- the cache


def _cached(name: str, revision: str) -> Path | None:
    """Return the folder of a revision in the cache."""
    folder = _storage(name)
    ref = folder / "refs" / revision
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    found = folder / "snapshots" / commit
    return found if re.fullmatch("[0-9a-f]{40}", commit) and found.is_dir() else None


def _is_whole(folder: Path, *, ours: bool) -> bool:
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    if ours:
        return {"config.json", "model.safetensors"} <= names
    index = next((i for i in INDEX if i in names), None)
    return set(shard_names(folder / index)) <= names if index else any(n.endswith(_WEIGHTS) for n in names)


def _remember(name: str, revision: str, commit: str) -> None:
    ref = _storage(name) / "refs" / revision
    if revision == commit or (ref.is_file() and ref.read_text(encoding="utf-8") == commit):
        return
    ref.parent.mkdir(parents=True, exist_ok=True)
    part = ref.with_name(f"{ref.name}.{uuid.uuid4().hex[:8]}")
    part.write_text(commit, encoding="utf-8")
    part.replace(ref)


def _storage(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


# ---------------------------------------------------------------- downloads


def _download(repo: _Repo, names: Iterable[str], revision: str) -> Path:
    """Bring files of a commit into the cache; return its folder there."""
    folder = _storage(repo.name) / "snapshots" / repo.commit
    for name in names:
        if not (folder / name).is_file():
            try:
                _download_one(repo, repo.files[name])
            except LoadError:
                raise
            except Exception as error:  # as above
                raise _explain(error, repo.source, revision, name) from error
    return folder


def _download_one(repo: _Repo, file: _File) -> None:
    from filelock import FileLock
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_download, hf_hub_url

    url = hf_hub_url(repo.name, file.name, revision=repo.commit)
    known = get_hf_file_metadata(url, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    blobs = _storage(repo.name) / "blobs"
    packed = getattr(known, "xet_file_data", None) is not None  # in pieces that have checksums and a cache of their own
    checked = False
    if known.etag and not (packed and find_spec("hf_xet") and not constants.HF_HUB_DISABLE_XET):
        if not re.fullmatch(r"[\w.+-]+", known.etag) or known.etag.startswith("."):
            raise LoadError(
                f"{repo.source}: the hub names the content of {file.name} {known.etag!r}, which is no name."
            )
        locks = Path(constants.HF_HUB_CACHE) / ".locks" / blobs.parent.name
        blobs.mkdir(parents=True, exist_ok=True)
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / f"{known.etag}.vertebra.lock"):
            if not (blobs / known.etag).exists():
                _resume(repo, file, url, blobs / known.etag, known.size)
                checked = True
    made = Path(hf_hub_download(repo.name, file.name, revision=repo.commit, cache_dir=constants.HF_HUB_CACHE))
    if not checked and not _is_right(made, file, known.etag):  # in pieces, or put into the cache by something else
        made.resolve().unlink(missing_ok=True)
        made.unlink(missing_ok=True)
        raise _damaged(repo, file)


def _resume(repo: _Repo, file: _File, url: str, blob: Path, size: int | None) -> None:
    """Download a file's content, going on where an earlier try stopped; it becomes ``blob`` when it is right."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    part = blob.with_name(f"{blob.name}.vertebra.incomplete")
    done = part.stat().st_size if part.is_file() else 0
    if size is not None and done > size:
        part.unlink()
        done = 0
    with part.open("ab") as content:
        http_get(
            url, content, resume_size=done, headers=build_hf_headers(), expected_size=size, displayed_filename=file.name
        )
    if not _is_right(part, file, blob.name):
        part.unlink()
        raise _damaged(repo, file)
    part.replace(blob)


def _damaged(repo: _Repo, file: _File) -> LoadError:
    return LoadError(
        f"{repo.source}: {file.name} arrived damaged, its checksum is not the one that the hub announces. It was not "
        "kept; load it again to fetch it anew."
    )


def _is_right(path: Path, file: _File, etag: str | None) -> bool:
    """Whether a file has the content that the hub announced, as far as it did."""
    sha256 = file.sha256 or (etag if etag and re.fullmatch("[0-9a-f]{64}", etag) else None)
    if sha256 is not None:
        return _digest(path, hashlib.sha256()) == sha256
    if file.blob is not None and re.fullmatch("[0-9a-f]{40}", file.blob):
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        return _digest(path, git) == file.blob
    return file.size is None or path.stat().st_size == file.size


def _digest(path: Path, digest: Any) -> str:
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return str(digest.hexdigest())


# ---------------------------------------------------------------- errors


def _is_out_of_reach(error: BaseException) -> bool:
    """Whether the hub gave no answer, so that the cache may give one."""
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        return _status(error) >= 500 or _status(error) == 429
    return isinstance(error, OSError) or not _kinds(error).isdisjoint(_NO_ANSWER)


def _kinds(error: BaseException) -> set[str]:
    return {
        c.__name__ for c in type(error).__mro__
    }  # the HTTP library is another one with each major version of the hub's


def _status(error: Any) -> int:
    return int(getattr(getattr(error, "response", None), "status_code", 0) or 0)


def _explain(error: BaseException, source: str, revision: str, file: str = "") -> LoadError:
    """Say in a sentence what went wrong and what to do."""
    from huggingface_hub import constants, errors

    if isinstance(error, LoadError):
        return error
    first = str(error).strip().partition("\n")[0]
    log_in = "log in with `hf auth login` or set HF_TOKEN"
    again = "load it again, what has arrived is kept and the rest is fetched" if file else "try again"
    if constants.HF_HUB_OFFLINE:
        text = "offline (HF_HUB_OFFLINE is set), and the model is not in the cache, or not whole; load it once online."
    elif isinstance(error, errors.GatedRepoError):
        text = f"the repository is gated; accept its terms on its page, {log_in}, and load it again."
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"the repository has no revision {revision!r}; give a branch, a tag or a whole commit."
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"no such repository on the hub, or a private one; check the name, and {log_in} if it is private."
    elif isinstance(error, errors.EntryNotFoundError) and not isinstance(error, FileNotFoundError):
        text = f"{file or 'a file'} is missing in that repository."
    elif _status(error) in (401, 403):
        text = f"the hub refuses access ({_status(error)}); accept the terms on its page, if any, and {log_in}."
    elif _status(error):
        text = f"the hub answered {_status(error)} ({first[:100]}); try again later."
    elif not _kinds(error).isdisjoint(_SLOW):
        seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT if file else constants.HF_HUB_ETAG_TIMEOUT
        name = "HF_HUB_DOWNLOAD_TIMEOUT" if file else "HF_HUB_ETAG_TIMEOUT"
        text = f"the hub is slow, no answer within {seconds} seconds; {again} ({name} sets the seconds)."
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        text = f"the cache {constants.HF_HUB_CACHE} cannot be written ({error.strerror}); set HF_HOME to another place."
    elif not _is_out_of_reach(error):
        text = (
            f"the hub's answer is not understood ({type(error).__name__}: {first[:100]}); is HF_ENDPOINT set to a hub?"
        )
    elif file:
        text = f"the connection was cut while {file} was fetched ({first[:100] or type(error).__name__}); {again}."
    else:
        text = f"the hub cannot be reached ({first[:100] or type(error).__name__}) and the model is not in the cache."
    return LoadError(f"{source}: {text}")
