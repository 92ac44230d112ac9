"""The front end against ESPnet's, and what padding may not do."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vertebra.domains.speech import frontend
from vertebra.domains.speech.frontend import LAYERS, ConvSubsampling, LogMel, Normalise, mel_bands
from vertebra.errors import ConfigError

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "speech" / "espnet_frontend.safetensors")


@pytest.mark.parametrize("n_mels", [80, 128])
def test_log_mel_is_that_of_espnet(n_mels):
    features, counts = LogMel(16_000, n_mels, "espnet")(GOLDEN["wave"], GOLDEN["lens"])
    torch.testing.assert_close(features, GOLDEN[f"logmel{n_mels}"], atol=1e-5, rtol=1e-5)
    assert counts.tolist() == GOLDEN["frames"].tolist()


def test_mel_bands_are_those_of_librosa():
    torch.testing.assert_close(mel_bands(16_000, 512, 80), GOLDEN["melmat80"], atol=1e-8, rtol=1e-6)


def test_only_the_end_of_the_longest_recording_differs_from_espnet():
    features, _ = LogMel(16_000, 80)(GOLDEN["wave"], GOLDEN["lens"])
    torch.testing.assert_close(features[0, :-2], GOLDEN["logmel80"][0, :-2], atol=3e-5, rtol=1e-5)
    torch.testing.assert_close(features[1], GOLDEN["logmel80"][1], atol=3e-5, rtol=1e-5)
    assert not torch.allclose(features[0, -1], GOLDEN["logmel80"][0, -1], atol=0.1)


def test_frames_do_not_depend_on_padding():
    logmel, waves, lengths = LogMel(8000, 40), torch.randn(2, 4000), torch.tensor([4000, 2345])
    features, counts = logmel(waves, lengths)
    alone, count = logmel(waves[1:, :2345], lengths[1:])
    torch.testing.assert_close(features[1:, : count[0]], alone, atol=0, rtol=0)
    assert count[0] == counts[1] == 2345 // 80 + 1
    assert not features[1, counts[1] :].any()


def test_too_many_bands_for_the_sample_rate_are_refused():
    with pytest.raises(ConfigError, match="n_mels=160 is too many for 8000 samples a second, some bands are empty"):
        LogMel(8000, 160)


def test_normalisation_leaves_padding_at_0():
    features, counts = torch.randn(2, 7, 3) + 4, torch.tensor([7, 5])
    y = Normalise((4.0, 4.0, 4.0), (2.0, 1.0, 1.0), 3)(features, counts)
    torch.testing.assert_close(y[0, :, 0], (features[0, :, 0] - 4) / 2)
    assert not y[1, 5:].any()
    z = Normalise((), (), 3, "utterance")(features * 3, counts)
    torch.testing.assert_close(z[1, :5], 3 * (features[1, :5] - features[1, :5].mean(0)))
    torch.testing.assert_close(z[1, :5].mean(0), torch.zeros(3), atol=1e-5, rtol=0)


def test_level_normalisation_takes_loudness_away_but_leaves_silence_silent():
    features, counts = torch.randn(2, 7, 3) - 4, torch.tensor([7, 5])
    norm = Normalise((-4.0, -5.0, -6.0), (2.0, 1.0, 1.0), 3, "level")
    y = norm(features, counts)
    louder = norm(features + torch.tensor([3.0, -2.0])[:, None, None], counts)
    torch.testing.assert_close(louder, y)
    assert not y[1, 5:].any()
    shape = features[0] - features[0].max() - torch.tensor([0.0, -1.0, -2.0])
    torch.testing.assert_close(y[0], shape / torch.tensor([2.0, 1.0, 1.0]))
    silent = norm(torch.full((1, 7, 3), -23.0), torch.tensor([7]))
    assert bool((silent[..., 0] == (-23 + 9) / 2).all())


@pytest.mark.parametrize("factor", LAYERS)
@pytest.mark.parametrize("grid", [False, True])
def test_subsampling_counts_what_comes_out(factor, grid):
    layer = ConvSubsampling(40, 8, factor, channels=4, grid=grid)
    for frames in range(layer.look_ahead + 1, layer.look_ahead + 30):
        y, count = layer(torch.randn(1, frames, 40), torch.tensor([frames]))
        assert y.shape[1] == count[0]
        assert y.ndim == 3 + grid
    assert layer.output_count(torch.tensor([layer.look_ahead, layer.look_ahead + 1])).tolist() == [0, 1]
    x = torch.randn(1, 80, 40, requires_grad=True)
    layer(x, torch.tensor([80]))[0][:, 1].sum().backward()  # the second position reads these frames
    read = x.grad.abs().sum((0, 2)).nonzero().flatten()
    assert read.min() >= factor
    assert read.max() <= factor + layer.look_ahead


@pytest.mark.parametrize("factor", LAYERS)
def test_subsampled_positions_do_not_depend_on_padding(factor):
    layer = ConvSubsampling(40, 8, factor, channels=4)
    x, counts = torch.randn(2, 60, 40), torch.tensor([60, 41])
    y, positions = layer(x, counts)
    alone, count = layer(x[1:, :41], counts[1:])
    torch.testing.assert_close(y[1:, : count[0]], alone)
    assert positions[1] == count[0]


def test_thirty_seconds_make_374_positions_of_owsm():
    layer = ConvSubsampling(80, 4, 8, channels=2)
    assert layer.output_count(torch.tensor([3001])).tolist() == [374]
    assert layer.bands == 9
    assert ConvSubsampling(128, 4, 8, channels=2).bands == 15


@pytest.mark.parametrize("factor", [1, 2, 4, 6, 8])
@pytest.mark.parametrize("channels", [4, 64])
def test_subsampling_in_pieces_gives_the_positions_of_one_pass(monkeypatch, factor, channels):
    layer = frontend.ConvSubsampling(40, 16, factor, channels=channels)
    features, counts = torch.randn(2, 301, 40), torch.tensor([301, 200])
    whole, _ = layer(features, counts)
    monkeypatch.setattr(frontend, "PIECE_FLOATS", 0)
    monkeypatch.setattr(frontend, "SHORTEST_PIECE", 7)
    with torch.no_grad():
        pieces, _ = layer(features, counts)
    assert torch.allclose(whole, pieces, atol=1e-6)
