"""DNA data modules: labelled sequences, and genomes for language models.

Everything is tokenized once into one array of bytes; batches are cut out of it without a loop over items.
"""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from vertebra.domains.base import BaseData, Items, Split
from vertebra.domains.dna.formats import Record, find_tables, read_sequences
from vertebra.domains.dna.labelled import (
    Labelled,
    class_names,
    encode_labels,
    parse_numbers,
    read_labelled,
    read_unlabelled,
    record_groups,
    share_out,
)
from vertebra.domains.dna.spec import DNASpec, Kind
from vertebra.domains.dna.splits import Leakage, identity_groups, leakage
from vertebra.domains.dna.tokens import Ints, LabelledItems, PromptedItems, TokenArray, WindowItems
from vertebra.domains.spec import DataSpec
from vertebra.errors import ConfigError, DataError
from vertebra.tokenizers.base import tokenizer_from_dict
from vertebra.tokenizers.nucleotide import DNATokenizer, KmerTokenizer, NucleotideTokenizer

log = logging.getLogger("vertebra")

Paths = str | Sequence[str]
_SEQUENCE_FILE = re.compile(r"\.(fa|fna|ffn|fasta|fq|fastq|gb|gbk|gbff|genbank|embl)(\.gz)?$", re.IGNORECASE)


class DNASequenceData(BaseData):
    """Sequences with a class, several labels, or a number.

    Exactly one source: ``root``, ``positives`` with ``negatives``, or ``file``. Without files of their own, validation
    and test sequences are taken from the training file.

    Args:
        root: Folder in the GUE layout: ``train.csv``, ``dev.csv`` (or ``valid.csv``, ``val.csv``), ``test.csv``.
        positives: FASTA or FASTQ file, or several, of class ``positive``.
        negatives: The same for class ``negative``.
        file: CSV or TSV with the columns ``sequence`` and ``label``; several labels are separated by ``;``.
        val_file: The same for validation.
        test_file: The same for testing.
        predict_file: FASTA, FASTQ, CSV or TSV to predict.
        task: What the labels are; ``auto`` reads it from them.
        split: How to take validation and test sequences: ``identity`` keeps similar sequences on one side, ``random``
            shares out single sequences, ``record`` keeps sequences whose names agree up to the first ``:`` together.
        val_fraction: Share for validation.
        test_fraction: Share for testing, where there are no folds.
        folds: Number of cross-validation folds, fixed by ``seed``; 0 for none.
        fold: Fold that is the test set, from 0.
        k: Bases a token; above 1 for k-mers.
        stride: Bases from token to token, 1 or k.
        max_length: Longest input in tokens; None for the longest training sequence.
        crop: Part of longer sequences to keep; ``random`` in training, then the centre in evaluation.
        reverse_complement: Probability of reading a training sequence from the other strand.
        batch_size: Sequences in a batch.
        max_tokens: Positions in a batch, padding included.
        num_workers: Worker processes.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of splits, order and augmentation.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        positives: Paths | None = None,
        negatives: Paths | None = None,
        file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        task: Literal["auto", "classification", "multilabel", "regression"] = "auto",
        split: Literal["identity", "random", "record"] = "identity",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        folds: int = 0,
        fold: int = 0,
        k: int = 1,
        stride: int = 1,
        max_length: int | None = None,
        crop: Literal["left", "centre", "right", "random"] = "centre",
        reverse_complement: float = 0.0,
        batch_size: int = 32,
        max_tokens: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, max_tokens=max_tokens, num_workers=num_workers, pin_memory=pin_memory, seed=seed
        )
        if (positives is None) != (negatives is None):
            given, other = ("positives", "negatives") if negatives is None else ("negatives", "positives")
            raise ConfigError(f"DNASequenceData: {given} needs {other}; give both files.")
        sources = [n for n, v in (("root", root), ("positives", positives), ("file", file)) if v is not None]
        if len(sources) > 1 or not (sources or predict_file or test_file):
            raise ConfigError(
                f"DNASequenceData: give one of root, positives with negatives, or file, got "
                f"{' and '.join(sources) or 'none'}."
            )
        if (folds and not 0 <= fold < folds) or folds == 1 or folds < 0:
            raise ConfigError(
                f"DNASequenceData: fold must be from 0 to folds - 1 and folds at least 2, got {fold} of {folds}."
            )
        if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
            raise ConfigError(
                f"DNASequenceData: val_fraction and test_fraction must be from 0 and below 1 together, got "
                f"{val_fraction} and {test_fraction}."
            )
        self.root, self.positives, self.negatives = root, _paths(positives), _paths(negatives)
        self.file, self.val_file, self.test_file, self.predict_file = file, val_file, test_file, predict_file
        self.task, self.split, self.folds, self.fold = task, split, folds, fold
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        self.tokenizer = make_tokenizer(k, stride)
        self.max_length, self.crop, self.reverse_complement = max_length, crop, reverse_complement
        self.leakage: dict[str, Leakage] = {}
        """What of validation and test is similar to a training sequence; after ``setup``."""

    def hint(self, split: Split) -> str:
        """What to do when a split is missing."""
        option = {"train": "root, positives and negatives, or file", "predict": "predict_file"}.get(split)
        return f"give {option or f'{split}_file, or {split}_fraction above 0'}."

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """Read the files, split them, tokenize."""
        known = spec if isinstance(spec, DNASpec) else None
        tables: dict[str, Labelled] = {}
        if splits - {"predict"}:
            tables = self._tables()
        if "predict" in splits and self.predict_file:
            tables["predict"] = read_unlabelled(self.predict_file)
        if known is None:
            if "train" not in tables:
                raise DataError(f"DNASequenceData: no train data to learn the classes from; {self.hint('train')}")
            known = self._make_spec(tables["train"])
            if "train" in splits:
                self._check_leakage(tables)
        tokenizer = tokenizer_from_dict(known.tokenizer)
        assert isinstance(tokenizer, DNATokenizer)
        return known, {name: self._items(table, known, tokenizer, name) for name, table in tables.items()}

    def _items(self, table: Labelled, spec: DNASpec, tokenizer: DNATokenizer, name: str) -> Items:
        training = name == "train"
        return LabelledItems(
            TokenArray.encode(table.sequences, tokenizer),
            table.names,
            None if name == "predict" else encode_labels(table.labels, spec),
            max_length=spec.max_length,
            crop=self.crop if training or self.crop != "random" else "centre",
            strand_probability=self.reverse_complement if training else 0.0,
            seed=self.seed,
        )

    def _tables(self) -> dict[str, Labelled]:
        if self.root is not None:
            found = find_tables(self.root)
            tables = {"train": read_labelled(found.train)}
            tables |= {name: read_labelled(p) for name, p in (("val", found.dev), ("test", found.test)) if p}
        elif self.positives:
            tables = {"train": read_class(self.negatives, "negative") + read_class(self.positives, "positive")}
        else:
            tables = {"train": read_labelled(self.file)} if self.file else {}
        for name, path in (("val", self.val_file), ("test", self.test_file)):
            if path:
                tables[name] = read_labelled(path)
        if "train" not in tables:
            return tables
        if self.folds and "test" in tables:
            raise ConfigError("DNASequenceData: folds make the test set, but there is a test file; remove one of them.")
        if "test" not in tables and (self.folds or self.test_fraction):
            shares = [1 / self.folds] * self.folds if self.folds else [self.test_fraction, 1 - self.test_fraction]
            part = self._share_out(tables["train"], shares)
            chosen = part == (self.fold if self.folds else 0)
            tables["test"], tables["train"] = tables["train"].take(chosen), tables["train"].take(~chosen)
        if "val" not in tables and self.val_fraction:
            chosen = self._share_out(tables["train"], [self.val_fraction, 1 - self.val_fraction]) == 0
            tables["val"], tables["train"] = tables["train"].take(chosen), tables["train"].take(~chosen)
        for name, table in tables.items():
            if not len(table):
                raise DataError(
                    f"DNASequenceData: the {name} split must not be empty; give more data or another share."
                )
        return tables

    def _share_out(self, table: Labelled, shares: Sequence[float]) -> Ints:
        if self.split == "identity":
            groups = identity_groups(table.sequences)
        else:
            groups = record_groups(table.names) if self.split == "record" else np.arange(len(table))
        return share_out(table.labels, groups, shares, self.seed)

    def _make_spec(self, train: Labelled) -> DNASpec:
        task: Kind = train.kind if self.task == "auto" else self.task
        longest = len(self.tokenizer.encode(max(train.sequences, key=len)))
        length = min(longest, self.max_length) if self.max_length else longest
        tokenizer = self.tokenizer.to_dict()
        if task == "regression":
            numbers = parse_numbers(train.labels)
            return DNASpec(
                tokenizer=tokenizer,
                task=task,
                max_length=length,
                targets=train.targets,
                target_mean=tuple(numbers.mean(0, dtype=np.float64).tolist()),
                target_std=tuple(np.maximum(numbers.std(0, dtype=np.float64), 1e-8).tolist()),
            )
        classes = class_names(train.labels, task)
        if len(classes) < 2 and task == "classification":
            raise DataError(
                f"DNASequenceData: there must be at least two classes in training, got {', '.join(classes)}."
            )
        return DNASpec(tokenizer=tokenizer, task=task, max_length=length, classes=classes)

    def _check_leakage(self, tables: Mapping[str, Labelled]) -> None:
        for name in ("val", "test"):
            if name in tables:
                self.leakage[name] = leakage(tables["train"].sequences, tables[name].sequences)
        for name, found in self.leakage.items():
            if found.similar:
                log.warning(
                    "leakage: %d of %d %s sequences (%.1f %%) are similar to a training sequence, %d equal; "
                    "scores will flatter. `split: identity` keeps them apart.",
                    found.similar,
                    found.sequences,
                    name,
                    100 * found.share,
                    found.exact,
                )


class DNAElementData(DNASequenceData):
    """Short elements with labels, for a language model that generates them: ``[BOS] labels bases [SEP]``.

    The files and splits of ``DNASequenceData``. A class is one label token, several labels are several; numbers
    (activities) are cut into bins with as many training sequences each, ``TARGET:1`` the lowest.

    Args:
        root: See ``DNASequenceData``.
        positives: See ``DNASequenceData``.
        negatives: See ``DNASequenceData``.
        file: See ``DNASequenceData``.
        val_file: See ``DNASequenceData``.
        test_file: See ``DNASequenceData``.
        predict_file: FASTA, FASTQ, CSV or TSV whose sequences get a likelihood, without labels.
        split: See ``DNASequenceData``.
        val_fraction: See ``DNASequenceData``.
        test_fraction: See ``DNASequenceData``.
        bins: Bins of a number.
        label_dropout: Share of training sequences that stand without their labels, so that the model can generate
            without any.
        max_length: Longest input in tokens, special ones included; None for the longest training sequence.
        batch_size: Sequences in a batch.
        max_tokens: Positions in a batch, padding included.
        num_workers: Worker processes.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of splits, order and dropped labels.
    """

    def __init__(
        self,
        *,
        root: str | None = None,
        positives: Paths | None = None,
        negatives: Paths | None = None,
        file: str | None = None,
        val_file: str | None = None,
        test_file: str | None = None,
        predict_file: str | None = None,
        split: Literal["identity", "random", "record"] = "identity",
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        bins: int = 4,
        label_dropout: float = 0.1,
        max_length: int | None = None,
        batch_size: int = 64,
        max_tokens: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            root=root,
            positives=positives,
            negatives=negatives,
            file=file,
            val_file=val_file,
            test_file=test_file,
            predict_file=predict_file,
            split=split,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            max_length=max_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            num_workers=num_workers,
            pin_memory=pin_memory,
            seed=seed,
        )
        if bins < 2:
            raise ConfigError(f"DNAElementData: bins must be at least 2, got {bins}.")
        if not 0 <= label_dropout <= 1:
            raise ConfigError(f"DNAElementData: label_dropout must be from 0 to 1, got {label_dropout}.")
        self.bins, self.label_dropout = bins, label_dropout

    def _make_spec(self, train: Labelled) -> DNASpec:
        edges: tuple[float, ...] = ()
        if train.kind == "regression":
            numbers = parse_numbers(train.labels)
            shares = np.arange(1, self.bins) / self.bins
            edges = tuple(np.quantile(numbers, shares, axis=0).T.ravel().tolist())
            targets = train.targets if len(train.targets) == numbers.shape[1] else ("label",)
            classes = tuple(f"{target}:{i + 1}" for target in targets for i in range(self.bins))
        else:
            classes = class_names(train.labels, train.kind)
        several = max(len(parts) for parts in self._label_parts(train)) if train.labels else 0
        longest = max(map(len, train.sequences)) + 2 + several
        length = min(longest, self.max_length) if self.max_length else longest
        tokenizer = self.tokenizer.to_dict()
        return DNASpec(
            tokenizer=tokenizer, task="lm", max_length=length, classes=classes, bos=True, eos=True, bin_edges=edges
        )

    def _label_parts(self, table: Labelled) -> list[list[str]]:
        """Labels of every sequence, as text."""
        if table.kind == "classification":
            return [[label] for label in table.labels]
        return [[part.strip() for part in label.split(";") if part.strip()] for label in table.labels]

    def _items(self, table: Labelled, spec: DNASpec, tokenizer: DNATokenizer, name: str) -> Items:
        if not table.labels:
            labels: list[tuple[int, ...]] = [()] * len(table)
        elif spec.bin_edges:
            numbers = parse_numbers(table.labels)
            edges = np.array(spec.bin_edges).reshape(numbers.shape[1], -1)
            per_target = edges.shape[1] + 1
            columns = range(len(edges))
            bins = [np.searchsorted(edges[i], numbers[:, i], side="right") + i * per_target for i in columns]
            labels = [tuple(map(int, row)) for row in np.stack(bins, axis=1)]
        else:
            number = {label: i for i, label in enumerate(spec.classes)}
            parts = self._label_parts(table)
            unknown = sorted({part for row in parts for part in row} - number.keys())
            if unknown:
                raise DataError(
                    f"labels: every label must be one of {', '.join(spec.classes)}, got {unknown[0]!r}; is the file of "
                    "another task?"
                )
            labels = [tuple(sorted(number[part] for part in row)) for row in parts]
        tokens = TokenArray.encode(table.sequences, tokenizer)
        dropout = self.label_dropout if name == "train" else 0.0
        return PromptedItems(tokens, table.names, labels, spec.max_length, dropout, self.seed)


class DNALanguageData(BaseData):
    """Genomes, or many shorter sequences, for a language model.

    Rows of ``length`` tokens: windows of long records; short records and reads are packed several to a row, and never
    see each other.

    Args:
        files: FASTA, FASTQ (gz too), GenBank or EMBL: a file, a folder, a pattern, or a list of these.
        val: What to validate on: the last share of every record, or a list of record names, of ranges
            ``NAME:BEGIN-END`` (bases from 0, the end not included), or of files.
        test: The same for testing; shares of ``test`` lie behind those of ``val``.
        length: Tokens in a row.
        bos: Whether every window begins with ``[BOS]``, so that its first base is predicted too.
        eval_stride: Distance of windows in evaluation; every base counts once, with at least ``length - eval_stride``
            bases before it, except at the beginning of a record. None for half of ``length``.
        k: Bases a token; above 1 for k-mers side by side.
        reverse_complement: Probability of reading a training window from the other strand.
        rename_letters: Probability that a training window's A, C, G, T are exchanged for each other by a random
            permutation. It teaches to adapt to a genome of other composition from its context, where little is known
            of other genomes. Single nucleotides only.
        predict_file: FASTA or FASTQ whose sequences get a likelihood.
        batch_size: Rows in a batch.
        max_tokens: Positions in a batch.
        num_workers: Worker processes.
        pin_memory: Whether to copy batches into page-locked memory.
        seed: Seed of order, shifts and strands.
    """

    def __init__(
        self,
        files: Paths,
        *,
        val: float | list[str] = 0.1,
        test: float | list[str] = 0.1,
        length: int = 1024,
        bos: bool = True,
        eval_stride: int | None = None,
        k: int = 1,
        reverse_complement: float = 0.5,
        rename_letters: float = 0.0,
        predict_file: str | None = None,
        batch_size: int = 8,
        max_tokens: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(
            batch_size=batch_size, max_tokens=max_tokens, num_workers=num_workers, pin_memory=pin_memory, seed=seed
        )
        if length < 2 + bos:
            raise ConfigError(f"DNALanguageData: length must be at least {2 + bos}, got {length}.")
        if eval_stride is not None and not 1 <= eval_stride <= length - bos:
            raise ConfigError(f"DNALanguageData: eval_stride must be from 1 to {length - bos}, got {eval_stride}.")
        shares = [s for s in (val, test) if not isinstance(s, list)]
        if min(shares, default=0) < 0 or sum(shares) >= 1:
            raise ConfigError(
                f"DNALanguageData: val and test must be from 0 and below 1 together, got {val} and {test}."
            )
        if rename_letters and k > 1:
            raise ConfigError(f"DNALanguageData: rename_letters needs single nucleotides (k=1), got k={k}.")
        self.files, self.val, self.test = _paths(files), val, test
        self.length, self.bos = length, bos
        self.eval_stride = eval_stride or max(1, length // 2)
        self.tokenizer = make_tokenizer(k, k)
        self.reverse_complement, self.rename_letters = reverse_complement, rename_letters
        self.predict_file = predict_file

    def load(self, splits: set[Split], spec: DataSpec | None) -> tuple[DataSpec, Mapping[str, Items]]:
        """Read the records, share out their bases, cut windows."""
        known = spec if isinstance(spec, DNASpec) else None
        if known is None:
            known = DNASpec(tokenizer=self.tokenizer.to_dict(), task="lm", max_length=self.length, bos=self.bos)
        items: dict[str, Items] = {}
        if "predict" in splits and self.predict_file:
            table = read_unlabelled(self.predict_file)
            # the whole sequence counts: no cropping
            tokens = TokenArray.encode(table.sequences, self.tokenizer)
            items["predict"] = LabelledItems(tokens, table.names, None, max_length=int(tokens.lengths.max()))
        if splits <= {"predict"}:
            return known, items
        records, ranges = self._ranges()
        tokens = TokenArray.encode((r.sequence for r in records), self.tokenizer)
        for name, parts in ranges.items():
            within = np.array(parts, dtype=np.int64).reshape(-1, 3)
            within[:, 1:] //= getattr(self.tokenizer, "stride", 1)
            within = within[within[:, 2] > within[:, 1]]
            if len(within):
                training = name == "train"
                items[name] = WindowItems(
                    tokens,
                    within,
                    known.max_length,
                    bos=known.bos,
                    stride=None if training else self.eval_stride,
                    strand_probability=self.reverse_complement if training else 0.0,
                    rename_probability=self.rename_letters if training else 0.0,
                    seed=self.seed,
                )
        if "train" not in items:
            raise DataError("DNALanguageData: no bases are left for training; hold out less.")
        return known, items

    def _ranges(self) -> tuple[list[Record], dict[str, list[tuple[int, int, int]]]]:
        """Records, and the (record, begin, end) of every split, in bases."""
        records = [r for path in list_files(self.files) for r in read_sequences(path, duplicates="allow")]
        own = len(records)
        numbers: dict[str, int] = {}
        for i, record in enumerate(records):
            numbers.setdefault(record.name, i)
            numbers.setdefault(record.name.partition(".")[0], i)  # without the version
        ranges: dict[str, list[tuple[int, int, int]]] = {"train": [], "val": [], "test": []}
        for name, value in (("val", self.val), ("test", self.test)):
            for entry in value if isinstance(value, list) else []:
                if entry not in numbers and Path(entry).is_file():
                    extra = list(read_sequences(entry, duplicates="allow"))
                    ranges[name] += [(len(records) + i, 0, len(r.sequence)) for i, r in enumerate(extra)]
                    records += extra
                else:
                    ranges[name].append(_parse_range(entry, numbers, records, name))
        named = [*ranges["val"], *ranges["test"]]
        for i, record in enumerate(records[:own]):
            free = [(0, len(record.sequence))]
            for _, begin, end in (part for part in named if part[0] == i):
                free = [c for a, b in free for c in ((a, min(b, begin)), (max(a, end), b)) if c[0] < c[1]]
            ranges["train"] += [(i, a, b) for a, b in self._tails(i, free, ranges)]
        return records, ranges

    def _tails(
        self, record: int, free: list[tuple[int, int]], ranges: dict[str, list[tuple[int, int, int]]]
    ) -> list[tuple[int, int]]:
        """Give the last shares of a record to validation and test."""
        rest = []
        for a, b in free:
            end = b
            for name, share in (("test", self.test), ("val", self.val)):
                if not isinstance(share, list) and share:
                    begin = end - round(share * (b - a))
                    ranges[name].append((record, begin, end))
                    end = begin
            rest.append((a, end))
        return rest


def make_tokenizer(k: int, stride: int) -> DNATokenizer:
    """One id a base, or k-mers."""
    return NucleotideTokenizer() if k == 1 else KmerTokenizer(k, stride)


def _paths(paths: Paths | None) -> list[str]:
    return [] if paths is None else [paths] if isinstance(paths, str) else list(paths)


def list_files(paths: Sequence[str]) -> list[Path]:
    """Files that the words stand for: files, all sequence files of folders, patterns; in a fixed order.

    Raises:
        DataError: A word stands for no file.
    """
    found: list[Path] = []
    for word in paths:
        path = Path(word)
        if path.is_dir():
            new = sorted(p for p in path.iterdir() if _SEQUENCE_FILE.search(p.name))
        elif path.is_file():
            new = [path]
        else:
            new = [Path(p) for p in sorted(glob.glob(word, recursive=True))]
        if not new:
            raise DataError(f"{word}: no such file, and no sequence file there or of that pattern; check the path.")
        found += new
    return found


def read_class(paths: Sequence[str], label: str) -> Labelled:
    """Read files whose sequences all have one label."""
    records = [r for path in list_files(paths) for r in read_sequences(path, duplicates="allow")]
    return Labelled([r.name for r in records], [r.sequence for r in records], [label] * len(records))


def _parse_range(entry: str, numbers: Mapping[str, int], records: Sequence[Record], split: str) -> tuple[int, int, int]:
    name, colon, span = entry, "", ""
    if entry not in numbers:
        name, colon, span = entry.rpartition(":")
    begin, dash, end = span.partition("-")
    if name not in numbers or (colon and not (dash and begin.isdigit() and end.isdigit())):
        known = ", ".join(r.name for r in records[:5]) + (", ..." if len(records) > 5 else "")
        raise DataError(
            f"{split}: each entry must be a record's name, NAME:BEGIN-END, or a file, got {entry!r}; records: {known}."
        )
    size = len(records[numbers[name]].sequence)
    low, high = (int(begin), int(end)) if colon else (0, size)
    if not low < high <= size:
        raise DataError(f"{split}: the range must lie in the {size:,} bases of {name}, got {entry!r}.")
    return numbers[name], low, high
