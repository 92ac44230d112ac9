"""Facts about DNA data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from vertebra.domains.spec import DataSpec

Kind = Literal["lm", "classification", "multilabel", "regression"]


@dataclass(frozen=True, kw_only=True)
class DNASpec(DataSpec):
    """Facts about DNA data.

    Args:
        tokenizer: The tokenizer's ``to_dict()``.
        task: What is predicted.
        max_length: Longest input, in tokens.
        classes: Class names in the order of the logits; the labels of a multi-label task; of a language model the
            labels that may stand before a sequence, whose ids follow the tokenizer's.
        targets: Names of the numbers that a regression predicts.
        target_mean: Mean of each target in training; regression heads predict standardised values.
        target_std: Standard deviation of each target in training.
        bos: Whether language-model inputs begin with ``[BOS]``.
        eos: Whether every sequence of a language model ends with ``[SEP]``, so that it learns where to stop.
        bin_edges: Of a language model with binned numbers as labels, the edges between the bins of each target, one
            target after another.
    """

    tokenizer: dict[str, Any]
    task: Kind
    max_length: int
    classes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()
    bos: bool = False
    eos: bool = False
    bin_edges: tuple[float, ...] = ()

    domain: ClassVar[str] = "dna"

    @property
    def num_outputs(self) -> int:
        """Number C of logits of a classifier, or of numbers of a regression."""
        return len(self.targets if self.task == "regression" else self.classes)
