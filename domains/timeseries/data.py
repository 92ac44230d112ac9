"""The data module of time series: users' files to windows, split by time."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from vertebra.domains.base import BaseData, Items, Split
from vertebra.domains.spec import DataSpec
from vertebra.domains.timeseries.frequency import parse_frequency
from vertebra.domains.timeseries.series import Doubles, Series
from vertebra.domains.timeseries.sources import LeftOut, SourceOptions, describe, read_series
from vertebra.domains.timeseries.spec import QUANTILES, SeriesSpec
from vertebra.domains.timeseries.windows import Form, PackedItems, SeriesAugment, WindowItems, check_form, window_places
from vertebra.errors import ConfigError, DataError

log = logging.getLogger("vertebra")

Names = list[str] | tuple[str, ...]

_STILL = 1e-8  # standard deviation below which a variate does not move


class SeriesData(BaseData):
    """Series from files.

    Each series is split by time: the first steps train, later ones validate, the last ones test. Windows of validation
    and test may look back into the part before, as benchmarks do.

    Args:
        path: Files: CSV (wide or long), GluonTS JSON lines or folders of them, .tsf, .npz, .parquet, also as .gz.
        val: Other series for validation.
        test: Other series for testing.
        predict: Series to forecast the continuation of.
        context: Steps a forecast is made from, at most.
        horizon: Steps that are forecast.
        borders: Rows where training, validation and test end; None for shares. Rows behind the last one are not used.
        val_fraction: Share of each series for validation, where neither files nor borders tell.
        test_fraction: Share for testing, likewise.
        every: Steps between two training windows.
        test_every: Steps between two windows of validation and test; 1 drops none.
        standardise: Scale each variate and covariate by mean and standard deviation of its training rows; errors are
            then in these units, as in the long-horizon benchmarks. Several columns need ``multivariate`` for it.
            Covariates are scaled in any case.
        multivariate: Read a wide file as one series of several variates, not as one series a column.
        frequency: Step between two values; None to find it.
        season: Steps of a season; 0 for the usual one of the frequency.
        layout: ``wide``, ``long`` or ``auto``.
        time: Column of the stamps; None to find it.
        item: Column of the series' names, in long files; None to find it.
        target: Columns to forecast; None for all that are numbers.
        past: Columns of covariates known up to the end.
        known: Columns of covariates known beyond it.
        delimiter: Between columns; None to find it.
        decimal: ``.``, ``,`` or ``auto``.
        date_format: Format of the stamps, as ``strptime`` has it; None to find it.
        quantiles: Levels that forecasts tell.
        form: ``windows``, or ``packed`` rows of crops, for models that train on them.
        patch: Steps of a patch of packed rows, as the model has them.
        augment: What training does to windows at random.
        batch_size: Windows in a batch.
        num_workers: Worker processes; windows are cheap and 0 is fastest.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of order and augmentation.
    """

    def __init__(
        self,
        *,
        path: str | list[str],
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        context: int = 512,
        horizon: int = 96,
        borders: tuple[int, int, int] | list[int] | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        every: int = 1,
        test_every: int = 1,
        standardise: bool = False,
        multivariate: bool = False,
        frequency: str | None = None,
        season: int = 0,
        layout: Literal["auto", "wide", "long"] = "auto",
        time: str | None = None,
        item: str | None = None,
        target: Names | None = None,
        past: Names = (),
        known: Names = (),
        delimiter: str | None = None,
        decimal: Literal["auto", ".", ","] = "auto",
        date_format: str | None = None,
        quantiles: Sequence[float] = QUANTILES,
        form: Form = "windows",
        patch: int = 32,
        augment: SeriesAugment | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size=batch_size, num_workers=num_workers, pin_memory=pin_memory, seed=seed)
        counts = {"context": context, "horizon": horizon, "every": every, "test_every": test_every, "patch": patch}
        for name, value in counts.items():
            if value < 1:
                raise ConfigError(f"SeriesData: {name} must be at least 1, got {value}.")
        if min(val_fraction, test_fraction) < 0 or val_fraction + test_fraction >= 1:
            raise ConfigError(
                "SeriesData: val_fraction and test_fraction must be from 0 and below 1 together, got "
                f"{val_fraction} and {test_fraction}."
            )
        if borders is not None and (len(borders) != 3 or not 0 < borders[0] <= borders[1] <= borders[2]):
            raise ConfigError(
                f"SeriesData: borders must be three rising rows, where the three parts end, got {borders}."
            )
        check_form(form)
        if form == "packed" and (standardise or multivariate or past or known):
            raise ConfigError(
                "SeriesData: packed rows hold single variates as they are; leave out standardise, multivariate, past "
                "and known, or use form=windows."
            )
        self.sources = {"train": _paths(path), "val": _paths(val), "test": _paths(test), "predict": _paths(predict)}
        self.options = SourceOptions(
            frequency=frequency,
            layout=layout,
            time=time,
            item=item,
            target=None if target is None else tuple(target),
            past=tuple(past),
            known=tuple(known),
            delimiter=delimiter,
            decimal=decimal,
            date_format=date_format,
            multivariate=multivariate,
        )
        self.context, self.horizon, self.quantiles = context, horizon, tuple(quantiles)
        self.borders = None if borders is None else tuple(borders)
        self.fractions = (val_fraction, test_fraction)
        self.every, self.test_every, self.season = every, test_every, season
        self.standardise, self.form, self.patch = standardise, form, patch
        self.augment = augment or SeriesAugment()
        self.left_out: tuple[LeftOut, ...] = ()

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """As in ``BaseData``."""
        if spec is not None and not isinstance(spec, SeriesSpec):
            raise ConfigError(f"SeriesData: the model is for {spec.domain}, not for time series.")
        fits = spec is None or bool(splits - {"predict"})
        wanted = (*(("val", "test") if fits else ()), *(("predict",) if "predict" in splits else ()))
        own = {split: self._series(split, spec) for split in wanted if self.sources[split]}
        parts: dict[str, Items] = {}
        if spec is None or fits:
            series = self._series("train", spec)
            ends = [self._borders(len(s), own) for s in series]
            spec = spec or self._spec_of(series, [train for train, _, _ in ends])
            parts |= self._parts(series, ends, spec, own)
        for split, found in own.items():
            check_series(spec, found)
            parts[split] = self._whole(split, found, spec)
        return spec, parts

    def hint(self, split: Split) -> str:
        """What to do when a split is missing."""
        if split == "predict":
            return "give data.predict, files to forecast the continuation of."
        return f"give data.{split}, or longer series: each part must hold data.horizon={self.horizon} steps."

    # ---------------------------------------------------------------- parts

    def _series(self, split: str, spec: SeriesSpec | None) -> list[Series]:
        options = self.options
        if spec is not None:
            together = bool(spec.variates) or options.multivariate
            options = dataclasses.replace(options, past=spec.past, known=spec.known, multivariate=together)
        series, left = read_series(self.sources[split], options)
        for one in left:
            log.warning("%s", one)
        self.left_out += tuple(left)
        log.info("%s", describe(series))
        return series

    def _borders(self, length: int, own: Mapping[str, object]) -> tuple[int, int, int]:
        """Rows where training, validation and test of a series end."""
        if self.borders is not None:
            train, val, test = self.borders
            if train >= length:
                raise ConfigError(f"SeriesData: data.borders end training at row {train}, a series has {length} rows.")
            return train, min(val, length), min(test, length)
        val_share, test_share = (0.0 if s in own else f for s, f in zip(("val", "test"), self.fractions, strict=True))
        test = round(length * test_share)
        val = round(length * val_share)
        return length - test - val, length - test, length

    def _parts(
        self,
        series: list[Series],
        ends: Sequence[tuple[int, int, int]],
        spec: SeriesSpec,
        own: Mapping[str, object],
    ) -> dict[str, Items]:
        train, val, test = (list(part) for part in zip(*ends, strict=True))
        parts: dict[str, Items] = {}
        for split, begins, stops in (("train", [0] * len(series), train), ("val", train, val), ("test", val, test)):
            if split in own:
                continue
            if self.form == "packed":
                rows = [
                    s.values[b:e, v]
                    for s, b, e in zip(series, begins, stops, strict=True)
                    for v in range(s.values.shape[1])
                ]
                if split == "train" or any(len(row) >= 2 * self.patch for row in rows):
                    parts[split] = self._packed(rows, spec, varied=split == "train")
                continue
            places = window_places(
                series,
                spec,
                begins,
                stops,
                self.every if split == "train" else self.test_every,
                full=split == "train",
            )
            if len(places):
                augment = self.augment if split == "train" else None
                parts[split] = WindowItems(series, spec, places, self.seed, augment)
        if "train" not in parts:
            longest = max(map(len, series))
            raise DataError(
                f"SeriesData: no series has a step of context and data.horizon={spec.horizon} steps in its training "
                f"part; the longest has {longest} rows. Lower data.horizon, or give longer series."
            )
        return parts

    def _packed(self, rows: Sequence[Doubles], spec: SeriesSpec, *, varied: bool) -> PackedItems:
        kept = [row.astype(np.float32) for row in rows]
        return PackedItems(kept, self.patch, max(spec.context // self.patch, 2), self.seed, varied=varied)

    def _whole(self, split: str, series: list[Series], spec: SeriesSpec) -> Items:
        """Items of series that a split has for itself."""
        if split == "predict":
            check_known(spec, series, spec.horizon)
            places = np.array([[i, len(s)] for i, s in enumerate(series)])
            return WindowItems(series, spec, places, self.seed)
        if self.form == "packed":
            return self._packed([v for s in series for v in s.values.T], spec, varied=False)
        begins = [min(spec.context, max(1, len(s) - spec.horizon)) for s in series]
        places = window_places(series, spec, begins, [len(s) for s in series], self.test_every)
        if not len(places):
            raise DataError(f"SeriesData: no series of data.{split} has more than data.horizon={spec.horizon} steps.")
        return WindowItems(series, spec, places, self.seed)

    def _spec_of(self, series: list[Series], ends: Sequence[int]) -> SeriesSpec:
        first = series[0]
        variates = first.variates if self.options.multivariate else ()
        check_series(SeriesSpec(context=self.context, horizon=self.horizon, variates=variates), series)
        if self.standardise and not variates and len(series) > 1:  # one scale for all would weigh them by their units
            raise ConfigError(
                f"SeriesData: data.standardise scales variates, and these {len(series)} series have no variates in "
                "common; set data.multivariate=true (with model.mode=independent each is still forecast by itself), or "
                "leave data.standardise out."
            )
        known = [s.known[:end] for s, end in zip(series, ends, strict=True)]
        past = [s.past[:end] for s, end in zip(series, ends, strict=True)]
        values = [s.values[:end] for s, end in zip(series, ends, strict=True)]
        frequencies = {str(s.frequency) for s in series}
        return SeriesSpec(
            context=self.context,
            horizon=self.horizon,
            frequency=frequencies.pop() if len(frequencies) == 1 else "",
            season=self.season,
            variates=variates,
            past=first.past_names,
            known=first.known_names,
            quantiles=self.quantiles,
            **_scales("", values if self.standardise else [], True),
            **_scales("past_", past, bool(first.past_names)),
            **_scales("known_", known, bool(first.known_names)),
        )


def check_series(spec: SeriesSpec, series: Sequence[Series]) -> None:
    """Refuse series that a model of this spec does not read.

    Raises:
        DataError: Variates, covariates or the frequency differ.
    """
    for one in series:
        columns = (*one.variates, *one.past_names, *one.known_names)
        for kind, needed, given in (("past", spec.past, one.past_names), ("known", spec.known, one.known_names)):
            if missing := [name for name in needed if name not in given]:
                raise DataError(
                    f"{one.where}: the model needs the {kind} covariate {missing[0]}; the series has "
                    f"{', '.join(columns)}. Add the column, and name it with {kind}=[{', '.join(needed)}]."
                )
        if spec.variates and one.variates != spec.variates:
            raise DataError(
                f"{one.where}: the model reads the variates {', '.join(spec.variates)} together, the series has "
                f"{', '.join(one.variates)}."
            )
        if spec.center and one.values.shape[1] != len(spec.center):
            raise DataError(
                f"{one.where}: the model scales {len(spec.center)} variates, the series has {one.values.shape[1]}; "
                "fit with data.standardise=false for series of any kind."
            )
        unlike = spec.frequency not in ("", "step") and parse_frequency(spec.frequency) != one.frequency
        if unlike and one.frequency.unit != "step":
            log.warning("%s: the model has learnt steps of %s, these are %s.", one.where, spec.frequency, one.frequency)


def check_known(spec: SeriesSpec, series: Sequence[Series], horizon: int) -> None:
    """Refuse series whose known covariates do not reach to the end of a forecast.

    Raises:
        DataError: They end too early.
    """
    for one in series:
        if spec.known and (there := len(one.known) - len(one)) < horizon:
            raise DataError(
                f"{one.where}: the covariate {spec.known[0]} must be known {horizon} steps beyond the end, and is "
                f"for {there}; add rows without a target, or lower the horizon."
            )


def _scales(prefix: str, parts: Sequence[Doubles], there: bool) -> dict[str, tuple[float, ...]]:
    """Mean and standard deviation of columns over all rows, as fields of the spec; 0 and 1 where none is known."""
    if not there or not parts:
        return {}
    rows = np.concatenate(parts)
    rows[:, np.isnan(rows).all(0)] = 0
    center, scale = np.nanmean(rows, 0), np.nanstd(rows, 0)
    scale = np.where(scale < _STILL, 1.0, scale)
    return {f"{prefix}center": tuple(center.tolist()), f"{prefix}scale": tuple(scale.tolist())}


def _paths(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
