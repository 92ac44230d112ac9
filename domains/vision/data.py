"""The data module of images: folders, tables, idx files and torchvision's data sets, to classify or to generate."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from vertebra.backbones.random import item_uniform
from vertebra.domains.base import BaseData, Items, Split
from vertebra.domains.batching import Batch
from vertebra.domains.spec import DataSpec
from vertebra.domains.vision.images import Channels, ImageError, is_grey
from vertebra.domains.vision.sources import (
    ImageTable,
    SplitName,
    class_names,
    read_csv,
    read_folder,
    read_idx,
    read_torchvision,
    read_unlabelled,
)
from vertebra.domains.vision.spec import Crop, Kind, VisionSpec
from vertebra.domains.vision.transforms import Augment, Ints, Pixels, Transform, eval_transform, train_transform
from vertebra.errors import ConfigError, DataError

log = logging.getLogger("vertebra")

Statistics = Literal["auto", "imagenet"] | Sequence[float]

CACHE_BYTES = 512 * 2**20
"""Decoded bytes that one split of files keeps in memory, in one process."""
_SAMPLED = 200  # images looked at for their size and channels
_MEASURED = 2000  # training images whose pixels give mean and std
_OWN_SIZE = 256  # images that are all of one size, up to this side, are read at their own
_SPLIT, _SAMPLE, _MEMBER, _LIMIT = range(201, 205)  # salts of the draws


class ImageItems:
    """Images of one split.

    Prepared images (as ``Transform.prepare`` makes them) are kept until they take ``CACHE_BYTES``. Worker processes
    keep their own, for one epoch.

    Args:
        table: The images.
        spec: What the model reads.
        transform: How it gets them.
        labels: Class numbers int64 (N,), or None.
        seed: Seed of all draws.
        balance: Whether item i is an image of class i modulo the number of classes, drawn anew in every epoch.
    """

    def __init__(
        self,
        table: ImageTable,
        spec: VisionSpec,
        transform: Transform,
        *,
        labels: Ints | None = None,
        seed: int = 0,
        balance: bool = False,
    ) -> None:
        self.table, self.spec, self.transform = table, spec, transform
        self.labels, self.seed = labels, seed
        self._members = (
            [np.flatnonzero(labels == c) for c in np.unique(labels)] if balance and labels is not None else []
        )
        self._cache: dict[int, Pixels] = {}
        self._room = CACHE_BYTES

    def __len__(self) -> int:
        return len(self.table)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": {}, "_room": CACHE_BYTES}

    @property
    def names(self) -> list[str]:
        """Name of every image."""
        return self.table.names

    @property
    def lengths(self) -> Ints:
        """One for every image: all take the same room in a batch."""
        return np.ones(len(self.table), dtype=np.int64)

    def rows(self, indices: Ints, epoch: int) -> Ints:
        """Rows of the table that items are in an epoch; other ones than their own when classes are balanced."""
        if not self._members:
            return indices
        draws = item_uniform(self.seed, epoch, indices, _MEMBER)
        chosen = [self._members[i % len(self._members)] for i in indices.tolist()]
        return np.array([m[int(u * len(m))] for m, u in zip(chosen, draws.tolist(), strict=True)], dtype=np.int64)

    def fetch(self, indices: Ints, epoch: int) -> Batch:
        """Make a batch.

        Returns:
            ``images`` float32 (B, C, H, W), normalised, or uint8 for a generator; ``index`` int64 (B,), ``epoch``,
            ``names``; ``labels`` int64 (B,) where there are classes.

        Raises:
            DataError: An image is damaged.
        """
        indices = np.asarray(indices, dtype=np.int64)
        rows = self.rows(indices, epoch)
        batch: Batch = {
            "index": torch.from_numpy(indices.copy()),
            "epoch": epoch,
            "names": [self.table.names[i] for i in rows.tolist()],
            "images": self.transform.batch(self.prepared(rows), self.seed, epoch, indices),
        }
        if self.labels is not None:
            batch["labels"] = torch.from_numpy(self.labels[rows])
        return batch

    def prepared(self, rows: Ints) -> list[Pixels]:
        """Decode and prepare rows of the table, or take them from memory."""
        return [self._cache[i] if i in self._cache else self._prepare(i) for i in rows.tolist()]

    def _prepare(self, row: int) -> Pixels:
        try:
            image = self.table.image(row, 3 if self.spec.channels == 3 else 1)
        except ImageError as e:
            raise _damaged(e) from None
        pixels = self.transform.prepare(image)
        if self._room >= pixels.nbytes:
            self._cache[row] = pixels
            self._room -= pixels.nbytes
        return pixels


class ImageData(BaseData):
    """Images to classify or to generate.

    Exactly one source: ``root``, ``file``, ``images``, or ``torchvision`` (in the folder ``root``). Splits that the
    source has (folders, the column ``split``, torchvision's own) are kept; those that it lacks are drawn.

    Args:
        root: Folder ``CLASS/*.png``, or ``train|val|test/CLASS/*.png``; to generate, also images without classes.
        file: CSV or TSV with the columns ``path``, ``label`` and, optionally, ``split``.
        images: uint8 idx file, plain or gzipped, as MNIST has it.
        labels: idx file of their classes.
        torchvision: Data set of torchvision by name: ``MNIST``, ``CIFAR10``, ...; its folder is ``root``, or ``data``.
        download: Whether torchvision may fetch it.
        predict: Folder or files to predict, without classes.
        task: What is done with the images.
        size: Side, or height and width, that the model reads; None for the images' own where they agree (up to 256),
            and 224 otherwise; a generator must then be told.
        channels: 1 for grey, 3 for RGB, ``auto`` for grey when a sample of the training images is.
        mean: Mean of each channel in [0, 1], for classifiers; ``auto`` measures at most 2,000 training images,
            ``imagenet`` takes ImageNet's (for grey, the mean of its three).
        std: The same for the standard deviation.
        crop: ``centre`` or ``squash``, see ``VisionSpec``; ``auto`` is ``squash`` for classifiers from 384 pixels.
        crop_fraction: Share of the resized side that the crop keeps; None for 0.875 with centred classifiers from 128
            pixels, and 1 otherwise. An image that has the model's size is never cropped.
        interpolation: How images are resized.
        augment: What training does at random.
        val_fraction: Share for validation, stratified by class.
        test_fraction: Share for testing, stratified by class.
        test_every: Take every so-manieth image of the source's order for testing (the last of each), in place of
            ``test_fraction``; 0 for none.
        balance: Whether a training epoch draws every class equally often.
        limit: Most training images of a class.
        bad: Whether a damaged image is an error when it is reached, or all files are tried first and it is left out.
        batch_size: Images in a batch.
        num_workers: Worker processes.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of splits, order and augmentation.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        file: str | None = None,
        images: str | None = None,
        labels: str | None = None,
        torchvision: str | None = None,
        download: bool = False,
        predict: str | list[str] | None = None,
        task: Kind = "classification",
        size: int | tuple[int, int] | None = None,
        channels: Literal["auto", 1, 3] = "auto",
        mean: Literal["auto", "imagenet"] | list[float] = "auto",
        std: Literal["auto", "imagenet"] | list[float] = "auto",
        crop: Literal["auto", "centre", "squash"] = "auto",
        crop_fraction: float | None = None,
        interpolation: Literal["bilinear", "bicubic"] = "bicubic",
        augment: Augment | dict[str, Any] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        test_every: int = 0,
        balance: bool = False,
        limit: int | None = None,
        bad: Literal["error", "skip"] = "error",
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, seed=seed)
        given = {"root": None if torchvision else root, "file": file, "images": images, "torchvision": torchvision}
        sources = [name for name, value in given.items() if value is not None]
        if len(sources) > 1 or not (sources or predict):
            raise ConfigError(
                "ImageData: give one of root, file, images with labels, or torchvision, got "
                f"{' and '.join(sources) or 'none'}."
            )
        for name, value, choices in (
            ("task", task, ("classification", "generation")),
            ("channels", channels, ("auto", 1, 3)),
            ("crop", crop, ("auto", "centre", "squash")),
            ("interpolation", interpolation, ("bilinear", "bicubic")),
            ("bad", bad, ("error", "skip")),
        ):
            if value not in choices:
                raise ConfigError(f"ImageData: {name} must be one of {', '.join(map(str, choices))}, got {value!r}.")
        if labels is not None and images is None:
            raise ConfigError("ImageData: labels needs images; give both idx files.")
        if images is not None and labels is None and task == "classification":
            raise ConfigError("ImageData: images needs labels to classify; give both idx files.")
        if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ConfigError(
                "ImageData: val_fraction and test_fraction must be from 0 and below 1 together, got "
                f"{val_fraction} and {test_fraction}."
            )
        if test_every < 0 or test_every == 1 or (limit is not None and limit < 1):
            raise ConfigError(
                f"ImageData: test_every must be 0 or at least 2, and limit at least 1, got {test_every} and {limit}."
            )
        if crop_fraction is not None and (not 0 < crop_fraction <= 1 or crop == "squash"):
            raise ConfigError(
                f"ImageData: crop_fraction must be above 0, at most 1, and goes with crop: centre, got {crop_fraction} "
                f"with {crop}."
            )
        if task == "generation" and not mean == std == "auto":
            raise ConfigError("ImageData: a generator reads bytes; leave mean and std away.")
        self.root, self.file, self.images, self.labels = root, file, images, labels
        self.torchvision, self.download, self.predict = torchvision, download, predict
        self.task, self.channels, self.mean, self.std = task, channels, mean, std
        self.size = _pair(size)
        self.crop, self.crop_fraction, self.interpolation = crop, crop_fraction, interpolation
        self.augment = _augment(augment)
        self.val_fraction, self.test_fraction, self.test_every = val_fraction, test_fraction, test_every
        self.balance, self.limit, self.bad = balance, limit, bad
        self.class_counts: dict[str, int] = {}
        """Training images of every class; after ``setup``."""

    def hint(self, split: Split) -> str:
        """What to do when a split is missing."""
        if split == "predict":
            return "give predict, a folder or files."
        if split == "train":
            return "give root, file, images or torchvision."
        return f"give {split} images, or {split}_fraction above 0."

    def prepare_data(self) -> None:
        """Download once for all processes of a machine."""
        if self.torchvision is not None and self.download:
            read_torchvision(self.torchvision, self.root or "data", download=True)

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """List the images, split them, and learn their facts from the training split."""
        known = spec if isinstance(spec, VisionSpec) else None
        tables: dict[str, ImageTable] = {}
        if splits - {"predict"}:
            for name, table in self._tables(known.task if known else self.task).items():
                tables[name] = table
        if "predict" in splits and self.predict:
            tables["predict"] = self._usable(read_unlabelled(self.predict))
        if known is None:
            if "train" not in tables:
                raise DataError(f"ImageData: no train data to learn the classes from; {self.hint('train')}")
            known = self._make_spec(tables["train"])
        items = {name: self._items(table, known, name) for name, table in tables.items()}
        if "train" in items and items["train"].labels is not None:
            counts = np.bincount(items["train"].labels, minlength=len(known.classes)).tolist()
            self.class_counts = dict(zip(known.classes, counts, strict=True))
        return known, items

    def _items(self, table: ImageTable, spec: VisionSpec, name: str) -> ImageItems:
        labels = encode_labels(table, spec) if spec.classes and name != "predict" else None
        if name != "train":
            return ImageItems(table, spec, eval_transform(spec), labels=labels, seed=self.seed)
        transform = train_transform(spec, self.augment)
        return ImageItems(table, spec, transform, labels=labels, seed=self.seed, balance=self.balance)

    # ------------------------------------------------------------ tables and splits

    def _tables(self, task: Kind) -> dict[SplitName, ImageTable]:
        table = self._usable(self._table(labelled=task == "classification"))
        if table.splits is None:
            tables: dict[SplitName, ImageTable] = {"train": table}
        else:
            names = np.array(table.splits)
            tables = {name: table.take(names == name) for name in ("train", "val", "test") if (names == name).any()}
        if "train" not in tables:
            return tables
        if self.test_every:
            if "test" in tables:
                raise ConfigError(
                    f"ImageData: test_every={self.test_every} makes the test set, but {table.source} has one; "
                    "remove one of them."
                )
            every = np.arange(len(tables["train"])) % self.test_every == self.test_every - 1
            tables["test"], tables["train"] = tables["train"].take(every), tables["train"].take(~every)
        shares: dict[SplitName, float] = {"test": self.test_fraction, "val": self.val_fraction}
        wanted = {name: share for name, share in shares.items() if name not in tables and share}
        if wanted:
            train = tables["train"]
            part = share_out(train.labels or [""] * len(train), list(wanted.values()), self.seed)
            for number, name in enumerate(wanted):
                tables[name] = train.take(part == number)
            tables["train"] = train.take(part == len(wanted))
        if self.limit:
            tables["train"] = self._limited(tables["train"], self.limit)
        for name, each in tables.items():
            if not len(each):
                raise DataError(
                    f"{each.source}: the {name} split must not be empty; give more images or another share."
                )
        return tables

    def _table(self, *, labelled: bool) -> ImageTable:
        if self.torchvision is not None:
            return read_torchvision(self.torchvision, self.root or "data", download=self.download)
        if self.root is not None:
            return read_folder(self.root, labelled=labelled)
        if self.file is not None:
            return read_csv(self.file, labelled=labelled)
        if self.images is not None:
            return read_idx(self.images, self.labels)
        raise DataError(f"ImageData: no images to read; {self.hint('train')}")

    def _limited(self, table: ImageTable, limit: int) -> ImageTable:
        labels = np.array(table.labels or [""] * len(table))
        order = np.argsort(item_uniform(self.seed, 0, np.arange(len(table)), _LIMIT), kind="stable")
        keep = np.zeros(len(table), dtype=np.bool_)
        for label in np.unique(labels):
            keep[order[labels[order] == label][:limit]] = True
        return table.take(keep)

    def _usable(self, table: ImageTable) -> ImageTable:
        """Leave out what cannot be decoded, when asked to."""
        if self.bad != "skip" or table.pixels is not None:
            return table
        keep = np.ones(len(table), dtype=np.bool_)
        for row in range(len(table)):
            try:
                table.image(row, 3)
            except ImageError:
                keep[row] = False
        if keep.all():
            return table
        if not keep.any():
            raise DataError(f"{table.source}: there must be an image that can be decoded, got {len(table)} bad ones.")
        names = [table.names[i] for i in np.flatnonzero(~keep)]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        log.warning("%s: left out %d damaged images: %s%s.", table.source, len(names), ", ".join(names[:5]), more)
        return table.take(keep)

    # ------------------------------------------------------------ facts

    def _make_spec(self, train: ImageTable) -> VisionSpec:
        classes: tuple[str, ...] = ()
        if train.labels is not None:
            present = set(train.labels)
            classes = tuple(c for c in train.classes if c in present) or class_names(train.labels)
        if self.task == "classification" and len(classes) < 2:
            raise DataError(
                f"{train.source}: there must be at least two classes in training, got {', '.join(classes) or 'none'}."
            )
        size, channels = self._size_and_channels(train)
        crop: Crop
        if self.crop == "auto":
            large = self.task == "classification" and self.crop_fraction is None and min(size) >= 384
            crop = "squash" if large else "centre"
        else:
            crop = self.crop
        photograph = self.task == "classification" and crop == "centre" and min(size) >= 128
        spec = VisionSpec(
            task=self.task,
            channels=channels,
            height=size[0],
            width=size[1],
            classes=classes,
            crop=crop,
            crop_fraction=self.crop_fraction or (0.875 if photograph else 1.0),
            interpolation=self.interpolation,
        )
        if self.task == "generation":
            return spec
        measured = self._measure(train, spec) if "auto" in (self.mean, self.std) else ([], [])
        return dataclasses.replace(
            spec,
            mean=_statistics("mean", self.mean, measured[0], channels),
            std=_statistics("std", self.std, measured[1], channels),
        )

    def _size_and_channels(self, train: ImageTable) -> tuple[tuple[int, int], Channels]:
        size = self.size
        if size is None and train.pixels is not None:
            size = (train.pixels.shape[1], train.pixels.shape[2])
        if size is not None and self.channels != "auto":
            return size, self.channels
        sizes, grey = set(), True
        for row in _sample(len(train), _SAMPLED, self.seed):
            image = _decoded(train, row, 3)
            sizes.add((image.height, image.width))
            grey = grey and is_grey(image)
        if size is None:
            own = next(iter(sizes)) if len(sizes) == 1 else None
            if own is not None and max(own) <= _OWN_SIZE:
                size = own
            elif self.task == "generation":
                raise ConfigError(
                    "ImageData: a generator needs a size where the images do not all have one of at most "
                    f"{_OWN_SIZE} pixels; give size, such as 32."
                )
        channels: Channels = self.channels if self.channels != "auto" else (1 if grey else 3)
        return size or (224, 224), channels

    def _measure(self, train: ImageTable, spec: VisionSpec) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel over the pixels of training images, in [0, 1]."""
        transform = eval_transform(spec)
        total, squares, count = np.zeros(spec.channels), np.zeros(spec.channels), 0
        for row in _sample(len(train), _MEASURED, self.seed):
            pixels = transform.prepare(_decoded(train, row, 3 if spec.channels == 3 else 1)) / 255.0
            total += pixels.sum((1, 2))
            squares += (pixels**2).sum((1, 2))
            count += pixels[0].size
        mean = total / count
        std = np.sqrt(np.maximum(squares / count - mean**2, 0))
        return mean.tolist(), np.maximum(std, 1 / 255).tolist()  # one colour alone would divide by nothing


def encode_labels(table: ImageTable, spec: VisionSpec) -> Ints:
    """Class numbers (N,).

    Raises:
        DataError: No classes, or one that the model does not know.
    """
    if table.labels is None:
        raise DataError(f"{table.source}: every image must have a class, got none; sort them into class folders.")
    number = {name: i for i, name in enumerate(spec.classes)}
    for name, label in zip(table.names, table.labels, strict=True):
        if label not in number:
            raise DataError(
                f"{table.source}, {name}: the class must be one of {', '.join(spec.classes)}, got {label!r}; is the "
                "data of another model?"
            )
    return np.array([number[label] for label in table.labels], dtype=np.int64)


def share_out(labels: Sequence[str], shares: Sequence[float], seed: int) -> Ints:
    """Share images out to parts, stratified by class.

    Args:
        labels: Class of each image.
        shares: Share of every part but the last, which takes what is left, and an image of every class at least.
        seed: Seed of the order.

    Returns:
        Part of each image, int64 (N,).
    """
    count = len(labels)
    draws = item_uniform(seed, 0, np.arange(count), _SPLIT)
    _, kind = np.unique(np.array(labels), return_inverse=True)
    part = np.zeros(count, dtype=np.int64)
    order = np.lexsort((draws, kind))
    for c, size in Counter(kind.tolist()).items():
        rows = order[kind[order] == c]
        start = item_uniform(seed, 1, [c], _SPLIT)[0]  # so that of rare classes now this, now that one gives an image
        at = (np.arange(size) + start) / size
        part[rows] = np.searchsorted(np.cumsum(shares), at, side="right")
        part[rows[-1]] = len(shares)  # every class can be learned
    return part


def _sample(count: int, most: int, seed: int) -> list[int]:
    if count <= most:
        return list(range(count))
    return np.sort(np.argsort(item_uniform(seed, 0, np.arange(count), _SAMPLE), kind="stable")[:most]).tolist()


def _decoded(table: ImageTable, row: int, channels: Channels) -> Any:
    try:
        return table.image(row, channels)
    except ImageError as e:
        raise _damaged(e) from None


def _damaged(error: ImageError) -> DataError:
    return DataError(
        f"{error.file}: {error.rule}; {error.advice}, remove it, or leave such images out with --data.bad skip."
    )


def _pair(size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or min(pair) < 1:
        raise ConfigError(f"ImageData: size must be a side, or height and width, of at least 1, got {size}.")
    return pair[0], pair[1]


def _augment(given: Augment | Mapping[str, Any] | None) -> Augment:
    if given is None or isinstance(given, Augment):
        return given or Augment()
    known = [f.name for f in dataclasses.fields(Augment)]
    for name in given:
        if name not in known:
            raise ConfigError(f"augment: there is no field {name!r}; fields: {', '.join(known)}.")
    return Augment(**given)


def _statistics(name: str, given: Statistics, measured: Sequence[float], channels: int) -> tuple[float, ...]:
    if given == "imagenet":
        values: Sequence[float] = IMAGENET_DEFAULT_MEAN if name == "mean" else IMAGENET_DEFAULT_STD
        return tuple(values) if channels == 3 else (sum(values) / 3,)
    values = tuple(measured) if given == "auto" else tuple(float(v) for v in given)
    if len(values) != channels or (name == "std" and min(values) <= 0):
        raise ConfigError(
            f"ImageData: {name} must be auto, imagenet, or {channels} numbers (std above 0), got {list(values)}."
        )
    return tuple(values)
