"""Time series in memory, whatever file they come from.

Shapes: T steps, V variates, Cp past and Ck known covariates, F steps beyond the end for which covariates are known.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Frequency, Stamps
from vertebra.errors import DataError

Doubles = NDArray[np.float64]

UNCOUNTED = Frequency(1, "step")
"""Of series without stamps."""


def _none() -> Doubles:
    return np.zeros((0, 0))


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """One series on an even grid of time; a missing value is NaN.

    Args:
        name: Unique within its set.
        source: The file it comes from.
        values: (T, V).
        variates: Names of the V variates.
        frequency: Step between two rows.
        start: Stamp of the first row, datetime64[ms]; None where rows have no stamps.
        past: Covariates known up to the end of the series, (T, Cp).
        past_names: Their names.
        known: Covariates known beyond the end too, (T + F, Ck), F >= 0.
        known_names: Their names.
    """

    name: str
    source: str = ""
    values: Doubles
    variates: tuple[str, ...] = ("target",)
    frequency: Frequency = UNCOUNTED
    start: np.datetime64 | None = None
    past: Doubles = field(default_factory=_none)
    past_names: tuple[str, ...] = ()
    known: Doubles = field(default_factory=_none)
    known_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def where(self) -> str:
        """How errors call this series."""
        return f"{self.source or 'series'}: {self.name}"

    def stamps(self, count: int, offset: int = 0) -> Stamps | NDArray[np.int64]:
        """Return the stamps of ``count`` rows from row ``offset`` on; numbers of rows where there are no stamps."""
        if self.start is None:
            return np.arange(offset, offset + count)
        return self.frequency.stamps(self.start, count, offset)

    def cut(self, begin: int, end: int) -> Series:
        """Return rows ``begin`` to ``end``; covariates known beyond ``end`` stay known."""
        start = None if self.start is None else self.frequency.stamps(self.start, 1, begin)[0]
        past = self.past[begin:end] if self.past_names else self.past
        known = self.known[begin:] if self.known_names else self.known
        return dataclasses.replace(self, values=self.values[begin:end], start=start, past=past, known=known)

    def check(self) -> None:
        """Refuse what no forecast can be made from.

        Raises:
            DataError: No value is known, a shape is wrong, or a number is infinite.
        """
        if self.values.ndim != 2 or self.values.shape[1] != len(self.variates):
            raise DataError(f"{self.where}: values must be (T, {len(self.variates)}), got {self.values.shape}.")
        if not np.isfinite(self.values).any():
            raise DataError(f"{self.where}: holds no value; leave it out.")
        if np.isinf(self.values).any():
            row = int(np.isinf(self.values).any(1).argmax())
            raise DataError(f"{self.where}: the value of row {row + 1} is infinite; correct it or leave it empty.")
        for kind, values, names, least in (
            ("past", self.past, self.past_names, len(self)),
            ("known", self.known, self.known_names, len(self)),
        ):
            if names and (values.ndim != 2 or values.shape[1] != len(names) or len(values) < least):
                raise DataError(
                    f"{self.where}: {kind} covariates must be ({least}, {len(names)}) at least, got {values.shape}."
                )
            if names and np.isinf(values).any():
                raise DataError(f"{self.where}: a {kind} covariate is infinite; correct it or leave it empty.")


def season_of(series: Series) -> int:
    """Return the steps of the usual season of a series."""
    return series.frequency.season
