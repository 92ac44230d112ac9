"""``vertebra run``, ``demo`` and ``sample``: the verbs that work through pipelines and samples."""

from __future__ import annotations

import itertools
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from types import ModuleType

from rich.console import Console

from vertebra.cli.parsing import Parser
from vertebra.cli.tables import print_table
from vertebra.errors import ConfigError, UnknownNameError
from vertebra.pipelines.catalog import pipelines

MOST_LISTED = 12
"""Sample files of one folder that are listed one by one."""


def run(verb: str, args: list[str]) -> int:
    """Dispatch to the verb."""
    return {"run": _run, "demo": _demo, "sample": _sample}[verb](args)


def _run(args: list[str]) -> int:
    known = pipelines()
    if not args or args[0].startswith("-"):
        if args and args[0] not in ("-h", "--help"):
            raise ConfigError(
                f"run: the pipeline comes first, as in `vertebra run {next(iter(known), 'NAME')} ...`, got {args[0]!r}."
            )
        print("usage: vertebra run DOMAIN/VERB INPUT... -o OUT [--model NAME|DIR] [options]\n\npipelines:")
        print("\n".join(f"  {p.name:<20} {p.summary}" for p in known.values()))
        print("\noptions of one: vertebra run DOMAIN/VERB --help")
        return 0
    name, *rest = args
    if name not in known:
        raise UnknownNameError("pipeline", name, known)
    from vertebra.pipelines.base import pipeline_class

    cls = pipeline_class(name)
    parser = Parser(f"run {name}", f"{known[name].summary}. Reads {known[name].inputs}; writes {known[name].outputs}.")
    count = "+" if known[name].needs_input else "*"
    parser.add_argument("inputs", nargs=count, metavar="INPUT", help=known[name].inputs)
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help=known[name].outputs)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    cls.add_arguments(parser)
    options = parser.parse_args(rest)
    result = cls.from_args(options).run(options.inputs, options.output, progress=not options.quiet)
    print(result)
    return 3 if result.bad else 0


def _demo(args: list[str]) -> int:
    known = sorted({p.domain for p in pipelines().values()})
    parser = Parser("demo", "Run every pipeline on its sample data with the bundled models; one report.html.")
    parser.add_argument("domains", nargs="*", metavar="DOMAIN", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("-o", "--output", default="demo", metavar="DIR", help="where to write (default: demo)")
    options = parser.parse_args(args)
    for domain in options.domains:
        if domain not in known:
            raise UnknownNameError("domain", domain, known)
    from vertebra.pipelines.demo.base import run_demo

    with Console(stderr=True).status("samples") as status:
        done = run_demo(options.domains or known, Path(options.output), lambda name: status.update(name))
    rows = [
        (s.pipeline, s.inputs, str(s.output), f"{s.result.good:,}", f"{s.result.bad or ''}", f"{s.seconds:.1f}")
        for s in done.stages
    ]
    print_table("what ran", ("pipeline", "input", "output", "records", "bad", "seconds"), rows)
    print(
        f"{len(done.stages)} commands in {done.seconds:.0f} seconds; the bad records are meant to be: each is listed."
    )
    print(f"wrote the report and the files it shows to {done.report}")
    return 0


def _sample(args: list[str]) -> int:
    known = sample_domains()
    parser = Parser("sample", "Fabricate a few files in the real formats of a domain; same seed, same files.")
    parser.add_argument("domain", metavar="DOMAIN", help=f"one of {', '.join(known)}; its own options come after it")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to write to")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: 0)")
    own = _sample_module(args[0]) if args and args[0] in known else None
    if more := getattr(own, "add_arguments", None):
        more(parser)
    options = parser.parse_args(args)
    if options.domain not in known:
        raise UnknownNameError("domain", options.domain, known)
    folder = Path(options.output)
    if own is not None and more:
        from vertebra.pipelines.progress import progress_bar

        written = own.from_args(folder, options, progress_bar)
    else:
        written = _sample_module(options.domain).write_sample(folder, seed=options.seed)
    paths = [Path(path) for path in written]
    for place, held in itertools.groupby(paths, key=lambda path: path.parent):
        files_there = list(held)
        if len(files_there) > MOST_LISTED:
            print(f"  {place}/  {len(files_there):,} files, {sum(p.stat().st_size for p in files_there):,} bytes")
        else:
            print("\n".join(f"  {path}  {path.stat().st_size:,} bytes" for path in files_there))
    print(f"wrote {len(paths)} sample files to {folder}")
    return 0


def _sample_module(domain: str) -> ModuleType:
    return import_module(f"vertebra.domains.{domain}.sample")


def sample_domains() -> list[str]:
    """Names of the domains that fabricate samples."""
    return sorted(p.parent.name for p in (Path(str(files("vertebra"))) / "domains").glob("*/sample.py"))
