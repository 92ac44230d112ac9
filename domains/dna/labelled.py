"""Labelled sequences: what the labels are, and how sequences are shared out to splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vertebra.domains.dna.formats import read_sequences, read_table
from vertebra.domains.dna.spec import DNASpec, Kind
from vertebra.errors import DataError


@dataclass
class Labelled:
    """Names, sequences and labels as the files have them.

    Args:
        names: Name of each sequence.
        sequences: Letters.
        labels: Text of each label; several, or several numbers, are separated by ``;``. Empty without labels.
        kind: What the labels look like.
        targets: Names of the numbers of a regression.
    """

    names: list[str]
    sequences: list[str]
    labels: list[str]
    kind: Kind = "classification"
    targets: tuple[str, ...] = ()

    def take(self, keep: NDArray[np.bool_]) -> Labelled:
        """Rows where ``keep`` (N,) is True."""
        at = np.flatnonzero(keep).tolist()
        names, sequences, labels = ([column[i] for i in at] for column in (self.names, self.sequences, self.labels))
        return dataclasses.replace(self, names=names, sequences=sequences, labels=labels)

    def __add__(self, other: Labelled) -> Labelled:
        return dataclasses.replace(
            self,
            names=self.names + other.names,
            sequences=self.sequences + other.sequences,
            labels=self.labels + other.labels,
        )

    def __len__(self) -> int:
        return len(self.sequences)


def read_labelled(path: str | Path) -> Labelled:
    """Read a table with labels."""
    table = read_table(path)
    columns = table.label_columns
    if table.kind == "multilabel" and len(columns) > 1:
        flags = table.indicator(columns)
        labels = [";".join(c for c, flag in zip(columns, row, strict=True) if flag) for row in flags]
    else:
        labels = [";".join(row) for row in table.labels]
    return Labelled(table.names, table.sequences, labels, table.kind, columns)


def read_unlabelled(path: str | Path) -> Labelled:
    """Read sequences of any format, for prediction."""
    records = list(read_sequences(path, duplicates="allow"))
    return Labelled([r.name for r in records], [r.sequence for r in records], [])


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _parts(label: str, task: Kind) -> list[str]:
    return [part.strip() for part in label.split(";") if part.strip()] if task == "multilabel" else [label]


def class_names(labels: Sequence[str], task: Kind) -> tuple[str, ...]:
    """Distinct classes or labels, whole numbers first and in their order, then by name."""
    parts = {part for label in labels for part in _parts(label, task)}
    return tuple(sorted(parts, key=lambda c: (0, int(c), "") if c.isdigit() else (1, 0, c)))


def parse_numbers(labels: Sequence[str]) -> NDArray[np.float32]:
    """Numbers (N, C) of a regression.

    Raises:
        DataError: A label is not finite, or rows have different counts.
    """
    rows = [[_number(part) for part in label.split(";")] for label in labels]
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]) or any(n is None or not np.isfinite(n) for n in row):
            raise DataError(
                f"labels: a regression needs {len(rows[0])} finite number(s) a row, got {labels[i]!r} "
                f"(sequence {i + 1}); mend the row or choose another task."
            )
    return np.array(rows, dtype=np.float32)


def encode_labels(labels: Sequence[str], spec: DNASpec) -> NDArray[np.int64] | NDArray[np.float32]:
    """Class numbers (N,), flags (N, C) or numbers (N, C).

    Raises:
        DataError: A label that the model does not know.
    """
    if spec.task == "regression":
        return parse_numbers(labels)
    number = {name: i for i, name in enumerate(spec.classes)}
    wanted = [_parts(label, spec.task) for label in labels]
    for i, parts in enumerate(wanted):
        for part in parts:
            if part not in number:
                raise DataError(
                    f"labels: every label must be one of {', '.join(spec.classes)}, got {part!r} (sequence {i + 1}); "
                    "is the file of another task?"
                )
    if spec.task == "classification":
        return np.array([number[parts[0]] for parts in wanted], dtype=np.int64)
    flags = np.zeros((len(wanted), len(number)), dtype=np.float32)
    for i, parts in enumerate(wanted):
        flags[i, [number[part] for part in parts]] = 1
    return flags


def record_groups(names: Sequence[str]) -> NDArray[np.int64]:
    """Number the groups of names that agree up to the first ``:``, as in ``chr1:100-200``."""
    return np.unique([name.partition(":")[0] for name in names], return_inverse=True)[1].astype(np.int64)


def share_out(
    labels: Sequence[str], groups: NDArray[np.int64], shares: Sequence[float], seed: int
) -> NDArray[np.int64]:
    """Share sequences out to parts, stratified by label, without tearing a group apart.

    Groups come in random order, larger ones first; each goes to the part that is furthest behind its share of the
    group's labels. Labels of a regression are stratified by decile, by fewer
    quantiles below 200 sequences; other labels that are mostly rare are not stratified.

    Args:
        labels: Label of each sequence.
        groups: Group of each sequence, shape (N,).
        shares: Share of every part; their sum is 1.
        seed: Seed of the order.

    Returns:
        Part of each sequence, shape (N,).
    """
    kinds, kind = np.unique(_strata(labels), return_inverse=True)
    _, group = np.unique(groups, return_inverse=True)
    count = np.zeros((group.max(initial=-1) + 1, len(kinds)))  # no group where there is no sequence
    np.add.at(count, (group, kind), 1)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(count))
    order = order[np.argsort(-count[order].sum(1), kind="stable")]
    wanted = np.outer(shares, count.sum(0))
    had = np.zeros_like(wanted)
    part_of = np.zeros(len(count), dtype=np.int64)
    for g in order:
        behind = ((wanted - had) * count[g]).sum(1) / np.asarray(shares)
        part_of[g] = behind.argmax()
        had[part_of[g]] += count[g]
    return part_of[group]


def _strata(labels: Sequence[str]) -> list[str]:
    if len(set(labels)) <= min(50, len(labels) // 4):  # labels that are rarer cannot be shared out each by itself
        return list(labels)
    numbers = [_number(label.partition(";")[0]) for label in labels]
    if any(n is None for n in numbers):
        return ["" for _ in labels]
    first = np.array(numbers, dtype=np.float64)
    bins = min(10, max(1, len(first) // 20))
    return np.searchsorted(np.quantile(first, np.arange(1, bins) / bins), first).astype(str).tolist()
