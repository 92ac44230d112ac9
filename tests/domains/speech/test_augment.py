import json
from dataclasses import asdict

import numpy as np
import pytest
import soundfile
import torch

from vertebra.domains.speech.augment import (
    Augment,
    SpecAugment,
    WaveAugment,
    band_pass,
    change_speed,
    coloured_noise,
    mean_power,
    mix,
    reverberate,
    synthetic_room,
    warp_channels,
)
from vertebra.domains.speech.frontend import LogMel
from vertebra.errors import ConfigError, DataError

RATE = 16000


def sine(hz, seconds=1.0, rate=RATE):
    return np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate).astype(np.float32)


def pitch(wave, rate=RATE):
    """Frequency of the strongest bin."""
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave)), 1 << 17))
    return spectrum.argmax() * rate / (1 << 17)


def decibels(ratio):
    return 10 * np.log10(ratio)


# ---------------------------------------------------------------- waves


@pytest.mark.parametrize("factor", [0.9, 1.1, 0.87, 1.25])
def test_speed_changes_length_and_frequency(factor):
    fast = change_speed(sine(440), factor)
    assert len(fast) == int(np.ceil(round(RATE / factor, 6)))
    assert pitch(fast) == pytest.approx(440 * factor, rel=1e-3)
    assert fast.dtype == np.float32


def test_speeds_are_drawn_evenly():
    augment = Augment(speed=(0.9, 1.1), speed_step=0.1)
    assert augment.speeds == [0.9, 1.0, 1.1]
    assert augment.fastest == 1.1
    change = WaveAugment(augment, RATE)
    lengths = [len(change(np.ones(990, np.float32), 0, item)) for item in range(600)]
    counts = np.unique(lengths, return_counts=True)
    assert counts[0].tolist() == [900, 990, 1100]
    assert counts[1].min() > 150
    assert len(Augment(speed=(0.85, 1.15)).speeds) == 31
    assert Augment().fastest == 1


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5])
def test_noise_has_the_ratio_that_was_asked_for(snr):
    wave = sine(300, 0.7) * np.float32(0.3)
    for noise in ({"noise_colours": ("white",)}, {"noise_colours": ("pink",)}, {"noise_colours": ("brown",)}):
        augment = Augment(noise_probability=1, noise_snr_db=(snr, snr), **noise)
        noisy = WaveAugment(augment, RATE)(wave, 3, 7)
        assert decibels(mean_power(wave) / mean_power(noisy - wave)) == pytest.approx(snr, abs=0.1)


def test_silence_that_was_added_does_not_count_for_the_ratio():
    wave = sine(300)
    augment = Augment(pad_seconds=2, noise_probability=1, noise_snr_db=(10, 10))
    noisy = WaveAugment(augment, RATE)(wave, 0, 1)
    quiet = WaveAugment(Augment(pad_seconds=2), RATE)(wave, 0, 1)
    assert len(noisy) == len(quiet) > len(wave)
    assert decibels(mean_power(wave) / mean_power(noisy - quiet)) == pytest.approx(10, abs=0.1)


@pytest.mark.parametrize(("colour", "fall"), [("white", 0.0), ("pink", 3.01), ("brown", 6.02)])
def test_colours_of_noise(colour, fall):
    noise = coloured_noise(colour, 1 << 17, RATE, np.random.default_rng(0))
    power = np.abs(np.fft.rfft(noise)) ** 2
    hz = np.fft.rfftfreq(1 << 17, 1 / RATE)
    octaves = [power[(hz >= low) & (hz < 2 * low)].mean() for low in (250, 500, 1000, 2000)]
    np.testing.assert_allclose(-np.diff(decibels(np.array(octaves))), fall, atol=0.3)
    assert mean_power(noise) == pytest.approx(1, rel=1e-4)


def test_noise_of_nothing_and_on_nothing_changes_nothing():
    silence, wave = np.zeros(100, np.float32), sine(100, 0.1)
    assert mix(silence, wave[:100], 0) is silence
    assert mix(wave, np.zeros_like(wave), 0) is wave


def test_noise_and_rooms_come_from_files(tmp_path):
    (tmp_path / "noise" / "deep").mkdir(parents=True)
    soundfile.write(tmp_path / "noise" / "deep" / "hum.wav", sine(2000, 0.3, 8000) * 0.5, 8000)
    soundfile.write(tmp_path / "long.wav", sine(3000, 3) * 0.5, RATE)
    soundfile.write(tmp_path / "room.wav", np.array([0.1, 0, 0.8, 0, 0, 0.4], np.float32), RATE)
    wave = sine(300)
    for place, hz in (("noise", 2000), ("long.wav", 3000)):
        augment = Augment(noise_probability=1, noise_snr_db=(6, 6), noise_files=str(tmp_path / place))
        noise = [WaveAugment(augment, RATE)(wave, epoch, 0) - wave for epoch in range(2)]
        assert pitch(noise[0]) == pytest.approx(hz, abs=2)
        assert decibels(mean_power(wave) / mean_power(noise[0])) == pytest.approx(6, abs=0.1)
        assert not np.array_equal(*noise)  # another place in the file
    augment = Augment(reverb_probability=1, rir_files=str(tmp_path / "room.wav"))
    click = np.zeros(100, np.float32)
    click[50] = 1
    wet = WaveAugment(augment, RATE)(click, 0, 0)
    assert np.flatnonzero(np.abs(wet) > 1e-3).tolist() == [48, 50, 53]
    np.testing.assert_allclose(wet[[48, 53]] / wet[50], [0.125, 0.5], atol=1e-3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"noise_files must be a recording or a folder of them, got .*empty; correct"):
        WaveAugment(Augment(noise_probability=0.1, noise_files=str(tmp_path / "empty")), RATE)
    soundfile.write(tmp_path / "silent.wav", np.zeros(10, np.float32), RATE)
    with pytest.raises(DataError, match=r"silent.wav must be an impulse response, got silence"):
        WaveAugment(Augment(reverb_probability=1, rir_files=str(tmp_path / "silent.wav")), RATE)(wave, 0, 0)


def test_a_room_keeps_onset_and_energy():
    wave = np.zeros(RATE, np.float32)
    wave[4000:8000] = sine(500, 0.25)
    room = synthetic_room(0.4, 5.0, RATE, np.random.default_rng(0))
    assert decibels(room[0] ** 2 / (room[1:] ** 2).sum()) == pytest.approx(5, abs=0.01)
    early, late = (room[1 + i : 1 + i + 640] ** 2 for i in (400, 400 + 3200))
    assert decibels(early.sum() / late.sum()) == pytest.approx(30, abs=2)  # 60 dB in 0.4 s
    wet = reverberate(wave, room)
    assert len(wet) == len(wave)
    assert mean_power(wet) == pytest.approx(mean_power(wave), rel=1e-4)
    assert np.abs(wet[:3990]).max() < 1e-5  # nothing before the onset
    assert np.abs(wet[4000:4020]).max() > 0.05
    tail = [mean_power(wet[a : a + 800]) for a in (6000, 8000, 9600, 11200)]
    assert tail[0] > tail[1] > 10 * tail[2] > 100 * tail[3] > 0  # 15 dB from one to the next


def test_a_room_is_a_convolution():
    rng = np.random.default_rng(0)
    wave, response = rng.standard_normal(300).astype(np.float32), np.array([0.2, 1, -0.5, 0.25], np.float32)
    expected = np.convolve(wave.astype(float), response)[1:301]
    expected *= np.sqrt(mean_power(wave) / (expected**2).mean())
    np.testing.assert_allclose(reverberate(wave, response), expected, atol=1e-5)


def test_bands():
    both = sine(100) + sine(1000) + sine(5000)
    phone = WaveAugment(Augment(phone_probability=1), RATE)(both, 0, 0)
    inner = slice(2000, -2000)
    assert np.abs(phone - sine(1000))[inner].max() < 0.01
    np.testing.assert_allclose(band_pass(both, RATE, 0, 3000)[inner], (sine(100) + sine(1000))[inner], atol=0.01)
    np.testing.assert_allclose(band_pass(both, RATE, 0, 20000), both, atol=1e-5)
    low = WaveAugment(Augment(lowpass_probability=1, lowpass_hz=(2000, 4000)), RATE)(both, 0, 0)
    assert np.abs(low - sine(100) - sine(1000))[inner].max() < 0.01


def test_volume_and_silence():
    wave = sine(440)
    loud = [WaveAugment(Augment(volume_db=(-6, 6)), RATE)(wave, 0, i) for i in range(200)]
    gains = decibels(np.array([mean_power(w) for w in loud]) / mean_power(wave))
    assert -6 <= gains.min() < -5
    assert 5 < gains.max() <= 6
    padded = [WaveAugment(Augment(pad_seconds=0.5), RATE)(wave, 0, i) for i in range(100)]
    before = np.array([np.flatnonzero(p)[0] for p in padded])
    after = np.array([len(p) - len(wave) for p in padded]) - before
    for silence in (before, after):
        assert 0 <= silence.min() < 800
        assert 7000 < silence.max() <= 8001
    assert abs(np.corrcoef(before, after)[0, 1]) < 0.3


EVERYTHING = Augment(
    speed=(0.9, 1.1),
    pad_seconds=0.1,
    reverb_probability=0.5,
    noise_probability=0.5,
    phone_probability=0.3,
    lowpass_probability=0.3,
    volume_db=(-3, 3),
)


def test_a_wave_depends_on_seed_epoch_and_item_alone():
    wave = sine(440, 0.2)
    first = WaveAugment(EVERYTHING, RATE, seed=1)
    for item in range(20):
        out = first(wave, 2, item)
        assert out.dtype == np.float32
        assert np.isfinite(out).all()
        np.testing.assert_array_equal(out, WaveAugment(EVERYTHING, RATE, seed=1)(wave, 2, item))
        for other in (first(wave, 3, item), first(wave, 2, item + 1), WaveAugment(EVERYTHING, RATE, 2)(wave, 2, item)):
            assert not np.array_equal(out, other)
    np.testing.assert_array_equal(wave, sine(440, 0.2))  # not changed in place


def test_nothing_changes_nothing():
    wave = sine(440, 0.1)
    np.testing.assert_array_equal(WaveAugment(Augment(), RATE)(wave, 0, 0), wave)


def test_settings_are_plain():
    assert Augment(**json.loads(json.dumps(asdict(EVERYTHING)))) == EVERYTHING
    assert SpecAugment(**json.loads(json.dumps(asdict(SpecAugment(warp=0.1))))) == SpecAugment(warp=0.1)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"speed": (1.1, 0.9)}, r"speed must be two rising numbers from 0.5, got \(1.1, 0.9\)"),
        ({"speed": (1, 3)}, "speed must be at most 2, got 3"),
        ({"speed_step": 0}, "speed_step must be at least 0.001, got 0"),
        ({"pad_seconds": -1}, "pad_seconds must be at least 0, got -1"),
        ({"noise_probability": 1.5}, "noise_probability must be from 0 to 1, got 1.5"),
        ({"noise_snr_db": (5,)}, "noise_snr_db must be two rising numbers"),
        ({"noise_colours": ("red",)}, r"noise_colours must be of white, pink, brown, got \('red',\)"),
        ({"noise_colours": ()}, "noise_colours must be of"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        Augment(**arguments)


# ---------------------------------------------------------------- features


def features(batch=4, frames=100, channels=40):
    torch.manual_seed(0)
    return torch.rand(batch, frames, channels) + 1


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_masks_leave_padding_alone(fill):
    x, lengths = features(), torch.tensor([100, 60, 7, 1])
    augment = SpecAugment(freq_width=20, time_ratio=0.5, fill=fill, warp=0.2)
    out = augment(x, lengths, 0, 0, range(4))
    for row, length in enumerate(lengths):
        assert torch.equal(out[row, length:], x[row, length:])
        assert not torch.equal(out[row, :length], x[row, :length])


def test_widths_are_within_their_range_and_even():
    x, lengths = torch.ones(2000, 50, 30), torch.randint(10, 51, (2000,))
    out = SpecAugment(freq_masks=1, freq_width=9, time_masks=0)(x, lengths, 0, 0, np.arange(2000))
    widths = (out[:, 0] == 0).sum(1)
    assert torch.bincount(widths, minlength=9).tolist() == pytest.approx([2000 / 9] * 9, rel=0.25)
    assert widths.max() == 8
    hidden = (out[:, 0] == 0).float().mean(0)  # every channel can be hidden, those at the ends less often
    assert hidden.min() > 0
    ends = (out[:, 0] == 0).int().diff(dim=1).abs().sum(1)
    assert ends.max() <= 2  # one piece
    out = SpecAugment(freq_masks=0, time_masks=1, time_ratio=0.3)(x, lengths, 0, 0, np.arange(2000))
    widths = (out[:, :, 0] == 0).sum(1)
    assert (widths < 0.3 * lengths + 1e-4).all()
    shares = widths / (0.3 * lengths)
    assert shares.mean() == pytest.approx(0.45, abs=0.05)  # whole frames, rounded down
    at = (out[:, :, 0] == 0).float()
    places = (at * torch.arange(50)).sum(1)[widths > 0] / widths[widths > 0] / (lengths[widths > 0] - 1)
    assert places.mean() == pytest.approx(0.5, abs=0.02)


def test_share_that_is_masked():
    x, lengths = torch.ones(500, 400, 80), torch.full((500,), 400)
    out = SpecAugment()(x, lengths, 0, 0, np.arange(500))
    free = (1 - 13 / 80) ** 2 * (1 - 9.5 / 400) ** 10  # mean widths 13 of 80 channels, 9.5 of 400 frames
    assert (out == 0).float().mean().item() == pytest.approx(1 - free, abs=0.02)


def test_mean_fills_with_the_mean_of_real_frames():
    x, lengths = features(2), torch.tensor([100, 50])
    x[1, 50:] = 1000
    out = SpecAugment(fill="mean")(x, lengths, 0, 0, [5, 6])
    for row, length in ((0, 100), (1, 50)):
        changed = out[row, :length] != x[row, :length]
        assert changed.any()
        torch.testing.assert_close(out[row, :length][changed].unique(), x[row, :length].mean()[None])


def test_masks_depend_on_seed_epoch_and_item_alone():
    x, lengths = features(), torch.tensor([100, 100, 80, 60])
    augment = SpecAugment(warp=0.1)
    out = augment(x, lengths, 1, 2, [3, 4, 5, 6])
    assert torch.equal(out, augment(x, lengths, 1, 2, torch.tensor([3, 4, 5, 6])))
    assert torch.equal(out[[2, 0]], augment(x[[2, 0]], lengths[[2, 0]], 1, 2, [5, 3]))  # whatever else is there
    assert torch.equal(out[3:, :60], augment(x[3:, :60], lengths[3:], 1, 2, [6]))  # and however it is padded
    for other in (augment(x, lengths, 0, 2, [3, 4, 5, 6]), augment(x, lengths, 1, 3, [3, 4, 5, 6])):
        assert not torch.equal(out, other)


def test_no_masks_and_no_warp_are_the_identity():
    x = features()
    assert SpecAugment(freq_masks=0, time_masks=0)(x, torch.full((4,), 100), 0, 0, range(4)) is x
    assert torch.equal(SpecAugment(freq_width=1, time_ratio=0)(x, torch.full((4,), 100), 0, 0, range(4)), x)


def test_gradients_flow_where_nothing_is_masked():
    x = features().requires_grad_()
    out = SpecAugment()(x, torch.full((4,), 100), 0, 0, range(4))
    out.sum().backward()
    assert torch.equal(x.grad, (out != 0).float())


@pytest.mark.parametrize("factor", [0.85, 1.0, 1.2])
def test_warping_moves_a_tone_like_another_vocal_tract(factor):
    def peak(hz):
        return LogMel(RATE, 80)(torch.from_numpy(sine(hz))[None], torch.tensor([RATE]))[0]

    for hz in (400, 1500, 3000):
        warped = warp_channels(peak(hz), torch.tensor([factor]), 8000.0)[0, 50]
        moved = peak(hz * factor)[0, 50]
        assert abs(int(warped.argmax()) - int(moved.argmax())) <= 1
    same = peak(1500)
    torch.testing.assert_close(warp_channels(same, torch.ones(1), 8000.0), same, atol=1e-3, rtol=0)


def test_warping_bends_at_the_upper_end():
    ramp = torch.arange(40.0).expand(2, 3, 40)
    out = warp_channels(ramp, torch.tensor([0.8, 1.25]), 8000.0)
    assert (out.diff(dim=2) >= 0).all()
    assert out[0, 0, 20] > 20.5
    assert out[1, 0, 20] < 19.5
    torch.testing.assert_close(out[:, 0, -1], torch.full((2,), 39.0), atol=0.4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"freq_masks": -1}, "freq_masks must be from 0 to 100, got -1"),
        ({"freq_width": 0}, "freq_width must be at least 1, got 0"),
        ({"time_ratio": 2}, "time_ratio must be from 0 to 1, got 2"),
        ({"fill": "noise"}, "fill must be zero or mean, got 'noise'"),
        ({"warp": 0.9}, "warp must be from 0 to 0.5, got 0.9"),
        ({"warp_top_hz": 0}, "warp_top_hz must be above 0, got 0"),
    ],
)
def test_masks_out_of_range_are_refused(arguments, text):
    with pytest.raises(ConfigError, match=text):
        SpecAugment(**arguments)


def test_wider_masks_than_channels_are_refused():
    with pytest.raises(ConfigError, match="freq_width must be at most the number of channels, 10, got 27"):
        SpecAugment()(features(channels=10), torch.full((4,), 100), 0, 0, range(4))
