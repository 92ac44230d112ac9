"""A report as one HTML file: sections of text, tables, figures and code, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vertebra.pipelines.figures import data_uri
from vertebra.pipelines.files import whole_file

_STYLE = """
:root { color-scheme: light dark; --line: #ddd; --soft: #f5f5f5; --quiet: #666; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #222; --quiet: #aaa; } }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-top: 1px solid var(--line); padding-top: 1rem; }
table { border-collapse: collapse; margin: .6rem 0; }
th, td { text-align: left; padding: .2rem 1.4rem .2rem 0; border-bottom: 1px solid var(--line); }
.number { text-align: right; font-variant-numeric: tabular-nums; }
pre { background: var(--soft); padding: .8rem; overflow-x: auto; }
figure { margin: 1rem 0; } img { max-width: 100%; background: white; }
figcaption { color: var(--quiet); font-size: .9em; }
""".strip()


class Report:
    """Collects parts in order; ``write`` makes the file.

    Args:
        title: Title of page and window.
    """

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = []

    def section(self, title: str) -> Report:
        """Begin a section."""
        self._parts.append(f"<h2>{escape(title)}</h2>")
        return self

    def text(self, text: str) -> Report:
        """Add a paragraph."""
        self._parts.append(f"<p>{escape(text)}</p>")
        return self

    def code(self, text: str) -> Report:
        """Add a block of code."""
        self._parts.append(f"<pre>{escape(text.strip())}</pre>")
        return self

    def table(self, rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> Report:
        """Add a table; numbers stand on the right, with four digits."""
        lines = ["<table>"]
        if header:
            lines.append("<tr>" + "".join(f"<th>{escape(name)}</th>" for name in header) + "</tr>")
        lines += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
        self._parts.append("\n".join([*lines, "</table>"]))
        return self

    def facts(self, values: Mapping[str, Any]) -> Report:
        """Add a table of names and values."""
        return self.table(values.items())

    def figure(self, figure: Any, caption: str) -> Report:
        """Add a matplotlib figure; the caption is also its text for who cannot see it."""
        image = f'<img alt="{escape(caption)}" src="{data_uri(figure)}">'
        self._parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
        return self

    def image(self, path: Path, caption: str) -> Report:
        """Add a PNG file."""
        data = base64.b64encode(path.read_bytes()).decode("ascii")
        image = f'<img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>")
        return self

    def html(self, fragment: str) -> Report:
        """Add HTML as it is, scripts too: only what this package made, never unescaped words of users or files."""
        self._parts.append(fragment)
        return self

    def write(self, path: Path) -> Path:
        """Write the file whole.

        Raises:
            ConfigError: It cannot be written.
        """
        title, body = escape(self.title), "\n".join(self._parts)
        head = f'<head><meta charset="utf-8"><title>{title}</title><style>\n{_STYLE}\n</style></head>'
        with whole_file(path) as stream:
            stream.write(f'<!doctype html>\n<html lang="en">{head}\n<body><h1>{title}</h1>\n{body}\n</body></html>\n')
        return path


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"<td>{escape('' if value is None else str(value))}</td>"
    text = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number">{text}</td>'
