"""Figures on a dark page: the same drawing, every colour's lightness turned over, hue and pictures kept."""

from __future__ import annotations

import colorsys
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure
    from matplotlib.text import Text

PAPER, INK = "#181B20", "#E8EAED"
"""What white and black become; the cards of reports have the same."""
CANVAS = "canvas"
"""Id (``gid``) of axes whose picture is a layout on the figure's own paper, with text beside what it shows."""

_GREY = 0.12  # saturation below which a colour is a shade of paper and ink

_twins: ContextVar[dict[str, bytes] | None] = ContextVar("twins", default=None)


@contextmanager
def dark_twins() -> Iterator[None]:
    """Within, every figure that becomes a PNG is drawn for dark pages too; ``twin_of`` gives that.

    Files are the same as without; the twins are kept in memory.
    """
    token = _twins.set({})
    try:
        yield
    finally:
        _twins.reset(token)


def twins_wanted() -> bool:
    """Whether this runs within ``dark_twins``."""
    return _twins.get() is not None


def keep_twin(png: bytes, dark: bytes) -> None:
    """Remember the dark PNG of a figure that became ``png``."""
    twins = _twins.get()
    if twins is not None:
        twins[_key(png)] = dark


def twin_of(png: bytes) -> bytes | None:
    """Return the dark PNG of a figure that was drawn within ``dark_twins``; None for every other picture."""
    return (_twins.get() or {}).get(_key(png))


def _key(png: bytes) -> str:
    return hashlib.sha256(png).hexdigest()


def darken(figure: Figure) -> None:
    """Give a figure the colours of a dark page.

    Pictures and colour maps are left alone, and so is what is drawn upon them.
    """
    from matplotlib.collections import Collection
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.text import Text

    pictures = [axes for axes in figure.axes if axes.images and axes.get_gid() != CANVAS]
    upon: set[Artist] = set()
    for axes in pictures:
        upon |= {*axes.lines, *axes.patches, *axes.collections}
        upon |= {text for text in axes.texts if axes.bbox.contains(*_place(text))}  # others stand beside the picture
    artist: Artist
    for artist in figure.findobj():
        if artist in upon:
            continue
        if isinstance(artist, Text):
            artist.set_color(_turned(artist.get_color()))
        elif isinstance(artist, Line2D):
            colours = [artist.get_color(), artist.get_markerfacecolor(), artist.get_markeredgecolor()]
            line, face, edge = (c if isinstance(c, str) and c == "none" else _turned(c) for c in colours)
            artist.set(color=line, markerfacecolor=face, markeredgecolor=edge)
        elif isinstance(artist, Patch):
            artist.set(facecolor=_turned(artist.get_facecolor()), edgecolor=_turned(artist.get_edgecolor()))
        elif isinstance(artist, Collection) and artist.get_array() is None:
            artist.set(facecolor=_all_turned(artist.get_facecolor()), edgecolor=_all_turned(artist.get_edgecolor()))


def _place(text: Text) -> tuple[float, float]:
    """Where a text is anchored, in pixels of the figure."""
    x, y = text.get_transform().transform(text.get_unitless_position())
    return float(x), float(y)


def _all_turned(colours: Any) -> Any:
    rows: NDArray[np.float64] = np.atleast_2d(np.asarray(colours, dtype=np.float64))
    return [_turned(tuple(row)) for row in rows] if rows.size else "none"


def _turned(colour: Any) -> tuple[float, float, float, float]:
    """Turn a colour's lightness over; white becomes paper, black becomes ink."""
    from matplotlib.colors import to_rgba

    red, green, blue, alpha = to_rgba(colour)
    hue, light, saturation = colorsys.rgb_to_hls(red, green, blue)
    paper, ink = to_rgba(PAPER), to_rgba(INK)
    if max(red, green, blue) - min(red, green, blue) < _GREY:
        return (*(ink[i] + light * (paper[i] - ink[i]) for i in range(3)), alpha)  # type: ignore[return-value]
    lowest = colorsys.rgb_to_hls(*paper[:3])[1]
    return (*colorsys.hls_to_rgb(hue, lowest + (1 - light) * (1 - lowest), saturation), alpha)
