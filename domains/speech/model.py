"""Recognition by connectionist temporal classification: log-mel, subsampling, any backbone, one shared head.

With an E-Branchformer, intermediate losses with self-conditioning, a prefix and a prompt this is OWSM-CTC
(https://arxiv.org/abs/2402.12654; self-conditioning: https://arxiv.org/abs/2104.02724); each of these is optional, and
all of them work with any backbone.

Shapes: B recordings, N samples, T positions (those of the prefix first), D width, V tokens, L tokens of a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vertebra.backbones.base import Backbone, Tap, Taps
from vertebra.backbones.layers.cross import CrossAttention
from vertebra.domains.adapting import Adapter, by_name, fresh, resampled
from vertebra.domains.model import DomainModel, Origin
from vertebra.domains.speech.frontend import ConvSubsampling, LogMel, Normalisation, Normalise, Padding
from vertebra.domains.speech.prompt import NORM_EPS, PromptEncoder
from vertebra.domains.speech.spec import NO_LANGUAGE, NO_PROMPT, SpeechSpec
from vertebra.errors import ConfigError, ShapeError

GRID_FAMILIES = ("axial",)
"""Backbones that read time x frequency unless told otherwise."""


@dataclass
class Emissions:
    """What a model says of a batch.

    Args:
        logits: (B, T, V), those of the prefix first.
        lengths: Real positions of each recording, (B,).
        intermediate: Logits (B, T, V) behind the intermediate layers, by the layer's number, counted from 1.
    """

    logits: Tensor
    lengths: Tensor
    intermediate: dict[int, Tensor] = field(default_factory=dict)

    @property
    def log_probs(self) -> Tensor:
        """Log-probabilities (B, T, V), in float32."""
        return self.logits.float().log_softmax(-1)


@dataclass(frozen=True)
class PromptConfig:
    """Size of the prompt's encoder.

    Args:
        dim: Width E of the prompt, and of the prefix's embedding.
        depth: Layers.
        num_heads: Heads.
        hidden_dim: Inner width of the MLPs.
        every: The prompt is read in every so-manieth layer of the backbone.
        cross_heads: Heads of that attention.
        dropout: Share of each branch's output that is zeroed in training.
    """

    dim: int = 512
    depth: int = 4
    num_heads: int = 8
    hidden_dim: int = 2048
    every: int = 3
    cross_heads: int = 16
    dropout: float = 0.1


class SpeechCTC(DomainModel):
    """Log-probabilities of tokens at every position of a recording.

    Args:
        backbone: The shared part.
        spec: Facts about the data. Where it has languages and tasks, each recording is preceded by two tokens that say
            what is wanted.
        subsampling: Frames of 10 ms to one position: 1, 2, 4, 6 or 8. A recording needs more positions than its text
            has tokens.
        channels: Channels of the subsampling convolutions; 0 for as many as the backbone is wide.
        grid: Whether the backbone reads time x frequency; ``auto`` for the Axial Transformer alone.
        feature_norm: ``utterance`` takes the mean of each recording away, ``level`` its loudness; neither can stream.
        intermediate: Layers of the backbone, counted from 1, whose output the head reads too; what it says is fed back
            (self-conditioning).
        transcript_layers: Those of them that are trained to say the transcript whatever the task.
        prompt: Encoder of a text prompt; None for a model that reads none.
        padding: ``espnet`` reads what stands behind the shorter recordings of a batch, as ESPnet does.
        dropout: Share of the backbone's input that is zeroed in training.
    """

    task: ClassVar[str] = "speech/ctc"
    input_parts: ClassVar[tuple[str, ...]] = ("normalise", "subsample", "embed", "embed_proj")
    spec: SpeechSpec

    def __init__(
        self,
        backbone: Backbone,
        spec: SpeechSpec,
        *,
        subsampling: int = 4,
        channels: int = 0,
        grid: bool | Literal["auto"] = "auto",
        feature_norm: Normalisation = "global",
        intermediate: tuple[int, ...] | list[int] = (),
        transcript_layers: tuple[int, ...] | list[int] = (),
        prompt: PromptConfig | dict[str, float] | None = None,
        padding: Padding = "masked",
        dropout: float = 0.0,
    ) -> None:
        config = backbone.config
        if grid == "auto":
            grid = config.family in GRID_FAMILIES
        if isinstance(prompt, dict):
            prompt = PromptConfig(**prompt)  # type: ignore[arg-type]
        super().__init__(
            backbone,
            spec,
            subsampling=subsampling,
            channels=channels,
            grid=grid,
            feature_norm=feature_norm,
            intermediate=list(intermediate),
            transcript_layers=list(transcript_layers),
            prompt=None if prompt is None else dict(vars(prompt)),
            padding=padding,
            dropout=dropout,
        )
        _check_layers(intermediate, transcript_layers, backbone.num_layers)
        self.padding = padding
        self.grid, self.intermediate, self.transcript_layers = grid, tuple(intermediate), tuple(transcript_layers)
        self.logmel = LogMel(spec.sample_rate, spec.n_mels, padding)
        self.normalise = Normalise(spec.mean, spec.std, spec.n_mels, feature_norm)
        self.subsample = ConvSubsampling(
            spec.n_mels, config.dim, subsampling, channels=channels, grid=grid, padding=padding
        )
        self.ids = {token: number for number, token in enumerate(spec.tokens)}
        self.dropout = nn.Dropout(dropout)
        if spec.languages or prompt is not None:
            width = config.dim if prompt is None else prompt.dim
            self.embed = nn.Embedding(len(spec.tokens), width)
            self.embed_proj = nn.Linear(width, config.dim)
        self.prompt_encoder: PromptEncoder | None = None
        if prompt is not None:
            if NO_PROMPT not in self.ids:
                raise ConfigError(f"SpeechCTC: a prompt needs the token {NO_PROMPT} among the spec's tokens.")
            self.prompt_encoder = PromptEncoder(
                prompt.dim, prompt.depth, prompt.num_heads, prompt.hidden_dim, prompt.dropout
            )
            self.prompt_proj = nn.Linear(prompt.dim, config.dim)
            readers = range(prompt.every - 1, backbone.num_layers, prompt.every)
            self.readers = nn.ModuleDict(
                {str(i): CrossAttention(config.dim, prompt.cross_heads, prompt.dropout, NORM_EPS) for i in readers}
            )
        self.head = nn.Linear(config.dim, len(spec.tokens))
        self.condition = nn.Linear(len(spec.tokens), config.dim) if intermediate else None

    def adapters(self, origin: Origin) -> dict[str, Adapter]:
        """As in ``DomainModel``: other tokens, another number of log-mel channels."""
        if not isinstance(origin.spec, SpeechSpec):
            return {}
        rows = by_name(origin.spec.tokens, self.spec.tokens, "tokens")
        found: dict[str, Adapter] = {"embed.weight": rows, "head.weight": rows, "head.bias": rows}
        found["condition.weight"] = by_name(origin.spec.tokens, self.spec.tokens, "tokens", axis=1)
        same = ("subsampling", "channels")
        if any(origin.arguments.get(name) != self.arguments[name] for name in same):
            found["subsample.out.weight"] = fresh
        elif not self.grid:
            found["subsample.out.weight"] = resampled("log-mel channels", parts=self.subsample.channels)
        return found

    # ------------------------------------------------------------ what a user calls

    def forward(
        self,
        waves: Tensor,
        lengths: Tensor,
        prefix: Tensor | None = None,
        prompt: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Map waves (B, N) to log-probabilities (B, T, V) and the numbers of real positions (B,).

        Args:
            waves: Samples from -1 to 1; whatever stands behind a recording's end is not read.
            lengths: Samples of each recording, (B,).
            prefix: Ids of language and task, (B, 2), of ``prefix_ids``; None for an unknown language and recognition.
            prompt: Ids of the text before, (B, L); None for none.
            prompt_lengths: How many of them are real, (B,); None for all.
        """
        features, counts = self.features(waves, lengths)
        found = self.encode(features, counts, prefix, prompt, prompt_lengths)
        return found.log_probs, found.lengths

    def emissions(self, wave: Tensor) -> tuple[Tensor, float]:
        """Map one recording (N,) to log-probabilities (T, V), those of the prefix left out, and the seconds a position.

        The seconds are those between the beginnings of two positions; the first position begins at 0.
        """
        log_probs, counts = self(wave[None], torch.tensor([len(wave)], device=wave.device))
        return log_probs[0, self.prefix_length : int(counts[0])], self.seconds_per_position

    # ------------------------------------------------------------ the parts of a pass

    def features(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waves (B, N) to log-mel features (B, frames, M), not yet normalised, and their numbers (B,).

        A recording that is too short for one position is taken as if silence followed.
        """
        if waves.ndim != 2 or lengths.shape != waves.shape[:1]:
            raise ShapeError(
                f"SpeechCTC: waves must be (B, N) and lengths (B,), got {tuple(waves.shape)} and "
                f"{tuple(lengths.shape)}."
            )
        least = self.min_samples
        if waves.shape[1] < least:
            waves = nn.functional.pad(waves, (0, least - waves.shape[1]))
        features, counts = self.logmel(waves, lengths)
        return features, counts.clamp(min=self.logmel.frame_count(torch.tensor(least)).item())

    def encode(
        self,
        features: Tensor,
        counts: Tensor,
        prefix: Tensor | None = None,
        prompt: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Emissions:
        """Map log-mel features (B, frames, M), of which ``counts`` (B,) are real, to what the head says."""
        x, mask = self.positions(features, counts, prefix)
        said: dict[int, Tensor] = {}
        # Without padding attention needs no mask, which is faster; where gradients are kept, looking is not worth it.
        padded = torch.is_grad_enabled() or torch.compiler.is_compiling() or not bool(mask.all())
        y = self.backbone(x, mask if padded else None, taps=self.taps(said, x.shape[0], prompt, prompt_lengths))
        lengths = mask.flatten(2)[..., 0].sum(1) if self.grid else mask.sum(1)
        return Emissions(self.head(self._pool(y)), lengths, said)

    def positions(self, features: Tensor, counts: Tensor, prefix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map log-mel features to what the backbone reads, (B, T, D) or (B, T, M', D), and the mask of real ones."""
        x, counts = self.subsample(self.normalise(features, counts), counts)
        if self.spec.languages:
            before = self.embed_prefix(prefix, x.shape[0], x)  # (B, 2, D)
            if self.grid:
                before = before[:, :, None].expand(-1, -1, x.shape[2], -1)
            x, counts = torch.cat([before.to(x.dtype), x], dim=1), counts + before.shape[1]
        mask = torch.arange(x.shape[1], device=x.device) < counts[:, None]  # (B, T)
        if self.grid:
            mask = mask[:, :, None].expand(-1, -1, x.shape[2])
        return self.dropout(x), mask

    def embed_prefix(self, prefix: Tensor | None, batch: int, like: Tensor) -> Tensor:
        """Return the positions of the prefix (B, 2, D)."""
        if prefix is None:
            prefix = torch.tensor([self.prefix_ids()], device=like.device).expand(batch, -1)
        return self.embed_proj(self.embed(prefix))

    def taps(
        self,
        said: dict[int, Tensor],
        batch: int,
        prompt: Tensor | None = None,
        prompt_lengths: Tensor | None = None,
    ) -> Taps | None:
        """Return what is done inside the backbone: reading the prompt, and self-conditioning, which fills ``said``."""
        if self.prompt_encoder is None and not self.intermediate:
            return None

        def fed_back(layer: int) -> Tap:
            def tap(x: Tensor) -> Tensor:
                assert self.condition is not None
                logits = said[layer] = self.head(self._pool(x))
                y = self.condition(logits.softmax(-1))
                return x + (y[:, :, None] if self.grid else y)

            return tap

        inside: dict[int, Tap] = {}
        if self.prompt_encoder is not None:
            memory, real = self.read_prompt(batch, prompt, prompt_lengths)
            for number, reader in self.readers.items():
                inside[int(number)] = partial(reader, memory=memory, mask=real)
        return Taps(inside=inside, after={layer - 1: fed_back(layer) for layer in self.intermediate})

    def read_prompt(self, batch: int, prompt: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map a prompt (B, L) to the memory (B, L, D) that positions attend to, and its mask (B, L)."""
        assert self.prompt_encoder is not None
        if prompt is None:
            prompt = torch.full((batch, 1), self.ids[NO_PROMPT], device=self.head.weight.device)
        if lengths is None:
            lengths = torch.full((batch,), prompt.shape[1], device=prompt.device)
        mask = torch.arange(prompt.shape[1], device=prompt.device) < lengths[:, None]
        x = self.prompt_encoder(self.embed(prompt.masked_fill(~mask, 0)), mask)
        return self.prompt_proj(x), mask

    def _pool(self, x: Tensor) -> Tensor:
        return x.mean(2) if self.grid else x  # (B, T, D)

    # ------------------------------------------------------------ facts

    @property
    def prefix_length(self) -> int:
        """Positions before the recording's own."""
        return 2 if self.spec.languages else 0

    @property
    def samples_per_position(self) -> int:
        """Samples between the beginnings of two positions."""
        return self.logmel.hop * self.subsample.factor

    @property
    def seconds_per_position(self) -> float:
        """Seconds between the beginnings of two positions."""
        return self.samples_per_position / self.spec.sample_rate

    @property
    def min_samples(self) -> int:
        """Samples from which a recording makes one position."""
        return max(self.subsample.look_ahead * self.logmel.hop, self.logmel.n_fft // 2 + 1)

    def position_count(self, samples: Tensor) -> Tensor:
        """Return how many positions, without those of the prefix, recordings of so many samples have."""
        return self.subsample.output_count(self.logmel.frame_count(samples.clamp(min=self.min_samples)))

    def prefix_ids(self, language: str = "", task: str = "asr") -> list[int]:
        """Return the ids of a language and a task; an empty language stands for an unknown one.

        Raises:
            ConfigError: The model knows no such language or task.
        """
        languages, tasks = self.spec.languages, self.spec.tasks
        if not language:
            first = NO_LANGUAGE if NO_LANGUAGE in self.ids else f"<{languages[0]}>"
        else:
            first = f"<{language}>"
            if language not in languages:
                raise ConfigError(f"SpeechCTC: language must be one of {', '.join(languages)}, got {language!r}.")
        if task not in tasks:
            raise ConfigError(f"SpeechCTC: task must be one of {', '.join(tasks)}, got {task!r}.")
        return [self.ids[first], self.ids[f"<{task}>"]]


def _check_layers(intermediate: Sequence[int], transcript: Sequence[int], depth: int) -> None:
    if any(not 1 <= layer < depth for layer in intermediate):
        raise ConfigError(
            f"SpeechCTC: intermediate layers must be from 1 to {depth - 1}, one below the last, got "
            f"{list(intermediate)}."
        )
    if not set(transcript) <= set(intermediate):
        raise ConfigError(
            f"SpeechCTC: transcript_layers must be among the intermediate layers {list(intermediate)}, got "
            f"{list(transcript)}."
        )
