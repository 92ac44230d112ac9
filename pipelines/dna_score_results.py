"""What ``dna/score`` says of variants and regions, and the files that it writes."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, cast

import numpy as np

from vertebra.pipelines import figures
from vertebra.pipelines.base import Item, Writer
from vertebra.pipelines.files import Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vertebra.domains.dna.variants import Variant

LABEL = "log-likelihood ratio (nats)"
KEY = "VTB_LLR"
"""Key in the INFO of a VCF file."""


def allele_prediction(name: str, variant: Variant, scores: Sequence[float | None]) -> Prediction:
    """Return the score of a variant: a number, or a tuple with one an allele, None where it has no score."""
    by_allele = {f"{variant.ref}>{alt}": s for alt, s in zip(variant.alts, scores, strict=True) if s is not None}
    details = {
        "chrom": variant.chrom, "position": variant.position + 1, "id": variant.name,
        "ref": variant.ref, "alts": variant.alts, "llr": list(scores),
    }  # fmt: skip
    return Prediction(scores[0] if len(scores) == 1 else tuple(scores), by_allele, name, details, LABEL)


@dataclass(eq=False)
class SaturationPrediction(Prediction):
    """Scores of every substitution: ``value`` is (L, 4) for A, C, G, T, 0 at the sequence's base, nan where unknown."""

    def figure(self) -> Figure:
        """Draw the heat map."""
        positions, sequence = self.details["positions"], self.details["sequence"]
        step = int(positions[1] - positions[0]) if len(positions) > 1 else 1
        return figures.heatmap(
            self.value, sequence, first=int(positions[0]), step=step, title=self.name, label=self.label
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values; what is unknown is None, as JSON has no nan."""
        told = super().to_dict()
        told["value"] = [[None if np.isnan(score) else score for score in row] for row in self.value.tolist()]
        return told

    def rows(self) -> Iterator[list[Any]]:
        """Yield position, base, and the scores of A, C, G and T as text, empty where unknown."""
        for position, base, row in zip(self.details["positions"], self.details["sequence"], self.value, strict=True):
            yield [int(position), base, *("" if np.isnan(score) else f"{score:.6g}" for score in row)]

    def _table(self) -> list[list[Any]]:
        return [["position", "ref", *"ACGT"], *self.rows()]


class AnnotatedVCFWriter(Writer):
    """OUT.vcf: the records of the input as they were, with the scores of their alleles in INFO.

    Args:
        outputs: The files of the run.
        source: The input, whose header is kept.
        about: Model, window and strands, for the description of the key.
    """

    def __init__(self, outputs: Outputs, source: Path, about: str) -> None:
        from vertebra.domains.dna.variants import VCFWriter, read_vcf

        text = (
            f"Log-likelihood ratio (nats) of the ALT against the REF window, below 0 where ALT is less likely: {about}"
        )
        header = read_vcf(source, lambda _: None).header
        stream = cast(BinaryIO, outputs.open(outputs.target, "wb"))
        self.vcf = VCFWriter(stream, header, [(KEY, "A", "Float", text)])

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one record; '.' stands for an allele that has no score."""
        scores = ("." if score is None else f"{score:.6g}" for score in prediction.details["llr"])
        self.vcf.write(item.data.variant, {KEY: ",".join(scores)})


class AlleleWriter(Writer):
    """OUT.csv: a row an allele; ``pos`` counts from 1 as in VCF, ``llr`` is empty for an allele that has no score."""

    def __init__(self, outputs: Outputs, several_files: bool) -> None:
        self.several_files = several_files
        self.table = csv.writer(outputs.open(outputs.target), lineterminator="\n")
        self.table.writerow([*["file"] * several_files, "chrom", "pos", "id", "ref", "alt", "llr"])

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write the rows of one record."""
        told = prediction.details
        for alt, score in zip(told["alts"], told["llr"], strict=True):
            shown = "" if score is None else f"{score:.6g}"
            row = [told["chrom"], told["position"], told["id"], told["ref"], alt, shown]
            self.table.writerow([*[item.file] * self.several_files, *row])


class RegionWriter(Writer):
    """OUT.csv: a row a base; OUT.N.NAME.png for the first regions.

    ``position`` counts from 1 along ``chrom`` (a record of a sequence file is its own). A region of the strand '-' is
    written on that strand: positions fall, ``ref`` and the columns A, C, G, T are the bases of that strand.
    """

    def __init__(self, most_figures: int, outputs: Outputs, several_files: bool) -> None:
        self.most, self.outputs, self.several_files = most_figures, outputs, several_files
        self.table = csv.writer(outputs.open(outputs.target), lineterminator="\n")
        columns = ["name", "chrom", "strand", "position", "ref", *"ACGT"]
        self.table.writerow([*["file"] * several_files, *columns])
        self.drawn = 0

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write the rows of one region, and its figure."""
        assert isinstance(prediction, SaturationPrediction)
        same = [prediction.name, prediction.details["chrom"], prediction.details["strand"]]
        for row in prediction.rows():
            self.table.writerow([*[item.file] * self.several_files, *same, *row])
        if self.drawn < self.most:
            self.drawn += 1
            name = re.sub(r"[^\w.-]+", "_", prediction.name)[:60] or "record"
            stream = self.outputs.open(self.outputs.side(f".{self.drawn}.{name}.png"), "wb")
            stream.write(figures.png_bytes(prediction.figure()))
