"""Fan charts: what was, and what may come.

Shapes: H steps ahead, V variates, T steps of a history, Q levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError
from vertebra.pipelines.figures import MUTED, PALETTE, new_figure, shorten

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vertebra.domains.timeseries.backtest import BacktestWindow
    from vertebra.domains.timeseries.forecast import SeriesForecast
    from vertebra.domains.timeseries.series import Series

MOST_PANELS = 8
MOST_BANDS = 4
LEAST_HISTORY, MOST_HISTORY = 16, 1000
"""Steps of the history that are drawn where nothing is said."""

_ACTUAL = "#1A1A1A"
_TINTS = ("#D5E6F3", "#AFD0E8", "#86B8DB", "#5C9FCE")
"""Of the bands, the widest first: steps from white to the first colour of the palette."""

_Ticks = NDArray[Any]  # datetime64[ms], or numbers of rows


def fan_figure(
    forecast: SeriesForecast,
    windows: Sequence[BacktestWindow] = (),
    *,
    history: int | None = None,
    title: str = "",
) -> Figure:
    """Draw the end of a series and its forecast: median, and bands between levels that lie symmetric about .5.

    Windows of a backtest are drawn over what came; of windows that overlap, the later one. Of more than 8 variates, the
    first ones are drawn, and of more than 4 bands, every other one or fewer.

    Args:
        forecast: What is drawn.
        windows: Of a backtest of the same series.
        history: Steps before the forecast; None for three horizons or two seasons, and all windows within reach.
        title: Over the figure; the name of the series where it is empty.

    Raises:
        ConfigError: The history is below 1.
    """
    if history is not None and history < 1:
        raise ConfigError(f"fan_figure: history must be at least 1, got {history}.")
    series = forecast.series
    shown = _apart(windows)
    length = min(len(series), history or _usual(forecast, shown))
    shown = [window for window in shown if window.origin >= len(series) - length]
    count = min(len(series.variates), MOST_PANELS)
    height = 3.6 if count == 1 else 1.1 + 1.9 * count
    figure, panels = new_figure(count, 1, width=9.5, height=height)
    for variate, axes in enumerate(panels):
        _draw(axes, forecast, shown, length, variate)
        if count > 1:
            axes.set_title(
                shorten(series.variates[variate], 60, middle=True), fontsize=9.5, loc="left", parse_math=False
            )
            axes.sharex(panels[-1])
            axes.tick_params(labelbottom=axes is panels[-1])
    _name_times(panels[-1], series)
    left = "" if count == len(series.variates) else f"the first {count} of {len(series.variates)} variates"
    figure.suptitle(
        "\n".join(filter(None, [shorten(title or series.name, 100, middle=True), left])), fontsize=11, x=0.01,
        ha="left", parse_math=False,
    )  # fmt: skip
    _legend(figure, forecast, bool(shown))
    return figure


def _usual(forecast: SeriesForecast, windows: Sequence[BacktestWindow]) -> int:
    """Steps of the history that are drawn where nothing is said."""
    horizon, end = len(forecast.mean), len(forecast.series)
    length = min(max(3 * horizon, 2 * forecast.season, LEAST_HISTORY), max(MOST_HISTORY, horizon))
    reach = max((end - window.origin for window in windows if end - window.origin <= 6 * horizon), default=0)
    return max(length, reach + horizon if reach else 0)


def _apart(windows: Sequence[BacktestWindow]) -> list[BacktestWindow]:
    """Windows that do not overlap, taken from the last one back; early ones first."""
    kept: list[BacktestWindow] = []
    for window in sorted(windows, key=lambda w: -w.origin):
        if not kept or window.origin + len(window.forecast.mean) <= kept[-1].origin:
            kept.append(window)
    return kept[::-1]


def _draw(axes: Axes, forecast: SeriesForecast, windows: Sequence[BacktestWindow], length: int, variate: int) -> None:
    series = forecast.series
    first = len(series) - length
    for one, begin in [*((w.forecast, w.origin) for w in windows), (forecast, len(series))]:
        x = series.stamps(len(one.mean), begin)
        wide = _widened(series, begin) if len(x) == 1 else x
        for tint, (low, high) in zip(_TINTS, _bands(one.levels), strict=False):
            edges = [np.broadcast_to(one.quantiles[at, :, variate], len(wide)) for at in (low, high)]
            axes.fill_between(wide, *edges, color=tint, linewidth=0, zorder=1)  # type: ignore[arg-type]
        axes.axvline(x[0], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), zorder=2)
        marker = "o" if len(x) < 3 else ""
        axes.plot(x, one.median[:, variate], color=PALETTE[0], linewidth=1.7, marker=marker, markersize=4, zorder=3)
    past = series.stamps(length, first)
    marker = "o" if length < 3 else ""
    axes.plot(past, series.values[first:, variate], color=_ACTUAL, linewidth=1.0, marker=marker, markersize=3, zorder=4)
    axes.margins(x=0.01)


def _widened(series: Series, begin: int) -> _Ticks:
    """A single step as wide as a step is, so that a band can be seen."""
    x = series.stamps(3, max(begin - 1, 0))
    half = (x[1] - x[0]) // 2 if x.dtype.kind == "M" else 0.4
    at = series.stamps(1, begin)[0]
    return np.array([at - half, at + half])


def _bands(levels: Sequence[float]) -> list[tuple[int, int]]:
    """The bands that are drawn, as places of levels, the widest first."""
    from vertebra.domains.timeseries.metrics import level_pairs

    pairs = level_pairs(levels)
    every = -(-len(pairs) // MOST_BANDS)
    return pairs[:: max(every, 1)]


def _name_times(axes: Axes, series: Series) -> None:
    if series.start is None:
        axes.set_xlabel("step", fontsize=9)
        return
    from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

    locator = AutoDateLocator(minticks=3, maxticks=9)  # type: ignore[no-untyped-call]
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))  # type: ignore[no-untyped-call]


def _legend(figure: Figure, forecast: SeriesForecast, tested: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    levels = forecast.levels
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=_ACTUAL, linewidth=1.0, label="observed"),
        Line2D([], [], color=PALETTE[0], linewidth=1.7, label="median" if levels else "mean"),
    ]
    for tint, (low, high) in zip(_TINTS, _bands(levels), strict=False):
        handles.append(Patch(color=tint, linewidth=0, label=f"{round(100 * (levels[high] - levels[low]), 2):g} %"))
    begins = "a forecast begins" if tested else "the forecast begins"
    handles.append(Line2D([], [], color=MUTED, linewidth=0.8, linestyle=(0, (2, 2)), label=begins))
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9)
