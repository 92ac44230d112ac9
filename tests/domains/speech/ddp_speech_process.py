"""Train and test recognition with as many processes as asked; rank 0 writes the numbers. Used by test_ddp.py."""

import json
import sys
import warnings
from pathlib import Path

import lightning.pytorch as pl

from vertebra.domains.optim import OptimizerConfig
from vertebra.domains.speech.data import SpeechData
from vertebra.domains.speech.task import SpeechRecognitionTask


def run(folder: Path, devices: int, memory: float | None = None) -> None:
    pl.seed_everything(0, verbose=False)
    data = SpeechData(
        root=str(folder / "data.jsonl"),
        sample_rate=8000,
        n_mels=20,
        batch_size=8 // devices,
        batch_seconds=None,
        batch_memory=memory,
    )
    task = SpeechRecognitionTask("illama_test,causal=false", channels=3, optimizer=OptimizerConfig(lr=1e-3, warmup=0))
    out = folder / f"{devices}{'-fits' if memory else ''}"
    out.mkdir(exist_ok=True)
    trainer = pl.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, datamodule=data)
    numbers = {k: v.item() for k, v in trainer.callback_metrics.items()}
    sizes = trainer.train_dataloader.batch_sampler.batch_sizes[:-1].tolist()
    trainer.test(task, datamodule=data, verbose=False)
    numbers |= {k: v.item() for k, v in trainer.callback_metrics.items()}
    if trainer.is_global_zero:
        task.write_results(out)
        (out / "numbers.json").write_text(json.dumps({"numbers": numbers, "sizes": sizes}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(Path(sys.argv[1]), int(sys.argv[2]))
    run(Path(sys.argv[1]), int(sys.argv[2]), memory=0.001)
