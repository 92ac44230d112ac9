"""Small demonstrations whose numbers can be worked out by hand."""

import numpy as np

from vertebra.domains.action.episodes import Demonstrations, Episode

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
