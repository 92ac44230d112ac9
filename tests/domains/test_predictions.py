"""The writer of predictions."""

import pytest

from vertebra.domains.predictions import write_csv
from vertebra.errors import DataError


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"p\.csv: cannot be written \(.*\); choose another place"):
        write_csv(tmp_path / "file" / "p.csv", [{"index": 0, "a": 1.0}])
