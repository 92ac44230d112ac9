"""Fabricated recordings of spoken digits, in the formats that people have; no one's voice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from vertebra.domains.speech.phones import WORDS
from vertebra.domains.speech.synthesis import DIGITS, VOICES, Voice, say

TAKES = (0, 5, 6, 7, 8, 9)
"""Takes of every digit: 0 is for testing and the others for training, as the Free Spoken Digit Dataset has it."""

_SPEAKERS = VOICES[:6]
_STRINGS = (  # ending, container, coding, sample rate, channels
    ("wav", "WAV", "PCM_24", 22_050, 2),
    ("mp3", "MP3", "MPEG_LAYER_III", 44_100, 1),
    ("ogg", "OGG", "VORBIS", 48_000, 1),
    ("wav", "WAV", "ULAW", 8_000, 1),
    ("opus", "OGG", "OPUS", 48_000, 1),
    ("flac", "FLAC", "PCM_16", 16_000, 1),
)
_LANGUAGES = 6  # strings of a speaker in each language
_LONG_RATE, _LONG_SECONDS = 16_000, 60.0
Wave = NDArray[np.float32]


def write_sample(folder: Path, seed: int = 0) -> list[Path]:
    """Fabricate recordings in the formats that the speech domain reads; the same seed gives the same samples.

    Args:
        folder: Where to write; made when missing.
        seed: Seed of everything.

    Returns:
        The files: ``digits/DIGIT_VOICE_TAKE.wav`` (10 digits, 6 voices, 6 takes; 8 kHz), ``strings/`` (six recordings
        of several digits from 8 to 48 kHz, each with its ``.txt``), ``manifest.jsonl`` (the same as NeMo lists them),
        ``languages/`` and ``languages.jsonl`` (strings in three languages, with translations; see ``write_languages``),
        ``long.flac`` (a minute of two speakers), ``long.txt`` (what they say), ``long.ctm`` (when), ``noise/hum.wav``
        and ``noise/room.wav``, the answer of a room to a clap.
    """
    folder = Path(folder)
    for name in ("digits", "strings", "noise"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    paths = []
    for person, voice in enumerate(_SPEAKERS):
        for number, digit in enumerate(DIGITS):
            for take in TAKES:
                wave, _ = say([digit], voice, seed=(seed, 0, person, number, take))
                paths.append(folder / "digits" / f"{number}_{voice.name}_{take}.wav")
                sf.write(paths[-1], wave, 8000, "PCM_16")
    paths += _write_strings(folder, seed)
    splits = {"train": _SPEAKERS[:4], "val": _SPEAKERS[4:5], "test": _SPEAKERS[5:]}
    paths += write_languages(folder, splits, _LANGUAGES, seed)
    paths += _write_long(folder, seed)
    return paths + _write_noise(folder / "noise", np.random.default_rng([seed, 3]))


def _write_strings(folder: Path, seed: int) -> list[Path]:
    paths, lines = [], []
    for number, (ending, container, coding, rate, channels) in enumerate(_STRINGS):
        rng = np.random.default_rng([seed, 1, number])
        voice = _SPEAKERS[number]
        words = [DIGITS[d] for d in rng.integers(0, 10, 3 + number)]
        gaps = rng.uniform(0.03, 0.3, len(words) - 1).tolist()
        wave, _ = say(words, voice, sample_rate=rate, seed=(seed, 1, number), gap=gaps)
        file = folder / "strings" / f"{number + 1:02}_{voice.name}.{ending}"
        both = np.stack([wave, 0.7 * wave], 1) if channels == 2 else wave
        with sf.SoundFile(file, "w", rate, channels, coding, format=container) as stream:
            stream.write(both)
        text = " ".join(words)
        file.with_suffix(".txt").write_text(text + "\n", encoding="ascii")
        record = {"audio_filepath": f"strings/{file.name}", "duration": round(len(wave) / rate, 3), "text": text}
        lines.append(json.dumps({**record, "lang": "eng", "speaker": voice.name}) + "\n")
        paths += [file, file.with_suffix(".txt")]
    paths.append(folder / "manifest.jsonl")
    paths[-1].write_text("".join(lines), encoding="ascii")
    return paths


def write_languages(folder: Path, voices: Mapping[str, Sequence[Voice]], each: int, seed: int = 0) -> list[Path]:
    """Fabricate strings of one to four digits in English, German and Spanish.

    Args:
        folder: Where to write; made when missing.
        voices: Speakers of every split, of different names.
        each: Strings of every speaker in every language.
        seed: Seed of everything.

    Returns:
        The files: ``languages/LANGUAGE_VOICE_NUMBER.flac`` (8 kHz), and ``languages.jsonl``, which lists each of them
        for the task ``asr``, and those that are not English also for ``st_eng``, translation into English.
    """
    folder = Path(folder)
    (folder / "languages").mkdir(parents=True, exist_ok=True)
    english = tuple(WORDS["eng"])
    paths, lines = [], []
    people = [(split, voice) for split, speakers in voices.items() for voice in speakers]
    for person, (split, voice) in enumerate(people):
        for at, (language, table) in enumerate(WORDS.items()):
            words = tuple(table)
            for number in range(each):
                rng = np.random.default_rng([seed, 4, person, at, number])
                digits = rng.integers(0, 10, rng.integers(1, 5)).tolist()
                gaps = rng.uniform(0.0, 0.25, len(digits) - 1).tolist()
                wave, _ = say(
                    [words[d] for d in digits], voice, seed=(seed, 4, person, at, number), gap=gaps, language=language
                )
                name = f"{language}_{voice.name}_{number}"
                paths.append(folder / "languages" / f"{name}.flac")
                sf.write(paths[-1], wave, 8000, "PCM_16")
                record = {
                    "id": name,
                    "audio_filepath": f"languages/{name}.flac",
                    "duration": len(wave) / 8000,
                    "text": " ".join(words[d] for d in digits),
                    "lang": language,
                    "task": "asr",
                    "speaker": voice.name,
                    "split": split,
                }
                lines.append(record)
                if language != "eng":
                    translation = " ".join(english[d] for d in digits)
                    lines.append({**record, "id": f"{name}_st", "task": "st_eng", "translation": translation})
    paths.append(folder / "languages.jsonl")
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    paths[-1].write_text(text, encoding="utf-8")
    return paths


def long_recording(seed: int, seconds: float = _LONG_SECONDS) -> tuple[Wave, list[tuple[str, float, float]]]:
    """Make a dialogue of digits at 16 kHz: samples (N,), and the begin and end of each word in seconds.

    Args:
        seed: Seed of everything.
        seconds: Its length.
    """
    rng = np.random.default_rng([seed, 2])
    wave = (1e-4 * rng.normal(0, 1, round(seconds * _LONG_RATE))).astype(np.float32)
    times: list[tuple[str, float, float]] = []
    at, turn = 0.5, 0
    while True:
        words = [DIGITS[d] for d in rng.integers(0, 10, rng.integers(2, 7))]
        gaps = rng.uniform(0.05, 0.35, len(words) - 1).tolist()
        voice: Voice = _SPEAKERS[turn % 2]
        part, found = say(words, voice, sample_rate=_LONG_RATE, seed=(seed, 2, turn), gap=gaps)
        begin = round(at * _LONG_RATE)
        if begin + len(part) > len(wave):
            return wave, times
        wave[begin : begin + len(part)] += part
        offset = begin / _LONG_RATE
        times += [(word, offset + start, offset + end) for word, start, end in found]
        at, turn = offset + len(part) / _LONG_RATE + rng.uniform(0.6, 1.6), turn + 1


def _write_long(folder: Path, seed: int) -> list[Path]:
    wave, times = long_recording(seed)
    paths = [folder / f"long.{ending}" for ending in ("flac", "txt", "ctm")]
    sf.write(paths[0], wave, _LONG_RATE, "PCM_16")
    paths[1].write_text(" ".join(word for word, _, _ in times) + "\n", encoding="ascii")
    rows = (f"long 1 {start:.3f} {end - start:.3f} {word}\n" for word, start, end in times)
    paths[2].write_text("".join(rows), encoding="ascii")
    return paths


def _write_noise(folder: Path, rng: np.random.Generator) -> list[Path]:
    rate = 16_000
    time = np.arange(5 * rate) / rate
    rustle = np.fft.rfft(rng.normal(0, 1, len(time)))
    rustle /= np.sqrt(np.maximum(np.arange(len(rustle)), 20))  # power falls as 1 / f
    hum = np.fft.irfft(rustle, len(time))
    hum = hum / np.abs(hum).max() + sum(0.2 / k * np.sin(2 * np.pi * 50 * k * time) for k in (1, 2, 3))
    room = rng.normal(0, 1, round(0.4 * rate)) * np.exp(-6.9 * np.arange(round(0.4 * rate)) / (0.35 * rate))
    room[: rate // 200] = 0.0  # the echoes come 5 ms after
    room *= 0.25 / np.abs(room).max()
    room[0] = 1.0
    paths = []
    for name, wave in (("hum", 0.3 * hum / np.abs(hum).max()), ("room", 0.9 * room)):
        paths.append(folder / f"{name}.wav")
        sf.write(paths[-1], wave, rate, "PCM_16")
    return paths
