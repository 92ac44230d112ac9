"""Image generation by diffusion: patches, any bidirectional backbone, prediction of the noise; plain torch.

With a FIT built with ``context`` this is the denoiser of its paper (https://arxiv.org/abs/2305.12689): the noise level
and the class are tokens that the latents read, and latents can start from those of an earlier pass (latent
self-conditioning, https://arxiv.org/abs/2212.11972). To other backbones both are given as vectors that are added to the
features. Noise is scheduled by a cosine (https://arxiv.org/abs/2102.09672, equation 17), images are drawn by DDIM
(https://arxiv.org/abs/2010.02502), with classifier-free guidance (https://arxiv.org/abs/2207.12598). The network
predicts the noise, or the velocity, from which the noise follows (https://arxiv.org/abs/2202.00512, appendix D).

Shapes: B images, C channels, H x W pixels, P patch size, h x w patches, F values of a patch, D width, K classes,
G groups, M latents of a group, E width of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.backbones.fit import FIT, sin_cos
from vertebra.backbones.layers.interleaved import MLPLayer
from vertebra.domains.adapting import Adapter, by_name, interpolated
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, ShapeError

Target = Literal["noise", "velocity"]

SMALLEST_GAMMA = 1e-5
"""Share of the signal that is left at the most noise."""


class ImageDiffusion(DomainModel):
    """Images from noise.

    Args:
        backbone: Any bidirectional one; a FIT with ``context`` reads noise level and class through its latents.
        spec: Facts about the data; ``classes`` are what can be asked for, none for a model without classes.
        patch_size: P.
        cond_drop: Share of training images whose class is hidden, which guidance needs.
        self_cond: Share of training images for which a first pass gives the latents that the second begins with; 0 for
            a model without. Needs a FIT with ``context``.
        b_scale: Images are scaled to -b_scale .. b_scale; less makes every noise level noisier.
        target: What the network's output is: ``noise``, or ``velocity``, sqrt(gamma) * noise - sqrt(1 - gamma) * image,
            which settles colours and brightness even where nothing but noise is seen. The loss is that of the noise in
            both cases. ``auto``: noise for a FIT with ``context``, as in its paper, otherwise velocity.
    """

    task: ClassVar[str] = "vision/diffusion"
    input_parts: ClassVar[tuple[str, ...]] = (
        "stem",
        "stem_norm",
        "pos_embed",
        "time_embed",
        "cond_proj",
        "previous_mlp",
        "previous_norm",
    )
    spec: VisionSpec

    def __init__(
        self,
        backbone: Backbone,
        spec: VisionSpec,
        *,
        patch_size: int = 4,
        cond_drop: float = 0.1,
        self_cond: float = 0.0,
        b_scale: float = 1.0,
        target: Target | Literal["auto"] = "auto",
    ) -> None:
        config = backbone.config
        by_latents = isinstance(backbone, FIT) and backbone.config.context
        if target == "auto":
            target = "noise" if by_latents else "velocity"
        super().__init__(
            backbone,
            spec,
            patch_size=patch_size,
            cond_drop=cond_drop,
            self_cond=self_cond,
            b_scale=b_scale,
            target=target,
        )
        if config.causal:
            raise ConfigError(
                "ImageDiffusion: every patch must see all others, which a causal backbone hides; use causal=false, as "
                "in 'fit_nano,causal=false,context=true'."
            )
        if config.family == "timm":
            raise ConfigError("ImageDiffusion: a model of timm reads whole images, not noisy patches; use a preset.")
        if patch_size < 1 or spec.height % patch_size or spec.width % patch_size:
            raise ConfigError(
                f"ImageDiffusion: patch_size must divide the image size {spec.height} x {spec.width}, got {patch_size}."
            )
        for name, value in (("cond_drop", cond_drop), ("self_cond", self_cond)):
            if not 0 <= value <= 1:
                raise ConfigError(f"ImageDiffusion: {name} must be from 0 to 1, got {value}.")
        if b_scale <= 0:
            raise ConfigError(f"ImageDiffusion: b_scale must be above 0, got {b_scale}.")
        if target not in ("noise", "velocity"):
            raise ConfigError(f"ImageDiffusion: target must be noise, velocity or auto, got {target!r}.")
        if self_cond and not by_latents:
            raise ConfigError(
                f"ImageDiffusion: self_cond={self_cond} needs a FIT with context=true, got {config.family}; leave it "
                "out."
            )
        self.patch_size, self.cond_drop, self.self_cond, self.b_scale = patch_size, cond_drop, self_cond, b_scale
        self.by_latents, self.target = by_latents, target
        values = spec.channels * patch_size**2
        width = backbone.config.latent_dim if isinstance(backbone, FIT) and self.by_latents else config.dim
        self.stem = nn.Linear(values, config.dim)
        self.stem_norm = nn.LayerNorm(config.dim, 1e-6)
        self.pos_embed: nn.Parameter | None = None
        if not isinstance(backbone, FIT):  # which has positions of its own
            grid = (spec.height // patch_size, spec.width // patch_size)
            self.pos_embed = nn.Parameter(torch.empty(1, *grid, config.dim))
        self.time_embed = TimeEmbedding(width)
        self.cond_proj = nn.Linear(len(spec.classes), width) if spec.classes else None
        self.previous_mlp = MLPLayer(width) if self_cond else None
        self.previous_norm = nn.LayerNorm(width, 1e-6) if self_cond else None
        self.head = nn.Linear(config.dim, values)
        self.init_weights()

    def init_weights(self) -> None:
        """Draw fresh weights of everything but the backbone.

        | parameter | distribution |
        | --- | --- |
        | weights of projections | Glorot uniform |
        | pos_embed | normal, std 0.02, cut at 2 std |
        | previous_norm | 0 |
        | biases | 0 |
        | other norms | 1 |
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith("backbone."):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if self.pos_embed is not None:
            nn.init.trunc_normal_(self.pos_embed, std=0.02, a=-0.04, b=0.04)
        if self.previous_norm is not None:
            nn.init.zeros_(self.previous_norm.weight)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        return set() if self.pos_embed is None else {"pos_embed"}

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: another image size, other classes."""
        found = {"pos_embed": interpolated("patches", axes=(1, 2))}
        if isinstance(origin.spec, VisionSpec):
            found["cond_proj.weight"] = by_name(origin.spec.classes, self.spec.classes, "classes", axis=1)
        return found

    def forward(
        self, noisy: Tensor, gamma: Tensor, labels: Tensor | None = None, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the noise in images.

        Args:
            noisy: sqrt(gamma) * image + sqrt(1 - gamma) * noise, (B, C, H, W), with images as ``scale`` gives them.
            gamma: Share of the signal, (B,), from 0 to 1.
            labels: Classes, int (B,), -1 for none; None for none at all.
            previous: Latents (B, G, M, E) of an earlier pass, for a model with ``self_cond``.

        Returns:
            The noise (B, C, H, W), and the latents (B, G, M, E), or None where the backbone has none.

        Raises:
            ConfigError: The model knows no classes, or not these.
            ShapeError: Images or labels have another shape.
        """
        wanted = (self.spec.channels, self.spec.height, self.spec.width)
        if noisy.shape[1:] != wanted:
            raise ShapeError(f"ImageDiffusion: images must be (B, {', '.join(map(str, wanted))}), got {_shape(noisy)}.")
        self._check_labels(labels, noisy.shape[0], values=False)
        cond = self._one_hot(labels, noisy.shape[0])
        tokens, latents = self.denoise(self._patches(noisy), gamma, cond, previous)
        found = self._pixels(tokens)
        return found if self.target == "noise" else mix(found, noisy, gamma), latents

    def denoise(
        self, tokens: Tensor, gamma: Tensor, cond: Tensor | None = None, previous: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Run the network: predict the noise in patches, or whatever ``target`` is.

        Args:
            tokens: Noisy patches (B, *grid, F).
            gamma: Share of the signal, (B,).
            cond: The class as a vector (B, K), 0 where there is none; None for a model without classes.
            previous: As in ``forward``.

        Returns:
            The prediction (B, *grid, F), and the latents (B, G, M, E), or None where the backbone has none.
        """
        x = self.stem_norm(self.stem(tokens))  # (B, *grid, D)
        said = [self.time_embed(gamma)]
        if self.cond_proj is not None and cond is not None:
            said.append(self.cond_proj(cond))
        backbone = self.backbone
        if not (isinstance(backbone, FIT) and self.by_latents):
            x = x if self.pos_embed is None else x + self.pos_embed
            return self.head(backbone(x + sum(said).unflatten(0, (-1, *[1] * (x.ndim - 2))))), None
        add = None
        if self.previous_mlp is not None and self.previous_norm is not None:
            if previous is None:
                previous = x.new_zeros(len(x), 1, 1, backbone.config.latent_dim)
            add = self.previous_norm(self.previous_mlp(previous))
        y, latents = backbone.with_latents(x, context=torch.stack(said, dim=1), add=add)
        return self.head(y), latents

    def loss(self, images: Tensor, labels: Tensor | None = None, *, generator: torch.Generator | None = None) -> Tensor:
        """Mean squared error of the noise predicted in images, each with a noise level of its own.

        In evaluation no class is hidden, and with ``self_cond`` all images have a first pass.

        Args:
            images: uint8 (B, C, H, W).
            labels: Classes, int (B,), -1 for none; None for none at all.
            generator: Draws noise levels, noise, and what is hidden; torch's own when None.

        Returns:
            A number.

        Raises:
            ConfigError: The model knows no classes, or not these.
            ShapeError: Images or labels have another shape.
        """
        self._check_labels(labels, len(images))
        x = self.scale(images)
        batch, device = len(x), x.device
        where = device if generator is None else generator.device

        def uniform() -> Tensor:
            return torch.rand(batch, generator=generator, device=where).to(device)

        gamma = cosine_gamma(uniform())
        noise = torch.randn(x.shape, generator=generator, device=where).to(device)
        noisy = mix(x, noise, gamma)
        if labels is not None and self.training:
            labels = labels.masked_fill(uniform() < self.cond_drop, -1)
        previous = None
        if self.self_cond:
            with torch.no_grad():
                previous = self(noisy, gamma, labels)[1]
            if self.training:
                kept = (uniform() < self.self_cond).reshape(-1, 1, 1, 1)
                previous = None if previous is None else previous * kept
        found: Tensor = self(noisy, gamma, labels, previous)[0]
        return F.mse_loss(found.float(), noise.float())

    @torch.no_grad()
    def sample(
        self,
        count: int,
        *,
        labels: Tensor | None = None,
        temperature: float = 1.0,
        guidance: float = 0.0,
        steps: int = 100,
        eta: float = 0.0,
        generator: torch.Generator | None = None,
        given: Tensor | None = None,
        progress: Callable[[float], None] | None = None,
    ) -> Tensor:
        """Draw images.

        Args:
            count: Number of images B.
            labels: Classes, int64 (B,), -1 for none; None for none at all.
            temperature: Standard deviation of the noise that is drawn.
            guidance: w of (1 + w) * (noise given the class) - w * (noise without it); 0 for the class alone.
            steps: Noise levels that are passed through.
            eta: Fresh noise of a step: 0 for DDIM, 1 for DDPM.
            generator: Where random numbers come from; the same state gives the same images.
            given: Top rows that are kept, uint8 (B, C, rows, W).
            progress: Called with the share that is done after every step.

        Returns:
            uint8 (B, C, H, W).

        Raises:
            ConfigError: A setting is impossible, or the model does not know the classes.
            ShapeError: ``labels`` or ``given`` have another shape.
        """
        if count < 1 or steps < 1:
            raise ConfigError(f"sample: count and steps must be at least 1, got {count} and {steps}.")
        if temperature < 0 or not 0 <= eta <= 1:
            raise ConfigError(
                f"sample: temperature must be at least 0 and eta from 0 to 1, got {temperature} and {eta}."
            )
        self._check_labels(labels, count)
        if guidance and labels is None:
            raise ConfigError(f"sample: guidance={guidance} needs labels to be guided to; give labels, or guidance 0.")
        spec, like = self.spec, self.head.weight
        if given is not None and (
            given.ndim != 4
            or (len(given), given.shape[1], given.shape[3]) != (count, spec.channels, spec.width)
            or given.shape[2] > spec.height
            or given.dtype != torch.uint8
        ):
            raise ShapeError(
                f"sample: given must be uint8 ({count}, {spec.channels}, up to {spec.height} rows, {spec.width}), got "
                f"{given.dtype} {_shape(given)}."
            )

        def draw() -> Tensor:
            where = like.device if generator is None else generator.device
            shape = (count, spec.channels, spec.height, spec.width)
            noise = torch.randn(shape, generator=generator, device=where)
            return temperature * noise.to(like.device)

        labels = None if labels is None else labels.to(like.device)
        training = self.training
        self.eval()
        try:
            start = x = draw()
            rows = 0 if given is None else given.shape[2]
            kept = None if given is None else self._to_range(given.to(like.device))
            levels = cosine_gamma(torch.linspace(1, 0, steps + 1, device=like.device))
            levels[-1] = 1
            previous = None
            for number in range(steps):
                gamma, after = levels[number], levels[number + 1]
                if kept is not None:
                    x = torch.cat([mix(kept, start[:, :, :rows], gamma), x[:, :, rows:]], dim=2)
                noise, previous = self._guided(x, gamma.expand(count), labels, guidance, previous)
                clean = ((x - (1 - gamma).sqrt() * noise) / gamma.sqrt()).clamp(-self.b_scale, self.b_scale)
                noise = (x - gamma.sqrt() * clean) / (1 - gamma).sqrt()  # of the clean image as it was clamped
                fresh = eta * ((1 - after) / (1 - gamma) * (1 - gamma / after)).sqrt()
                x = after.sqrt() * clean + (1 - after - fresh**2).clamp(min=0).sqrt() * noise
                if eta:
                    x = x + fresh * draw()
                if progress is not None:
                    progress((number + 1) / steps)
        finally:
            self.train(training)
        images = ((x / self.b_scale + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        if given is not None:
            images[:, :, :rows] = given.to(images.device)
        return images

    def scale(self, images: Tensor) -> Tensor:
        """Map bytes (B, C, H, W) to floats from -b_scale to b_scale.

        Raises:
            ShapeError: The images have another shape or are not of bytes.
        """
        wanted = (self.spec.channels, self.spec.height, self.spec.width)
        if images.dtype != torch.uint8 or images.shape[1:] != wanted:
            raise ShapeError(
                f"ImageDiffusion: images must be uint8 (B, {', '.join(map(str, wanted))}), got {images.dtype} "
                f"{_shape(images)}."
            )
        return self._to_range(images)

    def _to_range(self, images: Tensor) -> Tensor:
        return (images.float() / 127.5 - 1) * self.b_scale

    def _guided(
        self, x: Tensor, gamma: Tensor, labels: Tensor | None, guidance: float, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Predict the noise (B, C, H, W), in float32, with guidance, whose two passes are one batch."""
        x = x.to(self.stem.weight.dtype)
        if not guidance or labels is None:
            noise, latents = self(x, gamma, labels, previous)
            return noise.float(), latents
        both = torch.cat([labels, torch.full_like(labels, -1)])
        noise, latents = self(x.repeat(2, 1, 1, 1), gamma.repeat(2), both, previous)
        with_class, without = noise.float().chunk(2)
        return (1 + guidance) * with_class - guidance * without, latents

    def _check_labels(self, labels: Tensor | None, batch: int, *, values: bool = True) -> None:
        """Refuse labels of another shape, or of no class; to look at their values waits for a GPU."""
        count = len(self.spec.classes)
        if labels is None:
            return
        if not count:
            raise ConfigError("ImageDiffusion: this model was trained without classes; leave labels out.")
        if labels.shape != (batch,) or labels.is_floating_point():
            raise ShapeError(
                f"ImageDiffusion: labels must be integers ({batch},), got {labels.dtype} {_shape(labels)}."
            )
        if values and not -1 <= int(labels.min()) <= int(labels.max()) < count:
            raise ConfigError(
                f"ImageDiffusion: labels must be from 0 to {count - 1}, or -1 for none, got {int(labels.min())} to "
                f"{int(labels.max())}."
            )

    def _one_hot(self, labels: Tensor | None, batch: int) -> Tensor | None:
        count, weight = len(self.spec.classes), self.stem.weight
        if labels is None:
            return weight.new_zeros(batch, count) if count else None
        one_hot = F.one_hot(labels.long().clamp(min=0), count) * (labels >= 0)[:, None]
        return one_hot.to(weight.dtype)

    def _patches(self, images: Tensor) -> Tensor:
        """Map images (B, C, H, W) to patches (B, h, w, F), whose values go by row, column, channel."""
        size = self.patch_size
        x = images.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # (B, C, h, P, w, P)
        return x.permute(0, 2, 4, 3, 5, 1).flatten(3)

    def _pixels(self, patches: Tensor) -> Tensor:
        """Undo ``_patches``."""
        size = self.patch_size
        x = patches.unflatten(3, (size, size, -1))  # (B, h, w, P, P, C)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


class TimeEmbedding(nn.Module):
    """A number from 0 to 1 as a vector: sines and cosines, standardised, through an MLP.

    Args:
        dim: Width of the vector.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(max(dim // 4, 2), dim)
        self.fc2 = nn.Linear(dim, dim)

    def forward(self, time: Tensor) -> Tensor:
        """Map numbers (B,) to vectors (B, dim)."""
        code = sin_cos(1000 * time.float()[:, None], self.fc1.in_features)
        code = F.layer_norm(code, code.shape[-1:], eps=1e-12)
        return self.fc2(F.silu(self.fc1(code.to(self.fc1.weight.dtype))))


def cosine_gamma(time: Tensor) -> Tensor:
    """Share of the signal that is left at a time from 0 (all) to 1 (none), equation 17 of the cosine schedule."""
    offset = 0.008
    start = math.cos(offset / (1 + offset) * math.pi / 2) ** 2
    gamma = ((time + offset) / (1 + offset) * math.pi / 2).cos() ** 2 / start
    return gamma.clamp(SMALLEST_GAMMA, 1.0)


def mix(images: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
    """Mix images and noise (B, C, H, W), with a share of the signal for all () or for each (B,)."""
    gamma = gamma.reshape(-1, 1, 1, 1)
    return gamma.sqrt() * images + (1 - gamma).sqrt() * noise


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)
