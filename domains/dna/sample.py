"""Fabricated DNA in the real formats: promoters, background, a scanned genome, reads, and genomes with genes.

Nothing is copied from data; what is known of real promoters and genomes enters as numbers:

- background: a Markov chain of order 1 whose transitions are base composition times the dinucleotide bias of *E. coli*
  (Karlin & Burge 1995, https://doi.org/10.1016/S0168-9525(00)89076-9, rounded), with a GC content that varies from
  sequence to sequence;
- bacterial promoters: -35 and -10 boxes, whose consensus bases are drawn as often as Lisser & Margalit 1993 count them
  (https://doi.org/10.1093/nar/21.7.1507) and are any base otherwise, 15 to 19 bases apart, and A or G at the start;
- eukaryotic promoters: a TATA box and an initiator after Bucher 1990
  (https://doi.org/10.1016/0022-2836(90)90223-9), each in three of four promoters.

Sequences are 81 bases long, the start of transcription is base 60 (from 0).
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LENGTH = 81
START = 60
_BASES = np.frombuffer(b"ACGT", dtype=np.uint8)
Codes = NDArray[np.int64]

# Bias of the second base given the first, rows and columns A, C, G, T.
_BIAS = np.array(
    [
        [1.21, 0.88, 0.82, 1.10],
        [1.12, 0.91, 1.16, 0.82],
        [0.92, 1.28, 0.91, 0.88],
        [0.74, 0.92, 1.12, 1.21],
    ]
)
_MINUS_35 = ("TTGACA", (0.69, 0.79, 0.61, 0.56, 0.54, 0.54))
_MINUS_10 = ("TATAAT", (0.77, 0.76, 0.60, 0.61, 0.56, 0.82))
_SPACERS = (15, 16, 17, 18, 19)
_SPACER_SHARES = (0.08, 0.20, 0.44, 0.20, 0.08)
# Rows are positions, columns A, C, G, T.
_TATA = np.array(
    [
        [0.05, 0.15, 0.05, 0.75],
        [0.88, 0.02, 0.02, 0.08],
        [0.08, 0.02, 0.02, 0.88],
        [0.88, 0.02, 0.02, 0.08],
        [0.62, 0.02, 0.02, 0.34],
        [0.85, 0.02, 0.05, 0.08],
        [0.50, 0.05, 0.15, 0.30],
    ]
)
_INITIATOR = np.array(
    [
        [0.15, 0.35, 0.15, 0.35],
        [0.10, 0.45, 0.10, 0.35],
        [0.85, 0.05, 0.05, 0.05],
        [0.25, 0.25, 0.25, 0.25],
        [0.35, 0.10, 0.10, 0.45],
        [0.15, 0.40, 0.10, 0.35],
        [0.15, 0.35, 0.10, 0.40],
    ]
)


def background(rng: np.random.Generator, count: int, length: int = LENGTH, gc: float = 0.5) -> Codes:
    """Draw sequences, bases as 0..3 for A, C, G, T, shape (count, length)."""
    share = np.clip(rng.normal(gc, 0.05, count), 0.2, 0.8)
    composition = np.stack([1 - share, share, share, 1 - share], axis=1) / 2  # (N, 4)
    steps = composition[:, None] * _BIAS  # (N, 4, 4)
    steps = (steps / steps.sum(-1, keepdims=True)).cumsum(-1)
    draws = rng.random((count, length))
    codes = np.empty((count, length), dtype=np.int64)
    codes[:, 0] = (draws[:, :1] > composition.cumsum(1)[:, :3]).sum(1)
    rows = np.arange(count)
    for t in range(1, length):
        codes[:, t] = (draws[:, t, None] > steps[rows, codes[:, t - 1], :3]).sum(1)
    return codes


def bacterial_promoters(rng: np.random.Generator, count: int) -> Codes:
    """Draw promoters with -35 and -10 boxes, shape (count, 81)."""
    codes = background(rng, count, gc=0.46)
    for i in range(count):
        spacer = rng.choice(_SPACERS, p=_SPACER_SHARES)
        minus_10 = START - 12 + rng.integers(-1, 2)
        for (box, certain), at in ((_MINUS_10, minus_10), (_MINUS_35, minus_10 - spacer - 6)):
            for j, (letter, p) in enumerate(zip(box, certain, strict=True)):
                codes[i, at + j] = "ACGT".index(letter) if rng.random() < p else rng.integers(4)
        codes[i, START] = rng.choice(4, p=(0.5, 0.1, 0.3, 0.1))
    return codes


def eukaryotic_promoters(rng: np.random.Generator, count: int) -> Codes:
    """Draw promoters with TATA box and initiator, shape (count, 81)."""
    codes = background(rng, count, gc=0.48)
    for i in range(count):
        for matrix, at in ((_TATA, START - 31 + rng.integers(-2, 3)), (_INITIATOR, START - 2)):
            if rng.random() < 0.75:
                codes[i, at : at + len(matrix)] = [rng.choice(4, p=row) for row in matrix]
    return codes


def genome_with_genes(rng: np.random.Generator, length: int, gc: float) -> Codes:
    """Draw a genome: genes of biased codons on both strands, background between them, shape (length,)."""
    usage = rng.dirichlet(np.full(64, 0.6))
    first, second, third = np.unravel_index(np.arange(64), (4, 4, 4))
    codons = np.stack([first, second, third], axis=1)
    rich = ((codons == 1) | (codons == 2)).sum(1)
    usage = usage * np.where(rich > 1, gc, 1 - gc)
    usage[[48, 50, 56]] = 0  # TAA, TAG, TGA end a gene
    usage /= usage.sum()
    parts: list[Codes] = []
    total = 0
    while total < length:
        gene = codons[rng.choice(64, size=rng.integers(80, 400), p=usage)].ravel()
        gene = np.concatenate([[0, 3, 2], gene, codons[rng.choice([48, 50, 56])]])
        parts += [background(rng, 1, int(rng.integers(40, 300)), gc)[0], gene if rng.random() < 0.5 else 3 - gene[::-1]]
        total += len(parts[-1]) + len(parts[-2])
    return np.concatenate(parts)[:length]


def text(codes: Codes) -> str:
    """Turn bases 0..3 into letters."""
    return _BASES[codes].tobytes().decode("ascii")


def write_fasta(path: Path, records: Iterable[tuple[str, str]]) -> Path:
    """Write records, 60 letters a line."""
    lines = []
    for name, sequence in records:
        lines += [f">{name}", *(sequence[i : i + 60] for i in range(0, len(sequence), 60))]
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


def write_sample(folder: Path, seed: int = 0) -> list[Path]:
    """Fabricate a few files in the formats that the DNA domain reads; the same seed gives the same bytes.

    Args:
        folder: Where to write; made when missing.
        seed: Seed of everything.

    Returns:
        The files: ``promoters.fa`` and ``background.fa`` (2,000 sequences of 81 bases each), ``gue/train.csv``,
        ``dev.csv`` and ``test.csv`` (0 background, 1 bacterial, 2 eukaryotic promoter), ``genome.fa`` (20,000 bases,
        8 promoters, partly soft-masked), ``genome.bed``, ``variants.vcf`` of it, ``reads.fastq.gz``, three
        ``genomes/*.fa``, and ``elements.csv`` (4,000 sequences each of background, bacterial and eukaryotic promoters).
    """
    rng = np.random.default_rng(seed)
    (folder / "gue").mkdir(parents=True, exist_ok=True)
    (folder / "genomes").mkdir(exist_ok=True)
    promoters, plain = bacterial_promoters(rng, 2000), background(rng, 2000)
    paths = [
        write_fasta(folder / "promoters.fa", ((f"promoter_{i}", text(row)) for i, row in enumerate(promoters))),
        write_fasta(folder / "background.fa", ((f"background_{i}", text(row)) for i, row in enumerate(plain))),
    ]
    paths += _write_gue(rng, folder / "gue")
    paths += _write_genome(rng, folder)
    paths.append(_write_reads(rng, folder / "reads.fastq.gz"))
    for number, gc in enumerate((0.38, 0.5, 0.62), start=1):
        record = (f"genome_{number} fabricated", text(genome_with_genes(rng, 30_000, gc)))
        paths.append(write_fasta(folder / "genomes" / f"genome_{number}.fa", [record]))
    paths.append(_write_elements(rng, folder / "elements.csv"))
    paths.append(_write_variants(rng, folder))
    return paths


def _write_elements(rng: np.random.Generator, path: Path, count: int = 4000) -> Path:
    kinds = {
        "background": background(rng, count),
        "bacterial": bacterial_promoters(rng, count),
        "eukaryotic": eukaryotic_promoters(rng, count),
    }
    rows = [(text(row), label) for label, codes in kinds.items() for row in codes]
    with path.open("w", newline="", encoding="ascii") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["sequence", "label"])
        writer.writerows(rows[i] for i in rng.permutation(len(rows)))
    return path


def _write_variants(rng: np.random.Generator, folder: Path) -> Path:
    """Write variants of ``genome.fa``: single bases, insertions, deletions, two alleles, and two that have no score."""
    genome = "".join((folder / "genome.fa").read_text("ascii").splitlines()[1:]).upper()
    lines = [
        "##fileformat=VCFv4.3",
        f"##contig=<ID=contig_1,length={len(genome)}>",
        "#CHROM\tPOS\tID\tREF\tALT\tQUAL\tFILTER\tINFO",
    ]
    for number, at in enumerate(np.sort(rng.choice(len(genome) - 4, 60, replace=False)).tolist()):
        ref, others = genome[at], [b for b in "ACGT" if b != genome[at]]
        alts = [others[rng.integers(3)]]
        if number % 10 == 3:
            alts = others[:2]
        elif number % 10 == 5:
            ref = genome[at : at + 3]
            alts = [genome[at]]
        elif number % 10 == 7:
            alts = [genome[at] + "ACG"]
        elif number == 9:
            ref, alts = others[0], [genome[at]]  # swapped: refused, with the reason
        elif number == 19:
            alts = ["<DEL>"]
        lines.append(f"contig_1\t{at + 1}\tvariant_{number}\t{ref}\t{','.join(alts)}\t.\tPASS\t.")
    path = folder / "variants.vcf"
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return path


def _write_gue(rng: np.random.Generator, folder: Path) -> list[Path]:
    paths = []
    for name, count in (("train", 400), ("dev", 50), ("test", 50)):
        kinds = (background(rng, count), bacterial_promoters(rng, count), eukaryotic_promoters(rng, count))
        rows = [(text(row), label) for label, codes in enumerate(kinds) for row in codes]
        paths.append(folder / f"{name}.csv")
        with paths[-1].open("w", newline="", encoding="ascii") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["sequence", "label"])
            writer.writerows(rows[i] for i in rng.permutation(len(rows)))
    return paths


def _write_genome(rng: np.random.Generator, folder: Path) -> list[Path]:
    length, count = 20_000, 8
    codes = background(rng, 1, length)[0]
    room = length // count
    starts = np.arange(count) * room + rng.integers(0, room - LENGTH, count)
    for start, row in zip(starts, bacterial_promoters(rng, count), strict=True):
        codes[start : start + LENGTH] = row
    letters = list(text(codes))
    for start in rng.integers(0, length - 400, 4):  # repeats as a masker would mark them
        letters[start : start + 400] = [c.lower() for c in letters[start : start + 400]]
    bed = folder / "genome.bed"
    rows = [f"contig_1\t{s}\t{s + LENGTH}\tpromoter_{i}\t0\t+" for i, s in enumerate(starts)]
    bed.write_text("\n".join(rows) + "\n", encoding="ascii")
    return [write_fasta(folder / "genome.fa", [("contig_1 fabricated", "".join(letters))]), bed]


def _write_reads(rng: np.random.Generator, path: Path) -> Path:
    lines = []
    for i in range(200):
        size = int(rng.integers(100, 300))
        quality = (np.clip(rng.normal(34, 5, size), 2, 41).astype(np.uint8) + 33).tobytes().decode("ascii")
        lines += [f"@read_{i}", text(background(rng, 1, size)[0]), "+", quality]
    with path.open("wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as stream:
        stream.write(("\n".join(lines) + "\n").encode("ascii"))
    return path
