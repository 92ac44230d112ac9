"""What the data knows about meshes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import Place


@dataclass(frozen=True, kw_only=True)
class MeshSpec(DataSpec):
    """Facts about a set of meshes.

    Args:
        tokenizer: How a mesh is written, as ``Tokenizer.to_dict`` describes it.
        points: Points of the condition, each with a normal.
        max_faces: Most faces of a mesh.
        max_tokens: Most tokens of a mesh, begin and end not counted.
        place: Point of a grid cell that stands for it; published models have ``lower``.
        face_buckets: Upper ends of the ranges of face counts that a model can be told; none where it is not.
    """

    domain: ClassVar[str] = "mesh"

    tokenizer: dict[str, Any]
    points: int = 4096
    max_faces: int = 800
    max_tokens: int = 3600
    place: Place = "centre"
    face_buckets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("points", "max_faces", "max_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"MeshSpec: {name} must be at least 1, got {getattr(self, name)}.")
        if self.place not in ("centre", "lower"):
            raise ConfigError(f"MeshSpec: place must be centre or lower, got {self.place!r}.")
        if list(self.face_buckets) != sorted(set(self.face_buckets)):
            raise ConfigError(f"MeshSpec: face_buckets must rise, got {list(self.face_buckets)}.")
