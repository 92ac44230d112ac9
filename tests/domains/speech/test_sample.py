"""The synthesiser, whose digits a simple classifier tells apart, and the fabricated recordings."""

import json

import numpy as np
import pytest
import soundfile as sf

from vertebra.domains.speech.audio import audio_info, read_audio
from vertebra.domains.speech.frontend import mel_bands
from vertebra.domains.speech.sample import TAKES, long_recording, write_sample
from vertebra.domains.speech.sources import read_source, read_unlabelled
from vertebra.domains.speech.synthesis import DIGITS, VOICES, Voice, say
from vertebra.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    return root, write_sample(root)


def log_mel(wave, rate=8000, bands=24):
    frames = np.lib.stride_tricks.sliding_window_view(wave, 256)[::80]
    power = np.abs(np.fft.rfft(frames * np.hanning(256))) ** 2
    return np.log(power @ mel_bands(rate, 256, bands).numpy() + 1e-6)


def template(wave):
    """Log-mel features (16 * 24,) of a word whose length and loudness are evened out."""
    features = log_mel(wave)
    at = np.linspace(0, len(features) - 1, 16)
    even = np.stack([np.interp(at, np.arange(len(features)), column) for column in features.T], 1)
    return (even - even.mean()).ravel()


def takes(voices, seeds):
    """Templates (voices, digits, takes, features)."""
    return np.array(
        [
            [[template(say([d], v, seed=(s, i))[0]) for s in seeds] for i, d in enumerate(DIGITS)]
            for v in voices
        ]
    )  # fmt: skip


def test_digits_are_told_apart_by_their_means():
    known = takes(VOICES[:6], range(4))
    means = known.mean((0, 2))  # (digits, features)
    for found in (takes(VOICES[:6], [9]), takes(VOICES[6:], range(3))):  # other takes, and other voices
        features = found.transpose(1, 0, 2, 3).reshape(10, -1, means.shape[1])
        guess = ((features[:, :, None] - means) ** 2).sum(3).argmin(2)
        right = guess == np.arange(10)[:, None]
        assert right.mean() > 0.95
        assert right.mean(1).min() > 0.6
    apart = ((means[:, None] - means) ** 2).sum(2) + np.diag(np.full(10, np.inf))
    within = ((known - means[:, None]) ** 2).sum(3).mean()
    assert apart.min() > 0.5 * within


@pytest.mark.realdata
def test_digits_are_nearest_to_the_same_digits_of_people(shared_data):
    """Five nearest neighbours among 600 real takes; to guess gives 0.1."""
    source = read_source(shared_data / "speech" / "fsdd")
    real = [u for u in source.utterances if int(u.id.rsplit("_", 1)[1]) < 15]
    known = np.array([template(read_audio(u.path, 8000)) for u in real])
    labels = np.array([DIGITS.index(u.text) for u in real])
    made = takes(VOICES, range(2)).transpose(1, 0, 2, 3).reshape(160, -1)
    made, known = (x / x.std(1, keepdims=True) for x in (made, known))
    nearest = ((known**2).sum(1) - 2 * made @ known.T).argsort(1)[:, :5]
    guess = np.array([np.bincount(row).argmax() for row in labels[nearest]])
    assert (guess == np.repeat(range(10), 16)).mean() > 0.85


def test_no_two_takes_are_alike_and_each_can_be_had_again():
    wave, times = say(["six", "two"], VOICES[1], seed=3)
    again, _ = say(["six", "two"], VOICES[1], seed=3)
    other, _ = say(["six", "two"], VOICES[1], seed=4)
    np.testing.assert_array_equal(wave, again)
    assert len(other) != len(wave) or not np.allclose(other, wave)
    assert wave.dtype == np.float32
    assert np.isfinite(wave).all()
    assert 0.2 < np.abs(wave).max() <= 0.5001
    assert [w for w, _, _ in times] == ["six", "two"]


@pytest.mark.parametrize("rate", [8000, 16_000, 44_100])
def test_words_are_where_the_times_say(rate):
    gaps = [0.5, 0.0, 0.4]
    wave, times = say(["one", "nine", "four", "zero"], VOICES[0], sample_rate=rate, gap=gaps)
    for (_, _, end), (_, start, _), gap in zip(times, times[1:], gaps, strict=False):
        assert start - end == pytest.approx(gap)
    assert len(wave) / rate == pytest.approx(times[-1][2] + 0.03, abs=0.01)

    def loudness(begin, end):
        return np.sqrt((wave[round(begin * rate) : round(end * rate)] ** 2).mean())

    for _, start, end in times:
        assert loudness(start, end) > 0.02
    for (_, _, end), (_, start, _) in ((times[0], times[1]), (times[2], times[3])):
        assert loudness(end + 0.05, start - 0.05) < 0.002


@pytest.mark.parametrize("voice", VOICES, ids=lambda v: v.name)
def test_the_pitch_is_that_of_the_voice(voice):
    wave, times = say(["nine"], voice, sample_rate=16_000, seed=1)
    middle = round(sum(times[0][1:]) / 2 * 16_000)
    part = wave[middle - 800 : middle + 800].astype(float)
    spectrum = np.fft.rfft(part * np.hanning(len(part)), 1 << 14)
    lags = np.fft.irfft(np.abs(spectrum) ** 2)
    low, high = int(16_000 / (1.35 * voice.pitch)), int(16_000 / (0.75 * voice.pitch))
    found = 16_000 / (low + int(lags[low:high].argmax()))
    assert found == pytest.approx(voice.pitch, rel=0.25)
    assert lags[low:high].max() > 0.4 * lags[0]  # voiced


def test_what_cannot_be_said_is_refused():
    with pytest.raises(DataError, match=r"words must be among zero, one, .* got 'ten'"):
        say(["one", "ten"], VOICES[0])
    with pytest.raises(DataError, match="a gap of 0 or more between two; got 2 words"):
        say(["one", "two"], VOICES[0], gap=[0.1, 0.2])
    with pytest.raises(DataError, match="got 0 words"):
        say([], VOICES[0])
    with pytest.raises(ConfigError, match=r"pitch must lie in 40\.\.500 Hz"):
        Voice(name="x", pitch=20)
    with pytest.raises(ConfigError, match=r"tilt in 0\.\.1, 1 excluded"):
        Voice(name="x", pitch=100, tilt=1.0)


def test_same_seed_same_samples(folder, tmp_path):
    _, paths = folder
    again = write_sample(tmp_path)
    assert len(again) == len(set(again)) == len([p for p in tmp_path.rglob("*") if p.is_file()])
    for path, other in zip(paths, again, strict=True):
        if path.suffix in (".ogg", ".opus"):  # Ogg numbers its streams at random
            np.testing.assert_array_equal(read_audio(path, 16_000), read_audio(other, 16_000))
        else:
            assert path.read_bytes() == other.read_bytes(), path.name
    assert sum(p.stat().st_size for p in paths) < 5_000_000
    assert not np.array_equal(long_recording(0, 4.0)[0], long_recording(1, 4.0)[0])


def test_digits_have_the_split_of_their_data_set(folder):
    source = read_source(folder[0] / "digits")
    assert source.bad == []
    assert len(source.utterances) == 10 * 6 * len(TAKES)
    tests = [u for u in source.utterances if u.split == "test"]
    assert len(tests) == 60
    assert {u.text for u in tests} == set(DIGITS)
    assert len({u.speaker for u in tests}) == 6
    assert audio_info(tests[0].path).sample_rate == 8000


def test_strings_are_read_in_every_format(folder):
    root, _ = folder
    manifest, pairs = read_source(root / "manifest.jsonl"), read_source(root / "strings")
    assert manifest.bad == pairs.bad == []
    assert [u.text for u in manifest.utterances] == [u.text for u in pairs.utterances]
    assert {u.path.suffix for u in pairs.utterances} == {".wav", ".mp3", ".ogg", ".flac", ".opus"}
    for line, utterance in zip((root / "manifest.jsonl").read_text().splitlines(), manifest.utterances, strict=True):
        wave = read_audio(utterance.path, 16_000)
        assert len(wave) / 16_000 == pytest.approx(json.loads(line)["duration"], abs=0.06)
        assert np.abs(wave).max() > 0.1
    assert len(read_unlabelled(root / "strings")) == 6


def test_the_long_recording_has_its_text_and_times(folder):
    root, _ = folder
    assert audio_info(root / "long.flac").duration == 60
    words = (root / "long.txt").read_text().split()
    rows = [line.split() for line in (root / "long.ctm").read_text().splitlines()]
    assert [row[4] for row in rows] == words
    assert len(words) > 50
    wave, rate = sf.read(root / "long.flac")
    spoken = np.zeros(len(wave), dtype=bool)
    for row in rows:
        spoken[round((float(row[2]) - 0.05) * rate) : round((float(row[2]) + float(row[3]) + 0.05) * rate)] = True
    assert np.abs(wave[~spoken]).max() < 0.01 < np.sqrt((wave[spoken] ** 2).mean())


def test_noise_and_room(folder):
    hum, room = (read_audio(folder[0] / "noise" / f"{name}.wav", 16_000) for name in ("hum", "room"))
    assert len(hum) == 80_000
    assert hum.std() > 0.02
    assert room.argmax() == 0
    energy = (room[1:] ** 2).cumsum()
    assert energy[3200] > 0.95 * energy[-1]
