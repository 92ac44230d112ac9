"""The data module of fabricated series: as many as training asks for, made when they are fetched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.domains.base import BaseData, Items, Split
from vertebra.domains.batching import Batch
from vertebra.domains.spec import DataSpec
from vertebra.domains.timeseries.spec import QUANTILES, SeriesSpec
from vertebra.domains.timeseries.synthetic import TRAINING, draw_batch
from vertebra.domains.timeseries.synthetic import families as known_families
from vertebra.domains.timeseries.windows import Form, SeriesAugment, check_form, crop, pack_crops
from vertebra.errors import ConfigError, UnknownNameError

_KEPT = 1 << 26  # values of series that come again, which are kept: 256 MiB
_SPLITS = {"train": 0, "val": 1, "test": 2}


class GeneratedItems:
    """Fabricated series as windows or packed rows.

    Args:
        count: Items N an epoch.
        spec: Context and horizon.
        seed: Of the series, and of the draws.
        families: Kinds of series.
        form: ``windows`` or ``packed``.
        patch: Steps of a patch of packed rows.
        fresh: Whether each epoch has other series.
        varied: Whether crops for packed rows change from epoch to epoch.
        augment: What to do to windows; None for evaluation.
    """

    def __init__(
        self,
        count: int,
        spec: SeriesSpec,
        seed: int,
        families: tuple[str, ...],
        form: Form,
        patch: int,
        *,
        fresh: bool,
        varied: bool,
        augment: SeriesAugment | None,
    ) -> None:
        self.count, self.spec, self.seed, self.families = count, spec, seed, families
        self.form, self.patch, self.fresh, self.varied, self.augment = form, patch, fresh, varied, augment
        self._steps = spec.context if form == "packed" else spec.context + spec.horizon
        self._kept: dict[int, tuple[NDArray[np.float32], np.int64]] = {}

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of every series, (N,); all the same."""
        return np.full(self.count, self.spec.context)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Make a batch, as ``WindowItems`` or ``PackedItems`` do."""
        spec, numbers = self.spec, np.asarray(indices)
        values, season = self._series(numbers, epoch)
        index = torch.from_numpy(numbers)
        if self.form == "packed":
            patches = spec.context // self.patch
            turn = epoch if self.varied else 0
            crops = [crop(row, self.patch, self.seed, turn, int(i)) for row, i in zip(values, numbers, strict=True)]
            return {**pack_crops(crops, self.patch, patches), "index": index}
        context, target = values[:, None, : spec.context], values[:, None, spec.context :]
        observed = np.ones(context.shape, bool)
        if self.augment is not None:
            self.augment.hide(observed, numbers, self.seed, epoch)
        return {
            "values": torch.from_numpy(np.where(observed, context, 0)),
            "observed": torch.from_numpy(observed),
            "target": torch.from_numpy(target.copy()),
            "target_observed": torch.ones(target.shape, dtype=torch.bool),
            "season": torch.from_numpy(season),
            "index": index,
            "names": [f"series {i}" for i in numbers],
            "places": [spec.context] * len(numbers),
        }

    def _series(self, numbers: NDArray[np.int64], epoch: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return values (B, L) and seasons (B,); what comes again is kept, as far as memory is for it."""
        if self.fresh:
            return draw_batch(numbers + epoch * self.count, self._steps, self.seed, self.families)
        if self.count * self._steps > _KEPT:
            return draw_batch(numbers, self._steps, self.seed, self.families)
        if len(missing := np.array([i for i in numbers.tolist() if i not in self._kept], np.int64)):
            made = zip(*draw_batch(missing, self._steps, self.seed, self.families), strict=True)
            self._kept |= dict(zip(missing.tolist(), made, strict=True))
        rows = [self._kept[i] for i in numbers.tolist()]
        return np.stack([values for values, _ in rows]), np.array([season for _, season in rows])


class GeneratedData(BaseData):
    """Fabricated series.

    Args:
        count: Series an epoch.
        val_count: Series for validation, of other seeds.
        test_count: Series for testing, likewise.
        families: Kinds of series; None for all that are for training.
        test_families: Kinds for testing; None for those of training.
        fresh: Whether each epoch has other series; else there are ``count`` of them, which packed rows and ``augment``
            still crop anew in each epoch.
        context: Steps a forecast is made from.
        horizon: Steps that are forecast.
        quantiles: Levels that forecasts tell.
        form: ``windows``, or ``packed`` rows of crops of ``context`` steps at most.
        patch: Steps of a patch of packed rows, as the model has them.
        augment: What training does to windows at random.
        batch_size: Series in a batch.
        num_workers: Worker processes.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of everything.
    """

    def __init__(
        self,
        *,
        count: int = 16384,
        val_count: int = 512,
        test_count: int = 512,
        families: list[str] | tuple[str, ...] | None = None,
        test_families: list[str] | tuple[str, ...] | None = None,
        fresh: bool = True,
        context: int = 512,
        horizon: int = 96,
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
        check_form(form)
        for name, value in (
            ("count", count),
            ("val_count", val_count),
            ("test_count", test_count),
            ("patch", patch),
        ):
            if value < 1:
                raise ConfigError(f"GeneratedData: {name} must be at least 1, got {value}.")
        if form == "packed" and context < 2 * patch:
            raise ConfigError(f"GeneratedData: context must hold two patches of {patch} steps, got {context}.")
        self.counts = {"train": count, "val": val_count, "test": test_count}
        self.families = TRAINING if families is None else tuple(families)
        self.test_families = self.families if test_families is None else tuple(test_families)
        for name, chosen in (("families", self.families), ("test_families", self.test_families)):
            if not chosen:
                raise ConfigError(f"GeneratedData: {name} must not be empty; leave it out for the usual ones.")
        for family in (*self.families, *self.test_families):
            if family not in known_families():
                raise UnknownNameError("family of series", family, known_families())
        self.fresh, self.context, self.horizon, self.quantiles = fresh, context, horizon, tuple(quantiles)
        self.form, self.patch, self.augment = form, patch, augment or SeriesAugment()

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """As in ``BaseData``."""
        if spec is not None and not isinstance(spec, SeriesSpec):
            raise ConfigError(f"GeneratedData: the model is for {spec.domain}, not for time series.")
        spec = spec or SeriesSpec(context=self.context, horizon=self.horizon, quantiles=self.quantiles)
        return spec, {
            split: GeneratedItems(
                self.counts[split],
                spec,
                self.seed * len(_SPLITS) + number,
                self.test_families if split == "test" else self.families,
                self.form,
                self.patch,
                fresh=self.fresh and split == "train",
                varied=split == "train",
                augment=self.augment if split == "train" else None,
            )
            for split, number in _SPLITS.items()
        }

    def hint(self, split: Split) -> str:
        """What to do when a split is missing."""
        return "forecast files with data.class_path=vertebra.domains.timeseries.data.SeriesData instead."
