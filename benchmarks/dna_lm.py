"""Bits per base on genomes that were not trained on: a language model beside Markov models of order 0 to 12.

    python benchmarks/dna_lm.py --model dna_lm

All models know the same training genomes; the smoothing of the Markov models and the checkpoint of the language model
were chosen on the same validation genome. Every base of a test genome counts once.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from markov import as_bases, bits_per_base

from vertebra.domains.dna.data import DNALanguageData
from vertebra.domains.dna.formats import read_sequences
from vertebra.domains.dna.objectives import token_loss
from vertebra.domains.saving import load_model
from vertebra.domains.targets import next_targets

TRAIN = ["NC_000932.gb", "addgene-plasmid-11664-sequence-180430.gbk", "pBAD30.gb", "ls_orchid.fasta"]
VALID = "NC_001422.gbk"
TEST = {"Yersinia plasmid pPCP1": "NC_005816.fna", "HIV-1": "NC_001802.fna"}


def read(path: Path) -> list[np.ndarray]:
    """Return the bases of every record of a file."""
    return [as_bases(record.sequence) for record in read_sequences(path, duplicates="allow")]


@torch.inference_mode()
def model_bits(name: str, folder: Path, file: str) -> float:
    """Return bits per base of a causal language model, in windows that each give half of their length as context."""
    model = load_model(name)
    data = DNALanguageData(
        str(folder / VALID), val=[], test=[str(folder / file)], length=model.spec.max_length, batch_size=4
    )
    data.setup()
    bases = torch.tensor(model.tokenizer.base_ids)
    nats = count = 0.0
    for batch in data.test_dataloader():
        ids = batch["ids"].long()
        targets = next_targets(ids, batch["counted"] & torch.isin(ids, bases), batch.get("segments"))
        loss, number = token_loss(model(ids, batch["mask"], batch.get("segments")), targets)
        nats, count = nats + float(loss) * float(number), count + float(number)
    return nats / count / np.log(2)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data/dna/biopython_genomes")
    parser.add_argument("--model", nargs="*", default=["dna_lm"], help="bundled names or model directories")
    args = parser.parse_args()
    folder = Path(args.data)
    torch.set_num_threads(2)
    train = [bases for name in TRAIN for bases in read(folder / name)]
    rows: dict[str, list[float]] = {}
    for file in TEST.values():
        for row in bits_per_base(train, read(folder / VALID), read(folder / file), range(13)):
            for form in ("additive", "interpolated"):
                rows.setdefault(f"Markov order {row['order']}, {form}", []).append(row[form])
    for name in args.model:
        rows[name] = [model_bits(name, folder, file) for file in TEST.values()]
    print("| model | " + " | ".join(TEST) + " |\n| --- |" + " ---: |" * len(TEST))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{v:.4f}" for v in values) + " |")


if __name__ == "__main__":
    main()
