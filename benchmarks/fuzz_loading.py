"""Random damage to small models, thrown at everything that loads: `fuzz_loading.py --minutes 20 --out DIR`.

A case is made from a seed and a number, so it can be made again with `--case N`. A loader may succeed or raise a
``VertebraError``. Anything else is a finding: another error, a crash, code that was run, more than the time or the
memory of a case. Findings are kept in DIR with their files; the same error at the same line is kept once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

SECONDS = 20  # of computing that a load may take; thirty times that on the clock
MEMORY = 2 << 30  # bytes a case may take beyond what the process has
CANARY = "CODE_WAS_RUN"
IMPORTED = "imported_by_name"  # a module that must not be looked for

NUMBERS = (0, 1, -1, 2, 7, 255, 1 << 16, 10**7, 10**9, (1 << 31) - 1, 1 << 31, 1 << 53, 1 << 63, 1 << 64, 10**40)
WORDS = (
    "", "a", "../../etc/passwd", "/etc/passwd", "vertebra.cli.main", "vertebra.os.system", "os.system", "builtins.eval",
    "__main__.x", "vertebra.domains.model.DomainModel", "vertebra.domains.base.nn.Module", "..", ".", "timm", "nan",
    f"{IMPORTED}.X", f'{{"class_path": "{IMPORTED}.X"}}', f"vertebra.domains.base.{IMPORTED}.X",
    "F32", "F64", "F8_E5M2", "BOOL", "hf-hub:a/b", "\x00", "\ud800", "é" * 50, "x" * 5000, "causal", "M", "MA" * 500,
)  # fmt: skip


class Canary:
    """Makes a file when it is unpickled by something that trusts pickles."""

    def __reduce__(self) -> Any:
        return os.system, (f"touch {CANARY}",)


class Watch:
    """Makes the same file when the module is looked for."""

    def find_spec(self, name: str, *_: object) -> None:
        """Look for nothing, and tell."""
        if name == IMPORTED:
            Path(CANARY).touch()


# ---------------------------------------------------------------- what is damaged


def make_seeds(folder: Path) -> None:
    """Write valid sources of every kind into a folder."""
    import torch
    from safetensors.torch import save_file

    from vertebra.backbones.base import resolve
    from vertebra.backbones.catalog import bundled_models
    from vertebra.backbones.loading.pretrained import read_config
    from vertebra.domains.dna.task import DNAClassificationTask, DNALanguageTask
    from vertebra.domains.finetuning import TuneConfig
    from vertebra.domains.saving import build_model, save_model
    from vertebra.domains.spec import DataSpec
    from vertebra.domains.timeseries.task import ForecastTask
    from vertebra.domains.vision.task import ImageClassificationTask
    from vertebra.errors import VertebraError

    for name in bundled_models():
        for preset in ("hybrid_test", "illama_test", "fit_test", "opt_test", "axial_test", "tsfm_test"):
            config = read_config(name)
            backbone = resolve(preset).replace(causal=config["backbone"]["causal"])
            with contextlib.suppress(VertebraError, RuntimeError):  # not every model takes every backbone
                save_model(build_model({**config, "backbone": backbone.to_dict()}), folder / f"{name}-{preset}")
    tensors = {"embed.weight": torch.randn(7, 4), "layers.0.bias": torch.zeros(4), "half": torch.ones(3).half()}
    save_file(tensors, folder / "weights.safetensors", metadata={"format": "pt"})
    torch.save(tensors, folder / "weights.pth")
    torch.save({"model": tensors, "args": argparse.Namespace(lr=0.1), "epoch": 3}, folder / "wrapped.pth")
    torch.save(tensors, folder / "legacy.bin", _use_new_zipfile_serialization=False)
    torch.save({"model": tensors, "x": Canary()}, folder / "evil.pth")
    (folder / "evil.safetensors").write_bytes(pickle.dumps(Canary()))
    for task, name, data in (
        (DNAClassificationTask(backbone="hybrid_test"), "dna_promoter", "DNASequenceData"),
        (DNALanguageTask(backbone="axial_test", tune=TuneConfig(lora_rank=2)), "dna_lm", "DNALanguageData"),
        (ForecastTask(backbone="illama_test", ema=0.9), "timeseries_zero", "SeriesData"),
        (ImageClassificationTask(backbone="fit_test,causal=false"), "vision_shapes", "ImageData"),
    ):
        task.build(DataSpec.from_dict(read_config(name)["spec"]))
        lightning = {"state_dict": task.state_dict(), "hyper_parameters": dict(task.hparams), "epoch": 1}
        task.on_save_checkpoint(lightning)
        path = f"{type(task).__module__.removesuffix('.task')}.data.{data}"
        lightning["data"] = {"class_path": path, "init_args": {"batch_size": 4, "seed": 1}}
        torch.save(lightning, folder / f"{name}.ckpt")
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    shutil.copyfile(folder / "dna_lm.ckpt", run / "checkpoints" / "best.ckpt")
    shutil.copytree(folder / "dna_lm-hybrid_test", run / "model")
    (run / "metrics.json").write_text(json.dumps({"validation": {"val/loss": 1.5}, "seed": 0, "command": "x"}))
    shards = folder / "shards"
    shards.mkdir()
    for number, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, shards / f"model-{number}.safetensors")
    index = {"metadata": {}, "weight_map": {name: f"model-{number}.safetensors" for number, name in enumerate(tensors)}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    (shards / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 4, "num_hidden_layers": 1}))
    for name, kind in (("stored.zip", zipfile.ZIP_STORED), ("packed.zip", zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(folder / name, "w", kind) as archive:
            for path in sorted(shards.iterdir()):
                archive.write(path, f"inner/{path.name}")
            archive.write(folder / "weights.pth", "inner/model.pth")


def make_published(folder: Path) -> None:
    """Add small models of transformers, which the converters read."""
    import transformers

    transformers.logging.set_verbosity_error()
    small: dict[str, Any] = {"vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 2}
    heads = {**small, "num_attention_heads": 2, "intermediate_size": 24, "max_position_embeddings": 32}
    llama = transformers.LlamaConfig(**heads, num_key_value_heads=1)
    mamba = transformers.Mamba2Config(**small, num_heads=4, head_dim=8, state_size=8, n_groups=1, expand=2)
    mamba_1 = transformers.MambaConfig(**small, state_size=4)
    transformers.LlamaForCausalLM(llama).save_pretrained(folder / "llama")
    transformers.Mamba2ForCausalLM(mamba).save_pretrained(folder / "mamba2")
    transformers.MambaForCausalLM(mamba_1).save_pretrained(folder / "mamba")


# ---------------------------------------------------------------- damage


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or insert."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not out:
            return bytes(rng.randbytes(rng.choice((0, 1, 8, 64))))
        near = rng.random() < 0.5  # headers are at the start, directories of zips at the end
        at = rng.randrange(min(len(out), 300)) if near else rng.randrange(len(out))
        at = len(out) - 1 - at if rng.random() < 0.3 else at
        size = rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(7):
            case 0:
                out[at] ^= 1 << rng.randrange(8)
            case 1:
                out[at : at + size] = rng.choice((b"\0", b"\xff", b"\x80", b"9", b"[", b'"')) * size
            case 2:
                out[at : at + size] = rng.randbytes(size)
            case 3:
                del out[at:]
            case 4:
                del out[at : at + size]
            case 5:
                out[at:at] = out[at : at + size * 8]
            case _:
                out[at:at] = struct.pack("<Q", rng.choice(NUMBERS) % (1 << 64))
    return bytes(out)


def damage_json(value: Any, rng: random.Random) -> Any:
    """Change one to three places of a JSON value."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _damage_once(value, rng)
    return value


def _damage_once(value: Any, rng: random.Random) -> Any:
    deeper = isinstance(value, dict | list) and value and rng.random() < 0.85
    if not deeper:
        return _odd_value(value, rng)
    if isinstance(value, list):
        at = rng.randrange(len(value))
        match rng.randrange(5):
            case 0:
                return value[:at] + value[at + 1 :]
            case 1:
                return value + [value[at]] * rng.choice((1, 1000))
            case _:
                return [_damage_once(v, rng) if i == at else v for i, v in enumerate(value)]
    key = rng.choice(list(value))
    match rng.randrange(8):
        case 0:
            return {k: v for k, v in value.items() if k != key}
        case 1:
            return {**value, rng.choice(WORDS): value[key]}
        case 2:
            return {(rng.choice(WORDS) if k == key else k): v for k, v in value.items()}
        case 3:
            return {**value, key: value[rng.choice(list(value))]}
        case _:
            return {k: _damage_once(v, rng) if k == key else v for k, v in value.items()}


def _odd_value(value: Any, rng: random.Random) -> Any:
    match rng.randrange(10):
        case 0 | 1 if isinstance(value, int):
            return rng.choice((value + 1, value - 1, value * 2, -value, value * 1000, value // 2))
        case 0 | 1 | 2 | 3:
            return rng.choice(NUMBERS)
        case 4:
            return rng.choice((0.5, -1.5, 1e300, float("nan"), float("inf"), 1e-300))
        case 5 | 6:
            return rng.choice(WORDS)
        case 7:
            return rng.choice((None, True, False, [], {}, [[]], [None], {"a": 1}, [1, 2, 3]))
        case 8:
            nested: Any = 1
            for _ in range(rng.choice((3, 50, 500))):
                nested = [nested] if rng.random() < 0.5 else {"a": nested}
            return nested
        case _:
            return [rng.choice(NUMBERS[:8])] * rng.choice((1, 5, 5000))


def damage_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Change the header as JSON, and write a length that fits."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(damage_json(json.loads(data[8 : 8 + length]), rng)).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def damage_zip(data: bytes, rng: random.Random) -> bytes:
    """Change members, their names and their kinds, with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as archive:
        members = source.infolist()
        chosen = rng.randrange(len(members))
        for number, info in enumerate(members):
            content, name = source.read(info), info.filename
            made = zipfile.ZipInfo(name)
            made.compress_type = info.compress_type
            if number == chosen:
                match rng.randrange(7):
                    case 0:
                        continue
                    case 1:
                        made = zipfile.ZipInfo(
                            rng.choice(("../x", "/tmp/fuzzed", "a/../../x", "c:\\x", ".", "a//b", name))
                        )
                    case 2:
                        made.external_attr = rng.choice((0o120777, 0o020666, 0o040755)) << 16
                    case 3:
                        made.compress_type, content = zipfile.ZIP_DEFLATED, bytes(rng.choice((1 << 10, 1 << 27)))
                    case _:
                        content = damage_bytes(content, rng)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a name that stands twice
                archive.writestr(made, content)
    return out.getvalue()


def damage_checkpoint(data: bytes, rng: random.Random) -> bytes:
    """Change values of a checkpoint of Lightning: its settings, or its tensors."""
    import torch

    found = torch.load(io.BytesIO(data), weights_only=True)
    if rng.random() < 0.75:
        rest = damage_json({k: v for k, v in found.items() if k != "state_dict"}, rng)
        found = {"state_dict": found["state_dict"], **rest} if isinstance(rest, dict) else rest
    else:
        state, odd = dict(found["state_dict"]), rng.choice((*NUMBERS, *WORDS, None, [], {}))
        key = rng.choice(list(state))
        value = state[key]
        if rng.random() < 0.2:
            del state[key]
        state[rng.choice((key, key, odd if not isinstance(odd, list | dict) else key))] = rng.choice(
            (odd, value.half(), value[None], value.expand(1 << 30, *value.shape), value.to_sparse(), value.to("meta"),
             value.flatten()[:1].expand(value.shape), torch.zeros(0), value.to(torch.complex64))
        )  # fmt: skip
        found["state_dict"] = state
    out = io.BytesIO()
    torch.save(found, out)
    return out.getvalue()


def damage(path: Path, rng: random.Random) -> None:
    """Damage one file in the way of its kind, or any."""
    data = path.read_bytes()
    changed = None
    if rng.random() < 0.7:
        with contextlib.suppress(ValueError, KeyError, zipfile.BadZipFile, struct.error, RecursionError):
            if path.suffix == ".json":
                changed = json.dumps(damage_json(json.loads(data), rng)).encode("utf-8", "surrogatepass")
            elif path.suffix == ".safetensors":
                changed = damage_safetensors(data, rng)
            elif path.suffix == ".ckpt" and rng.random() < 0.8:
                changed = damage_checkpoint(data, rng)
            elif data[:2] == b"PK":
                changed = damage_zip(data, rng)
    path.write_bytes(damage_bytes(data, rng) if changed is None else changed)


def make_case(seeds: Path, place: Path, rng: random.Random) -> Path:
    """Copy a valid source and damage it."""
    kinds = sorted({path.name.partition("-")[0] for path in seeds.iterdir()})  # not six times as many models of ours
    source = rng.choice(sorted(seeds.glob(f"{rng.choice(kinds)}*")))
    case = place / source.name
    if source.is_dir():
        shutil.copytree(source, case)
        files = [p for p in sorted(case.rglob("*")) if p.suffix in (".json", ".safetensors", ".ckpt")]
        match rng.randrange(30):
            case 0:
                rng.choice(files).unlink()
            case 1:
                chosen = rng.choice(files)
                chosen.unlink()
                chosen.mkdir()
            case 2:
                chosen = rng.choice(files)
                chosen.unlink()
                chosen.symlink_to(rng.choice(("/etc/passwd", "/dev/zero", "nowhere", str(case), "../x")))
            case _:
                damage(rng.choice([*files, *case.glob("config.json")]), rng)
    else:
        shutil.copyfile(source, case)
        damage(case, rng)
        if rng.random() < 0.1:
            case = case.rename(case.with_suffix(rng.choice((".safetensors", ".pth", ".ckpt", ".zip", ".bin"))))
    return case


# ---------------------------------------------------------------- loaders


def loaders(case: Path, conversions: bool) -> list[Callable[[], object]]:
    """Everything that reads a source of its kind."""
    from vertebra.backbones.base import create_backbone
    from vertebra.backbones.loading.checkpoints import open_checkpoint
    from vertebra.backbones.loading.pretrained import read_tensors
    from vertebra.cli import main
    from vertebra.cli.info import told
    from vertebra.domains.base import init_weights, load_task
    from vertebra.domains.loading import load
    from vertebra.domains.saving import load_model
    from vertebra.errors import VertebraError

    def checkpoint() -> object:
        opened = open_checkpoint(case)
        return opened.config, opened.tensors

    def shown() -> object:
        for as_json in (False, True):
            text = told(str(case), as_json=as_json)
            if not all(c.isprintable() or c == "\n" for c in text):
                raise AssertionError("what steers a terminal would be printed")
        return text

    def configured() -> object:
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            status = main(["config", "--ckpt_path", str(case)])
        if status == 0:
            return status
        if status == 2:
            raise VertebraError(told.getvalue())
        raise AssertionError(told.getvalue()[-1000:])

    def begun() -> object:
        return init_weights(load_model("dna_promoter"), str(case), "all")

    found: list[Callable[[], object]] = [checkpoint, shown]
    if case.is_dir():
        found += [lambda: load_model(case), lambda: create_backbone(f"local-dir:{case}"), lambda: read_tensors(case)]
    if case.suffix == ".ckpt":
        found += [lambda: load_task(case), configured]
    if case.is_dir() or case.suffix == ".ckpt":
        found.append(begun)
    if conversions:
        found.append(lambda: load(case))
    return found


class _Slow(BaseException):
    pass


def run_case(
    seeds: Path, seed: int, number: int, conversions: bool, keep: Path | None
) -> tuple[Counter[str], list[str]]:
    """Run one case; return how the loaders ended, and the findings."""
    from vertebra.errors import VertebraError

    ends: Counter[str] = Counter()
    findings: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place:
        os.chdir(place)
        case = make_case(seeds, Path(place), random.Random(f"{seed}-{number}"))
        for load in loaders(case, conversions):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            try:
                load()
                ends["loaded"] += 1
            except VertebraError as e:
                ends[type(e).__name__] += 1
            except (Exception, _Slow) as e:
                frames = [f for f in traceback.extract_tb(e.__traceback__) if "fuzz_loading" not in f.filename]
                places = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-6:]))
                findings.append(f"{type(e).__name__} in {places}: {str(e)[:200]!r}")
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
            if grown > MEMORY // 2:
                findings.append(f"memory grew by {grown >> 20} MiB")
            if Path(CANARY).exists() or Path("/tmp/fuzzed").exists():
                findings.append("code was run, or a file was written outside")
        if findings and keep is not None:
            kept = keep / f"{seed}-{number}"
            shutil.copytree(place, kept, symlinks=True, dirs_exist_ok=True)
            (kept / "findings.txt").write_text("\n".join(findings))
        os.chdir("/")
    return ends, findings


def work(seeds: Path, options: argparse.Namespace, worker: int, first: int, now: Any, out: Any) -> None:
    """Run cases until the time is up; ``now`` holds the number and the start of the running one."""
    import torch

    from vertebra.cli import lightning_cli  # noqa: F401  # imported before memory is limited
    from vertebra.domains import base, loading  # noqa: F401

    sys.meta_path.insert(0, Watch())  # type: ignore[arg-type]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, _stop)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY * 2, used + MEMORY * 2))
    number = first
    while time.time() < options.until:
        now[2 * worker], now[2 * worker + 1] = number, time.time()
        with contextlib.redirect_stdout(io.StringIO()):
            ends, findings = run_case(seeds, options.seed, number, options.conversions, options.out)
        out.put((number, ends, findings))
        number += options.workers


def _stop(*_: object) -> None:
    raise _Slow(f"more than {SECONDS} seconds")


def main() -> None:
    """Run workers, watch them, and tell what they found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "fuzz_findings")
    parser.add_argument("--case", type=int, help="run this one alone, with its errors in full")
    parser.add_argument("--conversions", action="store_true", help="also convert published models (needs `bench`)")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seeds = Path(tempfile.mkdtemp(prefix="fuzz-seeds-"))
    make_seeds(seeds)
    if options.conversions:
        make_published(seeds)
    if options.case is not None:
        signal.signal(signal.SIGPROF, _stop)
        print(*run_case(seeds, options.seed, options.case, options.conversions, options.out))
        return
    options.until = time.time() + 60 * options.minutes
    context = multiprocessing.get_context("spawn")
    now, results = context.Array("d", 2 * options.workers), context.Queue()
    running: dict[int, Any] = {}

    def start(worker: int, first: int) -> None:
        now[2 * worker + 1] = time.time()
        running[worker] = context.Process(target=work, args=(seeds, options, worker, first, now, results), daemon=True)
        running[worker].start()

    for worker in range(options.workers):
        start(worker, worker)
    cases, ends, found = 0, Counter[str](), dict[str, tuple[int, int]]()
    told = time.time()
    while running:
        with contextlib.suppress(Exception):
            number, ended, findings = results.get(timeout=1)
            cases, ends = cases + 1, ends + ended
            for text in findings:
                key = text.partition(":")[0] if "memory" in text else text.rpartition(": ")[0]
                if key not in found:
                    print(f"case {number}: {text}", flush=True)
                found[key] = (found.get(key, (number, 0))[0], found.get(key, (0, 0))[1] + 1)
        for worker, process in list(running.items()):
            number, hung = int(now[2 * worker]), time.time() - now[2 * worker + 1] > 30 * SECONDS
            if hung:
                process.kill()
                process.join()
            if not process.is_alive() and results.empty():
                del running[worker]
                if process.exitcode != 0 or hung:
                    key = "hangs" if hung else f"crash with exit status {process.exitcode}"
                    print(f"case {number}: {key}", flush=True)
                    found[key] = (number, found.get(key, (0, 0))[1] + 1)
                    if time.time() < options.until:
                        start(worker, number + options.workers)
        if time.time() - told > 60:
            told = time.time()
            print(f"{cases} cases, {sum(ends.values())} loads, {len(found)} kinds of findings", flush=True)
    shutil.rmtree(seeds)
    print(f"\n{cases} cases of seed {options.seed}: {', '.join(f'{v} {k}' for k, v in ends.most_common())}")
    for key, (number, count) in found.items():
        print(f"{count} x {key} (first: --case {number})")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
