"""A model of a description from elsewhere is first built dry, and held against the weights that it has."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vertebra.errors import LoadError, VertebraError

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Names:
    """What to call a description and the weights in errors.

    Args:
        description: Where the model is described.
        weights: Where its tensors are.
        several: Whether ``description`` is in the plural.
    """

    description: str = "config.json"
    weights: str = "model.safetensors"
    several: bool = False

    def does(self, verb: str) -> str:
        """Return ``description`` and what it does."""
        return f"{self.description} {verb}{'' if self.several else 's'}"


DIRECTORY = Names()
CHECKPOINT = Names("its hyper_parameters", "its state_dict", several=True)

_SLACK_VALUES = 32 << 20  # of what is computed when a model is built and not saved, such as tables of rotations
_SLACK_CALLS = 20_000
_LITTLE = 1 << 12  # values that are drawn as soon as filled
_LARGEST = 1 << 53  # of whole numbers; JSON has no larger ones that all readers agree on


def header_of(tensors: Mapping[str, object]) -> dict[str, dict[str, Any]]:
    """Describe tensors in memory as the header of a safetensors file would, as far as sizes go."""
    return {name: {"shape": list(t.shape)} for name, t in tensors.items() if isinstance(t, Tensor)}


def check_size(
    build: Callable[[], nn.Module], header: Mapping[str, Mapping[str, Any]], source: object, names: Names = DIRECTORY
) -> None:
    """Build a model under limits that its weights set, without drawing its large tensors, and compare it with them.

    Args:
        build: Makes the model.
        header: Of the file of its weights, as ``read_safetensors_header`` gives it.
        source: What to call it in errors.
        names: What to call its parts.

    Raises:
        LoadError: The model would have more values than the file, would compute far more than that, or cannot be
            built at all.
    """
    stored = sum(math.prod(entry["shape"]) for entry in header.values())
    try:
        with torch.random.fork_rng(devices=[]), _Dry(16 * stored + _SLACK_VALUES, 100 * len(header) + _SLACK_CALLS):
            model = build()
    except _TooLarge:
        raise LoadError(
            f"{source}: {names.does('describe')} a far larger model than {names.weights} holds ({stored:,} values in "
            f"{len(header):,} tensors); it was not built."
        ) from None
    except VertebraError:
        raise
    except Exception as e:  # whatever code of models raises when it gets values it was not written for
        raise cannot_be_built(e, source, names) from e
    built = sum(value.numel() for value in model.state_dict().values())
    if built > stored + max(stored, 1_000_000):  # less is told key by key when it is loaded
        raise LoadError(
            f"{source}: {names.does('describe')} a model of {built:,} values, but {names.weights} holds {stored:,}; it "
            "was not built."
        )


def check_numbers(
    values: object,
    source: object,
    header: Mapping[str, Mapping[str, Any]] | None = None,
    names: Names = DIRECTORY,
) -> None:
    """Refuse whole numbers that cannot be meant, before something is computed from them.

    Args:
        values: What ``config.json`` holds, or a part of it.
        source: What to call it in errors.
        header: Of the weights; where it is given, ``values`` is the description of a backbone.
        names: What to call its parts.

    Raises:
        LoadError: A number is too large, or there are more layers than tensors.
    """
    if isinstance(values, dict):
        if header is not None and isinstance(depth := values.get("depth"), int) and depth > len(header):
            raise LoadError(
                f"{source}: {names.does('say')} depth {depth}, but {names.weights} holds {len(header)} tensors; it was "
                "not built."
            )
        for value in values.values():
            check_numbers(value, source, names=names)
    elif isinstance(values, list | tuple):
        for value in values:
            check_numbers(value, source, names=names)
    elif isinstance(values, int) and abs(values) > _LARGEST:
        raise LoadError(f"{source}: {names.does('hold')} the number {_digits(values)}, which is too large.")


def _digits(value: int) -> str:
    try:
        return str(value)[:30]
    except ValueError:  # Python writes no number of thousands of digits
        return f"of {value.bit_length()} bits"


def cannot_be_built(error: Exception, source: object, names: Names = DIRECTORY) -> LoadError:
    """Say that values in ``config.json`` are none that a model can be built from."""
    reason = " ".join(str(error).split()) or "no reason given"
    return LoadError(
        f"{source}: no model can be built from {names.description} ({type(error).__name__}: {reason[:200]}); "
        f"{'they are' if names.several else 'it is'} damaged or of another version."
    )


class _TooLarge(Exception):  # noqa: N818  # never leaves this file
    pass


class _Dry(TorchDispatchMode):
    """Fills large random tensors with their mean; stops when there are too many values, or too many calls.

    The meta device would do too, but its first use takes seconds.
    """

    def __init__(self, values: int, calls: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.values, self.calls = values, calls

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # what is never compiled; asking for it imports the compiler, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        if self.calls < 0:
            raise _TooLarge
        if func._schema.name in ("aten::normal_", "aten::uniform_") and args[0].numel() > _LITTLE:
            first, second = (*args[1:3], 0.0, 1.0)[:2] if len(args) != 2 else (args[1], 1.0)
            return args[0].fill_(first if func._schema.name == "aten::normal_" else (first + second) / 2)
        if not _makes(func):
            return func(*args, **(kwargs or {}))
        if _asked(func, args) > self.values:
            raise _TooLarge
        out = func(*args, **(kwargs or {}))
        self.values -= sum(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        if self.values < 0:
            raise _TooLarge
        return out


@functools.cache
def _makes(func: Any) -> bool:
    """Whether a call returns new tensors, and no views or its own argument."""
    return all(r.alias_info is None for r in func._schema.returns)


def _asked(func: Any, args: Any) -> float:
    """Return about how many values a call will make, at most; what is not foreseen is counted afterwards."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
    sizes = [math.prod(map(abs, a)) for a in args if isinstance(a, list | tuple) and a and all(_is_int(v) for v in a)]
    name = func._schema.name
    if not tensors:
        if sizes:
            return max(sizes)
        numbers = [abs(a) for a in args if isinstance(a, int | float)]
        return numbers[-1] if name in ("aten::linspace", "aten::logspace") else math.prod(n for n in numbers if n > 1)
    if name == "aten::repeat":
        return sizes[0] * tensors[0].numel()
    axes = zip_longest(*(reversed(t.shape) for t in tensors), fillvalue=1)
    return math.prod(max(lengths) for lengths in axes)  # of an elementwise call, which broadcasts


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
