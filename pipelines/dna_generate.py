"""DNA: sequences from a language model, by label or prompt, with a summary of what was made."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vertebra.errors import ConfigError, DataError
from vertebra.pipelines import figures
from vertebra.pipelines.base import Bad, Item, Pipeline, Writer
from vertebra.pipelines.catalog import verb
from vertebra.pipelines.files import BadRecord, Outputs
from vertebra.pipelines.prediction import Prediction

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vertebra.backbones.decoding import Generated
    from vertebra.domains.dna.model import DNALanguageModel
    from vertebra.domains.model import DomainModel

SPECTRUM_K = 4


@dataclass(frozen=True)
class Request:
    """One sequence to make.

    Args:
        prompt: Ids that stand before it, (T,).
        group: What was asked for: the label, or the name of the prompt.
        number: Number that its draws depend on.
        rank: Of beams, which one.
    """

    prompt: Tensor
    group: str
    number: int
    rank: int


@verb(
    "dna/generate",
    inputs="nothing, or prompts: FASTA, FASTQ, GenBank, EMBL, CSV or TSV with a column `sequence`",
    outputs=".fa; OUT.csv (a row a sequence), OUT.json (summary) and OUT.png (k-mer spectrum, GC, lengths)",
    model="dna_elements",
    tasks=("dna/lm",),
    needs_input=False,
)
class Generate(Pipeline):
    """Sequences from a causal language model, by activity label, prompt or neither.

    Args:
        model: See ``Pipeline``.
        device: See ``Pipeline``.
        batch_size: Most sequences that are made at once.
        batch_tokens: Most prompt positions at once.
        count: Sequences for each label and each prompt.
        labels: Labels to generate for, each by itself; ``a+b`` asks for both at once. None for no label.
        max_bases: Most bases, the prompt not counted; None for what the model was trained on.
        min_bases: Fewest bases.
        method: ``sample``, ``greedy`` or ``beam``.
        temperature: Below 1 for likelier sequences, above 1 for more varied ones.
        top_k: Sample from the k most likely tokens; 0 for all.
        top_p: Sample from the most likely tokens whose probabilities sum to this.
        beams: Beams of ``beam``; at least ``count``.
        seed: Seed of sampling; a sequence depends on it and its number alone.
        reference: Real sequences (any format) that the summary compares with: their k-mer spectrum, and whether what
            was made is new to them.
        motifs: Motifs whose share is counted, ``NAME=IUPAC`` or IUPAC letters.
    """

    endings = (".fa", ".fasta")
    unit = "sequences"

    def __init__(
        self,
        model: str | Path | DomainModel | None = None,
        *,
        device: str = "auto",
        batch_size: int = 64,
        batch_tokens: int = 32_768,
        count: int = 10,
        labels: Sequence[str] | None = None,
        max_bases: int | None = None,
        min_bases: int = 1,
        method: Literal["sample", "greedy", "beam"] = "sample",
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        beams: int = 8,
        seed: int = 0,
        reference: str | Path | None = None,
        motifs: Sequence[str] = (),
    ) -> None:
        super().__init__(model, device=device, batch_size=batch_size, batch_tokens=batch_tokens)
        from vertebra.backbones.decoding import Strategy
        from vertebra.domains.dna.generation import decoder_of
        from vertebra.domains.dna.statistics import motif_pattern

        self.language: DNALanguageModel = self.model  # type: ignore[assignment]
        self.decoder = decoder_of(self.language)
        self.strategy = Strategy(
            method=method, temperature=temperature, top_k=top_k, top_p=top_p, beams=beams, seed=seed
        )
        spec = self.language.spec
        self.max_bases = max_bases or spec.max_length - 1 - spec.bos
        self.min_bases = min_bases
        if not 1 <= self.min_bases <= self.max_bases:
            raise ConfigError(
                f"{self.name}: min_bases must be from 1 to max_bases ({self.max_bases}), got {min_bases}."
            )
        if count < 1:
            raise ConfigError(f"{self.name}: count must be at least 1, got {count}.")
        if method == "beam" and count > beams:
            raise ConfigError(f"{self.name}: beams must be at least count ({count}), got {beams}.")
        if method == "greedy" and count > 1:
            raise ConfigError(f"{self.name}: greedy makes one sequence for each label or prompt; pass count 1.")
        self.count, self.labels = count, list(labels or [])
        for label in self.labels:
            self.language.front_ids(label.split("+"))
        self.reference = None if reference is None else Path(reference)
        self.motifs = {m.partition("=")[0]: m.rpartition("=")[2] for m in motifs}
        for motif in self.motifs.values():
            motif_pattern(motif)
        self._beams: tuple[str, int, list[Generated]] | None = None
        self._made = 0

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Add the pipeline's options."""
        super().add_arguments(parser)
        group = parser.add_argument_group("generation")
        group.add_argument(
            "--count", type=int, default=10, metavar="N", help="sequences for each label and prompt (default: 10)"
        )
        group.add_argument(
            "--label", dest="labels", action="append", metavar="LABEL",
            help="label to generate for; may be repeated; a+b asks for both at once",
        )  # fmt: skip
        group.add_argument(
            "--max-bases", type=int, metavar="N", help="most bases (default: what the model was trained on)"
        )
        group.add_argument("--min-bases", type=int, default=1, metavar="N", help="fewest bases (default: 1)")
        group.add_argument("--method", choices=("sample", "greedy", "beam"), default="sample", help="(default: sample)")
        group.add_argument(
            "--temperature", type=float, default=1.0, help="below 1 likelier, above 1 more varied (default: 1)"
        )
        group.add_argument(
            "--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest (default: all)"
        )
        group.add_argument(
            "--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest that sum to P"
        )
        group.add_argument("--beams", type=int, default=8, metavar="N", help="beams of --method beam (default: 8)")
        group.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
        group = parser.add_argument_group("summary")
        group.add_argument(
            "--reference", metavar="FILE", help="real sequences to compare with, such as the training set"
        )
        group.add_argument(
            "--motif", dest="motifs", action="append", default=[], metavar="NAME=IUPAC",
            help="motif to count, such as TATA=TATAWAW; may be repeated",
        )  # fmt: skip

    # ---------------------------------------------------------------- what is asked for

    def without_input(self, bad: Bad) -> Iterator[Item]:
        """Yield the sequences that the labels ask for, or ``count`` without any."""
        yield from self._requests("", "", "")

    def planned(self) -> float:
        """Sequences of a run without prompts."""
        return float(self.count * max(1, len(self.labels)))

    def read(self, path: Path, bad: Bad) -> Iterator[Item]:
        """Yield what every record of a file, as a prompt, asks for."""
        from vertebra.domains.dna.formats import RecordError, read_sequences

        def on_error(error: RecordError) -> None:
            bad(BadRecord(**error.to_dict()))  # type: ignore[arg-type]

        for record in read_sequences(path, on_error, duplicates="report"):
            yield from self._requests(str(path), record.name, record.sequence)

    def parse(self, value: Any, index: int, bad: Bad) -> Iterator[Item]:
        """Yield what a prompt asks for; an empty one, or None, asks for sequences from the start."""
        if value is not None and not isinstance(value, str):
            raise DataError(f"{self.name}: takes prompts of bases, paths or None, got {type(value).__name__}.")
        yield from self._requests("", f"prompt_{index}" if value else "", value or "")

    def __call__(self, value: Any = None) -> list[Prediction]:
        """Make sequences.

        Args:
            value: A prompt of bases, a path of prompts, a list of these, or None.

        Returns:
            ``count`` predictions for each label and prompt; a value is the sequence, its prompt included.
        """
        return list(self._predictions(value if isinstance(value, list | tuple) else [value]))

    def _requests(self, file: str, name: str, bases: str) -> Iterator[Item]:
        from vertebra.domains.dna.generation import prompt_ids

        for label in self.labels or [""]:
            prompt = prompt_ids(self.language, label.split("+") if label else [], bases)
            group = "/".join(part for part in (name, label) if part) or "generated"
            for rank in range(self.count):
                request = Request(prompt, group, self._made, rank)
                self._made += 1
                record = f"{group}_{rank + 1}"
                yield Item(file=file, record=record, data=request, size=len(prompt))

    # ---------------------------------------------------------------- making them

    def predict(self, items: list[Item]) -> list[Prediction]:
        """Make one batch of sequences."""
        from vertebra.backbones.decoding import generate
        from vertebra.domains.dna.generation import bases_of

        requests: list[Request] = [item.data for item in items]
        if self.strategy.method == "beam":
            made = [self._beam(request) for request in requests]
        else:
            made = generate(
                self.decoder,
                [r.prompt for r in requests],
                self._stop(),
                self.strategy,
                allowed=self._grammar(requests),
                numbers=[r.number for r in requests],
            )
        results = []
        for item, request, one in zip(items, requests, made, strict=True):
            sequence = bases_of(self.language, request.prompt, one.ids)
            if not sequence:
                raise DataError(f"{item.record}: the model made no base; pass a larger --min-bases")
            results.append(self._prediction(item.record, request.group, sequence, one))
        return results

    def _prediction(self, name: str, group: str, sequence: str, one: Generated) -> Prediction:
        from vertebra.domains.dna.statistics import gc_content

        details = {
            "group": group,
            "length": len(sequence),
            "gc": gc_content(sequence),
            "log_likelihood": one.score,
            "bits_per_token": -one.score / max(len(one.ids), 1) / math.log(2),
            "ended": one.reason == "stop",
        }
        return Prediction(sequence, name=name, details=details, label="sequence")

    def _stop(self) -> Any:
        from vertebra.backbones.decoding import Stop
        from vertebra.domains.dna.generation import tokens_for

        spec = self.language.spec
        most = tokens_for(self.language, self.max_bases) + spec.eos
        return Stop(max_new=most, ids=[self.language.tokenizer.sep_id] if spec.eos else [])

    def _grammar(self, requests: Sequence[Request]) -> Any:
        from vertebra.domains.dna.generation import grammar, tokens_for

        fewest = tokens_for(self.language, self.min_bases)
        most = tokens_for(self.language, self.max_bases)
        return grammar(self.language, [r.prompt for r in requests], fewest, most)

    def _beam(self, request: Request) -> Generated:
        from vertebra.backbones.decoding import beam_search

        key = (request.group, request.number - request.rank)
        if self._beams is None or self._beams[:2] != key:
            found = beam_search(
                self.decoder, request.prompt, self._stop(), self.strategy, allowed=self._grammar([request])
            )
            self._beams = (*key, found)
        found = self._beams[2]
        if request.rank >= len(found):
            raise DataError(f"{request.group}: the beams ended in {len(found)} sequences; pass a smaller --count")
        return found[request.rank]

    def writer(self, outputs: Outputs, several_files: bool) -> Writer:
        """Open the FASTA file and its summary."""
        return _GenerateWriter(self, outputs)

    def real_sequences(self) -> list[str]:
        """Read the sequences of ``reference``; none without one.

        Raises:
            DataError: It cannot be read.
        """
        from vertebra.domains.dna.formats import read_sequences

        if self.reference is None:
            return []
        return [r.sequence for r in read_sequences(self.reference, lambda error: None, duplicates="allow")]


class _GenerateWriter(Writer):
    """OUT.fa, OUT.fa.csv, OUT.fa.json and OUT.fa.png."""

    def __init__(self, pipeline: Generate, outputs: Outputs) -> None:
        self.pipeline, self.outputs = pipeline, outputs
        self.real = pipeline.real_sequences()  # first: a bad reference must not cost the work
        self.fasta = outputs.open(outputs.target)
        self.made: list[Prediction] = []

    def write(self, item: Item, prediction: Prediction) -> None:
        """Write one sequence."""
        facts = prediction.details
        self.fasta.write(
            f">{prediction.name} group={facts['group']} length={facts['length']} gc={facts['gc']:.3f} "
            f"log_likelihood={facts['log_likelihood']:.3f}\n"
        )
        sequence = str(prediction.value)
        self.fasta.writelines(sequence[i : i + 60] + "\n" for i in range(0, len(sequence), 60))
        self.made.append(prediction)

    def finish(self) -> None:
        """Write the table, the summary and the figure."""
        if not self.made:
            return
        known = np.zeros((2, len(self.made)), dtype=bool)
        if self.real:
            from vertebra.domains.dna.splits import known_in

            known = np.stack(known_in(self.real, [str(p.value) for p in self.made]))
        columns = ("group", "length", "gc", "log_likelihood", "bits_per_token", "ended")
        table = csv.writer(self.outputs.open(self.outputs.side(".csv")), lineterminator="\n")
        table.writerow(["name", *columns, *(["copied", "similar"] if self.real else [])])
        for i, p in enumerate(self.made):
            facts = [f"{p.details[c]:.6g}" if isinstance(p.details[c], float) else p.details[c] for c in columns]
            table.writerow([p.name, *facts, *(known[:, i].tolist() if self.real else [])])
        groups: dict[str, list[str]] = {}
        for p in self.made:
            groups.setdefault(p.details["group"], []).append(str(p.value))
        names = np.array([p.details["group"] for p in self.made])
        summary = {
            group: summarise(sequences, self.real, self.pipeline.motifs, known[:, names == group])
            for group, sequences in groups.items()
        }
        if self.real:
            summary["reference"] = summarise(self.real, [], self.pipeline.motifs, np.zeros((2, 0), dtype=bool))
        json.dump(summary, self.outputs.open(self.outputs.side(".json")), indent=1)
        figure = generation_figure(groups, self.real)
        self.outputs.open(self.outputs.side(".png"), "wb").write(figures.png_bytes(figure))


def summarise(
    sequences: Sequence[str], real: Sequence[str], motifs: Mapping[str, str], known: np.ndarray
) -> dict[str, Any]:
    """Describe a set of sequences: lengths, GC, k-mers, motifs; beside real ones their distance, and what is new.

    Args:
        sequences: The set.
        real: Real sequences; may be empty.
        motifs: IUPAC letters by name.
        known: Which are equal, and which similar, to a real one, bool (2, N).
    """
    from vertebra.domains.dna import statistics

    lengths = np.array([len(s) for s in sequences])
    gc = np.array([statistics.gc_content(s) for s in sequences])
    facts: dict[str, Any] = {
        "sequences": len(sequences),
        "distinct": len(set(sequences)),
        "length_mean": float(lengths.mean()),
        "length_min": int(lengths.min()),
        "length_max": int(lengths.max()),
        "gc_mean": float(np.nanmean(gc)),
        "gc_sd": float(np.nanstd(gc)),
        "enriched_6mers": dict(statistics.enriched_kmers(sequences, 6)),
        "motifs": statistics.motif_shares(sequences, motifs),
    }
    if real:
        spectra = [statistics.kmer_spectrum(s, SPECTRUM_K) for s in (sequences, real)]
        facts[f"js_divergence_{SPECTRUM_K}mers_bits"] = statistics.jensen_shannon(*spectra)
        facts["share_copied"] = float(known[0].mean())
        facts["share_similar"] = float(known[1].mean())
        facts["share_new"] = float(1 - known[1].mean())
    return facts


def generation_figure(groups: Mapping[str, Sequence[str]], real: Sequence[str]) -> Figure:
    """Draw k-mer spectra, GC and lengths of groups of sequences, beside real ones where there are some."""
    from vertebra.domains.dna import statistics

    figure, (left, middle, right) = figures.new_figure(1, 3, width=12.0, height=3.6)
    shown = dict(list(groups.items())[:6])
    against = statistics.kmer_spectrum(real, SPECTRUM_K) if real else None
    for colour, (group, sequences) in zip(figures.PALETTE, shown.items(), strict=False):
        spectrum = statistics.kmer_spectrum(sequences, SPECTRUM_K)
        if against is None:
            left.plot(np.sort(spectrum)[::-1] * 1000, color=colour, linewidth=1.4, label=group)
        else:
            left.scatter(against * 1000, spectrum * 1000, s=7, alpha=0.6, linewidths=0, color=colour, label=group)
        for axes, values in (
            (middle, [statistics.gc_content(s) for s in sequences]),
            (right, [len(s) for s in sequences]),
        ):
            axes.hist(values, bins=_bins(axes is middle, shown, real), density=True, histtype="step", color=colour)
    if against is not None:
        top = float(against.max()) * 1050
        left.plot([0, top], [0, top], color=figures.MUTED, linewidth=0.8, linestyle="--")
        left.set_xlabel(f"{SPECTRUM_K}-mers of the reference (per thousand)")
        for axes, values in ((middle, [statistics.gc_content(s) for s in real]), (right, [len(s) for s in real])):
            bins = _bins(axes is middle, shown, real)
            axes.hist(values, bins=bins, density=True, color="#D9D9D9", label="reference", zorder=0)
        middle.legend(frameon=False, fontsize=8)
    else:
        left.set_xlabel(f"{SPECTRUM_K}-mers, most frequent first")
    left.set_ylabel("generated (per thousand)")
    left.legend(frameon=False, fontsize=8, markerscale=2)
    middle.set_xlabel("GC content")
    middle.set_ylabel("density")
    right.set_xlabel("length (bases)")
    return figure


def _bins(of_gc: bool, groups: Mapping[str, Sequence[str]], real: Sequence[str]) -> list[float]:
    if of_gc:
        return np.linspace(0, 1, 41).tolist()
    lengths = [len(s) for sequences in (*groups.values(), real) for s in sequences]
    low, high = min(lengths) - 2, max(lengths) + 2
    return np.linspace(low - 0.5, high + 0.5, min(40, high - low + 1) + 1).tolist()


__all__ = ["Generate", "Request", "generation_figure", "summarise"]
