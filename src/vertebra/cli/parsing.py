"""Argument parsers of the small verbs: argparse whose errors are one sentence with a suggestion."""

from __future__ import annotations

import argparse
import difflib
import re
from typing import NoReturn

from vertebra.errors import ConfigError


class Parser(argparse.ArgumentParser):
    """``ArgumentParser`` that raises ``ConfigError`` instead of printing its usage and leaving."""

    def __init__(self, verb: str, description: str, **options: object) -> None:
        super().__init__(prog=f"vertebra {verb}", description=description, allow_abbrev=False, **options)  # type: ignore[arg-type]
        self.verb = verb

    def error(self, message: str) -> NoReturn:
        """Raise the message as a user's error."""
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            known = [o for action in self._actions for o in action.option_strings]
            message = f"{unknown[1]!r} is not accepted.{suggestion(unknown[1].partition('=')[0], known)}"
        end = "" if message.endswith(("?", ".")) else "."
        raise ConfigError(f"{self.verb}: {message}{end} See: {self.prog} --help")


def suggestion(name: str, known: list[str]) -> str:
    """Return `` Did you mean ...?`` with the nearest names, or nothing."""
    near = difflib.get_close_matches(name, known, n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(near)}?" if near else ""
