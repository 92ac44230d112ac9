import json

import pytest

from vertebra.domains.dna.spec import DNASpec
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, UnknownNameError
from vertebra.tokenizers.nucleotide import NucleotideTokenizer


def make_spec(**changes):
    values = {
        "tokenizer": NucleotideTokenizer().to_dict(),
        "task": "classification",
        "max_length": 81,
        "classes": ("no", "yes"),
    }
    return DNASpec(**{**values, **changes})


def test_json_round_trip():
    spec = make_spec(target_mean=(0.5,))
    assert DataSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert spec.to_dict()["domain"] == "dna"


def test_unknown_domain_is_refused():
    with pytest.raises(UnknownNameError, match="unknown domain 'dan'"):
        DataSpec.from_dict({"domain": "dan"})


def test_unknown_field_is_refused():
    with pytest.raises(ConfigError, match="DNASpec has no field 'klasses'; fields: tokenizer, task"):
        DataSpec.from_dict({**make_spec().to_dict(), "klasses": 3})
