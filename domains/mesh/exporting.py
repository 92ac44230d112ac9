"""The mesh generator as programs: points and tokens to logits, and the steps that write a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vertebra.backbones.fixed import FixedSteps
from vertebra.domains.exporting import (
    BATCH,
    Axis,
    ExportForm,
    Exports,
    Port,
    draw_ids,
    lengths,
    longest,
)
from vertebra.domains.mesh.geometry import CONDITION_SCALE
from vertebra.domains.mesh.model import BEGIN, END, PAD, SPECIAL, MeshGenerator
from vertebra.domains.mesh.vqvae import MeshVQVAE
from vertebra.domains.stepping import StepModule, state_ports, step_form
from vertebra.errors import ConfigError


def exports(model: MeshGenerator | MeshVQVAE, steps: bool, max_length: int | None) -> Exports:
    """Return the forms of a generator, and how its tokens are read.

    Raises:
        ConfigError: The model is no generator.
    """
    if not isinstance(model, MeshGenerator):
        raise ConfigError(
            f"export: {type(model).__name__} is no program; its codes are chosen one by one in Python. Export the "
            "generator that was trained on it."
        )
    spec, vocab, kinds = model.spec, model.embed.num_embeddings, model.kind_embed.num_embeddings
    before, fewest = model.prefix_length, _fewest_points(model)
    buckets = 0 if model.face_embed is None else model.face_embed.num_embeddings
    condition = [
        Port("points", ("batch", "points", 6), "points of a surface that fits into [-0.5, 0.5], times "
             f"{CONDITION_SCALE:g}, and their unit normals"),
    ]  # fmt: skip
    if buckets:
        condition.append(Port("face_buckets", ("batch",), "range of the number of faces, from 1; 0 for unknown"))
    points = Axis(fewest, 65536, (fewest + 40, fewest, fewest + 7))

    def draw_condition(batch: int, count: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        places = torch.rand(batch, count, 3, generator=generator) * 2 - 1
        normals = nn.functional.normalize(torch.randn(batch, count, 3, generator=generator), dim=-1)
        drawn = (torch.cat([places, normals], dim=-1),)
        return (*drawn, draw_ids((batch,), 0, buckets, generator)) if buckets else drawn

    def draw_tokens(batch: int, length: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        shape = (batch, length)
        return draw_ids(shape, SPECIAL, vocab, generator), draw_ids(shape, SPECIAL, kinds, generator)

    def draw(sizes: Mapping[str, int], generator: torch.Generator) -> tuple[Tensor, ...]:
        given = draw_condition(sizes["batch"], sizes["points"], generator)
        return (*draw_tokens(sizes["batch"], sizes["length"], generator), *given)

    tokens = [
        Port("ids", ("batch", "length"), "begin and the tokens behind it"),
        Port("kinds", ("batch", "length"), "kind of each token, from the grammar"),
    ]
    most = longest(model.backbone, spec.max_tokens + 2, before)  # with begin and end
    forms = {
        "forward": ExportForm(
            about="One pass over a shape and the tokens so far; padding may stand on the right of the tokens.",
            module=_Forward(model),
            inputs=(*tokens, *condition),
            outputs={"logits": "of the begin, then of what follows each token, (batch, length + 1, vocabulary)"},
            axes={"batch": BATCH, "length": lengths(most), "points": points},
            draw=draw,
        )
    }
    if steps:
        wanted = before + (max_length or spec.max_tokens + 2)
        fixed = FixedSteps(model.backbone, min(wanted, longest(model.backbone, wanted)))
        begin = _Begin(model, fixed)
        parts = {name: getattr(model, name) for name in ("embed", "kind_embed", "cond_embed", "head")}
        step = StepModule(parts, lambda ids, kinds, position: model.embed_tokens(ids, kinds), model.head, fixed, 2)
        ports = state_ports(fixed.empty(1))

        def start(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
            return begin(*draw_condition(batch, fewest + 3, generator))[1:]

        forms["begin"] = ExportForm(
            about="Reads the shape; what it returns is the state before the begin is read, and the logits of it.",
            module=begin,
            inputs=tuple(condition),
            outputs={"logits": "of the begin", **{f"next.{p.name}": f"{p.name} of the first step" for p in ports}},
            axes={"batch": BATCH, "points": points},
            draw=lambda sizes, generator: draw_condition(sizes["batch"], sizes["points"], generator),
            state={f"next.{p.name}": p.name for p in ports},
        )
        said = ("logits", "of the token that follows each of the new ones")
        forms["step"] = step_form(step, tokens, said, draw_tokens, begin=start)
    facts: dict[str, Any] = {
        "begin_id": BEGIN,
        "end_id": END,
        "pad_id": PAD,
        "first_token_id": SPECIAL,
        "points": spec.points,
        "bins": model.tokenizer.bins,
        "face_buckets": list(spec.face_buckets),
        "place": spec.place,
    }
    return Exports(forms, facts)


def _fewest_points(model: MeshGenerator) -> int:
    config = model.encoder.config
    return max(2, config.latents) if config.queries == "points" else 2


class _Forward(nn.Module):
    """Tokens, kinds and the condition to logits: a causal backbone needs no mask."""

    def __init__(self, model: MeshGenerator) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, kinds: Tensor, points: Tensor, face_buckets: Tensor | None = None) -> Tensor:
        model = self.model
        prefix = model.condition(points, face_buckets)  # (B, P, D)
        y = model.backbone(torch.cat([prefix, model.embed_tokens(ids, kinds)], dim=1))
        logits: Tensor = model.head(y[:, prefix.shape[1] - 1 :])  # (B, L + 1, V)
        return logits


class _Begin(nn.Module):
    """The condition to the logits of the begin, and the state."""

    def __init__(self, model: MeshGenerator, steps: FixedSteps) -> None:
        super().__init__()
        self.model, self.steps = model, steps

    def forward(self, points: Tensor, face_buckets: Tensor | None = None) -> tuple[Tensor, ...]:
        prefix = self.model.condition(points, face_buckets)  # (B, P, D)
        y, state = self.steps(prefix, self.steps.empty(prefix.shape[0]))
        return (self.model.head(y[:, -1]), *state.values())
