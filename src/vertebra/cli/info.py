"""``vertebra info``: what a name, folder or checkpoint is, from headers alone.

Files may be anybody's, so their values are shown as text whatever they are, and at no length.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vertebra.backbones.catalog import bundled_models, presets
from vertebra.backbones.loading.files import inside, read_json
from vertebra.backbones.loading.hub import INDEX, PREFIX, fetch_checkpoint, shard_names
from vertebra.backbones.loading.places import (
    check_source,
    config_of,
    family_of,
    is_repository,
    local_path,
    missing,
    told_kind,
    weight_names,
)
from vertebra.cli.headers import read_model_config, tensors_info
from vertebra.cli.parsing import Parser
from vertebra.cli.recipes import recipe_header, recipes
from vertebra.cli.tables import short_number
from vertebra.cli.trust import OURS, is_allowed
from vertebra.errors import LoadError, UnknownNameError, printable
from vertebra.pipelines.catalog import pipelines

_MOST = 200  # entries of one place that are shown
_LONGEST = 1000  # letters of a value
_DEEPEST = 4


def run(verb: str, args: list[str]) -> int:
    """Print what something is."""
    parser = Parser(verb, "What a preset, bundled model, recipe, pipeline, model directory, run folder or .ckpt is.")
    parser.add_argument("name", metavar="NAME|DIR|FILE.ckpt", help="or hf-hub:ORG/NAME, which is fetched")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(args)
    print(told(options.name, as_json=options.json))
    return 0


def told(name: str, *, as_json: bool = False) -> str:
    """Return what ``describe`` finds as text for the terminal.

    Raises:
        UnknownNameError: As ``describe``.
        LoadError: As ``describe``, or its values are nested too deeply.
    """
    facts = describe(name)
    try:
        if as_json:
            return json.dumps(facts, indent=2, default=str, skipkeys=True).replace("\x7f", r"\u007f")
        return "\n".join(_lines(facts))
    except (RecursionError, ValueError) as e:  # the latter of values that hold themselves
        raise LoadError(f"{name}: its values are nested too deeply to be shown.") from e


def describe(name: str) -> dict[str, Any]:
    """Return JSON-able facts about what ``name`` means.

    Raises:
        UnknownNameError: No preset, model, recipe or pipeline of that name, and no such file or folder.
        LoadError: A file or folder of another kind, or the hub did not give a repository.
    """
    check_source(name)
    if name in presets():
        p = presets()[name]
        use = f"vertebra fit RECIPE --model.backbone {name}"
        return {"backbone": name, "summary": p.summary, "family": p.family, "parameters": p.params,
                "fields": p.fields, "use": use}  # fmt: skip
    if name in bundled_models():
        return _model(bundled_models()[name], name)
    if name in recipes():
        lines = recipe_header(recipes()[name])
        return {"recipe": name, "about": lines, "file": str(recipes()[name]), "use": f"vertebra fit {name}"}
    if name in pipelines():
        v = pipelines()[name]
        model = v.model or ("none bundled; pass --model" if v.needs_model else "not needed")
        return {"pipeline": name, "summary": v.summary, "inputs": v.inputs, "outputs": v.outputs, "model": model,
                "use": f"vertebra run {name} INPUT... -o OUT"}  # fmt: skip
    if name.startswith(PREFIX):
        folder = fetch_checkpoint(name)
        return {**_folder(folder, name), "files": f"{folder} (fetched into the hub's cache, as vertebra.load does)"}
    path = local_path(name)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    everything = {*presets(), *bundled_models(), *recipes(), *pipelines()}
    if is_repository(name) and not difflib.get_close_matches(name, everything, n=1, cutoff=0.5):
        raise missing(name)
    if "/" in name and "." in path.suffix:
        raise LoadError(f"{name}: no such file or folder.")
    raise UnknownNameError("name", name, everything)


def _folder(path: Path, name: str = "") -> dict[str, Any]:
    if (path / "config.json").is_file():
        if "backbone" not in config_of(path) and _weights(path):
            return _published(path, name or str(path))
        return _model(path, name or str(path))
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        metrics = path / "metrics.json"
        facts: dict[str, Any] = {
            "run": str(path.resolve()),
            "holds": sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if not p.name.startswith(".")),
            "checkpoints": sorted(p.name for p in (path / "checkpoints").glob("*.ckpt")),
        }
        if metrics.is_file():
            facts["metrics"] = read_json(metrics, finite=False)  # a loss may be NaN
        if (path / "model" / "config.json").is_file():
            facts["model directory"] = _model(path / "model", str(path / "model"))
        done = (path / "model").is_dir()
        facts["use"] = f"vertebra {'test' if done else 'fit'} --ckpt_path {path}"
        return facts
    if _weights(path):
        return _published(path, name or str(path))
    raise LoadError(f"{path}: neither a model directory (config.json) nor a run folder (checkpoints/).")


def _weights(folder: Path) -> list[Path]:
    """Return the files of weights of a folder, those of an index where it has one."""
    for name in INDEX:
        if (index := inside(folder, name)) is not None:
            names = shard_names(index)
            break
    else:
        names = [n for n in ("model.safetensors", "pytorch_model.bin") if (folder / n).is_file()][:1]
        names = names or weight_names(folder)
    return [path for name in names if (path := inside(folder, name)) is not None]


def _published(folder: Path, name: str) -> dict[str, Any]:
    """Describe a checkpoint from elsewhere, as far as its config and headers tell."""
    config, files = config_of(folder), _weights(folder)
    facts: dict[str, Any] = {"published checkpoint": f"{name}: not a model of vertebra, but to be converted to one"}
    if kind := told_kind(config):
        facts["says"] = kind
    family = family_of(config)
    facts["family"] = family or "not told by its config; vertebra convert looks at the names of the tensors too"
    tensors = [tensors_info(path) for path in files if path.suffix == ".safetensors"]
    if len(tensors) == len(files):
        facts["parameters"] = sum(t.params for t in tensors)
        facts["tensors"] = sum(t.tensors for t in tensors)
        facts["dtype"] = ", ".join(sorted({d for t in tensors for d in t.dtypes}))
    else:
        facts["parameters"] = f"not counted: {', '.join(p.name for p in files[:4])} has no header to count them by"
    facts["size"] = f"{sum(p.stat().st_size for p in files) / 1e6:.2f} MB"
    command = f"vertebra convert {name} -o DIR"
    facts["use"] = f"{command}, which says why ours cannot be one" if family == "chronos_bolt" else command
    return facts


def _model(folder: Path, name: str) -> dict[str, Any]:
    config = read_model_config(folder)
    tensors = tensors_info(folder / "model.safetensors")
    task = str(config.get("task", ""))
    verb = next((p.name for p in pipelines().values() if task in p.tasks), None)
    return {
        "model": name,
        "task": task,
        "class": config.get("model", ""),
        "parameters": tensors.params,
        "tensors": tensors.tensors,
        "dtype": ", ".join(sorted(tensors.dtypes)),
        "size": f"{tensors.nbytes / 1e6:.2f} MB",
        "backbone": config.get("backbone", {}),
        "arguments": config.get("arguments", {}),
        "data": config.get("spec", {}),
        "metrics": config.get("metrics", {}),
        "made with": f"vertebra {config.get('vertebra', '?')}: {config.get('command') or 'command not recorded'}",
        "use": _use(task, verb, name),
    }


def _use(task: str, verb: str | None, name: str) -> str | list[str]:
    """Say what can be done with a model: ``verb`` is the pipeline that takes it."""
    if verb:
        return f"vertebra run {verb} INPUT... -o OUT --model {name}"
    if task.startswith("language/"):  # no data module reads text, so its backbone is what a recipe takes
        place = name if name.startswith(PREFIX) else f"local-dir:{name}"
        lines = [f"vertebra fit RECIPE --model.backbone {place}", f"vertebra export {name} -o FILE.pt2"]
        return [*lines, f'in Python: vertebra.load("{name}"), vertebra.load_backbone("{name}")']
    return f"--model.init_from {name}"


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        tensors = tensors_info(path)
        return {"tensors file": str(path), "parameters": tensors.params, "tensors": tensors.tensors,
                "dtype": ", ".join(sorted(tensors.dtypes))}  # fmt: skip
    if path.suffix != ".ckpt":
        raise LoadError(
            f"{path}: must be a .ckpt or .safetensors file, or a folder, got {path.suffix or 'no ending'!r}."
        )
    from vertebra.domains.base import read_checkpoint  # the one case that needs torch

    checkpoint = read_checkpoint(path)
    state, held = checkpoint["state_dict"], str(checkpoint["class_path"])
    return {
        "checkpoint": str(path),
        "class": checkpoint["class_path"],
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
        "parameters": sum(t.numel() for t in state.values() if hasattr(t, "numel")),
        "tensors": len(state),
        "arguments": {k: v for k, v in checkpoint["hyper_parameters"].items() if k != "backbone"},
        "backbone": checkpoint.get("backbone", {}),
        "data": checkpoint["spec"],
        "use": f"vertebra test --ckpt_path {path}"
        + ("" if is_allowed(held, OURS) else f"  and, if you trust its class: --model {held}"),
    }


def _lines(facts: Mapping[Any, Any], depth: int = 0) -> list[str]:
    names = {key: _short(key) for key in list(facts)[:_MOST]}
    width, indent = max(map(len, names.values()), default=0), "  " * depth
    lines = []
    for key, name in names.items():
        value = facts[key]
        if isinstance(value, Mapping) and depth < _DEEPEST and any(isinstance(v, Mapping) for v in value.values()):
            lines += [f"{indent}{name}", *_lines(value, depth + 1)]
        else:
            lines.append(f"{indent}{name:<{width}}  {_text(key, value)}".rstrip())
    return lines + ([f"{indent}and {len(facts) - _MOST:,} more"] if len(facts) > _MOST else [])


def _text(key: Any, value: Any) -> str:
    if key == "parameters" and isinstance(value, int):
        return f"{value:,} ({short_number(value)})"
    if isinstance(value, Mapping | list):
        count = len(value) - _MOST
        first = list(value.items())[:_MOST] if isinstance(value, Mapping) else value[:_MOST]
        words = [f"{_short(w[0])}={_short(w[1])}" if isinstance(value, Mapping) else _short(w, _LONGEST) for w in first]
        words += [f"and {count:,} more"] if count > 0 else []
        return ("\n    " if isinstance(value, list) and any(" " in word for word in words) else "  ").join(words)
    return _short(value, _LONGEST)


def _short(value: Any, most: int = 100) -> str:
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, list | dict):
        text = json.dumps(value, default=str, skipkeys=True)
    else:
        text = printable(str(value)[: most + 1])
    return text if len(text) <= most else text[: most - 3] + "..."
