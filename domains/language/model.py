"""Language models: embedding, backbone, head; plain torch.

Shapes: B batch, L positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.domains.language.spec import LanguageSpec
from vertebra.domains.model import DomainModel
from vertebra.domains.targets import next_targets
from vertebra.errors import ShapeError


class LanguageEncoder(DomainModel):
    """Features of every token: a published model without its head.

    Args:
        backbone: Any.
        spec: Facts about the text.
    """

    task: ClassVar[str] = "language/embed"
    spec: LanguageSpec

    def __init__(self, backbone: Backbone, spec: LanguageSpec, **arguments: object) -> None:
        super().__init__(backbone, spec, **arguments)
        self.embed = nn.Embedding(spec.vocab_size, backbone.config.dim)
        nn.init.normal_(self.embed.weight, std=0.02)

    def forward(self, ids: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to features (B, L, D); arguments as in ``embed_positions``."""
        return self.embed_positions(ids, mask, segments)

    def embed_positions(self, ids: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to the backbone's features (B, L, D).

        Args:
            ids: Token ids, int.
            mask: Real positions, bool (B, L); None when all are.
            segments: Packed sequence of every position, int (B, L); None when a row is one sequence.

        Raises:
            ShapeError: Ids are no integers (B, L), or the mask is no bool of that shape.
        """
        name = type(self).__name__
        if ids.ndim != 2 or ids.is_floating_point():
            raise ShapeError(f"{name}: ids must be integers (B, L), got {ids.dtype} {tuple(ids.shape)}.")
        if mask is not None and (mask.shape != ids.shape or mask.dtype != torch.bool):
            raise ShapeError(
                f"{name}: mask must be bool {tuple(ids.shape)} (True = real position), got {mask.dtype} "
                f"{tuple(mask.shape)}."
            )
        return self.backbone(self.embed(ids.long()), mask, segments)


class LanguageModel(LanguageEncoder):
    """Logits of the next token.

    Args:
        backbone: Causal.
        spec: Facts about the text.
        tie: Whether the head shares its matrix with the embedding.
    """

    task: ClassVar[str] = "language/lm"

    def __init__(self, backbone: Backbone, spec: LanguageSpec, *, tie: bool = False) -> None:
        super().__init__(backbone, spec, tie=tie)
        self.tie = tie
        self.head = nn.Linear(backbone.config.dim, spec.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to logits (B, L, V); arguments as in ``embed_positions``."""
        return self.head(self.embed_positions(ids, mask, segments))

    def token_logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits (B, L, V), and the next token that each is asked for, where both are real.

        Args:
            batch: ``ids``, and ``mask`` and ``segments`` where there are some, as in ``embed_positions``.
        """
        ids, mask, segments = batch["ids"], batch.get("mask"), batch.get("segments")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        counted = real.clone()
        counted[:, 1:] &= real[:, :-1]  # behind padding on the left nothing is known
        return self(ids, mask, segments), next_targets(ids, counted, segments)
