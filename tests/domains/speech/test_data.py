"""The data module of recordings: splits, what is left out and reported, rows, prefixes, prompts, vocabularies."""

import numpy as np
import pytest
import soundfile as sf
import torch
from made_recordings import everything, manifest, ready, reasons, speak, words

from vertebra.domains.speech.alignment import frames_needed
from vertebra.domains.speech.augment import Augment
from vertebra.domains.speech.data import SpeechData
from vertebra.domains.speech.items import Concatenate
from vertebra.errors import ConfigError, DataError


def names(data):
    return {split: items.names for split, items in data._splits.items()}


# ---------------------------------------------------------------- waves


@pytest.mark.parametrize("rate", [8000, 11_025, 44_100, 48_000])
def test_any_sample_rate_becomes_the_models(tmp_path, rate):
    time = np.arange(rate) / rate
    sf.write(tmp_path / "0.wav", np.stack([np.sin(2 * np.pi * 440 * time), np.zeros(rate)], 1) / 2, rate, "PCM_24")
    data = ready(manifest(tmp_path, [{"path": "0.wav", "text": "one"}]))
    wave = everything(data)["waves"][0]
    assert len(wave) == 8000
    inner = wave[400:-400].numpy()
    expected = 0.25 * np.sin(2 * np.pi * 440 * np.arange(8000) / 8000)[400:-400]
    np.testing.assert_allclose(inner, expected, atol=2e-3)
    assert data.items("train").lengths.tolist() == [8000]


def test_a_segment_is_read_alone(tmp_path):
    speak(tmp_path / "long.wav", 2.0)
    records = [{"path": "long.wav", "start": 0.25, "end": 0.75, "text": "one"}, {"path": "long.wav", "text": "two"}]
    batch = everything(ready(manifest(tmp_path, records)))
    assert batch["lengths"].tolist() == [4000, 16_000]
    assert torch.equal(batch["waves"][0, :4000], batch["waves"][1, 2000:6000])
    assert not batch["waves"][0, 4000:].any()
    assert batch["texts"] == ["one", "two"]


# ---------------------------------------------------------------- splits


def test_splits_of_the_source_are_kept_and_missing_ones_drawn(tmp_path):
    records = [{**r, "split": ("train", "train", "dev", "test")[i % 4]} for i, r in enumerate(words(16))]
    data = ready(manifest(tmp_path, records), val_fraction=0.3, test_fraction=0.3)
    assert {s: [int(n) % 4 for n in found] for s, found in names(data).items()} == {
        "train": [0, 1] * 4,
        "val": [2] * 4,
        "test": [3] * 4,
    }
    for record in records:
        record["split"] = record["split"].replace("dev", "train")
    drawn = names(ready(manifest(tmp_path, records), val_fraction=0.25, test_fraction=0.3))
    assert len(drawn["val"]) == 3
    assert sorted(drawn["train"] + drawn["val"], key=int) == [r["id"] for r in records if r["split"] == "train"]
    assert len(drawn["test"]) == 4


def test_drawn_splits_depend_on_the_seed_alone(tmp_path):
    root = manifest(tmp_path, words(20))
    options = {"val_fraction": 0.2, "test_fraction": 0.1}
    first, again, other = (names(ready(root, seed=seed, **options)) for seed in (0, 0, 1))
    assert {k: len(v) for k, v in first.items()} == {"train": 14, "val": 4, "test": 2}
    assert first == again
    assert first != other
    assert sorted((n for part in first.values() for n in part), key=int) == [str(i) for i in range(20)]


def test_a_drawn_split_has_at_least_one_recording(tmp_path):
    found = names(ready(manifest(tmp_path, words(4)), val_fraction=0.1, test_fraction=0.1))
    assert {k: len(v) for k, v in found.items()} == {"train": 2, "val": 1, "test": 1}


def test_other_sources_for_validation_and_test(tmp_path):
    for folder in "abc":
        (tmp_path / folder).mkdir()
    roots = [
        manifest(tmp_path / "abc"[i], [{**r, "id": f"{'abc'[i]}{r['id']}"} for r in words(3 + i)]) for i in (0, 1, 2)
    ]
    data = ready(roots[0], val=roots[1], test=roots[2], val_fraction=0.5, test_fraction=0.4)
    assert {k: len(v) for k, v in names(data).items()} == {"train": 3, "val": 4, "test": 5}
    assert all(n.startswith("c") for n in names(data)["test"])
    both = SpeechData(root=roots[:2], sample_rate=8000, n_mels=20, val_fraction=0.0, test_fraction=0.0)
    both.setup("fit")
    assert len(names(both)["train"]) == 7


def test_speakers_left_out(tmp_path):
    records = [{**r, "speaker": "abc"[i % 3], "split": "test" if i < 3 else "train"} for i, r in enumerate(words(12))]
    root = manifest(tmp_path, records)
    found = names(ready(root, test_speakers=["a"], val_speakers=["b"]))
    assert {s: {int(n) % 3 for n in v} for s, v in found.items()} == {"train": {2}, "val": {1}, "test": {0}}
    assert len(found["train"]) == 4  # the source's own splits do not count
    only_val = names(ready(root, val_speakers=["b"]))
    assert only_val["test"] == ["0", "2"]
    with pytest.raises(ConfigError, match=r"test_speakers must be in the data \(a, b, c\), got 'd'\."):
        ready(root, test_speakers=["a", "d"])


# ---------------------------------------------------------------- what is left out


def test_what_cannot_be_learned_is_left_out_and_reported(tmp_path, caplog):
    records = [
        *words(4),
        {"text": ""},
        {"id": "none"},
        {"text": "?!"},
        {"text": "five", "seconds": 0.01},
        {"text": "six", "seconds": 3.0},
    ]
    with caplog.at_level("WARNING", logger="vertebra"):
        data = ready(manifest(tmp_path, records), max_seconds=2.0)
    assert names(data)["train"] == ["0", "1", "2", "3"]
    assert reasons(data) == [
        ("4.wav", "the transcript is empty"),
        ("5.wav", "the transcript is empty"),
        ("7.wav", "its length must be from 0.02 to 2 seconds, got 0.01"),
        ("8.wav", "its length must be from 0.02 to 2 seconds, got 3"),
        ("6.wav", "nothing is left of the transcript '?!'"),
    ]
    assert [bad.line for bad in data.rejected] == [5, 6, 8, 9, 7]
    assert str(data.rejected[-1]).endswith(
        "6.wav, line 7: nothing is left of the transcript '?!'; use normalisation=raw."
    )
    assert "5 recordings are left out: 2 because the transcript is empty; " in caplog.text
    assert "".join(data.spec.tokens[1:]) == "efhnortuw"  # nothing is learned from them


def test_manifest_lines_that_are_refused_are_reported_too(tmp_path):
    records = [*words(2), {"path": "missing.wav", "text": "x"}]
    data = ready(manifest(tmp_path, records))
    assert data.rejected[0].line == 3
    assert "the audio must be a file" in data.rejected[0].rule


def test_unknown_characters_are_never_learned_but_are_errors_in_a_test(tmp_path):
    first = ready(manifest(tmp_path, words(4)))
    other = tmp_path / "other"
    other.mkdir()
    records = [{"text": "one"}, {"text": "exit"}, {"text": "tax", "split": "test"}]
    data = SpeechData(root=manifest(other, records), val_fraction=0.0, sample_rate=8000)
    data.use_spec(first.spec)
    data.setup("fit")
    data.setup("test")
    assert everything(data)["texts"] == ["one"]
    assert reasons(data) == [("1.wav", "the vocabulary lacks 'x' 'i'")]
    tested = everything(data, "test")
    assert tested["texts"] == ["tax"]
    assert [first.spec.tokens[i] for i in tested["targets"][0]] == ["t"]


def test_targets_that_do_not_fit_are_left_out(tmp_path, caplog):
    data = ready(manifest(tmp_path, [{"text": "one"}, {"text": "one two three four"}, {"text": "twoo"}]), "fit")
    seen = []

    def fits(samples, ids):
        seen.append((samples.tolist(), [frames_needed(row) for row in ids]))
        return np.array([frames_needed(row) <= 5 for row in ids])

    with caplog.at_level("WARNING", logger="vertebra"):
        data.keep_feasible(fits)
    assert seen == [([4000] * 3, [3, 19, 5])]
    assert everything(data)["texts"] == ["one", "twoo"]
    assert reasons(data) == [("1.wav", "its 0.5 seconds have too few positions for 18 tokens")]
    assert "1 recordings are left out: 1 because its 0.5 seconds" in caplog.text
    data.keep_feasible(fits)
    assert len(data.rejected) == 1
    with pytest.raises(DataError, match="no target fits its recording; choose a lower subsampling, or words"):
        data.keep_feasible(lambda samples, ids: np.zeros(len(ids), bool))


def test_speed_and_rows_leave_less_room(tmp_path):
    root = manifest(tmp_path, words(4))
    counts = []

    def fits(samples, ids):
        counts.append((samples.tolist(), [len(row) for row in ids]))
        return np.ones(len(ids), bool)

    ready(root, augment=Augment(speed=(0.8, 1.25), speed_step=0.05)).keep_feasible(fits)
    ready(root, concatenate=Concatenate(items=(1, 3))).keep_feasible(fits)
    assert counts == [([3200] * 4, [3, 3, 5, 4]), ([4000] * 4, [4, 4, 6, 5])]


def test_a_transcript_beside_a_translation_must_fit_too(tmp_path):
    records = [
        {"text": "one", "lang": "eng", "task": "st_deu", "translation": "eins"},
        {"text": "one two three", "lang": "eng", "task": "st_deu", "translation": "eins"},
    ]
    data = ready(manifest(tmp_path, records), "fit")
    data.keep_feasible(lambda samples, ids: np.array([frames_needed(row) <= 5 for row in ids]))
    assert len(data.items("train")) == 1
    assert reasons(data) == [("1.wav", "its 0.5 seconds have too few positions for 13 tokens")]


def test_a_segment_behind_the_end_is_left_out(tmp_path):
    speak(tmp_path / "a.wav")
    records = [{"path": "a.wav", "text": "one"}, {"path": "a.wav", "text": "two", "start": 0.7}]
    assert reasons(ready(manifest(tmp_path, records))) == [("a.wav", "start must be before the end, got 0.7 s")]


def damaged(folder):
    """A truncated, a silent, a mislabelled and an empty recording beside two good ones."""
    for name in ("good", "fine"):
        speak(folder / f"{name}.flac")
    whole = (folder / "good.flac").read_bytes()
    (folder / "cut.flac").write_bytes(whole[: len(whole) // 2])
    speak(folder / "silent.wav", gain=0.0)
    (folder / "text.wav").write_text("no sound")
    for path in [*folder.glob("*.flac"), *folder.glob("*.wav")]:
        path.with_suffix(".txt").write_text("one two")
    return folder


def test_damaged_recordings_are_left_out_where_asked(tmp_path):
    data = ready(damaged(tmp_path), bad="skip")
    assert names(data)["train"] == ["fine", "good"]
    found = dict(reasons(data))
    assert set(found) == {"cut.flac", "silent.wav", "text.wav"}
    assert found["silent.wav"] == "there is nothing but silence"
    assert torch.isfinite(everything(data)["waves"]).all()


@pytest.mark.parametrize("name", ["cut.flac", "silent.wav", "text.wav"])
def test_a_damaged_recording_stops_the_training_by_its_name(tmp_path, name):
    damaged(tmp_path)
    for path in tmp_path.iterdir():
        if path.stem not in (name.partition(".")[0], "good"):
            path.unlink()
    with pytest.raises(DataError, match=rf"{name}: .*To leave such recordings out, set data\.bad=skip\."):
        everything(ready(tmp_path))


def test_silence_is_an_error_where_a_spec_is_given_and_no_error_to_predict(tmp_path):
    speak(tmp_path / "a" / "0.wav").with_suffix(".txt").write_text("one")
    spec = ready(tmp_path / "a").spec
    silent = speak(tmp_path / "b" / "0.wav", gain=1e-5)
    silent.with_suffix(".txt").write_text("one")
    data = SpeechData(root=str(tmp_path / "b"), predict=str(silent), val_fraction=0.0, test_fraction=0.0)
    data.use_spec(spec)
    data.setup("fit")
    with pytest.raises(DataError, match=r"0\.wav: there is nothing but silence; take the recording out\. To leave"):
        everything(data)
    skipping = SpeechData(predict=str(silent), bad="skip")
    skipping.use_spec(spec)
    skipping.setup("predict")
    assert everything(skipping, "predict")["lengths"].tolist() == [4000]


def test_reasons_are_kept_over_stages(tmp_path):
    records = [*words(3), {"text": "!"}, {"text": "?", "split": "test"}]
    data = ready(manifest(tmp_path, records), "fit")
    assert [bad.line for bad in data.rejected] == [4]
    data.setup("test")
    assert [bad.line for bad in data.rejected] == [4, 5]
    with pytest.raises(
        DataError, match="no test data; give test, another folder or manifest, or test_fraction above 0"
    ):
        data.items("test")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.6, "test_fraction": 0.5}, "must be from 0 and below 1 together, got 0.6 and 0.5"),
        ({"min_seconds": 3.0, "max_seconds": 2.0}, r"min_seconds \(3.0\) must be below max_seconds \(2.0\)"),
        ({"piece_model": "x.model"}, "piece_model needs vocabulary=sentencepiece, got characters"),
        ({"bad": "ignore"}, "bad must be error or skip, got 'ignore'"),
        ({"no_language": 1.5}, "no_language must be from 0 to 1, got 1.5"),
        ({"no_prompt": -0.1}, "no_prompt must be from 0 to 1, got -0.1"),
        ({"batch_seconds": 0.0}, "batch_seconds must be above 0, got 0.0"),
        ({"quadratic_seconds": -1.0}, "quadratic_seconds must be above 0, got -1.0"),
        ({"batch_memory": 0.0}, "batch_memory must be above 0 GiB, got 0.0"),
        ({"root": None}, "give root, a folder or a manifest of transcribed recordings, or predict"),
    ],
)
def test_settings_that_contradict_each_other(options, message):
    with pytest.raises(ConfigError, match=message):
        SpeechData(**{"root": "x", **options})


def test_errors_of_missing_data(tmp_path):
    with pytest.raises(DataError, match="no train data to learn the vocabulary from; give root"):
        ready(manifest(tmp_path, [{"text": ""}]))
    with pytest.raises(DataError, match="no train data to learn the vocabulary from; give root"):
        ready(None, "predict", predict=str(tmp_path))
    with pytest.raises(
        DataError, match="prefix=true needs a language for every recording; add the column or key 'lang'"
    ):
        ready(manifest(tmp_path, words(2)), prefix=True)
    with pytest.raises(DataError, match=r"none\.model: the file cannot be read"):
        ready(manifest(tmp_path, words(2)), vocabulary="sentencepiece", piece_model=str(tmp_path / "none.model"))
    with pytest.raises(ConfigError, match="items must be two rising numbers from 1, got"):
        Concatenate(items=(3, 2))
    with pytest.raises(ConfigError, match="gap must be two rising numbers from 0, got"):
        Concatenate(gap=(-0.1, 0.2))


# ---------------------------------------------------------------- vocabularies


def test_vocabularies(tmp_path):
    root = manifest(tmp_path, [{"text": "Two, one!"}, {"text": "three one"}])
    assert ready(root).spec.tokens == ("<blank>", " ", *"ehnortw")
    assert ready(root, normalisation="raw").spec.tokens == ("<blank>", *" !,Tehnortw")
    data = ready(root, vocabulary="words")
    assert data.spec.tokens == ("<blank>", "one", "three", "two")
    batch = everything(data)
    assert batch["targets"].tolist() == [[3, 1], [2, 1]]
    assert batch["texts"] == ["two one", "three one"]


def test_sentencepiece_is_trained_on_the_transcripts_or_given(tmp_path):
    import base64

    root = manifest(tmp_path, [{"text": "one two three four"}, {"text": "four three two one one"}])
    data = ready(root, vocabulary="sentencepiece", vocabulary_size=14)
    again = ready(root, vocabulary="sentencepiece", vocabulary_size=14)
    assert len(data.spec.tokens) == 14
    assert data.spec == again.spec
    items = data.items("train")
    assert [items.tokenizer.decode(items.encode(t)) for t in items.texts] == items.texts
    model = tmp_path / "given.model"
    model.write_bytes(base64.b64decode(data.spec.pieces))
    given = ready(root, vocabulary="sentencepiece", piece_model=str(model))
    assert given.spec.tokens == data.spec.tokens
    assert torch.equal(everything(given)["targets"], everything(data)["targets"])
    other = ready(
        manifest(tmp_path, [{"text": "one"}, {"text": "six"}]), vocabulary="sentencepiece", piece_model=str(model)
    )
    assert everything(other)["texts"] == ["one"]
    assert reasons(other)[0][1].startswith("the vocabulary lacks ")


def test_the_specs_statistics_whiten_the_training_data(tmp_path):
    from vertebra.domains.speech.frontend import LogMel

    data = ready(manifest(tmp_path, words(6)))
    batch = everything(data)
    features = LogMel(8000, 20)(batch["waves"], batch["lengths"])[0].flatten(0, 1)
    torch.testing.assert_close(torch.tensor(data.spec.mean), features.mean(0), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.tensor(data.spec.std), features.std(0), atol=1e-3, rtol=0)
