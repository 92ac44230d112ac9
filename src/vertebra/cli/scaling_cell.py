"""One cell of a scaling study: claimed, trained by ``fit``, tested on other data, its result written.

    python -m vertebra.cli.scaling_cell DIR/cells/NAME

A process of its own for each cell, so that none takes another with it; Lightning starts further ones of the same
command where a strategy needs them. Exit status: that of ``fit``; 75 when another process has the cell.
"""

from __future__ import annotations

import contextlib
import csv
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vertebra.cli.runs import LAST, whole_text
from vertebra.cli.scaling_grid import Cell, Study, parse_budget, plan_steps, read_cell, read_study
from vertebra.errors import ConfigError

TAKEN = 75
BEAT_S = 30.0
"""How often a claim is renewed."""
STALE_S = 600.0
"""Age from which a claim counts as left behind."""
_RANKS = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def main(argv: list[str] | None = None) -> int:
    """Run the cell of a folder and return the exit status."""
    (place,) = sys.argv[1:] if argv is None else argv
    folder = Path(place)
    if "LOCAL_RANK" in os.environ:  # started by Lightning for a cell that is claimed; it sets the same here later on
        return run_cell(folder, helps=True)
    with claim(folder) as mine:
        return run_cell(folder) if mine else TAKEN


# ---------------------------------------------------------------- claims


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold a cell while the block runs, if no other process does.

    Yields:
        Whether it is ours.
    """
    mine = _take(folder)
    if not mine:
        yield False
        return
    done = threading.Event()

    def beat() -> None:
        while not done.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(folder / "claim")

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        done.set()
        thread.join()
        (folder / "claim").unlink(missing_ok=True)


def claim_state(folder: Path) -> tuple[str, str]:
    """Return ``free``, ``held`` or ``stale``, and by whom a cell is held."""
    file = folder / "claim"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        clock = folder / f".clock.{os.getpid()}"
        clock.touch()  # the file server's time, whatever this machine's is
        age = clock.stat().st_mtime - file.stat().st_mtime
        clock.unlink()
    except FileNotFoundError:
        return "free", ""
    except json.JSONDecodeError:  # created a moment ago
        return "held", "a process that begins"
    host, pid = str(values["host"]), int(values["pid"])
    who = f"process {pid} on {host}, last seen {max(age, 0) / 60:.0f} min ago"
    gone = host == socket.gethostname() and not _alive(pid)
    return ("stale" if gone or age > STALE_S else "held"), who


def _take(folder: Path) -> bool:
    if _create(folder / "claim"):
        return True
    if claim_state(folder)[0] != "stale" or not _create(folder / "claim.taking"):  # one of all who saw it
        return False
    try:
        state, who = claim_state(folder)
        if state != "stale":
            return False
        print(f"{folder.name}: the claim of {who}, was left behind; taken over")
        whole_text(folder / "claim", _signature())
        return True
    finally:
        (folder / "claim.taking").unlink()


def _create(file: Path) -> bool:
    try:
        with file.open("x", encoding="utf-8") as f:
            f.write(_signature())
    except FileExistsError:
        return False
    return True


def _signature() -> str:
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid()})


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


# ---------------------------------------------------------------- the run


def run_cell(folder: Path, *, helps: bool = False) -> int:
    """Train what is not trained, test what is not tested, and write ``result.json``.

    Args:
        folder: Of the cell.
        helps: Whether this process only trains along with the one that holds the claim.
    """
    from vertebra.cli import main as vertebra

    study, cell = read_study(folder.parent.parent), read_cell(folder)
    if (folder / "result.json").is_file():
        return 0
    start = time.monotonic()
    words = _fit_words(study, cell, folder)
    steps, operations = parse_budget(study.budget)
    if operations is not None:
        if not (folder / "measured.json").is_file():
            status = vertebra(["fit", *words, "--trainer.fast_dev_run=8"])
            if status:
                return status
        facts = _json(folder / "measured.json")
        steps = round(operations / (6 * facts["params"] * facts["tokens"]))
        if steps < 1:
            raise ConfigError(
                f"scaling: {study.budget} is less than a step of {cell.size}, "
                f"{6 * facts['params'] * facts['tokens']:.2g}F; raise --budget."
            )
    assert steps is not None
    steps, every = plan_steps(steps, study.evaluations)
    run = find_run(folder)
    if run is None or not (run / "metrics.json").is_file():
        words += [f"--trainer.max_steps={steps}", f"--trainer.val_check_interval={every * study.accumulate}"]
        resumable = run is not None and (run / "checkpoints" / LAST).is_file()
        if run is not None and not resumable and not helps:
            shutil.rmtree(run)  # ended before its first checkpoint
        status = vertebra(
            ["fit", *words, *(["--ckpt_path", str(run)] if resumable else ["--root", str(folder / "runs")])]
        )
        if status or helps:
            return status
        run = find_run(folder)
        assert run is not None
    for name, options in study.ood.items():
        if not (folder / "ood" / f"{name}.json").is_file():
            status = _test(study, cell, run, options, folder / "ood" / f"{name}.json")
            if status:
                return status
    _write_result(study, cell, folder, run, steps, time.monotonic() - start)
    return 0


def _fit_words(study: Study, cell: Cell, folder: Path) -> list[str]:
    measure = {
        "class_path": "vertebra.cli.scaling_measure.Measure",
        "init_args": {"folder": str(folder), "data": cell.data, "tokens": study.tokens},
    }
    return [
        *([study.recipe] if study.recipe else []),
        *study.words,
        f"--model.backbone={cell.backbone}",
        f"--seed_everything={cell.seed}",
        "--trainer.max_epochs=-1",
        "--trainer.check_val_every_n_epoch=null",
        f"--trainer.callbacks={json.dumps([*study.callbacks, measure])}",
    ]


def find_run(folder: Path) -> Path | None:
    """Return the run folder of a cell, if its training has begun."""
    found = [p.parent for p in (folder / "runs").rglob("config.yaml") if p.parent.name.isdecimal()]
    return max(found, key=lambda p: int(p.name), default=None)


def _test(study: Study, cell: Cell, run: Path, options: list[str], output: Path) -> int:
    """Test on other data, on one device, and write the numbers."""
    from vertebra.cli import main as vertebra

    kept, words = [], iter(study.words)
    for word in words:
        pair = [word] if "=" in word else [word, next(words)]
        if not word.startswith(("--trainer.devices", "--trainer.strategy", "--trainer.num_nodes")):
            kept += pair
    recipe = [study.recipe] if study.recipe else []
    # a -c file is stronger than the checkpoint, so the backbone is said again
    command = ["test", *recipe, *kept, f"--model.backbone={cell.backbone}", "--ckpt_path", str(run), *options]
    command += ["-o", str(output)]
    command += ["--trainer.devices=1", "--trainer.strategy=auto"]
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():  # of the training, and still so
        environment = {k: v for k, v in os.environ.items() if k not in _RANKS}
        done = subprocess.run([sys.executable, "-P", "-m", "vertebra", *command], env=environment, check=False)
        return done.returncode
    return vertebra(command)


# ---------------------------------------------------------------- the result


def _write_result(study: Study, cell: Cell, folder: Path, run: Path, steps: int, seconds: float) -> None:
    metrics, facts = _json(run / "metrics.json"), _json(folder / "measured.json")
    compute = 6 * facts["params"] * facts["tokens"] * metrics["steps"]
    numbers = {
        split: {name.partition("/")[2] or name: value for name, value in metrics[split].items()}
        for split in ("validation", "test")
    }
    for name in study.ood:
        found = _json(folder / "ood" / f"{name}.json")
        numbers[name] = {key.partition("/")[2] or key: value for key, value in found.items()}
    result = {
        "name": cell.name,
        "size": cell.size,
        "data": cell.data,
        "seed": cell.seed,
        **facts,
        "steps": metrics["steps"],
        "compute": compute,
        "checkpoint": metrics["checkpoint"],
        "monitor": metrics["monitor"],
        "best": metrics["best"],
        "numbers": numbers,
        "curve": _curve(run / "metrics.csv"),
        "run": str(run.relative_to(folder)),
        "seconds": round(seconds, 1),
    }
    whole_text(folder / "result.json", json.dumps(result, indent=2) + "\n")


def _curve(path: Path) -> dict[str, list[list[float]]]:
    """Validation numbers in the course of a run: by metric, [steps taken, value] each."""
    curves: dict[str, list[list[float]]] = {}
    with path.open(newline="", encoding="utf-8") as f:
        for row in csv.DictReader(f):
            for name, text in row.items():
                split, _, metric = name.partition("/")
                if split == "val" and text and math.isfinite(value := float(text)):
                    curves.setdefault(metric, []).append([int(row["step"]) + 1, value])
    return curves


def _json(path: Path) -> dict[str, Any]:
    values = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(values, dict)
    return values


if __name__ == "__main__":
    from vertebra.errors import VertebraError

    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(143))  # so that the claim is given back
    try:
        ended = main()
    except VertebraError as e:
        print(f"vertebra: error: {e}", file=sys.stderr)
        ended = 2
    except KeyboardInterrupt:
        ended = 130
    sys.exit(ended)
