"""``vertebra info``: what a name, folder or checkpoint is, from headers alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vertebra.backbones.catalog import bundled_models, presets
from vertebra.cli.headers import read_model_config, tensors_info
from vertebra.cli.parsing import Parser
from vertebra.cli.recipes import recipe_header, recipes
from vertebra.cli.tables import short_number
from vertebra.errors import LoadError, UnknownNameError
from vertebra.pipelines.catalog import pipelines


def run(verb: str, args: list[str]) -> int:
    """Print what something is."""
    parser = Parser(verb, "What a preset, bundled model, recipe, pipeline, model directory, run folder or .ckpt is.")
    parser.add_argument("name", metavar="NAME|DIR|FILE.ckpt")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(args)
    facts = describe(options.name)
    if options.json:
        print(json.dumps(facts, indent=2))
    else:
        print("\n".join(_lines(facts)))
    return 0


def describe(name: str) -> dict[str, Any]:
    """Return JSON-able facts about what ``name`` means.

    Raises:
        UnknownNameError: No preset, model, recipe or pipeline of that name, and no such file or folder.
        LoadError: A file or folder of another kind.
    """
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
    path = Path(name.removeprefix("local-dir:"))
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _file(path)
    if "/" in name and "." in path.suffix:
        raise LoadError(f"{name}: no such file or folder.")
    raise UnknownNameError("name", name, [*presets(), *bundled_models(), *recipes(), *pipelines()])


def _folder(path: Path) -> dict[str, Any]:
    if (path / "config.json").is_file():
        return _model(path, str(path))
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        metrics = path / "metrics.json"
        facts: dict[str, Any] = {
            "run": str(path.resolve()),
            "holds": sorted(p.name + "/" * p.is_dir() for p in path.iterdir() if not p.name.startswith(".")),
            "checkpoints": sorted(p.name for p in (path / "checkpoints").glob("*.ckpt")),
        }
        if metrics.is_file():
            facts["metrics"] = json.loads(metrics.read_text(encoding="utf-8"))
        if (path / "model" / "config.json").is_file():
            facts["model directory"] = _model(path / "model", str(path / "model"))
        done = (path / "model").is_dir()
        facts["use"] = f"vertebra {'test' if done else 'fit'} --ckpt_path {path}"
        return facts
    raise LoadError(f"{path}: neither a model directory (config.json) nor a run folder (checkpoints/).")


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
        lines = [f"vertebra fit RECIPE --model.backbone local-dir:{name}", f"vertebra export {name} -o FILE.pt2"]
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
    state = checkpoint["state_dict"]
    return {
        "checkpoint": str(path),
        "class": checkpoint["class_path"],
        "epoch": checkpoint.get("epoch"),
        "step": checkpoint.get("global_step"),
        "parameters": sum(t.numel() for t in state.values()),
        "tensors": len(state),
        "arguments": {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if k != "backbone"},
        "backbone": checkpoint.get("backbone", {}),
        "data": checkpoint["spec"],
        "use": f"vertebra test --ckpt_path {path}",
    }


def _lines(facts: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max((len(k) for k in facts), default=0)
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and value and any(isinstance(v, Mapping) for v in value.values()):
            lines += [f"{indent}{key}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{key:<{width}}  {_text(key, value)}".rstrip())
    return lines


def _text(key: str, value: Any) -> str:
    if key == "parameters":
        return f"{value:,} ({short_number(value)})"
    if isinstance(value, Mapping):
        return "  ".join(f"{k}={_short(v)}" for k, v in value.items())
    if isinstance(value, list):
        return ("\n    " if any(" " in str(v) for v in value) else "  ").join(str(v) for v in value)
    return str(value)


def _short(value: Any) -> str:
    text = (
        f"{value:.4g}"
        if isinstance(value, float)
        else json.dumps(value)
        if isinstance(value, list | dict)
        else str(value)
    )
    return text if len(text) <= 100 else text[:97] + "..."
