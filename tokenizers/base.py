"""What every tokenizer offers: a vocabulary size, both directions, and a JSON-able description of itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import import_module
from typing import Any, ClassVar

from vertebra.errors import ConfigError


class Tokenizer(ABC):
    """Raw values <-> ids 0 .. ``vocab_size`` - 1.

    A subclass keeps its constructor's arguments as attributes of the same names and lists them in ``fields``:
    that is all ``to_dict`` needs.
    """

    vocab_size: int
    fields: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def encode(self, value: Any) -> Any:
        """Map a raw value to ids, int64: an array; or a tensor, for tokenizers of batches."""

    @abstractmethod
    def decode(self, ids: Any) -> Any:
        """Map ids back to a raw value."""

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"tokenizer": "module.Class", argument: value}``, ready for JSON."""
        module = type(self).__module__.removeprefix("vertebra.tokenizers.")
        return {"tokenizer": f"{module}.{type(self).__name__}", **{name: getattr(self, name) for name in self.fields}}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(tuple(self.to_dict().items()))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.fields)
        return f"{type(self).__name__}({arguments})"


def tokenizer_from_dict(values: dict[str, Any]) -> Tokenizer:
    """Make the tokenizer that ``to_dict`` described; only classes of ``vertebra.tokenizers`` are made.

    Raises:
        ConfigError: No such tokenizer, or an argument it does not take.
    """
    arguments = dict(values)
    path = arguments.pop("tokenizer", None)
    module, _, name = str(path).rpartition(".")
    cls: Any = None
    if module.isidentifier() and name.isidentifier():
        try:
            cls = getattr(import_module(f"vertebra.tokenizers.{module}"), name, None)
        except ModuleNotFoundError:
            cls = None
    if not (isinstance(cls, type) and issubclass(cls, Tokenizer)) or cls is Tokenizer:
        raise ConfigError(
            f"tokenizer_from_dict: 'tokenizer' must name a tokenizer of vertebra such as "
            f"'nucleotide.NucleotideTokenizer', got {path!r}; check the file it was read from."
        )
    for key in arguments:
        if key not in cls.fields:
            raise ConfigError(f"{name} has no argument {key!r}; its arguments are: {', '.join(cls.fields) or 'none'}.")
    return cls(**arguments)
