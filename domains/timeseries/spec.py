"""What the data knows about time series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError

QUANTILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(frozen=True, kw_only=True)
class SeriesSpec(DataSpec):
    """Facts about series.

    Args:
        context: Steps T a forecast is made from, at most.
        horizon: Steps H that are forecast in one pass; longer forecasts are made of several.
        frequency: Step between two values, as ``Frequency`` writes it; empty for any.
        season: Steps of a season; 0 for what each series' frequency says.
        variates: Names of the variates that a model reads together; empty for any number, each by itself.
        past: Names of the covariates known up to the end of a series.
        known: Names of the covariates known beyond it.
        center: What is subtracted from each variate, from the training steps; empty for nothing.
        scale: What it is then divided by.
        past_center: Likewise for ``past``.
        past_scale: Likewise.
        known_center: Likewise for ``known``.
        known_scale: Likewise.
        quantiles: Levels of the quantiles that are told.
    """

    domain: ClassVar[str] = "timeseries"

    context: int
    horizon: int
    frequency: str = ""
    season: int = 0
    variates: tuple[str, ...] = ()
    past: tuple[str, ...] = ()
    known: tuple[str, ...] = ()
    center: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    past_center: tuple[float, ...] = ()
    past_scale: tuple[float, ...] = ()
    known_center: tuple[float, ...] = ()
    known_scale: tuple[float, ...] = ()
    quantiles: tuple[float, ...] = QUANTILES

    def __post_init__(self) -> None:
        if self.context < 1 or self.horizon < 1 or self.season < 0:
            raise ConfigError(
                "SeriesSpec: context and horizon must be at least 1 and season at least 0, got "
                f"{self.context}, {self.horizon}, {self.season}."
            )
        for name in ("past", "known"):
            for part in ("center", "scale"):
                if len(getattr(self, f"{name}_{part}")) != len(getattr(self, name)):
                    raise ConfigError(f"SeriesSpec: {name}_{part} must have one number for each of {name}.")
        if len(self.center) != len(self.scale):
            raise ConfigError("SeriesSpec: center and scale must be equally long.")
        levels = self.quantiles
        if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
            raise ConfigError(f"SeriesSpec: quantiles must rise, between 0 and 1, got {levels}.")
