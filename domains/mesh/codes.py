"""The generator whose tokens are codes of a VQ-VAE of faces, as in MeshAnything V1; plain torch.

A face is ``3 * levels`` codes, those of its three vertices, level after level. The backbone reads a code as the
projection of its vector in the frozen codebook. When a mesh is written, the decoder of the VQ-VAE reads the sums of the
codes, with the latents of the shape in front, and says the coordinates: it learned to mend what the generator gets
wrong (https://arxiv.org/abs/2406.10163, sections 4.2 and 4.3). It always reads ``max_faces`` faces; those that were not
written say nothing but where they are, as in the released model. The encoder of faces was never released, so that this
model writes meshes but cannot read any.

Shapes: B batch, N points, S tokens of a shape, L ids of a mesh with begin and end, F faces, M levels, K codes, C their
width, D width of the backbone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, BackboneConfig
from vertebra.backbones.decoding import Strategy
from vertebra.domains.mesh.encoder import ShapeEncoderConfig
from vertebra.domains.mesh.generation import GREEDY, decoder_of, write_ids
from vertebra.domains.mesh.model import SPECIAL, ShapeGenerator
from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.mesh.vqvae import WEIGHT_STD, FaceDecoder
from vertebra.errors import ConfigError, DataError, ShapeError
from vertebra.tokenizers.mesh import Ints, MeshGrammar, dequantize


class CodeGrammar(MeshGrammar):
    """Whole faces, one at least: any code may follow any, and the end may come behind a face.

    Kinds: the code's place in its face.

    Args:
        codes: K.
        per_face: Codes of a face.
    """

    def __init__(self, codes: int, per_face: int) -> None:
        states = np.arange(per_face + 1)  # the last is that between faces: as 0, but the end may come
        allowed = np.ones((per_face + 1, codes + 1), dtype=bool)
        allowed[:-1, -1] = False
        places = states % per_face
        following = np.repeat(places[:, None] + 1, codes, axis=1)
        super().__init__(allowed, following, np.repeat(places[:, None], codes, axis=1))


class MeshCodeGenerator(ShapeGenerator):
    """Next codes of a mesh, given points of its surface, and the faces that codes stand for.

    Only the generator learns: codebook and decoder are those of a VQ-VAE that learned before.

    Args:
        backbone: Causal.
        spec: Facts about the data; of the tokenizer only the grid counts.
        decoder: Config of the decoder's backbone, as ``BackboneConfig.to_dict`` describes it; bidirectional.
        encoder: Fields of a ``ShapeEncoderConfig``; without ``width``, the backbone's.
        codebook_size: K.
        code_dim: C.
        levels: M.
        face_positions: Faces that the decoder has a learned position for; None for ``spec.max_faces``.
        dropout: Share of the embedded tokens and of the condition that is zeroed in training.

    Raises:
        ConfigError: A backbone looks the wrong way, or the limits of spec and decoder do not go together.
    """

    input_parts: ClassVar[tuple[str, ...]] = (
        "encoder", "cond_head_proj", "cond_proj", "cond_embed", "special_embed", "code_proj", "kind_embed",
    )  # fmt: skip
    head: nn.Linear
    codebook: Tensor

    def __init__(
        self,
        backbone: Backbone,
        spec: MeshSpec,
        *,
        decoder: BackboneConfig | Mapping[str, Any],
        encoder: ShapeEncoderConfig | Mapping[str, Any] | None = None,
        codebook_size: int = 8192,
        code_dim: int = 1024,
        levels: int = 3,
        face_positions: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        config = decoder if isinstance(decoder, BackboneConfig) else BackboneConfig.from_dict(dict(decoder))
        places = spec.max_faces if face_positions is None else face_positions
        super().__init__(
            backbone,
            spec,
            encoder=encoder,
            dropout=dropout,
            decoder=config.to_dict(),
            codebook_size=codebook_size,
            code_dim=code_dim,
            levels=levels,
            face_positions=places,
        )
        for name, value in (("codebook_size", codebook_size), ("code_dim", code_dim), ("levels", levels)):
            if value < 1:
                raise ConfigError(f"MeshCodeGenerator: {name} must be at least 1, got {value}.")
        if config.causal:
            raise ConfigError("MeshCodeGenerator: the decoder reads faces both ways; set causal=false in its config.")
        if spec.max_faces > places:
            raise ConfigError(
                f"MeshCodeGenerator: the decoder has positions for {places} faces, fewer than the spec's "
                f"max_faces={spec.max_faces}; lower it."
            )
        if spec.face_buckets:
            raise ConfigError("MeshCodeGenerator: cannot be told a number of faces; leave face_buckets empty.")
        if spec.max_tokens > 3 * levels * spec.max_faces:
            raise ConfigError(
                f"MeshCodeGenerator: max_tokens={spec.max_tokens} are more than max_faces={spec.max_faces} faces of "
                f"{3 * levels} codes; lower it."
            )
        width = backbone.config.dim
        self.levels = levels
        self.face_embed = None
        self.register_buffer("codebook", torch.randn(codebook_size, code_dim))
        self.special_embed = nn.Embedding(SPECIAL, width)
        self.code_proj = nn.Linear(code_dim, width)
        self.kind_embed = nn.Embedding(SPECIAL + self.tokens_per_face, width)
        self.head = nn.Linear(width, SPECIAL + codebook_size, bias=False)
        shape = self.encoder.config
        self.decoder = FaceDecoder(
            config.build(),
            self.tokenizer.bins,
            code_dim,
            places,
            1 + shape.latents,
            shape.width,
            sees_padding=True,
        )
        self.init_weights()
        self.decoder.requires_grad_(False)

    @property
    def tokens_per_face(self) -> int:
        """Codes of a face."""
        return 3 * self.levels

    def init_weights(self) -> None:
        """Draw fresh weights of everything but the backbones and the shape encoder.

        | parameter | distribution |
        | --- | --- |
        | codebook | normal, std 1 |
        | embeddings, head, the decoder's projections and positions | normal, std 0.02 |
        | the decoder's biases | 0 |
        | other projections | torch's default |
        """
        for module in (self.special_embed, self.kind_embed, self.cond_embed, self.head):
            nn.init.normal_(module.weight, std=WEIGHT_STD)
        inside = {id(module) for module in self.decoder.backbone.modules()}
        for part in self.decoder.modules():
            if isinstance(part, nn.Linear | nn.Embedding) and id(part) not in inside:
                nn.init.normal_(part.weight, std=WEIGHT_STD)
                if isinstance(part, nn.Linear):
                    nn.init.zeros_(part.bias)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters outside of the backbone that weight decay must leave alone."""
        tables = {f"{name}.weight" for name in ("special_embed", "kind_embed", "cond_embed")}
        return tables | {f"encoder.{name}" for name in self.encoder.no_weight_decay()}

    # ---------------------------------------------------------------- tokens

    def kinds_of(self, ids: Tensor) -> Tensor:
        """Return the kinds of ids (B, L) of whole sequences that start with the begin: places in their faces.

        Args:
            ids: Begin, codes + 3, end, padding.
        """
        places = (torch.arange(ids.shape[1], device=ids.device) - 1) % self.tokens_per_face
        return torch.where(ids < SPECIAL, ids, SPECIAL + places)

    def embed_tokens(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """As in ``ShapeGenerator``."""
        codes = self.code_proj(self.codebook[(ids - SPECIAL).clamp(min=0)])  # (B, L, D)
        x = torch.where((ids < SPECIAL)[..., None], self.special_embed(ids.clamp(max=SPECIAL - 1)), codes)
        return x + self.kind_embed(kinds) + self.cond_embed.weight[1]

    def grammar(self) -> MeshGrammar:
        """As in ``ShapeGenerator``."""
        return CodeGrammar(len(self.codebook), self.tokens_per_face)

    def token_facts(self) -> dict[str, Any]:
        """As in ``ShapeGenerator``."""
        return {"name": "codes", "codes": len(self.codebook), "levels": self.levels, "bins": self.tokenizer.bins}

    # ---------------------------------------------------------------- codes to faces

    def decode_ids(self, ids: Tensor, points: Tensor) -> Tensor:
        """Map codes to logits of the coordinates.

        Args:
            ids: Codes from 0, int64 (B, F * tokens_per_face); -1 at padding, with which a face is padding as a whole.
            points: Points of the shapes (B, N, 6).

        Returns:
            (B, F, 3, 3, bins): face, vertex, axis, bin; what stands at padding means nothing.

        Raises:
            ShapeError: A shape is another, the faces are not whole, or there are more than ``spec.max_faces``.
            DataError: An id is not one of the codes.
        """
        if ids.ndim != 2 or ids.shape[1] % self.tokens_per_face or len(ids) != len(points):
            raise ShapeError(
                f"MeshCodeGenerator: ids must be ({len(points)}, F * {self.tokens_per_face}), whole faces for each "
                f"shape, got {tuple(ids.shape)}."
            )
        faces = ids.unflatten(1, (-1, 3, self.levels))  # (B, F, 3, M)
        count, most = faces.shape[1], self.spec.max_faces
        if count > most:
            raise ShapeError(f"MeshCodeGenerator: a mesh has at most max_faces={most} faces, got {count}; write fewer.")
        if ids.numel() and not -1 <= int(ids.min()) <= int(ids.max()) < len(self.codebook):
            raise DataError(
                f"MeshCodeGenerator: ids must be codes from 0 to {len(self.codebook) - 1}, or -1 at padding, got "
                f"{int(ids.min())} to {int(ids.max())}."
            )
        faces = F.pad(faces, (0, 0, 0, 0, 0, most - count), value=-1)  # (B, max_faces, 3, M)
        real = (faces >= 0).flatten(2).all(-1)
        codes = self.codebook[faces.clamp(min=0)].sum(-2)  # (B, max_faces, 3, C)
        logits: Tensor = self.decoder(codes, real, self.encoder(points))
        return logits[:, :count]

    @torch.no_grad()
    def decode_faces(self, ids: Tensor, points: Tensor) -> Tensor:
        """Map codes to corners in [-0.5, 0.5], float64 (B, F, 3, 3), NaN at padding; arguments as in ``decode_ids``."""
        cells = self.decode_ids(ids, points).argmax(-1)
        places = torch.from_numpy(dequantize(cells.cpu().numpy(), self.tokenizer.bins, self.spec.place)).to(ids.device)
        real = (ids.unflatten(1, (-1, self.tokens_per_face)) >= 0).all(-1)
        return places.masked_fill(~real[..., None, None], torch.nan)

    @torch.no_grad()
    def corners(self, tokens: Ints, points: Tensor | None = None, *, partial: bool = False) -> Ints:
        """As in ``ShapeGenerator``.

        Raises:
            ShapeError: The points are missing.
            DataError: The codes end within a face, and ``partial`` does not allow it.
        """
        if points is None:
            raise ShapeError("MeshCodeGenerator: faces depend on the shape too; pass its points.")
        count, rest = divmod(len(tokens), self.tokens_per_face)
        if rest and not partial:
            raise DataError(
                f"MeshCodeGenerator: the sequence of {len(tokens)} codes ends within a face; decode it with "
                "partial=True to keep the whole ones."
            )
        if not count:
            return np.zeros((0, 3, 3), dtype=np.int64)
        ids = torch.as_tensor(tokens[: count * self.tokens_per_face], dtype=torch.long, device=points.device)
        found: Ints = self.decode_ids(ids[None], points[None])[0].argmax(-1).cpu().numpy()
        return found

    @torch.inference_mode()
    def generate(
        self,
        points: Tensor,
        strategy: Strategy = GREEDY,
        *,
        max_faces: int | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[Tensor]:
        """Write triangles for every shape, as the decoder says them.

        They share no vertices, and there may be some without an area: ``generate_meshes`` gives clean meshes.

        Args:
            points: Positions in [-1, 1] and unit normals (B, N, 6).
            strategy: How codes are chosen; the original's are greedy, or sampled with top_k=50, top_p=0.95.
            max_faces: Most faces of one; None for as many as the model was trained with.
            numbers: Numbers of the shapes, which their draws depend on; 0, 1, ... when None.

        Returns:
            Corners (F, 3, 3) of the whole faces of each shape, in [-0.5, 0.5].

        Raises:
            ConfigError: ``max_faces`` is more than the model was trained with.
        """
        trained = self.spec.max_tokens // self.tokens_per_face
        most = trained if max_faces is None else max_faces
        if not 1 <= most <= trained:
            raise ConfigError(
                f"max_faces must be between 1 and {trained}, the most this model was trained with, got {most}."
            )
        decoder = decoder_of(self, self.condition(points))
        limit = most * self.tokens_per_face
        written = write_ids(decoder, len(points), limit, strategy, numbers=numbers)
        ids = torch.full((len(points), limit), -1, dtype=torch.long)
        for row, one in zip(ids, written, strict=True):
            codes = [i - SPECIAL for i in one.ids if i >= SPECIAL][:limit]
            row[: len(codes)] = torch.tensor(codes, dtype=torch.long)
        corners = self.decode_faces(ids.to(points.device), points)
        return [row[~row[:, 0, 0].isnan()] for row in corners]
