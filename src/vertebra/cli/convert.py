"""``vertebra convert``: a published checkpoint to a model directory, and back."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from vertebra.cli.parsing import Parser
from vertebra.cli.tables import short_number
from vertebra.errors import ConfigError, UnknownNameError, printable

MOST_LISTED = 12
"""Names of one reason that are printed one by one."""


def run(verb: str, args: list[str]) -> int:
    """Convert, and print what became of every tensor."""
    parser = Parser(
        verb,
        "A published checkpoint to a model directory, or with --to a model of ours to a published format. "
        "`vertebra convert --families` lists what is known.",
    )
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="file, folder, .zip, hf-hub:ORG/NAME; or a model")
    parser.add_argument("-o", "--output", metavar="DIR", help="folder to write; must be new, or a model directory")
    parser.add_argument("--family", metavar="NAME", help="of the checkpoint (default: found from keys and config)")
    parser.add_argument("--to", metavar="NAME", help="write a model of ours in the format of this family")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights written")
    parser.add_argument("--families", action="store_true", help="list the known families")
    options = parser.parse_args(args)
    if options.families:
        return _families()
    if options.source is None or options.output is None:
        raise ConfigError("convert: needs SOURCE and -o DIR. See: vertebra convert --help")
    if options.family and options.to:
        raise ConfigError("convert: --family is of a published checkpoint, --to of a model of ours; give one of them.")
    folder = Path(options.output)
    if options.to:
        return _back(options.source, folder, options.to, options.dtype)
    return _convert(options.source, folder, options.family, options.dtype, shlex.join(["vertebra", verb, *args]))


def _families() -> int:
    from vertebra.domains.conversion import converters

    known = converters()
    width = max(map(len, known))
    print("\n".join(f"{name:<{width}}  {converter.summary}" for name, converter in known.items()))
    return 0


def _convert(source: str, folder: Path, family: str | None, dtype: str | None, command: str) -> int:
    import torch

    from vertebra.domains.conversion import convert
    from vertebra.domains.saving import save_model

    _check_free(folder)
    converter, found = convert(source, family)
    model = found.model
    if dtype is not None:
        model = model.to(getattr(torch, dtype))
    save_model(model, folder, command=printable(command), notes=found.notes, files=found.files)
    count = sum(p.numel() for p in model.parameters())
    print(f"family     {converter.name}: {converter.summary}")
    print(
        f"model      {type(model).__name__}, {model.backbone.config.family} backbone, {short_number(count)} parameters"
    )
    print(f"tensors    {printable(found.report)}")
    by_reason: dict[str, list[str]] = {}
    for name, reason in found.left_out.items():
        by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        print(f"left out   {len(names)}: {printable(reason)}")
        print("\n".join(f"             {printable(name)}" for name in names[:MOST_LISTED]))
        if len(names) > MOST_LISTED:
            print(f"             and {len(names) - MOST_LISTED} more, all in {folder / 'left_out.json'}")
    if found.left_out:
        (folder / "left_out.json").write_text(json.dumps(dict(found.left_out), indent=2) + "\n", encoding="utf-8")
    written = printable(", ".join(sorted(p.name for p in folder.iterdir())))
    print(f"wrote {folder}: {written}\nSee: vertebra info {folder}")
    return 0


def _back(source: str, folder: Path, family: str, dtype: str | None) -> int:
    import torch
    from safetensors.torch import save_file

    from vertebra.domains.conversion import converters, copy_tokenizer
    from vertebra.domains.loading import load

    known = converters()
    if family not in known:
        raise UnknownNameError("family", family, known)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"convert: {folder} is not empty; choose a new folder.")
    model = load(source, dtype=getattr(torch, dtype) if dtype else None)
    tensors, config = known[family].restore(model)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(own, folder / "model.safetensors", metadata={"format": "pt"})
        if config:
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        files = copy_tokenizer(source, folder)
    except OSError as e:
        raise ConfigError(f"convert: {folder} cannot be written ({e.strerror or e}); choose another place.") from e
    (folder / "model.safetensors").chmod(0o644)
    print(f"wrote {folder}: {len(tensors)} tensors by the names of {family}{''.join(f', {name}' for name in files)}")
    return 0


def _check_free(folder: Path) -> None:
    """Refuse a taken place before the work, not after it."""
    if folder.exists() and not (folder / "config.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"convert: {folder} exists and is no model directory; choose another place.")
