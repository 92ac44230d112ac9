"""What a pipeline says about one record."""

from __future__ import annotations

import csv
import html
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vertebra.errors import ConfigError, printable
from vertebra.pipelines import figures
from vertebra.pipelines.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table


@dataclass(eq=False)
class Prediction:
    """The answer for one record.

    Args:
        value: The answer itself: a class name, names of labels, a number, an array.
        scores: Score of each class or target; empty where the pipeline has none.
        name: Name of the record.
        details: Further facts, JSON-able or arrays: length in bases, windows, ...
        label: What the scores are, for the axis of the figure.
    """

    value: Any
    scores: dict[str, float] = field(default_factory=dict)
    name: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    label: str = "score"

    def figure(self) -> Figure:
        """Draw the scores; an array value is drawn as a curve."""
        if self.scores or not isinstance(self.value, np.ndarray):
            return figures.bars(self.scores, title=self.name, label=self.label)
        figure, (axes,) = figures.new_figure(width=8.0, height=2.6)
        axes.plot(np.ravel(self.value), color=figures.PALETTE[0], linewidth=1.0)
        axes.set_xlabel("dimension")
        axes.set_ylabel(self.label)
        axes.set_title(self.name, fontsize=11, loc="left")
        return figure

    def to_dict(self) -> dict[str, Any]:
        """Return name, value, scores and details as plain Python values."""
        return {
            "name": self.name,
            "value": _plain(self.value),
            "scores": _plain(self.scores),
            **{k: _plain(v) for k, v in self.details.items()},
        }

    def to_json(self) -> str:
        """Return ``to_dict()`` as JSON text."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def save(self, path: str | Path) -> Path:
        """Write the prediction as .json, .csv (a row of scores, or of the array) or .png (the figure).

        Raises:
            ConfigError: The ending is none of these, or the file cannot be written.
        """
        path = Path(path)
        if path.suffix == ".json":
            with whole_file(path) as stream:
                stream.write(self.to_json() + "\n")
        elif path.suffix == ".csv":
            with whole_file(path) as stream:
                csv.writer(stream, lineterminator="\n").writerows(self._table())
        elif path.suffix == ".png":
            with whole_file(path, "wb") as stream:
                stream.write(figures.png_bytes(self.figure()))
        else:
            raise ConfigError(f"Prediction.save: the name must end in .json, .csv or .png, got {path.name!r}.")
        return path

    def _table(self) -> list[list[Any]]:
        if isinstance(self.value, np.ndarray):
            flat = np.ravel(self.value).tolist()
            return [["name", *range(len(flat))], [self.name, *flat]]
        value = ";".join(map(str, self.value)) if isinstance(self.value, (list, tuple)) else self.value
        return [["name", "value", *self.scores], [self.name, value, *self.scores.values()]]

    def _brief(self) -> str:
        return printable(self._in_words())

    def _in_words(self) -> str:
        if isinstance(self.value, np.ndarray):
            return f"array {self.value.shape}"
        if isinstance(self.value, (list, tuple)):
            return "; ".join(map(str, self.value)) or "none"
        return f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)

    def _best(self, most: int = 5) -> list[tuple[str, float]]:
        return sorted(self.scores.items(), key=lambda pair: -pair[1])[:most]

    def __repr__(self) -> str:
        scores = ", ".join(f"{printable(name)}: {score:.4g}" for name, score in self._best())
        return f"{type(self).__name__}({printable(self.name) + ' = ' if self.name else ''}{self._brief()}; {scores})"

    def __rich__(self) -> Table:
        """Return a small table for a terminal."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(
            title=escape(f"{printable(self.name)}: {self._brief()}" if self.name else self._brief()),
            title_justify="left",
        )
        table.add_column("class")
        table.add_column(self.label, justify="right")
        for name, score in self._best():
            table.add_row(escape(printable(name)), f"{score:.4f}")
        return table

    def _repr_html_(self) -> str:
        rows = "".join(f"<tr><td>{html.escape(n)}</td><td>{s:.4f}</td></tr>" for n, s in self._best())
        title = html.escape(f"{self.name}: {self._brief()}" if self.name else self._brief())
        return f"<table><caption>{title}</caption>{rows}</table>"


def _plain(value: Any) -> Any:
    """Turn arrays and tuples, also nested, into lists and numbers that JSON knows."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value
