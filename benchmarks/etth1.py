"""ETTh1 by the standard long-horizon protocol: every backbone beside baselines and published rows.

    python benchmarks/etth1.py --data ../shared/data/timeseries/etth1/ETTh1.csv      # about an hour on two cores

Scaled values, rows 0-8639 / 8640-11519 / 11520-14399, all test windows. The backbones are trained by ``vertebra fit
timeseries/etth1`` as the recipe has it, seed 0; the recipe was chosen on the validation rows at horizon 96. Baselines
are made here: repeat-last, the same hour of the day before, ridge (penalty chosen on validation), and DLinear (Adam,
learning rate 5e-3 halved each epoch, batch 32, best of ten epochs on validation). A run that is there already is read,
not repeated; ``--horizons`` and ``--only`` do a part, and the table shows what there is.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

HORIZONS = (96, 192, 336, 720)
SIZE = "dim=32,depth=2,dropout=0.2"
RUNS = {
    "iLLaMA": (f"illama_nano,{SIZE},num_heads=4,num_kv_heads=0,hidden_dim=64,causal=false", {}),
    "iLLaMA, causal": (f"illama_nano,{SIZE},num_heads=4,num_kv_heads=0,hidden_dim=64", {}),
    "hybrid": (f"hybrid_nano,{SIZE},pattern=MA,hidden_dim=64,mamba_head_dim=16,causal=false", {}),
    "FIT": ("fit_nano,dim=32,num_heads=2,group_size=8,latent_dim=32,latent_heads=2,dropout=0.2,causal=false", {}),
    "Axial, variates x patches": (
        f"axial_nano,{SIZE},num_heads=2,mlp_ratio=2,causal=false",
        {"model.mode": "multivariate"},
    ),
    "scaling-law encoder": (f"tsfm_test,{SIZE},num_heads=2,hidden_dim=0,causal=false", {}),
    "iLLaMA, lookback 96": (
        f"illama_nano,{SIZE},num_heads=4,num_kv_heads=0,hidden_dim=64,causal=false",
        {"data.context": "96"},
    ),
    "PatchTST-like, lookback 336": (None, {}),
}
PUBLISHED = {
    "DLinear, 336": (".375/.399", ".405/.416", ".439/.443", ".472/.490"),
    "PatchTST/64, 512": (".370/.400", ".413/.429", ".422/.440", ".447/.468"),
    "iTransformer, 96": (".386/.405", ".441/.436", ".487/.458", ".503/.491"),
    "TimesNet, 96": (".384/.402", ".436/.429", ".491/.469", ".521/.500"),
}
"""As quoted in other papers, MSE/MAE; the number is the lookback."""


def fit(name: str, horizon: int, folder: Path, data: Path, threads: int) -> tuple[float, float, float]:
    """Train with the command line; return MSE and MAE of the test, and minutes."""
    word, more = RUNS[name]
    recipe = "timeseries/etth1" if word else "timeseries/patchtst"
    root = folder / f"{name.replace(' ', '_').replace(',', '')}_{horizon}"
    run = root / recipe / "latest"
    if not (run / "minutes").is_file():
        given = {
            "data.path": str(data),
            "data.horizon": str(horizon),
            "root": str(root),
            "seed_everything": "0",
            **more,
        }
        given |= {"model.backbone": word} if word else {"data.borders": "[8640,11520,14400]"}
        command = [str(Path(sys.executable).with_name("vertebra")), "fit", recipe]
        command += [w for key, value in given.items() for w in (f"--{key}", value)]
        command += ["--trainer.enable_progress_bar", "false"]
        start = time.perf_counter()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        (run / "minutes").write_text(f"{(time.perf_counter() - start) / 60:.2f}")
    found = json.loads((run / "metrics.json").read_text())["test"]
    return found["test/mse"], found["test/mae"], float((run / "minutes").read_text())


def errors(forecast: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """MSE and MAE."""
    away = forecast - target
    return float((away**2).mean()), float(np.abs(away).mean())


def baselines(values: np.ndarray, horizon: int, epochs: int) -> dict[str, tuple[float, float]]:
    """Errors of what needs no backbone."""
    from vertebra.domains.timeseries.baselines import Ridge, repeat_last, seasonal_naive
    from vertebra.domains.timeseries.protocol import ett_borders, ett_windows

    short = ett_windows(values, "test", 96, horizon)
    found = {
        "repeat last": errors(repeat_last(short.context, horizon), short.target),
        "same hour of the day before": errors(seasonal_naive(short.context, horizon, 24), short.target),
    }
    for context in (96, 336, 512):
        val, test = (ett_windows(values, split, context, horizon) for split in ("val", "test"))
        train = (values[: ett_borders("h")[0]] - val.center) / val.scale
        models = [Ridge(context, horizon, alpha).fit(train) for alpha in (1.0, 1e3, 1e4, 1e5)]
        best = min(models, key=lambda m: errors(m.predict(val.context), val.target)[0])
        found[f"ridge, lookback {context}"] = errors(best.predict(test.context), test.target)
    found["DLinear, lookback 336"] = dlinear(values, horizon, epochs)
    return found


def dlinear(values: np.ndarray, horizon: int, epochs: int) -> tuple[float, float]:
    """Train DLinear; return the errors of the epoch that is best on validation."""
    import torch

    from vertebra.domains.timeseries.baselines import DLinear
    from vertebra.domains.timeseries.protocol import ett_windows

    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    parts = {split: ett_windows(values, split, 336, horizon) for split in ("train", "val", "test")}
    model = DLinear(336, horizon)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def tell(split: str) -> tuple[float, float]:
        windows = parts[split]
        with torch.no_grad():
            made = [
                model(torch.from_numpy(windows.context[i : i + 512].astype(np.float32))).numpy()
                for i in range(0, len(windows.context), 512)
            ]
        return errors(np.concatenate(made), windows.target)

    best = (np.inf, (np.inf, np.inf))
    train = parts["train"]
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * 0.5**epoch
        order = rng.permutation(len(train.context))
        for begin in range(0, len(order), 32):
            rows = order[begin : begin + 32]
            x, y = (torch.from_numpy(part[rows].astype(np.float32)) for part in (train.context, train.target))
            optimizer.zero_grad()
            torch.nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()
        best = min(best, (tell("val")[0], tell("test")), key=lambda pair: pair[0])
    return best[1]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="ETTh1.csv")
    parser.add_argument("--runs", type=Path, default=Path("runs/etth1"), help="folder of the runs")
    parser.add_argument("--horizons", type=int, nargs="+", default=list(HORIZONS), choices=HORIZONS)
    parser.add_argument("--only", nargs="+", default=list(RUNS), choices=list(RUNS), metavar="NAME")
    parser.add_argument("--epochs", type=int, default=10, help="of DLinear")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    import torch

    torch.set_num_threads(args.threads)
    values = np.genfromtxt(args.data, delimiter=",", skip_header=1)[:, 1:]
    table: dict[str, dict[int, str]] = {}
    minutes = 0.0
    for horizon in args.horizons:
        store = args.runs / f"baselines_{horizon}.json"
        if not store.is_file():
            store.parent.mkdir(parents=True, exist_ok=True)
            store.write_text(json.dumps(baselines(values, horizon, args.epochs)))
        for name, pair in json.loads(store.read_text()).items():
            table.setdefault(name, {})[horizon] = "{:.3f}/{:.3f}".format(*pair)
        for name in args.only:
            mse, mae, took = fit(name, horizon, args.runs, args.data, args.threads)
            minutes += took
            table.setdefault(name, {})[horizon] = f"{mse:.3f}/{mae:.3f}"
            print(f"{name}, {horizon}: {mse:.4f}/{mae:.4f}, {took:.1f} min", file=sys.stderr, flush=True)
    print("| MSE/MAE, test | " + " | ".join(map(str, args.horizons)) + " |")
    print("| --- |" + " --- |" * len(args.horizons))
    for name, row in table.items():
        print(f"| {name} | " + " | ".join(row.get(h, "") for h in args.horizons) + " |")
    for name, told in PUBLISHED.items():
        print(f"| {name}, published | " + " | ".join(told[HORIZONS.index(h)] for h in args.horizons) + " |")
    print(f"\nTraining and testing the models took {minutes:.0f} minutes in all, {args.threads} thread(s).")


if __name__ == "__main__":
    main()
