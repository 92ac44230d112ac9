"""What a teacher's layers read and wrote, and how far a student's layers are from it; plain torch.

Every layer is compared by itself, on what the teacher's layer read: so a student learns all of its layers at once.

Shapes: B batch, L positions, D width, H heads, I inner width, V vocabulary, N tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.layers.attention import Attention
from vertebra.backbones.layers.mamba2 import Mamba2
from vertebra.backbones.layers.masks import Layout
from vertebra.backbones.layers.mixer import TokenMixer
from vertebra.backbones.stack import Block
from vertebra.domains.model import DomainModel


@dataclass
class Lesson:
    """What went into and out of every layer of a teacher, without gradients.

    Args:
        inputs: Features before each layer (B, L, D).
        outputs: Features after it.
        layouts: What the positions were to each other.
    """

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)


def blocks_of(model: DomainModel) -> list[Block]:
    """Return the layers of a model's backbone."""
    blocks = []
    for index in range(model.backbone.num_layers):
        block = model.backbone.get_submodule(f"layers.{index}")
        assert isinstance(block, Block)
        blocks.append(block)
    return blocks


@torch.no_grad()
def teach(teacher: DomainModel, batch: Mapping[str, Any]) -> Lesson:
    """Run the teacher on a batch and keep what its layers read and wrote."""
    lesson = Lesson()

    def keep(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        lesson.inputs.append(arguments[0])
        lesson.layouts.append(arguments[1])
        lesson.outputs.append(output)

    handles = [block.register_forward_hook(keep) for block in blocks_of(teacher)]
    try:
        teacher.token_logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    return lesson


# ---------------------------------------------------------------- distances of layers


def matrix_distances(teacher: DomainModel, student: DomainModel, lesson: Lesson, layers: Sequence[int]) -> list[Tensor]:
    """Distances of the mixing matrices of layers: the Frobenius norm, meant over items and heads."""
    found = []
    for old, new, x, _, layout in _pairs(teacher, student, lesson, layers):
        with torch.no_grad():
            wanted = _matrix(old.mixer, old.norm1(x), layout)  # (B, H, L, L)
        found.append(torch.linalg.matrix_norm(_matrix(new.mixer, new.norm1(x), layout) - wanted).mean())
    return found


def hidden_distances(
    teacher: DomainModel, student: DomainModel, lesson: Lesson, layers: Sequence[int], *, mixers: bool = False
) -> list[Tensor]:
    """Distances of the features behind layers: the L2 norm of a position's difference, meant over real positions.

    Args:
        teacher: Who gave the lesson.
        student: Whose layers are run.
        lesson: Inputs and outputs.
        layers: Which ones.
        mixers: Compare what the token mixers add instead of the whole layers.
    """
    found = []
    for old, new, x, wanted, layout in _pairs(teacher, student, lesson, layers):
        y = new.mixer(new.norm1(x), layout) if mixers else new(x, layout)
        if mixers:
            with torch.no_grad():
                wanted = old.mixer(old.norm1(x), layout)
        gaps = torch.linalg.vector_norm((y - wanted).float(), dim=-1)  # (B, L)
        found.append(_mean_of_real(gaps, layout))
    return found


def inner_distances(teacher: DomainModel, student: DomainModel, lesson: Lesson, layers: Sequence[int]) -> list[Tensor]:
    """Mean squared differences of what the heads of layers give before the last projection, over real positions."""
    found = []
    for old, new, x, _, layout in _pairs(teacher, student, lesson, layers):
        with torch.no_grad():
            wanted = _inner(old.mixer, old.norm1(x), layout)  # (B, L, I)
        gaps = (_inner(new.mixer, new.norm1(x), layout) - wanted).float().square().mean(-1)
        found.append(_mean_of_real(gaps, layout))
    return found


def _pairs(
    teacher: DomainModel, student: DomainModel, lesson: Lesson, layers: Sequence[int]
) -> Iterator[tuple[Block, Block, Tensor, Tensor, Layout]]:
    """Yield a layer of the teacher and of the student, the teacher's input and output, and the layout."""
    old, new = blocks_of(teacher), blocks_of(student)
    for i in layers:
        yield old[i], new[i], lesson.inputs[i], lesson.outputs[i], lesson.layouts[i]


def _matrix(mixer: TokenMixer, x: Tensor, layout: Layout) -> Tensor:
    assert isinstance(mixer, (Attention, Mamba2))
    return mixer.mixing_matrix(x, layout)


def _inner(mixer: TokenMixer, x: Tensor, layout: Layout) -> Tensor:
    assert isinstance(mixer, (Attention, Mamba2))
    return mixer.inner(x, layout)


def _mean_of_real(values: Tensor, layout: Layout) -> Tensor:
    if layout.mask is None:
        return values.mean()
    return (values * layout.mask).sum() / layout.mask.sum().clamp(min=1)


# ---------------------------------------------------------------- distances of logits


def soft_loss(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy (nats a token) of logits (N, V) against the soft-max of a teacher's, both divided by a temperature.

    Times its square, so that gradients stay of the same size (https://arxiv.org/abs/1503.02531).
    """
    wanted = (teacher.float() / temperature).softmax(-1)
    return F.cross_entropy(student.float() / temperature, wanted) * temperature**2


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """``soft_loss`` less the teacher's own: KL(teacher || student), with the same gradients."""
    return soft_loss(student, teacher, temperature) - soft_loss(teacher, teacher, temperature)
