"""VQ-VAE of meshes: faces to nine tokens each and back, as in MeshAnything V1.

A face is read as its nine quantized coordinates; a bidirectional backbone gives it three vectors, one for each vertex.
The vectors of one vertex are averaged over its faces and quantized by a residual quantizer whose levels share a
codebook (MeshGPT, https://arxiv.org/abs/2311.15475, section 3.1). A second backbone reads the codes of the three
vertices of every face and classifies the coordinates. Both backbones are BERT's in MeshAnything
(https://arxiv.org/abs/2406.10163, sections 4.2 and 5.2). Its second stage makes the decoder resistant to the errors of
a generator: encoder and codebook are frozen, codes are drawn with noise, and the decoder sees the shape.

The paper's encoder was never published: how it embeds faces is ours. Its decoder sees padded faces; here none does.

Shapes: B batch, F faces, N vectors, V distinct vertices of a batch, C width of codes, L levels, K codes, D width of the
backbones, S tokens of the shape.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, BackboneConfig, create_backbone
from vertebra.errors import ConfigError, DataError, ShapeError

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


class FaceEncoder(nn.Module):
    """Faces to one vector for each of their vertices.

    Args:
        backbone: Bidirectional.
        bins: Values of a coordinate.
        embed_dim: Width of a coordinate's embedding.
        code_dim: C.
        max_faces: Most faces of a mesh.
    """

    def __init__(self, backbone: Backbone, bins: int, embed_dim: int, code_dim: int, max_faces: int) -> None:
        super().__init__()
        dim = backbone.config.dim
        self.embed = nn.Embedding(bins, embed_dim)
        self.proj = nn.Linear(9 * embed_dim, dim)
        self.positions = nn.Embedding(max_faces, dim)
        self.norm = nn.LayerNorm(dim)
        self.backbone = backbone
        self.head = nn.Linear(dim, 3 * code_dim)

    def forward(self, faces: Tensor, mask: Tensor) -> Tensor:
        """Map faces (B, F, 3, 3) and their mask (B, F) to vectors (B, F, 3, C)."""
        x = self.proj(self.embed(faces).flatten(2))  # (B, F, D)
        x = self.norm(x + self.positions.weight[: x.shape[1]])
        return self.head(self.backbone(x, mask)).unflatten(-1, (3, -1))


class FaceDecoder(nn.Module):
    """Vectors of the vertices of faces to logits of their coordinates, with a shape in front where there is one.

    Args:
        backbone: Bidirectional.
        bins: Values of a coordinate.
        code_dim: C.
        max_faces: Most faces of a mesh.
        condition_tokens: S, tokens of a shape; 0 for a decoder that sees none.
        condition_width: Their width.
    """

    def __init__(
        self,
        backbone: Backbone,
        bins: int,
        code_dim: int,
        max_faces: int,
        condition_tokens: int = 0,
        condition_width: int = 0,
    ) -> None:
        super().__init__()
        dim = backbone.config.dim
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
        x = self.backbone(x, mask)[:, -codes.shape[1] :]
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


class VQVAELosses(NamedTuple):
    """Losses of a batch, and how much of it came back; scalars.

    Args:
        total: What to minimise.
        reconstruction: Cross-entropy of a coordinate in nats, mean over real faces.
        commitment: See ``Quantized``, not weighted.
        accuracy: Share of coordinates that came back, without gradient.
    """

    total: Tensor
    reconstruction: Tensor
    commitment: Tensor
    accuracy: Tensor


class MeshVQVAE(nn.Module):
    """Faces to tokens and back; the tokens of a face are the levels of its first vertex, then of the second and third.

    The defaults are the paper's. Its backbones are ``OPTConfig(dim=768, depth=6, heads=12, hidden=3072, causal=False,
    norm_first=False, activation="gelu", positions="none", dropout=0.1)``.

    Args:
        backbone: Bidirectional; the decoder gets a fresh one of the same config.
        bins: Values of a coordinate.
        codebook_size: K.
        code_dim: C.
        levels: L; 3 L tokens a face.
        max_faces: Most faces of a mesh.
        embed_dim: Width of a coordinate's embedding (64 in MeshGPT).
        condition_tokens: S, tokens of the shape that the decoder sees in stage 2; 0 for none.
        condition_width: Their width.
        commitment_weight: Of the commitment loss in the total.
        decay: See ``ResidualVQ``.
        patience: See ``ResidualVQ``.

    Attributes:
        stage: 1 or 2, see ``set_stage``.
    """

    def __init__(
        self,
        backbone: Backbone | BackboneConfig | str,
        *,
        bins: int = 128,
        codebook_size: int = 8192,
        code_dim: int = 1024,
        levels: int = 3,
        max_faces: int = 800,
        embed_dim: int = 64,
        condition_tokens: int = 0,
        condition_width: int = 0,
        commitment_weight: float = 0.1,
        decay: float = 0.99,
        patience: int = 100,
    ) -> None:
        super().__init__()
        for name, value in (("bins", bins), ("max_faces", max_faces), ("embed_dim", embed_dim)):
            if value < 1:
                raise ConfigError(f"MeshVQVAE: {name} must be at least 1, got {value}.")
        if min(condition_tokens, condition_width) < 0 or bool(condition_tokens) != bool(condition_width):
            raise ConfigError(
                "MeshVQVAE: condition_tokens and condition_width must both be positive, or both 0 for a decoder that "
                f"sees no shape, got {condition_tokens} and {condition_width}."
            )
        own = backbone if isinstance(backbone, Backbone) else create_backbone(backbone)
        if own.config.causal:
            raise ConfigError("MeshVQVAE: the backbone must be bidirectional, got causal=True; set causal=False.")
        self.bins, self.max_faces, self.commitment_weight = bins, max_faces, commitment_weight
        self.condition_tokens, self.condition_width = condition_tokens, condition_width
        self.encoder = FaceEncoder(own, bins, embed_dim, code_dim, max_faces)
        self.quantizer = ResidualVQ(code_dim, codebook_size, levels, decay=decay, patience=patience)
        self.decoder = FaceDecoder(own.config.build(), bins, code_dim, max_faces, condition_tokens, condition_width)
        self.init_weights()
        self.set_stage(1)

    @property
    def tokens_per_face(self) -> int:
        """Tokens of a face."""
        return 3 * self.quantizer.levels

    def init_weights(self) -> None:
        """Draw fresh weights of everything but the backbones.

        | parameter | distribution |
        | --- | --- |
        | embedding of coordinates | normal, std 1 |
        | weights of projections, positions | normal, std 0.02 |
        | biases | 0 |
        | norms | 1 |
        """
        inside = {id(m) for part in (self.encoder, self.decoder) for m in part.backbone.modules()}
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding) and id(module) not in inside:
                nn.init.normal_(module.weight, std=1.0 if module is self.encoder.embed else WEIGHT_STD)
                if isinstance(module, nn.Linear):
                    nn.init.zeros_(module.bias)

    def set_stage(self, stage: Stage) -> None:
        """Say what learns: in stage 1 all but the decoder's view of the shape, in stage 2 the decoder alone.

        In stage 2 encoder and codebook stay as they are, in training too. The stage is not among the weights: a model
        is made in stage 1. Set it before an optimizer or a parallel wrapper looks at what learns.
        """
        if stage not in (1, 2):
            raise ConfigError(f"MeshVQVAE: stage must be 1 or 2, got {stage!r}.")
        self.stage: Stage = stage
        self.encoder.requires_grad_(stage == 1)
        if self.decoder.condition is not None:
            self.decoder.condition.requires_grad_(stage == 2)
        self.train(self.training)

    def train(self, mode: bool = True) -> MeshVQVAE:
        """Set training or evaluation; what is frozen stays in evaluation."""
        super().train(mode)
        if self.stage == 2:
            self.encoder.eval()
            self.quantizer.eval()
        return self

    def forward(
        self, faces: Tensor, mask: Tensor | None = None, condition: Tensor | None = None, noise: float = 0.0
    ) -> VQVAELosses:
        """Encode and decode faces.

        Args:
            faces: Bins of the coordinates, int64 (B, F, 3, 3); what stands at padding means nothing.
            mask: Real faces, bool (B, F); None when all are.
            condition: Tokens of the shape (B, S, width) in stage 2 of a decoder that sees it, else None.
            noise: Scale of the noise on the choice of codes, see ``ResidualVQ.assign``.

        Raises:
            ShapeError: A shape is another, no face is real, or the condition is missing or not wanted.
            DataError: A coordinate is not one of the bins.
        """
        mask = self._check_faces(faces, mask)
        self._check_condition(condition, len(faces))
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.stage == 1):
            vectors, owners = self._encode(faces, mask)
            quantized = self.quantizer(vectors, noise)
        codes = vectors.new_zeros(*mask.shape, 3, vectors.shape[-1])
        codes[mask] = quantized.vectors[owners]  # (B, F, 3, C)
        logits, truth = self.decoder(codes, mask, condition)[mask], faces[mask]
        reconstruction = F.cross_entropy(logits.flatten(0, 2), truth.flatten())
        total = reconstruction + (self.commitment_weight * quantized.commitment if self.stage == 1 else 0)
        accuracy = (logits.detach().argmax(-1) == truth).float().mean()
        return VQVAELosses(total, reconstruction, quantized.commitment, accuracy)

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
        ids = torch.full((*mask.shape, 3, self.quantizer.levels), -1, device=faces.device)
        ids[mask] = self.quantizer.assign(vectors, noise)[owners]
        return ids.flatten(1)

    def decode_ids(self, ids: Tensor, mask: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Map tokens to logits of the coordinates.

        Args:
            ids: int64 (B, F * tokens_per_face); what stands at padding means nothing.
            mask: Real faces, bool (B, F); None when all are.
            condition: As in ``forward``.

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
        self._check_condition(condition, len(ids))
        ids = ids.masked_fill(~mask[..., None, None], 0)
        _check_range("ids", ids, self.quantizer.size)
        return self.decoder(self.quantizer.lookup(ids), mask, condition)

    @torch.no_grad()
    def decode_faces(self, ids: Tensor, mask: Tensor | None = None, condition: Tensor | None = None) -> Tensor:
        """Map tokens to the likeliest coordinates, int64 (B, F, 3, 3), -1 at padding; see ``decode_ids``."""
        faces = self.decode_ids(ids, mask, condition).argmax(-1)
        return faces if mask is None else faces.masked_fill(~mask[..., None, None], -1)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters with two or more axes that weight decay must leave alone."""
        names = {name for name, _ in self.named_parameters() if name.endswith(".positions.weight")}
        for part in ("encoder", "decoder"):
            backbone = getattr(self, part).backbone
            names |= {f"{part}.backbone.{name}" for name in backbone.no_weight_decay()}
        return names

    def _encode(self, faces: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return one vector for every distinct vertex (V, C), and which belongs to each corner (real faces, 3)."""
        features = self.encoder(faces.masked_fill(~mask[..., None, None], 0), mask)
        features = features[mask].flatten(0, 1).float()  # (corners of real faces, C)
        item = torch.arange(len(faces), device=faces.device)[:, None, None].expand(*mask.shape, 3)[mask]
        place = faces[mask]  # (real faces, 3, 3)
        key = ((item * self.bins + place[..., 0]) * self.bins + place[..., 1]) * self.bins + place[..., 2]
        distinct, owners = key.unique(return_inverse=True)
        sums = features.new_zeros(len(distinct), features.shape[1]).index_add(0, owners.flatten(), features)
        return sums / torch.bincount(owners.flatten())[:, None], owners

    def _check_faces(self, faces: Tensor, mask: Tensor | None) -> Tensor:
        if faces.ndim != 4 or faces.shape[2:] != (3, 3) or faces.dtype != torch.int64:
            raise ShapeError(f"MeshVQVAE: faces must be int64 (B, F, 3, 3), got {faces.dtype} {tuple(faces.shape)}.")
        mask = self._check_mask(mask, faces)
        _check_range("faces", faces[mask], self.bins)
        return mask

    def _check_mask(self, mask: Tensor | None, given: Tensor) -> Tensor:
        shape = given.shape[:2]
        if shape[1] > self.max_faces:
            raise ShapeError(
                f"MeshVQVAE: a mesh of {shape[1]} faces is larger than max_faces={self.max_faces}; build the model "
                "with more, or leave the mesh out."
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

    def _check_condition(self, condition: Tensor | None, batch: int) -> None:
        seen = self.stage == 2 and self.condition_tokens > 0
        due = (batch, self.condition_tokens, self.condition_width) if seen else None
        got = None if condition is None else tuple(condition.shape)
        if got != due:
            raise ShapeError(
                f"MeshVQVAE: condition must be {due} in stage {self.stage} with "
                f"condition_tokens={self.condition_tokens}, got {got}; see set_stage."
            )


def _check_range(name: str, values: Tensor, count: int) -> None:
    low, high = (int(v) for v in values.aminmax())
    if low < 0 or high >= count:
        raise DataError(f"MeshVQVAE: {name} must be from 0 to {count - 1}, got {low} to {high}; use the model's own.")
