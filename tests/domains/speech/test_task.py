"""The recognition task: what trains, what is logged and written, and what a training resumes with."""

import csv
import json
import re

import numpy as np
import pytest
import soundfile as sf
import torch
from lightning.pytorch import Callback, Trainer

from vertebra.domains.base import PredictionWriter, load_task
from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.saving import load_model, save_model
from vertebra.domains.speech.augment import Augment, SpecAugment
from vertebra.domains.speech.data import SpeechData
from vertebra.domains.speech.items import Concatenate
from vertebra.domains.speech.model import Emissions, PromptConfig
from vertebra.domains.speech.spec import SpeechSpec
from vertebra.domains.speech.task import SpeechRecognitionTask
from vertebra.domains.vision.spec import VisionSpec
from vertebra.errors import ConfigError, DataError

# without a split for validation
pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
WORDS = ("one", "two", "three", "four")
RATE = 8000


def speak(path, text="one", seconds=0.4, rate=RATE, **options):
    """Write a recording whose pitches tell the words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for word in text.split():
        time = np.arange(round(seconds * rate)) / rate
        pitch = 300.0 * (1 + WORDS.index(word)) if word in WORDS else 200.0
        parts.append(0.3 * np.sin(2 * np.pi * pitch * time) * np.hanning(len(time)))
    sf.write(path, np.concatenate(parts), rate, **options)
    return path


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")


def manifest(folder, records):
    lines = []
    for number, record in enumerate(records):
        path = speak(folder / f"{number}.wav", record.get("text", "one"), record.pop("seconds", 0.4))
        lines.append(json.dumps({"path": path.name, "id": str(number), **record}))
    write(folder / "data.jsonl", *lines)
    return str(folder / "data.jsonl")


def words(count, **fields):
    return [{"text": WORDS[i % 4], **fields} for i in range(count)]


def data(root, **options):
    settings = {"sample_rate": RATE, "n_mels": 20, "batch_size": 8, "val_fraction": 0.25, "test_fraction": 0.2}
    return SpeechData(root=str(root), **{**settings, **options})


def task(backbone="illama_test,causal=false", **options):
    settings = {"channels": 4, "optimizer": OptimizerConfig(lr=3e-3, warmup=0), **options}
    return SpeechRecognitionTask(backbone, **settings)


def trainer(folder, **options):
    settings = {"max_epochs": 1, "enable_progress_bar": False, "logger": False, "accelerator": "cpu", **options}
    return Trainer(default_root_dir=folder, enable_model_summary=False, enable_checkpointing=False, **settings)


# ---------------------------------------------------------------- every layout trains


def digits(root):
    names = ("zero", "one", "two", "three", "four", "five")
    for number in range(6):
        for take in (0, 7, 8):
            speak(root / f"{number}_ann_{take}.wav", names[number])


def pairs(root):
    for i in range(8):
        speak(root / f"{i}.ogg", WORDS[i % 4], rate=16_000)
        write(root / f"{i}.txt", WORDS[i % 4])


def librispeech(root):
    for split in ("train-clean-5", "dev-clean", "test-clean"):
        for i in range(4):
            speak(root / split / "19" / "198" / f"19-198-{split[:2]}{i:04}.flac", WORDS[i], rate=16_000)
        lines = [f"19-198-{split[:2]}{i:04} {WORDS[i].upper()}" for i in range(4)]
        write(root / split / "19" / "198" / "19-198.trans.txt", *lines)


def commonvoice(root):
    for split in ("train", "dev", "test"):
        for i in range(4):
            speak(root / "clips" / f"{split}{i}.mp3", WORDS[i], rate=48_000)
        rows = [f"ann\t{split}{i}.mp3\t{WORDS[i]}.\ten" for i in range(4)]
        write(root / f"{split}.tsv", "client_id\tpath\tsentence\tlocale", *rows)


def commands(root):
    for word in WORDS:
        for i in range(4):
            speak(root / word / f"a{i}_nohash_0.wav", word, rate=16_000)
    write(root / "validation_list.txt", *(f"{w}/a0_nohash_0.wav" for w in WORDS))
    write(root / "testing_list.txt", *(f"{w}/a1_nohash_0.wav" for w in WORDS))


def kaldi(root):
    for i in range(8):
        speak(root / "wav" / f"u{i}.wav", WORDS[i % 4])
    write(root / "wav.scp", *(f"u{i} wav/u{i}.wav" for i in range(8)))
    write(root / "text", *(f"u{i} {WORDS[i % 4]}" for i in range(8)))


def an4(root):
    for split in ("train", "test"):
        for i in range(4):
            path = root / "wav" / split / "ann" / f"{split}{i}.sph"
            speak(path.with_suffix(".wav"), WORDS[i]).rename(path.with_suffix(".wav"))
        write(root / "etc" / f"an4_{split}.fileids", *(f"{split}/ann/{split}{i}" for i in range(4)))
        lines = [f"<s> {WORDS[i].upper()} </s> ({split}{i})" for i in range(4)]
        write(root / "etc" / f"an4_{split}.transcription", *lines)


def lhotse(root):
    recordings, supervisions = [], []
    for i in range(8):
        speak(root / f"{i}.wav", WORDS[i % 4])
        source = {"type": "file", "channels": [0], "source": f"{i}.wav"}
        recordings.append({"id": f"r{i}", "sources": [source], "sampling_rate": RATE, "duration": 0.4})
        text = WORDS[i % 4]
        supervisions.append({"id": f"s{i}", "recording_id": f"r{i}", "start": 0, "duration": 0.4, "text": text})
    write(root / "recordings.jsonl", *map(json.dumps, recordings))
    write(root / "supervisions.jsonl", *map(json.dumps, supervisions))


def table(root):
    for i in range(8):
        speak(root / f"{i}.wav", WORDS[i % 4])
    write(root / "all.csv", "path,text", *(f"{i}.wav,{WORDS[i % 4]}" for i in range(8)))


def jsonl(root):
    manifest(root, words(8))


LAYOUTS = (digits, pairs, librispeech, commonvoice, commands, kaldi, an4, lhotse, table, jsonl)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
def test_every_layout_trains(layout, tmp_path):
    layout(tmp_path / "data")
    recordings = data(tmp_path / "data")
    fit, model = trainer(tmp_path), task()
    fit.fit(model, recordings)
    assert recordings.rejected == []
    assert fit.global_step > 0
    assert torch.isfinite(fit.callback_metrics["train/loss"])
    (found,) = fit.test(model, recordings, verbose=False)
    assert set(found) == {f"test/{n}" for n in ("loss", "wer", "cer", "exact", "blank")}
    assert all(np.isfinite(v) for v in found.values())


# ---------------------------------------------------------------- it learns, and what is left


def test_words_are_learned_and_the_results_written(tmp_path):
    recordings = data(manifest(tmp_path, words(32)), vocabulary="words")
    model = task(channels=8, subsampling=8, optimizer=OptimizerConfig(lr=2e-2, warmup=0))
    fit = trainer(tmp_path, max_epochs=30)
    fit.fit(model, recordings)
    (found,) = fit.test(model, recordings, verbose=False)
    assert found["test/wer"] == 0
    assert found["test/exact"] == 1
    assert model.write_results(tmp_path) == ["test_transcripts.csv"]
    with (tmp_path / "test_transcripts.csv").open() as f:
        rows = list(csv.DictReader(f))
    items = recordings.items("test")
    assert [r["name"] for r in rows] == items.names
    assert [r["reference"] for r in rows] == [r["hypothesis"] for r in rows] == items.texts
    assert all(0.3 < float(r["confidence"]) <= 1 for r in rows)


def test_files_are_predicted_into_a_table(tmp_path):
    recordings = data(manifest(tmp_path / "a", words(8)))
    model = task()
    trainer(tmp_path).fit(model, recordings)
    for i in range(3):
        speak(tmp_path / "b" / f"{i}.flac", rate=44_100)
    writer = PredictionWriter(tmp_path / "out.csv")
    others = SpeechData(predict=str(tmp_path / "b"), batch_size=2)
    trainer(tmp_path, callbacks=[writer]).predict(model, others, return_predictions=False)
    with (tmp_path / "out.csv").open() as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == ["name", "text", "language", "confidence"]
    assert [r["name"].rpartition("/")[2] for r in rows] == ["0.flac", "1.flac", "2.flac"]


def test_what_was_left_out_is_written(tmp_path):
    records = [*words(8), {"text": "!"}, {"text": "one two three four one two three four", "seconds": 0.03}]
    recordings = data(manifest(tmp_path, records), test_fraction=0.0, val_fraction=0.0)
    model = task()
    trainer(tmp_path).fit(model, recordings)
    assert model.write_results(tmp_path) == ["rejected.jsonl"]
    rows = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == [9, 10]
    assert rows[1]["rule"] == "its 0.24 seconds have too few positions for 37 tokens"
    assert len(recordings.items("train")) == 8


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())


@pytest.mark.parametrize("subsampling", [2, 8])
def test_the_loss_is_never_infinite_and_nothing_infeasible_is_trained_on(tmp_path, subsampling):
    records = [{"text": " ".join(WORDS[: 1 + i % 4]), "seconds": 0.015 * subsampling * (i // 4)} for i in range(4, 28)]
    recordings = data(manifest(tmp_path, records), augment=Augment(speed=(0.8, 1.2)), val_fraction=0.0)
    watch = Losses()
    trainer(tmp_path, max_epochs=3, callbacks=[watch]).fit(task(subsampling=subsampling), recordings)
    assert np.isfinite(watch.losses).all()
    assert min(watch.losses) > 0
    assert 0 < len(recordings.items("train")) < 24


def test_a_recording_damaged_after_the_start_stops_by_its_name(tmp_path):
    recordings = data(manifest(tmp_path, words(8)), val_fraction=0.0, test_fraction=0.0)
    recordings.setup("fit")
    (tmp_path / "3.wav").write_bytes((tmp_path / "3.wav").read_bytes()[:1000])
    with pytest.raises(DataError, match=r"3\.wav: .*To leave such recordings out, set data\.bad=skip\."):
        trainer(tmp_path).fit(task(), recordings)


def test_the_padding_is_logged(tmp_path, caplog):
    records = [{"text": "one", "seconds": 0.1 + 0.02 * i} for i in range(24)]
    recordings = data(manifest(tmp_path, records), batch_size=3, buckets=8, val_fraction=0.0)
    with caplog.at_level("INFO", logger="vertebra"):
        trainer(tmp_path).fit(task(), recordings)
    shares = re.search(r"padding ([\d.]+) % of samples, ([\d.]+) % in random order", caplog.text)
    assert 0 < float(shares[1]) < float(shares[2])


# ---------------------------------------------------------------- metrics


def say(model, texts):
    """Emissions that spell texts."""
    rows = [[t for i in model.tokenizer.encode(text) for t in (i, 0)] or [0] for text in texts]
    length = max(map(len, rows))
    logits = torch.zeros(len(rows), length, len(model.model.spec.tokens))
    for row, ids in enumerate(rows):
        logits[row, range(len(ids)), ids] = 20.0
    return Emissions(logits, torch.tensor([len(ids) for ids in rows]))


def evaluated(model, monkeypatch, found, batch, tmp_path):
    monkeypatch.setattr(model, "_encode", lambda batch, **options: found)
    model._trainer = trainer(tmp_path)
    model._reset("val")
    model.evaluate(model.metrics_of("val"), batch)
    return {k: v.item() for k, v in model.summarise(model.metrics_of("val")).items()}


def built(root, **options):
    recordings = data(root, val_fraction=0.0, test_fraction=0.0, **options)
    recordings.setup("fit")
    model = task().eval()
    model.build(recordings.spec)
    items = recordings.items("train")
    return model, items.fetch(np.arange(len(items)), 0)


def test_errors_are_counted_right(tmp_path, monkeypatch):
    records = [{"text": t} for t in ("one two", "three", "four one")]
    model, batch = built(manifest(tmp_path, records))
    found = evaluated(model, monkeypatch, say(model, ["one two", "tree", "four one two"]), batch, tmp_path)
    assert found["wer"] == pytest.approx(2 / 5)  # tree, and an inserted two
    assert found["cer"] == pytest.approx(5 / (7 + 5 + 8))
    assert found["exact"] == pytest.approx(1 / 3)
    assert found["blank"] == pytest.approx(0.5)
    assert set(found) == {"loss", "wer", "cer", "exact", "blank"}


def test_translations_and_languages_are_counted_right(tmp_path, monkeypatch):
    records = [
        {"text": "one two", "lang": "eng"},
        {"text": "two one", "lang": "deu"},
        {"text": "one", "lang": "eng", "task": "st_deu", "translation": "a b c d e"},
    ]
    model, batch = built(manifest(tmp_path, records))
    found = say(model, ["one", "two one", "a b c d e"])
    ids = model.model.ids
    spoken = torch.tensor([[ids["<eng>"]], [ids["<eng>"]], [ids["<eng>"]]])
    first = torch.zeros(3, 1, found.logits.shape[2]).scatter_(2, spoken[..., None], 20.0)
    found = Emissions(torch.cat([first, found.logits], 1), found.lengths + 1)
    values = evaluated(model, monkeypatch, found, batch, tmp_path)
    assert values["wer"] == pytest.approx(1 / 4)  # of recognition alone
    assert values["bleu"] == pytest.approx(1.0)
    assert values["language_accuracy"] == pytest.approx(2 / 3)
    assert values["exact"] == pytest.approx(2 / 3)
    said = model.read(found)
    assert [s["language"] for s in said] == ["eng"] * 3
    assert said[0]["text"] == "one"
    assert said[0]["confidence"] == pytest.approx(1.0, abs=1e-5)


def test_metrics_without_a_recording_are_not_logged(tmp_path, monkeypatch):
    records = [{"lang": "eng", "task": "st_deu", "translation": "a b c d"}]
    model, batch = built(manifest(tmp_path, records))
    found = evaluated(model, monkeypatch, say(model, ["a b c d"]), batch, tmp_path)
    assert "wer" not in found
    assert found["bleu"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("monitor", "mode"),
    [("val/wer", "min"), ("val/exact", "max"), ("val/language_accuracy", "max"), ("val/bleu", "max")],
)
def test_the_best_is_the_lowest_error_or_the_highest_share(monitor, mode):
    assert task(monitor=monitor).monitor_mode == mode


# ---------------------------------------------------------------- prefix, prompt, intermediate layers


def test_all_that_owsm_ctc_has_trains(tmp_path):
    records = []
    for i in range(12):
        translated = {"task": "st_deu", "translation": "eins", "previous": "two"} if i % 3 == 0 else {}
        split = "dev" if i % 4 < 2 else "train"
        records.append({"text": WORDS[i % 4], "lang": ("eng", "deu")[i % 2], "split": split, **translated})
    prompt = PromptConfig(dim=8, depth=1, num_heads=2, hidden_dim=16, every=2, cross_heads=2)
    model = task(
        "ebranchformer_test",
        intermediate=[1],
        transcript_layers=[1],
        prompt=prompt,
        feature_norm="utterance",
        dropout=0.1,
    )
    recordings = data(manifest(tmp_path, records), concatenate=Concatenate(items=(1, 3)))
    fit = trainer(tmp_path)
    fit.fit(model, recordings)
    assert torch.isfinite(fit.callback_metrics["train/loss"])
    assert {"val/language_accuracy", "val/bleu", "val/wer"} <= fit.callback_metrics.keys()
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = load_task(tmp_path / "a.ckpt")
    batch = recordings.items("val").fetch(np.arange(2), 0)
    with torch.no_grad():
        torch.testing.assert_close(again._encode(batch).logits, model.eval()._encode(batch).logits)


# ---------------------------------------------------------------- resuming, other spec, initial weights


def test_a_resume_within_an_epoch_gives_the_same_weights(tmp_path):
    root = manifest(tmp_path / "d", [{"text": WORDS[i % 4], "seconds": 0.2 + 0.02 * i} for i in range(20)])

    def parts():
        recordings = data(
            root,
            batch_size=4,
            val_fraction=0.0,
            test_fraction=0.0,
            augment=Augment(speed=(0.9, 1.1), noise_probability=0.5),
            concatenate=Concatenate(items=(1, 2)),
        )
        torch.manual_seed(0)
        return task(spec_augment=SpecAugment(freq_width=4, warp=0.1)), recordings

    whole, recordings = parts()
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(whole, recordings)
    steps = fit.num_training_batches
    assert steps > 3
    half = trainer(tmp_path, max_epochs=2)
    first, recordings = parts()

    class Save(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == steps + 2:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    half.callbacks.append(Save())
    half.fit(first, recordings)
    rest, recordings = parts()
    torch.manual_seed(1)
    trainer(tmp_path, max_epochs=2).fit(rest, recordings, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, a), b in zip(whole.state_dict().items(), rest.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_the_models_normalisation_and_rate_hold_for_other_data(tmp_path):
    root = manifest(tmp_path / "a", words(8))
    recordings = data(root, normalisation="raw")
    model = task()
    trainer(tmp_path).fit(model, recordings)
    save_model(model.model, tmp_path / "m")
    assert load_model(tmp_path / "m").spec.normalisation == "raw"
    other = SpeechData(root=manifest(tmp_path / "b", [{"text": "One two"}]), val_fraction=0, test_fraction=0, test=root)
    trainer(tmp_path).test(model, other, verbose=False)
    assert other.spec == recordings.spec
    assert other.items("test").texts[:2] == ["one", "two"]
    assert len(other.items("test").fetch(np.array([0]), 0)["waves"][0]) == 0.4 * RATE


@pytest.mark.parametrize("parts", ["all", "backbone"])
def test_a_model_with_another_vocabulary_gives_initial_weights(tmp_path, parts):
    source = task()
    trainer(tmp_path).fit(source, data(manifest(tmp_path / "a", words(8))))
    save_model(source.model, tmp_path / "m")
    recordings = data(manifest(tmp_path / "b", words(8)), vocabulary="words")
    recordings.setup("fit")
    model = task(init_from=str(tmp_path / "m"), init_parts=parts)
    model.build(recordings.spec)
    head = model.model.head.weight.clone()
    model.load_initial()
    saved, own = source.model.spec.tokens, recordings.spec.tokens
    known = [own.index(token) for token in own if token in saved and parts == "all"]  # the blank
    assert torch.equal(model.model.head.weight[known], source.model.head.weight[[saved.index(own[i]) for i in known]])
    fresh = [i for i in range(len(own)) if i not in known]
    assert torch.equal(model.model.head.weight[fresh], head[fresh])
    assert bool(known) == (parts == "all")
    for name, value in source.model.state_dict().items():
        if name.startswith(("backbone", "subsample")):
            assert torch.equal(model.model.state_dict()[name], value), name
    trainer(tmp_path).fit(model, recordings)


def test_other_data_and_values_are_refused():
    with pytest.raises(ConfigError, match="needs recordings, but the data is for the domain vision; choose another"):
        task().build(VisionSpec(task="classification", channels=3, height=8, width=8, classes=("a", "b")))
    with pytest.raises(ConfigError, match="intermediate_weight must be from 0 and below 1, got 1"):
        task(intermediate_weight=1.0)
    spec = SpeechSpec(tokens=("<blank>", "a"), sample_rate=RATE)
    model = task(spec_augment=SpecAugment())
    model.build(spec)
    assert model.spec_augment.warp_top_hz == RATE / 2


# ---------------------------------------------------------------- batches that fit a memory budget


def mixed(folder, count=24):
    return manifest(folder, [{"text": WORDS[i % 4], "seconds": 0.2 + 0.05 * i} for i in range(count)])


def budget(root, gib, **options):
    return data(root, batch_memory=gib, buckets=3, val_fraction=0.0, test_fraction=0.0, **options)


def test_batches_are_searched_for_a_memory_budget(tmp_path, caplog):
    root = mixed(tmp_path)
    sizes = []
    for gib in (0.0005, 0.001):
        recordings = budget(root, gib)
        fit, model = trainer(tmp_path), task()
        with caplog.at_level("INFO", logger="vertebra"):
            fit.fit(model, recordings)
        sampler = fit.train_dataloader.batch_sampler
        sizes.append(sampler.batch_sizes[:-1].tolist())
        for batch in sampler.batches():
            assert len(batch) <= sampler.batch_sizes[sampler.bucket_of[batch]].min()
    assert len(sizes[0]) == 3
    assert sizes[0] == sorted(sizes[0], reverse=True)  # shorter recordings, more of them
    assert sizes[0][0] > sizes[0][-1]
    assert all(a <= b for a, b in zip(*sizes, strict=True))
    assert sizes[0] != sizes[1]
    table = caplog.text.partition("batches for 0.0005 GiB:\n")[2].splitlines()
    assert table[0].split() == ["seconds", "to", "recordings"]
    assert [int(line.split()[1]) for line in table[1:4]] == sizes[0]
    assert table[3].split()[0] == "1.35"


def test_the_search_changes_neither_weights_nor_random_numbers(tmp_path, monkeypatch):
    states = []

    def start(self):
        states.append((torch.get_rng_state(), {k: v.clone() for k, v in self.state_dict().items()}))

    monkeypatch.setattr(SpeechRecognitionTask, "on_fit_start", start)
    for options in ({}, {"batch_memory": 0.001}):
        torch.manual_seed(3)
        trainer(tmp_path, max_steps=1, max_epochs=-1).fit(task(dropout=0.2), data(mixed(tmp_path), **options))
    (rng, weights), (rng2, weights2) = states
    assert torch.equal(rng, rng2)
    assert all(torch.equal(weights[k], weights2[k]) for k in weights)


def test_a_resume_takes_the_sizes_that_were_found(tmp_path, monkeypatch):
    root = mixed(tmp_path)
    fit = trainer(tmp_path)
    fit.fit(task(), budget(root, 0.001))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    sizes = fit.train_dataloader.batch_sampler.batch_sizes
    monkeypatch.setattr("vertebra.domains.speech.data.largest_batches", lambda *a, **k: pytest.fail("searched again"))
    again = trainer(tmp_path, max_epochs=2)
    again.fit(task(), budget(root, 0.001), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.train_dataloader.batch_sampler.batch_sizes.tolist() == sizes.tolist()


def test_prefix_prompt_and_two_dimensional_buckets_are_searched_too(tmp_path):
    records = [{"text": WORDS[i % 4], "lang": ("eng", "deu")[i % 2], "previous": "one two"} for i in range(16)]
    prompt = PromptConfig(dim=8, depth=1, num_heads=2, hidden_dim=16, every=1, cross_heads=2)
    recordings = budget(manifest(tmp_path, records), 0.002, target_buckets=2)
    fit = trainer(tmp_path)
    fit.fit(task(prompt=prompt, spec_augment=SpecAugment(freq_width=4)), recordings)
    sampler = fit.train_dataloader.batch_sampler
    assert sorted(i for b in sampler.batches() for i in b.tolist()) == list(range(16))


def test_a_budget_too_small_for_one_recording_is_told(tmp_path):
    message = (
        r"batch_memory must hold a step on one recording of 1\.35 s, 0\.0001 GiB do not; raise it, lower max_seconds, "
        "or choose a smaller backbone"
    )
    with pytest.raises(ConfigError, match=message):
        trainer(tmp_path).fit(task(), budget(mixed(tmp_path), 1e-4))
