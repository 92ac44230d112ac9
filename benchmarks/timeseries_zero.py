"""Zero-shot forecasts beside the seasonal naive one: ETTh1, families never trained on, and those trained on.

    python benchmarks/timeseries_zero.py --model timeseries_zero --data ../shared/data/timeseries/etth1/ETTh1.csv

ETTh1: its test rows (11,520 to 14,399), rolling origins one horizon apart, in the file's units, each column scored by
itself, season 24. Fabricated families: 608 steps each, the last 96 forecast, by seeds other than the training's. Model
and naive forecast are told the same season, the one the series was made with (1 where nothing repeats), or with
``--season frequency`` the one its frequency says, as of a user's file. Series that repeat exactly are left out, since
MASE divides by how much they do not. Each is divided by the deviation of its history, so that none counts for its unit.

MASE is a mean over series; CRPS (weighted quantile loss), MSE, sMAPE and the coverage of the 80 % band are sums over
everything in a row. Numbers are model / naive and in brackets their ratio, below 1 where the model is better. The last
row of a group is the geometric mean of its ratios. How fast forecasts are is measured by ``timeseries_speed.py``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vertebra.domains.saving import load_model
from vertebra.domains.timeseries.backtest import Backtest, BacktestWindow, backtest
from vertebra.domains.timeseries.baselines import RepeatLast
from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.sources import read_series
from vertebra.domains.timeseries.synthetic import HELD_OUT, TRAINING, draw, families
from vertebra.errors import ConfigError

SEED = 90_000
TEST = (11_520, 14_400)
HORIZONS = (24, 96, 336)
STEPS, AHEAD = 608, 96
METRICS = ("mase", "crps", "mse", "smape")
SHOWN = ("HUFL", "OT", "oscillator", "queue", "tides", "thermal")
"""Panels of the figure."""


def repeats(history: np.ndarray, season: int) -> bool:
    """Whether a series repeats exactly, but for a thousandth of its spread."""
    if season >= len(history):
        return False
    return bool(np.abs(history[season:] - history[:-season]).mean() <= 1e-3 * history.std())


def family(name: str, count: int) -> list[tuple[Series, int]]:
    """Fabricate series of a family, each with its season."""
    number = list(families()).index(name)
    made = [draw(name, STEPS, [SEED, number, i]) for i in range(count)]
    found = []
    for i, one in enumerate(made):
        history = one.values[:-AHEAD]
        if repeats(history, one.season):
            continue
        values = (one.values / (history.std() or 1))[:, None]
        series = Series(name=f"{name} {i}", values=values, frequency=parse_frequency(one.frequency))
        found.append((series, one.season))
    return found


class Judge:
    """Backtests a model, and prints rows.

    Args:
        model: The forecaster.
    """

    def __init__(self, model: PatchForecaster) -> None:
        self.forecaster = SeriesForecaster(model)
        self.ratios: list[list[float]] = []

    def row(self, title: str, series: Sequence[tuple[Series, int]], horizon: int, windows: int) -> Backtest:
        """Backtest series, each with its season (0 for that of its frequency), and print a row."""
        own: list[BacktestWindow] = []
        beside: list[BacktestWindow] = []
        for season in sorted({season for _, season in series}):
            alike = [one for one, told in series if told == season]
            forecaster = functools.partial(self.forecaster.forecast, season=season)
            last = functools.partial(RepeatLast().forecast, season=season)
            own += backtest(forecaster, alike, horizon, windows, season=season).windows
            beside += backtest(last, alike, horizon, windows, season=season).windows
        found = Backtest(windows=tuple(own), left_out=(), horizon=horizon)
        summary = found.summary()
        model, naive, ratio = summary["model"], summary["seasonal_naive"], summary["ratio"]
        other = Backtest(windows=tuple(beside), left_out=(), horizon=horizon).summary()["ratio"]
        self.ratios.append([*(ratio[name] for name in METRICS), other["mase"], other["crps"]])
        cells = [f"{model[name]:.3g} / {naive[name]:.3g} ({ratio[name]:.2f})" for name in METRICS]
        cells += [f"{other['mase']:.2f}, {other['crps']:.2f}", f"{model['coverage_80']:.2f}"]
        print(f"| {title} | {horizon} | {len(own)} | {' | '.join(cells)} |", flush=True)
        return found

    def close(self, title: str) -> None:
        """Print the geometric mean of the rows since the last one; it is NaN where one of them is."""
        *means, mase, crps = np.exp(np.log(self.ratios).mean(0))
        cells = " | ".join(f"({mean:.2f})" for mean in means)
        print(f"| **{title}, geometric mean** | | | {cells} | {mase:.2f}, {crps:.2f} | |", flush=True)
        self.ratios.clear()


def draw_sheet(examples: dict[str, BacktestWindow], path: Path) -> None:
    """Draw forecasts and what came, a panel each."""
    from vertebra.pipelines import figures
    from vertebra.pipelines.timeseries_figures import _draw, _legend, _name_times

    figure, panels = figures.new_figure(3, 2, width=11.0, height=8.0)
    for axes, (title, window) in zip(panels, examples.items(), strict=True):
        forecast = window.forecast
        _draw(axes, forecast, (), 2 * len(forecast.mean), 0)
        stamps = forecast.stamps
        axes.plot(stamps, window.actual[:, 0], color="#1A1A1A", linewidth=1.0, zorder=4)
        axes.set_title(title, fontsize=10, loc="left")
        _name_times(axes, window.series)
    _legend(figure, next(iter(examples.values())).forecast, tested=False)
    path.write_bytes(figures.png_bytes(figure))


def load(name: str) -> PatchForecaster:
    """Load a bundled model by its name, or one from its folder."""
    source = Path(name)
    if not source.is_dir():
        import vertebra

        source = Path(vertebra.__file__).parent / "models" / name
    model = load_model(source)
    if not isinstance(model, PatchForecaster):
        raise ConfigError(f"{name}: must be a model of timeseries/forecast.")
    return model


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="timeseries_zero")
    parser.add_argument("--data", type=Path, help="ETTh1.csv")
    parser.add_argument("--count", type=int, default=50, help="series of each family")
    parser.add_argument("--season", choices=("told", "frequency"), default="told", help="of fabricated series")
    parser.add_argument("--horizons", type=int, nargs="+", default=list(HORIZONS), help="on ETTh1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--figure", type=Path, help="PNG of examples; needs --data and horizon 96")
    args = parser.parse_args()
    if args.figure and (args.data is None or AHEAD not in args.horizons):
        parser.error(f"--figure needs --data, and {AHEAD} among --horizons")
    torch.set_num_threads(args.threads)
    judge = Judge(load(args.model))
    examples: dict[str, BacktestWindow] = {}

    heads = " | ".join(f"{name}: model / naive" for name in ("MASE", "CRPS", "MSE", "sMAPE"))
    print(f"| data | horizon | forecasts | {heads} | repeat last, MASE and CRPS to naive | 80 % band |")
    print("| --- | ---: | ---: |" + " ---: |" * 6)
    if args.data is not None:
        columns = [(one.cut(0, TEST[1]), 0) for one in read_series([args.data])[0]]
        for horizon in args.horizons:
            found = judge.row("ETTh1", columns, horizon, (TEST[1] - TEST[0]) // horizon)
            if horizon == AHEAD:
                named = {w.series.name: w for w in found.windows}  # the last window of each
                examples |= {f"ETTh1: {name}": named[name] for name in SHOWN if name in named}
        judge.close("ETTh1")
    for title, names in (("held out", HELD_OUT), ("in distribution", TRAINING)):
        for name in names:
            series = [(one, season if args.season == "told" else 0) for one, season in family(name, args.count)]
            found = judge.row(f"{title}: {name}", series, AHEAD, 1)
            if name in SHOWN:
                examples[f"{title}: {name}"] = found.windows[len(found.windows) // 2]
        judge.close(title)
    if args.figure:
        draw_sheet(examples, args.figure)


if __name__ == "__main__":
    main()
