"""``vertebra fit|validate|test|predict|config``: LightningCLI, whole, with our checkpoints, errors and run folders."""

from __future__ import annotations

import argparse
import itertools
import logging
import os
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from vertebra.cli.invocation import Invocation, parse_invocation
from vertebra.cli.recipes import recipes
from vertebra.errors import ConfigError, LoadError, VertebraError, printable

if TYPE_CHECKING:
    from vertebra.cli.lightning_cli import Session

COMMON = """\
often used:
  --data.X V              an option of the data module: paths, batch_size, seed
  --model.backbone NAME   another backbone; NAME,field=value changes a field (vertebra list backbones)
  --model.optimizer.lr V  learning rate; also weight_decay, warmup, schedule
  --init_from X           initial weights: a model directory, a bundled model, a run, a .ckpt
  --trainer.max_epochs N  also max_steps, max_time, accelerator, devices, precision
  --seed_everything N     seed of initial weights and dropout (default: 0)
  --ckpt_path X           a checkpoint or run folder: fit goes on with it, the others need no more than this; but a
                          task of your own is named too, as in --model my.Task
  -c FILE                 a configuration file; stronger than recipe and checkpoint, weaker than what is typed"""


def run(verb: str, args: list[str]) -> int:
    """Run a training verb and return the exit status."""
    if "-h" in args or "--help" in args:
        print(_short_help(verb))
        return 0
    if not args:
        raise ConfigError(f"{verb}: give a recipe, -c FILE or --ckpt_path X; see: vertebra {verb} --help")
    full_help = "--help-all" in args
    call = parse_invocation(verb, [a for a in args if a != "--help-all"])
    with _quiet():
        return _run(call, full_help)


def _run(call: Invocation, full_help: bool) -> int:
    # Lightning calls parts of jsonargparse that are going to be renamed; that is between the two
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from vertebra.cli.layers import check_class, config_layers, import_domains, read_checkpoint_of
    from vertebra.cli.lightning_cli import Session, VertebraCLI
    from vertebra.cli.messages import explain
    from vertebra.cli.signals import Signals

    import_domains(call, everything=full_help)
    checkpoint = read_checkpoint_of(call)
    if checkpoint is not None:
        check_class(call, checkpoint)
    session = Session(call, checkpoint, Signals())
    try:
        with tempfile.TemporaryDirectory(prefix="vertebra-") as scratch, session.signals.listen():
            words = [call.subcommand, *config_layers(call, checkpoint, Path(scratch)), *call.rest]
            VertebraCLI(session, [*words, "--help"] if full_help else words)
    except argparse.ArgumentError as e:
        raise ConfigError(explain(str(e), call.verb, call.typed)) from e
    except MisconfigurationException as e:
        raise ConfigError(" ".join(str(e).split())) from e
    except ValueError as e:  # the parser wraps what a constructor raises
        raise _innermost(e) from None
    except RuntimeError as e:
        if "loading state_dict" not in str(e):
            raise
        first = " ".join(str(e).splitlines()[1].split())
        raise LoadError(
            f"--ckpt_path {call.checkpoint}: its weights do not fit the model as it is set up ({first}); leave --model "
            f"options that change its structure out, or use --model.init_from {call.checkpoint}"
        ) from e
    except (KeyboardInterrupt, SystemExit) as e:
        received = session.signals.received
        if isinstance(e, KeyboardInterrupt) or received:
            print(_farewell(session), file=sys.stderr)
            return 143 if received == signal.SIGTERM else 130
        raise
    return 0


def _innermost(error: BaseException) -> BaseException:
    while not isinstance(error, VertebraError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _farewell(session: Session) -> str:
    from vertebra.cli.finish import resume_command

    saver = session.saver
    if saver is None or not saver.last_path.is_file():
        return "\ninterrupted; nothing was saved."
    again = resume_command(session.call, saver.run.path)
    return f"\ninterrupted; the state is in {saver.last_path}. Go on with:\n  {again}"


_NOISY = (
    "lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero", "lightning.fabric.utilities.seed",
    "lightning.pytorch.trainer.connectors.signal_connector", "lightning_utilities.core.rank_zero",
)  # fmt: skip
_NOISE = (
    "💡 Tip", "GPU available", "TPU available", "HPU available", "Seed set to", "`Trainer.fit` stopped", "Restor",
    "Loaded model weights", "Detected KeyboardInterrupt", "`Trainer(", "Trainer already configured",
    "Loading `train_dataloader`", "Received SIGTERM", "Bypassing SIGTERM", "[rank",
)  # fmt: skip
_WARNINGS = (
    r".*LeafSpec.*", r".*does not have many workers.*", r".*smaller than the logging interval.*", r".*in eval mode.*",
    r".*`lightning.pytorch.loggers.tensorboard`.*", r".*GPU available but not used.*", r".*exists and is not empty.*",
    r".*callbacks used to create the checkpoint.*",
    r".*[Tt]ensorboard.*", r".*precision is not supported by the model summary.*", r".*torch.distributed.*deprecated.*",
)  # fmt: skip


class _ToOutput(logging.Handler):
    """Prints the package's own notes, such as what was loaded."""

    def emit(self, record: logging.LogRecord) -> None:
        from lightning.pytorch.utilities import rank_zero_only

        if getattr(rank_zero_only, "rank", 0) == 0:
            print(printable(record.getMessage(), lines=True))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence Lightning's tips and warnings that do not concern a user of the command line; show our own notes."""

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().lstrip().startswith(_NOISE)

    own = logging.getLogger("vertebra")
    loggers = [logging.getLogger(name) for name in _NOISY]
    handler, level = _ToOutput(), own.level
    for logger in loggers:
        logger.addFilter(keep)
    own.addHandler(handler)
    own.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings():
            for text in _WARNINGS:
                warnings.filterwarnings("ignore", text)
            yield
    finally:
        own.removeHandler(handler)
        own.setLevel(level)
        for logger in loggers:
            logger.removeFilter(keep)


def _short_help(verb: str) -> str:
    about = {
        "fit": "Train, keep the best checkpoint, test it, and write a run folder ROOT/<recipe>/<number>.",
        "validate": "Print the validation numbers of a checkpoint.",
        "test": "Print the test numbers of a checkpoint.",
        "predict": "Write the predictions of a checkpoint as CSV.",
        "config": "Print the resolved configuration that `fit` would use.",
    }[verb]
    own = {
        "fit": "  --root DIR              where run folders go (default: runs)",
        "predict": "  -o FILE.csv             where predictions go (default: predictions.csv)",
        "config": "  > FILE.yaml             the output is a configuration file for -c",
    }.get(verb, "  -o FILE.json            also write the numbers to a file")
    lines = [f"usage: vertebra {verb} [RECIPE] [-c FILE] [--ckpt_path X] [options]", "", about, ""]
    lines.append("recipes: (what each does: vertebra list recipes)")
    for domain, names in itertools.groupby(recipes(), lambda name: name.partition("/")[0]):
        lines.append(f"  {domain:<12}{' '.join(names)}")
    return "\n".join([*lines, "", COMMON, own, "", f"all options: vertebra {verb} [RECIPE] --help-all"])
