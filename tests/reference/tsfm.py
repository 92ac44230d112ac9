"""The scaling-law models for time series as their definition, in float64, sample by sample: slow, obvious.

Weights are a flat state dict by the published names. Rows are packed as published: ``sample_id`` (R, S) is 1, 2, ...
and 0 at padding. A missing value has a scaled value of 0.
"""

import math
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.distributions import AffineTransform, Categorical, MixtureSameFamily, StudentT, TransformedDistribution

COMPONENTS = 4
EPS = 1e-5
SHAPE = {"dim": 16, "layers": 2, "heads": 2, "hidden": 24, "patch": 4}
"""Of the golden files."""


def published_tensors(dim, layers, heads, hidden, patch, decoder):
    """Draw random float32 weights by the published names."""
    found = {}

    def linear(name, inputs, outputs, bias):
        found[f"{name}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
        if bias:
            found[f"{name}.bias"] = 0.3 * torch.randn(outputs)

    def norm(name, width):
        found[f"{name}.weight"] = 1 + 0.3 * torch.randn(width)

    if not decoder:
        found["mask_encoding.weight"] = torch.randn(1, dim)
    linear("in_proj", patch, dim, bias=True)
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}.self_attn.{name}", dim, dim, bias=False)
        norm(f"{layer}.self_attn.q_norm", dim // heads)
        norm(f"{layer}.self_attn.k_norm", dim // heads)
        linear(f"{layer}.ffn.fc1", dim, hidden, bias=False)
        linear(f"{layer}.ffn.fc2", hidden, dim, bias=False)
        linear(f"{layer}.ffn.fc_gate", dim, hidden, bias=False)
        norm(f"{layer}.norm1", dim)
        norm(f"{layer}.norm2", dim)
    norm("encoder.norm", dim)
    linear("param_proj.proj.weights_logits", dim, COMPONENTS * patch, bias=True)
    for c in range(COMPONENTS):
        for name in ("df", "loc", "scale"):
            linear(f"param_proj.proj.components.{c}.{name}", dim, patch, bias=True)
    return found


def packed_rows(patch, lengths=((5, 3, 9), (2, 11), (7,)), padding=2, level=2.0):
    """Draw rows of packed series of these numbers of patches, each with its own level and spread, some of it missing.

    Args:
        patch: Steps P of a patch.
        lengths: Patches of the series of each row.
        padding: Patches behind the longest row.
        level: How many spreads the levels are away from 0.

    Returns:
        target and observed (R, S, P), sample_id and predicted (R, S); at least the last patch of a series is predicted,
        the first never.
    """
    size = max(sum(row) for row in lengths) + padding
    target, observed = torch.zeros(len(lengths), size, patch), torch.zeros(len(lengths), size, patch, dtype=torch.bool)
    sample_id, predicted = torch.zeros(len(lengths), size, dtype=torch.long), torch.zeros(len(lengths), size).bool()
    for r, row in enumerate(lengths):
        start = 0
        for number, length in enumerate(row, start=1):
            stop = start + length
            spread = 10 ** (2 * torch.rand(1) - 1)
            target[r, start:stop] = spread * (level * torch.randn(1) + torch.randn(length, patch))
            observed[r, start:stop] = torch.rand(length, patch) < 0.8
            observed[r, start, :2] = observed[r, stop - 1, 0] = True
            sample_id[r, start:stop] = number
            predicted[r, stop - max(1, length // 3) : stop] = True
            start = stop
    return target.masked_fill(~observed, 0), observed, sample_id, predicted


def log_prob(tensors, target, observed, sample_id, predicted):
    """Log density of the raw values of predicted patches: (R, S, P) in float64, NaN everywhere else."""
    found = []
    for r in range(len(target)):
        rows = [torch.full(target[r, 0].shape, math.nan, dtype=torch.float64) for _ in range(target.shape[1])]
        for sample in sorted(set(sample_id[r].tolist()) - {0}):
            places = [s for s in range(target.shape[1]) if sample_id[r, s] == sample]
            told = _sample(tensors, target[r, places].double(), observed[r, places], predicted[r, places])
            for s, row in zip(places, told, strict=True):
                rows[s] = rows[s] if row is None else row
        found.append(torch.stack(rows))
    return torch.stack(found)


def packed_nll(tensors, target, observed, sample_id, predicted):
    """Mean over the series of the mean over the observed points of their predicted patches."""
    told = log_prob(tensors, target, observed, sample_id, predicted)
    series = []
    for r in range(len(target)):
        for sample in sorted(set(sample_id[r].tolist()) - {0}):
            points = [
                -told[r, s, p]
                for s in range(target.shape[1])
                for p in range(target.shape[2])
                if sample_id[r, s] == sample and predicted[r, s] and observed[r, s, p]
            ]
            if points:
                series.append(sum(points) / len(points))
    return sum(series) / len(series)


def _sample(tensors, target, observed, predicted):
    """Log densities of the patches of one series (N, P): one row a predicted patch, None for the others."""
    decoder = "mask_encoding.weight" not in tensors
    known = [
        target[t, p] for t in range(len(target)) if not predicted[t] for p in range(target.shape[1]) if observed[t, p]
    ]
    loc = sum(known) / max(len(known), 1)
    scale = torch.sqrt(sum((v - loc) ** 2 for v in known) / max(len(known) - 1, 1) + EPS)
    x = _linear(tensors, "in_proj", torch.where(observed, (target - loc) / scale, 0.0))
    if not decoder:
        mask = tensors["mask_encoding.weight"][0].double()
        x = torch.stack([mask if predicted[t] else x[t] for t in range(len(x))])
    layer = 0
    while f"encoder.layers.{layer}.norm1.weight" in tensors:
        name = f"encoder.layers.{layer}"
        x = x + _attention(tensors, f"{name}.self_attn", _norm(tensors, f"{name}.norm1", x), decoder)
        h = _norm(tensors, f"{name}.norm2", x)
        gate = _linear(tensors, f"{name}.ffn.fc_gate", h)
        x = x + _linear(tensors, f"{name}.ffn.fc2", gate * torch.sigmoid(gate) * _linear(tensors, f"{name}.ffn.fc1", h))
        layer += 1
    x = _norm(tensors, "encoder.norm", x)
    rows = []
    for t in range(len(target)):
        assert not (decoder and predicted[t] and t == 0), "nothing comes before the first patch"
        rows.append(_density(tensors, x[t - decoder], loc, scale).log_prob(target[t]) if predicted[t] else None)
    return rows


def _attention(tensors, name, x, decoder):
    """Map one series (N, D) to (N, D), head by head and query by query."""
    width = len(tensors[f"{name}.q_norm.weight"])
    q, k, v = (_linear(tensors, f"{name}.{part}_proj", x) for part in "qkv")
    outputs = []
    for first in range(0, x.shape[1], width):
        head = slice(first, first + width)
        queries = _turned(_norm(tensors, f"{name}.q_norm", q[:, head]))
        keys = _turned(_norm(tensors, f"{name}.k_norm", k[:, head]))
        rows = []
        for t in range(len(x)):
            seen = t + 1 if decoder else len(x)
            scores = (keys[:seen] * queries[t]).sum(1) / math.sqrt(width)
            weights = (scores - scores.max()).exp()
            rows.append((weights[:, None] / weights.sum() * v[:seen, head]).sum(0))
        outputs.append(torch.stack(rows))
    return _linear(tensors, f"{name}.out_proj", torch.cat(outputs, dim=1))


def _turned(head):
    """Turn the pairs of the first half of a head (N, K) by patch index times their frequency."""
    turned = head.shape[1] // 2
    rows = []
    for t in range(len(head)):
        numbers = []
        for i in range(turned // 2):
            angle = t * 10000 ** (-2 * i / turned)
            a, b = head[t, 2 * i], head[t, 2 * i + 1]
            numbers += [a * math.cos(angle) - b * math.sin(angle), b * math.cos(angle) + a * math.sin(angle)]
        rows.append(torch.cat([torch.stack(numbers), head[t, turned:]]))
    return torch.stack(rows)


def _density(tensors, feature, loc, scale):
    """Distribution of the P raw values of a patch: affine map of a mixture of Student-t."""
    logits = _linear(tensors, "param_proj.proj.weights_logits", feature).reshape(COMPONENTS, -1)  # (C, P)
    df, centre, spread = (
        torch.stack([_linear(tensors, f"param_proj.proj.components.{c}.{name}", feature) for c in range(COMPONENTS)])
        for name in ("df", "loc", "scale")
    )
    df = 2 + torch.log1p(df.exp())
    spread = torch.log1p(spread.exp()).clamp_min(torch.finfo(torch.float32).eps)
    mixture = MixtureSameFamily(Categorical(logits=logits.T), StudentT(df.T, centre.T, spread.T))
    return TransformedDistribution(mixture, AffineTransform(loc, scale))


def _linear(tensors, name, x):
    y = x @ tensors[f"{name}.weight"].double().T
    return y + tensors[f"{name}.bias"].double() if f"{name}.bias" in tensors else y


def _norm(tensors, name, x):
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + EPS) * tensors[f"{name}.weight"].double()


def write_golden(folder):
    """Write the golden files: random weights, packed rows, and what this file says of them."""
    for kind in ("encoder", "decoder"):
        torch.manual_seed(2410)
        weights = published_tensors(**SHAPE, decoder=kind == "decoder")
        rows = packed_rows(SHAPE["patch"])
        found = {f"weights.{name}": tensor for name, tensor in weights.items()}
        found |= dict(zip(("target", "observed", "sample_id", "predicted"), rows, strict=True))
        found |= {"log_prob": log_prob(weights, *rows), "loss": packed_nll(weights, *rows)}
        save_file(
            {name: tensor.contiguous() for name, tensor in found.items()}, Path(folder) / f"tsfm_{kind}.safetensors"
        )


if __name__ == "__main__":
    write_golden(sys.argv[1])
