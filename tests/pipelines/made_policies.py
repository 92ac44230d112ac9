"""Demonstrations of two joints and a gripper, policies that saw none, and what action/predict writes."""

import csv
import json

import numpy as np
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains.action.episodes import Episode
from vertebra.domains.action.model import CVAEPolicy
from vertebra.domains.action.spec import ActionSpec
from vertebra.domains.action.tables import write_npz
from vertebra.pipelines.base import pipeline
from vertebra.tokenizers.action import make_action_tokenizer

STATES, ACTIONS = ("shoulder", "elbow", "load"), ("shoulder", "elbow", "gripper")
FPS, HORIZON = 20.0, 10


def motion(steps=45, seed=0, cameras=(), task="reach"):
    """Two joints that fall short of what they are told; a gripper that closes for a while."""
    rng = np.random.default_rng(seed)
    t = np.arange(steps + 1) / FPS
    joints = np.stack([np.sin(2 * t + seed) * 0.8, np.cos(3 * t) * rng.uniform(0.3, 0.6)], axis=1)
    gripper = ((t > 0.5) & (t < 1.5))[:, None]
    return Episode(
        name=f"run_{seed}",
        states=np.concatenate([joints, t[:, None]], axis=1)[:-1].astype(np.float32),
        actions=np.concatenate([1.1 * joints, gripper], axis=1)[1:].astype(np.float32),
        times=t[:-1],
        task=task,
        images={name: rng.integers(0, 256, (steps, 16, 20, 3), dtype=np.uint8) for name in cameras},
    )


def policy(tokenizer="bspline,num_basis=6", *, states=STATES, actions=ACTIONS, fps=FPS, scale=1.0, **facts):
    """An untrained policy whose actions depend on all it sees."""
    torch.manual_seed(3)
    made = make_action_tokenizer(tokenizer, horizon=HORIZON, dims=len(actions))
    made = made.fit(scale * (2 * torch.rand(200, HORIZON, len(actions)) - 1))
    names = {"state_names": states, "action_names": actions}
    ones = {"state_std": (1,) * len(states), "change_std": (0.1,) * len(states), "start_std": (1,) * len(actions)}
    columns = tuple(states.index(name) if name in states else -1 for name in actions)
    places = {"positions": columns, "relative": (-1,) * len(actions), "state_mean": (0,) * len(states)}
    spec = ActionSpec(tokenizer=made.to_dict(), fps=fps, **{**names, **ones, **places, **facts})
    model = CVAEPolicy(create_backbone("illama_test"), spec, latent=0, patch_size=4).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model


def put(folder, episode, states=STATES, actions=ACTIONS):
    path = folder / f"{episode.name}.npz"
    write_npz(path, episode, state_names=states, action_names=actions)
    return path


def work(model, **options):
    return pipeline("action/predict", model, **{"figures": 0, "device": "cpu", **options})


def loaded(path):
    return json.loads(path.read_text())


def names(folder):
    return sorted(p.name for p in folder.iterdir() if p.is_file())


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))
