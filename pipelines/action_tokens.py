"""Episodes of actions in tokens: decoding at any rate, how well they say what was demonstrated, token files.

Shapes: T steps of an episode, D action dimensions, C chunks of an episode, H steps of a chunk, L tokens of a chunk.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vertebra.errors import DataError
from vertebra.tokenizers.action import ActionTokenizer
from vertebra.tokenizers.base import tokenizer_from_dict

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
Reals = NDArray[np.float64]
Integers = NDArray[np.int64]

FORMAT = 1
_ARRAYS = ("ids", "ends", "names", "episodes", "starts", "lengths", "origins", "offsets")
_MOST_NUMBERS = 4_000_000
"""Numbers that are decoded at once."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """One episode in tokens.

    Args:
        tokenizer: What wrote them.
        ids: (C, L); rows with fewer tokens end in -1.
        starts: First step of each chunk, (C,), growing.
        lengths: Steps of each chunk that the episode has, (C,); the others repeat its last action.
        origins: What each chunk goes on from, (C, D) or, with velocities, (C, 2, D); None where the tokenizer does
            not ask for it.
        offsets: What the actions of each chunk are relative to, (C, D); None for nothing.
        names: The D names of the columns.
        units: Their D units.
        fps: Steps a second; None where not known.
    """

    tokenizer: ActionTokenizer
    ids: Integers
    starts: Integers
    lengths: Integers
    origins: Floats | None = None
    offsets: Floats | None = None
    names: tuple[str, ...]
    units: tuple[str, ...]
    fps: float | None

    @property
    def used(self) -> Integers:
        """Steps of each chunk before the next one begins, (C,)."""
        return np.minimum(self.lengths, np.diff(self.starts, append=np.iinfo(np.int64).max))

    @property
    def counts(self) -> Integers:
        """Tokens of each chunk, (C,)."""
        return (self.ids >= 0).sum(1)

    @torch.no_grad()
    def decode(self, steps: int | None = None, rows: slice = slice(None)) -> Floats:
        """Return the actions of the chunks in ``rows``, (C, steps or H, D)."""
        start = None if self.origins is None else torch.from_numpy(self.origins[rows])
        made = self.tokenizer.decode(torch.from_numpy(self.ids[rows]), steps=steps, start=start)
        if self.offsets is not None:
            made = self.tokenizer.restore(made + torch.from_numpy(self.offsets[rows])[:, None])
        return made.numpy()

    def resampled(self, rate: Fraction) -> tuple[Reals, Floats]:
        """Decode the episode at ``rate`` times its own rate.

        Between the last step of a chunk and the first of the next, what is asked for is interpolated, but for
        grippers, which stay as they are. Steps in no chunk are left out.

        Returns:
            Times in steps of the episode, (T,), and actions, (T, D).
        """
        fine, every = rate.numerator, rate.denominator  # of a step's ``fine`` parts, each ``every``-th is asked for
        steps = (self.tokenizer.horizon - 1) * fine + 1
        batch = max(1, _MOST_NUMBERS // (steps * self.tokenizer.dims))
        places, rows = [], []
        for first in range(0, len(self.ids), batch):
            chunks = self.decode(None if fine == 1 else steps, slice(first, first + batch))
            for row, chunk in enumerate(chunks, start=first):
                inside = min(self.used[row] * fine, (self.lengths[row] - 1) * fine + 1)
                place = self.starts[row] * fine + np.arange(inside)
                kept = place % every == 0
                kept[[0, -1]] = True  # between these is interpolated
                places.append(place[kept])
                rows.append(chunk[:inside][kept])
        known, values = np.concatenate(places), np.concatenate(rows)
        wanted = np.arange(-(-known[0] // every) * every, known[-1] + 1, every)
        right = np.searchsorted(known, wanted)
        left = np.where(known[right] == wanted, right, right - 1)
        gap = known[right] - known[left]
        near = gap <= fine
        wanted, left, right, gap = wanted[near], left[near], right[near], gap[near]
        weight = ((wanted - known[left]) / np.maximum(gap, 1)).astype(np.float32)[:, None].repeat(values.shape[1], 1)
        weight[:, list(getattr(self.tokenizer, "grippers", ()))] = 0
        moved = beside(values[right], values[left], self.tokenizer) - values[left]
        made = self.tokenizer.restore(torch.from_numpy(values[left] + weight * moved)[None])[0].numpy()
        return wanted / fine, np.where(weight > 0, made, values[left])


def goes_on(tokenizer: ActionTokenizer) -> bool:
    """Whether chunks of this tokenizer go on from a given position."""
    return getattr(tokenizer, "initial", "free") != "free"


def origin(tokenizer: ActionTokenizer, actions: Floats, step: int) -> Floats:
    """Return what a chunk from ``step`` on goes on from: the action (D,) before it, for some with its velocity, (2, D).

    The first chunk goes on from its own first action, at rest.
    """
    before = actions[max(step - 1, 0)]
    if not getattr(tokenizer, "velocity", False):
        return before
    return np.stack([before, before - beside(actions[max(step - 2, 0)], before, tokenizer)])


@torch.no_grad()
def one_after_another(tokens: Tokens, chunks: Tensor, actions: Floats) -> Tokens:
    """Fill in the ids of chunks (C, H, D), each of which goes on from what was decoded before it, as a robot does.

    Args:
        tokens: All but ``ids`` and ``origins``.
        chunks: Relative to the offsets, where there are some.
        actions: (T, D), where there is nothing to go on from.
    """
    acted = actions.copy()
    ids, origins = [], []
    for row, (start, used) in enumerate(zip(tokens.starts, tokens.used, strict=True)):
        own = origin(tokens.tokenizer, acted, int(start)).copy()
        offsets = None
        if tokens.offsets is not None:
            offsets = tokens.offsets[row : row + 1]
            own.reshape(-1, own.shape[-1])[0] -= offsets[0]  # the position; a velocity is the same
        ids.append(tokens.tokenizer.encode(chunks[row : row + 1], torch.from_numpy(own)[None]).numpy())
        origins.append(own)
        one = dataclasses.replace(tokens, ids=ids[-1], origins=own[None], offsets=offsets)
        acted[start : start + used] = one.decode()[0, :used]
    return dataclasses.replace(tokens, ids=np.concatenate(ids), origins=np.stack(origins))


def cut(actions: Floats, starts: Integers, horizon: int) -> Floats:
    """Return chunks (C, H, D) of actions (T, D); behind the end the last action is repeated."""
    return actions[np.minimum(starts[:, None] + np.arange(horizon), len(actions) - 1)]


def continuous(actions: Floats, tokenizer: ActionTokenizer) -> Floats:
    """Take the jumps of 2 pi out of the angles of (T, D), and the changes of sign out of quaternions."""
    actions = actions.copy()
    for column in tokenizer.angles:
        actions[:, column] = np.unwrap(actions[:, column].astype(np.float64))
    for first in tokenizer.quaternions:
        part = actions[:, first : first + 4]
        turned = np.where((part[1:] * part[:-1]).sum(-1) < 0, -1, 1)
        part[1:] *= turned.cumprod()[:, None]
    return actions


def beside(values: Floats, near: Floats, tokenizer: ActionTokenizer) -> Floats:
    """Turn angles of (..., D) by 2 pi k and flip quaternions so that they come next to ``near``, of the same shape."""
    values = values.copy()
    for column in tokenizer.angles:
        turns = np.round((values[..., column] - near[..., column]) / (2 * math.pi))
        values[..., column] -= (2 * math.pi * turns).astype(np.float32)
    for first in tokenizer.quaternions:
        part = slice(first, first + 4)
        away = (values[..., part] * near[..., part]).sum(-1, keepdims=True) < 0
        values[..., part] *= np.where(away, np.float32(-1), np.float32(1))
    return values


class Measures:
    """How well tokens say what was demonstrated, over any number of episodes; only steps that exist count.

    Args:
        dims: Action dimensions D.
    """

    def __init__(self, dims: int) -> None:
        self.squares, self.largest, self.clipped = np.zeros(dims), np.zeros(dims), np.zeros(dims)
        self.jumps, self.jump = np.zeros(dims), np.zeros(dims)  # sum, largest
        self.moves, self.move = np.zeros(dims), np.zeros(dims)
        self.steps = self.chunks = self.pairs = 0

    def add(self, tokens: Tokens, original: Floats, decoded: Floats, clipped: Floats) -> None:
        """Count one episode.

        Args:
            tokens: Where its chunks are.
            original: (T, D), continuous.
            decoded: (C, H, D), beside it.
            clipped: Share of the tokenizer's numbers that were out of bounds, (D,).
        """
        starts, horizon = tokens.starts, decoded.shape[1]
        real = np.arange(horizon) < tokens.lengths[:, None]
        errors = np.abs(decoded - cut(original, starts, horizon))[real].astype(np.float64)  # (N, D)
        self.squares += (errors**2).sum(0)
        self.largest = np.maximum(self.largest, errors.max(0))
        self.clipped += clipped * len(starts)
        self.steps += len(errors)
        self.chunks += len(starts)
        apart = np.diff(starts)
        first = np.flatnonzero(apart <= horizon)  # the next begins in, or right behind, this one
        last = decoded[first, apart[first] - 1]
        jumps = np.abs(decoded[first + 1, 0] - last).astype(np.float64)
        moves = np.abs(original[starts[first + 1]] - original[starts[first + 1] - 1]).astype(np.float64)
        self.jumps += jumps.sum(0)
        self.moves += moves.sum(0)
        self.jump = np.maximum(self.jump, jumps.max(0, initial=0))
        self.move = np.maximum(self.move, moves.max(0, initial=0))
        self.pairs += len(first)

    def rmse(self) -> Reals:
        """Root-mean-square error of each dimension, (D,)."""
        return np.sqrt(self.squares / max(self.steps, 1))

    def joints(self, names: Sequence[str], units: Sequence[str]) -> list[dict[str, Any]]:
        """Return what is known of each dimension, ready for JSON."""
        rmse = self.rmse()
        return [
            {
                "name": name,
                "unit": unit,
                "rmse": short(rmse[d]),
                "largest": short(self.largest[d]),
                "clipped": short(self.clipped[d] / max(self.chunks, 1)),
                "jump": {"mean": short(self.jumps[d] / max(self.pairs, 1)), "max": short(self.jump[d])},
                "step": {"mean": short(self.moves[d] / max(self.pairs, 1)), "max": short(self.move[d])},
            }
            for d, (name, unit) in enumerate(zip(names, units, strict=True))
        ]

    def overall(self) -> dict[str, Any]:
        """Return means and largest values over all dimensions, ready for JSON."""
        pairs = max(self.pairs, 1)
        return {
            "clipped": short(self.clipped.mean() / max(self.chunks, 1)),
            "borders": self.pairs,
            "jump": {"mean": short(self.jumps.mean() / pairs), "max": short(self.jump.max())},
            "step": {"mean": short(self.moves.mean() / pairs), "max": short(self.move.max())},
        }


# ---------------------------------------------------------------- files


def write_tokens(stream: IO[bytes], episodes: Sequence[tuple[str, Tokens]], every: int) -> None:
    """Write named episodes of one tokenizer as a token file (.npz).

    Args:
        stream: Where to.
        episodes: At least one.
        every: Steps from one chunk to the next, for people.
    """
    all_tokens = [tokens for _, tokens in episodes]
    first = all_tokens[0]
    kept = [row[row >= 0] for tokens in all_tokens for row in tokens.ids]
    arrays: dict[str, Any] = {
        "ids": np.concatenate(kept).astype(np.int32),
        "ends": np.cumsum([len(row) for row in kept], dtype=np.int64),
        "names": np.array([name for name, _ in episodes], dtype=np.str_),
        "episodes": np.repeat(np.arange(len(episodes)), [len(tokens.ids) for tokens in all_tokens]),
        "starts": np.concatenate([tokens.starts for tokens in all_tokens]),
        "lengths": np.concatenate([tokens.lengths for tokens in all_tokens]),
        "origins": _joined([tokens.origins for tokens in all_tokens]),
        "offsets": _joined([tokens.offsets for tokens in all_tokens]),
    }
    facts = {
        "format": FORMAT,
        "tokenizer": first.tokenizer.to_dict(),
        "every": every,
        "columns": first.names,
        "units": first.units,
        "fps": first.fps,
    }
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    np.savez_compressed(stream, **arrays)


def read_tokens(path: Path) -> list[tuple[str, Tokens]] | None:
    """Read a token file, episode by episode; None where the .npz is none, but demonstrations, say.

    Raises:
        DataError: The file is damaged.
    """
    try:
        with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as data:
            if "facts" not in data.files:
                return None
            facts = json.loads(data["facts"].tobytes())
            arrays = {name: data[name] for name in _ARRAYS}
        tokenizer = tokenizer_from_dict(facts["tokenizer"])
        if facts["format"] != FORMAT or not isinstance(tokenizer, ActionTokenizer):
            raise ValueError(f"format {facts['format']} of {type(tokenizer).__name__}")
        columns, units, fps = tuple(facts["columns"]), tuple(facts["units"]), facts["fps"]
        if len(columns) != tokenizer.dims or len(units) != tokenizer.dims:
            raise ValueError(f"{len(columns)} columns and {len(units)} units for {tokenizer.dims} dimensions")
        _check(arrays, tokenizer)
        chunks = np.arange(len(arrays["ends"]))
        found = []
        for number, name in enumerate(arrays["names"].tolist()):
            rows = chunks[arrays["episodes"] == number]
            tokens = Tokens(
                tokenizer=tokenizer, ids=_rows(arrays["ids"], arrays["ends"], rows), starts=arrays["starts"][rows],
                lengths=arrays["lengths"][rows], origins=_part(arrays["origins"], rows),
                offsets=_part(arrays["offsets"], rows), names=columns, units=units, fps=fps,
            )  # fmt: skip
            found.append((name, tokens))
        return found
    except Exception as error:  # NumPy, zipfile, zlib and json each have their own
        raise DataError(f"{path}: cannot be read as tokens of actions ({error}); write it again.") from error


def short(value: float) -> float:
    """Round to what is worth reading."""
    return float(f"{value:.6g}")


def _check(arrays: dict[str, NDArray[Any]], tokenizer: ActionTokenizer) -> None:
    ends, starts, lengths, episodes = (arrays[name] for name in ("ends", "starts", "lengths", "episodes"))
    if arrays["ids"].shape != (ends[-1],) or not (np.diff(ends, prepend=0) > 0).all():
        raise ValueError(f"ends do not cut {len(arrays['ids']):,} tokens into chunks")
    if not len(ends) == len(starts) == len(lengths) == len(episodes):
        raise ValueError("arrays of different lengths")
    if not ((lengths > 0) & (lengths <= tokenizer.horizon)).all():
        raise ValueError(f"lengths that are not between 1 and the horizon {tokenizer.horizon}")
    if (np.unique(episodes) != np.arange(len(arrays["names"]))).any() or (np.diff(episodes) < 0).any():
        raise ValueError("episodes are not numbered in order")
    if (starts < 0).any() or (np.diff(starts)[np.diff(episodes) == 0] <= 0).any():
        raise ValueError("starts do not grow")
    for name in ("origins", "offsets"):
        values = arrays[name]
        if len(values) and (len(values) != len(ends) or values.shape[-1] != tokenizer.dims):
            raise ValueError(f"{name} of shape {values.shape}")
        if not np.isfinite(values).all():
            raise ValueError(f"{name} that are not finite numbers")
    if goes_on(tokenizer) and not len(arrays["origins"]):
        raise ValueError("no origins")


def _rows(ids: NDArray[np.int32], ends: Integers, rows: Integers) -> Integers:
    begins = ends[rows] - np.diff(ends, prepend=0)[rows]
    made = np.full((len(rows), int((ends[rows] - begins).max())), -1, dtype=np.int64)
    for row, begin, end in zip(made, begins, ends[rows], strict=True):
        row[: end - begin] = ids[begin:end]
    return made


def _joined(parts: Sequence[Floats | None]) -> Floats:
    given = [part for part in parts if part is not None]
    return np.concatenate(given) if given else np.empty((0, 0), np.float32)


def _part(values: Floats, rows: Integers) -> Floats | None:
    return values[rows] if len(values) else None
