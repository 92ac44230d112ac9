"""vision/generate: both kinds of model, classes, completions, the files of a run, and every bad setting."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.saving import save_model
from vertebra.domains.vision.diffusion import ImageDiffusion
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.pipelines import figures
from vertebra.pipelines.base import PipelineInterrupted, RunResult, pipeline
from vertebra.pipelines.files import Outputs

SIDE = 8


def made(kind=ImageGenerator, classes=("a", "b c"), channels=3):
    torch.manual_seed(1)
    spec = VisionSpec(task="generation", channels=channels, height=SIDE, width=SIDE, classes=classes)
    backbone = "axial_test" if kind is ImageGenerator else "illama_test,causal=false"
    options = {"logits_scale": 4.0} if kind is ImageGenerator else {}
    return kind(create_backbone(backbone), spec, **options).eval()


@pytest.fixture(scope="module")
def autoregressive():
    return made()


@pytest.fixture(scope="module")
def diffusion():
    return made(ImageDiffusion)


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path, pixels


def read(path):
    with Image.open(path) as image:
        return np.asarray(image)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("kind", [ImageGenerator, ImageDiffusion])
def test_every_class_into_a_grid_a_folder_and_a_summary(kind, tmp_path, capsys):
    folder = save_model(made(kind), tmp_path / "model")
    out = tmp_path / "new" / "out.png"
    arguments = ["-o", str(out), "--model", str(folder), "--count", "3", "--seed", "5"]
    extra = ["--steps", "3", "--guidance", "1.5"] if kind is ImageDiffusion else []
    assert main(["run", "vision/generate", *arguments, *extra]) == 0
    files = [f"000{n}-{c}.png" for n, c in zip(range(1, 7), ["a"] * 3 + ["b_c"] * 3, strict=True)]
    assert names(out.parent) == ["out", "out.png", "out.png.json"]
    assert names(out.parent / "out") == files
    said = capsys.readouterr().out
    assert f"6 records done; wrote {out}, 6 files in {out.with_suffix('')}, {out}.json\n" == said
    images = [read(out.parent / "out" / f) for f in files]
    assert {i.shape for i in images} == {(SIDE, SIDE, 3)}
    assert len({i.tobytes() for i in images}) == 6
    summary = json.loads((out.parent / "out.png.json").read_text())
    assert [facts["file"] for facts in summary["images"]] == [f"out/{f}" for f in files]
    assert [facts["label"] for facts in summary["images"]] == ["a"] * 3 + ["b c"] * 3
    assert (summary["seed"], summary["model"], summary["task"]) == (5, str(folder), kind.task)
    if kind is ImageDiffusion:
        assert (summary["steps"], summary["guidance"]) == (3, 1.5)
        assert "bits_per_dim" not in summary["images"][0]
    else:
        labels = torch.tensor([0] * 3 + [1] * 3)
        bits = made().bits_per_dim(torch.from_numpy(np.stack(images)).movedim(-1, 1), labels)
        assert [f["bits_per_dim"] for f in summary["images"]] == pytest.approx(bits.tolist(), abs=1e-4)
        assert summary["bits_per_dim_mean"] == pytest.approx(bits.mean().item(), abs=1e-4)
    grid = read(out)[..., :3]
    factor = 80 // SIDE
    large = images[0].repeat(factor, 0).repeat(factor, 1)
    assert any(
        (grid[y : y + 80, x : x + 80] == large).all()
        for y in range(grid.shape[0] - 79)
        for x in range(grid.shape[1] - 79)
        if (grid[y, x] == large[0, 0]).all()
    )


def test_seeds_and_temperature(autoregressive):
    def images(**options):
        return [p.value for p in pipeline("vision/generate", autoregressive, count=2, labels=["a"], **options)()]

    first = images(seed=3)
    np.testing.assert_array_equal(first, images(seed=3))
    assert not np.array_equal(first, images(seed=4))
    cold = images(temperature=0.0)
    np.testing.assert_array_equal(cold[0], cold[1])
    with torch.inference_mode():
        expected = autoregressive.sample(1, labels=torch.tensor([0]), temperature=0.0)[0].movedim(0, -1)
    np.testing.assert_array_equal(cold[0], expected)


def test_chosen_classes_in_the_order_given(autoregressive):
    found = pipeline("vision/generate", autoregressive, count=1, labels=["b c", "a", "a"])()
    assert [(p.name, p.details["label"]) for p in found] == [("b c_1", "b c"), ("a_1", "a")]
    assert found[0].details["bits_per_dim"] > 0
    assert repr(found[1]) == "GeneratedImage(a_1 = array (8, 8, 3); )"
    assert figures.png_bytes(found[0].figure()).startswith(b"\x89PNG")


def test_grey_images_without_classes(tmp_path):
    out = tmp_path / "out.png"
    grey = made(classes=(), channels=1)
    result = pipeline("vision/generate", grey, count=5, batch_size=2).run([], out)
    assert result.good == 5
    assert names(tmp_path / "out") == [f"000{n}.png" for n in range(1, 6)]
    assert read(tmp_path / "out" / "0001.png").shape == (SIDE, SIDE)
    assert "label" not in json.loads((tmp_path / "out.png.json").read_text())["images"][0]


@pytest.mark.parametrize("kind", [ImageGenerator, ImageDiffusion])
def test_completions_keep_the_upper_rows(kind, photo, tmp_path):
    path, pixels = photo
    out = tmp_path / "out.png"
    options = {"steps": 2} if kind is ImageDiffusion else {}
    work = pipeline("vision/generate", made(kind), count=2, labels=["a"], complete=path, rows=3, **options)
    work.run([], out)
    for name in ("0001-a.png", "0002-a.png"):
        image = read(tmp_path / "out" / name)
        np.testing.assert_array_equal(image[:3], pixels[:3])
        assert not np.array_equal(image[3:], pixels[3:])
    assert json.loads((tmp_path / "out.png.json").read_text())["rows_kept"] == 3
    large = tmp_path / "large.jpg"
    Image.fromarray(pixels).resize((50, 40)).save(large)
    assert pipeline("vision/generate", made(kind), complete=large).rows == SIDE // 2


def test_progress_is_told_while_a_batch_is_made(autoregressive, tmp_path, monkeypatch):
    from contextlib import contextmanager

    from vertebra.pipelines import base

    told = []

    @contextmanager
    def bar(title, total, unit, hourly, show):
        told.append((total, unit))
        yield told.append

    monkeypatch.setattr(base, "progress_bar", bar)
    pipeline("vision/generate", autoregressive, count=2).run([], tmp_path / "out.png")
    total, *steps = told
    assert total == (4.0, "images")
    assert len([s for s in steps if s]) >= SIDE
    assert sum(steps) == pytest.approx(4.0)


def test_a_run_to_the_same_output_replaces_the_earlier_one_alone(autoregressive, tmp_path):
    out = tmp_path / "out.png"
    pipeline("vision/generate", autoregressive, count=3).run([], out)
    pipeline("vision/generate", autoregressive, count=1, labels=["a"]).run([], out)
    assert names(tmp_path / "out") == ["0001-a.png"]
    (tmp_path / "out" / "mine.txt").write_text("mine")
    text = r"^output: the folder '.*out', where files go, holds others already, such as 'mine\.txt'; choose another"
    with pytest.raises(ConfigError, match=text):
        pipeline("vision/generate", autoregressive, count=3).run([], out)
    assert names(tmp_path / "out") == ["0001-a.png", "mine.txt"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "0001-a.png").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"holds others already, such as '0001-a\.png'"):
        pipeline("vision/generate", autoregressive, count=1).run([], tmp_path / "photos.png")
    assert (tmp_path / "photos" / "0001-a.png").read_bytes() == b"precious"
    assert names(tmp_path) == ["out", "out.png", "out.png.json", "photos"]


def test_an_interruption_keeps_what_is_finished_and_a_failure_nothing(autoregressive, tmp_path, monkeypatch):
    out = tmp_path / "out.png"
    work = pipeline("vision/generate", autoregressive, count=3, labels=["a"], batch_size=1)
    sample, calls = autoregressive.sample, []

    def stopping(count, **options):
        calls.append(count)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(count, **options)

    monkeypatch.setattr(autoregressive, "sample", stopping)
    with pytest.raises(PipelineInterrupted, match="the 2 finished results are in"):
        work.run([], out)
    assert names(tmp_path) == ["out", "out.png.json.partial", "out.png.partial"]
    assert names(tmp_path / "out") == ["0001-a.png.partial", "0002-a.png.partial"]
    monkeypatch.setattr(autoregressive, "sample", sample)
    work.run([], out)
    assert names(tmp_path / "out") == [f"000{n}-a.png" for n in (1, 2, 3)]

    def broken(count, **options):
        raise RuntimeError("broken")

    monkeypatch.setattr(autoregressive, "sample", broken)
    with pytest.raises(RuntimeError, match="broken"):
        work.run([], tmp_path / "other.png")
    assert not (tmp_path / "other").exists()


def test_a_thousand_files_need_no_thousand_open_ones(tmp_path):
    with Outputs(tmp_path / "out.csv") as outputs:
        outputs.open(tmp_path / "out.csv").write("x")
        folder = outputs.folder(tmp_path / "out")
        for number in range(1500):
            outputs.write(folder / str(number), b"x")
        assert len(outputs.commit()) == 1501
    assert len(names(tmp_path / "out")) == 1500
    with Outputs(tmp_path / "none.csv") as outputs:
        outputs.write(outputs.folder(tmp_path / "none") / "a", b"x")
    assert names(tmp_path) == ["out", "out.csv"]
    result = RunResult(2, 0, [tmp_path / "a.png", *(tmp_path / "a" / str(i) for i in range(4)), tmp_path / "b"])
    assert str(result) == f"2 records done; wrote {tmp_path}/a.png, 4 files in {tmp_path}/a, {tmp_path}/b"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 0}, r"^vision/generate: count must be at least 1, got 0\.$"),
        ({"temperature": -1.0}, r"temperature must be at least 0, got -1\.0\.$"),
        ({"seed": -1}, r"seed must be at least 0, got -1\.$"),
        ({"guidance": 1.0}, r"guidance is for diffusion models, this one draws pixel by pixel; leave it out\.$"),
        ({"steps": 5}, r"steps is for diffusion models, this one draws pixel by pixel; leave it out\.$"),
        ({"rows": 3}, r"rows=3 needs an image to complete; add complete\.$"),
    ],
)
def test_impossible_settings(autoregressive, options, text):
    with pytest.raises(ConfigError, match=text):
        pipeline("vision/generate", autoregressive, **options)


def test_impossible_settings_of_other_models(diffusion, autoregressive, photo, tmp_path):
    path, _ = photo
    for options, text in (
        ({"guidance": -1.0}, r"guidance must be at least 0, got -1\.0\.$"),
        ({"steps": 0}, r"steps must be at least 1, got 0\.$"),
        ({"complete": path, "rows": SIDE}, r"rows must be from 1 to 7, of the 8 rows of the model's images, got 8\.$"),
        ({"complete": path, "rows": 0}, r"rows must be from 1 to 7, .* got 0\.$"),
    ):
        with pytest.raises(ConfigError, match=text):
            pipeline("vision/generate", diffusion, **options)
    plain = made(ImageDiffusion, classes=())
    with pytest.raises(ConfigError, match=r"guidance needs a model with classes, this one has none; leave it out\.$"):
        pipeline("vision/generate", plain, guidance=1.0)
    with pytest.raises(ConfigError, match=r"label 'a' needs a model with classes, this one has none; leave it out\.$"):
        pipeline("vision/generate", plain, labels=["a"])
    with pytest.raises(UnknownNameError, match=r"^unknown class 'b'.* Known: a, b c\.$"):
        pipeline("vision/generate", diffusion, labels=["b"])
    with pytest.raises(DataError, match=r"none\.png: there is no such file; correct the path\.$"):
        pipeline("vision/generate", diffusion, complete=tmp_path / "none.png")
    work = pipeline("vision/generate", autoregressive)
    with pytest.raises(ConfigError, match=r"takes no input file, got '.*'; name an image to complete by --complete\.$"):
        work.run([path], tmp_path / "out.png")
    with pytest.raises(DataError, match=r"to complete an image, make the pipeline with complete=.*photo\.png\.$"):
        work(path)
    with pytest.raises(DataError, match=r"takes no input, got int; call it without\.$"):
        work(3)
    with pytest.raises(ConfigError, match=r"the output must end in \.png, got 'out\.jpg'"):
        work.run([], tmp_path / "out.jpg")
