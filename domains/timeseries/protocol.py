"""The long-horizon benchmark on the ETT data sets: which rows train, validate and test, and which windows there are.

The first 12 months of 30 days train, the next 4 validate, the next 4 test. Values are scaled by mean and standard
deviation of the training rows. Windows begin at every row and none is dropped; those of validation and test look back
into the part before (Zhou et al., "Informer", AAAI 2021; older test loaders dropped the last, incomplete batch).

Shapes: T steps, V variates, N windows, L steps of context, H steps to forecast.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.series import Doubles
from vertebra.errors import ConfigError, DataError, UnknownNameError

_MONTHS = (12, 16, 20)  # at whose ends the parts end
_SPLITS = ("train", "val", "test")
_MONTH = 30 * 86400  # seconds


@dataclass(frozen=True, kw_only=True, eq=False)
class Windows:
    """Windows of one part, views of the scaled values.

    Args:
        context: (N, V, L).
        target: What follows, (N, V, H).
        center: Mean of the training rows, (V,).
        scale: Their standard deviation, (V,); 1 for a variate that does not move.
    """

    context: Doubles
    target: Doubles
    center: Doubles
    scale: Doubles


def ett_borders(frequency: str) -> tuple[int, int, int]:
    """Return the rows where training, validation and test end: 8640, 11520 and 14400 of hours.

    Raises:
        ConfigError: A month does not have a whole number of such steps.
    """
    seconds = parse_frequency(frequency).seconds
    if seconds is None or _MONTH % seconds:
        raise ConfigError(
            f"ETT protocol: frequency must divide a month of 30 days, as h and 15min do, got {frequency!r}."
        )
    month = int(_MONTH // seconds)
    train, val, test = (count * month for count in _MONTHS)
    return train, val, test


def ett_windows(
    values: Doubles, split: Literal["train", "val", "test"], context: int, horizon: int, frequency: str = "h"
) -> Windows:
    """Make the windows of one part.

    Args:
        values: All rows (T, V), unscaled; those behind the test part are not used.
        split: The part.
        context: Steps L.
        horizon: Steps H.
        frequency: Step between two rows.

    Raises:
        UnknownNameError: There is no such split.
        ConfigError: Context and horizon do not fit into the part.
        DataError: There are fewer rows than the protocol needs.
    """
    if split not in _SPLITS:
        raise UnknownNameError("split", split, _SPLITS)
    borders = (0, *ett_borders(frequency))
    if len(values) < borders[-1]:
        raise DataError(
            f"ETT protocol: 20 months of {frequency} are {borders[-1]} rows, got {len(values)}; is this the frequency?"
        )
    part = _SPLITS.index(split)
    begin, end = max(0, borders[part] - (context if part else 0)), borders[part + 1]
    if min(context, horizon) < 1 or context > borders[1] or end - begin < context + horizon:
        raise ConfigError(
            f"ETT protocol: context and horizon must be at least 1 and fit into the part {split}, got {context} and "
            f"{horizon}."
        )
    train = values[: borders[1]]
    center, scale = train.mean(0), train.std(0)
    scale = np.where(scale == 0, 1, scale)
    windows = sliding_window_view((values[begin:end] - center) / scale, context + horizon, axis=0)  # (N, V, L + H)
    return Windows(context=windows[..., :context], target=windows[..., context:], center=center, scale=scale)
