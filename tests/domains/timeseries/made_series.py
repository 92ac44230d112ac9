"""What tests of readers share: made series, files of given text, and comparing."""

import gzip

import numpy as np

from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.series import UNCOUNTED, Series
from vertebra.domains.timeseries.sources import SourceOptions, read_series


def made(name="a", steps=12, frequency="h", start="2016-07-01", seed=0, width=1, past=0, known=0, ahead=0, holes=()):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(steps, width))
    values[list(holes)] = np.nan
    return Series(
        name=name,
        values=values,
        variates=("target",) if width == 1 else tuple(f"v{i}" for i in range(width)),
        frequency=UNCOUNTED if start is None else parse_frequency(frequency),
        start=None if start is None else np.datetime64(start, "ms"),
        past=rng.normal(size=(steps, past)) if past else np.zeros((0, 0)),
        past_names=tuple(f"p{i}" for i in range(past)),
        known=rng.normal(size=(steps + ahead, known)) if known else np.zeros((0, 0)),
        known_names=tuple(f"k{i}" for i in range(known)),
    )


def same(found, wanted, names=True):
    assert (found.frequency, found.start, len(found)) == (wanted.frequency, wanted.start, len(wanted))
    np.testing.assert_array_equal(found.values, wanted.values)
    for what in ("past", "known"):
        if getattr(wanted, f"{what}_names"):
            np.testing.assert_array_equal(getattr(found, what), getattr(wanted, what))
    if names:
        assert found.name == wanted.name
        assert (found.past_names, found.known_names) == (wanted.past_names, wanted.known_names)


def put(folder, text, name="a.csv"):
    path = folder / name
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return path


def rows(values, start="2016-07-01T00", step=1, unit="h", header="date,x", sign=","):
    """A wide table of one column."""
    stamps = np.datetime64(start, unit) + np.arange(len(values)) * step
    texts = [str(np.datetime_as_string(stamp, "s")).replace("T", " ") for stamp in stamps]
    return "\n".join([header, *(f"{t}{sign}{v}" for t, v in zip(texts, values, strict=True))]) + "\n"


def read(path, **options):
    """The series of a file, by name, and what was left out without the folder."""
    found, left = read_series([path], SourceOptions(**options))
    return {own.name: own for own in found}, [str(own).removeprefix(f"{path.parent}/") for own in left]


def refused(path, **options):
    """The error, without the folder."""
    try:
        found, _ = read_series([path], SourceOptions(**options))
    except ValueError as e:
        return str(e).replace(f"{path.parent}/", "")
    raise AssertionError(f"read {found}")
