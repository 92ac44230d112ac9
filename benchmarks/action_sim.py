"""Closed loop in MuJoCo: B-splines, FAST and binning with the same network and budget; parallel and one by one.

    python benchmarks/action_sim.py --out DIR [--tasks FetchReach,FetchPickAndPlace] [--episodes 200]

Needs the extras sim and action. Records 500 demonstrations of the scripted expert, trains the
recipe ``action/fetch`` once for every row (4 passes; 12 for FetchReach), and rolls each policy out on seeds that no
demonstration has, half a chunk at a time. Demonstrations and models are kept in DIR, so that the script goes on where
it was stopped. A model takes minutes on one core.

Time is that of one decision for one robot, with one thread; the rows are measured one after the other, in turns.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from vertebra.domains.action.experts import ExpertPolicy
from vertebra.domains.action.inference import PolicyRunner
from vertebra.domains.action.simulation import rollout
from vertebra.domains.saving import load_model

DEMONSTRATIONS = {"FetchReach": 500, "FetchPickAndPlace": 500}
PASSES = {"FetchReach": 12, "FetchPickAndPlace": 4}
RECIPE = "B-spline, parallel, the recipe's 10 passes"
ONE_BY_ONE = [
    *("--model.backbone", "illama_nano", "--model.decoding", "autoregressive"),
    *("--model.grouped", "null", "--model.readout", "argmax"),
]
ROWS: dict[str, tuple[str, list[str]]] = {
    "B-spline, parallel": ("bspline", []),
    "binning, parallel": ("binning", ["--data.tokenizer", "binning"]),
    "FAST, one by one": ("fast_ar", ["--data.tokenizer", "fast", *ONE_BY_ONE, "--model.smoothing", "0"]),
    "B-spline, one by one": ("bspline_ar", ONE_BY_ONE),
    RECIPE: ("recipe", []),
}


def vertebra(*words: str | Path) -> None:
    """Run the command line, and show nothing of it unless it fails."""
    command = [str(Path(sys.executable).with_name("vertebra")), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def trained(out: Path, task: str, row: str) -> Path:
    """The model directory of a row, which is trained where it is not there yet."""
    name, settings = ROWS[row]
    data, run = out / "demonstrations" / task, out / task / name
    model = run / "action" / "fetch" / "latest" / "model"
    if not (data / "meta" / "info.json").is_file():
        vertebra("sample", "action", "--sim", task, "--episodes", str(DEMONSTRATIONS[task]), "-o", data)
    if not model.is_dir():
        vertebra(
            *("fit", "action/fetch", "--data.root", data, "--root", run, *settings),
            *([] if row == RECIPE else ["--trainer.max_epochs", str(PASSES[task])]),
            *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"),
        )
    return model


def decision_ms(runners: dict[str, PolicyRunner], rounds: int = 30) -> dict[str, float]:
    """Median milliseconds of a decision for one robot, the policies in turns."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for turn in range(rounds + 2):
        for name, runner in runners.items():
            states = np.tile(np.float32(runner.model.spec.state_mean), (1, runner.history, 1))
            begin = time.perf_counter()
            runner(states, {}, [""], None)
            if turn >= 2:
                seconds[name].append(time.perf_counter() - begin)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="where demonstrations and models are kept")
    parser.add_argument("--tasks", default=",".join(DEMONSTRATIONS))
    parser.add_argument("--rows", default=";".join(ROWS), help="names, with ; between")
    parser.add_argument("--episodes", type=int, default=200)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for task in args.tasks.split(","):
        runners = {}
        for row in args.rows.split(";"):
            model = load_model(trained(args.out, task, row))
            runners[row] = PolicyRunner(model)  # type: ignore[arg-type]
        print(f"\n{task}, {args.episodes} episodes\n")
        print("| policy | tokens a chunk | success | 95 % | steps to success | RMS jerk (m/s³) | ms a decision |")
        print("| --- | ---: | ---: | --- | ---: | ---: | ---: |")
        times = decision_ms(runners)
        found = rollout(ExpertPolicy(task), task, episodes=args.episodes, parallel=25).summary()
        rows = [("the expert itself", "", found, "")]
        for row, runner in runners.items():
            found = rollout(runner, task, episodes=args.episodes, parallel=25, execute=runner.horizon // 2).summary()
            tokenizer = runner.model.tokenizer
            tokens = f"at most {tokenizer.length}" if tokenizer.varies else str(tokenizer.length)
            rows.append((row, tokens, found, f"{times[row]:.1f}"))
        for row, tokens, facts, ms in rows:
            interval = f"{facts['success_low']:.1%} to {facts['success_high']:.1%}"
            steps = "" if facts["steps_to_success"] is None else f"{facts['steps_to_success']:.1f}"
            print(
                f"| {row} | {tokens} | {facts['success']:.1%} | {interval} | {steps} | {facts['jerk']:.0f} | {ms} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
