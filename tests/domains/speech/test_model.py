"""The recogniser with every backbone: padding, prefix, prompt, self-conditioning, streaming, windows."""

import numpy as np
import pytest
import torch

from vertebra.backbones.base import create_backbone
from vertebra.backbones.catalog import presets
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.speech.decoding import greedy
from vertebra.domains.speech.loss import ctc_losses, recognition_loss
from vertebra.domains.speech.model import Emissions, PromptConfig, SpeechCTC
from vertebra.domains.speech.spec import SpeechSpec
from vertebra.domains.speech.streaming import StreamingRecogniser
from vertebra.domains.speech.windows import Windows
from vertebra.errors import ConfigError, ShapeError

SPECIALS = ("<na>", "<nolang>", "<deu>", "<eng>", "<asr>", "<st_eng>")
PLAIN = SpeechSpec(sample_rate=8000, n_mels=20, tokens=("<blank>", " ", *"abcdefgh"))
MANY = SpeechSpec(
    sample_rate=8000,
    n_mels=20,
    tokens=(*PLAIN.tokens, *SPECIALS),
    languages=("deu", "eng"),
    tasks=("asr", "st_eng"),
    mean=(1.0,) * 20,
    std=(2.0,) * 20,
)
PROMPT = PromptConfig(dim=8, depth=1, num_heads=2, hidden_dim=16, every=1, cross_heads=2, dropout=0.0)
TEST_PRESETS = [name for name in presets() if name.endswith("_test")]
every_form = pytest.mark.parametrize(
    ("name", "causal", "whole"), [(n, c, w) for n in TEST_PRESETS for c in (False, True) for w in (False, True)]
)
LENGTHS = torch.tensor([4000, 2503, 160])


def build(name, causal=False, whole=False, **changes):
    """A small model; ``whole`` with all that OWSM-CTC has."""
    torch.manual_seed(0)
    options = {"subsampling": 4, "channels": 4}
    if whole:
        options |= {"intermediate": (1,), "transcript_layers": (1,), "prompt": PROMPT}
    model = SpeechCTC(create_backbone(name, causal=causal), MANY if whole else PLAIN, **{**options, **changes})
    with torch.no_grad():  # fresh norms of 1 and biases of 0 would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def waves():
    return 0.1 * torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))


@every_form
def test_padding_never_changes_a_result(name, causal, whole):
    model = build(name, causal, whole)
    x = waves()
    y, counts = model(x, LENGTHS)
    assert counts.tolist() == (model.position_count(LENGTHS) + model.prefix_length).tolist()
    for i, length in enumerate(LENGTHS.tolist()):
        alone, count = model(x[i : i + 1, :length], LENGTHS[i : i + 1])
        assert count[0] == counts[i]
        torch.testing.assert_close(y[i, : counts[i]], alone[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(y.exp().sum(-1), torch.ones(y.shape[:2]))


@every_form
def test_gradient_reaches_every_parameter(name, causal, whole):
    model = build(name, causal, whole).train()
    features, counts = model.features(waves(), LENGTHS)
    prompt = torch.tensor([[2, 3], [4, 0], [5, 6]]) if whole else None
    prefix = torch.tensor([model.prefix_ids("deu", "st_eng")] * 3) if whole else None
    found = model.encode(features, counts, prefix, prompt, torch.tensor([2, 1, 2]) if whole else None)
    targets = torch.tensor([[2, 3, 4], [5, 6, 0], [7, 0, 0]])
    recognition_loss(found, targets, torch.tensor([3, 2, 1]), weight=0.5).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@every_form
def test_model_directory_and_export(name, causal, whole, tmp_path):
    model = build(name, causal, whole)
    other = load_model(save_model(model, tmp_path / "m"))
    y, _ = model(waves(), LENGTHS)
    torch.testing.assert_close(other(waves(), LENGTHS)[0], y, atol=0, rtol=0)
    program = torch.export.export(model, (waves(), LENGTHS))
    torch.testing.assert_close(program.module()(waves(), LENGTHS)[0], y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TEST_PRESETS)
def test_one_batch_overfits(name):
    model = build(name).train()
    model.normalise.mean.fill_(-8.0)
    targets, counts = torch.tensor([[2, 3, 4, 5], [6, 7, 0, 0], [3, 0, 0, 0]]), torch.tensor([4, 2, 1])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    time = torch.arange(4000) / 8000
    tones = torch.stack([(2 * torch.pi * f * time * (1 + time)).sin() for f in (300, 900, 2000)])  # they rise
    features, frames = model.features(0.1 * tones, LENGTHS)
    for _ in range(300):
        found = model.encode(features, frames)
        loss = recognition_loss(found, targets, counts, weight=0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if [h.ids for h in greedy(found.log_probs, found.lengths)] == [(2, 3, 4, 5), (6, 7), (3,)]:
            return
    pytest.fail(f"after 300 steps the loss is {loss.item():.3f}")


def test_prefix_and_prompt_change_what_is_said():
    model = build("illama_test", whole=True)
    prefixes = [model.prefix_ids(), model.prefix_ids("eng"), model.prefix_ids("eng", "st_eng")]
    assert [[MANY.tokens[i] for i in p] for p in prefixes] == [
        ["<nolang>", "<asr>"],
        ["<eng>", "<asr>"],
        ["<eng>", "<st_eng>"],
    ]
    x, lengths = waves()[:1], LENGTHS[:1]
    said = [model(x, lengths, torch.tensor([p]))[0] for p in prefixes]
    assert not torch.allclose(said[0], said[1], atol=1e-3)
    assert not torch.allclose(said[1], said[2], atol=1e-3)
    torch.testing.assert_close(model(x, lengths)[0], said[0])
    prompted = model(x, lengths, None, torch.tensor([[2, 3]]))[0]
    assert not torch.allclose(prompted, said[0], atol=1e-3)
    padded = model(x, lengths, None, torch.tensor([[2, 3, 9, 9]]), torch.tensor([2]))[0]
    torch.testing.assert_close(padded, prompted)


def test_unknown_languages_and_tasks_are_refused():
    model = build("illama_test", whole=True)
    with pytest.raises(ConfigError, match="language must be one of deu, eng, got 'fra'"):
        model.prefix_ids("fra")
    with pytest.raises(ConfigError, match="task must be one of asr, st_eng, got 'st_deu'"):
        model.prefix_ids("eng", "st_deu")


def test_impossible_models_are_refused():
    backbone = create_backbone("illama_test", causal=False)
    depth = backbone.num_layers
    with pytest.raises(ConfigError, match=f"must be from 1 to {depth - 1}, one below the last, got \\[{depth}\\]"):
        SpeechCTC(backbone, PLAIN, intermediate=(depth,))
    with pytest.raises(ConfigError, match="transcript_layers must be among the intermediate layers"):
        SpeechCTC(backbone, PLAIN, intermediate=(1,), transcript_layers=(2, 1))
    with pytest.raises(ConfigError, match="a prompt needs the token <na>"):
        SpeechCTC(backbone, PLAIN, prompt=PROMPT)
    with pytest.raises(ConfigError, match="factor must be 1, 2, 4, 6 or 8, got 3"):
        SpeechCTC(backbone, PLAIN, subsampling=3)
    with pytest.raises(ShapeError, match=r"waves must be \(B, N\) and lengths \(B,\)"):
        build("illama_test")(torch.zeros(4000), torch.tensor([4000]))


# ---------------------------------------------------------------- losses


def test_the_loss_is_the_one_summed_over_paths():
    logits = torch.randn(1, 3, 3)
    probs = logits[0].softmax(-1)
    paths = [(1, 2, 2), (1, 1, 2), (0, 1, 2), (1, 0, 2), (1, 2, 0)]
    expected = sum(probs[0, a] * probs[1, b] * probs[2, c] for a, b, c in paths)
    loss = ctc_losses(logits, torch.tensor([3]), torch.tensor([[1, 2]]), torch.tensor([2]))
    torch.testing.assert_close(loss, -expected.log()[None])


def test_a_target_that_cannot_fit_is_no_infinity():
    logits = torch.randn(2, 3, 4, requires_grad=True)
    targets, lengths = torch.tensor([[1, 1, 1], [1, 2, 3]]), torch.tensor([3, 3])
    loss = ctc_losses(logits, torch.tensor([3, 3]), targets, lengths)
    assert loss[0] == 0
    assert loss[1] > 0
    loss.sum().backward()
    assert logits.grad.isfinite().all()
    assert not logits.grad[0].any()


def test_layers_are_weighted_and_items_without_target_left_out():
    logits, inner = torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    lengths, targets, counts = torch.tensor([5, 5]), torch.tensor([[1, 2], [3, 0]]), torch.tensor([2, 1])
    spoken, spoken_counts = torch.tensor([[2, 0], [0, 0]]), torch.tensor([1, -1])
    found = Emissions(logits, lengths, {1: inner, 2: inner})
    loss = recognition_loss(
        found,
        targets,
        counts,
        weight=0.8,
        transcripts=spoken,
        transcript_lengths=spoken_counts,
        transcript_layers=(1,),
    )
    last = ctc_losses(logits, lengths, targets, counts).mean()
    first = ctc_losses(inner, lengths, spoken, spoken_counts.clamp(min=0))[0]
    second = ctc_losses(inner, lengths, targets, counts).mean()
    torch.testing.assert_close(loss, 0.2 * last + 0.8 * (first + second) / 2)


# ---------------------------------------------------------------- streaming and windows


@pytest.mark.parametrize("chunk", [37, 160, 1000, 9000])
@pytest.mark.parametrize("name", ["hybrid_test", "illama_test"])
@pytest.mark.parametrize("whole", [False, True])
def test_streaming_says_the_same_as_one_pass(name, chunk, whole):
    model = build(name, causal=True, whole=whole, prompt=None)
    model.head.weight.data *= 8  # so that something is said
    model.head.bias.data.zero_()
    model.normalise.mean.fill_(-3.0)
    x = 0.3 * torch.randn(8765, generator=torch.Generator().manual_seed(2))
    stream = StreamingRecogniser(model, language="eng" if whole else "")
    for piece in x.split(chunk):
        stream.feed(piece.numpy())
    stream.finish()
    prefix = torch.tensor([model.prefix_ids("eng")]) if whole else None
    log_probs, counts = model(x[None], torch.tensor([len(x)]), prefix)
    found = greedy(log_probs, counts)[0]
    assert stream.ids == list(found.ids)
    assert len(stream.ids) >= 2
    np.testing.assert_allclose(stream.delay, (128 + 6 * 80) / 8000)


def test_the_state_of_a_recurrent_model_does_not_grow():
    stream = StreamingRecogniser(build("hybrid_test,pattern=M", causal=True))
    sizes = []
    for _ in range(6):
        stream.feed(np.zeros(8000, np.float32))
        sizes.append(stream.state_bytes)
    assert max(sizes) - min(sizes) < 4 * 600 * 4  # samples and frames that wait for their window


def test_a_clip_of_20_ms_streams():
    stream = StreamingRecogniser(build("hybrid_test", causal=True))
    x = torch.full((160,), 0.1)
    stream.feed(x)
    stream.finish()
    found = greedy(*stream.model(x[None], torch.tensor([160])))[0]
    assert stream.ids == list(found.ids)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"causal": False}, "its backbone is not causal"),
        ({"causal": True, "feature_norm": "utterance"}, "feature_norm=utterance needs the whole recording"),
        ({"causal": True, "grid": True}, "its backbone reads time x frequency"),
        ({"causal": True, "whole": True}, "it reads a prompt"),
    ],
)
def test_models_that_cannot_stream_say_why(changes, reason):
    with pytest.raises(ConfigError, match=f"streaming: the model cannot, {reason}; train one with a causal backbone"):
        StreamingRecogniser(build("hybrid_test", **changes))


def test_windows_cover_every_position_once():
    model = build("illama_test")
    step = model.samples_per_position
    windows = Windows(model, seconds=2.0, context=0.4)
    for samples in (100, 16_000, 16_001, 40_000, 41_234, 50_000):
        wave = np.arange(samples, dtype=np.float32)
        for size in (7_000, samples):
            blocks = [wave[i : i + size] for i in range(0, samples, size)]
            covered = []
            found = list(windows.cut(blocks))
            for window in found:
                np.testing.assert_array_equal(window.wave, wave[window.start : window.start + len(window.wave)])
                assert window.start % step == 0
                count = int(model.position_count(torch.tensor(len(window.wave))))
                end = count if window.keep is None else window.skip + window.keep
                assert end <= count
                covered += [window.start // step + i for i in range(window.skip, end)]
            whole = int(model.position_count(torch.tensor(samples)))
            assert covered == list(range(whole))
            assert [w.last for w in found] == [False] * (len(found) - 1) + [True]
            assert (len(found) == 1) == (samples <= 16_000)


def test_windows_need_a_middle():
    with pytest.raises(ConfigError, match=r"context must be at least .* seconds and less than half a window"):
        Windows(build("illama_test"), seconds=2.0, context=1.0)
    with pytest.raises(ConfigError, match="context must be at least"):
        Windows(build("illama_test"), seconds=2.0, context=0.0)
