"""What a data module knows after ``setup``: a small JSON-able dataclass that models and checkpoints carry."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from vertebra.errors import ConfigError, UnknownNameError, VertebraError

_DOMAINS: dict[str, type[DataSpec]] = {}


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """Facts about data that a model is built from.

    Subclasses live in ``vertebra.domains.<domain>.spec`` and hold JSON-able fields; tuples are written as lists.
    """

    domain: ClassVar[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _DOMAINS[cls.domain] = cls

    def to_dict(self) -> dict[str, Any]:
        """Return ``{"domain": ..., field: value}``, ready for JSON."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {"domain": self.domain, **fields}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DataSpec:
        """Make the spec that ``to_dict`` described.

        Raises:
            UnknownNameError: No such domain.
            ConfigError: A field the domain's spec does not have, one that is missing, or a value that cannot be.
        """
        if not isinstance(values, dict):
            raise ConfigError(f"the spec of data must be an object with 'domain', got a {type(values).__name__}.")
        fields = dict(values)
        domain = str(fields.pop("domain", ""))[:100]
        if domain not in _DOMAINS and domain in _folders():
            import_module(f"vertebra.domains.{domain}.spec")
        if domain not in _DOMAINS:
            raise UnknownNameError("domain", domain, _DOMAINS)
        cls = _DOMAINS[domain]
        known = [f.name for f in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ConfigError(f"{cls.__name__} has no field {name!r}; fields: {', '.join(known)}.")
        try:
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        except VertebraError:
            raise
        except Exception as e:  # checks of specs expect values of the right types
            raise ConfigError(f"{cls.__name__}: a value is missing or of a wrong type ({e}).") from e


def _folders() -> list[str]:
    """Names of the domains, which are the folders here that have a spec."""
    return [file.parent.name for file in Path(__file__).parent.glob("*/spec.py")]
