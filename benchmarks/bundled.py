"""What simple guesses reach on the data of the bundled models' cards.

    python benchmarks/bundled.py            # a minute on one core; fabricates the samples it needs

The splits are those of the recipes the models were trained by. ``dna_promoter``: majority, and logistic regressions on
3-mers and on letters by position. ``vision_shapes``: majority, and logistic regression on pixels (the sample of seed 0,
which the model has not seen; fitted on seeds 1 and 2). ``vision_generator``: bits a sub-pixel of a uniform guess, and
of levels counted at every place. ``mesh_generator``: nats a token of counted tokens, alone and after the last one.
Baselines of the others: ``dna_lm.py``, ``dna_elements.py``, ``speech_digits.py``, ``speech_languages.py``,
``timeseries_zero.py``, and the errors of standing still that every action policy logs. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, average_precision_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from vertebra.domains.base import BaseData
from vertebra.domains.dna.data import DNASequenceData
from vertebra.domains.dna.sample import write_sample as write_dna
from vertebra.domains.mesh.data import MeshData
from vertebra.domains.vision.data import ImageData
from vertebra.domains.vision.sample import write_sample as write_images


def all_of(data: BaseData, split: str) -> dict[str, torch.Tensor]:
    """Return every item of a split as one batch."""
    data.setup("test" if split == "test" else "fit")
    items = data.items(split)  # type: ignore[arg-type]
    return items.fetch(np.arange(len(items.lengths)), 0)


def logistic(x: np.ndarray, y: np.ndarray, c: float) -> object:
    """Fit a standardised logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=500)).fit(x, y)


def dna_promoter(folder: Path) -> None:
    """Print what is reached on the fabricated promoters of seed 1."""
    write_dna(folder, seed=1)
    data = DNASequenceData(positives=str(folder / "promoters.fa"), negatives=str(folder / "background.fa"))
    parts = {split: all_of(data, split) for split in ("train", "val", "test")}
    truth = {k: v["labels"].numpy() for k, v in parts.items()}
    print(f"majority: accuracy {np.bincount(truth['test']).max() / len(truth['test']):.3f}")
    ids = {k: v["ids"].numpy() for k, v in parts.items()}
    letters = np.unique(ids["train"])
    words = {word: i for i, word in enumerate(itertools.product(letters.tolist(), repeat=3))}

    def by_place(x: np.ndarray) -> np.ndarray:
        return (x[..., None] == letters).reshape(len(x), -1).astype(np.float32)

    def counts(x: np.ndarray) -> np.ndarray:
        found = np.zeros((len(x), len(words)), np.float32)
        for i, row in enumerate(x.tolist()):
            for word in zip(row, row[1:], row[2:], strict=False):
                found[i, words.get(word, 0)] += 1
        return found

    for name, features in (("3-mers", counts), ("letters by position", by_place)):
        x = {k: features(v) for k, v in ids.items()}
        models = [logistic(x["train"], truth["train"], c) for c in (1e-4, 1e-3, 1e-2, 1e-1)]
        best = max(models, key=lambda m: average_precision_score(truth["val"], m.predict_proba(x["val"])[:, 1]))
        score = best.predict_proba(x["test"])[:, 1]
        accuracy, auprc = accuracy_score(truth["test"], score > 0.5), average_precision_score(truth["test"], score)
        print(f"logistic regression on {name}: accuracy {accuracy:.3f}, AUPRC {auprc:.3f}")


def vision_shapes(folder: Path) -> None:
    """Print what is reached on the fabricated shapes."""
    x, y = {}, {}
    for seed in range(3):
        write_images(folder / str(seed), seed=seed)
        data = ImageData(root=str(folder / str(seed) / "shapes"), val_fraction=0.1, test_fraction=0.1)
        parts = [all_of(data, split) for split in ("train", "val", "test")]
        x[seed] = torch.cat([part["images"] for part in parts]).flatten(1).numpy()
        y[seed] = torch.cat([part["labels"] for part in parts]).numpy()
    print(f"majority: accuracy {np.bincount(y[0]).max() / len(y[0]):.3f}")
    model = logistic(np.concatenate([x[1], x[2]]), np.concatenate([y[1], y[2]]), 1e-4)
    print(f"logistic regression on pixels: accuracy {accuracy_score(y[0], model.predict(x[0])):.3f}")


def vision_generator(folder: Path) -> None:
    """Print bits a sub-pixel, of 64 levels."""
    write_images(folder, seed=0)
    data = ImageData(root=str(folder / "shapes"), task="generation", size=16, val_fraction=0.05, test_fraction=0.05)
    train, test = (all_of(data, split)["images"].long() // 4 for split in ("train", "test"))
    table = torch.nn.functional.one_hot(train, 64).sum(0).double() + 1 / 4
    rows = (table / table.sum(-1, keepdim=True)).log2()
    bits = -rows.expand(len(test), *rows.shape).gather(-1, test[..., None]).mean()
    print(f"uniform: 6 bits; levels counted at every place: {float(bits):.3f} bits")


def mesh_generator(folder: Path) -> None:
    """Print nats a token."""
    data = MeshData(procedural=(2000, 120, 120), points=64)
    train, val = (all_of(data, split) for split in ("train", "val"))
    size = int(max(part["ids"].max() for part in (train, val))) + 1
    ones, pairs = torch.full((size,), 0.1, dtype=torch.double), torch.full((size, size), 0.02, dtype=torch.double)
    for row, real in zip(train["ids"].long(), train["mask"], strict=True):
        row = row[real]
        ones += torch.bincount(row, minlength=size)
        pairs.index_put_((row[:-1], row[1:]), torch.ones(len(row) - 1, dtype=torch.double), accumulate=True)
    ones, pairs = (ones / ones.sum()).log(), (pairs / pairs.sum(-1, keepdim=True)).log()
    rows = [row[real] for row, real in zip(val["ids"].long(), val["mask"], strict=True)]
    count = sum(len(row) - 1 for row in rows)
    alone = -sum(float(ones[row[1:]].sum()) for row in rows) / count
    after = -sum(float(pairs[row[:-1], row[1:]].sum()) for row in rows) / count
    print(f"counted tokens: {alone:.3f} nats; after the last one: {after:.3f} nats")


MODELS = {f.__name__: f for f in (dna_promoter, vision_shapes, vision_generator, mesh_generator)}


def main() -> None:
    """Print the guesses of every model."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="*", default=list(MODELS), metavar="MODEL", help=f"of {', '.join(MODELS)}")
    torch.set_num_threads(1)
    for name in parser.parse_args().models:
        print(f"{name}")
        with tempfile.TemporaryDirectory() as folder:
            MODELS[name](Path(folder))


if __name__ == "__main__":
    main()
