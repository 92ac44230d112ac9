"""A forecast of a series, in its own units.

Shapes: H steps, V variates, Q levels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.timeseries.frequency import Stamps
from vertebra.domains.timeseries.series import Doubles, Series


@dataclass(frozen=True, kw_only=True, eq=False)
class SeriesForecast:
    """What comes after a series.

    Args:
        series: The history, which ends where the forecast begins.
        mean: Expected value, (H, V).
        quantiles: (Q, H, V); Q = 0 where a model tells the mean alone.
        levels: Levels of the Q quantiles, rising.
        season: Steps of the season that was assumed.
    """

    series: Series
    mean: Doubles
    quantiles: Doubles
    levels: tuple[float, ...]
    season: int

    @property
    def stamps(self) -> Stamps | NDArray[np.int64]:
        """Stamps of the H steps; numbers of rows where the series has no stamps."""
        return self.series.stamps(len(self.mean), len(self.series))

    @property
    def median(self) -> Doubles:
        """The quantile of level .5, (H, V), between its neighbours where it is none of the levels; else the mean."""
        if not self.levels:
            return self.mean
        return self.quantile(0.5)

    def quantile(self, level: float) -> Doubles:
        """Return a quantile (H, V), by linear interpolation between the levels told; beyond them, the outermost."""
        if not self.levels:
            return self.mean
        at = float(np.interp(level, self.levels, np.arange(len(self.levels))))
        low = int(at)
        high = min(low + 1, len(self.levels) - 1)
        lower: Doubles = self.quantiles[low]
        return lower + (at - low) * (self.quantiles[high] - lower)
