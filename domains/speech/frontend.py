"""From samples to the features a backbone reads: log-mel, normalisation, convolutional subsampling.

Sources: the front end and ``Conv2dSubsampling*`` of ESPnet, as OWSM-CTC uses them (https://arxiv.org/abs/2402.12654).

Shapes: B recordings, N samples, T frames of 10 ms, M log-mel channels, C channels of the convolutions, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.errors import ConfigError

Padding = Literal["masked", "espnet"]
Normalisation = Literal["global", "utterance", "level"]
Subsampling = Literal[1, 2, 4, 6, 8]

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
FLOOR = 1e-10  # below which a power counts as nothing, before the logarithm
QUIET = -9.0  # logarithm of a power: a recording whose loudest band lies below is not made louder
FRAME_FLOATS = 1 << 17  # samples, each in several windows, that a CPU transforms at a time
PIECE_FLOATS = 1 << 20  # what the first convolution gives a CPU at a time: 4 MiB, so that it stays in the cache
SHORTEST_PIECE = 32  # frames, or positions
WIDE = 64  # channels from which convolutions are faster with the channels last
LAYERS: dict[int, tuple[tuple[int, int], ...]] = {
    1: ((3, 1), (3, 1)),
    2: ((3, 2), (3, 1)),
    4: ((3, 2), (3, 2)),
    6: ((3, 2), (5, 3)),
    8: ((3, 2), (3, 2), (3, 2)),
}
"""Kernel and stride of the convolutions, over time and channels alike, by the subsampling factor."""


class LogMel(nn.Module):
    """Natural logarithm of the power in mel bands (Slaney's scale and norm), a frame every 10 ms.

    Windows of 25 ms (periodic Hann) are centred on the frames. Before the first sample the recording is mirrored;
    behind the last one stands silence, so that a frame does not depend on what else is in the batch.

    Args:
        sample_rate: Samples a second.
        n_mels: M.
        padding: ``espnet`` mirrors the end of the longest recording of a batch too, as ESPnet does.
    """

    def __init__(self, sample_rate: int, n_mels: int, padding: Padding = "masked") -> None:
        super().__init__()
        self.window_length, self.hop = round(WINDOW_SECONDS * sample_rate), round(HOP_SECONDS * sample_rate)
        self.n_fft = 1 << (self.window_length - 1).bit_length()
        self.padding = padding
        bands = mel_bands(sample_rate, self.n_fft, n_mels)
        if not bands.is_meta and not bool((bands.sum(0) > 0).all()):
            raise ConfigError(
                f"LogMel: n_mels={n_mels} is too many for {sample_rate} samples a second, some bands are empty; "
                f"choose {n_mels // 2} or a higher sample_rate."
            )
        self.register_buffer("bands", bands, persistent=False)
        self.register_buffer("window", torch.hann_window(self.window_length), persistent=False)

    def forward(self, waves: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Map waves (B, N) with ``lengths`` (B,) to features (B, T, M), 0 at padding, and their numbers of frames (B,).

        T is N // hop + 1; N must be more than half a window.
        """
        side = self.n_fft // 2
        real = torch.arange(waves.shape[1], device=waves.device) < lengths[:, None]
        waves = (waves.float() * real)[:, None]  # (B, 1, N)
        if self.padding == "espnet":
            waves = F.pad(waves, (side, side), mode="reflect")[:, 0]
        else:
            waves = F.pad(F.pad(waves, (side, 0), mode="reflect"), (0, side))[:, 0]
        return self.frames(waves, self.frame_count(lengths))

    def frames(self, waves: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Like ``forward``, of waves (B, N + n_fft) that have what stands before and behind already."""
        before = (self.n_fft - self.window_length) // 2
        window = F.pad(self._window(), (before, self.n_fft - self.window_length - before))
        frames = waves.unfold(1, self.n_fft, self.hop)  # (B, T, n_fft), a view
        pieces: Sequence[Tensor] = (frames,)
        if waves.device.type == "cpu" and not torch.compiler.is_compiling():
            pieces = frames.split(max(SHORTEST_PIECE, FRAME_FLOATS // (len(waves) * self.n_fft)), dim=1)
        parts = []
        for part in pieces:
            spectrum = torch.fft.rfft(part * window)  # (B, T, n_fft / 2 + 1)
            power = spectrum.real.square() + spectrum.imag.square()
            parts.append((power @ self._bands()).clamp_min(FLOOR).log())
        features = torch.cat(parts, dim=1)  # (B, T, M)
        real = torch.arange(features.shape[1], device=waves.device) < counts[:, None]
        return features * real[..., None], counts

    def frame_count(self, samples: Tensor) -> Tensor:
        """Return how many frames recordings of so many ``samples`` have."""
        return samples // self.hop + 1

    def _window(self) -> Tensor:
        window = self.window
        assert isinstance(window, Tensor)
        return window

    def _bands(self) -> Tensor:
        bands = self.bands
        assert isinstance(bands, Tensor)
        return bands


class Normalise(nn.Module):
    """(x - mean) / std of each channel, 0 at padding.

    Args:
        mean: Of the training data, (M,); empty for 0.
        std: (M,); empty for 1.
        n_mels: M.
        kind: ``utterance`` takes the mean of each recording away first, as cepstral mean normalisation does: whatever a
            microphone or a room multiplies is gone. ``mean`` is then not used. ``level`` makes the loudest band of all
            recordings equally loud and leaves the spectrum's shape; silence stays far below.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, mean: tuple[float, ...], std: tuple[float, ...], n_mels: int, kind: Normalisation = "global"
    ) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.tensor(mean) if mean else torch.zeros(n_mels))
        self.register_buffer("std", torch.tensor(std) if std else torch.ones(n_mels))

    def forward(self, features: Tensor, counts: Tensor) -> Tensor:
        """Map features (B, T, M), of which the first ``counts`` (B,) frames are real, to the same shape."""
        real = (torch.arange(features.shape[1], device=features.device) < counts[:, None])[..., None]
        if self.kind == "utterance":
            mean = (features * real).sum(1, keepdim=True) / counts.clamp(min=1)[:, None, None]  # (B, 1, M)
        elif self.kind == "level":
            loudest = features.masked_fill(~real, -math.inf).amax((1, 2), keepdim=True)  # (B, 1, 1)
            mean = self.mean - self.mean.max() + loudest.clamp(min=QUIET)
        else:
            mean = self.mean
        return (features - mean) * real / self.std


class ConvSubsampling(nn.Module):
    """3 x 3 convolutions with strides and ReLU over time and channels, then one projection of what is left of a frame.

    Without padding: an output reads the frames ``factor * t`` and the following ones only, so that a recording's end is
    the only place where padding could be read, and ``counts`` ends before.

    Args:
        n_mels: M.
        dim: D.
        factor: Frames to one position: 1, 2, 4, 6 or 8.
        channels: C; 0 for D, as ESPnet has it.
        grid: Whether the channels are kept as a second axis, for backbones over time x frequency.
        padding: ``espnet`` counts as real what reads at least one real frame.
    """

    def __init__(
        self, n_mels: int, dim: int, factor: int, *, channels: int = 0, grid: bool = False, padding: Padding = "masked"
    ) -> None:
        super().__init__()
        if factor not in LAYERS:
            raise ConfigError(f"ConvSubsampling: factor must be 1, 2, 4, 6 or 8, got {factor}.")
        channels = channels or dim
        self.layers, self.grid, self.padding = LAYERS[factor], grid, padding
        self.factor, self.channels = factor, channels
        self.bands = self._out(n_mels)  # channels that are left
        if self.bands < 1:
            raise ConfigError(f"ConvSubsampling: n_mels={n_mels} is too few for a factor of {factor}.")
        convs: list[nn.Module] = []
        for number, (kernel, stride) in enumerate(self.layers):
            convs += [nn.Conv2d(channels if number else 1, channels, kernel, stride), nn.ReLU(inplace=True)]
        self.conv = nn.Sequential(*convs)
        self.out = nn.Linear(channels if grid else channels * self.bands, dim)

    def forward(self, features: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Map features (B, T, M) to (B, T', D), or (B, T', M', D) as a grid, and the numbers of positions (B,)."""
        positions = self._out(features.shape[1])
        size = positions
        if not torch.is_grad_enabled() and features.device.type == "cpu" and not torch.compiler.is_compiling():
            widest = len(features) * self.channels * features.shape[2] * self.factor // self.layers[0][1] ** 2
            size = max(SHORTEST_PIECE, PIECE_FLOATS // max(widest, 1))
        if size >= positions:
            y = self._convolve(features)
        else:
            size = -(-positions // -(-positions // size))  # evenly
            parts = [
                features[:, at * self.factor : (min(at + size, positions) - 1) * self.factor + self.look_ahead + 1]
                for at in range(0, positions, size)
            ]
            y = torch.cat([self._convolve(part) for part in parts], dim=1)
        return y, self.output_count(counts, features.shape[1])

    def _convolve(self, features: Tensor) -> Tensor:
        first = self.conv[0]
        assert isinstance(first, nn.Conv2d)
        weight = first.weight
        if self.channels >= WIDE:  # whose outputs, and those of all that follow, then lie channels last
            weight = weight.to(memory_format=torch.channels_last)
        x = F.conv2d(features[:, None], weight, first.bias, first.stride)
        for number in range(1, len(self.conv)):
            x = self.conv[number](x)  # (B, C, T', M')
        return self.out(x.permute(0, 2, 3, 1) if self.grid else x.transpose(1, 2).flatten(2))

    def output_count(self, counts: Tensor, longest: int = 0) -> Tensor:
        """Return how many positions come of so many frames; ``longest`` is the number of frames with padding."""
        for kernel, stride in self.layers:
            if self.padding == "espnet":
                longest = (longest - kernel) // stride + 1
                counts = ((counts + stride - 1) // stride).clamp(max=longest)
            else:
                counts = ((counts - kernel) // stride + 1).clamp(min=0)
        return counts

    @property
    def look_ahead(self) -> int:
        """Frames behind its first one that a position reads."""
        frames = 1
        for kernel, stride in reversed(self.layers):
            frames = (frames - 1) * stride + kernel
        return frames - 1

    def _out(self, size: int) -> int:
        for kernel, stride in self.layers:
            size = (size - kernel) // stride + 1 if size >= kernel else 0
        return size


def mel_bands(sample_rate: int, n_fft: int, n_mels: int) -> Tensor:
    """Triangles over the bins of a spectrum, evenly spaced on Slaney's mel scale and of equal area.

    Slaney's Auditory Toolbox (1998): linear up to 1 kHz, logarithmic above. In float64, because the logarithm of small
    powers shows the rounding of float32.

    Returns:
        float32 (n_fft / 2 + 1, M).
    """
    linear, step = 3 / 200, math.log(6.4) / 27  # mels a Hz below 1 kHz; logarithm of Hz a mel above
    top = sample_rate / 2
    highest = top * linear if top < 1000 else 15 + math.log(top / 1000) / step
    mels = torch.linspace(0, highest, n_mels + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels / linear, 1000 * ((mels - 15) * step).exp())  # (M + 2,), in Hz
    bins = torch.linspace(0, top, n_fft // 2 + 1, dtype=torch.float64)[:, None]
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    area = 2 / (edges[2:] - edges[:-2])
    return (torch.minimum(rising, falling).clamp(min=0) * area).float()
