"""How weights of a like model become those of this one: rows by name, columns by name, resampled inputs.

Each function makes an adapter, as ``load_state`` takes it: a function of the key, the saved tensor and the model's own,
whose answer the load report tells.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from vertebra.backbones.loading.pretrained import Adapter, extend

__all__ = ["Adapter", "by_name", "extend", "fresh", "interpolated", "resample", "resampled"]


def by_name(saved: Sequence[str], own: Sequence[str], what: str, *, axis: int = 0, group: int = 1) -> Adapter:
    """Adapter of a table that has a row, or ``group`` rows, for each of some named things.

    Rows of names that both models know are copied; the others stay fresh. Where the other model knows none of the
    names, or the table differs in another axis too, all of it stays fresh.

    Args:
        saved: Names of the saved rows, in their order.
        own: Names of this model's.
        what: What is named, such as ``tokens``.
        axis: Axis of the rows.
        group: Rows a name.
    """
    places = {name: place for place, name in enumerate(saved)}
    pairs = [(row, places[name]) for row, name in enumerate(own) if name in places]

    def adapter(key: str, old: Tensor, new: Tensor) -> tuple[Tensor, str] | Tensor | None:
        if tuple(saved) == tuple(own) and old.shape == new.shape:
            return old
        others = [n for n in range(new.ndim) if n != axis]
        fits = old.ndim == new.ndim and all(old.shape[n] == new.shape[n] for n in others)
        if not (fits and pairs and old.shape[axis] == len(saved) * group and new.shape[axis] == len(own) * group):
            return None
        rows, sources = (torch.tensor(part) for part in zip(*pairs, strict=True))
        table = new.detach().clone().unflatten(axis, (-1, group))
        table.index_copy_(axis, rows, old.to(table).unflatten(axis, (-1, group)).index_select(axis, sources))
        fresh = len(own) - len(pairs)
        said = f"{len(pairs)} of {len(own)} {what} by name" + (f", {fresh} fresh" if fresh else "")
        return table.flatten(axis, axis + 1), said

    return adapter


def fresh(key: str, old: Tensor, new: Tensor) -> None:
    """Adapter of what means another thing in the other model, even where it has the same shape: it stays fresh."""


def resampled(what: str, *, parts: int = 1) -> Adapter:
    """Adapter of a projection (D, parts * N) whose inputs are ``parts`` rows of N samples, for another N.

    Args:
        what: What a sample is, such as ``steps of a patch``.
        parts: Rows that stand one behind the other.
    """

    def adapter(key: str, old: Tensor, new: Tensor) -> tuple[Tensor, str] | Tensor | None:
        if old.shape == new.shape:
            return old
        if old.ndim != 2 or len(old) != len(new) or old.shape[1] % parts or new.shape[1] % parts:
            return None
        size = new.shape[1] // parts
        return resample(old.unflatten(1, (parts, -1)), size).flatten(1), f"{what} resampled"

    return adapter


def resample(weight: Tensor, size: int) -> Tensor:
    """Resample weights (..., N) of N samples to those of ``size``; of a constant input they make the same."""
    flat = weight.float().flatten(0, -2)[:, None]  # (..., 1, N)
    changed = F.interpolate(flat, size=size, mode="linear", align_corners=False)[:, 0] * (flat.shape[-1] / size)
    changed = changed + (flat.sum(-1) - changed.sum(-1, keepdim=True)) / size  # edges lose or gain a little
    return changed.view(*weight.shape[:-1], size).to(weight.dtype)


def interpolated(what: str, *, axes: tuple[int, ...] = (0,)) -> Adapter:
    """Adapter of a table of learned places (..., D), for another number of places along one axis, or two.

    Args:
        what: What the places are of.
        axes: Their axes.
    """

    def adapter(key: str, old: Tensor, new: Tensor) -> tuple[Tensor, str] | Tensor | None:
        if old.shape == new.shape:
            return old
        if old.ndim != new.ndim or any(old.shape[n] != new.shape[n] for n in range(old.ndim) if n not in axes):
            return None
        size = [new.shape[n] for n in axes]
        table = old.float().flatten(0, axes[0] - 1) if axes[0] else old.float()[None]  # (1, *places, D)
        mode = "linear" if len(axes) == 1 else "bicubic"
        table = F.interpolate(table.movedim(-1, 1), size=size, mode=mode, align_corners=False).movedim(1, -1)
        return table.reshape(new.shape).to(old.dtype), f"{what} interpolated"

    return adapter
