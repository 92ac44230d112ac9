"""What all pipelines share: files in, files out, in order, whole, whatever single records do.

A pipeline reads records (``read``), batches them by length under a token budget, runs the model (``predict``), joins
parts of long records (``join``) and writes results in input order (``writer``). Records that cannot be used are listed
in ``OUT.errors.jsonl`` and the others go on. Memory is bounded by the pool of records that are sorted by length, not
by the input.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import inspect
import math
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from vertebra.backbones.catalog import bundled_models
from vertebra.errors import ConfigError, DataError, VertebraError
from vertebra.pipelines.catalog import pipeline_info
from vertebra.pipelines.files import BadRecord, ErrorLog, Outputs, told_as_config_error
from vertebra.pipelines.prediction import Prediction
from vertebra.pipelines.progress import progress_bar

if TYPE_CHECKING:
    import torch

    from vertebra.domains.model import DomainModel

POOL_BATCHES = 16
"""Records that are sorted by length together, in batches: more pads less, fewer loses less on an interruption."""

Bad = Callable[[BadRecord], None]


@dataclass(kw_only=True, eq=False)
class Item:
    """One record, or one part of a long one, on its way to the model.

    Args:
        file: The input file; empty for a value given in Python.
        record: Name of the record.
        data: What ``predict`` takes.
        size: Positions it takes up in a batch.
        weight: Its share of the progress bar, in the pipeline's ``unit``.
        line: Line of the file where the record begins.
        first: False for a further part of the record before it: a record is listed as bad once, whatever its parts.
    """

    file: str
    record: str
    data: Any
    size: int
    weight: float = 1.0
    line: int | None = None
    first: bool = True


@dataclass(frozen=True)
class RunResult:
    """What ``run`` did.

    Args:
        good: Number of records whose result is written.
        bad: Number of records listed in ``OUT.errors.jsonl``.
        paths: Files written, the main one first.
    """

    good: int
    bad: int
    paths: list[Path] = field(default_factory=list)

    def __str__(self) -> str:
        listed = next((p for p in self.paths if ".errors.jsonl" in p.name), "")
        bad = f", {self.bad:,} bad (listed in {listed})" if self.bad else ""
        return f"{self.good:,} records done{bad}; wrote {', '.join(self._written())}"

    def _written(self) -> Iterator[str]:
        """Name the files; many in a folder beside the main one are counted instead."""
        beside = Counter(path.parent for path in self.paths if path.parent != self.paths[0].parent)
        told = set()
        for path in self.paths:
            if (count := beside[path.parent]) <= 3:
                yield str(path)
            elif path.parent not in told:
                told.add(path.parent)
                yield f"{count:,} files in {path.parent}"


class PipelineInterrupted(KeyboardInterrupt):
    """The user stopped a run; the text says where the finished results are, ``result`` holds the same."""

    def __init__(self, text: str, result: RunResult) -> None:
        super().__init__(text)
        self.result = result


class Writer(ABC):
    """Writes results in the order they come."""

    @abstractmethod
    def write(self, item: Item, prediction: Prediction) -> None:
        """Write the result of one record."""

    def finish(self) -> None:  # noqa: B027 - most writers have nothing left at the end
        """Write what can only be written at the end."""


class Pipeline(ABC):
    """Base of all pipelines.

    Args:
        model: A model directory, the name of a bundled model, ``hf-hub:ORG/NAME``, or a model; None means the
            pipeline's default.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ...
        batch_size: Most records in a batch.
        batch_tokens: Most positions in a batch, padding counted; a longer record runs alone.

    Raises:
        ConfigError: A setting is impossible, no model is given and none bundled, or the model does another task.
    """

    name: ClassVar[str] = "pipeline"
    default_model: ClassVar[str] = ""
    tasks: ClassVar[tuple[str, ...]] = ()
    """Tasks of the models that it can use; empty for all."""
    endings: ClassVar[tuple[str, ...]] = (".csv",)
    """Endings of output files that it can write."""
    unit: ClassVar[str] = "records"
    hourly: ClassVar[bool] = False
    """Whether the progress bar tells the work of an hour, not of a second."""
    needs_input: ClassVar[bool] = True
    needs_model: ClassVar[bool] = True
    """Whether there must be a model; ``model`` is not set where none is needed and none given."""
    reads_folders: ClassVar[bool] = False
    """Whether an input may be a folder, whose files ``folder_files`` lists."""
    pool_batches: ClassVar[int] = POOL_BATCHES
    """Batches of records that are sorted by length together; 1 where all are of one length."""

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("batch_tokens", batch_tokens)):
            if value < 1:
                raise ConfigError(f"{self.name}: {name} must be at least 1, got {value}.")
        self.batch_size, self.batch_tokens = batch_size, batch_tokens
        self.device = _device(device, self.name)
        self.advance: Callable[[float], None] = _nowhere
        """Moves the progress bar of a run, for a ``predict`` that takes long; its items have the weight 0."""
        if model is None and not self.needs_model:
            return
        self.model = self._load(model).to(self.device).eval()
        if self.tasks and self.model.task not in self.tasks:
            raise ConfigError(
                f"{self.name}: needs a model of the task {' or '.join(self.tasks)}, got one of {self.model.task} "
                f"({type(self.model).__name__}); pass another --model."
            )

    # ---------------------------------------------------------------- what a subclass defines

    @abstractmethod
    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the records of a file in order; report unusable ones to ``bad``.

        Raises:
            DataError: The file as a whole cannot be read.
        """

    @abstractmethod
    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the record that a Python value (not a file) stands for; ``index`` numbers nameless ones from 1."""

    @abstractmethod
    def predict(self, items: list[Item]) -> list[Prediction]:
        """Run the model on one batch; an error in place of a prediction marks its record as bad."""

    @abstractmethod
    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the output files; ``several_files`` asks for a column that names the input file."""

    def prepared(self, items: Iterator[Item], bad: Bad) -> Iterator[Item]:
        """Yield the items after a look at all of them, for pipelines that learn from their input."""
        return items

    def join(self, item: Item, part: Prediction | None) -> Prediction | None:
        """Return the record's prediction once its last part is in; None for a part on the way, or a bad one."""
        return part

    def without_input(self, bad: Bad) -> Iterator[Item]:
        """Yield the records of a run without input files, for pipelines that need none."""
        raise ConfigError(f"{self.name}: no input file given; name at least one.")

    def folder_files(self, folder: Path) -> list[Path]:
        """List the files of a folder that are read, in order, for pipelines with ``reads_folders``.

        Raises:
            DataError: There are none.
        """
        raise TypeError(f"{type(self).__name__} reads no folders.")

    def input_files(self, inputs: list[Path], target: Path) -> list[Path]:
        """List the files that the inputs of a run stand for; what an earlier run wrote into a folder is left out.

        Args:
            inputs: Files and folders, all of which exist.
            target: The output file.
        """
        files: list[Path] = []
        for path in inputs:
            if path.is_dir():
                files += [f for f in self.folder_files(path) if not _is_output(f, target)]
            else:
                files.append(path)
        return files

    def planned(self) -> float | None:
        """How much work a run without input files is, in ``unit``; None when unknown."""
        return None

    def amount(self, path: Path) -> float | None:
        """How much work a file is, in ``unit``, at a glance; None when unknown."""
        return None

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options; ``from_args`` reads them."""
        group = parser.add_argument_group("model")
        default = f"the bundled {cls.default_model}" if cls.default_model else "none"
        group.add_argument("--model", metavar="NAME|DIR", help=f"model to use (default: {default})")
        group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
        group.add_argument("--batch-size", type=int, default=64, metavar="N", help="most records at once (default: 64)")
        group.add_argument(
            "--batch-tokens", type=int, default=32_768, metavar="N",
            help="most positions at once, padding counted (default: 32768)",
        )  # fmt: skip

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Pipeline:
        """Make the pipeline from what ``add_arguments`` parsed."""
        names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]
        return cls(**{name: getattr(args, name) for name in names if hasattr(args, name)})

    # ---------------------------------------------------------------- what a user calls

    def __call__(self, value: Any) -> Prediction | list[Prediction]:
        """Predict for a value, a file, or a list of them.

        Args:
            value: A record (a sequence, ...) gives one prediction; a path gives a list, one for each record of the
                file, or of a folder's files; a list gives a list.

        Raises:
            DataError: A record cannot be used; ``run`` goes on instead.
        """
        if isinstance(value, list | tuple):
            return list(self._predictions(value))
        found = list(self._predictions([value]))
        return found if self._is_path(value) else found[0]

    def run(self, inputs: Iterable[str | Path], output: str | Path, *, progress: bool = True) -> RunResult:
        """Read files, write results.

        Args:
            inputs: Input files, read in this order; folders, where the pipeline reads them.
            output: The output file; its ending says the format. Written whole or not at all.
            progress: Show a progress bar where the error stream is a terminal.

        Raises:
            ConfigError: The output cannot be written, or its ending is unknown.
            DataError: A file is missing, or no record at all could be used.
            PipelineInterrupted: Ctrl-C; finished results are in ``OUT.partial``.
        """
        given, target = [Path(p) for p in inputs], Path(output)
        self._check_files(given, target)
        paths = self.input_files(given, target)
        total = self._total(paths) if given else self.planned()
        with Outputs(target) as outputs, told_as_config_error(target):
            errors = ErrorLog(outputs)
            flow = _Flow(self, errors.add)
            writer = self.writer(outputs, len(paths) > 1)
            records = self._read_all(paths, errors.add) if given else self.without_input(errors.add)
            good = 0
            try:
                with (
                    progress_bar(self.name, total, self.unit, hourly=self.hourly, show=progress) as advance,
                    _stop_gently(),
                ):
                    self.advance = advance
                    for item, part in flow.results(self.prepared(records, errors.add)):
                        if (prediction := self.join(item, part)) is not None:
                            writer.write(item, prediction)
                            good += 1
                        advance(item.weight)
                writer.finish()
            except KeyboardInterrupt:
                raise self._keep_partial(outputs, writer, good, errors) from None
            finally:
                self.advance = _nowhere
            if not good:
                self._give_up(outputs, errors, flow)
            if not errors.count:
                errors.path.unlink(missing_ok=True)  # of an earlier run to the same output
            return RunResult(good, errors.count, outputs.commit())

    # ---------------------------------------------------------------- inside

    def _load(self, model: str | Path | DomainModel | None) -> DomainModel:
        if model is None:
            if self.default_model not in bundled_models():
                what = (
                    f"its default {self.default_model!r} is not bundled" if self.default_model else "it has no default"
                )
                raise ConfigError(
                    f"{self.name}: no model given and {what}; pass --model NAME|DIR, for example the folder that "
                    "`vertebra fit` wrote."
                )
            model = self.default_model
        if isinstance(model, str | Path):
            from vertebra.domains.saving import load_model

            return load_model(str(model))
        return model

    def _is_path(self, value: Any) -> bool:
        if not isinstance(value, str):
            return isinstance(value, Path)
        with contextlib.suppress(OSError, ValueError):  # a long sequence is no name that a file could have
            return Path(value).is_file() or (self.reads_folders and Path(value).is_dir())
        return False

    def _predictions(self, values: Iterable[Any]) -> Iterator[Prediction]:
        def refuse(bad: BadRecord) -> None:
            raise DataError(str(bad))

        def items() -> Iterator[Item]:
            for index, value in enumerate(values, start=1):
                if self._is_path(value):
                    path = Path(value)
                    files = self.folder_files(path) if self.reads_folders and path.is_dir() else [path]
                    for file in files:
                        yield from self.read(file, refuse)
                else:
                    yield from self.parse(value, index, refuse)

        for item, part in _Flow(self, refuse, isolate=False).results(self.prepared(items(), refuse)):
            if (prediction := self.join(item, part)) is not None:
                yield prediction

    def _read_all(self, paths: list[Path], bad: Bad) -> Iterator[Item]:
        for path in paths:
            try:
                yield from self.read(path, bad)
            except DataError as error:  # the rest of this file is lost, the other files are not
                bad(as_bad(error, file=str(path)))
            except OSError as error:
                rule = f"cannot be read ({error.strerror or error})"
                bad(BadRecord(file=str(path), record="", line=None, rule=rule, advice="copy it again"))

    def _check_files(self, paths: list[Path], target: Path) -> None:
        if not paths and self.needs_input:
            raise ConfigError(f"{self.name}: no input file given; name at least one.")
        for path in paths:
            if path.is_dir() and not self.reads_folders:
                raise DataError(f"{path}: is a folder; name its files, as in {path}/*.")
            if not path.exists():
                raise DataError(f"{path}: no such file; check the name.")
            if target.exists() and target.samefile(path):
                raise ConfigError(f"output: {str(target)!r} is also an input; choose another name.")
        if target.suffix not in self.endings and not target.is_dir():
            raise ConfigError(
                f"{self.name}: the output must end in {' or '.join(self.endings)}, got {target.name!r}; "
                f"for example {target.stem or 'out'}{self.endings[0]}."
            )

    def _total(self, paths: list[Path]) -> float | None:
        amounts = [self.amount(path) for path in paths]
        return None if None in amounts else math.fsum(a for a in amounts if a is not None)

    def _keep_partial(self, outputs: Outputs, writer: Writer, good: int, errors: ErrorLog) -> PipelineInterrupted:
        if not good:
            return PipelineInterrupted(
                f"{self.name}: interrupted before the first result; nothing written.", RunResult(0, 0)
            )
        writer.finish()
        paths = outputs.commit(".partial")
        text = (
            f"{self.name}: interrupted; the {good:,} finished results are in {paths[0]}, {outputs.target} is untouched."
        )
        return PipelineInterrupted(text, RunResult(good, errors.count, paths))

    def _give_up(self, outputs: Outputs, errors: ErrorLog, flow: _Flow) -> None:
        if flow.crash is not None:
            raise flow.crash  # every record failed and not for its own fault: a bug shall show its traceback
        if errors.first is None:
            raise DataError(f"{self.name}: the input holds no record; nothing written.")
        if errors.count == 1:
            raise DataError(str(errors.first))
        outputs.keep_only(errors.path)
        outputs.commit()
        raise DataError(
            f"{self.name}: none of {errors.count:,} records could be used, all are listed in {errors.path}; "
            f"the first: {errors.first}"
        )


class _Flow:
    """Records to predictions, in order, through batches of like length."""

    def __init__(self, pipeline: Pipeline, bad: Bad, isolate: bool = True) -> None:
        self.pipeline, self.bad, self.isolate = pipeline, bad, isolate
        self.crash: Exception | None = None
        self._told = False  # whether the record at hand is reported

    def results(self, items: Iterator[Item]) -> Iterator[tuple[Item, Prediction | None]]:
        """Yield every item with its prediction, or None where it was reported as bad."""
        for pool in self._pools(items):
            answers: dict[int, Prediction] = {}
            for batch in self._batches(pool):
                answers.update(zip(batch, self._predict([pool[i] for i in batch]), strict=True))
            for index, item in enumerate(pool):
                yield item, self._checked(item, answers[index])

    def _pools(self, items: Iterator[Item]) -> Iterator[list[Item]]:
        pool: list[Item] = []
        size = 0
        for item in items:
            pool.append(item)
            size += item.size
            if (
                size >= self.pipeline.pool_batches * self.pipeline.batch_tokens
                or len(pool) >= self.pipeline.pool_batches * self.pipeline.batch_size
            ):
                yield pool
                pool, size = [], 0
        if pool:
            yield pool

    def _batches(self, pool: list[Item]) -> Iterator[list[int]]:
        batch: list[int] = []
        longest = 0
        for index in sorted(range(len(pool)), key=lambda i: pool[i].size):
            longest = pool[index].size
            full = len(batch) >= self.pipeline.batch_size or longest * (len(batch) + 1) > self.pipeline.batch_tokens
            if batch and full:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _predict(self, items: list[Item]) -> list[Any]:
        """Predict a batch; when that fails, halves of it, down to the records at fault, which give their error."""
        try:
            return list(self.pipeline.predict(items))
        except Exception as error:
            if not self.isolate:
                raise
            if len(items) == 1:
                return [error]
        half = len(items) // 2
        return self._predict(items[:half]) + self._predict(items[half:])

    def _checked(self, item: Item, answer: Prediction | Exception) -> Prediction | None:
        self._told = self._told and not item.first
        if isinstance(answer, Prediction):
            if _finite(answer):
                return answer
            answer = DataError(f"{item.record}: the model's output is not finite; leave the record out or use float32")
        if not isinstance(answer, VertebraError) and self.crash is None and not _out_of_memory(answer):
            self.crash = answer
        if not self._told:
            self.bad(as_bad(answer, file=item.file, record=item.record, line=item.line))
        self._told = True
        return None


def pipeline(name: str, model: str | Path | DomainModel | None = None, **options: Any) -> Pipeline:
    """Make a pipeline.

    Args:
        name: ``domain/verb``, such as ``dna/classify``; ``vertebra list pipelines`` shows all.
        model: A model directory, the name of a bundled model, ``hf-hub:ORG/NAME``, or a model; None means the
            pipeline's default.
        **options: Further arguments of the pipeline's class.

    Raises:
        UnknownNameError: No such pipeline.
        ConfigError: No such option, or an impossible value.
    """
    cls = pipeline_class(name)
    known = [p for p in inspect.signature(cls.__init__).parameters if p not in ("self", "model")]
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ConfigError(f"{name}: no option {option!r}.{hint} Options: {', '.join(known)}.")
    return cls(model, **options)


def pipeline_class(name: str) -> type[Pipeline]:
    """Return the class of a pipeline, importing its file.

    Raises:
        UnknownNameError: No such pipeline.
    """
    info = pipeline_info(name)
    cls = getattr(import_module(info.module), info.class_name)
    assert isinstance(cls, type)
    assert issubclass(cls, Pipeline)
    return cls


def as_bad(error: Exception, *, file: str, record: str = "", line: int | None = None) -> BadRecord:
    """Say an error in the terms of ``OUT.errors.jsonl``; facts the error carries win over those given."""
    if _out_of_memory(error):
        rule, advice = "does not fit into memory", "cut the record, or pass a smaller --batch-tokens"
    else:
        text = str(error).strip().rstrip(".") or type(error).__name__
        for known in (f"{file}: ", f"{record}: "):
            text = text.removeprefix(known) if len(known) > 2 else text
        rule, _, advice = text.rpartition("; ") if "; " in text and isinstance(error, VertebraError) else (text, "", "")
        if not isinstance(error, VertebraError):
            rule, advice = f"{type(error).__name__}: {rule.splitlines()[0]}", "leave the record out, or report this"
    return BadRecord(
        file=str(getattr(error, "file", "") or file),
        record=str(getattr(error, "record", "") or record),
        line=getattr(error, "line", None) or line,
        rule=str(getattr(error, "rule", "") or rule),
        advice=str(getattr(error, "advice", "") or advice),
    )


def _is_output(path: Path, target: Path) -> bool:
    """Whether a file is, by its name, what a run to ``target`` writes."""
    return path.name.startswith(target.name) and path.parent.resolve() == target.parent.resolve()


def _nowhere(amount: float) -> None:
    """Stand in for a progress bar where there is none."""


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "allocate memory" in str(error)


def _finite(prediction: Prediction) -> bool:
    value = prediction.value
    if isinstance(value, np.ndarray) and value.dtype.kind == "f" and not np.isfinite(value).all():
        return False
    return all(math.isfinite(score) for score in prediction.scores.values())


def _device(name: str, who: str) -> torch.device:
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ConfigError(f"{who}: device {name!r} cannot be used ({reason}); pass --device auto or cpu.") from error
    return device


class _stop_gently:  # noqa: N801 - reads as a statement
    """Turn SIGTERM, as batch systems send it, into KeyboardInterrupt, so that finished results are kept."""

    def __enter__(self) -> None:
        self.main = threading.current_thread() is threading.main_thread()
        if self.main:
            self.before = signal.signal(signal.SIGTERM, _interrupt)

    def __exit__(self, *_: object) -> None:
        if self.main:
            signal.signal(signal.SIGTERM, self.before)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
