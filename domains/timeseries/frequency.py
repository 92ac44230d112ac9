"""Frequencies of time series: names, steps between stamps, seasons; and what the frequency of given stamps is.

A frequency is a whole number and a unit, as in pandas: ``15min``, ``h``, ``D``, ``W``, ``MS``, ``QS``, ``YS``. Months,
quarters and years step by calendar. ``step`` is for series without stamps, which count their values.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import DataError, UnknownNameError

Stamps = NDArray[np.datetime64]

UNITS = ("ms", "s", "min", "h", "D", "B", "W", "MS", "QS", "YS", "step")
"""Units, from milliseconds to years; ``B`` is a weekday, ``step`` has no stamp."""

_SECONDS = {"ms": 0.001, "s": 1.0, "min": 60.0, "h": 3600.0, "D": 86400.0, "W": 7 * 86400.0}
_MONTHS = {"MS": 1, "QS": 3, "YS": 12}
_ALIASES = {
    "l": "ms", "t": "min", "minute": "min", "minutes": "min", "minutely": "min", "m": "MS", "me": "MS", "ms": "ms",
    "h": "h", "hour": "h", "hourly": "h", "d": "D", "day": "D", "daily": "D", "b": "B", "w": "W", "week": "W",
    "weekly": "W", "month": "MS", "monthly": "MS", "q": "QS", "qe": "QS", "qs": "QS", "quarterly": "QS", "a": "YS",
    "as": "YS", "y": "YS", "ye": "YS", "ys": "YS", "year": "YS", "yearly": "YS", "s": "s", "second": "s",
    "seconds": "s", "secondly": "s", "step": "step", "min": "min",
}  # fmt: skip


@dataclass(frozen=True)
class Frequency:
    """Steps of ``count`` units.

    Args:
        count: How many units a step is.
        unit: One of ``UNITS``.
    """

    count: int
    unit: str

    def __str__(self) -> str:
        return self.unit if self.count == 1 else f"{self.count}{self.unit}"

    @property
    def seconds(self) -> float | None:
        """Length of a step; None where it differs from step to step, or there is none."""
        return None if self.unit not in _SECONDS else self.count * _SECONDS[self.unit]

    @property
    def season(self) -> int:
        """Steps of the usual season, as the forecasting benchmarks take it: 24 for hours, 12 for months, 7 for days.

        It is a day for what is sampled at least twice a day, a year for months and quarters, a week for days (five of
        them for weekdays), else 1.
        """
        if self.unit in _MONTHS:
            months = self.count * _MONTHS[self.unit]
            return 12 // months if 12 % months == 0 else 1
        if self.unit == "B":
            return 5 if self.count == 1 else 1
        if self.unit == "D":
            return 7 if self.count == 1 else 1
        seconds = self.seconds
        if seconds is None or seconds >= _SECONDS["D"]:
            return 1
        if seconds < 60:
            return max(1, round(60 / seconds)) if seconds >= 1 else 1  # a minute
        return max(1, round(_SECONDS["D"] / seconds))

    def stamps(self, start: np.datetime64, count: int, offset: int = 0) -> Stamps:
        """Return ``count`` stamps, datetime64[ms] (count,), the first ``offset`` steps after ``start``.

        Raises:
            DataError: The frequency is ``step``, which has no stamps.
        """
        steps = np.arange(offset, offset + count) * self.count
        if self.unit == "step":
            raise DataError("Frequency.stamps: a series of frequency 'step' has no stamps; count its values instead.")
        begin = start.astype("datetime64[ms]")
        if self.unit in _MONTHS:
            month = begin.astype("datetime64[M]")
            inside = begin - month.astype("datetime64[ms]")
            months = month + steps * _MONTHS[self.unit]
            time = inside % np.timedelta64(1, "D")
            last = (months + 1).astype("datetime64[ms]") - np.timedelta64(1, "D") + time
            if (begin + np.timedelta64(1, "D")).astype("datetime64[M]") != month:  # ends of months
                return last.astype("datetime64[ms]")
            return np.minimum(months.astype("datetime64[ms]") + inside, last).astype("datetime64[ms]")
        if self.unit == "B":
            day = begin.astype("datetime64[D]")
            days = np.busday_offset(day, steps, roll="forward")
            return days.astype("datetime64[ms]") + (begin - day.astype("datetime64[ms]"))
        return begin + (steps * round(_SECONDS[self.unit] * 1000)).astype("timedelta64[ms]")


def parse_frequency(text: str) -> Frequency:
    """Read a frequency: ``h``, ``15min``, ``15T``, ``D``, ``W-SUN``, ``M``, ``hourly``, ``10_minutes``.

    Raises:
        UnknownNameError: There is none of that name.
    """
    found = re.fullmatch(r"\s*(\d*)[\s_]*([A-Za-z]+)(?:-[A-Za-z]+)?\s*", re.sub("half[_ -]", "half", text, flags=re.I))
    if found is None:
        raise UnknownNameError("frequency", text, UNITS)
    number, name = found.groups()
    if name.lower() == "halfhourly":
        return Frequency(30, "min")
    count = int(number or 1)
    unit = "MS" if name == "MS" else _ALIASES.get(name.lower())
    if unit is None or count < 1:
        raise UnknownNameError("frequency", text, UNITS)
    return Frequency(count, unit)
