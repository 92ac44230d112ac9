"""``VertebraCLI``: LightningCLI with run folders, strict checkpoints and a test at the end of ``fit``."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import set_parsing_settings
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden

from vertebra.backbones.base import BackboneConfig
from vertebra.backbones.loading.guard import Names, check_numbers, check_size, header_of
from vertebra.cli.callbacks import DEFAULT_MONITOR, RunCheckpoint, RunFolder, SaveRunConfig
from vertebra.cli.finish import finish_fit
from vertebra.cli.invocation import Invocation
from vertebra.cli.layers import mismatch_text, model_class_of, same_class
from vertebra.cli.run_logger import RunLogger
from vertebra.cli.runs import next_folder, run_folder_of, whole_text
from vertebra.cli.signals import MarkTraining, Signals
from vertebra.cli.trust import OURS, denied_name, imports_of, is_allowed
from vertebra.domains.base import BaseData, BaseTask, PredictionWriter
from vertebra.domains.saving import class_path
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, LoadError

set_parsing_settings(subclasses_enabled=[BackboneConfig])


@dataclass
class Session:
    """One call: what goes into it, and what is known of it when it is interrupted.

    Args:
        call: What was typed.
        checkpoint: The checkpoint that was read.
        signals: Ctrl-C and SIGTERM.
        saver: Knows the run folder and its checkpoints, once the trainer is made.
    """

    call: Invocation
    checkpoint: dict[str, Any] | None
    signals: Signals
    saver: RunCheckpoint | None = None


class VertebraCLI(LightningCLI):
    """One call of a training verb; the constructor runs it.

    Args:
        session: What was typed, the checkpoint that was read, and the signals to heed.
        words: Words for the parser: the verb, a ``--config`` for each layer, and what was typed.
    """

    def __init__(self, session: Session, words: list[str]) -> None:
        self.session = session
        self.call, self.checkpoint, self.signals = session.call, session.checkpoint, session.signals
        self.run: RunFolder | None = None
        strict = {"exit_on_error": False, "allow_abbrev": False}
        super().__init__(
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=None,
            parser_kwargs={"prog": "vertebra", **strict, **{verb: dict(strict) for verb in self.subcommands()}},
            args=words,
        )

    # -------------------------------------------------------- parsing

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs, with the arguments of the trainer's methods that are ours to fill."""
        return {verb: {*skipped, "weights_only"} for verb, skipped in LightningCLI.subcommands().items()}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the words, without looking at those of the process."""
        assert isinstance(args, list)
        with imports_of(self.call):
            self.config = parser.parse_args(args)

    def _parse_ckpt_path(self) -> None:
        """Check, not parse: the checkpoint is a layer weaker than what was typed; Lightning would reverse that."""
        settings = self.config[self.config.subcommand]
        asked, held = str(settings.model.class_path), model_class_of(self.checkpoint or {})
        if held and not same_class(asked, held):
            raise ConfigError(mismatch_text(self.call, held, asked))
        if settings.get("data") is None:
            raise ConfigError(f"{self.call.verb}: no data is named; give a recipe, -c FILE or --data CLASS.")

    # -------------------------------------------------------- building

    def before_instantiate_classes(self) -> None:
        """Print the configuration, or choose run folder, logger and callbacks."""
        if self.call.verb == "config":
            self._dump_config()
            print(f"# {self.call.command}\n{yaml.safe_dump(self.config_dump, sort_keys=False)}", end="")
            raise SystemExit(0)

    def instantiate_classes(self) -> None:
        """Make data, model and trainer.

        Raises:
            LoadError: The checkpoint names, in a place that anything may stand in, a class that it may not.
        """
        with imports_of(self.call):
            try:
                super().instantiate_classes()
            except ImportError as e:
                if (denied := denied_name(str(e))) is None:
                    raise
                raise LoadError(denied) from e

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Make the trainer: with a run folder for ``fit``, without any litter for the others.

        Raises:
            ConfigError: The trainer refuses its options.
        """
        kwargs.update(self._trainer_options())
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, MisconfigurationException) as e:
            raise ConfigError(f"--trainer: {' '.join(str(e).split())}") from e

    def _trainer_options(self) -> dict[str, Any]:
        options: dict[str, Any] = {}
        settings = self.config[str(self.subcommand)]
        trainer = settings.trainer
        if self.subcommand != "fit" or trainer.fast_dev_run:
            if self.subcommand != "fit":
                options["enable_checkpointing"] = False
            if trainer.logger in (None, True):
                options["logger"] = False
            if self.subcommand == "predict":
                self.trainer_defaults["callbacks"] = [self._writer()]
            return options
        folder = run_folder_of(self.call.checkpoint) if self.call.checkpoint and not self.call.root else None
        resumed = self.checkpoint if folder is not None else None
        self.run = RunFolder(
            folder or next_folder((self.call.root or Path("runs")) / self._run_name()), resumed=folder is not None
        )
        monitor = getattr(self.model, "monitor", DEFAULT_MONITOR)
        saver = self.session.saver = RunCheckpoint(
            self.run,
            monitor=monitor,
            mode=getattr(self.model, "monitor_mode", "min"),
            data=self._dumped("data"),
            resumed=self.checkpoint,
            stop=self.signals.stop,
        )
        self.trainer_defaults["callbacks"] = [MarkTraining(self.signals), saver]
        self.save_config_callback, self.save_config_kwargs = SaveRunConfig, {"run": self.run}
        if trainer.logger in (None, True):
            options["logger"] = RunLogger(self.run, resumed["global_step"] if resumed else None)
        return options

    def _run_name(self) -> str:
        if self.call.recipe:
            return self.call.recipe
        if self.call.configs:
            return self.call.configs[-1].stem
        return type(self.model).__name__

    def _dumped(self, section: str) -> dict[str, Any]:
        self._dump_config()
        values = self.config_dump[section]
        assert isinstance(values, dict)
        return values

    def _writer(self) -> pl.Callback:
        return PredictionWriter(self.call.output or Path("predictions.csv"))

    # -------------------------------------------------------- running

    def fit(self, model: pl.LightningModule, datamodule: pl.LightningDataModule, ckpt_path: str | None = None) -> None:
        """Train; then validate and test the best checkpoint and write what a run folder holds."""
        self._check_size()
        with_test = is_overridden("test_step", model, pl.LightningModule)
        self.trainer.fit(model, datamodule=datamodule, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        if self.signals.received:  # during the last batches
            raise KeyboardInterrupt
        if self.session.saver is None:
            if self.trainer.is_global_zero:
                print("fast_dev_run: one batch of everything ran; nothing is written.")
            return
        finish_fit(self.trainer, model, datamodule, self.session.saver, self.call, with_test=with_test)

    def validate(self, model: pl.LightningModule, **kwargs: Any) -> None:
        """Print the validation numbers."""
        self._evaluate(self.trainer.validate, model, **kwargs)

    def test(self, model: pl.LightningModule, **kwargs: Any) -> None:
        """Print the test numbers."""
        self._evaluate(self.trainer.test, model, **kwargs)

    def _evaluate(self, method: Any, model: pl.LightningModule, **kwargs: Any) -> None:
        self._prepare_evaluation()
        found = method(model, weights_only=True, **kwargs)
        numbers = {k: v for part in found for k, v in part.items()}
        if self.call.output and self.trainer.is_global_zero:
            whole_text(self.call.output, json.dumps(numbers, indent=2) + "\n")
            print(f"wrote {len(numbers)} numbers to {self.call.output}")

    def predict(self, model: pl.LightningModule, **kwargs: Any) -> None:
        """Write predictions as CSV; the writer says how many and where."""
        self._prepare_evaluation()
        self.trainer.predict(model, **{**kwargs, "return_predictions": False}, weights_only=True)

    def _check_size(self) -> None:
        """Refuse settings of a model that the checkpoint's tensors cannot be of, before it takes memory."""
        task, checkpoint = self.model, self.checkpoint
        if checkpoint is None or not (isinstance(task, BaseTask) and is_allowed(class_path(task), OURS)):
            return  # other tasks need not bear to be built dry
        if "spec" not in checkpoint:
            raise LoadError(f"{self.call.checkpoint}: holds no 'spec', so no task of vertebra wrote it.")
        header = header_of(checkpoint["state_dict"])
        names = Names("its settings, with what was typed,", "its state_dict", several=True)
        check_numbers([task.backbone_config.to_dict(), checkpoint["spec"]], self.call.checkpoint, names=names)
        check_numbers(task.backbone_config.to_dict(), self.call.checkpoint, header, names)
        spec = DataSpec.from_dict(checkpoint["spec"])
        trial = copy.copy(task)  # a task may keep something of the model it builds
        check_size(lambda: trial.build_model(task.backbone_config.build(), spec), header, self.call.checkpoint, names)

    def _prepare_evaluation(self) -> None:
        """Let the data be read as the model expects it: its classes and lengths, whatever these files would suggest."""
        if self.checkpoint is not None and isinstance(self.datamodule, BaseData) and "spec" in self.checkpoint:
            self.datamodule.use_spec(DataSpec.from_dict(self.checkpoint["spec"]))
        if self.call.checkpoint is None:
            raise ConfigError(
                f"{self.call.verb}: the weights are missing; give --ckpt_path X, a checkpoint or a run folder."
            )
        self._check_size()
