"""What training does to recordings at random: to waves, and to log-mel features.

Every draw is a function of (seed, epoch, item): a batch comes out the same whatever the workers, ranks or a resume.

Sources: speed perturbation (Ko et al. 2015), SpecAugment (https://arxiv.org/abs/1904.08779) as ESPnet draws it, vocal
tract length perturbation (Jaitly and Hinton 2013).

Shapes: B recordings, N samples, T frames, M log-mel channels.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy import fft
from torch import Tensor

from vertebra.backbones.random import draw_uniform, item_uniform
from vertebra.errors import ConfigError, DataError

Wave = NDArray[np.float32]
Colour = Literal["white", "pink", "brown"]
Entry = TypeVar("Entry")

# salts of the draws
_SPEED, _LEFT, _RIGHT, _REVERB, _ROOM, _SECONDS, _RATIO, _TAIL, _NOISE, _SNR, _COLOUR, _HISS, _FILE, _START = range(
    401, 415
)
_PHONE, _LOWPASS, _CUTOFF, _VOLUME, _WARP = range(415, 420)
_FREQ, _TIME = 1000, 2000  # and as many more as there are masks

_SLOPES = {"white": 0.0, "pink": 0.5, "brown": 1.0}  # amplitude falls with frequency to this power
_PHONE_BAND = (300.0, 3400.0)  # Hz, ITU-T G.712
_EDGE = 0.15  # share of a cut-off frequency over which the gain falls to 0
_DIRECT = 0.0025  # s after the direct sound in which nothing arrives
_FLAT = 50.0  # Hz below which noise does not rise: what nobody hears would take all its power


# ---------------------------------------------------------------- waves


@dataclass(frozen=True, kw_only=True)
class Augment:
    """What training does to waves at random; nothing by default.

    Ranges are (smallest, largest), and draws uniform. The order is that of the fields.

    Args:
        speed: Factors of speed; pitch and formants move along.
        speed_step: Distance between the factors: 0.1 makes 0.9, 1 and 1.1 of the range 0.9 to 1.1.
        pad_seconds: Largest silence put before, and behind.
        reverb_probability: Share of recordings that are put into a room.
        rir_files: File, or folder of files, with impulse responses; None for exponentially decaying noise.
        reverb_seconds: Time in which such noise falls by 60 dB.
        reverb_ratio_db: Energy of the direct sound over that of such noise.
        noise_probability: Share of recordings with noise.
        noise_snr_db: Power of the recording over that of the noise, silence that was put there not counted.
        noise_files: File, or folder of files, with noise; None for generated noise.
        noise_colours: Kinds of generated noise.
        phone_probability: Share of recordings cut to 300 to 3400 Hz.
        lowpass_probability: Share of recordings with a low-pass filter.
        lowpass_hz: Cut-off of that filter.
        volume_db: Gain.

    Raises:
        ConfigError: A value out of range.
    """

    speed: tuple[float, float] = (1.0, 1.0)
    speed_step: float = 0.01
    pad_seconds: float = 0.0
    reverb_probability: float = 0.0
    rir_files: str | None = None
    reverb_seconds: tuple[float, float] = (0.1, 0.6)
    reverb_ratio_db: tuple[float, float] = (0.0, 12.0)
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 30.0)
    noise_files: str | None = None
    noise_colours: tuple[Colour, ...] = ("white", "pink", "brown")
    phone_probability: float = 0.0
    lowpass_probability: float = 0.0
    lowpass_hz: tuple[float, float] = (2000.0, 6000.0)
    volume_db: tuple[float, float] = (0.0, 0.0)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # from JSON
                value = tuple(value)
                object.__setattr__(self, field.name, value)
            if field.name.endswith("_probability") and not 0 <= value <= 1:
                raise ConfigError(f"augment: {field.name} must be from 0 to 1, got {value}.")
        for name, lowest in (
            ("speed", 0.5),
            ("reverb_seconds", 0.01),
            ("reverb_ratio_db", -40.0),
            ("noise_snr_db", -60.0),
            ("lowpass_hz", 100.0),
            ("volume_db", -60.0),
        ):
            pair = getattr(self, name)
            if len(pair) != 2 or not lowest <= pair[0] <= pair[1] < math.inf:
                raise ConfigError(f"augment: {name} must be two rising numbers from {lowest:g}, got {pair}.")
        if self.speed[1] > 2:
            raise ConfigError(f"augment: speed must be at most 2, got {self.speed[1]}.")
        if not self.speed_step >= 0.001:
            raise ConfigError(f"augment: speed_step must be at least 0.001, got {self.speed_step}.")
        if not 0 <= self.pad_seconds < math.inf:
            raise ConfigError(f"augment: pad_seconds must be at least 0, got {self.pad_seconds}.")
        unknown = [c for c in self.noise_colours if c not in _SLOPES]
        if unknown or not self.noise_colours:
            raise ConfigError(f"augment: noise_colours must be of {', '.join(_SLOPES)}, got {self.noise_colours}.")

    @property
    def fastest(self) -> float:
        """The largest factor of speed that is drawn."""
        return self.speeds[-1]

    @property
    def speeds(self) -> list[float]:
        """All factors of speed, rising, to three digits."""
        low, high = self.speed
        return [round(low + i * self.speed_step, 3) for i in range(int((high - low) / self.speed_step + 1e-6) + 1)]


class WaveAugment:
    """Changes one wave at a time.

    Args:
        augment: What is random.
        sample_rate: Samples a second.
        seed: Seed of the draws.

    Raises:
        DataError: No noise or no impulse responses where files of them were named.
    """

    def __init__(self, augment: Augment, sample_rate: int, seed: int = 0) -> None:
        self.augment, self.sample_rate, self.seed = augment, sample_rate, seed
        self._speeds = augment.speeds
        self._noises = _recordings(augment.noise_files, "noise_files") if augment.noise_probability else []
        self._rooms = _recordings(augment.rir_files, "rir_files") if augment.reverb_probability else []

    def __call__(self, wave: Wave, epoch: int, item: int) -> Wave:
        """Change a wave (N,) as ``item`` is changed in ``epoch``; the length is another where speed or silence is."""
        draws = _Draws(self.seed, epoch, item)
        a, rate = self.augment, self.sample_rate
        out = change_speed(wave, draws.choice(_SPEED, self._speeds))
        power = mean_power(out)
        if a.pad_seconds:
            sides = [int(draws(salt) * (a.pad_seconds * rate + 1)) for salt in (_LEFT, _RIGHT)]
            out = np.pad(out, sides)
        if draws(_REVERB) < a.reverb_probability:
            out = reverberate(out, self._room(draws))
        if draws(_NOISE) < a.noise_probability:
            snr = draws.between(_SNR, a.noise_snr_db)
            out = mix(out, self._noise(draws, len(out)), snr, power)
        if draws(_PHONE) < a.phone_probability:
            out = band_pass(out, rate, *_PHONE_BAND)
        if draws(_LOWPASS) < a.lowpass_probability:
            out = band_pass(out, rate, 0.0, draws.between(_CUTOFF, a.lowpass_hz))
        if a.volume_db != (0.0, 0.0):
            out = out * np.float32(10 ** (draws.between(_VOLUME, a.volume_db) / 20))
        return out

    def _room(self, draws: _Draws) -> Wave:
        if self._rooms:
            return _read_room(draws.choice(_ROOM, self._rooms), self.sample_rate)
        return synthetic_room(
            draws.between(_SECONDS, self.augment.reverb_seconds),
            draws.between(_RATIO, self.augment.reverb_ratio_db),
            self.sample_rate,
            draws.generator(_TAIL),
        )

    def _noise(self, draws: _Draws, samples: int) -> Wave:
        if self._noises:
            return _read_noise(draws.choice(_FILE, self._noises), self.sample_rate, samples, draws(_START))
        colour = draws.choice(_COLOUR, self.augment.noise_colours)
        return coloured_noise(colour, samples, self.sample_rate, draws.generator(_HISS))


class _Draws:
    """Random numbers of one item in one epoch."""

    def __init__(self, seed: int, epoch: int, item: int) -> None:
        self.key = (seed, epoch, item)

    def __call__(self, salt: int) -> float:
        """A number from 0 to below 1."""
        return draw_uniform(*self.key, salt)

    def between(self, salt: int, pair: tuple[float, float]) -> float:
        """A number within a range."""
        return pair[0] + (pair[1] - pair[0]) * self(salt)

    def choice(self, salt: int, entries: Sequence[Entry]) -> Entry:
        """One of the entries."""
        return entries[int(self(salt) * len(entries))]

    def generator(self, salt: int) -> np.random.Generator:
        """A generator for many numbers."""
        return np.random.default_rng(int(self(salt) * 2**53))


def change_speed(wave: Wave, factor: float) -> Wave:
    """Play a wave (N,) ``factor`` times as fast, to three digits: N / factor samples, frequencies times ``factor``."""
    from vertebra.domains.speech.audio import resample

    return resample(wave, round(factor * 1000), 1000)


def mean_power(wave: Wave) -> float:
    """Mean square of a wave; 0 of an empty one."""
    return float(np.square(wave, dtype=np.float64).mean()) if len(wave) else 0.0


def mix(wave: Wave, noise: Wave, snr_db: float, power: float | None = None) -> Wave:
    """Add noise, scaled to a signal-to-noise ratio.

    Args:
        wave: (N,).
        noise: (N,).
        snr_db: 10 log10 of the power of the signal over that of the noise.
        power: Mean power of the signal; None for that of ``wave``.

    Returns:
        (N,); ``wave`` as it is where the signal or the noise is silent, so that there is no ratio.
    """
    signal, other = mean_power(wave) if power is None else power, mean_power(noise)
    if not signal or not other:
        return wave
    return wave + noise * np.float32(math.sqrt(signal / other) * 10 ** (-snr_db / 20))


def coloured_noise(colour: Colour, samples: int, sample_rate: int, rng: np.random.Generator) -> Wave:
    """Noise (N,) of mean power 1, whose power is even (white), or falls by 3 or 6 dB an octave above 50 Hz."""
    size = fft.next_fast_len(max(samples, 2), real=True)
    spectrum = fft.rfft(rng.standard_normal(size, dtype=np.float32))
    spectrum[0] = 0
    spectrum *= np.maximum(fft.rfftfreq(size, 1 / sample_rate), _FLAT).astype(np.float32) ** -_SLOPES[colour]
    noise: Wave = fft.irfft(spectrum, size)[:samples].astype(np.float32)
    return noise / np.float32(math.sqrt(mean_power(noise)) or 1.0)


def synthetic_room(seconds: float, ratio_db: float, sample_rate: int, rng: np.random.Generator) -> Wave:
    """Impulse response of a room: the direct sound, then noise that decays exponentially.

    Args:
        seconds: Time in which it falls by 60 dB; also the length.
        ratio_db: Energy of the direct sound over that of what follows.
        sample_rate: Samples a second.
        rng: Of the noise.
    """
    samples = max(2, round(seconds * sample_rate))
    time = np.arange(samples) / sample_rate
    tail = rng.standard_normal(samples) * 10 ** (-3 * time / seconds)
    tail[: min(samples - 1, 1 + int(_DIRECT * sample_rate))] = 0
    tail *= 10 ** (-ratio_db / 20) / math.sqrt(np.square(tail).sum())
    tail[0] = 1
    return tail.astype(np.float32)


def reverberate(wave: Wave, response: Wave) -> Wave:
    """Put a wave (N,) into a room: same length, mean power, and place of the direct sound.

    Args:
        wave: (N,).
        response: Impulse response (K,); its largest value is taken for the direct sound.
    """
    direct = int(np.abs(response).argmax()) if len(response) else 0
    size = fft.next_fast_len(len(wave) + len(response), real=True)
    wet: Wave = fft.irfft(fft.rfft(wave, size) * fft.rfft(response, size), size)[direct : direct + len(wave)]
    power = mean_power(wet)
    if not power:
        return wave
    return (wet * math.sqrt(mean_power(wave) / power)).astype(np.float32)


def band_pass(wave: Wave, sample_rate: int, low: float, high: float) -> Wave:
    """Keep the frequencies from ``low`` to ``high`` Hz of a wave (N,); the gain falls smoothly outside of them."""
    size = fft.next_fast_len(len(wave) + sample_rate // 20, real=True)  # room for the filter's ringing
    hz = fft.rfftfreq(size, 1 / sample_rate)
    above = np.clip((hz - high) / (_EDGE * high), 0, 1)
    below = np.clip((low - hz) / (_EDGE * low), 0, 1) if low else 0.0
    gain = np.cos(above * math.pi / 2) ** 2 * np.cos(below * math.pi / 2) ** 2
    kept: Wave = fft.irfft(fft.rfft(wave, size) * gain.astype(np.float32), size)[: len(wave)].astype(np.float32)
    return kept


def _recordings(place: str | None, name: str) -> list[str]:
    if place is None:
        return []
    from vertebra.domains.speech.audio import AUDIO_ENDINGS

    path = Path(place)
    if path.is_file():
        return [str(path)]
    found = sorted(str(p) for p in path.rglob("*") if p.suffix.lower() in AUDIO_ENDINGS)
    if not found:
        raise DataError(f"augment: {name} must be a recording or a folder of them, got {place}; correct the path.")
    return found


@lru_cache(maxsize=64)
def _read_room(path: str, sample_rate: int) -> Wave:
    from vertebra.domains.speech.audio import read_audio

    response = read_audio(path, sample_rate)
    if not response.any():
        raise DataError(f"augment: {path} must be an impulse response, got silence; leave it out of rir_files.")
    return response


def _read_noise(path: str, sample_rate: int, samples: int, draw: float) -> Wave:
    """Part of a recording (N,), from a random place on; repeated where it is too short."""
    from vertebra.domains.speech.audio import audio_info, read_audio

    length, wanted = audio_info(path).duration, samples / sample_rate
    if length <= wanted:
        noise = read_audio(path, sample_rate)
        return np.resize(np.roll(noise, -int(draw * len(noise))), samples)
    noise = read_audio(path, sample_rate, start=draw * (length - wanted), duration=wanted)
    return np.resize(noise, samples)  # rounding of rates may leave a sample too few


# ---------------------------------------------------------------- features


@dataclass(frozen=True, kw_only=True)
class SpecAugment:
    """Masks over channels and time of log-mel features, and other vocal tracts.

    Args:
        freq_masks: Masks of channels, which may overlap.
        freq_width: Widths are drawn from 0 to below this number of channels.
        time_masks: Masks of frames.
        time_ratio: Widths are drawn from 0 to below this share of a recording's frames.
        fill: What stands in masks: ``zero``, or the ``mean`` of a recording's real frames.
        warp: Frequencies are scaled by a factor from 1 - warp to 1 + warp, as a longer or shorter vocal tract would.
        warp_top_hz: Frequency at the upper end of the last channel, half the sample rate; Slaney's mel scale from 0.

    Raises:
        ConfigError: A value out of range.
    """

    freq_masks: int = 2
    freq_width: int = 27
    time_masks: int = 10
    time_ratio: float = 0.05
    fill: Literal["zero", "mean"] = "zero"
    warp: float = 0.0
    warp_top_hz: float = 8000.0

    def __post_init__(self) -> None:
        for name, limit in (("freq_masks", 100), ("time_masks", 100), ("time_ratio", 1), ("warp", 0.5)):
            if not 0 <= getattr(self, name) <= limit:
                raise ConfigError(f"spec_augment: {name} must be from 0 to {limit}, got {getattr(self, name)}.")
        if self.freq_width < 1:
            raise ConfigError(f"spec_augment: freq_width must be at least 1, got {self.freq_width}.")
        if self.fill not in ("zero", "mean"):
            raise ConfigError(f"spec_augment: fill must be zero or mean, got {self.fill!r}.")
        if not self.warp_top_hz > 0:
            raise ConfigError(f"spec_augment: warp_top_hz must be above 0, got {self.warp_top_hz}.")

    def __call__(self, features: Tensor, lengths: Tensor, seed: int, epoch: int, items: ArrayLike) -> Tensor:
        """Change features (B, T, M) within their real frames.

        Args:
            features: (B, T, M).
            lengths: Real frames of each (B,).
            seed: Seed of the draws.
            epoch: Epoch.
            items: Numbers of the items (B,).

        Raises:
            ConfigError: ``freq_width`` is above M.
        """
        channels = features.shape[2]
        if self.freq_masks and self.freq_width > channels:
            raise ConfigError(
                f"spec_augment: freq_width must be at most the number of channels, {channels}, got {self.freq_width}."
            )
        numbers = np.asarray(items)

        def draw(start: int, count: int) -> Tensor:
            """Numbers (B, count, 1)."""
            found = np.stack([item_uniform(seed, epoch, numbers, start + i) for i in range(count)], 1)
            return torch.from_numpy(found)[..., None].to(features.device, torch.float32)

        lengths = lengths.to(features.device)
        real = torch.arange(features.shape[1], device=features.device) < lengths[:, None]  # (B, T)
        out = features
        if self.warp:
            factors = 1 + self.warp * (2 * draw(_WARP, 1)[:, 0, 0] - 1)  # (B,)
            out = torch.where(real[..., None], warp_channels(out, factors, self.warp_top_hz), out)
        if self.freq_masks or (self.time_masks and self.time_ratio):
            masked = torch.zeros_like(features, dtype=torch.bool)
            if self.freq_masks:
                size = torch.tensor(float(channels), device=features.device)
                widths = (draw(_FREQ, self.freq_masks) * self.freq_width).floor()
                masked |= _cover(widths, draw(_FREQ + 500, self.freq_masks), size, channels)[:, None]  # (B, 1, M)
            if self.time_masks and self.time_ratio:
                sizes = lengths.float()[:, None, None]
                widths = (draw(_TIME, self.time_masks) * (self.time_ratio * sizes)).floor()
                masked |= _cover(widths, draw(_TIME + 1000, self.time_masks), sizes, features.shape[1])[..., None]
            out = torch.where(masked & real[..., None], self._filling(out, real), out)
        return out

    def _filling(self, features: Tensor, real: Tensor) -> Tensor:
        """What stands in masks: () or (B, 1, 1)."""
        if self.fill == "zero":
            return features.new_zeros(())
        count = (real.sum(1) * features.shape[2]).clamp_min(1)
        return ((features * real[..., None]).sum((1, 2)) / count)[:, None, None].to(features.dtype)


def _cover(widths: Tensor, places: Tensor, size: Tensor, count: int) -> Tensor:
    """Union of intervals: ``widths`` and ``places`` in [0, 1) are (B, K, 1), the result is bool (B, count)."""
    start = (places * (size - widths + 1)).floor()
    start = torch.minimum(start, size - widths)  # the product may be rounded up
    at = torch.arange(count, device=widths.device)
    return ((at >= start) & (at < start + widths)).any(1)


def warp_channels(features: Tensor, factors: Tensor, top_hz: float) -> Tensor:
    """Scale the frequencies of log-mel features (B, T, M) by ``factors`` (B,).

    What was at f Hz comes to factor * f. Near the upper end the map bends, so that ``top_hz`` stays where it is
    (Jaitly and Hinton 2013, equation 1, with the bend at 0.6 of the top). Channels are interpolated linearly.
    """
    channels = features.shape[2]
    dtype = torch.float64
    mels = _to_mel(torch.tensor(top_hz, dtype=dtype)) * torch.arange(1, channels + 1, dtype=dtype) / (channels + 1)
    hz = _to_hz(mels).to(features.device, torch.float32)  # (M,) centres
    factor = factors[:, None]
    bend = 0.6 * top_hz * factor.clamp(max=1)  # of the result
    source_bend = bend / factor
    beyond = top_hz - (top_hz - hz) * (top_hz - source_bend) / (top_hz - bend)
    source = torch.where(hz <= bend, hz / factor, beyond)  # (B, M)
    place = (_to_mel(source.to(dtype)) * ((channels + 1) / _to_mel(torch.tensor(top_hz, dtype=dtype))) - 1).float()
    place = place.clamp(0, channels - 1)
    low = place.floor().long().clamp(max=max(channels - 2, 0))
    share = (place - low).to(features.dtype)[:, None]  # (B, 1, M)
    high = (low + 1).clamp(max=channels - 1)
    shape = (-1, features.shape[1], -1)
    below = features.gather(2, low[:, None].expand(shape))
    above = features.gather(2, high[:, None].expand(shape))
    return below + share * (above - below)


def _to_mel(hz: Tensor) -> Tensor:
    """Slaney's scale: linear up to 1 kHz, logarithmic above."""
    return torch.where(hz < 1000, hz * 3 / 200, 15 + (hz.clamp_min(1000) / 1000).log() * (27 / math.log(6.4)))


def _to_hz(mel: Tensor) -> Tensor:
    return torch.where(mel < 15, mel * 200 / 3, 1000 * ((mel - 15) * (math.log(6.4) / 27)).exp())
