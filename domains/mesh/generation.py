"""Meshes from a generator: the grammar around its tokens, and points to meshes.

Shapes: B items, N points, P condition tokens, D width, V vocabulary with begin, end, padding, S state of the grammar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vertebra.backbones.decoding import Decoder, Stop, Strategy, generate, stream
from vertebra.domains.mesh.geometry import CONDITION_SCALE, sample_surface
from vertebra.domains.mesh.metrics import chamfer
from vertebra.domains.mesh.model import BEGIN, END, SPECIAL, ShapeGenerator
from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import MeshGrammar, QuantizedMesh, canonical, dequantize

GREEDY = Strategy(method="greedy")


class MeshMachine:
    """A tokenizer's grammar between begin and end, as a decoder's ``Machine``.

    States (B, 1 + S): whether the begin has been read, then the grammar's. The embedding is given ids and kinds.

    Args:
        grammar: Of the tokenizer.
    """

    def __init__(self, grammar: MeshGrammar) -> None:
        self.grammar = grammar

    def begin(self, batch: int, device: torch.device) -> Tensor:
        """As in ``Machine``."""
        states = self.grammar.begin(batch, device)
        return torch.cat([states.new_zeros(batch, 1), states], dim=1)

    def allowed(self, states: Tensor) -> Tensor:
        """As in ``Machine``."""
        inner = self.grammar.allowed(states[:, 1:])  # (B, V - 2)
        begun = states[:, :1] > 0
        may = torch.zeros(len(states), SPECIAL + self.grammar.vocab_size, dtype=torch.bool, device=states.device)
        may[:, BEGIN] = ~begun[:, 0]
        may[:, END] = inner[:, -1] & begun[:, 0]
        may[:, SPECIAL:] = inner[:, :-1] & begun
        return may

    def read(self, states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """As in ``Machine``."""
        token = (ids - SPECIAL).clamp(min=0)
        own = ids >= SPECIAL
        kinds = torch.where(own, SPECIAL + self.grammar.kinds(states[:, 1:], token), ids)
        after = self.grammar.advance(states[:, 1:], token)
        after = torch.where(own[:, None], after, states[:, 1 : 1 + after.shape[1]])
        return torch.stack([ids, kinds], dim=-1), torch.cat([torch.ones_like(states[:, :1]), after], dim=1)


@dataclass(frozen=True)
class GeneratedMesh:
    """What a generator wrote for one shape.

    Args:
        mesh: On the grid, perhaps of no face; those whose corners lie on one line are left out.
        tokens: How many were written, begin and end not counted.
        log_prob: Of begin, tokens and end together, in nats.
        finished: Whether the model ended it; otherwise the limit did, and what was whole by then was kept.
        faces: Faces that were written, those left out and those said twice included.
    """

    mesh: QuantizedMesh
    tokens: int
    log_prob: float
    finished: bool
    faces: int


def decoder_of(model: ShapeGenerator, prefix: Tensor, *, compiled: bool = False) -> Decoder:
    """Return what writes meshes behind the condition ``prefix`` (B, P, D)."""
    return Decoder(
        model.backbone,
        lambda inputs: model.embed_tokens(inputs[..., 0], inputs[..., 1]),
        model.head,
        prefix.device,
        compiled,
        MeshMachine(model.grammar()),
        prefix,
    )


@torch.inference_mode()
def generate_meshes(
    model: ShapeGenerator,
    points: Tensor,
    strategy: Strategy = GREEDY,
    *,
    faces: Sequence[int] | None = None,
    max_tokens: int | None = None,
    numbers: Sequence[int] | None = None,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[GeneratedMesh]:
    """Write a mesh for every shape; a shape that ends leaves the batch.

    Args:
        model: In evaluation mode.
        points: Condition (B, N, 6).
        strategy: How tokens are chosen.
        faces: About how many faces each should have, (B,), for a model that can be told.
        max_tokens: Most tokens of one; None for as many as the model was trained with.
        numbers: Numbers of the items, which their draws depend on; 0, 1, ... when None.
        compiled: As in ``Decoder``.
        progress: Called after each step with the steps done and the items still going.

    Raises:
        ConfigError: ``max_tokens`` is more than the model was trained with, or it cannot be told ``faces``.
    """
    most = model.spec.max_tokens if max_tokens is None else max_tokens
    if not 0 < most <= model.spec.max_tokens:
        raise ConfigError(
            f"max_tokens must be between 1 and {model.spec.max_tokens}, the most this model was trained with, "
            f"got {most}."
        )
    buckets = None if faces is None else torch.tensor([model.bucket_of(n) for n in faces], device=points.device)
    decoder = decoder_of(model, model.condition(points, buckets), compiled=compiled)
    written = write_ids(decoder, len(points), most, strategy, numbers=numbers, progress=progress)
    return [
        read_mesh_ids(model, one.ids, one.log_probs, one.finished, most, row)
        for one, row in zip(written, points, strict=True)
    ]


@dataclass(frozen=True)
class Written:
    """What a decoder wrote for one shape.

    Args:
        ids: Begin, tokens and, where it ended, the end.
        log_probs: Log-probability of each in nats.
        finished: Whether it ended; otherwise the limit did.
    """

    ids: list[int]
    log_probs: list[float]
    finished: bool


def write_ids(
    decoder: Decoder,
    count: int,
    most: int,
    strategy: Strategy,
    *,
    numbers: Sequence[int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Written]:
    """Write tokens for ``count`` shapes, at most ``most`` each without begin and end.

    Args:
        decoder: From ``decoder_of``.
        count: B.
        most: Where the limit is.
        strategy: How tokens are chosen.
        numbers: As in ``generate_meshes``.
        progress: As in ``generate_meshes``.
    """
    stop = Stop(max_new=most + 2, ids=(END,))
    prompts = torch.empty(count, 0, dtype=torch.long, device=decoder.device)
    if strategy.method == "beam":
        found = generate(decoder, prompts, stop, strategy)
        return [Written(one.ids.tolist(), one.log_probs.tolist(), one.reason == "stop") for one in found]
    ids: list[list[int]] = [[] for _ in range(count)]
    log_probs: list[list[float]] = [[] for _ in range(count)]
    finished = [False] * count
    for step, new in enumerate(stream(decoder, prompts, stop, strategy, numbers=numbers)):
        rows = zip(new.items.tolist(), new.ids.tolist(), new.log_probs.tolist(), new.ended.tolist(), strict=True)
        for item, token, log_prob, end in rows:
            ids[item].append(token)
            log_probs[item].append(log_prob)
            finished[item] = end
        if progress is not None:
            progress(step + 1, len(new.items))
    return [Written(*row) for row in zip(ids, log_probs, finished, strict=True)]


def read_mesh_ids(
    model: ShapeGenerator,
    ids: list[int],
    log_probs: list[float],
    finished: bool,
    most: int,
    points: Tensor | None = None,
) -> GeneratedMesh:
    """Read what a generator wrote: begin, tokens, end; ``most`` tokens of it where it did not end.

    Args:
        model: What wrote it.
        ids: As written.
        log_probs: Of each.
        finished: Whether the model ended it.
        most: The limit.
        points: Points of the shape (N, 6), for a model whose faces depend on it.
    """
    if not finished:  # what stands where the end had to be is one too many
        ids, log_probs = ids[: 1 + most], log_probs[: 1 + most]
    tokens = np.array([i - SPECIAL for i in ids if i >= SPECIAL], dtype=np.int64)
    corners = model.corners(tokens, points, partial=not finished)
    a, b, c = np.moveaxis(corners, 1, 0)
    kept = corners[np.cross(b - a, c - a).any(1)]
    mesh = canonical(kept.reshape(-1, 3), np.arange(3 * len(kept)).reshape(-1, 3))
    return GeneratedMesh(mesh, len(tokens), sum(log_probs), finished, len(corners))


def closest(model: ShapeGenerator, points: Tensor, candidates: Sequence[GeneratedMesh], count: int = 2048) -> int:
    """Return which candidate lies closest to the points it was made for.

    Args:
        model: What wrote them.
        points: Condition (N, 6).
        candidates: One at least; those that the limit ended come after the others, those without an area last.
        count: Points that are compared.
    """
    seen = points[:count, :3].double().cpu().numpy() / CONDITION_SCALE
    ranks: list[tuple[bool, bool, float]] = []
    for one in candidates:
        distance = float("inf")
        if len(one.mesh.faces):
            vertices = dequantize(one.mesh.vertices, model.tokenizer.bins, model.spec.place)
            drawn, _ = sample_surface(vertices, one.mesh.faces, count, np.random.default_rng(0))
            distance = chamfer(drawn, seen)
        ranks.append((distance == float("inf"), not one.finished, distance))
    return min(range(len(ranks)), key=ranks.__getitem__)


def generate_best(
    model: ShapeGenerator,
    points: Tensor,
    strategy: Strategy = GREEDY,
    *,
    candidates: int = 1,
    faces: Sequence[int] | None = None,
    max_tokens: int | None = None,
    numbers: Sequence[int] | None = None,
    compiled: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[GeneratedMesh]:
    """Write several meshes for every shape, and keep the one that lies closest to its points.

    The first is by ``strategy``; the others are sampled, with its temperature, top-k and top-p.

    Args:
        model: As in ``generate_meshes``.
        points: As in ``generate_meshes``.
        strategy: As in ``generate_meshes``.
        candidates: How many.
        faces: As in ``generate_meshes``.
        max_tokens: As in ``generate_meshes``.
        numbers: As in ``generate_meshes``.
        compiled: As in ``Decoder``.
        progress: As in ``generate_meshes``, called in each of both rounds.

    Raises:
        ConfigError: As in ``generate_meshes``, or ``candidates`` < 1.
    """
    if candidates < 1:
        raise ConfigError(f"candidates must be at least 1, got {candidates}.")

    def write(rows: Tensor, how: Strategy, told: Sequence[int] | None, named: Sequence[int]) -> list[GeneratedMesh]:
        return generate_meshes(
            model, rows, how, faces=told, max_tokens=max_tokens, numbers=named, compiled=compiled, progress=progress
        )

    own = list(range(len(points))) if numbers is None else list(numbers)
    first = write(points, strategy, faces, own)
    if candidates == 1:
        return first
    more = candidates - 1
    told = None if faces is None else [n for n in faces for _ in range(more)]
    named = [n * candidates + k for n in own for k in range(1, candidates)]  # draws that no other item has
    others = write(points.repeat_interleave(more, dim=0), dataclasses.replace(strategy, method="sample"), told, named)
    found = [[one, *others[i * more : (i + 1) * more]] for i, one in enumerate(first)]
    return [few[closest(model, row, few)] for row, few in zip(points, found, strict=True)]
