"""Spectrograms with words: what is written where."""

import numpy as np
import pytest
from matplotlib.text import Text

from vertebra.domains.speech.transcript import Word
from vertebra.pipelines.figures import png_bytes
from vertebra.pipelines.speech_figures import spectrogram_figure


def tone(seconds, rate, hz=1000.0):
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def rows_of(figure):
    return [axes for axes in figure.axes if axes.get_ylabel() == "kHz"]


def written(axes):
    return [text.get_text() for text in axes.texts]


def spaced(count, seconds, text="word"):
    step = seconds / count
    return [Word(f"{text}{i}", i * step, (i + 0.8) * step, i / count) for i in range(count)]


@pytest.mark.parametrize(("seconds", "rate"), [(0.01, 8000), (1.3, 8000), (10.0, 16_000), (25.0, 44_100)])
def test_a_tone_is_where_it_belongs(seconds, rate):
    figure = spectrogram_figure(tone(seconds, rate), rate)
    rows = rows_of(figure)
    assert len(figure.axes) == len(rows) == max(1, -(-int(seconds) // 10))
    for axes in rows:
        (image,) = axes.images
        power = np.asarray(image.get_array())
        left, right, _, kilohertz = image.get_extent()
        middle = power[:, power.shape[1] // 2]
        assert (middle.argmax() + 0.5) / len(middle) * kilohertz == pytest.approx(1.0, abs=0.06)
        assert kilohertz == pytest.approx(min(rate / 2000, 8.0), rel=0.01)
        assert left <= axes.get_xlim()[0]
        assert right > min(axes.get_xlim()[1], seconds) - 0.02
    assert png_bytes(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize(("count", "seconds"), [(1, 0.5), (12, 9.0), (60, 58.0)])
def test_every_word_is_written_once(count, seconds):
    words = spaced(count, seconds)
    figure = spectrogram_figure(tone(seconds, 8000), 8000, words, title="t")
    rows = rows_of(figure)
    assert [t for axes in rows for t in written(axes)] == [w.text for w in words]
    assert figure.axes[-1].get_ylabel() == "confidence"
    assert rows[0].get_title(loc="left") == "t"


def test_words_do_not_cover_each_other():
    words = spaced(40, 10.0, text="wording")
    figure = spectrogram_figure(tone(10.0, 8000), 8000, words, title="long name " * 20)
    figure.draw_without_rendering()
    (axes,) = rows_of(figure)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 40
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    shown = axes.get_title(loc="left")
    title = next(t for t in axes.findobj(Text) if t.get_text() == shown).get_window_extent()
    assert not any(title.overlaps(box) for box in boxes)
    width, height = figure.get_size_inches() * figure.dpi
    assert all(box.x0 >= 0 and box.x1 <= width and box.y1 <= height for box in [*boxes, title])


def test_a_word_at_the_end_of_a_row_is_marked_in_both():
    figure = spectrogram_figure(tone(20.0, 8000), 8000, [Word("over", 9.5, 10.2, 0.9)])
    first, second = rows_of(figure)
    assert written(first) == ["over"]
    assert written(second) == []
    assert len(first.patches) == len(second.patches) == 1


def test_confidence_is_colour():
    words = [Word("sure", 0.0, 0.5, 1.0), Word("perhaps", 0.5, 1.0, 0.0), Word("odd", 1.0, 1.5, 1.7)]
    axes = rows_of(spectrogram_figure(tone(1.5, 8000), 8000, words))[0]
    sure, perhaps, odd = (tuple(p.get_facecolor()[:3]) for p in axes.patches)
    assert sure == odd != perhaps
    assert sure[2] > sure[0]  # blue
    assert perhaps[0] > perhaps[2]  # red


def test_a_long_recording_is_drawn_in_part():
    figure = spectrogram_figure(tone(75.0, 8000), 8000, [Word("late", 70.0, 71.0, 1.0)])
    rows = rows_of(figure)
    assert len(rows) == 6
    assert rows[-1].get_xlabel() == "time (s); the first 60 of 75 s"
    assert not any(written(axes) for axes in rows)


def test_silence_is_white():
    axes = rows_of(spectrogram_figure(np.zeros(8000, np.float32), 8000))[0]
    (image,) = axes.images
    assert np.asarray(image.get_array()).max() <= image.norm.vmin + 1e-3


def test_signs_that_mathematics_uses_are_text():
    words = [Word("$5", 0.0, 0.5, 1.0), Word("$_6", 0.5, 1.0, 1.0)]
    assert png_bytes(spectrogram_figure(tone(1.0, 8000), 8000, words, title="a $b$.wav")).startswith(b"\x89PNG")
