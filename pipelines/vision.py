"""Vision: classes of images, with a contact sheet, and how good they are where the classes are known."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines import figures
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import BadRecord, Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

    from vertebra.domains.model import DomainModel
    from vertebra.domains.vision.diagnostics import AttentionRank
    from vertebra.domains.vision.model import ImageClassifier

SHEET = 64
"""Most images of a contact sheet."""
RANKED = 30
"""Most images whose attention maps are looked at."""
BINS = 15
"""Bins of the calibration error, as in training."""
_THUMB = 208
_RIGHT, _WRONG = "#1A7F37", "#C62828"


@dataclass(frozen=True, eq=False)
class Picture:
    """An image on its way to the model.

    Args:
        pixels: As the model's transform prepared it, uint8 (C, H, W).
        width: Of the image as stored.
        height: Of the image as stored.
        mode: Of the image as stored, in Pillow's words.
        true: Its class, where that is known.
        thumbnail: It, small, uint8 (H, W) or (H, W, 3), for those that are drawn.
        ranked: Whether its attention maps are looked at.
    """

    pixels: NDArray[np.uint8]
    width: int
    height: int
    mode: str
    true: str | None = None
    thumbnail: NDArray[np.uint8] | None = None
    ranked: bool = False


@verb(
    "vision/classify",
    inputs="images (PNG, JPEG, WebP, BMP, GIF, TIFF, ...) and folders of them",
    outputs=".csv: a row an image; OUT.jsonl, OUT.json (summary) and OUT.png (contact sheet)",
    model="vision_shapes",
    tasks=("vision/classification",),
)
class Classify(Pipeline):
    """Classes of images, in files and folders.

    Args:
        model: See ``Pipeline``.
        device: See ``Pipeline``.
        batch_size: Most images in a batch.
        batch_tokens: Most patches in a batch.
        size: Height and width at which the model runs, a multiple of its patch size; None for its own.
        top: Write the ``top`` best classes of every image instead of a column a class; 0 for all classes.
        labels: ``folder``: an image's folder is called by its true class; None where classes are not known.
        ranks: Measure the rank of the attention maps on at most 30 of the images.
    """

    unit = "images"
    reads_folders = True
    pool_batches = 1

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
        size: int | None = None,
        top: int = 0,
        labels: Literal["folder"] | None = None,
        ranks: bool = False,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.domains.vision.diagnostics import attention_layers
        from vertebra.domains.vision.transforms import eval_transform

        self.classifier: ImageClassifier = self.model  # type: ignore[assignment]
        self.model_name = model_name(self, model)
        spec = self.classifier.spec
        if not spec.classes:
            raise ConfigError(f"{self.name}: this model has no classes, it gives features alone; pass another --model.")
        if size is not None:
            step = 1 if self.classifier.whole else self.classifier.patch_size
            if size < 1 or size % step:
                near = max(step, round(size / step) * step)
                raise ConfigError(
                    f"{self.name}: size must be a multiple of the model's patch_size ({step}), got {size}; for example "
                    f"{near}."
                )
            spec = dataclasses.replace(spec, height=size, width=size)
        if not 0 <= top <= len(spec.classes):
            raise ConfigError(
                f"{self.name}: top must be from 1 to the model's {len(spec.classes)} classes, or 0 for all, got {top}."
            )
        if labels not in (None, "folder"):
            raise ConfigError(f"{self.name}: labels must be 'folder', or left out, got {labels!r}.")
        if ranks and not attention_layers(self.classifier):
            raise ConfigError(
                f"{self.name}: ranks needs a model with attention layers, got one with a "
                f"{self.classifier.backbone.config.family} backbone that has none; leave it out."
            )
        self.spec, self.top, self.labels, self.ranks = spec, top, labels, ranks
        self.transform = eval_transform(spec)
        side = 1 if self.classifier.whole else self.classifier.patch_size
        self.patches = max(1, spec.height // side * (spec.width // side)) if side > 1 else 1
        self._shown: set[str] | None = None  # files that are drawn; None for all
        self._ranked: set[str] = set()

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("classification")
        group.add_argument(
            "--size", type=int, metavar="N", help="height and width the model runs at (default: what it was trained on)"
        )
        group.add_argument(
            "--top", type=int, default=0, metavar="K", help="write the K best classes, not a column a class"
        )
        group.add_argument(
            "--labels", choices=("folder",), help="folder: an image's folder is called by its true class; adds metrics"
        )
        group.add_argument(
            "--ranks", action="store_true", help=f"rank of the attention maps, on at most {RANKED} of the images"
        )

    # ---------------------------------------------------------------- images in

    def folder_files(self, folder: Path) -> list[Path]:
        """List the images of a folder and those below it, in natural order."""
        from vertebra.domains.vision.sources import list_images

        if not (found := list_images(folder)):
            raise DataError(f"{folder}: holds no image (.png, .jpg, .webp, ...); check the name.")
        return found

    def input_files(self, inputs: list[Path], target: Path) -> list[Path]:
        """List the images; choose those that are drawn, and check the names of their folders where these are classes.

        Raises:
            ConfigError: A folder is called like no class of the model.
        """
        files = super().input_files(inputs, target)
        for file in files if self.labels else ():
            self._true_class(file)
        self._shown = {str(files[i]) for i in _spread(len(files), SHEET)}
        self._ranked = {str(files[i]) for i in _spread(len(files), RANKED)} if self.ranks else set()
        return files

    def amount(self, path: Path) -> float:
        """One image a file."""
        return 1.0

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the image of a file."""
        from vertebra.domains.vision.images import ImageError, read_image

        try:
            image = read_image(path, self._channels)
            size, mode = _stored(path)
            true = self._true_class(path) if self.labels else None
            yield self._item(str(path), path.name, image, size, mode, true)
        except ImageError as error:
            bad(BadRecord(file=str(path), record="", line=None, rule=error.rule, advice=error.advice))

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield an image of Pillow, the bytes of a file, or an array, uint8 (H, W) or (H, W, C)."""
        from PIL import Image, ImageOps

        from vertebra.domains.vision.images import ImageError, read_image, to_channels

        name = f"image_{index}"
        if isinstance(value, str | Path):
            raise DataError(f"{value}: no such file; check the name.")
        try:
            if isinstance(value, bytes):
                image, (size, mode) = read_image(value, self._channels, name=name), _stored(value)
            else:
                given = value if isinstance(value, Image.Image) else _from_array(value, self.name)
                size, mode = given.size, given.mode
                try:
                    upright = ImageOps.exif_transpose(given)
                except OSError as error:  # a file that Pillow has opened only, and that is damaged
                    raise ImageError(name, f"the image is damaged ({error})", "copy or export it again") from None
                image = to_channels(upright, self._channels, name)
        except ImageError as error:
            bad(BadRecord(file="", record=name, line=None, rule=error.rule, advice=error.advice))
            return
        yield self._item("", name, image, size, mode, None)

    def __call__(self, value: Any) -> Prediction | list[Prediction]:
        """Classify images.

        Args:
            value: A file, an image of Pillow, the bytes of a file, or an array uint8 (H, W) or (H, W, C) gives one
                prediction; a folder or a list of these gives a list.

        Raises:
            DataError: An image cannot be used; ``run`` goes on instead.
        """
        self._shown, self._ranked = None, set()
        several = isinstance(value, list | tuple) or (self._is_path(value) and Path(value).is_dir())
        found = list(self._predictions(value if isinstance(value, list | tuple) else [value]))
        return found if several else found[0]

    @property
    def _channels(self) -> Literal[1, 3]:
        return 1 if self.spec.channels == 1 else 3

    def _true_class(self, path: Path) -> str:
        name = Path(os.path.abspath(path)).parent.name  # of the link, where the file is one
        if name not in self.spec.classes:
            known = ", ".join(self.spec.classes[:8]) + ", ..." * (len(self.spec.classes) > 8)
            raise ConfigError(
                f"{self.name}: with labels=folder, folders must be called like the model's classes ({known}), got "
                f"{name!r} of {path}; rename it, or leave labels out."
            )
        return name

    def _item(
        self, file: str, name: str, image: Image.Image, size: tuple[int, int], mode: str, true: str | None
    ) -> Item:
        pixels = self.transform.prepare(image)
        thumbnail = None
        if self._shown is None or file in self._shown:
            small = image.copy()
            small.thumbnail((_THUMB, _THUMB))
            thumbnail = np.asarray(small)
        picture = Picture(pixels, *size, mode, true, thumbnail, file in self._ranked)
        return Item(file=file, record=name, data=picture, size=self.patches)

    # ---------------------------------------------------------------- classes out

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Scores of one batch of images."""
        import torch

        with torch.inference_mode():
            scores = self.classifier(self.model_input([item.data.pixels for item in items])).float().softmax(-1)
        return [self._prediction(item, row) for item, row in zip(items, scores.cpu().numpy(), strict=True)]

    def model_input(self, pixels: list[NDArray[np.uint8]]) -> Any:
        """Return what the model reads, float (B, C, H, W) on its device, of prepared images."""
        return self.transform.batch(pixels, 0, 0, np.arange(len(pixels))).to(self.device)

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the table of images."""
        return _ClassifyWriter(self, outputs)

    def attention_ranks(self, pixels: list[NDArray[np.uint8]]) -> list[AttentionRank]:
        """Measure the rank of the attention maps of prepared images."""
        from vertebra.domains.vision.diagnostics import attention_ranks

        return attention_ranks(self.classifier, self.model_input(pixels))

    def _prediction(self, item: Item, row: NDArray[np.float32]) -> ImagePrediction:
        picture: Picture = item.data
        scores = {c: float(s) for c, s in zip(self.spec.classes, row, strict=True)}
        details: dict[str, Any] = {"width": picture.width, "height": picture.height, "mode": picture.mode}
        if item.file:
            details["file"] = item.file
        if picture.true is not None:
            details["true"] = picture.true
        value = self.spec.classes[int(row.argmax())]
        return ImagePrediction(value, scores, item.record, details, "score (probability)", picture.thumbnail)


@dataclass(eq=False, repr=False)
class ImagePrediction(Prediction):
    """Scores of an image.

    Args:
        thumbnail: The image, small, uint8 (H, W) or (H, W, 3).
    """

    thumbnail: NDArray[np.uint8] | None = None

    def figure(self) -> Figure:
        """Draw the image beside its best scores."""
        if self.thumbnail is None:
            return super().figure()
        return figures.image_with_scores(self.thumbnail, self.scores, title=self.name, label=self.label)


class _ClassifyWriter(Writer):
    """OUT.csv and its .jsonl, .json and .png; .confusion.png with labels; .ranks.csv and .ranks.png with ranks."""

    def __init__(self, pipeline: Classify, outputs: Outputs) -> None:
        self.pipeline, self.outputs = pipeline, outputs
        self.table = csv.writer(outputs.open(outputs.target), lineterminator="\n")
        self.lines = outputs.open(outputs.side(".jsonl"))
        self.tiles: list[figures.Tile] = []
        self.ranked: list[NDArray[np.uint8]] = []
        self.predicted: Counter[str] = Counter()
        classes, top = pipeline.spec.classes, pipeline.top
        columns = [f"score_{name}" for name in classes]
        if top:
            columns = [f"{what}_{rank}" for rank in range(1, top + 1) for what in ("class", "score")]
        self.table.writerow(["file", *["true"] * bool(pipeline.labels), "prediction", "score", *columns])
        self.evaluation = Evaluation(classes) if pipeline.labels else None

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one image."""
        picture: Picture = item.data
        scores, value = prediction.scores, str(prediction.value)
        ranked = sorted(scores.items(), key=lambda pair: -pair[1])[: self.pipeline.top or None]
        columns = [f"{s:.6g}" for s in scores.values()]
        if self.pipeline.top:
            columns = [text for name, score in ranked for text in (name, f"{score:.6g}")]
        true = [picture.true] if self.evaluation is not None else []
        self.table.writerow([item.file, *true, value, f"{scores[value]:.6g}", *columns])
        facts = {"file": item.file, "width": picture.width, "height": picture.height, "mode": picture.mode}
        if self.evaluation is not None:
            facts["true"] = picture.true
        kept = dict(ranked) if self.pipeline.top else scores
        line = {**facts, "prediction": value, "scores": {n: float(f"{s:.6g}") for n, s in kept.items()}}
        self.lines.write(json.dumps(line, ensure_ascii=False) + "\n")
        self.predicted[value] += 1
        if self.evaluation is not None and picture.true is not None:
            self.evaluation.add(picture.true, np.array(list(scores.values())))
        if picture.ranked:
            self.ranked.append(picture.pixels)
        if picture.thumbnail is not None:
            self.tiles.append(_tile(item, picture, value, scores[value]))

    def finish(self) -> None:
        """Write the summary and the figures."""
        count = self.predicted.total()
        if not count:
            return
        pipeline, spec = self.pipeline, self.pipeline.spec
        summary: dict[str, Any] = {
            "pipeline": pipeline.name,
            "model": pipeline.model_name,
            "size": [spec.height, spec.width],
            "images": count,
            "predicted": {name: self.predicted[name] for name in spec.classes if self.predicted[name]},
        }
        if self.evaluation is not None:
            summary |= self.evaluation.summary()
        json.dump(summary, self.outputs.open(self.outputs.side(".json")), indent=1, ensure_ascii=False)
        if self.tiles:
            self._draw(".png", figures.contact_sheet(self.tiles, title=self._title(count, summary)))
        if self.evaluation is not None:
            self._draw(".confusion.png", figures.confusion(self.evaluation.confusion, spec.classes))
        if self.ranked:
            self._write_ranks()

    def _title(self, count: int, summary: dict[str, Any]) -> str:
        shown = "" if len(self.tiles) == count else f", {len(self.tiles)} shown"
        title = f"{count:,} image{'s' * (count != 1)}{shown}: predicted class and score"
        if "accuracy" in summary:
            good = round(summary["accuracy"] * count)
            title += f"\n{good:,} of {count:,} right ({100 * summary['accuracy']:.1f} %); green right, red wrong"
        return title

    def _write_ranks(self) -> None:
        ranks = self.pipeline.attention_ranks(self.ranked)
        table = csv.writer(self.outputs.open(self.outputs.side(".ranks.csv")), lineterminator="\n")
        table.writerow(["layer", "head", "rank", "size"])
        table.writerows([r.layer, r.head, f"{r.rank:.6g}", r.size] for r in ranks)
        number = len(self.ranked)
        title = f"Rank of the attention maps of {number} image{'s' * (number != 1)}"
        self._draw(".ranks.png", figures.attention_ranks(ranks, title=title))

    def _draw(self, ending: str, figure: Figure) -> None:
        self.outputs.open(self.outputs.side(ending), "wb").write(figures.png_bytes(figure))


class Evaluation:
    """How good predictions are, from true classes and scores, image by image.

    Args:
        classes: Names of the classes, in the order of the scores.
    """

    def __init__(self, classes: tuple[str, ...]) -> None:
        self.classes = classes
        self.confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
        self.top5 = 0
        self.bins = np.zeros((3, BINS))  # images, right ones, sum of scores

    def add(self, true: str, scores: NDArray[np.float64]) -> None:
        """Add an image: its class, and the scores (K,)."""
        number, best = self.classes.index(true), int(scores.argmax())
        self.confusion[number, best] += 1
        self.top5 += int((scores > scores[number]).sum() < 5)
        bin_ = min(int(np.ceil(scores[best] * BINS)) - 1, BINS - 1)
        self.bins[:, max(bin_, 0)] += (1, number == best, scores[best])

    def summary(self) -> dict[str, Any]:
        """Return the metrics, JSON-able; of the confusion matrix, what is not 0."""
        count = int(self.confusion.sum())
        gaps = np.abs(self.bins[1] - self.bins[2]).sum()
        confusion = {
            true: {self.classes[j]: int(row[j]) for j in np.flatnonzero(row)}
            for true, row in zip(self.classes, self.confusion, strict=True)
            if row.any()
        }
        return {
            "labelled": count,
            "accuracy": float(np.trace(self.confusion)) / count,
            "top5_accuracy": self.top5 / count,
            "calibration_error": float(gaps) / count,
            "confusion": confusion,
        }


def model_name(pipeline: Pipeline, model: str | Path | DomainModel | None) -> str:
    """Say which model a pipeline was given."""
    if model is None:
        return pipeline.default_model
    return str(model) if isinstance(model, str | Path) else type(model).__name__


def _tile(item: Item, picture: Picture, value: str, score: float) -> figures.Tile:
    assert picture.thumbnail is not None
    text = f"{figures.shorten(value, 12)} {score:.2f}"
    if picture.true is None:
        return figures.Tile(picture.thumbnail, text, item.record)
    right = picture.true == value
    note = item.record if right else f"is {picture.true}"
    return figures.Tile(picture.thumbnail, text, note, _RIGHT if right else _WRONG)


def _spread(count: int, most: int) -> list[int]:
    """Numbers of at most ``most`` of ``count`` things, evenly spread."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist())) if count else []


def _stored(source: Path | bytes) -> tuple[tuple[int, int], str]:
    """Size and mode of an image as its file says, which could be decoded before."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            return image.size, image.mode


def _from_array(value: Any, who: str) -> Image.Image:
    from PIL import Image

    array = np.asarray(value) if isinstance(value, np.ndarray) or hasattr(value, "__array__") else None
    if array is None:
        raise DataError(f"{who}: takes files, folders, images of Pillow, bytes or arrays, got {type(value).__name__}.")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise DataError(
            f"{who}: an array must be uint8 (H, W) or (H, W, 1, 3 or 4), got {array.dtype} {array.shape}; scale it to "
            "0 to 255 and put the channels last."
        )
    if not array.size:
        raise DataError(f"{who}: an array must hold pixels, got {array.shape}; leave it out.")
    return Image.fromarray(array)


__all__ = ["Classify", "Evaluation", "ImagePrediction", "Picture", "model_name"]
