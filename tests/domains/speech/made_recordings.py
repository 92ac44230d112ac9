"""Recordings and manifests that the tests of the data module make."""

import json

import numpy as np
import soundfile as sf

from vertebra.domains.speech.data import SpeechData

WORDS = ("one", "two", "three", "four")
BUZZ = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) / 10


def speak(path, seconds=0.5, rate=8000, seed=0, gain=1.0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    sf.write(path, gain * np.resize(np.roll(BUZZ, seed), round(seconds * rate)), rate, **options)
    return path


def manifest(folder, records, name="data.jsonl"):
    """Write records as a manifest, and a recording of its own for each that names none; its number is its seed."""
    records = [dict(record) for record in records]
    for number, record in enumerate(records):
        seconds = record.pop("seconds", 0.5)
        if "path" not in record:
            record["path"] = speak(folder / f"{number}.wav", seconds, seed=number).name
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


def words(count, **fields):
    return [{"id": f"{i}", "text": WORDS[i % 4], **fields} for i in range(count)]


def ready(root, stage="", **options):
    settings = {"sample_rate": 8000, "n_mels": 20, "val_fraction": 0.0, "test_fraction": 0.0, **options}
    data = SpeechData(root=None if root is None else str(root), **settings)
    data.setup(stage)
    return data


def everything(data, split="train", epoch=0):
    items = data.items(split)
    return items.fetch(np.arange(len(items)), epoch)


def reasons(data):
    return [(bad.file.rpartition("/")[2], bad.rule) for bad in data.rejected]
