"""Where images come from: folders, tables, idx files, torchvision's data sets.

Every reader returns an ``ImageTable``. It names the images and their classes; files are decoded when asked for.
"""

from __future__ import annotations

import csv
import gzip
import inspect
import math
import os
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from vertebra.domains.vision.images import IMAGE_ENDINGS, Channels, ImageError, read_image, to_channels
from vertebra.errors import DataError, UnknownNameError

SplitName = Literal["train", "val", "test"]

_SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
_UINT8_IDX = 0x08


@dataclass(frozen=True)
class ImageTable:
    """Images, their names and, where known, their classes and splits.

    Exactly one of ``paths``, ``pixels`` and ``dataset`` holds the images.

    Args:
        source: Name of the file or folder, for messages.
        names: Name of each image: its path in the folder, or its number.
        labels: Class of each; None without classes.
        splits: ``train``, ``val`` or ``test`` of each; None where the source does not say.
        paths: File of each.
        pixels: All images in memory, uint8 (N, H, W) or (N, H, W, C).
        dataset: Something whose item is (image, ...), and the rows in it that are meant.
        classes: Class names in their order.
    """

    source: str
    names: list[str]
    labels: list[str] | None = None
    splits: list[SplitName] | None = None
    paths: list[Path] | None = None
    pixels: NDArray[np.uint8] | None = None
    dataset: tuple[Any, NDArray[np.int64]] | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def take(self, keep: NDArray[np.bool_]) -> ImageTable:
        """Rows where ``keep`` (N,) is True."""
        at = np.flatnonzero(keep).tolist()
        return ImageTable(
            self.source,
            [self.names[i] for i in at],
            None if self.labels is None else [self.labels[i] for i in at],
            None if self.splits is None else [self.splits[i] for i in at],
            None if self.paths is None else [self.paths[i] for i in at],
            None if self.pixels is None else self.pixels[keep],
            None if self.dataset is None else (self.dataset[0], self.dataset[1][keep]),
            self.classes,
        )

    def image(self, row: int, channels: Channels) -> Image.Image:
        """Decode an image to ``L`` or ``RGB``.

        Raises:
            ImageError: It cannot be decoded.
        """
        if self.paths is not None:
            return read_image(self.paths[row], channels)
        name = f"{self.source}, {self.names[row]}"
        if self.pixels is not None:
            return to_channels(_from_array(self.pixels[row]), channels, name)
        assert self.dataset is not None
        dataset, rows = self.dataset
        try:
            image = dataset[int(rows[row])][0]
        except Exception as e:  # whatever the data set raises at a damaged file
            raise ImageError(name, f"the image cannot be read ({e})", "download the data again") from None
        return to_channels(image, channels, name)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Key that sorts ``class 2`` before ``class 10``."""
    return [(0, int(p), p) if p.isdigit() else (1, 0, p.lower()) for p in re.split(r"(\d+)", name) if p] + [
        (2, 0, name)
    ]


def class_names(labels: Sequence[str]) -> tuple[str, ...]:
    """Distinct classes in their natural order."""
    return tuple(sorted(set(labels), key=natural_key))


# ---------------------------------------------------------------- folders


def list_images(folder: Path) -> list[Path]:
    """Image files in a folder and those below it, in natural order; hidden ones and other files are passed over."""
    found = []
    for top, folders, files in os.walk(folder):
        folders[:] = [f for f in folders if not f.startswith(".")]
        found += [Path(top, f) for f in files if not f.startswith(".") and Path(f).suffix.lower() in IMAGE_ENDINGS]
    return sorted(found, key=lambda p: natural_key(p.relative_to(folder).as_posix()))


def read_folder(root: str | Path, *, labelled: bool = True) -> ImageTable:
    """List ``root/CLASS/**`` or ``root/SPLIT/CLASS/**``.

    A folder is one of splits when all its sub-folders are called ``train``, ``val``, ``valid``, ``validation`` or
    ``test``.

    Args:
        root: The folder.
        labelled: Whether there must be classes; otherwise images may also lie in the folder (or in its splits) itself.

    Raises:
        DataError: No such folder, no images, an empty class folder, or images beside class folders.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: this must be a folder with images; correct the path.")
    folders = _folders(root)
    parts: list[tuple[SplitName | None, list[tuple[Path, str | None]]]]
    if folders and all(f.name.lower() in _SPLIT_NAMES for f in folders):
        parts = [(_SPLIT_NAMES[f.name.lower()], _class_files(f, labelled)) for f in folders]
    else:
        parts = [(None, _class_files(root, labelled))]
    rows = [(split, path, label) for split, files in parts for path, label in files]
    labels = [label for _, _, label in rows if label is not None]
    if labels and len(labels) < len(rows):
        raise DataError(f"{root}: all splits must have class folders or none may; sort the images into classes.")
    splits = [split for split, _, _ in rows if split is not None]
    return ImageTable(
        str(root),
        [path.relative_to(root).as_posix() for _, path, _ in rows],
        labels or None,
        splits or None,
        paths=[path for _, path, _ in rows],
        classes=class_names(labels),
    )


def read_unlabelled(files: str | Path | Sequence[str | Path]) -> ImageTable:
    """List images to predict: a folder, a file, or several of either.

    Raises:
        DataError: Nothing there, or no image in a folder.
    """
    given = [Path(files)] if isinstance(files, str | Path) else [Path(f) for f in files]
    names, paths = [], []
    for path in given:
        found = list_images(path) if path.is_dir() else [path]
        if not found:
            raise DataError(f"{path}: there must be an image in the folder ({_endings()}), got none.")
        if not os.path.exists(path):
            raise DataError(f"{path}: there is no such file; correct the path.")
        paths += found
        names += [p.relative_to(path).as_posix() if path.is_dir() and len(given) == 1 else str(p) for p in found]
    if not paths:
        raise DataError("predict: there must be at least one image, got none; give a folder or files.")
    return ImageTable(str(given[0]) if len(given) == 1 else "predict", names, paths=paths)


def _folders(folder: Path) -> list[Path]:
    found = [f for f in folder.iterdir() if f.is_dir() and not f.name.startswith(".")]
    return sorted(found, key=lambda f: natural_key(f.name))


def _class_files(folder: Path, labelled: bool) -> list[tuple[Path, str | None]]:
    classes = _folders(folder)
    loose = [f for f in folder.iterdir() if f.is_file() and f.suffix.lower() in IMAGE_ENDINGS and f.name[0] != "."]
    if not classes:
        if not loose:
            raise DataError(f"{folder}: there must be class folders with images ({_endings()}), got an empty folder.")
        if labelled:
            raise DataError(
                f"{folder}: images must lie in one folder a class, got {loose[0].name} without one; make the folders, "
                "or give a CSV with the columns path and label."
            )
        return [(path, None) for path in list_images(folder)]
    if loose:
        raise DataError(
            f"{folder}: images must not lie beside class folders, got {loose[0].name}; move them into a class folder."
        )
    rows: list[tuple[Path, str | None]] = []
    for each in classes:
        files = list_images(each)
        if not files:
            raise DataError(f"{each}: a class folder must hold an image ({_endings()}), got none; remove the folder.")
        rows += [(path, each.name) for path in files]
    return rows


def _endings() -> str:
    return ", ".join(sorted(IMAGE_ENDINGS))


# ---------------------------------------------------------------- tables


def read_csv(file: str | Path, *, labelled: bool = True) -> ImageTable:
    """Read a CSV or TSV with the columns ``path``, ``label`` and, optionally, ``split``.

    Args:
        file: The table; its paths are relative to its folder.
        labelled: Whether the column ``label`` must be there.

    Raises:
        DataError: Not a table of text, a column or a file is missing, or a path comes twice; with the line.
    """
    file = Path(file)
    text = _read_text(file)
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter)
    try:
        columns = reader.fieldnames or []
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise DataError(
            f"{file}, line {reader.line_num + 1}: this is not a row of a CSV ({e}); mend the line."
        ) from None
    has_labels, has_splits = "label" in columns, "split" in columns
    for column in ("path", "label") if labelled else ("path",):
        if column not in columns:
            raise DataError(f"{file}: there must be a column {column!r}, got {', '.join(columns) or 'none'}.")
    names: list[str] = []
    labels: list[str] = []
    splits: list[SplitName] = []
    lines: dict[Path, int] = {}
    for line, row in rows:
        at = f"{file}, line {line}"
        name = (row["path"] or "").strip()
        path = file.parent / name
        if not os.path.isfile(path):  # Path.is_file raises at a name that is too long
            raise DataError(f"{at}: path must name a file, relative to {file.parent}, got {name!r}; correct the path.")
        if path in lines:
            raise DataError(f"{at}: a path must come once, got {name!r} (also line {lines[path]}); remove one of them.")
        lines[path] = line
        names.append(name)
        if has_labels:
            labels.append((row["label"] or "").strip())
            if not labels[-1]:
                raise DataError(f"{at}: label must not be empty; give the class of {name!r}.")
        if has_splits:
            split = (row["split"] or "").strip().lower()
            if split not in _SPLIT_NAMES:
                raise DataError(f"{at}: split must be train, val or test, got {split!r}.")
            splits.append(_SPLIT_NAMES[split])
    if not names:
        raise DataError(f"{file}: there must be at least one row, got none.")
    return ImageTable(str(file), names, labels or None, splits or None, paths=list(lines), classes=class_names(labels))


def _read_text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as e:
        raise DataError(f"{file}: the file cannot be read ({e.strerror}); correct the path.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise DataError(f"{file}: this must be a CSV or TSV in UTF-8, got a binary file; is it an image or an archive?")
    return text


# ---------------------------------------------------------------- idx


def read_idx(images: str | Path, labels: str | Path | None = None) -> ImageTable:
    """Read images, and their classes, in the format of MNIST, plain or gzipped.

    Args:
        images: uint8 idx of (N, H, W), magic 2051, or (N, H, W, C) with 1 or 3 channels.
        labels: uint8 idx of (N,), magic 2049; classes are called by their number.

    Raises:
        DataError: Another format, a truncated file, or counts that differ.
    """
    pixels = _read_idx_array(Path(images), (3, 4), "2051 for grey images")
    if pixels.ndim == 4 and pixels.shape[3] not in (1, 3):
        raise DataError(f"{images}: the last dimension must be 1 or 3 channels, got {pixels.shape[3]}.")
    names = [str(i) for i in range(len(pixels))]
    if labels is None:
        return ImageTable(str(images), names, pixels=pixels)
    numbers = _read_idx_array(Path(labels), (1,), "2049 for labels")
    if len(numbers) != len(pixels):
        raise DataError(
            f"{labels}: there must be one label an image, got {len(numbers)} labels and {len(pixels)} images in "
            f"{images}; do the files belong together?"
        )
    texts = [str(n) for n in numbers.tolist()]
    return ImageTable(str(images), names, texts, pixels=pixels, classes=class_names(texts))


def _read_idx_array(path: Path, dimensions: tuple[int, ...], magic: str) -> NDArray[np.uint8]:
    try:
        data = path.read_bytes()
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path}: the gzip file is truncated or damaged; download it again.") from None
    except OSError as e:
        raise DataError(f"{path}: the file cannot be read ({e.strerror}); correct the path.") from None
    count = data[3] if len(data) > 3 else 0
    if data[:3] != bytes([0, 0, _UINT8_IDX]) or count not in dimensions:
        raise DataError(
            f"{path}: an idx file of bytes must begin with the magic number {magic}, got "
            f"{int.from_bytes(data[:4], 'big') if data else 'an empty file'}; are images and labels exchanged?"
        )
    start = 4 + 4 * count
    shape = [int.from_bytes(data[4 + 4 * i : 8 + 4 * i], "big") for i in range(count)]
    want, got = math.prod(shape), len(data) - start
    if got != want:
        raise DataError(
            f"{path}: there must be {want:,} bytes for {' x '.join(map(str, shape))}, got {max(got, 0):,}; "
            "the file is truncated or has a tail, download it again."
        )
    if want == 0:
        raise DataError(f"{path}: there must be at least one entry, got none.")
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape).copy()  # writable, as torch wants it


def _from_array(pixels: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels)


# ---------------------------------------------------------------- torchvision


def torchvision_names() -> list[str]:
    """Data sets of torchvision that are read by ``root``, ``download`` and one of ``train`` and ``split``."""
    import torchvision.datasets as datasets  # slow, and few need it

    return [name for name in datasets.__all__ if _split_option(getattr(datasets, name))]


def read_torchvision(name: str, root: str | Path, *, download: bool = False) -> ImageTable:
    """Read a data set of torchvision, with its own splits.

    Small ones, which torchvision holds in memory, come as pixels; others stay files.

    Args:
        name: Class in ``torchvision.datasets``: ``MNIST``, ``CIFAR10``, ``SVHN``, ...
        root: Folder of the data.
        download: Whether to fetch what is missing.

    Raises:
        UnknownNameError: No such data set.
        DataError: It is not there, cannot be fetched, or does not hold images with one class each.
    """
    import torchvision.datasets as datasets

    known = torchvision_names()
    if name not in known:
        raise UnknownNameError("torchvision data set", name, known)
    make = getattr(datasets, name)
    if _split_option(make) == "train":
        train = _open_dataset(make, name, root, download, train=True)
        parts: list[tuple[SplitName, Any]] = [
            ("train", train),
            ("test", _open_dataset(make, name, root, download, train=False)),
        ]
    else:
        parts = [("train", _open_dataset(make, name, root, download, split="train"))]
        for split, word in (("val", "val"), ("val", "valid"), ("test", "test")):
            try:
                found = _open_dataset(make, name, root, download, split=word)
            except ValueError as e:  # the data set has no split of this word
                if isinstance(e, DataError):
                    raise
                continue
            parts.append((_SPLIT_NAMES[split], found))
    return _join([_dataset_table(f"torchvision {name}", split, dataset) for split, dataset in parts])


def _split_option(make: Callable[..., Any]) -> str | None:
    options = inspect.signature(make).parameters
    if not {"root", "download"} <= options.keys():
        return None
    return next((o for o in ("train", "split") if o in options), None)


def _open_dataset(make: Callable[..., Any], name: str, root: str | Path, download: bool, **split: Any) -> Any:
    try:
        return make(root=str(root), download=download, **split)
    except (RuntimeError, OSError) as e:
        reason = str(e).partition("\n")[0].rstrip(". ")
        if download:
            raise DataError(f"torchvision {name}: it cannot be downloaded to {root} ({reason}).") from None
        raise DataError(
            f"torchvision {name}: it is not in {root} ({reason}); give download: true, or the folder it is in."
        ) from None


def _dataset_table(source: str, split: SplitName, dataset: Any) -> ImageTable:
    count = len(dataset)
    targets = next(
        (t for t in (getattr(dataset, a, None) for a in ("targets", "labels", "_labels")) if _is_flat(t, count)), None
    )
    held = getattr(dataset, "data", None)  # then making an image of an item costs no decoding
    in_memory = isinstance(held, np.ndarray | torch.Tensor) and len(held) == count
    if targets is None:
        targets = [dataset[i][1] for i in range(count)]
    targets = targets.tolist() if isinstance(targets, np.ndarray | torch.Tensor) else list(targets)
    if not all(isinstance(t, int | np.integer | str) for t in targets):
        raise DataError(f"{source}: every image must have one class, got {type(targets[0]).__name__}; take another.")
    classes = tuple(str(c) for c in getattr(dataset, "classes", ()))
    labels = [classes[t] if classes and not isinstance(t, str) else str(t) for t in targets]
    order = classes if len(set(classes)) == len(classes) else ()
    pixels = np.stack([np.asarray(dataset[i][0]) for i in range(count)]) if in_memory else None
    return ImageTable(
        source,
        [f"{split}/{i}" for i in range(count)],
        labels,
        [split] * count,
        pixels=pixels,
        dataset=None if in_memory else (dataset, np.arange(count)),
        classes=order or class_names(labels),
    )


def _is_flat(values: Any, count: int) -> bool:
    return values is not None and len(values) == count and not isinstance(values, str)


class _Chain:
    """Data sets one after another."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(p) for p in parts])

    def __getitem__(self, row: int) -> Any:
        part = int(np.searchsorted(self.ends, row, side="right"))
        return self.parts[part][row - (int(self.ends[part - 1]) if part else 0)]


def _join(tables: Sequence[ImageTable]) -> ImageTable:
    in_memory = all(t.pixels is not None for t in tables)
    chain = _Chain([t.dataset[0] for t in tables if t.dataset is not None])
    return ImageTable(
        tables[0].source,
        [n for t in tables for n in t.names],
        [label for t in tables for label in t.labels or ()],
        [s for t in tables for s in t.splits or ()],
        pixels=np.concatenate([t.pixels for t in tables if t.pixels is not None]) if in_memory else None,
        dataset=None if in_memory else (chain, np.arange(sum(map(len, tables)))),
        classes=tables[0].classes,
    )
