"""Items of a training on recordings: rows, lengths and batches, prefixes, prompts."""

import re

import numpy as np
import pytest
import torch
from made_recordings import everything, manifest, ready, reasons, words

from vertebra.backbones.random import draw_uniform, item_uniform
from vertebra.domains.batching import BatchLoader
from vertebra.domains.buckets import padding_of
from vertebra.domains.speech.augment import Augment
from vertebra.domains.speech.data import SpeechData, padding_line
from vertebra.domains.speech.items import Concatenate
from vertebra.errors import ConfigError


def same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, second[key]), key
        else:
            assert value == second[key], key


# ---------------------------------------------------------------- rows


def voices(folder, count=24, **fields):
    records = words(count, **fields)
    for number, record in enumerate(records):
        record |= {"speaker": "ab"[number % 2], "seconds": 0.2 + 0.01 * number}
    return manifest(folder, records)


def members(data, items, epoch, split="train"):
    return [data.items(split)._row(i, epoch) for i in items]


def test_rows_have_the_numbers_and_gaps_asked_for_and_change_with_the_epoch(tmp_path):
    rules = Concatenate(items=(1, 4), gap=(0.1, 0.3))
    data = ready(voices(tmp_path), concatenate=rules)
    batch, later = everything(data), everything(data, epoch=1)
    counts = [len(text.split()) for text in batch["texts"]]
    assert sorted(set(counts)) == [1, 2, 3, 4]
    assert counts == [len(text.split()) for text in later["texts"]]
    assert batch["texts"] != later["texts"]
    same(everything(data), batch)
    alone = ready(voices(tmp_path))
    waves, lengths = everything(alone)["waves"], everything(alone)["lengths"]
    for item, row in enumerate(members(data, range(24), 0)):
        assert row[0] == item
        assert len({r % 2 for r in row}) == 1  # the same speaker
        wave = batch["waves"][item, : batch["lengths"][item]]
        gap = len(wave) - int(lengths[row].sum())
        assert 0.1 * 8000 * (len(row) - 1) - len(row) <= gap <= 0.3 * 8000 * (len(row) - 1)
        assert torch.equal(wave[: lengths[item]], waves[item, : lengths[item]])
        assert torch.equal(wave[-lengths[row[-1]] :], waves[row[-1], : lengths[row[-1]]])


def test_rows_may_mix_speakers_but_never_languages(tmp_path):
    data = ready(voices(tmp_path), concatenate=Concatenate(items=(4, 4), same_speaker=False))
    assert any(len({r % 2 for r in row}) == 2 for row in members(data, range(24), 0))
    records = [{**r, "lang": ("eng", "deu")[i % 2]} for i, r in enumerate(words(12))]
    mixed = ready(manifest(tmp_path, records), concatenate=Concatenate(items=(4, 4)))
    assert all(len({r % 2 for r in row}) == 1 for row in members(mixed, range(12), 0))


def test_characters_of_rows_have_a_space(tmp_path):
    data = ready(voices(tmp_path), concatenate=Concatenate(items=(2, 2)))
    assert data.spec.tokens[:2] == ("<blank>", " ")
    rows = zip(everything(data)["targets"], everything(data)["texts"], strict=True)
    assert all(text_of(data, ids[ids > 0]) == text for ids, text in rows)
    alone = ready(voices(tmp_path)).spec
    assert " " not in alone.tokens
    other = SpeechData(root=voices(tmp_path), concatenate=Concatenate(items=(1, 2)))
    other.use_spec(alone)
    with pytest.raises(ConfigError, match="concatenate needs a space among the model's characters, got none; train"):
        other.setup("fit")


def test_rows_of_an_evaluation_have_their_own_numbers_and_recordings(tmp_path):
    rules = Concatenate(items=(1, 3), eval_items=(5, 7))
    data = ready(voices(tmp_path, 40), concatenate=rules, val_fraction=0.3)
    counts = {s: {len(t.split()) for t in everything(data, s)["texts"]} for s in ("train", "val")}
    assert counts == {"train": {1, 2, 3}, "val": {5, 6, 7}}
    same(everything(data, "val"), everything(data, "val"))
    paths = {s: {u.path for u in data.items(s).recordings.utterances} for s in ("train", "val")}
    assert not paths["train"] & paths["val"]
    plain = ready(voices(tmp_path, 40), concatenate=Concatenate(items=(2, 2)), val_fraction=0.3)
    assert {len(t.split()) for t in everything(plain, "val")["texts"]} == {2}


def test_lengths_of_rows_are_right_on_average(tmp_path):
    data = ready(voices(tmp_path, 100), concatenate=Concatenate(items=(1, 6)))
    items = data.items("train")
    found = np.mean([everything(data, epoch=e)["lengths"].numpy() for e in range(6)], 0)
    assert np.corrcoef(items.lengths, found)[0, 1] > 0.95
    assert items.lengths.sum() == pytest.approx(found.sum(), rel=0.02)
    tokens = everything(data)["target_lengths"].numpy()
    assert items.target_lengths.sum() == pytest.approx(tokens.sum(), rel=0.15)


# ---------------------------------------------------------------- lengths and batches


def test_no_item_is_longer_than_the_sampler_is_told(tmp_path):
    augment = Augment(speed=(0.8, 1.2), pad_seconds=0.1, reverb_probability=0.5, noise_probability=0.5)
    data = ready(voices(tmp_path), augment=augment, batch_size=100, batch_seconds=3.0)
    told = data.items("train").lengths
    real = np.stack([everything(data, epoch=e)["lengths"].numpy() for e in range(12)])
    assert (real <= told).all()
    assert (real / told).max() > 0.85
    for batch in data.train_dataloader():
        assert batch["waves"].numel() <= 3.0 * 8000
    plain = everything(ready(voices(tmp_path)))["lengths"]
    assert ready(voices(tmp_path)).items("train").lengths.tolist() == plain.tolist()


def test_batches_hold_similar_lengths_and_every_item_once(tmp_path):
    data = ready(voices(tmp_path, 64), buckets=4, target_buckets=2, batch_size=4, batch_seconds=None)
    loader = data.train_dataloader()
    assert sorted(i for batch in loader for i in batch["index"].tolist()) == list(range(64))
    lengths = data.items("train").lengths
    plan = loader.batch_sampler.global_batches(0)
    assert padding_of(plan, lengths) < padding_of(np.split(np.random.default_rng(0).permutation(64), 16), lengths) / 2
    line = padding_line(loader.batch_sampler)
    shares = [
        float(share) for share in re.fullmatch(r"padding (\S+) % of samples, (\S+) % in random order", line).groups()
    ]
    assert shares[0] == pytest.approx(100 * padding_of(plan, lengths), abs=0.06)
    assert shares[0] < shares[1] / 2


def test_batches_are_the_same_with_workers_and_after_a_pause(tmp_path):
    options = {"augment": Augment(speed=(0.9, 1.1), noise_probability=0.5), "batch_size": 4, "val_fraction": 0.0}
    alone, helped = (ready(voices(tmp_path), num_workers=n, **options).train_dataloader() for n in (0, 2))
    for loader in (alone, helped):
        loader.batch_sampler.set_epoch(3)
    first = list(alone)
    for a, b in zip(first, helped, strict=True):
        same(a, b)
    paused = ready(voices(tmp_path), **options).train_dataloader()
    assert isinstance(paused, BatchLoader)
    paused.load_state_dict({"epoch": 3, "batch": 2})
    for a, b in zip(first[2:], paused, strict=True):
        same(a, b)
    alone.batch_sampler.set_epoch(4)
    assert [b["index"].tolist() for b in alone] != [b["index"].tolist() for b in first]


def test_an_item_changes_with_the_epoch_and_not_with_its_batch(tmp_path):
    items = ready(voices(tmp_path), augment=Augment(noise_probability=1.0)).items("train")
    whole, one = items.fetch(np.arange(6), 2), items.fetch(np.array([4]), 2)
    length = int(one["lengths"][0])
    assert torch.equal(whole["waves"][4, :length], one["waves"][0])
    assert not torch.equal(items.fetch(np.array([4]), 3)["waves"], one["waves"])


@pytest.mark.parametrize("key", [(0, 0, 0, 0), (7, 3, 12_345, 401), (2**40, 10**6, 2**60, 304)])
def test_one_draw_is_that_of_many(key):
    assert draw_uniform(*key) == item_uniform(*key)


def test_two_ranks_share_an_epoch(tmp_path):
    data = ready(voices(tmp_path), batch_size=4)
    items = data.items("train")
    samplers = [data.sampler("train", items, shuffle=True, rank=r, world_size=2) for r in (0, 1)]
    parts = [[i for batch in s.batches() for i in batch.tolist()] for s in samplers]
    assert len(samplers[0]) == len(samplers[1])
    assert sorted(parts[0] + parts[1]) == list(range(24))


# ---------------------------------------------------------------- prefix and prompt


SPOKEN = [
    {"text": "one two", "lang": "eng"},
    {"text": "eins zwei", "lang": "deu"},
    {"text": "three", "lang": "eng", "task": "st_deu", "translation": "drei"},
    {"lang": "eng", "task": "st_deu", "translation": "vier"},
]


def text_of(data, ids, split="train"):
    return "".join(data.spec.tokens[i] for i in ids.tolist())


def test_languages_and_tasks_become_tokens(tmp_path):
    data = ready(manifest(tmp_path, SPOKEN), no_language=0.0)
    assert data.spec.tokens[-5:] == ("<nolang>", "<deu>", "<eng>", "<asr>", "<st_deu>")
    assert (data.spec.languages, data.spec.tasks) == (("deu", "eng"), ("asr", "st_deu"))
    batch = everything(data)
    assert [text_of(data, row) for row in batch["prefix"]] == [
        "<eng><asr>",
        "<deu><asr>",
        "<eng><st_deu>",
        "<eng><st_deu>",
    ]
    targets = [text_of(data, row[:n]) for row, n in zip(batch["targets"], batch["target_lengths"], strict=True)]
    assert targets == ["<eng><asr>one two", "<deu><asr>eins zwei", "<eng><st_deu>drei", "<eng><st_deu>vier"]
    assert batch["transcript_lengths"].tolist() == [9, 11, 7, -1]
    assert text_of(data, batch["transcripts"][2][:7]) == "<eng><st_deu>three"
    assert text_of(data, batch["language"]) == "<eng><deu><eng><eng>"
    assert batch["texts"] == ["one two", "eins zwei", "drei", "vier"]


def test_one_language_needs_no_prefix_but_may_have_one(tmp_path):
    records = words(2, lang="eng")
    assert "prefix" not in everything(ready(manifest(tmp_path, records)))
    data = ready(manifest(tmp_path, records), prefix=True)
    assert data.spec.languages == ("eng",)
    assert "transcripts" not in everything(data)
    plain = ready(manifest(tmp_path, SPOKEN), prefix=False)
    assert plain.spec.languages == ()


def test_the_language_is_hidden_as_often_as_asked_and_always_in_an_evaluation(tmp_path):
    records = [{**r, "lang": ("eng", "deu")[i % 2]} for i, r in enumerate(words(8))]
    data = ready(manifest(tmp_path, records), no_language=0.3, val_fraction=0.3)
    hidden = data.items("train").tokenizer.id_of("<nolang>")
    shown = torch.stack([everything(data, epoch=e)["prefix"][:, 0] for e in range(60)])
    assert (shown == hidden).float().mean().item() == pytest.approx(0.3, abs=0.08)
    assert (everything(data, "val")["prefix"][:, 0] == hidden).all()
    assert hidden not in everything(data)["targets"]


def test_recordings_without_language_or_of_another_are_left_out(tmp_path):
    data = ready(manifest(tmp_path, [*SPOKEN, {"text": "one"}]))
    assert reasons(data) == [("4.wav", "language '' and task 'asr' are not the model's")]


def test_files_to_predict_need_no_language(tmp_path):
    data = ready(manifest(tmp_path, SPOKEN), predict=str(tmp_path / "0.wav"))
    data.setup("predict")
    assert text_of(data, everything(data, "predict")["prefix"][0]) == "<nolang><asr>"


def test_a_row_of_translations_has_the_transcript_of_all(tmp_path):
    records = [{"text": "one", "lang": "eng", "task": "st_deu", "translation": "eins"} for _ in range(3)]
    batch = everything(data := ready(manifest(tmp_path, records), concatenate=Concatenate(items=(2, 2))))
    assert batch["texts"] == ["eins eins"] * 3
    found = [text_of(data, row[:n]) for row, n in zip(batch["transcripts"], batch["transcript_lengths"], strict=True)]
    assert found == ["<eng><st_deu>one one"] * 3


def test_a_transcript_the_vocabulary_lacks_is_not_learned_in_part(tmp_path):
    spec = ready(manifest(tmp_path, SPOKEN)).spec
    records = [SPOKEN[2], {**SPOKEN[2], "text": "xyz", "path": "2.wav", "id": "x"}]
    data = SpeechData(root=manifest(tmp_path, records), val_fraction=0.0, test_fraction=0.0)
    data.use_spec(spec)
    data.setup("fit")
    assert len(data.items("train")) == 1
    assert reasons(data) == [("2.wav", "the vocabulary lacks 'x' 'y'")]


def test_prompts(tmp_path):
    records = [{"text": "one", "previous": "Two!"}, {"text": "two"}, {"text": "one", "previous": "six"}]
    data = ready(manifest(tmp_path, [{**r, "seconds": 0.5} for r in records]), no_prompt=0.0)
    assert data.spec.tokens == ("<blank>", *"enotw", "<na>")
    batch = everything(data)
    prompts = [text_of(data, row[:n]) for row, n in zip(batch["prompt"], batch["prompt_lengths"], strict=True)]
    assert prompts == ["two", "<na>", "<na>"]
    assert data.items("train").prompt_length == 3
    data = ready(manifest(tmp_path, [{"text": "one", "previous": "one"} for _ in range(8)]), no_prompt=0.4)
    counts = torch.stack([everything(data, epoch=e)["prompt_lengths"] for e in range(40)])
    assert (counts == 1).float().mean().item() == pytest.approx(0.4, abs=0.08)
    assert "prompt" not in everything(ready(manifest(tmp_path, words(2))))


def test_noise_in_place_of_some_items_has_nothing_to_say(tmp_path):
    records = [{**r, "lang": ("eng", "deu")[i % 2]} for i, r in enumerate(words(40))]
    data = ready(manifest(tmp_path, records), val_fraction=0.2, no_speech=0.3, augment=Augment(volume_db=(-3.0, 3.0)))
    plain = ready(manifest(tmp_path, records), val_fraction=0.2, augment=Augment(volume_db=(-3.0, 3.0)))
    shares, silent = [], 0
    for epoch in range(6):
        batch, before = everything(data, epoch=epoch), everything(plain, epoch=epoch)
        quiet = batch["target_lengths"] == 0
        assert [t == "" for t in batch["texts"]] == quiet.tolist()
        assert torch.equal(batch["lengths"], before["lengths"])
        assert torch.equal(batch["waves"][~quiet], before["waves"][~quiet])
        powers = batch["waves"][quiet].square().sum(1) / batch["lengths"][quiet]
        assert (10 * powers[powers > 0].log10()).tolist() == pytest.approx([-40] * int((powers > 0).sum()), abs=31)
        silent += int((powers == 0).sum())
        shares.append(quiet.float().mean().item())
    assert np.mean(shares) == pytest.approx(0.3, abs=0.1)
    assert 1 <= silent <= 25
    assert "" not in everything(data, "val")["texts"]
    with pytest.raises(ConfigError, match="no_speech must be from 0"):
        ready(manifest(tmp_path, records), no_speech=1.5)
