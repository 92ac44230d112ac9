"""``vertebra scaling``: how a loss falls with parameters, data and compute, for any domain's recipe; needs no torch."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

from vertebra.cli.parsing import Parser
from vertebra.cli.recipes import recipe_path
from vertebra.cli.scaling_cell import TAKEN, claim_state
from vertebra.cli.scaling_grid import (
    Cell,
    Study,
    choose_sizes,
    make_grid,
    open_study,
    parse_budget,
    parse_data,
    parse_number,
    parse_ood,
    parse_share,
    plan_steps,
    read_study,
    resolved_config,
    results,
    split_words,
)
from vertebra.errors import ConfigError, VertebraError

_USAGE = """\
vertebra scaling RECIPE --params NAME|COUNT ... --budget STEPS|FLOPS [options of fit]
       vertebra scaling --report DIR [--metric NAME] [--shift S]"""
_DESCRIPTION = """\
Train a recipe at several sizes and on several amounts of data, and fit power laws of the loss over parameters, data
and compute. Each run is a cell, a folder DIR/cells/NAME; finished ones are kept, interrupted ones go on where they
were. Several processes may work on one DIR. --model.*, --data.*, --trainer.* and -c of `vertebra fit` hold for every
run. Written: points.csv, laws.csv, envelope.csv, figures/, report.html."""
_EPILOG = """\
A run sees its part of the training items again and again until the budget is spent; of each run the best checkpoint by
the recipe's own monitor counts. Compute is 6 x parameters of the backbone x positions that enter it.
  vertebra scaling dna/lm --params 10K 100K 1M --budget 2000 -o scaling/dna
  vertebra scaling dna/lm --params illama_nano illama_tiny --data 0.1 1 --budget 1e14F --jobs 2 -o scaling/dna2"""


def run(verb: str, args: list[str]) -> int:
    """Run the verb and return the exit status."""
    own, passed = split_words(args)
    recipe = own.pop(0) if own and not own[0].startswith("-") else None
    options = _parser(verb).parse_args(own)
    shift = _shift(options.shift)
    if options.report:
        if recipe or passed or options.params or options.budget:
            raise ConfigError("scaling: --report only reads a folder; leave recipe, sizes, budget and options out.")
        read_study(Path(options.report))
        return _report(Path(options.report), options.metric, shift)
    study, cells = _plan(recipe, passed, options)
    folder = Path(options.output or f"scaling/{recipe or 'study'}")
    open_study(folder, study, cells)
    part, parts = parse_share(options.only)
    scheduler = Scheduler(folder, cells[part - 1 :: parts], jobs=options.jobs, metric=options.metric)
    again = shlex.join(["vertebra", verb, *args])
    try:
        with _terminated():
            scheduler.work()
    except KeyboardInterrupt as e:
        print(
            "\ninterrupted; finished runs are kept, the others go on from their last checkpoint with:", file=sys.stderr
        )
        print(f"  {again}", file=sys.stderr)
        return 143 if e.args == (signal.SIGTERM,) else 130
    if scheduler.elsewhere:
        print(f"{len(scheduler.elsewhere)} cells are of other processes: {', '.join(scheduler.elsewhere)}")
        print(f"when they are finished: vertebra scaling --report {shlex.quote(str(folder))}")
    if results(folder):
        status = _report(folder, options.metric, shift) if parts == 1 else 0
        if parts > 1:
            print(f"when all parts are finished: vertebra scaling --report {shlex.quote(str(folder))}")
    else:
        status = 0
        print("no cell is finished, so there is nothing to report.")
    if scheduler.failed:
        print(f"vertebra: {len(scheduler.failed)} of {len(scheduler.cells)} cells failed:", file=sys.stderr)
        for name, why in scheduler.failed.items():
            print(f"  {name}: {why} (see {folder / 'cells' / name / 'log.txt'})", file=sys.stderr)
        return 3
    return status


def _parser(verb: str) -> Parser:
    from argparse import RawDescriptionHelpFormatter

    parser = Parser(verb, _DESCRIPTION, usage=_USAGE, epilog=_EPILOG, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--params", nargs="+", metavar="P", default=[], help="backbones by name (illama_nano,depth=2), or parameters "
        "(10K 1M) to which the recipe's own backbone is resized")  # fmt: skip
    add("--data", nargs="+", metavar="D", default=["1"], help="training items (1000 10K) or shares (0.1); smaller "
        "parts lie within larger ones (default: 1, all)")  # fmt: skip
    add("--budget", metavar="B", help="optimizer steps of each run (2000), or its operations (1e14F)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="S", help="seeds of the weights (default: 0)")
    add("--metric", default="loss", metavar="NAME", help="what is fitted, lower is better (default: loss)")
    add("--ood", nargs="+", action="extend", default=[], metavar="NAME:data.KEY=V",
        help="other data to test on; several keys with commas between")  # fmt: skip
    add("--evaluations", type=int, default=10, metavar="N", help="validations in the course of a run (default: 10)")
    add("--tokens", type=int, metavar="N", help="positions of an optimizer step (default: measured)")
    add("--shift", metavar="S", default="0", help="added to the metric before laws are fitted (default: 0)")
    add("-o", "--output", metavar="DIR", help="where to write (default: scaling/RECIPE)")
    add("--jobs", type=int, default=1, metavar="N", help="cells side by side; 0 for one after the other in this "
        "process (default: 1)")  # fmt: skip
    add("--only", default="1/1", metavar="I/N", help="part I of N of the cells, as for an array of cluster jobs")
    add("--report", metavar="DIR", help="only fit and draw what DIR holds")
    return parser


def _shift(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"scaling: --shift must be a number, got {text!r}.") from None


def _plan(recipe: str | None, passed: list[str], options: Any) -> tuple[Study, list[Cell]]:
    """Check everything, choose the sizes and print them."""
    files = any(w.partition("=")[0] in ("-c", "--config") for w in passed)
    if recipe is None and not files:
        raise ConfigError(
            "scaling: the recipe comes first, as in `vertebra scaling dna/lm --params 1K 10K --budget 500`."
        )
    if recipe is not None:
        recipe_path(recipe)
    if not options.params or not options.budget:
        missing = "--params" if not options.params else "--budget"
        raise ConfigError(f"scaling: {missing} is missing. See: vertebra scaling --help")
    for name, value, least in (("jobs", options.jobs, 0), ("evaluations", options.evaluations, 1)):
        if value < least:
            raise ConfigError(f"scaling: --{name} must be at least {least}, got {value}.")
    if options.tokens is not None and options.tokens < 1:
        raise ConfigError(f"scaling: --tokens must be at least 1, got {options.tokens}.")
    parse_share(options.only)
    steps, _ = parse_budget(options.budget)
    for text in options.data:
        parse_data(text)
    ood = parse_ood(options.ood)
    if any(parse_number(w) is None for w in options.params) and any(w.startswith("--model.backbone") for w in passed):
        raise ConfigError("scaling: --params names the backbones; leave --model.backbone out, or give counts.")
    config = resolved_config(recipe, passed)
    if options.jobs == 0 and _several_devices(config["trainer"]):
        raise ConfigError(
            "scaling: --jobs 0 trains in this process, on one device; add --trainer.devices 1, or give --jobs 1."
        )
    sizes = choose_sizes(options.params, config)
    study = Study(
        recipe=recipe,
        words=passed,
        budget=options.budget,
        evaluations=options.evaluations,
        ood=ood,
        tokens=options.tokens,
        callbacks=_listed(config["trainer"].get("callbacks")),
        accumulate=config["trainer"].get("accumulate_grad_batches") or 1,
    )
    cells = make_grid(sizes, options.data, options.seeds)
    budget = f"{plan_steps(steps, options.evaluations)[0]:,} steps" if steps else f"{options.budget[:-1]} operations"
    print(f"{len(cells)} runs of {budget}: {len(sizes)} sizes x {len(options.data)} data x {len(options.seeds)} seeds")
    for size in sizes:
        print(f"  {size.word:<24} {size.params:>13,} parameters  {size.text}")
    return study, cells


def _several_devices(trainer: dict[str, Any]) -> bool:
    """Whether a training of this configuration starts further processes."""
    if trainer["strategy"] != "auto" or str(trainer["devices"]) not in ("1", "auto"):
        return True
    return trainer["devices"] == "auto" and trainer["accelerator"] != "cpu" and len(_devices()) > 1


def _listed(callbacks: Any) -> list[Any]:
    if callbacks is None:
        return []
    return list(callbacks) if isinstance(callbacks, list) else [callbacks]


def _report(folder: Path, metric: str, shift: float) -> int:
    from vertebra.cli.scaling_figures import write_report

    written, notes = write_report(folder, metric, shift)
    for note in notes:
        print(note)
    print(f"wrote {', '.join(written)} to {folder}")
    return 0


# ---------------------------------------------------------------- work


@dataclass
class Scheduler:
    """Runs cells, some at a time, and tells of each that ends.

    Args:
        folder: Of the study.
        cells: In this order.
        jobs: Processes at a time; 0 for this one.
        metric: What is told.

    Attributes:
        failed: The last words of cells that failed, by name.
        elsewhere: Names of cells that other processes have.
    """

    folder: Path
    cells: Sequence[Cell]
    jobs: int = 1
    metric: str = "loss"
    failed: dict[str, str] = field(default_factory=dict)
    elsewhere: list[str] = field(default_factory=list)
    _times: list[float] = field(default_factory=list)
    _ended: int = 0

    def work(self) -> None:
        """Run all cells that are not finished."""
        todo = [c for c in self.cells if not (self._place(c) / "result.json").is_file()]
        self._ended = len(self.cells) - len(todo)
        if self._ended:
            print(f"{self._ended} of {len(self.cells)} are finished already")
        todo = [c for c in todo if self._is_free(c)]
        if self.jobs:
            self._in_processes(todo)
            return
        for cell in todo:
            start = time.monotonic()
            self._tell(cell, self._here(cell), time.monotonic() - start)

    def _place(self, cell: Cell) -> Path:
        return self.folder / "cells" / cell.name

    def _is_free(self, cell: Cell) -> bool:
        state, who = claim_state(self._place(cell))
        if state == "held":
            print(f"{cell.name}: {who}, has it; left to that")
            self.elsewhere.append(cell.name)
        elif state == "stale":
            print(f"{cell.name}: the claim of {who}, was left behind; it is taken over")
        return state != "held"

    def _here(self, cell: Cell) -> int:
        """Run a cell in this process."""
        from vertebra.cli.scaling_cell import main

        with self._log(cell) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                status = main([str(self._place(cell))])
            except VertebraError as e:
                print(f"vertebra: error: {e}")
                status = 2
            except Exception:
                traceback.print_exc()
                status = 1
        if status in (130, 143):
            raise KeyboardInterrupt(*((signal.SIGTERM,) if status == 143 else ()))
        return status

    def _in_processes(self, todo: list[Cell]) -> None:
        running: dict[int, tuple[subprocess.Popen[bytes], Cell, float]] = {}  # by place
        waiting = list(todo)
        try:
            while waiting or running:
                for slot in range(self.jobs):
                    if slot not in running and waiting:
                        cell = waiting.pop(0)
                        running[slot] = self._start(cell, slot), cell, time.monotonic()
                for slot, (process, cell, start) in list(running.items()):
                    if process.poll() is not None:
                        del running[slot]
                        self._tell(cell, process.returncode, time.monotonic() - start)
                time.sleep(0.1)
        except BaseException:
            for process, _, _ in running.values():
                process.send_signal(signal.SIGTERM)  # each saves its state
            for process, _, _ in running.values():
                process.wait()
            raise

    def _start(self, cell: Cell, slot: int) -> subprocess.Popen[bytes]:
        environment = dict(os.environ)
        if self.jobs > 1:
            environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // self.jobs)))
            if devices := _devices():
                environment["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        command = [sys.executable, "-P", "-m", "vertebra.cli.scaling_cell", str(self._place(cell))]
        with self._log(cell) as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)

    def _log(self, cell: Cell) -> IO[str]:
        return (self._place(cell) / "log.txt").open("a", encoding="utf-8", errors="replace")

    def _tell(self, cell: Cell, status: int, seconds: float) -> None:
        if status == TAKEN:
            self.elsewhere.append(cell.name)
            return
        self._ended += 1
        self._times.append(seconds)
        if status or not (self._place(cell) / "result.json").is_file():
            lines = (self._place(cell) / "log.txt").read_text(encoding="utf-8", errors="replace").splitlines()
            said_last = (s for line in reversed(lines) if (s := line.strip()) and "this is a bug in" not in s)
            last = next(said_last, "nothing was said")
            self.failed[cell.name] = textwrap.shorten(last.removeprefix("vertebra: error: "), 300)
            said = f"failed with status {status}" if status else "ended without a result"
        else:
            said = self._numbers(cell)
        left = len(self.cells) - self._ended - len(self.elsewhere)
        remaining = sum(self._times) / len(self._times) * left / max(self.jobs, 1)
        end = f"; about {_duration(remaining)} left" if left else ""
        print(f"[{self._ended}/{len(self.cells)}] {cell.name}: {said}, {_duration(seconds)}{end}", flush=True)

    def _numbers(self, cell: Cell) -> str:
        result = next(r for r in results(self.folder) if r["name"] == cell.name)
        parts = [f"{split} {v[self.metric]:.4g}" for split, v in result["numbers"].items() if self.metric in v]
        return f"{self.metric} of {', '.join(parts)}" if parts else f"no number is called {self.metric}"


def _devices() -> list[str]:
    """Names of the GPUs there are, where there are several."""
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        return visible.split(",")
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


@contextlib.contextmanager
def _terminated() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does; where cells run in this process, their training heeds it first."""

    def stop(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
