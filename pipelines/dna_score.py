"""DNA: what a language model thinks of variants (VCF), and of every substitution in a region (BED) or sequence."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines.base import Bad, Item, Pipeline, RunResult, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.dna_score_inputs import KINDS, Alleles, Part, Region, input_kind
from vertebra.pipelines.dna_score_results import (
    LABEL,
    AlleleWriter,
    AnnotatedVCFWriter,
    RegionWriter,
    SaturationPrediction,
    allele_prediction,
)
from vertebra.pipelines.files import BadRecord, Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from vertebra.domains.dna.changes import Change, Refusal
    from vertebra.domains.dna.fasta_index import IndexedFasta
    from vertebra.domains.dna.records import OnError, RecordError
    from vertebra.domains.dna.scoring import Strands
    from vertebra.domains.model import DomainModel

_PART = 4  # batches a part of a region, so that its reference window is read again seldom


@verb(
    "dna/score",
    inputs="VCF or BED (with --reference), or FASTA, FASTQ, GenBank, EMBL, CSV, TSV (gz too); one kind a run",
    outputs=".csv, or .vcf for VCF input; regions and sequences also get OUT.N.NAME.png",
    model="dna_lm",
    tasks=("dna/lm",),
)
class Score(Pipeline):
    """Log-likelihood ratios of variants, and of every substitution of regions or sequences.

    Args:
        model: A model directory, the name of a bundled model, ``hf-hub:ORG/NAME``, or a model.
        device: ``auto``, ``cpu``, ``cuda``, ...
        batch_size: Most records in a batch.
        batch_tokens: Most positions in a batch.
        reference: The genome, FASTA; variants and regions need it.
        window: Bases that the model reads around a change; None for what it was trained on.
        strands: ``both`` for the mean of both strands, ``forward`` for the strand as given.
        label: Label that stands before the bases, for models trained with labels.
        max_region: Longest region or sequence in bases; longer ones are listed as bad.
        figures: Most regions or sequences that get a figure.
    """

    endings = (".csv", ".vcf")

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
        reference: str | Path | None = None,
        window: int | None = None,
        strands: Strands = "both",
        label: str | None = None,
        max_region: int = 2_000,
        figures: int = 5,
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.domains.dna.fasta_index import IndexedFasta
        from vertebra.domains.dna.model import DNALanguageModel
        from vertebra.domains.dna.scoring import is_masked, longest_window

        if strands not in ("both", "forward"):
            raise ConfigError(f"{self.name}: strands must be 'both' or 'forward', got {strands!r}.")
        if max_region < 1:
            raise ConfigError(f"{self.name}: max_region must be at least 1, got {max_region}.")
        assert isinstance(self.model, DNALanguageModel)
        self.dna, self.masked, self.front = (
            self.model,
            is_masked(self.model),
            len(self.model.front_ids([] if label is None else [label])),
        )
        longest = longest_window(self.model, label)
        self.window = longest if window is None else window
        if not 1 <= self.window <= longest:
            raise ConfigError(f"{self.name}: window must be from 1 to {longest} bases for this model, got {window}.")
        self.strands, self.label, self.max_region, self.figures = strands, label, max_region, figures
        self.model_name = str(model or self.default_model) if not isinstance(model, DNALanguageModel) else "a model"
        self.reference = None if reference is None else IndexedFasta(reference)
        self._scores: list[NDArray[np.float64]] = []
        self._broken = False
        self._inputs: list[Path] = []

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("scores")
        group.add_argument("--reference", metavar="FASTA", help="the genome; VCF and BED need it")
        group.add_argument(
            "--window", type=int, metavar="BASES", help="bases read around a change (default: as trained)"
        )
        group.add_argument(
            "--strands", choices=("both", "forward"), default="both", help="mean of both strands (default), or one"
        )
        group.add_argument("--label", metavar="NAME", help="label before the bases, for models trained with labels")
        group.add_argument(
            "--max-region", type=int, default=2_000, metavar="BASES", help="longest region (default: 2000)"
        )
        group.add_argument("--figures", type=int, default=5, metavar="N", help="most regions drawn (default: 5)")

    def run(self, inputs: Iterable[str | Path], output: str | Path, *, progress: bool = True) -> RunResult:
        """Read files, write results; all files must be of one kind. See ``Pipeline.run``."""
        self._inputs = [Path(path) for path in inputs]
        kinds = {input_kind(path): path for path in self._inputs if path.is_file()}
        if len(kinds) > 1:
            found = " and ".join(f"{KINDS[kind]} ({path.name})" for kind, path in kinds.items())
            raise ConfigError(
                f"{self.name}: the inputs of a run must be of one kind, got {found}; run them separately."
            )
        target = Path(output)
        if kinds and target.suffix == ".vcf":
            ((kind, path),) = kinds.items()
            if kind != "vcf":
                raise ConfigError(
                    f"{self.name}: a .vcf output needs VCF input, got {KINDS[kind]} ({path.name}); "
                    f"write {target.stem}.csv instead."
                )
            if len(self._inputs) > 1:
                raise ConfigError(
                    f"{self.name}: a .vcf output takes one VCF file, whose header it keeps, got {len(self._inputs)}; "
                    f"run them separately, or write {target.stem}.csv."
                )
        return super().run(self._inputs, output, progress=progress)

    # ---------------------------------------------------------------- reading

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield the variants, or the parts of the regions or sequences, of a file."""
        from vertebra.domains.dna.formats import read_sequences

        def on_error(error: RecordError) -> None:
            bad(BadRecord(**error.to_dict()))  # type: ignore[arg-type]

        kind = input_kind(path)
        if kind == "vcf":
            yield from self._read_variants(path, bad, on_error)
        elif kind == "bed":
            yield from self._read_regions(path, bad, on_error)
        else:
            for record in read_sequences(path, on_error, duplicates="report"):
                yield from self._sequence(str(path), record.name, record.sequence, bad)

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield the parts of a sequence, or of a ``(name, sequence)`` pair."""
        from vertebra.domains.dna.records import MAX_LENGTH, sequence_problem

        name, sequence = value if isinstance(value, tuple) else (f"sequence_{index}", value)
        if not isinstance(sequence, str):
            raise DataError(f"{self.name}: takes sequences, paths or (name, sequence), got {type(sequence).__name__}.")
        if (problem := sequence_problem(sequence.encode(), len(sequence), MAX_LENGTH)) is not None:
            bad(BadRecord(file="", record=name, line=None, rule=problem[0], advice=problem[1]))
            return
        yield from self._sequence("", name, sequence, bad)

    def _genome(self, path: Path) -> IndexedFasta:
        if self.reference is None:
            what = KINDS[input_kind(path)]
            raise ConfigError(f"{self.name}: {path} holds {what}, which need a genome; pass --reference genome.fa.")
        return self.reference

    def _read_variants(self, path: Path, bad: Bad, on_error: OnError) -> Iterator[Item]:
        from vertebra.domains.dna.changes import variant_changes
        from vertebra.domains.dna.variants import check_variant, read_vcf

        genome = self._genome(path)
        for variant in read_vcf(path, on_error):
            changes: list[Change | Refusal] = []
            if (problem := check_variant(variant, genome)) is None:
                changes = variant_changes(variant, genome, self.window, self.masked)
                refusals = [change for change in changes if isinstance(change, tuple)]
                if len(refusals) == len(changes):
                    reasons = ", ".join(list(dict.fromkeys(rule for rule, _ in refusals))[:3])
                    problem = f"none of its ALT alleles can be scored: {reasons}", refusals[0][1]
            if problem is not None:
                bad(
                    BadRecord(
                        file=str(path), record=variant.label, line=variant.line, rule=problem[0], advice=problem[1]
                    )
                )
                continue
            windows = len(changes) if self.masked else 1 + len(changes)
            size = windows * (1 + (self.strands == "both")) * (self.window + self.front)
            data = Alleles(variant, changes)
            yield Item(file=str(path), record=variant.label, data=data, size=size, line=variant.line)

    def _read_regions(self, path: Path, bad: Bad, on_error: OnError) -> Iterator[Item]:
        from vertebra.domains.dna.changes import with_flanks
        from vertebra.domains.dna.variants import check_region, read_bed
        from vertebra.tokenizers.nucleotide import reverse_complement_string

        genome = self._genome(path)
        for bed in read_bed(path, on_error):
            problem = check_region(bed, genome) or self._too_long(bed.end - bed.start)
            if problem is not None:
                bad(BadRecord(file=str(path), record=bed.label, line=bed.line, rule=problem[0], advice=problem[1]))
                continue
            size = bed.end - bed.start
            context, start = with_flanks(
                partial(genome.fetch, bed.chrom), genome.lengths[bed.chrom], bed.start, bed.end, self.window
            )
            first, strand = bed.start + 1, "+"
            if bed.strand == "-":
                context, start = reverse_complement_string(context), len(context) - start - size
                first, strand = bed.end, "-"
            region = Region(bed.chrom, strand, first, context[start : start + size])
            yield from self._parts(str(path), bed.label, region, context, start, bed.line)

    def _sequence(self, file: str, name: str, sequence: str, bad: Bad) -> Iterator[Item]:
        from vertebra.domains.dna.changes import plain

        if (problem := self._too_long(len(sequence))) is not None:
            bad(BadRecord(file=file, record=name, line=None, rule=problem[0], advice=problem[1]))
            return
        context = plain(sequence)
        yield from self._parts(file, name, Region(name, "+", 1, context), context, 0, None)

    def _too_long(self, size: int) -> tuple[str, str] | None:
        if size <= self.max_region:
            return None
        rule = f"has {size:,} bases, more than the {self.max_region:,} that are scored base by base"
        return rule, "cut it into shorter ones, or raise --max-region"

    def _parts(
        self, file: str, name: str, region: Region, context: str, start: int, line: int | None
    ) -> Iterator[Item]:
        window = min(len(context), self.window) + self.front
        centred = len(context) > self.window  # every base has a reference window of its own
        windows = (1 + (self.strands == "both")) * (1 if self.masked else 3 + centred)
        step = max(1, _PART * self.batch_tokens // (windows * window))
        stop = start + len(region.sequence)
        for at in range(start, stop, step):
            end = min(at + step, stop)
            data = Part(region, context, at, end, at == start, end == stop)
            size = (end - at) * windows * window
            weight = (end - at) / len(region.sequence)
            yield Item(file=file, record=name, data=data, size=size, weight=weight, line=line, first=data.first)

    # ---------------------------------------------------------------- scoring

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Score all changes of one batch; ``join`` arranges the scores."""
        from vertebra.domains.dna.changes import substitutions
        from vertebra.domains.dna.scoring import likelihood_ratios

        groups: list[list[Change]] = []
        for item in items:
            data = item.data
            if isinstance(data, Part):
                groups.append(list(substitutions(data.context, data.start, data.stop, self.window)))
            else:
                groups.append([change for change in data.changes if not isinstance(change, tuple)])
        changes = [change for group in groups for change in group]
        scores = likelihood_ratios(
            self.dna, changes, strands=self.strands, label=self.label, batch_tokens=self.batch_tokens
        )
        ends = np.cumsum([len(group) for group in groups])[:-1]
        return [Prediction(part) for part in np.split(scores, ends)]

    def join(self, item: Item, part: Prediction | None) -> Prediction | None:
        """Arrange the scores of a variant's alleles, or of a region once its last part is in."""
        from vertebra.domains.dna.changes import saturation_matrix

        data = item.data
        if isinstance(data, Alleles):
            if part is None:
                return None
            left = iter(part.value.tolist())
            by_allele = [None if isinstance(change, tuple) else next(left) for change in data.changes]
            return allele_prediction(item.record, data.variant, by_allele)
        if data.first:
            self._scores, self._broken = [], False
        if part is None:
            self._broken = True
        else:
            self._scores.append(part.value)
        if not data.last or self._broken:
            return None
        region, scores = data.region, np.concatenate(self._scores)
        self._scores = []
        positions = region.first + region.step * np.arange(len(region.sequence))
        details = {
            "chrom": region.chrom, "strand": region.strand, "positions": positions, "sequence": region.sequence,
        }  # fmt: skip
        matrix = saturation_matrix(region.sequence, scores)
        return SaturationPrediction(matrix, name=item.record, details=details, label=LABEL)

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the output in the format of its ending."""
        if outputs.target.suffix == ".vcf":
            strand = "mean of both strands" if self.strands == "both" else "forward strand"
            label = f", label {self.label}" if self.label is not None else ""
            about = f"{self.model_name}, window {self.window} bases, {strand}{label}"
            return AnnotatedVCFWriter(outputs, self._inputs[0], about)
        if input_kind(self._inputs[0]) == "vcf":
            return AlleleWriter(outputs, several_files)
        return RegionWriter(self.figures, outputs, several_files)
