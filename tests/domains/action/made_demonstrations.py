"""Small demonstrations whose numbers can be worked out by hand."""

import dataclasses

import numpy as np
import torch

from vertebra.domains.action.data import ActionItems, fitted
from vertebra.domains.action.episodes import Demonstrations, Episode
from vertebra.domains.action.spec import ActionSpec
from vertebra.tokenizers.action import QUANTILES, make_action_tokenizer

STATE_NAMES = ("x", "y", "speed")
ACTION_NAMES = ("x", "y", "gripper")


def episode(number=0, steps=12, fps=10.0, task="reach", cameras=(), size=8):
    """At step t of episode n: x = n + t / 100, y = its wave, and actions say where the next step will be."""
    t = np.arange(steps + 1)
    x, y = number + t / 100, np.sin(t / 3 + number)
    states = np.stack([x, y, np.gradient(y)], 1)[:-1]
    actions = np.stack([x[1:], y[1:], (t[1:] > steps / 2).astype(float)], 1)
    shade = (10 * number + np.arange(steps))[:, None, None, None]
    ramp = 5 * np.arange(size)[:, None, None] + np.arange(size)[:, None]  # rows and columns can be told apart
    return Episode(
        name=f"episode_{number}",
        states=states.astype(np.float32),
        actions=actions.astype(np.float32),
        times=np.arange(steps) / fps,
        task=task,
        images={camera: (shade + 50 * i + ramp + np.zeros(3)).astype(np.uint8) for i, camera in enumerate(cameras)},
    )


def demonstrations(count=6, steps=12, splits=None, tasks=("reach",), **options):
    """Episodes 0, 1, ... whose tasks take turns."""
    return Demonstrations(
        episodes=tuple(episode(i, steps, task=tasks[i % len(tasks)], **options) for i in range(count)),
        fps=options.get("fps", 10.0),
        state_names=STATE_NAMES,
        action_names=ACTION_NAMES,
        robot="plane",
        splits=splits or {},
    )


SPEC = {
    "fps": 10.0,
    "state_names": STATE_NAMES,
    "action_names": ACTION_NAMES,
    "state_mean": (1.5, 0.0, 0.0),
    "state_std": (1.0, 0.7, 0.2),
    "change_std": (0.01, 0.3, 0.1),
    "start_std": (0.1, 0.2, 0.5),
    "positions": (0, 1, -1),
    "relative": (-1, -1, -1),
}
"""Of these demonstrations, the tokenizer left out."""


def made_items(tokenizer="bspline,num_basis=4,degree=2,vocab_size=16", horizon=6, count=4, **changes):
    """Items of some demonstrations, their spec with a tokenizer fitted to them."""
    spec = ActionSpec(**{"tokenizer": {}, "image_size": 8, **SPEC, **changes})
    sets = demonstrations(count, cameras=spec.cameras, tasks=spec.tasks or ("reach",))
    fresh = make_action_tokenizer(tokenizer, horizon=horizon, dims=3, grippers=(2,))
    spec = dataclasses.replace(spec, tokenizer=fitted(fresh, sets.episodes, spec, QUANTILES).to_dict())
    return ActionItems(sets.episodes, spec, horizon)


def made_batch(items, count=6):
    """Some items from all over, the last ones of episodes among them."""
    return items.fetch(np.linspace(0, len(items.steps) - 1, count).round().astype(np.int64), 0)


def shaken(model, size=0.1):
    """The model in evaluation mode; fresh norms of 1 and biases of 0 would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.randn_like(parameter))
    return model.eval()
