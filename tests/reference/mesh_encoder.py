"""Michelangelo's shape encoder as its definition, from a state dict in its own names and head layout: slow, obvious."""

import math

import torch
import torch.nn.functional as F


def encoder_tensors(width, latents, frequencies, layers, bottleneck=0, decoder_layers=0, prefix=""):
    """Draw random weights by Michelangelo's names."""
    found = {"encoder.query": torch.randn(1 + latents, width)}

    def linear(name, inputs, outputs, bias=True):
        found[f"{name}.weight"] = torch.randn(outputs, inputs) / math.sqrt(inputs)
        if bias:
            found[f"{name}.bias"] = 0.3 * torch.randn(outputs)

    def norm(name):
        found[f"{name}.weight"], found[f"{name}.bias"] = 1 + 0.3 * torch.randn(width), 0.3 * torch.randn(width)

    def mlp(name):
        linear(f"{name}.c_fc", width, 4 * width)
        linear(f"{name}.c_proj", 4 * width, width)

    def resblock(name):
        linear(f"{name}.attn.c_qkv", width, 3 * width, bias=False)
        linear(f"{name}.attn.c_proj", width, width)
        norm(f"{name}.ln_1")
        norm(f"{name}.ln_2")
        mlp(f"{name}.mlp")

    linear("encoder.input_proj", 3 + 6 * frequencies + 3, width)
    cross = "encoder.cross_attn"
    linear(f"{cross}.attn.c_q", width, width, bias=False)
    linear(f"{cross}.attn.c_kv", width, 2 * width, bias=False)
    linear(f"{cross}.attn.c_proj", width, width)
    for i in (1, 2, 3):
        norm(f"{cross}.ln_{i}")
    mlp(f"{cross}.mlp")
    for i in range(layers):
        resblock(f"encoder.self_attn.resblocks.{i}")
    norm("encoder.ln_post")
    if bottleneck:
        linear("pre_kl", width, 2 * bottleneck)
        linear("post_kl", bottleneck, width)
    for i in range(decoder_layers):
        resblock(f"transformer.resblocks.{i}")
    return {prefix + name: tensor for name, tensor in found.items()}


def encode(tensors, points, heads, frequencies, layers):
    """Map points (B, N, 6) to tokens (B, 1 + L, D)."""
    return torch.stack([_encode(tensors, cloud, heads, frequencies, layers) for cloud in points])


def decode(tensors, tokens, heads, bottleneck, layers):
    """Map tokens (B, 1 + L, D) to decoded latents (B, L, D)."""
    items = []
    for item in tokens:
        x = _linear(tensors, "post_kl", _linear(tensors, "pre_kl", item[1:])[:, :bottleneck])
        for i in range(layers):
            x = _resblock(tensors, f"transformer.resblocks.{i}", x, heads)
        items.append(x)
    return torch.stack(items)


def embed(point, frequencies):
    """Embed one point (6,): x, y, z, the sines of x, of y, of z, their cosines likewise, the normal."""
    found = list(point[:3])
    for wave in (torch.sin, torch.cos):
        found += [wave(point[axis] * 2**i) for axis in range(3) for i in range(frequencies)]
    return torch.stack([*found, *point[3:]])


def spread(cloud, count):
    """Choose ``count`` points of a cloud (N, 3) one after another, each by its distances to all before it."""
    chosen = [max(range(len(cloud)), key=lambda i: float(cloud[i].square().sum()))]
    while len(chosen) < count:
        rest = [i for i in range(len(cloud)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: min(float((cloud[i] - cloud[j]).square().sum()) for j in chosen)))
    return chosen


def _encode(tensors, cloud, heads, frequencies, layers):
    data = _linear(tensors, "encoder.input_proj", torch.stack([embed(point, frequencies) for point in cloud]))
    x, cross = tensors["encoder.query"], "encoder.cross_attn"
    query = _norm(tensors, f"{cross}.ln_1", x) @ tensors[f"{cross}.attn.c_q.weight"].T
    pair = _norm(tensors, f"{cross}.ln_2", data) @ tensors[f"{cross}.attn.c_kv.weight"].T
    packed = pair.view(len(cloud), heads, -1)  # (N, H, 2 * head width): keys and values of a head side by side
    key, value = packed.chunk(2, dim=-1)
    x = x + _linear(tensors, f"{cross}.attn.c_proj", _attend(query.view(len(x), heads, -1), key, value))
    x = x + _mlp(tensors, f"{cross}.mlp", _norm(tensors, f"{cross}.ln_3", x))
    for i in range(layers):
        x = _resblock(tensors, f"encoder.self_attn.resblocks.{i}", x, heads)
    return _norm(tensors, "encoder.ln_post", x)


def _resblock(tensors, name, x, heads):
    packed = (_norm(tensors, f"{name}.ln_1", x) @ tensors[f"{name}.attn.c_qkv.weight"].T).view(len(x), heads, -1)
    x = x + _linear(tensors, f"{name}.attn.c_proj", _attend(*packed.chunk(3, dim=-1)))
    return x + _mlp(tensors, f"{name}.mlp", _norm(tensors, f"{name}.ln_2", x))


def _attend(q, k, v):
    """Attend head by head: q (Q, H, K), k and v (S, H, K) to (Q, H * K)."""
    scale = q.shape[-1] ** -0.25  # half of 1 / sqrt(K) on either side
    weights = torch.einsum("qhc,shc->hqs", q * scale, k * scale).softmax(-1)
    return torch.einsum("hqs,shc->qhc", weights, v).reshape(len(q), -1)


def _mlp(tensors, name, x):
    return _linear(tensors, f"{name}.c_proj", F.gelu(_linear(tensors, f"{name}.c_fc", x)))


def _linear(tensors, name, x):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _norm(tensors, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]
