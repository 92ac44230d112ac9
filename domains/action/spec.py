"""What the data knows about a robot's actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ActionSpec(DataSpec):
    """Facts about demonstrations.

    Args:
        tokenizer: How a chunk of actions is written, as ``Tokenizer.to_dict`` describes it, with its bounds.
        fps: Steps a second.
        history: Observed steps, the current one last.
        state_names: Names of the S state dimensions.
        action_names: Names of the D action dimensions.
        state_mean: Mean of each state dimension.
        state_std: Standard deviation of each; what hardly moves has 1.
        change_std: Root mean square of the change of each over the observed steps, likewise.
        start_std: Root mean square of each action dimension of the action before, less its state, likewise.
        positions: For each action dimension the state dimension of the same name, where chunks begin; -1 for none.
        relative: For each action dimension the state dimension it is told relative to; -1 for none.
        past_action: Whether the action before is observed too.
        cameras: Names of the cameras.
        image_size: Height and width that pictures are brought to.
        tasks: Texts that the model can be told, each one token; empty for a model that is not told.
    """

    domain: ClassVar[str] = "action"

    tokenizer: dict[str, Any]
    fps: float
    history: int = 1
    state_names: tuple[str, ...] = ()
    action_names: tuple[str, ...] = ()
    state_mean: tuple[float, ...] = ()
    state_std: tuple[float, ...] = ()
    change_std: tuple[float, ...] = ()
    start_std: tuple[float, ...] = ()
    positions: tuple[int, ...] = ()
    relative: tuple[int, ...] = ()
    past_action: bool = False
    cameras: tuple[str, ...] = ()
    image_size: int = 64
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.fps > 0 or self.history < 1:
            raise ConfigError(
                f"ActionSpec: fps must be above 0 and history at least 1, got {self.fps}, {self.history}."
            )
        for name in ("state_mean", "state_std", "change_std"):
            if len(getattr(self, name)) != len(self.state_names):
                raise ConfigError(f"ActionSpec: {name} must have one number for each of state_names.")
        for name in ("positions", "relative", "start_std"):
            if len(getattr(self, name)) != len(self.action_names):
                raise ConfigError(f"ActionSpec: {name} must have one number for each of action_names.")
        for name in ("positions", "relative"):
            columns = getattr(self, name)
            if any(not -1 <= column < len(self.state_names) for column in columns):
                raise ConfigError(f"ActionSpec: {name} must name columns of the state, or be -1.")
