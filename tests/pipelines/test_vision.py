"""vision/classify: images of every kind, folders, known classes, ranks, pictures, and every bad input."""

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.classification import MulticlassCalibrationError

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.saving import save_model
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.images import read_image
from vertebra.domains.vision.model import ImageClassifier
from vertebra.domains.vision.sample import CLASSES, write_sample
from vertebra.domains.vision.sources import list_images
from vertebra.domains.vision.spec import VisionSpec
from vertebra.domains.vision.transforms import eval_transform
from vertebra.errors import ConfigError, DataError
from vertebra.pipelines import base, figures
from vertebra.pipelines.base import pipeline
from vertebra.pipelines.demo import vision as demo
from vertebra.pipelines.demo.base import Demo
from vertebra.pipelines.report import Report
from vertebra.pipelines.vision import Classify, Evaluation
from vertebra.pipelines.vision_generate import Generate


def made(backbone="illama_test", **facts):
    torch.manual_seed(1)
    facts = {"channels": 3, "height": 16, "width": 16, "classes": CLASSES, **facts}
    facts |= {"mean": (0.5,) * facts["channels"], "std": (0.25,) * facts["channels"]}
    model = ImageClassifier(create_backbone(backbone), VisionSpec(task="classification", **facts), patch_size=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return str(save_model(model, tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder)
    for kind in CLASSES:
        for file in sorted((folder / "shapes" / kind).iterdir())[14:]:
            file.unlink()
    return folder


def rows(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def direct(model, path):
    with torch.inference_mode():
        image = read_image(path, model.spec.channels)
        return model(eval_transform(model.spec)(image)[None])[0].softmax(-1).numpy()


def is_png(path):
    with Image.open(path) as image:
        image.load()
        return image.size


def test_every_kind_of_image_gives_the_models_own_scores_in_order(model, saved, sample, tmp_path):
    out = tmp_path / "out.csv"
    assert main(["run", "vision/classify", str(sample / "unsorted"), "-o", str(out), "--model", saved]) == 0
    files = list_images(sample / "unsorted")
    found = rows(out)
    assert list(found[0]) == ["file", "prediction", "score", *(f"score_{c}" for c in CLASSES)]
    assert [r["file"] for r in found] == [str(f) for f in files]
    for row, line, file in zip(found, lines(tmp_path / "out.csv.jsonl"), files, strict=True):
        scores = direct(model, file)
        np.testing.assert_allclose([float(row[f"score_{c}"]) for c in CLASSES], scores, atol=2e-5)
        assert row["prediction"] == line["prediction"] == CLASSES[scores.argmax()]
        assert float(row["score"]) == pytest.approx(scores.max(), abs=2e-5)
        with Image.open(file) as image:
            assert (line["width"], line["height"], line["mode"]) == (*image.size, image.mode)
        assert line["scores"] == {c: float(row[f"score_{c}"]) for c in CLASSES}
        assert line["file"] == str(file)
    assert {line["mode"] for line in lines(tmp_path / "out.csv.jsonl")} >= {"L", "P", "CMYK", "I;16", "RGB", "RGBA"}
    summary = json.loads((tmp_path / "out.csv.json").read_text())
    assert (summary["model"], summary["images"], summary["size"]) == (saved, 12, [16, 16])
    assert sum(summary["predicted"].values()) == 12
    assert "accuracy" not in summary
    assert is_png(tmp_path / "out.csv.png")[0] > 900
    assert {p.name for p in tmp_path.iterdir()} == {"out.csv", *(f"out.csv.{e}" for e in ("jsonl", "json", "png"))}


def test_damaged_images_are_listed_and_the_others_classified(saved, sample, tmp_path, capsys):
    out = tmp_path / "out.csv"
    other = tmp_path / "notes.txt"
    other.write_text("not an image\n")
    code = main(["run", "vision/classify", str(sample / "damaged"), str(other), "-o", str(out), "--model", saved])
    assert code == 3
    assert "6 records done, 5 bad (listed in " in capsys.readouterr().out
    assert [r["file"] for r in rows(out)] == [str(sample / "damaged" / f"{kind}-good.png") for kind in CLASSES]
    told = {e["file"]: (e["rule"], e["advice"]) for e in lines(tmp_path / "out.csv.errors.jsonl")}
    folder = sample / "damaged"
    assert list(told) == [
        *(str(folder / n) for n in ("empty.png", "text.png", "truncated.jpg", "truncated.png")),
        str(other),
    ]
    assert told[str(folder / "empty.png")] == ("the file is empty", "copy it again")
    assert told[str(other)][0] == "this is not an image of a format that Pillow reads"
    assert "damaged" in told[str(folder / "truncated.jpg")][0]


def test_folders_are_read_below_in_natural_order_without_other_files(model, sample, tmp_path):
    source = sample / "shapes" / "star" / "0000.png"
    names = ["2.png", "10.png", "deep/1.JPG", "a10.webp", "a9.bmp"]
    for name in [*names, ".hidden.png", ".cache/x.png"]:
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.open(source).save(tmp_path / "in" / name, None if name != "deep/1.JPG" else "JPEG")
    (tmp_path / "in" / "readme.txt").write_text("no image")
    out = tmp_path / "in" / "out.csv"
    expected = ["2.png", "10.png", "a9.bmp", "a10.webp", "deep/1.JPG"]
    for _ in range(2):  # the second run must not read what the first one drew
        result = pipeline("vision/classify", model).run([source, tmp_path / "in"], out)
        assert (result.good, result.bad) == (6, 0)
        assert [r["file"] for r in rows(out)] == [str(source), *(str(tmp_path / "in" / n) for n in expected)]
        assert (tmp_path / "in" / "out.csv.png").is_file()


def test_known_classes_give_metrics(model, sample, tmp_path):
    out = tmp_path / "out.csv"
    pipeline("vision/classify", model, labels="folder", batch_size=5).run([sample / "shapes"], out)
    found = rows(out)
    assert len(found) == 84
    assert all(r["true"] == r["file"].split("/")[-2] for r in found)
    assert all(line["true"] == line["file"].split("/")[-2] for line in lines(tmp_path / "out.csv.jsonl"))
    scores = torch.tensor([[float(r[f"score_{c}"]) for c in CLASSES] for r in found])
    truth = torch.tensor([CLASSES.index(r["true"]) for r in found])
    summary = json.loads((tmp_path / "out.csv.json").read_text())
    assert summary["labelled"] == 84
    assert summary["accuracy"] == pytest.approx((scores.argmax(1) == truth).float().mean().item())
    top5 = (scores.topk(5).indices == truth[:, None]).any(1).float().mean().item()
    assert summary["top5_accuracy"] == pytest.approx(top5)
    error = MulticlassCalibrationError(6, n_bins=15)(scores, truth).item()
    assert summary["calibration_error"] == pytest.approx(error, abs=1e-5)
    counts = summary["confusion"]
    for row in found:
        counts[row["true"]][row["prediction"]] -= 1
    assert not any(n for row in counts.values() for n in row.values())
    assert is_png(tmp_path / "out.csv.png")
    assert is_png(tmp_path / "out.csv.confusion.png")


def test_the_folder_of_a_link_is_its_class(model, sample, tmp_path):
    link = tmp_path / "star" / "x.png"
    link.parent.mkdir()
    link.symlink_to(sample / "shapes" / "ring" / "0000.png")
    pipeline("vision/classify", model, labels="folder").run([link], tmp_path / "out.csv")
    assert [r["true"] for r in rows(tmp_path / "out.csv")] == ["star"]


def test_a_perfect_and_a_hopeless_evaluation():
    evaluation = Evaluation(("a", "b"))
    evaluation.add("a", np.array([1.0, 0.0]))
    assert evaluation.summary() == {
        "labelled": 1, "accuracy": 1.0, "top5_accuracy": 1.0, "calibration_error": 0.0, "confusion": {"a": {"a": 1}},
    }  # fmt: skip
    many = Evaluation(tuple("abcdefg"))
    many.add("a", np.array([0.0, 0.4, 0.2, 0.1, 0.1, 0.1, 0.1]))
    assert many.summary()["top5_accuracy"] == 0
    assert many.summary()["calibration_error"] == pytest.approx(0.4)
    assert many.summary()["confusion"] == {"a": {"b": 1}}


def test_folders_that_are_no_class(model, sample, tmp_path):
    with pytest.raises(
        ConfigError,
        match=r"folders must be called like the model's classes \(circle, .*\), got 'unsorted' of .*; rename",
    ):
        pipeline("vision/classify", model, labels="folder").run([sample / "unsorted"], tmp_path / "out.csv")
    assert not list(tmp_path.iterdir())


def test_top_classes_instead_of_columns(model, sample, tmp_path):
    out = tmp_path / "out.csv"
    pipeline("vision/classify", model, top=2).run([sample / "shapes" / "ring"], out)
    for row, line in zip(rows(out), lines(tmp_path / "out.csv.jsonl"), strict=True):
        assert list(row)[3:] == ["class_1", "score_1", "class_2", "score_2"]
        scores = direct(model, row["file"])
        best = np.argsort(-scores)[:2]
        assert [row["class_1"], row["class_2"]] == [CLASSES[i] for i in best] == list(line["scores"])
        np.testing.assert_allclose([float(row["score_1"]), float(row["score_2"])], scores[best], atol=2e-5)


def test_another_size(model, sample, tmp_path):
    path = sample / "unsorted" / "star-large.jpg"
    found = pipeline("vision/classify", model, size=32)(path)
    with torch.inference_mode():
        spec = VisionSpec(**{**vars(model.spec), "height": 32, "width": 32})
        expected = model(eval_transform(spec)(read_image(path, 3))[None])[0].softmax(-1)
    np.testing.assert_allclose(list(found.scores.values()), expected, atol=2e-5)
    for size, near in ((30, 32), (1, 4), (0, 4), (-8, 4)):
        text = rf"^vision/classify: size must be a multiple of .* patch_size \(4\), got {size}; for example {near}\.$"
        with pytest.raises(ConfigError, match=text):
            pipeline("vision/classify", model, size=size)


def test_in_python(model, sample):
    classify = pipeline("vision/classify", model)
    path = sample / "unsorted" / "ring-lossless.webp"
    expected = classify(str(path))
    assert expected.value == max(expected.scores, key=expected.scores.get)
    assert (expected.name, expected.details["mode"], expected.details["width"]) == ("ring-lossless.webp", "RGB", 32)
    with Image.open(path) as image:
        array = np.asarray(image.convert("RGB"))
        for value in (path, path.read_bytes(), image, array, np.dstack([array, np.full((32, 32), 255, np.uint8)])):
            assert list(classify(value).scores.values()) == pytest.approx(list(expected.scores.values()), abs=1e-6)
    grey = classify([array[..., 0], array[..., :1]])
    assert grey[0].scores == grey[1].scores
    assert [p.name for p in grey] == ["image_1", "image_2"]
    assert [p.name for p in classify(path.parent)] == [p.name for p in list_images(path.parent)]
    assert len(expected.figure().axes) == 2
    assert repr(expected).startswith(f"ImagePrediction(ring-lossless.webp = {expected.value}; {expected.value}: 0.")
    assert figures.png_bytes(grey[0].figure()).startswith(b"\x89PNG")
    assert json.loads(expected.to_json())["file"] == str(path)
    upright = classify(sample / "unsorted" / "cross-rotated.jpg")
    with Image.open(sample / "unsorted" / "cross-rotated.jpg") as image:
        assert list(classify(image).scores.values()) == pytest.approx(list(upright.scores.values()), abs=1e-6)


def test_values_that_are_no_images(model, sample, tmp_path):
    classify = pipeline("vision/classify", model)
    for value, text in (
        ("none.png", r"^none\.png: no such file; check the name\.$"),
        (b"", r"^record 'image_1': the file is empty; copy it again\.$"),
        (np.zeros((4, 4)), r"must be uint8 \(H, W\) or \(H, W, 1, 3 or 4\), got float64 \(4, 4\); scale it"),
        (np.zeros((3, 4, 5), np.uint8), r"got uint8 \(3, 4, 5\); scale it to 0 to 255 and put the channels last\.$"),
        (np.zeros((0, 4), np.uint8), r"must hold pixels, got \(0, 4\); leave it out\.$"),
        (7, r"takes files, folders, images of Pillow, bytes or arrays, got int\.$"),
        (sample / "damaged" / "text.png", r"text\.png: this is not an image of a format"),
        (tmp_path, r"holds no image \(\.png, \.jpg, \.webp, \.\.\.\); check the name\.$"),
    ):
        with pytest.raises(DataError, match=text):
            classify(value)
    with Image.open(sample / "damaged" / "truncated.jpg") as image, pytest.raises(DataError, match="damaged"):
        classify(image)


def test_what_cannot_be_done(model, sample, tmp_path):
    out = tmp_path / "out.csv"
    for options, text in (
        ({"top": 7}, r"top must be from 1 to the model's 6 classes, or 0 for all, got 7\.$"),
        ({"labels": "file"}, r"labels must be 'folder', or left out, got 'file'\.$"),
    ):
        with pytest.raises(ConfigError, match=text):
            pipeline("vision/classify", model, **options)
    with pytest.raises(
        ConfigError, match=r"attention layers, got one with a hybrid backbone that has none; leave it out"
    ):
        pipeline("vision/classify", made("hybrid_test,pattern=M"), ranks=True)
    with pytest.raises(
        ConfigError, match=r"this model has no classes, it gives features alone; pass another --model\.$"
    ):
        pipeline("vision/classify", made(classes=()))
    with pytest.raises(DataError, match=r"holds no image"):
        pipeline("vision/classify", model).run([tmp_path], out)
    with pytest.raises(DataError, match=r"no such file; check the name\.$"):
        pipeline("vision/classify", model).run([tmp_path / "none"], out)
    bad = [sample / "damaged" / f for f in ("empty.png", "text.png", "truncated.jpg", "truncated.png")]
    with pytest.raises(DataError, match=r"none of 4 records could be used, all are listed in"):
        pipeline("vision/classify", model).run(bad, out)


def test_ranks_of_at_most_thirty_images(model, sample, tmp_path):
    out = tmp_path / "out.csv"
    arguments = [str(sample / "shapes"), "-o", str(out), "--ranks", "--labels", "folder", "--top", "3"]
    folder = save_model(model, tmp_path / "model")
    assert main(["run", "vision/classify", *arguments, "--model", str(folder)]) == 0
    found = rows(tmp_path / "out.csv.ranks.csv")
    assert [(r["layer"], r["head"], r["size"]) for r in found] == [
        (f"layers.{n}.mixer", str(h), "17") for n in range(2) for h in range(2)
    ]
    from vertebra.domains.vision.diagnostics import attention_ranks

    files = [list_images(sample / "shapes")[i] for i in sorted({round(i) for i in np.linspace(0, 83, 30)})]
    pixels = [eval_transform(model.spec)(read_image(f, 3)) for f in files]
    expected = attention_ranks(model, torch.stack(pixels))
    assert [float(r["rank"]) for r in found] == pytest.approx([r.rank for r in expected], rel=1e-4)
    assert is_png(tmp_path / "out.csv.ranks.png")


def test_grey_models_and_batches(sample, tmp_path):
    grey = made(channels=1, height=12, width=20)
    for batch in (1, 7):
        work = pipeline("vision/classify", grey, batch_size=batch)
        assert work.run([sample / "unsorted"], tmp_path / f"{batch}.csv").good == 12
    one, many = rows(tmp_path / "1.csv"), rows(tmp_path / "7.csv")
    assert [r["file"] for r in one] == [r["file"] for r in many]
    np.testing.assert_allclose([float(r["score"]) for r in one], [float(r["score"]) for r in many], atol=2e-5)


def test_sheet_is_spread_over_all_images(model, sample, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        figures, "contact_sheet", lambda tiles, title: seen.append((tiles, title)) or figures.picture(tiles[0].image)
    )
    pipeline("vision/classify", model, labels="folder").run([sample / "shapes"], tmp_path / "out.csv")
    ((tiles, title),) = seen
    assert len(tiles) == 64
    assert title.startswith("84 images, 64 shown: predicted class and score\n")
    assert title.endswith(" %); green right, red wrong")
    assert {t.colour for t in tiles} <= {"#1A7F37", "#C62828"}
    assert all((t.colour == "#C62828") == t.note.startswith("is ") for t in tiles)
    shutil.rmtree(tmp_path)


def test_demo(model, sample, tmp_path, monkeypatch):
    spec = VisionSpec(task="generation", channels=3, height=16, width=16, classes=CLASSES)
    generator = ImageGenerator(create_backbone("axial_test"), spec)
    for cls, one in ((Classify, model), (Generate, generator)):
        folder = save_model(one, tmp_path / cls.__name__)
        monkeypatch.setattr(cls, "default_model", str(folder))
    known = {str(tmp_path / cls.__name__): tmp_path / cls.__name__ for cls in (Classify, Generate)}
    monkeypatch.setattr(base, "bundled_models", lambda: known)
    report = Report("demo")
    demo.show(Demo(sample, tmp_path / "results", report, lambda name: None))
    text = report.write(tmp_path / "report.html").read_text()
    assert text.count("<img") == 6
    for expected in ("truncated.jpg", "the file is empty", "accuracy", "--labels folder --ranks", "--complete"):
        assert expected in text
    assert len(rows(tmp_path / "results" / "evaluation.csv")) == 120
    assert len(list((tmp_path / "results" / "made").iterdir())) == 24
