"""Time series: a substation with a backtest, one run over files of five formats, and a file with bad series."""

from __future__ import annotations

import json

from vertebra.pipelines.demo.base import Demo


def show(demo: Demo) -> None:
    """Run the pipelines of the domain and show what they write."""
    samples, results, report = demo.samples, demo.results, demo.report
    report.section("timeseries/forecast: a substation, hourly")
    words = "--horizon 48 --backtest 5 --figures 2"
    power = demo.run("timeseries/forecast", [samples / "power.csv"], "power.csv", words)
    facts = json.loads(power.with_name("power.csv.backtest.json").read_text(encoding="utf-8"))
    names = {"mase": "MASE", "crps": "CRPS", "mse": "MSE", "smape": "sMAPE", "coverage_80": "in the 80 % band"}
    parts = [facts[who] for who in ("model", "seasonal_naive", "ratio")]
    rows = [(label, *(part.get(name) for part in parts)) for name, label in names.items()]
    report.table(rows, ("metric", "model", "seasonal naive", "ratio"))
    report.text("The model has never seen this series. A ratio below 1 is better than repeating the day before.")
    for path, caption in (
        (results / "power.csv.png", "Days that were forecast as if they were not known, and the next two."),
        (next(results.glob("power.csv.2.*.png")), "The same of another column."),
    ):
        report.image(path, caption)

    report.section("timeseries/forecast: files of every format")
    files = [samples / name for name in ("visitors.csv", "monthly.tsf", "traffic", "sensors.parquet", "machines.npz")]
    demo.run("timeseries/forecast", files, "forecasts.parquet", "--horizon 24 --figures 3")
    report.text("Days, months, hours, quarters of an hour, and no stamps at all: frequency and season are found.")
    for path in (results / "forecasts.parquet.png", next(results.glob("forecasts.parquet.3.*.png"))):
        report.image(path, "What was, and what may come: the median, and how sure it is.")

    report.section("timeseries/forecast: bad series")
    damaged = demo.run("timeseries/forecast", [samples / "bad.csv"], "damaged.csv", "--horizon 24 --figures 0")
    demo.damaged(damaged.with_name("damaged.csv.errors.jsonl"), "series cannot be used", by="record")
