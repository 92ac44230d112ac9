"""The writer of predictions."""

import pytest
import torch

from vertebra.domains.predictions import write_csv
from vertebra.errors import DataError


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"p\.csv: cannot be written \(.*\); choose another folder"):
        write_csv(tmp_path / "file" / "p.csv", [{"index": 0, "a": 1.0}])
    (tmp_path / "taken.csv").mkdir()
    with pytest.raises(DataError, match=r"taken\.csv: cannot be written \(.*\); choose another folder"):
        write_csv(tmp_path / "taken.csv", [{"index": 0, "a": 1.0}])
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["file", "taken.csv"]


def test_rows_are_written_without_their_index_and_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "a" / "b" / "p.csv"
    rows = [{"index": 0, "name": "é, ü", "a": torch.tensor(0.12345678)}, {"index": 1, "name": "y\n", "a": float("nan")}]
    write_csv(path, rows)
    assert path.read_bytes() == 'name,a\n"é, ü",0.123457\n"y\n",nan\n'.encode()
    assert [p.name for p in path.parent.iterdir()] == ["p.csv"]
    write_csv(path, [])
    assert path.read_text() == "\n"


def test_what_is_not_finished_leaves_nothing_and_what_was_there(tmp_path):
    path = tmp_path / "p.csv"
    write_csv(path, [{"index": 0, "a": 1}])
    with pytest.raises(RuntimeError):
        write_csv(path, [{"index": 0, "a": 2}, {"index": 1, "a": torch.zeros(2)}])
    assert path.read_text() == "a\n1\n"
    assert list(tmp_path.iterdir()) == [path]
