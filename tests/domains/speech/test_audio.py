import io
import math
import pickle
import struct
import tarfile
import wave

import numpy as np
import pytest
import soundfile as sf
import torch
import torchaudio

from vertebra.domains.speech.audio import (
    AUDIO_ENDINGS,
    AudioError,
    _Filters,
    audio_info,
    read_audio,
    resample,
    stream_audio,
)

RNG = np.random.default_rng(0)
NOISE = (RNG.standard_normal(48000) * 0.1).astype(np.float32)


def tone(rate, seconds=1.0, hertz=440.0):
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(rate * seconds)) / rate)).astype(np.float32)


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


@pytest.mark.parametrize(
    ("ending", "options", "tolerance"),
    [
        ("wav", {"subtype": "PCM_16"}, 1e-4),
        ("wav", {"subtype": "PCM_24"}, 1e-6),
        ("wav", {"subtype": "PCM_32"}, 1e-6),
        ("wav", {"subtype": "PCM_U8"}, 1e-2),
        ("wav", {"subtype": "FLOAT"}, 0),
        ("wav", {"subtype": "DOUBLE"}, 0),
        ("wav", {"subtype": "ULAW"}, 2e-2),
        ("wav", {"subtype": "ALAW"}, 2e-2),
        ("flac", {}, 1e-4),
        ("sph", {"format": "NIST", "subtype": "PCM_16"}, 1e-4),
        ("aiff", {}, 1e-4),
        ("au", {"subtype": "ULAW"}, 2e-2),
        ("w64", {}, 1e-4),
        ("caf", {}, 1e-4),
        ("ogg", {}, 0.1),
        ("mp3", {}, 0.1),
    ],
)
def test_formats(tmp_path, ending, options, tolerance):
    path = tmp_path / f"a.{ending}"
    sf.write(path, tone(16000), 16000, **options)
    got = read_audio(path, 16000)
    assert got.dtype == np.float32
    assert got.shape == (16000,)
    assert np.abs(got - tone(16000)).max() <= tolerance
    info = audio_info(path)
    assert (info.sample_rate, info.frames, info.channels, info.duration) == (16000, 16000, 1, 1.0)
    assert path.suffix in AUDIO_ENDINGS
    assert (read_audio(path.read_bytes(), 16000) == got).all()


def test_opus(tmp_path):
    sf.write(tmp_path / "a.opus", tone(48000), 48000, format="OGG", subtype="OPUS")
    assert np.abs(read_audio(tmp_path / "a.opus", 48000) - tone(48000)).mean() < 0.02


def test_wave_of_the_standard_library(tmp_path):
    path = tmp_path / "a.wav"
    with wave.open(str(path), "wb") as out:
        out.setnchannels(2)
        out.setsampwidth(2)
        out.setframerate(8000)
        out.writeframes(np.array([[16384, 0], [-32768, 16384]], dtype="<i2").tobytes())
    assert read_audio(path, 8000).tolist() == [0.25, -0.25]
    assert read_audio(path, 8000, channel=0).tolist() == [0.5, -1.0]
    assert read_audio(path, 8000, channel=1).tolist() == [0.0, 0.5]
    for channel in (2, -1):
        with pytest.raises(AudioError, match=rf"a\.wav: channel must be from 0 to 1, got {channel}; leave it out"):
            read_audio(path, 8000, channel=channel)


@pytest.mark.parametrize(("old", "new"), [(48000, 16000), (44100, 16000), (8000, 16000), (16000, 44100), (11025, 8000)])
def test_resample_is_that_of_torchaudio(old, new):
    for length in (1, 37, 5003):
        got = resample(NOISE[:length], old, new)
        want = torchaudio.functional.resample(torch.from_numpy(NOISE[:length]).double(), old, new).numpy()
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, atol=2e-6 if new != 44100 else 1e-5)


def test_resample_of_rates_without_a_common_divisor():
    got = resample(tone(44101), 44101, 16000)
    assert len(got) == 16000
    assert np.abs(got - tone(16000))[50:-50].max() < 1e-3
    assert resample(NOISE, 16000, 16000) is NOISE
    assert len(resample(NOISE[:0], 8000, 16000)) == 0


@pytest.mark.parametrize(("old", "new"), [(870, 1000), (48_000, 16_000), (8_000, 16_000), (22_050, 16_000)])
@pytest.mark.parametrize("length", [1, 7, 3001])
def test_the_matrix_of_a_filter_does_as_the_loop_over_its_phases(old, new, length):
    filters = _Filters(old // math.gcd(old, new), new // math.gcd(old, new))
    fast = resample(NOISE[:length], old, new)
    assert filters.matrix is not None
    filters.matrix = None
    slow = filters.apply(NOISE[:length], 0, 0, filters.length(length))
    np.testing.assert_allclose(fast, slow, atol=2e-6)
    assert fast.dtype == slow.dtype == np.float32


def test_any_rate_is_resampled(tmp_path):
    for rate in (8000, 11025, 22050, 44100, 48000):
        sf.write(tmp_path / "a.wav", tone(rate), rate)
        got = read_audio(tmp_path / "a.wav", 16000)
        assert len(got) == 16000
        assert np.abs(got - tone(16000))[100:-100].max() < 2e-3, rate


def test_telephone_mp3_and_short_clips(tmp_path):
    sf.write(tmp_path / "phone.wav", tone(8000), 8000, subtype="ULAW")
    assert audio_info(tmp_path / "phone.wav").subtype == "ULAW"
    assert len(read_audio(tmp_path / "phone.wav", 16000)) == 16000
    sf.write(tmp_path / "a.mp3", tone(48000), 48000)
    assert len(read_audio(tmp_path / "a.mp3", 16000)) == 16000
    sf.write(tmp_path / "short.wav", tone(16000, 0.02), 16000)
    assert len(read_audio(tmp_path / "short.wav", 16000)) == 320
    sf.write(tmp_path / "silence.wav", np.zeros(800), 8000)
    assert not read_audio(tmp_path / "silence.wav", 16000).any()
    assert len(read_audio(tmp_path / "silence.wav", 16000)) == 1600


def frame_size(data):
    """Bytes of the first frame of an MP3 of 48 kHz."""
    kbits = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)[data[2] >> 4]
    return 144 * kbits * 1000 // 48000 + (data[2] >> 1 & 1)


def without_length(path):
    """Take the first frame, which tells the length, from an MP3 of 48 kHz."""
    data = path.read_bytes()
    assert b"Xing" in data[:100] or b"Info" in data[:100]
    size = frame_size(data)
    assert data[size] == 0xFF
    path.write_bytes(data[size:])


@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("tagged", [False, True])
def test_mp3_that_does_not_say_its_length(tmp_path, mode, tagged):
    path = tmp_path / "a.mp3"
    sound = np.concatenate((RNG.standard_normal(96000) * 0.1, tone(48000) * 0.01)).astype(np.float32)
    sf.write(path, sound, 48000, bitrate_mode=mode)
    without_length(path)
    if tagged:
        path.write_bytes(
            b"ID3\x04\x00\x00\x00\x00\x02\x00" + b"\xff\xfb" * 128 + path.read_bytes() + b"TAG" + bytes(125)
        )
    got = read_audio(path, 48000)
    assert 0 <= len(got) - len(sound) < 3 * 1152
    assert audio_info(path).frames == len(got)
    # Nothing of the quiet end, which a guess from the bit rate would drop, is lost.
    assert np.abs(got[-24000:-4000]).mean() == pytest.approx(np.abs(sound[-24000:]).mean(), rel=0.2)
    assert len(np.concatenate(list(stream_audio(path, 16000)))) == -(-len(got) // 3)
    assert (read_audio(path.read_bytes(), 48000) == got).all()
    np.testing.assert_allclose(read_audio(path, 48000, start=1.5, duration=1.0), got[72000:120000], atol=1e-4)


def test_mp3_with_a_gap(tmp_path):
    path = tmp_path / "a.mp3"
    sf.write(path, tone(48000, 2.0), 48000, bitrate_mode="CONSTANT")
    without_length(path)
    data = path.read_bytes()
    size = frame_size(data)
    path.write_bytes(data[: 40 * size] + bytes(300) + data[40 * size :])
    assert len(read_audio(path, 48000)) == pytest.approx(96000, abs=4 * 1152)


def test_rates_that_nobody_records():
    for rate in (1, 999, 768_001, 2**31 - 1):
        with pytest.raises(AudioError, match=rf"sample rate must be from 1,000 to 768,000 Hz, got {rate:,}"):
            read_audio(wav(NOISE[:100], rate), 16000)
    many = wav(np.tile(NOISE[:9, None], (1, 500)))
    assert len(read_audio(many, 16000)) == 9


def test_segments(tmp_path):
    path = tmp_path / "a.wav"
    sf.write(path, NOISE, 16000, subtype="FLOAT")
    assert (read_audio(path, 16000, start=0.5, duration=1.25) == NOISE[8000:28000]).all()
    assert (read_audio(path, 16000, start=2.5) == NOISE[40000:]).all()
    assert len(read_audio(path, 16000, start=2.0, duration=1.04)) == 16000
    for options, rule in [
        ({"start": 3.0}, r"start must be before the end at 3\.000 s, got 3\.0"),
        ({"start": 2.0, "duration": 1.06}, r"start \+ duration must not pass the end at 3\.000 s, got 3\.060"),
        ({"start": -1.0}, "start must be 0 or more"),
        ({"start": float("nan")}, "start must be 0 or more"),
        ({"start": float("inf")}, "start must be 0 or more"),
        ({"start": 1e300}, "start must be before the end"),
        ({"duration": float("inf")}, "duration above 0"),
        ({"duration": 0.0}, "duration above 0"),
        ({"duration": 1e-6}, "has no frames"),
    ]:
        with pytest.raises(AudioError, match=rf"a\.wav: .*{rule}"):
            read_audio(path, 16000, **options)


@pytest.mark.parametrize("ending", ["flac", "mp3", "ogg"])
def test_segments_of_compressed_files_are_where_they_should_be(tmp_path, ending):
    path = tmp_path / f"a.{ending}"
    sf.write(path, NOISE, 16000)
    whole = read_audio(path, 16000)
    np.testing.assert_allclose(read_audio(path, 16000, start=1.0, duration=0.5), whole[16000:24000], atol=1e-5)


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 44101])
@pytest.mark.parametrize("block", [0.001, 0.1, 0.37, 30.0])
def test_a_stream_is_the_whole(tmp_path, rate, block):
    path = tmp_path / "a.wav"
    sf.write(path, np.stack((NOISE, NOISE[::-1]), axis=1)[: rate // 2 + 1], rate)
    blocks = list(stream_audio(path, 16000, block_seconds=block))
    assert all(len(b) for b in blocks)
    assert max(map(len, blocks)) <= block * 16000 + 64
    assert all(abs(len(b) - block * 16000) <= 64 for b in blocks[1:-2])  # the end comes in two
    np.testing.assert_allclose(np.concatenate(blocks), read_audio(path, 16000), atol=1e-6)


def test_a_stream_is_checked(tmp_path):
    path = tmp_path / "a.flac"
    sf.write(path, NOISE, 16000)
    for seconds in (0, -1, float("nan"), float("inf")):
        with pytest.raises(AudioError, match="block_seconds must be above 0"):
            next(stream_audio(path, 16000, block_seconds=seconds))
    with pytest.raises(AudioError, match="channel must be from 0 to 0"):
        next(stream_audio(path, 16000, channel=1))
    with pytest.raises(AudioError, match="truncated or damaged"):
        list(stream_audio(cut(path), 16000, block_seconds=0.1))
    assert len(np.concatenate(list(stream_audio(io.BytesIO(wav(NOISE)).getvalue(), 8000)))) == 24000


def wav(values, rate=16000, **options):
    out = io.BytesIO()
    sf.write(out, values, rate, format="WAV", **options)
    return out.getvalue()


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.wav").write_text("These are words and no sound at all.\n" * 20)
    (tmp_path / "riff.wav").write_bytes(b"RIFF")
    (tmp_path / "a.raw").write_bytes(bytes(100))
    sf.write(tmp_path / "none.wav", np.zeros(0), 16000)
    (tmp_path / "s.sph").write_bytes(
        b"NIST_1A\n   1024\nsample_coding -s26 pcm,embedded-shorten-v2.00\nend_head\n".ljust(1024) + bytes(500)
    )
    for name, rule in [
        ("missing.wav", "there is no such file; correct the path"),
        ("empty.wav", "the file is empty; copy it again"),
        ("text.wav", "this is not audio of a format that libsndfile reads; check what it is, or convert it to WAV"),
        ("riff.wav", "this is not audio"),
        ("a.raw", "samples without a header tell no sample rate"),
        ("none.wav", "the recording has no frames; leave it out"),
        ("s.sph", "SPHERE compressed with shorten cannot be read; convert it"),
        ("bad\0.wav", "the file cannot be opened"),
        ("x" * 400, "the file cannot be opened"),
    ]:
        for read in (lambda p: read_audio(p, 16000), lambda p: list(stream_audio(p, 16000)), audio_info):
            with pytest.raises(AudioError, match=rule) as error:
                read(str(tmp_path / name))
            assert error.value.file == str(tmp_path / name)
    with pytest.raises(AudioError, match="this is a folder"):
        read_audio(tmp_path, 16000)
    with pytest.raises(AudioError, match=r"^audio: the file is empty"):
        read_audio(b"", 16000)
    with pytest.raises(AudioError, match=r"^upload 3: this is not audio") as error:
        read_audio(b"nothing", 16000, name="upload 3")
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(bad):
    values = NOISE.copy()
    values[[7, 9]] = bad
    with pytest.raises(AudioError, match="samples must be numbers, got NaN or infinite in 2"):
        read_audio(wav(values, subtype="FLOAT"), 8000)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.wav", {}),
        ("a.wav", {"subtype": "ULAW"}),
        ("a.wav", {"subtype": "FLOAT"}),
        ("a.wav", {"subtype": "IMA_ADPCM"}),
        ("a.flac", {}),
        ("a.mp3", {}),
        ("a.sph", {"format": "NIST", "subtype": "PCM_16"}),
        ("a.aiff", {}),
        ("a.au", {"subtype": "ULAW"}),
        ("a.w64", {}),
        ("a.caf", {}),
        ("a.rf64", {"format": "RF64", "subtype": "PCM_16"}),
    ],
)
def test_truncated_files(tmp_path, name, options):
    path = tmp_path / name
    sf.write(path, NOISE, 16000, **options)
    read_audio(path, 16000)
    for share in (0.9, 0.5):
        cut(path, share)
        with pytest.raises(AudioError, match=rf"{name}: the audio is truncated.*; copy"):
            read_audio(path, 16000)


def test_headers_that_do_not_say_the_length(tmp_path):
    path = tmp_path / "a.wav"
    data = bytearray(wav(NOISE))
    data[4:8] = data[40:44] = b"\xff" * 4  # as written to a pipe
    path.write_bytes(data)
    assert len(read_audio(path, 16000)) == 48000
    sf.write(tmp_path / "a.flac", NOISE, 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    low = struct.unpack(">Q", data[18:26])[0] >> 36 << 36  # total samples: the low 36 bits
    data[18:26] = struct.pack(">Q", low)
    path = tmp_path / "b.flac"
    path.write_bytes(data)
    assert len(read_audio(path, 16000)) == 48000
    assert (read_audio(bytes(data), 16000) == read_audio(path, 16000)).all()
    assert (np.concatenate(list(stream_audio(path, 16000, block_seconds=0.4))) == read_audio(path, 16000)).all()
    assert audio_info(path).frames == 48000
    assert len(read_audio(path, 16000, start=1.0, duration=1.0)) == 16000
    with pytest.raises(AudioError, match=r"must not pass the end at 3\.000 s, got 4\.000"):
        read_audio(path, 16000, start=2.0, duration=2.0)
    with pytest.raises(AudioError, match="the recording has no frames"):
        read_audio(path, 16000, start=5.0)


def test_damaged_bytes_never_crash():
    whole = {f: io.BytesIO() for f in ("WAV", "FLAC", "OGG", "MP3", "AIFF")}
    for format_, out in whole.items():
        sf.write(out, NOISE[:8000], 16000, format=format_)
    rng = np.random.default_rng(1)
    for out in whole.values():
        for _ in range(12):
            data = bytearray(out.getvalue())
            for at in rng.integers(0, len(data), 20):
                data[at] = rng.integers(256)
            for at in rng.integers(0, 60, 2):
                data[at] = rng.integers(256)
            try:
                got = read_audio(bytes(data), 16000)
            except AudioError:
                continue
            assert np.isfinite(got).all()


@pytest.mark.realdata
def test_real_sphere_files(shared_data):
    archive = shared_data / "speech" / "mini_an4" / "downloads.tar.gz"
    count = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.name.endswith(".sph"):
                stream = tar.extractfile(member)
                assert stream is not None
                got = read_audio(stream.read(), 16000, name=member.name)
                assert 0.5 * 16000 < len(got) < 10 * 16000
                assert 0.001 < np.abs(got).mean() < 0.5
                count += 1
    assert count == 8
