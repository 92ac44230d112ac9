"""MeshAnything V1 as its definition, from a state dict in its own names: one shape at a time, token by token."""

import mesh_encoder
import torch
import torch.nn.functional as F

DECODER, SHAPE, TOKENIZER = "transformer.model.decoder.", "point_encoder.model.shape_model.", "tokenizer."
SIZES = {
    "width": 192, "depth": 2, "hidden": 48, "positions": 62, "codes": 40, "code_dim": 24, "bins": 16,
    "decoder": 128, "decoder_depth": 2, "decoder_hidden": 56, "faces": 20,
    "shape": 128, "latents": 5, "frequencies": 3, "layers": 1, "bottleneck": 4, "shape_layers": 1,
}  # fmt: skip
"""A small one; heads are 64 wide as in the released one, so there are 3, 2 and 2 of them."""
RELEASED = {
    "width": 1024, "depth": 24, "hidden": 4096, "positions": 18_259, "codes": 8192, "code_dim": 1024, "bins": 128,
    "decoder": 768, "decoder_depth": 6, "decoder_hidden": 3072, "faces": 18_000,
    "shape": 768, "latents": 256, "frequencies": 8, "layers": 8, "bottleneck": 64, "shape_layers": 16,
}  # fmt: skip
HEAD = 64


def checkpoint(sizes=SIZES, fused=True):
    """Draw weights by the names of the original; the decoder's by those of BetterTransformer, or BERT's own."""
    found, s = {}, sizes
    width, inner, shape = s["width"], s["decoder"], s["shape"]

    def linear(name, inputs, outputs, bias=True, mark="."):
        found[f"{name}{mark}weight"] = torch.randn(outputs, inputs) / inputs**0.5
        if bias:
            found[f"{name}{mark}bias"] = 0.3 * torch.randn(outputs)

    def norm(name, size, mark="."):
        found[f"{name}{mark}weight"] = 1 + 0.3 * torch.randn(size)
        found[f"{name}{mark}bias"] = 0.3 * torch.randn(size)

    for name, rows in (
        ("embed_tokens", s["codes"] + 3),
        ("extra_embeds", 3),
        ("token_embed_positions", 12),
        ("cond_embed", 2),
        ("embed_positions", s["positions"] + 2),
    ):
        found[f"{DECODER}{name}.weight"] = torch.randn(rows, width)
    linear(f"{DECODER}input_layer", s["code_dim"], width)
    found[f"{DECODER}quantize_codebooks"] = torch.randn(1, s["codes"], s["code_dim"])
    for i in range(s["depth"]):
        layer = f"{DECODER}layers.{i}"
        for part in ("q", "k", "v", "out"):
            linear(f"{layer}.self_attn.{part}_proj", width, width)
        norm(f"{layer}.self_attn_layer_norm", width)
        linear(f"{layer}.fc1", width, s["hidden"])
        linear(f"{layer}.fc2", s["hidden"], width)
        norm(f"{layer}.final_layer_norm", width)
    linear("transformer.lm_head", width, s["codes"] + 3, bias=False)
    linear("cond_head_proj", shape, width)
    linear("cond_proj", 2 * shape, width)

    linear(f"{TOKENIZER}project_down_codebook", 3 * s["code_dim"], inner)
    found[f"{TOKENIZER}pos_embedding.weight"] = torch.randn(s["faces"], inner)
    found[f"{TOKENIZER}point_pe.weight"] = torch.randn(1 + s["latents"], inner)
    for name in ("layernorm", "point_layernorm"):
        norm(TOKENIZER + name, inner)
    for name in ("cond_proj", "cond_head_proj"):
        linear(TOKENIZER + name, shape, inner)
    linear(f"{TOKENIZER}to_coor_logits.0", inner, 9 * s["bins"])
    for i in range(s["decoder_depth"]):
        layer = f"{TOKENIZER}decoder.layer.{i}"
        if fused:
            linear(f"{layer}.in_proj", inner, 3 * inner, mark="_")
            linear(f"{layer}.out_proj", inner, inner, mark="_")
            linear(f"{layer}.linear1", inner, s["decoder_hidden"], mark="_")
            linear(f"{layer}.linear2", s["decoder_hidden"], inner, mark="_")
            norm(f"{layer}.norm1", inner, mark="_")
            norm(f"{layer}.norm2", inner, mark="_")
            continue
        for part in ("query", "key", "value"):
            linear(f"{layer}.attention.self.{part}", inner, inner)
        linear(f"{layer}.attention.output.dense", inner, inner)
        norm(f"{layer}.attention.output.LayerNorm", inner)
        linear(f"{layer}.intermediate.dense", inner, s["decoder_hidden"])
        linear(f"{layer}.output.dense", s["decoder_hidden"], inner)
        norm(f"{layer}.output.LayerNorm", inner)

    found |= mesh_encoder.encoder_tensors(
        shape, s["latents"], s["frequencies"], s["layers"], s["bottleneck"], s["shape_layers"], SHAPE
    )
    found[f"{SHAPE}geo_decoder.output_proj.weight"] = torch.randn(1, shape)
    found["point_encoder.model.shape_projection"] = torch.randn(shape, shape)
    return found


def plain(tensors):
    """Rename the fused layers of the decoder to those of BERT."""
    parts = {
        "out_proj": "attention.output.dense",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
    }
    found = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.rpartition(".")
        part, _, kind = rest.rpartition("_")
        if not layer.startswith(f"{TOKENIZER}decoder."):
            found[name] = tensor
        elif part == "in_proj":
            for own, piece in zip(("query", "key", "value"), tensor.split(len(tensor) // 3), strict=True):
                found[f"{layer}.attention.self.{own}.{kind}"] = piece
        else:
            found[f"{layer}.{parts[part]}.{kind}"] = tensor
    return found


# ---------------------------------------------------------------- stacks of layers, norms behind the branches


def opt(tensors, x):
    """Map embedded tokens x (T, D) to features, each by itself and those before it."""
    x = x + tensors[f"{DECODER}embed_positions.weight"][2 : 2 + len(x)]
    future = torch.ones(len(x), len(x)).triu(1).bool()
    for i in range(_layers(tensors, f"{DECODER}layers.")):
        layer = f"{DECODER}layers.{i}"
        q, k, v = (_linear(tensors, f"{layer}.self_attn.{part}_proj", x) for part in "qkv")
        mixed = _linear(tensors, f"{layer}.self_attn.out_proj", _attend(q, k, v, future))
        x = _norm(tensors, f"{layer}.self_attn_layer_norm", x + mixed)
        inner = _linear(tensors, f"{layer}.fc1", x).clamp(min=0)
        x = _norm(tensors, f"{layer}.final_layer_norm", x + _linear(tensors, f"{layer}.fc2", inner))
    return x


def bert(tensors, x):
    """Map x (T, D) to features, each by all; ``tensors`` in BERT's own names."""
    nothing = torch.zeros(len(x), len(x)).bool()
    for i in range(_layers(tensors, f"{TOKENIZER}decoder.layer.")):
        layer = f"{TOKENIZER}decoder.layer.{i}"
        q, k, v = (_linear(tensors, f"{layer}.attention.self.{part}", x) for part in ("query", "key", "value"))
        mixed = _linear(tensors, f"{layer}.attention.output.dense", _attend(q, k, v, nothing))
        x = _norm(tensors, f"{layer}.attention.output.LayerNorm", x + mixed, 1e-12)
        inner = F.gelu(_linear(tensors, f"{layer}.intermediate.dense", x))
        x = _norm(tensors, f"{layer}.output.LayerNorm", x + _linear(tensors, f"{layer}.output.dense", inner), 1e-12)
    return x


# ---------------------------------------------------------------- the model


def latents_of(tensors, points, sizes=SIZES):
    """Map points (N, 6) to the tokens of the shape (1 + latents, D)."""
    shape = {k.removeprefix(SHAPE): v for k, v in tensors.items()}
    return mesh_encoder.encode(shape, points[None], sizes["shape"] // HEAD, sizes["frequencies"], sizes["layers"])[0]


def logits(tensors, points, ids, stack=opt, sizes=SIZES):
    """Map points (N, 6) and ids of a mesh with begin and end (L,) to the logits of each of them (L, V)."""
    latents = latents_of(tensors, points, sizes)
    shape = {k.removeprefix(SHAPE): v for k, v in tensors.items()}
    heads = sizes["shape"] // HEAD
    decoded = mesh_encoder.decode(shape, latents[None], heads, sizes["bottleneck"], sizes["shape_layers"])[0]
    table = {
        name: tensors[f"{DECODER}{name}.weight"] for name in ("extra_embeds", "token_embed_positions", "cond_embed")
    }
    rows = [_linear(tensors, "cond_head_proj", latents[0]) + table["cond_embed"][0]]
    for latent, other in zip(latents[1:], decoded, strict=True):
        rows.append(_linear(tensors, "cond_proj", torch.cat([latent, other])) + table["cond_embed"][0])
    prefix = len(rows)
    for place, token in enumerate(ids[:-1]):
        if token < 3:
            row, kind = table["extra_embeds"][token], token
        else:
            row = _linear(tensors, f"{DECODER}input_layer", tensors[f"{DECODER}quantize_codebooks"][0, token - 3])
            kind = (place + 1 - 2) % 9 + 3  # by how many tokens there are, this one and the begin included
        rows.append(row + table["token_embed_positions"][kind] + table["cond_embed"][1])
    return stack(tensors, torch.stack(rows))[prefix - 1 :] @ tensors["transformer.lm_head.weight"].T


def coordinate_logits(tensors, points, codes, most, stack=bert, sizes=SIZES):
    """Map codes (F * 9,), from 0, to logits (F, 9, bins) of coordinates; ``most`` faces are decoded in any case."""
    latents, rows = latents_of(tensors, points, sizes), []
    for place, latent in enumerate(latents):
        row = _linear(tensors, TOKENIZER + ("cond_proj" if place else "cond_head_proj"), latent)
        rows.append(_norm(tensors, f"{TOKENIZER}point_layernorm", row + tensors[f"{TOKENIZER}point_pe.weight"][place]))
    book = tensors[f"{DECODER}quantize_codebooks"][0]
    count = len(codes) // 9
    for face in range(most):
        own = codes[9 * face : 9 * face + 9]
        row = torch.zeros(sizes["decoder"])
        if len(own) == 9 and min(own) >= 0:
            corners = [
                book[own[3 * corner]] + book[own[3 * corner + 1]] + book[own[3 * corner + 2]] for corner in range(3)
            ]
            row = _linear(tensors, f"{TOKENIZER}project_down_codebook", torch.cat(corners))
        rows.append(_norm(tensors, f"{TOKENIZER}layernorm", row + tensors[f"{TOKENIZER}pos_embedding.weight"][face]))
    features = stack(tensors, torch.stack(rows))[len(latents) :][:count]
    return _linear(tensors, f"{TOKENIZER}to_coor_logits.0", features).view(count, 9, -1)


def triangles(tensors, points, codes, most, stack=bert, sizes=SIZES):
    """Map codes (F * 9,), -1 where there is none, to corners (F, 3, 3), NaN for faces that are not whole."""
    cells = coordinate_logits(tensors, points, codes, most, stack, sizes).argmax(-1)
    found = cells.view(-1, 3, 3) / sizes["bins"] - 0.5
    for face in range(len(found)):
        if min(codes[9 * face : 9 * face + 9]) < 0:
            found[face] = torch.nan
    return found


# ---------------------------------------------------------------- parts


def _attend(q, k, v, hidden):
    """Attend head by head: q, k, v (T, D), ``hidden`` (T, T) what is not seen."""
    mixed = []
    for a, b, c in zip(q.split(HEAD, -1), k.split(HEAD, -1), v.split(HEAD, -1), strict=True):
        mixed.append((a @ b.T / HEAD**0.5).masked_fill(hidden, -torch.inf).softmax(-1) @ c)
    return torch.cat(mixed, dim=-1)


def _layers(tensors, prefix):
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def _linear(tensors, name, x):
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _norm(tensors, name, x, eps=1e-5):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]
