"""Train, test and predict with as many processes as asked; rank 0 writes the numbers. Used by test_base.py."""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch

from vertebra.backbones.base import create_backbone
from vertebra.domains.base import PredictionWriter
from vertebra.domains.dna.data import DNASequenceData
from vertebra.domains.dna.model import DNAClassifier
from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.dna.task import DNAClassificationTask
from vertebra.domains.saving import save_model
from vertebra.tokenizers.nucleotide import NucleotideTokenizer

TUNES = {
    "frozen": {"freeze_backbone": True},
    "gradual": {"tune": {"train": "gradual", "every": 0.25}, "init_from": "start"},
    "adapters": {"tune": {"lora_rank": 2}},
}


def prepare(folder: Path) -> None:
    """Write initial weights; keeping those of a fresh backbone is refused."""
    spec = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="classification", max_length=99, classes=("0", "1"))
    save_model(DNAClassifier(create_backbone("hybrid_test"), spec), folder / "start")


def run(folder: Path, devices: int, kind: str = "") -> None:
    pl.seed_everything(0, verbose=False)
    data = DNASequenceData(
        file=str(folder / "train.csv"),
        val_file=str(folder / "val.csv"),
        test_file=str(folder / "val.csv"),
        predict_file=str(folder / "val.csv"),
        reverse_complement=0.5,
        batch_size=8 // devices,
    )
    options = dict(TUNES.get(kind, {}))
    if "init_from" in options:
        options["init_from"] = str(folder / options["init_from"])
    task = DNAClassificationTask("hybrid_test", dropout=0.0, **options)
    out = folder / f"{devices}{kind and '-'}{kind}"
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        callbacks=[PredictionWriter(out / "predictions.csv")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)
    numbers = dict(trainer.callback_metrics)
    trainer.test(task, datamodule=data, verbose=False)
    numbers |= trainer.callback_metrics
    trainer.predict(task, datamodule=data, return_predictions=False)
    if trainer.is_global_zero:
        (out / "numbers.json").write_text(json.dumps({k: v.item() for k, v in numbers.items()}))
        torch.save(task.model.state_dict(), out / "weights.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    for kind in ("", *sys.argv[3:]):
        run(Path(sys.argv[1]), int(sys.argv[2]), kind)
