"""FAST: rounded cosine coefficients of a chunk, compressed by byte-pair encoding (https://arxiv.org/abs/2501.09747).

A chunk is scaled to [-1, 1], transformed along time (DCT-II, orthonormal), multiplied by ``scale`` and rounded. The
coefficients, the lowest frequency of all dimensions first, are written as characters, and pairs of these that are
frequent become tokens. Unlike in the original, characters are not taken apart into bytes and merges know no words, so
that every coefficient is at most one token.

Shapes: B chunks, T steps, D action dimensions, L tokens, V tokens that were learnt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vertebra.errors import ConfigError, DataError, MissingExtraError, ShapeError
from vertebra.tokenizers.action import NONE, QUANTILES, ActionTokenizer
from vertebra.tokenizers.binning import checked_bounds, checked_grippers, checked_steps, quantile_bounds

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

FIRST = 0x10000
"""Character of the lowest coefficient: the million from here on has no surrogates."""
MOST = 0x100000
"""Characters from there on."""
LONGEST_TOKEN = 10_000  # as in the original: no limit


class FASTTokenizer(ActionTokenizer):
    """A token is one or more rounded coefficients; chunks differ in their number of tokens.

    Bounds only set the scale: nothing is cut off at them. What is cut off, to the least or the largest seen by ``fit``,
    are coefficients; ``clipped`` counts them. ``start`` is not used: it would shift a chunk by a whole turn, or turn a
    quaternion's sign, and mean the same in more tokens.

    Args:
        horizon: As in ``ActionTokenizer``.
        dims: As in ``ActionTokenizer``.
        vocab_size: Number of ids; where data has too few pairs that repeat, the last ones stand for nothing.
        angles: As in ``ActionTokenizer``.
        quaternions: As in ``ActionTokenizer``.
        scale: Rounded coefficients in 1; a larger one is finer and takes more tokens.
        grippers: Columns scaled by their least and largest value instead of quantiles.
        low: Value of each dimension that -1 stands for (D,), from ``fit``.
        high: Value of each dimension that 1 stands for (D,), from ``fit``.
        minimum: Least rounded coefficient, from ``fit``.
        model: JSON of the number of different coefficients and of the pairs of ids that are merged, in order, from
            ``fit``.
        longest: Most tokens of a chunk that ``fit`` saw, for models with room for fewer than ``length``.

    Raises:
        ConfigError: An impossible number, a column that does not exist, or parts of a fit that do not go together.
        MissingExtraError: The package ``tokenizers`` is not installed.
    """

    fields: ClassVar[tuple[str, ...]] = (
        *ActionTokenizer.fields,
        *("scale", "grippers", "low", "high", "minimum", "model", "longest"),
    )
    varies: ClassVar[bool] = True

    def __init__(
        self,
        *,
        horizon: int,
        dims: int,
        vocab_size: int = 1024,
        angles: Sequence[int] = (),
        quaternions: Sequence[int] = (),
        scale: float = 10.0,
        grippers: Sequence[int] = (),
        low: Sequence[float] | None = None,
        high: Sequence[float] | None = None,
        minimum: int | None = None,
        model: str | None = None,
        longest: int | None = None,
    ) -> None:
        super().__init__(horizon=horizon, dims=dims, vocab_size=vocab_size, angles=angles, quaternions=quaternions)
        if not 0 < scale < math.inf:
            raise ConfigError(f"FASTTokenizer: scale must be a number above 0, got {scale}; 10 is usual.")
        _library()
        self.scale = float(scale)
        self.grippers = checked_grippers(self, grippers)
        self.low, self.high = checked_bounds(self, low, high)
        self.minimum, self.model, self.longest = minimum, model, longest
        if len({value is None for value in (low, high, minimum, model, longest)}) > 1:
            raise ConfigError("FASTTokenizer: low, high, minimum, model and longest must come together, from fit.")
        self._bases: dict[int, Floats] = {}
        if model is not None and minimum is not None and self.low and self.high:
            self._middle, self._half = _middle(self.low, self.high)
            alphabet, merges = _read_model(model, vocab_size)
            pieces = _pieces(alphabet, merges)
            self._bpe = _encoder(pieces, merges)
            self._range = minimum, minimum + alphabet - 1
            self._lengths = np.array([len(piece) for piece in pieces])  # (V,)
            self._begins = self._lengths.cumsum() - self._lengths  # (V,)
            self._table = np.array([ord(char) for char in "".join(pieces)]) - FIRST + minimum  # of all, end to end

    @property
    def length(self) -> int:
        """T * D, where no pair was merged."""
        return self.horizon * self.dims

    @property
    def is_fitted(self) -> bool:
        """As in ``ActionTokenizer``."""
        return self.model is not None

    @property
    def sizes(self) -> Tensor:
        """Coefficients that each id stands for, (V,); 0 for ids without a meaning.

        Raises:
            ConfigError: Not fitted.
        """
        self._must_be_fitted()
        sizes = torch.zeros(self.vocab_size, dtype=torch.long)
        sizes[: len(self._lengths)] = torch.from_numpy(self._lengths)
        return sizes

    def fit(self, chunks: Tensor, start: Tensor | None = None, *, quantiles: tuple[float, float] = QUANTILES) -> Self:
        """Return a tokenizer that has learnt scale and merges from chunks (B, T, D); the same from the same.

        Args:
            chunks: Actions in their units.
            start: Not used.
            quantiles: Shares of the values below the bounds of a dimension.

        Raises:
            ConfigError: More different coefficients than ``vocab_size``, or impossible quantiles.
            ShapeError: Chunks of another shape.
            DataError: No chunk, or numbers that are not finite.
        """
        values = self.smooth(chunks)
        low, high = quantile_bounds(values, self.grippers, quantiles)
        found = self._transform(values, *_middle(low, high))
        minimum = int(found.min())
        alphabet = int(found.max()) - minimum + 1
        if alphabet > min(self.vocab_size, MOST):
            raise ConfigError(
                f"FASTTokenizer: the rounded coefficients take {alphabet:,} different numbers, and vocab_size is "
                f"{self.vocab_size:,}; lower scale (now {self.scale:g}) or raise vocab_size."
            )
        merges = _learn(_texts(found - minimum), alphabet, self.vocab_size)
        model = json.dumps({"alphabet": alphabet, "merges": merges}, separators=(",", ":"))
        made = self.replace(low=low, high=high, minimum=minimum, model=model, longest=0)
        return made.replace(longest=max(len(row) for row in made._rows(found)))

    def encode(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Map chunks (B, T, D) to ids (B, L), L the most tokens of a chunk; shorter ones end in ``NONE``.

        Raises:
            ConfigError: Not fitted.
            ShapeError: Chunks of another shape.
            DataError: Numbers that are not finite.
        """
        rows = self._rows(self.coefficients(chunks).numpy())
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.long)
        ids = torch.full((len(rows), max(lengths.tolist(), default=0)), NONE)
        ids[torch.arange(ids.shape[1]) < lengths[:, None]] = torch.tensor([i for row in rows for i in row]).long()
        return ids.to(chunks.device)

    def decode(self, ids: Tensor, *, steps: int | None = None, start: Tensor | None = None) -> Tensor:
        """Map ids (B, L) to chunks (B, T, D); at other ``steps`` the same cosines are read at other times.

        Raises:
            ConfigError: Not fitted, or ``steps`` below 1.
            ShapeError: Ids of another shape.
            DataError: Rows that stand for no chunk, as ``is_valid`` says.
        """
        array = self._checked(ids)
        bad = (~self._valid(array)).nonzero()[0].tolist()
        if bad:
            raise DataError(
                f"FASTTokenizer: rows {', '.join(map(str, bad[:10]))}{' ...' if len(bad) > 10 else ''} of ids do not "
                f"stand for {self.horizon} x {self.dims} coefficients; ask is_valid first, or generate them again."
            )
        flat = array[array != NONE]
        lengths = self._lengths[flat]
        shifts = self._begins[flat] - (lengths.cumsum() - lengths)  # from the place in the output to that in the table
        found = self._table[np.arange(lengths.sum()) + shifts.repeat(lengths)] / self.scale
        values = self._basis(checked_steps(self, steps)) @ found.reshape(len(ids), self.horizon, self.dims)
        return self.restore(torch.from_numpy(values * self._half + self._middle).float()).to(ids.device)

    def is_valid(self, ids: Tensor) -> Tensor:
        """Whether each row of ids (B, L) stands for T * D coefficients, bool (B,); ``NONE`` may only end it.

        Raises:
            ConfigError: Not fitted.
            ShapeError: Ids of another shape.
        """
        return torch.from_numpy(self._valid(self._checked(ids))).to(ids.device)

    def coefficients(self, chunks: Tensor) -> Tensor:
        """Rounded cosine coefficients of chunks (B, T, D), int64 (B, T, D) on the CPU, none cut off.

        Raises:
            ConfigError: Not fitted.
            ShapeError: Chunks of another shape.
            DataError: Numbers that are not finite.
        """
        self._must_be_fitted()
        return torch.from_numpy(self._transform(self.smooth(chunks), self._middle, self._half))

    def clipped(self, chunks: Tensor, start: Tensor | None = None) -> Tensor:
        """Share of the coefficients of chunks (B, T, D) that no chunk of ``fit`` reached, for each dimension (D,).

        Raises:
            ConfigError: Not fitted.
            ShapeError: Chunks of another shape.
            DataError: Numbers that are not finite.
        """
        found = self.coefficients(chunks)
        return (found != found.clamp(*self._range)).float().mean((0, 1)).to(chunks.device)

    def _checked(self, ids: Tensor) -> Ints:
        self._must_be_fitted()
        if ids.ndim != 2:
            raise ShapeError(f"FASTTokenizer: ids must be (B, L), got {tuple(ids.shape)}.")
        return ids.detach().cpu().long().numpy()

    def _valid(self, ids: Ints) -> NDArray[np.bool_]:
        known, none = (ids >= 0) & (ids < len(self._lengths)), ids == NONE
        total = (self._lengths[np.where(known, ids, 0)] * known).sum(1)
        return (known | none).all(1) & ~(none[:, :-1] & known[:, 1:]).any(1) & (total == self.length)

    def _must_be_fitted(self) -> None:
        if not self.is_fitted:
            raise ConfigError("FASTTokenizer: there are no merges yet; use what fit(chunks) returns.")

    def _basis(self, steps: int) -> Floats:
        if steps not in self._bases:
            self._bases[steps] = cosine_basis(self.horizon, steps)
        return self._bases[steps]

    def _transform(self, smooth: Tensor, middle: Floats, half: Floats) -> Ints:
        # In float64: a sum in another order must not round to another integer.
        values = (smooth.detach().cpu().double().numpy() - middle) / half
        found = np.round(self._basis(self.horizon).T @ values * self.scale)  # half to even
        if not np.isfinite(found).all():
            raise DataError("FASTTokenizer: actions must be finite numbers; leave out what is NaN or infinite.")
        return found.clip(-(2.0**53), 2.0**53).astype(np.int64)  # what an integer holds

    def _rows(self, found: Ints) -> list[list[int]]:
        texts = _texts(found.clip(*self._range) - self._range[0])
        return [encoding.ids for encoding in self._bpe.encode_batch_fast(texts, add_special_tokens=False)]


def cosine_basis(horizon: int, steps: int) -> Floats:
    """The cosines of the orthonormal DCT-II at other times, (steps, horizon).

    Args:
        horizon: Steps T of the transform.
        steps: Times evenly spaced from its first step to its last; as many as ``horizon`` give the orthonormal matrix
            of the inverse transform, whose transpose is the transform.
    """
    times = np.linspace(0, horizon - 1, steps) + 0.5
    basis = np.cos(np.pi / horizon * times[:, None] * np.arange(horizon)) * np.sqrt(2 / horizon)
    basis[:, 0] = np.sqrt(1 / horizon)
    return basis


def _middle(low: Sequence[float], high: Sequence[float]) -> tuple[Floats, Floats]:
    """What 0 stands for and how much 1 is, (D,) each; a dimension that never moved keeps its unit."""
    a, b = np.array(low), np.array(high)
    return (a + b) / 2, np.where(b > a, (b - a) / 2, 1.0)


# ---------------------------------------------------------------- coefficients as text


def _texts(places: Ints) -> list[str]:
    """Write numbers (B, T, D), 0 for the least coefficient, as a text for each chunk."""
    codes = (places.reshape(len(places), math.prod(places.shape[1:])) + FIRST).astype("<u4")
    return [row.tobytes().decode("utf-32-le") for row in codes]


def _pieces(alphabet: int, merges: Sequence[Sequence[int]]) -> list[str]:
    """Texts of all tokens: first the characters, then what merges make and none before made."""
    pieces = [chr(FIRST + i) for i in range(alphabet)]
    known = set(pieces)
    for a, b in merges:
        made = pieces[a] + pieces[b]
        if made not in known:
            pieces.append(made)
            known.add(made)
    return pieces


def _read_model(model: str, vocab_size: int) -> tuple[int, list[list[int]]]:
    try:
        values = json.loads(model)
        alphabet, merges = values["alphabet"], values["merges"]
        # A merge may only name what is there already; that many there are, the alphabet and a token a merge, at most.
        good = 0 < alphabet <= MOST and all(0 <= i < alphabet + n for n, (a, b) in enumerate(merges) for i in (a, b))
        if good and len(_pieces(alphabet, merges)) <= vocab_size:
            return alphabet, merges
    except (ValueError, TypeError, KeyError, IndexError):
        pass
    raise ConfigError(
        f"FASTTokenizer: model must be what fit wrote, of at most {vocab_size} tokens; check the file it was read from."
    )


# ---------------------------------------------------------------- byte-pair encoding


def _learn(texts: Sequence[str], alphabet: int, vocab_size: int) -> list[list[int]]:
    """Find the pairs of ids to merge, most frequent first."""
    library = _library()
    learnt = library.Tokenizer(library.models.BPE())
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[],
        initial_alphabet=[chr(FIRST + i) for i in range(alphabet)],
        max_token_length=LONGEST_TOKEN,
    )
    learnt.train_from_iterator(texts, trainer)
    merges: list[list[int]] = []
    ids = {piece: i for i, piece in enumerate(_pieces(alphabet, []))}
    for a, b in json.loads(learnt.to_str())["model"]["merges"]:
        merges.append([ids[a], ids[b]])
        ids.setdefault(a + b, len(ids))
    return merges


def _encoder(pieces: Sequence[str], merges: Sequence[Sequence[int]]) -> Any:
    library = _library()
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    pairs = [(pieces[a], pieces[b]) for a, b in merges]
    return library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=pairs, cache_capacity=0))


def _library() -> Any:
    try:
        import tokenizers  # an extra; not vertebra.tokenizers
        import tokenizers.models
        import tokenizers.trainers
    except ImportError:
        raise MissingExtraError("tokenizers", "action", "FAST") from None
    return tokenizers
