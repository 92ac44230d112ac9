"""DNA models: embedding, backbone, head; plain torch.

The echo embedding follows HybriDNA (https://arxiv.org/abs/2502.10807): a causal backbone reads the sequence twice, and
only the states of the second copy, which have seen the whole sequence, are pooled. In the reverse-complement echo the
second copy is the other strand; the paper does not print its layout, x followed by RC(x) is our reading.

Shapes: B batch, L positions, D width, V vocabulary, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from vertebra.backbones.base import Backbone
from vertebra.domains.adapting import Adapter, by_name, extend
from vertebra.domains.dna.ngrams import NGramEmbedding
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.targets import next_targets
from vertebra.errors import ConfigError, ShapeError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.nucleotide import DNATokenizer, NucleotideTokenizer

Pooling = Literal["echo", "rc_echo", "mean", "last"]
Head = Literal["linear", "mlp", "cnn"]
Positions = Literal["none", "learned"]


class _DNAModel(DomainModel):
    input_parts: ClassVar[tuple[str, ...]] = ("embed", "positions", "ngrams")
    complement: Tensor
    spec: DNASpec

    def __init__(self, backbone: Backbone, spec: DNASpec, **arguments: object) -> None:
        super().__init__(backbone, spec, **arguments)
        tokenizer = tokenizer_from_dict(spec.tokenizer)
        if not isinstance(tokenizer, DNATokenizer):
            raise ConfigError(f"{type(self).__name__}: the tokenizer must be one for DNA, got {tokenizer!r}.")
        self.tokenizer = tokenizer
        self.pad_id = tokenizer.pad_id
        labels = len(spec.classes) if spec.task == "lm" else 0  # label tokens follow the tokenizer's
        self.embed = nn.Embedding(self.tokenizer.vocab_size + labels, backbone.config.dim)
        nn.init.normal_(self.embed.weight, std=0.02)
        self.register_buffer("complement", torch.as_tensor(tokenizer.complement), persistent=False)

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: another vocabulary, other labels, more learned positions."""
        found: dict[str, Adapter] = {"positions.weight": extend}
        if isinstance(origin.spec, DNASpec):
            saved, own = _names(origin.spec), _names(self.spec)
            found["embed.weight"] = by_name(saved[0] + saved[1], own[0] + own[1], "tokens")
            found["head.weight"] = by_name(saved[0], own[0], "tokens")
            found |= dict.fromkeys(("head.1.weight", "head.1.bias"), by_name(saved[2], own[2], "outputs"))
        return found

    def _check_ids(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        if ids.ndim != 2 or ids.is_floating_point():
            raise ShapeError(f"{type(self).__name__}: ids must be integers (B, L), got {ids.dtype} {tuple(ids.shape)}.")
        if mask is None:
            return ids != self.pad_id
        if mask.shape != ids.shape or mask.dtype != torch.bool:
            raise ShapeError(
                f"{type(self).__name__}: mask must be bool {tuple(ids.shape)} (True = real position), "
                f"got {mask.dtype} {tuple(mask.shape)}."
            )
        return mask


class DNALanguageModel(_DNAModel):
    """Next-token or masked-token model of DNA.

    With ``spec.classes`` a sequence is ``[BOS]``, tokens of its labels, the bases, ``[SEP]``: the prompt tokens of
    HybriDNA's and regLM's generators, with ids of their own that the head does not predict.

    Args:
        backbone: Causal for next tokens, bidirectional for masked ones.
        spec: Facts about the data.
        tie: Whether the head shares its matrix with the embedding.
    """

    task: ClassVar[str] = "dna/lm"

    def __init__(self, backbone: Backbone, spec: DNASpec, *, tie: bool = False) -> None:
        super().__init__(backbone, spec, tie=tie)
        self.head = nn.Linear(backbone.config.dim, self.tokenizer.vocab_size, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)
        if tie and self.embed.num_embeddings > self.tokenizer.vocab_size:
            raise ConfigError("DNALanguageModel: tie needs a model without labels; labels are read, never predicted.")
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to logits (B, L, V).

        Args:
            ids: Token ids, int.
            mask: Real positions, bool (B, L); None for all that are not ``[PAD]``.
            segments: Packed sequence of every position, int (B, L); None when a row is one sequence.
        """
        return self.head(self.embed_positions(ids, mask, segments))

    def token_logits(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Return logits (B, L, V), and the next base, or the end where the data marks it, that each is asked for."""
        ids, segments = batch["ids"].long(), batch.get("segments")
        asked = [*self.tokenizer.base_ids, *[self.tokenizer.sep_id] * self.spec.eos]
        counted = batch["counted"] & torch.isin(ids, torch.as_tensor(asked, device=ids.device))
        return self(ids, batch["mask"], segments), next_targets(ids, counted, segments)

    def front_ids(self, labels: Sequence[str] = ()) -> list[int]:
        """Return the ids that stand before the bases: ``[BOS]`` where the model was trained with it, and label tokens.

        Raises:
            ConfigError: The model has no labels, or not these.
        """
        classes = self.spec.classes
        for label in labels:
            if not classes:
                raise ConfigError(
                    f"label: this model was trained without labels, got {label!r}; leave it out, or train one with the "
                    "recipe dna/generate."
                )
            if label not in classes:
                raise ConfigError(f"label: must be one of {', '.join(classes)}, got {label!r}.")
        tokens = sorted(self.tokenizer.vocab_size + classes.index(label) for label in set(labels))
        return [self.tokenizer.bos_id] * self.spec.bos + tokens

    def embed_positions(self, ids: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to the backbone's features (B, L, D)."""
        mask = self._check_ids(ids, mask)
        return self.backbone(self.embed(ids.long()), mask, segments)

    def embed_sequences(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to one vector a sequence (B, D): the mean over its positions."""
        mask = self._check_ids(ids, mask)
        return masked_mean(self.embed_positions(ids, mask), mask)


class DNAClassifier(_DNAModel):
    """Classes, labels or numbers of whole sequences.

    Args:
        backbone: Any; ``echo`` is meant for causal ones.
        spec: Facts about the data: task, classes or targets.
        pooling: ``mean`` over positions, ``last`` position, ``echo``: mean over the second of two copies of the
            sequence, or ``rc_echo``: the second copy is the reverse complement.
        head: ``linear``, ``mlp`` with one hidden layer, or ``cnn``: two convolutions before pooling.
        positions: ``learned`` adds an embedding of the absolute position: for sequences that are aligned, such as
            promoters cut around their start site.
        dropout: Share of embedding and of pooled features that is zeroed in training.
        kernel: Width of the convolutions of the ``cnn`` head.
        rc_average: Whether logits in evaluation are the mean over both strands.
        ngrams: Orders of overlapping n-grams that are embedded beside the single bases, such as 3, 6 and 8; their mean
            over positions also goes straight to the head. Single nucleotides only.
        ngram_dropout: Share of n-grams that is left out in training.
        ngram_skip: Share of sequences for which a table above order 3 is left out whole in training.
        aligned: Channels a position that the head reads position by position, for sequences that are aligned; 0 for
            none.
        aligned_pool: Neighbouring positions that are averaged for it, against small shifts.
    """

    task: ClassVar[str] = "dna/classify"

    def __init__(
        self,
        backbone: Backbone,
        spec: DNASpec,
        *,
        pooling: Pooling = "mean",
        head: Head = "linear",
        positions: Positions = "none",
        dropout: float = 0.0,
        kernel: int = 9,
        rc_average: bool = False,
        ngrams: Sequence[int] = (),
        ngram_dropout: float = 0.3,
        ngram_skip: float = 0.5,
        aligned: int = 0,
        aligned_pool: int = 3,
    ) -> None:
        super().__init__(
            backbone,
            spec,
            pooling=pooling,
            head=head,
            positions=positions,
            dropout=dropout,
            kernel=kernel,
            rc_average=rc_average,
            ngrams=list(ngrams),
            ngram_dropout=ngram_dropout,
            ngram_skip=ngram_skip,
            aligned=aligned,
            aligned_pool=aligned_pool,
        )
        for name, value, known in (
            ("pooling", pooling, ("echo", "rc_echo", "mean", "last")),
            ("head", head, ("linear", "mlp", "cnn")),
            ("positions", positions, ("none", "learned")),
        ):
            if value not in known:
                raise ConfigError(f"DNAClassifier: {name} must be one of {', '.join(known)}, got {value!r}.")
        if head == "cnn" and pooling == "last":
            raise ConfigError("DNAClassifier: head 'cnn' reads all positions; use pooling 'mean' or 'echo' with it.")
        if spec.num_outputs == 0:
            raise ConfigError(f"DNAClassifier: the data must name classes or targets, got none (task {spec.task}).")
        dim = backbone.config.dim
        self.pooling, self.rc_average = pooling, rc_average
        self.positions = nn.Embedding(spec.max_length, dim) if positions == "learned" else None
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=0.02)
        self.ngrams = self._make_ngrams(ngrams, ngram_dropout, ngram_skip) if ngrams else None
        self.bag_norm = nn.LayerNorm(dim) if ngrams else None
        self.dropout = nn.Dropout(dropout)
        self.convolutions = _Convolutions(dim, kernel) if head == "cnn" else None
        self.aligned = _AlignedReadout(dim, aligned, spec.max_length, aligned_pool) if aligned else None
        width = (2 if ngrams else 1) * dim + (self.aligned.width if self.aligned is not None else 0)
        hidden = (
            nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout)) if head == "mlp" else nn.Identity()
        )
        self.head = nn.Sequential(hidden, nn.Linear(width, spec.num_outputs))

    def _make_ngrams(self, orders: Sequence[int], dropout: float, skip: float) -> NGramEmbedding:
        if not isinstance(self.tokenizer, NucleotideTokenizer):
            raise ConfigError("DNAClassifier: ngrams needs single nucleotides (k=1); leave ngrams out, or set k to 1.")
        bases = self.tokenizer.base_ids[:4]
        return NGramEmbedding(orders, self.backbone.config.dim, bases, self.tokenizer.vocab_size, dropout, skip)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to logits, or standardised numbers, (B, C).

        Args:
            ids: Token ids, int; padding may stand on either side.
            mask: Real positions, bool (B, L); None for all that are not ``[PAD]``.
        """
        mask = self._check_ids(ids, mask)
        logits: Tensor = self.head(self.dropout(self.embed_sequences(ids, mask)))
        if self.rc_average and not self.training:
            other = self.head(self.embed_sequences(self.reverse_complement(ids, mask), mask))
            logits = (logits + other) / 2
        return logits

    def embed_sequences(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to one vector a sequence (B, E), the one the head reads; E is D, and more with n-grams."""
        features, inputs, mask = self._features(ids, mask)
        if self.pooling == "last":
            last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
            pooled = features[torch.arange(features.shape[0], device=features.device), last]
        else:
            pooled = masked_mean(features, mask)
        parts = [pooled]
        if self.bag_norm is not None:
            parts.append(self.bag_norm(masked_mean(inputs, mask)))
        if self.aligned is not None:
            parts.append(self.aligned(features, inputs, mask))
        return torch.cat(parts, dim=-1)

    def embed_positions(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map ids (B, L) to features (B, L, D) and their mask (B, L), the sequence moved to the left.

        With an echo these are the features of the second copy; with ``rc_echo`` its positions run along the other
        strand.
        """
        features, _, mask = self._features(ids, mask)
        return features, mask

    def _features(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return features (B, L, D), what went into the backbone for the first copy (B, L, D), and their mask."""
        mask = self._check_ids(ids, mask)
        lengths = mask.sum(1, keepdim=True)  # (B, 1)
        start = mask.int().argmax(1, keepdim=True)
        copies = 2 if self.pooling in ("echo", "rc_echo") else 1
        at = torch.arange(copies * ids.shape[1], device=ids.device)[None]  # (1, copies * L)
        real, second = at < copies * lengths, at >= lengths
        source = torch.where(second, at - lengths, at)
        if self.pooling == "rc_echo":
            source = torch.where(second, 2 * lengths - 1 - at, source)
        source = source.clamp(0, ids.shape[1] - 1)
        tokens = ids.gather(1, (start + source).clamp(max=ids.shape[1] - 1)).long()
        if self.pooling == "rc_echo":
            tokens = torch.where(second, self.complement[tokens], tokens)
        x = self.embed(tokens.masked_fill(~real, self.pad_id))
        if self.positions is not None:
            if ids.shape[1] > self.positions.num_embeddings:
                raise ShapeError(
                    f"DNAClassifier: sequences must have at most {self.positions.num_embeddings} tokens (learned "
                    f"positions), got {ids.shape[1]}; cut them, or train with positions 'none'."
                )
            x = x + self.positions(source)
        if self.ngrams is not None:
            x = x + self.ngrams(tokens.masked_fill(~real, self.pad_id))
        features = self.backbone(self.dropout(x), real)
        kept = at[:, : ids.shape[1]] < lengths  # (B, L)
        if copies == 2:
            index = (lengths + at[:, : ids.shape[1]]).clamp(max=features.shape[1] - 1)
            features = features.gather(1, index[..., None].expand(-1, -1, features.shape[2]))
        if self.convolutions is not None:
            features = self.convolutions(features, kept)
        return features, x[:, : ids.shape[1]], kept

    def reverse_complement(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Reverse and complement the real positions of ids (B, L), leaving padding where it is."""
        at = torch.arange(ids.shape[1], device=ids.device)[None]
        first = mask.int().argmax(1, keepdim=True)
        source = torch.where(mask, 2 * first + mask.sum(1, keepdim=True) - 1 - at, at)
        other = self.complement[ids.gather(1, source).long()].to(ids.dtype)
        return torch.where(mask, other, ids)


class _AlignedReadout(nn.Module):
    """A few channels of every position, of the backbone's features and of its input, side by side."""

    def __init__(self, dim: int, channels: int, length: int, pool: int) -> None:
        super().__init__()
        self.length, self.pool = -(-length // pool) * pool, pool
        self.width = 2 * channels * (self.length // pool)
        self.features = nn.Linear(dim, channels)
        self.norm = nn.LayerNorm(dim)
        self.inputs = nn.Linear(dim, channels)

    def forward(self, features: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        if features.shape[1] > self.length:
            raise ShapeError(
                f"DNAClassifier: sequences must have at most {self.length} tokens (aligned read-out), "
                f"got {features.shape[1]}; cut them, or train with aligned=0."
            )
        both = torch.cat([nn.functional.gelu(self.features(features)), self.inputs(self.norm(inputs))], dim=-1)
        both = (both * mask[..., None]).transpose(1, 2)  # (B, 2 * channels, L)
        both = nn.functional.pad(both, (0, self.length - both.shape[2]))
        return nn.functional.avg_pool1d(both, self.pool).flatten(1)


class _Convolutions(nn.Module):
    """Two convolutions over positions with a residual; padding counts as zeros, so that it changes nothing."""

    def __init__(self, dim: int, kernel: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(dim, dim, kernel, padding="same")
        self.second = nn.Conv1d(dim, dim, kernel, padding="same")

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        keep = mask[:, None].to(x.dtype)  # (B, 1, L)
        y = nn.functional.gelu(self.first(x.transpose(1, 2) * keep))
        y = nn.functional.gelu(self.second(y * keep))
        return x + y.transpose(1, 2)


def _names(spec: DNASpec) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Return the tokenizer's tokens, those of a language model's labels, and the outputs of a classifier."""
    tokenizer = tokenizer_from_dict(spec.tokenizer)
    tokens = tokenizer.tokens if isinstance(tokenizer, DNATokenizer) else ()
    if spec.task == "lm":
        return tokens, tuple(f"<{name}>" for name in spec.classes), ()
    return tokens, (), spec.targets if spec.task == "regression" else spec.classes


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, L, D) over the positions where mask (B, L) is True: (B, D); zeros where there is none."""
    weight = mask[..., None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1).clamp(min=1)
