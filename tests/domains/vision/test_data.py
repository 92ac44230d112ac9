"""The data module of images: sources, splits, transforms, batches."""

import gzip
import logging
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.domains.vision.data import ImageData, share_out
from vertebra.domains.vision.sample import write_sample
from vertebra.domains.vision.sources import list_images, read_csv, read_folder, read_idx, read_torchvision
from vertebra.domains.vision.spec import VisionSpec
from vertebra.domains.vision.transforms import (
    Augment,
)
from vertebra.errors import ConfigError, DataError, UnknownNameError

RNG = np.random.default_rng(0)


def picture(seed=0, height=12, width=12, channels=3):
    shape = (height, width, 3) if channels == 3 else (height, width)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def write_images(folder, counts, **options):
    seed = 0
    for name, count in counts.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(seed, **options).save(folder / name / f"{i}.png")
            seed += 1
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "images", {"a": 30, "b": 20, "c": 10})


def write_idx(path, array, magic=None, compress=False):
    magic = 0x800 + array.ndim if magic is None else magic
    data = struct.pack(f">{1 + array.ndim}I", magic, *array.shape) + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(data) if compress else data)
    return str(path)


@pytest.fixture
def idx(tmp_path):
    """Keyword arguments: 100 grey images of 9 x 8 and their classes."""
    images = np.random.default_rng(0).integers(0, 256, (100, 9, 8))
    images[:, 0, 0] = np.arange(100)
    return {
        "images": write_idx(tmp_path / "images.idx", images),
        "labels": write_idx(tmp_path / "labels.idx.gz", np.arange(100) % 4, compress=True),
    }


def ready(**options):
    data = ImageData(**options)
    data.setup("")
    return data


def everything(items, epoch=0):
    return items.fetch(np.arange(len(items.lengths)), epoch)


def names(data):
    return {split: data.items(split).names for split in ("train", "val", "test")}


# ---------------------------------------------------------------- folders


def test_a_folder_of_classes(folder):
    (folder / "a" / "notes.txt").write_text("no image")
    (folder / "a" / ".hidden.png").touch()
    (folder / ".cache").mkdir()
    (folder / "b" / "deeper").mkdir()
    picture(99).save(folder / "b" / "deeper" / "x.PNG")
    table = read_folder(folder)
    assert (len(table), table.classes, table.splits) == (61, ("a", "b", "c"), None)
    assert table.names[:3] == ["a/0.png", "a/1.png", "a/2.png"]
    assert table.names[10] == "a/10.png"  # natural order
    assert ("b/deeper/x.PNG", "b") in zip(table.names, table.labels, strict=True)


def test_classes_are_sorted_naturally(tmp_path):
    assert read_folder(write_images(tmp_path / "n", {"10": 1, "9": 1, "x2": 1, "x10": 1})).classes == (
        *("9", "10"),
        *("x2", "x10"),
    )


def test_a_folder_with_splits_keeps_them(tmp_path):
    for split, count in (("train", 6), ("valid", 3), ("test", 2)):
        write_images(tmp_path / split, {"a": count, "b": count})
    data = ready(root=str(tmp_path), val_fraction=0.4)
    assert [len(data.items(s).names) for s in ("train", "val", "test")] == [12, 6, 4]
    assert data.items("val").names[0] == "valid/a/0.png"
    shutil.rmtree(tmp_path / "valid")
    assert [len(v) for v in names(ready(root=str(tmp_path), val_fraction=0.4)).values()] == [8, 4, 4]


def test_a_class_may_be_called_train(tmp_path):
    assert read_folder(write_images(tmp_path, {"train": 2, "car": 2})).classes == ("car", "train")


def test_folders_that_are_refused(folder, tmp_path):
    with pytest.raises(DataError, match="none: this must be a folder with images"):
        read_folder(tmp_path / "none")
    (folder / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: a class folder must hold an image \(.*\), got none; remove"):
        read_folder(folder)
    with pytest.raises(DataError, match="empty: there must be class folders with images"):
        read_folder(folder / "empty")
    with pytest.raises(DataError, match=r"images must lie in one folder a class, got \d+\.png without one"):
        read_folder(folder / "a")
    shutil.rmtree(folder / "empty")
    picture().save(folder / "loose.png")
    with pytest.raises(DataError, match=r"images must not lie beside class folders, got loose\.png"):
        read_folder(folder)
    with pytest.raises(DataError, match="at least two classes in training, got a"):
        ready(root=str(write_images(tmp_path / "one", {"a": 20})))


# ---------------------------------------------------------------- tables


def write_csv(folder, text, name="t.csv"):
    (folder / name).write_text(text)
    return folder / name


def test_a_table_of_paths(folder):
    rows = [f"{k}/{i}.png,{k},{s}" for k in "ab" for i, s in enumerate(("train", "train", "val", "test"))]
    path = write_csv(folder, "\n".join(["path,label,split", *rows]))
    data = ready(file=str(path))
    assert names(data) == {
        "train": ["a/0.png", "a/1.png", "b/0.png", "b/1.png"],
        "val": ["a/2.png", "b/2.png"],
        "test": ["a/3.png", "b/3.png"],
    }
    assert everything(data.items("train"))["labels"].tolist() == [0, 0, 1, 1]
    tabs = write_csv(folder, path.read_text().replace(",", "\t"), "t.tsv")
    assert read_csv(tabs).names == read_csv(path).names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\na/0.png\n", r"t\.csv: there must be a column 'label', got path"),
        ("", r"t\.csv: there must be a column 'path', got none"),
        ("path,label\n", r"t\.csv: there must be at least one row"),
        ("path,label\na/0.png,a\na/no.png,a\n", r"t\.csv, line 3: path must name a file, .* got 'a/no\.png'"),
        (
            "path,label\na/0.png,a\na/0.png,a\n",
            r"t\.csv, line 3: a path must come once, got 'a/0\.png' \(also line 2\)",
        ),
        (f"path,label\na/0.png,{'a' * 200_000}\n", r"t\.csv, line 2: this is not a row of a CSV \(field larger"),
        (f"path,label\n{'a' * 2000},a\n", r"t\.csv, line 2: path must name a file"),
        ("path,label\na/0.png,\n", r"t\.csv, line 2: label must not be empty"),
        ("path,label,split\na/0.png,a,later\n", r"line 2: split must be train, val or test, got 'later'"),
    ],
)
def test_tables_that_are_refused(folder, text, message):
    with pytest.raises(DataError, match=message):
        read_csv(write_csv(folder, text))


def test_a_binary_file_called_csv(folder):
    shutil.copy(folder / "a" / "0.png", folder / "image.csv")
    with pytest.raises(DataError, match=r"image\.csv: this must be a CSV or TSV in UTF-8, got a binary file"):
        read_csv(folder / "image.csv")
    with pytest.raises(DataError, match=r"none\.csv: the file cannot be read"):
        read_csv(folder / "none.csv")


# ---------------------------------------------------------------- idx and torchvision


def test_idx_files_keep_their_size_and_order(idx):
    data = ready(**idx, test_every=5, val_fraction=0)
    assert data.items("test").names == [str(i) for i in range(4, 100, 5)]
    assert data.spec.classes == ("0", "1", "2", "3")
    assert (data.spec.channels, data.spec.height, data.spec.width) == (1, 9, 8)
    batch = everything(data.items("test"))
    assert batch["images"].shape == (20, 1, 9, 8)
    assert torch.allclose(
        batch["images"][:, 0, 0, 0], (torch.arange(4, 100, 5) / 255 - data.spec.mean[0]) / data.spec.std[0], atol=1e-6
    )
    assert batch["labels"].tolist() == [i % 4 for i in range(4, 100, 5)]


def test_colour_idx(tmp_path):
    path = write_idx(tmp_path / "c.idx", np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3)))
    assert np.asarray(read_idx(path).image(2, 3)).shape == (5, 6, 3)


def test_idx_files_that_are_refused(idx, tmp_path):
    images, labels = idx["images"], idx["labels"]
    with pytest.raises(DataError, match=r"magic number 2051 for grey images, got 2049; are images and labels"):
        read_idx(labels, images)
    with pytest.raises(DataError, match="magic number 2049 for labels, got 2051"):
        read_idx(images, images)
    few = write_idx(tmp_path / "few.idx", np.arange(7))
    with pytest.raises(DataError, match="one label an image, got 7 labels and 100 images"):
        read_idx(images, few)
    cut = tmp_path / "cut.idx"
    with open(images, "rb") as stream:
        cut.write_bytes(stream.read(1000))
    with pytest.raises(DataError, match=r"cut\.idx: there must be 7,200 bytes for 100 x 9 x 8, got 984; the file is"):
        read_idx(cut)
    with open(labels, "rb") as stream:
        cut.write_bytes(stream.read()[:-12])
    with pytest.raises(DataError, match="the gzip file is truncated or damaged"):
        read_idx(images, cut)
    cut.write_bytes(b"")
    with pytest.raises(DataError, match="got an empty file"):
        read_idx(cut)


@pytest.mark.realdata
def test_real_digits(shared_data):
    stem = str(shared_data / "vision" / "mnist_t10k" / "t10k-")
    data = ready(
        images=f"{stem}images-idx3-ubyte.gz", labels=f"{stem}labels-idx1-ubyte.gz", test_every=5, val_fraction=0
    )
    assert [len(data.items(s).names) for s in ("train", "test")] == [8000, 2000]
    assert data.spec.classes == tuple("0123456789")
    assert data.spec.mean[0] == pytest.approx(0.1307, abs=0.01)
    assert data.spec.std[0] == pytest.approx(0.3081, abs=0.01)
    test = np.bincount(everything(data.items("test"))["labels"])
    total = np.array(list(data.class_counts.values())) + test
    assert total.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]


def test_torchvision_reads_what_is_there(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 60), ("t10k", 20)):
        write_idx(raw / f"{stem}-images-idx3-ubyte", np.random.default_rng(1).integers(0, 256, (count, 28, 28)))
        write_idx(raw / f"{stem}-labels-idx1-ubyte", np.arange(count) % 10)
    data = ready(torchvision="MNIST", root=str(tmp_path))
    assert len(data.items("test").names) == 20
    assert len(data.items("train").names) + len(data.items("val").names) == 60
    assert data.spec.classes[3] == "3 - three"
    assert everything(data.items("test"))["images"].shape == (20, 1, 28, 28)


def test_torchvision_sets_that_are_refused(tmp_path):
    for name in ("MNIST", "CIFAR10", "SVHN"):
        with pytest.raises(DataError, match=rf"torchvision {name}: it is not in .*; give download: true"):
            read_torchvision(name, tmp_path)
    with pytest.raises(UnknownNameError, match=r"unknown torchvision data set 'CIFAR11'\. Did you mean 'CIFAR10'"):
        read_torchvision("CIFAR11", tmp_path)


def test_torchvision_sets_of_files_stay_files(tmp_path, monkeypatch):
    import torchvision.datasets

    class Few:
        def __init__(self, root, split="train", download=False):
            if split not in ("train", "test"):
                raise ValueError(split)
            self.targets = torch.tensor([0, 1, 1])
            self.classes = ["zero", "one"]
            self.seed = len(split)

        def __len__(self):
            return 3

        def __getitem__(self, i):
            return picture(self.seed + i), int(self.targets[i])

    monkeypatch.setattr(torchvision.datasets, "DTD", Few)
    table = read_torchvision("DTD", tmp_path)
    assert (table.pixels, table.labels) == (None, ["zero", "one", "one"] * 2)
    test = table.take(np.array([s == "test" for s in table.splits]))
    assert np.array_equal(np.asarray(test.image(1, 3)), np.asarray(picture(5)))


# ---------------------------------------------------------------- splits


def test_splits_are_stratified_disjoint_and_deterministic(folder):
    options = {"root": str(folder), "val_fraction": 0.2, "test_fraction": 0.3}
    parts = names(ready(**options))
    assert sorted(n for part in parts.values() for n in part) == sorted(read_folder(folder).names)
    counts = {s: [sum(n[0] == c for n in part) for c in "abc"] for s, part in parts.items()}
    assert counts == {"train": [15, 10, 5], "val": [6, 4, 2], "test": [9, 6, 3]}
    assert names(ready(**options)) == parts
    assert names(ready(**options, seed=1)) != parts


def test_every_class_keeps_a_training_image():
    part = share_out([str(i) for i in range(50)], [0.3, 0.3], 0)
    assert (part == 2).all()


def test_test_every_and_a_test_set_contradict_each_other(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / split, {"a": 5, "b": 5})
    with pytest.raises(ConfigError, match=r"test_every=5 makes the test set, but .* has one; remove one of them"):
        ready(root=str(tmp_path), test_every=5)


def test_limit_is_a_number_of_training_images_per_class(folder):
    data = ready(root=str(folder), limit=7)
    assert data.class_counts == {"a": 7, "b": 7, "c": 7}
    assert len(data.items("test").names) == 6


def test_an_empty_split_is_refused(tmp_path):
    root = str(write_images(tmp_path, {"a": 1, "b": 1}))
    with pytest.raises(DataError, match="the test split must not be empty; give more images or another share"):
        ready(root=root)
    with pytest.raises(DataError, match="no test data; give test images, or test_fraction above 0"):
        ready(root=root, val_fraction=0, test_fraction=0).items("test")


def test_balance_draws_every_class_equally_often(folder):
    items = ready(root=str(folder), balance=True).items("train")
    assert len(items.lengths) == 48
    first, second = (everything(items, epoch) for epoch in (0, 1))
    assert np.bincount(first["labels"]).tolist() == [16, 16, 16]
    assert first["names"] != second["names"]
    assert first["names"] == everything(items, 0)["names"]
    assert [n[0] for n in first["names"][:4]] == ["a", "b", "c", "a"]
    assert first["index"].tolist() == list(range(48))


# ---------------------------------------------------------------- spec


def test_the_spec_of_photographs(tmp_path):
    root = write_images(tmp_path, {"a": 5, "b": 5})
    picture(1, 20, 30).save(root / "a" / "0.png")
    options = {"root": str(root), "test_fraction": 0, "val_fraction": 0}
    spec = ready(**options).spec
    assert (spec.height, spec.width, spec.crop, spec.crop_fraction) == (224, 224, "centre", 0.875)
    spec = ready(**options, size=384, mean="imagenet", std="imagenet").spec
    assert (spec.height, spec.crop, spec.crop_fraction) == (384, "squash", 1.0)
    assert spec.mean == (0.485, 0.456, 0.406)
    spec = ready(**options, size=(16, 24), channels=1, mean=[0.5], std=[0.25]).spec
    assert (spec.height, spec.width, spec.channels, spec.mean, spec.std) == (16, 24, 1, (0.5,), (0.25,))
    with pytest.raises(ConfigError, match="mean must be auto, imagenet, or 3 numbers"):
        ready(**options, mean=[0.5])
    with pytest.raises(ConfigError, match="a generator needs a size"):
        ready(**options, task="generation")
    assert len(ready(**options, mean="imagenet", channels=1).spec.mean) == 1


def test_measured_statistics_are_those_of_the_training_pixels(folder):
    data = ready(root=str(folder))
    pixels = np.stack([np.asarray(data.items("train").table.image(i, 3)) for i in range(48)]) / 255
    assert data.spec.mean == pytest.approx(pixels.mean((0, 1, 2)))
    assert data.spec.std == pytest.approx(pixels.std((0, 1, 2)))
    images = everything(data.items("train"))["images"]
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-3)


def test_channels_are_found(tmp_path):
    root = write_images(tmp_path, {"a": 10, "b": 10}, channels=1)
    Image.open(root / "a" / "0.png").convert("RGB").save(root / "a" / "0.png")  # grey all the same
    assert ready(root=str(root)).spec.channels == 1
    for i in range(3):
        picture().save(root / "a" / f"{i}.png")
    assert ready(root=str(root), val_fraction=0, test_fraction=0).spec.channels == 3


def test_a_known_spec_holds(folder, tmp_path):
    spec = VisionSpec(
        task="classification", channels=1, height=6, width=5, classes=("c", "b", "a"), mean=(0.1,), std=(0.2,)
    )
    data = ImageData(root=str(folder), size=99)
    data.use_spec(spec)
    data.setup("fit")
    assert data.spec == spec
    batch = data.items("train").fetch(np.array([0]), 0)
    assert (batch["images"].shape, batch["labels"].tolist()) == ((1, 1, 6, 5), [2])
    assert list(data.class_counts) == ["c", "b", "a"]
    data = ImageData(root=str(write_images(folder.parent / "more", {"a": 10, "z": 10})))
    data.use_spec(spec)
    with pytest.raises(DataError, match=r"more, z/\d\.png: the class must be one of c, b, a, got 'z'"):
        data.setup("fit")
    data = ImageData(predict=str(folder))
    data.use_spec(spec)
    data.setup("predict")
    batch = everything(data.items("predict"))
    assert "labels" not in batch
    assert batch["names"][0] == "a/0.png"
    assert batch["images"].shape == (60, 1, 6, 5)


def test_predict_takes_files_and_says_what_is_missing(folder):
    spec = VisionSpec(task="generation", channels=3, height=6, width=6)
    data = ImageData(predict=[str(folder / "a" / "0.png"), str(folder / "b")])
    data.use_spec(spec)
    data.setup("predict")
    assert len(data.items("predict").names) == 21
    (folder / "void").mkdir()
    for what, message in (("void", "there must be an image in the folder"), ("no.png", "there is no such file")):
        data = ImageData(predict=str(folder / what))
        data.use_spec(spec)
        with pytest.raises(DataError, match=message):
            data.setup("predict")
    with pytest.raises(DataError, match="no train data to learn the classes from"):
        ImageData(predict=str(folder)).setup("predict")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give one of root, file, images with labels, or torchvision, got none"),
        ({"root": "a", "file": "b"}, "got root and file"),
        ({"images": "a"}, "images needs labels to classify"),
        ({"labels": "a", "root": "b"}, "labels needs images"),
        ({"root": "a", "size": 0}, "size must be a side"),
        ({"root": "a", "test_every": 1}, "test_every must be 0 or at least 2"),
        ({"root": "a", "channels": 2}, "channels must be one of auto, 1, 3, got 2"),
        ({"root": "a", "val_fraction": 0.6, "test_fraction": 0.5}, "below 1 together"),
        ({"root": "a", "crop": "squash", "crop_fraction": 0.5}, "goes with crop: centre"),
        ({"root": "a", "task": "generation", "mean": [0.5]}, "a generator reads bytes"),
        ({"root": "a", "augment": {"flip": 1}}, "there is no field 'flip'; fields: policy"),
        ({"root": "a", "augment": {"policy": "heavy"}}, "policy must be none, light or imagenet, got 'heavy'"),
        ({"root": "a", "augment": {"hflip": 2}}, "hflip must be from 0 to 1"),
        ({"root": "a", "augment": {"scale": [2, 1]}}, "scale must be two numbers above 0"),
        ({"root": "a", "augment": {"degrees": -1}}, "degrees must be from 0 to 180"),
    ],
)
def test_settings_that_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ImageData(**options)


# ---------------------------------------------------------------- damage


def test_a_damaged_image_stops_or_is_left_out(folder, caplog):
    for i in range(7):
        (folder / "a" / f"{i}.png").write_bytes(b"" if i else b"text")
    data = ImageData(root=str(folder), size=12, channels=3, mean="imagenet", std="imagenet")
    data.setup("fit")
    with pytest.raises(
        DataError, match=r"a/\d\.png: .*; .*, remove it, or leave such images out with --data\.bad skip"
    ):
        everything(data.items("train"))
    with caplog.at_level(logging.WARNING, "vertebra"):
        data = ready(root=str(folder), bad="skip")
    assert sum(map(len, names(data).values())) == 53
    (record,) = caplog.records
    assert "left out 7 damaged images: a/0.png, a/1.png, a/2.png, a/3.png, a/4.png and 2 more." in record.getMessage()
    everything(data.items("train"))


# ---------------------------------------------------------------- generation


def test_generators_get_bytes_and_classes(folder):
    data = ready(root=str(folder), task="generation")
    batch = everything(data.items("train"))
    assert (batch["images"].dtype, batch["images"].shape) == (torch.uint8, (48, 3, 12, 12))
    assert data.spec.classes == ("a", "b", "c")
    assert data.spec.mean == ()
    assert batch["labels"].shape == (48,)
    flipped = ready(root=str(folder), task="generation", augment=Augment(hflip=1.0))
    assert torch.equal(everything(flipped.items("train"))["images"], batch["images"].flip(-1))
    assert torch.equal(everything(flipped.items("val"))["images"], everything(data.items("val"))["images"])
    light = ready(root=str(folder), task="generation", augment=Augment(policy="light"))
    assert everything(light.items("train"))["images"].dtype == torch.uint8
    with pytest.raises(ConfigError, match="policy imagenet is for classifiers"):
        ready(root=str(folder), task="generation", augment={"policy": "imagenet"})


def test_generators_need_no_classes(folder):
    data = ready(root=str(folder / "a"), task="generation", size=8)
    batch = everything(data.items("train"))
    assert "labels" not in batch
    assert data.spec.classes == ()
    assert batch["images"].shape[1:] == (3, 8, 8)


# ---------------------------------------------------------------- batches


def test_the_layout_of_a_batch(folder):
    data = ready(root=str(folder), batch_size=7)
    batch = next(iter(data.train_dataloader()))
    assert list(batch) == ["index", "epoch", "names", "images", "labels"]
    assert (batch["index"].dtype, batch["labels"].dtype, batch["images"].dtype) == (
        *(torch.int64, torch.int64),
        torch.float32,
    )
    assert batch["epoch"] == 0
    assert batch["images"].shape == (7, 3, 12, 12)
    assert [data.items("train").names[i] for i in batch["index"]] == batch["names"]


@pytest.mark.parametrize("policy", ["light", "imagenet"])
def test_batches_do_not_depend_on_workers(folder, policy):
    def batches(workers, epoch):
        data = ready(root=str(folder), augment={"policy": policy}, batch_size=20, num_workers=workers)
        loader = data.train_dataloader()
        loader.batch_sampler.set_epoch(epoch)
        return list(loader)

    alone, shared = batches(0, 1), batches(2, 1)
    assert [b["names"] for b in alone] == [b["names"] for b in shared]
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(alone, shared, strict=True))
    assert [b["names"] for b in alone] != [b["names"] for b in batches(0, 0)]


def test_an_epoch_is_shuffled_and_complete(idx):
    data = ready(**idx, val_fraction=0, test_fraction=0, batch_size=10)
    order = torch.cat([b["index"] for b in data.train_dataloader()]).tolist()
    assert sorted(order) == list(range(100))
    assert order != sorted(order)
    assert max(order[:10]) - min(order[:10]) > 40


def test_items_survive_pickling_and_keep_what_they_decoded(folder, monkeypatch):
    items = ready(root=str(folder)).items("train")
    first = everything(items)
    again = pickle.loads(pickle.dumps(items))
    assert torch.equal(everything(again)["images"], first["images"])
    shutil.rmtree(folder)
    assert torch.equal(everything(items)["images"], first["images"])
    with pytest.raises(DataError, match="there is no such file"):
        everything(pickle.loads(pickle.dumps(items)))


def test_the_cache_has_an_end(folder, monkeypatch):
    monkeypatch.setattr("vertebra.domains.vision.data.CACHE_BYTES", 1000)
    items = ready(root=str(folder)).items("train")
    everything(items)
    assert len(items._cache) == 2  # 432 bytes each


def test_the_sample_is_read(tmp_path):
    write_sample(tmp_path)
    data = ready(root=str(tmp_path / "shapes"))
    assert (data.spec.height, data.spec.channels, len(data.spec.classes)) == (32, 3, 6)
    assert len(ready(file=str(tmp_path / "labels.csv")).items("train").names) == 84
    unsorted = ImageData(predict=str(tmp_path / "unsorted"))
    unsorted.use_spec(data.spec)
    unsorted.setup("predict")
    assert everything(unsorted.items("predict"))["images"].shape == (12, 3, 32, 32)
    assert len(list_images(tmp_path / "damaged")) == 10
