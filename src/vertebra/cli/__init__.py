"""The command line: a light front that imports what a verb needs and nothing else.

``--help``, ``--version``, ``list``, ``info`` and ``doctor --short`` run without torch. Exit status: 0 for success, 1
for a bug (with a traceback), 2 for a user's error (one or two sentences), 3 when some records were bad, 130 when
interrupted by Ctrl-C and 143 by SIGTERM.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module

from vertebra import __version__
from vertebra.errors import UnknownNameError, VertebraError, printable

__all__ = ["main"]

# verb: (module that holds `run(verb, args) -> exit status`, synopsis, summary)
VERBS = {
    "demo": ("work", "[DOMAIN ...] [-o DIR]", "every pipeline on its sample data, in one report.html"),
    "fit": ("training", "[RECIPE] [-c FILE] [--model.X V] [--data.X V] [--trainer.X V]", "train, validate, test, save"),
    "validate": ("training", "[RECIPE] [--ckpt_path X]", "the validation numbers of a checkpoint"),
    "test": ("training", "[RECIPE] [--ckpt_path X]", "the test numbers of a checkpoint"),
    "predict": ("training", "[RECIPE] [--ckpt_path X] [-o FILE.csv]", "predictions of a checkpoint, as CSV"),
    "scaling": ("scaling", "RECIPE --params P ... --budget B [-o DIR]", "how a loss falls with size, data and compute"),
    "run": ("work", "DOMAIN/VERB INPUT... -o OUT [--model NAME|DIR]", "a pipeline: files in, files out"),
    "list": ("listing", "[backbones|models|recipes|pipelines] [PATTERN]", "what there is"),
    "info": ("info", "NAME|DIR|FILE.ckpt", "what a backbone, model, recipe, pipeline or run is"),
    "convert": ("convert", "SOURCE -o DIR [--family NAME | --to NAME]", "a published checkpoint to a model directory"),
    "export": ("export", "MODEL -o FILE.pt2|FILE.onnx [--step]", "a model as a program that runs without this package"),
    "config": ("training", "[RECIPE] [-c FILE] [...]", "the resolved configuration that `fit` would use"),
    "sample": ("work", "DOMAIN -o DIR [--seed N]", "fabricated files in the real formats of a domain"),
    "doctor": ("doctor", "[--short]", "versions, devices, and what missing extras would enable"),
}
_EPILOG = """\
Start with:  vertebra demo
             vertebra list recipes
             vertebra fit RECIPE
Each verb explains itself: vertebra VERB --help"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        argv: Words after ``vertebra``; those of the process when None.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(args)
    except VertebraError as e:
        return _fail(str(e))
    except KeyboardInterrupt as e:
        print(f"\n{str(e) or 'interrupted.'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # whoever read our output has gone, as `head` does; nothing may be flushed to the pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as e:
        if e.filename is None:
            return _bug()
        return _fail(f"{e.filename}: {e.strerror}.")
    except SystemExit as e:  # argparse prints help and leaves
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except Exception:
        return _bug()


def _dispatch(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"vertebra {__version__}")
        return 0
    verb, *rest = args
    if verb not in VERBS:
        raise UnknownNameError("command", verb, VERBS)
    run: Callable[[str, list[str]], int] = import_module(f"vertebra.cli.{VERBS[verb][0]}").run
    return run(verb, rest)


def _help() -> str:
    lines = ["usage: vertebra VERB ...", "", "Shared sequence backbones for the data of many domains.", ""]
    for verb, (_, synopsis, summary) in VERBS.items():
        lines += [f"  vertebra {verb} {synopsis}", f"      {summary}"]
    return "\n".join([*lines, "", _EPILOG])


def _fail(text: str) -> int:
    print(f"vertebra: error: {printable(text)}", file=sys.stderr)
    return 2


def _bug() -> int:
    print(printable(traceback.format_exc(), lines=True), end="", file=sys.stderr)
    print(f"vertebra: this is a bug in vertebra {__version__} or in a class it was given; see above.", file=sys.stderr)
    return 1
