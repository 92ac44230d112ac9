"""What a policy sees, as tokens: states, the action before, the task, and pictures.

Shapes: B items, P observation tokens, D width, H observed steps, S state dimensions, A action dimensions, C cameras,
R x R pixels, V features of an image model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from vertebra.backbones.base import split_name
from vertebra.backbones.timm import timm_config
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.patches import PatchEmbedding
from vertebra.errors import ConfigError, ShapeError

Observation = Mapping[str, Tensor]
"""``states`` (B, H, S) in their units; where the spec has them ``start`` (B, A), the action before, ``tasks``, int
(B,), and ``images``, uint8 (B, C, R, R, 3)."""


class ObservationEncoder(nn.Module):
    """One token a state, one for the action before, one for the task, and those of every picture.

    Earlier states are told as what has changed since, and the action before as its distance from the current state,
    each in its own scale: what a robot is about to do shows in small differences of large numbers.

    Args:
        spec: Facts about the data.
        dim: D.
        vision: ``patch`` for patches of pixels (https://arxiv.org/abs/2010.11929), or a model of timm,
            ``timm:NAME``, whose last features become tokens.
        patch_size: Height and width of the patches.
        noise: Standard deviation of what is added in training to states, changes and the action before, once scaled.

    Raises:
        ConfigError: The spec has nothing to see, or patches do not fit into its images.
    """

    def __init__(
        self, spec: ActionSpec, dim: int, *, vision: str = "patch", patch_size: int = 8, noise: float = 0.0
    ) -> None:
        super().__init__()
        if noise < 0:
            raise ConfigError(f"observation_noise must be at least 0, got {noise}.")
        self.spec, self.noise = spec, noise
        count = len(spec.state_names)
        if not count and not spec.cameras:
            raise ConfigError(
                "ObservationEncoder: the data has neither states nor cameras; a policy must see something."
            )
        for name in ("state_mean", "state_std", "change_std", "start_std"):
            self.register_buffer(name, torch.tensor(getattr(spec, name)), persistent=False)
        self.state_mean: Tensor
        self.state_std: Tensor
        self.change_std: Tensor
        self.start_std: Tensor
        self.state = nn.Sequential(nn.Linear(count, dim), nn.GELU(), nn.Linear(dim, dim)) if count else None
        self.change = nn.Linear(count, dim) if count and spec.history > 1 else None
        self.start = nn.Linear(len(spec.action_names), dim) if spec.past_action else None
        self.task_embed = nn.Embedding(len(spec.tasks), dim) if spec.tasks else None
        self.camera = CameraEncoder(spec, dim, vision, patch_size) if spec.cameras else None
        self.positions = nn.Parameter(0.02 * torch.randn(self.plain_tokens, dim)) if self.plain_tokens else None

    @property
    def plain_tokens(self) -> int:
        """Tokens before those of pictures."""
        states = self.spec.history if self.state is not None else 0
        return states + (self.start is not None) + (self.task_embed is not None)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        names = {"positions", "task_embed.weight"} & {name for name, _ in self.named_parameters()}
        return names | (set() if self.camera is None else {f"camera.{n}" for n in self.camera.no_weight_decay()})

    def forward(self, observation: Observation) -> Tensor:
        """Map an observation to tokens (B, P, D).

        Raises:
            ShapeError: The states are not (B, H, S).
        """
        states = observation["states"]
        if states.ndim != 3 or states.shape[1:] != (self.spec.history, len(self.spec.state_names)):
            raise ShapeError(
                f"states must be (B, {self.spec.history}, {len(self.spec.state_names)}), got {tuple(states.shape)}."
            )
        tokens = []
        if self.state is not None:
            now = states[:, -1:]
            tokens.append(self.state(self._noisy((now - self.state_mean) / self.state_std)))  # (B, 1, D)
            if self.change is not None:
                tokens.append(self.change(self._noisy((states[:, :-1] - now) / self.change_std)))  # (B, H - 1, D)
        if self.start is not None:
            away = (observation["start"] - starts(self.spec, states)) / self.start_std  # (B, A)
            tokens.append(self.start(self._noisy(away))[:, None])
        if self.task_embed is not None:
            tokens.append(self.task_embed(observation["tasks"])[:, None])
        plain = [] if self.positions is None else [torch.cat(tokens, dim=1) + self.positions]
        if self.camera is not None:
            plain.append(self.camera(observation["images"]))
        return torch.cat(plain, dim=1)

    def _noisy(self, x: Tensor) -> Tensor:
        return x + self.noise * torch.randn_like(x) if self.training and self.noise else x


class CameraEncoder(nn.Module):
    """Pictures of all cameras to tokens, with a learned vector for each place and camera.

    Args:
        spec: Facts about the data.
        dim: D.
        vision: See ``ObservationEncoder``.
        patch_size: See ``ObservationEncoder``.

    Raises:
        ConfigError: As in ``ObservationEncoder``.
    """

    def __init__(self, spec: ActionSpec, dim: int, vision: str, patch_size: int) -> None:
        super().__init__()
        size = spec.image_size
        self.patches: PatchEmbedding | None = None
        if vision == "patch":
            if patch_size < 1 or size % patch_size:
                raise ConfigError(f"patch_size={patch_size} must divide data.image_size={size}.")
            self.patches = PatchEmbedding(3, dim, patch_size)
            places = (size // patch_size) ** 2
        elif vision.startswith("timm:"):
            name, fields = split_name(vision.removeprefix("timm:"))
            self.model = timm_config(name, {"size": [size, size], **fields}).create().eval()
            own = list(self.model.parameters())
            with torch.enable_grad():
                features = self._features(torch.zeros(1, 3, size, size))
                used = torch.autograd.grad(features.sum(), own, allow_unused=True)
            for parameter, grad in zip(own, used, strict=True):
                parameter.requires_grad_(grad is not None)  # what only a classifier uses would never learn
            places = features.shape[1]
            self.proj = nn.Linear(self.model.num_features, dim)
        else:
            raise ConfigError(f"vision must be patch or timm:NAME, got {vision!r}.")
        self.positions = nn.Parameter(torch.zeros(len(spec.cameras), places, dim))
        nn.init.normal_(self.positions, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay must leave alone."""
        inner = self.model.no_weight_decay() if hasattr(getattr(self, "model", None), "no_weight_decay") else set()
        return {"positions"} | {f"model.{name}" for name in inner}

    def forward(self, images: Tensor) -> Tensor:
        """Map images, uint8 (B, C, R, R, 3), to tokens (B, C * places, D)."""
        x = images.flatten(0, 1).movedim(-1, 1).to(self.positions.dtype) / 127.5 - 1  # (B * C, 3, R, R)
        tokens = self.proj(self._features(x)) if self.patches is None else self.patches(x).flatten(1, 2)
        return (tokens.unflatten(0, images.shape[:2]) + self.positions).flatten(1, 2)

    def _features(self, x: Tensor) -> Tensor:
        """Features (B, places, V) of a model of timm, which has them in one of three orders."""
        y: Tensor = self.model.forward_features(x)
        if y.ndim == 3:
            return y
        if y.shape[1] == self.model.num_features:
            return y.flatten(2).mT
        return y.flatten(1, 2)


def starts(spec: ActionSpec, states: Tensor) -> Tensor:
    """Return where chunks begin when no action was before, (B, A), for states (B, H, S): at the current state.

    An action dimension without a state of its name begins at 0.
    """
    if not spec.state_names:
        return states.new_zeros(states.shape[0], len(spec.action_names))
    columns = torch.tensor(spec.positions, device=states.device)
    return torch.where(columns >= 0, states[:, -1, columns.clamp_min(0)], 0.0)
