"""Zip archives of checkpoints, unpacked under limits; without torch."""

from __future__ import annotations

import stat
import zipfile
import zlib
from pathlib import Path

from vertebra.errors import LoadError

MOST_MEMBERS = 10_000
MOST_BYTES = 64 << 30  # unpacked; weights of ten thousand million parameters in 4 bytes, and some
MOST_RATIO = 100  # unpacked to packed; weights shrink by less than two, texts by less than ten
_SMALL = 64 << 20  # bytes, unpacked, that may shrink by whatever they do
_PIECE = 1 << 20


def is_torch_zip(path: Path) -> bool:
    """Whether a file is a zip as ``torch.save`` writes it: a pickle ``NAME/data.pkl`` beside its tensors.

    Raises:
        LoadError: It begins as a zip and is damaged.
    """
    return any(_parts(info.filename)[1:] in (["data.pkl"], ["constants.pkl"]) for info in _members(path))


def check_torch_zip(path: Path) -> None:
    """Refuse a zip of ``torch.save`` that would unpack to more than it is; torch itself packs nothing.

    Raises:
        LoadError: It is packed, or its parts lie over each other.
    """
    members = _members(path)
    if any(info.compress_type != zipfile.ZIP_STORED for info in members):
        raise LoadError(
            f"{path}: a checkpoint of torch holds its tensors as they are, these are compressed; save it anew."
        )
    total = sum(info.file_size for info in members)
    if total > path.stat().st_size:
        raise LoadError(
            f"{path}: would unpack to {total:,} bytes, more than the file has; it is damaged or a zip bomb."
        )


def unpack(path: Path, folder: Path) -> Path:
    """Unpack a zip into an empty folder.

    Args:
        path: The archive.
        folder: Where to.

    Returns:
        The folder with its files: the only folder at the top of the archive, or ``folder``.

    Raises:
        LoadError: It is damaged, locked by a password, too large, or a member is a link or would be written elsewhere.
    """
    members = _members(path)
    _check_sizes(path, members)
    places = _places(path, members)
    try:
        with zipfile.ZipFile(path) as archive:
            for info, parts in zip(members, places, strict=True):
                place = folder.joinpath(*parts)
                if info.is_dir():
                    place.mkdir(parents=True, exist_ok=True)
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                _write(archive, info, place)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError, RuntimeError) as e:
        if isinstance(e, LoadError):
            raise
        raise LoadError(f"{path}: cannot be unpacked ({e or 'cut short'}); get it again.") from e
    except OSError as e:
        raise LoadError(f"{path}: cannot be unpacked into {folder} ({e.strerror or e}).") from e
    found = list(folder.iterdir())
    return found[0] if len(found) == 1 and found[0].is_dir() else folder


def _members(path: Path) -> list[zipfile.ZipInfo]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as e:
        raise LoadError(f"{path}: cannot be read ({e.strerror or e}).") from e
    except Exception as e:  # zipfile lets errors of struct, of decoding and of its own through
        raise LoadError(f"{path}: a damaged zip archive ({e}); get it again.") from e
    if len(members) > MOST_MEMBERS:
        raise LoadError(f"{path}: {len(members):,} members, at most {MOST_MEMBERS:,} are unpacked.")
    return members


def _check_sizes(path: Path, members: list[zipfile.ZipInfo]) -> None:
    total, size = sum(info.file_size for info in members), path.stat().st_size
    if total > min(MOST_BYTES, max(_SMALL, MOST_RATIO * size)):
        raise LoadError(
            f"{path}: would unpack from {size:,} to {total:,} bytes; at most {MOST_RATIO} times as much and "
            f"{MOST_BYTES >> 30} GiB are unpacked. If you trust it, unpack it yourself and give the folder."
        )


def _places(path: Path, members: list[zipfile.ZipInfo]) -> list[list[str]]:
    seen: set[tuple[str, ...]] = set()
    places = []
    for info in members:
        parts, name = _parts(info.filename), info.filename
        if name.startswith("/") or "\\" in name or ":" in name or "\0" in name or ".." in parts or not parts:
            raise LoadError(f"{path}: the member {name!r} would be written outside of the archive's folder.")
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR) or (kind == stat.S_IFDIR) > info.is_dir():
            raise LoadError(
                f"{path}: the member {name!r} is a link or a device; an archive may hold files and folders."
            )
        if tuple(parts) in seen:
            raise LoadError(f"{path}: the member {name!r} stands twice.")
        seen.add(tuple(parts))
        places.append(parts)
    return places


def _parts(name: str) -> list[str]:
    return [part for part in name.split("/") if part not in ("", ".")]


def _write(archive: zipfile.ZipFile, info: zipfile.ZipInfo, place: Path) -> None:
    left = info.file_size
    with archive.open(info) as source, place.open("xb") as file:
        while piece := source.read(min(_PIECE, left + 1)):
            left -= len(piece)
            if left < 0:
                raise zipfile.BadZipFile(f"{info.filename!r} is longer than it says")
            file.write(piece)
    if left:
        raise zipfile.BadZipFile(f"{info.filename!r} is shorter than it says")
