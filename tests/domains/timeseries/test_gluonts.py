import json

import numpy as np
import pytest
from made_series import made, put, read, refused, same

from vertebra.domains.timeseries.writing import write_jsonl


def lines(*entries):
    return "".join(json.dumps(entry) + "\n" for entry in entries)


def entry(name="a", target=(1, 2, 3), **more):
    return {"item_id": name, "start": "2016-07-01 00:00:00", "freq": "1H", "target": list(target)} | more


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"])
def test_written_lines_are_read_back(tmp_path, name):
    wanted = [
        made("x", 12, "MS", "2015-01-31", holes=[3], past=1, known=2, ahead=3),
        made("y", 9, "B", seed=1, start="2017-01-02", width=3),
        made("z", 8, start=None),
    ]
    write_jsonl(tmp_path / name, wanted)
    found, left = read(tmp_path / name)
    assert left == []
    for own in wanted:
        same(found[own.name], own, names=False)
    assert found["x"].known_names == ("feat_dynamic_real_0", "feat_dynamic_real_1")
    assert found["x"].past_names == ("past_feat_dynamic_real_0",)
    assert found["y"].variates == ("target_0", "target_1", "target_2")


def test_missing_values_and_lines(tmp_path):
    text = '{"start": "2016-07-01", "freq": "D", "target": [1, "NaN", null, NaN, 5]}\n\n' + lines({"target": [4, 5]})
    found, left = read(put(tmp_path, text, "a.jsonl"))
    np.testing.assert_array_equal(found["0"].values[:, 0], [1, np.nan, np.nan, np.nan, 5])
    assert (found["1"].start, str(found["1"].frequency), left) == (None, "step", [])


def test_a_list_in_a_file(tmp_path):
    path = put(tmp_path, json.dumps([entry("a"), entry("b"), 5]), "a.json")
    found, left = read(path)
    assert list(found) == ["a", "b"]
    assert left == ["a.json: entry 3: is not a JSON object with start and target; write one a line."]


def test_one_bad_line_does_not_lose_the_others(tmp_path):
    text = lines(
        entry("a"),
        entry("b", [1, "x"]),
        entry("c", [[1, 2], [3]]),
        entry("a", [5, 6]),
        {"item_id": "d", "values": [1]},
        entry("e", [1, 2, 3], feat_dynamic_real=[[1, 2]]),
        entry("f", [1, 2, 3], past_feat_dynamic_real=[[1, 2, 3, 4]]),
        entry("g", start="soon"),
        entry("h", freq="1X"),
        entry("i", [1, 1e999]),
        entry("j", freq=None),
        entry("k", [1]),
    )
    found, left = read(put(tmp_path, text + '{"item_id": "l", "target": [1', "a.jsonl"))
    assert list(found) == ["a"]
    assert left == [
        "a.jsonl: line 2: target must be numbers (T,) or (V, T), got 'x'; write null for no value.",
        "a.jsonl: line 3: target must be numbers (T,) or (V, T) in rows of one length; write null for no value.",
        "a.jsonl: line 5: has no target; keys: item_id, values.",
        "a.jsonl: line 6: feat_dynamic_real has 2 steps, and target 3; write one for each step.",
        "a.jsonl: line 7: past_feat_dynamic_real has 4 steps, and target 3; write one for each step.",
        "a.jsonl: line 9: unknown frequency '1X'. Known: B, D, MS, QS, W, YS, h, min, ms, s, step; set frequency.",
        "a.jsonl: line 10: target holds an infinite number; write null for no value.",
        "a.jsonl: line 13: is not a JSON object, or is cut short; write one object a line.",
        "a.jsonl: line 4: has the item_id 'a' of line 1; give each series its own.",
        "a.jsonl: line 8: 'soon' is no time to start at; correct it.",
        "a.jsonl: line 11: neither it nor metadata.json tells the freq; set frequency.",
        "a.jsonl: k: one value is known, and at least 2 are needed; leave it out.",
    ]


def test_the_frequency_that_is_told_goes_first(tmp_path):
    path = put(tmp_path, lines(entry("a"), entry("b", freq=None)), "a.jsonl")
    found, left = read(path, frequency="D")
    assert ([str(own.frequency) for own in found.values()], left) == (["D", "D"], [])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "a.jsonl: the file is empty; copy or export it again."),
        (b"\0\1", "a.jsonl: holds binary data (a zero byte), and JSON is text; copy or export it again."),
        (
            b"date,x\n1,2\n",
            "a.jsonl: line 1: is not a JSON object, or is cut short (such lines: 2); write one object a line.",
        ),
        (
            b'{\n"target": [1]\n}',
            "a.jsonl: line 1: is not a JSON object, or is cut short (such lines: 3); write one object a line.",
        ),
        (
            b"[1, 2",
            "a.jsonl: is not JSON (Expecting ',' delimiter: line 1 column 6 (char 5)); write one object a line.",
        ),
        (b'{"target": "\xe4"}', "a.jsonl: line 1 is no text in UTF-8; save the file in UTF-8."),
    ],
)
def test_files_that_are_no_json(tmp_path, data, message):
    assert refused(put(tmp_path, data, "a.jsonl")) == message


def data_set(folder, train, test, metadata="metadata/metadata.json"):
    for split, entries in (("train", train), ("test", test)):
        if entries:
            (folder / split).mkdir(parents=True)
            put(folder / split, lines(*entries), "data.json.gz")
    (folder / metadata).parent.mkdir(exist_ok=True)
    (folder / metadata).write_text('{"freq": "1H", "prediction_length": 2}')


@pytest.mark.parametrize("metadata", ["metadata.json", "metadata/metadata.json"])
def test_a_data_set_is_read_whole(tmp_path, metadata):
    folder = tmp_path / "set"
    train = [entry("a", [1, 2], freq=None), entry("b", [1, 2], freq=None)]
    test = [entry("a", [1, 2, 3], freq=None), entry("a", [1, 2, 3, 4], freq=None), entry("b", [1, 2, 3], freq=None)]
    data_set(folder, train, test, metadata)
    found, left = read(folder)
    assert {name: len(own) for name, own in found.items()} == {"a": 4, "b": 3}
    assert ({str(own.frequency) for own in found.values()}, left) == ({"h"}, [])
    assert len(read(folder / "train")[0]["a"]) == 2
    found, _ = read(tmp_path)  # in a folder of data sets
    assert len(found["a"]) == 4


def test_a_data_set_of_train_alone_and_an_empty_one(tmp_path):
    data_set(tmp_path / "a", [entry("a")], [])
    assert list(read(tmp_path / "a")[0]) == ["a"]
    (tmp_path / "b" / "test").mkdir(parents=True)
    (tmp_path / "b" / "metadata.json").write_text("{}")
    assert refused(tmp_path / "b") == "b: no file of JSON is in test; copy or export it again."


def test_metadata_without_a_frequency_is_told(tmp_path, caplog):
    data_set(tmp_path, [entry("a", freq=None)], [], "metadata.json")
    (tmp_path / "metadata.json").write_text("{}")
    assert "neither it nor metadata.json tells the freq" in refused(tmp_path / "train")
    assert caplog.messages == [f"{tmp_path / 'metadata.json'}: tells no known freq; set frequency."]
