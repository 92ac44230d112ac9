"""Training beside transformers' PatchTST, forecasts of 10,000 series, and cost over the context.

    taskset -c 1 python benchmarks/timeseries_speed.py training    # 4 minutes; --threads 2, --dropout 0.2
    taskset -c 1 python benchmarks/timeseries_speed.py inference    # 2 minutes
    taskset -c 1 python benchmarks/timeseries_speed.py context    # 1 minute

``training``: forward, backward and AdamW on the same 32 windows of 7 variates, each variate by itself, 96 steps ahead,
squared error, 3 layers. The peer is ``PatchTSTForPrediction``, patches of 16 every 8 steps, norms behind the branches,
learned positions, one linear map from all patches, and the attention it takes by itself (SDPA); once with LayerNorm and
once with the BatchNorm of the paper. The first of ours is the same function as the former: with its weights it tells
the same means and loss, which is checked before anything is timed. The second is iLLaMA on patches that do not overlap,
half as many, as in the recipe ``timeseries/etth1``: another model. Dropout stands in the same places in all of them:
after the embedding, behind every branch, before the head.

``inference``: the form of the bundled model, on random walks of 512 points in memory, 96 ahead, nine quantiles, in
batches of 256; beside it the model alone, on the same windows ready made, and the seasonal naive forecast. Memory is
what the resident set grew by at its peak while all are forecast, the forecasts included.

``context``: a forward pass of the same form with two backbones over 8 windows of one variate.

Rounds alternate; a ratio is the median of the ratios of the rounds. Times are those of the processor for one thread,
those of the clock for several.
"""

from __future__ import annotations

import argparse
import functools
import resource
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vertebra.backbones.base import create_backbone
from vertebra.backbones.opt import OFFSET
from vertebra.domains.batching import Batch
from vertebra.domains.timeseries.baselines import SeasonalNaive
from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.inference import SeriesForecaster
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.spec import QUANTILES, SeriesSpec
from vertebra.domains.timeseries.windows import WindowItems

VARIATES, BATCH, HORIZON, PATCH, STRIDE, DEPTH, HIDDEN = 7, 32, 96, 16, 8, 3, 256
CONTEXTS, SIZES = (336, 512), ((64, 4), (128, 16))  # width and heads
LIKE = "opt_nano,dim={},depth=3,heads={},hidden=256,activation=gelu,norm_first=false,causal=false,max_length={}"
OWN = "illama_nano,dim={},depth=3,num_heads={},num_kv_heads=0,hidden_dim=256,causal=false"
PEER, OURS = "transformers PatchTST, LayerNorm", "ours, the same form (OPT layers)"
PEER_PAPER, OURS_OWN = "transformers PatchTST, BatchNorm", "ours, iLLaMA, patches that do not overlap"

ZERO = "illama_nano,dim=96,depth=5,num_heads=4,num_kv_heads=0,hidden_dim=256,causal=false"
LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
BACKBONES = {
    "iLLaMA": ZERO,
    "hybrid (MMMMA)": "hybrid_nano,dim=96,depth=5,pattern=MMMMA,hidden_dim=256,causal=false",
}
PARTS = ("inference", "training", "context")
Action = Callable[[], object]


# ---------------------------------------------------------------- timing


def alternate(actions: Mapping[str, Action], rounds: int) -> dict[str, list[float]]:
    """Time actions in turn, after a round that does not count; seconds of each round by name."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in actions}
    for number in range(rounds + 1):
        for name, action in actions.items():
            start = clock()
            action()
            if number:
                times[name].append(clock() - start)
    return times


def ratio(above: list[float], below: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


class Peak:
    """Largest resident set while it runs, sampled every few milliseconds, in bytes."""

    def __enter__(self) -> Peak:
        self.start = self.most = self._now()
        self.going = True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.going = False
        self.thread.join()
        self.most = max(self.most, self._now())

    def _watch(self) -> None:
        while self.going:
            self.most = max(self.most, self._now())
            time.sleep(0.003)

    @staticmethod
    def _now() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# ---------------------------------------------------------------- training


def batch_of(context: int, variates: int, count: int) -> Batch:
    """Make windows of random walks."""
    walks = torch.randn(count, variates, context + HORIZON).cumsum(-1)
    known = torch.ones_like(walks, dtype=torch.bool)
    return {
        "values": walks[..., :context],
        "observed": known[..., :context],
        "target": walks[..., context:],
        "target_observed": known[..., context:],
        "season": torch.full((count,), 24),
    }


def ours(word: str, context: int, stride: int, dropout: float) -> PatchForecaster:
    """Make our model."""
    return PatchForecaster(
        create_backbone(f"{word},dropout={dropout}"),
        SeriesSpec(context=context, horizon=HORIZON),
        patch=PATCH,
        stride=stride,
        head="point",
        readout="flatten",
        space="data",
        tell_observed=False,
        dropout=dropout,
    )


def peer(context: int, dim: int, heads: int, dropout: float, **options: Any) -> nn.Module:
    """Make the model of transformers."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=VARIATES,
        context_length=context,
        prediction_length=HORIZON,
        patch_length=PATCH,
        patch_stride=STRIDE,
        d_model=dim,
        num_hidden_layers=DEPTH,
        num_attention_heads=heads,
        ffn_dim=HIDDEN,
        positional_dropout=dropout,
        path_dropout=dropout,
        head_dropout=dropout,
        loss="mse",
        pre_norm=False,
        positional_encoding_type="random",  # learned
        pooling_type=None,  # the head reads all patches
        **options,
    )
    return PatchTSTForPrediction(config)


def same_weights(like: PatchForecaster, theirs: nn.Module) -> None:
    """Copy the peer's weights into ours."""
    given = theirs.state_dict()
    found = {
        "in_proj.weight": given["model.encoder.embedder.input_embedding.weight"],
        "in_proj.bias": given["model.encoder.embedder.input_embedding.bias"],
        "param_proj.proj.weight": given["head.projection.weight"],
        "param_proj.proj.bias": given["head.projection.bias"],
    }
    rows = like.state_dict()["backbone.positions.weight"].clone()
    rows[OFFSET:] = given["model.encoder.positional_encoder.position_enc"]
    found["backbone.positions.weight"] = rows
    names = {"mixer.proj": "self_attn.out_proj", "norm1": "norm_sublayer1", "norm2": "norm_sublayer3"}
    names |= {"mlp.fc1": "ff.0", "mlp.fc2": "ff.3"}
    for layer in range(DEPTH):
        here, there = f"backbone.layers.{layer}", f"model.encoder.layers.{layer}"
        for kind in ("weight", "bias"):
            parts = [given[f"{there}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            found[f"{here}.mixer.qkv.{kind}"] = torch.cat(parts)
            found |= {f"{here}.{own}.{kind}": given[f"{there}.{other}.{kind}"] for own, other in names.items()}
    like.load_state_dict(found)


def check(context: int, dim: int, heads: int) -> None:
    """Compare means and loss of both, on windows that are scaled already, as the peer's own variance has n below."""
    theirs = peer(context, dim, heads, 0.0, norm_type="layernorm", scaling=None)
    like = ours(LIKE.format(dim, heads, tokens(context)), context, STRIDE, 0.0)
    same_weights(like, theirs)
    batch = batch_of(context, VARIATES, 4)
    values = batch["values"]
    batch["values"] = (values - values.mean(-1, keepdim=True)) / values.std(-1, keepdim=True)
    found = theirs(past_values=batch["values"].mT, future_values=batch["target"].mT)
    means = like.forecast(batch).mean.float()
    torch.testing.assert_close(means, found.prediction_outputs.mT.detach(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(like.losses(batch)["loss"], found.loss, rtol=1e-3, atol=0)


def tokens(context: int) -> int:
    """Patches of a context."""
    return (context - PATCH) // STRIDE + 1


def step(optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor]) -> None:
    """Learn from a batch."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


def print_training(rounds: int, dropout: float) -> None:
    """Print windows a second of all models."""
    print("| context | width | model | parameters | windows/s | to PatchTST, LayerNorm | to PatchTST, BatchNorm |")
    print("| ---: | ---: | --- | ---: | ---: | ---: | ---: |")
    for context in CONTEXTS:
        for dim, heads in SIZES:
            check(context, dim, heads)
            batch = batch_of(context, VARIATES, BATCH)
            past, future = batch["values"].mT, batch["target"].mT
            models: dict[str, nn.Module] = {
                PEER: peer(context, dim, heads, dropout, norm_type="layernorm", scaling="std"),
                PEER_PAPER: peer(context, dim, heads, dropout, norm_type="batchnorm", scaling="std"),
                OURS: ours(LIKE.format(dim, heads, tokens(context)), context, STRIDE, dropout),
                OURS_OWN: ours(OWN.format(dim, max(heads // 4, 1)), context, 0, dropout),
            }
            actions: dict[str, Action] = {}
            for name, model in models.items():
                if isinstance(model, PatchForecaster):
                    loss = functools.partial(lambda model, batch: model.losses(batch)["loss"], model, batch)
                else:
                    loss = functools.partial(
                        lambda model, past, future: model(past_values=past, future_values=future).loss,
                        model,
                        past,
                        future,
                    )
                optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-4)
                actions[name] = functools.partial(step, optimizer, loss)
            times = alternate(actions, rounds)
            for name, seconds in times.items():
                count = sum(p.numel() for p in models[name].parameters()) / 1e3
                cells = [f"{ratio(times[other], seconds):.2f}" for other in (PEER, PEER_PAPER)]
                rate = BATCH / statistics.median(seconds)
                print(f"| {context} | {dim} | {name} | {count:,.0f}K | {rate:.1f} | {' | '.join(cells)} |", flush=True)
    print()


# ---------------------------------------------------------------- inference


def print_inference(count: int, size: int = 256, chunk: int = 1024) -> None:
    """Print series a second and memory."""
    spec = SeriesSpec(context=512, horizon=HORIZON)
    model = PatchForecaster(create_backbone(ZERO), spec, head="quantile", seasonal=True, squash=True)
    forecaster = SeriesForecaster(model)
    rng = np.random.default_rng(0)
    hours = parse_frequency("h")
    series = [
        Series(name=str(i), values=row[:, None], frequency=hours)
        for i, row in enumerate(rng.standard_normal((count, spec.context)).cumsum(1))
    ]
    forecaster.forecast(series[:size])
    start = time.perf_counter()
    with Peak() as peak:
        kept = forecaster.forecast(series, batch_size=size)
    whole = time.perf_counter() - start
    held = sum(one.mean.nbytes + one.quantiles.nbytes for one in kept)
    del kept

    some = series[:chunk]
    places = np.array([[i, spec.context] for i in range(len(some))])
    items = WindowItems(some, spec, places)
    ready = [items.fetch(part, 0) for part in np.split(np.arange(len(some)), range(size, len(some), size))]
    actions: dict[str, Action] = {
        "forecasts of series": lambda: forecaster.forecast(some, batch_size=size),
        "the model alone, on ready batches": lambda: [model.forecast(batch) for batch in ready],
        "seasonal naive": lambda: SeasonalNaive().forecast(some, HORIZON, QUANTILES),
    }
    times = alternate(actions, 7)
    parameters = sum(p.numel() for p in model.parameters()) / 1e3
    print(f"{parameters:,.0f}K parameters; {count:,} series: {whole:.1f} s by the clock, {count / whole:.0f} a second")
    print(f"MiB more at the peak: {(peak.most - peak.start) / 2**20:.0f}, of which forecasts {held / 2**20:.0f}\n")
    print(f"| {len(some):,} series a round | series/s | to the model alone |")
    print("| --- | ---: | ---: |")
    alone = times["the model alone, on ready batches"]
    for name, seconds in times.items():
        print(f"| {name} | {len(some) / statistics.median(seconds):.0f} | {ratio(alone, seconds):.2f} |")
    print()


# ---------------------------------------------------------------- context


def print_contexts(rounds: int) -> None:
    """Print the cost over the context."""
    print("| context | patches | " + " | ".join(f"{name}, ms a window" for name in BACKBONES) + " | hybrid / iLLaMA |")
    print("| ---: | ---: |" + " ---: |" * (len(BACKBONES) + 1))
    for context in LENGTHS:
        spec = SeriesSpec(context=context, horizon=HORIZON)
        batch = batch_of(context, 1, 8)
        models = [PatchForecaster(create_backbone(word), spec, head="quantile").eval() for word in BACKBONES.values()]
        times = alternate(
            {name: functools.partial(m.forecast, batch) for name, m in zip(BACKBONES, models, strict=True)}, rounds
        )
        cells = [f"{1000 * statistics.median(seconds) / 8:.2f}" for seconds in times.values()]
        first, second = times.values()
        patches = models[0].context_patches + models[0].future_patches
        print(f"| {context:,} | {patches} | {' | '.join(cells)} | {ratio(second, first):.2f} |", flush=True)


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--count", type=int, default=10_000, help="series to forecast")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, threads: {args.threads}, fp32\n")
    if "inference" in args.parts:  # first, while the process is small
        print_inference(args.count)
    if "training" in args.parts:
        print_training(args.rounds, args.dropout)
    if "context" in args.parts:
        print_contexts(args.rounds)


if __name__ == "__main__":
    main()
