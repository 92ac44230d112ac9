"""Digits in three languages: what is said differs, and the sample lists it for two tasks."""

import json

import numpy as np
import pytest

from vertebra.domains.speech.audio import audio_info, read_audio
from vertebra.domains.speech.data import SpeechData
from vertebra.domains.speech.phones import PHONES, WORDS
from vertebra.domains.speech.sample import write_languages
from vertebra.domains.speech.sources import read_source
from vertebra.domains.speech.synthesis import DIGITS, VOICES, random_voice, say
from vertebra.domains.speech.text import normalise
from vertebra.errors import ConfigError, DataError

SPLITS = {"train": VOICES[:2], "val": VOICES[2:3], "test": VOICES[3:4]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("languages")
    return root, write_languages(root, SPLITS, 3)


def test_every_language_has_ten_words_of_known_phones_and_none_is_shared():
    assert list(WORDS) == ["eng", "deu", "spa"]
    words = [word for table in WORDS.values() for word in table]
    assert [len(table) for table in WORDS.values()] == [10, 10, 10]
    assert len(set(words)) == 30
    assert all(normalise(word, "basic") == word for word in words)
    used = [phone for table in WORDS.values() for phones in table.values() for phone in phones.split()]
    assert set(used) == set(PHONES)
    for language, table in WORDS.items():
        others = {phones for name, other in WORDS.items() if name != language for phones in other.values()}
        assert len(set(table.values())) == 10
        assert not set(table.values()) & others


def test_english_sounds_the_same_as_before_there_were_others():
    waves = [say([word], VOICES[i % 8], seed=i)[0] for i, word in enumerate(DIGITS)]
    assert [len(w) for w in waves] == [4000, 2480, 3040, 3240, 2360, 3200, 4360, 3280, 2960, 3680]
    sums = [float((w.astype(float) * np.sin(np.arange(len(w)) / 7)).sum()) for w in waves]  # every sample matters
    assert sums == pytest.approx(
        [-0.492343, 0.763202, -13.230259, 3.652401, 0.000241, -0.440264, 0.019249, 0.955392, -1.449753, 2.040151],
        abs=1e-4,
    )


@pytest.mark.parametrize("language", ["deu", "spa"])
def test_other_languages_are_spoken(language):
    words = list(WORDS[language])
    wave, times = say(words, VOICES[1], seed=3, language=language)
    again, _ = say(words, VOICES[1], seed=3, language=language)
    np.testing.assert_array_equal(wave, again)
    assert [w for w, _, _ in times] == words
    for _, start, end in times:
        assert 0.12 < end - start < 0.8
        assert np.sqrt((wave[round(start * 8000) : round(end * 8000)] ** 2).mean()) > 0.01


def template(wave):
    """Log spectrum (12 * 32,) of a word whose length and loudness are evened out."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 256)[::80]
    power = np.abs(np.fft.rfft(frames * np.hanning(256)))[:, :128] ** 2
    bands = np.log(power.reshape(len(frames), 32, 4).sum(2) + 1e-5)
    at = np.linspace(0, len(frames) - 1, 12)
    even = np.stack([np.interp(at, np.arange(len(frames)), column) for column in bands.T], 1)
    return (even - even.mean()).ravel()


def test_digits_of_all_languages_are_told_apart_by_their_means():
    every = [(language, word) for language, table in WORDS.items() for word in table]

    def takes(voices, seed):
        return np.array(
            [
                [template(say([w], v, seed=(seed, i), language=lang)[0]) for i, (lang, w) in enumerate(every)]
                for v in voices
            ]
        )

    means = takes(VOICES[:5], 0).mean(0)  # (words, features)
    found = takes(VOICES[5:], 1)  # of other voices: (voices, words, features)
    guess = ((found[:, :, None] - means) ** 2).sum(3).argmin(2)
    right = guess == np.arange(30)
    assert [right[:, i : i + 10].mean() > 0.85 for i in (0, 10, 20)] == [True] * 3
    assert right.mean() > 0.93


def test_words_and_languages_that_are_not_known_are_refused():
    with pytest.raises(DataError, match=r"words must be among null, eins, .* got 'one'"):
        say(["eins", "one"], VOICES[0], language="deu")
    with pytest.raises(ConfigError, match="language must be one of eng, deu, spa, got 'fra'"):
        say(["un"], VOICES[0], language="fra")


def test_random_voices_are_people_like_the_named_ones():
    voices = [random_voice(f"v{i}", (0, i)) for i in range(200)]
    assert random_voice("v3", (0, 3)) == voices[3]
    assert len({v.pitch for v in voices}) == 200
    for fact in ("pitch", "scale", "tempo", "breath", "tilt"):
        made, named = ([getattr(v, fact) for v in group] for group in (voices, VOICES))
        assert min(made) <= min(named) + 0.05 * abs(min(named))
        assert max(made) >= max(named)


def test_the_list_names_tasks_and_translations(folder):
    root, paths = folder
    source = read_source(str(root / "languages.jsonl"))
    assert source.bad == []
    assert len(paths) == 4 * 3 * 3 + 1
    assert all(path.is_file() for path in paths)
    asr = [u for u in source.utterances if u.task == "asr"]
    translated = [u for u in source.utterances if u.task == "st_eng"]
    assert len(asr) == 36
    assert len(translated) == 24
    assert {u.path for u in asr} == set(paths[:-1])
    for u in source.utterances:
        assert set(u.text.split()) <= set(WORDS[u.language])
        assert 1 <= len(u.text.split()) <= 4
        assert u.speaker in {voice.name for voice in SPLITS[u.split]}
        assert u.duration == pytest.approx(audio_info(u.path).duration, abs=1e-3)
    for u in translated:
        english = dict(zip(WORDS[u.language], DIGITS, strict=True))
        assert u.translation == " ".join(english[w] for w in u.text.split())
    assert {u.language for u in translated} == {"deu", "spa"}


def test_what_is_listed_is_what_is_said(folder):
    root, _ = folder
    line = json.loads((root / "languages.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    assert line["task"] == "st_eng"
    wave = read_audio(root / line["audio_filepath"], 8000)
    assert len(wave) == round(line["duration"] * 8000)
    assert 0.2 < np.abs(wave).max() <= 0.5001


def test_the_same_seed_gives_the_same_files(folder, tmp_path):
    again = write_languages(tmp_path, SPLITS, 3)
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in folder[1]]
    other = write_languages(tmp_path / "other", SPLITS, 3, seed=1)
    assert other[-1].read_bytes() != again[-1].read_bytes()


def test_training_reads_the_list_with_a_prefix(folder):
    data = SpeechData(root=str(folder[0] / "languages.jsonl"), sample_rate=8000, n_mels=40, vocabulary="words")
    data.setup("fit")
    assert data.rejected == []
    assert data.spec.languages == ("deu", "eng", "spa")
    assert data.spec.tasks == ("asr", "st_eng")
    batches = list(data.train_dataloader())
    spoken = {t for batch in batches for text in batch["texts"] for t in text.split()}
    assert spoken & set(DIGITS)
    assert all("transcripts" in batch for batch in batches)
    tokens = [data.spec.tokens[i] for i in batches[0]["targets"][0, :2].tolist()]
    assert tokens[0] in ("<deu>", "<eng>", "<spa>")
    assert tokens[1] in ("<asr>", "<st_eng>")
