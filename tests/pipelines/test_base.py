"""The base of all pipelines, with a pipeline of numbers: order, budgets, bad records, whole files, error texts."""

import csv
import json
import os
import signal

import pytest

from vertebra.backbones.base import create_backbone
from vertebra.domains.dna.model import DNAClassifier
from vertebra.domains.dna.spec import DNASpec
from vertebra.errors import ConfigError, DataError, UnknownNameError
from vertebra.pipelines.base import Item, Pipeline, PipelineInterrupted, Writer, pipeline
from vertebra.pipelines.files import BadRecord
from vertebra.pipelines.prediction import Prediction
from vertebra.tokenizers.nucleotide import NucleotideTokenizer


@pytest.fixture(scope="module")
def model():
    facts = DNASpec(tokenizer=NucleotideTokenizer().to_dict(), task="classification", classes=("a", "b"), max_length=64)
    return DNAClassifier(create_backbone("hybrid_test"), facts)


class Rows(Writer):
    def __init__(self, outputs):
        self.table = csv.writer(outputs.open(outputs.target), lineterminator="\n")

    def write(self, item, prediction):
        self.table.writerow([item.record, prediction.value])


class Doubling(Pipeline):
    """Doubles the number in each line; ``fail`` says what happens in a batch."""

    name = "toy/double"

    def __init__(self, model, fail=lambda numbers: None, **options):
        super().__init__(model, device="cpu", **options)
        self.fail, self.batches = fail, []

    def read(self, path, bad):
        for line, text in enumerate(path.read_text().splitlines(), start=1):
            if text.isdigit():
                yield Item(file=str(path), record=f"r{line}", data=int(text), size=1 + int(text) % 7, line=line)
            elif text == "broken disk":
                raise OSError(5, "Input/output error")
            elif text == "end":
                raise DataError(f"{path}: ends in the middle; copy it again.")
            else:
                bad(BadRecord(file=str(path), record=f"r{line}", line=line, rule="is no number", advice="mend it"))

    def parse(self, value, index, bad):
        yield Item(file="", record=f"value_{index}", data=value, size=1)

    def predict(self, items):
        self.batches.append([item.size for item in items])
        self.fail([item.data for item in items])
        return [Prediction(2 * item.data, name=item.record) for item in items]

    def writer(self, outputs, several_files):
        return Rows(outputs)


def numbers(folder, values, name="in.txt"):
    path = folder / name
    path.write_text("".join(f"{v}\n" for v in values))
    return path


def raising(error, on):
    def fail(batch):
        if on in batch:
            raise error

    return fail


def rows(path):
    return [[name, int(value)] for name, value in csv.reader(path.read_text().splitlines())]


def errors(path):
    return [json.loads(line) for line in (path.parent / f"{path.name}.errors.jsonl").read_text().splitlines()]


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_order_is_kept_and_batches_are_under_the_budgets(model, tmp_path):
    values = [(i * 7919) % 1000 for i in range(1000)]
    work = Doubling(model, batch_size=9, batch_tokens=25)
    result = work.run([numbers(tmp_path, values)], tmp_path / "new" / "out.csv")
    assert rows(tmp_path / "new" / "out.csv") == [[f"r{i}", 2 * v] for i, v in enumerate(values, start=1)]
    assert (result.good, result.bad, names(tmp_path / "new")) == (1000, 0, ["out.csv"])
    assert all(len(sizes) <= 9 and len(sizes) * max(sizes) <= 25 for sizes in work.batches)
    assert len(work.batches) < 2 * sum(1 + v % 7 for v in values) / 25  # like lengths share a batch


def test_a_record_over_the_budget_runs_alone(model, tmp_path):
    work = Doubling(model, batch_tokens=2)
    work.run([numbers(tmp_path, [6, 0, 0])], tmp_path / "out.csv")
    assert sorted(work.batches) == [[1, 1], [7]]


def test_one_bad_record_in_10000_loses_nothing_else(model, tmp_path):
    out = tmp_path / "out.csv"
    work = Doubling(model, fail=raising(ValueError("a seven"), on=7_777))
    result = work.run([numbers(tmp_path, range(10_000))], out)
    assert rows(out) == [[f"r{i + 1}", 2 * i] for i in range(10_000) if i != 7_777]
    assert (result.good, result.bad) == (9_999, 1)
    (line,) = errors(out)
    assert line == {
        "file": str(tmp_path / "in.txt"), "record": "r7778", "line": 7778,
        "rule": "ValueError: a seven", "advice": "leave the record out, or report this",
    }  # fmt: skip
    assert str(result) == f"9,999 records done, 1 bad (listed in {out}.errors.jsonl); wrote {out}, {out}.errors.jsonl"
    assert Doubling(model).run([numbers(tmp_path, [1])], out).bad == 0
    assert names(tmp_path) == ["in.txt", "out.csv"]  # the list of the earlier run is gone


def test_a_failing_batch_is_halved_down_to_the_bad_record(model, tmp_path):
    work = Doubling(model, fail=raising(MemoryError(), on=14))
    result = work.run([numbers(tmp_path, range(0, 7 * 16, 7))], tmp_path / "out.csv")
    assert [len(b) for b in work.batches] == [16, 8, 4, 2, 2, 1, 1, 4, 8]
    assert (result.good, errors(tmp_path / "out.csv")[0]["rule"]) == (15, "does not fit into memory")


def test_a_bug_on_every_record_shows_its_exception_and_writes_nothing(model, tmp_path):
    def bug(batch):
        raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        Doubling(model, fail=bug).run([numbers(tmp_path, range(5))], tmp_path / "out.csv")
    assert names(tmp_path) == ["in.txt"]


def test_not_finite_is_bad(model, tmp_path):
    class Nan(Doubling):
        def predict(self, items):
            return [Prediction(i.data, {"x": float("nan") if i.data == 3 else 0.5}, i.record) for i in items]

    result = Nan(model).run([numbers(tmp_path, range(5))], tmp_path / "out.csv")
    assert (result.good, errors(tmp_path / "out.csv")[0]["rule"]) == (4, "the model's output is not finite")


def test_a_file_that_breaks_off_keeps_its_records_and_the_other_files(model, tmp_path):
    files = [numbers(tmp_path, [1, last, 9], f"{i}.txt") for i, last in enumerate(("end", "broken disk", 2))]
    result = Doubling(model).run(files, tmp_path / "out.csv")
    assert [value for _, value in rows(tmp_path / "out.csv")] == [2, 2, 2, 4, 18]
    assert result.bad == 2
    told = [(e["file"], e["rule"], e["advice"]) for e in errors(tmp_path / "out.csv")]
    assert told == [
        (str(files[0]), "ends in the middle", "copy it again"),
        (str(files[1]), "cannot be read (Input/output error)", "copy it again"),
    ]


def test_no_usable_record(model, tmp_path):
    out = tmp_path / "out.csv"
    with pytest.raises(DataError, match=r"^toy/double: the input holds no record; nothing written\.$"):
        Doubling(model).run([numbers(tmp_path, [])], out)
    with pytest.raises(DataError, match=r"in\.txt, record 'r1', line 1: is no number; mend it\.$"):
        Doubling(model).run([numbers(tmp_path, ["x"])], out)
    assert names(tmp_path) == ["in.txt"]
    with pytest.raises(DataError, match=r"none of 2 records could be used, all are listed in .*out\.csv\.errors"):
        Doubling(model).run([numbers(tmp_path, ["x", "y"])], out)
    assert names(tmp_path) == ["in.txt", "out.csv.errors.jsonl"]


def test_what_cannot_be_done_is_told_before_work(model, tmp_path):
    path, work = numbers(tmp_path, [1]), Doubling(model)
    (tmp_path / "folder.csv").mkdir()
    for inputs, out, kind, text in (
        ([path], path / "out.csv", ConfigError, r"^output: '.*out\.csv' cannot be written \(.*\); choose another"),
        ([path], tmp_path / "folder.csv", ConfigError, "must be a file, got the folder '.*folder.csv'; add a"),
        ([path], path, ConfigError, r"^output: '.*in\.txt' is also an input; choose another name\.$"),
        ([path], "out.xlsx", ConfigError, r"must end in \.csv, got 'out\.xlsx'; for example out\.csv\.$"),
        ([path], "out", ConfigError, r"must end in \.csv, got 'out'; for example out\.csv\.$"),
        ([], "out.csv", ConfigError, "no input file given; name at least one"),
        ([tmp_path / "none.txt"], "out.csv", DataError, r"none\.txt: no such file; check the name\.$"),
        ([tmp_path], "out.csv", DataError, "is a folder; name its files, as in"),
    ):  # fmt: skip
        with pytest.raises(kind, match=text):
            work.run(inputs, out)
    assert work.batches == []
    assert path.read_text() == "1\n"
    assert names(tmp_path) == ["folder.csv", "in.txt"]


def test_folders_where_a_pipeline_reads_them(model, tmp_path):
    class Foldered(Doubling):
        reads_folders = True

        def folder_files(self, folder):
            return sorted(f for f in folder.iterdir() if f.is_file())

    (tmp_path / "in").mkdir()
    first, *_ = [numbers(tmp_path, [0], "first.txt"), *(numbers(tmp_path / "in", [n], f"{n}.txt") for n in (2, 1))]
    out = tmp_path / "in" / "out.csv"
    for _ in range(2):  # its own output is no input of the next run
        Foldered(model).run([first, tmp_path / "in"], out)
        assert [value for _, value in rows(out)] == [0, 2, 4]
    out.unlink()
    assert [p.value for p in Foldered(model)(tmp_path / "in")] == [2, 4]
    with pytest.raises(DataError, match="is a folder; name its files, as in"):
        Doubling(model).run([tmp_path / "in"], tmp_path / "out.csv")


@pytest.mark.parametrize("how", ["ctrl-c", "sigterm"])
def test_an_interruption_keeps_what_is_finished(model, tmp_path, how):
    def stop(batch):
        if 64 in batch:
            if how == "ctrl-c":
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)

    out = tmp_path / "out.csv"
    out.write_text("older\n")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(PipelineInterrupted) as caught:
        Doubling(model, fail=stop, batch_size=2).run([numbers(tmp_path, ["bad", *range(1, 100)])], out)
    assert signal.getsignal(signal.SIGTERM) is before
    assert out.read_text() == "older\n"
    done = rows(tmp_path / "out.csv.partial")
    assert done == [[f"r{i + 1}", 2 * i] for i in range(1, len(done) + 1)]
    assert 0 < len(done) < 64
    assert (caught.value.result.good, caught.value.result.bad) == (len(done), 1)
    assert str(caught.value) == (
        f"toy/double: interrupted; the {len(done)} finished results are in {out}.partial, {out} is untouched."
    )
    assert names(tmp_path) == ["in.txt", "out.csv", "out.csv.errors.jsonl.partial", "out.csv.partial"]


def test_an_interruption_before_the_first_result_writes_nothing(model, tmp_path):
    work = Doubling(model, fail=raising(KeyboardInterrupt(), on=1))
    with pytest.raises(PipelineInterrupted, match="interrupted before the first result; nothing written"):
        work.run([numbers(tmp_path, [1])], tmp_path / "out.csv")
    assert names(tmp_path) == ["in.txt"]


def test_python_values_files_and_lists(model, tmp_path):
    work = Doubling(model)
    assert work(4).value == 8
    assert [p.value for p in work([4, 5])] == [8, 10]
    assert [p.value for p in work(numbers(tmp_path, [1]))] == [2]
    with pytest.raises(DataError, match="record 'r2', line 2: is no number; mend it"):
        work(numbers(tmp_path, [1, "x"]))
    with pytest.raises(ZeroDivisionError):  # a bug is not wrapped
        Doubling(model, fail=raising(ZeroDivisionError(), on=4))(4)


def test_error_texts_of_names_and_options(model):
    with pytest.raises(UnknownNameError, match=r"^unknown pipeline 'dna/clasify'\. Did you mean 'dna/classify'"):
        pipeline("dna/clasify", model)
    with pytest.raises(
        ConfigError, match=r"^dna/classify: no option 'treshold'\. Did you mean 'threshold'\? Options: "
    ):
        pipeline("dna/classify", model, treshold=0.5)
    with pytest.raises(ConfigError, match=r"^toy/double: batch_size must be at least 1, got 0\.$"):
        Doubling(model, batch_size=0)
    with pytest.raises(ConfigError, match=r"^toy/double: no model given and it has no default; pass --model NAME\|DIR"):
        Doubling(None)
    with pytest.raises(ConfigError, match=r"device 'gpu' cannot be used \(.*\); pass --device auto or cpu\.$"):
        pipeline("dna/classify", model, device="gpu")
