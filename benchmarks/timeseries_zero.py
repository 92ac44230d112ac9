"""Zero-shot forecasts beside the seasonal naive one: ETTh1, families never trained on, and those trained on.

    python benchmarks/timeseries_zero.py --model timeseries_zero --data ../shared/data/timeseries/etth1/ETTh1.csv

ETTh1: its test rows (11,520 to 14,399), rolling origins one horizon apart, in the file's units, each column scored by
itself. Fabricated families: 608 steps each, the last 96 forecast, with the season the family tells (1 where nothing
repeats); series that repeat exactly are left out, since MASE divides by how much they do not. MASE is a mean over
series, CRPS (weighted quantile loss) a ratio of sums within a row. Seeds are others than the training's.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch

from vertebra.domains.saving import load_model
from vertebra.domains.timeseries.backtest import backtest
from vertebra.domains.timeseries.baselines import RepeatLast
from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.sources import read_series
from vertebra.domains.timeseries.synthetic import HELD_OUT, TRAINING, draw
from vertebra.errors import ConfigError

SEED = 90_000
TEST = (11_520, 14_400)
STEPS, AHEAD = 608, 96


def repeats(history: np.ndarray, season: int) -> bool:
    """Whether a series repeats exactly, but for a thousandth of its spread."""
    return bool(np.abs(history[season:] - history[:-season]).mean() <= 1e-3 * history.std())


def family(name: str, count: int) -> list[Series]:
    """Fabricate series of a family."""
    made = [draw(name, STEPS, [SEED, i]) for i in range(count)]
    made = [one for one in made if not repeats(one.values[:-AHEAD], one.season)]
    return [
        Series(name=f"{name} {i}", values=one.values[:, None], frequency=parse_frequency(one.frequency))
        for i, one in enumerate(made)
    ]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="timeseries_zero")
    parser.add_argument("--data", type=Path, help="ETTh1.csv")
    parser.add_argument("--count", type=int, default=40, help="series of each family")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    source = Path(args.model)
    if not source.is_dir():
        import vertebra

        source = Path(vertebra.__file__).parent / "models" / args.model
    model = load_model(source)
    if not isinstance(model, PatchForecaster):
        raise ConfigError(f"{args.model}: must be a model of timeseries/forecast.")
    forecaster = SeriesForecaster(model)
    last = RepeatLast()

    print("| data | horizon | MASE: model / naive | CRPS: model / naive | ratio | repeat last | 80 % band | series/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")

    def row(title: str, series: list[Series], horizon: int, windows: int) -> tuple[float, float]:
        start = time.perf_counter()
        found = backtest(forecaster.forecast, series, horizon, windows)
        rate = len(found.windows) / (time.perf_counter() - start)
        summary = found.summary()
        own, naive = summary["model"], summary["seasonal_naive"]
        other = backtest(last.forecast, series, horizon, windows)
        beside = other.summary()["ratio"]
        ratio = summary["ratio"]["mase"], summary["ratio"]["crps"]
        print(
            f"| {title} | {horizon} | {own['mase']:.3f} / {naive['mase']:.3f} | "
            f"{own['crps']:.3f} / {naive['crps']:.3f} | "
            f"{ratio[0]:.2f} / {ratio[1]:.2f} | {beside['mase']:.2f} / {beside['crps']:.2f} | "
            f"{own['coverage_80']:.2f} | {rate:.0f} |",
            flush=True,
        )
        return ratio

    if args.data is not None:
        columns = [one.cut(0, TEST[1]) for one in read_series([args.data])[0]]
        for horizon in (24, 96, 336):
            row("ETTh1", columns, horizon, (TEST[1] - TEST[0]) // horizon)
    for title, names in (("held out", HELD_OUT), ("as trained", TRAINING)):
        ratios = [row(f"{title}: {name}", family(name, args.count), AHEAD, 1) for name in names]
        finite = [r for r in ratios if all(math.isfinite(x) and x > 0 for x in r)]
        mase, crps = np.exp(np.log(finite).mean(0))
        print(f"| {title}, geometric mean | {AHEAD} |  |  | {mase:.2f} / {crps:.2f} |  |  |  |")


if __name__ == "__main__":
    main()
