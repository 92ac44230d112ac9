"""Recognition while somebody speaks: samples in, text out; with a recurrent backbone the state does not grow.

The numbers are those of one pass over the whole recording: frames are computed when their window is full, positions
when the frames that the subsampling reads are there, and the backbone goes on from its state.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vertebra.backbones.base import State
from vertebra.domains.speech.alignment import peak_times
from vertebra.domains.speech.decoding import Hypothesis
from vertebra.domains.speech.model import SpeechCTC
from vertebra.domains.speech.recognition import position_offset
from vertebra.domains.speech.transcript import Word
from vertebra.errors import ConfigError
from vertebra.tokenizers.text import make_tokenizer


class StreamingRecogniser:
    """Reads one recording in chunks of any size; greedy.

    Args:
        model: With a causal backbone, global feature norm, over time alone, and without prompt.
        language: What is spoken, for a model with prefix; empty for unknown.
        task: ``asr`` or a translation, for a model with prefix.
        max_seconds: Longest recording; matters only for attention without window, whose state grows with it.

    Attributes:
        ids: Tokens so far.
        positions: Position of each of them.

    Raises:
        ConfigError: The model cannot stream.
    """

    def __init__(
        self, model: SpeechCTC, *, language: str = "", task: str = "asr", max_seconds: float = 36_000.0
    ) -> None:
        reasons = {
            "its backbone is not causal": not model.backbone.config.causal,
            f"feature_norm={model.normalise.kind} needs the whole recording": model.normalise.kind != "global",
            "its backbone reads time x frequency": model.grid,
            "it reads a prompt": model.prompt_encoder is not None,
            "padding=espnet mirrors the end of the recording": model.padding == "espnet",
        }
        for reason, holds in reasons.items():
            if holds:
                raise ConfigError(
                    f"streaming: the model cannot, {reason}; train one with a causal backbone, such as "
                    "hybrid_nano,causal=true."
                )
        self.model, self.tokenizer = (
            model.eval(),
            make_tokenizer(model.spec.vocabulary, model.spec.tokens, model.spec.pieces),
        )
        self.device = model.head.weight.device
        self._side = model.logmel.n_fft // 2
        self._state: State = model.backbone.init_state(1, round(max_seconds / model.seconds_per_position) + 2)
        self._wave = torch.zeros(1, 0, device=self.device)  # mirrored beginning, then samples not yet used up
        self._features = torch.zeros(1, 0, model.spec.n_mels, device=self.device)
        self._begun, self._samples, self._position, self._last = False, 0, 0, 0
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.confidence: list[float] = []
        self._text = (0, "")  # of so many tokens
        if model.prefix_length:
            prefix = torch.tensor([model.prefix_ids(language, task)], device=self.device)
            with torch.inference_mode():
                self._advance(model.embed_prefix(prefix, 1, model.head.weight), prefix=True)

    @property
    def text(self) -> str:
        """What was said so far."""
        if len(self.ids) > self._text[0]:
            self._text = len(self.ids), self.tokenizer.decode(self.ids)
        return self._text[1]

    @property
    def delay(self) -> float:
        """Seconds from a position's first sample to the last one it needs, without the time to compute."""
        model = self.model
        return (self._side + model.subsample.look_ahead * model.logmel.hop) / model.spec.sample_rate

    def words(self, duration: float) -> list[Word]:
        """Return the words so far with the times at which their tokens fired, none after ``duration`` seconds."""
        model = self.model
        found = Hypothesis(tuple(self.ids), 0.0, 0.0, tuple(self.positions), tuple(self.confidence))
        return peak_times(
            found,
            self.tokenizer.words(self.ids),
            self.text.split(),
            seconds_per_frame=model.seconds_per_position,
            offset=position_offset(model),
            duration=duration,
        )

    @property
    def state_bytes(self) -> int:
        """Memory that the past takes up."""
        return self._state.nbytes + self._wave.nbytes + self._features.nbytes

    @torch.inference_mode()
    def feed(self, samples: NDArray[np.float32] | Tensor) -> str:
        """Take the next samples (N,), any number of them; return ``text``."""
        new = torch.as_tensor(samples, dtype=torch.float32, device=self.device)[None]
        self._wave = torch.cat([self._wave, new], dim=1)
        self._samples += new.shape[1]
        if not self._begun:
            if self._samples <= self._side:
                return self.text
            mirrored = self._wave[:, 1 : self._side + 1].flip(1)
            self._wave, self._begun = torch.cat([mirrored, self._wave], dim=1), True
        self._compute()
        return self.text

    @torch.inference_mode()
    def finish(self) -> str:
        """Say that nothing follows; return ``text``."""
        model = self.model
        silence = max(model.min_samples - self._samples, 0)
        if silence:
            self.feed(torch.zeros(silence))
        self._wave = torch.cat([self._wave, self._wave.new_zeros(1, self._side)], dim=1)
        self._compute()
        return self.text

    def _compute(self) -> None:
        logmel = self.model.logmel
        count = (self._wave.shape[1] - logmel.n_fft) // logmel.hop + 1
        if count < 1:
            return
        used = (count - 1) * logmel.hop + logmel.n_fft
        frames, counts = logmel.frames(self._wave[:, :used], torch.tensor([count], device=self.device))
        self._wave = self._wave[:, count * logmel.hop :]
        features = torch.cat([self._features, self.model.normalise(frames, counts)], dim=1)
        held = torch.tensor([features.shape[1]], device=self.device)
        ready = int(self.model.subsample.output_count(held))
        if ready:
            x, _ = self.model.subsample(features, held)
            features = features[:, ready * self.model.subsample.factor :]
            self._advance(x)
        self._features = features

    def _advance(self, x: Tensor, *, prefix: bool = False) -> None:
        """Go on by the positions x (1, T, D)."""
        taps = self.model.taps({}, 1)
        y = self.model.backbone.step(x, self._state, taps=taps)
        scores, best = self.model.head(y)[0].float().softmax(-1).max(-1)
        for score, token in zip(scores.tolist(), best.tolist(), strict=True):
            if token not in (0, self._last):
                self.ids.append(token)
                self.positions.append(max(self._position, 0))
                self.confidence.append(score)
            self._last = token
            self._position += not prefix
