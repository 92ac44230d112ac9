"""What was typed after ``fit|validate|test|predict|config``, sorted into layers; needs no torch.

Settings come from: defaults < recipe < checkpoint < ``-c`` files < command line. Each layer but the first and the last
becomes a ``--config`` file in that order, in front of what was typed.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vertebra.cli.recipes import recipe_path
from vertebra.cli.runs import find_checkpoint
from vertebra.errors import ConfigError

_SHORT = ("--init_from", "--init_parts")  # of the model, in every recipe


@dataclass(kw_only=True)
class Invocation:
    """A call of a training verb.

    Args:
        verb: ``fit``, ``validate``, ``test``, ``predict`` or ``config``.
        recipe: Name of the packaged recipe, if one was named.
        configs: The ``-c`` files.
        checkpoint: The file that ``--ckpt_path`` means.
        root: Where run folders go.
        output: File that ``-o`` names.
        rest: The other words, for the configuration parser.
        typed: All words, as typed.
    """

    verb: str
    recipe: str | None = None
    configs: list[Path] = field(default_factory=list)
    checkpoint: Path | None = None
    root: Path | None = None
    output: Path | None = None
    rest: list[str] = field(default_factory=list)
    typed: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The whole command, to be repeated in a shell."""
        return shlex.join(["vertebra", self.verb, *self.typed])

    @property
    def subcommand(self) -> str:
        """The method of the trainer whose settings are parsed."""
        return "fit" if self.verb == "config" else self.verb

    def documents(self) -> list[tuple[Path, dict[str, Any]]]:
        """The recipe and the ``-c`` files, read."""
        paths = ([recipe_path(self.recipe)] if self.recipe else []) + self.configs
        return [(p, read_yaml(p)) for p in paths]


def parse_invocation(verb: str, args: Sequence[str]) -> Invocation:
    """Sort the words after a training verb.

    Raises:
        UnknownNameError: No recipe of that name.
        ConfigError: An option lacks its value, or a file is no configuration.
        LoadError: ``--ckpt_path`` leads to no checkpoint.
    """
    rest = list(args)
    call = Invocation(verb=verb, typed=list(args))
    if rest and not rest[0].startswith("-"):
        call.recipe = rest.pop(0)
        if Path(call.recipe).is_file():
            raise ConfigError(f"{verb}: RECIPE is the name of a packaged recipe, got a file; write -c {call.recipe}")
        recipe_path(call.recipe)
    call.configs = [Path(p) for p in _take(rest, "-c", "--config")]
    for path in call.configs:
        if not path.is_file():
            raise ConfigError(f"-c: no such file {str(path)!r}.")
    output, root = _take(rest, "-o", "--output"), _take(rest, "--root")
    if output and verb in ("fit", "config"):
        raise ConfigError(f"{verb}: -o is for predict, test and validate; --root DIR says where run folders go.")
    if root and verb != "fit":
        raise ConfigError(f"{verb}: --root is for fit alone; {verb} makes no run folder.")
    call.output, call.root = (Path(v[-1]) if v else None for v in (output, root))
    place = _take(rest, "--ckpt_path")
    if not place:  # a configuration file may name one
        place = [str(d["ckpt_path"]) for _, d in call.documents() if d.get("ckpt_path")]
    if place and place[-1] not in ("null", "None", ""):
        call.checkpoint = find_checkpoint(place[-1], call.subcommand)
    call.rest = [_spelled_out(word) for word in rest]
    return call


def _spelled_out(word: str) -> str:
    """Put ``model.`` before what may be typed without it."""
    return f"--model.{word[2:]}" if word.partition("=")[0] in _SHORT else word


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a configuration file.

    Raises:
        ConfigError: Not YAML, or no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML ({getattr(e, 'problem', None) or 'not text'}).") from e
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: must hold sections such as model:, data: and trainer:, got a {type(values).__name__}."
        )
    return values


def _take(args: list[str], *names: str) -> list[str]:
    """Remove options of these names from ``args`` and return their values."""
    values, kept = [], []
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if word in names:
            following = next(words, None)
            if following is None:
                raise ConfigError(f"{word} needs a value.")
            values.append(following)
        elif equals and name in names:
            values.append(value)
        else:
            kept.append(word)
    args[:] = kept
    return values
