"""Fabricated series in the formats that people have: a substation, shops, a museum, machines; good and bad.

The files are for trying things out, and so that a fit learns something: what drives a series is in its past, in its
calendar, or in a column beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from vertebra.domains.timeseries.frequency import Frequency, parse_frequency
from vertebra.domains.timeseries.series import Doubles, Series
from vertebra.domains.timeseries.structure import ar1
from vertebra.domains.timeseries.synthetic import draw, families
from vertebra.domains.timeseries.writing import (
    write_csv_long,
    write_csv_wide,
    write_jsonl,
    write_npz,
    write_parquet,
    write_tsf,
)
from vertebra.errors import ConfigError

HOURS = 4032
"""Rows of ``power.csv``: 24 weeks."""
AHEAD = 28
"""Days for which ``shops.csv`` knows promotions and holidays beyond the last sale."""

_COUNT, _LENGTH = 1000, 512  # of the series of one family, where nothing else is said
_PART = 100  # of them between two moves of the bar
_START = np.datetime64("2023-01-02", "ms")  # a Monday
_HOUR, _DAY = Frequency(1, "h"), Frequency(1, "D")


def write_sample(folder: Path, seed: int = 0) -> list[Path]:
    """Fabricate series in the formats that the time series domain reads; the same seed gives the same bytes.

    Args:
        folder: Where to write; made when missing.
        seed: Seed of everything.

    Returns:
        The files: ``power.csv`` (six columns of a substation, hourly), ``shops.csv`` (daily sales of twelve items of a
        long table, with ``promotion`` and ``holiday`` known 28 days beyond the last), ``visitors.csv`` (of two museums,
        with semicolons, decimal commas and days first), ``monthly.tsf`` (eight series of the Monash kind), ``traffic/``
        (a GluonTS data set of ten roads), ``sensors.parquet`` (four sensors, every 15 minutes), ``machines.npz`` (three
        currents without stamps), and ``bad.csv`` (a good series, and four that cannot be used).
    """
    folder = Path(folder)
    (folder / "traffic" / "train").mkdir(parents=True, exist_ok=True)
    (folder / "traffic" / "test").mkdir(exist_ok=True)
    rngs = [np.random.default_rng([seed, i]) for i in range(8)]
    names = ("power.csv", "shops.csv", "visitors.csv", "monthly.tsf", "sensors.parquet", "machines.npz", "bad.csv")
    paths = [folder / name for name in names]
    write_csv_wide(paths[0], [_power(rngs[0])])
    _write_shops(paths[1], rngs[1])
    write_csv_wide(paths[2], [_visitors(rngs[2])], delimiter=";", decimal=",", date_format="%d.%m.%Y")
    write_tsf(paths[3], _monthly(rngs[3]), relation="sales", horizon=12)
    write_parquet(paths[4], _sensors(rngs[4]))
    write_npz(paths[5], _machines(rngs[5]))
    _write_bad(paths[6], rngs[6])
    return paths + _write_traffic(folder / "traffic", rngs[7])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of series of one family."""
    group = parser.add_argument_group("families", "fabricate series of one kind, as one Parquet file in DIR")
    group.add_argument("--family", metavar="NAME", help=f"one of {', '.join(families())}")
    group.add_argument("--count", type=int, metavar="N", help=f"series (default: {_COUNT})")
    group.add_argument("--length", type=int, metavar="T", help=f"steps of each (default: {_LENGTH})")


def from_args(
    folder: Path,
    options: argparse.Namespace,
    progress: Callable[[str, float, str], AbstractContextManager[Callable[[float], None]]],
) -> list[Path]:
    """Fabricate what the command line asks for: the sample, or series of one family in a long table of Parquet.

    Args:
        folder: Where to write; with ``--family`` it gets ``NAME.parquet``.
        options: ``seed``, and what :func:`add_arguments` adds.
        progress: Shows a bar of a title, a total and a unit while it is open, and gives a function to move it on.

    Returns:
        The files.

    Raises:
        UnknownNameError: There is no such family.
        ConfigError: A number is too small, or is given without a family.
    """
    if options.family is None:
        if options.count is not None or options.length is not None:
            raise ConfigError("sample timeseries: --count and --length go with --family NAME; give it too.")
        return write_sample(folder, options.seed)
    name, count = options.family, _COUNT if options.count is None else options.count
    length = _LENGTH if options.length is None else options.length
    if count < 1:
        raise ConfigError(f"sample timeseries: --count must be at least 1, got {count}.")
    made = [draw(name, length, [options.seed, 0])]  # a wrong name or length is told before there is a bar
    with progress(name, count, "series") as advance:
        for i in range(1, count):
            made.append(draw(name, length, [options.seed, i]))
            if i % _PART == 0:
                advance(_PART)
        advance(count - (count - 1) // _PART * _PART)
    digits = len(str(count - 1))
    series = [
        Series(name=f"{name}_{i:0{digits}}", values=drawn.values[:, None])  # calendars differ: rows are counted
        for i, drawn in enumerate(made)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.parquet"
    write_parquet(path, series)
    return [path]


# ---------------------------------------------------------------- the files


def _per_day(rng: np.random.Generator, length: int, day: int, keep: float) -> Doubles:
    """A path (length,) that changes from one day to the next."""
    path = ar1(rng, length // day + 2, keep)
    return np.interp(np.arange(length) / day, np.arange(len(path)), path)


def _power(rng: np.random.Generator) -> Series:
    """Loads of three lines of a substation, useful (UF) and useless (UL), and the temperature of the oil they heat."""
    hours = np.arange(HOURS)
    hour, weekday = hours % 24, hours // 24 % 7
    people = np.exp(-0.5 * ((hour - 8.5) / 2) ** 2) + 1.3 * np.exp(-0.5 * ((hour - 19) / 2.8) ** 2)
    works = 1 / (1 + np.exp(-(3.5 - np.abs(hour - 12.5)) * 1.5)) * np.where(weekday < 5, 1, 0.25)
    weather = 6 * np.cos(2 * np.pi * (hours / 8766 - 0.05)) + 3 * _per_day(rng, HOURS, 24, 0.85)  # degrees too cold
    weather -= 4 * np.cos(2 * np.pi * (hour - 15) / 24)
    wave = np.exp(0.2 * _per_day(rng, HOURS, 24, 0.7))
    share = np.where(weekday < 5, 1, 1.25)
    high = 5 + 5.5 * people * share * wave + 0.12 * weather + 0.9 * ar1(rng, HOURS, 0.75)
    middle = 2 + 4 * works * wave + 0.4 * high + 0.5 * ar1(rng, HOURS, 0.6)
    columns = [high, 0.32 * high + 0.6 * ar1(rng, HOURS, 0.5), middle, 0.28 * middle + 0.4 * ar1(rng, HOURS, 0.5)]
    losses = 0.08 * (high + middle) ** 2
    heat = float(losses[:24].mean())
    oil = np.empty(HOURS)
    for at, loss in enumerate(losses.tolist()):
        heat += (loss - heat) / 9  # oil follows the losses, which grow with the square, in nine hours
        oil[at] = heat
    oil = 14 + 0.9 * oil - 0.7 * weather + 0.8 * ar1(rng, HOURS, 0.9)
    low = 1.2 + 0.9 * people + 0.3 * ar1(rng, HOURS, 0.8)
    values = np.stack([*columns, low, oil], axis=1).round(3)
    return _wide("power", values, ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "OT"), _HOUR)


def _wide(name: str, values: Doubles, variates: tuple[str, ...], frequency: Frequency) -> Series:
    return Series(name=name, values=values, variates=variates, frequency=frequency, start=_START)


def _write_shops(path: Path, rng: np.random.Generator) -> None:
    """Write sales that promotions raise and holidays stop; a few days of each item are not in the file."""
    days = 560
    weekday = np.arange(days) % 7
    holiday = (rng.random(days + AHEAD) < 0.02).astype(np.float64)
    series = []
    for item in range(12):
        length = int(rng.integers(220, days + 1))
        promotion = np.zeros(days + AHEAD)
        for begin in rng.choice((days + AHEAD) // 7, 14, replace=False) * 7:
            promotion[begin : begin + int(rng.integers(3, 8))] = 1
        week = np.exp(rng.normal((0, 0, 0, 0, 0.2, 0.4, -0.4), 0.1))
        drift = rng.uniform(-0.2, 0.4) * np.arange(days) / days
        level = rng.uniform(8, 80) * np.exp(0.1 * ar1(rng, days, 0.98) + drift)
        rate = level * week[weekday] * (1 + rng.uniform(0.6, 1.2) * promotion[:days]) * (1 - 0.85 * holiday[:days])
        sales = rng.poisson(rate * rng.gamma(30, 1 / 30, days)).astype(np.float64)
        series.append(
            Series(
                name=f"item_{item:02}",
                values=sales[days - length :, None],
                frequency=_DAY,
                start=_START + np.timedelta64(days - length, "D"),
                known=np.stack([promotion, holiday], axis=1)[days - length :],
                known_names=("promotion", "holiday"),
            )
        )
    write_csv_long(path, series, date_format="%Y-%m-%d")
    header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True)
    sold = np.array([index for index, row in enumerate(rows) if row.split(",")[2]])
    lost = set(rng.choice(sold[5:-5], 15, replace=False).tolist())
    text = header + "".join(row for index, row in enumerate(rows) if index not in lost)
    path.write_bytes(text.replace(".0,", ",").replace(".0\n", "\n").encode())


def _visitors(rng: np.random.Generator) -> Series:
    """Thousands of visitors of two museums a day: more at weekends and in summer, none on Mondays in one of them."""
    days = np.arange(900)
    summer = 1 + 0.5 * np.cos(2 * np.pi * (days / 365.25 - 0.55))
    columns = []
    for week in ((0.6, 0.7, 0.8, 0.8, 1, 1.7, 1.6), (0, 0.8, 0.8, 0.9, 1, 1.5, 1.8)):
        crowd = rng.uniform(1, 4) * summer * np.array(week)[days % 7]
        columns.append(crowd * np.exp(0.12 * ar1(rng, len(days), 0.7) + 0.08 * rng.standard_normal(len(days))))
    return _wide("visitors", np.stack(columns, axis=1).round(3), ("museum", "gallery"), _DAY)


def _monthly(rng: np.random.Generator) -> list[Series]:
    series = []
    for number in range(8):
        length = int(rng.integers(96, 181))
        months = np.arange(length)
        factor = np.exp(0.25 * rng.standard_normal(12))[months % 12]
        growth = 1 + rng.uniform(-0.3, 1.5) * months / length + 0.05 * np.cumsum(rng.standard_normal(length)) / 3
        values = rng.uniform(200, 9000) * np.maximum(0.2, growth) * factor
        values *= np.exp(0.06 * rng.standard_normal(length))
        start = np.datetime64("2008-01", "M") + int(rng.integers(24))
        series.append(
            Series(
                name=f"T{number + 1}",
                values=values.round(1)[:, None],
                frequency=parse_frequency("MS"),
                start=start.astype("datetime64[ms]"),
            )
        )
    return series


def _write_traffic(folder: Path, rng: np.random.Generator) -> list[Path]:
    """Write how full ten roads are, hourly; ``test`` goes on a day beyond ``train``, as GluonTS has it."""
    length, ahead = 24 * 7 * 6, 24
    hours = np.arange(length)
    hour, work = hours % 24, hours // 24 % 7 < 5
    series = []
    for road in range(10):
        peaks = [rng.normal(8, 0.5), rng.normal(17.5, 0.7)]
        busy = sum(rng.uniform(0.3, 1) * np.exp(-0.5 * ((hour - peak) / rng.uniform(1, 2)) ** 2) for peak in peaks)
        calm = 0.45 * np.exp(-0.5 * ((hour - 15) / 4) ** 2)
        full = 0.01 + 0.13 * np.where(work, busy, calm) * np.exp(0.15 * _per_day(rng, length, 24, 0.5))
        full *= np.exp(0.12 * ar1(rng, length, 0.6))
        series.append(
            Series(name=f"road_{road}", values=np.minimum(full, 1).round(4)[:, None], frequency=_HOUR, start=_START)
        )
    paths = [folder / "metadata.json", folder / "test" / "data.json.gz", folder / "train" / "data.json.gz"]
    metadata = {"freq": "H", "prediction_length": ahead, "feat_static_cat": [], "feat_dynamic_real": []}
    paths[0].write_bytes((json.dumps(metadata, indent=2) + "\n").encode())
    write_jsonl(paths[1], series)
    write_jsonl(paths[2], [own.cut(0, length - ahead) for own in series])
    return paths


def _sensors(rng: np.random.Generator) -> list[Series]:
    """Temperatures of four rooms, each 15 minutes, one of which was silent for some hours."""
    length, day = 96 * 21, 96
    steps = np.arange(length)
    outside = 12 + 5 * np.cos(2 * np.pi * (steps / day - 0.62)) + 3 * _per_day(rng, length, day, 0.8)
    series = []
    for room in range(4):
        awake = (steps % day > 26) & (steps % day < 88)
        values = 17 + 3 * awake + rng.uniform(0.1, 0.3) * (outside - 12)
        for at in range(1, length):
            values[at] = values[at - 1] + (values[at] - values[at - 1]) / 12  # walls are slow
        values += 0.15 * ar1(rng, length, 0.9)
        values = values.round(2)
        if room == 2:
            values[1000:1019] = np.nan
        series.append(
            Series(name=f"room_{room}", values=values[:, None], frequency=parse_frequency("15min"), start=_START)
        )
    return series


def _machines(rng: np.random.Generator) -> Series:
    """Currents of three machines that work in turns of 40 steps, and wear."""
    steps = np.arange(1600)
    columns = []
    for machine in range(3):
        turn = (steps + 13 * machine) % 40
        load = np.where(turn < 22, 1 + 0.4 * np.sin(turn), 0.2) * (1 + 0.3 * steps / len(steps))
        columns.append(rng.uniform(2, 20) * (load + 0.06 * ar1(rng, len(steps), 0.5)))
    return Series(name="machines", values=np.stack(columns, axis=1).round(3), variates=("mill", "lathe", "saw"))


def _write_bad(path: Path, rng: np.random.Generator) -> None:
    """Write a long table of a good series and four bad ones."""
    stamps = np.datetime64("2024-01-01", "m") + 60 * np.arange(240)
    uneven = stamps[0] + np.cumsum(rng.integers(7, 100, 60))
    values = [f"{v:.2f}" for v in 20 + 5 * np.cos(2 * np.pi * np.arange(240) / 24) + rng.standard_normal(240)]
    kinds = {
        "good": (stamps, values),
        "irregular": (uneven, values[:60]),
        "duplicated": (np.repeat(stamps[:40], 2), values[:80]),
        "short": (stamps[:1], values[:1]),
        "text": (stamps[:48], [*values[:20], "shut", *values[21:48]]),
    }
    lines = ["unique_id,ds,y\n"]
    for name, (at, cells) in kinds.items():
        lines += [f"{name},{str(stamp).replace('T', ' ')},{cell}\n" for stamp, cell in zip(at, cells, strict=True)]
    path.write_bytes("".join(lines).encode())
