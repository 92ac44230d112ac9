"""speech/transcribe, speech/align, speech/identify: recordings of every kind, of any length, and every bad input."""

import csv
import json
import wave as wavefile
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from vertebra.backbones.base import create_backbone
from vertebra.cli import main
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.speech.audio import read_audio
from vertebra.domains.speech.decoding import greedy
from vertebra.domains.speech.model import SpeechCTC
from vertebra.domains.speech.sample import long_recording
from vertebra.domains.speech.spec import SpeechSpec
from vertebra.domains.speech.synthesis import VOICES, say
from vertebra.domains.speech.text import word_error_counts
from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import pipeline
from vertebra.pipelines.demo import speech as demo
from vertebra.pipelines.demo.base import Demo
from vertebra.pipelines.report import Report
from vertebra.pipelines.speech_identify import language_scores

RATE = 8000
TOKENS = ("<blank>", " ", *"abcdefghi")
PREFIX = ("<nolang>", "<deu>", "<eng>", "<asr>", "<st_eng>")


def made(backbone="illama_test,causal=false", *, prefix=False, seed=1, **changes):
    torch.manual_seed(seed)
    facts = {"languages": ("deu", "eng"), "tasks": ("asr", "st_eng")} if prefix else {}
    spec = SpeechSpec(sample_rate=RATE, n_mels=20, tokens=(*TOKENS, *(PREFIX if prefix else ())), **facts)
    model = SpeechCTC(create_backbone(backbone), spec, channels=4, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.head.weight *= 8  # so that something is said
        model.normalise.mean.fill_(-6.0)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    return str(save_model(model, tmp_path_factory.mktemp("models") / "toy"))


@pytest.fixture(scope="module")
def voice():
    """Ten words and when they are said."""
    return say(["four", "two", "seven", "one", "nine"] * 2, VOICES[0], sample_rate=RATE, seed=3, gap=0.2)


def direct(model, samples):
    log_probs, counts = model(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
    tokens = [model.spec.tokens[i] for i in greedy(log_probs, counts)[0].ids]
    return " ".join("".join(t for t in tokens if t[0] != "<").split())


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---------------------------------------------------------------- transcribe


def test_every_kind_of_recording_gives_the_models_own_text(model, saved, voice, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    samples, _ = voice
    stereo = np.stack([samples, 0.5 * samples], 1)
    sf.write(folder / "a.mp3", np.repeat(samples, 6), 48_000)
    sf.write(folder / "b.wav", samples, RATE, "ULAW")  # the telephone's
    sf.write(folder / "c.flac", stereo, RATE, "PCM_24")
    sf.write(folder / "d.ogg", samples, RATE)
    sf.write(folder / "e.wav", samples[:160], RATE)  # 20 ms
    sf.write(folder / "f.wav", np.zeros(RATE), RATE, "PCM_U8")  # silence
    sf.write(folder / "g.wav", samples, RATE, "FLOAT")
    out = tmp_path / "out.jsonl"
    assert main(["run", "speech/transcribe", str(folder), "-o", str(out), "--model", saved, "--batch-size", "3"]) == 0
    found = lines(out)
    assert [f["file"] for f in found] == [str(p) for p in sorted(folder.iterdir())]
    for line in found:
        wave = read_audio(line["file"], RATE)
        assert line["text"] == direct(model, wave)
        assert line["duration"] == pytest.approx(len(wave) / RATE, abs=1e-3)
        assert " ".join(w["text"] for s in line["segments"] for w in s["words"]) == line["text"]
        times = [(w["start"], w["end"]) for s in line["segments"] for w in s["words"]]
        assert all(0 <= a <= b <= line["duration"] + 0.1 for a, b in times)
    assert found[6]["text"] != ""


def test_bad_recordings_are_listed_and_the_others_transcribed(saved, voice, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    samples, _ = voice
    sf.write(folder / "good.wav", samples, RATE)
    sf.write(folder / "whole.flac", samples, RATE)
    (folder / "cut.flac").write_bytes((folder / "whole.flac").read_bytes()[:-4000])
    (folder / "empty.wav").touch()
    (folder / "text.wav").write_text("This is no recording.\n")
    with wavefile.open(str(folder / "none.wav"), "wb") as stream:
        stream.setparams((1, 2, RATE, 0, "NONE", ""))
    out = tmp_path / "out.txt"
    assert main(["run", "speech/transcribe", str(folder), "-o", str(out), "--model", saved]) == 3
    assert "2 records done, 4 bad (listed in " in capsys.readouterr().out
    names = [line.partition("\t")[0] for line in out.read_text().splitlines()]
    assert names == [str(folder / "good.wav"), str(folder / "whole.flac")]
    bad = {e["file"].rpartition("/")[2]: e for e in lines(tmp_path / "out.txt.errors.jsonl")}
    assert sorted(bad) == ["cut.flac", "empty.wav", "none.wav", "text.wav"]
    assert all(e["rule"] and e["advice"] for e in bad.values())


def test_a_long_recording_is_said_as_one_window_says_it(saved, voice, tmp_path):
    samples, _ = voice
    long = np.concatenate([samples, np.zeros(6000, np.float32)] * 5)
    one = pipeline("speech/transcribe", saved, window=120.0)
    assert len(long) / RATE < 120
    assert one(long).value == direct(one.model, long)
    sf.write(tmp_path / "long.wav", long, RATE, "FLOAT")
    local = made("illama_test,causal=false,depth=2,window=4")  # whose positions see no farther than the context
    whole = pipeline("speech/transcribe", local, window=120.0)(long)
    for window, batch in ((6.0, 1), (6.0, 16), (10.0, 4)):
        cut = pipeline("speech/transcribe", local, window=window, context=1.0, batch_size=batch)
        assert cut(str(tmp_path / "long.wav"))[0].value == whole.value
        assert [w.text for w in cut(long).transcript.words] == [w.text for w in whole.transcript.words]
    assert len(whole.value) > 20


def test_streaming_says_the_same_as_offline(voice, tmp_path):
    samples, _ = voice
    model = made("hybrid_test,causal=true")
    sf.write(tmp_path / "a.wav", samples, RATE, "FLOAT")
    live = pipeline("speech/transcribe", model, stream=80)
    (found,) = live(str(tmp_path / "a.wav"))
    assert found.value == pipeline("speech/transcribe", model)(samples).value == direct(model, samples)
    assert found.value
    assert found.details["delay"] == pytest.approx(0.076)
    assert found.details["state_bytes"] > 0
    assert [w.text for w in found.transcript.words] == found.value.split()
    with pytest.raises(ConfigError, match="streaming: the model cannot, its backbone is not causal"):
        pipeline("speech/transcribe", made(), stream=80)


def test_beams_hot_words_and_language_models(model, saved, voice, tmp_path):
    samples, _ = voice
    plain = pipeline("speech/transcribe", saved)(samples).value
    wide = pipeline("speech/transcribe", saved, decode="beam", beam=8)(samples)
    assert wide.value
    hot = tmp_path / "hot.txt"
    hot.write_text("a b\n\nc\n")
    helped = pipeline("speech/transcribe", saved, hotwords=hot, hotword_bonus=8.0)(samples)
    assert helped.value != plain
    arpa = tmp_path / "tiny.arpa"
    arpa.write_text("\\data\\\nngram 1=4\n\n\\1-grams:\n-1\t<s>\n-1\t</s>\n-1\t<unk>\n-0.1\ta\n\n\\end\\\n")
    assert pipeline("speech/transcribe", saved, lm=arpa, lm_weight=2.0)(samples).value != wide.value
    with pytest.raises(ConfigError, match="hot words and language models need decode=beam, got greedy"):
        pipeline("speech/transcribe", saved, hotwords=hot, decode="greedy")
    with pytest.raises(ConfigError, match="the model's vocabulary lacks 'z' of the hot word 'z'"):
        pipeline("speech/transcribe", saved, hotwords=["z"])
    with pytest.raises(ConfigError, match="hotwords must be a file with a phrase a line"):
        pipeline("speech/transcribe", saved, hotwords="nowhere.txt")
    with pytest.raises(ConfigError, match="a binary language model needs lm_words"):
        pipeline("speech/transcribe", saved, lm="model.bin")


def test_all_formats_of_one_and_of_several_recordings(saved, voice, tmp_path):
    samples, _ = voice
    for name in ("a", "b"):
        sf.write(tmp_path / f"{name}.wav", samples, RATE, "FLOAT")
    formats = [".txt", ".json", ".ctm", ".vtt", ".TextGrid"]
    command = ["run", "speech/transcribe", "-o", str(tmp_path / "one.srt"), "--model", saved, "--formats", *formats]
    assert main([*command[:2], str(tmp_path / "a.wav"), *command[2:]]) == 0
    assert {p.suffix for p in tmp_path.glob("one.*")} == {".srt", *formats}
    both = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    assert main(["run", "speech/transcribe", *both, "-o", str(tmp_path / "two.srt"), "--model", saved]) == 0
    assert sorted(p.name for p in (tmp_path / "two.files").iterdir()) == ["a.srt", "b.srt"]


def test_options_that_do_not_fit_are_refused(saved, model):
    for options, text in (
        ({"language": "eng"}, "the model knows one language and one task only"),
        ({"prompt": "abc"}, "the model reads no prompt; leave it away"),
        ({"window": 2.0, "context": 1.0}, "context must be at least"),
        ({"formats": [".doc"]}, r"formats must be among .*, got '.doc'"),
        ({"stream": -1}, "stream=-1 must be at least 0"),
        ({"decode": "fast"}, "decode must be greedy or beam"),
    ):
        with pytest.raises(ConfigError, match=text):
            pipeline("speech/transcribe", saved, **options)
    with pytest.raises(ConfigError, match="the model knows no languages"):
        pipeline("speech/identify", model)
    transcribe = pipeline("speech/transcribe", saved)
    for value in (np.zeros((2, 8000), np.float32), np.zeros(0, np.float32), np.full(10, np.nan, np.float32)):
        with pytest.raises(DataError, match="samples must be finite numbers"):
            transcribe(value)
    with pytest.raises(DataError, match=r"nowhere\.wav: no such file"):
        transcribe("nowhere.wav")


def test_the_prefix_chooses_language_and_task(voice):
    samples, _ = voice
    model = made(prefix=True)
    said = {
        pipeline("speech/transcribe", model, **options)(samples).value
        for options in ({}, {"language": "eng"}, {"language": "deu", "task": "st_eng"})
    }
    assert len(said) == 3
    found = pipeline("speech/transcribe", model, language="deu")(samples)
    assert found.details["language"] == "deu"
    assert found.transcript.segments[0].language == "deu"
    with pytest.raises(ConfigError, match="language must be one of deu, eng, got 'fra'"):
        pipeline("speech/transcribe", model, language="fra")


def test_a_prediction_draws_and_writes_itself(saved, voice, tmp_path):
    samples, _ = voice
    found = pipeline("speech/transcribe", saved)(samples)
    assert found.save(tmp_path / "a.png").stat().st_size > 10_000
    kept = json.loads(found.to_json())
    assert kept["value"] == found.value
    assert [w["text"] for w in kept["words"]] == found.value.split()


# ---------------------------------------------------------------- align


def test_known_words_are_found_in_time(voice, tmp_path):
    samples, truth = voice
    sf.write(tmp_path / "a.wav", samples, RATE)
    (tmp_path / "a.txt").write_text("Four, two seven ONE nine. Four two seven one nine\n")
    sf.write(tmp_path / "b.wav", samples, RATE)
    out = tmp_path / "out.jsonl"
    assert main(["run", "speech/align", str(tmp_path / "a.wav"), str(tmp_path / "b.wav"), "-o", str(out)]) == 3
    (bad,) = lines(tmp_path / "out.jsonl.errors.jsonl")
    assert bad["rule"] == "there is no text beside it (b.txt)"
    (found,) = lines(out)
    words = [w for s in found["segments"] for w in s["words"]]
    assert [w["text"] for w in words] == [text for text, _, _ in truth]
    errors = [abs(w["start"] - a) + abs(w["end"] - b) for w, (_, a, b) in zip(words, truth, strict=True)]
    assert np.mean(errors) / 2 < 0.06
    assert (tmp_path / "out.jsonl.1.a.png").stat().st_size > 10_000


def test_the_text_of_a_recording_is_never_replaced(saved, voice, tmp_path, capsys):
    sf.write(tmp_path / "a.wav", voice[0], RATE)
    (tmp_path / "a.txt").write_text("a b\n")
    for output, formats in (("a.txt", []), ("a.ctm", ["--formats", ".txt"])):
        command = ["run", "speech/align", str(tmp_path / "a.wav"), "-o", str(tmp_path / output), "--model", saved]
        assert main([*command, *formats]) == 2
        assert "a.txt is the text of a.wav and would be replaced; choose another output" in capsys.readouterr().err
    assert (tmp_path / "a.txt").read_text() == "a b\n"


def test_texts_that_cannot_be_aligned_are_told(voice):
    samples, _ = voice
    align = pipeline("speech/align")
    with pytest.raises(DataError, match="samples need their text"):
        align(samples)
    with pytest.raises(DataError, match="the model's vocabulary lacks 'eleven'"):
        align(samples, text="eleven")
    with pytest.raises(DataError, match="the text is empty"):
        align(samples, text=" ... ")
    with pytest.raises(DataError, match="frames"):
        align(samples[:800], text="one two three four five six seven eight nine")


# ---------------------------------------------------------------- identify


def test_languages_get_scores(voice, tmp_path):
    samples, _ = voice
    model = made(prefix=True)
    saved = str(save_model(model, tmp_path / "model"))
    sf.write(tmp_path / "a.wav", samples, RATE, "FLOAT")
    (tmp_path / "b.wav").write_text("no")
    out = tmp_path / "out.csv"
    inputs = [str(tmp_path / "a.wav"), str(tmp_path / "b.wav")]
    assert main(["run", "speech/identify", *inputs, "-o", str(out), "--model", saved]) == 3
    with out.open(newline="") as stream:
        (row,) = csv.DictReader(stream)
    log_probs, counts = model(torch.from_numpy(samples)[None], torch.tensor([len(samples)]))
    expected = language_scores(log_probs[0, : counts[0], [model.ids["<deu>"], model.ids["<eng>"]]].detach().numpy())
    np.testing.assert_allclose([float(row["score_deu"]), float(row["score_eng"])], expected, atol=1e-4)
    assert row["language"] == ("deu", "eng")[int(expected.argmax())]
    assert (tmp_path / "out.csv.png").stat().st_size > 3000


def test_languages_are_compared_where_one_is_said():
    scores = language_scores(np.log(np.array([[0.01, 0.02], [0.6, 0.3], [0.001, 0.2]], dtype=np.float32)))
    np.testing.assert_allclose(scores, [2 / 3, 1 / 3], rtol=1e-5)


# ---------------------------------------------------------------- the bundled models, and the demo


def test_the_bundled_model_hears_a_dialogue():
    wave, truth = long_recording(seed=11, seconds=30.0)
    samples = read_audio_rate(wave)
    found = pipeline("speech/transcribe", window=10.0, context=2.0)(samples)
    counts = word_error_counts([text for text, _, _ in truth], found.value.split())
    assert (counts.substitutions + counts.deletions + counts.insertions) / counts.length <= 0.1


def read_audio_rate(wave):
    from vertebra.domains.speech.audio import resample

    return resample(wave, 16_000, load_model("speech_digits").spec.sample_rate)


@pytest.mark.parametrize("level", [0.0, 1e-4, 1e-2, 0.1])
def test_silence_and_noise_say_nothing(level):
    transcribe = pipeline("speech/transcribe")
    for samples in (160, 24_000, 80_000):
        noise = level * np.random.default_rng(samples).normal(size=samples)
        assert transcribe(noise.astype(np.float32)).value == ""


@pytest.mark.realdata
def test_the_bundled_model_hears_digits_it_was_not_trained_on():
    folder = Path(__file__).parents[3] / "shared" / "data" / "speech" / "fsdd" / "recordings"
    if not folder.is_dir():
        pytest.skip("../shared/data/speech/fsdd is not here")
    names = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    files = sorted(folder.glob("*_[0-4].wav"))
    transcribe = pipeline("speech/transcribe")
    said = [transcribe(str(file))[0].value for file in files[::4]]
    wrong = sum(text != names[int(file.name[0])] for text, file in zip(said, files[::4], strict=True))
    assert len(said) == 50
    assert wrong <= 1


@pytest.mark.slow
def test_the_demo_shows_all(tmp_path):
    from vertebra.domains.speech.sample import write_sample

    write_sample(tmp_path / "sample")
    report = Report("demo")
    demo.show(Demo(tmp_path / "sample", tmp_path / "results", report, lambda name: None))
    page = report.write(tmp_path / "report.html").read_text(encoding="utf-8")
    for part in ("truncated.flac", "notes.wav", "speech/align", "speech/identify", "--&gt;"):
        assert part in page
