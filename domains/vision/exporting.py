"""Image models as programs: classifiers, denoisers, and generators with the steps that draw pixel by pixel."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vertebra.backbones.axial import Axial
from vertebra.backbones.fixed import FixedSteps
from vertebra.backbones.layers.axial import AxialState
from vertebra.domains.exporting import (
    BATCH,
    ExportForm,
    Exports,
    Port,
    draw_ids,
    refuse_step,
)
from vertebra.domains.stepping import StepModule, state_ports, step_form
from vertebra.domains.vision.diffusion import ImageDiffusion
from vertebra.domains.vision.generator import ImageGenerator
from vertebra.domains.vision.model import ImageClassifier


def exports(model: ImageClassifier | ImageDiffusion | ImageGenerator, steps: bool, max_length: int | None) -> Exports:
    """Return the forms of a model, and how pictures become its input.

    Raises:
        ConfigError: Steps are wanted of a model that does not draw pixel by pixel.
    """
    spec = model.spec
    facts: dict[str, Any] = {
        "classes": list(spec.classes),
        "channels": spec.channels,
        "height": spec.height,
        "width": spec.width,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "crop": spec.crop,
        "crop_fraction": spec.crop_fraction,
        "interpolation": spec.interpolation,
    }
    if isinstance(model, ImageGenerator):
        return Exports(_generator(model, steps), {**facts, "levels": model.levels, "order": "channels, rows, columns"})
    if steps:
        raise refuse_step(model, "it sees an image whole")
    form = _classifier(model) if isinstance(model, ImageClassifier) else _denoiser(model)
    return Exports({"forward": form}, facts)


def _classifier(model: ImageClassifier) -> ExportForm:
    spec = model.spec
    size = (spec.channels, spec.height, spec.width)
    said = {"logits": "of the classes"} if spec.classes else {"features": "of the image"}
    return ExportForm(
        about="One pass over images of one size.",
        module=model,
        inputs=(Port("images", ("batch", *size), "(x - mean) / std of values in [0, 1]"),),
        outputs=said,
        axes={"batch": BATCH},
        draw=lambda sizes, generator: (torch.randn(sizes["batch"], *size, generator=generator),),
    )


def _denoiser(model: ImageDiffusion) -> ExportForm:
    spec = model.spec
    size, count = (spec.channels, spec.height, spec.width), len(spec.classes)
    inputs = [
        Port("noisy", ("batch", *size), f"sqrt(gamma) * image + sqrt(1 - gamma) * noise, images from "
             f"-{model.b_scale:g} to {model.b_scale:g}"),
        Port("gamma", ("batch",), "share of the signal, 0 to 1"),
    ]  # fmt: skip
    if count:
        inputs.append(Port("labels", ("batch",), "class; -1 for none"))

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        batch = sizes["batch"]
        drawn = (torch.randn(batch, *size, generator=generator), torch.rand(batch, generator=generator))
        return (*drawn, draw_ids((batch,), -1, count, generator)) if count else drawn

    return ExportForm(
        about="One pass of the denoiser.",
        module=_Denoise(model),
        inputs=tuple(inputs),
        outputs={"noise": "in the images"},
        axes={"batch": BATCH},
        draw=draw,
    )


class _Denoise(nn.Module):
    """Noisy images to their noise; no latents of an earlier pass."""

    def __init__(self, model: ImageDiffusion) -> None:
        super().__init__()
        self.model = model

    def forward(self, noisy: Tensor, gamma: Tensor, labels: Tensor | None = None) -> Tensor:
        noise: Tensor = self.model(noisy, gamma, labels)[0]
        return noise


# ---------------------------------------------------------------- pixel by pixel


def _generator(model: ImageGenerator, steps: bool) -> dict[str, ExportForm]:
    spec = model.spec
    size, count = (spec.channels, spec.height, spec.width), len(spec.classes)
    images = Port("images", ("batch", *size), "bytes")
    labels = (Port("labels", ("batch",), "class of each image"),) if count else ()

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        batch = sizes["batch"]
        bytes_ = torch.randint(0, 256, (batch, *size), generator=generator, dtype=torch.uint8)
        return (bytes_, draw_ids((batch,), 0, count, generator)) if count else (bytes_,)

    forms = {
        "forward": ExportForm(
            about="One pass over whole images: what each sub-pixel is, given those before it.",
            module=model,
            inputs=(images, *labels),
            outputs={"logits": "of the levels of every sub-pixel; a level is byte * levels // 256"},
            axes={"batch": BATCH},
            draw=draw,
        )
    }
    if not steps:
        return forms
    pixels, axial = spec.height * spec.width, isinstance(model.backbone, Axial)
    fixed = FixedSteps(model.backbone, pixels, spec.width if axial else None)
    begin = _Begin(model, fixed)

    def start(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = begin(*_with_channel(draw({"batch": batch}, generator)))
        return found

    names = (BASE, *fixed.empty(1))
    about = {BASE: "what is known of every pixel of the channel, the same in all its steps"}
    ports = state_ports(dict(zip(names, start(1, torch.Generator().manual_seed(0)), strict=True)), about)
    forms["begin"] = ExportForm(
        about="Makes the state before the first pixel of a channel, of what the channels before it are.",
        module=begin,
        inputs=(
            Port("images", ("batch", *size), "bytes, of the channels before the next one"),
            Port("channel", ("batch",), "the next channel, from 0"),
            *labels,
        ),
        outputs={f"next.{p.name}": f"{p.name} of the first step" for p in ports},
        axes={"batch": BATCH},
        draw=lambda sizes, generator: _with_channel(draw(sizes, generator)),
        state={f"next.{p.name}": p.name for p in ports},
    )
    parts = {"embed": model.embed, "head": model.head}
    kind = _AxialStep if axial else StepModule
    forms["step"] = step_form(
        kind(parts, partial(_read, model), model.head, fixed, kept=(BASE,)),
        [Port("ids", ("batch", "length"), "the levels before the next pixels; any level before the first pixel")],
        ("logits", "of the next pixels' levels, in raster order"),
        lambda batch, length, generator: (draw_ids((batch, length), 0, model.levels, generator),),
        begin=start,
        state_about=about,
    )
    return forms


BASE = "base"


def _with_channel(drawn: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    channel = torch.arange(drawn[0].shape[0]) % drawn[0].shape[1]
    return (drawn[0], channel, *drawn[1:])


class _Begin(nn.Module):
    """What is known of a channel's pixels, and the empty state."""

    def __init__(self, model: ImageGenerator, steps: FixedSteps) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, images: Tensor, channel: Tensor, labels: Tensor | None = None) -> tuple[Tensor, ...]:
        model = self.model
        coarse = model.dequantise(model.quantise(images))
        condition, base = model.condition(coarse, channel, labels), model.positions()
        base = base.expand(images.shape[0], -1, -1, -1) if condition is None else base + condition
        return (base.flatten(1, 2).clone(), *self.steps.empty(images.shape[0]).values())


def _read(model: ImageGenerator, ids: Tensor, position: Tensor, base: Tensor) -> Tensor:
    """Map the levels before the next pixels (B, T) to what a backbone in raster order reads of those, (B, T, D)."""
    at = position[:, None] + torch.arange(ids.shape[1], device=ids.device)  # (B, T)
    return model.embed(ids) * (at > 0)[..., None] + _rows(base, at)


def _rows(base: Tensor, at: Tensor) -> Tensor:
    """Take the pixels at (B, T) of base (B, H * W, D)."""
    return base.gather(1, at.clamp(0, base.shape[1] - 1)[..., None].expand(-1, -1, base.shape[2]))


class _AxialStep(StepModule):
    """A pixel of an Axial Transformer: its rows are finished before the first pixel of the next one.

    A program cannot leave the outer stack out where no row has ended: it runs for every pixel, and is used once a row.
    """

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        ids, base = tensors[:2]
        state = self.steps.state_of(dict(zip(self.names[1:], tensors[2:], strict=True)))
        backbone, position = self.backbone, tensors[2]  # (B,)
        assert isinstance(backbone, Axial)
        assert isinstance(state, AxialState)
        width, begun = state.row, (position > 0)[:, None, None]
        before, last = self.parts["embed"](ids), (position - 1).clamp(min=0)  # (B, 1, D), (B,)
        inputs, above = state.tensors["inputs"], state.tensors["above"]
        inputs[torch.arange(ids.shape[0], device=ids.device), last % width] = (before + _rows(base, last[:, None]))[
            :, 0
        ]
        state.advance(torch.where(position > 0, position, width), None)  # row 0 is written again when it has ended
        backbone.finish_row(inputs, state)
        state.tensors["above"] = torch.where(begun, state.tensors["above"], above)
        state.advance(position, None)
        x = before * (position % width > 0)[:, None, None] + _rows(base, position[:, None])
        y = backbone.inner_step(x, state)
        return (self.say(y), *(state.tensors[name] for name in self.names[1:]))
