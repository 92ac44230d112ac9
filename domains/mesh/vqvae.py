"""VQ-VAE of meshes: faces to nine tokens each and back, as in MeshAnything V1.

A face is read as its nine quantized coordinates; a bidirectional backbone gives it three vectors, one for each vertex.
The vectors of one vertex are averaged over its faces and quantized by a residual quantizer whose levels share a
codebook (MeshGPT, https://arxiv.org/abs/2311.15475, section 3.1). A second backbone reads the codes of the three
vertices of every face and classifies the coordinates. Both backbones are BERT's in MeshAnything
(https://arxiv.org/abs/2406.10163, sections 4.2 and 5.2). Its second stage makes the decoder resistant to the errors of
a generator: encoder and codebook are frozen, codes are drawn with noise, and the decoder sees the shape.

The paper's encoder was never published: how it embeds faces is ours. Its decoder sees padded faces; here none does.

Shapes: B batch, F faces, N vectors, V distinct vertices of a batch, P points of a shape, S its tokens, C width of
codes, L levels, K codes, D width of the backbones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.domains.mesh.encoder import ShapeEncoder, ShapeEncoderConfig
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.model import DomainModel
from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.mesh import MeshTokenizer

Stage = Literal[1, 2]

DISTANCES = 1 << 24
"""Distances between vectors and codes that are in memory at a time."""
WEIGHT_STD = 0.02
"""Standard deviation of fresh weights (BERT, https://arxiv.org/abs/1810.04805)."""


# ---------------------------------------------------------------- quantizer


class Quantized(NamedTuple):
    """Vectors as sums of codes.

    Args:
        vectors: Sums of codes (N, C), with the gradient of the vectors they stand for.
        ids: Code of every level, int64 (N, L).
        commitment: Squared distance of every level's input to its code: mean over N and C, sum over the levels.
    """

    vectors: Tensor
    ids: Tensor
    commitment: Tensor


class ResidualVQ(nn.Module):
    """Residual vector quantizer with one codebook for all levels.

    Each level takes the code nearest to what the levels before left. The gradient passes straight through
    (https://arxiv.org/abs/1711.00937, section 3.2). In training the codebook follows its vectors by an exponential
    moving average (the same, appendix A.1): a code is the ratio of two averages, of the sum of the vectors that chose
    it and of their number. A code that nobody has chosen for long begins anew at a vector drawn from the batch, and so
    do all codes in the first step.

    Args:
        dim: C.
        size: K.
        levels: L.
        decay: Of the averages, per step.
        patience: Steps without use after which a code begins anew.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    idle: Tensor

    def __init__(self, dim: int, size: int, levels: int, *, decay: float = 0.99, patience: int = 100) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("size", size), ("levels", levels), ("patience", patience)):
            if value < 1:
                raise ConfigError(f"ResidualVQ: {name} must be at least 1, got {value}.")
        if not 0 <= decay < 1:
            raise ConfigError(f"ResidualVQ: decay must be in [0, 1), got {decay}.")
        self.dim, self.size, self.levels, self.decay, self.patience = dim, size, levels, decay, patience
        self.register_buffer("codebook", torch.randn(size, dim))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, dim))
        self.register_buffer("idle", torch.full((size,), patience))  # steps since the last use

    def forward(self, x: Tensor, noise: float = 0.0) -> Quantized:
        """Quantize vectors x (N, C), and in training move the codebook towards them.

        Args:
            x: Vectors, at least one.
            noise: As in ``assign``.

        Raises:
            ShapeError: The vectors have another shape.
        """
        ids = self.assign(x, noise)
        codes = self.codebook[ids]  # (N, L, C)
        sums = codes.cumsum(1)
        rests = x.to(codes.dtype)[:, None] - (sums - codes)  # what each level was given
        commitment = (rests - codes).square().mean((0, 2)).sum()
        vectors = x + (sums[:, -1] - x).detach()
        if self.training:
            self._update(rests.detach().flatten(0, 1), ids.flatten())
        return Quantized(vectors, ids, commitment)

    @torch.no_grad()
    def assign(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """Map vectors x (N, C) to the codes of every level, int64 (N, L).

        Args:
            x: Vectors.
            noise: Scale of the Gumbel noise on the negative distances that the codes are chosen by: a code is drawn
                with a probability in proportion to exp(-distance / noise).

        Raises:
            ShapeError: The vectors have another shape, or there are none.
        """
        if x.ndim != 2 or x.shape[1] != self.dim or not len(x):
            raise ShapeError(f"ResidualVQ: x must be (N, {self.dim}) with at least one vector, got {tuple(x.shape)}.")
        found = []
        for rest in x.to(self.codebook.dtype).split(max(1, DISTANCES // self.size)):
            ids = []
            for _ in range(self.levels):
                scores = -torch.cdist(rest, self.codebook, compute_mode="use_mm_for_euclid_dist")  # (n, K)
                if noise:
                    scores -= noise * torch.empty_like(scores).exponential_().log_()
                ids.append(scores.argmax(-1))
                rest = rest - self.codebook[ids[-1]]
            found.append(torch.stack(ids, dim=1))
        return torch.cat(found)

    def lookup(self, ids: Tensor) -> Tensor:
        """Map codes (..., L) to the vectors (..., C) they stand for."""
        return self.codebook[ids].sum(-2)

    @torch.no_grad()
    def _update(self, x: Tensor, ids: Tensor) -> None:
        """Move the codebook towards vectors x (M, C) that chose the codes ids (M,)."""
        counts = torch.bincount(ids, minlength=self.size).to(self.counts.dtype)
        sums = torch.zeros_like(self.sums).index_add_(0, ids, x)
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized()
        if parallel:
            torch.distributed.all_reduce(counts)
            torch.distributed.all_reduce(sums)
        used = counts > 0
        self.counts.lerp_(counts, 1 - self.decay)
        self.sums.lerp_(sums, 1 - self.decay)
        self.codebook[used] = self.sums[used] / self.counts[used, None]
        self.idle.add_(1).masked_fill_(used, 0)
        dead = (self.idle >= self.patience).nonzero()[:, 0]
        if not len(dead):
            return
        few = len(dead) > len(x)
        rows = torch.randint(len(x), (len(dead),)) if few else torch.randperm(len(x))[: len(dead)]
        drawn = x[rows.to(x.device)]
        if parallel:
            torch.distributed.broadcast(drawn, 0)
        # As if the vector drawn had been the first to choose the code.
        self.codebook[dead], self.sums[dead], self.counts[dead] = drawn, (1 - self.decay) * drawn, 1 - self.decay
        self.idle[dead] = 0


# ---------------------------------------------------------------- encoder and decoder


class FaceEmbedding(nn.Module):
    """Faces to the width of a backbone.

    Args:
        bins: Values of a coordinate.
        embed_dim: Width of a coordinate's embedding.
        dim: D.
        max_faces: Most faces of a mesh.
    """

    def __init__(self, bins: int, embed_dim: int, dim: int, max_faces: int) -> None:
        super().__init__()
        self.coordinates = nn.Embedding(bins, embed_dim)
        self.proj = nn.Linear(9 * embed_dim, dim)
        self.positions = nn.Embedding(max_faces, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, faces: Tensor) -> Tensor:
        """Map faces (B, F, 3, 3) to features (B, F, D)."""
        x = self.proj(self.coordinates(faces).flatten(2))
        return self.norm(x + self.positions.weight[: x.shape[1]])


class FaceDecoder(nn.Module):
    """Vectors of the vertices of faces to logits of their coordinates, with a shape in front where there is one.

    Args:
        backbone: Bidirectional.
        bins: Values of a coordinate.
        code_dim: C.
        max_faces: Most faces of a mesh.
        condition_tokens: S, tokens of a shape; 0 for a decoder that sees none.
        condition_width: Their width.
        sees_padding: Whether real faces see the padded ones, which say nothing but where they are, as in MeshAnything.
    """

    def __init__(
        self,
        backbone: Backbone,
        bins: int,
        code_dim: int,
        max_faces: int,
        condition_tokens: int = 0,
        condition_width: int = 0,
        sees_padding: bool = False,
    ) -> None:
        super().__init__()
        dim = backbone.config.dim
        self.sees_padding = sees_padding
        self.proj = nn.Linear(3 * code_dim, dim)
        self.positions = nn.Embedding(max_faces, dim)
        self.norm = nn.LayerNorm(dim)
        self.condition = ConditionEmbedding(condition_tokens, condition_width, dim) if condition_tokens else None
        self.backbone = backbone
        self.head = nn.Linear(dim, 9 * bins)

    def forward(self, codes: Tensor, mask: Tensor, condition: Tensor | None = None) -> Tensor:
        """Map codes (B, F, 3, C), their mask (B, F) and a shape (B, S, width) to logits (B, F, 3, 3, bins)."""
        x = self.proj(codes.flatten(2)).masked_fill(~mask[..., None], 0)  # (B, F, D)
        x = self.norm(x + self.positions.weight[: x.shape[1]])
        if condition is not None:
            assert self.condition is not None
            x = torch.cat([self.condition(condition), x], dim=1)  # (B, S + F, D)
            mask = F.pad(mask, (condition.shape[1], 0), value=True)
        x = self.backbone(x, None if self.sees_padding else mask)[:, -codes.shape[1] :]
        return self.head(x).unflatten(-1, (3, 3, -1))


class ConditionEmbedding(nn.Module):
    """Tokens of a shape encoder to the width of a backbone; the first has a projection of its own.

    Args:
        tokens: S.
        width: Of the tokens.
        dim: D.
    """

    def __init__(self, tokens: int, width: int, dim: int) -> None:
        super().__init__()
        self.head_proj = nn.Linear(width, dim)
        self.proj = nn.Linear(width, dim)
        self.positions = nn.Embedding(tokens, dim)
        self.norm = nn.LayerNorm(dim)

    def forward(self, condition: Tensor) -> Tensor:
        """Map tokens (B, S, width) to (B, S, D)."""
        x = torch.cat([self.head_proj(condition[:, :1]), self.proj(condition[:, 1:])], dim=1)
        return self.norm(x + self.positions.weight)


# ---------------------------------------------------------------- model


class Reconstruction(NamedTuple):
    """Losses of a batch, scalars, and what came back of it.

    Args:
        total: What to minimise.
        reconstruction: Cross-entropy of a coordinate in nats, mean over real faces.
        commitment: See ``Quantized``, not weighted.
        faces: Likeliest coordinates, int64 (B, F, 3, 3), -1 at padding.
        ids: Tokens they were read from, int64 (B, F * tokens_per_face), -1 at padding.
    """

    total: Tensor
    reconstruction: Tensor
    commitment: Tensor
    faces: Tensor
    ids: Tensor


class MeshVQVAE(DomainModel):
    """Faces to tokens and back; the tokens of a face are the levels of its first vertex, then of the second and third.

    In stage 1 encoder, codebook and decoder learn. In stage 2 encoder and codebook stay as they are, in training too;
    the decoder learns on, and so does what it sees of the shape.

    The defaults are the paper's. Its backbones are ``OPTConfig(dim=768, depth=6, heads=12, hidden=3072, causal=False,
    norm_first=False, activation="gelu", positions="none", dropout=0.1)``.

    Args:
        backbone: The encoder's, bidirectional; the decoder gets a fresh one of the same config.
        spec: Facts about the data; the tokenizer's grid and ``max_faces`` count.
        codebook_size: K.
        code_dim: C.
        levels: L; 3 L tokens a face.
        embed_dim: Width of a coordinate's embedding (64 in MeshGPT).
        shape_encoder: Fields of a ``ShapeEncoderConfig``, without ``width`` as wide as the backbone: the decoder sees
            its tokens in stage 2. None for a decoder that sees no shape.
        commitment_weight: Of the commitment loss in the total.
        decay: See ``ResidualVQ``.
        patience: See ``ResidualVQ``.
        stage: 1 or 2.

    Raises:
        ConfigError: A setting is impossible, the backbone causal, or the spec's tokenizer not one for meshes.
    """

    task: ClassVar[str] = "mesh/vqvae"
    input_parts: ClassVar[tuple[str, ...]] = ("embed",)
    spec: MeshSpec

    def __init__(
        self,
        backbone: Backbone,
        spec: MeshSpec,
        *,
        codebook_size: int = 8192,
        code_dim: int = 1024,
        levels: int = 3,
        embed_dim: int = 64,
        shape_encoder: ShapeEncoderConfig | Mapping[str, Any] | None = None,
        commitment_weight: float = 0.1,
        decay: float = 0.99,
        patience: int = 100,
        stage: Stage = 1,
    ) -> None:
        fields = dataclasses.asdict(shape_encoder) if isinstance(shape_encoder, ShapeEncoderConfig) else shape_encoder
        super().__init__(
            backbone,
            spec,
            codebook_size=codebook_size,
            code_dim=code_dim,
            levels=levels,
            embed_dim=embed_dim,
            shape_encoder=None if fields is None else dict(fields),
            commitment_weight=commitment_weight,
            decay=decay,
            patience=patience,
            stage=stage,
        )
        if embed_dim < 1:
            raise ConfigError(f"MeshVQVAE: embed_dim must be at least 1, got {embed_dim}.")
        if stage not in (1, 2):
            raise ConfigError(f"MeshVQVAE: stage must be 1 or 2, got {stage!r}.")
        if backbone.config.causal:
            raise ConfigError("MeshVQVAE: reads faces both ways and needs a bidirectional backbone; set causal=false.")
        tokenizer = tokenizer_from_dict(spec.tokenizer)
        if not isinstance(tokenizer, MeshTokenizer):
            raise ConfigError(f"MeshVQVAE: the tokenizer must be one for meshes, got {tokenizer!r}.")
        dim, faces = backbone.config.dim, spec.max_faces
        self.bins, self.commitment_weight, self.stage = tokenizer.bins, commitment_weight, stage
        self.embed = FaceEmbedding(self.bins, embed_dim, dim, faces)
        self.vertex_head = nn.Linear(dim, 3 * code_dim)
        self.quantizer = ResidualVQ(code_dim, codebook_size, levels, decay=decay, patience=patience)
        shape = None if fields is None else _shape_config(fields, dim)
        tokens, width = (1 + shape.latents, shape.width) if shape else (0, 0)
        self.decoder = FaceDecoder(backbone.config.build(), self.bins, code_dim, faces, tokens, width)
        self.init_weights()
        self.shape = ShapeEncoder(shape) if shape else None
        for part in self._idle_parts():
            part.requires_grad_(False)
        self.train()

    @property
    def tokens_per_face(self) -> int:
        """Tokens of a face."""
        return 3 * self.quantizer.levels

    @property
    def sees_shape(self) -> bool:
        """Whether the decoder must be given points of the shape."""
        return self.stage == 2 and self.shape is not None

    def init_weights(self) -> None:
        """Draw fresh weights of everything but the backbones and the shape encoder.

        | parameter | distribution |
        | --- | --- |
        | embedding of coordinates | normal, std 1 |
        | weights of projections, positions | normal, std 0.02 |
        | biases | 0 |
        | norms | 1 |
        """
        inside = {id(m) for backbone in (self.backbone, self.decoder.backbone) for m in backbone.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and id(module) not in inside:
                nn.init.normal_(module.weight, std=1.0 if module is self.embed.coordinates else WEIGHT_STD)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)

    def _idle_parts(self) -> list[nn.Module]:
        """What does not learn in this stage."""
        if self.stage == 2:
            return [self.embed, self.backbone, self.vertex_head, self.quantizer]
        return [part for part in (self.shape, self.decoder.condition) if part is not None]

    def train(self, mode: bool = True) -> MeshVQVAE:
        """Set training or evaluation; what stage 2 keeps stays in evaluation."""
        super().train(mode)
        if self.stage == 2:
            for part in self._idle_parts():
                part.eval()
        return self

    def forward(
        self, faces: Tensor, mask: Tensor | None = None, points: Tensor | None = None, noise: float = 0.0
    ) -> Reconstruction:
        """Encode and decode faces.

        Args:
            faces: Bins of the coordinates, int64 (B, F, 3, 3); what stands at padding means nothing.
            mask: Real faces, bool (B, F); None when all are.
            points: Points of the shape with normals (B, P, 6) for a decoder that sees it, in stage 2; else None.
            noise: Scale of the noise on the choice of codes, see ``ResidualVQ.assign``.

        Raises:
            ShapeError: A shape is another, no face is real, or the points are missing or not wanted.
            DataError: A coordinate is not one of the bins.
        """
        mask = self._check_faces(faces, mask)
        condition = self._condition(points, len(faces))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 1):
            vectors, owners = self._encode(faces, mask)
            quantized = self.quantizer(vectors, noise)
        codes = vectors.new_zeros(*mask.shape, 3, vectors.shape[-1])
        codes[mask] = quantized.vectors[owners]  # (B, F, 3, C)
        logits, truth = self.decoder(codes, mask, condition)[mask], faces[mask]
        reconstruction = F.cross_entropy(logits.flatten(0, 2), truth.flatten())
        total = reconstruction + (self.commitment_weight * quantized.commitment if self.stage == 1 else 0)
        found = torch.full_like(faces, -1)
        found[mask] = logits.detach().argmax(-1)
        return Reconstruction(
            total, reconstruction, quantized.commitment, found, self._tokens(quantized.ids[owners], mask)
        )

    @torch.no_grad()
    def encode_ids(self, faces: Tensor, mask: Tensor | None = None, noise: float = 0.0) -> Tensor:
        """Map faces to tokens.

        Args:
            faces: As in ``forward``.
            mask: As in ``forward``.
            noise: As in ``forward``.

        Returns:
            int64 (B, F * tokens_per_face), -1 at padding.
        """
        mask = self._check_faces(faces, mask)
        vectors, owners = self._encode(faces, mask)
        return self._tokens(self.quantizer.assign(vectors, noise)[owners], mask)

    def decode_ids(self, ids: Tensor, mask: Tensor | None = None, points: Tensor | None = None) -> Tensor:
        """Map tokens to logits of the coordinates.

        Args:
            ids: int64 (B, F * tokens_per_face); what stands at padding means nothing.
            mask: Real faces, bool (B, F); None when all are.
            points: As in ``forward``.

        Returns:
            (B, F, 3, 3, bins): face, vertex, axis, bin.

        Raises:
            ShapeError: A shape is another, or the faces are not whole.
            DataError: A token is not one of the codes.
        """
        if ids.ndim != 2 or ids.shape[1] % self.tokens_per_face:
            raise ShapeError(
                f"MeshVQVAE: ids must be (B, F * {self.tokens_per_face}), whole faces, got {tuple(ids.shape)}."
            )
        ids = ids.unflatten(1, (-1, 3, self.quantizer.levels))  # (B, F, 3, L)
        mask = self._check_mask(mask, ids)
        condition = self._condition(points, len(ids))
        ids = ids.masked_fill(~mask[..., None, None], 0)
        _check_range("ids", ids, self.quantizer.size)
        return self.decoder(self.quantizer.lookup(ids), mask, condition)

    @torch.no_grad()
    def decode_faces(self, ids: Tensor, mask: Tensor | None = None, points: Tensor | None = None) -> Tensor:
        """Map tokens to the likeliest coordinates, int64 (B, F, 3, 3), -1 at padding; see ``decode_ids``."""
        faces = self.decode_ids(ids, mask, points).argmax(-1)
        return faces if mask is None else faces.masked_fill(~mask[..., None, None], -1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        names = {name for name, _ in self.named_parameters() if name.endswith(".positions.weight")}
        names = {name for name in names if not name.startswith("backbone.")} | {"embed.coordinates.weight"}
        names |= {f"decoder.backbone.{name}" for name in self.decoder.backbone.no_weight_decay()}
        return names | ({f"shape.{name}" for name in self.shape.no_weight_decay()} if self.shape else set())

    def _encode(self, faces: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return one vector for every distinct vertex (V, C), and which belongs to each corner (real faces, 3)."""
        x = self.embed(faces.masked_fill(~mask[..., None, None], 0))  # (B, F, D)
        features = self.vertex_head(self.backbone(x, mask)[mask])  # (real faces, 3 C)
        features = features.unflatten(-1, (3, -1)).flatten(0, 1).float()  # (corners of real faces, C)
        item = torch.arange(len(faces), device=faces.device)[:, None, None].expand(*mask.shape, 3)[mask]
        place = faces[mask]  # (real faces, 3, 3)
        key = ((item * self.bins + place[..., 0]) * self.bins + place[..., 1]) * self.bins + place[..., 2]
        distinct, owners = key.unique(return_inverse=True)
        sums = features.new_zeros(len(distinct), features.shape[1]).index_add(0, owners.flatten(), features)
        return sums / torch.bincount(owners.flatten())[:, None], owners

    def _tokens(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Put the codes (real faces, 3, L) in their places (B, F * tokens_per_face), with -1 at padding."""
        found = ids.new_full((*mask.shape, 3, self.quantizer.levels), -1)
        found[mask] = ids
        return found.flatten(1)

    def _condition(self, points: Tensor | None, batch: int) -> Tensor | None:
        """Return the tokens of the shape (B, S, width), None for a decoder that sees none."""
        if self.sees_shape != (points is not None) or (points is not None and len(points) != batch):
            due = f"({batch}, P, 6)" if self.sees_shape else None
            got = None if points is None else tuple(points.shape)
            kind = "with" if self.shape else "without"
            raise ShapeError(
                f"MeshVQVAE: points must be {due} in stage {self.stage} {kind} shape_encoder, got {got}; the shape is "
                "seen in stage 2 alone."
            )
        return None if points is None or self.shape is None else self.shape(points)

    def _check_faces(self, faces: Tensor, mask: Tensor | None) -> Tensor:
        if faces.ndim != 4 or faces.shape[2:] != (3, 3) or faces.dtype != torch.int64:
            raise ShapeError(f"MeshVQVAE: faces must be int64 (B, F, 3, 3), got {faces.dtype} {tuple(faces.shape)}.")
        mask = self._check_mask(mask, faces)
        _check_range("faces", faces[mask], self.bins)
        return mask

    def _check_mask(self, mask: Tensor | None, given: Tensor) -> Tensor:
        shape = given.shape[:2]
        if shape[1] > self.spec.max_faces:
            raise ShapeError(
                f"MeshVQVAE: a mesh of {shape[1]} faces is larger than max_faces={self.spec.max_faces}; raise "
                "data.rules.max_faces, or leave the mesh out."
            )
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=given.device)
        if mask.shape != shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"MeshVQVAE: mask must be bool {tuple(shape)} (True = real face), got {mask.dtype} {tuple(mask.shape)}."
            )
        if not mask.any():
            raise ShapeError("MeshVQVAE: no face of the batch is real; leave empty meshes out.")
        return mask


def _shape_config(fields: Mapping[str, Any], width: int) -> ShapeEncoderConfig:
    known = {field.name for field in dataclasses.fields(ShapeEncoderConfig)}
    if wrong := sorted(fields.keys() - known):
        raise ConfigError(f"shape_encoder has no setting {wrong[0]!r}; settings: {', '.join(sorted(known))}.")
    config = ShapeEncoderConfig(**{"width": width, **fields})
    if config.bottleneck:
        raise ConfigError(
            f"shape_encoder: bottleneck must be 0, got {config.bottleneck}: the decoder sees the latents before it."
        )
    return config


def _check_range(name: str, values: Tensor, count: int) -> None:
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= count:
        raise DataError(f"MeshVQVAE: {name} must be from 0 to {count - 1}, got {low} to {high}; use the model's own.")
