"""A policy as a function of what sensors say, in numpy: what control loops, simulators and pipelines call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.domains.action.data import resized, starts_of
from vertebra.domains.action.episodes import Floats
from vertebra.domains.action.model import ActionPolicy
from vertebra.errors import DataError


class PolicyRunner:
    """Chunks of actions for batches of observations.

    Args:
        model: A trained policy.
        device: Where it runs.
        steps: Other number of steps over the time of a chunk, for another rate of control.
    """

    def __init__(self, model: ActionPolicy, device: torch.device | str = "cpu", steps: int | None = None) -> None:
        self.device = torch.device(device)
        self.model = model.to(self.device).eval()
        self.steps = steps
        self.history = model.spec.history
        self.horizon = steps or model.tokenizer.horizon

    def __call__(
        self,
        states: Floats,
        images: Mapping[str, NDArray[np.uint8]],
        tasks: Sequence[str],
        start: Floats | None,
    ) -> Floats:
        """Return the next actions.

        Args:
            states: Observed steps (B, H, S), the current one last, in their units.
            images: Pictures (B, H, height, width, 3) by camera; the last ones of the model's cameras are looked at.
            tasks: What to do, B texts; not looked at by a model that is not told.
            start: The action before (B, A); None where there was none, and a chunk begins at the current state.

        Returns:
            Actions (B, T, A) in their units.

        Raises:
            DataError: A camera is missing, or a task is unknown.
        """
        spec = self.model.spec
        observation: dict[str, Any] = {"states": torch.from_numpy(np.asarray(states, np.float32)).to(self.device)}
        if start is None:
            start = starts_of(spec, np.asarray(states)[:, -1])
        observation["start"] = torch.from_numpy(np.asarray(start, np.float32)).to(self.device)
        if spec.tasks:
            for task in tasks:
                if task not in spec.tasks:
                    raise DataError(f"task: the policy does not know {task!r}; it knows {', '.join(spec.tasks)}.")
            observation["tasks"] = torch.tensor([spec.tasks.index(task) for task in tasks], device=self.device)
        if spec.cameras:
            if lost := [camera for camera in spec.cameras if camera not in images]:
                raise DataError(
                    f"images: the camera {lost[0]!r} is missing; the policy sees {', '.join(spec.cameras)}."
                )
            frames = [[resized(frame, spec.image_size) for frame in images[camera][:, -1]] for camera in spec.cameras]
            observation["images"] = torch.from_numpy(np.asarray(frames).swapaxes(0, 1)).to(self.device)
        chunk: Floats = self.model.act(observation, self.steps).cpu().numpy()
        return chunk
