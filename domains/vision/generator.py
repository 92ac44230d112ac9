"""Images generated pixel by pixel, by any causal backbone; plain torch.

With an Axial backbone this is the Axial Transformer (https://arxiv.org/abs/1912.12180; code in
google-research/axial): grey images are its Transformer2d. Colour images are its Transformer3d: the channels are
generated one after the other, each as a grey image of its own, under the condition of what an exterior encoder makes of
the channels before. Other causal backbones take the decoder's place and read the pixels in raster order.

Sampling is semi-parallel: the exterior encoder runs once a channel, the outer stack of an Axial backbone once a row,
and the rest once a pixel, all with what earlier rows and pixels left.

Shapes: B images, C channels, H x W pixels, D width, V levels of a sub-pixel, K classes, R given rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.axial import Axial
from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.backbones.layers.axial import variance_scaling_
from vertebra.domains.adapting import Adapter, by_name, interpolated
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, ShapeError

Noise = Callable[[int, int], Tensor]
"""Returns the Gumbel noise (B, W, V) of a channel's row."""


class ImageGenerator(DomainModel):
    """Images, one sub-pixel after the other.

    Args:
        backbone: Causal.
        spec: Facts about the images; with ``classes`` the model is asked for one of them.
        levels: V, the values of a sub-pixel that are told apart. Fewer than 256 cut the bytes into equal ranges: the
            model then knows, and its bits count, the range alone; a sampled byte is the middle of its range.
        exterior: Colour: config of the encoder of earlier channels, as ``BackboneConfig.to_dict`` gives it; None for
            the backbone's own structure (``encoder``).
        embed_scale: Fresh embeddings have the deviation ``embed_scale`` / sqrt(D).
        logits_scale: Variance scale of the fresh head; the paper's 1e-10 begins at the uniform distribution.

    Raises:
        ConfigError: The backbone is not causal, or a value out of its range.
    """

    task: ClassVar[str] = "vision/generate"
    input_parts: ClassVar[tuple[str, ...]] = ("embed", "positions", "class_embed", "exterior")
    spec: VisionSpec

    def __init__(
        self,
        backbone: Backbone,
        spec: VisionSpec,
        *,
        levels: int = 256,
        exterior: dict[str, Any] | None = None,
        embed_scale: float = 5.0,
        logits_scale: float = 1e-10,
    ) -> None:
        super().__init__(
            backbone, spec, levels=levels, exterior=exterior, embed_scale=embed_scale, logits_scale=logits_scale
        )
        if not backbone.config.causal:
            raise ConfigError("ImageGenerator: the backbone must be causal, got causal=False; set causal=True.")
        if not 2 <= levels <= 256:
            raise ConfigError(f"ImageGenerator: levels must be from 2 to 256, got {levels}.")
        dim = backbone.config.dim
        self.levels, self.embed_scale, self.logits_scale = levels, embed_scale, logits_scale
        self.embed = nn.Embedding(levels, dim)
        self.positions = GridPositions(spec.height, spec.width, dim)
        self.class_embed = nn.Embedding(len(spec.classes), dim) if spec.classes else None
        config = backbone.config.encoder() if exterior is None else BackboneConfig.from_dict(exterior)
        if config.dim != dim or config.causal:
            raise ConfigError(
                f"ImageGenerator: exterior must have dim={dim}, as the backbone, and causal=False, got "
                f"dim={config.dim} and causal={config.causal}."
            )
        self.exterior = Exterior(config.build(), spec) if spec.channels > 1 else None
        self.head = nn.Linear(dim, levels)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights of everything but the backbones.

        | parameter | distribution |
        | --- | --- |
        | embeddings and positions | normal, std ``embed_scale`` / sqrt(D) |
        | convolution of the exterior encoder | truncated normal, variance 1 / inputs |
        | head | truncated normal, variance ``logits_scale`` / inputs |
        | biases | 0 |
        """
        for module in self.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.embed_scale / math.sqrt(module.embedding_dim))
            elif isinstance(module, GridPositions):
                for table in (module.height, module.width):
                    nn.init.normal_(table, std=self.embed_scale / math.sqrt(table.shape[-1]))
        ends: list[tuple[nn.Linear | nn.Conv2d, float]] = [(self.head, self.logits_scale)]
        if self.exterior is not None:
            ends.append((self.exterior.conv, 1.0))
        for end, scale in ends:
            variance_scaling_(end.weight, scale)
            assert end.bias is not None
            nn.init.zeros_(end.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone: the position tables."""
        names = {"positions.height", "positions.width"}
        return names if self.exterior is None else names | {f"exterior.{name}" for name in names}

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: another image size, other classes."""
        found = {name: interpolated("places") for name in self.no_weight_decay()}
        if isinstance(origin.spec, VisionSpec):
            found["class_embed.weight"] = by_name(origin.spec.classes, self.spec.classes, "classes")
        return found

    # ------------------------------------------------------------ likelihood

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map images, uint8 (B, C, H, W), to the logits of every sub-pixel (B, C, H, W, V).

        Args:
            images: Bytes.
            labels: Class of each image, int (B,); None without classes.

        Raises:
            ShapeError: Images or labels are not as the spec says.
        """
        self._check(images, labels)
        ids = self.quantise(images)
        coarse = self.dequantise(ids)
        logits = [self.channel_logits(ids[:, c], self.condition(coarse, c, labels)) for c in range(images.shape[1])]
        return torch.stack(logits, dim=1)

    def loss(self, images: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Return the mean cross-entropy in bits a sub-pixel; of colour images, over one drawn channel of each.

        Args:
            images: uint8 (B, C, H, W).
            labels: Class of each image, int (B,); None without classes.
            generator: Draws the channels; torch's own when None.
        """
        self._check(images, labels)
        ids = self.quantise(images)
        count, channels = images.shape[:2]
        where = images.device if generator is None else generator.device
        channel = torch.randint(channels, (count,), generator=generator, device=where).to(images.device)
        chosen = ids[torch.arange(count, device=ids.device), channel]  # (B, H, W)
        return self._bits(chosen, self.condition(self.dequantise(ids), channel, labels)).mean()

    def bits_per_dim(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return the mean bits a sub-pixel of every image (B,), over all channels; arguments as in ``loss``."""
        self._check(images, labels)
        ids = self.quantise(images)
        coarse, channels = self.dequantise(ids), images.shape[1]
        bits = [self._bits(ids[:, c], self.condition(coarse, c, labels)).flatten(1).mean(1) for c in range(channels)]
        return torch.stack(bits).mean(0)

    def quantise(self, images: Tensor) -> Tensor:
        """Return the level of every byte, int64 in the same shape."""
        return images.long() * self.levels // 256

    def dequantise(self, ids: Tensor) -> Tensor:
        """Return the middle byte of every level, uint8 in the same shape."""
        first, next_first = (-(-256 * level // self.levels) for level in (ids, ids + 1))
        return ((first + next_first) // 2).to(torch.uint8)

    def condition(self, images: Tensor, channel: Tensor | int, labels: Tensor | None = None) -> Tensor | None:
        """Return what is known of every pixel before its channel is generated, (B, H, W, D); None for nothing.

        Args:
            images: Bytes (B, C, H, W); channels from ``channel`` on count for nothing.
            channel: Channel to be generated, of all images or of each, int (B,).
            labels: Class of each image, int (B,).
        """
        given = None if self.class_embed is None else self.class_embed(labels)[:, None, None]  # (B, 1, 1, D)
        if self.exterior is None:
            return given
        return self.exterior(images, torch.as_tensor(channel, device=images.device).expand(images.shape[0]), given)

    def channel_logits(self, ids: Tensor, condition: Tensor | None) -> Tensor:
        """Map one channel's levels (B, H, W) to the logits of each (B, H, W, V), from the pixels before it.

        Args:
            ids: Levels, int.
            condition: From ``condition``.
        """
        base = self.positions() if condition is None else self.positions() + condition  # (H, W, D), or with B
        embedded = self.embed(ids)
        if isinstance(self.backbone, Axial):
            return self.head(self.backbone.decode(embedded + base, F.pad(embedded[:, :, :-1], (0, 0, 1, 0)) + base))
        shifted = F.pad(embedded.flatten(1, 2)[:, :-1], (0, 0, 1, 0)) + base.flatten(-3, -2)  # (B, H*W, D)
        return self.head(self.backbone(shifted)).reshape(*ids.shape, self.levels)

    def _bits(self, ids: Tensor, condition: Tensor | None) -> Tensor:
        logits = self.channel_logits(ids, condition).float()
        return F.cross_entropy(logits.movedim(-1, 1), ids, reduction="none") / math.log(2)  # (B, H, W)

    def _check(self, images: Tensor, labels: Tensor | None) -> None:
        wanted = (self.spec.channels, self.spec.height, self.spec.width)
        if images.ndim != 4 or images.shape[1:] != wanted or images.dtype != torch.uint8:
            raise ShapeError(
                f"ImageGenerator: images must be uint8 (B, {', '.join(map(str, wanted))}), got {images.dtype} "
                f"{tuple(images.shape)}."
            )
        self._check_labels(labels, images.shape[0])

    def _check_labels(self, labels: Tensor | None, count: int) -> None:
        classes = len(self.spec.classes)
        if labels is None:
            if classes:
                raise ShapeError(f"ImageGenerator: labels must be int ({count},), the model has {classes} classes.")
            return
        if not classes:
            raise ShapeError("ImageGenerator: the model was built without classes; leave labels out.")
        if labels.shape != (count,) or labels.is_floating_point():
            raise ShapeError(
                f"ImageGenerator: labels must be int ({count},), got {labels.dtype} {tuple(labels.shape)}."
            )

    # ------------------------------------------------------------ sampling

    def sample(
        self,
        count: int,
        *,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        given: Tensor | None = None,
        guidance: float = 0.0,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Draw images.

        Every sub-pixel is the level of the largest logit plus Gumbel noise times ``temperature``.

        Args:
            count: B.
            labels: Class of each image, int (B,); None without classes.
            temperature: 1 draws from the model, 0 takes the most likely level.
            generator: Draws the noise; torch's own when None.
            noise: Gumbel noise (B, C, H, W, V), instead of drawing it.
            given: Upper rows that are kept, uint8 (B, C, R, W).
            guidance: For diffusion models only.
            progress: Is told the share of the work that is done, after every row.

        Returns:
            uint8 (B, C, H, W).

        Raises:
            ConfigError: A temperature below 0, or guidance.
            ShapeError: Labels, noise or given rows of another shape.
        """
        run = self._draw_axial if isinstance(self.backbone, Axial) else self._draw_raster
        return self._sample(run, count, labels, temperature, generator, noise, given, guidance, progress)

    def sample_naive(
        self,
        count: int,
        *,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
        given: Tensor | None = None,
        guidance: float = 0.0,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Draw the images of ``sample`` the slow and obvious way: the whole model runs for every sub-pixel."""
        run = self._draw_naively
        return self._sample(run, count, labels, temperature, generator, noise, given, guidance, progress)

    def _sample(
        self,
        draw: Callable[[Tensor, int, Tensor | None, int, Noise], Iterator[int]],
        count: int,
        labels: Tensor | None,
        temperature: float,
        generator: torch.Generator | None,
        noise: Tensor | None,
        given: Tensor | None,
        guidance: float,
        progress: Callable[[float], None] | None,
    ) -> Tensor:
        spec, device = self.spec, self.head.weight.device
        shape = (count, spec.channels, spec.height, spec.width)
        if count < 1 or temperature < 0:
            raise ConfigError(
                f"ImageGenerator: count must be at least 1 and temperature at least 0, got {count} and {temperature}."
            )
        if guidance:
            raise ConfigError(f"ImageGenerator: guidance is for diffusion models, got {guidance}; leave it out.")
        self._check_labels(labels, count)
        if noise is not None and noise.shape != (*shape, self.levels):
            raise ShapeError(f"ImageGenerator: noise must be {(*shape, self.levels)}, got {tuple(noise.shape)}.")
        if given is not None and (
            given.ndim != 4
            or (*given.shape[:2], given.shape[3]) != (*shape[:2], shape[3])
            or given.shape[2] > shape[2]
            or given.dtype != torch.uint8
        ):
            raise ShapeError(
                f"ImageGenerator: given must be uint8 {shape[:2]} x at most {shape[2]} rows x {shape[3]}, got "
                f"{given.dtype} {tuple(given.shape)}."
            )
        rows = 0 if given is None else given.shape[2]
        total, done = max(1, spec.channels * (spec.height - rows)), 0

        def row_noise(channel: int, row: int) -> Tensor:
            if noise is not None:
                return noise[:, channel, row].to(device) * temperature
            where = device if generator is None else generator.device
            exponential = torch.empty(count, spec.width, self.levels, device=where).exponential_(generator=generator)
            return (-exponential.log()).to(device) * temperature

        with self._evaluating(), torch.inference_mode():
            images = torch.zeros(shape, dtype=torch.uint8, device=device)
            if given is not None:
                images[:, :, :rows] = self.dequantise(self.quantise(given.to(device)))
            labels = None if labels is None else labels.to(device)
            for channel in range(spec.channels if rows < spec.height else 0):
                for _ in draw(images, channel, labels, rows, row_noise):
                    done += 1
                    if progress is not None:
                        progress(done / total)
            if given is not None:
                images[:, :, :rows] = given.to(device)
        return images.clone()  # one that autograd may see

    def _draw_axial(
        self, images: Tensor, channel: int, labels: Tensor | None, rows: int, noise: Noise
    ) -> Iterator[int]:
        """Fill a channel of images (B, C, H, W) in place from row ``rows`` on; yield the number of every row."""
        backbone, (count, _, height, width) = self.backbone, images.shape
        assert isinstance(backbone, Axial)
        base = self._base(images, channel, labels)
        state = backbone.init_state(count, height * width, row=width)
        if rows:
            backbone.read_rows(self.embed(self.quantise(images[:, channel, :rows])) + base[:, :rows], state)
        ids = torch.zeros(count, width, dtype=torch.long, device=images.device)
        embedded = base.new_zeros(count, width + 1, base.shape[-1])  # behind a zero, so that they are shifted
        for row in range(rows, height):
            for column, gumbel in enumerate(noise(channel, row).unbind(1)):
                x = embedded[:, column : column + 1] + base[:, row, column : column + 1]
                chosen = self._choose(backbone.inner_step(x, state)[:, 0], gumbel)
                ids[:, column], embedded[:, column + 1] = chosen, self.embed(chosen)
            images[:, channel, row] = self.dequantise(ids)
            if row + 1 < height:
                backbone.finish_row(embedded[:, 1:] + base[:, row], state)
            yield row

    def _draw_raster(
        self, images: Tensor, channel: int, labels: Tensor | None, rows: int, noise: Noise
    ) -> Iterator[int]:
        """Do as ``_draw_axial`` with a backbone that reads the pixels in raster order."""
        count, _, height, width = images.shape
        base = self._base(images, channel, labels).flatten(1, 2)  # (B, H*W, D)
        state = self.backbone.init_state(count, height * width)
        previous = base.new_zeros(count, 1, base.shape[-1])
        if rows:
            known = self.embed(self.quantise(images[:, channel, :rows])).flatten(1, 2)
            self.backbone.step(F.pad(known[:, :-1], (0, 0, 1, 0)) + base[:, : rows * width], state)
            previous = known[:, -1:]
        ids = torch.zeros(count, width, dtype=torch.long, device=images.device)
        for row in range(rows, height):
            for column, gumbel in enumerate(noise(channel, row).unbind(1)):
                at = row * width + column
                y = self.backbone.step(previous + base[:, at : at + 1], state)
                chosen = self._choose(y[:, 0], gumbel)
                ids[:, column], previous = chosen, self.embed(chosen)[:, None]
            images[:, channel, row] = self.dequantise(ids)
            yield row

    def _draw_naively(
        self, images: Tensor, channel: int, labels: Tensor | None, rows: int, noise: Noise
    ) -> Iterator[int]:
        """Do as ``_draw_axial`` with the whole model for every pixel."""
        for row in range(rows, images.shape[2]):
            for column, gumbel in enumerate(noise(channel, row).unbind(1)):
                ids = self.quantise(images[:, channel])
                logits = self.channel_logits(ids, self.condition(images, channel, labels))[:, row, column]
                images[:, channel, row, column] = self.dequantise((logits.float() + gumbel).argmax(-1))
            yield row

    def _base(self, images: Tensor, channel: int, labels: Tensor | None) -> Tensor:
        """Return what is added to the embeddings of every pixel, (B, H, W, D)."""
        base, condition = self.positions(), self.condition(images, channel, labels)
        return base.expand(images.shape[0], -1, -1, -1) if condition is None else base + condition

    def _choose(self, y: Tensor, gumbel: Tensor) -> Tensor:
        """Return the levels (B,) drawn at features y (B, D) with noise (B, V)."""
        return (self.head(y).float() + gumbel).argmax(-1)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        before = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(before)


class GridPositions(nn.Module):
    """Learned positions of a grid, one table an axis, added.

    Args:
        height: H.
        width: W.
        dim: Width D.
    """

    def __init__(self, height: int, width: int, dim: int) -> None:
        super().__init__()
        self.height = nn.Parameter(torch.zeros(height, dim))
        self.width = nn.Parameter(torch.zeros(width, dim))

    def forward(self) -> Tensor:
        """Return the positions (H, W, D)."""
        return self.height[:, None] + self.width


class Exterior(nn.Module):
    """What the channels before say about every pixel.

    Args:
        encoder: A backbone that sees all positions.
        spec: Facts about the images.
    """

    def __init__(self, encoder: Backbone, spec: VisionSpec) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2 * spec.channels, encoder.config.dim, 3, padding=1)
        self.positions = GridPositions(spec.height, spec.width, encoder.config.dim)
        self.encoder = encoder

    def forward(self, images: Tensor, channel: Tensor, given: Tensor | None = None) -> Tensor:
        """Map images to features of every pixel (B, H, W, D).

        Args:
            images: Bytes (B, C, H, W).
            channel: Channel that comes next, int (B,); only those before it are read.
            given: What else is known, added to the encoder's input, broadcast to (B, H, W, D).
        """
        index = torch.arange(images.shape[1], device=images.device)
        before, now = ((f(index, channel[:, None]))[..., None, None] for f in (torch.lt, torch.eq))  # (B, C, 1, 1)
        planes = [images.to(self.conv.weight.dtype) * before / 255, now.expand_as(images)]
        h = self.conv(torch.cat(planes, dim=1).to(self.conv.weight.dtype)).movedim(1, -1) + self.positions()
        return self.encoder(h if given is None else h + given)
