"""Fan charts: what is drawn where, which bands and windows, and ticks that can be read."""

import dataclasses
import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.dates import date2num

from vertebra.domains.timeseries.backtest import backtest
from vertebra.domains.timeseries.baselines import SeasonalNaive
from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.spec import QUANTILES
from vertebra.errors import ConfigError
from vertebra.pipelines.figures import PALETTE, png_bytes
from vertebra.pipelines.timeseries_figures import MOST_BANDS, MOST_PANELS, fan_figure


def walk(steps=200, width=1, frequency="h", start="2024-02-27"):
    values = np.random.default_rng(0).normal(size=(steps, width)).cumsum(0)
    stamp = None if start is None else np.datetime64(start, "ms")
    names = tuple(f"v{i}" for i in range(width))
    step = parse_frequency("step" if start is None else frequency)
    return Series(name="walk", values=values, variates=names, frequency=step, start=stamp)


def ahead(series, horizon=24, levels=QUANTILES):
    return SeasonalNaive().forecast([series], horizon, levels)[0]


def windows_of(series, horizon=24, **options):
    return backtest(SeasonalNaive().forecast, [series], horizon, **options).windows


def lines(axes, colour):
    """Curves of a colour, as x and y, from left to right."""
    found = [line for line in axes.lines if to_hex(line.get_color()) == colour.lower()]
    curves = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in found]
    return sorted(curves, key=lambda curve: curve[0][0])


def bands(axes):
    """Lowest and highest value of every band."""
    return [
        (float(path.vertices[:, 1].min()), float(path.vertices[:, 1].max()))
        for shape in axes.collections
        for path in shape.get_paths()
    ]


def labels(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_history_median_and_bands():
    series = walk()
    made = ahead(series)
    figure = fan_figure(made, history=50)
    (axes,) = figure.axes
    ((x, y),) = lines(axes, "#1a1a1a")
    np.testing.assert_array_equal(y, series.values[-50:, 0])
    np.testing.assert_array_equal(x, series.stamps(50, 150))
    ((x, y),) = lines(axes, PALETTE[0])
    np.testing.assert_array_equal(y, made.median[:, 0])
    np.testing.assert_array_equal(x, made.stamps)
    drawn = bands(axes)
    assert len(drawn) == 4
    for (low, high), level in zip(drawn, range(4), strict=True):
        assert low == pytest.approx(made.quantiles[level].min())
        assert high == pytest.approx(made.quantiles[8 - level].max())
    assert labels(figure) == ["observed", "median", "80 %", "60 %", "40 %", "20 %", "the forecast begins"]
    assert figure.get_suptitle() == "walk"


@pytest.mark.parametrize(
    ("levels", "wanted"),
    [
        ((0.1, 0.25, 0.5, 0.75, 0.9), ["80 %", "50 %"]),
        ((0.025, 0.1, 0.9), ["80 %"]),
        ((0.1, 0.2), []),
        ((0.025, 0.975), ["95 %"]),
        (tuple(np.arange(1, 20) / 20), ["90 %", "60 %", "30 %"]),
    ],
)
def test_bands_lie_between_symmetric_levels(levels, wanted):
    figure = fan_figure(ahead(walk(), levels=levels))
    assert labels(figure)[2:-1] == wanted
    assert len(figure.axes[0].collections) == len(wanted) <= MOST_BANDS


def test_means_alone_have_no_band():
    figure = fan_figure(ahead(walk(), levels=()))
    assert labels(figure) == ["observed", "mean", "the forecast begins"]
    assert not figure.axes[0].collections


def test_windows_of_a_backtest_lie_over_what_came():
    series = walk()
    found = windows_of(series, windows=3)
    figure = fan_figure(ahead(series), found)
    curves = lines(figure.axes[0], PALETTE[0])
    assert len(curves) == 4
    for (x, y), window in zip(curves, found, strict=False):
        assert x[0] == series.stamps(1, window.origin)[0]
        np.testing.assert_array_equal(y, window.forecast.median[:, 0])
    ((x, _),) = lines(figure.axes[0], "#1a1a1a")
    assert x[0] < curves[0][0][0]  # there is some history before the first window
    assert labels(figure)[-1] == "a forecast begins"


def test_of_windows_that_overlap_the_later_is_drawn():
    series = walk()
    found = windows_of(series, windows=5, stride=10)
    curves = lines(fan_figure(ahead(series), found).axes[0], PALETTE[0])
    begins = [x[0] for x, _ in curves]
    assert begins == list(series.stamps(201)[[146, 176, 200]])


def test_windows_before_the_history_are_left_out():
    series = walk()
    figure = fan_figure(ahead(series), windows_of(series, windows=5), history=50)
    assert len(lines(figure.axes[0], PALETTE[0])) == 3  # two windows within 50 steps


@pytest.mark.parametrize("width", [2, MOST_PANELS + 3])
def test_every_variate_has_a_panel(width):
    series = walk(width=width)
    figure = fan_figure(ahead(series), title="all")
    count = min(width, MOST_PANELS)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [f"v{i}" for i in range(count)]
    for i, axes in enumerate(figure.axes):
        np.testing.assert_array_equal(lines(axes, "#1a1a1a")[0][1], series.values[-72:, i])
    told = "all" if width == count else f"all\nthe first {count} of {width} variates"
    assert figure.get_suptitle() == told
    FigureCanvasAgg(figure).draw()
    named = [any(t.get_text() and t.get_visible() for t in axes.get_xticklabels()) for axes in figure.axes]
    assert named[-1]
    shown = [axes.xaxis.get_tick_params()["labelbottom"] for axes in figure.axes]
    assert shown == [False] * (count - 1) + [True]


@pytest.mark.parametrize("frequency", ["s", "15min", "h", "D", "B", "W", "MS", "QS", "YS", "step"])
def test_ticks_do_not_collide(frequency):
    start = None if frequency == "step" else "1999-12-30T23:15"
    for horizon, history in ((24, None), (3, 5)):
        figure = fan_figure(ahead(walk(frequency=frequency, start=start), horizon), history=history)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        boxes = [
            label.get_window_extent(canvas.get_renderer())
            for place, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)
            if label.get_text() and low <= place <= high
        ]
        assert len(boxes) >= 2
        assert all(left.x1 + 3 < right.x0 for left, right in itertools.pairwise(boxes))
        assert (axes.get_xlabel() == "step") == (start is None)


def test_a_single_step_can_be_seen():
    for start in ("2024-02-27", None):
        series = walk(start=start)
        made = ahead(series, 1)
        figure = fan_figure(made)
        (axes,) = figure.axes
        line = next(line for line in axes.lines if to_hex(line.get_color()) == PALETTE[0].lower())
        assert line.get_marker() == "o"
        (path,) = axes.collections[0].get_paths()
        at = float(date2num(made.stamps[0]) if start else made.stamps[0])
        wide = path.vertices[:, 0]
        assert wide.min() < at < wide.max()
        assert at - wide.min() < (1 / 24 if start else 1)
        assert png_bytes(figure).startswith(b"\x89PNG")


def test_gaps_are_not_bridged_and_short_series_are_drawn():
    values = walk(30).values
    values[20:25] = np.nan
    series = dataclasses.replace(walk(30), values=values)
    ((_, y),) = lines(fan_figure(ahead(series)).axes[0], "#1a1a1a")
    assert len(y) == 30  # all there is
    assert np.isnan(y[20:25]).all()


def test_names_are_not_read_as_formulas_and_are_cut():
    series = dataclasses.replace(walk(width=2), name="a$b$" * 60, variates=("x$1$", "y" * 200))
    figure = fan_figure(ahead(series))
    assert len(figure.get_suptitle()) == 100
    assert len(figure.axes[1].get_title(loc="left")) == 60
    assert png_bytes(figure).startswith(b"\x89PNG")


def test_an_impossible_history():
    with pytest.raises(ConfigError, match=r"^fan_figure: history must be at least 1, got 0\.$"):
        fan_figure(ahead(walk()), history=0)
