"""Imitation of a real robot: the next 30 actions of a Unitree G1, policies on each backbone beside simple guesses.

    python benchmarks/action_imitation.py --data ../shared/data/action/unitree_g1 --out DIR [--policies cvae,decoder]

Episodes 0 to 44 train, 45 to 49 choose the checkpoint, 50 to 59 test: the numbers are root mean squares over all steps
that exist and all 26 columns (joints in rad, hands in their own unit from 0 to 1). Every policy sees the last four
states and the action before, and is trained for the same number of steps with the same settings. What is done is kept
in DIR, so that the script goes on where it was stopped. A row takes minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from vertebra.domains.action.data import ActionData
from vertebra.domains.action.task import ActionPolicyTask
from vertebra.domains.base import load_task
from vertebra.domains.optim import OptimizerConfig

HORIZON, HISTORY = 30, 4
BACKBONES = ("illama_nano", "hybrid_nano", "fit_nano", "axial_nano", "ebranchformer_nano", "opt_nano")
POLICIES = {
    "cvae": {"policy": "cvae", "latent": 0, "regression": "l2"},
    "cvae with a latent": {"policy": "cvae", "latent": 16, "kl_weight": 1.0, "regression": "l2"},
    "decoder": {"policy": "decoder", "grouped": True, "smoothing": 3.0, "readout": "mean"},
    "encoder-decoder": {"policy": "encoder-decoder", "grouped": True, "smoothing": 3.0, "readout": "mean"},
}


def make_data(root: str) -> ActionData:
    """Read the demonstrations."""
    return ActionData(
        root=root,
        val_episodes="45:50",
        test_episodes="50:60",
        horizon=HORIZON,
        history=HISTORY,
        relative="all",
        past_action=True,
        tokenizer="bspline,num_basis=6",
        every=2,
        batch_size=128,
    )


def table(data: ActionData, split: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features (N, F), next actions and the action before, both less the current state, and which are real."""
    items = data.items(split)
    batch = items.fetch(np.arange(len(items.lengths)), 0)
    states, before = batch["states"].numpy(), batch["start"].numpy()
    now = states[:, -1]
    features = np.concatenate([states.reshape(len(states), -1), before], axis=1)
    return features, batch["actions"].numpy() - now[:, None], batch["real"].numpy(), before - now


def rmse(guess: np.ndarray | float, truth: np.ndarray, real: np.ndarray) -> float:
    """Root of the mean squared error over real steps."""
    return float(np.sqrt((((guess - truth) ** 2) * real[:, :, None]).sum() / real.sum() / truth.shape[-1]))


def baselines(data: ActionData) -> dict[str, float]:
    """Simple guesses on the test episodes; what they have to choose is chosen on the validation episodes."""
    train, val, test = (table(data, split) for split in ("train", "val", "test"))
    _, truth, real, before = test
    found = {
        "hold the current state": rmse(0.0, truth, real),
        "hold the action before": rmse(before[:, None], truth, real),
    }
    # What the last action added to the one before it, again at every step.
    items = data.items("test")
    last = items.actions[items.steps - 1] - items.actions[np.maximum(items.steps - 2, items.first)]
    last[items.steps <= items.first] = 0
    ahead = np.arange(1, HORIZON + 1)[None, :, None]
    for share in (1.0, 0.5):
        name = "repeat the last motion" if share == 1 else "repeat half of the last motion"
        found[name] = rmse(before[:, None] + share * ahead * last[:, None], truth, real)
    mean, std = train[0].mean(0), train[0].std(0) + 1e-6

    def scaled(x: np.ndarray) -> np.ndarray:
        return np.concatenate([(x - mean) / std, np.ones((len(x), 1))], axis=1)

    x, y = scaled(train[0]), train[1].reshape(len(train[1]), -1)
    choices = []
    for strength in 10.0 ** np.arange(-1, 5):
        weights = np.linalg.solve(x.T @ x + strength * np.eye(x.shape[1]), x.T @ y)
        guesses = [(scaled(part[0]) @ weights).reshape(part[1].shape) for part in (val, test)]
        choices.append((rmse(guesses[0], val[1], val[2]), rmse(guesses[1], truth, real)))
    found["ridge regression"] = min(choices)[1]
    return found


def train(name: str, policy: str, root: str, out: Path, epochs: int) -> dict[str, float]:
    """Train one policy, and measure its best checkpoint."""
    pl.seed_everything(0, verbose=False)
    data = make_data(root)
    task = ActionPolicyTask(
        f"{name},causal=false",
        observation_noise=0.1,
        dropout=0.2,
        ema=0.99,
        optimizer=OptimizerConfig(lr=2e-3, weight_decay=0.05, betas=(0.9, 0.95), warmup=50, min_lr_ratio=0.02),
        **POLICIES[policy],
    )
    best = ModelCheckpoint(dirpath=out, filename="best", monitor="val/reconstruct_mse", save_weights_only=True)
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", logger=False, callbacks=[best], enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, gradient_clip_val=1.0,
    )  # fmt: skip
    begin = time.perf_counter()
    trainer.fit(task, data)
    seconds = time.perf_counter() - begin
    kept = load_task(best.best_model_path)
    trainer.test(kept, data, verbose=False)
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
    Path(best.best_model_path).unlink()
    return {**metrics, "val/rmse": float(best.best_model_score) ** 0.5, "seconds": seconds,
            "parameters": sum(p.numel() for p in kept.model.parameters())}  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="../shared/data/action/unitree_g1")
    parser.add_argument("--out", type=Path, required=True, help="where finished rows are kept")
    parser.add_argument("--policies", default="cvae,decoder,encoder-decoder", help=f"of {', '.join(POLICIES)}")
    parser.add_argument("--backbones", default=",".join(BACKBONES))
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    warnings.filterwarnings("ignore")
    for logger in ("lightning.pytorch", "vertebra"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    args.out.mkdir(parents=True, exist_ok=True)
    data = make_data(args.data)
    data.setup("fit")
    data.setup("test")
    simple = baselines(data)
    best = min(simple.values())
    print(f"test: {len(data.items('test').lengths):,} steps of 10 episodes\n")
    print("| | RMSE of the next 30 actions | of the best simple guess |\n| --- | ---: | ---: |")
    for name, value in simple.items():
        print(f"| {name} | {value:.4f} | {value / best:.2f} |", flush=True)
    for policy in args.policies.split(","):
        for name in args.backbones.split(","):
            file = args.out / f"{policy}-{name}-{args.epochs}.json"
            if not file.is_file():
                file.write_text(json.dumps(train(name, policy, args.data, args.out, args.epochs)))
            row = json.loads(file.read_text())
            value = row["test/rmse"]
            print(
                f"| {policy}, {name} ({row['parameters'] / 1e6:.2f}M) | {value:.4f} | {value / best:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
