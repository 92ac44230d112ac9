import json

import pytest

from vertebra.domains.mesh.spec import MeshSpec
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError
from vertebra.tokenizers.mesh import make_mesh_tokenizer

TOKENIZER = make_mesh_tokenizer("amt", 32).to_dict()


def test_a_spec_is_the_same_after_json():
    spec = MeshSpec(tokenizer=TOKENIZER, points=64, max_tokens=100, place="lower", face_buckets=(10, 20))
    values = json.loads(json.dumps(spec.to_dict()))
    assert values["domain"] == "mesh"
    assert DataSpec.from_dict(values) == spec
    assert DataSpec.from_dict(values).face_buckets == (10, 20)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"points": 0}, r"MeshSpec: points must be at least 1, got 0\."),
        ({"max_faces": 0}, r"MeshSpec: max_faces must be at least 1, got 0\."),
        ({"max_tokens": -3}, r"MeshSpec: max_tokens must be at least 1, got -3\."),
        ({"place": "upper"}, r"MeshSpec: place must be centre or lower, got 'upper'\."),
        ({"face_buckets": (20, 10)}, r"MeshSpec: face_buckets must rise, got \[20, 10\]\."),
        ({"face_buckets": (10, 10)}, r"MeshSpec: face_buckets must rise, got \[10, 10\]\."),
    ],
)
def test_what_cannot_be_is_refused(changes, text):
    with pytest.raises(ConfigError, match=f"^{text}$"):
        MeshSpec(tokenizer=TOKENIZER, **changes)
