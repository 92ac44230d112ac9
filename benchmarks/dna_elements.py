"""Generated and scored DNA elements, beside Markov chains: are they recognised, realistic, new; are broken motifs seen?

    python benchmarks/dna_elements.py [--model dna_elements]

Everything is fabricated as ``vertebra sample dna`` does it: the Markov chains are fitted to what the model was trained
on (seed 1), and all tests are on sequences of another seed. The classifier that recognises bacterial
promoters is the bundled ``dna_promoter``, which shares nothing with the generator but what the sample plants.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from pathlib import Path

import numpy as np
from scipy.stats import rankdata

from vertebra.domains.dna import sample, statistics
from vertebra.domains.dna.changes import Change
from vertebra.domains.dna.scoring import likelihood_ratios
from vertebra.domains.dna.splits import known_in
from vertebra.domains.saving import load_model
from vertebra.pipelines.base import pipeline

KINDS = {
    "background": sample.background,
    "bacterial": sample.bacterial_promoters,
    "eukaryotic": sample.eukaryotic_promoters,
}
SMOOTHING = 10.0
BOXES = {"TTGACA": 25, "TATAAT": 48}
"""Consensus boxes and where they are planted: 17 bases apart, as in most of the sample's promoters."""


class Markov:
    """Order-k chain, interpolated with the lower orders: p_k = (count + a p_(k-1)) / (total + a)."""

    def __init__(self, codes: np.ndarray, order: int) -> None:
        self.order = order
        self.tables = [np.full((1, 4), 0.25)]
        for k in range(order + 1):
            context = sum(codes[:, i : codes.shape[1] - k + i] * 4 ** (k - 1 - i) for i in range(k)) if k else None
            counts = np.zeros((4**k, 4))
            following = codes[:, k:]
            np.add.at(counts, (np.zeros_like(following) if context is None else context, following), 1)
            lower = np.tile(self.tables[-1], (4**k // len(self.tables[-1]), 1))
            self.tables.append((counts + SMOOTHING * lower) / (counts.sum(1, keepdims=True) + SMOOTHING))

    def probabilities(self, before: np.ndarray) -> np.ndarray:
        """Return the chances of the next base after codes (N, t): (N, 4)."""
        k = min(self.order, before.shape[1])
        context = sum(before[:, before.shape[1] - k + i] * 4 ** (k - 1 - i) for i in range(k)) if k else 0
        return self.tables[k + 1][context * np.ones(len(before), dtype=np.int64)]

    def draw(self, rng: np.random.Generator, count: int, length: int) -> list[str]:
        """Draw sequences."""
        codes = np.zeros((count, 0), dtype=np.int64)
        for _ in range(length):
            chances = self.probabilities(codes).cumsum(1)
            codes = np.concatenate([codes, (rng.random((count, 1)) > chances[:, :3]).sum(1)[:, None]], axis=1)
        return [sample.text(row) for row in codes]

    def log_likelihood(self, codes: np.ndarray) -> np.ndarray:
        """Return log p of codes (N, T) in nats, (N,)."""
        steps = [self.probabilities(codes[:, :t])[np.arange(len(codes)), codes[:, t]] for t in range(codes.shape[1])]
        return np.log(np.stack(steps)).sum(0)


class Positional:
    """First-order chain with probabilities of its own at every position: what alignment alone tells."""

    def __init__(self, codes: np.ndarray) -> None:
        self.first = np.bincount(codes[:, 0], minlength=4) + 1.0
        self.steps = np.ones((codes.shape[1] - 1, 4, 4))
        for t in range(codes.shape[1] - 1):
            np.add.at(self.steps[t], (codes[:, t], codes[:, t + 1]), 1)
        self.first /= self.first.sum()
        self.steps /= self.steps.sum(-1, keepdims=True)

    def log_likelihood(self, codes: np.ndarray) -> np.ndarray:
        """Return log p of codes (N, T) in nats, (N,)."""
        at = np.arange(codes.shape[1] - 1)
        return np.log(self.first[codes[:, 0]]) + np.log(self.steps[at, codes[:, :-1], codes[:, 1:]]).sum(1)


def as_codes(sequences: list[str]) -> np.ndarray:
    """Return sequences of one length as codes (N, T)."""
    return np.array([["ACGT".index(base) for base in s] for s in sequences])


def auroc(truth: np.ndarray, scores: np.ndarray) -> float:
    """Return the area under the ROC curve."""
    ranks, positives = rankdata(scores), truth.sum()
    return float((ranks[truth].sum() - positives * (positives + 1) / 2) / (positives * (~truth).sum()))


def training_sequences() -> dict[str, list[str]]:
    """Return the sequences of ``elements.csv`` that the bundled model is made of, by label."""
    with tempfile.TemporaryDirectory() as folder:
        sample.write_sample(Path(folder), seed=1)
        with (Path(folder) / "elements.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
    return {kind: [row["sequence"] for row in rows if row["label"] == kind] for kind in KINDS}


def show_generation(model: str, train: dict[str, list[str]], count: int) -> None:
    """Print who is recognised as a bacterial promoter, and how far k-mers are from real ones."""
    rng = np.random.default_rng(2)
    real = {kind: [sample.text(row) for row in make(rng, count)] for kind, make in KINDS.items()}
    sets = {
        "generated, label bacterial": [
            p.value for p in pipeline("dna/generate", model, count=count, labels=["bacterial"])()
        ],
        "generated, no label": [p.value for p in pipeline("dna/generate", model, count=count)()],
        "generated, label background": [
            p.value for p in pipeline("dna/generate", model, count=count, labels=["background"])()
        ],
        "order-6 Markov of bacterial ones": Markov(as_codes(train["bacterial"]), 6).draw(rng, count, 81),
        "real bacterial": real["bacterial"],
        "real background": real["background"],
    }
    classify = pipeline("dna/classify", "dna_promoter")
    other = statistics.kmer_spectrum([sample.text(row) for row in sample.bacterial_promoters(rng, 4 * count)], 5)
    print(
        f"\n{count} sequences each. Recognised: score of dna_promoter at least 1/2. JS: divergence of 5-mers from other"
    )
    print("real bacterial promoters, in bits. New: no relative among the training sequences.\n")
    print("| sequences | recognised | mean score | JS | new | distinct |\n| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, sequences in sets.items():
        full = [s for s in sequences if len(s) == 81]  # the classifier reads aligned sequences
        scores = np.array([p.scores["positive"] for p in classify(full)])
        distance = statistics.jensen_shannon(statistics.kmer_spectrum(sequences, 5), other)
        new = 1 - known_in([s for kind in train.values() for s in kind], sequences)[1].mean()
        print(
            f"| {name} | {(scores >= 0.5).mean() * len(full) / len(sequences):.1%} | {scores.mean():.2f} "
            f"| {distance:.4f} | {new:.1%} | {len(set(sequences)) / len(sequences):.1%} |",
            flush=True,
        )


def show_likelihood(model: str, train: dict[str, list[str]], count: int) -> None:
    """Print bits a token of fresh elements under the model and the chains."""
    from vertebra.domains.dna.data import DNAElementData
    from vertebra.domains.dna.task import DNALanguageTask

    rng = np.random.default_rng(3)
    loaded = load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        print("\n| fresh elements, bits a base | " + " | ".join(KINDS) + " |\n| --- |" + " ---: |" * len(KINDS))
        rows: dict[str, list[float]] = {"model": [], "order-6 Markov": [], "first order by position": []}
        for kind, make in KINDS.items():
            codes = make(rng, count)
            path = Path(folder) / f"{kind}.csv"
            path.write_text("sequence,label\n" + "".join(f"{sample.text(row)},{kind}\n" for row in codes))
            data = DNAElementData(test_file=str(path))
            data.use_spec(loaded.spec)
            data.setup("test")
            task = DNALanguageTask(loaded.backbone.config)
            task.build(loaded.spec)
            task.model.load_state_dict(loaded.state_dict())
            task.eval()
            import torch

            with torch.inference_mode():
                loss, _ = task.loss(data.items("test").fetch(np.arange(count), 0))
            rows["model"].append(float(loss) * 82 / 81 / np.log(2))  # with the end of the sequence, which costs it too
            fitted = as_codes(train[kind])
            rows["order-6 Markov"].append(-Markov(fitted, 6).log_likelihood(codes).mean() / 81 / np.log(2))
            rows["first order by position"].append(-Positional(fitted).log_likelihood(codes).mean() / 81 / np.log(2))
        for name, values in rows.items():
            print(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |", flush=True)


def show_scoring(model: str, train: dict[str, list[str]], count: int) -> None:
    """Print how well scores tell variants in planted boxes from variants elsewhere."""
    rng = np.random.default_rng(4)
    inside = np.zeros(81, dtype=bool)
    for box, at in BOXES.items():
        inside[at : at + len(box)] = True
    changes, broken = [], []
    for row in sample.background(rng, count, gc=0.46):
        letters = list(sample.text(row))
        for box, at in BOXES.items():
            letters[at : at + len(box)] = box
        text = "".join(letters)
        for places in (np.flatnonzero(inside), np.flatnonzero(~inside)):
            at = int(rng.choice(places))
            alt = str(rng.choice([b for b in "ACGT" if b != text[at]]))
            changes.append(Change(text[:at], text[at], alt, text[at + 1 :]))
            broken.append(bool(inside[at]))
    truth = np.array(broken)
    before, after = (as_codes([getattr(c, name) for c in changes]) for name in ("ref_window", "alt_window"))
    bacterial = as_codes(train["bacterial"])
    elements, genomes = load_model(model), load_model("dna_lm")
    scores = {
        f"{model}, label bacterial": likelihood_ratios(elements, changes, strands="forward", label="bacterial"),
        f"{model}, no label": likelihood_ratios(elements, changes, strands="forward"),
        "dna_lm (never saw a promoter), both strands": likelihood_ratios(genomes, changes),
    }
    for name, chain in (("order-6 Markov", Markov(bacterial, 6)), ("first order by position", Positional(bacterial))):
        scores[f"{name} of bacterial ones"] = chain.log_likelihood(after) - chain.log_likelihood(before)
    print(f"\n{count} variants in consensus boxes planted in background, {count} elsewhere in the same sequences.\n")
    print("| score | AUROC | mean in boxes (nats) | mean elsewhere |\n| --- | ---: | ---: | ---: |")
    for name, values in scores.items():
        print(f"| {name} | {auroc(truth, -values):.3f} | {values[truth].mean():.2f} | {values[~truth].mean():.2f} |")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dna_elements")
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    train = training_sequences()
    show_likelihood(args.model, train, args.count)
    show_generation(args.model, train, args.count)
    show_scoring(args.model, train, args.count)


if __name__ == "__main__":
    main()
