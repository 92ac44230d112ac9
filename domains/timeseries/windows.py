"""Windows of series, and packed rows of crops, as batches.

Shapes: B windows, V variates, T context steps, H steps to forecast, R packed rows, S patches of a row, P steps of a
patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.backbones.random import draw_uniform, item_uniform
from vertebra.domains.batching import Batch, plan_packing
from vertebra.domains.timeseries.series import Doubles, Series
from vertebra.domains.timeseries.spec import SeriesSpec
from vertebra.errors import ConfigError, DataError

Form = Literal["windows", "packed"]
"""Of batches."""

_CROP, _CROPPED, _MISSING, _OFFSET, _LENGTH, _SHARE = range(801, 807)  # salts of the draws
_LEAST = 2  # values of a variate that augmentation leaves
_SHORTEST, _LONGEST = 0.15, 0.5  # share of a crop's patches that is predicted (scaling-law paper's code)


@dataclass(frozen=True, kw_only=True)
class SeriesAugment:
    """What training does to windows at random.

    Args:
        crop: Share of the windows whose context is cut to a random length.
        missing: Share of the windows in which values are hidden, up to half of them.
    """

    crop: float = 0.0
    missing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop", "missing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augment: {name} must be from 0 to 1, got {getattr(self, name)}.")

    def hide(self, observed: NDArray[np.bool_], indices: NDArray[np.int64], seed: int, epoch: int) -> None:
        """Hide context values, ``observed`` (B, V, T), in place; what is hidden depends on the items alone.

        A variate keeps two values at least, its last ones, as a window without any has no scale.
        """
        length = observed.shape[-1]
        kept = observed
        if self.crop:
            chosen = item_uniform(seed, epoch, indices, salt=_CROP) < self.crop
            steps = np.exp(item_uniform(seed, epoch, indices, salt=_CROPPED) * np.log(length))  # log-uniform
            first = np.where(chosen, length - np.ceil(steps), 0)
            kept = kept & (np.arange(length) >= first[:, None])[:, None]
        if self.missing:
            share = item_uniform(seed, epoch, indices, salt=_MISSING)
            share = np.where(share < self.missing, share / self.missing / 2, 0)  # (B,)
            places = indices[:, None] * length + np.arange(length)
            draws: NDArray[np.float64] = item_uniform(seed, epoch, places, salt=_MISSING + 100)
            kept = kept & (draws >= share[:, None])[:, None]
        last = observed & (observed[..., ::-1].cumsum(-1)[..., ::-1] <= _LEAST)
        observed[:] = np.where(kept.sum(-1, keepdims=True) < _LEAST, last, kept)


@dataclass(frozen=True)
class Scale:
    """What values and covariates are scaled by, (count, 1) each; None for nothing."""

    center: Doubles
    scale: Doubles

    @classmethod
    def of(cls, center: Sequence[float], scale: Sequence[float]) -> Scale | None:
        """Make the scale from a spec's numbers; None where there are none."""
        return cls(np.array(center)[:, None], np.array(scale)[:, None]) if center else None


class WindowItems:
    """Windows of series.

    Args:
        series: Equally many variates each.
        spec: Facts about the data.
        places: For each window the series, and the row where its forecast begins, int (N, 2).
        seed: Of the draws.
        augment: What to do to windows; None for evaluation.
        ahead: Steps H behind the context; None for the spec's horizon.
    """

    def __init__(
        self,
        series: Sequence[Series],
        spec: SeriesSpec,
        places: NDArray[np.int64],
        seed: int = 0,
        augment: SeriesAugment | None = None,
        ahead: int | None = None,
    ) -> None:
        self.series, self.spec, self.places = tuple(series), spec, places
        self.seed, self.augment, self.ahead = seed, augment, spec.horizon if ahead is None else ahead
        self.seasons = np.array([spec.season or s.frequency.season for s in series])
        room = max(spec.context, self.ahead)  # between two series, so that no window reads a neighbour
        self.offsets = np.cumsum([room] + [len(s) + self.ahead + room for s in series])[:-1]
        total = int(self.offsets[-1]) + len(series[-1]) + self.ahead + room
        past = [_columns(s.past, s.past_names, spec.past)[: len(s)] for s in series]
        known = [_columns(s.known, s.known_names, spec.known)[: len(s) + self.ahead] for s in series]
        self.values = self._join([s.values for s in series], total, Scale.of(spec.center, spec.scale))
        self.past = self._join(past, total, Scale.of(spec.past_center, spec.past_scale))
        self.known = self._join(known, total, Scale.of(spec.known_center, spec.known_scale))

    def _join(self, parts: Sequence[Doubles], total: int, scale: Scale | None) -> NDArray[np.float32]:
        """Lay series out one behind the other, (C, total), NaN between them."""
        out = np.full((parts[0].shape[1], total), np.nan, np.float32)
        for offset, part in zip(self.offsets, parts, strict=True):
            rows = part.T if scale is None else (part.T - scale.center) / scale.scale
            out[:, offset : offset + len(part)] = rows
        return out

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Steps of every window, (N,); all the same."""
        return np.full(len(self.places), self.spec.context)

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Make a batch.

        Returns:
            values and observed (B, V, T), target and target_observed (B, V, H), season (B,), index (B,), names, places;
            past (B, Cp, T) and known (B, Ck, T + H) where the spec has them.
        """
        number, origin = self.places[indices].T
        length = self.spec.context
        steps = (self.offsets[number] + origin)[:, None] + np.arange(-length, self.ahead)  # (B, T + H)
        window = self.values[:, steps].swapaxes(0, 1)  # (B, V, T + H)
        context, target = window[..., :length], window[..., length:]
        observed, ahead = np.isfinite(context), np.isfinite(target)
        if self.augment is not None:
            self.augment.hide(observed, np.asarray(indices), self.seed, epoch)
        batch: Batch = {
            "values": torch.from_numpy(np.where(observed, context, 0)),
            "observed": torch.from_numpy(observed),
            "target": torch.from_numpy(np.where(ahead, target, 0)),
            "target_observed": torch.from_numpy(ahead),
            "season": torch.from_numpy(self.seasons[number]),
            "index": torch.from_numpy(np.asarray(indices)),
            "names": [self.series[i].name for i in number],
            "places": origin.tolist(),
        }
        if self.spec.past:
            batch["past"] = torch.from_numpy(np.nan_to_num(self.past[:, steps[:, :length]].swapaxes(0, 1)))
        if self.spec.known:
            batch["known"] = torch.from_numpy(np.nan_to_num(self.known[:, steps].swapaxes(0, 1)))
        return batch


def _columns(values: Doubles, names: Sequence[str], wanted: Sequence[str]) -> Doubles:
    """Return the columns of these names, in their order."""
    return values[:, [names.index(name) for name in wanted]] if wanted else values[:, :0]


def window_places(
    series: Sequence[Series],
    spec: SeriesSpec,
    begins: Sequence[int],
    ends: Sequence[int],
    every: int = 1,
    *,
    full: bool = False,
) -> NDArray[np.int64]:
    """Return where forecasts begin, int (N, 2): number of the series and row.

    Windows without any known value in their context, or in what follows, are left out.

    Args:
        series: The series.
        spec: Its context and horizon.
        begins: First row of each series that is forecast.
        ends: Row behind the last one.
        every: Rows between two windows.
        full: Only windows whose context is whole, where a series has one; for training.
    """
    found = []
    for number, (one, begin, end) in enumerate(zip(series, begins, ends, strict=True)):
        last = end - spec.horizon
        first = max(begin, 1)
        if full:
            first = max(first, min(spec.context, last))
        rows = np.arange(first, last + 1, every)
        known: NDArray[np.bool_] = np.isfinite(one.values)
        seen = np.append(0, known.any(1).cumsum())  # rows with a value before each row
        before, after = np.maximum(rows - spec.context, 0), np.minimum(rows + spec.horizon, len(one))
        rows = rows[(seen[rows] > seen[before]) & (seen[after] > seen[rows])]
        found.append(np.stack([np.full(len(rows), number), rows], axis=1))
    return np.concatenate(found) if found else np.zeros((0, 2), np.int64)


class PackedItems:
    """Crops of single variates, packed into rows of patches as the scaling-law models are trained.

    A series is cut into pieces of up to ``patches`` patches, which are the items. A crop of a piece begins at a random
    step and has from half of its patches up to all; the last 15 to 50 % of them are to be predicted. A batch of B crops
    is packed into as few rows as hold them, first fit decreasing.

    Args:
        rows: Values of series of any length, NaN where unknown.
        patch: Steps of a patch.
        patches: Most patches of a crop, and patches of a row.
        seed: Of the draws.
        varied: Whether crops change from epoch to epoch.

    Raises:
        DataError: No series has two patches.
    """

    def __init__(
        self, rows: Sequence[NDArray[np.float32]], patch: int, patches: int, seed: int = 0, *, varied: bool = True
    ) -> None:
        size = patch * patches
        pieces = [row[begin : begin + size] for row in rows for begin in range(0, len(row), size)]
        self.pieces = [piece for piece in pieces if len(piece) >= 2 * patch and np.isfinite(piece).any()]
        if not self.pieces:
            raise DataError(f"packed rows: no series has two patches of {patch} steps; lower data.patch.")
        self.patch, self.patches, self.seed, self.varied = patch, patches, seed, varied

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Most patches of every crop, (N,)."""
        return np.array([len(piece) // self.patch for piece in self.pieces])

    def fetch(self, indices: NDArray[np.int64], epoch: int) -> Batch:
        """Make a batch: see ``pack_crops``; and index (B,)."""
        turn = epoch if self.varied else 0
        crops = [crop(self.pieces[i], self.patch, self.seed, turn, int(i)) for i in indices]
        return {**pack_crops(crops, self.patch, self.patches), "index": torch.from_numpy(np.asarray(indices))}


def crop(row: NDArray[np.float32], patch: int, seed: int, epoch: int, index: int) -> tuple[NDArray[np.float32], int]:
    """Return a random crop (n P,) of a series, and how many of its patches are to be predicted."""
    offset, length, place, share = (
        draw_uniform(seed, epoch, index, salt=salt) for salt in (_OFFSET, _LENGTH, _CROP, _SHARE)
    )
    total = len(row) // patch
    shift = int(offset * (len(row) - total * patch + 1))
    least = max(2, round(0.5 * total))
    count = least + int(length * (total - least + 1))
    begin = shift + int(place * (total - count + 1)) * patch
    ahead = max(1, round(count * (_SHORTEST + share * (_LONGEST - _SHORTEST))))
    return row[begin : begin + count * patch], min(ahead, count - 1)


def pack_crops(crops: Sequence[tuple[NDArray[np.float32], int]], patch: int, patches: int) -> Batch:
    """Pack crops, each with how many of its last patches are predicted, into rows of up to ``patches`` patches.

    Returns:
        values and observed (R, S, P), segments (R, S), -1 at padding, and predicted (R, S).
    """
    plan = plan_packing([len(values) // patch for values, _ in crops], patches)
    values = np.full((len(plan), patches * patch), np.nan, np.float32)
    segments = np.full((len(plan), patches), -1, np.int64)
    predicted = np.zeros((len(plan), patches), bool)
    for row, items in enumerate(plan):
        at = 0
        for number, item in enumerate(items):
            own, ahead = crops[item]
            end = at + len(own) // patch
            values[row, at * patch : end * patch] = own
            segments[row, at:end] = number
            predicted[row, end - ahead : end] = True
            at = end
    cut = values.reshape(len(plan), patches, patch)
    used = int((segments >= 0).any(0).sum())  # no patch is padding in every row
    observed = np.isfinite(cut)
    return {
        "values": torch.from_numpy(np.where(observed, cut, 0)[:, :used].copy()),
        "observed": torch.from_numpy(observed[:, :used].copy()),
        "segments": torch.from_numpy(segments[:, :used].copy()),
        "predicted": torch.from_numpy(predicted[:, :used].copy()),
    }


def check_form(form: str) -> None:
    """Refuse a form of batches that does not exist."""
    if form not in ("windows", "packed"):
        raise ConfigError(f"form must be windows or packed, got {form!r}.")
