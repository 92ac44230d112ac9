"""Tables and numbers for the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vertebra.errors import printable


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; whole lines where the output is no terminal, so that ``grep`` sees them.

    Markup in the texts is shown as it is.
    """
    table = Table(box=None, pad_edge=False, show_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        numeric = column in ("params", "dim", "depth", "records", "bad", "seconds")
        table.add_column(
            Text(printable(column)),
            justify="right" if numeric else "left",
            no_wrap=column in ("name", *columns[:1]) or numeric,
        )
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(printable(title), style="bold underline"))
    console.print(table)


def short_number(value: float) -> str:
    """``1_234_567`` as ``1.2M``."""
    for unit, scale in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:.1f}{unit}" if value < 100 * scale else f"{value / scale:.0f}{unit}"
    return f"{value:g}"
