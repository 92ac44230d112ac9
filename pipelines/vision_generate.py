"""Vision: images from a generator, by class or from their upper rows, as a grid and one by one."""

from __future__ import annotations

import argparse
import functools
import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.pipelines import figures
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.vision import model_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vertebra.domains.model import DomainModel

GRID = 400
"""Most images of the grid; the others are written all the same."""
COLUMNS = 16
"""Most images in a row of the grid."""
GREY = 190
"""What stands for the rows that are to be made."""


@dataclass(frozen=True)
class Request:
    """One image to make.

    Args:
        label: Its class; empty for none.
        number: From 0; the seed of a batch depends on that of its first image.
    """

    label: str
    number: int


@verb(
    "vision/generate",
    inputs="nothing; --complete names an image whose upper rows are kept",
    outputs=".png: a grid of all images; the folder OUT/ (a PNG an image) and OUT.json (summary)",
    model="vision_generator",
    tasks=("vision/generate", "vision/diffusion"),
    needs_input=False,
)
class Generate(Pipeline):
    """Images from an autoregressive or a diffusion model, by class or from upper rows.

    Args:
        model: See ``Pipeline``.
        device: See ``Pipeline``.
        batch_size: Most images that are made at once.
        batch_tokens: Most positions of the backbone at once.
        count: Images for each class.
        labels: Classes to make; None for every class of the model.
        temperature: Below 1 for likelier images, above 1 for more varied ones.
        seed: Seed of the draws; an image depends on it, its number and the batch size.
        guidance: Diffusion: how far images are pushed towards their class; None for 0.
        steps: Diffusion: noise levels that are passed through; None for 100.
        complete: Image whose upper rows, at the model's size, are kept.
        rows: How many; None for half.
    """

    endings = (".png",)
    unit = "images"
    pool_batches = 1

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
        count: int = 10,
        labels: Sequence[str] | None = None,
        temperature: float = 1.0,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        complete: str | Path | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.domains.vision.spec import VisionSpec

        self.model_name = model_name(self, model)
        self.generator: Any = self.model  # an ImageGenerator or an ImageDiffusion
        spec = self.model.spec
        assert isinstance(spec, VisionSpec)
        self.spec = spec
        self.diffusion = self.model.task == "vision/diffusion"
        if count < 1:
            raise ConfigError(f"{self.name}: count must be at least 1, got {count}.")
        if not (math.isfinite(temperature) and temperature >= 0):
            raise ConfigError(f"{self.name}: temperature must be at least 0, got {temperature}.")
        if seed < 0:
            raise ConfigError(f"{self.name}: seed must be at least 0, got {seed}.")
        self._check_diffusion(guidance, steps)
        self.count, self.temperature, self.seed = count, temperature, seed
        self.guidance, self.steps = guidance, steps
        self.labels = self._labels(labels)
        self.original, self.rows = self._original(complete, rows)

    def _check_diffusion(self, guidance: float | None, steps: int | None) -> None:
        for name, value in (("guidance", guidance), ("steps", steps)):
            if value is not None and not self.diffusion:
                raise ConfigError(
                    f"{self.name}: {name} is for diffusion models, this one draws pixel by pixel; leave it out."
                )
        if guidance is not None and not (math.isfinite(guidance) and guidance >= 0):
            raise ConfigError(f"{self.name}: guidance must be at least 0, got {guidance}.")
        if guidance and not self.spec.classes:
            raise ConfigError(f"{self.name}: guidance needs a model with classes, this one has none; leave it out.")
        if steps is not None and steps < 1:
            raise ConfigError(f"{self.name}: steps must be at least 1, got {steps}.")

    def _labels(self, labels: Sequence[str] | None) -> list[str]:
        classes = self.spec.classes
        if labels and not classes:
            raise ConfigError(
                f"{self.name}: label {labels[0]!r} needs a model with classes, this one has none; leave it out."
            )
        for label in labels or ():
            if label not in classes:
                raise UnknownNameError("class", label, classes)
        return list(dict.fromkeys(labels or classes)) or [""]

    def _original(self, complete: str | Path | None, rows: int | None) -> tuple[NDArray[np.uint8] | None, int]:
        """Return the image to complete, uint8 (C, H, W), and the number of rows that are kept."""
        from vertebra.domains.vision.images import read_image
        from vertebra.domains.vision.transforms import eval_transform

        if complete is None:
            if rows is not None:
                raise ConfigError(f"{self.name}: rows={rows} needs an image to complete; add complete.")
            return None, 0
        height = self.spec.height
        rows = height // 2 if rows is None else rows
        if not 1 <= rows < height:
            raise ConfigError(
                f"{self.name}: rows must be from 1 to {height - 1}, of the {height} rows of the model's images, got "
                f"{rows}."
            )
        image = read_image(Path(complete), 1 if self.spec.channels == 1 else 3)
        return eval_transform(self.spec).prepare(image), rows

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("generation")
        group.add_argument("--count", type=int, default=10, metavar="N", help="images for each class (default: 10)")
        group.add_argument(
            "--label", dest="labels", action="append", metavar="CLASS",
            help="class to make; may be repeated (default: every class of the model)",
        )  # fmt: skip
        group.add_argument(
            "--temperature", type=float, default=1.0, help="below 1 likelier, above 1 more varied (default: 1)"
        )
        group.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
        group = parser.add_argument_group("diffusion models")
        group.add_argument("--guidance", type=float, metavar="W", help="push towards the class (default: 0)")
        group.add_argument("--steps", type=int, metavar="N", help="noise levels (default: 100)")
        group = parser.add_argument_group("completion")
        group.add_argument("--complete", metavar="IMAGE", help="image whose upper rows are kept")
        group.add_argument(
            "--rows", type=int, metavar="N", help="how many, at the height of the model's images (default: half)"
        )

    # ---------------------------------------------------------------- what is asked for

    def input_files(self, inputs: list[Path], target: Path) -> list[Path]:
        """Refuse input files; there are none."""
        if inputs:
            raise ConfigError(
                f"{self.name}: takes no input file, got {str(inputs[0])!r}; name an image to complete by --complete."
            )
        return []

    def without_input(self, bad: Bad) -> Iterator[Item]:
        """Yield the images of every class."""
        number = 0
        for label in self.labels:
            for index in range(1, self.count + 1):
                record = f"{label or 'image'}_{index}"
                # predict moves the progress bar
                yield Item(file="", record=record, data=Request(label, number), size=self._positions(), weight=0.0)
                number += 1

    def planned(self) -> float:
        """Images of a run."""
        return float(self.count * len(self.labels))

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Refuse a file."""
        raise DataError(f"{self.name}: takes no input; to complete an image, make the pipeline with complete={path}.")

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the images of every class, for the value None."""
        if value is not None:
            raise DataError(f"{self.name}: takes no input, got {type(value).__name__}; call it without.")
        yield from self.without_input(bad)

    def __call__(self, value: None = None) -> list[Prediction]:
        """Make images.

        Args:
            value: None; there is no input.

        Returns:
            ``count`` predictions for each class; a value is an image, uint8 (H, W) or (H, W, 3).
        """
        return list(self._predictions([value]))

    def _positions(self) -> int:
        """Positions that the backbone reads of an image."""
        patch = int(getattr(self.model, "patch_size", 1))
        return self.spec.height * self.spec.width // patch**2

    # ---------------------------------------------------------------- making them

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Make one batch of images."""
        import torch

        requests: list[Request] = [item.data for item in items]
        labels = self._label_ids(requests)
        seed = np.random.SeedSequence([self.seed, requests[0].number]).generate_state(1, np.uint64)[0]
        done = 0.0

        def progress(share: float) -> None:
            nonlocal done
            self.advance((share - done) * len(items))
            done = share

        with torch.inference_mode():
            images = self._sampler()(
                len(items),
                labels=labels,
                temperature=self.temperature,
                generator=torch.Generator().manual_seed(int(seed) >> 1),
                given=self._given(len(items)),
                progress=progress,
            )
            progress(1.0)
            bits = None if self.diffusion else self.generator.bits_per_dim(images, labels).tolist()
        pixels = images.movedim(1, -1).cpu().numpy()
        pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
        results: list[Prediction] = []
        for i, (item, request) in enumerate(zip(items, requests, strict=True)):
            details: dict[str, Any] = {"label": request.label} if request.label else {}
            if bits is not None:
                details["bits_per_dim"] = bits[i]
            results.append(GeneratedImage(pixels[i], name=item.record, details=details, label="image"))
        return results

    def _sampler(self) -> Any:
        """Return the model's ``sample``, with the options that only a diffusion model has."""
        chosen: dict[str, Any] = {}
        if self.guidance is not None:
            chosen["guidance"] = self.guidance
        if self.steps is not None:
            chosen["steps"] = self.steps
        return functools.partial(self.generator.sample, **chosen)

    def _label_ids(self, requests: list[Request]) -> Tensor | None:
        import torch

        if not self.spec.classes:
            return None
        return torch.tensor([self.spec.classes.index(r.label) for r in requests], device=self.device)

    def _given(self, count: int) -> Tensor | None:
        import torch

        if self.original is None:
            return None
        kept = torch.from_numpy(self.original[:, : self.rows].copy()).to(self.device)
        return kept.expand(count, -1, -1, -1)

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the grid, the folder and the summary."""
        return _GenerateWriter(self, outputs)


@dataclass(eq=False, repr=False)
class GeneratedImage(Prediction):
    """An image that a model made; ``value`` is uint8 (H, W) or (H, W, 3)."""

    def figure(self) -> Figure:
        """Draw the image, its pixels as squares."""
        bits = self.details.get("bits_per_dim")
        title = self.name if bits is None else f"{self.name}: {bits:.2f} bits a sub-pixel"
        return figures.picture(self.value, title=title)


class _GenerateWriter(Writer):
    """OUT.png, OUT/NNNN-CLASS.png and OUT.png.json."""

    def __init__(self, pipeline: Generate, outputs: Outputs) -> None:
        self.pipeline, self.outputs = pipeline, outputs
        self.grid = outputs.open(outputs.target, "wb")
        self.summary = outputs.side(".json")
        folder = outputs.target.with_suffix("")
        self.folder = outputs.folder(folder, _written_before(self.summary, folder.name))
        self.made: list[dict[str, Any]] = []
        self.shown: dict[str, list[NDArray[np.uint8]]] = {}

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one image."""
        from PIL import Image

        label = item.data.label
        ending = re.sub(r"[^\w.-]+", "_", label)[:60]
        name = f"{len(self.made) + 1:04}{'-' * bool(ending)}{ending}.png"
        stream = io.BytesIO()
        Image.fromarray(prediction.value).save(stream, "PNG")
        self.outputs.write(self.folder / name, stream.getvalue())
        facts = {key: round(v, 5) if isinstance(v, float) else v for key, v in prediction.details.items()}
        self.made.append({"file": f"{self.folder.name}/{name}", **facts})
        images = self.shown.setdefault(label, [])
        if len(images) < max(1, GRID // len(self.pipeline.labels)):
            images.append(prediction.value)

    def finish(self) -> None:
        """Draw the grid and write the summary."""
        if not self.made:
            return
        self.grid.write(figures.png_bytes(self._figure()))
        p = self.pipeline
        summary: dict[str, Any] = {
            "pipeline": p.name,
            "model": p.model_name,
            "task": p.model.task,
            "seed": p.seed,
            "batch_size": p.batch_size,
            "temperature": p.temperature,
        }
        if p.diffusion:
            summary |= {"guidance": p.guidance or 0.0, "steps": p.steps or 100}
        if p.original is not None:
            summary["rows_kept"] = p.rows
        bits = [facts["bits_per_dim"] for facts in self.made if "bits_per_dim" in facts]
        if bits:
            summary["bits_per_dim_mean"] = round(sum(bits) / len(bits), 5)
        summary["images"] = self.made
        stream = self.outputs.open(self.summary)
        json.dump(summary, stream, indent=1, ensure_ascii=False)
        stream.write("\n")

    def _figure(self) -> Figure:
        count, drawn = len(self.made), sum(map(len, self.shown.values()))
        first: list[NDArray[np.uint8]] = []
        heads: list[str] = []
        p = self.pipeline
        if p.original is not None:
            original = p.original[0] if len(p.original) == 1 else np.ascontiguousarray(p.original.transpose(1, 2, 0))
            kept = original.copy()
            kept[p.rows :] = GREY
            first, heads = [original, kept], ["original", "kept"]
        across = COLUMNS
        if list(self.shown) == [""] and not first:
            across = min(COLUMNS, math.ceil(math.sqrt(drawn)))
        rows: list[tuple[str, list[NDArray[np.uint8]]]] = []
        for label, images in self.shown.items():
            for start in range(0, len(images), across):
                front = first if not start else [np.full_like(i, 255) for i in first]
                rows.append((label if not start else "", [*front, *images[start : start + across]]))
        what = f"{count:,} image{'s' * (count != 1)}" if p.original is None else f"{count:,} completions"
        title = what + ("" if drawn == count else f", {drawn:,} shown") + f", temperature {p.temperature:g}"
        if p.diffusion:
            title += f", guidance {p.guidance or 0:g}"
        return figures.image_grid(rows, heads=heads, title=f"{title}, seed {p.seed}")


def _written_before(summary: Path, folder: str) -> list[str]:
    """Names in the folder that an earlier run to the same output wrote, by its summary."""
    try:
        found = json.loads(summary.read_text(encoding="utf-8"))
        files = [Path(str(facts["file"])) for facts in found["images"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [file.name for file in files if file.parent.name == folder]


__all__ = ["Generate", "GeneratedImage", "Request"]
