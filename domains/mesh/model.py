"""The generators: a shape encoder before any causal backbone that writes the tokens of a mesh; plain torch.

MeshAnything V2 (https://arxiv.org/abs/2408.02555) and V1 (https://arxiv.org/abs/2406.10163, section 4.3): the latents
of the shape stand before the sequence, embeddings tell the two apart, and the kind of a token (which coordinate, of
which vertex) is embedded beside the token. The first token, the begin, is predicted from the last latent.

Shapes: B batch, N points, P condition tokens, L tokens of a mesh with begin and end, D width, V vocabulary with begin,
end and padding.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.domains.adapting import Adapter, by_name
from vertebra.domains.mesh.encoder import ShapeEncoder, ShapeEncoderConfig
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.targets import IGNORED
from vertebra.errors import ConfigError, ShapeError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.mesh import Ints, MeshGrammar, MeshTokenizer

BEGIN, END, PAD = 0, 1, 2
SPECIAL = 3
"""The tokenizer's ids, and its kinds, follow the begin, the end and padding."""


class ShapeGenerator(DomainModel, ABC):
    """What every generator of meshes has: the condition before the tokens, and a backbone that predicts the next.

    A subclass adds the parts ``head`` and, if it can be told a number of faces, ``face_embed``.

    Args:
        backbone: Causal.
        spec: Facts about the data.
        encoder: Fields of a ``ShapeEncoderConfig``; without ``width``, the backbone's.
        dropout: Share of the embedded tokens and of the condition that is zeroed in training.
        **arguments: The subclass's other constructor arguments.

    Raises:
        ConfigError: The backbone is not causal, or the spec's tokenizer is not one for meshes.
    """

    task: ClassVar[str] = "mesh/generate"
    spec: MeshSpec
    face_embed: nn.Embedding | None
    head: nn.Module

    def __init__(
        self,
        backbone: Backbone,
        spec: MeshSpec,
        *,
        encoder: ShapeEncoderConfig | Mapping[str, Any] | None,
        dropout: float,
        **arguments: Any,
    ) -> None:
        fields = dataclasses.asdict(encoder) if isinstance(encoder, ShapeEncoderConfig) else dict(encoder or {})
        super().__init__(backbone, spec, encoder=fields, dropout=dropout, **arguments)
        name = type(self).__name__
        if not backbone.config.causal:
            raise ConfigError(f"{name}: writes token after token and needs a causal backbone; set causal=true.")
        tokenizer = tokenizer_from_dict(spec.tokenizer)
        if not isinstance(tokenizer, MeshTokenizer):
            raise ConfigError(f"{name}: the tokenizer must be one for meshes, got {tokenizer!r}.")
        self.tokenizer = tokenizer
        width = backbone.config.dim
        known = {field.name for field in dataclasses.fields(ShapeEncoderConfig)}
        if wrong := sorted(fields.keys() - known):
            raise ConfigError(f"encoder has no setting {wrong[0]!r}; settings: {', '.join(sorted(known))}.")
        config = ShapeEncoderConfig(**{"width": width, **fields})
        self.encoder = ShapeEncoder(config)
        self.cond_head_proj = nn.Linear(config.width, width)
        # Michelangelo's latents go in twice where they have a bottleneck: before it and behind it.
        self.cond_proj = nn.Linear(config.width * (2 if config.bottleneck else 1), width)
        self.cond_embed = nn.Embedding(2, width)
        self.dropout = nn.Dropout(dropout)

    @property
    def prefix_length(self) -> int:
        """P, condition tokens before the begin."""
        return 1 + self.encoder.config.latents + (self.face_embed is not None)

    def forward(
        self, points: Tensor, ids: Tensor, kinds: Tensor, mask: Tensor, face_buckets: Tensor | None = None
    ) -> Tensor:
        """Map meshes to the logits of each of their tokens, given those before it.

        Args:
            points: Condition (B, N, 6): positions in [-1, 1] and unit normals.
            ids: Begin, tokens, end, padding; int (B, L).
            kinds: Kinds of the tokens, int (B, L).
            mask: What is not padding, bool (B, L).
            face_buckets: Ranges of face counts, as ``bucket_of`` gives them, int (B,); None for unknown.

        Returns:
            Logits (B, L, V); those at i are of token i.

        Raises:
            ShapeError: Shapes or types differ.
        """
        if ids.ndim != 2 or ids.shape != kinds.shape or ids.shape != mask.shape or len(ids) != len(points):
            raise ShapeError(
                f"{type(self).__name__}: ids, kinds and mask must all be (B, L) for B = {len(points)}, got "
                f"{tuple(ids.shape)}, {tuple(kinds.shape)} and {tuple(mask.shape)}."
            )
        prefix = self.condition(points, face_buckets)  # (B, P, D)
        tokens = self.embed_tokens(ids[:, :-1], kinds[:, :-1])  # the last is predicted, never read
        x = self.dropout(torch.cat([prefix, tokens], dim=1))  # (B, P + L - 1, D)
        real = torch.cat([mask.new_ones(prefix.shape[:2]), mask[:, :-1]], dim=1)
        y = self.backbone(x, None if bool(real.all()) else real)
        logits: Tensor = self.head(y[:, prefix.shape[1] - 1 :])  # (B, L, V)
        return logits

    def condition(self, points: Tensor, face_buckets: Tensor | None = None) -> Tensor:
        """Map points (B, N, 6) and ranges of face counts (B,) to the features (B, P, D) before the begin."""
        latents = self.encoder(points)  # (B, 1 + latents, width)
        body = latents[:, 1:]
        if self.encoder.config.bottleneck:
            body = torch.cat([body, self.encoder.decode_latents(latents)], dim=-1)
        parts = [self.cond_head_proj(latents[:, :1]), self.cond_proj(body)]
        if self.face_embed is not None:
            if face_buckets is None:
                face_buckets = torch.zeros(len(points), dtype=torch.long, device=points.device)
            parts.append(self.face_embed(face_buckets)[:, None])
        return torch.cat(parts, dim=1) + self.cond_embed.weight[0]

    def bucket_of(self, faces: int) -> int:
        """Return the range that a number of faces lies in; 0 stands for unknown.

        Raises:
            ConfigError: The model cannot be told.
        """
        if not self.spec.face_buckets:
            raise ConfigError(
                "faces: this model was trained without a face count; leave it out, or train one with data.face_buckets."
            )
        return 1 + bisect_left(self.spec.face_buckets, faces)

    @abstractmethod
    def embed_tokens(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """Map ids and kinds (B, L) to features (B, L, D)."""

    @abstractmethod
    def grammar(self) -> MeshGrammar:
        """Make the grammar of the tokens, begin and end not counted."""

    @abstractmethod
    def corners(self, tokens: Ints, points: Tensor | None = None, *, partial: bool = False) -> Ints:
        """Read the faces that tokens say, in their order.

        Args:
            tokens: (N,), without begin and end.
            points: Points of the shape (N, 6), for a model whose faces depend on it.
            partial: Take what is whole, even no face, where the limit ended the sequence.

        Returns:
            Cells of the corners (F, 3, 3).
        """

    def token_facts(self) -> dict[str, Any]:
        """Say what the tokens are, JSON-able."""
        return self.tokenizer.to_dict()


class MeshGenerator(ShapeGenerator):
    """Next tokens of a mesh, given points of its surface.

    Args:
        backbone: Causal.
        spec: Facts about the data.
        encoder: Fields of a ``ShapeEncoderConfig``; without ``width``, the backbone's.
        dropout: Share of the embedded tokens and of the condition that is zeroed in training.
        tie: Whether the head shares its matrix with the embedding.

    Raises:
        ConfigError: The backbone is not causal, or the spec's tokenizer is not one for meshes.
    """

    input_parts: ClassVar[tuple[str, ...]] = (
        "encoder", "cond_head_proj", "cond_proj", "cond_embed", "embed", "kind_embed", "face_embed",
    )  # fmt: skip
    head: nn.Linear

    def __init__(
        self,
        backbone: Backbone,
        spec: MeshSpec,
        *,
        encoder: ShapeEncoderConfig | Mapping[str, Any] | None = None,
        dropout: float = 0.0,
        tie: bool = False,
    ) -> None:
        super().__init__(backbone, spec, encoder=encoder, dropout=dropout, tie=tie)
        width, vocab = backbone.config.dim, SPECIAL + self.tokenizer.vocab_size
        self.embed = nn.Embedding(vocab, width)
        self.kind_embed = nn.Embedding(SPECIAL + self.tokenizer.num_kinds, width)
        self.face_embed = nn.Embedding(len(spec.face_buckets) + 2, width) if spec.face_buckets else None
        self.head = nn.Linear(width, vocab, bias=False)
        for module in (self.embed, self.kind_embed, self.cond_embed, self.face_embed, self.head):
            if module is not None:
                nn.init.normal_(module.weight, std=0.02)
        if tie:
            self.head.weight = self.embed.weight

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        tables = {f"{name}.weight" for name in ("embed", "kind_embed", "cond_embed")}
        tables |= {"face_embed.weight"} if self.face_embed is not None else set()
        return tables | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: other ranges of face counts."""
        if not isinstance(origin.spec, MeshSpec):
            return {}
        saved, own = (("unknown", *map(str, s.face_buckets), "more") for s in (origin.spec, self.spec))
        return {"face_embed.weight": by_name(saved, own, "ranges of faces")}

    def embed_tokens(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """As in ``ShapeGenerator``."""
        return self.embed(ids) + self.kind_embed(kinds) + self.cond_embed.weight[1]

    def token_logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits (B, L, V) of the tokens of meshes, and the tokens."""
        buckets = batch["face_buckets"] if self.spec.face_buckets else None
        ids, mask = batch["ids"], batch["mask"]
        return self(batch["points"], ids, batch["kinds"], mask, buckets), ids.masked_fill(~mask, IGNORED)

    def grammar(self) -> MeshGrammar:
        """As in ``ShapeGenerator``."""
        return self.tokenizer.grammar()

    def corners(self, tokens: Ints, points: Tensor | None = None, *, partial: bool = False) -> Ints:
        """As in ``ShapeGenerator``; the points do not count."""
        return self.tokenizer.triangles(tokens, partial=partial)
