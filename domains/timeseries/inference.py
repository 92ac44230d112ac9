"""Forecasts of series of any length, by any model.

Shapes: H steps, V variates, Q levels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from vertebra.domains.timeseries.data import check_known, check_series
from vertebra.domains.timeseries.forecast import SeriesForecast
from vertebra.domains.timeseries.model import PatchForecaster
from vertebra.domains.timeseries.series import Series
from vertebra.domains.timeseries.windows import WindowItems
from vertebra.errors import ConfigError


class SeriesForecaster:
    """A model that forecasts what comes behind series.

    Args:
        model: The forecaster.
        device: Where it runs; None for where it is.
    """

    def __init__(self, model: PatchForecaster, device: torch.device | str | None = None) -> None:
        self.model = model if device is None else model.to(device)
        self.model.eval()

    def forecast(
        self,
        series: Sequence[Series],
        horizon: int | None = None,
        quantiles: Sequence[float] | None = None,
        *,
        season: int = 0,
        batch_size: int = 256,
    ) -> list[SeriesForecast]:
        """Forecast the continuation of every series; the same numbers whatever other series there are.

        Args:
            series: Histories; what they know of covariates must reach ``horizon`` steps beyond their end.
            horizon: Steps H; None for those of the model.
            quantiles: Levels Q; None for those of the model. A model of means tells none of them.
            season: Steps of a season; 0 for what the model or the series' frequency says.
            batch_size: Single variates in a batch.

        Raises:
            ConfigError: The horizon is below 1, the season negative, or levels do not rise or are not told by this
                model.
            DataError: A series lacks what the model reads, or covariates end too early.
        """
        spec = self.model.spec
        horizon = spec.horizon if horizon is None else horizon
        levels = tuple(quantiles or spec.quantiles)
        if horizon < 1 or season < 0:
            raise ConfigError(
                f"forecast: horizon must be at least 1 and season at least 0, got {horizon} and {season}."
            )
        if list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
            raise ConfigError(f"forecast: quantiles must rise, between 0 and 1, got {list(levels)}.")
        check_series(spec, series)
        check_known(spec, series, horizon)
        found: list[SeriesForecast] = []
        widths = [s.values.shape[1] for s in series]
        begin = 0
        while begin < len(series):  # series of equally many variates, a batch at a time
            most = max(1, batch_size // widths[begin])
            end = begin + 1
            while end < len(series) and end - begin < most and widths[end] == widths[begin]:
                end += 1
            found += self._batch(series[begin:end], horizon, levels, season)
            begin = end
        return found

    def _batch(
        self, series: Sequence[Series], horizon: int, levels: tuple[float, ...], season: int
    ) -> list[SeriesForecast]:
        spec = self.model.spec
        tails = [_tail(s, spec.context) for s in series]
        places = np.array([[i, len(s)] for i, s in enumerate(tails)])
        items = WindowItems(tails, spec, places, ahead=horizon)
        batch = items.fetch(np.arange(len(tails)), 0)
        if season:
            batch["season"] = torch.full_like(batch["season"], season)
        device = next(self.model.parameters()).device
        moved: dict[str, Any] = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        made = self.model.forecast(moved, horizon, levels)
        mean = made.mean.double().cpu().numpy()  # (B, V, H)
        count = mean.shape[1]
        told = (
            np.zeros((len(mean), count, 0, horizon))
            if made.quantiles is None
            else made.quantiles.double().cpu().numpy()
        )
        if spec.center:
            center, scale = np.array(spec.center), np.array(spec.scale)
            mean = mean * scale[:, None] + center[:, None]
            told = told * scale[:, None, None] + center[:, None, None]
        seasons = batch["season"].tolist()
        return [
            SeriesForecast(
                series=one,
                mean=own.T,
                quantiles=quantiles.transpose(1, 2, 0),
                levels=levels if made.quantiles is not None else (),
                season=steps,
            )
            for one, own, quantiles, steps in zip(series, mean, told, seasons, strict=True)
        ]


def _tail(series: Series, context: int) -> Series:
    """Return the last steps of a series, all that a model reads."""
    begin = max(0, len(series) - context)
    return dataclasses.replace(series.cut(begin, len(series)), start=None) if begin else series
