"""What tokenizers of actions cost and lose on demonstrations of two robots.

    OMP_NUM_THREADS=1 python -P benchmarks/action_tokenizers.py --data ../shared/data/action    # 90 s of the processor
    OMP_NUM_THREADS=1 python -P benchmarks/action_tokenizers.py panda                           # one robot, no figure

``g1``: Unitree G1, 30 Hz, two arms of 7 joints (rad) and two hands of 6 (commands from 0 to 1); learnt from episodes 0
to 49, measured on 50 to 59. ``panda``: one symbol traced six times by hand on a Franka Panda, x and y in mm (z does not
move), every tenth sample of about 1 kHz; each recording is measured with what was learnt from the five others.

An episode is cut into chunks that do not overlap. The end of the last one repeats the last action; that takes tokens,
but its error does not count. BEAST and binning have 256 ids, FAST has 1,024. Two sets of bounds are learnt: the 1 and
99 % quantiles, which are the default, and the least and the largest value; ``a / b`` are the results with either. What
is held out goes beyond both: the third number of an error counts, with the wider bounds, only dimensions of chunks that
stay between the least and the largest action learnt from.

tokens: the mean of a chunk. compression: T * D / tokens, so that binning has 1. cut off: share of numbers beyond the
bounds (FAST cuts no actions, but coefficients that were never seen). jump: the distance of a chunk's first action from
the last one of the chunk before, its mean and its largest over chunks and dimensions, with the wider bounds; the steps
that the actions themselves make there are in the first line. "from start": a chunk begins at the last action that was
decoded, as in closed loop; the first one begins where the robot is.

Prints the tables; writes ``action_tokenizers.png``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.io
import torch
from numpy.typing import NDArray
from torch import Tensor

from vertebra.domains.action.episodes import Episode, windows
from vertebra.domains.action.sources import read_demonstrations
from vertebra.tokenizers.action import NONE, ActionTokenizer, make_action_tokenizer
from vertebra.tokenizers.bspline import BSplineTokenizer

HORIZONS = (20, 50, 100)
EVERY = 10  # steps between the chunks that are learnt from
BOUNDS = ((0.01, 0.99), (0.0, 1.0))  # quantiles
COUNTS = {20: (5, 10), 50: (5, 10), 100: (5, 10, 15)}  # control points by horizon
SCALES = (3, 10, 30)
HERE = Path(__file__).parent
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Robot:
    """Demonstrations: ``folds`` are what is learnt from and what is measured, ``parts`` are columns of one unit."""

    title: str
    folds: list[tuple[list[Episode], list[Episode]]]
    parts: dict[str, slice]
    scale: float = 1.0  # to the unit of the table
    digits: int = 4


def g1(folder: Path) -> Robot:
    """Read the humanoid's episodes."""
    episodes = list(read_demonstrations([folder / "unitree_g1"]).episodes)
    parts = {"arms (rad)": slice(14), "hands (command)": slice(14, 26)}
    return Robot("Unitree G1, 26 dimensions at 30 Hz", [(episodes[:50], episodes[50:60])], parts)


def panda(folder: Path) -> Robot:
    """Read the six recordings of a symbol."""
    path = folder / "panda_comanipulation" / "Panda_CoManipulation_Data" / "17" / "symbol_data.mat"
    found = []
    for i, record in enumerate(scipy.io.loadmat(path)["symbol_data"][0]):
        xy = record["pos"][:2, ::10].T.astype(np.float32)
        found.append(Episode(name=str(i), states=xy, actions=xy, times=np.arange(len(xy)) / 100))
    folds = [([other for other in found if other is not one], [one]) for one in found]
    return Robot("Panda, x and y at 100 Hz", folds, {"position (mm)": slice(2)}, scale=1e3, digits=3)


ROBOTS: dict[str, Callable[[Path], Robot]] = {"g1": g1, "panda": panda}


# ---------------------------------------------------------------- one tokenizer


@dataclass(frozen=True)
class Found:
    """Results over all folds."""

    tokens: float  # the mean of a chunk
    errors: Floats  # (steps, D)
    inside: NDArray[np.bool_]  # (steps, D), whether the actions of that chunk stay in the range of what was learnt from
    jumps: Floats  # (boundaries, D)
    cut: float  # share

    def rmse(self, part: slice, inside: bool = False) -> float:
        """Root of the mean squared error of a part's columns."""
        errors = self.errors[:, part]
        return float(np.sqrt((errors[self.inside[:, part]] ** 2 if inside else errors**2).mean()))


def tokenizers(horizon: int) -> dict[str, dict[str, str]]:
    """List the tokenizers of a horizon by family and name."""
    counts = COUNTS[horizon]
    return {
        "BEAST": {f"BEAST, N = {n}": f"bspline,num_basis={n},degree=4" for n in counts},
        "BEAST from start": {f"from start, N = {n}": f"bspline,num_basis={n},degree=4,initial=fit" for n in counts},
        "FAST": {f"FAST, scale {scale}": f"fast,scale={scale},vocab_size=1024" for scale in SCALES},
        "binning": {"binning": "binning"},
    }


def measure(text: str | None, robot: Robot, horizon: int, quantiles: tuple[float, float]) -> Found:
    """Fit a tokenizer and measure it; without ``text``, measure the actions themselves."""
    tokens, errors, inside, jumps, cut = [], [], [], [], []
    for learnt, held_out in robot.folds:
        dims = learnt[0].actions.shape[1]
        known = torch.from_numpy(np.concatenate([windows(episode, horizon)[0][::EVERY] for episode in learnt]))
        low, high = known.amin((0, 1)), known.amax((0, 1))
        if text:
            tokenizer = make_action_tokenizer(text, horizon=horizon, dims=dims).fit(known, quantiles=quantiles)
        for episode in held_out:
            chunks, real = (torch.from_numpy(each[::horizon]) for each in windows(episode, horizon))
            decoded = chunks
            if text:
                ids, decoded = there_and_back(tokenizer, chunks)
                tokens.append((ids != NONE).sum(1))
                cut.append(tokenizer.clipped(chunks).mean().item())
            errors.append((decoded - chunks)[real])
            stays = ((chunks >= low) & (chunks <= high)).all(1, keepdim=True)
            inside.append(stays.expand_as(chunks)[real])
            jumps.append((decoded[1:, 0] - decoded[:-1, -1]).abs())
    return Found(
        tokens=torch.cat(tokens).double().mean().item() if text else float(horizon * dims),
        errors=torch.cat(errors).double().numpy() * robot.scale,
        inside=torch.cat(inside).numpy(),
        jumps=torch.cat(jumps).double().numpy() * robot.scale,
        cut=float(np.average(cut, weights=[len(each) for each in tokens])) if text else 0.0,
    )


def there_and_back(tokenizer: ActionTokenizer, chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and decoded chunks, each from where the one before ended if the tokenizer enforces its start."""
    if not (isinstance(tokenizer, BSplineTokenizer) and tokenizer.initial == "fit"):
        ids = tokenizer.encode(chunks)
        return ids, tokenizer.decode(ids)
    rows, decoded, start = [], [], chunks[:1, 0]
    for chunk in chunks.split(1):
        rows.append(tokenizer.encode(chunk, start))
        decoded.append(tokenizer.decode(rows[-1], start=start))
        start = decoded[-1][:, -1]
    return torch.cat(rows), torch.cat(decoded)


# ---------------------------------------------------------------- table and figure


def compare(robot: Robot) -> dict[tuple[str, int], list[Found]]:
    """Print the table of a robot; return the results with the wider bounds by family and horizon."""
    print(f"\n{robot.title}\n")
    columns = ["cut off, %", *(f"RMSE, {name}" for name in robot.parts), *(f"jump, {name}" for name in robot.parts)]
    print(f"| horizon | tokenizer | tokens | compression | {' | '.join(columns)} |")
    print("| ---: | --- |" + " ---: |" * (len(columns) + 2))
    found: dict[tuple[str, int], list[Found]] = {}
    for horizon in HORIZONS:
        actions = measure(None, robot, horizon, BOUNDS[0])
        row(robot, horizon, "the actions", actions.tokens, [actions])
        for family, texts in tokenizers(horizon).items():
            for name, text in texts.items():
                both = [measure(text, robot, horizon, bounds) for bounds in BOUNDS]
                row(robot, horizon, name, actions.tokens, both)
                found.setdefault((family, horizon), []).append(both[-1])
    return found


def row(robot: Robot, horizon: int, name: str, size: float, both: list[Found]) -> None:
    """Print one line of the table."""
    cells = [
        " / ".join(dict.fromkeys(f"{each.tokens:.1f}".removesuffix(".0") for each in both)),
        " / ".join(dict.fromkeys(f"{size / each.tokens:.1f}" for each in both)),
        " / ".join(f"{100 * each.cut:.2f}" for each in both),
    ]
    numbers = [[*(each.rmse(part) for each in both), both[-1].rmse(part, inside=True)] for part in robot.parts.values()]
    cells += [" / ".join(f"{x:.{robot.digits}f}" for x in errors) if any(errors) else "0" for errors in numbers]
    for part in robot.parts.values():
        jumps = both[-1].jumps[:, part]
        cells.append(", ".join(f"{x:.{robot.digits}f}" if x else "0" for x in (jumps.mean(), jumps.max())))
    print(f"| {horizon} | {name} | {' | '.join(cells)} |", flush=True)


def draw(results: dict[str, dict[tuple[str, int], list[Found]]], robots: dict[str, Robot]) -> None:
    """Draw error over tokens, a panel for each robot."""
    from vertebra.pipelines.figures import PALETTE, new_figure

    looks = dict(zip(("BEAST", "BEAST from start", "FAST", "binning"), zip("osD^", PALETTE, strict=False), strict=True))
    figure, panels = new_figure(1, len(robots), width=5.4 * len(robots), height=4.2)
    for axes, (key, robot) in zip(panels, robots.items(), strict=True):
        name, part = next(iter(robot.parts.items()))
        for (family, horizon), points in results[key].items():
            marker, color = looks[family]
            x, y = [each.tokens for each in points], [each.rmse(part, inside=True) for each in points]
            hollow = "white" if family == "BEAST from start" else color
            label = family if horizon == HORIZONS[0] else None
            axes.loglog(x, y, marker=marker, color=color, markerfacecolor=hollow, markersize=5, lw=1, label=label)
            if family != "BEAST from start":  # which lies on the line without
                axes.annotate(f"{horizon}", (x[0], y[0]), (4, 5), textcoords="offset points", fontsize=8, color=color)
        axes.set(title=robot.title, xlabel="tokens of a chunk", ylabel=f"RMSE within the known range, {name}")
        axes.title.set_fontsize(10)
    panels[0].legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "action_tokenizers.png", dpi=100)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("robots", nargs="*", default=list(ROBOTS), help="g1, panda; both if none")
    parser.add_argument("--data", type=Path, default=Path("../shared/data/action"))
    args = parser.parse_args()
    robots = {name: ROBOTS[name](args.data) for name in args.robots}
    results = {name: compare(robot) for name, robot in robots.items()}
    if len(robots) == len(ROBOTS):
        draw(results, robots)


if __name__ == "__main__":
    main()
