"""A small speech synthesiser for digits of three languages: a voice source and noise through resonators.

After D. H. Klatt, "Software for a cascade/parallel formant synthesizer", JASA 67 (1980): pulses of the glottis and
breath pass a cascade of five resonators; the noise of fricatives and bursts passes one of its own. Formants of vowels
are near those that Peterson and Barney (1952) measured. The words can be told apart and are no one's voice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

from vertebra.domains.speech.audio import resample
from vertebra.domains.speech.phones import PHONES, WORDS, Target
from vertebra.errors import ConfigError, DataError

Values = NDArray[np.float64]

DIGITS = tuple(WORDS["eng"])
RATE = 16_000  # samples a second at which all is made
_BLOCK = 80  # samples of constant resonators, 5 ms
_SLOW, _FAST = 13, 5  # blocks over which formants and loudness pass from one target to the next
_MARGIN = 0.03  # s of silence around the words
_NOISE = (3e-4, 3e-3)  # of the background, where the loudest sample is 1
_UPPER = ((3500.0, 220.0), (4400.0, 300.0))  # F4 and F5 of a man, with their widths, in Hz


@dataclass(frozen=True, kw_only=True)
class Voice:
    """How someone speaks.

    Args:
        name: Letters only.
        pitch: Mean of the fundamental frequency, in Hz.
        scale: Factor of all formants: 1 for a man, 1.17 for a woman, 1.3 for a child.
        tempo: Factor of speed.
        breath: Noise in the voice, from 0 to 1.
        tilt: How dull the voice is, from 0 to 1, excluded.
    """

    name: str
    pitch: float
    scale: float = 1.0
    tempo: float = 1.0
    breath: float = 0.05
    tilt: float = 0.5

    def __post_init__(self) -> None:
        if not (40 <= self.pitch <= 500 and 0.7 <= self.scale <= 1.5 and 0.3 <= self.tempo <= 3):
            raise ConfigError(
                f"Voice: pitch must lie in 40..500 Hz, scale in 0.7..1.5 and tempo in 0.3..3, got {self.pitch}, "
                f"{self.scale} and {self.tempo}."
            )
        if not (0 <= self.breath <= 1 and 0 <= self.tilt < 1):
            raise ConfigError(
                f"Voice: breath must lie in 0..1 and tilt in 0..1, 1 excluded, got {self.breath} and {self.tilt}."
            )


VOICES = (
    Voice(name="adam", pitch=112, scale=1.0, tempo=1.0, breath=0.04, tilt=0.25),
    Voice(name="clara", pitch=208, scale=1.17, tempo=1.05, breath=0.10, tilt=0.35),
    Voice(name="bruno", pitch=92, scale=0.94, tempo=0.9, breath=0.06, tilt=0.40),
    Voice(name="dora", pitch=184, scale=1.12, tempo=0.95, breath=0.05, tilt=0.20),
    Voice(name="finn", pitch=265, scale=1.28, tempo=1.1, breath=0.12, tilt=0.30),
    Voice(name="hugo", pitch=132, scale=1.04, tempo=1.15, breath=0.08, tilt=0.15),
    Voice(name="irma", pitch=225, scale=1.20, tempo=0.88, breath=0.16, tilt=0.40),
    Voice(name="karl", pitch=104, scale=0.97, tempo=1.2, breath=0.03, tilt=0.10),
)
"""Men, women and a child; ``adam`` first."""


def random_voice(name: str, seed: int | Sequence[int]) -> Voice:
    """Make up someone who speaks about as those of ``VOICES``: the shorter the vocal tract, the higher the pitch."""
    rng = np.random.default_rng(seed)
    scale = float(rng.uniform(0.92, 1.32))
    return Voice(
        name=name,
        pitch=110 * float(np.exp(3.1 * (scale - 1) + rng.normal(0, 0.12))),
        scale=scale,
        tempo=float(rng.uniform(0.85, 1.25)),
        breath=float(rng.uniform(0.02, 0.20)),
        tilt=float(rng.uniform(0.05, 0.45)),
    )


def say(
    words: Sequence[str],
    voice: Voice,
    *,
    sample_rate: int = 8000,
    seed: int | Sequence[int] = 0,
    gap: float | Sequence[float] = 0.1,
    language: str = "eng",
) -> tuple[NDArray[np.float32], list[tuple[str, float, float]]]:
    """Speak digits; the same arguments give the same samples.

    Args:
        words: Digits by name, at least one; see ``WORDS``.
        voice: Who speaks.
        sample_rate: Samples a second of the result. Nothing is above 8 kHz.
        seed: Draws the take: pitch, its course, tempo and formants of each word, loudness.
        gap: Seconds of silence between words: one number, or one for each of the gaps. At 0, words flow together.
        language: Of the words: ``eng``, ``deu`` or ``spa``.

    Returns:
        Samples (N,), at most 0.5, and the begin and end of each word in seconds.

    Raises:
        DataError: A word is no digit of the language, there are none, or the gaps do not fit.
        ConfigError: There is no such language.
    """
    if language not in WORDS:
        raise ConfigError(f"say: language must be one of {', '.join(WORDS)}, got {language!r}.")
    known = WORDS[language]
    gaps = [float(g) for g in gap] if isinstance(gap, Sequence) else [float(gap)] * (len(words) - 1)
    if unknown := [w for w in words if w not in known]:
        raise DataError(f"say: words must be among {', '.join(known)}, got {unknown[0]!r}.")
    if not words or len(gaps) != len(words) - 1 or min(gaps, default=0) < 0:
        raise DataError(
            f"say: there must be a word at least, and a gap of 0 or more between two; got {len(words)} words and the "
            f"gaps {gaps[:3]}."
        )
    rng = np.random.default_rng(seed)
    pitch = voice.pitch * float(np.exp(rng.normal(0, 0.05)))
    tempo = voice.tempo * float(np.exp(rng.normal(0, 0.07)))
    plan: list[Target] = []
    times: list[tuple[str, float, float]] = []
    at = _MARGIN
    for word, after in zip(words, [*gaps, _MARGIN], strict=True):
        part = list(_draw(known[word], rng, voice.scale, tempo))
        if not plan:
            plan.append(_silent(part[0], _MARGIN))
        elif gaps[len(times) - 1]:
            plan.append(_silent(part[0], gaps[len(times) - 1]))
        start, at = at, at + sum(t.seconds for t in part)
        times.append((word, start, at))
        at += after
        plan += part
    plan.append(_silent(plan[-1], _MARGIN))
    wave = _render(plan, pitch, times, voice, rng)
    out = resample(wave.astype(np.float32), RATE, sample_rate)
    level = 0.5 * float(np.exp(-rng.uniform(0, 0.7)))
    return out * np.float32(level / np.abs(out).max()), times


def _draw(phones: str, rng: np.random.Generator, scale: float, tempo: float) -> Iterable[Target]:
    """Targets of a word, as one says it this time."""
    pace = tempo * np.exp(rng.normal(0, 0.06))
    for phone in phones.split():
        stretch = np.exp(rng.normal(0, 0.06)) / pace
        shift = scale * np.exp(rng.normal(0, 0.025, 3))
        noise = np.exp(rng.normal(0, 0.15))
        for target in PHONES[phone]:
            yield _changed(target, float(stretch), shift, float(noise))


def _changed(target: Target, stretch: float, shift: Values, noise: float) -> Target:
    """Change the length, the formants (3,) and the noises of a target by factors."""
    return target._replace(
        seconds=target.seconds * stretch,
        f1=target.f1 * shift[0],
        f2=target.f2 * shift[1],
        f3=target.f3 * shift[2],
        breath=target.breath * noise,
        hiss=target.hiss * noise,
        centre=target.centre * min(float(shift.mean()), 1.15),
    )


def _silent(target: Target, seconds: float) -> Target:
    return target._replace(seconds=seconds, voice=0.0, breath=0.0, hiss=0.0)


def _render(
    plan: list[Target], pitch: float, times: list[tuple[str, float, float]], voice: Voice, rng: np.random.Generator
) -> Values:
    """Samples (N,) of the targets, one after the other."""
    edges = np.cumsum([t.seconds for t in plan])
    count = int(np.ceil(edges[-1] * RATE / _BLOCK))
    middles = (np.arange(count) + 0.5) * _BLOCK / RATE
    rows = np.array(plan)[np.minimum(np.searchsorted(edges, middles), len(plan) - 1)]  # (blocks, 10)
    formants = _smooth(rows[:, 1:4], _SLOW)
    loud = _smooth(rows[:, 4:7] * _swell(middles, times)[:, None], _FAST)
    hz = pitch * _course(middles, times, rng)
    voiced, breath, hiss = (_between(column) for column in loud.T)  # (samples,)
    cycle = np.cumsum(_between(hz)) / RATE % 1.0
    noise = rng.normal(0, 1, (2, count * _BLOCK))
    source = _pulses(cycle) * voiced + (breath + voice.breath * voiced * (0.3 + (cycle < 0.6))) * 0.12 * noise[0]
    damping = _smooth(rows[:, 9:10], _FAST)[:, 0]
    spoken = lfilter([1 - voice.tilt], [1, -voice.tilt], source)
    for centre, width in _UPPER:
        spoken = _resonate(spoken, np.full(1, centre * voice.scale), np.full(1, width))
    for centres, width in zip(formants.T, (60.0, 90.0, 140.0), strict=True):
        spoken = _resonate(spoken, centres, width * damping)
    mouth = np.diff(spoken, prepend=0.0)  # the lips radiate the change of the flow
    rustle = _resonate(noise[1], rows[:, 7], rows[:, 8], band=True) * hiss
    peak = float(np.abs(mouth).max()) or 1.0
    mix = mouth / peak + 0.30 * rustle
    floor = np.exp(rng.uniform(*np.log(_NOISE)))
    return mix / np.abs(mix).max() + floor * rng.normal(0, 1, len(mix))


def _course(middles: Values, times: list[tuple[str, float, float]], rng: np.random.Generator) -> Values:
    """Pitch (blocks,) as a factor: falling over what is said, with an arch over every word."""
    total = times[-1][2]
    factor = 1.12 - 0.24 * middles / total
    arch = np.zeros_like(middles)
    for _, start, end in times:
        inside = np.clip((middles - start) / (end - start), 0, 1)
        arch += rng.uniform(0.03, 0.14) * np.sin(np.pi * inside**0.7)
    values: Values = factor + arch
    return values


def _swell(middles: Values, times: list[tuple[str, float, float]]) -> Values:
    """Loudness (blocks,) as a factor: words fade."""
    factor = np.ones_like(middles)
    for _, start, end in times:
        inside = (middles - start) / (end - start)
        factor = np.where((inside >= 0) & (inside <= 1), 1 - 0.75 * np.clip(inside, 0, 1) ** 2.5, factor)
    return factor


def _pulses(cycle: Values) -> Values:
    """Flow through the glottis at points of its cycle, from 0 to 1: opens, closes sooner, stays shut."""
    part = cycle / 0.6
    flow: Values = np.where(part < 1, 6.75 * part**2 * (1 - part), 0.0)
    return flow - 0.3


def _smooth(values: Values, width: int) -> Values:
    """Average (blocks, columns) over a Hann window of ``width`` blocks."""
    window = np.hanning(width + 2)[1:-1]
    padded = np.pad(values, ((width // 2, width // 2), (0, 0)), mode="edge")
    columns = [np.convolve(column, window / window.sum(), "valid") for column in padded.T]
    return np.stack(columns, 1)


def _between(values: Values) -> Values:
    """A value for every sample, from one for the middle of each block."""
    middles = (np.arange(len(values)) + 0.5) * _BLOCK
    return np.interp(np.arange(len(values) * _BLOCK) + 0.5, middles, values)


def _resonate(wave: Values, centres: Values, widths: Values, *, band: bool = False) -> Values:
    """Pass ``wave`` (N,) through a resonator that changes from block to block (blocks,), or never where there is one.

    Its gain is 1 at 0 Hz, so that low tones do not feel the changes; that of a ``band`` is 1 in its middle and 0 there.
    """
    radius = np.exp(-np.pi * widths / RATE)
    one = -2 * radius * np.cos(2 * np.pi * np.minimum(centres, 0.47 * RATE) / RATE)
    two = radius**2
    gains = (1 - two) / 2 if band else 1 + one + two
    if band:
        wave = wave - np.concatenate([np.zeros(2), wave[:-2]])
    out = np.empty_like(wave)
    last, before = 0.0, 0.0  # of the samples of the result
    size = -(-len(wave) // len(centres))
    changes = np.flatnonzero((np.diff(one, prepend=np.nan) != 0) | (np.diff(two, prepend=np.nan) != 0))
    for begin, end in itertools.pairwise([*changes.tolist(), len(centres)]):
        gain, a, b = float(gains[begin]), float(one[begin]), float(two[begin])
        part = slice(begin * size, end * size)
        state = [-a * last - b * before, -b * last]
        found, _ = lfilter([gain], [1.0, a, b], wave[part], zi=state)
        out[part] = found
        before, last = float(found[-2]), float(found[-1])
    return out
