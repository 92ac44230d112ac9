"""The frame of the demo: samples, pipelines that are timed as their commands run them, and the report."""

from __future__ import annotations

import argparse
import json
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from vertebra.backbones.catalog import bundled_models
from vertebra.errors import UnknownNameError
from vertebra.pipelines.base import RunResult, pipeline_class
from vertebra.pipelines.dark import dark_twins
from vertebra.pipelines.report import Report

DOMAINS = {
    "dna": ("DNA", "Promoters found and made, letter by letter."),
    "speech": ("Speech", "Words, when they are said, and in which language."),
    "vision": ("Vision", "Images named, drawn and completed."),
    "mesh": ("Meshes", "Clean meshes of few faces for scans and clouds of points."),
    "action": ("Action", "Demonstrations as tokens of B-splines, and a policy that moves an arm."),
    "timeseries": ("Time series", "What comes next, and how sure that is, for series never seen before."),
}
"""Title and sentence of each domain, in the order of the report."""


@dataclass(frozen=True)
class Stage:
    """What one command did.

    Args:
        pipeline: Name of the pipeline.
        inputs: Files and folders it read, in a few words.
        output: Its main file.
        result: Counts of records.
        seconds: From the start, with loading the model.
    """

    pipeline: str
    inputs: str
    output: Path
    result: RunResult
    seconds: float


@dataclass(frozen=True)
class DemoResult:
    """What ``run_demo`` did.

    Args:
        report: The page.
        stages: Commands, in their order.
        seconds: All together, with samples, figures and page.
    """

    report: Path
    stages: list[Stage]
    seconds: float


@dataclass
class Demo:
    """What the demos of the domains work with.

    Args:
        samples: Folder with the domain's sample files.
        results: Folder for what the pipelines write.
        report: Where to tell it.
        tell: Called with the name of every pipeline before it runs.
        stages: Commands so far.
    """

    samples: Path
    results: Path
    report: Report
    tell: Callable[[str], None]
    stages: list[Stage] = field(default_factory=list)

    def run(self, verb: str, inputs: Sequence[Path], output: str, options: str = "") -> Path:
        """Run a command, show it in the report, and return its main file.

        Args:
            verb: Name of the pipeline.
            inputs: Files and folders.
            output: Name of the main file, in ``results``.
            options: As they would be typed.
        """
        self.tell(verb)
        path, words = self.results / output, shlex.split(options)
        begin = time.perf_counter()
        parser = argparse.ArgumentParser(prog=verb, allow_abbrev=False)
        cls = pipeline_class(verb)
        cls.add_arguments(parser)
        done = cls.from_args(parser.parse_args(words)).run(list(inputs), path)
        seconds = time.perf_counter() - begin
        self.stages.append(Stage(verb, ", ".join(source.name for source in inputs), path, done, seconds))
        self.report.code(shlex.join(["vertebra", "run", verb, *map(str, inputs), "-o", str(path), *words]))
        return path

    def damaged(self, errors: Path, what: str, *, by: str = "file") -> None:
        """Tell what was wrong with the bad records of a run, each called by its file or its name."""
        bad = [json.loads(line) for line in errors.read_text(encoding="utf-8").splitlines()]
        self.report.text(f"{len(bad)} {what}; the others are done all the same, and the exit status is 3.")
        rows = [(Path(e["file"]).name if by == "file" else e[by], e["rule"], e["advice"]) for e in bad]
        self.report.table(rows, ("file" if by == "file" else "series", "what is wrong", "what to do"))


def run_demo(domains: Sequence[str], out: Path, tell: Callable[[str], None] = lambda name: None) -> DemoResult:
    """Write samples, run the pipelines of each domain on them, and write ``report.html``.

    Args:
        domains: Names of domains.
        out: Folder for samples, results and report.
        tell: Called with the name of every pipeline before it runs.

    Raises:
        UnknownNameError: A domain has no demo.
        ConfigError: Nothing can be written there.
    """
    for domain in domains:
        if domain not in DOMAINS:
            raise UnknownNameError("domain", domain, sorted(DOMAINS))
    begin, stages = time.perf_counter(), list[Stage]()
    report = Report(
        "vertebra demo",
        "Every pipeline on fabricated samples, with the models that come with the package, on this machine. None of it "
        "is real data; any backbone serves each of these domains by changing one word.",
    )
    with dark_twins():
        for domain in (name for name in DOMAINS if name in domains):
            samples, results = out / domain / "sample", out / domain / "results"
            import_module(f"vertebra.domains.{domain}.sample").write_sample(samples, seed=0)
            report.chapter(*DOMAINS[domain])
            import_module(f"vertebra.pipelines.demo.{domain}").show(Demo(samples, results, report, tell, stages))
        seconds = time.perf_counter() - begin
        _tell_stages(report, stages, seconds)
        path = report.write(out / "report.html")
    return DemoResult(path, stages, seconds)


def _tell_stages(report: Report, stages: Sequence[Stage], seconds: float) -> None:
    import torch

    done = sum(stage.result.good for stage in stages)
    report.headline(
        [
            (len({stage.pipeline for stage in stages}), "pipelines"),
            (done, "records"),
            (f"{seconds:.0f} s", f"on {torch.get_num_threads()} threads, figures and all"),
            (len(bundled_models()), "bundled models, at most 4 MB each"),
        ]
    )
    report.chapter("What ran").section("Every command, in its order")
    rows = [(s.pipeline, s.inputs, s.output.name, s.result.good, s.result.bad, round(s.seconds, 1)) for s in stages]
    report.table(rows, ("pipeline", "input", "output", "records", "bad", "seconds"))
