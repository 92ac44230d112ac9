"""Facts about text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LanguageSpec(DataSpec):
    """Facts about text that a language model reads.

    Args:
        vocab_size: Rows V of the embedding; some may be padding that no token has.
        max_length: Most tokens that the model was made for; None where nobody said. Nothing is cut to it.
        bos_id: Token that begins a text; None for none.
        eos_ids: Tokens that end one.
        pad_id: Token that stands at padding; None for none. Padding is told by the mask, not by this id, which some
            models share with another token.
    """

    vocab_size: int
    max_length: int | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    domain: ClassVar[str] = "language"

    def __post_init__(self) -> None:
        if self.vocab_size < 1:
            raise ConfigError(f"LanguageSpec: vocab_size must be at least 1, got {self.vocab_size}.")
        for name, ids in (("bos_id", [self.bos_id]), ("eos_ids", self.eos_ids), ("pad_id", [self.pad_id])):
            if wrong := [i for i in ids if i is not None and not 0 <= i < self.vocab_size]:
                raise ConfigError(f"LanguageSpec: {name} must lie in 0 .. {self.vocab_size - 1}, got {wrong[0]}.")
