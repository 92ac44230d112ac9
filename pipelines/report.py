"""A report as one HTML file: sections of text, tables, figures and code, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vertebra import __version__
from vertebra.pipelines.dark import dark_twins, twin_of
from vertebra.pipelines.figures import png_bytes
from vertebra.pipelines.files import whole_file

_NUMBER = ' class="number"'


class Report:
    """Collects parts in order; ``write`` makes the file.

    Parts lie on cards, one a section; sections may be gathered in chapters. Figures are drawn twice, for light and dark
    pages; the reader's system chooses, or the button does.

    Args:
        title: Title of page and window.
        lead: A sentence below it.
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title, self.lead = title, lead
        self._parts: list[str] = []
        self._open: list[str] = []  # end tags of chapter and card
        self._chapters: list[str] = []
        self._sections: list[str] = []
        self._top = ""

    def chapter(self, title: str, text: str = "") -> Report:
        """Begin a chapter, with a sentence of its own; the page's menu names it."""
        self._close(0)
        self._chapters.append(title)
        self._parts.append(f'<section class="chapter" id="chapter-{len(self._chapters)}"><h2>{escape(title)}</h2>')
        self._open.append("</section>")
        return self.text(text) if text else self

    def section(self, title: str) -> Report:
        """Begin a section; without chapters, the page's menu names it."""
        self._close(bool(self._chapters))
        self._sections.append(title)
        level = 3 if self._chapters else 2
        self._parts.append(
            f'<section class="card" id="section-{len(self._sections)}"><h{level}>{escape(title)}</h{level}>'
        )
        self._open.append("</section>")
        return self

    def _close(self, depth: int) -> None:
        while len(self._open) > depth:
            self._parts.append(self._open.pop())

    def text(self, text: str) -> Report:
        """Add a paragraph."""
        return self.html(f"<p>{escape(text)}</p>")

    def code(self, text: str) -> Report:
        """Add a block of code, with a button that copies it."""
        return self.html(f'<div class="code"><pre>{escape(text.strip())}</pre></div>')

    def details(self, title: str, text: str) -> Report:
        """Add a long text that is folded away."""
        return self.html(f"<details><summary>{escape(title)}</summary><pre>{escape(text.strip())}</pre></details>")

    def headline(self, values: Iterable[tuple[Any, str]]) -> Report:
        """Put large numbers, or words, at the top of the page, whenever this is called."""
        self._top = _tiles(values)
        return self

    def tiles(self, values: Iterable[tuple[Any, str]]) -> Report:
        """Add large numbers, or words, with what each of them is."""
        return self.html(_tiles(values))

    def table(self, rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> Report:
        """Add a table; numbers stand on the right, with four digits."""
        rows = [list(row) for row in rows]
        lines = ['<div class="scroll"><table>']
        if header:
            numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(header))]
            heads = (f"<th{_NUMBER * right}>{escape(name)}</th>" for name, right in zip(header, numeric, strict=True))
            lines.append(f"<tr>{''.join(heads)}</tr>")
        lines += ["<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows]
        return self.html("\n".join([*lines, "</table></div>"]))

    def facts(self, values: Mapping[str, Any]) -> Report:
        """Add a table of names and values."""
        return self.table(values.items())

    def figure(self, figure: Any, caption: str) -> Report:
        """Add a matplotlib figure, whose colours it may change; the caption is also its text for who cannot see it."""
        with dark_twins():
            png = png_bytes(figure)
            return self._picture(png, twin_of(png), caption)

    def image(self, path: Path, caption: str) -> Report:
        """Add a PNG file; within ``dark.dark_twins`` also as it is on dark pages."""
        png = path.read_bytes()
        return self._picture(png, twin_of(png), caption)

    def _picture(self, light: bytes, dark: bytes | None, caption: str) -> Report:
        words = escape(caption)
        pictures = [("paper", light)] if dark is None else [("day", light), ("night", dark)]
        images = "".join(
            f'<img class="{kind}" alt="{words}" src="data:image/png;base64,{_base64(png)}">' for kind, png in pictures
        )
        width = int.from_bytes(light[16:20], "big")
        return self.html(
            f'<figure><div class="wide" style="--w: {width}px">{images}</div><figcaption>{words}</figcaption></figure>'
        )

    def sounds(self, paths: Iterable[tuple[Path, str]]) -> Report:
        """Add recordings (.wav, .flac, .mp3) to listen to, each with its caption."""
        kinds = {".wav": "wav", ".flac": "flac", ".mp3": "mpeg"}
        parts = [
            f'<figure><audio controls preload="metadata" src="data:audio/{kinds[path.suffix.lower()]};base64,'
            f'{_base64(path.read_bytes())}"></audio><figcaption>{escape(caption)}</figcaption></figure>'
            for path, caption in paths
        ]
        return self.html(f'<div class="sounds">{"".join(parts)}</div>')

    def html(self, fragment: str) -> Report:
        """Add HTML as it is, scripts too: only what this package made, never unescaped words of users or files."""
        self._parts.append(fragment)
        return self

    def write(self, path: Path) -> Path:
        """Write the file whole.

        Raises:
            ConfigError: It cannot be written.
        """
        self._close(0)
        title, body = escape(self.title), "\n".join(self._parts)
        kind, names = ("chapter", self._chapters) if self._chapters else ("section", self._sections)
        links = "".join(f'<a href="#{kind}-{number}">{escape(name)}</a>' for number, name in enumerate(names, 1))
        menu = f"<nav><div>{links}</div></nav>" if len(names) > 1 else ""
        lead = f'<p class="lead">{escape(self.lead)}</p>' if self.lead else ""
        page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
{_asset("report.css")}
</style></head>
<body><header class="top"><div><h1>{title}</h1>{lead}</div>
<button class="tool" id="theme" type="button" hidden></button></header>
{menu}
<main>
{self._top}
{body}
</main>
<footer>Made by vertebra {__version__}.</footer>
<script>
{_asset("report.js")}
</script></body></html>
"""
        with whole_file(path) as stream:
            stream.write(page)
        return path


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8").strip()


def _tiles(values: Iterable[tuple[Any, str]]) -> str:
    tiles = "".join(f"<div><b>{escape(_said(value))}</b><span>{escape(what)}</span></div>" for value, what in values)
    return f'<div class="tiles">{tiles}</div>'


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _said(value: Any) -> str:
    if value is None or value != value:  # not a number
        return ""
    if not _is_number(value):
        return str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _cell(value: Any) -> str:
    return f"<td{_NUMBER * _is_number(value)}>{escape(_said(value))}</td>"
