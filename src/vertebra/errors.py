"""Errors a user can act on: who, which rule, what was found, what to do.

Every class also derives from the built-in one that code outside of ``vertebra`` would expect, so that
``except ValueError`` keeps working. The command line prints their text alone and exits with status 2.

Texts may quote files that somebody else made, so nothing in them steers a terminal.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable


def printable(text: object, *, lines: bool = False) -> str:
    """Return a text for a terminal, with escapes (a backslash, x1b) for what would steer it instead of being shown.

    Args:
        text: May hold anything that a file gave.
        lines: Whether it may have several lines; else their ends are escaped too.
    """
    found = str(text)
    if found.isprintable():
        return found
    return "".join(c if _is_shown(c) or (lines and c in "\n\t") else _escaped(c) for c in found)


def _is_shown(character: str) -> bool:
    return character.isprintable() or unicodedata.category(character) == "Zs"


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")


class VertebraError(Exception):
    """Root of the errors that are the user's to mend."""

    def __str__(self) -> str:
        return printable(super().__str__(), lines=True)


class ConfigError(VertebraError, ValueError):
    """A setting is impossible, or two settings contradict each other."""


class ShapeError(VertebraError, ValueError):
    """A tensor has another shape than the contract says."""


class DataError(VertebraError, ValueError):
    """A file or record cannot be used: the text names the file, the record or line, and the rule."""


class LoadError(VertebraError, ValueError):
    """Weights do not fit the model they are loaded into."""


class UnknownNameError(VertebraError, LookupError):
    """No preset, model, recipe or pipeline of that name; the text offers the nearest ones."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        choices = sorted(set(known))
        near = difflib.get_close_matches(name, choices, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(repr(n) for n in near)}?" if near else ""
        super().__init__(f"unknown {kind} {name!r}.{hint} Known: {', '.join(choices) or 'none'}.")
        self.kind, self.name = kind, name


class MissingExtraError(VertebraError, ImportError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}; install it with: pip install 'vertebra[{extra}]'")
