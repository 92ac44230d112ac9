"""Training beside transformers' PatchTST, forecasts of 10,000 series, and cost over the context.

    python benchmarks/timeseries_speed.py

Training: forward, backward and AdamW on the same batch, 7 variates each by itself, patches of 16 every 8 steps, 96
steps ahead, 3 layers; the peer is ``PatchTSTForPrediction`` with its own head, mean squared error, dropout 0.2. Rounds
alternate, and the median counts. Inference: the form of the bundled model on series of 512 points, 96 ahead, with nine
quantiles, file reading left out; memory is what the process grew by at its peak. Context: a forward pass over windows
of one variate.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains.batching import Batch
from vertebra.domains.timeseries.baselines import SeasonalNaive
from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.spec import QUANTILES, SeriesSpec

VARIATES, BATCH, HORIZON = 7, 32, 96
LIKE = "opt_nano,dim={dim},depth=3,heads={heads},hidden=256,activation=gelu,norm_first=false,causal=false,dropout=0.2"
OWN = "illama_nano,dim={dim},depth=3,num_heads={few},num_kv_heads=0,hidden_dim=256,causal=false,dropout=0.2"
ZERO = "illama_nano,dim=96,depth=5,num_heads=4,num_kv_heads=0,hidden_dim=256,causal=false"


def batch_of(context: int, variates: int, count: int) -> Batch:
    """Make random windows."""
    shape = (count, variates, context)
    return {
        "values": torch.randn(shape).cumsum(-1),
        "observed": torch.ones(shape, dtype=torch.bool),
        "target": torch.randn(count, variates, HORIZON),
        "target_observed": torch.ones(count, variates, HORIZON, dtype=torch.bool),
        "season": torch.full((count,), 24),
    }


def ours(word: str, context: int, stride: int) -> PatchForecaster:
    """Make our model."""
    spec = SeriesSpec(context=context, horizon=HORIZON, variates=tuple("abcdefg"))
    options = {"patch": 16, "stride": stride, "head": "point", "readout": "flatten", "space": "data"}
    return PatchForecaster(create_backbone(word), spec, tell_observed=False, dropout=0.2, **options)  # type: ignore[arg-type]


def training_step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    """Return one optimizer step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def alternate(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn."""
    for step in steps.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def train(context: int, dim: int, heads: int, rounds: int) -> None:
    """Print a row for each model of a size."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    batch = batch_of(context, VARIATES, BATCH)
    config = PatchTSTConfig(
        num_input_channels=VARIATES,
        context_length=context,
        prediction_length=HORIZON,
        patch_length=16,
        patch_stride=8,
        d_model=dim,
        num_hidden_layers=3,
        num_attention_heads=heads,
        ffn_dim=256,
        attention_dropout=0.2,
        positional_dropout=0.2,
        ff_dropout=0.2,
        path_dropout=0.0,
        head_dropout=0.2,
        loss="mse",
        pooling_type=None,  # its head reads all patches, as in the paper
        scaling="std",
    )
    peer = PatchTSTForPrediction(config).train()
    like = ours(LIKE.format(dim=dim, heads=heads), context, 8).train()
    own = ours(OWN.format(dim=dim, few=max(heads // 4, 1)), context, 0).train()
    past, future = batch["values"].transpose(1, 2), batch["target"].transpose(1, 2)
    models: dict[str, tuple[torch.nn.Module, Callable[[], torch.Tensor]]] = {
        "transformers PatchTST": (peer, lambda: peer(past_values=past, future_values=future).loss),
        "same form, OPT layers": (like, lambda: like.losses(batch)["loss"]),
        "iLLaMA, patches that do not overlap": (own, lambda: own.losses(batch)["loss"]),
    }
    took = alternate({name: training_step(*pair) for name, pair in models.items()}, rounds)
    first = next(iter(took.values()))
    for name, seconds in took.items():
        count = sum(p.numel() for p in models[name][0].parameters()) / 1e3
        print(
            f"| {context} | {dim} | {name} | {count:,.0f}K | {BATCH / seconds:.0f} | {first / seconds:.2f} |",
            flush=True,
        )


def memory() -> float:
    """MiB of the process at its peak."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def infer(count: int) -> None:
    """Print series a second and memory."""
    spec = SeriesSpec(context=512, horizon=HORIZON)
    model = PatchForecaster(create_backbone(ZERO), spec, head="quantile", seasonal=True, squash=True)
    forecaster = SeriesForecaster(model)
    rng = np.random.default_rng(0)
    hours = parse_frequency("h")
    series = [
        Series(name=str(i), values=row[:, None], frequency=hours)
        for i, row in enumerate(rng.standard_normal((count, 512)).cumsum(1))
    ]
    forecaster.forecast(series[:256])
    before = memory()
    start = time.perf_counter()
    forecaster.forecast(series)
    whole = count / (time.perf_counter() - start)
    grown = memory() - before
    ready = batch_of(512, 1, 256)
    alone = 256 / alternate({"model": lambda: model.forecast(ready)}, 5)["model"]  # type: ignore[dict-item]
    start = time.perf_counter()
    SeasonalNaive().forecast(series[:1000], HORIZON, QUANTILES)
    naive = 1000 / (time.perf_counter() - start)
    size = sum(p.numel() for p in model.parameters()) / 1e3
    print(f"| {count:,} series, {size:,.0f}K parameters | series/s | MiB more |")
    print("| --- | ---: | ---: |")
    print(f"| forecasts of series | {whole:.0f} | {grown:.0f} |")
    print(f"| the model alone, on ready batches of 256 | {alone:.0f} | |")
    print(f"| seasonal naive | {naive:.0f} | |")


def contexts(rounds: int) -> None:
    """Print the cost over the context."""
    words = {
        "iLLaMA": ZERO,
        "hybrid (MMMMA)": "hybrid_nano,dim=96,depth=5,pattern=MMMMA,hidden_dim=256,causal=false",
    }
    print("| context | " + " | ".join(words) + " |")
    print("| ---: |" + " ---: |" * len(words))
    for context in (512, 1024, 2048, 4096, 8192, 16384):
        steps = {}
        for name, word in words.items():
            spec = SeriesSpec(context=context, horizon=HORIZON)
            model = PatchForecaster(create_backbone(word), spec, head="quantile").eval()
            batch = batch_of(context, 1, 8)
            steps[name] = lambda model=model, batch=batch: model.forecast(batch)
        took = alternate(steps, rounds)  # type: ignore[arg-type]
        print(f"| {context} | " + " | ".join(f"{1000 * took[name] / 8:.1f} ms" for name in words) + " |", flush=True)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=10_000, help="series to forecast")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    infer(args.count)  # first, while the process is small
    print()
    print("| context | width | model | parameters | windows/s | to PatchTST |")
    print("| ---: | ---: | --- | ---: | ---: | ---: |")
    for context in (336, 512):
        for dim, heads in ((64, 4), (128, 16)):
            train(context, dim, heads, args.rounds)
    print()
    contexts(args.rounds)


if __name__ == "__main__":
    main()
